//! Commits that return once a majority of the voters has them on disk, or all but so many (`backlog`).
//!
//! What holds:
//! - INV-QUORUM-1: an acknowledgement counts only if it was given in the primary's own tenure, for bytes on disk, by a voter
//!   that had all this tenure began with (INV-TAKEOVER-1 rests on it);
//! - INV-QUORUM-2: this node counts as one once its own log is on disk;
//! - INV-QUORUM-3: as long as a node does not know the cluster's settings, commits wait.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use consensus::{Cluster, Durability, NodeId, View};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::backlog::Backlog;
use crate::db::{CommitGate, Db, NodeContext};
use crate::ltx::{Pos, Txid};
use crate::replication::replicas::AckListener;
use crate::replication::{Applied, DbName};

/// How long a program waits for its commit. It cannot be interrupted meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a commit that waits looks whether this node is still the primary.
const LOOK: Duration = Duration::from_millis(20);

/// Who has what.
#[derive(Debug, Default)]
struct Acks {
    /// Tenure of which the rest is.
    epoch: u64,
    /// Voters that had all that this tenure began with.
    accepted: BTreeSet<NodeId>,
    durable: HashMap<DbName, HashMap<NodeId, Txid>>,
    /// What no majority has yet, of databases with a bound.
    backlogs: HashMap<DbName, Backlog>,
}

impl Acks {
    fn of(&mut self, epoch: u64) -> Option<&mut Acks> {
        if epoch > self.epoch {
            *self = Acks {
                epoch,
                ..Acks::default()
            };
        }
        (epoch == self.epoch).then_some(self)
    }
}

/// Makes commits wait for a majority.
pub(super) struct Quorum {
    node: Arc<NodeContext>,
    cluster: Cluster,
    view: watch::Receiver<View>,
    acks: Mutex<Acks>,
    changed: Condvar,
    /// The cluster's settings have been known once.
    knows_settings: AtomicBool,
}

impl Quorum {
    pub(super) fn new(node: Arc<NodeContext>, cluster: Cluster) -> Arc<Quorum> {
        Arc::new(Quorum {
            node,
            view: cluster.watch(),
            cluster,
            acks: Mutex::default(),
            changed: Condvar::new(),
            knows_settings: AtomicBool::new(false),
        })
    }

    /// Learns that a node has all that a tenure began with.
    pub(super) fn accepted(&self, node: NodeId, epoch: u64) {
        if let Some(acks) = self.acks.lock().of(epoch) {
            acks.accepted.insert(node);
        }
        self.changed.notify_all();
    }

    /// Returns whether a majority has a position; `here` whether this node is one of those.
    fn has(&self, acks: &Acks, db: &DbName, pos: Pos, here: bool) -> bool {
        let mut nodes: BTreeSet<NodeId> = acks
            .durable
            .get(db)
            .into_iter()
            .flatten()
            .filter(|(node, txid)| **txid >= pos.txid && acks.accepted.contains(node))
            .map(|(node, _)| *node)
            .collect();
        if here {
            nodes.insert(self.node.node_id);
        }
        self.view.borrow().is_quorum(&nodes)
    }

    /// Returns whether what a majority lacks, with a commit at `pos`, is within a bound: milliseconds, and transactions.
    fn is_within(&self, acks: &mut Acks, db: &DbName, pos: Pos, bound: (u64, u64)) -> bool {
        let now = Instant::now();
        let mut backlog = acks.backlogs.remove(db).unwrap_or_default();
        backlog.add(pos.txid, now);
        backlog.settle(|txid| self.has(acks, db, Pos { txid, ..pos }, true));
        let is_within = backlog.is_within(bound.0, bound.1, now);
        acks.backlogs.insert(db.clone(), backlog);
        is_within
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
        let mut acks = self.acks.lock();
        acks.of(epoch)
            .is_some_and(|acks| self.has(acks, db.name(), pos, is_here))
    }
}

impl AckListener for Quorum {
    fn acked(&self, node_id: u64, epoch: u64, db: &DbName, applied: Applied) {
        {
            let mut acks = self.acks.lock();
            let Some(acks) = acks.of(epoch) else {
                return;
            };
            let of_db = acks.durable.entry(db.clone()).or_default();
            of_db.insert(node_id, applied.durable.txid);
        }
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
        let bound = match self.view.borrow().state.durability_of(db.name().as_str()) {
            Durability::Async => return true, // since a moment ago
            Durability::Bounded { ms, transactions } => Some((ms, transactions)),
            Durability::Quorum => None,
        };
        // The others have it on its way already. A bound is about what they have.
        let here = bound.is_some() || self.is_synced(db);
        let mut acks = self.acks.lock();
        loop {
            // Never those of an older tenure of this node: they may be of a history that lost.
            if let Some(acks) = acks.of(epoch) {
                let may_return = match bound {
                    None => self.has(acks, db.name(), pos, here),
                    Some(bound) => self.is_within(acks, db.name(), pos, bound),
                };
                if may_return {
                    return true;
                }
            }
            let holds = self
                .cluster
                .lease()
                .is_some_and(|lease| lease.epoch == epoch);
            if !holds || Instant::now() >= deadline {
                return false;
            }
            self.changed.wait_for(&mut acks, LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_acknowledged_in_another_tenure_does_not_count() {
        let mut acks = Acks::default();
        let db: DbName = "a.db".parse().unwrap();
        let first = acks.of(3).unwrap();
        first.accepted.insert(7);
        first
            .durable
            .entry(db.clone())
            .or_default()
            .insert(7, Txid(100));
        let later = acks.of(5).unwrap();
        assert!(later.accepted.is_empty() && later.durable.is_empty());
        assert!(
            acks.of(3).is_none(),
            "a late answer of a tenure that is over"
        );
    }
}
