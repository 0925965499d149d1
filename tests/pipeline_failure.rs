//! What fails, and what user code that breaks can harm.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use bench::*;
use broadsock::testing::{self, TestAcknowledger};
use broadsock::{
    Acknowledger, Backoff, Batching, BoxError, Failed, Failure, FailureKind, Message, Next,
    Pipeline, PipelineEvent, Succeeded, sources,
};

#[test]
fn the_failure_hook_runs_before_the_acknowledgement_and_its_panic_harms_nothing() {
    let acknowledger = TestAcknowledger::new();
    let (hook, told) = (Noted::default(), acknowledger.clone());
    let seen = hook.clone();
    let hands = Hands::new(|_| Err(Failure::permanent("never"))).failed(move |failed| {
        assert!(told.failed().is_empty(), "acknowledged before");
        failed.iter().for_each(|f| {
            seen.push(f.message.to_string());
        });
        panic!("asked to panic");
    });
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(["a", "b"]), acknowledger.clone())
        .processors(1)
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!(hook.all(), ["a", "b"]);
    assert_eq!(acknowledger.failed().len(), 2);
}

#[test]
fn a_message_acknowledged_now_is_not_failed_by_its_batch() {
    let gate = Gate::new();
    let held = gate.clone();
    let acknowledger = TestAcknowledger::new();
    let failed = Noted::default();
    let hook = failed.clone();
    let hands = Hands::new(|message| Ok(Next::to("batch", message.to_string()).acknowledge_now()))
        .batch(move |_| {
            held.enter();
            Err("the batch fails".into())
        })
        .failed(move |failed| {
            hook.push(failed.len());
        });
    let pipeline = Pipeline::builder(hands)
        .source_with(sources::iter(["a"]), acknowledger.clone())
        .retries(3, Backoff::constant(ms(1)))
        .batcher("batch", Batching::new().size(1))
        .start()
        .unwrap();
    gate.entered.wait(1);
    assert!(acknowledger.wait_succeeded(1, LONG), "before the batch has ended");
    gate.open();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (1, 0));
    assert_eq!((acknowledger.outcomes().len(), failed.len(), gate.entered.len()), (1, 0, 1));
}

#[test]
fn tags_tell_the_acknowledger_what_success_and_failure_mean() {
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(|message| match message.text() {
        Some("done") => Ok(Next::done().tag("drop")),
        Some("bad") => Err(Failure::permanent("no").tag("reject")),
        Some("late") => Ok(Next::to("batch", "late".to_owned()).tag("kept")),
        _ => Ok(Next::to("batch", message.to_string()).tag("kept")),
    })
    .batch(|batch| {
        for index in 0..batch.len() {
            match batch.item(index).as_str() {
                "late" => batch.fail(index, Failure::permanent("no").tag("requeue")),
                "bare" => batch.fail(index, Failure::permanent("no")),
                _ => {}
            }
        }
        Ok(())
    });
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(["done", "bad", "late", "bare", "a"]), acknowledger.clone())
        .processors(1)
        .batcher("batch", Batching::new().size(3))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let good = acknowledger.succeeded().into_iter().map(|s| (s.message.to_string(), s.tag));
    let bad = acknowledger.failed().into_iter().map(|f| (f.message.to_string(), f.tag));
    let tags: HashMap<_, _> = good.chain(bad).collect();
    for (text, tag) in
        [("done", "drop"), ("bad", "reject"), ("late", "requeue"), ("bare", "kept"), ("a", "kept")]
    {
        assert_eq!(tags[text].as_deref(), Some(tag), "{text}");
    }
}

/// An error whose text is a bug.
#[derive(Debug)]
struct Mute;

impl fmt::Display for Mute {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("asked to panic")
    }
}

impl std::error::Error for Mute {}

/// What panics as it is dropped, once.
struct Bomb(Arc<Mutex<u32>>);

impl Drop for Bomb {
    fn drop(&mut self) {
        *lock(&self.0) += 1;
        panic!("asked to panic");
    }
}

#[test]
fn an_error_that_panics_as_it_is_printed_costs_its_own_message_only() {
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(|message| match message.text() {
        Some("1") => Err(Mute.into()),
        _ => to_batch(message),
    })
    .batch(|batch| {
        let two = batch.items().position(|item| item == "2");
        if let Some(index) = two {
            batch.fail(index, Mute.into());
        }
        Ok(())
    })
    .prepare(|_| Err(Mute.into()));
    let pipeline = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(5)), acknowledger.clone())
        .processors(1)
        .batcher("batch", Batching::new().size(4))
        .start()
        .unwrap();
    assert!(acknowledger.wait(5, LONG));
    assert_eq!(pipeline.metrics().restarts, 0);
    let report = pipeline.join();
    all_well(&report);
    let mut failed: Vec<_> = acknowledger.failed().iter().map(|f| f.message.to_string()).collect();
    failed.sort();
    assert_eq!(failed, ["1", "2"]);
}

#[test]
fn a_panic_with_a_payload_that_panics_again_is_contained() {
    let dropped: Arc<Mutex<u32>> = Arc::default();
    let bomb = Arc::clone(&dropped);
    let pipeline = Pipeline::each(move |message: &Message| {
        if message.text() == Some("1") {
            std::panic::panic_any(Bomb(bomb.clone()));
        }
        Ok::<(), String>(())
    })
    .source(sources::iter(numbers(3)))
    .processors(1)
    .start()
    .unwrap();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (2, 1));
    assert_eq!((pipeline.metrics().restarts, *lock(&dropped)), (0, 1));
}

/// Items whose drop panics.
struct Bombs(Arc<Mutex<u32>>);

impl broadsock::Handler for Bombs {
    type Item = Bomb;

    fn handle_message(&self, message: &Message) -> Result<Next<Bomb>, Failure> {
        let batcher = if message.text() == Some("0") { "nowhere" } else { "batch" };
        Ok(Next::to(batcher, Bomb(self.0.clone())))
    }
}

#[test]
fn items_that_panic_as_they_are_dropped_harm_nobody() {
    let dropped = Arc::default();
    let pipeline = Pipeline::builder(Bombs(Arc::clone(&dropped)))
        .source(sources::iter(numbers(7)))
        .batcher("batch", Batching::new().size(3))
        .start()
        .unwrap();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (6, 1));
    assert_eq!((pipeline.metrics().restarts, *lock(&dropped)), (0, 7));
}

/// Panics whatever it is told.
struct Breaks;

impl Acknowledger for Breaks {
    fn acknowledge(&self, _: &[Succeeded], _: &[Failed]) -> Result<(), BoxError> {
        panic!("asked to panic")
    }
}

#[test]
fn panics_in_every_other_function_of_the_user_are_contained_and_told() {
    let hands = Hands::new(to_batch).prepare(|_| panic!("asked to panic"));
    let pipeline = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(20)), Breaks)
        .processors(2)
        .partition_by(|_| panic!("asked to panic"))
        .observer(|_| panic!("asked to panic"))
        .retries(2, Backoff::custom(|_| panic!("asked to panic")))
        .batcher("batch", Batching::new().size_by(5, |_: &String| panic!("asked to panic")))
        .start()
        .unwrap();
    let events = pipeline.events();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 20);
    let mut hooks: Vec<_> = events
        .try_iter()
        .filter_map(|event| match event {
            PipelineEvent::Panic { hook, .. } => Some(hook),
            _ => None,
        })
        .collect();
    hooks.sort_unstable();
    hooks.dedup();
    assert_eq!(hooks, ["Handler::prepare", "batch size", "partition_by"]);
    assert_eq!(pipeline.metrics().acknowledge_failures, 20);
}

#[test]
fn a_failed_preparation_fails_no_message() {
    let hands = Hands::new(|_| Ok(Next::done())).prepare(|_| Err("not today".into()));
    let pipeline =
        Pipeline::builder(hands).source(sources::iter(numbers(5))).processors(1).start().unwrap();
    let events = pipeline.events();
    assert_eq!(pipeline.join().ledger.succeeded, 5);
    let told = events.iter().any(
        |event| matches!(event, PipelineEvent::PrepareFailed { reason } if reason == "not today"),
    );
    assert!(told && pipeline.metrics().panics == 0);
}

#[test]
fn a_handler_that_runs_too_long_is_reported_once_with_its_thread_and_message() {
    let gate = Gate::new();
    let held = gate.clone();
    let (source, feed) = testing::source();
    let pipeline = Pipeline::each(move |_: &Message| {
        held.enter();
        Ok::<(), String>(())
    })
    .source(source)
    .processors(1)
    .handler_timeout(ms(20))
    .start()
    .unwrap();
    let events = pipeline.events();
    feed.test_message(testing::TestMessage::text("slow").id(7).sequence(12));
    let (thread, message, time) = find(&events, |event| match event {
        PipelineEvent::Slow { thread, message, running_for } => {
            Some((thread.clone(), *message, *running_for))
        }
        _ => None,
    });
    assert_eq!((thread, time >= ms(20)), (gate.entered.all()[0].clone(), true));
    let message = message.unwrap();
    assert_eq!((message.id.unwrap().to_u128(), message.sequence), (7, 12));
    pass(ms(80));
    gate.open();
    ends_well(&pipeline);
    assert!(!events.try_iter().any(|event| matches!(event, PipelineEvent::Slow { .. })));
}

#[test]
fn a_handler_that_gets_stuck_after_quick_ones_is_reported_and_their_batch_leaves_in_time() {
    let gate = Gate::new();
    let held = gate.clone();
    let hands = Hands::new(move |message| {
        if number(message) == 45 {
            held.enter();
        }
        to_batch(message)
    });
    let batches = hands.batches.clone();
    let (source, feed) = testing::source();
    let pipeline = Pipeline::builder(hands)
        .source(source)
        .processors(1)
        .handler_timeout(ms(20))
        .batcher("batch", Batching::new().size(1000).timeout(ms(10)))
        .start()
        .unwrap();
    let events = pipeline.events();
    feed.test_batch(numbers(60));
    let (message, time) = find(&events, |event| match event {
        PipelineEvent::Slow { message, running_for, .. } => Some((message.unwrap(), *running_for)),
        _ => None,
    });
    assert_eq!((message.sequence, time >= ms(20)), (46, true));
    eventually("45 items in batches", || {
        batches.all().iter().map(|batch| batch.items.len()).sum::<usize>() == 45
    });
    gate.open();
    ends_well(&pipeline);
}

#[test]
fn waiting_for_a_batcher_is_not_the_handlers_time() {
    let gate = Gate::new();
    let held = gate.clone();
    let hands = Hands::new(to_batch).batch(move |_| {
        held.enter();
        Ok(())
    });
    let pipeline = Pipeline::builder(hands)
        .source(sources::iter(numbers(50)))
        .processors(1)
        .queue(1)
        .handler_timeout(ms(30))
        .batcher("batch", Batching::new().size(1))
        .start()
        .unwrap();
    let events = pipeline.events();
    gate.entered.wait(1);
    pass(ms(100));
    gate.open();
    all_well(&pipeline.join());
    for event in events.try_iter() {
        if let PipelineEvent::Slow { thread, .. } = event {
            assert!(thread.starts_with("broadsock-batch-"), "{thread}");
        }
    }
}

#[test]
fn failures_say_how_the_message_failed() {
    let hands = Hands::new(|message| match number(message) {
        0 => Err("an error".into()),
        1 => panic!("a panic"),
        2 => Ok(Next::to("nowhere", String::new())),
        _ => Ok(Next::done()),
    });
    let acknowledger = TestAcknowledger::new();
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(4)), acknowledger.clone())
        .processors(1)
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let failed = acknowledger.failed();
    let kinds: Vec<_> = failed.iter().map(|failed| failed.failure.kind()).collect();
    assert_eq!(kinds, [FailureKind::Error, FailureKind::Panic, FailureKind::UnknownBatcher]);
    assert!(failed[1].failure.to_string().contains("a panic"));
    assert!(failed[2].failure.to_string().contains("nowhere"));
}
