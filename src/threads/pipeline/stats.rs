//! What a pipeline counts of its workers, and the events it tells.

use std::fmt;
use std::time::Duration;

use crate::message::MessageId;
use crate::metrics::Counter;
use crate::threads::events::Told;
use crate::work::{FailureKind, Trigger};

/// One worker's counters; they outlive its thread.
#[derive(Debug, Default)]
pub(crate) struct WorkerStats {
    pub(crate) handled: Counter,
    pub(crate) failed: Counter,
    pub(crate) busy_nanos: Counter,
}

/// Durations, counted by powers of two of a microsecond.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: [Counter; Self::BUCKETS],
}

impl Histogram {
    /// The last one holds everything from 2^30 microseconds (18 minutes) on.
    pub(crate) const BUCKETS: usize = 32;

    pub(crate) fn record(&self, took: Duration) {
        let micros = took.as_micros().min(u128::from(u32::MAX)) as u64;
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(Self::BUCKETS - 1)].add(1);
    }

    pub(crate) fn counts(&self) -> [u64; Self::BUCKETS] {
        std::array::from_fn(|bucket| self.buckets[bucket].get())
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::new()) }
    }
}

/// Something that happened in a pipeline.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum PipelineEvent {
    /// The pipeline began to drain: its sources have ended, or it was stopped.
    Draining,
    /// Sources were paused (`true`) or resumed.
    Paused(bool),
    /// A message failed; it is tried again after the delay, if there is one.
    Failed {
        /// The message's id, if it has one.
        id: Option<MessageId>,
        /// Tries so far.
        attempt: u32,
        /// The delay before the next.
        retry_in: Option<Duration>,
        /// How it failed.
        kind: FailureKind,
        /// Why, in words.
        reason: String,
    },
    /// A batch was closed.
    Batch {
        /// The batcher.
        batcher: String,
        /// How many items it has.
        len: usize,
        /// Why it was closed.
        trigger: Trigger,
    },
    /// [`Handler::prepare`](crate::Handler::prepare) returned an error; its
    /// messages are handled all the same.
    PrepareFailed {
        /// Why, in words.
        reason: String,
    },
    /// User code panicked; the panic was contained.
    Panic {
        /// Which code it was.
        hook: &'static str,
        /// The panic's message.
        message: String,
    },
    /// A handler has been running for longer than `handler_timeout`.
    Slow {
        /// The worker thread.
        thread: String,
        /// The message's id, if it has one.
        id: Option<MessageId>,
        /// For how long.
        running_for: Duration,
    },
    /// An acknowledger returned an error or panicked.
    AcknowledgeFailed {
        /// How many messages it was told of.
        count: usize,
        /// Why, in words.
        reason: String,
    },
    /// A worker thread died and is replaced.
    Restarting {
        /// The thread.
        thread: String,
        /// After this delay.
        delay: Duration,
        /// Why it died, in words.
        reason: String,
    },
    /// The pipeline failed; this is the cause.
    Escalated {
        /// The cause, in words.
        reason: String,
    },
    /// The pipeline ended; messages that were not settled are returned.
    Ended {
        /// How many were returned.
        returned: usize,
        /// Threads that still run.
        stuck: Vec<String>,
    },
}

impl Told for PipelineEvent {
    fn level(&self) -> log::Level {
        match self {
            PipelineEvent::Batch { .. } => log::Level::Debug,
            PipelineEvent::Draining | PipelineEvent::Paused(_) | PipelineEvent::Ended { .. } => {
                log::Level::Info
            }
            PipelineEvent::Failed { .. }
            | PipelineEvent::PrepareFailed { .. }
            | PipelineEvent::Slow { .. } => log::Level::Warn,
            PipelineEvent::Panic { .. }
            | PipelineEvent::AcknowledgeFailed { .. }
            | PipelineEvent::Restarting { .. }
            | PipelineEvent::Escalated { .. } => log::Level::Error,
        }
    }
}

impl fmt::Display for PipelineEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PipelineEvent::Draining => f.write_str("pipeline drains"),
            PipelineEvent::Paused(true) => f.write_str("pipeline paused"),
            PipelineEvent::Paused(false) => f.write_str("pipeline resumed"),
            PipelineEvent::Failed { id, attempt, retry_in, reason, .. } => {
                write!(f, "message {} failed at try {attempt}: {reason}", name(*id))?;
                match retry_in {
                    Some(delay) => write!(f, " (next try in {delay:.1?})"),
                    None => f.write_str(" (no further try)"),
                }
            }
            PipelineEvent::Batch { batcher, len, trigger } => {
                write!(f, "batcher {batcher}: {len} items by {trigger:?}")
            }
            PipelineEvent::PrepareFailed { reason } => write!(f, "preparing failed: {reason}"),
            PipelineEvent::Panic { hook, message } => write!(f, "{hook} panicked: {message}"),
            PipelineEvent::Slow { thread, id, running_for } => {
                write!(f, "{thread} has worked on message {} for {running_for:.1?}", name(*id))
            }
            PipelineEvent::AcknowledgeFailed { count, reason } => {
                write!(f, "acknowledging {count} messages failed: {reason}")
            }
            PipelineEvent::Restarting { thread, delay, reason } => {
                write!(f, "thread {thread} restarts in {delay:.1?}: {reason}")
            }
            PipelineEvent::Escalated { reason } => write!(f, "pipeline failed: {reason}"),
            PipelineEvent::Ended { returned, stuck } if stuck.is_empty() => {
                write!(f, "pipeline ended, {returned} messages returned")
            }
            PipelineEvent::Ended { returned, stuck } => {
                let stuck = stuck.join(", ");
                write!(f, "pipeline ended, {returned} messages returned, still running: {stuck}")
            }
        }
    }
}

fn name(id: Option<MessageId>) -> String {
    id.map_or_else(|| "without id".to_owned(), |id| id.to_string())
}
