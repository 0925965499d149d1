//! [`Pipeline`]: worker pools between a source and its acknowledgements.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, bounded};

use crate::error::Error;
use crate::event::counted;
use crate::io::clock::Clock;
use crate::logic::backoff::Backoff;
use crate::logic::batch::BatchPolicy;
use crate::logic::rate::{Limiter, RateLimit};
use crate::logic::restart::Intensity;
use crate::message::Message;
use crate::metrics::{PipelineLedger, Report};
use crate::threads::events::{Hub, Observer};
use crate::threads::monitor::{NOTICES, Notice};
use crate::threads::pipeline::batcher::{Batcher, Weigh};
use crate::threads::pipeline::pool::Pool;
use crate::threads::pipeline::stats::PipelineEvent;
use crate::threads::pipeline::supervisor::Supervisor;
use crate::threads::pipeline::{
    Ending, Flow, FlowPolicy, Partition, Phase, Retries, SourceSlot, lock,
};
use crate::threads::{JoinHandle, Spawner, contained, tell_backoff_panic};
use crate::work::{Acknowledger, Failure, Handler, NoAcknowledger, Source};

/// How long a pipeline that is dropped without `stop` may take to end.
const DROP_DEADLINE: Duration = Duration::from_secs(1);

/// The most workers of one pool.
const MOST_THREADS: usize = 4096;

/// The longest queue: its memory is taken at the start.
const MOST_QUEUED: usize = 1 << 20;

/// Sources, processors, batchers and acknowledgers, running.
///
/// A pipeline is what Broadway is to Elixir: it takes messages from its
/// sources, handles each on one of its processor threads, groups results into
/// batches, retries what fails, acknowledges every message exactly once, and
/// accounts for all of them.
///
/// ```
/// use broadsock::{Message, Pipeline, sources};
///
/// let pipeline = Pipeline::each(|message: &Message| {
///     message.text().unwrap_or_default().parse::<u32>().map(drop)
/// })
/// .source(sources::iter(["1", "2", "three"]))
/// .processors(2)
/// .start()?;
/// let report = pipeline.join();
/// assert_eq!((report.ledger.succeeded, report.ledger.failed), (2, 1));
/// # Ok::<(), broadsock::Error>(())
/// ```
///
/// Dropping a pipeline stops it, within a second.
pub struct Pipeline {
    control: Arc<dyn Control>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
    ended: Receiver<()>,
}

/// A source, and who is told what became of its messages, if anybody is.
type Acknowledged = (Box<dyn Source>, Option<Arc<dyn Acknowledger>>);

/// Settings of a [`Pipeline`]. Made by [`Pipeline::builder`] or
/// [`Pipeline::each`]; checked by [`start`](PipelineBuilder::start).
#[must_use = "a builder does nothing before `start`"]
pub struct PipelineBuilder<H: Handler> {
    handler: H,
    sources: Vec<Acknowledged>,
    processors: usize,
    partition: Option<Partition>,
    queue: usize,
    chunk: usize,
    max_in_flight: usize,
    batchers: Vec<(Arc<str>, Batching<H::Item>)>,
    retries: Retries,
    rate_limit: Option<RateLimit>,
    handler_timeout: Option<Duration>,
    intensity: Intensity,
    observer: Option<Observer<PipelineEvent>>,
}

/// How a batcher groups items.
pub struct Batching<T> {
    limit: usize,
    weigh: Option<Weigh<T>>,
    timeout: Duration,
    concurrency: usize,
    max_keys: usize,
    _item: PhantomData<fn(&T)>,
}

/// What a pipeline leaves: where every message went.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PipelineReport {
    /// The ledger at the end.
    pub ledger: PipelineLedger,
    /// Messages that were not settled by the deadline, in the order in which they
    /// were accepted. One that an acknowledger was being told of at that moment is
    /// among them.
    pub returned: Vec<Message>,
    /// Threads that still ran at the deadline, by name.
    pub stuck: Vec<String>,
    /// Why the pipeline failed, or a source of it, if one did.
    pub error: Option<Error>,
    /// The report of each source that has one, such as a client, in order.
    pub sources: Vec<Option<Report>>,
}

/// Everything a pipeline counts, at one instant.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PipelineSnapshot {
    /// Where every message is.
    pub ledger: PipelineLedger,
    /// How long ago the oldest message in flight was accepted.
    pub oldest: Option<Duration>,
    /// The processors together, then each batcher, by name.
    pub stages: Vec<StageSnapshot>,
    /// Tries after the first.
    pub retries: u64,
    /// Panics of user code.
    pub panics: u64,
    /// Worker threads that were replaced.
    pub restarts: u64,
    /// Messages whose acknowledgement went well.
    pub acknowledged: u64,
    /// Messages whose acknowledger failed.
    pub acknowledge_failures: u64,
    /// Time from receipt to settlement of the messages that succeeded:
    /// `latency[n]` counts those below 2^n microseconds and above the one before.
    pub latency: Vec<u64>,
    /// The sum of these times, each counted up to an hour.
    pub latency_sum: Duration,
}

/// What one stage counts.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StageSnapshot {
    /// `processors`, or the batcher's name.
    pub name: String,
    /// Messages or items that wait for a worker.
    pub queued: usize,
    /// Each worker, in order.
    pub workers: Vec<WorkerSnapshot>,
    /// Batches closed, by trigger: size, timeout, flush, keys, drain. All zero
    /// for processors.
    pub batches: [u64; 5],
    /// Items in those batches.
    pub batched: u64,
}

/// What one worker counts.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct WorkerSnapshot {
    /// Its thread's name.
    pub thread: String,
    /// Messages or batches handled.
    pub handled: u64,
    /// Of these, how many failed.
    pub failed: u64,
    /// Time spent in the handler. While its calls take less than 2 microseconds
    /// each, what lies between them (some 50 nanoseconds) counts as well.
    pub busy: Duration,
    /// How long it has been in the handler; `None` while it waits. While its
    /// calls take less than 2 microseconds each, up to 16 of them count as one.
    pub running_for: Option<Duration>,
}

impl Pipeline {
    /// Settings for a pipeline with this handler.
    pub fn builder<H: Handler>(handler: H) -> PipelineBuilder<H> {
        PipelineBuilder::new(handler)
    }

    /// Settings for a pipeline that calls a function for each message, without
    /// batchers. An error fails the message.
    pub fn each<F, E>(handle: F) -> PipelineBuilder<impl Handler<Item = ()>>
    where
        F: Fn(&Message) -> Result<(), E> + Send + Sync + 'static,
        E: Into<crate::error::BoxError> + 'static,
    {
        PipelineBuilder::new(Each(handle, PhantomData))
    }

    /// Sources take in nothing until [`resume`](Pipeline::resume); what was
    /// accepted is still processed.
    pub fn pause(&self) {
        self.control.pause(true);
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.control.pause(false);
    }

    /// Closes the sources and lets the pipeline end when everything accepted is
    /// settled; partial batches are flushed. Returns at once; see
    /// [`join`](Pipeline::join).
    pub fn drain(&self) {
        self.control.drain();
    }

    /// Drains, and returns by `deadline` at the latest; what is not settled by
    /// then is returned, and threads that hang are named. Safe from any thread:
    /// on one of the pipeline's own (in a handler) it begins the stop and
    /// returns at once. A second call is harmless.
    pub fn stop(&self, deadline: Duration) -> PipelineReport {
        let clock = Clock::real();
        let now = clock.now();
        let at = now.checked_add(deadline).unwrap_or(now + Duration::from_secs(86_400));
        // The last part of the time is for threads to see that they must end, and
        // be joined: only those are stuck whose user code does not return.
        let margin = (deadline / 2).min(Duration::from_millis(400));
        let before = |part| at.checked_sub(part).unwrap_or(at);
        self.control.close(before(margin), before(margin / 4));
        if !self.control.is_own_thread() {
            match self.ended.recv_deadline(at) {
                Err(RecvTimeoutError::Disconnected) => self.join_supervisor(),
                // Whatever keeps the monitor: the report is final.
                _ => self.control.end(),
            }
        }
        self.report()
    }

    /// Waits until the pipeline has ended: its sources did, or it was stopped.
    /// On one of the pipeline's own threads it returns at once.
    pub fn join(&self) -> PipelineReport {
        if !self.control.is_own_thread() {
            // An error is the end: nothing is ever sent.
            let _ = self.ended.recv();
            self.join_supervisor();
        }
        self.report()
    }

    /// Whether the pipeline has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// All counters, at this instant.
    #[must_use]
    pub fn metrics(&self) -> PipelineSnapshot {
        self.control.snapshot()
    }

    /// Why the pipeline, or a source of it, failed; `None` while none has. A
    /// source that panics has ended; the others go on.
    #[must_use]
    pub fn error(&self) -> Option<Error> {
        self.control.ending().error
    }

    /// A channel of events: the latest (up to 256), then all that follow, until
    /// the pipeline has ended.
    #[must_use]
    pub fn events(&self) -> Receiver<PipelineEvent> {
        self.control.events()
    }

    /// The rate limit in force.
    #[must_use]
    pub fn rate_limit(&self) -> Option<RateLimit> {
        self.control.rate_limit()
    }

    /// Changes the rate limit while running.
    ///
    /// A change as such lets nothing pass: what may pass at this moment is carried
    /// over, up to what the new limit allows. A window of the same length goes on,
    /// any other starts now, so a program that changes the length more often than
    /// windows end keeps everything waiting.
    ///
    /// # Errors
    ///
    /// The limit is unusable, or the pipeline was started without one.
    pub fn set_rate_limit(&self, limit: RateLimit) -> Result<(), Error> {
        limit.check()?;
        self.control.set_rate_limit(limit)
    }

    /// Changes the number of processors while running. A worker that is too
    /// many ends after the messages it has in hand.
    ///
    /// # Errors
    ///
    /// `processors` is zero, or the pipeline has partitions: a partition belongs
    /// to one of a fixed number of workers.
    pub fn resize(&self, processors: usize) -> Result<(), Error> {
        check_threads(processors).map_err(|why| Error::setting("processors", why))?;
        self.control.resize(processors)
    }

    /// Changes the number of a batcher's workers while running. A worker that is
    /// too many ends after its batch.
    ///
    /// # Errors
    ///
    /// `workers` is zero, there is no such batcher, or its batches belong to
    /// workers: the pipeline has partitions, or an item had a batch key.
    pub fn resize_batcher(&self, name: &str, workers: usize) -> Result<(), Error> {
        check_threads(workers)
            .map_err(|why| Error::setting("batcher", format!("`concurrency` of {name:?} {why}")))?;
        self.control.resize_batcher(name, workers)
    }

    /// Describes threads, queues and limits, a line each.
    #[must_use]
    pub fn topology(&self) -> String {
        self.control.topology()
    }

    fn join_supervisor(&self) {
        let handle = lock(&self.supervisor).take();
        if let Some(handle) = handle
            && handle.join().is_err()
        {
            log::error!("the pipeline's monitor thread panicked: please report");
        }
    }

    fn report(&self) -> PipelineReport {
        let Ending { error, mut stuck, returned, reports } = self.control.ending();
        if !self.has_ended() && !self.control.is_own_thread() {
            // Without the monitor's verdict: whoever still runs.
            stuck = self.control.running();
            stuck.push("broadsock-monitor".to_owned());
        }
        PipelineReport { ledger: self.control.ledger(), returned, stuck, error, sources: reports }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.stop(DROP_DEADLINE);
        }
    }
}

impl fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipeline").field("ledger", &self.control.ledger()).finish_non_exhaustive()
    }
}

impl<H: Handler> PipelineBuilder<H> {
    fn new(handler: H) -> Self {
        Self {
            handler,
            sources: Vec::new(),
            processors: std::thread::available_parallelism().map_or(4, usize::from),
            partition: None,
            queue: 1024,
            chunk: 64,
            max_in_flight: 10_000,
            batchers: Vec::new(),
            retries: Retries { attempts: 1, backoff: Backoff::default(), hold: false },
            rate_limit: None,
            handler_timeout: None,
            intensity: Intensity::default(),
            observer: None,
        }
    }

    /// Adds a source whose messages are not acknowledged.
    pub fn source(self, source: impl crate::work::IntoSource) -> Self {
        self.source_with(source, NoAcknowledger)
    }

    /// Adds a source, and who is told what became of its messages.
    pub fn source_with(
        mut self,
        source: impl crate::work::IntoSource,
        acknowledger: impl Acknowledger,
    ) -> Self {
        // One that does nothing need not be told, nor what it is told be made up.
        let is_deaf = (&acknowledger as &dyn Any).is::<NoAcknowledger>();
        let acknowledger: Option<Arc<dyn Acknowledger>> =
            if is_deaf { None } else { Some(Arc::new(acknowledger)) };
        self.sources.push((source.into_source(), acknowledger));
        self
    }

    /// How many processor threads there are. Defaults to the number of cores.
    pub fn processors(mut self, count: usize) -> Self {
        self.processors = count;
        self
    }

    /// Messages of one partition are handled in order, by one processor and one
    /// worker of each batcher; a slow partition slows only its own worker, until
    /// that worker's queue is full. Defaults to no partitions.
    pub fn partition_by(mut self, of: impl Fn(&Message) -> u64 + Send + Sync + 'static) -> Self {
        self.partition = Some(Arc::new(of));
        self
    }

    /// How many chunks of messages wait for the processors (for each of them,
    /// with partitions), and how many items for each batcher. Defaults to 1,024.
    pub fn queue(mut self, length: usize) -> Self {
        self.queue = length;
        self
    }

    /// How many messages a processor takes at once, and prepares together.
    /// Defaults to 64; 1 deals them out most evenly.
    pub fn chunk(mut self, messages: usize) -> Self {
        self.chunk = messages;
        self
    }

    /// How many messages may be between acceptance and settlement; at least one
    /// for each source. Defaults to 10,000.
    pub fn max_in_flight(mut self, messages: usize) -> Self {
        self.max_in_flight = messages;
        self
    }

    /// Adds a batcher. It needs a name of its own, which its threads bear.
    pub fn batcher(mut self, name: impl Into<Arc<str>>, batching: Batching<H::Item>) -> Self {
        self.batchers.push((name.into(), batching));
        self
    }

    /// A failed message is tried up to `attempts` times in all, with this delay
    /// between. Defaults to one try. A message that failed in a batch starts
    /// again with its handler.
    pub fn retries(mut self, attempts: u32, backoff: Backoff) -> Self {
        self.retries.attempts = attempts;
        self.retries.backoff = backoff;
        self
    }

    /// A processor waits in place for a retry, so that nothing of the partition
    /// overtakes it; the other partitions of that worker wait too. Defaults to
    /// going on.
    pub fn hold_order(mut self) -> Self {
        self.retries.hold = true;
        self
    }

    /// Limits how fast messages are handed to processors, over all sources,
    /// also while draining. A message counts when it enters the queue of the
    /// processors, and once, however often it is tried. Defaults to no limit.
    pub fn rate_limit(mut self, limit: RateLimit) -> Self {
        self.rate_limit = Some(limit);
        self
    }

    /// A handler that runs for longer is reported, with its thread and message.
    /// Defaults to off.
    pub fn handler_timeout(mut self, timeout: Duration) -> Self {
        self.handler_timeout = Some(timeout);
        self
    }

    /// How often the workers of one pool are replaced before the pipeline
    /// fails. Defaults to 3 restarts in 5 s. Restarts in no time at all are refused
    /// at the start.
    pub fn restart_intensity(mut self, intensity: Intensity) -> Self {
        self.intensity = intensity;
        self
    }

    /// Hears of every event, on the thread it happens on: it must not block.
    /// Panics are contained.
    pub fn observer(mut self, observer: impl Fn(&PipelineEvent) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Checks the settings and starts the threads.
    ///
    /// # Errors
    ///
    /// A setting is unusable (the error names it), or a thread could not be
    /// started.
    pub fn start(self) -> Result<Pipeline, Error> {
        self.check()?;
        let clock = Clock::real();
        let (notices, inbox) = bounded(NOTICES);
        let spawner = Spawner::new(notices);
        let batchers = self.make_batchers();
        let limiter = self.rate_limit.map(|limit| Limiter::new(limit, clock.now()));
        let (mut sources, mut slots) = (Vec::new(), Vec::new());
        for (source, acknowledger) in self.sources {
            let settler = contained(|| source.settler()).map_err(|panic| {
                Error::setting("source", format!("`settler` panicked: {panic}"))
            })?;
            slots.push(SourceSlot::new(acknowledger, settler));
            sources.push(source);
        }
        let policy = FlowPolicy {
            max_in_flight: self.max_in_flight,
            chunk: self.chunk,
            partition: self.partition,
            retry: Retries {
                backoff: self.retries.backoff.reporting(tell_backoff_panic),
                ..self.retries
            },
            handler_timeout: self.handler_timeout,
        };
        let flow = Arc::new(Flow::new(
            clock,
            policy,
            self.handler,
            slots,
            self.processors,
            self.queue,
            batchers,
            limiter,
            spawner.clone(),
            Hub::new(self.observer),
        ));
        flow.update_ending(|ending| ending.reports = vec![None; sources.len()]);
        // Before the threads, which have events of their own.
        let topology = Control::topology(&*flow);
        flow.emit(PipelineEvent::Started { topology });
        let supervisor = Supervisor::start(Arc::clone(&flow), inbox, sources, self.intensity)?;
        let (guard, ended) = bounded::<()>(0);
        let end = EndGuard { control: flow.clone(), _ended: guard };
        let handle = spawner.spawn("broadsock-monitor", usize::MAX, move || {
            let _end = end;
            supervisor.run();
        })?;
        Ok(Pipeline { control: flow, supervisor: Mutex::new(Some(handle)), ended })
    }

    fn make_batchers(&self) -> Vec<Batcher<H::Item>> {
        let mut named: Vec<_> = self.batchers.iter().collect();
        named.sort_by(|(a, _), (b, _)| a.cmp(b));
        let make = |(index, (name, batching)): (usize, &(Arc<str>, Batching<H::Item>))| {
            let policy = BatchPolicy {
                limit: batching.limit,
                timeout: batching.timeout,
                max_keys: batching.max_keys,
            };
            let weigh = batching.weigh.clone();
            let mut batcher =
                Batcher::new(Arc::clone(name), policy, batching.concurrency, self.queue, weigh);
            batcher.index = index;
            batcher
        };
        named.into_iter().enumerate().map(make).collect()
    }

    fn check(&self) -> Result<(), Error> {
        if self.sources.is_empty() {
            return Err(Error::setting("source", "there is none to take messages from"));
        }
        for (name, number) in [
            ("processors", self.processors),
            ("queue", self.queue),
            ("chunk", self.chunk),
            ("max_in_flight", self.max_in_flight),
            ("retries", self.retries.attempts as usize),
        ] {
            if number == 0 {
                return Err(Error::setting(name, "must be at least 1"));
            }
        }
        if self.max_in_flight < self.sources.len() {
            return Err(Error::setting("max_in_flight", "must be at least 1 for each source"));
        }
        check_threads(self.processors).map_err(|why| Error::setting("processors", why))?;
        if self.queue > MOST_QUEUED {
            return Err(Error::setting("queue", format!("must be at most {MOST_QUEUED}")));
        }
        self.retries.backoff.check("retries")?;
        if self.retries.hold && self.partition.is_none() {
            return Err(Error::setting("hold_order", "needs `partition_by`"));
        }
        if let Some(limit) = &self.rate_limit {
            limit.check()?;
        }
        if self.handler_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(Error::setting("handler_timeout", "must be more than zero"));
        }
        for (index, (name, batching)) in self.batchers.iter().enumerate() {
            if self.batchers[..index].iter().any(|(other, _)| other == name) {
                return Err(Error::setting("batcher", format!("there are two named {name:?}")));
            }
            if name.is_empty() {
                return Err(Error::setting("batcher", "its name is empty"));
            }
            batching.check(name)?;
        }
        self.intensity.check()?;
        Ok(())
    }
}

impl<H: Handler> fmt::Debug for PipelineBuilder<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PipelineBuilder")
            .field("sources", &self.sources.len())
            .field("processors", &self.processors)
            .field("batchers", &self.batchers)
            .finish_non_exhaustive()
    }
}

impl<T> Batching<T> {
    /// Batches of up to 100 items, closed after 1 s, by one worker.
    #[must_use]
    pub fn new() -> Self {
        Self {
            limit: 100,
            weigh: None,
            timeout: Duration::from_secs(1),
            concurrency: 1,
            max_keys: 1024,
            _item: PhantomData,
        }
    }

    /// The most items in a batch. Defaults to 100.
    #[must_use]
    pub fn size(mut self, items: usize) -> Self {
        self.limit = items;
        self.weigh = None;
        self
    }

    /// The most that the items of a batch may weigh together, such as bytes: an
    /// item that would exceed it opens the next batch. An item heavier than the
    /// limit is a batch of its own.
    #[must_use]
    pub fn size_by(
        mut self,
        limit: usize,
        weigh: impl Fn(&T) -> usize + Send + Sync + 'static,
    ) -> Self {
        self.limit = limit;
        self.weigh = Some(Arc::new(weigh));
        self
    }

    /// A batch is closed this long after its first item. Defaults to 1 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How many batches are handled at once. Defaults to 1.
    #[must_use]
    pub fn concurrency(mut self, workers: usize) -> Self {
        self.concurrency = workers;
        self
    }

    /// How many keys may have an open batch; one more closes the batch that has
    /// been open longest. Defaults to 1,024.
    #[must_use]
    pub fn max_keys(mut self, keys: usize) -> Self {
        self.max_keys = keys;
        self
    }

    fn check(&self, name: &str) -> Result<(), Error> {
        for (setting, number) in
            [("size", self.limit), ("concurrency", self.concurrency), ("max_keys", self.max_keys)]
        {
            if number == 0 {
                let why = format!("`{setting}` of {name:?} must be at least 1");
                return Err(Error::setting("batcher", why));
            }
        }
        if name.contains('\0') {
            let why = format!("{name:?} cannot be part of a thread's name");
            return Err(Error::setting("batcher", why));
        }
        if let Err(why) = check_threads(self.concurrency) {
            return Err(Error::setting("batcher", format!("`concurrency` of {name:?} {why}")));
        }
        if self.timeout.is_zero() {
            let why = format!("`timeout` of {name:?} must be more than zero");
            return Err(Error::setting("batcher", why));
        }
        Ok(())
    }
}

impl<T> Default for Batching<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for Batching<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batching")
            .field("limit", &self.limit)
            .field("timeout", &self.timeout)
            .field("concurrency", &self.concurrency)
            .finish_non_exhaustive()
    }
}

/// Refuses a number of threads that is none or more than any program has use for.
fn check_threads(count: usize) -> Result<(), String> {
    match count {
        0 => Err("must be at least 1".to_owned()),
        count if count > MOST_THREADS => Err(format!("must be at most {MOST_THREADS}")),
        _ => Ok(()),
    }
}

/// Ends every other thread when the monitor ends, also by a panic.
struct EndGuard {
    control: Arc<dyn Control>,
    _ended: crossbeam_channel::Sender<()>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.control.halt();
    }
}

/// A function as a handler.
struct Each<F, E>(F, PhantomData<fn() -> E>);

impl<F, E> Handler for Each<F, E>
where
    F: Fn(&Message) -> Result<(), E> + Send + Sync + 'static,
    E: Into<crate::error::BoxError> + 'static,
{
    type Item = ();

    fn handle_message(&self, message: &Message) -> Result<crate::work::Next<()>, Failure> {
        match (self.0)(message) {
            Ok(()) => Ok(crate::work::Next::done()),
            Err(error) => Err(Failure::new(error)),
        }
    }
}

/// A pipeline's controls, whatever its handler's type.
trait Control: Send + Sync {
    fn pause(&self, pause: bool);
    fn drain(&self);
    fn close(&self, work: Instant, end: Instant);
    fn end(&self);
    fn halt(&self);
    fn is_own_thread(&self) -> bool;
    fn running(&self) -> Vec<String>;
    fn ledger(&self) -> PipelineLedger;
    fn ending(&self) -> Ending;
    fn events(&self) -> Receiver<PipelineEvent>;
    fn snapshot(&self) -> PipelineSnapshot;
    fn rate_limit(&self) -> Option<RateLimit>;
    fn set_rate_limit(&self, limit: RateLimit) -> Result<(), Error>;
    fn resize(&self, processors: usize) -> Result<(), Error>;
    fn resize_batcher(&self, name: &str, workers: usize) -> Result<(), Error>;
    fn topology(&self) -> String;
}

impl<H: Handler> Control for Flow<H> {
    fn pause(&self, pause: bool) {
        let phase = if pause { Phase::Paused } else { Phase::Running };
        if self.enter(phase) {
            self.emit(PipelineEvent::Paused(pause));
        }
    }

    fn drain(&self) {
        if self.enter(Phase::Draining) {
            self.emit(PipelineEvent::Draining);
        }
        let _ = self.spawner.monitor.try_send(Notice::Tick);
    }

    fn close(&self, work: Instant, end: Instant) {
        self.set_deadline(work, end);
        // Not by a blocking send, which a handler must not wait for: the drain
        // posts a tick, and a full channel makes the monitor look all the same.
        self.drain();
    }

    fn end(&self) {
        self.enter(Phase::Stopped);
        self.give_back();
    }

    fn halt(&self) {
        // After an end in order, this changes nothing; else nobody else tells them.
        if self.enter(Phase::Stopped) {
            self.timer.stop();
        }
    }

    fn is_own_thread(&self) -> bool {
        self.spawner.is_own_thread()
    }

    fn running(&self) -> Vec<String> {
        Flow::running(self)
    }

    fn ledger(&self) -> PipelineLedger {
        Flow::ledger(self)
    }

    fn ending(&self) -> Ending {
        Flow::ending(self)
    }

    fn events(&self) -> Receiver<PipelineEvent> {
        self.hub.subscribe()
    }

    fn snapshot(&self) -> PipelineSnapshot {
        let now = self.clock.now();
        let waiting = self.lanes.iter().map(|lane| {
            usize::try_from(lane.queued.get()).unwrap_or(0) + lock(&lane.retries).len()
        });
        let processors = StageSnapshot {
            name: "processors".to_owned(),
            queued: waiting.sum(),
            workers: workers(&self.processors, now),
            batches: [0; 5],
            batched: 0,
        };
        let batchers = self.batchers.values().map(|batcher| StageSnapshot {
            name: batcher.name.to_string(),
            queued: batcher.queued(),
            workers: workers(&batcher.workers, now),
            batches: std::array::from_fn(|trigger| batcher.batches[trigger].get()),
            batched: batcher.batched.get(),
        });
        PipelineSnapshot {
            ledger: Flow::ledger(self),
            oldest: self.oldest(),
            stages: std::iter::once(processors).chain(batchers).collect(),
            retries: self.counters.retries.get(),
            panics: self.counters.panics.get(),
            restarts: self.counters.restarts.get(),
            acknowledged: self.counters.acknowledged.get(),
            acknowledge_failures: self.counters.acknowledge_failures.get(),
            latency: self.counters.latency.counts().to_vec(),
            latency_sum: self.counters.latency.sum(),
        }
    }

    fn rate_limit(&self) -> Option<RateLimit> {
        self.limiter.as_ref().map(|limiter| lock(limiter).limit())
    }

    fn set_rate_limit(&self, limit: RateLimit) -> Result<(), Error> {
        let Some(limiter) = &self.limiter else {
            return Err(Error::setting("rate_limit", "the pipeline was started without one"));
        };
        lock(limiter).set(limit, self.clock.now());
        // Whoever waits for the old limit looks at the new one.
        self.sources.iter().for_each(SourceSlot::interrupt);
        Ok(())
    }

    fn resize(&self, processors: usize) -> Result<(), Error> {
        if self.policy.partition.is_some() {
            return Err(Error::setting("processors", "fixed while there are partitions"));
        }
        self.processors.resize(processors);
        let _ = self.spawner.monitor.try_send(Notice::Tick);
        Ok(())
    }

    fn resize_batcher(&self, name: &str, workers: usize) -> Result<(), Error> {
        let Some(batcher) = self.batchers.get(name) else {
            return Err(Error::setting("batcher", format!("there is none named {name:?}")));
        };
        if self.policy.partition.is_some() || !batcher.resize(workers) {
            let why = format!("`concurrency` of {name:?} is fixed by partitions or batch keys");
            return Err(Error::setting("batcher", why));
        }
        let _ = self.spawner.monitor.try_send(Notice::Tick);
        Ok(())
    }

    fn topology(&self) -> String {
        let sources = self.sources.len();
        let sources = counted(sources, "thread");
        let mut lines = vec![format!("sources: {sources} broadsock-source-N")];
        let capacity = self.lanes.first().and_then(|l| l.receiver.capacity()).unwrap_or_default();
        lines.push(format!(
            "processors: {} broadsock-proc-N, {} of {} of up to {}",
            counted(self.processors.len(), "thread"),
            counted(self.lanes.len(), "queue"),
            counted(capacity, "chunk"),
            counted(self.policy.chunk, "message"),
        ));
        for batcher in self.batchers.values() {
            let (name, workers) = (&batcher.name, counted(batcher.workers.len(), "thread"));
            let items = counted(capacity, "item");
            lines.push(format!(
                "batcher {name}: thread broadsock-batcher-{name}, queue of {items}, {workers} \
                 broadsock-batch-{name}-N"
            ));
        }
        lines.push("supervision: threads broadsock-monitor, broadsock-timer".to_owned());
        lines.push(format!("in flight: at most {}", self.policy.max_in_flight));
        if let Some(limit) = Control::rate_limit(self) {
            lines.push(format!("rate limit: {limit:?}"));
        }
        lines.join("\n")
    }
}

fn workers(pool: &Pool, now: Instant) -> Vec<WorkerSnapshot> {
    pool.slots()
        .iter()
        .map(|slot| WorkerSnapshot {
            thread: slot.name.clone(),
            handled: slot.stats.handled.get(),
            failed: slot.stats.failed.get(),
            busy: Duration::from_nanos(slot.stats.busy_nanos.get()),
            running_for: slot.running_for(now),
        })
        .collect()
}
