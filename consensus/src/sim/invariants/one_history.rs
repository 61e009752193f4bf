//! Two nodes that have applied the log up to the same index have the same state.

use std::collections::BTreeMap;

use super::Invariant;
use crate::member::NodeId;
use crate::raft::LogId;
use crate::sim::world::World;

#[derive(Default)]
pub(super) struct OneHistory {
    states: BTreeMap<u64, (LogId, u32)>,
    seen: BTreeMap<NodeId, u64>,
}

impl Invariant for OneHistory {
    fn check(&mut self, world: &World, _: &[String]) -> Result<(), String> {
        for id in world.ids() {
            let Some((_, cluster)) = world.node(id) else {
                continue;
            };
            let applied = cluster.inner.applied.borrow();
            let Some(last) = applied.last else { continue };
            if self.seen.insert(id, last.index()) == Some(last.index()) {
                continue;
            }
            let text = serde_json::to_vec(applied.state.as_ref()).map_err(|e| e.to_string())?;
            let now = (last, crc32fast::hash(&text));
            let first = *self.states.entry(last.index()).or_insert(now);
            if first != now {
                return Err(format!("node {id} has {now:?}, another had {first:?}"));
            }
        }
        Ok(())
    }
}
