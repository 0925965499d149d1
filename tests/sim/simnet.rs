//! What `mio` is in this program: sockets of the simulated net.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use crate::faults::{self, Call, Fault, fault, planned as planned_error};
use crate::kernel::{self, Arrival, Ev, Kernel, Wait, with};
use crate::planted::{Bug, planted};

/// Bytes after which a socket that takes a few at a time takes more: a large
/// backlog would otherwise cost more calls than it shows.
const CROWDED: usize = 8 * 1024;

/// The same for one that gives a byte at a time.
const CROWDED_READ: u64 = 1024;

const SECOND: u64 = 1_000_000_000;

/// Every poller and socket of a world.
#[derive(Default)]
pub(crate) struct Net {
    pollers: Vec<PollerState>,
    pub(crate) socks: Vec<Sock>,
}

#[derive(Default)]
struct PollerState {
    woken: bool,
    /// Registered sockets that have something to tell.
    ready: Vec<usize>,
}

/// How far a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    Connecting,
    Refused,
    Open,
    /// Let go by the client.
    Released,
}

/// One socket, as the client's kernel sees it.
pub(crate) struct Sock {
    pub(crate) addr: SocketAddr,
    pub(crate) life: Life,
    poller: Option<(usize, usize)>,
    rx: VecDeque<u8>,
    fin: bool,
    pub(crate) reset: bool,
    /// Bytes the kernel still takes.
    pub(crate) tx_space: usize,
    wants_to_write: bool,
    /// The most that one call takes.
    pub(crate) read_most: usize,
    pub(crate) write_most: usize,
    /// Bytes taken, and given, so far.
    pub(crate) taken: usize,
    pub(crate) given: u64,
    edge: (bool, bool),
    pub(crate) delay: (u64, u64),
    last_up: u64,
    last_down: u64,
    /// Bytes on their way to the client or not read yet.
    pub(crate) down: usize,
    /// Nothing arrives any more, either way, and nobody is told: since then.
    pub(crate) frozen: Option<u64>,
    /// When the client wrote or read something last.
    pub(crate) last_read: u64,
    pub(crate) last_arrival: u64,
    pub(crate) last_data: u64,
    pub(crate) tx_full_since: Option<u64>,
    pub(crate) released_at: Option<u64>,
    pub(crate) opened_at: u64,
}

impl Net {
    pub(crate) fn is_ready(&self, poller: usize) -> bool {
        self.pollers[poller].woken || !self.pollers[poller].ready.is_empty()
    }

    fn edge(&mut self, sock: usize, read: bool, write: bool) {
        let it = &mut self.socks[sock];
        it.edge.0 |= read;
        it.edge.1 |= write;
        if let Some((poller, _)) = it.poller
            && !self.pollers[poller].ready.contains(&sock)
        {
            self.pollers[poller].ready.push(sock);
        }
    }
}

impl Sock {
    /// Whether the client has something to read.
    pub(crate) fn is_unread(&self) -> bool {
        self.frozen.is_none() && (!self.rx.is_empty() || self.fin)
    }
}

/// Something arrives at the client's end.
pub(crate) fn arrive(k: &mut Kernel, sock: usize, arrival: Arrival) {
    let now = k.now;
    let it = &mut k.net.socks[sock];
    if it.frozen.is_some() || it.life != Life::Open {
        return;
    }
    it.last_arrival = now;
    match arrival {
        Arrival::Bytes(bytes) => {
            if bytes.windows(5).any(|w| w == b"\"id\":" || w == b"\"skip" || w == b"welco") {
                it.last_data = now;
            }
            it.rx.extend(bytes);
        }
        Arrival::Fin => it.fin = true,
        Arrival::Reset => {
            it.reset = true;
            it.rx.clear();
        }
    }
    k.net.edge(sock, true, it_is_reset(&k.net.socks[sock]));
}

fn it_is_reset(sock: &Sock) -> bool {
    sock.reset
}

pub(crate) fn connected(k: &mut Kernel, sock: usize, accepted: bool) {
    let now = k.now;
    let it = &mut k.net.socks[sock];
    if it.life != Life::Connecting {
        return;
    }
    it.life = if accepted { Life::Open } else { Life::Refused };
    it.opened_at = now;
    it.last_arrival = now;
    k.net.edge(sock, !accepted, true);
}

/// The server has taken so many bytes out of the pipe.
pub(crate) fn drained(k: &mut Kernel, sock: usize, count: usize) {
    let it = &mut k.net.socks[sock];
    it.tx_space += count;
    it.tx_full_since = None;
    if std::mem::take(&mut it.wants_to_write) {
        k.net.edge(sock, false, true);
    }
}

/// A socket that refused a call reports what it can do.
pub(crate) fn ready(k: &mut Kernel, sock: usize) {
    if k.net.socks[sock].life != Life::Released {
        k.net.edge(sock, true, true);
    }
}

/// Sends to the client, in order.
pub(crate) fn send_down(k: &mut Kernel, sock: usize, arrival: Arrival) {
    let (low, high) = k.net.socks[sock].delay;
    let at = k.now + k.range(low, high);
    let it = &mut k.net.socks[sock];
    let at = at.max(it.last_down + 1);
    it.last_down = at;
    if let Arrival::Bytes(bytes) = &arrival {
        it.down += bytes.len();
    }
    k.at(at, Ev::ToClient(sock, arrival));
}

pub(crate) mod net {
    use super::*;

    #[derive(Debug)]
    pub(crate) struct TcpStream(pub(super) usize);

    impl TcpStream {
        pub(crate) fn connect(addr: SocketAddr) -> io::Result<Self> {
            let fault = fault(Call::Connect);
            if let Some(Fault::Error(kind)) = fault {
                return Err(planned_error(kind));
            }
            Ok(Self(crate::server::connect(addr, fault == Some(Fault::Stall))))
        }

        pub(crate) fn take_error(&self) -> io::Result<Option<io::Error>> {
            faults::error(Call::TakeError)?;
            Ok(with(|k| match k.net.socks[self.0].life {
                Life::Refused => Some(io::ErrorKind::ConnectionRefused.into()),
                _ => None,
            }))
        }

        pub(crate) fn peer_addr(&self) -> io::Result<SocketAddr> {
            with(|k| match k.net.socks[self.0].life {
                Life::Open => Ok(k.net.socks[self.0].addr),
                _ => Err(io::ErrorKind::NotConnected.into()),
            })
        }

        pub(crate) fn set_nodelay(&self, _: bool) -> io::Result<()> {
            faults::error(Call::SetNodelay)
        }

        pub(crate) fn shutdown(&self, _: Shutdown) -> io::Result<()> {
            release(self.0);
            Ok(())
        }
    }

    impl Drop for TcpStream {
        fn drop(&mut self) {
            release(self.0);
        }
    }

    impl Read for TcpStream {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let fault = fault(Call::Read);
            if planted(Bug::ReadErrorSwallowed) && matches!(fault, Some(Fault::Error(_))) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            with(|k| {
                let most = suffer(k, self.0, fault)?;
                let now = k.now;
                let it = &mut k.net.socks[self.0];
                if it.reset {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                let count = buf.len().min(it.rx.len()).min(it.read_most).min(most);
                if count == 0 {
                    return if it.fin { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
                }
                for (to, from) in buf.iter_mut().zip(it.rx.drain(..count)) {
                    *to = from;
                }
                it.down -= count;
                it.given += count as u64;
                // So many one by one show what there is to show.
                if it.given > CROWDED_READ {
                    it.read_most = it.read_most.max(40);
                }
                it.last_read = now;
                crate::checks::reads(k, self.0);
                let it = &mut k.net.socks[self.0];
                // A system gives all that it has. What comes in pieces here has
                // come in pieces there, each of them reported.
                if count < buf.len() && !it.rx.is_empty() {
                    k.net.edge(self.0, true, false);
                }
                Ok(count)
            })
        }
    }

    impl Write for TcpStream {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let fault = fault(Call::Write);
            if fault == Some(Fault::End) {
                return Ok(0);
            }
            with(|k| {
                if fault == Some(Fault::Stall) {
                    k.net.socks[self.0].tx_space = 0;
                    k.net.socks[self.0].tx_full_since.get_or_insert(k.now);
                }
                let most = suffer(k, self.0, fault)?;
                let now = k.now;
                let it = &mut k.net.socks[self.0];
                if it.reset {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                let count = buf.len().min(it.tx_space).min(it.write_most).min(most);
                if count == 0 {
                    it.wants_to_write = true;
                    it.tx_full_since.get_or_insert(now);
                    k.note(|| format!("sock {} takes nothing of {}", self.0, buf.len()));
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                it.tx_space -= count;
                it.taken += count;
                if it.taken > CROWDED {
                    it.write_most = it.write_most.max(200);
                }
                let left = it.tx_space;
                it.last_up = (now + it.delay.0).max(it.last_up + 1);
                let at = it.last_up;
                k.note_write(self.0, count, left);
                k.at(at, Ev::ToServer(self.0, buf[..count].to_vec()));
                Ok(count)
            })
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Does to a socket what a read or write suffers; the most it may take then.
    fn suffer(k: &mut Kernel, sock: usize, fault: Option<Fault>) -> io::Result<usize> {
        if k.chance(0.002) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let now = k.now;
        match fault {
            None => return Ok(usize::MAX),
            Some(Fault::Short) => return Ok(1),
            Some(Fault::Error(kind)) => return Err(planned_error(kind)),
            Some(Fault::Later) => {
                k.soon(SECOND, Ev::Ready(sock));
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Some(Fault::End | Fault::Panic) => {
                let it = &mut k.net.socks[sock];
                it.down -= it.rx.len();
                it.rx.clear();
                it.fin = true;
            }
            Some(Fault::Stall) => {
                let it = &mut k.net.socks[sock];
                it.frozen.get_or_insert(now);
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(usize::MAX)
    }

    fn release(sock: usize) {
        with(|k| {
            let now = k.now;
            let it = &mut k.net.socks[sock];
            if it.life == Life::Released {
                return;
            }
            it.life = Life::Released;
            it.released_at = Some(now);
            it.rx.clear();
            it.poller = None;
            let at = it.last_up.max(now) + it.delay.0 + 1;
            k.note(|| format!("sock {sock} released"));
            k.at(at, Ev::ClientGone(sock));
        });
    }
}

/// A new socket on its way to `addr`.
pub(crate) fn open(k: &mut Kernel, addr: SocketAddr) -> usize {
    let now = k.now;
    k.net.socks.push(Sock {
        addr,
        life: Life::Connecting,
        poller: None,
        rx: VecDeque::new(),
        fin: false,
        reset: false,
        tx_space: 64 * 1024,
        wants_to_write: false,
        read_most: usize::MAX,
        write_most: usize::MAX,
        taken: 0,
        given: 0,
        edge: (false, false),
        delay: (50_000, 2_000_000),
        last_up: 0,
        last_down: 0,
        down: 0,
        frozen: None,
        last_read: now,
        last_arrival: now,
        last_data: now,
        tx_full_since: None,
        released_at: None,
        opened_at: now,
    });
    k.net.socks.len() - 1
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token(pub(crate) usize);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Interest;

impl Interest {
    pub(crate) const READABLE: Self = Self;
    pub(crate) const WRITABLE: Self = Self;
}

impl std::ops::BitOr for Interest {
    type Output = Self;

    fn bitor(self, _: Self) -> Self {
        self
    }
}

pub(crate) trait Source {
    fn sock(&self) -> usize;
}

impl Source for net::TcpStream {
    fn sock(&self) -> usize {
        self.0
    }
}

#[derive(Debug)]
pub(crate) struct Poll {
    registry: Registry,
}

#[derive(Debug)]
pub(crate) struct Registry(usize);

#[derive(Debug)]
pub(crate) struct Waker(usize);

#[derive(Debug)]
pub(crate) struct Events(Vec<Event>);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    token: Token,
    read: bool,
    write: bool,
    error: bool,
    ended: bool,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        faults::error(Call::NewPoller)?;
        Ok(with(|k| {
            k.net.pollers.push(PollerState::default());
            Self { registry: Registry(k.net.pollers.len() - 1) }
        }))
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    pub(crate) fn poll(&mut self, events: &mut Events, wait: Option<Duration>) -> io::Result<()> {
        let poller = self.registry.0;
        kernel::pause(if wait.is_some() { Wait::Yield } else { Wait::Poll(poller) });
        events.0.clear();
        faults::error(Call::Poll)?;
        with(|k| {
            if k.chance(0.002) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            k.net.pollers[poller].woken = false;
            for sock in std::mem::take(&mut k.net.pollers[poller].ready) {
                let it = &mut k.net.socks[sock];
                let (read, write) = std::mem::take(&mut it.edge);
                if let Some((_, token)) = it.poller {
                    let error = it.reset || it.life == Life::Refused;
                    let ended = it.fin && !planted(Bug::EndUntold);
                    events.0.push(Event { token: Token(token), read, write, error, ended });
                }
            }
            if planted(Bug::LostEdge) && k.chance(0.02) {
                events.0.clear();
            }
            Ok(())
        })
    }
}

impl Registry {
    pub(crate) fn register(
        &self,
        source: &mut impl Source,
        token: Token,
        _: Interest,
    ) -> io::Result<()> {
        faults::error(Call::Register)?;
        with(|k| {
            let sock = source.sock();
            k.net.socks[sock].poller = Some((self.0, token.0));
            if k.net.socks[sock].edge != (false, false) {
                k.net.edge(sock, false, false);
            }
        });
        Ok(())
    }

    pub(crate) fn deregister(&self, source: &mut impl Source) -> io::Result<()> {
        with(|k| {
            let sock = source.sock();
            k.net.socks[sock].poller = None;
            k.net.pollers[self.0].ready.retain(|ready| *ready != sock);
        });
        Ok(())
    }
}

impl Waker {
    pub(crate) fn new(registry: &Registry, _: Token) -> io::Result<Self> {
        faults::error(Call::NewWaker)?;
        Ok(Self(registry.0))
    }

    pub(crate) fn wake(&self) -> io::Result<()> {
        if let Err(error) = faults::error(Call::Wake) {
            return if planted(Bug::WakeErrorSwallowed) { Ok(()) } else { Err(error) };
        }
        with(|k| {
            if !(planted(Bug::LostWakeUp) && k.chance(0.3)) {
                k.net.pollers[self.0].woken = true;
            }
        });
        Ok(())
    }
}

impl Events {
    pub(crate) fn with_capacity(_: usize) -> Self {
        Self(Vec::new())
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Event> {
        self.0.iter()
    }
}

impl Event {
    pub(crate) fn token(&self) -> Token {
        self.token
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.read
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.write
    }

    pub(crate) fn is_read_closed(&self) -> bool {
        self.error || self.ended
    }

    pub(crate) fn is_write_closed(&self) -> bool {
        self.error
    }

    pub(crate) fn is_error(&self) -> bool {
        self.error
    }
}

/// What `socket2` is in this program.
pub(crate) struct SockRef;

impl SockRef {
    pub(crate) fn from(_: &net::TcpStream) -> Self {
        Self
    }

    pub(crate) fn set_linger(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}
