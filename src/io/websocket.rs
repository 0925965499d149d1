//! The WebSocket on a stream: tungstenite, with its traps handled.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use tungstenite::error::ProtocolError;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode};
use tungstenite::{Bytes, Error as WsError, Message as WsMessage, Utf8Bytes};

use super::feed::{Feed, Next};
use super::poll::{Poller, Ready};
use super::socket::{Socket, Stream};
use crate::error::{Error, ErrorKind};
use crate::handler::{Body, Outgoing};
use crate::message::{BlockBuilder, Payload};

/// Frames gather up to this size before they are written without a flush.
const WRITE_BUFFER: usize = 64 * 1024;

/// tungstenite reads control frames and fragments only, out of a larger buffer.
const CONTROL_BUFFER: usize = 256;

/// tungstenite takes the memory for a frame on the word of its head: what it is to
/// read, which is no whole message, may not be longer, however large messages may
/// be. The allocation would end the process.
const MAX_FRAGMENT: usize = 1 << 30;

/// Bytes of pongs that may wait for a server that does not read; of the pings
/// behind them, the last one is answered (RFC 6455, section 5.5.3).
const MAX_PONGS: u64 = 64 * 1024;

/// Size limits of one WebSocket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) read_buffer: usize,
    /// Of messages both ways.
    pub(crate) max_message: usize,
}

/// An open WebSocket on a non-blocking stream.
#[derive(Debug)]
pub(crate) struct Websocket<S = Stream> {
    ws: tungstenite::WebSocket<Feed<S>>,
    /// Bytes of the frames queued here and of pongs; a close frame, which
    /// nothing follows, is not in it.
    produced: u64,
    /// How many of the bytes that wait are pongs, at most.
    pongs: u64,
    /// The payload of the last ping that is not answered yet, because there are
    /// too many pongs before it.
    late: Option<Bytes>,
    /// Messages of the outbox that the kernel may not have whole, each with
    /// the value of `produced` at its end.
    unfinished: VecDeque<(u64, Outgoing)>,
    /// Whether something may wait for a flush.
    dirty: bool,
}

/// What was read.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// A data message, which was shown to the function given.
    Data,
    Ping,
    Pong(Bytes),
    /// The server closes; its code, 1005 if it gave none, and its reason.
    Close {
        code: u16,
        reason: String,
    },
}

/// What became of a message given to [`Websocket::send`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Queued,
    /// There is no room before a flush; the message was not taken.
    Full,
}

impl<S: Read + Write> Websocket<S> {
    /// Takes over a stream after its upgrade; `rest` was read behind the head.
    pub(crate) fn new(stream: S, rest: Vec<u8>, limits: Limits) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(CONTROL_BUFFER)
            .write_buffer_size(WRITE_BUFFER)
            // One message of the largest size fits behind a full buffer.
            .max_write_buffer_size(limits.max_message.saturating_add(2 * WRITE_BUFFER))
            .max_message_size(Some(limits.max_message))
            .max_frame_size(Some(limits.max_message.min(MAX_FRAGMENT)));
        let feed = Feed::new(stream, rest, limits.read_buffer, limits.max_message);
        let ws = tungstenite::WebSocket::from_raw_socket(feed, Role::Client, Some(config));
        Self { ws, produced: 0, pongs: 0, late: None, unfinished: VecDeque::new(), dirty: false }
    }

    /// Reads whole messages into an empty block, up to `most`, the first of them
    /// number `first`; `false` when the socket has no more. A block that stays
    /// empty says that [`read`](Self::read) must find out what comes. What was
    /// read before an error is in the block.
    pub(crate) fn read_run(
        &mut self,
        most: usize,
        block: &mut BlockBuilder,
        first: u64,
    ) -> Result<bool, Error> {
        let feed = self.ws.get_mut();
        let found = feed.find_run(most);
        if !feed.run_is_empty() {
            block.adopt(feed.take_run(), first).map_err(not_utf8)?;
        }
        more(found)
    }

    /// Reads whole messages, up to `most`, and shows each to `show` until that says
    /// `false`; the rest of them is lost then. How many were shown, and `false` when
    /// the socket has no more. Where none was, [`read`](Self::read) must find out
    /// what comes. What was read before an error is shown.
    pub(crate) fn show_run(
        &mut self,
        most: usize,
        mut show: impl FnMut(Payload<'_>) -> bool,
    ) -> (usize, Result<bool, Error>) {
        let feed = self.ws.get_mut();
        let found = feed.find_run(most);
        let (from, bytes, entries) = feed.run();
        // What lies between texts is text too: one look will do for all of them.
        let all =
            entries.iter().all(|entry| entry.is_text()).then(|| simdutf8::basic::from_utf8(bytes));
        for (shown, entry) in entries.iter().enumerate() {
            let range = entry.range().start - from..entry.range().end - from;
            let payload = match &all {
                Some(Ok(texts)) => Payload::Text(&texts[range]),
                _ if entry.is_text() => match utf8(&bytes[range]) {
                    Ok(text) => Payload::Text(text),
                    Err(error) => return (shown, Err(error)),
                },
                _ => Payload::Binary(&bytes[range]),
            };
            if !show(payload) {
                return (shown + 1, Ok(true));
            }
        }
        (entries.len(), more(found))
    }

    /// Reads one message, which is shown to `data`, or a control frame; `None`
    /// when the socket has no more.
    pub(crate) fn read(
        &mut self,
        data: impl FnOnce(Payload<'_>),
    ) -> Result<Option<Incoming>, Error> {
        loop {
            match self.ws.get_mut().next() {
                Ok(Next::Whole { text, start, len }) => {
                    let payload = self.ws.get_ref().payload(start, len);
                    data(if text {
                        Payload::Text(utf8(payload)?)
                    } else {
                        Payload::Binary(payload)
                    });
                    return Ok(Some(Incoming::Data));
                }
                Ok(Next::Large { text, payload }) => {
                    let payload = Bytes::from(payload);
                    data(if text {
                        Payload::OwnedText(Utf8Bytes::try_from(payload).map_err(not_utf8)?)
                    } else {
                        Payload::OwnedBinary(payload)
                    });
                    return Ok(Some(Incoming::Data));
                }
                Ok(Next::Ping { start, len }) => {
                    let payload = self.ws.get_ref().payload(start, len);
                    self.late = Some(Bytes::copy_from_slice(payload));
                    return Ok(Some(Incoming::Ping));
                }
                Ok(Next::Passed) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(lost(error.into())),
            }
            let incoming = match self.ws.read() {
                Ok(WsMessage::Text(text)) => {
                    data(Payload::OwnedText(text));
                    Incoming::Data
                }
                Ok(WsMessage::Binary(bytes)) => {
                    data(Payload::OwnedBinary(bytes));
                    Incoming::Data
                }
                Ok(WsMessage::Ping(payload)) => {
                    self.answer(payload.len())?;
                    Incoming::Ping
                }
                Ok(WsMessage::Pong(bytes)) => Incoming::Pong(bytes),
                Ok(WsMessage::Close(frame)) => {
                    self.dirty = true;
                    self.ws.get_mut().pass_all();
                    self.closed(frame)
                }
                Ok(WsMessage::Frame(_)) => continue,
                // The socket has no more for now, or tungstenite has had all of
                // what was passed to it.
                Err(error) if would_block(&error) => {
                    if self.ws.get_ref().is_passing() {
                        return Ok(None);
                    }
                    continue;
                }
                Err(error) => return Err(lost(error)),
            };
            return Ok(Some(incoming));
        }
    }

    /// Lets go of memory that an idle connection does not need.
    pub(crate) fn shrink(&mut self) {
        self.ws.get_mut().shrink();
    }

    /// tungstenite takes a code that it does not know for a violation, and shows
    /// 1002 in its place. Others have registered codes since (1014), and a code
    /// that nobody has defined is no reason to give up.
    fn closed(&self, frame: Option<CloseFrame>) -> Incoming {
        let Some(frame) = frame else {
            return Incoming::Close { code: 1005, reason: String::new() };
        };
        let replaced = frame.code == CloseCode::Protocol && frame.reason == "Protocol violation";
        let raw = replaced.then(|| self.ws.get_ref().close_frame()).flatten();
        let unknown = raw
            .filter(|(code, _)| matches!(code, 1014 | 1016..=2999))
            .map(|(code, reason)| (code, String::from_utf8_lossy(reason).into_owned()));
        let (code, reason) =
            unknown.unwrap_or_else(|| (frame.code.into(), frame.reason.to_string()));
        Incoming::Close { code, reason }
    }

    /// Lets the pong that tungstenite keeps ready go into its buffer, so that
    /// its bytes are counted where they lie: a message behind it must not be
    /// taken for written because the pong was.
    fn answer(&mut self, len: usize) -> Result<(), Error> {
        self.dirty = true;
        self.pongs = self.pongs.min(self.waiting()) + frame_len(len);
        self.produced += frame_len(len);
        self.flush()?;
        if self.pongs.min(self.waiting()) >= MAX_PONGS {
            self.ws.get_mut().hold_pings(true);
        }
        Ok(())
    }

    /// Answers the last ping that was held back, once there is room.
    fn answer_late(&mut self) -> Result<(), Error> {
        if !self.has_room() {
            return Ok(());
        }
        self.ws.get_mut().hold_pings(false);
        let Some(payload) = self.late.take() else { return Ok(()) };
        let len = payload.len();
        match self.ws.write(WsMessage::Pong(payload)) {
            // Nothing follows a close frame.
            Err(WsError::Protocol(ProtocolError::SendAfterClosing)) => return Ok(()),
            Err(error) if !would_block(&error) => return Err(lost(error)),
            _ => self.produced += frame_len(len),
        }
        self.dirty = true;
        self.flush().map(drop)
    }

    /// Queues a message of the outbox; it is kept until the kernel has it whole.
    pub(crate) fn send(&mut self, message: &Outgoing) -> Result<Sent, Error> {
        let sent = self.queue(message)?;
        if sent == Sent::Queued {
            self.unfinished.push_back((self.produced, message.clone()));
        }
        Ok(sent)
    }

    /// Queues a message of the session, which belongs to this epoch only.
    pub(crate) fn send_once(&mut self, message: &Outgoing) -> Result<Sent, Error> {
        self.queue(message)
    }

    fn queue(&mut self, message: &Outgoing) -> Result<Sent, Error> {
        let frame = match &message.0 {
            Body::Text(text) => WsMessage::Text(text.clone()),
            Body::Binary(bytes) => WsMessage::Binary(bytes.clone()),
        };
        self.write(frame, message.len())
    }

    pub(crate) fn ping(&mut self, payload: Vec<u8>) -> Result<Sent, Error> {
        let len = payload.len();
        self.write(WsMessage::Ping(payload.into()), len)
    }

    fn write(&mut self, frame: WsMessage, len: usize) -> Result<Sent, Error> {
        self.dirty = true;
        self.pongs = self.pongs.min(self.waiting());
        match self.ws.write(frame) {
            Ok(()) => {}
            Err(WsError::WriteBufferFull(_)) => return Ok(Sent::Full),
            // The frame is in the buffer: it must never be written again.
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(lost(error)),
        }
        self.produced += frame_len(len);
        Ok(Sent::Queued)
    }

    /// Writes what is queued; `true` when all of it is out.
    pub(crate) fn flush(&mut self) -> Result<bool, Error> {
        if !self.dirty {
            return Ok(true);
        }
        match self.ws.flush() {
            Ok(()) => {
                self.dirty = false;
                self.unfinished.clear();
                self.produced = self.ws.get_ref().written();
                self.answer_late()?;
                Ok(!self.dirty)
            }
            Err(error) if would_block(&error) => {
                self.forget_finished();
                self.answer_late()?;
                Ok(false)
            }
            Err(error) => Err(lost(error)),
        }
    }

    /// Whether more may be queued: the buffer holds less than its usual size.
    pub(crate) fn has_room(&self) -> bool {
        self.waiting() < WRITE_BUFFER as u64
    }

    /// Bytes that are queued and not written.
    fn waiting(&self) -> u64 {
        self.produced.saturating_sub(self.ws.get_ref().written())
    }

    /// The outbox's messages of which the kernel does not have every byte: the
    /// server cannot have seen them, so they may be sent again.
    pub(crate) fn take_unfinished(&mut self) -> Vec<Outgoing> {
        self.forget_finished();
        self.unfinished.drain(..).map(|(_, message)| message).collect()
    }

    fn forget_finished(&mut self) {
        let written = self.ws.get_ref().written();
        while self.unfinished.front().is_some_and(|(end, _)| *end <= written) {
            self.unfinished.pop_front();
        }
    }

    /// Queues a close frame and tries to write it. The handshake ends in
    /// [`read`](Self::read), if the server answers.
    pub(crate) fn close(&mut self, code: u16, reason: &str) -> Result<(), Error> {
        self.dirty = true;
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
        match self.ws.close(Some(frame)) {
            Ok(()) => Ok(()),
            Err(error) if would_block(&error) => Ok(()),
            Err(error) => Err(lost(error)),
        }
    }
}

impl Websocket {
    /// Takes note of what a wait brought; whether it concerned this socket.
    pub(crate) fn on_ready(&mut self, ready: Ready) -> bool {
        self.ws.get_mut().stream_mut().socket_mut().on_ready(ready)
    }

    pub(crate) fn socket(&self) -> &Socket {
        self.ws.get_ref().stream().socket()
    }

    /// The peer is gone: nothing is to be left of this socket.
    pub(crate) fn abandon(&mut self) {
        self.ws.get_mut().stream_mut().socket_mut().abandon();
    }

    /// Guarantees that the socket is closed and no longer watched.
    pub(crate) fn release(mut self, poller: &mut Poller) {
        self.ws.get_mut().stream_mut().socket_mut().release(poller);
    }
}

/// A frame of a client: header, extended length and mask (RFC 6455, section 5.2).
fn frame_len(payload: usize) -> u64 {
    let extended = match payload {
        0..=125 => 0,
        126..=65_535 => 2,
        _ => 8,
    };
    (2 + extended + 4 + payload) as u64
}

/// Whether the socket may have more, after a look for a run.
fn more(found: io::Result<()>) -> Result<bool, Error> {
    match found {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(lost(error.into())),
    }
}

fn would_block(error: &WsError) -> bool {
    matches!(error, WsError::Io(io) if io.kind() == io::ErrorKind::WouldBlock)
}

/// tungstenite's errors in this crate's words.
fn lost(error: WsError) -> Error {
    match error {
        WsError::Io(io) => Error::caused(ErrorKind::Io(io.kind()), "connection lost", io),
        WsError::ConnectionClosed | WsError::AlreadyClosed => {
            Error::new(ErrorKind::Io(io::ErrorKind::ConnectionAborted), "connection closed")
        }
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Error::new(
            ErrorKind::Io(io::ErrorKind::UnexpectedEof),
            "the server ended the connection without a close frame",
        ),
        WsError::Capacity(limit) => {
            Error::caused(ErrorKind::TooLarge, "a message is larger than max_message_size", limit)
        }
        // Of a message in fragments, or of a close frame.
        WsError::Utf8(_) => {
            Error::caused(ErrorKind::Protocol, "a text or a close reason is not UTF-8", error)
        }
        other => {
            Error::caused(ErrorKind::Protocol, "the server broke the WebSocket protocol", other)
        }
    }
}

fn utf8(payload: &[u8]) -> Result<&str, Error> {
    std::str::from_utf8(payload).map_err(not_utf8)
}

fn not_utf8(error: std::str::Utf8Error) -> Error {
    Error::caused(ErrorKind::Protocol, "a text message is not UTF-8", error)
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod stream_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Message;
    use proptest::prelude::*;

    /// A stream that gives a server's bytes in pieces, with nothing in between.
    struct Pieces {
        bytes: Vec<u8>,
        at: usize,
        sizes: Vec<usize>,
        turn: usize,
    }

    impl Pieces {
        fn new(bytes: &[u8], sizes: &[usize]) -> Self {
            Self { bytes: bytes.to_vec(), at: 0, sizes: sizes.to_vec(), turn: 0 }
        }
    }

    impl Read for Pieces {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.turn += 1;
            let size = self.sizes.get(self.turn % (self.sizes.len() + 1)).copied().unwrap_or(3);
            if size == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let count = size.min(buf.len()).min(self.bytes.len() - self.at);
            buf[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
            self.at += count;
            Ok(count)
        }
    }

    impl Write for Pieces {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A server that pings for ever and takes `takes` bytes of every write.
    struct Pinging {
        takes: usize,
    }

    impl Read for Pinging {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let count = buf.len() / 2 * 2;
            buf[..count].chunks_mut(2).for_each(|ping| ping.copy_from_slice(&[0x89, 0]));
            Ok(count)
        }
    }

    impl Write for Pinging {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            match self.takes.min(buf.len()) {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                count => Ok(count),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn pongs_do_not_pile_up_for_a_server_that_pings_and_does_not_read() {
        let limits = Limits { read_buffer: 1024, max_message: 64 << 20 };
        let mut ws = Websocket::new(Pinging { takes: 0 }, Vec::new(), limits);
        for _ in 0..MAX_PONGS {
            assert!(matches!(ws.read(|_| {}), Ok(Some(Incoming::Ping))));
            assert!(ws.waiting() < MAX_PONGS + 200);
        }
        assert_eq!(ws.late.as_deref(), Some(&b""[..]));
        ws.ws.get_mut().stream_mut().takes = usize::MAX;
        let written = ws.ws.get_ref().written();
        assert!(ws.flush().unwrap() && ws.late.is_none());
        let pongs = (ws.ws.get_ref().written() - written) / frame_len(0);
        assert_eq!(pongs, MAX_PONGS.div_ceil(frame_len(0)) + 1, "and the last ping's");
        assert!(matches!(ws.read(|_| {}), Ok(Some(Incoming::Ping))));
        assert_eq!((ws.waiting(), ws.late.is_none()), (0, true), "answered at once again");
    }

    #[test]
    fn a_server_that_pings_without_end_and_reads_is_answered_without_end() {
        let limits = Limits { read_buffer: 1024, max_message: 64 << 20 };
        let mut ws = Websocket::new(Pinging { takes: 7 }, Vec::new(), limits);
        let message = Outgoing::from(vec![0; 1000]);
        for turn in 0..2 * MAX_PONGS / frame_len(0) {
            // There is always something left to write, as in a long upload.
            if turn % 100 == 0 && ws.has_room() {
                assert_eq!(ws.send(&message).unwrap(), Sent::Queued);
            }
            assert!(matches!(ws.read(|_| {}), Ok(Some(Incoming::Ping))));
        }
    }

    /// A server's binary message of `len` bytes, as far as `sent`.
    fn long(len: u64, sent: usize) -> Vec<u8> {
        let mut bytes = vec![0x82, 127];
        bytes.extend(len.to_be_bytes());
        bytes.resize(bytes.len() + sent, 7);
        bytes
    }

    #[test]
    fn a_length_that_no_memory_is_large_enough_for_takes_none() {
        let limits = Limits { read_buffer: 1024, max_message: usize::MAX };
        let pieces = Pieces::new(&long(1 << 62, 5000), &[1000]);
        let mut ws = Websocket::new(pieces, Vec::new(), limits);
        let error = ws.read(|_| panic!("it is not complete")).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Io(io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn no_length_of_a_frame_is_too_long_to_be_refused_or_waited_for() {
        let limits = Limits { read_buffer: 1024, max_message: usize::MAX };
        let eof = ErrorKind::Io(io::ErrorKind::UnexpectedEof);
        // A message, a fragment, a ping, and a frame with reserved bits.
        for first in [0x82, 0x02, 0x89, 0xf2] {
            for len in [1 << 62, i64::MAX as u64, 1 << 63, u64::MAX - 9, u64::MAX] {
                let mut bytes = long(len, 5000);
                bytes[0] = first;
                let mut ws = Websocket::new(Pieces::new(&bytes, &[1000]), Vec::new(), limits);
                let mut block = BlockBuilder::new(0, 1, crate::io::clock::Clock::real().now());
                assert!(ws.read_run(10, &mut block, 1).is_ok() && block.len() == 0);
                let error = ws.read(|_| panic!("it is not complete")).unwrap_err();
                let waits = first == 0x82 && len < 1 << 63;
                let expected = if waits { &eof } else { &ErrorKind::TooLarge };
                assert_eq!(error.kind(), expected, "{first:x} of {len:x}");
            }
        }
    }

    #[test]
    fn a_message_above_what_is_taken_at_once_arrives_whole() {
        let limits = Limits { read_buffer: 1024, max_message: usize::MAX };
        let len = (64 << 20) + 100;
        let pieces = Pieces::new(&long(len as u64, len), &[1 << 20]);
        let mut ws = Websocket::new(pieces, Vec::new(), limits);
        let mut got = 0;
        let read = ws.read(|payload| {
            let bytes = payload.data().as_bytes();
            assert!(bytes.iter().all(|byte| *byte == 7));
            got = bytes.len();
        });
        assert!(matches!(read, Ok(Some(Incoming::Data))));
        assert_eq!(got, len);
    }

    const LIMIT: usize = 3000;

    /// What tungstenite alone reads, up to its first error.
    fn reference(bytes: &[u8], sizes: &[usize]) -> Vec<String> {
        let config =
            WebSocketConfig::default().max_message_size(Some(LIMIT)).max_frame_size(Some(LIMIT));
        let pieces = Pieces::new(bytes, sizes);
        let mut ws = tungstenite::WebSocket::from_raw_socket(pieces, Role::Client, Some(config));
        let mut seen = Vec::new();
        loop {
            seen.push(match ws.read() {
                Ok(WsMessage::Text(text)) => format!("text {text}"),
                Ok(WsMessage::Binary(bytes)) => format!("binary {bytes:?}"),
                Ok(WsMessage::Ping(_)) => "ping".to_owned(),
                Ok(WsMessage::Pong(bytes)) => format!("pong {bytes:?}"),
                Ok(WsMessage::Close(frame)) => {
                    format!("close {}", frame.map_or(1005, |frame| frame.code.into()))
                }
                Ok(WsMessage::Frame(_)) => continue,
                Err(error) if would_block(&error) => continue,
                Err(error) => {
                    seen.push(format!("{:?}", lost(error).kind()));
                    return seen;
                }
            });
        }
    }

    /// How a connection reads.
    #[derive(Debug, Clone, Copy)]
    enum Reads {
        OneByOne,
        /// In runs of up to so many where there are any, which are taken over.
        Taken(usize),
        /// The same, but shown while they lie in the buffer.
        Shown(usize),
    }

    fn read_here(
        bytes: &[u8],
        rest: usize,
        sizes: &[usize],
        reads: Reads,
        read_buffer: usize,
    ) -> Vec<String> {
        let rest = rest.min(bytes.len());
        let limits = Limits { read_buffer, max_message: LIMIT };
        let pieces = Pieces::new(&bytes[rest..], sizes);
        let mut ws = Websocket::new(pieces, bytes[..rest].to_vec(), limits);
        let (mut seen, mut kept) = (Vec::new(), VecDeque::new());
        loop {
            let run = match reads {
                Reads::OneByOne => Ok(true),
                Reads::Taken(most) => read_one_run(&mut ws, most, &mut seen, &mut kept),
                Reads::Shown(most) => {
                    let (shown, more) = ws.show_run(most, |payload| {
                        seen.push(told(payload.data()));
                        true
                    });
                    assert!(shown <= most);
                    more.map(|more| more && shown == 0)
                }
            };
            match run {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    seen.push(format!("{:?}", error.kind()));
                    return seen;
                }
            }
            let mut data = None;
            let read = ws.read(|payload| data = Some(told(payload.data())));
            seen.push(match read {
                Ok(Some(Incoming::Data)) => data.unwrap(),
                Ok(Some(Incoming::Ping)) => "ping".to_owned(),
                Ok(Some(Incoming::Pong(bytes))) => format!("pong {bytes:?}"),
                Ok(Some(Incoming::Close { code, .. })) => format!("close {code}"),
                Ok(None) => continue,
                Err(error) => {
                    seen.push(format!("{:?}", error.kind()));
                    return seen;
                }
            });
        }
    }

    /// Whether it is `read`'s turn.
    fn read_one_run(
        ws: &mut Websocket<Pieces>,
        most: usize,
        seen: &mut Vec<String>,
        kept: &mut VecDeque<(String, Message)>,
    ) -> Result<bool, Error> {
        let mut block = BlockBuilder::new(0, 1, crate::io::clock::Clock::real().now());
        let more = ws.read_run(most, &mut block, 1);
        let count = block.len();
        assert!(count <= most);
        let bytes = block.bytes();
        let messages: Vec<_> = block.finish().collect();
        assert_eq!(messages.iter().map(Message::len).sum::<usize>(), bytes);
        for (at, message) in messages.iter().enumerate() {
            assert_eq!(message.metadata().sequence, at as u64 + 1);
            seen.push(told_of(message));
            kept.push_back((told_of(message), message.clone()));
        }
        // Some blocks outlive the next runs; the memory of others is used again.
        while kept.len() > 7 {
            let (told, message) = kept.pop_front().unwrap();
            assert_eq!(told, told_of(&message));
        }
        Ok(more? && count == 0)
    }

    fn told_of(message: &Message) -> String {
        told(match message.text() {
            Some(text) => crate::handler::Data::Text(text),
            None => crate::handler::Data::Binary(message.as_bytes()),
        })
    }

    fn told(data: crate::handler::Data<'_>) -> String {
        match data {
            crate::handler::Data::Text(text) => format!("text {text}"),
            crate::handler::Data::Binary(bytes) => {
                format!("binary {:?}", Bytes::copy_from_slice(bytes))
            }
        }
    }

    fn frame(first: u8, payload: &[u8], mask: bool) -> Vec<u8> {
        let flag = if mask { 0x80 } else { 0 };
        let mut bytes = vec![first];
        match payload.len() {
            len @ 0..=125 => bytes.push(flag | len as u8),
            len => {
                bytes.push(flag | 126);
                bytes.extend((len as u16).to_be_bytes());
            }
        }
        if mask {
            bytes.extend([0; 4]);
        }
        bytes.extend(payload);
        bytes
    }

    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let text = "[a-zäß€]{0,60}".prop_map(String::into_bytes);
        let bytes = proptest::collection::vec(any::<u8>(), 0..200);
        let long = (1000_usize..3200).prop_map(|len| vec![b'x'; len]);
        let whole = (prop_oneof![Just(0x81_u8), Just(0x82)], prop_oneof![8 => text, 1 => long]);
        let odd = (any::<u8>(), bytes.clone());
        let control = (
            prop_oneof![Just(0x89_u8), Just(0x8a)],
            bytes.prop_map(|mut b| {
                b.truncate(125);
                b
            }),
        );
        let fragment = (prop_oneof![Just(0x01_u8), Just(0x00), Just(0x80)], "[a-z]{0,40}");
        let one = prop_oneof![
            20 => whole.prop_map(|(first, payload)| frame(first, &payload, false)),
            4 => control.prop_map(|(first, payload)| frame(first, &payload, false)),
            2 => ("[a-z]{0,20}", "[a-z]{0,20}").prop_map(|(a, b)| {
                let ping = frame(0x89, b"?", false);
                [frame(0x01, a.as_bytes(), false), ping, frame(0x80, b.as_bytes(), false)].concat()
            }),
            1 => fragment.prop_map(|(first, payload)| frame(first, payload.as_bytes(), false)),
            1 => odd.prop_map(|(first, payload)| frame(first, &payload, false)),
            1 => Just(frame(0x81, b"masked", true)),
            1 => proptest::collection::vec(any::<u8>(), 0..9).prop_map(|b| frame(0x81, &b, false)),
            1 => Just(frame(0x88, &[3, 232], false)),
        ];
        proptest::collection::vec(one, 0..60).prop_map(|frames| frames.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]
        #[test]
        fn what_is_found_in_the_buffer_is_what_tungstenite_alone_reads(
            bytes in frames(),
            cut in 0_usize..64,
            rest in 0_usize..300,
            sizes in proptest::collection::vec(prop_oneof![Just(0_usize), Just(1), 2_usize..2000], 0..8),
        ) {
            let bytes = &bytes[..bytes.len() - cut.min(bytes.len())];
            let reference = reference(bytes, &sizes);
            for reads in [
                Reads::OneByOne,
                Reads::Taken(1),
                Reads::Taken(5),
                Reads::Taken(1000),
                Reads::Shown(1),
                Reads::Shown(64),
            ] {
                for buffer in [1024, 2048, 5000] {
                    let read = read_here(bytes, rest, &sizes, reads, buffer);
                    prop_assert_eq!(&read, &reference, "{:?}, buffer {}", reads, buffer);
                }
            }
        }

    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]
        /// The same where the buffer grows beyond what small messages need.
        #[test]
        fn a_buffer_that_grows_for_large_messages_loses_nothing(
            lens in proptest::collection::vec(prop_oneof![9 => 1500_usize..3000, 1 => 0_usize..3], 60..160),
            odd in frames(),
            rest in 0_usize..3000,
            sizes in proptest::collection::vec(prop_oneof![1 => Just(0_usize), 3 => 1_usize..150_000], 0..8),
        ) {
            let large = |len: &usize| frame(0x82, &vec![*len as u8; *len], false);
            let mut bytes: Vec<u8> = lens.iter().flat_map(large).collect();
            bytes.extend(odd);
            let reference = reference(&bytes, &sizes);
            for reads in [Reads::Taken(5), Reads::Taken(1000), Reads::Shown(64)] {
                for buffer in [70_000, 256 * 1024] {
                    let read = read_here(&bytes, rest, &sizes, reads, buffer);
                    prop_assert_eq!(&read, &reference, "{:?}, buffer {}", reads, buffer);
                }
            }
        }
    }
}
