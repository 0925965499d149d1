//! One socket's life: open, then turn by turn: hear, read, write, look at the
//! time, wait.

mod reading;
mod writing;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;
use std::time::{Duration, Instant};

use super::Connection;
use super::guest::{Failure, Guest, Outcome};
use crate::error::{Error, ErrorKind, Step};
use crate::handler::{Acts, MAX_SENDS, Origin, Outgoing, Resume};
use crate::io::dial::{Dialed, timed_out};
use crate::io::poll::Ready;
use crate::io::upgrade::Upgraded;
use crate::io::websocket::{Limits, Websocket};
use crate::logic::connection::Input;
use crate::logic::heartbeat::{Beat, Liveness};
use crate::logic::layout::Layouts;

/// Messages written before the other concerns get a look.
const BUDGET: usize = 256;

/// Frames read between two looks at what was posted, and in a turn while somebody
/// sends: a flooding peer must not starve those who send, or close.
const LOOK: usize = 64;

/// Who sends now will probably send again soon, and shall not wait for long: so
/// long, a turn reads less.
const SENDING: Duration = Duration::from_millis(100);

/// Messages of a session that may wait for a server that does not read: twice what
/// one run of messages can bring.
const MAX_BACKLOG: usize = 2 * LOOK * MAX_SENDS;

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
    ws: Box<Websocket>,
    upgraded: Upgraded,
    /// Of the texts that ids were found in.
    layouts: Layouts,
    live: Liveness,
    /// Sequence of the last message.
    sequence: u64,
    /// The last message before this epoch, for the session.
    resume: Option<Resume>,
    /// The session must be ready by then; `None` once it is.
    opening: Option<Instant>,
    /// Messages of the session, which go before those of the outbox.
    backlog: VecDeque<Outgoing>,
    /// Messages and bytes of the last block, if it was full: the next one will
    /// probably be like it.
    last_block: (usize, usize),
    /// Whether the socket, or a buffer above it, may hold more.
    more: bool,
    /// When a program's message was written last.
    sent_at: Option<Instant>,
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
    /// Boxed, and not inlined: what a thread's stack once held stays its own. So it
    /// is with what else is large and done with before the thread waits.
    #[inline(never)]
    pub(super) fn new(
        connection: &'c mut Connection,
        number: u64,
        opened: Opened,
        deadline: Instant,
    ) -> Box<Self> {
        let shared = &connection.shared;
        let now = shared.clock.now();
        let backlog = shared.policy.openings.iter().cloned().collect();
        let mut live = Liveness::new(shared.policy.heartbeat, now);
        // The last epoch may have left the queue full.
        let blocked = !connection.held.is_empty();
        if blocked {
            live.pause(now);
        }
        let Opened { ws, upgraded, behind } = opened;
        let (received, sent) = ws.socket().traffic();
        let resume = connection.resume.clone();
        connection.peer().inbox.begin_epoch(number);
        Box::new(Self {
            connection,
            number,
            ws,
            upgraded,
            layouts: Layouts::default(),
            live,
            sequence: 0,
            resume,
            opening: Some(deadline),
            backlog,
            last_block: (0, 0),
            // The first frames may have come with the upgrade's answer.
            more: true,
            sent_at: None,
            blocked,
            beat: None,
            ping: None,
            pings: 0,
            traffic: (received - behind, sent),
            written: sent,
            leaving: Leaving::No,
            leave_by: None,
        })
    }

    /// Serves the socket until it is lost or the client closes. Guarantees that
    /// the socket is released and nothing unsent is forgotten, also by a panic.
    pub(super) fn run(mut self: Box<Self>) -> EpochEnd {
        let end = self.serve().map(|end| self.take_leave(end));
        self.count_traffic();
        let unfinished = self.ws.take_unfinished();
        let connection = self.connection;
        connection.peer().inbox.put_back(unfinished);
        connection.peer().inbox.end_epoch();
        self.ws.release(&mut connection.poller);
        let end = end.unwrap_or_else(|panic| resume_unwind(panic));
        if let EpochEnd::Closed = end {
            let now = connection.shared.clock.now();
            connection.peer().metrics.ended(now, None);
        }
        end
    }

    #[inline(never)]
    fn take_leave(&mut self, end: EpochEnd) -> EpochEnd {
        match &end {
            EpochEnd::Lost(error) if self.leaving != Leaving::No => {
                // The server left first, and without a word: closed all the same.
                let chain = error.chain();
                log::info!("connection {} ended while closing: {chain}", self.connection.index);
                return EpochEnd::Closed;
            }
            EpochEnd::Lost(error) => self.say_why(error),
            EpochEnd::Closed => {}
        }
        end
    }

    /// The outer result is that of the thread: an error is a panic.
    fn serve(&mut self) -> thread::Result<EpochEnd> {
        let mut guest = match Guest::new(self.connection.shared.policy.session.as_ref()) {
            Ok(guest) => guest,
            Err(failure) => return Ok(self.fail(failure)),
        };
        let end = catch_unwind(AssertUnwindSafe(|| self.host(&mut guest)));
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
    #[inline(never)]
    fn open(&mut self, guest: &mut Guest) -> Result<(), EpochEnd> {
        let outcome = self.gather(self.now(), |epoch, gather| {
            let origin = origin(epoch.connection.index, epoch.number, &epoch.upgraded);
            Ok(guest.on_open(origin, epoch.resume.as_ref(), gather))
        })?;
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
            self.gather(now, |epoch, gather| epoch.read(guest, gather, now))?;
        }
        self.write(now)?;
        self.look_at_the_time(guest, now)?;
        self.rest()
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
    #[inline(never)]
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

    #[inline(never)]
    fn look_at_the_time(&mut self, guest: &mut Guest, now: Instant) -> Result<(), EpochEnd> {
        match self.leaving {
            Leaving::Draining { end, .. } | Leaving::Sent { end } if now >= end => {
                return Err(EpochEnd::Closed);
            }
            _ => {}
        }
        if self.opening.is_some_and(|deadline| now >= deadline) {
            let limit = self.connection.shared.policy.dial.connect_timeout;
            let whom = match self.connection.held.is_full() {
                true => "the server, which is not read for as the queue is full,",
                false => "the server",
            };
            return Err(timed_out(Step::Opening, &whom, limit).into());
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

    #[inline(never)]
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
        // A ping that the socket does not take starts the write deadline.
        self.flush(now)
    }

    #[inline(never)]
    fn session_heartbeat(&mut self, guest: &mut Guest, now: Instant) -> Result<(), EpochEnd> {
        let Some((interval, due)) = self.beat else { return Ok(()) };
        if now < due || self.opening.is_some() || self.leaving != Leaving::No {
            return Ok(());
        }
        self.beat = Some((interval, self.connection.shared.clock.after(interval)));
        let outcome = self.gather(now, |epoch, gather| {
            let origin = origin(epoch.connection.index, epoch.number, &epoch.upgraded);
            Ok(guest.on_heartbeat(origin, epoch.resume.as_ref(), gather))
        })?;
        self.carry_out(outcome)?;
        self.write(now)
    }

    /// Waits, unless there is more to read; then only looks at the socket, and
    /// only if a write waits for it.
    fn rest(&mut self) -> Result<(), EpochEnd> {
        let busy = self.can_read();
        if busy && self.ws.socket().can_write() {
            return Ok(());
        }
        if !busy && let Some(at) = self.deadline() {
            self.connection.arm(at);
        }
        let may_send = self.may_send();
        let Connection { poller, shared, index, .. } = &mut *self.connection;
        let inbox = &shared.connections[*index].inbox;
        let (ws, more) = (&mut self.ws, &mut self.more);
        let tell = |ready: Ready| *more |= ws.on_ready(ready);
        poller.wait(|| busy || inbox.posted(may_send), tell).map_err(|error| {
            let kind = ErrorKind::Io(error.kind());
            Error::caused(kind, "waiting for the socket failed", error).into()
        })
    }

    fn deadline(&self) -> Option<Instant> {
        let leaving = match self.leaving {
            Leaving::No => None,
            Leaving::Draining { until, .. } => Some(until),
            Leaving::Sent { end } => Some(end),
        };
        // As long as it can go out: what is due and not done would be due for ever.
        let beats = self.opening.is_none() && self.leaving == Leaving::No;
        let beat = self.beat.filter(|_| beats).map(|(_, due)| due);
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
    #[inline(never)]
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

/// An upgraded socket that nothing was read from yet.
pub(super) struct Opened {
    ws: Box<Websocket>,
    upgraded: Upgraded,
    /// Bytes that came with the upgrade's answer.
    behind: u64,
}

impl Opened {
    #[inline(never)]
    pub(super) fn new(dialed: Dialed, limits: Limits) -> Self {
        let Dialed { stream, mut upgraded, .. } = dialed;
        let rest = std::mem::take(&mut upgraded.rest);
        let behind = rest.len() as u64;
        Self { ws: Box::new(Websocket::new(stream, rest, limits)), upgraded, behind }
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
