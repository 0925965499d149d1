//! What the threads of one client share.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Spawner;
use super::connection::ConnectionPolicy;
use super::events::Hub;
use super::held::{Estate, Left};
use super::inbox::Inbox;
use super::monitor::Notice;
use super::queue::Queue;
use super::timer::Timer;
use crate::error::{BoxError, Error};
use crate::event::{Event, EventKind, State};
use crate::handler::{Attempt, Outgoing, Request};
use crate::io::clock::Clock;
use crate::metrics::{ConnectionMetrics, Counter, DropReason, Snapshot};

/// Where a connection connects to: the same each time, or asked for each time.
#[derive(Clone)]
pub(crate) enum Endpoint {
    Fixed(Request),
    Hook(RequestHook),
}

/// A user's function that says where to connect, before each attempt.
pub(crate) type RequestHook = Arc<dyn Fn(&Attempt) -> Result<Request, BoxError> + Send + Sync>;

/// Looks up a host name.
pub(crate) type Resolver = Arc<dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync>;

/// One client's shared parts.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) clock: Clock,
    pub(crate) policy: ConnectionPolicy,
    pub(crate) queue: Queue,
    pub(crate) hub: Hub<Event>,
    pub(crate) timer: Timer,
    pub(crate) spawner: Spawner,
    pub(crate) connections: Vec<Peer>,
    pub(crate) states: States,
    pub(crate) restarts: Counter,
    pub(crate) ending: Mutex<Ending>,
    /// The earliest deadline that a close asked for.
    pub(crate) close_by: Mutex<Option<Instant>>,
}

/// How a client ended.
#[derive(Debug, Default)]
pub(crate) struct Ending {
    pub(crate) error: Option<Error>,
    pub(crate) stuck: Vec<String>,
    pub(crate) unsent: Vec<Outgoing>,
    /// The client is dropped: nobody asks for them any more.
    abandoned: bool,
}

/// One connection as others see it; it outlives the connection's thread.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) endpoint: Endpoint,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) metrics: ConnectionMetrics,
    /// What its last thread has left for the next one.
    pub(crate) estate: Estate,
}

/// The connections' states, and a way to wait for one.
#[derive(Debug)]
pub(crate) struct States {
    all: Mutex<AllStates>,
    changed: Condvar,
}

#[derive(Debug)]
struct AllStates {
    of: Vec<State>,
    /// The client has ended: nothing changes any more.
    ended: bool,
}

impl Shared {
    pub(crate) fn emit(&self, connection: usize, epoch: u64, kind: EventKind) {
        self.hub.emit(Event { at: self.clock.now(), connection, epoch, kind });
    }

    /// Enters a connection's new state and tells of it.
    pub(crate) fn transition(&self, connection: usize, from: State, to: State, reason: &str) {
        if !self.states.set(connection, to) {
            return;
        }
        let epoch = self.connections[connection].metrics.epoch();
        let reason = reason.to_owned();
        self.emit(connection, epoch, EventKind::State { from, to, reason });
    }

    /// Asks the monitor to end the client by `deadline`; never waits for it.
    pub(crate) fn ask_to_close(&self, deadline: Instant) {
        {
            let mut asked = self.close_by.lock().unwrap_or_else(PoisonError::into_inner);
            *asked = Some(asked.map_or(deadline, |earlier| earlier.min(deadline)));
        }
        // A full channel holds notices, and each makes the monitor look.
        // Disconnected: it has ended already.
        let _ = self.spawner.monitor.try_send(Notice::Tick);
    }

    pub(crate) fn close_asked(&self) -> Option<Instant> {
        *self.close_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves what a connection's thread had; what is held goes to the queue if
    /// nobody will take it over.
    pub(crate) fn leave(&self, connection: usize, left: Left) {
        if let Err(mut held) = self.connections[connection].estate.leave(left) {
            self.tell_late(connection, held.release(&self.queue));
        }
    }

    /// Offers what a connection holds that has no thread at the moment.
    pub(crate) fn offer_left(&self, connection: usize) {
        let (late, free) = self.connections[connection].estate.offer(&self.queue);
        self.tell_late(connection, late);
        if free {
            let epoch = self.connections[connection].metrics.epoch();
            self.emit(connection, epoch, EventKind::Blocked(false));
        }
    }

    /// No thread of the connection follows: what it holds goes to the queue.
    pub(crate) fn release_left(&self, connection: usize) {
        let late = self.connections[connection].estate.close().release(&self.queue);
        self.tell_late(connection, late);
    }

    /// Tells of messages that came when the queue was closed.
    fn tell_late(&self, connection: usize, late: usize) {
        if late > 0 {
            let epoch = self.connections[connection].metrics.epoch();
            let (count, reason) = (late as u64, DropReason::Closed.phrase());
            self.emit(connection, epoch, EventKind::Dropped { count, reason });
        }
    }

    /// Takes no message any more but those that ended threads have left.
    pub(crate) fn close_queue(&self) {
        (0..self.connections.len()).for_each(|connection| self.release_left(connection));
        self.queue.close();
    }

    /// Nothing comes any more: everybody who waits for something hears of it.
    pub(crate) fn end(&self) {
        self.close_queue();
        self.connections.iter().for_each(|peer| peer.inbox.refuse());
        let failed = self.ending().error.is_some();
        self.states.end(if failed { State::Failed } else { State::Closed });
        self.hub.close();
    }

    pub(crate) fn ending(&self) -> MutexGuard<'_, Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what an end leaves for the reports; what nobody will ask for goes.
    pub(crate) fn settle_end(&self, stuck: Vec<String>, unsent: Vec<Outgoing>) {
        let mut ending = self.ending();
        ending.stuck = stuck;
        if !ending.abandoned {
            ending.unsent = unsent;
            return;
        }
        drop(ending);
        drop(unsent);
    }

    /// Nobody will ask for messages that were not sent. Their owners may hold
    /// senders, which hold all that is shared.
    pub(crate) fn abandon_unsent(&self) {
        let mut ending = self.ending();
        ending.abandoned = true;
        let unsent = std::mem::take(&mut ending.unsent);
        drop(ending);
        drop(unsent);
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let now = self.clock.now();
        let states = self.states.all();
        let (ledger, dropped) = self.queue.ledger();
        Snapshot {
            ledger,
            dropped,
            without_id: self.queue.without_id.get(),
            restarts: self.restarts.get(),
            events_lost: self.hub.lost.get(),
            connections: self
                .connections
                .iter()
                .zip(states)
                .map(|(peer, state)| {
                    let discarded = peer.inbox.discarded.get();
                    peer.metrics.snapshot(state, now, discarded)
                })
                .collect(),
        }
    }
}

impl States {
    pub(crate) fn new(count: usize) -> Self {
        let of = vec![State::Disconnected; count];
        Self { all: Mutex::new(AllStates { of, ended: false }), changed: Condvar::new() }
    }

    pub(crate) fn all(&self) -> Vec<State> {
        self.lock().of.clone()
    }

    pub(crate) fn of(&self, connection: usize) -> State {
        self.lock().of[connection]
    }

    /// Enters a state; `false` if the client has ended: a thread that a hook
    /// held up past the end must not bring a final state back to life.
    pub(crate) fn set(&self, connection: usize, state: State) -> bool {
        let mut states = self.lock();
        if !states.ended {
            states.of[connection] = state;
        }
        self.changed.notify_all();
        !states.ended
    }

    /// Every state is final from now on, `to` where it was not, and nobody
    /// waits for another.
    pub(crate) fn end(&self, to: State) {
        let mut states = self.lock();
        if !states.ended {
            let open = states.of.iter_mut().filter(|state| !state.is_final());
            open.for_each(|state| *state = to);
            states.ended = true;
        }
        drop(states);
        self.changed.notify_all();
    }

    /// Has everybody who waits look again: something beside the states changed.
    pub(crate) fn look_again(&self) {
        // With the lock, nobody is between a look and the wait.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Waits until `reached` says so, the client has ended, or `until` has come.
    pub(crate) fn wait(
        &self,
        clock: Clock,
        until: Option<Instant>,
        reached: impl Fn(&[State]) -> bool,
    ) {
        let mut states = self.lock();
        while !states.ended && !reached(&states.of) {
            states = match until {
                None => self.changed.wait(states).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(clock.now());
                    if left.is_zero() {
                        return;
                    }
                    let waited = self.changed.wait_timeout(states, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Whether the client has ended.
    pub(crate) fn ended(&self) -> bool {
        self.lock().ended
    }

    fn lock(&self) -> MutexGuard<'_, AllStates> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Fixed(request) => request.fmt(f),
            Endpoint::Hook(_) => f.write_str("Hook"),
        }
    }
}
