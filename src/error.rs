//! What went wrong: [`Error`], its [`ErrorKind`], and the [`Recovery`] class
//! that says who deals with it.

use std::error::Error as StdError;
use std::fmt::{self, Write as _};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// A boxed error of user code: what sessions, request hooks and handlers return.
pub type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// Why an attempt, a connection or a whole client ended.
///
/// One pointer wide and cheap to clone: the same error travels in events, in
/// [`ConnectionSnapshot::last_error`](crate::ConnectionSnapshot::last_error) and out of
/// [`Client::error`](crate::Client::error). `Display` is one lower-case phrase
/// that names what failed and which limit was reached; the underlying cause is
/// in [`source`](StdError::source) and not repeated in the phrase.
///
/// Ask [`kind`](Error::kind) to match on it and
/// [`recovery`](Error::recovery) for what happens next.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

/// Causes that are told: a chain may be a circle.
const MAX_CAUSES: usize = 16;

struct Inner {
    kind: ErrorKind,
    phrase: Box<str>,
    source: Option<BoxError>,
}

/// The class of an [`Error`], to match on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting is unusable; the name is the builder method's.
    Setting(&'static str),
    /// A URL is malformed, or its scheme is not `ws` or `wss`.
    Url,
    /// The request hook returned an error or panicked.
    RequestHook,
    /// The host name could not be looked up.
    Dns,
    /// No address accepted a TCP connection; the phrase lists each with its cause.
    Connect,
    /// The connect deadline passed in this step.
    Timeout {
        /// What was being waited for.
        step: Step,
        /// The deadline that all steps of the attempt share.
        limit: Duration,
    },
    /// The TLS handshake broke off or was refused.
    Tls,
    /// The server's certificate is not trusted, or names another host.
    Certificate,
    /// The server answered the upgrade with this HTTP status.
    Http {
        /// The status code, 100 to 599.
        status: u16,
        /// What `Retry-After` asked for, in either of its forms.
        retry_after: Option<Duration>,
    },
    /// A redirect that is not followed: over the limit, without a usable
    /// `Location`, or from `wss` to `ws`.
    Redirect,
    /// The answer to the upgrade is not a valid HTTP response or breaks
    /// RFC 6455, section 4.1.
    Handshake,
    /// The server agreed on a subprotocol that was not offered, or on none.
    Subprotocol,
    /// The socket failed or ended without a close frame.
    Io(io::ErrorKind),
    /// The server closed the connection with this code (RFC 6455, section 7.4).
    Closed {
        /// The close code; 1005 when the frame carried none.
        code: u16,
    },
    /// The server broke the WebSocket protocol.
    Protocol,
    /// A message is larger than `max_message_size`.
    TooLarge,
    /// No byte arrived within `pong_timeout` after a ping.
    NoPong,
    /// No data message arrived within `idle_timeout`.
    Idle,
    /// The server stopped reading: nothing could be written for `write_timeout`.
    WriteStalled,
    /// A session hook returned an error or panicked.
    Session,
    /// The queue was full and the overflow policy is `Disconnect`.
    Overflow,
    /// `max_attempts` or `max_reconnect_attempts` was reached.
    Attempts,
    /// A thread of this crate could not be started.
    Spawn,
    /// A thread of this crate panicked.
    Panicked,
    /// A pipeline's handler failed.
    Handler,
    /// There was no connection within the time that a caller gave.
    NotConnected,
    /// The client or pipeline is closed.
    Shutdown,
}

/// The steps of one connection attempt, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Looking up the host name.
    Dns,
    /// Opening the TCP connection.
    Tcp,
    /// The TLS handshake.
    Tls,
    /// The HTTP upgrade.
    Upgrade,
    /// The session's opening messages and their confirmation.
    Opening,
}

/// Who deals with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Recovery {
    /// The connection retries by itself, after its back-off.
    Recoverable,
    /// The connection's thread ends and supervision decides: it is restarted,
    /// at most 3 times in 5 s, and then the client fails.
    Unrecoverable,
}

impl Error {
    /// An error of `kind`, described by `phrase`.
    pub(crate) fn new(kind: ErrorKind, phrase: impl Into<String>) -> Self {
        Self::build(kind, phrase.into(), None)
    }

    /// An error of `kind` with the cause that `source()` will show.
    pub(crate) fn caused(
        kind: ErrorKind,
        phrase: impl Into<String>,
        source: impl Into<BoxError>,
    ) -> Self {
        Self::build(kind, phrase.into(), Some(source.into()))
    }

    /// A setting that cannot be used: `name` is the builder's method.
    pub(crate) fn setting(name: &'static str, why: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Setting(name), format!("setting `{name}`: {why}"))
    }

    fn build(kind: ErrorKind, phrase: String, source: Option<BoxError>) -> Self {
        let phrase = phrase.into_boxed_str();
        Self(Arc::new(Inner { kind, phrase, source }))
    }

    /// The class of this error, to match on.
    #[must_use]
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The phrase with every cause behind it, joined by `: `, for one log line.
    /// A cause whose words are there already is left out.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = StdError::source(self);
        for _ in 0..MAX_CAUSES {
            let Some(error) = cause else { break };
            let (words, next) = read(error);
            if !text.contains(&words) {
                text.push_str(": ");
                text.push_str(&words);
            }
            cause = next;
        }
        text
    }
}

type Cause<'a> = &'a (dyn StdError + 'static);

/// A cause's words and what is behind it. Causes are user code: one that cannot
/// be read must not take down the thread that tells of it.
fn read(error: Cause<'_>) -> (String, Option<Cause<'_>>) {
    let words = || {
        let mut words = String::new();
        let _ = write!(words, "{error}");
        (words, error.source())
    };
    catch_unwind(AssertUnwindSafe(words))
        .unwrap_or_else(|_| ("a cause whose Display panicked".to_owned(), None))
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.phrase)
    }
}

impl fmt::Debug for Error {
    /// The phrase with its causes, and the kind: what `main` prints of an `Err`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{:?}]", self.chain(), self.0.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Dns => "DNS look-up",
            Step::Tcp => "TCP connect",
            Step::Tls => "TLS handshake",
            Step::Upgrade => "HTTP upgrade",
            Step::Opening => "session opening",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }

    #[test]
    fn display_shows_the_phrase_and_source_the_cause_not_both() {
        let cause = io::Error::new(io::ErrorKind::ConnectionReset, "reset by peer");
        let error = Error::caused(ErrorKind::Io(cause.kind()), "connection lost", cause);
        assert_eq!(error.to_string(), "connection lost");
        assert_eq!(error.source().map(ToString::to_string).as_deref(), Some("reset by peer"));
        assert_eq!(error.chain(), "connection lost: reset by peer");
    }

    /// A cause whose `Display` or `source` misbehaves.
    #[derive(Debug, Clone, Copy)]
    enum Rogue {
        Panics,
        Refuses,
        Circles,
    }

    impl fmt::Display for Rogue {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self {
                Rogue::Panics => panic!("in Display"),
                Rogue::Refuses => Err(fmt::Error),
                Rogue::Circles => f.write_str("round"),
            }
        }
    }

    impl StdError for Rogue {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            Some(self)
        }
    }

    #[test]
    fn a_cause_that_cannot_be_read_does_no_harm() {
        let chain = |cause| Error::caused(ErrorKind::Session, "on_open failed", cause).chain();
        assert_eq!(chain(Rogue::Panics), "on_open failed: a cause whose Display panicked");
        assert_eq!(chain(Rogue::Refuses), "on_open failed");
        assert_eq!(chain(Rogue::Circles), "on_open failed: round");
    }

    #[test]
    fn what_a_cause_repeats_is_told_once() {
        let inner = Error::new(ErrorKind::Tls, "certificate verify failed");
        let outer = Error::caused(ErrorKind::Tls, "certificate verify failed (self-signed)", inner);
        assert_eq!(outer.chain(), "certificate verify failed (self-signed)");
    }
}
