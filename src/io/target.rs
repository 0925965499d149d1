//! A URL, parsed once into what dialling needs.

use std::fmt;
use std::net::Ipv6Addr;

use tungstenite::http::Uri;

use crate::error::{Error, ErrorKind};

/// Where to connect: the parts of a `ws://` or `wss://` URL.
///
/// `Display` leaves out the query, which often carries a token.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// Whether TLS is spoken.
    pub(crate) secure: bool,
    /// Host name or address, IPv6 without its brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// What the request line asks for, query included.
    pub(crate) path: String,
    /// The `Host` header: brackets kept, a default port left out.
    pub(crate) authority: String,
}

fn has_no_host(url: &str) -> bool {
    url.eq_ignore_ascii_case("ws://") || url.eq_ignore_ascii_case("wss://")
}

impl Target {
    pub(crate) fn parse(url: &str) -> Result<Self, Error> {
        let refuse =
            |why: &str| Err(Error::new(ErrorKind::Url, format!("url {}: {why}", shown(url))));
        if url.contains('#') {
            return refuse("a fragment has no meaning in a WebSocket URL (RFC 6455, section 3)");
        }
        let uri = match url.parse::<Uri>() {
            Ok(uri) => uri,
            Err(_) if has_no_host(url) => return refuse("it has no host"),
            Err(error) => return refuse(&error.to_string()),
        };
        let secure = match uri.scheme_str() {
            // In any case (RFC 3986, section 3.1).
            Some(scheme) if scheme.eq_ignore_ascii_case("ws") => false,
            Some(scheme) if scheme.eq_ignore_ascii_case("wss") => true,
            Some(other) => return refuse(&format!("scheme `{other}` is not ws or wss")),
            None => return refuse("it has no scheme; ws:// or wss:// is needed"),
        };
        match uri.authority() {
            Some(authority) if authority.as_str().contains('@') => {
                refuse("user names in URLs are not sent; set an Authorization header")
            }
            Some(authority) => Self::from_parts(secure, authority, &uri).map_or_else(refuse, Ok),
            None => refuse("it has no host"),
        }
    }

    fn from_parts(
        secure: bool,
        authority: &tungstenite::http::uri::Authority,
        uri: &Uri,
    ) -> Result<Self, &'static str> {
        let bracketed = authority.host();
        let host = without_brackets(bracketed)?.to_owned();
        if host.is_empty() {
            return Err("its host is empty");
        }
        let default = if secure { 443 } else { 80 };
        // `port_u16` is `None` both without a port and with one out of range.
        let port = match authority.port_u16() {
            Some(0) => return Err("port 0 cannot be connected to"),
            Some(port) => port,
            None if authority.as_str().trim_end_matches(':') == bracketed => default,
            None => return Err("its port is not a number from 1 to 65535"),
        };
        let authority =
            if port == default { bracketed.to_owned() } else { format!("{bracketed}:{port}") };
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Ok(Self { secure, host, port, path, authority })
    }

    /// The URL that `location`, from this target's redirect, leads to
    /// (RFC 9110, section 10.2.2): absolute, or relative to this one.
    pub(crate) fn redirected(&self, location: &str) -> Result<Self, Error> {
        let location = location.split('#').next().unwrap_or_default();
        let scheme = if self.secure { "wss" } else { "ws" };
        let absolute = if let Some(rest) = without_scheme(location, "http://") {
            format!("ws://{rest}")
        } else if let Some(rest) = without_scheme(location, "https://") {
            format!("wss://{rest}")
        } else if location.starts_with('?') {
            let path = self.path.split('?').next().unwrap_or_default();
            format!("{scheme}://{}{path}{location}", self.authority)
        } else if has_scheme(location) {
            location.to_owned()
        } else if let Some(rest) = location.strip_prefix("//") {
            format!("{scheme}://{rest}")
        } else if location.starts_with('/') {
            format!("{scheme}://{}{location}", self.authority)
        } else {
            format!("{scheme}://{}{}{location}", self.authority, self.folder())
        };
        Self::parse(&absolute)
    }

    /// Whether both are the same scheme, host and port.
    pub(crate) fn same_origin(&self, other: &Self) -> bool {
        self.secure == other.secure
            && self.port == other.port
            && self.host.eq_ignore_ascii_case(&other.host)
    }

    fn folder(&self) -> &str {
        let path = self.path.split('?').next().unwrap_or_default();
        path.rfind('/').map_or("/", |slash| &path[..=slash])
    }
}

/// The host itself: an IPv6 address stands in brackets, and nothing else does
/// (RFC 3986, section 3.2.2). `Uri` takes them anywhere.
fn without_brackets(host: &str) -> Result<&str, &'static str> {
    let Some(rest) = host.strip_prefix('[') else {
        return if host.contains(['[', ']']) {
            Err("its host has a bracket inside")
        } else {
            Ok(host)
        };
    };
    let inside = rest.strip_suffix(']').unwrap_or(rest);
    if inside.parse::<Ipv6Addr>().is_err() {
        return Err("what its brackets hold is not an IPv6 address");
    }
    Ok(inside)
}

/// What follows a scheme, which may be in any case.
fn without_scheme<'l>(location: &'l str, scheme: &str) -> Option<&'l str> {
    let (head, rest) = location.split_at_checked(scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// Whether a reference is absolute (RFC 3986, section 3.1): `://` may as well
/// stand in the query of a relative one.
fn has_scheme(location: &str) -> bool {
    let of_scheme = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    location.split_once("://").is_some_and(|(scheme, _)| scheme.chars().all(of_scheme))
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "wss" } else { "ws" };
        let path = self.path.split('?').next().unwrap_or_default();
        write!(f, "{scheme}://{}{path}", self.authority)
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({self})")
    }
}

/// A URL as errors may show it: without query and without user name.
fn shown(url: &str) -> String {
    let plain = url.split(['?', '#']).next().unwrap_or_default();
    match plain.rsplit_once('@') {
        Some((_, host)) => format!("`...@{host}`"),
        None => format!("`{plain}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(url: &str) -> (bool, String, u16, String, String) {
        let target = Target::parse(url).unwrap();
        (target.secure, target.host, target.port, target.path, target.authority)
    }

    #[test]
    fn urls_are_taken_apart() {
        let t = |secure, host: &str, port, path: &str, authority: &str| {
            (secure, host.to_owned(), port, path.to_owned(), authority.to_owned())
        };
        assert_eq!(parts("ws://h"), t(false, "h", 80, "/", "h"));
        assert_eq!(parts("WSS://h"), t(true, "h", 443, "/", "h"));
        assert_eq!(parts("wss://h/x?y=1"), t(true, "h", 443, "/x?y=1", "h"));
        assert_eq!(parts("ws://h:80/"), t(false, "h", 80, "/", "h"));
        assert_eq!(parts("ws://h:81?q"), t(false, "h", 81, "/?q", "h:81"));
        assert_eq!(parts("wss://[::1]:9/"), t(true, "::1", 9, "/", "[::1]:9"));
        assert_eq!(parts("ws://[::1]"), t(false, "::1", 80, "/", "[::1]"));
    }

    #[test]
    fn unusable_urls_are_refused_without_showing_their_secrets() {
        for url in [
            "",
            "h",
            "h/x",
            "http://h",
            "ftp://h",
            "ws://",
            "ws:///x",
            "ws://h:0",
            "ws://h:99999",
            "ws://h:port",
            "ws://user:hush@h",
            "ws://h/#frag",
            "ws://h h",
            "//h",
            "ws://h\n/?hush",
        ] {
            let error = Target::parse(url).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Url, "{url}");
            assert!(!error.chain().contains("hush"), "{error}");
        }
        let told = Target::parse("ws://").unwrap_err().to_string();
        assert!(told.ends_with("it has no host"), "{told}");
    }

    #[test]
    fn brackets_hold_an_ipv6_address_and_stand_nowhere_else() {
        for url in ["ws://y[::1]:9/", "ws://[::1]y/", "ws://[h]/", "ws://[1.2.3.4]/", "ws://[]/"] {
            let error = Target::parse(url).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Url, "{url}");
        }
        assert_eq!(Target::parse("ws://[2001:db8::1]/").unwrap().host, "2001:db8::1");
    }

    #[test]
    fn locations_are_resolved_against_the_request() {
        let from = Target::parse("wss://h:9/a/b?q").unwrap();
        for (location, to) in [
            ("https://other/x", "wss://other/x"),
            ("http://other/x", "ws://other/x"),
            ("ws://other", "ws://other/"),
            ("//other/x", "wss://other/x"),
            ("/x", "wss://h:9/x"),
            ("x", "wss://h:9/a/x"),
            ("x#frag", "wss://h:9/a/x"),
            ("?other", "wss://h:9/a/b"),
            ("HTTPS://other/x", "wss://other/x"),
            ("/x?next=https://other/y", "wss://h:9/x"),
            ("x?next=//other/y", "wss://h:9/a/x"),
        ] {
            assert_eq!(from.redirected(location).unwrap().to_string(), to, "{location}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let base = Target::parse("wss://Host/a").unwrap();
        let same = |url: &str| base.same_origin(&Target::parse(url).unwrap());
        assert!(same("wss://host:443/b?c"));
        assert!(!same("ws://host/") && !same("wss://host:444/") && !same("wss://other/"));
    }
}
