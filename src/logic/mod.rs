//! What the crate decides: pure functions of their inputs and of `now`.
//!
//! Nothing in here names a clock, a thread, a socket, a channel, a source of
//! randomness or a logger; chance comes in as a number in `[0, 1)`.

pub(crate) mod backoff;
pub(crate) mod batch;
pub(crate) mod connection;
pub(crate) mod dedup;
pub(crate) mod heartbeat;
pub(crate) mod identity;
pub(crate) mod layout;
pub(crate) mod ledger;
pub(crate) mod overflow;
pub(crate) mod pointer;
pub(crate) mod rate;
pub(crate) mod recovery;
pub(crate) mod restart;

/// Where the virtual time of a test starts: `Instant` has no other constructor.
#[cfg(test)]
#[allow(clippy::disallowed_methods)]
pub(crate) fn some_instant() -> std::time::Instant {
    std::time::Instant::now()
}
