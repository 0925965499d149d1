//! From a request to an open WebSocket: DNS, TCP, TLS and the HTTP upgrade,
//! redirects included, all under one deadline.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use super::poll::{Poller, Ready};
use super::socket::{Socket, Stream};
use super::target::Target;
use super::tls::TlsSource;
#[cfg(feature = "tls")]
use super::tls::{Handshake, Pending};
use super::upgrade::{Answer, Upgrade, Upgraded};
use crate::error::{Error, ErrorKind, Step};
use crate::handler::Request;

/// Delay between the starts of two addresses (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// How a dial waits and what it may ask of its thread.
pub(crate) trait Driver: Send {
    fn now(&self) -> Instant;
    fn wall(&self) -> SystemTime;
    fn poller(&mut self) -> &mut Poller;

    /// Blocks until a socket is ready, `until` has come, or something else woke
    /// the thread; `Err` when the dial must stop.
    fn park(&mut self, until: Instant, tell: &mut dyn FnMut(Ready)) -> Result<(), DialEnd>;

    /// Does `work` on a thread that ends with it, and waits for that; on this one if
    /// there is no other. `None` is never the answer.
    #[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "it is for TLS"))]
    fn apart<T: Send>(&mut self, work: impl FnOnce(&mut Self) -> T + Send) -> Option<T>;

    /// The addresses of `host`; `None` when `until` came first.
    fn look_up(
        &mut self,
        host: &str,
        port: u16,
        until: Instant,
    ) -> Result<Option<Vec<SocketAddr>>, DialEnd>;
}

/// Why a dial did not end in a connection.
#[derive(Debug)]
pub(crate) enum DialEnd {
    Failed(Error),
    /// A close was asked for.
    Stopped,
}

/// What every dial of a connection shares.
#[derive(Debug, Clone)]
pub(crate) struct DialPolicy {
    /// One limit over all steps.
    pub(crate) connect_timeout: Duration,
    pub(crate) redirect_limit: u32,
    pub(crate) tls: TlsSource,
}

/// A socket after its upgrade.
#[derive(Debug)]
pub(crate) struct Dialed {
    pub(crate) stream: Stream,
    pub(crate) upgraded: Upgraded,
    /// The address that answered, for the log.
    pub(crate) peer: SocketAddr,
}

impl From<Error> for DialEnd {
    fn from(error: Error) -> Self {
        DialEnd::Failed(error)
    }
}

// None of these steps is inlined: what a connection that waits has on its stack are
// pages that its deepest moment touched, and each step may have what it needs after
// the one before gave it back.

/// Connects as `request` asks. `deadline` is `connect_timeout` from the start
/// of the attempt; the session's opening has what is left of it.
pub(crate) fn dial(
    driver: &mut impl Driver,
    policy: &DialPolicy,
    request: &Request,
    deadline: Instant,
) -> Result<Dialed, DialEnd> {
    let origin = Target::parse(&request.url)?;
    super::upgrade::check(request)?;
    let mut target = origin.clone();
    let mut redirects = 0;
    let mut home = true;
    loop {
        let mut dial = Dial { driver, policy, deadline, target: &target };
        let addrs = dial.resolve()?;
        let (socket, peer) = dial.connect(&addrs)?;
        let mut stream = dial.secure(socket, peer)?;
        let upgrade = Upgrade::new(&target, request, home);
        match dial.upgrade(&mut stream, upgrade, peer)? {
            Answer::Upgraded(upgraded) => return Ok(Dialed { stream, upgraded, peer }),
            Answer::Redirect(location) => {
                stream.socket_mut().release(driver.poller());
                redirects += 1;
                target = follow(&target, &location, redirects, policy.redirect_limit)?;
                // Another origin has no say in where credentials go: not even back.
                home &= target.same_origin(&origin);
            }
        }
    }
}

/// Where a redirect leads, unless it may not be followed.
fn follow(from: &Target, location: &str, count: u32, limit: u32) -> Result<Target, Error> {
    if count > limit {
        let phrase = format!("more than {limit} redirects, the last one from {from}");
        return Err(Error::new(ErrorKind::Redirect, phrase));
    }
    let to = from.redirected(location).map_err(|error| {
        Error::caused(ErrorKind::Redirect, format!("{from} redirects to nowhere usable"), error)
    })?;
    if from.secure && !to.secure {
        let phrase = format!("{from} redirects to {to}, which is not encrypted");
        return Err(Error::new(ErrorKind::Redirect, phrase));
    }
    Ok(to)
}

struct Dial<'a, D> {
    driver: &'a mut D,
    policy: &'a DialPolicy,
    deadline: Instant,
    target: &'a Target,
}

impl<D: Driver> Dial<'_, D> {
    #[inline(never)]
    fn resolve(&mut self) -> Result<Vec<SocketAddr>, DialEnd> {
        let (host, port) = (&self.target.host, self.target.port);
        if let Ok(ip) = host.parse() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        match self.driver.look_up(host, port, self.deadline)? {
            Some(addrs) if addrs.is_empty() => {
                Err(Error::new(ErrorKind::Dns, format!("DNS knows no address of {host}")).into())
            }
            Some(addrs) => Ok(interleaved(addrs)),
            None => Err(self.timed_out(Step::Dns, host).into()),
        }
    }

    /// Races all addresses, each started a little after the one before.
    #[inline(never)]
    fn connect(&mut self, addrs: &[SocketAddr]) -> Result<(Socket, SocketAddr), DialEnd> {
        let mut race = Race { waiting: addrs.iter().copied().collect(), ..Race::default() };
        loop {
            let now = self.driver.now();
            race.start(now, self.driver.poller());
            if let Some(winner) = race.winner(now, self.driver.poller()) {
                return Ok(winner);
            }
            if race.running.is_empty() && race.waiting.is_empty() {
                return Err(race.lost(self.target).into());
            }
            if now >= self.deadline {
                return Err(self.timed_out(Step::Tcp, &race.story(addrs)).into());
            }
            let until = race.next_start.map_or(self.deadline, |start| start.min(self.deadline));
            self.driver.park(until, &mut |_| {})?;
        }
    }

    fn secure(&mut self, socket: Socket, peer: SocketAddr) -> Result<Stream, DialEnd> {
        if !self.target.secure {
            return Ok(Stream::Plain(socket));
        }
        self.handshake(socket, peer)
    }

    #[cfg(feature = "tls")]
    #[inline(never)]
    fn handshake(&mut self, socket: Socket, peer: SocketAddr) -> Result<Stream, DialEnd> {
        match self.policy.tls.get()?.start(&self.target.host, socket)? {
            Handshake::Done(stream) => Ok(Stream::Tls(stream)),
            Handshake::Waiting(pending) => {
                let Self { policy, deadline, target, .. } = *self;
                // The server's certificates take two pages more of the stack than all
                // that follows. What comes before them is done here: OpenSSL keeps the
                // state of random numbers for each thread, and takes 0.1 ms to make it.
                let end = self.driver.apart(|driver| {
                    Dial { driver, policy, deadline, target }.finish(pending, peer)
                });
                end.unwrap_or(Err(DialEnd::Stopped))
            }
        }
    }

    #[cfg(feature = "tls")]
    fn finish(&mut self, mut pending: Pending, peer: SocketAddr) -> Result<Stream, DialEnd> {
        loop {
            if self.driver.now() >= self.deadline {
                return Err(self.timed_out(Step::Tls, &peer).into());
            }
            let tell = &mut |ready| {
                pending.socket_mut().on_ready(ready);
            };
            self.driver.park(self.deadline, tell)?;
            pending = match pending.resume(&self.target.host)? {
                Handshake::Done(stream) => return Ok(Stream::Tls(stream)),
                Handshake::Waiting(pending) => pending,
            };
        }
    }

    #[cfg(not(feature = "tls"))]
    fn handshake(&mut self, _: Socket, _: SocketAddr) -> Result<Stream, DialEnd> {
        let _ = &self.policy.tls;
        Err(Error::new(ErrorKind::Url, "wss:// needs the cargo feature `tls`").into())
    }

    #[inline(never)]
    fn upgrade(
        &mut self,
        stream: &mut Stream,
        mut upgrade: Upgrade,
        peer: SocketAddr,
    ) -> Result<Answer, DialEnd> {
        let mut sent = 0;
        while sent < upgrade.request().len() {
            match stream.write(&upgrade.request()[sent..]) {
                Ok(0) => return Err(cut(io::ErrorKind::WriteZero.into(), peer)),
                Ok(count) => sent += count,
                Err(error) => self.wait_or_fail(stream, error, peer)?,
            }
        }
        // Not on the stack: its pages stay with the thread for as long as it lives.
        let mut buf = vec![0; 1024];
        loop {
            match stream.read(&mut buf) {
                Ok(0) => return Err(cut(io::ErrorKind::UnexpectedEof.into(), peer)),
                Ok(count) => {
                    if let Some(answer) = upgrade.on_read(&buf[..count], self.driver.wall())? {
                        return Ok(answer);
                    }
                    // A server that dribbles is always ready: the deadline holds all the same.
                    self.check_deadline(Step::Upgrade, peer)?;
                }
                Err(error) => self.wait_or_fail(stream, error, peer)?,
            }
        }
    }

    fn wait_or_fail(
        &mut self,
        stream: &mut Stream,
        error: io::Error,
        peer: SocketAddr,
    ) -> Result<(), DialEnd> {
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(cut(error, peer));
        }
        self.check_deadline(Step::Upgrade, peer)?;
        let tell = &mut |ready| {
            stream.socket_mut().on_ready(ready);
        };
        self.driver.park(self.deadline, tell)
    }

    fn check_deadline(&self, step: Step, peer: SocketAddr) -> Result<(), DialEnd> {
        if self.driver.now() >= self.deadline {
            return Err(self.timed_out(step, &peer).into());
        }
        Ok(())
    }

    fn timed_out(&self, step: Step, whom: &dyn std::fmt::Display) -> Error {
        timed_out(step, whom, self.policy.connect_timeout)
    }
}

/// The error of an attempt whose deadline passed.
pub(crate) fn timed_out(step: Step, whom: &dyn std::fmt::Display, limit: Duration) -> Error {
    let phrase = format!("no answer from {whom} in the {step} within connect_timeout ({limit:?})");
    Error::new(ErrorKind::Timeout { step, limit }, phrase)
}

fn cut(error: io::Error, peer: SocketAddr) -> DialEnd {
    let phrase = format!("{peer} ended the connection during the HTTP upgrade");
    Error::caused(ErrorKind::Io(error.kind()), phrase, error).into()
}

/// The attempts on the addresses of one host.
#[derive(Default)]
struct Race {
    waiting: VecDeque<SocketAddr>,
    running: Vec<(SocketAddr, Socket)>,
    failed: Vec<(SocketAddr, io::Error)>,
    next_start: Option<Instant>,
}

impl Race {
    fn start(&mut self, now: Instant, poller: &mut Poller) {
        while self.running.is_empty() || self.next_start.is_some_and(|start| start <= now) {
            let Some(addr) = self.waiting.pop_front() else { break };
            match Socket::connect(addr, poller) {
                Ok(socket) => {
                    self.running.push((addr, socket));
                    self.next_start = Some(now + STAGGER);
                }
                Err(error) => self.failed.push((addr, error)),
            }
        }
        if self.waiting.is_empty() {
            self.next_start = None;
        }
    }

    fn winner(&mut self, now: Instant, poller: &mut Poller) -> Option<(Socket, SocketAddr)> {
        let mut at = 0;
        while at < self.running.len() {
            let outcome = self.running[at].1.connected();
            match outcome {
                None => at += 1,
                Some(Ok(())) => {
                    let (addr, mut socket) = self.running.swap_remove(at);
                    match socket.establish() {
                        Ok(()) => {
                            self.running.drain(..).for_each(|(_, mut s)| s.release(poller));
                            return Some((socket, addr));
                        }
                        Err(error) => self.failed.push((addr, error)),
                    }
                }
                Some(Err(error)) => {
                    let (addr, _) = self.running.swap_remove(at);
                    self.failed.push((addr, error));
                    // The next address need not wait for this one any more.
                    self.next_start = Some(now);
                    self.start(now, poller);
                }
            }
        }
        None
    }

    fn lost(self, target: &Target) -> Error {
        let addrs: Vec<SocketAddr> = self.failed.iter().map(|(addr, _)| *addr).collect();
        let phrase = format!("no address of {} accepts: {}", target.host, self.story(&addrs));
        Error::new(ErrorKind::Connect, phrase)
    }

    /// Each of these addresses, with the cause if it failed.
    fn story(&self, addrs: &[SocketAddr]) -> String {
        let cause = |addr| self.failed.iter().find(|(failed, _)| failed == addr);
        let told = addrs.iter().map(|addr| match cause(addr) {
            Some((_, error)) => format!("{addr} ({error})"),
            None => addr.to_string(),
        });
        told.collect::<Vec<_>>().join(", ")
    }
}

/// Alternates address families, beginning with the resolver's first choice
/// (RFC 8305, section 4).
fn interleaved(addrs: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addrs.first().is_some_and(SocketAddr::is_ipv6);
    let (mut a, mut b): (VecDeque<_>, VecDeque<_>) =
        addrs.into_iter().partition(|addr| addr.is_ipv6() == first_is_v6);
    let mut mixed = Vec::with_capacity(a.len() + b.len());
    while !(a.is_empty() && b.is_empty()) {
        mixed.extend(a.pop_front());
        mixed.extend(b.pop_front());
    }
    mixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_families_alternate_from_the_first_choice_on() {
        let addrs = |text: &[&str]| text.iter().map(|a| a.parse().unwrap()).collect::<Vec<_>>();
        let given = addrs(&["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1", "1.1.1.2:1"]);
        let mixed = addrs(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "1.1.1.2:1", "[::3]:1"]);
        assert_eq!(interleaved(given), mixed);
    }

    #[test]
    fn redirects_are_limited_and_never_lead_out_of_tls() {
        let secure = Target::parse("wss://h/").unwrap();
        assert!(follow(&secure, "/x", 3, 3).is_ok());
        for (location, count) in [("/x", 4), ("http://h/", 1), ("ftp://h/", 1), ("wss://", 1)] {
            let error = follow(&secure, location, count, 3).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Redirect, "{location}");
        }
        let plain = Target::parse("ws://h/").unwrap();
        assert!(follow(&plain, "https://h/", 1, 3).unwrap().secure);
    }
}
