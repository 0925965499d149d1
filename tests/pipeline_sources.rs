//! Where messages come from: iterators, channels, several, a user's own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::sync::Arc;
use std::time::Duration;

use bench::*;
use broadsock::crossbeam_channel::{Sender, bounded};
use broadsock::testing::{self, TestAcknowledger, TestMessage};
use broadsock::{
    ErrorKind, Message, Pipeline, PipelineEvent, Pull, Report, Settler, Source, Stop, sources,
};

fn fine(_: &Message) -> Result<(), String> {
    Ok(())
}

#[test]
fn an_iterator_of_texts_and_bytes_ends_the_pipeline() {
    let acknowledger = TestAcknowledger::new();
    let report = Pipeline::each(fine)
        .source_with(sources::iter([b"text".to_vec(), vec![0xff]]), acknowledger.clone())
        .source_with(sources::iter(Vec::<String>::new()), acknowledger.clone())
        .processors(1)
        .start()
        .unwrap()
        .join();
    all_well(&report);
    let messages = acknowledger.succeeded();
    assert_eq!(messages[0].message.text(), Some("text"));
    assert_eq!((messages[1].message.text(), messages[1].message.as_bytes()), (None, &[0xff][..]));
    assert_eq!(messages[1].message.metadata().sequence, 2);
}

#[test]
fn what_an_iterator_has_given_does_not_wait_for_the_rest() {
    let gate = Gate::new();
    let held = gate.clone();
    let acknowledger = TestAcknowledger::new();
    let items = numbers(3).into_iter().chain(std::iter::once_with(move || {
        held.enter();
        "late".to_owned()
    }));
    // Whatever blocks comes after a break, so that a pull can end before it.
    let items = items.inspect(|_| pass(ms(5)));
    let pipeline = Pipeline::each(fine)
        .source_with(sources::iter(items), acknowledger.clone())
        .start()
        .unwrap();
    assert!(acknowledger.wait_succeeded(3, LONG));
    gate.open();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 4);
}

#[test]
fn what_an_iterator_has_given_before_it_panics_is_processed() {
    let items = (0..20).map(|number: u32| {
        assert!(number < 10, "no more");
        number.to_string()
    });
    let report = Pipeline::each(fine).source(sources::iter(items)).start().unwrap().join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 10);
    assert!(report.error.is_some_and(|error| error.chain().contains("no more")));
}

#[test]
fn a_channel_ends_the_pipeline_when_its_senders_are_gone() {
    let (sender, receiver) = bounded(4);
    let pipeline = Pipeline::each(fine).source(sources::channel(receiver)).start().unwrap();
    for text in numbers(100) {
        sender.send(text).unwrap();
    }
    assert!(!pipeline.has_ended());
    drop(sender);
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 100);
}

#[test]
fn a_source_that_has_nothing_takes_no_room_from_the_others() {
    let (idle, feed) = testing::source();
    let (sender, receiver) = bounded(4);
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(fine)
        .source(idle)
        .source_with(sources::channel(receiver), acknowledger.clone())
        .max_in_flight(2)
        .start()
        .unwrap();
    // Both wait in their sources, with the room that they have.
    pass(ms(20));
    for text in numbers(100) {
        sender.send_timeout(text, LONG).unwrap();
    }
    assert!(acknowledger.wait_succeeded(100, LONG));
    drop((sender, feed));
    all_well(&pipeline.join());
}

#[test]
fn the_pipeline_ends_with_the_last_of_several_sources() {
    let (source, feed) = testing::source();
    let (sender, receiver) = bounded(4);
    let pipeline = Pipeline::each(fine)
        .source(sources::iter(numbers(10)))
        .source(sources::channel(receiver))
        .source(source)
        .start()
        .unwrap();
    eventually("the iterator's", || pipeline.metrics().ledger.succeeded == 10);
    sender.send("a").unwrap();
    drop(sender);
    eventually("the channel's", || pipeline.metrics().ledger.succeeded == 11);
    feed.test_message("b");
    feed.end();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!((report.ledger.succeeded, report.sources.len()), (12, 3));
    assert!(!feed.test_message("c"));
}

/// Counts to ten, keeps books, and says how it was asked.
struct Own {
    next: u32,
    asked: Noted<usize>,
    closed: Noted<Duration>,
    settled: Noted<(String, bool)>,
}

impl Source for Own {
    fn pull(&mut self, most: usize, _: &Stop) -> Pull {
        self.asked.push(most);
        if self.next == 10 {
            return Pull::Ended;
        }
        if self.asked.len().is_multiple_of(2) {
            return Pull::Messages(Vec::new());
        }
        let count = most.min(2).min(10 - self.next as usize);
        let numbers = (0..count).map(|_| {
            self.next += 1;
            TestMessage::text((self.next - 1).to_string()).build()
        });
        Pull::Messages(numbers.collect())
    }

    fn end(&mut self, deadline: Duration) -> Option<Report> {
        self.closed.push(deadline);
        None
    }

    fn settler(&self) -> Option<Arc<dyn Settler>> {
        Some(Arc::new(Books(self.settled.clone())))
    }
}

struct Books(Noted<(String, bool)>);

impl Settler for Books {
    fn settled(&self, message: &Message, success: bool) {
        self.0.push((message.to_string(), success));
        if message.text() == Some("5") {
            panic!("asked to panic");
        }
    }
}

#[test]
fn a_users_own_source_is_asked_within_room_closed_once_and_told_of_each_message() {
    let own = Own {
        next: 0,
        asked: Noted::default(),
        closed: Noted::default(),
        settled: Noted::default(),
    };
    let (asked, closed, settled) = (own.asked.clone(), own.closed.clone(), own.settled.clone());
    let pipeline = Pipeline::each(
        |message: &Message| {
            if number(message) % 4 == 3 { Err("a fourth") } else { Ok(()) }
        },
    )
    .source(own)
    .processors(1)
    .max_in_flight(3)
    .start()
    .unwrap();
    let report = pipeline.join();
    all_well(&report);
    assert!(asked.all().iter().all(|most| (1..=3).contains(most)), "{:?}", asked.all());
    assert_eq!(closed.len(), 1);
    let mut settled = settled.all();
    settled.sort();
    let expected: Vec<_> =
        numbers(10).into_iter().map(|n| (n.clone(), n != "3" && n != "7")).collect();
    assert_eq!(settled, expected);
    assert_eq!((pipeline.metrics().panics, pipeline.metrics().restarts), (1, 0));
}

/// Breaks in the hook of this name.
struct Broken(&'static str, bool);

impl Broken {
    fn at(&self, hook: &str) {
        assert!(self.0 != hook, "asked to panic");
    }
}

impl Source for Broken {
    fn pull(&mut self, _: usize, _: &Stop) -> Pull {
        if !std::mem::replace(&mut self.1, true) {
            return Pull::Messages(vec![TestMessage::text("a").build()]);
        }
        self.at("pull");
        Pull::Ended
    }

    fn end(&mut self, _: Duration) -> Option<Report> {
        self.at("end");
        None
    }

    fn settler(&self) -> Option<Arc<dyn Settler>> {
        self.at("settler");
        None
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        self.at("drop");
    }
}

#[test]
fn a_source_that_panics_has_ended_is_reported_and_harms_no_other() {
    for hook in ["pull", "end", "drop"] {
        let pipeline = Pipeline::each(fine)
            .source(Broken(hook, false))
            .source(sources::iter(numbers(100)))
            .start()
            .unwrap();
        let events = pipeline.events();
        let report = pipeline.join();
        all_well(&report);
        assert_eq!(report.ledger.succeeded, 101, "{hook}");
        let cause = report.error.map(|error| error.chain());
        assert_eq!(cause.is_some(), hook == "pull", "{cause:?}");
        let named = format!("Source::{hook}");
        let told = events
            .iter()
            .any(|event| matches!(event, PipelineEvent::Panic { hook, .. } if hook == named));
        assert!(told, "{hook}");
    }
}

#[test]
fn a_source_whose_books_cannot_be_had_is_refused_at_the_start() {
    let error = Pipeline::each(fine).source(Broken("settler", false)).start().unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Setting("source"));
}

/// Is sent more as soon as it is closed.
struct SentLate(Box<dyn Source>, Sender<&'static str>);

impl Source for SentLate {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        self.0.pull(most, stop)
    }

    fn end(&mut self, deadline: Duration) -> Option<Report> {
        let report = self.0.end(deadline);
        (0..3).for_each(|_| self.1.send("late").unwrap());
        report
    }
}

#[test]
fn what_a_channel_holds_at_its_close_is_processed_and_nothing_that_comes_later() {
    let gate = Gate::new();
    let held = gate.clone();
    let seen = Noted::default();
    let note = seen.clone();
    let (sender, receiver) = bounded(10);
    ["a", "b", "c"].into_iter().for_each(|text| sender.send(text).unwrap());
    let left = receiver.clone();
    let pipeline = Pipeline::each(move |message: &Message| {
        held.enter();
        note.push(message.to_string());
        Ok::<(), String>(())
    })
    .source(SentLate(Box::new(sources::channel(receiver)), sender))
    .processors(1)
    .max_in_flight(1)
    .start()
    .unwrap();
    gate.entered.wait(1);
    pipeline.drain();
    eventually("the close", || left.len() == 5);
    gate.open();
    all_well(&pipeline.join());
    assert_eq!((seen.all(), left.len()), (vec!["a".into(), "b".into(), "c".into()], 3));
}
