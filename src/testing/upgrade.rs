//! How the upgrade request is answered.

use std::fmt::Write as _;
use std::time::Duration;

use super::frame;
use super::record::Request;

/// A 101 with something unusual about it, for
/// [`Script::upgrade_with`](super::Script::upgrade_with).
///
/// ```
/// use broadsock::testing::{Script, Server, Upgrade};
///
/// let upgrade = Upgrade::new().header("X-Feed", "7").first_text("at once");
/// let server = Server::script([Script::new().upgrade_with(upgrade)]).start()?;
/// let (mut ws, response) = tungstenite::connect(server.url())?;
/// assert_eq!(response.headers()["X-Feed"], "7");
/// assert_eq!(ws.read()?, "at once".into());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use = "an upgrade does nothing until a script uses it"]
pub struct Upgrade {
    headers: Vec<(String, String)>,
    connection: Option<String>,
    wrong_key: bool,
    first: Vec<u8>,
    pub(super) delay: Option<Duration>,
}

impl Upgrade {
    /// An upgrade with nothing unusual about it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Agrees on that subprotocol, offered or not.
    pub fn subprotocol(self, name: &str) -> Self {
        self.header("Sec-WebSocket-Protocol", name)
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds `count` headers `X-Filler-0: 0` and so on.
    pub fn filler_headers(self, count: usize) -> Self {
        (0..count).fold(self, |upgrade, n| upgrade.header(&format!("X-Filler-{n}"), &n.to_string()))
    }

    /// The value of the `Connection` header. Defaults to `Upgrade`.
    pub fn connection(mut self, value: &str) -> Self {
        self.connection = Some(value.to_owned());
        self
    }

    /// Answers with an accept key that belongs to another request.
    pub fn wrong_accept_key(mut self) -> Self {
        self.wrong_key = true;
        self
    }

    /// Sends a text message in the same write as the 101; may be repeated.
    pub fn first_text(mut self, text: &str) -> Self {
        frame::push(frame::TEXT, true, text.as_bytes(), &mut self.first);
        self
    }

    /// Sends bytes in the same write as the 101; may be repeated.
    pub fn first_raw(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.first.extend_from_slice(bytes.as_ref());
        self
    }

    /// Sends the answer one byte at a time, each `delay` after the last.
    pub fn dribble(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// The whole answer, or nothing when the request has no key to answer.
    pub(super) fn answer(&self, request: &Request) -> Option<Vec<u8>> {
        let mut key = request.accept_key()?;
        if self.wrong_key {
            key = tungstenite::handshake::derive_accept_key(key.as_bytes());
        }
        let connection = self.connection.as_deref().unwrap_or("Upgrade");
        let mut headers = vec![
            ("Upgrade", "websocket"),
            ("Connection", connection),
            ("Sec-WebSocket-Accept", &key),
        ];
        headers.extend(self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        Some([head(101, headers).as_bytes(), &self.first].concat())
    }
}

/// An answer that ends the connection.
pub(super) fn response<'a>(
    code: u16,
    headers: impl IntoIterator<Item = (&'a str, &'a str)>,
    body: &str,
) -> Vec<u8> {
    let head = head(code, headers.into_iter().chain([("Connection", "close")]));
    let blank_line = head.len() - 2;
    format!("{}Content-Length: {}\r\n\r\n{body}", &head[..blank_line], body.len()).into_bytes()
}

fn head<'a>(code: u16, headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let status = tungstenite::http::StatusCode::from_u16(code).ok();
    let reason = status.and_then(|status| status.canonical_reason()).unwrap_or("Unknown");
    let mut head = format!("HTTP/1.1 {code} {reason}\r\n");
    for (name, value) in headers {
        // Fails only when the writer does, and a String does not.
        let _infallible = write!(head, "{name}: {value}\r\n");
    }
    head + "\r\n"
}
