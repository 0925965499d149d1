//! The timer thread: the only one that sleeps with a timeout.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::watched::Watched;
use crate::io::clock::Clock;

/// Who hears that a deadline has come. Posting must not block.
pub(crate) trait Alarm: Send + Sync {
    fn fire(&self);
}

/// Asks the timer thread for wake-ups. Each owner has one deadline, and looks
/// for itself which of its concerns is due: a stale wake-up does nothing.
///
/// Asking never waits, not even when the thread has ended: a thread that a
/// hook held up past the end of its client must be able to end as well.
#[derive(Debug, Clone)]
pub(crate) struct Timer {
    /// Notified when there is an earlier deadline, or to stop.
    state: Arc<Watched<TimerState>>,
}

#[derive(Debug, Default)]
struct TimerState {
    deadlines: Deadlines,
    stopped: bool,
}

impl Timer {
    pub(crate) fn new() -> Self {
        Self { state: Arc::new(Watched::new(TimerState::default())) }
    }

    /// The owner's alarm fires at `at`, or earlier if that was asked before.
    pub(crate) fn arm(&self, owner: usize, at: Instant) {
        let mut state = self.state.lock();
        let first = state.deadlines.first();
        state.deadlines.arm(owner, at);
        if state.deadlines.first() != first {
            drop(state);
            self.state.notify_all();
        }
    }

    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
        self.state.notify_all();
    }

    /// The thread's body. `alarms[owner]` is told when its deadline has come.
    pub(crate) fn run(&self, clock: Clock, alarms: &[Arc<dyn Alarm>]) {
        let mut state = self.state.lock();
        while !state.stopped {
            let now = clock.now();
            if let Some(owner) = state.deadlines.due(now) {
                drop(state);
                alarms[owner].fire();
                state = self.state.lock();
                continue;
            }
            state = match state.deadlines.first() {
                None => self.state.wait(state),
                Some(at) => self.state.wait_timeout(state, at.saturating_duration_since(now)),
            };
        }
    }
}

/// At most one deadline for each owner, the earliest first.
#[derive(Debug, Default)]
struct Deadlines {
    order: BTreeSet<(Instant, usize)>,
    of: BTreeMap<usize, Instant>,
}

impl Deadlines {
    fn first(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    fn arm(&mut self, owner: usize, at: Instant) {
        match self.of.get(&owner).copied() {
            Some(earlier) if earlier <= at => {}
            later => {
                later.map(|later| self.order.remove(&(later, owner)));
                self.order.insert((at, owner));
                self.of.insert(owner, at);
            }
        }
    }

    fn due(&mut self, now: Instant) -> Option<usize> {
        let (_, owner) = self.order.first().copied().filter(|(at, _)| *at <= now)?;
        self.order.pop_first();
        self.of.remove(&owner);
        Some(owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn each_owner_has_one_deadline_and_the_earliest_counts() {
        let start = Clock::real().now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut deadlines = Deadlines::default();
        deadlines.arm(0, at(50));
        deadlines.arm(1, at(30));
        deadlines.arm(0, at(20));
        deadlines.arm(0, at(90));
        assert_eq!(deadlines.first(), Some(at(20)));
        assert_eq!(deadlines.due(at(19)), None);
        assert_eq!(deadlines.due(at(40)), Some(0));
        assert_eq!(deadlines.due(at(40)), Some(1));
        assert_eq!((deadlines.due(at(99)), deadlines.first()), (None, None));
    }

    #[test]
    fn asking_a_timer_that_has_ended_does_not_wait() {
        let timer = Timer::new();
        let now = Clock::real().now();
        timer.stop();
        timer.run(Clock::real(), &[]);
        for ms in (0..10_000).rev() {
            timer.arm(0, now + Duration::from_millis(ms));
        }
    }
}
