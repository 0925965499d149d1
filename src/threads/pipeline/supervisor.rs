//! The pipeline's monitor thread: it watches every join handle, replaces dead
//! workers one for one, and ends the pipeline in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::stats::PipelineEvent;
use super::{Flow, Phase, Slot, batcher, lock, processor, source};
use crate::error::{Error, ErrorKind};
use crate::logic::restart::{Intensity, Restarts};
use crate::message::Message;
use crate::threads::monitor::{MonitorAlarm, Notice};
use crate::threads::panic_text;
use crate::work::{Failure, FailureKind, Handler, Source, Ticket};

/// How long threads may take to end after all is settled, without a deadline.
const END: Duration = Duration::from_secs(5);

/// Which thread a child is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Timer,
    Source(usize),
    Processor(usize),
    Grouper(Arc<str>),
    Worker(Arc<str>, usize),
}

struct Child {
    kind: Kind,
    name: String,
    handle: Option<JoinHandle<()>>,
    started: Instant,
    restart_at: Option<Instant>,
}

/// Watches the threads of one pipeline.
pub(crate) struct Supervisor<H: Handler> {
    flow: Arc<Flow<H>>,
    notices: Receiver<Notice>,
    children: Vec<Child>,
    /// By pool: processors, each batcher, the timer.
    restarts: BTreeMap<String, Restarts>,
    intensity: Intensity,
}

impl<H: Handler> Supervisor<H> {
    /// Starts every thread, consumers before producers.
    pub(crate) fn start(
        flow: Arc<Flow<H>>,
        notices: Receiver<Notice>,
        sources: Vec<Box<dyn Source>>,
        intensity: Intensity,
    ) -> Result<Self, Error> {
        let restarts = BTreeMap::new();
        let mut supervisor = Self { flow, notices, children: Vec::new(), restarts, intensity };
        if let Err(error) = supervisor.start_all(sources) {
            supervisor.finish();
            return Err(error);
        }
        Ok(supervisor)
    }

    fn start_all(&mut self, sources: Vec<Box<dyn Source>>) -> Result<(), Error> {
        self.add(Kind::Timer)?;
        let names: Vec<_> = self.flow.batchers.keys().cloned().collect();
        for name in names {
            for index in 0..self.flow.batchers[&name].slots.len() {
                self.add(Kind::Worker(Arc::clone(&name), index))?;
            }
            self.add(Kind::Grouper(name))?;
        }
        self.grow()?;
        for (index, source) in sources.into_iter().enumerate() {
            let flow = Arc::clone(&self.flow);
            let name = format!("broadsock-source-{index}");
            let child = self.children.len();
            let body = move || source::run(&flow, index, source);
            let handle = self.flow.spawner.spawn(&name, child, body)?;
            self.enlist(Kind::Source(index), name, handle);
        }
        Ok(())
    }

    fn enlist(&mut self, kind: Kind, name: String, handle: JoinHandle<()>) {
        let started = self.flow.clock.now();
        self.children.push(Child { kind, name, handle: Some(handle), started, restart_at: None });
    }

    fn add(&mut self, kind: Kind) -> Result<(), Error> {
        let child = self.children.len();
        let (name, handle) = self.spawn(&kind, child)?;
        self.enlist(kind, name, handle);
        Ok(())
    }

    /// Starts a thread for each processor that has none yet.
    fn grow(&mut self) -> Result<(), Error> {
        let known = self.children.iter().filter(|c| matches!(c.kind, Kind::Processor(_))).count();
        for index in known..self.flow.slots().len() {
            self.add(Kind::Processor(index))?;
        }
        Ok(())
    }

    fn spawn(&self, kind: &Kind, child: usize) -> Result<(String, JoinHandle<()>), Error> {
        let flow = Arc::clone(&self.flow);
        let spawner = &self.flow.spawner;
        match kind.clone() {
            Kind::Timer => {
                let supervisor = Arc::new(MonitorAlarm(spawner.monitor.clone()));
                let alarms = flow.alarms(supervisor);
                let name = "broadsock-timer".to_owned();
                let body = move || flow.timer.run(flow.clock, &alarms);
                Ok((name.clone(), spawner.spawn(&name, child, body)?))
            }
            Kind::Processor(index) => {
                let slot = Arc::clone(&self.flow.slots()[index]);
                let name = slot.name.clone();
                let body = move || processor::run(&flow, &slot, index);
                Ok((name.clone(), spawner.spawn(&name, child, body)?))
            }
            Kind::Grouper(batcher) => {
                let name = format!("broadsock-batcher-{batcher}");
                let body = move || batcher::run(&flow, &batcher);
                Ok((name.clone(), spawner.spawn(&name, child, body)?))
            }
            Kind::Worker(batcher, index) => {
                let name = self.flow.batchers[&batcher].slots[index].name.clone();
                let body = move || batcher::work(&flow, &batcher, index);
                Ok((name.clone(), spawner.spawn(&name, child, body)?))
            }
            Kind::Source(index) => {
                let phrase = format!("source {index} cannot be started again");
                Err(Error::new(ErrorKind::Panicked, phrase))
            }
        }
    }

    /// The thread's body: it ends when every other thread has.
    pub(crate) fn run(mut self) {
        loop {
            let now = self.flow.clock.now();
            let late = self.flow.deadline().is_some_and(|deadline| now >= deadline);
            if self.flow.is_drained() || late || self.flow.phase() >= Phase::Stopped {
                break;
            }
            self.arm(now);
            let Ok(notice) = self.notices.recv() else { break };
            match notice {
                Notice::Ended(child) => self.ended(child),
                // Whoever posts these has put what to look at into the flow.
                Notice::Tick | Notice::Adopt { .. } => {}
            }
            self.restart_due();
            self.report_slow();
            if let Err(error) = self.grow() {
                self.escalate(error);
            }
        }
        self.finish();
    }

    fn arm(&self, now: Instant) {
        let restarts = self.children.iter().filter_map(|child| child.restart_at);
        let slow = self.flow.policy.handler_timeout.map(|timeout| now + timeout / 2);
        if let Some(at) = restarts.chain(self.flow.deadline()).chain(slow).min() {
            self.flow.timer.arm(self.flow.supervisor_owner(), at);
        }
    }

    /// A thread has ended. Workers end only when stopped or retired; one that
    /// panicked is replaced, and only the message it had in hand fails.
    fn ended(&mut self, index: usize) {
        let Some(child) = self.children.get_mut(index) else { return };
        let Some(handle) = child.handle.take() else { return };
        let Err(payload) = handle.join() else { return };
        let (kind, name) = (child.kind.clone(), child.name.clone());
        let reason = format!("it panicked: {}", panic_text(&*payload));
        if let Some(slot) = self.slot(&kind) {
            self.bury(&slot, &name);
        }
        if let Kind::Source(source) = kind {
            let pulled: Vec<Ticket> = lock(&self.flow.sources[source].pulled).drain(..).collect();
            self.fail(pulled, &name);
            self.flow.source_ended();
            self.escalate(Error::new(ErrorKind::Panicked, format!("{name}: {reason}")));
            return;
        }
        let now = self.flow.clock.now();
        let ran_for = now.saturating_duration_since(self.children[index].started);
        let intensity = self.intensity;
        let pool = self.restarts.entry(pool(&kind)).or_insert_with(|| Restarts::new(intensity));
        match pool.on_end(now, ran_for) {
            Some(delay) => {
                self.children[index].restart_at = Some(now + delay);
                self.flow.emit(PipelineEvent::Restarting { thread: name, delay, reason });
            }
            None => {
                let phrase = format!("{name} {reason} (restarted {intensity} before)");
                self.escalate(Error::new(ErrorKind::Panicked, phrase));
            }
        }
    }

    fn slot(&self, kind: &Kind) -> Option<Arc<Slot>> {
        match kind {
            Kind::Processor(index) => self.flow.slots().get(*index).cloned(),
            Kind::Worker(batcher, index) => {
                self.flow.batchers.get(batcher)?.slots.get(*index).cloned()
            }
            Kind::Timer | Kind::Source(_) | Kind::Grouper(_) => None,
        }
    }

    /// Settles what a dead worker had finished, and fails what it had begun.
    /// What it had only taken stays in its hand, for its successor.
    fn bury(&self, slot: &Slot, name: &str) {
        let begun = {
            let mut hand = lock(&slot.hand);
            hand.since = None;
            std::mem::take(&mut hand.current)
        };
        self.flow.settle_hand(slot);
        self.fail(begun, name);
    }

    fn fail(&self, tickets: Vec<Ticket>, name: &str) {
        let failed = tickets.into_iter().map(|ticket| {
            let text = format!("{name} died in the middle of it");
            (ticket, Failure::of(FailureKind::WorkerDied, text, false))
        });
        self.flow.settle(Vec::new(), failed.collect());
    }

    fn restart_due(&mut self) {
        let now = self.flow.clock.now();
        for index in 0..self.children.len() {
            if self.children[index].restart_at.is_none_or(|at| at > now) {
                continue;
            }
            self.children[index].restart_at = None;
            self.flow.counters.restarts.add(1);
            match self.spawn(&self.children[index].kind, index) {
                Ok((_, handle)) => {
                    self.children[index].handle = Some(handle);
                    self.children[index].started = now;
                }
                Err(error) => self.escalate(error),
            }
        }
    }

    /// Tells of handlers that run for longer than they should, once each.
    fn report_slow(&self) {
        let Some(timeout) = self.flow.policy.handler_timeout else { return };
        let now = self.flow.clock.now();
        let workers = self.flow.batchers.values().flat_map(|batcher| batcher.slots.iter().cloned());
        for slot in self.flow.slots().into_iter().chain(workers) {
            let mut hand = lock(&slot.hand);
            let Some((since, false)) = hand.since else { continue };
            let running_for = now.saturating_duration_since(since);
            if running_for >= timeout {
                hand.since = Some((since, true));
                let id = hand.current.first().and_then(|ticket| ticket.message.id());
                drop(hand);
                let thread = slot.name.clone();
                self.flow.emit(PipelineEvent::Slow { thread, id, running_for });
            }
        }
    }

    /// The pipeline cannot go on: it stops, with this cause.
    fn escalate(&self, error: Error) {
        let reason = error.chain();
        self.flow.update_ending(|ending| {
            ending.error.get_or_insert(error);
        });
        self.flow.emit(PipelineEvent::Escalated { reason });
        self.flow.enter(Phase::Stopped);
    }

    fn finish(&mut self) {
        self.flow.enter(Phase::Stopped);
        let end = self.flow.end().unwrap_or_else(|| self.flow.clock.now() + END);
        self.wait_for_threads(end);
        let stuck = self.join();
        let returned = self.flow.give_back(&self.sources_left());
        self.flow.emit(PipelineEvent::Ended { returned: returned.len(), stuck: stuck.clone() });
        self.flow.update_ending(|ending| {
            ending.stuck = stuck;
            ending.returned = returned;
        });
        self.flow.hub.close();
    }

    /// Waits until every thread but the timer has ended, or until `end`.
    fn wait_for_threads(&mut self, end: Instant) {
        let running = |child: &Child| {
            child.kind != Kind::Timer && child.handle.as_ref().is_some_and(|h| !h.is_finished())
        };
        while self.children.iter().any(running) && self.flow.clock.now() < end {
            match self.notices.recv_deadline(end) {
                Ok(Notice::Ended(child)) => {
                    if let Some(child) = self.children.get_mut(child)
                        && let Some(handle) = child.handle.take()
                    {
                        drop(handle.join());
                    }
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        self.flow.timer.stop();
    }

    /// Joins what has ended; names what has not.
    fn join(&mut self) -> Vec<String> {
        let mut stuck = Vec::new();
        for child in &mut self.children {
            match child.handle.take() {
                // The timer has been told, and does not wait for anything else.
                Some(handle) if child.kind == Kind::Timer || handle.is_finished() => {
                    drop(handle.join());
                }
                Some(_) => stuck.push(child.name.clone()),
                None => {}
            }
        }
        stuck
    }

    fn sources_left(&self) -> Vec<Ticket> {
        self.flow
            .sources
            .iter()
            .flat_map(|source| std::mem::take(&mut *lock(&source.pulled)))
            .collect()
    }
}

impl<H: Handler> Flow<H> {
    /// Ends the pipeline: whatever is not settled is returned.
    fn give_back(&self, pulled: &[Ticket]) -> Vec<Message> {
        let mut left: Vec<Ticket> = pulled.to_vec();
        for lane in &self.lanes {
            left.extend(lane.receiver.try_iter().flatten());
            left.extend(std::mem::take(&mut *lock(&lane.retries)).into_iter().map(|r| r.ticket));
        }
        for batcher in self.batchers.values() {
            left.extend(batcher.left());
        }
        let workers = self.batchers.values().flat_map(|batcher| batcher.slots.iter().cloned());
        let slots: Vec<Arc<Slot>> = self.slots().into_iter().chain(workers).collect();
        for slot in &slots {
            self.settle_hand(slot);
        }
        {
            let mut state = lock(&self.state);
            state.phase = Phase::Ended;
            state.ledger.returned += state.ledger.in_flight;
            state.ledger.in_flight = 0;
        }
        for slot in &slots {
            let mut hand = lock(&slot.hand);
            left.extend(hand.current.iter().cloned());
            left.extend(hand.chunk.drain(..));
        }
        self.changed.notify_all();
        left.into_iter().map(|ticket| ticket.message).collect()
    }
}

fn pool(kind: &Kind) -> String {
    match kind {
        Kind::Timer => "timer".to_owned(),
        Kind::Source(index) => format!("source {index}"),
        Kind::Processor(_) => "processors".to_owned(),
        Kind::Grouper(name) | Kind::Worker(name, _) => format!("batcher {name}"),
    }
}
