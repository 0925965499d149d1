//! The window of message ids that were seen.

use std::collections::{HashMap, VecDeque};
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
/// peer that does not know the key, or it could crowd them into one line. 95 of
/// their 128 bits are kept and compared.
///
/// The table is larger than any cache, so what counts is how many of its lines
/// an id touches: one, which holds four ids with the numbers of their
/// acceptances. There is no ring: an id is old when its number is, and the next
/// line in turn is swept at each acceptance. An id whose line is full of others
/// that count goes to a small map. Memory grows with use, to about 64 bytes for
/// each id of the capacity (half as much again with a time to live).
#[derive(Debug, Clone)]
pub(crate) struct Dedup {
    lines: Vec<Line>,
    /// When each id was accepted, in nanoseconds; kept with a time to live only.
    times: Vec<[u64; WAYS]>,
    /// Ids that found their lines full, with their acceptances, and their order.
    spill: HashMap<Key, Spilled, BuildHasherDefault<AsItIs>>,
    spill_order: VecDeque<(u64, Key)>,
    /// Slots in use, as long as the table may have to grow.
    used: usize,
    /// One for each id of the capacity, so that few lines are ever full.
    most_lines: usize,
    /// The line to be swept next.
    hand: usize,
    /// Acceptances that an id survives.
    capacity: u64,
    /// Nanoseconds that an id survives; `u64::MAX`, 584 years: for ever.
    ttl: u64,
    /// Acceptances so far: the number of the last.
    accepted: u64,
    /// What times are counted from: the first acceptance.
    base: Option<Instant>,
}

/// Ids in one line.
const WAYS: usize = 4;

/// The most lines of a window that has just begun.
const FIRST_LINES: usize = 16;

/// Acceptances for each line that is swept: all are, long before numbers repeat.
const SWEEP_EVERY: u64 = 4;

/// The largest capacity: acceptances are told apart by 31 bits, and swept long
/// before they repeat.
const LARGEST: usize = 1 << 28;

/// The top bit of each `high`: together, how many ids of the line have spilled.
const SPILLED: u32 = 1 << 31;

/// As many as those bits can tell; then, some.
const MANY_SPILLED: u32 = (1 << WAYS) - 1;

/// One cache line.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Line {
    /// The low half of each id.
    keys: [u64; WAYS],
    /// 31 bits of the high half, which choose the line.
    highs: [u32; WAYS],
    /// The number of its acceptance, times two, plus one when done; 0: empty.
    marks: [u32; WAYS],
}

/// What is kept of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    low: u64,
    high: u32,
}

#[derive(Debug, Clone, Copy)]
struct Spilled {
    number: u64,
    at: u64,
    done: bool,
}

/// The point from which an id is judged.
#[derive(Debug, Clone, Copy)]
struct Horizon {
    /// The last acceptance's number.
    accepted: u64,
    /// As in [`Dedup`].
    capacity: u64,
    /// Now, in nanoseconds since the base.
    now: u64,
    /// As in [`Dedup`].
    ttl: u64,
}

/// Where an id is.
#[derive(Debug, Clone, Copy)]
enum Place {
    Line { line: usize, way: usize },
    Spill,
}

impl Dedup {
    /// An empty window of `capacity` ids (at least one), each remembered for
    /// `ttl` at most. Nothing is allocated yet.
    pub(crate) fn new(capacity: usize, ttl: Option<Duration>) -> Self {
        let capacity = capacity.clamp(1, LARGEST);
        Self {
            most_lines: first_lines(capacity) << doublings(capacity),
            lines: Vec::new(),
            times: Vec::new(),
            spill: HashMap::default(),
            spill_order: VecDeque::new(),
            used: 0,
            hand: 0,
            capacity: capacity as u64,
            ttl: ttl.map_or(u64::MAX, nanos),
            accepted: 0,
            base: None,
        }
    }

    /// Whether a message with this id is fresh, and from now on in flight;
    /// `false`: it is a duplicate.
    #[inline]
    pub(crate) fn accept(&mut self, id: u128, now: Instant) -> bool {
        // Most ids are unlike all others of their line, and find room in it: that
        // much is decided without a branch that nobody could predict.
        let key = Key::of(id);
        let (grows, times) = (self.lines.len() < self.most_lines, !self.times.is_empty());
        if grows | times {
            return self.accept_carefully(key, now);
        }
        let index = self.index(key);
        let line = &mut self.lines[index];
        let free = line.outdated(self.accepted, self.capacity).trailing_zeros() as usize;
        if line.may_know(key) | (free >= WAYS) {
            return self.accept_carefully(key, now);
        }
        self.accepted = following(self.accepted);
        line.set(free, key, self.accepted);
        if self.accepted.is_multiple_of(SWEEP_EVERY) {
            self.sweep_plainly();
        }
        true
    }

    /// The same, whatever the table and the id are like.
    #[inline(never)]
    fn accept_carefully(&mut self, key: Key, now: Instant) -> bool {
        if self.used >= self.lines.len() && self.lines.len() < self.most_lines {
            self.grow();
        }
        let index = self.index(key);
        let horizon = self.horizon(now);
        if self.lines[index].may_know(key) {
            return self.look_closer(index, key, horizon);
        }
        self.enter(index, key, self.free(index, horizon), horizon);
        true
    }

    /// Judges an id whose line says that it may know it.
    fn look_closer(&mut self, index: usize, key: Key, horizon: Horizon) -> bool {
        let free = self.free(index, horizon);
        let same = self.lines[index].way_of(key).map_or(0, |way| 1 << way);
        if same & !free != 0 || self.lines[index].has_spilled() && self.is_in_spill(key, horizon) {
            return false;
        }
        // Where it was before, or where nothing is that counts.
        self.enter(index, key, if same != 0 { same } else { free }, horizon);
        true
    }

    /// Enters a fresh id, in one of the `free` slots of its line if there are any.
    fn enter(&mut self, index: usize, key: Key, free: u32, mut horizon: Horizon) {
        self.accepted = following(self.accepted);
        horizon.accepted = self.accepted;
        if free == 0 {
            self.put_in_spill(index, key, horizon);
        } else {
            self.put(index, free.trailing_zeros() as usize, key, horizon);
        }
        if self.accepted.is_multiple_of(SWEEP_EVERY) {
            self.sweep(horizon);
        }
    }

    /// Asks the memory for the lines of ids that [`accept`](Self::accept) will be
    /// asked about: the waits for them overlap, as those of single look-ups
    /// would not.
    pub(crate) fn touch(&self, ids: impl Iterator<Item = u128>) {
        let lines = self.lines.as_slice();
        if lines.is_empty() {
            return;
        }
        let marks = ids.map(|id| lines[Key::of(id).index(lines.len())].marks[0]);
        std::hint::black_box(marks.fold(0, |all, mark| all ^ mark));
    }

    /// The message was processed to success. Without effect on an id that is
    /// not remembered.
    pub(crate) fn done(&mut self, id: u128) {
        let key = Key::of(id);
        match self.find(key) {
            Some(Place::Line { line, way }) => self.lines[line].marks[way] |= 1,
            Some(Place::Spill) => {
                if let Some(spilled) = self.spill.get_mut(&key) {
                    spilled.done = true;
                }
            }
            None => {}
        }
    }

    /// The message failed: its redelivery shall be accepted. `true` if the id
    /// was held, which it may be for some time after it stopped to count.
    pub(crate) fn forget(&mut self, id: u128) -> bool {
        let key = Key::of(id);
        let place = self.find(key);
        match place {
            Some(Place::Line { line, way }) => self.clear(line, way),
            Some(Place::Spill) => self.unspill(key),
            None => {}
        }
        place.is_some()
    }

    /// How far the message with this id got, if it is remembered at `now`.
    pub(crate) fn state(&self, id: u128, now: Instant) -> Option<Processing> {
        let horizon = Horizon {
            accepted: self.accepted,
            capacity: self.capacity,
            now: self.base.map_or(0, |base| nanos(now.saturating_duration_since(base))),
            ttl: self.ttl,
        };
        let key = Key::of(id);
        let mark = self.mark_of(self.find(key)?, key);
        horizon.holds(mark).then_some(if mark.done {
            Processing::Done
        } else {
            Processing::InFlight
        })
    }

    /// Ids held in memory, remembered or not.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lines.iter().map(Line::used).sum::<usize>() + self.spill.len()
    }

    #[inline]
    fn horizon(&mut self, now: Instant) -> Horizon {
        // Without a time to live, time is of no concern.
        let now = if self.ttl == u64::MAX {
            0
        } else {
            nanos(now.saturating_duration_since(*self.base.get_or_insert(now)))
        };
        Horizon { accepted: self.accepted, capacity: self.capacity, now, ttl: self.ttl }
    }

    /// Where an id is, remembered or not: it is in one place at most.
    #[inline]
    fn find(&self, key: Key) -> Option<Place> {
        if self.lines.is_empty() {
            return None;
        }
        let line = self.index(key);
        let found = self.lines[line].way_of(key).map(|way| Place::Line { line, way });
        if found.is_some() || !self.lines[line].has_spilled() {
            return found;
        }
        self.spill.contains_key(&key).then_some(Place::Spill)
    }

    fn mark_of(&self, place: Place, key: Key) -> Mark {
        match place {
            Place::Line { line, way } => self.mark(line, way),
            Place::Spill => self.spill.get(&key).map_or(Mark::NONE, |spilled| Mark {
                number: spilled.number as u32 & NUMBERS,
                at: spilled.at,
                done: spilled.done,
            }),
        }
    }

    fn mark(&self, line: usize, way: usize) -> Mark {
        let mark = self.lines[line].marks[way];
        let at = self.times.get(line).map_or(u64::MAX, |times| times[way]);
        Mark { number: mark >> 1, at, done: mark & 1 == 1 }
    }

    /// Which slots of a line hold nothing that counts: a bit for each.
    #[inline]
    fn free(&self, index: usize, horizon: Horizon) -> u32 {
        let mut free = self.lines[index].outdated(horizon.accepted, horizon.capacity);
        if let Some(times) = self.times.get(index) {
            for (way, at) in times.iter().enumerate() {
                free |= u32::from(!horizon.is_young(*at)) << way;
            }
        }
        free
    }

    /// Whether the spill remembers the id; one that it holds in vain goes.
    #[cold]
    fn is_in_spill(&mut self, key: Key, horizon: Horizon) -> bool {
        let remembered =
            self.spill.contains_key(&key) && horizon.holds(self.mark_of(Place::Spill, key));
        if !remembered {
            self.unspill(key);
        }
        remembered
    }

    /// Doubles the lines while the window has not its full size.
    #[cold]
    fn grow(&mut self) {
        self.resize(if self.lines.is_empty() {
            first_lines(self.capacity as usize)
        } else {
            self.lines.len() * 2
        });
    }

    fn put(&mut self, line: usize, way: usize, key: Key, horizon: Horizon) {
        let grows = self.lines.len() < self.most_lines;
        let slot = &mut self.lines[line];
        if grows {
            self.used += usize::from(slot.marks[way] == 0);
        }
        slot.set(way, key, horizon.accepted);
        if let Some(times) = self.times.get_mut(line) {
            times[way] = horizon.now;
        }
    }

    #[cold]
    fn put_in_spill(&mut self, line: usize, key: Key, horizon: Horizon) {
        self.lines[line].spill();
        let number = horizon.accepted;
        self.spill.insert(key, Spilled { number, at: horizon.now, done: false });
        self.spill_order.push_back((number, key));
    }

    #[cold]
    fn unspill(&mut self, key: Key) {
        if self.spill.remove(&key).is_some() {
            let index = self.index(key);
            self.lines[index].unspill();
        }
    }

    fn clear(&mut self, line: usize, way: usize) {
        self.lines[line].marks[way] = 0;
        self.used = self.used.saturating_sub(1);
    }

    /// Empties the outdated slots of the next line in turn, so that numbers are
    /// gone long before they repeat; and the outdated part of the spill.
    fn sweep(&mut self, horizon: Horizon) {
        let hand = self.turn();
        let free = self.free(hand, horizon);
        let line = &mut self.lines[hand];
        let before = line.used();
        line.clear(free);
        self.used = self.used.saturating_sub(before - line.used());
        self.sweep_spill();
    }

    /// The same, when the table is as large as it gets and knows no time.
    #[inline]
    fn sweep_plainly(&mut self) {
        let hand = self.turn();
        let line = &mut self.lines[hand];
        line.clear(line.outdated(self.accepted, self.capacity));
        self.sweep_spill();
    }

    /// The line whose turn it is to be swept.
    #[inline]
    fn turn(&mut self) -> usize {
        self.hand = if self.hand + 1 < self.lines.len() { self.hand + 1 } else { 0 };
        self.hand
    }

    #[inline]
    fn sweep_spill(&mut self) {
        let oldest = self.spill_order.front().map(|(number, _)| *number);
        match oldest {
            None => self.lines[self.hand].set_spilled(0),
            Some(number) if self.accepted - number >= self.capacity => self.shorten_spill(),
            Some(_) => {}
        }
    }

    #[cold]
    fn shorten_spill(&mut self) {
        while let Some((number, key)) = self.spill_order.front().copied()
            && self.accepted - number >= self.capacity
        {
            self.spill_order.pop_front();
            if self.spill.get(&key).is_some_and(|spilled| spilled.number == number) {
                self.unspill(key);
            }
        }
    }

    /// Spreads the ids over `count` lines.
    fn resize(&mut self, count: usize) {
        let lines = std::mem::replace(&mut self.lines, vec![Line::default(); count]);
        let times = std::mem::take(&mut self.times);
        if self.ttl != u64::MAX {
            self.times = vec![[0; WAYS]; count];
        }
        self.used = 0;
        for (index, line) in lines.into_iter().enumerate() {
            for way in (0..WAYS).filter(|way| line.marks[*way] != 0) {
                let at = times.get(index).map_or(0, |times| times[way]);
                self.move_in(line.key(way), line.marks[way], at);
            }
        }
        for key in self.spill.keys() {
            self.lines[key.index(count)].spill();
        }
    }

    /// Puts an id where it belongs among more lines than before: what shared a
    /// line is spread over two, so there is room.
    fn move_in(&mut self, key: Key, mark: u32, at: u64) {
        let line = self.index(key);
        let Some(way) = (0..WAYS).find(|way| self.lines[line].marks[*way] == 0) else { return };
        let slot = &mut self.lines[line];
        slot.keys[way] = key.low;
        slot.highs[way] = key.high | slot.highs[way] & SPILLED;
        slot.marks[way] = mark;
        self.used += 1;
        if let Some(times) = self.times.get_mut(line) {
            times[way] = at;
        }
    }

    /// The line of an id, when there are lines.
    #[inline]
    fn index(&self, key: Key) -> usize {
        key.index(self.lines.len())
    }
}

/// What a slot says of its id.
#[derive(Debug, Clone, Copy)]
struct Mark {
    /// The low 31 bits of its acceptance's number.
    number: u32,
    at: u64,
    done: bool,
}

/// The bits of an acceptance's number that are kept, and of a mark.
const NUMBERS: u32 = u32::MAX >> 1;
const MARKS: u64 = u32::MAX as u64;

impl Mark {
    /// Of nothing.
    const NONE: Self = Self { number: 0, at: 0, done: false };
}

impl Horizon {
    /// Whether this acceptance still counts. The time of another thread may be
    /// a little behind that of the acceptance: that is no age.
    fn holds(self, mark: Mark) -> bool {
        self.counts(mark.number) && self.is_young(mark.at)
    }

    /// Whether fewer than `capacity` ids were accepted after this number.
    #[inline]
    fn counts(self, number: u32) -> bool {
        let age = (self.accepted as u32).wrapping_sub(number) & NUMBERS;
        u64::from(age) < self.capacity
    }

    #[inline]
    fn is_young(self, at: u64) -> bool {
        self.now.saturating_sub(at) < self.ttl
    }
}

impl Key {
    fn of(id: u128) -> Self {
        Self { low: id as u64, high: (id >> 64) as u32 & !SPILLED }
    }

    /// Its line among so many: as its `high` lies among all. When lines double,
    /// those of one are spread over the two in its place.
    #[inline]
    fn index(self, lines: usize) -> usize {
        ((u64::from(self.high) * lines as u64) >> 31) as usize
    }
}

impl Line {
    #[inline]
    fn way_of(&self, key: Key) -> Option<usize> {
        (0..WAYS).find(|way| {
            self.keys[*way] == key.low && self.marks[*way] != 0 && self.key(*way) == key
        })
    }

    fn key(&self, way: usize) -> Key {
        Key { low: self.keys[way], high: self.highs[way] & !SPILLED }
    }

    /// Which slots hold nothing, or what `capacity` acceptances or more up to
    /// number `accepted` have outdated: a bit for each.
    #[inline]
    fn outdated(&self, accepted: u64, capacity: u64) -> u32 {
        // Numbers are compared doubled, as they stand in marks; the lowest bit,
        // which a mark has for what is done, is set here to come out even.
        let (now, old) = ((accepted as u32) << 1 | 1, (capacity as u32) << 1);
        let mut outdated = 0;
        for (way, mark) in self.marks.iter().enumerate() {
            let is_old = (*mark == 0) | (now.wrapping_sub(*mark) >= old);
            outdated |= u32::from(is_old) << way;
        }
        outdated
    }

    /// Empties slots: a bit for each.
    #[inline]
    fn clear(&mut self, slots: u32) {
        for (way, mark) in self.marks.iter_mut().enumerate() {
            *mark &= (slots >> way & 1).wrapping_sub(1);
        }
    }

    fn used(&self) -> usize {
        self.marks.iter().filter(|mark| **mark != 0).count()
    }

    /// Fills a slot.
    #[inline]
    fn set(&mut self, way: usize, key: Key, number: u64) {
        self.keys[way] = key.low;
        self.highs[way] = key.high | self.highs[way] & SPILLED;
        self.marks[way] = (number as u32) << 1;
    }

    /// Whether the id may be here, or in the spill. Where it is not, this seldom
    /// says so: the bits of `high` that the ids of a line do not share are many.
    #[inline]
    fn may_know(&self, key: Key) -> bool {
        let mut similar = false;
        let mut all = 0;
        for high in self.highs {
            similar |= (high ^ key.high) << 1 == 0;
            all |= high;
        }
        similar | (all & SPILLED != 0)
    }

    #[inline]
    fn has_spilled(&self) -> bool {
        self.highs.iter().fold(0, |all, high| all | high) & SPILLED != 0
    }

    fn spilled(&self) -> u32 {
        let bits = self.highs.iter().enumerate();
        bits.map(|(way, high)| (high & SPILLED) >> 31 << way).sum()
    }

    fn set_spilled(&mut self, count: u32) {
        for (way, high) in self.highs.iter_mut().enumerate() {
            *high = *high & !SPILLED | (count >> way & 1) << 31;
        }
    }

    fn spill(&mut self) {
        self.set_spilled((self.spilled() + 1).min(MANY_SPILLED));
    }

    /// One of the line's ids has left the spill. After many, nobody knows how
    /// many are left; the next sweep with an empty spill does.
    fn unspill(&mut self) {
        match self.spilled() {
            0 | MANY_SPILLED => {}
            count => self.set_spilled(count - 1),
        }
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
        return Err(Error::setting("dedup", "time to live must be more than zero"));
    }
    Ok(())
}

/// The number of the next acceptance. That of an empty slot is passed over.
#[inline]
fn following(number: u64) -> u64 {
    number + if (number + 1) << 1 & MARKS == 0 { 2 } else { 1 }
}

/// How often the lines double before they are as many as the capacity.
fn doublings(capacity: usize) -> u32 {
    (capacity / FIRST_LINES).checked_ilog2().map_or(0, |doublings| doublings + 1)
}

/// Lines of a window that has just begun.
fn first_lines(capacity: usize) -> usize {
    capacity.div_ceil(1 << doublings(capacity))
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

    /// The `n`th of many ids that are spread as real ones are.
    fn spread(n: u128) -> u128 {
        n.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835) ^ n << 77
    }

    #[test]
    fn memory_grows_with_use_and_then_no_more() {
        let now = some_instant();
        let mut window = Dedup::new(1000, None);
        assert_eq!(window.lines.capacity(), 0);
        for id in 0..100_000 {
            window.accept(spread(id), now);
            assert!(window.lines.len() as u128 <= 16 + 4 * id);
        }
        assert!(window.len() >= 1000);
        assert!(window.lines.len() <= 1024 && window.times.is_empty());
        assert!(window.spill_order.len() < 60, "{} spilled", window.spill_order.len());
        assert_eq!(size_of::<Line>(), 64);
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
    fn numbers_may_wrap_around() {
        let now = some_instant();
        let mut window = Dedup::new(50, None);
        window.accepted = (1 << 31) - 30;
        for id in 0..200 {
            assert!(window.accept(spread(id), now), "{id}");
            assert!(!window.accept(spread(id.saturating_sub(48)), now), "{id}");
        }
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
        let error = check(LARGEST + 1, None).unwrap_err();
        assert!(error.to_string().contains("at most") && check(LARGEST, None).is_ok(), "{error}");
        let mut least = Dedup::new(0, Some(Duration::MAX));
        let now = some_instant();
        assert!(least.accept(1, now) && !least.accept(1, now), "unchecked, still safe");
    }

    #[test]
    fn a_round_of_sweeps_leaves_what_counts_and_nothing_else() {
        let now = some_instant();
        let mut window = Dedup::new(100, None);
        (0..1000).for_each(|id| assert!(window.accept(spread(id), now)));
        let horizon = window.horizon(now);
        (0..window.lines.len()).for_each(|_| window.sweep(horizon));
        assert_eq!(window.len(), 100);
        assert!((900..1000).all(|id| !window.accept(spread(id), now)));
    }

    #[test]
    fn every_number_is_swept_long_before_it_comes_again() {
        let now = some_instant();
        let mut window = Dedup::new(100, None);
        (0..10_000).for_each(|id| assert!(window.accept(spread(id), now)));
        let round = SWEEP_EVERY * window.lines.len() as u64;
        let numbers = window.lines.iter().flat_map(|line| line.marks).filter(|mark| *mark != 0);
        for number in numbers.map(|mark| u64::from(mark >> 1)) {
            assert!(window.accepted - number <= window.capacity + round, "{number}");
        }
    }

    #[test]
    fn what_has_outlived_its_time_makes_room_in_its_line() {
        let mut now = some_instant();
        let mut window = Dedup::new(1000, Some(secs(10)));
        for id in 0..20_000 {
            now += Duration::from_millis(20);
            assert!(window.accept(spread(id), now));
        }
        assert!(window.spill_order.len() < 60, "{} spilled", window.spill_order.len());
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
    fn a_line_counts_what_it_spilled_until_that_is_too_much() {
        let key = Key { low: 7, high: 9 };
        let mut line = Line { highs: [key.high; WAYS], ..Line::default() };
        line.unspill();
        assert!(!line.has_spilled());
        for count in 1..=MANY_SPILLED {
            line.spill();
            assert_eq!(line.spilled(), count);
        }
        line.spill();
        line.unspill();
        assert_eq!(line.spilled(), MANY_SPILLED, "nobody knows how many are left");
        line.set_spilled(2);
        line.unspill();
        assert!(line.spilled() == 1 && line.has_spilled());
        line.unspill();
        assert!(line.spilled() == 0 && !line.has_spilled());
        assert!((0..WAYS).all(|way| line.key(way).high == key.high), "beside the ids");
    }

    #[test]
    fn ids_of_one_line_are_kept_apart_and_leave_the_spill() {
        let now = some_instant();
        // All of one line, however many lines there are.
        let same = |n: u128| n + 1;
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
        assert!(window.spill.len() < 20 && window.spill.keys().all(|key| key.high != 0));
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
                prop_assert!(window.spill.len() <= capacity + SWEEP_EVERY as usize);
                prop_assert!(window.lines.len() <= capacity + 1);
            }
        }
    }

    /// An id of one of a few `high` parts, most of which share no line, and one of
    /// a few low ones: so some paths through the table are as likely as others.
    fn crowded() -> impl Strategy<Value = u128> {
        (0u128..20, 0u128..5).prop_map(|(high, low)| {
            let high = (high * 0x0666_6666) & 0x7fff_ffff;
            high << 64 | low
        })
    }

    proptest! {
        #[test]
        fn the_window_is_exact_whichever_path_an_id_takes(
            capacity in 1usize..90,
            ttl in prop::option::of(1u64..40),
            first in prop_oneof![Just(0u64), 1u64..5000],
            steps in prop::collection::vec((0u8..40, crowded(), 0u64..6), 1..600),
        ) {
            let ttl = ttl.map(secs);
            let mut now = some_instant();
            let mut window = Dedup::new(capacity, ttl);
            window.accepted = first;
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
                let used = window.lines.iter().map(Line::used).sum::<usize>();
                let grows = window.lines.len() < window.most_lines;
                prop_assert!(!grows || window.used == used, "{} of {}", window.used, used);
                prop_assert!(window.len() <= 5 * (capacity + 4));
                for (index, line) in window.lines.iter().enumerate() {
                    let spilled = window.spill.keys().filter(|key| window.index(**key) == index);
                    let spilled = spilled.count() as u32;
                    prop_assert!(line.spilled() == MANY_SPILLED || line.spilled() == spilled
                        || spilled == 0, "{} of {}", line.spilled(), spilled);
                    prop_assert!(line.spilled() >= spilled.min(MANY_SPILLED));
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
