//! Which messages leave together, and when: one open batch for each key.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::work::Trigger;

/// How large a batch gets, how long it stays open, and how many are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchPolicy {
    /// The most weight in a batch: messages when each weighs 1. One message
    /// that alone weighs more is a batch of its own.
    pub(crate) limit: usize,
    /// The longest that the first message of a batch waits for others.
    pub(crate) timeout: Duration,
    /// The most keys with an open batch; zero counts as one.
    pub(crate) max_keys: usize,
}

/// A closed batch: at least one item, in the order in which they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ready<K, T> {
    /// What its items have in common.
    pub(crate) key: K,
    /// The items, oldest first.
    pub(crate) items: Vec<T>,
    /// Why it was closed.
    pub(crate) trigger: Trigger,
}

/// The open batches, at most one for each key and none of them empty.
///
/// A batch's time runs from its own first item and is never postponed: neither
/// by later items nor by an older batch of the same key that left early.
#[derive(Debug)]
pub(crate) struct Batches<K, T> {
    policy: BatchPolicy,
    /// The batch that took the last item, which often takes the next one too:
    /// to compare two keys takes less than to look one up.
    last: Option<(K, Open<T>)>,
    /// All others. Never iterated, so its order decides nothing.
    others: HashMap<K, Open<T>>,
    /// The keys of open batches, by age. All batches have the same timeout, so this
    /// is also the order of their deadlines.
    ages: BTreeMap<Age, K>,
    /// Batches opened so far: tells those of one instant apart.
    opened: u64,
    /// Items of the batch that was closed last: the next one may get as many.
    usual: usize,
}

/// When a batch was opened, and as the how-manieth.
type Age = (Instant, u64);

/// A batch that still takes items.
#[derive(Debug)]
struct Open<T> {
    /// Its place in `Batches::ages`.
    age: Age,
    /// Of all items; at most the limit.
    weight: usize,
    /// At least one.
    items: Vec<T>,
}

impl BatchPolicy {
    /// Whether a batch of this weight leaves at once. Its last item's wish goes
    /// first, as in Broadway.
    fn closes(self, weight: usize, flush: bool) -> Option<Trigger> {
        if flush {
            Some(Trigger::Flush)
        } else if weight >= self.limit {
            Some(Trigger::Size)
        } else {
            None
        }
    }
}

impl<K: Eq + Hash + Clone, T> Batches<K, T> {
    /// No batch is open.
    pub(crate) fn new(policy: BatchPolicy) -> Self {
        Self {
            policy,
            last: None,
            others: HashMap::new(),
            ages: BTreeMap::new(),
            opened: 0,
            usual: 0,
        }
    }

    /// Takes an item and appends what it closed to `ready`, in the order in which
    /// it has to leave: at most two batches.
    ///
    /// `flush` closes the item's batch with it. Time closes nothing in here:
    /// ask [`due`](Self::due) first, or the item may still join a batch whose
    /// deadline has passed.
    pub(crate) fn push(
        &mut self,
        now: Instant,
        key: K,
        item: T,
        weight: usize,
        flush: bool,
        ready: &mut Vec<Ready<K, T>>,
    ) {
        self.look_up(&key);
        if let Some((_, open)) = &self.last
            && weight > self.policy.limit - open.weight
        {
            ready.extend(self.close(&key, Trigger::Size));
        }
        if let Some((_, open)) = &mut self.last {
            open.weight += weight;
            open.items.push(item);
            let trigger = self.policy.closes(open.weight, flush);
            ready.extend(trigger.and_then(|trigger| self.close(&key, trigger)));
        } else if let Some(trigger) = self.policy.closes(weight, flush) {
            // It never stays open, so no other key has to make room for it.
            ready.push(Ready { key, items: vec![item], trigger });
        } else {
            ready.extend(self.make_room());
            self.open(now, key, item, weight);
        }
    }

    /// Closes the batches whose deadline has come, in the order of deadlines.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<Ready<K, T>> {
        let mut ready = Vec::new();
        while self.deadline().is_some_and(|deadline| deadline <= now) {
            ready.extend(self.close_oldest(Trigger::Timeout));
        }
        ready
    }

    /// Closes every open batch, oldest first.
    pub(crate) fn drain(&mut self) -> Vec<Ready<K, T>> {
        let mut ready = Vec::with_capacity(self.ages.len());
        while let Some(oldest) = self.close_oldest(Trigger::Drain) {
            ready.push(oldest);
        }
        ready
    }

    /// When [`due`](Self::due) has something to close; `None` while nothing is
    /// open, or when the timeout reaches beyond what the clock can tell.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let ((since, _), _) = self.ages.first_key_value()?;
        since.checked_add(self.policy.timeout)
    }

    /// The items held in open batches.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        let last = self.last.iter().map(|(_, open)| open);
        last.chain(self.others.values()).map(|open| open.items.len()).sum()
    }

    /// Makes the key's batch the last one, if it has one.
    fn look_up(&mut self, key: &K) {
        if self.last.as_ref().is_some_and(|(last, _)| last == key) {
            return;
        }
        if let Some((key, open)) = self.last.take() {
            self.others.insert(key, open);
        }
        self.last = self.others.remove_entry(key);
    }

    /// Closes the oldest batch if there is no room for one more key.
    fn make_room(&mut self) -> Option<Ready<K, T>> {
        if self.ages.len() < self.policy.max_keys.max(1) {
            return None;
        }
        self.close_oldest(Trigger::Keys)
    }

    /// Opens a batch for a key that has none; nor is there a last one.
    fn open(&mut self, now: Instant, key: K, item: T, weight: usize) {
        let age = (now, self.opened);
        self.opened += 1;
        self.ages.insert(age, key.clone());
        // Where many are open, most stay small.
        let mut items = Vec::with_capacity(if self.others.is_empty() { self.usual } else { 1 });
        items.push(item);
        self.last = Some((key, Open { age, weight, items }));
    }

    /// Closes the batch of this key.
    fn close(&mut self, key: &K, trigger: Trigger) -> Option<Ready<K, T>> {
        let (key, open) = self.take(key)?;
        self.ages.remove(&open.age);
        Some(self.ready(key, open, trigger))
    }

    /// Closes the batch that has been open longest.
    fn close_oldest(&mut self, trigger: Trigger) -> Option<Ready<K, T>> {
        let (_, key) = self.ages.pop_first()?;
        let (key, open) = self.take(&key)?;
        Some(self.ready(key, open, trigger))
    }

    fn take(&mut self, key: &K) -> Option<(K, Open<T>)> {
        match &self.last {
            Some((last, _)) if last == key => self.last.take(),
            _ => self.others.remove_entry(key),
        }
    }

    fn ready(&mut self, key: K, open: Open<T>, trigger: Trigger) -> Ready<K, T> {
        self.usual = open.items.len();
        Ready { key, items: open.items, trigger }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logic::some_instant;
    use proptest::prelude::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn policy(limit: usize, max_keys: usize) -> BatchPolicy {
        BatchPolicy { limit, timeout: ms(100), max_keys }
    }

    impl<K: Eq + Hash + Clone, T> Batches<K, T> {
        /// What an item closes.
        fn closed_by(
            &mut self,
            now: Instant,
            key: K,
            item: T,
            weight: usize,
            flush: bool,
        ) -> Vec<Ready<K, T>> {
            let mut ready = Vec::new();
            self.push(now, key, item, weight, flush, &mut ready);
            ready
        }
    }

    /// A closed batch in short.
    fn told(ready: Vec<Ready<char, u32>>) -> Vec<(char, Vec<u32>, Trigger)> {
        ready.into_iter().map(|batch| (batch.key, batch.items, batch.trigger)).collect()
    }

    #[test]
    fn a_batch_that_is_not_open_cannot_be_closed() {
        let mut batches = Batches::<char, u32>::new(policy(3, 9));
        assert!(batches.close(&'a', Trigger::Flush).is_none());
        assert!(batches.close_oldest(Trigger::Drain).is_none());
    }

    #[test]
    fn a_batch_leaves_with_the_item_that_fills_it() {
        let now = some_instant();
        let mut batches = Batches::new(policy(3, 9));
        assert!(batches.closed_by(now, 'a', 1, 1, false).is_empty());
        assert!(batches.closed_by(now, 'b', 2, 1, false).is_empty());
        assert!(batches.closed_by(now, 'a', 3, 1, false).is_empty());
        assert_eq!(batches.len(), 3);
        let full = told(batches.closed_by(now, 'a', 4, 1, false));
        assert_eq!(full, [('a', vec![1, 3, 4], Trigger::Size)]);
        assert_eq!(batches.len(), 1);
    }

    #[test]
    fn the_weight_of_an_item_decides_what_it_closes() {
        // What is open before, the item's weight, what leaves, what stays.
        #[allow(clippy::type_complexity, reason = "a table, read once")]
        let table: [(&[usize], usize, &[&[u32]], usize); 10] = [
            (&[], 9, &[], 1),
            (&[], 10, &[&[9]], 0),
            (&[], 11, &[&[9]], 0),
            (&[4], 5, &[], 2),
            (&[4], 6, &[&[0, 9]], 0),
            (&[4], 7, &[&[0]], 1),
            (&[4], 10, &[&[0], &[9]], 0),
            (&[4, 5], usize::MAX, &[&[0, 1], &[9]], 0),
            (&[0, 0], 0, &[], 3),
            (&[0, 0], 11, &[&[0, 1], &[9]], 0),
        ];
        for (open, weight, leaving, stay) in table {
            let now = some_instant();
            let mut batches = Batches::new(policy(10, 9));
            for (item, weight) in (0..).zip(open) {
                assert!(batches.closed_by(now, 'a', item, *weight, false).is_empty());
            }
            let ready = batches.closed_by(now, 'a', 9, weight, false);
            assert!(ready.iter().all(|batch| batch.trigger == Trigger::Size), "{ready:?}");
            let items: Vec<_> = ready.into_iter().map(|batch| batch.items).collect();
            assert_eq!(items, leaving, "{open:?} {weight}");
            assert_eq!(batches.len(), stay, "{open:?} {weight}");
        }
    }

    #[test]
    fn a_flush_closes_the_batch_of_its_own_key_with_it() {
        let now = some_instant();
        let mut batches = Batches::new(policy(3, 9));
        batches.closed_by(now, 'a', 1, 1, false);
        batches.closed_by(now, 'b', 2, 1, false);
        let ready = told(batches.closed_by(now, 'a', 3, 1, true));
        assert_eq!(ready, [('a', vec![1, 3], Trigger::Flush)]);
        let alone = told(batches.closed_by(now, 'a', 4, 1, true));
        assert_eq!(alone, [('a', vec![4], Trigger::Flush)]);
        let too_heavy = told(batches.closed_by(now, 'b', 5, 3, true));
        assert_eq!(too_heavy, [('b', vec![2], Trigger::Size), ('b', vec![5], Trigger::Flush)]);
        assert_eq!(batches.len(), 0);
    }

    #[test]
    fn a_new_batch_never_runs_on_the_timer_of_an_older_one() {
        let start = some_instant();
        let mut batches = Batches::new(policy(2, 9));
        batches.closed_by(start, 'a', 1, 1, false);
        assert_eq!(batches.closed_by(start + ms(60), 'a', 2, 1, false).len(), 1);
        assert_eq!(batches.deadline(), None);
        batches.closed_by(start + ms(90), 'a', 3, 1, false);
        assert!(batches.due(start + ms(100)).is_empty(), "the deadline of the batch that left");
        assert_eq!(batches.deadline(), Some(start + ms(190)));
        assert!(batches.due(start + ms(189)).is_empty());
        let ready = told(batches.due(start + ms(190)));
        assert_eq!(ready, [('a', vec![3], Trigger::Timeout)]);
    }

    #[test]
    fn later_items_do_not_postpone_the_deadline() {
        let start = some_instant();
        let mut batches = Batches::new(policy(100, 9));
        for tick in 0..10 {
            batches.closed_by(start + ms(tick * 10), 'a', 0, 1, false);
            assert_eq!(batches.deadline(), Some(start + ms(100)));
        }
        assert_eq!(batches.due(start + ms(100))[0].items.len(), 10);
    }

    #[test]
    fn batches_that_are_due_together_leave_by_deadline() {
        let start = some_instant();
        let mut batches = Batches::new(policy(9, 9));
        for (item, key) in (0..).zip(['d', 'b', 'c', 'a']) {
            batches.closed_by(start + ms(item / 2), key, item as u32, 1, false);
        }
        batches.closed_by(start + ms(30), 'e', 9, 1, false);
        let keys: Vec<_> = batches.due(start + ms(120)).iter().map(|batch| batch.key).collect();
        assert_eq!(keys, ['d', 'b', 'c', 'a']);
        assert_eq!(batches.len(), 1);
    }

    #[test]
    fn a_key_too_many_closes_the_one_open_longest() {
        let now = some_instant();
        let mut batches = Batches::new(policy(3, 2));
        batches.closed_by(now, 'a', 1, 1, false);
        batches.closed_by(now, 'b', 2, 1, false);
        batches.closed_by(now, 'a', 3, 1, false);
        assert!(told(batches.closed_by(now, 'c', 4, 3, false)).iter().all(|(key, ..)| *key == 'c'));
        let ready = told(batches.closed_by(now, 'd', 5, 1, false));
        assert_eq!(ready, [('a', vec![1, 3], Trigger::Keys)]);
        let ready = told(batches.closed_by(now, 'a', 6, 1, false));
        assert_eq!(ready, [('b', vec![2], Trigger::Keys)]);
    }

    #[test]
    fn a_drain_takes_everything_oldest_first_and_leaves_room_for_more() {
        let now = some_instant();
        let mut batches = Batches::new(policy(3, 9));
        for (item, key) in (0..).zip(['c', 'a', 'b', 'c']) {
            batches.closed_by(now, key, item, 1, false);
        }
        let (c, a, b) = (('c', vec![0, 3]), ('a', vec![1]), ('b', vec![2]));
        let drained: Vec<_> = told(batches.drain());
        assert_eq!(drained, [c, a, b].map(|(key, items)| (key, items, Trigger::Drain)));
        assert!(batches.drain().is_empty());
        assert_eq!((batches.len(), batches.deadline()), (0, None));
        assert!(batches.closed_by(now, 'a', 9, 1, false).is_empty());
    }

    #[test]
    fn limits_of_nothing_and_of_everything_are_safe() {
        let now = some_instant();
        let none = BatchPolicy { limit: 0, timeout: Duration::ZERO, max_keys: 0 };
        let mut batches = Batches::new(none);
        assert_eq!(batches.closed_by(now, 'a', 1, 0, false).len(), 1);
        let mut batches = Batches::new(BatchPolicy { limit: 2, ..none });
        assert!(batches.closed_by(now, 'a', 1, 1, false).is_empty());
        assert_eq!(batches.due(now).len(), 1);
        let all = BatchPolicy { limit: usize::MAX, timeout: Duration::MAX, max_keys: usize::MAX };
        let mut batches = Batches::new(all);
        assert!(batches.closed_by(now, 'a', 1, usize::MAX - 1, false).is_empty());
        assert_eq!(batches.deadline(), None);
        assert_eq!(batches.closed_by(now, 'a', 2, 2, false).len(), 1);
    }

    /// An item as it was pushed; `id` counts them.
    #[derive(Debug, Clone, Copy)]
    struct Item {
        id: usize,
        key: u8,
        weight: usize,
        flush: bool,
        at: Instant,
    }

    /// Batches under test, and every batch that left with the time it did.
    struct Run {
        batches: Batches<u8, Item>,
        policy: BatchPolicy,
        now: Instant,
        pushed: Vec<Item>,
        left: Vec<(Instant, Ready<u8, Item>)>,
    }

    impl Run {
        fn new(policy: BatchPolicy) -> Self {
            let batches = Batches::new(policy);
            Self { batches, policy, now: some_instant(), pushed: Vec::new(), left: Vec::new() }
        }

        fn leave(&mut self, ready: Vec<Ready<u8, Item>>) {
            self.left.extend(ready.into_iter().map(|batch| (self.now, batch)));
        }

        /// Time passes; every deadline on the way is kept.
        fn wait(&mut self, wait: Duration) {
            let until = self.now + wait;
            while let Some(deadline) = self.batches.deadline().filter(|at| *at <= until) {
                self.now = deadline;
                let due = self.batches.due(deadline);
                assert!(!due.is_empty() && self.batches.deadline().is_none_or(|at| at > deadline));
                self.leave(due);
            }
            self.now = until;
        }

        fn push(&mut self, (key, weight, flush): (u8, usize, bool)) {
            let item = Item { id: self.pushed.len(), key, weight, flush, at: self.now };
            self.pushed.push(item);
            let ready = self.batches.closed_by(self.now, key, item, weight, flush);
            assert!(ready.len() <= 2);
            self.leave(ready);
            let open = self.batches.others.len() + usize::from(self.batches.last.is_some());
            assert!(open <= self.policy.max_keys && open == self.batches.ages.len());
            let left: usize = self.left.iter().map(|(_, batch)| batch.items.len()).sum();
            assert_eq!(self.pushed.len(), left + self.batches.len());
        }

        /// The item of the same key that followed this one.
        fn next_of_key(&self, item: &Item) -> Option<&Item> {
            self.pushed[item.id + 1..].iter().find(|next| next.key == item.key)
        }

        /// Whether the batch's trigger is the truth.
        fn holds(&self, at: Instant, batch: &Ready<u8, Item>) -> bool {
            let (first, last) = (&batch.items[0], &batch.items[batch.items.len() - 1]);
            let weight: usize = batch.items.iter().map(|item| item.weight).sum();
            let due = first.at + self.policy.timeout;
            match batch.trigger {
                Trigger::Flush => last.flush,
                Trigger::Timeout => at == due,
                Trigger::Size if weight >= self.policy.limit => !last.flush,
                Trigger::Size => self
                    .next_of_key(last)
                    .is_some_and(|next| weight + next.weight > self.policy.limit),
                Trigger::Keys => {
                    at < due
                        && !self.pushed.iter().any(|item| {
                            item.id < first.id && item.key != first.key && self.left_at(item) > at
                        })
                }
                Trigger::Drain => true,
            }
        }

        fn left_at(&self, item: &Item) -> Instant {
            let has = |batch: &Ready<u8, Item>| batch.items.iter().any(|other| other.id == item.id);
            self.left.iter().find(|(_, batch)| has(batch)).map(|(at, _)| *at).unwrap()
        }
    }

    fn policies() -> impl Strategy<Value = BatchPolicy> {
        (1usize..12, 0u64..60, 1usize..5).prop_map(|(limit, timeout, max_keys)| BatchPolicy {
            limit,
            timeout: ms(timeout),
            max_keys,
        })
    }

    fn pushes() -> impl Strategy<Value = Vec<(u64, (u8, usize, bool))>> {
        let item = (0u8..7, 0usize..14, prop::bool::weighted(0.1));
        prop::collection::vec((prop_oneof![Just(0), 0u64..30], item), 1..120)
    }

    proptest! {
        #[test]
        fn items_are_neither_lost_nor_doubled_nor_late(policy in policies(), pushes in pushes()) {
            let mut run = Run::new(policy);
            for (wait, item) in pushes {
                run.wait(ms(wait));
                run.push(item);
            }
            let rest = run.batches.drain();
            run.leave(rest);
            prop_assert_eq!(run.batches.len(), 0);

            let mut ids: Vec<_> = Vec::new();
            let mut last_of_key = [None; 7];
            for (at, batch) in &run.left {
                prop_assert!(!batch.items.is_empty());
                let weight: usize = batch.items.iter().map(|item| item.weight).sum();
                prop_assert!(weight <= policy.limit || batch.items.len() == 1);
                prop_assert!(*at <= batch.items[0].at + policy.timeout, "late: {:?}", batch);
                prop_assert!(run.holds(*at, batch), "not so: {:?}", batch);
                for item in &batch.items {
                    let last = &mut last_of_key[usize::from(item.key)];
                    prop_assert!(item.key == batch.key && *last < Some(item.id), "out of order");
                    *last = Some(item.id);
                    ids.push(item.id);
                }
            }
            ids.sort_unstable();
            prop_assert!(ids.into_iter().eq(0..run.pushed.len()));
        }

        #[test]
        fn a_clock_that_steps_back_keeps_deadlines_in_order(
            pushes in prop::collection::vec((0u64..200, 0u8..7), 1..60),
        ) {
            let start = some_instant();
            let mut batches = Batches::new(policy(4, 3));
            for (at, key) in pushes {
                batches.closed_by(start + ms(at), key, at, 1, false);
                let firsts: Vec<_> = batches.ages.keys().map(|(since, _)| *since).collect();
                prop_assert!(firsts.is_sorted() && firsts.len() <= 3);
                let due = batches.due(start + ms(at));
                prop_assert!(due.iter().all(|batch| batch.trigger == Trigger::Timeout));
                prop_assert!(batches.deadline().is_none_or(|deadline| deadline > start + ms(at)));
            }
        }
    }
}
