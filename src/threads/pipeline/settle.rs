//! Settlement: what happens once to each message when its outcome is known.

use std::time::{Duration, Instant};

use super::Flow;
use super::chunk::{Member, Run};
use super::pool::Slot;
use super::register::Claim;
use super::stats::PipelineEvent;
use crate::threads::Killed;
use crate::work::{Failed, Failure, Handler, Settler, Succeeded, Ticket};

/// Messages that the caller alone settles, by what has to be done for them.
#[derive(Default)]
struct Claimed {
    succeeded: Vec<Run>,
    failed: Vec<(Ticket, Failure)>,
    /// Acknowledged before their batch: they cannot fail any more.
    early: Vec<Run>,
}

impl<H: Handler> Flow<H> {
    /// Settles what a worker has finished.
    pub(crate) fn settle_hand(&self, slot: &Slot) {
        let (succeeded, failed) = slot.take_finished();
        if !succeeded.is_empty() || !failed.is_empty() {
            self.settle(succeeded, failed, slot.has_batches);
        }
    }

    /// Settles messages: the failure hook, the acknowledgers, the sources'
    /// records, the ledger, and with it room for others; in this order, and all
    /// of it whatever user code does, as nobody else will.
    fn settle(&self, succeeded: Vec<Run>, failed: Vec<(Ticket, Failure)>, batched: bool) {
        let mut killed = Killed::default();
        let mut claimed = self.claim(succeeded, failed);
        let failed = std::mem::take(&mut claimed.failed);
        let (bad, failed): (Vec<Ticket>, Vec<Failed>) =
            failed.into_iter().map(|(ticket, failure)| report_failed(ticket, failure)).unzip();
        if !failed.is_empty() {
            self.guarded("handle_failed", &mut killed, || self.handler.handle_failed(&failed));
        }
        for source in 0..self.sources.len() {
            self.acknowledge_all(source, &claimed.succeeded, &bad, &failed, &mut killed);
        }
        let (good, bad) = (claimed.all_good(), Run::of(bad));
        self.note(&good, true, &mut killed);
        self.note(&bad, false, &mut killed);
        self.enter_in_ledger(&good, &bad);
        if !batched {
            self.left_upstream(good.iter().chain(&bad).map(|run| run.members.len()).sum());
        }
        killed.die();
    }

    /// Leaves out what somebody else settles or has settled.
    fn claim(&self, succeeded: Vec<Run>, failed: Vec<(Ticket, Failure)>) -> Claimed {
        let mut claimed = Claimed::default();
        let mut state = self.state.lock();
        for mut run in succeeded {
            let early = state.register.claim_run(&mut run);
            if !early.is_empty() {
                claimed.early.push(Run { pulled: run.pulled.clone(), members: early });
            }
            claimed.succeeded.push(run);
        }
        for (ticket, failure) in failed {
            match state.register.claim(&ticket) {
                Some(Claim::Fresh) => claimed.failed.push((ticket, failure)),
                Some(Claim::Acknowledged) => claimed.early.extend(Run::of([ticket])),
                None => {}
            }
        }
        claimed
    }

    /// Tells the acknowledger of one source of its messages.
    fn acknowledge_all(
        &self,
        source: usize,
        good: &[Run],
        bad: &[Ticket],
        failed: &[Failed],
        killed: &mut Killed,
    ) {
        let good = good.iter().filter(|run| run.pulled.source == source);
        if self.sources[source].acknowledger.is_none() {
            // Nobody is told: they are counted, and not put together.
            let count = good.map(|run| run.members.len()).sum();
            let failed = bad.iter().filter(|ticket| ticket.pulled.source == source).count();
            return self.acknowledged(source, count, failed);
        }
        let mut succeeded = Vec::with_capacity(good.clone().map(|run| run.members.len()).sum());
        good.for_each(|run| succeeded.extend(run.members.iter().map(|m| report_succeeded(run, m))));
        let of = bad.iter().zip(failed).filter(|(ticket, _)| ticket.pulled.source == source);
        let failed: Vec<Failed> = of.map(|(_, failed)| failed.clone()).collect();
        self.acknowledge(source, &succeeded, &failed, killed);
    }

    /// Acknowledges one message as a success before its batch, unless it was.
    pub(crate) fn acknowledge_early(&self, ticket: &Ticket) {
        let first = self.state.lock().register.acknowledge(ticket);
        if first {
            let mut killed = Killed::default();
            let message = ticket.message().clone();
            let (attempts, tag) = (ticket.attempts, ticket.tag.as_deref().cloned());
            let succeeded = [Succeeded { message, attempts, tag }];
            self.acknowledge(ticket.pulled.source, &succeeded, &[], &mut killed);
            killed.die();
        }
    }

    pub(crate) fn is_acknowledged(&self, ticket: &Ticket) -> bool {
        self.state.lock().register.is_acknowledged(ticket)
    }

    fn acknowledge(&self, source: usize, good: &[Succeeded], bad: &[Failed], killed: &mut Killed) {
        let count = good.len() + bad.len();
        if count == 0 {
            return;
        }
        let Some(acknowledger) = &self.sources[source].acknowledger else {
            return self.acknowledged(source, good.len(), bad.len());
        };
        // The error's text is user code too.
        let told = killed
            .contain(|| acknowledger.acknowledge(good, bad).map_err(|error| error.to_string()));
        let reason = match told {
            Ok(Ok(())) => return self.acknowledged(source, good.len(), bad.len()),
            Ok(Err(error)) => error,
            Err(panic) => {
                self.counters.panics.add(1);
                format!("it panicked: {panic}")
            }
        };
        self.counters.acknowledge_failures.add(count as u64);
        self.emit(PipelineEvent::AcknowledgeFailed { count, reason });
    }

    fn acknowledged(&self, source: usize, succeeded: usize, failed: usize) {
        if succeeded + failed > 0 {
            self.counters.acknowledged.add((succeeded + failed) as u64);
            self.emit(PipelineEvent::Acknowledged { source, succeeded, failed });
        }
    }

    /// Tells the sources' records, and counts how long it took.
    fn note(&self, runs: &[Run], success: bool, killed: &mut Killed) {
        for run in runs {
            if let Some(settler) = &self.sources[run.pulled.source].settler {
                self.tell(&**settler, run, success, killed);
            }
        }
        if success {
            let now = self.clock.now();
            runs.iter().for_each(|run| self.count_latency(run, now));
        }
    }

    /// Tells a source's record of messages; a panic costs it the one it was at.
    fn tell(&self, settler: &dyn Settler, run: &Run, success: bool, killed: &mut Killed) {
        let mut left = run.messages();
        let mut told = 0;
        while told < run.members.len() {
            let mut taken = 0;
            let mut counted = left.by_ref().inspect(|_| taken += 1);
            let end = killed.contain(|| settler.settled_together(&mut counted, success));
            let Err(panic) = end else { return };
            self.panicked("settler", panic);
            // One that takes none before it panics is not asked for ever.
            told += taken.max(1);
        }
    }

    /// Messages that one read has brought have waited equally long: they are
    /// counted together.
    fn count_latency(&self, run: &Run, now: Instant) {
        let mut waited: Option<(Instant, u64)> = None;
        for message in run.messages() {
            let at = message.metadata().received_at;
            match &mut waited {
                Some((since, count)) if *since == at => *count += 1,
                other => {
                    self.record_latency(other.replace((at, 1)), now);
                }
            }
        }
        self.record_latency(waited, now);
    }

    fn record_latency(&self, waited: Option<(Instant, u64)>, now: Instant) {
        if let Some((since, count)) = waited {
            let took: Duration = now.saturating_duration_since(since);
            self.counters.latency.record(took, count);
        }
    }

    fn enter_in_ledger(&self, good: &[Run], bad: &[Run]) {
        let mut state = self.state.lock();
        good.iter().for_each(|run| state.register.settle(run, true));
        bad.iter().for_each(|run| state.register.settle(run, false));
        let empty = state.is_settled_at_the_end();
        let wake = self.is_room_worth_a_wake(&state);
        drop(state);
        if wake {
            self.state.notify_all();
        }
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

impl Claimed {
    fn all_good(self) -> Vec<Run> {
        let mut all = self.succeeded;
        all.extend(self.early);
        all
    }
}

fn report_succeeded(run: &Run, member: &Member) -> Succeeded {
    Succeeded {
        message: run.pulled.message(member.place).clone(),
        attempts: member.attempts,
        tag: member.tag.as_deref().cloned(),
    }
}

fn report_failed(ticket: Ticket, failure: Failure) -> (Ticket, Failed) {
    let failed = Failed {
        message: ticket.message().clone(),
        attempts: ticket.attempts,
        tag: failure.tag.clone().or_else(|| ticket.tag.as_deref().cloned()),
        failure,
    };
    (ticket, failed)
}
