//! The captured stream of one database: an append-only local log of transactions.
//!
//! ```text
//! append ──> log/<first txid>.seg ... log/<first txid>.seg      records as captured, the last one grows
//!                      │ maintain: compact
//!                      v
//!            ltx/<min>-<max>.ltx ...                             standard LTX files, nothing of ours in them
//!                      │ maintain: retention
//!                      v
//!                   removed          damaged or unreachable files ──> quarantine/, never removed here
//! ```
//!
//! What holds, oldest file to newest, sealed files before segments:
//!
//! | name | rule |
//! |---|---|
//! | INV-LOG-1 | each record begins where the one before ends: `min_txid = max_txid + 1`, `pre = post` |
//! | INV-LOG-2 | `base() <= end().max_txid`, and every transaction in between can be read |
//! | INV-LOG-3 | a segment is durable before the next one gets its first record |
//! | INV-LOG-4 | a record that comes after a file is durable, and in a segment, before the file is sealed or let go |
//!
//! So only the last segment can have a torn tail, and a fault elsewhere is damage. Epoch and WAL
//! cursor of the end are never lost to sealing.
//!
//! One thread appends, others read and [`maintain`](Log::maintain). Locks, in the order in which
//! they are taken: `upkeep` (maintain, restart), `writer` (append), `syncer` (fdatasync), `state`
//! (memory only, held for moments). Recent records stay in memory, bounded by `tail_cache_bytes`:
//! the oldest go first, and readers of those go to the disk.
//!
//! An LTX file is opaque here: [`LogOptions::ltx_meta`] looks into it.

mod apart;
mod error;
mod maintain;
mod open;
mod read;
mod record;
mod segment;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

pub use apart::{Apart, read_apart, write_apart};
pub use error::{BoxError, Error};
pub use maintain::{Compact, Maintained};
pub use open::{Finding, Opened};
pub use read::{Milestone, NewestFirst, ReadAfter};
pub use record::{Fault, Record, RecordMeta, WalCursor};

use crate::disk::{Disk, OpenMode, Step};
use crate::ltx::{Pos, Txid};
use record::{Kind, MAX_LTX_LEN, RECORD_HEADER_LEN};
use segment::{Entry, SEGMENT_HEADER_LEN, Segment};

/// Names of the disk operations of the log.
pub mod steps {
    crate::disk::steps! {
        OPEN_MKDIR = "log.open:mkdir",
        OPEN_LIST = "log.open:list",
        OPEN_FILE = "log.open:file",
        OPEN_SCAN = "log.open:scan",
        OPEN_CUT = "log.open:cut",
        OPEN_KEEP = "log.open:keep",
        OPEN_SYNC = "log.open:sync",
        OPEN_REMOVE = "log.open:remove",
        QUARANTINE = "log.quarantine:rename",
        APPEND = "log.append",
        APPEND_CUT = "log.append:cut",
        ROTATE_OPEN = "log.rotate:open",
        ROTATE_WRITE = "log.rotate:write",
        ROTATE_REMOVE = "log.rotate:remove",
        REOPEN_OPEN = "log.reopen:open",
        REOPEN_WRITE = "log.reopen:write",
        REOPEN_SYNC = "log.reopen:sync",
        REOPEN_RENAME = "log.reopen:rename",
        SYNC = "log.sync",
        SYNC_DIR = "log.sync:dir",
        READ = "log.read",
        RESTART_OPEN = "log.restart:open",
        RESTART_WRITE = "log.restart:write",
        RESTART_SYNC = "log.restart:sync",
        RESTART_SYNC_DIR = "log.restart:sync_dir",
        RESTART_REMOVE = "log.restart:remove",
        RESTART_RENAME = "log.restart:rename",
        SEAL_OPEN = "log.seal:open",
        SEAL_WRITE = "log.seal:write",
        SEAL_SYNC = "log.seal:sync",
        SEAL_RENAME = "log.seal:rename",
        SEAL_REMOVE = "log.seal:remove",
        RETAIN_REMOVE = "log.retain:remove",
    }
}

/// Reads what a log must know of an LTX file, and verifies the file's own checksum.
///
/// `epoch` and `wal` are not in an LTX file: zero and `None` will do.
pub type LtxMeta = fn(&[u8]) -> Result<RecordMeta, BoxError>;

/// Looks into an LTX file for a log; see [`LtxMeta`].
///
/// # Errors
/// Bytes that are not one, or were damaged.
pub fn ltx_meta(bytes: &[u8]) -> Result<RecordMeta, BoxError> {
    let summary = crate::ltx::verify(bytes)?;
    let header = summary.header;
    let post = summary.trailer.post_apply_checksum.ok_or("no checksum")?;
    Ok(RecordMeta {
        epoch: 0,
        min_txid: header.min_txid,
        max_txid: header.max_txid,
        pre_apply_checksum: header
            .pre_apply_checksum
            .unwrap_or(crate::ltx::Checksum::EMPTY),
        post_apply_checksum: post,
        timestamp_ms: header.timestamp_ms,
        commit: header.commit,
        page_size: header.page_size,
        wal: None,
    })
}

/// Settings of a log.
#[derive(Debug, Clone, Copy)]
pub struct LogOptions {
    /// Length from which a segment is full. It may grow past it, to twice that plus one record.
    pub segment_bytes: u64,
    /// How long a record is kept at least for peers that are behind.
    pub retention_age: Duration,
    /// How many bytes the log may have on disk before records go in spite of their age.
    pub retention_bytes: u64,
    /// How many bytes of recent records are kept in memory.
    pub tail_cache_bytes: usize,
    /// Looks into a sealed file.
    pub ltx_meta: LtxMeta,
}

impl LogOptions {
    /// Makes settings with the defaults: 4 MiB segments, 10 minutes, 1 GiB, 1 MiB in memory.
    #[must_use]
    pub fn new(ltx_meta: LtxMeta) -> LogOptions {
        LogOptions {
            segment_bytes: 4 << 20,
            retention_age: Duration::from_secs(600),
            retention_bytes: 1 << 30,
            tail_cache_bytes: 1 << 20,
            ltx_meta,
        }
    }
}

/// What becomes of the contents of a log that restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Older {
    /// They are part of the new history: a snapshot of it replaced them.
    Remove,
    /// They may hold transactions that exist nowhere else.
    Quarantine,
}

/// The log of one database; see the module.
#[derive(Debug)]
pub struct Log {
    disk: Arc<dyn Disk>,
    paths: Paths,
    options: LogOptions,
    upkeep: Mutex<()>,
    writer: Mutex<Writer>,
    /// Held while syncing, so that those who come meanwhile share the next one.
    syncer: Mutex<()>,
    /// Full segments that upkeep leaves as they are.
    segments_left: std::sync::atomic::AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct Writer {
    /// An append failed and its bytes are still in the file.
    must_cut: bool,
}

#[derive(Debug, Default)]
struct State {
    /// Oldest first.
    sealed: VecDeque<Sealed>,
    /// Oldest first; records are appended to the last.
    segments: VecDeque<Segment>,
    /// The last records, without a gap up to the end.
    tail: VecDeque<Record>,
    tail_bytes: usize,
    end: Option<RecordMeta>,
    /// Nothing up to here can be read, because something in between is damaged.
    floor: Txid,
    /// Counts appends; what is durable is counted by the same number.
    appended: u64,
    durable: u64,
    durable_txid: Txid,
    /// The name of the last segment is not durable yet.
    dir_is_dirty: bool,
    broken: Option<Step>,
    /// What `maintain` found and has not told yet.
    findings: Vec<Finding>,
}

/// A compacted segment.
#[derive(Debug, Clone)]
struct Sealed {
    min_txid: Txid,
    max_txid: Txid,
    len: u64,
    /// Time of its last transaction, once known.
    timestamp_ms: Option<i64>,
}

impl Sealed {
    fn name(&self) -> String {
        format!("{}-{}.ltx", self.min_txid, self.max_txid)
    }
}

/// Where the files are.
#[derive(Debug, Clone)]
struct Paths {
    root: PathBuf,
    segments: PathBuf,
    sealed: PathBuf,
    quarantine: PathBuf,
}

impl Paths {
    fn new(root: &Path) -> Paths {
        Paths {
            root: root.to_owned(),
            segments: root.join("log"),
            sealed: root.join("ltx"),
            quarantine: root.join("quarantine"),
        }
    }

    fn segment(&self, first: Txid) -> PathBuf {
        self.segments.join(Segment::name(first))
    }

    fn sealed(&self, file: &Sealed) -> PathBuf {
        self.sealed.join(file.name())
    }

    /// The copy that takes the place of a last segment whose sync failed.
    fn rewrite(&self) -> PathBuf {
        self.segments.join("rewrite.tmp")
    }

    /// The first segment of a log that is about to restart; with it the restart is decided.
    fn restart(&self) -> PathBuf {
        self.segments.join("restart.tmp")
    }
}

impl Log {
    /// Opens the log in a directory, made if missing.
    ///
    /// A torn tail is cut; whatever is damaged or no longer connected to the end is moved to
    /// `quarantine/` and listed in [`Opened::findings`].
    ///
    /// # Errors
    /// [`Error::Io`] if the disk does not do what recovery needs.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: LogOptions,
    ) -> Result<(Log, Opened), Error> {
        let paths = Paths::new(dir);
        let (state, findings) = open::recover(&*disk, &paths, &options)?;
        let opened = Opened {
            end: state.end,
            base: state.base(),
            findings,
        };
        let log = Log {
            disk,
            paths,
            options,
            upkeep: Mutex::new(()),
            writer: Mutex::new(Writer::default()),
            syncer: Mutex::new(()),
            segments_left: std::sync::atomic::AtomicUsize::new(0),
            state: Mutex::new(state),
        };
        Ok((log, opened))
    }

    /// Returns the last record's meta, or that of the restart if nothing came after it.
    ///
    /// `None` is a log that has never had a record; it goes on from [`Pos::ZERO`].
    #[must_use]
    pub fn end(&self) -> Option<RecordMeta> {
        self.state.lock().end
    }

    /// Returns the position after the last record.
    #[must_use]
    pub fn end_pos(&self) -> Pos {
        self.state.lock().end_pos()
    }

    /// Returns the lowest transaction after which everything can be read.
    #[must_use]
    pub fn base(&self) -> Txid {
        self.state.lock().base()
    }

    /// Returns how long the files of the log are together.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.state.lock().total_bytes()
    }

    /// Adds a record; it is in the file, but not durable before [`sync`](Log::sync).
    ///
    /// # Errors
    /// `NotContiguous`, `StaleEpoch`, `InvalidRecord` and `Io` leave the log as it was; in
    /// particular it can be appended to once a full disk has room again.
    pub fn append(&self, meta: &RecordMeta, ltx: &[u8]) -> Result<(), Error> {
        let mut writer = self.writer.lock();
        let active = self.state.lock().admit(meta, ltx.len())?;
        if writer.must_cut
            && let Some(active) = &active
        {
            self.cut(active)?; // before a new segment could begin: INV-LOG-3
            writer.must_cut = false;
        }
        let header = record::encode_header(meta, Kind::Transactions, ltx);
        match active {
            Some(active) if !self.must_rotate(&active, meta)? => {
                let len = self.append_to(&mut writer, &active, &header, ltx)?;
                let copy = self.tail_copy(meta, ltx);
                let mut state = self.state.lock();
                state.add(meta, active.len, len);
                state.push_tail(copy, self.options.tail_cache_bytes);
            }
            _ => {
                let segment = self.rotate(meta, &header, ltx)?;
                let copy = self.tail_copy(meta, ltx);
                let mut state = self.state.lock();
                state.add_segment(segment);
                state.push_tail(copy, self.options.tail_cache_bytes);
            }
        }
        Ok(())
    }

    /// Makes every record appended so far durable and returns the last of them.
    ///
    /// Callers that come while another one syncs share one sync after it.
    ///
    /// # Errors
    /// `Io`, and `Broken` until [`reopen`](Log::reopen): what a failed sync left on disk nobody knows.
    pub fn sync(&self) -> Result<Txid, Error> {
        let wanted = self.state.lock().appended;
        let _syncer = self.syncer.lock();
        let (file, first, appended, dir_is_dirty, end) = {
            let state = self.state.lock();
            state.check_usable()?;
            let end = state.end_pos().txid;
            match state.segments.back() {
                Some(active) if state.durable < wanted => (
                    active.file.clone(),
                    active.first,
                    state.appended,
                    state.dir_is_dirty,
                    end,
                ),
                _ => return Ok(state.durable_txid),
            }
        };
        self.sync_file(&file, first, dir_is_dirty)
            .inspect_err(|e| self.break_at(e))?;
        let mut state = self.state.lock();
        state.durable = appended;
        state.durable_txid = end;
        state.dir_is_dirty &= !dir_is_dirty;
        Ok(end)
    }

    /// Returns whether the log takes nothing more before [`reopen`](Log::reopen).
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.state.lock().broken.is_some()
    }

    /// Opens a broken log again in place; does nothing to a sound one.
    ///
    /// The kernel takes pages for clean whose write failed, so a second sync of the same file would promise what is not
    /// so. What can be read of the last segment goes into a new file, which is synced and takes its place. All that is
    /// there afterwards is durable; it may be less than there was: compare [`end`](Log::end).
    ///
    /// # Errors
    /// `Io`; the log is then as broken as before, and this can be tried again.
    pub fn reopen(&self) -> Result<Vec<Finding>, Error> {
        let _upkeep = self.upkeep.lock();
        let mut writer = self.writer.lock();
        let _syncer = self.syncer.lock();
        let appended = {
            let state = self.state.lock();
            if state.broken.is_none() {
                return Ok(Vec::new());
            }
            state.appended
        };
        let (mut state, findings) = open::recover(&*self.disk, &self.paths, &self.options)?;
        if let Some(last) = state.segments.back_mut() {
            self.rewrite(last)?;
        }
        state.appended = appended;
        state.durable = appended;
        state.durable_txid = state.end_pos().txid;
        state.dir_is_dirty = false;
        *writer = Writer::default();
        *self.state.lock() = state;
        Ok(findings)
    }

    /// Replaces the file of a segment by a durable copy.
    fn rewrite(&self, segment: &mut Segment) -> Result<(), Error> {
        let path = self.paths.segment(segment.first);
        let len = usize::try_from(segment.len)
            .map_err(|e| Error::io(steps::READ, &path, io::Error::other(e)))?;
        let mut bytes = vec![0; len];
        self.disk
            .read_exact_at(steps::READ, &segment.file, &mut bytes, 0)
            .map_err(|e| Error::io(steps::READ, &path, e))?;
        let tmp = self.paths.rewrite();
        let file = self.open_file(steps::REOPEN_OPEN, &tmp, OpenMode::Truncate)?;
        let written = self
            .disk
            .write_all_at(steps::REOPEN_WRITE, &file, &bytes, 0)
            .map_err(|e| Error::io(steps::REOPEN_WRITE, &tmp, e))
            .and_then(|()| self.sync_at(steps::REOPEN_SYNC, &file, &tmp))
            .and_then(|()| {
                self.disk
                    .rename(steps::REOPEN_RENAME, &tmp, &path)
                    .map_err(|e| Error::io(steps::REOPEN_RENAME, &tmp, e))
            });
        if let Err(error) = written {
            let _ = self.disk.remove_file(steps::REOPEN_OPEN, &tmp);
            return Err(error);
        }
        segment.file = Arc::new(file);
        Ok(())
    }

    /// Begins the log anew at the position of `meta`, after a snapshot or a change of branch.
    ///
    /// Nothing before can be served any more. When this returns the new start is durable; a crash
    /// on the way leaves either the old log or the new one.
    ///
    /// # Errors
    /// `Io` leaves the old log in place if it says so by going on; `Broken` follows if the restart
    /// was decided and then interrupted: [`reopen`](Log::reopen), or opening the log again, finishes it.
    pub fn restart(&self, meta: &RecordMeta, older: Older) -> Result<(), Error> {
        let _upkeep = self.upkeep.lock();
        let mut writer = self.writer.lock();
        let _syncer = self.syncer.lock();
        let kind = Kind::Base {
            remove_older: older == Older::Remove,
        };
        if !record::range_is_valid(meta, kind) {
            return Err(Error::invalid(meta, 0));
        }
        let segment = self.decide_restart(meta, kind)?;
        let first = segment.first;
        *writer = Writer::default();
        self.state.lock().become_base(segment); // readers let go of the old files first
        open::finish_restart(&*self.disk, &self.paths, first, older)
            .inspect_err(|e| self.break_at(e))
    }

    /// Writes the first segment of the new log under a name that decides the restart.
    fn decide_restart(&self, meta: &RecordMeta, kind: Kind) -> Result<Segment, Error> {
        let path = self.paths.restart();
        let first = meta.max_txid.next();
        let file = self.open_file(steps::RESTART_OPEN, &path, OpenMode::Truncate)?;
        let header = segment::encode_header(first, meta);
        let record = record::encode_header(meta, kind, b"");
        let mut parts = [IoSlice::new(&header), IoSlice::new(&record)];
        let written = self
            .disk
            .write_parts_at(steps::RESTART_WRITE, &file, &mut parts, 0)
            .map_err(|e| Error::io(steps::RESTART_WRITE, &path, e))
            .and_then(|()| self.sync_at(steps::RESTART_SYNC, &file, &path))
            .and_then(|()| self.sync_dir_at(steps::RESTART_SYNC_DIR, &self.paths.segments));
        if let Err(error) = written {
            // If it stays, the next start would take it for a decision and drop what comes now.
            self.disk
                .remove_file(steps::RESTART_REMOVE, &path)
                .and_then(|()| {
                    self.disk
                        .sync_dir(steps::RESTART_REMOVE, &self.paths.segments)
                })
                .unwrap_or_else(|_| self.break_at(&error));
            return Err(error);
        }
        Ok(Segment {
            file: Arc::new(file),
            first,
            entries: Vec::new(),
            len: (SEGMENT_HEADER_LEN + RECORD_HEADER_LEN) as u64,
            last: *meta,
            is_base: true,
        })
    }

    /// Copies a record for readers in memory, unless it alone would fill the cache.
    fn tail_copy(&self, meta: &RecordMeta, ltx: &[u8]) -> Option<Record> {
        (tail_len(ltx) <= self.options.tail_cache_bytes).then(|| Record {
            meta: *meta,
            ltx: Bytes::copy_from_slice(ltx),
        })
    }

    /// Says whether the next record belongs into a new segment, having made sure of INV-LOG-3.
    ///
    /// A full segment waits for a sync that somebody else needs, until it is twice too long. A tenure begins a segment:
    /// once that is sealed, what its file has is of one tenure, and where two histories part stays to be found.
    fn must_rotate(&self, active: &Active, meta: &RecordMeta) -> Result<bool, Error> {
        let is_other_tenure = active.epoch != meta.epoch;
        let is_full = active.len >= self.options.segment_bytes;
        if !active.has_records || !(is_full || is_other_tenure) {
            return Ok(false);
        }
        if !active.is_durable {
            if !is_other_tenure && active.len < self.options.segment_bytes.saturating_mul(2) {
                return Ok(false);
            }
            self.sync()?;
        }
        Ok(true)
    }

    /// Writes a record to the end of the segment and returns its length.
    fn append_to(
        &self,
        writer: &mut Writer,
        active: &Active,
        header: &[u8],
        ltx: &[u8],
    ) -> Result<u64, Error> {
        let mut parts = [IoSlice::new(header), IoSlice::new(ltx)];
        let written = self
            .disk
            .write_parts_at(steps::APPEND, &active.file, &mut parts, active.len);
        if let Err(error) = written {
            writer.must_cut = self.cut(active).is_err();
            // Some of it may have reached the disk: the cut needs a sync like a record does.
            self.state.lock().appended += 1;
            let path = self.paths.segment(active.first);
            return Err(Error::io(steps::APPEND, &path, error));
        }
        Ok((header.len() + ltx.len()) as u64)
    }

    fn cut(&self, active: &Active) -> Result<(), Error> {
        self.disk
            .set_len(steps::APPEND_CUT, &active.file, active.len)
            .map_err(|e| Error::io(steps::APPEND_CUT, &self.paths.segment(active.first), e))
    }

    /// Starts a segment with a record.
    fn rotate(&self, meta: &RecordMeta, header: &[u8], ltx: &[u8]) -> Result<Segment, Error> {
        let path = self.paths.segment(meta.min_txid);
        // Whatever has this name is what an earlier attempt left.
        let file = self.open_file(steps::ROTATE_OPEN, &path, OpenMode::Truncate)?;
        let segment_header = segment::encode_header(meta.min_txid, meta);
        let mut parts = [
            IoSlice::new(&segment_header),
            IoSlice::new(header),
            IoSlice::new(ltx),
        ];
        let written = self
            .disk
            .write_parts_at(steps::ROTATE_WRITE, &file, &mut parts, 0);
        if let Err(error) = written {
            let _ = self.disk.remove_file(steps::ROTATE_REMOVE, &path);
            return Err(Error::io(steps::ROTATE_WRITE, &path, error));
        }
        let offset = SEGMENT_HEADER_LEN as u64;
        let len = (header.len() + ltx.len()) as u64;
        Ok(Segment {
            file: Arc::new(file),
            first: meta.min_txid,
            entries: vec![Entry {
                min_txid: meta.min_txid,
                max_txid: meta.max_txid,
                offset,
                len,
            }],
            len: offset + len,
            last: *meta,
            is_base: false,
        })
    }

    fn sync_file(&self, file: &File, first: Txid, dir_is_dirty: bool) -> Result<(), Error> {
        self.sync_at(steps::SYNC, file, &self.paths.segment(first))?;
        if dir_is_dirty {
            self.sync_dir_at(steps::SYNC_DIR, &self.paths.segments)?;
        }
        Ok(())
    }

    /// Refuses everything that writes from now on.
    fn break_at(&self, error: &Error) {
        if let Error::Io { step, .. } = error {
            self.state.lock().broken.get_or_insert(*step);
        }
    }

    fn open_file(&self, step: Step, path: &Path, mode: OpenMode) -> Result<File, Error> {
        self.disk
            .open(step, path, mode)
            .map_err(|e| Error::io(step, path, e))
    }

    fn sync_at(&self, step: Step, file: &File, path: &Path) -> Result<(), Error> {
        self.disk
            .sync_data(step, file)
            .map_err(|e| Error::io(step, path, e))
    }

    fn sync_dir_at(&self, step: Step, path: &Path) -> Result<(), Error> {
        self.disk
            .sync_dir(step, path)
            .map_err(|e| Error::io(step, path, e))
    }
}

/// What `append` must know of the last segment while it holds no lock on the state.
struct Active {
    file: Arc<File>,
    first: Txid,
    len: u64,
    /// Tenure of its last record.
    epoch: u64,
    has_records: bool,
    is_durable: bool,
}

impl State {
    fn end_pos(&self) -> Pos {
        self.end.map_or(Pos::ZERO, |end| end.pos())
    }

    /// The first transaction of the oldest file, less one; or the end if there is no file.
    fn base(&self) -> Txid {
        let first = match (self.sealed.front(), self.segments.front()) {
            (Some(sealed), _) => sealed.min_txid.prev(),
            (None, Some(segment)) => segment.first.prev(),
            (None, None) => self.end_pos().txid,
        };
        first.max(self.floor)
    }

    fn check_usable(&self) -> Result<(), Error> {
        match self.broken {
            Some(step) => Err(Error::Broken { step }),
            None => Ok(()),
        }
    }

    /// Checks that a record may follow (INV-LOG-1) and returns where it would go.
    fn admit(&self, meta: &RecordMeta, ltx_len: usize) -> Result<Option<Active>, Error> {
        self.check_usable()?;
        let is_valid = record::range_is_valid(meta, Kind::Transactions);
        if !is_valid || ltx_len == 0 || ltx_len > MAX_LTX_LEN {
            return Err(Error::invalid(meta, ltx_len));
        }
        let (end, begin) = (self.end_pos(), meta.pre_apply_pos());
        if end != begin {
            return Err(Error::NotContiguous { end, begin });
        }
        if let Some(end) = self.end
            && meta.epoch < end.epoch
        {
            return Err(Error::StaleEpoch {
                have: end.epoch,
                got: meta.epoch,
            });
        }
        Ok(self.segments.back().map(|segment| Active {
            file: segment.file.clone(),
            first: segment.first,
            len: segment.len,
            epoch: segment.last.epoch,
            has_records: !segment.entries.is_empty(),
            is_durable: self.durable == self.appended,
        }))
    }

    /// Publishes a record that was written to the last segment.
    fn add(&mut self, meta: &RecordMeta, offset: u64, len: u64) {
        if let Some(segment) = self.segments.back_mut() {
            segment.entries.push(Entry {
                min_txid: meta.min_txid,
                max_txid: meta.max_txid,
                offset,
                len,
            });
            segment.len = offset + len;
            segment.last = *meta;
        }
        self.end = Some(*meta);
        self.appended += 1;
    }

    /// Publishes a segment with its first record or base.
    fn add_segment(&mut self, segment: Segment) {
        self.end = Some(segment.last);
        self.appended += 1;
        self.dir_is_dirty = true;
        self.segments.push_back(segment);
    }

    /// Forgets everything for a segment that is durable and has only a base.
    fn become_base(&mut self, segment: Segment) {
        *self = State::default();
        self.add_segment(segment);
        self.durable = self.appended;
        self.durable_txid = self.end_pos().txid;
        self.dir_is_dirty = false;
    }

    /// Keeps a record in memory and lets the oldest go; without it there is nothing to keep.
    fn push_tail(&mut self, record: Option<Record>, max_bytes: usize) {
        let Some(record) = record else {
            self.tail.clear();
            self.tail_bytes = 0;
            return;
        };
        self.tail_bytes += tail_len(&record.ltx);
        self.tail.push_back(record);
        while self.tail_bytes > max_bytes
            && let Some(oldest) = self.tail.pop_front()
        {
            self.tail_bytes -= tail_len(&oldest.ltx);
        }
    }
}

/// What a record in memory counts for, in bytes.
fn tail_len(ltx: &[u8]) -> usize {
    ltx.len() + size_of::<Record>()
}

impl Error {
    fn io(step: Step, path: &Path, source: io::Error) -> Error {
        Error::Io {
            step,
            path: path.to_owned(),
            source,
        }
    }

    fn invalid(meta: &RecordMeta, ltx_len: usize) -> Error {
        Error::InvalidRecord {
            min_txid: meta.min_txid,
            max_txid: meta.max_txid,
            ltx_len,
        }
    }
}

/// Moves a file out of the way under a name that is free, and returns that.
fn quarantine(disk: &dyn Disk, paths: &Paths, path: &Path) -> Result<PathBuf, Error> {
    let name = path.file_name().unwrap_or_default().to_owned();
    let to = quarantine_path(disk, paths, &name)?;
    disk.rename(steps::QUARANTINE, path, &to)
        .map_err(|e| Error::io(steps::QUARANTINE, path, e))?;
    Ok(to)
}

fn quarantine_path(disk: &dyn Disk, paths: &Paths, name: &OsString) -> Result<PathBuf, Error> {
    let dir = &paths.quarantine;
    disk.create_dir_all(steps::OPEN_MKDIR, dir)
        .and_then(|()| disk.sync_dir(steps::OPEN_SYNC, &paths.root))
        .map_err(|e| Error::io(steps::OPEN_MKDIR, dir, e))?;
    let taken = disk
        .list_dir(steps::OPEN_LIST, dir)
        .map_err(|e| Error::io(steps::OPEN_LIST, dir, e))?;
    let mut free = name.clone();
    let mut n = 1;
    while taken.contains(&free) {
        free = name.clone();
        free.push(format!(".{n}"));
        n += 1;
    }
    Ok(dir.join(free))
}
