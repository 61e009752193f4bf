//! Who votes: nodes come in once they are level, machines with an empty disk in the place of the node they were. As `members`.

use std::collections::{BTreeMap, BTreeSet};

use super::mutants::{Mutant, is_on};
use super::plots::Moment;
use super::raft::is_quorum;
use super::world::{Id, MACHINE, World};
use crate::ltx::Txid;
use crate::node::decide::members;
use crate::replication::DbName;

/// A change of the voters on its way.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) goal: BTreeSet<Id>,
    epoch: u64,
    /// What the new voters must have on disk.
    floor: BTreeMap<DbName, Txid>,
    is_begun: bool,
}

impl World {
    /// Makes voters of nodes that are level, and goes on with a change that was begun.
    pub(crate) fn take_in(&mut self, id: Id) {
        let process = &self.nodes[&id].process;
        if !process.is_primary {
            self.process(id).change = None;
            return;
        }
        if process.change.is_some() {
            self.go_on_with_change(id);
            return;
        }
        let epoch = process.epoch;
        let voters = self.nodes[&id].raft.voters();
        let newcomer = self.ids().into_iter().find(|other| {
            !voters.contains(other)
                && self.can_reach(id, *other)
                && self.can_reach(*other, id)
                && self.nodes[other].disk.accepted == epoch
        });
        if let Some(newcomer) = newcomer {
            let replaces = |v: &Id| v % MACHINE == newcomer % MACHINE && *v != id;
            let mut goal: BTreeSet<Id> = voters.into_iter().filter(|v| !replaces(v)).collect();
            goal.insert(newcomer);
            self.begin_change(id, goal);
        }
    }

    pub(crate) fn begin_change(&mut self, id: Id, goal: BTreeSet<Id>) {
        let process = &self.nodes[&id].process;
        if !process.is_primary || process.change.is_some() {
            return;
        }
        let epoch = process.epoch;
        let floor = self.txids(id);
        self.process(id).change = Some(Change {
            goal,
            epoch,
            floor,
            is_begun: false,
        });
        self.go_on_with_change(id);
    }

    fn txids(&self, id: Id) -> BTreeMap<DbName, Txid> {
        let dbs = &self.nodes[&id].disk.dbs;
        let ends = dbs.iter().map(|(db, copy)| (db.clone(), copy.pos().txid));
        ends.filter(|(_, txid)| txid.0 > 0).collect()
    }

    fn go_on_with_change(&mut self, id: Id) {
        let Some(change) = self.nodes[&id].process.change.clone() else {
            return;
        };
        if change.epoch != self.nodes[&id].process.epoch
            || self.raft_lease(id) != Some(change.epoch)
        {
            self.process(id).change = None;
            return;
        }
        if change.is_begun {
            if !self.nodes[&id].is_changing_members {
                self.count("changes of the voters");
                self.process(id).change = None;
            }
            return;
        }
        let mut level = BTreeSet::new();
        for other in &change.goal {
            if *other != id && !(self.can_reach(id, *other) && self.can_reach(*other, id)) {
                continue;
            }
            // Asked as a winner asks, but it syncs before it answers.
            self.node(*other).disk.sync_all();
            if members::is_level(&self.report(*other), change.epoch, &change.floor) {
                level.insert(*other);
            }
        }
        let goal = change.goal.clone();
        if is_quorum(&vec![goal.clone()], &level) || is_on(Mutant::NoBarrier) {
            let is_begun = self.raft_change(id, goal);
            self.moment(id, Moment::ChangesVoters);
            self.process(id).change = is_begun.then_some(Change { is_begun, ..change });
        } else if self.one_in(100) {
            self.process(id).change = None;
        }
    }
}
