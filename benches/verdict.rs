//! What speed is promised, and what the other benches found when they last ran.
//!
//! Runs last in `cargo bench --features testing`; prints the figures with a goal.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program that shows figures")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench that cannot run says so")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

mod common;

use std::time::Duration;

use common::Options;
use common::table::{Goal, Group, Table};

fn main() {
    let options = Options::read(Duration::from_secs(60));
    let mut quick = Vec::new();
    let mut table = Table::new(
        "verdict",
        "every figure with a goal; \"bare\" is a thread around tungstenite's read, in the same run",
    );
    for bench in ["throughput", "latency", "footprint"] {
        let Some((groups, was_quick)) = Group::load(bench) else { continue };
        if was_quick {
            quick.push(bench);
        }
        for mut group in groups {
            group.rows.retain(|row| row.goal != Goal::None);
            if !group.rows.is_empty() {
                table.add(format!("{bench}: {}", group.heading), group.rows);
            }
        }
    }
    table.finish(&options);
    if !quick.is_empty() && !options.json {
        println!("({} ran quickly: those figures mean nothing)", quick.join(", "));
    }
}
