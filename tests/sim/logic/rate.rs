//! The crate's `logic/rate.rs`, in a shell that can carry a planted bug.

use crate::planted::{Bug, planted};
#[path = "../../../src/logic/rate.rs"]
mod real;
pub(crate) use real::*;
