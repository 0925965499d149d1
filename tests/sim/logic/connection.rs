//! The crate's `logic/connection.rs`, in a shell that can carry a planted bug.

pub(super) use super::backoff;
use crate::planted::{Bug, planted};
#[path = "../../../src/logic/connection.rs"]
mod real;
use crate::error::{Error, ErrorKind, Recovery};
use crate::event::State;
pub(crate) use real::{Fate, Illegal, Input, Loss, RetryPolicy, next};
use std::time::Instant;

#[derive(Debug)]
pub(crate) struct Machine(real::Machine, bool);

impl Machine {
    pub(crate) fn new(mut policy: RetryPolicy) -> Self {
        if planted(Bug::AttemptsNotLimited) {
            policy.max_attempts = None;
            policy.max_reconnect_attempts = None;
        }
        if planted(Bug::BackOffNeverReset) {
            policy.stable_after = std::time::Duration::MAX;
        }
        Self(real::Machine::new(policy), false)
    }

    pub(crate) fn state(&self) -> State {
        let state = self.0.state();
        if planted(Bug::IllegalTransition) && state == State::Opening {
            return State::Connected;
        }
        state
    }

    pub(crate) fn failures(&self) -> u32 {
        self.0.failures()
    }

    pub(crate) fn step(&mut self, input: Input) -> Result<State, Illegal> {
        self.0.step(input)
    }

    pub(crate) fn ready(&mut self, now: Instant) -> Result<State, Illegal> {
        let from = self.0.ready(now);
        if planted(Bug::BackOffResetByConnect) {
            self.0.mark_healthy();
        }
        from
    }

    pub(crate) fn mark_healthy(&mut self) {
        self.0.mark_healthy();
    }

    pub(crate) fn lost(
        &mut self,
        now: Instant,
        error: &Error,
        recovery: Recovery,
        random: f64,
    ) -> Result<Loss, Illegal> {
        let http = |wanted: u16| matches!(error.kind(), ErrorKind::Http { status, .. } if *status == wanted);
        let breach = matches!(error.kind(), ErrorKind::Protocol | ErrorKind::TooLarge);
        let recovery = match recovery {
            _ if planted(Bug::BusyServerGivenUp) && http(503) => Recovery::Unrecoverable,
            _ if planted(Bug::RefusalRetried) && http(401) => Recovery::Recoverable,
            _ if planted(Bug::BreachRetried) && breach => Recovery::Recoverable,
            Recovery::Unrecoverable if planted(Bug::UnrecoverableRetried) => Recovery::Recoverable,
            Recovery::Recoverable
                if planted(Bug::RecoverableGivenUp)
                    && matches!(error.kind(), ErrorKind::Closed { .. }) =>
            {
                Recovery::Unrecoverable
            }
            as_it_is => as_it_is,
        };
        self.0.lost(now, error, recovery, random)
    }
}
