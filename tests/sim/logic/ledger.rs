//! The crate's `logic/ledger.rs`, in a shell that can carry a planted bug.

use crate::planted::{Bug, planted};
#[path = "../../../src/logic/ledger.rs"]
mod real;
use crate::metrics::{DropReason, Ledger};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Books(real::Books);

impl Books {
    pub(crate) fn skipped(&mut self, n: u64) {
        if !planted(Bug::SkippedNotCounted) {
            self.0.skipped(n);
        }
    }

    pub(crate) fn offered(&mut self, fresh: u64, duplicates: u64) {
        self.0.offered(fresh, duplicates);
    }

    pub(crate) fn shed(&mut self, reason: DropReason, n: u64) {
        if !planted(Bug::ShedNotCounted) {
            self.0.shed(reason, n);
        }
    }

    pub(crate) fn ledger(&self, delivered: u64) -> Ledger {
        self.0.ledger(delivered)
    }

    pub(crate) fn dropped_by(&self, reason: DropReason) -> u64 {
        self.0.dropped_by(reason)
    }
}
