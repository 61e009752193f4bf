//! Roles: the guard of the lease, taking writes from programs and giving them back, handoffs. As `roles` and `election`.

use super::mutants::{Mutant, is_on};
use super::plots::Moment;
use super::raft::Transfer;
use super::takeover::Answer;
use super::world::{Id, MS, Us, What, World};
use crate::ltx::Pos;
use crate::node::decide::epochs;
use crate::replication::DbName;

/// How long programs have to end their transactions for a handoff.
const HANDOFF_PATIENCE: Us = 1_000 * MS;
/// How long a handoff may take to bring the other node level.
const DRAIN: Us = 5_000 * MS;

/// Programs are losing the right to write.
#[derive(Debug)]
pub(crate) struct Demotion {
    until: Us,
    then: Then,
}

/// What a demotion was for.
#[derive(Debug, Clone)]
pub(crate) enum Then {
    Nothing,
    /// A node was fenced, and says what it has.
    Answer(Answer),
}

/// The role is being given to another node.
#[derive(Debug, Clone)]
pub(crate) struct Handoff {
    to: Id,
    epoch: u64,
    fence_until: Us,
    drain_until: Us,
}

impl World {
    pub(crate) fn is_primary_in(&self, id: Id, epoch: u64) -> bool {
        let process = &self.nodes[&id].process;
        process.is_primary && process.epoch == epoch
    }

    /// Returns the epoch in which a node may take writes.
    pub(crate) fn tenure(&self, id: Id) -> Option<u64> {
        let node = &self.nodes[&id];
        epochs::tenure(self.raft_lease(id), node.process.given_up, node.disk.seen)
    }

    /// Takes the right to write from programs; those in a transaction have some time to end it.
    pub(crate) fn demote(&mut self, id: Id, patience: Us, then: Then) {
        let process = self.process(id);
        if std::mem::replace(&mut process.is_primary, false) {
            let epoch = process.epoch;
            self.note(|| format!("{id} is no longer the primary of {epoch}"));
            self.moment(id, Moment::Demoted);
        }
        let (no, until) = (self.no(), self.now + patience);
        self.process(id)
            .demotions
            .insert(no, Demotion { until, then });
        self.demote_step(id, no);
    }

    pub(crate) fn demote_step(&mut self, id: Id, no: u64) {
        let is_left = self.fence_all(id);
        let Some(demotion) = self.nodes[&id].process.demotions.get(&no) else {
            return;
        };
        if is_left && self.now < demotion.until {
            self.after(id, 10 * MS..25 * MS, What::Demoting { no });
            return;
        }
        let process = self.process(id);
        let then = process.demotions.remove(&no).map(|d| d.then);
        process.unfenced = is_left;
        if is_left {
            self.count("a program writes on after a tenure");
        }
        if let Some(Then::Answer(answer)) = then {
            self.answer_fence(id, answer);
        }
    }

    /// Takes each database that nobody writes at the moment; says whether one is left.
    fn fence_all(&mut self, id: Id) -> bool {
        let names: Vec<DbName> = self.nodes[&id].disk.dbs.keys().cloned().collect();
        let mut is_left = false;
        for db in names {
            is_left |= !self.fence_db(id, &db);
        }
        is_left
    }

    fn fence_db(&mut self, id: Id, db: &DbName) -> bool {
        let epoch = self.nodes[&id].process.epoch;
        let Some(copy) = self.node(id).disk.dbs.get_mut(db) else {
            return true;
        };
        if copy.is_primary && copy.writer.is_some() {
            return false;
        }
        if copy.is_primary {
            copy.capture(epoch);
            copy.is_primary = false;
            copy.is_in_doubt = false;
        }
        true
    }

    /// Opens the databases to programs.
    pub(crate) fn promote_all(&mut self, id: Id) {
        for copy in self.node(id).disk.dbs.values_mut() {
            copy.is_primary = true;
        }
    }

    /// The thread that ends a tenure with its lease.
    pub(crate) fn guard(&mut self, id: Id) {
        let process = &self.nodes[&id].process;
        if !process.demotions.is_empty() {
            return;
        }
        let (is_primary, epoch) = (process.is_primary, process.epoch);
        let is_over = epochs::is_over(epoch, self.raft_lease(id), self.nodes[&id].disk.seen);
        if is_primary && is_over || process.unfenced && !is_primary {
            self.demote(id, 100 * MS, Then::Nothing);
        } else if is_primary && process.has_doubts {
            self.settle_doubts(id);
        }
    }

    /// Sees to commits that did not get their quorum in time.
    fn settle_doubts(&mut self, id: Id) {
        self.process(id).has_doubts = false;
        let in_doubt: Vec<(DbName, Pos)> = self.nodes[&id]
            .disk
            .dbs
            .iter()
            .filter(|(_, copy)| copy.is_primary && copy.is_in_doubt)
            .map(|(db, copy)| (db.clone(), copy.pos()))
            .collect();
        for (db, pos) in in_doubt {
            if self.fence_db(id, &db) {
                self.process(id).doubtful.push((db, pos));
            } else {
                self.process(id).has_doubts = true;
            }
        }
        let epoch = self.nodes[&id].process.epoch;
        let mut doubtful = std::mem::take(&mut self.process(id).doubtful);
        doubtful.retain(|(db, pos)| {
            if !self.is_primary_in(id, epoch) || self.nodes[&id].disk.dbs[db].pos() != *pos {
                return false;
            }
            let copy = self.node(id).disk.dbs.get_mut(db).expect("a database");
            copy.sync();
            let has = self.majority_has(id, epoch, db, pos.txid, |p| p == *pos, true);
            if self.tenure(id).is_none() || !has {
                return true;
            }
            self.count("a commit in doubt took place");
            let (db, doubt) = (db.clone(), Some(*pos));
            self.after(id, 0..200, What::Reopen { db, epoch, doubt });
            false
        });
        let process = self.process(id);
        process.has_doubts |= !doubtful.is_empty();
        process.doubtful = doubtful;
    }

    /// Gives a database back to its writers in a tenure that goes on.
    pub(crate) fn reopen(&mut self, id: Id, db: &DbName, epoch: u64, doubt: Option<Pos>) {
        let primary = self.reopens_in(id);
        if epochs::may_reopen(epoch, primary, self.tenure(id)) {
            if let Some(copy) = self.node(id).disk.dbs.get_mut(db) {
                copy.is_primary = true;
            }
            return;
        }
        if primary != Some(epoch) {
            return;
        }
        match doubt {
            // Its lease may come back.
            Some(pos) => {
                let process = self.process(id);
                process.doubtful.push((db.clone(), pos));
                process.has_doubts = true;
            }
            // It begins anew if it does.
            None => self.demote(id, 100 * MS, Then::Nothing),
        }
    }

    /// Returns the tenure that goes on, with the lock of a change of the role held.
    fn reopens_in(&self, id: Id) -> Option<u64> {
        let process = &self.nodes[&id].process;
        process.is_primary.then_some(process.epoch)
    }

    // Handoffs.

    pub(crate) fn hand_over(&mut self, id: Id, to: Id) {
        let process = &self.nodes[&id].process;
        if !process.is_primary
            || process.handoff.is_some()
            || !process.demotions.is_empty()
            || !self.nodes[&id].raft.voters().contains(&to)
        {
            return;
        }
        let handoff = Handoff {
            to,
            epoch: process.epoch,
            fence_until: self.now + HANDOFF_PATIENCE,
            drain_until: self.now + DRAIN,
        };
        self.note(|| format!("{id} hands over to {to}"));
        self.process(id).handoff = Some(handoff);
    }

    pub(crate) fn drive_handoff(&mut self, id: Id) {
        let Some(handoff) = self.nodes[&id].process.handoff.clone() else {
            return;
        };
        let Handoff { to, epoch, .. } = handoff;
        if !self.is_primary_in(id, epoch) {
            // Its tenure ended meanwhile; what another one opened is not to be closed.
            self.process(id).handoff = None;
            return;
        }
        if self.fence_all(id) {
            if self.now > handoff.fence_until {
                self.take_back(id, epoch);
            }
            return;
        }
        let node = &self.nodes[&id];
        let is_level = node.disk.dbs.iter().all(|(db, copy)| {
            copy.log.is_empty() || node.process.replicas.get(&(to, db.clone())) == Some(&copy.pos())
        });
        if !is_level {
            if self.now > handoff.drain_until {
                self.take_back(id, epoch);
            }
            return;
        }
        match self.give_up(id, epoch, to) {
            Transfer::Done => {
                self.count("handoffs");
                self.moment(id, Moment::HandedOver);
                self.process(id).handoff = None;
                self.demote(id, HANDOFF_PATIENCE, Then::Nothing);
            }
            Transfer::NotBegun | Transfer::Failed => self.take_back(id, epoch),
        }
    }

    /// Gives the lead away, and the role with it unless that does not even begin.
    pub(crate) fn give_up(&mut self, id: Id, epoch: u64, to: Id) -> Transfer {
        let process = self.process(id);
        let before = process.given_up;
        process.given_up = before.max(epoch);
        let transfer = self.raft_transfer(id, to);
        if transfer == Transfer::NotBegun && !is_on(Mutant::GivenUpForNothing) {
            self.count("a transfer does not begin");
            self.process(id).given_up = before;
        }
        transfer
    }

    /// Programs write again in a tenure that was not given away after all.
    fn take_back(&mut self, id: Id, epoch: u64) {
        self.process(id).handoff = None;
        let names: Vec<DbName> = self.nodes[&id].disk.dbs.keys().cloned().collect();
        for db in names {
            let doubt = None;
            self.after(id, 0..30 * MS, What::Reopen { db, epoch, doubt });
        }
    }

    // Acceptance.

    /// Notes, away from the stream, that this node has all that a tenure began with.
    pub(crate) fn accept_soon(&mut self, id: Id, epoch: u64) {
        let process = self.process(id);
        process.accepted_from = process.target;
        let node = &self.nodes[&id];
        if node.disk.accepted >= epoch {
            // After a restart: the primary may never have heard of it.
            if node.disk.accepted == epoch && !is_on(Mutant::ToldOnce) {
                self.process(id).acceptance = epoch;
            }
            return;
        }
        if std::mem::replace(&mut self.process(id).is_accepting, true) {
            return;
        }
        let slow = self.accepting_takes(id);
        self.moment(id, Moment::Accepting);
        self.after(id, 100..slow, What::AcceptSynced { epoch });
    }

    pub(crate) fn accept_synced(&mut self, id: Id, epoch: u64) {
        self.node(id).disk.sync_all();
        let slow = self.accepting_takes(id);
        self.moment(id, Moment::AcceptSynced);
        self.after(id, 100..slow, What::AcceptWritten { epoch });
    }

    fn accepting_takes(&mut self, id: Id) -> Us {
        let usual = if self.one_in(4) { 150 * MS } else { 5 * MS };
        usual.max(self.nodes[&id].slow_disk)
    }

    pub(crate) fn accept_written(&mut self, id: Id, epoch: u64) {
        let disk = &mut self.node(id).disk;
        let may = epochs::may_accept(epoch, disk.seen);
        if may {
            disk.accepted = disk.accepted.max(epoch);
            self.process(id).acceptance = epoch;
            self.moment(id, Moment::Accepted);
        } else {
            self.count("a tenure ends while it is being accepted");
        }
        self.process(id).is_accepting = false;
    }

    /// Tells the primary of the tenure that was accepted, until it has heard.
    pub(crate) fn tell_accepted(&mut self, id: Id) {
        let process = &self.nodes[&id].process;
        let raft = &self.nodes[&id].raft;
        let epoch = process.acceptance;
        let is_old = is_on(Mutant::ToldToTheOld);
        let leader = if is_old {
            process.accepted_from
        } else {
            raft.leader
        };
        let Some(leader) = leader.filter(|leader| *leader != id) else {
            return;
        };
        let is_over = raft.term > epoch && !is_old;
        if epoch == 0 || process.told >= epoch || is_over || self.now < process.tell_at {
            return;
        }
        let run = self.nodes[&id].run;
        self.process(id).tell_at = self.now + 50 * MS;
        let node = id;
        let message = super::world::Message::Accepted { epoch, node, run };
        self.send(id, leader, message);
    }
}
