//! The simulated servers: one for each connection, with every fault in the book.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use tungstenite::handshake::derive_accept_key;

use crate::kernel::{Arrival, Ev, Kernel, with};
use crate::simnet::{self, Life, drained, send_down};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

/// Redirects that a client follows.
pub(crate) const MAX_REDIRECTS: u32 = 3;

/// Nanoseconds that a slow network takes at most, one way.
pub(crate) const LONGEST_DELAY: u64 = 4000 * MS;

/// The payloads of a server's pings.
const PINGS: [&[u8]; 3] = [b"early", b"between", b"0123456789"];

/// How often each fault strikes; drawn for each seed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rates {
    pub(crate) refuse: f64,
    pub(crate) black_hole: f64,
    pub(crate) bad_upgrade: f64,
    pub(crate) redirect: f64,
    /// Of a call of user code that never returns.
    pub(crate) hang: f64,
    pub(crate) dns: f64,
    pub(crate) tls: f64,
    pub(crate) hook: f64,
    pub(crate) session: f64,
    /// Of a panic of the crate's own while it reads.
    pub(crate) panic: f64,
    /// Mean time between mishaps of an open connection.
    pub(crate) mishap: Duration,
    /// Share of mishaps that no retry cures.
    pub(crate) fatal: f64,
    pub(crate) duplicate: f64,
    pub(crate) reorder: f64,
    pub(crate) skip: f64,
    /// Mean time between messages of a feed.
    pub(crate) message: Duration,
    pub(crate) burst: u64,
    pub(crate) dribble: bool,
    pub(crate) big: f64,
    /// Bytes that a server sends ahead of what the client has read.
    pub(crate) window: usize,
    pub(crate) slow: bool,
    /// How often a session is not welcomed.
    pub(crate) lazy: f64,
    /// Overlap of what is sent again after a reconnect.
    pub(crate) overlap: u64,
}

#[derive(Default)]
pub(crate) struct Servers {
    pub(crate) rates: Rates,
    pub(crate) sessions: bool,
    /// All connections show the same feed.
    pub(crate) redundant: bool,
    pub(crate) conns: Vec<Feed>,
    pub(crate) socks: BTreeMap<usize, Server>,
    pub(crate) healed: bool,
    pub(crate) healed_at: u64,
    /// Whether messages were ever sent out of their order, which outlasts the
    /// healing: what waits for a slow consumer may be lost long after.
    pub(crate) reordered: bool,
    pub(crate) max_message: usize,
    /// Messages that each socket has to begin with.
    pub(crate) openings: u64,
    pub(crate) sent_frames: u64,
    pub(crate) close_frames: u64,
    /// The attempts that were redirected, by connection and epoch.
    pub(crate) redirected: BTreeMap<(usize, u64), Redirected>,
    /// Attempts that got an answer which no client may take for an upgrade.
    pub(crate) unacceptable: BTreeSet<(usize, u64)>,
}

/// Where the redirects of one attempt have led.
#[derive(Default)]
pub(crate) struct Redirected {
    origin: String,
    /// The host that it was sent to last, or came to.
    host: String,
    count: u32,
    /// It has been at another origin.
    strayed: bool,
}

/// One endpoint's messages.
#[derive(Default)]
pub(crate) struct Feed {
    pub(crate) head: u64,
    /// Failed messages to be sent again.
    pub(crate) again: VecDeque<u64>,
    pub(crate) ended: bool,
    /// When an address of its server refused, if none has accepted since.
    refused: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Request,
    Open,
    /// It said goodbye, or is gone.
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Refuse,
    BlackHole,
    Upgrade,
    /// To another address of the same server.
    Redirect,
    Status(u16, Option<Wait>),
    /// An upgrade that no client may accept.
    Unacceptable(Flaw),
    Garbage,
    Silent,
    Cut,
    Fin,
    Dribble,
}

/// What a server asks for by `Retry-After`, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    Seconds(u64),
    /// A date so far ahead.
    Until(u64),
    /// Something that means nothing.
    Soon,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    WrongAccept,
    Extension,
    Subprotocol,
}

/// What a server has said of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    Status(u16, Option<Wait>),
    Close(u16),
}

/// The server's end of one socket.
pub(crate) struct Server {
    pub(crate) conn: usize,
    pub(crate) epoch: u64,
    phase: Phase,
    plan: Plan,
    secure: bool,
    inbox: Vec<u8>,
    cursor: u64,
    upgraded: bool,
    /// Opening messages that came.
    opened: u64,
    /// Whether it will look at the window again by itself.
    pub(crate) pumps: bool,
    /// Waits for the session to say where to go on.
    waits: bool,
    /// Reads nothing any more.
    pub(crate) stalled: Option<u64>,
    unread: Vec<u8>,
    /// Sends nothing any more.
    pub(crate) mute: Option<u64>,
    idle: bool,
    pub(crate) got_close: bool,
    /// Its last word, if it was one.
    pub(crate) said: Option<Said>,
    /// The session was told that it may begin.
    welcomed: bool,
    /// Messages and pings that came in.
    pub(crate) messages: u64,
    pub(crate) pings: u64,
    /// Bytes of the request, and of the answer that accepted it.
    pub(crate) request_len: u64,
    pub(crate) answer_len: u64,
    /// A ping that waits for its pong, since then.
    pub(crate) pinged: Option<u64>,
}

impl Server {
    pub(crate) fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether it gave an answer that accepts the upgrade.
    pub(crate) fn is_upgraded(&self) -> bool {
        self.answer_len > 0
    }
}

/// A client connects.
pub(crate) fn connect(addr: SocketAddr, black_hole: bool) -> usize {
    with(|k| {
        let sock = simnet::open(k, addr);
        let (conn, secure) = (conn_of(addr), addr.port() == 443);
        next_at_once(k, conn);
        let plan = if black_hole { Plan::BlackHole } else { plan(k, secure) };
        let rates = &k.sv.rates;
        let (dribble, slow) = (rates.dribble, rates.slow);
        if dribble && k.chance(0.3) {
            let read = k.pick(&[1, 40, 40, 100, 1460, 1460]);
            let write = k.pick(&[1, 3, 11, 200, 1460, 1460]);
            k.net.socks[sock].read_most = read;
            k.net.socks[sock].write_most = write;
            if read == 1 {
                k.fault("one-byte reads");
            }
            if write < 200 {
                k.fault("partial writes");
            }
        }
        if k.chance(0.3) {
            k.net.socks[sock].tx_space = k.pick(&[300, 1000, 5000]);
        }
        if slow && k.chance(0.3) {
            k.net.socks[sock].delay = (10 * MS, k.pick(&[100, 700, 2500]) * MS);
            k.fault("slow socket");
        }
        k.sv.socks.insert(
            sock,
            Server {
                conn,
                epoch: 0,
                phase: Phase::Request,
                plan,
                secure,
                inbox: Vec::new(),
                cursor: 0,
                upgraded: false,
                opened: 0,
                pumps: false,
                waits: false,
                stalled: None,
                unread: Vec::new(),
                mute: None,
                idle: false,
                got_close: false,
                said: None,
                welcomed: false,
                messages: 0,
                pings: 0,
                request_len: 0,
                answer_len: 0,
                pinged: None,
            },
        );
        k.note(|| format!("conn {conn} connects by sock {sock}: {plan:?}"));
        if plan != Plan::BlackHole {
            let delay = k.net.socks[sock].delay;
            let wait = k.range(delay.0, delay.1);
            k.soon(wait, Ev::Connected(sock));
        }
        sock
    })
}

fn conn_of(addr: SocketAddr) -> usize {
    match addr.ip() {
        std::net::IpAddr::V4(ip) => ip.octets()[2] as usize,
        std::net::IpAddr::V6(ip) => ip.segments()[6] as usize,
    }
}

/// The host that has this address.
fn is_at(host: &str, addr: SocketAddr) -> bool {
    let alias = match addr.ip() {
        std::net::IpAddr::V4(ip) => ip.octets()[1] == 1,
        std::net::IpAddr::V6(ip) => ip.segments()[5] == 1,
    };
    host.starts_with("alias") == alias
}

fn plan(k: &mut Kernel, secure: bool) -> Plan {
    if k.sv.healed {
        // A slow look-up may end in a healed world, but was asked for TLS before.
        return if secure { Plan::Fin } else { Plan::Upgrade };
    }
    let rates = k.sv.rates.clone();
    let plan = if k.chance(rates.refuse) {
        Plan::Refuse
    } else if k.chance(rates.black_hole) {
        Plan::BlackHole
    } else if secure {
        k.pick(&[Plan::Garbage, Plan::Silent, Plan::Cut, Plan::Fin])
    } else if rates.redirect > 0.0 && k.chance(rates.redirect) {
        Plan::Redirect
    } else if k.chance(rates.bad_upgrade) {
        let seconds = k.pick(&[0, 1, 2, 17, 400, 100_000]);
        let (form, unclear) = (k.chance(0.3), k.chance(0.1));
        let after = k.chance(0.6).then_some(match (form, unclear) {
            (_, true) => Wait::Soon,
            (true, _) => Wait::Until(seconds),
            _ => Wait::Seconds(seconds),
        });
        let kind = k.range(0, 12);
        match kind {
            0 if k.chance(rates.fatal * 3.0) => Plan::Status(401, after),
            1 if k.chance(rates.fatal * 3.0) => Plan::Garbage,
            2 if k.chance(rates.fatal * 3.0) => {
                Plan::Unacceptable(k.pick(&[Flaw::WrongAccept, Flaw::Extension, Flaw::Subprotocol]))
            }
            0..=3 => Plan::Status(429, after),
            4..=6 => Plan::Status(503, after),
            7 => Plan::Silent,
            8 => Plan::Cut,
            9 => Plan::Fin,
            _ => Plan::Dribble,
        }
    } else {
        Plan::Upgrade
    };
    if let Some(name) = plan.fault(secure) {
        k.fault(name);
    }
    if matches!(plan, Plan::Status(_, Some(_))) {
        k.fault("Retry-After");
    }
    plan
}

impl Plan {
    /// The fault that it is.
    fn fault(self, secure: bool) -> Option<&'static str> {
        Some(match self {
            Plan::Upgrade => return None,
            Plan::Refuse => "refused",
            Plan::BlackHole => "black hole",
            _ if secure => "TLS failure",
            Plan::Redirect => "redirect",
            Plan::Status(401, _) => "HTTP 401",
            Plan::Status(429, _) => "HTTP 429",
            Plan::Status(..) => "HTTP 503",
            Plan::Unacceptable(Flaw::WrongAccept) => "upgrade: wrong accept",
            Plan::Unacceptable(Flaw::Extension) => "upgrade: extension",
            Plan::Unacceptable(Flaw::Subprotocol) => "upgrade: subprotocol",
            Plan::Garbage => "no HTTP",
            Plan::Silent => "upgrade: silence",
            Plan::Cut => "upgrade: reset",
            Plan::Fin => "upgrade: end",
            Plan::Dribble => "upgrade: dribble",
        })
    }
}

pub(crate) fn connected(k: &mut Kernel, sock: usize) {
    let refused = k.sv.socks[&sock].plan == Plan::Refuse;
    let conn = k.sv.socks[&sock].conn;
    // One that lost the race is refused unheard.
    if k.net.socks[sock].life == Life::Connecting {
        k.sv.conns[conn].refused = refused.then_some(k.now);
    }
    simnet::connected(k, sock, !refused);
}

/// After a refusal the next address is tried at once.
fn next_at_once(k: &mut Kernel, conn: usize) {
    let Some(at) = k.sv.conns[conn].refused.take() else { return };
    let same = k.ck.conns[conn].tries_since(0) && !k.ck.conns[conn].tries_since(at);
    if same && k.now > at + 100 * MS {
        let waited = (k.now - at) / MS;
        k.broken("next-address-at-once", || format!("conn {conn}: {waited} ms later"));
    }
}

/// Bytes of the client come in.
pub(crate) fn receive(k: &mut Kernel, sock: usize, bytes: Vec<u8>) {
    if k.net.socks[sock].frozen.is_some() {
        lose(k, sock, &bytes);
        return;
    }
    let Some(server) = k.sv.socks.get_mut(&sock) else { return };
    if server.stalled.is_some() {
        server.unread.extend(bytes);
        return;
    }
    let count = bytes.len();
    server.inbox.extend(bytes);
    drained(k, sock, count);
    match k.sv.socks[&sock].phase {
        Phase::Request => request(k, sock),
        Phase::Open => frames(k, sock),
        Phase::Over if k.sv.socks[&sock].upgraded => frames(k, sock),
        Phase::Over => {}
    }
}

fn request(k: &mut Kernel, sock: usize) {
    let server = k.sv.socks.get_mut(&sock).unwrap();
    let secure = server.secure;
    let Some(end) = server.inbox.windows(4).position(|w| w == b"\r\n\r\n") else {
        if secure && server.inbox.len() > 100 {
            answer(k, sock, "", false);
        }
        return;
    };
    let head = String::from_utf8_lossy(&server.inbox[..end]).into_owned();
    server.inbox.drain(..end + 4);
    server.request_len = (end + 4) as u64;
    server.epoch = head
        .split("e=")
        .nth(1)
        .and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next())
        .and_then(|digits| digits.parse().ok())
        .unwrap_or(0);
    let header = |wanted: &str| {
        head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case(wanted).then(|| value.trim().to_owned())
        })
    };
    at_its_address(k, sock, &header("host").unwrap_or_default());
    at_home(k, sock, header("host").unwrap_or_default(), header("authorization").is_some());
    let key = header("sec-websocket-key").unwrap_or_default();
    answer(k, sock, &key, header("sec-websocket-protocol").is_some());
}

/// A host is sought where it is.
fn at_its_address(k: &mut Kernel, sock: usize, host: &str) {
    let addr = k.net.socks[sock].addr;
    if !is_at(host, addr) {
        k.broken("host-at-its-address", || format!("{host} at {addr}"));
    }
}

/// Redirects are followed so often and no more, and credentials stay with the
/// origin that they are meant for.
fn at_home(k: &mut Kernel, sock: usize, host: String, credentials: bool) {
    let Server { conn, epoch, .. } = k.sv.socks[&sock];
    let Some(way) = k.sv.redirected.get_mut(&(conn, epoch)) else {
        let way = Redirected { origin: host.clone(), host, ..Redirected::default() };
        k.sv.redirected.insert((conn, epoch), way);
        if !credentials {
            k.broken("headers-sent", || format!("conn {conn}, epoch {epoch}"));
        }
        return;
    };
    way.strayed |= host != way.origin;
    let wanted = way.host.clone();
    let (strayed, count) = (way.strayed, way.count);
    if host != wanted {
        k.broken("redirects-followed", || format!("conn {conn}: to {host}, not {wanted}"));
    }
    if count > MAX_REDIRECTS {
        k.broken("redirects-limited", || format!("conn {conn} follows {count}"));
    }
    if strayed == credentials {
        k.broken("credentials-stay-at-home", || {
            format!("conn {conn}, epoch {epoch}: at {host}, with them: {credentials}")
        });
    }
}

/// How many redirects an attempt has got.
pub(crate) fn redirects(k: &Kernel, conn: usize, epoch: u64) -> u32 {
    k.sv.redirected.get(&(conn, epoch)).map_or(0, |way| way.count)
}

fn answer(k: &mut Kernel, sock: usize, key: &str, offered: bool) {
    let plan = k.sv.socks[&sock].plan;
    let accept = match plan {
        Plan::Unacceptable(Flaw::WrongAccept) => derive_accept_key(b"another"),
        _ => derive_accept_key(key.as_bytes()),
    };
    let more = match plan {
        Plan::Unacceptable(Flaw::Extension) => "Sec-WebSocket-Extensions: permessage-deflate\r\n",
        Plan::Unacceptable(Flaw::Subprotocol) if k.chance(0.5) => {
            "Sec-WebSocket-Protocol: third\r\n"
        }
        // Nothing is as wrong, where something was offered.
        Plan::Unacceptable(Flaw::Subprotocol) if offered => "",
        Plan::Unacceptable(Flaw::Subprotocol) => "Sec-WebSocket-Protocol: first\r\n",
        _ if offered => "Sec-WebSocket-Protocol: second\r\n",
        _ => "",
    };
    let ok = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n{more}\r\n"
    );
    match plan {
        Plan::Unacceptable(_) => {
            let Server { conn, epoch, .. } = k.sv.socks[&sock];
            k.sv.unacceptable.insert((conn, epoch));
            send_down(k, sock, Arrival::Bytes(ok.into_bytes()));
            over(k, sock);
        }
        Plan::Upgrade => {
            open(k, sock);
            k.sv.socks.get_mut(&sock).unwrap().answer_len = ok.len() as u64;
            let mut bytes = ok.into_bytes();
            if !k.sv.sessions && k.chance(0.5) {
                bytes.extend(ping(b"early"));
            }
            send_down(k, sock, Arrival::Bytes(bytes));
            pump(k, sock);
        }
        Plan::Dribble => {
            k.sv.socks.get_mut(&sock).unwrap().answer_len = ok.len() as u64;
            for byte in ok.into_bytes() {
                let wait = k.range(0, 400 * MS);
                k.net.socks[sock].delay = (wait, wait + 1);
                send_down(k, sock, Arrival::Bytes(vec![byte]));
            }
            over(k, sock);
        }
        Plan::Redirect => {
            let Server { conn, epoch, .. } = k.sv.socks[&sock];
            let status = k.pick(&[301, 302, 303, 307, 308]);
            let origin = k.pick(&[
                "",
                "//10.0.{conn}.1:80",
                "http://10.0.{conn}.1:80",
                "http://feed{conn}.sim",
                "ws://alias{conn}.sim",
            ]);
            let origin = origin.replace("{conn}", &conn.to_string());
            let way = k.sv.redirected.entry((conn, epoch)).or_default();
            way.count += 1;
            if let Some((_, host)) = origin.split_once("//") {
                way.host = host.trim_end_matches(":80").to_owned();
            }
            let text = format!(
                "HTTP/1.1 {status} Go\r\nLocation: {origin}/feed?e={epoch}\r\n\
                 Content-Length: 0\r\n\r\n"
            );
            send_down(k, sock, Arrival::Bytes(text.into_bytes()));
            over(k, sock);
        }
        Plan::Status(status, after) => {
            k.sv.socks.get_mut(&sock).unwrap().said = Some(Said::Status(status, after));
            let after = after.map(|wait| format!("Retry-After: {}\r\n", wait.text(k)));
            let after = after.unwrap_or_default();
            let text = format!("HTTP/1.1 {status} No\r\n{after}Content-Length: 0\r\n\r\n");
            send_down(k, sock, Arrival::Bytes(text.into_bytes()));
            over(k, sock);
        }
        Plan::Garbage => {
            send_down(
                k,
                sock,
                Arrival::Bytes(b"\x15\x03\x01\x00\x02\x02\x28 what?\r\n\r\n".to_vec()),
            );
            over(k, sock);
        }
        Plan::Cut => {
            send_down(k, sock, Arrival::Bytes(ok.into_bytes()[..20].to_vec()));
            send_down(k, sock, Arrival::Reset);
            over(k, sock);
        }
        Plan::Fin => {
            send_down(k, sock, Arrival::Fin);
            over(k, sock);
        }
        Plan::Refuse | Plan::BlackHole | Plan::Silent => over(k, sock),
    }
}

impl Wait {
    fn text(self, k: &Kernel) -> String {
        match self {
            Wait::Seconds(seconds) => seconds.to_string(),
            Wait::Soon => "soon".to_owned(),
            Wait::Until(seconds) => {
                let now = crate::io::clock::Clock::wall_at(k.now);
                httpdate::fmt_http_date(now + Duration::from_secs(seconds))
            }
        }
    }

    /// Whether `told` is what it means; a date comes nearer on its way.
    pub(crate) fn is(self, told: Option<Duration>) -> bool {
        match self {
            Wait::Seconds(seconds) => told == Some(Duration::from_secs(seconds)),
            Wait::Soon => told.is_none(),
            Wait::Until(seconds) => told.is_some_and(|told| {
                let asked = Duration::from_secs(seconds);
                told <= asked && told + Duration::from_secs(40) >= asked
            }),
        }
    }
}

fn over(k: &mut Kernel, sock: usize) {
    k.sv.socks.get_mut(&sock).unwrap().phase = Phase::Over;
}

fn open(k: &mut Kernel, sock: usize) {
    let sessions = k.sv.sessions;
    let overlap = k.sv.rates.overlap;
    let conn = k.sv.socks[&sock].conn;
    let head = k.sv.conns[conn].head;
    let back = k.range(0, overlap + 1);
    if back > 1 {
        k.fault("replay");
    }
    let server = k.sv.socks.get_mut(&sock).unwrap();
    server.phase = Phase::Open;
    server.upgraded = true;
    server.waits = sessions;
    server.cursor = (head + 1).saturating_sub(back).max(1);
    mishap_later(k, sock);
    let chatter = k.chance(0.2);
    if chatter {
        k.soon(SECOND, Ev::Flood(sock, 1));
    }
}

fn mishap_later(k: &mut Kernel, sock: usize) {
    let mean = k.sv.rates.mishap;
    let wait = k.after_about(mean);
    k.soon(wait, Ev::Mishap(sock));
}

/// Takes the client's frames out of what came in.
fn frames(k: &mut Kernel, sock: usize) {
    let mut at = 0;
    loop {
        let server = k.sv.socks.get_mut(&sock).unwrap();
        let Some((opcode, payload, len)) = parse(&server.inbox[at..]) else {
            server.inbox.drain(..at);
            return;
        };
        at += len;
        let (conn, epoch) = (server.conn, server.epoch);
        server.messages += u64::from(opcode < 8);
        server.pings += u64::from(opcode == 9);
        if server.got_close && opcode != 10 && opcode != 9 {
            k.broken("nothing-after-close", || format!("opcode {opcode} on sock {sock}"));
        }
        match opcode {
            1 | 2 => {
                opening(k, sock, &payload);
                if let Some(number) = number_after(&payload, "out ") {
                    k.note(|| format!("server of conn {conn} got out {number} in epoch {epoch}"));
                    let server = &k.sv.socks[&sock];
                    if k.sv.sessions && !server.welcomed {
                        k.broken("outbox-waits-for-the-session", || format!("sock {sock}"));
                    }
                    crate::checks::out_arrived(k, conn, number, Some(epoch));
                } else if let Some(at) = number_after(&payload, "resume ") {
                    resume(k, sock, at);
                }
            }
            8 => {
                let answered = k.chance(0.9);
                let server = k.sv.socks.get_mut(&sock).unwrap();
                server.got_close = true;
                k.sv.close_frames += 1;
                let server = k.sv.socks.get_mut(&sock).unwrap();
                if answered && server.phase == Phase::Open && server.mute.is_none() {
                    server.phase = Phase::Over;
                    let code = payload.get(..2).unwrap_or_default().to_vec();
                    send_down(k, sock, Arrival::Bytes(frame(0x88, &code)));
                    send_down(k, sock, Arrival::Fin);
                }
            }
            9 => {
                let server = &k.sv.socks[&sock];
                if server.mute.is_none() && server.phase == Phase::Open {
                    send_down(k, sock, Arrival::Bytes(frame(0x8A, &payload)));
                }
            }
            10 => {
                k.sv.socks.get_mut(&sock).unwrap().pinged = None;
                if !PINGS.contains(&payload.as_slice()) {
                    k.broken("pong-echoes-its-ping", || format!("sock {sock}: {payload:?}"));
                }
            }
            other => k.broken("legal-frames", || format!("opcode {other} from conn {conn}")),
        }
    }
}

/// A socket begins with the opening messages, and shows none of them again.
fn opening(k: &mut Kernel, sock: usize, payload: &[u8]) {
    let (openings, server) = (k.sv.openings, &mut k.sv.socks.get_mut(&sock).unwrap());
    let opened = server.opened;
    match number_after(payload, "open ") {
        Some(number) => {
            server.opened += 1;
            if number != opened {
                k.broken("openings-once", || format!("sock {sock}: {number} after {opened}"));
            }
        }
        None if opened != openings => {
            k.broken("openings-first", || format!("sock {sock}: {opened} of {openings}"));
        }
        None => {}
    }
}

fn number_after(payload: &[u8], word: &str) -> Option<u64> {
    let rest = payload.strip_prefix(word.as_bytes())?;
    let digits = rest.split(|byte| *byte == b' ').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn resume(k: &mut Kernel, sock: usize, at: u64) {
    let overlap = k.sv.rates.overlap;
    // The last message that came may have been sent before one that did not.
    let reorders = k.sv.rates.reorder > 0.0 || k.sv.reordered;
    let back = k.range(if reorders { 3 } else { 0 }, overlap + 4);
    let conn = k.sv.socks[&sock].conn;
    let server = k.sv.socks.get_mut(&sock).unwrap();
    if server.phase != Phase::Open || !server.waits {
        return;
    }
    server.waits = false;
    server.cursor = (at + 1).saturating_sub(back).max(1);
    k.note(|| format!("sock {sock} of conn {conn} resumes from {at}"));
    let lazy = k.sv.rates.lazy;
    let lazy = !k.sv.healed && k.chance(lazy);
    if lazy {
        k.fault("no welcome");
        return;
    }
    k.sv.socks.get_mut(&sock).unwrap().welcomed = true;
    // Alone, or with what follows.
    if k.chance(0.5) {
        send_down(k, sock, Arrival::Bytes(frame(0x81, b"welcome")));
        pump(k, sock);
    } else {
        pump_behind(k, sock, frame(0x81, b"welcome"));
    }
}

/// Sends what the feed has, as far as the window goes.
pub(crate) fn pump(k: &mut Kernel, sock: usize) {
    pump_behind(k, sock, Vec::new());
}

fn pump_behind(k: &mut Kernel, sock: usize, mut segment: Vec<u8>) {
    let Some(server) = k.sv.socks.get(&sock) else { return };
    let (conn, epoch) = (server.conn, server.epoch);
    if server.phase != Phase::Open || server.waits || server.mute.is_some() || server.idle {
        return;
    }
    let rates = k.sv.rates.clone();
    let mut sent = 0;
    loop {
        if k.net.socks[sock].down + segment.len() >= rates.window || sent >= 200 {
            if !std::mem::replace(&mut k.sv.socks.get_mut(&sock).unwrap().pumps, true) {
                k.soon(50 * MS, Ev::Pump(sock));
            }
            break;
        }
        if k.chance(rates.skip) {
            segment.extend(frame(0x81, b"{\"skip\":true}"));
        }
        let server = k.sv.socks.get_mut(&sock).unwrap();
        let head = k.sv.conns[conn].head;
        let next = if let Some(again) = k.sv.conns[conn].again.pop_front() {
            again
        } else if server.cursor <= head {
            server.cursor += 1;
            server.cursor - 1
        } else {
            break;
        };
        let cursor = server.cursor;
        if cursor <= head && k.chance(rates.reorder) {
            k.sv.socks.get_mut(&sock).unwrap().cursor += 1;
            segment.extend(message(k, conn, epoch, cursor));
            k.sv.reordered = true;
            k.fault("reorder");
        }
        segment.extend(message(k, conn, epoch, next));
        if k.chance(rates.duplicate) {
            let old = next.saturating_sub(k.range(0, 4)).max(1);
            segment.extend(message(k, conn, epoch, old));
            k.fault("duplicate");
        }
        sent += 1;
        if segment.len() > 1400 {
            send_down(k, sock, Arrival::Bytes(std::mem::take(&mut segment)));
        }
    }
    if !segment.is_empty() {
        send_down(k, sock, Arrival::Bytes(segment));
    }
}

/// The number that all copies of a feed's message share.
pub(crate) fn global(k: &Kernel, conn: usize, n: u64) -> u64 {
    let feed = if k.sv.redundant { 0 } else { conn as u64 };
    feed * 1_000_000_000 + n
}

fn message(k: &mut Kernel, conn: usize, epoch: u64, n: u64) -> Vec<u8> {
    k.sv.sent_frames += 1;
    let id = global(k, conn, n);
    let pad = if k.chance(k.sv.rates.big) { k.range(200, 20_000) } else { k.range(0, 60) };
    let text = format!("{{\"id\":{id},\"e\":{epoch},\"pad\":\"{}\"}}", "x".repeat(pad as usize));
    let opcode = if k.chance(0.1) { 0x82 } else { 0x81 };
    if k.chance(0.02) {
        let (a, b) = text.as_bytes().split_at(text.len() / 2);
        let mut bytes = frame(opcode & 0x0F, a);
        bytes.extend(ping(b"between"));
        bytes.extend(frame(0x80, b));
        return bytes;
    }
    frame(opcode, text.as_bytes())
}

/// A feed makes a message.
pub(crate) fn feed(k: &mut Kernel, conn: usize) {
    if k.sv.conns[conn].ended {
        return;
    }
    let (mean, burst) = (k.sv.rates.message, k.sv.rates.burst);
    let count = k.range(1, burst + 1);
    if k.sv.redundant {
        let head = k.sv.conns[0].head + count;
        k.sv.conns.iter_mut().for_each(|feed| feed.head = head);
    } else {
        k.sv.conns[conn].head += count;
    }
    pump_all(k);
    let wait = k.after_about(mean * count as u32);
    k.soon(wait, Ev::Feed(conn));
}

pub(crate) fn pump_all(k: &mut Kernel) {
    let open: Vec<usize> =
        k.sv.socks.iter().filter(|(_, server)| server.is_open()).map(|(s, _)| *s).collect();
    for sock in open {
        if k.net.socks[sock].life == Life::Open {
            pump(k, sock);
        }
    }
}

/// The consumer failed a message: it comes again.
pub(crate) fn redeliver(k: &mut Kernel, conn: usize, n: u64) {
    k.sv.conns[conn].again.push_back(n);
    pump_all(k);
}

/// Something goes wrong with an open connection.
pub(crate) fn mishap(k: &mut Kernel, sock: usize) {
    let Some(server) = k.sv.socks.get(&sock) else { return };
    if k.sv.healed || server.phase != Phase::Open || k.net.socks[sock].life != Life::Open {
        return;
    }
    let (fatal, big) = (k.sv.rates.fatal, k.sv.max_message);
    let now = k.now;
    mishap_later(k, sock);
    let kind = if k.chance(fatal) { k.range(20, 25) } else { k.range(0, 18) };
    let name = match kind {
        0 | 1 => "reset",
        2 | 16 => "reset within a frame",
        3 | 17 => "end within a frame",
        4 => "end without a close frame",
        7 | 8 => "half-open",
        9 => "server stops reading",
        10 => "server falls silent",
        11 => "ping flood",
        12 => "no data",
        13 => "delay",
        14 => "half-close",
        15 => "close frame and silence",
        20 => "oversize frame",
        21 => "reserved bits",
        22 => "not UTF-8",
        23 => "masked frame",
        // Its code is the fault's name.
        _ => "",
    };
    k.note(|| format!("sock {sock}: {}", if name.is_empty() { "it closes" } else { name }));
    if !name.is_empty() {
        k.fault(name);
    }
    match kind {
        0 | 1 => {
            send_down(k, sock, Arrival::Reset);
            over(k, sock);
        }
        2 | 3 => {
            let half = frame(0x81, b"{\"id\":1,\"pad\":\"never whole\"}");
            send_down(k, sock, Arrival::Bytes(half[..9].to_vec()));
            send_down(k, sock, if kind == 2 { Arrival::Reset } else { Arrival::Fin });
            over(k, sock);
        }
        4 => {
            send_down(k, sock, Arrival::Fin);
            over(k, sock);
        }
        5 | 6 => {
            let codes = [1000u16, 1001, 1005, 1011, 1012, 1013, 1014, 2999, 3000, 4321, 4999];
            let code = k.pick(&codes);
            close(k, sock, code);
        }
        7 | 8 => {
            k.net.socks[sock].frozen = Some(now);
            over(k, sock);
        }
        9 => {
            k.sv.socks.get_mut(&sock).unwrap().stalled = Some(now);
            // The way to it may be full already, or nearly.
            if k.chance(0.5) {
                let space = k.range(0, 20) as usize;
                let it = &mut k.net.socks[sock];
                it.tx_space = it.tx_space.min(space);
            }
        }
        10 => k.sv.socks.get_mut(&sock).unwrap().mute = Some(now),
        11 => k.soon(0, Ev::Flood(sock, 3000)),
        12 => k.sv.socks.get_mut(&sock).unwrap().idle = true,
        13 => k.net.socks[sock].delay = (100 * MS, LONGEST_DELAY),
        14 => {
            // Half-closed: it still reads.
            send_down(k, sock, Arrival::Fin);
            k.sv.socks.get_mut(&sock).unwrap().mute = Some(now);
        }
        15 => {
            send_down(k, sock, Arrival::Bytes(frame(0x88, &1001u16.to_be_bytes())));
            let server = k.sv.socks.get_mut(&sock).unwrap();
            server.mute = Some(now);
            server.said.get_or_insert(Said::Close(1001));
        }
        16 | 17 => {
            cut_within(k, sock, if kind == 16 { Arrival::Reset } else { Arrival::Fin });
        }
        20 => {
            let mut head = vec![0x82, 127];
            head.extend((big as u64 + 1).to_be_bytes());
            send_down(k, sock, Arrival::Bytes(head));
        }
        21 => send_down(k, sock, Arrival::Bytes(vec![0xC1, 0])),
        22 => send_down(k, sock, Arrival::Bytes(frame(0x81, &[0xFF, 0xFE]))),
        23 => send_down(k, sock, Arrival::Bytes(vec![0x81, 0x80, 1, 2, 3, 4])),
        _ => {
            // The last ones are no codes for a close frame.
            let code = k.pick(&[1002u16, 1003, 1007, 1008, 1009, 1010, 999, 1006, 1015, 5000]);
            close(k, sock, code);
        }
    }
}

/// Ends the stream within the feed's next message.
fn cut_within(k: &mut Kernel, sock: usize, end: Arrival) {
    let Server { conn, epoch, waits, mute, .. } = k.sv.socks[&sock];
    let next = k.sv.socks[&sock].cursor.min(k.sv.conns[conn].head);
    if next > 0 && !waits && mute.is_none() {
        let bytes = message(k, conn, epoch, next);
        let some = k.range(1, bytes.len() as u64) as usize;
        send_down(k, sock, Arrival::Bytes(bytes[..some].to_vec()));
    }
    send_down(k, sock, end);
    over(k, sock);
}

/// The server lets go of whatever socket of this connection is open.
pub(crate) fn cut(k: &mut Kernel, conn: usize) {
    let open = k.sv.socks.iter().filter(|(_, server)| server.conn == conn && server.is_open());
    let open: Vec<usize> = open.map(|(sock, _)| *sock).collect();
    open.into_iter().for_each(|sock| close(k, sock, 1001));
}

fn close(k: &mut Kernel, sock: usize, code: u16) {
    k.note(|| format!("sock {sock}: server closes with {code}"));
    k.fault(format!("close {code}"));
    // The first word counts.
    k.sv.socks.get_mut(&sock).unwrap().said.get_or_insert(Said::Close(code));
    let payload = if code == 1005 { Vec::new() } else { code.to_be_bytes().to_vec() };
    send_down(k, sock, Arrival::Bytes(frame(0x88, &payload)));
    over(k, sock);
    if k.chance(0.5) {
        send_down(k, sock, Arrival::Fin);
    }
}

pub(crate) fn flood(k: &mut Kernel, sock: usize, left: u32) {
    let Some(server) = k.sv.socks.get(&sock) else { return };
    if server.phase != Phase::Open || server.mute.is_some() || left == 0 {
        return;
    }
    if k.net.socks[sock].life != Life::Open || k.net.socks[sock].down > k.sv.rates.window {
        return;
    }
    let mut bytes = Vec::new();
    let some = left.min(50);
    (0..some).for_each(|_| bytes.extend(ping(b"0123456789")));
    if left == 1 {
        let now = k.now;
        k.sv.socks.get_mut(&sock).unwrap().pinged.get_or_insert(now);
    }
    send_down(k, sock, Arrival::Bytes(bytes));
    k.soon(20 * MS, Ev::Flood(sock, left - some));
}

/// Whether a fault of this rate strikes now: none does once the world has healed.
pub(crate) fn strikes(k: &mut Kernel, fault: &str, rate: impl Fn(&Rates) -> f64) -> bool {
    let p = if k.sv.healed { 0.0 } else { rate(&k.sv.rates) };
    let strikes = p > 0.0 && k.chance(p);
    if strikes {
        k.fault(fault);
    }
    strikes
}

/// From now on nothing goes wrong any more; what is dead stays dead.
pub(crate) fn heal(k: &mut Kernel) {
    k.sv.healed = true;
    k.sv.healed_at = k.now;
    let rates = &mut k.sv.rates;
    (rates.skip, rates.duplicate, rates.reorder) = (0.0, 0.0, 0.0);
    rates.slow = false;
    rates.message = rates.message.min(Duration::from_secs(5));
    let Kernel { sv, net, .. } = k;
    for (sock, server) in &mut sv.socks {
        server.idle = false;
        net.socks[*sock].delay = (50_000, 2_000_000);
    }
    // What a feed kept to itself until now goes out.
    pump_all(k);
}

/// The client's socket is gone: what it sent and nobody read is lost.
pub(crate) fn client_gone(k: &mut Kernel, sock: usize) {
    let Some(mut server) = k.sv.socks.remove(&sock) else { return };
    let conn = server.conn;
    server.inbox.append(&mut server.unread);
    k.sv.socks.insert(sock, server);
    let rest = std::mem::take(&mut k.sv.socks.get_mut(&sock).unwrap().inbox);
    k.sv.socks.get_mut(&sock).unwrap().phase = Phase::Over;
    lose(k, sock, &rest);
}

/// Outgoing messages in these bytes reach nobody.
fn lose(k: &mut Kernel, sock: usize, bytes: &[u8]) {
    let Some(server) = k.sv.socks.get_mut(&sock) else { return };
    let conn = server.conn;
    // Frames may lie across what was lost before: they are put together first.
    server.unread.extend_from_slice(bytes);
    let mut all = std::mem::take(&mut server.inbox);
    all.append(&mut server.unread);
    let mut lost = Vec::new();
    let mut at = 0;
    while let Some((_, payload, len)) = parse(&all[at..]) {
        at += len;
        if let Some(n) = number_after(&payload, "out ") {
            lost.push(n);
        }
    }
    all.drain(..at);
    k.sv.socks.get_mut(&sock).unwrap().inbox = all;
    for n in lost {
        k.note(|| format!("out {n} of conn {conn} is lost with sock {sock}"));
        crate::checks::out_arrived(k, conn, n, None);
    }
}

pub(crate) fn frame(head: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![head];
    match payload.len() {
        len @ 0..=125 => bytes.push(len as u8),
        len @ 126..=65_535 => {
            bytes.push(126);
            bytes.extend((len as u16).to_be_bytes());
        }
        len => {
            bytes.push(127);
            bytes.extend((len as u64).to_be_bytes());
        }
    }
    bytes.extend_from_slice(payload);
    bytes
}

fn ping(payload: &[u8]) -> Vec<u8> {
    frame(0x89, payload)
}

/// One masked frame: opcode, payload, and its whole length.
fn parse(bytes: &[u8]) -> Option<(u8, Vec<u8>, usize)> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    let (len, at) = match second & 0x7F {
        126 => (u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?) as usize, 4),
        127 => (u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?) as usize, 10),
        len => (len as usize, 2),
    };
    let mask = bytes.get(at..at + 4)?;
    let mut payload = bytes.get(at + 4..at + 4 + len)?.to_vec();
    payload.iter_mut().enumerate().for_each(|(at, byte)| *byte ^= mask[at & 3]);
    Some((first & 0x0F, payload, at + 4 + len))
}
