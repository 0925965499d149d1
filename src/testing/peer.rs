//! The server's end of one connection: reads, writes and waits in one place,
//! so that every step of a script goes on listening.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token, Waker};

use super::frame::{self, Decoder};
use super::handle::Handle;
use super::now;
use super::record::Payload;
use super::shared::Shared;
use super::stream::{Outbox, Socket, Stream};

const SOCKET: Token = Token(0);
const WAKER: Token = Token(1);

/// How long leaving may take: flushing, the client's close frame, its FIN.
pub(super) const GOODBYE: Duration = Duration::from_secs(5);
/// Reading stops while this much waits to be sent: an echo to a client that
/// does not read is bounded.
const MAX_OUT: usize = 64 << 20;
const READ: usize = 64 << 10;

/// Why a connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The client has left.
    Gone,
    /// To be closed with FIN, after what is still to be sent.
    Over,
    /// To be closed with RST.
    Cut,
}

/// What arriving bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Head,
    Frames,
    Discard,
}

pub(super) struct Peer {
    pub(super) id: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) handle: Arc<Handle>,
    poll: Poll,
    events: Events,
    pub(super) stream: Stream,
    /// Nothing is read before TLS stands, if there is to be TLS.
    pub(super) secured: bool,
    pub(super) out: Outbox,
    pub(super) decoder: Decoder,
    pub(super) phase: Phase,
    pub(super) buffer: Vec<u8>,
    /// The read budget ran out before the socket did.
    more: bool,
    /// The socket told of the client's end; only of use while not reading.
    read_closed: bool,
    pub(super) write_closed: bool,

    pub(super) reading: bool,
    pub(super) answers_pings: bool,
    pub(super) answers_close: bool,
    pub(super) echoes: bool,
    /// Neither reads nor writes.
    pub(super) mute: bool,
    pub(super) ping_every: Option<(Duration, Instant)>,
    /// A frame is half sent: replies wait in `deferred`.
    pub(super) mid_frame: bool,
    pub(super) deferred: Vec<u8>,
    pub(super) close_sent: bool,
    pub(super) over: bool,
    pub(super) replayed: bool,
    pub(super) keeps_inbox: bool,
    pub(super) inbox: VecDeque<Payload>,
}

impl Peer {
    pub(super) fn new(id: usize, mut tcp: TcpStream, shared: &Arc<Shared>) -> io::Result<Peer> {
        let poll = Poll::new()?;
        poll.registry().register(&mut tcp, SOCKET, Interest::READABLE | Interest::WRITABLE)?;
        let waker = Waker::new(poll.registry(), WAKER)?;
        tcp.set_nodelay(true)?;
        let socket = Socket::new(tcp);
        Ok(Peer {
            id,
            shared: Arc::clone(shared),
            handle: Arc::new(Handle::new(id, socket.watch(), waker)),
            poll,
            events: Events::with_capacity(8),
            stream: Stream::new(socket),
            secured: false,
            out: Outbox::default(),
            decoder: Decoder::default(),
            phase: Phase::Head,
            buffer: vec![0; READ],
            more: false,
            read_closed: false,
            write_closed: false,
            reading: true,
            answers_pings: true,
            answers_close: true,
            echoes: false,
            mute: false,
            ping_every: None,
            mid_frame: false,
            deferred: Vec::new(),
            close_sent: false,
            over: false,
            replayed: false,
            keeps_inbox: shared.script(id).looks_back(),
            inbox: VecDeque::new(),
        })
    }

    pub(super) fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// Keeps the connection going until `done`, or until the deadline, which
    /// is told by `false`.
    pub(super) fn run_until(
        &mut self,
        deadline: Option<Instant>,
        mut done: impl FnMut(&mut Peer) -> bool,
    ) -> Result<bool, End> {
        loop {
            self.work()?;
            if done(self) {
                return Ok(true);
            }
            if deadline.is_some_and(|deadline| deadline <= now()) {
                return Ok(false);
            }
            self.wait(deadline)?;
        }
    }

    /// Everything that can be done without waiting.
    fn work(&mut self) -> Result<(), End> {
        let roll_call = self.take_orders()?;
        self.ping_if_due();
        self.write_some()?;
        self.read_some()?;
        // What reading has asked for goes out before the next wait.
        self.write_some()?;
        if !self.more {
            self.handle.answer(roll_call);
        }
        if self.over && !self.mid_frame { Err(End::Over) } else { Ok(()) }
    }

    pub(super) fn take_orders(&mut self) -> Result<u64, End> {
        let orders = self.handle.take_orders();
        if orders.cut {
            return Err(End::Cut);
        }
        for frame in orders.pushed {
            self.reply(&frame);
        }
        Ok(orders.roll_call)
    }

    fn ping_if_due(&mut self) {
        if let Some((interval, due)) = self.ping_every
            && due <= now()
        {
            self.reply(&frame::whole(frame::PING, b""));
            self.ping_every = Some((interval, now() + interval));
        }
    }

    fn write_some(&mut self) -> Result<(), End> {
        if self.mute {
            return Ok(());
        }
        if self.write_closed {
            self.out.clear();
        }
        let Err(error) = self.out.write_to(&mut self.stream) else { return Ok(()) };
        log::debug!("testing server, connection {}: {error}", self.id);
        self.write_closed = true;
        // What the client sent before it left is still read, where reading goes on.
        if self.can_read() { Ok(()) } else { Err(End::Gone) }
    }

    fn can_read(&self) -> bool {
        let wanted = self.reading || self.phase == Phase::Head;
        self.secured && wanted && !self.mute && self.out.len() < MAX_OUT
    }

    fn read_some(&mut self) -> Result<(), End> {
        self.more = false;
        if self.read_closed && !self.can_read() {
            return Err(End::Gone);
        }
        for _ in 0..16 {
            if !self.can_read() {
                return Ok(());
            }
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(End::Gone),
                Ok(len) => self.take_in(len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(End::Gone),
            }
        }
        self.more = true;
        Ok(())
    }

    /// The one place where a connection waits: for its socket, an order, or a
    /// time.
    pub(super) fn wait(&mut self, deadline: Option<Instant>) -> Result<(), End> {
        let due = self.ping_every.map(|(_, due)| due);
        let until = deadline.into_iter().chain(due).min();
        let mut limit = until.map(|until| until.saturating_duration_since(now()));
        if self.more && self.can_read() {
            limit = Some(Duration::ZERO);
        }
        match self.poll.poll(&mut self.events, limit) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                log::warn!("testing server, connection {}: {error}", self.id);
                return Err(End::Cut);
            }
            _ => self.read_closed |= self.events.iter().any(|event| event.is_read_closed()),
        }
        Ok(())
    }
}
