//! Both ends of a WebSocket without this crate: a server's side by hand, and
//! the client that a program would write around tungstenite.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use native_tls::{Certificate, Identity, TlsAcceptor, TlsConnector, TlsStream};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tungstenite::WebSocket;
use tungstenite::handshake::derive_accept_key;

/// No wait of a bench is longer.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// What `wss://` needs on the server's side, and the root that clients trust.
pub(crate) struct Authority {
    pub(crate) acceptor: TlsAcceptor,
    pub(crate) root: String,
}

impl Authority {
    /// A certificate for the loopback interface, signed by a root of its own.
    pub(crate) fn new() -> Self {
        Self::certify().expect("a certificate can be made")
    }

    fn certify() -> Result<Self, Box<dyn std::error::Error>> {
        let mut root = CertificateParams::new([])?;
        root.distinguished_name.push(DnType::CommonName, "broadsock bench root");
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(root, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let mut leaf = CertificateParams::new(["127.0.0.1".to_owned()])?;
        leaf.distinguished_name.push(DnType::CommonName, "broadsock bench server");
        let chain = leaf.signed_by(&key, &root)?.pem() + &root.pem();
        let identity = Identity::from_pkcs8(chain.as_bytes(), key.serialize_pem().as_bytes())?;
        Ok(Self { acceptor: TlsAcceptor::new(identity)?, root: root.pem() })
    }
}

/// A connector that trusts `root`, in PEM. Made once: it loads the system's
/// roots too, which takes 40 ms.
pub(crate) fn connector(root: &str) -> TlsConnector {
    let root = Certificate::from_pem(root.as_bytes()).expect("it was made here");
    TlsConnector::builder().add_root_certificate(root).build().expect("the platform has TLS")
}

/// A socket, with or without TLS.
#[derive(Debug)]
pub(crate) enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Wire {
    pub(crate) fn socket(&self) -> &TcpStream {
        match self {
            Wire::Plain(socket) => socket,
            Wire::Tls(tls) => tls.get_ref(),
        }
    }

    /// The server's side of a new connection, up to and with the upgrade;
    /// returns the request's path too.
    pub(crate) fn accept(
        socket: TcpStream,
        acceptor: Option<&TlsAcceptor>,
    ) -> io::Result<(Self, String)> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(LONG))?;
        socket.set_write_timeout(Some(LONG))?;
        let mut wire = match acceptor {
            None => Wire::Plain(socket),
            Some(acceptor) => {
                Wire::Tls(Box::new(acceptor.accept(socket).map_err(io::Error::other)?))
            }
        };
        let path = upgrade(&mut wire)?;
        Ok((wire, path))
    }
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Wire::Plain(socket) => socket.read(buf),
            Wire::Tls(tls) => tls.read(buf),
        }
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Wire::Plain(socket) => socket.write(buf),
            Wire::Tls(tls) => tls.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Wire::Plain(socket) => socket.flush(),
            Wire::Tls(tls) => tls.flush(),
        }
    }
}

/// Answers a client's upgrade request, and returns its path.
fn upgrade(wire: &mut Wire) -> io::Result<String> {
    let mut head = Vec::new();
    let mut buf = [0; 1024];
    while !head.ends_with(b"\r\n\r\n") {
        let count = wire.read(&mut buf)?;
        if count == 0 || head.len() > 16 * 1024 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.extend_from_slice(&buf[..count]);
    }
    let head = String::from_utf8_lossy(&head);
    let mut headers = head.lines().filter_map(|line| line.split_once(':'));
    let key = headers.find(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-key"));
    let key = key.ok_or(io::ErrorKind::InvalidData)?.1.trim();
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {}\r\n\r\n",
        derive_accept_key(key.as_bytes())
    );
    wire.write_all(answer.as_bytes())?;
    Ok(head.split(' ').nth(1).unwrap_or("/").to_owned())
}

/// An unmasked, unfragmented frame.
pub(crate) fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        len @ 0..=125 => frame.push(len as u8),
        len @ 126..=65_535 => {
            frame.push(126);
            frame.extend_from_slice(&(len as u16).to_be_bytes());
        }
        len => {
            frame.push(127);
            frame.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    frame
}

/// Takes the first whole frame of a client off `bytes`: its opcode and payload.
pub(crate) fn unmask(bytes: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let (head, rest) = bytes.split_first_chunk::<2>()?;
    let (len, rest) = match head[1] & 0x7f {
        126 => {
            let (len, rest) = rest.split_first_chunk::<2>()?;
            (usize::from(u16::from_be_bytes(*len)), rest)
        }
        len => (usize::from(len), rest),
    };
    let (mask, rest) = rest.split_first_chunk::<4>()?;
    let payload = rest.get(..len)?.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m).collect();
    let opcode = head[0] & 0x0f;
    let whole = bytes.len() - rest.len() + len;
    bytes.drain(..whole);
    Some((opcode, payload))
}

/// Hears a client out until it closes or is gone, and takes leave of it.
pub(crate) fn until_closed(wire: &mut Wire) {
    let mut bytes = Vec::new();
    let mut buf = [0; 1024];
    loop {
        while let Some((opcode, payload)) = unmask(&mut bytes) {
            if opcode == 8 {
                let _ = wire.write_all(&frame(8, &payload));
                let _ = wire.socket().shutdown(Shutdown::Write);
                return;
            }
        }
        match wire.read(&mut buf) {
            Ok(count) if count > 0 => bytes.extend_from_slice(&buf[..count]),
            _ => return,
        }
    }
}

/// A listener on the loopback interface, and its port.
pub(crate) fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    (listener, port)
}

/// The next connection; none within [`LONG`] is an error.
pub(crate) fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let until = Instant::now() + LONG;
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false)?;
                return Ok(socket);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if Instant::now() > until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A server for one connection, on a thread of its own; returns its port.
pub(crate) fn serve<T: Send + 'static>(
    acceptor: Option<TlsAcceptor>,
    run: impl FnOnce(Wire) -> T + Send + 'static,
) -> (u16, JoinHandle<T>) {
    let (listener, port) = listen();
    let thread = std::thread::spawn(move || {
        let socket = accept(&listener).expect("a client comes");
        let (wire, _) = Wire::accept(socket, acceptor.as_ref()).expect("it asks for an upgrade");
        run(wire)
    });
    (port, thread)
}

/// The URL of a port here.
pub(crate) fn url(secure: bool, port: u16, path: &str) -> String {
    format!("{}://127.0.0.1:{port}/{path}", if secure { "wss" } else { "ws" })
}

/// The bare client: a blocking socket under tungstenite with its defaults.
pub(crate) fn bare(url: &str, tls: Option<&TlsConnector>) -> io::Result<WebSocket<Wire>> {
    let (_, rest) = url.split_once("://").ok_or(io::ErrorKind::InvalidInput)?;
    let authority = rest.split('/').next().unwrap_or(rest);
    let socket = TcpStream::connect(authority)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(LONG))?;
    let wire = match tls {
        None => Wire::Plain(socket),
        Some(tls) => {
            let tls = tls.connect("127.0.0.1", socket).map_err(io::Error::other)?;
            Wire::Tls(Box::new(tls))
        }
    };
    let (client, _) = tungstenite::client(url, wire).map_err(io::Error::other)?;
    Ok(client)
}
