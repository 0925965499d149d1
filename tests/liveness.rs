//! A peer that is gone is found out, and one that is there is left alone.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use broadsock::testing::{Payload, Record, Script, Server};
use broadsock::{BoxError, ClientBuilder, Data, ErrorKind, EventKind, Link, Outgoing, Session};
use support::*;

/// Pings quickly, and does not wait long for an answer: for peers that are gone.
fn impatient(server: &Server) -> ClientBuilder {
    builder(server).ping_interval(ms(100)).pong_timeout(ms(250))
}

/// Pings quickly, and waits longer than a busy machine keeps a peer waiting.
fn patient(server: &Server) -> ClientBuilder {
    builder(server).ping_interval(ms(100)).pong_timeout(Duration::from_secs(4))
}

fn pings(record: &Record) -> usize {
    record.received.iter().filter(|r| matches!(r.payload, Payload::Ping(_))).count()
}

fn pongs(record: &Record) -> Vec<Vec<u8>> {
    let payloads = record.received.iter().map(|received| &received.payload);
    payloads
        .filter_map(|payload| match payload {
            Payload::Pong(bytes) => Some(bytes.clone()),
            _ => None,
        })
        .collect()
}

mod a_frozen_peer {
    use super::*;

    /// The first connection is as the script says, and is lost for want of a
    /// pong; the next one delivers.
    fn is_detected(first: Script, settings: fn(ClientBuilder) -> ClientBuilder, traffic: bool) {
        let server = serve([first, up().send("b")]);
        let client = start(settings(impatient(&server)));
        let events = client.events();
        let lost = AtomicBool::new(false);
        thread::scope(|scope| {
            if traffic {
                scope.spawn(|| {
                    while !lost.load(SeqCst) {
                        let _ = client.sender().try_send("traffic");
                        linger(ms(5));
                    }
                });
            }
            let loss = std::panic::catch_unwind(|| next_loss(&events));
            lost.store(true, SeqCst);
            assert_eq!(loss.unwrap(), ErrorKind::NoPong);
        });
        assert_eq!(text(&client), "b");
        assert!(server.wait_for(|record| pings(record) <= 1 || record.stats.upgraded > 1, LONG));
        close(&client);
    }

    #[test]
    fn is_detected_when_nothing_flows() {
        is_detected(up().half_open(), |builder| builder, false);
    }

    #[test]
    fn is_detected_although_messages_are_sent_to_it() {
        is_detected(up().half_open(), |builder| builder, true);
    }

    #[test]
    fn is_detected_although_it_takes_what_is_sent_to_it() {
        is_detected(up().silent(), |builder| builder, true);
    }

    #[test]
    fn is_detected_when_the_interval_equals_the_timeout() {
        is_detected(up().half_open(), |builder| builder.pong_timeout(ms(100)), false);
        is_detected(up().silent(), |builder| builder.pong_timeout(ms(100)), true);
    }

    #[test]
    fn no_ping_state_survives_a_reconnect() {
        let second = Duration::from_secs(1);
        // The first ping stays without a pong, and the connection ends shortly
        // before that becomes a verdict. It must not come on the next one,
        // which is silent for longer than what was left of the time.
        let first = up().ignore_pings().expect_that(is_ping).pause(second * 7 / 2).cut();
        let then = up().ignore_pings().pause(second * 3 / 2).send("b");
        let server = serve([first, then, up()]);
        let client = start(builder(&server).ping_interval(second).pong_timeout(second * 4));
        let message = next(&client);
        assert_eq!((message.text(), message.metadata().epoch), (Some("b"), 2));
        close(&client);
    }

    fn is_ping(payload: &Payload) -> bool {
        matches!(payload, Payload::Ping(_))
    }
}

mod a_live_peer {
    use super::*;

    #[test]
    fn stays_connected_without_any_pong_while_it_sends_data() {
        let mut script = up().ignore_pings();
        for n in 0..12 {
            script = script.pause(ms(500)).send(&n.to_string());
        }
        let server = serve([script]);
        let client = start(patient(&server));
        for n in 0..12 {
            let message = next(&client);
            assert_eq!((message.metadata().epoch, message.text()), (1, Some(&*n.to_string())));
        }
        assert!(server.wait_for(|record| pings(record) >= 3, LONG));
        assert_eq!(client.metrics().connections[0].ping_round_trip, None);
        close(&client);
    }

    #[test]
    fn its_round_trip_is_measured() {
        let server = serve([up()]);
        let client = start(builder(&server).ping_interval(ms(20)).pong_timeout(LONG));
        eventually("a round trip was measured", || {
            client.metrics().connections[0].ping_round_trip.is_some()
        });
        eventually("pings are counted", || client.metrics().connections[0].pings >= 3);
        assert_eq!(client.metrics().connections[0].epoch, 1);
        close(&client);
    }

    #[test]
    fn may_send_pongs_that_nobody_asked_for() {
        let server = serve([up().send_raw(b"\x8a\x02hi").send_raw(b"\x8a\x00").send("a")]);
        let client = start(builder(&server));
        let message = next(&client);
        assert_eq!((message.text(), message.metadata().epoch), (Some("a"), 1));
        assert_eq!(client.metrics().connections[0].ping_round_trip, None);
        close(&client);
    }

    #[test]
    fn has_answered_no_ping_by_a_pong_of_its_own() {
        let script = up().ignore_pings().expect("now").send_raw(b"\x8a\x02hi").send("a").hold();
        let server = serve([script]);
        let client = start(patient(&server).ping_interval(ms(20)).pong_timeout(LONG));
        eventually("a ping waits for its pong", || client.metrics().connections[0].pings > 0);
        client.sender().send("now").unwrap();
        assert_eq!(text(&client), "a");
        assert_eq!(client.metrics().connections[0].ping_round_trip, None);
        close(&client);
    }

    #[test]
    fn gets_its_ping_of_125_bytes_back_exactly() {
        let payload: Vec<u8> = (0..125).map(|n| n as u8 ^ 0xa5).collect();
        let server = serve([up().ping(&payload).ping("").ping("x")]);
        let client = start(builder(&server));
        assert!(server.wait_for(|record| pongs(record).contains(&b"x".to_vec()), LONG));
        // A pong may be left out if a later ping came before it (RFC 6455,
        // section 5.5.3).
        let all = server.wait_for(|record| pongs(record).contains(&payload), ms(1));
        let alone = serve([up().ping(&payload)]);
        let second = start(builder(&alone));
        assert!(alone.wait_for(|record| pongs(record) == [payload.clone()], LONG), "{all}");
        close(&client);
        close(&second);
    }

    #[test]
    fn survives_a_consumer_that_is_blocked_for_three_times_the_pong_timeout() {
        // No shorter than the interval, or each ping would put the verdict off.
        let timeout = ms(1400);
        let server = serve([up().numbers(0..1000)]);
        let client = start(builder(&server).queue(4).ping_interval(timeout).pong_timeout(timeout));
        wait_blocked(&client.events(), true);
        let seen = server.received().len();
        linger(3 * timeout);
        let pinged = server.wait_for(|record| record.received.len() >= seen + 2, LONG);
        assert!(pinged, "pings go out while reading is blocked");
        let got = numbers(&client, 1000);
        assert_eq!(got, (0..1000).collect::<Vec<_>>());
        assert_eq!(close(&client).metrics.connections[0].epoch, 1);
    }

    /// The pong lies behind what is still to be looked at.
    #[test]
    fn survives_a_session_that_is_slow_with_what_has_arrived() {
        struct Slow;
        impl Session for Slow {
            fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
                linger(ms(1));
                link.emit(data);
                Ok(())
            }
        }
        let server = serve([up().numbers(0..2000)]);
        let settings = builder(&server).ping_interval(ms(50)).pong_timeout(ms(200));
        let client = start(settings.session(|| Slow));
        for n in 0..2000 {
            let message = next(&client);
            assert_eq!((message.metadata().epoch, number(&message)), (1, n));
        }
        close(&client);
    }

    #[test]
    fn that_reads_slowly_and_pings_much_is_no_stalled_reader() {
        let mut script = up().ping_every(ms(1));
        for _ in 0..20 {
            script = script.stop_reading().pause(ms(200)).resume_reading().pause(ms(10));
        }
        let server = Server::script([script]).receive_buffer(16 << 10).start().unwrap();
        let client = connect(builder(&server).write_timeout(Duration::from_secs(3)));
        let sender = client.sender();
        for _ in 0..64 {
            sender.send_timeout(vec![0; 512 << 10], LONG).unwrap();
        }
        sender.send_timeout("end", LONG).unwrap();
        assert!(server.wait_for(|record| record.texts().any(|text| text == "end"), LONG));
        assert_eq!(close(&client).metrics.connections[0].epoch, 1);
    }
}

mod a_dead_feed {
    use super::*;

    fn is_idle(first: Script, limit: Duration) {
        let server = serve([first, up().send("b")]);
        let client = start(patient(&server).idle_timeout(limit));
        let events = client.events();
        assert_eq!(next_loss(&events), ErrorKind::Idle);
        assert_eq!(text(&client), "b");
        close(&client);
    }

    #[test]
    fn is_found_out_though_its_peer_pings_and_pongs() {
        is_idle(up().ping_every(ms(10)), ms(400));
    }

    #[test]
    fn is_found_out_under_a_flood_of_pings() {
        is_idle(up().ping_flood(u64::MAX), ms(1500));
    }

    /// Passes on what is marked and skips the rest.
    struct Sifting;

    impl Session for Sifting {
        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            if data.text() == Some("end") {
                link.emit(data);
            }
            Ok(())
        }
    }

    #[test]
    fn is_not_what_a_session_skips() {
        let mut script = up();
        for _ in 0..40 {
            script = script.send("chaff").pause(ms(100));
        }
        let server = serve([script.send("end")]);
        let client =
            start(builder(&server).idle_timeout(Duration::from_secs(3)).session(|| Sifting));
        let message = next(&client);
        assert_eq!((message.text(), message.metadata().epoch), (Some("end"), 1));
        assert_eq!(close(&client).metrics.ledger.skipped, 40);
    }
}

mod a_peer_that_does_not_read {
    use super::*;

    #[test]
    fn is_cut_after_the_write_timeout_and_the_rest_goes_to_the_next() {
        let server =
            Server::script([up().stop_reading(), up()]).receive_buffer(4096).start().unwrap();
        let client = connect(builder(&server).write_timeout(ms(500)));
        let events = client.events();
        let sender = client.sender();
        for _ in 0..300 {
            sender.send_timeout(vec![0; 64 << 10], LONG).unwrap();
        }
        sender.send_timeout("end", LONG).unwrap();
        assert_eq!(next_loss(&events), ErrorKind::WriteStalled);
        assert!(server.wait_for(|record| record.texts().any(|text| text == "end"), LONG));
        close(&client);
    }

    /// Answers each message by as many as it may.
    struct Verbose(Outgoing);

    impl Session for Verbose {
        fn on_message(&mut self, _: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            (0..4096).for_each(|_| link.send(self.0.clone()));
            Ok(())
        }
    }

    #[test]
    fn is_left_by_a_session_that_says_more_than_may_wait() {
        let script = up().stop_reading().numbers(0..200);
        let server = Server::script([script]).receive_buffer(4096).start().unwrap();
        let verbose = || Verbose(Outgoing::from("x".repeat(1000)));
        let client = start(builder(&server).write_timeout(LONG * 2).session(verbose));
        let told = find(&client.events(), |event| match event.kind {
            EventKind::Lost { error, .. } => Some(error),
            _ => None,
        });
        assert_eq!(told.kind(), &ErrorKind::Session);
        assert!(told.to_string().contains("more than 524288 messages"), "{told}");
        client.close(ms(500));
    }

    #[test]
    fn a_session_that_answered_a_burst_at_length_was_taken_for_one_that_is_not_read() {
        // All at once, each answered by many.
        let script = up().numbers(0..1000).hold();
        let server = Server::script([script]).keep_received(1).start().unwrap();
        let client = start(builder(&server).session(|| Talkative));
        for n in 0..1000 {
            assert_eq!(number(&next(&client)), n);
        }
        let all = 1000 * Talkative::SAYS;
        eventually("all is sent", || client.metrics().connections[0].messages_sent == all);
        assert_eq!(client.metrics().connects(), 1);
        close(&client);
    }

    struct Talkative;

    impl Talkative {
        const SAYS: u64 = 600;
    }

    impl Session for Talkative {
        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            link.emit(data);
            (0..Self::SAYS).for_each(|_| link.send("x"));
            Ok(())
        }
    }

    /// So many that their pongs fill every buffer, and the last one besides
    /// finds no room in the client.
    fn deaf() -> Server {
        let mut ping = vec![0x89, 125];
        ping.extend([b'p'; 125]);
        let script = up().stop_reading().send_raw(ping.repeat(100_000)).send("end");
        Server::script([script]).receive_buffer(4096).start().unwrap()
    }

    /// Nothing but the answers to its own pings waits for it.
    #[test]
    fn but_pings_is_cut_after_the_write_timeout() {
        let server = deaf();
        let settings = builder(&server).write_timeout(ms(500)).max_message_size(4096);
        // Its pings are signs of life, so nothing else can find it out.
        let client = start(settings.ping_interval(LONG).pong_timeout(LONG));
        assert_eq!(next_loss(&client.events()), ErrorKind::WriteStalled);
        close(&client);
    }

    #[test]
    fn but_pings_does_not_block_the_reader() {
        let server = deaf();
        let client = start(builder(&server).write_timeout(LONG).max_message_size(4096));
        let message = next(&client);
        assert_eq!((message.text(), message.metadata().epoch), (Some("end"), 1));
        server.push("more");
        assert_eq!(text(&client), "more");
        // Nothing can be said goodbye to.
        assert_eq!(client.close(Duration::from_secs(2)).stuck, [""; 0]);
    }

    /// In a process of its own, whose threads are all known.
    #[cfg(target_os = "linux")]
    #[test]
    fn but_pings_does_not_make_the_reader_spin() {
        let mut child = child::start("spin");
        let spent: u64 = child.answer().parse().unwrap();
        assert!(spent < 12, "the connection's thread ran for {spent}0 ms of a second of waiting");
    }

    /// Hundredths of a second that the connection's thread runs while nothing
    /// can be written and one more message waits.
    #[cfg(target_os = "linux")]
    pub(super) fn spin() -> String {
        let server = deaf();
        let client = start(builder(&server).write_timeout(LONG).max_message_size(4096));
        assert_eq!(text(&client), "end");
        client.sender().send("one more ".repeat(100)).unwrap();
        linger(ms(100));
        let before = connection_ticks();
        linger(ms(1000));
        (connection_ticks() - before).to_string()
    }

    #[cfg(target_os = "linux")]
    fn connection_ticks() -> u64 {
        let ticks = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            let fields: Vec<&str> = rest.split_whitespace().collect();
            let ticks = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
            name.starts_with("broadsock-conn").then_some(ticks)
        };
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let found: Vec<u64> = tasks.filter_map(|task| ticks(task.unwrap())).collect();
        assert_eq!(found.len(), 1);
        found[0]
    }
}

mod a_session_heartbeat {
    use super::*;

    struct Beating(u32);

    impl Session for Beating {
        fn heartbeat_interval(&self) -> Option<Duration> {
            Some(ms(50))
        }

        fn on_heartbeat(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
            self.0 += 1;
            link.send(format!("beat {}", self.0));
            Ok(())
        }

        fn on_message(&mut self, _: Data<'_>, _: &mut Link<'_>) -> Result<(), BoxError> {
            Ok(())
        }
    }

    #[test]
    fn goes_out_at_its_interval_and_its_answer_counts() {
        let server = serve([up().echo()]);
        let client =
            connect(builder(&server).session(|| Beating(0)).idle_timeout(Duration::from_secs(10)));
        let at_most_since = |uptime: Duration| (uptime.as_millis() / 50) as usize;
        assert!(server.wait_for(|record| record.texts().count() >= 10, LONG));
        let seen = server.texts();
        let uptime = client.metrics().connections[0].uptime;
        assert!(seen.len() <= at_most_since(uptime), "{} in {uptime:?}", seen.len());
        let expected: Vec<_> = (1..=seen.len()).map(|n| format!("beat {n}")).collect();
        assert_eq!(seen, expected);
        eventually("answers were skipped", || audit(&client).ledger.skipped >= 5);
        assert_eq!(close(&client).metrics.connections[0].epoch, 1);
    }
}

#[cfg(unix)]
mod a_process_that_is_stopped {
    use super::*;

    #[test]
    fn is_detected_and_found_again_when_it_goes_on() {
        let mut child = child::start("echo");
        let url = child.answer();
        let client = quick(broadsock::Client::builder(&*url))
            .ping_interval(ms(100))
            .pong_timeout(ms(300))
            .connect_timeout(Duration::from_secs(1))
            .start()
            .unwrap();
        let events = client.events();
        let answers = |what: &str| {
            eventually("it answers", || {
                let _ = client.sender().try_send("are you there?");
                client.recv_timeout(ms(100)).is_ok()
            });
            assert!(client.state() == broadsock::State::Connected || !what.is_empty());
        };
        answers("before");
        child.signal("-STOP");
        assert_eq!(next_loss(&events), ErrorKind::NoPong);
        eventually("no connection stands", || !client.sender().is_connected());
        child.signal("-CONT");
        answers("after");
        close(&client);
    }
}

/// The test binary as another process.
#[cfg(unix)]
mod child {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::process::{Child, Command, Stdio};

    use broadsock::testing::Server;

    const ROLE: &str = "BROADSOCK_TEST_CHILD";

    /// Ended when dropped, also when it is stopped.
    pub(super) struct Process(Child);

    pub(super) fn start(role: &str) -> Process {
        let test = ["--exact", "child::plays_its_role", "--nocapture", "--test-threads=1"];
        let child = Command::new(std::env::current_exe().unwrap())
            .args(test)
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Process(child.unwrap())
    }

    impl Process {
        /// What it says; it says one thing, or ends.
        pub(super) fn answer(&mut self) -> String {
            let lines = BufReader::new(self.0.stdout.take().unwrap()).lines();
            let answers = lines.map_while(Result::ok);
            let mut found = answers.filter_map(|l| Some(l.split_once("answer=")?.1.to_owned()));
            found.next().expect("the child ended without an answer")
        }

        pub(super) fn signal(&self, signal: &str) {
            let pid = self.0.id().to_string();
            assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Does nothing but in a child.
    #[test]
    fn plays_its_role() {
        let Ok(role) = std::env::var(ROLE) else { return };
        let (server, answer) = match &*role {
            "echo" => {
                let server = Server::echo().unwrap();
                let url = server.url();
                (Some(server), url)
            }
            #[cfg(target_os = "linux")]
            "spin" => (None, super::a_peer_that_does_not_read::spin()),
            other => panic!("no role: {other}"),
        };
        let mut out = std::io::stdout();
        writeln!(out, "answer={answer}").unwrap();
        out.flush().unwrap();
        // Until the parent has ended, whatever ended it.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        drop(server);
    }
}
