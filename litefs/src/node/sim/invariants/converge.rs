//! Once all is well, all nodes have what the primary has.

use super::Invariant;
use crate::node::sim::world::World;

pub(super) struct Converge;

impl Invariant for Converge {
    fn check_healed(&mut self, world: &World) -> Result<(), String> {
        let primary = world
            .nodes
            .values()
            .find(|node| node.is_up && node.process.is_primary);
        let Some(primary) = primary else {
            return Err("there is no primary".to_owned());
        };
        for node in world.nodes.values().filter(|node| node.is_up) {
            for (db, copy) in &primary.disk.dbs {
                let theirs = node.disk.dbs.get(db).map(|copy| copy.pos());
                if theirs.unwrap_or_default() != copy.pos() {
                    return Err(format!(
                        "{db}: {} has {theirs:?}, the primary {} has {}",
                        node.id,
                        primary.id,
                        copy.pos()
                    ));
                }
            }
        }
        Ok(())
    }
}
