//! Nodes that are level with a primary have its history, but for databases that it had not heard of; and what a node committed itself and then gave up is kept there.

use std::collections::BTreeMap;

use super::Invariant;
use crate::ltx::Txid;
use crate::node::sim::client::News;
use crate::node::sim::world::{Id, Node, World};

#[derive(Default)]
pub(super) struct NoSilentFork {
    committed_by: BTreeMap<u64, Id>,
}

/// Returns of which tenure's history a node has all.
fn history_of(node: &Node) -> Option<u64> {
    let process = &node.process;
    let is_level = process.is_connected
        && process.is_level
        && !process.has_own
        && node.disk.accepted == process.followed;
    match process.is_primary {
        true => Some(process.epoch),
        false => is_level.then_some(process.followed),
    }
}

impl Invariant for NoSilentFork {
    fn check(&mut self, world: &World) -> Result<(), String> {
        for news in &world.client.news {
            match news {
                News::Committed(commit) => {
                    self.committed_by.insert(commit.id, commit.node);
                }
                News::Replaced { node, db, before } => {
                    let disk = &world.nodes[node].disk;
                    let copy = &disk.dbs[db];
                    let gone = before.iter().find(|tx| {
                        self.committed_by.get(&tx.id) == Some(node)
                            && !copy.has(tx.id)
                            && !disk.quarantine.contains(&tx.id)
                            && !world.client.dropped.contains(&tx.id)
                    });
                    if let Some(tx) = gone {
                        return Err(format!("{node} gave up {db} {} and kept nothing", tx.id));
                    }
                }
                News::Opened(_) => {}
            }
        }
        let nodes: Vec<&Node> = world.nodes.values().filter(|node| node.is_up).collect();
        for (i, one) in nodes.iter().enumerate() {
            let Some(epoch) = history_of(one) else {
                continue;
            };
            for other in &nodes[i + 1..] {
                if history_of(other) == Some(epoch) {
                    compare(epoch, one, other)?;
                }
            }
        }
        Ok(())
    }
}

fn compare(epoch: u64, one: &Node, other: &Node) -> Result<(), String> {
    for (db, copy) in &one.disk.dbs {
        let Some(theirs) = other.disk.dbs.get(db) else {
            continue;
        };
        let txid = Txid(copy.log.len().min(theirs.log.len()) as u64);
        let (a, b) = (copy.pos_at(txid), theirs.pos_at(txid));
        if a != b {
            return Err(format!(
                "{db} of {} and {} in {epoch}: {a} is not {b}",
                one.id, other.id
            ));
        }
    }
    Ok(())
}
