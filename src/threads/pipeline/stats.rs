//! What a pipeline counts of its workers, and the events it tells.

use std::fmt;
use std::time::Duration;

use crate::event::counted;
use crate::message::Metadata;
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
    /// Microseconds in all.
    sum: Counter,
}

impl Histogram {
    /// The last one holds everything from 2^30 microseconds (18 minutes) on.
    pub(crate) const BUCKETS: usize = 32;

    /// `count` times the same duration.
    pub(crate) fn record(&self, took: Duration, count: u64) {
        let micros = took.as_micros().min(u128::from(u32::MAX)) as u64;
        self.sum.add(micros * count);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.buckets[bucket.min(Self::BUCKETS - 1)].add(count);
    }

    pub(crate) fn sum(&self) -> Duration {
        Duration::from_micros(self.sum.get())
    }

    pub(crate) fn counts(&self) -> [u64; Self::BUCKETS] {
        std::array::from_fn(|bucket| self.buckets[bucket].get())
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: std::array::from_fn(|_| Counter::new()), sum: Counter::new() }
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
    /// The first event: the threads are started next.
    Started {
        /// What [`Pipeline::topology`](crate::Pipeline::topology) says.
        topology: String,
    },
    /// A processor begins a chunk of messages. Only told while somebody listens.
    ChunkStarted {
        /// The worker thread.
        thread: String,
        /// How many messages it has.
        len: usize,
    },
    /// A processor has handled its chunk. Only told while somebody listens.
    ChunkDone {
        /// The worker thread.
        thread: String,
        /// How many messages it had.
        len: usize,
        /// How long it took, handlers and waits for batchers.
        took: Duration,
    },
    /// A message failed; it is tried again after the delay, if there is one.
    Failed {
        /// Which message it is.
        message: Metadata,
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
    /// A worker begins a batch. Only told while somebody listens.
    BatchStarted {
        /// The worker thread.
        thread: String,
        /// The batcher.
        batcher: String,
        /// How many items it has.
        len: usize,
    },
    /// A worker has handled its batch. Only told while somebody listens.
    BatchDone {
        /// The worker thread.
        thread: String,
        /// The batcher.
        batcher: String,
        /// How many items it had.
        len: usize,
        /// Whether any of them failed.
        failed: bool,
        /// How long the handler took.
        took: Duration,
    },
    /// Messages of a source were settled, and its acknowledger, if it has one, was
    /// told of them. Only told while somebody listens.
    Acknowledged {
        /// The number of their source, from 0.
        source: usize,
        /// How many succeeded.
        succeeded: usize,
        /// How many failed.
        failed: usize,
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
        /// Which message it is: the first one of a batch.
        message: Option<Metadata>,
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
            _ if self.is_fine() => log::Level::Trace,
            PipelineEvent::Started { .. }
            | PipelineEvent::Draining
            | PipelineEvent::Paused(_)
            | PipelineEvent::Ended { .. } => log::Level::Info,
            PipelineEvent::Failed { .. }
            | PipelineEvent::Slow { .. }
            | PipelineEvent::PrepareFailed { .. } => log::Level::Warn,
            _ => log::Level::Error,
        }
    }

    fn is_fine(&self) -> bool {
        matches!(
            self,
            PipelineEvent::ChunkStarted { .. }
                | PipelineEvent::ChunkDone { .. }
                | PipelineEvent::BatchStarted { .. }
                | PipelineEvent::BatchDone { .. }
                | PipelineEvent::Acknowledged { .. }
        )
    }
}

impl fmt::Display for PipelineEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PipelineEvent::Draining => f.write_str("pipeline drains"),
            PipelineEvent::Paused(true) => f.write_str("pipeline paused"),
            PipelineEvent::Paused(false) => f.write_str("pipeline resumed"),
            PipelineEvent::Started { topology } => {
                write!(f, "pipeline started: {}", topology.replace('\n', "; "))
            }
            PipelineEvent::ChunkStarted { thread, len } => {
                write!(f, "{thread} begins {}", counted(*len, "message"))
            }
            PipelineEvent::ChunkDone { thread, len, took } => {
                write!(f, "{thread} has handled {} in {took:.1?}", counted(*len, "message"))
            }
            PipelineEvent::BatchStarted { thread, batcher, len } => {
                write!(f, "{thread} begins {} of {batcher}", counted(*len, "item"))
            }
            PipelineEvent::BatchDone { thread, batcher, len, failed, took } => {
                let how = if *failed { ", not all well" } else { "" };
                let items = counted(*len, "item");
                write!(f, "{thread} has handled {items} of {batcher} in {took:.1?}{how}")
            }
            PipelineEvent::Acknowledged { source, succeeded, failed } => {
                write!(f, "settled for source {source}: {succeeded} good, {failed} failed")
            }
            PipelineEvent::Failed { message, attempt, retry_in, reason, .. } => {
                write!(f, "message {} failed at try {attempt}: {reason}", name(message))?;
                match retry_in {
                    Some(delay) => write!(f, " (next try in {delay:.1?})"),
                    None => f.write_str(" (no further try)"),
                }
            }
            PipelineEvent::Batch { batcher, len, trigger } => {
                write!(f, "batcher {batcher}: {} by {trigger:?}", counted(*len, "item"))
            }
            PipelineEvent::PrepareFailed { reason } => write!(f, "preparing failed: {reason}"),
            PipelineEvent::Panic { hook, message } => write!(f, "{hook} panicked: {message}"),
            PipelineEvent::Slow { thread, message, running_for } => {
                let message = message.as_ref().map_or_else(|| "?".to_owned(), name);
                write!(f, "{thread} has worked on message {message} for {running_for:.1?}")
            }
            PipelineEvent::AcknowledgeFailed { count, reason } => {
                write!(f, "acknowledging {} failed: {reason}", counted(*count, "message"))
            }
            PipelineEvent::Restarting { thread, delay, reason } => {
                write!(f, "thread {thread} restarts in {delay:.1?}: {reason}")
            }
            PipelineEvent::Escalated { reason } => write!(f, "pipeline failed: {reason}"),
            PipelineEvent::Ended { returned, stuck } if stuck.is_empty() => {
                write!(f, "pipeline ended, {} returned", counted(*returned, "message"))
            }
            PipelineEvent::Ended { returned, stuck } => {
                let stuck = stuck.join(", ");
                let returned = counted(*returned, "message");
                write!(f, "pipeline ended, {returned} returned, still running: {stuck}")
            }
        }
    }
}

fn name(message: &Metadata) -> String {
    let Metadata { connection, epoch, sequence, .. } = message;
    match message.id {
        Some(id) => id.to_string(),
        None => format!("{sequence} of connection {connection} epoch {epoch}"),
    }
}
