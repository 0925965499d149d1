//! What is read from a socket, frame by frame: the common frame is found in the
//! buffer, everything else goes to tungstenite, byte for byte.
//!
//! Most frames of a feed are whole messages from the server. Such a frame needs
//! no more than its head and, for a text, a look at its UTF-8; a look at the
//! buffer is several times faster than a way through tungstenite. Control
//! frames, fragments and breaches of the protocol are left to it: it sees
//! exactly the bytes of those frames, so its state stays true.

use std::io::{self, Read, Write};

use super::frame::{Head, WHOLE_BINARY, WHOLE_TEXT, head};
use crate::block::{BLANK, Entry, Run, Spares};

/// What an idle connection's buffer shrinks to.
const SMALL: usize = 1024;

/// A run of so many bytes is copied, though a buffer waits, and so is one that is
/// less than this part of the buffer: else little would hold much.
const COPIED: usize = 4096;
const COPIED_PART: usize = 8;

/// Memory that a server's word for the length of a message is good for; what is
/// larger grows with what arrives.
const TRUSTED: usize = 64 << 20;

/// A run ends with the message that fills so much: larger blocks would be coarse
/// for a queue that is bounded in bytes.
const RUN_BYTES: usize = 256 * 1024;

/// Messages that are entered together.
const GROUP: usize = 32;

/// The opcode of a close frame (RFC 6455, section 5.2).
const CLOSE: u8 = 8;

/// The first byte of a ping.
const PING: u8 = 0x89;

/// A stream with a read buffer, which shows tungstenite one frame at a time.
#[derive(Debug)]
pub(super) struct Feed<S> {
    stream: S,
    /// Read and not taken yet: `buffer[start..end]`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// The whole messages found last lie in `buffer[run..start]`, each where
    /// its entry says.
    run: usize,
    entries: Vec<Entry>,
    /// Whether they are of one kind, and the bytes of their heads.
    alike: bool,
    heads: usize,
    /// Buffers to go on with while blocks keep theirs; from the first of these on.
    spares: Option<Spares>,
    /// The buffer may grow to this.
    largest: usize,
    /// Bytes that are tungstenite's to read.
    passed: u64,
    /// The bytes of a close frame, as far as they were passed.
    close: Vec<u8>,
    closes: bool,
    /// Pings are shown to the caller, and not to tungstenite, which answers.
    holds_pings: bool,
    /// A fragmented message is open: even a whole frame is a breach then.
    fragments: bool,
    /// A message that is larger than the buffer, being gathered.
    large: Option<Large>,
    /// Bytes written, before any encryption.
    written: u64,
    /// Messages may have this many bytes.
    limit: usize,
}

/// A whole frame whose payload is read into memory of its own.
#[derive(Debug)]
struct Large {
    text: bool,
    /// As much of it as there is memory for yet.
    payload: Vec<u8>,
    filled: usize,
    len: usize,
}

/// What comes next in the stream.
pub(super) enum Next {
    /// A whole message in the buffer: its payload is [`Feed::payload`] of this.
    Whole { text: bool, start: usize, len: usize },
    /// A whole message of its own.
    Large { text: bool, payload: Vec<u8> },
    /// A ping that is held back: its payload is [`Feed::payload`] of this.
    Ping { start: usize, len: usize },
    /// Bytes for tungstenite to read.
    Passed,
}

impl<S: Read> Feed<S> {
    /// Takes over a stream; `rest` was read already.
    pub(super) fn new(stream: S, rest: Vec<u8>, largest: usize, limit: usize) -> Self {
        let end = rest.len();
        let mut buffer = rest;
        buffer.resize(end.max(SMALL.min(largest)), 0);
        Self {
            stream,
            buffer,
            start: 0,
            end,
            run: 0,
            entries: Vec::new(),
            alike: true,
            heads: 0,
            spares: None,
            largest,
            passed: 0,
            close: Vec::new(),
            closes: false,
            holds_pings: false,
            fragments: false,
            large: None,
            written: 0,
            // No memory is larger, so a head and a length are a number still.
            limit: limit.min(isize::MAX as usize),
        }
    }

    /// Finds whole messages that lie one behind the other, up to `most`, reading
    /// as long as there is more and room for it. They are [`take_run`]'s
    /// (Self::take_run) even after an error, which may be `WouldBlock`. When there
    /// is none, what comes is [`next`](Self::next)'s to find.
    pub(super) fn find_run(&mut self, most: usize) -> io::Result<()> {
        self.entries.clear();
        (self.alike, self.heads) = (true, 0);
        if let Some(spares) = &self.spares {
            spares.count_look();
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        self.run = self.start;
        if self.passed > 0 || self.large.is_some() || self.fragments {
            return Ok(());
        }
        loop {
            if !self.walk(most) {
                return Ok(());
            }
            if self.end == self.buffer.len() {
                if self.start > 0 && self.entries.is_empty() {
                    self.make_room(self.end - self.start + 1);
                    self.run = self.start;
                } else if self.entries.len() * 2 < most && self.buffer.len() < self.largest {
                    // To hand over a block wakes a thread: many should share that.
                    self.grow();
                } else {
                    return Ok(());
                }
            }
            if self.read_on()? == 0 {
                // The stream has ended: tungstenite judges by what went before.
                if self.entries.is_empty() {
                    self.pass_all();
                }
                return Ok(());
            }
        }
    }

    /// Whether [`find_run`](Self::find_run) found none.
    pub(super) fn run_is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Enters the whole messages that are in the buffer; whether more bytes may
    /// bring another.
    fn walk(&mut self, most: usize) -> bool {
        let enough = self.run + RUN_BYTES;
        let mut group = [Entry::NONE; GROUP];
        loop {
            self.walk_alike(most, enough, &mut group);
            let at = self.start;
            if self.entries.len() >= most || at >= enough {
                return false;
            }
            let buffer = &mut self.buffer[..self.end];
            match head(&buffer[at..]) {
                Head::Whole { text, header, payload } if payload <= self.limit as u64 => {
                    if payload > (buffer.len() - at - header) as u64 {
                        return true;
                    }
                    let start = at + header;
                    // It is not longer than the buffer.
                    let len = payload as usize;
                    buffer[at..start].fill(BLANK);
                    self.alike &= self.entries.first().is_none_or(|e| e.is_text() == text);
                    self.heads += header;
                    self.entries.push(Entry::in_run(text, start, len, self.entries.len()));
                    self.start = start + len;
                }
                Head::Short => return true,
                _ => return false,
            }
        }
    }

    /// The same for the most common of them, in a loop that has little to ask:
    /// messages of one kind and up to 64 KiB, as long as they end before there is
    /// `enough`. They are entered a `group` at a time: to push each would ask each
    /// time whether there is room.
    fn walk_alike(&mut self, most: usize, enough: usize, group: &mut [Entry; GROUP]) {
        let stop = enough.min(self.end);
        let Some(mut rest) = self.buffer.get_mut(self.start..stop) else { return };
        let text = rest.first() == Some(&WHOLE_TEXT);
        let whole = if text { WHOLE_TEXT } else { WHOLE_BINARY };
        // What two bytes of head may say, and what four.
        let short = self.limit.min(125) as u8;
        let long = self.limit.min(usize::from(u16::MAX)) as u16;
        let before = self.entries.len();
        let (mut at, mut number, mut longs) = (self.start, before, 0);
        // The length of all messages of the last group, if they were short and it was
        // one: then where the next ones begin is known before their heads are read.
        let mut same = None;
        loop {
            let (first, from) = (number, at);
            let room = &mut group[..GROUP.min(most - first)];
            if let Some(len) = same {
                let head = [whole, len];
                let len = usize::from(len);
                for (frame, entry) in rest.chunks_exact_mut(2 + len).zip(room) {
                    if frame[..2] != head {
                        break;
                    }
                    frame[..2].fill(BLANK);
                    *entry = Entry::short(text, at + 2, len, number);
                    at += 2 + len;
                    number += 1;
                }
                rest = &mut rest[at - from..];
            } else {
                for entry in room {
                    let bytes = std::mem::take(&mut rest);
                    let cut = match *bytes {
                        [first, len, ..] if first == whole && len <= short => {
                            blank::<2>(bytes, len.into())
                        }
                        [first, 126, high, low, ..]
                            if first == whole && u16::from_be_bytes([high, low]) <= long =>
                        {
                            let cut = blank::<4>(bytes, u16::from_be_bytes([high, low]).into());
                            longs += usize::from(cut.is_some());
                            cut
                        }
                        _ => break,
                    };
                    let Some((head, len, behind)) = cut else { break };
                    *entry = Entry::short(text, at + head, len, number);
                    at += head + len;
                    number += 1;
                    rest = behind;
                }
            }
            self.entries.extend_from_slice(&group[..number - first]);
            if number - first == GROUP {
                let len = group[GROUP - 1].range().len();
                same = (len <= usize::from(short) && at - from == GROUP * (2 + len))
                    .then_some(len as u8);
            } else if same.take().is_none() {
                break;
            }
        }
        if number > before {
            self.alike &= self.entries[0].is_text() == text;
        }
        self.start = at;
        self.heads += 2 * (number - before) + 2 * longs;
    }

    /// The messages that [`find_run`](Self::find_run) found, while they are still in
    /// the buffer: where the first begins, all bytes from there on, and where in the
    /// buffer each is.
    pub(super) fn run(&self) -> (usize, &[u8], &[Entry]) {
        (self.run, &self.buffer[self.run..self.start], &self.entries)
    }

    /// The messages that [`find_run`](Self::find_run) found. They take the buffer
    /// along, and reading goes on in another one, if they are most of it, or if
    /// one that was given back is there; a copy of a few is cheaper, and so is one
    /// of less than what lies behind them. So memory is made for blocks that use
    /// it, and what waits is used by those that come.
    pub(super) fn take_run(&mut self) -> Run {
        let (from, to) = (self.run, self.start);
        let (alike, payload) = (self.alike, to - from - self.heads);
        let rest = self.end - to;
        self.run = to;
        let most = (to - from) * 2 >= self.buffer.len() && self.buffer.len() > SMALL;
        if most {
            self.spares.get_or_insert_default();
        }
        let little = COPIED.max(rest).max(self.buffer.len() / COPIED_PART);
        let spares = self.spares.as_ref().filter(|_| most || to - from > little);
        let Some((spare, home)) = spares.and_then(|s| Some((s.take(most)?, s.home()))) else {
            let bytes = self.buffer[from..to].to_vec();
            let entries = self.entries.drain(..).map(|entry| entry.moved(from)).collect();
            let (part, ids) = (0..to - from, Vec::new());
            return Run { bytes, part, entries, alike, payload, ids, home: None };
        };
        if from > 0 {
            self.entries.iter_mut().for_each(|entry| *entry = entry.moved(from));
        }
        let mut next = spare.bytes;
        match next.is_empty() {
            // Fresh memory of the system is clear already.
            true => next = vec![0; self.buffer.len()],
            false => next.resize(self.buffer.len(), 0),
        }
        next[..rest].copy_from_slice(&self.buffer[to..self.end]);
        let bytes = std::mem::replace(&mut self.buffer, next);
        (self.start, self.end, self.run) = (0, rest, 0);
        let entries = std::mem::replace(&mut self.entries, spare.entries);
        Run { bytes, part: from..to, entries, alike, payload, ids: spare.ids, home: Some(home) }
    }

    /// Finds what comes next, reading as needed; an error may be `WouldBlock`.
    pub(super) fn next(&mut self) -> io::Result<Next> {
        loop {
            if self.passed > 0 {
                return Ok(Next::Passed);
            }
            if self.large.is_some() {
                match self.fill_large()? {
                    Some(large) => return Ok(large),
                    None => continue,
                }
            }
            match head(&self.buffer[self.start..self.end]) {
                Head::Whole { text, header, payload } if !self.fragments && self.fits(payload) => {
                    // It fits into memory, so it fits into a usize.
                    let len = payload as usize;
                    if self.end - self.start >= header + len {
                        let start = self.start + header;
                        self.start = start + len;
                        return Ok(Next::Whole { text, start, len });
                    }
                    if header + len > self.largest {
                        self.begin_large(text, header, len);
                        continue;
                    }
                    self.make_room(header + len);
                }
                Head::Whole { header, payload, .. } => self.pass(header, payload, Some(false)),
                // Neither too long nor masked, or it is for tungstenite to refuse.
                Head::Other { header: 2, payload, .. } if self.is_held(payload) => {
                    let len = payload as usize;
                    if self.end - self.start >= 2 + len {
                        let start = self.start + 2;
                        self.start = start + len;
                        return Ok(Next::Ping { start, len });
                    }
                    self.make_room(2 + len);
                }
                Head::Other { header, payload, open } => self.pass(header, payload, open),
                Head::Short => {}
            }
            if self.passed == 0 && self.fill()? == 0 {
                // The stream has ended: tungstenite judges by what went before.
                self.pass_all();
            }
        }
    }

    /// The payload of a whole message or ping that [`next`](Self::next) found last.
    pub(super) fn payload(&self, start: usize, len: usize) -> &[u8] {
        &self.buffer[start..start + len]
    }

    /// Whether bytes wait for tungstenite, or will when they have arrived.
    pub(super) fn is_passing(&self) -> bool {
        self.passed > 0
    }

    /// Code and reason of the close frame that was passed.
    pub(super) fn close_frame(&self) -> Option<(u16, &[u8])> {
        match self.close.as_slice() {
            &[_, _, high, low, ref reason @ ..] => Some((u16::from_be_bytes([high, low]), reason)),
            _ => None,
        }
    }

    /// Everything from here on is tungstenite's.
    pub(super) fn pass_all(&mut self) {
        self.passed = u64::MAX;
        self.closes = false;
    }

    /// From here on, pings are shown to the caller, or to tungstenite again.
    pub(super) fn hold_pings(&mut self, hold: bool) {
        self.holds_pings = hold;
    }

    /// Lets go of a large buffer that nothing waits in.
    pub(super) fn shrink(&mut self) {
        if self.start == self.end && self.buffer.len() > SMALL {
            (self.start, self.end) = (0, 0);
            self.buffer = vec![0; SMALL.min(self.largest)];
            self.entries = Vec::new();
            self.spares = None;
        }
    }

    pub(super) fn stream(&self) -> &S {
        &self.stream
    }

    pub(super) fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// One over the limit is for tungstenite to refuse, by its head.
    fn fits(&self, payload: u64) -> bool {
        payload <= self.limit as u64
    }

    /// Whether the frame at the start is a ping to hold back.
    fn is_held(&self, payload: u64) -> bool {
        self.holds_pings && self.buffer[self.start] == PING && payload <= 125
    }

    fn pass(&mut self, header: usize, payload: u64, open: Option<bool>) {
        self.passed = payload.saturating_add(header as u64);
        self.closes = self.buffer[self.start] & 0x0f == CLOSE && payload <= 125;
        self.fragments = open.unwrap_or(self.fragments);
    }

    /// Reads what fits behind what is buffered.
    fn fill(&mut self) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.end == self.buffer.len() {
            self.make_room(self.end - self.start + 1);
        }
        self.read_on()
    }

    /// Reads into the room behind what is buffered, of which there is some. A
    /// buffer that was filled to the brim is too small for this feed.
    fn read_on(&mut self) -> io::Result<usize> {
        let space = self.buffer.len() - self.end;
        let count = self.stream.read(&mut self.buffer[self.end..])?;
        self.end += count;
        if count == space && self.buffer.len() < self.largest {
            self.grow();
        }
        Ok(count)
    }

    fn grow(&mut self) {
        self.buffer.resize((self.buffer.len() * 2).min(self.largest), 0);
    }

    /// Moves what is buffered to the front, and makes the buffer hold `len`.
    fn make_room(&mut self, len: usize) {
        if self.start > 0 && self.buffer.len() - self.start < len {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.buffer.len() < len {
            let size = len.next_power_of_two().min(self.largest).max(len);
            self.buffer.resize(size, 0);
        }
    }

    fn begin_large(&mut self, text: bool, header: usize, len: usize) {
        // Zeroed pages are taken from the system as they fill, not before.
        let mut payload = vec![0; len.min(TRUSTED.max(self.largest))];
        let have = self.end - self.start - header;
        let from = self.start + header;
        payload[..have].copy_from_slice(&self.buffer[from..self.end]);
        (self.start, self.end) = (0, 0);
        self.large = Some(Large { text, payload, filled: have, len });
    }

    /// Reads into a large message; `None` when the stream ended in it.
    fn fill_large(&mut self) -> io::Result<Option<Next>> {
        let Some(large) = &mut self.large else { return Ok(None) };
        while large.filled < large.len {
            if large.filled == large.payload.len() {
                large.payload.resize(large.len.min(large.filled.saturating_mul(2)), 0);
            }
            let count = self.stream.read(&mut large.payload[large.filled..])?;
            if count == 0 {
                self.large = None;
                self.pass_all();
                return Ok(None);
            }
            large.filled += count;
        }
        Ok(self.large.take().map(|large| Next::Large { text: large.text, payload: large.payload }))
    }
}

/// Blanks the head of a frame, if all of the frame is there; how long the head is,
/// the payload, and what lies behind that.
#[inline(always)]
fn blank<const HEAD: usize>(bytes: &mut [u8], len: usize) -> Option<(usize, usize, &mut [u8])> {
    let (frame, behind) = bytes.split_at_mut_checked(HEAD + len)?;
    frame[..HEAD].fill(BLANK);
    Some((HEAD, len, behind))
}

impl<S: Read> Read for Feed<S> {
    /// What tungstenite sees: the bytes passed to it, and then nothing yet.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.passed == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.start == self.end && self.fill()? == 0 {
            self.pass_all();
            return Ok(0);
        }
        let most = usize::try_from(self.passed).unwrap_or(usize::MAX);
        let count = most.min(buf.len()).min(self.end - self.start);
        buf[..count].copy_from_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
        if self.closes {
            self.close.extend_from_slice(&buf[..count]);
        }
        if self.passed != u64::MAX {
            self.passed -= count as u64;
        }
        Ok(count)
    }
}

impl<S: Write> Write for Feed<S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let count = self.stream.write(buf)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockBuilder;
    use proptest::prelude::*;

    const LARGEST: usize = 256 * 1024;

    /// A stream that would block after each of these.
    struct Pieces(Vec<Vec<u8>>);

    impl Read for Pieces {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let Some(piece) = self.0.first_mut() else { return Ok(0) };
            if piece.is_empty() {
                self.0.remove(0);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let count = buf.len().min(piece.len());
            buf[..count].copy_from_slice(&piece[..count]);
            piece.drain(..count);
            Ok(count)
        }
    }

    /// Frames of texts of this length.
    fn frames(count: usize, len: u16) -> Vec<u8> {
        let mut frame = vec![0x81, len.min(126) as u8];
        if len >= 126 {
            frame.extend(len.to_be_bytes());
        }
        frame.resize(frame.len() + usize::from(len), b'x');
        frame.repeat(count)
    }

    /// How many messages each run brought, and the largest buffer.
    fn runs(feed: &mut Feed<&[u8]>) -> (Vec<usize>, usize) {
        let (mut runs, mut largest) = (Vec::new(), 0);
        loop {
            feed.find_run(4096).unwrap();
            largest = largest.max(feed.buffer.len());
            if feed.run_is_empty() {
                return (runs, largest);
            }
            let run = feed.take_run();
            assert!(run.bytes.len() < RUN_BYTES + 70_000);
            runs.push(run.entries.len());
        }
    }

    #[test]
    fn large_messages_are_handed_over_by_the_dozen() {
        for (len, at_least) in [(4_000, 32), (16_000, 12), (60_000, 3)] {
            let bytes = frames(400, len);
            let mut feed = Feed::new(&bytes[..], Vec::new(), LARGEST, usize::MAX);
            let (runs, largest) = runs(&mut feed);
            assert_eq!(runs.iter().sum::<usize>(), 400);
            assert!(runs.len() <= 400 / at_least + 10, "{runs:?}");
            assert_eq!(largest, LARGEST);
        }
    }

    #[test]
    fn a_small_run_is_copied_unless_a_buffer_waits() {
        let ping = [vec![0x89, 0], frames(2, 5_000)].concat();
        // Less of a message than there is before it, and more.
        let (less, more) = (frames(1, 6_000), frames(1, 20_000));
        let [some, large, little] = [5_000, 17_000, 2_000].map(|len| frames(2, len));
        let pieces = [
            &some[..],
            &large,
            &some,
            &some,
            &little,
            &ping,
            &[&some[..], &less[..5_000]].concat(),
            &less[5_000..],
            &[&some[..], &more[..12_000]].concat(),
            &more[12_000..],
        ];
        let pieces = pieces.map(<[u8]>::to_vec).into();
        let mut feed = Feed::new(Pieces(pieces), Vec::new(), 64 * 1024, usize::MAX);
        feed.hold_pings(true);
        feed.make_room(64 * 1024);
        let mut take = |what: &str, count: usize, taken: bool| {
            let blocked = |end: io::Result<()>| {
                end.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
            };
            if !blocked(feed.find_run(4096)) && feed.run_is_empty() {
                assert!(matches!(feed.next(), Ok(Next::Ping { .. })), "{what}");
                assert!(blocked(feed.find_run(4096)), "{what}");
            }
            let (at, run) = (feed.buffer.as_ptr(), feed.take_run());
            let bytes = &run.bytes[run.part.clone()];
            let sound = |entry: &Entry| bytes[entry.range()].iter().all(|byte| *byte == b'x');
            assert!(run.entries.iter().all(sound), "{what}");
            assert_eq!((run.entries.len(), run.bytes.as_ptr() == at), (count, taken), "{what}");
            let mut block = BlockBuilder::new(0, 1, crate::io::clock::Clock::real().now());
            block.adopt(run, 1).unwrap();
            block
        };
        drop(take("none waits", 2, false));
        let block = take("it is most of the buffer", 2, true);
        drop(take("the other is still away", 2, false));
        drop(block);
        drop(take("one is back", 2, true));
        drop(take("too little", 2, false));
        drop(take("behind a ping", 2, true));
        drop(take("more than what lies behind", 2, true));
        drop(take("little, with a part that was moved", 1, false));
        drop(take("less than what lies behind", 2, false));
        drop(take("the whole", 1, true));
    }

    #[test]
    fn a_run_ends_with_the_message_that_makes_it_large_enough() {
        let bytes = frames(100, 10_000);
        let mut feed = Feed::new(&b""[..], bytes, 4 * LARGEST, usize::MAX);
        let (runs, _) = runs(&mut feed);
        assert_eq!(runs, [27, 27, 27, 19], "of {RUN_BYTES} bytes and one message at most");
    }

    /// Frames of one kind and length, one behind the other: long enough rows that
    /// groups of them are found.
    fn row() -> impl Strategy<Value = (bool, usize, usize)> {
        let len = prop_oneof![0..4_usize, 60..64_usize, 120..132_usize, 65_530..65_540_usize];
        let rows = (any::<bool>(), len, 1..150_usize);
        rows.prop_map(|(text, len, count)| (text, len, if len > 1000 { 1 } else { count }))
    }

    proptest! {
        #[test]
        fn rows_of_frames_are_found_as_they_were_sent(
            rows in proptest::collection::vec(row(), 1..12),
            most in prop_oneof![1..200_usize, Just(4096)],
            piece in prop_oneof![1..5000_usize, Just(200_000)],
        ) {
            let (mut sent, mut bytes) = (Vec::new(), Vec::new());
            for (text, len, count) in rows {
                for _ in 0..count {
                    bytes.push(if text { WHOLE_TEXT } else { WHOLE_BINARY });
                    match len {
                        0..126 => bytes.push(len as u8),
                        126..65_536 => {
                            bytes.push(126);
                            bytes.extend((len as u16).to_be_bytes());
                        }
                        _ => {
                            bytes.push(127);
                            bytes.extend((len as u64).to_be_bytes());
                        }
                    }
                    // No two alike, and none with what could be a head.
                    let payload = (0..len).map(|n| b'a' + ((sent.len() >> (n % 4)) % 26) as u8);
                    let payload: Vec<u8> = payload.collect();
                    bytes.extend_from_slice(&payload);
                    sent.push((text, payload));
                }
            }
            let pieces = bytes.chunks(piece).flat_map(|piece| [piece.to_vec(), Vec::new()]);
            let mut feed = Feed::new(Pieces(pieces.collect()), Vec::new(), LARGEST, usize::MAX);
            let mut found = Vec::new();
            while found.len() < sent.len() {
                let blocked = feed.find_run(most).is_err();
                if feed.run_is_empty() {
                    prop_assert!(blocked, "no more than this: {}", found.len());
                    continue;
                }
                let run = feed.take_run();
                prop_assert!(run.entries.len() <= most);
                let bytes = &run.bytes[run.part];
                let mut payload = 0;
                for (number, entry) in run.entries.iter().enumerate() {
                    prop_assert_eq!(entry.sequence as usize, number);
                    found.push((entry.is_text(), bytes[entry.range()].to_vec()));
                    payload += entry.range().len();
                }
                let texts = run.entries.iter().filter(|entry| entry.is_text()).count();
                prop_assert_eq!(run.alike, texts == 0 || texts == run.entries.len());
                prop_assert_eq!(run.payload, payload);
                let blank = bytes.iter().filter(|byte| **byte == BLANK).count();
                prop_assert_eq!(blank, bytes.len() - payload, "all heads are blank");
            }
            prop_assert_eq!(found, sent);
        }
    }
}
