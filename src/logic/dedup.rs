//! The window of message ids that were seen.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
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
/// peer that does not know the key, or it could crowd them into one line. 126 of
/// their 128 bits are kept and compared.
///
/// Acceptances are numbered, and the ids lie in a ring in this order: what is
/// overwritten is what has outlived `capacity` others, and the processor writes
/// ahead of use what is written in order. An index says at which numbers an id
/// may be. It is all that is touched at random, and small, so that it stays in a
/// cache: slots of four bytes, two for each id, sixteen in one line. A slot that
/// says too much, because its id is long gone, does no harm: an id is where the
/// ring has it. So no line is ever swept.
///
/// A line is a queue: the slot of a fresh id goes in at its front, and the oldest
/// one drops out. If that is of an id that counts still, it is kept in a small map.
/// So what is there is older than all of its line, and no concern once the oldest
/// slot of the line counts no more.
///
/// Memory grows with use, to about 24 bytes for each id of the capacity (a third
/// more with a time to live).
#[derive(Debug, Clone)]
pub(crate) struct Dedup {
    lines: Vec<Line>,
    /// One place for each id of the capacity; fewer while the window grows.
    ring: Vec<Key>,
    /// When each id was accepted, in nanoseconds; kept with a time to live only.
    times: Vec<u64>,
    /// The slots of ids that dropped out of their lines while they counted; some
    /// count no more.
    spill: HashMap<Key, u32, BuildHasherDefault<AsItIs>>,
    /// Where the next id goes in the ring.
    next: usize,
    /// Behind the id that was done last: messages are done in the order in which
    /// they were accepted, mostly.
    done_next: usize,
    /// The number of the last acceptance, in the upper bits, as slots have it: there
    /// it wraps around by itself.
    number: u32,
    /// From one number to the next. The bits below are of ids.
    step: u32,
    /// Acceptances that an id survives.
    capacity: u32,
    /// Nanoseconds that an id survives; `u64::MAX`, 584 years: for ever.
    ttl: u64,
    /// What times are counted from: the first acceptance.
    base: Option<Instant>,
}

/// Slots in one line.
const WAYS: usize = 16;

/// Ids of the window for each line, so that few lines are ever full.
const LOAD: usize = 8;

/// The most lines of a window that has just begun.
const FIRST_LINES: usize = 16;

/// The least room for ids that dropped out of their lines.
const FIRST_SPILL: usize = 16;

/// The largest capacity: what numbers leave of 32 bits tells ids apart.
const LARGEST: usize = 1 << 28;

/// What is kept of an id, with flags for what is known about it. All zero: nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Key {
    /// Its low half is in its slot, as far as there is room.
    low: u64,
    /// Its high half chooses the line.
    high: u64,
}

// The lowest bits of `high`, and both of them set for a fresh id: that is one
// instruction, without a constant in a register.

/// It is an id.
const HELD: u64 = 1;
/// Its message was not processed to success, so far.
const IN_FLIGHT: u64 = 2;

/// One cache line: slots, the newest first, each with the number of an acceptance
/// and, in the bits below that, some of its id.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Line([u32; WAYS]);

impl Dedup {
    /// An empty window of `capacity` ids (at least one), each remembered for
    /// `ttl` at most. Nothing is allocated yet.
    pub(crate) fn new(capacity: usize, ttl: Option<Duration>) -> Self {
        // It is no larger than that.
        let capacity = capacity.clamp(1, LARGEST) as u32;
        // A slot drops out before numbers repeat, almost always.
        let step = 1 << (u32::BITS - (capacity * 4).next_power_of_two().ilog2());
        Self {
            lines: Vec::new(),
            ring: Vec::new(),
            times: Vec::new(),
            spill: HashMap::default(),
            next: 0,
            done_next: 0,
            // A slot that was never filled has number zero, and counts no more.
            number: capacity * step,
            step,
            capacity,
            ttl: ttl.map_or(u64::MAX, nanos),
            base: None,
        }
    }

    /// Whether a message with this id is fresh, and from now on in flight;
    /// `false`: it is a duplicate.
    #[cfg(test)]
    pub(crate) fn accept(&mut self, id: u128, now: Instant) -> bool {
        self.accept_usual(std::iter::once(id)) == 1 || self.accept_next(id, now)
    }

    /// Accepts ids in turn for as long as they are fresh and need no closer look: their
    /// messages are in flight from now on. Says how many they are; the next one is for
    /// [`accept_next`](Self::accept_next) to judge. With a time to live, that is each;
    /// and zero, which may stand for no id, always is.
    #[inline]
    pub(crate) fn accept_usual(&mut self, ids: impl Iterator<Item = u128>) -> usize {
        if self.ttl != u64::MAX {
            return 0;
        }
        // What holds for all ids stays in registers.
        let lines = self.lines.as_mut_slice();
        let (step, tags) = (self.step, self.step - 1);
        let oldest_that_counts = (self.capacity - 1) * step;
        // If it saw that this is the same, the compiler would compare in four steps
        // for each vector, not in three.
        let same_tags = std::hint::black_box(tags);
        let (mut number, mut accepted) = (self.number, 0);
        for (id, place) in ids.zip(&mut self.ring[self.next..]) {
            let key = Key::of(id);
            let tag = key.tag(same_tags);
            let Some(line) = lines.get_mut(key.index(lines.len())) else { break };
            // Most ids are unlike all others of their line, and the oldest of it counts
            // no more. It is read last, or the compiler would put its vector together of
            // pieces. The bits below numbers make an age less, but not by a whole one.
            if tag == 0
                || line.alike(tag, tags) != 0
                || number.wrapping_sub(line.oldest()) <= oldest_that_counts
            {
                break;
            }
            number = number.wrapping_add(step);
            line.push(number | tag);
            *place = key;
            accepted += 1;
        }
        self.number = number;
        self.next += accepted;
        if self.next == self.capacity as usize {
            self.next = 0;
        }
        accepted
    }

    /// Whether a message with this id is fresh, and from now on in flight, whatever the
    /// window and the id are like; `false`: it is a duplicate.
    #[inline(never)]
    pub(crate) fn accept_next(&mut self, id: u128, now: Instant) -> bool {
        let key = Key::of(id);
        if self.next == self.ring.len() {
            self.grow();
        }
        let now = self.since_base(now);
        if let Some(at) = self.find(key) {
            if self.is_young(at, now) {
                return false;
            }
            self.remove(key, at);
        }
        self.enter(key, now);
        true
    }

    /// Asks the memory for the lines of ids that [`accept_usual`](Self::accept_usual) will be
    /// asked about: the waits for them overlap, as those of single look-ups
    /// would not.
    pub(crate) fn touch<I>(&self, ids: &[I], hash: impl Fn(&I) -> u128) {
        let lines = self.lines.as_slice();
        if lines.is_empty() {
            return;
        }
        let slot = |id: &I| lines[Key::of(hash(id)).index(lines.len())].oldest();
        let slots = |ids: &[I]| ids.iter().fold(0, |all, id| all ^ slot(id));
        // Four in a row, or to count them would take a quarter of the time.
        let (fours, rest) = ids.as_chunks::<4>();
        std::hint::black_box(fours.iter().fold(slots(rest), |all, four| all ^ slots(four)));
    }

    /// The message was processed to success. Without effect on an id that is
    /// not remembered.
    pub(crate) fn done(&mut self, id: u128) {
        let at = if self.is_done_next(id) {
            self.done_next
        } else {
            let Some(at) = self.find(Key::of(id)) else { return };
            at
        };
        self.ring[at].high &= !IN_FLIGHT;
        self.done_next = self.behind(at);
    }

    /// Whether the id was accepted right after the one that was done last: then no
    /// line of it is looked at, nor need it be touched.
    #[inline]
    pub(crate) fn is_done_next(&self, id: u128) -> bool {
        self.ring.get(self.done_next).is_some_and(|held| held.plain() == Key::of(id))
    }

    /// The message failed: its redelivery shall be accepted. `true` if the id
    /// was held, which it may be for some time after it stopped to count.
    pub(crate) fn forget(&mut self, id: u128) -> bool {
        let key = Key::of(id);
        let place = self.find(key);
        if let Some(at) = place {
            self.remove(key, at);
        }
        place.is_some()
    }

    /// How far the message with this id got, if it is remembered at `now`.
    pub(crate) fn state(&self, id: u128, now: Instant) -> Option<Processing> {
        let at = self.find(Key::of(id))?;
        let now = self.base.map_or(0, |base| nanos(now.saturating_duration_since(base)));
        self.is_young(at, now).then(|| {
            if self.ring[at].is(IN_FLIGHT) { Processing::InFlight } else { Processing::Done }
        })
    }

    /// Ids held in memory, remembered or not.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.ring.iter().filter(|key| key.is(HELD)).count()
    }

    /// Now, in nanoseconds since the base. Without a time to live, time is of no
    /// concern.
    #[inline]
    fn since_base(&mut self, now: Instant) -> u64 {
        if self.ttl == u64::MAX {
            return 0;
        }
        nanos(now.saturating_duration_since(*self.base.get_or_insert(now)))
    }

    /// Whether the time to live of what is there in the ring has not passed. The
    /// time of another thread may be a little behind that of the acceptance: that
    /// is no age.
    fn is_young(&self, at: usize, now: u64) -> bool {
        self.times.get(at).is_none_or(|accepted| now.saturating_sub(*accepted) < self.ttl)
    }

    /// Where in the ring an id is, if it is one of the last `capacity`.
    #[inline]
    fn find(&self, key: Key) -> Option<usize> {
        let line = self.lines.get(key.index(self.lines.len()))?;
        let tags = self.step - 1;
        let is_there = |at: &usize| self.ring[*at].plain() == key;
        let mut alike = line.alike(key.tag(tags), tags);
        while alike != 0 {
            let slot = line.0[alike.trailing_zeros() as usize];
            let place = self.place_of(slot).filter(is_there);
            if place.is_some() {
                return place;
            }
            alike &= alike - 1;
        }
        self.place_of(line.oldest())?;
        self.place_of(*self.spill.get(&key)?).filter(is_there)
    }

    /// Where in the ring the acceptance is whose number a slot has, if it counts.
    #[inline]
    fn place_of(&self, slot: u32) -> Option<usize> {
        let tags = self.step - 1;
        let age = (self.number | tags).wrapping_sub(slot) / self.step;
        if age >= self.capacity {
            return None;
        }
        // The last one is right before the next.
        let back = age as usize + 1;
        let at = if back <= self.next { self.next } else { self.next + self.capacity as usize };
        Some(at - back).filter(|at| *at < self.ring.len())
    }

    /// The place behind one in the ring.
    #[inline]
    fn behind(&self, at: usize) -> usize {
        if at + 1 == self.capacity as usize { 0 } else { at + 1 }
    }

    /// Puts a fresh id into the next place, and its slot into its line.
    fn enter(&mut self, key: Key, now: u64) {
        // The oldest counts no more from here on.
        self.ring[self.next] = Key::default();
        if let Some(time) = self.times.get_mut(self.next) {
            *time = now;
        }
        let index = key.index(self.lines.len());
        let dropped = self.lines[index].oldest();
        if let Some(at) = self.tenant(index, dropped) {
            if self.is_young(at, now) {
                self.spill(self.ring[at].plain(), dropped);
            } else {
                // Without a slot it would not be found when it comes again, and lie in
                // the ring twice.
                self.ring[at] = Key::default();
            }
        }
        self.number = self.number.wrapping_add(self.step);
        self.lines[index].push(self.number | key.tag(self.step - 1));
        self.ring[self.next] = key;
        self.next = self.behind(self.next);
    }

    /// Takes an id out of the ring, and its slot out of its line: when it comes again,
    /// it shall find none that is like it, nor should its slot push out another's.
    fn remove(&mut self, key: Key, at: usize) {
        let (index, tags) = (key.index(self.lines.len()), self.step - 1);
        let slots = self.lines[index].0.iter();
        let way = slots
            .copied()
            .position(|slot| slot & tags == key.tag(tags) && self.place_of(slot) == Some(at));
        self.ring[at] = Key::default();
        if let Some(way) = way {
            self.lines[index].take(way, tags);
        }
    }

    /// Where in the ring the id is that a slot was filled for, if it is there.
    fn tenant(&self, index: usize, slot: u32) -> Option<usize> {
        let tags = self.step - 1;
        self.place_of(slot).filter(|at| {
            let key = self.ring[*at].plain();
            key.is(HELD) && key.index(self.lines.len()) == index && key.tag(tags) == slot & tags
        })
    }

    /// Keeps the slot of an id that counts, and is in its line no more.
    #[cold]
    fn spill(&mut self, key: Key, slot: u32) {
        if self.spill.len() == self.spill.capacity() {
            let mut spill = std::mem::take(&mut self.spill);
            spill.retain(|key, slot| {
                self.place_of(*slot).is_some_and(|at| self.ring[at].plain() == *key)
            });
            // Room for as many again, so that this is seldom done.
            spill.reserve(spill.len().max(FIRST_SPILL));
            self.spill = spill;
        }
        self.spill.insert(key, slot);
    }

    /// Makes the ring longer, and spreads its ids over twice as many lines.
    #[cold]
    fn grow(&mut self) {
        let lines = match self.lines.len() {
            0 => first_lines((self.capacity as usize).div_ceil(LOAD)),
            lines => lines * 2,
        };
        self.ring.resize((lines * LOAD).min(self.capacity as usize), Key::default());
        if self.ttl != u64::MAX {
            self.times.resize(self.ring.len(), 0);
        }
        self.lines = vec![Line::default(); lines];
        self.spill.clear();
        // All of them were accepted one after the other.
        let end = std::mem::take(&mut self.next);
        self.number = self.number.wrapping_sub((end as u32).wrapping_mul(self.step));
        for at in 0..end {
            let key = self.ring[at];
            if key.is(HELD) {
                let accepted = self.times.get(at).copied().unwrap_or(0);
                self.enter(key.plain(), accepted);
                self.ring[at] = key;
            } else {
                self.number = self.number.wrapping_add(self.step);
                self.next += 1;
            }
        }
        self.next = end;
    }
}

impl Key {
    #[inline]
    fn of(id: u128) -> Self {
        Self { low: id as u64, high: (id >> 64) as u64 | HELD | IN_FLIGHT }
    }

    /// The same before it was done.
    #[inline]
    fn plain(self) -> Self {
        Self { high: self.high | IN_FLIGHT, ..self }
    }

    #[inline]
    fn is(self, flag: u64) -> bool {
        self.high & flag != 0
    }

    /// Its line among so many: as 32 of its bits lie among all.
    #[inline]
    fn index(self, lines: usize) -> usize {
        (((self.high >> 32) * lines as u64) >> 32) as usize
    }

    /// What its slot has of it.
    #[inline]
    fn tag(self, tags: u32) -> u32 {
        self.low as u32 & tags
    }
}

impl Line {
    /// Which slots have this tag: a bit for each.
    #[inline]
    fn alike(&self, tag: u32, tags: u32) -> u32 {
        let mut alike = 0;
        for (way, slot) in self.0.iter().enumerate() {
            alike |= u32::from(slot & tags == tag) << way;
        }
        alike
    }

    #[inline]
    fn oldest(&self) -> u32 {
        self.0[WAYS - 1]
    }

    /// Puts a slot in front of all others. Moving those costs less than to know whose
    /// turn it is, in whole vectors: the last one first, as it overlaps.
    #[inline]
    fn push(&mut self, slot: u32) {
        self.0.copy_within(11..15, 12);
        self.0.copy_within(..12, 1);
        self.0[0] = slot;
    }

    /// Takes a slot out. Of the oldest the number stays at the end: what has spilled is
    /// older than that.
    fn take(&mut self, way: usize, tags: u32) {
        self.0.copy_within(way + 1.., way);
        self.0[WAYS - 1] &= !tags;
    }
}

impl Hash for Key {
    /// It is a keyed hash already.
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.low);
    }
}

/// The hasher of what is a hash already.
#[derive(Debug, Clone, Copy, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn write(&mut self, _: &[u8]) {}

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Refuses a window that would remember nothing.
pub(crate) fn check(capacity: usize, ttl: Option<Duration>) -> Result<(), Error> {
    if capacity == 0 {
        return Err(Error::setting("dedup", "capacity must be more than zero"));
    }
    if capacity > LARGEST {
        return Err(Error::setting("dedup", format!("capacity must be at most {LARGEST}")));
    }
    if ttl.is_some_and(|ttl| ttl.is_zero()) {
        return Err(Error::setting("dedup", "expire_after must be more than zero"));
    }
    Ok(())
}

/// How often the lines double before they are so many.
fn doublings(lines: usize) -> u32 {
    (lines / FIRST_LINES).checked_ilog2().map_or(0, |doublings| doublings + 1)
}

/// Lines of a window that has just begun, and will have so many.
fn first_lines(lines: usize) -> usize {
    lines.div_ceil(1 << doublings(lines))
}

/// Whole nanoseconds, saturating after 584 years.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::logic::some_instant;
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::hash::BuildHasher;

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
    fn messages_done_in_their_order_are_found_one_behind_the_other() {
        let now = some_instant();
        let mut window = Dedup::new(300, None);
        let all = 1000;
        (0..all).for_each(|id| assert!(window.accept(spread(id), now)));
        window.done(spread(all - 301));
        assert!(!window.is_done_next(spread(all - 300)), "the last was not remembered any more");
        for id in all - 300..all {
            assert_eq!(window.is_done_next(spread(id)), id > all - 300, "{id}");
            assert_eq!(window.state(spread(id), now), Some(Processing::InFlight));
            window.done(spread(id));
            assert_eq!(window.state(spread(id), now), Some(Processing::Done));
        }
        window.accept(spread(all), now);
        assert!(window.is_done_next(spread(all)), "in the place of the oldest");
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

    /// The `n`th of many ids that are spread as real ones are.
    fn spread(n: u128) -> u128 {
        n.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835) ^ n << 77
    }

    #[test]
    fn a_large_window_is_exact_while_it_grows_and_turns_over() {
        let now = some_instant();
        for ttl in [None, Some(secs(60))] {
            let mut window = Dedup::new(3000, ttl);
            for id in 0..20_000 {
                assert!(window.accept(spread(id), now), "{id}");
                let oldest = id.saturating_sub(2999);
                for known in [oldest, (oldest + id) / 2, id] {
                    assert!(!window.accept(spread(known), now), "{known} of {id}");
                }
                if let Some(gone) = oldest.checked_sub(1) {
                    assert_eq!(window.state(spread(gone), now), None, "{gone} of {id}");
                }
            }
        }
    }

    #[test]
    fn settings_that_remember_nothing_are_refused() {
        assert!(check(1, None).is_ok());
        assert!(check(100_000, Some(secs(60))).is_ok());
        for (capacity, ttl, word) in
            [(0, None, "capacity"), (1, Some(Duration::ZERO), "expire_after")]
        {
            let error = check(capacity, ttl).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting("dedup"));
            assert!(error.to_string().contains(word), "{error}");
        }
        let error = check(LARGEST + 1, None).unwrap_err();
        assert!(error.to_string().contains("at most") && check(LARGEST, None).is_ok(), "{error}");
        let mut least = Dedup::new(0, Some(Duration::MAX));
        let now = some_instant();
        assert!(least.accept(1, now) && !least.accept(1, now), "unchecked, still safe");
    }

    #[test]
    fn memory_grows_with_use_and_then_no_more() {
        let now = some_instant();
        let mut window = Dedup::new(1000, None);
        assert_eq!((window.lines.capacity(), window.ring.capacity()), (0, 0));
        for id in 0..100_000 {
            window.accept(spread(id), now);
            assert!(window.ring.len() as u128 <= 16 * LOAD as u128 + 2 * id);
            assert!(window.lines.len() * LOAD <= window.ring.len() + 8 * LOAD);
        }
        assert_eq!((window.len(), window.ring.len()), (1000, 1000));
        assert!(window.lines.len() <= 128 && window.times.is_empty());
        assert!(window.spill.capacity() < 60, "room for {} spilled", window.spill.capacity());
        assert_eq!((size_of::<Line>(), size_of::<Key>()), (64, 16));
    }

    #[test]
    fn a_window_doubles_until_it_has_its_capacity() {
        let now = some_instant();
        for (capacity, lines) in [
            (1, &[1][..]),
            (100, &[13]),
            (120, &[15]),
            (128, &[8, 16]),
            (1000, &[16, 32, 64, 128]),
            (3000, &[12, 24, 48, 96, 192, 384]),
        ] {
            let mut window = Dedup::new(capacity, None);
            let mut seen = Vec::new();
            for id in 0..2 * capacity as u128 {
                assert!(window.accept(spread(id), now), "{id} of {capacity}");
                assert_eq!(window.ring.len(), capacity.min(window.lines.len() * LOAD));
                seen.push(window.lines.len());
            }
            seen.dedup();
            assert_eq!(seen, lines, "{capacity}");
        }
    }

    #[test]
    fn numbers_last_for_four_windows_and_leave_bits_for_ids() {
        for (capacity, bits) in
            [(0, 2), (1, 2), (2, 3), (3, 4), (100_000, 19), (LARGEST, 30), (LARGEST + 1, 30)]
        {
            assert_eq!(Dedup::new(capacity, None).step, 1 << (32 - bits), "{capacity}");
        }
    }

    #[test]
    fn what_outlived_its_time_makes_room_in_its_line() {
        let mut now = some_instant();
        let mut window = Dedup::new(1000, Some(secs(10)));
        for id in 0..20_000 {
            now += Duration::from_millis(20);
            assert!(window.accept(spread(id), now));
        }
        assert!(window.spill.capacity() < 60, "room for {} spilled", window.spill.capacity());
    }

    /// Ids of one line, however many there are; most of them are unlike each other.
    fn same(n: u128) -> u128 {
        (n + 1).wrapping_mul(0x9e37_79b9) & 0xffff_ffff
    }

    #[test]
    fn an_id_that_came_back_after_its_time_is_there_once_when_the_window_grows() {
        let (start, later) = (some_instant(), some_instant() + secs(20));
        let mut window = Dedup::new(1 << 20, Some(secs(10)));
        assert!(window.accept(same(0), start));
        // They share its line until there are more, and take its slot.
        let beside = |n: u128| same(n) | 1 << (96 + 28);
        assert!((1..=15).all(|n| window.accept(beside(n), later)));
        assert!(window.accept(same(0), later), "too old to count");
        let lines = window.lines.len();
        assert!((0..100).all(|n| window.accept(spread(n), later)));
        assert!(window.lines.len() > lines && !window.accept(same(0), later));
    }

    #[test]
    fn an_id_that_came_back_after_its_time_is_done_where_it_counts() {
        let (start, later) = (some_instant(), some_instant() + secs(20));
        let mut window = Dedup::new(100, Some(secs(10)));
        let before = u128::MAX;
        assert!(window.accept(before, start) && window.accept(same(0), start));
        assert!((1..40).all(|n| window.accept(same(n), later)));
        assert!(window.accept(same(0), later));
        window.done(before);
        window.done(same(0));
        assert_eq!(window.state(same(0), later), Some(Processing::Done));
    }

    #[test]
    fn zero_is_never_usual() {
        let now = some_instant();
        let mut window = Dedup::new(300, None);
        assert!(window.accept(spread(1), now));
        let ids = [spread(2), spread(3), 0, spread(4)];
        assert_eq!(window.accept_usual(ids.into_iter()), 2);
        assert_eq!(window.accept_usual(ids[3..].iter().copied()), 1);
        assert!(window.accept(0, now) && !window.accept(0, now));
    }

    #[test]
    fn numbers_may_wrap_around() {
        let now = some_instant();
        let mut window = Dedup::new(50, None);
        window.number = window.step.wrapping_mul(0_u32.wrapping_sub(30));
        let start = window.number;
        for id in 0..200 {
            assert!(window.accept(spread(id), now), "{id}");
            assert!(!window.accept(spread(id.saturating_sub(48)), now), "{id}");
        }
        assert!(window.number < start);
    }

    #[test]
    fn an_empty_slot_is_of_no_id_whichever_number_is_next() {
        let now = some_instant();
        // Both look like it; they are far apart.
        let (id, other) = (0, u128::from(u32::MAX) << 96);
        let window = Dedup::new(300, None);
        for first in (0..=u32::MAX).step_by(window.step as usize) {
            let mut window = window.clone();
            window.number = first;
            assert!(window.accept(id, now) && window.ring.len() < 300);
            assert_eq!(window.state(other, now), None, "{first}");
            assert!(window.accept(other, now) && !window.accept(id, now), "{first}");
        }
    }

    #[test]
    fn a_slot_whose_number_came_again_does_no_harm() {
        let now = some_instant();
        let numbers = (1 << 32) / u128::from(Dedup::new(20, None).step);
        // Others elsewhere, until those slots say of others that they are there; and
        // of such as look like their own.
        let elsewhere = |n: u128| same((n + 10) % numbers) | u128::from(u32::MAX) << 96;
        for others in 20..numbers + 20 {
            let mut window = Dedup::new(20, None);
            assert!((0..10).all(|id| window.accept(same(id), now)));
            assert!((0..others).all(|id| window.accept(elsewhere(id), now)), "{others}");
            assert!((0..10).all(|gone| window.state(same(gone), now).is_none()), "{others}");
            assert!((0..10).all(|gone| !window.forget(same(gone))), "{others}");
            for id in 10..25 {
                assert!(window.accept(same(id), now) && !window.accept(same(id), now));
                let spilled = window.spill.contains_key(&Key::of(same(id)));
                assert!(!spilled, "there is room, after {others} for {id}");
            }
            assert!((0..10).all(|id| window.accept(same(id), now)), "fresh again");
        }
    }

    #[test]
    fn what_drops_out_of_its_line_is_spilled_while_it_counts() {
        let now = some_instant();
        let mut window = Dedup::new(40, None);
        assert!((0..40).all(|id| window.accept(same(id), now)));
        assert_eq!(window.spill.len(), 24);
        assert!((0..24).all(|id| window.spill.contains_key(&Key::of(same(id)))));
        assert!((0..40).all(|id| !window.accept(same(id), now)));
        for id in (0..40).step_by(3) {
            assert!(window.forget(same(id)) && !window.forget(same(id)), "{id}");
            assert!(window.accept(same(id), now) && !window.accept(same(id), now), "{id}");
        }
    }

    #[test]
    fn what_was_forgotten_is_not_spilled() {
        let now = some_instant();
        let mut window = Dedup::new(40, None);
        assert!((0..16).all(|id| window.accept(same(id), now)) && window.forget(same(3)));
        assert!((16..32).all(|id| window.accept(same(id), now)));
        assert!(window.spill.len() == 15 && window.accept(same(3), now));
        assert!(window.forget(same(5)) && !window.forget(same(5)), "its slot stays in the spill");
        assert!(window.accept(same(5), now) && !window.accept(same(5), now));
    }

    #[test]
    fn what_was_forgotten_is_as_usual_as_any_when_it_comes_again() {
        let now = some_instant();
        let mut window = Dedup::new(300, None);
        for _ in 0..3 {
            assert!(window.accept(spread(1), now) && window.forget(spread(1)));
        }
        assert_eq!(window.accept_usual(std::iter::once(spread(1))), 1, "no slot is like it");
    }

    #[test]
    fn the_spill_is_swept_before_it_grows() {
        let now = some_instant();
        let mut window = Dedup::new(40, None);
        assert!((0..10_000).all(|id| window.accept(same(id), now)));
        assert!(window.spill.capacity() < 100, "room for {} spilled", window.spill.capacity());
    }

    #[test]
    fn the_oldest_makes_room_in_its_line() {
        let now = some_instant();
        for ttl in [None, Some(secs(10))] {
            let mut window = Dedup::new(WAYS, ttl);
            assert!((0..100).all(|id| window.accept(same(id), now) && window.spill.is_empty()));
        }
    }

    #[test]
    fn what_spilled_finds_its_line_when_the_window_grows() {
        let now = some_instant();
        let mut window = Dedup::new(1 << 20, None);
        // They share a line of eight, and no line of more; others are elsewhere.
        let id = |n: u128| same(n) | (n % 2) << (96 + 28);
        let other = |n: u128| spread(n) | 1 << (96 + 31);
        assert!((0..40).all(|n| window.accept(id(n), now)));
        assert_eq!((window.lines.len(), window.spill.len()), (8, 24));
        assert!((0..40).all(|n| window.accept(other(n), now)));
        assert_eq!((window.lines.len(), window.spill.len()), (16, 8));
        assert!((0..40).all(|n| !window.accept(id(n), now) && window.forget(id(n))));
    }

    #[test]
    fn a_line_is_a_queue() {
        let mut line = Line::default();
        (1..=20).for_each(|slot| line.push(slot));
        let slots: Vec<u32> = (5..=20).rev().collect();
        assert_eq!((&line.0[..], line.oldest()), (&slots[..], 5));
    }

    #[test]
    fn slots_are_alike_by_what_numbers_leave_of_an_id() {
        let tags = 0x1fff;
        let (key, other) = (Key::of(0x1234_5678), Key::of(0x1234_4678));
        let mut line = Line([0x000f_e000 | key.tag(tags); WAYS]);
        (line.0[3], line.0[14]) = (0x000e_0000 | other.tag(tags), 0);
        assert_eq!(line.alike(key.tag(tags), tags), 0xffff & !(1 << 3 | 1 << 14));
        assert_eq!(line.alike(other.tag(tags), tags), 1 << 3);
        assert_eq!(line.alike(Key::of(0x5678_e000).tag(tags), tags), 1 << 14);
    }

    #[test]
    fn a_key_is_hashed_by_one_half_of_it() {
        let hasher = BuildHasherDefault::<AsItIs>::default();
        for id in [0, 1, 7 << 64 | 5, spread(1), spread(2), u128::MAX] {
            assert_eq!(hasher.hash_one(Key::of(id)), id as u64, "{id:x}");
        }
    }

    #[test]
    fn touching_changes_nothing() {
        let now = some_instant();
        let mut window = Dedup::new(100, None);
        window.touch(&[1, 2], |id| *id);
        for id in 0..100 {
            window.touch(&[id, id + 1], |id| spread(*id));
            assert!(window.accept(spread(id), now));
        }
        window.touch(&std::array::from_fn::<_, 203, _>(|id| id as u128), |id| spread(*id));
        assert!((0..100).all(|id| !window.accept(spread(id), now)));
        assert_eq!(window.state(spread(100), now), None);
    }

    #[test]
    fn ids_of_one_line_are_kept_apart() {
        let now = some_instant();
        let mut window = Dedup::new(40, None);
        for round in 0..3 {
            for n in round * 100..round * 100 + 40 {
                assert!(window.accept(same(n), now), "{n}");
                assert!(!window.accept(same(n), now), "{n}");
            }
            let held = round * 100..round * 100 + 40;
            assert!(held.clone().all(|n| !window.accept(same(n), now)));
            for n in held.step_by(2) {
                window.done(same(n));
                assert_eq!(window.state(same(n), now), Some(Processing::Done), "{n}");
                assert!(window.forget(same(n)) && !window.forget(same(n)), "{n}");
                assert!(window.accept(same(n), now), "{n}");
            }
        }
        assert!(!window.spill.is_empty());
    }

    /// The same promises kept in the plainest way: the last `capacity`
    /// acceptances in order, a forgotten one as a hole.
    #[derive(Debug)]
    struct Model {
        capacity: usize,
        ttl: Option<Duration>,
        last: VecDeque<Option<(u128, Instant, Processing)>>,
    }

    impl Model {
        fn of(window: &Dedup, ttl: Option<Duration>) -> Self {
            Self { capacity: window.capacity as usize, ttl, last: VecDeque::new() }
        }

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
            let mut model = Model::of(&window, ttl);
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
                prop_assert!(window.ring.len() <= capacity);
            }
        }
    }

    /// An id of one of a few `high` parts, most of which share no line, and one of
    /// a few low ones, or of more in one line: so some paths through the table are as
    /// likely as others.
    fn crowded() -> impl Strategy<Value = u128> {
        let parts = prop_oneof![2 => (0u128..20, 0u128..5), 1 => (Just(7), 0u128..40)];
        parts.prop_map(|(high, low)| {
            let high = (high * 0x0ccc_cccc) & 0xffff_ffff;
            (high << 96) | ((low * 0x2aaa_aaab) & 0xffff_ffff)
        })
    }

    /// A window, the numbers of which wrap around soon or not, and its model.
    fn window() -> impl Strategy<Value = (Dedup, Model)> {
        let number = prop_oneof![Just(0u32), 1u32..1000];
        (1usize..300, prop::option::of(1u64..40), number).prop_map(|(capacity, ttl, before)| {
            let ttl = ttl.map(secs);
            let mut window = Dedup::new(capacity, ttl);
            window.number = window.number.wrapping_sub(before.wrapping_mul(window.step));
            let model = Model::of(&window, ttl);
            (window, model)
        })
    }

    proptest! {
        #[test]
        fn ids_are_judged_together_as_they_are_one_by_one(
            (mut alone, _) in window(),
            groups in prop::collection::vec(
                (prop::collection::vec(crowded(), 1..40), crowded(), 0u64..6),
                1..20,
            ),
        ) {
            let mut now = some_instant();
            let mut together = alone.clone();
            for (ids, failed, wait) in groups {
                let mut fresh = Vec::new();
                while fresh.len() < ids.len() {
                    let usual = together.accept_usual(ids[fresh.len()..].iter().copied());
                    fresh.resize(fresh.len() + usual, true);
                    if let Some(id) = ids.get(fresh.len()) {
                        fresh.push(together.accept_next(*id, now));
                    }
                }
                let expected: Vec<_> = ids.iter().map(|id| alone.accept(*id, now)).collect();
                prop_assert_eq!(&fresh, &expected);
                prop_assert_eq!(together.forget(failed), alone.forget(failed));
                for id in &ids {
                    prop_assert_eq!(together.state(*id, now), alone.state(*id, now));
                }
                now += secs(wait);
            }
        }
    }

    proptest! {
        #[test]
        fn the_window_is_exact_whichever_path_an_id_takes(
            (mut window, mut model) in window(),
            steps in prop::collection::vec((0u8..40, crowded(), 0u64..6), 1..600),
        ) {
            let mut now = some_instant();
            for (step, id, wait) in steps {
                match step {
                    0 => now += secs(wait),
                    1..4 => {
                        window.done(id);
                        model.done(id);
                    }
                    4..8 => {
                        let known = model.state(id, now).is_some();
                        prop_assert!(window.forget(id) || !known);
                        model.forget(id);
                    }
                    _ => prop_assert_eq!(window.accept(id, now), model.accept(id, now)),
                }
                prop_assert_eq!(window.state(id, now), model.state(id, now), "id {:x}", id);
                prop_assert!(window.ring.len() <= model.capacity);
                for (at, key) in window.ring.iter().enumerate().filter(|(_, key)| key.is(HELD)) {
                    prop_assert_eq!(window.find(key.plain()), Some(at), "once, and found");
                }
            }
        }
    }

    /// `cargo test --release --lib dedup -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement, not a promise"]
    fn nanoseconds_for_each_acceptance() {
        const IDS: u128 = 5_000_000;
        let ids: Vec<u128> = (1..=IDS).map(spread).collect();
        let mut window = Dedup::new(100_000, None);
        for round in 0..3 {
            let start = some_instant();
            let fresh = ids.iter().filter(|id| window.accept(**id ^ (round << 40), start)).count();
            let each = (some_instant() - start).as_nanos() / IDS;
            println!("{each} ns each, {fresh} fresh");
        }
    }
}
