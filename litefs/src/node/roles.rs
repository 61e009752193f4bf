//! The node becomes primary and replica while it runs: all databases with it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use parking_lot::Mutex;

use super::data_dir::DataDir;
use super::decide::epochs;
use super::ports::Ports;
use crate::db::{Db, DbError};
use crate::store::chain;
use crate::watch::Watcher;

/// How long one try to fence a database may take while others wait for their turn.
const FENCE_TRY: Duration = Duration::from_millis(20);

/// Changes the role of this node. One at a time does.
pub(super) struct Roles {
    pub(super) ports: Arc<Ports>,
    pub(super) data_dir: DataDir,
    pub(super) watcher: Arc<Watcher>,
    pub(super) changing: Mutex<()>,
}

impl Roles {
    /// Opens the databases for writing in an epoch, if `tenure`, which is told the highest epoch seen, still says at the last
    /// moment that this is the node's. Blocks on the disk.
    ///
    /// # Errors
    /// Disk. Databases that cannot be opened stay a replica's, which is logged.
    pub(super) fn promote(
        &self,
        epoch: u64,
        tenure: impl Fn(u64) -> Option<u64>,
    ) -> anyhow::Result<bool> {
        let _changing = self.changing.lock();
        let node = &self.ports.node;
        self.data_dir.set_was_primary(true)?;
        node.was_primary.store(true, Ordering::Release);
        self.ports
            .accept_epoch(epoch)
            .context("note that this tenure begins here")?;
        if !self.ports.store.has_broken() {
            self.data_dir.files_are_compared(true)?;
        }
        let seen = self.ports.seen_epoch.read();
        if !epochs::may_open(epoch, *seen, tenure(*seen)) {
            drop(seen);
            self.say_replica()?;
            return Ok(false);
        }
        node.epoch.store(epoch, Ordering::Release);
        node.is_primary.store(true, Ordering::Release);
        for db in self.ports.store.all() {
            if let Err(error) = db.promote() {
                tracing::error!(db = %db.name(), error = chain(&error), "database stays read-only");
                continue;
            }
            self.watcher.written_at(&db.paths().relative);
        }
        drop(seen);
        self.ports.lag.set_primary(None);
        node.invalidate_name(".primary".as_ref());
        self.ports.change_role(|role| {
            (role.is_primary, role.followed, role.epoch) = (true, None, epoch);
        });
        self.ports.ready.send_replace(true);
        tracing::info!(epoch, "this node is the primary");
        Ok(true)
    }

    /// Gives databases back to their writers, in a tenure that goes on: not if it ended meanwhile, and the databases were
    /// taken from them for good. Returns whether it goes on.
    ///
    /// # Errors
    /// What kept a database from being opened.
    pub(super) fn reopen<'a>(
        &self,
        epoch: u64,
        tenure: impl Fn() -> Option<u64>,
        dbs: impl IntoIterator<Item = &'a Arc<Db>>,
    ) -> Result<bool, DbError> {
        let _changing = self.changing.lock();
        let node = &self.ports.node;
        let primary = node
            .is_primary()
            .then(|| node.epoch.load(Ordering::Acquire));
        if !epochs::may_reopen(epoch, primary, tenure()) {
            return Ok(false);
        }
        for db in dbs {
            db.promote()?;
            self.watcher.written_at(&db.paths().relative);
        }
        Ok(true)
    }

    /// Takes the right to write from all programs; those in a write transaction have `patience` to end it. Returns the
    /// databases that are still written: try those again. Blocks.
    pub(super) fn demote(&self, patience: Duration) -> Vec<Arc<Db>> {
        let _changing = self.changing.lock();
        let node = &self.ports.node;
        let was_primary = node.is_primary.swap(false, Ordering::AcqRel);
        let deadline = Instant::now() + patience;
        let mut left: Vec<Arc<Db>> = self.ports.store.all();
        let mut failed: Vec<(Arc<Db>, DbError)> = Vec::new();
        loop {
            failed.clear();
            left.retain(|db| match db.fence(FENCE_TRY) {
                Ok(()) => false,
                Err(DbError::Locked { .. }) => true,
                Err(error) => {
                    failed.push((db.clone(), error));
                    true
                }
            });
            if left.is_empty() || Instant::now() >= deadline {
                break;
            }
            if !failed.is_empty() {
                std::thread::sleep(FENCE_TRY);
            }
        }
        for (db, error) in failed {
            tracing::error!(db = %db.name(), error = chain(&error), "cannot take a database from its writers, will try again");
        }
        if was_primary {
            self.ports.change_role(|role| role.is_primary = false);
            node.invalidate_name(".primary".as_ref());
            tracing::info!(
                epoch = node.epoch.load(Ordering::Acquire),
                "this node is no longer the primary"
            );
        }
        if let Err(error) = self.say_replica() {
            tracing::error!(
                error = format!("{error:#}"),
                "note that this node is a replica"
            );
        }
        left
    }

    /// Returns whether a change of the role is under way. Nothing of another primary may be applied before it is written
    /// down that this node is a replica: a start would take the files for newer than the log.
    pub(super) fn is_changing(&self) -> bool {
        self.changing.try_lock().is_none()
    }

    /// From now on a transaction is in the log before it is in the files: should this node die, the log is right.
    fn say_replica(&self) -> anyhow::Result<()> {
        if self.ports.store.has_broken() {
            return Ok(());
        }
        self.data_dir.files_are_compared(false)
    }
}
