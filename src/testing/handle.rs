//! What other threads can do to a connection: give it orders, wake it, and
//! ask whether its client is still there.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mio::Waker;

use super::now;
use super::stream::{Presence, Watch};

/// Pushed messages that a connection may have waiting.
const MAX_PUSHED: usize = 65_536;

#[derive(Debug)]
pub(super) struct Handle {
    pub(super) id: usize,
    watch: Watch,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Taken when the thread ends, so that its descriptor goes with it.
    waker: Option<Waker>,
    cut: bool,
    pushed: Vec<Vec<u8>>,
    upgraded: bool,
    /// Roll calls asked for and answered: an answer says that all bytes that
    /// had arrived by then were read, and that the client is still there.
    asked: u64,
    answered: u64,
    ended: bool,
}

/// What a connection finds when it looks.
pub(super) struct Orders {
    pub(super) cut: bool,
    pub(super) pushed: Vec<Vec<u8>>,
    pub(super) roll_call: u64,
}

impl Handle {
    pub(super) fn new(id: usize, watch: Watch, waker: Waker) -> Self {
        let state = State {
            waker: Some(waker),
            cut: false,
            pushed: Vec::new(),
            upgraded: false,
            asked: 0,
            answered: 0,
            ended: false,
        };
        Handle { id, watch, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        order(&mut state);
        if let Some(waker) = &state.waker
            && let Err(error) = waker.wake()
        {
            log::warn!("testing server: connection {} not woken: {error}", self.id);
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    fn wait_until(&self, deadline: Instant, done: impl Fn(&State) -> bool) -> bool {
        let limit = deadline.saturating_duration_since(now());
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |state| !done(state));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// The side of those who give orders.
impl Handle {
    pub(super) fn cut(&self) {
        self.order(|state| state.cut = true);
    }

    /// Says whether the connection will send it.
    pub(super) fn push(&self, frame: &[u8]) -> bool {
        let mut taken = false;
        self.order(|state| {
            taken = state.upgraded && !state.ended && state.pushed.len() < MAX_PUSHED;
            if taken {
                state.pushed.push(frame.to_vec());
            }
        });
        taken
    }

    pub(super) fn presence(&self) -> Presence {
        self.watch.presence()
    }

    pub(super) fn call_roll(&self) {
        self.order(|state| state.asked += 1);
    }

    pub(super) fn wait_answered(&self, deadline: Instant) {
        self.wait_until(deadline, |state| state.ended || state.answered == state.asked);
    }

    pub(super) fn wait_ended(&self, deadline: Instant) -> bool {
        self.wait_until(deadline, |state| state.ended)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.lock().ended
    }
}

/// The side of the connection's own thread.
impl Handle {
    pub(super) fn take_orders(&self) -> Orders {
        let mut state = self.lock();
        Orders { cut: state.cut, pushed: std::mem::take(&mut state.pushed), roll_call: state.asked }
    }

    pub(super) fn upgraded(&self) {
        self.lock().upgraded = true;
    }

    pub(super) fn answer(&self, roll_call: u64) {
        if self.lock().answered < roll_call {
            self.change(|state| state.answered = roll_call);
        }
    }

    pub(super) fn close_waker(&self) {
        self.lock().waker = None;
    }

    pub(super) fn ended(&self) {
        self.change(|state| state.ended = true);
    }
}
