//! The crate's `threads/held.rs`, in a shell that can carry a planted bug.

use super::queue::{self, Queue};
use crate::kernel::with;
use crate::planted::{Bug, planted};
#[path = "../../../src/threads/held.rs"]
mod real;
pub(crate) use real::{Held, Left, MAX_HELD};

#[derive(Debug, Default)]
pub(crate) struct Estate(real::Estate);

impl Estate {
    pub(crate) fn take(&self) -> Left {
        let mut left = self.0.take();
        if planted(Bug::HeldLostWithItsThread) {
            left.held = Held::default();
        }
        if planted(Bug::QuietLostWithItsThread) {
            left.quiet = false;
        }
        left
    }

    pub(crate) fn offer(&self, queue: &Queue) -> (usize, bool) {
        if planted(Bug::HeldUntilTheNextThread) {
            return (0, false);
        }
        self.0.offer(queue)
    }

    pub(crate) fn leave(&self, left: Left) -> Result<(), Held> {
        if !left.held.is_empty() {
            with(|k| k.fault("thread ends with blocks held"));
        }
        self.0.leave(left)
    }

    pub(crate) fn close(&self) -> Held {
        self.0.close()
    }
}
