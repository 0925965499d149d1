//! A pipeline under test: a source fed by hand, acknowledgements to wait for.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, select};

use super::now;
use crate::error::BoxError;
use crate::message::{BlockBuilder, Message, MessageId, Payload};
use crate::metrics::Report;
use crate::threads::Kill;
use crate::work::{Acknowledgement, Acknowledger, Failed, Pull, Source, Stop, Succeeded};

/// Groups of messages that may wait in a [`TestSource`].
const WAITING: usize = 4096;

/// A source that gives what its feed is told to, without any socket: Broadway's
/// `DummyProducer`.
///
/// ```
/// use std::time::Duration;
/// use broadsock::testing::{self, TestAcknowledger};
/// use broadsock::{Message, Pipeline};
///
/// let (source, feed) = testing::source();
/// let acknowledger = TestAcknowledger::new();
/// let pipeline = Pipeline::each(|message: &Message| {
///     message.text().ok_or("not a text").map(drop)
/// })
/// .source_with(source, acknowledger.clone())
/// .start()?;
///
/// feed.test_message("a");
/// assert!(acknowledger.wait_succeeded(1, Duration::from_secs(5)));
/// feed.test_batch([b"\xff".as_slice(), b"b"]);
/// assert!(acknowledger.wait(3, Duration::from_secs(5)));
/// assert_eq!(acknowledger.failed()[0].message.as_bytes(), b"\xff");
///
/// feed.end();
/// assert_eq!(pipeline.join().ledger.accepted, 3);
/// # Ok::<(), broadsock::Error>(())
/// ```
#[must_use = "a source does nothing until a pipeline has it"]
pub fn source() -> (TestSource, TestFeed) {
    let (sender, receiver) = bounded(WAITING);
    let source = TestSource { groups: receiver, pending: VecDeque::new(), left: None };
    (source, TestFeed(Arc::new(Mutex::new(Shared { sender: Some(sender), sequence: 0 }))))
}

/// The source that [`source`] makes.
#[derive(Debug)]
pub struct TestSource {
    groups: Receiver<Vec<Message>>,
    /// What did not fit into the last pull.
    pending: VecDeque<Message>,
    /// Once closed: how many of the groups it held then are left.
    left: Option<usize>,
}

/// Feeds a [`TestSource`]. Clones feed the same one.
#[derive(Debug, Clone)]
pub struct TestFeed(Arc<Mutex<Shared>>);

#[derive(Debug)]
struct Shared {
    /// `None` once it has ended.
    sender: Option<Sender<Vec<Message>>>,
    sequence: u64,
}

impl TestFeed {
    /// Gives one message: a text, bytes (a text if they are UTF-8), or a
    /// [`TestMessage`]. Returns `false` if nobody takes it: the pipeline or the
    /// feed has ended.
    pub fn test_message(&self, message: impl Into<TestMessage>) -> bool {
        self.test_batch([message])
    }

    /// Gives several messages, which a pipeline with room for them takes
    /// together.
    pub fn test_batch<M: Into<TestMessage>>(&self, messages: impl IntoIterator<Item = M>) -> bool {
        let (sender, messages) = {
            let mut shared = lock(&self.0);
            let messages: Vec<Message> = messages
                .into_iter()
                .map(|message| {
                    shared.sequence += 1;
                    let message: TestMessage = message.into();
                    message.numbered(shared.sequence).build()
                })
                .collect();
            (shared.sender.clone(), messages)
        };
        // Not under the lock: it waits while 4,096 groups wait.
        sender.is_some_and(|sender| sender.send(messages).is_ok())
    }

    /// There will be no other message: the pipeline drains.
    pub fn end(&self) {
        lock(&self.0).sender = None;
    }
}

impl Source for TestSource {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        while self.pending.is_empty() {
            let group = match &mut self.left {
                Some(0) => None,
                Some(left) => {
                    *left -= 1;
                    self.groups.recv().ok()
                }
                None => select! {
                    recv(self.groups) -> group => group.ok(),
                    recv(stop.signal()) -> _ => return Pull::Messages(Vec::new()),
                },
            };
            let Some(group) = group else { return Pull::Ended };
            self.pending.extend(group);
        }
        let most = most.min(self.pending.len());
        Pull::Messages(self.pending.drain(..most).collect())
    }

    /// What was fed by now is still given.
    fn end(&mut self, _: Duration) -> Option<Report> {
        self.left = Some(self.groups.len());
        None
    }
}

/// A message made by hand.
///
/// ```
/// use broadsock::testing::TestMessage;
///
/// let message = TestMessage::text("a").id(7).connection(1).epoch(2).sequence(3).build();
/// assert_eq!(message.text(), Some("a"));
/// assert_eq!(message.id().map(|id| id.to_u128()), Some(7));
/// assert_eq!(message.metadata().sequence, 3);
/// ```
#[derive(Clone)]
#[must_use = "a message by hand has to be built or fed"]
pub struct TestMessage {
    bytes: Vec<u8>,
    is_text: bool,
    connection: usize,
    epoch: u64,
    sequence: Option<u64>,
    id: Option<u128>,
}

impl TestMessage {
    /// A text message.
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(text.into().into_bytes(), true)
    }

    /// A binary message, whatever its bytes are.
    pub fn binary(bytes: impl Into<Vec<u8>>) -> Self {
        Self::new(bytes.into(), false)
    }

    fn new(bytes: Vec<u8>, is_text: bool) -> Self {
        Self { bytes, is_text, connection: 0, epoch: 0, sequence: None, id: None }
    }

    /// Its identity. Defaults to none.
    pub fn id(mut self, id: u128) -> Self {
        self.id = Some(id);
        self
    }

    /// The connection it came from. Defaults to 0.
    pub fn connection(mut self, number: usize) -> Self {
        self.connection = number;
        self
    }

    /// The epoch it came in. Defaults to 0.
    pub fn epoch(mut self, number: u64) -> Self {
        self.epoch = number;
        self
    }

    /// Its number within the epoch. Defaults to the feed's count, or 0.
    pub fn sequence(mut self, number: u64) -> Self {
        self.sequence = Some(number);
        self
    }

    /// The message, received now.
    pub fn build(self) -> Message {
        let payload = match std::str::from_utf8(&self.bytes) {
            Ok(text) if self.is_text => Payload::Text(text),
            _ => Payload::Binary(&self.bytes),
        };
        let mut own = BlockBuilder::new(self.connection, self.epoch, now());
        own.push(payload, self.sequence.unwrap_or(0), self.id.map(MessageId::new));
        let mut block = own.finish();
        match block.next() {
            Some(message) => message,
            None => unreachable!("a message was put into the block"),
        }
    }

    fn numbered(mut self, sequence: u64) -> Self {
        self.sequence.get_or_insert(sequence);
        self
    }
}

impl From<&str> for TestMessage {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

impl From<String> for TestMessage {
    fn from(text: String) -> Self {
        Self::text(text)
    }
}

impl From<&[u8]> for TestMessage {
    fn from(bytes: &[u8]) -> Self {
        Self::new(bytes.to_vec(), true)
    }
}

impl From<Vec<u8>> for TestMessage {
    fn from(bytes: Vec<u8>) -> Self {
        Self::new(bytes, true)
    }
}

impl fmt::Debug for TestMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestMessage").field("len", &self.bytes.len()).finish_non_exhaustive()
    }
}

/// Remembers every acknowledgement, to be waited for and looked at. Clones share
/// what they remember.
#[derive(Debug, Clone, Default)]
pub struct TestAcknowledger(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    groups: Mutex<Vec<Group>>,
    changed: Condvar,
}

/// Messages that were acknowledged together.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Group {
    /// Those that succeeded, in their order.
    pub succeeded: Vec<Succeeded>,
    /// Those that failed, in their order.
    pub failed: Vec<Failed>,
}

impl TestAcknowledger {
    /// Nothing is acknowledged yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until `count` messages have succeeded; `false` if they have not
    /// within `timeout`.
    #[must_use]
    pub fn wait_succeeded(&self, count: usize, timeout: Duration) -> bool {
        self.wait_until(timeout, |groups| succeeded(groups) >= count)
    }

    /// Waits until `count` messages have failed; `false` if they have not
    /// within `timeout`.
    #[must_use]
    pub fn wait_failed(&self, count: usize, timeout: Duration) -> bool {
        self.wait_until(timeout, |groups| failed(groups) >= count)
    }

    /// Waits until `count` messages have succeeded or failed; `false` if they
    /// have not within `timeout`.
    #[must_use]
    pub fn wait(&self, count: usize, timeout: Duration) -> bool {
        self.wait_until(timeout, |groups| succeeded(groups) + failed(groups) >= count)
    }

    /// The groups, as they were acknowledged.
    #[must_use]
    pub fn groups(&self) -> Vec<Group> {
        lock(&self.0.groups).clone()
    }

    /// The messages that succeeded, in the order of their acknowledgement.
    #[must_use]
    pub fn succeeded(&self) -> Vec<Succeeded> {
        self.groups().into_iter().flat_map(|group| group.succeeded).collect()
    }

    /// The messages that failed, in the order of their acknowledgement.
    #[must_use]
    pub fn failed(&self) -> Vec<Failed> {
        self.groups().into_iter().flat_map(|group| group.failed).collect()
    }

    /// Every outcome, in the order of acknowledgement.
    #[must_use]
    pub fn outcomes(&self) -> Vec<Acknowledgement> {
        let outcomes = |group: Group| {
            let succeeded = group.succeeded.into_iter().map(Acknowledgement::Succeeded);
            succeeded.chain(group.failed.into_iter().map(Acknowledgement::Failed))
        };
        self.groups().into_iter().flat_map(outcomes).collect()
    }

    fn wait_until(&self, timeout: Duration, done: impl Fn(&[Group]) -> bool) -> bool {
        let groups = lock(&self.0.groups);
        let waited = self.0.changed.wait_timeout_while(groups, timeout, |groups| !done(groups));
        let (groups, _) = waited.unwrap_or_else(PoisonError::into_inner);
        done(&groups)
    }
}

impl Acknowledger for TestAcknowledger {
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        let group = Group { succeeded: succeeded.to_vec(), failed: failed.to_vec() };
        lock(&self.0.groups).push(group);
        self.0.changed.notify_all();
        Ok(())
    }
}

fn succeeded(groups: &[Group]) -> usize {
    groups.iter().map(|group| group.succeeded.len()).sum()
}

fn failed(groups: &[Group]) -> usize {
    groups.iter().map(|group| group.failed.len()).sum()
}

/// Ends the worker thread that calls it, from a handler or acknowledger: a panic
/// that the pipeline does not contain, so that supervision has to act.
///
/// # Panics
///
/// Always: that is how the thread ends.
pub fn kill_worker() -> ! {
    std::panic::panic_any(Kill)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
