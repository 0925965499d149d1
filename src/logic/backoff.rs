//! How long a connection waits before it tries again.

use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind};

/// The delay before the first retry of the default strategy.
const DEFAULT_BASE: Duration = Duration::from_millis(500);
/// The longest delay of the default strategy.
const DEFAULT_MAX: Duration = Duration::from_secs(30);
/// No delay is longer, whoever asks for it.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// Jitter of the linear strategy, as a fraction of the delay.
const LINEAR_JITTER: f64 = 0.2;
/// Jitter on top of what a server asked for, as a fraction of the delay.
const ASKED_JITTER: f64 = 0.1;
/// Close code "service restart" (IANA registry of close codes): clients
/// should come back after a random 5 to 30 seconds.
const SERVICE_RESTART: u16 = 1012;
/// Close code "try again later" (IANA registry of close codes).
const TRY_AGAIN_LATER: u16 = 1013;
/// The shortest delay after either of these codes.
const AFTER_CLOSE: Duration = Duration::from_secs(5);
/// What is added at random after a service restart: 5 s up to 30 s in all.
const RESTART_SPREAD: Duration = Duration::from_secs(25);

/// A delay made by the user's own function.
type Custom = Arc<dyn Fn(&Retry<'_>) -> Duration + Send + Sync>;

/// How long a connection waits before it tries again.
///
/// Defaults to exponential with equal jitter, 500 ms doubling to 30 s. Whatever
/// the strategy, a server that asks for time gets it: `Retry-After` on an HTTP
/// answer, and close codes 1012 (a random 5-30 s) and 1013 (at least 5 s). No
/// delay is longer than 24 hours.
///
/// ```
/// use broadsock::{Backoff, Jitter};
/// use std::time::Duration;
///
/// let patient = Backoff::exponential(Duration::from_secs(1), Duration::from_secs(60))
///     .with_jitter(Jitter::Full);
/// let own = Backoff::custom(|retry| Duration::from_secs(u64::from(retry.attempt)));
/// # let _ = (patient, own);
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub enum Backoff {
    /// `base` before the first retry, doubled before each next one up to `max`.
    Exponential {
        /// The delay before the first retry; more than zero.
        base: Duration,
        /// The longest delay; at least `base`.
        max: Duration,
        /// How chance spreads the delay.
        jitter: Jitter,
    },
    /// `step * min(factor, attempt)`, plus up to 20 % at random.
    Linear {
        /// What each attempt adds to the delay; more than zero.
        step: Duration,
        /// The attempt from which the delay no longer grows; more than zero.
        factor: u32,
    },
    /// Always the same delay. Zero is allowed, for tests and benchmarks against
    /// a server of one's own: anywhere else it is a hot loop.
    Constant(Duration),
    /// Whatever the function says, up to 24 hours. If it panics, the default
    /// strategy decides.
    Custom(Arc<dyn Fn(&Retry<'_>) -> Duration + Send + Sync>),
}

/// How chance spreads an exponential delay, so that clients that were dropped
/// together do not come back together.
///
/// The names are those of "Exponential Backoff And Jitter" (AWS Architecture
/// Blog, 2015).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Jitter {
    /// Half of the delay, plus up to the other half: never a hot loop. The
    /// default.
    #[default]
    Equal,
    /// Anything from zero to the delay: the widest spread.
    Full,
    /// The delay itself.
    None,
}

/// What is known when a delay is chosen.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Retry<'a> {
    /// Which retry this is: 1 for the first. It starts over only after a
    /// connection proved to be stable.
    pub attempt: u32,
    /// Why the attempt failed or the connection was lost.
    pub error: &'a Error,
    /// How long the connection had been up; zero if it never was.
    pub uptime: Duration,
}

impl Backoff {
    /// Exponential with equal jitter: `base` doubling to `max`.
    #[must_use]
    pub fn exponential(base: Duration, max: Duration) -> Self {
        Self::Exponential { base, max, jitter: Jitter::Equal }
    }

    /// Changes the jitter of an exponential strategy; the others keep theirs.
    #[must_use]
    pub fn with_jitter(mut self, new: Jitter) -> Self {
        if let Self::Exponential { jitter, .. } = &mut self {
            *jitter = new;
        }
        self
    }

    /// Linear: `step * min(factor, attempt)`, plus up to 20 %.
    #[must_use]
    pub fn linear(step: Duration, factor: u32) -> Self {
        Self::Linear { step, factor }
    }

    /// Always `delay`.
    #[must_use]
    pub fn constant(delay: Duration) -> Self {
        Self::Constant(delay)
    }

    /// Whatever `delay` returns. It runs on the connection's thread: it should
    /// not block.
    #[must_use]
    pub fn custom(delay: impl Fn(&Retry<'_>) -> Duration + Send + Sync + 'static) -> Self {
        Self::Custom(Arc::new(delay))
    }

    /// Refuses a strategy that would be a hot loop by mistake or contradicts itself.
    /// `setting` is the one that it came with.
    pub(crate) fn check(&self, setting: &'static str) -> Result<(), Error> {
        let refuse = |why: &str| Err(Error::setting(setting, why));
        match self {
            Self::Exponential { base, .. } if base.is_zero() => {
                refuse("base must be more than zero")
            }
            Self::Exponential { base, max, .. } if base > max => {
                refuse("base must not be more than max")
            }
            Self::Linear { step, .. } if step.is_zero() => refuse("step must be more than zero"),
            Self::Linear { factor: 0, .. } => refuse("factor must be more than zero"),
            _ => Ok(()),
        }
    }

    /// The delay by this strategy alone, for a random number in `[0, 1)`.
    fn delay(&self, retry: &Retry<'_>, random: f64) -> Duration {
        match self {
            Self::Exponential { base, max, jitter } => {
                jitter.spread(doubled(*base, *max, retry.attempt), random)
            }
            Self::Linear { step, factor } => {
                let whole = step.saturating_mul(retry.attempt.clamp(1, (*factor).max(1)));
                whole.saturating_add(part(whole, LINEAR_JITTER * random))
            }
            Self::Constant(delay) => *delay,
            Self::Custom(custom) => user_delay(custom, retry, random),
        }
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::exponential(DEFAULT_BASE, DEFAULT_MAX)
    }
}

impl fmt::Debug for Backoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exponential { base, max, jitter } => f
                .debug_struct("Exponential")
                .field("base", base)
                .field("max", max)
                .field("jitter", jitter)
                .finish(),
            Self::Linear { step, factor } => {
                f.debug_struct("Linear").field("step", step).field("factor", factor).finish()
            }
            Self::Constant(delay) => f.debug_tuple("Constant").field(delay).finish(),
            Self::Custom(_) => f.debug_tuple("Custom").finish_non_exhaustive(),
        }
    }
}

impl Jitter {
    /// Spreads `whole` by a random number in `[0, 1)`.
    fn spread(self, whole: Duration, random: f64) -> Duration {
        let half = whole / 2;
        match self {
            Self::Equal => half + part(whole - half, random),
            Self::Full => part(whole, random),
            Self::None => whole,
        }
    }
}

/// How long to wait before this retry, for a random number in `[0, 1)`.
///
/// The strategy's delay, or what the server asked for if that is longer.
/// `Retry-After` counts up to `retry_after_max`, and up to 10 % are added, for
/// all its clients were told the same.
pub(crate) fn retry_delay(
    backoff: &Backoff,
    retry: &Retry<'_>,
    retry_after_max: Duration,
    random: f64,
) -> Duration {
    // A number outside would at worst make `Duration` arithmetic panic.
    let random = if (0.0..1.0).contains(&random) { random } else { 0.0 };
    let asked = asked_delay(retry.error.kind(), retry_after_max, random);
    backoff.delay(retry, random).max(asked).min(LONGEST)
}

/// What the server asked for; zero if nothing.
fn asked_delay(kind: &ErrorKind, retry_after_max: Duration, random: f64) -> Duration {
    match kind {
        ErrorKind::Http { retry_after: Some(asked), .. } => {
            at_least((*asked).min(retry_after_max), random)
        }
        ErrorKind::Closed { code: SERVICE_RESTART } => AFTER_CLOSE + part(RESTART_SPREAD, random),
        ErrorKind::Closed { code: TRY_AGAIN_LATER } => at_least(AFTER_CLOSE, random),
        _ => Duration::ZERO,
    }
}

/// `asked` and up to 10 % more: never earlier than asked.
fn at_least(asked: Duration, random: f64) -> Duration {
    asked.saturating_add(part(asked, ASKED_JITTER * random))
}

/// The user's delay, or the default strategy's if the user's function panics.
impl Backoff {
    /// The same, but a panic of a user's function is told to `report` before the
    /// default takes its place.
    pub(crate) fn reporting(self, report: impl Fn(&str) + Send + Sync + 'static) -> Self {
        let Self::Custom(custom) = self else { return self };
        Self::custom(move |retry| {
            panic::catch_unwind(AssertUnwindSafe(|| custom(retry))).unwrap_or_else(|payload| {
                let text = payload.downcast_ref::<&str>().copied();
                let owned = payload.downcast_ref::<String>().map(String::as_str);
                report(text.or(owned).unwrap_or("a panic without a message"));
                panic::resume_unwind(payload)
            })
        })
    }
}

fn user_delay(custom: &Custom, retry: &Retry<'_>, random: f64) -> Duration {
    panic::catch_unwind(AssertUnwindSafe(|| custom(retry)))
        .unwrap_or_else(|_| Backoff::default().delay(retry, random))
}

/// `base * 2^(attempt - 1)`, at most `max`, for any attempt.
fn doubled(base: Duration, max: Duration, attempt: u32) -> Duration {
    // 2^94 nanoseconds hold every Duration: a larger exponent changes nothing.
    let exponent = attempt.saturating_sub(1).min(94);
    let nanos = base.as_nanos().saturating_mul(1 << exponent);
    if nanos >= max.as_nanos() { max } else { from_nanos(nanos) }
}

/// The duration of so many nanoseconds, saturating.
fn from_nanos(nanos: u128) -> Duration {
    const SECOND: u128 = 1_000_000_000;
    match u64::try_from(nanos / SECOND) {
        Ok(secs) => Duration::new(secs, (nanos % SECOND) as u32),
        Err(_) => Duration::MAX,
    }
}

/// A fraction in `[0, 1]` of a duration.
fn part(whole: Duration, fraction: f64) -> Duration {
    // The product may round up past the largest Duration, and then is that.
    Duration::try_from_secs_f64(whole.as_secs_f64() * fraction).map_or(whole, |d| d.min(whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Just below one: the largest chance.
    const MOST: f64 = 1.0 - f64::EPSILON;
    const HOUR: Duration = Duration::from_secs(3600);

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// The delay after `kind`, with `Retry-After` capped at an hour.
    fn after(kind: ErrorKind, backoff: &Backoff, attempt: u32, random: f64) -> Duration {
        let error = Error::new(kind, "test");
        let retry = Retry { attempt, error: &error, uptime: Duration::ZERO };
        retry_delay(backoff, &retry, HOUR, random)
    }

    fn plain(backoff: &Backoff, attempt: u32, random: f64) -> Duration {
        after(ErrorKind::Connect, backoff, attempt, random)
    }

    fn http(status: u16, retry_after: Option<Duration>) -> ErrorKind {
        ErrorKind::Http { status, retry_after }
    }

    /// Equal but for the rounding of the chance.
    fn close(a: Duration, b: Duration) -> bool {
        a.abs_diff(b) < Duration::from_micros(1)
    }

    #[test]
    fn the_default_doubles_from_half_a_second_to_thirty() {
        let whole = Backoff::default().with_jitter(Jitter::None);
        let delays: Vec<_> = (1..=8).map(|n| plain(&whole, n, 0.5).as_millis()).collect();
        assert_eq!(delays, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert!(matches!(Backoff::default(), Backoff::Exponential { jitter: Jitter::Equal, .. }));
    }

    #[test]
    fn equal_jitter_spreads_over_the_upper_half() {
        let backoff = Backoff::exponential(secs(2), secs(60));
        assert_eq!(plain(&backoff, 1, 0.0), secs(1));
        assert_eq!(plain(&backoff, 1, 0.5), ms(1500));
        assert!(close(plain(&backoff, 1, MOST), secs(2)));
        assert_eq!(plain(&backoff, 100, 0.0), secs(30), "clients spread at the cap too");
    }

    #[test]
    fn full_jitter_spreads_over_the_whole_delay() {
        let backoff = Backoff::exponential(secs(2), secs(60)).with_jitter(Jitter::Full);
        assert_eq!(plain(&backoff, 2, 0.0), Duration::ZERO);
        assert_eq!(plain(&backoff, 2, 0.25), secs(1));
        assert!(close(plain(&backoff, 2, MOST), secs(4)));
    }

    #[test]
    fn any_attempt_can_be_computed() {
        let backoff = Backoff::default().with_jitter(Jitter::None);
        for attempt in [32, 33, 64, 65, 128, 1_000_000, u32::MAX] {
            assert_eq!(plain(&backoff, attempt, 0.0), secs(30), "attempt {attempt}");
        }
        assert_eq!(plain(&backoff, 0, 0.0), ms(500));
        let tiny = Backoff::exponential(Duration::from_nanos(1), secs(8)).with_jitter(Jitter::None);
        assert_eq!(plain(&tiny, 33, 0.0), Duration::from_nanos(1 << 32));
        assert_eq!(plain(&tiny, 1_000_000, 0.0), secs(8));
    }

    #[test]
    fn extreme_durations_saturate() {
        assert_eq!(doubled(Duration::MAX, Duration::MAX, u32::MAX), Duration::MAX);
        assert_eq!(doubled(Duration::from_nanos(1), Duration::MAX, u32::MAX), Duration::MAX);
        assert_eq!(from_nanos(u128::MAX), Duration::MAX);
        assert_eq!(from_nanos(1_500_000_000), ms(1500));
        assert_eq!(part(Duration::MAX, 1.0), Duration::MAX);
        for backoff in [
            Backoff::exponential(Duration::MAX, Duration::MAX),
            Backoff::linear(Duration::MAX, u32::MAX),
            Backoff::constant(Duration::MAX),
        ] {
            assert_eq!(plain(&backoff, u32::MAX, MOST), LONGEST, "{backoff:?}");
        }
    }

    #[test]
    fn linear_grows_by_a_step_up_to_the_factor() {
        let backoff = Backoff::linear(secs(2), 10);
        let delays: Vec<_> = [0, 1, 2, 9, 10, 11, 1_000_000]
            .into_iter()
            .map(|attempt| plain(&backoff, attempt, 0.0).as_secs())
            .collect();
        assert_eq!(delays, [2, 2, 4, 18, 20, 20, 20]);
        assert!(close(plain(&backoff, 10, MOST), secs(24)), "a fifth more at most");
        assert_eq!(plain(&Backoff::linear(secs(2), 0), 7, 0.0), secs(2), "unchecked, still safe");
    }

    #[test]
    fn constant_stays_the_same() {
        for attempt in [1, 2, 1000] {
            assert_eq!(plain(&Backoff::constant(secs(3)), attempt, 0.7), secs(3));
        }
    }

    #[test]
    fn a_custom_strategy_sees_attempt_error_and_uptime() {
        let backoff = Backoff::custom(|retry| match retry.error.kind() {
            ErrorKind::Dns => retry.uptime * retry.attempt,
            _ => Duration::MAX,
        });
        let error = Error::new(ErrorKind::Dns, "test");
        let retry = Retry { attempt: 3, error: &error, uptime: secs(4) };
        assert_eq!(retry_delay(&backoff, &retry, HOUR, 0.5), secs(12));
        assert_eq!(plain(&backoff, 1, 0.5), LONGEST, "a day at most");
    }

    #[test]
    fn a_custom_strategy_that_panics_is_replaced_by_the_default() {
        let backoff = Backoff::custom(|_| std::panic::resume_unwind(Box::new("boom")));
        assert_eq!(plain(&backoff, 3, 0.5), plain(&Backoff::default(), 3, 0.5));
    }

    #[test]
    fn retry_after_is_honoured_and_capped() {
        let backoff = Backoff::constant(secs(1));
        for status in [429, 503] {
            let asked = http(status, Some(secs(100)));
            assert_eq!(after(asked.clone(), &backoff, 1, 0.0), secs(100));
            assert!(close(after(asked, &backoff, 1, MOST), secs(110)), "a tenth more at most");
        }
        let absurd = http(429, Some(Duration::MAX));
        assert_eq!(after(absurd, &backoff, 1, 0.0), HOUR);
        assert_eq!(after(http(503, None), &backoff, 1, 0.0), secs(1));
        let error = Error::new(http(503, Some(Duration::MAX)), "test");
        let retry = Retry { attempt: 1, error: &error, uptime: Duration::ZERO };
        assert_eq!(retry_delay(&backoff, &retry, Duration::MAX, MOST), LONGEST);
        assert_eq!(LONGEST, 24 * HOUR);
    }

    #[test]
    fn strategies_without_a_function_have_no_panic_to_report() {
        for backoff in [Backoff::default(), Backoff::linear(secs(2), 10)] {
            let kept = backoff.clone().reporting(|panic| panic!("{panic}"));
            assert_eq!(format!("{kept:?}"), format!("{backoff:?}"));
        }
    }

    #[test]
    fn retry_after_never_shortens_the_delay() {
        let backoff = Backoff::constant(secs(9));
        assert_eq!(after(http(429, Some(secs(2))), &backoff, 1, 0.5), secs(9));
    }

    #[test]
    fn a_restarting_server_is_left_alone_for_five_to_thirty_seconds() {
        let restart = || ErrorKind::Closed { code: 1012 };
        let backoff = Backoff::constant(Duration::ZERO);
        assert_eq!(after(restart(), &backoff, 1, 0.0), secs(5));
        assert_eq!(after(restart(), &backoff, 1, 0.5), ms(17_500));
        assert!(close(after(restart(), &backoff, 1, MOST), secs(30)));
        assert_eq!(after(restart(), &Backoff::constant(secs(60)), 1, 0.5), secs(60));
    }

    #[test]
    fn a_server_that_says_later_is_left_alone_for_five_seconds_at_least() {
        let later = || ErrorKind::Closed { code: 1013 };
        let backoff = Backoff::constant(Duration::ZERO);
        assert_eq!(after(later(), &backoff, 1, 0.0), secs(5));
        assert!(close(after(later(), &backoff, 1, MOST), ms(5500)));
        assert_eq!(after(later(), &Backoff::constant(secs(60)), 1, 0.5), secs(60));
        let other = ErrorKind::Closed { code: 1011 };
        assert_eq!(after(other, &backoff, 1, 0.5), Duration::ZERO);
    }

    #[test]
    fn a_chance_outside_its_range_counts_as_none() {
        for random in [f64::NAN, f64::INFINITY, -1.0, 1.0, 2.0] {
            assert_eq!(plain(&Backoff::default(), 1, random), ms(250), "{random}");
        }
    }

    #[test]
    fn contradictory_settings_are_refused_and_named() {
        let zero = Duration::ZERO;
        for (backoff, word) in [
            (Backoff::exponential(zero, secs(1)), "base"),
            (Backoff::exponential(secs(2), secs(1)), "max"),
            (Backoff::linear(zero, 1), "step"),
            (Backoff::linear(secs(1), 0), "factor"),
        ] {
            let error = backoff.check("backoff").unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting("backoff"));
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn usable_settings_pass() {
        for backoff in [
            Backoff::default(),
            Backoff::exponential(secs(1), secs(1)),
            Backoff::linear(secs(2), 10),
            Backoff::constant(Duration::ZERO),
            Backoff::custom(|_| Duration::ZERO),
        ] {
            assert!(backoff.check("backoff").is_ok(), "{backoff:?}");
        }
    }

    #[test]
    fn jitter_is_changed_where_there_is_one() {
        let full = Backoff::default().with_jitter(Jitter::Full);
        assert_eq!(format!("{full:?}"), "Exponential { base: 500ms, max: 30s, jitter: Full }");
        let linear = Backoff::linear(secs(2), 10).with_jitter(Jitter::Full);
        assert_eq!(format!("{linear:?}"), "Linear { step: 2s, factor: 10 }");
        let constant = Backoff::constant(secs(1)).with_jitter(Jitter::Full);
        assert_eq!(format!("{constant:?}"), "Constant(1s)");
        let custom = Backoff::custom(|_| secs(1)).with_jitter(Jitter::Full);
        assert_eq!(format!("{custom:?}"), "Custom(..)");
    }

    proptest! {
        #[test]
        fn exponential_delays_stay_between_half_and_max(
            base in 1u64..10_000, more in 0u64..100_000, attempt: u32, random in 0.0..1.0f64,
        ) {
            let (base, max) = (ms(base), ms(base + more));
            let backoff = Backoff::exponential(base, max);
            prop_assert!(backoff.check("backoff").is_ok());
            let delay = plain(&backoff, attempt, random);
            prop_assert!(delay >= base / 2 && delay <= max, "{:?}", delay);
            let full = plain(&backoff.with_jitter(Jitter::Full), attempt, random);
            prop_assert!(full <= max, "{:?}", full);
        }

        #[test]
        fn delays_never_shrink_from_attempt_to_attempt(
            base in 1u64..10_000, more in 0u64..100_000, attempt in 0u32..200, random in 0.0..1.0f64,
        ) {
            let exponential = Backoff::exponential(ms(base), ms(base + more));
            for backoff in [exponential, Backoff::linear(ms(base), 10)] {
                let (this, next) = (
                    plain(&backoff, attempt, random),
                    plain(&backoff, attempt + 1, random),
                );
                prop_assert!(this <= next, "{:?} then {:?}", this, next);
            }
        }

        #[test]
        fn never_earlier_than_the_server_asked(
            asked in 0u64..10_000_000, attempt: u32, random in 0.0..1.0f64,
        ) {
            let asked = ms(asked);
            let delay = after(http(503, Some(asked)), &Backoff::default(), attempt, random);
            prop_assert!(delay >= asked.min(HOUR), "{:?}", delay);
        }
    }

    #[test]
    fn a_panic_of_the_users_function_is_told_and_the_default_takes_its_place() {
        let told = Arc::new(std::sync::Mutex::new(Vec::new()));
        let heard = Arc::clone(&told);
        let backoff = Backoff::custom(|_| panic!("no idea"))
            .reporting(move |panic| heard.lock().unwrap().push(panic.to_owned()));
        let error = Error::new(ErrorKind::Dns, "x");
        let retry = Retry { attempt: 1, error: &error, uptime: Duration::ZERO };
        let delay = retry_delay(&backoff, &retry, Duration::ZERO, 0.0);
        assert_eq!(delay, Backoff::default().delay(&retry, 0.0));
        assert_eq!(*told.lock().unwrap(), ["no idea"]);
    }
}
