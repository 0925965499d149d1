//! A client among other channels: `select!` over messages, a ticker and a stop.
//!
//! ```text
//! cargo run --features testing --example select
//! ```

#![allow(clippy::print_stdout, reason = "a program that shows what it gets")]

use std::error::Error;
use std::thread;
use std::time::Duration;

use broadsock::crossbeam_channel::{bounded, select, tick};
use broadsock::testing::{Script, Server};

fn main() -> Result<(), Box<dyn Error>> {
    // A server that sends a number now and then.
    let server = Server::script([numbers(40)]).start()?;
    let client = broadsock::connect(server.url())?;

    // Any other part of the program that may end the loop.
    let (stop, stopped) = bounded::<()>(0);
    let boss = thread::Builder::new().spawn(move || {
        thread::park_timeout(Duration::from_millis(2500));
        drop(stop);
    })?;

    let every_second = tick(Duration::from_secs(1));
    let mut total = 0;
    loop {
        select! {
            // What arrived together comes as one block: take each message of it.
            recv(client.receiver()) -> block => match block {
                Ok(block) => for message in block {
                    println!("message  {message}");
                    total += 1;
                },
                // Closed or failed, and nothing is left.
                Err(_) => break,
            },
            recv(every_second) -> _ => println!("tick     {total} messages so far"),
            recv(stopped) -> _ => {
                println!("stop     asked for by another thread");
                break;
            }
        }
    }
    boss.join().map_err(|_| "the thread that stops the loop panicked")?;

    let report = client.close(Duration::from_secs(2));
    println!("ledger   {}", report.metrics.ledger);
    match report.error {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

/// Sends the numbers from 0, one every 300 ms.
fn numbers(count: u64) -> Script {
    let pause = Duration::from_millis(300);
    (0..count).fold(Script::new().upgrade(), |script, n| script.send(&n.to_string()).pause(pause))
}
