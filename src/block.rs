//! The memory of messages that arrived together.
//!
//! What a connection reads becomes a block in one of two ways. A run of whole
//! messages is taken over in the buffer it was read into: nothing is copied,
//! and a block of texts is checked for UTF-8 in one go. Everything else is
//! copied together, one message after the other.

use std::fmt;
use std::ops::Range;
use std::str::Utf8Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use faststr::FastStr;
use tungstenite::{Bytes, Utf8Bytes};

use crate::handler::Data;
use crate::message::MessageId;

/// Payloads from this size on stay in the buffer they were read into; smaller
/// ones are copied together, which frees that buffer (it is far larger).
const LARGE: usize = 16 * 1024;

/// Payloads are copied together up to about this size.
const ARENA: usize = 1 << 30;

/// Buffers that wait for their next use, for each connection: a consumer that was
/// off its processor for some milliseconds has many blocks to give back at once. To
/// get as many anew costs a page fault for each of their pages.
const SPARES: usize = 64;

/// Of large buffers no more wait than are so many bytes together, or four.
const SPARE_BYTES: usize = 16 << 20;

/// Small runs may have a buffer each as long as fewer than this are on loan.
const LENT: usize = 16;

/// After so many looks for runs, half of the buffers that were not needed are
/// freed, and all if none was.
const TRIM: u32 = 256;

/// When what is fresh in a block is less than half of it, that is copied, so that
/// a few messages do not keep the memory of many.
const SPARSE: usize = 2;

/// Messages that are judged together: a bit for each.
const GROUP: usize = u64::BITS as usize;

/// What stands between texts in a buffer, where the heads of frames were: any
/// character of one byte will do, as it can neither end nor continue another.
pub(crate) const BLANK: u8 = b' ';

/// The payloads of a block and the table of where each one lies.
pub(crate) struct BlockData {
    pub(crate) connection: usize,
    pub(crate) epoch: u64,
    pub(crate) received_at: Instant,
    /// Sequence that the entries' are counted from.
    pub(crate) base: u64,
    /// A run in the buffer that it was read into, and the same as text if it was
    /// checked as a whole.
    run: Bytes,
    run_text: FastStr,
    /// What was copied together.
    text: String,
    binary: Vec<u8>,
    large: Vec<Large>,
    pub(crate) entries: Vec<Entry>,
    /// One for each entry, while dedup is on; empty otherwise.
    pub(crate) ids: Vec<Option<MessageId>>,
    /// Where the tables of a run return to.
    home: Option<Arc<Home>>,
}

/// One row of a block's table: 16 bytes, for there is one for each message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    kind: Kind,
    /// Where the payload starts in its memory, or its place among the large.
    start: u32,
    len: u32,
    /// Sequence after the block's base.
    pub(crate) sequence: u32,
}

/// Where a payload lies: text apart from binary, so that a text is validated
/// once and sliced for ever after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// In the run.
    RunText,
    RunBinary,
    /// Among what was copied together.
    Text,
    Binary,
    Large,
}

enum Large {
    Text(Utf8Bytes),
    Binary(Bytes),
}

/// A payload on its way into a block.
#[derive(Debug, Clone)]
pub(crate) enum Payload<'a> {
    Text(&'a str),
    Binary(&'a [u8]),
    OwnedText(Utf8Bytes),
    OwnedBinary(Bytes),
}

/// Whole messages, one behind the other in the buffer they were read into. What
/// lies between them is blank.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) bytes: Vec<u8>,
    /// The part of `bytes` that the run is.
    pub(crate) part: Range<usize>,
    /// Where in that part the messages are.
    pub(crate) entries: Vec<Entry>,
    /// All are texts, or all are binary.
    pub(crate) alike: bool,
    /// Payload bytes of all.
    pub(crate) payload: usize,
    /// Room for their ids.
    pub(crate) ids: Vec<Option<MessageId>>,
    /// Who wants the memory back.
    pub(crate) home: Option<Arc<Home>>,
}

/// The memory of a block that is no more. Its bytes are as many as they were.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    pub(crate) bytes: Vec<u8>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) ids: Vec<Option<MessageId>>,
}

/// The table of a block's messages, and that of their ids.
type Tables = (Vec<Entry>, Vec<Option<MessageId>>);

/// A buffer on loan to a block: it returns when the last message is gone.
struct Loan {
    bytes: Vec<u8>,
    home: Arc<Home>,
}

/// The spare memory of a connection. Consumers drop blocks on other threads
/// than the one that fills them; what they give back saves the reader from
/// clearing fresh memory for each block.
#[derive(Debug, Default)]
pub(crate) struct Spares {
    home: Arc<Home>,
}

/// Where blocks give their memory back. What came last is taken first: it is the
/// most likely to be in a cache still.
#[derive(Debug, Default)]
pub(crate) struct Home(Mutex<Returned>);

#[derive(Debug, Default)]
struct Returned {
    buffers: Vec<Vec<u8>>,
    tables: Vec<Tables>,
    /// Buffers that are on loan.
    lent: usize,
    /// Looks for runs since the last trim, whether one took a buffer, and how many
    /// waited at least.
    looks: u32,
    taken: bool,
    unused: usize,
    /// Nobody will take any.
    closed: bool,
}

impl Spares {
    /// Memory to go on with for a block that takes a buffer along. One that must,
    /// as it fills it, gets none to go on with if none waits; for another that may,
    /// one waits, and few are on loan.
    pub(crate) fn take(&self, must: bool) -> Option<Spare> {
        let mut returned = self.home.returned();
        if !must && (returned.buffers.is_empty() || returned.lent >= LENT) {
            return None;
        }
        returned.lent += 1;
        returned.taken = true;
        let bytes = returned.buffers.pop().unwrap_or_default();
        returned.unused = returned.unused.min(returned.buffers.len());
        let (entries, ids) = returned.tables.pop().unwrap_or_default();
        Some(Spare { bytes, entries, ids })
    }

    /// Counts a look for a run, whatever it finds.
    pub(crate) fn count_look(&self) {
        let unused = self.home.returned().trim();
        drop(unused);
    }

    /// Where a block that takes it gives it back.
    pub(crate) fn home(&self) -> Arc<Home> {
        Arc::clone(&self.home)
    }
}

impl Drop for Spares {
    /// Blocks may outlive their connection; they keep no memory but their own.
    fn drop(&mut self) {
        let left = Returned { closed: true, ..Returned::default() };
        let left = std::mem::replace(&mut *self.home.returned(), left);
        drop(left);
    }
}

impl Returned {
    /// Now and then: some of the buffers that have not been used for long, which are
    /// the first ones, and tables without a buffer to go with.
    fn trim(&mut self) -> (Vec<Vec<u8>>, Vec<Tables>) {
        self.looks += 1;
        if self.looks < TRIM {
            return Default::default();
        }
        let unused = match self.taken {
            true => self.unused.min(self.buffers.len()).div_ceil(2),
            false => self.buffers.len(),
        };
        let buffers: Vec<_> = self.buffers.drain(..unused).collect();
        let too_many = self.tables.len().saturating_sub(self.buffers.len());
        let tables = self.tables.drain(..too_many).collect();
        (self.looks, self.taken, self.unused) = (0, false, self.buffers.len());
        (buffers, tables)
    }
}

impl Home {
    /// What is more than enough is freed, by the caller.
    fn take_back(&self, bytes: Vec<u8>) -> Option<Vec<u8>> {
        let mut returned = self.returned();
        returned.lent = returned.lent.saturating_sub(1);
        if returned.closed || returned.buffers.len() >= most(bytes.len()) {
            return Some(bytes);
        }
        returned.buffers.push(bytes);
        None
    }

    /// The tables of a block whose buffer is so large, and comes back as well.
    fn take_tables_back(&self, tables: Tables, bytes: usize) -> Option<Tables> {
        let mut returned = self.returned();
        if returned.closed || returned.tables.len() >= most(bytes) {
            return Some(tables);
        }
        returned.tables.push(tables);
        None
    }

    fn returned(&self) -> MutexGuard<'_, Returned> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many buffers of this size may wait.
fn most(bytes: usize) -> usize {
    (SPARE_BYTES / bytes.max(1)).clamp(4, SPARES)
}

impl AsRef<[u8]> for Loan {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let more_than_enough = self.home.take_back(std::mem::take(&mut self.bytes));
        drop(more_than_enough);
    }
}

impl Entry {
    /// What is to be written over.
    pub(crate) const NONE: Self = Self { kind: Kind::RunText, start: 0, len: 0, sequence: 0 };

    /// A message of a run, the one with this number in it.
    pub(crate) fn in_run(text: bool, start: usize, len: usize, number: usize) -> Self {
        let kind = if text { Kind::RunText } else { Kind::RunBinary };
        Self { kind, start: narrow(start), len: narrow(len), sequence: narrow(number) }
    }

    /// The same, of a short one: buffers and their counts fit into 32 bits.
    #[inline]
    pub(crate) fn short(text: bool, start: usize, len: usize, number: usize) -> Self {
        let kind = if text { Kind::RunText } else { Kind::RunBinary };
        Self { kind, start: start as u32, len: len as u32, sequence: number as u32 }
    }

    /// The same in a buffer that begins `cut` bytes later.
    pub(crate) fn moved(self, cut: usize) -> Self {
        Self { start: self.start - narrow(cut), ..self }
    }

    /// Of a message of a run.
    pub(crate) fn is_text(self) -> bool {
        self.kind == Kind::RunText
    }

    /// Where the payload is in the memory it lies in.
    pub(crate) fn range(self) -> Range<usize> {
        // Wide enough that the sum is seen not to overflow.
        self.start as usize..self.start as usize + self.len as usize
    }
}

impl BlockData {
    #[inline]
    pub(crate) fn text_of(&self, entry: &Entry) -> Option<&str> {
        match entry.kind {
            Kind::RunText => Some(&self.run_text[entry.range()]),
            Kind::Text => Some(&self.text[entry.range()]),
            Kind::RunBinary | Kind::Binary => None,
            Kind::Large => match &self.large[entry.start as usize] {
                Large::Text(text) => Some(text.as_str()),
                Large::Binary(_) => None,
            },
        }
    }

    #[inline(always)]
    pub(crate) fn bytes_of(&self, entry: &Entry) -> &[u8] {
        let memory = match entry.kind {
            Kind::RunText | Kind::RunBinary => &self.run,
            Kind::Text => self.text.as_bytes(),
            Kind::Binary => &self.binary,
            Kind::Large => return self.large[entry.start as usize].bytes(),
        };
        &memory[entry.range()]
    }

    #[inline]
    pub(crate) fn is_text(&self, entry: &Entry) -> bool {
        match entry.kind {
            Kind::RunText | Kind::Text => true,
            Kind::RunBinary | Kind::Binary => false,
            Kind::Large => matches!(self.large[entry.start as usize], Large::Text(_)),
        }
    }

    /// Whether it is a text, and its bytes.
    // Apart, so that the loop which looks for the ids of texts has little in it.
    #[inline(never)]
    fn lies(&self, entry: &Entry) -> (bool, &[u8]) {
        (self.is_text(entry), self.bytes_of(entry))
    }

    fn data_of(&self, entry: &Entry) -> Data<'_> {
        match self.text_of(entry) {
            Some(text) => Data::Text(text),
            None => Data::Binary(self.bytes_of(entry)),
        }
    }

    /// As it would be put into another block: what is large is shared.
    fn payload_of(&self, entry: &Entry) -> Payload<'_> {
        match entry.kind {
            Kind::RunText => Payload::Text(&self.run_text[entry.range()]),
            Kind::RunBinary => Payload::Binary(&self.run[entry.range()]),
            Kind::Text => Payload::Text(&self.text[entry.range()]),
            Kind::Binary => Payload::Binary(&self.binary[entry.range()]),
            Kind::Large => match &self.large[entry.start as usize] {
                Large::Text(text) => Payload::OwnedText(text.clone()),
                Large::Binary(bytes) => Payload::OwnedBinary(bytes.clone()),
            },
        }
    }
}

impl Drop for BlockData {
    /// Returns the tables of a run; its buffer returns by itself.
    fn drop(&mut self) {
        let Some(home) = self.home.take() else { return };
        let (mut entries, mut ids) =
            (std::mem::take(&mut self.entries), std::mem::take(&mut self.ids));
        entries.clear();
        ids.clear();
        let more_than_enough = home.take_tables_back((entries, ids), self.run.len());
        drop(more_than_enough);
    }
}

fn len_of(large: &[Large], entry: &Entry) -> usize {
    match entry.kind {
        Kind::RunText | Kind::RunBinary | Kind::Text | Kind::Binary => entry.len as usize,
        Kind::Large => large[entry.start as usize].bytes().len(),
    }
}

impl Large {
    fn bytes(&self) -> &[u8] {
        match self {
            Large::Text(text) => text.as_bytes(),
            Large::Binary(bytes) => bytes,
        }
    }
}

/// Gathers the messages of one turn of the reader into a block.
pub(crate) struct BlockBuilder {
    data: BlockData,
    /// Payload bytes of its messages.
    bytes: usize,
    /// Some of the messages that it holds the bytes of are no longer in it.
    thinned: bool,
}

impl BlockBuilder {
    pub(crate) fn new(connection: usize, epoch: u64, received_at: Instant) -> Self {
        Self {
            data: BlockData {
                connection,
                epoch,
                received_at,
                base: 0,
                run: Bytes::new(),
                run_text: FastStr::empty(),
                text: String::new(),
                binary: Vec::new(),
                large: Vec::new(),
                entries: Vec::new(),
                ids: Vec::new(),
                home: None,
            },
            bytes: 0,
            thinned: false,
        }
    }

    /// Bytes of the texts copied together.
    pub(crate) fn text_bytes(&self) -> usize {
        self.data.text.len()
    }

    /// Makes room for about as much as the last block had.
    pub(crate) fn reserve(&mut self, messages: usize, bytes: usize) {
        self.data.entries.reserve(messages);
        self.data.text.reserve(bytes);
    }

    pub(crate) fn len(&self) -> usize {
        self.data.entries.len()
    }

    /// Payload bytes of its messages.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The payload of its last message.
    pub(crate) fn last(&self) -> Option<&[u8]> {
        self.data.entries.last().map(|entry| self.data.bytes_of(entry))
    }

    /// Makes a run the block's first messages, the first of them number `first`
    /// of its epoch. An error is of the first text that is not UTF-8; the
    /// messages before it are taken.
    pub(crate) fn adopt(&mut self, run: Run, first: u64) -> Result<(), Utf8Error> {
        debug_assert!(self.data.entries.is_empty(), "a run begins a block");
        let Run { mut bytes, part, entries, alike, payload, ids, home } = run;
        self.data.base = first;
        (self.data.entries, self.data.ids) = (entries, ids);
        let texts = self.data.entries.first().is_some_and(|entry| entry.is_text());
        if texts && !alike {
            self.move_binaries_out(&mut bytes[part.clone()]);
        }
        self.data.home.clone_from(&home);
        let bytes = match home {
            Some(home) => Bytes::from_owner(Loan { bytes, home }),
            None => bytes.into(),
        };
        self.data.run = bytes.slice(part);
        let checked = match texts {
            true => self.check_texts(),
            false if alike => Ok(()),
            false => self.copy_texts_out(),
        };
        self.bytes = match checked {
            Ok(()) => payload,
            Err(_) => self.data.entries.iter().map(|entry| entry.len as usize).sum(),
        };
        checked
    }

    /// Binary messages among the texts of a run are moved out, so that all of the
    /// rest is text.
    fn move_binaries_out(&mut self, run: &mut [u8]) {
        let BlockData { entries, binary, .. } = &mut self.data;
        let binaries = entries.iter().filter(|entry| !entry.is_text());
        binary.reserve_exact(binaries.map(|entry| entry.len as usize).sum());
        for entry in entries.iter_mut().filter(|entry| !entry.is_text()) {
            let payload = &mut run[entry.range()];
            (entry.kind, entry.start) = (Kind::Binary, narrow(binary.len()));
            binary.extend_from_slice(payload);
            payload.fill(BLANK);
        }
    }

    /// Checks the texts of a run in one go, a register at a time. Only what is
    /// wrong is looked at once more, to tell where.
    fn check_texts(&mut self) -> Result<(), Utf8Error> {
        let BlockData { entries, run, run_text, .. } = &mut self.data;
        match FastStr::from_bytes(run.clone()) {
            Ok(text) => {
                *run_text = text;
                Ok(())
            }
            Err(_) => {
                let valid = std::str::from_utf8(run).map_or_else(|e| e.valid_up_to(), str::len);
                let broken = |entry: &Entry| entry.is_text() && entry.range().end > valid;
                let bad = entries.iter().position(broken).unwrap_or(0);
                let why = std::str::from_utf8(&run[entries[bad].range()]).map(drop);
                entries.truncate(bad);
                run.truncate(valid);
                *run_text = FastStr::from_bytes(run.clone()).unwrap_or_default();
                why
            }
        }
    }

    /// Texts among the binary messages of a run are copied out, and checked each by
    /// itself.
    fn copy_texts_out(&mut self) -> Result<(), Utf8Error> {
        let BlockData { entries, run, text, .. } = &mut self.data;
        let texts = entries.iter().filter(|entry| entry.is_text());
        text.reserve_exact(texts.map(|entry| entry.len as usize).sum());
        for at in 0..entries.len() {
            let entry = &mut entries[at];
            if entry.is_text() {
                match std::str::from_utf8(&run[entry.range()]) {
                    Ok(valid) => {
                        (entry.kind, entry.start) = (Kind::Text, narrow(text.len()));
                        text.push_str(valid);
                    }
                    Err(error) => {
                        entries.truncate(at);
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Looks for the id of each message.
    pub(crate) fn identify(&mut self, mut id: impl FnMut(Data<'_>) -> Option<MessageId>) {
        let mut ids = std::mem::take(&mut self.data.ids);
        ids.clear();
        ids.extend(self.data.entries.iter().map(|entry| id(self.data.data_of(entry))));
        self.data.ids = ids;
    }

    /// The same for ids that are found without a look at what kind of text it is:
    /// whether it is one, and its bytes.
    pub(crate) fn identify_bytes(&mut self, mut id: impl FnMut(bool, &[u8]) -> Option<MessageId>) {
        let mut ids = std::mem::take(&mut self.data.ids);
        ids.clear();
        let data = &self.data;
        let run = &data.run[..];
        // By value, so that what `id` refers to is not looked up for each.
        ids.extend(data.entries.iter().map(move |entry| {
            let (text, bytes) = match entry.kind {
                Kind::RunText => (true, &run[entry.range()]),
                _ => data.lies(entry),
            };
            id(text, bytes)
        }));
        self.data.ids = ids;
    }

    /// Takes a message. Sequences grow within a block.
    #[inline]
    pub(crate) fn push(&mut self, payload: Payload<'_>, sequence: u64, id: Option<MessageId>) {
        let bytes = payload.data().as_bytes().len();
        let (kind, start, len) = match payload {
            // What sessions emit, one by one.
            Payload::Text(text) => self.copy_text(text),
            other => self.place(other),
        };
        self.enter(kind, start, len, bytes, sequence, id);
    }

    #[inline]
    fn enter(
        &mut self,
        kind: Kind,
        start: usize,
        len: usize,
        bytes: usize,
        sequence: u64,
        id: Option<MessageId>,
    ) {
        let BlockData { entries, ids, base, .. } = &mut self.data;
        if entries.is_empty() {
            *base = sequence;
        }
        self.bytes += bytes;
        if id.is_some() || !ids.is_empty() {
            if ids.len() < entries.len() {
                ids.resize(entries.len(), None);
            }
            ids.push(id);
        }
        let sequence = narrow((sequence - *base) as usize);
        entries.push(Entry { kind, start: narrow(start), len: narrow(len), sequence });
    }

    /// Drops the messages that `judge` finds to be duplicates, a group at a time: it is
    /// shown their ids, where they have one, and sets the bits of those to drop, the
    /// lowest for the first.
    pub(crate) fn retain(&mut self, mut judge: impl FnMut(&[Option<MessageId>]) -> u64) {
        let BlockData { entries, ids, large, .. } = &mut self.data;
        ids.resize(entries.len(), None);
        let (mut kept, mut dropped) = (0, 0);
        for from in (0..entries.len()).step_by(GROUP) {
            let group = from..entries.len().min(from + GROUP);
            let duplicates = judge(&ids[group.clone()]);
            // Mostly all are fresh, and stay where they are.
            if kept == from && duplicates == 0 {
                kept = group.end;
                continue;
            }
            for at in group {
                if duplicates >> (at - from) & 1 != 0 {
                    dropped += len_of(large, &entries[at]);
                    continue;
                }
                if kept < at {
                    (entries[kept], ids[kept]) = (entries[at], ids[at]);
                }
                kept += 1;
            }
        }
        self.thinned |= kept < entries.len();
        entries.truncate(kept);
        ids.truncate(kept);
        self.bytes -= dropped;
    }

    /// What is to be a block, and its payload bytes.
    pub(crate) fn build(mut self) -> (BlockData, usize) {
        if (self.thinned || self.data.home.is_some()) && self.bytes * SPARSE < self.held() {
            self.condense();
        }
        if !self.data.ids.is_empty() {
            self.data.ids.resize(self.data.entries.len(), None);
        }
        (self.data, self.bytes)
    }

    /// Payload bytes in its memory.
    fn held(&self) -> usize {
        let BlockData { run, text, binary, large, .. } = &self.data;
        let large: usize = large.iter().map(|large| large.bytes().len()).sum();
        // What was moved out of a run left a gap of its size there.
        run.len() + text.len() + binary.len() + large
    }

    /// Puts its messages into memory that is no larger than they are.
    #[cold]
    #[inline(never)]
    fn condense(&mut self) {
        let data = &self.data;
        let mut own = Self::new(data.connection, data.epoch, data.received_at);
        let bytes_of = |kinds: [Kind; 2]| {
            let those = data.entries.iter().filter(|entry| kinds.contains(&entry.kind));
            those.map(|entry| entry.len as usize).sum()
        };
        own.data.entries.reserve_exact(data.entries.len());
        own.data.text.reserve_exact(bytes_of([Kind::RunText, Kind::Text]));
        own.data.binary.reserve_exact(bytes_of([Kind::RunBinary, Kind::Binary]));
        for (at, entry) in data.entries.iter().enumerate() {
            let payload = data.payload_of(entry);
            let id = data.ids.get(at).copied().flatten();
            own.push(payload, data.base + u64::from(entry.sequence), id);
        }
        *self = own;
    }

    fn place(&mut self, payload: Payload<'_>) -> (Kind, usize, usize) {
        match payload {
            Payload::Text(text) => self.copy_text(text),
            Payload::Binary(bytes) => self.copy_binary(bytes),
            Payload::OwnedText(text) if text.len() >= LARGE => self.keep(Large::Text(text)),
            Payload::OwnedBinary(bytes) if bytes.len() >= LARGE => self.keep(Large::Binary(bytes)),
            Payload::OwnedText(text) => self.copy_text(&text),
            Payload::OwnedBinary(bytes) => self.copy_binary(&bytes),
        }
    }

    fn keep(&mut self, large: Large) -> (Kind, usize, usize) {
        self.data.large.push(large);
        (Kind::Large, self.data.large.len() - 1, 0)
    }

    #[inline]
    fn copy_text(&mut self, text: &str) -> (Kind, usize, usize) {
        // What a session emits may be of any size; offsets have 32 bits.
        if self.data.text.len() + text.len() > LARGE + ARENA {
            return self.keep(Large::Text(text.into()));
        }
        let start = self.data.text.len();
        self.data.text.push_str(text);
        (Kind::Text, start, text.len())
    }

    fn copy_binary(&mut self, bytes: &[u8]) -> (Kind, usize, usize) {
        if self.data.binary.len() + bytes.len() > LARGE + ARENA {
            return self.keep(Large::Binary(Bytes::copy_from_slice(bytes)));
        }
        let start = self.data.binary.len();
        self.data.binary.extend_from_slice(bytes);
        (Kind::Binary, start, bytes.len())
    }
}

/// Offsets and counts of a block, which the arena's limit keeps small.
pub(crate) fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl fmt::Debug for BlockBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockBuilder").field("len", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Message;
    use proptest::prelude::*;

    fn builder() -> BlockBuilder {
        BlockBuilder::new(0, 1, crate::io::clock::Clock::real().now())
    }

    /// A run of these payloads, each behind a head of two bytes.
    fn run(payloads: &[(bool, &[u8])], home: Option<Arc<Home>>) -> Run {
        // The first bytes were another run's, and the last are a part of a message.
        let (before, behind) = (b"\xc3", b"\x82\xac");
        let (mut bytes, mut entries) = (before.to_vec(), Vec::new());
        for (number, (text, payload)) in payloads.iter().enumerate() {
            bytes.extend([BLANK; 2]);
            let start = bytes.len() - before.len();
            entries.push(Entry::in_run(*text, start, payload.len(), number));
            bytes.extend_from_slice(payload);
        }
        let part = before.len()..bytes.len();
        bytes.extend(behind);
        let alike = payloads.windows(2).all(|two| two[0].0 == two[1].0);
        let payload = payloads.iter().map(|(_, payload)| payload.len()).sum();
        Run { bytes, part, entries, alike, payload, ids: Vec::new(), home }
    }

    /// How large the next spare buffer is; 0 if there is none.
    fn spare(spares: &Spares) -> usize {
        spares.take(false).map_or(0, |spare| spare.bytes.len())
    }

    fn messages(block: BlockBuilder) -> Vec<(bool, Vec<u8>, u64)> {
        let told =
            |message: Message| (message.is_text(), message.to_vec(), message.metadata().sequence);
        block.finish().map(told).collect()
    }

    /// Judges each message by itself: `true` if it is fresh.
    fn unless(
        mut is_fresh: impl FnMut(Option<MessageId>) -> bool,
    ) -> impl FnMut(&[Option<MessageId>]) -> u64 {
        move |ids| {
            let bits = ids.iter().enumerate().map(|(at, id)| u64::from(!is_fresh(*id)) << at);
            bits.fold(0, |all, bit| all | bit)
        }
    }

    #[test]
    fn a_run_stays_where_it_is() {
        for (text, borrowed) in [(true, true), (true, false), (false, true), (false, false)] {
            let spares = Spares::default();
            let payload = [b'x'; 1000];
            let run = run(&[(text, &payload)], borrowed.then(|| spares.home()));
            let at = run.bytes[3..].as_ptr();
            let mut block = builder();
            block.adopt(run, 1).unwrap();
            let data = block.build().0;
            assert_eq!(data.bytes_of(&data.entries[0]).as_ptr(), at);
            assert_eq!(data.text_of(&data.entries[0]).map(str::as_ptr), text.then_some(at));
        }
    }

    #[test]
    fn a_run_of_both_kinds_is_what_was_sent_whichever_comes_first() {
        let (text, binary) = ((true, "grüße".as_bytes()), (false, &[0x81, 0xff, 0][..]));
        for payloads in [[text, binary, text, binary], [binary, text, binary, text]] {
            let mut block = builder();
            block.adopt(run(&payloads, None), 7).unwrap();
            assert_eq!(block.bytes(), 2 * (7 + 3));
            let expected: Vec<_> =
                (7..).zip(payloads).map(|(n, (text, bytes))| (text, bytes.to_vec(), n)).collect();
            assert_eq!(messages(block), expected);
        }
    }

    #[test]
    fn what_comes_before_a_text_that_is_not_utf8_is_kept() {
        // Cut off within a character, so that its rest could be in the next one.
        let (first, second) = "ü".as_bytes().split_at(1);
        let good = (true, &b"good"[..]);
        for broken in
            [[good, (true, first), (true, second)], [(false, b"good"), (true, first), good]]
        {
            let mut block = builder();
            let error = block.adopt(run(&broken, None), 1).unwrap_err();
            assert_eq!((error.valid_up_to(), error.error_len()), (0, None), "of this text alone");
            assert_eq!(messages(block), [(broken[0].0, b"good".to_vec(), 1)]);
        }
        let mut block = builder();
        assert!(block.adopt(run(&[(true, first), good], None), 1).is_err());
        assert_eq!((block.len(), block.bytes()), (0, 0));
    }

    #[test]
    fn memory_returns_when_the_last_message_is_gone() {
        let spares = Spares::default();
        let payload = [b'x'; 100];
        let mut block = builder();
        block.adopt(run(&[(true, &payload), (true, &payload)], Some(spares.home())), 1).unwrap();
        let mut block = block.finish();
        let (first, second) = (block.next(), block.next());
        drop((block, first));
        assert_eq!(spare(&spares), 0, "a message is left");
        drop(second);
        assert_eq!(spare(&spares), 1 + 204 + 2, "as large as it was");
    }

    #[test]
    fn what_returned_last_is_taken_first_and_no_more_is_kept_than_enough() {
        let spares = Spares::default();
        let sizes: Vec<usize> = (1..=SPARES + 2).map(|n| n * 1000).collect();
        for size in &sizes {
            let mut block = builder();
            block.adopt(run(&[(false, &vec![1; *size])], Some(spares.home())), 1).unwrap();
            drop(block.finish());
        }
        for size in sizes[..SPARES].iter().rev() {
            assert_eq!(spares.take(true).map(|spare| spare.bytes.len()), Some(size + 5));
        }
        assert!(spares.take(false).is_none());
        assert!(spares.take(true).is_some_and(|spare| spare.bytes.is_empty()));
    }

    /// A block on loan that took a buffer of this size along.
    fn lend(spares: &Spares, size: usize) -> crate::message::Block {
        let mut block = builder();
        block.adopt(run(&[(false, &vec![1; size])], Some(spares.home())), 1).unwrap();
        block.finish()
    }

    #[test]
    fn buffers_that_are_not_used_are_freed_by_and_by() {
        let spares = Spares::default();
        // Nine come back at once, but from then on two are in use.
        let waiting = |spares: &Spares| spares.home.returned().buffers.len();
        drop((1..=9).map(|size| lend(&spares, size)).collect::<Vec<_>>());
        let mut counts = vec![waiting(&spares)];
        for _ in 0..8 * TRIM {
            let (first, second) = (spares.take(false).unwrap(), spares.take(false).unwrap());
            let sizes = [first, second].map(|spare| spare.bytes.len() - 5);
            assert_eq!(sizes, [9, 8], "what was used last");
            drop([8, 9].map(|size| lend(&spares, size)));
            spares.count_look();
            counts.push(waiting(&spares));
        }
        counts.dedup();
        assert_eq!(counts, [9, 5, 3, 2], "half of those that were not used, each time");
        // None is taken: they go together, though not at the first look.
        (1..TRIM).for_each(|_| spares.count_look());
        assert_eq!(waiting(&spares), 2);
        spares.count_look();
        assert_eq!(waiting(&spares), 0);
    }

    #[test]
    fn few_buffers_are_on_loan_to_runs_that_do_not_fill_them() {
        let spares = Spares::default();
        let must = |_| spares.take(true).map(|_| lend(&spares, 1000)).unwrap();
        let flood: Vec<_> = (0..100).map(must).collect();
        drop(flood);
        let mut held = Vec::new();
        while let Some(spare) = spares.take(false) {
            held.push(lend(&spares, spare.bytes.len() - 5));
        }
        assert_eq!(held.len(), LENT, "and no more, though more wait");
        // One comes back, and another goes out; but not while a flood has many.
        held.truncate(LENT - 1);
        let flood: Vec<_> = (0..100).map(must).collect();
        assert_eq!(spares.take(false).map(drop), None);
        drop(flood);
        assert_eq!(spares.take(false).map(drop), Some(()));
        assert_eq!(spares.take(false).map(drop), None, "sixteen are on loan");
        held.clear();
        assert_eq!(spares.take(false).map(drop), Some(()));
    }

    #[test]
    fn no_more_tables_wait_than_buffers() {
        let spares = Spares::default();
        let tables = |spares: &Spares| spares.home.returned().tables.len();
        drop((0..80).map(|_| lend(&spares, SPARE_BYTES / 8)).collect::<Vec<_>>());
        assert!(tables(&spares) <= 8, "{}", tables(&spares));
        (0..TRIM).for_each(|_| spares.count_look());
        assert_eq!(tables(&spares), 0);
    }

    #[test]
    fn of_large_buffers_few_wait() {
        let spares = Spares::default();
        drop((0..9).map(|_| lend(&spares, SPARE_BYTES / 2)).collect::<Vec<_>>());
        assert_eq!(spares.home.returned().buffers.len(), 4);
    }

    #[test]
    fn what_is_moved_out_of_a_run_does_not_keep_its_buffer() {
        for (first, others) in [(true, false), (false, true)] {
            let spares = Spares::default();
            let mut payloads = vec![(others, &[b'x'; 1000][..]); 100];
            payloads.insert(0, (first, b"hello"));
            let mut block = builder();
            block.adopt(run(&payloads, Some(spares.home())), 1).unwrap();
            let (data, bytes) = block.build();
            assert_eq!((bytes, data.entries.len()), (100_005, 101));
            assert!(data.text.capacity() + data.binary.capacity() < 101_000);
            assert!(data.run.is_empty() && spare(&spares) > 100_000, "the buffer is back");
        }
    }

    #[test]
    fn what_is_fresh_of_a_binary_run_takes_no_more_than_it_needs() {
        let mut block = builder();
        let payloads: Vec<_> = (0..20).map(|n| [n; 100]).collect();
        let payloads: Vec<_> = payloads.iter().map(|payload| (false, &payload[..])).collect();
        block.adopt(run(&payloads, None), 1).unwrap();
        block.identify(|data| Some(MessageId::new(u128::from(data.as_bytes()[0]) + 1)));
        block.retain(unless(|id| id == Some(MessageId::new(8))));
        let (data, bytes) = block.build();
        assert_eq!((bytes, data.bytes_of(&data.entries[0])), (100, &[7; 100][..]));
        let (text, binary) = (data.text.capacity(), data.binary.capacity());
        assert!(text == 0 && binary < 200 && data.run.is_empty(), "{text} {binary}");
    }

    #[test]
    fn nothing_returns_to_a_connection_that_is_gone() {
        let spares = Spares::default();
        let home = spares.home();
        let blocks = [1, 2].map(|_| {
            let mut block = builder();
            block.adopt(run(&[(false, b"xyz")], Some(spares.home())), 1).unwrap();
            block.finish()
        });
        let [first, second] = blocks;
        drop(first);
        let count = |returned: &Returned| (returned.buffers.len(), returned.tables.len());
        assert_eq!(count(&home.returned()), (1, 1));
        drop((spares, second));
        assert_eq!(count(&home.returned()), (0, 0));
    }

    #[test]
    fn a_few_fresh_messages_do_not_keep_the_memory_of_many() {
        let spares = Spares::default();
        let payloads = [(true, &[b'x'; 100][..]); 20];
        let mut block = builder();
        block.adopt(run(&payloads, Some(spares.home())), 1).unwrap();
        let mut number = 0;
        block.identify(|_| {
            number += 1;
            Some(MessageId::new(number))
        });
        block.retain(unless(|id| id == Some(MessageId::new(8))));
        assert_eq!((block.len(), block.bytes()), (1, 100));
        let mut block = block.finish();
        assert!(spare(&spares) >= 2000, "while the message is still there");
        let message = block.next().unwrap();
        assert_eq!((message.metadata().sequence, message.id()), (8, Some(MessageId::new(8))));
        assert_eq!(message.text(), Some("x".repeat(100).as_str()));
    }

    #[test]
    fn a_few_fresh_messages_do_not_keep_what_was_copied_or_is_large_and_seen_before() {
        let large = |byte| Payload::OwnedBinary(vec![byte; 100_000].into());
        let mut block = builder();
        for n in 0..1000 {
            block.push(Payload::Text("copied one by one"), 3 * n + 1, Some(MessageId::new(1)));
            block.push(Payload::Binary(&[7; 50]), 3 * n + 2, Some(MessageId::new(1)));
            if n % 100 == 0 {
                let id = if n == 500 { 2 } else { 1 };
                block.push(large(id as u8), 3 * n + 3, Some(MessageId::new(id)));
            }
        }
        block.push(Payload::Text("fresh"), 3001, Some(MessageId::new(2)));
        block.retain(unless(|id| id == Some(MessageId::new(2))));
        let (data, bytes) = block.build();
        assert_eq!((bytes, data.text.capacity() < 100, data.binary.capacity()), (100_005, true, 0));
        assert_eq!((data.large.len(), data.ids.len()), (1, 2));
        assert!(data.entries.capacity() < 10);
        let told: Vec<_> = data.entries.iter().map(|e| data.base + u64::from(e.sequence)).collect();
        assert_eq!(told, [1503, 3001]);
        assert_eq!(data.bytes_of(&data.entries[0]), [2; 100_000]);
        assert_eq!(data.text_of(&data.entries[1]), Some("fresh"));
    }

    #[test]
    fn groups_of_messages_are_judged_in_their_order() {
        let mut block = builder();
        for n in 0..200_u64 {
            block.push(Payload::Text("x"), n, Some(MessageId::new(u128::from(n) + 1)));
        }
        let mut asked = Vec::new();
        block.retain(unless(|id| {
            let number = id.map_or(0, MessageId::to_u128) as u64;
            asked.push(number - 1);
            number.is_multiple_of(3)
        }));
        assert_eq!(asked, (0..200).collect::<Vec<_>>());
        let kept: Vec<u64> = messages(block).into_iter().map(|(.., n)| n).collect();
        assert_eq!(kept, (0..200).filter(|n| n % 3 == 2).collect::<Vec<_>>());
    }

    fn payload() -> impl Strategy<Value = (bool, Vec<u8>)> {
        let text = "[a-z ß€😀]{0,6}".prop_map(String::into_bytes);
        let piece = prop_oneof![Just(vec![0xe2]), Just(vec![0x82, 0xac]), Just(vec![0xc3, b' '])];
        let payload =
            prop_oneof![20 => text, 1 => piece, 1 => proptest::collection::vec(any::<u8>(), 0..4)];
        (any::<bool>(), payload)
    }

    proptest! {
        #[test]
        fn a_run_that_is_taken_over_is_what_copies_one_by_one_would_be(
            payloads in proptest::collection::vec(payload(), 1..40),
            all_text in prop_oneof![Just(None), any::<bool>().prop_map(Some)],
            fresh in proptest::collection::vec(any::<bool>(), 40),
            spare in any::<bool>(),
        ) {
            let payloads: Vec<_> = payloads
                .into_iter()
                .map(|(text, bytes)| (all_text.unwrap_or(text), bytes))
                .collect();
            let mut expected = Vec::new();
            let mut broken = None;
            for ((text, bytes), n) in payloads.iter().zip(5_u64..) {
                if *text && let Err(error) = std::str::from_utf8(bytes) {
                    broken = Some(error);
                    break;
                }
                expected.push((*text, bytes.clone(), n));
            }
            let borrowed: Vec<_> = payloads.iter().map(|(text, b)| (*text, &b[..])).collect();
            let spares = Spares::default();
            let mut block = builder();
            let taken = block.adopt(run(&borrowed, spare.then(|| spares.home())), 5);
            prop_assert_eq!(taken.err(), broken);
            prop_assert_eq!(block.len(), expected.len());
            let mut n = 0;
            block.identify(|data| {
                n += 1;
                let (text, bytes, _) = &expected[n - 1];
                assert_eq!((data.as_bytes(), matches!(data, Data::Text(_))), (&bytes[..], *text));
                (n % 3 > 0).then(|| MessageId::new(n as u128))
            });
            block.retain(unless(|id| id.is_none_or(|id| fresh[id.to_u128() as usize - 1])));
            let left: Vec<_> = expected
                .iter()
                .filter(|(.., n)| (n - 4) % 3 == 0 || fresh[*n as usize - 5])
                .cloned()
                .collect();
            let bytes: usize = left.iter().map(|(_, bytes, _)| bytes.len()).sum();
            prop_assert_eq!(block.bytes(), bytes);
            let block = block.finish();
            prop_assert_eq!(block.bytes(), bytes);
            for (message, (text, bytes, n)) in block.zip(left) {
                let id = Some(n - 4).filter(|n| n % 3 > 0).map(|n| MessageId::new(n.into()));
                prop_assert_eq!(message.id(), id);
                let told = (message.is_text(), message.to_vec(), message.metadata().sequence);
                prop_assert_eq!(told, (text, bytes, n));
            }
        }
    }
}
