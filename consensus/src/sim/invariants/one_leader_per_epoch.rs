//! An epoch belongs to one process of one node: a leader that restarts gets a new one.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Invariant;
use crate::member::NodeId;
use crate::sim::runtime::Node;
use crate::sim::world::World;

#[derive(Default)]
pub(super) struct OneLeaderPerEpoch {
    leaders: BTreeMap<u64, (NodeId, Arc<Node>)>,
}

impl Invariant for OneLeaderPerEpoch {
    fn check(&mut self, world: &World, _: &[String]) -> Result<(), String> {
        for id in world.ids() {
            let Some((process, cluster)) = world.node(id) else {
                continue;
            };
            let epoch = {
                let view = cluster.watch();
                let view = view.borrow();
                view.is_leader.then_some(view.epoch)
            };
            let Some(epoch) = epoch else { continue };
            let first = self.leaders.entry(epoch).or_insert((id, process.clone()));
            if first.0 != id || !Arc::ptr_eq(&first.1, process) {
                return Err(format!(
                    "epoch {epoch} of node {} is node {id}'s too",
                    first.0
                ));
            }
        }
        Ok(())
    }
}
