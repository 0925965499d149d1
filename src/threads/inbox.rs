//! A connection's inbox: the signals and outgoing messages that wait for its
//! thread, and the waker that makes it look.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::timer::Alarm;
use crate::handler::Outgoing;
use crate::io::poll::Waker;
use crate::metrics::Counter;

/// Outlives its thread: a restarted one finds what its predecessor left.
#[derive(Debug)]
pub(crate) struct Inbox {
    state: Mutex<State>,
    /// Told when the outbox has room, or when it closes.
    room: Condvar,
    limits: OutboxLimits,
    /// Messages for one epoch that waited here when it ended.
    pub(crate) discarded: Counter,
}

/// How much may wait in an outbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OutboxLimits {
    pub(crate) messages: usize,
    /// Payload bytes; a message alone may exceed it.
    pub(crate) bytes: usize,
}

#[derive(Debug, Default)]
struct State {
    signals: Signals,
    outbox: VecDeque<Outgoing>,
    /// Payload bytes in the outbox.
    bytes: usize,
    /// Threads that wait for room.
    waiting: usize,
    /// No message is taken any more.
    closed: bool,
    /// Those that were left have been taken away: whatever comes back is too late.
    emptied: bool,
    /// The epoch whose socket is open.
    epoch: Option<u64>,
    waker: Option<Waker>,
}

/// What happened since the thread last looked.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    /// The client closes; the connection must be done by then.
    pub(crate) close: Option<Instant>,
    /// The timer's deadline came.
    pub(crate) fired: bool,
    /// The timer was restarted and knows no deadline.
    pub(crate) rearm: bool,
    /// The queue may have room.
    pub(crate) room: bool,
    /// Nothing more is to be read before the close.
    pub(crate) stop_reading: bool,
    /// A DNS look-up ended.
    pub(crate) looked_up: bool,
}

/// Why a message did not get into the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Full,
    Closed,
    EpochOver,
}

impl Signals {
    fn any(&self) -> bool {
        let plain = self.fired || self.rearm || self.room || self.stop_reading || self.looked_up;
        plain || self.close.is_some()
    }
}

impl State {
    fn takes(&self, limits: OutboxLimits, len: usize) -> bool {
        let fits = self.outbox.is_empty() || self.bytes + len <= limits.bytes;
        self.outbox.len() < limits.messages && fits
    }
}

impl Inbox {
    pub(crate) fn new(limits: OutboxLimits) -> Self {
        let (state, room) = (Mutex::default(), Condvar::new());
        Self { state, room, limits, discarded: Counter::default() }
    }

    /// A thread begins to listen.
    pub(crate) fn attach(&self, waker: Waker) {
        self.lock().waker = Some(waker);
    }

    /// The thread listens no more: its waker's descriptor is let go. What is
    /// posted waits for its successor.
    pub(crate) fn detach(&self) {
        self.lock().waker = None;
    }

    /// Whether a thread listens.
    pub(crate) fn is_attached(&self) -> bool {
        self.lock().waker.is_some()
    }

    /// Posts a signal and wakes the thread.
    pub(crate) fn post(&self, set: impl FnOnce(&mut Signals)) {
        let mut state = self.lock();
        set(&mut state.signals);
        wake(state);
    }

    /// Tells of room in the queue; `false` if no thread listens.
    pub(crate) fn post_room(&self) -> bool {
        let mut state = self.lock();
        state.signals.room = true;
        wake(state)
    }

    /// Takes the signals.
    pub(crate) fn signals(&self) -> Signals {
        std::mem::take(&mut self.lock().signals)
    }

    /// Whether the thread has something to look at: a signal or, when it can
    /// send, a message.
    pub(crate) fn posted(&self, can_send: bool) -> bool {
        let state = self.lock();
        state.signals.any() || (can_send && !state.outbox.is_empty())
    }

    /// Whether a message waits in the outbox.
    pub(crate) fn posted_message(&self) -> bool {
        !self.lock().outbox.is_empty()
    }

    /// An epoch begins: messages for it alone are taken.
    pub(crate) fn begin_epoch(&self, epoch: u64) {
        self.lock().epoch = Some(epoch);
    }

    /// The epoch is over: messages for it alone are discarded, under one lock
    /// with the refusal of further ones, so that none is left for a later socket.
    pub(crate) fn end_epoch(&self) {
        let mut state = self.lock();
        state.epoch = None;
        let gone = self.discard(&mut state);
        drop(state);
        self.room.notify_all();
        drop(gone);
    }

    /// The messages for one epoch alone. Programs may own their bytes and learn of
    /// their end, and send then: that is to come after the lock is let go.
    fn discard(&self, state: &mut State) -> VecDeque<Outgoing> {
        if state.outbox.iter().all(|Outgoing(_, only_in)| only_in.is_none()) {
            return VecDeque::new();
        }
        let all = std::mem::take(&mut state.outbox).into_iter();
        let (kept, gone) = all.partition(|Outgoing(_, only_in)| only_in.is_none());
        state.outbox = kept;
        state.bytes = state.outbox.iter().map(Outgoing::len).sum();
        self.discarded.add(gone.len() as u64);
        gone
    }

    /// Puts a message into the outbox, which must have room.
    pub(crate) fn push(&self, message: Outgoing) -> Result<(), (Refused, Outgoing)> {
        let mut state = self.lock();
        if state.closed {
            return Err((Refused::Closed, message));
        }
        if message.1.is_some() && message.1 != state.epoch {
            return Err((Refused::EpochOver, message));
        }
        if !state.takes(self.limits, message.len()) {
            return Err((Refused::Full, message));
        }
        state.bytes += message.len();
        state.outbox.push_back(message);
        wake(state);
        Ok(())
    }

    /// Waits until the outbox may have room for `len` bytes or is closed;
    /// `false` at `until`.
    pub(crate) fn wait_room(
        &self,
        len: usize,
        now: impl Fn() -> Instant,
        until: Option<Instant>,
    ) -> bool {
        let mut state = self.lock();
        while !state.closed && !state.takes(self.limits, len) {
            let left = until.map(|until| until.saturating_duration_since(now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            state.waiting += 1;
            state = match left {
                None => self.room.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.room.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            state.waiting -= 1;
        }
        true
    }

    /// The oldest message of the outbox.
    pub(crate) fn pop(&self) -> Option<Outgoing> {
        let mut state = self.lock();
        let message = state.outbox.pop_front()?;
        state.bytes -= message.len();
        let waited_for = state.waiting > 0;
        drop(state);
        if waited_for {
            // Not only one: who is woken may want more room than there is.
            self.room.notify_all();
        }
        Some(message)
    }

    /// Puts messages back, before all others and in their order, room or not:
    /// they were in here before. Those of a thread that was given up are dropped.
    pub(crate) fn put_back(&self, messages: Vec<Outgoing>) {
        let mut state = self.lock();
        if state.emptied {
            drop(state);
            if !messages.is_empty() {
                log::warn!("{} messages came back unsent after the end", messages.len());
            }
            return;
        }
        state.bytes += messages.iter().map(Outgoing::len).sum::<usize>();
        messages.into_iter().rev().for_each(|message| state.outbox.push_front(message));
    }

    /// Takes no message from now on; those in the outbox may still leave.
    pub(crate) fn refuse(&self) {
        self.lock().closed = true;
        self.room.notify_all();
    }

    /// Takes no message from now on; returns those that never left.
    pub(crate) fn close(&self) -> Vec<Outgoing> {
        let mut state = self.lock();
        (state.closed, state.emptied) = (true, true);
        let gone = self.discard(&mut state);
        state.bytes = 0;
        let left = state.outbox.drain(..).collect();
        drop(state);
        self.room.notify_all();
        drop(gone);
        left
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Alarm for Inbox {
    fn fire(&self) {
        self.post(|signals| signals.fired = true);
    }
}

/// Wakes the thread after the lock is let go; `false` if there is none.
fn wake(state: MutexGuard<'_, State>) -> bool {
    let waker = state.waker.clone();
    drop(state);
    if let Some(waker) = &waker {
        waker.wake();
    }
    waker.is_some()
}
