//! The promises, as checks. They reckon for themselves what has to be, and
//! share no code with what they check.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Step};
use crate::event::{Event, EventKind, State};
use crate::kernel::Kernel;
use crate::logic::overflow::Overflow;
use crate::metrics::{ConnectionMetrics, Ledger};
use crate::server::{LONGEST_DELAY, MAX_REDIRECTS, Said, Server, redirects};
use crate::simnet::Life;

/// What turns, hooks and the order of coroutines may add to any deadline.
pub(crate) const SLACK: u64 = 1_500_000_000;

/// What a world was set up with, as far as checks need it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Setup {
    pub(crate) connections: usize,
    pub(crate) connect: Duration,
    pub(crate) ping: Option<Duration>,
    pub(crate) pong: Duration,
    pub(crate) idle: Option<Duration>,
    pub(crate) write: Duration,
    pub(crate) close: Duration,
    pub(crate) base: Duration,
    pub(crate) max: Duration,
    pub(crate) strategy: Strategy,
    /// Of the exponential strategy; 0: none, 1: equal, 2: full.
    pub(crate) jitter: u8,
    pub(crate) stable: Duration,
    pub(crate) retry_after_max: Duration,
    pub(crate) attempts: Option<u32>,
    pub(crate) reconnects: Option<u32>,
    pub(crate) restarts: u32,
    pub(crate) within: Duration,
    pub(crate) queue: usize,
    pub(crate) block: usize,
    pub(crate) overflow: Overflow,
    /// Capacity of the window.
    pub(crate) dedup: Option<u64>,
    pub(crate) ttl: Option<Duration>,
    pub(crate) openings: u64,
    /// Whether a classifier changes the class of two errors.
    pub(crate) classifier: bool,
    pub(crate) lossless: bool,
    pub(crate) sessions: bool,
    /// The session's heartbeat.
    pub(crate) beat: Duration,
}

/// How long a connection waits before it tries again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Strategy {
    #[default]
    Exponential,
    Linear,
    Constant,
    Custom,
}

/// A message that was delivered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Delivered {
    /// How many were accepted before it, at least.
    before: u64,
    pub(crate) failed: bool,
    /// When it failed.
    failed_at: Option<u64>,
    /// When it was received.
    received: u64,
}

#[derive(Default)]
pub(crate) struct Checks {
    pub(crate) setup: Setup,
    pub(crate) conns: Vec<Conn>,
    pub(crate) taken: u64,
    /// When the consumer took a message last.
    pub(crate) taken_at: u64,
    pub(crate) delivered: HashMap<u64, Delivered>,
    pub(crate) closing: Option<u64>,
    pub(crate) failed: Option<(u64, Error)>,
    /// The pipeline has its client read nothing any more.
    /// Since when.
    pub(crate) reads_no_more: Option<u64>,
    /// The client was closed with hardly any time for it.
    pub(crate) in_haste: bool,
    pub(crate) ended: bool,
    pub(crate) swept: u64,
    pub(crate) transitions: u64,
    pub(crate) reconnects: u64,
    pub(crate) outs: u64,
    /// Messages that were told to be shed.
    pub(crate) shed: u64,
    /// Messages that were read from sockets.
    pub(crate) shown: u64,
    /// Messages that sessions emitted of their own.
    pub(crate) emitted: u64,
    /// Panics of the timer.
    pub(crate) timers: u64,
    /// Messages and pings that servers got, by connection.
    pub(crate) got: Vec<(u64, u64)>,
    /// What was told of losses, failures and panics, if it is to be known.
    pub(crate) causes: Option<Vec<String>>,
}

impl Checks {
    /// The client is closed.
    pub(crate) fn is_closed_by(&mut self, at: u64) {
        self.closing = Some(self.closing.map_or(at, |earlier| earlier.min(at)));
    }
}

#[derive(Default)]
pub(crate) struct Conn {
    state: Option<State>,
    retries: u32,
    failures: u32,
    ever: bool,
    /// When the next attempt has to start.
    due: Option<(u64, u64)>,
    attempt: u64,
    blocked: bool,
    unblocked: u64,
    last_block: u64,
    last_seq: (u64, u64),
    /// The first and last outgoing message that came in, for each epoch.
    sent: BTreeMap<u64, (u64, u64)>,
    pub(crate) outs: BTreeSet<u64>,
    restarts: VecDeque<u64>,
    ends: VecDeque<u64>,
    pub(crate) connected_at: Option<u64>,
    /// When its last socket was upgraded.
    upgraded: u64,
    /// Transitions and restarts that were told.
    attempts: u64,
    connects: u64,
    restarted: u64,
    /// Its upgraded sockets, and the bytes of answer and request on each.
    socks: Vec<(usize, u64, u64)>,
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

impl Conn {
    pub(crate) fn state(&self) -> State {
        self.state.unwrap_or(State::Disconnected)
    }

    /// Whether it was lost so lately that its attempt may still be under way.
    pub(crate) fn tries_since(&self, at: u64) -> bool {
        matches!(self.state(), State::Connecting | State::Opening) && self.attempt >= at
    }

    /// Whether it stood until lately, and waits for its first try since.
    pub(crate) fn waits_once(&self, now: u64) -> bool {
        let waits = self.due.is_some_and(|(_, latest)| now <= latest);
        self.state() == State::Reconnecting && self.retries == 1 && waits
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }
}

/// An event that the observer was told.
pub(crate) fn on_event(k: &mut Kernel, at: u64, event: &Event) {
    let index = event.connection;
    k.note(|| format!("{event}"));
    if let Some(causes) = &mut k.ck.causes {
        causes.extend(cause(&event.kind));
    }
    match &event.kind {
        EventKind::State { from, to, .. } => transition(k, at, index, event.epoch, *from, *to),
        EventKind::AttemptFailed { retry_in, error, attempt } => {
            loss(k, at, (index, event.epoch), None, *retry_in, error);
            let failures = k.ck.conns[index].failures;
            if *attempt != failures {
                k.broken("attempts-counted", || format!("{attempt} told, {failures} happened"));
            }
        }
        EventKind::Lost { uptime, retry_in, error } => {
            loss(k, at, (index, event.epoch), Some(*uptime), *retry_in, error);
        }
        EventKind::Blocked(blocked) => {
            let conn = &mut k.ck.conns[index];
            conn.blocked = *blocked;
            if *blocked {
                conn.last_block = at;
            } else {
                conn.unblocked = at;
            }
        }
        EventKind::Restarting { delay, .. } => restarting(k, at, index, *delay),
        EventKind::Failed { error, .. } => failed(k, at, index, error),
        EventKind::Dropped { count, .. } => k.ck.shed += count,
        EventKind::Stuck { threads } => {
            let stuck = |name: &&String| !name.contains("dns") && !k.hung.contains(*name);
            let threads = threads.iter().filter(stuck).count();
            // A hook that sleeps can hold its thread past a short deadline.
            let hooks = k.sv.sessions && k.sv.rates.session > 0.0;
            if threads > 0 && !hooks && !k.ck.in_haste {
                k.broken("close-in-time", || format!("{event}"));
            }
        }
        _ => {}
    }
}

/// The cause that an event of something bad tells.
fn cause(kind: &EventKind) -> Option<String> {
    match kind {
        EventKind::AttemptFailed { error, .. }
        | EventKind::Lost { error, .. }
        | EventKind::Restarting { error, .. }
        | EventKind::Failed { error, .. } => Some(error.chain()),
        _ => None,
    }
}

fn legal(from: State, to: State, ending: bool) -> bool {
    use State::*;
    match (from, to) {
        (Disconnected | Reconnecting, Connecting) => true,
        (Connecting, Opening) | (Opening, Connected) => true,
        (Connecting | Opening | Connected, Reconnecting | Failed) => true,
        (Failed, Disconnected) => true,
        (Closing, Closed) => true,
        (Closed, _) | (Closing, _) => ending && matches!(to, Failed),
        (_, Closing) => true,
        (Disconnected | Reconnecting, Failed) => true,
        (_, Closed) => ending,
        _ => false,
    }
}

fn transition(k: &mut Kernel, at: u64, index: usize, epoch: u64, from: State, to: State) {
    // A client that cannot start all its threads ends before it has begun.
    let fails = k.failing > 0.0 || k.strike.is_some();
    let unstarted = fails && k.now < 1_000_000;
    let ending = k.ck.closing.is_some() || k.ck.failed.is_some() || unstarted;
    let setup = k.ck.setup.clone();
    k.ck.transitions += 1;
    let conn = &mut k.ck.conns[index];
    let (known, attempt, due, room) = (conn.state(), conn.attempt, conn.due, conn.unblocked);
    conn.state = Some(to);
    if from != known || !legal(from, to, ending) {
        k.broken("legal-transitions", || format!("conn {index}: {from} -> {to}, was {known}"));
    }
    let limit = nanos(setup.connect) + SLACK;
    let tried = matches!(from, State::Connecting | State::Opening) && !k.is_hung(index);
    if tried && at > attempt + limit {
        k.broken("connect-deadline", || {
            format!(
                "conn {index}: {from} -> {to} {} ms after the attempt",
                (at - attempt) / 1_000_000
            )
        });
    }
    match to {
        State::Connecting => {
            if let Some((low, high)) = due
                && (at + 1000 < low || at > high.max(room) + SLACK)
            {
                let (at, low, high) = (at / 1_000_000, low / 1_000_000, high / 1_000_000);
                k.broken("back-off-kept", || format!("conn {index}: {at} not in {low}..{high}"));
            }
            let conn = &mut k.ck.conns[index];
            conn.due = None;
            conn.attempt = at;
            conn.attempts += 1;
        }
        State::Opening => {
            k.ck.conns[index].upgraded = at;
            upgraded(k, index, epoch);
        }
        State::Connected => {
            k.ck.reconnects += 1;
            let conn = &mut k.ck.conns[index];
            conn.connected_at = Some(at);
            conn.connects += 1;
            conn.ever = true;
            one_socket(k, index);
        }
        _ => {}
    }
}

/// What was taken for an upgrade is one; from here on its socket's bytes count.
fn upgraded(k: &mut Kernel, index: usize, epoch: u64) {
    if k.sv.unacceptable.contains(&(index, epoch)) {
        k.broken("upgrade-checked", || format!("conn {index} takes any answer, epoch {epoch}"));
    }
    let its =
        |server: &Server| (server.conn, server.epoch) == (index, epoch) && server.is_upgraded();
    let found = k.sv.socks.iter().find(|(_, server)| its(server));
    let found = found.map(|(sock, server)| (*sock, server.answer_len, server.request_len));
    match found {
        Some(found) => k.ck.conns[index].socks.push(found),
        None => k.broken("upgrade-checked", || format!("conn {index}: nobody upgraded {epoch}")),
    }
}

/// Never two sockets for one connection.
fn one_socket(k: &mut Kernel, index: usize) {
    let open: Vec<usize> =
        k.sv.socks
            .iter()
            .filter(|(sock, server)| {
                server.conn == index
                    && matches!(k.net.socks[**sock].life, Life::Open | Life::Connecting)
            })
            .map(|(sock, _)| *sock)
            .collect();
    if open.len() > 1 {
        k.broken("one-socket", || format!("conn {index} has sockets {open:?}"));
    }
}

/// Whether another attempt can cure it: the table of DESIGN, section 4.
fn curable(kind: &ErrorKind, classifier: bool) -> bool {
    match kind {
        ErrorKind::Http { status: 401, .. } if classifier => true,
        ErrorKind::Closed { code: 4321 } if classifier => false,
        ErrorKind::Http { status, .. } => matches!(status, 408 | 425 | 429 | 500..),
        // A code that nobody has defined yet blames nobody.
        ErrorKind::Closed { code } => !matches!(code, 1002 | 1003 | 1007..=1010),
        kind => !matches!(
            kind,
            ErrorKind::Certificate
                | ErrorKind::Protocol
                | ErrorKind::TooLarge
                | ErrorKind::Handshake
                | ErrorKind::Url
                | ErrorKind::Subprotocol
                | ErrorKind::Spawn
                | ErrorKind::Panicked
                | ErrorKind::Redirect
        ),
    }
}

fn loss(
    k: &mut Kernel,
    at: u64,
    (index, epoch): (usize, u64),
    uptime: Option<Duration>,
    retry_in: Option<Duration>,
    error: &Error,
) {
    let setup = k.ck.setup.clone();
    true_verdict(k, at, index, error);
    true_cause(k, index, epoch, error);
    let conn = &mut k.ck.conns[index];
    if uptime.is_some_and(|uptime| uptime >= setup.stable) {
        (conn.retries, conn.failures) = (0, 0);
    } else {
        conn.failures += 1;
    }
    if uptime.is_none() {
        cured(k, index, error);
    }
    let conn = &mut k.ck.conns[index];
    let (failures, ever) = (conn.failures, conn.ever);
    let limit = if ever { setup.reconnects } else { setup.attempts };
    let used_up = limit.is_some_and(|limit| failures >= limit);
    let curable = curable(error.kind(), setup.classifier);
    let Some(delay) = retry_in else {
        if curable && !used_up {
            k.broken("recoverable-is-retried", || format!("conn {index}: {}", error.chain()));
        }
        k.ck.conns[index].ends.push_back(at);
        return;
    };
    if !curable || used_up {
        k.broken("unrecoverable-ends", || {
            format!("conn {index} retries after {failures} failures: {}", error.chain())
        });
    }
    let conn = &mut k.ck.conns[index];
    conn.retries += 1;
    let (low, high) = bounds(&setup, conn.retries, error.kind());
    let tries = conn.retries;
    if delay < low || delay > high {
        k.broken("back-off-bounds", || {
            format!("conn {index}, retry {tries}: {delay:?} not in {low:?}..{high:?}: {error}")
        });
    }
    k.ck.conns[index].due = Some((at + nanos(delay), at + nanos(delay)));
}

/// Steps of a linear back-off.
pub(crate) const FACTOR: u32 = 6;

/// A user's back-off: `None` where it panics.
pub(crate) fn custom_delay(base: Duration, tries: u32) -> Option<Duration> {
    (tries % 7 != 0).then(|| base * (1 + tries % 4))
}

fn doubled(base: Duration, max: Duration, tries: u32) -> Duration {
    let mut whole = base;
    for _ in 1..tries.min(40) {
        whole = (whole * 2).min(max);
    }
    whole.min(max)
}

fn spread(whole: Duration, jitter: u8) -> (Duration, Duration) {
    match jitter {
        0 => (whole, whole),
        1 => (whole / 2, whole),
        _ => (Duration::ZERO, whole),
    }
}

fn bounds(setup: &Setup, tries: u32, kind: &ErrorKind) -> (Duration, Duration) {
    let (low, high) = match setup.strategy {
        Strategy::Exponential => spread(doubled(setup.base, setup.max, tries), setup.jitter),
        Strategy::Linear => {
            let whole = setup.base * tries.min(FACTOR);
            (whole, whole.mul_f64(1.2) + Duration::from_nanos(1))
        }
        Strategy::Constant => (setup.base, setup.base),
        Strategy::Custom => match custom_delay(setup.base, tries) {
            Some(delay) => (delay, delay),
            // The default takes the place of a function that panics.
            None => {
                let secs = Duration::from_secs(30);
                spread(doubled(Duration::from_millis(500), secs, tries), 1)
            }
        },
    };
    let secs = Duration::from_secs;
    let (asked_low, asked_high) = match kind {
        ErrorKind::Http { retry_after: Some(asked), .. } => {
            let asked = (*asked).min(setup.retry_after_max);
            (asked, asked + asked / 10 + Duration::from_millis(1))
        }
        ErrorKind::Closed { code: 1012 } => (secs(5), secs(30)),
        ErrorKind::Closed { code: 1013 } => (secs(5), Duration::from_millis(5501)),
        _ => (Duration::ZERO, Duration::ZERO),
    };
    (low.max(asked_low), high.max(asked_high))
}

/// An attempt that starts in a healed world succeeds: so a connection is there
/// again within its back-off's delay and one connect deadline.
fn cured(k: &mut Kernel, index: usize, error: &Error) {
    let starts = k.sv.healed && k.ck.conns[index].attempt > k.sv.healed_at;
    // A look-up that was slow before may be what it waits for, or gets.
    let dns = matches!(error.kind(), ErrorKind::Dns | ErrorKind::Timeout { step: Step::Dns, .. });
    // Nothing is read where too much is held back already.
    let opening = matches!(error.kind(), ErrorKind::Timeout { step: Step::Opening, .. });
    let full = opening && k.ck.conns[index].is_blocked();
    if starts && !dns && !full && k.strike.is_none() {
        k.broken("attempt-succeeds-once-healed", || format!("conn {index}: {}", error.chain()));
    }
}

/// What a server said is told as it said it, and only that.
fn true_cause(k: &mut Kernel, index: usize, epoch: u64, error: &Error) {
    let its = |server: &&Server| (server.conn, server.epoch) == (index, epoch);
    let said = k.sv.socks.values().filter(its).filter_map(|server| server.said).last();
    let well = match (error.kind(), said) {
        (ErrorKind::Closed { code }, Some(Said::Close(sent))) => match sent {
            // No such code may come in a close frame.
            999 | 1006 | 1015 | 5000 => *code == 1002,
            sent => *code == sent,
        },
        (ErrorKind::Http { status, retry_after }, Some(Said::Status(sent, wait))) => {
            let asked = wait.map_or(retry_after.is_none(), |wait| wait.is(*retry_after));
            *status == sent && asked
        }
        (ErrorKind::Closed { .. } | ErrorKind::Http { .. }, _) => false,
        (ErrorKind::Redirect, _) => redirects(k, index, epoch) > MAX_REDIRECTS,
        _ => true,
    };
    if !well {
        k.broken("cause-true", || format!("conn {index}, {said:?} said: {}", error.chain()));
    }
}

/// A verdict of the heartbeat must be true: a server that answers is not dead.
fn true_verdict(k: &mut Kernel, at: u64, index: usize, error: &Error) {
    if !matches!(error.kind(), ErrorKind::NoPong) {
        return;
    }
    let newest = k.sv.socks.iter().rev().find(|(_, server)| server.conn == index);
    let Some((sock, server)) = newest else { return };
    let it = &k.net.socks[*sock];
    let healthy = server.is_open()
        && server.mute.is_none()
        && server.stalled.is_none()
        && it.frozen.is_none()
        // Where a peer takes so little that the ping waits, nobody can tell.
        && it.tx_full_since.is_none()
        && it.delay.1 < nanos(k.ck.setup.pong) / 4;
    let sock = *sock;
    if healthy && k.ck.setup.pong > Duration::from_secs(4) {
        k.broken("true-verdict", || format!("conn {index}, sock {sock}: {error}"));
    }
}

fn restarting(k: &mut Kernel, at: u64, index: usize, delay: Duration) {
    let setup = k.ck.setup.clone();
    let starts = at + nanos(delay);
    let within = nanos(setup.within);
    let conn = &mut k.ck.conns[index];
    conn.restarts.push_back(starts);
    conn.restarted += 1;
    conn.restarts.retain(|old| old + within >= starts);
    let count = conn.restarts.len();
    (conn.retries, conn.failures, conn.ever) = (0, 0, false);
    conn.due = Some((starts, starts + SLACK));
    if count > setup.restarts as usize {
        k.broken("restarts-within-intensity", || format!("conn {index}: {count} restarts"));
    }
    if delay < Duration::from_millis(250) {
        k.broken("no-hot-restart", || format!("conn {index} restarts after {delay:?}"));
    }
}

fn failed(k: &mut Kernel, at: u64, index: usize, error: &Error) {
    let setup = k.ck.setup.clone();
    let conn = &k.ck.conns[index];
    let near = nanos(setup.within) + nanos(Duration::from_secs(31));
    let restarts = conn.restarts.iter().filter(|old| **old + near >= at).count();
    let spent = restarts >= setup.restarts as usize;
    let rightly = matches!(error.kind(), ErrorKind::Attempts | ErrorKind::Spawn) || spent;
    if !rightly {
        k.broken("fails-only-for-cause", || format!("conn {index}: {}", error.chain()));
    }
    k.ck.failed = Some((at, error.clone()));
}

/// Bytes are read from a socket.
pub(crate) fn reads(k: &mut Kernel, sock: usize) {
    let Some(index) = k.sv.socks.get(&sock).map(|server| server.conn) else { return };
    let quiet = k.ck.reads_no_more.is_some_and(|since| k.now > since + SLACK);
    let ends = k.ck.closing.is_some() || k.ck.failed.is_some() || k.is_hung(index);
    if quiet && !ends && k.ck.conns[index].state() == State::Connected {
        k.broken("quiet-stays-quiet", || format!("conn {index} reads on"));
    }
}

/// Looked at every half second of virtual time.
pub(crate) fn sweep(k: &mut Kernel) {
    let now = k.now;
    if now < k.ck.swept + 500_000_000 {
        return;
    }
    k.ck.swept = now;
    let setup = k.ck.setup.clone();
    for index in (0..k.ck.conns.len()).filter(|index| !k.is_hung(*index)).collect::<Vec<_>>() {
        let conn = &k.ck.conns[index];
        let (state, attempt, due) = (conn.state(), conn.attempt, conn.due);
        // Who can hold back no more waits for room, and then goes on.
        let (waits, room) = (conn.blocked, conn.unblocked);
        // Who is closed without time has none to tell its last states.
        let told = !k.ck.in_haste;
        let dialing = matches!(state, State::Connecting | State::Opening);
        if dialing && told && now > attempt + nanos(setup.connect) + SLACK {
            k.broken("connect-deadline", || format!("conn {index} is still {state}"));
        }
        let over = k.ck.closing.is_some() || k.ck.failed.is_some();
        if let Some((_, high)) = due
            && now > high.max(room) + SLACK
            && !over
            && !waits
            && matches!(state, State::Reconnecting | State::Disconnected)
        {
            k.broken("tries-again", || format!("conn {index} sleeps in {state}"));
        }
    }
    let socks: Vec<usize> = k.sv.socks.keys().copied().collect();
    for sock in socks {
        watch(k, sock, &setup);
    }
    let Kernel { sv, net, ck, .. } = k;
    sv.socks.retain(|sock, server| {
        let it = &net.socks[*sock];
        let stays =
            it.life != Life::Released || it.released_at.is_none_or(|at| now < at + 20_000_000_000);
        if !stays {
            ck.got[server.conn].0 += server.messages;
            ck.got[server.conn].1 += server.pings;
        }
        stays
    });
}

/// A dead peer is found in time.
fn watch(k: &mut Kernel, sock: usize, setup: &Setup) {
    let it = &k.net.socks[sock];
    let Some(server) = k.sv.socks.get(&sock) else { return };
    let conn = &k.ck.conns[server.conn];
    let cannot = k.is_hung(server.conn) || conn.blocked;
    let cannot = cannot || k.ck.reads_no_more.is_some();
    if it.life != Life::Open || conn.state() != State::Connected || cannot {
        return;
    }
    let index = server.conn;
    let alive = it.last_arrival.max(conn.unblocked).max(it.last_read);
    let silent = it.frozen.is_some() || server.mute.is_some() || server.stalled.is_some();
    if let Some(ping) = setup.ping
        && silent
        && k.now > alive + nanos(ping) + nanos(setup.pong) + SLACK
    {
        k.broken("half-open-found", || format!("conn {index}, sock {sock} is long dead"));
    }
    let it = &k.net.socks[sock];
    let conn = &k.ck.conns[index];
    let server = &k.sv.socks[&sock];
    let idle = it.last_arrival.max(it.last_read).max(conn.unblocked).max(conn.upgraded);
    // What was on its way when the world healed takes as long as it was to.
    let slow = server.pinged.is_some_and(|at| at <= k.sv.healed_at);
    let delay = if slow { LONGEST_DELAY } else { it.delay.1 };
    if let Some(at) = server.pinged
        && k.now > at.max(idle) + 2 * (delay + SLACK)
        && !silent
        && server.is_open()
        && it.tx_full_since.is_none()
    {
        k.broken("pings-answered", || format!("conn {index}, sock {sock}: no pong"));
    }
    let it = &k.net.socks[sock];
    let conn = &k.ck.conns[index];
    let waits = it.last_arrival.max(it.last_read).max(conn.unblocked).max(conn.upgraded);
    if it.is_unread() && k.now > waits + SLACK {
        k.broken("reads-on", || format!("conn {index} leaves sock {sock} unread"));
    }
    let it = &k.net.socks[sock];
    if let Some(since) = it.tx_full_since
        && k.now > since + nanos(setup.write) + SLACK
    {
        k.broken("stall-found", || format!("conn {index}, sock {sock} takes nothing"));
    }
    let it = &k.net.socks[sock];
    let conn = &k.ck.conns[index];
    // Data are waited for from the upgrade on, which may take its time.
    let data = it.last_data.max(conn.upgraded).max(conn.unblocked);
    if let Some(idle) = setup.idle
        && k.now > data + nanos(idle) + SLACK
    {
        k.broken("idle-found", || format!("conn {index}, sock {sock} shows no data"));
    }
}

/// The counters of a client that has ended are those of what happened.
pub(crate) fn counters(k: &mut Kernel, index: usize, metrics: &ConnectionMetrics) {
    let conn = &k.ck.conns[index];
    let attempts = (metrics.attempts.get(), metrics.epoch(), metrics.connects.get());
    let happened = (conn.attempts, conn.attempts, conn.connects);
    if attempts != happened {
        k.broken("counters-true", || format!("conn {index}: {attempts:?}, were {happened:?}"));
    }
    let conn = &k.ck.conns[index];
    let bytes = conn.socks.iter().map(|(sock, answer, request)| {
        let it = &k.net.socks[*sock];
        (it.given - answer, it.taken as u64 - request)
    });
    let happened = bytes.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    let bytes = (metrics.bytes_received.get(), metrics.bytes_sent.get());
    if bytes != happened {
        k.broken("counters-true", || format!("conn {index}: {bytes:?} bytes, were {happened:?}"));
    }
    let (messages, pings) = (metrics.messages_sent.get(), metrics.pings.get());
    let got = k.ck.got[index];
    if got.0 > messages || got.1 > pings {
        k.broken("counters-true", || {
            format!("conn {index}: {messages} messages and {pings} pings sent, {got:?} came")
        });
    }
}

/// The same of the whole client's.
pub(crate) fn totals(k: &mut Kernel, ledger: &Ledger, read: u64, restarts: u64) {
    let shown = k.ck.shown;
    if shown != read {
        k.broken("counters-true", || format!("{shown} messages came, {read} counted"));
    }
    let shed = k.ck.shed;
    if shed != ledger.dropped {
        k.broken("counters-true", || format!("{shed} told to be shed, {ledger}"));
    }
    // One that was told may have been overtaken by the end.
    let told: u64 = k.ck.conns.iter().map(|conn| conn.restarted).sum();
    let told = told + k.ck.timers;
    if restarts > told || told > restarts + k.ck.conns.len() as u64 + 1 {
        k.broken("counters-true", || format!("{restarts} restarts, {told} told"));
    }
}

/// A message that the consumer has taken.
pub(crate) struct Taken {
    pub(crate) conn: usize,
    pub(crate) epoch: u64,
    pub(crate) sequence: u64,
    /// What its text says of itself.
    pub(crate) id: u64,
    pub(crate) of: u64,
    pub(crate) received: u64,
    /// Messages accepted so far, and how many of them are in flight.
    pub(crate) accepted: u64,
    pub(crate) in_flight: u64,
}

/// The consumer has taken a message.
pub(crate) fn taken(k: &mut Kernel, taken: &Taken) {
    k.ck.taken_at = k.now;
    let &Taken { conn: index, epoch, sequence, id, of, received, accepted, in_flight } = taken;
    k.ck.taken += 1;
    k.note(|| {
        let at = received as f64 / 1e9;
        format!("message {id} of conn {index}, epoch {epoch}, is taken, received at {at:.6}")
    });
    in_order(k, index, (epoch, sequence));
    if of != epoch {
        k.broken("nothing-of-a-dead-epoch", || {
            format!("conn {index}: a message of epoch {of} came as one of {epoch}")
        });
    }
    // Where messages are shed, or held by several connections, it is not known
    // how many were accepted behind it. What is shed after its time takes the
    // record of a later copy with it.
    let exact = k.ck.setup.overflow == Overflow::Block && k.ck.conns.len() == 1;
    // A failure lets one copy in beside one that was accepted before it.
    let let_in = |earlier: &Delivered| {
        let (first, last) = (earlier.received.min(received), earlier.received.max(received));
        earlier.failed_at.is_some_and(|at| first < at && at <= last)
    };
    let counts = |earlier: &&Delivered| !earlier.failed && !let_in(earlier);
    if let Some(capacity) = k.ck.setup.dedup.filter(|capacity| exact || *capacity > 100_000)
        && let Some(earlier) = k.ck.delivered.get(&id).filter(counts)
        && accepted - earlier.before <= capacity
        && (k.ck.setup.ttl.is_none() || k.ck.setup.overflow == Overflow::Block)
        && lives(k.ck.setup.ttl, received.abs_diff(earlier.received))
    {
        k.broken("nothing-twice", || format!("message {id} of conn {index} again"));
    }
    let at_least = accepted.saturating_sub(in_flight);
    // Where the first may outlive its place in the window, a copy that was
    // accepted since is forgotten with it, when the first fails behind it.
    let narrow = k.ck.setup.ttl.is_some() || k.ck.setup.dedup.is_some_and(|c| c <= 100_000);
    let late = k.ck.delivered.get(&id).and_then(|earlier| earlier.failed_at);
    let slack = nanos(Duration::from_secs(5));
    let beside = late.is_some_and(|at| received + slack < at);
    if beside && !narrow && k.ck.setup.dedup.is_some() {
        k.broken("nothing-twice", || format!("message {id} again while it was in flight"));
    }
    let late = late.filter(|_| narrow);
    let failed = late.is_some_and(|at| received < at);
    k.ck.delivered.insert(id, Delivered { before: at_least, failed, failed_at: late, received });
}

/// Messages of a connection come in the order in which they were received.
pub(crate) fn in_order(k: &mut Kernel, index: usize, at: (u64, u64)) {
    let last = std::mem::replace(&mut k.ck.conns[index].last_seq, at);
    if at <= last {
        k.broken("order-kept", || format!("conn {index}: {last:?} before {at:?}"));
    }
}

/// Whether an id is surely remembered after so long: a copy that a connection
/// held for long may well come second, though it was the first. What a slow session adds to
/// the time between receipt and acceptance is not.
fn lives(ttl: Option<Duration>, age: u64) -> bool {
    ttl.is_none_or(|ttl| age + nanos(Duration::from_secs(5)) < nanos(ttl))
}

pub(crate) fn failed_message(k: &mut Kernel, id: u64) {
    k.note(|| format!("message {id} has failed"));
    let now = k.now;
    if let Some(it) = k.ck.delivered.get_mut(&id) {
        it.failed = true;
        it.failed_at = Some(now);
    }
}

/// An outgoing message has left for good: it came in by the socket of `epoch`,
/// or was lost on the way.
pub(crate) fn out_arrived(k: &mut Kernel, index: usize, number: u64, epoch: Option<u64>) {
    k.ck.outs += 1;
    let conn = &mut k.ck.conns[index];
    if !conn.outs.insert(number) {
        k.broken("sent-once", || format!("conn {index}: out {number} again"));
        return;
    }
    // What was lost is found out late, and so may come what an old socket has
    // still under way: the order is that of epochs, and that within each.
    let Some(epoch) = epoch else { return };
    let before = conn.sent.range(..=epoch).next_back().map(|(_, (_, last))| *last);
    let behind = conn.sent.range(epoch + 1..).next().map(|(_, (first, _))| *first);
    conn.sent.entry(epoch).or_insert((number, number)).1 = number;
    if before.is_some_and(|last| number <= last) || behind.is_some_and(|first| number >= first) {
        k.broken("sent-in-order", || {
            format!(
                "conn {index}, epoch {epoch}: out {number}, {before:?} before, {behind:?} behind"
            )
        });
    }
}
