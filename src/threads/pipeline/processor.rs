//! A processor's thread: handles messages, one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::select;

use super::chunk::{Chunk, End};
use super::pool::Slot;
use super::stats::PipelineEvent;
use super::{Flow, Lane, Retry, count, lock};
use crate::error::{Error, ErrorKind};
use crate::logic::backoff::{Retry as Attempted, retry_delay};
use crate::threads::contained_user;
use crate::threads::timer::Alarm;
use crate::work::{Failure, FailureKind, Handler, Next, Ticket};

/// Outcomes that have waited this long are settled before the next message.
const SETTLE_AFTER: Duration = Duration::from_millis(5);

/// A handler that takes less is quick: the clock is not looked at for each.
const QUICK: Duration = Duration::from_micros(2);

/// Between two looks at the clock there are at most so many messages.
const MOST_UNTIMED: usize = 16;

/// The thread's body. `index` chooses its lane.
pub(crate) fn run<H: Handler>(flow: &Arc<Flow<H>>, slot: &Slot) {
    let lane = slot.index % flow.lanes.len();
    // A thread before this one may have died while it held a message.
    if let Some(due) = slot.held_until() {
        wait_until(flow, lane, due);
    }
    loop {
        // The first time, what a thread before this one has left.
        if let Some(chunk) = slot.chunk()
            && chunk.begun() < chunk.len()
        {
            work_through(flow, slot, lane, &chunk);
        }
        flow.settle_hand(slot);
        // What is left in hand is returned.
        if flow.stop.is_set() || slot.is_retired() {
            break;
        }
        match refill(flow, slot, lane) {
            Refill::Chunk(chunk) => begin(flow, slot, chunk),
            Refill::Nothing => {}
            Refill::End => break,
        }
    }
    // A wake-up for a retry that it may have taken is for the others.
    flow.lanes[lane].tick.fire();
}

/// What there is to do next.
enum Refill {
    Chunk(Chunk),
    /// Look again.
    Nothing,
    End,
}

/// Takes a chunk of work.
fn refill<H: Handler>(flow: &Flow<H>, slot: &Slot, index: usize) -> Refill {
    let lane = &flow.lanes[index];
    let due = due_retries(flow, lane, index);
    if !due.is_empty() {
        return Refill::Chunk(Chunk::again(due));
    }
    if let Ok(chunk) = lane.receiver.try_recv() {
        return taken(lane, chunk);
    }
    flow.idle();
    let refill = select! {
        // Never disconnected: the lane holds a sender of its own.
        recv(lane.receiver) -> chunk => chunk.map_or(Refill::Nothing, |chunk| taken(lane, chunk)),
        recv(lane.tick.receiver) -> _ => Refill::Nothing,
        recv(slot.retired) -> _ => Refill::End,
        recv(flow.stop.signal) -> _ => Refill::End,
    };
    flow.busy();
    refill
}

fn taken(lane: &Lane, chunk: Chunk) -> Refill {
    lane.queued.add(-count(chunk.len()));
    Refill::Chunk(chunk)
}

/// Takes a chunk up and shows it to the handler as a whole.
fn begin<H: Handler>(flow: &Flow<H>, slot: &Slot, chunk: Chunk) {
    slot.take_up(chunk);
    let Some(chunk) = slot.chunk() else { return };
    // The failure's text is user code too.
    let prepare = || flow.handler.prepare(&chunk.messages()).map_err(|failure| failure.to_string());
    match contained_user(prepare) {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => flow.emit(PipelineEvent::PrepareFailed { reason }),
        Err(panic) => flow.panicked("Handler::prepare", panic),
    }
}

/// The retries whose time has come; asks the timer for the next one.
fn due_retries<H: Handler>(flow: &Flow<H>, lane: &Lane, index: usize) -> Vec<Ticket> {
    let now = flow.clock.now();
    let mut retries = lock(&lane.retries);
    let mut due = Vec::new();
    while due.len() < flow.policy.chunk && retries.peek().is_some_and(|retry| retry.due <= now) {
        due.extend(retries.pop().map(|retry| retry.ticket));
    }
    let next = retries.peek().map(|retry| retry.due);
    drop(retries);
    if let Some(at) = next {
        flow.timer.arm(index, at);
    }
    due
}

/// Handles a chunk's messages, and tells of it.
fn work_through<H: Handler>(flow: &Flow<H>, slot: &Slot, lane: usize, chunk: &Chunk) {
    let mut now = flow.clock.now();
    let (started, len) = (now, chunk.len() - chunk.begun());
    let is_heard = flow.hub.is_heard();
    if is_heard {
        flow.emit(PipelineEvent::ChunkStarted { thread: slot.name.clone(), len });
    }
    let mut settled_at = now;
    // Each chunk begins with a look at the clock for each message.
    let mut untimed = 1;
    while chunk.begun() < chunk.len() && !flow.stop.is_set() {
        if now.saturating_duration_since(settled_at) > SETTLE_AFTER {
            flow.settle_hand(slot);
            now = flow.clock.now();
            settled_at = now;
        }
        let mut stint = Stint::begin(flow, slot, chunk, now);
        let held = stint.run(untimed);
        let end = stint.end();
        let quick = QUICK * u32::try_from(stint.handled).unwrap_or(u32::MAX);
        let is_quick = end.saturating_duration_since(now) < quick;
        untimed = if is_quick { MOST_UNTIMED.min(untimed * 2) } else { 1 };
        drop(stint);
        now = end;
        if let Some(due) = held {
            flow.settle_hand(slot);
            wait_until(flow, lane, due);
            now = flow.clock.now();
            settled_at = now;
        }
    }
    if is_heard {
        let took = flow.clock.now().saturating_duration_since(started);
        flow.emit(PipelineEvent::ChunkDone { thread: slot.name.clone(), len, took });
    }
}

/// Some messages that are handled one after the other, between two looks at the
/// clock. What is counted of them is entered at its end, also by a panic.
struct Stint<'a, H: Handler> {
    flow: &'a Flow<H>,
    slot: &'a Slot,
    chunk: &'a Chunk,
    started: Instant,
    /// When the last handler returned, once that is known.
    ended: Option<Instant>,
    handled: usize,
    failed: usize,
    /// Went on to a batcher.
    batched: usize,
}

impl<'a, H: Handler> Stint<'a, H> {
    fn begin(flow: &'a Flow<H>, slot: &'a Slot, chunk: &'a Chunk, now: Instant) -> Self {
        slot.enter(now);
        let (handled, failed, batched) = (0, 0, 0);
        Self { flow, slot, chunk, started: now, ended: None, handled, failed, batched }
    }

    /// Handles up to `most` messages, each to its next step: done, in a batch, to
    /// be tried again, or failed. Returns when the last one is due again, if it
    /// is held until then.
    fn run(&mut self, most: usize) -> Option<Instant> {
        while self.handled < most
            && self.ended.is_none()
            && !self.flow.stop.is_set()
            && let Some(row) = self.chunk.begin()
        {
            let (flow, message) = (self.flow, self.chunk.message(row));
            // What says more than "done" is put down here once: moving it out
            // through the result would take longer than a quick handler does.
            let mut more = None;
            let result = contained_user(|| match flow.handler.handle_message(message) {
                Ok(Next { batch: None, tag: None, .. }) => {}
                outcome => more = Some(outcome),
            });
            self.handled += 1;
            if let Err(panic) = result {
                flow.counters.panics.add(1);
                let text = format!("the handler panicked: {panic}");
                return self.fail(row, Failure::of(FailureKind::Panic, text, true));
            }
            let outcome = match more {
                None => {
                    self.chunk.end(row, End::Done);
                    continue;
                }
                Some(Ok(next)) => self.forward(row, next),
                Some(Err(failure)) => Err(failure),
            };
            if let Err(failure) = outcome {
                return self.fail(row, failure);
            }
        }
        None
    }

    /// The handler has returned, and is not gone back to before long.
    fn end(&mut self) -> Instant {
        *self.ended.get_or_insert_with(|| {
            let now = self.flow.clock.now();
            self.slot.leave(self.started, now);
            now
        })
    }

    fn forward(&mut self, row: usize, next: Next<H::Item>) -> Result<(), Failure> {
        if let Some(tag) = next.tag {
            self.chunk.tag(row, tag);
        }
        let Some(to) = next.batch else {
            self.chunk.end(row, End::Done);
            return Ok(());
        };
        let Some(batcher) = self.flow.batchers.get(&*to.batcher) else {
            let text = format!("there is no batcher named {:?}", to.batcher);
            self.flow.discard(to.item);
            return Err(Failure::of(FailureKind::UnknownBatcher, text, false));
        };
        let ticket = self.chunk.ticket(row);
        if next.acknowledge_now {
            self.flow.acknowledge_early(&ticket);
        }
        let item = batcher.item(self.flow, ticket, to);
        let is_sent = match batcher.inbox.push(item) {
            Ok(()) => true,
            Err(item) => {
                // Waiting for a batcher is not the handler's time.
                self.end();
                batcher.push_or_stop(self.flow, item)
            }
        };
        self.chunk.end(row, End::Gone);
        self.batched += usize::from(is_sent);
        Ok(())
    }

    fn fail(&mut self, row: usize, failure: Failure) -> Option<Instant> {
        self.end();
        self.failed += 1;
        let ticket = self.chunk.ticket(row);
        let Some(due) = self.flow.after_failure(&ticket, &failure) else {
            self.slot.fail(self.chunk, row, ticket, failure);
            return None;
        };
        if self.flow.policy.retry.hold {
            self.slot.hold(self.chunk, row, due);
            return Some(due);
        }
        self.flow.retry_at(due, ticket, false);
        self.chunk.end(row, End::Gone);
        None
    }
}

impl<H: Handler> Drop for Stint<'_, H> {
    fn drop(&mut self) {
        self.slot.stats.handled.add(self.handled as u64);
        self.slot.stats.failed.add(self.failed as u64);
        self.flow.left_upstream(self.batched);
    }
}

impl<H: Handler> Flow<H> {
    /// Decides whether and when a failed message is tried again, and tells of it.
    pub(crate) fn after_failure(&self, ticket: &Ticket, failure: &Failure) -> Option<Instant> {
        let policy = &self.policy.retry;
        let again =
            failure.retry && ticket.attempts < policy.attempts && !self.is_acknowledged(ticket);
        // The failure's text is user code too.
        let reason = contained_user(|| failure.to_string()).unwrap_or_else(|panic| {
            self.panicked("Display of an error", panic);
            "an error without a text".to_owned()
        });
        let delay = again.then(|| self.retry_delay(ticket, &reason));
        self.emit(PipelineEvent::Failed {
            message: ticket.message().metadata(),
            attempt: ticket.attempts,
            retry_in: delay,
            kind: failure.kind,
            reason,
        });
        let delay = delay?;
        self.counters.retries.add(1);
        Some(self.clock.now() + delay)
    }

    fn retry_delay(&self, ticket: &Ticket, reason: &str) -> Duration {
        let error = Error::new(ErrorKind::Handler, reason);
        let retry = Attempted { attempt: ticket.attempts, error: &error, uptime: Duration::ZERO };
        retry_delay(&self.policy.retry.backoff, &retry, Duration::ZERO, rand::random())
    }

    /// Puts a message back to its processors, whichever of them has time then.
    pub(crate) fn retry_at(&self, due: Instant, ticket: Ticket, batched: bool) {
        if batched {
            self.counters.upstream.add(1);
        }
        let index = self.lane_of(ticket.partition());
        lock(&self.lanes[index].retries).push(Retry { due, ticket });
        // Whoever put it there may not come by for long, or never again.
        self.timer.arm(index, due);
    }

    /// Drops what the program made, whose destructor is its code.
    pub(crate) fn discard<T>(&self, item: T) {
        if !std::mem::needs_drop::<T>() {
            return;
        }
        if let Err(panic) = contained_user(|| drop(item)) {
            self.panicked("Item::drop", panic);
        }
    }
}

/// Waits in place for a retry, so that nothing of the partition overtakes it.
fn wait_until<H: Handler>(flow: &Flow<H>, lane: usize, due: Instant) {
    while flow.clock.now() < due {
        flow.timer.arm(lane, due);
        select! {
            recv(flow.lanes[lane].tick.receiver) -> _ => {}
            recv(flow.stop.signal) -> _ => return,
        }
    }
}
