//! The crate's `io/`, on a virtual clock.

#[path = "../../src/io/dial.rs"]
pub(crate) mod dial;
#[path = "../../src/io/feed.rs"]
pub(crate) mod feed;
#[path = "../../src/io/frame.rs"]
pub(crate) mod frame;
#[path = "../../src/io/poll.rs"]
pub(crate) mod poll;
#[path = "../../src/io/socket.rs"]
pub(crate) mod socket;
#[path = "../../src/io/target.rs"]
pub(crate) mod target;
#[path = "../../src/io/tls.rs"]
pub(crate) mod tls;
#[path = "../../src/io/upgrade.rs"]
pub(crate) mod upgrade;
pub(crate) mod websocket;

/// Stands in for `io/clock.rs`.
pub(crate) mod clock {
    use std::time::{Duration, Instant, SystemTime};

    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Clock(());

    impl Clock {
        pub(crate) fn real() -> Self {
            Self(())
        }

        pub(crate) fn now(self) -> Instant {
            crate::kernel::instant()
        }

        pub(crate) fn after(self, wait: Duration) -> Instant {
            use crate::planted::{Bug, planted};
            let wait = if planted(Bug::LateClock) { wait * 3 } else { wait };
            self.now() + wait.min(Duration::from_secs(10 * 365 * 24 * 60 * 60))
        }

        pub(crate) fn wall(self) -> SystemTime {
            Self::wall_at(crate::kernel::elapsed().as_nanos() as u64)
        }

        pub(crate) fn wall_at(nanos: u64) -> SystemTime {
            let start = Duration::from_secs(1_700_000_000);
            SystemTime::UNIX_EPOCH + start + Duration::from_nanos(nanos)
        }
    }
}
