//! The crate's `threads/pipeline/chunk.rs`, in a shell that can carry a planted
//! bug.

use std::ops::{Deref, Range};
use std::sync::Arc;

use super::lock;
use crate::kernel::chance;
use crate::planted::{Bug, planted};
use crate::work::{Pulled, Ticket};
#[path = "../../../../src/threads/pipeline/chunk.rs"]
mod real;
pub(crate) use real::{End, Member, Run};

#[derive(Debug)]
pub(crate) struct Chunk(real::Chunk);

impl Chunk {
    pub(crate) fn range(pulled: &Arc<Pulled>, places: Range<u32>) -> Self {
        Self(real::Chunk::range(pulled, places))
    }

    pub(crate) fn places(pulled: &Arc<Pulled>, mut places: Vec<u32>) -> Self {
        if planted(Bug::OvertakenInItsPartition) && chance(0.1) {
            places.reverse();
        }
        Self(real::Chunk::places(pulled, places))
    }

    pub(crate) fn again(tickets: Vec<Ticket>) -> Self {
        Self(real::Chunk::again(tickets))
    }

    pub(crate) fn ticket(&self, row: usize) -> Ticket {
        let mut ticket = self.0.ticket(row);
        if planted(Bug::RetriedForEver) {
            ticket.attempts = 1;
        }
        ticket
    }
}

impl Deref for Chunk {
    type Target = real::Chunk;

    fn deref(&self) -> &real::Chunk {
        &self.0
    }
}
