//! openraft's view of the transport.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, v2::RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use parking_lot::RwLock;

use crate::member::{Member, NodeId};
use crate::raft::{Snapshot, SnapshotData, TypeConfig, Vote};
use crate::storage::Identity;
use crate::transport::Transport;
use crate::wire::{self, Answer, Request, Rpc};

/// All members, and whether they vote.
pub(crate) type Members = Arc<RwLock<BTreeMap<NodeId, (Member, bool)>>>;

/// What all connections of a node share.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) identity: Arc<RwLock<Identity>>,
    /// Where members are now, and which vote; openraft does not tell a connection that its peer has moved.
    pub(crate) members: Members,
    /// How long a leader may act, milliseconds.
    pub(crate) lease_ms: u64,
}

/// The way to one peer.
pub(crate) struct Peer {
    network: Network,
    to: NodeId,
    member: Member,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, to: NodeId, member: &Member) -> Peer {
        Peer {
            network: self.clone(),
            to,
            member: member.clone(),
        }
    }
}

impl Peer {
    async fn call(&self, rpc: Rpc, option: RPCOption) -> Result<Answer, RPCError<TypeConfig>> {
        let known = self.network.members.read().get(&self.to).cloned();
        let (member, is_voter) = known.unwrap_or_else(|| (self.member.clone(), false));
        let request = Request::new(
            &self.network.identity.read(),
            self.to,
            is_voter,
            self.network.lease_ms,
            rpc,
        );
        let request =
            wire::encode_request(&request).map_err(|e| RPCError::Network(NetworkError::new(&e)))?;
        // What does not come within the hard limit is given up by openraft.
        let timeout = option.hard_ttl();
        let answer = self
            .network
            .transport
            .call(self.to, &member, request, timeout)
            .await
            .map_err(|e| RPCError::Unreachable(Unreachable::new(&e)))?;
        wire::decode_response(&answer).map_err(|refusal| {
            tracing::debug!(to = self.to, %refusal, "peer refused");
            RPCError::Unreachable(Unreachable::new(&refusal))
        })
    }
}

fn mismatch() -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string("answer to another question"))
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.call(Rpc::Append(rpc), option).await? {
            Answer::Append(answer) => Ok(answer),
            _ => Err(mismatch()),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.call(Rpc::Vote(rpc), option).await? {
            Answer::Vote(answer) => Ok(answer),
            _ => Err(mismatch()),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.call(Rpc::PreVote(rpc), option).await? {
            Answer::Vote(answer) => Ok(answer),
            _ => Err(mismatch()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        _cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let rpc = Rpc::Snapshot {
            vote,
            meta: snapshot.meta,
            data: snapshot.snapshot,
        };
        match self.call(rpc, option).await? {
            Answer::Snapshot(answer) => Ok(answer),
            _ => Err(mismatch().into()),
        }
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.call(Rpc::Transfer(rpc), option).await? {
            Answer::Transfer(answer) => Ok(answer),
            _ => Err(mismatch()),
        }
    }
}
