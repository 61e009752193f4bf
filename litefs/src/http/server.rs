//! The router of the node's port, and the loop that accepts connections for it.
//!
//! | route | what |
//! |---|---|
//! | `POST /stream` | replication, see `stream` |
//! | `GET /info` | who this node is |
//! | `GET /export?name`, `POST /import?name` | a database as SQLite bytes |
//! | `GET /events` | what happens, see `events` |
//! | `GET /metrics` | Prometheus |
//! | `GET /debug/vars` | positions, here and on replicas |
//!
//! Others are in `cluster`, `status` and `crate::proxy`.

use std::future::Future;
use std::io::{self, Read};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{StreamExt, stream};
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::error::NodeError;
use super::events::{self, Event};
use super::metrics::{MetricKind, MetricsText};
use super::stream::{TAKEOVER, accept};
use crate::ltx::Pos;
use crate::replication::DbName;
use crate::replication::conn::tune;
use crate::replication::send::Sender;

/// Connections at a time; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 4096;
/// A client that has not sent its request line and headers by then is dropped.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// What a shutdown gives requests under way.
const DRAIN: Duration = Duration::from_secs(5);
/// How much more of a refused body is read, for clients that only look at the answer once they have sent it.
const MAX_DRAINED_LEN: usize = 1 << 20;
const CHUNK_LEN: usize = 128 << 10;
/// Chunks between a socket and the thread that reads or writes a database.
const CHUNKS: usize = 4;

/// What `GET /info` says, in LiteFS's names.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeInfo {
    /// Identity of the cluster.
    #[serde(rename = "clusterID", skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// Whether this node is the primary.
    pub is_primary: bool,
    /// Whether it may become one.
    pub candidate: bool,
    /// Where the databases are mounted.
    pub path: String,
    /// The primary, if this node is a replica and knows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary: Option<PrimaryHost>,
    /// Whether it serves current data: it is primary, or has caught up with one.
    pub ready: bool,
}

/// The primary, as `/info` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct PrimaryHost {
    /// Its host name.
    pub hostname: String,
}

/// Bytes of a database on their way out.
pub struct Export {
    /// How many, if known.
    pub len: Option<u64>,
    /// Where they come from; read on a blocking thread.
    pub bytes: Box<dyn Read + Send>,
}

/// What the routes need of the node. Calls may block unless said otherwise.
pub trait NodeApi: Send + Sync + 'static {
    /// Says who this node is. Does not block.
    fn info(&self) -> NodeInfo;
    /// Identity of this node, for the `Litefs-Id` header. Does not block.
    fn node_id(&self) -> u64;
    /// Host name of the primary, this node's own if it is. Does not block.
    fn primary_hostname(&self) -> Option<String>;
    /// All databases and where they are.
    fn databases(&self) -> Vec<(DbName, Pos)>;
    /// Opens a consistent copy of a database.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    fn export(&self, db: &DbName) -> Result<Export, NodeError>;
    /// Replaces a database, as one transaction, by the bytes of a SQLite file.
    ///
    /// # Errors
    /// `NotPrimary`, `BadDatabase`, `Io`; the database is as it was then.
    fn import(&self, db: &DbName, bytes: &mut dyn Read) -> Result<Pos, NodeError>;
    /// Subscribes to what happens. Does not block.
    fn events(&self) -> broadcast::Receiver<Event>;
    /// Adds the node's own metrics to those of the router (`litefs_is_primary`, `litefs_db_count`, `litefs_db_txid`,
    /// `litefs_subscriber_count` and what replicas acknowledged).
    fn metrics(&self, text: &mut MetricsText);
}

/// Takes requests of other nodes' clients, before any route is looked at: their paths are a program's.
pub trait Forwarded: Send + Sync + 'static {
    /// Whether a request with these headers is one.
    fn takes(&self, headers: &HeaderMap) -> bool;
    /// Answers it.
    fn handle(
        &self,
        request: hyper::Request<Incoming>,
    ) -> Pin<Box<dyn Future<Output = Response> + Send>>;
}

/// Shared by the handlers.
#[derive(Clone)]
pub struct Server {
    node: Arc<dyn NodeApi>,
    sender: Arc<Sender>,
    /// Serves the winner of an election with what it lacks.
    lender: Option<Arc<Sender>>,
    forwarded: Option<Arc<dyn Forwarded>>,
    closing: CancellationToken,
}

impl Server {
    /// Makes the server of a node; nothing is bound yet.
    #[must_use]
    pub fn new(node: Arc<dyn NodeApi>, sender: Arc<Sender>, lender: Option<Arc<Sender>>) -> Server {
        Server {
            node,
            sender,
            lender,
            forwarded: None,
            closing: CancellationToken::new(),
        }
    }

    /// Hands forwarded requests to whom they are for.
    #[must_use]
    pub fn with_forwarded(mut self, forwarded: Arc<dyn Forwarded>) -> Server {
        self.forwarded = Some(forwarded);
        self
    }

    /// Makes the router, to which other parts of the node may add theirs.
    pub fn router(&self) -> Router {
        let identify = axum::middleware::map_response_with_state(self.clone(), identify);
        Router::new()
            .route("/stream", post(stream_route))
            .route("/info", get(info))
            .route("/export", get(export))
            .route("/import", post(import))
            .route("/events", get(events_route))
            .route("/metrics", get(metrics))
            .route("/debug/vars", get(debug_vars))
            .fallback(async |method: axum::http::Method, uri: axum::http::Uri| {
                NodeError::NoEndpoint(format!("{method} {}", uri.path()))
            })
            .layer(identify)
            .with_state(self.clone())
    }

    /// Serves connections until `shutdown`, then ends streams and subscriptions, and gives requests a moment.
    ///
    /// # Errors
    /// Only if the listener fails for good.
    pub async fn serve(
        &self,
        listener: TcpListener,
        router: Router,
        shutdown: impl Future<Output = ()>,
    ) -> io::Result<()> {
        let mut shutdown = pin!(shutdown);
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let (slot, tcp) = tokio::select! {
                () = &mut shutdown => break,
                accepted = next_connection(&listener, &slots) => accepted?,
            };
            tune(&tcp);
            let routes = TowerToHyperService::new(router.clone());
            let forwarded = self.forwarded.clone();
            let service = service_fn(move |request: hyper::Request<Incoming>| {
                let (routes, forwarded) = (routes.clone(), forwarded.clone());
                async move {
                    match forwarded.filter(|f| f.takes(request.headers())) {
                        Some(forwarded) => Ok(forwarded.handle(request).await),
                        None => routes.call(request).await,
                    }
                }
            });
            let closing = self.closing.clone();
            connections.spawn(async move {
                let _slot = slot;
                let http = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(tcp), service)
                    .with_upgrades();
                let mut http = pin!(http);
                let result = tokio::select! {
                    result = &mut http => result,
                    () = closing.cancelled() => {
                        http.as_mut().graceful_shutdown();
                        http.await
                    }
                };
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
            });
            while connections.try_join_next().is_some() {}
        }
        drop(listener);
        self.closing.cancel();
        self.sender.close();
        if let Some(lender) = &self.lender {
            lender.close();
        }
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, drained).await.is_err() {
            tracing::warn!("requests still under way at shutdown are cut off");
        }
        Ok(())
    }
}

type Slot = tokio::sync::OwnedSemaphorePermit;

async fn next_connection(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(Slot, tokio::net::TcpStream)> {
    let slot = Arc::clone(slots)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((tcp, _)) => return Ok((slot, tcp)),
            Err(e) if is_passing(&e) => {
                // Out of descriptors, or the client left: neither is the listener's end.
                tracing::warn!(error = %e, "cannot accept a connection, trying again");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(e) => return Err(e),
        }
    }
}

fn is_passing(e: &io::Error) -> bool {
    let errno = e.raw_os_error();
    let kinds = [
        io::ErrorKind::ConnectionAborted,
        io::ErrorKind::ConnectionReset,
    ];
    kinds.contains(&e.kind()) || errno == Some(libc::EMFILE) || errno == Some(libc::ENFILE)
}

async fn identify(State(server): State<Server>, mut response: Response) -> Response {
    let headers = response.headers_mut();
    let id = format!("{:016X}", server.node.node_id());
    if let Ok(id) = HeaderValue::try_from(id) {
        headers.insert("litefs-id", id);
    }
    let cluster_id = server.node.info().cluster_id;
    if let Some(Ok(id)) = cluster_id.map(HeaderValue::try_from) {
        headers.insert("litefs-cluster-id", id);
    }
    response
}

async fn stream_route(
    State(server): State<Server>,
    request: Request,
) -> Result<Response, NodeError> {
    let primary = server.node.primary_hostname();
    match &server.lender {
        Some(lender) if request.headers().contains_key(TAKEOVER) => {
            accept(lender, primary, request)
        }
        _ => accept(&server.sender, primary, request),
    }
}

async fn info(State(server): State<Server>) -> Json<NodeInfo> {
    Json(server.node.info())
}

#[derive(Deserialize)]
struct DbQuery {
    name: Option<String>,
}

impl DbQuery {
    fn db(self) -> Result<DbName, NodeError> {
        let name = self.name.filter(|name| !name.is_empty());
        Ok(name.ok_or(NodeError::MissingParameter("name"))?.parse()?)
    }
}

async fn export(
    State(server): State<Server>,
    Query(query): Query<DbQuery>,
) -> Result<Response, NodeError> {
    let db = query.db()?;
    let node = Arc::clone(&server.node);
    let export = blocking(move || node.export(&db)).await?;
    Ok(stream_out(export, "application/vnd.sqlite3"))
}

/// Sends bytes as they are read.
pub(super) fn stream_out(export: Export, kind: &'static str) -> Response {
    let len = export.len;
    let (chunks_in, chunks) = mpsc::channel(CHUNKS);
    tokio::task::spawn_blocking(move || read_chunks(export.bytes, &chunks_in));
    let body = stream::unfold(chunks, |mut chunks| async {
        chunks.recv().await.map(|chunk| (chunk, chunks))
    });
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if let Some(len) = len {
        headers.insert(header::CONTENT_LENGTH, len.into());
    }
    response
}

/// Reads until the end, an error (which breaks the response off), or the client is gone.
fn read_chunks(mut from: Box<dyn Read + Send>, to: &mpsc::Sender<io::Result<Bytes>>) {
    loop {
        let mut chunk = vec![0; CHUNK_LEN];
        let sent = match from.read(&mut chunk) {
            Ok(0) => return,
            Ok(n) => {
                chunk.truncate(n);
                to.blocking_send(Ok(chunk.into()))
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                tracing::warn!(error = %e, "export broken off");
                let _ = to.blocking_send(Err(e));
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn import(
    State(server): State<Server>,
    Query(query): Query<DbQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, NodeError> {
    let mut body = body.into_data_stream();
    let imported = import_from(&server, query, &mut body).await;
    if imported.is_err() && !headers.contains_key(header::EXPECT) {
        // Who is still sending sees a closed connection instead of the reason.
        let rest = async {
            let mut left = MAX_DRAINED_LEN;
            while let (Some(Ok(chunk)), true) = (body.next().await, left > 0) {
                left = left.saturating_sub(chunk.len());
            }
        };
        // Slower than this, it does not get the reason.
        let _ = tokio::time::timeout(DRAIN, rest).await;
    }
    let pos = imported?;
    Ok(Json(json!({
        "txid": pos.txid.to_string(),
        "checksum": pos.post_apply_checksum.to_string(),
    })))
}

async fn import_from(
    server: &Server,
    query: DbQuery,
    body: &mut BodyDataStream,
) -> Result<Pos, NodeError> {
    let db = query.db()?;
    let (chunks_in, chunks) = mpsc::channel(CHUNKS);
    // The first look at the body asks the client for it, so it waits until it is wanted.
    let (wanted, is_wanted) = oneshot::channel();
    let node = Arc::clone(&server.node);
    let importing = blocking(move || {
        let mut bytes = ChunkReader {
            chunks,
            chunk: Bytes::new(),
            is_complete: false,
            wanted: Some(wanted),
        };
        node.import(&db, &mut bytes)
    });
    let feeding = async move {
        if is_wanted.await.is_err() {
            return;
        }
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map(Some).map_err(io::Error::other);
            if chunks_in.send(chunk).await.is_err() {
                return;
            }
        }
        let _ = chunks_in.send(Ok(None)).await;
    };
    let (result, ()) = tokio::join!(importing, feeding);
    result
}

/// Reads a request body on a blocking thread. A body that breaks off is an error, never a short file.
struct ChunkReader {
    chunks: mpsc::Receiver<io::Result<Option<Bytes>>>,
    chunk: Bytes,
    is_complete: bool,
    wanted: Option<oneshot::Sender<()>>,
}

impl Read for ChunkReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(wanted) = self.wanted.take() {
            // A request that is gone shows below.
            let _ = wanted.send(());
        }
        while self.chunk.is_empty() && !self.is_complete {
            match self.chunks.blocking_recv() {
                Some(Ok(Some(chunk))) => self.chunk = chunk,
                Some(Ok(None)) => self.is_complete = true,
                Some(Err(e)) => return Err(e),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let n = buf.len().min(self.chunk.len());
        buf[..n].copy_from_slice(&self.chunk.split_to(n));
        Ok(n)
    }
}

async fn events_route(State(server): State<Server>) -> Response {
    // Subscribe first, so that no change falls between the first line and the second.
    let events = server.node.events();
    let is_primary = server.node.info().is_primary;
    let hostname = server.node.primary_hostname();
    let init = events::init(is_primary, hostname.as_deref());
    let body = events::body(&init, events, server.closing.clone());
    let kind = HeaderValue::from_static("application/x-ndjson");
    ([(header::CONTENT_TYPE, kind)], body).into_response()
}

async fn metrics(State(server): State<Server>) -> Result<Response, NodeError> {
    let text = blocking(move || Ok(metrics_text(&server))).await?;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

fn metrics_text(server: &Server) -> String {
    let mut text = MetricsText::default();
    let databases = server.node.databases();
    let is_primary = f64::from(u8::from(server.node.info().is_primary));
    let replicas = server.sender.replicas();
    let count = |n: usize| u32::try_from(n).map_or(f64::MAX, f64::from);
    let gauge = MetricKind::Gauge;
    text.single("litefs_is_primary", gauge, "1 on the primary.", is_primary);
    let db_count = count(databases.len());
    text.single(
        "litefs_db_count",
        gauge,
        "Databases on this node.",
        db_count,
    );
    let connected = count(replicas.connected_count());
    let help = "Replicas that follow this node.";
    text.single("litefs_subscriber_count", gauge, help, connected);
    text.family("litefs_db_txid", gauge, "Last transaction of a database.");
    for (db, pos) in &databases {
        text.sample("litefs_db_txid", &[("db", db.as_str())], number(pos));
    }
    let listed = replicas.list();
    let ours: std::collections::HashMap<&DbName, u64> =
        databases.iter().map(|(db, pos)| (db, pos.txid.0)).collect();
    let name = "litefs_replica_db_lag_transactions";
    text.family(
        name,
        gauge,
        "Transactions that a replica has not shown yet.",
    );
    for replica in listed.iter().filter(|r| r.is_connected) {
        for (db, state) in &replica.dbs {
            let behind = ours
                .get(db)
                .copied()
                .unwrap_or(0)
                .saturating_sub(state.acked.pos.txid.0);
            #[expect(clippy::cast_precision_loss, reason = "Prometheus knows only f64")]
            let behind = behind as f64;
            let labels = [("node", replica.hostname.as_str()), ("db", db.as_str())];
            text.sample(name, &labels, behind);
        }
    }
    for (name, help) in [
        (
            "litefs_replica_db_txid",
            "Last transaction visible on a replica.",
        ),
        (
            "litefs_replica_db_durable_txid",
            "Last transaction on a replica's disk.",
        ),
    ] {
        text.family(name, gauge, help);
        for replica in listed.iter().filter(|r| r.is_connected) {
            for (db, state) in &replica.dbs {
                let is_durable = name.contains("durable");
                let acked = &state.acked;
                let pos = if is_durable {
                    &acked.durable
                } else {
                    &acked.pos
                };
                let labels = [("node", replica.hostname.as_str()), ("db", db.as_str())];
                text.sample(name, &labels, number(pos));
            }
        }
    }
    server.node.metrics(&mut text);
    text.into_text()
}

/// A TXID as Prometheus takes it: exact up to 2^53, as in LiteFS.
fn number(pos: &Pos) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows only f64")]
    let n = pos.txid.0 as f64;
    n
}

async fn debug_vars(State(server): State<Server>) -> Result<Json<Value>, NodeError> {
    blocking(move || Ok(Json(vars(&server)))).await
}

fn vars(server: &Server) -> Value {
    let pos_json = |pos: &Pos| {
        json!({
            "txid": pos.txid.to_string(),
            "checksum": pos.post_apply_checksum.to_string(),
        })
    };
    let databases: serde_json::Map<String, Value> = server
        .node
        .databases()
        .iter()
        .map(|(db, pos)| (db.to_string(), pos_json(pos)))
        .collect();
    let now = Instant::now();
    let replicas: Vec<Value> = server
        .sender
        .replicas()
        .list()
        .iter()
        .map(|r| {
            let dbs: serde_json::Map<String, Value> = r
                .dbs
                .iter()
                .map(|(db, state)| {
                    let value = json!({
                        "applied": pos_json(&state.acked.pos),
                        "durable": pos_json(&state.acked.durable),
                        "stalled": state.stalled,
                    });
                    (db.to_string(), value)
                })
                .collect();
            json!({
                "id": format!("{:016X}", r.node_id),
                "hostname": r.hostname,
                "isConnected": r.is_connected,
                "heardSecondsAgo": now.saturating_duration_since(r.heard_at).as_secs_f64(),
                "dbs": dbs,
            })
        })
        .collect();
    json!({ "dbs": databases, "replicas": replicas })
}

pub(super) async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
) -> Result<T, NodeError> {
    tokio::task::spawn_blocking(f).await.unwrap_or_else(|e| {
        Err(NodeError::Io {
            what: "handle a request".to_owned(),
            source: io::Error::other(e),
        })
    })
}
