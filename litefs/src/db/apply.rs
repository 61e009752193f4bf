//! Applies ranges on a replica.
//!
//! The order is INV-DB-5: check everything, log, then write: as one WAL commit where a program has the database open,
//! straight into the file where none has (opens wait meanwhile).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use super::log::{Older, RecordMeta};
use super::lost::{Losing, Reason};
use super::page_checksums::PageChecksums;
use super::pages::Pages;
use super::replica_wal::ReplicaWal;
use super::{Db, DbError, Inner, steps};
use crate::disk::crash_point;
use crate::ltx::{Checksum, Decoder, PageSize, Pgno, Pos, page_checksum};
use crate::replication::{Applied, Record};

/// What some records say, put together: the last version of each page.
pub(super) struct Merged {
    pub(super) page_size: PageSize,
    pub(super) page_count: u32,
    pub(super) pages: BTreeMap<Pgno, Vec<u8>>,
}

impl Merged {
    /// Decodes records, oldest first.
    pub(super) fn of(db: &Db, records: &[Record]) -> Result<Option<Merged>, DbError> {
        let mut merged: Option<Merged> = None;
        for record in records {
            let mut decoder = Decoder::new(&record.ltx).map_err(db.ltx_error())?;
            let header = decoder.header().clone();
            let m = merged.get_or_insert_with(|| Merged {
                page_size: header.page_size,
                page_count: 0,
                pages: BTreeMap::new(),
            });
            if header.commit == 0 || header.page_size != m.page_size {
                m.pages.clear();
                m.page_size = header.page_size;
            }
            let mut buf = vec![0; header.page_size.len()];
            while let Some(pgno) = decoder.next_page(&mut buf).map_err(db.ltx_error())? {
                m.pages.insert(pgno, buf.clone());
            }
            decoder.finish().map_err(db.ltx_error())?;
            m.page_count = header.commit;
            if let Some(past) = Pgno::new(header.commit.saturating_add(1)) {
                m.pages.split_off(&past);
            }
        }
        Ok(merged)
    }

    fn sums(&self) -> Vec<(Pgno, Checksum)> {
        self.pages
            .iter()
            .map(|(pgno, data)| (*pgno, page_checksum(*pgno, data)))
            .collect()
    }
}

impl Db {
    /// Applies records, each beginning where the one before ended; the first may begin before our position.
    ///
    /// # Errors
    /// `PosMismatch`, `Ltx` and `Log` leave the database as it was.
    pub fn apply(&self, records: &[Record], sender_epoch: u64, sync: bool) -> Result<Pos, DbError> {
        let mut inner = self.lock();
        self.check_is_replica()?;
        let known = inner.pos;
        let first_new = records
            .iter()
            .position(|r| r.meta.max_txid > known.txid)
            .unwrap_or(records.len());
        if let Some(same) = records[..first_new]
            .iter()
            .find(|r| r.meta.max_txid == known.txid)
            && same.meta.post != known.post_apply_checksum
        {
            return Err(DbError::PosMismatch {
                have: known,
                want: same.meta.pre_pos(),
            });
        }
        let records = &records[first_new..];
        let (Some(first), Some(last)) = (records.first(), records.last()) else {
            return Ok(known);
        };
        let overlaps = first.meta.min_txid <= known.txid;
        if !overlaps && first.meta.pre_pos() != known {
            return Err(DbError::PosMismatch {
                have: known,
                want: first.meta.pre_pos(),
            });
        }
        if overlaps && !self.is_surely_within(first.meta.epoch, sender_epoch) {
            // Its pages may hide that ours were others: a page copy says where the two histories part.
            return Err(DbError::PosMismatch {
                have: known,
                want: first.meta.pre_pos(),
            });
        }
        let Some(merged) = Merged::of(self, records)? else {
            return Ok(known);
        };
        if merged.page_count > 0
            && inner.page_count > 0
            && inner.page_size != Some(merged.page_size)
        {
            return Err(DbError::PosMismatch {
                have: known,
                want: first.meta.pre_pos(),
            });
        }
        let sums = merged.sums();
        let target = Pos {
            txid: last.meta.max_txid,
            post_apply_checksum: last.meta.post,
        };
        if inner.checksums.total_after(merged.page_count, &sums) != target.post_apply_checksum {
            // The pages are not those of our lineage: a difference will tell.
            return Err(DbError::PosMismatch {
                have: known,
                want: first.meta.pre_pos(),
            });
        }
        self.log_records(&mut inner, records, overlaps, &merged)?;
        if sync {
            self.log.sync().map_err(self.log_error())?;
        }
        self.install(&mut inner, &merged, sums, target, last.meta.timestamp_ms)?;
        if sync {
            *self.durable.lock() = target;
        }
        Ok(target)
    }

    /// Returns whether a range that begins before our position goes on from it: where the tenure is the one in which we
    /// got here, or the range was committed in, because a tenure has one history (INV-LOST-2). `committed` is zero if
    /// that is not known.
    fn is_surely_within(&self, committed: u64, sender_epoch: u64) -> bool {
        use std::sync::atomic::Ordering;
        let ours = self.log.end().map_or(0, |end| end.epoch);
        let is_one_tenure = sender_epoch <= ours || committed == ours;
        is_one_tenure && !self.node.was_primary.load(Ordering::Acquire)
    }

    /// Refuses what others wrote while programs here may write, or once it is closed.
    pub(super) fn check_is_replica(&self) -> Result<(), DbError> {
        self.check_is_open()?;
        match self.is_primary() {
            true => Err(DbError::Locked {
                what: "a program's write transaction has not ended: the database",
                path: self.paths.main.clone(),
            }),
            false => Ok(()),
        }
    }

    /// Refuses what comes after [`close_for_unmount`](Db::close_for_unmount); decided under the lock.
    fn check_is_open(&self) -> Result<(), DbError> {
        use std::sync::atomic::Ordering;
        match self.is_closed.load(Ordering::Acquire) {
            true => Err(DbError::Locked {
                what: "this node is stopping: the database",
                path: self.paths.main.clone(),
            }),
            false => Ok(()),
        }
    }

    /// Makes what was applied durable, for it to be acknowledged as such.
    ///
    /// # Errors
    /// Disk, log.
    pub fn sync_applied(&self) -> Result<(), DbError> {
        let inner = self.lock();
        if !self.is_primary() && self.log.end_pos() == inner.pos && inner.trouble.is_none() {
            self.sync_log()?;
            *self.durable.lock() = inner.pos;
        }
        Ok(())
    }

    /// Makes files durable of which the log has not all: it began anew with what is in them.
    pub(super) fn sync_files(&self) -> Result<(), DbError> {
        for path in [&self.paths.main, &self.paths.wal] {
            match File::open(path) {
                Ok(file) => file.sync_data().map_err(DbError::io("sync", path))?,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(DbError::io("open", path)(error)),
            }
        }
        let dir = self.paths.main.parent().map(File::open);
        match dir {
            Some(Ok(dir)) => dir
                .sync_all()
                .map_err(DbError::io("sync", &self.paths.main)),
            _ => Ok(()),
        }
    }

    /// Returns where the copy here is.
    pub fn applied(&self) -> Applied {
        Applied {
            pos: self.pos(),
            durable: *self.durable.lock(),
        }
    }

    /// Removes the database because the primary dropped it at `at`.
    ///
    /// # Errors
    /// Disk, log.
    pub fn apply_drop(&self, at: Pos, sender_epoch: u64) -> Result<(), DbError> {
        let mut inner = self.lock();
        self.check_is_replica()?;
        if inner.pos == at {
            return Ok(());
        }
        let page_size = inner.page_size.unwrap_or(PageSize::DEFAULT);
        let meta = RecordMeta {
            // Not that of what it ends: who takes over goes by it (INV-TAKEOVER-2), and an older copy must not win.
            epoch: sender_epoch,
            min_txid: at.txid,
            max_txid: at.txid,
            pre_apply_checksum: inner.pos.post_apply_checksum,
            post_apply_checksum: at.post_apply_checksum,
            timestamp_ms: crate::clock::wall_ms(),
            commit: 0,
            page_size,
            wal: None,
        };
        let was_primary = &self.node.was_primary;
        let may_be_own = was_primary.load(std::sync::atomic::Ordering::Acquire);
        let older = if inner.pos.txid > at.txid || (may_be_own && inner.page_count > 0) {
            let older = self.keep_lost(&Losing {
                reason: Reason::Dropped,
                last: inner.pos,
                fork: None,
                winner: Some((sender_epoch, at)),
            })?;
            self.begin_giving_way(at)?;
            older
        } else {
            Older::Remove
        };
        self.log.restart(&meta, older).map_err(self.log_error())?;
        *self.durable.lock() = Pos::ZERO;
        let merged = Merged {
            page_size,
            page_count: 0,
            pages: BTreeMap::new(),
        };
        self.install(&mut inner, &merged, Vec::new(), at, meta.timestamp_ms)
    }

    fn log_records(
        &self,
        inner: &mut Inner,
        records: &[Record],
        overlaps: bool,
        merged: &Merged,
    ) -> Result<(), DbError> {
        // An earlier try may have got as far as the log, or a part of the way.
        let end = self.log.end_pos();
        let logged = records.iter().position(|r| r.meta.post_pos() == end);
        if let Some(logged) = logged {
            return self.append_records(&records[logged + 1..]);
        }
        let is_continued = end == inner.pos;
        if !is_continued || overlaps {
            // One range from where we are: as the log wants it, and just as true.
            let (Some(first), Some(last)) = (records.first(), records.last()) else {
                return Ok(());
            };
            let meta = RecordMeta {
                epoch: self.epoch_of(first.meta.epoch.max(last.meta.epoch)),
                min_txid: inner.pos.txid.next(),
                max_txid: last.meta.max_txid,
                pre_apply_checksum: inner.pos.post_apply_checksum,
                post_apply_checksum: last.meta.post,
                timestamp_ms: last.meta.timestamp_ms,
                commit: merged.page_count,
                page_size: merged.page_size,
                wal: None,
            };
            let pages: Vec<(Pgno, &[u8])> = merged
                .pages
                .iter()
                .map(|(p, d)| (*p, d.as_slice()))
                .collect();
            let ltx = self.encode(std::mem::take(&mut inner.encoded), &meta, &pages)?;
            let appended = if is_continued {
                self.log.append(&meta, &ltx)
            } else {
                let base = RecordMeta {
                    min_txid: meta.max_txid,
                    ..meta
                };
                *self.durable.lock() = Pos::ZERO;
                self.log.restart(&base, Older::Quarantine)
            };
            inner.encoded = ltx;
            return appended.map_err(self.log_error());
        }
        self.append_records(records)
    }

    fn append_records(&self, records: &[Record]) -> Result<(), DbError> {
        for record in records {
            let mut meta = to_log(&record.meta)?;
            // A copy of pages is of the tenure that sent it, which may be later than that of what follows.
            let end = self.log.end().map_or(0, |end| end.epoch);
            meta.epoch = self.epoch_of(meta.epoch).max(end);
            self.log
                .append(&meta, &record.ltx)
                .map_err(self.log_error())?;
        }
        Ok(())
    }

    /// Returns the epoch under which a record goes into the log here. The sender does not know that of a record which
    /// it has compacted, and sends zero; it is not lower than that of what came before.
    fn epoch_of(&self, sent: u64) -> u64 {
        match sent {
            0 => self.log.end().map_or(0, |end| end.epoch),
            known => known,
        }
    }

    /// Writes pages where readers find them, and moves the position.
    pub(super) fn install(
        &self,
        inner: &mut Inner,
        merged: &Merged,
        sums: Vec<(Pgno, Checksum)>,
        target: Pos,
        timestamp_ms: i64,
    ) -> Result<(), DbError> {
        crash_point(steps::APPLY_LOGGED);
        self.write_pages(inner, merged)?;
        crash_point(steps::APPLY_WRITTEN);
        if inner.page_size != Some(merged.page_size) {
            inner.checksums = PageChecksums::new(merged.page_size);
        }
        inner.checksums.truncate(merged.page_count);
        for (pgno, sum) in sums {
            inner.checksums.set(pgno, sum);
        }
        inner.page_size = (merged.page_count > 0).then_some(merged.page_size);
        inner.page_count = merged.page_count;
        inner.pos = target;
        self.publish(inner, timestamp_ms);
        Ok(())
    }

    /// Writes pages where readers find them.
    pub(super) fn write_pages(&self, inner: &mut Inner, pages: &dyn Pages) -> Result<(), DbError> {
        if pages.page_count() > 0 && inner.replica_wal.is_some() {
            return self.install_in_wal(inner, pages);
        }
        let written = if pages.page_count() == 0 {
            self.remove_files(inner)
        } else {
            self.install_in_file(inner, pages)
        };
        inner.trouble = written.as_ref().err().map(ToString::to_string);
        written
    }

    fn install_in_wal(&self, inner: &mut Inner, pages: &dyn Pages) -> Result<(), DbError> {
        let Some(wal) = &mut inner.replica_wal else {
            return Ok(());
        };
        if pages.pgnos().next().is_none() {
            wal.show()
                .map_err(DbError::io("publish", &self.paths.shm))?;
            return Ok(());
        }
        wal.append(&self.paths, pages)?;
        if wal.wants_checkpoint() {
            // What was applied is in the WAL, and readers see it.
            if let Err(error) = wal.checkpoint(&self.paths) {
                tracing::warn!(db = %self.name, error = crate::replication::send::chain(&error), "cannot checkpoint, will try again");
            }
        }
        Ok(())
    }

    fn install_in_file(&self, inner: &mut Inner, pages: &dyn Pages) -> Result<(), DbError> {
        // Nobody can open it meanwhile: an open that finds no WAL of ours waits for the lock of `inner`.
        if inner.page_count == 0 {
            return self.create_file(pages);
        }
        let io = || DbError::io("write", &self.paths.main);
        let file = OpenOptions::new()
            .write(true)
            .open(&self.paths.main)
            .map_err(io())?;
        write_file(&file, pages).map_err(io())?;
        self.node
            .invalidate(|inv| inv.data(&self.paths.relative, 0, 0));
        Ok(())
    }

    /// A file that was written in part is not what the checksums say: a difference must be one from what is there.
    pub(super) fn look_at_half_written(&self, inner: &mut Inner) {
        if inner.trouble.is_none() || self.is_primary() || inner.replica_wal.is_some() {
            return;
        }
        if let Ok(Some(view)) = super::view::View::open(&self.paths, false)
            && inner.page_size == Some(view.page_size)
            && let Ok(actual) = view.checksums()
        {
            inner.page_count = actual.page_count();
            inner.pos.post_apply_checksum = actual.total();
            inner.checksums = actual;
            let timestamp_ms = self.published.lock().timestamp_ms;
            self.publish(inner, timestamp_ms);
        }
    }

    /// Makes the file of a database new to this node, and the directories above it.
    fn create_file(&self, pages: &dyn Pages) -> Result<(), DbError> {
        let tmp = self.paths.meta.join("new.db");
        let io = || DbError::io("write", &tmp);
        let file = File::create(&tmp).map_err(io())?;
        write_file(&file, pages).map_err(io())?;
        self.put_in_place(&tmp)
    }

    /// Renames a finished file to the database's name; whatever was there is forgotten or kept aside.
    pub(super) fn put_in_place(&self, tmp: &std::path::Path) -> Result<(), DbError> {
        let main = &self.paths.main;
        if let Some(dir) = main.parent() {
            self.make_dirs(dir)?;
        }
        self.keep_aside_strangers()?;
        self.node
            .invalidate(|inv| inv.forget_file(&self.paths.relative));
        std::os::unix::fs::chown(tmp, None, None).ok();
        self.node
            .disk
            .rename(steps::APPLY_CREATE, tmp, main)
            .map_err(DbError::io("rename", main))?;
        self.node.invalidate(|inv| inv.name(&self.paths.relative));
        Ok(())
    }

    /// Makes directories, and tells the kernel of each new one.
    fn make_dirs(&self, dir: &std::path::Path) -> Result<(), DbError> {
        if dir.is_dir() {
            return Ok(());
        }
        if let Some(parent) = dir.parent() {
            self.make_dirs(parent)?;
        }
        match std::fs::create_dir(dir) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(DbError::io("create directory", dir)(e)),
        }
        if let Ok(relative) = dir.strip_prefix(&self.node.files) {
            self.node.invalidate(|inv| inv.name(relative));
        }
        Ok(())
    }

    /// Moves away files of this node's own that have the names of a replicated database and its companions, which SQLite
    /// would take for parts of it. An empty one may stay in the database's place.
    fn keep_aside_strangers(&self) -> Result<(), DbError> {
        if self.lock_free_page_count() > 0 {
            return Ok(()); // they are ours
        }
        let p = &self.paths;
        let names = [
            (&p.main, ""),
            (&p.journal, "-journal"),
            (&p.wal, "-wal"),
            (&p.shm, "-shm"),
        ];
        for (path, suffix) in names {
            let Ok(m) = std::fs::symlink_metadata(path) else {
                continue;
            };
            if suffix.is_empty() && m.is_file() && m.len() == 0 {
                continue;
            }
            let dir = p.meta.join("quarantine");
            std::fs::create_dir_all(&dir).map_err(DbError::io("create directory", &dir))?;
            let kept = dir.join(format!("local-file-{}{suffix}", crate::clock::wall_ms()));
            let relative = super::paths::with_suffix(&p.relative, suffix);
            self.node.invalidate(|inv| inv.forget_file(&relative));
            self.node
                .disk
                .rename(steps::APPLY_KEEP_ASIDE, path, &kept)
                .map_err(DbError::io("rename", path))?;
            self.node.invalidate(|inv| inv.name(&relative));
            tracing::error!(
                db = %self.name, file = %path.display(), kept = %kept.display(),
                "a local file had the name of a replicated database or of a companion of it, and was moved away"
            );
        }
        Ok(())
    }

    fn lock_free_page_count(&self) -> u32 {
        self.published.lock().page_count
    }

    /// Removes all files of a dropped database.
    pub(super) fn remove_files(&self, inner: &mut Inner) -> Result<(), DbError> {
        self.abandon_readers(inner)?;
        let p = &self.paths;
        self.remove_companions(
            steps::APPLY_REMOVE,
            &[(&p.journal, "-journal"), (&p.main, "")],
        )
    }

    /// Lets a program open a replica's database: serves it through a WAL of ours from now on.
    ///
    /// Uses the mount unless the database is already so served: call it from a thread of its own then.
    ///
    /// # Errors
    /// Disk, or a lock that somebody holds.
    pub fn open_for_readers(&self) -> Result<(), DbError> {
        if self.open_if_ready() {
            return Ok(());
        }
        // Lock order: inner, then gate.
        let mut inner = self.lock();
        if self.open_if_ready() {
            return Ok(());
        }
        if self.is_primary() {
            // It was promoted while this open was on its way.
            self.gate.lock().handle_count += 1;
            return Ok(());
        }
        self.check_is_open()?;
        if let Some(what) = &inner.trouble {
            // Half of a transaction is in the file.
            return Err(DbError::Corrupt {
                what: format!("unfinished: {what}"),
                path: self.paths.main.clone(),
            });
        }
        if let (Some(page_size), None) = (inner.page_size, &inner.replica_wal) {
            let wal = self.node.in_mount(|| {
                ReplicaWal::prepare(&self.node, &self.paths, page_size, inner.page_count)
            });
            inner.replica_wal = Some(wal?);
        }
        let mut gate = self.gate.lock();
        gate.is_prepared = inner.replica_wal.is_some();
        gate.handle_count += 1;
        Ok(())
    }

    /// Counts a reader in if that needs no preparation.
    pub fn open_if_ready(&self) -> bool {
        let mut gate = self.gate.lock();
        if gate.is_prepared {
            gate.handle_count += 1;
            return true;
        }
        false
    }

    /// Learns that a program closed the database.
    pub fn closed_by_reader(&self) {
        let mut gate = self.gate.lock();
        gate.handle_count = gate.handle_count.saturating_sub(1);
    }

    /// Ends the serving through a WAL when nobody has the database open. Returns whether it is ended.
    ///
    /// # Errors
    /// Disk.
    pub fn release_readers(&self) -> Result<bool, DbError> {
        let mut inner = self.lock();
        if self.handles_in_mount() > 0 {
            return Ok(false);
        }
        {
            let mut gate = self.gate.lock();
            if gate.handle_count > 0 {
                return Ok(false);
            }
            gate.is_prepared = false;
        }
        let Some(wal) = &mut inner.replica_wal else {
            return Ok(true);
        };
        if !wal.checkpoint(&self.paths)? {
            self.gate.lock().is_prepared = true;
            return Ok(false);
        }
        inner.replica_wal = None;
        let p = &self.paths;
        self.remove_companions(steps::RELEASE_REMOVE, &[(&p.shm, "-shm"), (&p.wal, "-wal")])?;
        self.node.invalidate(|inv| inv.data(&p.relative, 0, 0));
        Ok(true)
    }

    /// Ends the serving through a WAL for good: who has the database open keeps the files as they are, and the next open
    /// begins anew.
    pub(super) fn abandon_readers(&self, inner: &mut Inner) -> Result<(), DbError> {
        inner.replica_wal = None;
        self.gate.lock().is_prepared = false;
        let p = &self.paths;
        self.remove_companions(steps::APPLY_REMOVE, &[(&p.shm, "-shm"), (&p.wal, "-wal")])
    }

    /// Removes files of ours, if they are there.
    fn remove_companions(
        &self,
        step: crate::disk::Step,
        files: &[(&std::path::PathBuf, &str)],
    ) -> Result<(), DbError> {
        for (path, suffix) in files {
            let relative = super::paths::with_suffix(&self.paths.relative, suffix);
            self.node.invalidate(|inv| inv.forget_file(&relative));
            crash_point(step);
            match std::fs::remove_file(path) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(DbError::io("remove", path)(e)),
            }
            self.node.invalidate(|inv| inv.name(&relative));
        }
        Ok(())
    }

    /// Returns whether programs read this database through a WAL of ours.
    #[must_use]
    pub fn serves_readers(&self) -> bool {
        self.gate.lock().is_prepared
    }
}

fn write_file(file: &File, pages: &dyn Pages) -> std::io::Result<()> {
    // Neighbours go in one write.
    let mut run: Vec<u8> = Vec::new();
    let mut run_start = 0;
    for pgno in pages.pgnos() {
        let at = pages.page_size().offset(pgno);
        if run_start + run.len() as u64 != at || run.len() > 1 << 20 {
            crash_point(steps::APPLY_FILE);
            file.write_all_at(&run, run_start)?;
            run.clear();
            run_start = at;
        }
        pages.read(pgno, &mut run)?;
    }
    crash_point(steps::APPLY_FILE);
    file.write_all_at(&run, run_start)?;
    crash_point(steps::APPLY_FILE_CUT);
    file.set_len(u64::from(pages.page_count()) * u64::from(pages.page_size().get()))
}

pub(super) fn to_log(meta: &crate::replication::RecordMeta) -> Result<RecordMeta, DbError> {
    let page_size = PageSize::new(meta.page_size).ok_or_else(|| DbError::Corrupt {
        what: format!("page size {}", meta.page_size),
        path: "record".into(),
    })?;
    Ok(RecordMeta {
        epoch: meta.epoch,
        min_txid: meta.min_txid,
        max_txid: meta.max_txid,
        pre_apply_checksum: meta.pre,
        post_apply_checksum: meta.post,
        timestamp_ms: meta.timestamp_ms,
        commit: meta.commit,
        page_size,
        wal: None,
    })
}

pub(crate) fn from_log(meta: &RecordMeta) -> crate::replication::RecordMeta {
    crate::replication::RecordMeta {
        epoch: meta.epoch,
        min_txid: meta.min_txid,
        max_txid: meta.max_txid,
        pre: meta.pre_apply_checksum,
        post: meta.post_apply_checksum,
        timestamp_ms: meta.timestamp_ms,
        commit: meta.commit,
        page_size: meta.page_size.get(),
    }
}
