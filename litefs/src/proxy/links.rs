//! Connections to the program and to other nodes, kept for the next request.

use std::error::Error;
use std::io;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::body::Lent;

/// A program may close a connection that it was silent on at the very moment when a request is sent on it, and nobody knows
/// then whether it was done. One that was used a moment ago is not closed yet.
const TARGET_IDLE: Duration = Duration::from_secs(1);
/// Nodes close theirs after ten seconds.
const NODE_IDLE: Duration = Duration::from_secs(6);
/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a node may leave what was sent to it unacknowledged.
const SILENCE: Duration = Duration::from_secs(10);
/// Headers of an answer, at most.
const MAX_HEAD_LEN: usize = 256 << 10;

/// Sends requests over pooled connections.
#[derive(Clone)]
pub(super) struct Link(legacy::Client<HttpConnector, Lent>);

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum SendError {
    /// Nobody listens there.
    Refused(String),
    /// No connection: nothing was sent.
    Connect(String),
    /// Something was sent.
    Broken(String),
}

impl SendError {
    pub(super) fn why(&self) -> &str {
        match self {
            SendError::Refused(why) | SendError::Connect(why) | SendError::Broken(why) => why,
        }
    }
}

impl Link {
    /// To the program.
    pub(super) fn to_target() -> Link {
        Link(builder().pool_idle_timeout(TARGET_IDLE).build(connector()))
    }

    /// To other nodes.
    pub(super) fn to_nodes() -> Link {
        let mut connector = connector();
        connector.set_keepalive(Some(SILENCE / 2));
        connector.set_keepalive_interval(Some(SILENCE / 4));
        connector.set_keepalive_retries(Some(2));
        connector.set_tcp_user_timeout(Some(SILENCE));
        Link(builder().pool_idle_timeout(NODE_IDLE).build(connector))
    }

    pub(super) async fn send(
        &self,
        request: Request<Lent>,
    ) -> Result<Response<Incoming>, SendError> {
        self.0.request(request).await.map_err(|error| {
            let why = innermost(&error);
            match error.is_connect() {
                true if is_refused(&error) => SendError::Refused(why),
                true => SendError::Connect(why),
                false => SendError::Broken(why),
            }
        })
    }
}

fn builder() -> legacy::Builder {
    let mut builder = legacy::Client::builder(TokioExecutor::new());
    builder
        .pool_timer(TokioTimer::new())
        .http1_max_buf_size(MAX_HEAD_LEN)
        .http1_max_headers(200);
    builder
}

fn connector() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    connector
}

fn is_refused(error: &(dyn Error + 'static)) -> bool {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.kind() == io::ErrorKind::ConnectionRefused;
        }
        at = error.source();
    }
    false
}

/// The cause that says most.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut at = error;
    while let Some(source) = at.source() {
        at = source;
    }
    at.to_string()
}

/// Makes the address of a request to a server.
pub(super) fn uri(authority: &Authority, path: &PathAndQuery) -> Uri {
    let mut parts = hyper::http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority.clone());
    parts.path_and_query = Some(path.clone());
    // All three parts are there, so it is one.
    Uri::from_parts(parts).unwrap_or_default()
}

/// Reads host and port of a node's URL.
pub(super) fn authority_of(url: &str) -> Option<Authority> {
    url.parse::<Uri>().ok()?.into_parts().authority
}
