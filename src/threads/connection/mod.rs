//! The connection thread: keeps one endpoint connected, through many sockets.
//!
//! ```text
//! run:  attempt ──> dial ──> epoch (open, then turn by turn) ──> lost ──> back off ──┐
//!          ^                                                                        │
//!          └────────────────────────────────────────────────────────────────────────┘
//! ```

mod epoch;
mod guest;
mod ids;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::held::{Held, Left};
use super::monitor::Notice;
use super::shared::{Endpoint, Peer, Resolver, Shared};
use super::{JoinHandle, contained};
use crate::error::{Error, ErrorKind, Recovery};
use crate::event::{EventKind, State};
use crate::handler::{Attempt, Outgoing, Request, Resume, Session};
use crate::io::dial::{DialEnd, DialPolicy, Driver, dial};
use crate::io::poll::{Poller, Ready};
use crate::io::websocket::Limits;
use crate::logic::connection::{Fate, Illegal, Input, Loss, Machine, RetryPolicy};
use crate::logic::heartbeat::Heartbeat;
use crate::metrics::DropReason;

use epoch::{Epoch, EpochEnd, Opened};
pub(crate) use ids::{IdFunction, IdSource, Ids};

/// Under a flood messages are shed thousands of times a second: one event in so
/// long tells of all of them, and drowns no other.
const SHED_PAUSE: Duration = Duration::from_secs(1);

/// Makes the session of each epoch.
pub(crate) type SessionFactory = Arc<dyn Fn() -> Box<dyn Session> + Send + Sync>;

/// Overrides the class of an error.
pub(crate) type Classifier = Arc<dyn Fn(&Error, Recovery) -> Recovery + Send + Sync>;

/// What a connection's thread needs of the settings.
#[derive(Clone)]
pub(crate) struct ConnectionPolicy {
    pub(crate) dial: DialPolicy,
    pub(crate) limits: Limits,
    pub(crate) retry: RetryPolicy,
    pub(crate) heartbeat: Heartbeat,
    pub(crate) ids: Ids,
    /// Messages of one block.
    pub(crate) block_messages: usize,
    /// `None`: every message is passed on.
    pub(crate) session: Option<SessionFactory>,
    /// Sent first on every socket.
    pub(crate) openings: Arc<[Outgoing]>,
    pub(crate) classifier: Option<Classifier>,
    pub(crate) resolver: Resolver,
    /// Longest wait for the server's part of a close handshake.
    pub(crate) close_timeout: Duration,
}

/// How a connection's thread ended.
#[derive(Debug)]
pub(crate) enum ThreadEnd {
    /// As asked.
    Closed,
    /// Supervision decides.
    Unrecoverable(Error),
    /// There is no point in a restart.
    GaveUp(Error),
}

/// One connection, on its thread.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    index: usize,
    poller: Poller,
    machine: Machine,
    /// What the queue had no room for, since this thread began or before.
    held: Held,
    /// The last message received, for the next session.
    resume: Option<Resume>,
    /// The earliest wake-up that the timer was asked for.
    armed: Option<Instant>,
    lookup: Option<Lookup>,
    shed: Shed,
    /// The client closes; the connection must be done by then.
    closing: Option<Instant>,
    /// Nothing more is to be read before the close.
    quiet: bool,
}

/// Messages that were shed and not told of yet.
#[derive(Debug, Default)]
struct Shed {
    count: u64,
    reason: &'static str,
    told_at: Option<Instant>,
}

/// A DNS look-up under way. It cannot be interrupted, so there is at most one:
/// the next attempt takes over what the last one could not wait for.
#[derive(Debug)]
pub(crate) struct Lookup {
    host: String,
    port: u16,
    handle: JoinHandle<()>,
    answer: Answer,
}

/// What one look-up found. Each has a place of its own: one that an earlier
/// thread of the connection left behind may end at any time.
type Answer = Arc<Mutex<Option<io::Result<Vec<SocketAddr>>>>>;

impl Connection {
    /// Made by the monitor, so that a lack of descriptors is its to handle.
    pub(crate) fn new(shared: Arc<Shared>, index: usize) -> Result<Box<Self>, Error> {
        let poller = Poller::new().map_err(|error| {
            Error::caused(ErrorKind::Spawn, "a poller could not be made", error)
        })?;
        shared.connections[index].inbox.attach(poller.waker());
        let machine = Machine::new(shared.policy.retry.clone());
        let Left { resume, held, quiet } = shared.connections[index].estate.take();
        Ok(Box::new(Self {
            shared,
            index,
            poller,
            machine,
            held,
            resume,
            armed: None,
            lookup: None,
            shed: Shed::default(),
            closing: None,
            quiet,
        }))
    }

    /// The thread's body. Boxed: moved from hand to hand it would take a page of
    /// each stack.
    pub(crate) fn run(mut self: Box<Self>) -> ThreadEnd {
        self.hear();
        // Room that came before this thread listened was the monitor's to hear of.
        self.offer_held();
        while self.closing.is_none() {
            match self.await_room() {
                Ok(()) => {}
                Err(DialEnd::Stopped) => break,
                Err(DialEnd::Failed(error)) => return ThreadEnd::Unrecoverable(error),
            }
            match self.attempt() {
                EpochEnd::Closed => break,
                EpochEnd::Lost(error) => match self.lost(error) {
                    Ok(delay) => match self.back_off(delay) {
                        Ok(()) => {}
                        Err(error) => return ThreadEnd::Unrecoverable(error),
                    },
                    Err(end) => return end,
                },
            }
        }
        self.step(Input::Close, "the client closes");
        self.tell_all_shed();
        self.step(Input::Closed, "closed");
        ThreadEnd::Closed
    }

    /// Waits with the next attempt as long as nothing could be read: a session that
    /// must hear from its server would not open.
    #[inline(never)]
    fn await_room(&mut self) -> Result<(), DialEnd> {
        if self.offer_held() || !self.held.is_full() {
            return Ok(());
        }
        log::info!("connection {} waits with connecting until the queue has room", self.index);
        while !self.held.is_empty() {
            self.wait(&mut |_| {})?;
        }
        Ok(())
    }

    /// One epoch, from its request to the loss of its socket.
    fn attempt(&mut self) -> EpochEnd {
        match self.connect() {
            Ok(epoch) => epoch.run(),
            Err(DialEnd::Failed(error)) => EpochEnd::Lost(error),
            Err(DialEnd::Stopped) => EpochEnd::Closed,
        }
    }

    /// The first half of it. Not inlined: an epoch that waits for its server should
    /// not lie upon what the attempt needed of the stack.
    #[inline(never)]
    fn connect(&mut self) -> Result<Box<Epoch<'_>>, DialEnd> {
        let policy = self.shared.policy.dial.clone();
        let deadline = self.shared.clock.after(policy.connect_timeout);
        let number = self.peer().metrics.attempt();
        self.step(Input::Start, &format!("attempt {}", self.machine.failures() + 1));
        let request = self.request(number).map_err(DialEnd::Failed)?;
        let dialed = dial(self, &policy, &request, deadline)?;
        self.step(Input::Opened, &format!("{} upgraded", dialed.peer));
        let opened = Opened::new(dialed, self.shared.policy.limits);
        Ok(Epoch::new(self, number, opened, deadline))
    }

    fn request(&self, epoch: u64) -> Result<Request, Error> {
        let hook = match &self.peer().endpoint {
            Endpoint::Fixed(request) => return Ok(request.clone()),
            Endpoint::Hook(hook) => hook,
        };
        let attempt = Attempt {
            connection: self.index,
            epoch,
            failures: self.machine.failures(),
            last_error: self.peer().metrics.last_error(),
        };
        match contained(|| hook(&attempt)) {
            Ok(Ok(request)) => Ok(request),
            Ok(Err(error)) => {
                Err(Error::caused(ErrorKind::RequestHook, "the request hook failed", error))
            }
            Err(panic) => {
                self.report_panic("request hook", &panic);
                Err(Error::new(
                    ErrorKind::RequestHook,
                    format!("the request hook panicked: {panic}"),
                ))
            }
        }
    }

    /// Decides what follows from a loss, and tells of it, once.
    #[inline(never)]
    fn lost(&mut self, error: Error) -> Result<Duration, ThreadEnd> {
        let now = self.shared.clock.now();
        let from = self.machine.state();
        let recovery = self.classify(&error);
        let loss = match self.machine.lost(now, &error, recovery, rand::random()) {
            Ok(loss) => loss,
            Err(illegal) => return Err(ThreadEnd::Unrecoverable(bug(illegal))),
        };
        self.peer().metrics.ended(now, Some(&error));
        let retry_in = match loss.fate {
            Fate::Retry(delay) => Some(delay),
            Fate::Unrecoverable | Fate::GiveUp(_) => None,
        };
        let reason = error.chain();
        self.tell_all_shed();
        self.tell_loss(&loss, retry_in, error.clone());
        self.shared.transition(self.index, from, self.machine.state(), &reason);
        match loss.fate {
            Fate::Retry(delay) => Ok(delay),
            Fate::Unrecoverable => Err(ThreadEnd::Unrecoverable(error)),
            Fate::GiveUp(error) => Err(ThreadEnd::GaveUp(error)),
        }
    }

    fn tell_loss(&self, loss: &Loss, retry_in: Option<Duration>, error: Error) {
        self.emit(match loss.uptime {
            Some(uptime) => EventKind::Lost { uptime, retry_in, error },
            None => EventKind::AttemptFailed { attempt: loss.failures, retry_in, error },
        });
    }

    fn classify(&self, error: &Error) -> Recovery {
        let default = error.recovery();
        let Some(classifier) = &self.shared.policy.classifier else { return default };
        contained(|| classifier(error, default)).unwrap_or_else(|panic| {
            self.report_panic("classifier", &panic);
            default
        })
    }

    /// Waits before the next attempt; a close ends the wait.
    /// A thread that cannot wait must end, or it would try without a pause.
    #[inline(never)]
    fn back_off(&mut self, delay: Duration) -> Result<(), Error> {
        let until = self.shared.clock.after(delay);
        while self.closing.is_none() && self.shared.clock.now() < until {
            match self.park(until, &mut |_| {}) {
                Ok(()) | Err(DialEnd::Stopped) => {}
                Err(DialEnd::Failed(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes a step of the state machine and tells of it.
    fn step(&mut self, input: Input, reason: &str) {
        match self.machine.step(input) {
            Ok(from) => self.shared.transition(self.index, from, self.machine.state(), reason),
            // Closing begins in the epoch, where there is one.
            Err(_) if input == Input::Close && self.machine.state() == State::Closing => {}
            Err(illegal) => log::error!("{}", bug(illegal)),
        }
    }

    /// Takes in what was posted.
    fn hear(&mut self) {
        let signals = self.peer().inbox.signals();
        self.closing = signals.close.or(self.closing);
        self.quiet |= signals.stop_reading;
        if signals.fired || signals.rearm {
            self.armed = None;
        }
        self.tell_shed_in_time();
    }

    /// Makes sure that the timer wakes this thread at `at` or earlier.
    fn arm(&mut self, at: Instant) {
        if self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            self.shared.timer.arm(self.index, at);
        }
    }

    /// Waits for the poller, or for what is posted; `Stopped` when the client closes.
    fn wait(&mut self, tell: &mut dyn FnMut(Ready)) -> Result<(), DialEnd> {
        let inbox = &self.shared.connections[self.index].inbox;
        let waited = self.poller.wait(|| inbox.posted(false), tell);
        self.hear();
        self.offer_held();
        if self.closing.is_some() {
            return Err(DialEnd::Stopped);
        }
        waited.map_err(|error| {
            Error::caused(ErrorKind::Io(error.kind()), "waiting for the socket failed", error)
                .into()
        })
    }

    /// Offers what is held; `true` when nothing is held any more.
    fn offer_held(&mut self) -> bool {
        if self.held.is_empty() {
            return true;
        }
        let late = self.held.offer(&self.shared.queue);
        self.tell_shed(late, DropReason::Closed);
        let free = self.held.is_empty();
        if free {
            self.emit(EventKind::Blocked(false));
        }
        free
    }

    /// Hands what is held to the queue, room or not: the client closes.
    fn release_held(&mut self) {
        let late = self.held.release(&self.shared.queue);
        self.tell_shed(late, DropReason::Closed);
    }

    fn tell_shed(&mut self, count: usize, reason: DropReason) {
        if count == 0 {
            return;
        }
        let reason = reason.phrase();
        if self.shed.reason != reason {
            self.tell_all_shed();
        }
        self.shed.reason = reason;
        self.shed.count += count as u64;
        self.tell_shed_in_time();
    }

    /// Tells of what was shed, unless that was done just now.
    fn tell_shed_in_time(&mut self) {
        if self.shed.count == 0 {
            return;
        }
        let now = self.shared.clock.now();
        match self.shed.told_at.map(|at| at + SHED_PAUSE) {
            Some(next) if now < next => self.arm(next),
            _ => {
                self.shed.told_at = Some(now);
                self.tell_all_shed();
            }
        }
    }

    fn tell_all_shed(&mut self) {
        let count = std::mem::take(&mut self.shed.count);
        if count > 0 {
            self.emit(EventKind::Dropped { count, reason: self.shed.reason });
        }
    }

    #[inline(never)]
    fn start_lookup(&mut self, host: &str, port: u16) -> Result<(), Error> {
        let (resolver, name) = (self.shared.policy.resolver.clone(), host.to_owned());
        let inbox = self.peer().inbox.clone();
        let answer = Answer::default();
        let its = Arc::clone(&answer);
        let thread = format!("broadsock-dns-{}", self.index);
        let child = self.shared.connections.len() + 1;
        let handle = self.shared.spawner.spawn(&thread, child, move || {
            let result = contained(|| resolver(&name, port)).unwrap_or_else(|panic| {
                Err(io::Error::other(format!("the resolver panicked: {panic}")))
            });
            *its.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            inbox.post(|signals| signals.looked_up = true);
        })?;
        self.lookup = Some(Lookup { host: host.to_owned(), port, handle, answer });
        Ok(())
    }

    fn peer(&self) -> &Peer {
        &self.shared.connections[self.index]
    }

    fn emit(&self, kind: EventKind) {
        self.shared.emit(self.index, self.peer().metrics.epoch(), kind);
    }

    fn report_panic(&self, hook: &'static str, message: &str) {
        self.emit(EventKind::Panic { hook, message: message.to_owned() });
    }
}

impl Lookup {
    /// Whether it has done what it was for: it leaves its answer last.
    pub(crate) fn is_over(&self) -> bool {
        let answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        answer.is_some() || self.handle.is_finished()
    }
}

impl Driver for Connection {
    fn now(&self) -> Instant {
        self.shared.clock.now()
    }

    fn wall(&self) -> SystemTime {
        self.shared.clock.wall()
    }

    fn poller(&mut self) -> &mut Poller {
        &mut self.poller
    }

    fn park(&mut self, until: Instant, tell: &mut dyn FnMut(Ready)) -> Result<(), DialEnd> {
        self.arm(until);
        self.wait(tell)
    }

    fn apart<T: Send>(&mut self, work: impl FnOnce(&mut Self) -> T + Send) -> Option<T> {
        let spawner = self.shared.spawner.clone();
        let thread = format!("broadsock-tls-{}", self.index);
        spawner.apart(&thread, || work(self))
    }

    fn look_up(
        &mut self,
        host: &str,
        port: u16,
        until: Instant,
    ) -> Result<Option<Vec<SocketAddr>>, DialEnd> {
        loop {
            if self.lookup.is_none() {
                self.start_lookup(host, port)?;
            }
            let answer = loop {
                let Some(lookup) = &self.lookup else { break None };
                let answer = lookup.answer.lock().unwrap_or_else(PoisonError::into_inner).take();
                if answer.is_some() {
                    break answer;
                }
                if self.shared.clock.now() >= until {
                    return Ok(None);
                }
                self.park(until, &mut |_| {})?;
            };
            let Some(lookup) = self.lookup.take() else { continue };
            // It has left its answer: the join waits for a few instructions.
            let _ = lookup.handle.join();
            if (lookup.host.as_str(), lookup.port) == (host, port) {
                return match answer.unwrap_or_else(|| Ok(Vec::new())) {
                    Ok(addrs) => Ok(Some(addrs)),
                    Err(error) => {
                        let phrase = format!("DNS look-up of {host} failed");
                        Err(Error::caused(ErrorKind::Dns, phrase, error).into())
                    }
                };
            }
        }
    }
}

impl Drop for Connection {
    /// Whatever ended the thread, a panic included: what it held and where it was
    /// go to its successor, and a look-up that still runs is left to the monitor.
    fn drop(&mut self) {
        let (resume, held) = (self.resume.take(), std::mem::take(&mut self.held));
        let left = Left { resume, held, quiet: self.quiet };
        self.shared.leave(self.index, left);
        self.tell_all_shed();
        self.peer().inbox.end_epoch();
        self.peer().inbox.detach();
        if let Some(lookup) = self.lookup.take() {
            let name = format!("broadsock-dns-{}", self.index);
            let notice = Notice::Adopt { name, lookup };
            let _ = self.shared.spawner.monitor.try_send(notice);
        }
    }
}

impl std::fmt::Debug for ConnectionPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectionPolicy").finish_non_exhaustive()
    }
}

fn bug(illegal: Illegal) -> Error {
    let phrase =
        format!("no transition from {} by {:?}: please report", illegal.state, illegal.input);
    Error::new(ErrorKind::Panicked, phrase)
}
