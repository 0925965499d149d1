//! A source's thread: pulls messages within room and rate, and deals them out.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Select, bounded, select};

use super::chunk::Chunk;
use super::{Flow, Lane, Phase, Room, count, lock};
use crate::error::{Error, ErrorKind};
use crate::message::Message;
use crate::threads::{contained, contained_user};
use crate::work::{Handler, Pull, Pulled, Source, Stop};

/// How long a source may take to close while the pipeline drains.
const CLOSE: Duration = Duration::from_secs(5);

/// Messages asked of a source at once, if its share of the room is so large.
const PULL: usize = 256;

/// Payload bytes that are accepted together: a message keeps the others in memory
/// until all of them are settled, but no more than this of them.
const PORTION: usize = 256 * 1024;

/// The thread's body.
pub(crate) fn run<H: Handler>(flow: &Arc<Flow<H>>, index: usize, source: Box<dyn Source>) {
    let mut intake = Intake { flow, index, source, state: State::Open };
    intake.run();
    intake.close();
    if let Err(panic) = contained(|| drop(intake)) {
        flow.panicked("Source::drop", panic);
    }
    flow.source_ended();
}

/// A source, and how it is taken in.
struct Intake<'f, H: Handler> {
    flow: &'f Flow<H>,
    index: usize,
    source: Box<dyn Source>,
    state: State,
}

/// How far a source is on its way to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
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

impl<H: Handler> Intake<'_, H> {
    fn run(&mut self) {
        loop {
            match self.state {
                State::Answering if self.flow.wait_settled() => self.state = State::LastLook,
                State::Answering | State::Answered => self.close(),
                _ => {}
            }
            let room = match self.flow.reserve(self.share(), self.state == State::Open) {
                Room::For(room) => room,
                Room::End => {
                    self.begin_end();
                    continue;
                }
                Room::Stopped => return,
            };
            let pulled = self.pull(room);
            let has_ended = pulled.is_none();
            let accepted = self.flow.accept(self.index, pulled.unwrap_or_default(), room);
            if !accepted.into_iter().all(|pulled| self.deal(&pulled)) || has_ended {
                return;
            }
        }
    }

    /// The most room it may hold while it waits: a source that has nothing must
    /// not keep that of the others.
    fn share(&self) -> usize {
        (self.flow.policy.max_in_flight / self.flow.sources.len()).clamp(1, PULL)
    }

    /// Pulls once; `None` at the source's end.
    fn pull(&mut self, room: usize) -> Option<Vec<Message>> {
        let mut stop = self.flow.sources[self.index].stop();
        // Looked at after the signal was taken: a change before it is seen here,
        // one after it is signalled.
        match self.flow.phase() {
            Phase::Running => {}
            Phase::Draining if self.state != State::Open => {}
            _ => return Some(Vec::new()),
        }
        if self.state != State::Open {
            // Nothing is waited for.
            stop = Stop { signal: bounded(0).1 };
        }
        match contained_user(|| self.source.pull(room, &stop)) {
            Ok(Pull::Messages(messages)) if self.state == State::Closed && messages.is_empty() => {
                None
            }
            Ok(Pull::Messages(messages)) => {
                self.state = match (self.state, messages.is_empty()) {
                    (State::Quiet, true) => State::Answering,
                    (State::LastLook, true) => State::Answered,
                    (State::LastLook, false) => State::Quiet,
                    (same, _) => same,
                };
                Some(messages)
            }
            Ok(Pull::Ended) => None,
            Err(panic) => {
                let phrase = format!("source {} panicked: {panic}", self.index);
                self.flow.panicked("Source::pull", panic);
                self.flow.update_ending(|ending| {
                    ending.error.get_or_insert(Error::new(ErrorKind::Panicked, phrase));
                });
                None
            }
        }
    }

    /// The pipeline drains: reads nothing new, or closes at once.
    fn begin_end(&mut self) {
        match contained_user(|| self.source.stop_reading()) {
            Ok(true) => self.state = State::Quiet,
            Ok(false) => self.close(),
            Err(panic) => {
                self.flow.panicked("Source::stop_reading", panic);
                self.close();
            }
        }
    }

    /// Closes the source, once.
    fn close(&mut self) {
        if std::mem::replace(&mut self.state, State::Closed) == State::Closed {
            return;
        }
        // Half of what is left is for processing what the source still gives.
        let now = self.flow.clock.now();
        let left = self.flow.deadline().map(|at| at.saturating_duration_since(now) / 2);
        let deadline = left.map_or(CLOSE, |left| left.min(CLOSE));
        match contained_user(|| self.source.end(deadline)) {
            Ok(report) => self.flow.update_ending(|ending| ending.reports[self.index] = report),
            Err(panic) => self.flow.panicked("Source::end", panic),
        }
    }

    /// Deals messages to the lanes as the rate allows; `false` when stopped.
    fn deal(&mut self, pulled: &Arc<Pulled>) -> bool {
        if let Some(partition) = &self.flow.policy.partition {
            let of = |message| partition_of(self.flow, &**partition, message);
            // Nobody else sets it.
            let _ = pulled.partitions.set(pulled.messages.iter().map(of).collect());
        }
        let (mut dealt, all) = (0, pulled.messages.len());
        while dealt < all {
            let granted = self.granted(all - dealt);
            let go_on = if granted == 0 {
                self.wait_for_rate()
            } else {
                self.send(pulled, dealt..dealt + granted)
            };
            if !go_on {
                return false;
            }
            dealt += granted;
        }
        true
    }

    fn granted(&self, want: usize) -> usize {
        let Some(limiter) = &self.flow.limiter else { return want };
        let now = self.flow.clock.now();
        let (granted, next) = {
            let mut limiter = lock(limiter);
            (limiter.take(now, want), limiter.next(now))
        };
        if granted == 0
            && let Some(at) = next
        {
            self.flow.timer.arm(self.flow.source_owner(self.index), at);
        }
        granted
    }

    fn wait_for_rate(&mut self) -> bool {
        let go_on = select! {
            recv(self.flow.sources[self.index].tick.receiver) -> _ => true,
            recv(self.flow.stop.signal) -> _ => false,
        };
        self.begin_end_if_draining();
        go_on
    }

    /// It must not take in more while what it gave is dealt out slowly.
    fn begin_end_if_draining(&mut self) {
        if self.flow.phase() == Phase::Draining && self.state == State::Open {
            self.begin_end();
        }
    }

    /// Sends messages to their lanes, in chunks.
    fn send(&mut self, pulled: &Arc<Pulled>, places: Range<usize>) -> bool {
        let flow = self.flow;
        let size = flow.policy.chunk;
        if let [lane] = &*flow.lanes {
            let mut starts = places.clone().step_by(size);
            return starts.all(|start| {
                let end = places.end.min(start.saturating_add(size));
                self.send_chunk(lane, Chunk::range(pulled, narrow(start)..narrow(end)))
            });
        }
        let mut dealt: Vec<Vec<u32>> = flow.lanes.iter().map(|_| Vec::new()).collect();
        for place in places.map(narrow) {
            dealt[flow.lane_of(pulled.partition(place))].push(place);
        }
        flow.lanes.iter().zip(dealt).all(|(lane, places)| {
            let mut chunks = places.chunks(size);
            chunks.all(|places| self.send_chunk(lane, Chunk::places(pulled, places.to_vec())))
        })
    }

    fn send_chunk(&mut self, lane: &Lane, chunk: Chunk) -> bool {
        let flow = self.flow;
        lane.queued.add(count(chunk.len()));
        // Mostly there is room, and nothing has to be waited for.
        let mut left = match lane.sender.try_send(chunk) {
            Ok(()) => return true,
            Err(error) => Some(error.into_inner()),
        };
        loop {
            let mut select = Select::new();
            let send = select.send(&lane.sender);
            let tick = select.recv(&flow.sources[self.index].tick.receiver);
            select.recv(&flow.stop.signal);
            let ready = select.select();
            let index = ready.index();
            if index == send {
                // The lane holds a receiver of its own: it takes what is sent.
                return left.take().is_some_and(|chunk| ready.send(&lane.sender, chunk).is_ok());
            }
            if index == tick {
                let _ = ready.recv(&flow.sources[self.index].tick.receiver);
                self.begin_end_if_draining();
                continue;
            }
            let _ = ready.recv(&flow.stop.signal);
            return false;
        }
    }
}

impl<H: Handler> Flow<H> {
    /// The lane of the worker that messages of a partition belong to.
    pub(crate) fn lane_of(&self, partition: Option<u64>) -> usize {
        (partition.unwrap_or(0) % self.lanes.len() as u64) as usize
    }
}

/// What a pull brought, in portions whose messages may keep each other in memory.
pub(crate) fn portions(messages: Vec<Message>) -> Vec<Vec<Message>> {
    if messages.iter().map(Message::len).sum::<usize>() <= PORTION {
        return vec![messages];
    }
    let mut portions: Vec<Vec<Message>> = Vec::new();
    let mut bytes = 0;
    for message in messages {
        bytes += message.len();
        match portions.last_mut() {
            Some(portion) if bytes <= PORTION => portion.push(message),
            _ => {
                bytes = message.len();
                portions.push(vec![message]);
            }
        }
    }
    portions
}

/// A place in a pull, which is far smaller.
fn narrow(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

/// The partition of a message; that of a function that panics is 0.
fn partition_of<H: Handler>(
    flow: &Flow<H>,
    partition: &(dyn Fn(&Message) -> u64 + Send + Sync),
    message: &Message,
) -> u64 {
    contained_user(|| partition(message)).unwrap_or_else(|message| {
        flow.panicked("partition_by", message);
        0
    })
}
