//! The crate's `threads/pipeline/`; some modules are in shells that can carry a
//! planted bug.

#[path = "../../../src/threads/pipeline/batcher.rs"]
pub(crate) mod batcher;
pub(crate) mod chunk;
#[path = "../../../src/threads/pipeline/flow.rs"]
mod flow;
pub(crate) mod inbox;
pub(crate) mod pool;
#[path = "../../../src/threads/pipeline/processor.rs"]
pub(crate) mod processor;
pub(crate) mod register;
#[path = "../../../src/threads/pipeline/settle.rs"]
pub(crate) mod settle;
#[path = "../../../src/threads/pipeline/source.rs"]
pub(crate) mod source;
#[path = "../../../src/threads/pipeline/stats.rs"]
pub(crate) mod stats;
#[path = "../../../src/threads/pipeline/supervisor.rs"]
pub(crate) mod supervisor;

pub(crate) use super::lock;
pub(crate) use flow::{
    Ending, Flow, FlowPolicy, Lane, Partition, Phase, Retries, Retry, Room, SourceSlot, Tick, count,
};
