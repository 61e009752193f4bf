//! What the winner of an election lacks, it fetches from nodes that are not primary: both sides of that.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch;

use super::ports::Ports;
use crate::ltx::{Pgno, Pos};
use crate::replication::{
    Applied, Batch, Changes, DatabaseFilter, DbName, DbPattern, Fetch, Milestone, PrimaryInfo,
    Sink, SinkError, SnapshotReader, SnapshotRequest, SnapshotStart, SnapshotWriter, Source,
    SourceError,
};

/// The store of a node that was fenced, as the winner may read it.
pub(super) struct Lent(pub(super) Arc<Ports>);

impl Source for Lent {
    fn cluster_id(&self) -> String {
        Source::cluster_id(&*self.0)
    }

    fn node_id(&self) -> u64 {
        Source::node_id(&*self.0)
    }

    /// On behalf of the newest tenure known: nobody else's receiver goes on with that.
    fn epoch(&self) -> Option<u64> {
        let seen = *self.0.seen_epoch.read();
        (seen > 0 && !self.0.node.is_primary()).then_some(seen)
    }

    fn databases(&self) -> Vec<(DbName, Pos)> {
        Source::databases(&*self.0)
    }

    fn changes(&self) -> Changes {
        self.0.changes()
    }

    fn read_after(&self, db: &DbName, after: Pos, max_bytes: usize) -> Result<Fetch, SourceError> {
        self.0.read_after(db, after, max_bytes)
    }

    fn open_snapshot(
        &self,
        db: &DbName,
        request: SnapshotRequest,
    ) -> Result<Box<dyn SnapshotReader>, SourceError> {
        self.0.open_snapshot(db, request)
    }

    fn now_ms(&self) -> i64 {
        self.0.now_ms()
    }
}

/// The store of the winner while it fetches some databases from one node, and nothing else.
pub(super) struct Borrowing {
    pub(super) ports: Arc<Ports>,
    pub(super) wanted: HashMap<DbName, Pos>,
    /// Told once the winner has had all that the node has.
    pub(super) is_all: watch::Sender<bool>,
}

impl Borrowing {
    fn check(&self, db: &DbName) -> Result<(), SinkError> {
        match self.wanted.contains_key(db) {
            true => Ok(()),
            false => Err(SinkError::Io {
                what: format!("{db} is not wanted from this node"),
                source: std::io::ErrorKind::Unsupported.into(),
            }),
        }
    }
}

impl Sink for Borrowing {
    fn cluster_id(&self) -> Option<String> {
        Sink::cluster_id(&*self.ports)
    }

    fn adopt_cluster_id(&self, id: &str) -> Result<(), SinkError> {
        self.ports.adopt_cluster_id(id)
    }

    fn node_id(&self) -> u64 {
        Sink::node_id(&*self.ports)
    }

    fn epoch(&self) -> u64 {
        Sink::epoch(&*self.ports)
    }

    fn observe_epoch(&self, epoch: u64) -> Result<(), SinkError> {
        self.ports.observe_epoch(epoch)
    }

    fn positions(&self) -> Vec<(DbName, Pos)> {
        self.ports.positions()
    }

    fn filter(&self) -> DatabaseFilter {
        let patterns = self.wanted.keys().filter_map(|db| db.as_str().parse().ok());
        DatabaseFilter::new(patterns.collect::<Vec<DbPattern>>())
    }

    fn apply(&self, db: &DbName, batch: Batch) -> Result<Applied, SinkError> {
        self.check(db)?;
        self.ports.apply(db, batch)
    }

    fn drop_db(&self, db: &DbName, sender_epoch: u64, at: Pos) -> Result<Applied, SinkError> {
        self.check(db)?;
        self.ports.drop_db(db, sender_epoch, at)
    }

    fn unknown_to_primary(&self, _db: &DbName) {}

    fn page_checksums(&self, db: &DbName) -> Result<Option<Vec<u64>>, SinkError> {
        self.ports.page_checksums(db)
    }

    fn resume_point(&self, db: &DbName) -> Option<(Pos, Pgno)> {
        self.ports.resume_point(db)
    }

    fn history(&self, db: &DbName, milestones: &[Milestone]) {
        self.ports.history(db, milestones);
    }

    fn begin_snapshot(
        &self,
        db: &DbName,
        snapshot: SnapshotStart,
    ) -> Result<Box<dyn SnapshotWriter>, SinkError> {
        self.check(db)?;
        self.ports.begin_snapshot(db, snapshot)
    }

    fn applied(&self, db: &DbName) -> Applied {
        self.ports.applied(db)
    }

    fn heartbeat(&self, _primary_ms: i64, caught_up: bool) {
        if caught_up {
            self.is_all.send_replace(true);
        }
    }

    fn connected(&self, _primary: &PrimaryInfo) {}

    fn disconnected(&self) {}
}
