//! The monitor thread: it watches the join handles of all others, restarts
//! connections one for one, and ends the client in order.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvError, RecvTimeoutError, Sender};

use super::connection::{Connection, Lookup, ThreadEnd};
use super::shared::Shared;
use super::timer::Alarm;
use super::{JoinHandle, panic_text, receive};
use crate::error::{Error, ErrorKind};
use crate::event::{EventKind, State};
use crate::handler::Outgoing;
use crate::logic::connection::Input;
use crate::logic::restart::{Intensity, Restarts};

/// Notices that may wait for the monitor.
pub(crate) const NOTICES: usize = 256;

/// How long the connections of a client that failed may take to close.
const FAILURE_GRACE: Duration = Duration::from_secs(1);

/// How long an end waits for DNS look-ups, which nothing can interrupt.
const LOOKUP_GRACE: Duration = Duration::from_millis(100);

/// What the monitor is told.
#[derive(Debug)]
pub(crate) enum Notice {
    /// The thread of this child is about to end.
    Ended(usize),
    /// A DNS look-up that its connection could not wait for.
    Adopt { name: String, lookup: Lookup },
    /// A deadline asked of the timer came, a close was asked for, or the queue has
    /// room for a connection without a thread. Any other notice makes the monitor
    /// look at all of that as well.
    Tick,
}

/// Posts the timer's wake-ups to the monitor.
pub(crate) struct MonitorAlarm(pub(crate) Sender<Notice>);

impl Alarm for MonitorAlarm {
    fn fire(&self) {
        // A full channel holds notices, and each makes the monitor look at the time.
        let _ = self.0.try_send(Notice::Tick);
    }
}

/// The children's numbers: connections from 0, then the timer, then look-ups.
#[derive(Debug)]
pub(crate) struct Monitor {
    shared: Arc<Shared>,
    notices: Receiver<Notice>,
    alarms: Alarms,
    children: Vec<Child>,
    timer: Option<JoinHandle<()>>,
    lookups: Vec<(String, Lookup)>,
    /// The connections must be done by then.
    closing: Option<Instant>,
}

/// The timer's targets, to start it again.
#[derive(Clone)]
struct Alarms(Arc<[Arc<dyn Alarm>]>);

#[derive(Debug)]
struct Child {
    handle: Option<JoinHandle<ThreadEnd>>,
    started: Instant,
    restarts: Restarts,
    restart_at: Option<Instant>,
}

impl Monitor {
    /// Starts the timer and the connections. On an error the threads already
    /// started have ended.
    pub(crate) fn start(
        shared: Arc<Shared>,
        notices: Receiver<Notice>,
        intensity: Intensity,
    ) -> Result<Self, Error> {
        let mut alarms: Vec<Arc<dyn Alarm>> = Vec::new();
        for peer in &shared.connections {
            alarms.push(peer.inbox.clone());
        }
        alarms.push(Arc::new(MonitorAlarm(shared.spawner.monitor.clone())));
        let now = shared.clock.now();
        let child = |_| Child {
            handle: None,
            started: now,
            restarts: Restarts::new(intensity),
            restart_at: None,
        };
        let children = (0..shared.connections.len()).map(child).collect();
        let mut monitor = Self {
            shared,
            notices,
            alarms: Alarms(alarms.into()),
            children,
            timer: None,
            lookups: Vec::new(),
            closing: None,
        };
        monitor.timer = Some(monitor.spawn_timer()?);
        for index in 0..monitor.children.len() {
            if let Err(error) = monitor.spawn(index) {
                monitor.begin_close(now + FAILURE_GRACE);
                monitor.run();
                return Err(error);
            }
        }
        Ok(monitor)
    }

    /// The thread's body: it ends when every other thread has.
    pub(crate) fn run(mut self) {
        while !self.is_done() {
            self.arm();
            let Ok(notice) = self.next(self.closing) else { break };
            match notice {
                Notice::Ended(child) if child < self.children.len() => self.ended(child),
                Notice::Ended(child) => self.other_ended(child),
                Notice::Adopt { name, lookup } => self.adopt(name, lookup),
                Notice::Tick => {}
            }
            self.hear_close();
            self.offer_left();
            self.restart_due();
        }
        self.finish();
    }

    /// The next notice. The timer wakes the monitor when it is time for something;
    /// where it could not be started again, the monitor looks at `until` itself.
    fn next(&self, until: Option<Instant>) -> Result<Notice, RecvError> {
        let Some(until) = until.filter(|_| self.timer.is_none()) else {
            return receive(&self.notices);
        };
        match self.notices.recv_deadline(until) {
            Err(RecvTimeoutError::Timeout) => Ok(Notice::Tick),
            received => received.map_err(|_| RecvError),
        }
    }

    fn is_done(&self) -> bool {
        let Some(deadline) = self.closing else { return false };
        self.children.iter().all(|child| child.handle.is_none())
            || self.shared.clock.now() >= deadline
    }

    /// Asks the timer for the next restart or the deadline of a close.
    fn arm(&self) {
        let restarts = self.children.iter().filter_map(|child| child.restart_at);
        if let Some(at) = restarts.chain(self.closing).min() {
            self.shared.timer.arm(self.children.len(), at);
        }
    }

    fn spawn(&mut self, index: usize) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let connection = Connection::new(shared, index)?;
        let name = format!("broadsock-conn-{index}");
        let handle = self.shared.spawner.spawn(&name, index, move || connection.run())?;
        let child = &mut self.children[index];
        child.handle = Some(handle);
        child.started = self.shared.clock.now();
        Ok(())
    }

    fn spawn_timer(&self) -> Result<JoinHandle<()>, Error> {
        let (timer, clock) = (self.shared.timer.clone(), self.shared.clock);
        let (alarms, child) = (self.alarms.clone(), self.children.len());
        self.shared.spawner.spawn("broadsock-timer", child, move || timer.run(clock, &alarms.0))
    }

    /// A connection's thread ended: joins it and decides what follows.
    fn ended(&mut self, index: usize) {
        let Some(handle) = self.children[index].handle.take() else { return };
        // The timer ends beside the last connection, unless a look-up is still to be
        // waited for.
        let is_last = self.children.iter().all(|child| child.handle.is_none());
        if self.closing.is_some() && is_last && self.lookups.is_empty() {
            self.shared.timer.stop();
        }
        let end = handle.join().unwrap_or_else(|payload| {
            let phrase = format!("its thread panicked: {}", panic_text(&*payload));
            ThreadEnd::Unrecoverable(Error::new(ErrorKind::Panicked, phrase))
        });
        match end {
            ThreadEnd::Closed => {}
            ThreadEnd::Unrecoverable(error) => self.unrecoverable(index, error),
            ThreadEnd::GaveUp(error) => self.fail(index, error, "without a restart".to_owned()),
        }
        if self.closing.is_some() {
            self.shared.release_left(index);
            self.settle(index);
        }
    }

    /// Watches a look-up that its connection has left behind, unless it is over.
    fn adopt(&mut self, name: String, lookup: Lookup) {
        if !lookup.is_over() {
            self.lookups.push((name, lookup));
        }
    }

    /// Connections that wait for their next thread may hold what consumers wait for.
    fn offer_left(&self) {
        for (index, child) in self.children.iter().enumerate() {
            if child.restart_at.is_some() {
                self.shared.offer_left(index);
            }
        }
    }

    fn unrecoverable(&mut self, index: usize, error: Error) {
        let now = self.shared.clock.now();
        self.shared.connections[index].metrics.ended(now, Some(&error));
        // A thread that panicked left its state where it was.
        let state = self.shared.states.of(index);
        if state != State::Failed {
            self.shared.transition(index, state, State::Failed, &error.chain());
        }
        if self.closing.is_some() {
            return;
        }
        let child = &mut self.children[index];
        let ran_for = now.saturating_duration_since(child.started);
        match child.restarts.on_end(now, ran_for) {
            Some(delay) => {
                child.restart_at = Some(now + delay);
                self.announce_restart(index, delay, error);
            }
            None => {
                let reason = format!("restarted {}", child.restarts.intensity());
                self.fail(index, error, reason);
            }
        }
    }

    fn announce_restart(&self, index: usize, delay: Duration, error: Error) {
        let thread = format!("broadsock-conn-{index}");
        let epoch = self.shared.connections[index].metrics.epoch();
        let reason = format!("supervision restarts the thread in {delay:.2?}");
        self.shared.emit(index, epoch, EventKind::Restarting { thread, delay, error });
        if let Ok(to) = crate::logic::connection::next(State::Failed, Input::Restart) {
            self.shared.transition(index, State::Failed, to, &reason);
        }
    }

    fn restart_due(&mut self) {
        let now = self.shared.clock.now();
        for index in 0..self.children.len() {
            if self.children[index].restart_at.is_some_and(|at| at <= now) {
                self.children[index].restart_at = None;
                self.shared.restarts.add(1);
                if let Err(error) = self.spawn(index) {
                    self.unrecoverable(index, error);
                }
            }
        }
    }

    /// The timer or a look-up ended. A timer that panicked is started again,
    /// and everybody tells it their deadlines anew.
    fn other_ended(&mut self, child: usize) {
        if child > self.children.len() {
            // Not joined: who says that it ends may wait for room to say so.
            self.lookups.retain(|(_, lookup)| !lookup.is_over());
            return;
        }
        let Some(handle) = self.timer.take() else { return };
        let Err(payload) = handle.join() else { return };
        let phrase = format!("the timer thread panicked: {}", panic_text(&*payload));
        log::error!("{phrase}");
        self.shared.restarts.add(1);
        match self.spawn_timer() {
            Ok(handle) => {
                self.timer = Some(handle);
                for peer in &self.shared.connections {
                    peer.inbox.post(|signals| signals.rearm = true);
                }
            }
            Err(error) => {
                self.fail(0, error, phrase);
                self.hurry();
            }
        }
    }

    fn fail(&mut self, index: usize, error: Error, reason: String) {
        if self.shared.ending().error.is_none() {
            self.shared.ending().error = Some(error.clone());
            // The connection's state is final already: waiting for it would not tell.
            self.shared.states.look_again();
            let epoch = self.shared.connections[index].metrics.epoch();
            self.shared.emit(index, epoch, EventKind::Failed { error, reason });
        }
        let deadline = self.shared.clock.now() + FAILURE_GRACE;
        self.begin_close(deadline);
    }

    /// Without a timer nothing would wake a connection that waits for its server's
    /// part of the close: it shall not wait.
    fn hurry(&self) {
        let now = self.shared.clock.now();
        for peer in &self.shared.connections {
            peer.inbox.post(|signals| signals.close = Some(now));
        }
    }

    fn hear_close(&mut self) {
        if let Some(asked) = self.shared.close_asked()
            && self.closing.is_none_or(|earlier| asked < earlier)
        {
            self.begin_close(asked);
        }
    }

    /// Tells every connection to close; a second call may only bring it forward.
    fn begin_close(&mut self, deadline: Instant) {
        let deadline = self.closing.map_or(deadline, |earlier| earlier.min(deadline));
        self.closing = Some(deadline);
        for index in 0..self.children.len() {
            self.children[index].restart_at = None;
            if self.children[index].handle.is_none() {
                self.shared.release_left(index);
                self.settle(index);
            }
            self.shared.connections[index].inbox.post(|signals| signals.close = Some(deadline));
        }
    }

    /// The final state of a connection whose thread has ended.
    fn settle(&self, index: usize) {
        let failed = self.shared.ending().error.is_some();
        let state = self.shared.states.of(index);
        if !state.is_final() {
            let to = if failed { State::Failed } else { State::Closed };
            self.shared.transition(index, state, to, "the client has ended");
        }
    }

    /// Ends what is left: consumers first, then the timer; names what hangs.
    fn finish(mut self) {
        let unsent = self.close_outboxes();
        self.shared.close_queue();
        let stuck = self.stuck();
        self.shared.timer.stop();
        if let Some(timer) = self.timer.take() {
            drop(timer.join());
        }
        for index in 0..self.children.len() {
            self.settle(index);
        }
        if !stuck.is_empty() {
            self.shared.emit(0, 0, EventKind::Stuck { threads: stuck.clone() });
        }
        self.shared.settle_end(stuck, unsent);
        self.shared.end();
    }

    fn close_outboxes(&self) -> Vec<Outgoing> {
        let mut unsent = Vec::new();
        for (index, peer) in self.shared.connections.iter().enumerate() {
            let left = peer.inbox.close();
            if !left.is_empty() {
                let kind = EventKind::Unsent { count: left.len() };
                self.shared.emit(index, peer.metrics.epoch(), kind);
            }
            unsent.extend(left);
        }
        unsent
    }

    /// The threads that still run. Look-ups are given a moment: nothing can
    /// interrupt them, and most are about to end.
    fn stuck(&mut self) -> Vec<String> {
        let give_up = self.shared.clock.now() + LOOKUP_GRACE;
        let give_up = self.closing.map_or(give_up, |deadline| deadline.min(give_up));
        while !self.lookups.is_empty() && self.shared.clock.now() < give_up {
            self.shared.timer.arm(self.children.len(), give_up);
            match self.next(Some(give_up)) {
                Ok(Notice::Adopt { name, lookup }) => self.adopt(name, lookup),
                Ok(Notice::Ended(child)) if child < self.children.len() => self.ended(child),
                Ok(Notice::Ended(child)) => self.other_ended(child),
                Ok(Notice::Tick) => {}
                Err(_) => break,
            }
        }
        while let Ok(notice) = self.notices.try_recv() {
            if let Notice::Adopt { name, lookup } = notice {
                self.adopt(name, lookup);
            }
        }
        let connections = self.children.iter_mut().enumerate().filter_map(|(index, child)| {
            let handle = child.handle.take()?;
            (!handle.is_finished()).then(|| format!("broadsock-conn-{index}"))
        });
        let mut stuck: Vec<String> = connections.collect();
        let lookups = self.lookups.drain(..).filter(|(_, lookup)| !lookup.is_over());
        stuck.extend(lookups.map(|(name, _)| name));
        stuck
    }
}

impl std::fmt::Debug for Alarms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Alarms({})", self.0.len())
    }
}
