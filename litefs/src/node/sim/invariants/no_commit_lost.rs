//! What a quorum acknowledged in one tenure, every later one begins with, but what went with a database that was removed.

use super::Invariant;
use crate::node::sim::client::{Committed, News, Opened, Promise};
use crate::node::sim::world::World;

#[derive(Default)]
pub(super) struct NoCommitLost {
    committed: Vec<(u64, Committed)>,
    opened: Vec<Opened>,
}

fn compare(world: &World, epoch: u64, commit: &Committed, opened: &Opened) -> Result<(), String> {
    let has = |ids: &std::collections::BTreeSet<u64>| ids.contains(&commit.id);
    let is_dropped = world.client.dropped.contains(&commit.id);
    if opened.epoch > epoch && !is_dropped && !opened.dbs.get(&commit.db).is_some_and(has) {
        return Err(format!(
            "{} {} of {} was acknowledged by a quorum in {epoch}, and {} opened {} without it",
            commit.db, commit.id, commit.node, opened.node, opened.epoch
        ));
    }
    Ok(())
}

impl Invariant for NoCommitLost {
    fn check(&mut self, world: &World) -> Result<(), String> {
        for news in &world.client.news {
            match news {
                News::Committed(commit) => {
                    let Promise::Quorum { epoch } = commit.promise else {
                        continue;
                    };
                    for opened in &self.opened {
                        compare(world, epoch, commit, opened)?;
                    }
                    self.committed.push((epoch, commit.clone()));
                }
                News::Opened(opened) => {
                    for (epoch, commit) in &self.committed {
                        compare(world, *epoch, commit, opened)?;
                    }
                    self.opened.push(opened.clone());
                }
                News::Replaced { .. } => {}
            }
        }
        Ok(())
    }

    fn check_healed(&mut self, world: &World) -> Result<(), String> {
        let mut all = self.committed.iter();
        let lost = all.find(|(_, commit)| {
            let mut up = world
                .nodes
                .values()
                .filter(|node| node.is_up && node.process.is_primary);
            up.any(|node| {
                let copy = node.disk.dbs.get(&commit.db);
                let is_dropped = world.client.dropped.contains(&commit.id);
                !is_dropped && !copy.is_some_and(|copy| copy.has(commit.id))
            })
        });
        match lost {
            Some((epoch, c)) => Err(format!("{} {} of {epoch} is gone", c.db, c.id)),
            None => Ok(()),
        }
    }
}
