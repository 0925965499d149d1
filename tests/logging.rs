//! What the log tells, and what it must not: its own process, as there is one logger
//! in each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Mutex;

use broadsock::testing::Script;
use broadsock::{Backoff, Client, Dedup, Message, Pipeline, Request, sources};
use common::*;
use log::{LevelFilter, Log, Metadata, Record};

/// Keeps the crate's own lines; those of its dependencies are theirs.
struct Lines(Mutex<Vec<String>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if record.target().split("::").next() == Some("broadsock") {
            self.0.lock().unwrap().push(format!("{} {}", record.level(), record.args()));
        }
    }

    fn flush(&self) {}
}

fn listen() {
    // The other test may have been first.
    let _ = log::set_logger(&LINES);
    log::set_max_level(LevelFilter::Trace);
}

fn told(words: &str) -> bool {
    LINES.0.lock().unwrap().iter().any(|line| line.contains(words))
}

#[test]
fn headers_queries_and_payloads_appear_in_no_line_of_this_crate() {
    listen();
    let greeted = || upgrade().expect("hush-opening").send(r#"{"id":"hush-id"}"#);
    let server = serve([
        Script::new().refuse(),
        Script::new().status(503, [("X-Answer", "hush-answer")]),
        greeted().send_fragmented("hush-fragments", 3).cut(),
        greeted().send("hush again").expect("hush-sent").send("hush at last").hold(),
    ]);
    let request = Request::new(format!("{}path?hush=1", server.url())).header("X-Key", "hush");
    let client = quick(request)
        .header("Authorization", "hush")
        .opening_message("hush-opening")
        .dedup(Dedup::by_pointer("/id"))
        .start()
        .unwrap();
    assert_eq!(text(&client), r#"{"id":"hush-id"}"#);
    assert_eq!(text(&client), "hush-fragments");
    assert_eq!(text(&client), "hush again");
    client.sender().send("hush-sent").unwrap();
    assert_eq!(text(&client), "hush at last", "the server has heard it");
    client.close(LONG);
    assert!(told("connection lost") && told("503"), "there is something to look at");
    let lines = LINES.0.lock().unwrap();
    let leak = lines.iter().find(|line| line.contains("hush"));
    assert_eq!(leak, None);
}

#[test]
fn a_panic_of_a_back_off_function_is_told_by_clients_and_pipelines() {
    listen();
    let server = serve([Script::new().refuse(), upgrade().send("x").hold()]);
    let client = Client::builder(server.url())
        .backoff(Backoff::custom(|_| panic!("no idea of the client")))
        .start()
        .unwrap();
    assert_eq!(text(&client), "x");
    client.close(LONG);
    assert!(told("ERROR the back-off function panicked: no idea of the client"));

    let report = Pipeline::each(|_: &Message| Err::<(), _>("not yet"))
        .source(sources::iter(["a"]))
        .retries(2, Backoff::custom(|_| panic!("no idea of the pipeline")))
        .start()
        .unwrap()
        .join();
    assert_eq!(report.ledger.failed, 1);
    assert!(told("ERROR the back-off function panicked: no idea of the pipeline"));
}
