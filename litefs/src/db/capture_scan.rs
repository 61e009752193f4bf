//! Compares every page with what was captured last: right whatever happened, at the cost of reading the file.
//!
//! For what leaves no trace: `journal_mode` MEMORY and OFF, a database copied into the mount, a commit in PERSIST mode
//! whose journal was served by the kernel, a WAL that went back, and what was written while this daemon was dead.

use std::fs::File;

use super::commit::Range;
use super::log::WalCursor;
use super::view::View;
use super::{Db, DbError, Inner, Stamp};
use crate::ltx::{PageSize, Pgno, page_checksum};
use crate::sqlite::header::{DB_HEADER_LEN, DbHeader};
use crate::sqlite::journal;

/// Above this many bytes of changed pages the log starts anew at the state found, instead of carrying them.
pub(super) const MAX_RANGE_LEN: usize = 64 << 20;

/// What a look at a database that leaves no trace found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scanned {
    /// All is captured.
    Clean,
    /// A journal protects a transaction that is under way; its end is seen by itself.
    Traced,
    /// A transaction is under way, or its traces are not gone: look again later.
    Busy,
}

impl Db {
    /// Captures what was written without a trace, if the database is at a transaction boundary.
    ///
    /// `nobody_writes` says whether any connection holds a lock that a writer needs. It is asked before and after all is
    /// read: if the file is the same then, what was read is what it is between two transactions. Without it, a journal
    /// whose header is zero before and after tells the same: SQLite writes that header before it writes to the database.
    ///
    /// # Errors
    /// Disk or log.
    pub fn capture_untraced(
        &self,
        nobody_writes: Option<&dyn Fn() -> bool>,
    ) -> Result<Scanned, DbError> {
        let mut inner = self.lock();
        if inner.replica_wal.is_some() || !self.is_primary() || inner.in_doubt.is_some() {
            return Ok(Scanned::Clean);
        }
        if inner.trouble.is_some() {
            self.capture_wal_locked(&mut inner)?;
            if inner.trouble.is_some() {
                self.capture_view(&mut inner, true)?;
                inner.trouble = None;
            }
            return Ok(Scanned::Clean);
        }
        let main = match File::open(&self.paths.main) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Scanned::Clean),
            Err(e) => return Err(DbError::io("open", &self.paths.main)(e)),
        };
        let stamp = Stamp::of(&main).map_err(DbError::io("stat", &self.paths.main))?;
        if inner.stamp == Some(stamp) && !inner.is_replaced {
            if inner.is_provisional && self.is_index_open() {
                self.forget_provisional(&mut inner)?;
            }
            return Ok(Scanned::Clean);
        }
        if self.is_read_through_wal(&main) {
            // Pages reach the file by checkpoints, of frames that are captured.
            self.capture_wal_locked(&mut inner)?;
            let is_unknown = inner.is_replaced || inner.page_count == 0;
            return match is_unknown || inner.is_provisional {
                false => Ok(Scanned::Clean),
                true if is_unknown && self.is_index_open() => Ok(Scanned::Busy),
                true => self.capture_still_view(&mut inner, stamp),
            };
        }
        let before = self.journal_state()?;
        match before {
            JournalState::Hot => return Ok(Scanned::Traced),
            JournalState::None if !nobody_writes.is_some_and(|ask| ask()) => {
                return Ok(Scanned::Busy);
            }
            _ => {}
        }
        let Some(view) = View::open(&self.paths, false)? else {
            return self.capture_emptied(&mut inner, stamp);
        };
        let seen = self.prepare_view(&inner, &view);
        if self.journal_state()? != before
            || nobody_writes.is_some_and(|ask| !ask())
            || Stamp::of(view.main()).map_err(DbError::io("stat", &self.paths.main))? != stamp
            || !stamp.is_settled()
        {
            return Ok(Scanned::Busy);
        }
        let seen = match seen {
            // Cut meanwhile, or not all written yet.
            Err(DbError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::UnexpectedEof =>
            {
                return Ok(Scanned::Busy);
            }
            seen => seen?,
        };
        self.commit_seen(&mut inner, &view, seen, None)?;
        self.forget_provisional(&mut inner)?;
        inner.stamp = Some(stamp);
        Ok(Scanned::Clean)
    }

    /// Compares a database with a WAL, if nothing is written to either meanwhile. Where no SQLite uses the WAL, that may
    /// have to be done again: other programs write files in their own time.
    fn capture_still_view(&self, inner: &mut Inner, stamp: Stamp) -> Result<Scanned, DbError> {
        let wal_stamp = || {
            std::fs::metadata(&self.paths.wal)
                .ok()
                .map(|m| Stamp::from(&m))
        };
        let before = wal_stamp();
        let Some(view) = View::open(&self.paths, true)? else {
            return Ok(Scanned::Busy);
        };
        let is_in_use = self.is_index_open();
        let seen = self.prepare_view(inner, &view)?;
        let main_stamp = Stamp::of(view.main()).map_err(DbError::io("stat", &self.paths.main))?;
        let is_still = before.is_some_and(|s| s.is_settled()) && before == wal_stamp();
        if !is_still || main_stamp != stamp || !stamp.is_settled() {
            return Ok(Scanned::Busy);
        }
        if !is_in_use {
            self.mark_provisional(inner)?;
        }
        let cursor = cursor_of(&view);
        self.commit_seen(inner, &view, seen, cursor)?;
        if is_in_use {
            self.forget_provisional(inner)?;
        }
        inner.stamp = Some(stamp);
        Ok(Scanned::Clean)
    }

    /// Returns whether programs read and write through a WAL. The header does not tell alone: of a database in a rollback
    /// mode that was a replica's, they go on with the WAL that we made, until the last of them closes it.
    fn is_read_through_wal(&self, main: &File) -> bool {
        std::fs::metadata(&self.paths.wal).is_ok_and(|m| m.len() > 0 || is_wal_mode(main))
    }

    /// Captures what has been committed so far, as far as that can be told without one of SQLite's locks.
    ///
    /// # Errors
    /// Disk or log.
    pub fn capture_now(&self) -> Result<(), DbError> {
        if !self.is_primary() {
            return Ok(());
        }
        self.capture_wal()?;
        if !self.is_captured() {
            self.capture_untraced(None)?;
        }
        Ok(())
    }

    /// Captures what was written without a trace before a journal or a WAL that is about to be made, which tells only of
    /// what comes after it. Who makes it holds SQLite's lock: no transaction is under way.
    ///
    /// # Errors
    /// Disk or log; the file must then not be made.
    pub fn capture_before_journal(&self) -> Result<(), DbError> {
        let mut inner = self.lock();
        if !self.is_primary() {
            return Ok(());
        }
        self.check_not_in_doubt(&inner)?;
        match std::fs::metadata(&self.paths.main) {
            Ok(m) if inner.stamp == Some(Stamp::from(&m)) && !inner.is_replaced => Ok(()),
            Ok(_) => self.capture_view(&mut inner, false),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(DbError::io("stat", &self.paths.main)(e)),
        }
    }

    /// Captures everything committed in the WAL when a checkpoint has copied it into the file, before it may be reset.
    ///
    /// What a commit wrote whose frames nobody can tell from others is found in the file then, which has all of it.
    ///
    /// # Errors
    /// Disk or log; the checkpoint must then fail (INV-DB-2).
    pub fn capture_at_checkpoint(&self) -> Result<(), DbError> {
        let mut inner = self.lock();
        self.capture_wal_locked(&mut inner)?;
        if !self.has_unsigned_frames(&inner)? && !inner.is_provisional {
            return Ok(());
        }
        let Some(view) = View::open(&self.paths, false)? else {
            return Ok(());
        };
        let seen = self.prepare_view(&inner, &view)?;
        let cursor = inner.cursor;
        self.commit_seen(&mut inner, &view, seen, cursor)
    }

    /// Captures the WAL for good, before it is removed or emptied; if all of it is in the database file, which SQLite sees
    /// to, that is known to be captured. If not, the database becomes what the file is, which is compared then.
    ///
    /// # Errors
    /// Disk or log; the removal must then be refused (INV-DB-2).
    pub fn capture_last_of_wal(&self) -> Result<(), DbError> {
        let is_in_file = self.wal_is_in_file()?;
        self.sync_log()?;
        if !is_in_file {
            self.mark_replaced()?;
        }
        Ok(())
    }

    fn wal_is_in_file(&self) -> Result<bool, DbError> {
        let mut inner = self.lock();
        if !self.is_primary() || inner.in_doubt.is_some() {
            return Ok(true);
        }
        self.capture_wal_locked(&mut inner)?;
        let Some(view) = View::open(&self.paths, true)? else {
            return Ok(true);
        };
        let io = || DbError::io("read", &self.paths.main);
        let stamp = Stamp::of(view.main()).map_err(io())?;
        let len = u64::from(inner.page_count) * u64::from(view.page_size.get());
        if inner.trouble.is_some() || inner.page_size != Some(view.page_size) {
            return Ok(true); // compared in any case
        }
        if stamp.size != len || inner.is_provisional {
            return Ok(false);
        }
        if self.wal_went_back(&inner, &view)? {
            return Ok(false);
        }
        let mut page = vec![0; view.page_size.len()];
        for pgno in view.wal_pages().filter(|p| p.get() <= inner.page_count) {
            view.page_in_file(pgno, &mut page).map_err(io())?;
            if inner.checksums.get(pgno) != Some(page_checksum(pgno, &page)) {
                return Ok(false);
            }
        }
        inner.stamp = Some(stamp);
        Ok(true)
    }

    /// Says whether frames were captured that do not count any more: the WAL was written by something other than SQLite.
    fn wal_went_back(&self, inner: &Inner, view: &View) -> Result<bool, DbError> {
        let Some(captured) = inner.cursor else {
            return Ok(false);
        };
        Ok(match view.wal_end {
            Some((header, end)) => {
                (header.salts.0, header.salts.1) == (captured.salt1, captured.salt2)
                    && end.frame_no < captured.frame_no
            }
            None => {
                captured.frame_no > 0
                    && std::fs::metadata(&self.paths.wal).is_ok_and(|m| m.len() > 0)
            }
        })
    }

    /// Captures the difference between all pages as readers see them and what was captured.
    pub(super) fn capture_view(&self, inner: &mut Inner, with_wal: bool) -> Result<(), DbError> {
        let Some(view) = View::open(&self.paths, with_wal)? else {
            return Ok(());
        };
        // Of before: what is written meanwhile is not in it.
        let stamp = Stamp::of(view.main()).map_err(DbError::io("stat", &self.paths.main))?;
        let seen = self.prepare_view(inner, &view)?;
        self.commit_seen(inner, &view, seen, cursor_of(&view))?;
        inner.stamp = Some(stamp);
        Ok(())
    }

    fn prepare_view(&self, inner: &Inner, view: &View) -> Result<Seen, DbError> {
        let io = || DbError::io("read", &self.paths.main);
        let sums = view.checksums().map_err(io())?;
        if sums.page_count() < view.page_count {
            return Err(DbError::Corrupt {
                what: format!(
                    "{} of {} pages (a copy that is not finished, or a damaged file to be restored)",
                    sums.page_count(),
                    view.page_count
                ),
                path: self.paths.main.clone(),
            });
        }
        let changed: Vec<Pgno> = if inner.page_size == Some(view.page_size) {
            inner
                .checksums
                .differing_pages(&sums)
                .filter(|p| p.get() <= view.page_count)
                .collect()
        } else {
            (1..=view.page_count)
                .filter_map(Pgno::new)
                .filter(|p| *p != view.page_size.lock_pgno())
                .collect()
        };
        if changed.len() * view.page_size.len() > MAX_RANGE_LEN {
            return Ok(Seen {
                sums,
                changed,
                bytes: None,
            });
        }
        let mut bytes = vec![0; changed.len() * view.page_size.len()];
        for (pgno, page) in changed
            .iter()
            .zip(bytes.chunks_exact_mut(view.page_size.len()))
        {
            view.page(*pgno, page).map_err(io())?;
        }
        Ok(Seen {
            sums,
            changed,
            bytes: Some(bytes),
        })
    }

    fn commit_seen(
        &self,
        inner: &mut Inner,
        view: &View,
        seen: Seen,
        cursor: Option<WalCursor>,
    ) -> Result<(), DbError> {
        if seen.changed.is_empty()
            && inner.page_count == view.page_count
            && inner.page_size == Some(view.page_size)
        {
            if cursor.is_some() {
                inner.cursor = cursor;
            }
            return self.forget_replaced(inner);
        }
        crate::disk::crash_point(super::steps::CAPTURE_SCAN);
        let committed = match seen.bytes {
            Some(bytes) => {
                let pages = seen
                    .changed
                    .iter()
                    .copied()
                    .zip(bytes.chunks_exact(view.page_size.len()))
                    .collect();
                let range = Range {
                    page_size: view.page_size,
                    page_count: view.page_count,
                    tx_count: 1,
                    pages,
                    cursor,
                };
                self.commit_range(inner, &range)
            }
            None => self.restart_at(inner, seen.sums, view.page_size, view.page_count, cursor),
        };
        committed.and_then(|()| self.forget_replaced(inner))
    }

    /// Notes, durably, that another file takes the place of the database, or that it is emptied: until all its pages
    /// were compared, the log tells nothing about it.
    ///
    /// # Errors
    /// Disk; it must then not be done.
    pub fn mark_replaced(&self) -> Result<(), DbError> {
        let mut inner = self.lock();
        if !self.is_primary() || inner.page_count == 0 || inner.is_replaced {
            return Ok(());
        }
        self.write_mark(&inner)?;
        inner.is_replaced = true;
        Ok(())
    }

    /// Notes, durably, that the file may not be whole yet: a start compares it.
    pub(super) fn mark_provisional(&self, inner: &mut Inner) -> Result<(), DbError> {
        self.write_mark(inner)?;
        inner.is_provisional = true;
        Ok(())
    }

    fn write_mark(&self, inner: &Inner) -> Result<(), DbError> {
        if inner.is_replaced || inner.is_provisional {
            return Ok(());
        }
        let mark = self.replaced_mark();
        File::create(&mark)
            .and_then(|file| file.sync_all())
            .and_then(|()| File::open(&self.paths.meta)?.sync_all())
            .map_err(DbError::io("write", &mark))
    }

    /// Learns that a program uses the database, and that all its pages were compared since.
    fn forget_provisional(&self, inner: &mut Inner) -> Result<(), DbError> {
        if std::mem::take(&mut inner.is_provisional) {
            inner.is_replaced = true; // whose mark it is
        }
        self.forget_replaced(inner)
    }

    pub(super) fn forget_replaced(&self, inner: &mut Inner) -> Result<(), DbError> {
        if inner.is_replaced {
            // Without the record of it, a start after a power cut would take the file for one that the log knows better.
            self.log.sync().map_err(self.log_error())?;
            if !inner.is_provisional {
                let mark = self.replaced_mark();
                std::fs::remove_file(&mark).map_err(DbError::io("remove", &mark))?;
            }
            inner.is_replaced = false;
        }
        Ok(())
    }

    /// Returns whether the file may have been captured before it was whole.
    #[must_use]
    pub fn is_provisional(&self) -> bool {
        self.lock().is_provisional
    }

    /// Returns whether the file has to be compared, for another took its place.
    #[must_use]
    pub fn is_replaced(&self) -> bool {
        self.lock().is_replaced
    }

    pub(super) fn replaced_mark(&self) -> std::path::PathBuf {
        self.paths.meta.join("replaced")
    }

    /// The file is empty: to a replica, dropped.
    fn capture_emptied(&self, inner: &mut Inner, stamp: Stamp) -> Result<Scanned, DbError> {
        if stamp.size > 0 {
            // Not a database any more, or not yet; whoever writes it is not done.
            return Ok(Scanned::Busy);
        }
        if inner.page_count > 0 {
            self.commit_drop(inner)?;
        }
        self.forget_replaced(inner)?;
        inner.stamp = Some(stamp);
        Ok(Scanned::Clean)
    }

    fn journal_state(&self) -> Result<JournalState, DbError> {
        let journal = match File::open(&self.paths.journal) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(JournalState::None),
            Err(e) => return Err(DbError::io("open", &self.paths.journal)(e)),
        };
        let mut head = [0; 28];
        let n = super::capture_wal::read_full(&journal, &mut head, 0)
            .map_err(DbError::io("read", &self.paths.journal))?;
        if n == 0 {
            return Ok(JournalState::None);
        }
        if journal::is_hot_header(&head[..n]) {
            return Ok(JournalState::Hot);
        }
        if n < head.len() || !journal::is_zeroed_header(&head) {
            // Begun and not yet synced: the database has not been written.
            return Ok(JournalState::None);
        }
        let stamp = Stamp::of(&journal).map_err(DbError::io("stat", &self.paths.journal))?;
        Ok(JournalState::Zeroed(stamp))
    }
}

/// Returns where the committed part of the WAL ends.
fn cursor_of(view: &View) -> Option<WalCursor> {
    view.wal_end.map(|(header, end)| WalCursor {
        salt1: header.salts.0,
        salt2: header.salts.1,
        frame_no: end.frame_no,
        checksum1: end.checksum.0,
        checksum2: end.checksum.1,
    })
}

/// Returns whether the file itself says that it is in WAL mode.
pub(super) fn is_wal_mode(main: &File) -> bool {
    let mut head = [0; DB_HEADER_LEN];
    super::capture_wal::read_full(main, &mut head, 0).is_ok_and(|n| n == head.len())
        && DbHeader::parse(&head).is_some_and(|h| h.is_wal())
}

/// Pages that differ, with their bytes unless they are too many for a range.
struct Seen {
    sums: super::page_checksums::PageChecksums,
    changed: Vec<Pgno>,
    bytes: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum JournalState {
    None,
    /// Left by a finished transaction in PERSIST mode, and not written since.
    Zeroed(Stamp),
    Hot,
}

impl Db {
    /// Starts the log anew at a state that is too far from the last one to be carried by a record.
    pub(super) fn restart_at(
        &self,
        inner: &mut Inner,
        sums: super::page_checksums::PageChecksums,
        page_size: PageSize,
        page_count: u32,
        cursor: Option<WalCursor>,
    ) -> Result<(), DbError> {
        use std::sync::atomic::Ordering;
        let pos = crate::ltx::Pos {
            txid: inner.pos.txid.next(),
            post_apply_checksum: sums.total(),
        };
        let meta = super::log::RecordMeta {
            epoch: self.node.epoch.load(Ordering::Acquire),
            min_txid: pos.txid,
            max_txid: pos.txid,
            pre_apply_checksum: inner.pos.post_apply_checksum,
            post_apply_checksum: pos.post_apply_checksum,
            timestamp_ms: crate::clock::wall_ms(),
            commit: page_count,
            page_size,
            wal: cursor,
        };
        self.log
            .restart(&meta, super::log::Older::Remove)
            .map_err(self.log_error())?;
        inner.checksums = sums;
        inner.page_size = Some(page_size);
        inner.page_count = page_count;
        inner.cursor = cursor;
        inner.pos = pos;
        self.publish(inner, meta.timestamp_ms);
        Ok(())
    }
}
