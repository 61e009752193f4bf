//! What nodes say to each other: one JSON object each way, with a version, the cluster and both ends.
//!
//! JSON, because openraft's types bring serde, messages are few and small, and fields that a version does not know
//! are skipped. The version grows only when an older node would misunderstand.

use bytes::Bytes;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use serde::{Deserialize, Serialize};

use crate::member::NodeId;
use crate::raft::{SnapshotData, SnapshotMeta, TypeConfig, Vote};
use crate::storage::Identity;

/// Version of the messages of this program.
const VERSION: u32 = 1;

/// A request with where it comes from and where it belongs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    v: u32,
    pub(crate) cluster_id: String,
    pub(crate) from: NodeId,
    pub(crate) to: NodeId,
    /// Whether the sender takes the receiver for a voter.
    pub(crate) to_voter: bool,
    /// How long the sender leads, once it does, by an answer that it gets; milliseconds.
    #[serde(default)]
    pub(crate) lease_ms: u64,
    pub(crate) rpc: Rpc,
}

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Rpc {
    Append(AppendEntriesRequest<TypeConfig>),
    PreVote(VoteRequest<TypeConfig>),
    Vote(VoteRequest<TypeConfig>),
    Snapshot {
        vote: Vote,
        meta: SnapshotMeta,
        data: SnapshotData,
    },
    Transfer(TransferLeaderRequest<TypeConfig>),
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Response {
    v: u32,
    pub(crate) result: Result<Answer, Refusal>,
}

/// The answer of a node that took the request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Append(AppendEntriesResponse<TypeConfig>),
    Vote(VoteResponse<TypeConfig>),
    Snapshot(SnapshotResponse<TypeConfig>),
    Transfer(TransferLeaderResponse<TypeConfig>),
}

/// Why a node did not even look at a request; nothing has changed there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Refusal {
    #[error("message version {theirs} is not spoken here, {ours} is")]
    Version { ours: u32, theirs: u32 },
    #[error("unreadable message: {why}")]
    Unreadable { why: String },
    #[error(
        "this is cluster {ours:?}, the message is of {theirs:?}; check the peers in the configuration"
    )]
    WrongCluster { ours: String, theirs: String },
    #[error("this is node {ours}, the message is for node {theirs}; did an address change hands?")]
    WrongNode { ours: NodeId, theirs: NodeId },
    #[error("node {node_id} has started just now and is bound by what it may have promised before")]
    Bound { node_id: NodeId },
    #[error(
        "node {node_id} promises its vote for {promise_ms} ms, too short for a lease of {lease_ms} ms: set the same lease.ttl on \
         all nodes; to raise it, on one node after the other"
    )]
    LeaseTooLong {
        node_id: NodeId,
        promise_ms: u64,
        lease_ms: u64,
    },
    #[error("node {node_id} has no log, so it does not vote")]
    NoLog { node_id: NodeId },
    #[error(
        "node {node_id} is a voter and has lost its raft log; start it under a new id and replace the old one"
    )]
    LostLog { node_id: NodeId },
    #[error("node {node_id} does not get to it; is its disk stuck?")]
    Busy { node_id: NodeId },
    #[error("node {node_id} has stopped: {why}")]
    Stopped { node_id: NodeId, why: String },
}

/// Only what every version has.
#[derive(Deserialize)]
struct Probe {
    v: u32,
}

impl Request {
    pub(crate) fn new(
        from: &Identity,
        to: NodeId,
        to_voter: bool,
        lease_ms: u64,
        rpc: Rpc,
    ) -> Request {
        Request {
            v: VERSION,
            cluster_id: from.cluster_id.clone(),
            from: from.node_id,
            to,
            to_voter,
            lease_ms,
            rpc,
        }
    }
}

/// Writes a request.
pub(crate) fn encode_request(request: &Request) -> Result<Bytes, serde_json::Error> {
    Ok(serde_json::to_vec(request)?.into())
}

/// Reads a request.
pub(crate) fn decode_request(bytes: &[u8]) -> Result<Request, Refusal> {
    decode(bytes)
}

/// Writes a response.
pub(crate) fn encode_response(result: Result<Answer, Refusal>) -> Bytes {
    match serde_json::to_vec(&Response { v: VERSION, result }) {
        Ok(bytes) => bytes.into(),
        // No type of these can fail; and an empty answer is unreadable, that is, no answer.
        Err(error) => {
            tracing::error!(%error, "encode answer");
            Bytes::new()
        }
    }
}

/// Reads a response.
pub(crate) fn decode_response(bytes: &[u8]) -> Result<Answer, Refusal> {
    decode::<Response>(bytes)?.result
}

fn decode<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Result<T, Refusal> {
    let unreadable = |e: serde_json::Error| Refusal::Unreadable { why: e.to_string() };
    let probe: Probe = serde_json::from_slice(bytes).map_err(unreadable)?;
    if probe.v != VERSION {
        return Err(Refusal::Version {
            ours: VERSION,
            theirs: probe.v,
        });
    }
    serde_json::from_slice(bytes).map_err(unreadable)
}
