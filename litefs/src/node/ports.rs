//! The store as replication sees it: what a primary sends and what a replica takes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use tokio::sync::watch;

use super::data_dir::DataDir;
use super::decide::epochs;
use super::decide::history::{self, Lead};
use crate::db::log::{Error as LogError, ReadAfter};
use crate::db::paths::with_suffix;
use crate::db::{Db, DbError, NodeContext, PageCopyReader, PageCopyWriter, record_from_log};
use crate::lag::Lag;
use crate::ltx::{PageSize, Pgno, Pos};
use crate::replication::{
    Applied, Batch, Changes, DatabaseFilter, DbName, Fetch, Milestone, PrimaryInfo, Record, Sink,
    SinkError, SnapshotReader, SnapshotRequest, SnapshotStart, SnapshotWriter, Source, SourceError,
};
use crate::store::{Store, chain};

/// The store of this node behind both ports.
pub(super) struct Ports {
    pub(super) this: Weak<Ports>,
    pub(super) node: Arc<NodeContext>,
    pub(super) store: Arc<Store>,
    pub(super) lag: Arc<Lag>,
    pub(super) data_dir: DataDir,
    pub(super) cluster_id: Mutex<Option<String>>,
    /// Highest epoch seen. Whoever takes something from a primary holds it for reading until that is done, so that nothing
    /// of an older tenure comes in once a higher one is seen.
    pub(super) seen_epoch: RwLock<u64>,
    /// Tenure of the primary that is followed.
    pub(super) followed_epoch: AtomicU64,
    /// Newest tenure of which this node has, on disk, all that its primary began with.
    pub(super) accepted_epoch: Arc<AtomicU64>,
    pub(super) is_accepting: Arc<AtomicBool>,
    /// Tells of each tenure that is accepted.
    pub(super) acceptance: watch::Sender<u64>,
    /// Databases to follow.
    pub(super) filter: DatabaseFilter,
    /// Where the primary's histories have been, as it said before the page copies that are to come.
    pub(super) histories: Mutex<HashMap<DbName, Vec<Milestone>>>,
    /// Page copies that were broken off.
    pub(super) paused: Mutex<HashMap<DbName, PageCopyWriter>>,
    /// There is a database that the primary has not heard of.
    pub(super) has_own: AtomicBool,
    /// Whether the node has had everything its primary had, once.
    pub(super) ready: watch::Sender<bool>,
    pub(super) is_connected: AtomicBool,
    /// Who is primary, for those who want to be told.
    pub(super) role: watch::Sender<RoleNow>,
    /// How often this node became primary, or ceased to be.
    pub(super) role_changes: AtomicU64,
}

/// Who is primary, as this node knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RoleNow {
    pub(super) is_primary: bool,
    /// Host name of another node that is followed.
    pub(super) followed: Option<String>,
    /// Newest tenure heard of.
    pub(super) epoch: u64,
}

impl Ports {
    /// Tells of a change.
    pub(super) fn change_role(&self, change: impl FnOnce(&mut RoleNow)) {
        self.role.send_if_modified(|role| {
            let before = role.clone();
            change(role);
            if before.is_primary != role.is_primary {
                self.role_changes.fetch_add(1, Ordering::Relaxed);
            }
            before != *role
        });
    }

    /// Returns the databases whose commits should wait and do not: programs opened their WALs before that was decided, and
    /// have kept them open since.
    pub(super) fn unheld(&self) -> Vec<String> {
        let is_unheld = |db: &Arc<Db>| {
            let wal = with_suffix(std::path::Path::new(db.name().as_str()), "-wal");
            self.node.gate_of(db.name()).is_some() && self.node.is_passed_through(&wal)
        };
        let unheld = self.store.all().into_iter().filter(is_unheld);
        unheld.map(|db| db.name().to_string()).collect()
    }

    /// Says so in the log.
    pub(super) fn warn_of_unheld(&self) {
        let unheld = self.unheld();
        if !unheld.is_empty() {
            tracing::warn!(
                databases = unheld.join(", "),
                "commits of programs that had these open before do not wait for other nodes: restart those programs, or have them open \
                 the databases again, all of them"
            );
        }
    }

    fn db(&self, name: &DbName) -> Result<Arc<Db>, SinkError> {
        self.store
            .get_or_create(name)
            .map_err(|e| sink_error(name, e))
    }

    fn check_epoch(&self, sent: u64) -> Result<RwLockReadGuard<'_, u64>, SinkError> {
        let seen = self.seen_epoch.read();
        match epochs::may_take(sent, *seen) {
            true => Ok(seen),
            false => Err(SinkError::StaleEpoch { sent, seen: *seen }),
        }
    }

    /// Notes on disk that this node has all that the primary of a tenure began with, unless it has seen a newer one.
    ///
    /// # Errors
    /// Disk.
    pub(super) fn accept_epoch(&self, epoch: u64) -> anyhow::Result<bool> {
        for db in self.store.all() {
            db.sync_log()?;
        }
        // Held until it is written: who is fenced says what it has accepted, and must not add to that.
        let seen = self.seen_epoch.read();
        if !epochs::may_accept(epoch, *seen) {
            return Ok(false);
        }
        self.data_dir.set_accepted_epoch(epoch)?;
        self.accepted_epoch.fetch_max(epoch, Ordering::AcqRel);
        Ok(true)
    }

    /// Does so once, away from the stream, which waits for no disk.
    fn accept_soon(&self, epoch: u64) {
        let accepted = self.accepted_epoch.load(Ordering::Acquire);
        if accepted == epoch {
            // Before a restart, perhaps, and the primary has not heard of it.
            self.tell_accepted(epoch);
        }
        if accepted >= epoch || self.is_accepting.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = self.this.clone();
        tokio::task::spawn_blocking(move || {
            let Some(this) = this.upgrade() else { return };
            match this.accept_epoch(epoch) {
                Ok(true) => this.tell_accepted(epoch),
                Ok(false) => {}
                Err(error) => {
                    let error = format!("{error:#}");
                    tracing::warn!(epoch, error, "note that this node is level");
                }
            }
            this.is_accepting.store(false, Ordering::Release);
        });
    }

    fn tell_accepted(&self, epoch: u64) {
        self.acceptance
            .send_if_modified(|told| std::mem::replace(told, epoch) != epoch);
    }
}

fn source_error(db: &DbName, error: DbError) -> SourceError {
    match error {
        DbError::Io { what, path, source } => SourceError::Io {
            what: format!("{db}: {what} {}", path.display()),
            source,
        },
        other => SourceError::Corrupt(format!("{db}: {}", chain(&other))),
    }
}

fn sink_error(db: &DbName, error: DbError) -> SinkError {
    match error {
        DbError::PosMismatch { have, want } => SinkError::PosMismatch { have, want },
        DbError::Ltx { .. } | DbError::Corrupt { .. } => {
            SinkError::Invalid(format!("{db}: {}", chain(&error)))
        }
        DbError::Io { what, path, source } => SinkError::Io {
            what: format!("{db}: {what} {}", path.display()),
            source,
        },
        DbError::Log {
            source: LogError::Io { step, path, source },
            ..
        } => SinkError::Io {
            what: format!("{db}: {step} {}", path.display()),
            source,
        },
        other => {
            let source = std::io::Error::from_raw_os_error(other.errno());
            SinkError::Io {
                what: format!("{db}: {}", chain(&other)),
                source,
            }
        }
    }
}

impl Source for Ports {
    fn cluster_id(&self) -> String {
        self.cluster_id.lock().clone().unwrap_or_default()
    }

    fn node_id(&self) -> u64 {
        self.node.node_id
    }

    fn epoch(&self) -> Option<u64> {
        self.node
            .is_primary()
            .then(|| self.node.epoch.load(Ordering::Acquire))
    }

    fn databases(&self) -> Vec<(DbName, Pos)> {
        self.positions()
    }

    fn changes(&self) -> Changes {
        self.node.hub.subscribe()
    }

    fn read_after(
        &self,
        name: &DbName,
        after: Pos,
        max_bytes: usize,
    ) -> Result<Fetch, SourceError> {
        let Some(db) = self.store.get(name.as_str()) else {
            return Ok(Fetch::Unknown);
        };
        let end = db.log().end_pos();
        if end.txid.0 == 0 {
            return Ok(Fetch::Unknown);
        }
        let lead = history::lead(after, end);
        if lead == Lead::Level {
            return Ok(Fetch::UpToDate);
        }
        if db.published().page_count == 0 && db.pos() == end {
            return Ok(Fetch::Dropped { at: end });
        }
        let snapshot = |why: String| Ok(Fetch::NeedSnapshot { why });
        if lead == Lead::Copy {
            return snapshot(format!(
                "replica is at {after}, which is not in the history that ends at {end}"
            ));
        }
        let read = db.log().read_after(after.txid, max_bytes);
        match read.map_err(|e| SourceError::Corrupt(format!("{name}: {}", chain(&e))))? {
            ReadAfter::Records(records) => {
                let Some(first) = records.first() else {
                    return Ok(Fetch::UpToDate);
                };
                if !history::joins(after, first.meta.pre_apply_pos()) {
                    return snapshot(format!(
                        "replica is at {after}, which is not in this history"
                    ));
                }
                // A compacted range does not say of which tenure it is; that of the last is known all the same.
                let last = db.log().end().filter(|last| last.max_txid == end.txid);
                let records = records
                    .into_iter()
                    .map(|mut r| {
                        if let Some(last) = last.filter(|last| last.max_txid == r.meta.max_txid) {
                            r.meta.epoch = r.meta.epoch.max(last.epoch);
                        }
                        Record {
                            meta: record_from_log(&r.meta),
                            ltx: r.ltx,
                        }
                    })
                    .collect();
                Ok(Fetch::Records(records))
            }
            ReadAfter::CaughtUp => Ok(Fetch::UpToDate),
            ReadAfter::NotAvailable { base } => {
                snapshot(format!("replica is at {after}, the log begins at {base}"))
            }
        }
    }

    fn open_snapshot(
        &self,
        name: &DbName,
        request: SnapshotRequest,
    ) -> Result<Box<dyn SnapshotReader>, SourceError> {
        let db = self
            .store
            .get(name.as_str())
            .ok_or_else(|| SourceError::NotFound(name.clone()))?;
        let have = request.have.unwrap_or_default();
        let reader = PageCopyReader::open(db, have, request.resume_at, request.replica_at)
            .map_err(|e| source_error(name, e))?;
        Ok(Box::new(Reader {
            name: name.clone(),
            reader,
            first_pass: true,
        }))
    }

    fn wants_durable_acks(&self, db: &DbName) -> bool {
        // What is in doubt is so until a quorum has it on disk, whatever commits are to wait for by then.
        self.node.gate_of(db).is_some() || self.node.has_doubts.load(Ordering::Acquire)
    }

    fn now_ms(&self) -> i64 {
        crate::clock::wall_ms()
    }
}

struct Reader {
    name: DbName,
    reader: PageCopyReader,
    first_pass: bool,
}

impl SnapshotReader for Reader {
    fn start(&self) -> Pos {
        self.reader.start()
    }

    fn page_size(&self) -> u32 {
        self.reader.page_size().get()
    }

    fn page_count(&self) -> u32 {
        self.reader.page_count()
    }

    fn history(&self) -> Vec<Milestone> {
        self.reader.history().to_vec()
    }

    fn seek(&mut self, next: Pgno) {
        self.reader.seek(next);
    }

    fn next_pages(&mut self, max_bytes: usize) -> Result<Vec<(Pgno, Bytes)>, SourceError> {
        if self.first_pass {
            let pages = self
                .reader
                .next_pages(max_bytes)
                .map_err(|e| source_error(&self.name, e))?;
            if !pages.is_empty() {
                return Ok(pages);
            }
            self.first_pass = false;
        }
        self.reader
            .corrections()
            .map_err(|e| source_error(&self.name, e))
    }

    fn finish(&mut self) -> Result<Pos, SourceError> {
        self.reader.end().map_err(|e| source_error(&self.name, e))
    }
}

impl Sink for Ports {
    fn cluster_id(&self) -> Option<String> {
        self.cluster_id.lock().clone()
    }

    fn adopt_cluster_id(&self, id: &str) -> Result<(), SinkError> {
        self.data_dir
            .set_cluster_id(id)
            .map_err(|e| SinkError::Io {
                what: format!("{e:#}"),
                source: std::io::Error::other("cluster id"),
            })?;
        *self.cluster_id.lock() = Some(id.to_owned());
        Ok(())
    }

    fn node_id(&self) -> u64 {
        self.node.node_id
    }

    fn epoch(&self) -> u64 {
        *self.seen_epoch.read()
    }

    fn observe_epoch(&self, epoch: u64) -> Result<(), SinkError> {
        if *self.check_epoch(epoch)? == epoch {
            return Ok(());
        }
        let mut seen = self.seen_epoch.write();
        if !epochs::may_take(epoch, *seen) {
            return Err(SinkError::StaleEpoch {
                sent: epoch,
                seen: *seen,
            });
        }
        if epoch > *seen {
            self.data_dir.set_epoch(epoch).map_err(|e| SinkError::Io {
                what: format!("{e:#}"),
                source: std::io::Error::other("epoch"),
            })?;
            *seen = epoch;
            self.change_role(|role| role.epoch = role.epoch.max(epoch));
        }
        Ok(())
    }

    fn positions(&self) -> Vec<(DbName, Pos)> {
        self.store
            .all()
            .iter()
            .map(|db| (db.name().clone(), db.pos()))
            .filter(|(_, pos)| pos.txid.0 > 0)
            .collect()
    }

    fn filter(&self) -> DatabaseFilter {
        self.filter.clone()
    }

    fn apply(&self, name: &DbName, batch: Batch) -> Result<Applied, SinkError> {
        let _epoch = self.check_epoch(batch.sender_epoch)?;
        let db = self.db(name)?;
        db.apply(&batch.records, batch.sender_epoch, batch.sync)
            .map_err(|e| sink_error(name, e))?;
        Ok(db.applied())
    }

    fn drop_db(&self, name: &DbName, sender_epoch: u64, at: Pos) -> Result<Applied, SinkError> {
        let _epoch = self.check_epoch(sender_epoch)?;
        let db = self.db(name)?;
        db.apply_drop(at, sender_epoch)
            .map_err(|e| sink_error(name, e))?;
        Ok(db.applied())
    }

    fn unknown_to_primary(&self, name: &DbName) {
        tracing::warn!(db = %name, "the primary has never heard of this database; it is kept here as it is");
        self.has_own.store(true, Ordering::Release);
    }

    fn page_checksums(&self, name: &DbName) -> Result<Option<Vec<u64>>, SinkError> {
        let Some(db) = self.store.get(name.as_str()) else {
            return Ok(None);
        };
        let (_, sums) = db.checksums();
        Ok((sums.page_count() > 0).then(|| sums.to_raw()))
    }

    fn resume_point(&self, name: &DbName) -> Option<(Pos, Pgno)> {
        self.paused.lock().get(name)?.resume_point()
    }

    fn history(&self, name: &DbName, milestones: &[Milestone]) {
        self.histories
            .lock()
            .insert(name.clone(), milestones.to_vec());
    }

    fn begin_snapshot(
        &self,
        name: &DbName,
        s: SnapshotStart,
    ) -> Result<Box<dyn SnapshotWriter>, SinkError> {
        drop(self.check_epoch(s.sender_epoch)?);
        let db = self.db(name)?;
        let page_size = PageSize::new(s.page_size).ok_or_else(|| {
            SinkError::Invalid(format!("{name}: page size {} in a page copy", s.page_size))
        })?;
        let paused = self
            .paused
            .lock()
            .remove(name)
            .filter(|w| w.resume_point() == Some((s.start, s.next)));
        let history = self.histories.lock().remove(name).unwrap_or_default();
        let writer = match paused {
            Some(mut writer) if s.next > Pgno::ONE => {
                writer.resumed(&s, history);
                writer
            }
            _ if s.next > Pgno::ONE => {
                return Err(SinkError::Invalid(format!(
                    "{name}: nothing to go on with at page {}",
                    s.next
                )));
            }
            _ => PageCopyWriter::begin(db, &s, page_size, history)
                .map_err(|e| sink_error(name, e))?,
        };
        tracing::info!(db = %name, start = %s.start, pages = s.page_count, difference = s.is_difference, next = %s.next, "page copy begins");
        let db = self.db(name)?;
        Ok(Box::new(Writer {
            ports: self.this.clone(),
            sender_epoch: s.sender_epoch,
            db,
            writer: Some(writer),
        }))
    }

    fn applied(&self, name: &DbName) -> Applied {
        let Some(db) = self.store.get(name.as_str()) else {
            return Applied::default();
        };
        // A commit that waits may be among what is here, and nothing else may come that would be acknowledged.
        // Who has no vote is not waited for, and never hears of the settings.
        if self.node.is_candidate
            && self.node.gate_of(name).is_some()
            && let Err(error) = db.sync_applied()
        {
            tracing::warn!(db = %name, error = chain(&error), "not acknowledged as being on disk");
        }
        db.applied()
    }

    fn heartbeat(&self, primary_ms: i64, caught_up: bool) {
        self.lag.heard(primary_ms, caught_up);
        if caught_up {
            // The primary has all that is here, so what was in doubt is decided.
            if self.node.has_unseen.swap(false, Ordering::AcqRel) {
                let (store, node) = (self.store.clone(), self.node.clone());
                tokio::task::spawn_blocking(move || {
                    for db in store.all() {
                        if let Err(error) = db.show_decided() {
                            node.has_unseen.store(true, Ordering::Release); // at the next heartbeat
                            tracing::error!(db = %db.name(), error = chain(&error), "readers do not see the last commit yet");
                        }
                    }
                });
            }
            // What the primary does not know yet may come to have its name there.
            if !self.has_own.load(Ordering::Acquire)
                && self.node.was_primary.swap(false, Ordering::AcqRel)
                && let Err(error) = self.data_dir.set_was_primary(false)
            {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "forget that this node was primary"
                );
            }
            self.accept_soon(self.followed_epoch.load(Ordering::Acquire));
            self.ready
                .send_if_modified(|ready| !std::mem::replace(ready, true));
        }
    }

    fn connected(&self, primary: &PrimaryInfo) {
        self.has_own.store(false, Ordering::Release);
        self.followed_epoch.store(primary.epoch, Ordering::Release);
        self.is_connected.store(true, Ordering::Release);
        self.lag.set_primary(Some(primary.hostname.clone()));
        self.change_role(|role| {
            if !role.is_primary {
                role.followed = Some(primary.hostname.clone());
            }
        });
        self.node.invalidate_name(".primary".as_ref());
        tracing::info!(primary = %primary.hostname, epoch = primary.epoch, "following the primary");
    }

    fn disconnected(&self) {
        self.is_connected.store(false, Ordering::Release);
    }
}

struct Writer {
    ports: Weak<Ports>,
    sender_epoch: u64,
    db: Arc<Db>,
    writer: Option<PageCopyWriter>,
}

impl SnapshotWriter for Writer {
    fn pages(&mut self, pages: Vec<(Pgno, Bytes)>) -> Result<(), SinkError> {
        let Some(writer) = &mut self.writer else {
            return Ok(());
        };
        writer
            .pages(&pages)
            .map_err(|e| sink_error(self.db.name(), e))
    }

    fn records(&mut self, records: Vec<Record>) -> Result<(), SinkError> {
        if let Some(writer) = &mut self.writer {
            writer.records(records);
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>, end: Pos) -> Result<Applied, SinkError> {
        let name = self.db.name().clone();
        let gone = || SinkError::Io {
            what: format!("{name}: finish a page copy"),
            source: std::io::Error::other("the node stops"),
        };
        let ports = self.ports.upgrade().ok_or_else(gone)?;
        let _epoch = ports.check_epoch(self.sender_epoch)?;
        if let Some(writer) = self.writer.take() {
            let taken = writer.taken_count();
            let pos = writer.finish(end).map_err(|e| sink_error(&name, e))?;
            tracing::info!(db = %name, %pos, taken, "page copy is in place");
        }
        Ok(self.db.applied())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take()
            && writer.resume_point().is_some()
            && let Some(ports) = self.ports.upgrade()
        {
            ports.paused.lock().insert(self.db.name().clone(), writer);
        }
    }
}
