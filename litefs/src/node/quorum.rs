//! Commits that return once a majority of the voters has them on disk, or all but so many (`decide::backlog`).
//!
//! What holds:
//! - INV-QUORUM-1: which acknowledgements count (`decide::acks`);
//! - INV-QUORUM-2: this node counts as one once its own log is on disk;
//! - INV-QUORUM-3: as long as a node does not know the cluster's settings, commits wait;
//! - INV-QUORUM-4: while voters change, a commit is on a majority of the present ones and of those to come, and what was
//!   committed before is too before the change begins (`members`): the new ones may be the only ones asked later.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use consensus::{Cluster, Durability, NodeId, View};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::decide::acks::Acks;
use super::decide::backlog::Backlog;
use super::decide::epochs;
use crate::db::{CommitGate, Db, NodeContext};
use crate::ltx::{Pos, Txid};
use crate::replication::replicas::AckListener;
use crate::replication::{Applied, DbName};

/// How long a program waits for its commit. It cannot be interrupted meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a commit that waits looks whether this node is still the primary.
const LOOK: Duration = Duration::from_millis(20);

/// Who has what, and what no majority has yet.
#[derive(Debug, Default)]
struct Known {
    acks: Acks,
    /// Tenure of the backlogs.
    epoch: u64,
    /// Of databases with a bound.
    backlogs: HashMap<DbName, Backlog>,
}

/// Makes commits wait for a majority.
pub(super) struct Quorum {
    node: Arc<NodeContext>,
    cluster: Cluster,
    view: watch::Receiver<View>,
    known: Mutex<Known>,
    changed: Condvar,
    /// The cluster's settings have been known once.
    knows_settings: AtomicBool,
    /// Times are counted from here.
    begin: Instant,
    /// Voters there will be, while they change.
    coming: Mutex<Option<BTreeSet<NodeId>>>,
}

impl Quorum {
    pub(super) fn new(node: Arc<NodeContext>, cluster: Cluster) -> Arc<Quorum> {
        Arc::new(Quorum {
            node,
            view: cluster.watch(),
            cluster,
            known: Mutex::default(),
            changed: Condvar::new(),
            knows_settings: AtomicBool::new(false),
            begin: Instant::now(),
            coming: Mutex::default(),
        })
    }

    /// Has commits wait for a majority of these voters too (INV-QUORUM-4).
    pub(super) fn expect_voters(&self, voters: Option<BTreeSet<NodeId>>) {
        *self.coming.lock() = voters;
    }

    /// Learns that a node has all that a tenure began with.
    pub(super) fn accepted(&self, node: NodeId, epoch: u64) {
        self.known.lock().acks.accepted(node, epoch);
        self.changed.notify_all();
    }

    /// Returns whether a majority has a transaction of the history in which positions are `is_ours`; `here` whether this node is
    /// one of those.
    fn has(
        &self,
        acks: &mut Acks,
        epoch: u64,
        db: &DbName,
        txid: Txid,
        is_ours: impl Fn(Pos) -> bool,
        here: bool,
    ) -> bool {
        let here = here.then_some(self.node.node_id);
        let holders = acks.holders(epoch, db, txid, is_ours, here);
        let coming = self.coming.lock();
        let of_coming = coming
            .as_ref()
            .map(|voters| holders.intersection(voters).count());
        let is_enough = of_coming.is_none_or(|n| n > coming.as_ref().map_or(0, BTreeSet::len) / 2);
        is_enough && self.view.borrow().is_quorum(&holders)
    }

    /// Returns whether what a majority lacks, with a commit at `pos`, is within a bound: milliseconds, and transactions.
    fn is_within(
        &self,
        known: &mut Known,
        epoch: u64,
        db: &DbName,
        pos: Pos,
        bound: (u64, u64),
    ) -> bool {
        let now = self.begin.elapsed();
        if known.epoch != epoch {
            known.epoch = epoch;
            known.backlogs.clear();
        }
        let backlog = known.backlogs.entry(db.clone()).or_default();
        backlog.add(pos, now);
        let acks = &mut known.acks;
        backlog.settle(|txid, is_ours| self.has(acks, epoch, db, txid, is_ours, true));
        backlog.is_within(bound.0, bound.1, now)
    }

    fn is_synced(&self, db: &Db) -> bool {
        let synced = db.sync_log();
        if let Err(error) = &synced {
            tracing::error!(db = %db.name(), error = crate::store::chain(error), "this node does not count for a commit");
        }
        synced.is_ok()
    }

    /// Returns whether a majority has what is in doubt by now.
    pub(super) fn has_by_now(&self, db: &Db, pos: Pos) -> bool {
        let epoch = self.node.epoch.load(Ordering::Acquire);
        let is_here = db.sync_log().is_ok();
        let acks = &mut self.known.lock().acks;
        self.has(acks, epoch, db.name(), pos.txid, |p| p == pos, is_here)
    }
}

impl AckListener for Quorum {
    fn acked(&self, node_id: u64, epoch: u64, db: &DbName, applied: Applied) {
        let mut known = self.known.lock();
        known.acks.acked(node_id, epoch, db, applied.durable);
        drop(known);
        self.changed.notify_all();
    }
}

impl CommitGate for Quorum {
    fn waits(&self, db: &DbName) -> bool {
        let view = self.view.borrow();
        if view.is_current {
            self.knows_settings.store(true, Ordering::Release);
        }
        // How a WAL is opened stays as long as it is open: who opens one before a node that starts knows of `quorum` must not
        // get one whose commits nobody can hold (INV-QUORUM-3).
        view.state.durability_of(db.as_str()) != Durability::Async
            || !self.knows_settings.load(Ordering::Acquire)
    }

    fn wait(&self, db: &Db, pos: Pos) -> bool {
        let epoch = self.node.epoch.load(Ordering::Acquire);
        let deadline = Instant::now() + PATIENCE;
        // After it was logged: if this node was fenced before, it has said what it has, without this.
        let primary = self.node.is_primary().then_some(epoch);
        if !epochs::may_commit(epoch, primary) {
            return false;
        }
        let bound = match self.view.borrow().state.durability_of(db.name().as_str()) {
            Durability::Async if self.knows_settings.load(Ordering::Acquire) => return true, // since a moment ago
            Durability::Async => None,
            Durability::Bounded { ms, transactions } => Some((ms, transactions)),
            Durability::Quorum => None,
        };
        // The others have it on its way already. A bound is about what they have.
        let here = bound.is_some() || self.is_synced(db);
        let mut known = self.known.lock();
        loop {
            // Never those of an older tenure of this node: they may be of a history that lost.
            let may_return = match bound {
                None => {
                    let acks = &mut known.acks;
                    self.has(acks, epoch, db.name(), pos.txid, |p| p == pos, here)
                }
                Some(bound) => self.is_within(&mut known, epoch, db.name(), pos, bound),
            };
            if may_return {
                return true;
            }
            let holds = self
                .cluster
                .lease()
                .is_some_and(|lease| lease.epoch == epoch);
            if !holds || Instant::now() >= deadline {
                return false;
            }
            self.changed.wait_for(&mut known, LOOK);
        }
    }
}
