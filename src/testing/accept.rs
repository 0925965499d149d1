//! The listening socket and the thread that accepts on it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::{Domain, Socket, Type};

use super::shared::Shared;

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
/// How long to wait after an accept that failed: out of descriptors, mostly.
const RETRY: Duration = Duration::from_millis(50);

/// A socket bound to an address and not listening: the system refuses
/// connections to it, and gives the port to nobody else.
pub(super) fn reserve(addr: SocketAddr, receive_buffer: Option<usize>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    // Elsewhere the option would share the port instead of reusing it.
    if cfg!(unix) {
        socket.set_reuse_address(true)?;
    }
    if let Some(size) = receive_buffer {
        // Accepted sockets inherit it.
        socket.set_recv_buffer_size(size)?;
    }
    socket.bind(&addr.into())?;
    Ok(socket)
}

/// A server that is listening.
#[derive(Debug)]
pub(super) struct Acceptor {
    waker: Waker,
    thread: JoinHandle<()>,
}

impl Acceptor {
    pub(super) fn start(socket: Socket, shared: &Arc<Shared>) -> io::Result<Self> {
        socket.listen(1024)?;
        socket.set_nonblocking(true)?;
        let mut listener = TcpListener::from_std(socket.into());
        let poll = Poll::new()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let waker = Waker::new(poll.registry(), WAKER)?;
        let shared = Arc::clone(shared);
        let thread = thread::Builder::new()
            .name("broadsock-test-accept".to_owned())
            .spawn(move || accept_until_woken(&listener, poll, &shared))?;
        Ok(Acceptor { waker, thread })
    }

    /// When this returns, the listening socket is closed.
    pub(super) fn stop(self) {
        if let Err(error) = self.waker.wake() {
            // Joining would wait for ever.
            log::warn!("testing server: the accepting thread is not woken: {error}");
            return;
        }
        if self.thread.join().is_err() {
            log::warn!("testing server: the accepting thread panicked");
        }
    }
}

/// The waker has one meaning: stop.
fn accept_until_woken(listener: &TcpListener, mut poll: Poll, shared: &Arc<Shared>) {
    let mut events = Events::with_capacity(8);
    let mut again = None;
    loop {
        match poll.poll(&mut events, again) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                log::warn!("testing server: cannot accept: {error}");
                return;
            }
            _ if events.iter().any(|event| event.token() == WAKER) => return,
            _ => again = accept_some(listener, shared),
        }
    }
}

/// Says when to come back without being asked to. A few at a time, so that a
/// crowd does not keep a stop waiting.
fn accept_some(listener: &TcpListener, shared: &Arc<Shared>) -> Option<Duration> {
    for _ in 0..16 {
        match listener.accept() {
            Ok((tcp, _)) => {
                if let Err(error) = shared.admit(tcp) {
                    log::warn!("testing server: a connection was dropped: {error}");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => {
                log::debug!("testing server: accept: {error}");
                return Some(RETRY);
            }
        }
    }
    Some(Duration::ZERO)
}
