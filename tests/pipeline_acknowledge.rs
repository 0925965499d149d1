//! Who is told what became of the messages: everyone, once, in order.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::sync::Arc;

use bench::*;
use broadsock::testing::{self, TestAcknowledger};
use broadsock::{
    Acknowledgement, Acknowledger, Batching, BoxError, ChannelAcknowledger, Failed, Message,
    Pipeline, PipelineEvent, Succeeded, sources,
};

fn fine(_: &Message) -> Result<(), String> {
    Ok(())
}

/// Does with each group what the function does.
struct Does<F>(F);

impl<F> Acknowledger for Does<F>
where
    F: Fn(&[Succeeded], &[Failed]) -> Result<(), BoxError> + Send + Sync + 'static,
{
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        (self.0)(succeeded, failed)
    }
}

#[test]
fn several_messages_are_acknowledged_at_once() {
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(to_batch);
    let pipeline = Pipeline::builder(hands)
        .source_with(source, acknowledger.clone())
        .processors(1)
        .batcher("batch", Batching::new().size(4).timeout(LONG))
        .start()
        .unwrap();
    feed.test_batch(["a", "b", "c", "d"]);
    assert!(acknowledger.wait_succeeded(4, LONG));
    let groups = acknowledger.groups();
    assert_eq!(groups.len(), 1);
    let order: Vec<_> = groups[0].succeeded.iter().map(|s| s.message.to_string()).collect();
    assert_eq!(order, ["a", "b", "c", "d"]);
    ends_well(&pipeline);
}

#[test]
fn each_source_hears_of_its_own_messages_once_and_in_order() {
    let told: Vec<TestAcknowledger> = (0..3).map(|_| TestAcknowledger::new()).collect();
    let mut builder = Pipeline::builder(Hands::new(|message| {
        if number(message).is_multiple_of(5) { Err("a five".into()) } else { to_batch(message) }
    }))
    .processors(1)
    .chunk(7)
    .batcher("batch", Batching::new().size(13).timeout(ms(20)));
    for (n, acknowledger) in (0..).zip(&told) {
        let messages: Vec<_> = (0..500).map(|m| (m * 3 + n).to_string()).collect();
        builder = builder.source_with(sources::iter(messages), acknowledger.clone());
    }
    let report = builder.start().unwrap().join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (1200, 300));
    for (n, acknowledger) in (0..).zip(&told) {
        let good: Vec<_> = acknowledger.succeeded().iter().map(|s| number(&s.message)).collect();
        let bad: Vec<_> = acknowledger.failed().iter().map(|f| number(&f.message)).collect();
        assert_eq!((good.len(), bad.len()), (400, 100));
        assert!(good.is_sorted() && bad.is_sorted(), "out of order");
        assert!(good.iter().chain(&bad).all(|number| number % 3 == n), "another's message");
    }
}

#[test]
fn workers_do_not_die_of_a_bad_acknowledger_and_no_other_group_is_harmed() {
    let good = TestAcknowledger::new();
    let pipeline = Pipeline::builder(Hands::new(to_batch))
        .source_with(sources::iter(numbers(100)), Does(|_: &[_], _: &[_]| Err("refused".into())))
        .source_with(sources::iter(numbers(100)), Does(|_: &[_], _: &[_]| panic!("asked to panic")))
        .source_with(sources::iter(numbers(100)), good.clone())
        .batcher("batch", Batching::new().size(10).timeout(ms(5)))
        .start()
        .unwrap();
    let events = pipeline.events();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 300);
    assert_eq!(good.succeeded().len(), 100);
    let metrics = pipeline.metrics();
    assert_eq!(
        (metrics.acknowledged, metrics.acknowledge_failures, metrics.restarts),
        (100, 200, 0)
    );
    let reasons: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            PipelineEvent::AcknowledgeFailed { count, reason } => Some((count, reason)),
            _ => None,
        })
        .collect();
    let of = |part: &str| -> usize {
        reasons.iter().filter(|(_, reason)| reason.contains(part)).map(|(count, _)| count).sum()
    };
    assert_eq!((of("refused"), of("asked to panic")), (100, 100));
}

#[test]
fn a_slow_acknowledger_holds_up_its_own_worker_only() {
    let gate = Gate::new();
    let held = gate.clone();
    let slow = Does(move |_: &[Succeeded], _: &[Failed]| {
        held.enter();
        Ok(())
    });
    let other = TestAcknowledger::new();
    let (source, feed) = testing::source();
    let pipeline = Pipeline::each(fine)
        .source_with(sources::iter(["slow"]), slow)
        .source_with(source, other.clone())
        .processors(2)
        .chunk(1)
        .start()
        .unwrap();
    gate.entered.wait(1);
    feed.test_batch(numbers(100));
    assert!(other.wait_succeeded(100, LONG));
    gate.open();
    ends_well(&pipeline);
}

#[test]
fn the_channel_acknowledger_tells_each_outcome_and_blocks_nobody_when_full() {
    let (acknowledger, outcomes) = ChannelAcknowledger::new(10);
    let pipeline = Pipeline::each(fine)
        .source_with(sources::iter(numbers(25)), acknowledger)
        .processors(1)
        .chunk(5)
        .start()
        .unwrap();
    let report = pipeline.join();
    all_well(&report);
    let told: Vec<_> = outcomes
        .try_iter()
        .map(|outcome| match outcome {
            Acknowledgement::Succeeded(succeeded) => number(&succeeded.message),
            Acknowledgement::Failed(failed) => panic!("{failed:?}"),
        })
        .collect();
    assert_eq!(told, (0..10).collect::<Vec<_>>());
    assert!(pipeline.metrics().acknowledge_failures >= 15);
}

#[test]
fn an_acknowledger_may_use_the_pipeline_it_belongs_to() {
    let place: Arc<std::sync::OnceLock<Arc<Pipeline>>> = Arc::default();
    let own = Arc::clone(&place);
    let balanced = Noted::default();
    let seen = balanced.clone();
    let (source, feed) = testing::source();
    let asks = Does(move |_: &[Succeeded], _: &[Failed]| {
        if let Some(pipeline) = own.get() {
            seen.push(pipeline.metrics().ledger.balanced() && pipeline.topology().len() > 1);
            pipeline.pause();
            pipeline.resume();
        }
        Ok(())
    });
    let pipeline = Arc::new(Pipeline::each(fine).source_with(source, asks).start().unwrap());
    assert!(place.set(Arc::clone(&pipeline)).is_ok());
    feed.test_message("a");
    assert!(balanced.wait(1).iter().all(|balanced| *balanced));
    ends_well(&pipeline);
}
