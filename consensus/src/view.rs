//! What a node knows of its cluster, for those who watch it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::command::ClusterState;
use crate::lease::Leases;
use crate::member::{Member, NodeId};
use crate::raft::{Metrics, term_of};
use crate::state_machine::Applied;

/// A node's view of its cluster. It may be late; only a [`Lease`](crate::Lease) says who may act.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// This node.
    pub node_id: NodeId,
    /// The latest term this node has heard of. A leader of it may not be known yet.
    pub epoch: u64,
    /// Who leads in that epoch, as far as is known.
    pub leader: Option<(NodeId, Member)>,
    /// Whether that is this node, it has all that was committed before, and has not begun to hand over.
    pub is_leader: bool,
    /// Members that vote.
    pub voters: BTreeMap<NodeId, Member>,
    /// Members that do not vote.
    pub learners: BTreeMap<NodeId, Member>,
    /// Sets of voters each of which must agree by majority: two while members change, one otherwise.
    pub voter_sets: Vec<BTreeSet<NodeId>>,
    /// What is replicated besides the members.
    pub state: Arc<ClusterState>,
    /// Whether that is what the leader of this epoch began with, or newer. A node that has just started knows only what its
    /// last snapshot says.
    pub is_current: bool,
    /// What the disk refuses at the moment; nothing is acknowledged until it goes away.
    pub trouble: Option<String>,
    /// Why Raft has stopped on this node, if it has; only a restart helps.
    pub stopped: Option<String>,
}

impl View {
    /// Says whether these nodes are a quorum, also while members change.
    #[must_use]
    pub fn is_quorum(&self, nodes: &BTreeSet<NodeId>) -> bool {
        !self.voter_sets.is_empty()
            && self
                .voter_sets
                .iter()
                .all(|set| set.intersection(nodes).count() > set.len() / 2)
    }

    pub(crate) fn new(
        metrics: &Metrics,
        applied: &Applied,
        leases: &Leases,
        trouble: Option<String>,
    ) -> View {
        let membership = metrics.membership_config.membership();
        let all = || membership.nodes().map(|(id, member)| (*id, member.clone()));
        let voters: BTreeSet<NodeId> = membership.voter_ids().collect();
        let leader = metrics.current_leader.and_then(|id| {
            let member = membership.get_node(&id)?;
            Some((id, member.clone()))
        });
        View {
            node_id: metrics.id,
            epoch: metrics.current_term,
            leader,
            is_leader: leases.leading(metrics).is_some(),
            voters: all().filter(|(id, _)| voters.contains(id)).collect(),
            learners: all().filter(|(id, _)| !voters.contains(id)).collect(),
            voter_sets: membership.get_joint_config().clone(),
            state: applied.state.clone(),
            is_current: metrics.last_applied.as_ref().map(term_of) == Some(metrics.current_term),
            trouble,
            stopped: metrics
                .running_state
                .as_ref()
                .err()
                .map(ToString::to_string),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quorum_needs_a_majority_of_every_set_of_voters() {
        let set = |ids: &[NodeId]| ids.iter().copied().collect::<BTreeSet<_>>();
        let mut view = View::default();
        assert!(!view.is_quorum(&set(&[1])), "of no voters");
        view.voter_sets = vec![set(&[1])];
        assert!(view.is_quorum(&set(&[1, 9])) && !view.is_quorum(&set(&[9])));
        view.voter_sets = vec![set(&[1, 2, 3, 4])];
        assert!(!view.is_quorum(&set(&[1, 2])) && view.is_quorum(&set(&[1, 2, 4])));
        view.voter_sets = vec![set(&[1, 2, 3]), set(&[3, 4, 5])];
        assert!(!view.is_quorum(&set(&[1, 2, 3])), "not of the second set");
        assert!(view.is_quorum(&set(&[1, 3, 4])));
    }
}
