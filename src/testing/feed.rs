//! An at-least-once feed that goes on from connection to connection.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::script::{Make, Shared};

/// Messages numbered from 0 that go out once each, whichever connection takes
/// them, with the last few replayed to each new connection: what an
/// at-least-once service does to a client that reconnects. Clones share it.
///
/// No message is lost as long as a connection does not send more new ones than
/// the feed replays.
///
/// ```
/// use broadsock::testing::{Feed, Script, Server};
///
/// let feed = Feed::new(6, |n| n.to_string()).replay(2);
/// let server = Server::script([Script::new().upgrade().feed(&feed, 3).close(1001, "")]).start()?;
/// let mut seen = Vec::new();
/// for _ in 0..2 {
///     let (mut ws, _) = tungstenite::connect(server.url())?;
///     while let Ok(tungstenite::Message::Text(text)) = ws.read() {
///         seen.push(text.to_string());
///     }
/// }
/// assert_eq!(seen, ["0", "1", "2", "1", "2", "3", "4", "5"]);
/// assert_eq!(feed.handed_out(), 6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a feed does nothing until scripts share it"]
pub struct Feed {
    next: Arc<Mutex<u64>>,
    total: u64,
    replay: u64,
    pub(super) make: Make,
}

impl Feed {
    /// A feed of `total` text messages, the n-th of which is `make(n)`.
    pub fn new(total: u64, make: impl Fn(u64) -> String + Send + Sync + 'static) -> Self {
        Feed { next: Arc::default(), total, replay: 0, make: Shared(Arc::new(make)) }
    }

    /// How many of the last messages a new connection gets again. Defaults to 0.
    pub fn replay(mut self, last: u64) -> Self {
        self.replay = last;
        self
    }

    /// How many different messages have been sent so far.
    pub fn handed_out(&self) -> u64 {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn again(&self) -> Range<u64> {
        let next = self.handed_out();
        next.saturating_sub(self.replay)..next
    }

    pub(super) fn take(&self, at_most: u64) -> Range<u64> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let first = *next;
        *next = first.saturating_add(at_most).min(self.total);
        first..*next
    }
}
