//! The timer thread: the only one that sleeps with a timeout.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::io::clock::Clock;

/// Commands that may wait; the timer never blocks for long.
const COMMANDS: usize = 256;

/// Who hears that a deadline has come. Posting must not block.
pub(crate) trait Alarm: Send + Sync {
    fn fire(&self);
}

/// Asks the timer thread for wake-ups. Each owner has one deadline, and looks
/// for itself which of its concerns is due: a stale wake-up does nothing.
#[derive(Debug, Clone)]
pub(crate) struct Timer {
    commands: Sender<Command>,
    inbox: Receiver<Command>,
}

#[derive(Debug)]
enum Command {
    Arm { owner: usize, at: Instant },
    Stop,
}

impl Timer {
    pub(crate) fn new() -> Self {
        let (commands, inbox) = bounded(COMMANDS);
        Self { commands, inbox }
    }

    /// The owner's alarm fires at `at`, or earlier if that was asked before.
    pub(crate) fn arm(&self, owner: usize, at: Instant) {
        // It cannot be disconnected: this handle holds the other end too.
        let _ = self.commands.send(Command::Arm { owner, at });
    }

    pub(crate) fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
    }

    /// The thread's body. `alarms[owner]` is told when its deadline has come.
    pub(crate) fn run(&self, clock: Clock, alarms: &[Arc<dyn Alarm>]) {
        let mut deadlines = Deadlines::new(alarms.len());
        loop {
            let command = match deadlines.first() {
                Some(at) => self.inbox.recv_deadline(at),
                None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match command {
                Ok(Command::Arm { owner, at }) => deadlines.arm(owner, at),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
            while let Some(owner) = deadlines.due(clock.now()) {
                alarms[owner].fire();
            }
        }
    }
}

/// At most one deadline for each owner, the earliest first.
struct Deadlines {
    order: BTreeSet<(Instant, usize)>,
    of: Vec<Option<Instant>>,
}

impl Deadlines {
    fn new(owners: usize) -> Self {
        Self { order: BTreeSet::new(), of: vec![None; owners] }
    }

    fn first(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    fn arm(&mut self, owner: usize, at: Instant) {
        match self.of[owner] {
            Some(earlier) if earlier <= at => {}
            later => {
                later.map(|later| self.order.remove(&(later, owner)));
                self.order.insert((at, owner));
                self.of[owner] = Some(at);
            }
        }
    }

    fn due(&mut self, now: Instant) -> Option<usize> {
        let (_, owner) = self.order.first().copied().filter(|(at, _)| *at <= now)?;
        self.order.pop_first();
        self.of[owner] = None;
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
        let mut deadlines = Deadlines::new(2);
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
}
