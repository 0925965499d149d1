//! The socket of one connection, plain or under TLS.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Weak};
use std::time::Duration;

use mio::net::TcpStream;
use tungstenite::Bytes;

/// A handle on the TCP socket: under TLS the stream owns one, and resets and
/// half-closes go past it through another.
#[derive(Debug, Clone)]
pub(super) struct Socket(Arc<TcpStream>);

impl Socket {
    pub(super) fn new(tcp: TcpStream) -> Self {
        Socket(Arc::new(tcp))
    }

    pub(super) fn watch(&self) -> Watch {
        Watch(Arc::downgrade(&self.0))
    }

    /// Closing sends an RST from now on.
    pub(super) fn reset_on_close(&self) {
        if let Err(error) = socket2::SockRef::from(&*self.0).set_linger(Some(Duration::ZERO)) {
            log::debug!("testing server: no RST: {error}");
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(buffer)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Looks at a socket from another thread without keeping it open.
#[derive(Debug)]
pub(super) struct Watch(Weak<TcpStream>);

/// Whether the other side has left, as far as one look can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    Here,
    Gone,
    /// Bytes are waiting, and what stands behind them cannot be seen.
    Unsure,
}

impl Watch {
    pub(super) fn presence(&self) -> Presence {
        let Some(tcp) = self.0.upgrade() else { return Presence::Gone };
        match tcp.peek(&mut [0]) {
            Ok(0) => Presence::Gone,
            Ok(_) => Presence::Unsure,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Presence::Here,
            Err(_) => Presence::Gone,
        }
    }
}

/// Reads and writes never block; `WouldBlock` says to wait for the socket.
pub(super) struct Stream {
    socket: Socket,
    #[cfg(feature = "tls")]
    tls: Option<Box<native_tls::TlsStream<Socket>>>,
}

impl Stream {
    pub(super) fn new(socket: Socket) -> Self {
        Stream {
            socket,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    #[cfg(feature = "tls")]
    pub(super) fn use_tls(&mut self, tls: native_tls::TlsStream<Socket>) {
        self.tls = Some(Box::new(tls));
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            return tls.read(buffer);
        }
        self.socket.read(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            return tls.write(bytes);
        }
        self.socket.write(bytes)
    }

    /// TLS's own goodbye, if there is TLS; one attempt.
    pub(super) fn close_notify(&mut self) {
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            // A client that has left already does not miss it.
            let _best_effort = tls.shutdown();
        }
    }

    pub(super) fn shutdown_write(&self) {
        // A client that has left already does not miss it.
        let _best_effort = self.socket.0.shutdown(Shutdown::Write);
    }
}

/// Bytes on their way out, in order: large chunks as they are, small ones
/// gathered so that one write carries many.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    chunks: VecDeque<Bytes>,
    tail: Vec<u8>,
    len: usize,
}

impl Outbox {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn push(&mut self, chunk: Bytes) {
        self.seal();
        self.len += chunk.len();
        self.chunks.push_back(chunk);
    }

    pub(super) fn gather(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        self.tail.extend_from_slice(bytes);
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(Bytes::from(std::mem::take(&mut self.tail)));
        }
    }

    /// Writes until nothing is left or the socket is full.
    ///
    /// OpenSSL wants a write that would block repeated with the same bytes:
    /// so a chunk at the front never grows.
    pub(super) fn write_to(&mut self, stream: &mut Stream) -> io::Result<()> {
        self.seal();
        while let Some(front) = self.chunks.front_mut() {
            if front.is_empty() {
                self.chunks.pop_front();
                continue;
            }
            match stream.write(front) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    let _sent = front.split_to(written);
                    self.len -= written;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
