//! What the threads of a server share, and the count of open connections.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::net::TcpStream;

use super::handle::Handle;
use super::now;
use super::peer::Peer;
use super::play::play;
use super::record::Ledger;
use super::script::Script;
use super::stream::Presence;

/// What the end of a connection may be late by.
const GRACE: Duration = Duration::from_millis(1);

/// How long a new connection waits for the older ones to look whether their
/// clients are still there. Only a closure of a script can use it up.
const ROLL_CALL: Duration = Duration::from_secs(10);

pub(super) struct Shared {
    pub(super) ledger: Ledger,
    /// Never empty.
    pub(super) scripts: Vec<Script>,
    pub(super) then: Option<Script>,
    #[cfg(feature = "tls")]
    pub(super) tls: Option<super::tls::Authority>,
    pub(super) connections: Mutex<Vec<Connection>>,
}

pub(super) struct Connection {
    handle: Arc<Handle>,
    thread: Option<JoinHandle<()>>,
}

impl Shared {
    /// The script of the n-th connection.
    pub(super) fn script(&self, n: usize) -> &Script {
        let after = self.then.as_ref().unwrap_or(&self.scripts[self.scripts.len() - 1]);
        self.scripts.get(n).unwrap_or(after)
    }

    fn connections(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connections whose threads still run.
    pub(super) fn handles(&self) -> Vec<Arc<Handle>> {
        let connections = self.connections();
        let running = connections.iter().filter(|connection| !connection.handle.has_ended());
        running.map(|connection| Arc::clone(&connection.handle)).collect()
    }

    /// Counts an accepted connection and starts its thread.
    pub(super) fn admit(self: &Arc<Self>, tcp: TcpStream) -> io::Result<()> {
        self.reap();
        self.call_roll();
        let id = self.ledger.accept();
        let peer = Peer::new(id, tcp, self)?;
        let handle = Arc::clone(peer.handle());
        // Listed before it is counted: whoever sees the count can cut it.
        self.connections().push(Connection { handle: Arc::clone(&handle), thread: None });
        self.ledger.opened(id);
        let thread = Some(self.spawn(peer, Arc::clone(&handle))?);
        let mut connections = self.connections();
        if let Some(entry) = connections.iter_mut().rfind(|entry| entry.handle.id == id) {
            entry.thread = thread;
        }
        Ok(())
    }

    fn spawn(self: &Arc<Self>, peer: Peer, handle: Arc<Handle>) -> io::Result<JoinHandle<()>> {
        let leaving = Leaving { shared: Arc::clone(self), handle };
        let name = format!("broadsock-test-conn-{}", peer.id);
        thread::Builder::new().name(name).spawn(move || {
            // Dropped last, after the peer and with it the socket.
            let leaving = leaving;
            let id = peer.id;
            play(peer, leaving.shared.script(id));
        })
    }

    /// Takes off the count every connection that its client has closed before
    /// now, even if its thread has not run since.
    fn call_roll(&self) {
        let handles = self.handles();
        // TCP keeps no order across sockets: what a client closed before it
        // connected again may arrive a moment after that.
        let late = now() + GRACE;
        let here = handles.iter().filter(|handle| handle.presence() == Presence::Here);
        here.for_each(|handle| {
            handle.wait_ended(late);
        });
        let mut unsure = Vec::new();
        for handle in &handles {
            match handle.presence() {
                Presence::Here => {}
                Presence::Gone => self.ledger.closed(handle.id),
                Presence::Unsure => unsure.push(handle),
            }
        }
        unsure.iter().for_each(|handle| handle.call_roll());
        let deadline = now() + ROLL_CALL;
        unsure.iter().for_each(|handle| handle.wait_answered(deadline));
    }

    /// RST on all connections; says whether all threads have ended in time.
    pub(super) fn cut_all(&self, deadline: Instant) -> bool {
        let handles = self.handles();
        handles.iter().for_each(|handle| handle.cut());
        handles.iter().all(|handle| handle.wait_ended(deadline))
    }

    /// Joins the threads that have ended: each is at its last instruction.
    pub(super) fn reap(&self) {
        let mut ended = Vec::new();
        self.connections().retain_mut(|connection| {
            let keep = !connection.handle.has_ended();
            ended.extend(connection.thread.take_if(|_| !keep));
            keep
        });
        for thread in ended {
            if thread.join().is_err() {
                log::warn!("testing server: a closure of a script panicked");
            }
        }
    }
}

/// Marks the end of a connection's thread, also when a closure panics.
struct Leaving {
    shared: Arc<Shared>,
    handle: Arc<Handle>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        // In this order: whoever sees the count finds no descriptor, and
        // whoever waited for the end finds the count.
        self.handle.close_waker();
        self.shared.ledger.closed(self.handle.id);
        self.handle.ended();
    }
}
