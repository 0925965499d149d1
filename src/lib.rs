#![doc = include_str!("../README.md")]

mod acknowledger;
mod block;
mod client;
mod config;
mod error;
mod event;
#[cfg(test)]
#[path = "../tests/fuzz/mod.rs"]
mod fuzz;
mod handler;
mod io;
mod logic;
pub mod manual;
mod message;
mod metrics;
mod pipeline;
mod sender;
pub mod sources;
#[cfg(feature = "testing")]
pub mod testing;
mod threads;
mod work;

pub use acknowledger::{Outcome, SocketAcknowledger};
pub use client::{Client, Messages, connect};
pub use config::{ClientBuilder, Dedup, WhileDown};
pub use crossbeam_channel;
pub use error::{BoxError, Error, ErrorKind, Recovery, Step};
pub use event::{Event, EventKind, State};
pub use handler::{Attempt, Data, Link, Outgoing, PassOn, Request, Resume, Session};
pub use logic::backoff::{Backoff, Jitter, Retry};
pub use logic::dedup::Processing;
pub use logic::overflow::Overflow;
pub use logic::rate::RateLimit;
pub use logic::restart::Intensity;
pub use message::{Block, Message, MessageId, Metadata};
pub use metrics::{
    ConnectionSnapshot, DropReason, Dropped, Ledger, PipelineLedger, Report, Snapshot,
};
pub use pipeline::{
    Batching, Pipeline, PipelineBuilder, PipelineReport, PipelineSnapshot, StageSnapshot,
    WorkerSnapshot,
};
pub use sender::{SendError, SendErrorReason, Sender};
pub use threads::pipeline::stats::PipelineEvent;
pub use work::{
    Acknowledgement, Acknowledger, Batch, ChannelAcknowledger, Failed, Failure, FailureKind,
    Handler, IntoSource, Next, NoAcknowledger, Pull, Settler, Source, Stop, Succeeded, Tag,
    Trigger,
};
