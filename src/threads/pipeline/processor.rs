//! A processor's thread: handles messages, one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::select;

use super::pool::Slot;
use super::stats::PipelineEvent;
use super::{Flow, Lane, Phase, Retry, count, lock};
use crate::error::{Error, ErrorKind};
use crate::logic::backoff::{Retry as Attempted, retry_delay};
use crate::message::Message;
use crate::threads::contained_user;
use crate::threads::timer::Alarm;
use crate::work::{Failure, FailureKind, Handler, Next, Ticket};

/// Outcomes that have waited this long are settled before the next message.
const SETTLE_AFTER: Duration = Duration::from_millis(5);

/// The thread's body. `index` chooses its lane.
pub(crate) fn run<H: Handler>(flow: &Arc<Flow<H>>, slot: &Slot) {
    let lane = slot.index % flow.lanes.len();
    let mut chunk = Chunk::default();
    let mut settled_at = flow.clock.now();
    // What a thread before this one has finished and not settled.
    flow.settle_hand(slot);
    loop {
        let now = flow.clock.now();
        let stopped = flow.phase() >= Phase::Stopped;
        let is_empty = stopped || lock(&slot.hand).chunk.is_empty();
        if is_empty || now.saturating_duration_since(settled_at) > SETTLE_AFTER {
            flow.settle_hand(slot);
            settled_at = now;
        }
        if !is_empty {
            process(flow, slot, lane);
            continue;
        }
        chunk.done(flow, slot);
        // What is left in hand is returned.
        if stopped || slot.is_retired() || !refill(flow, slot, lane) {
            // A wake-up for a retry that it may have taken is for the others.
            flow.lanes[lane].tick.fire();
            return;
        }
        prepare(flow, slot);
        chunk.start(flow, slot);
    }
}

/// Tells of the chunks that a processor works on.
#[derive(Default)]
struct Chunk {
    len: usize,
    started: Option<Instant>,
}

impl Chunk {
    fn start<H: Handler>(&mut self, flow: &Flow<H>, slot: &Slot) {
        self.len = lock(&slot.hand).chunk.len();
        if self.len > 0 && flow.hub.is_heard() {
            self.started = Some(flow.clock.now());
            flow.emit(PipelineEvent::ChunkStarted { thread: slot.name.clone(), len: self.len });
        }
    }

    fn done<H: Handler>(&mut self, flow: &Flow<H>, slot: &Slot) {
        if let Some(started) = self.started.take() {
            let took = flow.clock.now().saturating_duration_since(started);
            let thread = slot.name.clone();
            flow.emit(PipelineEvent::ChunkDone { thread, len: self.len, took });
        }
    }
}

/// Takes a chunk of work into the hand; `false` when there is to be none.
fn refill<H: Handler>(flow: &Flow<H>, slot: &Slot, index: usize) -> bool {
    let lane = &flow.lanes[index];
    let due = due_retries(flow, lane, index);
    if !due.is_empty() {
        lock(&slot.hand).chunk.extend(due);
        return true;
    }
    select! {
        recv(lane.receiver) -> chunk => {
            // Never disconnected: the lane holds a sender of its own.
            let chunk = chunk.unwrap_or_default();
            lane.queued.add(-count(chunk.len()));
            lock(&slot.hand).chunk.extend(chunk);
            true
        }
        recv(lane.tick.receiver) -> _ => true,
        recv(slot.retired) -> _ => false,
        recv(flow.stop.signal) -> _ => false,
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

fn prepare<H: Handler>(flow: &Flow<H>, slot: &Slot) {
    let messages: Vec<Message> =
        lock(&slot.hand).chunk.iter().map(|ticket| ticket.message.clone()).collect();
    if messages.is_empty() {
        return;
    }
    // The failure's text is user code too.
    let run = || flow.handler.prepare(&messages).map_err(|failure| failure.to_string());
    match contained_user(run) {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => flow.emit(PipelineEvent::PrepareFailed { reason }),
        Err(panic) => flow.panicked("Handler::prepare", panic),
    }
}

/// Handles one message to its next step: done, in a batch, to be tried again,
/// or failed. It stays the worker's current one until it is there.
fn process<H: Handler>(flow: &Flow<H>, slot: &Slot, lane: usize) {
    let Some(mut ticket) = slot.begin_next(flow.clock.now()) else { return };
    let started = flow.clock.now();
    let result = contained_user(|| flow.handler.handle_message(&ticket.message));
    slot.returned(started, flow.clock.now());
    let outcome = match result {
        Ok(Ok(next)) => forward(flow, &mut ticket, next),
        Ok(Err(failure)) => Err(failure),
        Err(panic) => {
            flow.counters.panics.add(1);
            let text = format!("the handler panicked: {panic}");
            Err(Failure::of(FailureKind::Panic, text, true))
        }
    };
    let failure = match outcome {
        Ok(Forwarded::Done) => return slot.finish(false, |hand| hand.succeeded.push(ticket)),
        Ok(Forwarded::Batched | Forwarded::Stopped) => return slot.finish(false, |_| {}),
        Err(failure) => failure,
    };
    match flow.after_failure(&ticket, &failure) {
        None => slot.finish(true, |hand| hand.failed.push((ticket, failure))),
        Some(due) if flow.policy.retry.hold => {
            // The first in hand again, it is the next one that is tried.
            slot.finish(true, |hand| hand.chunk.push_front(ticket));
            flow.settle_hand(slot);
            wait_until(flow, lane, due);
        }
        Some(due) => {
            flow.retry_at(due, ticket);
            slot.finish(true, |_| {});
        }
    }
}

enum Forwarded {
    Done,
    Batched,
    /// The pipeline stopped before the batcher had room.
    Stopped,
}

fn forward<H: Handler>(
    flow: &Flow<H>,
    ticket: &mut Ticket,
    next: Next<H::Item>,
) -> Result<Forwarded, Failure> {
    ticket.tag = next.tag;
    let Some(to) = next.batch else { return Ok(Forwarded::Done) };
    let Some(batcher) = flow.batchers.get(&*to.batcher) else {
        let text = format!("there is no batcher named {:?}", to.batcher);
        flow.discard(to.item);
        return Err(Failure::of(FailureKind::UnknownBatcher, text, false));
    };
    if next.acknowledge_now {
        flow.acknowledge_early(ticket);
    }
    Ok(if batcher.send(flow, ticket.clone(), to) { Forwarded::Batched } else { Forwarded::Stopped })
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
            message: ticket.message.metadata(),
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
    pub(crate) fn retry_at(&self, due: Instant, mut ticket: Ticket) {
        if std::mem::take(&mut ticket.batched) {
            self.counters.upstream.add(1);
        }
        let index = self.lane_of(&ticket);
        lock(&self.lanes[index].retries).push(Retry { due, ticket });
        // Whoever put it there may not come by for long, or never again.
        self.timer.arm(index, due);
    }

    /// Drops what the program made, whose destructor is its code.
    pub(crate) fn discard<T>(&self, item: T) {
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
