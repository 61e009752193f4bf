//! A request as it came, ready to be sent on: to the program, or to the node that is primary.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::uri::{Authority, PathAndQuery};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, StatusCode, Version};
use tokio::sync::Notify;

use super::answer::{Answer, bad_request, say};
use super::body::{Gate, KEPT_LEN, Lent, RequestBody};
use super::headers::{self, Hop};
use super::{links, rules};

/// How long a server that is to ask for a body may take to do so (RFC 9110, 10.1.1: nobody waits for ever).
const ASK_TARGET: Duration = Duration::from_secs(1);
const ASK_NODE: Duration = Duration::from_secs(5);
/// What follows the cluster's id where the expectation is the node's and not the client's.
const EXPECT_IS_OURS: &str = ";expect";

/// A request.
pub(super) struct Inbound {
    pub(super) method: Method,
    pub(super) path: PathAndQuery,
    pub(super) headers: HeaderMap,
    pub(super) body: RequestBody,
    pub(super) upgrade: Option<OnUpgrade>,
    pub(super) started: Instant,
    pub(super) is_http2: bool,
    hop: Hop,
    /// The client waits to be asked for the body.
    expects: bool,
}

impl Inbound {
    /// Takes a client's request.
    ///
    /// # Errors
    /// The answer to one that is no request.
    pub(super) fn from_client(
        request: Request<Incoming>,
        client: IpAddr,
        timeout: Option<Duration>,
    ) -> Result<Inbound, Box<Answer>> {
        let mut inbound = Inbound::new(request, timeout)?;
        // Between nodes these mean what a client must not say.
        inbound.headers.remove(headers::FORWARDED_BY_NODE);
        inbound.headers.remove(headers::REFUSED);
        headers::add_client(&mut inbound.headers, client);
        Ok(inbound)
    }

    /// Takes a request that a node forwards. Returns the cluster it says it is of, too.
    ///
    /// # Errors
    /// The answer to one that is no request.
    pub(super) fn from_node(
        request: Request<Incoming>,
        timeout: Option<Duration>,
    ) -> Result<(Inbound, String), Box<Answer>> {
        let mut inbound = Inbound::new(request, timeout)?;
        let mark = inbound.headers.remove(headers::FORWARDED_BY_NODE);
        let mark = mark
            .as_ref()
            .and_then(|mark| mark.to_str().ok())
            .unwrap_or_default();
        let cluster = match mark.strip_suffix(EXPECT_IS_OURS) {
            Some(cluster) => {
                inbound.expects = false;
                inbound.headers.remove(header::EXPECT);
                cluster
            }
            None => mark,
        };
        let cluster = cluster.to_owned();
        Ok((inbound, cluster))
    }

    fn new(
        mut request: Request<Incoming>,
        timeout: Option<Duration>,
    ) -> Result<Inbound, Box<Answer>> {
        let refuse = |what: &str| Box::new(bad_request(what));
        let has_authority = request.uri().authority().is_some();
        if let Some(fault) = headers::fault(request.version(), request.headers(), has_authority) {
            return Err(refuse(fault));
        }
        if *request.method() == Method::CONNECT {
            return Err(Box::new(say(
                StatusCode::METHOD_NOT_ALLOWED,
                "CONNECT is for proxies of another kind",
                "ask for what you want from the program behind this one",
            )));
        }
        let path = request.uri().path_and_query();
        let path = path
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static("/"));
        let version = request.version();
        let has_upgrade =
            request.headers().contains_key(header::UPGRADE) && version == Version::HTTP_11;
        let upgrade = has_upgrade.then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        let mut headers = parts.headers;
        let hop = headers::strip_hop_by_hop(&mut headers);
        // Of the two, the address in the request line counts (RFC 9112, 3.2.2).
        if let Some(authority) = parts.uri.authority() {
            let host = authority.as_str().rsplit('@').next().unwrap_or_default();
            let host = HeaderValue::from_str(host).map_err(|_| refuse("Host is no host"))?;
            headers.insert(header::HOST, host);
        }
        if version == Version::HTTP_2 {
            join_cookies(&mut headers);
        }
        let body = RequestBody::new(body, timeout);
        let expects = match headers.get(header::EXPECT) {
            None => false,
            Some(value) if value.as_bytes().eq_ignore_ascii_case(b"100-continue") => true,
            Some(_) => {
                return Err(Box::new(say(
                    StatusCode::EXPECTATION_FAILED,
                    "the only expectation there is, is 100-continue",
                    "send the request without the header Expect",
                )));
            }
        };
        let expects = expects && !body.is_empty() && version == Version::HTTP_11;
        if !expects {
            headers.remove(header::EXPECT);
        }
        Ok(Inbound {
            method: parts.method,
            path,
            headers,
            body,
            upgrade: upgrade.filter(|_| hop.upgrade.is_some()),
            started: Instant::now(),
            is_http2: version == Version::HTTP_2,
            hop,
            expects,
        })
    }

    /// Whether the request can be made again if nobody knows what became of it.
    pub(super) fn is_safe(&self) -> bool {
        rules::is_safe(&self.method) && self.upgrade.is_none()
    }

    /// The request for the program.
    pub(super) fn for_target(&self, authority: &Authority) -> Request<Lent> {
        self.outbound(authority, self.expects.then_some(ASK_TARGET))
    }

    /// The request for the node at an address.
    pub(super) fn for_node(&self, authority: &Authority, cluster: &str) -> Request<Lent> {
        // What is too long to be sent again is sent once the other node has looked at the rest.
        let is_long =
            !self.body.is_empty() && self.body.len().is_none_or(|len| len > KEPT_LEN as u64);
        let is_ours = is_long && !self.expects;
        let waits = (is_long || self.expects).then_some(ASK_NODE);
        let mut request = self.outbound(authority, waits);
        let suffix = if is_ours { EXPECT_IS_OURS } else { "" };
        // The id was read from a file of ours.
        let mark = HeaderValue::try_from(format!("{cluster}{suffix}"));
        let mark = mark.unwrap_or(HeaderValue::from_static("?"));
        request
            .headers_mut()
            .insert(headers::FORWARDED_BY_NODE, mark);
        if is_ours {
            request
                .headers_mut()
                .insert(header::EXPECT, HeaderValue::from_static("100-continue"));
        }
        request
    }

    fn outbound(&self, authority: &Authority, waits: Option<Duration>) -> Request<Lent> {
        let asked = waits.map(|limit| (limit, Arc::new(Notify::new())));
        let gate = asked.clone().map(|(limit, asked)| -> Gate {
            Box::pin(async move {
                // Not asked is asked, in the end.
                let _ = tokio::time::timeout(limit, asked.notified()).await;
            })
        });
        let mut request = Request::new(self.body.lend(gate));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = links::uri(authority, &self.path);
        *request.headers_mut() = self.headers.clone();
        self.hop.restore(request.headers_mut());
        if !self.body.is_empty() && self.body.len().is_none() {
            // Of a GET, hyper takes for granted that it has no body.
            let chunked = HeaderValue::from_static("chunked");
            request
                .headers_mut()
                .insert(header::TRANSFER_ENCODING, chunked);
        }
        if let Some((_, asked)) = asked {
            hyper::ext::on_informational(&mut request, move |answer| {
                if answer.status() == StatusCode::CONTINUE {
                    asked.notify_one();
                }
            });
        }
        request
    }
}

/// HTTP/2 may send each cookie by itself, HTTP/1.1 may not (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}
