//! What arrives: [`Message`], a light handle into a [`Block`] of messages.

use std::fmt;
use std::num::NonZeroU128;
use std::sync::Arc;
use std::time::Instant;

use tungstenite::{Bytes, Utf8Bytes};

/// Payloads from this size on stay in the buffer they were read into; smaller
/// ones are copied together, which frees that buffer (it is far larger).
const LARGE: usize = 16 * 1024;

/// Payloads are copied together up to about this size.
const ARENA: usize = 1 << 30;

/// One data message: its payload and where it came from.
///
/// A handle of two words into a block of messages that arrived together: cheap
/// to clone and to send to another thread. It keeps its whole block alive (up
/// to a few hundred KiB); a message that is kept for long should be
/// [`into_owned`](Message::into_owned) first.
///
/// `Debug` never shows the payload.
#[derive(Clone)]
pub struct Message {
    block: Arc<BlockData>,
    index: u32,
}

/// Some messages that arrived together on one connection, in their order: the
/// unit in which they travel between threads.
///
/// An iterator over its messages. What
/// [`Client::receiver`](crate::Client::receiver) yields; a message counts as
/// delivered when it is taken out of the block or when the block is dropped.
pub struct Block {
    data: Arc<BlockData>,
    next: u32,
    end: u32,
    account: Option<Arc<dyn Account>>,
    /// Payload bytes that leave the queue with this view of the block.
    bytes: usize,
}

/// The identity of a message: a keyed 128-bit hash of the id found in it, or of
/// its content. The key is drawn at random for each process, so ids cannot be
/// compared across processes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(NonZeroU128);

/// Where and when a message was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metadata {
    /// Number of the connection, from 0, in the order of the endpoints.
    pub connection: usize,
    /// Number of the socket the connection was on, from 1.
    pub epoch: u64,
    /// Number of the message within its epoch, from 1.
    pub sequence: u64,
    /// When the read that completed it returned.
    pub received_at: Instant,
    /// Its identity, when dedup is on and an id was found.
    pub id: Option<MessageId>,
}

/// Who keeps the books of a block's messages.
pub(crate) trait Account: Send + Sync {
    /// `count` messages were handed to the program.
    fn delivered(&self, count: usize);
    /// A block of `bytes` payload bytes left the queue.
    fn freed(&self, bytes: usize);
}

/// The payloads of a block and the table of where each one lies.
pub(crate) struct BlockData {
    connection: usize,
    epoch: u64,
    received_at: Instant,
    /// Sequence that the entries' are counted from.
    base: u64,
    text: String,
    binary: Vec<u8>,
    large: Vec<Large>,
    entries: Vec<Entry>,
    /// One for each entry, while dedup is on; empty otherwise.
    ids: Vec<Option<MessageId>>,
}

/// One row of a block's table: 16 bytes, for there is one for each message.
#[derive(Clone, Copy)]
struct Entry {
    kind: Kind,
    /// Where the payload starts in its arena, or its place among the large.
    start: u32,
    len: u32,
    /// Sequence after the block's base.
    sequence: u32,
}

/// Where a payload lies: text apart from binary, so that a text is validated
/// once and sliced for ever after.
#[derive(Clone, Copy)]
enum Kind {
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

impl Message {
    /// The payload if it is a text message, else `None`.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.block.text_of(self.entry())
    }

    /// The payload's bytes, of a text as of a binary message.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.block.bytes_of(self.entry())
    }

    /// Whether it is a text message (the alternative is binary).
    #[must_use]
    pub fn is_text(&self) -> bool {
        self.block.is_text(self.entry())
    }

    /// Length of the payload in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.as_bytes().len()
    }

    /// Whether the payload is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its identity, when dedup is on and an id was found.
    #[must_use]
    pub fn id(&self) -> Option<MessageId> {
        self.block.ids.get(self.index as usize).copied().flatten()
    }

    /// Where and when it was received.
    #[must_use]
    pub fn metadata(&self) -> Metadata {
        let entry = self.entry();
        Metadata {
            connection: self.block.connection,
            epoch: self.block.epoch,
            sequence: self.block.base + u64::from(entry.sequence),
            received_at: self.block.received_at,
            id: self.id(),
        }
    }

    /// The same message in memory of its own: copies the payload once and lets
    /// go of the block, which is freed when its last message is.
    #[must_use]
    pub fn into_owned(self) -> Self {
        let mut own =
            BlockBuilder::new(self.block.connection, self.block.epoch, self.block.received_at);
        let payload = match self.text() {
            Some(text) => Payload::Text(text),
            None => Payload::Binary(self.as_bytes()),
        };
        own.push(payload, self.metadata().sequence, self.id());
        Self { block: Arc::new(own.data), index: 0 }
    }

    /// The payload copied into a vector.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    fn entry(&self) -> &Entry {
        &self.block.entries[self.index as usize]
    }
}

impl fmt::Display for Message {
    /// The text, or `<n bytes>` of a binary message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text() {
            Some(text) => f.write_str(text),
            None => write!(f, "<{} bytes>", self.len()),
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("text", &self.is_text())
            .field("len", &self.len())
            .field("metadata", &self.metadata())
            .finish_non_exhaustive()
    }
}

impl Block {
    /// How many messages are left in it.
    #[must_use]
    pub fn len(&self) -> usize {
        (self.end - self.next) as usize
    }

    /// Whether every message was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Payload bytes of all its messages, taken or not.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The ids of the messages left in it.
    pub(crate) fn ids(&self) -> impl Iterator<Item = MessageId> + '_ {
        // The table is empty without dedup.
        let end = self.data.ids.len().min(self.end as usize);
        self.data.ids[end.min(self.next as usize)..end].iter().filter_map(|id| *id)
    }

    /// Lets go of the messages left in it without counting them as delivered.
    pub(crate) fn discard(mut self) -> usize {
        let left = self.len();
        if let Some(account) = self.account.take() {
            account.freed(self.bytes);
        }
        left
    }

    /// From now on `account` is told what happens to the messages.
    pub(crate) fn with_account(mut self, account: Arc<dyn Account>) -> Self {
        self.account = Some(account);
        self
    }

    /// From now on nobody is told: it never entered the queue.
    pub(crate) fn without_account(mut self) -> Self {
        self.account = None;
        self
    }
}

impl Iterator for Block {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        if self.next == self.end {
            return None;
        }
        let message = Message { block: Arc::clone(&self.data), index: self.next };
        self.next += 1;
        if let Some(account) = &self.account {
            account.delivered(1);
        }
        Some(message)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.len(), Some(self.len()))
    }
}

impl ExactSizeIterator for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(account) = self.account.take() {
            account.delivered(self.len());
            account.freed(self.bytes);
        }
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl MessageId {
    /// Of a hash; nothing can tell 0 from 1, which is as likely as any accident.
    pub(crate) fn new(hash: u128) -> Self {
        Self(NonZeroU128::new(hash).unwrap_or(NonZeroU128::MIN))
    }

    /// The id as a number.
    #[must_use]
    pub fn to_u128(self) -> u128 {
        self.0.get()
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MessageId({self})")
    }
}

impl BlockData {
    fn text_of(&self, entry: &Entry) -> Option<&str> {
        match entry.kind {
            Kind::Text => Some(&self.text[entry.range()]),
            Kind::Binary => None,
            Kind::Large => match &self.large[entry.start as usize] {
                Large::Text(text) => Some(text.as_str()),
                Large::Binary(_) => None,
            },
        }
    }

    fn bytes_of(&self, entry: &Entry) -> &[u8] {
        match entry.kind {
            Kind::Text => &self.text.as_bytes()[entry.range()],
            Kind::Binary => &self.binary[entry.range()],
            Kind::Large => match &self.large[entry.start as usize] {
                Large::Text(text) => text.as_bytes(),
                Large::Binary(bytes) => bytes,
            },
        }
    }

    fn is_text(&self, entry: &Entry) -> bool {
        match entry.kind {
            Kind::Text => true,
            Kind::Binary => false,
            Kind::Large => matches!(self.large[entry.start as usize], Large::Text(_)),
        }
    }

    fn bytes(&self) -> usize {
        let large: usize = self
            .large
            .iter()
            .map(|large| match large {
                Large::Text(text) => text.len(),
                Large::Binary(bytes) => bytes.len(),
            })
            .sum();
        self.text.len() + self.binary.len() + large
    }
}

impl Entry {
    fn range(self) -> std::ops::Range<usize> {
        self.start as usize..(self.start + self.len) as usize
    }
}

/// Gathers the messages of one turn of the reader into a block.
pub(crate) struct BlockBuilder {
    data: BlockData,
}

impl BlockBuilder {
    pub(crate) fn new(connection: usize, epoch: u64, received_at: Instant) -> Self {
        Self {
            data: BlockData {
                connection,
                epoch,
                received_at,
                base: 0,
                text: String::new(),
                binary: Vec::new(),
                large: Vec::new(),
                entries: Vec::new(),
                ids: Vec::new(),
            },
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

    pub(crate) fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// The ids of its messages.
    pub(crate) fn ids(&self) -> impl Iterator<Item = MessageId> + '_ {
        self.data.ids.iter().filter_map(|id| *id)
    }

    /// Takes a message. Sequences grow within a block.
    pub(crate) fn push(&mut self, payload: Payload<'_>, sequence: u64, id: Option<MessageId>) {
        if self.data.entries.is_empty() {
            self.data.base = sequence;
        }
        let (kind, start, len) = self.place(payload);
        let sequence = narrow((sequence - self.data.base) as usize);
        if id.is_some() || !self.data.ids.is_empty() {
            self.data.ids.resize(self.data.entries.len(), None);
            self.data.ids.push(id);
        }
        self.data.entries.push(Entry { kind, start: narrow(start), len: narrow(len), sequence });
    }

    /// Keeps only the messages for which `fresh` says so: `None` is asked for
    /// a message without an id.
    pub(crate) fn retain(&mut self, mut fresh: impl FnMut(Option<MessageId>) -> bool) {
        let BlockData { entries, ids, .. } = &mut self.data;
        if ids.is_empty() {
            entries.retain(|_| fresh(None));
            return;
        }
        ids.resize(entries.len(), None);
        let mut kept = 0;
        for at in 0..entries.len() {
            if fresh(ids[at]) {
                (entries[kept], ids[kept]) = (entries[at], ids[at]);
                kept += 1;
            }
        }
        entries.truncate(kept);
        ids.truncate(kept);
    }

    /// The block.
    pub(crate) fn finish(mut self) -> Block {
        if !self.data.ids.is_empty() {
            self.data.ids.resize(self.data.entries.len(), None);
        }
        let end = narrow(self.data.entries.len());
        let bytes = self.data.bytes();
        Block { data: Arc::new(self.data), next: 0, end, account: None, bytes }
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
fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Block {
    /// Splits off what lies behind the first `keep` messages.
    pub(crate) fn split_off(&mut self, keep: usize) -> Block {
        let middle = self.end.min(self.next + u32::try_from(keep).unwrap_or(u32::MAX));
        let data = Arc::clone(&self.data);
        let rest = Block { data, next: middle, end: self.end, account: None, bytes: self.bytes };
        self.end = middle;
        rest
    }

    /// Splits off the first `count` messages. The bytes stay with the rest.
    pub(crate) fn split_front(&mut self, count: usize) -> Block {
        let middle = self.end.min(self.next + narrow(count));
        let (data, account) = (Arc::clone(&self.data), self.account.clone());
        let front = Block { data, next: self.next, end: middle, account, bytes: 0 };
        self.next = middle;
        front
    }
}

impl fmt::Debug for BlockBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockBuilder").field("len", &self.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn block() -> BlockBuilder {
        BlockBuilder::new(2, 7, crate::io::clock::Clock::real().now())
    }

    #[derive(Default)]
    struct Counts(AtomicUsize, AtomicUsize);

    impl Account for Counts {
        fn delivered(&self, count: usize) {
            self.0.fetch_add(count, Ordering::SeqCst);
        }
        fn freed(&self, bytes: usize) {
            self.1.fetch_add(bytes, Ordering::SeqCst);
        }
    }

    #[test]
    fn messages_come_out_in_order_with_kind_content_and_origin() {
        let big = "x".repeat(LARGE);
        let mut builder = block();
        builder.push(Payload::Text("grüße"), 1, None);
        builder.push(Payload::Binary(&[1, 2]), 2, Some(MessageId::new(9)));
        builder.push(Payload::OwnedText(big.as_str().into()), 3, None);
        builder.push(Payload::Text(""), 4, None);
        let messages: Vec<Message> = builder.finish().collect();
        assert_eq!(messages[0].text(), Some("grüße"));
        assert_eq!(messages[1].text(), None);
        assert_eq!(messages[1].as_bytes(), [1, 2]);
        assert_eq!(messages[1].id(), Some(MessageId::new(9)));
        assert_eq!(messages[2].text(), Some(big.as_str()));
        assert!(messages[3].is_empty() && messages[3].is_text());
        let origin = messages[2].metadata();
        assert_eq!((origin.connection, origin.epoch, origin.sequence), (2, 7, 3));
    }

    #[test]
    fn an_owned_message_equals_its_original_and_frees_the_block() {
        let mut builder = block();
        builder.push(Payload::Text("a"), 1, None);
        builder.push(Payload::Binary(b"bb"), 2, Some(MessageId::new(5)));
        let mut block = builder.finish();
        let weak = Arc::downgrade(&block.data);
        let _first = block.next().map(Message::into_owned);
        let second = block.next().map(Message::into_owned).unwrap();
        drop(block);
        assert!(weak.upgrade().is_none(), "the block outlives its owned messages");
        assert_eq!(second.as_bytes(), b"bb");
        assert_eq!((second.metadata().sequence, second.id()), (2, Some(MessageId::new(5))));
    }

    #[test]
    fn every_message_of_a_block_is_delivered_once_taken_or_dropped() {
        let counts = Arc::new(Counts::default());
        let mut builder = block();
        (1..=5).for_each(|n| builder.push(Payload::Text("ab"), n, None));
        let mut block = builder.finish();
        let rest = block.split_off(3);
        let mut block = block.with_account(counts.clone());
        block.next();
        assert_eq!(counts.0.load(Ordering::SeqCst), 1);
        drop(block);
        assert_eq!(counts.0.load(Ordering::SeqCst), 3);
        assert_eq!(rest.with_account(counts.clone()).discard(), 2);
        assert_eq!(counts.0.load(Ordering::SeqCst), 3, "discarded is not delivered");
    }

    #[test]
    fn debug_output_never_shows_the_payload() {
        let mut builder = block();
        builder.push(Payload::Text("secret"), 1, None);
        let message = builder.finish().next().unwrap();
        assert!(!format!("{message:?}").contains("secret"));
    }
}
