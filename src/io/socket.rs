//! The TCP socket under everything, and the stream (plain or TLS) on it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use mio::Token;
use mio::net::TcpStream;

use super::poll::{Poller, Ready};

/// What a quiet connection brings at once is less than this.
const FEW_BYTES: usize = 1024;

/// A non-blocking TCP socket that remembers what it may do.
///
/// Readiness is edge-triggered, so `can_read` and `can_write` hold until an
/// operation would block. While `can_write` is false every write is refused at
/// once: tungstenite retries an unflushed pong on each read, and would
/// otherwise pay a system call for each message of a peer that does not read.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    token: Token,
    can_read: bool,
    can_write: bool,
    /// The peer sends no more: of its end, nothing will tell again.
    ended: bool,
    received: u64,
    sent: u64,
    abandoned: bool,
}

impl Socket {
    /// Starts a connection attempt; see [`Socket::connected`].
    pub(crate) fn connect(addr: SocketAddr, poller: &mut Poller) -> io::Result<Self> {
        let mut stream = TcpStream::connect(addr)?;
        let token = poller.register(&mut stream)?;
        Ok(Self {
            stream,
            token,
            can_read: false,
            can_write: false,
            ended: false,
            received: 0,
            sent: 0,
            abandoned: false,
        })
    }

    /// Whether the attempt has succeeded (`Some(Ok)`), failed, or goes on.
    pub(crate) fn connected(&mut self) -> Option<io::Result<()>> {
        match self.stream.take_error() {
            Ok(Some(error)) | Err(error) => return Some(Err(error)),
            Ok(None) => {}
        }
        match self.stream.peer_addr() {
            Ok(_) => Some(Ok(())),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => None,
            // What connect(2) reports while it is under way differs by system.
            Err(_) => None,
        }
    }

    /// After the connection stands: send small frames at once, and take it as
    /// ready for both directions.
    pub(crate) fn establish(&mut self) -> io::Result<()> {
        self.can_read = true;
        self.can_write = true;
        self.stream.set_nodelay(true)
    }

    /// Takes note of what a wait brought.
    pub(crate) fn on_ready(&mut self, ready: Ready) -> bool {
        let mine = ready.token == self.token;
        self.can_read |= mine && ready.readable;
        self.can_write |= mine && ready.writable;
        self.ended |= mine && ready.ended;
        mine
    }

    pub(crate) fn can_write(&self) -> bool {
        self.can_write
    }

    /// Bytes received and sent, as they are on the wire.
    pub(crate) fn traffic(&self) -> (u64, u64) {
        (self.received, self.sent)
    }

    /// Makes [`release`](Self::release) reset the connection: what the peer did
    /// not take is thrown away, and nothing of it is left in the kernel.
    pub(crate) fn abandon(&mut self) {
        // A socket that cannot be set so is closed in the ordinary way.
        let _ = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        self.abandoned = true;
    }

    /// Whether a read of `count` bytes into room for more has left nothing, so that
    /// a system call need not say so. epoll(7): what comes later is reported anew;
    /// but not the end of the stream if it was reported with these bytes. Windows
    /// reports nothing before a read has found nothing. Where much was there, more
    /// has probably come meanwhile, which is worth the call.
    fn is_emptied_by(&self, count: usize, room: usize) -> bool {
        cfg!(unix) && count > 0 && count < room.min(FEW_BYTES) && !self.ended
    }

    /// Guarantees that the connection is over and no longer watched, whatever
    /// the peer does.
    pub(crate) fn release(&mut self, poller: &mut Poller) {
        poller.deregister(&mut self.stream);
        if !self.abandoned {
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if !self.can_read {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let read = uninterrupted(|| self.stream.read(buf));
        match &read {
            Ok(count) => {
                self.received += *count as u64;
                self.can_read = !self.is_emptied_by(*count, buf.len());
            }
            Err(error) => self.can_read = error.kind() != io::ErrorKind::WouldBlock,
        }
        read
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if !self.can_write {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let written = uninterrupted(|| self.stream.write(buf));
        match &written {
            Ok(count) => self.sent += *count as u64,
            Err(error) => self.can_write = error.kind() != io::ErrorKind::WouldBlock,
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// OpenSSL does not retry an interrupted call below it, so it is done here.
fn uninterrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// What the WebSocket runs over.
#[derive(Debug)]
pub(crate) enum Stream {
    /// `ws://`
    Plain(Socket),
    /// `wss://`
    #[cfg(feature = "tls")]
    Tls(Box<native_tls::TlsStream<Socket>>),
}

impl Stream {
    pub(crate) fn socket(&self) -> &Socket {
        match self {
            Stream::Plain(socket) => socket,
            #[cfg(feature = "tls")]
            Stream::Tls(tls) => tls.get_ref(),
        }
    }

    pub(crate) fn socket_mut(&mut self) -> &mut Socket {
        match self {
            Stream::Plain(socket) => socket,
            #[cfg(feature = "tls")]
            Stream::Tls(tls) => tls.get_mut(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.read(buf),
            #[cfg(feature = "tls")]
            Stream::Tls(tls) => tls.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.write(buf),
            #[cfg(feature = "tls")]
            Stream::Tls(tls) => tls.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(socket) => socket.flush(),
            #[cfg(feature = "tls")]
            Stream::Tls(tls) => tls.flush(),
        }
    }
}
