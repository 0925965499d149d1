//! One socket's life: open, then turn by turn: hear, read, write, look at the
//! time, wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Connection;
use super::guest::{Failure, Gather, Guest, Outcome};
use crate::error::{Error, ErrorKind, Step};
use crate::event::EventKind;
use crate::handler::{Acts, MAX_SENDS, Origin, Outgoing, Resume};
use crate::io::dial::{Dialed, timed_out};
use crate::io::poll::Ready;
use crate::io::upgrade::Upgraded;
use crate::io::websocket::{Incoming, Sent, Websocket};
use crate::logic::connection::Input;
use crate::logic::heartbeat::{Beat, Liveness};
use crate::message::{Block, BlockBuilder};
use crate::metrics::DropReason;
use crate::threads::queue::{MAX_HELD, Offer};

/// Messages written before the other concerns get a look.
const BUDGET: usize = 256;

/// Frames read between two looks at what was posted: a flooding peer must not
/// starve those who send, or close.
const LOOK: usize = 64;

/// Messages of a session that may wait for a server that does not read.
const MAX_BACKLOG: usize = 16 * MAX_SENDS;

/// Payload bytes after which a block is handed over.
const BLOCK_BYTES: usize = 256 * 1024;

/// How an epoch ended.
#[derive(Debug)]
pub(super) enum EpochEnd {
    /// The client closes.
    Closed,
    /// The attempt or the connection failed.
    Lost(Error),
}

impl From<Error> for EpochEnd {
    fn from(error: Error) -> Self {
        EpochEnd::Lost(error)
    }
}

pub(super) struct Epoch<'c> {
    connection: &'c mut Connection,
    number: u64,
    ws: Websocket,
    upgraded: Upgraded,
    live: Liveness,
    /// Sequence of the last message.
    sequence: u64,
    /// The last message before this epoch, for the session.
    resume: Option<Resume>,
    /// The session must be ready by then; `None` once it is.
    opening: Option<Instant>,
    /// Messages of the session, which go before those of the outbox.
    backlog: VecDeque<Outgoing>,
    /// Whether the socket, or a buffer above it, may hold more.
    more: bool,
    /// Whether the reader is stopped because the queue is full.
    blocked: bool,
    /// The session's own heartbeat: its interval, and when the next is due.
    beat: Option<(Duration, Instant)>,
    /// The last ping's number and time, until its pong.
    ping: Option<(u64, Instant)>,
    pings: u64,
    traffic: (u64, u64),
    /// Bytes sent up to the last look for progress.
    written: u64,
    leaving: Leaving,
    /// The deadline by which `leaving` was reckoned.
    leave_by: Option<Instant>,
}

/// How far a close has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    No,
    /// The outbox is sent first, until then at the latest; `end` ends it all.
    Draining {
        until: Instant,
        end: Instant,
    },
    /// The close frame is out; the server's is awaited.
    Sent {
        end: Instant,
    },
}

impl<'c> Epoch<'c> {
    pub(super) fn new(
        connection: &'c mut Connection,
        number: u64,
        mut dialed: Dialed,
        deadline: Instant,
    ) -> Self {
        let shared = &connection.shared;
        let now = shared.clock.now();
        let backlog = shared.policy.openings.iter().cloned().collect();
        let mut live = Liveness::new(shared.policy.heartbeat, now);
        // The last epoch may have left the queue full.
        let blocked = !connection.held.is_empty();
        if blocked {
            live.pause(now);
        }
        let rest = std::mem::take(&mut dialed.upgraded.rest);
        let behind = rest.len() as u64;
        let ws = Websocket::new(dialed.stream, rest, shared.policy.limits);
        let (received, sent) = ws.socket().traffic();
        let resume = connection.resume.clone();
        connection.peer().inbox.begin_epoch(number);
        Self {
            connection,
            number,
            ws,
            upgraded: dialed.upgraded,
            live,
            sequence: 0,
            resume,
            opening: Some(deadline),
            backlog,
            // The first frames may have come with the upgrade's answer.
            more: true,
            blocked,
            beat: None,
            ping: None,
            pings: 0,
            traffic: (received - behind, sent),
            written: sent,
            leaving: Leaving::No,
            leave_by: None,
        }
    }

    /// Serves the socket until it is lost or the client closes. Guarantees that
    /// the socket is released and nothing unsent is forgotten.
    pub(super) fn run(mut self) -> EpochEnd {
        let mut end = self.serve();
        self.count_traffic();
        if let EpochEnd::Lost(error) = &end
            && self.leaving != Leaving::No
        {
            // The server left first, and without a word: closed all the same.
            let chain = error.chain();
            log::info!("connection {} ended while closing: {chain}", self.connection.index);
            end = EpochEnd::Closed;
        }
        if let EpochEnd::Lost(error) = &end {
            self.say_why(error);
        }
        let unfinished = self.ws.take_unfinished();
        let connection = self.connection;
        connection.peer().inbox.put_back(unfinished);
        connection.peer().inbox.end_epoch();
        self.ws.release(&mut connection.poller);
        if let EpochEnd::Closed = end {
            let now = connection.shared.clock.now();
            connection.peer().metrics.ended(now, None);
        }
        end
    }

    fn serve(&mut self) -> EpochEnd {
        let policy = self.connection.shared.policy.clone();
        let mut guest = match Guest::new(policy.session.as_ref()) {
            Ok(guest) => guest,
            Err(failure) => return self.fail(failure),
        };
        let end = self.host(&mut guest);
        if let Err(panic) = guest.dismiss() {
            self.connection.report_panic("Session's drop", &panic);
        }
        end
    }

    fn host(&mut self, guest: &mut Guest) -> EpochEnd {
        let mut going = self.open(guest);
        loop {
            match going {
                Ok(()) => going = self.turn(guest),
                Err(end) => return end,
            }
        }
    }

    /// Lets the session open.
    fn open(&mut self, guest: &mut Guest) -> Result<(), EpochEnd> {
        let policy = self.connection.shared.policy.clone();
        let mut gather =
            gather(&policy.ids, self.connection.index, self.number, self.sequence, self.now());
        let outcome = guest.on_open(
            origin(self.connection.index, self.number, &self.upgraded),
            self.resume.as_ref(),
            &mut gather,
        );
        self.hand_over(gather, 0)?;
        let held = outcome.acts.hold && !outcome.acts.ready;
        self.carry_out(outcome)?;
        // Kept for `on_open` only.
        self.upgraded.headers = Vec::new();
        let interval = guest.heartbeat_interval().map_err(|failure| self.fail(failure))?;
        if let Some(interval) = interval {
            self.beat = Some((interval, self.connection.shared.clock.after(interval)));
        }
        if !held {
            self.ready();
        }
        Ok(())
    }

    fn turn(&mut self, guest: &mut Guest) -> Result<(), EpochEnd> {
        self.hear()?;
        self.unblock();
        let now = self.now();
        if self.can_read() {
            self.read(guest, now)?;
        }
        self.write(now)?;
        self.look_at_the_time(guest, now)?;
        self.rest();
        Ok(())
    }

    fn hear(&mut self) -> Result<(), EpochEnd> {
        self.connection.hear();
        if self.is_quiet() {
            // This side does not listen: silence says nothing about the peer.
            let now = self.now();
            self.live.pause(now);
        }
        if let Some(deadline) = self.connection.closing {
            if self.opening.is_some() {
                // No peer to take leave of: the session never began.
                self.connection.step(Input::Close, "the client closes");
                let _ = self.ws.close(1001, "");
                return Err(EpochEnd::Closed);
            }
            self.leave(deadline);
        }
        Ok(())
    }

    /// Begins to close, or hurries up after a close with less time: what
    /// programs have queued is sent first.
    fn leave(&mut self, deadline: Instant) {
        if self.leave_by.replace(deadline) == Some(deadline) {
            return;
        }
        let now = self.now();
        // A fifth is left for the thread's end and its join.
        let time = deadline.saturating_duration_since(now).mul_f32(0.8);
        let time = time.min(self.connection.shared.policy.close_timeout);
        let (half, whole) = (now + time / 2, now + time);
        match &mut self.leaving {
            Leaving::No => {
                self.leaving = Leaving::Draining { until: half, end: whole };
                self.connection.step(Input::Close, "the client closes");
            }
            Leaving::Draining { until, end } => {
                (*until, *end) = (half.min(*until), whole.min(*end));
            }
            Leaving::Sent { end } => *end = whole.min(*end),
        }
    }

    /// Goes on reading if the queue has room again.
    fn unblock(&mut self) {
        if self.blocked && self.connection.offer_held() {
            self.blocked = false;
            let now = self.now();
            self.live.resume(now);
        }
    }

    /// A session that opens is read for even if an earlier epoch left the queue
    /// full: what it waits for may be next.
    fn can_read(&self) -> bool {
        let opens = self.opening.is_some() && self.connection.held.len() < MAX_HELD;
        self.more && (!self.blocked || opens) && !self.is_quiet()
    }

    /// Whether nothing is read although there may be room: the client is about
    /// to close, and is still sending answers.
    fn is_quiet(&self) -> bool {
        self.connection.quiet && self.opening.is_none() && self.leaving == Leaving::No
    }

    /// Reads up to a block. What was read before an error is handed over all
    /// the same.
    fn read(&mut self, guest: &mut Guest, now: Instant) -> Result<(), EpochEnd> {
        let shared = Arc::clone(&self.connection.shared);
        let policy = &shared.policy;
        let mut gather =
            gather(&policy.ids, self.connection.index, self.number, self.sequence, now);
        let (mut skipped, mut messages, mut frames) = (0, 0, 0);
        let mut end = Ok(());
        // Control frames count too: a flood of them must end as well.
        while end.is_ok() && frames < policy.block_messages {
            if gather.block.bytes() >= BLOCK_BYTES || self.is_wanted(frames) {
                break;
            }
            let (read, acts) = self.read_one(guest, &mut gather, &mut skipped);
            frames += usize::from(matches!(read, Ok(Some(_))));
            end = match read {
                Ok(Some(Incoming::Data)) => {
                    messages += 1;
                    acts.map_or(Ok(()), |outcome| self.carry_out(outcome))
                }
                Ok(Some(control)) => self.control(control, now),
                Ok(None) => {
                    self.more = false;
                    break;
                }
                Err(error) => Err(error.into()),
            };
        }
        self.note_reading(messages, frames > 0, now);
        self.hand_over(gather, skipped).and(end)
    }

    /// Whether others want a turn: a flooding peer must not starve them.
    fn is_wanted(&self, frames: usize) -> bool {
        frames % LOOK == LOOK - 1 && self.connection.peer().inbox.posted(self.may_send())
    }

    /// Reads one frame; a data message goes to the session, or straight on.
    #[inline]
    fn read_one(
        &mut self,
        guest: &mut Guest,
        gather: &mut Gather<'_>,
        skipped: &mut u64,
    ) -> (Result<Option<Incoming>, Error>, Option<Outcome>) {
        let mut outcome = None;
        let Self { ws, upgraded, resume, connection, number, .. } = self;
        let read = ws.read(|payload| {
            if guest.passes_on() {
                gather.take(payload);
                return;
            }
            let before = gather.sequence;
            let origin = origin(connection.index, *number, upgraded);
            outcome = Some(guest.on_message(payload.data(), origin, resume.as_ref(), gather));
            *skipped += u64::from(gather.sequence == before);
        });
        (read, outcome)
    }

    fn control(&mut self, incoming: Incoming, now: Instant) -> Result<(), EpochEnd> {
        match incoming {
            Incoming::Pong(payload) => {
                if let Some((number, sent)) = self.ping
                    && payload[..] == number.to_be_bytes()
                {
                    self.ping = None;
                    let took = now.saturating_duration_since(sent);
                    self.connection.peer().metrics.round_trip(took);
                }
                Ok(())
            }
            Incoming::Close { code, reason } => {
                // Answers the close frame, as far as the socket takes it.
                let _ = self.ws.flush();
                if self.leaving != Leaving::No {
                    return Err(EpochEnd::Closed);
                }
                let why = if reason.is_empty() { String::new() } else { format!(" ({reason:?})") };
                let phrase = format!("the server closed the connection with code {code}{why}");
                Err(Error::new(ErrorKind::Closed { code }, phrase).into())
            }
            Incoming::Ping | Incoming::Data => Ok(()),
        }
    }

    /// What was read out of a buffer counts as bytes that arrive: a pong may
    /// lie behind more of it than a slow session gets through in time.
    fn note_reading(&mut self, messages: u64, alive: bool, now: Instant) {
        let before = self.traffic.0;
        self.count_traffic();
        if alive || self.traffic.0 != before {
            self.live.on_bytes(now);
        }
        if messages > 0 {
            self.live.on_data(now);
            self.connection.peer().metrics.messages.add(messages);
        }
    }

    fn count_traffic(&mut self) {
        let (received, sent) = self.ws.socket().traffic();
        let metrics = &self.connection.peer().metrics;
        metrics.bytes_received.add(received - self.traffic.0);
        metrics.bytes_sent.add(sent - self.traffic.1);
        self.traffic = (received, sent);
    }

    /// Hands what was read to the queue.
    fn hand_over(&mut self, gather: Gather<'_>, skipped: u64) -> Result<(), EpochEnd> {
        if let Some(panic) = gather.panic {
            self.connection.report_panic("id function", &panic);
        }
        if gather.sequence != self.sequence {
            self.sequence = gather.sequence;
            let id = (!gather.raw_id.is_empty()).then_some(gather.raw_id);
            self.connection.resume =
                Some(Resume { epoch: self.number, sequence: self.sequence, id });
        } else if skipped == 0 {
            return Ok(());
        }
        let now = self.now();
        let behind = !self.connection.held.is_empty();
        match self.connection.shared.queue.offer(gather.block, skipped, behind, now) {
            Offer::Done { shed, reason } => self.connection.tell_shed(shed, reason),
            Offer::Held(block) => self.hold(block, now),
            Offer::Disconnect { shed } => {
                self.connection.tell_shed(shed, DropReason::Disconnect);
                let phrase = "the consumers are too slow: queue full, overflow policy `disconnect`";
                return Err(Error::new(ErrorKind::Overflow, phrase).into());
            }
        }
        Ok(())
    }

    /// The queue is full: stop reading. What comes behind the close frame, and
    /// what a session emits without end while it is not read for, is shed.
    fn hold(&mut self, block: Block, now: Instant) {
        let leaves = matches!(self.leaving, Leaving::Sent { .. });
        if leaves || self.connection.held.len() >= MAX_HELD {
            let reason = if leaves { DropReason::Closed } else { DropReason::Newest };
            let shed = self.connection.shared.queue.turn_away(block, reason);
            self.connection.tell_shed(shed, reason);
            return;
        }
        self.connection.held.push_back(block);
        if !self.blocked {
            self.blocked = true;
            self.live.pause(now);
            self.connection.emit(EventKind::Blocked(true));
        }
    }

    fn write(&mut self, now: Instant) -> Result<(), EpochEnd> {
        self.write_backlog()?;
        if self.may_send() {
            self.write_outbox()?;
        }
        let clear = self.ws.flush()?;
        self.count_traffic();
        // Reading writes too, where pongs wait: so this is since the last turn.
        let progress = std::mem::replace(&mut self.written, self.traffic.1) != self.traffic.1;
        if clear {
            self.live.on_write_clear();
        } else {
            self.live.on_write_blocked(now);
            if progress {
                self.live.on_write_progress(now);
            }
        }
        self.say_goodbye(now)
    }

    fn write_backlog(&mut self) -> Result<(), EpochEnd> {
        if matches!(self.leaving, Leaving::Sent { .. }) {
            return Ok(());
        }
        while let Some(message) = self.backlog.front() {
            if !self.ws.has_room() || self.ws.send_once(message)? == Sent::Full {
                break;
            }
            self.backlog.pop_front();
            self.connection.peer().metrics.messages_sent.add(1);
        }
        Ok(())
    }

    fn write_outbox(&mut self) -> Result<(), EpochEnd> {
        for _ in 0..BUDGET {
            if !self.ws.has_room() {
                break;
            }
            let Some(message) = self.connection.peer().inbox.pop() else { break };
            match self.ws.send(&message) {
                Ok(Sent::Queued) => self.connection.peer().metrics.messages_sent.add(1),
                Ok(Sent::Full) => {
                    self.connection.peer().inbox.put_back(vec![message]);
                    break;
                }
                Err(error) => {
                    // It may be half written, so the server cannot have seen it.
                    self.connection.peer().inbox.put_back(vec![message]);
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Whether messages of the outbox may leave now.
    fn may_send(&self) -> bool {
        self.opening.is_none()
            && self.backlog.is_empty()
            && self.ws.has_room()
            && !matches!(self.leaving, Leaving::Sent { .. })
    }

    /// Sends the close frame once what was queued before it is out.
    fn say_goodbye(&mut self, now: Instant) -> Result<(), EpochEnd> {
        let Leaving::Draining { until, end } = self.leaving else { return Ok(()) };
        let inbox = &self.connection.peer().inbox;
        let empty = self.backlog.is_empty() && !inbox.posted_message();
        if empty || now >= until {
            self.leaving = Leaving::Sent { end };
            self.connection.release_held();
            self.blocked = false;
            self.ws.close(1000, "")?;
        }
        Ok(())
    }

    fn look_at_the_time(&mut self, guest: &mut Guest, now: Instant) -> Result<(), EpochEnd> {
        match self.leaving {
            Leaving::Draining { end, .. } | Leaving::Sent { end } if now >= end => {
                return Err(EpochEnd::Closed);
            }
            _ => {}
        }
        if self.opening.is_some_and(|deadline| now >= deadline) {
            let limit = self.connection.shared.policy.dial.connect_timeout;
            return Err(timed_out(Step::Opening, &"the server", limit).into());
        }
        while let Some(beat) = self.live.on_time(now) {
            match beat {
                Beat::Ping => self.ping(now)?,
                Beat::Dead(_) if self.leaving != Leaving::No => return Err(EpochEnd::Closed),
                Beat::Dead(cause) => {
                    return Err(cause.error(&self.connection.shared.policy.heartbeat).into());
                }
            }
        }
        self.session_heartbeat(guest, now)
    }

    fn ping(&mut self, now: Instant) -> Result<(), EpochEnd> {
        if matches!(self.leaving, Leaving::Sent { .. }) {
            return Ok(());
        }
        self.pings += 1;
        // Nothing has arrived for a while.
        self.ws.shrink();
        self.ping = Some((self.pings, now));
        self.connection.peer().metrics.pings.add(1);
        // A full buffer takes no ping: then nothing is flowing out either, and
        // the verdict depends on what flows in.
        self.ws.ping(self.pings.to_be_bytes().to_vec())?;
        self.ws.flush()?;
        Ok(())
    }

    fn session_heartbeat(&mut self, guest: &mut Guest, now: Instant) -> Result<(), EpochEnd> {
        let Some((interval, due)) = self.beat else { return Ok(()) };
        if now < due || self.opening.is_some() || self.leaving != Leaving::No {
            return Ok(());
        }
        self.beat = Some((interval, self.connection.shared.clock.after(interval)));
        let policy = self.connection.shared.policy.clone();
        let mut gather =
            gather(&policy.ids, self.connection.index, self.number, self.sequence, now);
        let origin = origin(self.connection.index, self.number, &self.upgraded);
        let outcome = guest.on_heartbeat(origin, self.resume.as_ref(), &mut gather);
        self.hand_over(gather, 0)?;
        self.carry_out(outcome)?;
        self.write(now)
    }

    /// Waits, unless there is more to read; then only looks at the socket, and
    /// only if a write waits for it.
    fn rest(&mut self) {
        let busy = self.can_read();
        if busy && self.ws.socket().can_write() {
            return;
        }
        if !busy && let Some(at) = self.deadline() {
            self.connection.arm(at);
        }
        let may_send = self.may_send();
        let Connection { poller, shared, index, .. } = &mut *self.connection;
        let inbox = &shared.connections[*index].inbox;
        let (ws, more) = (&mut self.ws, &mut self.more);
        let tell = |ready: Ready| *more |= ws.on_ready(ready);
        if let Err(error) = poller.wait(|| busy || inbox.posted(may_send), tell) {
            log::error!("connection {index}: waiting for the socket failed: {error}");
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let leaving = match self.leaving {
            Leaving::No => None,
            Leaving::Draining { until, .. } => Some(until),
            Leaving::Sent { end } => Some(end),
        };
        let beat = self.beat.filter(|_| self.opening.is_none()).map(|(_, due)| due);
        [leaving, self.opening, self.live.deadline(), beat].into_iter().flatten().min()
    }

    /// Does what a session hook asked for.
    fn carry_out(&mut self, outcome: Outcome) -> Result<(), EpochEnd> {
        let Outcome { acts, failure } = outcome;
        if let Some(failure) = failure {
            return Err(self.fail(failure));
        }
        let Acts { sends, ready, healthy, .. } = acts;
        self.queue_sends(sends)?;
        if healthy {
            self.connection.machine.mark_healthy();
        }
        if ready {
            self.ready();
        }
        Ok(())
    }

    /// Takes what a session sends; nothing follows a close frame.
    fn queue_sends(&mut self, sends: Vec<Outgoing>) -> Result<(), EpochEnd> {
        let limit = self.connection.shared.policy.limits.max_message;
        let phrase = if sends.iter().any(|message| message.len() > limit) {
            "the session sends a message larger than max_message_size".to_owned()
        } else if self.backlog.len() + sends.len() > MAX_BACKLOG {
            format!("more than {MAX_BACKLOG} messages of the session wait for the server to read")
        } else {
            if !matches!(self.leaving, Leaving::Sent { .. }) {
                self.backlog.extend(sends);
            }
            return Ok(());
        };
        Err(Error::new(ErrorKind::Session, phrase).into())
    }

    fn fail(&mut self, failure: Failure) -> EpochEnd {
        if let Some((hook, message)) = failure.panic {
            self.connection.report_panic(hook, &message);
        }
        EpochEnd::Lost(failure.error)
    }

    /// The opening is done: the attempt is a success.
    fn ready(&mut self) {
        if self.opening.take().is_none() {
            return;
        }
        let now = self.now();
        self.connection.peer().metrics.connected(now);
        match self.connection.machine.ready(now) {
            Ok(from) => {
                let to = self.connection.machine.state();
                self.connection.shared.transition(self.connection.index, from, to, "ready");
            }
            Err(illegal) => log::error!("{}", super::bug(illegal)),
        }
    }

    /// Tells a server that broke the protocol what it did, if it still listens.
    /// A peer that is gone is told nothing, and nothing is left for it.
    fn say_why(&mut self, error: &Error) {
        let code = match error.kind() {
            ErrorKind::NoPong | ErrorKind::WriteStalled => return self.ws.abandon(),
            ErrorKind::Protocol => 1002,
            ErrorKind::TooLarge => 1009,
            ErrorKind::Idle | ErrorKind::Session | ErrorKind::Overflow => 1001,
            _ => return,
        };
        let _ = self.ws.close(code, "");
    }

    fn now(&self) -> Instant {
        self.connection.shared.clock.now()
    }
}

fn origin(connection: usize, epoch: u64, upgraded: &Upgraded) -> Origin<'_> {
    Origin {
        connection,
        epoch,
        subprotocol: upgraded.subprotocol.as_deref(),
        headers: &upgraded.headers,
    }
}

fn gather(
    ids: &super::Ids,
    connection: usize,
    epoch: u64,
    sequence: u64,
    now: Instant,
) -> Gather<'_> {
    Gather {
        block: BlockBuilder::new(connection, epoch, now),
        ids,
        sequence,
        raw_id: Vec::new(),
        panic: None,
    }
}
