//! What the promise tests share: settings, and waits that are bounded.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::disallowed_methods, reason = "tests on real sockets run on real time")]

use std::time::{Duration, Instant};

use broadsock::crossbeam_channel::{Receiver, never};
use broadsock::testing::{Script, Server};
use broadsock::{
    Backoff, Client, ClientBuilder, ErrorKind, Event, EventKind, Message, Report, Snapshot,
};

/// Generous: says only that something happens, not how fast.
pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A server with these scripts, one for each connection; the last one repeats.
pub(crate) fn serve(scripts: impl IntoIterator<Item = Script>) -> Server {
    Server::script(scripts).start().unwrap()
}

/// A script that has accepted the upgrade.
pub(crate) fn up() -> Script {
    Script::new().upgrade()
}

/// A client of this server that retries at once and sends no pings, so that a
/// machine that is busy elsewhere cannot make it reconnect.
pub(crate) fn builder(server: &Server) -> ClientBuilder {
    quick(Client::builder(server.url()))
}

pub(crate) fn quick(builder: ClientBuilder) -> ClientBuilder {
    builder.backoff(Backoff::constant(ms(10))).ping_interval(None).connect_timeout(LONG)
}

pub(crate) fn start(builder: ClientBuilder) -> Client {
    builder.start().unwrap()
}

/// Started, and connected for the first time.
pub(crate) fn connect(builder: ClientBuilder) -> Client {
    let client = start(builder);
    client.wait_connected(LONG).unwrap();
    client
}

/// The next message.
pub(crate) fn next(client: &Client) -> Message {
    match client.recv_timeout(LONG) {
        Ok(message) => message,
        Err(error) => panic!("no message: {error}; {:?}", client.metrics()),
    }
}

pub(crate) fn text(client: &Client) -> String {
    next(client).text().unwrap().to_owned()
}

pub(crate) fn texts(client: &Client, count: usize) -> Vec<String> {
    (0..count).map(|_| text(client)).collect()
}

/// What [`Script::numbers`] sends, as a number.
pub(crate) fn number(message: &Message) -> u64 {
    let text = message.text().unwrap();
    let digits = text.strip_prefix("{\"id\":").and_then(|rest| rest.strip_suffix('}'));
    digits.unwrap_or_else(|| panic!("not a number: {text}")).parse().unwrap()
}

pub(crate) fn numbers(client: &Client, count: usize) -> Vec<u64> {
    (0..count).map(|_| number(&next(client))).collect()
}

/// Waits; nothing can end it early.
pub(crate) fn linger(time: Duration) {
    let _ = never::<()>().recv_timeout(time);
}

/// Waits until the condition holds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !met() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        linger(ms(2));
    }
}

/// The next event that the function finds something in.
#[track_caller]
pub(crate) fn find<T>(events: &Receiver<Event>, mut found: impl FnMut(Event) -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        match events.recv_deadline(deadline) {
            Ok(event) => {
                if let Some(found) = found(event) {
                    return found;
                }
            }
            Err(error) => panic!("the event never came: {error}"),
        }
    }
}

/// Why the next established connection was lost.
#[track_caller]
pub(crate) fn next_loss(events: &Receiver<Event>) -> ErrorKind {
    find(events, |event| match event.kind {
        EventKind::Lost { error, .. } => Some(error.kind().clone()),
        _ => None,
    })
}

/// The next time that reading stops or goes on for the sake of the queue.
#[track_caller]
pub(crate) fn wait_blocked(events: &Receiver<Event>, blocked: bool) {
    find(events, |event| match event.kind {
        EventKind::Blocked(now) if now == blocked => Some(()),
        _ => None,
    });
}

/// The counters, of which each look must add up.
#[track_caller]
pub(crate) fn audit(client: &Client) -> Snapshot {
    let metrics = client.metrics();
    assert!(metrics.ledger.balanced(), "unbalanced: {}", metrics.ledger);
    let dropped = metrics.dropped;
    let sum = dropped.oldest + dropped.newest + dropped.disconnect + dropped.closed;
    assert_eq!(metrics.ledger.dropped, sum);
    metrics
}

/// A clean end: no thread hangs and the books balance.
#[track_caller]
pub(crate) fn close(client: &Client) -> Report {
    let report = client.close(LONG);
    assert_eq!(report.stuck, [""; 0]);
    assert!(report.metrics.ledger.balanced(), "unbalanced: {}", report.metrics.ledger);
    report
}
