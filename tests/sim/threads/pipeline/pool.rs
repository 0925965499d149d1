//! The crate's `threads/pipeline/pool.rs`, in a shell that can carry a planted
//! bug.

use std::ops::Deref;
use std::sync::{Arc, Mutex};

use super::chunk::{self, Chunk, End, Run};
use super::{lock, stats};
use crate::kernel::chance;
use crate::planted::{Bug, planted};
use crate::work::{Failure, Ticket};
#[path = "../../../../src/threads/pipeline/pool.rs"]
mod real;

#[derive(Debug)]
pub(crate) struct Pool {
    real: real::Pool,
    shells: Mutex<Vec<Arc<Slot>>>,
}

#[derive(Debug)]
pub(crate) struct Slot(Arc<real::Slot>);

impl Pool {
    pub(crate) fn new(prefix: String, count: usize, has_batches: bool) -> Self {
        Self { real: real::Pool::new(prefix, count, has_batches), shells: Mutex::default() }
    }

    /// The same shell around the same slot each time.
    pub(crate) fn slots(&self) -> Vec<Arc<Slot>> {
        let slots = self.real.slots();
        let mut shells = self.shells.lock().unwrap();
        shells.retain(|shell| slots.iter().any(|slot| Arc::ptr_eq(slot, &shell.0)));
        let shell = |slot: Arc<real::Slot>| {
            let known = shells.iter().find(|shell| Arc::ptr_eq(&slot, &shell.0)).cloned();
            known.unwrap_or_else(|| {
                shells.push(Arc::new(Slot(slot)));
                shells[shells.len() - 1].clone()
            })
        };
        slots.into_iter().map(shell).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.real.len()
    }

    pub(crate) fn resize(&self, count: usize) {
        self.real.resize(count);
    }
}

impl Slot {
    pub(crate) fn fail(&self, chunk: &Chunk, row: usize, ticket: Ticket, failure: Failure) {
        if planted(Bug::FailureTakenForSuccess) && chance(0.1) {
            chunk.end(row, End::Done);
            return;
        }
        self.0.fail(chunk, row, ticket, failure);
    }

    pub(crate) fn take_finished(&self) -> (Vec<Run>, Vec<(Ticket, Failure)>) {
        let (mut succeeded, failed) = self.0.take_finished();
        if planted(Bug::SettledTwice) && chance(0.02) {
            let again =
                |run: &Run| Run { pulled: run.pulled.clone(), members: run.members.clone() };
            let more: Vec<Run> = succeeded.iter().map(again).collect();
            succeeded.extend(more);
        }
        if planted(Bug::FinishedButNotSettled) && chance(0.01) {
            succeeded.pop();
        }
        (succeeded, failed)
    }

    pub(crate) fn bury(&self, failure: impl Fn() -> Failure) {
        if !planted(Bug::DeadWorkersMessageForgotten) {
            self.0.bury(failure);
        }
        if planted(Bug::DeadWorkersRestDropped) {
            self.0.take_up(Chunk::again(Vec::new()));
        }
    }
}

impl Deref for Slot {
    type Target = real::Slot;

    fn deref(&self) -> &real::Slot {
        &self.0
    }
}
