//! A processor's thread: handles messages, one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::select;

use super::stats::PipelineEvent;
use super::{Flow, Lane, Retry, Slot, lock};
use crate::logic::backoff::{Retry as Attempted, retry_delay};
use crate::message::Message;
use crate::threads::{contained_user, panic_text};
use crate::work::{Failure, FailureKind, Handler, Next, Ticket};

/// Outcomes that have waited this long are settled before the next message.
const SETTLE_AFTER: Duration = Duration::from_millis(5);

/// The thread's body. `index` chooses its lane.
pub(crate) fn run<H: Handler>(flow: &Arc<Flow<H>>, slot: &Slot, index: usize) {
    let lane = index % flow.lanes.len();
    let mut settled_at = flow.clock.now();
    loop {
        let now = flow.clock.now();
        let next = lock(&slot.hand).chunk.pop_front();
        if next.is_none() || now.saturating_duration_since(settled_at) > SETTLE_AFTER {
            flow.settle_hand(slot);
            settled_at = now;
        }
        if flow.phase() >= super::Phase::Stopped {
            // Left in hand, it is returned.
            lock(&slot.hand).chunk.extend(next);
            return;
        }
        match next {
            Some(ticket) => process(flow, slot, lane, ticket),
            None if slot.is_retired() => return,
            None if refill(flow, slot, lane) => prepare(flow, slot),
            None => return,
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
            lock(&slot.hand).chunk.extend(chunk.unwrap_or_default());
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
    if let Some(at) = retries.peek().map(|retry| retry.due) {
        drop(retries);
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
    match contained_user(|| flow.handler.prepare(&messages)) {
        Ok(Ok(())) => {}
        Ok(Err(failure)) => {
            flow.emit(PipelineEvent::PrepareFailed { reason: failure.to_string() });
        }
        Err(panic) => flow.panicked("Handler::prepare", &*panic),
    }
}

/// Handles one message to its next step: done, in a batch, to be tried again,
/// or failed.
fn process<H: Handler>(flow: &Flow<H>, slot: &Slot, lane: usize, mut ticket: Ticket) {
    loop {
        ticket.attempts += 1;
        let started = flow.clock.now();
        begin(slot, std::slice::from_ref(&ticket), started);
        let result = contained_user(|| flow.handler.handle_message(&ticket.message));
        let failure = match result {
            Ok(Ok(next)) => match forward(flow, &mut ticket, next) {
                Ok(Forwarded::Done) => {
                    lock(&slot.hand).succeeded.push(ticket);
                    None
                }
                Ok(Forwarded::Batched) => None,
                Ok(Forwarded::Stopped) => {
                    lock(&slot.hand).chunk.push_front(ticket);
                    None
                }
                Err(failure) => Some((ticket, failure)),
            },
            Ok(Err(failure)) => Some((ticket, failure)),
            Err(panic) => {
                flow.counters.panics.add(1);
                let text = format!("the handler panicked: {}", panic_text(&*panic));
                Some((ticket, Failure::of(FailureKind::Panic, text, true)))
            }
        };
        finish(flow, slot, started, failure.is_some());
        let Some((failed, failure)) = failure else { return };
        match flow.after_failure(failed, failure) {
            AfterFailure::Final(failed, failure) => {
                lock(&slot.hand).failed.push((failed, failure));
                return;
            }
            AfterFailure::Retry(failed, due) if flow.policy.retry.hold => {
                flow.settle_hand(slot);
                if !wait_until(flow, lane, due) {
                    lock(&slot.hand).chunk.push_front(failed);
                    return;
                }
                ticket = failed;
            }
            AfterFailure::Retry(failed, due) => {
                lock(&flow.lanes[lane].retries).push(Retry { due, ticket: failed });
                return;
            }
        }
    }
}

/// Notes what is in the handler's hands, in case the thread dies with it.
pub(crate) fn begin(slot: &Slot, tickets: &[Ticket], now: Instant) {
    let mut hand = lock(&slot.hand);
    hand.current.extend_from_slice(tickets);
    hand.since = Some((now, false));
}

pub(crate) fn finish<H: Handler>(flow: &Flow<H>, slot: &Slot, started: Instant, failed: bool) {
    let busy = flow.clock.now().saturating_duration_since(started);
    slot.stats.busy_nanos.add(u64::try_from(busy.as_nanos()).unwrap_or(u64::MAX));
    slot.stats.handled.add(1);
    slot.stats.failed.add(u64::from(failed));
    let mut hand = lock(&slot.hand);
    hand.current.clear();
    hand.since = None;
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
        return Err(Failure::of(FailureKind::UnknownBatcher, text, false));
    };
    if next.acknowledge_now && !ticket.acknowledged {
        flow.acknowledge_early(ticket);
    }
    Ok(if batcher.send(flow, ticket.clone(), to) { Forwarded::Batched } else { Forwarded::Stopped })
}

/// What follows from a failure.
pub(crate) enum AfterFailure {
    Retry(Ticket, Instant),
    Final(Ticket, Failure),
}

impl<H: Handler> Flow<H> {
    /// Decides whether a failed message is tried again, and tells of it.
    pub(crate) fn after_failure(&self, ticket: Ticket, failure: Failure) -> AfterFailure {
        let policy = &self.policy.retry;
        let again = failure.retry && !ticket.acknowledged && ticket.attempts < policy.attempts;
        let delay = again.then(|| self.retry_delay(&ticket, &failure));
        self.emit(PipelineEvent::Failed {
            id: ticket.message.id(),
            attempt: ticket.attempts,
            retry_in: delay,
            kind: failure.kind,
            reason: failure.to_string(),
        });
        match delay {
            Some(delay) => {
                self.counters.retries.add(1);
                AfterFailure::Retry(ticket, self.clock.now() + delay)
            }
            None => AfterFailure::Final(ticket, failure),
        }
    }

    fn retry_delay(&self, ticket: &Ticket, failure: &Failure) -> Duration {
        let error = crate::error::Error::new(crate::error::ErrorKind::Handler, failure.to_string());
        let retry = Attempted { attempt: ticket.attempts, error: &error, uptime: Duration::ZERO };
        retry_delay(&self.policy.retry.backoff, &retry, Duration::ZERO, rand::random())
    }

    /// Puts a message that failed in a batch back to its processors.
    pub(crate) fn retry_later(&self, mut ticket: Ticket, due: Instant) {
        ticket.batched = false;
        self.counters.upstream.add(1);
        let partition = super::source::partition_of(self, &ticket.message).unwrap_or(0);
        let index = (partition % self.lanes.len() as u64) as usize;
        lock(&self.lanes[index].retries).push(Retry { due, ticket });
        self.timer.arm(index, due);
    }
}

/// Waits in place for a retry, so that nothing of the partition overtakes it.
fn wait_until<H: Handler>(flow: &Flow<H>, lane: usize, due: Instant) -> bool {
    while flow.clock.now() < due {
        flow.timer.arm(lane, due);
        select! {
            recv(flow.lanes[lane].tick.receiver) -> _ => {}
            recv(flow.stop.signal) -> _ => return false,
        }
    }
    true
}
