//! How often a thread that ended is started again before the client gives up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::error::Error;

/// The first delay before a restart.
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// The longest delay before a restart.
const LONGEST_DELAY: Duration = Duration::from_secs(30);
/// A thread that ran for so long had started well: the delays start anew.
const STABLE: Duration = Duration::from_secs(10);

/// How many restarts within how long a time are too many.
///
/// The restart intensity of an Erlang/OTP supervisor (`intensity` and
/// `period`): one more than `restarts` within `within` ends the client.
/// Defaults to 3 restarts in 5 seconds, as in OTP's and Elixir's examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intensity {
    /// Restarts allowed within the time. Zero: the first end is final.
    pub restarts: u32,
    /// The time in which they are counted; more than zero where any are allowed.
    pub within: Duration,
}

impl Intensity {
    /// Refuses restarts that nothing would ever count.
    pub(crate) fn check(self) -> Result<(), Error> {
        if self.restarts > 0 && self.within.is_zero() {
            return Err(Error::setting("restart_intensity", "`within` must be more than zero"));
        }
        Ok(())
    }
}

impl Default for Intensity {
    fn default() -> Self {
        Self { restarts: 3, within: Duration::from_secs(5) }
    }
}

impl std::fmt::Display for Intensity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} times in {:?}", self.restarts, self.within)
    }
}

/// The restarts of one thread so far.
///
/// Delays double from 250 ms to 30 s for each restart in a row, so even a
/// generous intensity is no hot loop. With the defaults three restarts take
/// 1.75 s, so a thread that fails at once every time ends the client within
/// two seconds; one that runs for some seconds before each failure stays below
/// the intensity and is restarted at ever longer intervals.
#[derive(Debug, Clone)]
pub(crate) struct Restarts {
    intensity: Intensity,
    /// When restarts happened or will: at most `intensity.restarts` of them,
    /// none older than `intensity.within`.
    times: VecDeque<Instant>,
    /// Restarts in a row: the exponent of the next delay.
    row: u32,
}

impl Restarts {
    /// No restarts yet.
    pub(crate) fn new(intensity: Intensity) -> Self {
        Self { intensity, times: VecDeque::new(), row: 0 }
    }

    /// What is allowed.
    pub(crate) fn intensity(&self) -> Intensity {
        self.intensity
    }

    /// The thread ended at `now` after it `ran_for` so long: restart it after
    /// the delay returned, or give up on `None`.
    pub(crate) fn on_end(&mut self, now: Instant, ran_for: Duration) -> Option<Duration> {
        if ran_for >= STABLE {
            self.row = 0;
        }
        let delay = delay_of(self.row);
        self.record(now.checked_add(delay)?)?;
        self.row = self.row.saturating_add(1);
        Some(delay)
    }

    /// The same of a thread that cannot be waited for: it is started again now.
    pub(crate) fn at_once(&mut self, now: Instant) -> Option<Duration> {
        self.record(now)?;
        Some(Duration::ZERO)
    }

    /// Enters a restart that will happen at `at`, if the intensity allows it.
    fn record(&mut self, at: Instant) -> Option<()> {
        let within = self.intensity.within;
        self.times.retain(|time| at.saturating_duration_since(*time) <= within);
        if self.times.len() >= self.intensity.restarts as usize {
            return None;
        }
        self.times.push_back(at);
        Some(())
    }
}

/// The delay before a restart that follows on `row` others.
fn delay_of(row: u32) -> Duration {
    let factor = 1u32.checked_shl(row).unwrap_or(u32::MAX);
    FIRST_DELAY.saturating_mul(factor).min(LONGEST_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logic::some_instant;
    use proptest::prelude::*;

    const AT_ONCE: Duration = Duration::ZERO;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_thread_that_fails_at_once_ends_the_client_within_two_seconds() {
        let start = some_instant();
        let mut restarts = Restarts::new(Intensity::default());
        let mut now = start;
        let mut delays = Vec::new();
        while let Some(delay) = restarts.on_end(now, AT_ONCE) {
            delays.push(delay);
            now += delay;
        }
        assert_eq!(delays, [ms(250), ms(500), ms(1000)]);
        assert_eq!(now - start, ms(1750));
    }

    #[test]
    fn restarts_at_once_count_when_they_happen() {
        let start = some_instant();
        let mut restarts = Restarts::new(Intensity::default());
        for after in [0, 1000, 4000] {
            assert_eq!(restarts.at_once(start + ms(after)), Some(Duration::ZERO));
        }
        assert_eq!(restarts.at_once(start + ms(5000)), None);
        assert_eq!(restarts.at_once(start + ms(5001)), Some(Duration::ZERO));
    }

    #[test]
    fn restarts_far_apart_never_add_up() {
        let mut restarts = Restarts::new(Intensity::default());
        let mut now = some_instant();
        for _ in 0..1000 {
            let delay = restarts.on_end(now, STABLE).unwrap();
            assert_eq!(delay, FIRST_DELAY);
            now += delay + STABLE;
        }
        assert_eq!(restarts.times.len(), 1);
    }

    #[test]
    fn delays_double_to_thirty_seconds_and_start_anew_after_ten_good_seconds() {
        let generous = Intensity { restarts: u32::MAX, within: Duration::ZERO };
        let mut restarts = Restarts::new(generous);
        let mut now = some_instant();
        let mut end = |ran_for| {
            let delay = restarts.on_end(now, ran_for).unwrap();
            now += delay + ran_for;
            delay
        };
        let brief = STABLE - ms(1);
        let row: Vec<_> = (0..9).map(|_| end(brief).as_millis()).collect();
        assert_eq!(row, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(end(STABLE), FIRST_DELAY);
        assert_eq!(end(brief), ms(500));
    }

    #[test]
    fn delays_stay_at_thirty_seconds_for_ever() {
        assert_eq!(delay_of(31), LONGEST_DELAY);
        assert_eq!(delay_of(32), LONGEST_DELAY);
        assert_eq!(delay_of(u32::MAX), LONGEST_DELAY);
    }

    #[test]
    fn no_restarts_allowed_means_the_first_end_is_final() {
        let intensity = Intensity { restarts: 0, within: ms(1) };
        assert_eq!(Restarts::new(intensity).on_end(some_instant(), STABLE), None);
    }

    #[test]
    fn a_restart_beyond_all_time_is_none() {
        let mut last = some_instant();
        for bit in (0..64).rev() {
            last = last.checked_add(Duration::from_secs(1 << bit)).unwrap_or(last);
        }
        let mut restarts = Restarts::new(Intensity { restarts: 9, within: ms(1) });
        let delays: Vec<_> = std::iter::from_fn(|| restarts.on_end(last, AT_ONCE)).collect();
        assert!(delays.len() < 3, "{delays:?} do not add up to more than a second");
    }

    #[test]
    fn what_is_allowed_is_told() {
        let restarts = Restarts::new(Intensity { restarts: 2, within: ms(1500) });
        assert_eq!(restarts.intensity().to_string(), "2 times in 1.5s");
    }

    #[test]
    fn a_restart_counts_to_the_last_instant_of_its_time() {
        let intensity = Intensity { restarts: 1, within: ms(5000) };
        let start = some_instant();
        let mut restarts = Restarts::new(intensity);
        assert_eq!(restarts.on_end(start, AT_ONCE), Some(ms(250)));
        // Restarts at 250 ms, then at 5,250 ms: five seconds apart.
        assert_eq!(restarts.clone().on_end(start + ms(4750), AT_ONCE), None);
        assert_eq!(restarts.on_end(start + ms(4751), AT_ONCE), Some(ms(500)));
    }

    proptest! {
        #[test]
        fn never_more_restarts_within_the_time_than_allowed(
            runs in prop::collection::vec(0u64..12_000, 1..80),
            allowed in 0u32..6,
            within in 0u64..20_000,
        ) {
            let intensity = Intensity { restarts: allowed, within: ms(within) };
            let mut restarts = Restarts::new(intensity);
            let mut now = some_instant();
            let mut all: Vec<Instant> = Vec::new();
            for run in runs {
                now += ms(run);
                let Some(delay) = restarts.on_end(now, ms(run)) else { break };
                now += delay;
                all.push(now);
                let recent = all.iter().filter(|at| now - **at <= intensity.within).count();
                prop_assert!(recent <= allowed as usize);
                prop_assert!(restarts.times.len() <= allowed as usize);
            }
        }
    }
}
