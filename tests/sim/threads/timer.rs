//! The crate's `threads/timer.rs`, in a shell that can carry a planted bug.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::watched;
use crate::io::clock::Clock;
use crate::kernel::{self, Wait};
use crate::planted::{Bug, planted};
#[path = "../../../src/threads/timer.rs"]
mod real;
pub(crate) use real::Alarm;

#[derive(Debug, Clone)]
pub(crate) struct Timer {
    real: real::Timer,
    /// What each owner has asked for.
    asked: Arc<Mutex<Vec<Option<Instant>>>>,
}

/// What the timer fires, or does not.
struct Fuse {
    owner: usize,
    alarm: Arc<dyn Alarm>,
    asked: Arc<Mutex<Vec<Option<Instant>>>>,
}

impl Timer {
    pub(crate) fn new() -> Self {
        Self { real: real::Timer::new(), asked: Arc::default() }
    }

    pub(crate) fn arm(&self, owner: usize, at: Instant) {
        let mut asked = self.asked.lock().unwrap();
        if asked.len() <= owner {
            asked.resize(owner + 1, None);
        }
        let is_earlier = asked[owner].is_some_and(|asked| at < asked);
        asked[owner] = Some(asked[owner].map_or(at, |asked| asked.min(at)));
        drop(asked);
        if !(planted(Bug::TimerKeepsTheLater) && is_earlier) {
            self.real.arm(owner, at);
        }
    }

    pub(crate) fn stop(&self) {
        self.real.stop();
    }

    pub(crate) fn run(&self, clock: Clock, alarms: &[Arc<dyn Alarm>]) {
        let fuse = |(owner, alarm): (usize, &Arc<dyn Alarm>)| {
            let (alarm, asked) = (Arc::clone(alarm), Arc::clone(&self.asked));
            Arc::new(Fuse { owner, alarm, asked }) as Arc<dyn Alarm>
        };
        let fuses: Vec<_> = alarms.iter().enumerate().map(fuse).collect();
        self.real.run(clock, &fuses);
    }
}

impl Alarm for Fuse {
    fn fire(&self) {
        self.asked.lock().unwrap()[self.owner] = None;
        if !(planted(Bug::LostAlarm) && kernel::chance(0.02)) {
            self.alarm.fire();
        }
        if kernel::chance(0.02) {
            // A late alarm of something long over.
            kernel::pause(Wait::Yield);
            self.alarm.fire();
        }
    }
}
