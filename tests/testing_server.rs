//! The scripted server of `broadsock::testing`, step by step, seen by a client
//! that shares no code with it beyond frame headers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use broadsock::testing::{Feed, Payload, Record, Script, Server, Upgrade};
use tungstenite::client::IntoClientRequest;
use tungstenite::handshake::HandshakeError;
use tungstenite::protocol::frame::CloseFrame;
use tungstenite::{Error, Message, WebSocket};

/// Generous: says only that something happens, not how fast.
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(100);

type Client = WebSocket<TcpStream>;
type Response = tungstenite::http::Response<Option<Vec<u8>>>;

fn tcp(server: &Server) -> TcpStream {
    let tcp = TcpStream::connect(server.addr()).unwrap();
    tcp.set_read_timeout(Some(LONG)).unwrap();
    tcp.set_write_timeout(Some(LONG)).unwrap();
    tcp
}

fn try_connect(server: &Server) -> Result<(Client, Response), Error> {
    let request = server.url().into_client_request().unwrap();
    tungstenite::client::client(request, tcp(server)).map_err(|error| match error {
        HandshakeError::Failure(error) => error,
        HandshakeError::Interrupted(_) => panic!("the server said nothing for {LONG:?}"),
    })
}

fn connect(server: &Server) -> Client {
    try_connect(server).unwrap().0
}

/// An upgraded connection of which nothing behind the 101 was read.
fn upgrade_by_hand(server: &Server) -> TcpStream {
    let mut tcp = tcp(server);
    tcp.write_all(b"GET / HTTP/1.1\r\nSec-WebSocket-Key: x\r\n\r\n").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        tcp.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    tcp
}

fn start(script: Script) -> Server {
    Server::script([script]).start().unwrap()
}

/// A server on its first connection, upgraded, after which the script goes on.
fn open(rest: impl FnOnce(Script) -> Script) -> (Server, Client) {
    let server = start(rest(Script::new().upgrade()));
    let client = connect(&server);
    (server, client)
}

fn text(client: &mut WebSocket<impl Read + Write>) -> String {
    client.read().unwrap().into_text().unwrap().to_string()
}

fn texts(client: &mut Client, count: usize) -> Vec<String> {
    (0..count).map(|_| text(client)).collect()
}

fn io_kind(error: Error) -> ErrorKind {
    match error {
        Error::Io(error) => error.kind(),
        other => panic!("not an I/O error: {other:?}"),
    }
}

/// The status and one header of an answer that is no upgrade.
fn status(server: &Server, header: &str) -> (u16, String) {
    match try_connect(server) {
        Err(Error::Http(response)) => {
            (response.status().as_u16(), response.headers()[header].to_str().unwrap().to_owned())
        }
        other => panic!("no HTTP answer but {other:?}"),
    }
}

/// Nothing arrives for a little while, and the socket stays open.
fn assert_quiet(tcp: &mut TcpStream) {
    tcp.set_read_timeout(Some(SHORT)).unwrap();
    let kind = tcp.read(&mut [0; 16]).unwrap_err().kind();
    assert!(matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{kind:?}");
    tcp.set_read_timeout(Some(LONG)).unwrap();
}

mod before_the_upgrade {
    use super::*;

    #[test]
    fn refuse_resets_at_once() {
        let server = start(Script::new().refuse());
        assert_eq!(tcp(&server).read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(server.wait_live(0, LONG));
    }

    #[test]
    fn after_then_refuse_the_last_script_does_not_repeat() {
        let script = Script::new().upgrade().close(1000, "");
        let server = Server::script([script]).then_refuse().start().unwrap();
        assert!(connect(&server).read().unwrap().is_close());
        assert_eq!(tcp(&server).read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn silent_records_the_request_and_says_nothing() {
        let server = start(Script::new().silent());
        let mut tcp = tcp(&server);
        tcp.write_all(b"GET /feed?x=1 HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
        assert!(server.wait_for(|record| record.requests.len() == 1, LONG));
        assert_quiet(&mut tcp);
        let request = &server.requests()[0];
        assert_eq!((request.connection, request.path.as_str()), (0, "/feed?x=1"));
        assert_eq!(request.header("host"), Some("here"));
        assert_eq!(request.accept_key(), None);
        drop(tcp);
        assert!(server.wait_live(0, LONG));
    }

    #[test]
    fn status_carries_headers_and_body() {
        let script = Script::new().status_with_body(503, [("Retry-After", "1")], "later");
        let server = Server::script([script.clone(), script]).start().unwrap();
        assert_eq!(status(&server, "Retry-After"), (503, "1".to_owned()));
        assert!(server.wait_live(0, LONG), "the server closes after a status");
        let mut tcp = tcp(&server);
        tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).unwrap();
        assert!(answer.ends_with("\r\n\r\nlater"), "{answer}");
        assert_eq!(server.stats().upgraded, 0);
    }

    #[test]
    fn redirect_names_a_location() {
        let server = start(Script::new().redirect("/elsewhere"));
        assert_eq!(status(&server, "Location"), (302, "/elsewhere".to_owned()));
    }

    /// By hand, because tungstenite takes so many small reads for an attack.
    #[test]
    fn dribble_upgrades_byte_by_byte() {
        let server = start(Script::new().dribble(Duration::from_micros(1)).send("a"));
        let mut tcp = upgrade_by_hand(&server);
        assert_eq!(server.stats().upgraded, 1);
        let mut message = [0; 3];
        tcp.read_exact(&mut message).unwrap();
        assert_eq!(&message, b"\x81\x01a");
    }

    #[test]
    fn a_raw_response_is_sent_as_it_is() {
        let server = start(Script::new().raw_response("SSH-2.0-hello\r\n").fin());
        let error = try_connect(&server).unwrap_err();
        assert!(!matches!(error, Error::Http(_)), "{error:?}");
        let server = start(Script::new().raw_response("HTTP/1.1 101 Whatever\r\n\r\n").send("a"));
        let error = try_connect(&server).unwrap_err();
        assert!(matches!(error, Error::Protocol(_)), "{error:?}");
        assert_eq!(server.stats().upgraded, 1);
    }

    #[test]
    fn a_request_without_a_key_is_answered_with_400() {
        let server = start(Script::new().upgrade());
        let mut tcp = tcp(&server);
        tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
        assert_eq!(server.violations().len(), 1);
    }

    #[test]
    fn nonsense_is_not_answered() {
        let server = start(Script::new().upgrade());
        let mut tcp = tcp(&server);
        tcp.write_all(b"\0\0\0\r\n\r\n").unwrap();
        assert_eq!(tcp.read(&mut [0]).unwrap(), 0);
        assert_eq!(server.violations(), ["connection 0: a request that is not HTTP/1.1"]);
    }

    #[test]
    fn an_upgrade_can_be_unusual() {
        let upgrade = Upgrade::new().filler_headers(60).header("X-A", "1").first_text("a");
        let server = start(Script::new().upgrade_with(upgrade.first_raw(b"\x81\x01b")));
        let (mut client, response) = try_connect(&server).unwrap();
        assert_eq!(response.headers()["X-A"], "1");
        assert_eq!(response.headers()["X-Filler-59"], "59");
        assert_eq!(texts(&mut client, 2), ["a", "b"]);
    }

    #[test]
    fn an_upgrade_can_be_wrong() {
        for upgrade in [
            Upgrade::new().wrong_accept_key(),
            Upgrade::new().connection("close"),
            Upgrade::new().subprotocol("not-offered"),
            Upgrade::new().filler_headers(130),
        ] {
            let server = start(Script::new().upgrade_with(upgrade.clone()));
            assert!(try_connect(&server).is_err(), "{upgrade:?}");
        }
    }
}

mod sending {
    use super::*;

    #[test]
    fn messages_arrive_in_order_in_each_form() {
        let (_server, mut client) = open(|script| {
            script
                .send("a")
                .send_all(["b", "c"])
                .send_fragmented("defg", 3)
                .send_bytewise("h", Duration::ZERO)
                .send_bytewise("i", Duration::from_millis(1))
                .send_raw(b"\x81\x01j")
                .send_binary([1, 2])
        });
        assert_eq!(texts(&mut client, 7), ["a", "b", "c", "defg", "h", "i", "j"]);
        assert_eq!(client.read().unwrap(), Message::Binary(vec![1, 2].into()));
    }

    #[test]
    fn a_flood_is_complete_and_in_order() {
        let (_server, mut client) = open(|script| script.flood(3..100_003, |n| n.to_string()));
        for n in 3..100_003 {
            assert_eq!(text(&mut client), n.to_string());
        }
    }

    #[test]
    fn an_endless_flood_ends_with_the_client_or_the_server() {
        let (server, mut client) = open(|script| script.numbers(5..));
        assert_eq!(texts(&mut client, 2), ["{\"id\":5}", "{\"id\":6}"]);
        drop(client);
        assert!(server.wait_live(0, LONG));
        let _unread = connect(&server);
        assert!(server.wait_live(1, LONG));
        server.stop();
        assert_eq!(server.stats().live, 0);
    }

    #[test]
    fn repeat_counts_exactly() {
        let (_server, mut client) = open(|script| script.repeat(["a", "b"], 20_001).send("end"));
        for _ in 0..20_001 {
            assert_eq!(texts(&mut client, 2), ["a", "b"]);
        }
        assert_eq!(text(&mut client), "end");
    }

    #[test]
    fn a_feed_goes_on_where_it_was_and_replays() {
        let feed = Feed::new(10, |n| n.to_string()).replay(2);
        let server = start(Script::new().upgrade().feed(&feed, 3).feed(&feed, 1).send("end"));
        let mut first = connect(&server);
        assert_eq!(texts(&mut first, 5), ["0", "1", "2", "3", "end"]);
        let mut second = connect(&server);
        assert_eq!(texts(&mut second, 7), ["2", "3", "4", "5", "6", "7", "end"]);
        let mut third = connect(&server);
        assert_eq!(texts(&mut third, 5), ["6", "7", "8", "9", "end"]);
        assert_eq!(feed.handed_out(), 10);
    }

    #[test]
    fn pings_come_one_by_one_in_floods_and_at_intervals() {
        let pong = |payload: &Payload| *payload == Payload::Pong(vec![7; 125]);
        let (_server, mut client) = open(|script| {
            let script = script.ping([7; 125]).expect_that(pong).ping_flood(1000).send("a");
            script.ping_every(Duration::from_millis(1))
        });
        assert_eq!(client.read().unwrap(), Message::Ping(vec![7; 125].into()));
        for _ in 0..1000 {
            assert!(client.read().unwrap().is_ping());
        }
        assert_eq!(text(&mut client), "a");
        for _ in 0..5 {
            assert!(client.read().unwrap().is_ping());
        }
    }
}

mod listening {
    use super::*;

    #[test]
    fn pings_are_answered_also_while_a_script_waits() {
        let (server, mut client) = open(|script| script.pause(LONG * 10));
        client.send(Message::Ping(vec![1, 2].into())).unwrap();
        assert_eq!(client.read().unwrap(), Message::Pong(vec![1, 2].into()));
        assert_eq!(server.received()[0].payload, Payload::Ping(vec![1, 2]));
    }

    #[test]
    fn pongs_wait_for_the_end_of_a_frame() {
        let (_server, mut client) =
            open(|script| script.send_bytewise("slowly", Duration::from_millis(20)));
        client.send(Message::Ping(vec![].into())).unwrap();
        assert_eq!(text(&mut client), "slowly");
        assert!(client.read().unwrap().is_pong());
    }

    #[test]
    fn ignored_pings_are_recorded_and_answered_again_later() {
        let (server, mut client) =
            open(|script| script.ignore_pings().expect("now").answer_pings().send("yes"));
        client.send(Message::Ping(vec![1].into())).unwrap();
        client.send("now".into()).unwrap();
        assert_eq!(text(&mut client), "yes");
        client.send(Message::Ping(vec![2].into())).unwrap();
        assert_eq!(client.read().unwrap(), Message::Pong(vec![2].into()));
        let received: Vec<_> = server.received().into_iter().map(|r| r.payload).collect();
        let now = Payload::Text("now".into());
        assert_eq!(received, [Payload::Ping(vec![1]), now, Payload::Ping(vec![2])]);
    }

    #[test]
    fn each_expectation_begins_behind_the_last() {
        let (server, mut client) =
            open(|script| script.expect("a").expect("a").send("twice").expect("never"));
        for message in ["x", "a", "y", "a"] {
            client.send(message.into()).unwrap();
        }
        assert_eq!(text(&mut client), "twice");
        assert_eq!(server.texts(), ["x", "a", "y", "a"]);
    }

    #[test]
    fn echo_returns_16_mib_and_small_messages() {
        let (_server, mut client) = open(Script::echo);
        let big = Message::Binary(vec![0x5A; 16 << 20].into());
        client.send(big.clone()).unwrap();
        assert!(client.read().unwrap() == big);
        for message in ["", "a", "ü"] {
            client.send(message.into()).unwrap();
            assert_eq!(text(&mut client), message);
        }
    }

    #[test]
    fn a_server_that_does_not_read_blocks_the_client() {
        let script = Script::new().upgrade().stop_reading().hold();
        let server = Server::script([script]).receive_buffer(4096).start().unwrap();
        let mut client = connect(&server);
        client.get_ref().set_write_timeout(Some(SHORT)).unwrap();
        let chunk = Message::Binary(vec![0; 1 << 20].into());
        let error = (0..100).find_map(|_| client.send(chunk.clone()).err()).unwrap();
        assert!(matches!(io_kind(error), ErrorKind::WouldBlock | ErrorKind::TimedOut));
        assert_eq!((server.stats().received, server.stats().live), (0, 1));
        server.cut_all();
        assert_eq!(server.stats().live, 0);
    }

    #[test]
    fn reading_can_be_resumed() {
        let (server, mut client) = open(|script| {
            script.stop_reading().pause(SHORT).resume_reading().expect("a").send("b")
        });
        client.send("a".into()).unwrap();
        assert_eq!(text(&mut client), "b");
        assert_eq!(server.texts(), ["a"]);
    }

    #[test]
    fn violations_are_named_and_closed() {
        let (server, mut client) = open(Script::hold);
        client.get_mut().write_all(b"\x81\x01x").unwrap();
        let Message::Close(Some(CloseFrame { code, .. })) = client.read().unwrap() else {
            panic!("no close frame");
        };
        assert_eq!(u16::from(code), 1002);
        assert_eq!(server.violations(), ["connection 0: a frame without a mask"]);
    }

    #[test]
    fn what_is_kept_is_bounded_and_all_is_counted() {
        let server = Server::script([]).keep_received(2).start().unwrap();
        let mut client = connect(&server);
        for n in 0..10 {
            client.send(n.to_string().into()).unwrap();
        }
        assert!(server.wait_for(|record| record.stats.received == 10, LONG));
        assert_eq!(server.texts(), ["0", "1"]);
    }
}

mod ending {
    use super::*;

    fn close_of(client: &mut Client) -> Option<(u16, String)> {
        match client.read().unwrap() {
            Message::Close(frame) => frame.map(|f| (f.code.into(), f.reason.to_string())),
            other => panic!("no close frame but {other:?}"),
        }
    }

    #[test]
    fn close_shakes_hands_and_then_sends_fin() {
        let (server, mut client) = open(|script| script.send("a").close(1012, "later"));
        assert_eq!(text(&mut client), "a");
        assert_eq!(close_of(&mut client), Some((1012, "later".into())));
        assert!(matches!(client.read(), Err(Error::ConnectionClosed)));
        drop(client);
        assert!(server.wait_live(0, LONG));
        assert_eq!(server.received().len(), 1);
        assert!(matches!(server.received()[0].payload, Payload::Close(1012, _)));
    }

    #[test]
    fn close_1005_carries_no_code() {
        let (_server, mut client) = open(|script| script.close(1005, "unsaid"));
        assert_eq!(close_of(&mut client), None);
    }

    #[test]
    fn a_clients_close_is_answered() {
        let (server, mut client) = open(Script::hold);
        client.close(Some(CloseFrame { code: 4000.into(), reason: "done".into() })).unwrap();
        assert_eq!(close_of(&mut client), Some((4000, String::new())));
        assert!(matches!(client.read(), Err(Error::ConnectionClosed)));
        drop(client);
        assert!(server.wait_live(0, LONG));
        assert_eq!(server.received()[0].payload, Payload::Close(4000, "done".into()));
    }

    #[test]
    fn an_ignored_close_is_recorded_and_tcp_stays() {
        let (server, mut client) = open(Script::ignore_close);
        client.close(None).unwrap();
        assert!(server.wait_for(|record| record.stats.received == 1, LONG));
        assert_eq!(server.received()[0].payload, Payload::Close(1005, String::new()));
        assert_quiet(client.get_mut());
        assert_eq!(server.stats().live, 1);
    }

    #[test]
    fn cut_resets_after_what_was_sent() {
        let (server, mut client) = open(|script| script.send("a").send("b").cut());
        assert_eq!(texts(&mut client, 2), ["a", "b"]);
        let reset = matches!(
            client.read().unwrap_err(),
            Error::Io(error) if error.kind() == ErrorKind::ConnectionReset
        );
        assert!(reset);
        assert!(server.wait_live(0, LONG));
    }

    #[test]
    fn cut_mid_frame_leaves_half_a_frame() {
        let server = start(Script::new().upgrade().send("a").cut_mid_frame("halved"));
        let mut all = Vec::new();
        let kind = upgrade_by_hand(&server).read_to_end(&mut all).unwrap_err().kind();
        assert_eq!((kind, &all[..]), (ErrorKind::ConnectionReset, &b"\x81\x01a\x81\x06ha"[..]));
    }

    #[test]
    fn fin_ends_the_stream_without_a_close_frame() {
        let server = start(Script::new().upgrade().send("a").fin());
        let mut tcp = upgrade_by_hand(&server);
        let mut all = Vec::new();
        tcp.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"\x81\x01a");
        tcp.write_all(b"\x81\x81\0\0\0\0z").unwrap();
        assert!(server.wait_for(|record| record.texts().eq(["z"]), LONG), "it goes on reading");
        drop(tcp);
        assert!(server.wait_live(0, LONG));
    }

    #[test]
    fn half_open_neither_reads_nor_writes_until_the_client_gives_up() {
        let (server, mut client) = open(|script| script.send("a").half_open());
        assert_eq!(text(&mut client), "a");
        assert_quiet(client.get_mut());
        client.send(Message::Ping(vec![].into())).unwrap();
        assert_quiet(client.get_mut());
        assert_eq!(server.stats().live, 1);
        drop(client);
        assert!(server.wait_live(0, LONG));
    }

    #[test]
    fn silent_after_the_upgrade_reads_and_says_nothing() {
        let (server, mut client) = open(Script::silent);
        client.send(Message::Ping(vec![].into())).unwrap();
        client.close(None).unwrap();
        assert!(server.wait_for(|record| record.stats.received == 2, LONG));
        assert_quiet(client.get_mut());
    }
}

mod the_server {
    use super::*;

    #[test]
    fn scripts_are_taken_in_turn_and_the_last_repeats() {
        let say = |text| Script::new().upgrade().send(text);
        let server = Server::script([say("first"), say("then")]).start().unwrap();
        let heard: Vec<_> = (0..3).map(|_| text(&mut connect(&server))).collect();
        assert_eq!(heard, ["first", "then", "then"]);
    }

    #[test]
    fn push_reaches_every_upgraded_connection() {
        let server = start(Script::new().upgrade());
        let mut clients = [connect(&server), connect(&server)];
        let _not_upgraded = tcp(&server);
        assert_eq!(server.push("news"), 2);
        clients.iter_mut().for_each(|client| assert_eq!(text(client), "news"));
    }

    #[test]
    fn cut_resets_one_connection_and_cut_all_the_others() {
        let server = start(Script::new().upgrade());
        let mut clients = [connect(&server), connect(&server), connect(&server)];
        assert!(server.cut(1));
        assert_eq!(server.stats().live, 2);
        server.cut_all();
        assert_eq!(server.stats().live, 0);
        for client in &mut clients {
            assert_eq!(io_kind(client.read().unwrap_err()), ErrorKind::ConnectionReset);
        }
        assert!(!server.cut(1));
        connect(&server);
    }

    #[test]
    fn an_outage_refuses_and_a_restart_takes_the_same_port() {
        let server = start(Script::new().upgrade().echo());
        let url = server.url();
        for round in 0..20 {
            let mut client = connect(&server);
            client.send(round.to_string().into()).unwrap();
            assert_eq!(text(&mut client), round.to_string());
            server.stop();
            server.stop();
            assert_eq!(io_kind(client.read().unwrap_err()), ErrorKind::ConnectionReset);
            let refused = TcpStream::connect(server.addr()).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            server.restart().unwrap();
            server.restart().unwrap();
        }
        assert_eq!((server.url(), server.stats().accepted), (url, 20));
        assert_eq!(server.stats().max_live, 1);
    }

    #[test]
    fn a_client_that_reconnects_is_counted_once() {
        let counted_twice = || {
            let server = start(Script::new().upgrade().numbers(0..10));
            for round in 0..30 {
                let mut client = connect(&server);
                if round % 3 == 0 {
                    // The close frame is still unread when the next connection comes.
                    client.close(None).unwrap();
                }
            }
            assert_eq!(server.stats().accepted, 30);
            server.stats().max_live > 1
        };
        // TCP keeps no order across sockets: on a busy machine the end of one
        // connection may, seldom, arrive behind the beginning of the next.
        let twice = (0..10).filter(|_| counted_twice()).count();
        assert!(twice <= 2, "in {twice} of 10 servers");
    }

    #[test]
    fn conditions_are_woken_by_changes_and_end_with_their_time() {
        let server = start(Script::new().upgrade());
        assert!(!server.wait_live(1, SHORT));
        std::thread::scope(|scope| {
            scope.spawn(|| connect(&server).send("a".into()).unwrap());
            assert!(server.wait_for(|record: &Record| record.texts().eq(["a"]), LONG));
        });
    }

    #[test]
    fn a_condition_that_panics_does_no_harm() {
        let server = start(Script::new().upgrade());
        let panicking = std::panic::AssertUnwindSafe(|| server.wait_for(|_| panic!("no"), LONG));
        assert!(std::panic::catch_unwind(panicking).is_err());
        connect(&server);
        assert!(server.wait_live(0, LONG));
    }

    #[test]
    fn a_closure_that_panics_costs_its_connection() {
        let server = start(Script::new().upgrade().flood(0..9, |_| panic!("on purpose")));
        for _ in 0..2 {
            let _ended = try_connect(&server).map(|(mut client, _)| client.read().unwrap_err());
            assert!(server.wait_live(0, LONG));
        }
        assert_eq!(server.stats().accepted, 2);
    }

    #[test]
    fn urls_name_other_hosts_and_addresses() {
        let server = start(Script::new());
        let port = server.addr().port();
        assert_eq!(server.url(), format!("ws://127.0.0.1:{port}/"));
        assert_eq!(server.url_with("localhost"), format!("ws://localhost:{port}/"));
        if let Ok(server) = Server::script([]).bind("[::1]:0").start() {
            assert!(server.url().starts_with("ws://[::1]:"));
            connect(&server);
        }
        let error = Server::script([]).bind("nowhere").start().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }

    /// In a process of its own, where no other test opens anything.
    #[cfg(target_os = "linux")]
    #[test]
    fn nothing_is_left_behind() {
        const ALONE: &str = "BROADSOCK_TEST_ALONE";
        const NAME: &str = "the_server::nothing_is_left_behind";
        if std::env::var_os(ALONE).is_none() {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            let output = child.args(["--exact", NAME]).env(ALONE, "1").output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            return;
        }
        let count = |what| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
        let counts = || (count("task"), count("fd"));
        let before = counts();
        let server = start(Script::new().upgrade().pause(Duration::MAX));
        let idle = counts();
        for _ in 0..100 {
            connect(&server);
        }
        assert!(server.wait_live(0, LONG));
        // The last thread has left the count and may still be on its way out.
        let _last = connect(&server);
        server.stop();
        server.restart().unwrap();
        let kept: Vec<_> = (0..20).map(|_| connect(&server)).collect();
        drop(kept);
        assert!(server.wait_live(0, LONG));
        drop(_last);
        assert_eq!(counts().1, idle.1);
        drop(server);
        assert_eq!(counts(), before);
    }
}

#[cfg(feature = "tls")]
mod tls {
    use super::*;
    use native_tls::{Certificate, TlsConnector, TlsStream};

    fn shake_hands(server: &Server, host: &str, trust: bool) -> Option<TlsStream<TcpStream>> {
        let mut connector = TlsConnector::builder();
        if trust {
            let root = Certificate::from_pem(server.ca_pem().unwrap().as_bytes()).unwrap();
            connector.add_root_certificate(root);
        }
        connector.build().unwrap().connect(host, tcp(server)).ok()
    }

    fn connect(server: &Server, host: &str) -> WebSocket<TlsStream<TcpStream>> {
        let stream = shake_hands(server, host, true).unwrap();
        tungstenite::client::client(server.url_with(host), stream).unwrap().0
    }

    #[test]
    fn wss_serves_those_who_trust_its_authority() {
        let server = Server::script([Script::new().upgrade().echo()]).start_tls().unwrap();
        assert!(server.url().starts_with("wss://127.0.0.1:"));
        for host in ["localhost", "127.0.0.1"] {
            let mut client = connect(&server, host);
            let big = Message::Binary(vec![0x5A; 4 << 20].into());
            client.send(big.clone()).unwrap();
            assert!(client.read().unwrap() == big);
        }
        assert!(shake_hands(&server, "localhost", false).is_none(), "not trusted");
        assert!(shake_hands(&server, "example.org", true).is_none(), "another name");
        assert!(server.wait_live(0, LONG));
    }

    #[test]
    fn a_certificate_can_be_for_other_names() {
        let names = ["example.org"];
        let server = Server::script([]).certificate_for(names).start_tls().unwrap();
        assert!(shake_hands(&server, "localhost", true).is_none());
        assert!(shake_hands(&server, "example.org", true).is_some());
    }

    #[test]
    fn floods_arrive_and_close_says_goodbye() {
        let script = Script::new().upgrade().numbers(0..50_000).close(1001, "bye");
        let server = Server::script([script]).start_tls().unwrap();
        let mut client = connect(&server, "localhost");
        for n in 0..50_000 {
            assert_eq!(text(&mut client), format!("{{\"id\":{n}}}"));
        }
        assert!(client.read().unwrap().is_close());
        assert!(matches!(client.read(), Err(Error::ConnectionClosed)));
    }

    #[test]
    fn cut_and_push_and_stop_work_under_tls() {
        let scripts = [Script::new().upgrade().send("a").cut(), Script::new().upgrade()];
        let server = Server::script(scripts).start_tls().unwrap();
        let mut client = connect(&server, "localhost");
        assert_eq!(text(&mut client), "a");
        assert!(client.read().is_err());
        let mut client = connect(&server, "localhost");
        assert_eq!(server.push("news"), 1);
        assert_eq!(text(&mut client), "news");
        server.stop();
        assert!(client.read().is_err());
        assert_eq!(server.stats().max_live, 1);
    }

    #[test]
    fn silence_and_cuts_before_the_handshake() {
        let scripts = [Script::new().silent_in_tls(), Script::new().pause(SHORT).cut()];
        let server = Server::script(scripts).start_tls().unwrap();
        let mut silent = tcp(&server);
        // The beginning of a ClientHello.
        silent.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").unwrap();
        assert_quiet(&mut silent);
        assert!(shake_hands(&server, "localhost", true).is_none());
        drop(silent);
        assert!(server.wait_live(0, LONG));
    }

    #[test]
    fn a_stop_breaks_off_a_handshake() {
        let server = Server::script([]).start_tls().unwrap();
        let _stuck = tcp(&server);
        assert!(server.wait_live(1, LONG));
        server.stop();
        assert_eq!(server.stats().live, 0);
    }
}
