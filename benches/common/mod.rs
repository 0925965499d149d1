//! What the benches share: options, rounds, tables, processor time for each
//! thread, and the server's side of a WebSocket by hand.
#![allow(dead_code, reason = "each bench uses its own part")]

pub(crate) mod child;
pub(crate) mod cpu;
pub(crate) mod net;
pub(crate) mod table;

use std::time::Duration;

/// What the command line asks for.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// One short round: shows that the bench runs, not how fast anything is.
    pub(crate) quick: bool,
    /// JSON on standard output in place of the table.
    pub(crate) json: bool,
    /// Only groups of figures whose heading contains one of these.
    only: Vec<String>,
}

impl Options {
    /// Reads the command line, and sees to it that the process ends: by itself
    /// well before, or by this limit.
    pub(crate) fn read(limit: Duration) -> Self {
        let mut options = Options { quick: false, json: false, only: Vec::new() };
        // `cargo bench` passes `--bench`; `cargo test --benches` does not, and
        // wants to know only that it runs.
        let mut from_bench = false;
        for argument in std::env::args().skip(1) {
            match argument.as_str() {
                "--bench" => from_bench = true,
                "--quick" => options.quick = true,
                "--json" => options.json = true,
                other if !other.starts_with('-') => options.only.push(other.to_owned()),
                other => println!("ignored: {other} (known: --quick, --json, words of headings)"),
            }
        }
        options.quick |= !from_bench || std::env::var_os("BROADSOCK_BENCH_QUICK").is_some();
        give_up_after(if options.quick { limit.min(Duration::from_secs(60)) } else { limit });
        options
    }

    /// Whether the group under this heading was asked for.
    pub(crate) fn wants(&self, heading: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| heading.contains(word.as_str()))
    }

    /// The first value, or the second in a quick run.
    pub(crate) fn pick<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// Ends the process after `limit`, whatever hangs. Children end with it: their
/// standard input closes.
pub(crate) fn give_up_after(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!("this bench did not end within {limit:?}: given up");
        std::process::exit(3);
    });
}

/// The value at `part` (0 to 1) of sorted values.
pub(crate) fn percentile(sorted: &[f64], part: f64) -> f64 {
    if sorted.is_empty() {
        return f64::NAN;
    }
    let at = (part * sorted.len() as f64).ceil() as usize;
    sorted[at.clamp(1, sorted.len()) - 1]
}

/// The middle value.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    percentile(&sorted, 0.5)
}
