//! `GET /v1/status`: the cluster as the node that is asked sees it right now.
//!
//! The node asks every node it knows of, once and in parallel, for [`NodeStatus`] (`GET /v1/status?only=node`), and
//! puts the answers together. A node that does not answer is a row that says so.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::cluster::{Answering, Peer};
use super::error::NodeError;

/// How the primary is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseType {
    /// The configuration names it.
    Static,
    /// The candidates elect it.
    Raft,
}

/// What a node knows by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    /// How the primary is found.
    pub lease: LeaseType,
    /// Identity of the cluster, if it has joined one.
    #[serde(rename = "clusterID")]
    pub cluster_id: Option<String>,
    /// The node.
    pub node: Peer,
    /// Of its program.
    pub version: String,
    /// Whether it takes writes.
    pub is_primary: bool,
    /// Whether it may be elected.
    pub candidate: bool,
    /// Newest tenure it knows of.
    pub epoch: u64,
    /// How old its state is at most, in milliseconds; unknown before it has had all of a primary's.
    pub lag_ms: Option<u64>,
    /// When commits return, as the cluster agreed.
    pub durability: Option<String>,
    /// The same for single databases that have their own setting.
    #[serde(default)]
    pub database_durability: BTreeMap<String, String>,
    /// The region whose voters are to have the primary's role; empty: none.
    #[serde(default)]
    pub preferred_region: String,
    /// Members that vote.
    #[serde(default)]
    pub voters: Vec<Peer>,
    /// Members that do not vote.
    #[serde(default)]
    pub learners: Vec<Peer>,
    /// Whether voters are being changed: until that is done, it takes a majority of the old ones too.
    #[serde(default)]
    pub is_changing: bool,
    /// Its databases.
    pub databases: Vec<DbStanding>,
    /// Of the primary: databases whose commits should wait and do not, until the programs that have them open open them again.
    #[serde(default)]
    pub unheld: Vec<String>,
    /// Who follows it, or did a moment ago.
    #[serde(default)]
    pub replicas: Vec<ReplicaSeen>,
}

/// A database on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DbStanding {
    /// Its name.
    pub name: String,
    /// TXID and checksum, as in the `-pos` file.
    pub pos: String,
    /// When its last transaction was committed, by the primary's clock, in milliseconds since 1970; 0 if unknown.
    #[serde(default)]
    pub committed_ms: i64,
}

/// A replica as the node that it follows sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaSeen {
    /// Its identity, 16 hex digits.
    pub id: String,
    /// Its host name.
    pub hostname: String,
    /// Whether it follows now.
    pub is_connected: bool,
    /// How long ago it was last heard.
    pub heard_ms_ago: u64,
    /// What it has acknowledged.
    pub databases: Vec<DbStanding>,
}

/// What a node is in its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeRole {
    /// It takes writes.
    Primary,
    /// It votes, and may be elected.
    Voter,
    /// It follows: not a candidate, or not level yet.
    Follower,
    /// The node that was asked gets no answer from it.
    Unreachable,
    /// It answers, and belongs to another cluster.
    Stranger,
}

impl NodeRole {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            NodeRole::Primary => "primary",
            NodeRole::Voter => "voter",
            NodeRole::Follower => "follower",
            NodeRole::Unreachable => "unreachable",
            NodeRole::Stranger => "stranger",
        }
    }
}

/// Answer of `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// How the primary is found.
    pub lease: LeaseType,
    /// Identity of the cluster, if the node has joined one.
    #[serde(rename = "clusterID")]
    pub cluster_id: Option<String>,
    /// Newest tenure that was heard of.
    pub epoch: u64,
    /// When commits return; of a static lease nothing: at once.
    pub durability: Option<String>,
    /// The region whose voters are to have the primary's role; empty: none.
    pub preferred_region: String,
    /// Whether voters are being changed: until that is done, it takes a majority of the old ones too.
    pub is_changing: bool,
    /// Databases whose commits should wait for other nodes and do not, until the programs that have them open open them again.
    pub unheld: Vec<String>,
    /// The node that was asked.
    pub asked: String,
    /// The primary, if one answers.
    pub primary: Option<String>,
    /// All nodes.
    pub nodes: Vec<NodeRow>,
    /// All databases.
    pub databases: Vec<DbRow>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRow {
    /// Its identity, address and settings; what is not known is empty.
    #[serde(flatten)]
    pub node: Peer,
    /// What it is.
    pub role: NodeRole,
    /// Whether it votes, also while it cannot be reached.
    pub votes: bool,
    /// Of its program.
    pub version: Option<String>,
    /// How old its state is at most, in milliseconds.
    pub lag_ms: Option<u64>,
    /// Why it is unreachable or a stranger.
    pub error: Option<String>,
}

/// A database on all nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DbRow {
    /// Its name.
    pub name: String,
    /// When commits of it return.
    pub durability: Option<String>,
    /// Where it is, in the order of the nodes.
    pub copies: Vec<DbCopy>,
}

/// A database on one node, held against the primary's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DbCopy {
    /// Identity of the node.
    pub node: String,
    /// Its host name.
    pub hostname: String,
    /// TXID and checksum; nothing if the node does not have the database.
    pub pos: Option<String>,
    /// Transactions that the primary has and the node does not, if a primary answers.
    pub behind: Option<u64>,
    /// The same in milliseconds: how old its state of this database is at most.
    pub lag_ms: Option<u64>,
    /// At the same TXID with other contents.
    pub differs: bool,
}

/// What the route needs of a node.
pub trait StatusApi: Send + Sync + 'static {
    /// Says what this node knows by itself. Does not block.
    fn node_status(&self) -> NodeStatus;
    /// Asks the others too.
    fn status(&self) -> Answering<'_, Status>;
}

/// Makes the route.
pub fn router(node: Arc<dyn StatusApi>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .with_state(node)
}

#[derive(Deserialize)]
struct StatusQuery {
    only: Option<String>,
}

async fn status(
    State(node): State<Arc<dyn StatusApi>>,
    Query(query): Query<StatusQuery>,
) -> Result<Response, NodeError> {
    match query.only.as_deref() {
        Some("node") => Ok(Json(node.node_status()).into_response()),
        _ => Ok(Json(node.status().await?).into_response()),
    }
}
