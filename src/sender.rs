//! [`Sender`]: messages into a connection, from any thread.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::WhileDown;
use crate::event::State;
use crate::handler::Outgoing;
use crate::threads::inbox::Refused;
use crate::threads::shared::Shared;

/// Sends messages on one connection, through however many sockets.
///
/// Cheap to clone, and usable from any thread: a message goes into the
/// connection's outbox and its thread is woken, so it leaves at once even
/// while the reader sleeps or floods. Messages leave in their order. Each is
/// kept until the kernel has all of it; what a lost socket did not take is
/// sent on the next one, so nothing is sent twice, and what had been given to
/// a lost socket may not have arrived.
#[derive(Clone)]
pub struct Sender {
    shared: Arc<Shared>,
    connection: usize,
    while_down: WhileDown,
}

/// A message that was not taken, and why.
#[derive(Clone, PartialEq, Eq)]
pub struct SendError {
    /// The message, handed back.
    pub message: Outgoing,
    /// Why it was not taken.
    pub reason: SendErrorReason,
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SendErrorReason {
    /// The outbox is full.
    Full,
    /// There is no connection, and the policy is not to queue.
    NotConnected,
    /// The time given to `send_timeout` passed.
    Timeout,
    /// It is larger than `max_message_size`.
    TooLarge,
    /// The client is closed or has failed.
    Closed,
    /// The epoch that it was meant for is over, or has not begun: only from
    /// [`Sender::try_send_in`].
    EpochOver,
}

impl Sender {
    pub(crate) fn new(shared: Arc<Shared>, connection: usize, while_down: WhileDown) -> Self {
        Self { shared, connection, while_down }
    }

    /// Puts a message into the outbox; waits while it is full, and, with
    /// [`WhileDown::Wait`], while there is no connection. On one of the
    /// client's own threads (in a hook) it does not wait, as
    /// [`try_send`](Sender::try_send).
    ///
    /// # Errors
    ///
    /// [`SendError`] hands the message back: the client is closed, the message
    /// is too large, or there is no connection under [`WhileDown::Reject`].
    pub fn send(&self, message: impl Into<Outgoing>) -> Result<(), SendError> {
        self.send_until(message.into(), None)
    }

    /// As [`send`](Sender::send), but waits no longer than `timeout`.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send), and when the time has passed.
    pub fn send_timeout(
        &self,
        message: impl Into<Outgoing>,
        timeout: Duration,
    ) -> Result<(), SendError> {
        let until = self.shared.clock.now().checked_add(timeout);
        self.send_until(message.into(), until)
    }

    /// Puts a message into the outbox if that needs no waiting.
    ///
    /// # Errors
    ///
    /// As [`send`](Sender::send), and when the outbox is full or, with
    /// [`WhileDown::Wait`], when there is no connection.
    pub fn try_send(&self, message: impl Into<Outgoing>) -> Result<(), SendError> {
        let message = self.check(message.into())?;
        if self.while_down != WhileDown::Queue && !self.is_connected() {
            return Err(SendError { message, reason: self.down() });
        }
        self.push(message)
    }

    /// Puts a message into the outbox for one epoch alone: it leaves on the
    /// socket of that [epoch](crate::Metadata::epoch), such as the one that
    /// delivered the message it answers, or never. If the epoch ends while the
    /// message still waits, it is discarded and counted in
    /// [`messages_discarded`](crate::ConnectionSnapshot::messages_discarded).
    /// One that the kernel had taken may or may not have arrived, as always.
    ///
    /// It does not wait, and [`WhileDown`] has no say in it.
    ///
    /// ```no_run
    /// # let client = broadsock::connect("wss://feed.example/stream")?;
    /// for message in &client {
    ///     let from = message.metadata();
    ///     if let Some(sender) = client.sender_for(from.connection) {
    ///         // On another socket, the server would not know what is meant.
    ///         let _ = sender.try_send_in(from.epoch, format!("ack {}", from.sequence));
    ///     }
    /// }
    /// # Ok::<(), broadsock::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`SendError`] hands the message back: the epoch is over or has not begun
    /// (`EpochOver`), the outbox is full, the message is too large, or the
    /// client is closed.
    pub fn try_send_in(&self, epoch: u64, message: impl Into<Outgoing>) -> Result<(), SendError> {
        let mut message = self.check(message.into())?;
        message.1 = Some(epoch);
        self.push(message)
    }

    /// Whether the connection stands right now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared.states.of(self.connection) == State::Connected
    }

    fn send_until(&self, message: Outgoing, until: Option<Instant>) -> Result<(), SendError> {
        if self.shared.spawner.is_own_thread() {
            return self.try_send(message);
        }
        let mut message = self.check(message)?;
        loop {
            if self.while_down != WhileDown::Queue && !self.wait_connected(until) {
                return Err(SendError { message, reason: self.down() });
            }
            match self.push(message) {
                Err(error) if error.reason == SendErrorReason::Full => {
                    let clock = self.shared.clock;
                    if !self.inbox().wait_room(error.message.len(), || clock.now(), until) {
                        return Err(SendError { reason: SendErrorReason::Timeout, ..error });
                    }
                    message = error.message;
                }
                done => return done,
            }
        }
    }

    fn wait_connected(&self, until: Option<Instant>) -> bool {
        if self.while_down == WhileDown::Wait {
            self.shared.states.wait(self.shared.clock, until, |states| {
                let state = states[self.connection];
                matches!(state, State::Connected | State::Closing | State::Closed)
                    || self.has_failed()
            });
        }
        self.is_connected()
    }

    /// Why a message cannot leave while there is no connection.
    fn down(&self) -> SendErrorReason {
        let state = self.shared.states.of(self.connection);
        let over = self.has_failed() || self.shared.states.ended();
        if over || matches!(state, State::Closed | State::Closing) {
            SendErrorReason::Closed
        } else {
            SendErrorReason::NotConnected
        }
    }

    /// A connection that failed may be restarted, unless its client has failed.
    fn has_failed(&self) -> bool {
        self.shared.ending().error.is_some()
    }

    fn check(&self, message: Outgoing) -> Result<Outgoing, SendError> {
        if message.len() > self.shared.policy.limits.max_message {
            return Err(SendError { message, reason: SendErrorReason::TooLarge });
        }
        Ok(message)
    }

    fn push(&self, message: Outgoing) -> Result<(), SendError> {
        self.inbox().push(message).map_err(|(refused, Outgoing(body, _))| {
            let message = Outgoing(body, None);
            let reason = match refused {
                Refused::Full => SendErrorReason::Full,
                Refused::Closed => SendErrorReason::Closed,
                Refused::EpochOver => SendErrorReason::EpochOver,
            };
            SendError { message, reason }
        })
    }

    fn inbox(&self) -> &crate::threads::inbox::Inbox {
        &self.shared.connections[self.connection].inbox
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("connection", &self.connection).finish_non_exhaustive()
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.reason {
            SendErrorReason::Full => "message not sent: the outbox is full",
            SendErrorReason::NotConnected => "message not sent: there is no connection",
            SendErrorReason::Timeout => "message not sent: no room in the outbox in time",
            SendErrorReason::TooLarge => "message not sent: it is larger than max_message_size",
            SendErrorReason::Closed => "message not sent: the client is closed",
            SendErrorReason::EpochOver => "message not sent: the epoch it was meant for is over",
        })
    }
}

impl fmt::Debug for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendError")
            .field("reason", &self.reason)
            .field("message", &self.message)
            .finish()
    }
}

impl std::error::Error for SendError {}
