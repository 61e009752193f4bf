//! Headers on their way through: what belongs to one connection only, whose request it is, and the cookies.

use std::net::IpAddr;

use hyper::HeaderMap;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::http::Version;

/// Marks a request that another node forwards, with the id of its cluster.
pub(super) const FORWARDED_BY_NODE: HeaderName = HeaderName::from_static("litefs-forward");
/// Marks an answer of a node that did not give the request to its program, with the reason.
pub(super) const REFUSED: HeaderName = HeaderName::from_static("litefs-refused");
/// What a read is to promise.
pub(super) const CONSISTENCY: HeaderName = HeaderName::from_static("litefs-consistency");
/// Cookie of the same meaning.
pub(super) const CONSISTENCY_COOKIE: &str = "__litefs_consistency";
/// Positions, both ways.
pub(super) const POSITION: HeaderName = HeaderName::from_static(super::token::HEADER);

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// Belongs to HTTP/2's own way of upgrading.
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Takes off what is for the connection that a message came by (RFC 9110, 7.6.1). Says what upgrade was asked for, or was
/// made, and whether trailers are welcome.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) -> Hop {
    let upgrade = match names_in(headers, &header::CONNECTION, "upgrade") {
        // HTTP/2 is offered by knowledge, not by upgrade.
        true => headers
            .get(header::UPGRADE)
            .filter(|value| !value.as_bytes().to_ascii_lowercase().starts_with(b"h2c"))
            .cloned(),
        false => None,
    };
    let wants_trailers = names_in(headers, &header::TE, "trailers");
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .filter(|name| !is_end_to_end(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in [
        &header::CONNECTION,
        &KEEP_ALIVE,
        &PROXY_CONNECTION,
        &header::PROXY_AUTHENTICATE,
        &header::PROXY_AUTHORIZATION,
        &header::TE,
        &header::TRANSFER_ENCODING,
        &header::UPGRADE,
        &HTTP2_SETTINGS,
    ] {
        headers.remove(name);
    }
    Hop {
        upgrade,
        wants_trailers,
    }
}

/// What a message said about its connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Hop {
    /// The protocol to change to.
    pub upgrade: Option<HeaderValue>,
    /// Whether trailers are welcome.
    pub wants_trailers: bool,
}

impl Hop {
    /// Says the same on the next connection.
    pub(super) fn restore(&self, headers: &mut HeaderMap) {
        if let Some(protocol) = &self.upgrade {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, protocol.clone());
        }
        if self.wants_trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
            if self.upgrade.is_none() {
                headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
            }
        }
    }
}

/// A sender cannot have these taken off by naming them: what comes after would be understood otherwise.
fn is_end_to_end(name: &HeaderName) -> bool {
    [
        header::HOST,
        header::CONTENT_LENGTH,
        header::CONTENT_TYPE,
        header::COOKIE,
        header::AUTHORIZATION,
        header::TRAILER,
        header::EXPECT,
        header::FORWARDED,
        X_FORWARDED_FOR,
        X_FORWARDED_HOST,
        X_FORWARDED_PROTO,
        POSITION,
        CONSISTENCY,
        FORWARDED_BY_NODE,
    ]
    .contains(name)
}

/// Whether a list header has a token in it.
pub(super) fn names_in(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split([',', ';']))
        .any(|word| word.trim().eq_ignore_ascii_case(token))
}

/// Says whose request it is: adds the client to what proxies before this one said.
pub(super) fn add_client(headers: &mut HeaderMap, client: IpAddr) {
    let client = client.to_canonical();
    append(headers, X_FORWARDED_FOR, client.to_string());
    let host = headers.get(header::HOST).cloned();
    if let Some(host) = &host {
        headers
            .entry(X_FORWARDED_HOST)
            .or_insert_with(|| host.clone());
    }
    let proto = headers
        .entry(X_FORWARDED_PROTO)
        .or_insert(HeaderValue::from_static("http"))
        .clone();
    // By RFC 7239 what is not a token is quoted; an address of version 6 has brackets too.
    let mut element = match client {
        IpAddr::V4(v4) => format!("for={v4}"),
        IpAddr::V6(v6) => format!("for=\"[{v6}]\""),
    };
    if let Some(host) = host.as_ref().and_then(|host| host.to_str().ok()) {
        element.push_str(&format!(";host={}", quoted(host)));
    }
    if let Ok(proto) = proto.to_str() {
        element.push_str(&format!(";proto={}", quoted(proto)));
    }
    append(headers, header::FORWARDED, element);
}

fn quoted(text: &str) -> String {
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if !text.is_empty() && text.bytes().all(is_token) {
        return text.to_owned();
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Adds an element to a list, of which there is then one header.
fn append(headers: &mut HeaderMap, name: HeaderName, element: String) {
    let mut text = Vec::new();
    for value in headers.get_all(&name) {
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b", ");
    }
    text.extend_from_slice(element.as_bytes());
    // Made of header values, it is one.
    if let Ok(value) = HeaderValue::from_bytes(&text) {
        headers.insert(name, value);
    }
}

/// Finds a cookie; the first of that name counts.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        // Other cookies may have bytes beyond ASCII, which `to_str` refuses.
        .filter_map(|value| std::str::from_utf8(value.as_bytes()).ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(found, _)| *found == name)
        .map(|(_, value)| {
            value
                .strip_prefix('"')
                .and_then(|v| v.strip_suffix('"'))
                .unwrap_or(value)
        })
}

/// The cookie that gives a token to a browser for five minutes.
pub(super) fn token_cookie(token: &str) -> Option<HeaderValue> {
    let cookie = super::token::COOKIE;
    HeaderValue::try_from(format!(
        "{cookie}={token}; Path=/; Max-Age=300; HttpOnly; SameSite=Lax"
    ))
    .ok()
}

/// Whether caches that many clients share may keep an answer: a cookie does not belong there.
pub(super) fn is_for_shared_caches(headers: &HeaderMap) -> bool {
    names_in(headers, &header::CACHE_CONTROL, "public")
        || headers
            .get_all(header::CACHE_CONTROL)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.to_ascii_lowercase().contains("s-maxage="))
}

/// Why a request is refused before anybody looks at what it asks for.
pub(super) fn fault(
    version: Version,
    headers: &HeaderMap,
    has_authority: bool,
) -> Option<&'static str> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Some("more than one Host");
    }
    if host.is_none() && !has_authority && version == Version::HTTP_11 {
        return Some("no Host");
    }
    let is_bad_host = |value: &HeaderValue| {
        value
            .as_bytes()
            .iter()
            .any(|b| b.is_ascii_whitespace() || b",/@?#\\".contains(b))
    };
    if host.is_some_and(is_bad_host) {
        return Some("Host is no host");
    }
    if headers.contains_key(header::CONTENT_LENGTH)
        && headers.contains_key(header::TRANSFER_ENCODING)
    {
        return Some("both Content-Length and Transfer-Encoding");
    }
    if headers.get_all(header::CONTENT_LENGTH).iter().count() > 1 {
        return Some("more than one Content-Length");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(
                name.parse::<HeaderName>().unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        map
    }

    #[test]
    fn what_is_for_one_connection_goes_no_further() {
        let mut map = headers(&[
            ("connection", "close, X-Private"),
            ("connection", "cookie, Host"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers, gzip"),
            ("transfer-encoding", "chunked"),
            ("proxy-authorization", "x"),
            ("upgrade", "websocket"),
            ("cookie", "a=b"),
            ("host", "h"),
            ("trailer", "x-sum"),
        ]);
        let hop = strip_hop_by_hop(&mut map);
        assert_eq!(
            map,
            headers(&[("cookie", "a=b"), ("host", "h"), ("trailer", "x-sum")])
        );
        assert_eq!(
            hop,
            Hop {
                upgrade: None,
                wants_trailers: true
            }
        );
    }

    #[test]
    fn upgrades_are_said_again() {
        let mut map = headers(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
        ]);
        let hop = strip_hop_by_hop(&mut map);
        assert!(map.is_empty());
        hop.restore(&mut map);
        assert_eq!(
            map,
            headers(&[("connection", "upgrade"), ("upgrade", "websocket")])
        );
        let mut h2c = headers(&[
            ("connection", "Upgrade, HTTP2-Settings"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
        ]);
        assert_eq!(strip_hop_by_hop(&mut h2c), Hop::default());
        assert!(h2c.is_empty());
    }

    #[test]
    fn clients_are_added_to_the_list() {
        let mut map = headers(&[
            ("host", "a.example:80"),
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-proto", "https"),
        ]);
        add_client(&mut map, "::ffff:10.0.0.1".parse().unwrap());
        assert_eq!(map["x-forwarded-for"], "1.1.1.1, 10.0.0.1");
        assert_eq!(map["x-forwarded-host"], "a.example:80");
        assert_eq!(map["x-forwarded-proto"], "https");
        assert_eq!(
            map["forwarded"],
            "for=10.0.0.1;host=\"a.example:80\";proto=https"
        );
        add_client(&mut map, "2001:db8::1".parse().unwrap());
        assert_eq!(
            map["forwarded"],
            "for=10.0.0.1;host=\"a.example:80\";proto=https, for=\"[2001:db8::1]\";host=\"a.example:80\";proto=https"
        );
    }

    #[test]
    fn cookies() {
        let map = headers(&[
            ("cookie", "a=1; __txid=x:y/z@1"),
            ("cookie", "__txid=second; b=\"q\""),
        ]);
        assert_eq!(cookie(&map, "__txid"), Some("x:y/z@1"));
        assert_eq!(cookie(&map, "b"), Some("q"));
        assert_eq!(cookie(&map, "_txid"), None);
        let mut odd = HeaderMap::new();
        odd.insert(
            header::COOKIE,
            HeaderValue::from_bytes(b"n=\xc3\xa9; __txid=1").unwrap(),
        );
        assert_eq!(cookie(&odd, "__txid"), Some("1"));
        odd.insert(
            header::COOKIE,
            HeaderValue::from_bytes(b"n=\xff; __txid=1").unwrap(),
        );
        assert_eq!(cookie(&odd, "__txid"), None);
    }

    #[test]
    fn faults() {
        let v11 = Version::HTTP_11;
        assert_eq!(fault(v11, &headers(&[("host", "h")]), false), None);
        assert_eq!(fault(Version::HTTP_10, &headers(&[]), false), None);
        assert_eq!(fault(Version::HTTP_2, &headers(&[]), true), None);
        for bad in [
            &[][..],
            &[("host", "a"), ("host", "b")],
            &[("host", "a b")],
            &[("host", "a,b")],
            &[("host", "a/b")],
            &[("host", "u@h")],
            &[
                ("host", "h"),
                ("content-length", "1"),
                ("transfer-encoding", "chunked"),
            ],
            &[
                ("host", "h"),
                ("content-length", "1"),
                ("content-length", "1"),
            ],
        ] {
            assert!(fault(v11, &headers(bad), false).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn answers_for_shared_caches() {
        for (value, want) in [
            ("public, max-age=60", true),
            ("S-MaxAge=1", true),
            ("max-age=60", false),
            ("private", false),
        ] {
            assert_eq!(
                is_for_shared_caches(&headers(&[("cache-control", value)])),
                want,
                "{value}"
            );
        }
    }
}
