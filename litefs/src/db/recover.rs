//! Opens a database at the start of the daemon, before the mount, whatever state the last end left it in.
//!
//! | what is found | what is done |
//! |---|---|
//! | page cache survived (clean stop, or the daemon alone died) | log and checksums are believed; the WAL's tail is captured |
//! | power was lost: pages, WAL and log may each be older or newer than the others | every page is read and compared |
//! | the files are older than the log, or pages of them were damaged | what differs is written back from the log |
//! | the files are newer, or the log does not have what differs, on the primary | they are what SQLite shows: captured as one transaction |
//! | the same, on a replica | reported as it is; the primary sends the difference |
//! | a start that was interrupted while it wrote back | it writes back again: a mark says so |
//! | a hot journal | rolled back, as SQLite would at its next open; not if its super-journal is gone: that was the commit |
//! | the node died as a replica and is primary now | what differs is written back from the log, which a replica writes first |
//! | the database file was changed after a clean end | captured as one transaction: somebody put it there |
//! | the log's end is damaged | the log goes on from the page checksums, or after numbers left out; then as above |
//!
//! The log is not synced before a program's commit is, so after a power cut it may be behind. Which of the two is newer
//! is told by the salts of the WAL, of which the first counts up at each reset and which SQLite syncs, or in a rollback
//! mode by the change counter, which every transaction counts up. Where there is no WAL any more, or the log's end does
//! not say which it came from, the file is older if it is a state that the log has been through: before a WAL is removed
//! or truncated, the log is synced.
//!
//! Nothing here refuses to start the node; a database that cannot be opened stays alone with its error.

use std::fs::{File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::commit::KEEP_BUFFER;
use super::log::{Finding, Log, Older, ReadAfter, WalCursor};
use super::page_checksums::{Loaded, PageChecksums, Unusable};
use super::view::View;
use super::{Db, DbError, DbPaths, Gate, Inner, NodeContext, Published, Stamp, Trust, steps};
use crate::disk::crash_point;
use crate::ltx::{Decoder, PageSize, Pgno, Pos};
use crate::replication::DbName;
use crate::sqlite::header::DbHeader;
use crate::sqlite::journal;

/// What is kept with the page checksums.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Extra {
    cursor: Option<[u32; 5]>,
    stamp: Option<(u64, i64, i64, u64)>,
    page_count: u32,
    page_size: u32,
    /// The database, should the file with its name be damaged.
    #[serde(default)]
    name: String,
    /// The database file as a clean end left it.
    #[serde(default)]
    end: Option<(u64, i64, i64, u64)>,
}

/// What became of a journal found at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rollback {
    /// There was none, or it meant nothing.
    None,
    /// It was played back.
    Done,
    /// Whether it means something is SQLite's to say.
    Left,
}

/// How the files compare with the log's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Age {
    Older,
    Same,
    Newer,
    /// Only one of WAL and log's end says which WAL it is about: the WAL never reached the disk, or it was removed when
    /// all of it was in the file, or damage left the log without its segments (an LTX file does not tell). The log is
    /// synced before a removal, so a file that is a state of the log's past is older, and any other is not.
    OlderIfInLog,
}

/// A WAL that was removed begins anew with random salts; one that was reset so often since is taken for such.
const MAX_RESETS: i32 = 1 << 12;

/// More transactions than a log ever lost by damage to its end.
const NUMBERS_LEFT_OUT: u64 = 1 << 20;

impl Db {
    /// Opens a database.
    ///
    /// # Errors
    /// Disk, log.
    pub fn open(
        node: Arc<NodeContext>,
        name: DbName,
        meta: PathBuf,
        trust: Trust,
    ) -> Result<Db, DbError> {
        let paths = DbPaths::new(&node.files, &node.mount, meta, name.as_str().as_ref());
        for path in [&paths.main, &paths.wal, &paths.journal] {
            let kind = std::fs::symlink_metadata(path).map(|m| m.file_type());
            if kind.is_ok_and(|kind| !kind.is_file() && !kind.is_dir()) {
                // Opening a pipe would wait for its other end.
                let what =
                    "something that is no ordinary file has the name of a database (move it away)"
                        .to_owned();
                let path = path.clone();
                return Err(DbError::Corrupt { what, path });
            }
        }
        std::fs::create_dir_all(&paths.meta)
            .map_err(DbError::io("create directory", &paths.meta))?;
        let (log, opened) =
            Log::open(node.disk.clone(), &paths.meta, node.log_options).map_err(|source| {
                DbError::Log {
                    db: name.to_string(),
                    source,
                }
            })?;
        let is_found_now = trust == Trust::Running && node.is_primary();
        let mut trust = trust;
        let mut is_damaged = false;
        let mut is_end_lost = false;
        for finding in &opened.findings {
            match finding {
                Finding::TornTail { .. } => {
                    tracing::info!(db = %name, ?finding, "log ended in the middle of a write")
                }
                Finding::Damaged { .. } | Finding::Unreachable { .. }
                    if trust == Trust::Nothing =>
                {
                    // Pages that were not synced reach the disk in any order.
                    tracing::warn!(db = %name, ?finding, "power was lost and the log is damaged; what was damaged is kept aside, and all pages are compared");
                }
                Finding::Damaged { path, kept, .. } | Finding::Unreachable { path, kept } => {
                    is_damaged = true;
                    is_end_lost |= was_at_the_end(path, kept, opened.end.map(|end| end.max_txid));
                    tracing::error!(
                        db = %name, path = %path.display(), kept = %kept.display(), ?finding,
                        "log is damaged, what was damaged is kept aside: all pages are compared; \
                         replicas that need it get page copies; remove what is kept once it is not needed"
                    );
                }
                _ => tracing::debug!(db = %name, ?finding, "log"),
            }
        }
        if is_damaged {
            trust = Trust::Nothing;
        }
        let loaded = match PageChecksums::load(&*node.disk, &paths.meta) {
            Ok(loaded) => Some(loaded),
            Err(Unusable::Missing) => None,
            Err(why) if trust == Trust::Nothing => {
                tracing::info!(db = %name, %why, "power was lost while page checksums were written: all pages are read");
                None
            }
            Err(why) => {
                tracing::error!(
                    db = %name, path = %paths.meta.join("page-checksums.*").display(), %why,
                    "page checksums are damaged: all pages are read, and the file written anew"
                );
                None
            }
        };
        let db = Db {
            log,
            is_primary: std::sync::atomic::AtomicBool::new(node.takes_writes()),
            is_closed: std::sync::atomic::AtomicBool::new(false),
            inner: Mutex::new(Inner {
                page_size: None,
                page_count: 0,
                checksums: PageChecksums::new(PageSize::DEFAULT),
                pos: Pos::ZERO,
                cursor: None,
                index_change: None,
                wal: None,
                stamp: None,
                replica_wal: None,
                encoded: Vec::new(),
                frames: Vec::new(),
                trouble: None,
                is_replaced: false,
                is_provisional: false,
                unseen: None,
                in_doubt: None,
            }),
            published: Mutex::new(Published::default()),
            gate: Mutex::new(Gate::default()),
            index_users: std::sync::atomic::AtomicU32::new(0),
            captured_bytes: std::sync::atomic::AtomicU64::new(0),
            captured_at_upkeep: std::sync::atomic::AtomicU64::new(0),
            unwritten: Mutex::new(None),
            durable: Mutex::new(Pos::ZERO),
            pins: Mutex::new(Vec::new()),
            name,
            paths,
            node,
        };
        {
            let mut inner = db.lock();
            let loaded = loaded.map(|table| {
                let extra: Extra = serde_json::from_slice(&table.extra).unwrap_or_default();
                (table, extra)
            });
            if is_end_lost && let Some((table, extra)) = &loaded {
                db.go_on_from_table(table, extra)?;
            }
            let end_stamp = loaded.as_ref().and_then(|(_, extra)| extra.end);
            let is_known = db.restore_checksums(&mut inner, loaded)?;
            if !is_known {
                trust = Trust::Nothing;
            }
            if is_end_lost && db.is_primary() {
                db.leave_numbers_out(&mut inner)?;
            }
            db.finish_replacing()?;
            db.clean_lost()?;
            if db.is_primary() || !db.is_giving_way() {
                db.end_giving_way()?;
            }
            let mut journal = Rollback::None;
            if !is_found_now && (db.is_primary() || db.log.end().is_some()) {
                journal = db.roll_back_journal()?;
            }
            let is_healing = db.healing_mark().exists();
            if is_healing {
                trust = Trust::Nothing;
            }
            inner.is_replaced = db.replaced_mark().exists();
            if inner.is_replaced {
                trust = Trust::Nothing;
            }
            if is_found_now {
                // A journal may be that of a transaction under way, and pages half of it.
                inner.stamp = None;
            } else if db.is_primary() {
                db.recover_primary(
                    &mut inner,
                    is_known,
                    trust,
                    end_stamp.map(stamp_from),
                    is_healing,
                    journal,
                )?;
            } else {
                db.recover_replica(&mut inner, trust != Trust::Nothing)?;
            }
            if is_healing {
                db.end_healing()?;
            }
            let timestamp_ms = db.log.end().map_or(0, |m| m.timestamp_ms);
            db.publish(&inner, timestamp_ms);
        }
        Ok(db)
    }

    /// Returns which database a directory is about, from the page checksums in it.
    #[must_use]
    pub fn recorded_name(disk: &dyn crate::disk::Disk, meta: &std::path::Path) -> Option<DbName> {
        let loaded = PageChecksums::load(disk, meta).ok()?;
        let extra: Extra = serde_json::from_slice(&loaded.extra).ok()?;
        extra.name.parse().ok()
    }

    /// Begins the log anew at the position of the page checksums, if damage made it end before that.
    fn go_on_from_table(&self, table: &Loaded, extra: &Extra) -> Result<(), DbError> {
        let (Some(end), Some(page_size)) = (self.log.end(), PageSize::new(extra.page_size)) else {
            return Ok(());
        };
        if table.at.txid <= end.max_txid {
            return Ok(());
        }
        let meta = super::log::RecordMeta {
            min_txid: table.at.txid,
            max_txid: table.at.txid,
            post_apply_checksum: table.at.post_apply_checksum,
            commit: extra.page_count,
            page_size,
            wal: extra.cursor.map(cursor_from),
            ..end
        };
        tracing::warn!(db = %self.name, was = %end.pos(), now = %table.at, "the log goes on where the page checksums are");
        self.log
            .restart(&meta, Older::Quarantine)
            .map_err(self.log_error())
    }

    /// Leaves out TXIDs that transactions lost by the log may have had: a number never means two of them.
    fn leave_numbers_out(&self, inner: &mut Inner) -> Result<(), DbError> {
        let Some(end) = self.log.end().filter(|end| end.pos() == inner.pos) else {
            return Ok(());
        };
        if self.log.base() == end.max_txid {
            return Ok(()); // it goes on from the page checksums
        }
        let txid = crate::ltx::Txid(end.max_txid.0 + NUMBERS_LEFT_OUT);
        let meta = super::log::RecordMeta {
            min_txid: txid,
            max_txid: txid,
            ..end
        };
        self.log
            .restart(&meta, Older::Quarantine)
            .map_err(self.log_error())?;
        inner.pos = meta.pos();
        tracing::warn!(db = %self.name, was = %end.pos(), now = %inner.pos, "the end of the log is lost, its numbers are not used again");
        Ok(())
    }

    /// Brings the checksums to the log's end. Returns whether they are those of its position.
    fn restore_checksums(
        &self,
        inner: &mut Inner,
        loaded: Option<(Loaded, Extra)>,
    ) -> Result<bool, DbError> {
        let end = self.log.end_pos();
        if let Some((loaded, extra)) = loaded {
            inner.page_size = PageSize::new(extra.page_size).filter(|_| extra.page_count > 0);
            inner.page_count = extra.page_count;
            inner.pos = loaded.at;
            inner.checksums = loaded.checksums;
            inner.cursor = extra.cursor.map(cursor_from);
            inner.stamp = extra.stamp.map(stamp_from);
        } else if self.log.end().is_some() && self.log.base().0 > 0 {
            // The log does not begin at the beginning, and what came before is not known: read everything.
            self.take_log_end(inner);
            return Ok(end == Pos::ZERO);
        }
        if inner.pos == end {
            return Ok(true);
        }
        if self.check_position(inner.pos).is_err() {
            self.take_log_end(inner);
            return Ok(false);
        }
        loop {
            let read = self
                .log
                .read_after(inner.pos.txid, KEEP_BUFFER)
                .map_err(self.log_error())?;
            let ReadAfter::Records(records) = read else {
                break;
            };
            for record in records {
                let mut decoder = Decoder::new(&record.ltx).map_err(self.ltx_error())?;
                let header = decoder.header().clone();
                if inner.page_size != Some(header.page_size) {
                    inner.checksums = PageChecksums::new(header.page_size);
                }
                inner.checksums.truncate(header.commit);
                let mut page = vec![0; header.page_size.len()];
                while let Some(pgno) = decoder.next_page(&mut page).map_err(self.ltx_error())? {
                    inner
                        .checksums
                        .set(pgno, crate::ltx::page_checksum(pgno, &page));
                }
                inner.page_size = (header.commit > 0).then_some(header.page_size);
                inner.page_count = header.commit;
                inner.pos = record.meta.pos();
                inner.cursor = record.meta.wal;
                inner.stamp = None;
            }
        }
        Ok(inner.pos == end && inner.checksums.total() == end.post_apply_checksum)
    }

    fn take_log_end(&self, inner: &mut Inner) {
        if let Some(end) = self.log.end() {
            inner.pos = end.pos();
            inner.cursor = end.wal;
            inner.page_count = end.commit;
            inner.page_size = (end.commit > 0).then_some(end.page_size);
        }
        inner.checksums = PageChecksums::new(inner.page_size.unwrap_or(PageSize::DEFAULT));
        inner.stamp = None;
    }

    /// Returns whether the log has a commit that was held until a quorum had it, and that never reached the WAL: the log
    /// is right then (adr/0010). Frames that were captured from the WAL are in it as long as it is the same one.
    fn wal_ends_before_log(&self, inner: &Inner) -> Result<bool, DbError> {
        let Some(cursor) = inner.cursor.filter(|c| c.frame_no > 0) else {
            return Ok(false);
        };
        let end = View::open(&self.paths, true)?.and_then(|view| view.wal_end);
        Ok(end.is_some_and(|(header, end)| {
            (header.salts.0, header.salts.1) == (cursor.salt1, cursor.salt2)
                && end.frame_no < cursor.frame_no
        }))
    }

    /// Undoes a transaction that was under way when its program died, as SQLite would.
    pub(super) fn roll_back_journal(&self) -> Result<Rollback, DbError> {
        let Ok(file) = File::open(&self.paths.journal) else {
            return Ok(Rollback::None);
        };
        if !self.paths.main.exists() {
            return Ok(Rollback::None); // to SQLite it means nothing then
        }
        let mut head = [0; 1];
        if file.read_at(&mut head, 0).unwrap_or(0) == 0 || !journal::is_hot_header(&head) {
            return Ok(Rollback::None);
        }
        if let Ok(Some(name)) = journal::super_journal(&file) {
            // A transaction of several databases is committed when the file that they share is gone.
            match self.find_super_journal(&name) {
                Some(true) => {}
                Some(false) => return Ok(Rollback::None),
                None => {
                    tracing::warn!(db = %self.name, super_journal = %String::from_utf8_lossy(&name), "a transaction of several databases was under way, and where its super-journal is cannot be told here: left to sqlite, at the next open");
                    return Ok(Rollback::Left);
                }
            }
        }
        let plan = match journal::playback(&file) {
            Ok(plan) => plan,
            Err(error) => {
                tracing::warn!(db = %self.name, %error, "journal cannot be rolled back here, left to sqlite");
                return Ok(Rollback::None);
            }
        };
        let io = || DbError::io("write", &self.paths.main);
        let main = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.paths.main)
            .map_err(io())?;
        crash_point(steps::ROLL_BACK_CUT);
        main.set_len(u64::from(plan.page_count) * u64::from(plan.page_size.get()))
            .map_err(io())?;
        let mut page = vec![0; plan.page_size.len()];
        for (pgno, offset) in plan.pages {
            file.read_exact_at(&mut page, offset)
                .map_err(DbError::io("read", &self.paths.journal))?;
            crash_point(steps::ROLL_BACK_PAGE);
            main.write_all_at(&page, plan.page_size.offset(pgno))
                .map_err(io())?;
        }
        main.sync_data().map_err(io())?;
        crash_point(steps::ROLL_BACK_REMOVE);
        // Where it is mounted: as long as the kernel has the name, the journal is hot to SQLite, and every reader waits.
        let relative = super::paths::with_suffix(&self.paths.relative, "-journal");
        self.node.invalidate(|inv| inv.forget_file(&relative));
        std::fs::remove_file(&self.paths.journal)
            .map_err(DbError::io("remove", &self.paths.journal))?;
        self.node.invalidate(|inv| inv.name(&relative));
        tracing::info!(db = %self.name, "rolled back an interrupted transaction");
        Ok(Rollback::Done)
    }

    /// Tells whether a super-journal exists; nothing if its name says nothing here, as where a program sees the mount
    /// elsewhere.
    fn find_super_journal(&self, name: &[u8]) -> Option<bool> {
        let name = Path::new(std::ffi::OsStr::from_bytes(name));
        let path = match name.strip_prefix(&self.node.mount) {
            Ok(relative) => self.node.files.join(relative),
            Err(_) => name.to_owned(),
        };
        if path.exists() || self.paths.main.with_file_name(name.file_name()?).exists() {
            return Some(true);
        }
        path.parent().filter(|dir| dir.is_dir()).map(|_| false)
    }

    fn recover_primary(
        &self,
        inner: &mut Inner,
        is_known: bool,
        trust: Trust,
        end_stamp: Option<Stamp>,
        is_healing: bool,
        journal: Rollback,
    ) -> Result<(), DbError> {
        let stamp = File::open(&self.paths.main)
            .ok()
            .and_then(|f| Stamp::of(&f).ok());
        let is_replaced = trust == Trust::CleanEnd && inner.page_count > 0 && stamp != end_stamp;
        let is_held = self.wal_ends_before_log(inner)?;
        if trust != Trust::Nothing && !is_replaced && !is_held && inner.page_count > 0 {
            self.capture_wal_locked(inner)?;
            let stamp = File::open(&self.paths.main)
                .ok()
                .and_then(|f| Stamp::of(&f).ok());
            let is_wal = match View::open(&self.paths, true)? {
                Some(view) if view.header.is_wal() && inner.page_size == Some(view.page_size) => {
                    let mut page = vec![0; view.page_size.len()];
                    view.page(Pgno::ONE, &mut page)
                        .map_err(DbError::io("read", &self.paths.main))?;
                    inner.checksums.get(Pgno::ONE)
                        == Some(crate::ltx::page_checksum(Pgno::ONE, &page))
                }
                _ => false,
            };
            if inner.trouble.is_none() && (is_wal || (stamp.is_some() && stamp == inner.stamp)) {
                return Ok(());
            }
        }
        inner.trouble = None;
        if journal == Rollback::Left {
            inner.trouble = Some("a transaction of several databases was under way".into());
            return Ok(());
        }
        // A primary's files cannot be older than its log unless power was lost, or what the log has was rolled back.
        let cannot_be_older = trust != Trust::Nothing && journal == Rollback::None;
        let mut age = match is_replaced || inner.is_replaced || cannot_be_older {
            true => Age::Newer,
            false => self.age_of_files(inner)?,
        };
        if is_healing || is_held || self.node.was_replica.load(Ordering::Acquire) {
            // Neither the old state nor the new one: only the log knows.
            age = Age::Older;
        }
        // What the WAL has is put on top of the checksums; without them its range would end in a wrong one.
        if age == Age::Same && is_known {
            self.capture_wal_by_frames(inner)?;
        }
        let Some(view) = View::open(&self.paths, true)? else {
            if inner.page_count > 0 {
                return self.rebuild_from_log(inner);
            }
            return Ok(());
        };
        let actual = view
            .checksums()
            .map_err(DbError::io("read", &self.paths.main))?;
        if actual.total() == inner.pos.post_apply_checksum && view.page_count == inner.page_count {
            inner.checksums = actual;
            return self.forget_replaced(inner);
        }
        drop(view);
        if age == Age::OlderIfInLog {
            age = if self.is_in_log(actual.total()) {
                Age::Older
            } else {
                Age::Newer
            };
        }
        if age != Age::Newer && self.heal_from_log(inner, &actual)? {
            return Ok(());
        }
        if self.log.end().is_none() {
            tracing::info!(db = %self.name, path = %self.paths.main.display(), "database is new here, it is captured as one transaction");
            return self.capture_view(inner, true);
        }
        let why = match is_replaced || inner.is_replaced {
            true => "database was replaced, or changed while litefs was stopped",
            false => "database holds what the log lost",
        };
        tracing::warn!(
            db = %self.name, path = %self.paths.main.display(), pos = %inner.pos, ?age,
            "{why}, it is captured as one transaction"
        );
        self.capture_view(inner, true)?;
        // Or the next start may find the log's old end, and frames of this branch where those of the other were.
        self.log.sync().map(drop).map_err(self.log_error())
    }

    /// Tells whether the files are older or newer than the log's end; `Same` also where the WAL goes on from there.
    fn age_of_files(&self, inner: &Inner) -> Result<Age, DbError> {
        let Some(view) = View::open(&self.paths, true)? else {
            return Ok(Age::Same);
        };
        let age = match (inner.cursor, &view.wal_end) {
            (Some(cursor), Some((wal, end))) => {
                #[expect(clippy::cast_possible_wrap, reason = "a distance on a circle")]
                let resets = wal.salts.0.wrapping_sub(cursor.salt1) as i32;
                match resets {
                    0 if wal.salts.1 != cursor.salt2 => Age::Newer,
                    0 if end.frame_no < cursor.frame_no => Age::Older,
                    0 => Age::Same,
                    _ if (-MAX_RESETS..0).contains(&resets) => Age::Older,
                    // Far away: the WAL was removed, all of it in the file, and another one made.
                    _ => Age::Newer,
                }
            }
            // The change counter tells nothing: few transactions of a WAL touch it.
            _ if view.header.is_wal() => Age::OlderIfInLog,
            (None, Some((_, end))) if end.frame_no > 0 => Age::Newer,
            _ => self.age_by_counter(inner, &view.header)?,
        };
        Ok(age)
    }

    /// Returns whether the database had this checksum at a position that the log leads on from.
    fn is_in_log(&self, checksum: crate::ltx::Checksum) -> bool {
        self.log
            .newest_first()
            .map_while(Result::ok)
            .any(|record| record.meta.pre_apply_checksum == checksum)
    }

    /// Compares the change counter of the file with that of the log's newest page 1.
    fn age_by_counter(&self, inner: &Inner, header: &DbHeader) -> Result<Age, DbError> {
        let Some(in_log) = self.newest_in_log(inner, Pgno::ONE)? else {
            return Ok(Age::Same);
        };
        let Some(in_log) = DbHeader::parse(&in_log) else {
            return Ok(Age::Same);
        };
        #[expect(clippy::cast_possible_wrap, reason = "a distance on a circle")]
        let commits = header.change_counter.wrapping_sub(in_log.change_counter) as i32;
        Ok(match commits {
            0 => Age::OlderIfInLog,
            1.. => Age::Newer,
            _ => Age::Older,
        })
    }

    /// Returns the newest version of a page that the log has, if it can be read.
    fn newest_in_log(&self, inner: &Inner, wanted: Pgno) -> Result<Option<Vec<u8>>, DbError> {
        for record in self.log.newest_first() {
            let Ok(record) = record else { return Ok(None) };
            let mut decoder = match Decoder::new(&record.ltx) {
                Ok(d) if Some(d.header().page_size) == inner.page_size => d,
                _ => return Ok(None),
            };
            let mut page = vec![0; decoder.header().page_size.len()];
            while let Some(pgno) = decoder.next_page(&mut page).map_err(self.ltx_error())? {
                if pgno == wanted {
                    return Ok(Some(page));
                }
            }
        }
        Ok(None)
    }

    /// Writes back pages that the log has and the files lost. Returns whether that explains every difference.
    fn heal_from_log(&self, inner: &mut Inner, actual: &PageChecksums) -> Result<bool, DbError> {
        let Some(page_size) = inner.page_size else {
            return Ok(false);
        };
        if actual.page_size() != page_size {
            return Ok(false);
        }
        let expected = inner.checksums.clone();
        if expected.total() != inner.pos.post_apply_checksum {
            return Ok(false);
        }
        let mut missing: std::collections::BTreeMap<Pgno, Option<Vec<u8>>> = expected
            .differing_pages(actual)
            .filter(|p| p.get() <= inner.page_count)
            .map(|p| (p, None))
            .collect();
        let mut left = missing.len();
        for record in self.log.newest_first() {
            if left == 0 {
                break;
            }
            let Ok(record) = record else { return Ok(false) };
            let mut decoder = match Decoder::new(&record.ltx) {
                Ok(d) if d.header().page_size == page_size => d,
                _ => return Ok(false),
            };
            let mut page = vec![0; page_size.len()];
            while let Some(pgno) = decoder.next_page(&mut page).map_err(self.ltx_error())? {
                if let Some(slot @ None) = missing.get_mut(&pgno)
                    && expected.get(pgno) == Some(crate::ltx::page_checksum(pgno, &page))
                {
                    *slot = Some(page.clone());
                    left -= 1;
                }
            }
        }
        if left > 0 {
            return Ok(false);
        }
        self.begin_healing()?;
        self.fold_wal_into_file()?;
        let io = || DbError::io("write", &self.paths.main);
        let main = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.paths.main);
        let main = main.map_err(io())?;
        for (pgno, page) in missing.iter().filter_map(|(p, d)| Some((p, d.as_ref()?))) {
            crash_point(steps::HEAL_PAGE);
            main.write_all_at(page, page_size.offset(*pgno))
                .map_err(io())?;
        }
        crash_point(steps::HEAL_CUT);
        main.set_len(u64::from(inner.page_count) * u64::from(page_size.get()))
            .map_err(io())?;
        main.sync_data().map_err(io())?;
        self.end_healing()?;
        tracing::warn!(db = %self.name, pages = missing.len(), pos = %inner.pos, "pages lost by the files were written back from the log");
        inner.cursor = None;
        inner.stamp = Stamp::of(&main).ok();
        Ok(true)
    }

    /// There while pages are written back: until it is gone, the files are neither an old state nor the log's.
    fn healing_mark(&self) -> PathBuf {
        self.paths.meta.join("healing")
    }

    fn begin_healing(&self) -> Result<(), DbError> {
        let mark = self.healing_mark();
        File::create(&mark)
            .and_then(|file| file.sync_all())
            .and_then(|()| File::open(&self.paths.meta)?.sync_all())
            .map_err(DbError::io("write", &mark))
    }

    /// The WAL that was folded is gone for good before the mark is.
    fn end_healing(&self) -> Result<(), DbError> {
        let mark = self.healing_mark();
        let files = self.paths.main.parent().unwrap_or(&self.paths.main);
        File::open(files)
            .and_then(|dir| dir.sync_all())
            .and_then(|()| match std::fs::remove_file(&mark) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
                _ => File::open(&self.paths.meta)?.sync_all(),
            })
            .map_err(DbError::io("remove", &mark))
    }

    /// The file is gone: makes it again if the log has all pages, else gives it up as dropped.
    fn rebuild_from_log(&self, inner: &mut Inner) -> Result<(), DbError> {
        let nothing = PageChecksums::new(inner.page_size.unwrap_or(PageSize::DEFAULT));
        if self.heal_from_log(inner, &nothing)? {
            return Ok(());
        }
        tracing::error!(db = %self.name, pos = %inner.pos, path = %self.paths.main.display(), "database file is gone, recorded as dropped");
        self.commit_drop(inner)
    }

    /// Copies what the WAL has into the file and removes WAL and wal-index; nobody has the database open.
    pub(super) fn fold_wal_into_file(&self) -> Result<(), DbError> {
        self.fold_into_file()?;
        for path in [&self.paths.shm, &self.paths.wal] {
            crash_point(steps::FOLD_REMOVE);
            match std::fs::remove_file(path) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(DbError::io("remove", path)(e)),
            }
        }
        Ok(())
    }

    /// Copies what the WAL has into the file; nobody is in a transaction.
    pub(super) fn fold_into_file(&self) -> Result<(), DbError> {
        if let Some(view) = View::open(&self.paths, true)? {
            let io = || DbError::io("write", &self.paths.main);
            let main = OpenOptions::new()
                .write(true)
                .open(&self.paths.main)
                .map_err(io())?;
            let mut page = vec![0; view.page_size.len()];
            for pgno in view.wal_pages().filter(|p| p.get() <= view.page_count) {
                view.page(pgno, &mut page).map_err(io())?;
                crash_point(steps::FOLD_PAGE);
                main.write_all_at(&page, view.page_size.offset(pgno))
                    .map_err(io())?;
            }
            if view.wal_end.is_some() {
                crash_point(steps::FOLD_CUT);
                main.set_len(u64::from(view.page_count) * u64::from(view.page_size.get()))
                    .map_err(io())?;
            }
            main.sync_data().map_err(io())?;
        }
        Ok(())
    }

    fn recover_replica(&self, inner: &mut Inner, is_trusted: bool) -> Result<(), DbError> {
        if self.log.end().is_none() && inner.pos == Pos::ZERO {
            return Ok(()); // what has its names here is not its own, and is moved away when it comes
        }
        if inner.page_count > 0 || self.paths.wal.exists() {
            self.fold_wal_into_file()?;
        }
        inner.cursor = None;
        let stamp = File::open(&self.paths.main)
            .ok()
            .and_then(|f| Stamp::of(&f).ok());
        if is_trusted && stamp.is_some() && stamp == inner.stamp {
            return Ok(());
        }
        let view = View::open(&self.paths, false)?;
        let Some(view) = view else {
            if inner.page_count > 0
                && !self.heal_from_log(inner, &PageChecksums::new(inner.checksums.page_size()))?
            {
                // As it is: nothing. The primary sends it.
                inner.page_count = 0;
                inner.page_size = None;
                inner.checksums = PageChecksums::new(PageSize::DEFAULT);
                inner.pos.post_apply_checksum = inner.checksums.total();
            }
            return Ok(());
        };
        let page_count = if inner.page_size == Some(view.page_size) {
            inner.page_count
        } else {
            view.page_count
        };
        let actual = view
            .checksums()
            .map_err(DbError::io("read", &self.paths.main))?;
        if actual.total() == inner.pos.post_apply_checksum && actual.page_count() == page_count {
            inner.checksums = actual;
            return Ok(());
        }
        let page_size = view.page_size;
        drop(view);
        if self.node.was_primary.load(Ordering::Acquire) && !self.is_giving_way() {
            // What a tenure ended with, and the log does not have.
            let last = Pos {
                post_apply_checksum: actual.total(),
                ..inner.pos
            };
            self.keep_lost(&super::lost::Losing {
                reason: super::lost::Reason::NotInLog,
                last,
                fork: Some(inner.pos),
                winner: None,
            })?;
        }
        if self.heal_from_log(inner, &actual)? {
            return Ok(());
        }
        inner.page_size = Some(page_size);
        inner.page_count = actual.page_count();
        inner.pos.post_apply_checksum = actual.total();
        inner.checksums = actual;
        tracing::warn!(db = %self.name, pos = %inner.pos, "database is not what the log says; the primary will send the difference");
        Ok(())
    }

    /// Writes down what the next start needs. `durable` also syncs log and files, as for a clean stop.
    ///
    /// # Errors
    /// Disk, log.
    pub fn persist(&self, durable: bool) -> Result<(), DbError> {
        self.persist_locked(&mut self.lock(), durable)
    }

    pub(super) fn persist_locked(&self, inner: &mut Inner, durable: bool) -> Result<(), DbError> {
        if durable && self.is_primary() {
            self.capture_wal_locked(inner)?;
        }
        if durable {
            self.log.sync().map_err(self.log_error())?;
            for path in [&self.paths.main, &self.paths.wal] {
                if let Ok(file) = File::open(path) {
                    file.sync_data().map_err(DbError::io("sync", path))?;
                }
            }
            if !self.is_primary() && inner.replica_wal.is_none() {
                inner.stamp = File::open(&self.paths.main)
                    .ok()
                    .and_then(|f| Stamp::of(&f).ok());
            }
        }
        let end = durable
            .then(|| Stamp::of(&File::open(&self.paths.main).ok()?).ok())
            .flatten();
        let extra = Extra {
            name: self.name.to_string(),
            end: end.map(stamp_into),
            cursor: inner.cursor.map(cursor_into),
            stamp: inner.stamp.map(stamp_into),
            page_count: inner.page_count,
            page_size: inner.page_size.map_or(0, PageSize::get),
        };
        let extra = serde_json::to_vec(&extra).unwrap_or_default();
        inner
            .checksums
            .persist(
                &*self.node.disk,
                &self.paths.meta,
                inner.pos,
                &extra,
                durable,
            )
            .map_err(|e| DbError::Corrupt {
                what: e.to_string(),
                path: self.paths.meta.clone(),
            })
    }
}

/// Tells whether a damaged file of the log had transactions after those it ends with now.
fn was_at_the_end(
    path: &std::path::Path,
    kept: &std::path::Path,
    end: Option<crate::ltx::Txid>,
) -> bool {
    let name = |path: &std::path::Path| path.file_name()?.to_str().map(str::to_owned);
    let is_tail = name(kept).is_some_and(|name| name.contains(".tail-"));
    let first = name(path).and_then(|name| name.split(['.', '-']).next()?.parse().ok());
    is_tail || first.is_some_and(|first: crate::ltx::Txid| Some(first) > end)
}

fn stamp_from((size, s, ns, ino): (u64, i64, i64, u64)) -> Stamp {
    Stamp {
        size,
        mtime: (s, ns),
        ino,
    }
}

fn stamp_into(s: Stamp) -> (u64, i64, i64, u64) {
    (s.size, s.mtime.0, s.mtime.1, s.ino)
}

fn cursor_from(c: [u32; 5]) -> WalCursor {
    WalCursor {
        salt1: c[0],
        salt2: c[1],
        frame_no: c[2],
        checksum1: c[3],
        checksum2: c[4],
    }
}

fn cursor_into(c: WalCursor) -> [u32; 5] {
    [c.salt1, c.salt2, c.frame_no, c.checksum1, c.checksum2]
}
