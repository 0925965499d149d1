//! What a pipeline wants of `client.rs`, over the world's client.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use crate::kernel::{self, with};
use crate::message::{Block, Message, MessageId};
use crate::metrics::Report;
use crate::threads::shared::Shared;

pub(crate) struct Client {
    shared: Arc<Shared>,
    ended: Receiver<()>,
}

impl Client {
    pub(crate) fn new(shared: Arc<Shared>, ended: Receiver<()>) -> Self {
        Self { shared, ended }
    }

    pub(crate) fn wait_ready(&self, stop: &Receiver<()>) -> bool {
        self.shared.queue.wait_ready(stop)
    }

    pub(crate) fn try_recv_some(&self, most: usize) -> Option<Block> {
        self.shared.queue.try_recv_some(most).ok()
    }

    pub(crate) fn settled(&self, ids: &mut dyn Iterator<Item = MessageId>, success: bool) {
        self.shared.queue.settled(ids, success);
    }

    pub(crate) fn complete(&self, message: &Message) {
        self.settled(&mut message.id().into_iter(), true);
    }

    pub(crate) fn forget(&self, message: &Message) {
        self.settled(&mut message.id().into_iter(), false);
    }

    pub(crate) fn stop_reading(&self) {
        with(|k| {
            k.note(|| "the client stops reading".to_owned());
            k.ck.reads_no_more.get_or_insert(k.now);
        });
        let peers = self.shared.connections.iter();
        peers.for_each(|peer| peer.inbox.post(|signals| signals.stop_reading = true));
    }

    pub(crate) fn close(&self, deadline: Duration) -> Report {
        let at = kernel::instant() + deadline;
        with(|k| {
            k.note(|| format!("the pipeline closes its client within {deadline:?}"));
            k.ck.is_closed_by(k.now + deadline.as_nanos() as u64);
            k.ck.in_haste |= deadline < Duration::from_millis(10);
        });
        self.shared.connections.iter().for_each(|peer| peer.inbox.refuse());
        self.shared.ask_to_close(at - (deadline / 10).min(Duration::from_millis(20)));
        if self.ended.recv_deadline(at) == Err(RecvTimeoutError::Timeout) {
            self.shared.end();
        }
        let ending = self.shared.ending();
        let (stuck, unsent) = (ending.stuck.clone(), ending.unsent.clone());
        let error = ending.error.clone();
        drop(ending);
        Report { metrics: self.shared.snapshot(), error, stuck, unsent }
    }
}
