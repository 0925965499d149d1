//! Answers leave on the connection and the epoch that delivered, or not at all.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashSet;

use broadsock::crossbeam_channel::bounded;
use broadsock::testing::{Payload, Record, Server};
use broadsock::{
    Batching, BoxError, Client, Data, Failure, Link, Message, Next, Outcome, Outgoing, Pipeline,
    PipelineEvent, SendErrorReason, Sender, Session, SocketAcknowledger,
};
use common::{LONG, ms, quick, serve, text, upgrade};

fn ack(client: &Client) -> SocketAcknowledger {
    SocketAcknowledger::new(client, |outcome| Some(format!("ack {}", outcome.message())))
}

/// What arrived on one connection of the server.
fn on(server: &Server, connection: usize) -> Vec<String> {
    let received = server.received().into_iter().filter(|r| r.connection == connection);
    let texts = received.filter_map(|r| match r.payload {
        Payload::Text(text) => Some(text),
        _ => None,
    });
    texts.collect()
}

fn count(number: usize) -> impl Fn(&Record) -> bool {
    move |record| record.texts().count() >= number
}

#[test]
fn answers_arrive_on_the_connection_that_delivered_and_in_order() {
    let one = serve([upgrade().flood(0..300, |n| format!("one {n}"))]);
    let two = serve([upgrade().flood(0..300, |n| format!("two {n}"))]);
    let client = quick(one.url()).endpoint(two.url()).start().unwrap();
    let acknowledger = ack(&client);
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .partition_by(|message| message.metadata().connection as u64)
        .processors(2)
        .source_with(client, acknowledger.clone())
        .start()
        .unwrap();
    for (name, server) in [("one", &one), ("two", &two)] {
        assert!(server.wait_for(count(300), LONG));
        let expected: Vec<_> = (0..300).map(|n| format!("ack {name} {n}")).collect();
        assert_eq!(server.texts(), expected);
    }
    assert_eq!((acknowledger.sent(), acknowledger.late()), (600, 0));
    assert_eq!(pipeline.stop(LONG).ledger.succeeded, 600);
}

#[test]
fn answers_tell_success_from_failure_in_the_order_of_receipt_and_may_be_none() {
    let server = serve([upgrade().send_all(["a", "bad", "quiet", "b", "worse", "c"])]);
    let client = quick(server.url()).start().unwrap();
    let acknowledger = SocketAcknowledger::new(&client, |outcome| {
        let text = match outcome {
            Outcome::Succeeded(done) if done.tag.as_deref() == Some("quiet") => return None,
            Outcome::Succeeded(done) => format!("ack {}", done.message),
            Outcome::Failed(failed) => format!("{} {}", outcome.tag()?, failed.message),
        };
        Some(text)
    });

    struct Judge;
    impl broadsock::Handler for Judge {
        type Item = ();
        fn handle_message(&self, message: &Message) -> Result<Next<()>, Failure> {
            match message.text() {
                Some("bad") => Err(Failure::permanent("no").tag("later")),
                Some("worse") => Err(Failure::permanent("no").tag("never")),
                Some("quiet") => Ok(Next::done().tag("quiet")),
                _ => Ok(Next::done()),
            }
        }
    }
    let pipeline =
        Pipeline::builder(Judge).processors(1).source_with(client, acknowledger).start().unwrap();
    assert!(server.wait_for(count(5), LONG));
    assert_eq!(server.texts(), ["ack a", "later bad", "ack b", "never worse", "ack c"]);
    drop(pipeline);
}

#[test]
fn no_answer_for_an_old_epoch_leaves_on_a_new_socket() {
    let server = serve([upgrade().send("old").pause(ms(50)).cut(), upgrade().send("new")]);
    let client = quick(server.url()).start().unwrap();
    let acknowledger = ack(&client);
    let (release, held) = bounded::<()>(0);
    let pipeline = Pipeline::each(move |message: &Message| {
        if message.text() == Some("old") {
            let _ = held.recv();
        }
        Ok::<(), String>(())
    })
    .processors(2)
    .chunk(1)
    .source_with(client, acknowledger.clone())
    .start()
    .unwrap();
    assert!(server.wait_for(count(1), LONG), "the new one is answered meanwhile");
    drop(release);
    while pipeline.metrics().ledger.succeeded < 2 {
        std::thread::yield_now();
    }
    let report = pipeline.stop(LONG);
    assert_eq!(server.texts(), ["ack new"]);
    assert_eq!((acknowledger.sent(), acknowledger.late()), (1, 1));
    assert!(report.sources[0].as_ref().unwrap().unsent.is_empty());
}

/// A client whose first socket takes little of what it sends, until it is cut.
fn one_that_is_not_read() -> (Server, Client) {
    let server = Server::script([upgrade().send("hello").stop_reading(), upgrade().send("again")])
        .receive_buffer(4096)
        .start()
        .unwrap();
    let client = quick(server.url()).outbox(1000).start().unwrap();
    assert_eq!(text(&client), "hello");
    (server, client)
}

#[test]
fn what_waits_for_an_epoch_when_it_ends_is_discarded_and_counted() {
    const EACH: usize = 64 * 1024;
    const TIED: u64 = 400;
    let (server, client) = one_that_is_not_read();
    let sender = client.sender();
    // More than the kernel takes, so that most of them wait.
    for _ in 0..TIED {
        sender.try_send_in(1, vec![b'x'; EACH]).unwrap();
    }
    sender.try_send("for any socket").unwrap();
    server.cut_all();
    assert_eq!(text(&client), "again");
    sender.try_send_in(2, "for this one").unwrap();
    assert!(server.wait_for(count(2), LONG));
    assert_eq!(on(&server, 1), ["for any socket", "for this one"]);
    let connection = client.metrics().connections[0].clone();
    assert!(connection.messages_discarded > 0);
    assert!(connection.messages_discarded <= TIED);
    let report = client.close(LONG);
    assert!(report.unsent.is_empty(), "{:?}", report.unsent);
}

/// Owns a message's bytes, and sends when they are needed no more.
struct Spokesman(Vec<u8>, Sender);

impl AsRef<[u8]> for Spokesman {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Spokesman {
    fn drop(&mut self) {
        let _ = self.1.try_send("gone");
    }
}

#[test]
fn the_owner_of_a_message_that_is_discarded_may_send() {
    let (server, client) = one_that_is_not_read();
    for _ in 0..400 {
        let owner = Spokesman(vec![b'x'; 64 * 1024], client.sender());
        client.sender().try_send_in(1, Outgoing::from_owner(owner)).unwrap();
    }
    server.cut_all();
    assert_eq!(text(&client), "again");
    assert!(server.wait_for(|record| record.texts().any(|text| text == "gone"), LONG));
    let discarded = client.metrics().connections[0].messages_discarded;
    assert!((1..=400).contains(&discarded), "{discarded}");
    client.close(LONG);
}

#[test]
fn an_epoch_that_is_over_or_to_come_takes_no_message_and_hands_it_back() {
    let server = serve([upgrade().send("one").pause(ms(20)).cut(), upgrade().send("two")]);
    let client = quick(server.url()).start().unwrap();
    let sender = client.sender();
    let refused = |epoch| sender.try_send_in(epoch, "a").unwrap_err();
    assert_eq!((text(&client), text(&client)), ("one".to_owned(), "two".to_owned()));
    for epoch in [0, 1, 3, u64::MAX] {
        assert_eq!(refused(epoch).reason, SendErrorReason::EpochOver, "{epoch}");
        assert_eq!(refused(epoch).message, Outgoing::from("a"));
    }
    sender.try_send_in(2, "b").unwrap();
    assert!(server.wait_for(count(1), LONG));
    client.close(LONG);
    assert_eq!(refused(2).reason, SendErrorReason::Closed);
    assert_eq!(server.texts(), ["b"]);
    assert_eq!(client.metrics().connections[0].messages_discarded, 0);
}

/// Never ready, so nothing leaves the outbox.
struct NeverReady;

impl Session for NeverReady {
    fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.hold();
        Ok(())
    }

    fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.emit(data);
        Ok(())
    }
}

#[test]
fn a_full_outbox_is_a_failed_acknowledgement() {
    let server = serve([upgrade().send_all(["a", "b", "c"])]);
    let client = quick(server.url()).session(|| NeverReady).outbox(2).start().unwrap();
    let acknowledger = ack(&client);
    let (tell, told) = bounded(10);
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .processors(1)
        .source_with(client, acknowledger.clone())
        .observer(move |event| {
            if let PipelineEvent::AcknowledgeFailed { reason, .. } = event {
                tell.send(reason.clone()).unwrap();
            }
        })
        .start()
        .unwrap();
    let reason = told.recv_timeout(LONG).unwrap();
    assert!(reason.contains("the outbox is full"), "{reason}");
    assert_eq!((acknowledger.sent(), acknowledger.late()), (2, 0));
    assert!(pipeline.metrics().acknowledge_failures > 0);
    pipeline.stop(ms(1000));
    assert_eq!(server.texts(), [""; 0]);
}

#[test]
fn a_graceful_stop_answers_what_it_processes_before_it_closes_the_socket() {
    let server = serve([upgrade().flood(0..400, |n| n.to_string())]);
    let client = quick(server.url()).start().unwrap();
    let acknowledger = ack(&client);

    struct Slow;
    impl broadsock::Handler for Slow {
        type Item = ();
        fn handle_message(&self, _: &Message) -> Result<Next<()>, Failure> {
            std::thread::park_timeout(ms(1));
            Ok(Next::to("thirties", ()))
        }
    }
    let pipeline = Pipeline::builder(Slow)
        .processors(1)
        .batcher("thirties", Batching::new().size(30).timeout(LONG))
        .source_with(client, acknowledger.clone())
        .start()
        .unwrap();
    assert!(server.wait_for(count(1), LONG), "it is in the middle of its work");
    let report = pipeline.stop(LONG);
    assert_eq!((report.ledger.succeeded, acknowledger.late()), (400, 0));
    assert_eq!(server.texts().len(), 400);
    assert!(server.received().iter().any(|r| matches!(r.payload, Payload::Close(1000, _))));
}

#[test]
fn an_answer_that_panics_costs_itself_only() {
    let server = serve([upgrade().send_all(["a", "panic", "b"])]);
    let client = quick(server.url()).start().unwrap();
    let acknowledger = SocketAcknowledger::new(&client, |outcome| {
        let text = outcome.message().to_string();
        assert_ne!(text, "panic", "asked to panic");
        Some(text)
    });
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .processors(1)
        .source_with(client, acknowledger.clone())
        .start()
        .unwrap();
    assert!(server.wait_for(count(2), LONG));
    assert_eq!(server.texts(), ["a", "b"]);
    let report = pipeline.stop(LONG);
    assert_eq!((report.ledger.succeeded, acknowledger.sent()), (3, 2));
}

#[test]
fn every_message_that_a_flapping_server_repeats_until_answered_is_answered_in_the_end() {
    // Each connection sends what the ones before it saw no answer for.
    let scripts = (0..10).map(|n| upgrade().numbers(n * 20..(n + 2) * 20).pause(ms(30)).cut());
    let server = serve(scripts.chain([upgrade().numbers(0..220)]));
    let client = quick(server.url()).start().unwrap();
    let acknowledger = ack(&client);
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .processors(2)
        .source_with(client, acknowledger.clone())
        .start()
        .unwrap();
    let all = |record: &Record| record.texts().collect::<HashSet<_>>().len() == 220;
    assert!(server.wait_for(all, LONG));
    // Whatever arrived came on the connection that had sent its message.
    for (connection, text) in server.received().iter().filter_map(|r| match &r.payload {
        Payload::Text(text) => Some((r.connection as u64, text)),
        _ => None,
    }) {
        let number: u64 = text.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
        let sent = connection * 20..(connection + 2) * 20;
        assert!(connection == 10 || sent.contains(&number), "{text} on {connection}");
    }
    let report = pipeline.stop(LONG);
    let metrics = &report.sources[0].as_ref().unwrap().metrics;
    assert_eq!(report.ledger.succeeded, acknowledger.sent() + acknowledger.late());
    assert!(
        metrics.connections[0].messages_sent + metrics.connections[0].messages_discarded
            <= report.ledger.succeeded
    );
}
