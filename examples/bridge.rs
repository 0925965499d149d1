//! A bridge into a code base that knows no channels: a plain callback, called
//! on one thread, from a connection that stays up.
//!
//! ```text
//! cargo run --features testing --example bridge
//! ```

#![allow(clippy::print_stdout, reason = "a program that shows what it gets")]

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use broadsock::testing::{Script, Server};
use broadsock::{Client, Report};

/// The legacy code. It cannot be changed; all it offers is this callback.
#[derive(Default)]
struct PriceBoard {
    changes: usize,
}

impl PriceBoard {
    fn on_message(&mut self, text: &str) {
        self.changes += 1;
        println!("board shows {text}");
    }
}

/// The bridge: a client, and the thread that feeds its messages to a callback.
struct Bridge {
    client: Arc<Client>,
    thread: JoinHandle<PriceBoard>,
}

impl Bridge {
    fn start(client: Client, mut board: PriceBoard) -> io::Result<Bridge> {
        let client = Arc::new(client);
        let messages = Arc::clone(&client);
        let thread = thread::Builder::new().name("bridge".to_owned()).spawn(move || {
            // Ends when the client is closed, after the last message.
            for message in &*messages {
                if let Some(text) = message.text() {
                    board.on_message(text);
                }
            }
            board
        })?;
        Ok(Bridge { client, thread })
    }

    /// Closes the connection, lets the callback have what has arrived, and
    /// gives the board back.
    fn stop(self) -> Result<(PriceBoard, Report), Box<dyn Error>> {
        self.client.close(Duration::from_secs(2));
        let board = self.thread.join().map_err(|_| "the callback panicked")?;
        // A second close does nothing more: it tells how things stand now.
        Ok((board, self.client.close(Duration::ZERO)))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // A server that goes away and comes back while the board is up.
    let server = Server::script([
        Script::new().upgrade().send_all(["AAPL 231.30", "MSFT 417.11"]).close(1001, "restarting"),
        Script::new().upgrade().send_all(["AAPL 231.42", "MSFT 416.90"]).hold(),
    ])
    .start()?;

    let client = Client::builder(server.url()).start()?;
    let bridge = Bridge::start(client, PriceBoard::default())?;
    // Here the legacy program goes about its own business.
    thread::park_timeout(Duration::from_millis(1500));

    let (board, report) = bridge.stop()?;
    println!("board changed {} times; ledger: {}", board.changes, report.metrics.ledger);
    match report.error {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}
