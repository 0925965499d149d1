//! Pipelines of every shape under every kind of trouble at once: whatever happens
//! to it, each message has one outcome, told once, and the books say the same.
#![cfg(feature = "testing")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bench::*;
use broadsock::testing::kill_worker;
use broadsock::{
    Acknowledger, Backoff, Batching, BoxError, Failed, Failure, Intensity, IntoSource, Message,
    Next, Pipeline, Pull, Settler, Source, Stop, Succeeded, sources,
};

/// Splitmix64: the same trouble for the same seed, as far as threads allow.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What was told of each message, to its acknowledger and to its source.
#[derive(Default)]
struct Told {
    acknowledged: Mutex<HashMap<u64, Vec<(bool, u32)>>>,
    settled: Mutex<HashMap<u64, Vec<bool>>>,
    tries: Mutex<HashMap<u64, u32>>,
    begun: Mutex<HashMap<u64, Vec<u64>>>,
}

struct Recorder(Arc<Told>);

impl Acknowledger for Recorder {
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        let mut told = lock(&self.0.acknowledged);
        for s in succeeded {
            told.entry(number(&s.message)).or_default().push((true, s.attempts));
        }
        for f in failed {
            told.entry(number(&f.message)).or_default().push((false, f.attempts));
        }
        Ok(())
    }
}

impl Settler for Told {
    fn settled(&self, message: &Message, success: bool) {
        lock(&self.settled).entry(number(message)).or_default().push(success);
    }
}

struct Told2(Box<dyn Source>, Arc<Told>);

impl Source for Told2 {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        self.0.pull(most, stop)
    }
    fn settler(&self) -> Option<Arc<dyn Settler>> {
        Some(self.1.clone())
    }
}

fn trouble(seed: u64) {
    let told = Arc::new(Told::default());
    let pick = |what: u64, of: u64| mix(seed ^ mix(what)) % of;
    let count = [50, 400, 3000][pick(1, 3) as usize];
    let partitions = [0, 0, 3, 7][pick(2, 4) as usize];
    let hold = partitions > 0 && pick(3, 2) == 0;
    let kills = [0, 0, 3][pick(4, 3) as usize];
    let slow = pick(5, 3);
    let bad = pick(6, 3);
    let batched = pick(7, 3);
    let processors = 1 + pick(8, 4) as usize;
    let (noted, killed) = (told.clone(), AtomicU64::new(0));
    let kill =
        move || killed.fetch_update(SeqCst, SeqCst, |n| (n < kills).then_some(n + 1)).is_ok();
    let kill = Arc::new(kill);
    let kill_in_batch = kill.clone();
    let hands = Hands::new(move |message| {
        let n = number(message);
        if partitions > 0 {
            lock(&noted.begun).entry(n % partitions).or_default().push(n);
        }
        let attempt = {
            let mut tries = lock(&noted.tries);
            let tries = tries.entry(n).or_default();
            *tries += 1;
            *tries
        };
        let roll = mix(seed ^ mix(n * 31 + u64::from(attempt)));
        match (slow, roll % 200) {
            (1, 0) | (2, 0..4) => pass(Duration::from_micros(700)),
            (2, 4) => pass(ms(7)),
            _ => {}
        }
        match (bad, (roll >> 20) % 100) {
            (1.., 0) => return Err("an error".into()),
            (1.., 1) => panic!("asked to panic"),
            (2, 2..=15) => return Err("an error".into()),
            (2, 16) => return Err(Failure::permanent("for good")),
            (2, 17) => return Ok(Next::to("nowhere", String::new())),
            (_, 18) if kill() => kill_worker(),
            _ => {}
        }
        Ok(match (batched, (roll >> 40) % 20) {
            (0, _) | (1, 1..) => Next::done(),
            (_, 1) => Next::done().tag("tagged"),
            (_, 2) => Next::to("batch", n.to_string()).acknowledge_now(),
            (_, 3) => Next::to("batch", n.to_string()).flush(),
            (_, 4..10) => Next::to("batch", n.to_string()).key(["a", "b"][n as usize % 2]),
            _ => Next::to("batch", n.to_string()),
        })
    })
    .batch(move |batch| {
        let roll = mix(seed ^ batch.items().filter_map(|i| i.parse::<u64>().ok()).sum::<u64>());
        match (bad, roll % 40) {
            (1.., 0) => return Err("an error".into()),
            (1.., 1) => panic!("asked to panic"),
            (_, 2) if kill_in_batch() => kill_worker(),
            (1.., 3..9) => batch.fail(0, "an error".into()),
            _ => {}
        }
        Ok(())
    });
    let source = Told2(sources::iter(numbers(count)).into_source(), told.clone());
    let mut builder = Pipeline::builder(hands)
        .source_with(source, Recorder(told.clone()))
        .processors(processors)
        .chunk([1, 5, 40, 200][pick(9, 4) as usize])
        .queue([1, 10, 1024][pick(10, 3) as usize])
        .max_in_flight([1, 20, 300, 10_000][pick(11, 4) as usize])
        .restart_intensity(Intensity { restarts: 20, within: LONG })
        .batcher(
            "batch",
            Batching::new()
                .size(1 + pick(12, 20) as usize)
                .timeout(ms(1 + pick(13, 5)))
                .concurrency(1 + pick(14, 3) as usize)
                .max_keys(1 + pick(15, 3) as usize),
        );
    if partitions > 0 {
        builder = builder.partition_by(move |message| number(message) % partitions);
    }
    if pick(16, 3) > 0 {
        builder = builder.retries(3, Backoff::constant(ms(pick(17, 3))));
        if hold {
            builder = builder.hold_order();
        }
    }
    if pick(18, 3) == 0 {
        builder = builder.handler_timeout(ms(3));
    }
    let pipeline = builder.start().unwrap();
    let over = AtomicBool::new(false);
    let end = pick(19, 4);
    let report = std::thread::scope(|scope| {
        let _watch = scope.spawn(|| {
            let mut turn = 0;
            while !over.load(SeqCst) {
                let metrics = pipeline.metrics();
                assert!(metrics.ledger.balanced(), "{}", metrics.ledger);
                turn += 1;
                match mix(seed ^ turn) % 50 {
                    0 => pipeline.pause(),
                    1 | 2 => pipeline.resume(),
                    3 if partitions == 0 => {
                        let _ = pipeline.resize(1 + turn as usize % 5);
                    }
                    4 => {
                        let _ = pipeline.resize_batcher("batch", 1 + turn as usize % 3);
                    }
                    _ => {}
                }
                pass(Duration::from_micros(200));
            }
        });
        let report = match end {
            0 => {
                pass(Duration::from_micros(mix(seed) % 20_000));
                pipeline.stop(LONG)
            }
            1 => {
                pass(Duration::from_micros(mix(seed) % 20_000));
                pipeline.stop(Duration::ZERO)
            }
            2 => {
                pass(Duration::from_micros(mix(seed) % 20_000));
                pipeline.drain();
                pipeline.join()
            }
            _ => pipeline.join(),
        };
        over.store(true, SeqCst);
        report
    });
    let ledger = report.ledger;
    assert!(ledger.balanced() && ledger.in_flight == 0, "{ledger}");
    assert_eq!(report.returned.len() as u64, ledger.returned);
    if end != 1 {
        all_well(&report);
        assert_eq!(ledger.returned, 0, "{ledger}");
    }
    if end == 3 {
        assert_eq!(ledger.accepted, u64::from(count));
    }
    if !report.stuck.is_empty() {
        return;
    }
    let acknowledged = lock(&told.acknowledged);
    let settled = lock(&told.settled);
    let tries = lock(&told.tries);
    let returned: std::collections::HashSet<u64> = report.returned.iter().map(number).collect();
    assert_eq!(returned.len() as u64, ledger.returned, "returned twice");
    for n in 0..ledger.accepted {
        let acks = acknowledged.get(&n).map_or(&[][..], |a| a);
        let ends = settled.get(&n).map_or(&[][..], |s| s);
        if returned.contains(&n) {
            assert!(acks.len() <= 1 && ends.len() <= 1, "{n}: {acks:?}, {ends:?}");
            continue;
        }
        assert_eq!((acks.len(), ends.len()), (1, 1), "{n}: {acks:?}, {ends:?}");
        assert_eq!(acks[0].0, ends[0], "{n}");
        let tried = tries.get(&n).copied().unwrap_or_default();
        assert!(acks[0].1 == tried, "{n}: {acks:?}, tried {tried}");
    }
    let good = settled.values().filter(|ends| ends[0]).count() as u64;
    let bad = settled.len() as u64 - good;
    if end != 1 {
        assert_eq!((good, bad), (ledger.succeeded, ledger.failed));
        let metrics = pipeline.metrics();
        assert_eq!(metrics.acknowledged, good + bad);
        assert_eq!(metrics.latency.iter().sum::<u64>(), good);
    }
    if hold && batched == 0 || partitions > 0 && bad == 0 && pick(16, 3) == 0 {
        for (partition, begun) in lock(&told.begun).iter() {
            assert!(begun.is_sorted(), "partition {partition}: {begun:?}");
        }
    }
}

#[test]
fn each_message_has_one_outcome_whatever_happens() {
    let from = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let seeds = std::env::var("SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    for seed in from..from + seeds {
        eprintln!("seed {seed}");
        trouble(seed);
    }
}
