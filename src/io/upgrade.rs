//! The HTTP upgrade (RFC 6455, section 4): the request and its answer.
//!
//! Done here and not by tungstenite, which refuses a legal
//! `Connection: keep-alive, Upgrade`, gives up on an answer that arrives byte
//! by byte, and accepts an extension that nobody offered.

use std::time::{Duration, SystemTime};

use tungstenite::handshake::client::generate_key;
use tungstenite::handshake::derive_accept_key;
use tungstenite::http::{HeaderName, HeaderValue};

use super::target::Target;
use crate::error::{Error, ErrorKind};
use crate::handler::Request;

/// Most answers' heads have no more headers than this.
const FEW_HEADERS: usize = 16;

/// An answer's head may have this many headers and bytes.
const MAX_HEADERS: usize = 128;
const MAX_HEAD: usize = 64 * 1024;

/// Headers that this module writes itself.
const RESERVED: [&str; 6] = [
    "upgrade",
    "connection",
    "sec-websocket-key",
    "sec-websocket-version",
    "sec-websocket-protocol",
    "sec-websocket-extensions",
];

/// Both sides of one upgrade: the bytes to send, and the reading of the answer.
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Upgrade {
    request: Vec<u8>,
    accept: String,
    offered: Vec<String>,
    answer: Vec<u8>,
}

/// What the server said.
#[derive(Debug)]
pub(crate) enum Answer {
    /// 101: the rest belongs to the WebSocket.
    Upgraded(Upgraded),
    /// 301, 302, 303, 307 or 308 with a `Location`.
    Redirect(String),
}

/// A completed upgrade.
#[derive(Debug)]
pub(crate) struct Upgraded {
    pub(crate) subprotocol: Option<String>,
    pub(crate) headers: Vec<(String, String)>,
    /// Bytes behind the head: the first frames.
    pub(crate) rest: Vec<u8>,
}

/// Checks what can be checked of a request before there is a connection.
pub(crate) fn check(request: &Request) -> Result<(), Error> {
    for (name, value) in &request.headers {
        let bad = |why: &str| Err(Error::setting("header", format!("`{name}` {why}")));
        if HeaderName::from_bytes(name.as_bytes()).is_err() {
            return Err(Error::setting("header", format!("{name:?} is not a header name")));
        }
        if HeaderValue::from_str(value).is_err() {
            return bad("has a value with a line break or another control character");
        }
        if RESERVED.contains(&name.to_ascii_lowercase().as_str()) {
            return bad("is written by the handshake itself");
        }
    }
    for protocol in &request.subprotocols {
        if HeaderName::from_bytes(protocol.as_bytes()).is_err() {
            let why = format!("{protocol:?} is not a token (RFC 6455, section 4.1)");
            return Err(Error::setting("subprotocol", why));
        }
    }
    Ok(())
}

impl Upgrade {
    /// The request for `target`. Its own headers are left out when it was
    /// redirected to another origin: they may be credentials.
    pub(crate) fn new(target: &Target, request: &Request, same_origin: bool) -> Self {
        let key = generate_key();
        let own: &[(String, String)] = if same_origin { &request.headers } else { &[] };
        let mut head = format!("GET {} HTTP/1.1\r\n", target.path);
        if !own.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            head.push_str(&format!("Host: {}\r\n", target.authority));
        }
        head.push_str("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n");
        head.push_str(&format!("Sec-WebSocket-Key: {key}\r\n"));
        if !request.subprotocols.is_empty() {
            let offered = request.subprotocols.join(", ");
            head.push_str(&format!("Sec-WebSocket-Protocol: {offered}\r\n"));
        }
        for (name, value) in own {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        Self {
            request: head.into_bytes(),
            accept: derive_accept_key(key.as_bytes()),
            offered: request.subprotocols.clone(),
            answer: Vec::new(),
        }
    }

    pub(crate) fn request(&self) -> &[u8] {
        &self.request
    }

    /// Takes in what was read. `None`: the head is not complete yet.
    pub(crate) fn on_read(
        &mut self,
        bytes: &[u8],
        wall: SystemTime,
    ) -> Result<Option<Answer>, Error> {
        let mut searched = self.answer.len().saturating_sub(3);
        self.answer.extend_from_slice(bytes);
        loop {
            let start = &self.answer[..self.answer.len().min(5)];
            if !b"HTTP/".starts_with(start) {
                return Err(refused("the server does not speak HTTP"));
            }
            let end = self.answer[searched..].windows(4).position(|four| four == b"\r\n\r\n");
            let Some(end) = end.map(|at| searched + at + 4).filter(|end| *end <= MAX_HEAD) else {
                break;
            };
            if let Some(answer) = self.parse(end, wall)? {
                return Ok(Some(answer));
            }
            // An interim answer: the final one follows (RFC 9110, section 15.2).
            self.answer.drain(..end);
            searched = 0;
        }
        if self.answer.len() <= MAX_HEAD {
            return Ok(None);
        }
        Err(refused(&format!("the answer's head is larger than {MAX_HEAD} bytes")))
    }

    /// Reads a head; `None` if it is that of an interim answer.
    fn parse(&self, end: usize, wall: SystemTime) -> Result<Option<Answer>, Error> {
        let (code, headers) = self.head(end)?;
        match code {
            101 => self.accept(headers, end).map(|done| Some(Answer::Upgraded(done))),
            100..=199 => Ok(None),
            status @ (301 | 302 | 303 | 307 | 308) => match headers.first("location") {
                Some(location) => Ok(Some(Answer::Redirect(location.to_owned()))),
                None => Err(http_error(status, &headers, wall)),
            },
            status => Err(http_error(status, &headers, wall)),
        }
    }

    /// Status and headers of a head.
    fn head(&self, end: usize) -> Result<(u16, Headers), Error> {
        let mut most = FEW_HEADERS;
        loop {
            // Not on the stack: its pages stay with the thread for as long as it lives.
            let mut space = vec![httparse::EMPTY_HEADER; most];
            let mut response = httparse::Response::new(&mut space);
            match response.parse(&self.answer[..end]) {
                Ok(_) => {
                    let headers = Headers(response.headers.iter().map(owned).collect());
                    return Ok((response.code.unwrap_or_default(), headers));
                }
                Err(httparse::Error::TooManyHeaders) if most < MAX_HEADERS => most = MAX_HEADERS,
                Err(httparse::Error::TooManyHeaders) => {
                    return Err(refused(&format!(
                        "the answer has more than {MAX_HEADERS} headers"
                    )));
                }
                Err(error) => {
                    let phrase = "the server's answer to the upgrade is not valid HTTP";
                    return Err(Error::caused(ErrorKind::Handshake, phrase, error));
                }
            }
        }
    }

    fn accept(&self, headers: Headers, end: usize) -> Result<Upgraded, Error> {
        if !headers.has_token("upgrade", "websocket") {
            return Err(refused("its answer has no `Upgrade: websocket`"));
        }
        if !headers.has_token("connection", "upgrade") {
            return Err(refused("its answer has no `Connection: Upgrade`"));
        }
        if headers.first("sec-websocket-accept") != Some(self.accept.as_str()) {
            return Err(refused("its `Sec-WebSocket-Accept` does not match the key"));
        }
        if let Some(extension) = headers.first("sec-websocket-extensions") {
            return Err(refused(&format!("it uses an extension nobody offered: {extension:?}")));
        }
        let subprotocol = self.agreed(headers.first("sec-websocket-protocol"))?;
        Ok(Upgraded { subprotocol, headers: headers.0, rest: self.answer[end..].to_vec() })
    }

    fn agreed(&self, answer: Option<&str>) -> Result<Option<String>, Error> {
        match answer {
            Some(name) if self.offered.iter().any(|offer| offer == name) => {
                Ok(Some(name.to_owned()))
            }
            None if self.offered.is_empty() => Ok(None),
            Some(name) => Err(Error::new(
                ErrorKind::Subprotocol,
                format!("the server chose subprotocol {name:?}, which was not offered"),
            )),
            None => Err(Error::new(
                ErrorKind::Subprotocol,
                format!("the server speaks none of the subprotocols {}", self.offered.join(", ")),
            )),
        }
    }
}

struct Headers(Vec<(String, String)>);

impl Headers {
    fn all<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h str> {
        let named = self.0.iter().filter(move |(key, _)| key.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str())
    }

    fn first(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }

    /// Whether a header's comma-separated list holds `token`, in any case.
    fn has_token(&self, name: &str, token: &str) -> bool {
        self.all(name)
            .flat_map(|value| value.split(','))
            .any(|t| t.trim().eq_ignore_ascii_case(token))
    }
}

fn owned(header: &httparse::Header<'_>) -> (String, String) {
    (header.name.to_owned(), String::from_utf8_lossy(header.value).trim().to_owned())
}

fn refused(why: &str) -> Error {
    Error::new(ErrorKind::Handshake, format!("the upgrade failed: {why}"))
}

fn http_error(status: u16, headers: &Headers, wall: SystemTime) -> Error {
    let retry_after = headers.first("retry-after").and_then(|value| retry_after(value, wall));
    let wish =
        retry_after.map_or(String::new(), |wait| format!(" (Retry-After {}s)", wait.as_secs()));
    let phrase = format!("the server answered the upgrade with HTTP status {status}{wish}");
    Error::new(ErrorKind::Http { status, retry_after }, phrase)
}

/// `Retry-After` in either form (RFC 9110, section 10.2.3). A date in the past
/// means now; anything else that is no number of seconds means nothing.
fn retry_after(value: &str, wall: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit is a wait too long to tell; the cap applies.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX / 4)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(wall).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upgrade(request: &Request) -> Upgrade {
        Upgrade::new(&Target::parse(&request.url).unwrap(), request, true)
    }

    fn answer(upgrade: &Upgrade, extra: &str) -> String {
        let accept = &upgrade.accept;
        format!(
            "HTTP/1.1 101 Switching\r\nUpgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n{extra}\r\n"
        )
    }

    fn failure(head: &str) -> Error {
        let read = upgrade(&"ws://h/".into()).on_read(head.as_bytes(), SystemTime::UNIX_EPOCH);
        read.unwrap_err()
    }

    #[test]
    fn the_request_carries_target_headers_and_subprotocols() {
        let request =
            Request::new("ws://h:9/p?q").header("X-A", "1").subprotocol("a").subprotocol("b");
        let text = String::from_utf8(upgrade(&request).request).unwrap();
        assert!(text.starts_with("GET /p?q HTTP/1.1\r\nHost: h:9\r\n"), "{text}");
        assert!(text.contains("X-A: 1\r\n") && text.contains("Sec-WebSocket-Protocol: a, b\r\n"));
        let target = Target::parse("ws://other/").unwrap();
        let elsewhere = String::from_utf8(Upgrade::new(&target, &request, false).request).unwrap();
        assert!(!elsewhere.contains("X-A"), "headers stay with their origin");
    }

    #[test]
    fn an_answer_dribbled_byte_by_byte_is_accepted_with_the_frames_behind_it() {
        let mut upgrade = upgrade(&"ws://h/".into());
        let head = answer(&upgrade, "X: y\r\n");
        let (last, first) = head.as_bytes().split_last().unwrap();
        for byte in first {
            assert!(upgrade.on_read(&[*byte], SystemTime::UNIX_EPOCH).unwrap().is_none());
        }
        match upgrade.on_read(&[*last, 0x81, 0], SystemTime::UNIX_EPOCH).unwrap() {
            Some(Answer::Upgraded(done)) => {
                assert_eq!(done.rest, [0x81, 0]);
                assert!(done.headers.contains(&("X".to_owned(), "y".to_owned())));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sixty_extra_headers_are_fine_and_too_many_are_a_typed_error() {
        let extra = |n: usize| (0..n).map(|i| format!("X-{i}: {i}\r\n")).collect::<String>();
        let mut few = upgrade(&"ws://h/".into());
        let head = answer(&few, &extra(60));
        assert!(few.on_read(head.as_bytes(), SystemTime::UNIX_EPOCH).unwrap().is_some());
        let mut many = upgrade(&"ws://h/".into());
        let head = answer(&many, &extra(130));
        let error = many.on_read(head.as_bytes(), SystemTime::UNIX_EPOCH).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Handshake);
        assert!(error.to_string().contains("128 headers"));
    }

    #[test]
    fn what_rfc_6455_forbids_is_refused() {
        let base = upgrade(&"ws://h/".into());
        let good = answer(&base, "");
        for (from, to) in [
            ("Upgrade: WebSocket", "Upgrade: h2c"),
            ("Connection: keep-alive, Upgrade", "Connection: keep-alive"),
            ("Sec-WebSocket-Accept: ", "Sec-WebSocket-Accept: x"),
            ("\r\n\r\n", "\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n"),
        ] {
            let mut upgrade = Upgrade { answer: Vec::new(), ..upgrade(&"ws://h/".into()) };
            upgrade.accept.clone_from(&base.accept);
            let head = good.replace(from, to);
            let error = upgrade.on_read(head.as_bytes(), SystemTime::UNIX_EPOCH).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Handshake, "{to}");
        }
        assert_eq!(failure("SSH-2.0-x\r\n").kind(), &ErrorKind::Handshake);
        assert_eq!(
            failure(&format!("HTTP/1.1 {}", "x".repeat(70_000))).kind(),
            &ErrorKind::Handshake
        );
    }

    #[test]
    fn subprotocols_are_agreed_on_or_refused() {
        let offered = Request::new("ws://h/").subprotocol("a").subprotocol("b");
        for (request, extra, agreed) in [
            (offered.clone(), "Sec-WebSocket-Protocol: b\r\n", Ok(Some("b"))),
            (offered.clone(), "", Err(())),
            (offered, "Sec-WebSocket-Protocol: c\r\n", Err(())),
            ("ws://h/".into(), "Sec-WebSocket-Protocol: a\r\n", Err(())),
            ("ws://h/".into(), "", Ok(None)),
        ] {
            let mut upgrade = upgrade(&request);
            let head = answer(&upgrade, extra);
            let outcome = match upgrade.on_read(head.as_bytes(), SystemTime::UNIX_EPOCH) {
                Ok(Some(Answer::Upgraded(done))) => Ok(done.subprotocol),
                Ok(other) => panic!("{other:?}"),
                Err(error) => {
                    assert_eq!(error.kind(), &ErrorKind::Subprotocol);
                    Err(())
                }
            };
            assert_eq!(outcome, agreed.map(|name| name.map(str::to_owned)));
        }
    }

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let wall = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (value, seconds) in [
            ("2", Some(2)),
            (" 120 ", Some(120)),
            ("Sun, 06 Nov 1994 08:49:40 GMT", Some(3)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("99999999999999999999999", Some(u64::MAX / 4)),
            ("-1", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(value, wall), seconds.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn interim_answers_are_read_past() {
        let mut upgrade = upgrade(&"ws://h/".into());
        let head = format!("HTTP/1.1 103 Early\r\nLink: x\r\n\r\n{}", answer(&upgrade, ""));
        let (first, rest) = head.as_bytes().split_at(50);
        assert!(upgrade.on_read(first, SystemTime::UNIX_EPOCH).unwrap().is_none());
        assert!(upgrade.on_read(rest, SystemTime::UNIX_EPOCH).unwrap().is_some());
    }

    #[test]
    fn statuses_become_errors_and_redirects() {
        let error = failure("HTTP/1.1 503 No\r\nRetry-After: 7\r\n\r\n");
        let wait = Some(Duration::from_secs(7));
        assert_eq!(error.kind(), &ErrorKind::Http { status: 503, retry_after: wait });
        let error = failure("HTTP/1.1 302 No\r\n\r\n");
        assert_eq!(error.kind(), &ErrorKind::Http { status: 302, retry_after: None });
        let mut upgrade = upgrade(&"ws://h/".into());
        let head = b"HTTP/1.1 307 Go\r\nLocation: /x\r\n\r\n";
        match upgrade.on_read(head, SystemTime::UNIX_EPOCH).unwrap() {
            Some(Answer::Redirect(location)) => assert_eq!(location, "/x"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn headers_with_line_breaks_and_reserved_names_are_refused_by_name() {
        for (name, value) in [("X", "a\r\nB: c"), ("X\n", "a"), ("", "a"), ("Upgrade", "x")] {
            let error = check(&Request::new("ws://h/").header(name, value)).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Setting("header"), "{name:?}");
        }
        let error = check(&Request::new("ws://h/").subprotocol("a b")).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Setting("subprotocol"));
        assert!(check(&Request::new("ws://h/").header("Host", "other").subprotocol("a")).is_ok());
    }
}
