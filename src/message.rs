//! What arrives: [`Message`], a light handle into a [`Block`] of messages.

use std::fmt;
use std::num::NonZeroU128;
use std::sync::Arc;
use std::time::Instant;

pub(crate) use crate::block::{BlockBuilder, Payload};
use crate::block::{BlockData, Entry, narrow};

/// One data message: its payload and where it came from.
///
/// A handle of two words into a block of messages that arrived together: cheap
/// to clone and to send to another thread. It keeps its whole block alive (up
/// to a few hundred KiB, or a read buffer that is larger); a message that is kept
/// for long should be [`into_owned`](Message::into_owned) first.
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
    /// Boxed, as a queue has a slot for each of thousands of blocks before there is
    /// any.
    view: Box<View>,
}

/// Some of the messages of a block.
struct View {
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

/// Messages of a block that count as delivered together when they are shown.
const VISITED: u32 = 64;

/// Who keeps the books of a block's messages.
pub(crate) trait Account: Send + Sync {
    /// `count` messages were handed to the program.
    fn delivered(&self, count: usize);
    /// A block of `bytes` payload bytes left the queue.
    fn freed(&self, bytes: usize);
}

impl Message {
    /// The payload if it is a text message, else `None`.
    #[must_use]
    #[inline]
    pub fn text(&self) -> Option<&str> {
        self.block.text_of(self.entry())
    }

    /// The payload's bytes, of a text as of a binary message.
    #[must_use]
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        self.block.bytes_of(self.entry())
    }

    /// Whether it is a text message (the alternative is binary).
    #[must_use]
    #[inline]
    pub fn is_text(&self) -> bool {
        self.block.is_text(self.entry())
    }

    /// Length of the payload in bytes.
    #[must_use]
    #[inline]
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
        Self { block: Arc::new(own.build().0), index: 0 }
    }

    /// The payload copied into a vector.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }

    #[inline]
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

impl BlockBuilder {
    /// The block.
    pub(crate) fn finish(self) -> Block {
        let (data, bytes) = self.build();
        let end = narrow(data.entries.len());
        Block::of(View { data: Arc::new(data), next: 0, end, account: None, bytes })
    }
}

impl Block {
    fn of(view: View) -> Self {
        Self { view: Box::new(view) }
    }

    /// How many messages are left in it.
    #[must_use]
    pub fn len(&self) -> usize {
        (self.view.end - self.view.next) as usize
    }

    /// Whether every message was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shows each message left in it, in order: the fastest way through a block. A
    /// message that is taken is a handle of its own, made and dropped at a cost that
    /// is more than that of a glance at a small message; this shows them all through
    /// one handle, which can be cloned to keep a message.
    ///
    /// Messages count as delivered up to 64 at a time, just before the first of them
    /// is shown. A panic of `show` is the caller's; what it did not see counts as
    /// delivered.
    pub fn visit(mut self, mut show: impl FnMut(&Message)) {
        let mut message = Message { block: Arc::clone(&self.view.data), index: self.view.next };
        while self.view.next < self.view.end {
            let shown = self.view.next;
            self.view.next = self.view.end.min(shown + VISITED);
            if let Some(account) = &self.view.account {
                account.delivered((self.view.next - shown) as usize);
            }
            for index in shown..self.view.next {
                message.index = index;
                show(&message);
            }
        }
    }

    /// Payload bytes of all its messages, taken or not.
    pub(crate) fn bytes(&self) -> usize {
        self.view.bytes
    }

    /// The ids of the messages left in it.
    pub(crate) fn ids(&self) -> impl Iterator<Item = MessageId> + '_ {
        // The table is empty without dedup.
        let end = self.view.data.ids.len().min(self.view.end as usize);
        self.view.data.ids[end.min(self.view.next as usize)..end].iter().filter_map(|id| *id)
    }

    /// Lets go of the messages left in it without counting them as delivered.
    pub(crate) fn discard(mut self) -> usize {
        let left = self.len();
        if let Some(account) = self.view.account.take() {
            account.freed(self.view.bytes);
        }
        left
    }

    /// Takes all messages out of it, which are counted as delivered together.
    pub(crate) fn take_into(mut self, messages: &mut Vec<Message>) {
        let message = |index| Message { block: Arc::clone(&self.view.data), index };
        messages.extend((self.view.next..self.view.end).map(message));
        if let Some(account) = &self.view.account {
            account.delivered(self.len());
        }
        self.view.next = self.view.end;
    }

    /// From now on `account` is told what happens to the messages.
    pub(crate) fn with_account(mut self, account: Arc<dyn Account>) -> Self {
        self.view.account = Some(account);
        self
    }

    /// From now on nobody is told: it never entered the queue.
    pub(crate) fn without_account(mut self) -> Self {
        self.view.account = None;
        self
    }
}

impl Iterator for Block {
    type Item = Message;

    #[inline]
    fn next(&mut self) -> Option<Message> {
        if self.view.next == self.view.end {
            return None;
        }
        let message = Message { block: Arc::clone(&self.view.data), index: self.view.next };
        self.view.next += 1;
        if let Some(account) = &self.view.account {
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
        if let Some(account) = self.view.account.take() {
            account.delivered(self.len());
            account.freed(self.view.bytes);
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
        match NonZeroU128::new(hash) {
            Some(hash) => Self(hash),
            None => Self::instead_of_0(),
        }
    }

    // A jump that is never taken costs less than a choice that is always made.
    #[cold]
    fn instead_of_0() -> Self {
        Self(NonZeroU128::MIN)
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

impl Block {
    /// Splits off what lies behind the first `keep` messages.
    pub(crate) fn split_off(&mut self, keep: usize) -> Block {
        let middle = self.view.end.min(self.view.next + u32::try_from(keep).unwrap_or(u32::MAX));
        let data = Arc::clone(&self.view.data);
        let rest = Self::of(View {
            data,
            next: middle,
            end: self.view.end,
            account: None,
            bytes: self.view.bytes,
        });
        self.view.end = middle;
        rest
    }

    /// Splits off the first `count` messages. The bytes stay with the rest.
    pub(crate) fn split_front(&mut self, count: usize) -> Block {
        let middle = self.view.end.min(self.view.next + narrow(count));
        let (data, account) = (Arc::clone(&self.view.data), self.view.account.clone());
        let front = Self::of(View { data, next: self.view.next, end: middle, account, bytes: 0 });
        self.view.next = middle;
        front
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
        let big = "x".repeat(20_000);
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
        let weak = Arc::downgrade(&block.view.data);
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
    fn a_visit_shows_every_message_left_and_counts_each_once() {
        let counts = Arc::new(Counts::default());
        for left in [0, 1, 63, 64, 65, 1000] {
            let mut builder = block();
            (0..=left).for_each(|n| builder.push(Payload::Text(&n.to_string()), n, None));
            let mut block = builder.finish().with_account(counts.clone());
            let _taken = block.next();
            let mut seen = 0;
            let mut kept = None;
            block.visit(|message| {
                seen += 1;
                assert_eq!(message.text(), Some(&*seen.to_string()));
                assert_eq!(message.metadata().sequence, seen);
                assert!(counts.0.load(Ordering::SeqCst) as u64 > seen, "shown is delivered");
                kept.get_or_insert_with(|| message.clone());
            });
            assert_eq!((seen, counts.0.swap(0, Ordering::SeqCst) as u64), (left, left + 1));
            assert!(kept.is_none_or(|message| message.text() == Some("1")), "its own handle");
        }
    }

    #[test]
    fn what_a_visitor_that_panics_has_not_seen_is_delivered_all_the_same() {
        let counts = Arc::new(Counts::default());
        let mut builder = block();
        (0..200).for_each(|n| builder.push(Payload::Text("x"), n, None));
        let block = builder.finish().with_account(counts.clone());
        let panics = |message: &Message| assert!(message.metadata().sequence < 70);
        let visit = std::panic::AssertUnwindSafe(|| block.visit(panics));
        std::panic::catch_unwind(visit).unwrap_err();
        assert_eq!(counts.0.load(Ordering::SeqCst), 200);
    }

    #[test]
    fn debug_output_never_shows_the_payload() {
        let mut builder = block();
        builder.push(Payload::Text("secret"), 1, None);
        let message = builder.finish().next().unwrap();
        assert!(!format!("{message:?}").contains("secret"));
    }
}
