//! Commits that return once a majority of the voters has them on disk.
//!
//! What holds:
//! - INV-QUORUM-1: which acknowledgements count (`decide::acks`);
//! - INV-QUORUM-3: while voters change, a commit is on a majority of the present ones and of those to come, and what was
//!   committed before is too before the change begins (`members`): the new ones may be the only ones asked later;
//! - INV-QUORUM-2: this node counts as one once its own log is on disk.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use consensus::{Cluster, Durability, NodeId, View};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::decide::acks::Acks;
use super::decide::epochs;
use crate::db::{CommitGate, Db, NodeContext};
use crate::ltx::Pos;
use crate::replication::replicas::AckListener;
use crate::replication::{Applied, DbName};

/// How long a program waits for its commit. It cannot be interrupted meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a commit that waits looks whether this node is still the primary.
const LOOK: Duration = Duration::from_millis(20);

/// Makes commits wait for a majority.
pub(super) struct Quorum {
    node: Arc<NodeContext>,
    cluster: Cluster,
    view: watch::Receiver<View>,
    acks: Mutex<Acks>,
    changed: Condvar,
    /// Voters there will be, while they change.
    coming: Mutex<Option<BTreeSet<NodeId>>>,
}

impl Quorum {
    pub(super) fn new(node: Arc<NodeContext>, cluster: Cluster) -> Arc<Quorum> {
        Arc::new(Quorum {
            node,
            view: cluster.watch(),
            cluster,
            acks: Mutex::default(),
            changed: Condvar::new(),
            coming: Mutex::default(),
        })
    }

    /// Has commits wait for a majority of these voters too (INV-QUORUM-3).
    pub(super) fn expect_voters(&self, voters: Option<BTreeSet<NodeId>>) {
        *self.coming.lock() = voters;
    }

    /// Learns that a node has all that a tenure began with.
    pub(super) fn accepted(&self, node: NodeId, epoch: u64) {
        self.acks.lock().accepted(node, epoch);
        self.changed.notify_all();
    }

    /// Returns whether a majority has a position; `here` whether this node is one of those.
    fn has(&self, acks: &mut Acks, epoch: u64, db: &DbName, pos: Pos, here: bool) -> bool {
        let here = here.then_some(self.node.node_id);
        let holders = acks.holders(epoch, db, pos, here);
        let coming = self.coming.lock();
        let of_coming = coming
            .as_ref()
            .map(|voters| holders.intersection(voters).count());
        let is_enough = of_coming.is_none_or(|n| n > coming.as_ref().map_or(0, BTreeSet::len) / 2);
        is_enough && self.view.borrow().is_quorum(&holders)
    }

    /// Returns whether a majority has what is in doubt by now.
    pub(super) fn has_by_now(&self, db: &Db, pos: Pos) -> bool {
        let epoch = self.node.epoch.load(Ordering::Acquire);
        let is_here = db.sync_log().is_ok();
        self.has(&mut self.acks.lock(), epoch, db.name(), pos, is_here)
    }
}

impl AckListener for Quorum {
    fn acked(&self, node_id: u64, epoch: u64, db: &DbName, applied: Applied) {
        let mut acks = self.acks.lock();
        acks.acked(node_id, epoch, db, applied.durable);
        drop(acks);
        self.changed.notify_all();
    }
}

impl CommitGate for Quorum {
    fn waits(&self, db: &DbName) -> bool {
        let view = self.view.borrow();
        matches!(view.state.durability_of(db.as_str()), Durability::Quorum)
    }

    fn wait(&self, db: &Db, pos: Pos) -> bool {
        let epoch = self.node.epoch.load(Ordering::Acquire);
        let deadline = Instant::now() + PATIENCE;
        // After it was logged: if this node was fenced before, it has said what it has, without this.
        let primary = self.node.is_primary().then_some(epoch);
        if !epochs::may_commit(epoch, primary) {
            return false;
        }
        // The others have it on its way already.
        let here = match db.sync_log() {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(db = %db.name(), error = crate::store::chain(&error), "this node does not count for a commit");
                false
            }
        };
        let mut acks = self.acks.lock();
        loop {
            // Never those of an older tenure of this node: they may be of a history that lost.
            if self.has(&mut acks, epoch, db.name(), pos, here) {
                return true;
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
