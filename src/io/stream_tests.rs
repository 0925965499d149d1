//! The WebSocket over a stream in memory that takes and gives a few bytes at a
//! time, stalls, and fails, at every position there is.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind::WouldBlock, Read, Write};
use std::rc::Rc;

use super::{Incoming, Limits, Sent, Websocket};
use crate::error::{Error, ErrorKind};
use crate::handler::{Data, Outgoing};
use crate::io::clock::Clock;
use crate::message::BlockBuilder;

const LIMITS: Limits = Limits { read_buffer: 256, max_message: 100_000 };

/// More calls than any exchange of these tests can need: who makes more spins.
const SPINS: usize = 200_000;

/// What a call of a stream comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// At most so many bytes.
    Some(usize),
    Stall,
    Fail(io::ErrorKind),
}

/// Both directions of a socket, seen from its far end.
struct Wire {
    /// What the server sends, as far as it was not read.
    to_read: VecDeque<u8>,
    /// What the server got.
    written: Vec<u8>,
    /// What the next calls come to; after them, `usual`.
    reads: VecDeque<Call>,
    writes: VecDeque<Call>,
    usual: (Call, Call),
    /// Whether the server ends the stream behind what it sends.
    ends: bool,
    calls: usize,
}

impl Default for Wire {
    fn default() -> Self {
        Self::new(&[])
    }
}

impl Wire {
    fn new(sends: &[u8]) -> Self {
        Self {
            to_read: sends.iter().copied().collect(),
            written: Vec::new(),
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            usual: (Call::Some(usize::MAX), Call::Some(usize::MAX)),
            ends: false,
            calls: 0,
        }
    }

    fn count(&mut self) {
        self.calls += 1;
        assert!(self.calls < SPINS, "a loop that does not end");
    }

    /// The messages and control frames that the server got whole, and how many
    /// bytes of another.
    fn frames(&self) -> (Vec<(u8, Vec<u8>)>, usize) {
        let mut rest = &self.written[..];
        let mut frames = Vec::new();
        while let Some((opcode, payload, len)) = unmasked(rest) {
            frames.push((opcode, payload));
            rest = &rest[len..];
        }
        (frames, rest.len())
    }
}

/// A frame of a client: opcode, payload, and its length on the wire.
fn unmasked(bytes: &[u8]) -> Option<(u8, Vec<u8>, usize)> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    assert_eq!((first & 0x70, second & 0x80), (0, 0x80), "no reserved bits, and masked");
    let (len, at) = match second & 0x7f {
        126 => (usize::from(u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?])), 4),
        127 => panic!("these tests send no such frame"),
        len => (usize::from(len), 2),
    };
    let mask = bytes.get(at..at + 4)?;
    let mut payload = bytes.get(at + 4..at + 4 + len)?.to_vec();
    payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    Some((first & 0x0f, payload, at + 4 + len))
}

/// The client's end of a wire.
#[derive(Clone)]
struct End(Rc<RefCell<Wire>>);

impl Read for End {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut wire = self.0.borrow_mut();
        wire.count();
        let most = match wire.reads.pop_front().unwrap_or(wire.usual.0) {
            Call::Some(most) => most,
            Call::Stall => return Err(WouldBlock.into()),
            Call::Fail(kind) => return Err(kind.into()),
        };
        let count = most.min(buf.len()).min(wire.to_read.len());
        if count == 0 && !wire.ends {
            return Err(WouldBlock.into());
        }
        buf.iter_mut().zip(wire.to_read.drain(..count)).for_each(|(to, from)| *to = from);
        Ok(count)
    }
}

impl Write for End {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut wire = self.0.borrow_mut();
        wire.count();
        match wire.writes.pop_front().unwrap_or(wire.usual.1) {
            Call::Some(most) => {
                let count = most.min(buf.len());
                wire.written.extend(&buf[..count]);
                Ok(count)
            }
            Call::Stall => Err(WouldBlock.into()),
            Call::Fail(kind) => Err(kind.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(sends: &[u8]) -> (Websocket<End>, Rc<RefCell<Wire>>) {
    let wire = Rc::new(RefCell::new(Wire::new(sends)));
    (Websocket::new(End(Rc::clone(&wire)), Vec::new(), LIMITS), wire)
}

/// A frame of a server.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match u8::try_from(payload.len()) {
        Ok(len) if len < 126 => bytes.push(len),
        _ => {
            bytes.push(126);
            bytes.extend((payload.len() as u16).to_be_bytes());
        }
    }
    bytes.extend(payload);
    bytes
}

/// What a test saw of what the server sent.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Data(Vec<u8>),
    Ping,
    Pong(Vec<u8>),
    Close(u16),
}

/// How a connection reads: one by one, or in runs of so many messages where there
/// are any.
const WAYS: [usize; 3] = [0, 1, 100];

/// Reads as long as there is something, in runs of `most` if that is not 0.
fn read_all(ws: &mut Websocket<End>, most: usize, seen: &mut Vec<Seen>) -> Result<(), Error> {
    loop {
        if most > 0 {
            match read_run(ws, most, seen)? {
                Some(true) => {}
                Some(false) => return Ok(()),
                None => continue,
            }
        }
        let mut data = None;
        let read = ws.read(|payload| {
            data = Some(match payload.data() {
                Data::Text(text) => text.as_bytes().to_vec(),
                Data::Binary(bytes) => bytes.to_vec(),
            });
        });
        seen.push(match read? {
            None => return Ok(()),
            Some(Incoming::Data) => Seen::Data(data.expect("a message is shown")),
            Some(Incoming::Ping) => Seen::Ping,
            Some(Incoming::Pong(payload)) => Seen::Pong(payload.to_vec()),
            Some(Incoming::Close { code, .. }) => Seen::Close(code),
        });
    }
}

/// Whether it is `read`'s turn; `None` when a run was read.
fn read_run(
    ws: &mut Websocket<End>,
    most: usize,
    seen: &mut Vec<Seen>,
) -> Result<Option<bool>, Error> {
    let mut block = BlockBuilder::new(0, 1, Clock::real().now());
    let more = ws.read_run(most, &mut block, 1);
    let count = seen.len();
    seen.extend(block.finish().map(|message| Seen::Data(message.as_bytes().to_vec())));
    assert!(seen.len() - count <= most);
    Ok(Some(more?).filter(|_| seen.len() == count))
}

/// A server's half of a talk: texts short, long and in fragments, pings in
/// between and inside, a pong that nobody asked for.
fn talk() -> (Vec<u8>, Vec<Seen>) {
    let long = "long ".repeat(60);
    let bytes = [
        frame(0x81, b"first"),
        frame(0x89, b"one"),
        frame(0x82, &[0, 1, 2, 255]),
        frame(0x01, b"in frag"),
        frame(0x89, b"two"),
        frame(0x80, b"ments"),
        frame(0x8a, b"alone"),
        frame(0x81, long.as_bytes()),
        frame(0x89, &[9; 125]),
        frame(0x81, "ä€".as_bytes()),
        frame(0x81, b""),
    ];
    let data = |bytes: &[u8]| Seen::Data(bytes.to_vec());
    let seen = vec![
        data(b"first"),
        Seen::Ping,
        data(&[0, 1, 2, 255]),
        Seen::Ping,
        data(b"in fragments"),
        Seen::Pong(b"alone".to_vec()),
        data(long.as_bytes()),
        Seen::Ping,
        data("ä€".as_bytes()),
        data(b""),
    ];
    (bytes.concat(), seen)
}

/// The answers to the pings of [`talk`].
fn pongs() -> Vec<(u8, Vec<u8>)> {
    vec![(10, b"one".to_vec()), (10, b"two".to_vec()), (10, vec![9; 125])]
}

/// What a program sends: short and long, text and binary.
fn outbox() -> Vec<Outgoing> {
    vec![
        Outgoing::from("a"),
        Outgoing::from(vec![7_u8; 130]),
        Outgoing::from("b".repeat(40)),
        Outgoing::from(""),
        Outgoing::from(vec![1_u8, 2, 3]),
    ]
}

fn sent(message: &Outgoing) -> (u8, Vec<u8>) {
    match message.as_text() {
        Some(text) => (1, text.as_bytes().to_vec()),
        None => (2, message.as_bytes().to_vec()),
    }
}

#[test]
fn one_byte_at_a_time_says_the_same_as_all_at_once() {
    let (bytes, expected) = talk();
    let sizes = [Call::Some(1), Call::Some(2), Call::Some(usize::MAX)];
    for (usual, most) in sizes.iter().flat_map(|size| WAYS.map(|most| (*size, most))) {
        let (mut ws, wire) = open(&bytes);
        wire.borrow_mut().usual = (usual, usual);
        let mut seen = Vec::new();
        read_all(&mut ws, most, &mut seen).unwrap();
        assert!(ws.flush().unwrap());
        assert_eq!(seen, expected, "{usual:?}");
        assert_eq!(wire.borrow().frames(), (pongs(), 0), "{usual:?}");
    }
}

#[test]
fn a_run_ends_with_the_message_that_fills_256_kib() {
    const KIB: usize = 1024;
    // With their heads, 64 of them are as much as a run holds.
    let message = frame(0x82, &[7; 4 * KIB - 4]);
    let wire = Rc::new(RefCell::new(Wire::new(&message.repeat(150))));
    let limits = Limits { read_buffer: 1024 * KIB, ..LIMITS };
    let mut ws = Websocket::new(End(Rc::clone(&wire)), Vec::new(), limits);
    let mut runs = Vec::new();
    while runs.iter().sum::<usize>() < 150 {
        let mut seen = Vec::new();
        assert!(read_run(&mut ws, usize::MAX, &mut seen).unwrap().is_none(), "after {runs:?}");
        runs.push(seen.len());
    }
    assert_eq!(runs, [64, 64, 22]);
}

#[test]
fn a_stall_at_any_byte_loses_and_repeats_nothing() {
    let (bytes, expected) = talk();
    for (at, most) in (0..=bytes.len()).flat_map(|at| WAYS.map(|most| (at, most))) {
        let (mut ws, wire) = open(&bytes);
        wire.borrow_mut().reads = [vec![Call::Some(1); at], vec![Call::Stall; 3]].concat().into();
        let mut seen = Vec::new();
        // Three stalls are three times that nothing is there.
        for _ in 0..4 {
            read_all(&mut ws, most, &mut seen).unwrap();
        }
        assert_eq!(seen, expected, "stalled at byte {at}");
        assert!(ws.flush().unwrap());
        assert_eq!(wire.borrow().frames(), (pongs(), 0), "stalled at byte {at}");
    }
}

#[test]
fn a_reset_or_an_end_at_any_byte_is_told_after_all_that_came_whole() {
    let (bytes, expected) = talk();
    let ends = [
        Some(io::ErrorKind::ConnectionReset),
        Some(io::ErrorKind::BrokenPipe),
        Some(io::ErrorKind::TimedOut),
        None,
    ];
    let all = (0..=bytes.len()).flat_map(|at| ends.map(|end| (at, end)));
    for ((at, end), most) in all.flat_map(|one| WAYS.map(|most| (one, most))) {
        let (mut ws, wire) = open(&bytes[..at]);
        wire.borrow_mut().reads = vec![Call::Some(1); at].into();
        wire.borrow_mut().ends = true;
        if let Some(kind) = end {
            wire.borrow_mut().reads.push_back(Call::Fail(kind));
        }
        let mut seen = Vec::new();
        let error = read_all(&mut ws, most, &mut seen).unwrap_err();
        let kind = end.unwrap_or(io::ErrorKind::UnexpectedEof);
        assert_eq!(error.kind(), &ErrorKind::Io(kind), "at byte {at}");
        assert_eq!(seen, whole(&expected, &bytes[..at]), "at byte {at}");
        // A second look says no more than that it is over.
        let count = seen.len();
        let _ = read_all(&mut ws, most, &mut seen);
        assert_eq!(seen.len(), count, "at byte {at}");
    }
}

/// What of `expected` is known after these bytes: by its own count of frames.
fn whole(expected: &[Seen], mut bytes: &[u8]) -> Vec<Seen> {
    let mut count = 0;
    while let [first, len, rest @ ..] = bytes {
        let (len, rest) = match (len, rest) {
            (126, [a, b, rest @ ..]) => (usize::from(u16::from_be_bytes([*a, *b])), rest),
            (126, _) => break,
            (len, rest) => (usize::from(*len), rest),
        };
        if rest.len() < len {
            break;
        }
        // A fragment that more follow is nothing yet.
        count += usize::from(first & 0x80 != 0);
        bytes = &rest[len..];
    }
    expected[..count].to_vec()
}

/// Queues the whole outbox, flushing as room asks for it.
fn send_all(ws: &mut Websocket<End>, outbox: &[Outgoing]) -> Result<(), Error> {
    for message in outbox {
        while ws.send(message)? == Sent::Full {
            ws.flush()?;
        }
    }
    Ok(())
}

fn bytes_of(outbox: &[Outgoing]) -> usize {
    let (mut ws, wire) = open(&[]);
    send_all(&mut ws, outbox).unwrap();
    assert!(ws.flush().unwrap());
    wire.take().written.len()
}

#[test]
fn a_write_that_stops_at_any_byte_goes_on_where_it_stopped() {
    let outbox = outbox();
    let all: Vec<_> = outbox.iter().map(sent).collect();
    for at in 0..=bytes_of(&outbox) {
        let (mut ws, wire) = open(&[]);
        wire.borrow_mut().writes = vec![Call::Some(at), Call::Stall, Call::Stall].into();
        if at == 0 {
            wire.borrow_mut().writes.pop_front();
        }
        send_all(&mut ws, &outbox).unwrap();
        while !ws.flush().unwrap() {}
        assert_eq!(wire.borrow().frames(), (all.clone(), 0), "stopped at byte {at}");
        assert!(ws.take_unfinished().is_empty(), "stopped at byte {at}");
    }
}

#[test]
fn every_size_of_write_brings_each_message_once_and_in_order() {
    let outbox = outbox();
    let all: Vec<_> = outbox.iter().map(sent).collect();
    for size in 1..=bytes_of(&outbox) {
        let (mut ws, wire) = open(&[]);
        // Every call takes `size` bytes and the one behind it nothing.
        let calls = [Call::Some(size), Call::Stall].repeat(1 + bytes_of(&outbox) / size);
        wire.borrow_mut().writes = calls.into();
        send_all(&mut ws, &outbox).unwrap();
        while !ws.flush().unwrap() {}
        assert_eq!(wire.borrow().frames(), (all.clone(), 0), "{size} bytes at a time");
    }
}

#[test]
fn a_connection_cut_at_any_byte_gives_back_exactly_what_is_not_out_whole() {
    let outbox = outbox();
    for (at, cut) in
        (0..=bytes_of(&outbox)).flat_map(|at| [Call::Stall, RESET].map(|cut| (at, cut)))
    {
        let (mut ws, wire) = open(&[]);
        wire.borrow_mut().writes = vec![Call::Some(at)].into();
        wire.borrow_mut().usual.1 = cut;
        if at == 0 {
            wire.borrow_mut().writes.pop_front();
        }
        let sent_all = send_all(&mut ws, &outbox).and_then(|()| ws.flush());
        let all_out = at == bytes_of(&outbox);
        assert_eq!(sent_all.is_ok(), cut == Call::Stall || all_out, "cut at byte {at}");
        let left: Vec<_> = ws.take_unfinished().iter().map(sent).collect();
        let (whole, part) = wire.borrow().frames();
        let expected: Vec<_> = outbox.iter().map(sent).collect();
        assert_eq!(part > 0, !all_out && !ends_a_frame(&outbox, at), "cut at byte {at}");
        assert_eq!([whole, left].concat(), expected, "cut at byte {at}");
        assert!(ws.take_unfinished().is_empty(), "they are given back once");
    }
}

const RESET: Call = Call::Fail(io::ErrorKind::ConnectionReset);

fn ends_a_frame(outbox: &[Outgoing], at: usize) -> bool {
    (0..=outbox.len()).any(|count| bytes_of(&outbox[..count]) == at)
}

#[test]
fn a_backlog_above_the_buffer_is_written_once_wherever_the_socket_stops() {
    let outbox: Vec<_> = (0..8_u8).map(|n| Outgoing::from(vec![n; 40_000])).collect();
    let all: Vec<_> = outbox.iter().map(sent).collect();
    for at in (1..bytes_of(&outbox)).step_by(4999) {
        let (mut ws, wire) = open(&[]);
        let stalls = vec![Call::Stall; 6];
        wire.borrow_mut().writes = [vec![Call::Some(at)], stalls].concat().into();
        send_all(&mut ws, &outbox).unwrap();
        while !ws.flush().unwrap() {}
        assert!(wire.borrow().frames() == (all.clone(), 0), "stopped at byte {at}");
    }
}

/// A talk both ways in which every write takes one call of `writes`.
fn talk_both_ways(reads: Vec<Call>, writes: Vec<Call>) -> Rc<RefCell<Wire>> {
    let (bytes, expected) = talk();
    let outbox = outbox();
    let (mut ws, wire) = open(&bytes);
    wire.borrow_mut().reads = reads.into();
    wire.borrow_mut().writes = writes.into();
    let (mut seen, mut next) = (Vec::new(), 0);
    for _ in 0..SPINS {
        read_all(&mut ws, 100, &mut seen).unwrap();
        if let Some(message) = outbox.get(next) {
            next += usize::from(ws.send(message).unwrap() == Sent::Queued);
        } else if ws.flush().unwrap() && seen.len() == expected.len() {
            break;
        }
    }
    assert_eq!(seen, expected);
    assert!(ws.take_unfinished().is_empty());
    wire
}

#[test]
fn pongs_and_messages_mix_without_a_byte_too_much_at_every_stall() {
    for at in 0..120 {
        let mut writes = vec![Call::Some(3); at];
        writes.extend([Call::Stall; 5]);
        let wire = talk_both_ways(vec![Call::Some(7); 10], writes);
        let (frames, part) = wire.borrow().frames();
        let (control, data): (Vec<_>, Vec<_>) = frames.into_iter().partition(|f| f.0 >= 8);
        assert_eq!(part, 0, "stalled at call {at}");
        assert_eq!(control, pongs(), "each ping is answered once, stalled at call {at}");
        assert_eq!(data, outbox().iter().map(sent).collect::<Vec<_>>(), "stalled at call {at}");
    }
}

#[test]
fn a_pong_that_comes_late_says_what_the_last_ping_said() {
    let pings: Vec<_> = (0..10_000_u32).map(|n| n.to_be_bytes()).collect();
    let bytes: Vec<u8> = pings.iter().flat_map(|ping| frame(0x89, ping)).collect();
    let (mut ws, wire) = open(&bytes);
    wire.borrow_mut().usual.1 = Call::Stall;
    read_all(&mut ws, 0, &mut Vec::new()).unwrap();
    wire.borrow_mut().usual.1 = Call::Some(usize::MAX);
    while !ws.flush().unwrap() {}
    let (pongs, _) = wire.borrow().frames();
    assert!(pongs.len() < pings.len(), "some were left out");
    let said: Vec<_> = pongs.iter().map(|(_, payload)| payload.as_slice()).collect();
    assert_eq!(said.last(), Some(&&pings[9999][..]));
    let before = &said[..said.len() - 1];
    assert!(before.iter().zip(&pings).all(|(pong, ping)| pong == ping));
}

#[test]
fn a_pong_half_written_is_no_message_half_written() {
    let outbox = outbox();
    let pong = frame(0x8a, &[5; 60]).len() + 4;
    for at in 0..pong + bytes_of(&outbox) {
        let (mut ws, wire) = open(&frame(0x89, &[5; 60]));
        wire.borrow_mut().writes = vec![Call::Some(at)].into();
        wire.borrow_mut().usual.1 = Call::Stall;
        if at == 0 {
            wire.borrow_mut().writes.pop_front();
        }
        read_all(&mut ws, 0, &mut Vec::new()).unwrap();
        send_all(&mut ws, &outbox).unwrap();
        ws.flush().unwrap();
        let left: Vec<_> = ws.take_unfinished().iter().map(sent).collect();
        let (mut whole, _) = wire.borrow().frames();
        whole.retain(|(opcode, _)| *opcode < 8);
        let expected: Vec<_> = outbox.iter().map(sent).collect();
        assert_eq!([whole, left].concat(), expected, "cut at byte {at}");
    }
}

#[test]
fn the_servers_close_is_answered_once_however_the_writes_stall() {
    let bytes = [frame(0x81, b"last"), frame(0x88, &[3, 232, b'x'])].concat();
    for (at, most) in (0..12).flat_map(|at| WAYS.map(|most| (at, most))) {
        let (mut ws, wire) = open(&bytes);
        wire.borrow_mut().reads = vec![Call::Some(1); 20].into();
        wire.borrow_mut().writes = [vec![Call::Some(1); at], vec![Call::Stall; 2]].concat().into();
        let mut seen = Vec::new();
        let _ = read_all(&mut ws, most, &mut seen);
        for _ in 0..5 {
            let _ = ws.flush();
        }
        assert_eq!(seen, [Seen::Data(b"last".to_vec()), Seen::Close(1000)], "call {at}");
        let (frames, part) = wire.borrow().frames();
        assert_eq!(part, 0, "call {at}");
        assert_eq!(frames.iter().map(|(opcode, _)| *opcode).collect::<Vec<_>>(), [8], "call {at}");
        assert_eq!(frames[0].1[..2], [3, 232], "call {at}");
    }
}

#[test]
fn a_close_goes_out_whole_behind_what_was_queued_at_every_stall() {
    let outbox = outbox();
    let length = bytes_of(&outbox) + 8;
    for at in 1..length {
        let answer = frame(0x88, &[3, 232]);
        let (mut ws, wire) = open(&answer);
        wire.borrow_mut().writes = vec![Call::Some(at), Call::Stall, Call::Stall].into();
        send_all(&mut ws, &outbox).unwrap();
        ws.close(1000, "").unwrap();
        for _ in 0..4 {
            // The handshake may be over before the last flush: that is no loss.
            let _ = ws.flush();
        }
        let (frames, part) = wire.borrow().frames();
        assert_eq!(part, 0, "stalled at byte {at}");
        let expected: Vec<_> = outbox.iter().map(sent).collect();
        assert_eq!(frames[..outbox.len()], expected, "stalled at byte {at}");
        assert_eq!(frames[outbox.len()..], [(8, vec![3, 232])], "stalled at byte {at}");
        let mut seen = Vec::new();
        let _ = read_all(&mut ws, 100, &mut seen);
        assert_eq!(seen, [Seen::Close(1000)], "stalled at byte {at}");
    }
}

#[test]
fn nothing_is_queued_behind_a_close_frame() {
    let (mut ws, wire) = open(&frame(0x89, b"late"));
    ws.close(1000, "").unwrap();
    assert!(ws.send(&Outgoing::from("late")).is_err());
    assert!(ws.take_unfinished().is_empty());
    let _ = read_all(&mut ws, 0, &mut Vec::new());
    let _ = ws.flush();
    let (frames, part) = wire.borrow().frames();
    assert_eq!((frames.len(), part), (1, 0));
    assert_eq!(frames[0].0, 8);
}
