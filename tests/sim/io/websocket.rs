//! The crate's `io/websocket.rs`, in a shell that can carry a planted bug.

use super::{feed, poll, socket};
use crate::kernel::{Kernel, with};
use crate::planted::{Bug, planted};
#[path = "../../../src/io/websocket.rs"]
mod real;
use crate::error::Error;
use crate::handler::Outgoing;
use crate::message::{BlockBuilder, Payload};
use crate::server;
use poll::{Poller, Ready};
pub(crate) use real::{Incoming, Limits, Sent};
use socket::{Socket, Stream};

#[derive(Debug)]
pub(crate) struct Websocket(real::Websocket<Stream>, Vec<Outgoing>, Turn);

/// What a thread does with a socket between two flushes: a turn.
#[derive(Debug, Default)]
struct Turn {
    read: usize,
    sent: usize,
    /// When the outbox sent last.
    sent_at: Option<u64>,
}

/// Messages that a turn sends at most.
const TURN: usize = 256;

/// Messages that a turn reads at most while somebody sends.
const LOOK: usize = 64;

/// Who sent so lately is taken to send again.
const LATELY: u64 = 100_000_000;

impl Turn {
    fn over(&mut self) {
        (self.read, self.sent) = (0, 0);
    }

    fn sends(&mut self) {
        self.sent += 1;
        self.sent_at = Some(with(|k| k.now));
        if self.sent > TURN {
            with(|k| k.broken("turn-bounded", || format!("{} sent in one", self.sent)));
        }
    }

    fn reads_run(&mut self, most: usize) {
        let lately = |k: &Kernel| self.sent_at.is_some_and(|at| k.now < at + LATELY);
        with(|k| {
            if most > k.ck.setup.block || most > LOOK && lately(k) {
                k.broken("turn-bounded", || format!("up to {most} are read in one"));
            }
        });
    }

    fn reads(&mut self) {
        self.read += 1;
        with(|k| {
            if self.read > k.ck.setup.block {
                k.broken("turn-bounded", || format!("{} read in one", self.read));
            }
        });
    }
}

/// A panic that nothing contains: it ends the thread, with a block half built.
fn may_panic() {
    if with(|k| server::strikes(k, "reader panics", |rates| rates.panic)) {
        panic!("planned panic of a reader");
    }
}

impl Websocket {
    pub(crate) fn new(stream: Stream, rest: Vec<u8>, limits: Limits) -> Self {
        Self(real::Websocket::new(stream, rest, limits), Vec::new(), Turn::default())
    }

    pub(crate) fn read(
        &mut self,
        data: impl FnOnce(Payload<'_>),
    ) -> Result<Option<Incoming>, Error> {
        may_panic();
        let read = self.0.read(|payload| {
            data(payload);
            with(|k| k.ck.shown += 1);
        });
        if matches!(read, Ok(Some(_))) {
            self.2.reads();
        }
        read
    }

    pub(crate) fn read_run(
        &mut self,
        most: usize,
        block: &mut BlockBuilder,
        first: u64,
    ) -> Result<bool, Error> {
        self.2.reads_run(most);
        may_panic();
        let read = self.0.read_run(most, block, first);
        with(|k| k.ck.shown += block.len() as u64);
        read
    }

    pub(crate) fn show_run(
        &mut self,
        most: usize,
        mut show: impl FnMut(Payload<'_>) -> bool,
    ) -> (usize, Result<bool, Error>) {
        self.0.show_run(most, |payload| {
            may_panic();
            let goes_on = show(payload);
            with(|k| k.ck.shown += 1);
            goes_on
        })
    }

    pub(crate) fn shrink(&mut self) {
        self.0.shrink();
    }

    pub(crate) fn abandon(&mut self) {
        self.0.abandon();
    }

    pub(crate) fn send(&mut self, message: &Outgoing) -> Result<Sent, Error> {
        let sent = self.0.send(message)?;
        if sent == Sent::Queued {
            self.2.sends();
        }
        if planted(Bug::FinishedSentAgain) && self.1.len() < 3 {
            self.1.push(message.clone());
        }
        if planted(Bug::WrittenTwice) && crate::kernel::chance(0.05) {
            return self.0.send(message);
        }
        Ok(sent)
    }

    pub(crate) fn send_once(&mut self, message: &Outgoing) -> Result<Sent, Error> {
        self.0.send_once(message)
    }

    pub(crate) fn ping(&mut self, payload: Vec<u8>) -> Result<Sent, Error> {
        if planted(Bug::PongMissing) {
            return Ok(Sent::Queued);
        }
        self.0.ping(payload)
    }

    pub(crate) fn flush(&mut self) -> Result<bool, Error> {
        self.2.over();
        self.0.flush()
    }

    pub(crate) fn has_room(&self) -> bool {
        self.0.has_room()
    }

    pub(crate) fn take_unfinished(&mut self) -> Vec<Outgoing> {
        let unfinished = self.0.take_unfinished();
        if planted(Bug::UnfinishedForgotten) {
            return Vec::new();
        }
        if planted(Bug::FinishedSentAgain) {
            return std::mem::take(&mut self.1);
        }
        unfinished
    }

    pub(crate) fn close(&mut self, code: u16, reason: &str) -> Result<(), Error> {
        self.0.close(code, reason)
    }

    pub(crate) fn on_ready(&mut self, ready: Ready) -> bool {
        self.0.on_ready(ready)
    }

    pub(crate) fn socket(&self) -> &Socket {
        self.0.socket()
    }

    pub(crate) fn release(self, poller: &mut Poller) {
        if planted(Bug::SocketNotReleased) {
            std::mem::forget(self);
            return;
        }
        self.0.release(poller);
    }
}
