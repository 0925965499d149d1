//! A batcher's threads: one groups items into batches, workers handle them.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::processor::{AfterFailure, begin, finish};
use super::source::partition_of;
use super::stats::PipelineEvent;
use super::{Flow, Phase, Slot, Tick, lock};
use crate::logic::batch::{BatchPolicy, Batches, Ready};
use crate::metrics::Counter;
use crate::threads::{contained_user, panic_text};
use crate::work::{Batch, BatchEntry, Failure, FailureKind, Handler, Ticket, ToBatch, Trigger};

/// A user's function that weighs an item.
pub(crate) type Weigh<T> = Arc<dyn Fn(&T) -> usize + Send + Sync>;

/// What shares a batch: one key and, with partitions, one worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Group {
    key: Option<Arc<str>>,
    worker: Option<usize>,
}

/// One item on its way into a batch.
pub(crate) struct Item<T> {
    group: Group,
    weight: usize,
    flush: bool,
    entry: BatchEntry<T>,
}

type Closed<T> = Ready<Group, Item<T>>;

/// Both ends of a queue that outlives the threads at them.
type Channel<T> = (Sender<T>, Receiver<T>);

/// A batcher's queues and open batches, which outlive its threads.
pub(crate) struct Batcher<T> {
    pub(crate) name: Arc<str>,
    /// Its place among the batchers, by name.
    pub(crate) index: usize,
    pub(crate) tick: Tick,
    pub(crate) slots: Vec<Arc<Slot>>,
    weigh: Option<Weigh<T>>,
    items: Channel<Item<T>>,
    open: Mutex<Batches<Group, Item<T>>>,
    /// Batches that any worker may take, and those that one must.
    shared: Channel<Closed<T>>,
    own: Vec<Channel<Closed<T>>>,
    pub(crate) batches: [Counter; 5],
    pub(crate) batched: Counter,
}

impl<T: Send + 'static> Batcher<T> {
    pub(crate) fn new(
        name: Arc<str>,
        policy: BatchPolicy,
        concurrency: usize,
        queue: usize,
        weigh: Option<Weigh<T>>,
    ) -> Self {
        let slots = (0..concurrency).map(|n| Slot::new(format!("broadsock-batch-{name}-{n}")));
        Self {
            index: 0,
            tick: Tick::new(),
            slots: slots.collect(),
            weigh,
            items: bounded(queue),
            open: Mutex::new(Batches::new(policy)),
            shared: bounded(concurrency),
            own: (0..concurrency).map(|_| bounded(1)).collect(),
            batches: std::array::from_fn(|_| Counter::new()),
            batched: Counter::new(),
            name,
        }
    }

    /// Queues an item; waits for room, and returns `false` when stopped first.
    pub(crate) fn send<H: Handler<Item = T>>(
        &self,
        flow: &Flow<H>,
        mut ticket: Ticket,
        to: ToBatch<T>,
    ) -> bool {
        ticket.batched = true;
        let weight = self.weight(flow, &to.item);
        let group = Group { worker: self.worker(flow, &ticket, to.key.as_ref()), key: to.key };
        let entry = BatchEntry { ticket, item: to.item, failure: None };
        let item = Item { group, weight, flush: to.flush, entry };
        let sent = select! {
            send(self.items.0, item) -> _ => true,
            recv(flow.stop.signal) -> _ => false,
        };
        flow.left_upstream(usize::from(sent));
        sent
    }

    fn weight<H: Handler<Item = T>>(&self, flow: &Flow<H>, item: &T) -> usize {
        let Some(weigh) = &self.weigh else { return 1 };
        contained_user(|| weigh(item)).unwrap_or_else(|panic| {
            flow.panicked("batch size", &*panic);
            1
        })
    }

    /// The worker that must take the item's batch: order within a partition,
    /// and one worker at a time for each key, come from that.
    fn worker<H: Handler>(
        &self,
        flow: &Flow<H>,
        ticket: &Ticket,
        key: Option<&Arc<str>>,
    ) -> Option<usize> {
        let place = partition_of(flow, &ticket.message).or_else(|| key.map(hash))?;
        Some((place % self.slots.len() as u64) as usize)
    }

    /// What waits here, when the pipeline has stopped.
    pub(crate) fn left(&self) -> Vec<Ticket> {
        let open = lock(&self.open).drain().into_iter().flat_map(|closed| closed.items);
        let queued = self.items.1.try_iter();
        let own = self.own.iter().flat_map(|(_, receiver)| receiver.try_iter());
        let closed = self.shared.1.try_iter().chain(own).flat_map(|closed| closed.items);
        open.chain(queued).chain(closed).map(|item| item.entry.ticket).collect()
    }

    pub(crate) fn depth(&self) -> usize {
        let own: usize = self.own.iter().map(|(_, receiver)| receiver.len()).sum();
        self.items.1.len() + lock(&self.open).len() + self.shared.1.len() + own
    }
}

/// The body of the grouping thread.
pub(crate) fn run<H: Handler>(flow: &Arc<Flow<H>>, name: &Arc<str>) {
    let Some(batcher) = flow.batchers.get(name) else { return };
    loop {
        if !batcher.emit(flow, lock(&batcher.open).due(flow.clock.now())) {
            return;
        }
        // In the end, nothing waits for company that cannot come.
        if flow.is_upstream_empty() && batcher.items.1.is_empty() {
            let closed = lock(&batcher.open).drain();
            if !batcher.emit(flow, closed) {
                return;
            }
        }
        if let Some(at) = lock(&batcher.open).deadline() {
            flow.timer.arm(flow.batcher_owner(batcher.index), at);
        }
        select! {
            recv(batcher.items.1) -> item => if let Ok(item) = item {
                let closed = batcher.group(flow, item);
                if !batcher.emit(flow, closed) {
                    return;
                }
            },
            recv(batcher.tick.receiver) -> _ => {}
            recv(flow.stop.signal) -> _ => return,
        }
    }
}

impl<T: Send + 'static> Batcher<T> {
    fn group<H: Handler<Item = T>>(&self, flow: &Flow<H>, item: Item<T>) -> Vec<Closed<T>> {
        let (group, weight, flush) = (item.group.clone(), item.weight, item.flush);
        let now = flow.clock.now();
        let mut open = lock(&self.open);
        // What is overdue leaves as it is: nothing joins it any more.
        let mut closed = open.due(now);
        closed.extend(open.push(now, group, item, weight, flush));
        closed
    }

    /// Hands closed batches to workers; `false` when stopped first.
    fn emit<H: Handler<Item = T>>(&self, flow: &Flow<H>, closed: Vec<Closed<T>>) -> bool {
        let mut closed = closed.into_iter();
        while let Some(batch) = closed.next() {
            let (len, trigger) = (batch.items.len(), batch.trigger);
            self.batches[place(trigger)].add(1);
            self.batched.add(len as u64);
            flow.emit(PipelineEvent::Batch { batcher: self.name.to_string(), len, trigger });
            let sender = batch.key.worker.map_or(&self.shared.0, |worker| &self.own[worker].0);
            if let Some(batch) = send_or_stop(flow, sender, batch) {
                self.keep(flow, std::iter::once(batch).chain(closed));
                return false;
            }
        }
        true
    }

    /// Puts batches back that nobody took: they are returned.
    fn keep<H: Handler<Item = T>>(&self, flow: &Flow<H>, batches: impl Iterator<Item = Closed<T>>) {
        let now = flow.clock.now();
        let mut open = lock(&self.open);
        for item in batches.flat_map(|batch| batch.items) {
            // A group of its own for each item: nothing is closed by this.
            let group = Group { key: None, worker: None };
            drop(open.push(now, group, item, 0, false));
        }
    }
}

fn send_or_stop<H: Handler, T>(flow: &Flow<H>, sender: &Sender<T>, value: T) -> Option<T> {
    let mut value = Some(value);
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
pub(crate) fn work<H: Handler>(flow: &Arc<Flow<H>>, name: &Arc<str>, index: usize) {
    let Some(batcher) = flow.batchers.get(name) else { return };
    let slot = &batcher.slots[index];
    loop {
        if flow.phase() >= Phase::Stopped {
            return;
        }
        select! {
            recv(batcher.own[index].1) -> batch => if let Ok(batch) = batch {
                handle(flow, batcher, slot, batch);
            },
            recv(batcher.shared.1) -> batch => if let Ok(batch) = batch {
                handle(flow, batcher, slot, batch);
            },
            recv(flow.stop.signal) -> _ => return,
        }
    }
}

fn handle<H: Handler>(
    flow: &Flow<H>,
    batcher: &Batcher<H::Item>,
    slot: &Slot,
    closed: Closed<H::Item>,
) {
    let mut batch = Batch {
        batcher: Arc::clone(&batcher.name),
        key: closed.key.key,
        trigger: closed.trigger,
        entries: closed.items.into_iter().map(|item| item.entry).collect(),
    };
    let tickets: Vec<Ticket> = batch.entries.iter().map(|entry| entry.ticket.clone()).collect();
    let started = flow.clock.now();
    begin(slot, &tickets, started);
    let whole = match contained_user(|| flow.handler.handle_batch(&mut batch)) {
        Ok(Ok(())) => None,
        Ok(Err(failure)) => Some(failure),
        Err(panic) => {
            flow.counters.panics.add(1);
            let text = format!("the batch handler panicked: {}", panic_text(&*panic));
            Some(Failure::of(FailureKind::Panic, text, true))
        }
    };
    let (mut succeeded, mut failed) = (Vec::new(), Vec::new());
    for entry in batch.entries {
        match whole.clone().or(entry.failure) {
            None => succeeded.push(entry.ticket),
            Some(failure) => match flow.after_failure(entry.ticket, failure) {
                AfterFailure::Retry(ticket, due) => flow.retry_later(ticket, due),
                AfterFailure::Final(ticket, failure) => failed.push((ticket, failure)),
            },
        }
    }
    let any_failed = !failed.is_empty() || whole.is_some();
    {
        let mut hand = lock(&slot.hand);
        hand.succeeded.extend(succeeded);
        hand.failed.extend(failed);
    }
    finish(flow, slot, started, any_failed);
    flow.settle_hand(slot);
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
