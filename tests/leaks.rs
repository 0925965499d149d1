//! No thread, descriptor, TCP connection or memory is left behind: counted for
//! the whole process, so this file has one test, which takes one thing at a time.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod scenes;

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use broadsock::crossbeam_channel::bounded;
use broadsock::testing::{Script, Server, TestMessage};
use broadsock::{
    Backoff, Client, ClientBuilder, ErrorKind, Intensity, Message, Pipeline, Pull, Source, Stop,
};
use scenes::LONG;

#[test]
fn nothing_is_left_behind() {
    clients_that_connected();
    clients_over_tls();
    clients_that_failed();
    clients_dropped_in_each_state();
    clients_with_many_connections();
    clients_that_could_not_start();
    reconnects();
    reconnects_over_tls();
    losses_by_fin();
    what_came_with_a_message_that_is_tried_again();
    too_few_descriptors_for_every_thread();
}

fn clients_that_connected() {
    let server = serve(Script::new().upgrade().send("a").hold());
    thousand_clients("clients that connected", &server, &Client::builder(server.url()));
}

#[cfg(feature = "tls")]
fn clients_over_tls() {
    let (server, builder) = serve_tls(Script::new().upgrade().send("a").hold());
    thousand_clients("clients over TLS", &server, &builder);
}

#[cfg(not(feature = "tls"))]
fn clients_over_tls() {}

fn thousand_clients(what: &str, server: &Server, builder: &ClientBuilder) {
    nothing_stays(what, || {
        thousand_without_more_memory(what, || {
            let client = builder.clone().start().unwrap();
            assert_eq!(client.recv_timeout(LONG).unwrap().text(), Some("a"));
        });
        no_connection_is_left(server);
    });
}

fn clients_that_failed() {
    let server = serve(Script::new().status(404, []));
    let never = Intensity { restarts: 0, within: LONG };
    nothing_stays("clients that failed", || {
        for _ in 0..100 {
            let client = Client::builder(server.url()).restart_intensity(never).start().unwrap();
            assert!(client.recv_timeout(LONG).is_err());
            assert!(client.error().is_some());
        }
        no_connection_is_left(&server);
    });
    // Those that failed and are not dropped hold no thread and no descriptor.
    let mut kept = Vec::new();
    nothing_stays("clients that failed and are kept", || {
        for _ in 0..20 {
            let client = Client::builder(server.url()).restart_intensity(never).start().unwrap();
            assert!(client.recv_timeout(LONG).is_err());
            kept.push(client);
        }
        no_connection_is_left(&server);
    });
}

fn clients_dropped_in_each_state() {
    for make in scenes::all() {
        let mut name = "";
        nothing_stays("a client dropped in some state", || {
            let scene = make();
            name = scene.name;
            drop(scene);
        });
        assert!(!name.is_empty());
    }
}

fn clients_with_many_connections() {
    let server = serve(Script::new().upgrade().send("a").hold());
    nothing_stays("clients with many connections", || {
        for _ in 0..5 {
            let builder = (0..20).fold(Client::unconnected(), |b, _| b.endpoint(server.url()));
            let client = builder.start().unwrap();
            (0..20).for_each(|_| assert!(client.recv_timeout(LONG).is_ok()));
        }
        no_connection_is_left(&server);
    });
}

fn clients_that_could_not_start() {
    nothing_stays("clients that could not start", || {
        for _ in 0..100 {
            let error = Client::builder("http://localhost/").start().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Url);
            let error = Client::builder("ws://localhost/").queue(0).start().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting("queue"));
        }
    });
}

fn reconnects() {
    let server = serve(Script::new().upgrade().send("a").cut());
    thousand_reconnects("reconnects", &server, Client::builder(server.url()));
}

#[cfg(feature = "tls")]
fn reconnects_over_tls() {
    let (server, builder) = serve_tls(Script::new().upgrade().send("a").cut());
    thousand_reconnects("reconnects over TLS", &server, builder);
}

#[cfg(not(feature = "tls"))]
fn reconnects_over_tls() {}

fn thousand_reconnects(what: &str, server: &Server, builder: ClientBuilder) {
    nothing_stays(what, || {
        let client = builder.backoff(Backoff::constant(Duration::ZERO)).start().unwrap();
        thousand_without_more_memory(what, || drop(client.recv_timeout(LONG).unwrap()));
        // It goes on; a handshake of TLS has a thread for as long as it takes.
        wait(|| clients_threads() == 3).map_err(|()| threads()).unwrap();
        assert!(client.metrics().connections[0].reconnects >= 999);
        drop(client);
        no_connection_is_left(server);
    });
}

/// A server that says nothing but FIN leaves the rest to the client.
fn losses_by_fin() {
    let server = serve(Script::new().upgrade().send("a").fin());
    nothing_stays("losses by FIN", || {
        let at_once = Backoff::constant(Duration::ZERO);
        let client = Client::builder(server.url()).backoff(at_once).start().unwrap();
        (0..100).for_each(|_| assert!(client.recv_timeout(LONG).is_ok()));
        drop(client);
        no_connection_is_left(&server);
    });
}

/// In flight, one of 64 that a pull brought must not keep the others in memory.
fn what_came_with_a_message_that_is_tried_again() {
    const ALL: u64 = 1600;
    let mut sent = 0;
    let source = Pulls(move |most| {
        let count = 64.min(most).min((ALL - sent) as usize);
        let message = |n| TestMessage::text("x".repeat(500_000)).sequence(sent + n as u64).build();
        let messages: Vec<Message> = (1..=count).map(message).collect();
        sent += count as u64;
        if messages.is_empty() { Pull::Ended } else { Pull::Messages(messages) }
    });
    let before = resident();
    let handle = |message: &Message| match message.metadata().sequence % 64 {
        1 => Err("to be tried again"),
        _ => Ok(()),
    };
    let pipeline = Pipeline::each(handle)
        .source(source)
        .retries(2, Backoff::constant(LONG * 10))
        .max_in_flight(128)
        .start()
        .unwrap();
    let all_but_those = || pipeline.metrics().ledger.succeeded == ALL - ALL / 64;
    assert!(wait(all_but_those).is_ok(), "{}", pipeline.metrics().ledger);
    let grown = resident().saturating_sub(before);
    assert!(grown < 200 << 20, "{} MiB for {} messages", grown >> 20, ALL / 64);
    pipeline.stop(Duration::ZERO);
}

/// A source made of a function.
struct Pulls<F>(F);

impl<F: FnMut(usize) -> Pull + Send + 'static> Source for Pulls<F> {
    fn pull(&mut self, most: usize, _: &Stop) -> Pull {
        (self.0)(most)
    }
}

/// In a process of its own, for the limit is the process's.
fn too_few_descriptors_for_every_thread() {
    let ran = Command::new("sh")
        .args(["-c", r#"ulimit -n 40 && exec "$0" "$@""#])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "with_forty_descriptors", "--ignored"])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success() && told.contains("1 passed"), "{told}");
}

#[test]
#[ignore = "run by the other one with few descriptors"]
fn with_forty_descriptors() {
    nothing_stays("clients for which there were too few descriptors", || {
        for _ in 0..5 {
            let many = |b: broadsock::ClientBuilder, _| b.endpoint("ws://127.0.0.1:1/");
            let error = (0..30).fold(Client::unconnected(), many).start().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Spawn);
        }
    });
    // What there is suffices for one again.
    Client::builder("ws://127.0.0.1:1/").start().unwrap();
}

// Helpers.

fn serve(script: Script) -> Server {
    Server::script([script]).start().unwrap()
}

#[cfg(feature = "tls")]
fn serve_tls(script: Script) -> (Server, ClientBuilder) {
    let server = Server::script([script]).start_tls().unwrap();
    let builder = Client::builder(server.url()).root_certificate(server.ca_pem().unwrap());
    // The platform's library keeps what it loads at its first use.
    assert!(builder.clone().start().unwrap().recv_timeout(LONG).is_ok());
    no_connection_is_left(&server);
    (server, builder)
}

/// Runs it a thousand times: what the first hundred took has to do for the rest.
/// The server's own notes are in it, of about 500 bytes for each connection.
fn thousand_without_more_memory(what: &str, mut run: impl FnMut()) {
    (0..100).for_each(|_| run());
    let before = resident();
    (0..900).for_each(|_| run());
    let grown = resident().saturating_sub(before);
    assert!(grown < 2 << 20, "{what}: 900 took {grown} bytes more");
}

/// Threads and descriptors are, in the end, no more than they were before.
fn nothing_stays(what: &str, run: impl FnOnce()) {
    // Numbers, for a thread has not its own name from the first instant on.
    let counts = || (threads().values().sum::<usize>(), descriptors());
    let before = counts();
    run();
    let after = |()| format!("{what}: {before:?} became {:?}: {:?}", counts(), threads());
    // Fewer are there if something of a server's was about to end at first.
    let no_more = |(threads, files)| threads <= before.0 && files <= before.1;
    wait(|| no_more(counts())).map_err(after).unwrap();
}

fn no_connection_is_left(server: &Server) {
    assert!(server.wait_live(0, LONG), "{:?}", server.stats());
    let port = server.addr().port();
    wait(|| connections(port).is_empty()).map_err(|()| connections(port)).unwrap();
}

/// Waits for a condition that nothing announces.
fn wait(met: impl Fn() -> bool) -> Result<(), ()> {
    let (_never, waits) = bounded::<()>(1);
    for _ in 0..LONG.as_millis() / 5 {
        if met() {
            return Ok(());
        }
        let _ = waits.recv_timeout(Duration::from_millis(5));
    }
    Err(())
}

/// The names of this process's threads, as the system cuts them, and how many
/// there are of each.
fn threads() -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        // It may have ended meanwhile.
        if let Ok(name) = fs::read_to_string(task.unwrap().path().join("comm")) {
            *names.entry(name.trim().to_owned()).or_default() += 1;
        }
    }
    names
}

/// How many threads are a client's.
fn clients_threads() -> usize {
    let mut names = threads();
    names.retain(|name, _| name.starts_with("broadsock-") && !name.starts_with("broadsock-test"));
    names.values().sum()
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Bytes in memory.
fn resident() -> usize {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// TCP connections of a port that are neither listening nor over: those that
/// some side still has to close.
fn connections(port: u16) -> Vec<String> {
    let over = ["06", "07", "0A"];
    let port = format!(":{port:04X}");
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().skip(1).filter(|row| {
        let mut columns = row.split_whitespace().skip(1);
        let ends = [columns.next().unwrap(), columns.next().unwrap()];
        ends.iter().any(|end| end.ends_with(&port)) && !over.contains(&columns.next().unwrap())
    });
    rows.map(str::to_owned).collect()
}
