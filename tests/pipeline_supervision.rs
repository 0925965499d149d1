//! Workers that die: what is lost with them, and what is not.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread::ThreadId;

use bench::*;
use broadsock::testing::{self, TestAcknowledger, kill_worker};
use broadsock::{
    Acknowledger, Backoff, Batching, BoxError, ErrorKind, Failed, Failure, FailureKind, Intensity,
    Message, Next, Pipeline, PipelineEvent, Pull, Source, Stop, Succeeded, sources,
};

/// Restarts are counted over a minute, so that a busy machine does not change
/// how many are allowed.
fn allowed(restarts: u32) -> Intensity {
    Intensity { restarts, within: LONG * 2 }
}

/// Kills the worker at this text.
fn deadly(text: &'static str) -> impl Fn(&Message) -> Result<(), String> {
    move |message| if message.text() == Some(text) { kill_worker() } else { Ok(()) }
}

fn kinds(acknowledger: &TestAcknowledger) -> Vec<(String, FailureKind)> {
    acknowledger.failed().iter().map(|f| (f.message.to_string(), f.failure.kind())).collect()
}

#[test]
fn only_the_message_of_the_crashing_processor_is_lost_to_it_and_is_reported() {
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(deadly("20"))
        .source_with(sources::iter(numbers(200)), acknowledger.clone())
        .processors(1)
        .start()
        .unwrap();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (199, 1));
    assert_eq!(kinds(&acknowledger), [("20".to_owned(), FailureKind::WorkerDied)]);
    let order: Vec<_> = acknowledger.succeeded().iter().map(|s| number(&s.message)).collect();
    assert!(order.is_sorted(), "the replacement goes on where the dead one was");
    assert_eq!((pipeline.metrics().restarts, report.error.is_none()), (1, true));
}

/// Kills the worker that tells it first.
struct DeadlyOnce(AtomicUsize);

impl Acknowledger for DeadlyOnce {
    fn acknowledge(&self, _: &[Succeeded], _: &[Failed]) -> Result<(), BoxError> {
        if self.0.fetch_add(1, SeqCst) == 0 {
            kill_worker();
        }
        Ok(())
    }
}

/// Found by the world.
#[test]
fn a_held_message_was_tried_again_before_its_time_when_its_worker_died() {
    let (sender, tries) = broadsock::crossbeam_channel::bounded(10);
    let (source, feed) = testing::source();
    let pipeline = Pipeline::each(move |message: &Message| {
        if message.text() == Some("b") {
            let _ = sender.try_send(now());
        }
        match message.text() {
            Some("b") if sender.len() == 1 => Err("not yet"),
            _ => Ok(()),
        }
    })
    .source_with(source, DeadlyOnce(AtomicUsize::new(0)))
    .processors(1)
    .partition_by(|_| 0)
    .retries(2, Backoff::constant(ms(800)))
    .hold_order()
    .start()
    .unwrap();
    // The worker dies of the first, whose outcome it tells while it holds the other.
    feed.test_batch(["a", "b"]);
    eventually("the other try", || tries.len() == 2);
    assert_eq!(pipeline.metrics().restarts, 1);
    let (first, second) = (tries.recv().unwrap(), tries.recv().unwrap());
    assert!(second - first >= ms(800), "{:?}", second - first);
    all_well(&pipeline.stop(LONG));
}

/// Found by the world.
#[test]
fn the_heir_of_a_chunk_without_another_message_told_that_it_began_none() {
    let (sender, lens) = broadsock::crossbeam_channel::bounded(10);
    let report = Pipeline::each(deadly("a"))
        .source(sources::iter(["a"]))
        .observer(move |event| {
            if let PipelineEvent::ChunkStarted { len, .. } = event {
                let _ = sender.try_send(*len);
            }
        })
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!(lens.try_iter().collect::<Vec<_>>(), [1]);
}

#[test]
fn a_killed_batch_worker_loses_its_batch_and_none_of_its_queue() {
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(|message| {
        Ok(Next::to("batch", message.to_string()).key("one worker has them all"))
    })
    .batch(|batch| if batch.items().any(|item| item == "31") { kill_worker() } else { Ok(()) });
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(300)), acknowledger.clone())
        .processors(1)
        .batcher("batch", Batching::new().size(10).concurrency(3))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (290, 10));
    let lost: Vec<_> = (30..40).map(|n| (n.to_string(), FailureKind::WorkerDied)).collect();
    assert_eq!(kinds(&acknowledger), lost);
    assert!(acknowledger.succeeded().iter().map(|s| number(&s.message)).is_sorted());
}

/// An error that kills whoever prints it, if it is of the number 3.
#[derive(Debug)]
struct Fatal(u64);

impl std::error::Error for Fatal {}

impl std::fmt::Display for Fatal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == 3 { kill_worker() } else { self.0.fmt(f) }
    }
}

#[test]
fn what_fails_with_its_batch_worker_is_not_handled_again() {
    let handled = Noted::default();
    let acknowledger = TestAcknowledger::new();
    let noted = handled.clone();
    let hands = Hands::new(move |message| {
        noted.push(number(message));
        to_batch(message)
    })
    .batch(|batch| {
        for index in 0..batch.len() {
            batch.fail(index, Failure::new(Fatal(batch.item(index).parse()?)));
        }
        Ok(())
    });
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(5)), acknowledger.clone())
        .processors(1)
        .retries(2, Backoff::constant(ms(1)))
        .batcher("batch", Batching::new().size(5))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!((report.ledger.failed, handled.len()), (5, 5));
    assert!(kinds(&acknowledger).iter().all(|(_, kind)| *kind == FailureKind::WorkerDied));
}

#[test]
fn a_killed_worker_keeps_the_order_of_its_partition() {
    let seen = Noted::default();
    let note = seen.clone();
    let report = Pipeline::each(move |message: &Message| {
        if number(message) == 41 {
            kill_worker();
        }
        note.push(number(message));
        Ok::<(), String>(())
    })
    .source(sources::iter(numbers(400)))
    .processors(4)
    .partition_by(|message| number(message) % 4)
    .start()
    .unwrap()
    .join();
    all_well(&report);
    assert_eq!(report.ledger.failed, 1);
    for partition in 0..4 {
        let own: Vec<_> = seen.all().into_iter().filter(|n| n % 4 == partition).collect();
        assert!(own.is_sorted() && own.len() >= 99);
    }
}

#[test]
fn the_message_of_a_dead_worker_is_not_tried_again() {
    let acknowledger = TestAcknowledger::new();
    let report = Pipeline::each(deadly("1"))
        .source_with(sources::iter(numbers(3)), acknowledger.clone())
        .retries(5, Backoff::constant(ms(1)))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!(acknowledger.failed()[0].attempts, 1);
}

/// Kills the worker that tells it of this text.
struct Deadly(TestAcknowledger, &'static str);

impl Acknowledger for Deadly {
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        self.0.acknowledge(succeeded, failed)?;
        if succeeded.iter().any(|s| s.message.text() == Some(self.1)) {
            kill_worker();
        }
        Ok(())
    }
}

#[test]
fn a_worker_killed_by_an_acknowledger_loses_nothing_and_tells_nothing_twice() {
    let (first, second) = (TestAcknowledger::new(), TestAcknowledger::new());
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .source_with(sources::iter(numbers(200)), Deadly(first.clone(), "70"))
        .source_with(sources::iter(numbers(200)), second.clone())
        .processors(1)
        .start()
        .unwrap();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 400);
    assert_eq!((first.outcomes().len(), second.outcomes().len()), (200, 200));
    assert_eq!(pipeline.metrics().restarts, 1);
}

#[test]
fn a_worker_killed_while_it_acknowledges_early_tells_nothing_twice() {
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(|message| Ok(Next::to("batch", message.to_string()).acknowledge_now()));
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(20)), Deadly(acknowledger.clone(), "7"))
        .processors(1)
        .batcher("batch", Batching::new().size(5).timeout(ms(10)))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, acknowledger.outcomes().len()), (20, 20));
}

#[test]
fn a_worker_killed_in_any_other_hook_loses_nothing() {
    let once = AtomicUsize::new(0);
    let prepared = AtomicUsize::new(0);
    let weighed = AtomicUsize::new(0);
    let hands = Hands::new(|message| match number(message) {
        5 => Err(broadsock::Failure::permanent("for the hook")),
        _ => to_batch(message),
    })
    .failed(move |_| {
        if once.fetch_add(1, SeqCst) == 0 {
            kill_worker()
        }
    })
    .prepare(move |_| if prepared.fetch_add(1, SeqCst) == 0 { kill_worker() } else { Ok(()) });
    let acknowledger = TestAcknowledger::new();
    let weigh =
        move |_: &String| if weighed.fetch_add(1, SeqCst) == 30 { kill_worker() } else { 1 };
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(100)), acknowledger.clone())
        .processors(1)
        .batcher("batch", Batching::new().size_by(10, weigh).timeout(ms(10)))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    // The one that was failed, and the one that was weighed.
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (98, 2));
    assert_eq!(acknowledger.outcomes().len(), 100);
}

#[test]
fn a_worker_killed_while_it_holds_its_order_loses_nothing() {
    let tries = AtomicUsize::new(0);
    let seen = Noted::default();
    let note = seen.clone();
    let acknowledger = TestAcknowledger::new();
    let report = Pipeline::each(move |message: &Message| {
        note.push(number(message));
        let fails = number(message) == 3 && tries.fetch_add(1, SeqCst) == 0;
        if fails { Err("not yet") } else { Ok(()) }
    })
    .source_with(sources::iter(numbers(10)), Deadly(acknowledger.clone(), "2"))
    .processors(1)
    .partition_by(|_| 0)
    .retries(3, Backoff::constant(ms(10)))
    .hold_order()
    .start()
    .unwrap()
    .join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 10);
    assert_eq!(seen.all(), [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn restarts_are_counted_for_each_pool() {
    let hands = Hands::new(|message| match number(message) {
        1 | 2 => kill_worker(),
        _ => to_batch(message),
    })
    .batch(|batch| {
        if batch.items().any(|item| item == "3" || item == "4") { kill_worker() } else { Ok(()) }
    });
    let pipeline = Pipeline::builder(hands)
        .source(sources::iter(numbers(10)))
        .processors(1)
        .restart_intensity(allowed(2))
        .batcher("batch", Batching::new().size(1))
        .start()
        .unwrap();
    let report = pipeline.join();
    all_well(&report);
    assert!(report.error.is_none(), "{:?}", report.error);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (6, 4));
    assert_eq!(pipeline.metrics().restarts, 4);
}

#[test]
fn one_death_too_many_stops_the_pipeline_with_one_cause_and_returns_the_rest() {
    let acknowledger = TestAcknowledger::new();
    let pipeline =
        Pipeline::each(
            |message: &Message| {
                if number(message) < 10 { Ok::<(), String>(()) } else { kill_worker() }
            },
        )
        .source_with(sources::iter(numbers(50)), acknowledger.clone())
        .processors(1)
        .restart_intensity(allowed(1))
        .start()
        .unwrap();
    let events = pipeline.events();
    let report = pipeline.join();
    all_well(&report);
    let error = report.error.expect("a cause");
    assert_eq!(error.kind(), &ErrorKind::Panicked);
    let text = error.chain();
    assert!(text.contains("broadsock-proc-0") && text.contains("1 times"), "{text}");
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (10, 2));
    let returned: Vec<_> = (12..50).map(|n| n.to_string()).collect();
    assert_eq!(texts(&report.returned), returned);
    assert_eq!(acknowledger.outcomes().len(), 12, "the last one is reported too");
    let events: Vec<_> = events.iter().collect();
    let escalated = |event: &&PipelineEvent| matches!(event, PipelineEvent::Escalated { .. });
    assert_eq!(events.iter().filter(escalated).count(), 1);
    assert!(matches!(events.last(), Some(PipelineEvent::Ended { returned: 38, .. })));
}

/// Notes the threads that ask it.
struct Asked(Noted<ThreadId>, u32);

impl Source for Asked {
    fn pull(&mut self, _: usize, stop: &Stop) -> Pull {
        self.0.push(std::thread::current().id());
        if self.1 == 0 {
            let _ = stop.signal().recv();
            return Pull::Ended;
        }
        self.1 -= 1;
        Pull::Messages(vec![testing::TestMessage::text(self.1.to_string()).build()])
    }
}

#[test]
fn nothing_upstream_of_a_dead_worker_restarts() {
    let asked = Noted::default();
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(to_batch)
        .batch(|batch| if batch.items().any(|item| item == "25") { kill_worker() } else { Ok(()) });
    let processors = Noted::default();
    let note = processors.clone();
    let hands = hands.prepare(move |_| {
        note.push(std::thread::current().id());
        Ok(())
    });
    let pipeline = Pipeline::builder(hands)
        .source_with(Asked(asked.clone(), 50), acknowledger.clone())
        .processors(1)
        .max_in_flight(5)
        .batcher("batch", Batching::new().size(1))
        .start()
        .unwrap();
    let events = pipeline.events();
    assert!(acknowledger.wait(50, LONG));
    ends_well(&pipeline);
    for threads in [asked.all(), processors.all()] {
        assert!(threads.len() > 5 && threads.iter().all(|thread| *thread == threads[0]));
    }
    let restarted: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            PipelineEvent::Restarting { thread, .. } => Some(thread),
            _ => None,
        })
        .collect();
    assert_eq!(restarted, ["broadsock-batch-batch-0"]);
}

#[test]
fn the_other_workers_go_on_while_a_dead_one_is_replaced() {
    let acknowledger = TestAcknowledger::new();
    let (source, feed) = testing::source();
    let pipeline = Pipeline::each(deadly("dies"))
        .source_with(source, acknowledger.clone())
        .processors(2)
        .chunk(1)
        .start()
        .unwrap();
    let events = pipeline.events();
    feed.test_message("dies");
    find(&events, |event| matches!(event, PipelineEvent::Restarting { .. }).then_some(()));
    feed.test_batch(numbers(50));
    assert!(acknowledger.wait_succeeded(50, LONG));
    assert!(acknowledger.wait_failed(1, LONG));
    ends_well(&pipeline);
}

/// Kills the thread that asks it a second time.
struct Dies(bool);

impl Source for Dies {
    fn pull(&mut self, _: usize, _: &Stop) -> Pull {
        if self.0 {
            kill_worker();
        }
        self.0 = true;
        Pull::Messages(vec![testing::TestMessage::text("a").build()])
    }
}

#[test]
fn a_source_whose_thread_dies_ends_the_pipeline_with_that_cause() {
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .source(Dies(false))
        .source(testing::source().0)
        .start()
        .unwrap();
    let report = pipeline.join();
    all_well(&report);
    let error = report.error.expect("a cause").chain();
    assert!(error.contains("broadsock-source-0"), "{error}");
    assert_eq!(report.ledger.succeeded + report.ledger.returned, 1);
}

#[test]
fn a_hanging_failure_hook_after_a_death_does_not_outlive_a_deadline() {
    let gate = Gate::new();
    let held = gate.clone();
    let hands = Hands::new(|message| match message.text() {
        Some("1") => kill_worker(),
        _ => Ok(Next::done()),
    })
    .failed(move |_| held.enter());
    let pipeline = Arc::new(
        Pipeline::builder(hands)
            .source(sources::iter(numbers(3)))
            .processors(1)
            .chunk(1)
            .start()
            .unwrap(),
    );
    gate.entered.wait(1);
    let report = pipeline.stop(ms(1000));
    assert!(report.ledger.balanced() && report.ledger.in_flight == 0, "{}", report.ledger);
    assert_eq!(texts(&report.returned), ["1", "2"]);
    stuck(&report, &["broadsock-proc-0"]);
    gate.open();
}
