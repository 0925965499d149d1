//! The world: what happens in it, and the run over seeds.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use crate::checks::{self, Checks, Conn, SLACK, Setup};
use crate::error::ErrorKind;
use crate::event::{EventKind, State};
use crate::faults::{BOOK, Strike};
use crate::handler::Outgoing;
use crate::kernel::{self, Ev, Kernel, with};
use crate::logic::overflow::Overflow;
use crate::logic::restart::Intensity;
use crate::message::Message;
use crate::planted::{self, Bug};
use crate::scene::{self, Scene};
use crate::server::{self, Feed, Rates, Servers};
use crate::settings::{self, Settings};
use crate::simnet::{self, Life};
use crate::threads::Spawner;
use crate::threads::held::MAX_HELD;
use crate::threads::monitor::{Monitor, NOTICES};
use crate::threads::queue::NoMessage;
use crate::threads::shared::Shared;
use crate::torture;
use crate::works;

/// What was found in the crate, by what went wrong, and the worlds that find it
/// again: a seed alone would mean another world as soon as one more thing is drawn.
pub(crate) const REGRESSIONS: &[(&str, Tune)] = &[
    ("a_ping_that_the_socket_did_not_take_started_no_write_deadline", scene::stalls),
    ("a_look_up_of_an_earlier_thread_was_taken_for_its_successors", scene::slow_look_ups),
    ("the_close_frame_that_tells_of_a_breach_was_not_counted", scene::breaches),
    ("a_session_that_opened_for_a_full_queue_read_on_until_none_could_open", scene::full_queues),
    ("a_session_heartbeat_that_was_due_while_closing_made_its_thread_spin", scene::closes),
    ("a_thread_that_read_no_more_was_replaced_by_one_that_did", scene::drains),
    ("a_second_restart_found_no_slot_for_what_was_held_and_shed_it", scene::restarts),
];

/// Tunes a world for what once went wrong.
pub(crate) type Tune = fn(&mut Scene);

/// Seeds of each such world.
const SEEDS_AGAIN: u64 = 40;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// What a world came to.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Outcome {
    virtual_nanos: u64,
    steps: u64,
    pub(crate) faults: u64,
    received: u64,
    reconnects: u64,
    outs: u64,
    handled: u64,
    batches: u64,
    transitions: u64,
}

struct World {
    shared: Arc<Shared>,
    setup: Setup,
    has_pipeline: bool,
    /// It has ended, and the client is about to.
    client_ends: bool,
    pushed: Vec<u64>,
    consume_every: u64,
    consume_most: u64,
    consume_healed: u64,
    stall: f64,
    by_block: bool,
    end: u64,
    quiet: bool,
    close_deadline: u64,
    skipped_ends: bool,
    monitor: usize,
    leaves: Option<u64>,
    /// Since when there is nothing for a consumer to take.
    dry: Option<u64>,
}

pub(crate) fn main() -> i32 {
    std::panic::set_hook(Box::new(|info| {
        let text = info.to_string();
        if !text.contains("planned") && !info.payload().is::<crate::threads::Kill>() {
            eprintln!("{text}");
        }
    }));
    let settings = match Settings::read() {
        Ok(settings) => settings,
        Err(wrong) => {
            eprintln!("{wrong}");
            return 2;
        }
    };
    let Settings { minutes, planted: bug, .. } = settings;
    if let Some(which) = &settings.fault {
        return torture::replay(which, bug);
    }
    if let Some(seed) = settings.seed {
        return replay(seed, minutes, bug, settings.again, usize::MAX);
    }
    if let Some(bug) = bug {
        return i32::from(!is_found(bug, minutes));
    }
    whole(&settings)
}

/// Everything there is to run; returns the exit code.
fn whole(settings: &Settings) -> i32 {
    let minutes = settings.minutes;
    for (name, tune) in REGRESSIONS {
        for seed in 1..=SEEDS_AGAIN {
            kernel::begin(seed, false);
            if let Err((check, how)) = play(None, || tuned(*tune, minutes)) {
                println!("seed {seed} of it breaks {check}: {how}");
                println!("test result: FAILED. 0 passed; 1 failed: {name}");
                kernel::begin(0, false);
                return 1;
            }
        }
    }
    kernel::begin(0, false);
    if !torture::run() {
        println!("test result: FAILED. 0 passed; 1 failed");
        return 1;
    }
    let failed = run(settings.first, settings.seeds, minutes);
    if failed > 0 {
        println!("test result: FAILED. 0 passed; {failed} failed");
        return 1;
    }
    if !settings.bugs {
        println!("test result: ok. 1 passed; 0 failed");
        return 0;
    }
    let missed: Vec<_> = planted::ALL.iter().filter(|bug| !is_found(**bug, minutes)).collect();
    if missed.is_empty() {
        println!("all {} planted bugs found", planted::ALL.len());
        println!("test result: ok. 2 passed; 0 failed");
        return 0;
    }
    println!("not found: {missed:?}");
    println!("test result: FAILED. 1 passed; 1 failed");
    1
}

/// Runs the seeds on every core; returns how many broke a promise.
fn run(first: u64, seeds: u64, minutes: u64) -> u64 {
    let started = Instant::now();
    let next = AtomicU64::new(first);
    let failed = AtomicU64::new(0);
    let sum = Mutex::new(Outcome::default());
    let tally = Mutex::new(BTreeMap::<String, u64>::new());
    let cores = std::thread::available_parallelism().map_or(2, usize::from).min(8);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let mut mine = Outcome::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds || failed.load(Ordering::Relaxed) >= 5 {
                        break;
                    }
                    let result = one(seed, minutes, None, false);
                    with(|k| std::mem::take(&mut k.tally)).into_iter().for_each(|(name, times)| {
                        *tally.lock().unwrap().entry(name).or_default() += times;
                    });
                    match result {
                        Ok(outcome) => mine.add(outcome),
                        Err((check, how)) => {
                            println!("seed {seed} breaks {check}: {how}");
                            if failed.fetch_add(1, Ordering::Relaxed) == 0 {
                                replay(seed, minutes, None, None, 60);
                            }
                        }
                    }
                }
                sum.lock().unwrap().add(mine);
                kernel::begin(0, false);
            });
        }
    });
    let sum = *sum.lock().unwrap();
    let took = started.elapsed().as_secs_f64();
    println!("{seeds} seeds of {minutes} virtual minutes in {took:.1} s: {sum}");
    let tally = tally.into_inner().unwrap();
    let told: Vec<_> = tally.iter().map(|(name, times)| format!("{name}: {times}")).collect();
    println!("faults: {}", told.join(", "));
    failed.load(Ordering::Relaxed) + never_drawn(&tally, seeds * minutes)
}

/// Faults of the book that did not strike once, in a time that suffices for each.
fn never_drawn(tally: &BTreeMap<String, u64>, minutes: u64) -> u64 {
    if minutes < 2000 * 30 {
        return 0;
    }
    let missing: Vec<_> = BOOK.iter().filter(|name| !tally.contains_key(**name)).collect();
    if !missing.is_empty() {
        println!("never struck: {missing:?}");
    }
    missing.len() as u64
}

impl Outcome {
    fn add(&mut self, other: Self) {
        self.virtual_nanos += other.virtual_nanos;
        self.steps += other.steps;
        self.faults += other.faults;
        self.received += other.received;
        self.reconnects += other.reconnects;
        self.outs += other.outs;
        self.handled += other.handled;
        self.batches += other.batches;
        self.transitions += other.transitions;
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minutes = self.virtual_nanos as f64 / 6e10;
        if minutes < 120.0 {
            write!(f, "{minutes:.1} virtual minutes, ")?;
        } else {
            write!(f, "{:.0} virtual hours, ", minutes / 60.0)?;
        }
        write!(
            f,
            "{} scheduling steps, {} faults injected, {} connections made, {} state changes, {} \
             messages received and {} sent accounted for, {} handled by pipelines in {} batches",
            self.steps,
            self.faults,
            self.reconnects,
            self.transitions,
            self.received,
            self.outs,
            self.handled,
            self.batches,
        )
    }
}

fn is_found(bug: Bug, minutes: u64) -> bool {
    if planted::OF_FAILED_CALLS.contains(&bug) {
        return torture::finds(bug);
    }
    find(bug, 400, minutes.min(30))
}

fn find(bug: Bug, seeds: u64, minutes: u64) -> bool {
    let next = AtomicU64::new(1);
    let found: Mutex<Option<(u64, &'static str, String)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > seeds || found.lock().unwrap().is_some() {
                        break;
                    }
                    if let Err((check, how)) = one(seed, minutes, Some(bug), false) {
                        let mut found = found.lock().unwrap();
                        if found.as_ref().is_none_or(|(earlier, ..)| seed < *earlier) {
                            *found = Some((seed, check, how));
                        }
                        break;
                    }
                }
                kernel::begin(0, false);
            });
        }
    });
    match found.into_inner().unwrap() {
        Some((seed, check, how)) => {
            println!("planted {bug:?}: found by {check}, seed {seed}: {how}");
            println!("    replay: {}", settings::command(bug, seed, minutes));
            true
        }
        None => {
            println!("planted {bug:?}: NOT found in {seeds} seeds");
            false
        }
    }
}

/// The world of this seed, tuned for what went wrong.
fn tuned(tune: Tune, minutes: u64) -> Scene {
    let mut scene = with(|k| Scene::drawn(k, minutes));
    scene.plan = None;
    tune(&mut scene);
    scene
}

/// Runs one seed, as it is or tuned again, with its log; prints the last lines of it.
fn replay(seed: u64, minutes: u64, bug: Option<Bug>, again: Option<Tune>, last: usize) -> i32 {
    let result = match again {
        None => one(seed, minutes, bug, true),
        Some(tune) => {
            kernel::begin(seed, true);
            play(bug, || tuned(tune, minutes))
        }
    };
    let log = with(|k| std::mem::take(&mut k.log));
    kernel::begin(0, false);
    for line in log.iter().skip(log.len().saturating_sub(last)) {
        println!("{line}");
    }
    match result {
        Ok(outcome) => {
            println!("seed {seed} keeps every promise: {outcome}");
            0
        }
        Err((check, how)) => {
            println!("seed {seed} breaks {check}: {how}");
            1
        }
    }
}

fn one(seed: u64, minutes: u64, bug: Option<Bug>, trace: bool) -> Result<Outcome, Broken> {
    kernel::begin(seed, trace);
    play(bug, || with(|k| Scene::drawn(k, minutes)))
}

/// A check that failed, and how.
pub(crate) type Broken = (&'static str, String);

/// Runs the world of a scene; the kernel has just begun.
pub(crate) fn play(bug: Option<Bug>, scene: impl FnOnce() -> Scene) -> Result<Outcome, Broken> {
    planted::plant(bug);
    let ran = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(scene());
        world.run();
        world.outcome()
    }));
    planted::plant(None);
    works::let_go();
    if let Some(violation) = with(|k| k.violation.take()) {
        return Err(violation);
    }
    ran.map_err(|payload| ("no-panic", crate::threads::panic_text(&*payload)))
}

impl World {
    fn new(scene: Scene) -> Self {
        let setup = scene.setup.clone();
        with(|k| {
            k.note(|| format!("{scene:?}"));
            k.sv = Servers {
                rates: scene.rates.clone(),
                sessions: setup.sessions,
                redundant: scene.redundant,
                conns: (0..setup.connections).map(|_| Feed::default()).collect(),
                max_message: 64 * 1024,
                openings: setup.openings,
                ..Servers::default()
            };
            k.ck = Checks {
                setup: setup.clone(),
                conns: (0..setup.connections).map(|_| Conn::default()).collect(),
                got: vec![(0, 0); setup.connections],
                causes: k.ck.causes.take(),
                ..Checks::default()
            };
            k.failing = scene.failing;
        });
        let (notices, inbox) = bounded(NOTICES);
        let shared = Arc::new(scene::share(&setup, Spawner::new(notices)));
        let intensity = Intensity { restarts: setup.restarts, within: setup.within };
        let own = Arc::clone(&shared);
        let (guard, ended) = bounded::<()>(0);
        let monitor = kernel::spawn("broadsock-monitor", move || {
            match Monitor::start(Arc::clone(&own), inbox, intensity) {
                Ok(monitor) => monitor.run(),
                Err(error) => with(|k| {
                    k.note(|| format!("could not start: {error}"));
                    k.ck.causes.iter_mut().for_each(|causes| causes.push(error.chain()));
                    k.ck.failed = Some((k.now, error));
                    k.soon(3 * SECOND, Ev::Finished);
                }),
            }
            own.end();
            drop(guard);
        });
        let has_pipeline = scene.plan.is_some();
        if let Some(plan) = scene.plan.clone() {
            works::start(plan, &shared, ended);
        }
        let world = Self {
            has_pipeline,
            client_ends: false,
            pushed: vec![0; setup.connections],
            consume_every: scene.consume_every,
            consume_most: scene.consume_most,
            consume_healed: scene.consume_healed,
            stall: scene.stall,
            by_block: scene.by_block && !has_pipeline,
            end: scene.end,
            quiet: false,
            close_deadline: 0,
            skipped_ends: false,
            monitor,
            leaves: scene.leaves,
            dry: None,
            shared,
            setup,
        };
        world.schedule(&scene);
        world
    }

    fn schedule(&self, scene: &Scene) {
        with(|k| {
            for conn in 0..self.setup.connections {
                if conn == 0 || !k.sv.redundant {
                    k.soon(0, Ev::Feed(conn));
                }
                k.soon(SECOND, Ev::Push(conn));
                if let Some(at) = scene.cut {
                    k.at(at, Ev::Cut(conn));
                }
            }
            if scene.plan.is_none() {
                k.soon(0, Ev::Consume);
            }
            k.at(scene.end, Ev::Heal);
            k.at(scene.end + scene.settles.as_nanos() as u64, Ev::Quiet);
            if let Some(at) = scene.closes {
                k.fault("close at any moment");
                k.at(at, Ev::Close);
            }
        });
    }

    fn run(&mut self) {
        let mut turns = 0u64;
        loop {
            if with(|k| k.violation.is_some()) {
                return;
            }
            // The world itself must not spin either.
            turns += 1;
            if turns > 10_000_000 {
                with(|k| k.broken("no-hot-world", || format!("{:?} run", kernel::alive())));
                return;
            }
            if let Some(event) = kernel::due() {
                if matches!(event, Ev::Finished) {
                    if self.is_over() {
                        self.finished();
                        return;
                    }
                    continue;
                }
                self.handle(event);
            } else if kernel::run_one() {
                self.check();
                if with(|k| k.steps) > 10_000_000 {
                    with(|k| k.broken("no-hot-loop", || "ten million turns".to_owned()));
                }
            } else if !kernel::advance() {
                return;
            }
            with(checks::sweep);
            with(works::watch::sweep);
        }
    }

    fn handle(&mut self, event: Ev) {
        match event {
            Ev::Nothing => {}
            Ev::Connected(sock) => with(|k| server::connected(k, sock)),
            Ev::ToServer(sock, bytes) => with(|k| server::receive(k, sock, bytes)),
            Ev::ToClient(sock, arrival) => with(|k| crate::simnet::arrive(k, sock, arrival)),
            Ev::ClientGone(sock) => with(|k| server::client_gone(k, sock)),
            Ev::Ready(sock) => with(|k| simnet::ready(k, sock)),
            Ev::Cut(conn) => with(|k| server::cut(k, conn)),
            Ev::Mishap(sock) => with(|k| server::mishap(k, sock)),
            Ev::Pump(sock) => with(|k| {
                if let Some(server) = k.sv.socks.get_mut(&sock) {
                    server.pumps = false;
                }
                server::pump(k, sock);
            }),
            Ev::Feed(conn) => with(|k| server::feed(k, conn)),
            Ev::Redeliver(conn, n) => with(|k| server::redeliver(k, conn, n)),
            Ev::Flood(sock, left) => with(|k| server::flood(k, sock, left)),
            Ev::Consume => self.consume(),
            Ev::Meddle => works::meddle(),
            Ev::StopPipeline => {
                if with(|k| !k.wk.over && k.wk.stopping.is_none()) {
                    works::stop(20 * SECOND);
                }
            }
            Ev::Push(conn) => self.push(conn),
            Ev::Heal => self.heal(),
            Ev::Quiet => self.converged(),
            Ev::Close => self.close(),
            Ev::Finished => {}
        }
    }

    fn check(&mut self) {
        loop {
            let Some((at, event)) = with(|k| k.told.pop_front()) else { break };
            with(|k| checks::on_event(k, at, &event));
            if matches!(event.kind, EventKind::Failed { .. }) {
                // A client that failed closes itself within a second.
                let grace = with(|k| k.now) + SECOND + SLACK;
                self.end_by(grace);
            }
        }
        if self.has_pipeline && self.close_deadline == 0 && with(|k| k.wk.over) {
            self.end_by(with(|k| k.now));
        }
        let (ledger, dropped) = self.shared.queue.ledger();
        let taken = with(|k| k.ck.taken);
        let read = self.read();
        let limit = self.most_in_flight();
        with(|k| {
            if !ledger.balanced() {
                k.broken("ledger-balanced", || ledger.to_string());
            }
            let read = read + k.ck.emitted;
            if ledger.received != read && k.ck.failed.is_none() {
                // What is read in a turn is entered before the turn ends.
                k.broken("ledger-complete", || format!("{read} read, {ledger}"));
            }
            if !self.by_block && ledger.delivered != taken {
                k.broken("ledger-true", || format!("{taken} taken, {ledger}"));
            }
            if ledger.in_flight > limit as u64 {
                k.broken("queue-bounded", || format!("{limit} at most, {ledger}"));
            }
            let lives = k.ck.closing.is_none() && k.ck.failed.is_none();
            if dropped.closed > 0 && lives {
                k.broken("nothing-shed-too-late-while-it-lives", || ledger.to_string());
            }
        });
    }

    /// Messages that were read, as the client counts them.
    fn read(&self) -> u64 {
        self.shared.connections.iter().map(|peer| peer.metrics.messages.get()).sum()
    }

    /// What may wait for the consumer. Only who blocks holds blocks beside the queue,
    /// and one may be on its way there.
    fn most_in_flight(&self) -> usize {
        let Setup { queue, connections, block, overflow, .. } = self.setup;
        match overflow {
            Overflow::Block => queue + connections * block * (MAX_HELD + 1),
            _ => queue.max(block),
        }
    }

    fn consume(&mut self) {
        let over = with(|k| k.ck.ended);
        if self.has_left() && !over {
            with(|k| {
                k.note(|| "the consumer has left".to_owned());
                k.fault("consumer leaves");
            });
            return;
        }
        let before = with(|k| k.ck.taken);
        let most = with(|k| k.range(1, self.consume_most + 1));
        for _ in 0..most {
            if self.by_block {
                let Ok(block) = self.shared.queue.receiver().try_recv() else { break };
                block.for_each(|message| self.take(message));
                continue;
            }
            match self.shared.queue.try_recv() {
                Ok(message) => self.take(message),
                Err(_) => break,
            }
        }
        if !over {
            self.is_there(before);
            let wait = with(|k| {
                let stalls = !k.sv.healed && k.chance(self.stall);
                if stalls {
                    k.fault("consumer stalls");
                    k.note(|| "the consumer stalls".to_owned());
                    // It is back when the world heals.
                    let time = k.range(5, 200) * SECOND;
                    time.min(self.end.saturating_sub(k.now) + SECOND)
                } else {
                    let every = self.consume_every;
                    k.range(every / 2, every * 2)
                }
            });
            with(|k| k.soon(wait, Ev::Consume));
        }
    }

    /// What was accepted can be taken, also while a connection has no thread: the
    /// consumer has just tried, after it had taken so many `before`.
    fn is_there(&mut self, before: u64) {
        let (ledger, _) = self.shared.queue.ledger();
        let (now, taken) = with(|k| (k.now, k.ck.taken));
        if taken > before || ledger.in_flight == 0 {
            self.dry = None;
            return;
        }
        let since = *self.dry.get_or_insert(now);
        // A hook that sleeps keeps its thread from offering what it holds.
        let hooks = with(|k| k.sv.rates.session > 0.0) && self.setup.sessions;
        let slack = if hooks { SLACK } else { 100 * MS };
        if now > since + slack && with(|k| k.hung.is_empty()) {
            with(|k| k.broken("accepted-is-there", || format!("none for a while, {ledger}")));
        }
    }

    /// Whether nobody consumes any more.
    fn has_left(&self) -> bool {
        self.leaves.is_some_and(|at| with(|k| k.now) >= at)
    }

    /// Takes a message, and has done with it or fails it.
    fn take(&mut self, message: Message) {
        if !takes(&self.shared, &message, 0) {
            return;
        }
        let fails = with(|k| !k.sv.healed && k.chance(0.01));
        let Some(id) = message.id() else { return };
        if fails {
            with(|k| k.fault("message fails"));
            self.shared.queue.forget(id);
            with(|k| failed(k, &message));
        } else {
            self.shared.queue.done(id);
        }
    }

    fn push(&mut self, conn: usize) {
        let over = with(|k| k.ck.closing.is_some() || k.ck.failed.is_some() || self.quiet);
        if over {
            return;
        }
        let most = scene::outbox(self.setup.queue) as u64 / 2;
        let some = with(|k| k.pick(&[0, 1, 1, 3, most]));
        for _ in 0..some {
            let number = self.pushed[conn] + 1;
            let pad = with(|k| k.pick(&[0usize, 0, 10, 200, 3000]));
            let text = format!("out {number} {}", "y".repeat(pad));
            match self.shared.connections[conn].inbox.push(Outgoing::text(text)) {
                Ok(()) => self.pushed[conn] = number,
                Err(_) => break,
            }
        }
        with(|k| {
            let wait = k.range(SECOND / 10, 15 * SECOND);
            k.soon(wait, Ev::Push(conn));
        });
    }

    fn heal(&mut self) {
        with(|k| {
            k.note(|| "the world heals".to_owned());
            server::heal(k);
            k.failing = 0.0;
        });
        if self.has_pipeline {
            works::heal();
        }
        self.consume_every = self.consume_healed;
        self.consume_most = 200;
    }

    /// Everything has had the time to be well again.
    fn converged(&mut self) {
        if with(|k| k.ck.closing.is_some() || k.ck.failed.is_some()) {
            // A pipeline whose client closed early may wait for a handler that
            // never returns: somebody has to end it.
            if self.has_pipeline {
                self.end_by(with(|k| k.now) + SECOND);
            }
            return;
        }
        let struck = with(|k| k.struck_at);
        if struck > self.end && with(|k| k.now) < struck + 20 * SECOND {
            // A call failed just now: that takes its time to heal, too.
            return with(|k| k.at(struck + 20 * SECOND, Ev::Quiet));
        }
        if !self.quiet {
            self.quiet = true;
            // A handler that never returns may take all of the room with it.
            let gone = self.has_left() || with(|k| !k.hung.is_empty());
            with(|k| {
                k.sv.conns.iter_mut().for_each(|feed| feed.ended = true);
                // A redelivery that was lost with its socket is made again.
                let failed = k.ck.delivered.iter().filter(|(_, it)| it.failed);
                let mut failed: Vec<u64> = failed.map(|(id, _)| *id).collect();
                failed.sort_unstable();
                for id in failed {
                    let conn = (id / 1_000_000_000) as usize;
                    k.soon(0, Ev::Redeliver(conn, id % 1_000_000_000));
                }
                k.soon(20 * SECOND, Ev::Quiet);
                for index in 0..k.ck.conns.len() {
                    let state = k.ck.conns[index].state();
                    let ping = k.ck.setup.ping;
                    let cut =
                        k.ck.setup.overflow == Overflow::Disconnect || k.ck.setup.idle.is_some();
                    // What is dead without a sign is found when something is to be
                    // written, which may be just now.
                    let limit = self.setup.connect.as_nanos() as u64;
                    let conn = &k.ck.conns[index];
                    let tries = conn.tries_since(k.now.saturating_sub(limit));
                    let tries = tries || conn.waits_once(k.now);
                    // Where too much is held back for a consumer that has left, no
                    // session opens.
                    let full = gone && k.ck.conns[index].is_blocked();
                    let excused = cut || tries || full || k.is_hung(index);
                    if state != State::Connected && ping.is_some() && !excused {
                        k.broken("connected-again", || format!("conn {index} is {state}"));
                    }
                }
            });
            return;
        }
        let (ledger, _) = self.shared.queue.ledger();
        let (detects, left) = (self.setup.ping.is_some(), self.has_left());
        with(|k| {
            // A connection that is cut for each burst never gets to the end.
            let cut = self.setup.overflow == Overflow::Disconnect;
            // A slow consumer may still be at it.
            let rests = k.now > k.ck.taken_at + 5 * SECOND;
            if ledger.in_flight > 0 && rests && !cut && !left && k.hung.is_empty() {
                k.broken("backlog-drained", || ledger.to_string());
            }
        });
        if self.setup.lossless && detects && !left && with(|k| k.hung.is_empty()) {
            self.nothing_lost();
        }
        self.close();
    }

    fn nothing_lost(&self) {
        with(|k| {
            let feeds = if k.sv.redundant { 1 } else { self.setup.connections };
            for conn in 0..feeds {
                for n in 1..=k.sv.conns[conn].head {
                    let id = server::global(k, conn, n);
                    match k.ck.delivered.get(&id) {
                        None => k.broken("nothing-lost", || format!("message {id} never came")),
                        Some(it) if it.failed && k.ck.setup.dedup.is_some() => {
                            k.broken("failed-comes-again", || format!("message {id} stays failed"));
                        }
                        _ => {}
                    }
                }
            }
        });
    }

    fn close(&mut self) {
        if with(|k| k.ck.closing.is_some() || k.ck.failed.is_some()) {
            return;
        }
        let deadline = with(|k| k.pick(&[10, 100, 1000, 5000, 20_000]) * MS);
        if !self.has_pipeline || with(|k| k.wk.over) {
            self.close_client(deadline);
        } else if with(|k| k.wk.stopping.is_none()) {
            works::end(if with(|k| k.chance(0.1)) { 0 } else { deadline });
        }
        let end = with(|k| k.now) + deadline + 50 * MS;
        self.end_by(end);
    }

    fn close_client(&mut self, deadline: u64) {
        let at = kernel::instant() + Duration::from_nanos(deadline);
        with(|k| {
            k.note(|| format!("the program closes within {} ms", deadline / MS));
            k.ck.is_closed_by(k.now + deadline);
        });
        self.shared.connections.iter().for_each(|peer| peer.inbox.refuse());
        let early = (Duration::from_nanos(deadline) / 10).min(Duration::from_millis(20));
        self.shared.ask_to_close(at - early);
    }

    /// Whether everything had its time to end: a pipeline first, the client with
    /// it or behind it.
    fn is_over(&mut self) -> bool {
        if !self.has_pipeline {
            return true;
        }
        let now = with(|k| k.now);
        if with(|k| !k.wk.over) {
            match with(|k| k.wk.stopping) {
                // One that failed has five seconds from then on.
                Some(by) if now > by + 7 * SECOND => {
                    with(|k| k.broken("stop-in-time", || "it never comes back".to_owned()));
                }
                Some(_) => {}
                None if with(|k| k.wk.is_ending()) => {
                    with(|k| k.soon(20 * SECOND, Ev::StopPipeline));
                }
                None => works::stop(20 * SECOND),
            }
            with(|k| k.soon(SECOND, Ev::Finished));
            return false;
        }
        if !self.client_ends {
            self.client_ends = true;
            if with(|k| k.ck.closing.is_none() && k.ck.failed.is_none()) {
                self.close_client(5 * SECOND);
            }
            let closing = with(|k| k.ck.closing.unwrap_or(0).max(k.now));
            with(|k| k.at(closing + SECOND + SLACK, Ev::Finished));
            return false;
        }
        true
    }

    fn end_by(&mut self, at: u64) {
        if self.close_deadline == 0 {
            self.close_deadline = at;
            with(|k| k.at(at, Ev::Finished));
        }
    }

    /// The client must be over by now.
    fn finished(&mut self) {
        let (mut hung, mut alive) = (with(|k| k.hung.clone()), kernel::alive());
        // A pipeline's threads are judged with it, and the program's may be about.
        let is_works = |name: &String| name == "program" || works::is_thread(name);
        alive.retain(|name| !name.contains("dns") && !hung.contains(name) && !is_works(name));
        hung.retain(|name| !is_works(name));
        if self.has_pipeline {
            works::finished();
        }
        // A hook that sleeps can hold a thread past a short deadline: it is told.
        let told = self.shared.ending().stuck.clone();
        let hooks = with(|k| k.sv.rates.session > 0.0) && self.setup.sessions;
        if !alive.is_empty() && !hooks {
            with(|k| k.broken("close-in-time", || format!("{alive:?} still run, told {told:?}")));
        }
        if let Some(name) = hung.iter().find(|name| !told.contains(*name)) {
            with(|k| k.broken("stuck-named", || format!("{name} hangs, {told:?} told")));
        }
        // What a thread holds that never ends stays with it.
        let all_ended = alive.is_empty() && hung.is_empty();
        with(|k| k.ck.ended = true);
        if self.has_left() {
            self.abandon();
        }
        for _ in 0..5000 {
            let before = with(|k| k.ck.taken);
            self.consume();
            let waiting = self.shared.queue.ledger().0.in_flight;
            if with(|k| k.ck.taken) == before && waiting == 0 {
                break;
            }
            if with(|k| k.violation.is_some()) {
                return;
            }
        }
        self.check();
        let (ledger, _) = self.shared.queue.ledger();
        let next = self.shared.queue.try_recv().map(|message| message.metadata());
        let unread = if self.has_left() { 0 } else { ledger.in_flight };
        with(|k| {
            if all_ended && unread > 0 {
                k.broken("ends-empty", || format!("{ledger}, {next:?}"));
            }
            if all_ended {
                let open = k.net.socks.iter().filter(|sock| sock.life != Life::Released).count();
                if open > 0 {
                    k.broken("sockets-released", || format!("{open} are open at the end"));
                }
            }
            for (index, state) in self.shared.states.all().into_iter().enumerate() {
                if !state.is_final() && alive.is_empty() {
                    k.broken("states-final", || format!("conn {index} is {state}"));
                }
            }
        });
        // A close without time may leave them with threads that were just at it.
        if all_ended && !with(|k| k.ck.in_haste) {
            self.account_for_outs();
            self.compare_counters();
        }
        if self.has_pipeline {
            end_programs();
        }
    }

    /// What programs gave to send was sent, was lost with a socket, or came back.
    fn account_for_outs(&self) {
        // What is on its way arrives.
        while let Some(event) = kernel::next_event() {
            match event {
                Ev::ToServer(sock, bytes) => with(|k| server::receive(k, sock, bytes)),
                Ev::ClientGone(sock) => with(|k| server::client_gone(k, sock)),
                _ => {}
            }
        }
        let unsent = self.shared.ending().unsent.clone();
        let came_back = unsent.iter().filter_map(Outgoing::as_text);
        let back = came_back.filter(|text| text.starts_with("out ")).count() as u64;
        with(|k| {
            let pushed: u64 = self.pushed.iter().sum();
            let left: u64 = k.ck.conns.iter().map(|conn| conn.outs.len() as u64).sum();
            if pushed != left + back {
                k.broken("outgoing-accounted-for", || {
                    format!("{pushed} pushed, {left} left, {back} came back")
                });
            }
        });
    }

    /// A client that is dropped lets go of what nobody has read, and counts it.
    fn abandon(&self) {
        let before = self.shared.queue.ledger().0;
        let unread = self.shared.queue.abandon() as u64;
        let after = self.shared.queue.ledger().0;
        with(|k| {
            if unread != before.in_flight || before != after {
                k.broken("unread-counted", || format!("{unread} unread, {before}, then {after}"));
            }
        });
    }

    fn compare_counters(&self) {
        let (ledger, _) = self.shared.queue.ledger();
        with(|k| {
            let servers = std::mem::take(&mut k.sv.socks);
            for server in servers.values() {
                k.ck.got[server.conn].0 += server.messages;
                k.ck.got[server.conn].1 += server.pings;
            }
            for (index, peer) in self.shared.connections.iter().enumerate() {
                checks::counters(k, index, &peer.metrics);
            }
            checks::totals(k, &ledger, self.read(), self.shared.restarts.get());
        });
    }

    fn outcome(&self) -> Outcome {
        let (ledger, _) = self.shared.queue.ledger();
        with(|k| Outcome {
            virtual_nanos: k.now.min(self.end + 600 * SECOND),
            steps: k.steps,
            faults: k.faults,
            received: ledger.received,
            reconnects: k.ck.reconnects,
            outs: self.pushed.iter().sum(),
            handled: k.wk.tries,
            batches: k.wk.batches,
            transitions: k.ck.transitions,
        })
    }
}

/// Programs that still sleep come to their ends, and let go of what they have.
fn end_programs() {
    for _ in 0..1000 {
        if !kernel::alive().iter().any(|name| name == "program") {
            return;
        }
        if kernel::due().is_none() && !kernel::run_one() && !kernel::advance() {
            return;
        }
    }
}

/// A consumer takes a message, and with it as many behind it; whether it is one
/// of the feed's.
pub(crate) fn takes(shared: &Shared, message: &Message, behind: usize) -> bool {
    let meta = message.metadata();
    let text = message.as_bytes();
    let (Some(id), Some(of)) = (number(text, b"\"id\":"), number(text, b"\"e\":")) else {
        let text = String::from_utf8_lossy(text);
        if !text.contains("skip") && text != "welcome" {
            with(|k| k.broken("messages-whole", || text.to_string()));
        }
        with(|k| {
            k.ck.taken += 1;
            checks::in_order(k, meta.connection, (meta.epoch, meta.sequence));
        });
        return false;
    };
    let (ledger, _) = shared.queue.ledger();
    let taken = checks::Taken {
        conn: meta.connection,
        epoch: meta.epoch,
        sequence: meta.sequence,
        id,
        of,
        received: with(|k| k.nanos(meta.received_at)),
        accepted: ledger.accepted + ledger.dropped,
        in_flight: ledger.in_flight + 1 + behind as u64,
    };
    with(|k| checks::taken(k, &taken));
    true
}

/// A message has failed for good: its server sends it again.
pub(crate) fn failed(k: &mut Kernel, message: &Message) {
    let Some(id) = number(message.as_bytes(), b"\"id\":").filter(|_| message.id().is_some()) else {
        return;
    };
    checks::failed_message(k, id);
    let wait = k.range(0, 5 * SECOND);
    k.soon(wait, Ev::Redeliver(message.metadata().connection, id % 1_000_000_000));
}

/// The number behind `name`, which brings its quotes and its colon.
fn number(text: &[u8], name: &[u8]) -> Option<u64> {
    let at = text.windows(name.len()).position(|bytes| bytes == name)? + name.len();
    let digits = text[at..].iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(None, |number, digit| {
        number.unwrap_or(0_u64).checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    })
}
