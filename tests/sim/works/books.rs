//! The promises of a pipeline, as checks: what became of each message, by what
//! user code was told of it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::plan::{Lot, Plan};
use crate::kernel::{Kernel, with};
use crate::message::Message;
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
pub(super) enum Stage {
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
pub(super) struct Fate {
    pub(super) stage: Stage,
    pub(super) since: u64,
    /// When it surely was in its batch: its batcher may have had to wait.
    pub(super) batched: u64,
    /// How many were given before it.
    pub(super) order: u64,
    pub(super) tries: u32,
    pub(super) partition: u64,
    /// Acknowledged before its batch.
    pub(super) early: bool,
    pub(super) told_failed: bool,
    pub(super) acknowledged: bool,
}

#[derive(Default)]
pub(crate) struct Books {
    pub(crate) plan: Option<Arc<Plan>>,
    pub(super) open: BTreeMap<Id, Fate>,
    pub(super) done: HashSet<Id>,
    pub(super) given: u64,
    pub(super) good: u64,
    pub(super) bad: u64,
    /// First tries, of a pipeline with a limit, and what that let pass.
    pub(super) begun: u64,
    pub(crate) granted: u64,
    pub(crate) tries: u64,
    /// Tries whose handler came back, and those of them that failed.
    pub(super) tried: u64,
    pub(super) failures: u64,
    pub(super) retries: u64,
    pub(crate) batches: u64,
    /// The last of each source that each partition's processor began, and who is
    /// at it.
    pub(super) last_begun: HashMap<(usize, u64), u64>,
    pub(super) at_it: HashMap<u64, String>,
    /// The last of each source that each group's batches had, and who is at it.
    pub(super) last_batched: HashMap<(usize, Group), u64>,
    pub(super) batching: HashMap<Group, String>,
    /// Threads in user code, and when one left it.
    pub(super) inside: HashMap<String, (u32, u64)>,
    pub(crate) left: u64,
    /// Sources that are closing, for whose last messages open batches wait.
    pub(crate) closing: u32,
    pub(crate) paused: bool,
    pub(crate) limited: bool,
    /// When the rate limit was changed last: a window of another length begins then.
    pub(crate) changed: u64,
    /// It was resized: counters of workers may be gone.
    pub(crate) resized: bool,
    pub(super) drains: Option<u64>,
    /// Threads that user code killed, and when.
    pub(super) kills: HashMap<String, u64>,
    pub(super) killed: u64,
    /// Restarts of each pool.
    pub(super) restarts: HashMap<String, VecDeque<u64>>,
    /// When the last dead thread is back.
    pub(super) back: u64,
    /// A failing call or a dead source ends it.
    pub(crate) may_fail: bool,
    pub(super) swept: u64,
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
pub(super) type Group = (&'static str, Option<u64>, Option<u64>);

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
pub(super) fn held_up(k: &mut Kernel, thread: &str, until: u64) {
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

    pub(super) fn plan(&self) -> &Plan {
        self.plan.as_ref().expect("there is a pipeline")
    }

    pub(super) fn is_anybody_inside(&self) -> bool {
        self.inside.values().any(|(depth, _)| *depth > 0)
    }

    /// Whether a thread is in user code, or was later than this.
    pub(crate) fn is_inside(&self, thread: &str, since: u64) -> bool {
        self.inside.get(thread).is_some_and(|(depth, left)| *depth > 0 || *left >= since)
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.drains.is_some()
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

/// The thread is killed that acknowledged them: those that were to go to a batch then
/// do not.
pub(super) fn never_batched(k: &mut Kernel, ids: &[Id]) {
    for id in ids {
        if k.wk.open.get(id).is_some_and(|fate| matches!(fate.stage, Stage::Batched(..))) {
            enter(k, *id, Stage::Killed);
        }
    }
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
