//! At no moment two nodes hold a lease, each by its own clock, also nodes that are stopped.

use super::Invariant;
use crate::sim::world::World;

pub(super) struct OneLease;

impl Invariant for OneLease {
    fn check(&mut self, world: &World, _: &[String]) -> Result<(), String> {
        let holders = world.holders();
        match holders.len() {
            0 | 1 => Ok(()),
            _ => Err(format!("more than one lease: {holders:?}")),
        }
    }
}
