//! Of what commits with a bound promised: when one returns, a majority lacks no more than so many transactions, none that
//! returned longer ago than the bound says; and no more than so many of a tenure's are missing from a later one, but for what
//! the primary had not synced when its power was cut: it counts itself all the same.

use std::collections::BTreeMap;

use super::Invariant;
use crate::node::sim::client::{Committed, News, Opened, Promise};
use crate::node::sim::raft::is_quorum;
use crate::node::sim::world::{MS, Us, World};
use crate::replication::DbName;

#[derive(Default)]
pub(super) struct Bounded {
    returned_at: BTreeMap<u64, Us>,
    /// What returned in a tenure, and how many of the last may be lost.
    tenures: BTreeMap<(DbName, u64), (Vec<u64>, u64)>,
    opened: Vec<Opened>,
}

impl Bounded {
    fn check_commit(&self, world: &World, commit: &Committed) -> Result<(), String> {
        let Promise::Bounded {
            ms, transactions, ..
        } = commit.promise
        else {
            return Ok(());
        };
        let Committed { db, node, .. } = commit;
        let log = &world.nodes[node].disk.dbs[db].log;
        let has = |id: &u64, i: usize| {
            let copy = world.nodes[id].disk.dbs.get(db);
            id == node || copy.is_some_and(|c| i < c.synced && c.log.get(i) == log.get(i))
        };
        let sets = world.nodes[node].raft.sets();
        // A voter whose disk was lost meanwhile may have had it.
        let is_lost = |id: &u64| !world.nodes.contains_key(id);
        let lacks = |i: &usize| {
            let voters = sets.iter().flatten().copied();
            let holders = voters.filter(|id| is_lost(id) || has(id, *i));
            !is_quorum(&sets, &holders.collect())
        };
        let lacking: Vec<usize> = (0..log.len()).rev().take_while(lacks).collect();
        if lacking.len() as u64 > transactions {
            return Err(format!(
                "{db} {} of {node} returned, and a majority lacks {} transactions instead of {transactions}",
                commit.id,
                lacking.len()
            ));
        }
        let ages = lacking
            .iter()
            .filter_map(|i| self.returned_at.get(&log[*i].id));
        // Clocks differ by some percent.
        let oldest = ages.min().map_or(0, |since| world.now - since);
        if oldest > ms * MS * 105 / 100 {
            return Err(format!(
                "{db} {} of {node} returned, and a majority lacks one that did so {oldest} us ago, more than {ms} ms",
                commit.id
            ));
        }
        Ok(())
    }

    fn check_loss(&self, world: &World, opened: &Opened) -> Result<(), String> {
        for ((db, epoch), (ids, most)) in &self.tenures {
            if *epoch >= opened.epoch {
                continue;
            }
            let has = |id: &u64| opened.dbs.get(db).is_some_and(|all| all.contains(id));
            let client = &world.client;
            let is_excused = |id: &u64| client.dropped.contains(id) || client.excused.contains(id);
            let is_gone = |id: &&u64| !has(id) && !is_excused(id);
            let gone = ids.iter().filter(is_gone).count() as u64;
            if gone > *most {
                return Err(format!(
                    "{} of {db} returned in {epoch}, and {} opened {} without {gone} of them instead of {most}",
                    ids.len(),
                    opened.node,
                    opened.epoch
                ));
            }
        }
        Ok(())
    }
}

impl Invariant for Bounded {
    fn check(&mut self, world: &World) -> Result<(), String> {
        for news in &world.client.news {
            match news {
                News::Committed(commit) => {
                    self.check_commit(world, commit)?;
                    self.returned_at.insert(commit.id, world.now);
                    if let Promise::Bounded {
                        epoch,
                        transactions,
                        ..
                    } = commit.promise
                    {
                        let key = (commit.db.clone(), epoch);
                        let (ids, most) = self.tenures.entry(key).or_default();
                        ids.push(commit.id);
                        *most = transactions;
                        let late: Vec<&Opened> =
                            self.opened.iter().filter(|o| o.epoch > epoch).collect();
                        for opened in late {
                            self.check_loss(world, opened)?;
                        }
                    }
                }
                News::Opened(opened) => {
                    self.check_loss(world, opened)?;
                    self.opened.push(opened.clone());
                }
                News::Replaced { .. } => {}
            }
        }
        Ok(())
    }
}
