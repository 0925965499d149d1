//! What happened: [`Event`], told to the observer, to every
//! [`Client::events`](crate::Client::events) channel and to the log.

use std::fmt;
use std::time::{Duration, Instant};

use crate::error::Error;

/// The state of a connection.
///
/// ```text
/// Disconnected --start--> Connecting --open--> Opening --ready--> Connected
///                             |                   |                  |
///                             +------ lost -------+------- lost -----+
///                                          v
///                                    Reconnecting --timer--> Connecting
///    any --close--> Closing --done/deadline--> Closed       any --unrecoverable--> Failed
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// Not started yet, or waiting for supervision to start it again.
    Disconnected,
    /// DNS, TCP, TLS and the HTTP upgrade are under way.
    Connecting,
    /// The session's opening messages are going out and, if it asked for it,
    /// their confirmation is awaited.
    Opening,
    /// Messages flow.
    Connected,
    /// The connection was lost, or an attempt failed; the back-off runs.
    Reconnecting,
    /// The close handshake is under way.
    Closing,
    /// Closed as asked; final.
    Closed,
    /// Ended by an unrecoverable error; final unless supervision restarts it.
    Failed,
}

/// Something that happened to a connection or to the client.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Event {
    /// When it happened.
    pub at: Instant,
    /// The connection's number, from 0.
    pub connection: usize,
    /// The socket's number within the connection, from 1; 0 before the first.
    pub epoch: u64,
    /// What happened.
    pub kind: EventKind,
}

/// The kinds of [`Event`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EventKind {
    /// The connection changed its state.
    State {
        /// The state it left.
        from: State,
        /// The state it is in.
        to: State,
        /// Why, in words.
        reason: String,
    },
    /// An attempt to connect failed.
    AttemptFailed {
        /// How many attempts in a row have failed, this one included.
        attempt: u32,
        /// When the next one starts; `None` if there is none.
        retry_in: Option<Duration>,
        /// Why it failed.
        error: Error,
    },
    /// An established connection was lost.
    Lost {
        /// How long it was connected.
        uptime: Duration,
        /// When the next attempt starts; `None` if there is none.
        retry_in: Option<Duration>,
        /// Why it was lost.
        error: Error,
    },
    /// Messages were shed by the overflow policy or because the client closed.
    /// Under a flood, one event a second tells of all of them.
    Dropped {
        /// How many, since the last such event of this connection.
        count: u64,
        /// Why, in words.
        reason: &'static str,
    },
    /// Outgoing messages were discarded: the client ended before they left.
    Unsent {
        /// How many.
        count: usize,
    },
    /// The consumers are slower than the feed: reading stopped (`true`) or
    /// went on (`false`).
    Blocked(bool),
    /// A thread ended and supervision starts it again.
    Restarting {
        /// The thread's name.
        thread: String,
        /// After which delay.
        delay: Duration,
        /// Why it ended.
        error: Error,
    },
    /// The client failed; this is the cause.
    Failed {
        /// The cause, as in [`Client::error`](crate::Client::error).
        error: Error,
        /// What supervision did before it gave up.
        reason: String,
    },
    /// User code panicked; the panic was contained.
    Panic {
        /// Which hook it was.
        hook: &'static str,
        /// The panic's message.
        message: String,
    },
    /// Threads still ran at the deadline of a close.
    Stuck {
        /// Their names.
        threads: Vec<String>,
    },
}

impl State {
    /// Whether nothing can follow it.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, State::Closed | State::Failed)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Disconnected => "disconnected",
            State::Connecting => "connecting",
            State::Opening => "opening",
            State::Connected => "connected",
            State::Reconnecting => "reconnecting",
            State::Closing => "closing",
            State::Closed => "closed",
            State::Failed => "failed",
        })
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection {} epoch {}: {}", self.connection, self.epoch, self.kind)
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // One that says what the state says is none.
            EventKind::State { from, to, reason } if *reason == to.to_string() => {
                write!(f, "{from} -> {to}")
            }
            EventKind::State { from, to, reason } => write!(f, "{from} -> {to}: {reason}"),
            EventKind::AttemptFailed { attempt, retry_in, error } => {
                write!(f, "attempt {attempt} failed: {}", error.chain())?;
                next_try(f, *retry_in)
            }
            EventKind::Lost { uptime, retry_in, error } => {
                write!(f, "lost after {uptime:.1?}: {}", error.chain())?;
                next_try(f, *retry_in)
            }
            EventKind::Dropped { count, reason } => {
                write!(f, "{} shed: {reason}", counted(*count, "message"))
            }
            EventKind::Unsent { count } => {
                write!(f, "{} discarded", counted(*count, "outgoing message"))
            }
            EventKind::Blocked(true) => f.write_str("queue full, reading stopped"),
            EventKind::Blocked(false) => f.write_str("queue has room, reading goes on"),
            EventKind::Restarting { thread, delay, error } => {
                write!(f, "thread {thread} restarts in {delay:.1?}: {}", error.chain())
            }
            EventKind::Failed { error, reason } => {
                write!(f, "client failed, {reason}: {}", error.chain())
            }
            EventKind::Panic { hook, message } => write!(f, "{hook} panicked: {message}"),
            EventKind::Stuck { threads } => write!(f, "still running: {}", threads.join(", ")),
        }
    }
}

/// So many of what has this name: `1 message`, `2 messages`.
pub(crate) fn counted<N: fmt::Display + PartialEq + From<u8>>(number: N, name: &str) -> String {
    let ending = if number == N::from(1) { "" } else { "s" };
    format!("{number} {name}{ending}")
}

fn next_try(f: &mut fmt::Formatter<'_>, retry_in: Option<Duration>) -> fmt::Result {
    match retry_in {
        Some(delay) => write!(f, " (next try in {delay:.1?})"),
        None => f.write_str(" (no further try)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_read_as_sentences() {
        let state = |to, reason: &str| {
            let kind = EventKind::State { from: State::Closing, to, reason: reason.to_owned() };
            kind.to_string()
        };
        assert_eq!(state(State::Closed, "closed"), "closing -> closed");
        assert_eq!(state(State::Closed, "in time"), "closing -> closed: in time");
        assert_eq!(EventKind::Unsent { count: 1 }.to_string(), "1 outgoing message discarded");
        let shed = |count| EventKind::Dropped { count, reason: "full" }.to_string();
        assert_eq!([shed(1), shed(2)], ["1 message shed: full", "2 messages shed: full"]);
    }
}
