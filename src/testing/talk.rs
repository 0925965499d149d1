//! What arrives on a connection, what answers it, and how it ends.

use tungstenite::protocol::frame::coding::OpCode;

use super::frame::{self, Violation};
use super::now;
use super::peer::{End, GOODBYE, Peer, Phase};
use super::record::{Payload, Request};

const MAX_HEAD: usize = 64 << 10;
/// What arrived and no expectation has seen yet, when a script has any.
const MAX_INBOX: usize = 100_000;

/// What arrives.
impl Peer {
    pub(super) fn take_in(&mut self, len: usize) {
        if self.phase != Phase::Discard {
            self.decoder.feed(&self.buffer[..len]);
        }
        if self.phase == Phase::Frames {
            self.decode();
        } else if self.decoder.len() > MAX_HEAD {
            self.discard();
            self.shared.ledger.violation(self.id, "a request head over 64 KiB");
        }
    }

    /// From here on, what arrives is read and thrown away.
    pub(super) fn discard(&mut self) {
        self.phase = Phase::Discard;
        self.decoder.clear();
    }

    /// Waits for the upgrade request and records it.
    pub(super) fn request(&mut self) -> Result<Request, End> {
        let mut head = None;
        self.run_until(None, |peer| {
            head = peer.decoder.take_head();
            head.is_some()
        })?;
        let request = head.and_then(|head| Request::parse(self.id, &head));
        let Some(request) = request else {
            self.shared.ledger.violation(self.id, "a request that is not HTTP/1.1");
            return Err(End::Over);
        };
        self.shared.ledger.change(|record| record.requests.push(request.clone()));
        Ok(request)
    }

    pub(super) fn is_upgraded(&self) -> bool {
        self.phase == Phase::Frames
    }

    /// From here on, what arrives is frames; some may have arrived already.
    pub(super) fn upgraded(&mut self) {
        self.phase = Phase::Frames;
        self.handle.upgraded();
        self.shared.ledger.change(|record| record.stats.upgraded += 1);
        self.decode();
    }

    fn decode(&mut self) {
        while self.phase == Phase::Frames {
            match self.decoder.next() {
                Ok(Some(payload)) => self.receive(payload),
                Ok(None) => return,
                Err(violation) => self.refuse(&violation),
            }
        }
    }

    fn refuse(&mut self, violation: &Violation) {
        self.shared.ledger.violation(self.id, violation.what);
        self.discard();
        self.answer_close(violation.code, violation.what);
    }

    fn receive(&mut self, payload: Payload) {
        self.shared.ledger.receive(self.id, &payload);
        match &payload {
            Payload::Text(_) | Payload::Binary(_) if self.echoes => self.echo_back(&payload),
            Payload::Ping(bytes) if self.answers_pings => self.send_back(frame::PONG, bytes),
            Payload::Close(code, _) if self.answers_close || self.close_sent => {
                self.discard();
                self.answer_close(*code, "");
            }
            _ => {}
        }
        if self.keeps_inbox && !self.echoes {
            if self.inbox.len() == MAX_INBOX {
                self.inbox.pop_front();
            }
            self.inbox.push_back(payload);
        }
    }

    pub(super) fn echo_back(&mut self, payload: &Payload) {
        match payload {
            Payload::Text(text) => self.send_back(frame::TEXT, text.as_bytes()),
            Payload::Binary(bytes) => self.send_back(frame::BINARY, bytes),
            _ => {}
        }
    }

    fn answer_close(&mut self, code: u16, reason: &str) {
        if !self.close_sent {
            self.send_back(frame::CLOSE, &frame::close_payload(code, reason));
            self.close_sent = true;
        }
        self.over = true;
    }
}

/// What leaves.
impl Peer {
    fn send_back(&mut self, opcode: OpCode, payload: &[u8]) {
        self.reply(&frame::whole(opcode, payload));
    }

    pub(super) fn reply(&mut self, frame: &[u8]) {
        if self.mid_frame {
            self.deferred.extend_from_slice(frame);
        } else {
            self.out.gather(frame);
        }
    }

    pub(super) fn begin_frame(&mut self) {
        self.mid_frame = true;
    }

    pub(super) fn end_frame(&mut self) {
        self.mid_frame = false;
        self.out.gather(&std::mem::take(&mut self.deferred));
    }

    /// Sends what is waiting, as far as the client takes it in time.
    pub(super) fn flush(&mut self) -> Result<(), End> {
        self.run_until(Some(now() + GOODBYE), |peer| peer.out.is_empty()).map(drop)
    }

    /// FIN, with nothing said before it.
    pub(super) fn shutdown_write(&mut self) {
        self.write_closed = true;
        self.stream.shutdown_write();
    }

    /// Leaves as the script's end asks for.
    pub(super) fn leave(mut self, end: End) {
        let end = if end == End::Over { self.say_goodbye().err() } else { Some(end) };
        if end == Some(End::Cut) {
            self.stream.socket().reset_on_close();
        }
    }

    /// FIN, then everything up to the client's own FIN is read: closing a
    /// socket with unread bytes would send an RST instead.
    fn say_goodbye(&mut self) -> Result<(), End> {
        self.discard();
        (self.over, self.mute, self.reading, self.ping_every) = (false, false, true, None);
        self.flush()?;
        self.stream.close_notify();
        self.shutdown_write();
        self.run_until(Some(now() + GOODBYE), |_| false).map(drop)
    }
}
