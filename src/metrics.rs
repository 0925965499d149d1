//! Counters, and the [`Snapshot`] and [`Report`] that are read from them.

use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::event::State;
use crate::handler::Outgoing;

/// Where every message is: each data message read from a socket is in exactly
/// one column.
///
/// At every instant `received = duplicates + skipped + dropped + accepted` and
/// `accepted = delivered + in_flight`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ledger {
    /// Data messages read; one that a session turns into several counts as so many.
    pub received: u64,
    /// Seen before, within the dedup window.
    pub duplicates: u64,
    /// Consumed by the session, which emitted nothing for them.
    pub skipped: u64,
    /// Shed by the overflow policy, or because the client was closed.
    pub dropped: u64,
    /// Taken into the queue.
    pub accepted: u64,
    /// Handed to the program.
    pub delivered: u64,
    /// In the queue, or held by a connection that waits for room in it.
    pub in_flight: u64,
}

/// Where every message of a pipeline is: each that was accepted is in exactly one
/// of the other columns.
///
/// At every instant `accepted = succeeded + failed + in_flight + returned`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PipelineLedger {
    /// Taken from the sources.
    pub accepted: u64,
    /// Processed to success.
    pub succeeded: u64,
    /// Failed for good.
    pub failed: u64,
    /// Somewhere between acceptance and settlement.
    pub in_flight: u64,
    /// Not settled by the deadline of a stop, and given back in the report.
    pub returned: u64,
}

impl PipelineLedger {
    /// Whether every message is accounted for. `false` is a bug of this crate.
    #[must_use]
    pub fn balanced(&self) -> bool {
        self.accepted == self.succeeded + self.failed + self.in_flight + self.returned
    }

    pub(crate) fn in_flight_count(&self) -> usize {
        usize::try_from(self.in_flight).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for PipelineLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "accepted={} succeeded={} ", self.accepted, self.succeeded)?;
        write!(f, "failed={} in_flight={} ", self.failed, self.in_flight)?;
        write!(f, "returned={}", self.returned)
    }
}

/// Why messages were dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DropReason {
    /// The queue was full; they were the oldest in it.
    Oldest,
    /// The queue was full; they were the newest.
    Newest,
    /// The queue was full, and the policy ends the connection for that.
    Disconnect,
    /// The client was closed or failed before they could be queued.
    Closed,
}

impl DropReason {
    /// As events tell it.
    pub(crate) fn phrase(self) -> &'static str {
        match self {
            DropReason::Oldest => "queue full, oldest dropped",
            DropReason::Newest => "queue full, newest dropped",
            DropReason::Disconnect => "queue full, disconnecting",
            DropReason::Closed => "the client has closed",
        }
    }
}

/// Everything a client counts, at one instant.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Snapshot {
    /// Where every message is.
    pub ledger: Ledger,
    /// Messages dropped, by reason.
    pub dropped: Dropped,
    /// Messages in which no id was found, though dedup is on; they pass.
    pub without_id: u64,
    /// Threads that supervision restarted.
    pub restarts: u64,
    /// Events that an [`events`](crate::Client::events) channel had no room for.
    pub events_lost: u64,
    /// Each connection, in the order of the endpoints.
    pub connections: Vec<ConnectionSnapshot>,
}

/// Messages dropped, by [`DropReason`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Dropped {
    /// By `DropOldest`.
    pub oldest: u64,
    /// By `DropNewest`.
    pub newest: u64,
    /// By `Disconnect`.
    pub disconnect: u64,
    /// Because the client was closed.
    pub closed: u64,
}

/// What one connection counts.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ConnectionSnapshot {
    /// Its state.
    pub state: State,
    /// The current or last socket's number, from 1.
    pub epoch: u64,
    /// Attempts started.
    pub attempts: u64,
    /// Attempts that ended in `Connected`.
    pub connects: u64,
    /// `connects` but for the first: how often the connection was regained.
    pub reconnects: u64,
    /// How long the current connection has stood; zero while there is none.
    pub uptime: Duration,
    /// How long all earlier connections stood, together.
    pub earlier_uptime: Duration,
    /// Data messages read from sockets.
    pub messages: u64,
    /// Bytes received on sockets, framing and TLS included, after the upgrade.
    pub bytes_received: u64,
    /// Bytes sent on sockets, framing and TLS included, after the upgrade.
    pub bytes_sent: u64,
    /// Messages of the program and the session given to sockets.
    pub messages_sent: u64,
    /// Messages for one epoch alone ([`Sender::try_send_in`](crate::Sender::try_send_in))
    /// that had not left when it ended, and were discarded.
    pub messages_discarded: u64,
    /// Pings sent.
    pub pings: u64,
    /// Time from the last answered ping to its pong.
    pub ping_round_trip: Option<Duration>,
    /// Why the last attempt or connection ended.
    pub last_error: Option<Error>,
}

/// What a client leaves when it is closed: the ledger, and what became of the
/// rest. Returned by [`Client::close`](crate::Client::close).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Report {
    /// All counters at the end. `ledger.in_flight` messages are still in the
    /// queue and can be received.
    pub metrics: Snapshot,
    /// Why the client failed, if it did.
    pub error: Option<Error>,
    /// Threads that still ran at the deadline, by name; empty after a clean end.
    pub stuck: Vec<String>,
    /// Outgoing messages that no server can have seen, but for those meant for
    /// one epoch alone.
    pub unsent: Vec<Outgoing>,
}

impl Snapshot {
    /// Attempts of all connections.
    #[must_use]
    pub fn attempts(&self) -> u64 {
        self.connections.iter().map(|connection| connection.attempts).sum()
    }

    /// Successful attempts of all connections.
    #[must_use]
    pub fn connects(&self) -> u64 {
        self.connections.iter().map(|connection| connection.connects).sum()
    }

    /// Share of all attempts started that succeeded, 0 to 1; 0 before the first.
    #[must_use]
    pub fn success_rate(&self) -> f64 {
        rate(self.connects(), self.attempts())
    }
}

impl ConnectionSnapshot {
    /// Share of the attempts started that succeeded, 0 to 1; 0 before the first.
    #[must_use]
    pub fn success_rate(&self) -> f64 {
        rate(self.connects, self.attempts)
    }
}

impl Ledger {
    /// Whether every message is accounted for. `false` is a bug of this crate.
    #[must_use]
    pub fn balanced(&self) -> bool {
        let ends = [self.duplicates, self.skipped, self.dropped, self.accepted];
        self.received == ends.iter().sum::<u64>()
            && self.accepted == self.delivered + self.in_flight
    }
}

#[allow(clippy::cast_precision_loss, reason = "a share needs no 53 bits")]
fn rate(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "received={} duplicates={} skipped={} dropped={} accepted={} delivered={} in_flight={}",
            self.received,
            self.duplicates,
            self.skipped,
            self.dropped,
            self.accepted,
            self.delivered,
            self.in_flight
        )
    }
}

/// One connection's counters; its thread writes, anyone reads.
#[derive(Debug, Default)]
pub(crate) struct ConnectionMetrics {
    pub(crate) attempts: Counter,
    pub(crate) connects: Counter,
    pub(crate) messages: Counter,
    pub(crate) bytes_received: Counter,
    pub(crate) bytes_sent: Counter,
    pub(crate) messages_sent: Counter,
    pub(crate) pings: Counter,
    status: Mutex<Status>,
}

#[derive(Debug, Default)]
struct Status {
    epoch: u64,
    connected_at: Option<Instant>,
    earlier_uptime: Duration,
    round_trip: Option<Duration>,
    last_error: Option<Error>,
}

impl ConnectionMetrics {
    /// An attempt starts, and with it an epoch.
    pub(crate) fn attempt(&self) -> u64 {
        self.attempts.add(1);
        self.with(|status| {
            status.epoch += 1;
            status.epoch
        })
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.with(|status| status.epoch)
    }

    pub(crate) fn connected(&self, now: Instant) {
        self.connects.add(1);
        self.with(|status| status.connected_at = Some(now));
    }

    /// The connection or attempt ended.
    pub(crate) fn ended(&self, now: Instant, error: Option<&Error>) {
        self.with(|status| {
            if let Some(since) = status.connected_at.take() {
                status.earlier_uptime += now.saturating_duration_since(since);
            }
            if let Some(error) = error {
                status.last_error = Some(error.clone());
            }
        });
    }

    pub(crate) fn round_trip(&self, took: Duration) {
        self.with(|status| status.round_trip = Some(took));
    }

    pub(crate) fn last_error(&self) -> Option<Error> {
        self.with(|status| status.last_error.clone())
    }

    pub(crate) fn snapshot(
        &self,
        state: State,
        now: Instant,
        messages_discarded: u64,
    ) -> ConnectionSnapshot {
        let connects = self.connects.get();
        self.with(|status| ConnectionSnapshot {
            state,
            epoch: status.epoch,
            attempts: self.attempts.get(),
            connects,
            reconnects: connects.saturating_sub(1),
            uptime: status
                .connected_at
                .map_or(Duration::ZERO, |since| now.saturating_duration_since(since)),
            earlier_uptime: status.earlier_uptime,
            messages: self.messages.get(),
            bytes_received: self.bytes_received.get(),
            bytes_sent: self.bytes_sent.get(),
            messages_sent: self.messages_sent.get(),
            messages_discarded,
            pings: self.pings.get(),
            ping_round_trip: status.round_trip,
            last_error: status.last_error.clone(),
        })
    }

    fn with<T>(&self, read: impl FnOnce(&mut Status) -> T) -> T {
        read(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A number that only grows; no order with other memory is implied.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts one; returns the new number.
    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(1, Relaxed) + 1
    }

    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A number that grows and shrinks.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicI64);

impl Gauge {
    /// Returns the new value.
    pub(crate) fn add(&self, count: i64) -> i64 {
        self.0.fetch_add(count, SeqCst) + count
    }

    pub(crate) fn get(&self) -> i64 {
        self.0.load(SeqCst)
    }

    pub(crate) fn clear(&self) {
        self.0.store(0, SeqCst);
    }
}
