//! What failed is tried again, in order or not.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::collections::HashMap;

use bench::*;
use broadsock::testing::TestAcknowledger;
use broadsock::{Backoff, Failure, Message, Pipeline, sources};

/// Fails a text as often as is said, and notes each try.
fn flaky(
    text: &'static str,
    times: usize,
    tries: &Noted<String>,
) -> impl Fn(&Message) -> Result<(), String> + use<> {
    let tries = tries.clone();
    move |message| {
        tries.push(message.to_string());
        let so_far = tries.all().iter().filter(|tried| *tried == text).count();
        if message.text() == Some(text) && so_far <= times { Err("not yet".into()) } else { Ok(()) }
    }
}

#[test]
fn attempts_are_counted_and_told_to_the_acknowledger() {
    let tries = Noted::default();
    let acknowledger = TestAcknowledger::new();
    let report = Pipeline::each(flaky("1", 2, &tries))
        .source_with(sources::iter(numbers(3)), acknowledger.clone())
        .retries(5, Backoff::constant(ms(1)))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let attempts: HashMap<_, _> =
        acknowledger.succeeded().iter().map(|s| (s.message.to_string(), s.attempts)).collect();
    assert_eq!((attempts["0"], attempts["1"], attempts["2"]), (1, 3, 1));
}

#[test]
fn a_permanent_failure_is_not_tried_again() {
    let acknowledger = TestAcknowledger::new();
    let hands = Hands::new(|_| Err(Failure::permanent("never")));
    let report = Pipeline::builder(hands)
        .source_with(sources::iter(["a"]), acknowledger.clone())
        .retries(5, Backoff::constant(ms(1)))
        .start()
        .unwrap()
        .join();
    all_well(&report);
    assert_eq!(acknowledger.failed()[0].attempts, 1);
}

#[test]
fn a_partition_that_holds_its_order_keeps_it_while_a_message_is_tried_again() {
    let tries = Noted::default();
    let report = Pipeline::each(flaky("9", 3, &tries))
        .source(sources::iter(numbers(40)))
        .processors(4)
        .partition_by(|message| number(message) % 4)
        .retries(5, Backoff::constant(ms(5)))
        .hold_order()
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let own: Vec<_> =
        tries.all().into_iter().filter(|t| t.parse::<u32>().unwrap() % 4 == 1).collect();
    assert_eq!(own, ["1", "5", "9", "9", "9", "9", "13", "17", "21", "25", "29", "33", "37"]);
}

#[test]
fn a_failed_message_that_does_not_hold_the_order_holds_up_nobody() {
    let acknowledger = TestAcknowledger::new();
    let tries = Noted::default();
    let pipeline = Pipeline::each(flaky("1", usize::MAX, &tries))
        .source_with(sources::iter(numbers(100)), acknowledger.clone())
        .processors(1)
        .partition_by(|_| 0)
        .retries(5, Backoff::constant(LONG))
        .start()
        .unwrap();
    assert!(acknowledger.wait_succeeded(99, LONG), "the others wait for the failed one");
    let report = pipeline.stop(ms(1000));
    all_well(&report);
    assert_eq!(texts(&report.returned), ["1"]);
}

#[test]
fn a_stop_ends_the_wait_of_a_partition_that_holds_its_order() {
    let tries = Noted::default();
    let pipeline = Pipeline::each(flaky("1", usize::MAX, &tries))
        .source(sources::iter(numbers(4)))
        .processors(1)
        .partition_by(|_| 0)
        .retries(5, Backoff::constant(LONG))
        .hold_order()
        .start()
        .unwrap();
    tries.wait(2);
    let report = pipeline.stop(ms(1000));
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 1);
    assert_eq!(texts(&report.returned), ["1", "2", "3"]);
}
