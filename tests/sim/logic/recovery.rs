//! The crate's `logic/recovery.rs`, in a shell that can carry a planted bug.

#[path = "../../../src/logic/recovery.rs"]
mod real;
pub(crate) use real::*;
