//! What Broadway promises, and what it loses, on threads; without any socket.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use broadsock::crossbeam_channel::{Receiver, Sender, bounded};
use broadsock::{
    Acknowledgement, Batch, Batching, ChannelAcknowledger, Failed, Failure, FailureKind, Handler,
    Message, Next, Pipeline, Trigger, sources,
};

const LONG: Duration = Duration::from_secs(30);

/// A handler made of functions.
#[derive(Clone)]
struct Probe {
    seen: Arc<Mutex<Vec<(String, String)>>>,
    batches: Sender<Seen>,
    failed: Arc<Mutex<Vec<(String, FailureKind)>>>,
    key: fn(&str) -> Option<String>,
}

/// A batch's items, trigger, key and worker.
type Seen = (Vec<String>, Trigger, Option<String>, String);
type Batches = Receiver<Seen>;

impl Probe {
    fn new() -> (Self, Batches) {
        let (batches, receiver) = bounded(10_000);
        let probe = Self { seen: Arc::default(), batches, failed: Arc::default(), key: |_| None };
        (probe, receiver)
    }
}

fn thread() -> String {
    std::thread::current().name().unwrap_or_default().to_owned()
}

impl Handler for Probe {
    type Item = String;

    fn handle_message(&self, message: &Message) -> Result<Next<String>, Failure> {
        let text = message.text().unwrap_or_default().to_owned();
        self.seen.lock().unwrap().push((text.clone(), thread()));
        match text.as_str() {
            "fail" => Err(Failure::permanent("asked to fail")),
            "panic" => panic!("asked to panic"),
            "nowhere" => Ok(Next::to("nowhere", text)),
            "done" => Ok(Next::done()),
            "flush" => Ok(Next::to("batch", text).flush()),
            _ => {
                let key = (self.key)(&text);
                let next = Next::to("batch", text);
                Ok(match key {
                    Some(key) => next.key(key),
                    None => next,
                })
            }
        }
    }

    fn handle_batch(&self, batch: &mut Batch<String>) -> Result<(), Failure> {
        let items: Vec<String> = batch.items().cloned().collect();
        let key = batch.key().map(str::to_owned);
        self.batches.send((items.clone(), batch.trigger(), key, thread())).unwrap();
        if items.iter().any(|item| item == "batch panic") {
            panic!("asked to panic");
        }
        for (index, item) in items.iter().enumerate() {
            if item == "batch fail" {
                batch.fail(index, Failure::permanent("asked to fail"));
            }
        }
        Ok(())
    }

    fn handle_failed(&self, failed: &[Failed]) {
        let names = failed.iter().map(|f| (f.message.to_string(), f.failure.kind()));
        self.failed.lock().unwrap().extend(names);
    }
}

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

#[test]
fn batches_are_generated_by_size_and_the_rest_by_the_end() {
    let (probe, batches) = Probe::new();
    let report = Pipeline::builder(probe)
        .source(sources::iter(numbers(0..25)))
        .processors(1)
        .batcher("batch", Batching::new().size(10).timeout(LONG))
        .start()
        .unwrap()
        .join();
    let batches: Vec<_> =
        batches.try_iter().map(|(items, trigger, ..)| (items.len(), trigger)).collect();
    assert_eq!(batches, [(10, Trigger::Size), (10, Trigger::Size), (5, Trigger::Drain)]);
    assert_eq!((report.ledger.accepted, report.ledger.succeeded), (25, 25));
    assert!(report.stuck.is_empty() && report.ledger.balanced());
}

#[test]
fn remaining_messages_leave_after_the_batch_timeout() {
    let (probe, batches) = Probe::new();
    let (sender, receiver) = bounded(10);
    let pipeline = Pipeline::builder(probe)
        .source(sources::channel(receiver))
        .batcher("batch", Batching::new().size(10).timeout(Duration::from_millis(20)))
        .start()
        .unwrap();
    sender.send("a").unwrap();
    let (items, trigger, ..) = batches.recv_timeout(LONG).unwrap();
    assert_eq!((items, trigger), (vec!["a".to_owned()], Trigger::Timeout));
    drop(sender);
    assert_eq!(pipeline.join().ledger.succeeded, 1);
}

#[test]
fn a_flush_closes_its_batch_at_once() {
    let (probe, batches) = Probe::new();
    let (sender, receiver) = bounded(10);
    let pipeline = Pipeline::builder(probe)
        .source(sources::channel(receiver))
        .processors(1)
        .batcher("batch", Batching::new().size(10).timeout(LONG))
        .start()
        .unwrap();
    sender.send("a").unwrap();
    sender.send("flush").unwrap();
    let (items, trigger, ..) = batches.recv_timeout(LONG).unwrap();
    assert_eq!((items.len(), trigger), (2, Trigger::Flush));
    pipeline.stop(LONG);
}

#[test]
fn failed_messages_are_not_forwarded_and_only_they_fail() {
    let (probe, batches) = Probe::new();
    let failed = probe.failed.clone();
    let (acknowledger, outcomes) = ChannelAcknowledger::new(100);
    let report = Pipeline::builder(probe)
        .source_with(
            sources::iter(["a", "fail", "b", "panic", "nowhere", "c", "done"]),
            acknowledger,
        )
        .processors(1)
        .batcher("batch", Batching::new())
        .start()
        .unwrap()
        .join();
    let mut items: Vec<String> = batches.try_iter().flat_map(|(items, ..)| items).collect();
    items.sort();
    assert_eq!(items, ["a", "b", "c"]);
    let kinds: HashMap<String, FailureKind> = failed.lock().unwrap().drain(..).collect();
    assert_eq!(kinds["fail"], FailureKind::Error);
    assert_eq!(kinds["panic"], FailureKind::Panic);
    assert_eq!(kinds["nowhere"], FailureKind::UnknownBatcher);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (4, 3));
    let (good, bad): (Vec<_>, Vec<_>) =
        outcomes.try_iter().partition(|o| matches!(o, Acknowledgement::Succeeded(_)));
    assert_eq!((good.len(), bad.len()), (4, 3));
}

#[test]
fn the_failure_hook_sees_the_whole_batch_when_its_handler_panics() {
    let (probe, _batches) = Probe::new();
    let failed = probe.failed.clone();
    let report = Pipeline::builder(probe)
        .source(sources::iter(["a", "batch panic", "b"]))
        .processors(1)
        .batcher("batch", Batching::new().size(3))
        .start()
        .unwrap()
        .join();
    assert_eq!(failed.lock().unwrap().len(), 3);
    assert_eq!(report.ledger.failed, 3);
}

#[test]
fn messages_of_one_partition_are_processed_in_order_by_the_same_processor_and_batch_worker() {
    let (mut probe, batches) = Probe::new();
    probe.key = |text| Some((text.len() % 2).to_string());
    let seen = probe.seen.clone();
    let number = |text: &str| text.parse::<u64>().unwrap();
    let report = Pipeline::builder(probe)
        .source(sources::iter(numbers(0..2000)))
        .processors(4)
        .partition_by(move |message| number(message.text().unwrap()) % 7)
        .batcher("batch", Batching::new().size(10).timeout(Duration::from_millis(5)).concurrency(3))
        .start()
        .unwrap()
        .join();
    assert_eq!(report.ledger.succeeded, 2000);
    let check = |items: Vec<(String, String)>| {
        let mut last: HashMap<u64, (u64, String)> = HashMap::new();
        for (text, worker) in items {
            let n = number(&text);
            if let Some((before, by)) = last.insert(n % 7, (n, worker.clone())) {
                assert!(before < n, "{before} before {n}");
                assert_eq!(by, worker);
            }
        }
    };
    check(seen.lock().unwrap().clone());
    // With keys, order holds within the batches of one key.
    for key in ["0", "1"] {
        let of_key = batches.try_iter().collect::<Vec<_>>();
        let items = of_key.iter().filter(|(_, _, k, _)| k.as_deref() == Some(key));
        check(
            items
                .flat_map(|(items, _, _, by)| items.iter().map(|i| (i.clone(), by.clone())))
                .collect(),
        );
    }
}
