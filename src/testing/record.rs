//! What a server saw: counters, upgrade requests and the frames of clients,
//! kept under one lock whose every change wakes those who wait for it.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tungstenite::handshake::derive_accept_key;

/// Counters of a [`Server`](super::Server), over its whole life: stopping and
/// restarting it does not reset them.
///
/// ```
/// # use broadsock::testing::Server;
/// let server = Server::echo()?;
/// assert_eq!(server.stats().accepted, 0);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// TCP connections accepted.
    pub accepted: u64,
    /// Connections that were answered with a 101.
    pub upgraded: u64,
    /// Connections now open: accepted, and neither side has left yet.
    pub live: usize,
    /// The most that were ever open at the same time: before a new connection
    /// is counted, those that their clients have already closed are taken off.
    /// Exact, unless the system lets the end of one connection arrive more than
    /// a millisecond after the beginning of the next.
    pub max_live: usize,
    /// Messages and control frames that arrived, kept in
    /// [`Record::received`] or not.
    pub received: u64,
}

/// One HTTP request that asked for an upgrade, answered with one or not.
///
/// ```
/// # use broadsock::testing::Server;
/// let server = Server::echo()?;
/// let _ws = tungstenite::connect(server.url())?;
/// let request = &server.requests()[0];
/// assert_eq!(request.path, "/");
/// assert_eq!(request.header("UPGRADE"), Some("websocket"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Request {
    /// Which connection it came on: 0 for the first one accepted.
    pub connection: usize,
    /// Path and query.
    pub path: String,
    /// Names and values in the order in which they were sent.
    pub headers: Vec<(String, String)>,
}

impl Request {
    /// The value of the first header of that name, in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// The `Sec-WebSocket-Accept` that answers this request, if it has a key
    /// (RFC 6455, section 4.2.2).
    pub fn accept_key(&self) -> Option<String> {
        self.header("Sec-WebSocket-Key").map(|key| derive_accept_key(key.as_bytes()))
    }

    pub(super) fn parse(connection: usize, head: &[u8]) -> Option<Request> {
        let mut headers = [httparse::EMPTY_HEADER; 256];
        let mut request = httparse::Request::new(&mut headers);
        request.parse(head).ok()?;
        let headers = request.headers.iter();
        Some(Request {
            connection,
            path: request.path?.to_owned(),
            headers: headers
                .map(|h| (h.name.to_owned(), String::from_utf8_lossy(h.value).into_owned()))
                .collect(),
        })
    }
}

/// What a client sent: a whole message, or a control frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// A text message, its fragments put together.
    Text(String),
    /// A binary message, its fragments put together.
    Binary(Vec<u8>),
    /// A ping.
    Ping(Vec<u8>),
    /// A pong, asked for or not.
    Pong(Vec<u8>),
    /// A close frame: its code (1005 when it carried none) and its reason.
    Close(u16, String),
}

/// One message or control frame, and the connection it came on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Received {
    /// 0 for the first connection accepted.
    pub connection: usize,
    /// What was sent.
    pub payload: Payload,
}

/// Everything a server saw; [`Server::wait_for`](super::Server::wait_for)
/// shows it to a condition at each change.
///
/// ```
/// # use broadsock::testing::{Record, Server};
/// # use std::time::Duration;
/// let server = Server::echo()?;
/// let (mut ws, _) = tungstenite::connect(server.url())?;
/// ws.send("hello".into())?;
/// let arrived = |record: &Record| record.texts().any(|text| text == "hello");
/// assert!(server.wait_for(arrived, Duration::from_secs(5)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Record {
    /// The counters.
    pub stats: Stats,
    /// Every upgrade request, in the order of arrival.
    pub requests: Vec<Request>,
    /// What clients sent, in the order of arrival, up to
    /// [`ServerBuilder::keep_received`](super::ServerBuilder::keep_received).
    pub received: Vec<Received>,
    /// What clients did that RFC 6455 forbids: `connection 0: a frame without
    /// a mask`.
    pub violations: Vec<String>,
    /// The connections that `stats.live` counts.
    open: BTreeSet<usize>,
}

impl Record {
    /// The text messages among what was received.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.received.iter().filter_map(|received| match &received.payload {
            Payload::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }
}

/// The record, shared by all threads of a server.
#[derive(Debug)]
pub(super) struct Ledger {
    record: Mutex<Record>,
    changed: Condvar,
    keep: usize,
}

impl Ledger {
    pub(super) fn new(keep: usize) -> Self {
        Ledger { record: Mutex::default(), changed: Condvar::new(), keep }
    }

    /// A condition that panicked in `wait_for` leaves nothing half done, so a
    /// poisoned lock is as good as any.
    pub(super) fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Record) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// The number of a connection just accepted.
    pub(super) fn accept(&self) -> usize {
        self.change(|record| {
            record.stats.accepted += 1;
            record.stats.accepted as usize - 1
        })
    }

    pub(super) fn opened(&self, connection: usize) {
        self.change(|record| {
            record.open.insert(connection);
            record.stats.live = record.open.len();
            record.stats.max_live = record.stats.max_live.max(record.stats.live);
        });
    }

    /// Told by the connection's own thread, and by whoever notices first.
    pub(super) fn closed(&self, connection: usize) {
        self.change(|record| {
            record.open.remove(&connection);
            record.stats.live = record.open.len();
        });
    }

    pub(super) fn receive(&self, connection: usize, payload: &Payload) {
        self.change(|record| {
            record.stats.received += 1;
            if record.received.len() < self.keep {
                record.received.push(Received { connection, payload: payload.clone() });
            }
        });
    }

    pub(super) fn violation(&self, connection: usize, what: &str) {
        log::debug!("testing server, connection {connection}: {what}");
        self.change(|record| record.violations.push(format!("connection {connection}: {what}")));
    }

    pub(super) fn wait_for(&self, mut met: impl FnMut(&Record) -> bool, limit: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |record| !met(record));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}
