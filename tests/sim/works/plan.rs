//! What a pipeline of the world is like: drawn for each seed, or given.

use std::time::Duration;

use crate::kernel::Kernel;
use crate::logic::backoff::Backoff;
use crate::logic::rate::RateLimit;
use crate::logic::restart::Intensity;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// All that makes one pipeline differ from another, but for chance.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) processors: usize,
    pub(crate) chunk: usize,
    pub(crate) queue: usize,
    pub(crate) max_in_flight: usize,
    /// None, or messages belong to one of so many.
    pub(crate) partitions: u64,
    pub(crate) hold: bool,
    pub(crate) attempts: u32,
    /// The first delay of a retry; each next one is twice as long, up to 5 s.
    pub(crate) base: Duration,
    pub(crate) limit: Option<RateLimit>,
    pub(crate) batchers: Vec<Lot>,
    /// Items have one of so many keys, or none.
    pub(crate) keys: u64,
    pub(crate) slow_after: Option<Duration>,
    pub(crate) intensity: Intensity,
    pub(crate) trouble: Trouble,
    pub(crate) springs: Vec<Spring>,
    /// Between two things that the program does to it.
    pub(crate) meddles: Option<Duration>,
    pub(crate) ending: Ending,
    /// Chance that a thread loses its turn where it takes a lock.
    pub(crate) preemption: f64,
}

/// A batcher.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lot {
    pub(crate) name: &'static str,
    pub(crate) limit: usize,
    /// By the weight of items, not their number.
    pub(crate) weighed: bool,
    pub(crate) timeout: Duration,
    pub(crate) workers: usize,
    pub(crate) max_keys: usize,
}

/// How often user code misbehaves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Trouble {
    pub(crate) fails: f64,
    pub(crate) panics: f64,
    pub(crate) kills: f64,
    pub(crate) stalls: f64,
    /// The longest stall.
    pub(crate) stall: u64,
    pub(crate) hangs: f64,
    pub(crate) batch: f64,
    pub(crate) acknowledger: f64,
    /// Of the share that goes to batchers.
    pub(crate) batched: f64,
}

/// A source beside the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spring {
    Iterator,
    Channel,
    /// One of the program's own making.
    Own,
}

/// How the program ends a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Stop,
    /// `drain`, with a `stop` long after it.
    Drain,
    /// A handler asks for the stop.
    InHandler,
}

impl Plan {
    /// What this world's seed says.
    pub(crate) fn drawn(k: &mut Kernel) -> Self {
        let partitions = k.pick(&[0, 0, 1, 3, 7]);
        let batchers = k.pick(&[0, 1, 1, 2]);
        let names = &["a", "b"][..batchers];
        let springs = k.pick(&[0, 0, 1, 2]);
        let mut plan = Self {
            processors: k.pick(&[1, 2, 4]),
            chunk: k.pick(&[1, 3, 16, 64]),
            queue: k.pick(&[1, 4, 64]),
            max_in_flight: k.pick(&[3, 20, 200]),
            partitions,
            hold: partitions > 0 && k.chance(0.5),
            attempts: k.pick(&[1, 2, 5]),
            base: Duration::from_millis(k.pick(&[20, 200, 1000])),
            limit: k.chance(0.3).then(|| draw_limit(k)),
            batchers: names.iter().map(|name| draw_lot(k, name)).collect(),
            keys: k.pick(&[0, 0, 2, 10]),
            slow_after: k.chance(0.3).then_some(Duration::from_millis(200)),
            intensity: k.pick(&[
                Intensity::default(),
                Intensity { restarts: 20, within: Duration::from_secs(60) },
            ]),
            trouble: Trouble {
                fails: k.pick(&[0.0, 0.01, 0.1]),
                panics: k.pick(&[0.0, 0.01]),
                kills: k.pick(&[0.0, 0.0, 0.0005, 0.005]),
                stalls: k.pick(&[0.0, 0.01, 0.1]),
                stall: k.pick(&[5, 100, 3000]) * MS,
                hangs: if k.chance(0.04) { 0.0005 } else { 0.0 },
                batch: k.pick(&[0.0, 0.1]),
                acknowledger: k.pick(&[0.0, 0.02]),
                batched: if batchers > 0 { k.pick(&[0.3, 1.0]) } else { 0.0 },
            },
            springs: Vec::new(),
            meddles: k.pick(&[None, Some(20), Some(200)]).map(Duration::from_secs),
            ending: k.pick(&[Ending::Stop, Ending::Stop, Ending::Drain, Ending::InHandler]),
            preemption: k.pick(&[0.0, 0.01, 0.2]),
        };
        for _ in 0..springs {
            plan.springs.push(k.pick(&[Spring::Iterator, Spring::Channel, Spring::Own]));
        }
        plan
    }

    /// One in which nothing goes wrong.
    pub(crate) fn plain() -> Self {
        let lot = Lot {
            name: "a",
            limit: 10,
            weighed: false,
            timeout: Duration::from_secs(1),
            workers: 1,
            max_keys: 10,
        };
        Self {
            processors: 2,
            chunk: 16,
            queue: 64,
            max_in_flight: 200,
            partitions: 0,
            hold: false,
            attempts: 2,
            base: Duration::from_millis(200),
            limit: None,
            batchers: vec![lot],
            keys: 2,
            slow_after: None,
            intensity: Intensity::default(),
            trouble: Trouble { batched: 0.5, ..Trouble::default() },
            springs: Vec::new(),
            meddles: None,
            ending: Ending::Stop,
            preemption: 0.0,
        }
    }

    pub(crate) fn backoff(&self) -> Backoff {
        Backoff::exponential(self.base, Self::LONGEST)
    }

    pub(crate) const LONGEST: Duration = Duration::from_secs(5);

    /// The bounds of the delay after so many tries, with the default's jitter.
    pub(crate) fn delay(&self, tries: u32) -> (u64, u64) {
        let mut whole = self.base;
        for _ in 1..tries.min(40) {
            whole = (whole * 2).min(Self::LONGEST);
        }
        let whole = whole.min(Self::LONGEST).as_nanos() as u64;
        (whole / 2, whole)
    }

    pub(crate) fn lot(&self, name: &str) -> &Lot {
        self.batchers.iter().find(|lot| lot.name == name).expect("a batcher's name")
    }
}

fn draw_lot(k: &mut Kernel, name: &'static str) -> Lot {
    Lot {
        name,
        limit: k.pick(&[1, 2, 10, 100]),
        weighed: k.chance(0.3),
        timeout: Duration::from_millis(k.pick(&[20, 1000, 30_000])),
        workers: k.pick(&[1, 2, 3]),
        max_keys: k.pick(&[1, 3, 100]),
    }
}

pub(crate) fn draw_limit(k: &mut Kernel) -> RateLimit {
    if k.chance(0.5) {
        RateLimit::token_bucket(k.pick(&[2.0, 7.5, 50.0, 2000.0]), k.pick(&[1, 5, 100]))
    } else {
        let interval = Duration::from_millis(k.pick(&[100, 1000, 7000]));
        RateLimit::fixed_window(k.pick(&[20, 100, 1000]), interval)
    }
}

/// The longest that nothing passes a limit of those that are drawn.
pub(crate) const LONGEST_WINDOW: u64 = 7 * SECOND;
