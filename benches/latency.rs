//! How long things take: a message from the server to the program, a send from
//! another thread, an end, and from a cut to connected again.
//!
//! ```text
//! cargo bench --features testing --bench latency
//! cargo bench --features testing --bench latency -- "send"
//! ```
//!
//! Servers are threads of this process, so both ends read one clock; the two
//! sides get a connection of their own, in turn.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that shows figures")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench that cannot run says so")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

mod common;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

use broadsock::{Backoff, Client, EventKind, Message, Outgoing, Overflow, Pipeline, State};
use common::net::{self, Authority, LONG, Wire};
use common::table::{Goal, Row, Table, Unit};
use common::{Options, percentile};
use native_tls::{TlsAcceptor, TlsConnector};

fn main() {
    let options = Options::read(Duration::from_secs(600));
    let mut table = Table::new(
        "latency",
        "\"bare\" is a thread around tungstenite, in turn; the best of a blocking socket",
    );
    let bench =
        Bench { options: options.clone(), base: Instant::now(), rounds: options.pick(5, 1) };
    bench.add(&mut table, "server to worker, 128 B, 20,000 a second", |bench| {
        let each = Duration::from_micros(50);
        bench.deliveries(each, options.pick(20_000, 1_000), Some([1.10, 1.20]))
    });
    bench.add(&mut table, "server to worker, 128 B, 1,000 a second", |bench| {
        bench.deliveries(Duration::from_millis(1), options.pick(1_000, 100), None)
    });
    bench.add(&mut table, "send from another thread, connection asleep", |bench| {
        bench.sends(Load::Idle, options.pick(1_000, 100))
    });
    bench.add(&mut table, "send from another thread, under a flood that nobody takes", |bench| {
        bench.sends(Load::Flood { taken: false }, options.pick(1_000, 100))
    });
    bench.add(&mut table, "send from another thread, under a flood that a thread takes", |bench| {
        bench.sends(Load::Flood { taken: true }, options.pick(1_000, 100))
    });
    bench.add(&mut table, "close and stop, to the last join", |bench| {
        bench.ends(options.pick(20, 3))
    });
    bench.add(&mut table, "from a cut to connected again, no back-off", |bench| {
        let authority = Authority::new();
        let mut rows = bench.cuts(None, options.pick(100, 5));
        rows.extend(bench.cuts(Some(&authority), options.pick(50, 3)));
        rows
    });
    table.finish(&options);
}

struct Bench {
    options: Options,
    /// What times in messages are counted from.
    base: Instant,
    rounds: usize,
}

/// What the server does while messages are sent to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Load {
    Idle,
    /// It sends as fast as it can. With a thread that takes what comes, three are
    /// busy: on two processors they take turns.
    Flood {
        taken: bool,
    },
}

/// Of each round, what the messages sent in it took.
#[derive(Default)]
struct Sends {
    /// How long the callers took.
    calls: Vec<Times>,
    /// Until the operating system had all of a message.
    writes: Vec<Times>,
    /// Until the server's program had it.
    arrivals: Vec<Times>,
}

/// Microseconds, sorted.
struct Times(Vec<f64>);

impl Times {
    fn new(mut micros: Vec<f64>) -> Self {
        micros.sort_by(f64::total_cmp);
        Self(micros)
    }

    fn at(&self, part: f64) -> f64 {
        percentile(&self.0, part)
    }
}

/// What one write of the flood brings, about.
const CHUNK: usize = 256 * 1024;

/// Processors for the server, the connection, the thread that takes, and the sender.
const ROOM: usize = 4;

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

const PARTS: [(f64, &str); 3] = [(0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")];

/// A row for each percentile; `goals` go with the first ones.
fn rows(what: &str, bare: &[Times], here: &[Times], goals: &[Goal]) -> Vec<Row> {
    let row = |(at, (part, name)): (usize, &(f64, &str))| {
        let goal = goals.get(at).copied().unwrap_or(Goal::None);
        let mut row = Row::new(format!("{what}, {name}"), Unit::Micros).goal(goal);
        row.bare = bare.iter().map(|times| times.at(*part)).collect();
        row.here = here.iter().map(|times| times.at(*part)).collect();
        row
    };
    PARTS.iter().enumerate().map(row).collect()
}

impl Bench {
    fn add(&self, table: &mut Table, heading: &str, run: impl FnOnce(&Self) -> Vec<Row>) {
        if self.options.wants(heading) {
            eprintln!("{heading} ...");
            table.add(heading, run(self));
        }
    }

    // Server to worker.

    fn deliveries(&self, each: Duration, count: usize, goals: Option<[f64; 2]>) -> Vec<Row> {
        let (mut bare, mut blocks, mut pipeline) = (Vec::new(), Vec::new(), Vec::new());
        let mut channel = Vec::new();
        for _ in 0..self.rounds {
            bare.push(self.deliver(each, count, |url, base| read_bare(&url, base)));
            channel.push(self.deliver(each, count, |url, base| read_channel(&url, base)));
            blocks.push(self.deliver(each, count, |url, base| read_blocks(&url, base, count)));
            pipeline.push(self.deliver(each, count, |url, base| read_pipeline(&url, base, count)));
        }
        let goals = goals.map_or(Vec::new(), |goals| goals.map(Goal::AtMost).to_vec());
        let mut table = rows("client, blocks to one worker", &bare, &blocks, &goals);
        let mut floor = rows("(bare, and a channel to one worker)", &bare, &channel, &[]);
        for row in &mut floor {
            row.note = "not this crate: what a second thread costs".to_owned();
        }
        table.extend(floor);
        table.extend(rows("pipeline, 1 processor", &bare, &pipeline, &[]));
        table
    }

    fn deliver(
        &self,
        each: Duration,
        count: usize,
        read: impl FnOnce(String, Instant) -> Vec<f64>,
    ) -> Times {
        let base = self.base;
        let (port, server) = net::serve(None, move |wire| feed(wire, base, each, count));
        let mut times = read(net::url(false, port, ""), base);
        server.join().expect("the server does not fail");
        // The first ones warm up.
        times.drain(..times.len() / 10);
        Times::new(times)
    }

    // Sends.

    fn sends(&self, load: Load, count: usize) -> Vec<Row> {
        let (mut bare, mut here, mut floor) = <(Sends, Sends, Sends)>::default();
        for _ in 0..self.rounds {
            // A blocking loop that reads a flood cannot send.
            if load == Load::Idle {
                self.send(load, count, send_bare, &mut bare);
                self.send(load, count, send_through, &mut floor);
            }
            self.send(load, count, send_here, &mut here);
        }
        let room = ROOM <= processors();
        let [call, wire]: [&[Goal]; 2] = match load {
            Load::Idle => [&[Goal::Below(2.0)], &[Goal::Below(25.0), Goal::Below(70.0)]],
            Load::Flood { taken } if room || !taken => {
                [&[], &[Goal::Below(20.0), Goal::Below(120.0)]]
            }
            Load::Flood { .. } => [&[], &[]],
        };
        let mut table = rows("the caller's time", &bare.calls, &here.calls, call);
        table.extend(rows("until it is written", &bare.writes, &here.writes, wire));
        // One that floods is busy: when it gets to a message says nothing about the client.
        if load == Load::Idle {
            table.extend(rows("until the server has it", &bare.arrivals, &here.arrivals, wire));
            let what = "(bare, on a thread that a waker wakes: the caller's time)";
            let mut floor = rows(what, &bare.calls, &floor.calls, &[]);
            floor.truncate(1);
            floor[0].note = "not this crate: what it costs to wake a thread".to_owned();
            table.extend(floor);
        }
        if load == (Load::Flood { taken: true }) && !room {
            let note = "no goal with fewer processors than busy threads: they take turns";
            table.iter_mut().for_each(|row| row.note = note.to_owned());
        }
        table
    }

    /// One message each millisecond.
    fn send(&self, load: Load, count: usize, send: SendEach, sends: &mut Sends) {
        let base = self.base;
        let (port, server) = net::serve(None, move |wire| hear(wire, base, load));
        let url = net::url(false, port, "");
        let (calls, writes) = send(&url, base, load, count);
        let arrivals = server.join().expect("the server does not fail");
        assert_eq!((writes.len(), arrivals.len()), (count, count), "every message arrives");
        sends.calls.push(Times::new(calls));
        sends.writes.push(Times::new(writes));
        sends.arrivals.push(Times::new(arrivals));
    }

    // Ends.

    fn ends(&self, count: usize) -> Vec<Row> {
        let goal = Goal::Below(500.0);
        let mut close = Row::new("client.close, idle", Unit::Micros).goal(goal);
        let mut stop = Row::new("pipeline.stop, idle", Unit::Micros).goal(goal);
        let mut close_down = Row::new("client.close, backing off", Unit::Micros).goal(goal);
        let mut stop_down = Row::new("pipeline.stop, backing off", Unit::Micros).goal(goal);
        close.note = "bare: close, then read to the end".to_owned();
        for _ in 0..self.rounds {
            let middle = |end: fn(bool) -> f64, up: bool| {
                Times::new((0..count).map(|_| end(up)).collect()).at(0.5)
            };
            close.bare.push(middle(close_bare, true));
            close.here.push(middle(close_client, true));
            stop.here.push(middle(stop_pipeline, true));
            close_down.here.push(middle(close_client, false));
            stop_down.here.push(middle(stop_pipeline, false));
        }
        vec![close, stop, close_down, stop_down]
    }

    // Cuts.

    fn cuts(&self, authority: Option<&Authority>, count: usize) -> Vec<Row> {
        let scheme = if authority.is_some() { "wss" } else { "ws" };
        let tls = authority.map(|authority| net::connector(&authority.root));
        let (mut bare, mut here) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            let acceptor = || authority.map(|authority| authority.acceptor.clone());
            bare.push(cut(acceptor(), count, |url, up| {
                reconnect_bare(url, tls.clone(), up, count)
            }));
            here.push(cut(acceptor(), count, |url, up| reconnect_here(url, tls.clone(), up)));
        }
        let goal = Goal::Below(if authority.is_some() { 1200.0 } else { 150.0 });
        let mut table = rows(scheme, &bare, &here, &[goal]);
        table.truncate(2);
        table
    }
}

// Server to worker: the server, and who reads.

/// Writes a message each `each`, with the time in it, then takes leave.
fn feed(mut wire: Wire, base: Instant, each: Duration, count: usize) {
    let start = Instant::now() + Duration::from_millis(5);
    for number in 0..count {
        let due = start + each * u32::try_from(number).expect("few messages");
        pause_until(due);
        let text = format!("{:020}{:108}", base.elapsed().as_nanos(), ' ');
        wire.write_all(&net::frame(1, text.as_bytes())).expect("the client reads");
    }
    let _ = wire.write_all(&net::frame(8, &1000_u16.to_be_bytes()));
    net::until_closed(&mut wire);
}

/// Sleeps, but not past `due`, where it lets others run instead.
fn pause_until(due: Instant) {
    loop {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        match left.checked_sub(Duration::from_micros(300)) {
            Some(time) => thread::sleep(time),
            None => thread::yield_now(),
        }
    }
}

/// Microseconds since the time that a message has in it.
fn age(text: &[u8], base: Instant) -> f64 {
    let now = base.elapsed().as_nanos();
    let sent = text.get(..20).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    now.saturating_sub(sent.unwrap_or(now)) as f64 / 1000.0
}

fn read_bare(url: &str, base: Instant) -> Vec<f64> {
    let mut client = net::bare(url, None).expect("the server accepts");
    let thread = Builder::new().name("bare".to_owned()).spawn(move || {
        let mut times = Vec::with_capacity(32_768);
        while let Ok(message) = client.read() {
            if let tungstenite::Message::Text(text) = message {
                times.push(age(text.as_bytes(), base));
            }
        }
        times
    });
    thread.expect("a thread starts").join().expect("it does not fail")
}

/// What a program would write that wants its messages on another thread.
fn read_channel(url: &str, base: Instant) -> Vec<f64> {
    let mut client = net::bare(url, None).expect("the server accepts");
    let (sender, receiver) = crossbeam_channel::bounded(1024);
    thread::scope(|scope| {
        scope.spawn(move || {
            while let Ok(message) = client.read() {
                if let tungstenite::Message::Text(text) = message {
                    sender.send(text).expect("the worker reads on");
                }
            }
        });
        let mut times = Vec::with_capacity(32_768);
        times.extend(receiver.iter().map(|text| age(text.as_bytes(), base)));
        times
    })
}

fn read_blocks(url: &str, base: Instant, count: usize) -> Vec<f64> {
    let client = Client::builder(url).start().expect("the settings are sound");
    let mut times = Vec::with_capacity(count);
    thread::scope(|scope| {
        scope.spawn(|| {
            while times.len() < count {
                let block = client.receiver().recv_timeout(LONG).expect("every message arrives");
                times.extend(block.map(|message| age(message.as_bytes(), base)));
            }
        });
    });
    client.close(Duration::from_secs(2));
    times
}

fn read_pipeline(url: &str, base: Instant, count: usize) -> Vec<f64> {
    let client = Client::builder(url).start().expect("the settings are sound");
    let times = Arc::new(Mutex::new(Vec::with_capacity(count)));
    let its = Arc::clone(&times);
    let (done, all) = mpsc::channel();
    let pipeline = Pipeline::each(move |message: &Message| {
        let mut times = its.lock().expect("nobody panics with it");
        times.push(age(message.as_bytes(), base));
        if times.len() == count {
            let _ = done.send(());
        }
        Ok::<(), Infallible>(())
    });
    let pipeline = pipeline.source(client).processors(1).start().expect("the settings are sound");
    all.recv_timeout(LONG).expect("every message arrives");
    pipeline.stop(Duration::from_secs(2));
    let times = times.lock().expect("nobody panics with it");
    times.clone()
}

// Sends: the server, and who sends.

/// Takes the client's messages, and floods the client meanwhile if it is to; how
/// long they were on their way.
fn hear(wire: Wire, base: Instant, load: Load) -> Vec<f64> {
    if load == Load::Idle {
        return listen(wire, base, load);
    }
    let mut out = wire.socket().try_clone().expect("a socket can be");
    out.set_write_timeout(Some(LONG)).expect("a socket can have one");
    thread::scope(|scope| {
        scope.spawn(move || {
            let flood: Vec<u8> = net::frame(1, &[b'x'; 64]).repeat(CHUNK / 66);
            // An error is the end of what the client takes.
            while out.write_all(&flood).is_ok() {}
        });
        listen(wire, base, load)
    })
}

/// Takes the client's messages until it closes: with an idle server the moment
/// they are there, without sleeping, so that its own wake-up is not in their age.
fn listen(mut wire: Wire, base: Instant, load: Load) -> Vec<f64> {
    wire.socket().set_nonblocking(load == Load::Idle).expect("a socket can be");
    let (mut bytes, mut buf, mut times) = (Vec::new(), [0; 4096], Vec::new());
    let until = Instant::now() + LONG;
    while Instant::now() < until {
        match wire.read(&mut buf) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&buf[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
            Err(_) => break,
        }
        while let Some((opcode, payload)) = net::unmask(&mut bytes) {
            match opcode {
                1 | 2 => times.push(age(&payload, base)),
                8 if load == Load::Idle => {
                    wire.socket().set_nonblocking(false).expect("a socket can be");
                    let _ = wire.write_all(&net::frame(8, &payload));
                    // A client waits for the server to end first.
                    let _ = wire.socket().shutdown(Shutdown::Write);
                    net::until_closed(&mut wire);
                    return times;
                }
                // No close frame fits between what the flood writes.
                8 => {
                    let _ = wire.socket().shutdown(Shutdown::Both);
                    return times;
                }
                _ => {}
            }
        }
    }
    times
}

/// Takes, for each of `count` messages one millisecond after the other, the time that
/// `send` takes; a message is made of 64 bytes that begin with the time.
fn send_each<M>(
    base: Instant,
    count: usize,
    mut message: impl FnMut(String) -> M,
    mut send: impl FnMut(M),
) -> Vec<f64> {
    thread::sleep(Duration::from_millis(5));
    let call = |_| {
        thread::sleep(Duration::from_millis(1));
        let message = message(format!("{:020}{:44}", base.elapsed().as_nanos(), ' '));
        let start = Instant::now();
        send(message);
        micros(start)
    };
    (0..count).map(call).collect()
}

/// What is sent. Its end is noted: then the operating system has all of it.
struct Sent {
    text: String,
    base: Instant,
    ends: mpsc::Sender<f64>,
}

impl AsRef<[u8]> for Sent {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        let _ = self.ends.send(age(self.text.as_bytes(), self.base));
    }
}

/// Sends so many messages; how long the calls took, and how long it was until each
/// message was written.
type SendEach = fn(&str, Instant, Load, usize) -> (Vec<f64>, Vec<f64>);

fn send_here(url: &str, base: Instant, load: Load, count: usize) -> (Vec<f64>, Vec<f64>) {
    let taken = load != Load::Flood { taken: false };
    let overflow = if taken { Overflow::Block } else { Overflow::DropNewest };
    let client = Client::builder(url).overflow(overflow).start().expect("the settings are sound");
    client.wait_connected(LONG).expect("the server accepts");
    let sender = client.sender();
    let (ends, end) = mpsc::channel();
    let message = |text| Outgoing::from_owner(Sent { text, base, ends: ends.clone() });
    let calls = thread::scope(|scope| {
        if taken {
            scope.spawn(|| client.receiver().iter().for_each(drop));
        }
        let calls = send_each(base, count, message, |message| {
            sender.send(message).expect("it is connected");
        });
        // Sent before the close frame.
        client.close(Duration::from_secs(2));
        calls
    });
    (calls, end.try_iter().collect())
}

/// A write on the caller's own thread: nothing is handed over, and nobody reads.
fn send_bare(url: &str, base: Instant, _: Load, count: usize) -> (Vec<f64>, Vec<f64>) {
    let mut client = net::bare(url, None).expect("the server accepts");
    let times = send_each(base, count, tungstenite::Message::from, |message| {
        client.send(message).expect("the server reads");
    });
    let _ = client.close(None);
    while client.read().is_ok() {}
    (times.clone(), times)
}

/// The least that hands a message over to a thread that waits for sockets: a queue
/// under a lock, and a waker.
fn send_through(url: &str, base: Instant, _: Load, count: usize) -> (Vec<f64>, Vec<f64>) {
    let mut client = net::bare(url, None).expect("the server accepts");
    let mut poll = mio::Poll::new().expect("the system has one");
    let waker = mio::Waker::new(poll.registry(), mio::Token(0)).expect("the system has one");
    let queue: Mutex<VecDeque<tungstenite::Message>> = Mutex::default();
    let pop = || queue.lock().expect("nobody panics with it").pop_front();
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (mut events, mut writes) = (mio::Events::with_capacity(4), Vec::new());
            while writes.len() < count {
                poll.poll(&mut events, Some(LONG)).expect("the waker wakes it");
                while let Some(message) = pop() {
                    let text = message.to_text().expect("it is one").to_owned();
                    client.send(message).expect("the server reads");
                    writes.push(age(text.as_bytes(), base));
                }
            }
            let _ = client.close(None);
            while client.read().is_ok() {}
            writes
        });
        let calls = send_each(base, count, tungstenite::Message::from, |message| {
            queue.lock().expect("nobody panics with it").push_back(message);
            waker.wake().expect("the thread is there");
        });
        (calls, writer.join().expect("it does not fail"))
    })
}

// Ends.

fn micros(start: Instant) -> f64 {
    start.elapsed().as_nanos() as f64 / 1000.0
}

/// A server that stays until the client closes, or a port where there is none.
fn place(up: bool) -> (String, Option<JoinHandle<()>>) {
    if up {
        let (port, server) = net::serve(None, |mut wire| net::until_closed(&mut wire));
        (net::url(false, port, ""), Some(server))
    } else {
        (net::url(false, net::listen().1, ""), None)
    }
}

fn close_bare(_: bool) -> f64 {
    let (url, server) = place(true);
    let mut client = net::bare(&url, None).expect("the server accepts");
    thread::sleep(Duration::from_millis(2));
    let start = Instant::now();
    let _ = client.close(None);
    while client.read().is_ok() {}
    drop(client);
    let time = micros(start);
    join(server);
    time
}

fn close_client(up: bool) -> f64 {
    let (url, server) = place(up);
    let client = settled(&url, up);
    let start = Instant::now();
    let report = client.close(Duration::from_secs(2));
    let time = micros(start);
    assert!(report.stuck.is_empty(), "no thread hangs");
    join(server);
    time
}

fn stop_pipeline(up: bool) -> f64 {
    let (url, server) = place(up);
    let client = settled(&url, up);
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), Infallible>(()));
    let pipeline = pipeline.source(client).processors(2).start().expect("the settings are sound");
    thread::sleep(Duration::from_millis(2));
    let start = Instant::now();
    let report = pipeline.stop(Duration::from_secs(2));
    let time = micros(start);
    assert!(report.stuck.is_empty(), "no thread hangs");
    join(server);
    time
}

/// A client that is connected and asleep, or that waits for its next attempt.
fn settled(url: &str, up: bool) -> Client {
    let builder = Client::builder(url).backoff(Backoff::constant(Duration::from_secs(60)));
    let client = builder.start().expect("the settings are sound");
    let wanted = if up { State::Connected } else { State::Reconnecting };
    let until = Instant::now() + LONG;
    while client.state() != wanted {
        assert!(Instant::now() < until, "the client gets {wanted}");
        thread::sleep(Duration::from_micros(200));
    }
    thread::sleep(Duration::from_millis(2));
    client
}

fn join(server: Option<JoinHandle<()>>) {
    if let Some(server) = server {
        server.join().expect("the server does not fail");
    }
}

// Cuts.

/// A server that cuts `count` connections 2 ms after their upgrade; how long
/// after each cut `run`'s client said that it was up again.
fn cut<C>(
    acceptor: Option<TlsAcceptor>,
    count: usize,
    run: impl FnOnce(String, mpsc::Sender<Instant>) -> C,
) -> Times {
    let (listener, port) = net::listen();
    let url = net::url(acceptor.is_some(), port, "");
    let (ups, up) = mpsc::channel();
    let server = thread::spawn(move || {
        let mut cuts = Vec::new();
        // The client connects once more than it is cut.
        for _ in 0..=count {
            // Blocks, for no poll is quick enough; the bench's limit bounds it.
            let (socket, _) = listener.accept().expect("the client comes");
            let (wire, _) = Wire::accept(socket, acceptor.as_ref()).expect("it upgrades");
            thread::sleep(Duration::from_millis(2));
            cuts.push(Instant::now());
            drop(wire);
        }
        cuts
    });
    let client = run(url, ups);
    let times = gather(&up, count + 1);
    let cuts = server.join().expect("the server does not fail");
    drop(client);
    let again = times.iter().skip(1).zip(&cuts);
    Times::new(again.map(|(up, cut)| up.duration_since(*cut).as_nanos() as f64 / 1000.0).collect())
}

fn gather(up: &Receiver<Instant>, count: usize) -> Vec<Instant> {
    let mut times = Vec::with_capacity(count);
    while times.len() < count {
        match up.recv_timeout(LONG) {
            Ok(at) => times.push(at),
            Err(RecvTimeoutError::Timeout) => panic!("the client did not come back"),
            Err(RecvTimeoutError::Disconnected) => panic!("the client ended"),
        }
    }
    times
}

fn reconnect_here(url: String, tls: Option<TlsConnector>, up: mpsc::Sender<Instant>) -> Client {
    let mut builder = Client::builder(url).backoff(Backoff::constant(Duration::ZERO));
    if let Some(tls) = tls {
        builder = builder.tls_connector(tls);
    }
    let builder = builder.observer(move |event| {
        if let EventKind::State { to: State::Connected, .. } = event.kind {
            let _ = up.send(Instant::now());
        }
    });
    builder.start().expect("the settings are sound")
}

/// A loop around connect and read.
fn reconnect_bare(
    url: String,
    tls: Option<TlsConnector>,
    up: mpsc::Sender<Instant>,
    cuts: usize,
) -> JoinHandle<()> {
    thread::spawn(move || {
        for _ in 0..=cuts {
            let Ok(mut client) = net::bare(&url, tls.as_ref()) else { return };
            if up.send(Instant::now()).is_err() {
                return;
            }
            while client.read().is_ok() {}
        }
    })
}
