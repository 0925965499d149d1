//! When to ping, and when the peer counts as gone.

use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};

/// The settings of a connection's heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heartbeat {
    /// A ping goes out when nothing arrived for so long; `None`: never.
    /// Defaults to 20 s.
    pub(crate) ping_interval: Option<Duration>,
    /// How long after a ping something must arrive. Defaults to 20 s.
    pub(crate) pong_timeout: Duration,
    /// How long the feed may be without a data message; `None`, the default:
    /// for ever.
    pub(crate) idle_timeout: Option<Duration>,
    /// How long the server may take nothing of what is written. Defaults to 30 s.
    pub(crate) write_timeout: Duration,
}

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beat {
    /// Send a ping now.
    Ping,
    /// The peer counts as gone: cut the socket without a close handshake.
    Dead(Cause),
}

/// Why a peer counts as gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Not one byte within `pong_timeout` after a ping.
    NoPong,
    /// No data message within `idle_timeout`.
    Idle,
    /// Nothing could be written for `write_timeout`.
    WriteStalled,
}

/// The signs of life of one socket; made anew for each, so nothing of an old
/// epoch counts in the next.
///
/// Only what arrives counts. There is no way to tell it about outgoing traffic
/// but that it is blocked, so sending can postpone neither a ping nor a verdict.
///
/// ```text
///            nothing for ping_interval          nothing for pong_timeout
///  quiet -------------- Ping ----------> waiting ------------> Dead(NoPong)
///    ^                                      |
///    +-------------- any byte --------------+
/// ```
///
/// Read what the socket holds before asking [`on_time`](Liveness::on_time): a
/// thread that was kept from running finds the sign of life and the deadline
/// at the same moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Liveness {
    heartbeat: Heartbeat,
    /// When the last byte arrived: silence is counted from here.
    last_byte: Instant,
    /// When the last data message arrived: idleness is counted from here.
    last_data: Instant,
    /// When the last ping went out, answered or not.
    ping: Option<Instant>,
    /// Whether nothing arrived since that ping.
    waiting: bool,
    /// Since when nothing could be written, if that is so.
    blocked: Option<Instant>,
    /// Whether this side itself is not reading.
    paused: bool,
}

impl Liveness {
    /// A socket that was opened at `now`: that counts as its first sign of life.
    pub(crate) fn new(heartbeat: Heartbeat, now: Instant) -> Self {
        Self {
            heartbeat,
            last_byte: now,
            last_data: now,
            ping: None,
            waiting: false,
            blocked: None,
            paused: false,
        }
    }

    /// Any bytes arrived: a pong, data, or a part of either.
    pub(crate) fn on_bytes(&mut self, now: Instant) {
        self.last_byte = now;
        self.waiting = false;
    }

    /// A data message arrived, also one that the session skips. Pings and pongs
    /// do not count, so a flood of them cannot hide a dead feed.
    pub(crate) fn on_data(&mut self, now: Instant) {
        self.last_data = now;
    }

    /// Something waits to be written and the socket takes nothing. Said again,
    /// it changes nothing: the first instant counts.
    pub(crate) fn on_write_blocked(&mut self, now: Instant) {
        self.blocked.get_or_insert(now);
    }

    /// Some bytes left, but not all: a slow reader, not a stalled one.
    pub(crate) fn on_write_progress(&mut self, now: Instant) {
        if let Some(since) = &mut self.blocked {
            *since = now;
        }
    }

    /// All that waited to be written has left.
    pub(crate) fn on_write_clear(&mut self) {
        self.blocked = None;
    }

    /// This side stops reading, so silence proves nothing: `NoPong` and `Idle`
    /// are suspended. Pings go out at each interval all the same, for the
    /// server's and the proxies' idle clocks.
    pub(crate) fn pause(&mut self, _now: Instant) {
        self.paused = true;
    }

    /// This side reads again, and everything counts from `now`. An outstanding
    /// ping is forgotten: the next one goes out after `ping_interval`.
    pub(crate) fn resume(&mut self, now: Instant) {
        if self.paused {
            self.paused = false;
            self.on_bytes(now);
            self.on_data(now);
        }
    }

    /// What is due at `now`; `None` before the deadline. Verdicts come first,
    /// the one that was due earliest. Afterwards the deadline lies ahead, but
    /// for a verdict: that stands.
    pub(crate) fn on_time(&mut self, now: Instant) -> Option<Beat> {
        if let Some((at, cause)) = self.verdict()
            && at <= now
        {
            return Some(Beat::Dead(cause));
        }
        if self.ping_due().is_some_and(|at| at <= now) {
            self.ping = Some(now);
            self.waiting = true;
            return Some(Beat::Ping);
        }
        None
    }

    /// When [`on_time`](Liveness::on_time) has something to say, if nothing
    /// arrives before.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let verdict = self.verdict().map(|(at, _)| at);
        self.ping_due().into_iter().chain(verdict).min()
    }

    /// When the last ping went out that no byte has answered yet.
    #[cfg(test)]
    pub(crate) fn ping_sent(&self) -> Option<Instant> {
        self.ping
    }

    /// When the next ping is due. One ping at a time while this side reads; at
    /// each interval while it does not, for then none can be answered.
    fn ping_due(&self) -> Option<Instant> {
        let interval = self.heartbeat.ping_interval?;
        match (self.waiting, self.paused) {
            (true, false) => None,
            (true, true) => after(self.ping?, interval),
            (false, _) => after(self.last_byte, interval),
        }
    }

    /// The first verdict to come if nothing changes, and when.
    fn verdict(&self) -> Option<(Instant, Cause)> {
        [
            self.no_pong_at().map(|at| (at, Cause::NoPong)),
            self.idle_at().map(|at| (at, Cause::Idle)),
            self.stalled_at().map(|at| (at, Cause::WriteStalled)),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(at, _)| *at)
    }

    fn no_pong_at(&self) -> Option<Instant> {
        let ping = self.ping.filter(|_| self.waiting && !self.paused)?;
        after(ping, self.heartbeat.pong_timeout)
    }

    fn idle_at(&self) -> Option<Instant> {
        let limit = self.heartbeat.idle_timeout.filter(|_| !self.paused)?;
        after(self.last_data, limit)
    }

    fn stalled_at(&self) -> Option<Instant> {
        after(self.blocked?, self.heartbeat.write_timeout)
    }
}

impl Heartbeat {
    /// Refuses a time of zero, naming the setting.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let times = [
            ("ping_interval", self.ping_interval),
            ("pong_timeout", Some(self.pong_timeout)),
            ("idle_timeout", self.idle_timeout),
            ("write_timeout", Some(self.write_timeout)),
        ];
        match times.iter().find(|(_, time)| time.is_some_and(|time| time.is_zero())) {
            Some((name, _)) => Err(Error::setting(name, "must be more than zero")),
            None => Ok(()),
        }
    }
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            ping_interval: Some(Duration::from_secs(20)),
            pong_timeout: Duration::from_secs(20),
            idle_timeout: None,
            write_timeout: Duration::from_secs(30),
        }
    }
}

impl Cause {
    /// The error with which the connection is lost, naming the limit that passed.
    pub(crate) fn error(self, heartbeat: &Heartbeat) -> Error {
        match self {
            Cause::NoPong => {
                let limit = heartbeat.pong_timeout;
                Error::new(ErrorKind::NoPong, format!("no pong in {limit:?}"))
            }
            Cause::Idle => {
                let limit = heartbeat.idle_timeout.unwrap_or_default();
                Error::new(ErrorKind::Idle, format!("no data in {limit:?}"))
            }
            Cause::WriteStalled => {
                let limit = heartbeat.write_timeout;
                let phrase = format!("server stopped reading: nothing written for {limit:?}");
                Error::new(ErrorKind::WriteStalled, phrase)
            }
        }
    }
}

/// `start + wait`; `None` when that is beyond all time, which is never.
fn after(start: Instant, wait: Duration) -> Option<Instant> {
    start.checked_add(wait)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logic::some_instant;
    use proptest::prelude::*;

    const PING: Option<Beat> = Some(Beat::Ping);
    const NO_PONG: Option<Beat> = Some(Beat::Dead(Cause::NoPong));
    const IDLE: Option<Beat> = Some(Beat::Dead(Cause::Idle));
    const STALLED: Option<Beat> = Some(Beat::Dead(Cause::WriteStalled));

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    /// Ping after 20 s, pong within 10 s, writes within 30 s; idle as given.
    fn beats(idle: Option<u64>) -> Heartbeat {
        Heartbeat { pong_timeout: secs(10), idle_timeout: idle.map(secs), ..Heartbeat::default() }
    }

    fn started(heartbeat: Heartbeat) -> (Liveness, Instant) {
        let start = some_instant();
        (Liveness::new(heartbeat, start), start)
    }

    #[test]
    fn a_silent_peer_is_pinged_and_then_dead() {
        let (mut live, start) = started(beats(None));
        assert_eq!(live.deadline(), Some(start + secs(20)));
        assert_eq!(live.on_time(start + secs(20) - Duration::from_nanos(1)), None);
        assert_eq!(live.on_time(start + secs(20)), PING);
        assert_eq!(live.ping_sent(), Some(start + secs(20)));
        assert_eq!(live.deadline(), Some(start + secs(30)));
        assert_eq!(live.on_time(start + secs(29)), None);
        assert_eq!(live.on_time(start + secs(30)), NO_PONG);
        assert_eq!(live.on_time(start + secs(31)), NO_PONG, "a verdict stands");
    }

    #[test]
    fn a_peer_that_sends_data_but_never_pongs_stays_alive() {
        let (mut live, start) = started(beats(None));
        for second in 0..1000 {
            let now = start + secs(second);
            if second % 25 == 24 {
                live.on_bytes(now);
            }
            assert!(!matches!(live.on_time(now), Some(Beat::Dead(_))), "second {second}");
        }
    }

    #[test]
    fn a_peer_that_keeps_talking_is_never_pinged() {
        let (mut live, start) = started(beats(None));
        for second in 0..1000 {
            live.on_bytes(start + secs(second));
            assert_eq!(live.on_time(start + secs(second)), None);
        }
        assert_eq!(live.ping_sent(), None);
    }

    #[test]
    fn an_interval_equal_to_the_timeout_works() {
        let (mut live, start) = started(Heartbeat::default());
        for round in 0..10 {
            let ping = start + secs(40 * round + 20);
            assert_eq!(live.on_time(ping), PING);
            assert_eq!(live.deadline(), Some(ping + secs(20)));
            live.on_bytes(ping + secs(20));
            assert_eq!(live.on_time(ping + secs(20)), None, "a pong in the last instant counts");
        }
    }

    #[test]
    fn a_late_wake_up_pings_before_it_judges() {
        let (mut live, start) = started(beats(None));
        let woken = start + secs(3600);
        assert_eq!(live.on_time(woken), PING);
        assert_eq!(live.deadline(), Some(woken + secs(10)));
    }

    #[test]
    fn the_ping_time_outlives_the_answer_for_the_round_trip() {
        let (mut live, start) = started(beats(None));
        live.on_time(start + secs(20));
        live.on_bytes(start + secs(21));
        assert_eq!(live.ping_sent(), Some(start + secs(20)));
        assert_eq!(live.deadline(), Some(start + secs(41)));
    }

    #[test]
    fn a_ping_flood_does_not_hide_a_dead_feed() {
        let (mut live, start) = started(beats(Some(60)));
        for second in 1..60 {
            live.on_bytes(start + secs(second));
            assert_eq!(live.on_time(start + secs(second)), None);
        }
        assert_eq!(live.deadline(), Some(start + secs(60)));
        assert_eq!(live.on_time(start + secs(60)), IDLE);
    }

    #[test]
    fn data_keeps_a_feed_from_being_idle() {
        let (mut live, start) = started(beats(Some(60)));
        live.on_bytes(start + secs(59));
        live.on_data(start + secs(59));
        assert_eq!(live.on_time(start + secs(60)), None);
        assert_eq!(live.on_time(start + secs(79)), PING);
        live.on_bytes(start + secs(80));
        assert_eq!(live.on_time(start + secs(119)), IDLE);
    }

    #[test]
    fn a_server_that_takes_nothing_is_dead_however_much_it_sends() {
        let (mut live, start) = started(beats(None));
        live.on_write_blocked(start + secs(1));
        live.on_write_blocked(start + secs(15));
        live.on_bytes(start + secs(30));
        assert_eq!(live.deadline(), Some(start + secs(31)));
        assert_eq!(live.on_time(start + secs(31)), STALLED);
    }

    #[test]
    fn a_slow_reader_is_not_a_stalled_one() {
        let (mut live, start) = started(Heartbeat { ping_interval: None, ..beats(None) });
        live.on_write_progress(start + secs(1));
        assert_eq!(live.deadline(), None, "progress without a block is nothing");
        live.on_write_blocked(start + secs(2));
        live.on_write_progress(start + secs(31));
        assert_eq!(live.deadline(), Some(start + secs(61)));
        live.on_write_clear();
        assert_eq!(live.deadline(), None);
    }

    #[test]
    fn a_blocked_consumer_does_not_cost_the_link() {
        let (mut live, start) = started(beats(Some(60)));
        assert_eq!(live.on_time(start + secs(20)), PING);
        live.pause(start + secs(21));
        live.pause(start + secs(22));
        let mut pings = 0;
        for second in 21..600 {
            match live.on_time(start + secs(second)) {
                Some(Beat::Ping) => pings += 1,
                other => assert_eq!(other, None, "second {second}"),
            }
        }
        assert_eq!(pings, 28, "one at each interval");
    }

    #[test]
    fn everything_counts_anew_after_a_pause() {
        let (mut live, start) = started(beats(Some(60)));
        live.on_time(start + secs(20));
        live.pause(start + secs(21));
        let resumed = start + secs(500);
        live.resume(resumed);
        assert_eq!(live.deadline(), Some(resumed + secs(20)));
        live.resume(resumed + secs(5));
        assert_eq!(live.on_time(resumed + secs(20)), PING, "a second resume changes nothing");
        assert_eq!(live.on_time(resumed + secs(30)), NO_PONG);
    }

    #[test]
    fn a_stalled_write_is_judged_during_a_pause_too() {
        let (mut live, start) = started(Heartbeat { ping_interval: None, ..beats(Some(60)) });
        live.pause(start);
        assert_eq!(live.deadline(), None);
        live.on_write_blocked(start);
        assert_eq!(live.on_time(start + secs(30)), STALLED);
    }

    #[test]
    fn of_several_verdicts_the_earliest_is_told() {
        let (mut live, start) = started(beats(Some(25)));
        live.on_write_blocked(start);
        live.on_time(start + secs(20));
        assert_eq!(live.on_time(start + secs(3600)), IDLE);
    }

    #[test]
    fn without_a_ping_interval_nothing_is_due() {
        let (mut live, start) = started(Heartbeat { ping_interval: None, ..beats(None) });
        assert_eq!(live.deadline(), None);
        assert_eq!(live.on_time(start + secs(1_000_000)), None);
    }

    #[test]
    fn times_beyond_all_time_mean_never() {
        let heartbeat = Heartbeat {
            ping_interval: Some(Duration::MAX),
            pong_timeout: Duration::MAX,
            idle_timeout: Some(Duration::MAX),
            write_timeout: Duration::MAX,
        };
        let (mut live, start) = started(heartbeat);
        live.on_write_blocked(start);
        assert_eq!(live.deadline(), None);
    }

    #[test]
    fn a_cause_names_the_limit_that_passed() {
        let heartbeat = Heartbeat { idle_timeout: Some(secs(60)), ..Heartbeat::default() };
        for (cause, kind, phrase) in [
            (Cause::NoPong, ErrorKind::NoPong, "no pong in 20s"),
            (Cause::Idle, ErrorKind::Idle, "no data in 60s"),
            (
                Cause::WriteStalled,
                ErrorKind::WriteStalled,
                "server stopped reading: nothing written for 30s",
            ),
        ] {
            let error = cause.error(&heartbeat);
            assert_eq!((error.kind(), error.to_string().as_str()), (&kind, phrase));
        }
    }

    #[test]
    fn a_time_of_zero_is_refused_by_name() {
        let good = Heartbeat { idle_timeout: Some(secs(1)), ..Heartbeat::default() };
        assert!(good.check().is_ok());
        assert!(Heartbeat { ping_interval: None, ..Heartbeat::default() }.check().is_ok());
        let zero = Duration::ZERO;
        for (name, heartbeat) in [
            ("ping_interval", Heartbeat { ping_interval: Some(zero), ..good }),
            ("pong_timeout", Heartbeat { pong_timeout: zero, ..good }),
            ("idle_timeout", Heartbeat { idle_timeout: Some(zero), ..good }),
            ("write_timeout", Heartbeat { write_timeout: zero, ..good }),
        ] {
            let error = heartbeat.check().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting(name));
            assert_eq!(error.to_string(), format!("setting `{name}`: must be more than zero"));
        }
    }

    fn heartbeats() -> impl Strategy<Value = Heartbeat> {
        let time = || (1u64..50).prop_map(secs);
        (prop::option::of(time()), time(), prop::option::of(time()), time()).prop_map(
            |(ping_interval, pong_timeout, idle_timeout, write_timeout)| Heartbeat {
                ping_interval,
                pong_timeout,
                idle_timeout,
                write_timeout,
            },
        )
    }

    /// Tells `live` of one happening.
    fn happen(live: &mut Liveness, what: u8, now: Instant) {
        match what {
            0 => live.on_bytes(now),
            1 => live.on_data(now),
            2 => live.on_write_blocked(now),
            3 => live.on_write_progress(now),
            4 => live.on_write_clear(),
            5 => live.pause(now),
            _ => live.resume(now),
        }
    }

    proptest! {
        #[test]
        fn a_silent_peer_is_dead_exactly_after_interval_and_timeout(
            interval in 1u64..1000, timeout in 1u64..1000, chatter in 0u64..5000,
        ) {
            let (interval, timeout) = (secs(interval), secs(timeout));
            let heartbeat = Heartbeat {
                ping_interval: Some(interval), pong_timeout: timeout, ..Heartbeat::default()
            };
            let (mut live, start) = started(heartbeat);
            let last = start + Duration::from_millis(chatter);
            live.on_bytes(last);
            let first = live.deadline().unwrap();
            prop_assert_eq!(live.on_time(first), PING);
            let second = live.deadline().unwrap();
            prop_assert_eq!(live.on_time(second), NO_PONG);
            prop_assert_eq!(second, last + interval + timeout);
        }

        #[test]
        fn nothing_happens_before_a_deadline_and_something_at_it(
            heartbeat in heartbeats(),
            steps in prop::collection::vec((0u8..7, 0u64..40_000), 1..80),
        ) {
            let (mut live, mut now) = started(heartbeat);
            for (what, wait) in steps {
                now += Duration::from_millis(wait);
                happen(&mut live, what, now);
                let before = live.clone();
                let due = live.deadline().is_some_and(|at| at <= now);
                match live.on_time(now) {
                    None => {
                        prop_assert!(!due);
                        prop_assert_eq!(&live, &before);
                    }
                    Some(Beat::Ping) => {
                        prop_assert!(due);
                        prop_assert!(live.deadline().is_none_or(|at| at > now), "no progress");
                    }
                    Some(Beat::Dead(_)) => {
                        prop_assert!(due);
                        return Ok(());
                    }
                }
            }
        }

        #[test]
        fn a_peer_that_answers_every_ping_in_time_lives(
            interval in 1u64..50, timeout in 1u64..50,
            answers in prop::collection::vec(0.0..=1.0f64, 1..50),
        ) {
            let timeout = secs(timeout);
            let heartbeat = Heartbeat {
                ping_interval: Some(secs(interval)), pong_timeout: timeout, ..Heartbeat::default()
            };
            let (mut live, _) = started(heartbeat);
            for delay in answers {
                let ping = live.deadline().unwrap();
                prop_assert_eq!(live.on_time(ping), PING);
                let pong = ping + timeout.mul_f64(delay);
                live.on_bytes(pong);
                prop_assert_eq!(live.on_time(pong), None);
            }
        }
    }
}
