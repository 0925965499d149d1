//! A small fuzzer for the stable compiler: it mutates what is in the corpus, and
//! knows nothing of coverage.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use std::{env, fs};

use crate::io::clock::Clock;

/// How long a target runs if `FUZZ_SECONDS` does not say.
const SHORT: Duration = Duration::from_millis(200);

/// What inputs grow to.
const LONGEST: usize = 4096;

/// Runs `target` on its corpus, and then on mutations of it for a while.
pub(super) fn smoke(name: &str, target: fn(&[u8]), words: &[&[u8]]) {
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "the corpus of {name} is not found");
    for (path, input) in &corpus {
        attempt(target, input, || format!("{} fails", path.display()));
    }
    let seed = number("FUZZ_SEED").unwrap_or_else(|| {
        let since = Clock::real().wall().duration_since(SystemTime::UNIX_EPOCH);
        since.unwrap_or_default().as_nanos() as u64
    });
    let inputs = corpus.into_iter().map(|(_, input)| input).collect();
    let mut mutator = Mutator { random: Random(seed), inputs, words };
    let length = number("FUZZ_SECONDS").map_or(SHORT, Duration::from_secs);
    let end = Clock::real().after(length);
    let mut count = 0_u64;
    while Clock::real().now() < end {
        let input = mutator.input();
        attempt(target, &input, || {
            let kept = env::temp_dir().join(format!("broadsock-{name}"));
            let kept = fs::write(&kept, &input)
                .map_or_else(|e| e.to_string(), |()| format!("the input is in {}", kept.display()));
            format!("{name} fails (seed {seed}) on \"{}\"; {kept}", input.escape_ascii())
        });
        count += 1;
    }
    println!("{name}: {count} inputs in {length:?}, seed {seed}");
}

/// Runs the target; says more about a panic of it.
fn attempt(target: fn(&[u8]), input: &[u8], tell: impl FnOnce() -> String) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        println!("{}", tell());
        resume_unwind(panic);
    }
}

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    // A seed stands for one run: the order must not depend on the disk.
    paths.sort();
    let read = |path: PathBuf| fs::read(&path).ok().map(|input| (path, input));
    paths.into_iter().filter_map(read).collect()
}

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok()?.parse().ok()
}

struct Mutator<'a> {
    random: Random,
    inputs: Vec<Vec<u8>>,
    words: &'a [&'a [u8]],
}

impl Mutator<'_> {
    /// One of the corpus, changed in a few places.
    fn input(&mut self) -> Vec<u8> {
        let mut input = self.any_input();
        for _ in 0..1 << self.random.below(4) {
            self.change(&mut input);
        }
        input.truncate(LONGEST);
        input
    }

    fn any_input(&mut self) -> Vec<u8> {
        let at = self.random.below(self.inputs.len());
        self.inputs[at].clone()
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let at = self.random.below(input.len() + 1);
        let end = at + self.random.below((input.len() - at).min(64) + 1);
        match self.random.below(8) {
            0 if at < input.len() => input[at] ^= 1 << self.random.below(8),
            1 if at < input.len() => input[at] = self.random.byte(),
            2 => _ = input.splice(at..at, [self.random.byte()]),
            3 => _ = input.drain(at..end),
            4 => input.extend_from_within(at..end),
            // A number that is written in decimal or in bytes.
            5 => {
                let number =
                    [0, 1, 125, 126, 127, 255, 65_535, 65_536, u64::MAX][self.random.below(9)];
                let digits = number.to_string().into_bytes();
                let bytes = number.to_be_bytes()[self.random.below(8)..].to_vec();
                _ = input.splice(at..end, if self.random.below(2) == 0 { digits } else { bytes });
            }
            // What stands elsewhere in the corpus.
            6 => {
                let other = self.any_input();
                let from = self.random.below(other.len() + 1);
                let to = from + self.random.below(other.len() - from + 1);
                _ = input.splice(at..end, other[from..to].iter().copied());
            }
            _ => {
                let word = self.words[self.random.below(self.words.len())];
                _ = input.splice(at..at, word.iter().copied());
            }
        }
    }
}

/// SplitMix64: enough for this, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `end - 1`.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn byte(&mut self) -> u8 {
        self.below(256) as u8
    }
}
