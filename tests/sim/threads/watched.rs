//! Stands in for `threads/watched.rs`.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use super::lock;
use crate::kernel::{self, with};
use crate::planted::{Bug, planted};

#[derive(Debug)]
pub(crate) struct Watched<T> {
    value: Mutex<T>,
    waiting: Mutex<Vec<usize>>,
}

impl<T> Watched<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Mutex::new(value), waiting: Mutex::default() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        lock(&self.value)
    }

    pub(crate) fn notify_all(&self) {
        kernel::preempt();
        if planted(Bug::LostChange) && kernel::chance(0.05) {
            return;
        }
        self.waiting.lock().unwrap().drain(..).for_each(kernel::wake);
    }

    pub(crate) fn wait<'w>(&'w self, value: MutexGuard<'w, T>) -> MutexGuard<'w, T> {
        self.park(value, None)
    }

    pub(crate) fn wait_timeout<'w>(
        &'w self,
        value: MutexGuard<'w, T>,
        time: Duration,
    ) -> MutexGuard<'w, T> {
        let until = with(|k| k.now + time.as_nanos() as u64);
        self.park(value, Some(until))
    }

    fn park<'w>(&'w self, value: MutexGuard<'w, T>, until: Option<u64>) -> MutexGuard<'w, T> {
        let task = kernel::current();
        self.waiting.lock().unwrap().push(task);
        drop(value);
        kernel::park(until);
        self.waiting.lock().unwrap().retain(|other| *other != task);
        self.lock()
    }
}
