//! The crate's `threads/pipeline/inbox.rs`, in a shell that can carry a planted
//! bug.

use std::collections::VecDeque;
use std::ops::Deref;

use super::{Tick, lock};
use crate::kernel::chance;
use crate::planted::{Bug, planted};
#[path = "../../../../src/threads/pipeline/inbox.rs"]
mod real;

#[derive(Debug)]
pub(crate) struct Inbox<T>(real::Inbox<T>);

impl<T> Inbox<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self(real::Inbox::new(capacity))
    }

    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        self.0.push(item)?;
        if planted(Bug::ItemUntold) && chance(0.02) {
            let _ = self.0.filled.receiver.try_recv();
        }
        Ok(())
    }

    pub(crate) fn pass_on_room(&self) {
        if !planted(Bug::RoomNotPassedOn) {
            self.0.pass_on_room();
        }
    }

    pub(crate) fn take(&self, room: VecDeque<T>) -> VecDeque<T> {
        let taken = self.0.take(room);
        if planted(Bug::RoomUntold) && chance(0.05) {
            let _ = self.0.room.receiver.try_recv();
        }
        taken
    }
}

impl<T> Deref for Inbox<T> {
    type Target = real::Inbox<T>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}
