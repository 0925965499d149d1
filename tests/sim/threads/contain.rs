//! The crate's `threads/contain.rs`, in a shell that can carry a planted bug.

use crate::kernel::chance;
use crate::planted::{Bug, planted};
#[path = "../../../src/threads/contain.rs"]
mod real;
pub(crate) use real::{Kill, Killed, contained, panic_message, panic_text, tell_backoff_panic};

pub(crate) fn contained_user<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    if planted(Bug::PanicEscapes) && chance(0.05) {
        return Ok(run());
    }
    real::contained_user(run)
}
