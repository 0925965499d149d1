//! The crate's `logic/batch.rs`, in a shell that can carry a planted bug.

use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::kernel::chance;
use crate::planted::{Bug, planted};
use crate::work::Trigger;
#[path = "../../../src/logic/batch.rs"]
mod real;
pub(crate) use real::{BatchPolicy, Ready};

#[derive(Debug)]
pub(crate) struct Batches<K, T>(real::Batches<K, T>);

impl<K: Eq + Hash + Clone, T> Batches<K, T> {
    pub(crate) fn new(policy: BatchPolicy) -> Self {
        let more = if planted(Bug::BatchTooLarge) { 1 } else { 0 };
        Self(real::Batches::new(BatchPolicy { limit: policy.limit + more, ..policy }))
    }

    pub(crate) fn push(
        &mut self,
        now: Instant,
        key: K,
        item: T,
        weight: usize,
        flush: bool,
        ready: &mut Vec<Ready<K, T>>,
    ) {
        self.0.push(now, key, item, weight, flush, ready);
        spoil(ready);
    }

    pub(crate) fn due(&mut self, now: Instant) -> Vec<Ready<K, T>> {
        let now =
            if planted(Bug::ClosedBeforeItsTime) { now + Duration::from_millis(12) } else { now };
        let mut ready = self.0.due(now);
        spoil(&mut ready);
        ready
    }

    pub(crate) fn drain(&mut self) -> Vec<Ready<K, T>> {
        if planted(Bug::MissedFlushOnStop) {
            return Vec::new();
        }
        self.0.drain()
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        let late = if planted(Bug::TimerOfAnOlderBatch) { 60 } else { 0 };
        Some(self.0.deadline()? + Duration::from_secs(late))
    }
}

fn spoil<K: Clone, T>(ready: &mut Vec<Ready<K, T>>) {
    if planted(Bug::OvertakenInItsKey) {
        ready.iter_mut().for_each(|ready| ready.items.reverse());
    }
    if planted(Bug::EmptyBatch)
        && chance(0.05)
        && let Some(first) = ready.first()
    {
        let key = first.key.clone();
        ready.push(Ready { key, items: Vec::new(), trigger: Trigger::Flush });
    }
}
