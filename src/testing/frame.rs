//! Frames on the server's side of the wire: made with any shape a script asks
//! for, and read leniently enough to say what a client did wrong.

use std::io::Cursor;
use std::ops::Range;

use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Control, Data, OpCode};

use super::record::Payload;

/// The largest message that is taken from a client.
const MAX_MESSAGE: usize = 64 << 20;

pub(super) const TEXT: OpCode = OpCode::Data(Data::Text);
pub(super) const BINARY: OpCode = OpCode::Data(Data::Binary);
pub(super) const CONTINUE: OpCode = OpCode::Data(Data::Continue);
pub(super) const PING: OpCode = OpCode::Control(Control::Ping);
pub(super) const PONG: OpCode = OpCode::Control(Control::Pong);
pub(super) const CLOSE: OpCode = OpCode::Control(Control::Close);

/// Appends one unmasked frame to `out`.
pub(super) fn push(opcode: OpCode, is_final: bool, payload: &[u8], out: &mut Vec<u8>) {
    let header = FrameHeader { is_final, opcode, ..FrameHeader::default() };
    // Fails only when the writer does, and a Vec does not.
    let _infallible = header.format(payload.len() as u64, out);
    out.extend_from_slice(payload);
}

/// One whole message or control frame.
pub(super) fn whole(opcode: OpCode, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 10);
    push(opcode, true, payload, &mut out);
    out
}

/// The payload of a close frame; 1005 stands for "no code", as on the way in.
pub(super) fn close_payload(code: u16, reason: &str) -> Vec<u8> {
    if code == 1005 {
        return Vec::new();
    }
    [&code.to_be_bytes()[..], reason.as_bytes()].concat()
}

/// One text message cut into `parts` frames of about the same size.
pub(super) fn fragmented(text: &str, parts: usize) -> Vec<u8> {
    let parts = parts.max(1);
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len() + parts * 10);
    for part in 0..parts {
        let opcode = if part == 0 { TEXT } else { CONTINUE };
        push(opcode, part + 1 == parts, &bytes[slice_of(bytes.len(), part, parts)], &mut out);
    }
    out
}

fn slice_of(len: usize, part: usize, parts: usize) -> Range<usize> {
    len * part / parts..len * (part + 1) / parts
}

/// What a client did that RFC 6455 forbids, and the close code that answers it.
#[derive(Debug)]
pub(super) struct Violation {
    pub(super) code: u16,
    pub(super) what: &'static str,
}

fn violation<T>(code: u16, what: &'static str) -> Result<T, Violation> {
    Err(Violation { code, what })
}

struct RawFrame {
    header: FrameHeader,
    payload: Vec<u8>,
}

/// Turns the bytes of a client into whole messages and control frames.
#[derive(Default)]
pub(super) struct Decoder {
    buffer: Vec<u8>,
    /// Where the first byte that was not used yet stands in `buffer`.
    start: usize,
    /// A message that has begun: is it text, and its bytes so far.
    partial: Option<(bool, Vec<u8>)>,
}

impl Decoder {
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        // Moved to the front only once half is used: each byte moves at most once.
        if self.start > self.buffer.len() / 2 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    pub(super) fn clear(&mut self) {
        self.buffer.clear();
        self.start = 0;
    }

    pub(super) fn len(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// The head of an HTTP request, once its empty line has arrived.
    pub(super) fn take_head(&mut self) -> Option<Vec<u8>> {
        let rest = &self.buffer[self.start..];
        let end = rest.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
        let head = rest[..end].to_vec();
        self.start += end;
        Some(head)
    }

    /// The next message or control frame, if it has arrived whole.
    pub(super) fn next(&mut self) -> Result<Option<Payload>, Violation> {
        while let Some(frame) = self.next_frame()? {
            if let Some(payload) = self.assemble(frame)? {
                return Ok(Some(payload));
            }
        }
        Ok(None)
    }

    fn next_frame(&mut self) -> Result<Option<RawFrame>, Violation> {
        let mut cursor = Cursor::new(&self.buffer[self.start..]);
        let Ok(parsed) = FrameHeader::parse(&mut cursor) else {
            return violation(1002, "a frame with a reserved opcode");
        };
        let Some((header, len)) = parsed else { return Ok(None) };
        check(&header, len)?;
        let begin = self.start + cursor.position() as usize;
        let end = begin + len as usize;
        if self.buffer.len() < end {
            return Ok(None);
        }
        let mut payload = self.buffer[begin..end].to_vec();
        unmask(&mut payload, header.mask.unwrap_or_default());
        self.start = end;
        Ok(Some(RawFrame { header, payload }))
    }

    fn assemble(&mut self, frame: RawFrame) -> Result<Option<Payload>, Violation> {
        let RawFrame { header, payload } = frame;
        match (header.opcode, self.partial.take()) {
            (OpCode::Control(control), partial) => {
                self.partial = partial;
                control_payload(control, payload).map(Some)
            }
            (CONTINUE, None) => violation(1002, "a continuation of nothing"),
            (CONTINUE, Some((text, mut bytes))) => {
                bytes.extend_from_slice(&payload);
                self.finish(text, bytes, header.is_final)
            }
            (_, Some(_)) => violation(1002, "a new message inside a fragmented one"),
            (opcode, None) => self.finish(opcode == TEXT, payload, header.is_final),
        }
    }

    fn finish(
        &mut self,
        text: bool,
        bytes: Vec<u8>,
        is_final: bool,
    ) -> Result<Option<Payload>, Violation> {
        if bytes.len() > MAX_MESSAGE {
            return violation(1009, "a message over 64 MiB");
        }
        if !is_final {
            self.partial = Some((text, bytes));
            return Ok(None);
        }
        if !text {
            return Ok(Some(Payload::Binary(bytes)));
        }
        valid_utf8(bytes).map(|text| Some(Payload::Text(text)))
    }
}

fn check(header: &FrameHeader, len: u64) -> Result<(), Violation> {
    let is_control = matches!(header.opcode, OpCode::Control(_));
    if header.mask.is_none() {
        return violation(1002, "a frame without a mask");
    }
    if header.rsv1 || header.rsv2 || header.rsv3 {
        return violation(1002, "a frame with a reserved bit");
    }
    if is_control && (len > 125 || !header.is_final) {
        return violation(1002, "a control frame that is long or fragmented");
    }
    if len > MAX_MESSAGE as u64 {
        return violation(1009, "a frame over 64 MiB");
    }
    Ok(())
}

fn control_payload(control: Control, payload: Vec<u8>) -> Result<Payload, Violation> {
    Ok(match control {
        Control::Ping => Payload::Ping(payload),
        Control::Pong => Payload::Pong(payload),
        _ => match payload.split_first_chunk() {
            None if payload.is_empty() => Payload::Close(1005, String::new()),
            None => return violation(1002, "a close frame of one byte"),
            Some((code, reason)) => {
                Payload::Close(u16::from_be_bytes(*code), valid_utf8(reason.to_vec())?)
            }
        },
    })
}

fn valid_utf8(bytes: Vec<u8>) -> Result<String, Violation> {
    String::from_utf8(bytes).or_else(|_| violation(1007, "text that is not UTF-8"))
}

fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let mut words = payload.chunks_exact_mut(4);
    for word in &mut words {
        for (byte, key) in word.iter_mut().zip(mask) {
            *byte ^= key;
        }
    }
    for (byte, key) in words.into_remainder().iter_mut().zip(mask) {
        *byte ^= key;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [1, 2, 3, 4];
        let mut bytes = payload.to_vec();
        unmask(&mut bytes, mask);
        [&[first, 0x80 | payload.len() as u8][..], &mask, &bytes].concat()
    }

    #[test]
    fn fragments_with_a_ping_between_them_become_one_message() {
        let mut decoder = Decoder::default();
        for byte in [masked(0x01, b"he"), masked(0x89, b"?"), masked(0x80, b"llo")].concat() {
            decoder.feed(&[byte]);
        }
        assert_eq!(decoder.next().unwrap(), Some(Payload::Ping(b"?".to_vec())));
        assert_eq!(decoder.next().unwrap(), Some(Payload::Text("hello".into())));
        assert_eq!(decoder.next().unwrap(), None);
        assert_eq!(decoder.len(), 0);
    }

    #[test]
    fn each_violation_has_its_close_code() {
        for (bytes, code) in [
            (vec![0x81, 0x01, b'x'], 1002),
            (masked(0xC1, b"x"), 1002),
            (masked(0x83, b"x"), 1002),
            (masked(0x80, b"x"), 1002),
            (masked(0x09, b"x"), 1002),
            (masked(0x88, b"x"), 1002),
            (masked(0x81, &[0xFF]), 1007),
            ([&[0x82, 0xFF][..], &(1u64 << 40).to_be_bytes(), &[0; 4]].concat(), 1009),
        ] {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            assert_eq!(decoder.next().unwrap_err().code, code, "{bytes:?}");
        }
    }

    #[test]
    fn fragments_share_the_bytes_between_them() {
        let wire = fragmented("abcdefg", 3);
        assert_eq!(wire, b"\x01\x02ab\x00\x02cd\x80\x03efg");
    }
}
