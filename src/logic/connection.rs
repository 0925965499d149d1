//! The connection's state machine, and what follows from a loss.

use std::time::{Duration, Instant};

use super::backoff::{Backoff, Retry, retry_delay};
use crate::error::{Error, ErrorKind, Recovery};
use crate::event::State;

/// What can happen to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// An attempt begins.
    Start,
    /// The upgrade is done.
    Opened,
    /// The session's opening is done.
    Ready,
    /// The attempt or the connection ended and will be tried again.
    Lost,
    /// A close was asked for.
    Close,
    /// The close is done.
    Closed,
    /// The attempt or the connection ended and will not be tried again.
    Unrecoverable,
    /// Supervision will start the connection again.
    Restart,
}

/// A transition that the diagram of [`State`] does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Illegal {
    pub(crate) state: State,
    pub(crate) input: Input,
}

/// The legal transitions: the diagram of [`State`], as a table.
pub(crate) fn next(state: State, input: Input) -> Result<State, Illegal> {
    use State::{
        Closed, Closing, Connected, Connecting, Disconnected, Failed, Opening, Reconnecting,
    };
    match (state, input) {
        (Disconnected | Reconnecting, Input::Start) => Ok(Connecting),
        (Connecting, Input::Opened) => Ok(Opening),
        (Opening, Input::Ready) => Ok(Connected),
        (Connecting | Opening | Connected, Input::Lost) => Ok(Reconnecting),
        (Connecting | Opening | Connected, Input::Unrecoverable) => Ok(Failed),
        (Failed, Input::Restart) => Ok(Disconnected),
        (Closed | Closing, _) if input != Input::Closed => Err(Illegal { state, input }),
        (Closing, Input::Closed) => Ok(Closed),
        (_, Input::Close) => Ok(Closing),
        _ => Err(Illegal { state, input }),
    }
}

/// When and how often to try again.
#[derive(Debug, Clone)]
pub(crate) struct RetryPolicy {
    pub(crate) backoff: Backoff,
    /// A connection that stood this long was healthy: its loss starts over.
    pub(crate) stable_after: Duration,
    /// The longest wait that a server's `Retry-After` can ask for.
    pub(crate) retry_after_max: Duration,
    /// Failures in a row before the first connection; `None` is no limit.
    pub(crate) max_attempts: Option<u32>,
    /// Failures in a row after it; `None` is no limit.
    pub(crate) max_reconnect_attempts: Option<u32>,
}

/// One connection's memory across its epochs.
#[derive(Debug)]
pub(crate) struct Machine {
    state: State,
    policy: RetryPolicy,
    /// Attempts that failed, or ended before they were healthy, in a row.
    failures: u32,
    /// Retries since the last healthy connection: what the back-off grows with.
    retries: u32,
    connected_at: Option<Instant>,
    healthy: bool,
    ever_connected: bool,
}

/// What follows from a loss.
#[derive(Debug)]
pub(crate) struct Loss {
    /// Failures in a row, this one included; 0 if a healthy connection was lost.
    pub(crate) failures: u32,
    /// How long the connection stood; `None` if there was none yet.
    pub(crate) uptime: Option<Duration>,
    pub(crate) fate: Fate,
}

/// What the connection's thread does next.
#[derive(Debug)]
pub(crate) enum Fate {
    /// Try again after this delay.
    Retry(Duration),
    /// End; supervision decides.
    Unrecoverable,
    /// End for good, for this reason: the attempts are used up.
    GiveUp(Error),
}

impl Machine {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Self {
            state: State::Disconnected,
            policy,
            failures: 0,
            retries: 0,
            connected_at: None,
            healthy: false,
            ever_connected: false,
        }
    }

    pub(crate) fn state(&self) -> State {
        self.state
    }

    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Takes a step; returns the state before it.
    pub(crate) fn step(&mut self, input: Input) -> Result<State, Illegal> {
        let from = self.state;
        self.state = next(from, input)?;
        Ok(from)
    }

    /// The connection is ready.
    pub(crate) fn ready(&mut self, now: Instant) -> Result<State, Illegal> {
        let from = self.step(Input::Ready)?;
        self.connected_at = Some(now);
        self.ever_connected = true;
        self.healthy = false;
        Ok(from)
    }

    /// The session vouches for the connection.
    pub(crate) fn mark_healthy(&mut self) {
        self.healthy = true;
    }

    /// The attempt or connection ended with `error`: decides what follows, and
    /// steps. Only health starts the count over, never a mere connect: a server
    /// that accepts and then closes must not be hammered.
    pub(crate) fn lost(
        &mut self,
        now: Instant,
        error: &Error,
        recovery: Recovery,
        random: f64,
    ) -> Result<Loss, Illegal> {
        let uptime = self.connected_at.take().map(|at| now.saturating_duration_since(at));
        let stable = uptime.is_some_and(|uptime| uptime >= self.policy.stable_after);
        if stable || std::mem::take(&mut self.healthy) {
            self.failures = 0;
            self.retries = 0;
        } else {
            self.failures = self.failures.saturating_add(1);
        }
        let fate = self.fate(error, recovery, uptime.unwrap_or_default(), random);
        let input = match fate {
            Fate::Retry(_) => Input::Lost,
            Fate::Unrecoverable | Fate::GiveUp(_) => Input::Unrecoverable,
        };
        self.step(input)?;
        Ok(Loss { failures: self.failures, uptime, fate })
    }

    fn fate(&mut self, error: &Error, recovery: Recovery, uptime: Duration, random: f64) -> Fate {
        if recovery == Recovery::Unrecoverable {
            return Fate::Unrecoverable;
        }
        let limit = if self.ever_connected {
            self.policy.max_reconnect_attempts
        } else {
            self.policy.max_attempts
        };
        if limit.is_some_and(|limit| self.failures >= limit) {
            let phrase = match self.failures {
                1 => "gave up after the first failed attempt".to_owned(),
                failures => format!("gave up after {failures} failed attempts in a row"),
            };
            return Fate::GiveUp(Error::caused(ErrorKind::Attempts, phrase, error.clone()));
        }
        self.retries = self.retries.saturating_add(1);
        let retry = Retry { attempt: self.retries, error, uptime };
        let cap = self.policy.retry_after_max;
        Fate::Retry(retry_delay(&self.policy.backoff, &retry, cap, random))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock::Clock;

    const STATES: [State; 8] = [
        State::Disconnected,
        State::Connecting,
        State::Opening,
        State::Connected,
        State::Reconnecting,
        State::Closing,
        State::Closed,
        State::Failed,
    ];
    const INPUTS: [Input; 8] = [
        Input::Start,
        Input::Opened,
        Input::Ready,
        Input::Lost,
        Input::Close,
        Input::Closed,
        Input::Unrecoverable,
        Input::Restart,
    ];

    /// Rows are `STATES`, columns `INPUTS`; `.` is illegal.
    const TABLE: [&str; 8] = [
        "Connecting . . . Closing . . .",
        ". Opening . Reconnecting Closing . Failed .",
        ". . Connected Reconnecting Closing . Failed .",
        ". . . Reconnecting Closing . Failed .",
        "Connecting . . . Closing . . .",
        ". . . . . Closed . .",
        ". . . . . . . .",
        ". . . . Closing . . Disconnected",
    ];

    #[test]
    fn only_the_transitions_of_the_diagram_are_legal() {
        for (state, row) in STATES.into_iter().zip(TABLE) {
            for (input, cell) in INPUTS.into_iter().zip(row.split(' ')) {
                let expected = match cell {
                    "." => Err(Illegal { state, input }),
                    name => Ok(*STATES.iter().find(|s| format!("{s:?}") == name).unwrap()),
                };
                assert_eq!(next(state, input), expected, "{state:?} {input:?}");
            }
        }
    }

    fn policy() -> RetryPolicy {
        let (base, max) = (Duration::from_secs(1), Duration::from_secs(64));
        RetryPolicy {
            backoff: Backoff::exponential(base, max)
                .with_jitter(super::super::backoff::Jitter::None),
            stable_after: Duration::from_secs(10),
            retry_after_max: Duration::from_secs(300),
            max_attempts: Some(3),
            max_reconnect_attempts: Some(5),
        }
    }

    fn reset() -> Error {
        Error::new(ErrorKind::Io(std::io::ErrorKind::ConnectionReset), "reset")
    }

    /// Runs one epoch that is up for `up` seconds (`None`: it never connects)
    /// and returns the delay in seconds, or `None` when there is no retry.
    fn epoch(machine: &mut Machine, now: &mut Instant, up: Option<u64>) -> Option<u64> {
        machine.step(Input::Start).unwrap();
        if let Some(up) = up {
            machine.step(Input::Opened).unwrap();
            machine.ready(*now).unwrap();
            *now += Duration::from_secs(up);
        }
        match machine.lost(*now, &reset(), Recovery::Recoverable, 0.5).unwrap().fate {
            Fate::Retry(delay) => Some(delay.as_secs()),
            Fate::Unrecoverable | Fate::GiveUp(_) => None,
        }
    }

    #[test]
    fn accept_then_close_backs_off_like_a_failure_and_gives_up_like_one() {
        let (mut machine, mut now) = (Machine::new(policy()), Clock::real().now());
        let delays: Vec<_> = (0..5).map(|_| epoch(&mut machine, &mut now, Some(9))).collect();
        assert_eq!(delays, [Some(1), Some(2), Some(4), Some(8), None]);
        assert_eq!((machine.state(), machine.failures()), (State::Failed, 5));
    }

    #[test]
    fn giving_up_says_after_how_many_attempts_and_why() {
        for (limit, words) in [(1, "after the first failed attempt"), (2, "after 2 failed")] {
            let policy = RetryPolicy { max_attempts: Some(limit), ..policy() };
            let (mut machine, now) = (Machine::new(policy), Clock::real().now());
            let last = (0..limit).map(|_| {
                machine.step(Input::Start).unwrap();
                machine.lost(now, &reset(), Recovery::Recoverable, 0.5).unwrap().fate
            });
            let Some(Fate::GiveUp(error)) = last.last() else { panic!("it goes on") };
            assert_eq!(error.kind(), &ErrorKind::Attempts);
            assert!(error.chain().contains(words) && error.chain().contains("reset"), "{error}");
        }
    }

    #[test]
    fn an_illegal_step_is_refused_and_changes_nothing() {
        let (mut machine, now) = (Machine::new(policy()), Clock::real().now());
        let state = State::Disconnected;
        let refused = |input| Err(Illegal { state, input });
        assert_eq!(machine.step(Input::Opened), refused(Input::Opened));
        assert_eq!(machine.ready(now), refused(Input::Ready));
        let lost = machine.lost(now, &reset(), Recovery::Recoverable, 0.5);
        assert_eq!(lost.unwrap_err(), Illegal { state, input: Input::Lost });
        assert_eq!(machine.state(), state);
    }

    #[test]
    fn a_healthy_connection_starts_the_back_off_over() {
        let (mut machine, mut now) = (Machine::new(policy()), Clock::real().now());
        let ups = [None, None, Some(1), Some(10), None, Some(10)];
        let delays: Vec<_> = ups.map(|up| epoch(&mut machine, &mut now, up)).to_vec();
        assert_eq!(delays, [Some(1), Some(2), Some(4), Some(1), Some(2), Some(1)]);
    }

    #[test]
    fn a_session_can_vouch_for_a_short_connection_once() {
        let (mut machine, mut now) = (Machine::new(policy()), Clock::real().now());
        epoch(&mut machine, &mut now, None);
        epoch(&mut machine, &mut now, None);
        machine.step(Input::Start).unwrap();
        machine.step(Input::Opened).unwrap();
        machine.ready(now).unwrap();
        machine.mark_healthy();
        let loss = machine.lost(now, &reset(), Recovery::Recoverable, 0.5).unwrap();
        assert!(matches!(loss.fate, Fate::Retry(delay) if delay == Duration::from_secs(1)));
        assert_eq!(loss.failures, 0);
        assert_eq!(epoch(&mut machine, &mut now, Some(0)), Some(2));
    }

    #[test]
    fn the_first_connection_has_a_limit_of_its_own() {
        let (mut machine, mut now) = (Machine::new(policy()), Clock::real().now());
        let delays: Vec<_> = (0..3).map(|_| epoch(&mut machine, &mut now, None)).collect();
        assert_eq!(delays, [Some(1), Some(2), None]);
    }

    #[test]
    fn an_unrecoverable_error_ends_the_thread_whatever_is_left_of_the_budget() {
        let mut machine = Machine::new(policy());
        machine.step(Input::Start).unwrap();
        let now = Clock::real().now();
        let loss = machine.lost(now, &reset(), Recovery::Unrecoverable, 0.5).unwrap();
        assert!(matches!(loss.fate, Fate::Unrecoverable) && loss.uptime.is_none());
        assert_eq!(machine.state(), State::Failed);
    }
}
