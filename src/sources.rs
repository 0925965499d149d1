//! Sources of a pipeline besides clients: iterators and channels.

use std::any::Any;
use std::iter::Fuse;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, select};

use crate::client::Client;
use crate::io::clock::Clock;
use crate::message::{BlockBuilder, Message, Payload};
use crate::metrics::Report;
use crate::work::{IntoSource, Pull, Settler, Source, Stop};

/// How long an iterator is asked for more before what it gave is handed on.
const GATHER: Duration = Duration::from_millis(1);

/// Any iterator of texts or bytes as a source: the pipeline drains after its
/// end. It is asked for one item at a time, and should not block for long: a
/// stop waits for that item.
///
/// ```
/// use broadsock::{Pipeline, sources};
///
/// let pipeline = Pipeline::each(|message: &broadsock::Message| {
///     println!("{message}");
///     Ok::<(), std::convert::Infallible>(())
/// })
/// .source(sources::iter(["a", "b"]))
/// .start()?;
/// assert_eq!(pipeline.join().ledger.succeeded, 2);
/// # Ok::<(), broadsock::Error>(())
/// ```
pub fn iter<I>(items: I) -> impl Source
where
    I: IntoIterator,
    I::IntoIter: Send + 'static,
    I::Item: AsRef<[u8]>,
{
    Iter { items: items.into_iter().fuse(), sequence: 0, closed: false, panic: None }
}

/// A channel of texts or bytes as a source: the pipeline drains when all its
/// senders are gone.
pub fn channel<T: AsRef<[u8]> + Send + 'static>(receiver: Receiver<T>) -> impl Source {
    Channel { receiver, sequence: 0, left: None }
}

struct Iter<I> {
    items: Fuse<I>,
    sequence: u64,
    closed: bool,
    /// Goes on when what was given before it has been handed on.
    panic: Option<Box<dyn Any + Send>>,
}

impl<I> Source for Iter<I>
where
    I: Iterator + Send + 'static,
    I::Item: AsRef<[u8]>,
{
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        let clock = Clock::real();
        let started = clock.now();
        let mut gather = Gather::new(&mut self.sequence);
        let mut ended = self.closed;
        while !ended
            && self.panic.is_none()
            && gather.len() < most
            && !stop.is_set()
            && clock.now().saturating_duration_since(started) < GATHER
        {
            let next = || self.items.next().map(|item| gather.push(item.as_ref())).is_none();
            match catch_unwind(AssertUnwindSafe(next)) {
                Ok(none) => ended = none,
                Err(panic) => self.panic = Some(panic),
            }
        }
        match gather.finish() {
            messages if !messages.is_empty() => Pull::Messages(messages),
            _ if ended => Pull::Ended,
            messages => match self.panic.take() {
                Some(panic) => resume_unwind(panic),
                None => Pull::Messages(messages),
            },
        }
    }

    /// Items that were not asked for stay in the iterator, which may be endless.
    fn end(&mut self, _: Duration) -> Option<Report> {
        self.closed = true;
        None
    }
}

struct Channel<T> {
    receiver: Receiver<T>,
    sequence: u64,
    /// Once closed: how many of the items it held then are left.
    left: Option<usize>,
}

impl<T: AsRef<[u8]> + Send + 'static> Source for Channel<T> {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        let mut gather = Gather::new(&mut self.sequence);
        if self.left.is_none() {
            select! {
                recv(self.receiver) -> item => match item {
                    Ok(item) => gather.push(item.as_ref()),
                    Err(_) => return Pull::Ended,
                },
                recv(stop.signal()) -> _ => return Pull::Messages(Vec::new()),
            }
        }
        let most = most.min(self.left.unwrap_or(most));
        while gather.len() < most
            && let Ok(item) = self.receiver.try_recv()
        {
            gather.push(item.as_ref());
        }
        if let Some(left) = &mut self.left {
            *left -= gather.len();
        }
        match gather.finish() {
            messages if messages.is_empty() && self.left.is_some() => Pull::Ended,
            messages => Pull::Messages(messages),
        }
    }

    /// What the channel holds by now is still processed; senders may go on.
    fn end(&mut self, _: Duration) -> Option<Report> {
        self.left = Some(self.receiver.len());
        None
    }
}

/// Makes messages of items that came from no socket.
struct Gather<'s> {
    block: BlockBuilder,
    sequence: &'s mut u64,
}

impl<'s> Gather<'s> {
    fn new(sequence: &'s mut u64) -> Self {
        Self { block: BlockBuilder::new(0, 0, Clock::real().now()), sequence }
    }

    fn push(&mut self, bytes: &[u8]) {
        *self.sequence += 1;
        let payload = std::str::from_utf8(bytes).map_or(Payload::Binary(bytes), Payload::Text);
        self.block.push(payload, *self.sequence, None);
    }

    fn len(&self) -> usize {
        self.block.len()
    }

    fn finish(self) -> Vec<Message> {
        let mut messages = Vec::new();
        self.block.finish().take_into(&mut messages);
        messages
    }
}

/// The pipeline then owns the client, and closes it as it drains.
impl IntoSource for Client {
    fn into_source(self) -> Box<dyn Source> {
        Box::new(Arc::new(self))
    }
}

/// A client, kept by its program too. A graceful end stops reading, processes
/// what was accepted, lets the answers out, and then closes it; its dedup window
/// learns what succeeded and what failed.
impl Source for Arc<Client> {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        let mut messages = Vec::new();
        if !self.wait_ready(stop.signal()) {
            return Pull::Ended;
        }
        while messages.len() < most
            && let Some(block) = self.try_recv_some(most - messages.len())
        {
            block.take_into(&mut messages);
        }
        Pull::Messages(messages)
    }

    fn stop_reading(&mut self) -> bool {
        Client::stop_reading(self);
        true
    }

    fn end(&mut self, deadline: Duration) -> Option<Report> {
        Some(Client::close(self, deadline))
    }

    fn settler(&self) -> Option<Arc<dyn Settler>> {
        let client: Arc<Client> = Arc::clone(self);
        Some(Arc::new(Settle(client)))
    }
}

struct Settle(Arc<Client>);

impl Settler for Settle {
    fn settled(&self, message: &Message, success: bool) {
        if success {
            self.0.complete(message);
        } else {
            self.0.forget(message);
        }
    }

    fn settled_together(&self, messages: &mut dyn Iterator<Item = &Message>, success: bool) {
        self.0.settled(&mut messages.filter_map(Message::id), success);
    }
}
