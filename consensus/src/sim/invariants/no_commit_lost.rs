//! Who holds a lease has everything that was ever acknowledged to somebody.

use super::Invariant;
use crate::sim::world::World;

pub(super) struct NoCommitLost;

impl Invariant for NoCommitLost {
    fn check(&mut self, world: &World, acknowledged: &[String]) -> Result<(), String> {
        for (id, _) in world.holders() {
            let (_, cluster) = world.node(id).expect("it holds a lease");
            let applied = cluster.inner.applied.borrow();
            let lost = acknowledged
                .iter()
                .find(|db| !applied.state.databases.contains_key(*db));
            if let Some(lost) = lost {
                return Err(format!("node {id} leads without {lost}"));
            }
        }
        Ok(())
    }
}
