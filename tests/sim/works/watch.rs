//! What holds of a whole pipeline, as checks: its events, its counters, its end,
//! and that nobody in it waits for ever.

use super::books::{Fate, Id, Stage, held_up};
use super::plan::LONGEST_WINDOW;
use crate::checks::SLACK;
use crate::kernel::Kernel;
use crate::pipeline::{PipelineReport, PipelineSnapshot, WorkerSnapshot};
use crate::threads::pipeline::stats::PipelineEvent;
use crate::work::Trigger;

const SECOND: u64 = 1_000_000_000;

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
    // Without a timer, nothing would say that the time has come.
    if at < k.now + 250_000_000 && thread != "broadsock-timer" {
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
            Stage::Waits => {
                let since = wk.left.max(fate.since).max(wk.changed);
                !held && now > since + rate + SLACK
            }
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
    let sum = |of: fn(&WorkerSnapshot) -> u64| workers.iter().map(of).sum::<u64>();
    let told = (sum(|worker| worker.handled), sum(|worker| worker.failed), snapshot.retries);
    let known = (k.wk.tried, k.wk.failures, k.wk.retries);
    if told != known && !k.wk.resized {
        k.broken("counters-true", || format!("tries, failures, retries: {told:?}, not {known:?}"));
    }
}
