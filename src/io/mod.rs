//! What the crate touches: clock, sockets, TLS, the WebSocket handshake.

pub(crate) mod clock;
pub(crate) mod dial;
mod feed;
mod frame;
pub(crate) mod poll;
pub(crate) mod socket;
pub(crate) mod target;
pub(crate) mod tls;
pub(crate) mod upgrade;
pub(crate) mod websocket;
