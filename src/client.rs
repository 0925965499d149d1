//! [`Client`]: what a program holds.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvError, RecvTimeoutError, TryRecvError, bounded};

use crate::config::{ClientBuilder, Config, WhileDown};
use crate::error::{Error, ErrorKind};
use crate::event::{Event, State};
use crate::handler::Request;
use crate::io::clock::Clock;
use crate::logic::dedup::Processing;
use crate::message::{Block, Message, MessageId};
use crate::metrics::{ConnectionMetrics, Counter, Report, Snapshot};
use crate::sender::Sender;
use crate::threads::Spawner;
use crate::threads::events::Hub;
use crate::threads::held::Estate;
use crate::threads::inbox::Inbox;
use crate::threads::monitor::{Monitor, MonitorAlarm, NOTICES};
use crate::threads::queue::{NoMessage, Queue};
use crate::threads::shared::{Peer, Shared, States};
use crate::threads::timer::Timer;

/// How long a client that is dropped without `close` may take to end.
const DROP_DEADLINE: Duration = Duration::from_secs(1);

/// How much earlier than a close the monitor ends, at most: it may be kept from
/// running for a while on a busy machine.
const VERDICT_MARGIN: Duration = Duration::from_millis(100);

/// Connects to `url` with default settings and keeps the connection alive.
///
/// ```no_run
/// for message in &broadsock::connect("wss://feed.example/stream")? {
///     println!("{message}");
/// }
/// # Ok::<(), broadsock::Error>(())
/// ```
///
/// # Errors
///
/// The URL is malformed, or a thread could not be started. Everything else is
/// tried again; see [`Client::events`] and [`Client::wait_connected`].
pub fn connect(url: impl Into<Request>) -> Result<Client, Error> {
    Client::builder(url).start()
}

/// One or more connections that are kept alive, and the queue they feed.
///
/// Iterate over `&client` for a blocking iterator of messages, or take them by
/// [`recv`](Client::recv), [`try_recv`](Client::try_recv) and
/// [`recv_timeout`](Client::recv_timeout), from as many threads as you like:
/// each message goes to one of them. The iterator ends when the client was
/// closed or has failed and the queue is empty; [`error`](Client::error) tells
/// which.
///
/// Dropping a client closes it, within a second.
pub struct Client {
    shared: Arc<Shared>,
    while_down: WhileDown,
    monitor: Mutex<Option<JoinHandle<()>>>,
    /// Disconnected when the monitor has ended, and with it every other thread.
    ended: Receiver<()>,
}

impl Client {
    /// Settings for a client whose first connection is to `request`: a URL, or
    /// a [`Request`] with headers of its own.
    pub fn builder(request: impl Into<Request>) -> ClientBuilder {
        ClientBuilder::new().endpoint(request)
    }

    /// Settings for a client without an endpoint yet: for
    /// [`request_hook`](ClientBuilder::request_hook).
    pub fn unconnected() -> ClientBuilder {
        ClientBuilder::new()
    }

    /// The next message; waits for it.
    ///
    /// # Errors
    ///
    /// The client was closed or has failed, and the queue is empty.
    pub fn recv(&self) -> Result<Message, RecvError> {
        self.shared.queue.recv(None).map_err(|_| RecvError)
    }

    /// The next message, if there is one already.
    ///
    /// # Errors
    ///
    /// There is none yet (`Empty`), or there will be none (`Disconnected`).
    pub fn try_recv(&self) -> Result<Message, TryRecvError> {
        self.shared.queue.try_recv().map_err(|error| match error {
            NoMessage::Timeout => TryRecvError::Empty,
            NoMessage::Ended => TryRecvError::Disconnected,
        })
    }

    /// The next message; waits for it no longer than `timeout`.
    ///
    /// # Errors
    ///
    /// None came in time (`Timeout`), or there will be none (`Disconnected`).
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Message, RecvTimeoutError> {
        let until = self.shared.clock.now().checked_add(timeout);
        self.shared.queue.recv(until).map_err(|error| match error {
            NoMessage::Timeout => RecvTimeoutError::Timeout,
            NoMessage::Ended => RecvTimeoutError::Disconnected,
        })
    }

    /// Waits until there may be a message, or `stop` disconnects; `false` when
    /// there will be none.
    pub(crate) fn wait_ready(&self, stop: &Receiver<()>) -> bool {
        self.shared.queue.wait_ready(stop)
    }

    /// The next messages if there are any, up to `most`.
    pub(crate) fn try_recv_some(&self, most: usize) -> Option<Block> {
        self.shared.queue.try_recv_some(most).ok()
    }

    /// These messages succeeded, or failed for good.
    pub(crate) fn settled(&self, ids: &mut dyn Iterator<Item = MessageId>, success: bool) {
        self.shared.queue.settled(ids, success);
    }

    /// A blocking iterator over the messages.
    #[must_use]
    pub fn iter(&self) -> Messages<'_> {
        Messages { client: self, taken: None, most: 1, count: 0, since: self.shared.clock.now() }
    }

    /// The channel behind the queue, to put into `crossbeam_channel::select!`.
    /// It yields blocks: iterate over each. Do not mix it with `recv`, which
    /// may hold the rest of a block it has opened.
    #[must_use]
    pub fn receiver(&self) -> &Receiver<Block> {
        self.shared.queue.receiver()
    }

    /// Sends on the first connection.
    #[must_use]
    pub fn sender(&self) -> Sender {
        Sender::new(Arc::clone(&self.shared), 0, self.while_down)
    }

    /// Sends on the connection of this number; `None` if there is none such.
    #[must_use]
    pub fn sender_for(&self, connection: usize) -> Option<Sender> {
        let known = connection < self.shared.connections.len();
        known.then(|| Sender::new(Arc::clone(&self.shared), connection, self.while_down))
    }

    /// The state of the connection that is best off: `Connected` if any is.
    #[must_use]
    pub fn state(&self) -> State {
        let rank = |state: &State| match state {
            State::Connected => 7,
            State::Opening => 6,
            State::Connecting => 5,
            State::Reconnecting => 4,
            State::Disconnected => 3,
            State::Closing => 2,
            State::Failed => 1,
            State::Closed => 0,
        };
        self.shared.states.all().into_iter().max_by_key(rank).unwrap_or(State::Closed)
    }

    /// Each connection's state, in the order of the endpoints.
    #[must_use]
    pub fn states(&self) -> Vec<State> {
        self.shared.states.all()
    }

    /// Waits until at least one connection stands.
    ///
    /// # Errors
    ///
    /// The client has failed (its cause), was closed (`Shutdown`), or none
    /// stood within `timeout` (`NotConnected`, with the last error as cause).
    pub fn wait_connected(&self, timeout: Duration) -> Result<(), Error> {
        let until = self.shared.clock.now().checked_add(timeout);
        let ended = || self.error().is_some();
        self.shared.states.wait(self.shared.clock, until, |states| {
            states.contains(&State::Connected)
                || states.iter().all(|state| *state == State::Closed)
                || ended()
        });
        match self.state() {
            State::Connected => Ok(()),
            _ if ended() => Err(self.error().unwrap_or_else(shut_down)),
            _ if self.shared.states.ended() => Err(shut_down()),
            State::Closed | State::Closing => Err(shut_down()),
            _ => Err(self.not_connected(timeout)),
        }
    }

    fn not_connected(&self, timeout: Duration) -> Error {
        let phrase = format!("not connected within {timeout:?}");
        let mut errors =
            self.shared.connections.iter().filter_map(|peer| peer.metrics.last_error());
        match errors.next() {
            Some(cause) => Error::caused(ErrorKind::NotConnected, phrase, cause),
            None => Error::new(ErrorKind::NotConnected, phrase),
        }
    }

    /// A channel of events: first the latest (up to 256), then all that follow.
    /// It holds 1,024; what a slow reader has no room for is counted in
    /// [`Snapshot::events_lost`]. It ends when the client has ended.
    #[must_use]
    pub fn events(&self) -> Receiver<Event> {
        self.shared.hub.subscribe()
    }

    /// All counters, at this instant.
    #[must_use]
    pub fn metrics(&self) -> Snapshot {
        self.shared.snapshot()
    }

    /// Why the client failed; `None` while it has not.
    #[must_use]
    pub fn error(&self) -> Option<Error> {
        self.shared.ending().error.clone()
    }

    /// Says that a message was processed: a redelivery stays a duplicate, also
    /// after it was in flight for long. Without dedup it does nothing.
    pub fn complete(&self, message: &Message) {
        if let Some(id) = message.id() {
            self.shared.queue.done(id);
        }
    }

    /// Says that processing a message failed: the window forgets it, so a
    /// redelivery is accepted. Returns whether it was in the window.
    pub fn forget(&self, message: &Message) -> bool {
        message.id().is_some_and(|id| self.shared.queue.forget(id))
    }

    /// How far a message got, as far as the dedup window remembers it.
    #[must_use]
    pub fn processing(&self, id: MessageId) -> Option<Processing> {
        self.shared.queue.processing(id, self.shared.clock.now())
    }

    /// Closes every connection with a close handshake, after what is in the
    /// outboxes was sent, and joins all threads; returns by `deadline`, from
    /// every state, and names the threads that hang.
    ///
    /// Messages that were accepted stay readable. A second call is harmless. On
    /// one of the client's own threads (in a hook) it begins the close and
    /// returns at once.
    pub fn close(&self, deadline: Duration) -> Report {
        let at = self.shared.clock.after(deadline);
        self.shared.connections.iter().for_each(|peer| peer.inbox.refuse());
        // The monitor ends a little earlier, so that its verdict is in the report.
        self.shared.ask_to_close(at - (deadline / 10).min(VERDICT_MARGIN));
        let own = self.shared.spawner.is_own_thread();
        if !own {
            match self.ended.recv_deadline(at) {
                Err(RecvTimeoutError::Disconnected) => self.join(),
                // Even the monitor hangs, in an observer: nobody shall wait for it.
                _ => self.shared.end(),
            }
        }
        self.report(own)
    }

    /// Reads no more, and keeps the connections open to send on, until
    /// [`close`](Client::close).
    pub(crate) fn stop_reading(&self) {
        let stop = |peer: &Peer| peer.inbox.post(|signals| signals.stop_reading = true);
        self.shared.connections.iter().for_each(stop);
    }

    fn join(&self) {
        let handle = self.monitor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle
            && handle.join().is_err()
        {
            log::error!("the monitor thread panicked: please report");
        }
    }

    fn report(&self, own: bool) -> Report {
        let metrics = self.metrics();
        let ended = self.ended.try_recv() == Err(TryRecvError::Disconnected);
        let ending = self.shared.ending();
        let mut stuck = ending.stuck.clone();
        if !ended && !own {
            // Without the monitor's verdict: whoever has not let go of its inbox.
            let peers = self.shared.connections.iter().enumerate();
            let running = peers.filter(|(_, peer)| peer.inbox.is_attached());
            stuck = running.map(|(index, _)| format!("broadsock-conn-{index}")).collect();
            stuck.push("broadsock-monitor".to_owned());
        }
        Report { metrics, error: ending.error.clone(), stuck, unsent: ending.unsent.clone() }
    }
}

impl ClientBuilder {
    /// Checks the settings and starts the client's threads. Connecting goes on
    /// in the background; see [`Client::wait_connected`].
    ///
    /// # Errors
    ///
    /// A setting or URL is unusable (the error names it), or a thread could not
    /// be started.
    pub fn start(self) -> Result<Client, Error> {
        let config = self.parse()?;
        let while_down = config.while_down;
        let intensity = config.intensity;
        let (notices, inbox) = bounded(NOTICES);
        let shared = Arc::new(share(config, Spawner::new(notices)));
        let (guard, ended) = bounded(0);
        let (tell, started) = bounded(1);
        let end = EndGuard { shared: Arc::clone(&shared), _ended: guard };
        // The monitor starts all others: whichever thread cannot be started,
        // somebody is there to end and join those before it.
        let handle = shared.spawner.spawn("broadsock-monitor", usize::MAX, move || {
            let monitor = Monitor::start(Arc::clone(&end.shared), inbox, intensity);
            let (monitor, result) = match monitor {
                Ok(monitor) => (Some(monitor), Ok(())),
                Err(error) => (None, Err(error)),
            };
            let _ = tell.send(result);
            if let Some(monitor) = monitor {
                monitor.run();
            }
        })?;
        let client = Client { shared, while_down, monitor: Mutex::new(Some(handle)), ended };
        // Dropping the client on an error joins the monitor.
        started.recv().unwrap_or_else(|_| Err(shut_down())).map(|()| client)
    }
}

fn share(config: Config, spawner: Spawner) -> Shared {
    let inboxes: Vec<Arc<Inbox>> =
        config.endpoints.iter().map(|_| Arc::new(Inbox::new(config.outbox))).collect();
    let monitor = MonitorAlarm(spawner.monitor.clone());
    let queue = Queue::new(config.queue, config.dedup, inboxes.clone(), monitor);
    let peers = config.endpoints.into_iter().zip(inboxes);
    let connections: Vec<Peer> = peers
        .map(|(endpoint, inbox)| Peer {
            endpoint,
            inbox,
            metrics: ConnectionMetrics::default(),
            estate: Estate::default(),
        })
        .collect();
    Shared {
        clock: Clock::real(),
        policy: config.policy,
        queue,
        hub: Hub::new(config.observer),
        timer: Timer::new(),
        spawner,
        states: States::new(connections.len()),
        connections,
        restarts: Counter::default(),
        ending: Mutex::default(),
        close_by: Mutex::default(),
    }
}

/// Ends what others wait for when the monitor ends, also by a panic.
struct EndGuard {
    shared: Arc<Shared>,
    _ended: crossbeam_channel::Sender<()>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close(DROP_DEADLINE);
        let unread = self.shared.queue.abandon();
        if unread > 0 {
            log::warn!("client dropped with {unread} messages unread");
        }
        self.shared.abandon_unsent();
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("states", &self.states()).finish_non_exhaustive()
    }
}

/// The messages of a [`Client`], each waited for. Ends when the client was
/// closed or has failed, after the queue is empty.
///
/// An iterator whose messages are used quickly takes several at a time; one
/// whose messages take long takes one by one, and leaves the others to other
/// threads. Dropped, it leaves what it has not yielded to the next consumer.
#[derive(Debug)]
pub struct Messages<'c> {
    client: &'c Client,
    taken: Option<Block>,
    /// How many were asked for and taken last, and when.
    most: usize,
    count: u32,
    since: Instant,
}

/// An iterator that needs less than this for a message takes more at a time.
const QUICK: Duration = Duration::from_micros(10);

/// The most messages that an iterator takes at a time.
const MOST: usize = 1024;

impl Messages<'_> {
    fn refill(&mut self) -> Option<()> {
        let shared = &self.client.shared;
        let quick = shared.clock.now().saturating_duration_since(self.since) < QUICK * self.count;
        self.most = if quick { (self.most * 2).min(MOST) } else { 1 };
        self.taken = None;
        let block = shared.queue.recv_some(self.most).ok()?;
        self.count = u32::try_from(block.len()).unwrap_or(u32::MAX);
        self.since = shared.clock.now();
        self.taken = Some(block);
        Some(())
    }
}

impl Iterator for Messages<'_> {
    type Item = Message;

    fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = self.taken.as_mut().and_then(Block::next) {
                return Some(message);
            }
            self.refill()?;
        }
    }
}

impl Drop for Messages<'_> {
    fn drop(&mut self) {
        if let Some(block) = self.taken.take() {
            self.client.shared.queue.give_back(block);
        }
    }
}

impl<'c> IntoIterator for &'c Client {
    type Item = Message;
    type IntoIter = Messages<'c>;

    fn into_iter(self) -> Messages<'c> {
        self.iter()
    }
}

fn shut_down() -> Error {
    Error::new(ErrorKind::Shutdown, "the client is closed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{BlockBuilder, Payload};
    use crate::threads::connection::Connection;
    use crate::threads::held::{Held, Left};
    use crate::threads::queue::Offer;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn room_that_came_before_a_thread_ran_was_not_used_until_its_look_up_ended() {
        let (lookup_ends, ends) = bounded::<()>(1);
        let builder = Client::builder("ws://example.invalid/").queue(1).resolver(move |_, _| {
            let _ = ends.recv_timeout(2 * LONG);
            Err(std::io::Error::other("no such host"))
        });
        let (notices, _monitor) = bounded(NOTICES);
        let shared = Arc::new(share(builder.parse().unwrap(), Spawner::new(notices)));
        let now = shared.clock.now();
        let mut held = Held::default();
        for n in 1..=2 {
            let mut block = BlockBuilder::new(0, 1, now);
            block.push(Payload::Text("x"), n, None);
            if let Offer::Held(block) = shared.queue.offer(block, 0, false, now) {
                held.push(block);
            }
        }
        assert!(!held.is_empty());
        shared.connections[0].estate.leave(Left { held, ..Left::default() }).unwrap();
        // It listens, room comes, and only then its thread runs.
        let connection = Connection::new(Arc::clone(&shared), 0).unwrap();
        shared.queue.try_recv().unwrap();
        let body = move || connection.run();
        let thread = shared.spawner.spawn("broadsock-conn-0", 0, body).unwrap();
        let second = shared.queue.recv(Some(shared.clock.now() + LONG));
        assert_eq!(second.unwrap().metadata().sequence, 2);
        let end = Some(shared.clock.now());
        shared.connections[0].inbox.post(|signals| signals.close = end);
        lookup_ends.send(()).unwrap();
        thread.join().unwrap();
    }
}
