//! Pipelines of many shapes under many kinds of trouble at once: whatever happens
//! to it, each message has one outcome, told once, and the books say the same.
//!
//! `SEED=1000 SEEDS=500 cargo test --features testing --test pipeline_chaos`
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bench::*;
use broadsock::testing::kill_worker;
use broadsock::{
    Acknowledger, Backoff, Batch, Batching, BoxError, Failed, Failure, Handler, Intensity,
    IntoSource, Message, Next, Pipeline, PipelineReport, Pull, Settler, Source, Stop, Succeeded,
    sources,
};

/// The same trouble for the same seed, as far as threads allow.
#[derive(Debug, Clone, Copy)]
struct Plan {
    seed: u64,
    messages: u64,
    /// None, or messages belong to one of so many.
    partitions: u64,
    retries: bool,
    holds: bool,
    /// How many workers may be killed.
    kills: u64,
    /// How slow handlers are, how often they fail, how much goes to the batcher:
    /// 0 is not, 2 is much.
    slow: u64,
    bad: u64,
    batched: u64,
    end: End,
}

/// How the pipeline comes to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Drain,
    Stop,
    StopAtOnce,
}

/// What was told of each message, by its number.
#[derive(Default)]
struct Told {
    tries: Mutex<HashMap<u64, u32>>,
    /// By partition, in order.
    begun: Mutex<HashMap<u64, Vec<u64>>>,
    acknowledged: Mutex<HashMap<u64, Vec<(bool, u32)>>>,
    settled: Mutex<HashMap<u64, Vec<bool>>>,
}

struct Chaos(Plan, Arc<Told>, AtomicU64);

struct Records(Arc<Told>);

/// A source whose record is kept.
struct Recorded(Box<dyn Source>, Arc<Told>);

impl Plan {
    fn of(seed: u64) -> Self {
        let pick = |what: u64, of: u64| mix(seed ^ mix(what)) % of;
        let partitions = [0, 0, 3, 7][pick(2, 4) as usize];
        Self {
            seed,
            messages: [50, 400, 3000][pick(1, 3) as usize],
            partitions,
            retries: pick(16, 3) > 0,
            holds: partitions > 0 && pick(3, 2) == 0,
            kills: [0, 0, 3][pick(4, 3) as usize],
            slow: pick(5, 3),
            bad: pick(6, 3),
            batched: pick(7, 3),
            end: [End::Source, End::Drain, End::Stop, End::StopAtOnce][pick(19, 4) as usize],
        }
    }

    fn pick(self, what: u64, of: u64) -> u64 {
        mix(self.seed ^ mix(what)) % of
    }

    fn start(self, told: &Arc<Told>) -> Pipeline {
        let texts = numbers(u32::try_from(self.messages).unwrap());
        let source = Recorded(sources::iter(texts).into_source(), Arc::clone(told));
        let batching = Batching::new()
            .size(1 + self.pick(12, 20) as usize)
            .timeout(ms(1 + self.pick(13, 5)))
            .concurrency(1 + self.pick(14, 3) as usize)
            .max_keys(1 + self.pick(15, 3) as usize);
        let mut builder = Pipeline::builder(Chaos(self, Arc::clone(told), AtomicU64::new(0)))
            .source_with(source, Records(Arc::clone(told)))
            .processors(1 + self.pick(8, 4) as usize)
            .chunk([1, 5, 40, 200][self.pick(9, 4) as usize])
            .queue([1, 10, 1024][self.pick(10, 3) as usize])
            .max_in_flight([1, 20, 300, 10_000][self.pick(11, 4) as usize])
            .restart_intensity(Intensity { restarts: 20, within: LONG })
            .batcher("batch", batching);
        if self.partitions > 0 {
            builder = builder.partition_by(move |message| number(message) % self.partitions);
        }
        if self.retries {
            builder = builder.retries(3, Backoff::constant(ms(self.pick(17, 3))));
        }
        if self.retries && self.holds {
            builder = builder.hold_order();
        }
        if self.pick(18, 3) == 0 {
            builder = builder.handler_timeout(ms(3));
        }
        builder.start().unwrap()
    }

    /// Looks at the books, and turns what may be turned while it runs.
    fn disturb(self, pipeline: &Pipeline, over: &AtomicBool) {
        let mut turn = 0;
        while !over.load(SeqCst) {
            let ledger = pipeline.metrics().ledger;
            assert!(ledger.balanced(), "{ledger}");
            turn += 1;
            // The numbers of workers may be fixed: batches and partitions belong to them.
            match mix(self.seed ^ turn) % 50 {
                0 => pipeline.pause(),
                1 | 2 => pipeline.resume(),
                3 => drop(pipeline.resize(1 + turn as usize % 5)),
                4 => drop(pipeline.resize_batcher("batch", 1 + turn as usize % 3)),
                _ => {}
            }
            pass(Duration::from_micros(200));
        }
    }

    fn end(self, pipeline: &Pipeline) -> PipelineReport {
        if self.end != End::Source {
            pass(Duration::from_micros(mix(self.seed) % 20_000));
        }
        match self.end {
            End::Source => {}
            End::Drain => pipeline.drain(),
            End::Stop => return pipeline.stop(LONG),
            End::StopAtOnce => return pipeline.stop(Duration::ZERO),
        }
        pipeline.join()
    }
}

impl Handler for Chaos {
    type Item = String;

    fn handle_message(&self, message: &Message) -> Result<Next<String>, Failure> {
        let n = number(message);
        let roll = self.begin(n);
        match (self.0.slow, roll % 200) {
            (1, 0) | (2, 0..4) => pass(Duration::from_micros(700)),
            (2, 4) => pass(ms(7)),
            _ => {}
        }
        match (self.0.bad, (roll >> 20) % 100) {
            (1.., 0) | (2, 2..=15) => return Err("an error".into()),
            (1.., 1) => panic!("asked to panic"),
            (2, 16) => return Err(Failure::permanent("for good")),
            (2, 17) => return Ok(Next::to("nowhere", String::new())),
            (_, 18) if self.may_kill() => kill_worker(),
            _ => {}
        }
        let to_batch = Next::to("batch", n.to_string());
        Ok(match (self.0.batched, (roll >> 40) % 20) {
            (0, _) | (1, 1..) => Next::done(),
            (_, 1) => Next::done().tag("tagged"),
            (_, 2) => to_batch.acknowledge_now(),
            (_, 3) => to_batch.flush(),
            (_, 4..10) => to_batch.key(["a", "b"][n as usize % 2]),
            _ => to_batch,
        })
    }

    fn handle_batch(&self, batch: &mut Batch<String>) -> Result<(), Failure> {
        let sum: u64 = batch.items().filter_map(|item| item.parse::<u64>().ok()).sum();
        match (self.0.bad, mix(self.0.seed ^ sum) % 40) {
            (1.., 0) => return Err("an error".into()),
            (1.., 1) => panic!("asked to panic"),
            (_, 2) if self.may_kill() => kill_worker(),
            (1.., 3..9) => batch.fail(0, "an error".into()),
            _ => {}
        }
        Ok(())
    }
}

impl Chaos {
    /// Notes the try, and rolls the dice for it.
    fn begin(&self, n: u64) -> u64 {
        if let Some(partition) = n.checked_rem(self.0.partitions) {
            lock(&self.1.begun).entry(partition).or_default().push(n);
        }
        let mut tries = lock(&self.1.tries);
        let tried = tries.entry(n).or_default();
        *tried += 1;
        mix(self.0.seed ^ mix(n * 31 + u64::from(*tried)))
    }

    fn may_kill(&self) -> bool {
        let kills = self.0.kills;
        self.2.fetch_update(SeqCst, SeqCst, |n| (n < kills).then_some(n + 1)).is_ok()
    }
}

impl Acknowledger for Records {
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        let mut told = lock(&self.0.acknowledged);
        let succeeded = succeeded.iter().map(|s| (number(&s.message), (true, s.attempts)));
        let failed = failed.iter().map(|f| (number(&f.message), (false, f.attempts)));
        succeeded.chain(failed).for_each(|(n, outcome)| told.entry(n).or_default().push(outcome));
        Ok(())
    }
}

impl Settler for Told {
    fn settled(&self, message: &Message, success: bool) {
        lock(&self.settled).entry(number(message)).or_default().push(success);
    }
}

impl Source for Recorded {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        self.0.pull(most, stop)
    }

    fn settler(&self) -> Option<Arc<dyn Settler>> {
        Some(self.1.clone())
    }
}

impl Told {
    /// Each message was returned, or has one outcome, which everybody was told.
    fn check(&self, plan: Plan, report: &PipelineReport) {
        let returned: HashSet<u64> = report.returned.iter().map(number).collect();
        assert_eq!(returned.len() as u64, report.ledger.returned, "one is returned twice");
        let (acknowledged, settled) = (lock(&self.acknowledged), lock(&self.settled));
        let tries = lock(&self.tries);
        for n in 0..report.ledger.accepted {
            let told = acknowledged.get(&n).map_or(&[][..], |told| told);
            let ends = settled.get(&n).map_or(&[][..], |ends| ends);
            if returned.contains(&n) {
                assert!(told.len() <= 1 && ends.len() <= 1, "{n} of {plan:?}: {told:?}, {ends:?}");
                continue;
            }
            let &[(success, attempts)] = told else { panic!("{n} of {plan:?}: {told:?}") };
            assert_eq!(ends, [success], "{n} of {plan:?}");
            assert_eq!(tries.get(&n), Some(&attempts), "{n} of {plan:?}");
        }
        if plan.end != End::StopAtOnce {
            let good = settled.values().filter(|ends| ends[0]).count();
            let counts = (report.ledger.succeeded, report.ledger.failed);
            assert_eq!(counts, (good as u64, (settled.len() - good) as u64), "{plan:?}");
        }
        // What failed in its batch comes again behind others.
        if !plan.retries || plan.holds && plan.batched == 0 {
            for (partition, begun) in lock(&self.begun).iter() {
                assert!(begun.is_sorted(), "partition {partition} of {plan:?}: {begun:?}");
            }
        }
    }
}

/// Splitmix64.
fn mix(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn under_trouble(plan: Plan) {
    let told = Arc::new(Told::default());
    let pipeline = plan.start(&told);
    let over = AtomicBool::new(false);
    let report = std::thread::scope(|scope| {
        scope.spawn(|| plan.disturb(&pipeline, &over));
        let report = plan.end(&pipeline);
        over.store(true, SeqCst);
        report
    });
    if plan.end == End::StopAtOnce {
        // Some handler may be asleep.
        assert!(report.ledger.balanced() && report.ledger.in_flight == 0, "{}", report.ledger);
    } else {
        all_well(&report);
        assert_eq!(report.ledger.returned, 0, "{plan:?}");
    }
    if plan.end == End::Source {
        assert_eq!(report.ledger.accepted, plan.messages);
    }
    told.check(plan, &report);
}

#[test]
fn each_message_has_one_outcome_whatever_happens_to_its_pipeline() {
    let from_env = |name| std::env::var(name).ok().and_then(|number| number.parse().ok());
    let first: u64 = from_env("SEED").unwrap_or(0);
    for seed in first..first + from_env("SEEDS").unwrap_or(25) {
        under_trouble(Plan::of(seed));
    }
}
