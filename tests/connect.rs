//! From a URL to a connection, and every way that can fail.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use broadsock::crossbeam_channel::bounded;
use broadsock::testing::{Script, Server, Upgrade};
use broadsock::{
    Backoff, BoxError, Client, ClientBuilder, Data, Dedup, ErrorKind, Event, Intensity, Link,
    Request, Session, State, Step,
};
use common::*;

/// A session that never confirms its opening.
struct NeverReady;

impl Session for NeverReady {
    fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.hold();
        Ok(())
    }

    fn on_message(&mut self, _: Data<'_>, _: &mut Link<'_>) -> Result<(), BoxError> {
        Ok(())
    }
}

/// Starts a client against `scripts`, the last of which repeats.
fn start(scripts: impl IntoIterator<Item = Script>) -> (Server, Client, Watch) {
    let server = serve(scripts);
    let (client, watch) = launch(quick(server.url()));
    (server, client, watch)
}

fn launch(builder: ClientBuilder) -> (Client, Watch) {
    let client = builder.start().unwrap();
    let watch = Watch::new(&client);
    (client, watch)
}

/// Starts one client for each script, all at once, and waits for each to end
/// after its restarts; returns the causes.
fn ends_of(scripts: impl IntoIterator<Item = Script>) -> Vec<ErrorKind> {
    let running: Vec<_> = scripts.into_iter().map(|script| start([script])).collect();
    let ends = running.into_iter().map(|(server, client, watch)| {
        let cause = assert_ends_after_restarts(&client, watch);
        assert_eq!(server.stats().accepted, 4, "{cause}");
        assert_eq!(client.iter().count(), 0, "the iterator ends");
        cause.kind().clone()
    });
    ends.collect()
}

mod deadline {
    use super::*;

    /// The attempts end at the deadline in this step, one after the other, and
    /// then one succeeds.
    fn assert_goes_on(server: &Server, client: &Client, mut watch: Watch, step: Step) {
        for attempt in 1..=2 {
            let failed = watch.failed_attempt();
            assert!(timed_out_in(&failed.kind(), step), "{:?}", failed.error);
            assert_eq!((failed.epoch, failed.attempt), (attempt, attempt as u32));
            assert!(failed.retry_in.is_some() && failed.error.to_string().contains("300ms"));
        }
        assert_eq!(text(client), "hello");
        // The third may need longer than that on a busy machine.
        assert!(client.metrics().attempts() >= 3 && client.metrics().connects() == 1);
        assert!(server.wait_live(1, LONG));
        assert_eq!(server.stats().max_live, 1);
    }

    #[test]
    fn a_silent_server_costs_one_deadline_and_the_next_attempt_follows() {
        let silent = Script::new().silent();
        let server = serve([silent.clone(), silent, upgrade().send("hello").hold()]);
        let (client, watch) = launch(quick(server.url()).connect_timeout(ms(300)));
        assert_goes_on(&server, &client, watch, Step::Upgrade);
    }

    #[cfg(feature = "tls")]
    #[test]
    fn silence_in_tls_costs_one_deadline_and_the_next_attempt_follows() {
        let silent = Script::new().silent_in_tls();
        let scripts = [silent.clone(), silent, upgrade().send("hello").hold()];
        let server = Server::script(scripts).start_tls().unwrap();
        let trusting = quick(server.url()).root_certificate(server.ca_pem().unwrap());
        let (client, watch) = launch(trusting.connect_timeout(ms(300)));
        assert_goes_on(&server, &client, watch, Step::Tls);
    }

    #[test]
    fn a_session_that_never_gets_ready_is_given_up_at_the_same_deadline() {
        let server = serve([upgrade().send("not a confirmation").hold()]);
        let builder = quick(server.url()).session(|| NeverReady).connect_timeout(ms(300));
        let (client, mut watch) = launch(builder);
        for _ in 0..2 {
            watch.find("timeout in the opening", |event| {
                let failed = failed_attempt(event)?;
                timed_out_in(&failed.kind(), Step::Opening).then_some(())
            });
        }
        assert_eq!(client.metrics().connects(), 0);
        assert!(!watch.seen.iter().any(is_connected), "it never counted as connected");
        let report = client.close(LONG);
        assert!(report.stuck.is_empty() && server.wait_live(0, LONG));
        assert_eq!(server.stats().max_live, 1);
    }

    #[test]
    fn dns_that_never_returns_costs_one_deadline_and_a_close_in_it_is_not_held_up() {
        let (release, wait) = bounded::<()>(0);
        let calls = Arc::new(AtomicU64::new(0));
        let called = calls.clone();
        let builder =
            quick("ws://nowhere.invalid/").connect_timeout(ms(300)).resolver(move |_, _| {
                called.fetch_add(1, SeqCst);
                let _ = wait.recv_timeout(LONG);
                Err(io::ErrorKind::NotFound.into())
            });
        let (client, mut watch) = launch(builder);
        for _ in 0..2 {
            let failed = watch.failed_attempt();
            assert!(timed_out_in(&failed.kind(), Step::Dns), "{:?}", failed.error);
        }
        assert_eq!(calls.load(SeqCst), 1, "look-ups that hang do not pile up");
        let report = client.close(secs(2));
        assert_eq!(report.stuck, ["broadsock-dns-0"], "what hangs is named");
        assert_eq!(client.state(), State::Closed);
        drop(release);
    }

    #[test]
    fn a_failing_or_panicking_resolver_is_a_failed_attempt() {
        let server = serve([upgrade().send("hello").hold()]);
        let addr = server.addr();
        let calls = AtomicU64::new(0);
        let builder = quick(server.url_with("a.invalid")).resolver(move |host, port| {
            assert_eq!((host, port), ("a.invalid", addr.port()));
            match calls.fetch_add(1, SeqCst) {
                0 => panic!("planted"),
                1 => Err(io::Error::other("planted too")),
                2 => Ok(Vec::new()),
                _ => Ok(vec![addr]),
            }
        });
        let (client, mut watch) = launch(builder);
        for why in ["planted", "planted too", "knows no address"] {
            let failed = watch.failed_attempt();
            assert_eq!(failed.kind(), ErrorKind::Dns);
            assert!(failed.error.chain().contains(why), "{}", failed.error.chain());
        }
        assert_eq!(text(&client), "hello");
    }
}

mod addresses {
    use super::*;

    /// An address where SYNs are not answered: the backlog is full. `None`
    /// where the system answers all the same.
    #[cfg(target_os = "linux")]
    fn black_hole() -> Option<(SocketAddr, Box<dyn std::any::Any>)> {
        use socket2::{Domain, Socket, Type};
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let addr = listener.local_addr().unwrap().as_socket().unwrap();
        let mut queued = Vec::new();
        for _ in 0..16 {
            match std::net::TcpStream::connect_timeout(&addr, ms(300)) {
                Ok(stream) => queued.push(stream),
                Err(_) => return Some((addr, Box::new((listener, queued)))),
            }
        }
        None
    }

    /// A loopback port that refuses connections, kept for the test.
    fn refusing() -> Server {
        let server = serve([]);
        server.stop();
        server
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_black_holed_first_address_does_not_use_up_the_deadline() {
        let Some((dead, _kept)) = black_hole() else { return };
        let server = serve([upgrade().send("hello").hold()]);
        let addrs = vec![dead, server.addr()];
        let builder = quick("ws://two.invalid/").connect_timeout(LONG * 4);
        let (client, mut watch) = launch(builder.resolver(move |_, _| Ok(addrs.clone())));
        // Far below the deadline, or this would time out.
        watch.connected();
        assert_eq!(text(&client), "hello");
        assert_eq!(client.metrics().attempts(), 1);
        assert_eq!(server.stats().max_live, 1);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_black_hole_alone_times_out_in_tcp_and_what_refused_beside_it_is_told() {
        let Some((dead, _kept)) = black_hole() else { return };
        let refusing = refusing();
        let addrs = vec![refusing.addr(), dead];
        let builder = quick("ws://two.invalid/").connect_timeout(ms(300));
        let (_client, mut watch) = launch(builder.resolver(move |_, _| Ok(addrs.clone())));
        let failed = watch.failed_attempt();
        assert!(timed_out_in(&failed.kind(), Step::Tcp), "{:?}", failed.error);
        let story = failed.error.to_string();
        assert!(story.contains(&dead.to_string()), "{story}");
        assert!(
            story.contains(&refusing.addr().to_string()) && story.contains("refused"),
            "{story}"
        );
    }

    #[test]
    fn when_all_addresses_refuse_each_is_listed_with_its_cause() {
        let (a, b) = (refusing(), refusing());
        let addrs = vec![a.addr(), b.addr()];
        let (client, mut watch) =
            launch(quick("ws://two.invalid/").resolver(move |_, _| Ok(addrs.clone())));
        let failed = watch.failed_attempt();
        assert_eq!(failed.kind(), ErrorKind::Connect);
        let story = failed.error.to_string();
        for addr in [a.addr(), b.addr()] {
            let own = story.split(&format!("{addr} (")).nth(1).expect(&story);
            let cause = own.split(')').next().unwrap();
            assert!(cause.contains("refused"), "{story}");
        }
        assert!(story.contains("two.invalid"), "{story}");
        assert!(client.wait_connected(ms(1)).unwrap_err().chain().contains("refused"));
    }

    #[test]
    fn one_of_several_endpoints_down_at_the_start_the_others_deliver() {
        let (down, up) = (refusing(), serve([upgrade().send("hello").hold()]));
        let (client, mut watch) = launch(quick(down.url()).endpoint(up.url()));
        assert_eq!(text(&client), "hello");
        client.wait_connected(LONG).unwrap();
        watch.until("failed attempt of the other", |event| {
            failed_attempt(event).is_some() && event.connection == 0
        });
        assert_eq!(client.states()[1], State::Connected);
        down.restart().unwrap();
        watch
            .until("connection of the other", |event| is_connected(event) && event.connection == 0);
    }

    #[test]
    fn names_and_both_address_families_can_be_connected_to() {
        let server = serve([upgrade().send("hello").hold()]);
        for url in [server.url_with("localhost"), server.url_with("127.0.0.1")] {
            assert_eq!(text(&quick(url).start().unwrap()), "hello");
        }
        // A machine without IPv6 cannot bind there.
        let Ok(server) = Server::script([upgrade().send("six").hold()]).bind("[::1]:0").start()
        else {
            return;
        };
        assert_eq!(text(&quick(server.url()).start().unwrap()), "six");
        let both = [SocketAddr::from((Ipv4Addr::LOCALHOST, server.addr().port())), server.addr()];
        let named = quick(server.url_with("both.invalid")).resolver(move |_, _| Ok(both.to_vec()));
        assert_eq!(text(&named.start().unwrap()), "six");
        let hosts: Vec<_> =
            server.requests().iter().map(|r| r.header("host").unwrap().to_owned()).collect();
        let port = server.addr().port();
        assert_eq!(hosts, [format!("[::1]:{port}"), format!("both.invalid:{port}")]);
    }
}

mod answers {
    use super::*;

    fn accepted(answer: Upgrade) -> (Server, Client) {
        let server = serve([Script::new().upgrade_with(answer).send("hello").hold()]);
        let client = quick(server.url()).start().unwrap();
        (server, client)
    }

    #[test]
    fn an_answer_dribbled_byte_by_byte_is_accepted_if_it_fits_the_deadline() {
        let (server, client) = accepted(Upgrade::new().dribble(ms(1)));
        assert_eq!(text(&client), "hello");
        assert_eq!(server.stats().accepted, 1);
    }

    #[test]
    fn an_answer_that_dribbles_beyond_the_deadline_is_cut_there() {
        let server = serve([Script::new().dribble(ms(10)), upgrade().send("hello").hold()]);
        let (client, mut watch) = launch(quick(server.url()).connect_timeout(ms(300)));
        let failed = watch.failed_attempt();
        assert!(timed_out_in(&failed.kind(), Step::Upgrade), "{:?}", failed.error);
        assert_eq!(text(&client), "hello");
    }

    #[test]
    fn sixty_extra_headers_are_fine() {
        let (server, client) = accepted(Upgrade::new().filler_headers(60));
        assert_eq!(text(&client), "hello");
        assert_eq!(server.stats().accepted, 1);
    }

    #[test]
    fn a_connection_header_with_a_list_is_accepted() {
        let (server, client) = accepted(Upgrade::new().connection("keep-alive, Upgrade"));
        assert_eq!(text(&client), "hello");
        assert_eq!(server.stats().accepted, 1);
    }

    #[test]
    fn first_frames_in_the_same_segment_as_the_answer_arrive() {
        let (_server, client) = accepted(Upgrade::new().first_text("a").first_text("b"));
        assert_eq!(texts(&client, 3), ["a", "b", "hello"]);
    }

    #[test]
    fn an_answer_that_breaks_the_rules_is_a_typed_error_and_not_looped_on() {
        let bad = |answer: Upgrade| Script::new().upgrade_with(answer);
        let kinds = ends_of([
            bad(Upgrade::new().filler_headers(130)),
            bad(Upgrade::new().wrong_accept_key()),
            bad(Upgrade::new().header("Sec-WebSocket-Extensions", "permessage-deflate")),
            bad(Upgrade::new().connection("close")),
            Script::new().raw_response("SSH-2.0-OpenSSH_9\r\n").hold(),
        ]);
        assert_eq!(kinds, vec![ErrorKind::Handshake; 5]);
    }

    #[test]
    fn an_agreed_subprotocol_is_told_to_the_session_and_no_agreement_is_refused() {
        struct Tell;
        impl Session for Tell {
            fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
                let agreed = link.subprotocol().unwrap_or("none").to_owned();
                let feed = link.header("x-feed").unwrap_or("none").to_owned();
                link.emit(format!("{agreed} {feed}").as_str());
                Ok(())
            }
        }
        let answer = Upgrade::new().subprotocol("v2").header("X-Feed", "7");
        let server = serve([Script::new().upgrade_with(answer).hold()]);
        let offering = |url: String| quick(url).subprotocol("v1").subprotocol("v2");
        let client = offering(server.url()).session(|| Tell).start().unwrap();
        assert_eq!(text(&client), "v2 7");
        assert_eq!(server.requests()[0].header("Sec-WebSocket-Protocol"), Some("v1, v2"));

        let unasked = Script::new().upgrade_with(Upgrade::new().subprotocol("v3"));
        let servers = [serve([upgrade()]), serve([unasked.clone()]), serve([unasked])];
        let builders =
            [offering(servers[0].url()), offering(servers[1].url()), quick(servers[2].url())];
        for (client, watch) in builders.map(launch) {
            let cause = assert_ends_after_restarts(&client, watch);
            assert_eq!(cause.kind(), &ErrorKind::Subprotocol);
        }
    }
}

mod statuses {
    use super::*;
    use std::time::Duration;

    fn busy(status: u16, headers: &[(&'static str, &str)]) -> Failed {
        let script = Script::new().status(status, headers.iter().copied());
        let (_server, _client, mut watch) = start([script]);
        watch.failed_attempt()
    }

    #[test]
    fn a_busy_server_is_asked_again_until_it_answers() {
        for status in [408, 425, 429, 500, 502, 503] {
            let script = Script::new().status(status, []);
            let (_server, client, mut watch) =
                start([script.clone(), script, upgrade().send("hello").hold()]);
            let failed = watch.failed_attempt();
            assert_eq!(failed.kind(), ErrorKind::Http { status, retry_after: None });
            assert_eq!(text(&client), "hello");
            assert_eq!((client.metrics().attempts(), client.metrics().restarts), (3, 0));
        }
    }

    #[test]
    fn retry_after_in_seconds_is_honoured_as_a_lower_bound() {
        for status in [429, 503] {
            let failed = busy(status, &[("Retry-After", "7")]);
            assert_eq!(failed.kind(), ErrorKind::Http { status, retry_after: Some(secs(7)) });
            assert!(failed.retry_in() >= secs(7) && failed.retry_in() < secs(8), "{failed:?}");
        }
    }

    #[test]
    fn retry_after_as_a_date_is_honoured_as_a_lower_bound() {
        #[allow(clippy::disallowed_methods, reason = "the server's date is a wall clock's")]
        let date = std::time::SystemTime::now() + secs(100);
        let failed = busy(503, &[("Retry-After", &httpdate::fmt_http_date(date))]);
        let ErrorKind::Http { status: 503, retry_after: Some(asked) } = failed.kind() else {
            panic!("{failed:?}")
        };
        assert!(asked > secs(100) - LONG && asked <= secs(100), "{failed:?}");
        assert!(failed.retry_in() >= asked, "{failed:?}");
        let past = busy(503, &[("Retry-After", "Sun, 06 Nov 1994 08:49:37 GMT")]);
        assert!(past.retry_in() < secs(1), "{past:?}");
    }

    #[test]
    fn an_absurd_retry_after_is_capped() {
        for absurd in ["4000000000", "99999999999999999999999", "Fri, 31 Dec 9999 23:59:59 GMT"] {
            let failed = busy(429, &[("Retry-After", absurd)]);
            let (least, most) = (secs(300), Duration::from_secs(330));
            assert!(failed.retry_in() >= least && failed.retry_in() <= most, "{failed:?}");
        }
        let server = serve([Script::new().status(429, [("Retry-After", "4000000000")])]);
        let (_client, mut watch) = launch(quick(server.url()).retry_after_max(ms(200)));
        for _ in 0..2 {
            let failed = watch.failed_attempt();
            assert!(failed.retry_in() >= ms(200) && failed.retry_in() <= ms(220), "{failed:?}");
        }
    }

    #[test]
    fn a_refusal_ends_the_client_after_one_attempt_and_three_restarts_with_its_cause() {
        let statuses = [400, 401, 403, 404, 405, 410, 426];
        let kinds = ends_of(statuses.map(|status| Script::new().status(status, [])));
        let expected = statuses.map(|status| ErrorKind::Http { status, retry_after: None });
        assert_eq!(kinds, expected);
    }

    #[test]
    fn the_default_restart_intensity_ends_a_client_that_is_refused() {
        let server = serve([Script::new().status(401, [])]);
        let client = Client::builder(server.url()).start().unwrap();
        // Without waiting for the iterator: who waits for a connection hears too.
        let error = client.wait_connected(LONG).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Http { status: 401, retry_after: None });
        assert_eq!(client.iter().count(), 0);
        assert_eq!(client.close(LONG).error.unwrap().kind(), error.kind());
    }

    #[test]
    fn who_waits_for_a_connection_hears_at_once_that_there_will_be_none() {
        let server = serve([Script::new().status(404, [])]);
        let client = Arc::new(quick(server.url()).start().unwrap());
        let (done, waited) = bounded(1);
        let waiter = client.clone();
        std::thread::Builder::new()
            .spawn(move || done.send(waiter.wait_connected(LONG * 100)))
            .unwrap();
        let error = waited.recv_timeout(LONG).expect("it returns").unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Http { status: 404, retry_after: None });
    }
}

mod redirects {
    use super::*;

    #[test]
    fn a_redirect_is_followed_with_path_query_and_headers_on_the_same_origin() {
        let scripts = [
            Script::new().redirect("/b?x=1"),
            Script::new().redirect("c"),
            upgrade().send("hello"),
        ];
        let server = serve(scripts);
        let client = quick(server.url()).header("Authorization", "key").start().unwrap();
        assert_eq!(text(&client), "hello");
        let requests = server.requests();
        let paths: Vec<_> = requests.iter().map(|request| request.path.as_str()).collect();
        assert_eq!(paths, ["/", "/b?x=1", "/c"]);
        assert!(requests.iter().all(|request| request.header("authorization") == Some("key")));
        assert_eq!(client.metrics().attempts(), 1);
        assert!(server.wait_live(1, LONG));
    }

    #[test]
    fn exactly_as_many_redirects_as_allowed_are_followed() {
        let again = Script::new().redirect("/");
        let enough = serve([again.clone(), again.clone(), upgrade().send("hello")]);
        let client = quick(enough.url()).redirect_limit(2).start().unwrap();
        assert_eq!(text(&client), "hello");

        let server = serve([again]);
        let (client, watch) = launch(quick(server.url()).redirect_limit(2));
        let none = serve([Script::new().redirect("/")]);
        let (other, other_watch) = launch(quick(none.url()).redirect_limit(0));
        let cause = assert_ends_after_restarts(&client, watch);
        assert_eq!(cause.kind(), &ErrorKind::Redirect);
        assert_eq!(server.stats().accepted, 4 * 3);
        let cause = assert_ends_after_restarts(&other, other_watch);
        assert_eq!(cause.kind(), &ErrorKind::Redirect);
        assert_eq!(none.stats().accepted, 4);
    }

    #[test]
    fn a_redirect_that_leads_nowhere_is_not_looped_on() {
        let kinds = ends_of([
            Script::new().redirect("ftp://example.invalid/"),
            Script::new().redirect("http://"),
            Script::new().status(302, []),
        ]);
        let without_location = ErrorKind::Http { status: 302, retry_after: None };
        assert_eq!(kinds, [ErrorKind::Redirect, ErrorKind::Redirect, without_location]);
    }

    #[test]
    fn a_redirect_to_another_origin_drops_authorization_for_good() {
        let back = |to: &Server| Script::new().redirect(&to.url());
        let first = Server::script([]).start().unwrap();
        // The first server's scripts need the second's address, and the other
        // way round: so the second leads to a path on a third.
        let third = serve([upgrade().send("hello").hold()]);
        let second = serve([back(&third)]);
        drop(first);
        let first = serve([back(&second)]);
        let secret = |name: &str| Request::new(first.url()).header(name, "hush");
        let client = quick(secret("Authorization")).header("Cookie", "hush").start().unwrap();
        assert_eq!(text(&client), "hello");
        assert_eq!(first.requests()[0].header("Authorization"), Some("hush"));
        for request in [&second.requests()[0], &third.requests()[0]] {
            assert!(request.headers.iter().all(|(_, value)| value != "hush"), "{request:?}");
        }
    }

    #[test]
    fn a_redirect_through_another_origin_and_back_carries_no_authorization() {
        let first = Server::script([upgrade()]).start().unwrap();
        let home = first.url();
        let second = serve([Script::new().redirect(&home)]);
        drop(first);
        let addr = home.trim_start_matches("ws://").trim_end_matches('/').to_owned();
        let first =
            Server::script([Script::new().redirect(&second.url()), upgrade().send("hello").hold()])
                .bind(&addr)
                .start()
                .unwrap();
        let client = quick(home).header("Authorization", "hush").start().unwrap();
        assert_eq!(text(&client), "hello");
        let sent: Vec<_> =
            first.requests().iter().map(|r| r.header("authorization").is_some()).collect();
        assert_eq!(sent, [true, false]);
    }
}

#[cfg(feature = "tls")]
mod tls {
    use super::*;

    fn secure(script: Script) -> Server {
        Server::script([script]).start_tls().unwrap()
    }

    fn trusting(server: &Server, url: String) -> ClientBuilder {
        quick(url).root_certificate(server.ca_pem().unwrap())
    }

    #[test]
    fn a_trusted_root_is_enough_for_the_name_and_the_addresses_of_the_loopback() {
        let server = secure(upgrade().send("hello").hold());
        for host in ["localhost", "127.0.0.1"] {
            let client = trusting(&server, server.url_with(host)).start().unwrap();
            assert_eq!(text(&client), "hello", "{host}");
        }
        let Ok(six) = Server::script([upgrade().send("six").hold()]).bind("[::1]:0").start_tls()
        else {
            return;
        };
        assert_eq!(text(&trusting(&six, six.url()).start().unwrap()), "six");
    }

    #[test]
    fn first_frames_behind_the_answer_and_messages_in_pieces_arrive_over_tls() {
        let long = "x".repeat(300_000);
        let answer = Upgrade::new().first_text("a").first_text("b");
        let script = Script::new().upgrade_with(answer).send(&long).send_fragmented("cdefg", 5);
        let server = secure(script.send_bytewise("h", ms(1)).echo());
        let client = trusting(&server, server.url()).start().unwrap();
        assert_eq!(texts(&client, 5), ["a", "b", &long, "cdefg", "h"]);
        client.sender().send(long.as_str()).unwrap();
        assert_eq!(text(&client), long);
    }

    #[test]
    fn a_certificate_that_is_not_trusted_is_not_looped_on() {
        let server = secure(upgrade());
        let (client, watch) = launch(quick(server.url()));
        let cause = assert_ends_after_restarts(&client, watch);
        assert_eq!(cause.kind(), &ErrorKind::Certificate, "{}", cause.chain());
        assert_eq!(server.stats().accepted, 4);
        assert!(server.requests().is_empty(), "nothing was sent to it");
    }

    #[test]
    fn a_certificate_of_another_host_is_refused() {
        let elsewhere = || {
            let builder = Server::script([upgrade()]).certificate_for(["elsewhere.invalid"]);
            builder.start_tls().unwrap()
        };
        let servers = [elsewhere(), elsewhere()];
        let hosts = ["localhost", "127.0.0.1"];
        let clients: Vec<_> = servers
            .iter()
            .zip(hosts)
            .map(|(server, host)| launch(trusting(server, server.url_with(host))))
            .collect();
        for (client, watch) in clients {
            let cause = assert_ends_after_restarts(&client, watch);
            assert_eq!(cause.kind(), &ErrorKind::Certificate, "{}", cause.chain());
        }
        assert!(servers.iter().all(|server| server.requests().is_empty()));
    }

    #[test]
    fn a_tls_handshake_that_is_cut_is_tried_again() {
        let scripts = [Script::new().cut(), Script::new().fin(), upgrade().send("hello").hold()];
        let server = Server::script(scripts).start_tls().unwrap();
        let (client, mut watch) = launch(trusting(&server, server.url()));
        // An RST may arrive before the handshake begins.
        let cut = watch.failed_attempt().kind();
        assert!(matches!(cut, ErrorKind::Tls | ErrorKind::Connect), "{cut:?}");
        assert_eq!(watch.failed_attempt().kind(), ErrorKind::Tls);
        assert_eq!(text(&client), "hello");
    }

    #[test]
    fn an_own_connector_is_used() {
        let server = secure(upgrade().send("hello").hold());
        let connector =
            native_tls::TlsConnector::builder().danger_accept_invalid_certs(true).build().unwrap();
        let client = quick(server.url()).tls_connector(connector).start().unwrap();
        assert_eq!(text(&client), "hello");
    }

    #[test]
    fn a_redirect_out_of_tls_is_refused() {
        let plain = serve([upgrade()]);
        let server = secure(Script::new().redirect(&plain.url()));
        let (client, watch) = launch(trusting(&server, server.url()));
        let cause = assert_ends_after_restarts(&client, watch);
        assert_eq!(cause.kind(), &ErrorKind::Redirect);
        assert_eq!(plain.stats().accepted, 0);
    }
}

mod request_hook {
    use super::*;

    #[test]
    fn the_hook_is_asked_at_every_attempt_and_its_headers_are_fresh() {
        let server =
            serve([upgrade().cut(), Script::new().status(503, []), upgrade().send("hello").hold()]);
        let url = server.url();
        let builder = soon(Client::unconnected()).request_hook(move |attempt| {
            let token = format!("{} {}", attempt.epoch, attempt.last_error.is_some());
            Ok(Request::new(format!("{url}{}", attempt.epoch)).header("X-Token", token))
        });
        let client = builder.start().unwrap();
        assert_eq!(text(&client), "hello");
        let seen: Vec<_> = server
            .requests()
            .iter()
            .map(|r| (r.path.clone(), r.header("x-token").unwrap().to_owned()))
            .collect();
        let expected = [("/1", "1 false"), ("/2", "2 true"), ("/3", "3 true")];
        assert_eq!(seen, expected.map(|(path, token)| (path.to_owned(), token.to_owned())));
    }

    #[test]
    fn an_error_or_a_panic_of_the_hook_is_a_failed_attempt_with_back_off() {
        let server = serve([upgrade().send("hello").hold()]);
        let url = server.url();
        let builder =
            soon(Client::unconnected()).request_hook(move |attempt| match attempt.epoch {
                1 => Err("planted".into()),
                2 => panic!("planted too"),
                _ => {
                    assert_eq!(attempt.failures, 2);
                    Ok(url.as_str().into())
                }
            });
        let (client, mut watch) = launch(builder);
        for (attempt, why) in [(1, "planted"), (2, "planted too")] {
            let failed = watch.failed_attempt();
            assert_eq!((failed.kind(), failed.attempt), (ErrorKind::RequestHook, attempt));
            assert!(failed.error.chain().contains(why), "{}", failed.error.chain());
            assert!(failed.retry_in() >= ms(5));
        }
        assert_eq!(text(&client), "hello");
        assert!(watch.seen.iter().any(|event| is_panic(event, "request hook")));
        assert_eq!((client.metrics().attempts(), client.metrics().restarts), (3, 0));
    }

    #[test]
    fn a_request_that_cannot_be_sent_is_not_looped_on() {
        let wrong: [fn() -> Request; 2] = [
            || "http://example.invalid/".into(),
            || Request::new("ws://example.invalid/").header("X", "a\r\nb"),
        ];
        let kinds = [ErrorKind::Url, ErrorKind::Setting("header")];
        let clients =
            wrong.map(|make| launch(soon(Client::unconnected()).request_hook(move |_| Ok(make()))));
        for ((client, watch), kind) in clients.into_iter().zip(kinds) {
            assert_eq!(assert_ends_after_restarts(&client, watch).kind(), &kind);
        }
    }
}

mod settings {
    use super::*;
    use std::time::Duration;

    const ZERO: Duration = Duration::ZERO;

    type Change = fn(ClientBuilder) -> ClientBuilder;

    #[test]
    fn unusable_settings_fail_at_the_start_and_are_named() {
        let table: &[(&str, Change)] = &[
            ("connect_timeout", |b| b.connect_timeout(ZERO)),
            ("close_timeout", |b| b.close_timeout(ZERO)),
            ("retry_after_max", |b| b.retry_after_max(ZERO)),
            ("max_message_size", |b| b.max_message_size(0)),
            ("read_buffer_size", |b| b.read_buffer_size(0)),
            ("read_buffer_size", |b| b.read_buffer_size(usize::MAX)),
            ("queue", |b| b.queue(0)),
            ("queue", |b| b.queue(usize::MAX)),
            ("queue_bytes", |b| b.queue_bytes(0)),
            ("outbox", |b| b.outbox(0)),
            ("max_attempts", |b| b.max_attempts(0)),
            ("max_reconnect_attempts", |b| b.max_reconnect_attempts(0)),
            ("ping_interval", |b| b.ping_interval(ZERO)),
            ("pong_timeout", |b| b.pong_timeout(ZERO)),
            ("idle_timeout", |b| b.idle_timeout(ZERO)),
            ("write_timeout", |b| b.write_timeout(ZERO)),
            ("backoff", |b| b.backoff(Backoff::exponential(ZERO, secs(1)))),
            ("backoff", |b| b.backoff(Backoff::exponential(secs(2), secs(1)))),
            ("backoff", |b| b.backoff(Backoff::linear(ZERO, 1))),
            ("backoff", |b| b.backoff(Backoff::linear(secs(1), 0))),
            ("restart_intensity", |b| b.restart_intensity(Intensity { restarts: 1, within: ZERO })),
            ("dedup", |b| b.dedup(Dedup::by_content().capacity(0))),
            ("dedup", |b| b.dedup(Dedup::by_content().expire_after(ZERO))),
            ("dedup", |b| b.dedup(Dedup::by_pointer("id"))),
            ("dedup", |b| b.dedup(Dedup::by_pointer("/a~2"))),
            ("header", |b| b.header("X", "a\r\nB: c")),
            ("header", |b| b.header("X\r\n", "a")),
            ("header", |b| b.header("", "a")),
            ("header", |b| b.header("sec-websocket-key", "a")),
            ("header", |b| b.header("Upgrade", "h2c")),
            ("header", |b| b.endpoint(Request::new("ws://h/").header("Connection", "close"))),
            ("subprotocol", |b| b.subprotocol("a b")),
            ("subprotocol", |b| b.subprotocol("")),
        ];
        for (name, change) in table {
            let error = change(Client::builder("ws://127.0.0.1:9/")).start().expect_err(name);
            assert_eq!(error.kind(), &ErrorKind::Setting(name), "{error}");
            assert!(error.to_string().contains(&format!("`{name}`")), "{error}");
        }
        let error = Client::unconnected().start().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Setting("endpoint"));
    }

    #[cfg(feature = "tls")]
    #[test]
    fn a_root_that_is_no_certificate_fails_at_the_start() {
        // A hook or a redirect may lead to TLS later.
        let hook = |_: &broadsock::Attempt| Ok("wss://127.0.0.1:9/".into());
        for builder in [
            Client::builder("wss://127.0.0.1:9/"),
            Client::builder("ws://127.0.0.1:9/"),
            Client::unconnected().request_hook(hook),
        ] {
            let error = builder.root_certificate("not a certificate").start().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting("root_certificate"));
        }
    }

    #[test]
    fn unusable_urls_fail_at_the_start() {
        for url in [
            "",
            "example.invalid",
            "http://example.invalid/",
            "ftp://example.invalid/",
            "ws://",
            "ws://example.invalid:99999/",
            "ws://user:hush@example.invalid/",
            "ws://example.invalid/#part",
            "ws://exa mple.invalid/?hush",
        ] {
            for builder in [Client::builder(url), Client::builder("ws://h/").endpoint(url)] {
                let error = builder.start().expect_err(url);
                assert_eq!(error.kind(), &ErrorKind::Url, "{url}");
                assert!(!format!("{error:?} {}", error.chain()).contains("hush"), "{error:?}");
            }
        }
    }

    #[test]
    fn the_longest_times_mean_never_and_break_nothing() {
        struct Slow;
        impl Session for Slow {
            fn heartbeat_interval(&self) -> Option<Duration> {
                Some(Duration::MAX)
            }
        }
        const MAX: Duration = Duration::MAX;
        let table: &[(&str, Change)] = &[
            ("connect_timeout", |b| b.connect_timeout(MAX)),
            ("close_timeout", |b| b.close_timeout(MAX)),
            ("retry_after_max", |b| b.retry_after_max(MAX)),
            ("stable_after", |b| b.stable_after(MAX)),
            ("ping_interval", |b| b.ping_interval(MAX)),
            ("pong_timeout", |b| b.pong_timeout(MAX)),
            ("idle_timeout", |b| b.idle_timeout(MAX)),
            ("write_timeout", |b| b.write_timeout(MAX)),
            ("expire_after", |b| b.dedup(Dedup::by_content().expire_after(MAX))),
            ("heartbeat_interval", |b| b.session(|| Slow)),
            ("max_message_size", |b| b.max_message_size(usize::MAX)),
            ("queue_bytes", |b| b.queue_bytes(usize::MAX)),
            ("outbox", |b| b.outbox(usize::MAX)),
        ];
        for (name, change) in table {
            let server = serve([upgrade().send("hello").echo()]);
            let (client, watch) = launch(change(quick(server.url())));
            assert_eq!(text(&client), "hello", "{name}");
            client.sender().send("ping").unwrap();
            assert_eq!(text(&client), "ping", "{name}");
            let report = client.close(MAX);
            assert!(report.error.is_none() && report.stuck.is_empty(), "{name}: {report:?}");
            assert_eq!(client.metrics().attempts(), 1, "{name}");
            drop(watch);
        }
    }
}

#[test]
fn queries_and_header_values_appear_in_no_event_error_or_debug_output() {
    let redirect = Script::new().redirect("/next?hush=2");
    let server = serve([
        Script::new().refuse(),
        Script::new().status(503, []),
        redirect.clone(),
        redirect.clone(),
        redirect,
    ]);
    let url = format!("{}path?hush=1", server.url());
    let request = Request::new(&url).header("X-Key", "hush");
    let builder = quick(request.clone()).header("Authorization", "hush").redirect_limit(1);
    let mut told = format!("{request:?} {builder:?} ");
    let (client, watch) = launch(builder);
    let cause = failure(&client);
    told += &format!("{client:?} {cause:?} {} ", cause.chain());
    let report = client.close(LONG);
    told += &format!("{report:?} {:?} {server:?}", client.metrics());
    let events: Vec<Event> = watch.into_all();
    assert!(events.len() > 10);
    for event in &events {
        told += &format!("{event} {event:?}\n");
    }
    assert!(server.requests().iter().all(|request| request.path.contains("hush")));
    assert!(!told.contains("hush"), "{told}");

    for bad in ["ws://user:hush@h/", "ws://h/\r\n?hush", "nonsense?hush"] {
        let builder = quick(Request::new(bad).header("X", "hush\n"));
        told = format!("{builder:?}");
        let error = builder.start().unwrap_err();
        told += &format!("{error:?} {}", error.chain());
        assert!(!told.contains("hush"), "{told}");
    }
}
