//! The crate's `logic/backoff.rs`, in a shell that can carry a planted bug.

use crate::planted::{Bug, planted};
#[path = "../../../src/logic/backoff.rs"]
mod real;
use crate::error::{Error, ErrorKind};
pub(crate) use real::{Backoff, Jitter, Retry};
use std::time::Duration;

pub(crate) fn retry_delay(
    backoff: &Backoff,
    retry: &Retry<'_>,
    cap: Duration,
    random: f64,
) -> Duration {
    let plain = Error::new(ErrorKind::Connect, "");
    let http = matches!(retry.error.kind(), ErrorKind::Http { .. });
    let closed = matches!(retry.error.kind(), ErrorKind::Closed { .. });
    if planted(Bug::RetryAfterIgnored) && http || planted(Bug::CloseCodeDelayIgnored) && closed {
        let retry = Retry { error: &plain, ..*retry };
        return real::retry_delay(backoff, &retry, cap, random);
    }
    if planted(Bug::RetriedAtOnce) && matches!(retry.error.kind(), ErrorKind::Handler) {
        return Duration::ZERO;
    }
    let delay = real::retry_delay(backoff, retry, cap, random);
    if planted(Bug::BackOffBeyondItsCap) && retry.attempt > 5 { delay * 3 } else { delay }
}
