//! An existing thread pool, made by hand years ago, gets its work from a
//! WebSocket: it is put behind a handler, and not changed.
//!
//! ```text
//! cargo run --features testing --example legacy_pool
//! ```

#![allow(clippy::print_stdout, reason = "a program that shows what it gets")]

use std::error::Error;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use broadsock::testing::{Script, Server};
use broadsock::{
    Acknowledgement, ChannelAcknowledger, Client, Failure, Handler, Message, Next, Pipeline,
};

/// The legacy code: threads that take jobs from one queue. It knows neither
/// messages nor results.
struct LegacyPool {
    jobs: Option<mpsc::Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce() + Send>;

impl LegacyPool {
    fn start(count: usize) -> std::io::Result<LegacyPool> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let work = move |queue: Arc<Mutex<mpsc::Receiver<Job>>>| {
            loop {
                let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(job) = job else { break };
                job();
            }
        };
        let start = |n| {
            let queue = Arc::clone(&queue);
            thread::Builder::new().name(format!("legacy-{n}")).spawn(move || work(queue))
        };
        let threads = (0..count).map(start).collect::<Result<_, _>>()?;
        Ok(LegacyPool { jobs: Some(jobs), threads })
    }

    fn execute(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(Box::new(job));
        }
    }
}

impl Drop for LegacyPool {
    fn drop(&mut self) {
        self.jobs.take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The bridge: hands each message to the pool and waits for the outcome, so
/// that a message counts as processed when the pool has done it, and not
/// before. Its queue, which has no limit, never holds more than one job for
/// each processor.
struct Bridge(LegacyPool);

impl Handler for Bridge {
    type Item = ();

    fn handle_message(&self, message: &Message) -> Result<Next<()>, Failure> {
        let (tell, outcome) = mpsc::channel();
        let message = message.clone();
        self.0.execute(move || {
            let _ = tell.send(legacy_work(&message.to_string()));
        });
        // A job that is lost drops its sender.
        let done = outcome.recv().map_err(|_| "the pool lost the job")?;
        done.map_err(Failure::permanent)?;
        Ok(Next::done())
    }
}

fn legacy_work(text: &str) -> Result<(), String> {
    // What takes its time.
    thread::park_timeout(Duration::from_millis(20));
    let number: u32 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    let name = thread::current().name().unwrap_or_default().to_owned();
    println!("{name}  {number} squared is {}", u64::from(number).pow(2));
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let numbers = (1..=20).map(|n| if n == 13 { "thirteen".to_owned() } else { n.to_string() });
    let server = Server::script([Script::new().upgrade().send_all(numbers)]).start()?;
    let client = Client::builder(server.url()).start()?;

    const THREADS: usize = 3;
    let (acknowledger, outcomes) = ChannelAcknowledger::new(100);
    let pipeline = Pipeline::builder(Bridge(LegacyPool::start(THREADS)?))
        .source_with(client, acknowledger)
        // As many as the pool has threads: each waits for one.
        .processors(THREADS)
        .chunk(1)
        .start()?;

    for outcome in outcomes.iter().take(20) {
        if let Acknowledgement::Failed(failed) = outcome {
            println!("failed    {}: {}", failed.message, failed.failure);
        }
    }
    let report = pipeline.stop(Duration::from_secs(2));
    println!("ledger    {}", report.ledger);
    match (report.ledger.succeeded, report.ledger.failed) {
        (19, 1) => Ok(()),
        other => Err(format!("expected 19 successes and 1 failure, got {other:?}").into()),
    }
}
