//! `tail`, as a program: its lines, its exit status, its events and its report.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::disallowed_methods, reason = "a program runs in real time")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use broadsock::testing::{Feed, Payload, Record, Script, Server};
use serde_json::{Value, json};

/// Generous: says only that something happens, not how fast.
const LONG: Duration = Duration::from_secs(20);

/// Cargo puts examples beside the folder of the tests and builds them for
/// `cargo test`, but not for `cargo test --test tail`.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let name = format!("tail{}", std::env::consts::EXE_SUFFIX);
    let program = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(program.exists(), "run `cargo build --features testing --example tail` first");
    program
}

fn tail(arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What a run of the program left.
struct Run {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    /// Runs it to its end.
    fn of(arguments: &[&str]) -> Run {
        Run::end_of(tail(arguments).spawn().unwrap())
    }

    fn end_of(child: Child) -> Run {
        let output = child.wait_with_output().unwrap();
        Run {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn lines(&self) -> Vec<&str> {
        self.stdout.lines().collect()
    }

    /// The last line on stderr.
    fn report(&self) -> Value {
        let last = self.stderr.lines().last().expect("there is a report");
        let report: Value = serde_json::from_str(last).expect(last);
        assert!(report.get("success_rate").is_some(), "{last}");
        report
    }

    fn events(&self) -> Vec<Value> {
        let events = self.stderr.lines().filter(|line| line.starts_with(r#"{"event":"#));
        events.map(|line| serde_json::from_str(line).expect(line)).collect()
    }
}

fn number(report: &Value, column: &str) -> u64 {
    report[column].as_u64().expect(column)
}

fn assert_balanced(report: &Value) {
    let sum = |columns: &[&str]| columns.iter().map(|name| number(report, name)).sum::<u64>();
    let ends = sum(&["duplicates", "skipped", "dropped", "accepted"]);
    assert_eq!(number(report, "received"), ends, "{report}");
    assert_eq!(number(report, "accepted"), sum(&["delivered", "in_flight"]), "{report}");
}

/// Sends those texts on every connection and stays.
fn serving<'a>(texts: impl IntoIterator<Item = &'a str>) -> Server {
    Server::script([Script::new().upgrade().send_all(texts).hold()]).start().unwrap()
}

#[test]
fn messages_come_out_one_a_line_and_max_messages_ends_with_0() {
    let script = Script::new().upgrade().send("plain").send("two\r\nparts").send("");
    let script = script.send_binary([1, 2, 3]).send("last").send("too many").hold();
    let server = Server::script([script]).start().unwrap();
    let run = Run::of(&["--max-messages", "5", "--report", &server.url()]);
    assert_eq!(run.lines(), ["plain", "two  parts", "", "<3 bytes>", "last"]);
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    let report = run.report();
    assert_balanced(&report);
    assert_eq!(number(&report, "delivered"), 5);
    assert_eq!((&report["attempts"], &report["connects"]), (&json!(1), &json!(1)));
    assert_eq!((&report["success_rate"], &report["error"]), (&json!(1.0), &Value::Null));
}

#[test]
fn max_messages_0_and_an_elapsed_duration_end_with_0() {
    let server = serving(["a"]);
    let run = Run::of(&["--max-messages", "0", &server.url()]);
    assert_eq!((run.status, run.stdout.as_str(), run.stderr.as_str()), (Some(0), "", ""));
    let run = Run::of(&["--duration", "0.3", "--report", &server.url()]);
    assert_eq!((run.status, run.lines()), (Some(0), vec!["a"]));
    assert_eq!(number(&run.report(), "delivered"), 1);
}

#[test]
fn a_refusal_ends_with_1_after_four_attempts_and_names_the_cause() {
    let server = Server::script([Script::new().status(401, [])]).start().unwrap();
    let run = Run::of(&["--report", "--events", &server.url()]);
    assert_eq!(run.status, Some(1), "{}", run.stderr);
    let report = run.report();
    assert_eq!((&report["attempts"], &report["connects"]), (&json!(4), &json!(0)));
    assert!(report["error"].as_str().unwrap().contains("401"), "{report}");
    assert_eq!(server.stats().accepted, 4);
    let told = run.stderr.lines().any(|line| line.starts_with("tail: ") && line.contains("401"));
    assert!(told, "{}", run.stderr);
    let count = |name| run.events().iter().filter(|event| event["event"] == name).count();
    assert_eq!((count("attempt_failed"), count("restarting"), count("failed")), (4, 3, 1));
}

#[test]
fn max_attempts_limits_the_first_connection_and_later_ones() {
    let refuse = Script::new().status(503, []);
    let server = Server::script([Script::new().upgrade().close(1001, ""), refuse]).start().unwrap();
    let arguments = ["--max-attempts", "3", "--backoff-max", "0.02", "--report"];
    let run = Run::of(&[&arguments[..], &[&server.url()]].concat());
    assert_eq!(run.status, Some(1), "{}", run.stderr);
    // The connection that was lost at once is the first failure.
    assert_eq!(number(&run.report(), "attempts"), 3);
    let run = Run::of(&[&arguments[..], &["ws://127.0.0.1:1"]].concat());
    assert_eq!((run.status, number(&run.report(), "attempts")), (Some(1), 3));
}

#[test]
fn a_wrong_command_line_ends_with_2_and_a_hint() {
    let url = "ws://127.0.0.1:1";
    for (arguments, part) in [
        (&[][..], "no URL"),
        (&["--unknown", url], "--unknown"),
        (&["--events=yes", url], "--events"),
        (&[url, "--header"], "--header"),
        (&["--header", "secret", url], "NAME: VALUE"),
        (&["--header", "a\nb: secret", url], "header"),
        (&["--ping-interval", "-1", url], "--ping-interval"),
        (&["--pong-timeout", "NaN", url], "--pong-timeout"),
        (&["--duration", "1e300", url], "--duration"),
        (&["--connect-timeout", "0", url], "connect_timeout"),
        (&["--backoff-base", "2", "--backoff-max", "1", url], "base"),
        (&["--max-attempts", "0", url], "max_attempts"),
        (&["--max-messages", "many", url], "--max-messages"),
        (&["--queue", "0", url], "queue"),
        (&["--overflow", "drop", url], "drop-oldest"),
        (&["--id", "id", url], "JSON pointer"),
        (&["--id", "/id", "--dedup-content", url], "--dedup-content"),
        (&["--ca", "/no/such/file", url], "/no/such/file"),
        (&["http://127.0.0.1:1"], "http"),
    ] {
        let run = Run::of(arguments);
        assert_eq!(run.status, Some(2), "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.starts_with("tail: "), "{}", run.stderr);
        assert!(run.stderr.contains(part), "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains("--help"), "{}", run.stderr);
        assert!(!run.stderr.contains("secret"), "{}", run.stderr);
    }
    let run = Run::of(&["--help"]);
    assert_eq!((run.status, run.stderr.as_str()), (Some(0), ""));
    assert!(run.stdout.contains("Usage: tail"));
}

#[test]
fn events_are_complete_and_in_order_and_have_their_fields() {
    let server = Server::script([
        Script::new().status(503, []),
        Script::new().upgrade().send("a").cut(),
        Script::new().upgrade().send("b").hold(),
    ])
    .start()
    .unwrap();
    let run = Run::of(&[
        "--backoff-base=0.05",
        "--backoff-max=0.1",
        "--max-messages=2",
        "--events",
        "--report",
        &server.url(),
    ]);
    assert_eq!((run.status, run.lines()), (Some(0), vec!["a", "b"]));
    let events = run.events();
    let mut before = 0;
    for event in &events {
        assert_eq!(event["connection"], 0);
        let at = number(event, "t_ms");
        assert!(at >= before, "{event}");
        before = at;
    }
    let shown: Vec<String> = events
        .iter()
        .map(|event| match event["event"].as_str().unwrap() {
            "state" => format!("{}>{}", event["epoch"], event["to"].as_str().unwrap()),
            name => format!("{}:{name}", event["epoch"]),
        })
        .collect();
    let expected = "1>connecting 1:attempt_failed 1>reconnecting \
                    2>connecting 2>opening 2>connected 2:lost 2>reconnecting \
                    3>connecting 3>opening 3>connected 3>closing 3>closed";
    assert_eq!(shown.join(" "), expected);
    let failed = &events[1];
    assert_eq!(failed["attempt"], 1);
    assert!(number(failed, "retry_in_ms") <= 100, "{failed}");
    assert!(failed["reason"].as_str().unwrap().contains("503"), "{failed}");
    let lost = &events[6];
    assert!(lost["reason"].is_string() && lost["uptime_ms"].is_u64(), "{lost}");
    let states = events.iter().filter(|event| event["event"] == "state");
    for pair in states.collect::<Vec<_>>().windows(2) {
        assert_eq!(pair[0]["to"], pair[1]["from"]);
        assert!(pair[0]["reason"].is_string());
    }
}

#[test]
fn a_feed_that_repeats_itself_after_a_cut_comes_out_once() {
    let feed = Feed::new(30, |n| format!(r#"{{"id":{n},"text":"x"}}"#)).replay(10);
    let ten = || Script::new().upgrade().feed(&feed, 10).pause(Duration::from_millis(50));
    let server = Server::script([ten().cut(), ten().cut(), ten().hold()]).start().unwrap();
    let arguments = ["--id=/id", "--backoff-max=0.05", "--max-messages=30", "--report"];
    let run = Run::of(&[&arguments[..], &[&server.url()]].concat());
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    let sent: Vec<String> = (0..30).map(|n| format!(r#"{{"id":{n},"text":"x"}}"#)).collect();
    assert_eq!(run.lines(), sent);
    assert_eq!(number(&run.report(), "duplicates"), 20);
}

#[test]
fn dedup_by_content_drops_equal_messages() {
    let server = serving(["a", "a", "b", "a", "c"]);
    let run = Run::of(&["--dedup-content", "--max-messages", "3", &server.url()]);
    assert_eq!(run.lines(), ["a", "b", "c"]);
}

#[test]
fn a_slow_consumer_under_drop_oldest_sheds_what_the_report_says() {
    let server = Server::script([Script::new().upgrade().numbers(0..5000).hold()]).start().unwrap();
    let arguments = ["--overflow=drop-oldest", "--queue=20", "--work-ms=5", "--duration=1.2"];
    let run = Run::of(&[&arguments[..], &["--events", "--report", &server.url()]].concat());
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    let report = run.report();
    assert_balanced(&report);
    let events = run.events();
    let told: Vec<_> = events.iter().filter(|event| event["event"] == "dropped").collect();
    let sum: u64 = told.iter().map(|event| number(event, "count")).sum();
    assert_eq!(sum, number(&report, "dropped"));
    assert!(told.len() <= 3, "one event a second is enough: {}", run.stderr);
    assert_eq!(number(&report, "received"), 5000);
    assert!(number(&report, "dropped") > 4000, "{report}");
    assert_eq!(number(&report, "delivered"), run.lines().len() as u64);
    assert_eq!(*run.lines().last().unwrap(), r#"{"id":4999}"#, "the newest are kept");
}

#[test]
fn opening_messages_headers_and_subprotocol_go_out_on_every_connection() {
    let wait = |payload: &Payload| matches!(payload, Payload::Text(text) if text == "two");
    let script = || Script::new().upgrade().expect_that(wait).send("ok");
    let server = Server::script([script().close(1001, ""), script().hold()]).start().unwrap();
    let run = Run::of(&[
        "--header=X-One: 1",
        "--header",
        "X-Two:2",
        "--send=one",
        "--send=two",
        "--backoff-max=0.05",
        "--max-messages=2",
        &server.url(),
    ]);
    assert_eq!((run.status, run.lines()), (Some(0), vec!["ok", "ok"]), "{}", run.stderr);
    assert_eq!(server.texts(), ["one", "two", "one", "two"]);
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    for request in &requests {
        assert_eq!((request.header("x-one"), request.header("x-two")), (Some("1"), Some("2")));
    }
    let run = Run::of(&["--subprotocol=chat", "--duration=0", &server.url()]);
    assert_eq!(run.status, Some(0));
}

#[test]
fn several_urls_are_several_connections() {
    let (first, second) = (serving(["a"]), serving(["b"]));
    let run = Run::of(&["--max-messages=2", "--events", &first.url(), &second.url()]);
    let mut lines = run.lines();
    lines.sort_unstable();
    assert_eq!((run.status, lines), (Some(0), vec!["a", "b"]));
    assert!(run.events().iter().any(|event| event["connection"] == 1));
}

#[test]
fn a_certificate_is_trusted_only_with_ca() {
    let script = Script::new().upgrade().send("private").hold();
    let server = Server::script([script]).start_tls().unwrap();
    let file = std::env::temp_dir().join(format!("broadsock-tail-{}.pem", std::process::id()));
    std::fs::File::create(&file).unwrap().write_all(server.ca_pem().unwrap().as_bytes()).unwrap();
    let run = Run::of(&["--ca", file.to_str().unwrap(), "--max-messages=1", &server.url()]);
    std::fs::remove_file(&file).unwrap();
    assert_eq!((run.status, run.lines()), (Some(0), vec!["private"]), "{}", run.stderr);
    let run = Run::of(&["--max-messages=1", "--report", &server.url()]);
    assert_eq!((run.status, run.stdout.as_str()), (Some(1), ""));
    assert!(run.report()["error"].as_str().unwrap().contains("certificate"), "{}", run.stderr);
}

#[test]
fn a_closed_stdout_ends_quietly() {
    let server = Server::script([Script::new().upgrade().numbers(0..).hold()]).start().unwrap();
    let mut child = tail(&["--report", &server.url()]).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    read_line(&mut stdout);
    drop(stdout);
    let run = Run::end_of(child);
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
    assert_balanced(&run.report());
}

fn read_line(stdout: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[cfg(unix)]
mod signals {
    use super::*;

    fn signal(child: &Child, name: &str) {
        let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Reads a first line, interrupts, and checks that it ends well.
    fn interrupted(arguments: &[&str], server: &Server, name: &str) -> Run {
        let url = server.url();
        let mut child = tail(&[arguments, &["--report", &url]].concat()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        assert_eq!(read_line(&mut stdout), "a");
        let start = Instant::now();
        signal(&child, name);
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        let mut run = Run::end_of(child);
        assert!(start.elapsed() < LONG);
        run.stdout = rest;
        assert_eq!(run.status, Some(0), "{}", run.stderr);
        assert_balanced(&run.report());
        run
    }

    #[test]
    fn ctrl_c_closes_properly_and_still_reports_while_it_waits_for_a_message() {
        for name in ["-INT", "-TERM"] {
            let server = serving(["a"]);
            let run = interrupted(&[], &server, name);
            assert_eq!(run.stdout, "");
            let closed = |record: &Record| {
                record.received.iter().any(|one| matches!(one.payload, Payload::Close(1000, _)))
            };
            assert!(server.wait_for(closed, LONG), "no close frame came");
        }
    }

    #[test]
    fn ctrl_c_cuts_the_work_on_a_message_short() {
        let server = serving(["a", "b", "c"]);
        let run = interrupted(&["--work-ms=60000"], &server, "-INT");
        assert_eq!(run.stdout, "");
        let report = run.report();
        assert_eq!((number(&report, "delivered"), number(&report, "in_flight")), (1, 2));
    }

    #[test]
    fn ctrl_c_ends_it_while_a_reader_has_stopped_reading() {
        let script = Script::new().upgrade().send("a").numbers(0..).hold();
        let server = Server::script([script]).start().unwrap();
        let mut child = tail(&["--report", &server.url()]).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 2]).unwrap();
        signal(&child, "-INT");
        assert_eq!(child.wait().unwrap().code(), Some(0));
        drop(stdout);
        assert_balanced(&Run::end_of(child).report());
    }
}
