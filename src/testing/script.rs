//! What a server does on one connection: a [`Script`], step by step.

use std::fmt;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::time::Duration;

use super::feed::Feed;
use super::frame;
use super::record::Payload;
use super::upgrade::{Upgrade, response};

/// Makes the text of the n-th message.
pub(super) type Make = Shared<dyn Fn(u64) -> String + Send + Sync>;
pub(super) type Matches = Shared<dyn Fn(&Payload) -> bool + Send + Sync>;

/// A closure that scripts share, and that `Debug` can pass over.
pub(super) struct Shared<F: ?Sized>(pub(super) Arc<F>);

impl<F: ?Sized> Clone for Shared<F> {
    fn clone(&self) -> Self {
        Shared(Arc::clone(&self.0))
    }
}

impl<F: ?Sized> fmt::Debug for Shared<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

#[derive(Debug, Clone)]
pub(super) enum Step {
    Refuse,
    Silent,
    SilentInTls,
    Respond { bytes: Vec<u8>, then_leave: bool },
    Upgrade(Upgrade),
    Write(Vec<u8>),
    Bytewise(Vec<u8>, Duration),
    Flood { first: u64, end: u64, make: Make },
    Repeat { bytes: Vec<u8>, times: u64 },
    Feed { feed: Feed, at_most: u64 },
    Pause(Duration),
    PingEvery(Duration),
    AnswerPings(bool),
    Read(bool),
    IgnoreClose,
    Expect(Matches),
    Echo,
    Close { code: u16, reason: String },
    Cut,
    CutMidFrame(Vec<u8>),
    Fin,
    HalfOpen,
    Hold,
}

/// What the server does on one connection, from the TCP accept on: steps,
/// taken in order.
///
/// While a step waits or sends, the connection goes on reading: it records
/// what arrives, answers pings and the client's close frame. Steps after an
/// *ending* ([`refuse`](Self::refuse), [`silent`](Self::silent),
/// [`status`](Self::status), [`redirect`](Self::redirect),
/// [`echo`](Self::echo), [`close`](Self::close), [`cut`](Self::cut),
/// [`fin`](Self::fin), [`half_open`](Self::half_open),
/// [`hold`](Self::hold)) are never reached; a script without an ending ends
/// with `hold`.
///
/// ```
/// use broadsock::testing::{Script, Server};
///
/// let server = Server::script([Script::new().upgrade().send("a").close(1001, "bye")]).start()?;
/// let (mut ws, _) = tungstenite::connect(server.url())?;
/// assert_eq!(ws.read()?, "a".into());
/// assert!(ws.read()?.is_close());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use = "a script does nothing until a server runs it"]
pub struct Script {
    steps: Vec<Step>,
}

/// Before the upgrade, and instead of it.
impl Script {
    /// A script of no steps: accepts TCP and then holds.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Whether a step wants what arrived before it.
    pub(super) fn looks_back(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Expect(_) | Step::Echo))
    }

    fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Ending: RST right after the accept. For a port that refuses TCP, see
    /// [`Server::stop`](super::Server::stop).
    pub fn refuse(self) -> Self {
        self.then(Step::Refuse)
    }

    /// Ending: says nothing any more, to the upgrade request, to pings, to a
    /// close frame, and stays until the client leaves. Reads all the time.
    pub fn silent(self) -> Self {
        self.then(Step::Silent)
    }

    /// Ending: accepts TCP and never answers the TLS handshake.
    pub fn silent_in_tls(self) -> Self {
        self.then(Step::SilentInTls)
    }

    /// Ending: answers the upgrade request with this status and headers.
    pub fn status<'a>(
        self,
        code: u16,
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        self.status_with_body(code, headers, "")
    }

    /// The same with a body.
    pub fn status_with_body<'a>(
        self,
        code: u16,
        headers: impl IntoIterator<Item = (&'a str, &'a str)>,
        body: &str,
    ) -> Self {
        self.then(Step::Respond { bytes: response(code, headers, body), then_leave: true })
    }

    /// Ending: 302 to that location, absolute or relative.
    pub fn redirect(self, location: &str) -> Self {
        self.status(302, [("Location", location)])
    }

    /// Answers the upgrade request with exactly these bytes and goes on; after
    /// a 101, what the client then sends is read as frames.
    pub fn raw_response(self, bytes: impl Into<Vec<u8>>) -> Self {
        self.then(Step::Respond { bytes: bytes.into(), then_leave: false })
    }

    /// Accepts the upgrade.
    pub fn upgrade(self) -> Self {
        self.upgrade_with(Upgrade::new())
    }

    /// Accepts the upgrade in an unusual way.
    pub fn upgrade_with(self, upgrade: Upgrade) -> Self {
        self.then(Step::Upgrade(upgrade))
    }

    /// Accepts the upgrade one byte at a time, each `delay` after the last.
    pub fn dribble(self, delay: Duration) -> Self {
        self.upgrade_with(Upgrade::new().dribble(delay))
    }
}

/// Sending.
impl Script {
    /// One text message.
    pub fn send(self, text: &str) -> Self {
        self.send_raw(frame::whole(frame::TEXT, text.as_bytes()))
    }

    /// Several text messages, in one write.
    pub fn send_all<T: AsRef<str>>(self, texts: impl IntoIterator<Item = T>) -> Self {
        let mut bytes = Vec::new();
        for text in texts {
            frame::push(frame::TEXT, true, text.as_ref().as_bytes(), &mut bytes);
        }
        self.send_raw(bytes)
    }

    /// One binary message.
    pub fn send_binary(self, bytes: impl AsRef<[u8]>) -> Self {
        self.send_raw(frame::whole(frame::BINARY, bytes.as_ref()))
    }

    /// These bytes as they are: frames that no server should send.
    pub fn send_raw(self, bytes: impl Into<Vec<u8>>) -> Self {
        self.then(Step::Write(bytes.into()))
    }

    /// One text message in `parts` frames.
    pub fn send_fragmented(self, text: &str, parts: usize) -> Self {
        self.send_raw(frame::fragmented(text, parts))
    }

    /// One text message, each byte of its frame in a write of its own, `delay`
    /// after the last. Pongs wait until the frame is whole.
    pub fn send_bytewise(self, text: &str, delay: Duration) -> Self {
        self.then(Step::Bytewise(frame::whole(frame::TEXT, text.as_bytes()), delay))
    }

    /// The text messages `make(n)` for each n of `range`, in writes of about
    /// 64 KiB, as fast as the client takes them: `flood(0..1000, ..)`, or
    /// `flood(0.., ..)` until one side leaves.
    pub fn flood(
        self,
        range: impl RangeBounds<u64>,
        make: impl Fn(u64) -> String + Send + Sync + 'static,
    ) -> Self {
        let first = match range.start_bound() {
            Bound::Included(n) => *n,
            Bound::Excluded(n) => n.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(n) => n.saturating_add(1),
            Bound::Excluded(n) => *n,
            Bound::Unbounded => u64::MAX,
        };
        self.then(Step::Flood { first, end, make: Shared(Arc::new(make)) })
    }

    /// The text messages `{"id":n}` for each n of `range`. Two scripts with
    /// overlapping ranges replay what they have in common.
    pub fn numbers(self, range: impl RangeBounds<u64>) -> Self {
        self.flood(range, |n| format!("{{\"id\":{n}}}"))
    }

    /// These text messages, `times` times over, from one buffer made
    /// beforehand: the fastest flood, for benchmarks.
    pub fn repeat<T: AsRef<str>>(self, texts: impl IntoIterator<Item = T>, times: u64) -> Self {
        let mut bytes = Vec::new();
        for text in texts {
            frame::push(frame::TEXT, true, text.as_ref().as_bytes(), &mut bytes);
        }
        self.then(Step::Repeat { bytes, times })
    }

    /// Up to `at_most` new messages of a [`Feed`] that connections share,
    /// after the replay of the last ones if this connection has not had it.
    pub fn feed(self, feed: &Feed, at_most: u64) -> Self {
        self.then(Step::Feed { feed: feed.clone(), at_most })
    }

    /// One ping.
    pub fn ping(self, payload: impl AsRef<[u8]>) -> Self {
        self.send_raw(frame::whole(frame::PING, payload.as_ref()))
    }

    /// `times` empty pings, in large writes.
    pub fn ping_flood(self, times: u64) -> Self {
        self.then(Step::Repeat { bytes: frame::whole(frame::PING, b""), times })
    }

    /// From here on, a ping at that interval.
    pub fn ping_every(self, interval: Duration) -> Self {
        self.then(Step::PingEvery(interval))
    }
}

/// Waiting, and how the connection behaves meanwhile.
impl Script {
    /// Waits that long.
    pub fn pause(self, length: Duration) -> Self {
        self.then(Step::Pause(length))
    }

    /// Waits until that text message arrives, passing over others.
    pub fn expect(self, text: &str) -> Self {
        let text = text.to_owned();
        self.expect_that(move |payload| matches!(payload, Payload::Text(t) if *t == text))
    }

    /// Waits for a message or control frame that meets a condition. Each
    /// expectation begins behind what met the last one; the client's close
    /// frame ends the script and meets none.
    pub fn expect_that(self, met: impl Fn(&Payload) -> bool + Send + Sync + 'static) -> Self {
        self.then(Step::Expect(Shared(Arc::new(met))))
    }

    /// From here on, pings are recorded and not answered.
    pub fn ignore_pings(self) -> Self {
        self.then(Step::AnswerPings(false))
    }

    /// From here on, pings are answered again.
    pub fn answer_pings(self) -> Self {
        self.then(Step::AnswerPings(true))
    }

    /// From here on, nothing is read: the receive window fills and the
    /// client's writes block. A small
    /// [`receive_buffer`](super::ServerBuilder::receive_buffer) makes that quick.
    pub fn stop_reading(self) -> Self {
        self.then(Step::Read(false))
    }

    /// From here on, what arrives is read again.
    pub fn resume_reading(self) -> Self {
        self.then(Step::Read(true))
    }

    /// From here on, the client's close frame is recorded and not answered,
    /// and TCP stays open until the client closes it.
    pub fn ignore_close(self) -> Self {
        self.then(Step::IgnoreClose)
    }
}

/// Endings.
impl Script {
    /// Ending: sends each data message back, until the client leaves; also
    /// those that came before this step and met no expectation.
    pub fn echo(self) -> Self {
        self.then(Step::Echo)
    }

    /// Ending: close frame, then up to 5 s for the client's answer, then FIN.
    /// The code 1005 sends a close frame without a code.
    pub fn close(self, code: u16, reason: &str) -> Self {
        self.then(Step::Close { code, reason: reason.to_owned() })
    }

    /// Ending: RST, once what was sent before has left, or after 5 s.
    pub fn cut(self) -> Self {
        self.then(Step::Cut)
    }

    /// Ending: the first half of a text message's frame, then RST.
    pub fn cut_mid_frame(self, text: &str) -> Self {
        let mut bytes = frame::whole(frame::TEXT, text.as_bytes());
        bytes.truncate(bytes.len().div_ceil(2));
        self.then(Step::CutMidFrame(bytes))
    }

    /// Ending: FIN without a close frame; then reads until the client closes.
    pub fn fin(self) -> Self {
        self.then(Step::Fin)
    }

    /// Ending: neither reads nor writes any more, with the socket open, until
    /// the client gives up.
    pub fn half_open(self) -> Self {
        self.then(Step::HalfOpen)
    }

    /// Ending: stays open, reads, answers pings, until the client leaves.
    pub fn hold(self) -> Self {
        self.then(Step::Hold)
    }
}
