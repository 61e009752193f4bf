//! At no moment two nodes have writes open, each by its own lease; an epoch belongs to one node; and where a node is not the
//! primary, programs cannot write.

use std::collections::BTreeMap;

use super::Invariant;
use crate::node::sim::client::{News, Opened};
use crate::node::sim::world::{Id, World};

#[derive(Default)]
pub(super) struct OnePrimary {
    owners: BTreeMap<u64, Id>,
}

impl Invariant for OnePrimary {
    fn check(&mut self, world: &World) -> Result<(), String> {
        for news in &world.client.news {
            // Again by the same node: its lease ended, and came back before anybody else was elected.
            if let News::Opened(opened) = news
                && let Some(other) = self.owners.insert(opened.epoch, opened.node)
                && other != opened.node
            {
                let Opened { node, epoch, .. } = opened;
                return Err(format!("{other} and {node} opened {epoch}"));
            }
        }
        let mut primary = None;
        for (id, node) in world.nodes.iter().filter(|(_, node)| node.is_up) {
            let process = &node.process;
            // What goes on when a lease ends, a guard ends; it may be some milliseconds late, a stopped one more.
            if process.is_primary
                && world.tenure(*id) == Some(process.epoch)
                && let Some(other) = primary.replace(*id)
            {
                return Err(format!("{other} and {id} have writes open"));
            }
            let is_settled = process.demotions.is_empty() && !process.unfenced;
            if !process.is_primary
                && is_settled
                && let Some((db, _)) = node.disk.dbs.iter().find(|(_, copy)| copy.is_primary)
            {
                return Err(format!("{id} is not the primary, and programs write {db}"));
            }
        }
        Ok(())
    }
}
