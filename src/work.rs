//! What users of a pipeline implement and exchange with it: [`Handler`],
//! [`Acknowledger`], [`Source`], and what goes between them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::error::BoxError;
use crate::message::Message;
use crate::metrics::Report;

/// The work itself: what is done with each message, and with batches of them.
///
/// One value serves all worker threads, so methods take `&self`. A panic or an
/// `Err` fails exactly the message, or the batch, that it happened on.
///
/// ```
/// use broadsock::{Batch, Failure, Handler, Message, Next};
///
/// struct Store;
///
/// impl Handler for Store {
///     type Item = String;
///
///     fn handle_message(&self, message: &Message) -> Result<Next<String>, Failure> {
///         let text = message.text().ok_or("binary messages are not expected")?;
///         Ok(Next::to("db", text.to_uppercase()))
///     }
///
///     fn handle_batch(&self, batch: &mut Batch<String>) -> Result<(), Failure> {
///         for index in 0..batch.len() {
///             if batch.item(index).is_empty() {
///                 batch.fail(index, Failure::permanent("nothing to store"));
///             }
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait Handler: Send + Sync + 'static {
    /// What a message becomes on its way into a batch; `()` without batchers.
    type Item: Send + 'static;

    /// Sees the messages that a processor is about to handle, together: the
    /// place for one look-up instead of many. An `Err` or a panic fails none of
    /// them; it is reported.
    ///
    /// # Errors
    ///
    /// Whatever went wrong.
    fn prepare(&self, messages: &[Message]) -> Result<(), Failure> {
        let _ = messages;
        Ok(())
    }

    /// Handles one message and says where it goes next.
    ///
    /// # Errors
    ///
    /// A [`Failure`], made from any error by `?`: the message is tried again as
    /// the retry policy says, and then it has failed.
    fn handle_message(&self, message: &Message) -> Result<Next<Self::Item>, Failure>;

    /// Handles a batch. Every message in it succeeds that was not failed by
    /// [`Batch::fail`].
    ///
    /// # Errors
    ///
    /// A [`Failure`] fails every message of the batch.
    fn handle_batch(&self, batch: &mut Batch<Self::Item>) -> Result<(), Failure> {
        let _ = batch;
        Ok(())
    }

    /// Sees the messages that have failed for good, before they are
    /// acknowledged as failed: the place for a dead-letter queue.
    fn handle_failed(&self, failed: &[Failed]) {
        let _ = failed;
    }
}

/// Where a handled message goes.
#[derive(Debug)]
#[must_use = "a message without a next step is not handled"]
pub struct Next<T> {
    pub(crate) batch: Option<ToBatch<T>>,
    pub(crate) tag: Option<Tag>,
    pub(crate) acknowledge_now: bool,
}

/// The way into a batch.
#[derive(Debug)]
pub(crate) struct ToBatch<T> {
    pub(crate) batcher: Cow<'static, str>,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) item: T,
    pub(crate) flush: bool,
}

/// A word for the acknowledger: what success or failure of this message means.
pub type Tag = Cow<'static, str>;

impl<T> Next<T> {
    /// The message is done: it succeeded.
    pub fn done() -> Self {
        Self { batch: None, tag: None, acknowledge_now: false }
    }

    /// The item goes to the batcher of this name; an unknown one fails the
    /// message.
    pub fn to(batcher: impl Into<Cow<'static, str>>, item: T) -> Self {
        let batch = ToBatch { batcher: batcher.into(), key: None, item, flush: false };
        Self { batch: Some(batch), ..Self::done() }
    }

    /// Batches hold items of one key only; one key is worked by one worker at a
    /// time, in order. With partitions, that holds for one key of one partition,
    /// and those that belong to the same worker share its batches.
    pub fn key(mut self, key: impl Into<Arc<str>>) -> Self {
        if let Some(batch) = &mut self.batch {
            batch.key = Some(key.into());
        }
        self
    }

    /// Closes the batch with this item at once (Broadway's batch mode `:flush`).
    pub fn flush(mut self) -> Self {
        if let Some(batch) = &mut self.batch {
            batch.flush = true;
        }
        self
    }

    /// Acknowledges the message as a success now, before its batch; what the
    /// batch does cannot fail it any more.
    pub fn acknowledge_now(mut self) -> Self {
        self.acknowledge_now = true;
        self
    }

    /// A word for the acknowledger.
    pub fn tag(mut self, tag: impl Into<Tag>) -> Self {
        self.tag = Some(tag.into());
        self
    }
}

/// Why a message failed. Made from any error by `?` or `into()`; then it is
/// tried again, if there is a retry policy.
#[derive(Clone)]
pub struct Failure {
    pub(crate) error: Arc<dyn std::error::Error + Send + Sync>,
    pub(crate) kind: FailureKind,
    pub(crate) retry: bool,
    pub(crate) tag: Option<Tag>,
}

/// How a message failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// The handler returned an error.
    Error,
    /// The handler panicked.
    Panic,
    /// The handler named a batcher that does not exist.
    UnknownBatcher,
    /// The worker thread ended in the middle of it.
    WorkerDied,
}

impl Failure {
    /// A failure with this cause, to be tried again.
    pub fn new(error: impl Into<BoxError>) -> Self {
        Self::of(FailureKind::Error, error, true)
    }

    /// A failure with this cause, that no further try can cure.
    pub fn permanent(error: impl Into<BoxError>) -> Self {
        Self::of(FailureKind::Error, error, false)
    }

    pub(crate) fn of(kind: FailureKind, error: impl Into<BoxError>, retry: bool) -> Self {
        Self { error: error.into().into(), kind, retry, tag: None }
    }

    /// A word for the acknowledger.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<Tag>) -> Self {
        self.tag = Some(tag.into());
        self
    }

    /// How it failed.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        self.kind
    }

    /// The cause.
    #[must_use]
    pub fn error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        &*self.error
    }
}

impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failure").field("kind", &self.kind).field("error", &self.error).finish()
    }
}

/// Items that are handled together.
pub struct Batch<T> {
    pub(crate) batcher: Arc<str>,
    pub(crate) key: Option<Arc<str>>,
    pub(crate) trigger: Trigger,
    pub(crate) entries: Vec<BatchEntry<T>>,
    /// Those of single items, by place.
    pub(crate) failures: BTreeMap<usize, Failure>,
}

/// Why a batch was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Trigger {
    /// It was full, or the next item would have made it too large.
    Size,
    /// Its time, from its first item on, had passed.
    Timeout,
    /// An item asked for it.
    Flush,
    /// Too many keys were open; it had been open longest.
    Keys,
    /// The pipeline drains.
    Drain,
}

/// One item of a batch, with the message it came from.
#[derive(Debug)]
pub(crate) struct BatchEntry<T> {
    pub(crate) ticket: Ticket,
    pub(crate) item: T,
}

impl<T> Batch<T> {
    /// The batcher's name.
    #[must_use]
    pub fn batcher(&self) -> &str {
        &self.batcher
    }

    /// The key that its items share, if they were given one.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Why the batch was closed.
    #[must_use]
    pub fn trigger(&self) -> Trigger {
        self.trigger
    }

    /// How many items it has; never zero.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Never true: there are no empty batches.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The items, in order.
    pub fn items(&self) -> impl ExactSizeIterator<Item = &T> {
        self.entries.iter().map(|entry| &entry.item)
    }

    /// The messages that the items came from, in the same order.
    pub fn messages(&self) -> impl ExactSizeIterator<Item = &Message> {
        self.entries.iter().map(|entry| entry.ticket.message())
    }

    /// The item at `index`.
    ///
    /// # Panics
    ///
    /// If `index` is not below [`len`](Batch::len).
    #[must_use]
    pub fn item(&self, index: usize) -> &T {
        &self.entries[index].item
    }

    /// Fails the message of the item at `index`; the others are not touched.
    ///
    /// # Panics
    ///
    /// If `index` is not below [`len`](Batch::len).
    pub fn fail(&mut self, index: usize, failure: Failure) {
        assert!(index < self.len(), "a batch of {} has no item {index}", self.len());
        self.failures.insert(index, failure);
    }
}

impl<T> fmt::Debug for Batch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch")
            .field("batcher", &self.batcher)
            .field("key", &self.key)
            .field("trigger", &self.trigger)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// The messages that one pull brought. Whatever is on its way through the
/// pipeline points into this, so that a message's own counter, which it shares
/// with all others of its block, is touched twice and no more.
#[derive(Debug)]
pub(crate) struct Pulled {
    /// Pulls of all sources are numbered in the order of their acceptance.
    pub(crate) number: u64,
    /// Which source it came from.
    pub(crate) source: usize,
    pub(crate) messages: Vec<Message>,
    /// The partition of each, if there are partitions: asked of the program
    /// once, so that a message stays in one place.
    pub(crate) partitions: OnceLock<Vec<u64>>,
}

impl Pulled {
    #[inline]
    pub(crate) fn message(&self, place: u32) -> &Message {
        &self.messages[place as usize]
    }

    #[inline]
    pub(crate) fn partition(&self, place: u32) -> Option<u64> {
        self.partitions.get()?.get(place as usize).copied()
    }
}

/// One message on its way through the pipeline.
#[derive(Debug, Clone)]
pub(crate) struct Ticket {
    /// Which pull brought it, and its place among the messages of that.
    pub(crate) pulled: Arc<Pulled>,
    pub(crate) place: u32,
    /// Tries so far.
    pub(crate) attempts: u32,
    /// In a box, as few have one and many tickets are moved.
    pub(crate) tag: Option<Box<Tag>>,
}

impl Ticket {
    pub(crate) fn message(&self) -> &Message {
        self.pulled.message(self.place)
    }

    pub(crate) fn partition(&self) -> Option<u64> {
        self.pulled.partition(self.place)
    }
}

/// A message that succeeded.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Succeeded {
    /// The message.
    pub message: Message,
    /// How often it was tried, the last time included.
    pub attempts: u32,
    /// The handler's word for the acknowledger.
    pub tag: Option<Tag>,
}

/// A message that failed for good.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Failed {
    /// The message.
    pub message: Message,
    /// How often it was tried.
    pub attempts: u32,
    /// The handler's word for the acknowledger.
    pub tag: Option<Tag>,
    /// Why it failed.
    pub failure: Failure,
}

/// Learns what became of messages, exactly once for each.
///
/// Messages come in groups: those of one source that were settled together, in
/// their order. It runs on worker threads; an error or a panic is counted and
/// reported, and harms no other group.
pub trait Acknowledger: Send + Sync + 'static {
    /// These messages are settled.
    ///
    /// # Errors
    ///
    /// Whatever went wrong; it is counted, and not tried again.
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError>;
}

/// Acknowledges nothing: what a source has without one.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoAcknowledger;

impl Acknowledger for NoAcknowledger {
    fn acknowledge(&self, _: &[Succeeded], _: &[Failed]) -> Result<(), BoxError> {
        Ok(())
    }
}

/// What a [`ChannelAcknowledger`] sends.
#[derive(Debug, Clone)]
pub enum Acknowledgement {
    /// The message succeeded.
    Succeeded(Succeeded),
    /// The message failed.
    Failed(Failed),
}

/// Sends each outcome on a channel (Broadway's `CallerAcknowledger`).
#[derive(Debug, Clone)]
pub struct ChannelAcknowledger(Sender<Acknowledgement>);

impl ChannelAcknowledger {
    /// An acknowledger, and the channel that its outcomes come out of, which
    /// holds `capacity` of them. When it is full, the outcome is lost to the
    /// channel and counted as a failed acknowledgement: a slow listener does
    /// not hold up workers.
    #[must_use]
    pub fn new(capacity: usize) -> (Self, Receiver<Acknowledgement>) {
        let (sender, receiver) = bounded(capacity);
        (Self(sender), receiver)
    }

    fn send(&self, outcome: Acknowledgement) -> Result<(), BoxError> {
        self.0.try_send(outcome).map_err(|error| match error {
            TrySendError::Full(_) => "the acknowledgement channel is full".into(),
            TrySendError::Disconnected(_) => "nobody listens to acknowledgements".into(),
        })
    }
}

impl Acknowledger for ChannelAcknowledger {
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        let succeeded = succeeded.iter().cloned().map(Acknowledgement::Succeeded);
        let failed = failed.iter().cloned().map(Acknowledgement::Failed);
        // One that does not fit must not keep the others back.
        succeeded.chain(failed).map(|outcome| self.send(outcome)).fold(Ok(()), Result::and)
    }
}

/// Where a pipeline's messages come from.
///
/// Implemented for [`Client`](crate::Client); see
/// [`sources`](crate::sources) for iterators and channels.
pub trait Source: Send + 'static {
    /// Waits for messages and returns up to `most`, which is at least 1.
    /// Returning none is allowed; it is called again. It must return soon after
    /// `stop` is set.
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull;

    /// The first step of a graceful end: reads nothing new, and stays able to
    /// answer. What was taken in can still be pulled, also with a `stop` that is
    /// set; [`end`](Source::end) follows once that is settled, or half of
    /// the time is up. `false`, the default: there is nothing to keep open, and
    /// `end` follows at once.
    fn stop_reading(&mut self) -> bool {
        false
    }

    /// Takes in nothing new from now on; [`pull`](Source::pull) still returns
    /// what was taken in before, with a `stop` that is set, until it has none or
    /// says [`Pull::Ended`]. May take `deadline`.
    fn end(&mut self, deadline: Duration) -> Option<Report> {
        let _ = deadline;
        None
    }

    /// Who is told of each settled message; `None`: nobody.
    fn settler(&self) -> Option<Arc<dyn Settler>> {
        None
    }
}

/// What can be given to a pipeline as a source: a [`Source`], or a
/// [`Client`](crate::Client).
pub trait IntoSource {
    /// The source it becomes.
    fn into_source(self) -> Box<dyn Source>;
}

impl<S: Source> IntoSource for S {
    fn into_source(self) -> Box<dyn Source> {
        Box::new(self)
    }
}

/// What [`Source::pull`] returns.
#[derive(Debug)]
pub enum Pull {
    /// Messages; possibly none.
    Messages(Vec<Message>),
    /// There will never be another.
    Ended,
}

/// Keeps a source's record of processing state.
pub trait Settler: Send + Sync {
    /// The message succeeded (`true`) or failed for good.
    fn settled(&self, message: &Message, success: bool);

    /// Messages that were settled together: all of them succeeded, or all failed
    /// for good. By default each is told to [`settled`](Settler::settled); a
    /// record behind a lock can lock once for all. After a panic it is called
    /// again with those that are left.
    fn settled_together(&self, messages: &mut dyn Iterator<Item = &Message>, success: bool) {
        messages.for_each(|message| self.settled(message, success));
    }
}

/// Says when a source must stop waiting.
#[derive(Debug, Clone)]
pub struct Stop {
    pub(crate) signal: Receiver<()>,
}

impl Stop {
    /// Whether it must.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.signal.try_recv() != Err(crossbeam_channel::TryRecvError::Empty)
    }

    /// A channel to put into `crossbeam_channel::select!`: it is ready
    /// (disconnected) once the source must stop waiting.
    #[must_use]
    pub fn signal(&self) -> &Receiver<()> {
        &self.signal
    }
}
