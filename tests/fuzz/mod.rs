//! Fuzz targets: what comes from outside is taken in or refused, and never
//! panics. Compiled into the crate's own tests, for they look at its inside.
//!
//! As plain tests they run the corpus and then mutations of it, for a fraction of
//! a second; README.md, beside this file, says how to run them longer, guided by
//! coverage, and what to do with a find.

#![cfg_attr(fuzzing, allow(dead_code, reason = "words are for the fuzzer of this folder"))]

#[cfg(not(fuzzing))]
mod mutate;

mod frames;
mod pointer;
mod retry_after;
#[cfg(feature = "testing")]
mod settings;
mod upgrade;

/// A test that runs a target, and words that its inputs are likely to have.
macro_rules! target {
    ($name:ident, $run:path, $words:expr) => {
        #[test]
        fn $name() {
            #[cfg(fuzzing)]
            bolero::check!().for_each(|input| $run(input));
            #[cfg(not(fuzzing))]
            mutate::smoke(stringify!($name), $run, $words);
        }
    };
}

target!(bytes_from_a_server, frames::run, frames::WORDS);
target!(answers_to_an_upgrade, upgrade::run, upgrade::WORDS);
target!(retry_after_values, retry_after::run, retry_after::WORDS);
target!(json_pointers, pointer::run, pointer::WORDS);
#[cfg(feature = "testing")]
target!(client_settings, settings::client, settings::WORDS);
#[cfg(feature = "testing")]
target!(pipeline_settings, settings::pipeline, settings::WORDS);

/// Takes decisions out of an input, byte by byte; zeros behind its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    #[cfg(feature = "testing")]
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, as many as there are of `count`.
    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }
}
