//! The crate's `logic/rate.rs`, in a shell that can carry a planted bug and
//! reckons for itself what may pass.

use std::time::{Duration, Instant};

use crate::kernel::with;
use crate::planted::{Bug, planted};
#[path = "../../../src/logic/rate.rs"]
mod real;
pub(crate) use real::RateLimit;

#[derive(Debug)]
pub(crate) struct Limiter {
    real: real::Limiter,
    level: f64,
    at: Instant,
    window: Instant,
    passed: u64,
}

impl Limiter {
    pub(crate) fn new(limit: RateLimit, now: Instant) -> Self {
        let (real, passed) = (real::Limiter::new(limit, now), 0);
        Self { real, level: full(limit), at: now, window: now, passed }
    }

    pub(crate) fn take(&mut self, now: Instant, want: usize) -> usize {
        let granted = self.real.take(now, want);
        let granted = if planted(Bug::RateExceeded) && granted > 0 { want } else { granted };
        self.reckon(now, granted as u64);
        with(|k| k.wk.granted += granted as u64);
        granted
    }

    pub(crate) fn next(&self, now: Instant) -> Option<Instant> {
        self.real.next(now)
    }

    pub(crate) fn set(&mut self, limit: RateLimit, now: Instant) {
        let old = self.limit();
        self.real.set(limit, now);
        let now = now.max(self.at);
        (self.level, self.at) = (full(limit), now);
        let interval = |limit| match limit {
            RateLimit::FixedWindow { interval, .. } => Some(interval),
            _ => None,
        };
        // Windows of the same length go on.
        if interval(old).is_none() || interval(old) != interval(limit) {
            (self.window, self.passed) = (now, 0);
        }
    }

    pub(crate) fn limit(&self) -> RateLimit {
        self.real.limit()
    }

    fn reckon(&mut self, now: Instant, granted: u64) {
        let limit = self.limit();
        // Whoever comes late with its time counts for now.
        let now = now.max(self.at);
        let over = match limit {
            RateLimit::TokenBucket { per_second, burst } => {
                let gone = now.saturating_duration_since(self.at).as_secs_f64();
                let level = (self.level + gone * per_second).min(f64::from(burst));
                self.level = level - granted as f64;
                self.at = now;
                self.level < -0.001
            }
            RateLimit::FixedWindow { allowed, interval } => {
                while now >= self.window + interval {
                    self.window += interval;
                    self.passed = 0;
                }
                self.passed += granted;
                self.at = now;
                granted > 0 && self.passed > u64::from(allowed)
            }
        };
        if over {
            with(|k| k.broken("rate-kept", || format!("{granted} more over {limit:?}")));
        }
    }
}

fn full(limit: RateLimit) -> f64 {
    match limit {
        RateLimit::TokenBucket { burst, .. } => f64::from(burst),
        RateLimit::FixedWindow { .. } => 0.0,
    }
}
