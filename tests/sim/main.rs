//! The world: one seed drives the real threads of a client, and in every other
//! world those of a pipeline on it, through virtual time, against simulated
//! sockets, servers and programs, and every promise is checked at every step.
//!
//! The crate's own sources are compiled into this program, each under its own
//! name, so nothing of them has to be public for it. In the place of what they
//! touch stands a simulation with the same names: `mio`, `rand`, `socket2` and
//! `crossbeam_channel` are this program; `io/clock.rs`, `threads/watched.rs` and
//! the functions of `threads/mod.rs` have doubles here, and a small `client.rs` is
//! what a pipeline sees of its client. Threads are coroutines, run one at a time
//! in an order that the seed chooses: they change where they wait and, in some
//! worlds, where a pipeline's threads take a lock.
//!
//! - `kernel`: time, chance and coroutines; `channel`: what they wait on.
//! - `simnet`, `server`, `faults`: what goes wrong outside. `user`: user code of the
//!   client. `checks`: its promises.
//! - `works`: the pipeline. `plan` draws its shape and its troubles, `users` is the
//!   program's part (handlers, acknowledgers, sources, as well as they behave);
//!   `books` holds what they were told of each message against the promises, and
//!   `watch` the whole.
//! - `planted`: bugs that must be found, in shells around the crate's modules.
//! - `torture`: fails each fallible call in its turn.
//!
//! `SIM_SEED=n` replays one seed with its events, `SIM_SEEDS=n` runs that many,
//! `SIM_MINUTES=n` sets their length, `SIM_PLANTED=name` plants one bug,
//! `SIM_SEED=n SIM_AGAIN=name` replays a world tuned for what once went wrong, and
//! `SIM_FAULT=name` replays a run with a failing call. `settings` has them all, and
//! refuses what it cannot read with exit code 2.

#![allow(dead_code, unused, unreachable_pub, missing_docs, missing_debug_implementations)]
#![allow(clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]
#![allow(clippy::print_stderr, clippy::disallowed_methods, clippy::too_many_lines)]
#![allow(clippy::missing_errors_doc, clippy::missing_panics_doc)]

extern crate crossbeam_channel as crossbeam;
extern crate self as crossbeam_channel;
extern crate self as mio;
extern crate self as rand;
extern crate self as socket2;

#[path = "../../src/block.rs"]
mod block;
mod channel;
mod client;
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
#[path = "../../src/pipeline.rs"]
mod pipeline;
#[path = "../../src/sources.rs"]
mod sources;
mod threads;
#[path = "../../src/work.rs"]
mod work;

mod checks;
mod faults;
mod kernel;
mod planted;
mod scene;
mod server;
mod settings;
mod simnet;
mod torture;
mod user;
mod works;
mod world;

pub(crate) use channel::{
    Receiver, RecvError, RecvTimeoutError, Select, SendError, Sender, TryRecvError, TrySendError,
    at, bounded, never, select,
};
pub(crate) use kernel::random;
pub(crate) use simnet::{Events, Interest, Poll, SockRef, Token, Waker, net};

fn main() {
    std::process::exit(world::main());
}
