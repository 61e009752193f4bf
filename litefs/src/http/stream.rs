//! `POST /stream`: an HTTP/1.1 request that turns the connection into a replication stream, from both sides.
//!
//! ```text
//! POST /stream HTTP/1.1            HTTP/1.1 101 Switching Protocols
//! Connection: upgrade        ──▶   Connection: upgrade                 ──▶ frames, both ways
//! Upgrade: litefs-stream/1         Upgrade: litefs-stream/1
//! ```

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::error::NodeError;
use crate::replication::conn::{Conn, tune};
use crate::replication::message::PROTOCOL;
use crate::replication::receive::{Dial, DialError, Dialing};
use crate::replication::send::Sender;

/// Most of an error's body that is read.
const MAX_ERROR_BODY: usize = 16 << 10;

/// Header by which the winner of an election asks for what it lacks, before it takes writes.
pub(super) const TAKEOVER: &str = "litefs-takeover";

/// Answers a replica's request and serves it once the connection is upgraded.
pub(super) fn accept(
    sender: &Arc<Sender>,
    primary: Option<String>,
    request: Request<Body>,
) -> Result<Response<Body>, NodeError> {
    if !asks_for_stream(request.headers()) {
        return Err(NodeError::UpgradeRequired);
    }
    if sender.epoch().is_none() {
        return Err(NodeError::NotPrimary { primary });
    }
    let sender = Arc::clone(sender);
    tokio::spawn(async move {
        let upgraded = match hyper::upgrade::on(request).await {
            Ok(upgraded) => upgraded,
            Err(error) => {
                tracing::warn!(%error, "replica left before its stream began");
                return;
            }
        };
        if let Err(e) = sender.serve(Conn::from_upgraded(upgraded)).await {
            let error = crate::replication::send::chain(&e);
            tracing::info!(%error, "stream to a replica ended");
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    set_upgrade(response.headers_mut());
    Ok(response)
}

fn asks_for_stream(headers: &HeaderMap) -> bool {
    let protocol = headers.get(header::UPGRADE);
    protocol.is_some_and(|p| p.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()))
}

fn set_upgrade(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static(PROTOCOL));
}

/// Reaches a primary over plain HTTP.
#[derive(Debug, Clone)]
pub struct HttpDial {
    /// Bound of each step.
    pub step_timeout: Duration,
    /// Asks for what a node that is not primary has, as the winner of an election may.
    pub is_takeover: bool,
}

impl Default for HttpDial {
    fn default() -> HttpDial {
        HttpDial {
            step_timeout: Duration::from_secs(5),
            is_takeover: false,
        }
    }
}

impl Dial for HttpDial {
    fn dial<'a>(&'a self, target: &'a str) -> Dialing<'a> {
        Box::pin(self.connect(target))
    }
}

impl HttpDial {
    async fn connect(&self, target: &str) -> Result<Conn, DialError> {
        let failed = |source: io::Error| DialError::Connect {
            target: target.to_owned(),
            source,
        };
        let (host, port) = parse_target(target)?;
        let tcp = timeout(self.step_timeout, TcpStream::connect((host.as_str(), port)))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed)?;
        tune(&tcp);
        timeout(
            self.step_timeout,
            upgrade(tcp, target, &host, port, self.is_takeover),
        )
        .await
        .unwrap_or_else(|_| Err(failed(io::ErrorKind::TimedOut.into())))
    }
}

async fn upgrade(
    tcp: TcpStream,
    target: &str,
    host: &str,
    port: u16,
    is_takeover: bool,
) -> Result<Conn, DialError> {
    let failed = |e: hyper::Error| DialError::Connect {
        target: target.to_owned(),
        source: io::Error::other(e),
    };
    let (mut send, http) = hyper::client::conn::http1::handshake(TokioIo::new(tcp))
        .await
        .map_err(failed)?;
    // Ends with the upgrade, or with the connection.
    tokio::spawn(http.with_upgrades());
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static("/stream");
    let address_error = |why: String| DialError::Address {
        target: target.to_owned(),
        why,
    };
    let authority = if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    let host = HeaderValue::try_from(authority).map_err(|e| address_error(e.to_string()))?;
    request.headers_mut().insert(header::HOST, host);
    set_upgrade(request.headers_mut());
    if is_takeover {
        let yes = HeaderValue::from_static("1");
        request.headers_mut().insert(TAKEOVER, yes);
    }
    let response = send.send_request(request).await.map_err(failed)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_ERROR_BODY);
        let body = body.collect().await.map(|b| b.to_bytes());
        let body = body.unwrap_or_else(|_| Bytes::from_static(b"(no readable body)"));
        return Err(DialError::Refused {
            target: target.to_owned(),
            status,
            body: String::from_utf8_lossy(&body).trim().to_owned(),
        });
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(failed)?;
    Ok(Conn::from_upgraded(upgraded))
}

/// Reads `http://host:port`, as in `lease.advertise-url`.
fn parse_target(target: &str) -> Result<(String, u16), DialError> {
    let wrong = |why: &str| DialError::Address {
        target: target.to_owned(),
        why: why.to_owned(),
    };
    let uri: Uri = target
        .parse()
        .map_err(|_| wrong("write it as http://host:port"))?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong("only http:// is supported by this dialler"));
    }
    let host = uri.host().ok_or_else(|| wrong("no host"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.to_owned(), uri.port_u16().unwrap_or(80)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let parse = |t: &str| parse_target(t).map_err(|e| e.to_string());
        assert_eq!(parse("http://ams:20202"), Ok(("ams".to_owned(), 20202)));
        assert_eq!(parse("http://[::1]:7/"), Ok(("::1".to_owned(), 7)));
        assert_eq!(parse("http://ams"), Ok(("ams".to_owned(), 80)));
        for bad in ["", "ams:20202", "https://ams:20202", "http://"] {
            let e = parse(bad).unwrap_err();
            assert!(e.contains(&format!("{bad:?}")), "{e}");
        }
    }
}
