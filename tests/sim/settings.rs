//! What the environment asks for. A value that cannot be read is refused: to run
//! something else in its place would look like an answer.

use std::env;

use crate::planted::{self, Bug};
use crate::world::{self, Tune};

/// Virtual minutes of a world.
const MINUTES: u64 = 30;

/// A week: a world of more would take no less than hours.
const MOST_MINUTES: u64 = 7 * 24 * 60;

pub(crate) struct Settings {
    /// `SIM_MINUTES`
    pub(crate) minutes: u64,
    /// `SIM_SEED`: to be replayed.
    pub(crate) seed: Option<u64>,
    /// `SIM_SEEDS`: how many are run.
    pub(crate) seeds: u64,
    /// `SIM_FIRST`: the first of those.
    pub(crate) first: u64,
    /// `SIM_BUGS`: whether a whole run plants every bug in its turn.
    pub(crate) bugs: bool,
    /// `SIM_PLANTED`
    pub(crate) planted: Option<Bug>,
    /// `SIM_AGAIN`
    pub(crate) again: Option<Tune>,
    /// `SIM_FAULT`: judged where the runs are known.
    pub(crate) fault: Option<String>,
}

impl Settings {
    /// Reads them, or says what is wrong with one.
    pub(crate) fn read() -> Result<Self, String> {
        let debug = cfg!(debug_assertions);
        let bugs = planted::ALL.iter().map(|bug| (format!("{bug:?}"), *bug));
        let again = world::REGRESSIONS.iter().map(|(name, tune)| ((*name).to_owned(), *tune));
        let settings = Self {
            minutes: number("SIM_MINUTES")?.unwrap_or(MINUTES),
            seed: number("SIM_SEED")?,
            seeds: number("SIM_SEEDS")?.unwrap_or(if debug { 12 } else { 5000 }),
            first: number("SIM_FIRST")?.unwrap_or(1),
            bugs: number("SIM_BUGS")?.map_or(!debug, |bugs| bugs != 0),
            planted: named("SIM_PLANTED", bugs)?,
            again: named("SIM_AGAIN", again)?,
            fault: text("SIM_FAULT"),
        };
        if settings.seeds == 0 {
            return Err("SIM_SEEDS=0: nothing would be run".to_owned());
        }
        if settings.minutes == 0 || settings.minutes > MOST_MINUTES {
            return Err(format!("SIM_MINUTES: expected 1 to {MOST_MINUTES}"));
        }
        if settings.again.is_some() && settings.seed.is_none() {
            return Err("SIM_AGAIN needs SIM_SEED, a whole number from 0".to_owned());
        }
        Ok(settings)
    }
}

fn text(name: &str) -> Option<String> {
    env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

fn number(name: &str) -> Result<Option<u64>, String> {
    let Some(text) = text(name) else { return Ok(None) };
    let wrong = |_| format!("{name}={text}: expected a whole number from 0");
    text.parse().map(Some).map_err(wrong)
}

fn named<T>(name: &str, known: impl Iterator<Item = (String, T)>) -> Result<Option<T>, String> {
    let Some(text) = text(name) else { return Ok(None) };
    let mut names = Vec::new();
    for (known, value) in known {
        if known == text {
            return Ok(Some(value));
        }
        names.push(known);
    }
    Err(format!("{name}={text}: expected one of\n    {}", names.join("\n    ")))
}

/// What replays the seed that found a bug.
pub(crate) fn command(bug: Bug, seed: u64, minutes: u64) -> String {
    let length = if minutes == MINUTES { String::new() } else { format!(" SIM_MINUTES={minutes}") };
    format!("SIM_PLANTED={bug:?} SIM_SEED={seed}{length}")
}
