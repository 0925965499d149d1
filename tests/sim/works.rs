//! The pipeline of a world: the crate's own, with its real threads, between the
//! world's client and programs that misbehave.

pub(crate) mod books;
pub(crate) mod plan;
mod users;
pub(crate) mod watch;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;

use crate::client::Client;
use crate::kernel::{self, Ev, Kernel, with};
use crate::logic::rate::RateLimit;
use crate::pipeline::{Batching, Pipeline};
use crate::sources;
use crate::threads::shared::Shared;
use crate::work::IntoSource;
use books::Books;
use plan::{Ending, Plan, draw_limit};
use users::{Item, Recorded, Records};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

thread_local! {
    /// What programs have of it.
    static PIPELINE: RefCell<Option<Arc<Pipeline>>> = const { RefCell::new(None) };
}

/// Forgets the pipeline of a world before this one; one that still runs cannot
/// be dropped.
pub(crate) fn let_go() {
    if let Some(pipeline) = PIPELINE.take()
        && !pipeline.has_ended()
    {
        std::mem::forget(pipeline);
    }
}

/// Starts it, and a program that waits for its end.
pub(crate) fn start(plan: Plan, shared: &Arc<Shared>, ended: Receiver<()>) {
    let plan = Arc::new(plan);
    with(|k| {
        k.wk = Books::new(Arc::clone(&plan));
        k.wk.limited = plan.limit.is_some();
        k.wk.may_fail = k.failing > 0.0 || k.strike.is_some();
        k.preemption = plan.preemption;
        if let Some(mean) = plan.meddles {
            let wait = k.after_about(mean);
            k.soon(wait, Ev::Meddle);
        }
    });
    let shared = Arc::clone(shared);
    kernel::spawn("program", move || match builder(&plan, shared, ended).start() {
        Ok(pipeline) => {
            let pipeline = Arc::new(pipeline);
            PIPELINE.set(Some(Arc::clone(&pipeline)));
            let report = pipeline.join();
            let snapshot = pipeline.metrics();
            with(|k| watch::ends(k, &report, &snapshot, None));
        }
        Err(error) => with(|k| {
            k.note(|| format!("the pipeline could not start: {error}"));
            k.ck.causes.iter_mut().for_each(|causes| causes.push(error.chain()));
            if !k.wk.may_fail {
                k.broken("fails-only-for-cause", || error.chain());
            }
            k.wk.over = true;
        }),
    });
}

fn builder(
    plan: &Plan,
    shared: Arc<Shared>,
    ended: Receiver<()>,
) -> crate::pipeline::PipelineBuilder<users::Works> {
    let client = Arc::new(Client::new(Arc::clone(&shared), ended));
    let first = Recorded { inner: client.into_source(), source: 0, client: Some(shared) };
    let mut builder = Pipeline::builder(users::Works)
        .source_with(first, Records(0))
        .processors(plan.processors)
        .chunk(plan.chunk)
        .queue(plan.queue)
        .max_in_flight(plan.max_in_flight)
        .restart_intensity(plan.intensity)
        .retries(plan.attempts, plan.backoff())
        .observer(|event| with(|k| watch::on_event(k, event)));
    for (index, kind) in plan.springs.iter().enumerate() {
        let source = index + 1;
        let inner = users::spring(*kind, source);
        builder = builder.source_with(Recorded { inner, source, client: None }, Records(source));
    }
    for lot in &plan.batchers {
        let batching =
            Batching::new().timeout(lot.timeout).concurrency(lot.workers).max_keys(lot.max_keys);
        let batching = if lot.weighed {
            batching.size_by(lot.limit, |item: &Item| item.weight)
        } else {
            batching.size(lot.limit)
        };
        builder = builder.batcher(lot.name, batching);
    }
    let partitions = plan.partitions;
    if partitions > 0 {
        builder = builder
            .partition_by(move |message| users::partition(books::Id::of(message), partitions));
    }
    if plan.hold {
        builder = builder.hold_order();
    }
    if let Some(limit) = plan.limit {
        builder = builder.rate_limit(limit);
    }
    if let Some(time) = plan.slow_after {
        builder = builder.handler_timeout(time);
    }
    builder
}

/// Does something with the pipeline, on a thread of the program.
fn program(run: impl FnOnce(&Pipeline) + Send + 'static) {
    kernel::spawn("program", move || {
        // It may just be starting.
        let pipeline = loop {
            if let Some(pipeline) = PIPELINE.with_borrow(Clone::clone) {
                break pipeline;
            }
            if with(|k| k.wk.over) {
                return;
            }
            kernel::sleep(Duration::from_millis(1));
        };
        run(&pipeline);
    });
}

/// Whether it may be turned at: nobody has asked it to end.
fn may_turn(k: &Kernel) -> bool {
    !k.wk.over && k.wk.stopping.is_none() && k.wk.handler_stops.is_none() && !k.wk.is_ending()
}

/// The program turns some knob.
pub(crate) fn meddle() {
    let plan = with(|k| k.wk.plan.clone()).expect("there is a pipeline");
    if !with(|k| may_turn(k) && !k.sv.healed) {
        return;
    }
    let which = with(|k| {
        let mean = plan.meddles.unwrap_or(Duration::from_secs(100));
        let wait = k.after_about(mean);
        k.soon(wait, Ev::Meddle);
        k.range(0, 5)
    });
    program(move |pipeline| match which {
        0 => {
            pipeline.pause();
            with(|k| {
                k.note(|| "the program pauses the pipeline".to_owned());
                k.wk.paused = may_turn(k);
            });
            let time = with(|k| k.range(0, 30 * SECOND));
            kernel::sleep(Duration::from_nanos(time));
            resume(pipeline);
        }
        1 => {
            with(|k| k.wk.resized = true);
            let count = with(|k| k.range(1, 5) as usize);
            with(|k| k.note(|| format!("the program wants {count} processors")));
            let is_fixed = pipeline.resize(count).is_err();
            if is_fixed != (plan.partitions > 0) {
                with(|k| k.broken("resized", || format!("refused: {is_fixed}")));
            }
        }
        2 => {
            let Some(lot) = plan.batchers.first() else { return };
            with(|k| k.wk.resized = true);
            let count = with(|k| k.range(1, 5) as usize);
            let is_fixed = pipeline.resize_batcher(lot.name, count).is_err();
            with(|k| k.note(|| format!("the program wants {count} workers, refused: {is_fixed}")));
        }
        3 => {
            let limit = with(draw_limit);
            with(|k| k.note(|| format!("the program sets {limit:?}")));
            if pipeline.set_rate_limit(limit).is_ok() {
                with(|k| k.wk.changed = k.now);
            }
        }
        _ => {
            let snapshot = pipeline.metrics();
            with(|k| watch::counted(k, &snapshot));
        }
    });
}

fn resume(pipeline: &Pipeline) {
    with(|k| {
        k.note(|| "the program resumes the pipeline".to_owned());
        k.wk.paused = false;
    });
    pipeline.resume();
}

/// User code is well from now on.
pub(crate) fn heal() {
    program(|pipeline| {
        let _ = pipeline.set_rate_limit(RateLimit::token_bucket(100_000.0, 1000));
        resume(pipeline);
    });
}

/// The program asks it to end, and has `time` nanoseconds.
pub(crate) fn end(time: u64) {
    let ending = with(|k| k.wk.plan.as_ref().map_or(Ending::Stop, |plan| plan.ending));
    with(|k| {
        k.wk.hasty |= time < 10 * MS;
        k.note(|| format!("the program ends the pipeline by {ending:?}"));
        k.wk.paused = false;
    });
    match ending {
        Ending::Stop => stop(time),
        Ending::Drain => {
            program(|pipeline| pipeline.drain());
            with(|k| k.soon(20 * SECOND, Ev::StopPipeline));
        }
        Ending::InHandler => with(|k| {
            k.wk.handler_stops = Some(time);
            k.soon(10 * SECOND, Ev::StopPipeline);
        }),
    }
}

/// Stops it, and sees that this takes no longer.
pub(crate) fn stop(time: u64) {
    with(|k| {
        k.wk.paused = false;
        k.wk.handler_stops = None;
        k.wk.stopping = Some(k.now + time);
    });
    program(move |pipeline| {
        let at = with(|k| k.now + time);
        let report = pipeline.stop(Duration::from_nanos(time));
        let now = with(|k| k.now);
        if now > at + 50 * MS {
            with(|k| k.broken("stop-in-time", || format!("{} ms late", (now - at) / MS)));
        }
        let snapshot = pipeline.metrics();
        with(|k| watch::ends(k, &report, &snapshot, Some(at)));
    });
}

/// A handler stops the pipeline that it runs in.
fn stop_in_handler(time: u64) {
    let Some(pipeline) = PIPELINE.with_borrow(Clone::clone) else { return };
    let before = with(|k| {
        k.wk.stopping = Some(k.now + time);
        k.now
    });
    let report = pipeline.stop(Duration::from_nanos(time));
    let now = with(|k| k.now);
    if now > before + SECOND || !report.ledger.balanced() {
        with(|k| k.broken("stop-in-time", || "a handler's stop waits".to_owned()));
    }
}

/// Whether a pipeline has a thread of this name, and a client has not.
pub(crate) fn is_thread(name: &str) -> bool {
    ["proc-", "batch", "source-", "undertaker"].iter().any(|part| name.contains(part))
}

/// The world is over: whoever still runs was told as stuck.
pub(crate) fn finished() {
    let mut alive = kernel::alive();
    with(|k| {
        alive.retain(|name| is_thread(name) && !k.hung.contains(name) && !k.wk.is_inside(name, 0));
        if !alive.is_empty() && k.wk.over {
            let told = k.wk.stuck.clone();
            k.broken("threads-ended", || format!("{alive:?} still run, told {told:?}"));
        }
    });
}
