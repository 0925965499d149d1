//! The promises of a pipeline, as checks: what became of each message, by what
//! user code was told of it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::plan::{LONGEST_WINDOW, Lot, Plan};
use crate::checks::SLACK;
use crate::kernel::{Kernel, with};
use crate::message::Message;
use crate::pipeline::{PipelineReport, PipelineSnapshot};
use crate::threads::pipeline::stats::PipelineEvent;
use crate::work::{FailureKind, Trigger};

const SECOND: u64 = 1_000_000_000;

/// A clock that was looked at may be so old when the look is used.
const LOOK: u64 = 5_000_000;

/// A message: its source; then connection, epoch and sequence, or its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Id {
    pub(crate) source: usize,
    pub(crate) epoch: (usize, u64),
    pub(crate) n: u64,
}

/// What a message of a source beside the client says of itself.
pub(crate) fn text_of(source: usize, n: u64) -> String {
    format!("local {source} {n}")
}

impl Id {
    pub(crate) fn of(message: &Message) -> Self {
        let text = message.text().unwrap_or_default();
        if let Some(rest) = text.strip_prefix("local ") {
            let mut numbers = rest.split(' ').map(|number| number.parse::<u64>().unwrap_or(0));
            let source = numbers.next().unwrap_or(0) as usize;
            return Self { source, epoch: (0, 0), n: numbers.next().unwrap_or(0) };
        }
        let of = message.metadata();
        Self { source: 0, epoch: (of.connection, of.epoch), n: of.sequence }
    }
}

/// Where a message is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// For a processor.
    Waits,
    Handled,
    /// For its next try, which is between these times.
    Retries(u64, u64),
    /// For company in a batch of this batcher and key.
    Batched(&'static str, Option<u64>),
    /// It has succeeded or failed for good, and is to be acknowledged.
    Ends(bool),
    /// Its worker was killed with it.
    Killed,
}

#[derive(Debug)]
struct Fate {
    stage: Stage,
    since: u64,
    /// When it surely was in its batch: its batcher may have had to wait.
    batched: u64,
    /// How many were given before it.
    order: u64,
    tries: u32,
    partition: u64,
    /// Acknowledged before its batch.
    early: bool,
    told_failed: bool,
    acknowledged: bool,
    settled: bool,
}

#[derive(Default)]
pub(crate) struct Books {
    pub(crate) plan: Option<Arc<Plan>>,
    open: BTreeMap<Id, Fate>,
    done: HashSet<Id>,
    given: u64,
    good: u64,
    bad: u64,
    /// First tries, of a pipeline with a limit, and what that let pass.
    begun: u64,
    pub(crate) granted: u64,
    /// Tries whose handler came back, and those of them that failed.
    tried: u64,
    failures: u64,
    retries: u64,
    pub(crate) tries: u64,
    pub(crate) batches: u64,
    /// The last of each source that each partition's processor began, and who is
    /// at it.
    last_begun: HashMap<(usize, u64), u64>,
    at_it: HashMap<u64, String>,
    /// The last of each source that each group's batches had, and who is at it.
    last_batched: HashMap<(usize, Group), u64>,
    batching: HashMap<Group, String>,
    /// Threads in user code, and when one left it.
    inside: HashMap<String, (u32, u64)>,
    pub(crate) left: u64,
    /// Sources that are closing, for whose last messages open batches wait.
    pub(crate) closing: u32,
    pub(crate) paused: bool,
    pub(crate) limited: bool,
    /// It was resized: counters of workers may be gone.
    pub(crate) resized: bool,
    drains: Option<u64>,
    /// Threads that user code killed, and when.
    kills: HashMap<String, u64>,
    killed: u64,
    /// Restarts of each pool.
    restarts: HashMap<String, VecDeque<u64>>,
    /// When the last dead thread is back.
    back: u64,
    /// A failing call or a dead source ends it.
    pub(crate) may_fail: bool,
    swept: u64,
    /// The program's stop returns by then.
    pub(crate) stopping: Option<u64>,
    /// The next handler asks for a stop, with so much time.
    pub(crate) handler_stops: Option<u64>,
    /// It was stopped with hardly any time.
    pub(crate) hasty: bool,
    pub(crate) over: bool,
    pub(crate) stuck: Vec<String>,
}

/// Batches whose order is kept: batcher, key, partition.
type Group = (&'static str, Option<u64>, Option<u64>);

/// Threads that are in user code; leaves by itself, also by a panic.
pub(crate) struct Inside(String, u64);

impl Inside {
    pub(crate) fn enter() -> Self {
        let (name, since) = with(|k| {
            let name = k.current_name();
            k.wk.inside.entry(name.clone()).or_default().0 += 1;
            (name, k.now)
        });
        Self(name, since)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        with(|k| {
            let now = k.now;
            let (depth, left) = k.wk.inside.entry(self.0.clone()).or_default();
            *depth -= 1;
            *left = now;
            k.wk.left = now;
            if now > self.1 + SECOND / 10 {
                held_up(k, &self.0, now);
            }
        });
    }
}

/// A worker was away until then: what is on its way to its batcher's batches may
/// have waited for that.
fn held_up(k: &mut Kernel, thread: &str, until: u64) {
    let Some(plan) = k.wk.plan.clone() else { return };
    let of = |lot: &&Lot| thread.starts_with(&format!("broadsock-batch-{}-", lot.name));
    let Some(lot) = plan.batchers.iter().find(of) else { return };
    for fate in k.wk.open.values_mut() {
        if matches!(fate.stage, Stage::Batched(name, _) if name == lot.name) {
            fate.batched = fate.batched.max(until);
        }
    }
}

impl Books {
    pub(crate) fn new(plan: Arc<Plan>) -> Self {
        Self { plan: Some(plan), ..Self::default() }
    }

    fn plan(&self) -> &Plan {
        self.plan.as_ref().expect("there is a pipeline")
    }

    fn is_anybody_inside(&self) -> bool {
        self.inside.values().any(|(depth, _)| *depth > 0)
    }

    /// Whether a thread is in user code, or was later than this.
    pub(crate) fn is_inside(&self, thread: &str, since: u64) -> bool {
        self.inside.get(thread).is_some_and(|(depth, left)| *depth > 0 || *left >= since)
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.drains.is_some()
    }

    #[allow(dead_code)]
    pub(crate) fn outstanding(&self) -> usize {
        self.open.len()
    }
}

/// A source gave a message.
pub(crate) fn given(k: &mut Kernel, id: Id, partition: u64) {
    let order = k.wk.given;
    let now = k.now;
    k.wk.given += 1;
    let fate = Fate {
        stage: Stage::Waits,
        since: now,
        batched: 0,
        order,
        tries: 0,
        partition,
        early: false,
        told_failed: false,
        acknowledged: false,
        settled: false,
    };
    if k.wk.done.contains(&id) || k.wk.open.insert(id, fate).is_some() {
        k.broken("given-once", || format!("{id:?} is given again"));
    }
    let (open, most) = (k.wk.open.len(), k.wk.plan().max_in_flight);
    if open > most {
        k.broken("in-flight-bounded", || format!("{open} are in flight, {most} allowed"));
    }
}

/// A source is asked for messages.
pub(crate) fn pulls(k: &mut Kernel) {
    if k.wk.paused {
        k.broken("paused-takes-nothing", || "a source is pulled while paused".to_owned());
    }
}

fn fate(k: &mut Kernel, id: Id, what: &'static str) -> bool {
    let known = k.wk.open.contains_key(&id);
    if !known {
        let done = k.wk.done.contains(&id);
        k.broken("settled-once", || format!("{id:?} is {what}, was settled: {done}"));
    }
    known
}

/// A processor begins a message.
pub(crate) fn begins(k: &mut Kernel, id: Id) -> u32 {
    if !fate(k, id, "handled") {
        return 0;
    }
    let (now, thread) = (k.now, k.current_name());
    k.wk.tries += 1;
    k.note(|| format!("{thread} begins {id:?}"));
    ended(k, "a message");
    let plan = k.wk.plan.clone().expect("there is a pipeline");
    let fate = k.wk.open.get_mut(&id).expect("it is known");
    let stage = std::mem::replace(&mut fate.stage, Stage::Handled);
    fate.tries += 1;
    fate.since = now;
    let (tries, order, partition) = (fate.tries, fate.order, fate.partition);
    match stage {
        Stage::Waits => k.wk.begun += 1,
        Stage::Retries(low, _) if now >= low => {}
        Stage::Retries(low, _) => {
            k.broken("retry-after-its-delay", || format!("{id:?} {} ns early", low - now));
        }
        stage => k.broken("one-try-at-a-time", || format!("{id:?} is begun while {stage:?}")),
    }
    if tries > plan.attempts {
        k.broken("retries-bounded", || format!("{id:?} is tried {tries} times"));
    }
    if plan.limit.is_some() && k.wk.begun > k.wk.granted {
        let (begun, granted) = (k.wk.begun, k.wk.granted);
        k.broken("rate-kept", || format!("{begun} begun, {granted} granted"));
    }
    if plan.partitions > 0 {
        if let Some(other) = k.wk.at_it.insert(partition, thread.clone()) {
            k.broken("partition-by-one", || format!("{other} and {thread} are at {partition}"));
        }
        let last = k.wk.last_begun.insert((id.source, partition), order);
        // What fails in its batch comes again behind others.
        let holds = plan.hold && plan.batchers.is_empty() || plan.attempts == 1;
        if holds && last.is_some_and(|last| last > order || last == order && tries == 1) {
            k.broken("order-in-partition", || format!("{id:?} is number {order} after {last:?}"));
        }
    }
    tries
}

/// The handler of a message has come back, or dies.
pub(crate) fn leaves(k: &mut Kernel, id: Id) {
    let Some(partition) = k.wk.open.get(&id).map(|fate| fate.partition) else { return };
    k.wk.at_it.remove(&partition);
}

pub(crate) fn succeeded(k: &mut Kernel, id: Id) {
    k.wk.tried += 1;
    enter(k, id, Stage::Ends(true));
}

pub(crate) fn killed(k: &mut Kernel, ids: &[Id]) {
    ids.iter().for_each(|id| enter(k, *id, Stage::Killed));
    dies(k);
}

/// The thread that runs is killed.
pub(crate) fn dies(k: &mut Kernel) {
    let (now, name) = (k.now, k.current_name());
    k.note(|| format!("{name} is killed"));
    k.faults += 1;
    k.wk.killed += 1;
    // Source threads are not restarted: the pipeline fails.
    k.wk.may_fail |= name.contains("source");
    k.wk.kills.insert(name, now);
}

pub(crate) fn goes_to_batch(k: &mut Kernel, id: Id, batcher: &'static str, key: Option<u64>) {
    k.wk.tried += 1;
    enter(k, id, Stage::Batched(batcher, key));
    let at = k.now.max(k.wk.back);
    if let Some(fate) = k.wk.open.get_mut(&id) {
        fate.batched = at;
    }
}

pub(crate) fn acknowledged_early(k: &mut Kernel, id: Id) {
    if let Some(fate) = k.wk.open.get_mut(&id) {
        fate.early = true;
        fate.batched = u64::MAX;
    }
}

/// The acknowledger of a message has come back: if that was early, it is only now
/// on its way to its batch.
pub(crate) fn told(k: &mut Kernel, id: Id) {
    let now = k.now;
    if let Some(fate) = k.wk.open.get_mut(&id) {
        fate.since = now;
        fate.batched = now;
    }
}

/// A message has failed, by its handler or in its batch.
pub(crate) fn fails(k: &mut Kernel, id: Id, retry: bool, handled: bool) {
    let now = k.now;
    let plan = k.wk.plan.clone().expect("there is a pipeline");
    let Some(fate) = k.wk.open.get_mut(&id) else { return };
    let again = retry && fate.tries < plan.attempts && !fate.early;
    let (low, high) = plan.delay(fate.tries);
    let early = fate.early;
    if handled {
        k.wk.tried += 1;
        k.wk.failures += 1;
    }
    k.wk.retries += u64::from(again);
    let stage = if again { Stage::Retries(now + low, now + high) } else { Stage::Ends(early) };
    k.note(|| format!("{id:?} fails: {stage:?}"));
    enter(k, id, stage);
}

fn enter(k: &mut Kernel, id: Id, stage: Stage) {
    let now = k.now;
    if let Some(fate) = k.wk.open.get_mut(&id) {
        fate.stage = stage;
        fate.since = now;
    }
}

/// A worker begins a batch.
pub(crate) fn begins_batch(
    k: &mut Kernel,
    name: &str,
    key: Option<u64>,
    trigger: Trigger,
    items: &[(Id, usize)],
) {
    ended(k, "a batch");
    let plan = k.wk.plan.clone().expect("there is a pipeline");
    let (now, thread, lot) = (k.now, k.current_name(), *plan.lot(name));
    k.note(|| format!("{thread} begins a batch of {name}, {key:?}, by {trigger:?}: {items:?}"));
    k.wk.batches += 1;
    let len = items.len();
    if len == 0 {
        k.broken("no-empty-batch", || format!("{trigger:?}"));
        return;
    }
    let size = if lot.weighed { items.iter().map(|(_, weight)| weight).sum() } else { len };
    if size > lot.limit && len > 1 {
        k.broken("batch-within-size", || format!("{size}, {} allowed", lot.limit));
    }
    let (mut groups, timeout) = (HashSet::new(), lot.timeout.as_nanos() as u64);
    for (place, (id, _)) in items.iter().enumerate() {
        if !fate(k, *id, "in a batch") {
            return;
        }
        let fate = &k.wk.open[id];
        let (stage, since, order, tries) = (fate.stage.clone(), fate.since, fate.order, fate.tries);
        let partition = (plan.partitions > 0).then_some(fate.partition);
        let own = (lot.name, key, partition);
        if stage != Stage::Batched(lot.name, key) {
            k.broken("one-try-at-a-time", || format!("{id:?} is batched while {stage:?}"));
        }
        groups.insert(own);
        if place == 0 && trigger == Trigger::Timeout && now + LOOK < since + timeout {
            k.broken("batch-waits-for-its-time", || format!("closed {} ns old", now - since));
        }
        // With one lane, processors overtake each other. What is tried again is late.
        let kept = plan.partitions > 0 || plan.processors == 1 && !k.wk.resized;
        let ordered = key.is_some() || plan.partitions > 0 || lot.workers == 1 && !k.wk.resized;
        if kept && ordered && tries == 1 {
            let last = k.wk.last_batched.insert((id.source, own), order);
            if last.is_some_and(|last| last >= order) {
                k.broken("order-in-batches", || format!("{own:?}: {order} after {last:?}"));
            }
        }
    }
    for group in groups.into_iter().filter(|_| key.is_some() || plan.partitions > 0) {
        if let Some(other) = k.wk.batching.insert(group, thread.clone()) {
            k.broken("key-by-one", || format!("{other} and {thread} are at {group:?}"));
        }
    }
}

/// A worker is done with its batch.
pub(crate) fn leaves_batch(k: &mut Kernel) {
    let thread = k.current_name();
    k.wk.batching.retain(|_, other| *other != thread);
}

/// An item of a batch has succeeded.
pub(crate) fn batch_succeeded(k: &mut Kernel, id: Id) {
    enter(k, id, Stage::Ends(true));
}

pub(crate) fn told_failed(k: &mut Kernel, id: Id) {
    if fate(k, id, "told as failed")
        && let Some(fate) = k.wk.open.get_mut(&id)
    {
        fate.told_failed = true;
    }
}

/// An acknowledger is told of a message.
pub(crate) fn acknowledged(
    k: &mut Kernel,
    source: usize,
    id: Id,
    failed: Option<FailureKind>,
    attempts: u32,
) {
    if !fate(k, id, "acknowledged") {
        return;
    }
    let success = failed.is_none();
    k.note(|| format!("{id:?} is acknowledged after {attempts} tries: {success}"));
    let fate = k.wk.open.get_mut(&id).expect("it is known");
    let again = std::mem::replace(&mut fate.acknowledged, true);
    let (stage, tries, told, early) =
        (fate.stage.clone(), fate.tries, fate.told_failed, fate.early);
    let rightly = match stage {
        _ if early => success,
        Stage::Ends(success) => success == failed.is_none(),
        Stage::Killed => failed == Some(FailureKind::WorkerDied),
        _ => false,
    };
    if again {
        k.broken("acknowledged-once", || format!("{id:?} is acknowledged again"));
    }
    if !rightly || attempts != tries || source != id.source {
        k.broken("outcome-true", || {
            format!("{id:?}: {failed:?} told to {source} after {attempts} of {tries}: {stage:?}")
        });
    }
    if !success && !told {
        k.broken("failure-told-first", || format!("{id:?}"));
    }
}

/// A source's record is told of a message.
pub(crate) fn settled(k: &mut Kernel, id: Id, success: bool) {
    if !fate(k, id, "settled") {
        return;
    }
    let fate = k.wk.open.get_mut(&id).expect("it is known");
    let rightly = match fate.stage {
        _ if fate.early => success,
        Stage::Ends(good) => success == good,
        Stage::Killed => !success,
        _ => false,
    };
    let (acknowledged, stage) = (fate.acknowledged, fate.stage.clone());
    if !rightly || !acknowledged {
        k.broken("outcome-true", || format!("{id:?} is settled as {success}: {stage:?}"));
    }
    k.wk.open.remove(&id);
    k.wk.done.insert(id);
    if success {
        k.wk.good += 1;
    } else {
        k.wk.bad += 1;
    }
}

/// Nothing begins any more once it is over.
fn ended(k: &mut Kernel, what: &'static str) {
    let thread = k.current_name();
    if k.wk.over && !k.wk.stuck.contains(&thread) {
        k.broken("nothing-after-the-end", || format!("{thread} begins {what}"));
    }
}

/// An event that the observer was told.
pub(crate) fn on_event(k: &mut Kernel, event: &PipelineEvent) {
    let now = k.now;
    k.note(|| format!("{event}"));
    match event {
        PipelineEvent::Draining => {
            k.wk.drains.get_or_insert(now);
        }
        PipelineEvent::Batch { batcher, len, trigger } => closed(k, batcher, *len, *trigger),
        PipelineEvent::Restarting { thread, delay, .. } => {
            restarts(k, thread, now + delay.as_nanos() as u64);
        }
        PipelineEvent::Escalated { reason } => {
            if k.wk.killed == 0 && !k.wk.may_fail {
                k.broken("fails-only-for-cause", || reason.clone());
            }
            k.wk.drains.get_or_insert(now);
            k.wk.stopping = Some(k.wk.stopping.map_or(now, |by| by.min(now)));
            k.wk.kills.clear();
        }
        _ => {}
    }
}

/// A batch was closed: its time must not be long over.
fn closed(k: &mut Kernel, batcher: &str, len: usize, trigger: Trigger) {
    let (lot, now) = (*k.wk.plan().lot(batcher), k.now);
    if len == 0 {
        k.broken("no-empty-batch", || format!("{trigger:?}"));
    }
    let of = format!("broadsock-batch-{batcher}-");
    let workers = k.wk.inside.iter().filter(|(thread, _)| thread.starts_with(&of));
    let (busy, at) =
        workers.fold((0, 0), |(busy, at), (_, (depth, left))| (busy + depth, at.max(*left)));
    let timeout = lot.timeout.as_nanos() as u64;
    let waits = |fate: &&Fate| matches!(fate.stage, Stage::Batched(name, _) if name == lot.name);
    let waiting = k.wk.open.iter().filter(|(_, fate)| waits(fate));
    let oldest = waiting.map(|(id, fate)| (fate.batched, *id)).min();
    // Whoever groups may have waited for a worker.
    if let Some((oldest, id)) = oldest
        && busy == 0
        && now > oldest.saturating_add(timeout + SLACK).max(at.max(k.wk.back) + SLACK)
    {
        let late = (now - oldest - timeout) / 1_000_000;
        k.broken("batch-in-time", || format!("{batcher}, {id:?}: {late} ms late"));
    }
}

/// A dead thread will be back at `at`.
fn restarts(k: &mut Kernel, thread: &str, at: u64) {
    let intensity = k.wk.plan().intensity;
    let died = k.wk.kills.remove(thread);
    if died.is_none() {
        k.broken("restarts-the-dead", || format!("{thread} was not killed"));
    }
    if at < k.now + 250_000_000 {
        let now = k.now;
        k.broken("no-hot-restart", || format!("{thread} restarts in {} ns", at - now));
    }
    // All processors are one pool, and all workers of a batcher.
    let pool = thread.rsplit_once('-').map_or(thread, |(pool, _)| pool).to_owned();
    let within = intensity.within.as_nanos() as u64;
    let times = k.wk.restarts.entry(pool.clone()).or_default();
    times.push_back(at);
    times.retain(|old| old + within >= at);
    let count = times.len();
    if count > intensity.restarts as usize {
        k.broken("restarts-within-intensity", || format!("{pool}: {count} restarts"));
    }
    k.wk.back = k.wk.back.max(at);
    held_up(k, thread, at);
}

/// Looked at every half second of virtual time: nobody waits for ever.
pub(crate) fn sweep(k: &mut Kernel) {
    let now = k.now;
    if k.wk.plan.is_none() || k.wk.over || now < k.wk.swept + SECOND / 2 {
        return;
    }
    k.wk.swept = now;
    // What it was at, it finishes.
    let is_dead = |(thread, at): &(&String, &u64)| {
        now > **at + SLACK && !k.wk.is_inside(thread, now.saturating_sub(SLACK))
    };
    if let Some((thread, _)) = k.wk.kills.iter().find(is_dead)
        && k.wk.drains.is_none()
    {
        let thread = thread.clone();
        k.broken("dead-worker-replaced", || format!("{thread} is dead"));
    }
    let busy = k.wk.is_anybody_inside() || now < k.wk.left.max(k.wk.back) + SLACK;
    if busy || k.wk.open.is_empty() || k.wk.stopping.is_some_and(|at| now >= at) {
        return;
    }
    let overdue = {
        let wk = &k.wk;
        let rate = if wk.limited { LONGEST_WINDOW } else { 0 };
        let any = |is: fn(&Stage) -> bool| wk.open.values().any(|fate| is(&fate.stage));
        let retries = any(|stage| matches!(stage, Stage::Retries(..)));
        let upstream = retries || any(|stage| matches!(stage, Stage::Waits));
        let closing = upstream || wk.closing > 0;
        let drains = wk.drains.is_some_and(|at| now > at + SLACK) && !closing;
        let time_of = |name| wk.plan().lot(name).timeout.as_nanos() as u64;
        let due = |fate: &Fate| match fate.stage {
            Stage::Retries(_, high) => high,
            _ => 0,
        };
        let last_due = wk.open.values().map(due).max().unwrap_or(0);
        // A processor may hold still for one that it tries again later.
        let held = wk.plan().hold && now <= last_due + SLACK;
        let is_overdue = |fate: &Fate| match fate.stage {
            Stage::Waits => !held && now > wk.left.max(fate.since) + rate + SLACK,
            Stage::Retries(_, high) => !held && now > high + SLACK,
            Stage::Batched(..) if drains => true,
            Stage::Batched(name, _) => now > fate.batched.saturating_add(time_of(name) + SLACK),
            Stage::Handled | Stage::Ends(_) | Stage::Killed => now > fate.since + SLACK,
        };
        let found = wk.open.iter().find(|(_, fate)| is_overdue(fate));
        found.map(|(id, fate)| (*id, fate.stage.clone(), fate.since, drains))
    };
    let Some((id, stage, since, drains)) = overdue else { return };
    let check = match stage {
        Stage::Batched(..) if drains => "flushed-on-stop",
        Stage::Batched(..) => "batch-in-time",
        _ => "nobody-waits-for-ever",
    };
    k.broken(check, || format!("{id:?} is {stage:?} since {} ms", (now - since) / 1_000_000));
}

/// The counters at some instant.
pub(crate) fn counted(k: &mut Kernel, snapshot: &PipelineSnapshot) {
    let ledger = &snapshot.ledger;
    let (given, good, bad) = (k.wk.given, k.wk.good, k.wk.bad);
    let most = k.wk.plan().max_in_flight as u64;
    let over = ledger.succeeded > good || ledger.failed > bad || ledger.accepted > given;
    if !ledger.balanced() || over || ledger.in_flight > most {
        k.broken("pipeline-balanced", || format!("{ledger}: {given} given, {good} and {bad}"));
    }
}

/// It has ended, with this report.
pub(crate) fn ends(
    k: &mut Kernel,
    report: &PipelineReport,
    snapshot: &PipelineSnapshot,
    asked: Option<u64>,
) {
    let PipelineReport { ledger, returned, stuck, error, .. } = report;
    let text = format!("{ledger}, {} returned, stuck {stuck:?}, {error:?}", returned.len());
    k.note(|| format!("the pipeline has ended: {text}"));
    let first = !std::mem::replace(&mut k.wk.over, true);
    if first {
        k.wk.stuck.clone_from(&report.stuck);
    }
    let ledger = report.ledger;
    if !ledger.balanced() || ledger.in_flight > 0 {
        k.broken("pipeline-balanced", || text.clone());
    }
    // Of the stop's time, the last part is for threads to end.
    let told = |thread: &&String| {
        let since = asked.map_or(0, |at| at.saturating_sub(SECOND / 2));
        !k.wk.is_inside(thread, since) && !k.hung.contains(*thread)
    };
    let wrongly: Vec<String> = report.stuck.iter().filter(told).cloned().collect();
    if !wrongly.is_empty() && !k.wk.hasty {
        k.broken("only-user-code-is-stuck", || format!("{wrongly:?} are told"));
    }
    let mut returned: Vec<Id> = report.returned.iter().map(Id::of).collect();
    returned.sort_unstable();
    let len = returned.len();
    returned.dedup();
    if returned.len() != len || ledger.returned != len as u64 {
        k.broken("returned-once", || text.clone());
    }
    let stray = returned.iter().find(|id| !k.wk.open.contains_key(id) && !k.wk.done.contains(id));
    if let Some(id) = stray {
        k.broken("returned-once", || format!("{id:?} is returned"));
    }
    // Of one that was just being settled it is not known what became of it.
    let both = returned.iter().find(|id| k.wk.done.contains(id)).copied();
    if let Some(id) = both
        && report.stuck.is_empty()
    {
        k.broken("settled-or-returned", || format!("{id:?} is both; {text}"));
    }
    let lost = k.wk.open.keys().find(|id| returned.binary_search(id).is_err()).copied();
    let source = report.stuck.iter().any(|thread| thread.contains("source"));
    if let Some(id) = lost
        && !source
    {
        k.broken("nothing-unaccounted-for", || format!("{id:?} is lost; {text}"));
    }
    if report.stuck.is_empty() && (ledger.succeeded, ledger.failed) != (k.wk.good, k.wk.bad) {
        let (good, bad) = (k.wk.good, k.wk.bad);
        k.broken("pipeline-balanced", || format!("{good} and {bad} told; {text}"));
    }
    if report.stuck.is_empty() {
        quiet_counters(k, snapshot);
    }
}

/// What the counters say when every thread has ended.
fn quiet_counters(k: &mut Kernel, snapshot: &PipelineSnapshot) {
    for stage in &snapshot.stages {
        if stage.queued > 0 {
            k.broken("counters-true", || format!("{}: {} queued", stage.name, stage.queued));
        }
    }
    let workers = &snapshot.stages[0].workers;
    let sum = |of: fn(&crate::pipeline::WorkerSnapshot) -> u64| workers.iter().map(of).sum::<u64>();
    let told = (sum(|worker| worker.handled), sum(|worker| worker.failed), snapshot.retries);
    let known = (k.wk.tried, k.wk.failures, k.wk.retries);
    if told != known && !k.wk.resized {
        k.broken("counters-true", || format!("tries, failures, retries: {told:?}, not {known:?}"));
    }
}
