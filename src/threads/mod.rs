//! What runs: one file for each kind of thread, and how they are started.

pub(crate) mod connection;
mod consume;
pub(crate) mod events;
pub(crate) mod inbox;
pub(crate) mod monitor;
pub(crate) mod pipeline;
pub(crate) mod queue;
pub(crate) mod shared;
pub(crate) mod timer;

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread::Builder;
pub(crate) use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, RecvError, Sender};

use crate::error::{Error, ErrorKind};
use crate::metrics::Counter;
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

/// Runs user code; a panic comes back as its message.
pub(crate) fn contained<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(panic_message)
}

/// A panic that ends its thread instead of being contained: how tests kill a
/// worker.
#[derive(Debug)]
pub(crate) struct Kill;

/// Runs user code on a supervised worker; a panic comes back as its message.
pub(crate) fn contained_user<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    let mut killed = Killed::default();
    let result = killed.contain(run);
    killed.die();
    result
}

/// A kill that waits until its thread has finished what must not stay half done.
#[derive(Default)]
pub(crate) struct Killed(Option<Box<dyn Any + Send>>);

impl Killed {
    /// Runs user code; a panic comes back as its message, also that of a kill.
    pub(crate) fn contain<T>(&mut self, run: impl FnOnce() -> T) -> Result<T, String> {
        catch_unwind(AssertUnwindSafe(run)).map_err(|payload| {
            if payload.is::<Kill>() {
                self.0 = Some(payload);
                return "the thread is killed".to_owned();
            }
            panic_message(payload)
        })
    }

    /// Ends the thread if it was killed.
    #[inline]
    pub(crate) fn die(self) {
        if let Some(payload) = self.0 {
            resume_unwind(payload);
        }
    }
}

/// The message of a panic. Dropping what a user panicked with may panic too.
pub(crate) fn panic_message(payload: Box<dyn Any + Send>) -> String {
    let text = panic_text(&*payload);
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(again);
    }
    text
}

/// The message of a panic.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else if payload.is::<Kill>() {
        "killed by a test".to_owned()
    } else {
        "a panic without a message".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            std::panic::panic_any(Bomb);
        }
    }

    #[test]
    fn a_panic_whose_payload_panics_is_contained_too() {
        let end = contained(|| std::panic::panic_any(Bomb));
        assert_eq!(end, Err::<(), _>("a panic without a message".to_owned()));
    }
}
