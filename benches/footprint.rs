//! What idle connections cost: memory, threads, descriptors, and wake-ups.
//!
//! ```text
//! cargo bench --features testing --bench footprint
//! ```
//!
//! Each side holds its connections in a process of its own, after each of them
//! brought one message; the server is a third process. Linux only: elsewhere
//! the figures are zero.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that shows figures")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench that cannot run says so")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

mod common;

use std::io::Write;
use std::net::TcpListener;
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use broadsock::{Client, State};
use common::Options;
use common::child::{self, Child};
use common::cpu;
use common::net::{self, Authority, LONG, Wire};
use common::table::{Goal, Row, Table, Unit};
use native_tls::{TlsAcceptor, TlsConnector};

/// Who holds the connections: a role each.
const SIDES: [&str; 3] = ["bare", "client", "client-4k"];

fn main() {
    match child::role().as_deref() {
        None => {}
        Some("server") => server(),
        Some(side) => hold(side),
    }
    let options = Options::read(Duration::from_secs(300));
    let mut table = Table::new(
        "footprint",
        "for each idle connection; \"bare\" is a thread that blocks in tungstenite's read, \
         with its defaults",
    );
    let connections = options.pick(1000, 50);
    for secure in [false, true] {
        let scheme = if secure { "wss" } else { "ws" };
        let heading = format!("{connections} idle connections, {scheme}");
        if options.wants(&heading) {
            eprintln!("{heading} ...");
            let mut server = Child::start_wide("server");
            let rows = measure(&options, &mut server, secure, connections);
            table.add(heading, rows);
        }
    }
    table.finish(&options);
}

/// What one process found.
#[derive(Debug, Clone, Copy)]
struct Found {
    kib: f64,
    threads: f64,
    descriptors: f64,
    wake_ups: f64,
}

fn measure(options: &Options, server: &mut Child, secure: bool, connections: usize) -> Vec<Row> {
    let ports = [server.line(), server.line()];
    let root = server.line();
    let place =
        format!("{} {} {root}", if secure { "wss" } else { "ws" }, ports[usize::from(secure)]);
    let watch = options.pick(3000, 300);
    let mut found: Vec<Vec<Found>> = SIDES.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.pick(3, 1) {
        for (side, found) in SIDES.iter().zip(&mut found) {
            let mut child = Child::start_wide(side);
            child.say(&format!("{connections} {watch} {place}"));
            let numbers: Vec<f64> =
                child.line().split(' ').filter_map(|number| number.parse().ok()).collect();
            let [kib, threads, descriptors, wake_ups] = numbers[..] else {
                panic!("a side tells four numbers")
            };
            found.push(Found { kib, threads, descriptors, wake_ups });
        }
    }
    let goal = Goal::Below(if secure { 60.0 } else { 20.0 });
    let row = |name: &str, unit, side: usize, of: fn(&Found) -> f64| {
        let mut row = Row::new(name, unit);
        row.bare = found[0].iter().map(of).collect();
        row.here = found[side].iter().map(of).collect();
        row
    };
    vec![
        row("memory, read_buffer_size as it is", Unit::Kib, 1, |found| found.kib).goal(goal),
        row("memory, read_buffer_size(4096)", Unit::Kib, 2, |found| found.kib),
        row("threads", Unit::Count, 1, |found| found.threads),
        row("descriptors", Unit::Count, 1, |found| found.descriptors),
        row("wake-ups a second, all together", Unit::Count, 1, |found| found.wake_ups)
            .goal(Goal::Below(0.0)),
    ]
}

// The server's process.

fn server() -> ! {
    common::give_up_after(Duration::from_secs(300));
    let authority = Authority::new();
    for acceptor in [None, Some(authority.acceptor.clone())] {
        let (listener, port) = net::listen();
        child::tell(&port.to_string());
        thread::spawn(move || greet_all(&listener, acceptor.as_ref()));
    }
    child::tell(&authority.root.trim_end().replace('\n', "|"));
    child::obey(|_| {})
}

/// Sends each client one message, and then nothing.
fn greet_all(listener: &TcpListener, acceptor: Option<&TlsAcceptor>) {
    for socket in listener.incoming().flatten() {
        let acceptor = acceptor.cloned();
        let greet = move || {
            let Ok((mut wire, _)) = Wire::accept(socket, acceptor.as_ref()) else { return };
            let _ = wire.write_all(&net::frame(1, &[b'x'; 64]));
            let _ = wire.socket().set_read_timeout(None);
            net::until_closed(&mut wire);
        };
        let _ = Builder::new().stack_size(256 * 1024).spawn(greet);
    }
}

// A side's process.

/// Told in one line how many connections, for how many milliseconds to watch
/// them sleep, where they go, and the root to trust; answers with a line.
fn hold(side: &str) -> ! {
    common::give_up_after(Duration::from_secs(90));
    let side = side.to_owned();
    child::obey(move |line| {
        let words: Vec<&str> = line.split(' ').collect();
        let [connections, watch, scheme, port, root @ ..] = &words[..] else {
            panic!("not understood: {line}")
        };
        let connections = connections.parse().expect("a number");
        let watch = Duration::from_millis(watch.parse().expect("a number"));
        let url = format!("{scheme}://127.0.0.1:{port}/");
        let tls = net::connector(&root.join(" ").replace('|', "\n"));
        // What the first connection of a process takes is not what each takes.
        let secure = (*scheme == "wss").then_some(&tls);
        let first = net::bare(&url, secure).expect("the server accepts");
        let before = (cpu::resident(), cpu::thread_count(), cpu::descriptors());
        let client = match side.as_str() {
            "bare" => {
                hold_bare(&url, secure, connections);
                None
            }
            "client" => Some(hold_client(&url, &tls, connections, None)),
            _ => Some(hold_client(&url, &tls, connections, Some(4096))),
        };
        thread::sleep(Duration::from_millis(200));
        let memory = cpu::resident() - before.0;
        let threads = cpu::thread_count() - before.1;
        let descriptors = cpu::descriptors() - before.2;
        let (sleeps, start) = (cpu::sleeps(), Instant::now());
        thread::sleep(watch);
        // This thread's own sleep is one of them.
        let sleeps = (cpu::sleeps() - sleeps).saturating_sub(1);
        let wake_ups = sleeps as f64 / start.elapsed().as_secs_f64();
        let each = |total: f64| total / connections as f64;
        child::tell(&format!(
            "{} {} {} {wake_ups}",
            each(memory as f64),
            each(threads as f64),
            each(descriptors as f64)
        ));
        drop(client);
        drop(first);
    })
}

/// A thread for each, in `read`.
fn hold_bare(url: &str, tls: Option<&TlsConnector>, connections: usize) {
    let (ready, all) = std::sync::mpsc::channel();
    for _ in 0..connections {
        let (url, tls, ready) = (url.to_owned(), tls.cloned(), ready.clone());
        let read = move || {
            let mut client = net::bare(&url, tls.as_ref()).expect("the server accepts");
            let _ = client.get_ref().socket().set_read_timeout(None);
            client.read().expect("it greets");
            let _ = ready.send(());
            while client.read().is_ok() {}
        };
        Builder::new().stack_size(256 * 1024).spawn(read).expect("a thread starts");
    }
    for _ in 0..connections {
        all.recv_timeout(LONG).expect("every connection is made");
    }
}

/// One client with as many endpoints.
fn hold_client(url: &str, tls: &TlsConnector, connections: usize, buffer: Option<usize>) -> Client {
    let mut builder = Client::builder(url).tls_connector(tls.clone()).ping_interval(None);
    for _ in 1..connections {
        builder = builder.endpoint(url);
    }
    if let Some(bytes) = buffer {
        builder = builder.read_buffer_size(bytes);
    }
    let client = builder.start().expect("the settings are sound");
    for _ in 0..connections {
        client.recv_timeout(LONG).expect("every connection is made, and greeted");
    }
    assert!(client.states().iter().all(|state| *state == State::Connected));
    client
}
