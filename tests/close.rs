//! A close returns by its deadline from every state, ends what waits, accounts
//! for every message and names what hangs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod scenes;

use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use broadsock::crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use broadsock::testing::{Payload, Script, Server};
use broadsock::{
    Attempt, Backoff, BoxError, Client, ClientBuilder, Data, Dedup, ErrorKind, EventKind,
    Intensity, Link, Recovery, Report, Request, SendErrorReason, Session, State, WhileDown,
};
use scenes::{LONG, Mark, Scene, Trap, wait_event, wait_state, watched};

/// The deadline of closes that may use it up, and what they must not exceed:
/// the promise is a bound, and the machine may be busy.
const DEADLINE: Duration = Duration::from_secs(1);
const BOUND: Duration = Duration::from_secs(10);

#[test]
fn close_returns_by_its_deadline_from_every_state_and_accounts_for_everything() {
    for make in scenes::all() {
        let Scene { name, client, gone, stuck, failed, .. } = &make();
        let report = close(client, DEADLINE);
        let hangs: Vec<_> = stuck.iter().map(|(thread, _)| *thread).collect();
        assert_eq!(report.stuck, hangs, "{name}");
        assert_eq!(report.error.is_some(), *failed, "{name}");
        assert!(report.metrics.ledger.balanced(), "{name}: {}", report.metrics.ledger);
        assert!(client.state().is_final(), "{name}: {}", client.state());
        assert_eq!(drain(client) as u64, report.metrics.ledger.in_flight, "{name}");
        let after = client.metrics().ledger;
        assert_eq!((after.in_flight, after.balanced()), (0, true), "{name}: {after}");
        assert!(gone.try_recv().is_err(), "{name}: the client still has its settings");
    }
}

#[test]
fn a_second_close_is_harmless_and_tells_the_same() {
    for make in scenes::all() {
        let Scene { name, client, stuck, .. } = &make();
        let first = close(client, DEADLINE);
        let second = close(client, DEADLINE);
        assert_eq!(first.metrics.ledger, second.metrics.ledger, "{name}");
        assert_eq!((&first.stuck, first.unsent), (&second.stuck, second.unsent), "{name}");
        assert_eq!(second.stuck.len(), usize::from(stuck.is_some()), "{name}");
    }
}

#[test]
fn a_drop_without_close_ends_within_its_bound_from_every_state() {
    for make in scenes::all() {
        let Scene { name, client, gone, stuck, .. } = make();
        let took = timed(move || drop(client)).0;
        assert!(took < BOUND, "{name}: {took:?}");
        drop(stuck);
        gone.recv_timeout(LONG).unwrap_or_else(|_| panic!("{name}: a thread is left"));
    }
}

#[test]
fn buffered_messages_stay_readable_after_a_close() {
    let server = serve(Script::new().upgrade().numbers(0..100).hold());
    let client = Client::builder(server.url()).start().unwrap();
    until(&client, |client| client.metrics().ledger.accepted == 100);
    let report = close(&client, LONG);
    assert_eq!(report.metrics.ledger.in_flight, 100);
    assert_eq!(client.iter().count(), 100);
    assert!(client.recv().is_err());
}

#[test]
fn a_server_that_never_answers_the_close_frame_costs_the_deadline_and_no_thread() {
    let server = serve(Script::new().upgrade().ignore_close().hold());
    let (builder, gone) = watched(Client::builder(server.url()));
    let client = builder.start().unwrap();
    client.wait_connected(LONG).unwrap();
    let report = close(&client, DEADLINE);
    assert_eq!(report.stuck, [""; 0]);
    assert_eq!(client.state(), State::Closed);
    drop(client);
    gone.recv_timeout(LONG).expect("no thread is left");
    assert_eq!(close_frames(&server), [1000]);
}

#[test]
fn a_server_that_cuts_the_close_handshake_leaves_the_client_closed_not_failed() {
    let server = serve(Script::new().upgrade().ignore_close().hold());
    let client = Client::builder(server.url()).start().unwrap();
    client.wait_connected(LONG).unwrap();
    let report = std::thread::scope(|scope| {
        let closing = scope.spawn(|| close_within(&client, LONG, LONG));
        assert!(server.wait_for(|record| record.stats.received == 1, LONG), "no close frame");
        server.cut_all();
        closing.join().unwrap()
    });
    assert_eq!(client.states(), [State::Closed]);
    assert!(report.error.is_none() && report.stuck.is_empty(), "{report:?}");
    let told = client.events().iter().map(|event| event.to_string()).collect::<Vec<_>>();
    assert!(!told.iter().any(|event| event.contains("please report")), "{told:?}");
}

#[test]
fn a_session_that_answers_messages_does_not_disturb_the_close_handshake() {
    let server = serve(Script::new().upgrade().ignore_close().hold());
    let client = Client::builder(server.url()).session(|| Answers).start().unwrap();
    client.wait_connected(LONG).unwrap();
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| close_within(&client, LONG, LONG));
        assert!(server.wait_for(|record| record.stats.received == 1, LONG), "no close frame");
        server.push("question");
        until(&client, |client| client.metrics().ledger.skipped == 1);
        // An answer would have ended the epoch with an error.
        assert_eq!(client.state(), State::Closing);
        server.cut_all();
        closing.join().unwrap()
    });
    assert_eq!(client.state(), State::Closed);
    assert_eq!(server.texts(), [""; 0]);
    assert_eq!(close_frames(&server), [1000]);
}

#[test]
fn a_server_that_stopped_reading_cannot_hold_up_a_close_with_a_full_outbox() {
    let script = Script::new().upgrade().stop_reading().hold();
    let server = Server::script([script]).receive_buffer(4096).start().unwrap();
    let (builder, gone) = watched(Client::builder(server.url()));
    let client = builder.outbox(8).start().unwrap();
    client.wait_connected(LONG).unwrap();
    let sender = client.sender();
    let big = "x".repeat(256 * 1024);
    while sender.send_timeout(big.as_str(), Duration::from_millis(300)).is_ok() {}
    let report = close(&client, DEADLINE);
    assert_eq!(report.stuck, [""; 0]);
    assert!(report.unsent.len() >= 8, "{}", report.unsent.len());
    assert_eq!(client.state(), State::Closed);
    drop((client, sender));
    gone.recv_timeout(LONG).expect("no thread is left");
}

#[test]
fn outgoing_messages_queued_before_a_close_leave_before_the_one_close_frame() {
    let server = serve(Script::new().upgrade().hold());
    let client = Client::builder(server.url()).start().unwrap();
    client.wait_connected(LONG).unwrap();
    let sent: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
    for text in &sent {
        client.sender().send(text.as_str()).unwrap();
    }
    let report = close_within(&client, LONG, LONG);
    assert!(report.unsent.is_empty(), "{}", report.unsent.len());
    let mut expected: Vec<_> = sent.into_iter().map(Payload::Text).collect();
    expected.push(Payload::Close(1000, String::new()));
    let received: Vec<_> = server.received().into_iter().map(|r| r.payload).collect();
    assert!(received == expected, "{:?}", &received[received.len().saturating_sub(3)..]);
    assert_eq!(server.violations(), [""; 0]);
}

#[test]
fn a_flood_holds_up_neither_the_close_frame_nor_the_close() {
    let server = serve(Script::new().upgrade().numbers(0..).hold());
    let client = Client::builder(server.url()).start().unwrap();
    let report = std::thread::scope(|scope| {
        let consumer = scope.spawn(|| client.iter().count());
        until(&client, |client| client.metrics().ledger.delivered > 10_000);
        let report = close_within(&client, BOUND, LONG);
        consumer.join().unwrap();
        report
    });
    assert_eq!(report.stuck, [""; 0]);
    assert_eq!(close_frames(&server), [1000]);
    let ledger = client.metrics().ledger;
    assert!(ledger.balanced() && ledger.in_flight == 0, "{ledger}");
}

#[test]
fn a_flood_behind_the_close_frame_is_shed_and_not_kept() {
    let server = serve(Script::new().upgrade().ignore_close().numbers(0..).hold());
    let client = Client::builder(server.url()).queue(64).start().unwrap();
    wait_event(&client, |kind| matches!(kind, EventKind::Blocked(true)));
    let report = close(&client, DEADLINE);
    let ledger = report.metrics.ledger;
    assert!(ledger.balanced() && report.metrics.dropped.closed > 1000, "{ledger}");
    // The queue, and at most a few blocks of eight that were held.
    assert!(ledger.in_flight <= 64 + 16 * 8, "{ledger}");
    assert_eq!(drain(&client) as u64, ledger.in_flight);
}

#[test]
fn what_a_full_queue_held_back_survives_the_loss_of_the_socket() {
    let scripts =
        [Script::new().upgrade().numbers(0..1000).hold(), Script::new().upgrade().send("last")];
    let server = Server::script(scripts).start().unwrap();
    let client = quick(&server).queue(8).ping_interval(Duration::from_millis(20)).start().unwrap();
    wait_event(&client, |kind| matches!(kind, EventKind::Blocked(true)));
    assert!(server.cut(0));
    assert!(server.wait_for(|record| record.stats.upgraded == 2, LONG), "not reconnected");
    let mut read = Vec::new();
    while read.last().is_none_or(|last| last != "last") {
        read.push(client.recv_timeout(LONG).expect("a message").to_string());
    }
    let expected = (0..read.len() - 1).map(|n| format!("{{\"id\":{n}}}")).chain(["last".into()]);
    assert!(read.iter().eq(expected.collect::<Vec<_>>().iter()), "{read:?}");
    let ledger = close_within(&client, LONG, LONG).metrics.ledger;
    assert!(ledger.balanced() && ledger.delivered == read.len() as u64, "{ledger}");
    assert_eq!(ledger.in_flight, 0, "{ledger}");
}

#[test]
fn what_a_session_emits_while_the_queue_is_full_is_delivered_or_counted() {
    let server = serve(Script::new().upgrade().numbers(0..100).hold());
    let client = quick(&server).queue(8).session(|| Beats).start().unwrap();
    wait_event(&client, |kind| matches!(kind, EventKind::Blocked(true)));
    // More than are held.
    until(&client, |client| client.metrics().dropped.newest > 3);
    let report = close_within(&client, LONG, LONG);
    let ledger = report.metrics.ledger;
    assert!(ledger.balanced(), "{ledger}");
    assert_eq!(drain(&client) as u64, ledger.in_flight, "{ledger}");
}

#[test]
fn a_close_from_inside_any_hook_returns_at_once_and_ends_the_client() {
    for hook in HOOKS {
        let (told, tells) = bounded(1);
        let (client, server) = hooked(hook, move |client| {
            call_everything(&client);
            let (took, report) = timed(|| client.close(Duration::from_secs(3600)));
            let _ = told.try_send((took, report.stuck));
        });
        let (took, stuck) =
            tells.recv_timeout(LONG).unwrap_or_else(|_| panic!("{hook} was not called"));
        assert!(took < BOUND, "{hook}: {took:?}");
        assert_eq!(stuck, [""; 0], "{hook}");
        drain(&client);
        let report = close_within(&client, LONG, LONG);
        assert!(report.stuck.is_empty() && report.error.is_none(), "{hook}: {report:?}");
        assert!(report.metrics.ledger.balanced(), "{hook}: {}", report.metrics.ledger);
        assert_eq!(client.state(), State::Closed, "{hook}");
        assert!(server.wait_live(0, LONG), "{hook}: a connection is left");
    }
}

#[test]
fn the_last_handle_may_be_dropped_inside_any_hook() {
    for hook in HOOKS {
        let slot = Arc::new(Mutex::new(None));
        let (inside, insides) = bounded(1);
        let (client, _server) = hooked(hook, {
            let slot = Arc::clone(&slot);
            move |client| {
                *slot.lock().unwrap() = Some(client);
                let _ = inside.try_send(());
                // Waits until this is the last handle.
                while slot.lock().unwrap().as_ref().is_some_and(|c| Arc::strong_count(c) > 1) {
                    std::thread::yield_now();
                }
                drop(slot.lock().unwrap().take());
            }
        });
        let events = client.events();
        insides.recv_timeout(LONG).unwrap_or_else(|_| panic!("{hook} was not called"));
        drop(client);
        end_of(&events);
    }
}

#[test]
fn a_hook_that_never_returns_is_named_and_ends_when_it_is_let_go() {
    let server = serve(Script::new().upgrade().numbers(0..10).hold());
    let (trap, lever) = Trap::new();
    let (builder, gone) = watched(Client::builder(server.url()));
    let trap = Arc::new(trap);
    let client = builder.session(move || Hangs(Arc::clone(&trap))).start().unwrap();
    lever.entered.recv_timeout(LONG).expect("the hook is called");
    let report = close(&client, DEADLINE);
    // A busy machine may keep the monitor from its verdict until the deadline.
    assert!(report.stuck.iter().any(|name| name == "broadsock-conn-0"), "{:?}", report.stuck);
    assert!(report.metrics.ledger.balanced(), "{}", report.metrics.ledger);
    drain(&client);
    assert_eq!(client.state(), State::Closed);
    end_of(&client.events());
    lever.release.send(()).unwrap();
    // The thread looks at what it missed, and must not bring anything back.
    assert!(server.wait_live(0, LONG), "the socket is still open");
    assert_eq!(client.state(), State::Closed);
    let ledger = client.metrics().ledger;
    assert!(ledger.balanced() && ledger.in_flight == 0, "{ledger}");
    drop(client);
    gone.recv_timeout(LONG).expect("the thread ends");
}

#[test]
fn an_observer_that_hangs_on_the_monitors_thread_keeps_nobody_waiting() {
    let server = serve(Script::new().status(404, []));
    let (trap, lever) = Trap::new();
    let (mark, gone) = Mark::new();
    let builder = Client::builder(server.url()).observer(move |event| {
        let _ = &mark;
        if let EventKind::Restarting { .. } = event.kind {
            trap.step_in();
        }
    });
    let client = builder.start().unwrap();
    lever.entered.recv_timeout(LONG).expect("a restart");
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| client.wait_connected(LONG).unwrap_err().kind().clone());
        let report = close(&client, DEADLINE);
        assert_eq!(report.stuck.last().unwrap(), "broadsock-monitor");
        assert_eq!(waiter.join().unwrap(), ErrorKind::Shutdown);
    });
    assert_eq!(drain(&client), 0);
    assert!(client.state().is_final(), "{}", client.state());
    end_of(&client.events());
    lever.release.send(()).unwrap();
    assert_eq!(close(&client, LONG).stuck, [""; 0]);
    drop(client);
    gone.recv_timeout(LONG).expect("every thread ends");
}

#[test]
fn eight_threads_may_close_at_once() {
    let server = serve(Script::new().upgrade().numbers(0..).hold());
    let client = Client::builder(server.url()).queue(64).start().unwrap();
    client.wait_connected(LONG).unwrap();
    let ledgers: Vec<_> = std::thread::scope(|scope| {
        let closers: Vec<_> =
            (0..8).map(|_| scope.spawn(|| close_within(&client, LONG, LONG))).collect();
        closers.into_iter().map(|closer| closer.join().unwrap().metrics.ledger).collect()
    });
    assert!(ledgers.iter().all(|ledger| *ledger == ledgers[0]), "{ledgers:?}");
    assert_eq!(close_frames(&server), [1000]);
}

#[test]
fn a_close_with_less_time_hurries_up_one_with_more() {
    let server = serve(Script::new().upgrade().ignore_close().hold());
    let builder = Client::builder(server.url()).close_timeout(LONG * 10);
    let (builder, gone) = watched(builder);
    let client = builder.start().unwrap();
    client.wait_connected(LONG).unwrap();
    std::thread::scope(|scope| {
        let patient = scope.spawn(|| close_within(&client, LONG * 10, LONG));
        assert!(server.wait_for(|record| record.stats.received == 1, LONG), "no close frame");
        assert_eq!(close(&client, DEADLINE).stuck, [""; 0]);
        assert_eq!(patient.join().unwrap().stuck, [""; 0]);
    });
    drop(client);
    gone.recv_timeout(LONG).expect("no thread is left");
}

#[test]
fn the_events_end_after_a_close_with_the_final_state() {
    for make in scenes::all() {
        let Scene { name, client, .. } = &make();
        let events = client.events();
        close(client, DEADLINE);
        let all = end_of(&events);
        let last = all.iter().rev().find_map(|kind| match kind {
            EventKind::State { to, .. } => Some(*to),
            _ => None,
        });
        assert!(last.is_some_and(State::is_final), "{name}: {last:?}");
        assert_eq!(last, Some(client.state()), "{name}");
    }
}

#[test]
fn whoever_waits_for_a_message_is_released_by_a_close() {
    for make in scenes::all() {
        let Scene { name, client, .. } = &make();
        std::thread::scope(|scope| {
            let waiters: Vec<_> =
                (0..3).map(|_| scope.spawn(|| while client.recv().is_ok() {})).collect();
            close(client, DEADLINE);
            let (done, dones) = bounded(1);
            scope.spawn(move || {
                waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
                done.send(()).unwrap();
            });
            dones.recv_timeout(LONG).unwrap_or_else(|_| panic!("{name}: one still waits"));
        });
    }
}

#[test]
fn whoever_waits_for_a_connection_is_released_by_a_close() {
    let scenes = [scenes::in_dns, scenes::in_upgrade, scenes::in_opening, scenes::backing_off];
    for make in scenes.into_iter().chain([scenes::waiting_for_restart as fn() -> Scene]) {
        let Scene { name, client, .. } = &make();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| timed(|| client.wait_connected(LONG)));
            close(client, DEADLINE);
            let (took, result) = waiter.join().unwrap();
            assert_eq!(result.unwrap_err().kind(), &ErrorKind::Shutdown, "{name}");
            assert!(took < LONG, "{name}");
        });
    }
}

#[test]
fn whoever_waits_for_a_connection_is_released_by_a_failure() {
    for policy in [WhileDown::Queue, WhileDown::Wait] {
        let (trap, lever) = Trap::new();
        let builder = Client::unconnected().while_down(policy).max_attempts(1);
        let client = builder
            .request_hook(move |_| {
                trap.step_in();
                Err("no".into())
            })
            .start()
            .unwrap();
        lever.entered.recv_timeout(LONG).expect("an attempt");
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| timed(|| client.wait_connected(LONG)));
            let send = || timed(|| client.sender().send_timeout("never", LONG));
            let sender = (policy == WhileDown::Wait).then(|| scope.spawn(send));
            let reader = scope.spawn(|| client.recv_timeout(LONG));
            lever.release.send(()).unwrap();
            let (took, result) = waiter.join().unwrap();
            assert_eq!(result.unwrap_err().kind(), &ErrorKind::Attempts);
            assert!(took < LONG, "{policy:?}");
            if let Some((took, result)) = sender.map(|sender| sender.join().unwrap()) {
                assert_eq!(result.unwrap_err().reason, SendErrorReason::Closed);
                assert!(took < LONG);
            }
            assert_eq!(reader.join().unwrap().unwrap_err(), RecvTimeoutError::Disconnected);
        });
    }
}

#[test]
fn whoever_waits_to_send_is_released_by_a_close() {
    for policy in [WhileDown::Queue, WhileDown::Wait] {
        let server = serve(Script::new().refuse());
        let hour = Backoff::constant(Duration::from_secs(3600));
        let builder = Client::builder(server.url()).backoff(hour).outbox(1).while_down(policy);
        let client = builder.start().unwrap();
        wait_state(&client, State::Reconnecting);
        if policy == WhileDown::Queue {
            client.sender().send("fills the outbox").unwrap();
        }
        let report = std::thread::scope(|scope| {
            let senders: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| client.sender().send("waits").unwrap_err()))
                .collect();
            let report = close(&client, DEADLINE);
            for sender in senders {
                let error = sender.join().unwrap();
                assert_eq!(error.reason, SendErrorReason::Closed, "{policy:?}");
                assert_eq!(error.message.as_text(), Some("waits"));
            }
            report
        });
        assert_eq!(report.unsent.len(), usize::from(policy == WhileDown::Queue));
    }
}

#[test]
fn the_longest_durations_are_no_overflow() {
    let server = serve(Script::new().upgrade().expect("hi").send("a").hold());
    let max = Duration::MAX;
    let client = Client::builder(server.url())
        .connect_timeout(max)
        .close_timeout(max)
        .stable_after(max)
        .retry_after_max(max)
        .ping_interval(max)
        .pong_timeout(max)
        .idle_timeout(max)
        .write_timeout(max)
        .dedup(Dedup::by_content().expire_after(max))
        .restart_intensity(Intensity { restarts: 0, within: max })
        .session(|| Patient)
        .start()
        .unwrap();
    client.wait_connected(max).unwrap();
    client.sender().send_timeout("hi", max).unwrap();
    assert_eq!(client.recv_timeout(max).unwrap().text(), Some("a"));
    let report = close_within(&client, max, LONG);
    assert!(report.error.is_none() && report.stuck.is_empty(), "{report:?}");
    assert_eq!(client.state(), State::Closed);
    assert_eq!(report.metrics.connects(), 1);
}

#[test]
fn a_session_that_panics_as_it_is_dropped_costs_no_thread() {
    let server = serve(Script::new().upgrade().cut());
    let client = quick(&server).session(|| PanicsLate).start().unwrap();
    until(&client, |client| client.metrics().connects() >= 3);
    let report = close_within(&client, LONG, LONG);
    assert_eq!(report.metrics.restarts, 0);
    assert!(report.error.is_none(), "{report:?}");
    wait_event(
        &client,
        |kind| matches!(kind, EventKind::Panic { hook: "Session's drop", message } if message == "late"),
    );
}

#[test]
fn a_session_cannot_send_more_than_is_bounded() {
    let server = serve(Script::new().upgrade().send("go").hold());
    let builder = quick(&server).max_message_size(1024);
    let client = builder.session(|| SendsTooLarge).start().unwrap();
    let lost = wait_event(&client, |kind| matches!(kind, EventKind::Lost { .. }));
    assert!(lost.to_string().contains("larger than max_message_size"), "{lost}");
}

// Sessions.

/// Answers every message.
struct Answers;

impl Session for Answers {
    fn on_message(&mut self, _: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.send("answer");
        Ok(())
    }
}

/// Emits a message of its own now and then.
struct Beats;

impl Session for Beats {
    fn heartbeat_interval(&self) -> Option<Duration> {
        Some(Duration::from_millis(2))
    }

    fn on_heartbeat(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.emit("beat");
        Ok(())
    }
}

struct Hangs(Arc<Trap>);

impl Session for Hangs {
    fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        self.0.step_in();
        link.emit(data);
        Ok(())
    }
}

struct Patient;

impl Session for Patient {
    fn heartbeat_interval(&self) -> Option<Duration> {
        Some(Duration::MAX)
    }
}

struct PanicsLate;

impl Session for PanicsLate {}

impl Drop for PanicsLate {
    fn drop(&mut self) {
        panic!("late");
    }
}

struct SendsTooLarge;

impl Session for SendsTooLarge {
    fn on_message(&mut self, _: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.send("x".repeat(1025));
        Ok(())
    }
}

// Hooks.

const HOOKS: [&str; 10] = [
    "observer",
    "request hook",
    "resolver",
    "session factory",
    "on_open",
    "on_message",
    "id function",
    "on_heartbeat",
    "classifier",
    "backoff",
];

/// What every hook calls: does something in the chosen one, once.
struct Hook {
    chosen: &'static str,
    client: OnceLock<Weak<Client>>,
    act: Mutex<Option<Act>>,
}

type Act = Box<dyn FnOnce(Arc<Client>) + Send>;

impl Hook {
    fn at(&self, hook: &str) {
        if hook == self.chosen
            && let Some(client) = self.client.wait().upgrade()
            && let Some(act) = self.act.lock().unwrap().take()
        {
            act(client);
        }
    }
}

/// A client all of whose hooks are called in turn, and the server it is on.
fn hooked(
    chosen: &'static str,
    act: impl FnOnce(Arc<Client>) + Send + 'static,
) -> (Arc<Client>, Server) {
    let server = serve(Script::new().upgrade().send("m").expect("beat").cut());
    let act: Act = Box::new(act);
    let (client, act) = (OnceLock::new(), Mutex::new(Some(act)));
    let hook = Arc::new(Hook { chosen, client, act });
    let at = |name: &'static str| {
        let hook = Arc::clone(&hook);
        move || hook.at(name)
    };
    let (url, addr) = (server.url_with("a.test"), server.addr());
    let (observe, request, resolve) = (at("observer"), at("request hook"), at("resolver"));
    let (find, classify, back_off) = (at("id function"), at("classifier"), at("backoff"));
    let (make, session) = (at("session factory"), Arc::clone(&hook));
    let client = Client::unconnected()
        .request_hook(move |_: &Attempt| {
            request();
            Ok(Request::new(url.clone()))
        })
        .observer(move |_| observe())
        .resolver(move |_, _| {
            resolve();
            Ok(vec![addr])
        })
        .session(move || {
            make();
            Hooked(Arc::clone(&session))
        })
        .dedup(Dedup::by(move |_| {
            find();
            None::<Vec<u8>>
        }))
        .classify(move |_, default| {
            classify();
            default
        })
        .backoff(Backoff::custom(move |_| {
            back_off();
            Duration::from_millis(1)
        }))
        .start()
        .unwrap();
    let client = Arc::new(client);
    hook.client.set(Arc::downgrade(&client)).unwrap();
    (client, server)
}

struct Hooked(Arc<Hook>);

impl Session for Hooked {
    fn on_open(&mut self, _: &mut Link<'_>) -> Result<(), BoxError> {
        self.0.at("on_open");
        Ok(())
    }

    fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        self.0.at("on_message");
        link.emit(data);
        Ok(())
    }

    fn heartbeat_interval(&self) -> Option<Duration> {
        Some(Duration::from_millis(5))
    }

    fn on_heartbeat(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        self.0.at("on_heartbeat");
        link.send("beat");
        Ok(())
    }
}

/// Everything that a hook may call without waiting for itself for long.
fn call_everything(client: &Client) {
    let short = Duration::from_millis(1);
    let _ = (client.state(), client.states(), client.error(), client.metrics());
    let _ = (client.events(), client.receiver(), client.sender_for(0), client.iter());
    let _ = (client.try_recv(), client.recv_timeout(short), client.wait_connected(short));
    let _ = (client.sender().try_send("a"), client.sender().send_timeout("b", short));
    let _ = client.sender().send("c");
}

// Helpers.

fn serve(script: Script) -> Server {
    Server::script([script]).start().unwrap()
}

fn quick(server: &Server) -> ClientBuilder {
    let soon = Backoff::constant(Duration::from_millis(10));
    Client::builder(server.url()).backoff(soon).classify(|_, _| Recovery::Recoverable)
}

#[allow(clippy::disallowed_methods, reason = "a test measures real time")]
fn timed<T>(run: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = run();
    (start.elapsed(), result)
}

/// Closes, and holds the promise that it returns by about the deadline.
fn close(client: &Client, deadline: Duration) -> Report {
    close_within(client, deadline, BOUND.max(deadline))
}

/// A close that hangs would hang the test: it is told from here.
fn close_within(client: &Client, deadline: Duration, bound: Duration) -> Report {
    let (took, report) = timed(|| client.close(deadline));
    assert!(took < bound, "a close by {deadline:?} took {took:?}");
    report
}

/// Reads until the iterator ends; how many there were.
fn drain(client: &Client) -> usize {
    let mut count = 0;
    loop {
        match client.recv_timeout(LONG) {
            Ok(_) => count += 1,
            Err(RecvTimeoutError::Disconnected) => return count,
            Err(RecvTimeoutError::Timeout) => panic!("the iterator does not end: {client:?}"),
        }
    }
}

/// Reads events until their channel ends.
fn end_of(events: &Receiver<broadsock::Event>) -> Vec<EventKind> {
    let mut all = Vec::new();
    loop {
        match events.recv_timeout(LONG) {
            Ok(event) => all.push(event.kind),
            Err(RecvTimeoutError::Disconnected) => return all,
            Err(RecvTimeoutError::Timeout) => panic!("the events do not end: {all:?}"),
        }
    }
}

/// Waits for a condition that nothing announces.
fn until(client: &Client, met: impl Fn(&Client) -> bool) {
    let (never, waits) = bounded::<()>(1);
    for _ in 0..LONG.as_millis() {
        if met(client) {
            return;
        }
        let _ = waits.recv_timeout(Duration::from_millis(1));
    }
    drop(never);
    panic!("it does not come: {:?}", client.metrics());
}

/// The codes of the close frames that the server got.
fn close_frames(server: &Server) -> Vec<u16> {
    let received = server.received().into_iter();
    let codes = received.filter_map(|received| match received.payload {
        Payload::Close(code, _) => Some(code),
        _ => None,
    });
    codes.collect()
}
