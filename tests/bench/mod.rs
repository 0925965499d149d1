//! What the tests of pipelines share. Every wait is bounded by [`LONG`], which
//! says only that something happens, not how fast.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use broadsock::crossbeam_channel::{Receiver, after, select};
use broadsock::{
    Batch, Failed, Failure, Handler, Message, Next, Pipeline, PipelineEvent, PipelineReport,
    Trigger,
};

pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[allow(clippy::disallowed_methods, reason = "tests run on real time")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[allow(clippy::disallowed_methods, reason = "a thread of the test's own")]
pub(crate) fn spawn<T: Send + 'static>(
    body: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::spawn(body)
}

/// Lets some time pass.
pub(crate) fn pass(time: Duration) {
    let _ = after(time).recv();
}

/// Waits until it holds.
pub(crate) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = now();
    while !holds() {
        assert!(start.elapsed() < LONG, "{what} did not come");
        pass(ms(1));
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn numbers(count: u32) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

pub(crate) fn number(message: &Message) -> u64 {
    message.text().and_then(|text| text.parse().ok()).unwrap_or(0)
}

pub(crate) fn thread() -> String {
    std::thread::current().name().unwrap_or_default().to_owned()
}

pub(crate) fn texts(messages: &[Message]) -> Vec<String> {
    messages.iter().map(ToString::to_string).collect()
}

/// Everything is accounted for, and no thread hangs.
#[track_caller]
pub(crate) fn all_well(report: &PipelineReport) {
    assert!(report.ledger.balanced(), "{}", report.ledger);
    assert_eq!(report.ledger.in_flight, 0);
    assert_eq!(report.returned.len() as u64, report.ledger.returned);
    assert!(report.stuck.is_empty(), "{:?}", report.stuck);
}

/// It ends when it is told to, and not by the deadline.
#[track_caller]
pub(crate) fn ends_well(pipeline: &Pipeline) -> PipelineReport {
    let start = now();
    let report = pipeline.stop(LONG);
    assert!(start.elapsed() < LONG / 2, "something waits for the deadline");
    all_well(&report);
    report
}

/// These threads hang, and no others. On a busy machine the monitor may have had
/// no time for its verdict.
#[track_caller]
pub(crate) fn stuck(report: &PipelineReport, names: &[&str]) {
    let mut stuck = report.stuck.clone();
    if stuck.iter().any(|name| name == "broadsock-monitor") {
        stuck.retain(|name| name != "broadsock-monitor" && name != "broadsock-timer");
    }
    stuck.sort();
    assert_eq!(stuck, names);
}

type OnMessage = dyn Fn(&Message) -> Result<Next<String>, Failure> + Send + Sync;
type OnBatch = dyn Fn(&mut Batch<String>) -> Result<(), Failure> + Send + Sync;
type OnFailed = dyn Fn(&[Failed]) + Send + Sync;
type OnPrepare = dyn Fn(&[Message]) -> Result<(), Failure> + Send + Sync;

/// A handler made of functions, which notes the batches it was given.
pub(crate) struct Hands {
    message: Box<OnMessage>,
    batch: Box<OnBatch>,
    failed: Box<OnFailed>,
    prepare: Box<OnPrepare>,
    pub(crate) batches: Noted<Seen>,
}

/// A batch as its handler saw it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) items: Vec<String>,
    pub(crate) trigger: Trigger,
    pub(crate) key: Option<String>,
    pub(crate) thread: String,
}

/// Passes every text on to the batcher `batch`.
pub(crate) fn to_batch(message: &Message) -> Result<Next<String>, Failure> {
    Ok(Next::to("batch", message.to_string()))
}

impl Hands {
    pub(crate) fn new(
        message: impl Fn(&Message) -> Result<Next<String>, Failure> + Send + Sync + 'static,
    ) -> Self {
        Self {
            message: Box::new(message),
            batch: Box::new(|_| Ok(())),
            failed: Box::new(|_| ()),
            prepare: Box::new(|_| Ok(())),
            batches: Noted::default(),
        }
    }

    pub(crate) fn batch(
        mut self,
        batch: impl Fn(&mut Batch<String>) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        self.batch = Box::new(batch);
        self
    }

    pub(crate) fn failed(mut self, failed: impl Fn(&[Failed]) + Send + Sync + 'static) -> Self {
        self.failed = Box::new(failed);
        self
    }

    pub(crate) fn prepare(
        mut self,
        prepare: impl Fn(&[Message]) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        self.prepare = Box::new(prepare);
        self
    }
}

impl Handler for Hands {
    type Item = String;

    fn prepare(&self, messages: &[Message]) -> Result<(), Failure> {
        (self.prepare)(messages)
    }

    fn handle_message(&self, message: &Message) -> Result<Next<String>, Failure> {
        (self.message)(message)
    }

    fn handle_batch(&self, batch: &mut Batch<String>) -> Result<(), Failure> {
        self.batches.push(Seen {
            items: batch.items().cloned().collect(),
            trigger: batch.trigger(),
            key: batch.key().map(str::to_owned),
            thread: thread(),
        });
        (self.batch)(batch)
    }

    fn handle_failed(&self, failed: &[Failed]) {
        (self.failed)(failed);
    }
}

/// What happened, in order, to be waited for.
#[derive(Debug)]
pub(crate) struct Noted<T>(Arc<(Mutex<Vec<T>>, Condvar)>);

impl<T> Clone for Noted<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Noted<T> {
    fn default() -> Self {
        Self(Arc::new((Mutex::new(Vec::new()), Condvar::new())))
    }
}

impl<T: Clone> Noted<T> {
    /// Notes it, and returns how many there are now.
    pub(crate) fn push(&self, value: T) -> usize {
        let mut noted = lock(&self.0.0);
        noted.push(value);
        self.0.1.notify_all();
        noted.len()
    }

    pub(crate) fn all(&self) -> Vec<T> {
        lock(&self.0.0).clone()
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.0.0).len()
    }

    /// Waits for so many; returns all.
    #[track_caller]
    pub(crate) fn wait(&self, count: usize) -> Vec<T> {
        let few = |noted: &mut Vec<T>| noted.len() < count;
        let (noted, _) = self
            .0
            .1
            .wait_timeout_while(lock(&self.0.0), LONG, few)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(noted.len() >= count, "{} of {count}", noted.len());
        noted.clone()
    }
}

/// Holds up whoever goes through, until it is opened.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    state: Arc<(Mutex<bool>, Condvar)>,
    /// The threads that got here.
    pub(crate) entered: Noted<String>,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self { state: Arc::default(), entered: Noted::default() }
    }

    /// Waits until it is open: for ever, if nobody opens it.
    pub(crate) fn enter(&self) {
        self.entered.push(thread());
        let open = lock(&self.state.0);
        drop(self.state.1.wait_while(open, |open| !*open).unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn open(&self) {
        *lock(&self.state.0) = true;
        self.state.1.notify_all();
    }
}

/// Waits for an event for which `pick` finds something.
#[track_caller]
pub(crate) fn find<T>(
    events: &Receiver<PipelineEvent>,
    mut pick: impl FnMut(&PipelineEvent) -> Option<T>,
) -> T {
    let deadline = after(LONG);
    loop {
        let event = select! {
            recv(events) -> event => event.expect("the event before the end"),
            recv(deadline) -> _ => panic!("no such event"),
        };
        if let Some(found) = pick(&event) {
            return found;
        }
    }
}
