//! What nodes that elect a primary say to each other, beside Raft's own messages.
//!
//! | route | what |
//! |---|---|
//! | `POST /v1/raft` | one message of Raft's, bytes both ways |
//! | `GET /v1/cluster` | who is there, as this node knows |
//! | `POST /v1/cluster/fence` | the winner of an election: take nothing from older tenures, and say what you have |
//! | `POST /v1/cluster/join` | take me in, or learn my new address |
//! | `POST /v1/cluster/add?url=` | take the node there in, unless it belongs to another cluster |
//! | `POST /v1/cluster/invite` | to a node: join the cluster of whoever says so |
//! | `POST /v1/cluster/remove?node=` | take a node out; the primary hands its role over first |
//! | `POST /v1/cluster/opened` | the primary: writes are open, follow me |
//! | `POST /v1/cluster/accepted` | to the primary: I have, on disk, all that your tenure began with |
//! | `POST /v1/cluster/durability?value=&db=` | when commits return: `async`, `bounded` or `quorum`; of one database, or of all |
//! | `POST /v1/cluster/preferred-region?value=` | where the primary is to be; empty: anywhere |
//! | `POST /handoff?node=` | give the primary's role to another node |
//! | `POST /promote` | take the primary's role |
//!
//! What only the primary can do (`add`, `remove`, `durability`, `handoff`) another node passes on to it, once.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use consensus::Durability;
use serde::{Deserialize, Serialize};

use super::client::{Client, ClientError, RELAYED};
use super::error::NodeError;
use crate::config::{DURABILITY_REMEDY, NodeUrl, parse_durability};

/// Most bytes of one message of Raft's: it carries membership and settings, no data.
const MAX_RAFT_LEN: usize = 8 << 20;
/// How long the primary has for a request that is passed on to it: a handoff may be part of it.
const RELAY: Duration = Duration::from_secs(30);

/// A node as others see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// Its identity, 16 hex digits.
    pub id: String,
    /// Its host name.
    pub hostname: String,
    /// Where its API is reached.
    pub url: String,
    /// Where it is; may be empty.
    #[serde(default)]
    pub region: String,
    /// Candidates with a higher one are preferred.
    #[serde(default)]
    pub priority: u32,
}

/// Answer of `GET /v1/cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// Identity of the cluster, if this node has joined one.
    #[serde(rename = "clusterID")]
    pub cluster_id: Option<String>,
    /// This node.
    pub node: Peer,
    /// Whether it may be elected.
    pub candidate: bool,
    /// Whether it is a member of the cluster that elects.
    pub is_member: bool,
    /// Newest tenure it knows of.
    pub epoch: u64,
    /// Newest tenure of which it has all that the primary began with.
    pub accepted_epoch: u64,
    /// The primary, if it knows one that takes writes or is about to.
    pub primary: Option<Peer>,
    /// Whether this node takes writes.
    pub is_primary: bool,
    /// Members that vote.
    pub voters: Vec<Peer>,
    /// Members that do not vote yet.
    pub learners: Vec<Peer>,
    /// Whether voters are being changed: until that is done, it takes a majority of the old ones too.
    #[serde(default)]
    pub is_changing: bool,
    /// How many databases it has.
    pub database_count: u64,
    /// Databases whose commits should wait and do not here, until the programs that have them open open them again.
    #[serde(default)]
    pub unheld: Vec<String>,
}

/// Body of `POST /v1/cluster/fence`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FenceRequest {
    /// Identity of the cluster.
    #[serde(rename = "clusterID")]
    pub cluster_id: String,
    /// The tenure that begins.
    pub epoch: u64,
    /// Whose it is, 16 hex digits.
    pub node: String,
}

/// What a node has: answer of `POST /v1/cluster/fence`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FenceReply {
    /// Which node, 16 hex digits.
    pub node: String,
    /// Newest tenure of which it has all that the primary began with.
    pub accepted_epoch: u64,
    /// Its databases.
    pub databases: Vec<Standing>,
}

/// Where a database is on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Standing {
    /// Its name.
    pub name: String,
    /// TXID and checksum, as in the `-pos` file.
    pub pos: String,
    /// Tenure of its last transaction.
    pub epoch: u64,
}

/// Body of `POST /v1/cluster/join`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinRequest {
    /// Identity of the cluster, if the node has joined one before.
    #[serde(rename = "clusterID")]
    pub cluster_id: Option<String>,
    /// The node.
    pub node: Peer,
}

/// Answer of `POST /v1/cluster/join`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinReply {
    /// Identity of the cluster.
    #[serde(rename = "clusterID")]
    pub cluster_id: String,
}

/// Body of `POST /v1/cluster/invite`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Invitation {
    /// Identity of the cluster.
    #[serde(rename = "clusterID")]
    pub cluster_id: String,
    /// Where its primary is.
    pub url: String,
}

/// Answer of `POST /v1/cluster/add`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Added {
    /// The node.
    pub node: Peer,
    /// Whether it will vote, once it is level; else it only follows.
    pub is_candidate: bool,
}

/// An answer that takes a while.
pub type Answering<'a, T> = Pin<Box<dyn Future<Output = Result<T, NodeError>> + Send + 'a>>;

/// What the routes need of a node that takes part in elections.
pub trait ClusterApi: Send + Sync + 'static {
    /// Says what this node knows.
    fn overview(&self) -> Overview;
    /// Answers a message of Raft's.
    fn raft(&self, request: Bytes) -> Answering<'_, Bytes>;
    /// Ends older tenures here, and says what this node has.
    fn fence(&self, request: FenceRequest) -> Answering<'_, FenceReply>;
    /// Takes a node in, or learns its new address.
    fn join(&self, request: JoinRequest) -> Answering<'_, JoinReply>;
    /// Tells the node at an address to join.
    fn add(&self, url: String) -> Answering<'_, Added>;
    /// Joins the cluster that asks for it.
    fn invite(&self, invitation: Invitation) -> Result<(), NodeError>;
    /// Where the primary is, if it is known and not this node.
    fn primary_elsewhere(&self) -> Option<String>;
    /// Takes a node out.
    fn remove(&self, node: u64) -> Answering<'_, ()>;
    /// Hears that a primary takes writes now.
    fn opened(&self, request: FenceRequest);
    /// Hears that a node has all that a tenure began with.
    fn accepted(&self, request: FenceRequest);
    /// Sets when commits return, of one database or of all that have no setting of their own.
    fn set_durability(
        &self,
        db: Option<String>,
        value: Option<Durability>,
    ) -> Answering<'_, Vec<String>>;
    /// Sets the region whose voters are to have the primary's role; empty: none.
    fn set_preferred_region(&self, region: String) -> Answering<'_, ()>;
    /// Gives the primary's role to a node, or to the one that suits best.
    fn handoff(&self, to: Option<u64>) -> Answering<'_, Peer>;
    /// Takes the primary's role.
    fn promote(&self) -> Answering<'_, Peer>;
}

type Node = Arc<dyn ClusterApi>;

/// Makes the routes.
pub fn router(node: Node) -> Router {
    let for_primary = Router::new()
        .route("/v1/cluster/add", post(add))
        .route("/v1/cluster/remove", post(remove))
        .route("/v1/cluster/durability", post(durability))
        .route("/v1/cluster/preferred-region", post(preferred_region))
        .route("/handoff", post(handoff))
        .layer(from_fn_with_state(node.clone(), to_primary));
    Router::new()
        .route("/v1/raft", post(raft))
        .route("/v1/cluster", get(overview))
        .route("/v1/cluster/fence", post(fence))
        .route("/v1/cluster/join", post(join))
        .route("/v1/cluster/invite", post(invite))
        .route("/v1/cluster/opened", post(opened))
        .route("/v1/cluster/accepted", post(accepted))
        .route("/promote", post(promote))
        .merge(for_primary)
        .layer(DefaultBodyLimit::max(MAX_RAFT_LEN))
        .with_state(node)
}

#[derive(Deserialize)]
struct NodeQuery {
    #[serde(alias = "nodeID")]
    node: Option<String>,
}

impl NodeQuery {
    fn id(self) -> Result<Option<u64>, NodeError> {
        let text = self.node.filter(|text| !text.is_empty());
        text.map(|text| parse_id(&text)).transpose()
    }
}

/// Reads an identity as `/v1/cluster` shows it.
///
/// # Errors
/// It is not a hexadecimal number.
pub fn parse_id(text: &str) -> Result<u64, NodeError> {
    u64::from_str_radix(text, 16).map_err(|_| NodeError::BadNodeId(text.chars().take(40).collect()))
}

/// Writes an identity.
#[must_use]
pub fn show_id(id: u64) -> String {
    format!("{id:016X}")
}

async fn raft(State(node): State<Node>, body: Bytes) -> Result<Bytes, NodeError> {
    node.raft(body).await
}

async fn overview(State(node): State<Node>) -> Json<Overview> {
    Json(node.overview())
}

async fn fence(
    State(node): State<Node>,
    Json(request): Json<FenceRequest>,
) -> Result<Json<FenceReply>, NodeError> {
    node.fence(request).await.map(Json)
}

async fn join(
    State(node): State<Node>,
    Json(request): Json<JoinRequest>,
) -> Result<Json<JoinReply>, NodeError> {
    node.join(request).await.map(Json)
}

/// Passes a request on to the primary, unless that is this node or nobody, or it was passed on already.
async fn to_primary(State(node): State<Node>, request: Request, next: Next) -> Response {
    match node.primary_elsewhere() {
        Some(url) if !request.headers().contains_key(RELAYED) => {
            let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
            relay(&url, path)
                .await
                .unwrap_or_else(NodeError::into_response)
        }
        _ => next.run(request).await,
    }
}

async fn relay(url: &str, path: &str) -> Result<Response, NodeError> {
    let not_ready = |why: String| NodeError::NotReady(format!("the primary at {url}: {why}"));
    let node = url
        .parse::<NodeUrl>()
        .map_err(|e| not_ready(e.to_string()))?;
    let client = Client::new(node);
    let (status, body) = match tokio::time::timeout(RELAY, client.relay(path)).await {
        Ok(Ok(body)) => (StatusCode::OK, body),
        Ok(Err(ClientError::Status { status, body, .. })) => (status, body.into()),
        Ok(Err(error)) => return Err(not_ready(crate::store::chain(&error))),
        Err(_) => return Err(not_ready(format!("no answer within {RELAY:?}"))),
    };
    let kind = HeaderValue::from_static("application/json");
    Ok((status, [(header::CONTENT_TYPE, kind)], body).into_response())
}

#[derive(Deserialize)]
struct UrlQuery {
    url: Option<String>,
}

async fn add(
    State(node): State<Node>,
    Query(query): Query<UrlQuery>,
) -> Result<Json<Added>, NodeError> {
    let url = query.url.filter(|url| !url.is_empty());
    let url = url.ok_or(NodeError::MissingParameter("url"))?;
    let url = url.parse::<NodeUrl>().map_err(|e| NodeError::Conflict {
        what: e.to_string(),
        remedy: "give the address that is lease.advertise-url of the node".to_owned(),
    })?;
    node.add(url.to_string()).await.map(Json)
}

async fn invite(
    State(node): State<Node>,
    Json(invitation): Json<Invitation>,
) -> Result<Json<serde_json::Value>, NodeError> {
    node.invite(invitation)?;
    Ok(Json(serde_json::json!({})))
}

async fn remove(
    State(node): State<Node>,
    Query(query): Query<NodeQuery>,
) -> Result<Json<serde_json::Value>, NodeError> {
    let id = query.id()?.ok_or(NodeError::MissingParameter("node"))?;
    node.remove(id).await?;
    Ok(Json(serde_json::json!({ "removed": show_id(id) })))
}

async fn opened(State(node): State<Node>, Json(request): Json<FenceRequest>) {
    node.opened(request);
}

async fn accepted(State(node): State<Node>, Json(request): Json<FenceRequest>) {
    node.accepted(request);
}

#[derive(Deserialize)]
struct DurabilityQuery {
    value: Option<String>,
    db: Option<String>,
}

async fn durability(
    State(node): State<Node>,
    Query(query): Query<DurabilityQuery>,
) -> Result<Json<serde_json::Value>, NodeError> {
    let db = query.db.filter(|db| !db.is_empty());
    if let Some(db) = &db {
        db.parse::<crate::replication::DbName>()?;
    }
    let value = match query.value.as_deref() {
        None | Some("") => return Err(NodeError::MissingParameter("value")),
        Some("default") if db.is_some() => None,
        Some(text) => Some(parse_durability(text).map_err(|e| NodeError::Conflict {
            what: e.to_string(),
            remedy: format!("{DURABILITY_REMEDY}; or default for a single database"),
        })?),
    };
    let unheld = node.set_durability(db.clone(), value).await?;
    Ok(Json(
        serde_json::json!({ "db": db, "durability": query.value, "unheld": unheld }),
    ))
}

#[derive(Deserialize)]
struct RegionQuery {
    value: Option<String>,
}

async fn preferred_region(
    State(node): State<Node>,
    Query(query): Query<RegionQuery>,
) -> Result<Json<serde_json::Value>, NodeError> {
    let value = query.value.ok_or(NodeError::MissingParameter("value"))?;
    node.set_preferred_region(value.clone()).await?;
    Ok(Json(serde_json::json!({ "preferredRegion": value })))
}

async fn handoff(
    State(node): State<Node>,
    Query(query): Query<NodeQuery>,
) -> Result<Json<Peer>, NodeError> {
    node.handoff(query.id()?).await.map(Json)
}

async fn promote(State(node): State<Node>) -> Result<Json<Peer>, NodeError> {
    node.promote().await.map(Json)
}
