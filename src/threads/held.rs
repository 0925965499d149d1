//! What the queue has no room for, and how it outlives the thread that read it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::queue::{Offer, Queue};
use crate::handler::Resume;
use crate::message::Block;

/// Blocks that one connection holds back while there is no room.
pub(crate) const MAX_HELD: usize = 16;

/// The blocks of a connection that wait for room in the queue, in their order.
/// Nothing is read until they are gone, which may be in a later epoch or on a
/// later thread.
#[derive(Debug, Default)]
pub(crate) struct Held(VecDeque<Block>);

/// What a connection's thread leaves when it ends.
#[derive(Debug, Default)]
pub(crate) struct Left {
    /// The last message received, for the next session.
    pub(crate) resume: Option<Resume>,
    pub(crate) held: Held,
    /// Nothing more is to be read before the close.
    pub(crate) quiet: bool,
}

/// Where it lies until the next thread takes it over; meanwhile the monitor offers
/// what is held. The lock is held for bookkeeping only.
#[derive(Debug, Default)]
pub(crate) struct Estate(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    left: Left,
    /// No thread will take anything over.
    closed: bool,
}

impl Held {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it takes no more.
    pub(crate) fn is_full(&self) -> bool {
        self.0.len() >= MAX_HELD
    }

    /// Takes a block, for which there must be a place.
    pub(crate) fn push(&mut self, block: Block) {
        debug_assert!(!self.is_full(), "more is held than the queue has spare slots for");
        self.0.push_back(block);
    }

    /// Hands over what there is room for, in its order; how many messages were
    /// shed, which those of a client that has ended are.
    pub(crate) fn offer(&mut self, queue: &Queue) -> usize {
        let mut all_shed = 0;
        while let Some(block) = self.0.pop_front() {
            match queue.offer_again(block) {
                Offer::Held(block) => {
                    self.0.push_front(block);
                    break;
                }
                Offer::Done { shed, .. } | Offer::Disconnect { shed } => all_shed += shed,
            }
        }
        all_shed
    }

    /// Hands over everything, room or not: for the last time of this connection,
    /// or the queue would run out of slots for it.
    pub(crate) fn release(&mut self, queue: &Queue) -> usize {
        self.0.drain(..).map(|block| queue.offer_last(block)).sum()
    }
}

impl Estate {
    /// Takes over what is there.
    pub(crate) fn take(&self) -> Left {
        std::mem::take(&mut self.lock().left)
    }

    /// Offers what is held, as long as no thread does; how many messages were shed,
    /// and whether that was the rest of it.
    pub(crate) fn offer(&self, queue: &Queue) -> (usize, bool) {
        let held = &mut self.lock().left.held;
        let some = !held.is_empty();
        (held.offer(queue), some && held.is_empty())
    }

    /// Leaves it to whoever comes next; if nobody will, what is held comes back.
    pub(crate) fn leave(&self, left: Left) -> Result<(), Held> {
        let mut state = self.lock();
        if state.closed {
            return Err(left.held);
        }
        state.left = left;
        Ok(())
    }

    /// No thread follows: what is held is the caller's to release, and what comes
    /// later is refused.
    pub(crate) fn close(&self) -> Held {
        let mut state = self.lock();
        state.closed = true;
        std::mem::take(&mut state.left.held)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::io::clock::Clock;
    use crate::logic::overflow::Overflow;
    use crate::message::{BlockBuilder, Payload};
    use crate::threads::inbox::{Inbox, OutboxLimits};
    use crate::threads::monitor::MonitorAlarm;
    use crate::threads::queue::QueuePolicy;

    /// A queue for one message, and for those that its connection holds.
    fn queue() -> Queue {
        let inbox = Arc::new(Inbox::new(OutboxLimits { messages: 1, bytes: 1 }));
        let policy = QueuePolicy { messages: 1, bytes: 1 << 20, overflow: Overflow::Block };
        let monitor = MonitorAlarm(crossbeam_channel::bounded(1).0);
        Queue::new(policy, None, vec![inbox], monitor)
    }

    /// Reads a message, which is held if there is no room.
    fn read(queue: &Queue, held: &mut Held, sequence: u64) {
        let now = Clock::real().now();
        let mut block = BlockBuilder::new(0, 1, now);
        block.push(Payload::Text("x"), sequence, None);
        match queue.offer(block, 0, !held.is_empty(), now) {
            Offer::Held(block) => held.push(block),
            done => assert!(matches!(done, Offer::Done { shed: 0, .. }), "{done:?}"),
        }
    }

    fn take(queue: &Queue) -> Option<u64> {
        queue.try_recv().ok().map(|message| message.metadata().sequence)
    }

    #[test]
    fn what_is_held_passes_through_the_estate_in_its_order() {
        let (queue, estate) = (queue(), Estate::default());
        let mut held = Held::default();
        (1..=3).for_each(|n| read(&queue, &mut held, n));
        estate.leave(Left { held, ..Left::default() }).unwrap();
        let mut held = estate.take().held;
        assert!(estate.take().held.is_empty(), "it is taken over once");
        read(&queue, &mut held, 4);
        assert_eq!(held.offer(&queue), 0);
        assert!(!held.is_empty(), "there is no room yet");
        for n in 1..=4 {
            assert_eq!(take(&queue), Some(n));
            assert_eq!(held.offer(&queue), 0);
        }
        assert!(held.is_empty());
        assert_eq!(take(&queue), None);
    }

    #[test]
    fn a_full_hold_finds_its_slots_when_nobody_follows() {
        let (queue, estate) = (queue(), Estate::default());
        let mut held = Held::default();
        let all = MAX_HELD as u64 + 1;
        (1..=all).for_each(|n| read(&queue, &mut held, n));
        assert!(held.is_full());
        estate.leave(Left { held, ..Left::default() }).unwrap();
        assert_eq!(estate.close().release(&queue), 0);
        let got: Vec<_> = std::iter::from_fn(|| take(&queue)).collect();
        assert_eq!(got, (1..=all).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_left_too_late_comes_back_and_is_counted_as_shed() {
        let (queue, estate) = (queue(), Estate::default());
        let mut held = Held::default();
        (1..=3).for_each(|n| read(&queue, &mut held, n));
        assert!(estate.close().is_empty());
        queue.close();
        let mut held = estate.leave(Left { held, ..Left::default() }).unwrap_err();
        assert_eq!(held.release(&queue), 2);
        let (ledger, dropped) = queue.ledger();
        assert!(ledger.balanced(), "{ledger}");
        assert_eq!((ledger.in_flight, dropped.closed), (1, 2));
    }
}
