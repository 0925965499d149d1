//! What a world is set up with: drawn for each seed, or given.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::checks::{FACTOR, Setup, Strategy, custom_delay};
use crate::error::{Error, ErrorKind, Recovery};
use crate::handler::{Outgoing, Session};
use crate::io::clock::Clock;
use crate::io::dial::DialPolicy;
use crate::io::tls::TlsSource;
use crate::io::websocket::Limits;
use crate::kernel::{Kernel, with};
use crate::logic::backoff::{Backoff, Jitter};
use crate::logic::connection::RetryPolicy;
use crate::logic::dedup::Dedup;
use crate::logic::heartbeat::Heartbeat;
use crate::logic::identity::Identity;
use crate::logic::overflow::Overflow;
use crate::logic::pointer::Pointer;
use crate::metrics::{ConnectionMetrics, Counter};
use crate::planted::{Bug, planted};
use crate::server::{MAX_REDIRECTS, Rates};
use crate::threads::Spawner;
use crate::threads::connection::{Classifier, ConnectionPolicy, IdSource, Ids};
use crate::threads::events::Hub;
use crate::threads::held::Estate;
use crate::threads::inbox::Inbox;
use crate::threads::monitor::MonitorAlarm;
use crate::threads::queue::{Queue, QueuePolicy};
use crate::threads::shared::{Endpoint, Peer, Shared, States};
use crate::threads::timer::Timer;
use crate::user;
use crate::works::plan::{Ending, Plan, Trouble};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// All that makes one world differ from another, but for chance.
#[derive(Debug, Clone)]
pub(crate) struct Scene {
    pub(crate) setup: Setup,
    pub(crate) rates: Rates,
    /// All connections show the same feed.
    pub(crate) redundant: bool,
    pub(crate) failing: f64,
    /// The pipeline, if the client has one.
    pub(crate) plan: Option<Plan>,
    pub(crate) by_block: bool,
    /// Nanoseconds between two looks of the consumer, and what it takes then.
    pub(crate) consume_every: u64,
    pub(crate) consume_most: u64,
    pub(crate) stall: f64,
    /// Nanoseconds between two looks of the consumer in a world that has healed:
    /// a small queue wants many, and each costs.
    pub(crate) consume_healed: u64,
    /// When the world heals, and how long it may take then to be well again.
    pub(crate) end: u64,
    pub(crate) settles: Duration,
    /// When the program closes, if it does so before.
    pub(crate) closes: Option<u64>,
    /// When the servers cut all connections.
    pub(crate) cut: Option<u64>,
    /// When the consumer leaves for good.
    pub(crate) leaves: Option<u64>,
}

impl Scene {
    /// What this world's seed says.
    pub(crate) fn drawn(k: &mut Kernel, minutes: u64) -> Self {
        let end = minutes * 60 * SECOND;
        let mut setup = draw_setup(k);
        let rates = draw_rates(k, &setup);
        let redundant = setup.connections > 1 && setup.dedup.is_some() && k.chance(0.5);
        setup.lossless = setup.sessions
            && setup.overflow == Overflow::Block
            && setup.dedup.is_none_or(|capacity| capacity > 100_000);
        let mut scene = Self {
            settles: settles(&setup),
            redundant,
            failing: if k.chance(0.15) { 0.003 } else { 0.0 },
            plan: if k.chance(0.5) { Some(Plan::drawn(k)) } else { None },
            by_block: k.chance(0.3),
            consume_every: k.pick(&[5, 50, 300]) * MS,
            consume_most: k.range(1, 60),
            stall: k.pick(&[0.0, 0.001, 0.01]),
            consume_healed: if setup.queue < 64 { 5 * MS } else { 100 * MS },
            end,
            closes: k.chance(0.25).then(|| k.range(0, end)),
            cut: None,
            leaves: k.chance(0.05).then(|| k.range(0, end)),
            setup,
            rates,
        };
        // Chance alone hardly ever brings it about.
        match (k.unit() * 100.0) as u64 {
            0 | 1 => restarts(&mut scene),
            2..=4 => drains(&mut scene),
            _ => {}
        }
        scene
    }
}

/// Servers that stop reading, and programs that send.
pub(crate) fn stalls(scene: &mut Scene) {
    let Scene { setup, rates, .. } = scene;
    (setup.ping, setup.pong) = (Some(Duration::from_secs(5)), Duration::from_secs(20));
    setup.write = Duration::from_secs(10);
    rates.mishap = Duration::from_secs(15);
    rates.message = Duration::from_secs(20);
    (rates.refuse, rates.black_hole, rates.bad_upgrade) = (0.0, 0.0, 0.0);
    scene.tune();
}

/// Look-ups that outlive the threads that asked for them.
pub(crate) fn slow_look_ups(scene: &mut Scene) {
    let Scene { setup, rates, .. } = scene;
    setup.connect = Duration::from_secs(3);
    (setup.restarts, setup.within) = (1000, Duration::from_secs(5));
    (setup.attempts, setup.reconnects) = (None, None);
    (rates.dns, rates.bad_upgrade, rates.fatal) = (1.0, 1.0, 0.3);
    (rates.refuse, rates.black_hole, rates.redirect) = (0.0, 0.0, 0.0);
    scene.tune();
    scene.end = 900 * SECOND;
}

/// Servers that break the protocol.
pub(crate) fn breaches(scene: &mut Scene) {
    let Scene { setup, rates, .. } = scene;
    (setup.restarts, setup.within) = (1000, Duration::from_secs(5));
    (rates.mishap, rates.fatal) = (Duration::from_secs(30), 0.5);
    scene.tune();
}

/// Consumers that are away when sessions open.
pub(crate) fn full_queues(scene: &mut Scene) {
    let Scene { setup, rates, .. } = scene;
    (setup.sessions, setup.overflow) = (true, Overflow::Block);
    (setup.queue, setup.block) = (32, 8);
    (setup.restarts, setup.within) = (1000, Duration::from_secs(5));
    rates.mishap = Duration::from_secs(15);
    rates.overlap = 20;
    (rates.burst, rates.message) = (40, Duration::from_millis(600));
    scene.tune();
    (scene.stall, scene.consume_most) = (0.01, 10);
}

/// Consumers that are away while one thread after the other ends. A thread that
/// reads nothing does when it connects again; its session fills what it may hold.
pub(crate) fn restarts(scene: &mut Scene) {
    let Scene { setup, rates, .. } = scene;
    (setup.sessions, setup.overflow, setup.classifier) = (true, Overflow::Block, false);
    (setup.queue, setup.block) = (2, 1);
    (setup.dedup, setup.ttl, setup.idle) = (None, None, None);
    (setup.restarts, setup.within) = (1000, Duration::from_secs(5));
    (setup.attempts, setup.reconnects, setup.lossless) = (None, None, true);
    let (second, short) = (Duration::from_secs(1), Duration::from_secs(5));
    (setup.beat, setup.connect, setup.ping) = (second, 3 * second, Some(short));
    (setup.strategy, setup.base, setup.max) = (Strategy::Constant, second / 10, second / 10);
    setup.retry_after_max = second;
    (rates.mishap, rates.bad_upgrade, rates.fatal) = (short, 0.95, 0.4);
    (rates.refuse, rates.black_hole, rates.hang, rates.session) = (0.0, 0.0, 0.0, 0.0);
    (rates.overlap, rates.burst, rates.message) = (20, 40, second / 2);
    scene.tune();
    (scene.plan, scene.redundant) = (None, false);
    (scene.failing, scene.consume_most, scene.stall) = (0.0, 10, 0.02);
    scene.consume_healed = 5 * MS;
}

/// A pipeline that drains for long, as most messages are tried again, while one
/// thread of its client after the other ends.
pub(crate) fn drains(scene: &mut Scene) {
    restarts(scene);
    let short = Duration::from_secs(5);
    (scene.rates.mishap, scene.rates.bad_upgrade, scene.rates.burst) = (short, 0.5, 5);
    scene.setup.connections = 3;
    scene.plan = Some(Plan {
        attempts: 10,
        // All that comes.
        max_in_flight: 10_000,
        base: short,
        batchers: Vec::new(),
        ending: Ending::Drain,
        trouble: Trouble { fails: 0.9, ..Trouble::default() },
        ..Plan::plain()
    });
    scene.closes = Some(60 * SECOND);
}

/// Sessions whose heartbeats are due while their client closes.
pub(crate) fn closes(scene: &mut Scene) {
    let Scene { setup, .. } = scene;
    (setup.sessions, setup.close) = (true, Duration::from_secs(5));
    setup.beat = Duration::from_secs(1);
    scene.tune();
}

impl Scene {
    /// A short world, closed at its end.
    fn tune(&mut self) {
        self.end = 300 * SECOND;
        self.settles = settles(&self.setup);
        (self.closes, self.leaves) = (None, None);
    }
}

/// The longest way back that this setup allows.
fn settles(setup: &Setup) -> Duration {
    let longest = setup.ping.unwrap_or_default() + setup.pong + setup.write;
    let longest = longest + setup.connect * 2 + setup.retry_after_max.mul_f64(1.2);
    let longest = longest + setup.max.mul_f64(1.2) + setup.idle.unwrap_or_default();
    longest + Duration::from_secs(40 + 31 + 60)
}

pub(crate) fn draw_rates(k: &mut Kernel, setup: &Setup) -> Rates {
    let some = |k: &mut Kernel, most: f64| if k.chance(0.5) { k.unit() * most } else { 0.0 };
    let reorder = if k.chance(0.3) { 0.05 } else { 0.0 };
    Rates {
        refuse: some(k, 0.4),
        black_hole: some(k, 0.2),
        bad_upgrade: some(k, 0.4),
        dns: some(k, 0.3),
        redirect: some(k, 0.3),
        hang: if k.chance(0.05) { 0.001 } else { 0.0 },
        tls: some(k, 0.05),
        hook: some(k, 0.1),
        session: some(k, 0.02),
        panic: if k.chance(0.1) { 0.001 } else { 0.0 },
        mishap: Duration::from_secs(k.pick(&[15, 60, 200, 900])),
        fatal: if k.chance(0.4) { 0.1 } else { 0.0 },
        duplicate: some(k, 0.2),
        reorder,
        skip: some(k, 0.1),
        message: Duration::from_millis(k.pick(&[600, 2000, 6000, 20_000])),
        burst: k.pick(&[1, 1, 5, 40]),
        dribble: k.chance(0.3),
        big: if setup.queue > 1000 { k.pick(&[0.02, 1.0]) } else { k.pick(&[0.0, 0.02, 0.2]) },
        window: if setup.queue > 1000 { 1 << 20 } else { 256 * 1024 },
        slow: k.chance(0.3),
        lazy: 0.02,
        overlap: k.pick(&[0, 3, 20]) + if reorder > 0.0 { 4 } else { 0 },
    }
}

pub(crate) fn draw_setup(k: &mut Kernel) -> Setup {
    let secs = |k: &mut Kernel, of: &[u64]| Duration::from_secs(k.pick(of));
    let overflow = k.pick(&[
        Overflow::Block,
        Overflow::Block,
        Overflow::Block,
        Overflow::DropOldest,
        Overflow::DropNewest,
        Overflow::Disconnect,
    ]);
    let queue = k.pick(&[1usize, 8, 64, 1000, 10_000]);
    let dedup = k.chance(0.75).then(|| k.pick(&[64, 5000, 1_000_000]));
    let base = Duration::from_millis(k.pick(&[100, 500, 2000]));
    let (exponential, other) = (Strategy::Exponential, k.range(0, 12));
    let strategy = match other {
        0 => Strategy::Linear,
        1 => Strategy::Constant,
        2 => Strategy::Custom,
        _ => exponential,
    };
    // The default takes over from a function that panics.
    let most = if strategy == exponential { base * k.pick(&[1, 8, 60]) } else { base * FACTOR };
    let max = if strategy == Strategy::Custom { Duration::from_secs(30) } else { most };
    Setup {
        connections: k.pick(&[1, 1, 2, 3]),
        connect: secs(k, &[3, 10, 30]),
        ping: if k.chance(0.9) { Some(secs(k, &[5, 20, 60])) } else { None },
        pong: secs(k, &[5, 20]),
        idle: if k.chance(0.2) { Some(secs(k, &[120, 300])) } else { None },
        write: secs(k, &[10, 30]),
        close: secs(k, &[1, 5]),
        base,
        max,
        strategy,
        ttl: dedup.and_then(|_| {
            k.pick(&[None, None, None, Some(60), Some(600)]).map(Duration::from_secs)
        }),
        openings: k.pick(&[0, 0, 1, 3]),
        classifier: k.chance(0.2),
        jitter: k.pick(&[0, 1, 1, 2]),
        stable: secs(k, &[5, 10, 60]),
        retry_after_max: secs(k, &[10, 300]),
        attempts: if k.chance(0.1) { Some(8) } else { None },
        reconnects: if k.chance(0.1) { Some(12) } else { None },
        restarts: k.pick(&[0, 3, 3, 5]),
        within: secs(k, &[5, 60]),
        queue,
        block: QueuePolicy { messages: queue, bytes: 1 << 20, overflow }.block_messages(),
        overflow,
        dedup,
        lossless: false,
        sessions: k.chance(0.7),
        beat: Duration::from_secs(45),
    }
}

fn redirect_limit() -> u32 {
    match () {
        () if planted(Bug::RedirectsNotLimited) => u32::MAX,
        () if planted(Bug::RedirectsRefused) => 0,
        () => MAX_REDIRECTS,
    }
}

fn identity() -> Identity {
    Identity::new([7; crate::logic::identity::KEY])
}

fn tls() -> TlsSource {
    static TLS: OnceLock<TlsSource> = OnceLock::new();
    TLS.get_or_init(TlsSource::default).clone()
}

/// Messages that a program may queue: in some worlds, more than a turn sends.
pub(crate) fn outbox(queue: usize) -> usize {
    if queue > 1000 { 600 } else { 40 }
}

pub(crate) fn share(setup: &Setup, spawner: Spawner) -> Shared {
    let inboxes: Vec<Arc<Inbox>> = (0..setup.connections)
        .map(|_| {
            Arc::new(Inbox::new(crate::threads::inbox::OutboxLimits {
                messages: outbox(setup.queue),
                bytes: 1 << 20,
            }))
        })
        .collect();
    let dedup = setup.dedup.map(|capacity| Dedup::new(capacity as usize, setup.ttl));
    let limits = QueuePolicy { messages: setup.queue, bytes: 1 << 20, overflow: setup.overflow };
    let monitor = MonitorAlarm(spawner.monitor.clone());
    let queue = Queue::new(limits, dedup, inboxes.clone(), monitor);
    let source = if setup.dedup.is_some() || setup.sessions {
        IdSource::Pointer(Pointer::parse("/id").expect("a pointer"))
    } else {
        IdSource::Off
    };
    let sessions = setup.sessions;
    let policy = ConnectionPolicy {
        dial: DialPolicy {
            connect_timeout: setup.connect,
            redirect_limit: redirect_limit(),
            tls: tls(),
        },
        limits: Limits { read_buffer: 4096, max_message: 64 * 1024 },
        retry: RetryPolicy {
            backoff: backoff(setup),
            stable_after: setup.stable,
            retry_after_max: setup.retry_after_max,
            max_attempts: setup.attempts,
            max_reconnect_attempts: setup.reconnects,
        },
        heartbeat: Heartbeat {
            ping_interval: setup.ping,
            pong_timeout: setup.pong,
            idle_timeout: setup.idle,
            write_timeout: setup.write,
        },
        ids: Ids { source, identity: identity() },
        block_messages: limits.block_messages(),
        session: sessions.then(|| {
            Arc::new(|| Box::new(user::Subscriber::new()) as Box<dyn Session>)
                as crate::threads::connection::SessionFactory
        }),
        openings: (0..setup.openings).map(|n| Outgoing::from(format!("open {n}"))).collect(),
        classifier: (setup.classifier && !planted(Bug::ClassifierNotAsked))
            .then(|| Arc::new(user::classify) as Classifier),
        resolver: Arc::new(user::resolver),
        close_timeout: setup.close,
    };
    let connections = inboxes
        .into_iter()
        .map(|inbox| Peer {
            endpoint: Endpoint::Hook(Arc::new(user::hook)),
            inbox,
            metrics: ConnectionMetrics::default(),
            estate: Estate::default(),
        })
        .collect::<Vec<_>>();
    let observer: crate::threads::events::Observer<crate::event::Event> = Arc::new(|event| {
        with(|k| {
            let at = k.now;
            k.told.push_back((at, event.clone()));
        });
    });
    Shared {
        clock: Clock::real(),
        policy,
        queue,
        hub: Hub::new(Some(observer)),
        timer: Timer::of_a_client(),
        spawner,
        states: States::new(connections.len()),
        connections,
        restarts: Counter::default(),
        ending: Mutex::default(),
        close_by: Mutex::default(),
    }
}

fn backoff(setup: &Setup) -> Backoff {
    let base = setup.base;
    let jitter = match setup.jitter {
        0 => Jitter::None,
        1 => Jitter::Equal,
        _ => Jitter::Full,
    };
    match setup.strategy {
        Strategy::Exponential => Backoff::exponential(base, setup.max).with_jitter(jitter),
        Strategy::Linear => Backoff::linear(base, FACTOR),
        Strategy::Constant => Backoff::constant(base),
        Strategy::Custom => Backoff::custom(move |retry| {
            custom_delay(base, retry.attempt).expect("planned panic of a back-off")
        }),
    }
}
