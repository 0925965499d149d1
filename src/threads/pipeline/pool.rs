//! The workers of one stage, and what each has in hand.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::lock;
use super::stats::WorkerStats;
use crate::work::{Failure, Ticket};

/// The workers that a stage should have. Those that are no longer in it end
/// when their hands are empty; the supervisor starts those that are new.
#[derive(Debug)]
pub(crate) struct Pool {
    prefix: String,
    slots: Mutex<Vec<Arc<Slot>>>,
}

/// What one worker thread has in hand, and what is counted of it. It outlives
/// the thread.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: String,
    /// Its place in the pool.
    pub(crate) index: usize,
    pub(crate) hand: Mutex<Hand>,
    pub(crate) stats: WorkerStats,
    /// Dropped to retire the worker.
    retire: Mutex<Option<Sender<()>>>,
    pub(crate) retired: Receiver<()>,
}

#[derive(Debug, Default)]
pub(crate) struct Hand {
    /// Taken, and not begun.
    pub(crate) chunk: VecDeque<Ticket>,
    /// Begun, and not on to the next place.
    pub(crate) current: Vec<Ticket>,
    /// In the handler since then; `true` once it was reported as slow.
    pub(crate) since: Option<(Instant, bool)>,
    /// Finished, and not settled.
    pub(crate) succeeded: Vec<Ticket>,
    pub(crate) failed: Vec<(Ticket, Failure)>,
}

impl Pool {
    /// `count` workers, whose threads are named `prefix` and a number.
    pub(crate) fn new(prefix: String, count: usize) -> Self {
        let pool = Self { prefix, slots: Mutex::default() };
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
            slots.push(Slot::new(format!("{}-{index}", self.prefix), index));
        }
    }
}

impl Slot {
    fn new(name: String, index: usize) -> Arc<Self> {
        let (retire, retired) = bounded(0);
        Arc::new(Self {
            name,
            index,
            hand: Mutex::default(),
            stats: WorkerStats::default(),
            retire: Mutex::new(Some(retire)),
            retired,
        })
    }

    pub(crate) fn is_retired(&self) -> bool {
        lock(&self.retire).is_none()
    }

    /// Notes what is in the handler's hands, in case the thread dies with it.
    pub(crate) fn begin(&self, tickets: &[Ticket], now: Instant) {
        let mut hand = lock(&self.hand);
        hand.current.extend_from_slice(tickets);
        hand.since = Some((now, false));
    }

    /// Takes the next message of the chunk into the handler's hands.
    pub(crate) fn begin_next(&self, now: Instant) -> Option<Ticket> {
        let mut hand = lock(&self.hand);
        let mut ticket = hand.chunk.pop_front()?;
        ticket.attempts += 1;
        hand.current.push(ticket.clone());
        hand.since = Some((now, false));
        Some(ticket)
    }

    /// The handler has returned.
    pub(crate) fn returned(&self, started: Instant, now: Instant) {
        let busy = now.saturating_duration_since(started).as_nanos();
        self.stats.busy_nanos.add(u64::try_from(busy).unwrap_or(u64::MAX));
        lock(&self.hand).since = None;
    }

    /// What was begun is on its way, or put where `put` puts it.
    pub(crate) fn finish(&self, failed: bool, put: impl FnOnce(&mut Hand)) {
        self.stats.handled.add(1);
        self.stats.failed.add(u64::from(failed));
        let mut hand = lock(&self.hand);
        hand.current.clear();
        put(&mut hand);
    }
}
