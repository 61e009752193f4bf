//! openraft's types as this crate uses them; no other module spells them out.

use openraft::impls::{BoxedErrorSource, leader_id_std};
use openraft::type_config::alias;

use crate::command::{Outcome, Proposal};
use crate::member::{Member, NodeId};
use crate::runtime::Runtime;
use crate::state_machine::StateMachine;

openraft::declare_raft_types!(
    /// `leader_id_std` allows one leader in a term, so that a term can serve as an epoch.
    pub(crate) TypeConfig:
        D = Proposal,
        R = Outcome,
        NodeId = NodeId,
        Node = Member,
        LeaderId = leader_id_std::LeaderId<u64, NodeId>,
        AsyncRuntime = Runtime,
        ErrorSource = BoxedErrorSource,
);

pub(crate) type Raft = openraft::Raft<TypeConfig, StateMachine>;
pub(crate) type Metrics = openraft::RaftMetrics<TypeConfig>;
pub(crate) type MetricsReceiver = alias::WatchReceiverOf<TypeConfig, Metrics>;
pub(crate) type RaftInstant = alias::InstantOf<TypeConfig>;
pub(crate) type Entry = alias::EntryOf<TypeConfig>;
pub(crate) type LogId = alias::LogIdOf<TypeConfig>;
pub(crate) type Vote = alias::VoteOf<TypeConfig>;
pub(crate) type StoredMembership = alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<TypeConfig>;
/// The replicated state as JSON.
pub(crate) type SnapshotData = String;
pub(crate) type Snapshot = alias::SnapshotOf<TypeConfig, SnapshotData>;

/// Returns the term in which an entry was proposed.
pub(crate) fn term_of(log_id: &LogId) -> u64 {
    log_id.committed_leader_id().term
}
