//! What leaves together, when, and who works on it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use bench::*;
use broadsock::testing::{self, TestAcknowledger};
use broadsock::{Backoff, Batching, Failure, Message, Next, Pipeline, Trigger, sources};

fn keyed(message: &Message) -> Result<Next<String>, Failure> {
    let text = message.to_string();
    let key = text.split(':').next().unwrap_or_default().to_owned();
    Ok(if text.ends_with('!') {
        Next::to("batch", text).key(key).flush()
    } else {
        Next::to("batch", text).key(key)
    })
}

#[test]
fn no_batch_is_heavier_than_its_limit_and_what_would_overflow_opens_the_next() {
    let hands = Hands::new(to_batch);
    let batches = hands.batches.clone();
    let report = Pipeline::builder(hands)
        .source(sources::iter(["aaa", "bb", "cccc", "d", "eeeeeeeeee", "ff"]))
        .processors(1)
        .batcher("batch", Batching::new().size_by(6, |item: &String| item.len()).timeout(LONG))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let seen: Vec<_> = batches.all().into_iter().map(|b| (b.items.join("+"), b.trigger)).collect();
    let size = |items: &str| (items.to_owned(), Trigger::Size);
    let expected =
        [size("aaa+bb"), size("cccc+d"), size("eeeeeeeeee"), ("ff".into(), Trigger::Drain)];
    assert_eq!(seen, expected);
}

#[test]
fn the_timeout_runs_from_the_first_item_however_many_follow() {
    let (source, feed) = testing::source();
    let hands = Hands::new(to_batch);
    let batches = hands.batches.clone();
    let pipeline = Pipeline::builder(hands)
        .source(source)
        .batcher("batch", Batching::new().size(1_000_000).timeout(ms(100)))
        .start()
        .unwrap();
    let start = now();
    while batches.len() < 2 {
        assert!(start.elapsed() < LONG, "later items postpone the batch");
        feed.test_message("a");
        pass(ms(5));
    }
    assert!(batches.all().iter().all(|batch| batch.trigger == Trigger::Timeout));
    ends_well(&pipeline);
}

#[test]
fn a_flush_closes_the_batch_of_its_own_key_only() {
    let (source, feed) = testing::source();
    let hands = Hands::new(keyed);
    let batches = hands.batches.clone();
    let pipeline = Pipeline::builder(hands)
        .source(source)
        .processors(1)
        .batcher("batch", Batching::new().size(100).timeout(LONG))
        .start()
        .unwrap();
    feed.test_batch(["a:1", "b:1", "a:2", "b:2!"]);
    let first = batches.wait(1)[0].clone();
    assert_eq!((first.items, first.trigger), (vec!["b:1".into(), "b:2!".into()], Trigger::Flush));
    assert_eq!(first.key.as_deref(), Some("b"));
    ends_well(&pipeline);
    let last = batches.wait(2)[1].clone();
    assert_eq!((last.items, last.trigger), (vec!["a:1".into(), "a:2".into()], Trigger::Drain));
}

#[test]
fn a_key_too_many_closes_the_batch_that_has_been_open_longest() {
    let hands = Hands::new(keyed);
    let batches = hands.batches.clone();
    let report = Pipeline::builder(hands)
        .source(sources::iter(["a:1", "b:1", "a:2", "c:1"]))
        .processors(1)
        .batcher("batch", Batching::new().size(100).timeout(LONG).max_keys(2))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let first = batches.all()[0].clone();
    assert_eq!((first.items, first.trigger), (vec!["a:1".into(), "a:2".into()], Trigger::Keys));
    assert_eq!(batches.len(), 3);
}

#[test]
fn one_key_is_worked_by_one_worker_at_a_time_and_in_order() {
    let busy: Arc<Mutex<HashSet<String>>> = Arc::default();
    let order: Arc<Mutex<HashMap<String, Vec<u32>>>> = Arc::default();
    let (inside, seen) = (busy.clone(), order.clone());
    let hands = Hands::new(keyed).batch(move |batch| {
        let key = batch.key().unwrap().to_owned();
        assert!(lock(&inside).insert(key.clone()), "two workers have {key}");
        pass(ms(1));
        for item in batch.items() {
            let number = item.split(':').nth(1).unwrap().parse().unwrap();
            lock(&seen).entry(key.clone()).or_default().push(number);
        }
        lock(&inside).remove(&key);
        Ok(())
    });
    let messages: Vec<String> = (0..600).map(|n| format!("{}:{n}", n % 5)).collect();
    let report = Pipeline::builder(hands)
        .source(sources::iter(messages))
        .processors(1)
        .batcher("batch", Batching::new().size(3).timeout(ms(5)).concurrency(4))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 600);
    assert_eq!(lock(&order).len(), 5);
    assert!(lock(&order).values().all(|numbers| numbers.is_sorted() && numbers.len() == 120));
}

#[test]
fn batches_of_different_keys_are_worked_at_once() {
    let gate = Gate::new();
    let held = gate.clone();
    let hands = Hands::new(keyed).batch(move |_| {
        held.enter();
        Ok(())
    });
    let messages: Vec<String> = (0..32).map(|n| format!("{n}:x")).collect();
    let pipeline = Pipeline::builder(hands)
        .source(sources::iter(messages))
        .batcher("batch", Batching::new().size(1).concurrency(3))
        .start()
        .unwrap();
    let mut threads = gate.entered.wait(3);
    threads.sort();
    threads.dedup();
    assert_eq!(threads.len(), 3);
    gate.open();
    all_well(&pipeline.join());
}

#[test]
fn as_many_batches_are_handled_at_once_as_there_are_workers_and_no_more() {
    let gate = Gate::new();
    let held = gate.clone();
    let hands = Hands::new(to_batch).batch(move |_| {
        held.enter();
        Ok(())
    });
    let pipeline = Pipeline::builder(hands)
        .source(sources::iter(numbers(40)))
        .batcher("batch", Batching::new().size(2).concurrency(3))
        .start()
        .unwrap();
    gate.entered.wait(3);
    pass(ms(20));
    assert_eq!(gate.entered.len(), 3);
    gate.open();
    all_well(&pipeline.join());
    assert_eq!(gate.entered.len(), 20);
}

#[test]
fn a_batch_handler_fails_single_messages_and_no_others() {
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(to_batch).batch(|batch| {
        for index in 0..batch.len() {
            if batch.item(index).ends_with('3') {
                batch.fail(index, Failure::permanent("a three"));
            }
        }
        Ok(())
    });
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(40)), acknowledger.clone())
        .processors(1)
        .batcher("batch", Batching::new().size(10))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let failed: Vec<_> = acknowledger.failed().iter().map(|f| f.message.to_string()).collect();
    assert_eq!(failed, ["3", "13", "23", "33"]);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (36, 4));
    for group in acknowledger.groups() {
        assert_eq!((group.succeeded.len(), group.failed.len()), (9, 1), "one group for a batch");
    }
}

#[test]
fn what_failed_in_a_batch_is_tried_again_from_its_handler_on() {
    let handled = Noted::default();
    let count = handled.clone();
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(move |message| {
        count.push(message.to_string());
        to_batch(message)
    });
    let tries = hands.batches.clone();
    let hands = hands.batch(move |batch| {
        let first = tries.all().iter().filter(|b| b.items.contains(&"1".to_owned())).count() == 1;
        for index in 0..batch.len() {
            if batch.item(index) == "1" && first {
                batch.fail(index, Failure::new("not at the first try"));
            }
        }
        Ok(())
    });
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(3)), acknowledger.clone())
        .processors(2)
        .retries(3, Backoff::constant(ms(1)))
        .batcher("batch", Batching::new().size(3).timeout(LONG))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.ledger.failed), (3, 0));
    assert_eq!(handled.all().iter().filter(|text| *text == "1").count(), 2);
    let again: Vec<_> =
        acknowledger.succeeded().iter().filter(|s| s.attempts == 2).cloned().collect();
    assert_eq!(again.len(), 1);
    assert_eq!(again[0].message.text(), Some("1"));
}

#[test]
fn a_whole_batch_that_fails_is_tried_as_often_as_the_policy_says() {
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(to_batch).batch(|_| Err("never".into()));
    let batches = hands.batches.clone();
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(numbers(4)), acknowledger.clone())
        .retries(3, Backoff::constant(ms(1)))
        .batcher("batch", Batching::new().size(4).timeout(ms(50)))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!(report.ledger.failed, 4);
    assert!(acknowledger.failed().iter().all(|failed| failed.attempts == 3));
    assert_eq!(batches.all().iter().map(|batch| batch.items.len()).sum::<usize>(), 12);
}

#[test]
fn items_go_to_the_batcher_that_the_handler_names() {
    let hands = Hands::new(|message| {
        let name = if number(message).is_multiple_of(2) { "even" } else { "odd" };
        Ok(Next::to(name, message.to_string()))
    });
    let batches = hands.batches.clone();
    let report = Pipeline::builder(hands)
        .source(sources::iter(numbers(20)))
        .batcher("even", Batching::new().size(10).timeout(LONG))
        .batcher("odd", Batching::new().size(10).timeout(LONG))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    for batch in batches.all() {
        let odd = batch.thread.contains("odd");
        assert!(batch.items.iter().all(|item| (item.parse::<u32>().unwrap() % 2 == 1) == odd));
        assert_eq!(batch.trigger, Trigger::Size);
    }
}
