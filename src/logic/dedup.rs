//! The window of message ids that were seen.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::mem;
use std::time::{Duration, Instant};

use crate::error::Error;

/// How far a remembered message got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Processing {
    /// Accepted, and not reported on since.
    InFlight,
    /// Processed to success.
    Done,
}

/// The ids of the messages accepted last.
///
/// An id is remembered until `capacity` further ids were accepted or until the
/// time to live since its acceptance has passed. A forgotten id, because its
/// message failed, is accepted again; its place in the count stays used.
///
/// Ids are taken as they are for hashes: they must be uniformly random to a
/// peer that does not know the key, or it could crowd them into one bucket.
///
/// Two generations keep it fast and small: ids enter the young one; after
/// `capacity` acceptances it becomes the old one, whose predecessor holds
/// nothing remembered by then and is emptied for reuse. Exactness does not
/// come from that, but from the sequence number and time kept with each id, so
/// there is no ring to keep and no sweep. Memory grows with use, to at most
/// `2 * capacity` ids of 32 bytes each (and the maps' spare room).
#[derive(Debug, Clone)]
pub(crate) struct Dedup {
    /// Accepted since the last turn of generations.
    young: Generation,
    /// Accepted in the generation before.
    old: Generation,
    /// Acceptances that an id survives.
    capacity: u64,
    /// Nanoseconds that an id survives; `u64::MAX`, 584 years: for ever.
    ttl: u64,
    /// Acceptances so far: the sequence number of the next.
    accepted: u64,
    /// What that was at the last turn of generations.
    turned: u64,
    /// What times are counted from: the first acceptance.
    base: Option<Instant>,
}

type Generation = HashMap<u128, Seen, BuildHasherDefault<AsItIs>>;

/// What is kept with an id: 16 bytes, so that an entry is half a cache line.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// The sequence number of its acceptance, times two, plus one when done.
    mark: u64,
    /// When it was accepted, in nanoseconds since the base.
    at: u64,
}

/// The point from which an id is judged.
#[derive(Debug, Clone, Copy)]
struct Horizon {
    /// The first sequence number still remembered.
    first: u64,
    /// Now, in nanoseconds since the base.
    now: u64,
    /// As in [`Dedup`].
    ttl: u64,
}

impl Dedup {
    /// An empty window of `capacity` ids (at least one), each remembered for
    /// `ttl` at most. Nothing is allocated yet.
    pub(crate) fn new(capacity: usize, ttl: Option<Duration>) -> Self {
        Self {
            young: Generation::default(),
            old: Generation::default(),
            capacity: (capacity as u64).max(1),
            ttl: ttl.map_or(u64::MAX, nanos),
            accepted: 0,
            turned: 0,
            base: None,
        }
    }

    /// Whether a message with this id is fresh, and from now on in flight;
    /// `false`: it is a duplicate.
    pub(crate) fn accept(&mut self, id: u128, now: Instant) -> bool {
        let base = *self.base.get_or_insert(now);
        let horizon = self.horizon(base, now);
        if self.old.get(&id).is_some_and(|seen| horizon.holds(*seen)) {
            return false;
        }
        let fresh = Seen { mark: self.accepted << 1, at: horizon.now };
        match self.young.entry(id) {
            Entry::Occupied(entry) if horizon.holds(*entry.get()) => return false,
            Entry::Occupied(mut entry) => *entry.get_mut() = fresh,
            Entry::Vacant(entry) => _ = entry.insert(fresh),
        }
        self.accepted += 1;
        self.turn();
        true
    }

    /// The message was processed to success. Without effect on an id that is
    /// not remembered.
    pub(crate) fn done(&mut self, id: u128) {
        // The young entry, if there is one, is the later acceptance.
        if let Some(seen) = self.young.get_mut(&id).or_else(|| self.old.get_mut(&id)) {
            seen.mark |= 1;
        }
    }

    /// The message failed: its redelivery shall be accepted. `true` if the id
    /// was held, which it may be for some time after it stopped to count.
    pub(crate) fn forget(&mut self, id: u128) -> bool {
        let young = self.young.remove(&id).is_some();
        let old = self.old.remove(&id).is_some();
        young || old
    }

    /// How far the message with this id got, if it is remembered at `now`.
    pub(crate) fn state(&self, id: u128, now: Instant) -> Option<Processing> {
        let horizon = self.horizon(self.base?, now);
        let seen = self.young.get(&id).or_else(|| self.old.get(&id))?;
        horizon.holds(*seen).then(|| seen.processing())
    }

    /// Ids held in memory, remembered or not: at most `2 * capacity`.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    fn horizon(&self, base: Instant, now: Instant) -> Horizon {
        Horizon {
            first: self.accepted.saturating_sub(self.capacity),
            now: nanos(now.saturating_duration_since(base)),
            ttl: self.ttl,
        }
    }

    /// Lets the generations take turns when every id of the old one is beyond
    /// the horizon. Emptying it touches one byte for each id, not the ids.
    fn turn(&mut self) {
        if self.accepted - self.turned >= self.capacity {
            self.turned = self.accepted;
            mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
    }
}

impl Horizon {
    /// Whether this acceptance still counts. The time of another thread may be
    /// a little behind that of the acceptance: that is no age.
    fn holds(self, seen: Seen) -> bool {
        seen.mark >> 1 >= self.first && self.now.saturating_sub(seen.at) < self.ttl
    }
}

impl Seen {
    fn processing(self) -> Processing {
        if self.mark & 1 == 1 { Processing::Done } else { Processing::InFlight }
    }
}

/// Refuses a window that would remember nothing.
pub(crate) fn check(capacity: usize, ttl: Option<Duration>) -> Result<(), Error> {
    if capacity == 0 {
        return Err(Error::setting("dedup", "capacity must be more than zero"));
    }
    if ttl.is_some_and(|ttl| ttl.is_zero()) {
        return Err(Error::setting("dedup", "time to live must be more than zero"));
    }
    Ok(())
}

/// Whole nanoseconds, saturating after 584 years.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The hasher of what is a keyed hash already: its first eight bytes.
#[derive(Debug, Clone, Copy, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(head) = bytes.first_chunk() {
            self.0 = u64::from_ne_bytes(*head);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::logic::some_instant;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn a_message_is_accepted_once() {
        let now = some_instant();
        let mut window = Dedup::new(3, None);
        assert!(window.accept(7, now));
        assert!(!window.accept(7, now));
        assert!(!window.accept(7, now + secs(1_000_000)), "without a time to live, for ever");
    }

    #[test]
    fn an_id_is_remembered_until_capacity_further_ones_were_accepted() {
        let now = some_instant();
        let mut window = Dedup::new(3, None);
        for id in 0..1000 {
            assert!(window.accept(id, now), "{id}");
            for recent in id.saturating_sub(2)..=id {
                assert!(!window.accept(recent, now), "{recent} of {id}");
            }
            if let Some(gone) = id.checked_sub(3) {
                assert_eq!(window.state(gone, now), None, "{gone} of {id}");
            }
        }
    }

    #[test]
    fn an_id_is_remembered_for_its_time_to_live_and_duplicates_do_not_renew_it() {
        let now = some_instant();
        let mut window = Dedup::new(3, Some(secs(10)));
        assert!(window.accept(7, now));
        assert!(!window.accept(7, now + secs(9)));
        assert!(window.accept(7, now + secs(10)), "expired in the young generation");
        assert!(!window.accept(7, now + secs(19)));
        assert!(window.accept(8, now + secs(19)) && window.accept(9, now + secs(19)));
        assert!(!window.accept(7, now + secs(19)), "remembered in the old generation");
        assert!(window.accept(7, now + secs(20)), "expired in the old generation");
        assert!(!window.accept(8, now + secs(20)));
    }

    #[test]
    fn a_thread_whose_time_is_behind_sees_the_same_window() {
        let now = some_instant() + secs(100);
        let mut window = Dedup::new(3, Some(secs(10)));
        assert!(window.accept(7, now));
        assert!(!window.accept(7, now - secs(50)));
        assert!(window.accept(8, now + secs(5)));
        assert!(!window.accept(8, now + secs(4)));
    }

    #[test]
    fn processing_is_told_as_far_as_it_got() {
        let now = some_instant();
        let mut window = Dedup::new(2, Some(secs(10)));
        assert_eq!(window.state(1, now), None, "nothing accepted yet");
        window.accept(1, now);
        assert_eq!(window.state(1, now), Some(Processing::InFlight));
        window.done(1);
        window.done(99);
        assert_eq!(window.state(1, now), Some(Processing::Done));
        assert_eq!(window.state(99, now), None);
        window.accept(2, now);
        window.done(2);
        assert_eq!(window.state(2, now), Some(Processing::Done), "in the old generation");
        assert!(!window.accept(2, now), "done is remembered too");
        assert_eq!(window.state(2, now + secs(10)), None, "expired");
    }

    #[test]
    fn a_failed_message_is_accepted_again() {
        let now = some_instant();
        let mut window = Dedup::new(2, None);
        window.accept(1, now);
        assert!(window.forget(1));
        assert!(!window.forget(1));
        assert!(window.accept(1, now), "forgotten in the young generation");
        assert!(window.forget(1));
        assert!(window.accept(1, now), "forgotten in the old generation");
        assert_eq!(window.state(1, now), Some(Processing::InFlight));
    }

    #[test]
    fn a_failed_message_is_forgotten_with_every_earlier_acceptance() {
        let now = some_instant();
        let mut window = Dedup::new(2, Some(secs(10)));
        assert!(window.accept(8, now) && window.accept(7, now));
        assert!(window.accept(7, now + secs(10)), "expired, so held in both generations");
        assert!(window.forget(7));
        assert!(window.accept(7, now + secs(9)), "also for a thread whose time is behind");
    }

    #[test]
    fn memory_grows_with_use_to_twice_the_capacity() {
        let now = some_instant();
        let mut window = Dedup::new(1000, None);
        assert_eq!(window.young.capacity() + window.old.capacity(), 0);
        for id in 0..100_000u128 {
            // Spread over the buckets as real ids are.
            window.accept(id.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835), now);
            assert!(window.len() <= 2000);
        }
        assert_eq!(window.len(), 1000);
        assert!(window.young.capacity() + window.old.capacity() <= 4 * 1000);
        assert_eq!(size_of::<(u128, Seen)>(), 32);
    }

    #[test]
    fn settings_that_remember_nothing_are_refused() {
        assert!(check(1, None).is_ok());
        assert!(check(100_000, Some(secs(60))).is_ok());
        for (capacity, ttl, word) in [(0, None, "capacity"), (1, Some(Duration::ZERO), "time")] {
            let error = check(capacity, ttl).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting("dedup"));
            assert!(error.to_string().contains(word), "{error}");
        }
        let mut least = Dedup::new(0, Some(Duration::MAX));
        let now = some_instant();
        assert!(least.accept(1, now) && !least.accept(1, now), "unchecked, still safe");
    }

    #[test]
    fn ids_are_their_own_hash() {
        let mut hasher = AsItIs::default();
        hasher.write(&[1, 2]);
        assert_eq!(hasher.finish(), 0, "too short for an id");
        hasher.write(&(7u128 | 9 << 64).to_le_bytes());
        assert_eq!(hasher.finish(), u64::from_ne_bytes(7u64.to_le_bytes()));
    }

    /// The same promises kept in the plainest way: the last `capacity`
    /// acceptances in order, a forgotten one as a hole.
    struct Model {
        capacity: usize,
        ttl: Option<Duration>,
        last: VecDeque<Option<(u128, Instant, Processing)>>,
    }

    impl Model {
        fn find(&mut self, id: u128) -> Option<&mut Option<(u128, Instant, Processing)>> {
            self.last.iter_mut().rev().find(|slot| slot.is_some_and(|(seen, ..)| seen == id))
        }

        fn state(&mut self, id: u128, now: Instant) -> Option<Processing> {
            let ttl = self.ttl;
            let (_, at, state) = (*self.find(id)?)?;
            ttl.is_none_or(|ttl| now - at < ttl).then_some(state)
        }

        fn accept(&mut self, id: u128, now: Instant) -> bool {
            if self.state(id, now).is_some() {
                return false;
            }
            self.last.push_back(Some((id, now, Processing::InFlight)));
            if self.last.len() > self.capacity {
                self.last.pop_front();
            }
            true
        }

        fn done(&mut self, id: u128) {
            if let Some(Some((_, _, state))) = self.find(id) {
                *state = Processing::Done;
            }
        }

        fn forget(&mut self, id: u128) {
            while let Some(slot) = self.find(id) {
                *slot = None;
            }
        }
    }

    proptest! {
        #[test]
        fn the_window_is_exact(
            capacity in 1usize..12,
            ttl in prop::option::of(1u64..40),
            steps in prop::collection::vec((0u8..8, 0u128..24, 0u64..6), 1..300),
        ) {
            let ttl = ttl.map(secs);
            let mut now = some_instant();
            let mut window = Dedup::new(capacity, ttl);
            let mut model = Model { capacity, ttl, last: VecDeque::new() };
            for (step, id, wait) in steps {
                let known = model.state(id, now).is_some();
                match step {
                    0 => now += secs(wait),
                    1 => {
                        window.done(id);
                        model.done(id);
                    }
                    2 => {
                        let held = window.forget(id);
                        prop_assert!(held || !known);
                        model.forget(id);
                    }
                    _ => prop_assert_eq!(window.accept(id, now), model.accept(id, now)),
                }
                for id in 0..24 {
                    prop_assert_eq!(window.state(id, now), model.state(id, now), "id {}", id);
                }
                prop_assert!(window.len() <= 2 * capacity);
            }
        }
    }

    /// `cargo test --release --lib dedup -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement, not a promise"]
    fn nanoseconds_for_each_acceptance() {
        const IDS: u128 = 5_000_000;
        let ids: Vec<u128> = (1..=IDS)
            .map(|n| n.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835) ^ (n << 77))
            .collect();
        let mut window = Dedup::new(100_000, Some(secs(600)));
        for round in 0..3 {
            let start = some_instant();
            let fresh = ids.iter().filter(|id| window.accept(**id ^ round, start)).count();
            let each = (some_instant() - start).as_nanos() / IDS;
            println!("{each} ns each, {fresh} fresh");
        }
    }
}
