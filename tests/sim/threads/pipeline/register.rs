//! The crate's `threads/pipeline/register.rs`, in a shell that can carry a
//! planted bug.

use std::sync::Arc;
use std::time::Instant;

use super::chunk::{self, Member, Run};
use crate::kernel::chance;
use crate::message::Message;
use crate::metrics::PipelineLedger;
use crate::planted::{Bug, planted};
use crate::work::{Pulled, Ticket};
#[path = "../../../../src/threads/pipeline/register.rs"]
mod real;
pub(crate) use real::Claim;

#[derive(Debug, Default)]
pub(crate) struct Register(real::Register);

impl Register {
    pub(crate) fn accept(
        &mut self,
        now: Instant,
        source: usize,
        messages: Vec<Message>,
    ) -> Option<Arc<Pulled>> {
        self.0.accept(now, source, messages)
    }

    pub(crate) fn acknowledge(&mut self, ticket: &Ticket) -> bool {
        self.0.acknowledge(ticket)
    }

    pub(crate) fn is_acknowledged(&mut self, ticket: &Ticket) -> bool {
        self.0.is_acknowledged(ticket) && !planted(Bug::EarlyAcknowledgementForgotten)
    }

    pub(crate) fn claim(&mut self, ticket: &Ticket) -> Option<Claim> {
        self.0.claim(ticket)
    }

    pub(crate) fn claim_run(&mut self, run: &mut Run) -> Vec<Member> {
        if planted(Bug::SettledTwice) {
            return Vec::new();
        }
        self.0.claim_run(run)
    }

    pub(crate) fn settle(&mut self, run: &Run, success: bool) {
        if planted(Bug::RoomNeverGivenBack) && chance(0.01) {
            return;
        }
        self.0.settle(run, success);
    }

    pub(crate) fn close(&mut self) -> Vec<Message> {
        self.0.close()
    }

    pub(crate) fn ledger(&self) -> PipelineLedger {
        let mut ledger = self.0.ledger();
        if planted(Bug::RoomForTooMany) {
            ledger.in_flight = ledger.in_flight.saturating_sub(1);
        }
        ledger
    }

    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.0.oldest()
    }
}
