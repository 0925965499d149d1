//! The crate's `threads/`, with coroutines for threads.

#[path = "../../src/threads/connection/mod.rs"]
pub(crate) mod connection;
#[path = "../../src/threads/consume.rs"]
pub(crate) mod consume;
mod contain;
#[path = "../../src/threads/events.rs"]
pub(crate) mod events;
pub(crate) mod held;
#[path = "../../src/threads/inbox.rs"]
pub(crate) mod inbox;
#[path = "../../src/threads/monitor.rs"]
pub(crate) mod monitor;
pub(crate) mod pipeline;
#[path = "../../src/threads/queue.rs"]
pub(crate) mod queue;
#[path = "../../src/threads/shared.rs"]
pub(crate) mod shared;
pub(crate) mod timer;
pub(crate) mod watched;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

pub(crate) use contain::{
    Kill, Killed, contained, contained_user, panic_message, panic_text, tell_backoff_panic,
};
use crossbeam_channel::{Receiver, RecvError, Sender};

use crate::error::{Error, ErrorKind};
use crate::faults::{self, Call};
use crate::kernel::{self, Wait, with};
use crate::planted::{Bug, planted};
use monitor::Notice;

/// The handle of a coroutine that plays a thread.
#[derive(Debug)]
pub(crate) struct JoinHandle<T> {
    task: usize,
    result: Arc<Mutex<Option<std::thread::Result<T>>>>,
}

impl<T> JoinHandle<T> {
    pub(crate) fn join(self) -> std::thread::Result<T> {
        kernel::pause(Wait::Join(self.task));
        self.result.lock().unwrap().take().expect("a task that ended has a result")
    }

    pub(crate) fn is_finished(&self) -> bool {
        kernel::is_done(self.task)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Spawner {
    owner: u64,
    pub(crate) monitor: Sender<Notice>,
}

impl Spawner {
    pub(crate) fn new(monitor: Sender<Notice>) -> Self {
        let owner = with(|k| {
            k.spawners += 1;
            k.spawners
        });
        Self { owner, monitor }
    }

    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        child: usize,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>, Error> {
        if let Err(error) = faults::error(Call::Spawn) {
            return Err(Error::caused(ErrorKind::Spawn, format!("thread {name}"), error));
        }
        let result = Arc::new(Mutex::new(None));
        let (out, monitor) = (result.clone(), self.monitor.clone());
        let task = kernel::spawn_for(self.owner, name, move || {
            let ended = catch_unwind(AssertUnwindSafe(body));
            let untold = planted(Bug::DeathUntold) && ended.is_err();
            *out.lock().unwrap() = Some(ended);
            if !untold {
                let _ = monitor.send(Notice::Ended(child));
            }
            // The notice is out before the thread has ended: others may run now.
            kernel::pause(Wait::Yield);
        });
        Ok(JoinHandle { task, result })
    }

    /// On the same thread: in the world there is no TLS, which this is for.
    pub(crate) fn apart<T>(&self, _: &str, work: impl FnOnce() -> T) -> Option<T> {
        Some(work())
    }

    pub(crate) fn is_own_thread(&self) -> bool {
        kernel::owner() == self.owner
    }
}

pub(crate) fn receive<T: Send + 'static>(channel: &Receiver<T>) -> Result<T, RecvError> {
    loop {
        match channel.recv() {
            Ok(_) if planted(Bug::LostNotice) && kernel::chance(0.2) => {}
            other => return other,
        }
    }
}

/// A thread may lose its turn before it has the lock, and with it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    kernel::preempt();
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(error)) => return error.into_inner(),
            Err(TryLockError::WouldBlock) => kernel::pause(Wait::Yield),
        }
    }
}
