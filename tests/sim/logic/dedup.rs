//! The crate's `logic/dedup.rs`, in a shell that can carry a planted bug.

use crate::planted::{Bug, planted};
#[path = "../../../src/logic/dedup.rs"]
mod real;
pub(crate) use real::{Processing, check};
use std::time::{Duration, Instant};

#[derive(Debug, Clone)]
pub(crate) struct Dedup(real::Dedup);

impl Dedup {
    pub(crate) fn new(capacity: usize, ttl: Option<Duration>) -> Self {
        let capacity = if planted(Bug::WindowTooSmall) { 2 } else { capacity };
        Self(real::Dedup::new(capacity, ttl))
    }

    pub(crate) fn accept_next(&mut self, id: u128, now: Instant) -> bool {
        let fresh = self.0.accept_next(id, now);
        if planted(Bug::FreshTakenForDuplicate) && id % 512 == 7 {
            return false;
        }
        fresh || planted(Bug::DuplicateAccepted) && id % 64 == 7
    }

    pub(crate) fn accept_usual(&mut self, ids: impl Iterator<Item = u128>) -> usize {
        if planted(Bug::FreshTakenForDuplicate) || planted(Bug::DuplicateAccepted) {
            return 0;
        }
        self.0.accept_usual(ids)
    }

    pub(crate) fn touch<I>(&self, ids: &[I], hash: impl Fn(&I) -> u128) {
        self.0.touch(ids, hash);
    }

    pub(crate) fn done(&mut self, id: u128) {
        self.0.done(id);
    }

    pub(crate) fn is_done_next(&self, id: u128) -> bool {
        self.0.is_done_next(id)
    }

    pub(crate) fn forget(&mut self, id: u128) -> bool {
        !planted(Bug::FailureNotForgotten) && self.0.forget(id)
    }

    pub(crate) fn state(&self, id: u128, now: Instant) -> Option<Processing> {
        self.0.state(id, now)
    }
}
