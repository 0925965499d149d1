//! Settlement: what happens once to each message when its outcome is known.

use super::pool::Slot;
use super::register::Claim;
use super::stats::PipelineEvent;
use super::{Flow, Phase, lock};
use crate::message::Message;
use crate::threads::Killed;
use crate::work::{Failed, Failure, Handler, Succeeded, Ticket};

/// Messages that the caller alone settles, by what has to be done for them.
#[derive(Default)]
struct Claimed {
    succeeded: Vec<Ticket>,
    failed: Vec<(Ticket, Failure)>,
    /// Acknowledged before their batch: they cannot fail any more.
    early: Vec<Ticket>,
}

impl<H: Handler> Flow<H> {
    /// Settles what a worker has finished.
    pub(crate) fn settle_hand(&self, slot: &Slot) {
        let (succeeded, failed) = {
            let mut hand = lock(&slot.hand);
            (std::mem::take(&mut hand.succeeded), std::mem::take(&mut hand.failed))
        };
        if !succeeded.is_empty() || !failed.is_empty() {
            self.settle(succeeded, failed);
        }
    }

    /// Settles messages: the failure hook, the acknowledgers, the sources'
    /// records, the ledger, and with it room for others; in this order, and all
    /// of it whatever user code does, as nobody else will.
    fn settle(&self, succeeded: Vec<Ticket>, failed: Vec<(Ticket, Failure)>) {
        let mut killed = Killed::default();
        let claimed = self.claim(succeeded, failed);
        let failed: Vec<(Ticket, Failed)> = claimed
            .failed
            .into_iter()
            .map(|(ticket, failure)| (ticket.clone(), report_failed(ticket, failure)))
            .collect();
        if !failed.is_empty() {
            let all: Vec<Failed> = failed.iter().map(|(_, failed)| failed.clone()).collect();
            self.guarded("handle_failed", &mut killed, || self.handler.handle_failed(&all));
        }
        for source in 0..self.sources.len() {
            let succeeded = claimed.succeeded.iter().filter(|ticket| ticket.source == source);
            let good: Vec<Succeeded> = succeeded.map(report_succeeded).collect();
            let failed = failed.iter().filter(|(ticket, _)| ticket.source == source);
            let bad: Vec<Failed> = failed.map(|(_, failed)| failed.clone()).collect();
            self.acknowledge(source, &good, &bad, &mut killed);
        }
        let good: Vec<Ticket> = claimed.succeeded.into_iter().chain(claimed.early).collect();
        let bad: Vec<Ticket> = failed.into_iter().map(|(ticket, _)| ticket).collect();
        self.note(&good, true, &mut killed);
        self.note(&bad, false, &mut killed);
        self.enter_in_ledger(&good, &bad);
        let unbatched = good.iter().chain(&bad).filter(|ticket| !ticket.batched).count();
        self.left_upstream(unbatched);
        killed.die();
    }

    /// Leaves out what somebody else settles or has settled.
    fn claim(&self, succeeded: Vec<Ticket>, failed: Vec<(Ticket, Failure)>) -> Claimed {
        let mut claimed = Claimed::default();
        let mut state = lock(&self.state);
        for ticket in succeeded {
            match state.register.claim(&ticket) {
                Some(Claim::Fresh) => claimed.succeeded.push(ticket),
                Some(Claim::Acknowledged) => claimed.early.push(ticket),
                None => {}
            }
        }
        for (ticket, failure) in failed {
            match state.register.claim(&ticket) {
                Some(Claim::Fresh) => claimed.failed.push((ticket, failure)),
                Some(Claim::Acknowledged) => claimed.early.push(ticket),
                None => {}
            }
        }
        claimed
    }

    /// Acknowledges one message as a success before its batch, unless it was.
    pub(crate) fn acknowledge_early(&self, ticket: &Ticket) {
        let first = lock(&self.state).register.acknowledge(ticket);
        if first {
            let mut killed = Killed::default();
            self.acknowledge(ticket.source, &[report_succeeded(ticket)], &[], &mut killed);
            killed.die();
        }
    }

    pub(crate) fn is_acknowledged(&self, ticket: &Ticket) -> bool {
        lock(&self.state).register.is_acknowledged(ticket)
    }

    fn acknowledge(&self, source: usize, good: &[Succeeded], bad: &[Failed], killed: &mut Killed) {
        let count = good.len() + bad.len();
        if count == 0 {
            return;
        }
        let acknowledger = &self.sources[source].acknowledger;
        // The error's text is user code too.
        let told = killed
            .contain(|| acknowledger.acknowledge(good, bad).map_err(|error| error.to_string()));
        let reason = match told {
            Ok(Ok(())) => {
                self.counters.acknowledged.add(count as u64);
                let (succeeded, failed) = (good.len(), bad.len());
                self.emit(PipelineEvent::Acknowledged { source, succeeded, failed });
                return;
            }
            Ok(Err(error)) => error,
            Err(panic) => {
                self.counters.panics.add(1);
                format!("it panicked: {panic}")
            }
        };
        self.counters.acknowledge_failures.add(count as u64);
        self.emit(PipelineEvent::AcknowledgeFailed { count, reason });
    }

    /// Tells the sources' records, and counts how long it took.
    fn note(&self, tickets: &[Ticket], success: bool, killed: &mut Killed) {
        let now = self.clock.now();
        for Ticket { message, source, .. } in tickets {
            if let Some(settler) = &self.sources[*source].settler {
                self.guarded("settler", killed, || settler.settled(message, success));
            }
            if success {
                self.counters.latency.record(latency(message, now));
            }
        }
    }

    fn enter_in_ledger(&self, good: &[Ticket], bad: &[Ticket]) {
        let mut state = lock(&self.state);
        good.iter().for_each(|ticket| state.register.settle(ticket, true));
        bad.iter().for_each(|ticket| state.register.settle(ticket, false));
        let empty = state.register.ledger().in_flight == 0 && state.phase >= Phase::Draining;
        drop(state);
        self.changed.notify_all();
        if empty {
            self.tell_supervisor();
        }
    }

    /// Runs user code whose failure harms nothing.
    fn guarded(&self, hook: &'static str, killed: &mut Killed, run: impl FnOnce()) {
        if let Err(message) = killed.contain(run) {
            self.panicked(hook, message);
        }
    }

    /// Counts and tells of a panic of user code that was contained.
    pub(crate) fn panicked(&self, hook: &'static str, message: String) {
        self.counters.panics.add(1);
        self.emit(PipelineEvent::Panic { hook, message });
    }
}

fn latency(message: &Message, now: std::time::Instant) -> std::time::Duration {
    now.saturating_duration_since(message.metadata().received_at)
}

fn report_succeeded(ticket: &Ticket) -> Succeeded {
    Succeeded {
        message: ticket.message.clone(),
        attempts: ticket.attempts,
        tag: ticket.tag.clone(),
    }
}

fn report_failed(ticket: Ticket, failure: Failure) -> Failed {
    Failed {
        message: ticket.message,
        attempts: ticket.attempts,
        tag: failure.tag.clone().or(ticket.tag),
        failure,
    }
}
