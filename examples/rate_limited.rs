//! A flood that is worked off at a limited rate, which changes on the way.
//!
//! ```text
//! cargo run --features testing --example rate_limited
//! ```

#![allow(clippy::print_stdout, reason = "a program that shows what it gets")]

use std::error::Error;
use std::time::Duration;

use broadsock::crossbeam_channel::tick;
use broadsock::testing::{Script, Server};
use broadsock::{Client, Message, Pipeline, RateLimit};

const TOTAL: u64 = 400;

fn main() -> Result<(), Box<dyn Error>> {
    // Sends everything at once.
    let server = Server::script([Script::new().upgrade().numbers(0..TOTAL)]).start()?;
    let client = Client::builder(server.url()).start()?;

    // 50 a second, and no more than 5 at once, whatever the number of workers.
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .source(client)
        .rate_limit(RateLimit::token_bucket(50.0, 5))
        .start()?;

    let mut before = 0;
    for (half_seconds, _) in tick(Duration::from_millis(500)).iter().enumerate() {
        let done = pipeline.metrics().ledger.succeeded;
        println!("{} in half a second, {done} of {TOTAL} so far", done - before);
        before = done;
        if done == TOTAL {
            break;
        }
        if half_seconds == 3 {
            pipeline.set_rate_limit(RateLimit::token_bucket(200.0, 20))?;
            println!("the limit is now {:?}", pipeline.rate_limit());
        }
    }

    let report = pipeline.stop(Duration::from_secs(2));
    println!("ledger: {}", report.ledger);
    match report.error {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}
