//! The books: every data message read ends in exactly one column.

use std::fmt;

use crate::metrics::{DropReason, Ledger};

/// The counters behind a [`Ledger`], kept by whoever owns the reading.
///
/// It counts what was read and where it went apart from each other, so that a
/// message forgotten on the way shows as an imbalance instead of vanishing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Books {
    received: u64,
    duplicates: u64,
    skipped: u64,
    /// Accepted and not shed since.
    accepted: u64,
    /// By reason, in the order of [`DropReason`].
    dropped: [u64; DropReason::COUNT],
}

impl Books {
    /// `n` messages were consumed by the session.
    pub(crate) fn skipped(&mut self, n: u64) {
        self.received += n;
        self.skipped += n;
    }

    /// Messages came out of the dedup window: so many fresh, so many seen before.
    pub(crate) fn offered(&mut self, fresh: u64, duplicates: u64) {
        self.received += fresh + duplicates;
        self.accepted += fresh;
        self.duplicates += duplicates;
    }

    /// `n` accepted messages were dropped after all. Only what was not yet
    /// delivered can be: more than that leaves the ledger unbalanced.
    pub(crate) fn shed(&mut self, reason: DropReason, n: u64) {
        self.accepted = self.accepted.saturating_sub(n);
        self.dropped[reason.index()] += n;
    }

    /// The ledger at an instant at which `delivered` messages had been taken.
    pub(crate) fn ledger(&self, delivered: u64) -> Ledger {
        Ledger {
            received: self.received,
            duplicates: self.duplicates,
            skipped: self.skipped,
            dropped: self.dropped.iter().sum(),
            accepted: self.accepted,
            delivered,
            in_flight: self.accepted.saturating_sub(delivered),
        }
    }

    /// How many messages were dropped for this reason.
    pub(crate) fn dropped_by(&self, reason: DropReason) -> u64 {
        self.dropped[reason.index()]
    }
}

impl DropReason {
    /// How many reasons there are.
    const COUNT: usize = 4;

    /// The place of its counter.
    const fn index(self) -> usize {
        match self {
            DropReason::Oldest => 0,
            DropReason::Newest => 1,
            DropReason::Disconnect => 2,
            DropReason::Closed => 3,
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DropReason::Oldest => "oldest",
            DropReason::Newest => "newest",
            DropReason::Disconnect => "disconnect",
            DropReason::Closed => "closed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REASONS: [DropReason; DropReason::COUNT] =
        [DropReason::Oldest, DropReason::Newest, DropReason::Disconnect, DropReason::Closed];

    #[test]
    fn every_message_ends_in_one_column() {
        let mut books = Books::default();
        books.offered(10, 3);
        books.skipped(2);
        books.shed(DropReason::Oldest, 4);
        let ledger = books.ledger(5);
        let expected = Ledger {
            received: 15,
            duplicates: 3,
            skipped: 2,
            dropped: 4,
            accepted: 6,
            delivered: 5,
            in_flight: 1,
        };
        assert_eq!(ledger, expected);
        assert!(ledger.balanced());
    }

    #[test]
    fn drops_are_counted_by_reason() {
        let mut books = Books::default();
        books.offered(100, 0);
        for (n, reason) in (1..).zip(REASONS) {
            books.shed(reason, n);
        }
        let counts = REASONS.map(|reason| books.dropped_by(reason));
        assert_eq!(counts, [1, 2, 3, 4]);
        assert_eq!(books.ledger(0).dropped, 10);
        let names = REASONS.map(|reason| reason.to_string());
        assert_eq!(names, ["oldest", "newest", "disconnect", "closed"]);
    }

    #[test]
    fn a_message_counted_twice_shows_as_an_imbalance() {
        let mut books = Books::default();
        books.offered(1, 0);
        assert!(!books.ledger(2).balanced(), "delivered twice");
        books.shed(DropReason::Closed, 2);
        assert!(!books.ledger(0).balanced(), "dropped twice");
    }

    #[test]
    fn a_message_missing_from_a_column_shows_as_an_imbalance() {
        assert!(Ledger::default().balanced());
        assert!(!Ledger { received: 1, ..Ledger::default() }.balanced());
        let lost = Ledger { received: 1, accepted: 1, ..Ledger::default() };
        assert!(!lost.balanced());
    }

    #[test]
    fn a_ledger_is_one_line() {
        let mut books = Books::default();
        books.offered(7, 1);
        let line = "received=8 duplicates=1 skipped=0 dropped=0 accepted=7 delivered=3 in_flight=4";
        assert_eq!(books.ledger(3).to_string(), line);
    }

    proptest! {
        #[test]
        fn the_books_balance_after_any_sequence(
            steps in prop::collection::vec((0u8..4, 0u64..1000, 0u64..1000, 0usize..4), 0..60),
        ) {
            let (mut books, mut delivered) = (Books::default(), 0);
            for (step, n, m, reason) in steps {
                let waiting = books.ledger(delivered).in_flight;
                match step {
                    0 => books.offered(n, m),
                    1 => books.skipped(n),
                    2 => books.shed(REASONS[reason], n.min(waiting)),
                    _ => delivered += n.min(waiting),
                }
                let ledger = books.ledger(delivered);
                prop_assert!(ledger.balanced(), "{}", ledger);
                let by_reason: u64 = REASONS.iter().map(|r| books.dropped_by(*r)).sum();
                prop_assert_eq!(by_reason, ledger.dropped);
            }
        }
    }
}
