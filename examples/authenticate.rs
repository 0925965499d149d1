//! A server that wants to know who is there: a fresh token for each attempt, a
//! login and a subscription on each connection, and a resume where the last
//! connection ended.
//!
//! ```text
//! cargo run --features testing --example authenticate
//! ```

#![allow(clippy::print_stdout, reason = "a program that shows what it gets")]

use std::error::Error;
use std::io;
use std::time::Duration;

use broadsock::testing::{Payload, Script, Server};
use broadsock::{Attempt, BoxError, Client, Data, Dedup, Link, Request, Session};

/// Asks for a token. Here the first call fails, as token services do: that
/// costs one attempt, and the next one asks again.
fn fresh_token(attempt: &Attempt) -> Result<String, BoxError> {
    match attempt.epoch {
        1 => Err("the token service is busy".into()),
        epoch => Ok(format!("token-{epoch}")),
    }
}

/// What is said on each connection before its messages count. A new one is made
/// for each, so it never has to be reset.
#[derive(Debug, Default)]
enum Login {
    #[default]
    Expected,
    Welcomed,
    Subscribed,
}

impl Session for Login {
    fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.send(r#"{"op":"login","user":"ada"}"#);
        // Not connected before `ready`; the connect deadline covers the wait.
        link.hold();
        Ok(())
    }

    fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        match (&self, data.text()) {
            (Login::Expected, Some(r#"{"op":"welcome"}"#)) => {
                link.send(subscription(link));
                *self = Login::Welcomed;
            }
            (Login::Welcomed, Some(r#"{"op":"subscribed"}"#)) => {
                link.ready();
                *self = Login::Subscribed;
            }
            (Login::Subscribed, _) => link.emit(data),
            // An error ends this connection; the next one starts with a login.
            (_, answer) => return Err(format!("login failed, {self:?}: {answer:?}").into()),
        }
        Ok(())
    }
}

/// Asks for everything after the last message this client has had.
fn subscription(link: &Link<'_>) -> String {
    let last = link.resume().and_then(|resume| resume.id.as_deref());
    match last.map(String::from_utf8_lossy) {
        Some(id) => format!(r#"{{"op":"subscribe","after":{id}}}"#),
        None => r#"{"op":"subscribe"}"#.to_owned(),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let server = start_server()?;
    let url = server.url();
    let client = Client::unconnected()
        .request_hook(move |attempt| {
            let token = fresh_token(attempt)?;
            Ok(Request::new(&url).header("Authorization", format!("Bearer {token}")))
        })
        .session(Login::default)
        // The id that dedup finds is also the one to resume from.
        .dedup(Dedup::by_pointer("/id"))
        .observer(|event| println!("{event}"))
        .start()?;

    for message in client.iter().take(6) {
        println!("    {message}");
    }
    let report = client.close(Duration::from_secs(2));

    println!("what the server saw:");
    for request in server.requests() {
        println!("    {}", request.header("Authorization").unwrap_or("no token"));
    }
    server.texts().iter().for_each(|text| println!("    {text}"));
    match report.error {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

/// Welcomes, confirms, sends three messages, and goes away once.
fn start_server() -> io::Result<Server> {
    let greet = || {
        let login = |payload: &Payload| is(payload, r#""op":"login""#);
        let subscribe = |payload: &Payload| is(payload, r#""op":"subscribe""#);
        Script::new()
            .upgrade()
            .expect_that(login)
            .send(r#"{"op":"welcome"}"#)
            .expect_that(subscribe)
            .send(r#"{"op":"subscribed"}"#)
    };
    Server::script([
        greet().numbers(1..=3).close(1001, "going away"),
        greet().numbers(4..=6).hold(),
    ])
    .start()
}

fn is(payload: &Payload, part: &str) -> bool {
    matches!(payload, Payload::Text(text) if text.contains(part))
}
