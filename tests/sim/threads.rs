//! The crate's `threads/`, with coroutines for threads.

#[path = "../../src/threads/connection/mod.rs"]
pub(crate) mod connection;
#[path = "../../src/threads/consume.rs"]
pub(crate) mod consume;
#[path = "../../src/threads/events.rs"]
pub(crate) mod events;
#[path = "../../src/threads/inbox.rs"]
pub(crate) mod inbox;
#[path = "../../src/threads/monitor.rs"]
pub(crate) mod monitor;
#[path = "../../src/threads/queue.rs"]
pub(crate) mod queue;
#[path = "../../src/threads/shared.rs"]
pub(crate) mod shared;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, RecvError, Sender, TryRecvError};

use crate::error::{Error, ErrorKind};
use crate::faults::{self, Call};
use crate::kernel::{self, Wait};
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
    pub(crate) monitor: Sender<Notice>,
}

impl Spawner {
    pub(crate) fn new(monitor: Sender<Notice>) -> Self {
        Self { monitor }
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
        let task = kernel::spawn(name, move || {
            let ended = catch_unwind(AssertUnwindSafe(body));
            *out.lock().unwrap() = Some(ended);
            let _ = monitor.try_send(Notice::Ended(child));
            // The notice is out before the thread has ended: others may run now.
            kernel::pause(Wait::Yield);
        });
        Ok(JoinHandle { task, result })
    }
}

pub(crate) fn receive<T: Send + 'static>(channel: &Receiver<T>) -> Result<T, RecvError> {
    loop {
        match channel.try_recv() {
            Ok(_) if planted(Bug::LostNotice) && kernel::chance(0.2) => {}
            Ok(value) => return Ok(value),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) => {
                let seen = channel.clone();
                kernel::pause(Wait::Until(Box::new(move || !seen.is_empty())));
            }
        }
    }
}

pub(crate) fn contained<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|payload| panic_text(&*payload))
}

pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// Stands in for `threads/timer.rs`: one deadline for each owner.
pub(crate) mod timer {
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use crate::io::clock::Clock;
    use crate::kernel::{self, Wait};
    use crate::planted::{Bug, planted};

    pub(crate) trait Alarm: Send + Sync {
        fn fire(&self);
    }

    #[derive(Debug, Clone, Default)]
    pub(crate) struct Timer {
        state: Arc<Mutex<State>>,
    }

    #[derive(Debug, Default)]
    struct State {
        of: Vec<Option<Instant>>,
        /// What each owner last asked for that was over already.
        past: Vec<Option<Instant>>,
        stopped: bool,
    }

    impl State {
        /// What is over may be asked for once: whoever hears of it acts on it.
        fn look_back(&mut self, owner: usize, at: Instant) {
            if at > kernel::instant() {
                return;
            }
            if self.past[owner].replace(at) == Some(at) {
                kernel::with(|k| {
                    let at = k.nanos(at) as f64 / 1e9;
                    k.broken("no-past-deadline-twice", || format!("{owner} waits for {at:.6}"));
                });
            }
        }
    }

    impl Timer {
        pub(crate) fn new() -> Self {
            Self::default()
        }

        pub(crate) fn arm(&self, owner: usize, at: Instant) {
            let mut state = self.state.lock().unwrap();
            if state.of.len() <= owner {
                state.of.resize(owner + 1, None);
                state.past.resize(owner + 1, None);
            }
            state.look_back(owner, at);
            let known = state.of[owner];
            if planted(Bug::TimerKeepsTheLater) {
                state.of[owner] = Some(known.map_or(at, |known| known.max(at)));
            } else {
                state.of[owner] = Some(known.map_or(at, |known| known.min(at)));
            }
        }

        pub(crate) fn stop(&self) {
            self.state.lock().unwrap().stopped = true;
        }

        pub(crate) fn run(&self, _clock: Clock, alarms: &[Arc<dyn Alarm>]) {
            loop {
                let (due, next) = {
                    let mut state = self.state.lock().unwrap();
                    if state.stopped {
                        return;
                    }
                    let now = kernel::instant();
                    let due: Vec<usize> = (0..state.of.len())
                        .filter(|owner| state.of[*owner].is_some_and(|at| at <= now))
                        .collect();
                    due.iter().for_each(|owner| state.of[*owner] = None);
                    (due, state.of.iter().flatten().min().copied())
                };
                if due.is_empty() {
                    let state = Arc::clone(&self.state);
                    let changed = move || {
                        let state = state.lock().unwrap();
                        state.stopped || state.of.iter().flatten().min().copied() != next
                    };
                    let at = next.map(|at| kernel::with(|k| k.nanos(at)));
                    kernel::pause(Wait::Deadline(at, Box::new(changed)));
                }
                if !due.is_empty() && kernel::with(|k| k.failing > 0.0 && k.chance(0.002)) {
                    // What it has just taken in hand is forgotten.
                    kernel::with(|k| {
                        k.fault("timer panics");
                        k.ck.timers += 1;
                    });
                    panic!("planned panic of the timer");
                }
                for owner in due {
                    if !(planted(Bug::LostAlarm) && kernel::chance(0.02)) {
                        alarms[owner].fire();
                    }
                    if kernel::chance(0.02) {
                        kernel::with(|k| k.fault("late alarm"));
                        // A late alarm of something long over.
                        kernel::pause(Wait::Yield);
                        alarms[owner].fire();
                    }
                }
            }
        }
    }
}
