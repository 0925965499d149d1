//! From the socket to the acknowledgement: a client as a pipeline's source.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use bench::*;
use broadsock::testing::{Feed, Script, Server, TestAcknowledger};
use broadsock::{
    Backoff, Batching, Client, Dedup, ErrorKind, Failure, Intensity, Message, MessageId, Next,
    Pipeline, Processing, sources,
};

/// A client that has each content once, and reconnects soon.
fn client(server: &Server) -> Arc<Client> {
    let client = Client::builder(server.url())
        .backoff(Backoff::constant(ms(5)))
        .dedup(Dedup::by_content())
        .start()
        .unwrap();
    Arc::new(client)
}

fn ids(seen: &Noted<(String, MessageId)>) -> HashMap<String, MessageId> {
    seen.all().into_iter().collect()
}

#[test]
fn a_message_is_in_flight_until_it_is_acknowledged_and_done_after_success() {
    let server = Server::script([Script::new().upgrade().send("a").hold()]).start().unwrap();
    let client = client(&server);
    let (gate, seen) = (Gate::new(), Noted::default());
    let (held, note) = (gate.clone(), seen.clone());
    let hands = Hands::new(move |message| {
        note.push((message.to_string(), message.id().unwrap()));
        to_batch(message)
    })
    .batch(move |_| {
        held.enter();
        Ok(())
    });
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::builder(hands)
        .source_with(Arc::clone(&client), acknowledger.clone())
        .batcher("batch", Batching::new().size(1))
        .start()
        .unwrap();
    gate.entered.wait(1);
    let id = ids(&seen)["a"];
    assert_eq!(client.processing(id), Some(Processing::InFlight));
    gate.open();
    assert!(acknowledger.wait_succeeded(1, LONG));
    eventually("done", || client.processing(id) == Some(Processing::Done));
    let report = ends_well(&pipeline);
    all_well(&report);
    let client_report = report.sources[0].as_ref().expect("the client's report");
    assert_eq!(client_report.metrics.ledger.delivered, 1);
}

#[test]
fn a_message_that_failed_for_good_is_forgotten_and_its_redelivery_accepted() {
    let replays = Script::new().upgrade().send("good").send("bad").expect("again");
    let replays = replays.send("good").send("bad").hold();
    let server = Server::script([replays]).start().unwrap();
    let client = client(&server);
    let failing = Arc::new(AtomicBool::new(true));
    let (fails, tries) = (Arc::clone(&failing), Noted::default());
    let note = tries.clone();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(move |message: &Message| {
        note.push((message.to_string(), message.id().unwrap()));
        if message.text() == Some("bad") && fails.load(SeqCst) { Err("not now") } else { Ok(()) }
    })
    .source_with(Arc::clone(&client), acknowledger.clone())
    .processors(1)
    .retries(2, Backoff::constant(ms(1)))
    .start()
    .unwrap();
    assert!(acknowledger.wait_failed(1, LONG) && acknowledger.wait_succeeded(1, LONG));
    let ids = ids(&tries);
    eventually("forgotten", || client.processing(ids["bad"]).is_none());
    eventually("done", || client.processing(ids["good"]) == Some(Processing::Done));
    failing.store(false, SeqCst);
    client.sender().send("again").unwrap();
    assert!(acknowledger.wait_succeeded(2, LONG), "the redelivery was not accepted");
    eventually("done", || client.processing(ids["bad"]) == Some(Processing::Done));
    let count = |text: &str| tries.all().iter().filter(|(tried, _)| tried == text).count();
    assert_eq!((count("good"), count("bad")), (1, 3), "the good one is a duplicate");
    ends_well(&pipeline);
    assert_eq!(client.metrics().ledger.duplicates, 1);
}

#[test]
fn every_id_is_processed_exactly_once_though_connections_break_and_replay() {
    let feed = Feed::new(2000, |n| n.to_string()).replay(50);
    let server = Server::script([Script::new().upgrade().feed(&feed, 50).cut()]).start().unwrap();
    let client = client(&server);
    let times: Arc<Mutex<HashMap<u64, u32>>> = Arc::default();
    let count = Arc::clone(&times);
    let hands = Hands::new(to_batch).batch(move |batch| {
        for message in batch.messages() {
            *lock(&count).entry(number(message)).or_default() += 1;
        }
        Ok(())
    });
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::builder(hands)
        .source_with(Arc::clone(&client), acknowledger.clone())
        .processors(4)
        .partition_by(|message| number(message) % 8)
        .batcher("batch", Batching::new().size(20).timeout(ms(5)).concurrency(2))
        .start()
        .unwrap();
    assert!(acknowledger.wait_succeeded(2000, LONG), "{:?}", pipeline.metrics().ledger);
    ends_well(&pipeline);
    let times = lock(&times);
    assert_eq!(times.len(), 2000);
    assert!(times.values().all(|times| *times == 1));
}

#[test]
fn a_graceful_stop_under_a_flood_accounts_for_every_message_of_client_and_pipeline() {
    let server = Server::script([Script::new().upgrade().numbers(0..)]).start().unwrap();
    let client = Client::builder(server.url()).queue(500).start().unwrap();
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(|message| match message.metadata().sequence % 3 {
        0 => Ok(Next::done()),
        1 => Err(Failure::permanent("a third")),
        _ => to_batch(message),
    });
    let pipeline = Pipeline::builder(hands)
        .source_with(client, acknowledger.clone())
        .max_in_flight(200)
        .batcher("batch", Batching::new().size(10).timeout(ms(5)))
        .start()
        .unwrap();
    assert!(acknowledger.wait(2000, LONG));
    let report = ends_well(&pipeline);
    all_well(&report);
    assert_eq!(report.ledger.returned, 0);
    let client = report.sources[0].as_ref().expect("the client's report");
    assert!(client.stuck.is_empty() && client.error.is_none());
    let ledger = client.metrics.ledger;
    assert!(ledger.balanced(), "{ledger}");
    // What the client had accepted, the pipeline has processed.
    assert_eq!(ledger.accepted, report.ledger.accepted, "{ledger} / {}", report.ledger);
    assert_eq!(report.ledger.succeeded + report.ledger.failed, report.ledger.accepted);
    assert_eq!(acknowledger.outcomes().len() as u64, report.ledger.accepted);
}

#[test]
fn a_drain_never_ended_when_a_thread_that_read_no_more_was_replaced() {
    let server = Server::script([
        Script::new().upgrade().send("first").hold(),
        Script::new().status(404, []),
        Script::new().upgrade().flood(0.., |n| n.to_string()),
    ]);
    let server = server.start().unwrap();
    // While nothing is read, a ping finds out that the server has cut.
    let client = Client::builder(server.url())
        .backoff(Backoff::constant(ms(5)))
        .ping_interval(ms(10))
        .pong_timeout(LONG)
        .queue(100)
        .start()
        .unwrap();
    let client = Arc::new(client);
    let gate = Gate::new();
    let held = gate.clone();
    let pipeline = Pipeline::each(move |message: &Message| {
        match message.text() {
            Some("first") => held.enter(),
            // The feed is faster.
            _ => pass(ms(1)),
        }
        Ok::<(), String>(())
    })
    .source(Arc::clone(&client))
    .processors(1)
    .start()
    .unwrap();
    gate.entered.wait(1);
    pipeline.drain();
    // Time to hear of it.
    pass(ms(200));
    server.cut_all();
    eventually("the last one is upgraded", || client.metrics().connects() == 2);
    assert_eq!(client.metrics().restarts, 1);
    gate.open();
    eventually("the drain ends", || pipeline.has_ended());
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.returned, 0, "{}", report.ledger);
}

#[test]
fn a_client_that_fails_ends_the_pipeline_after_its_last_message_with_the_cause_in_the_report() {
    let server = Server::script([
        Script::new().upgrade().send("a").close(1002, "no more"),
        Script::new().status(403, [("X", "y")]),
    ])
    .start()
    .unwrap();
    let client = Client::builder(server.url())
        .backoff(Backoff::constant(ms(1)))
        .restart_intensity(Intensity { restarts: 1, within: LONG })
        .start()
        .unwrap();
    let pipeline =
        Pipeline::each(|_: &Message| Ok::<(), String>(())).source(client).start().unwrap();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 1);
    let cause = report.sources[0].as_ref().and_then(|report| report.error.clone());
    assert!(
        matches!(cause.as_ref().map(|e| e.kind()), Some(ErrorKind::Http { status: 403, .. })),
        "{cause:?}"
    );
}

#[test]
fn a_client_and_an_iterator_feed_one_pipeline() {
    let server = Server::script([Script::new().upgrade().send("a").hold()]).start().unwrap();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .source_with(Client::builder(server.url()).start().unwrap(), acknowledger.clone())
        .source_with(sources::iter(numbers(9)), acknowledger.clone())
        .start()
        .unwrap();
    assert!(acknowledger.wait_succeeded(10, LONG));
    let report = ends_well(&pipeline);
    all_well(&report);
    assert_eq!(report.sources.iter().flatten().count(), 1);
    assert!(server.wait_live(0, LONG), "the pipeline closes its client");
}
