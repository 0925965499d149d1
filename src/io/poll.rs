//! One place to wait: the readiness of sockets, plus a waker.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mio::event::Source;
use mio::{Events, Interest, Poll, Token};

const WAKER: Token = Token(0);

/// How often a wake-up that fails is tried.
const WAKE_TRIES: usize = 3;

/// Waits for sockets and for its [`Waker`]. One thread owns it.
///
/// Readiness is edge-triggered: a socket reports once that it can be read or
/// written again, so what it reported must be kept until it would block.
pub(crate) struct Poller {
    poll: Poll,
    events: Events,
    waker: Waker,
    last_token: usize,
}

/// What a wait brought for one socket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub(crate) token: Token,
    pub(crate) readable: bool,
    /// Nothing comes behind what can be read now.
    pub(crate) ended: bool,
    pub(crate) writable: bool,
}

/// Wakes the thread that waits in a [`Poller`]; cheap to clone.
///
/// Post first, then wake: the sleeper announces that it goes to sleep, looks
/// at its inbox once more and only then waits, so no wake-up is lost, and
/// while it is awake a wake-up costs one load.
#[derive(Clone)]
pub(crate) struct Waker {
    shared: Arc<WakerShared>,
}

struct WakerShared {
    waker: mio::Waker,
    sleeping: AtomicBool,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = mio::Waker::new(poll.registry(), WAKER)?;
        let shared = Arc::new(WakerShared { waker, sleeping: AtomicBool::new(false) });
        // Its own socket and the waker; of the many of a dial the rest come next time.
        let events = Events::with_capacity(4);
        Ok(Self { poll, events, waker: Waker { shared }, last_token: WAKER.0 })
    }

    pub(crate) fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Watches a socket, under a token no other socket ever had: an event of a
    /// dead socket cannot be taken for one of its successor.
    pub(crate) fn register(&mut self, socket: &mut impl Source) -> io::Result<Token> {
        self.last_token += 1;
        let token = Token(self.last_token);
        self.poll.registry().register(socket, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(token)
    }

    /// Stops watching a socket; one that was closed already is no error.
    pub(crate) fn deregister(&mut self, socket: &mut impl Source) {
        let _ = self.poll.registry().deregister(socket);
    }

    /// Blocks until a socket is ready or the waker was used, unless `posted`
    /// tells that there is something to do already. `tell` hears of each socket.
    pub(crate) fn wait(
        &mut self,
        posted: impl FnOnce() -> bool,
        mut tell: impl FnMut(Ready),
    ) -> io::Result<()> {
        self.waker.shared.sleeping.store(true, Ordering::SeqCst);
        let timeout = if posted() { Some(Duration::ZERO) } else { None };
        let waited = self.poll.poll(&mut self.events, timeout);
        self.waker.shared.sleeping.store(false, Ordering::SeqCst);
        match waited {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in self.events.iter().filter(|event| event.token() != WAKER) {
            let closed = event.is_read_closed() || event.is_error();
            tell(Ready {
                token: event.token(),
                readable: event.is_readable() || closed,
                ended: closed,
                writable: event.is_writable() || event.is_write_closed() || event.is_error(),
            });
        }
        Ok(())
    }
}

impl Waker {
    /// Wakes the poller's thread if it sleeps or is about to.
    pub(crate) fn wake(&self) {
        let sleeps = self.shared.sleeping.swap(false, Ordering::SeqCst);
        if sleeps && !self.shared.rouse() {
            // The thread may sleep on: the next wake-up must not take it for awake.
            self.shared.sleeping.store(true, Ordering::SeqCst);
        }
    }
}

impl WakerShared {
    /// Whether the thread was woken. What it was to hear of is posted already,
    /// and nobody may post again: a call that fails is made again.
    fn rouse(&self) -> bool {
        (0..WAKE_TRIES).any(|_| self.waker.wake().is_ok())
    }
}

impl std::fmt::Debug for Poller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poller").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Waker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waker").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_up_before_the_wait_is_not_lost() {
        let mut poller = Poller::new().unwrap();
        let posted = AtomicBool::new(false);
        let waker = poller.waker();
        // Posted and woken while the thread is awake: `wake` writes nothing, and
        // the look at the inbox is what keeps the wait from blocking.
        posted.store(true, Ordering::SeqCst);
        waker.wake();
        poller.wait(|| posted.load(Ordering::SeqCst), |_| {}).unwrap();
    }

    #[test]
    fn a_waiting_thread_is_woken() {
        let mut poller = Poller::new().unwrap();
        let waker = poller.waker();
        let posted = Arc::new(AtomicBool::new(false));
        let poster = {
            let posted = Arc::clone(&posted);
            std::thread::Builder::new().spawn(move || {
                posted.store(true, Ordering::SeqCst);
                waker.wake();
            })
        };
        while !posted.load(Ordering::SeqCst) {
            poller.wait(|| posted.load(Ordering::SeqCst), |_| {}).unwrap();
        }
        poster.unwrap().join().unwrap();
    }
}
