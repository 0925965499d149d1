//! The crate's `logic/heartbeat.rs`, in a shell that can carry a planted bug.

use crate::planted::{Bug, planted};
#[path = "../../../src/logic/heartbeat.rs"]
mod real;
use crate::kernel;
pub(crate) use real::{Beat, Cause, Heartbeat};
use std::time::Instant;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Liveness(real::Liveness);

impl Liveness {
    pub(crate) fn new(mut heartbeat: Heartbeat, now: Instant) -> Self {
        let never = std::time::Duration::from_secs(1_000_000_000);
        if planted(Bug::HalfOpenNeverDeclared) {
            heartbeat.pong_timeout = never;
        }
        if planted(Bug::StallNeverDeclared) {
            heartbeat.write_timeout = never;
        }
        Self(real::Liveness::new(heartbeat, now))
    }

    pub(crate) fn on_bytes(&mut self, now: Instant) {
        self.0.on_bytes(now);
        if planted(Bug::PingsHideADeadFeed) {
            self.0.on_data(now);
        }
    }

    pub(crate) fn on_data(&mut self, now: Instant) {
        self.0.on_data(now);
    }

    pub(crate) fn on_write_blocked(&mut self, now: Instant) {
        self.0.on_write_blocked(now);
    }

    pub(crate) fn on_write_progress(&mut self, now: Instant) {
        self.0.on_write_progress(now);
    }

    pub(crate) fn on_write_clear(&mut self) {
        if planted(Bug::SendingPostponesTheVerdict) {
            self.0.on_bytes(kernel::instant());
        }
        self.0.on_write_clear();
    }

    pub(crate) fn pause(&mut self, now: Instant) {
        if !planted(Bug::DeadWhilePaused) {
            self.0.pause(now);
        }
    }

    pub(crate) fn resume(&mut self, now: Instant) {
        if !planted(Bug::ResumeForgotten) {
            self.0.resume(now);
        }
    }

    pub(crate) fn on_time(&mut self, now: Instant) -> Option<Beat> {
        if planted(Bug::DueAndNothingDone) && kernel::chance(0.7) {
            return None;
        }
        self.0.on_time(now)
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.0.deadline()
    }
}
