//! What users implement and hand in: [`Session`] with its [`Link`], and the
//! [`Request`] a connection is opened with.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tungstenite::{Bytes, Utf8Bytes};

use crate::error::{BoxError, Error};
use crate::message::Payload;

/// How many messages one call of a session hook may send.
pub(crate) const MAX_SENDS: usize = 4096;

/// The user's protocol on one socket: opening messages, decoding, skipping.
///
/// A fresh one is made for each epoch by the factory given to
/// [`ClientBuilder::session`](crate::ClientBuilder::session), so it starts with
/// no memory of an earlier socket; what to resume from is in
/// [`Link::resume`]. Its methods run on the connection's thread: they should
/// not block. An error or a panic ends the epoch, is reported, and the
/// connection reconnects with its back-off.
///
/// ```
/// use broadsock::{BoxError, Data, Link, Session};
///
/// /// Logs in, waits for the server's word, then passes everything on.
/// #[derive(Default)]
/// struct Login {
///     confirmed: bool,
/// }
///
/// impl Session for Login {
///     fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
///         link.send(r#"{"op":"login","token":"..."}"#);
///         link.hold();
///         Ok(())
///     }
///
///     fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
///         if self.confirmed {
///             link.emit(data);
///         } else if data.text() == Some("welcome") {
///             self.confirmed = true;
///             link.ready();
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait Session: Send {
    /// The socket is open. Messages sent here leave before any that programs
    /// queued. The connection is ready, and counted as a success, when this
    /// returns, or after [`Link::hold`] when [`Link::ready`] is called.
    ///
    /// # Errors
    ///
    /// An error ends the epoch; it is recoverable.
    fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        let _ = link;
        Ok(())
    }

    /// A data message arrived. Each [`Link::emit`] passes one on; emitting
    /// nothing skips the message. The default passes everything on.
    ///
    /// # Errors
    ///
    /// An error ends the epoch; it is recoverable.
    fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.emit(data);
        Ok(())
    }

    /// How often [`on_heartbeat`](Session::on_heartbeat) runs while the
    /// connection is ready; asked once, after `on_open`. Default: never.
    fn heartbeat_interval(&self) -> Option<Duration> {
        None
    }

    /// The place to send an application-level heartbeat. Whatever the server
    /// answers counts as a sign of life, and can be skipped in `on_message`.
    ///
    /// # Errors
    ///
    /// An error ends the epoch; it is recoverable.
    fn on_heartbeat(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        let _ = link;
        Ok(())
    }
}

/// The session that passes everything on: what a client has without its own.
#[derive(Debug, Default, Clone, Copy)]
pub struct PassOn;

impl Session for PassOn {}

/// A data message as the session sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data<'a> {
    /// A text message.
    Text(&'a str),
    /// A binary message.
    Binary(&'a [u8]),
}

/// What a session acts through: its socket, and the way to the consumers.
pub struct Link<'a> {
    pub(crate) origin: Origin<'a>,
    pub(crate) resume: Option<&'a Resume>,
    pub(crate) acts: &'a mut Acts,
    pub(crate) sink: &'a mut dyn Sink,
}

/// Facts of the socket that a session may ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) connection: usize,
    pub(crate) epoch: u64,
    pub(crate) subprotocol: Option<&'a str>,
    pub(crate) headers: &'a [(String, String)],
}

/// What a session hook asked for, carried out after it returns.
#[derive(Debug, Default)]
pub(crate) struct Acts {
    pub(crate) sends: Vec<Outgoing>,
    /// As many of these may come of the hook that runs, and of those before it; one
    /// more is kept, to tell that it was too many.
    most_sends: usize,
    pub(crate) hold: bool,
    pub(crate) ready: bool,
    pub(crate) healthy: bool,
}

/// What was asked for before a hook began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark {
    sends: usize,
    hold: bool,
    ready: bool,
    healthy: bool,
}

impl Acts {
    /// A hook begins, behind others; how far these came.
    #[inline]
    pub(crate) fn begin(&mut self) -> Mark {
        let Self { sends, hold, ready, healthy, .. } = self;
        self.most_sends = sends.len() + MAX_SENDS;
        Mark { sends: sends.len(), hold: *hold, ready: *ready, healthy: *healthy }
    }

    /// Whether the hook that runs has asked for more than it may.
    #[inline]
    pub(crate) fn are_too_many(&self) -> bool {
        self.sends.len() > self.most_sends
    }

    /// The hook that began here failed: what it asked for is not to be done.
    pub(crate) fn go_back(&mut self, to: Mark) {
        let Mark { sends, hold, ready, healthy } = to;
        self.sends.truncate(sends);
        (self.hold, self.ready, self.healthy) = (hold, ready, healthy);
    }
}

/// Where emitted messages go.
pub(crate) trait Sink {
    fn emit(&mut self, payload: Payload<'_>, id: Option<&[u8]>);
}

/// Where the previous epoch of a connection ended: what a session can ask a
/// server to resume from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resume {
    /// The epoch that received the last message.
    pub epoch: u64,
    /// That message's sequence number in its epoch.
    pub sequence: u64,
    /// The id found in that message, as the server wrote it; `None` without
    /// dedup, or when no id was found.
    pub id: Option<Vec<u8>>,
}

impl<'a> Data<'a> {
    /// The text of a text message.
    #[must_use]
    pub fn text(self) -> Option<&'a str> {
        match self {
            Data::Text(text) => Some(text),
            Data::Binary(_) => None,
        }
    }

    /// The bytes of either kind.
    #[must_use]
    pub fn as_bytes(self) -> &'a [u8] {
        match self {
            Data::Text(text) => text.as_bytes(),
            Data::Binary(bytes) => bytes,
        }
    }
}

impl<'a> From<&'a str> for Data<'a> {
    fn from(text: &'a str) -> Self {
        Data::Text(text)
    }
}

impl<'a> From<&'a [u8]> for Data<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Data::Binary(bytes)
    }
}

impl Payload<'_> {
    /// The payload as a session sees it.
    pub(crate) fn data(&self) -> Data<'_> {
        match self {
            Payload::Text(text) => Data::Text(text),
            Payload::Binary(bytes) => Data::Binary(bytes),
            Payload::OwnedText(text) => Data::Text(text),
            Payload::OwnedBinary(bytes) => Data::Binary(bytes),
        }
    }
}

impl<'a> From<Data<'a>> for Payload<'a> {
    fn from(data: Data<'a>) -> Self {
        match data {
            Data::Text(text) => Payload::Text(text),
            Data::Binary(bytes) => Payload::Binary(bytes),
        }
    }
}

impl Link<'_> {
    /// Sends a message on this socket, before anything that programs queued.
    /// One call of a hook may send 4,096 messages; more ends the epoch.
    pub fn send(&mut self, message: impl Into<Outgoing>) {
        // One above the limit is kept, so that the connection sees the excess.
        if self.acts.sends.len() <= self.acts.most_sends {
            self.acts.sends.push(message.into());
        }
    }

    /// Passes a message on to the consumers. Its id is found as the client's
    /// dedup setting says.
    pub fn emit<'d>(&mut self, data: impl Into<Data<'d>>) {
        self.sink.emit(data.into().into(), None);
    }

    /// Passes a message on with the id that dedup is to use for it.
    pub fn emit_with_id<'d>(&mut self, data: impl Into<Data<'d>>, id: &[u8]) {
        self.sink.emit(data.into().into(), Some(id));
    }

    /// In `on_open`: the connection is not ready before [`ready`](Link::ready)
    /// is called. The connect deadline covers this wait.
    pub fn hold(&mut self) {
        self.acts.hold = true;
    }

    /// Ends the wait that [`hold`](Link::hold) began.
    pub fn ready(&mut self) {
        self.acts.ready = true;
    }

    /// The connection is healthy from now on, however short it has been up: a
    /// loss starts the back-off over (otherwise that takes `stable_after`).
    pub fn mark_healthy(&mut self) {
        self.acts.healthy = true;
    }

    /// The connection's number, from 0.
    #[must_use]
    pub fn connection(&self) -> usize {
        self.origin.connection
    }

    /// The socket's number within the connection, from 1.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.origin.epoch
    }

    /// The subprotocol the server agreed on.
    #[must_use]
    pub fn subprotocol(&self) -> Option<&str> {
        self.origin.subprotocol
    }

    /// In `on_open`: a header of the server's upgrade response, by its name in
    /// any case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.origin.headers.iter();
        headers.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The last message the connection received before this epoch.
    #[must_use]
    pub fn resume(&self) -> Option<&Resume> {
        self.resume
    }
}

impl fmt::Debug for Link<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("connection", &self.origin.connection)
            .field("epoch", &self.origin.epoch)
            .finish_non_exhaustive()
    }
}

/// A message to send: text or binary.
///
/// Made from `&str`, `String`, `&[u8]` and `Vec<u8>` by `Into`. `Debug` never
/// shows the payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Outgoing(pub(crate) Body, pub(crate) OnlyIn);

/// The epoch outside of which a message must not be sent; `None`: any will do.
/// Kept with the message, so that it holds wherever the message waits.
pub(crate) type OnlyIn = Option<u64>;

/// Both kinds are reference counted, so that a message can be kept until the
/// kernel has all of it without a copy.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Body {
    Text(Utf8Bytes),
    Binary(Bytes),
}

impl Outgoing {
    /// A text message.
    pub fn text(text: impl Into<String>) -> Self {
        Self(Body::Text(text.into().into()), None)
    }

    /// A binary message.
    pub fn binary(bytes: impl Into<Vec<u8>>) -> Self {
        Self(Body::Binary(bytes.into().into()), None)
    }

    /// A binary message whose bytes stay where they are: in a buffer of a pool, in
    /// a memory map, in an `Arc<[u8]>` that many connections send. Nothing is copied
    /// to hand it over.
    ///
    /// `owner` is asked for its bytes once, and dropped when nothing needs them any
    /// more. That is, for a message that a [`Sender`](crate::Sender) took and that was
    /// sent, when the operating system has taken all of it; for one that a session
    /// sends, when it is in the write buffer; for one of an epoch that is over
    /// ([`try_send_in`](crate::Sender::try_send_in)), when that ends; for an opening
    /// message, with the client and the last of its senders. A message that comes
    /// back, in a [`SendError`](crate::SendError) or as unsent after a close, has it still, and
    /// so has a clone. It happens on one of the client's threads, mostly: `Drop` must
    /// not block, and what it sends through senders of that client does not wait, as in
    /// a hook; through those of another, use [`try_send`](crate::Sender::try_send). A
    /// panic in it is contained and logged.
    ///
    /// # Panics
    ///
    /// If `owner` does when it is asked.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use broadsock::Outgoing;
    ///
    /// let shared: Arc<[u8]> = Arc::from(&b"to all of them"[..]);
    /// let messages = [(); 3].map(|()| Outgoing::from_owner(Arc::clone(&shared)));
    /// assert!(messages.iter().all(|message| message.as_bytes() == &*shared));
    /// ```
    pub fn from_owner(owner: impl AsRef<[u8]> + Send + 'static) -> Self {
        Self(Body::Binary(Bytes::from_owner(Owner(Some(owner)))), None)
    }

    /// The text, of a text message.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match &self.0 {
            Body::Text(text) => Some(text.as_str()),
            Body::Binary(_) => None,
        }
    }

    /// The payload's bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Body::Text(text) => text.as_bytes(),
            Body::Binary(bytes) => bytes,
        }
    }

    /// Length of the payload in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.as_bytes().len()
    }

    /// Whether the payload is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What keeps a message's bytes. The last handle of it may be dropped anywhere.
struct Owner<T>(Option<T>);

impl<T: AsRef<[u8]>> AsRef<[u8]> for Owner<T> {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref().map_or(&[], T::as_ref)
    }
}

impl<T> Drop for Owner<T> {
    fn drop(&mut self) {
        let owner = self.0.take();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(owner))) {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a word");
            log::error!(target: "broadsock", "the owner of a message's bytes panicked: {text}");
            // Its own drop may panic, too.
            std::mem::forget(panic);
        }
    }
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("text", &self.as_text().is_some())
            .field("len", &self.len())
            .finish()
    }
}

impl From<&str> for Outgoing {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

impl From<String> for Outgoing {
    fn from(text: String) -> Self {
        Self::text(text)
    }
}

impl From<&[u8]> for Outgoing {
    fn from(bytes: &[u8]) -> Self {
        Self::binary(bytes)
    }
}

impl From<Vec<u8>> for Outgoing {
    fn from(bytes: Vec<u8>) -> Self {
        Self::binary(bytes)
    }
}

/// Where to connect and what to ask for: URL, headers, subprotocols.
///
/// The request hook returns one for each attempt. `Debug` shows neither header
/// values nor the URL's query.
#[derive(Clone, PartialEq, Eq)]
pub struct Request {
    pub(crate) url: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) subprotocols: Vec<String>,
}

/// What a request hook may want to know of the attempt it is called for.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Attempt {
    /// The connection's number, from 0.
    pub connection: usize,
    /// The epoch the attempt will be, from 1.
    pub epoch: u64,
    /// How many attempts in a row have failed before it.
    pub failures: u32,
    /// Why the last attempt or connection ended.
    pub last_error: Option<Error>,
}

impl Request {
    /// A request to `url`, which is `ws://` or `wss://`.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), headers: Vec::new(), subprotocols: Vec::new() }
    }

    /// Adds a header to the upgrade request.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Offers a subprotocol; the server must then agree on one of those offered.
    #[must_use]
    pub fn subprotocol(mut self, name: impl Into<String>) -> Self {
        self.subprotocols.push(name.into());
        self
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Request")
            .field("url", &without_secrets(&self.url))
            .field("headers", &names)
            .field("subprotocols", &self.subprotocols)
            .finish()
    }
}

/// A URL without query, fragment and user name.
fn without_secrets(url: &str) -> String {
    let plain = url.split(['?', '#']).next().unwrap_or_default();
    match plain.rsplit_once('@') {
        Some((_, host)) => format!("...@{host}"),
        None => plain.to_owned(),
    }
}

impl From<&str> for Request {
    fn from(url: &str) -> Self {
        Self::new(url)
    }
}

impl From<String> for Request {
    fn from(url: String) -> Self {
        Self::new(url)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_hook_may_send_its_share_and_what_a_failed_one_asked_for_is_taken_back() {
        struct Nowhere;
        impl Sink for Nowhere {
            fn emit(&mut self, _: Payload<'_>, _: Option<&[u8]>) {}
        }
        let origin = Origin { connection: 0, epoch: 1, subprotocol: None, headers: &[] };
        let mut acts = Acts::default();
        let send = |acts: &mut Acts, count: usize| {
            let before = acts.begin();
            let mut link = Link { origin, resume: None, acts, sink: &mut Nowhere };
            (0..count).for_each(|_| link.send("x"));
            link.ready();
            before
        };
        for share in 1..=3 {
            send(&mut acts, MAX_SENDS);
            assert!(!acts.are_too_many() && acts.sends.len() == share * MAX_SENDS);
        }
        acts.ready = false;
        let before = send(&mut acts, MAX_SENDS + 5);
        assert!(acts.are_too_many() && acts.ready);
        assert_eq!(acts.sends.len(), 4 * MAX_SENDS + 1, "the excess is not kept");
        acts.go_back(before);
        assert!(!acts.ready && !acts.hold && acts.sends.len() == 3 * MAX_SENDS);
    }

    #[test]
    fn a_panic_of_an_owner_is_contained() {
        struct Bomb;
        impl AsRef<[u8]> for Bomb {
            fn as_ref(&self) -> &[u8] {
                b"boom"
            }
        }
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("boom");
            }
        }
        let messages = [Bomb, Bomb].map(Outgoing::from_owner);
        assert_eq!(messages[1].as_bytes(), b"boom");
        drop(messages);
    }

    #[test]
    fn debug_output_hides_header_values_queries_and_payloads() {
        let request = Request::new("wss://host/path?token=hush").header("Authorization", "hush");
        let shown = format!("{request:?} {:?}", Outgoing::from("hush"));
        assert!(!shown.contains("hush"), "{shown}");
        assert!(!format!("{:?}", Request::new("ws://me:hush@h/")).contains("hush"));
        assert!(shown.contains("wss://host/path") && shown.contains("Authorization"));
    }
}
