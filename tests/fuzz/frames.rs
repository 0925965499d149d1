//! What a server sends after the upgrade: this crate's reading and tungstenite's
//! alone must agree on every message, control frame and error.

use std::io::{self, Read, Write};

use tungstenite::error::ProtocolError;
use tungstenite::protocol::{Role, WebSocketConfig};
use tungstenite::{Error as WsError, Message as WsMessage};

use super::Input;
use crate::error::{Error, ErrorKind};
use crate::handler::Data;
use crate::io::clock::Clock;
use crate::io::websocket::{Incoming, Limits, Websocket};
use crate::message::{BlockBuilder, Message};

pub(super) const WORDS: &[&[u8]] = &[
    b"\x81\x03abc",
    b"\x82\x7e\x01\x00",
    b"\x81\x7f\0\0\0\0\0\0\x03\x00",
    b"\x01\x02ab",
    b"\x00\x01c",
    b"\x80\x01d",
    b"\x89\x01?",
    b"\x8a\x00",
    b"\x88\x02\x03\xe8",
    b"\x88\x00",
    "\u{e9}\u{20ac}\u{1F600}".as_bytes(),
    b"\xed\xa0\x80",
];

/// Largest message, small so that inputs can exceed it.
const LIMIT: usize = 300;

/// The first byte says into how many pieces reads are cut (its low three bits)
/// and how much came with the upgrade; then their lengths; then what is sent.
pub(super) fn run(input: &[u8]) {
    let mut input = Input(input);
    let first = input.byte();
    let sizes: Vec<usize> =
        input.take(usize::from(first & 7)).iter().map(|size| usize::from(*size)).collect();
    let bytes = input.0;
    let rest = usize::from(first >> 3).min(bytes.len());
    let expected = read_by_tungstenite(Pieces::new(bytes, &sizes));
    for reads in READS {
        let here = read_here(&bytes[..rest], Pieces::new(&bytes[rest..], &sizes), reads);
        assert_eq!(here, expected, "{reads:?}");
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

const READS: [Reads; 6] = [
    Reads::OneByOne,
    Reads::Taken(1),
    Reads::Taken(3),
    Reads::Taken(1000),
    Reads::Shown(1),
    Reads::Shown(64),
];

/// What was read, in order; the error that ends it is the last.
#[derive(Debug, PartialEq)]
enum Seen {
    Text(String),
    Binary(Vec<u8>),
    Ping,
    Pong(Vec<u8>),
    /// tungstenite tells nothing of a code that is not for sending.
    Close(Option<(u16, String)>),
    Error(ErrorKind),
}

fn read_here(rest: &[u8], pieces: Pieces<'_>, reads: Reads) -> Vec<Seen> {
    let limits = Limits { read_buffer: 1024, max_message: LIMIT };
    let mut ws = Websocket::new(pieces, rest.to_vec(), limits);
    let mut seen = Vec::new();
    loop {
        let read = match reads {
            Reads::OneByOne => read_one(&mut ws, &mut seen),
            Reads::Taken(most) => read_run(&mut ws, most, &mut seen),
            Reads::Shown(most) => show_run(&mut ws, most, &mut seen),
        };
        if let Err(error) = read {
            seen.push(Seen::Error(error.kind().clone()));
            return seen;
        }
    }
}

fn read_run(
    ws: &mut Websocket<Pieces<'_>>,
    most: usize,
    seen: &mut Vec<Seen>,
) -> Result<(), Error> {
    let mut block = BlockBuilder::new(0, 1, Clock::real().now());
    let more = ws.read_run(most, &mut block, 1);
    let (count, bytes) = (block.len(), block.bytes());
    let messages: Vec<Message> = block.finish().collect();
    assert!(count <= most && messages.len() == count);
    assert_eq!(messages.iter().map(Message::len).sum::<usize>(), bytes);
    seen.extend(messages.iter().map(|message| match message.text() {
        Some(text) => Seen::Text(text.to_owned()),
        None => Seen::Binary(message.as_bytes().to_vec()),
    }));
    // An empty block says that something else comes.
    if more? && count == 0 { read_one(ws, seen) } else { Ok(()) }
}

fn show_run(
    ws: &mut Websocket<Pieces<'_>>,
    most: usize,
    seen: &mut Vec<Seen>,
) -> Result<(), Error> {
    let before = seen.len();
    let (shown, more) = ws.show_run(most, |payload| {
        seen.push(Seen::from(payload.data()));
        true
    });
    assert!(shown <= most && seen.len() == before + shown);
    if more? && shown == 0 { read_one(ws, seen) } else { Ok(()) }
}

impl From<Data<'_>> for Seen {
    fn from(data: Data<'_>) -> Self {
        match data {
            Data::Text(text) => Seen::Text(text.to_owned()),
            Data::Binary(bytes) => Seen::Binary(bytes.to_vec()),
        }
    }
}

fn read_one(ws: &mut Websocket<Pieces<'_>>, seen: &mut Vec<Seen>) -> Result<(), Error> {
    let mut data = None;
    let read = ws.read(|payload| data = Some(Seen::from(payload.data())));
    match read? {
        Some(Incoming::Data) => seen.push(data.unwrap()),
        Some(Incoming::Ping) => seen.push(Seen::Ping),
        Some(Incoming::Pong(bytes)) => seen.push(Seen::Pong(bytes.to_vec())),
        Some(Incoming::Close { code, reason }) => seen.push(Seen::Close(told(code, reason))),
        None => {}
    }
    Ok(())
}

fn read_by_tungstenite(pieces: Pieces<'_>) -> Vec<Seen> {
    let config =
        WebSocketConfig::default().max_message_size(Some(LIMIT)).max_frame_size(Some(LIMIT));
    let mut ws = tungstenite::WebSocket::from_raw_socket(pieces, Role::Client, Some(config));
    let mut seen = Vec::new();
    loop {
        seen.push(match ws.read() {
            Ok(WsMessage::Text(text)) => Seen::Text(text.to_string()),
            Ok(WsMessage::Binary(bytes)) => Seen::Binary(bytes.to_vec()),
            Ok(WsMessage::Ping(_)) => Seen::Ping,
            Ok(WsMessage::Pong(bytes)) => Seen::Pong(bytes.to_vec()),
            Ok(WsMessage::Close(Some(frame))) => {
                Seen::Close(told(frame.code.into(), frame.reason.to_string()))
            }
            Ok(WsMessage::Close(None)) => Seen::Close(told(1005, String::new())),
            Ok(WsMessage::Frame(_)) => unreachable!("it is for writing"),
            Err(WsError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => {
                seen.push(Seen::Error(kind(&error)));
                return seen;
            }
        });
    }
}

/// A close frame, unless tungstenite would show another in its place.
fn told(code: u16, reason: String) -> Option<(u16, String)> {
    let replaced = code == 1002 && reason == "Protocol violation";
    (!replaced && !matches!(code, 1014 | 1016..=2999)).then_some((code, reason))
}

fn kind(error: &WsError) -> ErrorKind {
    match error {
        WsError::Io(error) => ErrorKind::Io(error.kind()),
        WsError::ConnectionClosed | WsError::AlreadyClosed => {
            ErrorKind::Io(io::ErrorKind::ConnectionAborted)
        }
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            ErrorKind::Io(io::ErrorKind::UnexpectedEof)
        }
        WsError::Capacity(_) => ErrorKind::TooLarge,
        _ => ErrorKind::Protocol,
    }
}

/// A stream that gives bytes in pieces of these sizes, over and over; a piece of
/// none is a wait.
struct Pieces<'a> {
    bytes: &'a [u8],
    sizes: Vec<usize>,
    turn: usize,
}

impl<'a> Pieces<'a> {
    fn new(bytes: &'a [u8], sizes: &[usize]) -> Self {
        let mut sizes = sizes.to_vec();
        // Or it could wait for ever.
        if sizes.iter().all(|size| *size == 0) {
            sizes.push(usize::MAX);
        }
        Self { bytes, sizes, turn: 0 }
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let size = self.sizes[self.turn % self.sizes.len()];
        self.turn += 1;
        if size == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = size.min(buf.len()).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(count);
        buf[..count].copy_from_slice(now);
        self.bytes = later;
        Ok(count)
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
