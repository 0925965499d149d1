//! A scripted WebSocket server on the loopback interface, for tests.
//!
//! A [`Server`] runs one [`Script`] for each connection it accepts: it answers
//! as a good server does, or refuses, dribbles, floods, falls silent, breaks
//! off in the middle of a frame, each exactly when the script says so. It
//! records every upgrade request and everything that clients send, counts
//! connections, and can go away and come back on the same port.
//!
//! ```
//! use std::time::Duration;
//! use broadsock::testing::{Script, Server};
//!
//! let server = Server::script([
//!     Script::new().upgrade().send("a").cut(),                 // the first connection
//!     Script::new().status(503, [("Retry-After", "1")]),       // the second
//!     Script::new().upgrade().expect("hi").send("b").hold(),   // all others
//! ])
//! .start()?;
//!
//! let (mut first, _) = tungstenite::connect(server.url())?;
//! assert_eq!(first.read()?, "a".into());
//! assert!(first.read().is_err());
//! assert!(tungstenite::connect(server.url()).is_err());
//! let (mut third, _) = tungstenite::connect(server.url())?;
//! third.send("hi".into())?;
//! assert_eq!(third.read()?, "b".into());
//!
//! assert_eq!(server.stats().accepted, 3);
//! assert_eq!(server.texts(), ["hi"]);
//! drop(third);
//! assert!(server.wait_live(0, Duration::from_secs(5)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! For pipelines without any socket there are a [`source()`] fed by hand, a
//! [`TestAcknowledger`] to wait on, a [`TestMessage`], and [`kill_worker`].
//!
//! Each open connection costs a thread and three descriptors; dropping the
//! server ends all of them. Threads are named `broadsock-test-...`.

mod accept;
mod feed;
mod frame;
mod handle;
mod peer;
mod pipeline;
mod play;
mod record;
mod script;
mod server;
mod shared;
mod stream;
mod talk;
#[cfg(feature = "tls")]
mod tls;
mod upgrade;

pub use feed::Feed;
pub use pipeline::{
    Group, TestAcknowledger, TestFeed, TestMessage, TestSource, kill_worker, source,
};
pub use record::{Payload, Received, Record, Request, Stats};
pub use script::Script;
pub use server::{Server, ServerBuilder};
pub use upgrade::Upgrade;

#[allow(
    clippy::disallowed_methods,
    reason = "a server on real sockets runs on real time, whatever clock its client is on"
)]
fn now() -> std::time::Instant {
    std::time::Instant::now()
}
