use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::member::{Member, NodeId};
use crate::storage::Fault;
use crate::timing::TimingError;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The time settings contradict each other.
    #[error("invalid timing")]
    Timing(#[from] TimingError),
    /// A file could not be read or written.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file or directory.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// A file of the raft directory is not what was written, so what this node promised is not known any more.
    #[error(
        "{} at byte {offset}: {fault}; move the raft directory away, start this node under a new id, and replace \
         the old one (litefs cluster add --replaces)",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where the fault is, in bytes.
        offset: u64,
        /// What is wrong.
        #[source]
        fault: Fault,
    },
    /// The directory is that of another node.
    #[error("{} belongs to node {have}, not to node {want}; each node needs a directory of its own", path.display())]
    OtherNode {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        have: NodeId,
        /// Who opened it.
        want: NodeId,
    },
    /// The node is a member of a cluster already.
    #[error("this node is a member of cluster {cluster_id:?} already")]
    AlreadyInitialized {
        /// Which one; empty if not known yet.
        cluster_id: String,
    },
    /// Only the leader can do this.
    #[error("node {node_id} does not lead{}", match leader { Some((id, m)) => format!("; node {id} at {} does", m.url), None => "; nobody does now, try again".to_owned() })]
    NotLeader {
        /// This node.
        node_id: NodeId,
        /// Who leads as far as is known.
        leader: Option<(NodeId, Member)>,
    },
    /// No quorum answered, so it is not known whether this node still leads.
    #[error("no quorum of voters answered")]
    NoQuorum,
    /// The leader changed before it was known whether the change was committed.
    #[error("leadership was lost meanwhile: the outcome is unknown")]
    Unknown,
    /// The node is not a member.
    #[error("node {id} is not a {role} of this cluster")]
    NotMember {
        /// The node.
        id: NodeId,
        /// What it would have to be.
        role: &'static str,
    },
    /// A member with the same URL is there under another id.
    #[error("{url} is node {id} already; remove or replace it")]
    UrlInUse {
        /// The URL.
        url: String,
        /// Who has it.
        id: NodeId,
    },
    /// Another change of the members is not finished yet.
    #[error("another change of the members is going on; try again")]
    ChangeInProgress,
    /// A leader cannot take itself out; it has to hand over first.
    #[error("node {id} leads and cannot be removed; transfer leadership first")]
    RemoveLeader {
        /// This node.
        id: NodeId,
    },
    /// A new member did not come up to date.
    #[error(
        "node {id} did not get the raft log within {waited:?}; is it running and reachable at {url}?"
    )]
    NotCaughtUp {
        /// The node.
        id: NodeId,
        /// Where it should be.
        url: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A leader that can be heard holds a lease, or this node may still be bound to one.
    #[error("an election is not possible now: {why}")]
    ElectionRefused {
        /// The reason.
        why: &'static str,
    },
    /// The other node did not take over.
    #[error("node {to} did not take over within {waited:?}; an election follows")]
    TransferFailed {
        /// The node.
        to: NodeId,
        /// How long it was waited for.
        waited: Duration,
    },
    /// There is nobody to hand over to.
    #[error("this node is the only voter; nobody could take over")]
    OnlyVoter,
    /// The node has been shut down, or stopped by an error it could not go on with.
    #[error("raft has stopped: {why}")]
    Stopped {
        /// The reason.
        why: String,
    },
    /// Raft refused for another reason.
    #[error("raft refused: {why}")]
    Refused {
        /// The reason.
        why: String,
    },
}
