//! The manual: what the documentation of single items cannot say.
//!
//! - [`delivery`]: what happens to a message, from the socket to your thread.
//! - [`errors`]: which errors are retried, which end the client, and how.
//! - [`defaults`]: every setting with its default and its reason.

#[doc = include_str!("defaults.md")]
pub mod defaults {}
#[doc = include_str!("delivery.md")]
pub mod delivery {}
#[doc = include_str!("errors.md")]
pub mod errors {}
