//! Torture: the fallible calls of a clean run are counted; then the run is made
//! again for each of them, and each way in which it can fail. A debug build makes
//! each fail in one of its ways.
//!
//! `SIM_FAULT=scene:call:fault[:lasts]` replays one, as it is named on failure.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::checks::Setup;
use crate::faults::{Call, Fault, PLANNED, Strike};
use crate::kernel::{self, with};
use crate::logic::overflow::Overflow;
use crate::planted::Bug;
use crate::scene::Scene;
use crate::server::Rates;
use crate::works::plan::Plan;
use crate::world::{self, Broken};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

const SEED: u64 = 4;

/// A call that is made often fails for good at one place in so many only.
const STEP: usize = 5;

/// What failing calls found in the crate, by what went wrong.
const FOUND: &[(Call, &str)] = &[(Call::Wake, "a_wake_up_that_failed_left_its_thread_asleep")];

/// A run with its failing call.
#[derive(Debug, Clone, Copy)]
struct Run {
    scene: usize,
    strike: Strike,
}

/// What a run told of things that went wrong.
type Told = Vec<String>;

/// Fails every call once; `false` if a promise did not hold.
pub(crate) fn run() -> bool {
    let started = Instant::now();
    let clean = match clean_runs() {
        Ok(clean) => clean,
        Err((check, how)) => {
            println!("torture: a run without a failing call breaks {check}: {how}");
            return false;
        }
    };
    let runs = all_runs(&clean);
    let broken = first_broken(&runs, &clean, None);
    let calls: usize = clean.iter().map(|(calls, _)| calls.len()).sum();
    println!(
        "torture: {calls} fallible calls in {} scenes, {} runs with one or more of them failing, \
         in {:.1} s",
        clean.len(),
        runs.len(),
        started.elapsed().as_secs_f64(),
    );
    if let Some((run, (check, how))) = broken {
        println!("{} breaks {check}: {how}", command(&run));
        let found = FOUND.iter().filter(|(call, _)| *call == run.strike.call);
        found.for_each(|(_, name)| println!("perhaps again: {name}"));
        once(&run, None, true).ok();
        print_log(60);
        return false;
    }
    true
}

/// Whether a planted bug is found by failing calls.
pub(crate) fn finds(bug: Bug) -> bool {
    let Ok(clean) = clean_runs() else { return false };
    let runs = all_runs(&clean);
    match first_broken(&runs, &clean, Some(bug)) {
        Some((run, (check, how))) => {
            println!("planted {bug:?}: found by {check}, {}: {how}", command(&run));
            println!("    replay: SIM_PLANTED={bug:?} {}", command(&run));
            true
        }
        None => {
            println!("planted {bug:?}: NOT found by failing calls");
            false
        }
    }
}

/// Runs one again, with its log.
pub(crate) fn replay(which: &str, bug: Option<Bug>) -> i32 {
    let Ok(clean) = clean_runs() else { return 1 };
    let runs = all_runs(&clean);
    let Some(run) = runs.iter().find(|run| name(run) == which) else {
        let last = runs.last().map(name).unwrap_or_default();
        eprintln!("SIM_FAULT={which}: expected scene:call:fault[:lasts], as in {last}");
        return 2;
    };
    let result = judged(run, &clean, bug, true);
    print_log(usize::MAX);
    match result {
        Ok(()) => {
            println!("{} keeps every promise", command(run));
            0
        }
        Err((check, how)) => {
            println!("{} breaks {check}: {how}", command(run));
            1
        }
    }
}

fn print_log(last: usize) {
    let log = with(|k| std::mem::take(&mut k.log));
    kernel::begin(0, false);
    log.iter().skip(log.len().saturating_sub(last)).for_each(|line| println!("{line}"));
}

fn name(run: &Run) -> String {
    let Strike { at, fault, lasts, .. } = run.strike;
    let lasts = if lasts { ":lasts" } else { "" };
    format!("{}:{at}:{fault:?}{lasts}", run.scene)
}

/// What replays it, in the words of a shell: names of faults have brackets.
fn command(run: &Run) -> String {
    format!("SIM_FAULT='{}'", name(run))
}

/// The calls that each scene makes when none fails, and what it tells.
fn clean_runs() -> Result<Vec<(Vec<Call>, Told)>, Broken> {
    let runs = (0..scenes().len()).map(|scene| {
        kernel::begin(SEED, false);
        with(|k| {
            k.calls = Some(Vec::new());
            k.ck.causes = Some(Vec::new());
        });
        world::play(None, || scenes().swap_remove(scene))?;
        Ok(with(|k| (k.calls.take().unwrap_or_default(), k.ck.causes.take().unwrap_or_default())))
    });
    runs.collect()
}

fn all_runs(clean: &[(Vec<Call>, Told)]) -> Vec<Run> {
    let mut runs = Vec::new();
    for (scene, (calls, _)) in clean.iter().enumerate() {
        for (at, call) in calls.iter().copied().enumerate() {
            for (way, fault) in call.faults().iter().copied().enumerate() {
                if cfg!(debug_assertions) && way != at % call.faults().len() {
                    continue;
                }
                let strike = Strike { at, call, fault, lasts: false };
                runs.push(Run { scene, strike });
                let often = calls.iter().filter(|other| **other == call).count() > 50;
                if call.may_last(fault) && (!often || at % STEP == 1) {
                    runs.push(Run { scene, strike: Strike { lasts: true, ..strike } });
                }
            }
        }
    }
    runs
}

fn first_broken(
    runs: &[Run],
    clean: &[(Vec<Call>, Told)],
    bug: Option<Bug>,
) -> Option<(Run, Broken)> {
    let (next, found) = (AtomicUsize::new(0), Mutex::new(None));
    let cores = std::thread::available_parallelism().map_or(2, usize::from).min(8);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while found.lock().unwrap().is_none() {
                    let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    if let Err(broken) = judged(run, clean, bug, false) {
                        found.lock().unwrap().get_or_insert((*run, broken));
                    }
                }
                kernel::begin(0, false);
            });
        }
    });
    found.into_inner().unwrap()
}

/// Runs one, and asks whether what went wrong more than in the clean run is
/// told with its cause.
fn judged(
    run: &Run,
    clean: &[(Vec<Call>, Told)],
    bug: Option<Bug>,
    trace: bool,
) -> Result<(), Broken> {
    let told = once(run, bug, trace)?;
    let more = told.len() > clean[run.scene].1.len();
    if more && run.strike.fault.shows() && !told.iter().any(|cause| cause.contains(PLANNED)) {
        return Err(("cause-told", format!("{:?} failed, told: {told:?}", run.strike.call)));
    }
    Ok(())
}

fn once(run: &Run, bug: Option<Bug>, trace: bool) -> Result<Told, Broken> {
    kernel::begin(SEED, trace);
    with(|k| {
        k.strike = Some(run.strike);
        k.ck.causes = Some(Vec::new());
    });
    world::play(bug, || scenes().swap_remove(run.scene))?;
    Ok(with(|k| k.ck.causes.take().unwrap_or_default()))
}

/// Worlds in which nothing goes wrong by itself, but that the servers cut the
/// connections once, and that some connect by a detour.
fn scenes() -> Vec<Scene> {
    let with_session = Setup { sessions: true, openings: 2, lossless: true, ..setup() };
    let scene = scene(with_session.clone());
    let redundant = Setup { connections: 2, block: 8, dedup: Some(1_000_000), ..setup() };
    vec![
        Scene { plan: Some(Plan::plain()), ..scene.clone() },
        Scene { redundant: true, by_block: true, ..self::scene(redundant) },
        // Closed in the middle, with little time.
        Scene { closes: Some(9 * SECOND), cut: Some(6 * SECOND), ..scene.clone() },
        // Through redirects, with a queue that is often full.
        Scene {
            rates: Rates { redirect: 0.4, ..rates() },
            consume_every: 1500 * MS,
            consume_most: 2,
            ..self::scene(Setup { queue: 2, block: 1, ..with_session })
        },
    ]
}

fn scene(setup: Setup) -> Scene {
    Scene {
        setup,
        rates: rates(),
        redundant: false,
        failing: 0.0,
        plan: None,
        by_block: false,
        consume_every: 500 * MS,
        consume_most: 10,
        stall: 0.0,
        consume_healed: 500 * MS,
        end: 30 * SECOND,
        settles: Duration::from_secs(60),
        closes: None,
        cut: Some(12 * SECOND),
        leaves: None,
    }
}

fn setup() -> Setup {
    let secs = Duration::from_secs;
    Setup {
        connections: 1,
        connect: secs(5),
        ping: Some(secs(5)),
        pong: secs(5),
        write: secs(8),
        close: secs(1),
        base: Duration::from_millis(500),
        max: secs(4),
        jitter: 1,
        stable: secs(5),
        retry_after_max: secs(10),
        restarts: 3,
        within: secs(5),
        queue: 32,
        block: 8,
        overflow: Overflow::Block,
        dedup: Some(1_000_000),
        beat: secs(45),
        ..Setup::default()
    }
}

fn rates() -> Rates {
    Rates {
        mishap: Duration::from_secs(100_000),
        message: Duration::from_secs(4),
        burst: 2,
        overlap: 2,
        window: 256 * 1024,
        ..Rates::default()
    }
}
