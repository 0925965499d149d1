//! A misbehaving feed of orders and prices, worked through by a pipeline that
//! processes every message exactly once and acknowledges it on its socket.
//!
//! ```text
//! server ──> client ──> 4 processors ──> batcher "orders" (10 each) ──> acknowledgements,
//! (drops,    (dedup)    (one account      batcher "prices" (256 B)       on the socket that
//!  replays)              stays in order)                                 delivered
//!
//! cargo run --features testing --example pipeline
//! ```
//!
//! Takes about 10 seconds. Ends with status 1 unless every id that the server
//! sent was processed exactly once.

#![allow(clippy::disallowed_methods, reason = "it runs in real time")]

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use broadsock::crossbeam_channel::{never, select, tick};
use broadsock::testing::{Feed, Script, Server};
use broadsock::{
    Backoff, Batch, Batching, Client, Dedup, Event, EventKind, Failure, Handler, Message, Next,
    Outcome, Pipeline, PipelineEvent, PipelineReport, SocketAcknowledger, State,
};
use serde_json::Value;

/// How many messages the feed has.
const TOTAL: u64 = 1200;

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        Screen::new().line(format_args!("pipeline: {error}"));
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let (server, feed) = start_server()?;
    let client = Client::builder(server.url())
        .dedup(Dedup::by_pointer("/id"))
        // Far less patient than the defaults, so that the show is short.
        .connect_timeout(Duration::from_secs(1))
        .ping_interval(Duration::from_millis(500))
        .pong_timeout(Duration::from_millis(500))
        .backoff(Backoff::exponential(Duration::from_millis(250), Duration::from_secs(1)))
        .start()?;
    let acknowledger = SocketAcknowledger::new(&client, |outcome| match outcome {
        Outcome::Succeeded(done) => Some(format!("ack {}", id_of(&done.message)?)),
        // The service would send it again.
        Outcome::Failed(_) => None,
    });
    let mut network = client.events();

    let books = Books::default();
    let processed = books.processed.clone();
    let pipeline = Pipeline::builder(books)
        .source_with(client, acknowledger.clone())
        .processors(4)
        .partition_by(account_of)
        .batcher("orders", Batching::new().size(10).timeout(Duration::from_millis(200)))
        .batcher("prices", Batching::new().size_by(256, |entry: &Entry| entry.text.len()))
        .retries(5, Backoff::constant(Duration::from_millis(20)))
        .start()?;

    let mut screen = Screen::new();
    for line in pipeline.topology().lines() {
        screen.line(line);
    }
    let events = pipeline.events();
    let (refresh, limit) = (tick(Duration::from_millis(100)), Duration::from_secs(60));
    while processed.different() < TOTAL && screen.start.elapsed() < limit {
        select! {
            recv(network) -> event => match event {
                Ok(event) => told(&event).iter().for_each(|line| screen.line(line)),
                Err(_) => network = never(),
            },
            recv(events) -> event => match event {
                Ok(event @ PipelineEvent::Escalated { .. }) => screen.line(event),
                Ok(_) => {}
                // The pipeline has ended, which it should not by itself.
                Err(_) => break,
            },
            recv(refresh) -> _ => screen.status(&pipeline, acknowledger.sent()),
        }
    }

    let report = pipeline.stop(Duration::from_secs(5));
    let perfect = tell(&mut screen, &report, &acknowledger, &server);
    let sent = feed.handed_out();
    let (lost, repeated) = processed.against(sent);
    screen.line(format_args!("{sent} ids sent by the server: lost={lost} repeated={repeated}"));
    let perfect = perfect && sent == TOTAL && lost == 0 && repeated == 0;
    Ok(if perfect { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the report; says whether it is a clean one.
fn tell(
    screen: &mut Screen,
    report: &PipelineReport,
    acknowledger: &SocketAcknowledger,
    server: &Server,
) -> bool {
    let acknowledged = server.texts().len();
    screen.line(format_args!("pipeline: {}", report.ledger));
    if let Some(Some(client)) = report.sources.first() {
        screen.line(format_args!("client:   {}", client.metrics.ledger));
    }
    screen.line(format_args!(
        "acknowledgements: {} sent, {} too late for their socket, {acknowledged} at the server",
        acknowledger.sent(),
        acknowledger.late(),
    ));
    if let Some(error) = &report.error {
        screen.line(format_args!("failed: {}", error.chain()));
    }
    let ledger = report.ledger;
    // A text may be lost with its socket; none arrives that was not sent.
    acknowledged as u64 <= acknowledger.sent()
        && report.error.is_none()
        && report.stuck.is_empty()
        && ledger.balanced()
        && ledger.failed + ledger.returned == 0
}

/// The program's own work: books orders and prices, in batches.
#[derive(Default)]
struct Books {
    processed: Processed,
    calls: AtomicU64,
}

/// One entry on its way into the books.
struct Entry {
    id: u64,
    text: String,
}

impl Handler for Books {
    type Item = Entry;

    fn handle_message(&self, message: &Message) -> Result<Next<Entry>, Failure> {
        // Now and then the store is busy: `?` and `Err` have the message tried
        // again.
        if self.calls.fetch_add(1, Ordering::Relaxed) % 97 == 96 {
            return Err(Failure::new("the store is busy"));
        }
        let json: Value = serde_json::from_slice(message.as_bytes())?;
        let id = json["id"].as_u64().ok_or("no id")?;
        let entry = Entry { id, text: message.to_string() };
        Ok(match json["kind"].as_str() {
            Some("order") => Next::to("orders", entry),
            _ => Next::to("prices", entry),
        })
    }

    fn handle_batch(&self, batch: &mut Batch<Entry>) -> Result<(), Failure> {
        self.processed.add(batch.items().map(|entry| entry.id));
        Ok(())
    }
}

/// How often each id was processed.
#[derive(Default, Clone)]
struct Processed(Arc<Mutex<BTreeMap<u64, u32>>>);

impl Processed {
    fn add(&self, ids: impl Iterator<Item = u64>) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ids.for_each(|id| *times.entry(id).or_default() += 1);
    }

    fn different(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// How many of the ids below `sent` are missing, and how many processings
    /// there were too many.
    fn against(&self, sent: u64) -> (u64, u64) {
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = (0..sent).filter(|id| !times.contains_key(id)).count() as u64;
        let all: u64 = times.values().map(|times| u64::from(*times)).sum();
        (lost, all - times.range(..sent).count() as u64)
    }
}

fn id_of(message: &Message) -> Option<u64> {
    serde_json::from_slice::<Value>(message.as_bytes()).ok()?["id"].as_u64()
}

/// Messages of one account stay in order.
fn account_of(message: &Message) -> u64 {
    let json = serde_json::from_slice::<Value>(message.as_bytes());
    json.ok().and_then(|json| json["account"].as_u64()).unwrap_or(0)
}

/// A server that does to each connection in turn what networks do. It sends its
/// last messages again to each new one, as services do that count on
/// acknowledgements and have not seen all of them.
fn start_server() -> io::Result<(Server, Feed)> {
    let feed = Feed::new(TOTAL, |n| {
        let kind = if n % 3 == 0 { "order" } else { "price" };
        format!(r#"{{"id":{n},"account":{},"kind":"{kind}"}}"#, n % 11)
    })
    .replay(300);
    let some = |of: u32| {
        (0..of).fold(Script::new().upgrade(), |script, _| {
            script.feed(&feed, 10).pause(Duration::from_millis(33))
        })
    };
    let server = Server::script([
        some(30).cut_mid_frame("the line goes dead in the middle of a message"),
        Script::new().status(503, [("Retry-After", "1")]),
        some(25).close(1001, "going away"),
        // Accepts, and never says a word.
        Script::new().silent(),
        // Falls silent with the connection open.
        some(30).half_open(),
        // The rest.
        some(60).hold(),
    ])
    .start()?;
    Ok((server, feed))
}

/// What of an event is worth a line here.
fn told(event: &Event) -> Option<String> {
    match &event.kind {
        EventKind::State { to: State::Connected, .. } => {
            Some(format!("connected, on socket {}", event.epoch))
        }
        EventKind::State { .. } => None,
        other => Some(other.to_string()),
    }
}

/// Lines, and on a terminal a status line below them; elsewhere the status is a
/// line of its own, once a second.
struct Screen {
    start: Instant,
    live: bool,
    next: Duration,
}

impl Screen {
    fn new() -> Self {
        Self { start: Instant::now(), live: io::stdout().is_terminal(), next: Duration::ZERO }
    }

    fn line(&self, text: impl fmt::Display) {
        let clear = if self.live { "\r\x1b[K" } else { "" };
        self.show(format_args!("{clear}{:5.2}s  {text}\n", self.start.elapsed().as_secs_f64()));
    }

    fn status(&mut self, pipeline: &Pipeline, acknowledged: u64) {
        let now = self.start.elapsed();
        if !self.live && now < self.next {
            return;
        }
        self.next = now + Duration::from_secs(1);
        let metrics = pipeline.metrics();
        let queued: usize = metrics.stages.iter().map(|stage| stage.queued).sum();
        let text = format!(
            "{}/{TOTAL} processed, {queued} queued, {} retries, {acknowledged} acknowledged",
            metrics.ledger.succeeded, metrics.retries,
        );
        if self.live {
            self.show(format_args!("\r\x1b[K{:5.2}s  {text}", now.as_secs_f64()));
        } else {
            self.line(text);
        }
    }

    /// `print!` would panic when nobody looks any more, as in `pipeline | head`.
    fn show(&self, text: fmt::Arguments<'_>) {
        let mut out = io::stdout().lock();
        let _ = out.write_fmt(text).and_then(|()| out.flush());
    }
}
