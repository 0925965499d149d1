//! What the program gives its pipeline: handler, acknowledgers and sources, as
//! well as they behave.

use std::panic::panic_any;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Sender, select};

use super::books::{self, Id, Inside};
use super::plan::{Plan, Spring, Trouble};
use crate::checks;
use crate::error::BoxError;
use crate::faults;
use crate::io::clock::Clock;
use crate::kernel::{self, Ev, Kernel, Wait, with};
use crate::message::{BlockBuilder, Message, Payload};
use crate::metrics::Report;
use crate::threads::Kill;
use crate::threads::shared::Shared;
use crate::work::{
    Acknowledger, Batch, Failed, Failure, Handler, Next, Pull, Settler, Source, Stop, Succeeded,
};
use crate::world;

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// The chances of trouble, which a healed world does not have.
fn trouble(k: &Kernel) -> Trouble {
    match &k.wk.plan {
        Some(plan) if !k.sv.healed => plan.trouble,
        // Where batches take all the room, only time would empty a long queue.
        Some(plan) if plan.max_in_flight >= 200 => {
            Trouble { batched: plan.trouble.batched, ..Trouble::default() }
        }
        _ => Trouble::default(),
    }
}

fn plan() -> Arc<Plan> {
    with(|k| k.wk.plan.clone()).expect("there is a pipeline")
}

/// Takes its time, or for ever.
fn dawdle() {
    let (stall, hangs, yields) = with(|k| {
        let t = trouble(k);
        let stall = k.chance(t.stalls).then(|| k.range(0, t.stall));
        (stall, t.hangs > 0.0 && k.chance(t.hangs), k.preemption > 0.0 && k.chance(0.3))
    });
    if hangs {
        with(|k| k.faults += 1);
        faults::hang();
    }
    match stall {
        Some(time) => kernel::sleep(Duration::from_nanos(time)),
        None if yields => kernel::pause(Wait::Yield),
        None => {}
    }
}

/// Kills the thread that runs.
fn die() -> ! {
    with(books::dies);
    panic_any(Kill)
}

/// What a hook that says nothing does. Who dies in it may have messages in hand.
fn misbehave(hook: &str, in_hand: &[Id]) -> Result<(), BoxError> {
    let how = with(|k| {
        let p = trouble(k).acknowledger;
        let kills = trouble(k).kills > 0.0;
        let how = if k.chance(p) { k.range(1, 4) } else { 0 };
        k.faults += u64::from(how > 0);
        if how == 3 && !kills { 2 } else { how }
    });
    match how {
        0 => Ok(()),
        1 => Err(format!("planned failure of {hook}").into()),
        2 => panic!("planned panic of {hook}"),
        _ => {
            with(|k| books::never_batched(k, in_hand));
            die()
        }
    }
}

pub(crate) struct Works;

/// What goes to a batcher.
pub(crate) struct Item {
    id: Id,
    pub(crate) weight: usize,
    /// Its destructor panics.
    bomb: bool,
}

impl Drop for Item {
    fn drop(&mut self) {
        if self.bomb && !std::thread::panicking() {
            panic!("planned panic of an item");
        }
    }
}

/// A message in the handler's hands, or a batch.
struct InHand(Id);

impl Drop for InHand {
    fn drop(&mut self) {
        with(|k| books::leaves(k, self.0));
    }
}

struct AtBatch;

impl Drop for AtBatch {
    fn drop(&mut self) {
        with(books::leaves_batch);
    }
}

/// What a handler does in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Good,
    Fail,
    FailForGood,
    Panic,
    Nowhere,
    Kill,
}

fn act() -> Act {
    with(|k| {
        let t = trouble(k);
        let act = if k.chance(t.kills) {
            Act::Kill
        } else if k.chance(t.fails) {
            k.pick(&[Act::Fail, Act::Fail, Act::FailForGood, Act::Nowhere])
        } else if k.chance(t.panics) {
            Act::Panic
        } else {
            Act::Good
        };
        k.faults += u64::from(act != Act::Good);
        act
    })
}

impl Handler for Works {
    type Item = Item;

    fn prepare(&self, _: &[Message]) -> Result<(), Failure> {
        let _inside = Inside::enter();
        misbehave("prepare", &[]).map_err(Failure::from)
    }

    fn handle_message(&self, message: &Message) -> Result<Next<Item>, Failure> {
        let _inside = Inside::enter();
        let id = Id::of(message);
        with(|k| books::begins(k, id));
        let in_hand = InHand(id);
        if let Some(time) = with(|k| k.wk.handler_stops.take()) {
            super::stop_in_handler(time);
        }
        dawdle();
        let act = act();
        if act == Act::Kill {
            with(|k| books::killed(k, &[id]));
            panic_any(Kill);
        }
        drop(in_hand);
        let (retry, item) = (matches!(act, Act::Fail | Act::Panic), item(id));
        match act {
            Act::Good => return Ok(good(id, item)),
            Act::Nowhere if !plan().batchers.is_empty() => {
                with(|k| books::fails(k, id, false, true));
                return Ok(Next::to("nowhere", item));
            }
            _ => with(|k| books::fails(k, id, retry, true)),
        }
        std::mem::forget(item);
        match act {
            Act::Panic => panic!("planned panic of a handler"),
            Act::Fail => Err("planned failure of a handler".into()),
            _ => Err(Failure::permanent("planned failure of a handler")),
        }
    }

    fn handle_batch(&self, batch: &mut Batch<Item>) -> Result<(), Failure> {
        let _inside = Inside::enter();
        let name = batch.batcher().to_owned();
        let key = batch.key().and_then(|key| key.parse::<u64>().ok());
        let items: Vec<(Id, usize)> = batch.items().map(|item| (item.id, item.weight)).collect();
        let of: Vec<Id> = batch.messages().map(Id::of).collect();
        let trigger = batch.trigger();
        with(|k| {
            if items.iter().map(|(id, _)| *id).ne(of) {
                k.broken("items-of-their-messages", || format!("{items:?}"));
            }
            books::begins_batch(k, &name, key, trigger, &items);
        });
        let at_batch = AtBatch;
        dawdle();
        let how = with(|k| {
            let t = trouble(k);
            let kills = k.chance(t.kills * 3.0);
            let how = if k.chance(t.batch) { k.range(1, 5) } else { 0 };
            k.faults += u64::from(how > 0 || kills);
            if kills { 5 } else { how }
        });
        let ids: Vec<Id> = items.iter().map(|(id, _)| *id).collect();
        drop(at_batch);
        match how {
            1 | 2 => {
                with(|k| ids.iter().for_each(|id| books::fails(k, *id, true, false)));
                if how == 2 {
                    panic!("planned panic of a batch handler");
                }
                return Err("planned failure of a batch handler".into());
            }
            3 | 4 => with(|k| {
                for (place, id) in ids.iter().enumerate() {
                    match k.range(0, 3) {
                        0 => {
                            books::fails(k, *id, true, false);
                            batch.fail(place, "planned failure in a batch".into());
                        }
                        1 if how == 4 => {
                            books::fails(k, *id, false, false);
                            batch.fail(place, Failure::permanent("planned failure in a batch"));
                        }
                        _ => books::batch_succeeded(k, *id),
                    }
                }
            }),
            5 => {
                with(|k| books::killed(k, &ids));
                panic_any(Kill);
            }
            _ => with(|k| ids.iter().for_each(|id| books::batch_succeeded(k, *id))),
        }
        Ok(())
    }

    fn handle_failed(&self, failed: &[Failed]) {
        let _inside = Inside::enter();
        with(|k| failed.iter().for_each(|one| books::told_failed(k, Id::of(&one.message))));
        misbehave("handle_failed", &[]).ok();
    }
}

fn item(id: Id) -> Item {
    with(|k| {
        let bomb = trouble(k).acknowledger / 10.0;
        Item { id, weight: k.range(0, 5) as usize, bomb: k.chance(bomb) }
    })
}

/// What a message becomes that is handled well.
fn good(id: Id, item: Item) -> Next<Item> {
    let (plan, batched, roll) =
        (plan(), with(|k| k.chance(trouble(k).batched)), with(Kernel::draw));
    if !batched {
        std::mem::forget(item);
        with(|k| books::succeeded(k, id));
        return if roll % 10 == 0 { Next::done().tag("tagged") } else { Next::done() };
    }
    let lot = plan.batchers[(id.n % plan.batchers.len() as u64) as usize];
    let key = (plan.keys > 0).then(|| id.n / 3 % plan.keys);
    let mut next = Next::to(lot.name, item);
    if let Some(key) = key {
        next = next.key(key.to_string());
    }
    if roll % 50 == 0 {
        next = next.flush();
    }
    with(|k| books::goes_to_batch(k, id, lot.name, key));
    if roll % 30 == 1 {
        with(|k| books::acknowledged_early(k, id));
        next = next.acknowledge_now();
    }
    next
}

/// Where a message belongs, if there are so many partitions.
pub(crate) fn partition(id: Id, partitions: u64) -> u64 {
    if partitions == 0 { 0 } else { (id.n + id.source as u64) % partitions }
}

/// The acknowledger of one source.
pub(crate) struct Records(pub(crate) usize);

impl Acknowledger for Records {
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        let _inside = Inside::enter();
        with(|k| {
            for one in succeeded {
                books::acknowledged(k, self.0, Id::of(&one.message), None, one.attempts);
            }
            for one in failed {
                let kind = Some(one.failure.kind());
                books::acknowledged(k, self.0, Id::of(&one.message), kind, one.attempts);
            }
            if succeeded.is_empty() && failed.is_empty() {
                k.broken("no-empty-group", || format!("source {}", self.0));
            }
        });
        dawdle();
        let told: Vec<_> = succeeded.iter().map(|one| Id::of(&one.message)).collect();
        with(|k| told.iter().for_each(|id| books::told(k, *id)));
        misbehave("acknowledge", &told)
    }
}

/// A source whose messages are known.
pub(crate) struct Recorded {
    pub(crate) inner: Box<dyn Source>,
    pub(crate) source: usize,
    pub(crate) client: Option<Arc<Shared>>,
}

impl Source for Recorded {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        let (panics, kills) = with(|k| {
            books::pulls(k);
            let t = trouble(k);
            (k.chance(t.panics / 200.0), k.chance(t.kills / 200.0))
        });
        if kills {
            die();
        }
        if panics {
            panic!("planned panic of a source");
        }
        let pull = self.inner.pull(most, stop);
        if let Pull::Messages(messages) = &pull {
            if messages.len() > most {
                with(|k| k.broken("source-gives-its-share", || format!("{}", messages.len())));
            }
            for (place, message) in messages.iter().enumerate() {
                if let Some(shared) = &self.client {
                    world::takes(shared, message, messages.len() - place - 1);
                }
                let id = Id::of(message);
                let partitions = plan().partitions;
                with(|k| books::given(k, id, partition(id, partitions)));
            }
        }
        pull
    }

    fn stop_reading(&mut self) -> bool {
        self.inner.stop_reading()
    }

    fn end(&mut self, deadline: Duration) -> Option<Report> {
        with(|k| k.wk.closing += 1);
        let report = self.inner.end(deadline);
        with(|k| {
            k.wk.closing -= 1;
            k.wk.left = k.now;
        });
        report
    }

    fn settler(&self) -> Option<Arc<dyn Settler>> {
        Some(Arc::new(Notes { inner: self.inner.settler() }))
    }
}

struct Notes {
    inner: Option<Arc<dyn Settler>>,
}

impl Settler for Notes {
    fn settled(&self, message: &Message, success: bool) {
        self.settled_together(&mut std::iter::once(message), success);
    }

    fn settled_together(&self, messages: &mut dyn Iterator<Item = &Message>, success: bool) {
        let messages: Vec<&Message> = messages.collect();
        if let Some(inner) = &self.inner {
            inner.settled_together(&mut messages.iter().copied(), success);
        }
        with(|k| {
            for message in messages {
                books::settled(k, Id::of(message), success);
                if self.inner.is_some() && !success {
                    world::failed(k, message);
                }
            }
        });
        let panics = with(|k| {
            let p = trouble(k).acknowledger / 10.0;
            k.chance(p)
        });
        if panics {
            panic!("planned panic of a record");
        }
    }
}

/// A source beside the client.
pub(crate) fn spring(kind: Spring, source: usize) -> Box<dyn Source> {
    let left = with(|k| k.range(20, 400));
    match kind {
        Spring::Iterator => Box::new(crate::sources::iter(Items { source, n: 0, left })),
        Spring::Channel => {
            let (sender, receiver) = crossbeam_channel::bounded(with(|k| k.pick(&[1, 50])));
            kernel::spawn("program", move || feed(&sender, source, left));
            Box::new(crate::sources::channel(receiver))
        }
        Spring::Own => Box::new(Own { source, n: 0, left, is_open: true, has_ended: false }),
    }
}

struct Items {
    source: usize,
    n: u64,
    left: u64,
}

impl Iterator for Items {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let _inside = Inside::enter();
        let sleeps = with(|k| k.chance(0.05).then(|| k.range(0, 20 * SECOND)));
        if let Some(time) = sleeps {
            kernel::sleep(Duration::from_nanos(time));
        }
        self.n += 1;
        (self.n <= self.left).then(|| books::text_of(self.source, self.n))
    }
}

fn feed(sender: &Sender<String>, source: usize, left: u64) {
    let mut n = 0;
    while n < left {
        kernel::sleep(Duration::from_nanos(with(|k| k.range(0, 30 * SECOND))));
        for _ in 0..with(|k| k.range(1, 40)) {
            n += 1;
            if sender.send(books::text_of(source, n)).is_err() {
                return;
            }
        }
    }
}

/// Gives some at a time, keeps a few for its end, and takes its time for that.
struct Own {
    source: usize,
    n: u64,
    left: u64,
    is_open: bool,
    has_ended: bool,
}

impl Own {
    fn give(&mut self, most: u64) -> Pull {
        let some = most.min(self.left);
        self.left -= some;
        let mut block = BlockBuilder::new(0, 0, Clock::real().now());
        for _ in 0..some {
            self.n += 1;
            let text = books::text_of(self.source, self.n);
            block.push(Payload::Text(&text), self.n, None);
        }
        Pull::Messages(block.finish().collect())
    }
}

impl Source for Own {
    fn pull(&mut self, most: usize, stop: &Stop) -> Pull {
        let most = most as u64;
        if !self.is_open {
            self.left = self.left.min(5);
            if self.left == 0 && self.has_ended && with(|k| k.chance(0.5)) {
                return Pull::Ended;
            }
            let some = with(|k| k.range(1, most.min(4) + 1));
            return self.give(some);
        }
        if self.left == 0 {
            return Pull::Ended;
        }
        let due = Clock::real().after(Duration::from_nanos(with(|k| k.range(0, 20 * SECOND))));
        let due = crossbeam_channel::at(due);
        select! {
            recv(due) -> _ => {}
            recv(stop.signal()) -> _ => return Pull::Messages(Vec::new()),
        }
        let some = with(|k| k.range(0, most + 1));
        self.give(some)
    }

    fn stop_reading(&mut self) -> bool {
        self.is_open = false;
        self.source % 2 == 1
    }

    fn end(&mut self, _: Duration) -> Option<Report> {
        let _inside = Inside::enter();
        self.is_open = false;
        self.has_ended = true;
        kernel::sleep(Duration::from_nanos(with(|k| k.range(0, 100 * MS))));
        None
    }
}
