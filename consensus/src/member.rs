use serde::{Deserialize, Serialize};

/// Names a node of the cluster for good: a node that lost its disk comes back under a new one.
pub type NodeId = u64;

/// What all nodes know of a member; replicated, and changed by [`Cluster::update_member`](crate::Cluster::update_member).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Name for people.
    pub hostname: String,
    /// Where other nodes reach it, such as `http://10.0.0.1:20202`.
    pub url: String,
    /// Where it is; empty if nobody said.
    #[serde(default)]
    pub region: String,
    /// Candidates with a higher one are preferred.
    #[serde(default)]
    pub priority: u32,
}
