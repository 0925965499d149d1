#![doc = include_str!("../README.md")]

mod client;
mod config;
mod error;
mod event;
mod handler;
mod io;
mod logic;
pub mod manual;
mod message;
mod metrics;
mod sender;
#[cfg(feature = "testing")]
pub mod testing;
mod threads;

pub use client::{Client, Messages, connect};
pub use config::{ClientBuilder, Dedup, WhileDown};
pub use crossbeam_channel;
pub use error::{BoxError, Error, ErrorKind, Recovery, Step};
pub use event::{Event, EventKind, State};
pub use handler::{Attempt, Data, Link, Outgoing, PassOn, Request, Resume, Session};
pub use logic::backoff::{Backoff, Jitter, Retry};
pub use logic::dedup::Processing;
pub use logic::overflow::Overflow;
pub use logic::restart::Intensity;
pub use message::{Block, Message, MessageId, Metadata};
pub use metrics::{ConnectionSnapshot, DropReason, Dropped, Ledger, Report, Snapshot};
pub use sender::{SendError, SendErrorReason, Sender};
