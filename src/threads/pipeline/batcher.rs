//! A batcher's threads: one groups items into batches, workers handle them.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, never, select};

use super::chunk::Run;
use super::inbox::Inbox;
use super::pool::{Pool, Slot};
use super::stats::PipelineEvent;
use super::{Flow, Phase, Tick, count, lock};
use crate::logic::batch::{BatchPolicy, Batches, Ready};
use crate::metrics::{Counter, Gauge};
use crate::threads::timer::Alarm;
use crate::threads::{contained, contained_user};
use crate::work::{Batch, BatchEntry, Failure, FailureKind, Handler, Ticket, ToBatch, Trigger};

/// Closed batches that may wait for any worker, beside one for each. If there were
/// room for that one only, each batch would put one of two threads to sleep and wake
/// it, which takes longer than to handle a quick one.
const AHEAD: usize = 16;

/// Closed batches that may wait for the one worker that may take them. Their channels
/// take their memory when they are made.
const MOST_OWN: usize = 1024;

/// A user's function that weighs an item.
pub(crate) type Weigh<T> = Arc<dyn Fn(&T) -> usize + Send + Sync>;

/// What shares a batch: one key and, with partitions, one worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Group {
    key: Option<Arc<str>>,
    /// There are at most 4,096.
    worker: Option<u16>,
}

/// One item on its way into a batch: with a small one of the program's, it fills
/// one cache line.
pub(crate) struct Item<T> {
    group: Group,
    weight: usize,
    flush: bool,
    entry: BatchEntry<T>,
}

type Closed<T> = Ready<Group, BatchEntry<T>>;

/// Both ends of a queue that outlives the threads at them.
type Channel<T> = (Sender<T>, Receiver<T>);

/// A batcher's queues and open batches, which outlive its threads.
pub(crate) struct Batcher<T> {
    pub(crate) name: Arc<str>,
    /// Its place among the batchers, by name.
    pub(crate) index: usize,
    pub(crate) tick: Tick,
    pub(crate) workers: Pool,
    weigh: Option<Weigh<T>>,
    pub(crate) inbox: Inbox<Item<T>>,
    grouping: Mutex<Grouping<T>>,
    /// Batches that any worker may take, and those that one must.
    shared: Channel<Closed<T>>,
    /// Of the former, not many wait any more.
    room: Tick,
    own: Vec<Channel<Closed<T>>>,
    homes: Mutex<Homes>,
    /// Items out of the inbox that no worker has taken yet.
    grouped: Gauge,
    pub(crate) batches: [Counter; 5],
    pub(crate) batched: Counter,
}

/// What the grouping thread has in hand.
struct Grouping<T> {
    taken: VecDeque<Item<T>>,
    open: Batches<Group, BatchEntry<T>>,
}

/// Among how many workers the keys and partitions are shared out.
#[derive(Debug)]
struct Homes {
    count: usize,
    /// Some batch has such a home: the count must not change any more.
    settled: bool,
}

impl<T: Send + 'static> Batcher<T> {
    pub(crate) fn new(
        name: Arc<str>,
        policy: BatchPolicy,
        concurrency: usize,
        queue: usize,
        weigh: Option<Weigh<T>>,
    ) -> Self {
        Self {
            index: 0,
            tick: Tick::new(),
            workers: Pool::new(format!("broadsock-batch-{name}"), concurrency, true),
            weigh,
            inbox: Inbox::new(queue),
            grouping: Mutex::new(Grouping { taken: VecDeque::new(), open: Batches::new(policy) }),
            shared: bounded(concurrency + AHEAD),
            room: Tick::new(),
            // Long: a slow worker holds up others only when it is full.
            own: (0..concurrency).map(|_| bounded(queue.min(MOST_OWN))).collect(),
            homes: Mutex::new(Homes { count: concurrency, settled: false }),
            grouped: Gauge::default(),
            batches: std::array::from_fn(|_| Counter::new()),
            batched: Counter::new(),
            name,
        }
    }

    /// Items that no worker has taken yet.
    pub(crate) fn queued(&self) -> usize {
        self.inbox.len() + usize::try_from(self.grouped.get()).unwrap_or(0)
    }

    /// Makes an item of what a handler sends here.
    pub(crate) fn item<H: Handler<Item = T>>(
        &self,
        flow: &Flow<H>,
        ticket: Ticket,
        to: ToBatch<T>,
    ) -> Item<T> {
        let weight = self.weight(flow, &to.item);
        let worker = ticket.partition().or_else(|| to.key.as_ref().map(hash));
        let group = Group { worker: worker.map(|place| self.home(place)), key: to.key };
        let entry = BatchEntry { ticket, item: to.item };
        Item { group, weight, flush: to.flush, entry }
    }

    /// Queues an item; waits for room, and returns `false` when stopped first.
    pub(crate) fn push_or_stop<H: Handler<Item = T>>(
        &self,
        flow: &Flow<H>,
        mut item: Item<T>,
    ) -> bool {
        loop {
            select! {
                recv(self.inbox.room.receiver) -> _ => {}
                recv(flow.stop.signal) -> _ => {
                    flow.discard(item.entry.item);
                    return false;
                }
            }
            match self.inbox.push(item) {
                Ok(()) => break,
                Err(back) => item = back,
            }
        }
        self.inbox.pass_on_room();
        true
    }

    fn weight<H: Handler<Item = T>>(&self, flow: &Flow<H>, item: &T) -> usize {
        let Some(weigh) = &self.weigh else { return 1 };
        contained_user(|| weigh(item)).unwrap_or_else(|panic| {
            flow.panicked("batch size", panic);
            1
        })
    }

    /// The worker that must take the item's batch: order within a partition,
    /// and one worker at a time for each key, come from that.
    fn home(&self, place: u64) -> u16 {
        let mut homes = lock(&self.homes);
        homes.settled = true;
        u16::try_from(place % homes.count as u64).unwrap_or_default()
    }

    /// Changes the number of workers; `false` when batches belong to workers.
    pub(crate) fn resize(&self, workers: usize) -> bool {
        let mut homes = lock(&self.homes);
        if homes.settled {
            return false;
        }
        homes.count = workers.min(self.own.len());
        self.workers.resize(workers);
        true
    }

    /// Drops what waits here, when it has been returned.
    pub(crate) fn clear<H: Handler<Item = T>>(&self, flow: &Flow<H>) {
        let (open, taken) = {
            let mut grouping = lock(&self.grouping);
            (grouping.open.drain(), std::mem::take(&mut grouping.taken))
        };
        let own = self.own.iter().flat_map(|(_, receiver)| receiver.try_iter());
        let closed = open.into_iter().chain(self.shared.1.try_iter()).chain(own);
        let waiting =
            taken.into_iter().chain(self.inbox.take(VecDeque::new())).map(|item| item.entry);
        let entries = closed.flat_map(|closed| closed.items).chain(waiting);
        self.grouped.clear();
        for entry in entries {
            if let Err(panic) = contained(|| drop(entry)) {
                flow.panicked("Item::drop", panic);
            }
        }
    }
}

/// The body of the grouping thread.
pub(crate) fn run<H: Handler>(flow: &Arc<Flow<H>>, name: &Arc<str>) {
    let Some(batcher) = flow.batchers.get(name) else { return };
    // When the timer is known to wake it: it is not asked for each item again.
    let mut armed: Option<Instant> = None;
    while !flow.stop.is_set() {
        let (closed, is_idle) = batcher.group(flow.clock.now());
        if !batcher.emit(flow, closed) {
            return;
        }
        if !is_idle {
            continue;
        }
        // In the end, nothing waits for company that cannot come.
        if flow.is_upstream_empty() && batcher.inbox.len() == 0 {
            let closed = lock(&batcher.grouping).open.drain();
            if !batcher.emit(flow, closed) {
                return;
            }
        }
        let deadline = lock(&batcher.grouping).open.deadline();
        if let Some(at) = deadline
            && armed.is_none_or(|armed| at < armed)
        {
            flow.timer.arm(flow.batcher_owner(batcher.index), at);
            armed = Some(at);
        }
        select! {
            recv(batcher.inbox.filled.receiver) -> _ => {}
            recv(batcher.tick.receiver) -> _ => armed = None,
            recv(flow.stop.signal) -> _ => return,
        }
    }
}

impl<T: Send + 'static> Batcher<T> {
    /// Puts items into batches until that closes some; also says whether there
    /// was none to put.
    fn group(&self, now: Instant) -> (Vec<Closed<T>>, bool) {
        let mut grouping = lock(&self.grouping);
        let Grouping { taken, open } = &mut *grouping;
        if taken.is_empty() {
            *taken = self.inbox.take(std::mem::take(taken));
            self.grouped.add(count(taken.len()));
        }
        let is_idle = taken.is_empty();
        // What is overdue leaves as it is: nothing joins it any more.
        let mut closed = open.due(now);
        while closed.is_empty()
            && let Some(Item { group, weight, flush, entry }) = taken.pop_front()
        {
            open.push(now, group, entry, weight, flush, &mut closed);
        }
        (closed, is_idle)
    }

    /// Hands closed batches to workers; `false` when stopped first: what nobody
    /// took is returned.
    fn emit<H: Handler<Item = T>>(&self, flow: &Flow<H>, closed: Vec<Closed<T>>) -> bool {
        let mut closed = closed.into_iter();
        while let Some(batch) = closed.next() {
            let (len, trigger) = (batch.items.len(), batch.trigger);
            self.batches[place(trigger)].add(1);
            self.batched.add(len as u64);
            flow.emit(PipelineEvent::Batch { batcher: self.name.to_string(), len, trigger });
            let left = match batch.key.worker {
                None => self.share_or_stop(flow, batch),
                Some(worker) => send_or_stop(flow, &self.own[usize::from(worker)].0, batch),
            };
            if let Some(batch) = left {
                let left = std::iter::once(batch).chain(closed);
                left.flat_map(|batch| batch.items).for_each(|entry| flow.discard(entry.item));
                return false;
            }
        }
        true
    }

    /// Queues a batch for any worker. Where that has to wait for room, it is until
    /// there is some for many more; hands the batch back when stopped first.
    fn share_or_stop<H: Handler<Item = T>>(
        &self,
        flow: &Flow<H>,
        mut batch: Closed<T>,
    ) -> Option<Closed<T>> {
        loop {
            match self.shared.0.try_send(batch) {
                Ok(()) => return None,
                Err(error) => batch = error.into_inner(),
            }
            select! {
                recv(self.room.receiver) -> _ => {}
                recv(flow.stop.signal) -> _ => return Some(batch),
            }
        }
    }

    /// A worker has taken a batch that any might.
    fn taken(&self) {
        if self.shared.1.len() <= self.shared.1.capacity().unwrap_or(0) / 2 {
            self.room.fire();
        }
    }
}

fn send_or_stop<H: Handler, T>(flow: &Flow<H>, sender: &Sender<T>, value: T) -> Option<T> {
    let mut value = match sender.try_send(value) {
        Ok(()) => return None,
        Err(TrySendError::Full(value) | TrySendError::Disconnected(value)) => Some(value),
    };
    let mut select = crossbeam_channel::Select::new();
    let send = select.send(sender);
    select.recv(&flow.stop.signal);
    let ready = select.select();
    if ready.index() == send {
        if let Some(value) = value.take() {
            return ready.send(sender, value).err().map(crossbeam_channel::SendError::into_inner);
        }
        return None;
    }
    let _ = ready.recv(&flow.stop.signal);
    value
}

/// The body of a batch worker.
pub(crate) fn work<H: Handler>(flow: &Arc<Flow<H>>, name: &Arc<str>, slot: &Slot) {
    let Some(batcher) = flow.batchers.get(name) else { return };
    // What a thread before this one has finished and not settled.
    flow.settle_hand(slot);
    let nothing = never();
    let own = batcher.own.get(slot.index).map_or(&nothing, |(_, receiver)| receiver);
    while flow.phase() < Phase::Stopped && !slot.is_retired() {
        select! {
            recv(own) -> batch => if let Ok(batch) = batch {
                handle(flow, batcher, slot, batch);
            },
            recv(batcher.shared.1) -> batch => if let Ok(batch) = batch {
                batcher.taken();
                handle(flow, batcher, slot, batch);
            },
            recv(slot.retired) -> _ => {}
            recv(flow.stop.signal) -> _ => {}
        }
    }
}

fn handle<H: Handler>(
    flow: &Flow<H>,
    batcher: &Batcher<H::Item>,
    slot: &Slot,
    closed: Closed<H::Item>,
) {
    let len = closed.items.len();
    batcher.grouped.add(-count(len));
    let mut messages = Vec::new();
    closed.items.iter().for_each(|entry| Run::add(&mut messages, &entry.ticket, len));
    let mut batch = Batch {
        batcher: Arc::clone(&batcher.name),
        key: closed.key.key,
        trigger: closed.trigger,
        entries: closed.items,
        failures: BTreeMap::new(),
    };
    let started = flow.clock.now();
    slot.begin_batch(messages, started);
    if flow.hub.is_heard() {
        let (thread, batcher) = (slot.name.clone(), batcher.name.to_string());
        flow.emit(PipelineEvent::BatchStarted { thread, batcher, len });
    }
    let result = contained_user(|| flow.handler.handle_batch(&mut batch));
    let now = flow.clock.now();
    slot.leave(started, now);
    let whole = match result {
        Ok(Ok(())) => None,
        Ok(Err(failure)) => Some(failure),
        Err(panic) => {
            flow.counters.panics.add(1);
            let text = format!("the batch handler panicked: {panic}");
            Some(Failure::of(FailureKind::Panic, text, true))
        }
    };
    let any_failed = whole.is_some() || !batch.failures.is_empty();
    let took = now.saturating_duration_since(started);
    let outcomes = if any_failed {
        Some(outcomes(flow, batch, whole.as_ref()))
    } else {
        batch.entries.into_iter().for_each(|entry| flow.discard(entry.item));
        None
    };
    if flow.hub.is_heard() {
        let (thread, batcher) = (slot.name.clone(), batcher.name.to_string());
        flow.emit(PipelineEvent::BatchDone { thread, batcher, len, failed: any_failed, took });
    }
    slot.stats.handled.add(1);
    slot.stats.failed.add(u64::from(any_failed));
    match outcomes {
        None => slot.finish_good_batch(),
        Some((succeeded, failed)) => slot.finish_batch(succeeded, failed),
    }
    flow.settle_hand(slot);
}

/// What succeeded and what has failed for good; the rest is tried again.
fn outcomes<H: Handler>(
    flow: &Flow<H>,
    batch: Batch<H::Item>,
    whole: Option<&Failure>,
) -> (Vec<Run>, Vec<(Ticket, Failure)>) {
    let Batch { entries, mut failures, .. } = batch;
    let len = entries.len();
    let (mut succeeded, mut failed, mut again) = (Vec::new(), Vec::new(), Vec::new());
    for (place, BatchEntry { ticket, item }) in entries.into_iter().enumerate() {
        flow.discard(item);
        let Some(failure) = whole.cloned().or_else(|| failures.remove(&place)) else {
            Run::add(&mut succeeded, &ticket, len - place);
            continue;
        };
        match flow.after_failure(&ticket, &failure) {
            Some(due) => again.push((due, ticket)),
            None => failed.push((ticket, failure)),
        }
    }
    // Not before the last user code: if the thread dies of that, all of these fail.
    again.into_iter().for_each(|(due, ticket)| flow.retry_at(due, ticket, true));
    (succeeded, failed)
}

fn hash(key: &Arc<str>) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(key)
}

/// The place of a trigger's counter.
pub(crate) fn place(trigger: Trigger) -> usize {
    match trigger {
        Trigger::Size => 0,
        Trigger::Timeout => 1,
        Trigger::Flush => 2,
        Trigger::Keys => 3,
        Trigger::Drain => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn there_is_room_for_batches_again_when_half_of_those_that_wait_are_taken() {
        let policy = BatchPolicy { limit: 1, timeout: Duration::MAX, max_keys: 1 };
        let batcher = Batcher::<()>::new("all".into(), policy, 2, 1, None);
        let closed = || Closed::<()> {
            key: Group { key: None, worker: None },
            items: Vec::new(),
            trigger: Trigger::Size,
        };
        for _ in 0..2 {
            while batcher.shared.0.try_send(closed()).is_ok() {}
            assert_eq!(batcher.shared.1.len(), 2 + AHEAD);
            for left in (0..2 + AHEAD).rev() {
                assert!(batcher.shared.1.try_recv().is_ok());
                batcher.taken();
                let has_room = !batcher.room.receiver.is_empty();
                assert_eq!(has_room, left <= 1 + AHEAD / 2, "{left} wait");
            }
            assert!(batcher.room.receiver.try_recv().is_ok() && batcher.room.receiver.is_empty());
        }
    }
}
