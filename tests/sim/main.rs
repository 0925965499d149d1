//! The world: one seed drives the client's real threads through virtual time,
//! against simulated sockets, servers and programs, and every promise is checked
//! at every step.
//!
//! The crate's own sources are compiled into this program, each under its own
//! name, so nothing of them has to be public for it. In the place of what they
//! touch stands a simulation with the same names: `mio` and `rand` are this
//! program, and `io/clock.rs`, `threads/timer.rs` and the functions of
//! `threads/mod.rs` have doubles here. Threads are coroutines, run one at a
//! time in an order that the seed chooses.
//!
//! `SIM_SEED=n` replays one seed with its events, `SIM_SEEDS=n` runs that many,
//! `SIM_MINUTES=n` sets their length, `SIM_PLANTED=name` plants one bug, and
//! `SIM_FAULT=name` replays a run with a failing call.

#![allow(dead_code, unused, unreachable_pub, missing_docs, missing_debug_implementations)]
#![allow(clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]
#![allow(clippy::print_stderr, clippy::disallowed_methods, clippy::too_many_lines)]
#![allow(clippy::missing_errors_doc, clippy::missing_panics_doc)]

extern crate self as mio;
extern crate self as rand;
extern crate self as socket2;

#[path = "../../src/block.rs"]
mod block;
#[path = "../../src/error.rs"]
mod error;
mod event;
#[path = "../../src/handler.rs"]
mod handler;
mod io;
mod logic;
mod message;
#[path = "../../src/metrics.rs"]
mod metrics;
mod threads;
#[path = "../../src/work.rs"]
mod work;

mod checks;
mod faults;
mod kernel;
mod pipeline;
mod planted;
mod scene;
mod server;
mod simnet;
mod torture;
mod user;
mod world;

pub(crate) use kernel::random;
pub(crate) use simnet::{Events, Interest, Poll, SockRef, Token, Waker, net};

fn main() {
    std::process::exit(world::main());
}
