//! What arrives: every message once, in order, accounted for.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use broadsock::crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, after, select};
use broadsock::testing::{Feed, Script, Server};
use broadsock::{
    BoxError, Client, ClientBuilder, Data, Dedup, ErrorKind, Event, EventKind, Intensity, Link,
    Overflow, Processing, Recovery, Session,
};
use support::*;

fn json(n: u64) -> String {
    format!("{{\"id\":{n}}}")
}

/// A frame header that claims this many payload bytes, of a binary message.
fn claim(bytes: u64) -> Vec<u8> {
    let mut header = vec![0x82, 127];
    header.extend(bytes.to_be_bytes());
    header
}

/// Everything up to this many accepted messages is in the queue or delivered.
fn wait_received(client: &Client, count: u64) {
    eventually("everything was received", || audit(client).ledger.received >= count);
}

/// What is in the queue, to the last message.
fn drain(client: &Client) -> Vec<u64> {
    let mut got = Vec::new();
    eventually("the queue is empty", || {
        got.extend(std::iter::from_fn(|| client.try_recv().ok()).map(|message| number(&message)));
        audit(client).ledger.in_flight == 0
    });
    got
}

fn assert_increasing(numbers: &[u64]) {
    let broken = numbers.windows(2).find(|pair| pair[0] >= pair[1]);
    assert_eq!(broken, None, "out of order or twice");
}

mod receiving {
    use super::*;

    #[test]
    fn every_way_to_receive_yields_the_messages_in_their_order() {
        let server = serve([up().numbers(0..40)]);
        let client = start(builder(&server));
        let mut got = numbers(&client, 10);
        got.extend((0..10).map(|_| number(&client.recv().unwrap())));
        got.extend(client.iter().take(10).map(|message| number(&message)));
        while got.len() < 40 {
            match client.try_recv() {
                Ok(message) => got.push(number(&message)),
                Err(TryRecvError::Empty) => linger(ms(1)),
                Err(TryRecvError::Disconnected) => panic!("ended"),
            }
        }
        assert_eq!(got, (0..40).collect::<Vec<_>>());
        assert_eq!(client.try_recv().unwrap_err(), TryRecvError::Empty);
        assert_eq!(client.recv_timeout(ms(1)).unwrap_err(), RecvTimeoutError::Timeout);
        close(&client);
        assert_eq!(client.try_recv().unwrap_err(), TryRecvError::Disconnected);
        assert_eq!(client.recv_timeout(LONG).unwrap_err(), RecvTimeoutError::Disconnected);
        assert!(client.recv().is_err());
        assert!(client.iter().next().is_none());
    }

    #[test]
    fn the_receiver_works_in_select_and_counts_what_is_taken() {
        let server = serve([up().numbers(0..1000)]);
        let client = start(builder(&server));
        let events = client.events();
        let timeout = after(LONG);
        let mut got = Vec::new();
        while got.len() < 1000 {
            select! {
                recv(client.receiver()) -> block => {
                    got.extend(block.unwrap().map(|message| number(&message)));
                }
                recv(events) -> _ => {}
                recv(timeout) -> _ => panic!("only {} came", got.len()),
            }
        }
        assert_eq!(got, (0..1000).collect::<Vec<_>>());
        assert_eq!(audit(&client).ledger.delivered, 1000);
        close(&client);
    }

    #[test]
    fn several_consumers_share_the_messages_and_each_comes_once() {
        const COUNT: u64 = 20_000;
        let server = serve([up().numbers(0..COUNT)]);
        let client = start(builder(&server).queue(256));
        let got = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while let Ok(message) = client.recv_timeout(LONG) {
                        got.lock().unwrap().push(number(&message));
                    }
                });
            }
            eventually("all were delivered", || audit(&client).ledger.delivered == COUNT);
            close(&client);
        });
        let mut got = got.into_inner().unwrap();
        got.sort_unstable();
        assert_eq!(got, (0..COUNT).collect::<Vec<_>>());
    }

    #[test]
    fn messages_stay_readable_after_close_and_then_the_iterator_ends() {
        let server = serve([up().numbers(0..100)]);
        let client = start(builder(&server));
        wait_received(&client, 100);
        let report = close(&client);
        assert_eq!(report.metrics.ledger.in_flight, 100);
        let got: Vec<u64> = client.iter().map(|message| number(&message)).collect();
        assert_eq!(got, (0..100).collect::<Vec<_>>());
        assert_eq!(audit(&client).ledger.in_flight, 0);
    }

    #[test]
    fn what_a_blocked_connection_holds_stays_readable_after_close() {
        let server = serve([up().numbers(0..1000)]);
        let client = start(builder(&server).queue(4));
        wait_blocked(&client.events(), true);
        let report = close(&client);
        let got: Vec<u64> = client.iter().map(|message| number(&message)).collect();
        assert_eq!(got.len() as u64, report.metrics.ledger.in_flight);
        assert_eq!(got, (0..got.len() as u64).collect::<Vec<_>>());
    }

    #[test]
    fn metadata_tells_connection_epoch_and_sequence() {
        let first = serve([up().send_all(["a", "b"]).close(1001, ""), up().send_all(["c", "d"])]);
        let second = serve([up().send_binary([1, 2, 3])]);
        let client = start(builder(&first).endpoint(second.url()));
        let messages: Vec<_> = (0..5).map(|_| next(&client)).collect();
        let mut seen: Vec<_> = messages
            .iter()
            .map(|message| {
                let at = message.metadata();
                assert_eq!((at.id, message.id()), (None, None), "dedup is off");
                (at.connection, at.epoch, at.sequence, message.to_string())
            })
            .collect();
        seen.sort();
        let expected = [(0, 1, 1, "a"), (0, 1, 2, "b"), (0, 2, 1, "c"), (0, 2, 2, "d")];
        let mut expected: Vec<_> =
            expected.map(|(c, e, s, text)| (c, e, s, text.to_owned())).into();
        expected.push((1, 1, 1, "<3 bytes>".to_owned()));
        assert_eq!(seen, expected);
        close(&client);
    }

    #[test]
    fn an_owned_message_is_the_same_message() {
        let server = serve([up().send("text").send_binary([0, 159, 146, 150])]);
        let client = start(builder(&server).dedup(Dedup::by_content()));
        for _ in 0..2 {
            let message = next(&client);
            let owned = message.clone().into_owned();
            assert_eq!(owned.metadata(), message.metadata());
            assert_eq!(owned.is_text(), message.is_text());
            assert_eq!(owned.text(), message.text());
            assert_eq!(owned.as_bytes(), message.as_bytes());
            assert!(owned.id().is_some());
        }
        close(&client);
    }
}

mod framing {
    use super::*;

    const SENTENCE: &str = "zażółć gęślą jaźń, 🦀 and plain words";

    #[test]
    fn bytewise_and_fragmented_messages_arrive_whole() {
        let script = up()
            .send_bytewise(SENTENCE, Duration::from_micros(1))
            .send_fragmented(SENTENCE, 7)
            .send_fragmented(SENTENCE, SENTENCE.len())
            .send_raw(b"\x02\x01a\x89\x01p\x00\x01b\x80\x00")
            .send("");
        let server = serve([script]);
        let client = start(builder(&server));
        assert_eq!(texts(&client, 3), [SENTENCE; 3]);
        assert_eq!(next(&client).as_bytes(), b"ab", "a ping between two fragments");
        assert_eq!(text(&client), "");
        assert_eq!(client.metrics().connections[0].epoch, 1);
        close(&client);
    }

    #[test]
    fn a_message_of_16_mib_arrives() {
        let large: String = (0..16 << 20).map(|n| char::from(b'a' + (n % 23) as u8)).collect();
        let server = serve([up().send(&large).send("next")]);
        let client = start(builder(&server));
        assert_eq!(next(&client).text(), Some(&*large));
        assert_eq!(text(&client), "next");
        close(&client);
    }

    /// The payload never comes, so only the header can be what is refused.
    #[test]
    fn a_message_over_the_limit_is_refused_by_its_header() {
        let server = serve([up().send_raw(claim(60 << 20)), up().send("after")]);
        let client = start(builder(&server).max_message_size(1 << 20));
        assert_eq!(next_loss(&client.events()), ErrorKind::TooLarge);
        assert!(server.wait_for(
            |record| record.received.iter().any(|received| matches!(
                received.payload,
                broadsock::testing::Payload::Close(1009, _)
            )),
            LONG
        ));
        assert_eq!(text(&client), "after", "supervision has made the connection anew");
        close(&client);
    }

    #[test]
    fn fragments_over_the_limit_together_are_refused() {
        let server = serve([up().send_fragmented(&"x".repeat(5000), 10), up().send("after")]);
        let client = start(builder(&server).max_message_size(4096));
        assert_eq!(next_loss(&client.events()), ErrorKind::TooLarge);
        assert_eq!(text(&client), "after");
        close(&client);
    }

    #[test]
    fn messages_before_an_error_in_the_same_read_are_delivered() {
        let reserved_bits = b"\xc1\x00";
        let scripts = [
            up().send_all(["a", "b"]).send_raw(reserved_bits),
            up().send_all(["c", "d"]).send_raw(claim(60 << 20)),
            up().send_all(["e", "f"]).close(1001, ""),
            up().send("g"),
        ];
        let server = serve(scripts);
        let client = start(builder(&server).max_message_size(1 << 20));
        assert_eq!(texts(&client, 7), ["a", "b", "c", "d", "e", "f", "g"]);
        assert_eq!(audit(&client).ledger.received, 7);
        close(&client);
    }
}

mod overflow {
    use super::*;

    const FLOOD: u64 = 20_000;
    const QUEUE: usize = 64;
    /// Messages of one block, for this queue: few where blocks are shed.
    fn block(policy: Overflow) -> u64 {
        if policy == Overflow::Block { 16 } else { 8 }
    }

    /// Runs a slow consumer against a flood, auditing from another thread all
    /// the while, until the client has received `enough`; what came.
    fn flood(policy: Overflow, client: &Client, enough: impl Fn(&Client) -> bool) -> Vec<u64> {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let auditor = scope.spawn(|| {
                let mut looks = 0_u64;
                while looks == 0 || !done.load(SeqCst) {
                    let ledger = audit(client).ledger;
                    let limit = QUEUE as u64 + block(policy);
                    assert!(ledger.in_flight <= limit, "{policy}: {ledger}");
                    looks += 1;
                    thread::yield_now();
                }
                looks
            });
            let mut got = Vec::new();
            while !enough(client) && !auditor.is_finished() {
                match client.recv_timeout(ms(5)) {
                    Ok(message) => got.push(number(&message)),
                    Err(_) => continue,
                }
                if got.len() % 100 == 0 {
                    linger(ms(1));
                }
            }
            done.store(true, SeqCst);
            assert!(auditor.join().unwrap() > 0);
            got.extend(drain(client));
            got
        })
    }

    fn all_received(client: &Client) -> bool {
        client.metrics().ledger.received >= FLOOD
    }

    fn flooded(policy: Overflow) -> (Server, Client) {
        let server = serve([up().numbers(0..FLOOD)]);
        let client = start(builder(&server).queue(QUEUE).overflow(policy));
        (server, client)
    }

    #[test]
    fn block_loses_and_reorders_nothing() {
        let (_server, client) = flooded(Overflow::Block);
        let got = flood(Overflow::Block, &client, all_received);
        assert_eq!(got, (0..FLOOD).collect::<Vec<_>>());
        let report = close(&client);
        assert_eq!(report.metrics.ledger.dropped, 0);
        assert_eq!(report.metrics.connections[0].epoch, 1);
    }

    #[test]
    fn drop_oldest_counts_exactly_what_is_missing() {
        let (_server, client) = flooded(Overflow::DropOldest);
        let got = flood(Overflow::DropOldest, &client, all_received);
        assert_increasing(&got);
        assert_eq!(got.last(), Some(&(FLOOD - 1)), "the newest is kept");
        let dropped = close(&client).metrics.dropped;
        assert_eq!(dropped.oldest + got.len() as u64, FLOOD);
        assert_eq!(dropped.newest + dropped.disconnect + dropped.closed, 0);
    }

    #[test]
    fn drop_newest_counts_exactly_what_is_missing() {
        let (_server, client) = flooded(Overflow::DropNewest);
        let got = flood(Overflow::DropNewest, &client, all_received);
        assert_increasing(&got);
        assert_eq!(got.first(), Some(&0), "the oldest is kept");
        let dropped = close(&client).metrics.dropped;
        assert_eq!(dropped.newest + got.len() as u64, FLOOD);
        assert_eq!(dropped.oldest + dropped.disconnect + dropped.closed, 0);
    }

    #[test]
    fn disconnect_cuts_the_connection_and_counts_what_did_not_fit() {
        let server = serve([up().numbers(0..FLOOD), up().numbers(FLOOD..FLOOD + 10)]);
        let client = start(builder(&server).queue(QUEUE).overflow(Overflow::Disconnect));
        let events = client.events();
        // Nobody consumes before the queue is full.
        assert_eq!(next_loss(&events), ErrorKind::Overflow);
        let got = flood(Overflow::Disconnect, &client, |client| {
            client.metrics().connections[0].messages >= 10
                && client.metrics().connections[0].connects == 2
                && client.metrics().ledger.in_flight == 0
                && client.metrics().ledger.delivered > 10
        });
        assert_increasing(&got);
        assert!(got.len() >= QUEUE);
        let metrics = close(&client).metrics;
        assert!(metrics.dropped.disconnect > 0);
        assert_eq!(metrics.dropped.disconnect + got.len() as u64, metrics.ledger.received);
        assert_eq!(metrics.ledger.dropped, metrics.dropped.disconnect);
    }

    #[test]
    fn the_queue_is_bounded_in_bytes_too() {
        const SIZE: usize = 10_000;
        let server = serve([up().flood(0..500, |n| format!("{n:0SIZE$}"))]);
        let client = start(builder(&server).queue_bytes(10 * SIZE));
        wait_blocked(&client.events(), true);
        // What one read brings may be over it, and what is held comes on top.
        let ledger = audit(&client).ledger;
        assert!(ledger.in_flight < 100, "{ledger}");
        for n in 0..500 {
            assert_eq!(text(&client).parse(), Ok(n));
        }
        close(&client);
    }

    #[test]
    fn a_queue_of_one_works_with_block() {
        let server = serve([up().numbers(0..300)]);
        let client = start(builder(&server).queue(1));
        assert_eq!(numbers(&client, 300), (0..300).collect::<Vec<_>>());
        close(&client);
    }

    #[test]
    fn a_queue_of_one_works_with_the_dropping_policies() {
        for (policy, kept) in [(Overflow::DropOldest, 99), (Overflow::DropNewest, 0)] {
            let server = serve([up().numbers(0..100)]);
            let client = start(builder(&server).queue(1).overflow(policy));
            wait_received(&client, 100);
            assert_eq!(drain(&client), [kept], "{policy}");
            assert_eq!(close(&client).metrics.ledger.dropped, 99, "{policy}");
        }
    }

    #[test]
    fn a_queue_of_one_works_with_disconnect() {
        let server = serve([up().numbers(0..100), up()]);
        let client = start(builder(&server).queue(1).overflow(Overflow::Disconnect));
        assert_eq!(next_loss(&client.events()), ErrorKind::Overflow);
        assert_eq!(drain(&client), [0]);
        let metrics = close(&client).metrics;
        assert_eq!(metrics.dropped.disconnect + 1, metrics.ledger.received);
    }

    /// The lost connection leaves a block for which there was no room.
    #[test]
    fn a_connection_lost_while_it_is_blocked_loses_nothing() {
        let server = serve([up().numbers(0..1000), up().numbers(1000..1100)]);
        // A blocked connection learns of its loss by the pings it sends.
        let client = start(builder(&server).queue(16).ping_interval(ms(50)).pong_timeout(LONG));
        let events = client.events();
        wait_blocked(&events, true);
        server.cut(0);
        next_loss(&events);
        eventually("it is back", || client.metrics().connections[0].connects == 2);
        let before = audit(&client).ledger;
        assert!(before.in_flight > 0 && before.received < 1000, "{before}");
        let mut got = Vec::new();
        while got.last() != Some(&1099) {
            got.push(number(&next(&client)));
        }
        let first = got.len() - 100;
        assert_eq!(got[..first], (0..first as u64).collect::<Vec<_>>());
        assert_eq!(got[first..], (1000..1100).collect::<Vec<_>>());
        let ledger = close(&client).metrics.ledger;
        assert_eq!((ledger.in_flight, ledger.dropped), (0, 0), "{ledger}");
    }

    struct Beating;

    impl Session for Beating {
        fn heartbeat_interval(&self) -> Option<Duration> {
            Some(ms(10))
        }

        fn on_heartbeat(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
            link.send("beat");
            link.emit("beat");
            Ok(())
        }
    }

    #[test]
    fn what_a_heartbeat_emits_while_reading_is_blocked_waits_its_turn() {
        let server = serve([up().numbers(0..200)]);
        let client = start(builder(&server).queue(16).session(|| Beating));
        wait_blocked(&client.events(), true);
        let seen = server.texts().len();
        assert!(server.wait_for(|record| record.texts().count() >= seen + 3, LONG));
        let (mut got, mut beats) = (Vec::new(), 0);
        while got.len() < 200 {
            let message = next(&client);
            match message.text() {
                Some("beat") => beats += 1,
                _ => got.push(number(&message)),
            }
        }
        assert_eq!(got, (0..200).collect::<Vec<_>>());
        assert!(beats >= 3);
        close(&client);
        client.iter().for_each(drop);
        assert_eq!(audit(&client).ledger.in_flight, 0);
    }

    /// Is ready when it was welcomed, and says so.
    struct Welcomed;

    impl Session for Welcomed {
        fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
            link.hold();
            Ok(())
        }

        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            if data.as_bytes() == b"welcome" {
                link.ready();
                link.send("thank you");
            } else {
                link.emit(data);
            }
            Ok(())
        }
    }

    #[test]
    fn sessions_open_again_and_again_although_nobody_takes_what_they_bring() {
        const EPOCHS: u64 = 40;
        // The welcome comes with what follows it.
        let text = |text: &str| [&[0x81, text.len() as u8], text.as_bytes()].concat();
        let all = [&text("welcome")[..], &text("a").repeat(50)].concat();
        let server = serve([up().send_raw(all).expect("thank you").cut()]);
        // While nothing is read, a ping finds out that the server has cut.
        let builder = builder(&server).ping_interval(ms(10)).pong_timeout(LONG);
        let client = start(builder.queue(32).session(|| Welcomed));
        eventually("so many epochs were ready", || client.metrics().connects() >= EPOCHS);
        let ledger = audit(&client).ledger;
        assert_eq!((ledger.delivered, ledger.dropped), (0, 0), "{ledger}");
        close(&client);
    }

    /// A queue of as many messages has blocks of one.
    const SMALL: u64 = 2;
    /// What a connection may hold beside it, and still connect.
    const HELD: u64 = 15;

    /// Never ready before its welcome, and says when a thread can hold one more, and none.
    struct Patient;

    impl Session for Patient {
        fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
            link.hold();
            Ok(())
        }

        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            match data {
                Data::Text("welcome") => link.ready(),
                _ => link.emit(data),
            }
            let nearly = data.as_bytes() == json(SMALL + HELD - 1).as_bytes();
            if nearly || data.as_bytes() == json(SMALL + HELD).as_bytes() {
                link.send(if nearly { "nearly full" } else { "full" });
            }
            Ok(())
        }
    }

    /// A client that takes every error for unrecoverable, and whose connection finds
    /// out that its server is gone although it reads nothing.
    fn short_lived(server: &Server) -> ClientBuilder {
        let builder = builder(server).queue(SMALL as usize).session(|| Patient);
        let builder = builder.classify(|_, _| Recovery::Unrecoverable);
        builder.ping_interval(ms(10)).pong_timeout(LONG)
    }

    /// Fills the queue and most of what a thread may hold, and cuts.
    fn fills() -> Script {
        up().numbers(0..SMALL + HELD).expect("nearly full").cut()
    }

    fn wait_restarting(events: &Receiver<Event>) {
        find(events, |event| matches!(event.kind, EventKind::Restarting { .. }).then_some(()));
    }

    #[test]
    fn the_second_of_two_unrecoverable_errors_shed_what_nobody_had_taken() {
        let full = SMALL + HELD;
        let more = up().numbers(full..full + HELD).pause(ms(200)).cut();
        let server = serve([fills(), more, up().numbers(100..110).send("welcome")]);
        let client = start(short_lived(&server));
        let events = client.events();
        wait_restarting(&events);
        wait_restarting(&events);
        let mut got = Vec::new();
        while got.last() != Some(&109) {
            got.push(number(&next(&client)));
        }
        // The second thread read the one that it could hold.
        assert_eq!(got, (0..=full).chain(100..110).collect::<Vec<_>>());
        let metrics = close(&client).metrics;
        assert_eq!((metrics.ledger.dropped, metrics.ledger.in_flight), (0, 0), "{metrics:?}");
        assert_eq!(metrics.restarts, 2);
    }

    #[test]
    fn a_connection_that_could_hold_no_more_tried_to_connect_although_no_session_could_open() {
        // As much as it may hold, and then a server that would have to be read.
        let server = serve([
            up().numbers(0..=SMALL + HELD).expect("nearly full").expect("full").cut(),
            up().numbers(100..110).send("welcome"),
        ]);
        let builder = builder(&server).queue(SMALL as usize).session(|| Patient);
        // While nothing is read, a ping finds out that the server has cut.
        let client = start(builder.ping_interval(ms(10)).pong_timeout(LONG));
        let events = client.events();
        find(&events, |event| matches!(event.kind, EventKind::AttemptFailed { .. }).then_some(()));
        // Time enough for an attempt that nothing comes of.
        assert!(client.wait_connected(ms(300)).is_err());
        assert_eq!((server.requests().len(), client.metrics().attempts()), (1, 1));
        let got = numbers(&client, (SMALL + HELD + 11) as usize);
        assert_eq!(got, (0..=SMALL + HELD).chain(100..110).collect::<Vec<_>>());
        assert_eq!(close(&client).metrics.ledger.dropped, 0);
    }

    #[test]
    fn what_an_ended_thread_held_is_there_for_a_consumer_who_is_told_that_there_is_room() {
        let server = serve([fills(), Script::new().status(401, [])]);
        let restarts = Intensity { restarts: 10, within: LONG };
        let client = start(short_lived(&server).restart_intensity(restarts));
        let events = client.events();
        // Now it is some time to the next one.
        (0..4).for_each(|_| wait_restarting(&events));
        let got = numbers(&client, (SMALL + HELD) as usize);
        assert_eq!(got, (0..SMALL + HELD).collect::<Vec<_>>());
        wait_blocked(&events, false);
        let ledger = close(&client).metrics.ledger;
        assert_eq!((ledger.dropped, ledger.in_flight), (0, 0), "{ledger}");
    }

    #[test]
    fn what_an_ended_thread_held_stays_readable_when_no_other_follows() {
        let all: Vec<u64> = (0..SMALL + HELD).collect();
        let taken = |client: &Client| -> Vec<u64> { client.iter().map(|m| number(&m)).collect() };
        // It fails for good.
        let server = serve([fills()]);
        let never = Intensity { restarts: 0, within: LONG };
        let client = start(short_lived(&server).restart_intensity(never));
        assert_eq!(taken(&client), all);
        assert!(client.error().is_some());
        assert_eq!(audit(&client).ledger.dropped, 0);
        // It is closed before the next thread starts, or just then.
        let server = serve([fills()]);
        let client = start(short_lived(&server));
        wait_restarting(&client.events());
        assert_eq!(close(&client).metrics.ledger.in_flight, SMALL + HELD);
        assert_eq!(taken(&client), all);
        assert_eq!(audit(&client).ledger.dropped, 0);
    }
}

mod dedup {
    use super::*;

    const TOTAL: u64 = 200;

    /// A feed that repeats its last 20 messages on each of 10 connections.
    fn replaying(make: impl Fn(u64) -> String + Send + Sync + 'static) -> Server {
        let feed = Feed::new(TOTAL, make).replay(20);
        let script = up().feed(&feed, 20).close(1001, "");
        let mut scripts = vec![script; 10];
        scripts.push(up().feed(&feed, 0).send("end"));
        serve(scripts)
    }

    /// Every message of a replaying feed comes once, and the rest is counted.
    fn comes_once(settings: impl FnOnce(ClientBuilder) -> ClientBuilder) {
        let server = replaying(json);
        let client = start(settings(builder(&server)));
        assert_eq!(numbers(&client, TOTAL as usize), (0..TOTAL).collect::<Vec<_>>());
        assert_eq!(text(&client), "end");
        let ledger = close(&client).metrics.ledger;
        assert_eq!(ledger.duplicates, 10 * 20, "{ledger}");
        assert_eq!(ledger.delivered, TOTAL + 1, "{ledger}");
    }

    #[test]
    fn repeats_after_a_reconnect_are_dropped_and_counted_by_content() {
        comes_once(|builder| builder.dedup(Dedup::by_content()));
    }

    #[test]
    fn repeats_after_a_reconnect_are_dropped_and_counted_by_pointer() {
        comes_once(|builder| builder.dedup(Dedup::by_pointer("/id")));
    }

    #[test]
    fn repeats_after_a_reconnect_are_dropped_and_counted_by_function() {
        let id = |data: Data<'_>| data.text().map(str::to_owned);
        comes_once(|builder| builder.dedup(Dedup::by(id)));
    }

    /// Emits each message with itself as its id.
    struct Naming;

    impl Session for Naming {
        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            link.emit_with_id(data, data.as_bytes());
            Ok(())
        }
    }

    #[test]
    fn repeats_after_a_reconnect_are_dropped_and_counted_by_session() {
        comes_once(|builder| builder.dedup(Dedup::by_session()).session(|| Naming));
    }

    #[test]
    fn without_dedup_equal_messages_all_arrive() {
        let server = serve([up().send_all(["same"; 50]).close(1001, ""), up().send("same")]);
        let client = start(builder(&server));
        assert_eq!(texts(&client, 51), ["same"; 51]);
        assert_eq!(close(&client).metrics.ledger.duplicates, 0);
    }

    #[test]
    fn equal_bytes_as_text_and_as_binary_are_two_messages() {
        let server = serve([up().send("a").send_binary("a").send("a").send_binary("a").send("b")]);
        let client = start(builder(&server).dedup(Dedup::by_content()));
        let kinds: Vec<bool> = (0..3).map(|_| next(&client).is_text()).collect();
        assert_eq!(kinds, [true, false, true]);
        assert_eq!(close(&client).metrics.ledger.duplicates, 2);
    }

    #[test]
    fn messages_without_an_id_pass_and_are_counted() {
        let texts_sent = ["no json", "{\"id\":1}", "{\"x\":1}", "{\"x\":1}", "{\"id\":1}", "end"];
        let server = serve([up().send_all(texts_sent)]);
        let client = start(builder(&server).dedup(Dedup::by_pointer("/id")));
        assert_eq!(texts(&client, 5), ["no json", "{\"id\":1}", "{\"x\":1}", "{\"x\":1}", "end"]);
        let metrics = close(&client).metrics;
        assert_eq!((metrics.without_id, metrics.ledger.duplicates), (4, 1));
    }

    #[test]
    fn a_failed_message_is_accepted_again_and_a_completed_one_is_not() {
        let server = serve([up().send("a")]);
        let client = start(builder(&server).dedup(Dedup::by_content()));
        let message = next(&client);
        let id = message.id().unwrap();
        assert_eq!(client.processing(id), Some(Processing::InFlight));
        assert!(client.forget(&message));
        assert_eq!(client.processing(id), None);
        server.push("a");
        let again = next(&client);
        assert_eq!(again.id(), Some(id));
        client.complete(&again);
        assert_eq!(client.processing(id), Some(Processing::Done));
        server.push("a");
        server.push("b");
        assert_eq!(text(&client), "b");
        assert_eq!(close(&client).metrics.ledger.duplicates, 1);
    }

    #[test]
    fn what_was_shed_is_accepted_when_it_comes_again() {
        let server = serve([up().numbers(0..100)]);
        let client = start(
            builder(&server)
                .queue(1)
                .overflow(Overflow::DropNewest)
                .dedup(Dedup::by_pointer("/id")),
        );
        wait_received(&client, 100);
        assert_eq!(drain(&client), [0]);
        server.push(&json(50));
        assert_eq!(number(&next(&client)), 50);
        server.push(&json(0));
        eventually("the repeat was seen", || audit(&client).ledger.duplicates == 1);
        close(&client);
    }

    #[test]
    fn the_window_is_bounded_in_number() {
        let script = up().send_all(["a", "b", "c", "d", "d", "b", "a", "end"]);
        let server = serve([script]);
        let client = start(builder(&server).dedup(Dedup::by_content().capacity(3)));
        assert_eq!(texts(&client, 6), ["a", "b", "c", "d", "a", "end"]);
        assert_eq!(close(&client).metrics.ledger.duplicates, 2);
    }

    #[test]
    fn the_window_is_bounded_in_time() {
        let server = serve([up().send("a")]);
        let client = start(builder(&server).dedup(Dedup::by_content().expire_after(ms(300))));
        let first = next(&client).metadata().received_at;
        let mut second = None;
        eventually("it is accepted again", || {
            server.push("a");
            second = client.recv_timeout(ms(20)).ok();
            second.is_some()
        });
        let second = second.unwrap().metadata().received_at;
        assert!(second - first >= ms(300), "{:?}", second - first);
        close(&client);
    }

    #[test]
    fn two_connections_one_of_them_cut_give_no_gap_and_no_repeat() {
        const COUNT: u64 = 10_000;
        let cut = serve([up().numbers(0..3000).cut(), up().numbers(2000..COUNT)]);
        let whole = serve([up().numbers(0..COUNT)]);
        let client =
            start(builder(&cut).endpoint(whole.url()).queue(256).dedup(Dedup::by_pointer("/id")));
        let mut by_connection = BTreeMap::<usize, Vec<u64>>::new();
        for _ in 0..COUNT {
            let message = next(&client);
            by_connection.entry(message.metadata().connection).or_default().push(number(&message));
        }
        by_connection.values().for_each(|numbers| assert_increasing(numbers));
        let mut all: Vec<u64> = by_connection.into_values().flatten().collect();
        all.sort_unstable();
        assert_eq!(all, (0..COUNT).collect::<Vec<_>>());
        let rest = client.recv_timeout(ms(50));
        assert!(rest.is_err(), "{rest:?}");
        let ledger = close(&client).metrics.ledger;
        assert_eq!(ledger.delivered, COUNT, "{ledger}");
        assert!(ledger.duplicates > 0, "{ledger}");
    }
}

mod sessions {
    use super::*;

    /// Emits two, none, or fails before or after emitting, as the text asks.
    struct Obeying;

    impl Session for Obeying {
        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            match data.text().unwrap() {
                "two" => {
                    link.emit("first");
                    link.emit(&b"second"[..]);
                }
                "none" => {}
                "fail" => return Err("asked to fail".into()),
                "emit and fail" => {
                    link.emit("last words");
                    return Err("asked to fail".into());
                }
                "panic" => panic!("asked to panic"),
                other => link.emit(other),
            }
            Ok(())
        }
    }

    #[test]
    fn what_a_session_emits_skips_and_fails_on_is_accounted_for() {
        let scripts = [
            up().send_all(["two", "none", "two", "fail", "never seen"]),
            up().send_all(["none", "emit and fail", "never seen"]),
            up().send_all(["two", "panic", "never seen"]),
            up().send("end"),
        ];
        let server = serve(scripts);
        let client = start(builder(&server).session(|| Obeying));
        let events = client.events();
        let got: Vec<_> =
            (0..8).map(|_| String::from_utf8(next(&client).to_vec()).unwrap()).collect();
        let pair = ["first", "second"];
        assert_eq!(got[..4], [pair, pair].concat());
        assert_eq!(got[4..], ["last words", "first", "second", "end"]);
        for _ in 0..3 {
            assert_eq!(next_loss(&events), ErrorKind::Session);
        }
        let metrics = close(&client).metrics;
        // Skipped: two times "none", "fail" and "panic".
        assert_eq!((metrics.ledger.received, metrics.ledger.skipped), (12, 4));
        assert_eq!(metrics.ledger.delivered, 8);
    }

    /// Emits a number of messages that no block has room for.
    struct Bursting;

    impl Session for Bursting {
        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            let first: u64 = data.text().unwrap().parse()?;
            (first..first + 1000).for_each(|n| link.emit(&*json(n)));
            Ok(())
        }
    }

    #[test]
    fn a_burst_larger_than_the_queue_is_neither_lost_nor_reordered() {
        let server = serve([up().flood(0..20, |n| (n * 1000).to_string())]);
        let client = start(builder(&server).queue(8).session(|| Bursting));
        assert_eq!(numbers(&client, 20_000), (0..20_000).collect::<Vec<_>>());
        close(&client);
    }

    #[test]
    fn a_session_knows_what_to_resume_from() {
        struct Resuming(Arc<Mutex<Vec<String>>>);
        impl Session for Resuming {
            fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
                let resume = link.resume().map(|resume| {
                    let id = String::from_utf8_lossy(resume.id.as_deref().unwrap_or_default());
                    format!("{} {} {id}", resume.epoch, resume.sequence)
                });
                self.0.lock().unwrap().push(resume.unwrap_or_default());
                Ok(())
            }
        }
        let server = serve([up().numbers(40..43).close(1001, ""), up().send("end")]);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&seen);
        let session = move || Resuming(Arc::clone(&shared));
        let client = start(builder(&server).dedup(Dedup::by_pointer("/id")).session(session));
        assert_eq!(numbers(&client, 3), [40, 41, 42]);
        assert_eq!(text(&client), "end");
        assert_eq!(*seen.lock().unwrap(), ["", "1 3 42"]);
        close(&client);
    }
}
