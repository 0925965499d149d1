//! How many messages a second go through, and what each costs: this crate,
//! its stages switched on one by one, against a thread around tungstenite's
//! `read` on the same firehose.
//!
//! ```text
//! cargo bench --features testing --bench throughput              # minutes
//! cargo bench --features testing --bench throughput -- "64 B text"
//! cargo bench --features testing --bench throughput -- --quick   # does it run?
//! ```
//!
//! The firehose is a process of its own that writes prebuilt frames, a quarter
//! of a megabyte at a time, no two messages alike. Each side gets a connection
//! of its own, the two in turn; what counts is their ratio in one round. "By CPU"
//! is the same from the processor time of the busiest thread alone: where other
//! programs take cores away, it says more.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that shows figures")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench that cannot run says so")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use broadsock::{
    Acknowledger, Batch, Batching, BoxError, Client, ClientBuilder, Data, Dedup, Failed, Failure,
    Handler, Link, Message, Next, NoAcknowledger, Pipeline, Session, Succeeded,
};
use common::child::{self, Child};
use common::cpu::Threads;
use common::net::{self, Authority, LONG, Wire};
use common::table::{Goal, Row, Table, Unit};
use common::{Options, median};
use native_tls::{TlsAcceptor, TlsConnector};

/// What one write of the firehose brings, about.
const CHUNK: usize = 256 * 1024;

/// How often a side says how far it is, in messages.
const STRIDE: u64 = 64;

fn main() {
    if child::role().is_some() {
        firehose();
    }
    let options = Options::read(Duration::from_secs(1200));
    let mut table = Table::new(
        "throughput",
        "messages a second from the socket to the program; \"bare\" is a thread around \
         tungstenite's read on the same feed, in turn",
    );
    let bench = Bench::start(&options);
    for (workload, sides) in plan(&options) {
        let heading = workload.heading();
        if options.wants(&heading) {
            eprintln!("{heading} ...");
            table.add(heading, bench.compare(workload, &sides));
        }
    }
    table.finish(&options);
}

/// Which sides are measured on which feed.
fn plan(options: &Options) -> Vec<(Workload, Vec<Side>)> {
    use Side::*;
    let text = |size| Workload { kind: Kind::Text, size, secure: false };
    let binary = |size| Workload { kind: Kind::Binary, size, secure: false };
    let secure = |size| Workload { kind: Kind::Text, size, secure: true };
    let trade = Workload { kind: Kind::Trade, size: Size::Fixed(200), secure: false };
    let stages = vec![
        Bytes,
        Recv,
        Blocks,
        BlocksDedup,
        BlocksDedupSession,
        Pipeline(Stages { processors: 1, ..Stages::PLAIN }),
        Pipeline(Stages { processors: 1, ..Stages::DEDUP }),
        Pipeline(Stages { processors: 2, ..Stages::DEDUP }),
        Pipeline(Stages { batcher: true, ..Stages::DEDUP }),
        Pipeline(Stages { batcher: true, acknowledger: true, ..Stages::DEDUP }),
    ];
    let main = vec![Bytes, Blocks, BlocksDedup, Pipeline(Stages::DEDUP)];
    let large = vec![Bytes, BareHash, Blocks, BlocksDedup, Pipeline(Stages::DEDUP)];
    let short = vec![Bytes, Blocks, BlocksDedup];
    let pointer = vec![Bytes, Blocks, BlocksPointer, Pipeline(Stages::POINTER)];
    if options.quick {
        return vec![
            (text(Size::Fixed(64)), stages),
            (text(Size::Mixed), short.clone()),
            (trade, pointer),
            (secure(Size::Fixed(64)), short),
        ];
    }
    let mut plan = vec![(text(Size::Fixed(64)), stages), (text(Size::Fixed(128)), main.clone())];
    plan.push((text(Size::Mixed), main.clone()));
    plan.push((text(Size::Fixed(256)), main));
    plan.extend([1024, 16_384].map(|size| (text(Size::Fixed(size)), large.clone())));
    plan.push((trade, pointer));
    plan.extend([64, 256, 1024, 16_384].map(|size| (binary(Size::Fixed(size)), short.clone())));
    plan.extend([64, 1024, 16_384].map(|size| (secure(Size::Fixed(size)), short.clone())));
    plan
}

/// What the firehose sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Workload {
    kind: Kind,
    size: Size,
    secure: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Binary,
    /// A JSON text with an id, as exchanges send for each trade.
    Trade,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    Fixed(usize),
    /// 60 to 323 bytes.
    Mixed,
}

/// What receives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// A thread that reads the bytes and looks at none.
    Bytes,
    /// A thread around tungstenite's `read`.
    Bare,
    /// The same, and a hash of each message, as a dedup by content needs it.
    BareHash,
    /// A client, and a thread around `recv`.
    Recv,
    /// A client, and a thread that takes blocks.
    Blocks,
    BlocksDedup,
    BlocksPointer,
    BlocksDedupSession,
    Pipeline(Stages),
}

/// What a pipeline does with its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stages {
    dedup: Ids,
    processors: usize,
    batcher: bool,
    acknowledger: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ids {
    Off,
    Content,
    Pointer,
}

impl Stages {
    const PLAIN: Self =
        Self { dedup: Ids::Off, processors: 1, batcher: false, acknowledger: false };
    const DEDUP: Self = Self { dedup: Ids::Content, ..Self::PLAIN };
    const POINTER: Self = Self { dedup: Ids::Pointer, ..Self::PLAIN };
}

impl Side {
    /// The thread that reads.
    fn reader(self) -> &'static str {
        if self == Side::BareHash { "bare" } else { "reader" }
    }

    fn name(self) -> String {
        match self {
            Side::Bytes => "bytes only, nothing decoded".to_owned(),
            Side::Bare => "bare".to_owned(),
            Side::BareHash => "(bare, and a hash of each message)".to_owned(),
            Side::Recv => "client, recv".to_owned(),
            Side::Blocks => "client, blocks to one worker".to_owned(),
            Side::BlocksDedup => "  + dedup by content".to_owned(),
            Side::BlocksPointer => "  + dedup by JSON pointer".to_owned(),
            Side::BlocksDedupSession => "  + dedup + session".to_owned(),
            Side::Pipeline(stages) => {
                let mut name = format!("pipeline, {} processor", stages.processors);
                name.push_str(if stages.processors == 1 { "" } else { "s" });
                name.push_str(if stages.dedup == Ids::Off { "" } else { " + dedup" });
                name.push_str(if stages.batcher { " + batcher" } else { "" });
                name.push_str(if stages.acknowledger { " + acknowledger" } else { "" });
                name
            }
        }
    }
}

impl Workload {
    fn heading(self) -> String {
        let size = match self.size {
            Size::Fixed(size) if size >= 1024 => format!("{} KiB", size / 1024),
            Size::Fixed(size) => format!("{size} B"),
            Size::Mixed => "60-323 B".to_owned(),
        };
        let kind = match self.kind {
            Kind::Text => "text",
            Kind::Binary => "binary",
            Kind::Trade => "JSON trade",
        };
        format!("{size} {kind}, {}", if self.secure { "wss" } else { "ws" })
    }

    fn path(self) -> String {
        let kind = match self.kind {
            Kind::Text => "text",
            Kind::Binary => "binary",
            Kind::Trade => "trade",
        };
        match self.size {
            Size::Fixed(size) => format!("{kind}-{size}"),
            Size::Mixed => format!("{kind}-0"),
        }
    }

    fn parse(path: &str) -> Option<Self> {
        let (kind, size) = path.trim_start_matches('/').split_once('-')?;
        let kind = match kind {
            "text" => Kind::Text,
            "binary" => Kind::Binary,
            _ => Kind::Trade,
        };
        let size = match size.parse().ok()? {
            0 => Size::Mixed,
            size => Size::Fixed(size),
        };
        Some(Self { kind, size, secure: false })
    }

    /// What a side has to show on this feed.
    fn goal(self, side: Side) -> Goal {
        if self.secure && self.size == Size::Fixed(64) && side == Side::BlocksDedup {
            return Goal::AtLeast(1.0);
        }
        if self.secure || self.kind == Kind::Binary {
            return Goal::None;
        }
        match (self.kind, self.size, side) {
            (Kind::Text, Size::Fixed(64), Side::Blocks) => Goal::AtLeast(3.0),
            (Kind::Text, Size::Fixed(64), Side::BlocksDedup) => Goal::AtLeast(2.0),
            (Kind::Text, Size::Fixed(128), Side::BlocksDedup) => Goal::AtLeast(1.6),
            (Kind::Text, Size::Mixed, Side::BlocksDedup) => Goal::AtLeast(1.2),
            (Kind::Trade, _, Side::BlocksPointer) => Goal::AtLeast(1.0),
            _ => Goal::None,
        }
    }

    /// Where loopback is the limit, what counts is the reader's own time.
    fn wants_reader_row(self, side: Side) -> bool {
        matches!(side, Side::BareHash | Side::BlocksDedup)
            && self.kind == Kind::Text
            && !self.secure
            && matches!(self.size, Size::Fixed(1024 | 16_384))
    }
}

// The measuring side.

struct Bench {
    rounds: usize,
    warm_up: Duration,
    window: Duration,
    ports: [u16; 2],
    tls: TlsConnector,
    /// Ends the firehose when it is dropped.
    _child: Child,
}

/// One window on one connection.
#[derive(Debug)]
struct Sample {
    rate: f64,
    /// Nanoseconds a message, by thread.
    cpu: BTreeMap<String, f64>,
}

impl Bench {
    fn start(options: &Options) -> Self {
        let mut child = Child::start("firehose");
        let ports = [child.line(), child.line()].map(|port| port.parse().expect("a port"));
        let tls = net::connector(&child.line().replace('|', "\n"));
        Self {
            rounds: options.pick(5, 1),
            warm_up: Duration::from_millis(options.pick(80, 15)),
            window: Duration::from_millis(options.pick(250, 25)),
            ports,
            tls,
            _child: child,
        }
    }

    /// The sides in turn, each next to a bare one.
    fn compare(&self, workload: Workload, sides: &[Side]) -> Vec<Row> {
        let mut samples: Vec<Vec<(Sample, Sample)>> = sides.iter().map(|_| Vec::new()).collect();
        // A thread's own time for a large message depends on which caches it shares.
        let large = workload.wants_reader_row(Side::BlocksDedup);
        let rounds = if large { 2 * self.rounds } else { self.rounds };
        for _ in 0..rounds {
            for (side, samples) in sides.iter().zip(&mut samples) {
                samples.push((self.run(workload, Side::Bare), self.run(workload, *side)));
            }
        }
        let mut rows = Vec::new();
        if let Some(bare) = samples.first() {
            let bare: Vec<&Sample> = bare.iter().map(|(bare, _)| bare).collect();
            let mut row = Row::new("bare tungstenite, in its thread", Unit::Rate);
            row.bare = bare.iter().map(|sample| sample.rate).collect();
            row.note = cpu_note(&bare);
            rows.push(row);
        }
        for (side, samples) in sides.iter().zip(&samples) {
            let here: Vec<&Sample> = samples.iter().map(|(_, here)| here).collect();
            let mut row = Row::new(side.name(), Unit::Rate).goal(workload.goal(*side));
            row.bare = samples.iter().map(|(bare, _)| bare.rate).collect();
            row.here = here.iter().map(|here| here.rate).collect();
            row.note = cpu_note(&here);
            if let Some(speed) = speed_by_cpu(samples) {
                let _ = write!(row.note, "; {speed:.2} x by CPU");
            }
            rows.push(row);
            let known = |(bare, here): &(Sample, Sample)| {
                Some((*bare.cpu.get("bare")?, *here.cpu.get(side.reader())?))
            };
            let times: Option<Vec<(f64, f64)>> = samples.iter().map(known).collect();
            if let Some(times) = times.filter(|_| workload.wants_reader_row(*side)) {
                let name = format!("{}: the reader's CPU a message", side.name());
                let mut row = Row::new(name, Unit::Nanos);
                match side {
                    Side::BareHash => row.note = "not this crate: what the hash costs".to_owned(),
                    _ => row = row.goal(Goal::AtMost(1.1)),
                }
                (row.bare, row.here) = times.into_iter().unzip();
                rows.push(row);
            }
        }
        rows
    }

    fn run(&self, workload: Workload, side: Side) -> Sample {
        let url =
            net::url(workload.secure, self.ports[usize::from(workload.secure)], &workload.path());
        match side {
            Side::Bytes => self.bytes(&url, workload),
            Side::Bare => self.bare(&url, workload, look_at),
            Side::BareHash => self.bare(&url, workload, |bytes| {
                black_box(twox_hash::XxHash3_128::oneshot(bytes));
            }),
            Side::Recv => self.client(self.builder(&url, Ids::Off), true),
            Side::Blocks => self.client(self.builder(&url, Ids::Off), false),
            Side::BlocksDedup => self.client(self.builder(&url, Ids::Content), false),
            Side::BlocksPointer => self.client(self.builder(&url, Ids::Pointer), false),
            Side::BlocksDedupSession => {
                let builder = self.builder(&url, Ids::Content).session(|| Decode);
                self.client(builder, false)
            }
            Side::Pipeline(stages) => self.pipeline(&url, stages),
        }
    }

    /// Lets it run, then looks at the clocks twice.
    fn measure(&self, count: impl Fn() -> u64) -> Sample {
        let until = Instant::now() + LONG;
        while count() == 0 {
            assert!(Instant::now() < until, "no message came");
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(self.warm_up);
        let (before, used, start) = (count(), Threads::now(), Instant::now());
        thread::sleep(self.window);
        let (after, now, time) = (count(), Threads::now(), start.elapsed());
        let messages = (after - before) as f64;
        let cpu = now.since(&used).into_iter();
        let cpu = cpu.map(|(thread, nanos)| (thread, nanos as f64 / messages)).collect();
        Sample { rate: messages / time.as_secs_f64(), cpu }
    }

    /// `run` on a thread of its own, until it is told to stop.
    fn in_thread(&self, run: impl FnOnce(&AtomicU64, &AtomicBool) + Send + 'static) -> Sample {
        let shared = Arc::new((AtomicU64::new(0), AtomicBool::new(false)));
        let its = Arc::clone(&shared);
        let thread = Builder::new().name("bare".to_owned());
        let thread = thread.spawn(move || run(&its.0, &its.1)).expect("a thread starts");
        let sample = self.measure(|| shared.0.load(Relaxed));
        shared.1.store(true, Relaxed);
        thread.join().expect("the bare side does not fail");
        sample
    }

    fn bytes(&self, url: &str, workload: Workload) -> Sample {
        let mut client = net::bare(url, self.tls(workload)).expect("the firehose accepts");
        let frame = Flood::new(workload).mean_frame();
        self.in_thread(move |count, stop| {
            let mut buf = vec![0; 128 * 1024];
            let mut bytes = 0;
            while !stop.load(Relaxed) {
                bytes += client.get_mut().read(&mut buf).expect("the firehose goes on");
                count.store((bytes as f64 / frame) as u64, Relaxed);
            }
        })
    }

    fn bare(&self, url: &str, workload: Workload, look: fn(&[u8])) -> Sample {
        let mut client = net::bare(url, self.tls(workload)).expect("the firehose accepts");
        self.in_thread(move |count, stop| {
            let mut messages = 0;
            while !stop.load(Relaxed) {
                for _ in 0..STRIDE {
                    match client.read().expect("the firehose goes on") {
                        tungstenite::Message::Text(text) => look(text.as_bytes()),
                        tungstenite::Message::Binary(bytes) => look(&bytes),
                        _ => {}
                    }
                }
                messages += STRIDE;
                count.store(messages, Relaxed);
            }
        })
    }

    fn client(&self, builder: ClientBuilder, by_message: bool) -> Sample {
        let client = builder.start().expect("the settings are sound");
        let count = AtomicU64::new(0);
        thread::scope(|scope| {
            let worker = Builder::new().name("worker".to_owned());
            let work = || if by_message { recv(&client, &count) } else { take(&client, &count) };
            worker.spawn_scoped(scope, work).expect("a thread starts");
            let sample = self.measure(|| count.load(Relaxed));
            client.close(Duration::from_secs(1));
            sample
        })
    }

    fn pipeline(&self, url: &str, stages: Stages) -> Sample {
        let client = self.builder(url, stages.dedup).start().expect("the settings are sound");
        let mut builder = Pipeline::builder(Look { batches: stages.batcher });
        if stages.batcher {
            builder = builder.batcher("all", Batching::new().timeout(Duration::from_millis(100)));
        }
        let builder = if stages.acknowledger {
            builder.source_with(client, Count::default())
        } else {
            builder.source_with(client, NoAcknowledger)
        };
        let pipeline =
            builder.processors(stages.processors).start().expect("the settings are sound");
        let sample = self.measure(|| pipeline.metrics().ledger.succeeded);
        pipeline.stop(Duration::from_secs(1));
        sample
    }

    fn builder(&self, url: &str, ids: Ids) -> ClientBuilder {
        let builder = Client::builder(url).tls_connector(self.tls.clone());
        match ids {
            Ids::Off => builder,
            Ids::Content => builder.dedup(Dedup::by_content()),
            Ids::Pointer => builder.dedup(Dedup::by_pointer("/t")),
        }
    }

    fn tls(&self, workload: Workload) -> Option<&TlsConnector> {
        workload.secure.then_some(&self.tls)
    }
}

/// Median nanoseconds a message of each thread that counts.
fn cpu_note(samples: &[&Sample]) -> String {
    let names = samples.first().map(|sample| sample.cpu.keys()).into_iter().flatten();
    let mut notes = Vec::new();
    for name in names {
        let times: Vec<f64> =
            samples.iter().filter_map(|sample| sample.cpu.get(name).copied()).collect();
        let time = median(&times);
        if time >= 0.5 {
            notes.push(format!("{name} {time:.0}"));
        }
    }
    if notes.is_empty() { String::new() } else { notes.join(", ") + " ns" }
}

/// How many times as fast as the bare thread the busiest thread would be with a
/// core of its own: what is left of a ratio on a machine that others use too.
fn speed_by_cpu(samples: &[(Sample, Sample)]) -> Option<f64> {
    let speed = |(bare, here): &(Sample, Sample)| {
        let busiest = here.cpu.values().copied().max_by(f64::total_cmp)?;
        Some(bare.cpu.get("bare")? / busiest)
    };
    let speeds: Option<Vec<f64>> = samples.iter().map(speed).collect();
    speeds.map(|speeds| median(&speeds))
}

/// The least that a program does with a message.
fn look_at(bytes: &[u8]) {
    black_box((bytes.len(), bytes.first().copied()));
}

fn recv(client: &Client, count: &AtomicU64) {
    let mut messages = 0;
    while let Ok(message) = client.recv() {
        look_at(message.as_bytes());
        messages += 1;
        if messages % STRIDE == 0 {
            count.store(messages, Relaxed);
        }
    }
}

fn take(client: &Client, count: &AtomicU64) {
    let mut messages = 0;
    for block in client.receiver() {
        messages += block.len() as u64;
        block.visit(|message| look_at(message.as_bytes()));
        count.store(messages, Relaxed);
    }
}

/// A session that looks at each message and passes it on.
struct Decode;

impl Session for Decode {
    fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        if !black_box(data.as_bytes()).is_empty() {
            link.emit(data);
        }
        Ok(())
    }
}

/// A handler that does the least.
struct Look {
    batches: bool,
}

impl Handler for Look {
    type Item = usize;

    fn handle_message(&self, message: &Message) -> Result<Next<usize>, Failure> {
        look_at(message.as_bytes());
        Ok(if self.batches { Next::to("all", message.len()) } else { Next::done() })
    }

    fn handle_batch(&self, batch: &mut Batch<usize>) -> Result<(), Failure> {
        black_box(batch.items().sum::<usize>());
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Count(AtomicU64);

impl Acknowledger for Count {
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        self.0.fetch_add((succeeded.len() + failed.len()) as u64, Relaxed);
        Ok(())
    }
}

// The firehose, in its own process.

fn firehose() -> ! {
    common::give_up_after(Duration::from_secs(1800));
    let authority = Authority::new();
    for acceptor in [None, Some(authority.acceptor.clone())] {
        let (listener, port) = net::listen();
        child::tell(&port.to_string());
        thread::spawn(move || answer(&listener, acceptor.as_ref()));
    }
    child::tell(&authority.root.trim_end().replace('\n', "|"));
    child::obey(|_| {})
}

/// A flood for each connection, on a thread of its own.
fn answer(listener: &TcpListener, acceptor: Option<&TlsAcceptor>) {
    for socket in listener.incoming().flatten() {
        let acceptor = acceptor.cloned();
        thread::spawn(move || {
            if let Ok((wire, path)) = Wire::accept(socket, acceptor.as_ref())
                && let Some(workload) = Workload::parse(&path)
            {
                // An error is the client's end.
                let _ = flood(wire, workload);
            }
        });
    }
}

fn flood(mut wire: Wire, workload: Workload) -> io::Result<()> {
    let mut flood = Flood::new(workload);
    let heard = Arc::new(AtomicBool::new(false));
    let (ear, told) = (wire.socket().try_clone()?, Arc::clone(&heard));
    // Whatever the client says, or its end, ends the flood.
    thread::spawn(move || {
        while let Err(error) = ear.peek(&mut [0]) {
            if error.kind() != io::ErrorKind::WouldBlock {
                break;
            }
        }
        told.store(true, Relaxed);
    });
    let until = Instant::now() + Duration::from_secs(60);
    while !heard.load(Relaxed) && Instant::now() < until {
        wire.write_all(flood.next())?;
    }
    wire.write_all(&net::frame(8, &1000_u16.to_be_bytes()))?;
    wire.socket().shutdown(Shutdown::Write)?;
    // Until the client has read everything and is gone: an end with unread
    // bytes would cut off what is on its way.
    while wire.read(&mut [0; 1024])? > 0 {}
    Ok(())
}

/// A buffer of frames, and where in each its number lies.
struct Flood {
    bytes: Vec<u8>,
    numbers: Vec<usize>,
    round: u64,
}

impl Flood {
    fn new(workload: Workload) -> Self {
        let mut flood = Flood { bytes: Vec::new(), numbers: Vec::new(), round: 0 };
        let opcode = if workload.kind == Kind::Binary { 2 } else { 1 };
        // Sizes as if drawn, the same ones each time.
        let mut drawn = 1_u32;
        while flood.bytes.len() < CHUNK {
            drawn = drawn.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let size = match workload.size {
                Size::Fixed(size) => size,
                Size::Mixed => 60 + (drawn >> 16) as usize % 264,
            };
            // Two numbers of digits make a message unlike all others: its place
            // in the buffer, and how often the buffer was sent.
            let place = flood.numbers.len();
            let (payload, number) = match workload.kind {
                Kind::Trade => trade(place, size),
                Kind::Text | Kind::Binary => {
                    let mut payload = format!("{place:06}00000000");
                    payload
                        .extend((b'!'..=b'~').map(char::from).cycle().take(size - payload.len()));
                    (payload, 6)
                }
            };
            let frame = net::frame(opcode, payload.as_bytes());
            let start = flood.bytes.len() + frame.len() - payload.len();
            flood.numbers.push(start + number);
            flood.bytes.extend_from_slice(&frame);
        }
        flood
    }

    fn mean_frame(&self) -> f64 {
        self.bytes.len() as f64 / self.numbers.len() as f64
    }

    /// The same frames with messages that were never sent before.
    fn next(&mut self) -> &[u8] {
        self.round += 1;
        let digits = format!("{:08}", self.round % 100_000_000);
        let digits: &[u8; 8] = digits.as_bytes().try_into().expect("eight digits");
        for at in &self.numbers {
            self.bytes[*at..at + 8].copy_from_slice(digits);
        }
        &self.bytes
    }
}

/// A trade as an exchange tells it, and where its number's changing part is.
fn trade(place: usize, size: usize) -> (String, usize) {
    let head = format!(r#"{{"e":"trade","E":1767225600123,"s":"BTCUSDT","t":1{place:06}"#);
    let number = head.len();
    let rest = r#","p":"67012.41000000","q":"0.00150000","b":88561201,"a":88561207,"T":1767225600121,"m":true,"M":""#;
    let mut text = format!("{head}00000000{rest}");
    text.extend(std::iter::repeat_n('x', size - text.len() - 2));
    text.push_str("\"}");
    (text, number)
}
