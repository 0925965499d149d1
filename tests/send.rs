//! What is sent: each message once, in order, or handed back.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use broadsock::crossbeam_channel::{self, bounded};
use broadsock::testing::{Payload, Received, Record, Script, Server};
use broadsock::{
    BoxError, Client, Data, EventKind, Link, Outgoing, SendErrorReason, Sender, Session, WhileDown,
};
use support::*;

/// The numbers that texts are.
fn sent(server: &Server) -> Vec<u64> {
    server.texts().iter().map(|text| leading(text)).collect()
}

/// The number a text begins with; padding follows it.
fn leading(text: &str) -> u64 {
    text.split(' ').next().unwrap().parse().unwrap()
}

fn padded(n: u64, len: usize) -> String {
    let mut text = format!("{n} ");
    text.extend(std::iter::repeat_n('.', len.saturating_sub(text.len())));
    text
}

fn wait_text(server: &Server, text: &str) {
    let arrived = server.wait_for(|record| record.texts().any(|t| t == text), LONG);
    assert!(arrived, "{text:?} never arrived");
}

/// A server that is not there yet.
fn absent(scripts: impl IntoIterator<Item = Script>) -> Server {
    let server = serve(scripts);
    server.stop();
    server
}

fn reason(result: Result<(), broadsock::SendError>) -> (SendErrorReason, Outgoing) {
    let error = result.unwrap_err();
    (error.reason, error.message)
}

mod leaving {
    use super::*;

    #[test]
    fn a_message_leaves_while_the_reader_sleeps() {
        let server = serve([up()]);
        let client = connect(builder(&server));
        for text in ["a", "b", "c"] {
            client.sender().send(text).unwrap();
            wait_text(&server, text);
        }
        close(&client);
    }

    #[test]
    fn a_message_leaves_while_the_server_floods() {
        let server = serve([up().flood(0.., |n| n.to_string())]);
        let client = connect(builder(&server));
        thread::scope(|scope| {
            scope.spawn(|| while client.recv_timeout(LONG).is_ok() {});
            for n in 0..10 {
                let text = format!("message {n}");
                client.sender().send(&*text).unwrap();
                wait_text(&server, &text);
            }
            close(&client);
        });
    }

    /// Sends whenever the outbox of one message has room, and notes how many
    /// messages it was shown in between.
    struct Impatient {
        sender: Arc<OnceLock<Sender>>,
        shown: Vec<usize>,
        told: crossbeam_channel::Sender<Vec<usize>>,
    }

    impl Session for Impatient {
        fn on_message(&mut self, data: Data<'_>, _: &mut Link<'_>) -> Result<(), BoxError> {
            let sender = self.sender.get().expect("set before anything was asked for");
            match sender.try_send("let me out") {
                Ok(()) => self.shown.push(0),
                Err(_) => *self.shown.last_mut().expect("the first one found room") += 1,
            }
            if data.as_bytes() == b"last" {
                self.told.send(std::mem::take(&mut self.shown))?;
            }
            Ok(())
        }
    }

    #[test]
    fn a_session_with_much_to_read_is_interrupted_for_what_is_to_be_sent() {
        let (told, tells) = bounded(1);
        let sender = Arc::new(OnceLock::new());
        let server = serve([up().expect("go").repeat(["x"; 999], 1).send("last").hold()]);
        let its = Arc::clone(&sender);
        let client = connect(builder(&server).queue(10_000).outbox(1).session(move || Impatient {
            sender: Arc::clone(&its),
            shown: Vec::new(),
            told: told.clone(),
        }));
        sender.set(client.sender()).expect("set once");
        client.sender().send("go").unwrap();
        let shown = tells.recv_timeout(LONG).unwrap();
        assert!(shown.iter().all(|count| *count <= 64), "{shown:?}");
        drop(sender);
        close(&client);
    }

    #[test]
    fn a_message_leaves_while_reading_is_blocked() {
        let server = serve([up().numbers(0..1000)]);
        let client = connect(builder(&server).queue(4));
        wait_blocked(&client.events(), true);
        client.sender().send("still here").unwrap();
        wait_text(&server, "still here");
        close(&client);
    }

    /// Bytes of a pool, which they go back to.
    struct Lent(Vec<u8>, crossbeam_channel::Sender<Vec<u8>>);

    impl AsRef<[u8]> for Lent {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    impl Drop for Lent {
        fn drop(&mut self) {
            let _ = self.1.send(std::mem::take(&mut self.0));
        }
    }

    #[test]
    fn bytes_that_stay_where_they_are_are_let_go_once_they_are_written() {
        let (pool, back) = bounded(1);
        let server = serve([up()]);
        let client = connect(builder(&server));
        let mut bytes = b"0".to_vec();
        for n in 1..=3 {
            client.sender().send(Outgoing::from_owner(Lent(bytes, pool.clone()))).unwrap();
            bytes = back.recv_timeout(LONG).expect("it is written");
            bytes.push(b'0' + n);
        }
        let all = |record: &Record| record.stats.received == 3;
        assert!(server.wait_for(all, LONG));
        let received: Vec<_> = server.received().into_iter().map(|it| it.payload).collect();
        let binary = |bytes: &str| Payload::Binary(bytes.as_bytes().to_vec());
        assert_eq!(received, ["0", "01", "012"].map(binary));
        close(&client);
    }

    #[test]
    fn bytes_that_stay_where_they_are_are_kept_for_as_long_as_they_are_not_written() {
        let (pool, back) = bounded(2);
        let server = serve([up().stop_reading()]);
        let client = connect(builder(&server));
        let large = vec![7; 16 << 20];
        client.sender().send(Outgoing::from_owner(Lent(large, pool.clone()))).unwrap();
        wait_begun(&client);
        let mut report = client.close(ms(2000));
        let refused = client.sender().send(Outgoing::from_owner(Lent(vec![8], pool)));
        assert!(back.is_empty(), "the one was not written, the other refused");
        assert_eq!(reason(refused).1.as_bytes(), [8]);
        assert_eq!(back.try_recv(), Ok(vec![8]));
        assert_eq!(report.unsent.pop().unwrap().len(), 16 << 20);
        drop((report, client));
        assert_eq!(back.recv_timeout(LONG).map(|large| large.len()), Ok(16 << 20));
    }

    /// Waits until a part of a large message is sent: to frame it takes a while.
    fn wait_begun(client: &Client) {
        let begun = || client.metrics().connections[0].bytes_sent > 10_000;
        eventually("a part of it is sent", begun);
    }

    /// Bytes whose owner could send, and says when it goes.
    struct Owner(Sender, crossbeam_channel::Sender<()>);

    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            &[7; 16 << 20]
        }
    }

    impl Drop for Owner {
        fn drop(&mut self) {
            assert!(self.0.try_send("too late").is_err());
            let _ = self.1.send(());
        }
    }

    #[test]
    fn unsent_bytes_go_with_the_client_also_if_their_owner_could_send() {
        let (gone, end) = bounded(1);
        let server = serve([up().stop_reading()]);
        let client = connect(builder(&server));
        client.sender().send(Outgoing::from_owner(Owner(client.sender(), gone))).unwrap();
        wait_begun(&client);
        let report = client.close(ms(2000));
        assert_eq!(report.unsent.len(), 1);
        drop((report, client));
        assert_eq!(end.recv_timeout(LONG), Ok(()));
    }

    #[test]
    fn unsent_bytes_go_with_a_client_that_its_own_thread_drops() {
        let (gone, end) = bounded(1);
        let (hand, drops) = bounded::<Client>(1);
        let server = serve([up().stop_reading()]);
        let builder = builder(&server).observer(move |event| {
            if matches!(event.kind, EventKind::Lost { .. }) {
                drop(drops.recv_timeout(LONG));
            }
        });
        let client = connect(builder);
        client.sender().send(Outgoing::from_owner(Owner(client.sender(), gone))).unwrap();
        wait_begun(&client);
        hand.send(client).unwrap();
        server.cut_all();
        assert_eq!(end.recv_timeout(LONG), Ok(()));
    }

    /// A session that waits in its hook.
    struct Waits(crossbeam_channel::Sender<()>, crossbeam_channel::Receiver<()>);

    impl Session for Waits {
        fn on_message(&mut self, _: Data<'_>, _: &mut Link<'_>) -> Result<(), BoxError> {
            let _ = self.0.send(());
            let _ = self.1.recv();
            Ok(())
        }
    }

    #[test]
    fn what_a_thread_brings_back_after_its_client_is_dropped_goes_too() {
        let (gone, end) = bounded(1);
        let (told, waits) = bounded(1);
        let (release, released) = bounded::<()>(0);
        let server = serve([up().stop_reading()]);
        let session = move || Waits(told.clone(), released.clone());
        let client = connect(builder(&server).session(session));
        client.sender().send(Outgoing::from_owner(Owner(client.sender(), gone))).unwrap();
        wait_begun(&client);
        server.push("come");
        waits.recv_timeout(LONG).unwrap();
        drop(client);
        assert!(end.try_recv().is_err(), "the thread has it");
        drop(release);
        assert_eq!(end.recv_timeout(LONG), Ok(()));
    }

    fn size(n: u64) -> usize {
        match n {
            5000 => 16 << 20,
            n if n % 1000 == 999 => 1 << 20,
            n if n % 100 == 7 => 70_000,
            n => 1 + (n * 37 % 800) as usize,
        }
    }

    /// The n-th of the mixed messages: every byte follows from n.
    fn mixed(n: u64) -> Payload {
        let byte = b'a' + (n % 26) as u8;
        let mut bytes = vec![byte; size(n)];
        let digits = n.to_string();
        let head = digits.len().min(bytes.len());
        bytes[..head].copy_from_slice(&digits.as_bytes()[..head]);
        match n % 2 {
            0 => Payload::Text(String::from_utf8(bytes).unwrap()),
            _ => Payload::Binary(bytes),
        }
    }

    #[test]
    fn ten_thousand_messages_of_all_sizes_reach_a_slow_reader_once_and_intact() {
        const COUNT: u64 = 10_000;
        let mut script = up();
        for _ in 0..30 {
            script = script.stop_reading().pause(ms(40)).resume_reading().pause(ms(20));
        }
        let server = Server::script([script]).receive_buffer(64 << 10).start().unwrap();
        let client = start(builder(&server));
        let sender = client.sender();
        for n in 0..COUNT {
            let message = match mixed(n) {
                Payload::Text(text) => Outgoing::text(text),
                Payload::Binary(bytes) => Outgoing::binary(bytes),
                _ => unreachable!(),
            };
            sender.send_timeout(message, LONG).unwrap();
        }
        assert!(server.wait_for(|record| record.stats.received >= COUNT, LONG));
        let received = server.received();
        assert_eq!(received.len() as u64, COUNT);
        for (n, Received { payload, .. }) in received.iter().enumerate() {
            assert!(*payload == mixed(n as u64), "message {n} is not what was sent");
        }
        assert_eq!(server.violations(), [""; 0]);
        assert_eq!(close(&client).metrics.connections[0].messages_sent, COUNT);
    }

    #[test]
    fn each_of_four_threads_keeps_its_order() {
        const COUNT: u64 = 1000;
        let server = serve([up()]);
        let client = start(builder(&server).outbox(16));
        thread::scope(|scope| {
            for thread in 0..4 {
                let sender = client.sender();
                scope.spawn(move || {
                    for n in 0..COUNT {
                        let message = format!("{} {thread}", n * 4 + thread);
                        sender.send_timeout(message, LONG).unwrap();
                    }
                });
            }
        });
        assert!(server.wait_for(|record| record.stats.received == 4 * COUNT, LONG));
        let all = sent(&server);
        for thread in 0..4 {
            let own = all.iter().filter(|n| **n % 4 == thread).copied();
            assert!(own.eq((0..COUNT).map(|n| n * 4 + thread)), "thread {thread}");
        }
        close(&client);
    }
}

mod reconnecting {
    use super::*;

    struct Opening;

    impl Session for Opening {
        fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
            link.send("login");
            link.send("subscribe");
            link.hold();
            Ok(())
        }

        fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
            match data.text() {
                Some("welcome") => link.ready(),
                _ => link.send("thanks"),
            }
            Ok(())
        }
    }

    #[test]
    fn what_is_queued_while_down_leaves_in_order_after_the_opening_messages() {
        let server = absent([up().expect("subscribe").pause(ms(50)).send("welcome")]);
        let client = start(builder(&server).session(|| Opening));
        for n in 0..50 {
            client.sender().send(n.to_string()).unwrap();
        }
        server.restart().unwrap();
        wait_text(&server, "49");
        server.push("gift");
        wait_text(&server, "thanks");
        let mut expected = vec!["login".to_owned(), "subscribe".to_owned()];
        expected.extend((0..50).map(|n| n.to_string()));
        expected.push("thanks".to_owned());
        assert_eq!(server.texts(), expected);
        close(&client);
    }

    #[test]
    fn opening_messages_leave_first_also_when_nothing_confirms_them() {
        struct Greeting;
        impl Session for Greeting {
            fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
                (0..50).for_each(|n| link.send(n.to_string()));
                Ok(())
            }
        }
        let server = absent([up()]);
        let client = start(builder(&server).session(|| Greeting));
        for n in 50..100 {
            client.sender().send(n.to_string()).unwrap();
        }
        server.restart().unwrap();
        wait_text(&server, "99");
        assert_eq!(sent(&server), (0..100).collect::<Vec<_>>());
        close(&client);
    }

    /// The server reads slowly and is cut again and again in the middle of a
    /// backlog; what it saw on all its connections together is looked at.
    fn backlog(chatter: impl Fn(Script) -> Script) {
        // Each cut takes what the system had buffered with it: some MiB.
        const COUNT: u64 = 8000;
        const CUTS: usize = 2;
        // More than the system buffers before the client has to wait.
        const SEEN: usize = 1500;
        let slow = |mut script: Script| {
            for _ in 0..200 {
                script = script.resume_reading().pause(ms(20)).stop_reading().pause(ms(5));
            }
            script
        };
        let mut scripts = vec![slow(chatter(up())); CUTS];
        scripts.push(chatter(up()));
        let server = Server::script(scripts).receive_buffer(64 << 10).start().unwrap();
        let client = connect(builder(&server));
        thread::scope(|scope| {
            let sender = client.sender();
            scope.spawn(move || {
                for n in 0..COUNT {
                    sender.send_timeout(padded(n, 4096), LONG).unwrap();
                }
            });
            for cut in 0..CUTS {
                let some = |record: &broadsock::testing::Record| {
                    let own = record.received.iter().filter(|r| r.connection == cut);
                    own.filter(|r| matches!(r.payload, Payload::Text(_))).count() >= SEEN
                };
                assert!(server.wait_for(some, LONG), "nothing on connection {cut}");
                server.cut(cut);
            }
        });
        wait_text(&server, &padded(COUNT - 1, 4096));
        let all = sent(&server);
        let broken = all.windows(2).find(|pair| pair[0] >= pair[1]);
        assert_eq!(broken, None, "out of order or twice");
        assert_eq!(server.violations(), [""; 0]);
        close(&client);
    }

    #[test]
    fn a_cut_in_a_backlog_sends_nothing_twice_and_keeps_the_order() {
        backlog(|script| script);
    }

    #[test]
    fn a_cut_in_a_backlog_between_pongs_sends_nothing_twice_and_keeps_the_order() {
        backlog(|script| script.ping_every(ms(1)));
    }

    /// Of the messages behind the wall no byte has left.
    #[test]
    fn messages_behind_a_wall_of_pongs_are_sent_on_the_next_connection() {
        let server =
            Server::script([wall().send("all said"), up()]).receive_buffer(4096).start().unwrap();
        let client = start(builder(&server).write_timeout(LONG));
        assert_eq!(text(&client), "all said");
        for n in 0..20 {
            client.sender().send(n.to_string()).unwrap();
        }
        eventually("the connection has seen them", || {
            server.push("tick");
            client.recv_timeout(ms(20)).is_ok()
        });
        linger(ms(50));
        server.cut(0);
        wait_text(&server, "19");
        assert_eq!(sent(&server), (0..20).collect::<Vec<_>>());
        close(&client);
    }

    /// Pings whose pongs fill every buffer on the way back.
    fn wall() -> Script {
        let mut ping = vec![0x89, 125];
        ping.extend([b'p'; 125]);
        up().stop_reading().send_raw(ping.repeat(100_000))
    }

    #[test]
    fn a_message_in_the_outbox_when_the_connection_is_lost_leaves_on_the_next() {
        let server = serve([up().send("a"), up()]);
        let client = connect(builder(&server));
        assert_eq!(text(&client), "a");
        server.stop();
        eventually("it is lost", || !client.sender().is_connected());
        client.sender().send("kept").unwrap();
        server.restart().unwrap();
        wait_text(&server, "kept");
        assert_eq!(server.texts(), ["kept"]);
        close(&client);
    }
}

mod refusing {
    use super::*;

    #[test]
    fn reject_hands_the_message_back_while_there_is_no_connection() {
        let server = absent([up()]);
        let client = start(builder(&server).while_down(WhileDown::Reject));
        let sender = client.sender();
        let refused = (SendErrorReason::NotConnected, Outgoing::from("a"));
        assert_eq!(reason(sender.send("a")), refused);
        assert_eq!(reason(sender.try_send("a")), refused);
        assert_eq!(reason(sender.send_timeout("a", LONG)), refused);
        server.restart().unwrap();
        client.wait_connected(LONG).unwrap();
        sender.send("b").unwrap();
        wait_text(&server, "b");
        assert_eq!(server.texts(), ["b"]);
        close(&client);
    }

    #[test]
    fn wait_waits_for_the_connection() {
        let server = absent([up()]);
        let client = start(builder(&server).while_down(WhileDown::Wait));
        let sender = client.sender();
        let refused = (SendErrorReason::NotConnected, Outgoing::from("a"));
        assert_eq!(reason(sender.try_send("a")), refused);
        assert_eq!(reason(sender.send_timeout("a", ms(20))), refused);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| sender.send_timeout("b", LONG));
            linger(ms(20));
            assert!(!waiting.is_finished());
            server.restart().unwrap();
            waiting.join().unwrap().unwrap();
        });
        wait_text(&server, "b");
        assert_eq!(server.texts(), ["b"]);
        close(&client);
    }

    #[test]
    fn a_full_outbox_hands_back_times_out_or_waits() {
        let server = absent([up()]);
        let client = start(builder(&server).outbox(2));
        let sender = client.sender();
        sender.try_send("0").unwrap();
        sender.try_send("1").unwrap();
        assert_eq!(reason(sender.try_send("x")), (SendErrorReason::Full, "x".into()));
        let timed_out = reason(sender.send_timeout("x", ms(20)));
        assert_eq!(timed_out, (SendErrorReason::Timeout, "x".into()));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| sender.send_timeout("2", LONG));
            linger(ms(20));
            assert!(!waiting.is_finished());
            server.restart().unwrap();
            waiting.join().unwrap().unwrap();
        });
        wait_text(&server, "2");
        assert_eq!(sent(&server), [0, 1, 2]);
        close(&client);
    }

    #[test]
    fn a_message_over_the_limit_is_handed_back() {
        let server = serve([up()]);
        let client = connect(builder(&server).max_message_size(1000));
        let large = Outgoing::binary(vec![0; 1001]);
        let refused = (SendErrorReason::TooLarge, large.clone());
        assert_eq!(reason(client.sender().send(large.clone())), refused);
        assert_eq!(reason(client.sender().try_send(large)), refused);
        client.sender().send(vec![0; 1000]).unwrap();
        assert!(server.wait_for(|record| record.stats.received == 1, LONG));
        close(&client);
    }

    #[test]
    fn a_session_that_sends_a_message_over_the_limit_fails() {
        struct Shouting;
        impl Session for Shouting {
            fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
                if link.epoch() == 1 {
                    link.send("x".repeat(1 << 20));
                }
                Ok(())
            }
        }
        let server = serve([up()]);
        let client = start(builder(&server).max_message_size(1000).session(|| Shouting));
        client.sender().send("after").unwrap();
        wait_text(&server, "after");
        assert_eq!(server.texts(), ["after"]);
        close(&client);
    }

    #[test]
    fn after_a_close_nothing_is_taken_and_waiting_senders_are_released() {
        for policy in [WhileDown::Queue, WhileDown::Wait] {
            let server = absent([up()]);
            let client = start(builder(&server).outbox(1).while_down(policy));
            let sender = client.sender();
            if policy == WhileDown::Queue {
                sender.send("0").unwrap();
            }
            thread::scope(|scope| {
                let waiting: Vec<_> = (0..3).map(|_| scope.spawn(|| sender.send("1"))).collect();
                linger(ms(20));
                close(&client);
                for thread in waiting {
                    let closed = (SendErrorReason::Closed, "1".into());
                    assert_eq!(reason(thread.join().unwrap()), closed, "{policy:?}");
                }
            });
            for result in [sender.send("2"), sender.try_send("2"), sender.send_timeout("2", LONG)] {
                assert_eq!(reason(result), (SendErrorReason::Closed, "2".into()));
            }
        }
    }
}

mod ending {
    use super::*;

    #[test]
    fn what_was_never_sent_is_in_the_report() {
        let server = absent([up()]);
        let client = start(builder(&server));
        for text in ["a", "b"] {
            client.sender().send(text).unwrap();
        }
        assert_eq!(close(&client).unsent, [Outgoing::from("a"), Outgoing::from("b")]);
    }

    #[test]
    fn what_is_queued_before_a_close_is_sent_first() {
        let server = serve([up()]);
        let client = connect(builder(&server));
        for n in 0..100 {
            client.sender().send(n.to_string()).unwrap();
        }
        assert_eq!(close(&client).unsent, []);
        assert_eq!(sent(&server), (0..100).collect::<Vec<_>>());
    }

    struct Login;

    impl Session for Login {
        fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
            link.send("login");
            link.hold();
            Ok(())
        }

        fn on_message(&mut self, _: Data<'_>, _: &mut Link<'_>) -> Result<(), BoxError> {
            Err("denied".into())
        }
    }

    fn unsent_event(client: &Client) -> usize {
        find(&client.events(), |event| match event.kind {
            EventKind::Unsent { count } => Some(count),
            _ => None,
        })
    }

    #[test]
    fn when_every_login_fails_queued_messages_are_discarded_and_reported() {
        let server = serve([up().expect("login").send("denied")]);
        let client = start(builder(&server).session(|| Login).max_attempts(3));
        client.sender().send("secret").unwrap();
        client.sender().send("order").unwrap();
        assert_eq!(unsent_event(&client), 2);
        let report = close(&client);
        assert_eq!(report.unsent, [Outgoing::from("secret"), Outgoing::from("order")]);
        assert!(report.error.is_some());
        assert_eq!(server.texts().into_iter().collect::<BTreeSet<_>>().len(), 1, "only logins");
        let refused = reason(client.sender().send("late"));
        assert_eq!(refused, (SendErrorReason::Closed, "late".into()));
    }

    #[test]
    fn a_sender_blocked_on_a_client_that_fails_is_released() {
        let server = serve([up().expect("login").pause(Duration::from_millis(100)).send("denied")]);
        let client = start(builder(&server).session(|| Login).max_attempts(2).outbox(1));
        client.sender().send("0").unwrap();
        let refused = reason(client.sender().send_timeout("1", LONG));
        assert_eq!(refused, (SendErrorReason::Closed, "1".into()));
        assert_eq!(unsent_event(&client), 1);
    }
}

#[test]
fn the_outbox_is_bounded_in_bytes_too_and_one_message_alone_may_exceed_it() {
    let client = Client::builder("ws://127.0.0.1:9/")
        .resolver(|_, _| Ok(Vec::new()))
        .outbox_bytes(100)
        .start()
        .unwrap();
    let sender = client.sender();
    sender.try_send("x".repeat(500)).unwrap();
    let refused = sender.try_send("y").unwrap_err();
    assert_eq!((refused.reason, refused.message.len()), (SendErrorReason::Full, 1));
    let report = client.close(LONG);
    assert_eq!(report.unsent.len(), 1);
}
