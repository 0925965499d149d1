//! The one place that reads the time.

use std::time::{Instant, SystemTime};

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

    #[allow(clippy::disallowed_methods, reason = "this is the clock")]
    pub(crate) fn wall(self) -> SystemTime {
        SystemTime::now()
    }
}
