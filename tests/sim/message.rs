//! The crate's messages, in a shell that can carry a planted bug.

use crate::kernel::with;
use crate::planted::{Bug, planted};
#[path = "../../src/message.rs"]
mod real;
use crate::block;
use crate::block::Run;
use crate::handler::Data;
pub(crate) use real::{Account, Block, Message, MessageId, Metadata, Payload};
use std::str::Utf8Error;
use std::time::Instant;

/// Bytes with which a block is full.
const FULL: usize = 256 * 1024;

pub(crate) struct BlockBuilder(block::BlockBuilder);

impl BlockBuilder {
    pub(crate) fn new(connection: usize, epoch: u64, at: Instant) -> Self {
        let epoch = if planted(Bug::WrongEpoch) { epoch.max(2) - 1 } else { epoch };
        Self(block::BlockBuilder::new(connection, epoch, at))
    }

    pub(crate) fn reserve(&mut self, messages: usize, bytes: usize) {
        self.0.reserve(messages, bytes);
    }

    pub(crate) fn text_bytes(&self) -> usize {
        self.0.text_bytes()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes()
    }

    pub(crate) fn push(&mut self, payload: Payload<'_>, sequence: u64, id: Option<MessageId>) {
        let wrong = planted(Bug::WrongOrder) && sequence % 50 == 0;
        self.0.push(payload, if wrong { sequence + 5 } else { sequence }, id);
    }

    pub(crate) fn adopt(&mut self, run: Run, first: u64) -> Result<(), Utf8Error> {
        let wrong = planted(Bug::WrongOrder) && first % 5 == 0;
        self.0.adopt(run, if wrong { first + 5 } else { first })
    }

    pub(crate) fn identify(&mut self, id: impl FnMut(Data<'_>) -> Option<MessageId>) {
        self.0.identify(id);
    }

    pub(crate) fn identify_bytes(&mut self, id: impl FnMut(bool, &[u8]) -> Option<MessageId>) {
        self.0.identify_bytes(id);
    }

    pub(crate) fn last(&self) -> Option<&[u8]> {
        self.0.last()
    }

    pub(crate) fn retain(&mut self, judge: impl FnMut(&[Option<MessageId>]) -> u64) {
        self.0.retain(judge);
    }

    pub(crate) fn finish(self) -> Block {
        let (len, bytes) = (self.len(), self.bytes());
        with(|k| {
            // The message that fills it may be of the largest size.
            let limit = (k.ck.setup.block, FULL + k.sv.max_message);
            // What a session emits at once stays together. A pipeline's sources make
            // blocks of what they are given.
            let reads = k.current_name().starts_with("broadsock-conn");
            if reads && (len > limit.0 || bytes > limit.1) {
                k.broken("block-bounded", || format!("{len} messages of {bytes} bytes"));
            }
        });
        self.0.finish()
    }
}

impl std::fmt::Debug for BlockBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
