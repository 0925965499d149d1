//! The crate's `threads/timer.rs`, in a shell that can carry a planted bug.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::watched;
use crate::io::clock::Clock;
use crate::kernel::{self, Wait};
use crate::planted::{Bug, planted};
use crate::works::books;
#[path = "../../../src/threads/timer.rs"]
mod real;
pub(crate) use real::Alarm;

#[derive(Debug, Clone)]
pub(crate) struct Timer {
    real: real::Timer,
    /// What each owner has asked for.
    asked: Arc<Mutex<Vec<Option<Instant>>>>,
    /// What each connection last asked for that was over already.
    past: Arc<Mutex<Vec<Option<Instant>>>>,
    /// It is a client's, and not a pipeline's.
    is_clients: bool,
}

/// What the timer fires, or does not.
struct Fuse {
    owner: usize,
    alarm: Arc<dyn Alarm>,
    asked: Arc<Mutex<Vec<Option<Instant>>>>,
    is_clients: bool,
}

impl Timer {
    pub(crate) fn new() -> Self {
        Self {
            real: real::Timer::new(),
            asked: Arc::default(),
            past: Arc::default(),
            is_clients: false,
        }
    }

    pub(crate) fn of_a_client() -> Self {
        Self { is_clients: true, ..Self::new() }
    }

    /// A connection may ask once for what is over: when it hears of it, it acts.
    fn look_back(&self, owner: usize, at: Instant) {
        if at > kernel::instant() || !self.is_clients {
            return;
        }
        let mut past = self.past.lock().unwrap();
        if past.len() <= owner {
            past.resize(owner + 1, None);
        }
        if past[owner].replace(at) == Some(at) {
            kernel::with(|k| {
                let at = k.nanos(at) as f64 / 1e9;
                k.broken("no-past-deadline-twice", || format!("{owner} waits for {at:.6}"));
            });
        }
    }

    pub(crate) fn arm(&self, owner: usize, at: Instant) {
        self.look_back(owner, at);
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
            Arc::new(Fuse { owner, alarm, asked, is_clients: self.is_clients }) as Arc<dyn Alarm>
        };
        let fuses: Vec<_> = alarms.iter().enumerate().map(fuse).collect();
        self.real.run(clock, &fuses);
    }
}

impl Alarm for Fuse {
    fn fire(&self) {
        self.asked.lock().unwrap()[self.owner] = None;
        let panics = kernel::with(|k| k.failing > 0.0 && k.chance(0.002));
        if panics {
            // What it has just taken in hand is forgotten.
            kernel::with(|k| {
                k.fault("timer panics");
                if self.is_clients {
                    k.ck.timers += 1;
                } else {
                    books::dies(k);
                }
            });
            panic!("planned panic of the timer");
        }
        if !(planted(Bug::LostAlarm) && kernel::chance(0.02)) {
            self.alarm.fire();
        }
        if kernel::chance(0.02) {
            kernel::with(|k| k.fault("late alarm"));
            // A late alarm of something long over.
            kernel::pause(Wait::Yield);
            self.alarm.fire();
        }
    }
}
