//! How much is under way, how fast, by how many, and who holds up whom.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bench::*;
use broadsock::testing::{self, TestAcknowledger, TestSource};
use broadsock::{
    Backoff, Batching, ErrorKind, Failure, Message, Next, Pipeline, Pull, Source, Stop, sources,
};

fn fine(_: &Message) -> Result<(), String> {
    Ok(())
}

/// Takes its time.
struct Slow(TestSource);

impl Source for Slow {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        pass(ms(1));
        self.0.pull(most, stop)
    }
}

#[test]
fn never_more_messages_are_in_flight_than_allowed() {
    let place: Arc<OnceLock<Arc<Pipeline>>> = Arc::default();
    let own = Arc::clone(&place);
    let most = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&most);
    let look = move || {
        let in_flight = own.get().map_or(0, |pipeline| pipeline.metrics().ledger.in_flight);
        seen.fetch_max(usize::try_from(in_flight).unwrap(), SeqCst);
    };
    let (on_message, on_batch) = (look.clone(), look);
    let hands = Hands::new(move |message| {
        on_message();
        to_batch(message)
    })
    .batch(move |_| {
        on_batch();
        Ok(())
    });
    let (first, first_feed) = testing::source();
    let (second, second_feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::builder(hands)
        .source_with(Slow(first), acknowledger.clone())
        .source_with(Slow(second), acknowledger.clone())
        .processors(3)
        .max_in_flight(17)
        .batcher("batch", Batching::new().size(5).timeout(ms(1)).concurrency(2))
        .start()
        .unwrap();
    let pipeline = Arc::new(pipeline);
    assert!(place.set(Arc::clone(&pipeline)).is_ok());
    first_feed.test_batch(numbers(500));
    second_feed.test_batch(numbers(500));
    assert!(acknowledger.wait_succeeded(1000, LONG));
    first_feed.end();
    second_feed.end();
    all_well(&pipeline.join());
    let most = most.load(SeqCst);
    assert!((2..=17).contains(&most), "{most}");
}

/// One partition of four takes 50 ms for each message; `where_slow` says in
/// which stage.
fn one_slow_partition(in_batches: bool) {
    let done = Noted::default();
    let (handled, batched) = (done.clone(), done.clone());
    let work = move |number: u64, done: &Noted<u64>| {
        if number.is_multiple_of(4) {
            pass(ms(50));
        }
        done.push(number % 4);
    };
    let hands = Hands::new(move |message| {
        if in_batches {
            return to_batch(message);
        }
        work(number(message), &handled);
        Ok(Next::done())
    })
    .batch(move |batch| {
        batch.items().for_each(|item| work(item.parse().unwrap(), &batched));
        Ok(())
    });
    let report = Pipeline::builder(hands)
        .source(sources::iter(numbers(160)))
        .processors(4)
        .partition_by(|message| number(message) % 4)
        .batcher("batch", Batching::new().size(1).concurrency(4))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let order = done.all();
    assert_eq!(order.len(), 160);
    let last_fast = order.iter().rposition(|partition| *partition != 0).unwrap();
    let slow_by_then = order[..last_fast].iter().filter(|partition| **partition == 0).count();
    assert!(slow_by_then < 20, "{slow_by_then} of 40 slow ones before the last of the others");
}

#[test]
fn a_slow_partition_at_50_ms_for_each_message_leaves_the_others_at_full_speed() {
    one_slow_partition(false);
}

#[test]
fn a_partition_that_is_slow_in_its_batches_leaves_the_others_at_full_speed() {
    one_slow_partition(true);
}

#[test]
fn resizing_while_running_loses_nothing_and_changes_the_number_of_workers() {
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let tried = Arc::new(AtomicUsize::new(0));
    let hands = Hands::new(move |message| {
        if number(message).is_multiple_of(3) && tried.fetch_add(1, SeqCst).is_multiple_of(2) {
            return Err(Failure::new("not yet"));
        }
        to_batch(message)
    });
    let pipeline = Pipeline::builder(hands)
        .source_with(source, acknowledger.clone())
        .processors(2)
        .chunk(3)
        .retries(20, Backoff::constant(ms(1)))
        .batcher("batch", Batching::new().size(4).timeout(ms(2)).concurrency(2))
        .start()
        .unwrap();
    for round in 0..100_u64 {
        feed.test_batch(numbers(30));
        pipeline.resize((1 + round % 5) as usize).unwrap();
        pipeline.resize_batcher("batch", (1 + round % 4) as usize).unwrap();
    }
    assert!(acknowledger.wait(3000, LONG), "{:?}", pipeline.metrics().ledger);
    pipeline.resize(6).unwrap();
    pipeline.resize_batcher("batch", 3).unwrap();
    let workers = |stage: usize| pipeline.metrics().stages[stage].workers.len();
    assert_eq!((workers(0), workers(1)), (6, 3));
    assert_eq!(acknowledger.outcomes().len(), 3000);
    ends_well(&pipeline);
}

#[test]
fn after_a_resize_so_many_messages_are_handled_at_once() {
    let (gate, batch_gate) = (Gate::new(), Gate::new());
    let (held, batch_held) = (gate.clone(), batch_gate.clone());
    let hands = Hands::new(move |message| {
        if message.text() == Some("batch") {
            return to_batch(message);
        }
        held.enter();
        Ok(Next::done())
    })
    .batch(move |_| {
        batch_held.enter();
        Ok(())
    });
    let (source, feed) = testing::source();
    let pipeline = Pipeline::builder(hands)
        .source(source)
        .processors(1)
        .chunk(1)
        .batcher("batch", Batching::new().size(1))
        .start()
        .unwrap();
    pipeline.resize_batcher("batch", 3).unwrap();
    feed.test_batch(["batch"; 8]);
    batch_gate.entered.wait(3);
    pipeline.resize(4).unwrap();
    feed.test_batch(["a"; 8]);
    let threads: HashSet<_> = gate.entered.wait(4).into_iter().collect();
    assert_eq!(threads.len(), 4);
    pass(ms(20));
    assert_eq!((gate.entered.len(), batch_gate.entered.len()), (4, 3));
    gate.open();
    batch_gate.open();
    ends_well(&pipeline);
}

#[test]
fn the_retry_of_a_retired_workers_last_message_is_not_forgotten() {
    let gates = [Gate::new(), Gate::new()];
    let held = gates.clone();
    let tries = Noted::default();
    let note = tries.clone();
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(move |_: &Message| {
        let first = note.push(()) <= 2;
        let retired = thread() == "broadsock-proc-1";
        held[usize::from(retired)].enter();
        if first && retired { Err("not yet") } else { Ok(()) }
    })
    .source_with(source, acknowledger.clone())
    .processors(2)
    .chunk(1)
    .retries(2, Backoff::constant(ms(30)))
    .start()
    .unwrap();
    feed.test_batch(["a", "b"]);
    tries.wait(2);
    gates[0].open();
    assert!(acknowledger.wait_succeeded(1, LONG));
    // Time for the other one to wait for work, before there is the retry.
    pass(ms(30));
    pipeline.resize(1).unwrap();
    gates[1].open();
    assert!(acknowledger.wait_succeeded(2, LONG), "its retry is due, and nobody wakes");
    ends_well(&pipeline);
}

#[test]
fn workers_that_messages_belong_to_cannot_be_resized() {
    let setting = |result: Result<(), broadsock::Error>| match result.unwrap_err().kind() {
        ErrorKind::Setting(name) => *name,
        other => panic!("{other:?}"),
    };
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(|message| Ok(Next::to("batch", message.to_string()).key("a")));
    let pipeline = Pipeline::builder(hands)
        .source_with(source, acknowledger.clone())
        .batcher("batch", Batching::new().size(1).concurrency(2))
        .start()
        .unwrap();
    pipeline.resize_batcher("batch", 3).unwrap();
    assert_eq!(setting(pipeline.resize_batcher("other", 3)), "batcher");
    assert_eq!(setting(pipeline.resize_batcher("batch", 0)), "batcher");
    assert_eq!(setting(pipeline.resize(0)), "processors");
    assert_eq!(setting(pipeline.resize(usize::MAX)), "processors");
    feed.test_message("a");
    assert!(acknowledger.wait_succeeded(1, LONG));
    assert_eq!(setting(pipeline.resize_batcher("batch", 2)), "batcher");
    ends_well(&pipeline);
    let partitions = Pipeline::each(fine)
        .source(sources::iter(["a"]))
        .partition_by(|_| 0)
        .batcher("batch", Batching::new())
        .start()
        .unwrap();
    assert_eq!(setting(partitions.resize(3)), "processors");
    assert_eq!(setting(partitions.resize_batcher("batch", 3)), "batcher");
}

#[test]
fn resizing_to_and_fro_for_long_does_not_pile_anything_up() {
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(fine)
        .source_with(source, acknowledger.clone())
        .processors(1)
        .start()
        .unwrap();
    for n in 1..=100 {
        pipeline.resize(4).unwrap();
        feed.test_message("a");
        assert!(acknowledger.wait_succeeded(n, LONG));
        pipeline.resize(1).unwrap();
    }
    let workers = &pipeline.metrics().stages[0].workers;
    assert_eq!(workers.len(), 1);
    assert_eq!(workers[0].thread, "broadsock-proc-0");
    all_well(&pipeline.stop(Duration::from_secs(20)));
}

#[test]
fn retired_workers_take_no_more_messages() {
    let gate = Gate::new();
    let held = gate.clone();
    let (source, feed) = testing::source();
    let pipeline = Pipeline::builder(Hands::new(to_batch).batch(move |_| {
        held.enter();
        Ok(())
    }))
    .source(source)
    .processors(4)
    .batcher("batch", Batching::new().size(1).concurrency(4))
    .start()
    .unwrap();
    pipeline.resize(1).unwrap();
    pipeline.resize_batcher("batch", 1).unwrap();
    feed.test_batch(numbers(20));
    gate.entered.wait(1);
    pass(ms(20));
    assert_eq!(gate.entered.all(), ["broadsock-batch-batch-0"]);
    gate.open();
    ends_well(&pipeline);
}
