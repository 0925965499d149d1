//! The crate's `logic/restart.rs`, in a shell that can carry a planted bug.

use crate::planted::{Bug, planted};
#[path = "../../../src/logic/restart.rs"]
mod real;
pub(crate) use real::Intensity;
use std::time::{Duration, Instant};

#[derive(Debug, Clone)]
pub(crate) struct Restarts(real::Restarts);

impl Restarts {
    pub(crate) fn new(intensity: Intensity) -> Self {
        Self(real::Restarts::new(intensity))
    }

    pub(crate) fn intensity(&self) -> Intensity {
        self.0.intensity()
    }

    pub(crate) fn at_once(&mut self, now: Instant) -> Option<Duration> {
        self.0.at_once(now)
    }

    pub(crate) fn on_end(&mut self, now: Instant, ran_for: Duration) -> Option<Duration> {
        let delay = self.0.on_end(now, ran_for);
        if planted(Bug::IntensityIgnored) {
            return Some(delay.unwrap_or(Duration::from_millis(250)));
        }
        if planted(Bug::RestartedAtOnce) { delay.map(|_| Duration::ZERO) } else { delay }
    }
}
