//! The books of a pipeline: its ledger, and every message in flight.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::message::Message;
use crate::metrics::PipelineLedger;
use crate::work::Ticket;

/// Says of each accepted message how far it is, until it is settled: whatever
/// happens to the threads and queues it goes through, it is settled at most
/// once, and returned if it never is.
#[derive(Debug, Default)]
pub(crate) struct Register {
    ledger: PipelineLedger,
    /// By the number of the pull that brought them.
    pulls: BTreeMap<u64, Taken>,
    next_pull: u64,
    /// Nothing is accepted or settled any more.
    closed: bool,
}

/// The messages of one pull.
#[derive(Debug)]
struct Taken {
    at: Instant,
    places: Vec<Place>,
    /// Places that are not settled; never zero.
    open: usize,
}

/// One message of a pull.
#[derive(Debug)]
struct Place {
    /// `None` once it is settled.
    message: Option<Message>,
    /// Already acknowledged as a success.
    acknowledged: bool,
    /// Somebody settles it.
    claimed: bool,
}

/// Whoever claimed a message, and nobody else, settles it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Its acknowledger is still to be told.
    Fresh,
    /// It was acknowledged early.
    Acknowledged,
}

impl Register {
    /// Takes messages in; `None` when the pipeline has ended, or there are none.
    pub(crate) fn accept(&mut self, now: Instant, messages: &[Message]) -> Option<u64> {
        if self.closed || messages.is_empty() {
            return None;
        }
        let place = |message: &Message| Place {
            message: Some(message.clone()),
            acknowledged: false,
            claimed: false,
        };
        let places: Vec<Place> = messages.iter().map(place).collect();
        let pull = self.next_pull;
        self.next_pull += 1;
        self.pulls.insert(pull, Taken { at: now, open: places.len(), places });
        self.ledger.accepted += messages.len() as u64;
        self.ledger.in_flight += messages.len() as u64;
        Some(pull)
    }

    /// Notes that a message is acknowledged as a success before its batch;
    /// `false` if it was before.
    pub(crate) fn acknowledge(&mut self, ticket: &Ticket) -> bool {
        let Some(place) = self.place(ticket) else { return false };
        !std::mem::replace(&mut place.acknowledged, true)
    }

    pub(crate) fn is_acknowledged(&mut self, ticket: &Ticket) -> bool {
        self.place(ticket).is_some_and(|place| place.acknowledged)
    }

    /// Asks to settle a message; `None` if somebody else does or did.
    pub(crate) fn claim(&mut self, ticket: &Ticket) -> Option<Claim> {
        let place = self.place(ticket)?;
        if std::mem::replace(&mut place.claimed, true) {
            return None;
        }
        Some(if place.acknowledged { Claim::Acknowledged } else { Claim::Fresh })
    }

    /// Enters what became of a message that was claimed.
    pub(crate) fn settle(&mut self, ticket: &Ticket, success: bool) {
        let Some(taken) = self.pulls.get_mut(&ticket.pull) else { return };
        let place = taken.places.get_mut(ticket.place as usize);
        if place.and_then(|place| place.message.take()).is_none() {
            return;
        }
        taken.open -= 1;
        if taken.open == 0 {
            self.pulls.remove(&ticket.pull);
        }
        self.ledger.in_flight -= 1;
        if success {
            self.ledger.succeeded += 1;
        } else {
            self.ledger.failed += 1;
        }
    }

    /// Ends it: what is not settled by now is returned, in the order in which
    /// it was accepted.
    pub(crate) fn close(&mut self) -> Vec<Message> {
        self.closed = true;
        self.ledger.returned += self.ledger.in_flight;
        self.ledger.in_flight = 0;
        let places = std::mem::take(&mut self.pulls).into_values().flat_map(|taken| taken.places);
        places.filter_map(|place| place.message).collect()
    }

    pub(crate) fn ledger(&self) -> PipelineLedger {
        self.ledger
    }

    /// When the oldest message in flight was accepted.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.pulls.first_key_value().map(|(_, taken)| taken.at)
    }

    fn place(&mut self, ticket: &Ticket) -> Option<&mut Place> {
        let place = self.pulls.get_mut(&ticket.pull)?.places.get_mut(ticket.place as usize)?;
        place.message.is_some().then_some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock::Clock;
    use crate::message::{BlockBuilder, Payload};

    fn taken(register: &mut Register, count: u64) -> Vec<Ticket> {
        let now = Clock::real().now();
        let mut block = BlockBuilder::new(0, 0, now);
        (1..=count).for_each(|n| block.push(Payload::Text("a"), n, None));
        let messages: Vec<Message> = block.finish().collect();
        let pull = register.accept(now, &messages).unwrap();
        let ticket = |(place, message)| Ticket::new(message, 0, pull, place);
        (0..).zip(messages).map(ticket).collect()
    }

    #[test]
    fn a_message_is_settled_by_whoever_claimed_it_first_and_once() {
        let mut register = Register::default();
        let tickets = taken(&mut register, 2);
        assert_eq!(register.claim(&tickets[0]), Some(Claim::Fresh));
        assert_eq!(register.claim(&tickets[0]), None);
        register.settle(&tickets[0], true);
        register.settle(&tickets[0], false);
        assert_eq!(register.claim(&tickets[0]), None);
        assert!(register.acknowledge(&tickets[1]) && !register.acknowledge(&tickets[1]));
        assert_eq!(register.claim(&tickets[1]), Some(Claim::Acknowledged));
        register.settle(&tickets[1], false);
        let ledger = register.ledger();
        assert_eq!((ledger.succeeded, ledger.failed, ledger.in_flight), (1, 1, 0));
        assert!(register.pulls.is_empty() && register.oldest().is_none());
    }

    #[test]
    fn what_is_not_settled_at_the_end_is_returned_in_order_and_final() {
        let mut register = Register::default();
        let (first, second) = (taken(&mut register, 2), taken(&mut register, 2));
        register.claim(&second[0]);
        register.claim(&first[0]);
        register.settle(&first[0], true);
        let sequences: Vec<u64> =
            register.close().iter().map(|message| message.metadata().sequence).collect();
        assert_eq!(sequences, [2, 1, 2], "one that is being settled is not settled");
        register.settle(&second[0], true);
        assert_eq!(register.claim(&first[1]), None);
        let ledger = register.ledger();
        assert_eq!((ledger.succeeded, ledger.returned), (1, 3));
        assert!(ledger.balanced());
        let messages = [first[0].message.clone()];
        assert_eq!(register.accept(Clock::real().now(), &messages), None);
    }
}
