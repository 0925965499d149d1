//! The manual: what the documentation of single items cannot say.
//!
//! - [`delivery`]: what happens to a message, from the socket to your thread.
//! - [`errors`]: which errors are retried, which end the client, and how.
//! - [`pipeline`]: stages, threads, queues, order, batches, flow and stop.
//! - [`failure`]: what fails, retries, acknowledgers, supervision.
//! - [`broadway`]: coming from Broadway, where everything is.
//! - [`defaults`]: every setting with its default and its reason.
//! - [`tuning`]: which setting moves which figure, and what it costs.

#[doc = include_str!("broadway.md")]
pub mod broadway {}
#[doc = include_str!("defaults.md")]
pub mod defaults {}
#[doc = include_str!("delivery.md")]
pub mod delivery {}
#[doc = include_str!("errors.md")]
pub mod errors {}
#[doc = include_str!("failure.md")]
pub mod failure {}
#[doc = include_str!("pipeline.md")]
pub mod pipeline {}
#[doc = include_str!("tuning.md")]
pub mod tuning {}
