//! How fast messages pass.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::time::Instant;

use bench::*;
use broadsock::testing::{self, TestAcknowledger};
use broadsock::{ErrorKind, Message, Pipeline, RateLimit, sources};

fn fine(_: &Message) -> Result<(), String> {
    Ok(())
}

/// Runs messages through the limit over two sources; returns when each was
/// handled, and the time before the start.
fn limited(limit: RateLimit, count: u32) -> (Instant, Vec<Instant>) {
    let times = Noted::default();
    let note = times.clone();
    let start = now();
    let report = Pipeline::each(move |_: &Message| {
        note.push(now());
        Ok::<(), String>(())
    })
    .source(sources::iter(numbers(count)))
    .source(sources::iter(numbers(count)))
    .processors(3)
    .rate_limit(limit)
    .start()
    .unwrap()
    .join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, u64::from(count) * 2);
    (start, times.all())
}

#[test]
fn a_token_bucket_is_never_exceeded_over_all_sources() {
    let (start, mut times) = limited(RateLimit::token_bucket(500.0, 20), 100);
    times.sort();
    for (n, at) in times.iter().enumerate() {
        let room = 20.0 + 500.0 * at.duration_since(start).as_secs_f64();
        assert!((n + 1) as f64 <= room, "message {} at {:?}", n + 1, at.duration_since(start));
    }
}

#[test]
fn a_fixed_window_is_never_exceeded_over_all_sources() {
    let before = now();
    let (start, mut times) = limited(RateLimit::fixed_window(40, ms(100)), 100);
    assert!(start >= before);
    times.sort();
    for (n, at) in times.iter().enumerate() {
        // The windows begin after `start`.
        let windows = at.duration_since(start).as_millis() / 100 + 1;
        assert!((n + 1) as u128 <= windows * 40, "message {} in window {windows}", n + 1);
    }
}

#[test]
fn the_rate_limit_can_be_read_and_changed_while_running() {
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let slow = RateLimit::token_bucket(0.001, 2);
    let pipeline = Pipeline::each(fine)
        .source_with(source, acknowledger.clone())
        .rate_limit(slow)
        .start()
        .unwrap();
    feed.test_batch(numbers(50));
    assert!(acknowledger.wait_succeeded(2, LONG));
    pass(ms(20));
    assert_eq!((acknowledger.outcomes().len(), pipeline.rate_limit()), (2, Some(slow)));
    let fast = RateLimit::token_bucket(1e6, 100);
    pipeline.set_rate_limit(fast).unwrap();
    assert_eq!(pipeline.rate_limit(), Some(fast));
    assert!(acknowledger.wait_succeeded(50, LONG), "who waits does not see the change");
    let error = pipeline.set_rate_limit(RateLimit::token_bucket(-1.0, 1)).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Setting("rate_limit"));
    ends_well(&pipeline);
    let unlimited = Pipeline::each(fine).source(sources::iter(["a"])).start().unwrap();
    assert!(unlimited.set_rate_limit(fast).is_err() && unlimited.rate_limit().is_none());
}

#[test]
fn the_rate_limit_is_honoured_while_draining_and_a_stop_does_not_wait_for_it() {
    let (source, feed) = testing::source();
    let times = Noted::default();
    let note = times.clone();
    let start = now();
    let pipeline = Pipeline::each(move |_: &Message| {
        note.push(now());
        Ok::<(), String>(())
    })
    .source(source)
    .rate_limit(RateLimit::fixed_window(10, ms(50)))
    .start()
    .unwrap();
    feed.test_batch(numbers(60));
    times.wait(1);
    pipeline.drain();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 60);
    for (n, at) in times.all().iter().enumerate() {
        let windows = at.duration_since(start).as_millis() / 50 + 1;
        assert!((n + 1) as u128 <= windows * 10);
    }
    let (source, feed) = testing::source();
    let pipeline = Pipeline::each(fine)
        .source(source)
        .rate_limit(RateLimit::token_bucket(1e-6, 1))
        .start()
        .unwrap();
    feed.test_batch(numbers(5));
    eventually("the first", || pipeline.metrics().ledger.succeeded == 1);
    let report = pipeline.stop(ms(1000));
    all_well(&report);
    assert_eq!(texts(&report.returned), ["1", "2", "3", "4"]);
}

#[test]
fn a_pause_while_a_source_waits_for_the_rate_loses_nothing() {
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(fine)
        .source_with(source, acknowledger.clone())
        .rate_limit(RateLimit::token_bucket(200.0, 1))
        .start()
        .unwrap();
    feed.test_batch(numbers(30));
    assert!(acknowledger.wait_succeeded(1, LONG));
    for _ in 0..10 {
        pipeline.pause();
        pass(ms(2));
        pipeline.resume();
    }
    pipeline.pause();
    assert!(acknowledger.wait_succeeded(30, LONG), "what was accepted is still processed");
    ends_well(&pipeline);
}
