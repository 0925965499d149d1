//! A feed with every fault at once, worked through by a pipeline for as long as
//! you like, and the accounts at the end.
//!
//! ```text
//! ws server  ─┐                       ┌─ processor ─┐
//!             ├─> client (dedup) ─────┤             ├─> batches ──> acknowledgements
//! wss server ─┘                       └─ processor ─┘
//!
//! cargo run --release --features testing --example soak             10 seconds
//! cargo run --release --features testing --example soak -- 600      ten minutes
//! ```
//!
//! Both servers share one feed, repeat themselves to every new connection, and
//! take the faults of `faults` in turn; the handler fails and panics now and
//! then. After that time a server without faults lets the rest arrive. Ends
//! with status 1 if a message is missing or was processed twice, if a ledger
//! does not balance, if a server saw two connections at once or a breach of the
//! protocol, or if threads, descriptors or memory are left behind. Ctrl-C ends
//! that time early, with the same accounts; a second one ends the program (on Unix).
//!
//! A ledger says where each message is: of those a client has `received`, it
//! dropped `duplicates`, it `accepted` the others, and the program has those
//! `delivered`; a pipeline's end as `succeeded`, `failed`, or `returned` at the stop.
//! Further down,
//! - `sent` are the messages with an id that the feed has handed out, each once;
//! - `others` are messages without an id that were processed: some faults need them,
//!   and as nobody sends one again, a loss of them is no fault;
//! - `lost` are ids that were not processed, `repeated` the times too many;
//! - `acknowledged` are acknowledgements handed to the socket that brought their
//!   message, `late` those left out because that socket was gone.

#![allow(clippy::disallowed_methods, reason = "it runs in real time")]

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::panic;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use broadsock::testing::{Feed, Script, Server};
use broadsock::{
    Backoff, Batch, Batching, Client, Dedup, Event, EventKind, Failure, Handler, Intensity,
    Message, Next, Outcome, Pipeline, PipelineReport, Request, SocketAcknowledger,
};

type Anything = Box<dyn std::error::Error>;

/// New messages of one connection; each further one gets the last of them again,
/// so that a loss would take as many connections in a row as the second has of
/// the first.
const NEW: u64 = 400;
const REPLAY: u64 = 10 * NEW;

/// Memory that a run may grow by between its first third and its end: caches
/// that fill, and what the servers note of each request.
const GROWTH: u64 = 32 << 20;

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).map_or(Ok(10), |text| text.parse());
    let Ok(seconds) = seconds else {
        show(format_args!("usage: soak [SECONDS]\n"));
        return ExitCode::from(2);
    };
    silence_planned_panics();
    match soak(Duration::from_secs(seconds)) {
        Ok(verdict) if verdict.is_empty() => {
            show(format_args!("verdict: every message exactly once, nothing left behind\n"));
            ExitCode::SUCCESS
        }
        Ok(verdict) => {
            verdict.iter().for_each(|fault| show(format_args!("verdict: {fault}\n")));
            ExitCode::FAILURE
        }
        Err(error) => {
            show(format_args!("soak: {error}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Runs everything for `length`, and says what is wrong in the end.
fn soak(length: Duration) -> Result<Vec<String>, Anything> {
    let asked = until_ctrl_c()?;
    let before = System::now();
    let mut screen = Screen::new(length);
    let world = World::start(length)?;
    let client = world.client()?;
    let acknowledger = SocketAcknowledger::new(&client, |outcome| match outcome {
        Outcome::Succeeded(done) => Some(format!("ack {}", id_of(&done.message)?)),
        Outcome::Failed(_) => None,
    });
    let accounts = Arc::new(Accounts::default());
    let pipeline = Pipeline::builder(Books { accounts: Arc::clone(&accounts) })
        .source_with(client, acknowledger.clone())
        .processors(2)
        .batcher("books", Batching::new().size(50).timeout(Duration::from_millis(50)))
        .retries(20, Backoff::constant(Duration::from_millis(5)))
        .start()?;

    let mut warm = None;
    while screen.elapsed() < length && !asked.load(Relaxed) && !pipeline.has_ended() {
        world.disturb(screen.elapsed())?;
        thread::sleep(Duration::from_millis(100));
        if screen.elapsed() > length / 3 {
            warm.get_or_insert_with(System::now);
        }
        screen.status(&world, &pipeline, &accounts);
    }
    if asked.load(Relaxed) {
        screen.line(format_args!("asked to end: no more faults, the rest arrives"));
    }
    world.heal();
    // A connection may still have to wait for what a server asked of it.
    let limit = screen.elapsed() + Duration::from_secs(45);
    while !accounts.has_all(world.feed.handed_out()) && screen.elapsed() < limit {
        thread::sleep(Duration::from_millis(50));
        screen.status(&world, &pipeline, &accounts);
    }
    let at_end = System::now();
    let report = pipeline.stop(Duration::from_secs(10));
    drop(pipeline);
    screen.line(format_args!("stopped"));
    let mut verdict = tell(&world, &report, &accounts, &acknowledger);
    drop((world, report, acknowledger));
    verdict.extend(left_behind(&before, warm.as_ref(), &at_end));
    Ok(verdict)
}

/// Becomes true when SIGINT (Ctrl-C) or SIGTERM comes. The second one is for those
/// who do not want to wait for the end: it is immediate. It takes no thread, which
/// would be in the accounts.
#[cfg(unix)]
fn until_ctrl_c() -> io::Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::flag;

    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // They are called in this order: the first signal finds it false.
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))?;
        flag::register(signal, Arc::clone(&asked))?;
    }
    Ok(asked)
}

#[cfg(not(unix))]
fn until_ctrl_c() -> io::Result<Arc<AtomicBool>> {
    Ok(Arc::default())
}

/// Prints the accounts; says what is wrong with them.
fn tell(
    world: &World,
    report: &PipelineReport,
    accounts: &Accounts,
    acknowledger: &SocketAcknowledger,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut check = |well: bool, what: &str| {
        if !well {
            wrong.push(what.to_owned());
        }
    };
    let sent = world.feed.handed_out();
    let (lost, repeated) = accounts.against(sent);
    let others = accounts.others.load(Relaxed);
    show(format_args!("pipeline: {}\n", report.ledger));
    check(report.ledger.balanced(), "the pipeline's ledger does not balance");
    check(report.ledger.succeeded == sent + others, "the pipeline's ledger is not what was sent");
    check(report.ledger.failed == 0 && report.ledger.returned == 0, "messages failed for good");
    check(report.error.is_none(), "the pipeline failed");
    check(report.stuck.is_empty(), "threads were stuck");
    if let Some(client) = report.sources.iter().flatten().next() {
        let metrics = &client.metrics;
        let reconnects: u64 = metrics.connections.iter().map(|c| c.reconnects).sum();
        show(format_args!("client: {}\n", metrics.ledger));
        show(format_args!(
            "{} attempts, {} connections, {reconnects} reconnects, {} restarts\n",
            metrics.attempts(),
            metrics.connects(),
            metrics.restarts,
        ));
        check(metrics.ledger.balanced(), "the client's ledger does not balance");
        check(metrics.ledger.delivered == report.ledger.accepted, "messages between the ledgers");
        check(metrics.ledger.dropped == 0, "messages were dropped");
        check(client.error.is_none(), "the client failed");
    } else {
        check(false, "the client left no report");
    }
    show(format_args!(
        "sent={sent} others={others} lost={lost} repeated={repeated} acknowledged={} late={}\n",
        acknowledger.sent(),
        acknowledger.late(),
    ));
    check(lost == 0, "messages were lost");
    check(repeated == 0, "messages were processed twice");
    for server in &world.servers {
        let (stats, violations) = (server.stats(), server.violations());
        show(format_args!(
            "{}: {} accepted, {} upgraded, at most {} at once\n",
            server.url(),
            stats.accepted,
            stats.upgraded,
            stats.max_live,
        ));
        check(stats.max_live <= 1, "a server saw two connections at once");
        check(violations.is_empty(), &format!("breaches of the protocol: {violations:?}"));
    }
    wrong
}

/// Two servers with all faults, and one without, which share a feed.
struct World {
    feed: Feed,
    servers: [Server; 2],
    healthy: Server,
    healed: Arc<AtomicBool>,
}

impl World {
    fn start(length: Duration) -> io::Result<Self> {
        let feed = Feed::new(u64::MAX, |n| format!(r#"{{"id":{n},"price":{}}}"#, 100 + n % 7));
        let feed = feed.replay(REPLAY);
        // More than can be accepted in that time; each connection takes one.
        let count = 200 + usize::try_from(length.as_secs()).unwrap_or(0) * 5;
        let patient = length >= Duration::from_secs(60);
        let turns = |start| {
            let cycle = faults(&feed, patient).into_iter().cycle();
            Server::script(cycle.skip(start).take(count)).keep_received(0)
        };
        let plain = turns(0).start()?;
        #[cfg(feature = "tls")]
        let other = turns(5).start_tls()?;
        #[cfg(not(feature = "tls"))]
        let other = turns(5).start()?;
        let rest = Script::new().upgrade().feed(&feed, 0).hold();
        let healthy = Server::script([rest]).keep_received(0).start()?;
        let healed = Arc::new(AtomicBool::new(false));
        Ok(World { feed, servers: [plain, other], healthy, healed })
    }

    /// A client that is far less patient than by default: faults are many here.
    fn client(&self) -> Result<Client, broadsock::Error> {
        let mut builder = Client::unconnected()
            .dedup(Dedup::by_pointer("/id"))
            .connect_timeout(Duration::from_millis(500))
            .ping_interval(Duration::from_millis(200))
            .pong_timeout(Duration::from_millis(200))
            .write_timeout(Duration::from_secs(1))
            .backoff(Backoff::exponential(Duration::from_millis(20), Duration::from_millis(200)))
            .max_message_size(64 * 1024)
            .restart_intensity(Intensity { restarts: 50, within: Duration::from_secs(5) })
            .observer(|event: &Event| {
                if matches!(event.kind, EventKind::Failed { .. } | EventKind::Panic { .. }) {
                    show(format_args!("{event}\n"));
                }
            });
        for server in &self.servers {
            #[cfg(feature = "tls")]
            if let Some(root) = server.ca_pem() {
                builder = builder.root_certificate(root);
            }
            let (url, rest) = (server.url(), self.healthy.url());
            let healed = Arc::clone(&self.healed);
            builder = builder.request_hook(move |_| {
                let url = if healed.load(Relaxed) { &rest } else { &url };
                Ok(Request::new(url.as_str()))
            });
        }
        builder.start()
    }

    /// Every seven seconds one of the servers is gone for half of one.
    fn disturb(&self, elapsed: Duration) -> io::Result<()> {
        let turn = elapsed.as_secs() / 7;
        let server = &self.servers[usize::from(turn % 2 == 1)];
        match elapsed.as_millis() % 7000 {
            3000..3500 => server.stop(),
            3500.. => server.restart()?,
            _ => {}
        }
        Ok(())
    }

    /// No faults from here on, and nothing new.
    fn heal(&self) {
        self.healed.store(true, Relaxed);
        self.servers.iter().for_each(Server::stop);
    }
}

/// What becomes of a connection, for each in turn. With patience also what a
/// client answers with a wait of up to half a minute, and connections that stand
/// long enough for back-off and restart delays to start over.
fn faults(feed: &Feed, patient: bool) -> Vec<Script> {
    let mut final_ones = unrecoverable(feed).into_iter();
    let mut all = Vec::new();
    for (n, script) in recoverable(feed).into_iter().enumerate() {
        all.push(script);
        match n % 4 {
            1 => all.extend(final_ones.next()),
            3 if patient => all.push(steady(feed)),
            _ => {}
        }
    }
    all.extend(final_ones);
    if patient {
        all.push(work(feed).close(1013, "try again later"));
        all.push(work(feed).close(1012, "service restart"));
    }
    all
}

/// The good part of a connection.
fn work(feed: &Feed) -> Script {
    (0..4).fold(Script::new().upgrade(), |script, _| {
        script.feed(feed, NEW / 4).pause(Duration::from_millis(20))
    })
}

/// A connection without a fault for eleven seconds.
fn steady(feed: &Feed) -> Script {
    let part = |script: Script, _| script.feed(feed, NEW / 22).pause(Duration::from_millis(500));
    (0..22).fold(Script::new().upgrade(), part).close(1000, "")
}

/// A message without an id, of about `len` bytes.
fn other(len: usize) -> String {
    format!(r#"{{"other":"{}"}}"#, "x".repeat(len))
}

/// What the connection itself gets over.
fn recoverable(feed: &Feed) -> Vec<Script> {
    let pause = Duration::from_millis(1);
    vec![
        work(feed).cut(),
        Script::new().status(503, [("Retry-After", "1")]),
        work(feed).cut_mid_frame("the line goes dead in the middle of a message"),
        // Neither reads nor writes any more.
        work(feed).half_open(),
        // Accepts, and never says a word.
        Script::new().silent(),
        Script::new().silent_in_tls(),
        work(feed).close(1001, "going away"),
        Script::new().status(429, [("Retry-After", "1")]),
        Script::new().refuse(),
        work(feed).fin(),
        // One byte at a time, the answer and a message.
        Script::new().dribble(pause).send_bytewise(&other(20), pause).feed(feed, NEW).cut(),
        work(feed).send_fragmented(&other(2000), 7).ping_flood(2000).close(1000, ""),
        Script::new().redirect("/elsewhere"),
        work(feed).stop_reading().pause(Duration::from_millis(1500)).cut(),
        // Takes the close frame and does not leave.
        work(feed).ignore_close().close(4000, "rotate"),
        work(feed).close(1011, "internal error"),
        work(feed).ping_every(Duration::from_millis(50)).pause(Duration::from_secs(1)).cut(),
    ]
}

/// What ends the connection's thread, which supervision starts again.
fn unrecoverable(feed: &Feed) -> Vec<Script> {
    let oversize = work(feed).send(&other(100_000)).hold();
    // A reserved bit, a mask, a text that is not UTF-8, a reserved opcode.
    let garbage = [&b"\xc1\x05hello"[..], b"\x81\x85....hello", b"\x81\x02\xff\xfe", b"\x83\x00"];
    let frames = garbage.map(|bytes| work(feed).send_raw(bytes).hold());
    let answers = [
        Script::new().raw_response("SSH-2.0-OpenSSH\r\n"),
        Script::new().status(200, []),
        Script::new().status(401, []),
        oversize,
    ];
    frames.into_iter().chain(answers).collect()
}

/// The program's own work, which goes wrong now and then.
struct Books {
    accounts: Arc<Accounts>,
}

impl Handler for Books {
    /// The id of a message that has one.
    type Item = Option<u64>;

    fn handle_message(&self, message: &Message) -> Result<Next<Option<u64>>, Failure> {
        match self.accounts.calls.fetch_add(1, Relaxed) {
            call if call % 997 == 500 => panic!("{PLANNED}"),
            call if call % 97 == 96 => Err(Failure::new("the store is busy")),
            call if call % 4999 == 0 => {
                thread::sleep(Duration::from_millis(50));
                Ok(Next::to("books", id_of(message)))
            }
            _ => Ok(Next::to("books", id_of(message))),
        }
    }

    fn handle_batch(&self, batch: &mut Batch<Option<u64>>) -> Result<(), Failure> {
        match self.accounts.batches.fetch_add(1, Relaxed) % 101 {
            50 => panic!("{PLANNED}"),
            100 => return Err(Failure::new("the store is away")),
            _ => self.accounts.add(batch.items().copied()),
        }
        Ok(())
    }
}

/// How often each id was processed.
#[derive(Default)]
struct Accounts {
    times: Mutex<Vec<u8>>,
    /// How many ids were processed at all.
    different: AtomicU64,
    /// Messages without an id: they have no one to repeat them.
    others: AtomicU64,
    calls: AtomicU64,
    batches: AtomicU64,
}

impl Accounts {
    fn add(&self, ids: impl Iterator<Item = Option<u64>>) {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            let Some(at) = id.and_then(|id| usize::try_from(id).ok()) else {
                self.others.fetch_add(1, Relaxed);
                continue;
            };
            if times.len() <= at {
                times.resize(at + 1, 0);
            }
            if times[at] == 0 {
                self.different.fetch_add(1, Relaxed);
            }
            times[at] = times[at].saturating_add(1);
        }
    }

    fn has_all(&self, sent: u64) -> bool {
        self.different.load(Relaxed) >= sent
    }

    /// How many of the ids below `sent` are missing, and how many processings
    /// there were too many.
    fn against(&self, sent: u64) -> (u64, u64) {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let repeated = times.iter().map(|times| u64::from(times.saturating_sub(1))).sum();
        (sent.saturating_sub(self.different.load(Relaxed)), repeated)
    }
}

/// The id in a message such as `{"id":7,"price":107}`.
fn id_of(message: &Message) -> Option<u64> {
    message.text()?.strip_prefix(r#"{"id":"#)?.split(',').next()?.parse().ok()
}

/// The panics of [`Books`], which the pipeline contains and this program need
/// not tell of.
const PLANNED: &str = "a planned panic";

fn silence_planned_panics() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if info.payload().downcast_ref::<String>().is_none_or(|text| text != PLANNED) {
            usual(info);
        }
    }));
}

/// What this process has of the system; nothing where the system does not tell.
#[derive(Clone, Default)]
struct System {
    threads: u64,
    descriptors: u64,
    resident: u64,
    peak: u64,
}

impl System {
    #[cfg(target_os = "linux")]
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        System {
            threads: number("Threads:"),
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, |all| all.count() as u64),
            resident: number("VmRSS:") << 10,
            peak: number("VmHWM:") << 10,
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn now() -> Self {
        System::default()
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(f, "threads: {}, descriptors: {}, ", self.threads, self.descriptors)?;
        write!(f, "{:.1} MiB (peak {:.1})", mib(self.resident), mib(self.peak))
    }
}

/// Prints what is there after everything was dropped, and says what is too much.
fn left_behind(before: &System, warm: Option<&System>, at_end: &System) -> Vec<String> {
    // A thread that was joined may be in the system's books a little longer.
    let mut after = System::now();
    for _ in 0..100 {
        if after.threads <= before.threads && after.descriptors <= before.descriptors {
            break;
        }
        thread::sleep(Duration::from_millis(20));
        after = System::now();
    }
    show(format_args!("before: {before}\n"));
    // A run that ended before has nothing to measure growth by.
    if let Some(warm) = warm {
        show(format_args!("after a third: {warm}\n"));
    }
    show(format_args!("at the end: {at_end}\n"));
    show(format_args!("after all was dropped: {after}\n"));
    let mut wrong = Vec::new();
    if after.threads > before.threads {
        wrong.push("threads are left behind".to_owned());
    }
    if after.descriptors > before.descriptors {
        wrong.push("descriptors are left behind".to_owned());
    }
    if warm.is_some_and(|warm| at_end.resident > warm.resident + GROWTH) {
        wrong.push("memory grows".to_owned());
    }
    wrong
}

/// On a terminal one live status line, elsewhere a line now and then.
struct Screen {
    start: Instant,
    live: bool,
    next: Duration,
    interval: Duration,
}

impl Screen {
    fn new(length: Duration) -> Self {
        let live = io::stdout().is_terminal();
        let interval = if live {
            Duration::from_millis(200)
        } else {
            (length / 40).max(Duration::from_secs(1))
        };
        Self { start: Instant::now(), live, next: Duration::ZERO, interval }
    }

    fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn line(&self, text: impl fmt::Display) {
        let clear = if self.live { "\r\x1b[K" } else { "" };
        show(format_args!("{clear}{:6.1}s  {text}\n", self.elapsed().as_secs_f64()));
    }

    fn status(&mut self, world: &World, pipeline: &Pipeline, accounts: &Accounts) {
        let now = self.elapsed();
        if now < self.next {
            return;
        }
        self.next = now + self.interval;
        let accepted: u64 = world.servers.iter().map(|server| server.stats().accepted).sum();
        let metrics = pipeline.metrics();
        let text = format!(
            "{accepted} sockets, {} sent, {} processed, {} in flight, retries: {}, panics: {}; {}",
            world.feed.handed_out(),
            accounts.different.load(Relaxed),
            metrics.ledger.in_flight,
            metrics.retries,
            metrics.panics,
            System::now(),
        );
        if self.live {
            show(format_args!("\r\x1b[K{:6.1}s  {text}", now.as_secs_f64()));
        } else {
            self.line(text);
        }
    }
}

/// `print!` would panic when nobody looks any more, as in `soak | head`.
fn show(text: fmt::Arguments<'_>) {
    let mut out = io::stdout().lock();
    let _ = out.write_fmt(text).and_then(|()| out.flush());
}
