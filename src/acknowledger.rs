//! [`SocketAcknowledger`]: answers on the socket that delivered.

use std::fmt;
use std::sync::Arc;

use crate::client::Client;
use crate::error::BoxError;
use crate::handler::Outgoing;
use crate::message::Message;
use crate::metrics::Counter;
use crate::sender::{SendErrorReason, Sender};
use crate::threads::contained_user;
use crate::work::{Acknowledger, Failed, Succeeded};

/// Answers each settled message on the connection and the epoch that delivered
/// it: for services that send a message again until it is acknowledged.
///
/// A function says what the answer is, if any. The answers of one group leave
/// in the order in which its messages were received. When the epoch is over, a
/// later socket would not know what the answer is about, so there is none; that
/// is no error, and counted in [`late`](SocketAcknowledger::late). A full outbox
/// is an error: the acknowledgement counts as failed, and is not tried again.
///
#[cfg_attr(feature = "testing", doc = "```")]
#[cfg_attr(not(feature = "testing"), doc = "```ignore")]
/// use std::time::Duration;
///
/// use broadsock::testing::{Script, Server};
/// use broadsock::{Client, Message, Outcome, Pipeline, SocketAcknowledger};
///
/// let server = Server::script([Script::new().upgrade().send_all(["1", "2", "x"])]).start()?;
/// let client = Client::builder(server.url()).start()?;
/// let acknowledger = SocketAcknowledger::new(&client, |outcome| match outcome {
///     Outcome::Succeeded(done) => Some(format!("ack {}", done.message)),
///     Outcome::Failed(failed) => Some(format!("nack {}", failed.message)),
/// });
/// let pipeline = Pipeline::each(|message: &Message| {
///     message.text().unwrap_or_default().parse::<u32>().map(drop)
/// })
/// .processors(1)
/// .source_with(client, acknowledger)
/// .start()?;
/// assert!(server.wait_for(|record| record.texts().count() == 3, Duration::from_secs(10)));
/// assert_eq!(server.texts(), ["ack 1", "ack 2", "nack x"]);
/// # drop(pipeline);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Clones share everything: keep one to read [`late`](SocketAcknowledger::late).
#[derive(Clone)]
pub struct SocketAcknowledger {
    shared: Arc<Shared>,
}

struct Shared {
    /// By connection.
    senders: Vec<Sender>,
    answer: Box<dyn Fn(Outcome<'_>) -> Option<Outgoing> + Send + Sync>,
    sent: Counter,
    late: Counter,
}

/// What became of a message.
#[derive(Debug, Clone, Copy)]
pub enum Outcome<'a> {
    /// It succeeded.
    Succeeded(&'a Succeeded),
    /// It failed for good.
    Failed(&'a Failed),
}

impl<'a> Outcome<'a> {
    /// The message.
    #[must_use]
    pub fn message(self) -> &'a Message {
        match self {
            Outcome::Succeeded(succeeded) => &succeeded.message,
            Outcome::Failed(failed) => &failed.message,
        }
    }

    /// The handler's word about it.
    #[must_use]
    pub fn tag(self) -> Option<&'a str> {
        match self {
            Outcome::Succeeded(succeeded) => succeeded.tag.as_deref(),
            Outcome::Failed(failed) => failed.tag.as_deref(),
        }
    }
}

impl SocketAcknowledger {
    /// Answers on the connections of `client`, which must be the source whose
    /// messages it acknowledges; `None` is no answer. The function runs on
    /// worker threads. It keeps no client alive.
    pub fn new<F, M>(client: &Client, answer: F) -> Self
    where
        F: Fn(Outcome<'_>) -> Option<M> + Send + Sync + 'static,
        M: Into<Outgoing>,
    {
        let senders = (0..client.states().len()).filter_map(|n| client.sender_for(n)).collect();
        let answer = Box::new(move |outcome: Outcome<'_>| answer(outcome).map(Into::into));
        let (sent, late) = (Counter::default(), Counter::default());
        Self { shared: Arc::new(Shared { senders, answer, sent, late }) }
    }

    /// Answers that got into an outbox. Those whose epoch ended before they left
    /// are counted in
    /// [`messages_discarded`](crate::ConnectionSnapshot::messages_discarded), too.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.shared.sent.get()
    }

    /// Answers that came too late: the epoch was over, or the client closed.
    #[must_use]
    pub fn late(&self) -> u64 {
        self.shared.late.get()
    }
}

impl Acknowledger for SocketAcknowledger {
    fn acknowledge(&self, succeeded: &[Succeeded], failed: &[Failed]) -> Result<(), BoxError> {
        let succeeded = succeeded.iter().map(Outcome::Succeeded);
        let mut outcomes: Vec<_> = succeeded.chain(failed.iter().map(Outcome::Failed)).collect();
        outcomes.sort_by_key(|outcome| {
            let from = outcome.message().metadata();
            (from.connection, from.epoch, from.sequence)
        });
        let all = outcomes.len();
        // One that cannot be answered must not keep the others back.
        let errors = outcomes.into_iter().filter_map(|outcome| self.shared.answer(outcome).err());
        let errors: Vec<String> = errors.collect();
        match errors.first() {
            None => Ok(()),
            Some(first) => Err(format!("{} of {all} not answered: {first}", errors.len()).into()),
        }
    }
}

impl Shared {
    fn answer(&self, outcome: Outcome<'_>) -> Result<(), String> {
        let answer = contained_user(|| (self.answer)(outcome));
        let answer = answer.map_err(|panic| format!("the answer panicked: {panic}"))?;
        let Some(answer) = answer else { return Ok(()) };
        let from = outcome.message().metadata();
        let Some(sender) = self.senders.get(from.connection) else {
            return Err(format!("connection {} is not one of the client's", from.connection));
        };
        match sender.try_send_in(from.epoch, answer) {
            Ok(()) => self.sent.add(1),
            Err(error) => match error.reason {
                SendErrorReason::EpochOver | SendErrorReason::Closed => self.late.add(1),
                _ => return Err(error.to_string()),
            },
        }
        Ok(())
    }
}

impl fmt::Debug for SocketAcknowledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketAcknowledger")
            .field("connections", &self.shared.senders.len())
            .field("sent", &self.sent())
            .field("late", &self.late())
            .finish()
    }
}
