//! Settlement: what happens once to each message when its outcome is known.

use std::any::Any;

use super::stats::PipelineEvent;
use super::{Flow, Phase, Slot, lock};
use crate::threads::{contained_user, panic_text};
use crate::work::{Failed, Failure, Handler, Succeeded, Ticket};

impl<H: Handler> Flow<H> {
    /// Settles what a worker has finished.
    pub(crate) fn settle_hand(&self, slot: &Slot) {
        let (succeeded, failed) = {
            let mut hand = lock(&slot.hand);
            (std::mem::take(&mut hand.succeeded), std::mem::take(&mut hand.failed))
        };
        self.settle(succeeded, failed);
    }

    /// Settles messages: the failure hook, the acknowledgers, the sources'
    /// records, the ledger, and with it room for others; in this order.
    pub(crate) fn settle(&self, succeeded: Vec<Ticket>, failed: Vec<(Ticket, Failure)>) {
        if succeeded.is_empty() && failed.is_empty() || self.phase() == Phase::Ended {
            return;
        }
        let all = succeeded.iter().chain(failed.iter().map(|(ticket, _)| ticket));
        let unbatched = all.clone().filter(|ticket| !ticket.batched).count();
        let pulls: Vec<u64> = all.map(|ticket| ticket.pull).collect();
        // What was acknowledged early cannot fail any more.
        let (late, failed): (Vec<_>, Vec<_>) =
            failed.into_iter().partition(|(ticket, _)| ticket.acknowledged);
        let failed: Vec<(usize, Failed)> = failed.into_iter().map(report_failed).collect();
        if !failed.is_empty() {
            let all: Vec<Failed> = failed.iter().map(|(_, failed)| failed.clone()).collect();
            self.guarded("handle_failed", || self.handler.handle_failed(&all));
        }
        for source in 0..self.sources.len() {
            let good: Vec<Succeeded> = succeeded
                .iter()
                .filter(|ticket| ticket.source == source && !ticket.acknowledged)
                .map(report_succeeded)
                .collect();
            let bad: Vec<Failed> =
                failed.iter().filter(|(of, _)| *of == source).map(|(_, f)| f.clone()).collect();
            self.acknowledge(source, &good, &bad);
        }
        let now = self.clock.now();
        for ticket in succeeded.iter().chain(late.iter().map(|(ticket, _)| ticket)) {
            self.note(ticket.source, &ticket.message, true);
            let received = ticket.message.metadata().received_at;
            self.counters.latency.record(now.saturating_duration_since(received));
        }
        for (source, failed) in &failed {
            self.note(*source, &failed.message, false);
        }
        self.enter_in_ledger(succeeded.len() + late.len(), failed.len(), &pulls);
        self.left_upstream(unbatched);
    }

    /// Acknowledges one message as a success before its batch.
    pub(crate) fn acknowledge_early(&self, ticket: &mut Ticket) {
        self.acknowledge(ticket.source, &[report_succeeded(ticket)], &[]);
        ticket.acknowledged = true;
    }

    fn acknowledge(&self, source: usize, good: &[Succeeded], bad: &[Failed]) {
        let count = good.len() + bad.len();
        if count == 0 {
            return;
        }
        let acknowledger = &self.sources[source].acknowledger;
        let reason = match contained_user(|| acknowledger.acknowledge(good, bad)) {
            Ok(Ok(())) => {
                self.counters.acknowledged.add(count as u64);
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("it panicked: {}", panic_text(&*panic)),
        };
        self.counters.acknowledge_failures.add(count as u64);
        self.emit(PipelineEvent::AcknowledgeFailed { count, reason });
    }

    fn note(&self, source: usize, message: &crate::message::Message, success: bool) {
        if let Some(settler) = &self.sources[source].settler {
            self.guarded("settler", || settler.settled(message, success));
        }
    }

    fn enter_in_ledger(&self, succeeded: usize, failed: usize, pulls: &[u64]) {
        let mut state = lock(&self.state);
        if state.phase == Phase::Ended {
            return;
        }
        state.ledger.succeeded += succeeded as u64;
        state.ledger.failed += failed as u64;
        let settled = (succeeded + failed) as u64;
        state.ledger.in_flight = state.ledger.in_flight.saturating_sub(settled);
        for pull in pulls {
            if let Some((_, left)) = state.pulls.get_mut(pull) {
                *left -= 1;
                if *left == 0 {
                    state.pulls.remove(pull);
                }
            }
        }
        let empty = state.ledger.in_flight == 0 && state.phase >= Phase::Draining;
        drop(state);
        self.changed.notify_all();
        if empty {
            self.tell_supervisor();
        }
    }

    /// Runs user code whose failure harms nothing.
    pub(crate) fn guarded(&self, hook: &'static str, run: impl FnOnce()) {
        if let Err(panic) = contained_user(run) {
            self.panicked(hook, &*panic);
        }
    }

    /// Counts a panic of user code, and tells of it.
    pub(crate) fn panicked(&self, hook: &'static str, panic: &(dyn Any + Send)) {
        self.counters.panics.add(1);
        self.emit(PipelineEvent::Panic { hook, message: panic_text(panic) });
    }
}

fn report_succeeded(ticket: &Ticket) -> Succeeded {
    Succeeded {
        message: ticket.message.clone(),
        attempts: ticket.attempts,
        tag: ticket.tag.clone(),
    }
}

fn report_failed((ticket, failure): (Ticket, Failure)) -> (usize, Failed) {
    let failed = Failed {
        message: ticket.message,
        attempts: ticket.attempts,
        tag: failure.tag.clone().or(ticket.tag),
        failure,
    };
    (ticket.source, failed)
}
