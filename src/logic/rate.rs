//! How many messages may pass by now: a limit that is never exceeded.
//!
//! Nothing in here is rounded twice. A token bucket counts in units of which
//! 2⁶⁴ times 10⁹ make a token: a rate of one an hour or more adds a whole
//! number of them each nanosecond, and a lower one loses less than 2⁻³⁰ tokens
//! in five centuries. So a bucket that does not run over never drifts, and what
//! rounding there is only ever grants later.

use std::time::{Duration, Instant};

use crate::error::Error;

/// How many messages may pass in a time.
///
/// A limit is never exceeded, not even for a moment: whatever else happens,
/// a message waits until there is room for it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RateLimit {
    /// Passes steadily: in any time of `d` seconds at most
    /// `burst + per_second * d` messages.
    TokenBucket {
        /// Messages per second in the long run; fractions are fine: `0.1` is
        /// one in ten seconds.
        per_second: f64,
        /// Messages that may pass at once after a quiet time, and at the start.
        /// Also what makes up for threads that wake late: with 1, no rate is
        /// reached that is not asked for to the nanosecond; a tenth of a
        /// second's worth is plenty.
        burst: u32,
    },
    /// Passes at most `allowed` messages in each interval; intervals follow on
    /// one another from the start. Broadway's `rate_limiting`, with its
    /// `allowed_messages` and `interval`.
    ///
    /// The end of one interval and the start of the next together may pass
    /// twice as many at once; a token bucket does not.
    FixedWindow {
        /// Messages in each interval.
        allowed: u32,
        /// The length of an interval.
        interval: Duration,
    },
}

impl RateLimit {
    /// `per_second` messages per second, up to `burst` of them at once.
    #[must_use]
    pub fn token_bucket(per_second: f64, burst: u32) -> Self {
        RateLimit::TokenBucket { per_second, burst }
    }

    /// `allowed` messages in each `interval`.
    #[must_use]
    pub fn fixed_window(allowed: u32, interval: Duration) -> Self {
        RateLimit::FixedWindow { allowed, interval }
    }

    /// Refuses a limit that is none or that nothing could ever pass.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match *self {
            RateLimit::TokenBucket { per_second, .. }
                if !per_second.is_finite() || per_second <= 0.0 =>
            {
                refuse(format_args!("{per_second} per second is no positive, finite rate"))
            }
            RateLimit::TokenBucket { burst: 0, .. } => refuse("a burst of 0 lets nothing pass"),
            RateLimit::FixedWindow { allowed: 0, .. } => refuse("0 allowed lets nothing pass"),
            RateLimit::FixedWindow { interval: Duration::ZERO, .. } => {
                refuse("an interval of no time is no limit")
            }
            RateLimit::TokenBucket { .. } | RateLimit::FixedWindow { .. } => Ok(()),
        }
    }
}

fn refuse(why: impl std::fmt::Display) -> Result<(), Error> {
    Err(Error::setting("rate_limit", why))
}

/// What has passed so far, and so what may pass by now.
///
/// A clock that stands still or steps back grants nothing, and takes nothing
/// away. Limits that [`RateLimit::check`] refuses do no harm: zeros count as
/// the smallest number, and a rate that is none never grants beyond its burst.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limiter {
    limit: RateLimit,
    state: State,
}

/// The count behind each kind of limit.
#[derive(Debug, Clone, Copy)]
enum State {
    Bucket(Bucket),
    Window(Window),
}

impl Limiter {
    /// Nothing has passed: the bucket is full, the first window starts `now`.
    pub(crate) fn new(limit: RateLimit, now: Instant) -> Self {
        let state = match limit {
            RateLimit::TokenBucket { per_second, burst } => {
                State::Bucket(Bucket::full(per_second, burst, now))
            }
            RateLimit::FixedWindow { allowed, interval } => {
                State::Window(Window::first(allowed, interval, now))
            }
        };
        Self { limit, state }
    }

    /// Asks for `want` messages and says how many of them may pass now.
    pub(crate) fn take(&mut self, now: Instant, want: usize) -> usize {
        self.advance(now);
        let granted = self.left().min(u32::try_from(want).unwrap_or(u32::MAX));
        match &mut self.state {
            State::Bucket(bucket) => bucket.level -= u128::from(granted) * TOKEN,
            State::Window(window) => window.left -= granted,
        }
        granted as usize
    }

    /// When at least one more may pass; `None` if one may now.
    ///
    /// A time beyond what the clock can tell becomes a late one that it can:
    /// whoever wakes then asks again.
    pub(crate) fn next(&self, now: Instant) -> Option<Instant> {
        let mut then = *self;
        then.advance(now);
        if then.left() > 0 {
            return None;
        }
        Some(match then.state {
            State::Bucket(bucket) => later(bucket.at, bucket.missing()),
            State::Window(window) => later(now.max(window.start), window.remaining(now)),
        })
    }

    /// Puts another limit in force from `now` on.
    ///
    /// What may pass at this moment is carried over and capped, so a change as
    /// such lets nothing pass. A window of the same length goes on, and what
    /// passed in it counts; any other starts `now`.
    pub(crate) fn set(&mut self, limit: RateLimit, now: Instant) {
        self.advance(now);
        let mut new = Self::new(limit, now);
        match (&mut new.state, &self.state) {
            (State::Bucket(new), State::Bucket(old)) => new.follow(old),
            (State::Window(new), State::Window(old)) => new.follow(old),
            (State::Bucket(new), State::Window(old)) => {
                new.level = new.full.min(u128::from(old.left) * TOKEN);
            }
            (State::Window(new), State::Bucket(old)) => new.left = new.left.min(old.tokens()),
        }
        *self = new;
    }

    /// The limit in force.
    pub(crate) fn limit(&self) -> RateLimit {
        self.limit
    }

    /// Brings the count up to `now`.
    fn advance(&mut self, now: Instant) {
        match &mut self.state {
            State::Bucket(bucket) => bucket.advance(now),
            State::Window(window) => window.advance(now),
        }
    }

    /// What may pass at the moment of the last advance.
    fn left(&self) -> u32 {
        match &self.state {
            State::Bucket(bucket) => bucket.tokens(),
            State::Window(window) => window.left,
        }
    }
}

/// What one nanosecond at one message per second adds to a bucket: 2⁶⁴, so that
/// fractional rates are whole numbers too.
const PER_SECOND: f64 = 18_446_744_073_709_551_616.0;
/// One message in the same unit. The largest bucket holds 2³² of them: 2¹²⁶.
const TOKEN: u128 = NANOS << 64;
/// Nanoseconds in a second.
const NANOS: u128 = 1_000_000_000;

/// Tokens that flow in at a constant rate until the bucket is full.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Flows in each nanosecond; rounded down.
    rate: u128,
    /// The most that it holds.
    full: u128,
    /// What it holds.
    level: u128,
    /// When it held that; never goes back.
    at: Instant,
}

impl Bucket {
    fn full(per_second: f64, burst: u32, now: Instant) -> Self {
        // The cast saturates and takes NaN for zero. At the upper end a bucket
        // of any size is full again after a nanosecond either way.
        let rate = (per_second * PER_SECOND) as u128;
        let full = u128::from(burst.max(1)) * TOKEN;
        Self { rate, full, level: full, at: now }
    }

    /// Takes over what the bucket before it holds, fractions included.
    fn follow(&mut self, old: &Self) {
        self.level = old.level.min(self.full);
        self.at = old.at;
    }

    fn advance(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_nanos();
        let inflow = self.rate.saturating_mul(elapsed);
        self.level = self.level.saturating_add(inflow).min(self.full);
        self.at = self.at.max(now);
    }

    /// Whole tokens: never more than the burst, which is a `u32`.
    fn tokens(&self) -> u32 {
        u32::try_from(self.level / TOKEN).unwrap_or(u32::MAX)
    }

    /// How long until there is a whole token.
    fn missing(&self) -> Duration {
        let missing = TOKEN.saturating_sub(self.level);
        if self.rate == 0 { Duration::MAX } else { duration(missing.div_ceil(self.rate)) }
    }
}

/// The window that runs now.
#[derive(Debug, Clone, Copy)]
struct Window {
    /// May pass in each window.
    allowed: u32,
    /// The length of each.
    interval: Duration,
    /// When this one started: a whole number of intervals after the first.
    start: Instant,
    /// May still pass in it.
    left: u32,
}

impl Window {
    fn first(allowed: u32, interval: Duration, now: Instant) -> Self {
        let allowed = allowed.max(1);
        let interval = interval.max(Duration::from_nanos(1));
        Self { allowed, interval, start: now, left: allowed }
    }

    /// Takes over what may still pass. One of the same length also goes on, or
    /// changes in quick succession would put its end off for ever.
    fn follow(&mut self, old: &Self) {
        if self.interval == old.interval {
            self.start = old.start;
            self.left = self.allowed.saturating_sub(old.allowed - old.left);
        }
        self.left = self.left.min(old.left);
    }

    fn advance(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.start);
        if elapsed < self.interval {
            return;
        }
        let into = duration(elapsed.as_nanos() % self.interval.as_nanos());
        self.start = now.checked_sub(into).unwrap_or(now);
        self.left = self.allowed;
    }

    /// How long this window still runs.
    fn remaining(&self, now: Instant) -> Duration {
        self.interval.saturating_sub(now.saturating_duration_since(self.start))
    }
}

/// So many nanoseconds, as far as a `Duration` reaches.
fn duration(nanos: u128) -> Duration {
    let part = (nanos % NANOS) as u32;
    u64::try_from(nanos / NANOS).map_or(Duration::MAX, |seconds| Duration::new(seconds, part))
}

/// The instant after `wait`, or a late one that the clock can tell.
fn later(from: Instant, mut wait: Duration) -> Instant {
    loop {
        if let Some(at) = from.checked_add(wait) {
            return at;
        }
        wait /= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::logic::some_instant;
    use proptest::prelude::*;

    const NANO: Duration = Duration::from_nanos(1);
    const HOUR: Duration = Duration::from_secs(3600);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn bucket(per_second: f64, burst: u32) -> RateLimit {
        RateLimit::token_bucket(per_second, burst)
    }

    fn window(allowed: u32, interval: Duration) -> RateLimit {
        RateLimit::fixed_window(allowed, interval)
    }

    /// What could pass at `now`, without letting it.
    fn room(limiter: &Limiter, now: Instant) -> usize {
        let mut copy = *limiter;
        copy.take(now, usize::MAX)
    }

    #[test]
    fn limits_that_limit_nothing_or_everything_are_refused() {
        for good in [bucket(1e-9, 1), bucket(1e300, u32::MAX), window(1, NANO), window(9, HOUR)] {
            assert!(good.check().is_ok(), "{good:?}");
        }
        let table = [
            (bucket(0.0, 1), "per second"),
            (bucket(-0.0, 1), "per second"),
            (bucket(-1.0, 1), "per second"),
            (bucket(f64::NAN, 1), "NaN per second"),
            (bucket(f64::INFINITY, 1), "inf per second"),
            (bucket(f64::NEG_INFINITY, 0), "-inf per second"),
            (bucket(1.0, 0), "burst of 0"),
            (window(0, HOUR), "0 allowed"),
            (window(1, Duration::ZERO), "interval"),
        ];
        for (bad, word) in table {
            let error = bad.check().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting("rate_limit"));
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_bucket_grants_its_burst_and_then_its_rate() {
        let start = some_instant();
        let mut limiter = Limiter::new(bucket(10.0, 3), start);
        // After so many milliseconds, wanted, granted, the next after.
        let table = [
            (0, 0, 0, None),
            (0, 2, 2, None),
            (0, 2, 1, Some(100)),
            (99, 1, 0, Some(100)),
            (100, 5, 1, Some(200)),
            (250, 5, 1, Some(300)),
            (300, 5, 1, Some(400)),
            (90_000, 5, 3, Some(90_100)),
            // A step back neither gives nor takes.
            (5, 5, 0, Some(90_100)),
            (90_100, 5, 1, Some(90_200)),
        ];
        for (at, want, granted, next) in table {
            let now = start + ms(at);
            assert_eq!(limiter.take(now, want), granted, "at {at}");
            assert_eq!(limiter.next(now), next.map(|next| start + ms(next)), "at {at}");
        }
    }

    #[test]
    fn windows_follow_on_one_another_from_the_start() {
        let start = some_instant();
        let mut limiter = Limiter::new(window(3, ms(100)), start);
        let table = [
            (0, 2, 2, None),
            (40, 2, 1, Some(100)),
            (99, 1, 0, Some(100)),
            (100, 9, 3, Some(200)),
            // Five windows on, in the middle of one.
            (650, 9, 3, Some(700)),
            (10, 9, 0, Some(700)),
            (699, 9, 0, Some(700)),
            (700, 1, 1, None),
        ];
        for (at, want, granted, next) in table {
            let now = start + ms(at);
            assert_eq!(limiter.take(now, want), granted, "at {at}");
            assert_eq!(limiter.next(now), next.map(|next| start + ms(next)), "at {at}");
        }
    }

    #[test]
    fn one_in_an_hour_comes_by_the_hour() {
        let start = some_instant();
        let mut limiter = Limiter::new(bucket(1.0 / 3600.0, 1), start);
        assert_eq!(limiter.take(start, 2), 1);
        let next = limiter.next(start).unwrap();
        assert!(next >= start + HOUR && next <= start + HOUR + NANO, "{:?}", next - start);
        assert_eq!(limiter.take(next - NANO, 1), 0);
        assert_eq!(limiter.take(next, 2), 1);
    }

    #[test]
    fn a_change_carries_over_what_may_pass_and_caps_it() {
        let (big, small) = (bucket(10.0, 8), bucket(10.0, 2));
        let (many, few) = (window(8, ms(100)), window(2, ms(100)));
        let other = window(6, ms(50));
        // From, taken before, to, may pass at once, and 100 ms later.
        let table = [
            (big, 0, small, 2, 2),
            (small, 0, big, 2, 3),
            (small, 2, big, 0, 1),
            (big, 3, bucket(100.0, 8), 5, 8),
            (many, 0, few, 2, 2),
            (many, 1, few, 1, 2),
            (many, 5, few, 0, 2),
            (few, 1, many, 1, 8),
            (few, 2, many, 0, 8),
            (many, 3, other, 5, 6),
            (many, 8, other, 0, 6),
            (big, 3, few, 2, 2),
            (big, 7, many, 1, 8),
            (many, 3, small, 2, 2),
            (many, 8, big, 0, 1),
            (big, 4, big, 4, 5),
            (few, 2, few, 0, 2),
        ];
        for (from, taken, to, at_once, later) in table {
            let start = some_instant();
            let mut limiter = Limiter::new(from, start);
            assert_eq!(limiter.take(start, taken), taken);
            limiter.set(to, start);
            assert_eq!(limiter.limit(), to);
            assert_eq!(room(&limiter, start), at_once, "{from:?} {taken} {to:?}");
            assert_eq!(room(&limiter, start + ms(100)), later, "{from:?} {taken} {to:?}");
        }
    }

    #[test]
    fn a_change_after_a_step_back_counts_no_time_twice() {
        let start = some_instant();
        let mut limiter = Limiter::new(bucket(10.0, 3), start);
        assert_eq!(limiter.take(start + ms(100), 3), 3);
        limiter.set(bucket(10.0, 9), start);
        assert_eq!(room(&limiter, start + ms(100)), 0);
        assert_eq!(room(&limiter, start + ms(200)), 1);
    }

    #[test]
    fn changes_in_quick_succession_hold_nothing_up() {
        let start = some_instant();
        for limit in [window(1, ms(1000)), bucket(1.0, 1)] {
            let mut limiter = Limiter::new(limit, start);
            let mut granted = 0;
            for tick in 0..=100 {
                let now = start + ms(tick * 100);
                limiter.set(limit, now);
                granted += limiter.take(now, 9);
            }
            assert_eq!(granted, 11, "{limit:?}");
        }
    }

    #[test]
    fn limits_beyond_all_reason_do_no_harm() {
        let start = some_instant();
        let rates =
            [0.0, -1.0, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE, 5e-324, 1e-300, f64::MAX];
        let buckets = rates.into_iter().flat_map(|rate| [bucket(rate, 0), bucket(rate, u32::MAX)]);
        let windows = [Duration::ZERO, NANO, HOUR, Duration::MAX]
            .into_iter()
            .flat_map(|interval| [window(0, interval), window(u32::MAX, interval)]);
        for limit in buckets.chain(windows) {
            let mut limiter = Limiter::new(limit, start);
            let mut now = start;
            for wait in [Duration::ZERO, NANO, HOUR, Duration::from_secs(1 << 40), NANO] {
                now = now.checked_add(wait).unwrap_or(now);
                assert!(limiter.take(now, usize::MAX) <= u32::MAX as usize);
                assert!(limiter.next(now).is_none_or(|next| next > now), "{limit:?}");
                limiter.set(limit, now);
            }
        }
    }

    #[test]
    fn a_time_beyond_the_clock_becomes_a_late_one() {
        let start = some_instant();
        let mut limiter = Limiter::new(window(1, Duration::MAX), start);
        assert_eq!(limiter.take(start, 2), 1);
        assert!(limiter.next(start).unwrap() > start + HOUR);
        let mut limiter = Limiter::new(bucket(1e-300, 1), start);
        assert_eq!(limiter.take(start, 2), 1);
        assert!(limiter.next(start).unwrap() > start + HOUR);
    }

    /// Takes all there is whenever there is some, `late` each time, and says
    /// how far that stays behind the rule at the most; never ahead of it.
    fn behind(per_second: f64, burst: u32, late: Duration) -> f64 {
        let start = some_instant();
        let mut limiter = Limiter::new(bucket(per_second, burst), start);
        let (mut now, mut granted, mut most) = (start, 0, 0.0);
        for _ in 0..20_000 {
            granted += limiter.take(now, usize::MAX);
            let due = f64::from(burst) + per_second * (now - start).as_secs_f64();
            // The reference is a float: exact to 2⁻⁵² of some billion tokens.
            assert!(granted as f64 <= due + 1e-5, "{granted} of {due}");
            most = f64::max(most, due - granted as f64);
            now = limiter.next(now).unwrap() + late;
        }
        most
    }

    #[test]
    fn a_long_run_at_full_demand_stays_within_one_of_the_rate() {
        for per_second in [1.0 / 3600.0, 0.1, 3.0, 7.77, 1000.0 / 3.0, 1e6, 123_456_789.0] {
            for burst in [3, 100] {
                let behind = behind(per_second, burst, Duration::ZERO);
                assert!(behind < 1.0 + 1e-5, "{per_second} {burst}: {behind}");
            }
        }
        // Asked late, and the burst holds what came meanwhile.
        assert!(behind(1000.0, 3, Duration::from_micros(999)) < 2.0);
    }

    #[test]
    fn a_burst_of_one_cannot_make_up_for_being_asked_late() {
        assert!(behind(4.0, 1, Duration::ZERO) < 1.0 + 1e-5, "whole nanoseconds apart");
        // 20,000 times a millisecond late at four per second.
        let behind = behind(4.0, 1, ms(1));
        assert!((79.0..81.0).contains(&behind), "{behind}");
    }

    #[test]
    fn a_hundred_years_at_an_odd_rate_lose_nothing() {
        let start = some_instant();
        let third = Limiter::new(bucket(1.0 / 3.0, u32::MAX), start);
        let mut limiter = third;
        assert_eq!(limiter.take(start, usize::MAX), u32::MAX as usize);
        // A century in steps of some hours or in one is the same.
        let (mut now, mut granted) = (start, 0);
        for _ in 0..200_000 {
            now += Duration::new(15_768, 7);
            granted += limiter.take(now, usize::MAX);
        }
        let mut at_once = third;
        at_once.take(start, usize::MAX);
        assert_eq!(granted, at_once.take(now, usize::MAX));
        let due = (now - start).as_secs_f64() / 3.0;
        assert!((due - granted as f64).abs() <= 1.0, "{granted} of {due}");
    }

    #[test]
    fn windows_at_full_demand_pass_all_that_they_allow() {
        let start = some_instant();
        let mut limiter = Limiter::new(window(7, Duration::from_nanos(333_333_333)), start);
        let (mut now, mut granted) = (start, 0);
        for _ in 0..10_000 {
            granted += limiter.take(now, 100);
            now = limiter.next(now).unwrap();
        }
        assert_eq!(granted, 70_000);
        assert_eq!(now - start, Duration::from_nanos(333_333_333) * 10_000);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Wait(Duration),
        Back(Duration),
        Take(usize),
        Next,
        Set(RateLimit),
    }

    fn limits() -> impl Strategy<Value = RateLimit> {
        let rates = prop_oneof![Just(1.0 / 3600.0), 0.01f64..20.0, 1.0f64..1e5, 1e-12f64..1e12];
        let interval = prop_oneof![1u64..100, 1_000_000u64..5_000_000_000, 1u64..u64::MAX];
        prop_oneof![
            (rates, prop_oneof![1u32..20, 1u32..u32::MAX])
                .prop_map(|(rate, burst)| bucket(rate, burst)),
            (prop_oneof![1u32..20, 1u32..u32::MAX], interval.prop_map(Duration::from_nanos))
                .prop_map(|(allowed, interval)| window(allowed, interval)),
        ]
    }

    fn waits() -> impl Strategy<Value = Duration> {
        prop_oneof![
            3 => Just(Duration::ZERO),
            3 => (0u64..200).prop_map(Duration::from_nanos),
            6 => (0u64..2_000_000_000).prop_map(Duration::from_nanos),
            1 => (0u64..1 << 35).prop_map(Duration::from_secs),
        ]
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let want = prop_oneof![0usize..5, Just(usize::MAX), 0usize..100_000];
        let op = prop_oneof![
            6 => waits().prop_map(Op::Wait),
            1 => waits().prop_map(Op::Back),
            8 => want.prop_map(Op::Take),
            3 => Just(Op::Next),
            1 => limits().prop_map(Op::Set),
        ];
        prop::collection::vec(op, 1..80)
    }

    /// Holds one limit's grants against its rule, written anew.
    fn obeys(limit: RateLimit, since: Instant, grants: &[(Instant, usize)]) -> bool {
        match limit {
            RateLimit::TokenBucket { per_second, burst } => (0..grants.len()).all(|first| {
                let mut sum = 0.0;
                grants[first..].iter().all(|(at, granted)| {
                    sum += *granted as f64;
                    let d = at.saturating_duration_since(grants[first].0).as_secs_f64();
                    sum <= (f64::from(burst) + per_second * d) * (1.0 + 1e-12) + 1e-9
                })
            }),
            RateLimit::FixedWindow { allowed, interval } => {
                let index = |at: Instant| (at - since).as_nanos() / interval.as_nanos();
                grants.chunk_by(|one, two| index(one.0) == index(two.0)).all(|window| {
                    window.iter().map(|(_, granted)| granted).sum::<usize>() <= allowed as usize
                })
            }
        }
    }

    /// The rule for windows that go on, as those of one length do: the wider.
    /// (That the narrower holds as well has a property of its own.)
    fn wider(old: RateLimit, new: RateLimit) -> Option<RateLimit> {
        match (old, new) {
            (
                RateLimit::FixedWindow { allowed: one, interval: old },
                RateLimit::FixedWindow { allowed: two, interval: new },
            ) if old == new => Some(window(one.max(two), new)),
            _ => None,
        }
    }

    /// A limiter under test, and what it granted under one rule.
    struct Run {
        limiter: Limiter,
        now: Instant,
        /// The latest time told: what a clock that stepped back counts as.
        latest: Instant,
        /// The rule that the grants must obey, and since when.
        rule: RateLimit,
        since: Instant,
        grants: Vec<(Instant, usize)>,
    }

    impl Run {
        fn new(limit: RateLimit) -> Self {
            let now = some_instant();
            let limiter = Limiter::new(limit, now);
            Self { limiter, now, latest: now, rule: limit, since: now, grants: Vec::new() }
        }

        fn step(&mut self, op: Op) -> Result<(), TestCaseError> {
            match op {
                Op::Wait(wait) => self.now = self.now.checked_add(wait).unwrap_or(self.now),
                Op::Back(wait) => self.now = self.now.checked_sub(wait).unwrap_or(self.now),
                Op::Take(want) => self.take(want)?,
                Op::Next => self.next()?,
                Op::Set(limit) => self.set(limit)?,
            }
            Ok(())
        }

        fn take(&mut self, want: usize) -> Result<(), TestCaseError> {
            let room = room(&self.limiter, self.now);
            let granted = self.limiter.take(self.now, want);
            prop_assert_eq!(granted, room.min(want), "all that may pass");
            self.latest = self.latest.max(self.now);
            self.grants.push((self.latest, granted));
            Ok(())
        }

        /// The next time is the first at which one more passes.
        fn next(&mut self) -> Result<(), TestCaseError> {
            let Some(next) = self.limiter.next(self.now) else {
                prop_assert!(room(&self.limiter, self.now) > 0);
                return Ok(());
            };
            prop_assert_eq!(room(&self.limiter, self.now), 0);
            prop_assert!(next > self.now);
            prop_assert_eq!(room(&self.limiter, next - NANO), 0);
            prop_assert!(room(&self.limiter, next) > 0);
            Ok(())
        }

        fn set(&mut self, limit: RateLimit) -> Result<(), TestCaseError> {
            let before = room(&self.limiter, self.now);
            self.limiter.set(limit, self.now);
            prop_assert!(room(&self.limiter, self.now) <= before, "a change lets nothing pass");
            if let Some(rule) = wider(self.rule, limit) {
                (self.rule, self.latest) = (rule, self.latest.max(self.now));
            } else {
                self.judge()?;
                self.grants.clear();
                (self.rule, self.since, self.latest) = (limit, self.now, self.now);
            }
            Ok(())
        }

        fn judge(&self) -> Result<(), TestCaseError> {
            let Self { rule, since, grants, .. } = self;
            prop_assert!(obeys(*rule, *since, grants), "{:?} {:?}", rule, grants);
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn no_limit_is_ever_exceeded(limit in limits(), ops in ops()) {
            let mut run = Run::new(limit);
            for op in ops {
                run.step(op)?;
            }
            run.judge()?;
        }

        #[test]
        fn a_rule_that_grows_and_shrinks_holds_in_the_window_that_goes_on(
            changes in prop::collection::vec((0u64..150, 1u32..20, 0usize..20), 1..60),
        ) {
            let start = some_instant();
            let mut limiter = Limiter::new(window(10, ms(1000)), start);
            let (mut now, mut index, mut passed) = (start, 0, 0);
            for (wait, allowed, want) in changes {
                now += ms(wait);
                limiter.set(window(allowed, ms(1000)), now);
                if (now - start).as_millis() / 1000 != index {
                    (index, passed) = ((now - start).as_millis() / 1000, 0);
                }
                let granted = limiter.take(now, want);
                passed += granted;
                prop_assert!(granted == 0 || passed <= allowed as usize);
            }
        }

        #[test]
        fn a_clock_that_stands_still_grants_a_limit_once(limit in limits(), asks in 1usize..50) {
            let now = some_instant();
            let mut limiter = Limiter::new(limit, now);
            let total: usize = (0..asks).map(|_| limiter.take(now, usize::MAX)).sum();
            let (RateLimit::TokenBucket { burst: most, .. }
            | RateLimit::FixedWindow { allowed: most, .. }) = limit;
            prop_assert_eq!(total, most as usize);
        }
    }
}
