//! A small HTTP/1.1 client for a node's API: one connection per request, bodies streamed.

use crate::config::NodeUrl;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, BodyStream, Empty, Limited, StreamBody};
use hyper::body::{Body, Incoming};
use hyper::header::{EXPECT, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::error::Error;
use std::future::ready;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// How long a connection may take to be made.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the body of a request waits for the node to ask for it.
pub const CONTINUE_TIMEOUT: Duration = Duration::from_secs(5);

/// Marks a request that a node passed on.
pub const RELAYED: &str = "litefs-relayed";

/// How much of an error's or an `/info`'s body is read.
const MAX_SMALL_BODY_LEN: usize = 64 << 10;
/// The same of an answer about all databases.
const MAX_LARGE_BODY_LEN: usize = 64 << 20;

/// A request that did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No connection; is the node running there?
    #[error("connect to {url}")]
    Connect {
        /// The node.
        url: NodeUrl,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The exchange broke off.
    #[error("{method} {url}{path}")]
    Exchange {
        /// The method.
        method: Method,
        /// The node.
        url: NodeUrl,
        /// Path and query.
        path: String,
        /// How it broke off.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The node refused.
    #[error("{method} {url}{path}: {status}: {}", said(body))]
    Status {
        /// The method.
        method: Method,
        /// The node.
        url: NodeUrl,
        /// Path and query.
        path: String,
        /// The status.
        status: StatusCode,
        /// What the node said.
        body: String,
    },
}

/// What a node said, in words: its own answers are `{"error", "action"}`, others are shown as they are.
fn said(body: &str) -> String {
    #[derive(serde::Deserialize)]
    struct Answer {
        error: String,
        action: String,
    }
    match serde_json::from_str::<Answer>(body) {
        Ok(answer) => format!("{} ({})", answer.error, answer.action),
        Err(_) => body.trim().to_owned(),
    }
}

/// Asks one node.
#[derive(Debug, Clone)]
pub struct Client {
    url: NodeUrl,
}

impl Client {
    /// A client for the node at `url`; connects with each request.
    #[must_use]
    pub const fn new(url: NodeUrl) -> Self {
        Self { url }
    }

    /// The node.
    #[must_use]
    pub const fn url(&self) -> &NodeUrl {
        &self.url
    }

    /// Sends a GET; the body is still to be read.
    ///
    /// # Errors
    /// [`ClientError`]; any status but 2xx is one.
    pub async fn get(&self, path: &str) -> Result<Response<Incoming>, ClientError> {
        let request = self.request(Method::GET, path, Empty::<Bytes>::new())?;
        self.send(request).await
    }

    /// Sends a DELETE; the body of the answer is still to be read.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn delete(&self, path: &str) -> Result<Response<Incoming>, ClientError> {
        let request = self.request(Method::DELETE, path, Empty::<Bytes>::new())?;
        self.send(request).await
    }

    /// Sends a POST with `body`, read as it is sent; the body of the answer is still to be read.
    ///
    /// The body waits until the node asks for it, so that a refusal costs no transfer and is not lost in a broken pipe
    /// (RFC 9110, 10.1.1). A node that never asks gets it after [`CONTINUE_TIMEOUT`].
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn post<B>(&self, path: &str, body: B) -> Result<Response<Incoming>, ClientError>
    where
        B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>> + Send> + Send + 'static,
    {
        let asked = Arc::new(Notify::new());
        let body = {
            let asked = Arc::clone(&asked);
            let wait = async move {
                // Not asked is asked, in the end.
                let _ = tokio::time::timeout(CONTINUE_TIMEOUT, asked.notified()).await;
            };
            let frames = BodyStream::new(body);
            StreamBody::new(
                stream::once(wait)
                    .filter_map(|()| ready(None))
                    .chain(frames),
            )
        };
        let mut request = self.request(Method::POST, path, body)?;
        let expect = HeaderValue::from_static("100-continue");
        request.headers_mut().insert(EXPECT, expect);
        hyper::ext::on_informational(&mut request, move |_| asked.notify_one());
        self.send(request).await
    }

    /// Sends a GET and reads the answer as JSON.
    ///
    /// # Errors
    /// As [`Self::get`]; also an answer that is too large or of another shape.
    pub async fn get_json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<T, ClientError> {
        let answer = self.get(path).await?;
        self.read_json(Method::GET, path, answer, MAX_SMALL_BODY_LEN)
            .await
    }

    /// Sends a GET and reads the answer as JSON, which may be about all databases.
    ///
    /// # Errors
    /// As [`Self::get_json`].
    pub async fn get_large_json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<T, ClientError> {
        let answer = self.get(path).await?;
        self.read_json(Method::GET, path, answer, MAX_LARGE_BODY_LEN)
            .await
    }

    /// Sends a POST without a body and reads the answer as JSON.
    ///
    /// # Errors
    /// As [`Self::get_json`].
    pub async fn post_json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<T, ClientError> {
        let request = self.request(Method::POST, path, Empty::<Bytes>::new())?;
        let answer = self.send(request).await?;
        self.read_json(Method::POST, path, answer, MAX_SMALL_BODY_LEN)
            .await
    }

    /// Passes a POST without a body on for another client; says so in a header, so that it is not passed on again.
    ///
    /// # Errors
    /// As [`Self::get`]; an answer that is too large.
    pub async fn relay(&self, path: &str) -> Result<Bytes, ClientError> {
        let mut request = self.request(Method::POST, path, Empty::<Bytes>::new())?;
        request
            .headers_mut()
            .insert(RELAYED, HeaderValue::from_static("1"));
        let answer = self.send(request).await?;
        let body = Limited::new(answer.into_body(), MAX_SMALL_BODY_LEN);
        let body = body.collect().await;
        body.map(http_body_util::Collected::to_bytes)
            .map_err(|e| self.exchange(Method::POST, path, e))
    }

    async fn read_json<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        answer: Response<Incoming>,
        max_len: usize,
    ) -> Result<T, ClientError> {
        let body = Limited::new(answer.into_body(), max_len).collect().await;
        let body = body.map_err(|e| self.exchange(method.clone(), path, e))?;
        serde_json::from_slice(&body.to_bytes()).map_err(|e| self.exchange(method, path, e))
    }

    fn request<B>(&self, method: Method, path: &str, body: B) -> Result<Request<B>, ClientError> {
        Request::builder()
            .method(method.clone())
            .uri(path)
            .header(HOST, self.url.authority())
            .body(body)
            .map_err(|error| self.exchange(method, path, error))
    }

    async fn send<B>(&self, request: Request<B>) -> Result<Response<Incoming>, ClientError>
    where
        B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
    {
        let (method, path) = (request.method().clone(), request.uri().to_string());
        let broken = |error| self.exchange::<hyper::Error>(method.clone(), &path, error);
        let io = TokioIo::new(self.connect().await?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io)
            .await
            .map_err(broken)?;
        // Ends with the body of the answer, or when that is dropped.
        tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(self.refused(method, &path, response).await)
    }

    async fn connect(&self) -> Result<TcpStream, ClientError> {
        let stream = TcpStream::connect((self.url.host(), self.url.port()));
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, stream)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        stream.map_err(|source| ClientError::Connect {
            url: self.url.clone(),
            source,
        })
    }

    async fn refused(
        &self,
        method: Method,
        path: &str,
        response: Response<Incoming>,
    ) -> ClientError {
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_SMALL_BODY_LEN)
            .collect()
            .await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let body = String::from_utf8_lossy(&body).into_owned();
        ClientError::Status {
            method,
            url: self.url.clone(),
            path: path.to_owned(),
            status,
            body,
        }
    }

    fn exchange<E>(&self, method: Method, path: &str, source: E) -> ClientError
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let (url, path) = (self.url.clone(), path.to_owned());
        ClientError::Exchange {
            method,
            url,
            path,
            source: source.into(),
        }
    }
}

/// A path with one query parameter, percent-encoded.
#[must_use]
pub fn path_with_query(path: &str, name: &str, value: &str) -> String {
    let mut out = format!("{path}?{name}=");
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::routing;

    async fn serve(router: Router) -> Client {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async { axum::serve(listener, router).await });
        Client::new(NodeUrl::new("127.0.0.1", port))
    }

    #[tokio::test]
    async fn bodies_go_both_ways() {
        let router = Router::new().route("/echo", routing::post(|body: Bytes| async { body }));
        let client = serve(router).await;
        let body = http_body_util::Full::new(Bytes::from_static(b"page 1"));
        let answer = client.post("/echo", body).await.unwrap();
        assert_eq!(
            answer.into_body().collect().await.unwrap().to_bytes(),
            "page 1"
        );
    }

    #[tokio::test]
    async fn a_refusal_comes_before_the_body_and_is_not_lost_in_it() {
        let refusal = (StatusCode::SERVICE_UNAVAILABLE, "not the primary");
        let router = Router::new().route("/import", routing::post(move || async move { refusal }));
        let client = serve(router).await;
        for _ in 0..50 {
            let is_read = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let body = {
                let is_read = Arc::clone(&is_read);
                let chunk = move |_| {
                    is_read.store(true, std::sync::atomic::Ordering::Relaxed);
                    let chunk = Bytes::from(vec![0; 1 << 20]);
                    Ok::<_, io::Error>(hyper::body::Frame::data(chunk))
                };
                StreamBody::new(stream::iter(0..64).map(chunk))
            };
            let error = client.post("/import", body).await.unwrap_err().to_string();
            assert!(error.ends_with("not the primary"), "{error}");
            assert!(!is_read.load(std::sync::atomic::Ordering::Relaxed));
        }
    }

    #[tokio::test]
    async fn a_refusal_shows_status_and_body() {
        let answer = (StatusCode::NOT_FOUND, "database not found\n");
        let client =
            serve(Router::new().route("/export", routing::get(move || async move { answer })))
                .await;
        let error = client.get("/export?name=x").await.unwrap_err().to_string();
        let want = format!(
            "GET {}/export?name=x: 404 Not Found: database not found",
            client.url()
        );
        assert_eq!(error, want);
    }

    #[tokio::test]
    async fn json_of_another_shape_is_an_error() {
        let client = serve(Router::new().route("/info", routing::get(|| async { "[]x" }))).await;
        let error = client.get_json::<Vec<u8>>("/info").await.unwrap_err();
        assert!(matches!(error, ClientError::Exchange { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_node_that_is_not_there_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let error = Client::new(NodeUrl::new("127.0.0.1", port))
            .get("/info")
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("connect to http://127.0.0.1:{port}")
        );
    }

    #[test]
    fn names_are_encoded() {
        assert_eq!(
            path_with_query("/export", "name", "a b/é&c.db"),
            "/export?name=a%20b/%C3%A9%26c.db"
        );
    }
}
