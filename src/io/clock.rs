//! The one place that reads the time.

use std::time::{Duration, Instant, SystemTime};

/// Stands for never: far beyond a program's life, and well within `Instant`.
const FAR: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Tells the time: monotonic for every decision, wall-clock only to read the
/// date form of `Retry-After`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(());

impl Clock {
    pub(crate) fn real() -> Self {
        Self(())
    }

    #[allow(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn now(self) -> Instant {
        Instant::now()
    }

    /// `wait` from now; a wait beyond all time ends in ten years.
    pub(crate) fn after(self, wait: Duration) -> Instant {
        self.now() + wait.min(FAR)
    }

    #[allow(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn wall(self) -> SystemTime {
        SystemTime::now()
    }
}
