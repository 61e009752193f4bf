//! Programs that commit, and what they were told. As the hooks of `volume`, `db::held` and `quorum`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::mutants::{Mutant, is_on};
use super::plots::Moment;
use super::raft::{Durability, is_quorum};
use super::store::{Disk, Tx};
use super::world::{Id, MS, Us, What, World};
use crate::ltx::{Pos, Txid};
use crate::node::decide::epochs;
use crate::replication::DbName;

/// How long a program waits for a quorum.
const PATIENCE: Us = 5_000 * MS;
/// How often it looks whether its node is still the primary.
const LOOK: Us = 20 * MS;

/// A commit of which a program was told that it took place.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    pub(crate) db: DbName,
    pub(crate) id: u64,
    pub(crate) node: Id,
    pub(crate) promise: Promise,
}

/// For whom a commit waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Promise {
    Nobody,
    /// In this tenure, for all but so many.
    Bounded {
        epoch: u64,
        ms: u64,
        transactions: u64,
    },
    /// In this tenure, for a majority.
    Quorum {
        epoch: u64,
    },
}

/// Writes were opened.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    pub(crate) node: Id,
    pub(crate) epoch: u64,
    pub(crate) dbs: BTreeMap<DbName, BTreeSet<u64>>,
}

/// What invariants are told of.
#[derive(Debug, Clone)]
pub(crate) enum News {
    Committed(Committed),
    Opened(Opened),
    /// Another history took the place of one.
    Replaced {
        node: Id,
        db: DbName,
        before: Vec<Tx>,
    },
}

/// A commit that waits for a quorum.
#[derive(Debug)]
struct Waiting {
    node: Id,
    db: DbName,
    id: u64,
    pos: Pos,
    epoch: u64,
    is_here: bool,
    bound: Option<(u64, u64)>,
    until: Us,
}

/// All programs.
#[derive(Debug, Default)]
pub(crate) struct Client {
    pub(crate) committed: Vec<Committed>,
    /// Lost with a disk, or with what was not synced.
    pub(crate) excused: BTreeSet<u64>,
    /// Went with a database that was removed.
    pub(crate) dropped: BTreeSet<u64>,
    pub(crate) news: Vec<News>,
    waiting: BTreeMap<u64, Waiting>,
}

impl Client {
    pub(crate) fn forget_node(&mut self, id: Id) {
        self.waiting.retain(|_, w| w.node != id);
    }

    pub(crate) fn opened(&mut self, node: Id, epoch: u64, disk: &Disk) {
        let ids = |log: &[Tx]| log.iter().map(|tx| tx.id).collect();
        let dbs = disk.dbs.iter().map(|(db, c)| (db.clone(), ids(&c.log)));
        let dbs = dbs.collect();
        self.news.push(News::Opened(Opened { node, epoch, dbs }));
    }

    pub(crate) fn replaced(&mut self, node: Id, db: &DbName, before: Vec<Tx>) {
        let db = db.clone();
        self.news.push(News::Replaced { node, db, before });
    }

    fn commit(&mut self, committed: Committed) {
        self.committed.push(committed.clone());
        self.news.push(News::Committed(committed));
    }
}

impl World {
    /// A program begins a write transaction, if SQLite's lock lets it.
    pub(crate) fn write(&mut self, id: Id, db: &DbName, lasts: Us) {
        let node = self.node(id);
        if !node.is_up || node.is_frozen {
            return;
        }
        if !node.disk.dbs.contains_key(db) {
            if node.is_paused || !node.process.is_primary || node.process.handoff.is_some() {
                return;
            }
            node.disk.dbs.entry(db.clone()).or_default().is_primary = true;
        }
        let writer = self.no();
        let copy = self.node(id).disk.dbs.get_mut(db).expect("a database");
        if !copy.is_primary || copy.writer.is_some() {
            return;
        }
        copy.writer = Some(writer);
        let db = db.clone();
        self.after(id, lasts..lasts + MS, What::WriteEnds { db, writer });
    }

    fn copy_of_writer(
        &mut self,
        id: Id,
        db: &DbName,
        writer: u64,
    ) -> Option<&mut super::store::Copy> {
        let copy = self.node(id).disk.dbs.get_mut(db)?;
        (copy.writer == Some(writer)).then_some(copy)
    }

    pub(crate) fn write_ends(&mut self, id: Id, db: &DbName, writer: u64) {
        let waits = self.nodes[&id].raft.waits(db);
        let Some(copy) = self.copy_of_writer(id, db, writer) else {
            return;
        };
        if waits {
            let db = db.clone();
            self.after(id, 0..200, What::Held { db, writer });
            return;
        }
        // The kernel writes it, and the daemon captures it later.
        let is_first = copy.log.is_empty() && copy.wal.is_empty();
        copy.writer = None;
        copy.wal.push(writer);
        let committed = Committed {
            db: db.clone(),
            id: writer,
            node: id,
            promise: Promise::Nobody,
        };
        self.client.commit(committed);
        if is_first {
            self.moment(id, Moment::Created);
        }
        let db = db.clone();
        self.after(id, 500..5 * MS, What::Capture { db });
    }

    pub(crate) fn capture(&mut self, id: Id, db: &DbName) {
        let epoch = self.nodes[&id].process.epoch;
        if let Some(copy) = self.node(id).disk.dbs.get_mut(db)
            && copy.is_primary
            && !copy.is_in_doubt
        {
            copy.capture(epoch);
        }
    }

    /// The write that makes a commit valid has come to the daemon.
    pub(crate) fn hold(&mut self, id: Id, db: &DbName, writer: u64) {
        let epoch = self.nodes[&id].process.epoch;
        let Some(copy) = self.copy_of_writer(id, db, writer) else {
            return;
        };
        if copy.is_in_doubt || !copy.is_primary {
            copy.writer = None;
            return;
        }
        copy.append(writer, epoch);
        let pos = copy.pos();
        let process = &self.nodes[&id].process;
        let primary = process.is_primary.then_some(process.epoch);
        if !epochs::may_commit(epoch, primary) {
            self.count("a commit comes after the fence");
            self.doubt(id, db);
            return;
        }
        let raft = &self.nodes[&id].raft;
        let bound = match raft.durability_of(db) {
            Durability::Async if raft.knows_settings() => {
                // Since a moment ago.
                self.returns(id, db, writer, Promise::Nobody);
                return;
            }
            Durability::Bounded { ms, transactions } => Some((ms, transactions)),
            Durability::Async | Durability::Quorum => None,
        };
        let waiting = Waiting {
            node: id,
            db: db.clone(),
            id: writer,
            pos,
            epoch,
            is_here: is_on(Mutant::OwnLogNotSynced) || bound.is_some(),
            bound,
            until: self.now + PATIENCE,
        };
        let no = self.no();
        self.client.waiting.insert(no, waiting);
        self.moment(id, Moment::Logged);
        if pos.txid.0 == 1 {
            self.moment(id, Moment::Created);
        }
        // Its own sync comes first; the others have it on its way already.
        let usual = if self.one_in(8) { 150 * MS } else { 3 * MS };
        let slow = usual.max(self.nodes[&id].slow_disk);
        self.after(id, 50..slow, What::Waits { no });
    }

    fn doubt(&mut self, id: Id, db: &DbName) {
        self.count("a commit in doubt");
        self.moment(id, Moment::InDoubt);
        if let Some(copy) = self.node(id).disk.dbs.get_mut(db) {
            copy.is_in_doubt = true;
            copy.writer = None;
        }
        self.process(id).has_doubts = true;
    }

    pub(crate) fn wait_for_others(&mut self, id: Id, no: u64) {
        let Some(w) = self.client.waiting.get(&no) else {
            return;
        };
        let (db, pos, epoch, is_here) = (w.db.clone(), w.pos, w.epoch, w.is_here);
        if !is_here {
            self.sync_own(id, no, &db);
        }
        let bound = self.client.waiting[&no].bound;
        let may_return = match bound {
            None => self.majority_has(id, epoch, &db, pos.txid, |p| p == pos, true),
            Some(bound) => self.is_within(id, epoch, &db, pos, bound),
        };
        if may_return {
            let w = self.client.waiting.remove(&no).expect("looked up before");
            let promise = match bound {
                None => Promise::Quorum { epoch },
                Some((ms, transactions)) => Promise::Bounded {
                    epoch,
                    ms,
                    transactions,
                },
            };
            self.returns(id, &db, w.id, promise);
            self.moment(id, Moment::Committed);
            if pos.txid.0 == 1 {
                self.moment(id, Moment::CreatedForGood);
            }
            return;
        }
        let until = self.client.waiting[&no].until;
        if self.raft_lease(id) != Some(epoch) || self.now >= until {
            self.client.waiting.remove(&no);
            self.doubt(id, &db);
            return;
        }
        // Acknowledgements wake it too.
        self.after(id, 500..LOOK / 4, What::Waits { no });
    }

    /// Whether what a majority lacks is within a bound.
    fn is_within(&mut self, id: Id, epoch: u64, db: &DbName, pos: Pos, bound: (u64, u64)) -> bool {
        let now = Duration::from_micros(self.clock(id));
        let (of, mut backlogs) = std::mem::take(&mut self.process(id).backlogs);
        if of != epoch {
            backlogs.clear();
        }
        let backlog = backlogs.entry(db.clone()).or_default();
        backlog.add(pos, now);
        backlog.settle(|txid, is_ours| self.majority_has(id, epoch, db, txid, is_ours, true));
        let is_within = backlog.is_within(bound.0, bound.1, now);
        self.process(id).backlogs = (epoch, backlogs);
        is_within || is_on(Mutant::BoundIgnored)
    }

    /// The program goes on.
    fn returns(&mut self, id: Id, db: &DbName, writer: u64, promise: Promise) {
        if let Some(copy) = self.copy_of_writer(id, db, writer) {
            copy.writer = None;
        }
        self.client.commit(Committed {
            db: db.clone(),
            id: writer,
            node: id,
            promise,
        });
    }

    /// A program removes a database.
    pub(crate) fn drop_db(&mut self, id: Id, db: &DbName) {
        let (epoch, no) = (self.nodes[&id].process.epoch, self.no());
        let node = self.node(id);
        if !node.is_up || node.is_paused {
            return;
        }
        let Some(copy) = node.disk.dbs.get_mut(db) else {
            return;
        };
        if !copy.is_primary || copy.writer.is_some() || copy.is_in_doubt || copy.is_dropped() {
            return;
        }
        copy.capture(epoch);
        if copy.log.is_empty() {
            return;
        }
        copy.append_drop(no, epoch);
        let ids: Vec<u64> = copy.log.iter().map(|tx| tx.id).collect();
        self.client.dropped.extend(ids);
        self.count("databases removed");
        self.note(|| format!("{db} is removed on {id}"));
    }

    /// What was logged is on disk here.
    fn sync_own(&mut self, id: Id, no: u64, db: &DbName) {
        if let Some(copy) = self.node(id).disk.dbs.get_mut(db) {
            copy.sync();
        }
        if let Some(w) = self.client.waiting.get_mut(&no) {
            w.is_here = true;
        }
    }

    pub(crate) fn majority_has(
        &mut self,
        id: Id,
        epoch: u64,
        db: &DbName,
        txid: Txid,
        is_ours: impl Fn(Pos) -> bool,
        is_here: bool,
    ) -> bool {
        let here = is_here.then_some(id);
        let holders = self
            .process(id)
            .acks
            .holders(epoch, db, txid, is_ours, here);
        let mut sets = self.nodes[&id].raft.sets();
        if let Some(change) = &self.nodes[&id].process.change
            && !is_on(Mutant::NoBarrier)
        {
            sets.push(change.goal.clone());
        }
        is_quorum(&sets, &holders)
    }
}
