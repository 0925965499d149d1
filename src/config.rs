//! The settings: [`ClientBuilder`] gathers them and parses them into what each
//! thread needs, so that nothing unusable gets past `start`.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

#[cfg(not(feature = "tls"))]
use crate::error::ErrorKind;
use crate::error::{BoxError, Error, Recovery};
use crate::event::Event;
use crate::handler::{Attempt, Data, Outgoing, Request, Session};
use crate::io::dial::DialPolicy;
use crate::io::target::Target;
use crate::io::tls::TlsSource;
use crate::io::upgrade;
use crate::io::websocket::Limits;
use crate::logic::backoff::Backoff;
use crate::logic::connection::RetryPolicy;
use crate::logic::dedup;
use crate::logic::heartbeat::Heartbeat;
use crate::logic::identity::{Identity, KEY};
use crate::logic::overflow::Overflow;
use crate::logic::pointer::Pointer;
use crate::logic::restart::Intensity;
use crate::threads::connection::{Classifier, ConnectionPolicy, IdSource, Ids, SessionFactory};
use crate::threads::events::Observer;
use crate::threads::inbox::OutboxLimits;
use crate::threads::queue::QueuePolicy;
use crate::threads::shared::{Endpoint, Resolver};
use crate::threads::tell_backoff_panic;

/// Settings of a [`Client`](crate::Client), each with a default that suits a
/// market data feed or a gateway.
///
/// Made by [`Client::builder`](crate::Client::builder). Nothing is checked
/// before [`start`](ClientBuilder::start), which names the setting it refuses.
///
/// ```no_run
/// use std::time::Duration;
/// use broadsock::{Client, Dedup};
///
/// let client = Client::builder("wss://feed.example/stream")
///     .header("Authorization", "Bearer ...")
///     .dedup(Dedup::by_pointer("/id"))
///     .idle_timeout(Duration::from_secs(60))
///     .start()?;
/// for message in &client {
///     println!("{message}");
/// }
/// # Ok::<(), broadsock::Error>(())
/// ```
#[derive(Clone)]
#[must_use = "a builder does nothing before `start`"]
pub struct ClientBuilder {
    endpoints: Vec<Endpoint>,
    headers: Vec<(String, String)>,
    subprotocols: Vec<String>,
    connect_timeout: Duration,
    redirect_limit: u32,
    tls: TlsSource,
    retry: RetryPolicy,
    heartbeat: Heartbeat,
    limits: Limits,
    queue: usize,
    queue_bytes: usize,
    overflow: Overflow,
    dedup: Option<Dedup>,
    outbox: OutboxLimits,
    while_down: WhileDown,
    session: Option<SessionFactory>,
    openings: Vec<Outgoing>,
    classifier: Option<Classifier>,
    observer: Option<Observer<Event>>,
    resolver: Resolver,
    close_timeout: Duration,
    intensity: Intensity,
}

/// How a message's id is found, and how long it is remembered.
///
/// Without dedup equal messages all arrive: two equal messages on one socket
/// may both be meant. With it, a message whose id is in the window is dropped
/// and counted, across reconnects and across the connections of one client.
/// A message in which no id is found passes, and is counted in
/// [`Snapshot::without_id`](crate::Snapshot::without_id).
#[derive(Debug, Clone)]
pub struct Dedup {
    source: Source,
    capacity: usize,
    expire_after: Option<Duration>,
}

#[derive(Clone)]
enum Source {
    Content,
    Pointer(String),
    Function(crate::threads::connection::IdFunction),
    Session,
}

/// What happens to a message that is sent while there is no connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WhileDown {
    /// It waits in the outbox, in order, and leaves after the opening messages
    /// of the next connection. The default.
    #[default]
    Queue,
    /// It is handed back at once.
    Reject,
    /// The caller waits for the connection ([`try_send`](crate::Sender::try_send)
    /// hands it back at once).
    Wait,
}

/// What a client starts with: every setting checked.
pub(crate) struct Config {
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) policy: ConnectionPolicy,
    pub(crate) queue: QueuePolicy,
    pub(crate) dedup: Option<dedup::Dedup>,
    pub(crate) outbox: OutboxLimits,
    pub(crate) while_down: WhileDown,
    pub(crate) observer: Option<Observer<Event>>,
    pub(crate) intensity: Intensity,
}

impl ClientBuilder {
    /// Defaults, and no endpoint yet.
    pub(crate) fn new() -> Self {
        Self {
            endpoints: Vec::new(),
            headers: Vec::new(),
            subprotocols: Vec::new(),
            connect_timeout: Duration::from_secs(10),
            redirect_limit: 3,
            tls: TlsSource::default(),
            retry: RetryPolicy {
                backoff: Backoff::default(),
                stable_after: Duration::from_secs(10),
                retry_after_max: Duration::from_secs(300),
                max_attempts: None,
                max_reconnect_attempts: None,
            },
            heartbeat: Heartbeat::default(),
            limits: Limits { read_buffer: 256 * 1024, max_message: 64 << 20 },
            queue: 16_384,
            queue_bytes: 64 << 20,
            overflow: Overflow::default(),
            dedup: None,
            outbox: OutboxLimits { messages: 1024, bytes: 64 << 20 },
            while_down: WhileDown::default(),
            session: None,
            openings: Vec::new(),
            classifier: None,
            observer: None,
            resolver: Arc::new(system_resolver),
            close_timeout: Duration::from_secs(5),
            intensity: Intensity::default(),
        }
    }

    /// Adds a connection: one more endpoint that feeds the same queue, on a
    /// thread of its own. Connections are numbered from 0 in this order.
    pub fn endpoint(mut self, request: impl Into<Request>) -> Self {
        self.endpoints.push(Endpoint::Fixed(request.into()));
        self
    }

    /// Adds a connection whose request is asked for before each attempt: for
    /// fresh tokens, or the next of several servers. An error or a panic of the
    /// hook is a failed attempt, with back-off. Headers and subprotocols of this
    /// builder are not added to it.
    pub fn request_hook(
        mut self,
        hook: impl Fn(&Attempt) -> Result<Request, BoxError> + Send + Sync + 'static,
    ) -> Self {
        self.endpoints.push(Endpoint::Hook(Arc::new(hook)));
        self
    }

    /// Adds a header to the upgrade request of every endpoint. Values are never
    /// logged, and never sent to another origin after a redirect.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Offers a subprotocol at every endpoint; the server must agree on one of
    /// those offered.
    pub fn subprotocol(mut self, name: impl Into<String>) -> Self {
        self.subprotocols.push(name.into());
        self
    }

    /// The one deadline over DNS, TCP, TLS, the HTTP upgrade, redirects and the
    /// session's opening. Defaults to 10 s.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// How many redirects of one attempt are followed. Never from `wss` to
    /// `ws`; to another origin without this builder's headers. Defaults to 3;
    /// 0 follows none.
    pub fn redirect_limit(mut self, limit: u32) -> Self {
        self.redirect_limit = limit;
        self
    }

    /// Trusts one more root certificate, as PEM or DER, besides the system's.
    /// Ignored after [`tls_connector`](ClientBuilder::tls_connector).
    #[cfg(feature = "tls")]
    pub fn root_certificate(mut self, certificate: impl Into<Vec<u8>>) -> Self {
        self.tls.roots.push(certificate.into());
        self
    }

    /// Uses this connector for `wss://`. Defaults to the platform's TLS with
    /// the system's roots.
    #[cfg(feature = "tls")]
    pub fn tls_connector(mut self, connector: native_tls::TlsConnector) -> Self {
        self.tls = TlsSource::given(connector);
        self
    }

    /// The delay before each retry. Defaults to exponential with equal jitter,
    /// 500 ms doubling to 30 s.
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.retry.backoff = backoff;
        self
    }

    /// How long a connection must stand for its loss to start the back-off
    /// over. Defaults to 10 s. A session can vouch for it earlier
    /// ([`Link::mark_healthy`](crate::Link::mark_healthy)).
    pub fn stable_after(mut self, time: Duration) -> Self {
        self.retry.stable_after = time;
        self
    }

    /// The longest wait that a server can ask for by `Retry-After`; up to 10 %
    /// are added to what it asks, so that its clients spread. Defaults to 5
    /// minutes.
    pub fn retry_after_max(mut self, time: Duration) -> Self {
        self.retry.retry_after_max = time;
        self
    }

    /// Failed attempts in a row, before there ever was a connection, after
    /// which the client fails. Defaults to no limit.
    pub fn max_attempts(mut self, attempts: impl Into<Option<u32>>) -> Self {
        self.retry.max_attempts = attempts.into();
        self
    }

    /// Failed attempts in a row, after there was a connection, after which the
    /// client fails; a connection that was lost before `stable_after` counts as
    /// failed. Defaults to no limit.
    pub fn max_reconnect_attempts(mut self, attempts: impl Into<Option<u32>>) -> Self {
        self.retry.max_reconnect_attempts = attempts.into();
        self
    }

    /// A ping goes out when nothing arrived for this long. Defaults to 20 s;
    /// `None` sends none, and a dead peer may then go unnoticed.
    pub fn ping_interval(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.heartbeat.ping_interval = interval.into();
        self
    }

    /// The peer counts as gone when no byte arrives for this long after a ping.
    /// Defaults to 20 s.
    pub fn pong_timeout(mut self, timeout: Duration) -> Self {
        self.heartbeat.pong_timeout = timeout;
        self
    }

    /// The connection is made anew when no data message arrives for this long;
    /// pings and pongs do not count. Defaults to off.
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.heartbeat.idle_timeout = timeout.into();
        self
    }

    /// The connection is made anew when the server accepts no byte of what
    /// waits to be sent for this long. Defaults to 30 s.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.heartbeat.write_timeout = timeout;
        self
    }

    /// The largest message in either direction, in bytes. A larger one from the
    /// server is an unrecoverable error, found before memory is taken for it. So
    /// is a fragment of more than 1 GiB, whatever the limit. Defaults to 64 MiB.
    pub fn max_message_size(mut self, bytes: usize) -> Self {
        self.limits.max_message = bytes;
        self
    }

    /// The largest size of each connection's read buffer in bytes: the most that
    /// one system call can bring. It starts with 1 KiB, grows with its feed, and
    /// shrinks when nothing comes for `ping_interval`. Defaults to 256 KiB.
    pub fn read_buffer_size(mut self, bytes: usize) -> Self {
        self.limits.read_buffer = bytes;
        self
    }

    /// How many messages the queue to the consumers holds. Defaults to 16,384.
    pub fn queue(mut self, messages: usize) -> Self {
        self.queue = messages;
        self
    }

    /// How many payload bytes the queue holds; a single block of messages may
    /// exceed it. The memory behind a block is mostly that of its payload, and up to
    /// four times as much where half of it was duplicates; small blocks, up to
    /// sixteen for each connection, have a read buffer each. Defaults to 64 MiB.
    pub fn queue_bytes(mut self, bytes: usize) -> Self {
        self.queue_bytes = bytes;
        self
    }

    /// What gives way when the queue is full. Defaults to
    /// [`Overflow::Block`].
    pub fn overflow(mut self, policy: Overflow) -> Self {
        self.overflow = policy;
        self
    }

    /// Drops messages that were seen before. Defaults to off.
    pub fn dedup(mut self, dedup: Dedup) -> Self {
        self.dedup = Some(dedup);
        self
    }

    /// How many outgoing messages may wait in each connection's outbox.
    /// Defaults to 1,024.
    pub fn outbox(mut self, messages: usize) -> Self {
        self.outbox.messages = messages;
        self
    }

    /// How many payload bytes may wait in each connection's outbox; a message
    /// alone may exceed it. Defaults to 64 MiB.
    pub fn outbox_bytes(mut self, bytes: usize) -> Self {
        self.outbox.bytes = bytes;
        self
    }

    /// What happens to messages sent while there is no connection. Defaults to
    /// [`WhileDown::Queue`].
    pub fn while_down(mut self, policy: WhileDown) -> Self {
        self.while_down = policy;
        self
    }

    /// Sends this message first on every new socket, before what the session
    /// sends and before the outbox: a subscription, for example. May be called
    /// several times; they leave in that order.
    pub fn opening_message(mut self, message: impl Into<Outgoing>) -> Self {
        self.openings.push(message.into());
        self
    }

    /// Makes the session of each epoch. Defaults to one that passes every
    /// message on.
    pub fn session<S: Session + 'static>(
        mut self,
        factory: impl Fn() -> S + Send + Sync + 'static,
    ) -> Self {
        self.session = Some(Arc::new(move || Box::new(factory())));
        self
    }

    /// Overrides the class of errors: sees each error with its default class.
    /// After a panic the default stands.
    pub fn classify(
        mut self,
        classifier: impl Fn(&Error, Recovery) -> Recovery + Send + Sync + 'static,
    ) -> Self {
        self.classifier = Some(Arc::new(classifier));
        self
    }

    /// Hears of every event, on the thread it happens on: it must not block.
    /// Panics are contained.
    pub fn observer(mut self, observer: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Looks up host names, on a thread of its own. Defaults to the system's
    /// resolver.
    pub fn resolver(
        mut self,
        resolver: impl Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Self {
        self.resolver = Arc::new(resolver);
        self
    }

    /// The longest wait for the server's part of a close handshake, within the
    /// deadline of [`Client::close`](crate::Client::close). Defaults to 5 s.
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.close_timeout = timeout;
        self
    }

    /// How often supervision restarts one connection before the client fails.
    /// Defaults to 3 restarts in 5 s. Restarts in no time at all are refused at the
    /// start.
    pub fn restart_intensity(mut self, intensity: Intensity) -> Self {
        self.intensity = intensity;
        self
    }

    /// Checks every setting.
    pub(crate) fn parse(self) -> Result<Config, Error> {
        self.check_numbers()?;
        #[cfg(feature = "tls")]
        if !self.tls.roots.is_empty() {
            // A hook or a redirect may lead to wss:// later.
            self.check_tls()?;
        }
        self.retry.backoff.check("backoff")?;
        self.heartbeat.check()?;
        self.intensity.check()?;
        let endpoints = self.parse_endpoints()?;
        let (dedup, source) = match self.dedup {
            None => (None, IdSource::Off),
            Some(dedup) => {
                dedup::check(dedup.capacity, dedup.expire_after)?;
                let source = dedup.source.parse()?;
                (Some(dedup::Dedup::new(dedup.capacity, dedup.expire_after)), source)
            }
        };
        let queue =
            QueuePolicy { messages: self.queue, bytes: self.queue_bytes, overflow: self.overflow };
        let policy = ConnectionPolicy {
            dial: DialPolicy {
                connect_timeout: self.connect_timeout,
                redirect_limit: self.redirect_limit,
                tls: self.tls,
            },
            limits: self.limits,
            retry: RetryPolicy {
                backoff: self.retry.backoff.reporting(tell_backoff_panic),
                ..self.retry
            },
            heartbeat: self.heartbeat,
            ids: Ids { source, identity: identity() },
            block_messages: queue.block_messages(),
            session: self.session,
            openings: self.openings.into(),
            classifier: self.classifier,
            resolver: self.resolver,
            close_timeout: self.close_timeout,
        };
        Ok(Config {
            endpoints,
            policy,
            queue,
            dedup,
            outbox: self.outbox,
            while_down: self.while_down,
            observer: self.observer,
            intensity: self.intensity,
        })
    }

    fn check_numbers(&self) -> Result<(), Error> {
        let zero = "must be more than zero";
        for (name, time) in [
            ("connect_timeout", self.connect_timeout),
            ("close_timeout", self.close_timeout),
            ("retry_after_max", self.retry.retry_after_max),
        ] {
            if time.is_zero() {
                return Err(Error::setting(name, zero));
            }
        }
        for (name, number, least) in [
            ("max_message_size", self.limits.max_message, 1),
            ("read_buffer_size", self.limits.read_buffer, 1024),
            ("queue", self.queue, 1),
            ("queue_bytes", self.queue_bytes, 1),
            ("outbox", self.outbox.messages, 1),
            ("outbox_bytes", self.outbox.bytes, 1),
        ] {
            if number < least {
                return Err(Error::setting(name, format!("must be at least {least}")));
            }
        }
        if self.limits.read_buffer > 1 << 30 {
            // Taken at once, for each socket.
            return Err(Error::setting("read_buffer_size", "must be at most 1 GiB"));
        }
        if self.openings.iter().any(|message| message.len() > self.limits.max_message) {
            return Err(Error::setting("opening_message", "it is larger than max_message_size"));
        }
        if self.queue > 1 << 24 {
            // A slot is taken in memory for each.
            return Err(Error::setting("queue", "must be at most 16,777,216 messages"));
        }
        for (name, limit) in [
            ("max_attempts", self.retry.max_attempts),
            ("max_reconnect_attempts", self.retry.max_reconnect_attempts),
        ] {
            if limit == Some(0) {
                return Err(Error::setting(name, "must be at least 1; `None` is no limit"));
            }
        }
        Ok(())
    }

    fn parse_endpoints(&self) -> Result<Vec<Endpoint>, Error> {
        if self.endpoints.is_empty() {
            return Err(Error::setting("endpoint", "there is none to connect to"));
        }
        self.endpoints.iter().map(|endpoint| self.parse_endpoint(endpoint)).collect()
    }

    fn parse_endpoint(&self, endpoint: &Endpoint) -> Result<Endpoint, Error> {
        let mut request = match endpoint {
            Endpoint::Fixed(request) => request.clone(),
            Endpoint::Hook(_) => return Ok(endpoint.clone()),
        };
        request.headers.extend(self.headers.iter().cloned());
        request.subprotocols.extend(self.subprotocols.iter().cloned());
        upgrade::check(&request)?;
        if Target::parse(&request.url)?.secure {
            self.check_tls()?;
        }
        Ok(Endpoint::Fixed(request))
    }

    #[cfg(feature = "tls")]
    fn check_tls(&self) -> Result<(), Error> {
        self.tls.get().map(|_| ())
    }

    #[cfg(not(feature = "tls"))]
    fn check_tls(&self) -> Result<(), Error> {
        Err(Error::new(ErrorKind::Url, "wss:// needs the cargo feature `tls`"))
    }
}

impl Dedup {
    /// The whole message is its id.
    #[must_use]
    pub fn by_content() -> Self {
        Self::new(Source::Content)
    }

    /// The id is the value at this JSON pointer (RFC 6901) of a JSON text, such
    /// as `/id` or `/data/0/seq`; a string `"1"` and a number `1` differ. It is
    /// found fastest near the start of texts that are alike up to it.
    #[must_use]
    pub fn by_pointer(pointer: impl Into<String>) -> Self {
        Self::new(Source::Pointer(pointer.into()))
    }

    /// The id is what this function finds; `None`: the message has none. A
    /// panic counts as none, and is reported.
    #[must_use]
    pub fn by<I: AsRef<[u8]>>(
        find: impl Fn(Data<'_>) -> Option<I> + Send + Sync + 'static,
    ) -> Self {
        Self::new(Source::Function(Arc::new(move |data, raw| match find(data) {
            Some(id) => {
                raw.extend_from_slice(id.as_ref());
                true
            }
            None => false,
        })))
    }

    /// The id is what the session gives
    /// [`Link::emit_with_id`](crate::Link::emit_with_id).
    #[must_use]
    pub fn by_session() -> Self {
        Self::new(Source::Session)
    }

    /// How many further ids are accepted before one is forgotten. Defaults to
    /// 100,000. It should exceed what a server repeats after a reconnect.
    ///
    /// Memory is taken as ids come. Each time it grows, all ids move at once, and
    /// who receives meanwhile waits, and so does who closes: some milliseconds for a
    /// window of 100,000, half a second or so for one of 10 million, some seconds for
    /// one of 50 million.
    #[must_use]
    pub fn capacity(mut self, ids: usize) -> Self {
        self.capacity = ids;
        self
    }

    /// After which time an id is forgotten. Defaults to never: only the
    /// capacity bounds the window, so no outage is too long for it.
    ///
    /// A time that is shorter than messages wait for their outcome bounds the
    /// promise, too: a copy may be accepted while the first still waits, and a
    /// failure or a drop of the first makes the window forget both.
    #[must_use]
    pub fn expire_after(mut self, time: Duration) -> Self {
        self.expire_after = Some(time);
        self
    }

    fn new(source: Source) -> Self {
        Self { source, capacity: 100_000, expire_after: None }
    }
}

impl Source {
    fn parse(self) -> Result<IdSource, Error> {
        Ok(match self {
            Source::Content => IdSource::Content,
            Source::Pointer(pointer) => IdSource::Pointer(Pointer::parse(&pointer)?),
            Source::Function(find) => IdSource::Function(find),
            Source::Session => IdSource::Session,
        })
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Content => f.write_str("Content"),
            Source::Pointer(pointer) => write!(f, "Pointer({pointer:?})"),
            Source::Function(_) => f.write_str("Function"),
            Source::Session => f.write_str("Session"),
        }
    }
}

impl fmt::Debug for ClientBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("endpoints", &self.endpoints)
            .field("connect_timeout", &self.connect_timeout)
            .field("retry", &self.retry)
            .field("heartbeat", &self.heartbeat)
            .field("queue", &self.queue)
            .field("overflow", &self.overflow)
            .field("dedup", &self.dedup)
            .finish_non_exhaustive()
    }
}

/// Identities under a key of this process: a peer that could craft two messages
/// of one identity could make one of them vanish.
fn identity() -> Identity {
    static KEY_OF_PROCESS: OnceLock<[u8; KEY]> = OnceLock::new();
    Identity::new(*KEY_OF_PROCESS.get_or_init(|| {
        let mut key = [0; KEY];
        rand::fill(&mut key);
        key
    }))
}

fn system_resolver(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}
