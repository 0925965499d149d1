//! The ledger at every instant, the counters, the events, the topology.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use bench::*;
use broadsock::testing::{self, TestAcknowledger, kill_worker};
use broadsock::{
    Acknowledger, Backoff, Batching, BoxError, Failed, Failure, Intensity, Message, Next, Pipeline,
    PipelineEvent, RateLimit, Succeeded, Trigger, sources,
};

/// Fails, panics, or is well, by turns.
struct Moody(AtomicU64);

impl Acknowledger for Moody {
    fn acknowledge(&self, _: &[Succeeded], _: &[Failed]) -> Result<(), BoxError> {
        match self.0.fetch_add(1, SeqCst) % 5 {
            0 => Err("a mood".into()),
            1 => panic!("asked to panic"),
            _ => Ok(()),
        }
    }
}

/// Two thousand numbers. However busy the machine is, they do not get far without a
/// look.
fn looked_at(looks: Arc<AtomicU64>) -> impl Iterator<Item = String> {
    numbers(2000).into_iter().enumerate().map(move |(n, text)| {
        if n % 100 == 99 {
            let before = looks.load(SeqCst);
            eventually("a look", || looks.load(SeqCst) > before);
        }
        text
    })
}

#[test]
fn the_ledger_balances_at_every_instant_during_faults_and_at_the_end() {
    let killed = AtomicU64::new(0);
    let kills = move |limit: u64| {
        killed.fetch_update(SeqCst, SeqCst, |n| (n < limit).then_some(n + 1)).is_ok()
    };
    let hands = Hands::new(move |message| match number(message) % 50 {
        3 => Err("an error".into()),
        7 => panic!("asked to panic"),
        11 => Err(Failure::permanent("for good")),
        13 if kills(2) => kill_worker(),
        17 => Ok(Next::to("nowhere", String::new())),
        19 => Ok(Next::to("batch", "now".to_owned()).acknowledge_now()),
        23 => Ok(Next::done()),
        _ => to_batch(message),
    })
    .batch(|batch| {
        let number = batch.items().filter_map(|item| item.parse::<u64>().ok()).sum::<u64>();
        match number % 10 {
            0 => Err("an error".into()),
            1 => panic!("asked to panic"),
            _ => Ok(()),
        }
    })
    .failed(|failed| assert!(!failed.len().is_multiple_of(3), "asked to panic"));
    let mut builder = Pipeline::builder(hands)
        .processors(3)
        .chunk(5)
        .max_in_flight(300)
        .retries(3, Backoff::constant(ms(1)))
        .restart_intensity(Intensity { restarts: 10, within: LONG })
        .batcher("batch", Batching::new().size(7).timeout(ms(2)).concurrency(2));
    let looks = Arc::new(AtomicU64::new(0));
    for _ in 0..3 {
        let numbers = looked_at(Arc::clone(&looks));
        builder = builder.source_with(sources::iter(numbers), Moody(AtomicU64::new(0)));
    }
    let pipeline = builder.start().unwrap();
    let over = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        let samples = scope.spawn(|| {
            let mut samples = HashSet::new();
            let mut last = (0, 0);
            while !over.load(SeqCst) {
                let ledger = pipeline.metrics().ledger;
                assert!(ledger.balanced(), "{ledger}");
                assert!(ledger.in_flight <= 300, "{ledger}");
                let settled = (ledger.succeeded, ledger.failed);
                assert!(settled.0 >= last.0 && settled.1 >= last.1, "{ledger} after {last:?}");
                last = settled;
                samples.insert(settled);
                looks.fetch_add(1, SeqCst);
            }
            samples.len()
        });
        let report = pipeline.join();
        over.store(true, SeqCst);
        assert!(samples.join().unwrap() > 10, "too few samples to mean anything");
        report
    });
    all_well(&report);
    let ledger = report.ledger;
    assert_eq!((ledger.accepted, ledger.returned), (6000, 0), "{ledger}");
    assert_eq!(pipeline.metrics().restarts, 2);
    let metrics = pipeline.metrics();
    // 120 messages are acknowledged early, and none of all twice.
    assert_eq!(metrics.acknowledged + metrics.acknowledge_failures, 6000);
    assert_eq!(metrics.latency.iter().sum::<u64>(), ledger.succeeded);
}

#[test]
fn the_counters_of_every_stage_are_right() {
    let gate = Gate::new();
    let held = gate.clone();
    let tried = AtomicBool::new(false);
    let hands = Hands::new(move |message| match message.text() {
        Some("again") if !tried.swap(true, SeqCst) => Err("not yet".into()),
        Some("bad") => Err(Failure::permanent("no")),
        Some("flush") => Ok(Next::to("batch", "flush".to_owned()).flush()),
        _ => to_batch(message),
    })
    .batch(move |batch| {
        if batch.trigger() == Trigger::Flush {
            held.enter();
        }
        Ok(())
    });
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::builder(hands)
        .source_with(source, acknowledger.clone())
        .processors(1)
        .retries(2, Backoff::constant(ms(1)))
        .batcher("batch", Batching::new().size(3).timeout(LONG))
        .start()
        .unwrap();
    assert_eq!(pipeline.metrics().oldest, None);
    feed.test_batch(["a", "b", "c", "bad"]);
    assert!(acknowledger.wait(4, LONG));
    feed.test_batch(["again"]);
    eventually("the retry in its batch", || pipeline.metrics().stages[1].queued == 1);
    feed.test_batch(["flush"]);
    gate.entered.wait(1);
    feed.test_batch(numbers(5));
    eventually("five in the batcher", || pipeline.metrics().stages[1].queued == 5);
    let metrics = pipeline.metrics();
    assert_eq!((metrics.retries, metrics.restarts, metrics.panics), (1, 0, 0));
    assert_eq!((metrics.acknowledged, metrics.acknowledge_failures), (4, 0));
    assert_eq!((metrics.ledger.in_flight, metrics.ledger.succeeded), (7, 3));
    let [processors, batcher] = &metrics.stages[..] else { panic!("{:?}", metrics.stages) };
    assert_eq!((processors.name.as_str(), batcher.name.as_str()), ("processors", "batch"));
    assert_eq!(processors.queued, 0);
    let worker = &processors.workers[0];
    assert_eq!((worker.handled, worker.failed, worker.running_for), (12, 2, None));
    let worker = &batcher.workers[0];
    assert_eq!((worker.handled, worker.thread.as_str()), (1, "broadsock-batch-batch-0"));
    eventually("the time it runs", || {
        let metrics = pipeline.metrics();
        let running = metrics.stages[1].workers[0].running_for;
        metrics.oldest > Some(ms(20)) && running > Some(ms(20))
    });
    gate.open();
    ends_well(&pipeline);
    let metrics = pipeline.metrics();
    let batcher = &metrics.stages[1];
    // size, timeout, flush, keys, drain
    assert_eq!((batcher.batches, batcher.batched), ([2, 0, 1, 0, 1], 10));
    assert!(batcher.workers[0].busy >= ms(20) && batcher.queued == 0);
    assert_eq!((metrics.oldest, metrics.acknowledged), (None, 11));
    assert_eq!(metrics.latency.iter().sum::<u64>(), 10);
}

#[test]
fn queue_depths_count_messages_and_items() {
    let gate = Gate::new();
    let held = gate.clone();
    let (source, feed) = testing::source();
    let pipeline = Pipeline::each(move |_: &Message| {
        held.enter();
        Ok::<(), String>(())
    })
    .source(source)
    .processors(1)
    .chunk(10)
    .start()
    .unwrap();
    feed.test_batch(["first"]);
    gate.entered.wait(1);
    feed.test_batch(numbers(95));
    eventually("95 messages in the queue", || pipeline.metrics().stages[0].queued == 95);
    gate.open();
    ends_well(&pipeline);
    assert_eq!(pipeline.metrics().stages[0].queued, 0);
}

#[test]
fn the_latency_of_each_message_is_counted_by_its_power_of_two() {
    let pipeline = Pipeline::each(|_: &Message| {
        pass(ms(20));
        Ok::<(), String>(())
    })
    .source(sources::iter(["a"]))
    .start()
    .unwrap();
    all_well(&pipeline.join());
    let latency = pipeline.metrics().latency;
    assert!(pipeline.metrics().latency_sum >= ms(20));
    let bucket = latency.iter().position(|count| *count > 0).unwrap();
    // From 2^14 = 16 ms on.
    assert!(bucket >= 15, "{latency:?}");
}

#[test]
fn the_topology_names_every_stage_its_threads_queues_and_limits() {
    let pipeline = Pipeline::builder(Hands::new(to_batch))
        .source(sources::iter(["a"]))
        .processors(3)
        .queue(77)
        .chunk(5)
        .max_in_flight(99)
        .rate_limit(RateLimit::token_bucket(10.0, 5))
        .batcher("batch", Batching::new().concurrency(4))
        .batcher("other", Batching::new())
        .start()
        .unwrap();
    let topology = pipeline.topology();
    let lines = [
        "sources: 1 thread broadsock-source-N",
        "processors: 3 threads broadsock-proc-N, 1 queue of 77 chunks of up to 5 messages",
        "batcher batch: thread broadsock-batcher-batch, queue of 77 items, 4 threads \
         broadsock-batch-batch-N",
        "batcher other: thread broadsock-batcher-other, queue of 77 items, 1 thread \
         broadsock-batch-other-N",
        "supervision: threads broadsock-monitor, broadsock-timer",
        "in flight: at most 99",
    ];
    for line in lines {
        assert!(topology.lines().any(|other| other == line), "{line:?} in {topology}");
    }
    assert!(topology.contains("per_second: 10"), "{topology}");
    let events = pipeline.events();
    assert!(
        matches!(events.recv_timeout(LONG), Ok(PipelineEvent::Started { topology: t }) if t == topology)
    );
    all_well(&pipeline.join());
}

#[test]
fn there_are_events_of_every_stage_with_counts_and_durations() {
    let told: Noted<PipelineEvent> = Noted::default();
    let note = told.clone();
    let hands = Hands::new(|message| match message.text() {
        Some("bad") => Err(Failure::permanent("no")),
        _ => to_batch(message),
    });
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::builder(hands)
        .source_with(source, acknowledger.clone())
        .processors(1)
        .observer(move |event| {
            note.push(event.clone());
        })
        .batcher("batch", Batching::new().size(3).timeout(LONG))
        .start()
        .unwrap();
    pipeline.pause();
    pipeline.resume();
    feed.test_batch(["a", "b", "c", "bad"]);
    assert!(acknowledger.wait(4, LONG));
    ends_well(&pipeline);
    use PipelineEvent::*;
    let told = told.all();
    let count = |is: fn(&PipelineEvent) -> bool| told.iter().filter(|event| is(event)).count();
    let processor = "broadsock-proc-0";
    for (what, seen) in [
        ("start", count(|e| matches!(e, Started { .. }))),
        ("pause", count(|e| matches!(e, Paused(true)))),
        ("resume", count(|e| matches!(e, Paused(false)))),
        ("failure", count(|e| matches!(e, Failed { attempt: 1, retry_in: None, .. }))),
        ("batch", count(|e| matches!(e, Batch { len: 3, trigger: Trigger::Size, .. }))),
        ("batch start", count(|e| matches!(e, BatchStarted { len: 3, .. }))),
        ("batch end", count(|e| matches!(e, BatchDone { len: 3, failed: false, .. }))),
        ("success", count(|e| matches!(e, Acknowledged { source: 0, succeeded: 3, failed: 0 }))),
        ("failures", count(|e| matches!(e, Acknowledged { source: 0, succeeded: 0, failed: 1 }))),
        ("drain", count(|e| matches!(e, Draining))),
        ("end", count(|e| matches!(e, Ended { returned: 0, .. }))),
    ] {
        assert_eq!(seen, 1, "{what} in {told:#?}");
    }
    let started: usize = told
        .iter()
        .map(|event| match event {
            ChunkStarted { thread, len } if thread == processor => *len,
            _ => 0,
        })
        .sum();
    let done: usize = told
        .iter()
        .map(|event| match event {
            ChunkDone { thread, len, .. } if thread == processor => *len,
            _ => 0,
        })
        .sum();
    assert_eq!((started, done), (4, 4));
    assert!(told.iter().all(|event| !event.to_string().is_empty()));
}

#[test]
fn frequent_events_do_not_push_out_the_rare_ones() {
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(|_: &Message| Ok::<(), String>(()))
        .source_with(source, acknowledger.clone())
        .chunk(1)
        .observer(|_| ())
        .start()
        .unwrap();
    feed.test_batch(numbers(1000));
    assert!(acknowledger.wait_succeeded(1000, LONG));
    assert!(matches!(pipeline.events().try_recv(), Ok(PipelineEvent::Started { .. })));
    ends_well(&pipeline);
}

#[test]
fn the_end_of_the_events_is_the_end_of_the_pipeline() {
    let pipeline = Arc::new(
        Pipeline::each(|_: &Message| Ok::<(), String>(()))
            .source(sources::iter(["a"]))
            .start()
            .unwrap(),
    );
    let events = pipeline.events();
    pipeline.join();
    assert!(matches!(events.iter().last(), Some(PipelineEvent::Ended { .. })));
    assert!(matches!(pipeline.events().iter().last(), Some(PipelineEvent::Ended { .. })));
}
