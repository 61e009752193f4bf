//! What a program was told is committed is in some history in the end, or kept apart, or went with a disk or a power cut.

use std::collections::BTreeSet;

use super::Invariant;
use crate::node::sim::world::World;

pub(super) struct NothingVanishes;

impl Invariant for NothingVanishes {
    fn check_healed(&mut self, world: &World) -> Result<(), String> {
        let mut there: BTreeSet<u64> = world.client.excused.clone();
        there.extend(&world.client.dropped);
        for node in world.nodes.values() {
            there.extend(&node.disk.quarantine);
            for copy in node.disk.dbs.values() {
                there.extend(copy.log.iter().map(|tx| tx.id));
                there.extend(&copy.wal);
            }
        }
        let gone = world
            .client
            .committed
            .iter()
            .find(|c| !there.contains(&c.id));
        match gone {
            Some(c) => Err(format!("{} {} of {} is nowhere", c.db, c.id, c.node)),
            None => Ok(()),
        }
    }
}
