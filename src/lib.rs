//! WebSocket connections that stay up, for threads.

mod error;
#[allow(unused)]
mod logic;

pub use error::{BoxError, Error, ErrorKind, Recovery, Step};
