//! The crate's events, and what `mio::event` is here.

#[path = "../../src/event.rs"]
mod real;

pub(crate) use crate::simnet::Source;
pub(crate) use real::*;
