//! The way from connections to consumers: dedup, ledger, and the bounded queue
//! of blocks.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::held::MAX_HELD;
use super::inbox::Inbox;
use super::monitor::MonitorAlarm;
use super::timer::Alarm;
use crate::logic::dedup::{Dedup, Processing};
use crate::logic::ledger::Books;
use crate::logic::overflow::{Decision, Overflow, Room, decide};
use crate::message::{Account, Block, BlockBuilder, MessageId};
use crate::metrics::{Counter, DropReason, Dropped, Ledger};

/// Limits of the queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueuePolicy {
    pub(crate) messages: usize,
    pub(crate) bytes: usize,
    pub(crate) overflow: Overflow,
}

impl QueuePolicy {
    /// Messages of one block. To hand one over wakes a thread, which should be
    /// shared by many; where blocks are shed they are small against the queue, so
    /// that no more goes than must.
    pub(crate) fn block_messages(&self) -> usize {
        // A connection that waits for room wakes for a quarter of the queue.
        let share = if self.overflow == Overflow::Block { 4 } else { 8 };
        (self.messages / share).clamp(1, 4096)
    }
}

/// The queue, and the books about what goes through it. Connections offer
/// blocks; consumers take messages. Locks are held for bookkeeping only.
pub(crate) struct Queue {
    policy: QueuePolicy,
    /// `None` once closed: a connection that hangs cannot keep consumers waiting.
    sender: Mutex<Option<Sender<Block>>>,
    pub(super) receiver: Receiver<Block>,
    intake: Mutex<Intake>,
    gate: Arc<Gate>,
    pub(super) opened: Mutex<VecDeque<Block>>,
    /// Says that `opened` holds messages, to consumers that wait.
    pub(super) nudge: (Sender<()>, Receiver<()>),
    pub(super) waiting: AtomicUsize,
    pub(crate) without_id: Counter,
}

/// What is decided under one lock, once for each block.
#[derive(Debug)]
struct Intake {
    books: Books,
    dedup: Option<Dedup>,
    /// Messages and bytes pushed, ever, less those shed from the queue.
    pushed: u64,
    pushed_bytes: u64,
}

/// What consumers count, and whom they wake.
struct Gate {
    delivered: AtomicU64,
    freed_bytes: AtomicU64,
    /// Connections that wait for room, wake when `delivered` gets here.
    wake_at: AtomicU64,
    waits_for_bytes: AtomicBool,
    readers: Vec<Arc<Inbox>>,
    /// Stands in for a connection that has no thread at the moment.
    monitor: MonitorAlarm,
}

/// What became of a block that was offered.
#[derive(Debug)]
pub(crate) enum Offer {
    /// It is accounted for; this many of its messages were shed.
    Done { shed: usize, reason: DropReason },
    /// There is no room: stop reading and offer it again when woken.
    Held(Block),
    /// The connection must end; this many messages were shed.
    Disconnect { shed: usize },
}

/// Why no message came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoMessage {
    /// None by the deadline.
    Timeout,
    /// None will ever come.
    Ended,
}

const NOBODY: u64 = u64::MAX;

impl Queue {
    pub(crate) fn new(
        policy: QueuePolicy,
        dedup: Option<Dedup>,
        readers: Vec<Arc<Inbox>>,
        monitor: MonitorAlarm,
    ) -> Self {
        // No queued block is empty, so `messages` slots hold whatever the limit
        // admits; the others are room for what each connection holds when the
        // client closes.
        let (sender, receiver) = bounded(policy.messages + MAX_HELD * readers.len());
        let gate = Gate {
            delivered: AtomicU64::new(0),
            freed_bytes: AtomicU64::new(0),
            wake_at: AtomicU64::new(NOBODY),
            waits_for_bytes: AtomicBool::new(false),
            readers,
            monitor,
        };
        Self {
            policy,
            sender: Mutex::new(Some(sender)),
            receiver,
            intake: Mutex::new(Intake {
                books: Books::default(),
                dedup,
                pushed: 0,
                pushed_bytes: 0,
            }),
            gate: Arc::new(gate),
            opened: Mutex::default(),
            nudge: bounded(1),
            waiting: AtomicUsize::new(0),
            without_id: Counter::default(),
        }
    }

    /// Takes in what a connection read in one turn: enters it into the books,
    /// drops duplicates, and queues the rest. A block that comes `behind` one
    /// that is held is held as well.
    pub(crate) fn offer(
        &self,
        mut block: BlockBuilder,
        skipped: u64,
        behind: bool,
        now: Instant,
    ) -> Offer {
        let mut intake = self.intake();
        let all = block.len();
        if let Some(dedup) = &mut intake.dedup {
            let mut without = 0;
            block.retain(|ids| {
                // Zero, which is no id, is never usual.
                let hash = |id: &Option<MessageId>| id.map_or(0, MessageId::to_u128);
                dedup.touch(ids, hash);
                let (mut at, mut duplicates) = (0, 0);
                while at < ids.len() {
                    at += dedup.accept_usual(ids[at..].iter().map(hash));
                    match ids.get(at) {
                        Some(Some(id)) => {
                            duplicates |= u64::from(!dedup.accept_next(id.to_u128(), now)) << at;
                        }
                        Some(None) => without += 1,
                        None => {}
                    }
                    at += 1;
                }
                duplicates
            });
            self.without_id.add(without);
        }
        let fresh = block.len();
        intake.books.offered(fresh as u64, (all - fresh) as u64);
        intake.books.skipped(skipped);
        if fresh == 0 {
            return Offer::Done { shed: 0, reason: DropReason::Closed };
        }
        if behind {
            return Offer::Held(block.finish());
        }
        self.admit(&mut intake, block.finish())
    }

    /// Offers a held block again.
    pub(crate) fn offer_again(&self, block: Block) -> Offer {
        self.admit(&mut self.intake(), block)
    }

    /// Queues a held block of a client that closes, room or not; how many of its
    /// messages came too late for that.
    pub(crate) fn offer_last(&self, block: Block) -> usize {
        self.push(&mut self.intake(), block)
    }

    /// Sheds a block that is not even held.
    pub(crate) fn turn_away(&self, block: Block, reason: DropReason) -> usize {
        shed(&mut self.intake(), block, reason)
    }

    fn admit(&self, intake: &mut Intake, mut block: Block) -> Offer {
        let bytes = block.bytes();
        match decide(self.policy.overflow, self.room(intake), block.len(), bytes) {
            Decision::Push => pushed(self.push(intake, block)),
            Decision::Hold => self.hold(intake, block),
            Decision::DropOldest { messages, bytes } => {
                let shed = self.drop_oldest(intake, messages, bytes);
                match self.push(intake, block) {
                    0 => Offer::Done { shed, reason: DropReason::Oldest },
                    late => pushed(late),
                }
            }
            Decision::Split { keep } => {
                let rest = block.split_off(keep);
                let shed = shed(intake, rest, DropReason::Newest);
                match self.push(intake, block) {
                    0 => Offer::Done { shed, reason: DropReason::Newest },
                    late => pushed(late),
                }
            }
            Decision::Disconnect { keep } => {
                let rest = block.split_off(keep);
                let shed = shed(intake, rest, DropReason::Disconnect);
                self.push(intake, block);
                Offer::Disconnect { shed }
            }
        }
    }

    /// Asks consumers for a wake-up. Room that came meanwhile is seen by the
    /// second look, and a consumer that comes after it sees the wish.
    fn hold(&self, intake: &mut Intake, block: Block) -> Offer {
        // A quarter of the queue is let go before reading starts again, or the
        // connection would wake for each message taken.
        let room = (self.policy.messages - self.policy.messages / 4) as u64;
        let fits = (self.policy.messages as u64).saturating_sub(block.len() as u64);
        let target = intake.pushed.saturating_sub(room.min(fits));
        self.gate.wake_at.fetch_min(target, SeqCst);
        self.gate.waits_for_bytes.store(true, SeqCst);
        let now = self.room(intake);
        match decide(self.policy.overflow, now, block.len(), block.bytes()) {
            Decision::Push => pushed(self.push(intake, block)),
            _ => Offer::Held(block),
        }
    }

    /// Queues a block, or sheds it if it comes too late; how many messages it shed.
    fn push(&self, intake: &mut Intake, block: Block) -> usize {
        let (len, bytes) = (block.len(), block.bytes());
        if len == 0 {
            return 0;
        }
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(sender) = sender.as_ref() else { return shed(intake, block, DropReason::Closed) };
        // A block that enters the queue counts as delivered when it is dropped.
        match sender.try_send(block.with_account(self.gate.clone())) {
            Ok(()) => {
                intake.pushed += len as u64;
                intake.pushed_bytes += bytes as u64;
                0
            }
            Err(error) => shed(intake, error.into_inner().without_account(), DropReason::Closed),
        }
    }

    fn drop_oldest(&self, intake: &mut Intake, messages: usize, bytes: usize) -> usize {
        let (mut gone, mut gone_bytes) = (0, 0);
        while gone < messages || gone_bytes < bytes {
            // Consumers may have emptied it meanwhile.
            let Ok(block) = self.receiver.try_recv() else { break };
            gone_bytes += block.bytes();
            intake.pushed -= block.len() as u64;
            gone += shed(intake, block, DropReason::Oldest);
        }
        gone
    }

    fn room(&self, intake: &Intake) -> Room {
        let delivered = self.gate.delivered.load(SeqCst);
        let freed = self.gate.freed_bytes.load(SeqCst);
        Room {
            queued: to_usize(intake.pushed.saturating_sub(delivered)),
            capacity: self.policy.messages,
            queued_bytes: to_usize(intake.pushed_bytes.saturating_sub(freed)),
            capacity_bytes: self.policy.bytes,
        }
    }

    /// A message was processed; a redelivery stays a duplicate.
    pub(crate) fn done(&self, id: MessageId) {
        if let Some(dedup) = &mut self.intake().dedup {
            dedup.done(id.to_u128());
        }
    }

    /// A message failed; a redelivery is accepted.
    pub(crate) fn forget(&self, id: MessageId) -> bool {
        self.intake().dedup.as_mut().is_some_and(|dedup| dedup.forget(id.to_u128()))
    }

    /// What became of messages, under one lock for some of them: an uncontended
    /// one costs about as much as the table's own work for an id.
    pub(crate) fn settled(&self, ids: &mut dyn Iterator<Item = MessageId>, success: bool) {
        let mut group = [0; 32];
        loop {
            let mut count = 0;
            for (place, id) in group.iter_mut().zip(&mut *ids) {
                *place = id.to_u128();
                count += 1;
            }
            if count == 0 {
                return;
            }
            let mut intake = self.intake();
            let Some(dedup) = &mut intake.dedup else { return };
            // Their lines were touched long ago: the waits for them overlap. Of those
            // in the order of their arrival no line is needed.
            if !(success && dedup.is_done_next(group[0])) {
                dedup.touch(&group[..count], |id| *id);
            }
            for id in &group[..count] {
                if success {
                    dedup.done(*id);
                } else {
                    dedup.forget(*id);
                }
            }
        }
    }

    pub(crate) fn processing(&self, id: MessageId, now: Instant) -> Option<Processing> {
        self.intake().dedup.as_ref()?.state(id.to_u128(), now)
    }

    /// The books at one instant: while the lock is held nothing is accepted or
    /// shed, and only what was accepted before can be delivered.
    pub(crate) fn ledger(&self) -> (Ledger, Dropped) {
        let intake = self.intake();
        let delivered = self.gate.delivered.load(SeqCst);
        let books = &intake.books;
        let dropped = Dropped {
            oldest: books.dropped_by(DropReason::Oldest),
            newest: books.dropped_by(DropReason::Newest),
            disconnect: books.dropped_by(DropReason::Disconnect),
            closed: books.dropped_by(DropReason::Closed),
        };
        (books.ledger(delivered), dropped)
    }

    /// No block is taken any more; consumers end when they have had the rest.
    pub(crate) fn close(&self) {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Throws away what nobody will receive any more; it stays in flight.
    pub(crate) fn abandon(&self) -> usize {
        let opened: Vec<Block> = self.opened().drain(..).collect();
        opened.into_iter().chain(self.receiver.try_iter()).map(Block::discard).sum()
    }

    pub(crate) fn receiver(&self) -> &Receiver<Block> {
        &self.receiver
    }

    fn intake(&self) -> MutexGuard<'_, Intake> {
        self.intake.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate {
    /// Apart from what is done for each message.
    #[cold]
    #[inline(never)]
    fn wake(&self) {
        // Each is told, whoever listens.
        let deaf = self.readers.iter().filter(|inbox| !inbox.post_room()).count();
        if deaf > 0 {
            self.monitor.fire();
        }
    }
}

impl Account for Gate {
    fn delivered(&self, count: usize) {
        let delivered = self.delivered.fetch_add(count as u64, SeqCst) + count as u64;
        if delivered >= self.wake_at.load(SeqCst) && self.wake_at.swap(NOBODY, SeqCst) != NOBODY {
            self.wake();
        }
    }

    fn freed(&self, bytes: usize) {
        self.freed_bytes.fetch_add(bytes as u64, SeqCst);
        if self.waits_for_bytes.load(SeqCst) && self.waits_for_bytes.swap(false, SeqCst) {
            self.wake();
        }
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Sheds what is left of a block: its ids are forgotten, so that a redelivery
/// is accepted.
fn shed(intake: &mut Intake, block: Block, reason: DropReason) -> usize {
    forget(intake, &block);
    let count = block.discard();
    intake.books.shed(reason, count as u64);
    count
}

/// What became of a block that was pushed: `late` of its messages came too late.
fn pushed(late: usize) -> Offer {
    Offer::Done { shed: late, reason: DropReason::Closed }
}

fn forget(intake: &mut Intake, block: &Block) {
    if let Some(dedup) = &mut intake.dedup {
        block.ids().for_each(|id| {
            dedup.forget(id.to_u128());
        });
    }
}

fn to_usize(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock::Clock;
    use crate::message::Payload;
    use crate::threads::inbox::OutboxLimits;

    fn queue(messages: usize, overflow: Overflow) -> Queue {
        let inbox = Arc::new(Inbox::new(OutboxLimits { messages: 1, bytes: 1 }));
        let policy = QueuePolicy { messages, bytes: 1 << 20, overflow };
        Queue::new(policy, None, vec![inbox], MonitorAlarm(bounded(1).0))
    }

    fn block(messages: u64) -> BlockBuilder {
        let mut block = BlockBuilder::new(0, 1, Clock::real().now());
        (1..=messages).for_each(|n| block.push(Payload::Text("x"), n, None));
        block
    }

    #[test]
    fn what_comes_after_the_end_is_dropped_and_not_delivered() {
        let queue = queue(10, Overflow::Block);
        let now = Clock::real().now();
        assert!(matches!(queue.offer(block(2), 0, false, now), Offer::Done { shed: 0, .. }));
        queue.close();
        assert!(matches!(queue.offer(block(3), 0, false, now), Offer::Done { shed: 3, .. }));
        let (ledger, dropped) = queue.ledger();
        assert!(ledger.balanced(), "{ledger}");
        assert_eq!((ledger.delivered, ledger.in_flight, dropped.closed), (0, 2, 3));
    }
}
