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
/// peer that does not know the key, or it could crowd them into one line. 125 of
/// their 128 bits are kept and compared.
///
/// Acceptances are numbered, and the ids lie in a ring in this order: what is
/// overwritten is what has outlived `capacity` others, and the processor writes
/// ahead of use what is written in order. An index says at which numbers an id
/// may be. It is all that is touched at random, and small, so that it stays in a
/// cache: a slot of four bytes for each id, fifteen of them and a head in one
/// line. A slot that says too much, because its id is long gone, does no harm: an
/// id is where the ring has it. So nothing is swept, and slots are reused in turn.
/// An id whose line is full of others that count goes to a small map.
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
    /// The acceptances of ids that found their lines full.
    spill: HashMap<Key, u32, BuildHasherDefault<AsItIs>>,
    /// Where the next id goes in the ring.
    next: usize,
    /// Behind the id that was done last: messages are done in the order in which
    /// they were accepted, mostly.
    done_next: usize,
    /// The number of the last acceptance, of as many bits as `numbers` has.
    number: u32,
    /// The bits of a slot that are a number; the others are of an id.
    numbers: u32,
    /// Acceptances that an id survives.
    capacity: u32,
    /// The same where nothing else ends an id; with a time to live, more than any.
    plain_capacity: u32,
    /// Nanoseconds that an id survives; `u64::MAX`, 584 years: for ever.
    ttl: u64,
    /// What times are counted from: the first acceptance.
    base: Option<Instant>,
}

/// Slots in one line; what is left of it is its head.
const WAYS: usize = 15;

/// Ids of the window for each line, so that few lines are ever full.
const LOAD: usize = 8;

/// The most lines of a window that has just begun.
const FIRST_LINES: usize = 16;

/// The largest capacity: what numbers leave of 32 bits tells ids apart.
const LARGEST: usize = 1 << 28;

/// The bits of a line's head that say which slot is filled next. Those above
/// count the ids of the line that have spilled.
const TURN: u32 = 15;
const ONE_SPILLED: u32 = TURN + 1;

/// What is kept of an id, with flags for what is known about it. All zero: nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Key {
    low: u64,
    /// Its low half chooses the line.
    high: u64,
}

/// It is an id.
const HELD: u64 = 1 << 63;
/// Its message was processed to success.
const DONE: u64 = 1 << 62;
/// Its number is in the spill, not in its line.
const SPILLED: u64 = 1 << 61;

/// One cache line: slots, each with the number of an acceptance and, in the bits
/// above that, some of its id; last, the head.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Line([u32; WAYS + 1]);

/// Where an id is.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// In the ring.
    at: usize,
    /// Which slot of its line says so; `None`: the spill does.
    way: Option<usize>,
}

impl Dedup {
    /// An empty window of `capacity` ids (at least one), each remembered for
    /// `ttl` at most. Nothing is allocated yet.
    pub(crate) fn new(capacity: usize, ttl: Option<Duration>) -> Self {
        // It is no larger than that.
        let capacity = capacity.clamp(1, LARGEST) as u32;
        Self {
            lines: Vec::new(),
            ring: Vec::new(),
            times: Vec::new(),
            spill: HashMap::default(),
            next: 0,
            done_next: 0,
            // A slot that was never filled has number zero, and counts no more.
            number: capacity,
            // A slot's turn comes before numbers repeat, almost always.
            numbers: (capacity * 4).next_power_of_two() - 1,
            capacity,
            plain_capacity: if ttl.is_some() { u32::MAX } else { capacity },
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
    /// [`accept_next`](Self::accept_next) to judge. With a time to live, that is each.
    #[inline]
    pub(crate) fn accept_usual(&mut self, ids: impl Iterator<Item = u128>) -> usize {
        if self.ttl != u64::MAX {
            return 0;
        }
        // Most ids are unlike all others of their line, and take the place of one
        // that counts no more: that much is decided in one branch, as nobody could
        // predict several. What holds for all of them stays in registers.
        let Self { lines, ring, numbers, plain_capacity, capacity, .. } = self;
        let (lines, ring) = (lines.as_mut_slice(), ring.as_mut_slice());
        let (numbers, oldest_that_counts, behind_last) =
            (*numbers, *plain_capacity, *capacity as usize);
        let (mut number, mut next, mut accepted) = (self.number, self.next, 0);
        for id in ids {
            let key = Key::of(id);
            let Some(oldest) = ring.get_mut(next) else { break };
            let following = (number + 1) & numbers;
            let index = key.index(lines.len());
            let line = &mut lines[index];
            let age = following.wrapping_sub(line.slot_in_turn()) & numbers;
            let is_usual = (line.alike(key, numbers) == 0)
                & !line.has_spilled()
                & (age >= oldest_that_counts)
                & !oldest.is(SPILLED);
            if !is_usual {
                break;
            }
            *oldest = key;
            line.fill_in_turn(key.slot(following, numbers));
            number = following;
            next = if next + 1 == behind_last { 0 } else { next + 1 };
            accepted += 1;
        }
        (self.number, self.next) = (number, next);
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
        if let Some(place) = self.find(key) {
            if self.is_young(place.at, now) {
                return false;
            }
            self.empty(key, place);
        }
        let number = self.following();
        self.enter(key, number, now);
        self.step(number);
        true
    }

    /// Asks the memory for the lines of ids that [`accept_usual`](Self::accept_usual) will be
    /// asked about: the waits for them overlap, as those of single look-ups
    /// would not.
    pub(crate) fn touch(&self, ids: impl Iterator<Item = u128>) {
        let lines = self.lines.as_slice();
        if lines.is_empty() {
            return;
        }
        let heads = ids.map(|id| lines[Key::of(id).index(lines.len())].head());
        std::hint::black_box(heads.fold(0, |all, head| all ^ head));
    }

    /// The message was processed to success. Without effect on an id that is
    /// not remembered.
    pub(crate) fn done(&mut self, id: u128) {
        let at = if self.is_done_next(id) {
            self.done_next
        } else {
            let Some(place) = self.find(Key::of(id)) else { return };
            place.at
        };
        self.ring[at].high |= DONE;
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
        if let Some(place) = place {
            self.empty(key, place);
        }
        place.is_some()
    }

    /// How far the message with this id got, if it is remembered at `now`.
    pub(crate) fn state(&self, id: u128, now: Instant) -> Option<Processing> {
        let place = self.find(Key::of(id))?;
        let now = self.base.map_or(0, |base| nanos(now.saturating_duration_since(base)));
        self.is_young(place.at, now).then(|| {
            if self.ring[place.at].is(DONE) { Processing::Done } else { Processing::InFlight }
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

    /// Where an id is, if it is one of the last `capacity`.
    #[inline]
    fn find(&self, key: Key) -> Option<Place> {
        let line = self.lines.get(key.index(self.lines.len()))?;
        let mut alike = line.alike(key, self.numbers) & !(1 << WAYS);
        while alike != 0 {
            let way = alike.trailing_zeros() as usize;
            if let Some(at) = self.place_of(line.0[way])
                && self.ring[at].is_in_line(key)
            {
                return Some(Place { at, way: Some(way) });
            }
            alike &= alike - 1;
        }
        if !line.has_spilled() {
            return None;
        }
        let at = self.place_of(*self.spill.get(&key)?)?;
        Some(Place { at, way: None })
    }

    /// Where in the ring the acceptance is whose number a slot has, if it counts.
    #[inline]
    fn place_of(&self, slot: u32) -> Option<usize> {
        let age = self.number.wrapping_sub(slot) & self.numbers;
        if age >= self.capacity {
            return None;
        }
        // The last one is right before the next.
        let back = age as usize + 1;
        let at = if back <= self.next { self.next } else { self.next + self.capacity as usize };
        Some(at - back).filter(|at| *at < self.ring.len())
    }

    /// The number of the next acceptance.
    #[inline]
    fn following(&self) -> u32 {
        (self.number + 1) & self.numbers
    }

    /// The next place in the ring holds the acceptance of this number now.
    #[inline]
    fn step(&mut self, number: u32) {
        self.number = number;
        self.next = self.behind(self.next);
    }

    /// The place behind one in the ring.
    #[inline]
    fn behind(&self, at: usize) -> usize {
        if at + 1 == self.capacity as usize { 0 } else { at + 1 }
    }

    /// Puts a fresh id into the next place, and its number into its line or, if
    /// that is full of others that count, into the spill.
    fn enter(&mut self, key: Key, number: u32, now: u64) {
        let oldest = self.ring[self.next];
        if oldest.is(SPILLED) {
            self.unspill(oldest.plain());
        }
        // It counts no more from here on.
        self.ring[self.next] = Key::default();
        if let Some(time) = self.times.get_mut(self.next) {
            *time = now;
        }
        let index = key.index(self.lines.len());
        let slot = key.slot(number, self.numbers);
        let flags = match self.free(index, now) {
            Some(way) => {
                // Too old to count: without a slot it would not be found when it
                // comes again, and lie in the ring twice.
                if let Some(old) = self.tenant(index, way) {
                    self.ring[old] = Key::default();
                }
                self.lines[index].fill(way, slot);
                0
            }
            None => {
                self.lines[index].0[WAYS] += ONE_SPILLED;
                self.spill.insert(key, number);
                SPILLED
            }
        };
        self.ring[self.next] = Key { high: key.high | flags, ..key };
    }

    /// A slot of the line that nothing which counts needs: the one whose turn it is,
    /// if it is one.
    fn free(&self, index: usize, now: u64) -> Option<usize> {
        let turn = self.lines[index].turn();
        (turn..WAYS).chain(0..turn).find(|way| !self.is_needed(index, *way, now))
    }

    /// Whether a slot says where an id is that counts.
    fn is_needed(&self, index: usize, way: usize, now: u64) -> bool {
        self.tenant(index, way).is_some_and(|at| self.is_young(at, now))
    }

    /// Where in the ring the id is that a slot was filled for, if it is there.
    fn tenant(&self, index: usize, way: usize) -> Option<usize> {
        let slot = self.lines[index].0[way];
        self.place_of(slot).filter(|at| {
            let key = self.ring[*at];
            key.is(HELD)
                && !key.is(SPILLED)
                && key.index(self.lines.len()) == index
                && key.slot(slot, self.numbers) == slot
        })
    }

    /// What is there is no more.
    fn empty(&mut self, key: Key, place: Place) {
        self.ring[place.at] = Key::default();
        match place.way {
            Some(way) => {
                let index = key.index(self.lines.len());
                self.lines[index].0[way] = 0;
            }
            None => self.unspill(key),
        }
    }

    #[cold]
    fn unspill(&mut self, key: Key) {
        if self.spill.remove(&key).is_some() {
            let index = key.index(self.lines.len());
            self.lines[index].0[WAYS] -= ONE_SPILLED;
        }
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
        let (end, last) = (self.next, self.number);
        let mut number = last.wrapping_sub(end as u32) & self.numbers;
        self.number = number;
        for at in 0..end {
            self.next = at;
            number = self.following();
            let key = self.ring[at];
            if key.is(HELD) {
                let done = key.high & DONE;
                let accepted = self.times.get(at).copied().unwrap_or(0);
                self.ring[at] = Key::default();
                self.enter(key.plain(), number, accepted);
                self.ring[at].high |= done;
            }
            self.number = number;
        }
        (self.next, self.number) = (end, last);
    }
}

impl Key {
    #[inline]
    fn of(id: u128) -> Self {
        Self { low: id as u64, high: (id >> 64) as u64 & (SPILLED - 1) | HELD }
    }

    /// The key alone.
    fn plain(self) -> Self {
        Self { high: self.high & !(DONE | SPILLED), ..self }
    }

    #[inline]
    fn is(self, flag: u64) -> bool {
        self.high & flag != 0
    }

    /// Whether this is the other, and its line has its number.
    #[inline]
    fn is_in_line(self, key: Key) -> bool {
        (self.low, self.high & !DONE) == (key.low, key.high)
    }

    /// Its line among so many: as 31 of its bits lie among all.
    #[inline]
    fn index(self, lines: usize) -> usize {
        (((self.high & (u32::MAX >> 1) as u64) * lines as u64) >> 31) as usize
    }

    /// What a line has of it, and of its acceptance's number.
    #[inline]
    fn slot(self, number: u32, numbers: u32) -> u32 {
        self.low as u32 & !numbers | number & numbers
    }
}

impl Line {
    /// Which slots have the same bits of an id as this one: a bit for each, and one
    /// for the head, which seldom looks like it by accident.
    #[inline]
    fn alike(&self, key: Key, numbers: u32) -> u32 {
        let wanted = key.slot(0, numbers);
        let mut alike = 0;
        // Without the head, this would be no loop over whole vectors.
        for (way, slot) in self.0.iter().enumerate() {
            alike |= u32::from(slot & !numbers == wanted) << way;
        }
        alike
    }

    #[inline]
    fn head(&self) -> u32 {
        self.0[WAYS]
    }

    #[inline]
    fn has_spilled(&self) -> bool {
        self.head() >= ONE_SPILLED
    }

    /// Which slot is filled next.
    #[inline]
    fn turn(&self) -> usize {
        (self.head() & TURN) as usize
    }

    #[inline]
    fn slot_in_turn(&self) -> u32 {
        self.0[self.turn()]
    }

    /// Fills the slot whose turn it is, in a line of which nothing has spilled.
    #[inline]
    fn fill_in_turn(&mut self, slot: u32) {
        let turn = self.turn();
        self.0[turn] = slot;
        self.0[WAYS] = if turn + 1 < WAYS { turn as u32 + 1 } else { 0 };
    }

    /// Fills a slot, the turn of which has come or not.
    fn fill(&mut self, way: usize, slot: u32) {
        if way != self.turn() {
            self.0[way] = slot;
            return;
        }
        let spilled = self.head() & !TURN;
        self.fill_in_turn(slot);
        self.0[WAYS] |= spilled;
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
        assert!(window.spill.len() < 30, "{} spilled", window.spill.len());
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
            assert_eq!(Dedup::new(capacity, None).numbers, (1 << bits) - 1, "{capacity}");
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
        assert!(window.spill.len() < 30, "{} spilled", window.spill.len());
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
        let beside = |n: u128| same(n) | 1 << (64 + 27);
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
        let before = u128::from(u32::MAX >> 1) << 64;
        assert!(window.accept(before, start) && window.accept(same(0), start));
        assert!((1..40).all(|n| window.accept(same(n), later)));
        assert!(window.accept(same(0), later));
        window.done(before);
        window.done(same(0));
        assert_eq!(window.state(same(0), later), Some(Processing::Done));
    }

    #[test]
    fn numbers_may_wrap_around() {
        let now = some_instant();
        let mut window = Dedup::new(50, None);
        let start = window.numbers - 30;
        window.number = start;
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
        let (id, other) = (0, u128::from(u32::MAX >> 1) << 64);
        let window = Dedup::new(300, None);
        for first in 0..=window.numbers {
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
        let numbers = u128::from(Dedup::new(20, None).numbers) + 1;
        // Others elsewhere, until those slots say of others that they are there; and
        // of such as look like their own.
        let elsewhere = |n: u128| same((n + 10) % numbers) | u128::from(u32::MAX >> 1) << 64;
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
    fn a_line_counts_what_it_spilled() {
        let now = some_instant();
        let mut window = Dedup::new(40, None);
        for id in 0..40 {
            assert!(window.accept(same(id), now));
        }
        assert_eq!((window.spill.len(), window.lines[0].head() / ONE_SPILLED), (25, 25));
        for id in 15..40 {
            assert!(window.lines[0].has_spilled() && window.forget(same(id)), "{id}");
        }
        assert!(window.spill.is_empty() && !window.lines[0].has_spilled());
        assert!((0..15).all(|id| !window.accept(same(id), now)));
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
    fn an_emptied_slot_makes_room_though_its_number_is_one_that_counts() {
        let now = some_instant();
        // As an emptied slot has it: number zero, and nothing of an id.
        let like_empty = 1 << 70;
        for forgets in [&[like_empty][..], &[same(3)], &[same(3), like_empty]] {
            let mut window = Dedup::new(40, None);
            window.number = window.numbers - 15;
            assert!((0..15).all(|id| window.accept(same(id), now)));
            assert!(window.accept(like_empty, now) && window.number == 0);
            assert_eq!(window.spill.len(), 1);
            assert!(forgets.iter().all(|id| window.forget(*id)));
            let spilled = window.spill.len();
            let room = forgets.iter().filter(|id| **id != like_empty).count();
            assert!(window.accept(same(15), now));
            assert_eq!(window.spill.len(), spilled + 1 - room, "{forgets:?}");
        }
    }

    #[test]
    fn what_spilled_finds_its_line_when_the_window_grows() {
        let now = some_instant();
        let mut window = Dedup::new(1 << 20, None);
        // They share a line of eight, and no line of more; others are elsewhere.
        let id = |n: u128| same(n) | (n % 2) << (64 + 27);
        let other = |n: u128| spread(n) | 1 << (64 + 30);
        assert!((0..40).all(|n| window.accept(id(n), now)));
        let spilled = |window: &Dedup| {
            let heads = window.lines.iter().map(|line| line.head() / ONE_SPILLED);
            (window.lines.len(), window.spill.len(), heads.sum::<u32>())
        };
        assert_eq!(spilled(&window), (8, 25, 25));
        assert!((0..40).all(|n| window.accept(other(n), now)));
        assert_eq!(spilled(&window), (16, 10, 10));
        assert!((0..40).all(|n| !window.accept(id(n), now) && window.forget(id(n))));
        assert_eq!(spilled(&window), (16, 0, 0));
    }

    #[test]
    fn a_line_fills_its_slots_in_turn() {
        let mut line = Line::default();
        for slot in 1..=20 {
            line.fill_in_turn(slot);
        }
        let slots: Vec<u32> = (16..=20).chain(6..=15).collect();
        assert_eq!((&line.0[..WAYS], line.turn()), (&slots[..], 5));
        line.0[WAYS] += 3 * ONE_SPILLED;
        line.fill(7, 99);
        assert_eq!((line.0[7], line.turn(), line.head() / ONE_SPILLED), (99, 5, 3));
        line.fill(5, 98);
        assert_eq!((line.0[5], line.turn(), line.head() / ONE_SPILLED), (98, 6, 3));
    }

    #[test]
    fn slots_are_alike_by_what_numbers_leave_of_an_id() {
        let numbers = 0x000f_ffff;
        let (key, other) = (Key::of(0x1234_5678), Key::of(0x1244_5678));
        let mut line = Line([key.slot(7, numbers); WAYS + 1]);
        (line.0[3], line.0[14], line.0[WAYS]) = (other.slot(7, numbers), 0, 5);
        assert_eq!(line.alike(key, numbers), 0x7fff & !(1 << 3 | 1 << 14));
        assert_eq!(line.alike(other, numbers), 1 << 3);
        assert_eq!(line.alike(Key::of(0x0004_5678), numbers), 1 << 14 | 1 << WAYS, "and the head");
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
        window.touch([1, 2].into_iter());
        for id in 0..100 {
            window.touch([spread(id), spread(id + 1)].into_iter());
            assert!(window.accept(spread(id), now));
        }
        window.touch((0..200).map(spread));
        assert!((0..100).all(|id| !window.accept(spread(id), now)));
        assert_eq!(window.state(spread(100), now), None);
    }

    #[test]
    fn ids_of_one_line_are_kept_apart_and_leave_the_spill() {
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
        assert!(window.spill.len() <= 40 && !window.spill.is_empty());
        for id in 0..1000 {
            window.accept(spread(id), now);
        }
        let left = |key: &Key| key.high == HELD;
        assert!(!window.spill.keys().any(left), "none of those has stayed");
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
                prop_assert!(window.ring.len() <= capacity && window.spill.len() <= capacity);
            }
        }
    }

    /// An id of one of a few `high` parts, most of which share no line, and one of
    /// a few low ones: so some paths through the table are as likely as others.
    fn crowded() -> impl Strategy<Value = u128> {
        (0u128..20, 0u128..5).prop_map(|(high, low)| {
            let high = (high * 0x0666_6666) & 0x7fff_ffff;
            (high << 64) | (low * 0x2aaa_aaab)
        })
    }

    proptest! {
        #[test]
        fn ids_are_judged_together_as_they_are_one_by_one(
            capacity in 1usize..300,
            ttl in prop::option::of(1u64..40),
            first in prop_oneof![Just(0u32), 1u32..5000],
            groups in prop::collection::vec(
                (prop::collection::vec(crowded(), 1..40), crowded(), 0u64..6),
                1..20,
            ),
        ) {
            let mut now = some_instant();
            let mut alone = Dedup::new(capacity, ttl.map(secs));
            alone.number = (alone.number + first) & alone.numbers;
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
            capacity in 1usize..300,
            ttl in prop::option::of(1u64..40),
            first in prop_oneof![Just(0u32), 1u32..5000],
            steps in prop::collection::vec((0u8..40, crowded(), 0u64..6), 1..600),
        ) {
            let ttl = ttl.map(secs);
            let mut now = some_instant();
            let mut window = Dedup::new(capacity, ttl);
            window.number = (window.number + first) & window.numbers;
            let mut model = Model { capacity, ttl, last: VecDeque::new() };
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
                prop_assert!(window.len() <= capacity && window.ring.len() <= capacity);
                for (index, line) in window.lines.iter().enumerate() {
                    let spilled = window.spill.keys().filter(|key| {
                        key.index(window.lines.len()) == index
                    });
                    prop_assert_eq!(line.head() / ONE_SPILLED, spilled.count() as u32);
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
