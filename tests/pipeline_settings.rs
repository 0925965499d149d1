//! Settings that cannot be used are refused at the start, by name.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::time::Duration;

use bench::*;
use broadsock::{
    Backoff, Batching, ErrorKind, Intensity, Pipeline, PipelineBuilder, RateLimit, sources,
};

fn builder() -> PipelineBuilder<Hands> {
    Pipeline::builder(Hands::new(to_batch)).source(sources::iter(numbers(10)))
}

fn batch(batching: Batching<String>) -> PipelineBuilder<Hands> {
    builder().batcher("batch", batching)
}

#[test]
fn bad_settings_fail_at_the_start_and_are_named() {
    let none = Duration::ZERO;
    let never = Intensity { restarts: 1, within: none };
    let b = Batching::<String>::new;
    let table: Vec<(&str, &str, PipelineBuilder<Hands>)> = vec![
        ("source", "none", Pipeline::builder(Hands::new(to_batch))),
        ("processors", "at least 1", builder().processors(0)),
        ("processors", "at most", builder().processors(usize::MAX)),
        ("queue", "at least 1", builder().queue(0)),
        ("queue", "at most", builder().queue(usize::MAX)),
        ("chunk", "at least 1", builder().chunk(0)),
        ("max_in_flight", "at least 1", builder().max_in_flight(0)),
        ("max_in_flight", "each source", builder().source(sources::iter(["a"])).max_in_flight(1)),
        ("retries", "at least 1", builder().retries(0, Backoff::default())),
        ("batcher", "empty", builder().batcher("", b())),
        ("restart_intensity", "within", builder().restart_intensity(never)),
        ("retries", "base", builder().retries(2, Backoff::exponential(none, none))),
        ("hold_order", "partition_by", builder().hold_order()),
        ("rate_limit", "burst", builder().rate_limit(RateLimit::token_bucket(1.0, 0))),
        ("rate_limit", "interval", builder().rate_limit(RateLimit::fixed_window(1, none))),
        ("handler_timeout", "more than zero", builder().handler_timeout(none)),
        ("batcher", "two named \"batch\"", batch(b()).batcher("batch", b())),
        ("batcher", "thread's name", builder().batcher("a\0b", b())),
        ("batcher", "`size` of \"batch\"", batch(b().size(0))),
        ("batcher", "`size` of \"batch\"", batch(b().size_by(0, |_| 1))),
        ("batcher", "`concurrency` of \"batch\" must be at least", batch(b().concurrency(0))),
        ("batcher", "`concurrency` of \"batch\" must be at most", batch(b().concurrency(1 << 40))),
        ("batcher", "`max_keys` of \"batch\"", batch(b().max_keys(0))),
        ("batcher", "`timeout` of \"batch\"", batch(b().timeout(none))),
    ];
    for (setting, words, builder) in table {
        let error = builder.start().expect_err(setting);
        match error.kind() {
            ErrorKind::Setting(name) => assert_eq!(*name, setting, "{error}"),
            other => panic!("{setting}: {other:?}"),
        }
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn absurdly_large_settings_do_no_harm() {
    let gate = Gate::new();
    let held = gate.clone();
    let hands = Hands::new(to_batch).batch(move |_| {
        held.enter();
        Err("never".into())
    });
    let forever = Duration::MAX;
    let pipeline = Pipeline::builder(hands)
        .source(sources::iter(numbers(10)))
        .processors(2)
        .queue(1 << 20)
        .chunk(usize::MAX)
        .max_in_flight(usize::MAX)
        .retries(u32::MAX, Backoff::constant(forever))
        .rate_limit(RateLimit::token_bucket(f64::MAX, u32::MAX))
        .handler_timeout(forever)
        .restart_intensity(Intensity { restarts: u32::MAX, within: forever })
        .batcher("batch", Batching::new().size(5).timeout(forever).max_keys(usize::MAX))
        .batcher("huge", Batching::new().size(usize::MAX).timeout(forever))
        .start()
        .unwrap();
    gate.entered.wait(1);
    pipeline.set_rate_limit(RateLimit::fixed_window(u32::MAX, forever)).unwrap();
    gate.open();
    eventually("retries that never come", || pipeline.metrics().retries == 10);
    pipeline.pause();
    let report = pipeline.stop(ms(1000));
    all_well(&report);
    assert_eq!(report.returned.len(), 10);
}

#[test]
fn an_endless_deadline_of_a_stop_does_no_harm() {
    let pipeline = builder().batcher("batch", Batching::new()).start().unwrap();
    let report = pipeline.stop(Duration::MAX);
    all_well(&report);
    assert_eq!(report.ledger.returned, 0);
}

#[test]
fn a_start_that_is_refused_starts_nothing() {
    let alive = std::sync::Arc::new(());
    let weak = std::sync::Arc::downgrade(&alive);
    let hands = Hands::new(move |message| {
        let _ = &alive;
        to_batch(message)
    });
    let refused = Pipeline::builder(hands).source(sources::iter(["a"])).chunk(0).start();
    assert!(refused.is_err() && weak.upgrade().is_none());
}
