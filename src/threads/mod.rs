//! What runs: one file for each kind of thread, and how they are started.

pub(crate) mod connection;
mod consume;
mod contain;
pub(crate) mod events;
pub(crate) mod held;
pub(crate) mod inbox;
pub(crate) mod monitor;
pub(crate) mod pipeline;
pub(crate) mod queue;
pub(crate) mod shared;
pub(crate) mod timer;
pub(crate) mod watched;

use std::cell::Cell;
use std::panic::resume_unwind;
use std::sync::{Mutex, MutexGuard, PoisonError};
pub(crate) use std::thread::JoinHandle;
use std::thread::{self, Builder, ScopedJoinHandle};

use crossbeam_channel::{Receiver, RecvError, Sender};

use crate::error::{Error, ErrorKind};
use crate::metrics::Counter;
#[cfg(feature = "testing")]
pub(crate) use contain::Kill;
pub(crate) use contain::{
    Killed, contained, contained_user, panic_message, panic_text, tell_backoff_panic,
};
use monitor::Notice;

/// Room for user hooks in a debug build and for long certificate chains; it is
/// only reserved, not used, memory.
const STACK: usize = 1024 * 1024;

thread_local! {
    /// The client that this thread belongs to; 0 for the program's own threads.
    static OWNER: Cell<u64> = const { Cell::new(0) };
}

/// Numbers for [`Spawner::owner`].
static OWNERS: Counter = Counter::new();

/// What every thread of one client is started with.
#[derive(Debug, Clone)]
pub(crate) struct Spawner {
    /// Number of the client, from 1.
    owner: u64,
    pub(crate) monitor: Sender<Notice>,
}

impl Spawner {
    /// The spawner of a new client.
    pub(crate) fn new(monitor: Sender<Notice>) -> Self {
        Self { owner: OWNERS.next(), monitor }
    }

    /// Starts a thread; the monitor hears of its end under `child`, panic or not.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        child: usize,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>, Error> {
        let guard = ExitGuard { child, monitor: self.monitor.clone() };
        let owner = self.owner;
        let spawned = Builder::new().name(name.to_owned()).stack_size(STACK).spawn(move || {
            OWNER.set(owner);
            let _guard = guard;
            body()
        });
        spawned.map_err(|error| {
            Error::caused(ErrorKind::Spawn, format!("thread {name} could not be started"), error)
        })
    }

    /// Does a part of the calling thread's work on a thread that ends with it, and takes
    /// its stack along; or here, if there is no thread to be had. `None` is never the
    /// answer.
    #[cfg_attr(not(feature = "tls"), allow(dead_code, reason = "it is for TLS"))]
    pub(crate) fn apart<T: Send>(&self, name: &str, work: impl FnOnce() -> T + Send) -> Option<T> {
        self.apart_with(STACK, name, work)
    }

    fn apart_with<T: Send>(
        &self,
        stack: usize,
        name: &str,
        work: impl FnOnce() -> T + Send,
    ) -> Option<T> {
        let (owner, mut work, mut done) = (self.owner, Some(work), None);
        let mut run = || done = work.take().map(|work| work());
        let started = thread::scope(|scope| {
            let thread = Builder::new().name(name.to_owned()).stack_size(stack);
            let body = || {
                OWNER.set(owner);
                run();
            };
            let ended = thread.spawn_scoped(scope, body).map(ScopedJoinHandle::join);
            ended.map(|ended| ended.unwrap_or_else(|panic| resume_unwind(panic)))
        });
        if let Err(error) = started {
            log::warn!("thread {name} could not be started: {error}");
            run();
        }
        done
    }

    /// Whether the calling thread is one of this client's: it must not wait
    /// for the client to end.
    pub(crate) fn is_own_thread(&self) -> bool {
        OWNER.get() == self.owner
    }
}

/// Waits for what is posted. Where a thread that watches nothing else waits, so
/// that the tests' world can stand in for it.
pub(crate) fn receive<T>(channel: &Receiver<T>) -> Result<T, RecvError> {
    channel.recv()
}

/// Locks, whatever became of a thread that held the lock. Where the threads of a
/// pipeline lock, so that the tests' world can let others go first.
#[inline]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the monitor that its thread is about to end, also by a panic.
struct ExitGuard {
    child: usize,
    monitor: Sender<Notice>,
}

impl Drop for ExitGuard {
    fn drop(&mut self) {
        // The monitor drains its channel until it ends; then nobody listens.
        let _ = self.monitor.send(Notice::Ended(self.child));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn work_is_done_apart_or_here_if_there_is_no_thread_to_be_had() {
        let spawner = Spawner::new(crossbeam_channel::bounded(1).0);
        let here = thread::current().id();
        let who = || (thread::current().id(), spawner.is_own_thread());
        let (apart, own) = spawner.apart("apart", who).unwrap();
        assert!(apart != here && own, "as much the client's as its caller");
        let too_large = usize::MAX / 4;
        assert_eq!(spawner.apart_with(too_large, "apart", who), Some((here, false)));
        let panic = || spawner.apart("apart", || panic!("it goes on here"));
        let panic = catch_unwind(AssertUnwindSafe(panic)).unwrap_err();
        assert_eq!(panic_message(panic), "it goes on here");
    }
}
