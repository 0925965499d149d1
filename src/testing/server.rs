//! The server: started from scripts, watched and disturbed from a test.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::Socket;

use super::accept::{Acceptor, reserve};
use super::frame;
use super::now;
use super::record::{Ledger, Received, Record, Request, Stats};
use super::script::Script;
use super::shared::Shared;

/// How long stopping waits for threads. Only a closure of a script can use it up.
const STOP: Duration = Duration::from_secs(5);

/// Settings of a [`Server`] that has not started yet.
///
/// ```
/// use broadsock::testing::{Script, Server};
///
/// let server = Server::script([Script::new().upgrade().echo()])
///     .bind("[::1]:0")
///     .receive_buffer(4096)
///     .then_refuse()
///     .start();
/// // A machine without IPv6 cannot bind there.
/// assert!(server.is_err() || server?.url().starts_with("ws://[::1]:"));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a server does nothing until it is started"]
pub struct ServerBuilder {
    scripts: Vec<Script>,
    then: Option<Script>,
    bind: String,
    receive_buffer: Option<usize>,
    keep_received: usize,
    #[cfg(feature = "tls")]
    names: Vec<String>,
}

impl ServerBuilder {
    /// Address and port to listen on. Defaults to `127.0.0.1:0`, any free port.
    pub fn bind(mut self, addr: &str) -> Self {
        addr.clone_into(&mut self.bind);
        self
    }

    /// After the last script, resets further connections instead of repeating
    /// it. Defaults to repeating.
    pub fn then_refuse(mut self) -> Self {
        self.then = Some(Script::new().refuse());
        self
    }

    /// Bytes that the system may buffer for each connection while the script
    /// does not read. Defaults to what the system does, several MiB on Linux.
    pub fn receive_buffer(mut self, bytes: usize) -> Self {
        self.receive_buffer = Some(bytes);
        self
    }

    /// How many messages and control frames [`Record::received`] keeps; the
    /// rest is only counted. Defaults to 100,000.
    pub fn keep_received(mut self, count: usize) -> Self {
        self.keep_received = count;
        self
    }

    /// Host names and addresses in the certificate. Defaults to `localhost`,
    /// `127.0.0.1` and `::1`.
    #[cfg(feature = "tls")]
    pub fn certificate_for<T: Into<String>>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self.names = names.into_iter().map(Into::into).collect();
        self
    }

    /// Starts to listen for `ws://`.
    ///
    /// # Errors
    ///
    /// The address is malformed or cannot be bound, or a thread cannot be
    /// started.
    pub fn start(self) -> io::Result<Server> {
        self.launch(
            #[cfg(feature = "tls")]
            None,
        )
    }

    /// Starts to listen for `wss://`, with a certificate of a new authority:
    /// a client has to trust [`Server::ca_pem`].
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start), or the certificate cannot be made.
    #[cfg(feature = "tls")]
    pub fn start_tls(self) -> io::Result<Server> {
        let authority = super::tls::Authority::new(&self.names)?;
        self.launch(Some(authority))
    }

    fn launch(
        self,
        #[cfg(feature = "tls")] tls: Option<super::tls::Authority>,
    ) -> io::Result<Server> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let addr: SocketAddr = self.bind.parse().map_err(invalid)?;
        let socket = reserve(addr, self.receive_buffer)?;
        let addr = socket.local_addr()?.as_socket().unwrap_or(addr);
        let shared = Arc::new(Shared {
            ledger: Ledger::new(self.keep_received),
            scripts: self.scripts,
            then: self.then,
            #[cfg(feature = "tls")]
            tls,
            connections: Mutex::default(),
        });
        let door = Door::Open(Acceptor::start(socket, &shared)?);
        let receive_buffer = self.receive_buffer;
        Ok(Server { shared, addr, receive_buffer, door: Mutex::new(door) })
    }
}

/// A scripted WebSocket server on the loopback interface.
///
/// All methods may be called from any thread. Dropping the server stops it:
/// the port closes, connections are reset, threads are joined, within 5 s
/// however they are busy.
///
/// ```
/// use std::time::Duration;
/// use broadsock::testing::{Script, Server};
///
/// let server = Server::script([Script::new().upgrade().hold()]).start()?;
/// let (mut ws, _) = tungstenite::connect(server.url())?;
/// server.push("news");
/// assert_eq!(ws.read()?, "news".into());
///
/// server.stop(); // an outage
/// assert!(ws.read().is_err());
/// assert!(tungstenite::connect(server.url()).is_err());
///
/// server.restart()?;
/// assert!(tungstenite::connect(server.url()).is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Server {
    shared: Arc<Shared>,
    addr: SocketAddr,
    receive_buffer: Option<usize>,
    door: Mutex<Door>,
}

/// Whether the server listens.
enum Door {
    Open(Acceptor),
    /// The port is kept, if the system allowed it.
    Shut(Option<Socket>),
}

impl Server {
    /// A server that takes one script for each connection, in turn; the last
    /// one repeats. Without any script it accepts each upgrade and holds.
    pub fn script(scripts: impl IntoIterator<Item = Script>) -> ServerBuilder {
        let mut scripts: Vec<_> = scripts.into_iter().collect();
        if scripts.is_empty() {
            scripts.push(Script::new().upgrade());
        }
        ServerBuilder {
            scripts,
            then: None,
            bind: "127.0.0.1:0".to_owned(),
            receive_buffer: None,
            keep_received: 100_000,
            #[cfg(feature = "tls")]
            names: ["localhost", "127.0.0.1", "::1"].map(str::to_owned).to_vec(),
        }
    }

    /// A `ws://` server that echoes on every connection.
    ///
    /// # Errors
    ///
    /// As [`ServerBuilder::start`].
    pub fn echo() -> io::Result<Server> {
        Server::script([Script::new().upgrade().echo()]).start()
    }

    /// `ws://127.0.0.1:<port>/`, or `wss:`; the same after a restart.
    pub fn url(&self) -> String {
        format!("{}://{}/", self.scheme(), self.addr)
    }

    /// The URL with another host: a name that resolves to the server, or one
    /// that its certificate does not cover.
    pub fn url_with(&self, host: &str) -> String {
        format!("{}://{host}:{}/", self.scheme(), self.addr.port())
    }

    fn scheme(&self) -> &'static str {
        #[cfg(feature = "tls")]
        if self.shared.tls.is_some() {
            return "wss";
        }
        "ws"
    }

    /// Where the server listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The root certificate in PEM that makes clients trust the server, after
    /// [`ServerBuilder::start_tls`].
    #[cfg(feature = "tls")]
    pub fn ca_pem(&self) -> Option<&str> {
        self.shared.tls.as_ref().map(|authority| authority.ca_pem.as_str())
    }
}

/// What the server saw.
impl Server {
    /// The counters, now.
    pub fn stats(&self) -> Stats {
        self.shared.ledger.lock().stats
    }

    /// Every upgrade request so far, answered or not.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.ledger.lock().requests.clone()
    }

    /// Every message and control frame received so far, in order.
    pub fn received(&self) -> Vec<Received> {
        self.shared.ledger.lock().received.clone()
    }

    /// The text messages among them.
    pub fn texts(&self) -> Vec<String> {
        self.shared.ledger.lock().texts().map(str::to_owned).collect()
    }

    /// What clients did that RFC 6455 forbids; empty, if all is well.
    pub fn violations(&self) -> Vec<String> {
        self.shared.ledger.lock().violations.clone()
    }

    /// Waits until the condition holds, looking at each change; `false` when
    /// the time is up first. The record is locked meanwhile: a condition that
    /// asks the server itself would wait for ever.
    pub fn wait_for(&self, met: impl FnMut(&Record) -> bool, limit: Duration) -> bool {
        self.shared.ledger.wait_for(met, limit)
    }

    /// Waits until exactly `count` connections are open.
    pub fn wait_live(&self, count: usize, limit: Duration) -> bool {
        self.wait_for(|record| record.stats.live == count, limit)
    }
}

/// What disturbs clients.
impl Server {
    /// Sends a text message on every upgraded connection, after what its
    /// script has already sent; says to how many it went.
    pub fn push(&self, text: &str) -> usize {
        let frame = frame::whole(frame::TEXT, text.as_bytes());
        self.shared.handles().iter().filter(|handle| handle.push(&frame)).count()
    }

    /// Resets every open connection, whatever its script is doing, and goes on
    /// listening. When this returns, the sockets are closed.
    pub fn cut_all(&self) {
        if !self.shared.cut_all(now() + STOP) {
            log::warn!("testing server: a connection is stuck in a closure");
        }
    }

    /// Resets one connection by its number, counted from 0 in the order of
    /// accepts; says whether it was open.
    pub fn cut(&self, connection: usize) -> bool {
        let handles = self.shared.handles();
        let Some(handle) = handles.iter().find(|handle| handle.id == connection) else {
            return false;
        };
        handle.cut();
        handle.wait_ended(now() + STOP)
    }

    /// An outage: stops listening, so that the system refuses connections, and
    /// resets every open one. The port stays reserved for
    /// [`restart`](Self::restart).
    pub fn stop(&self) {
        let mut door = self.door();
        if let Door::Open(acceptor) = std::mem::replace(&mut *door, Door::Shut(None)) {
            acceptor.stop();
            *door = Door::Shut(self.reserve().ok());
        }
        self.cut_all();
        self.shared.reap();
    }

    /// Listens on the same port again, if stopped. Scripts, counters and
    /// records go on where they were.
    ///
    /// # Errors
    ///
    /// The port cannot be bound, or a thread cannot be started.
    pub fn restart(&self) -> io::Result<()> {
        let mut door = self.door();
        if let Door::Shut(reserved) = &mut *door {
            let socket = reserved.take().map_or_else(|| self.reserve(), Ok)?;
            *door = Door::Open(Acceptor::start(socket, &self.shared)?);
        }
        Ok(())
    }

    fn reserve(&self) -> io::Result<Socket> {
        reserve(self.addr, self.receive_buffer)
    }

    fn door(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("url", &self.url()).field("stats", &self.stats()).finish()
    }
}
