//! Clients brought into each state that a close can find them in, on real
//! sockets, and ways to wait for what they do.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::any::Any;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use broadsock::crossbeam_channel::{Receiver, Sender, bounded};
use broadsock::testing::{Script, Server};
use broadsock::{
    Backoff, BoxError, Client, ClientBuilder, Data, Event, EventKind, Intensity, Link, Session,
    State,
};

/// Says only that something happens, not how fast.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A client in some state, with what keeps it there.
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    pub(crate) client: Arc<Client>,
    /// Tells when the last thread of the client has ended, once it is dropped.
    pub(crate) gone: Receiver<()>,
    /// What cannot be interrupted, by its thread's name, and how to let it go.
    pub(crate) stuck: Option<(&'static str, Sender<()>)>,
    pub(crate) failed: bool,
    _keep: Vec<Box<dyn Any>>,
}

/// Every state, by the function that brings a client there.
pub(crate) fn all() -> Vec<fn() -> Scene> {
    let mut all: Vec<fn() -> Scene> = vec![
        in_dns,
        in_upgrade,
        in_opening,
        connected,
        blocked,
        backing_off,
        waiting_for_restart,
        closing,
        after_failure,
    ];
    if cfg!(feature = "tls") {
        all.push(in_tls);
    }
    // Elsewhere a full backlog refuses.
    if cfg!(target_os = "linux") {
        all.push(in_tcp);
    }
    all
}

/// A look-up that blocks until it is let go.
pub(crate) fn in_dns() -> Scene {
    let (entered, enters) = bounded(1);
    let (release, released) = bounded::<()>(1);
    let (builder, gone) = watched(Client::builder("ws://nowhere.invalid/"));
    let client = builder
        .resolver(move |_, _| {
            let _ = entered.try_send(());
            let _ = released.recv();
            Ok(Vec::new())
        })
        .start()
        .unwrap();
    enters.recv_timeout(LONG).expect("a look-up");
    let stuck = Some(("broadsock-dns-0", release));
    Scene { stuck, ..scene("in DNS", client, gone, []) }
}

/// A port whose backlog is full: the system drops each SYN.
pub(crate) fn in_tcp() -> Scene {
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    let listener = listener.unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let addr = listener.local_addr().unwrap().as_socket().unwrap();
    let mut crowd = Vec::new();
    while let Ok(tcp) = std::net::TcpStream::connect_timeout(&addr, Duration::from_millis(200)) {
        crowd.push(tcp);
    }
    let (builder, gone) = watched(Client::builder(format!("ws://{addr}/")));
    let client = builder.start().unwrap();
    wait_state(&client, State::Connecting);
    scene("in TCP connect", client, gone, [Box::new(listener) as Box<dyn Any>, Box::new(crowd)])
}

pub(crate) fn in_tls() -> Scene {
    #[cfg(feature = "tls")]
    {
        let server = Server::script([Script::new().silent_in_tls()]).start_tls().unwrap();
        let builder = Client::builder(server.url()).root_certificate(server.ca_pem().unwrap());
        let (builder, gone) = watched(builder);
        let client = builder.start().unwrap();
        assert!(server.wait_for(|record| record.stats.accepted == 1, LONG));
        scene("in TLS", client, gone, [Box::new(server) as Box<dyn Any>])
    }
    #[cfg(not(feature = "tls"))]
    unreachable!("not in the list without TLS")
}

pub(crate) fn in_upgrade() -> Scene {
    let (server, builder, gone) = against(Script::new().silent());
    let client = builder.start().unwrap();
    assert!(server.wait_for(|record| record.requests.len() == 1, LONG));
    scene("in the upgrade", client, gone, [Box::new(server) as Box<dyn Any>])
}

pub(crate) fn in_opening() -> Scene {
    let (server, builder, gone) = against(Script::new().upgrade().hold());
    let client = builder.session(|| Holds).start().unwrap();
    assert!(server.wait_for(|record| record.texts().count() == 1, LONG));
    scene("opening", client, gone, [Box::new(server) as Box<dyn Any>])
}

pub(crate) fn connected() -> Scene {
    let (server, builder, gone) = against(Script::new().upgrade().send("a").hold());
    let client = builder.start().unwrap();
    client.wait_connected(LONG).unwrap();
    scene("connected", client, gone, [Box::new(server) as Box<dyn Any>])
}

pub(crate) fn blocked() -> Scene {
    let (server, builder, gone) = against(Script::new().upgrade().numbers(0..).hold());
    let client = builder.queue(16).start().unwrap();
    wait_event(&client, |kind| matches!(kind, EventKind::Blocked(true)));
    scene("blocked", client, gone, [Box::new(server) as Box<dyn Any>])
}

pub(crate) fn backing_off() -> Scene {
    let (server, builder, gone) = against(Script::new().refuse());
    let hour = Backoff::constant(Duration::from_secs(3600));
    let client = builder.backoff(hour).start().unwrap();
    wait_state(&client, State::Reconnecting);
    scene("backing off", client, gone, [Box::new(server) as Box<dyn Any>])
}

pub(crate) fn waiting_for_restart() -> Scene {
    let (server, builder, gone) = against(Script::new().status(404, []));
    let within = Duration::from_millis(1);
    let often = Intensity { restarts: 1000, within };
    let client = builder.restart_intensity(often).start().unwrap();
    let long_wait = |kind: &EventKind| matches!(kind, EventKind::Restarting { delay, .. } if *delay >= Duration::from_secs(1));
    wait_event(&client, long_wait);
    scene("waiting for a restart", client, gone, [Box::new(server) as Box<dyn Any>])
}

/// Closing since a hook asked for it, with a server that does not answer.
pub(crate) fn closing() -> Scene {
    let (server, builder, gone) = against(Script::new().upgrade().ignore_close().send("a").hold());
    let slot = Arc::new(OnceLock::new());
    let session = Arc::clone(&slot);
    let client = Arc::new(builder.session(move || Closes(Arc::clone(&session))).start().unwrap());
    slot.set(Arc::downgrade(&client)).unwrap();
    wait_state(&client, State::Closing);
    let _keep: Vec<Box<dyn Any>> = vec![Box::new(server)];
    Scene { name: "closing", client, gone, stuck: None, failed: false, _keep }
}

pub(crate) fn after_failure() -> Scene {
    let (server, builder, gone) = against(Script::new().refuse());
    let client = builder.max_attempts(1).start().unwrap();
    wait_event(&client, |kind| matches!(kind, EventKind::Failed { .. }));
    let scene = scene("after failure", client, gone, [Box::new(server) as Box<dyn Any>]);
    Scene { failed: true, ..scene }
}

fn scene<const N: usize>(
    name: &'static str,
    client: Client,
    gone: Receiver<()>,
    keep: [Box<dyn Any>; N],
) -> Scene {
    let client = Arc::new(client);
    Scene { name, client, gone, stuck: None, failed: false, _keep: Vec::from(keep) }
}

fn against(script: Script) -> (Server, ClientBuilder, Receiver<()>) {
    let server = Server::script([script]).start().unwrap();
    let (builder, gone) = watched(Client::builder(server.url()));
    (server, builder, gone)
}

/// Tells when nothing of the client is left: every thread holds its settings.
pub(crate) fn watched(builder: ClientBuilder) -> (ClientBuilder, Receiver<()>) {
    let (mark, gone) = Mark::new();
    let builder = builder.observer(move |_| {
        let _ = &mark;
    });
    (builder, gone)
}

/// Tells that it is dropped.
pub(crate) struct Mark(Sender<()>);

impl Mark {
    pub(crate) fn new() -> (Self, Receiver<()>) {
        let (sender, gone) = bounded(1);
        (Self(sender), gone)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

pub(crate) fn wait_event(client: &Client, met: impl Fn(&EventKind) -> bool) -> Event {
    let events = client.events();
    loop {
        let event = events.recv_timeout(LONG).expect("an event");
        if met(&event.kind) {
            return event;
        }
    }
}

pub(crate) fn wait_state(client: &Client, state: State) {
    wait_event(client, |kind| matches!(kind, EventKind::State { to, .. } if *to == state));
}

/// Never ready.
struct Holds;

impl Session for Holds {
    fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        link.send("hello");
        link.hold();
        Ok(())
    }
}

/// Closes its client when a message comes.
struct Closes(Arc<OnceLock<Weak<Client>>>);

impl Session for Closes {
    fn on_message(&mut self, _: Data<'_>, _: &mut Link<'_>) -> Result<(), BoxError> {
        if let Some(client) = self.0.wait().upgrade() {
            client.close(LONG * 10);
        }
        Ok(())
    }
}

/// Something that hangs: says that it was entered, and waits to be let go.
pub(crate) struct Trap {
    entered: Sender<()>,
    released: Receiver<()>,
    once: Mutex<bool>,
}

/// The other side of a [`Trap`].
pub(crate) struct Lever {
    pub(crate) entered: Receiver<()>,
    pub(crate) release: Sender<()>,
}

impl Trap {
    pub(crate) fn new() -> (Self, Lever) {
        let (entered, enters) = bounded(1);
        let (release, released) = bounded(1);
        (Self { entered, released, once: Mutex::new(false) }, Lever { entered: enters, release })
    }

    /// Hangs at the first call.
    pub(crate) fn step_in(&self) {
        if std::mem::replace(&mut *self.once.lock().unwrap(), true) {
            return;
        }
        let _ = self.entered.try_send(());
        let _ = self.released.recv();
    }
}
