//! The shortest program: connect, and take messages with a `for` loop.
//!
//! The server drops the connection half way; the loop does not notice.
//!
//! ```text
//! cargo run --features testing --example iterate
//! ```

#![allow(clippy::print_stdout, reason = "a program that shows what it gets")]

use std::error::Error;

use broadsock::testing::{Script, Server};

fn main() -> Result<(), Box<dyn Error>> {
    // A server that ends its first connection after three messages. Yours is
    // somewhere else, and all you need of this line is its URL.
    let server = Server::script([
        Script::new().upgrade().send_all(["one", "two", "three"]).close(1001, "moving on"),
        Script::new().upgrade().send_all(["four", "five", "bye"]).hold(),
    ])
    .start()?;

    let client = broadsock::connect(server.url())?;
    for message in &client {
        println!("{message}");
        if message.text() == Some("bye") {
            return Ok(());
        }
    }
    // The loop ends by itself only when the client has failed or was closed.
    match client.error() {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}
