//! What follows when a connection is lost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use broadsock::testing::{Feed, Payload, Script, Server};
use broadsock::{
    Backoff, BoxError, Client, ClientBuilder, Data, Dedup, ErrorKind, Event, EventKind, Jitter,
    Link, Recovery, Session, State,
};
use common::*;

fn start(scripts: impl IntoIterator<Item = Script>) -> (Server, Client, Watch) {
    start_with(scripts, |builder| builder)
}

fn start_with(
    scripts: impl IntoIterator<Item = Script>,
    change: impl FnOnce(ClientBuilder) -> ClientBuilder,
) -> (Server, Client, Watch) {
    let server = serve(scripts);
    let client = change(quick(server.url())).start().unwrap();
    let watch = Watch::new(&client);
    (server, client, watch)
}

/// 20 ms, doubling to 160 ms, without chance.
fn regular() -> Backoff {
    Backoff::exponential(ms(20), ms(160)).with_jitter(Jitter::None)
}

/// A server that greets each connection with a message and holds it.
fn greet(text: &str) -> Script {
    upgrade().send(text).hold()
}

/// Waits until the connection has stood this long without a message.
fn wait_uptime(client: &Client, least: Duration) {
    for _ in 0..LONG.as_millis() / 10 {
        if client.metrics().connections[0].uptime >= least {
            return;
        }
        assert!(client.recv_timeout(ms(10)).is_err(), "no message was to come");
    }
    panic!("never up for {least:?}: {:?}", client.metrics());
}

/// The ends of attempts and connections, in order.
fn ends(events: &[Event]) -> Vec<Failed> {
    events.iter().filter_map(|event| failed_attempt(event).or(loss(event))).collect()
}

/// Every attempt is an epoch of its own, ends at most once, and is followed by
/// the next no earlier than was told; every event carries its epoch.
fn assert_orderly(events: &[Event]) {
    let (mut epoch, mut ended, mut not_before) = (0, true, None);
    for event in events {
        if let EventKind::State { to: State::Connecting, .. } = event.kind {
            assert!(ended, "epoch {epoch} has no end");
            assert!(not_before.is_none_or(|at| event.at >= at), "too early: {event}");
            (epoch, ended) = (epoch + 1, false);
        }
        assert_eq!(event.epoch, epoch, "{event}");
        if let Some(end) = failed_attempt(event).or(loss(event)) {
            assert!(!ended, "a second end: {event}");
            ended = true;
            not_before = end.retry_in.map(|delay| event.at + delay);
        }
    }
}

mod outages {
    use super::*;

    #[test]
    fn after_outages_there_is_one_socket_and_no_message_is_lost_or_comes_twice() {
        let feed = Feed::new(600, |n| format!("{{\"id\":{n}}}")).replay(600);
        let (server, client, mut watch) =
            start_with([upgrade().feed(&feed, 100).hold()], |b| b.dedup(Dedup::by_pointer("/id")));
        let mut seen = Vec::new();
        for outage in 1..6 {
            // Some outages come in the middle of the feed, some at rest.
            let enough = if outage % 2 == 0 { seen.len() + 1 } else { outage * 100 };
            while seen.len() < enough {
                seen.push(text(&client));
            }
            server.stop();
            for _ in 0..3 {
                assert_eq!(watch.failed_attempt().kind(), ErrorKind::Connect);
            }
            server.restart().unwrap();
        }
        seen.extend(texts(&client, 600 - seen.len()));
        let all: Vec<_> = (0..600).map(|n| format!("{{\"id\":{n}}}")).collect();
        assert_eq!(seen, all);
        assert!(server.wait_live(1, LONG));
        assert_eq!(server.stats().max_live, 1);
        let report = client.close(LONG);
        let ledger = report.metrics.ledger;
        assert!(ledger.balanced() && ledger.duplicates > 0 && ledger.dropped == 0, "{ledger}");
        assert_eq!(ledger.delivered, 600);
        assert_orderly(&watch.into_all());
    }

    #[test]
    fn a_server_that_accepts_and_then_closes_is_not_hammered() {
        let (server, client, mut watch) =
            start_with([upgrade().close(1000, "")], |b| b.backoff(regular()));
        let delays: Vec<_> = (0..7).map(|_| watch.loss().retry_in().as_millis()).collect();
        assert_eq!(delays, [20, 40, 80, 160, 160, 160, 160]);
        client.close(LONG);
        let events = watch.into_all();
        assert_orderly(&events);
        let attempts = client.metrics().attempts();
        let told = count(&events, |event| {
            matches!(event.kind, EventKind::State { to: State::Connecting, .. })
        });
        assert_eq!(told as u64, attempts);
        assert!(server.stats().accepted <= attempts && server.stats().max_live == 1);
    }

    #[test]
    fn a_refusing_server_is_not_hammered() {
        let (server, client, mut watch) =
            start_with([Script::new().refuse()], |b| b.backoff(regular()));
        let failed: Vec<_> = (0..6).map(|_| watch.failed_attempt()).collect();
        let delays: Vec<_> = failed.iter().map(|f| f.retry_in().as_millis()).collect();
        assert_eq!(delays, [20, 40, 80, 160, 160, 160]);
        let attempts: Vec<_> = failed.iter().map(|f| f.attempt).collect();
        assert_eq!(attempts, [1, 2, 3, 4, 5, 6]);
        client.close(LONG);
        assert_orderly(&watch.into_all());
        assert_eq!(server.stats().max_live, 1);
    }

    #[test]
    fn a_connection_that_was_up_for_stable_after_starts_the_back_off_over() {
        let drop = upgrade().cut();
        let scripts = [drop.clone(), drop.clone(), drop, upgrade().hold(), upgrade().cut()];
        let (server, client, mut watch) =
            start_with(scripts, |b| b.backoff(regular()).stable_after(secs(1)));
        for expected in [20, 40, 80] {
            assert_eq!(watch.loss().retry_in(), ms(expected));
        }
        watch.connected();
        wait_uptime(&client, secs(1));
        server.cut_all();
        for expected in [20, 40] {
            assert_eq!(watch.loss().retry_in(), ms(expected));
        }
        let connection = &client.metrics().connections[0];
        assert!(connection.earlier_uptime >= secs(1), "{connection:?}");
    }

    #[test]
    fn a_session_that_vouches_for_its_connection_starts_the_back_off_over() {
        struct Vouch;
        impl Session for Vouch {
            fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
                if data.text() == Some("good") {
                    link.mark_healthy();
                }
                Ok(())
            }
        }
        let (good, bad) = (upgrade().send("good").cut(), upgrade().send("bad").cut());
        let scripts = [bad.clone(), bad.clone(), good.clone(), good, bad];
        let (_server, _client, mut watch) =
            start_with(scripts, |b| b.backoff(regular()).session(|| Vouch));
        let delays: Vec<_> = (0..6).map(|_| watch.loss().retry_in().as_millis()).collect();
        assert_eq!(delays, [20, 40, 20, 20, 40, 80]);
    }

    #[test]
    fn clients_that_were_dropped_together_do_not_come_back_together() {
        let server = serve([upgrade().hold()]);
        let backoff = Backoff::exponential(ms(200), ms(400));
        let clients: Vec<_> = (0..50)
            .map(|_| {
                let client = quick(server.url()).backoff(backoff.clone()).start().unwrap();
                let watch = Watch::new(&client);
                (client, watch)
            })
            .collect();
        for (client, _) in &clients {
            client.wait_connected(LONG).unwrap();
        }
        server.cut_all();
        let mut delays = HashSet::new();
        let mut back = Vec::new();
        for (client, mut watch) in clients {
            let delay = watch.loss().retry_in();
            assert!(delay >= ms(100) && delay <= ms(200), "{delay:?}");
            delays.insert(delay);
            watch.connected();
            back.push(client);
        }
        assert!(delays.len() > 45, "{delays:?}");
        assert!(server.wait_live(50, LONG));
        assert_eq!(server.stats().max_live, 50);
    }

    #[test]
    fn a_peer_that_fell_silent_is_replaced_and_never_doubled() {
        for silence in [Script::silent, Script::half_open] {
            let first = silence(upgrade().send("first"));
            let (server, client, mut watch) = start_with([first, greet("second")], |b| {
                b.ping_interval(ms(50)).pong_timeout(ms(50))
            });
            assert_eq!(texts(&client, 2), ["first", "second"]);
            assert_eq!(watch.loss().kind(), ErrorKind::NoPong);
            assert!(server.wait_live(1, LONG));
            assert_eq!(server.stats().max_live, 1);
        }
    }
}

mod close_codes {
    use super::*;

    #[test]
    fn codes_of_feeds_that_rotate_are_one_loss_each_and_a_new_connection() {
        let codes = [1000, 1001, 1005, 1011, 1014, 2000, 3000, 4000, 4999];
        let running = codes.map(|code| start([upgrade().close(code, "why"), greet("again")]));
        for ((server, client, mut watch), code) in running.into_iter().zip(codes) {
            assert_eq!(text(&client), "again", "{code}");
            let lost = watch.loss();
            assert_eq!((lost.kind(), lost.epoch), (ErrorKind::Closed { code }, 1));
            if code != 1005 {
                assert!(lost.error.to_string().contains("why"), "{}", lost.error);
            }
            let report = client.close(LONG);
            assert_eq!((report.metrics.attempts(), report.metrics.restarts), (2, 0), "{code}");
            let events = watch.into_all();
            assert_eq!(ends(&events).len(), 1, "{code}");
            assert_orderly(&events);
            assert_eq!(server.stats().max_live, 1, "{code}");
        }
    }

    #[test]
    fn a_server_that_restarts_is_given_a_random_5_to_30_seconds() {
        let running: Vec<_> = (0..6).map(|_| start([upgrade().close(1012, "")])).collect();
        let mut delays = HashSet::new();
        for (_server, _client, mut watch) in running {
            let lost = watch.loss();
            assert_eq!(lost.kind(), ErrorKind::Closed { code: 1012 });
            assert!(lost.retry_in() >= secs(5) && lost.retry_in() <= secs(30), "{lost:?}");
            delays.insert(lost.retry_in());
        }
        assert!(delays.len() > 1, "{delays:?}");
    }

    #[test]
    fn a_server_that_asks_to_try_again_later_is_given_5_seconds() {
        let (_server, client, mut watch) = start([upgrade().close(1013, "")]);
        let lost = watch.loss();
        assert_eq!(lost.kind(), ErrorKind::Closed { code: 1013 });
        assert!(lost.retry_in() >= secs(5), "{lost:?}");
        client.close(LONG);
        assert_eq!(client.metrics().attempts(), 1);
    }

    #[test]
    fn codes_that_blame_this_side_end_the_client_after_three_restarts() {
        let codes = [1002, 1003, 1007, 1008, 1009, 1010];
        let running = codes.map(|code| start([upgrade().send("a").close(code, "")]));
        for ((server, client, watch), code) in running.into_iter().zip(codes) {
            assert_eq!(drain(&client), ["a"; 4], "what came before stays");
            let cause = assert_ends_after_restarts(&client, watch);
            assert_eq!(cause.kind(), &ErrorKind::Closed { code });
            assert_eq!((server.stats().accepted, server.stats().max_live), (4, 1));
        }
    }

    #[test]
    fn a_close_by_this_side_is_no_loss() {
        let (server, client, mut watch) = start([greet("hello")]);
        watch.connected();
        let report = client.close(LONG);
        assert!(report.error.is_none() && report.stuck.is_empty());
        let events = watch.into_all();
        assert_eq!(ends(&events).len(), 0);
        let path: Vec<_> = events
            .iter()
            .filter_map(|event| match event.kind {
                EventKind::State { to, .. } => Some(to),
                _ => None,
            })
            .collect();
        use State::*;
        assert_eq!(path, [Connecting, Opening, Connected, Closing, Closed]);
        let closed = |payload: &Payload| matches!(payload, Payload::Close(1000, _));
        assert_eq!(server.received().iter().filter(|r| closed(&r.payload)).count(), 1);
    }
}

mod faults_of_the_server {
    use super::*;

    #[test]
    fn cuts_of_every_kind_are_recoverable_and_what_came_before_stays() {
        let cuts: [fn(Script) -> Script; 3] =
            [Script::cut, Script::fin, |script| script.cut_mid_frame("never whole")];
        let running = cuts.map(|cut| start([cut(upgrade().send("before")), greet("after")]));
        for (server, client, mut watch) in running {
            assert_eq!(texts(&client, 2), ["before", "after"]);
            let lost = watch.loss();
            assert!(matches!(lost.kind(), ErrorKind::Io(_)), "{:?}", lost.error);
            let report = client.close(LONG);
            assert_eq!((report.metrics.attempts(), report.metrics.restarts), (2, 0));
            assert_eq!(ends(&watch.into_all()).len(), 1);
            assert_eq!(server.stats().max_live, 1);
        }
    }

    #[test]
    fn a_broken_protocol_is_unrecoverable_and_what_came_before_stays() {
        let frames: [&[u8]; 8] = [
            &[0x81, 0x81, 1, 2, 3, 4, b'x' ^ 1], // masked
            &[0xc1, 1, b'x'],                    // RSV1 without an extension
            &[0x81, 2, 0xff, 0xfe],              // not UTF-8
            &[0x83, 0],                          // an opcode that is not defined
            &[0x09, 0],                          // a ping in fragments
            &[0x80, 1, b'x'],                    // a continuation of nothing
            &[0x88, 1, 3],                       // half a close code
            &[0x01, 1, b'a', 0x81, 1, b'b'],     // a message within a message
        ];
        let running = frames.map(|bytes| start([upgrade().send("a").send_raw(bytes).hold()]));
        for ((server, client, watch), frame) in running.into_iter().zip(frames) {
            assert_eq!(drain(&client), ["a"; 4], "{frame:x?}");
            let cause = assert_ends_after_restarts(&client, watch);
            assert_eq!(cause.kind(), &ErrorKind::Protocol, "{frame:x?}: {}", cause.chain());
            assert_eq!((server.stats().accepted, server.stats().max_live), (4, 1));
        }
    }

    #[test]
    fn a_message_over_the_limit_is_refused_also_in_parts_or_only_announced() {
        let long = "x".repeat(1001);
        let announced: &[u8] = &[0x82, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let scripts = [
            upgrade().send("a").send(&long),
            upgrade().send("a").send_fragmented(&long, 10),
            upgrade().send("a").send_raw(announced),
        ];
        let running = scripts.map(|script| start_with([script], |b| b.max_message_size(1000)));
        for (server, client, watch) in running {
            assert_eq!(drain(&client), ["a"; 4]);
            let cause = assert_ends_after_restarts(&client, watch);
            assert_eq!(cause.kind(), &ErrorKind::TooLarge, "{}", cause.chain());
            assert_eq!(server.stats().accepted, 4);
        }
        let fits = "x".repeat(1000);
        let (_server, client, _watch) = start_with([greet(&fits)], |b| b.max_message_size(1000));
        assert_eq!(text(&client), fits);
    }

    #[test]
    fn several_causes_of_loss_at_once_make_one_loss_and_one_new_connection() {
        let script = upgrade().ignore_pings().stop_reading().hold();
        let server = Server::script([script]).receive_buffer(4096).start().unwrap();
        let soon = ms(100);
        let builder = quick(server.url())
            .ping_interval(soon / 2)
            .pong_timeout(soon / 2)
            .idle_timeout(soon)
            .write_timeout(soon);
        let client = builder.start().unwrap();
        let mut watch = Watch::new(&client);
        let (stop, sender) = (AtomicBool::new(false), client.sender());
        std::thread::scope(|scope| {
            // The writer is never out of work, so that every write may fail.
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    let _ = sender.send_timeout(vec![0; 64 << 10], ms(10));
                }
            });
            for round in 0..6 {
                watch.connected();
                if round % 2 == 0 {
                    server.cut_all();
                }
                watch.loss();
            }
            stop.store(true, SeqCst);
        });
        client.close(LONG);
        let events = watch.into_all();
        assert_orderly(&events);
        let metrics = client.metrics();
        assert!(metrics.attempts() >= 6 && metrics.restarts == 0);
        // The server cannot count its live clients here: their FIN waits behind
        // data that it does not read.
    }
}

mod limits {
    use super::*;

    #[test]
    fn max_attempts_ends_the_client_after_exactly_so_many() {
        for limit in [1, 3] {
            let (server, client, watch) =
                start_with([Script::new().refuse()], |b| b.max_attempts(limit));
            let cause = failure(&client);
            assert_eq!(cause.kind(), &ErrorKind::Attempts);
            let told = if limit == 1 { "the first".to_owned() } else { limit.to_string() };
            assert!(cause.to_string().contains(&told), "{cause}");
            assert!(cause.chain().len() > cause.to_string().len(), "the last cause is told");
            assert_eq!(server.stats().accepted, u64::from(limit));
            let events = watch.into_all();
            let delays: Vec<_> = ends(&events).iter().map(|end| end.retry_in.is_some()).collect();
            assert_eq!(delays, (1..=limit).map(|n| n < limit).collect::<Vec<_>>());
            assert_eq!(client.metrics().restarts, 0, "supervision does not try again");
            assert_eq!(client.state(), State::Failed);
        }
    }

    #[test]
    fn max_attempts_is_over_with_the_first_connection() {
        let refuse = Script::new().refuse();
        let scripts =
            [upgrade().send("a").cut(), refuse.clone(), refuse.clone(), refuse, greet("b")];
        let (_server, client, _watch) = start_with(scripts, |b| b.max_attempts(1));
        assert_eq!(texts(&client, 2), ["a", "b"]);
        assert_eq!(client.metrics().attempts(), 5);
    }

    #[test]
    fn max_reconnect_attempts_ends_the_client_after_exactly_so_many() {
        let scripts = [upgrade().send("a").cut(), Script::new().refuse()];
        let (server, client, _watch) = start_with(scripts, |b| {
            b.max_attempts(1).max_reconnect_attempts(3).stable_after(Duration::ZERO)
        });
        assert_eq!(drain(&client), ["a"]);
        assert_eq!(client.error().unwrap().kind(), &ErrorKind::Attempts);
        assert_eq!(server.stats().accepted, 1 + 3);
        assert_eq!(client.metrics().restarts, 0);
    }

    #[test]
    fn a_server_that_accepts_and_closes_uses_up_the_reconnect_attempts() {
        let (server, client, _watch) =
            start_with([upgrade().send("a").close(1000, "")], |b| b.max_reconnect_attempts(3));
        assert_eq!(drain(&client), ["a"; 3]);
        assert_eq!(client.error().unwrap().kind(), &ErrorKind::Attempts);
        assert_eq!(server.stats().accepted, 3);
    }
}

mod epochs {
    use super::*;

    #[test]
    fn a_deadline_of_a_dead_epoch_does_not_touch_the_next_one() {
        let (server, client, watch) = start_with([upgrade().cut(), upgrade().hold()], |b| {
            b.connect_timeout(secs(1)).ping_interval(ms(700)).pong_timeout(ms(700))
        });
        // The connect deadline and the heartbeat of the first epoch pass.
        wait_uptime(&client, ms(1500));
        assert_eq!((client.metrics().attempts(), server.stats().live), (2, 1));
        client.close(LONG);
        let events = watch.into_all();
        assert_eq!(ends(&events).len(), 1);
        assert_orderly(&events);
    }

    #[test]
    fn messages_and_events_carry_their_epoch_and_sequences_start_anew() {
        let scripts = [
            upgrade().send_all(["a", "b"]).cut(),
            Script::new().refuse(),
            upgrade().send_all(["c", "d"]).close(1000, ""),
            upgrade().send_all(["e", "f"]).close(1008, ""),
            upgrade().send_all(["g", "h"]).hold(),
        ];
        let (_server, client, watch) = start(scripts);
        let seen: Vec<_> = (0..8)
            .map(|_| {
                let message = client.recv_timeout(LONG).unwrap();
                let metadata = message.metadata();
                (message.to_string(), metadata.epoch, metadata.sequence)
            })
            .collect();
        let expected = [
            ("a", 1, 1),
            ("b", 1, 2),
            ("c", 3, 1),
            ("d", 3, 2),
            ("e", 4, 1),
            ("f", 4, 2),
            ("g", 5, 1),
            ("h", 5, 2),
        ];
        assert_eq!(seen, expected.map(|(text, epoch, n)| (text.to_owned(), epoch, n)));
        client.close(LONG);
        assert_orderly(&watch.into_all());
    }

    #[test]
    fn supervision_tells_of_each_restart_and_epochs_go_on_growing() {
        let refuse = upgrade().close(1008, "policy");
        let scripts = [refuse.clone(), refuse.clone(), refuse, greet("back")];
        let (_server, client, watch) = start(scripts);
        assert_eq!(text(&client), "back");
        assert_eq!((client.metrics().restarts, client.metrics().attempts()), (3, 4));
        assert_eq!(client.metrics().connections[0].epoch, 4);
        assert!(client.error().is_none());
        client.close(LONG);
        let events = watch.into_all();
        let restarts: Vec<_> = events
            .iter()
            .filter_map(|event| match &event.kind {
                EventKind::Restarting { thread, delay, error } => {
                    assert_eq!(thread, "broadsock-conn-0");
                    assert_eq!(error.kind(), &ErrorKind::Closed { code: 1008 });
                    Some((event.epoch, delay.as_millis()))
                }
                _ => None,
            })
            .collect();
        assert_eq!(restarts, [(1, 250), (2, 500), (3, 1000)]);
        assert_orderly(&events);
    }

    #[test]
    fn a_restart_of_one_connection_leaves_the_others_alone() {
        let good = serve([upgrade().send("up").echo()]);
        let bad = serve([upgrade().close(1008, ""), greet("back")]);
        let client = quick(bad.url()).endpoint(good.url()).start().unwrap();
        let mut both = texts(&client, 2);
        both.sort();
        assert_eq!(both, ["back", "up"]);
        client.sender_for(1).unwrap().send("still here").unwrap();
        assert_eq!(text(&client), "still here");
        let metrics = client.metrics();
        assert_eq!((metrics.connections[0].epoch, metrics.connections[1].epoch), (2, 1));
        assert_eq!((good.stats().accepted, metrics.restarts), (1, 1));
    }

    #[test]
    fn a_session_is_told_where_the_epochs_before_ended() {
        struct Tell;
        impl Tell {
            fn tell(link: &mut Link<'_>, hook: &str) {
                let told = match link.resume() {
                    None => "nothing".to_owned(),
                    Some(resume) => {
                        let id = resume.id.as_deref().map(String::from_utf8_lossy);
                        format!("{} {} {}", resume.epoch, resume.sequence, id.unwrap())
                    }
                };
                link.send(format!("{hook} of {}: {told}", link.epoch()));
            }
        }
        impl Session for Tell {
            fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
                Self::tell(link, "open");
                Ok(())
            }
            fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
                if let Some(id) = data.text().and_then(|text| text.strip_prefix("id ")) {
                    link.emit_with_id(data, id.as_bytes());
                }
                Self::tell(link, "message");
                Ok(())
            }
            fn heartbeat_interval(&self) -> Option<Duration> {
                Some(ms(10))
            }
            fn on_heartbeat(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
                Self::tell(link, "heartbeat");
                Ok(())
            }
        }
        // Each message in a block of its own.
        let send = |script: Script, text: &str, told: &str| {
            let told = told.to_owned();
            script.send(text).expect_that(move |p| matches!(p, Payload::Text(t) if *t == told))
        };
        let first = send(upgrade(), "id a", "message of 1: nothing");
        let first = send(first, "id b", "message of 1: nothing");
        let third = upgrade().expect("open of 3: 1 2 b").expect("heartbeat of 3: 1 2 b");
        let third = send(third, "skipped", "message of 3: 1 2 b");
        let third = send(third, "id c", "message of 3: 1 2 b");
        let third = send(third, "id d", "message of 3: 1 2 b");
        let fourth = upgrade().expect("open of 4: 3 2 d");
        let scripts = [
            first.cut(),
            Script::new().status(503, []),
            third.close(1008, "the thread is restarted"),
            fourth.cut(),
            upgrade().expect("open of 5: 3 2 d").send("id done").hold(),
        ];
        let (_server, client, _watch) =
            start_with(scripts, |b| b.session(|| Tell).dedup(Dedup::by_session()));
        assert_eq!(texts(&client, 5), ["id a", "id b", "id c", "id d", "id done"]);
        assert_eq!(client.metrics().restarts, 1);
    }
}

mod user_code {
    use super::*;

    /// Where the session of the first epoch fails, and how.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Place {
        Factory,
        Open,
        Message,
        Heartbeat,
        Interval,
        Drop,
        Nowhere,
    }

    struct Faulty {
        place: Place,
        panics: bool,
        seen_all: bool,
    }

    impl Faulty {
        fn fail(&self, here: Place) -> Result<(), BoxError> {
            match (self.place == here, self.panics) {
                (true, true) => panic!("planted"),
                (true, false) => Err("planted".into()),
                (false, _) => Ok(()),
            }
        }
    }

    impl Session for Faulty {
        fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
            link.emit("open");
            self.fail(Place::Open)
        }

        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            if data.text() == Some("bad") {
                self.fail(Place::Message)?;
                if self.place == Place::Drop {
                    return Err("planted".into());
                }
            }
            self.seen_all = data.text() == Some("b");
            link.emit(data);
            Ok(())
        }

        fn heartbeat_interval(&self) -> Option<Duration> {
            let _panic = self.fail(Place::Interval);
            Some(ms(10))
        }

        fn on_heartbeat(&mut self, _: &mut Link<'_>) -> Result<(), BoxError> {
            if self.seen_all { self.fail(Place::Heartbeat) } else { Ok(()) }
        }
    }

    impl Drop for Faulty {
        fn drop(&mut self) {
            assert!(self.place != Place::Drop, "planted");
        }
    }

    fn faulty(place: Place, panics: bool) -> impl Fn() -> Faulty + Send + Sync + 'static {
        let made = AtomicU64::new(0);
        move || {
            let first = made.fetch_add(1, SeqCst) == 0;
            assert!(!(first && place == Place::Factory), "planted");
            let place = if first { place } else { Place::Nowhere };
            Faulty { place, panics, seen_all: false }
        }
    }

    #[test]
    fn a_session_that_fails_costs_its_epoch_and_nothing_else() {
        let whole = ["open", "a", "bad", "b"];
        let table: [(Place, bool, &str, &[&str]); 9] = [
            (Place::Factory, true, "factory", &[]),
            (Place::Open, true, "on_open", &["open"]),
            (Place::Open, false, "", &["open"]),
            (Place::Message, true, "on_message", &["open", "a"]),
            (Place::Message, false, "", &["open", "a"]),
            (Place::Heartbeat, true, "on_heartbeat", &whole),
            (Place::Heartbeat, false, "", &whole),
            (Place::Interval, true, "heartbeat_interval", &["open"]),
            (Place::Drop, true, "drop", &["open", "a"]),
        ];
        for (place, panics, hook, first) in table {
            let script = upgrade().send_all(["a", "bad", "b"]).hold();
            let (server, client, watch) =
                start_with([script], |b| b.session(faulty(place, panics)));
            let expected = [first, &whole[..]].concat();
            assert_eq!(texts(&client, expected.len()), expected, "{place:?}");
            let report = client.close(LONG);
            let metrics = report.metrics;
            assert_eq!((metrics.attempts(), metrics.restarts), (2, 0), "{place:?}");
            assert!(metrics.ledger.balanced() && report.error.is_none(), "{place:?}");
            let events = watch.into_all();
            let kinds: Vec<_> = ends(&events).iter().map(Failed::kind).collect();
            assert_eq!(kinds, [ErrorKind::Session], "{place:?}");
            let told = count(&events, |event| matches!(event.kind, EventKind::Panic { .. }));
            assert_eq!(told, usize::from(panics), "{place:?}");
            assert!(!panics || events.iter().any(|event| is_panic(event, hook)), "{place:?}");
            assert_eq!(server.stats().max_live, 1, "{place:?}");
        }
    }

    #[test]
    fn a_classifier_decides_and_if_it_panics_the_default_does() {
        let scripts = [upgrade().close(1008, ""), greet("again")];
        let (_server, client, mut watch) = start_with(scripts.clone(), |b| {
            b.classify(|error, default| {
                assert_eq!(default, Recovery::Unrecoverable);
                assert_eq!(error.kind(), &ErrorKind::Closed { code: 1008 });
                Recovery::Recoverable
            })
        });
        assert_eq!(text(&client), "again");
        assert!(watch.loss().retry_in.is_some() && client.metrics().restarts == 0);

        let (_server, client, watch) =
            start_with([upgrade().close(1000, "")], |b| b.classify(|_, _| Recovery::Unrecoverable));
        let cause = assert_ends_after_restarts(&client, watch);
        assert_eq!(cause.kind(), &ErrorKind::Closed { code: 1000 });

        let (_server, client, mut watch) =
            start_with(scripts, |b| b.classify(|_, _| panic!("planted")));
        assert_eq!(text(&client), "again");
        watch.until("panic", |event| is_panic(event, "classifier"));
        assert_eq!(client.metrics().restarts, 1);
    }

    #[test]
    fn an_observer_that_panics_at_every_event_changes_nothing() {
        let calls = Arc::new(AtomicU64::new(0));
        let called = calls.clone();
        let (_server, client, watch) =
            start_with([upgrade().send("a").cut(), greet("b")], move |b| {
                b.observer(move |_| {
                    called.fetch_add(1, SeqCst);
                    panic!("planted");
                })
            });
        assert_eq!(texts(&client, 2), ["a", "b"]);
        assert!(client.close(LONG).stuck.is_empty());
        let events = watch.into_all();
        assert_orderly(&events);
        assert_eq!(calls.load(SeqCst), events.len() as u64, "it heard of each");
    }

    #[test]
    fn an_id_function_that_panics_leaves_its_message_without_an_id() {
        let (_server, client, mut watch) =
            start_with([upgrade().send_all(["a", "bad", "a", "bad", "b"]).hold()], |b| {
                b.dedup(Dedup::by(|data| {
                    let text = data.text().unwrap_or_default().to_owned();
                    assert!(text != "bad", "planted");
                    Some(text)
                }))
            });
        assert_eq!(texts(&client, 4), ["a", "bad", "bad", "b"]);
        watch.until("panic", |event| is_panic(event, "id function"));
        let metrics = client.metrics();
        assert_eq!((metrics.without_id, metrics.ledger.duplicates), (2, 1));
        assert_eq!((metrics.attempts(), metrics.restarts), (1, 0));
    }

    #[test]
    fn a_back_off_of_ones_own_decides_and_if_it_panics_the_default_does() {
        let (_server, _client, mut watch) = start_with([Script::new().refuse()], |b| {
            b.backoff(Backoff::custom(|retry| {
                assert!(retry.attempt < 3, "planted");
                ms(u64::from(retry.attempt) * 7)
            }))
        });
        for expected in [7, 14] {
            assert_eq!(watch.failed_attempt().retry_in(), ms(expected));
        }
        assert!(watch.failed_attempt().retry_in() >= secs(1), "the default's third delay");
    }
}
