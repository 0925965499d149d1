//! What the window of ids costs for each id, at windows of 10^4 to 10^7, against
//! what a program would write itself: a `HashSet` and a queue of what to forget.
//!
//! ```text
//! cargo bench --features testing --bench dedup
//! ```

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that shows figures")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench that cannot run says so")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

mod common;

/// The table itself is private to the crate: it is compiled in here.
#[path = "../src/logic/dedup.rs"]
#[allow(
    dead_code,
    unused,
    unreachable_pub,
    reason = "only the intake is measured; its unit tests do not run here"
)]
mod dedup;

/// What the table needs of the crate: it cannot fail here.
mod error {
    pub(crate) struct Error;

    impl Error {
        pub(crate) fn setting(_: &'static str, _: impl std::fmt::Display) -> Self {
            Self
        }
    }

    #[allow(dead_code, reason = "named by the table's unit tests, which cargo half includes")]
    pub(crate) enum ErrorKind {}
}

/// The same.
mod logic {
    #[allow(dead_code, reason = "for the table's unit tests too")]
    pub(crate) fn some_instant() -> std::time::Instant {
        std::time::Instant::now()
    }
}

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use common::Options;
use common::table::{Row, Table, Unit};
use dedup::Dedup;

fn main() {
    let options = Options::read(Duration::from_secs(600));
    let mut table = Table::new(
        "dedup",
        "nanoseconds for each id; \"bare\" is a HashSet and a VecDeque of the same window",
    );
    let windows: &[usize] = options.pick(&[10_000, 100_000, 1_000_000, 10_000_000], &[10_000]);
    for window in windows {
        let heading = format!("window of {window} ids");
        if options.wants(&heading) {
            eprintln!("{heading} ...");
            table.add(heading, compare(*window, options.pick(5, 1)));
        }
    }
    table.finish(&options);
}

/// Both full, then in turn: as many ids again, fresh ones, then known ones.
fn compare(window: usize, rounds: usize) -> Vec<Row> {
    let mut fresh = Row::new("fresh", Unit::Nanos);
    let mut grouped = Row::new("fresh, 64 at a time", Unit::Nanos);
    let mut repeated = Row::new("repeated", Unit::Nanos);
    let now = Instant::now();
    let mut here = Dedup::new(window, None);
    let mut bare = Bare::new(window);
    let mut next = 0;
    let batch = window.clamp(100_000, 2_000_000);
    let mut ids = Vec::with_capacity(batch);
    while next < window as u128 * 2 {
        accept(&mut here, id(next), now);
        bare.accept(id(next));
        next += 1;
    }
    for _ in 0..rounds {
        ids.clear();
        ids.extend((0..batch as u128).map(|n| id(next + n)));
        next += batch as u128;
        fresh.bare.push(nanos_each(&ids, true, |id| bare.accept(id)));
        fresh.here.push(nanos_each(&ids, true, |id| accept(&mut here, id, now)));
        ids.clear();
        ids.extend((0..batch as u128).map(|n| id(next + n)));
        next += batch as u128;
        grouped.bare.push(nanos_each(&ids, true, |id| bare.accept(id)));
        grouped.here.push(nanos_grouped(&ids, &mut here, now));
        // Of the window, in an order unlike that of their arrival.
        let recent = next - window as u128;
        ids.clear();
        ids.extend((0..batch as u128).map(|n| id(recent + n * 7_919 % window as u128)));
        repeated.bare.push(nanos_each(&ids, false, |id| bare.accept(id)));
        repeated.here.push(nanos_each(&ids, false, |id| accept(&mut here, id, now)));
    }
    vec![fresh, grouped, repeated]
}

/// As blocks of a connection are judged: a group's lines are touched first.
fn nanos_grouped(ids: &[u128], here: &mut Dedup, now: Instant) -> f64 {
    let start = Instant::now();
    let mut right = 0;
    for group in ids.chunks(64) {
        here.touch(group, |id| *id);
        let mut at = 0;
        while at < group.len() {
            let usual = here.accept_usual(group[at..].iter().copied());
            at += usual;
            let one = group.get(at).is_some_and(|id| here.accept_next(*id, now));
            right += usual + usize::from(one);
            at += 1;
        }
    }
    let nanos = start.elapsed().as_nanos() as f64;
    assert_eq!(right, ids.len(), "a fresh id is accepted");
    nanos / ids.len() as f64
}

fn accept(here: &mut Dedup, id: u128, now: Instant) -> bool {
    here.accept_usual(std::iter::once(id)) == 1 || here.accept_next(id, now)
}

fn nanos_each(ids: &[u128], expected: bool, mut accept: impl FnMut(u128) -> bool) -> f64 {
    let start = Instant::now();
    let right = ids.iter().filter(|id| accept(**id) == expected).count();
    let nanos = start.elapsed().as_nanos() as f64;
    assert_eq!(right, ids.len(), "a fresh id is accepted, a known one is not");
    nanos / ids.len() as f64
}

/// As good as random, and never twice the same.
fn id(number: u128) -> u128 {
    let mix = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
    (mix ^ (mix >> 71)).wrapping_mul(0xD6E8_FEB8_6659_FD93_A5A3_5641_2C9A_3D0B)
}

/// What a program would write itself.
struct Bare {
    window: usize,
    known: HashSet<u128>,
    order: VecDeque<u128>,
}

impl Bare {
    fn new(window: usize) -> Self {
        Self {
            window,
            known: HashSet::with_capacity(window + 1),
            order: VecDeque::with_capacity(window + 1),
        }
    }

    fn accept(&mut self, id: u128) -> bool {
        if !self.known.insert(id) {
            return false;
        }
        self.order.push_back(id);
        if self.order.len() > self.window
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        true
    }
}
