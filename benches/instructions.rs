//! How many instructions a message takes from the socket to the program, in all
//! threads together: a figure that other programs on the machine do not change.
//!
//! ```text
//! cargo bench --features testing --bench instructions
//! ```
//!
//! Needs valgrind, whose callgrind counts them; says so and ends well without
//! it. Each side receives a few messages and then many, and what the others
//! cost more is divided among them. Ends with 1 when a side needs more than its
//! budget: more than half as much again as when the budget was set.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that shows figures")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench that cannot run says so")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

mod common;

use std::hint::black_box;
use std::io::{self, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use broadsock::{
    Batch, Batching, BoxError, Client, Data, Dedup, Failure, Handler, Link, Message, Next,
    NoAcknowledger, Pipeline, Session,
};
use common::Options;
use common::child::{self, Child};
use common::net::{self, Wire};
use common::table::{Goal, Row, Table, Unit};

const FEW: u64 = 20_000;

/// What the server sends, in bytes of text.
const SIZE: usize = 64;

/// Who receives: a name, a role, and the most instructions for each message.
const SIDES: [(&str, &str, f64); 8] = [
    ("client, blocks to one worker", "blocks", BUDGETS[0]),
    ("  + dedup by content", "dedup", BUDGETS[1]),
    ("  + dedup by JSON pointer, of trades", "pointer", BUDGETS[6]),
    ("  + dedup + session that emits each", "session", BUDGETS[7]),
    ("client, recv", "recv", BUDGETS[2]),
    ("pipeline, 1 processor", "pipeline", BUDGETS[3]),
    ("pipeline, 1 processor + dedup", "pipeline-dedup", BUDGETS[4]),
    ("pipeline, 1 processor + dedup + batcher", "pipeline-batcher", BUDGETS[5]),
];

/// In the order of the sides: what was counted when they were set, half as much
/// again for the way threads happen to meet.
const BUDGETS: [f64; 8] = [100.0, 410.0, 360.0, 1390.0, 1800.0, 2580.0, 800.0, 950.0];

fn main() {
    match child::role().as_deref() {
        None => {}
        Some("server") => server(),
        Some(side) => receive(side),
    }
    let options = Options::read(Duration::from_secs(600));
    if !is_there() {
        println!("valgrind is not here: no instructions are counted");
        return;
    }
    let mut table = Table::new(
        "instructions",
        "instructions of all threads for each message; \"bare\" is a thread around \
         tungstenite's read",
    );
    let mut server = Child::start("server");
    let port = server.line();
    let more = options.pick(200_000, 20_000);
    let heading = format!("{SIZE} B text, ws");
    eprintln!("{heading} ...");
    let bare = each("bare", &port, more);
    let mut within = true;
    let mut rows = Vec::new();
    for (name, side, budget) in SIDES {
        let here = each(side, &port, more);
        within &= here <= budget;
        let mut row = Row::new(name, Unit::Count).goal(Goal::Below(budget));
        (row.bare, row.here) = (vec![bare], vec![here]);
        rows.push(row);
    }
    table.add(heading, rows);
    table.finish(&options);
    if !within {
        eprintln!("a side needs more instructions than its budget allows");
        std::process::exit(1);
    }
}

fn is_there() -> bool {
    let asked = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
    asked.is_ok_and(|status| status.success())
}

/// Instructions for each of `more` messages.
fn each(side: &str, port: &str, more: u64) -> f64 {
    let few = counted(side, port, FEW);
    let many = counted(side, port, FEW + more);
    many.saturating_sub(few) as f64 / more as f64
}

/// Instructions of a process that receives so many messages.
fn counted(side: &str, port: &str, messages: u64) -> u64 {
    let program = std::env::current_exe().expect("a program knows where it is");
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(program);
    let output = child::in_role(&mut valgrind, &format!("{side} {port} {messages}"))
        .stdin(Stdio::null())
        .output()
        .expect("valgrind starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{side} failed:\n{said}");
    let collected = said.lines().find_map(|line| line.split("Collected :").nth(1));
    collected.and_then(|count| count.trim().parse().ok()).expect("callgrind says what it counted")
}

// The server's process.

fn server() -> ! {
    common::give_up_after(Duration::from_secs(600));
    let (listener, port) = net::listen();
    child::tell(&port.to_string());
    thread::spawn(move || answer(&listener));
    child::obey(|_| {})
}

fn answer(listener: &TcpListener) {
    for socket in listener.incoming().flatten() {
        thread::spawn(move || {
            let Ok((mut wire, path)) = Wire::accept(socket, None) else { return };
            let (kind, messages) = path[1..].split_once('/').unwrap_or_default();
            // An error is the client's end.
            let _ = send(&mut wire, kind == "trades", messages.parse().unwrap_or(0));
            net::until_closed(&mut wire);
        });
    }
}

/// Sends so many messages, no two alike.
fn send(wire: &mut Wire, trades: bool, messages: u64) -> io::Result<()> {
    wire.socket().set_write_timeout(Some(Duration::from_secs(120)))?;
    let mut bytes = Vec::new();
    for number in 0..messages {
        let text = if trades { trade(number) } else { format!("{number:0SIZE$}") };
        bytes.extend(net::frame(1, text.as_bytes()));
        if bytes.len() > 256 * 1024 {
            wire.write_all(&bytes)?;
            bytes.clear();
        }
    }
    wire.write_all(&bytes)
}

/// A trade as an exchange tells it.
fn trade(number: u64) -> String {
    format!(
        r#"{{"e":"trade","E":1767225600123,"s":"BTCUSDT","t":{},"p":"67012.41000000","q":"0.00150000","b":88561201,"a":88561207,"T":1767225600121,"m":true,"M":true}}"#,
        1_000_000_000 + number
    )
}

// A side's process.

fn receive(role: &str) -> ! {
    common::give_up_after(Duration::from_secs(300));
    let words: Vec<&str> = role.split(' ').collect();
    let [side, port, messages] = words[..] else { panic!("not understood: {role}") };
    let kind = if side == "pointer" { "trades" } else { "texts" };
    let url = format!("ws://127.0.0.1:{port}/{kind}/{messages}");
    let messages = messages.parse().expect("a number");
    match side {
        "bare" => receive_bare(&url, messages),
        "blocks" => receive_blocks(&start(&url, false), messages),
        "dedup" => receive_blocks(&start(&url, true), messages),
        "pointer" => {
            let builder = Client::builder(url.as_str()).ping_interval(None);
            let client = builder.dedup(Dedup::by_pointer("/t")).start();
            receive_blocks(&client.expect("the settings are sound"), messages);
        }
        "session" => {
            let builder = Client::builder(url.as_str()).ping_interval(None);
            let builder = builder.dedup(Dedup::by_content()).session(|| PassOn);
            receive_blocks(&builder.start().expect("the settings are sound"), messages);
        }
        "recv" => {
            let client = start(&url, false);
            (0..messages).for_each(|_| look_at(&client.recv().expect("they all come")));
        }
        "pipeline" => receive_pipeline(start(&url, false), messages, false),
        "pipeline-dedup" => receive_pipeline(start(&url, true), messages, false),
        _ => receive_pipeline(start(&url, true), messages, true),
    }
    std::process::exit(0)
}

fn start(url: &str, dedup: bool) -> Client {
    let builder = Client::builder(url).ping_interval(None);
    let builder = if dedup { builder.dedup(Dedup::by_content()) } else { builder };
    builder.start().expect("the settings are sound")
}

fn receive_bare(url: &str, messages: u64) {
    let mut client = net::bare(url, None).expect("the server accepts");
    let _ = client.get_ref().socket().set_read_timeout(None);
    for _ in 0..messages {
        black_box(client.read().expect("they all come").len());
    }
}

fn receive_blocks(client: &Client, messages: u64) {
    let mut received = 0;
    for block in client.receiver() {
        received += block.len() as u64;
        block.visit(look_at);
        if received >= messages {
            return;
        }
    }
}

fn receive_pipeline(client: Client, messages: u64, batches: bool) {
    let mut builder = Pipeline::builder(Look { batches });
    if batches {
        builder = builder.batcher("all", Batching::new().timeout(Duration::from_millis(100)));
    }
    let builder = builder.source_with(client, NoAcknowledger).processors(1);
    let pipeline = builder.start().expect("the settings are sound");
    while pipeline.metrics().ledger.succeeded < messages {
        thread::sleep(Duration::from_millis(5));
    }
}

fn look_at(message: &Message) {
    black_box((message.len(), message.as_bytes().first().copied()));
}

/// A session that does the least.
struct PassOn;

impl Session for PassOn {
    fn on_message(&mut self, message: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.emit(message);
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
        look_at(message);
        Ok(if self.batches { Next::to("all", message.len()) } else { Next::done() })
    }

    fn handle_batch(&self, batch: &mut Batch<usize>) -> Result<(), Failure> {
        black_box(batch.items().sum::<usize>());
        Ok(())
    }
}
