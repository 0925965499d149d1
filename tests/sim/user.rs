//! What programs write: the session, the request hook, the resolver and the
//! classifier, as well as they fail.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::error::{BoxError, Error, ErrorKind, Recovery};
use crate::event::EventKind;
use crate::faults::{self, Call, Fault, fault};
use crate::handler::{Attempt, Data, Link, Request, Session};
use crate::kernel::{self, Kernel, with};
use crate::server;

/// The session of a world: says where to resume, waits for its welcome.
#[derive(Default)]
pub(crate) struct Subscriber {
    welcome: bool,
    /// The thread's turn in which it was ready.
    ready_in: Option<u64>,
}

impl Subscriber {
    pub(crate) fn new() -> Self {
        let _ = faults::user_code(Call::NewSession);
        Self::default()
    }
}

impl Session for Subscriber {
    fn on_open(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        faults::user_code(Call::OnOpen)?;
        let id = link.resume().and_then(|resume| resume.id.clone());
        let id = id.and_then(|raw| String::from_utf8(raw).ok()).and_then(|text| text.parse().ok());
        let n = id.unwrap_or(0u64) % 1_000_000_000;
        link.send(format!("resume {n} please"));
        link.hold();
        misbehave()
    }

    fn on_message(&mut self, data: Data<'_>, link: &mut Link<'_>) -> Result<(), BoxError> {
        with(|k| {
            if self.ready_in == Some(k.steps) && is_blocked(k, link.connection()) {
                k.broken("reads-what-it-must-while-blocked", || "one more".to_owned());
            }
        });
        faults::user_code(Call::OnMessage)?;
        if !self.welcome {
            if data.as_bytes() == b"welcome" {
                self.welcome = true;
                self.ready_in = Some(with(|k| k.steps));
                link.ready();
            }
            return Ok(());
        }
        if data.as_bytes().starts_with(b"{\"skip") {
            return misbehave();
        }
        link.emit(data);
        Ok(())
    }

    fn heartbeat_interval(&self) -> Option<Duration> {
        Some(with(|k| k.ck.setup.beat))
    }

    fn on_heartbeat(&mut self, link: &mut Link<'_>) -> Result<(), BoxError> {
        faults::user_code(Call::OnHeartbeat)?;
        link.send("beat");
        // A session may emit what nothing was read for, also while there is no room.
        let conn = link.connection();
        if with(|k| is_blocked(k, conn)) {
            with(|k| k.ck.emitted += 1);
            link.emit("{\"skip\":\"nothing\"}");
        }
        Ok(())
    }
}

/// Whether the queue has no room for this connection, also if it got some just now.
fn is_blocked(k: &Kernel, conn: usize) -> bool {
    let mut told = k.told.iter().filter(|(_, event)| event.connection == conn);
    let room = told.any(|(_, event)| matches!(event.kind, EventKind::Blocked(false)));
    k.ck.conns[conn].is_blocked() && !room
}

fn misbehave() -> Result<(), BoxError> {
    may_hang();
    let kind = with(|k| {
        let p = if k.sv.healed { 0.0 } else { k.sv.rates.session };
        if k.chance(p) {
            let kind = k.range(1, 4);
            k.fault(["session fails", "session panics", "session stalls"][kind as usize - 1]);
            kind
        } else {
            0
        }
    });
    match kind {
        1 => Err("planned failure of a session".into()),
        2 => panic!("planned panic of a session"),
        3 => {
            kernel::sleep(Duration::from_millis(400));
            Ok(())
        }
        _ => Ok(()),
    }
}

pub(crate) fn resolver(host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    let (wait, fails, two) = with(|k| {
        let rate = if k.sv.healed { 0.0 } else { k.sv.rates.dns };
        let slow = k.chance(rate * 0.3);
        if slow {
            k.fault("look-up is slow");
        }
        let wait = if slow { k.range(0, 20_000) } else { k.range(1, 50) };
        (Duration::from_millis(wait), k.chance(rate), k.chance(0.3))
    });
    kernel::sleep(wait);
    match fault(Call::LookUp) {
        None => {}
        Some(Fault::Panic) => panic!("{}", faults::PLANNED),
        Some(Fault::Error(kind)) => return Err(faults::planned(kind)),
        Some(Fault::Stall) => kernel::sleep(Duration::from_secs(20)),
        Some(_) => return Ok(Vec::new()),
    }
    if fails {
        if kernel::chance(0.1) {
            with(|k| k.fault("look-up panics"));
            panic!("planned panic of a resolver");
        }
        with(|k| k.fault("look-up fails"));
        return Err(std::io::Error::other("no such host"));
    }
    let alias = u8::from(host.starts_with("alias"));
    let number = host.trim_start_matches("feed").trim_start_matches("alias");
    let conn: u8 = number.trim_end_matches(".sim").parse().unwrap_or(0);
    let v4 = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, alias, conn, 1)), port);
    let v6 = Ipv6Addr::new(0xFD00, 0, 0, 0, 0, u16::from(alias), u16::from(conn), 1);
    Ok(if two { vec![SocketAddr::new(IpAddr::V6(v6), port), v4] } else { vec![v4] })
}

/// Now and then a call never comes back.
fn may_hang() {
    if with(|k| server::strikes(k, "user code never returns", |rates| rates.hang)) {
        faults::hang();
    }
}

/// Another view of two errors than the crate's own.
pub(crate) fn classify(error: &Error, default: Recovery) -> Recovery {
    match error.kind() {
        ErrorKind::Http { status: 401, .. } => Recovery::Recoverable,
        ErrorKind::Closed { code: 4321 } => Recovery::Unrecoverable,
        // The crate's own view takes its place.
        ErrorKind::Closed { code: 1001 | 1003 } => {
            with(|k| k.fault("classifier panics"));
            panic!("planned panic of a classifier");
        }
        _ => default,
    }
}

pub(crate) fn hook(attempt: &Attempt) -> Result<Request, BoxError> {
    faults::user_code(Call::RequestHook)?;
    may_hang();
    let (conn, epoch) = (attempt.connection, attempt.epoch);
    let (fault, tls, by_name) = with(|k| {
        let healed = k.sv.healed;
        let (hook, tls) = (k.sv.rates.hook, k.sv.rates.tls);
        let fault = !healed && k.chance(hook);
        (fault, !healed && k.chance(tls), k.chance(0.5))
    });
    if fault && kernel::chance(0.5) {
        with(|k| k.fault("request hook panics"));
        panic!("planned panic of a request hook");
    }
    if fault {
        with(|k| k.fault("request hook fails"));
        return Err("planned failure of a request hook".into());
    }
    let (scheme, port) = if tls { ("wss", 443) } else { ("ws", 80) };
    let host = match (by_name, epoch % 2) {
        (false, _) => format!("10.0.{conn}.1"),
        (true, 0) => format!("alias{conn}.sim"),
        (true, _) => format!("feed{conn}.sim"),
    };
    let request = Request::new(format!("{scheme}://{host}:{port}/feed?e={epoch}"));
    let request = request.header("Authorization", "of the first origin");
    let offers = kernel::chance(0.3);
    Ok(if offers { request.subprotocol("first").subprotocol("second") } else { request })
}
