//! Copies the pages of a database to a node that has none, or another history, while programs go on writing.
//!
//! The sender holds no lock of SQLite's. It pins a position in the log, then reads pages as they are; what changed
//! since the pin is in the log, and what it read in the middle of a change is found by its checksum and sent again.
//! The receiver puts the log's ranges on top and has the state of `end`, checked by its checksum.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::apply::Merged;
use super::lineage;
use super::log::{Milestone, Older, RecordMeta};
use super::lost::{Losing, Reason, Relation};
use super::page_checksums::PageChecksums;
use super::pages::InFile;
use super::view::View;
use super::{Db, DbError};
use crate::ltx::{Checksum, PageSize, Pgno, Pos, Txid, page_checksum};
use crate::replication::message::MAX_MILESTONES;
use crate::replication::{Record, SnapshotStart};
use crate::sqlite::journal;

/// How long to wait for a page to become what it was captured as; heartbeats wait meanwhile.
const CORRECTION_WAIT: Duration = Duration::from_secs(1);
const CORRECTION_PAUSE: Duration = Duration::from_millis(5);

/// How long a change of the page size waits for readers to end their transactions; new ones wait meanwhile.
const READERS_WAIT: Duration = Duration::from_secs(2);
const READERS_PAUSE: Duration = Duration::from_micros(200);

/// The sender's side of a page copy.
#[derive(Debug)]
pub struct PageCopyReader {
    db: Arc<Db>,
    start: Pos,
    page_size: PageSize,
    sums: PageChecksums,
    /// Checksums of the receiver's own copy, by page index; zero is none.
    have: Vec<u64>,
    next: u32,
    /// Pages that were read in another version than that of `start`.
    other: BTreeSet<Pgno>,
    wal: Option<SeenWal>,
    /// Where this history was, newest first.
    history: Vec<Milestone>,
    pin: u64,
}

/// What was in the WAL at some moment.
#[derive(Debug)]
struct SeenWal {
    /// Nothing if the database has another page size now, or is gone.
    view: Option<View>,
    at: Instant,
    took: Duration,
}

impl SeenWal {
    /// Returns whether reading through the WAL again would be a small part of the work done since.
    fn is_old(&self) -> bool {
        self.at.elapsed() > self.took.saturating_mul(20).max(Duration::from_millis(50))
    }
}

impl PageCopyReader {
    /// Pins the newest position, or `resume_at` if the log still leads on from it, and opens the pages.
    ///
    /// # Errors
    /// Disk; or there is nothing to copy.
    pub fn open(
        db: Arc<Db>,
        have: Vec<u64>,
        resume_at: Option<Pos>,
        receiver_at: Pos,
    ) -> Result<PageCopyReader, DbError> {
        if db.is_primary() {
            db.capture_wal()?;
        }
        let inner = db.lock();
        let page_size = inner.page_size.ok_or_else(|| DbError::Corrupt {
            what: "no pages to copy".into(),
            path: db.paths.main.clone(),
        })?;
        let start = match resume_at {
            Some(pos) if db.leads_on_from(pos) => pos,
            _ => inner.pos,
        };
        let sums = inner.checksums.clone();
        let pin = db.pin(start.txid);
        drop(inner);
        let history = db.log.milestones(receiver_at.txid, MAX_MILESTONES);
        Ok(PageCopyReader {
            start,
            page_size,
            sums,
            have,
            next: 1,
            other: BTreeSet::new(),
            wal: None,
            history,
            pin,
            db,
        })
    }

    /// Returns the position pinned.
    #[must_use]
    pub fn start(&self) -> Pos {
        self.start
    }

    /// Returns where this history was at the receiver's position and before, newest first.
    #[must_use]
    pub fn history(&self) -> &[Milestone] {
        &self.history
    }

    /// Returns bytes per page.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Returns how many pages the copy has.
    #[must_use]
    pub fn page_count(&self) -> u32 {
        self.sums.page_count()
    }

    /// Skips pages that the receiver has from an earlier try.
    pub fn seek(&mut self, next: Pgno) {
        self.next = next.get();
    }

    /// Reads some pages, ascending in the first pass; none when all have been read.
    ///
    /// # Errors
    /// Disk.
    pub fn next_pages(&mut self, max_bytes: usize) -> Result<Vec<(Pgno, Bytes)>, DbError> {
        let count = (max_bytes / self.page_size.len()).max(1);
        let lock_pgno = self.page_size.lock_pgno();
        let mut wanted = Vec::with_capacity(count);
        while wanted.len() < count && self.next <= self.sums.page_count() {
            if let Some(pgno) = Pgno::new(self.next)
                && pgno != lock_pgno
                && self.sums.get(pgno).map(Checksum::get)
                    != self.have.get(pgno.index()).copied().filter(|s| *s != 0)
            {
                wanted.push(pgno);
            }
            self.next += 1;
        }
        self.read(&wanted)
    }

    fn read(&mut self, wanted: &[Pgno]) -> Result<Vec<(Pgno, Bytes)>, DbError> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let io = || DbError::io("read", &self.db.paths.main);
        let main = File::open(&self.db.paths.main).map_err(io())?;
        let mut is_fresh = false;
        let mut saved: Option<BTreeMap<Pgno, Vec<u8>>> = None;
        let mut pages = Vec::with_capacity(wanted.len());
        let len = self.page_size.len();
        // Neighbours are read at once: the first pass is one long run.
        let mut block = vec![0; wanted.len() * len];
        for run in wanted.chunk_by(|a, b| a.get() + 1 == b.get()) {
            let at = pages.len() * len;
            let bytes = &mut block[at..at + run.len() * len];
            let n = super::capture_wal::read_full(&main, bytes, self.page_size.offset(run[0]))
                .map_err(io())?;
            bytes[n..].fill(0);
            pages.extend(run.iter().copied());
        }
        for (pgno, page) in wanted.iter().zip(block.chunks_exact_mut(len)) {
            let Some(want) = self.sums.get(*pgno) else {
                continue;
            };
            if page_checksum(*pgno, page) == want {
                continue;
            }
            // Newer, or not yet checkpointed: the WAL tells. To read through a long one takes longer than to read pages, so
            // what was found in it is used for some time; what it then has not is read anew at the end.
            if !is_fresh && self.wal.as_ref().is_none_or(|seen| seen.is_old()) {
                let began = Instant::now();
                let view = View::open(&self.db.paths, true)?;
                self.wal = Some(SeenWal {
                    view: view.filter(|v| v.page_size == self.page_size),
                    at: Instant::now(),
                    took: began.elapsed(),
                });
                is_fresh = true;
            }
            if let Some(view) = self.wal.as_ref().and_then(|seen| seen.view.as_ref()) {
                view.page(*pgno, page).map_err(io())?;
            }
            if page_checksum(*pgno, page) == want {
                continue;
            }
            // A rollback-mode transaction is under way: its journal has what the page was.
            let saved = saved.get_or_insert_with(|| self.pages_in_journal());
            match saved.get(pgno).filter(|p| page_checksum(*pgno, p) == want) {
                Some(old) => page.copy_from_slice(old),
                None => {
                    self.other.insert(*pgno);
                }
            }
        }
        let block = Bytes::from(block);
        Ok(pages
            .iter()
            .enumerate()
            .map(|(i, p)| (*p, block.slice(i * len..(i + 1) * len)))
            .collect())
    }

    /// Reads what the journal saved of the pages that a transaction has overwritten; nothing if there is none.
    fn pages_in_journal(&self) -> BTreeMap<Pgno, Vec<u8>> {
        let mut pages = BTreeMap::new();
        let Ok(file) = File::open(&self.db.paths.journal) else {
            return pages;
        };
        let plan = match journal::playback(&file) {
            Ok(plan) if plan.page_size == self.page_size => plan,
            _ => return pages,
        };
        let mut page = vec![0; self.page_size.len()];
        for (pgno, offset) in plan.pages {
            if file.read_exact_at(&mut page, offset).is_ok() {
                pages.entry(pgno).or_insert_with(|| page.clone());
            }
        }
        pages
    }

    /// Returns pages that were read in a version that the log will not put right, read anew; none when all are good.
    ///
    /// # Errors
    /// Disk, or a page that stays wrong.
    pub fn corrections(&mut self) -> Result<Vec<(Pgno, Bytes)>, DbError> {
        let deadline = Instant::now() + CORRECTION_WAIT;
        loop {
            if self.db.is_primary() {
                self.db.capture_wal()?;
            }
            let live = self.db.lock().checksums.clone();
            let wrong: Vec<Pgno> = self
                .other
                .iter()
                .copied()
                .filter(|p| live.get(*p) == self.sums.get(*p))
                .collect();
            self.other.clear();
            if wrong.is_empty() {
                return Ok(Vec::new());
            }
            self.wal = None;
            let mut pages = self.read(&wrong)?;
            pages.retain(|(p, _)| !self.other.contains(p));
            if !pages.is_empty() {
                return Ok(pages);
            }
            if Instant::now() > deadline {
                break;
            }
            // A writer in a rollback mode is in the middle of a transaction; it ends.
            std::thread::sleep(CORRECTION_PAUSE);
        }
        let pgno = self.other.first().map_or(0, |p| p.get());
        Err(DbError::Corrupt {
            what: format!(
                "page {pgno} does not have the checksum it had when it was captured: a long transaction is under way, or \
                 the page is damaged"
            ),
            path: self.db.paths.main.clone(),
        })
    }

    /// Returns the position by now: what was read is not newer.
    ///
    /// # Errors
    /// Disk.
    pub fn end(&self) -> Result<Pos, DbError> {
        if self.db.is_primary() {
            self.db.capture_wal()?;
        }
        Ok(self.db.pos())
    }
}

impl Drop for PageCopyReader {
    fn drop(&mut self) {
        self.db.unpin(self.pin);
    }
}

impl Db {
    fn pin(&self, txid: Txid) -> u64 {
        let mut pins = self.pins.lock();
        let id = pins.iter().map(|(id, _)| id + 1).max().unwrap_or(0);
        pins.push((id, txid));
        id
    }

    fn copy_path(&self) -> std::path::PathBuf {
        self.paths.meta.join("copy.db")
    }

    /// There while a whole copy takes the place of what programs have open: the copy is durable then.
    fn replacing_mark(&self) -> std::path::PathBuf {
        self.paths.meta.join("replacing")
    }

    fn begin_replacing(&self, target: Pos) -> Result<(), DbError> {
        let mark = self.replacing_mark();
        std::fs::write(&mark, target.to_string())
            .and_then(|()| File::open(&mark)?.sync_all())
            .and_then(|()| File::open(&self.paths.meta)?.sync_all())
            .map_err(DbError::io("write", &mark))
    }

    fn end_replacing(&self) -> Result<(), DbError> {
        let mark = self.replacing_mark();
        // Before another copy can have the name that the mark is about.
        std::fs::remove_file(&mark)
            .and_then(|()| File::open(&self.paths.meta)?.sync_all())
            .map_err(DbError::io("remove", &mark))
    }

    /// Ends a replacement that was interrupted, before anything of the database is looked at.
    pub(super) fn finish_replacing(&self) -> Result<(), DbError> {
        let mark = self.replacing_mark();
        let Ok(target) = std::fs::read_to_string(&mark) else {
            return Ok(());
        };
        let copy = self.copy_path();
        // The log tells whether it was decided.
        if target == self.log.end_pos().to_string() && copy.exists() {
            for path in [&self.paths.shm, &self.paths.wal] {
                match std::fs::remove_file(path) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(DbError::io("remove", path)(e));
                    }
                    _ => {}
                }
            }
            let main = &self.paths.main;
            self.node
                .disk
                .rename(super::steps::REPLACE_AGAIN, &copy, main)
                .map_err(DbError::io("rename", main))?;
            tracing::info!(db = %self.name, pos = %target, "the page copy that was being put in place is in place");
        }
        self.end_replacing()
    }

    fn unpin(&self, id: u64) {
        self.pins.lock().retain(|(i, _)| *i != id);
    }

    /// Returns the lowest position that somebody copies from.
    #[must_use]
    pub fn pinned(&self) -> Option<Txid> {
        self.pins.lock().iter().map(|(_, txid)| *txid).min()
    }

    /// Returns whether the log holds what comes after a position, and the position is of its history.
    pub(super) fn leads_on_from(&self, pos: Pos) -> bool {
        self.check_position(pos).is_ok()
    }

    /// Says whether the log can lead on from a position, or why not.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn check_position(&self, pos: Pos) -> Result<(), String> {
        use super::log::ReadAfter;
        let end = self.log.end_pos();
        if pos == end {
            return Ok(());
        }
        if pos.txid >= end.txid {
            return Err(format!(
                "replica is at {pos}, which is not in the history that ends at {end}"
            ));
        }
        if pos.txid < self.log.base() {
            return Err(format!(
                "replica is at {pos}, the log begins at {}",
                self.log.base()
            ));
        }
        match self.log.read_after(pos.txid, 1) {
            Ok(ReadAfter::Records(records)) => match records.first() {
                Some(r) if r.meta.pre_apply_pos() == pos || r.meta.min_txid <= pos.txid => Ok(()),
                _ => Err(format!("replica is at {pos}, which is not in this history")),
            },
            Ok(ReadAfter::CaughtUp) => Ok(()),
            Ok(ReadAfter::NotAvailable { base }) => {
                Err(format!("replica is at {pos}, the log begins at {base}"))
            }
            Err(e) => Err(format!("log cannot be read: {e}")),
        }
    }
}

/// The receiver's side of a page copy.
#[derive(Debug)]
pub struct PageCopyWriter {
    db: Arc<Db>,
    start: Pos,
    page_size: PageSize,
    page_count: u32,
    is_difference: bool,
    /// Tenure of the sender, and where its history was, newest first.
    sender_epoch: u64,
    history: Vec<Milestone>,
    file: File,
    /// Pages in the file.
    sums: BTreeMap<Pgno, Checksum>,
    records: Vec<Record>,
}

impl PageCopyWriter {
    /// Begins a copy, in a file of its own beside the log. Of the sender's start, only the page size is checked before.
    ///
    /// # Errors
    /// Disk.
    pub fn begin(
        db: Arc<Db>,
        snapshot: &SnapshotStart,
        page_size: PageSize,
        history: Vec<Milestone>,
    ) -> Result<PageCopyWriter, DbError> {
        let path = db.copy_path();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(DbError::io("create", &path))?;
        Ok(PageCopyWriter {
            db,
            start: snapshot.start,
            page_size,
            page_count: snapshot.page_count,
            is_difference: snapshot.is_difference,
            sender_epoch: snapshot.sender_epoch,
            history,
            file,
            sums: BTreeMap::new(),
            records: Vec::new(),
        })
    }

    /// Returns where the copy starts from and the first page that it lacks.
    #[must_use]
    pub fn resume_point(&self) -> Option<(Pos, Pgno)> {
        let next = self.sums.last_key_value().map_or(1, |(p, _)| p.get() + 1);
        (self.records.is_empty() && !self.is_difference).then_some((self.start, Pgno::new(next)?))
    }

    /// Goes on with a copy that was broken off, from another sender maybe.
    pub fn resumed(&mut self, snapshot: &SnapshotStart, history: Vec<Milestone>) {
        self.sender_epoch = snapshot.sender_epoch;
        self.history = history;
    }

    /// Returns how many pages were taken so far.
    #[must_use]
    pub fn taken_count(&self) -> usize {
        self.sums.len()
    }

    /// Takes pages.
    ///
    /// # Errors
    /// Disk, or a page of the wrong length.
    pub fn pages(&mut self, pages: &[(Pgno, Bytes)]) -> Result<(), DbError> {
        let path = self.db.copy_path();
        let len = self.page_size.len();
        for run in pages.chunk_by(|a, b| a.0.get() + 1 == b.0.get()) {
            let mut bytes = Vec::with_capacity(run.len() * len);
            for (pgno, page) in run {
                if page.len() != len {
                    return Err(DbError::Corrupt {
                        what: format!("page {pgno} has {} bytes, not {len}", page.len()),
                        path: "stream".into(),
                    });
                }
                bytes.extend_from_slice(page);
                self.sums.insert(*pgno, page_checksum(*pgno, page));
            }
            self.file
                .write_all_at(&bytes, self.page_size.offset(run[0].0))
                .map_err(DbError::io("write", &path))?;
        }
        Ok(())
    }

    /// Takes ranges to be put on top of the pages.
    pub fn records(&mut self, records: Vec<Record>) {
        self.records.extend(records);
    }

    /// Checks the copy and puts it in place.
    ///
    /// # Errors
    /// `PosMismatch` if the checksum is not that of `end`: copy again. Disk.
    pub fn finish(self, end: Pos) -> Result<Pos, DbError> {
        let db = self.db.clone();
        let finished = self.wait_for_readers().and_then(|()| self.install(end));
        if let Some(wal) = &mut db.lock().replica_wal {
            wal.let_readers_in();
        }
        finished
    }

    /// Waits until no reader is in a transaction, some time, and holds off new ones, if the page size is to change.
    fn wait_for_readers(&self) -> Result<(), DbError> {
        let until = Instant::now() + READERS_WAIT;
        loop {
            // Readers may need what the lock is held for, hence only for moments.
            let mut inner = self.db.lock();
            if inner.page_size.is_none_or(|size| size == self.page_size) {
                return Ok(());
            }
            let Some(wal) = &mut inner.replica_wal else {
                return Ok(());
            };
            let all = wal.hold_off_readers();
            drop(inner);
            if all.map_err(DbError::io("lock", &self.db.paths.shm))? || Instant::now() > until {
                return Ok(());
            }
            std::thread::sleep(READERS_PAUSE);
        }
    }

    fn install(mut self, end: Pos) -> Result<Pos, DbError> {
        let db = self.db.clone();
        let path = db.copy_path();
        let mut inner = db.lock();
        db.check_is_replica()?;
        let records: Vec<Record> = self
            .records
            .drain(..)
            .filter(|r| r.meta.max_txid > self.start.txid)
            .collect();
        let overlay = Merged::of(&db, &records)?;
        let (page_count, target, timestamp_ms) = match records.last() {
            Some(r) => (r.meta.commit, r.meta.post_pos(), r.meta.timestamp_ms),
            None => (self.page_count, self.start, crate::clock::wall_ms()),
        };
        let mut sums = if self.is_difference && inner.page_size == Some(self.page_size) {
            inner.checksums.clone()
        } else {
            PageChecksums::new(self.page_size)
        };
        for (pgno, sum) in &self.sums {
            sums.set(*pgno, *sum);
        }
        if let Some(overlay) = &overlay {
            for (pgno, data) in &overlay.pages {
                sums.set(*pgno, page_checksum(*pgno, data));
            }
        }
        sums.truncate(page_count);
        let have = Pos {
            txid: target.txid,
            post_apply_checksum: sums.total(),
        };
        if have != target || target.txid < end.txid {
            return Err(DbError::PosMismatch {
                have,
                want: if have == target { end } else { target },
            });
        }
        // The file now gets the ranges too, and is the whole of what is to change.
        if let Some(overlay) = &overlay {
            for (pgno, data) in &overlay.pages {
                self.file
                    .write_all_at(data, self.page_size.offset(*pgno))
                    .map_err(DbError::io("write", &path))?;
                self.sums.insert(*pgno, page_checksum(*pgno, data));
            }
        }
        let older = self.let_go(&inner, target)?;
        let meta = RecordMeta {
            // Not that of the log it replaces: who takes over goes by it (INV-TAKEOVER-2).
            epoch: self.sender_epoch,
            min_txid: target.txid,
            max_txid: target.txid,
            pre_apply_checksum: inner.pos.post_apply_checksum,
            post_apply_checksum: target.post_apply_checksum,
            timestamp_ms,
            commit: page_count,
            page_size: self.page_size,
            wal: None,
        };
        let is_other_size = inner.page_size.is_some_and(|size| size != self.page_size);
        let is_whole = is_other_size || !(self.is_difference || inner.replica_wal.is_some());
        if is_whole {
            self.file
                .set_len(u64::from(page_count) * u64::from(self.page_size.get()))
                .map_err(DbError::io("truncate", &path))?;
        }
        let is_read = is_other_size && inner.replica_wal.is_some();
        if is_read {
            self.file.sync_data().map_err(DbError::io("sync", &path))?;
            db.begin_replacing(target)?;
        }
        db.log.restart(&meta, older).map_err(db.log_error())?;
        crate::disk::crash_point(super::steps::COPY_LOGGED);
        if !is_whole {
            self.install_difference(&mut inner, page_count)?;
        } else if !(is_read && self.replace(&mut inner, page_count)) {
            if is_other_size {
                db.abandon_readers(&mut inner)?;
            }
            db.put_in_place(&path)?;
            inner.trouble = None;
        }
        if is_read {
            db.end_replacing()?;
        }
        crate::disk::crash_point(super::steps::COPY_WRITTEN);
        inner.checksums = sums;
        inner.page_size = Some(self.page_size);
        inner.page_count = page_count;
        inner.pos = target;
        // Of another history, maybe, and longer.
        *db.durable.lock() = Pos::ZERO;
        db.publish(&inner, timestamp_ms);
        let _ = std::fs::remove_file(&path);
        // The log has nothing of it, and what it gets from now on is acknowledged together with it.
        db.sync_files()?;
        *db.durable.lock() = target;
        Ok(target)
    }

    /// Keeps what is here if it is not of the history that takes its place. Returns what may become of the log.
    fn let_go(&self, inner: &super::Inner, target: Pos) -> Result<Older, DbError> {
        let db = &self.db;
        let relation = match inner.pos == self.start {
            true => Relation::Within,
            false => db.relation(inner, &self.history),
        };
        let is_lost = match relation {
            Relation::Within => false,
            Relation::Parted(_) => true,
            Relation::Unknown(_) => {
                // INV-LOST-2
                let was_primary = db.node.was_primary.load(Ordering::Acquire);
                lineage::is_kept(inner.pos, self.start, was_primary)
            }
        };
        // The remains of what was kept before are no branch, and the log has nothing of it.
        if !is_lost || (db.is_giving_way() && inner.pos != db.log.end_pos()) {
            return Ok(Older::Remove);
        }
        if inner.pos.txid == Txid::ZERO {
            return Ok(Older::Quarantine);
        }
        let older = db.keep_lost(&Losing {
            reason: Reason::Replaced,
            last: inner.pos,
            fork: relation.fork(),
            winner: Some((self.sender_epoch, target)),
        })?;
        db.begin_giving_way(target)?;
        Ok(older)
    }

    /// Gives those who read the database the copy, if they let us: no WAL leads from one page size to another. If not,
    /// they are told at their next transaction that what they have open is over.
    fn replace(&self, inner: &mut super::Inner, page_count: u32) -> bool {
        let db = &self.db;
        let Some(wal) = &mut inner.replica_wal else {
            return false;
        };
        match wal.replace(&db.paths, &self.file, self.page_size, page_count) {
            Ok(true) => {
                inner.trouble = None;
                return true;
            }
            Ok(false) => {
                tracing::warn!(db = %db.name, "a reader has been in one transaction while the page size changed: it gets SQLITE_NOTADB at its next, and has to open the database again");
            }
            Err(error) => {
                tracing::error!(db = %db.name, %error, "readers that have the database open get SQLITE_NOTADB, and have to open it again");
            }
        }
        wal.end_readers(&db.paths);
        false
    }

    fn install_difference(&self, inner: &mut super::Inner, page_count: u32) -> Result<(), DbError> {
        let pages = InFile {
            file: &self.file,
            page_size: self.page_size,
            page_count,
            sums: &self.sums,
        };
        self.db.write_pages(inner, &pages)
    }
}
