//! What the threads of a pipeline share, and how far it is on its way.

use std::collections::{BTreeMap, BinaryHeap};
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::batcher::Batcher;
use super::chunk::Chunk;
use super::pool::Pool;
use super::register::Register;
use super::source;
use super::stats::{Histogram, PipelineEvent};
use crate::error::Error;
use crate::io::clock::Clock;
use crate::logic::backoff::Backoff;
use crate::logic::rate::Limiter;
use crate::message::Message;
use crate::metrics::{Counter, Gauge, PipelineLedger, Report};
use crate::threads::events::Hub;
use crate::threads::monitor::Notice;
use crate::threads::timer::{Alarm, Timer};
use crate::threads::watched::Watched;
use crate::threads::{Spawner, lock};
use crate::work::{Acknowledger, Handler, Pulled, Settler, Stop, Ticket};

/// A user's function that says which partition a message belongs to.
pub(crate) type Partition = Arc<dyn Fn(&Message) -> u64 + Send + Sync>;

/// What the threads need of a pipeline's settings.
#[derive(Clone)]
pub(crate) struct FlowPolicy {
    pub(crate) max_in_flight: usize,
    /// Messages a processor takes at once.
    pub(crate) chunk: usize,
    pub(crate) partition: Option<Partition>,
    pub(crate) retry: Retries,
    /// A handler that runs longer is reported.
    pub(crate) handler_timeout: Option<Duration>,
}

/// How often and when a failed message is tried again.
#[derive(Debug, Clone)]
pub(crate) struct Retries {
    /// Tries in all; 1 is no retry.
    pub(crate) attempts: u32,
    pub(crate) backoff: Backoff,
    /// The worker waits with its other messages, so that their order holds.
    pub(crate) hold: bool,
}

/// Everything the threads of one pipeline share.
pub(crate) struct Flow<H: Handler> {
    pub(crate) clock: Clock,
    pub(crate) policy: FlowPolicy,
    pub(crate) handler: H,
    pub(crate) sources: Vec<SourceSlot>,
    /// One for all processors, or, with partitions, one for each.
    pub(crate) lanes: Vec<Lane>,
    pub(crate) processors: Pool,
    pub(crate) batchers: BTreeMap<Arc<str>, Batcher<H::Item>>,
    pub(crate) limiter: Option<Mutex<Limiter>>,
    pub(crate) stop: StopSwitch,
    pub(crate) timer: Timer,
    pub(crate) spawner: Spawner,
    pub(crate) hub: Hub<PipelineEvent>,
    pub(crate) counters: Counters,
    /// The names of the threads that run.
    running: Mutex<Vec<String>>,
    pub(super) state: Watched<State>,
}

/// Counted over the whole pipeline.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) retries: Counter,
    pub(crate) panics: Counter,
    pub(crate) restarts: Counter,
    pub(crate) acknowledged: Counter,
    pub(crate) acknowledge_failures: Counter,
    pub(crate) latency: Histogram,
    /// Accepted messages that may still reach a batcher.
    pub(crate) upstream: Gauge,
}

/// How far the pipeline is on its way to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Running,
    /// Sources take in nothing; what was accepted is processed.
    Paused,
    /// Sources are closed; the pipeline ends when all is settled.
    Draining,
    /// Threads end as soon as their user code returns.
    Stopped,
    /// Nothing is settled any more: what was left has been returned.
    Ended,
}

#[derive(Debug)]
pub(super) struct State {
    phase: Phase,
    pub(super) register: Register,
    /// Room that sources have taken for messages they are pulling.
    reserved: usize,
    open_sources: usize,
    /// Of these, how many wait for what they read to be settled.
    answering: usize,
    /// Threads that wait until something of this changes.
    waiting: usize,
    /// Processors that have nothing to do.
    idle: usize,
    /// When work must be over, and by when threads must have ended.
    deadline: Option<(Instant, Instant)>,
    ending: Ending,
}

/// How a pipeline ended.
#[derive(Debug, Default, Clone)]
pub(crate) struct Ending {
    pub(crate) error: Option<Error>,
    pub(crate) stuck: Vec<String>,
    pub(crate) returned: Vec<Message>,
    pub(crate) reports: Vec<Option<Report>>,
}

/// What is kept of a source beside its thread.
pub(crate) struct SourceSlot {
    /// `None` is one that does nothing.
    pub(crate) acknowledger: Option<Arc<dyn Acknowledger>>,
    pub(crate) settler: Option<Arc<dyn Settler>>,
    /// Told to stop waiting when the phase changes.
    pub(crate) wake: Mutex<(Option<Sender<()>>, Receiver<()>)>,
    pub(crate) tick: Tick,
}

/// A queue of processors, with the retries that belong to it.
pub(crate) struct Lane {
    pub(crate) sender: Sender<Chunk>,
    pub(crate) receiver: Receiver<Chunk>,
    /// Messages in the queue.
    pub(crate) queued: Gauge,
    pub(crate) retries: Mutex<BinaryHeap<Retry>>,
    pub(crate) tick: Tick,
}

/// A message that waits for its next try; the heap's greatest is due first.
#[derive(Debug)]
pub(crate) struct Retry {
    pub(crate) due: Instant,
    pub(crate) ticket: Ticket,
}

/// A wake-up from the timer: at most one waits.
#[derive(Debug, Clone)]
pub(crate) struct Tick {
    pub(crate) sender: Sender<()>,
    pub(crate) receiver: Receiver<()>,
}

impl Tick {
    pub(crate) fn new() -> Self {
        let (sender, receiver) = bounded(1);
        Self { sender, receiver }
    }
}

impl Alarm for Tick {
    fn fire(&self) {
        // One that waits already will do.
        let _ = self.sender.try_send(());
    }
}

/// Ends every wait of a pipeline: its receivers disconnect.
pub(crate) struct StopSwitch {
    /// For whoever works: it looks before each message.
    stopped: AtomicBool,
    /// For whoever waits.
    sender: Mutex<Option<Sender<()>>>,
    pub(crate) signal: Receiver<()>,
}

impl StopSwitch {
    pub(crate) fn new() -> Self {
        let (sender, signal) = bounded(0);
        Self { stopped: AtomicBool::new(false), sender: Mutex::new(Some(sender)), signal }
    }

    pub(crate) fn set(&self) {
        self.stopped.store(true, Release);
        lock(&self.sender).take();
    }

    #[inline]
    pub(crate) fn is_set(&self) -> bool {
        self.stopped.load(Acquire)
    }
}

impl SourceSlot {
    pub(crate) fn new(
        acknowledger: Option<Arc<dyn Acknowledger>>,
        settler: Option<Arc<dyn Settler>>,
    ) -> Self {
        let (sender, receiver) = bounded(0);
        Self {
            acknowledger,
            settler,
            wake: Mutex::new((Some(sender), receiver)),
            tick: Tick::new(),
        }
    }

    /// What a pull is to watch: set when the phase changes.
    pub(crate) fn stop(&self) -> Stop {
        let mut wake = lock(&self.wake);
        if wake.0.is_none() {
            let (sender, receiver) = bounded(0);
            *wake = (Some(sender), receiver);
        }
        Stop { signal: wake.1.clone() }
    }

    pub(crate) fn interrupt(&self) {
        lock(&self.wake).0.take();
        self.tick.fire();
    }
}

impl Lane {
    pub(crate) fn new(capacity: usize) -> Self {
        let (sender, receiver) = bounded(capacity);
        Self {
            sender,
            receiver,
            queued: Gauge::default(),
            retries: Mutex::default(),
            tick: Tick::new(),
        }
    }
}

impl State {
    /// Whether everything accepted is settled, and the sources are ending.
    pub(super) fn is_settled_at_the_end(&self) -> bool {
        self.register.ledger().in_flight == 0 && self.phase >= Phase::Draining
    }
}

impl<H: Handler> Drop for Flow<H> {
    /// A thread that was given up may have put in more since.
    fn drop(&mut self) {
        self.clear();
    }
}

impl<H: Handler> Flow<H> {
    #[allow(clippy::too_many_arguments, reason = "called once, by the builder")]
    pub(crate) fn new(
        clock: Clock,
        policy: FlowPolicy,
        handler: H,
        sources: Vec<SourceSlot>,
        processors: usize,
        queue: usize,
        batchers: Vec<Batcher<H::Item>>,
        limiter: Option<Limiter>,
        spawner: Spawner,
        hub: Hub<PipelineEvent>,
    ) -> Self {
        let lanes = if policy.partition.is_some() { processors } else { 1 };
        let open_sources = sources.len();
        Self {
            clock,
            policy,
            handler,
            sources,
            lanes: (0..lanes).map(|_| Lane::new(queue)).collect(),
            processors: Pool::new("broadsock-proc".to_owned(), processors, false),
            batchers: batchers.into_iter().map(|b| (Arc::clone(&b.name), b)).collect(),
            limiter: limiter.map(Mutex::new),
            stop: StopSwitch::new(),
            timer: Timer::new(),
            spawner,
            hub,
            counters: Counters::default(),
            running: Mutex::default(),
            state: Watched::new(State {
                phase: Phase::Running,
                register: Register::default(),
                reserved: 0,
                open_sources,
                answering: 0,
                waiting: 0,
                idle: 0,
                deadline: None,
                ending: Ending::default(),
            }),
        }
    }

    /// What the timer wakes: lanes, batchers, sources.
    fn ticks(&self) -> impl Iterator<Item = &Tick> {
        let lanes = self.lanes.iter().map(|lane| &lane.tick);
        let batchers = self.batchers.values().map(|batcher| &batcher.tick);
        let sources = self.sources.iter().map(|source| &source.tick);
        lanes.chain(batchers).chain(sources)
    }

    /// Has everybody look at the time: the timer may have died with a wake-up.
    pub(crate) fn fire_all(&self) {
        self.ticks().for_each(Tick::fire);
    }

    /// The timer's targets: those that it wakes, and last the supervisor.
    pub(crate) fn alarms(&self, supervisor: Arc<dyn Alarm>) -> Vec<Arc<dyn Alarm>> {
        let mut alarms: Vec<Arc<dyn Alarm>> = Vec::new();
        for tick in self.ticks() {
            alarms.push(Arc::new(tick.clone()));
        }
        alarms.push(supervisor);
        alarms
    }

    pub(crate) fn batcher_owner(&self, batcher: usize) -> usize {
        self.lanes.len() + batcher
    }

    pub(crate) fn source_owner(&self, source: usize) -> usize {
        self.lanes.len() + self.batchers.len() + source
    }

    pub(crate) fn supervisor_owner(&self) -> usize {
        self.source_owner(self.sources.len())
    }

    pub(crate) fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    /// Moves on to a later phase (or between running and paused), and wakes
    /// whoever waits for that. Returns whether it did.
    pub(crate) fn enter(&self, phase: Phase) -> bool {
        {
            let mut state = self.state.lock();
            let back = (state.phase, phase) == (Phase::Paused, Phase::Running);
            if state.phase >= phase && !back {
                return false;
            }
            state.phase = phase;
        }
        self.state.notify_all();
        if phase >= Phase::Stopped {
            self.stop.set();
        }
        self.sources.iter().for_each(SourceSlot::interrupt);
        self.batchers.values().for_each(|batcher| batcher.tick.fire());
        true
    }

    /// Work must be over at `work`, and threads ended at `end`, or earlier if
    /// that was said before.
    pub(crate) fn set_deadline(&self, work: Instant, end: Instant) {
        let deadline = &mut self.state.lock().deadline;
        let earlier = deadline.map_or((work, end), |(w, e)| (w.min(work), e.min(end)));
        *deadline = Some(earlier);
        self.state.notify_all();
    }

    /// Waits until everything accepted is settled; `false` when half of the time
    /// that is left has passed, or the pipeline has stopped. Open batches do not
    /// wait for company meanwhile, once all sources are here.
    pub(crate) fn wait_settled(&self) -> bool {
        self.state.lock().answering += 1;
        self.batchers.values().for_each(|batcher| batcher.tick.fire());
        let settled = self.wait_until_settled();
        self.state.lock().answering -= 1;
        settled
    }

    fn wait_until_settled(&self) -> bool {
        let began = self.clock.now();
        let mut state = self.state.lock();
        while state.register.ledger().in_flight > 0 && state.phase < Phase::Stopped {
            state = match state.deadline {
                None => self.wait(state),
                Some((work, _)) => {
                    let until = began + work.saturating_duration_since(began) / 2;
                    let left = until.saturating_duration_since(self.clock.now());
                    if left.is_zero() {
                        return false;
                    }
                    state.waiting += 1;
                    let mut state = self.state.wait_timeout(state, left);
                    state.waiting -= 1;
                    state
                }
            };
        }
        state.register.ledger().in_flight == 0
    }

    /// When work must be over.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.state.lock().deadline.map(|(work, _)| work)
    }

    /// When threads must have ended.
    pub(crate) fn end(&self) -> Option<Instant> {
        self.state.lock().deadline.map(|(_, end)| end)
    }

    /// Waits for room, and reserves it for up to `most` messages, which must be
    /// accepted or given up. `open` is whether the source has not begun its end.
    pub(crate) fn reserve(&self, most: usize, open: bool) -> Room {
        let mut state = self.state.lock();
        loop {
            let taken = state.register.ledger().in_flight_count() + state.reserved;
            let room = self.policy.max_in_flight.saturating_sub(taken).min(most);
            match state.phase {
                Phase::Draining if open => return Room::End,
                Phase::Running | Phase::Draining if room > 0 => {
                    state.reserved += room;
                    return Room::For(room);
                }
                Phase::Stopped | Phase::Ended => return Room::Stopped,
                _ => {}
            }
            state = self.wait(state);
        }
    }

    fn wait<'s>(&'s self, mut state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        state.waiting += 1;
        let mut state = self.state.wait(state);
        state.waiting -= 1;
        state
    }

    /// Turns a reservation into accepted messages, and gives up the rest;
    /// returns what there is to deal out.
    pub(crate) fn accept(
        &self,
        source: usize,
        messages: Vec<Message>,
        reserved: usize,
    ) -> Vec<Arc<Pulled>> {
        let now = self.clock.now();
        let brought = messages.len();
        let portions = source::portions(messages);
        let mut state = self.state.lock();
        state.reserved -= reserved;
        let gives_up = brought < reserved && state.waiting > 0;
        let accept = |messages| state.register.accept(now, source, messages);
        let pulled: Vec<_> = portions.into_iter().filter_map(accept).collect();
        self.counters.upstream.add(pulled.iter().map(|pulled| count(pulled.messages.len())).sum());
        drop(state);
        if gives_up {
            self.state.notify_all();
        }
        pulled
    }

    /// A processor has nothing to do from now on: whoever waits for room may use
    /// what there is.
    pub(super) fn idle(&self) {
        let mut state = self.state.lock();
        state.idle += 1;
        let wake = state.waiting > 0;
        drop(state);
        if wake {
            self.state.notify_all();
        }
    }

    pub(super) fn busy(&self) {
        self.state.lock().idle -= 1;
    }

    /// Whether those who wait for room, or for the end, are to be woken. A source
    /// that is woken for each bit of room costs more than the work itself does:
    /// while all processors are busy, a quarter of the room is worth it. The last
    /// one to stop being busy wakes it in any case.
    pub(super) fn is_room_worth_a_wake(&self, state: &State) -> bool {
        let in_flight = state.register.ledger().in_flight_count();
        let quarter = self.policy.max_in_flight / 4;
        let is_worth = state.idle > 0
            || in_flight == 0
            || in_flight + state.reserved + quarter <= self.policy.max_in_flight
            || state.phase >= Phase::Draining;
        state.waiting > 0 && is_worth
    }

    /// How long ago the oldest message in flight was accepted.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        let now = self.clock.now();
        let at = self.state.lock().register.oldest()?;
        Some(now.saturating_duration_since(at))
    }

    /// Ends the books: whatever is not settled is returned.
    pub(crate) fn give_back(&self) {
        {
            let mut state = self.state.lock();
            state.phase = Phase::Ended;
            let returned = state.register.close();
            state.ending.returned.extend(returned);
        }
        self.state.notify_all();
    }

    /// Drops what waits in queues, when it has been returned.
    pub(crate) fn clear(&self) {
        for lane in &self.lanes {
            lane.receiver.try_iter().for_each(drop);
            lane.queued.clear();
            lock(&lane.retries).clear();
        }
        self.batchers.values().for_each(|batcher| batcher.clear(self));
    }

    /// `count` messages have left the processors' part for good. When the last
    /// one has, while draining, open batches have nothing to wait for.
    pub(crate) fn left_upstream(&self, messages: usize) {
        let left = messages > 0 && self.counters.upstream.add(-count(messages)) == 0;
        if left && self.phase() >= Phase::Draining {
            self.batchers.values().for_each(|batcher| batcher.tick.fire());
        }
    }

    /// Whether open batches of a pipeline that drains can get no more items: all
    /// sources are through, or there is room for nothing before a batch is settled.
    pub(crate) fn is_upstream_empty(&self) -> bool {
        let state = self.state.lock();
        let in_flight = state.register.ledger().in_flight_count();
        state.phase >= Phase::Draining
            && self.counters.upstream.get() == 0
            && (state.open_sources == state.answering || in_flight >= self.policy.max_in_flight)
    }

    /// A source has ended: the pipeline drains after the last.
    pub(crate) fn source_ended(&self) {
        let last = {
            let mut state = self.state.lock();
            state.open_sources = state.open_sources.saturating_sub(1);
            state.open_sources == 0
        };
        if last && self.enter(Phase::Draining) {
            self.emit(PipelineEvent::Draining);
        }
        // Batchers may have nothing to wait for any more, also if the sources
        // that are left wait for them.
        self.batchers.values().for_each(|batcher| batcher.tick.fire());
        if last {
            self.tell_supervisor();
        }
    }

    /// Whether everything accepted is settled and nothing more will come.
    pub(crate) fn is_drained(&self) -> bool {
        let state = self.state.lock();
        state.phase >= Phase::Draining
            && state.open_sources == 0
            && state.register.ledger().in_flight == 0
    }

    pub(crate) fn ledger(&self) -> PipelineLedger {
        self.state.lock().register.ledger()
    }

    pub(crate) fn ending(&self) -> Ending {
        self.state.lock().ending.clone()
    }

    pub(crate) fn update_ending(&self, update: impl FnOnce(&mut Ending)) {
        update(&mut self.state.lock().ending);
    }

    pub(super) fn tell_supervisor(&self) {
        // A full channel holds notices, and each makes it look.
        let _ = self.spawner.monitor.try_send(Notice::Tick);
    }

    /// Runs a thread's body, and knows it by its name meanwhile.
    pub(crate) fn run_as(&self, name: String, body: impl FnOnce()) {
        lock(&self.running).push(name.clone());
        let _guard = Running { running: &self.running, name };
        body();
    }

    /// The names of the threads that run.
    pub(crate) fn running(&self) -> Vec<String> {
        lock(&self.running).clone()
    }

    pub(crate) fn emit(&self, event: PipelineEvent) {
        self.hub.emit(event);
    }
}

/// Strikes a thread off the list when it ends, also by a panic.
struct Running<'f> {
    running: &'f Mutex<Vec<String>>,
    name: String,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut running = lock(self.running);
        if let Some(place) = running.iter().position(|name| *name == self.name) {
            running.swap_remove(place);
        }
    }
}

/// Room for a source's next messages.
#[derive(Debug)]
pub(crate) enum Room {
    /// Reserved for so many.
    For(usize),
    /// The pipeline drains: the source has to begin its end first.
    End,
    /// There will be none.
    Stopped,
}

/// A number of messages, for a gauge.
pub(crate) fn count(messages: usize) -> i64 {
    i64::try_from(messages).unwrap_or(i64::MAX)
}

impl PartialEq for Retry {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Retry {}

impl PartialOrd for Retry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Retry {
    /// The one that is due first is the greatest.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.due.cmp(&self.due)
    }
}
