//! A feed that drops, refuses, falls silent and repeats itself, and a program
//! that neither loses nor repeats a message of it.
//!
//! ```text
//! cargo run --features testing --example quickstart
//! cargo run --features testing --example quickstart -- URL [POINTER]
//! ```
//!
//! The first form brings its own server and takes about 10 seconds. The second
//! one connects to a feed of yours until Ctrl-C; POINTER, such as `/id`, says
//! where in a JSON message its id is.

#![allow(clippy::print_stderr, reason = "a program that shows what it does")]
#![allow(clippy::disallowed_methods, reason = "it runs in real time")]

use std::convert::Infallible;
use std::env;
use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use broadsock::crossbeam_channel::bounded;
use broadsock::testing::{Feed, Script, Server};
use broadsock::{Backoff, Client, Dedup, Event, EventKind, Message, Pipeline, State};

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let result = match arguments.next() {
        None => unruly_feed(),
        Some(url) => your_feed(&url, arguments.next()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("quickstart: {error}");
        ExitCode::FAILURE
    })
}

/// The main job: every message of an unruly feed, once, from the socket through
/// dedup and a pipeline to the last line of the accounts.
fn unruly_feed() -> Result<ExitCode, Box<dyn Error>> {
    let (server, feed) = start_server()?;
    show(format_args!(
        "A server sends {TOTAL} messages over connections that it cuts, refuses, closes or lets\n\
         fall silent, and begins each new one with repeats. The client reconnects and drops\n\
         the repeats, so that each message is delivered once. That takes about 10 seconds.\n\n"
    ));
    let screen = Arc::new(Screen::new());

    let narrator = Arc::clone(&screen);
    let client = Client::builder(server.url())
        .dedup(Dedup::by_pointer("/id"))
        .observer(move |event| told(event).iter().for_each(|line| narrator.line(line)))
        // Far less patient than the defaults, so that the show is short.
        .connect_timeout(Duration::from_millis(1000))
        .ping_interval(Duration::from_millis(500))
        .pong_timeout(Duration::from_millis(500))
        .backoff(Backoff::exponential(Duration::from_millis(250), Duration::from_secs(2)))
        .start()?;

    // Each message is handled once, on a worker thread, and accounted for.
    let tally = Arc::new(Mutex::new(Tally::default()));
    let (tell, complete) = bounded(1);
    let (counted, shown) = (Arc::clone(&tally), Arc::clone(&screen));
    let pipeline = Pipeline::each(move |message: &Message| {
        let id = id_of(message.text());
        shown.progress(&id);
        let mut tally = counted.lock().unwrap_or_else(PoisonError::into_inner);
        tally.count(&id);
        if tally.is_complete() {
            // Told once is enough.
            let _ = tell.try_send(());
        }
        Ok::<(), Infallible>(())
    })
    .source(client)
    .processors(1)
    .start()?;

    // Until all are here, or the client has failed and the pipeline with it ended.
    while !pipeline.has_ended() && complete.recv_timeout(Duration::from_millis(100)).is_err() {}
    let report = pipeline.stop(Duration::from_secs(2));
    let tally = tally.lock().unwrap_or_else(PoisonError::into_inner);

    screen.line(format_args!("pipeline: {}", report.ledger));
    let Some(client) = report.sources.into_iter().flatten().next() else {
        return Err("the client left no report".into());
    };
    screen.line(format_args!("ledger: {}", client.metrics.ledger));
    screen.line(format_args!(
        "{} attempts, {} connections, {} repeats sent by the server and dropped here",
        client.metrics.attempts(),
        client.metrics.connects(),
        client.metrics.ledger.duplicates,
    ));
    let balanced = client.metrics.ledger.balanced() && report.ledger.balanced();
    let perfect = tally.lost() == 0 && tally.repeated() == 0 && balanced;
    let opinion = if perfect { "all is well" } else { "something went wrong" };
    screen.line(format_args!(
        "verdict: {opinion}. The server sent {} of {TOTAL} messages; {} were delivered, {} lost \
         and {} repeated",
        feed.handed_out(),
        TOTAL - tally.lost(),
        tally.lost(),
        tally.repeated(),
    ));
    Ok(if perfect { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The same with a real feed, until Ctrl-C: messages to stdout, the rest to
/// stderr.
fn your_feed(url: &str, pointer: Option<String>) -> Result<ExitCode, Box<dyn Error>> {
    let mut builder = Client::builder(url)
        .observer(|event| told(event).iter().for_each(|line| eprintln!("{line}")));
    if let Some(pointer) = pointer {
        builder = builder.dedup(Dedup::by_pointer(pointer));
    }
    let client = Arc::new(builder.start()?);
    close_on_ctrl_c(&client)?;

    let mut out = io::stdout().lock();
    for message in &*client {
        if writeln!(out, "{message}").is_err() {
            // Nobody reads any more: `quickstart URL | head`.
            break;
        }
    }

    let report = client.close(Duration::from_secs(5));
    let (attempts, connects) = (report.metrics.attempts(), report.metrics.connects());
    eprintln!("ledger: {}", report.metrics.ledger);
    eprintln!("{attempts} attempts, {connects} connections");
    match report.error {
        Some(error) => Err(error.chain().into()),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Closing a client ends every loop over it, from whichever thread.
#[cfg(unix)]
fn close_on_ctrl_c(client: &Arc<Client>) -> io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};

    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let client = Arc::clone(client);
    thread::Builder::new().spawn(move || {
        if signals.forever().next().is_some() {
            client.close(Duration::from_secs(5));
        }
    })?;
    Ok(())
}

#[cfg(not(unix))]
fn close_on_ctrl_c(_: &Arc<Client>) -> io::Result<()> {
    Ok(())
}

/// How many messages the unruly feed has.
const TOTAL: usize = 48;

/// A server that does to each connection in turn what networks do.
fn start_server() -> io::Result<(Server, Feed)> {
    // Each new connection first gets the last 12 messages again, as services
    // do that would rather say something twice than lose it.
    let feed =
        Feed::new(TOTAL as u64, |n| format!(r#"{{"id":{n},"price":{}}}"#, 100 + n % 7)).replay(12);
    let twelve = || {
        (0..12).fold(Script::new().upgrade(), |script, _| {
            script.feed(&feed, 1).pause(Duration::from_millis(60))
        })
    };
    let server = Server::script([
        twelve().cut_mid_frame("the line goes dead in the middle of a message"),
        Script::new().status(503, [("Retry-After", "1")]),
        twelve().close(1001, "going away"),
        // Accepts, and never says a word.
        Script::new().silent(),
        // Falls silent with the connection open.
        twelve().half_open(),
        // The rest; should anything be missing, it is gone for good, and the
        // client says so rather than wait for ever.
        twelve().pause(Duration::from_secs(2)).close(1000, "that was all"),
        Script::new().status(410, []),
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
        EventKind::State { to: State::Closed, .. } => Some("closed".to_owned()),
        // What led to any other state is told by an event of its own.
        EventKind::State { .. } => None,
        other => Some(other.to_string()),
    }
}

/// The id in a message such as `{"id":7,"price":107}`.
fn id_of(text: Option<&str>) -> String {
    let json: Option<serde_json::Value> = text.and_then(|text| serde_json::from_str(text).ok());
    json.map_or_else(|| "?".to_owned(), |json| json["id"].to_string())
}

/// How often each message was seen.
struct Tally {
    seen: [u32; TOTAL],
}

impl Default for Tally {
    fn default() -> Self {
        Self { seen: [0; TOTAL] }
    }
}

impl Tally {
    fn count(&mut self, id: &str) {
        let index = id.parse::<usize>().ok();
        if let Some(times) = index.and_then(|index| self.seen.get_mut(index)) {
            *times += 1;
        }
    }

    fn is_complete(&self) -> bool {
        self.lost() == 0
    }

    fn lost(&self) -> usize {
        self.seen.iter().filter(|times| **times == 0).count()
    }

    fn repeated(&self) -> u32 {
        self.seen.iter().map(|times| times.saturating_sub(1)).sum()
    }
}

/// Prints from two threads: what happens a line each, progress along a line.
struct Screen {
    start: Instant,
    in_progress: Mutex<bool>,
}

impl Screen {
    fn new() -> Self {
        Self { start: Instant::now(), in_progress: Mutex::new(false) }
    }

    fn line(&self, text: impl fmt::Display) {
        let mut in_progress = self.in_progress.lock().unwrap_or_else(PoisonError::into_inner);
        let end = if std::mem::take(&mut *in_progress) { "\n" } else { "" };
        show(format_args!("{end}{:5.2}s  {text}\n", self.start.elapsed().as_secs_f64()));
    }

    fn progress(&self, id: &str) {
        let mut in_progress = self.in_progress.lock().unwrap_or_else(PoisonError::into_inner);
        let start =
            if std::mem::replace(&mut *in_progress, true) { "" } else { "        messages" };
        show(format_args!("{start} {id}"));
    }
}

/// Shows it at once. `print!` would panic when nobody looks any more, as in
/// `quickstart | head`.
fn show(text: fmt::Arguments<'_>) {
    let mut out = io::stdout().lock();
    let _ = out.write_fmt(text).and_then(|()| out.flush());
}
