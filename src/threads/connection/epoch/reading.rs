//! The reading half of a turn: frames to the session, and on to the queue.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::{BLOCK_BYTES, Epoch, EpochEnd, LOOK, Leaving, SENDING, origin};
use crate::error::{Error, ErrorKind};
use crate::event::EventKind;
use crate::handler::{Acts, MAX_SENDS, Resume};
use crate::io::websocket::Incoming;
use crate::message::{Block, BlockBuilder};
use crate::metrics::DropReason;
use crate::threads::connection::guest::{Gather, Guest, Outcome};
use crate::threads::connection::ids::Ids;
use crate::threads::queue::Offer;

impl Epoch<'_> {
    /// A session that opens is read for even if an earlier epoch left the queue
    /// full: what it waits for may be next.
    pub(super) fn can_read(&self) -> bool {
        let opens = self.opening.is_some() && !self.connection.held.is_full();
        self.more && (!self.blocked || opens) && !self.is_quiet()
    }

    /// Whether nothing is read although there may be room: the client is about
    /// to close, and is still sending answers.
    pub(super) fn is_quiet(&self) -> bool {
        self.connection.quiet && self.opening.is_none() && self.leaving == Leaving::No
    }

    /// Reads up to a block.
    pub(super) fn read(
        &mut self,
        guest: &mut Guest,
        gather: &mut Gather<'_>,
        now: Instant,
    ) -> Result<(), EpochEnd> {
        let block_messages = self.connection.shared.policy.block_messages;
        if guest.passes_on() {
            let most = self.most(block_messages, now);
            let read = gather.take_run(&mut self.ws, most);
            if gather.messages > 0 || !matches!(read, Ok(true)) {
                self.more = *read.as_ref().unwrap_or(&true);
                self.note_reading(gather, gather.messages > 0, now);
                return read.map(drop).map_err(EpochEnd::from);
            }
        }
        gather.block.reserve(self.last_block.0, self.last_block.1);
        let (mut frames, mut looked) = (0, 0);
        let backlog = self.backlog.len();
        let mut end = Ok(());
        // Control frames count too: a flood of them must end as well.
        while end.is_ok() && frames < block_messages && self.more {
            // Where the queue is full, no more is read than makes the session ready.
            let enough = self.is_quiet() || self.blocked && self.opening.is_none();
            if enough || gather.block.bytes() >= BLOCK_BYTES {
                break;
            }
            // What a session sends in answer leaves before more is read.
            if self.backlog.len() - backlog >= MAX_SENDS {
                break;
            }
            if frames - looked >= LOOK {
                looked = frames;
                if self.is_wanted() {
                    break;
                }
            }
            // What makes a session ready is looked at by itself.
            if !guest.passes_on() && self.opening.is_none() {
                let most = LOOK.min(block_messages - frames);
                let (shown, read) = self.show_run(guest, gather, most);
                frames += shown;
                end = read.map(|more| self.more = more);
                if shown > 0 || end.is_err() || !self.more {
                    continue;
                }
            }
            let (read, acts) = self.read_one(guest, gather);
            frames += usize::from(matches!(read, Ok(Some(_))));
            end = match read {
                Ok(Some(Incoming::Data)) => acts.map_or(Ok(()), |outcome| self.carry_out(outcome)),
                Ok(Some(control)) => self.control(control, now),
                Ok(None) => {
                    self.more = false;
                    break;
                }
                Err(error) => Err(error.into()),
            };
        }
        let full = self.more && gather.block.len() >= LOOK;
        self.last_block =
            if full { (gather.block.len(), gather.block.text_bytes()) } else { (0, 0) };
        self.note_reading(gather, frames > 0, now);
        end
    }

    /// Has `fill` gather messages, and hands them over whatever becomes of it: those
    /// before an error count, and those before a panic, which ends the thread.
    #[inline(never)]
    pub(super) fn gather<T>(
        &mut self,
        now: Instant,
        fill: impl FnOnce(&mut Self, &mut Gather<'_>) -> Result<T, EpochEnd>,
    ) -> Result<T, EpochEnd> {
        let shared = Arc::clone(&self.connection.shared);
        let mut gather = self.gatherer(&shared.policy.ids, now);
        let filled = catch_unwind(AssertUnwindSafe(|| fill(self, &mut gather)));
        let handed = self.hand_over(gather);
        let filled = filled.unwrap_or_else(|panic| resume_unwind(panic));
        handed.and(filled)
    }

    /// Boxed, and made elsewhere: it would lie on the stack of a thread that waits,
    /// more than once.
    #[inline(never)]
    fn gatherer<'i>(&mut self, ids: &'i Ids, now: Instant) -> Box<Gather<'i>> {
        Box::new(Gather {
            block: BlockBuilder::new(self.connection.index, self.number, now),
            ids,
            messages: 0,
            skipped: 0,
            sequence: self.sequence,
            raw_id: Vec::new(),
            panic: None,
            layouts: std::mem::take(&mut self.layouts),
        })
    }

    /// How many messages a turn reads at most.
    fn most(&self, block: usize, now: Instant) -> usize {
        let sends = self.sent_at.is_some_and(|at| now.saturating_duration_since(at) < SENDING);
        if sends { block.min(LOOK) } else { block }
    }

    /// Whether others want a turn: a flooding peer must not starve them.
    fn is_wanted(&self) -> bool {
        self.connection.peer().inbox.posted(self.may_send())
    }

    /// Shows the session the whole messages that lie ready, up to `most`, and does
    /// what it asked for; how many they were, and `false` when the socket has no
    /// more.
    fn show_run(
        &mut self,
        guest: &mut Guest,
        gather: &mut Gather<'_>,
        most: usize,
    ) -> (usize, Result<bool, EpochEnd>) {
        let (mut acts, mut failure) = (Acts::default(), None);
        let Self { ws, upgraded, resume, connection, number, .. } = self;
        let origin = origin(connection.index, *number, upgraded);
        let (shown, read) = ws.show_run(most, |payload| {
            failure = guest.on_message(payload.data(), origin, resume.as_ref(), gather, &mut acts);
            failure.is_none()
        });
        let mut done = self.carry_out(Outcome { acts, failure: None });
        if let (Ok(()), Some(failure)) = (&done, failure) {
            done = Err(self.fail(failure));
        }
        (shown, done.and(read.map_err(EpochEnd::from)))
    }

    /// Reads one frame; a data message goes to the session, or straight on.
    #[inline]
    pub(super) fn read_one(
        &mut self,
        guest: &mut Guest,
        gather: &mut Gather<'_>,
    ) -> (Result<Option<Incoming>, Error>, Option<Outcome>) {
        let mut outcome = None;
        let Self { ws, upgraded, resume, connection, number, .. } = self;
        let read = ws.read(|payload| {
            if guest.passes_on() {
                gather.take(payload);
                return;
            }
            let origin = origin(connection.index, *number, upgraded);
            let mut acts = Acts::default();
            let failure =
                guest.on_message(payload.data(), origin, resume.as_ref(), gather, &mut acts);
            outcome = Some(Outcome { acts, failure });
        });
        (read, outcome)
    }

    #[inline(never)]
    pub(super) fn control(&mut self, incoming: Incoming, now: Instant) -> Result<(), EpochEnd> {
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
    pub(super) fn note_reading(&mut self, gather: &Gather<'_>, alive: bool, now: Instant) {
        let before = self.traffic.0;
        self.count_traffic();
        if alive || self.traffic.0 != before {
            self.live.on_bytes(now);
        }
        if gather.messages > 0 {
            self.live.on_data(now);
        }
    }

    pub(super) fn count_traffic(&mut self) {
        let (received, sent) = self.ws.socket().traffic();
        let metrics = &self.connection.peer().metrics;
        metrics.bytes_received.add(received - self.traffic.0);
        metrics.bytes_sent.add(sent - self.traffic.1);
        self.traffic = (received, sent);
    }

    /// Hands what was read to the queue.
    fn hand_over(&mut self, gather: Box<Gather<'_>>) -> Result<(), EpochEnd> {
        self.layouts = gather.layouts;
        self.connection.peer().metrics.messages.add(gather.messages);
        if let Some(panic) = gather.panic {
            self.connection.report_panic("id function", &panic);
        }
        if gather.sequence != self.sequence {
            self.sequence = gather.sequence;
            let id = (!gather.raw_id.is_empty()).then_some(gather.raw_id);
            self.connection.resume =
                Some(Resume { epoch: self.number, sequence: self.sequence, id });
        } else if gather.skipped == 0 {
            return Ok(());
        }
        let now = self.now();
        let behind = !self.connection.held.is_empty();
        match self.connection.shared.queue.offer(gather.block, gather.skipped, behind, now) {
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
    pub(super) fn hold(&mut self, block: Block, now: Instant) {
        let leaves = matches!(self.leaving, Leaving::Sent { .. });
        if leaves || self.connection.held.is_full() {
            let reason = if leaves { DropReason::Closed } else { DropReason::Newest };
            let shed = self.connection.shared.queue.turn_away(block, reason);
            self.connection.tell_shed(shed, reason);
            return;
        }
        self.connection.held.push(block);
        if !self.blocked {
            self.blocked = true;
            self.live.pause(now);
            self.connection.emit(EventKind::Blocked(true));
        }
    }
}
