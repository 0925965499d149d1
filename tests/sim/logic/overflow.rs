//! The crate's `logic/overflow.rs`, in a shell that can carry a planted bug.

use crate::planted::{Bug, planted};
#[path = "../../../src/logic/overflow.rs"]
mod real;
pub(crate) use real::{Decision, Overflow, Room};

pub(crate) fn decide(policy: Overflow, room: Room, len: usize, bytes: usize) -> Decision {
    if planted(Bug::NeverFull) {
        return Decision::Push;
    }
    let decision = real::decide(policy, room, len, bytes);
    match decision {
        Decision::Push if planted(Bug::HeldForEver) && len > 3 && policy == Overflow::Block => {
            Decision::Hold
        }
        Decision::DropOldest { .. } if planted(Bug::OldestNotDropped) => Decision::Push,
        _ => decision,
    }
}
