//! What is told on stderr: events and the final report, a JSON object a line.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use broadsock::{Error, Event, EventKind, Snapshot};
use serde_json::Value;

/// Writes a line to stderr, in one piece. There is nobody to tell that it cannot.
pub(crate) fn say(line: impl fmt::Display) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// A JSON object whose fields stay in their order, for people read it too.
struct Object(String);

impl Object {
    fn new() -> Self {
        Self("{".to_owned())
    }

    fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        let comma = if self.0.len() == 1 { "" } else { "," };
        // Writing to a string does not fail.
        let _ = write!(self.0, "{comma}{}:{}", Value::from(name), value.into());
        self
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}}}", self.0)
    }
}

/// An event that happened in a program started at `start`.
pub(crate) fn event(event: &Event, start: Instant) -> impl fmt::Display {
    let object = Object::new()
        .with("event", name(&event.kind))
        .with("t_ms", ms(event.at.saturating_duration_since(start)))
        .with("connection", event.connection)
        .with("epoch", event.epoch);
    match &event.kind {
        EventKind::State { from, to, reason } => object
            .with("from", from.to_string())
            .with("to", to.to_string())
            .with("reason", reason.as_str()),
        EventKind::AttemptFailed { attempt, retry_in, error } => object
            .with("attempt", *attempt)
            .with("retry_in_ms", retry_in.map(ms))
            .with("reason", error.chain()),
        EventKind::Lost { uptime, retry_in, error } => object
            .with("uptime_ms", ms(*uptime))
            .with("retry_in_ms", retry_in.map(ms))
            .with("reason", error.chain()),
        EventKind::Dropped { count, reason } => {
            object.with("count", *count).with("reason", *reason)
        }
        EventKind::Unsent { count } => object.with("count", *count),
        EventKind::Blocked(blocked) => object.with("blocked", *blocked),
        EventKind::Restarting { thread, delay, error } => object
            .with("thread", thread.as_str())
            .with("delay_ms", ms(*delay))
            .with("reason", error.chain()),
        EventKind::Failed { error, reason } => {
            object.with("supervision", reason.as_str()).with("reason", error.chain())
        }
        EventKind::Panic { hook, message } => {
            object.with("hook", *hook).with("reason", message.as_str())
        }
        EventKind::Stuck { threads } => object.with("threads", threads.as_slice()),
        other => object.with("reason", other.to_string()),
    }
}

fn name(kind: &EventKind) -> &'static str {
    match kind {
        EventKind::State { .. } => "state",
        EventKind::AttemptFailed { .. } => "attempt_failed",
        EventKind::Lost { .. } => "lost",
        EventKind::Dropped { .. } => "dropped",
        EventKind::Unsent { .. } => "unsent",
        EventKind::Blocked(_) => "blocked",
        EventKind::Restarting { .. } => "restarting",
        EventKind::Failed { .. } => "failed",
        EventKind::Panic { .. } => "panic",
        EventKind::Stuck { .. } => "stuck",
        _ => "other",
    }
}

/// The counters at the end.
pub(crate) fn report(metrics: &Snapshot, error: Option<&Error>) -> impl fmt::Display {
    let ledger = &metrics.ledger;
    Object::new()
        .with("received", ledger.received)
        .with("duplicates", ledger.duplicates)
        .with("skipped", ledger.skipped)
        .with("dropped", ledger.dropped)
        .with("accepted", ledger.accepted)
        .with("delivered", ledger.delivered)
        .with("in_flight", ledger.in_flight)
        .with("attempts", metrics.attempts())
        .with("connects", metrics.connects())
        .with("success_rate", metrics.success_rate())
        .with("error", error.map(Error::chain))
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
