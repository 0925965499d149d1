//! Runs a script on a connection: each step is a few lines that say what to
//! send and what to wait for.

use std::time::Duration;

use tungstenite::Bytes;

use super::feed::Feed;
use super::frame;
use super::now;
use super::peer::{End, GOODBYE, Peer};
use super::record::Payload;
use super::script::{Make, Script, Step};
use super::upgrade::Upgrade;

/// Size of the writes of floods.
const CHUNK: usize = 64 << 10;
/// The next chunk is made when less than this is waiting to be sent.
const LOW_WATER: usize = 256 << 10;
/// Below this, what is sent shares a write with what comes after it.
const SMALL: usize = 4 << 10;
/// How many messages of a feed are claimed at once.
const CLAIM: u64 = 64;

/// Runs the script, then leaves as its ending asks for.
pub(super) fn play(mut peer: Peer, script: &Script) {
    let steps = script.steps().iter();
    let end = steps.map(|step| take(&mut peer, step)).find_map(Result::err);
    let end = end.unwrap_or_else(|| match peer.secure() {
        Ok(()) => peer.hold(),
        Err(end) => end,
    });
    peer.leave(end);
}

fn take(peer: &mut Peer, step: &Step) -> Result<(), End> {
    if !comes_before_tls(step) {
        peer.secure()?;
    }
    match step {
        Step::Refuse => Err(End::Cut),
        Step::Silent => peer.fall_silent(),
        Step::SilentInTls | Step::Hold => Err(peer.hold()),
        Step::Respond { bytes, then_leave } => peer.respond(bytes, *then_leave),
        Step::Upgrade(upgrade) => peer.upgrade(upgrade),
        Step::Write(bytes) => peer.send(bytes.clone()),
        Step::Bytewise(bytes, delay) => peer.send_bytewise(bytes, *delay),
        Step::Flood { first, end, make } => peer.flood(*first, *end, make),
        Step::Repeat { bytes, times } => peer.repeat(bytes, *times),
        Step::Feed { feed, at_most } => peer.feed(feed, *at_most),
        Step::Pause(length) => peer.pause(*length),
        Step::Expect(met) => peer.expect(&*met.0),
        Step::Echo => peer.echo(),
        Step::Close { code, reason } => peer.close(*code, reason),
        Step::Cut => peer.flush().and(Err(End::Cut)),
        Step::CutMidFrame(half) => peer.cut_mid_frame(half),
        Step::Fin => peer.fin(),
        Step::HalfOpen => peer.half_open(),
        Step::PingEvery(_) | Step::AnswerPings(_) | Step::Read(_) | Step::IgnoreClose => {
            peer.behave(step);
            Ok(())
        }
    }
}

/// Steps that say nothing leave TLS untouched: `pause` before `upgrade` delays
/// the TLS handshake, `cut` alone breaks it off.
fn comes_before_tls(step: &Step) -> bool {
    use Step::*;
    matches!(step, Refuse | SilentInTls | Pause(_) | Cut | Fin | HalfOpen | Read(_))
}

impl Peer {
    fn secure(&mut self) -> Result<(), End> {
        #[cfg(feature = "tls")]
        if let Some(authority) = &self.shared.clone().tls
            && !self.secured
        {
            self.shake_hands(&authority.acceptor)?;
        }
        self.secured = true;
        Ok(())
    }

    fn behave(&mut self, step: &Step) {
        match step {
            Step::PingEvery(interval) => self.ping_every = Some((*interval, now() + *interval)),
            Step::AnswerPings(answer) => self.answers_pings = *answer,
            Step::Read(read) => self.reading = *read,
            _ => self.answers_close = false,
        }
    }

    fn fall_silent(&mut self) -> Result<(), End> {
        (self.answers_pings, self.answers_close, self.ping_every) = (false, false, None);
        if !self.is_upgraded() {
            self.request()?;
            self.discard();
        }
        Err(self.hold())
    }

    fn respond(&mut self, bytes: &[u8], then_leave: bool) -> Result<(), End> {
        self.request()?;
        if bytes.starts_with(b"HTTP/1.1 101") {
            self.out.gather(bytes);
            self.upgraded();
            return Ok(());
        }
        self.discard();
        self.send(bytes.to_vec())?;
        if then_leave { Err(End::Over) } else { Ok(()) }
    }

    fn upgrade(&mut self, upgrade: &Upgrade) -> Result<(), End> {
        let request = self.request()?;
        let Some(mut answer) = upgrade.answer(&request) else {
            let what = "an upgrade request without Sec-WebSocket-Key";
            self.shared.ledger.violation(self.id, what);
            self.send(super::upgrade::response(400, [], what))?;
            return Err(End::Over);
        };
        if let Some(delay) = upgrade.delay {
            // Counted before the last byte: whoever has the 101 finds it counted.
            let last = answer.split_off(answer.len() - 1);
            self.dribble(&answer, delay)?;
            answer = last;
        }
        self.out.gather(&answer);
        self.upgraded();
        Ok(())
    }

    fn dribble(&mut self, bytes: &[u8], delay: Duration) -> Result<(), End> {
        for byte in bytes {
            self.out.gather(&[*byte]);
            self.flush()?;
            self.pause(delay)?;
        }
        Ok(())
    }
}

/// Sending.
impl Peer {
    /// Leaves a little to be written by the next step that waits: so how the
    /// connection behaves after a message is settled before the client can
    /// react to it.
    fn send(&mut self, bytes: impl Into<Bytes>) -> Result<(), End> {
        let bytes = bytes.into();
        if bytes.len() < SMALL {
            self.out.gather(&bytes)
        } else {
            self.out.push(bytes)
        }
        if self.out.len() < LOW_WATER {
            return Ok(());
        }
        self.run_until(None, |peer| peer.out.len() < LOW_WATER).map(drop)
    }

    fn send_bytewise(&mut self, bytes: &[u8], delay: Duration) -> Result<(), End> {
        self.begin_frame();
        let sent = self.dribble(bytes, delay);
        self.end_frame();
        sent
    }

    fn flood(&mut self, first: u64, end: u64, make: &Make) -> Result<(), End> {
        let mut chunk = Vec::with_capacity(CHUNK);
        for n in first..end {
            frame::push(frame::TEXT, true, (make.0)(n).as_bytes(), &mut chunk);
            if chunk.len() >= CHUNK {
                self.send(std::mem::replace(&mut chunk, Vec::with_capacity(CHUNK)))?;
            }
        }
        self.send(chunk)
    }

    /// Copies of a shared buffer cost no copying of bytes.
    fn repeat(&mut self, bytes: &[u8], times: u64) -> Result<(), End> {
        if bytes.is_empty() {
            return Ok(());
        }
        let many = (CHUNK / bytes.len()).max(1);
        let chunk = Bytes::from(bytes.repeat(many));
        for _ in 0..times / many as u64 {
            self.send(chunk.clone())?;
        }
        let rest = (times % many as u64) as usize;
        self.send(chunk.slice(..rest * bytes.len()))
    }

    fn feed(&mut self, feed: &Feed, at_most: u64) -> Result<(), End> {
        if !std::mem::replace(&mut self.replayed, true) {
            let again = feed.again();
            self.flood(again.start, again.end, &feed.make)?;
        }
        let mut left = at_most;
        while left > 0 {
            let claimed = feed.take(left.min(CLAIM));
            if claimed.is_empty() {
                break;
            }
            left -= claimed.end - claimed.start;
            self.flood(claimed.start, claimed.end, &feed.make)?;
        }
        Ok(())
    }
}

/// Waiting and leaving.
impl Peer {
    fn pause(&mut self, length: Duration) -> Result<(), End> {
        if length.is_zero() {
            return Ok(());
        }
        self.run_until(now().checked_add(length), |_| false).map(drop)
    }

    /// Until the client leaves or an order ends it.
    fn hold(&mut self) -> End {
        self.run_until(None, |_| false).err().unwrap_or(End::Over)
    }

    fn expect(&mut self, met: &dyn Fn(&Payload) -> bool) -> Result<(), End> {
        let found = |peer: &mut Peer| {
            while let Some(payload) = peer.inbox.pop_front() {
                if met(&payload) {
                    return true;
                }
            }
            false
        };
        self.run_until(None, found).map(drop)
    }

    /// What has arrived already comes first, save what an expectation used up.
    fn echo(&mut self) -> Result<(), End> {
        self.echoes = true;
        for payload in std::mem::take(&mut self.inbox) {
            self.echo_back(&payload);
        }
        Err(self.hold())
    }

    fn close(&mut self, code: u16, reason: &str) -> Result<(), End> {
        self.close_sent = true;
        self.send(frame::whole(frame::CLOSE, &frame::close_payload(code, reason)))?;
        self.run_until(Some(now() + GOODBYE), |_| false)?;
        Err(End::Over)
    }

    fn cut_mid_frame(&mut self, half: &[u8]) -> Result<(), End> {
        self.begin_frame();
        self.out.gather(half);
        self.flush().and(Err(End::Cut))
    }

    fn fin(&mut self) -> Result<(), End> {
        self.flush()?;
        self.shutdown_write();
        Err(self.hold())
    }

    fn half_open(&mut self) -> Result<(), End> {
        self.flush()?;
        self.mute = true;
        Err(self.hold())
    }
}
