//! A source's thread: pulls messages within room and rate, and deals them out.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{bounded, select};

use super::{Flow, Phase, lock};
use crate::message::Message;
use crate::threads::contained_user;
use crate::work::{Handler, Pull, Source, Stop, Ticket};

/// How long a source may take to close while the pipeline drains.
const CLOSE: Duration = Duration::from_secs(5);

/// Messages asked of a source at once.
const PULL: usize = 256;

/// The thread's body.
pub(crate) fn run<H: Handler>(flow: &Arc<Flow<H>>, index: usize, mut source: Box<dyn Source>) {
    let mut intake = Intake::Open;
    loop {
        if intake == Intake::Answering && flow.wait_settled() {
            intake = Intake::LastLook;
        } else if matches!(intake, Intake::Answering | Intake::Answered) {
            close(flow, index, &mut *source);
            intake = Intake::Closed;
        }
        let room = flow.reserve(PULL);
        if room == 0 {
            break;
        }
        let pulled = turn(flow, index, &mut *source, &mut intake, room);
        let count = pulled.as_ref().map_or(0, Vec::len);
        let pull = flow.accept(count, room);
        let Some(messages) = pulled else { break };
        if !deal(flow, index, messages, pull) {
            break;
        }
    }
    if intake != Intake::Closed {
        close(flow, index, &mut *source);
    }
    drop(source);
    flow.source_ended();
}

/// How far a source is on its way to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Intake {
    Open,
    /// Reads nothing new; what was read is pulled.
    Quiet,
    /// All of that is pulled; its answers go out before the close.
    Answering,
    /// All of that is answered; what was just being read may have come since.
    LastLook,
    Answered,
    Closed,
}

/// Pulls once; `None` at the source's end.
fn turn<H: Handler>(
    flow: &Flow<H>,
    index: usize,
    source: &mut dyn Source,
    intake: &mut Intake,
    room: usize,
) -> Option<Vec<Message>> {
    let mut stop = flow.sources[index].stop();
    // Looked at after the signal was taken: a change before it is seen here, one
    // after it is signalled.
    let phase = flow.phase();
    if phase == Phase::Paused || phase >= Phase::Stopped {
        return Some(Vec::new());
    }
    if phase == Phase::Draining && *intake == Intake::Open {
        *intake = begin_end(flow, index, source);
    }
    if matches!(intake, Intake::Quiet | Intake::LastLook) {
        // Nothing is waited for.
        stop = Stop { signal: bounded(0).1 };
    }
    match contained_user(|| source.pull(room, &stop)) {
        Ok(Pull::Messages(messages)) => {
            *intake = match (*intake, messages.is_empty()) {
                (Intake::Quiet, true) => Intake::Answering,
                (Intake::LastLook, true) => Intake::Answered,
                (Intake::LastLook, false) => Intake::Quiet,
                (same, _) => same,
            };
            Some(messages)
        }
        Ok(Pull::Ended) => None,
        Err(panic) => {
            flow.panicked("Source::pull", &*panic);
            None
        }
    }
}

fn begin_end<H: Handler>(flow: &Flow<H>, index: usize, source: &mut dyn Source) -> Intake {
    if contained_user(|| source.stop_reading()).unwrap_or(false) {
        return Intake::Quiet;
    }
    close(flow, index, source);
    Intake::Closed
}

fn close<H: Handler>(flow: &Flow<H>, index: usize, source: &mut dyn Source) {
    // Half of what is left is for processing what the source still gives.
    let left = flow.deadline().map(|at| at.saturating_duration_since(flow.clock.now()) / 2);
    let deadline = left.map_or(CLOSE, |left| left.min(CLOSE));
    let report = contained_user(|| source.close(deadline)).ok().flatten();
    flow.update_ending(|ending| ending.reports[index] = report);
}

/// Accepts messages and deals them to the lanes; `false` when stopped.
fn deal<H: Handler>(flow: &Flow<H>, index: usize, messages: Vec<Message>, pull: u64) -> bool {
    let slot = &flow.sources[index];
    lock(&slot.pulled).extend(messages.into_iter().map(|message| Ticket {
        message,
        source: index,
        attempts: 0,
        pull,
        tag: None,
        acknowledged: false,
        batched: false,
    }));
    loop {
        let waiting = lock(&slot.pulled).len();
        if waiting == 0 {
            return true;
        }
        let granted = granted(flow, index, waiting);
        if granted == 0 {
            if !wait_for_rate(flow, index) {
                return false;
            }
            continue;
        }
        if !send(flow, index, granted) {
            return false;
        }
    }
}

fn granted<H: Handler>(flow: &Flow<H>, index: usize, want: usize) -> usize {
    let Some(limiter) = &flow.limiter else { return want };
    let now = flow.clock.now();
    let mut limiter = lock(limiter);
    let granted = limiter.take(now, want);
    if granted == 0
        && let Some(at) = limiter.next(now)
    {
        drop(limiter);
        flow.timer.arm(flow.source_owner(index), at);
    }
    granted
}

fn wait_for_rate<H: Handler>(flow: &Flow<H>, index: usize) -> bool {
    select! {
        recv(flow.sources[index].tick.receiver) -> _ => true,
        recv(flow.stop.signal) -> _ => false,
    }
}

/// Sends the first `count` of the messages pulled to their lanes.
fn send<H: Handler>(flow: &Flow<H>, index: usize, count: usize) -> bool {
    let mut dealt: Vec<Vec<Ticket>> = flow.lanes.iter().map(|_| Vec::new()).collect();
    for ticket in lock(&flow.sources[index].pulled).iter().take(count) {
        let lane = lane(flow, &ticket.message);
        dealt[lane].push(ticket.clone());
    }
    for (lane, tickets) in dealt.into_iter().enumerate() {
        for chunk in tickets.chunks(flow.policy.chunk) {
            select! {
                send(flow.lanes[lane].sender, chunk.to_vec()) -> _ => {}
                recv(flow.stop.signal) -> _ => return false,
            }
            let mut pulled = lock(&flow.sources[index].pulled);
            forget_sent(&mut pulled, chunk);
        }
    }
    true
}

/// Takes what was sent out of what was pulled: a message is in one place only.
fn forget_sent(pulled: &mut std::collections::VecDeque<Ticket>, sent: &[Ticket]) {
    let mut sent = sent.iter().peekable();
    pulled.retain(|ticket| match sent.peek() {
        Some(first) if first.message.is_same(&ticket.message) => {
            sent.next();
            false
        }
        _ => true,
    });
}

fn lane<H: Handler>(flow: &Flow<H>, message: &Message) -> usize {
    partition_of(flow, message)
        .map_or(0, |partition| (partition % flow.lanes.len() as u64) as usize)
}

/// The partition of a message; that of a function that panics is 0.
pub(crate) fn partition_of<H: Handler>(flow: &Flow<H>, message: &Message) -> Option<u64> {
    let partition = flow.policy.partition.as_ref()?;
    Some(contained_user(|| partition(message)).unwrap_or_else(|panic| {
        flow.panicked("partition_by", &*panic);
        0
    }))
}
