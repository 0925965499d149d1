//! A value whose changes can be waited for.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::lock;

/// A value behind a lock, and those who wait until it has changed. Where the
/// threads of a pipeline wait for it, so that the tests' world can stand in.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Watched<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Mutex::new(value), changed: Condvar::new() }
    }

    #[inline]
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        lock(&self.value)
    }

    /// Everybody who waits looks again.
    pub(crate) fn notify_all(&self) {
        self.changed.notify_all();
    }

    /// Gives the lock up until the next change.
    pub(crate) fn wait<'w>(&'w self, value: MutexGuard<'w, T>) -> MutexGuard<'w, T> {
        self.changed.wait(value).unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the lock up until the next change, or for `time`.
    pub(crate) fn wait_timeout<'w>(
        &'w self,
        value: MutexGuard<'w, T>,
        time: Duration,
    ) -> MutexGuard<'w, T> {
        self.changed.wait_timeout(value, time).unwrap_or_else(PoisonError::into_inner).0
    }
}
