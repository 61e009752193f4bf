//! Network addresses: where we listen, and where another node is reached.

use std::fmt;
use std::str::FromStr;

/// A text that is not an address we can use; the message says what to write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddrError {
    /// Not `[HOST]:PORT`.
    #[error("`{0}` is not an address: write HOST:PORT, or :PORT for all interfaces")]
    Listen(String),
    /// Not `http://HOST[:PORT]`.
    #[error("`{0}` is not a node's URL: write http://HOST:20202, without a path")]
    Url(String),
    /// A URL with a scheme other than `http`.
    #[error("`{0}` needs TLS, which is not in this version: write http://HOST:20202")]
    Tls(String),
}

/// Where to listen: `HOST:PORT`, or `:PORT` for every interface, as Go writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddr {
    host: Option<String>,
    port: u16,
}

impl ListenAddr {
    /// Every interface, on one port.
    #[must_use]
    pub const fn any(port: u16) -> Self {
        Self { host: None, port }
    }

    /// The port; zero lets the system choose.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Hosts to bind, in order of preference: the first that can be bound serves.
    ///
    /// For "every interface" this is IPv6 (which takes IPv4 too), then IPv4 for systems without.
    #[must_use]
    pub fn bind_hosts(&self) -> Vec<(String, u16)> {
        match &self.host {
            Some(host) => vec![(host.clone(), self.port)],
            None => ["::", "0.0.0.0"]
                .map(|host| (host.to_owned(), self.port))
                .to_vec(),
        }
    }
}

impl FromStr for ListenAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let error = || AddrError::Listen(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        let port = port.parse().map_err(|_| error())?;
        let host = unbracket(host).ok_or_else(error)?;
        Ok(Self {
            host: (!host.is_empty()).then(|| host.to_owned()),
            port,
        })
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.host.as_deref().unwrap_or_default();
        write!(f, "{}:{}", Bracketed(host), self.port)
    }
}

/// Where a node's API is reached: `http://HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeUrl {
    host: String,
    port: u16,
}

impl NodeUrl {
    /// A node by host name (or address, without brackets) and port.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
        }
    }

    /// The host, an IPv6 address without its brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// `HOST:PORT`, as in the `Host` header.
    #[must_use]
    pub fn authority(&self) -> String {
        format!("{}:{}", Bracketed(&self.host), self.port)
    }
}

impl FromStr for NodeUrl {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let error = || AddrError::Url(text.to_owned());
        let uri: hyper::Uri = text.parse().map_err(|_| error())?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(AddrError::Tls(text.to_owned())),
            _ => return Err(error()),
        }
        let authority = uri.authority().ok_or_else(error)?;
        let host = unbracket(authority.host())
            .filter(|host| !host.is_empty())
            .ok_or_else(error)?;
        let bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => 80,
            Some(port) => port
                .strip_prefix(':')
                .and_then(|port| port.parse().ok())
                .ok_or_else(error)?,
            // A user name stands before the host.
            None => return Err(error()),
        };
        if bare {
            Ok(Self::new(host, port))
        } else {
            Err(error())
        }
    }
}

impl fmt::Display for NodeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.authority())
    }
}

/// Takes the brackets off an IPv6 address; `None` if a bare one has none or they do not match.
fn unbracket(host: &str) -> Option<&str> {
    match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']'),
        None => (!host.contains([':', ']'])).then_some(host),
    }
}

/// Shows an IPv6 address in brackets, anything else as it is.
struct Bracketed<'a>(&'a str);

impl fmt::Display for Bracketed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.contains(':') {
            write!(f, "[{}]", self.0)
        } else {
            f.write_str(self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses() {
        for text in [":20202", "localhost:0", "127.0.0.1:80", "[::1]:20202"] {
            assert_eq!(text.parse::<ListenAddr>().unwrap().to_string(), text);
        }
        let any: ListenAddr = ":20202".parse().unwrap();
        assert_eq!(any, ListenAddr::any(20202));
        assert_eq!(
            any.bind_hosts(),
            [("::".to_owned(), 20202), ("0.0.0.0".to_owned(), 20202)]
        );
        let one: ListenAddr = "[::1]:1".parse().unwrap();
        assert_eq!(one.bind_hosts(), [("::1".to_owned(), 1)]);
        for text in [
            "",
            "20202",
            "localhost",
            ":http",
            ":99999",
            "::1:80",
            "[::1:80",
        ] {
            assert!(text.parse::<ListenAddr>().is_err(), "{text}");
        }
    }

    #[test]
    fn node_urls() {
        for (text, shown) in [
            ("http://a:20202", "http://a:20202"),
            ("http://a.internal:20202/", "http://a.internal:20202"),
            ("http://10.0.0.1", "http://10.0.0.1:80"),
            ("http://[fdaa::3]:20202", "http://[fdaa::3]:20202"),
        ] {
            assert_eq!(text.parse::<NodeUrl>().unwrap().to_string(), shown);
        }
        let six: NodeUrl = "http://[fdaa::3]:1".parse().unwrap();
        assert_eq!((six.host(), six.port()), ("fdaa::3", 1));
        for text in [
            "",
            "a:20202",
            "a",
            "http://",
            "http://:20202",
            "http://a/x",
            "http://a?x=1",
            "ftp://a",
            "http://u:p@a",
            "http://a:99999",
            "http://a b",
        ] {
            assert_eq!(
                text.parse::<NodeUrl>(),
                Err(AddrError::Url(text.to_owned())),
                "{text}"
            );
        }
        let tls = "https://a:20202".parse::<NodeUrl>().unwrap_err();
        assert!(tls.to_string().contains("TLS"), "{tls}");
    }
}
