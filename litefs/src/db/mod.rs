//! One database of a node: captures what SQLite commits on a primary, applies what arrives on a replica.
//!
//! ```text
//! primary:  app ─▶ WAL ─(hook or inotify)─▶ capture_wal ─┐
//!           app ─▶ journal ─(commit point)─▶ capture_journal ─┼─▶ commit_range ─▶ log ─▶ pos published
//!           anything else written ─▶ capture_scan ────────┘
//! replica:  stream ─▶ apply ─▶ log ─▶ WAL frames and wal-index (somebody has it open) or the file itself
//! ```
//!
//! What holds:
//!
//! | name | rule |
//! |---|---|
//! | INV-DB-1 | `pos`, page checksums and log end agree whenever the lock of `Inner` is free |
//! | INV-DB-2 | a frame of the WAL is in the log before the WAL can be reset, truncated or removed |
//! | INV-DB-3 | after a power cut, files that are newer than the log win over it, and files that are older are healed from it |
//! | INV-DB-4 | on a replica nobody but us writes the WAL and the wal-index: we hold WRITE, and keep the index valid |
//! | INV-DB-5 | on a replica a range is in the log before any page of it is in the database |
//!
//! Synchronous; one lock (`Inner`) per database, never held across a call into the mount, except where noted in
//! `replica_wal`.

mod apply;
mod capture_journal;
mod capture_scan;
mod capture_wal;
mod commit;
mod drop;
mod error;
mod held;
mod history;
pub(crate) mod lineage;
pub mod log;
pub mod lost;
pub mod page_checksums;
mod pages;
pub mod paths;
mod recover;
mod replica_wal;
mod role;
mod shm;
mod snapshot;
mod view;

/// Names of what a database does to files by itself, and of moments between two such acts.
pub mod steps {
    crate::disk::steps! {
        COMMIT_ENCODED = "commit:encoded",
        COMMIT_LOGGED = "commit:logged",
        DROP_RECORD = "drop:record",
        CAPTURE_WAL = "capture.wal:commit",
        CAPTURE_JOURNAL = "capture.journal:commit",
        CAPTURE_JOURNAL_DONE = "capture.journal:done",
        CAPTURE_SCAN = "capture.scan:commit",
        APPLY_LOGGED = "apply:logged",
        APPLY_WRITTEN = "apply:written",
        APPLY_FILE = "apply.file:write",
        APPLY_FILE_CUT = "apply.file:cut",
        APPLY_REMOVE = "apply.remove:file",
        APPLY_CREATE = "apply.create:rename",
        APPLY_KEEP_ASIDE = "apply.keep_aside:rename",
        COPY_LOGGED = "copy:logged",
        COPY_WRITTEN = "copy:written",
        REPLICA_WAL_PREPARE = "replica_wal.prepare:cut",
        REPLICA_WAL_BUILD = "replica_wal.prepare:build",
        REPLICA_WAL_FRAMES = "replica_wal.append:frames",
        REPLICA_WAL_INDEX = "replica_wal.append:index",
        REPLICA_WAL_PUBLISH = "replica_wal.append:publish",
        REPLICA_WAL_CHECKPOINT = "replica_wal.checkpoint:attempt",
        REPLICA_WAL_BACKFILL = "replica_wal.checkpoint:page",
        REPLICA_WAL_CUT = "replica_wal.checkpoint:cut",
        REPLICA_WAL_BACKFILLED = "replica_wal.checkpoint:done",
        REPLICA_WAL_RESTART = "replica_wal.restart",
        REPLACE_INDEX = "replica_wal.replace:index",
        REPLACE_BEGUN = "replica_wal.replace:begun",
        REPLACE_WRITTEN = "replica_wal.replace:written",
        REPLACE_AGAIN = "recover.replace:rename",
        RELEASE_REMOVE = "readers.release:remove",
        ROLL_BACK_CUT = "recover.journal:cut",
        ROLL_BACK_PAGE = "recover.journal:page",
        ROLL_BACK_REMOVE = "recover.journal:remove",
        HEAL_PAGE = "recover.heal:page",
        HEAL_CUT = "recover.heal:cut",
        FOLD_PAGE = "recover.fold:page",
        FOLD_CUT = "recover.fold:cut",
        FOLD_REMOVE = "recover.fold:remove",
    }
}

/// Names of moments at which a database changes hands, which happens only where the primary is elected.
pub mod role_steps {
    crate::disk::steps! {
        FENCE_LOCKED = "role.fence:locked",
        FENCE_CAPTURED = "role.fence:captured",
        PROMOTE = "role.promote",
    }
}

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

pub(crate) use apply::from_log as record_from_log;
pub use capture_scan::Scanned;
pub use error::DbError;
pub use paths::DbPaths;
pub use snapshot::{PageCopyReader, PageCopyWriter};

use crate::disk::Disk;
use crate::ltx::{PageSize, Pos};
use crate::replication::{ChangeHub, DbName};
use log::{Log, WalCursor};
use page_checksums::PageChecksums;
use replica_wal::ReplicaWal;

/// Says when commits may be acknowledged to the programs that make them.
pub trait CommitGate: Send + Sync {
    /// Whether commits of a database wait. Does not block.
    fn waits(&self, db: &DbName) -> bool;
    /// Waits until other nodes have `pos` as durably as was promised. Returns whether they do; if not, it is not known
    /// whether they will.
    fn wait(&self, db: &Db, pos: Pos) -> bool;
}

/// Takes note of a history that lost.
pub type OnLost = Box<dyn Fn(&lost::Entry) + Send + Sync>;

/// What all databases of a node share.
pub struct NodeContext {
    /// Who says when a commit may be acknowledged, if anybody does.
    pub gate: std::sync::OnceLock<Arc<dyn CommitGate>>,

    /// File operations that a crash could interrupt.
    pub disk: Arc<dyn Disk>,
    /// The directory that the mount shows.
    pub files: PathBuf,
    /// The directory of logs and checksums, one per database.
    pub metas: PathBuf,
    /// Where the mount is.
    pub mount: PathBuf,
    /// Tells who wants to know that a database moved.
    pub hub: ChangeHub,
    /// Whether this node may write: it is the primary. Each database has its own say, which follows this one.
    pub is_primary: AtomicBool,
    /// Some database has a commit in doubt.
    pub has_doubts: AtomicBool,
    /// Set while readers may not see yet what a database here has, because it was in doubt.
    pub has_unseen: AtomicBool,
    /// Whether it is about to give the role away: nothing new is begun.
    pub is_draining: AtomicBool,
    /// Whether it may become the primary while it runs: programs may then open databases for writing on a replica too.
    pub is_candidate: bool,
    /// Whether it was primary, and has not had all that its primary has since: its databases may hold what no other does.
    pub was_primary: AtomicBool,
    /// Whether this node died as a replica and is primary now, until its databases are open: of their last transactions
    /// the log alone is whole.
    pub was_replica: AtomicBool,
    /// Whether the kernel serves files straight from the backing directory.
    pub passthrough: AtomicBool,
    /// Fencing number of the current tenure.
    pub epoch: AtomicU64,
    /// Identity of this node, in LTX headers.
    pub node_id: u64,
    /// Kernel caches to be told of changes; there once mounted.
    pub invalidator: Mutex<Option<fuse::Invalidator>>,
    /// Threads of ours that open files through the mount and must be let through.
    pub own_threads: Mutex<std::collections::HashSet<u32>>,
    /// Programs that outlived a former daemon.
    pub survivors: crate::survivors::Survivors,
    /// Whether somebody may come for what is in the logs.
    pub history: Arc<crate::history::History>,
    /// Settings of logs.
    pub log_options: log::LogOptions,
    /// Name of this node, for what it keeps of histories that lost.
    pub hostname: String,
    /// Told of each history that lost.
    pub on_lost: std::sync::OnceLock<OnLost>,
}

impl std::fmt::Debug for NodeContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeContext")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl NodeContext {
    /// Returns whether this node is the primary.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        self.is_primary.load(Ordering::Acquire)
    }

    /// Returns who says when commits of a database may be acknowledged, if they wait.
    #[must_use]
    pub fn gate_of(&self, db: &DbName) -> Option<&dyn CommitGate> {
        self.gate
            .get()
            .map(AsRef::as_ref)
            .filter(|gate| gate.waits(db))
    }

    /// Returns whether programs may make new databases here.
    #[must_use]
    pub fn takes_writes(&self) -> bool {
        self.is_primary() && !self.is_draining.load(Ordering::Acquire)
    }

    /// Returns whether programs share a wal-index with us by its backing file, which passthrough makes so.
    pub(crate) fn shm_is_shared(&self) -> bool {
        self.passthrough.load(Ordering::Acquire)
    }

    /// Does something in the mount that the volume lets through from no program's thread.
    pub(crate) fn in_mount<T>(&self, call: impl FnOnce() -> T) -> T {
        let tid = thread_id();
        let is_outermost = self.own_threads.lock().insert(tid);
        let _end = OwnThread {
            node: self,
            tid: is_outermost.then_some(tid),
        };
        call()
    }

    /// Tells the kernel that what a name stands for has changed.
    pub fn invalidate_name(&self, path: &std::path::Path) {
        self.invalidate(|inv| inv.name(path));
    }

    /// Returns whether programs have a file open whose reads and writes the kernel serves by itself.
    #[must_use]
    pub fn is_passed_through(&self, path: &std::path::Path) -> bool {
        let invalidator = self.invalidator.lock();
        invalidator
            .as_ref()
            .is_some_and(|inv| inv.is_passed_through(path))
    }

    fn invalidate(&self, call: impl FnOnce(&fuse::Invalidator)) {
        if let Some(inv) = &*self.invalidator.lock() {
            call(inv);
        }
    }
}

/// A thread of ours is let through until this is dropped.
struct OwnThread<'a> {
    node: &'a NodeContext,
    tid: Option<u32>,
}

impl Drop for OwnThread<'_> {
    fn drop(&mut self) {
        if let Some(tid) = self.tid {
            self.node.own_threads.lock().remove(&tid);
        }
    }
}

/// More bytes of LTX than these between two looks after the log are a burst.
const BURST_BYTES: u64 = 8 << 20;
/// Full segments that may wait for the end of a burst.
const BURST_SEGMENTS: usize = 8;

/// One database.
pub struct Db {
    name: DbName,
    paths: DbPaths,
    node: Arc<NodeContext>,
    log: Log,
    /// Programs write here and we capture; otherwise we write, and they read.
    is_primary: AtomicBool,
    /// Set once and for all, under `inner`, when the mount is about to go.
    is_closed: AtomicBool,
    inner: Mutex<Inner>,
    published: Mutex<Published>,
    gate: Mutex<Gate>,
    /// Bytes of LTX made since this was opened.
    /// Programs that have the wal-index open, through this mount.
    index_users: AtomicU32,
    captured_bytes: AtomicU64,
    /// What they were when the log was last looked after.
    captured_at_upkeep: AtomicU64,
    /// Where the database was before a commit that is logged and whose program is about to write it (INV-HELD-2).
    unwritten: Mutex<Option<Pos>>,
    /// What of the log is known to survive power loss.
    durable: Mutex<Pos>,
    pins: Mutex<Vec<(u64, crate::ltx::Txid)>>,
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// How far a start believes what the last session left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Power may have been lost: files, WAL and log may each be older than the others.
    Nothing,
    /// The daemon alone died: what was written last, by whomever, is in the files.
    PageCache,
    /// All was synced at the end, and nobody had a database open: files that changed since were changed by hand.
    CleanEnd,
    /// The node runs, and a program may be writing the database that was just found: who found it captures it, at a moment
    /// when nobody writes.
    Running,
}

/// What others see of a database without its lock.
#[derive(Debug, Clone, Copy, Default)]
pub struct Published {
    /// Newest position.
    pub pos: Pos,
    /// Time of the newest transaction, milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Pages the database has.
    pub page_count: u32,
    /// Bytes per page; 0 while there are none.
    pub page_size: u32,
}

/// Who has a replica's database open, and whether it is served through a WAL of ours.
#[derive(Debug, Default)]
struct Gate {
    /// Handles on the database file that programs hold.
    handle_count: u32,
    /// A WAL of ours serves the readers.
    is_prepared: bool,
}

/// What the lock of a database guards.
#[derive(Debug)]
struct Inner {
    page_size: Option<PageSize>,
    page_count: u32,
    checksums: PageChecksums,
    pos: Pos,
    /// How far the WAL is captured; `None` while there is no WAL.
    cursor: Option<WalCursor>,
    /// What the wal-index counted as changes when it stood at a cursor.
    index_change: Option<(WalCursor, u32)>,
    wal: Option<File>,
    /// The database file as it was when it, without any WAL, was what is captured.
    stamp: Option<Stamp>,
    replica_wal: Option<ReplicaWal>,
    encoded: Vec<u8>,
    frames: Vec<u8>,
    /// What could not be captured, in words, until it can.
    trouble: Option<String>,
    /// Another file took its place, and has not been compared: the mark of it is on the disk.
    is_replaced: bool,
    /// It was captured while no SQLite had it open that uses its WAL: whoever copied it here may not be done. The same mark
    /// is on the disk.
    is_provisional: bool,
    /// The last frame of a commit that is captured and that the wal-index does not show yet.
    unseen: Option<u32>,
    /// Where the database was before a commit that is logged and not in the files (INV-HELD-1).
    in_doubt: Option<Pos>,
}

/// Returns the kernel's number of this thread, as FUSE requests carry it.
fn thread_id() -> u32 {
    rustix::thread::gettid()
        .as_raw_nonzero()
        .get()
        .cast_unsigned()
}

/// Tells whether a file was written since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    mtime: (i64, i64),
    ino: u64,
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Stamp> {
        Ok(Stamp::from(&file.metadata()?))
    }

    /// Tells whether a write from now on gives another stamp. Before Linux 6.13 times were as coarse as the kernel's tick.
    fn is_settled(&self) -> bool {
        if has_fine_times() {
            return true;
        }
        let now = i128::from(crate::clock::wall_ms());
        let mtime = i128::from(self.mtime.0) * 1000 + i128::from(self.mtime.1) / 1_000_000;
        (now - mtime).unsigned_abs() > COARSE_TICK_MS
    }
}

/// Longer than a tick of any kernel.
const COARSE_TICK_MS: u128 = 20;

fn has_fine_times() -> bool {
    static FINE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FINE.get_or_init(|| {
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy();
        let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>());
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (6, 13),
            _ => false,
        }
    })
}

impl From<&std::fs::Metadata> for Stamp {
    fn from(m: &std::fs::Metadata) -> Stamp {
        use std::os::unix::fs::MetadataExt;
        Stamp {
            size: m.len(),
            mtime: (m.mtime(), m.mtime_nsec()),
            ino: m.ino(),
        }
    }
}

impl Db {
    /// Returns the name.
    #[must_use]
    pub fn name(&self) -> &DbName {
        &self.name
    }

    /// Returns the paths.
    #[must_use]
    pub fn paths(&self) -> &DbPaths {
        &self.paths
    }

    /// Returns the newest position.
    #[must_use]
    pub fn pos(&self) -> Pos {
        self.published.lock().pos
    }

    /// Returns what others may see.
    #[must_use]
    pub fn published(&self) -> Published {
        *self.published.lock()
    }

    /// Returns the log.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Returns the page checksums and the position that they belong to.
    #[must_use]
    pub fn checksums(&self) -> (Pos, PageChecksums) {
        let mut inner = self.inner.lock();
        self.look_at_half_written(&mut inner);
        (inner.pos, inner.checksums.clone())
    }

    /// Returns whether something about the WAL was odd, so that all pages must be compared.
    #[must_use]
    pub fn is_in_trouble(&self) -> bool {
        self.lock().trouble.is_some()
    }

    /// Returns whether the database file is as it was when it was captured last.
    #[must_use]
    pub fn is_captured(&self) -> bool {
        let inner = self.lock();
        inner.trouble.is_none()
            && !inner.is_replaced
            && inner.stamp.is_some()
            && File::open(&self.paths.main)
                .ok()
                .and_then(|f| Stamp::of(&f).ok())
                == inner.stamp
    }

    /// Returns how many bytes of LTX were captured since this was opened.
    #[must_use]
    pub fn captured_bytes(&self) -> u64 {
        self.captured_bytes.load(Ordering::Relaxed)
    }

    /// Returns whether there is a WAL, which tells of all that is written.
    #[must_use]
    pub fn has_wal(&self) -> bool {
        self.paths.wal.exists()
    }

    /// Returns whether programs write this database here.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        self.is_primary.load(Ordering::Acquire)
    }

    /// Returns how many handles programs have on this replica's database.
    #[must_use]
    pub fn reader_count(&self) -> u32 {
        // Those that were opened while this node was primary are known to the mount alone.
        let counted = self.gate.lock().handle_count;
        counted.max(self.handles_in_mount())
    }

    /// Makes the log durable, if it grew since it was.
    ///
    /// # Errors
    /// Disk; the log then takes no more until [`repair_log`](Db::repair_log).
    pub fn sync_log(&self) -> Result<(), DbError> {
        self.log.sync().map(drop).map_err(self.log_error())
    }

    /// Makes a log usable again that could not be synced, once the disk allows. Returns whether it had to.
    ///
    /// If records are lost, the log begins anew where the database is: what it then lacks is in the database itself.
    ///
    /// # Errors
    /// Disk; try again later.
    pub fn repair_log(&self) -> Result<bool, DbError> {
        if !self.log.is_broken() {
            return Ok(false);
        }
        let inner = self.lock();
        for finding in self.log.reopen().map_err(self.log_error())? {
            tracing::warn!(db = %self.name, ?finding, "log was opened again");
        }
        let end = self.log.end_pos();
        // A replica logs first; it comes again to what it has not applied.
        let is_ahead = !self.is_primary() && end.txid > inner.pos.txid;
        if end != inner.pos && !is_ahead {
            // What the log gives up must be durable in the files.
            for path in [&self.paths.main, &self.paths.wal] {
                if let Ok(file) = File::open(path) {
                    file.sync_data().map_err(DbError::io("sync", path))?;
                }
            }
            self.log
                .restart(&self.meta_here(&inner), log::Older::Quarantine)
                .map_err(self.log_error())?;
            tracing::warn!(db = %self.name, pos = %inner.pos, "log lost records and begins anew; replicas that are behind get a page copy");
        }
        Ok(true)
    }

    /// Compacts the log, and with `retain` removes what its limits allow.
    ///
    /// # Errors
    /// Disk.
    pub fn maintain_log(&self, retain: bool) -> Result<(), DbError> {
        let pinned = if retain {
            self.pinned()
        } else {
            Some(crate::ltx::Txid::ZERO)
        };
        let compact = |files: &[&[u8]]| crate::ltx::compact(files);
        let captured = self.captured_bytes();
        let before = self.captured_at_upkeep.swap(captured, Ordering::Relaxed);
        let is_burst = captured - before > BURST_BYTES;
        self.log
            .leave_segments(if is_burst { BURST_SEGMENTS } else { 0 });
        self.log
            .maintain(crate::clock::wall_ms(), &compact, pinned)
            .map(drop)
            .map_err(self.log_error())
    }

    /// Gives back the memory that captures use, of a database that was not written for a while.
    pub fn release_buffers(&self) {
        if let Some(mut inner) = self.inner.try_lock() {
            inner.frames = Vec::new();
            inner.encoded = Vec::new();
        }
    }

    /// Ends the serving of readers: the mount is about to go, and our descriptors in it would keep it.
    ///
    /// Of a database that programs have open the locks stay until this process ends (INV-ROLE-1): they would write, and be
    /// told that it is committed, what nobody captures.
    ///
    /// # Errors
    /// Disk; what was not copied into the file is in the log.
    pub fn close_for_unmount(&self) -> Result<(), DbError> {
        let is_in_use = self.handles_in_mount() > 0;
        let mut inner = self.lock();
        // Who has it open reads on by the WAL's index: what came from now on would get past it, straight into the file.
        self.is_closed.store(true, Ordering::Release);
        if let Some(mut wal) = inner.replica_wal.take() {
            let copied = wal.checkpoint(&self.paths);
            if is_in_use {
                std::mem::forget(wal);
            } else {
                self.gate.lock().is_prepared = false;
            }
            copied?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    /// Makes a new position known; the only place that does.
    fn publish(&self, inner: &Inner, timestamp_ms: i64) {
        *self.published.lock() = Published {
            pos: inner.pos,
            timestamp_ms,
            page_count: inner.page_count,
            page_size: inner.page_size.map_or(0, PageSize::get),
        };
        self.node.hub.publish(&self.name);
    }

    fn log_error(&self) -> impl Fn(log::Error) -> DbError {
        let db = self.name.to_string();
        move |source| DbError::Log {
            db: db.clone(),
            source,
        }
    }

    fn ltx_error(&self) -> impl Fn(crate::ltx::LtxError) -> DbError {
        let db = self.name.to_string();
        move |source| DbError::Ltx {
            db: db.clone(),
            source,
        }
    }
}
