//! The crate's `logic/batch.rs`, in a shell that can carry a planted bug.

use crate::planted::{Bug, planted};
#[path = "../../../src/logic/batch.rs"]
mod real;
pub(crate) use real::*;
