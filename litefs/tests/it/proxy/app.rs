//! A small program with HTTP handlers over a real SQLite database in a node's mount.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rusqlite::Connection;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

/// Where all programs of the tests run.
pub(super) fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Runtime::new().unwrap())
}

pub(super) struct App {
    pub(super) port: u16,
    pub(super) state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

pub(super) struct State {
    mount: PathBuf,
    name: String,
    /// Requests that came to `/slow`.
    pub(super) entered: AtomicUsize,
    /// All requests.
    pub(super) requests: AtomicUsize,
    /// Lets the waiting handlers go on.
    pub(super) go_on: Notify,
    pub(super) is_open: AtomicBool,
    /// One of its handlers writes at a time: SQLite's own queue is not a fair one.
    writing: tokio::sync::Mutex<()>,
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

impl App {
    /// Serves the databases that will be at `mount`; answers begin with `name`.
    pub(super) fn start(mount: PathBuf, name: &str) -> App {
        let state = Arc::new(State {
            mount,
            name: name.into(),
            entered: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            go_on: Notify::new(),
            is_open: AtomicBool::new(false),
            writing: tokio::sync::Mutex::new(()),
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = runtime().spawn(serve(listener, state.clone()));
        App { port, state, task }
    }

    pub(super) fn release(&self) {
        self.state.is_open.store(true, Ordering::Release);
        self.state.go_on.notify_waiters();
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: std::net::TcpListener, state: Arc<State>) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            return;
        };
        let state = state.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let state = state.clone();
                async move { Ok::<_, Infallible>(answer(&state, request).await) }
            });
            let builder = hyper::server::conn::http1::Builder::new();
            // Clients that leave are no error here.
            let _ = builder
                .serve_connection(TokioIo::new(tcp), service)
                .with_upgrades()
                .await;
        });
    }
}

fn text(status: StatusCode, text: impl Into<String>) -> Response<Body> {
    let body = Full::new(Bytes::from(text.into())).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

impl State {
    async fn sql<T: Send + 'static>(
        &self,
        f: impl Fn(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Response<Body>> {
        let path = self.mount.join("app.db");
        let done = tokio::task::spawn_blocking(move || {
            let began = std::time::Instant::now();
            loop {
                let db = Connection::open(&path)?;
                db.busy_timeout(Duration::from_secs(2))?;
                match f(&db) {
                    // A node that has just begun to follow may refuse an open; that is for tests of the mount.
                    Err(e)
                        if e.sqlite_error_code() == Some(rusqlite::ErrorCode::CannotOpen)
                            && began.elapsed() < Duration::from_secs(2) =>
                    {
                        eprintln!("opened again: {} ({e})", path.display());
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    done => return done,
                }
            }
        });
        done.await
            .unwrap()
            .map_err(|e| text(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
    }

    async fn insert(&self, value: String) -> Result<(), Response<Body>> {
        let _one = self.writing.lock().await;
        self.sql(move |db| {
            db.execute("INSERT INTO t(v) VALUES(?1)", [&value])
                .map(drop)
        })
        .await
    }

    async fn wait(&self) {
        let go_on = self.go_on.notified();
        if !self.is_open.load(Ordering::Acquire) {
            go_on.await;
        }
    }
}

async fn answer(state: &Arc<State>, request: Request<Incoming>) -> Response<Body> {
    state.requests.fetch_add(1, Ordering::AcqRel);
    route(state, request)
        .await
        .unwrap_or_else(|refused| refused)
}

async fn route(
    state: &Arc<State>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Response<Body>> {
    let name = state.name.clone();
    let path = request.uri().path().to_owned();
    match path.as_str() {
        "/count" => {
            let n: i64 = state
                .sql(|db| db.query_row("SELECT count(*) FROM t", [], |r| r.get(0)))
                .await?;
            Ok(text(StatusCode::OK, format!("{name} {n}")))
        }
        "/add" | "/add-by-get" | "/also-forwarded" => {
            let body = request.into_body().collect().await;
            let Ok(body) = body else {
                return Err(text(StatusCode::BAD_REQUEST, "broken off"));
            };
            let value = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            state.insert(value).await?;
            Ok(text(StatusCode::CREATED, format!("{name} added")))
        }
        "/upload" => {
            let mut body = request.into_body();
            let (mut len, mut crc) = (0_u64, crc32fast::Hasher::new());
            while let Some(frame) = body.frame().await {
                let Ok(frame) = frame else {
                    return Err(text(StatusCode::BAD_REQUEST, "broken off"));
                };
                if let Some(data) = frame.data_ref() {
                    len += data.len() as u64;
                    crc.update(data);
                }
            }
            Ok(text(
                StatusCode::OK,
                format!("{name} {len} {:08x}", crc.finalize()),
            ))
        }
        "/refuse" => Ok(text(StatusCode::PAYLOAD_TOO_LARGE, "too large")),
        "/slow" => {
            state.entered.fetch_add(1, Ordering::AcqRel);
            state.wait().await;
            state.insert("slow".into()).await?;
            Ok(text(StatusCode::CREATED, format!("{name} slow")))
        }
        "/headers" => {
            let mut out = format!("{} {}\n", request.method(), request.uri());
            for (name, value) in request.headers() {
                out.push_str(&format!("{name}: {}\n", value.to_str().unwrap_or("?")));
            }
            Ok(text(StatusCode::OK, out))
        }
        "/public" => {
            let mut response = text(StatusCode::OK, name);
            let headers = response.headers_mut();
            headers.insert(
                "cache-control",
                HeaderValue::from_static("public, max-age=60"),
            );
            headers.insert("connection", HeaderValue::from_static("x-private"));
            headers.insert("x-private", HeaderValue::from_static("1"));
            Ok(response)
        }
        "/events" | "/events-of-primary" => {
            let state = state.clone();
            let first = futures_util::stream::iter([format!("data: {name} 1\n\n")]);
            let second = futures_util::stream::once(async move {
                state.wait().await;
                "data: 2\n\n".to_owned()
            });
            let frames = first
                .chain(second)
                .map(|line| Ok(Frame::data(Bytes::from(line))));
            let mut response =
                Response::new(BodyExt::boxed_unsync(StreamBody::new(Box::pin(frames))));
            response.headers_mut().insert(
                "content-type",
                HeaderValue::from_static("text/event-stream"),
            );
            Ok(response)
        }
        "/trailers" => {
            let body = request.into_body().collect().await;
            let Ok(body) = body else {
                return Err(text(StatusCode::BAD_REQUEST, "broken off"));
            };
            let got = body.trailers().and_then(|t| t.get("x-sum")).cloned();
            let got = got.unwrap_or(HeaderValue::from_static("none"));
            let mut trailers = HeaderMap::new();
            trailers.insert(HeaderName::from_static("x-back"), got);
            let frames = vec![
                Ok(Frame::data(Bytes::from(format!("{name} body")))),
                Ok(Frame::trailers(trailers)),
            ];
            let frames = futures_util::stream::iter(frames);
            let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)));
            response
                .headers_mut()
                .insert("trailer", HeaderValue::from_static("x-back"));
            Ok(response)
        }
        "/ws" | "/ws-here" => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let Ok(upgraded) = upgrade.await else { return };
                let mut io = TokioIo::new(upgraded);
                let _ = io.write_all(name.as_bytes()).await;
                let mut buf = [0; 1024];
                while let Ok(n @ 1..) = io.read(&mut buf).await {
                    if io.write_all(&buf[..n]).await.is_err() {
                        return;
                    }
                }
            });
            let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
            let headers = response.headers_mut();
            headers.insert("connection", HeaderValue::from_static("upgrade"));
            headers.insert("upgrade", HeaderValue::from_static("websocket"));
            Ok(response)
        }
        _ => Ok(text(StatusCode::NOT_FOUND, format!("{name} no {path}"))),
    }
}
