//! A model of `consensus`: elections, leases and members, each in one step, with all that it promises and no more.

use std::collections::{BTreeMap, BTreeSet};

use super::plots::Moment;
use super::world::{Id, Us, World};
use crate::replication::DbName;

const HEARTBEAT: Us = 100_000;
const LEASE: Us = 540_000;
/// How long a voter keeps to a leader it heard.
const PROMISE: Us = 570_000;
/// What the fastest and the slowest campaign after a promise.
const PATIENCE: std::ops::Range<Us> = 110_000..570_000;

/// Voters: two sets while they change.
pub(crate) type Sets = Vec<BTreeSet<Id>>;

/// Whom commits of a database wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Durability {
    #[default]
    Async,
    Bounded {
        ms: u64,
        transactions: u64,
    },
    Quorum,
}

/// Something that was agreed on, or is being.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    term: u64,
    sets: Sets,
    setting: Option<(DbName, Durability)>,
}

/// What came of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    Done,
    /// Nothing has changed.
    NotBegun,
    /// The lease of this epoch is gone for good.
    Failed,
}

/// One node's part.
#[derive(Debug, Clone, Default)]
pub(crate) struct Raft {
    // Durable.
    pub(crate) term: u64,
    /// Who votes, as it changed: the last entry counts, committed or not. Settings count once they are committed.
    pub(crate) log: Vec<Entry>,
    committed: usize,
    applied: usize,
    settings: BTreeMap<DbName, Durability>,
    // Volatile.
    pub(crate) leader: Option<Id>,
    /// Whether all that is agreed on has been here once.
    knows_settings: bool,
    /// Whether a quorum has the first entry of its term.
    is_ready: bool,
    surrendered: u64,
    lease_from: Option<Us>,
    /// Until when it votes for nobody, by its clock.
    bound_until: Us,
}

/// Says whether these nodes are a majority of each set.
pub(crate) fn is_quorum(sets: &Sets, nodes: &BTreeSet<Id>) -> bool {
    !sets.is_empty()
        && sets
            .iter()
            .all(|set| set.intersection(nodes).count() > set.len() / 2)
}

impl Raft {
    pub(crate) fn sets(&self) -> Sets {
        self.log
            .last()
            .map(|entry| entry.sets.clone())
            .unwrap_or_default()
    }

    pub(crate) fn voters(&self) -> BTreeSet<Id> {
        self.sets().into_iter().flatten().collect()
    }

    /// Forgets what only the process knew.
    pub(crate) fn restart(&mut self, clock: Us) {
        *self = Raft {
            term: self.term,
            log: std::mem::take(&mut self.log),
            committed: self.applied,
            applied: self.applied,
            settings: std::mem::take(&mut self.settings),
            bound_until: clock + PROMISE,
            ..Raft::default()
        };
    }

    fn last(&self) -> (u64, usize) {
        (
            self.log.last().map_or(0, |entry| entry.term),
            self.log.len(),
        )
    }

    /// Goes by what is committed.
    fn apply(&mut self, committed: usize) {
        self.committed = self.committed.max(committed);
        let end = self.committed.min(self.log.len());
        for entry in self.log.get(self.applied..end).unwrap_or_default() {
            if let Some((db, durability)) = &entry.setting {
                self.settings.insert(db.clone(), *durability);
            }
        }
        self.applied = self.applied.max(end);
        self.knows_settings = true;
    }

    pub(crate) fn durability_of(&self, db: &DbName) -> Durability {
        self.settings.get(db).copied().unwrap_or_default()
    }

    pub(crate) fn knows_settings(&self) -> bool {
        self.knows_settings
    }

    /// Whether commits of a database may wait for others, as far as is known here.
    pub(crate) fn waits(&self, db: &DbName) -> bool {
        self.durability_of(db) != Durability::Async || !self.knows_settings
    }
}

impl World {
    /// Returns the epoch in which a node holds a lease, by its own clock.
    pub(crate) fn raft_lease(&self, id: Id) -> Option<u64> {
        let node = &self.nodes[&id];
        let raft = &node.raft;
        let leads = node.is_up && raft.leader == Some(id) && raft.is_ready;
        let from = raft.lease_from?;
        let is_current = self.clock(id) < from + LEASE && raft.surrendered < raft.term;
        (leads && is_current).then_some(raft.term)
    }

    /// Makes the first cluster.
    pub(crate) fn raft_form(&mut self, ids: &BTreeSet<Id>, dbs: &[(DbName, Durability)]) {
        let entry = |setting: Option<(DbName, Durability)>| Entry {
            term: 1,
            sets: vec![ids.clone()],
            setting,
        };
        for id in ids {
            let raft = &mut self.node(*id).raft;
            raft.log = vec![entry(None)];
            raft.log
                .extend(dbs.iter().cloned().map(|db| entry(Some(db))));
            raft.term = 1;
        }
    }

    /// What a node does on its own, every few milliseconds.
    pub(crate) fn raft_tick(&mut self, id: Id) {
        let clock = self.clock(id);
        if self.nodes[&id].raft.leader == Some(id) {
            if clock >= self.nodes[&id].raft_due {
                self.heartbeat(id);
                self.node(id).raft_due = clock + HEARTBEAT;
            }
            return;
        }
        let due = self.nodes[&id].raft.bound_until + self.nodes[&id].raft_patience;
        if clock >= due {
            self.node(id).raft_patience = self.random(PATIENCE);
            self.node(id).raft.bound_until = clock.max(self.nodes[&id].raft.bound_until);
            self.campaign(id, false);
        }
    }

    fn heartbeat(&mut self, id: Id) {
        let sent_at = self.clock(id);
        let term = self.nodes[&id].raft.term;
        let (log, committed) = (
            self.nodes[&id].raft.log.clone(),
            self.nodes[&id].raft.committed,
        );
        // Who gave its lead away and still has it sends what it has, and no heartbeats.
        let is_silent = self.nodes[&id].raft.surrendered == term;
        let mut acked = BTreeSet::from([id]);
        let others: Vec<Id> = self.nodes.keys().copied().filter(|o| *o != id).collect();
        for other in others {
            if !self.comes_through(id, other) {
                continue;
            }
            let clock = self.clock(other);
            let raft = &mut self.node(other).raft;
            if raft.term <= term {
                if raft.term < term || raft.leader != Some(id) {
                    raft.is_ready = false;
                    raft.lease_from = None;
                }
                raft.term = term;
                raft.leader = Some(id);
                if !is_silent {
                    raft.bound_until = raft.bound_until.max(clock + PROMISE);
                }
                raft.log.clone_from(&log);
                raft.apply(committed);
            }
            let theirs = self.nodes[&other].raft.term;
            if !self.comes_through(other, id) {
                continue;
            }
            if theirs > term {
                self.step_down(id, theirs);
                return;
            }
            acked.insert(other);
        }
        let raft = &mut self.node(id).raft;
        let sets = raft.sets();
        if is_quorum(&sets, &acked) {
            raft.is_ready = true;
            raft.lease_from = Some(sent_at);
            let committed = raft.log.len();
            raft.apply(committed);
            // All it has is committed: the second half of a change follows.
            if let [_, new] = sets.as_slice() {
                let sets = vec![new.clone()];
                raft.log.push(Entry {
                    term,
                    sets,
                    setting: None,
                });
            } else {
                self.node(id).is_changing_members = false;
            }
        }
    }

    fn step_down(&mut self, id: Id, term: u64) {
        let clock = self.clock(id);
        let raft = &mut self.node(id).raft;
        raft.term = raft.term.max(term);
        raft.leader = None;
        raft.is_ready = false;
        raft.lease_from = None;
        raft.bound_until = raft.bound_until.max(clock);
    }

    /// Asks all for their votes; a transfer lets them break their promises.
    fn campaign(&mut self, id: Id, is_transfer: bool) -> bool {
        let raft = &self.nodes[&id].raft;
        if !raft.voters().contains(&id) {
            return false;
        }
        let (term, last, sets) = (raft.term + 1, raft.last(), raft.sets());
        let mut votes = BTreeSet::from([id]);
        let mut newest = term - 1;
        for other in raft.voters() {
            let Some(voter) = self.nodes.get(&other).filter(|_| other != id) else {
                continue;
            };
            if self.can_reach(id, other) && self.can_reach(other, id) {
                newest = newest.max(voter.raft.term);
            }
            let is_free = is_transfer || self.clock(other) >= voter.raft.bound_until;
            if is_free
                && !voter.raft.log.is_empty()
                && voter.raft.term < term
                && voter.raft.last() <= last
                && self.comes_through(id, other)
                && self.comes_through(other, id)
            {
                votes.insert(other);
            }
        }
        if !is_quorum(&sets, &votes) {
            // It learns of a newer term, and asks again.
            self.node(id).raft.term = newest;
            return false;
        }
        for voter in votes {
            self.step_down(voter, term);
        }
        self.note(|| format!("{id} is elected in {term}"));
        self.moment(id, Moment::Elected);
        let due = self.clock(id);
        let node = self.node(id);
        node.raft.leader = Some(id);
        node.raft.log.push(Entry {
            term,
            sets,
            setting: None,
        });
        node.raft_due = due;
        true
    }

    /// Hands the lead over.
    pub(crate) fn raft_transfer(&mut self, id: Id, to: Id) -> Transfer {
        // The other may not have the log.
        if self.nodes[&id].raft.leader != Some(id) || self.one_in(5) {
            return Transfer::NotBegun;
        }
        let raft = &mut self.node(id).raft;
        raft.surrendered = raft.term;
        let (term, log) = (raft.term, raft.log.clone());
        if !self.comes_through(id, to) || self.nodes[&to].raft.term > term {
            return Transfer::Failed;
        }
        let raft = &mut self.node(to).raft;
        raft.term = term;
        raft.log = log;
        match self.campaign(to, true) {
            true => Transfer::Done,
            false => Transfer::Failed,
        }
    }

    /// Begins to change who votes; says whether it could.
    pub(crate) fn raft_change(&mut self, id: Id, new: BTreeSet<Id>) -> bool {
        if self.raft_lease(id).is_none() || self.nodes[&id].is_changing_members {
            return false;
        }
        let raft = &mut self.node(id).raft;
        let term = raft.term;
        let [now] = raft.sets().try_into().unwrap_or_default();
        if now == new || now.is_empty() {
            return false;
        }
        raft.log.push(Entry {
            term,
            sets: vec![now, new.clone()],
            setting: None,
        });
        self.node(id).is_changing_members = true;
        self.note(|| format!("{id} makes {new:?} the voters"));
        true
    }

    /// Begins to agree on whom commits of a database wait for.
    pub(crate) fn raft_set(&mut self, id: Id, db: &DbName, durability: Durability) {
        if self.raft_lease(id).is_none() {
            return;
        }
        self.note(|| format!("{id} sets {db} to {durability:?}"));
        self.count("changes of the durability");
        let raft = &mut self.node(id).raft;
        let (term, sets) = (raft.term, raft.sets());
        raft.log.push(Entry {
            term,
            sets,
            setting: Some((db.clone(), durability)),
        });
    }
}
