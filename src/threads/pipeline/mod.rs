//! The threads of a pipeline, and what they share.
//!
//! ```text
//!  source ──> lanes ──> processors ──> batcher ──> batch workers ──> settle
//!  (one for    (one, or   handle_       groups by    handle_batch      ledger, acknowledger,
//!   each)       one for    message       key, size,                    dedup, room for more
//!               each                     time
//!               worker)
//! ```
//!
//! Queues and everything a worker has in hand live in [`Flow`], not on a
//! thread's stack: a worker that dies takes nothing with it. Whatever becomes
//! of them, the [`Register`] knows every message that is not settled.

pub(crate) mod batcher;
pub(crate) mod chunk;
mod flow;
pub(crate) mod inbox;
pub(crate) mod pool;
pub(crate) mod processor;
pub(crate) mod register;
pub(crate) mod settle;
pub(crate) mod source;
pub(crate) mod stats;
pub(crate) mod supervisor;

pub(crate) use super::lock;
pub(crate) use flow::{
    Ending, Flow, FlowPolicy, Lane, Partition, Phase, Retries, Retry, Room, SourceSlot, Tick, count,
};
