//! What the tests of connections share. Every wait is bounded by [`LONG`],
//! which says only that something happens, not how fast.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::time::Duration;

use broadsock::crossbeam_channel::{Receiver, RecvTimeoutError, after, select};
use broadsock::testing::{Script, Server};
use broadsock::{
    Backoff, Client, ClientBuilder, Error, ErrorKind, Event, EventKind, Intensity, Request, State,
    Step,
};

pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(crate) fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// A server that takes one script for each connection; the last one repeats.
pub(crate) fn serve(scripts: impl IntoIterator<Item = Script>) -> Server {
    Server::script(scripts).start().unwrap()
}

pub(crate) fn upgrade() -> Script {
    Script::new().upgrade()
}

/// A client that retries soon. Restarts are counted over a minute, so that a
/// busy machine does not change how many are allowed.
pub(crate) fn quick(request: impl Into<Request>) -> ClientBuilder {
    soon(Client::builder(request))
}

/// The same settings for a builder without an endpoint.
pub(crate) fn soon(builder: ClientBuilder) -> ClientBuilder {
    builder
        .backoff(Backoff::exponential(ms(10), ms(50)))
        .restart_intensity(Intensity { restarts: 3, within: secs(60) })
}

/// The next message's text.
pub(crate) fn text(client: &Client) -> String {
    let message = client.recv_timeout(LONG).expect("a message");
    message.text().expect("a text message").to_owned()
}

pub(crate) fn texts(client: &Client, count: usize) -> Vec<String> {
    (0..count).map(|_| text(client)).collect()
}

/// Waits until the iterator ends; returns what it still yielded.
pub(crate) fn drain(client: &Client) -> Vec<String> {
    let mut drained = Vec::new();
    loop {
        match client.recv_timeout(LONG) {
            Ok(message) => drained.push(message.to_string()),
            Err(RecvTimeoutError::Disconnected) => return drained,
            Err(RecvTimeoutError::Timeout) => panic!("the client did not end: {client:?}"),
        }
    }
}

/// Waits until the client has failed; returns its cause.
pub(crate) fn failure(client: &Client) -> Error {
    drain(client);
    client.error().expect("a cause")
}

/// The events of a client, from its first one on.
pub(crate) struct Watch {
    events: Receiver<Event>,
    /// All that was taken so far.
    pub(crate) seen: Vec<Event>,
}

impl Watch {
    /// Has to be made soon after the client: 256 events are kept for it.
    pub(crate) fn new(client: &Client) -> Self {
        Self { events: client.events(), seen: Vec::new() }
    }

    /// Waits for an event for which `pick` finds something.
    pub(crate) fn find<T>(&mut self, what: &str, mut pick: impl FnMut(&Event) -> Option<T>) -> T {
        let deadline = after(LONG);
        loop {
            let event = select! {
                recv(self.events) -> event => event.ok(),
                recv(deadline) -> _ => None,
            };
            let Some(event) = event else { panic!("no {what} in {}", self.story()) };
            self.seen.push(event);
            if let Some(found) = self.seen.last().and_then(&mut pick) {
                return found;
            }
        }
    }

    /// Waits for an event.
    pub(crate) fn until(&mut self, what: &str, is_it: impl Fn(&Event) -> bool) -> Event {
        self.find(what, |event| is_it(event).then(|| event.clone()))
    }

    /// Waits for the next failed attempt.
    pub(crate) fn failed_attempt(&mut self) -> Failed {
        self.find("failed attempt", failed_attempt)
    }

    /// Waits for the next loss of an established connection.
    pub(crate) fn loss(&mut self) -> Failed {
        self.find("loss", loss)
    }

    pub(crate) fn connected(&mut self) -> Event {
        self.until("connection", is_connected)
    }

    /// Waits until the client has ended; returns all events.
    pub(crate) fn into_all(mut self) -> Vec<Event> {
        loop {
            match self.events.recv_timeout(LONG) {
                Ok(event) => self.seen.push(event),
                Err(RecvTimeoutError::Disconnected) => return self.seen,
                Err(RecvTimeoutError::Timeout) => panic!("no end of {}", self.story()),
            }
        }
    }

    fn story(&self) -> String {
        self.seen.iter().map(|event| format!("\n  {event}")).collect()
    }
}

/// A failed attempt or a loss, taken out of its event.
#[derive(Debug, Clone)]
pub(crate) struct Failed {
    pub(crate) epoch: u64,
    pub(crate) attempt: u32,
    pub(crate) retry_in: Option<Duration>,
    pub(crate) error: Error,
}

impl Failed {
    pub(crate) fn kind(&self) -> ErrorKind {
        self.error.kind().clone()
    }

    pub(crate) fn retry_in(&self) -> Duration {
        self.retry_in.expect("another attempt")
    }
}

pub(crate) fn failed_attempt(event: &Event) -> Option<Failed> {
    match &event.kind {
        EventKind::AttemptFailed { attempt, retry_in, error } => Some(Failed {
            epoch: event.epoch,
            attempt: *attempt,
            retry_in: *retry_in,
            error: error.clone(),
        }),
        _ => None,
    }
}

pub(crate) fn loss(event: &Event) -> Option<Failed> {
    match &event.kind {
        EventKind::Lost { retry_in, error, .. } => Some(Failed {
            epoch: event.epoch,
            attempt: 0,
            retry_in: *retry_in,
            error: error.clone(),
        }),
        _ => None,
    }
}

pub(crate) fn is_connected(event: &Event) -> bool {
    matches!(event.kind, EventKind::State { to: State::Connected, .. })
}

pub(crate) fn is_panic(event: &Event, name: &str) -> bool {
    matches!(&event.kind, EventKind::Panic { hook, .. } if hook.contains(name))
}

/// How many events `is_it` holds for.
pub(crate) fn count(events: &[Event], is_it: impl Fn(&Event) -> bool) -> usize {
    events.iter().filter(|event| is_it(event)).count()
}

pub(crate) fn timed_out_in(kind: &ErrorKind, wanted: Step) -> bool {
    matches!(kind, ErrorKind::Timeout { step, .. } if *step == wanted)
}

/// A client whose every attempt fails unrecoverably ends after exactly the
/// first one and three restarts, each told of, with its cause. Returns it.
pub(crate) fn assert_ends_after_restarts(client: &Client, watch: Watch) -> Error {
    let cause = failure(client);
    let events = watch.into_all();
    let story: String = events.iter().map(|event| format!("\n  {event}")).collect();
    let metrics = client.metrics();
    assert_eq!(metrics.attempts(), 4, "{story}");
    assert_eq!(metrics.restarts, 3, "{story}");
    let ends: Vec<Failed> = events.iter().filter_map(|e| failed_attempt(e).or(loss(e))).collect();
    assert_eq!(ends.iter().map(|end| end.epoch).collect::<Vec<_>>(), [1, 2, 3, 4], "{story}");
    assert!(ends.iter().all(|end| end.retry_in.is_none()), "{story}");
    let restarting = |event: &Event| matches!(event.kind, EventKind::Restarting { .. });
    assert_eq!(count(&events, restarting), 3, "{story}");
    let failed = |event: &Event| matches!(event.kind, EventKind::Failed { .. });
    assert_eq!(count(&events, failed), 1, "{story}");
    assert_eq!(client.state(), State::Failed, "{story}");
    cause
}
