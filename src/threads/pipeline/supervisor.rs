//! The pipeline's monitor thread: it watches every join handle, replaces dead
//! workers one for one, and ends the pipeline in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::pool::Slot;
use super::stats::PipelineEvent;
use super::{Flow, Phase, batcher, processor, source};
use crate::error::{Error, ErrorKind};
use crate::logic::restart::{Intensity, Restarts};
use crate::threads::monitor::{MonitorAlarm, Notice};
use crate::threads::{JoinHandle, panic_message, receive};
use crate::work::{Failure, FailureKind, Handler, Source};

/// How long threads may take to end after all is settled, without a deadline.
const END: Duration = Duration::from_secs(5);

/// The least time between two looks for slow handlers.
const LOOK: Duration = Duration::from_millis(1);

/// Which thread a child is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Timer,
    Source(usize),
    Processor,
    Grouper(Arc<str>),
    Worker(Arc<str>),
    Undertaker,
}

struct Child {
    kind: Kind,
    name: String,
    /// What a worker has in hand.
    slot: Option<Arc<Slot>>,
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
        self.add(Kind::Timer, None)?;
        self.grow()?;
        let names: Vec<_> = self.flow.batchers.keys().cloned().collect();
        for name in names {
            self.add(Kind::Grouper(name), None)?;
        }
        for (index, source) in sources.into_iter().enumerate() {
            let flow = Arc::clone(&self.flow);
            let name = format!("broadsock-source-{index}");
            let child = self.children.len();
            let own = name.clone();
            let body = move || flow.run_as(own, || source::run(&flow, index, source));
            let handle = self.flow.spawner.spawn(&name, child, body)?;
            self.enlist(child, Kind::Source(index), name, None, handle);
        }
        Ok(())
    }

    /// Starts a thread for each worker that has none yet.
    fn grow(&mut self) -> Result<(), Error> {
        let flow = Arc::clone(&self.flow);
        let batchers = flow.batchers.values();
        let pools = batchers.map(|b| (Kind::Worker(Arc::clone(&b.name)), &b.workers));
        for (kind, pool) in pools.chain([(Kind::Processor, &flow.processors)]) {
            for slot in pool.slots() {
                let of = |child: &Child| child.slot.as_ref().is_some_and(|s| Arc::ptr_eq(s, &slot));
                if !self.children.iter().any(of) {
                    self.add(kind.clone(), Some(slot))?;
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, kind: Kind, slot: Option<Arc<Slot>>) -> Result<(), Error> {
        // A retired worker's place can be had again.
        let vacant = |child: &Child| {
            matches!(child.kind, Kind::Processor | Kind::Worker(_)) && child.slot.is_none()
        };
        let child = self.children.iter().position(vacant).unwrap_or(self.children.len());
        let (name, handle) = self.spawn(&kind, slot.clone(), child)?;
        self.enlist(child, kind, name, slot, handle);
        Ok(())
    }

    fn enlist(
        &mut self,
        index: usize,
        kind: Kind,
        name: String,
        slot: Option<Arc<Slot>>,
        handle: JoinHandle<()>,
    ) {
        let started = self.flow.clock.now();
        let child = Child { kind, name, slot, handle: Some(handle), started, restart_at: None };
        match self.children.get_mut(index) {
            Some(place) => *place = child,
            None => self.children.push(child),
        }
    }

    fn spawn(
        &self,
        kind: &Kind,
        slot: Option<Arc<Slot>>,
        child: usize,
    ) -> Result<(String, JoinHandle<()>), Error> {
        let flow = Arc::clone(&self.flow);
        let (name, body): (String, Box<dyn FnOnce() + Send>) = match (kind.clone(), slot) {
            (Kind::Timer, _) => {
                let monitor = MonitorAlarm(self.flow.spawner.monitor.clone());
                let alarms = flow.alarms(Arc::new(monitor));
                let body = Box::new(move || flow.timer.run(flow.clock, &alarms));
                ("broadsock-timer".to_owned(), body)
            }
            (Kind::Processor, Some(slot)) => {
                (slot.name.clone(), Box::new(move || processor::run(&flow, &slot)))
            }
            (Kind::Worker(batcher), Some(slot)) => {
                (slot.name.clone(), Box::new(move || batcher::work(&flow, &batcher, &slot)))
            }
            (Kind::Grouper(batcher), _) => {
                let name = format!("broadsock-batcher-{batcher}");
                (name, Box::new(move || batcher::run(&flow, &batcher)))
            }
            (Kind::Undertaker, _) => {
                let slots = self.slots();
                let body = move || slots.iter().for_each(|slot| flow.settle_hand(slot));
                ("broadsock-undertaker".to_owned(), Box::new(body))
            }
            (Kind::Source(_) | Kind::Processor | Kind::Worker(_), _) => {
                let phrase = "a source cannot be started again";
                return Err(Error::new(ErrorKind::Panicked, phrase));
            }
        };
        let (flow, own) = (Arc::clone(&self.flow), name.clone());
        let body = move || flow.run_as(own, body);
        let handle = self.flow.spawner.spawn(&name, child, body)?;
        Ok((name, handle))
    }

    /// Those of all workers that have not ended, the retired ones included.
    fn slots(&self) -> Vec<Arc<Slot>> {
        self.children.iter().filter_map(|child| child.slot.clone()).collect()
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
            let Ok(notice) = receive(&self.notices) else { break };
            match notice {
                Notice::Ended(child) => self.ended(child),
                // Whoever posts these has put what to look at into the flow.
                Notice::Tick | Notice::Adopt { .. } => {}
            }
            self.restart_due();
            self.report_slow();
            if self.flow.phase() < Phase::Stopped
                && let Err(error) = self.grow()
            {
                self.escalate(error);
            }
        }
        self.finish();
    }

    fn arm(&self, now: Instant) {
        let restarts = self.children.iter().filter_map(|child| child.restart_at);
        let slow = self.flow.policy.handler_timeout;
        let slow = slow.and_then(|timeout| now.checked_add((timeout / 2).max(LOOK)));
        if let Some(at) = restarts.chain(self.flow.deadline()).chain(slow).min() {
            self.flow.timer.arm(self.flow.supervisor_owner(), at);
        }
    }

    /// A thread has ended. Workers end only when stopped or retired; one that
    /// panicked is replaced, and only the message it had in hand fails.
    fn ended(&mut self, index: usize) {
        let Some(child) = self.children.get_mut(index) else { return };
        let Some(handle) = child.handle.take() else { return };
        let Err(payload) = handle.join() else {
            child.slot = None;
            return;
        };
        let (kind, name) = (child.kind.clone(), child.name.clone());
        let reason = format!("its thread panicked: {}", panic_message(payload));
        if let Some(slot) = &child.slot {
            slot.bury(|| {
                let text = format!("{name} died in the middle of it");
                Failure::of(FailureKind::WorkerDied, text, false)
            });
        }
        if let Kind::Source(_) = kind {
            self.flow.source_ended();
            self.escalate(Error::new(ErrorKind::Panicked, format!("{name}: {reason}")));
            return;
        }
        let now = self.flow.clock.now();
        let ran_for = now.saturating_duration_since(child.started);
        let intensity = self.intensity;
        let pool = self.restarts.entry(pool(&kind)).or_insert_with(|| Restarts::new(intensity));
        // Without a timer nothing would say that the time has come.
        let delay = match kind {
            Kind::Timer => pool.at_once(now),
            _ => pool.on_end(now, ran_for),
        };
        match delay {
            Some(delay) => {
                child.restart_at = Some(now + delay);
                self.flow.emit(PipelineEvent::Restarting { thread: name, delay, reason });
            }
            None => {
                let phrase = format!("{name}: {reason} (restarted {intensity} before)");
                self.escalate(Error::new(ErrorKind::Panicked, phrase));
            }
        }
    }

    fn restart_due(&mut self) {
        let now = self.flow.clock.now();
        for index in 0..self.children.len() {
            if self.children[index].restart_at.is_none_or(|at| at > now) {
                continue;
            }
            self.children[index].restart_at = None;
            self.flow.counters.restarts.add(1);
            let Child { kind, slot, .. } = &self.children[index];
            match self.spawn(kind, slot.clone(), index) {
                Ok((_, handle)) => {
                    let child = &mut self.children[index];
                    (child.handle, child.started) = (Some(handle), now);
                    if child.kind == Kind::Timer {
                        self.flow.fire_all();
                    }
                }
                Err(error) => self.escalate(error),
            }
        }
    }

    /// Tells of handlers that run for longer than they should, once each.
    fn report_slow(&self) {
        let Some(timeout) = self.flow.policy.handler_timeout else { return };
        let now = self.flow.clock.now();
        for slot in self.slots() {
            if let Some((message, running_for)) = slot.slow(now, timeout) {
                let thread = slot.name.clone();
                self.flow.emit(PipelineEvent::Slow { thread, message, running_for });
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
        // What waits now waits for the stop too: the timer ends beside the others.
        self.flow.timer.stop();
        let end = self.flow.end().unwrap_or_else(|| self.flow.clock.now() + END);
        self.settle_rest();
        self.wait_for_threads(end);
        let stuck = self.join();
        self.flow.update_ending(|ending| ending.stuck.clone_from(&stuck));
        self.flow.give_back();
        let returned = self.flow.ending().returned.len();
        self.flow.emit(PipelineEvent::Ended { returned, stuck });
        self.flow.clear();
        self.flow.hub.close();
    }

    /// What stuck and dead workers have finished is settled all the same, on a
    /// thread of its own: that is user code too.
    fn settle_rest(&mut self) {
        if self.slots().iter().any(|slot| slot.has_finished())
            && let Err(error) = self.add(Kind::Undertaker, None)
        {
            log::error!("{}: finished messages are returned", error.chain());
        }
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
                        end_of(handle);
                    }
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
    }

    /// Joins what has ended; names what has not.
    fn join(&mut self) -> Vec<String> {
        let mut stuck = Vec::new();
        for child in &mut self.children {
            match child.handle.take() {
                // The timer has been told, and does not wait for anything else.
                Some(handle) if child.kind == Kind::Timer || handle.is_finished() => {
                    end_of(handle);
                }
                Some(_) => stuck.push(child.name.clone()),
                None => {}
            }
        }
        stuck
    }
}

/// Joins a thread that is over, or about to be; how it ended does not matter.
fn end_of(handle: JoinHandle<()>) {
    if let Err(payload) = handle.join() {
        log::debug!("a thread panicked at the end: {}", panic_message(payload));
    }
}

fn pool(kind: &Kind) -> String {
    match kind {
        Kind::Timer => "timer".to_owned(),
        Kind::Source(index) => format!("source {index}"),
        Kind::Processor | Kind::Undertaker => "processors".to_owned(),
        Kind::Grouper(name) | Kind::Worker(name) => format!("batcher {name}"),
    }
}
