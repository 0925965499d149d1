//! The workers of one stage, and what each has in hand.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::chunk::{Chunk, End, Run};
use super::lock;
use super::stats::WorkerStats;
use crate::message::{Message, Metadata};
use crate::work::{Failure, Ticket};

/// The workers that a stage should have. Those that are no longer in it end
/// when their hands are empty; the supervisor starts those that are new.
#[derive(Debug)]
pub(crate) struct Pool {
    prefix: String,
    /// Its workers handle batches, not messages.
    has_batches: bool,
    slots: Mutex<Vec<Arc<Slot>>>,
}

/// What one worker thread has in hand, and what is counted of it. It outlives
/// the thread.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: String,
    /// Its place in the pool.
    pub(crate) index: usize,
    /// What it has in hand is past the processors.
    pub(crate) has_batches: bool,
    hand: Mutex<Hand>,
    pub(crate) stats: WorkerStats,
    /// Dropped to retire the worker.
    retire: Mutex<Option<Sender<()>>>,
    pub(crate) retired: Receiver<()>,
}

#[derive(Debug, Default)]
pub(crate) struct Hand {
    /// What a processor works on.
    chunk: Option<Arc<Chunk>>,
    /// Rows of the chunk below this one have an end, and are settled if it was
    /// success.
    settled: usize,
    /// When the chunk's next row is due, if it was held for another try.
    held_until: Option<Instant>,
    /// The batch that was begun.
    batch: Vec<Run>,
    stint: Option<Stint>,
    /// Finished, and not settled; of a processor, what its chunk does not have.
    succeeded: Vec<Run>,
    failed: Vec<(Ticket, Failure)>,
}

/// A time that a worker spends in the handler. While handlers take microseconds
/// it is that of several messages, one after the other: looking at the clock
/// would take longer than many of them do.
#[derive(Debug)]
struct Stint {
    since: Instant,
    /// The first row of the chunk in it.
    first: usize,
    /// A later row that somebody found in the handler, and when first.
    seen: Option<(usize, Instant)>,
    /// The row that was reported as slow.
    told: Option<usize>,
}

impl Pool {
    /// `count` workers, whose threads are named `prefix` and a number.
    pub(crate) fn new(prefix: String, count: usize, has_batches: bool) -> Self {
        let pool = Self { prefix, has_batches, slots: Mutex::default() };
        pool.resize(count);
        pool
    }

    pub(crate) fn slots(&self) -> Vec<Arc<Slot>> {
        lock(&self.slots).clone()
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.slots).len()
    }

    pub(crate) fn resize(&self, count: usize) {
        let mut slots = lock(&self.slots);
        while slots.len() > count {
            if let Some(slot) = slots.pop() {
                lock(&slot.retire).take();
            }
        }
        for index in slots.len()..count {
            slots.push(Slot::new(format!("{}-{index}", self.prefix), index, self.has_batches));
        }
    }
}

impl Slot {
    fn new(name: String, index: usize, has_batches: bool) -> Arc<Self> {
        let (retire, retired) = bounded(0);
        Arc::new(Self {
            name,
            index,
            has_batches,
            hand: Mutex::default(),
            stats: WorkerStats::default(),
            retire: Mutex::new(Some(retire)),
            retired,
        })
    }

    pub(crate) fn is_retired(&self) -> bool {
        lock(&self.retire).is_none()
    }

    /// The chunk in hand.
    pub(crate) fn chunk(&self) -> Option<Arc<Chunk>> {
        lock(&self.hand).chunk.clone()
    }

    pub(crate) fn take_up(&self, chunk: Chunk) {
        let mut hand = lock(&self.hand);
        hand.chunk = Some(Arc::new(chunk));
        hand.settled = 0;
    }

    /// Notes what is in the handler's hands, in case the thread dies with it.
    pub(crate) fn begin_batch(&self, messages: Vec<Run>, now: Instant) {
        lock(&self.hand).batch = messages;
        self.enter(now);
    }

    /// The worker goes on to the handler, with the chunk's next row or a batch.
    pub(crate) fn enter(&self, now: Instant) {
        let mut hand = lock(&self.hand);
        let first = hand.chunk.as_ref().map_or(0, |chunk| chunk.begun());
        hand.stint = Some(Stint { since: now, first, seen: None, told: None });
    }

    /// The handler has returned.
    pub(crate) fn leave(&self, started: Instant, now: Instant) {
        let busy = now.saturating_duration_since(started).as_nanos();
        self.stats.busy_nanos.add(u64::try_from(busy).unwrap_or(u64::MAX));
        lock(&self.hand).stint = None;
    }

    /// A row of the chunk has failed for good.
    pub(crate) fn fail(&self, chunk: &Chunk, row: usize, ticket: Ticket, failure: Failure) {
        let mut hand = lock(&self.hand);
        chunk.end(row, End::Gone);
        hand.failed.push((ticket, failure));
    }

    /// A row of the chunk has failed, and is begun again at `due`.
    pub(crate) fn hold(&self, chunk: &Chunk, row: usize, due: Instant) {
        let mut hand = lock(&self.hand);
        chunk.hold(row);
        hand.held_until = Some(due);
    }

    /// Until when a row of the chunk was held last.
    pub(crate) fn held_until(&self) -> Option<Instant> {
        lock(&self.hand).held_until
    }

    /// The batch has succeeded.
    pub(crate) fn finish_good_batch(&self) {
        let mut hand = lock(&self.hand);
        let succeeded = std::mem::take(&mut hand.batch);
        hand.succeeded.extend(succeeded);
    }

    /// The batch has its outcomes.
    pub(crate) fn finish_batch(&self, succeeded: Vec<Run>, failed: Vec<(Ticket, Failure)>) {
        let mut hand = lock(&self.hand);
        hand.batch.clear();
        hand.succeeded.extend(succeeded);
        hand.failed.extend(failed);
    }

    /// Takes what is finished, to be settled, and lets go of a chunk that is.
    pub(crate) fn take_finished(&self) -> (Vec<Run>, Vec<(Ticket, Failure)>) {
        let mut hand = lock(&self.hand);
        let mut succeeded = std::mem::take(&mut hand.succeeded);
        if let Some(chunk) = hand.chunk.clone() {
            hand.settled = chunk.take_done(hand.settled, &mut succeeded);
            if hand.settled == chunk.len() {
                hand.chunk = None;
            }
        }
        (succeeded, std::mem::take(&mut hand.failed))
    }

    /// Whether something is finished and not settled.
    pub(crate) fn has_finished(&self) -> bool {
        let hand = lock(&self.hand);
        let done = hand.chunk.as_ref().is_some_and(|chunk| chunk.has_done(hand.settled));
        done || !hand.succeeded.is_empty() || !hand.failed.is_empty()
    }

    /// The thread has died: what it had begun fails so. What it had only taken
    /// stays in its hand, for its successor, who also settles.
    pub(crate) fn bury(&self, failure: impl Fn() -> Failure) {
        let mut hand = lock(&self.hand);
        hand.stint = None;
        let batch = std::mem::take(&mut hand.batch);
        let mut begun: Vec<Ticket> = batch.iter().flat_map(Run::tickets).collect();
        if let Some(chunk) = &hand.chunk
            && let Some(row) = chunk.current()
        {
            chunk.end(row, End::Gone);
            begun.push(chunk.ticket(row));
        }
        hand.failed.extend(begun.into_iter().map(|ticket| (ticket, failure())));
    }

    /// How long the worker has been in the handler: with one message, or with
    /// several while these take microseconds.
    pub(crate) fn running_for(&self, now: Instant) -> Option<Duration> {
        let hand = lock(&self.hand);
        hand.stint.as_ref().map(|stint| now.saturating_duration_since(stint.since))
    }

    /// The message that has been in the handler for `timeout` or longer, told
    /// once. One that was not the first of its stint counts from when it was
    /// first found there.
    pub(crate) fn slow(
        &self,
        now: Instant,
        timeout: Duration,
    ) -> Option<(Option<Metadata>, Duration)> {
        let mut hand = lock(&self.hand);
        let Hand { chunk, batch, stint, .. } = &mut *hand;
        let stint = stint.as_mut()?;
        let row = match chunk {
            Some(chunk) => chunk.current()?,
            None => stint.first,
        };
        let running_for = now.saturating_duration_since(stint.since_when(row, now));
        if running_for < timeout || stint.told == Some(row) {
            return None;
        }
        stint.told = Some(row);
        let message = match chunk {
            Some(chunk) => Some(chunk.message(row)),
            None => batch.first().and_then(|run| run.messages().next()),
        };
        Some((message.map(Message::metadata), running_for))
    }
}

impl Stint {
    fn since_when(&mut self, row: usize, now: Instant) -> Instant {
        match self.seen {
            _ if row == self.first => self.since,
            Some((seen, at)) if seen == row => at,
            _ => {
                self.seen = Some((row, now));
                now
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock::Clock;
    use crate::message::{BlockBuilder, Payload};
    use crate::work::{FailureKind, Pulled};
    use std::sync::OnceLock;

    /// A worker with as many messages in hand, numbered from 1.
    fn worker(count: u64) -> (Arc<Slot>, Arc<Chunk>) {
        let mut block = BlockBuilder::new(0, 0, Clock::real().now());
        (1..=count).for_each(|n| block.push(Payload::Text("a"), n, None));
        let messages: Vec<Message> = block.finish().collect();
        let pulled = Pulled { number: 0, source: 0, messages, partitions: OnceLock::new() };
        let slot = Slot::new("worker".to_owned(), 0, false);
        slot.take_up(Chunk::range(&Arc::new(pulled), 0..u32::try_from(count).unwrap()));
        let chunk = slot.chunk().unwrap();
        (slot, chunk)
    }

    #[test]
    fn a_message_is_told_once_as_slow_and_never_for_the_time_of_those_before_it() {
        let (slot, chunk) = worker(3);
        let (start, timeout) = (Clock::real().now(), Duration::from_millis(10));
        let at = |ms| start + Duration::from_millis(ms);
        let slow = |ms| {
            let told = slot.slow(at(ms), timeout)?;
            Some((told.0.unwrap().sequence, told.1.as_millis()))
        };
        slot.enter(start);
        let row = chunk.begin().unwrap();
        assert_eq!((slow(9), slow(15), slow(20)), (None, Some((1, 15)), None));
        chunk.end(row, End::Done);
        let row = chunk.begin().unwrap();
        assert_eq!((slow(25), slow(30), slow(35)), (None, None, Some((2, 10))));
        assert_eq!(slot.running_for(at(35)), Some(Duration::from_millis(35)));
        chunk.end(row, End::Done);
        slot.leave(start, at(40));
        assert_eq!((slow(90), slot.running_for(at(90))), (None, None));
    }

    #[test]
    fn a_dead_workers_message_fails_and_what_it_finished_and_did_not_begin_stays() {
        let (slot, chunk) = worker(3);
        slot.enter(Clock::real().now());
        let row = chunk.begin().unwrap();
        chunk.end(row, End::Done);
        chunk.begin();
        slot.bury(|| Failure::of(FailureKind::WorkerDied, "dead", false));
        assert!(slot.has_finished());
        let (succeeded, failed) = slot.take_finished();
        let sequence = |message: &Message| message.metadata().sequence;
        assert_eq!(succeeded[0].messages().map(sequence).collect::<Vec<_>>(), [1]);
        assert_eq!((failed.len(), sequence(failed[0].0.message())), (1, 2));
        assert_eq!(slot.chunk().unwrap().begin(), Some(2), "its successor goes on there");
        assert!(!slot.has_finished());
    }
}
