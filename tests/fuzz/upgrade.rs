//! What a server answers to the upgrade request: the verdict does not depend on
//! how it was cut into pieces, agrees with tungstenite's, and leads nowhere that
//! the program did not ask for.

use std::io::{self, Cursor, Read, Write};
use std::time::SystemTime;

use tungstenite::handshake::HandshakeError;
use tungstenite::handshake::client::ClientHandshake;
use tungstenite::handshake::derive_accept_key;
use tungstenite::http;

use super::Input;
use crate::error::Error;
use crate::handler::Request;
use crate::io::target::Target;
use crate::io::upgrade::{Answer, Upgrade, Upgraded};

pub(super) const WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n",
    b"HTTP/1.1 103 Early Hints\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: ",
    b"Upgrade: websocket\r\n",
    b"Connection: keep-alive, Upgrade\r\n",
    b"Sec-WebSocket-Accept: {accept}\r\n",
    b"Sec-WebSocket-Protocol: a\r\n",
    b"Sec-WebSocket-Extensions: permessage-deflate\r\n",
    b"Location: //h:9/?#@[::1]",
    b"wss://",
    b"https://",
    b"\x81\x00",
];

/// Where the key's answer stands in an input.
const ACCEPT: &str = "{accept}";

/// The first byte says whether subprotocols are offered, and the length of the
/// pieces; then the answer.
pub(super) fn run(input: &[u8]) {
    let mut input = Input(input);
    let first = input.byte();
    let mut request = Request::new("ws://h:9/a/b?secret").header("X-Token", "secret");
    if first & 1 == 1 {
        request = request.subprotocol("a").subprotocol("b");
    }
    let piece = usize::from(first >> 1).max(1);
    let target = Target::parse(&request.url).unwrap();
    let mut upgrade = Upgrade::new(&target, &request, true);
    let key = header(upgrade.request(), "sec-websocket-key").unwrap();
    let bytes = replaced(input.0, ACCEPT.as_bytes(), derive_accept_key(key.as_bytes()).as_bytes());

    let verdict = read(&mut upgrade.clone(), &bytes, usize::MAX);
    let in_pieces = read(&mut upgrade, &bytes, piece);
    assert_eq!(in_pieces, verdict, "{piece} bytes at a time");
    if let Err(error) = &verdict
        && !is_refused_here_only(&bytes)
    {
        assert!(!tungstenite_accepts(&request, &key, &bytes), "{error}");
    }
    if let Ok(Verdict::Redirect(location)) = verdict {
        follow(&target, &request, &location);
    }
}

/// What became of an answer.
#[derive(Debug, PartialEq)]
enum Verdict {
    Upgraded { subprotocol: Option<String>, headers: Vec<(String, String)>, rest: Vec<u8> },
    Redirect(String),
    Incomplete,
}

fn read(upgrade: &mut Upgrade, bytes: &[u8], piece: usize) -> Result<Verdict, String> {
    let mut left = bytes;
    while !left.is_empty() {
        let (now, later) = left.split_at(piece.min(left.len()));
        left = later;
        match upgrade.on_read(now, SystemTime::UNIX_EPOCH).map_err(shown)? {
            Some(Answer::Upgraded(Upgraded { subprotocol, headers, mut rest })) => {
                rest.extend_from_slice(left);
                return Ok(Verdict::Upgraded { subprotocol, headers, rest });
            }
            Some(Answer::Redirect(location)) => return Ok(Verdict::Redirect(location)),
            None => {}
        }
    }
    Ok(Verdict::Incomplete)
}

fn shown(error: Error) -> String {
    assert!(!error.chain().contains("secret"), "{}", error.chain());
    format!("{:?}: {error}", error.kind())
}

/// tungstenite passes over an extension that nobody offered, and over empty lines
/// before an answer, which only a server may do (RFC 9112, section 2.2).
fn is_refused_here_only(bytes: &[u8]) -> bool {
    let name = b"sec-websocket-extensions";
    let extension = bytes.to_ascii_lowercase().windows(name.len()).any(|part| part == name);
    extension || bytes.starts_with(b"\r") || bytes.starts_with(b"\n")
}

/// A redirect is refused, or leads to a target whose request is one request.
fn follow(from: &Target, request: &Request, location: &str) {
    let to = match from.redirected(location) {
        Ok(to) => to,
        Err(error) => {
            shown(error);
            return;
        }
    };
    assert!(!to.host.is_empty() && to.port != 0 && !to.to_string().contains('?'), "{to}");
    let shown = Target::parse(&to.to_string()).unwrap();
    assert!(to.same_origin(&shown), "{to} is shown as {shown}");
    let next = Upgrade::new(&to, request, false);
    let mut space = [httparse::EMPTY_HEADER; 16];
    let mut parsed = httparse::Request::new(&mut space);
    let status = parsed.parse(next.request()).unwrap();
    assert_eq!(status, httparse::Status::Complete(next.request().len()), "{location}");
    assert_eq!(parsed.path, Some(to.path.as_str()));
    let offered = usize::from(!request.subprotocols.is_empty());
    assert_eq!(parsed.headers.len(), 5 + offered, "{location}");
}

fn tungstenite_accepts(request: &Request, key: &str, bytes: &[u8]) -> bool {
    let mut theirs = http::Request::builder()
        .uri(&request.url)
        .header("Host", "h:9")
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", key);
    if !request.subprotocols.is_empty() {
        theirs = theirs.header("Sec-WebSocket-Protocol", request.subprotocols.join(", "));
    }
    let stream = Answering(Cursor::new(bytes));
    let start = ClientHandshake::start(stream, theirs.body(()).unwrap(), None).unwrap();
    match start.handshake() {
        Ok(_) => true,
        Err(HandshakeError::Failure(_)) => false,
        Err(HandshakeError::Interrupted(_)) => unreachable!("the stream never blocks"),
    }
}

/// The value of a header in a head that this crate wrote.
fn header(head: &[u8], name: &str) -> Option<String> {
    let text = std::str::from_utf8(head).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(": "));
    let mut named = lines.filter(|(key, _)| key.eq_ignore_ascii_case(name));
    named.next().map(|(_, value)| value.to_owned())
}

/// `bytes` with every `from` made `to`.
fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut all = Vec::with_capacity(bytes.len());
    let mut left = bytes;
    while let Some((first, rest)) = left.split_first() {
        if let Some(behind) = left.strip_prefix(from) {
            all.extend_from_slice(to);
            left = behind;
        } else {
            all.push(*first);
            left = rest;
        }
    }
    all
}

/// A server that has said everything already.
#[derive(Debug)]
struct Answering<'a>(Cursor<&'a [u8]>);

impl Read for Answering<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Answering<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
