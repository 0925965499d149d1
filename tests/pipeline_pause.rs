//! Pausing, draining, and sources that end late or not at all.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use bench::*;
use broadsock::crossbeam_channel::bounded;
use broadsock::testing::{self, TestAcknowledger};
use broadsock::{Batching, Message, Pipeline, Pull, Source, Stop, sources};

fn fine(_: &Message) -> Result<(), String> {
    Ok(())
}

#[test]
fn what_channels_and_endless_iterators_give_after_the_stop_is_not_waited_for() {
    let (sender, receiver) = bounded::<String>(8);
    let stopped = Arc::new(AtomicBool::new(false));
    let feeder = spawn({
        let stopped = Arc::clone(&stopped);
        move || {
            while !stopped.load(SeqCst) {
                let _ = sender.send_timeout("a".to_owned(), ms(10));
            }
        }
    });
    let pipeline = Pipeline::each(fine)
        .source(sources::channel(receiver))
        .source(sources::iter(std::iter::repeat("endless")))
        .max_in_flight(100)
        .start()
        .unwrap();
    eventually("work", || pipeline.metrics().ledger.succeeded > 1000);
    let report = ends_well(&pipeline);
    stopped.store(true, SeqCst);
    feeder.join().unwrap();
    all_well(&report);
    assert!(report.error.is_none(), "{:?}", report.error);
    assert_eq!(report.ledger.returned, 0);
}

/// Says when it is being asked.
struct Paced(Arc<Mutex<bool>>, Box<dyn Source>);

impl Source for Paced {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        *lock(&self.0) = true;
        let pulled = self.1.pull(most, stop);
        *lock(&self.0) = false;
        pulled
    }

    fn end(&mut self, deadline: std::time::Duration) -> Option<broadsock::Report> {
        self.1.end(deadline)
    }
}

#[test]
fn a_paused_pipeline_takes_in_nothing_but_processes_what_it_has() {
    let gate = Gate::new();
    let held = gate.clone();
    let asked = Arc::default();
    let (source, feed) = testing::source();
    let acknowledger = TestAcknowledger::new();
    let pipeline = Pipeline::each(move |_: &Message| {
        held.enter();
        Ok::<(), String>(())
    })
    .source_with(Paced(Arc::clone(&asked), Box::new(source)), acknowledger.clone())
    .start()
    .unwrap();
    feed.test_message("a");
    gate.entered.wait(1);
    pipeline.pause();
    eventually("the end of the pull", || !*lock(&asked));
    feed.test_batch(["b", "c"]);
    gate.open();
    assert!(acknowledger.wait_succeeded(1, LONG));
    pass(ms(20));
    assert_eq!(pipeline.metrics().ledger.accepted, 1);
    pipeline.resume();
    assert!(acknowledger.wait_succeeded(3, LONG));
    ends_well(&pipeline);
}

#[test]
fn a_paused_pipeline_can_be_drained_and_stopped() {
    for drain in [true, false] {
        let (source, feed) = testing::source();
        let pipeline = Pipeline::each(fine).source(source).start().unwrap();
        pipeline.pause();
        feed.test_batch(numbers(3));
        let report = if drain {
            pipeline.drain();
            pipeline.join()
        } else {
            pipeline.stop(LONG)
        };
        all_well(&report);
        // What its sources had is processed, paused or not.
        assert_eq!(report.ledger.succeeded, 3);
        pipeline.resume();
        assert!(pipeline.has_ended());
    }
}

#[test]
fn a_source_is_closed_at_once_when_there_is_no_room_for_its_messages() {
    let gate = Gate::new();
    let held = gate.clone();
    let closed = Noted::default();
    let pipeline = Pipeline::each(move |_: &Message| {
        held.enter();
        Ok::<(), String>(())
    })
    .source(Closes(closed.clone()))
    .processors(1)
    .max_in_flight(2)
    .start()
    .unwrap();
    gate.entered.wait(1);
    eventually("no room", || pipeline.metrics().ledger.in_flight == 2);
    pipeline.drain();
    closed.wait(1);
    gate.open();
    all_well(&pipeline.join());
    assert_eq!(closed.len(), 1, "closed once");
}

#[test]
fn a_source_is_closed_at_once_when_the_queue_has_no_room_for_its_messages() {
    let gate = Gate::new();
    let held = gate.clone();
    let (sender, receiver) = bounded::<String>(200);
    for text in numbers(100) {
        sender.send(text).unwrap();
    }
    let closed = Noted::default();
    let pipeline = Pipeline::each(move |_: &Message| {
        held.enter();
        Ok::<(), String>(())
    })
    .source(Told(closed.clone(), Box::new(sources::channel(receiver))))
    .processors(1)
    .queue(1)
    .chunk(1)
    .start()
    .unwrap();
    gate.entered.wait(1);
    pipeline.drain();
    closed.wait(1);
    for text in numbers(100) {
        sender.send(text).unwrap();
    }
    gate.open();
    let report = pipeline.join();
    all_well(&report);
    assert_eq!(report.ledger.accepted, 100, "nothing that came after the drain");
}

/// Tells of its close.
struct Told(Noted<()>, Box<dyn Source>);

impl Source for Told {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        self.1.pull(most, stop)
    }

    fn end(&mut self, deadline: std::time::Duration) -> Option<broadsock::Report> {
        let report = self.1.end(deadline);
        self.0.push(());
        report
    }
}

/// Ends when its gate is open.
struct Lingers(Gate);

impl Source for Lingers {
    fn pull(&mut self, _: usize, _: &Stop) -> Pull {
        self.0.enter();
        Pull::Ended
    }
}

/// Gives one message, and stays open until that is settled.
struct Answers {
    given: bool,
    quiet: Noted<()>,
    closed: bool,
}

impl Source for Answers {
    fn pull(&mut self, _: usize, stop: &Stop) -> Pull {
        if self.closed {
            return Pull::Ended;
        }
        if !std::mem::replace(&mut self.given, true) {
            return Pull::Messages(vec![testing::TestMessage::text("a").build()]);
        }
        let _ = stop.signal().recv();
        Pull::Messages(Vec::new())
    }

    fn stop_reading(&mut self) -> bool {
        self.quiet.push(());
        true
    }

    fn end(&mut self, _: std::time::Duration) -> Option<broadsock::Report> {
        self.closed = true;
        None
    }
}

#[test]
fn an_open_batch_does_not_wait_for_its_time_when_a_source_ends_last_but_the_answering() {
    let (gate, quiet) = (Gate::new(), Noted::default());
    let pipeline = Pipeline::builder(Hands::new(to_batch))
        .source(Answers { given: false, quiet: quiet.clone(), closed: false })
        .source(Lingers(gate.clone()))
        .batcher("batch", Batching::new().timeout(LONG * 10))
        .start()
        .unwrap();
    gate.entered.wait(1);
    eventually("the item", || pipeline.metrics().stages[1].queued == 1);
    pipeline.drain();
    quiet.wait(1);
    // By then the first source waits for its message.
    pass(ms(50));
    gate.open();
    let drained = now();
    let report = pipeline.join();
    assert!(drained.elapsed() < LONG, "it waited for the batch's time");
    all_well(&report);
    assert_eq!(report.ledger.succeeded, 1);
}

/// Has always another message, until it is closed.
struct Closes(Noted<()>);

impl Source for Closes {
    fn pull(&mut self, _: usize, _: &Stop) -> Pull {
        match self.0.len() {
            0 => Pull::Messages(vec![testing::TestMessage::text("a").build()]),
            _ => Pull::Ended,
        }
    }

    fn end(&mut self, _: std::time::Duration) -> Option<broadsock::Report> {
        self.0.push(());
        None
    }
}

/// Does not look at its stop.
struct Deaf(Gate);

impl Source for Deaf {
    fn pull(&mut self, _: usize, _: &Stop) -> Pull {
        self.0.enter();
        Pull::Messages(vec![testing::TestMessage::text("late").build()])
    }
}

#[test]
fn a_source_that_does_not_return_is_named_and_what_it_gives_later_is_not_accepted() {
    let gate = Gate::new();
    let alive = Arc::new(());
    let weak = Arc::downgrade(&alive);
    let pipeline = Pipeline::each(move |_: &Message| {
        let _ = &alive;
        Ok::<(), String>(())
    })
    .source(Deaf(gate.clone()))
    .start()
    .unwrap();
    gate.entered.wait(1);
    let report = pipeline.stop(ms(1000));
    stuck(&report, &["broadsock-source-0"]);
    gate.open();
    let control = Arc::new(pipeline);
    eventually("the thread's end", || Arc::strong_count(&control) == 1);
    let ledger = control.metrics().ledger;
    assert_eq!((ledger.accepted, ledger.balanced()), (0, true));
    drop(control);
    eventually("the thread's end", || weak.upgrade().is_none());
}

/// Waits to be told to stop, and knows nothing of a close.
struct Waits(Noted<()>);

impl Source for Waits {
    fn pull(&mut self, _: usize, stop: &Stop) -> Pull {
        self.0.push(());
        let _ = stop.signal().recv();
        Pull::Messages(Vec::new())
    }
}

#[test]
fn a_source_that_waits_for_its_stop_also_after_its_close_has_ended() {
    let asked = Noted::default();
    let pipeline = Pipeline::each(fine).source(Waits(asked.clone())).start().unwrap();
    asked.wait(1);
    pipeline.drain();
    eventually("the end", || pipeline.has_ended());
    assert_eq!(asked.len(), 2);
}

#[test]
fn a_stop_before_the_first_pull_ends_a_source_all_the_same() {
    for _ in 0..50 {
        let pipeline = Pipeline::each(fine).source(Waits(Noted::default())).start().unwrap();
        pipeline.drain();
        eventually("the end", || pipeline.has_ended());
    }
}
