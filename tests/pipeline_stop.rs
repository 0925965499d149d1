//! The end: in order, by its deadline, from anywhere, with everything returned.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use bench::*;
use broadsock::crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use broadsock::testing::{self, TestAcknowledger};
use broadsock::{
    Acknowledger, Backoff, Batching, BoxError, Failed, Failure, Handler, Message, Next, Pipeline,
    PipelineEvent, Succeeded, sources,
};

fn fine(_: &Message) -> Result<(), String> {
    Ok(())
}

#[test]
fn stop_waits_until_all_is_processed_also_incomplete_batches() {
    let acknowledger = TestAcknowledger::new();
    let (source, feed) = testing::source();
    let hands = Hands::new(to_batch);
    let batches = hands.batches.clone();
    let pipeline = Pipeline::builder(hands)
        .source_with(source, acknowledger.clone())
        .batcher("batch", Batching::new().size(1000).timeout(LONG))
        .start()
        .unwrap();
    feed.test_batch(numbers(25));
    let report = ends_well(&pipeline);
    all_well(&report);
    assert_eq!((report.ledger.succeeded, batches.len()), (25, 1));
    assert_eq!(acknowledger.succeeded().len(), 25);
}

/// Found by the world.
#[test]
fn a_stop_with_batches_that_took_all_the_room_waited_for_their_time() {
    let (source, feed) = testing::source();
    let hands = Hands::new(to_batch);
    let pipeline = Pipeline::builder(hands)
        .source(source)
        .batcher("batch", Batching::new().size(1000).timeout(LONG))
        .max_in_flight(3)
        .start()
        .unwrap();
    feed.test_batch(numbers(25));
    eventually("no room is left", || pipeline.metrics().ledger.in_flight == 3);
    assert_eq!(ends_well(&pipeline).ledger.succeeded, 25);
}

#[test]
fn a_stop_waits_for_what_has_to_be_tried_again() {
    let tried = AtomicBool::new(false);
    let (source, feed) = testing::source();
    let pipeline = Pipeline::each(
        move |_: &Message| {
            if tried.swap(true, SeqCst) { Ok(()) } else { Err("not yet") }
        },
    )
    .source(source)
    .retries(2, Backoff::constant(ms(50)))
    .start()
    .unwrap();
    feed.test_message("a");
    eventually("the first try", || pipeline.metrics().retries == 1);
    let report = ends_well(&pipeline);
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 1);
}

#[test]
fn four_stuck_workers_cost_one_deadline_and_are_named() {
    let gate = Gate::new();
    let held = gate.clone();
    let pipeline = Pipeline::each(move |message: &Message| {
        if message.text() == Some("hang") {
            held.enter();
        }
        Ok::<(), String>(())
    })
    .source(sources::iter(["hang", "hang", "hang", "hang", "a", "b"]))
    .processors(4)
    .chunk(1)
    .start()
    .unwrap();
    let mut names = gate.entered.wait(4);
    let start = now();
    let report = pipeline.stop(ms(1000));
    let took = start.elapsed();
    assert!(took < ms(2500), "{took:?}");
    names.sort();
    stuck(&report, &names.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(report.ledger.balanced());
    assert_eq!(texts(&report.returned), ["hang", "hang", "hang", "hang", "a", "b"]);
    gate.open();
}

#[test]
fn what_a_worker_finished_before_it_got_stuck_is_settled_at_the_stop() {
    let gate = Gate::new();
    let held = gate.clone();
    let acknowledger = TestAcknowledger::new();
    let (source, feed) = testing::source();
    // By then handlers have been quick for so long that each is not timed.
    let pipeline = Pipeline::each(move |message: &Message| {
        if number(message) == 45 {
            held.enter();
        }
        Ok::<(), String>(())
    })
    .source_with(source, acknowledger.clone())
    .processors(1)
    .start()
    .unwrap();
    feed.test_batch(numbers(60));
    gate.entered.wait(1);
    let report = pipeline.stop(ms(1000));
    stuck(&report, &["broadsock-proc-0"]);
    assert!(report.ledger.balanced(), "{}", report.ledger);
    assert_eq!((report.ledger.succeeded, acknowledger.succeeded().len()), (45, 45));
    let left: Vec<_> = (45..60).map(|n| n.to_string()).collect();
    assert_eq!(texts(&report.returned), left);
    gate.open();
}

/// Calls stop where `place` says, from inside the pipeline.
fn stopped_inside(place: &'static str) {
    let own: Arc<OnceLock<Weak<Pipeline>>> = Arc::default();
    let told = Noted::default();
    let (inner, note) = (Arc::clone(&own), told.clone());
    let stop_at = move |here: &str| {
        if here == place
            && let Some(pipeline) = inner.get().and_then(Weak::upgrade)
        {
            note.push(pipeline.stop(LONG).stuck.len() + pipeline.join().stuck.len());
        }
    };
    let stop_at = Arc::new(stop_at);
    let [message, batch, failed, prepare, observer, acknowledge] =
        std::array::from_fn(|_| Arc::clone(&stop_at));
    let hands = Hands::new(move |m| {
        message("message");
        if m.text() == Some("bad") { Err("bad".into()) } else { to_batch(m) }
    })
    .batch(move |_| {
        batch("batch");
        Ok(())
    })
    .failed(move |_| failed("failed"))
    .prepare(move |_| {
        prepare("prepare");
        Ok(())
    });
    let (source, feed) = testing::source();
    let pipeline = Pipeline::builder(hands)
        .source_with(source, Calls(Box::new(move || acknowledge("acknowledge"))))
        .processors(2)
        .observer(move |event| {
            if matches!(event, PipelineEvent::Batch { .. }) {
                observer("observer");
            }
        })
        .batcher("batch", Batching::new().size(2).timeout(LONG))
        .start()
        .unwrap();
    let pipeline = Arc::new(pipeline);
    own.set(Arc::downgrade(&pipeline)).unwrap();
    feed.test_batch(["a", "bad", "b", "c"]);
    told.wait(1);
    let report = pipeline.join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (3, 1), "{place}");
}

struct Calls(Box<dyn Fn() + Send + Sync>);

impl Acknowledger for Calls {
    fn acknowledge(&self, _: &[Succeeded], _: &[Failed]) -> Result<(), BoxError> {
        (self.0)();
        Ok(())
    }
}

#[test]
fn stop_and_join_from_inside_any_user_code_do_not_deadlock() {
    for place in ["message", "batch", "failed", "prepare", "observer", "acknowledge"] {
        stopped_inside(place);
    }
}

#[test]
fn stop_from_eight_threads_and_again_gives_one_result() {
    let (source, feed) = testing::source();
    let pipeline = Arc::new(Pipeline::each(fine).source(source).start().unwrap());
    feed.test_batch(numbers(100));
    let reports: Vec<_> = std::thread::scope(|scope| {
        let stops: Vec<_> = (0..8).map(|_| scope.spawn(|| pipeline.stop(LONG))).collect();
        stops.into_iter().map(|stop| stop.join().unwrap()).collect()
    });
    let again = [pipeline.stop(ms(0)), pipeline.join()];
    for report in reports.iter().chain(&again) {
        all_well(report);
        assert_eq!(report.ledger, reports[0].ledger);
    }
    assert!(pipeline.has_ended());
}

#[test]
fn an_earlier_deadline_given_later_counts() {
    let gate = Gate::new();
    let held = gate.clone();
    let pipeline = Arc::new(
        Pipeline::each(move |_: &Message| {
            held.enter();
            Ok::<(), String>(())
        })
        .source(sources::iter(["a"]))
        .processors(1)
        .start()
        .unwrap(),
    );
    gate.entered.wait(1);
    let patient = spawn({
        let pipeline = Arc::clone(&pipeline);
        move || pipeline.stop(LONG * 10)
    });
    let report = pipeline.stop(ms(1000));
    stuck(&report, &["broadsock-proc-0"]);
    assert_eq!(report.returned.len(), 1);
    assert_eq!(patient.join().unwrap().returned.len(), 1);
    gate.open();
}

/// Many messages through every stage, while they are fed.
fn under_load(deadline: std::time::Duration) {
    let (sender, receiver) = bounded::<String>(64);
    let acknowledger = TestAcknowledger::new();
    let left = receiver.clone();
    let pipeline = Pipeline::builder(Hands::new(|message| match number(message) % 7 {
        0 => Ok(Next::done()),
        1 => Err("a seventh".into()),
        _ => to_batch(message),
    }))
    .source_with(sources::channel(receiver), acknowledger.clone())
    .processors(3)
    .chunk(5)
    .retries(2, Backoff::constant(ms(1)))
    .batcher("batch", Batching::new().size(7).timeout(ms(2)).concurrency(2))
    .start()
    .unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let feeder = spawn({
        let ended = Arc::clone(&ended);
        move || {
            (0..u64::MAX)
                .take_while(|n| {
                    !ended.load(SeqCst) && sender.send_timeout(n.to_string(), ms(50)).is_ok()
                })
                .count()
        }
    });
    eventually("some work", || acknowledger.groups().len() > 20);
    let report = pipeline.stop(deadline);
    let left_at_end = left.len();
    ended.store(true, SeqCst);
    drop(left);
    let sent = feeder.join().unwrap();
    assert!(report.ledger.balanced() && report.ledger.in_flight == 0, "{}", report.ledger);
    assert_eq!(report.returned.len() as u64, report.ledger.returned);
    if deadline == LONG {
        all_well(&report);
        assert_eq!(report.ledger.returned, 0, "a graceful end returns nothing");
    }
    assert!(report.ledger.accepted as usize <= sent && left_at_end <= 64);
    let (good, bad) = (acknowledger.succeeded(), acknowledger.failed());
    let acknowledged = good.iter().map(|s| &s.message).chain(bad.iter().map(|f| &f.message));
    let all: Vec<u64> = acknowledged.chain(&report.returned).map(number).collect();
    let different: HashSet<u64> = all.iter().copied().collect();
    if deadline == LONG {
        assert_eq!(all.len(), different.len(), "a message twice");
    }
    // Nothing is missing: they were accepted in order.
    assert_eq!(different, (0..report.ledger.accepted).collect());
}

#[test]
fn a_graceful_stop_under_load_processes_every_accepted_message() {
    (0..5).for_each(|_| under_load(LONG));
}

#[test]
fn a_stop_without_time_returns_every_accepted_message_that_is_not_settled() {
    (0..20).for_each(|n| under_load(ms(n % 4)));
}

#[test]
fn a_stop_while_a_batcher_waits_for_a_stuck_worker_keeps_its_deadline() {
    let gate = Gate::new();
    let held = gate.clone();
    let hands = Hands::new(to_batch).batch(move |_| {
        held.enter();
        Ok(())
    });
    let pipeline = Pipeline::builder(hands)
        .source(sources::iter(numbers(100)))
        .processors(2)
        .queue(4)
        .batcher("batch", Batching::new().size(2).timeout(LONG))
        .start()
        .unwrap();
    gate.entered.wait(1);
    // Metrics can be read meanwhile.
    eventually("a full batcher", || pipeline.metrics().stages[1].queued >= 6);
    let report = pipeline.stop(ms(1000));
    stuck(&report, &["broadsock-batch-batch-0"]);
    assert!(report.ledger.balanced());
    let mut returned: Vec<u64> = report.returned.iter().map(number).collect();
    returned.sort_unstable();
    assert_eq!(returned, (0..100).collect::<Vec<_>>());
    gate.open();
}

/// Found by the world.
#[test]
fn an_item_that_a_stuck_worker_brings_after_the_end_does_not_panic_out_of_the_pipeline() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("planned panic of an item");
        }
    }
    thread_local! {
        /// Goes when the worker's thread does.
        static ENDS: RefCell<Option<Sender<()>>> = const { RefCell::new(None) };
    }
    struct Slow(Gate, Mutex<Option<Sender<()>>>);
    impl Handler for Slow {
        type Item = Bomb;

        fn handle_message(&self, _: &Message) -> Result<Next<Bomb>, Failure> {
            ENDS.set(self.1.lock().unwrap().take());
            self.0.enter();
            Ok(Next::to("batch", Bomb))
        }
    }
    let (alive, ended) = bounded(0);
    let gate = Gate::new();
    let pipeline = Pipeline::builder(Slow(gate.clone(), Mutex::new(Some(alive))))
        .source(sources::iter(numbers(1)))
        .processors(1)
        .batcher("batch", Batching::new().size(2).timeout(LONG))
        .start()
        .unwrap();
    gate.entered.wait(1);
    stuck(&pipeline.stop(ms(100)), &["broadsock-proc-0"]);
    gate.open();
    assert_eq!(ended.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected));
    drop(pipeline);
}

#[test]
fn a_stop_while_an_acknowledger_hangs_returns_what_it_holds() {
    let gate = Gate::new();
    let held = gate.clone();
    let pipeline = Pipeline::each(fine)
        .source_with(sources::iter(numbers(30)), Calls(Box::new(move || held.enter())))
        .processors(3)
        .chunk(2)
        .start()
        .unwrap();
    gate.entered.wait(3);
    let report = pipeline.stop(ms(1000));
    assert_eq!(texts(&report.returned), numbers(30));
    let workers = ["broadsock-proc-0", "broadsock-proc-1", "broadsock-proc-2"];
    stuck(&report, &workers);
    gate.open();
}

#[test]
fn what_a_stuck_worker_has_finished_is_acknowledged_all_the_same() {
    let gate = Gate::new();
    let held = gate.clone();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(move |message: &Message| {
        if message.text() == Some("2") {
            held.enter();
        }
        Ok::<(), String>(())
    })
    .source_with(sources::iter(numbers(5)), acknowledger.clone())
    .processors(1)
    .start()
    .unwrap();
    gate.entered.wait(1);
    let report = pipeline.stop(ms(1000));
    assert_eq!(texts(&report.returned), ["2", "3", "4"]);
    assert_eq!((report.ledger.succeeded, acknowledger.succeeded().len()), (2, 2));
    gate.open();
}

#[test]
fn a_worker_that_returns_after_the_end_settles_nothing() {
    let gate = Gate::new();
    let held = gate.clone();
    let left = Arc::new(());
    let weak = Arc::downgrade(&left);
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(move |_: &Message| {
        let _ = &left;
        held.enter();
        Ok::<(), String>(())
    })
    .source_with(sources::iter(["a"]), acknowledger.clone())
    .start()
    .unwrap();
    gate.entered.wait(1);
    let report = pipeline.stop(ms(100));
    assert_eq!(report.returned.len(), 1);
    gate.open();
    let ledger = pipeline.metrics().ledger;
    drop(pipeline);
    eventually("the end of the thread", || weak.upgrade().is_none());
    assert_eq!((ledger.succeeded, acknowledger.outcomes().len()), (0, 0));
}

#[test]
fn a_pipeline_dropped_without_stop_ends_and_its_threads_are_gone() {
    let alive = Arc::new(());
    let weak = Arc::downgrade(&alive);
    let (source, feed) = testing::source();
    let pipeline = Pipeline::each(move |_: &Message| {
        let _ = &alive;
        Ok::<(), String>(())
    })
    .source(source)
    .batcher("batch", Batching::new())
    .start()
    .unwrap();
    feed.test_message("a");
    drop(pipeline);
    // Every thread holds the handler.
    assert!(weak.upgrade().is_none(), "a thread is left");
    assert!(!feed.test_message("b"));
}

#[test]
fn a_handler_may_drop_the_last_handle_of_its_own_pipeline() {
    let alive = Arc::new(());
    let weak = Arc::downgrade(&alive);
    let last: Arc<Mutex<Option<Arc<Pipeline>>>> = Arc::default();
    let inner = Arc::clone(&last);
    let (source, feed) = testing::source();
    let dropped = Noted::default();
    let note = dropped.clone();
    let pipeline = Pipeline::each(move |_: &Message| {
        let _ = &alive;
        if let Some(pipeline) = lock(&inner).take() {
            assert_eq!(Arc::strong_count(&pipeline), 1);
            drop(pipeline);
            note.push(());
        }
        Ok::<(), String>(())
    })
    .source(source)
    .start()
    .unwrap();
    *lock(&last) = Some(Arc::new(pipeline));
    feed.test_message("a");
    dropped.wait(1);
    eventually("the end of all threads", || weak.upgrade().is_none());
}
