//! The books of a pipeline: its ledger, and every message in flight.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::chunk::{Member, Run};
use crate::message::Message;
use crate::metrics::PipelineLedger;
use crate::work::{Pulled, Ticket};

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

/// The messages of one pull, which stay until all of them are settled.
#[derive(Debug)]
struct Taken {
    at: Instant,
    pulled: Arc<Pulled>,
    places: Vec<Place>,
    /// Places that are not settled; never zero.
    open: usize,
}

/// How far one message of a pull is.
#[derive(Debug, Default, Clone, Copy)]
struct Place {
    /// Already acknowledged as a success.
    acknowledged: bool,
    /// Somebody settles it.
    claimed: bool,
    settled: bool,
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
    pub(crate) fn accept(
        &mut self,
        now: Instant,
        source: usize,
        messages: Vec<Message>,
    ) -> Option<Arc<Pulled>> {
        if self.closed || messages.is_empty() {
            return None;
        }
        let open = messages.len();
        let number = self.next_pull;
        self.next_pull += 1;
        let pulled = Pulled { number, source, messages, partitions: OnceLock::new() };
        let pulled = Arc::new(pulled);
        let places = vec![Place::default(); open];
        let taken = Taken { at: now, pulled: Arc::clone(&pulled), places, open };
        self.pulls.insert(number, taken);
        self.ledger.accepted += open as u64;
        self.ledger.in_flight += open as u64;
        Some(pulled)
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
        self.pulls.get_mut(&ticket.pulled.number)?.claim(ticket.place)
    }

    /// Asks to settle messages: leaves those in the run that nobody else settles
    /// and returns those of them apart that were acknowledged early.
    pub(crate) fn claim_run(&mut self, run: &mut Run) -> Vec<Member> {
        let mut early = Vec::new();
        let Some(taken) = self.pulls.get_mut(&run.pulled.number) else {
            run.members.clear();
            return early;
        };
        run.members.retain_mut(|member| match taken.claim(member.place) {
            Some(Claim::Fresh) => true,
            Some(Claim::Acknowledged) => {
                early.push(member.clone());
                false
            }
            None => false,
        });
        early
    }

    /// Enters what became of messages that were claimed.
    pub(crate) fn settle(&mut self, run: &Run, success: bool) {
        let Some(taken) = self.pulls.get_mut(&run.pulled.number) else { return };
        let mut settled = 0;
        for member in &run.members {
            if let Some(place) = taken.places.get_mut(member.place as usize) {
                settled += usize::from(!std::mem::replace(&mut place.settled, true));
            }
        }
        taken.open -= settled;
        if taken.open == 0 {
            self.pulls.remove(&run.pulled.number);
        }
        self.ledger.in_flight -= settled as u64;
        if success {
            self.ledger.succeeded += settled as u64;
        } else {
            self.ledger.failed += settled as u64;
        }
    }

    /// Ends it: what is not settled by now is returned, in the order in which
    /// it was accepted.
    pub(crate) fn close(&mut self) -> Vec<Message> {
        self.closed = true;
        self.ledger.returned += self.ledger.in_flight;
        self.ledger.in_flight = 0;
        std::mem::take(&mut self.pulls).into_values().flat_map(Taken::unsettled).collect()
    }

    pub(crate) fn ledger(&self) -> PipelineLedger {
        self.ledger
    }

    /// When the oldest message in flight was accepted.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.pulls.first_key_value().map(|(_, taken)| taken.at)
    }

    fn place(&mut self, ticket: &Ticket) -> Option<&mut Place> {
        self.pulls.get_mut(&ticket.pulled.number)?.place(ticket.place)
    }
}

impl Taken {
    fn place(&mut self, place: u32) -> Option<&mut Place> {
        self.places.get_mut(place as usize).filter(|place| !place.settled)
    }

    fn claim(&mut self, place: u32) -> Option<Claim> {
        let place = self.place(place)?;
        if std::mem::replace(&mut place.claimed, true) {
            return None;
        }
        Some(if place.acknowledged { Claim::Acknowledged } else { Claim::Fresh })
    }

    fn unsettled(self) -> Vec<Message> {
        let of = self.places.iter().zip(&self.pulled.messages);
        of.filter(|(place, _)| !place.settled).map(|(_, message)| message.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock::Clock;
    use crate::message::{BlockBuilder, Payload};
    use crate::threads::pipeline::chunk::Chunk;

    fn taken(register: &mut Register, count: u64) -> Vec<Ticket> {
        let now = Clock::real().now();
        let mut block = BlockBuilder::new(0, 0, now);
        (1..=count).for_each(|n| block.push(Payload::Text("a"), n, None));
        let pulled = register.accept(now, 0, block.finish().collect()).unwrap();
        let chunk = Chunk::range(&pulled, 0..count as u32);
        (0..chunk.len()).map(|row| chunk.ticket(row)).collect()
    }

    fn settle(register: &mut Register, ticket: &Ticket, success: bool) {
        Run::of([ticket.clone()]).iter().for_each(|run| register.settle(run, success));
    }

    #[test]
    fn a_message_is_settled_by_whoever_claimed_it_first_and_once() {
        let mut register = Register::default();
        let tickets = taken(&mut register, 2);
        assert_eq!(register.claim(&tickets[0]), Some(Claim::Fresh));
        assert_eq!(register.claim(&tickets[0]), None);
        settle(&mut register, &tickets[0], true);
        settle(&mut register, &tickets[0], false);
        assert_eq!(register.claim(&tickets[0]), None);
        assert!(register.acknowledge(&tickets[1]) && !register.acknowledge(&tickets[1]));
        assert_eq!(register.claim(&tickets[1]), Some(Claim::Acknowledged));
        settle(&mut register, &tickets[1], false);
        let ledger = register.ledger();
        assert_eq!((ledger.succeeded, ledger.failed, ledger.in_flight), (1, 1, 0));
        assert!(register.pulls.is_empty() && register.oldest().is_none());
    }

    #[test]
    fn of_a_run_those_are_claimed_that_nobody_else_settles() {
        let mut register = Register::default();
        let tickets = taken(&mut register, 4);
        register.claim(&tickets[0]);
        register.acknowledge(&tickets[2]);
        let mut run = Run::of(tickets).remove(0);
        let early: Vec<u32> = register.claim_run(&mut run).iter().map(|m| m.place).collect();
        let fresh: Vec<u32> = run.members.iter().map(|member| member.place).collect();
        assert_eq!((fresh, early), (vec![1, 3], vec![2]));
        assert!(register.claim_run(&mut run).is_empty() && run.members.is_empty());
    }

    #[test]
    fn what_is_not_settled_at_the_end_is_returned_in_order_and_final() {
        let mut register = Register::default();
        let (first, second) = (taken(&mut register, 2), taken(&mut register, 2));
        register.claim(&second[0]);
        register.claim(&first[0]);
        settle(&mut register, &first[0], true);
        let sequences: Vec<u64> =
            register.close().iter().map(|message| message.metadata().sequence).collect();
        assert_eq!(sequences, [2, 1, 2], "one that is being settled is not settled");
        settle(&mut register, &second[0], true);
        assert_eq!(register.claim(&first[1]), None);
        let ledger = register.ledger();
        assert_eq!((ledger.succeeded, ledger.returned), (1, 3));
        assert!(ledger.balanced());
        let messages = vec![first[0].message().clone()];
        assert!(register.accept(Clock::real().now(), 0, messages).is_none());
    }
}
