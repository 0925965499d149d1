//! What the crate decides: pure functions of their inputs and of `now`.
//!
//! Nothing in here names a clock, a thread, a socket, a channel, a source of
//! randomness or a logger; chance comes in as a number in `[0, 1)`.
