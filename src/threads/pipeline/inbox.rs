//! The bounded queue of a batcher's items, from many threads to one.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::{Tick, lock};
use crate::threads::timer::Alarm;

/// Items go in one by one, when their message is handled, and come out many at
/// a time: a channel would cost its receiver more than grouping does.
#[derive(Debug)]
pub(crate) struct Inbox<T> {
    items: Mutex<VecDeque<T>>,
    capacity: usize,
    /// It is empty no more.
    pub(crate) filled: Tick,
    /// It is full no more.
    pub(crate) room: Tick,
}

impl<T> Inbox<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        let (filled, room) = (Tick::new(), Tick::new());
        Self { items: Mutex::default(), capacity, filled, room }
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.items).len()
    }

    /// Puts an item in, or hands it back while there is no room.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let mut items = lock(&self.items);
        if items.len() >= self.capacity {
            return Err(item);
        }
        items.push_back(item);
        let is_first = items.len() == 1;
        drop(items);
        if is_first {
            self.filled.fire();
        }
        Ok(())
    }

    /// Of several that wait for room one is woken; it wakes the next.
    pub(crate) fn pass_on_room(&self) {
        if self.len() < self.capacity {
            self.room.fire();
        }
    }

    /// Takes all items, and leaves `room` for the next ones, which is empty.
    pub(crate) fn take(&self, room: VecDeque<T>) -> VecDeque<T> {
        let mut items = lock(&self.items);
        let was_full = items.len() >= self.capacity;
        let taken = std::mem::replace(&mut *items, room);
        drop(items);
        if was_full {
            self.room.fire();
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_so_many_and_says_when_there_are_some_and_when_there_is_room() {
        let inbox = Inbox::new(3);
        for n in 0..3 {
            assert_eq!(inbox.push(n), Ok(()));
        }
        assert_eq!(inbox.push(3), Err(3));
        assert!(inbox.filled.receiver.try_recv().is_ok() && inbox.filled.receiver.is_empty());
        assert!(inbox.room.receiver.is_empty());
        assert_eq!(inbox.take(VecDeque::new()), [0, 1, 2]);
        assert!(inbox.room.receiver.try_recv().is_ok());
        assert_eq!((inbox.push(4), inbox.filled.receiver.len()), (Ok(()), 1));
        assert!(inbox.filled.receiver.try_recv().is_ok());
        assert_eq!((inbox.push(5), inbox.filled.receiver.len()), (Ok(()), 0), "not empty before");
        inbox.pass_on_room();
        assert_eq!((inbox.room.receiver.len(), inbox.len()), (1, 2));
        assert_eq!(inbox.take(VecDeque::new()), [4, 5]);
        assert_eq!(inbox.room.receiver.len(), 1, "it was not full");
    }
}
