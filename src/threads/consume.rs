//! The consumers' side of the queue: messages out of blocks that several
//! threads share.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, TryRecvError, never, select};

use super::queue::{NoMessage, Queue};
use crate::message::{Block, Message};

impl Queue {
    /// The next message, from a block some consumer has opened or a new one;
    /// waits until `until`, or for ever.
    pub(crate) fn recv(&self, until: Option<Instant>) -> Result<Message, NoMessage> {
        self.wait(until, Self::next_opened)
    }

    /// The next messages, at least one and up to `most`; waits for ever.
    pub(crate) fn recv_some(&self, most: usize) -> Result<Block, NoMessage> {
        self.wait(None, |queue| queue.some_opened(most))
    }

    /// The next message if there is one; `Timeout` means none yet.
    pub(crate) fn try_recv(&self) -> Result<Message, NoMessage> {
        self.try_take(&Self::next_opened)
    }

    /// The next messages if there are any, up to `most`; `Timeout` means none yet.
    pub(crate) fn try_recv_some(&self, most: usize) -> Result<Block, NoMessage> {
        self.try_take(&|queue: &Self| queue.some_opened(most))
    }

    /// Takes back what a consumer has not used, before all else.
    pub(crate) fn give_back(&self, block: Block) {
        if !block.is_empty() {
            self.opened().push_front(block);
            self.nudge_if_wanted(true);
        }
    }

    /// Waits until there may be a message, or `stop` disconnects; `false` when
    /// there will be none.
    pub(crate) fn wait_ready(&self, stop: &Receiver<()>) -> bool {
        self.waiting.fetch_add(1, SeqCst);
        // Looked at after it counts as waiting: who opens a block later nudges.
        let ready = !self.opened().is_empty() || self.wait_block(stop);
        self.waiting.fetch_sub(1, SeqCst);
        ready
    }

    fn wait_block(&self, stop: &Receiver<()>) -> bool {
        select! {
            recv(self.receiver) -> block => match block {
                Ok(block) => {
                    self.open(block);
                    true
                }
                Err(_) => !self.opened().is_empty(),
            },
            recv(self.nudge.1) -> _ => true,
            recv(stop) -> _ => true,
        }
    }

    fn wait<T>(
        &self,
        until: Option<Instant>,
        take: impl Fn(&Self) -> Option<T>,
    ) -> Result<T, NoMessage> {
        match self.try_take(&take) {
            Err(NoMessage::Timeout) => {}
            known => return known,
        }
        self.waiting.fetch_add(1, SeqCst);
        let taken = self.wait_counted(until, &take);
        self.waiting.fetch_sub(1, SeqCst);
        taken
    }

    fn wait_counted<T>(
        &self,
        until: Option<Instant>,
        take: &impl Fn(&Self) -> Option<T>,
    ) -> Result<T, NoMessage> {
        let timeout = until.map_or_else(never, crossbeam_channel::at);
        loop {
            match self.try_take(take) {
                Err(NoMessage::Timeout) => {}
                known => return known,
            }
            select! {
                recv(self.receiver) -> block => if let Ok(block) = block {
                    self.open(block);
                },
                recv(self.nudge.1) -> _ => {}
                recv(timeout) -> _ => return self.try_take(take),
            }
        }
    }

    fn try_take<T>(&self, take: &impl Fn(&Self) -> Option<T>) -> Result<T, NoMessage> {
        if let Some(taken) = take(self) {
            return Ok(taken);
        }
        match self.receiver.try_recv() {
            Ok(block) => {
                self.open(block);
                take(self).ok_or(NoMessage::Timeout)
            }
            Err(TryRecvError::Empty) => Err(NoMessage::Timeout),
            // Another consumer may have opened the last block just now.
            Err(TryRecvError::Disconnected) => take(self).ok_or(NoMessage::Ended),
        }
    }

    fn open(&self, block: Block) {
        self.opened().push_back(block);
    }

    fn next_opened(&self) -> Option<Message> {
        let mut opened = self.opened();
        let message = opened.front_mut()?.next();
        let finished =
            if opened.front().is_some_and(Block::is_empty) { opened.pop_front() } else { None };
        let more = !opened.is_empty();
        drop(opened);
        // Tells the books, and perhaps wakes a reader: not under the lock.
        drop(finished);
        self.nudge_if_wanted(more);
        message
    }

    fn some_opened(&self, most: usize) -> Option<Block> {
        let mut opened = self.opened();
        let front = opened.front_mut()?;
        let taken =
            if front.len() <= most { opened.pop_front() } else { Some(front.split_front(most)) };
        let more = !opened.is_empty();
        drop(opened);
        self.nudge_if_wanted(more);
        taken
    }

    /// Wakes another consumer if one waits and there is something for it.
    fn nudge_if_wanted(&self, more: bool) {
        if more && self.waiting.load(SeqCst) > 0 {
            let _ = self.nudge.0.try_send(());
        }
    }

    pub(super) fn opened(&self) -> MutexGuard<'_, VecDeque<Block>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
