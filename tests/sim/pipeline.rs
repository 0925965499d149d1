//! A pipeline's decisions on one thread: the real limiter, batches, retry
//! delays and dedup states, driven as `threads/pipeline` drives them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};
use crate::kernel::{self, Ev, with};
use crate::logic::backoff::{Backoff, Retry, retry_delay};
use crate::logic::batch::{BatchPolicy, Batches, Ready};
use crate::logic::rate::{Limiter, RateLimit};
use crate::message::Message;
use crate::planted::{Bug, planted};
use crate::work::Trigger;

const SECOND: u64 = 1_000_000_000;

pub(crate) struct Pipeline {
    limit: RateLimit,
    limiter: Limiter,
    policy: BatchPolicy,
    batches: Batches<u64, Item>,
    backoff: Backoff,
    attempts: u32,
    keys: u64,
    failing: f64,
    batch_failing: f64,
    waiting: VecDeque<Item>,
    retries: BTreeMap<(u64, u64), Item>,
    /// Batches in a worker's hands, until then.
    working: VecDeque<(u64, Ready<u64, Item>)>,
    serial: u64,
    granted: Bucket,
    /// The last serial of each key that a batch took.
    last: HashMap<u64, u64>,
    settled: HashMap<u64, ()>,
    pub(crate) accepted: u64,
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) batched: u64,
    tick: Option<u64>,
}

#[derive(Debug, Clone)]
struct Item {
    message: Message,
    serial: u64,
    n: u64,
    conn: usize,
    attempts: u32,
    entered: u64,
    retried: bool,
    tried_at: u64,
}

/// What is known of grants, for a reckoning of its own.
struct Bucket {
    level: f64,
    at: u64,
    window: u64,
    passed: u64,
}

/// What became of a message.
pub(crate) enum Settled {
    Done(Message),
    Failed(Message, usize, u64),
}

impl Pipeline {
    pub(crate) fn new() -> Self {
        with(|k| {
            let now = k.instant();
            let limit = if k.chance(0.5) {
                RateLimit::token_bucket(k.pick(&[2.0, 7.5, 50.0, 2000.0]), k.pick(&[1, 5, 100]))
            } else {
                let interval = Duration::from_millis(k.pick(&[100, 1000, 7000]));
                RateLimit::fixed_window(k.pick(&[20, 100, 1000]), interval)
            };
            let policy = BatchPolicy {
                limit: k.pick(&[1, 2, 10, 100]),
                timeout: Duration::from_millis(k.pick(&[20, 1000, 5000])),
                max_keys: k.pick(&[1, 3, 100]),
            };
            let level = match limit {
                RateLimit::TokenBucket { burst, .. } => f64::from(burst),
                _ => 0.0,
            };
            Self {
                limit,
                limiter: Limiter::new(limit, now),
                policy,
                batches: Batches::new(policy),
                backoff: Backoff::exponential(
                    Duration::from_millis(k.pick(&[50, 500])),
                    Duration::from_secs(5),
                ),
                attempts: k.pick(&[1, 2, 5]),
                keys: k.pick(&[1, 4, 20]),
                failing: k.pick(&[0.0, 0.01, 0.1]),
                batch_failing: k.pick(&[0.0, 0.02]),
                waiting: VecDeque::new(),
                retries: BTreeMap::new(),
                working: VecDeque::new(),
                serial: 0,
                granted: Bucket { level, at: k.now, window: k.now, passed: 0 },
                last: HashMap::new(),
                settled: HashMap::new(),
                accepted: 0,
                succeeded: 0,
                failed: 0,
                batched: 0,
                tick: None,
            }
        })
    }

    pub(crate) fn heal(&mut self) {
        self.failing = 0.0;
        self.batch_failing = 0.0;
        let now = kernel::instant();
        self.limit = RateLimit::token_bucket(100_000.0, 1000);
        self.limiter.set(self.limit, now);
        self.granted.level = 1000.0;
    }

    pub(crate) fn room(&self) -> usize {
        200usize.saturating_sub(self.in_flight())
    }

    pub(crate) fn in_flight(&self) -> usize {
        let working: usize = self.working.iter().map(|(_, ready)| ready.items.len()).sum();
        self.waiting.len() + self.retries.len() + self.batches.len() + working
    }

    pub(crate) fn accept(&mut self, message: Message, conn: usize, n: u64) {
        self.serial += 1;
        self.accepted += 1;
        let serial = self.serial;
        let item =
            Item { message, serial, n, conn, attempts: 0, entered: 0, retried: false, tried_at: 0 };
        self.waiting.push_back(item);
    }

    pub(crate) fn expects(&self, tick: u64) -> bool {
        self.tick == Some(tick)
    }

    /// Does what is due; returns what was settled.
    pub(crate) fn turn(&mut self, ended: bool) -> Vec<Settled> {
        let now = with(|k| k.now);
        let mut settled = Vec::new();
        while self.working.front().is_some_and(|(at, _)| *at <= now) {
            let (_, ready) = self.working.pop_front().unwrap();
            self.finish(ready, &mut settled);
        }
        let ready = self.batches.due(kernel::instant());
        self.dispatch(ready, now);
        let due: Vec<_> = self.retries.range(..(now + 1, 0)).map(|(key, _)| *key).collect();
        for key in due {
            let item = self.retries.remove(&key).unwrap();
            self.handle(item, now, &mut settled);
        }
        self.pass(now, &mut settled);
        if ended && self.waiting.is_empty() && self.retries.is_empty() {
            let rest =
                if planted(Bug::MissedFlushOnStop) { Vec::new() } else { self.batches.drain() };
            self.dispatch(rest, now);
            if self.batches.len() > 0 {
                with(|k| k.broken("flushed-on-stop", || "a partial batch stays".to_owned()));
            }
        }
        self.look(now);
        settled
    }

    /// Lets pass what the rate allows.
    fn pass(&mut self, now: u64, settled: &mut Vec<Settled>) {
        let want = self.waiting.len();
        if want == 0 {
            return;
        }
        let mut granted = self.limiter.take(kernel::instant(), want);
        if planted(Bug::RateExceeded) && granted > 0 {
            granted = want;
        }
        self.reckon(now, granted as u64);
        for _ in 0..granted {
            let item = self.waiting.pop_front().unwrap();
            self.handle(item, now, settled);
        }
    }

    fn reckon(&mut self, now: u64, granted: u64) {
        let over = match self.limit {
            RateLimit::TokenBucket { per_second, burst } => {
                let passed = (now - self.granted.at) as f64 / SECOND as f64;
                let level = (self.granted.level + passed * per_second).min(f64::from(burst));
                self.granted.level = level - granted as f64;
                self.granted.at = now;
                self.granted.level < -0.001
            }
            RateLimit::FixedWindow { allowed, interval } => {
                let interval = interval.as_nanos() as u64;
                let gone = (now - self.granted.window) / interval;
                if gone > 0 {
                    self.granted.window += gone * interval;
                    self.granted.passed = 0;
                }
                self.granted.passed += granted;
                self.granted.passed > u64::from(allowed)
            }
        };
        if over {
            let limit = self.limit;
            with(|k| k.broken("rate-kept", || format!("{granted} more over {limit:?}")));
        }
    }

    fn handle(&mut self, mut item: Item, now: u64, settled: &mut Vec<Settled>) {
        item.attempts += 1;
        if item.attempts > self.attempts {
            let (n, tries) = (item.n, item.attempts);
            with(|k| k.broken("retries-bounded", || format!("message {n} is tried {tries} times")));
        }
        if planted(Bug::AcknowledgedBeforeOutcome) {
            self.settle(&item, true, settled);
        }
        if kernel::chance(self.failing) {
            self.failed(item, now, settled);
            return;
        }
        let key = item.n % self.keys;
        let flush = kernel::chance(0.02);
        item.entered = now;
        if planted(Bug::EmptyBatch) && kernel::chance(0.01) {
            let ready = Ready { key, items: Vec::new(), trigger: Trigger::Flush };
            self.dispatch(vec![ready], now);
        }
        // What is overdue leaves as it is: nothing joins it any more.
        let mut ready = self.batches.due(kernel::instant());
        self.batches.push(kernel::instant(), key, item, 1, flush, &mut ready);
        if planted(Bug::OvertakenInItsKey) {
            ready.iter_mut().for_each(|ready| ready.items.reverse());
        }
        if planted(Bug::BatchTooLarge) && ready.len() == 1 && ready[0].trigger == Trigger::Size {
            let more = ready[0].items.clone();
            ready[0].items.extend(more);
        }
        self.dispatch(ready, now);
    }

    fn dispatch(&mut self, ready: Vec<Ready<u64, Item>>, now: u64) {
        for ready in ready {
            self.inspect(&ready, now);
            self.batched += 1;
            let at = now + with(|k| k.range(0, 300_000_000));
            let at = at.max(self.working.back().map_or(0, |(at, _)| *at));
            self.working.push_back((at, ready));
        }
    }

    fn inspect(&mut self, ready: &Ready<u64, Item>, now: u64) {
        let (len, limit) = (ready.items.len(), self.policy.limit);
        if len == 0 {
            with(|k| k.broken("no-empty-batch", || format!("{:?}", ready.trigger)));
        }
        if len > limit {
            with(|k| k.broken("batch-within-size", || format!("{len} items, {limit} allowed")));
        }
        let timeout = self.policy.timeout.as_nanos() as u64;
        if let Some(first) = ready.items.first() {
            let age = now - first.entered;
            if ready.trigger == Trigger::Timeout && age < timeout {
                with(|k| k.broken("batch-waits-for-its-time", || format!("closed after {age} ns")));
            }
            if age > timeout + SECOND {
                with(|k| k.broken("batch-in-time", || format!("its first waited {age} ns")));
            }
        }
        for item in ready.items.iter().filter(|item| !item.retried) {
            let last = self.last.insert(ready.key, item.serial).unwrap_or(0);
            if last >= item.serial || item.n % self.keys != ready.key {
                let key = ready.key;
                with(|k| {
                    k.broken("order-in-key", || format!("key {key}: {} after {last}", item.serial))
                });
            }
        }
    }

    fn finish(&mut self, ready: Ready<u64, Item>, settled: &mut Vec<Settled>) {
        let now = with(|k| k.now);
        for item in ready.items {
            if kernel::chance(self.batch_failing) {
                self.failed(item, now, settled);
            } else {
                self.settle(&item, true, settled);
                if planted(Bug::SettledTwice) && item.serial % 40 == 3 {
                    self.settle(&item, true, settled);
                }
            }
        }
    }

    fn failed(&mut self, mut item: Item, now: u64, settled: &mut Vec<Settled>) {
        if item.attempts >= self.attempts && !planted(Bug::RetriedForEver) {
            self.settle(&item, false, settled);
            return;
        }
        let error = Error::new(ErrorKind::Handler, "it failed");
        let retry = Retry { attempt: item.attempts, error: &error, uptime: Duration::ZERO };
        let delay = retry_delay(&self.backoff, &retry, Duration::ZERO, kernel::random());
        item.retried = true;
        self.retries.insert((now + delay.as_nanos() as u64, item.serial), item);
    }

    fn settle(&mut self, item: &Item, success: bool, settled: &mut Vec<Settled>) {
        if self.settled.insert(item.serial, ()).is_some() {
            let n = item.n;
            with(|k| k.broken("settled-once", || format!("message {n} is settled again")));
        }
        if success {
            self.succeeded += 1;
            settled.push(Settled::Done(item.message.clone()));
        } else {
            self.failed += 1;
            settled.push(Settled::Failed(item.message.clone(), item.conn, item.n));
        }
    }

    /// When there is something to do next.
    fn look(&mut self, now: u64) {
        let in_flight = self.in_flight() as u64;
        let ends = self.succeeded + self.failed + in_flight;
        if self.accepted != ends {
            let accepted = self.accepted;
            with(|k| k.broken("pipeline-balanced", || format!("{accepted} in, {ends} known")));
        }
        let deadline = self.batches.deadline().map(|at| with(|k| k.nanos(at)));
        if let Some(deadline) = deadline
            && now > deadline + SECOND
        {
            with(|k| k.broken("batch-in-time", || "an open batch is overdue".to_owned()));
        }
        let deadline = if planted(Bug::TimerOfAnOlderBatch) {
            deadline.map(|at| at + 60 * SECOND)
        } else {
            deadline
        };
        let rate = (!self.waiting.is_empty())
            .then(|| self.limiter.next(kernel::instant()).map_or(now, |at| with(|k| k.nanos(at))));
        let next = [
            deadline,
            rate,
            self.retries.keys().next().map(|(at, _)| *at),
            self.working.front().map(|(at, _)| *at),
        ];
        let Some(next) = next.into_iter().flatten().min() else { return };
        let next = next.max(now + 1000);
        if self.tick.is_none_or(|tick| tick <= now || next < tick) {
            self.tick = Some(next);
            with(|k| k.at(next, Ev::PipelineTick(next)));
        }
    }
}
