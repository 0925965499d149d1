//! Figures, and how they are shown.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Options, median};

/// What a figure is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Messages a second.
    Rate,
    /// Nanoseconds.
    Nanos,
    /// Microseconds.
    Micros,
    /// Kibibytes.
    Kib,
    /// A plain number.
    Count,
}

/// What a figure has to show.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// It is there to explain others.
    None,
    /// At least so many times the bare side.
    AtLeast(f64),
    /// At most so many times the bare side.
    AtMost(f64),
    /// No more than this, whatever the bare side does.
    Below(f64),
}

/// One figure: a value for each round, beside the bare side's in that round.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) unit: Unit,
    /// Empty where there is nothing to compare with.
    pub(crate) bare: Vec<f64>,
    pub(crate) here: Vec<f64>,
    pub(crate) goal: Goal,
    pub(crate) note: String,
}

/// Some figures under one heading.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) heading: String,
    pub(crate) rows: Vec<Row>,
}

/// Everything one bench prints at its end.
#[derive(Debug)]
pub(crate) struct Table {
    bench: &'static str,
    about: String,
    started: Instant,
    groups: Vec<Group>,
}

impl Row {
    pub(crate) fn new(name: impl Into<String>, unit: Unit) -> Self {
        Self {
            name: name.into(),
            unit,
            bare: Vec::new(),
            here: Vec::new(),
            goal: Goal::None,
            note: String::new(),
        }
    }

    pub(crate) fn goal(mut self, goal: Goal) -> Self {
        self.goal = goal;
        self
    }

    /// Each round's ratio of this crate's value to the bare one.
    fn ratios(&self) -> Vec<f64> {
        let ratios = self.here.iter().zip(&self.bare).map(|(here, bare)| here / bare);
        // Nothing compares with zero.
        ratios.filter(|ratio| ratio.is_finite()).collect()
    }

    /// How far from its goal it is: 1 or less is met. `None` without a goal.
    fn miss(&self) -> Option<f64> {
        Some(match self.goal {
            Goal::None => return None,
            Goal::AtLeast(goal) => goal / median(&self.ratios()),
            Goal::AtMost(goal) => median(&self.ratios()) / goal,
            Goal::Below(goal) => median(&self.here) / goal,
        })
    }

    fn cells(&self) -> [String; 6] {
        let shown = |values: &[f64]| match values {
            [] => String::new(),
            values => self.unit.show(median(values)),
        };
        let ratio = match &self.ratios()[..] {
            [] => String::new(),
            ratios => format!("{:.2} {}", median(ratios), spread(ratios, |v| format!("{v:.2}"))),
        };
        let ratio = match (ratio.is_empty(), &self.here[..]) {
            (true, [_, _, ..]) => spread(&self.here, |value| self.unit.show(value)),
            _ => ratio,
        };
        let goal = match self.goal {
            Goal::None => String::new(),
            Goal::AtLeast(goal) => format!(">= {goal} x"),
            Goal::AtMost(goal) => format!("<= {goal} x"),
            Goal::Below(0.0) => "none".to_owned(),
            Goal::Below(goal) => format!("<= {}", self.unit.show(goal)),
        };
        let verdict = match self.miss() {
            None => String::new(),
            Some(miss) if miss <= 1.0 || median(&self.here) == 0.0 => "met".to_owned(),
            Some(miss) if miss.is_finite() => format!("missed by {miss:.2} x"),
            Some(_) => "missed".to_owned(),
        };
        [shown(&self.bare), shown(&self.here), ratio, goal, verdict, self.note.clone()]
    }

    fn json(&self) -> Value {
        let ratios = self.ratios();
        json!({
            "name": self.name,
            "unit": self.unit.name(),
            "bare": self.bare,
            "here": self.here,
            "ratios": ratios,
            "ratio": (!ratios.is_empty()).then(|| median(&ratios)),
            "goal": self.goal.json(),
            "missed_by": self.miss(),
            "note": self.note,
        })
    }

    fn parse(value: &Value) -> Option<Self> {
        let list = |key: &str| -> Option<Vec<f64>> {
            Some(value[key].as_array()?.iter().filter_map(Value::as_f64).collect())
        };
        Some(Self {
            name: value["name"].as_str()?.to_owned(),
            unit: Unit::parse(value["unit"].as_str()?)?,
            bare: list("bare")?,
            here: list("here")?,
            goal: Goal::parse(&value["goal"]),
            note: value["note"].as_str()?.to_owned(),
        })
    }
}

impl Unit {
    const ALL: [Unit; 5] = [Unit::Rate, Unit::Nanos, Unit::Micros, Unit::Kib, Unit::Count];

    fn name(self) -> &'static str {
        match self {
            Unit::Rate => "1/s",
            Unit::Nanos => "ns",
            Unit::Micros => "us",
            Unit::Kib => "KiB",
            Unit::Count => "",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|unit| unit.name() == name)
    }

    fn show(self, value: f64) -> String {
        match self {
            Unit::Rate if value >= 1e6 => format!("{} M/s", digits(value / 1e6)),
            Unit::Rate => format!("{} k/s", digits(value / 1e3)),
            Unit::Count => digits(value),
            _ => format!("{} {}", digits(value), self.name()),
        }
    }
}

impl Goal {
    fn json(self) -> Value {
        match self {
            Goal::None => Value::Null,
            Goal::AtLeast(goal) => json!({ "ratio_at_least": goal }),
            Goal::AtMost(goal) => json!({ "ratio_at_most": goal }),
            Goal::Below(goal) => json!({ "at_most": goal }),
        }
    }

    fn parse(value: &Value) -> Self {
        let [least, most, below] = ["ratio_at_least", "ratio_at_most", "at_most"]
            .map(|key| value.get(key).and_then(Value::as_f64));
        let least = least.map(Goal::AtLeast);
        least.or(most.map(Goal::AtMost)).or(below.map(Goal::Below)).unwrap_or(Goal::None)
    }
}

/// Three digits that count.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// The lowest and the highest.
fn spread(values: &[f64], show: impl Fn(f64) -> String) -> String {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("[{} .. {}]", show(low), show(high))
}

impl Table {
    /// `about` says what is compared with what.
    pub(crate) fn new(bench: &'static str, about: impl Into<String>) -> Self {
        Self { bench, about: about.into(), started: Instant::now(), groups: Vec::new() }
    }

    pub(crate) fn add(&mut self, heading: impl Into<String>, rows: Vec<Row>) {
        self.groups.push(Group { heading: heading.into(), rows });
    }

    /// Prints the table, or its JSON if that was asked for, and leaves the JSON
    /// in the target directory for the bench `verdict`.
    pub(crate) fn finish(&self, options: &Options) {
        let json = json!({
            "bench": self.bench,
            "quick": options.quick,
            "seconds": self.started.elapsed().as_secs_f64(),
            "groups": self.groups.iter().map(Group::json).collect::<Vec<_>>(),
        });
        if let Some(path) = results().map(|folder| folder.join(format!("{}.json", self.bench))) {
            let folder = path.parent().expect("it was joined to one");
            let saved = std::fs::create_dir_all(folder)
                .and_then(|()| std::fs::write(&path, json.to_string()));
            if let Err(error) = saved {
                eprintln!("{}: {error}", path.display());
            }
        }
        if options.json {
            println!("{json}");
        } else {
            let quick = if options.quick { " (quick: no figure means anything)" } else { "" };
            let seconds = self.started.elapsed().as_secs();
            println!("\n== {}{quick}, {seconds} s: {}", self.bench, self.about);
            print!("{}", show(&self.groups));
        }
    }
}

impl Group {
    fn json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
        json!({ "heading": self.heading, "rows": rows })
    }

    fn parse(value: &Value) -> Option<Self> {
        let rows = value["rows"].as_array()?.iter().filter_map(Row::parse).collect();
        Some(Self { heading: value["heading"].as_str()?.to_owned(), rows })
    }

    /// What the last run of `bench` left, and whether it was a quick one.
    pub(crate) fn load(bench: &str) -> Option<(Vec<Self>, bool)> {
        let text = std::fs::read_to_string(results()?.join(format!("{bench}.json"))).ok()?;
        let json: Value = serde_json::from_str(&text).ok()?;
        let groups = json["groups"].as_array()?.iter().filter_map(Group::parse).collect();
        Some((groups, json["quick"].as_bool()?))
    }
}

/// `bench` in the target directory: benches run from `target/release/deps`.
fn results() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    Some(program.parent()?.parent()?.parent()?.join("bench"))
}

/// The groups below each other, in common columns.
fn show(groups: &[Group]) -> String {
    let head = ["bare", "here", "ratio [spread]", "goal", "", "CPU of each thread, notes"];
    let rows = || groups.iter().flat_map(|group| &group.rows);
    let name = rows().map(|row| row.name.chars().count() + 2).max().unwrap_or(0);
    let mut widths = head.map(|text| text.chars().count());
    for row in rows() {
        for (width, cell) in widths.iter_mut().zip(row.cells()) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |name_: &str, cells: &[String]| {
        let mut line = format!("{name_:name$}");
        for (at, (cell, width)) in cells.iter().zip(widths).enumerate() {
            // Numbers to the right, words to the left.
            let _ = match at {
                0 | 1 => write!(line, "  {cell:>width$}"),
                _ => write!(line, "  {cell:width$}"),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    };
    line("", &head.map(str::to_owned));
    for group in groups {
        line(&group.heading, &[]);
        for row in &group.rows {
            line(&format!("  {}", row.name), &row.cells());
        }
    }
    text
}
