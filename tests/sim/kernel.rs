//! Virtual time, chance, and the coroutines that play threads.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use generator::{Generator, Gn};

use crate::event::Event;
use crate::faults::{Call, Strike};
use crate::simnet::Net;

/// Words of a coroutine's stack.
const STACK: usize = 0x1_0000;

/// What a coroutine waits for.
pub(crate) enum Wait {
    /// Its turn.
    Yield,
    /// Readiness of a socket of this poller, or its waker.
    Poll(usize),
    /// The end of another.
    Join(usize),
    /// Somebody who wakes it, or a time before that.
    Parked(Option<u64>),
    /// It has been woken.
    Woken,
}

/// An event, when it happens, and its place among those of the same time.
struct Planned {
    at: u64,
    order: u64,
    ev: Ev,
}

impl Ord for Planned {
    /// The earliest is the greatest, which a heap gives first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Planned {}

/// What happens at an instant of virtual time.
#[derive(Debug, Clone)]
pub(crate) enum Ev {
    /// Only moves the time on.
    Nothing,
    Connected(usize),
    ToServer(usize, Vec<u8>),
    ToClient(usize, Arrival),
    /// The server hears that the client is gone.
    ClientGone(usize),
    /// A socket that refused a call without a reason has one for the next.
    Ready(usize),
    /// The server lets its open socket of a connection go.
    Cut(usize),
    Mishap(usize),
    Pump(usize),
    Feed(usize),
    Redeliver(usize, u64),
    Consume,
    Push(usize),
    Flood(usize, u32),
    /// The program does something to its pipeline.
    Meddle,
    /// The pipeline is asked to end, if it has not yet.
    StopPipeline,
    Heal,
    Quiet,
    Close,
    Finished,
}

#[derive(Debug, Clone)]
pub(crate) enum Arrival {
    Bytes(Vec<u8>),
    Fin,
    Reset,
}

pub(crate) struct Kernel {
    pub(crate) base: Instant,
    pub(crate) now: u64,
    seed: u64,
    agenda: BinaryHeap<Planned>,
    order: u64,
    waits: Vec<Option<Wait>>,
    new: Vec<Task>,
    alive: Vec<usize>,
    known: usize,
    spins: u32,
    current: usize,
    /// Which client or pipeline each coroutine belongs to, if any.
    owners: Vec<u64>,
    pub(crate) spawners: u64,
    /// Chance that a thread loses its turn where it takes a lock.
    pub(crate) preemption: f64,
    pub(crate) net: Net,
    pub(crate) sv: crate::server::Servers,
    pub(crate) ck: crate::checks::Checks,
    pub(crate) wk: crate::works::books::Books,
    /// Told by the observer and not looked at yet.
    pub(crate) told: VecDeque<(u64, Event)>,
    pub(crate) violation: Option<(&'static str, String)>,
    pub(crate) trace: bool,
    pub(crate) log: VecDeque<String>,
    /// The write that the log's last line tells of: whose, when, and how much.
    written: (usize, u64, usize),
    pub(crate) faults: u64,
    /// How often each fault struck.
    pub(crate) tally: BTreeMap<String, u64>,
    pub(crate) steps: u64,
    /// Chance that a fallible call of the system fails.
    pub(crate) failing: f64,
    /// The one call that fails.
    pub(crate) strike: Option<Strike>,
    /// When it failed last.
    pub(crate) struck_at: u64,
    /// Fallible calls so far and, if they are to be known, which.
    pub(crate) called: usize,
    pub(crate) calls: Option<Vec<Call>>,
    /// Names of threads that user code never gives back.
    pub(crate) hung: BTreeSet<String>,
    /// Of all coroutines.
    names: Vec<String>,
}

struct Task {
    name: String,
    body: Generator<'static, (), ()>,
}

thread_local! {
    static KERNEL: RefCell<Kernel> = RefCell::new(Kernel::new(0, false));
    static TASKS: RefCell<Vec<Option<Task>>> = const { RefCell::new(Vec::new()) };
}

pub(crate) fn with<T>(run: impl FnOnce(&mut Kernel) -> T) -> T {
    KERNEL.with(|kernel| run(&mut kernel.borrow_mut()))
}

impl Kernel {
    fn can_run(&self, task: usize) -> bool {
        match &self.waits[task] {
            None | Some(Wait::Parked(None)) => false,
            Some(Wait::Yield | Wait::Woken) => true,
            Some(Wait::Poll(poller)) => self.net.is_ready(*poller),
            Some(Wait::Join(other)) => *other != task && self.waits[*other].is_none(),
            Some(Wait::Parked(Some(at))) => *at <= self.now,
        }
    }

    fn new(seed: u64, trace: bool) -> Self {
        Self {
            base: Instant::now() + Duration::from_secs(3600),
            now: 0,
            seed: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03,
            agenda: BinaryHeap::new(),
            order: 0,
            waits: Vec::new(),
            new: Vec::new(),
            alive: Vec::new(),
            known: 0,
            spins: 0,
            current: usize::MAX,
            owners: Vec::new(),
            spawners: 0,
            preemption: 0.0,
            net: Net::default(),
            sv: crate::server::Servers::default(),
            ck: crate::checks::Checks::default(),
            wk: crate::works::books::Books::default(),
            told: VecDeque::new(),
            violation: None,
            trace,
            log: VecDeque::new(),
            written: (0, 0, 0),
            faults: 0,
            tally: BTreeMap::new(),
            steps: 0,
            failing: 0.0,
            strike: None,
            struck_at: 0,
            called: 0,
            calls: None,
            hung: BTreeSet::new(),
            names: Vec::new(),
        }
    }

    /// SplitMix64.
    pub(crate) fn draw(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// From `low` up to, and without, `high`.
    pub(crate) fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.draw() % (high - low).max(1)
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.range(0, from.len() as u64) as usize]
    }

    /// Nanoseconds with this mean, exponentially distributed.
    pub(crate) fn after_about(&mut self, mean: Duration) -> u64 {
        (mean.as_nanos() as f64 * -(1.0 - self.unit()).ln()) as u64
    }

    pub(crate) fn at(&mut self, at: u64, ev: Ev) {
        self.order += 1;
        self.agenda.push(Planned { at: at.max(self.now), order: self.order, ev });
    }

    pub(crate) fn soon(&mut self, wait: u64, ev: Ev) {
        self.at(self.now + wait, ev);
    }

    /// A socket takes so much of a write: a row of small ones is one line.
    pub(crate) fn note_write(&mut self, sock: usize, count: usize, left: usize) {
        if !self.trace {
            return;
        }
        let start = |count: usize| format!("sock {sock} takes {count}, ");
        let (its, at, before) = self.written;
        let last = self.log.back().and_then(|line| line.get(13..));
        let goes_on = last.is_some_and(|line| line.starts_with(&start(before)));
        let all = if (its, at) == (sock, self.now) && goes_on {
            self.log.pop_back();
            before + count
        } else {
            count
        };
        self.written = (sock, self.now, all);
        self.note(|| format!("{}{left} left", start(all)));
    }

    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.trace {
            let at = self.now as f64 / 1e9;
            let line = format!("{at:12.6} {}", text());
            if self.log.len() == 1_000_000 {
                self.log.pop_front();
            }
            self.log.push_back(line);
        }
    }

    /// A fault strikes: one of [`BOOK`](crate::faults::BOOK), or a call that fails.
    pub(crate) fn fault(&mut self, name: impl Into<String>) {
        self.faults += 1;
        *self.tally.entry(name.into()).or_default() += 1;
    }

    /// A promise is broken; the first one counts.
    pub(crate) fn broken(&mut self, check: &'static str, how: impl FnOnce() -> String) {
        if self.violation.is_none() {
            let how = how();
            self.note(|| format!("VIOLATION {check}: {how}"));
            self.violation = Some((check, how));
        }
    }

    /// The name of the coroutine that runs.
    pub(crate) fn current_name(&self) -> String {
        self.names.get(self.current).cloned().unwrap_or_default()
    }

    /// Whether the thread of this connection is stuck in user code.
    pub(crate) fn is_hung(&self, conn: usize) -> bool {
        !self.hung.is_empty() && self.hung.contains(&format!("broadsock-conn-{conn}"))
    }

    pub(crate) fn instant(&self) -> Instant {
        self.base + Duration::from_nanos(self.now)
    }

    /// The time of an instant, which may lie beyond all that is reckoned with.
    pub(crate) fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.base).as_nanos() as u64
    }
}

/// A new world.
pub(crate) fn begin(seed: u64, trace: bool) {
    TASKS.with(|tasks| {
        // Coroutines that never ended cannot be unwound safely: they are let go.
        tasks.borrow_mut().drain(..).flatten().for_each(std::mem::forget);
    });
    KERNEL.with(|kernel| {
        let old = std::mem::replace(&mut *kernel.borrow_mut(), Kernel::new(seed, trace));
        std::mem::forget(old.waits);
        std::mem::forget(old.new);
    });
}

pub(crate) fn instant() -> Instant {
    with(|k| k.instant())
}

pub(crate) fn elapsed() -> Duration {
    with(|k| Duration::from_nanos(k.now))
}

pub(crate) fn chance(p: f64) -> bool {
    with(|k| k.chance(p))
}

/// What `rand::random` is in this program.
pub(crate) fn random() -> f64 {
    with(Kernel::unit)
}

pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> usize {
    spawn_for(0, name, body)
}

/// Starts a coroutine that belongs to a client or pipeline.
pub(crate) fn spawn_for(owner: u64, name: &str, body: impl FnOnce() + Send + 'static) -> usize {
    let body = Gn::new_opt(STACK, move || body());
    with(|k| {
        let id = k.waits.len();
        k.waits.push(Some(Wait::Yield));
        k.names.push(name.to_owned());
        k.owners.push(owner);
        k.new.push(Task { name: name.to_owned(), body });
        k.note(|| format!("task {id} {name} starts"));
        id
    })
}

/// Whom the coroutine that runs belongs to.
pub(crate) fn owner() -> u64 {
    with(|k| k.owners.get(k.current).copied().unwrap_or(0))
}

/// The coroutine that runs.
pub(crate) fn current() -> usize {
    with(|k| k.current)
}

/// Gives the turn away until what is waited for has come.
#[allow(deprecated)]
pub(crate) fn pause(wait: Wait) {
    with(|k| {
        let current = k.current;
        k.waits[current] = Some(wait);
    });
    generator::yield_with(());
}

/// Waits until somebody wakes the calling coroutine, or until a time.
pub(crate) fn park(until: Option<u64>) {
    pause(Wait::Parked(until));
}

/// Lets a coroutine that is parked go on.
pub(crate) fn wake(task: usize) {
    with(|k| {
        if let Some(wait @ Some(Wait::Parked(_))) = k.waits.get_mut(task) {
            *wait = Some(Wait::Woken);
        }
    });
}

/// Lets others go first, by chance.
pub(crate) fn preempt() {
    let loses = with(|k| k.preemption > 0.0 && k.current != usize::MAX && k.chance(k.preemption));
    if loses && !std::thread::panicking() {
        pause(Wait::Yield);
    }
}

/// Blocks the calling coroutine, as user code may.
pub(crate) fn sleep(time: Duration) {
    park(Some(with(|k| k.now + time.as_nanos() as u64)));
}

pub(crate) fn is_done(task: usize) -> bool {
    with(|k| k.waits[task].is_none())
}

pub(crate) fn alive() -> Vec<String> {
    TASKS.with(|tasks| {
        tasks.borrow().iter().flatten().map(|task| task.name.clone()).collect::<Vec<_>>()
    })
}

/// Takes in what was started since the last turn.
fn admit() {
    let new = with(|k| std::mem::take(&mut k.new));
    if !new.is_empty() {
        let count = TASKS.with(|tasks| {
            let mut tasks = tasks.borrow_mut();
            tasks.extend(new.into_iter().map(Some));
            tasks.len()
        });
        with(|k| {
            k.alive.extend(k.known..count);
            k.known = count;
        });
    }
}

/// Runs one coroutine that can run; `false` if none can.
pub(crate) fn run_one() -> bool {
    admit();
    let id = with(|k| {
        let (mut runnable, mut found) = ([0; 64], 0);
        for task in &k.alive {
            if found < runnable.len() && k.can_run(*task) {
                runnable[found] = *task;
                found += 1;
            }
        }
        if found == 0 {
            return None;
        }
        let id = k.pick(&runnable[..found]);
        k.current = id;
        // A turn takes time.
        let cost = k.range(500, 30_000);
        k.now += cost;
        k.steps += 1;
        Some(id)
    });
    let Some(id) = id else { return false };
    let mut task = TASKS.with(|tasks| tasks.borrow_mut()[id].take()).expect("it is there");
    task.body.resume();
    if task.body.is_done() {
        with(|k| {
            k.waits[id] = None;
            k.alive.retain(|alive| *alive != id);
            k.note(|| format!("task {id} {} ended", task.name));
        });
    } else {
        TASKS.with(|tasks| tasks.borrow_mut()[id] = Some(task));
    }
    with(|k| k.current = usize::MAX);
    true
}

/// The next event, if it is due now.
pub(crate) fn due() -> Option<Ev> {
    with(|k| {
        if k.agenda.peek()?.at > k.now {
            return None;
        }
        k.agenda.pop().map(|planned| planned.ev)
    })
}

/// The next event, whatever the coroutines wait for.
pub(crate) fn next_event() -> Option<Ev> {
    with(|k| {
        let planned = k.agenda.pop()?;
        k.now = k.now.max(planned.at);
        Some(planned.ev)
    })
}

/// Moves the time on to the next event or deadline; `false` when there is none.
pub(crate) fn advance() -> bool {
    with(|k| {
        let event = k.agenda.peek().map(|planned| planned.at);
        let deadline = k.alive.iter().filter_map(|task| match &k.waits[*task] {
            Some(Wait::Parked(at)) => *at,
            _ => None,
        });
        let Some(next) = deadline.chain(event).min() else { return false };
        let now = k.now;
        if next <= now {
            k.spins += 1;
            if k.spins > 100_000 {
                k.broken("no-hot-world", || format!("{next} is not after {now}"));
                return false;
            }
        } else {
            k.spins = 0;
        }
        k.now = k.now.max(next);
        true
    })
}
