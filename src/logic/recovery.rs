//! Who deals with which error: the one table.

use crate::error::{Error, ErrorKind, Recovery};

impl Error {
    /// Whether the connection deals with this error itself or ends because of it.
    ///
    /// This is the default verdict; the client may be given a function that
    /// sees it and decides otherwise. Recoverable is what another attempt can
    /// cure: the network, a busy server, a silent peer, a failed hook.
    /// Unrecoverable is what would fail again in the same way: settings, the
    /// server's refusal, a certificate, a broken protocol.
    #[must_use]
    pub fn recovery(&self) -> Recovery {
        classify(self.kind())
    }
}

/// The table of the manual's page `errors`. Every kind is named, so
/// that a new one does not get a class by accident.
pub(crate) fn classify(kind: &ErrorKind) -> Recovery {
    match kind {
        ErrorKind::Http { status, .. } => answered(*status),
        ErrorKind::Closed { code } => closed(*code),
        ErrorKind::Dns
        | ErrorKind::Connect
        | ErrorKind::Timeout { .. }
        | ErrorKind::Tls
        | ErrorKind::Io(_)
        | ErrorKind::NoPong
        | ErrorKind::Idle
        | ErrorKind::WriteStalled
        | ErrorKind::Session
        | ErrorKind::RequestHook
        | ErrorKind::Overflow => Recovery::Recoverable,
        ErrorKind::Setting(_)
        | ErrorKind::Url
        | ErrorKind::Certificate
        | ErrorKind::Redirect
        | ErrorKind::Handshake
        | ErrorKind::Subprotocol
        | ErrorKind::Protocol
        | ErrorKind::TooLarge
        | ErrorKind::Attempts
        | ErrorKind::Spawn
        | ErrorKind::Panicked
        | ErrorKind::Handler
        | ErrorKind::NotConnected
        | ErrorKind::Shutdown => Recovery::Unrecoverable,
    }
}

/// By HTTP status: only what RFC 9110 calls temporary is worth asking again.
fn answered(status: u16) -> Recovery {
    match status {
        408 | 425 | 429 | 500..=599 => Recovery::Recoverable,
        _ => Recovery::Unrecoverable,
    }
}

/// By close code (RFC 6455, section 7.4.1): unrecoverable is what blames this
/// side's data or request, which a new connection would only repeat. A code
/// that nobody has defined yet blames nobody, so it is retried.
fn closed(code: u16) -> Recovery {
    match code {
        1002 | 1003 | 1007..=1010 => Recovery::Unrecoverable,
        _ => Recovery::Recoverable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Step;
    use std::io;
    use std::time::Duration;

    fn of_status(status: u16) -> Recovery {
        classify(&ErrorKind::Http { status, retry_after: None })
    }

    fn of_code(code: u16) -> Recovery {
        classify(&ErrorKind::Closed { code })
    }

    #[test]
    fn what_another_attempt_can_cure_is_recoverable() {
        let limit = Duration::from_secs(10);
        for kind in [
            ErrorKind::Dns,
            ErrorKind::Connect,
            ErrorKind::Timeout { step: Step::Upgrade, limit },
            ErrorKind::Tls,
            ErrorKind::Io(io::ErrorKind::ConnectionReset),
            ErrorKind::Io(io::ErrorKind::UnexpectedEof),
            ErrorKind::NoPong,
            ErrorKind::Idle,
            ErrorKind::WriteStalled,
            ErrorKind::Session,
            ErrorKind::RequestHook,
            ErrorKind::Overflow,
        ] {
            assert_eq!(classify(&kind), Recovery::Recoverable, "{kind:?}");
        }
    }

    #[test]
    fn what_would_fail_again_in_the_same_way_is_unrecoverable() {
        for kind in [
            ErrorKind::Setting("url"),
            ErrorKind::Url,
            ErrorKind::Certificate,
            ErrorKind::Redirect,
            ErrorKind::Handshake,
            ErrorKind::Subprotocol,
            ErrorKind::Protocol,
            ErrorKind::TooLarge,
            ErrorKind::Attempts,
            ErrorKind::Spawn,
            ErrorKind::Panicked,
            ErrorKind::Handler,
            ErrorKind::NotConnected,
            ErrorKind::Shutdown,
        ] {
            assert_eq!(classify(&kind), Recovery::Unrecoverable, "{kind:?}");
        }
    }

    #[test]
    fn busy_and_failing_servers_are_asked_again() {
        for status in [408, 425, 429, 500, 501, 502, 503, 504, 521, 599] {
            assert_eq!(of_status(status), Recovery::Recoverable, "{status}");
        }
    }

    #[test]
    fn every_other_status_is_final() {
        let listed = [400, 401, 403, 404, 405, 407, 409, 410, 418, 426, 428, 431, 451, 499];
        let others = [100, 102, 200, 204, 301, 302, 304, 307, 308, 424, 600];
        for status in listed.into_iter().chain(others) {
            assert_eq!(of_status(status), Recovery::Unrecoverable, "{status}");
        }
    }

    #[test]
    fn close_codes_that_blame_this_side_are_final() {
        for code in [1002, 1003, 1007, 1008, 1009, 1010] {
            assert_eq!(of_code(code), Recovery::Unrecoverable, "{code}");
        }
    }

    #[test]
    fn close_codes_of_feeds_that_rotate_are_recoverable() {
        let standard = [1000, 1001, 1004, 1005, 1006, 1011, 1012, 1013, 1014, 1015];
        for code in standard.into_iter().chain([1016, 2999, 3000, 3999, 4000, 4999]) {
            assert_eq!(of_code(code), Recovery::Recoverable, "{code}");
        }
    }

    #[test]
    fn an_error_answers_for_its_kind() {
        let lost = Error::new(ErrorKind::NoPong, "no pong in 20s");
        assert_eq!(lost.recovery(), Recovery::Recoverable);
        assert_eq!(Error::setting("url", "empty").recovery(), Recovery::Unrecoverable);
    }
}
