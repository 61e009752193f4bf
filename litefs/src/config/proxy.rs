//! Section `proxy`: the HTTP proxy in front of the program.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::{ConfigError, DatabaseFilter, ListenAddr, file};
use crate::proxy::{Consistency, PathPattern};
use crate::replication::{DbName, DbPattern};

const DEFAULT_MAX_LAG: Duration = Duration::from_secs(10);
const DEFAULT_REDIRECT_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_WAIT_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_READ_HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Section `proxy`, where `proxy.target` is set.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Proxy {
    /// Where clients connect.
    pub addr: ListenAddr,
    /// The program.
    pub target: ProxyTarget,
    /// Databases whose positions clients carry along.
    pub databases: DatabaseFilter,
    /// The one database, if exactly one is named: LiteFS's cookie is about it.
    pub only: Option<DbName>,
    /// Lag above which `/litefs/health` says so; `None` for any.
    pub max_lag: Option<Duration>,
    /// Whether each request is logged.
    pub debug: bool,
    /// Paths that are handed to the program as they are.
    pub passthrough: Vec<PathPattern>,
    /// Paths whose reads go to the primary, too.
    pub always_forward: Vec<PathPattern>,
    /// How long a request waits for a primary.
    pub primary_redirect_timeout: Duration,
    /// How long a request may take to arrive; `None` for any time.
    pub read_timeout: Option<Duration>,
    /// How long an answer may take from the request's headers to its end.
    pub write_timeout: Option<Duration>,
    /// How long the headers of a request may take to arrive.
    pub read_header_timeout: Option<Duration>,
    /// How long a connection may wait for its next request.
    pub idle_timeout: Option<Duration>,
    /// What a read promises that does not say.
    pub consistency: Consistency,
    /// How long a read waits for this node to come level, before it goes to the primary.
    pub wait_timeout: Duration,
    /// How a write comes to the primary.
    pub redirect: Redirect,
}

/// `proxy.redirect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redirect {
    /// Over the nodes' own connections.
    Forward,
    /// By the platform's proxy, which repeats the request there.
    FlyReplay,
}

/// `proxy.target`: `HOST:PORT` of the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyTarget(hyper::http::uri::Authority);

impl ProxyTarget {
    /// Host and port, as in a URL.
    #[must_use]
    pub fn authority(&self) -> &hyper::http::uri::Authority {
        &self.0
    }
}

impl fmt::Display for ProxyTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ProxyTarget {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.strip_prefix("http://").unwrap_or(text);
        let text = text.strip_suffix('/').unwrap_or(text);
        // As Go: without a host, this machine.
        let text = match text.strip_prefix(':') {
            Some(port) => format!("localhost:{port}"),
            None => text.to_owned(),
        };
        let authority: hyper::http::uri::Authority = text.parse().map_err(drop)?;
        let is_good = !authority.host().is_empty()
            && authority.port_u16().is_some_and(|port| port > 0)
            && !text.contains('@');
        is_good.then_some(Self(authority)).ok_or(())
    }
}

impl Proxy {
    /// Checks the section; nothing without `proxy.target`, as in LiteFS.
    pub(super) fn from_file(file: file::Proxy) -> Result<Option<Self>, ConfigError> {
        let consistency = consistency(file.consistency.as_deref())?;
        let redirect = redirect(file.redirect.as_deref())?;
        let passthrough = patterns("proxy.passthrough", file.passthrough)?;
        let always_forward = patterns("proxy.always-forward", file.always_forward)?;
        let Some(target) = file.target.filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let target = target.parse().map_err(|()| {
            ConfigError::setting(
                "proxy.target",
                format!("`{target}` is not the address of a program"),
                "write HOST:PORT, such as localhost:3000",
            )
        })?;
        let addr = file.addr.filter(|text| !text.is_empty()).ok_or_else(|| {
            ConfigError::setting(
                "proxy.addr",
                "the proxy needs an address of its own, beside proxy.target",
                "write HOST:PORT, or :8080 for all interfaces",
            )
        })?;
        let addr: ListenAddr = addr.parse().map_err(|error: super::AddrError| {
            ConfigError::setting(
                "proxy.addr",
                error.to_string(),
                "name where clients connect",
            )
        })?;
        let (databases, only) = databases(file.db)?;
        let or = |value: Option<super::duration::GoDuration>, default| {
            value.map_or(Some(default), |value| value.positive())
        };
        Ok(Some(Self {
            addr,
            target,
            databases,
            only,
            max_lag: or(file.max_lag, DEFAULT_MAX_LAG),
            debug: file.debug.is_some_and(|flag| flag.0),
            passthrough,
            always_forward,
            primary_redirect_timeout: or(file.primary_redirect_timeout, DEFAULT_REDIRECT_TIMEOUT)
                .unwrap_or_default(),
            read_timeout: file.read_timeout.and_then(|value| value.positive()),
            write_timeout: file.write_timeout.and_then(|value| value.positive()),
            read_header_timeout: or(file.read_header_timeout, DEFAULT_READ_HEADER_TIMEOUT),
            idle_timeout: or(file.idle_timeout, DEFAULT_IDLE_TIMEOUT),
            consistency,
            wait_timeout: or(file.wait_timeout, DEFAULT_WAIT_TIMEOUT).unwrap_or_default(),
            redirect,
        }))
    }
}

fn consistency(text: Option<&str>) -> Result<Consistency, ConfigError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(Consistency::Session);
    };
    text.parse().map_err(|_| {
        ConfigError::setting(
            "proxy.consistency",
            format!("`{text}` is not a level"),
            "write eventual, session, bounded=DURATION (such as bounded=500ms) or strong",
        )
    })
}

fn redirect(text: Option<&str>) -> Result<Redirect, ConfigError> {
    match text {
        None | Some("" | "forward") => Ok(Redirect::Forward),
        Some("fly-replay") => Ok(Redirect::FlyReplay),
        Some(other) => Err(ConfigError::setting(
            "proxy.redirect",
            format!("`{other}` is not a way to the primary"),
            "write forward or fly-replay",
        )),
    }
}

fn patterns(
    key: &'static str,
    texts: Option<Vec<String>>,
) -> Result<Vec<PathPattern>, ConfigError> {
    let texts = texts.unwrap_or_default().into_iter();
    let parse = |text: String| match text.is_empty() {
        false => Ok(PathPattern::new(text)),
        true => Err(ConfigError::setting(
            key,
            "an empty pattern matches no path",
            "write paths such as /static/* or *.png, or remove the entry",
        )),
    };
    texts.map(parse).collect()
}

fn databases(names: Option<file::Names>) -> Result<(DatabaseFilter, Option<DbName>), ConfigError> {
    let names = match names {
        None => Vec::new(),
        Some(file::Names::One(name)) if name.is_empty() => Vec::new(),
        Some(file::Names::One(name)) => vec![name],
        Some(file::Names::Several(names)) => names,
    };
    if names.is_empty() {
        return Err(ConfigError::setting(
            "proxy.db",
            "the proxy must know which databases its clients read and write",
            "name one as in the mount (app.db), or several ([app.db, \"tenants/*\"])",
        ));
    }
    let parse = |text: &String| {
        text.parse::<DbPattern>().map_err(|_| {
            let problem = format!("{text:?} is empty, too long, or not relative to the mount");
            let remedy = "write names relative to the mount, such as app.db or tenants/*";
            ConfigError::setting("proxy.db", problem, remedy)
        })
    };
    let patterns = names.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let only = match names.as_slice() {
        [name] if !name.contains(['*', '?']) => name.parse().ok(),
        _ => None,
    };
    Ok((DatabaseFilter::new(patterns), only))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(text: &str) -> Result<Option<Proxy>, String> {
        let file = file::File::parse(&format!("proxy: {{{text}}}")).map_err(|e| e.to_string())?;
        Proxy::from_file(file.proxy.unwrap_or_default()).map_err(|e| e.to_string())
    }

    #[test]
    fn without_a_target_there_is_none() {
        assert_eq!(section("addr: ':8080', db: app.db"), Ok(None));
        assert_eq!(section("target: ''"), Ok(None));
    }

    #[test]
    fn defaults_are_those_of_litefs() {
        let proxy = section("addr: ':8080', target: 'localhost:3000', db: app.db");
        let proxy = proxy.unwrap().unwrap();
        assert_eq!(proxy.addr, ListenAddr::any(8080));
        assert_eq!(proxy.target.to_string(), "localhost:3000");
        assert_eq!(proxy.only.as_ref().map(DbName::as_str), Some("app.db"));
        assert_eq!(proxy.max_lag, Some(Duration::from_secs(10)));
        assert_eq!(proxy.primary_redirect_timeout, Duration::from_secs(5));
        assert_eq!((proxy.read_timeout, proxy.write_timeout), (None, None));
        assert_eq!(proxy.read_header_timeout, Some(Duration::from_secs(10)));
        assert_eq!(proxy.idle_timeout, Some(Duration::from_secs(30)));
        assert_eq!(proxy.consistency, Consistency::Session);
        assert_eq!(proxy.wait_timeout, Duration::from_secs(5));
        assert_eq!(proxy.redirect, Redirect::Forward);
        assert!(!proxy.debug && proxy.passthrough.is_empty());
    }

    #[test]
    fn several_databases() {
        let several = section("addr: ':1', target: ':3000', db: [app.db, 'tenants/*']");
        let several = several.unwrap().unwrap();
        assert!(several.only.is_none());
        assert_eq!(several.target.to_string(), "localhost:3000");
        assert!(several.databases.matches(&"tenants/7.db".parse().unwrap()));
        assert!(!several.databases.matches(&"other.db".parse().unwrap()));
        let glob = section("addr: ':1', target: 'a:3000', db: '*.db'")
            .unwrap()
            .unwrap();
        assert!(glob.only.is_none());
    }

    #[test]
    fn refusals_name_key_cause_and_remedy() {
        for (text, want) in [
            (
                "target: 'localhost'",
                "proxy.target: `localhost` is not the address of a program: write HOST:PORT",
            ),
            ("target: 'u@h:1', addr: ':1', db: a", "proxy.target: "),
            (
                "target: 'a:1'",
                "proxy.addr: the proxy needs an address of its own",
            ),
            (
                "target: 'a:1', addr: '80'",
                "proxy.addr: `80` is not an address",
            ),
            (
                "target: 'a:1', addr: ':80'",
                "proxy.db: the proxy must know which databases",
            ),
            ("target: 'a:1', addr: ':80', db: []", "proxy.db: "),
            (
                "target: 'a:1', addr: ':80', db: /app.db",
                "proxy.db: \"/app.db\" is empty, too long, or not relative",
            ),
            (
                "consistency: sometimes",
                "proxy.consistency: `sometimes` is not a level: write eventual",
            ),
            (
                "redirect: back",
                "proxy.redirect: `back` is not a way to the primary: write forward or fly-replay",
            ),
            ("passthrough: ['']", "proxy.passthrough: an empty pattern"),
        ] {
            let error = section(text).unwrap_err();
            assert!(error.starts_with(want), "{text}: {error}");
        }
    }
}
