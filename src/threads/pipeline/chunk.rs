//! The unit in which a processor works: a chunk of messages, and how far it is.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex, OnceLock};

use super::lock;
use crate::message::Message;
use crate::work::{Pulled, Tag, Ticket};

/// Messages that one processor works on, one after the other.
///
/// One thread works, and notes how far it is by plain stores, so that nothing is
/// locked for each message. Others read that while it hangs or after it died:
/// whoever reports slow handlers, buries dead workers, or settles what a stuck
/// one has finished.
#[derive(Debug)]
pub(crate) struct Chunk {
    rows: Rows,
    /// Rows below this one were begun; all but the last of them have an end.
    begun: AtomicUsize,
    ends: Box<[AtomicU8]>,
    /// What few rows of few chunks have.
    extras: OnceLock<Mutex<Extras>>,
}

/// Where the messages are.
#[derive(Debug)]
enum Rows {
    /// All that came between two places of a pull.
    Range(Arc<Pulled>, Range<u32>),
    /// Those of a pull that belong to one worker.
    Places(Arc<Pulled>, Vec<u32>),
    /// To be tried again.
    Again(Vec<Ticket>),
}

type Extras = BTreeMap<usize, Extra>;

#[derive(Debug, Default, Clone)]
struct Extra {
    /// Tries that failed while it was in here.
    tries: u32,
    tag: Option<Box<Tag>>,
}

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum End {
    None,
    /// It succeeded, and is to be settled.
    Done,
    /// It is no longer the worker's: settled, failed, in a batch or to be tried
    /// again later.
    Gone,
}

/// Messages of one pull that have the same end.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) pulled: Arc<Pulled>,
    pub(crate) members: Vec<Member>,
}

/// One message of a [`Run`].
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) place: u32,
    pub(crate) attempts: u32,
    pub(crate) tag: Option<Box<Tag>>,
}

impl Chunk {
    pub(crate) fn range(pulled: &Arc<Pulled>, places: Range<u32>) -> Self {
        let len = places.len();
        Self::new(Rows::Range(Arc::clone(pulled), places), len)
    }

    pub(crate) fn places(pulled: &Arc<Pulled>, places: Vec<u32>) -> Self {
        let len = places.len();
        Self::new(Rows::Places(Arc::clone(pulled), places), len)
    }

    pub(crate) fn again(tickets: Vec<Ticket>) -> Self {
        let len = tickets.len();
        Self::new(Rows::Again(tickets), len)
    }

    fn new(rows: Rows, len: usize) -> Self {
        let ends = (0..len).map(|_| AtomicU8::new(End::None as u8)).collect();
        Self { rows, begun: AtomicUsize::new(0), ends, extras: OnceLock::new() }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Begins the next row.
    #[inline]
    pub(crate) fn begin(&self) -> Option<usize> {
        let row = self.begun.load(Acquire);
        if row == self.len() {
            return None;
        }
        self.begun.store(row + 1, Release);
        Some(row)
    }

    /// The next row to begin; the number of rows at the end.
    #[inline]
    pub(crate) fn begun(&self) -> usize {
        self.begun.load(Acquire)
    }

    /// The row that was begun and has no end.
    pub(crate) fn current(&self) -> Option<usize> {
        let row = self.begun().checked_sub(1)?;
        (self.end_of(row) == End::None as u8).then_some(row)
    }

    #[inline]
    pub(crate) fn end(&self, row: usize, end: End) {
        self.ends[row].store(end as u8, Release);
    }

    #[inline]
    fn end_of(&self, row: usize) -> u8 {
        self.ends[row].load(Acquire)
    }

    /// The current row failed, and is begun again as the next one.
    pub(crate) fn hold(&self, row: usize) {
        lock(self.extras.get_or_init(Mutex::default)).entry(row).or_default().tries += 1;
        self.begun.store(row, Release);
    }

    pub(crate) fn tag(&self, row: usize, tag: Tag) {
        let extras = self.extras.get_or_init(Mutex::default);
        lock(extras).entry(row).or_default().tag = Some(Box::new(tag));
    }

    /// All messages, in order.
    pub(crate) fn messages(&self) -> Cow<'_, [Message]> {
        match &self.rows {
            Rows::Range(pulled, places) => {
                Cow::Borrowed(&pulled.messages[places.start as usize..places.end as usize])
            }
            _ => (0..self.len()).map(|row| self.message(row).clone()).collect(),
        }
    }

    #[inline]
    pub(crate) fn message(&self, row: usize) -> &Message {
        let (pulled, place) = self.origin(row);
        pulled.message(place)
    }

    /// What goes on with a row that was begun.
    #[inline]
    pub(crate) fn ticket(&self, row: usize) -> Ticket {
        let (pulled, place) = self.origin(row);
        let Member { attempts, tag, .. } = self.member(row);
        Ticket { pulled: Arc::clone(pulled), place, attempts, tag }
    }

    #[inline]
    fn origin(&self, row: usize) -> (&Arc<Pulled>, u32) {
        match &self.rows {
            // As many rows as places, which have 32 bits.
            Rows::Range(pulled, places) => (pulled, places.start + row as u32),
            Rows::Places(pulled, places) => (pulled, places[row]),
            Rows::Again(tickets) => (&tickets[row].pulled, tickets[row].place),
        }
    }

    #[inline]
    fn member(&self, row: usize) -> Member {
        let earlier = match &self.rows {
            Rows::Again(tickets) => tickets[row].attempts,
            _ => 0,
        };
        let extra = self.extras.get().and_then(|extras| lock(extras).get(&row).cloned());
        let Extra { tries, tag } = extra.unwrap_or_default();
        Member { place: self.origin(row).1, attempts: earlier + tries + 1, tag }
    }

    /// Whether something from row `from` on has succeeded and is to be settled.
    pub(crate) fn has_done(&self, from: usize) -> bool {
        (from..self.begun()).any(|row| self.end_of(row) == End::Done as u8)
    }

    /// Takes what has succeeded from row `from` on, to be settled; returns the
    /// first row that has no end. One thread at a time.
    pub(crate) fn take_done(&self, from: usize, runs: &mut Vec<Run>) -> usize {
        for row in from..self.len() {
            let end = self.end_of(row);
            if end == End::None as u8 {
                return row;
            }
            if end == End::Done as u8 {
                self.end(row, End::Gone);
                let member = self.member(row);
                Run::append(runs, self.origin(row).0, member, self.len() - row);
            }
        }
        self.len()
    }
}

impl Run {
    /// Those of one pull that follow each other are one run.
    pub(crate) fn of(tickets: impl IntoIterator<Item = Ticket>) -> Vec<Self> {
        let mut runs = Vec::new();
        tickets.into_iter().for_each(|ticket| Self::add(&mut runs, &ticket, 1));
        runs
    }

    /// Appends one of about `room` messages that are left to be.
    pub(crate) fn add(runs: &mut Vec<Self>, ticket: &Ticket, room: usize) {
        let Ticket { pulled, place, attempts, tag } = ticket;
        let member = Member { place: *place, attempts: *attempts, tag: tag.clone() };
        Self::append(runs, pulled, member, room);
    }

    fn append(runs: &mut Vec<Self>, pulled: &Arc<Pulled>, member: Member, room: usize) {
        match runs.last_mut() {
            Some(run) if Arc::ptr_eq(&run.pulled, pulled) => run.members.push(member),
            last => {
                // Pulls that were mixed before go on being so: room for all that may
                // come would be taken for each message.
                let usual = last.map_or(usize::MAX, |run| run.members.len());
                let mut members = Vec::with_capacity(room.min(pulled.messages.len()).min(usual));
                members.push(member);
                runs.push(Self { pulled: Arc::clone(pulled), members });
            }
        }
    }

    pub(crate) fn tickets(&self) -> impl Iterator<Item = Ticket> {
        self.members.iter().map(|Member { place, attempts, tag }| Ticket {
            pulled: Arc::clone(&self.pulled),
            place: *place,
            attempts: *attempts,
            tag: tag.clone(),
        })
    }

    pub(crate) fn messages(&self) -> impl Iterator<Item = &Message> {
        self.members.iter().map(|member| self.pulled.message(member.place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::clock::Clock;
    use crate::message::{BlockBuilder, Payload};
    use std::sync::OnceLock;

    fn pulled(count: u64) -> Arc<Pulled> {
        let mut block = BlockBuilder::new(0, 0, Clock::real().now());
        (1..=count).for_each(|n| block.push(Payload::Text("a"), n, None));
        let messages = block.finish().collect();
        Arc::new(Pulled { number: 0, source: 0, messages, partitions: OnceLock::new() })
    }

    fn places(runs: &[Run]) -> Vec<(u32, u32)> {
        let members = runs.iter().flat_map(|run| &run.members);
        members.map(|member| (member.place, member.attempts)).collect()
    }

    #[test]
    fn what_succeeded_is_taken_once_and_up_to_what_has_no_end() {
        let chunk = Chunk::places(&pulled(9), vec![1, 3, 5, 7]);
        for end in [End::Done, End::Gone, End::Done] {
            let row = chunk.begin().unwrap();
            assert_eq!(chunk.current(), Some(row));
            chunk.end(row, end);
            assert_eq!(chunk.current(), None);
        }
        let mut runs = Vec::new();
        assert_eq!(chunk.take_done(0, &mut runs), 3);
        assert_eq!(places(&runs), [(1, 1), (5, 1)]);
        assert_eq!((chunk.take_done(0, &mut runs), runs.len()), (3, 1));
        assert_eq!(chunk.begin(), Some(3));
        assert_eq!((chunk.begin(), chunk.current()), (None, Some(3)));
    }

    #[test]
    fn a_row_that_is_held_is_begun_again_with_its_tries_counted() {
        let chunk = Chunk::range(&pulled(9), 4..6);
        let row = chunk.begin().unwrap();
        chunk.hold(row);
        assert_eq!((chunk.begun(), chunk.current()), (0, None));
        assert_eq!(chunk.begin(), Some(row));
        chunk.tag(row, "late".into());
        let ticket = chunk.ticket(row);
        assert_eq!(
            (ticket.place, ticket.attempts, ticket.tag.as_deref().map(|t| &**t)),
            (4, 2, Some("late"))
        );
        chunk.end(row, End::Done);
        let mut runs = Vec::new();
        chunk.take_done(0, &mut runs);
        assert_eq!(places(&runs), [(4, 2)]);
        let again = Chunk::again(vec![ticket]);
        again.begin();
        assert_eq!((again.ticket(0).attempts, again.messages().len()), (3, 1));
    }

    #[test]
    fn messages_of_mixed_pulls_take_no_room_for_those_that_do_not_follow() {
        let pulls = [Chunk::range(&pulled(256), 0..256), Chunk::range(&pulled(256), 0..256)];
        let mut runs = Vec::new();
        for row in 0..256 {
            pulls.iter().for_each(|pull| Run::add(&mut runs, &pull.ticket(row), 512 - 2 * row));
        }
        let room: usize = runs[1..].iter().map(|run| run.members.capacity()).sum();
        assert_eq!((runs.len(), room), (512, 511));
    }

    #[test]
    fn messages_of_one_pull_that_follow_each_other_are_one_run() {
        let (a, b) = (Chunk::range(&pulled(3), 0..3), Chunk::range(&pulled(3), 0..3));
        let tickets = [a.ticket(0), a.ticket(1), b.ticket(0), a.ticket(2)];
        let lens: Vec<_> = Run::of(tickets).iter().map(|run| run.members.len()).collect();
        assert_eq!(lens, [2, 1, 1]);
    }
}
