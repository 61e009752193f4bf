//! What the files in the mount mean: implements [`fuse::Volume`] for a store of databases.
//!
//! On a primary nothing is in the way of a program but the moments at which a transaction could be lost: the checkpoint
//! hook (SQLite truncates the database file before it marks a WAL as resettable), truncation and removal of a
//! WAL, and the commit points of rollback journals. On a replica databases are opened for reading only; on one that may
//! become the primary also for writing, which SQLite's own lock, held by us, forbids meanwhile.

mod names;

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use fuse::{Caller, Errno, Flow, Op, OpenAnswer, OpenRequest, Serve, VirtualFile};
use names::{Role, strip_suffix};

use crate::db::{Db, DbError, NodeContext};
use crate::lag::Lag;
use crate::sqlite::header::{self, DB_HEADER_LEN, DbHeader};
use crate::sqlite::journal;
use crate::sqlite::wal::{ByteOrder, WalHeader, WalSalts};
use crate::sqlite::wal_index::{self, WalIndexHeader};
use crate::store::{Store, chain};
use crate::watch::{Watcher, may_become_database};

/// Handle of a program on a database that it may write.
const MARK_PLAIN: u8 = 0;
/// Handle of a thread of ours.
const MARK_OWN: u8 = 1;
/// Handle of a reader of a replica's database, which is counted.
const MARK_READER: u8 = 2;
/// A program's handle of a wal-index.
const MARK_INDEX: u8 = 3;
/// Length to which SQLite cuts a wal-index that it is the first to open.
const FRESH_SHM_LEN: u64 = 3;

/// The files of a node, as the mount shows them.
#[derive(Debug)]
pub struct LiteVolume {
    node: Arc<NodeContext>,
    store: Arc<Store>,
    watcher: Arc<Watcher>,
    lag: Arc<Lag>,
    list_virtual: bool,
}

impl LiteVolume {
    /// Makes the volume of a store.
    #[must_use]
    pub fn new(
        node: Arc<NodeContext>,
        store: Arc<Store>,
        watcher: Arc<Watcher>,
        lag: Arc<Lag>,
        list_virtual: bool,
    ) -> LiteVolume {
        LiteVolume {
            node,
            store,
            watcher,
            lag,
            list_virtual,
        }
    }

    fn is_own(&self, caller: Caller) -> bool {
        self.node.own_threads.lock().contains(&caller.pid)
    }

    /// Returns the database that a companion belongs to, if there is one.
    fn owner(&self, main: &Path) -> Option<Arc<Db>> {
        self.store.at(main)
    }

    /// Returns whether a companion's name belongs to a file that is, or could become, a database.
    fn has_main(&self, main: &Path) -> bool {
        self.store
            .at(main)
            .is_some_and(|db| db.published().page_count > 0)
            || std::fs::symlink_metadata(self.node.files.join(main)).is_ok_and(|m| m.is_file())
    }

    /// Returns whether programs may write what is at a path, which may be a companion.
    fn is_primary_at(&self, path: &Path) -> bool {
        let main = match Role::of(path) {
            Role::Main => path.to_owned(),
            Role::Wal(main) | Role::Shm(main) | Role::Journal(main) => main,
        };
        match self.store.at(&main) {
            Some(db) if db.published().page_count > 0 => db.is_primary(),
            _ => self.node.takes_writes(),
        }
    }

    fn is_primary_for(&self, op: &Op<'_>) -> bool {
        match op {
            Op::Create { path }
            | Op::Unlink { path }
            | Op::Truncate { path, .. }
            | Op::Write { path, .. }
            | Op::Fsync { path } => self.is_primary_at(path),
            Op::Rename { from, to, .. } => {
                let all = self
                    .store
                    .below(from)
                    .into_iter()
                    .chain(self.store.below(to));
                let is_ours = |db: Arc<Db>| db.is_primary() || db.published().page_count == 0;
                self.is_primary_at(from) && self.is_primary_at(to) && all.into_iter().all(is_ours)
            }
            Op::Link { from, to } => self.is_primary_at(from) && self.is_primary_at(to),
            _ => self.node.is_primary(),
        }
    }

    fn open_on_primary(&self, request: &OpenRequest<'_>, own: bool) -> Serve {
        let changing = self.serve_in_any_role(request.path);
        if own {
            return changing;
        }
        if request.writable && matches!(Role::of(request.path), Role::Journal(_)) {
            // Also one that was left behind: whoever writes it ends his transaction by removing it.
            let survivors = &self.node.survivors;
            survivors.journal_used(request.path, request.caller.pid);
        }
        match Role::of(request.path) {
            Role::Wal(main) if request.writable => {
                self.watcher.wal_opened(&main, false);
                changing
            }
            Role::Main if request.writable => {
                self.watcher.file_opened(request.path, false);
                changing
            }
            Role::Journal(main)
                if !request.create
                    && self.has_main(&main)
                    && self.journal_is_kept(request.path) =>
            {
                // PERSIST: the commit point is a write of the header, which must be seen.
                Serve::Cached
            }
            _ => changing,
        }
    }

    /// How a file is opened stays for as long as it is open, whatever this node becomes meanwhile: what a replica would be
    /// served has to be served from the beginning.
    fn serve_in_any_role(&self, path: &Path) -> Serve {
        let (Role::Main | Role::Wal(_)) = Role::of(path) else {
            return Serve::Passthrough;
        };
        let is_database = || match Role::of(path) {
            Role::Wal(main) => self.has_main(&main),
            _ => self.store.at(path).is_some() || may_become_database(&self.node.files.join(path)),
        };
        // What this start has not found out yet is unknown too (INV-QUORUM-3).
        let is_held = || match Role::of(path) {
            Role::Wal(main) => {
                let name = main.to_str().and_then(|name| name.parse().ok());
                name.is_some_and(|name| {
                    self.node.gate.get().is_none() || self.node.gate_of(&name).is_some()
                })
            }
            _ => false,
        };
        match self.node.is_candidate && (is_held() || !self.node.shm_is_shared() && is_database()) {
            true => Serve::Direct,
            false => Serve::Passthrough,
        }
    }

    /// Holds a write to a WAL that completes a commit until the commit may be acknowledged.
    fn before_wal_write(
        &self,
        main: &Path,
        wal: &File,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Errno> {
        let Some(db) = self.owner(main) else {
            return Ok(());
        };
        if self.node.gate_of(db.name()).is_none() {
            return Ok(());
        }
        let held = db
            .hold_commit(wal, offset, data)
            .map_err(|e| refuse(&db, "hold a commit", &e))?;
        match held {
            Some(before) => self.wait_for_others(&db, before),
            None => Ok(()),
        }
    }

    /// Captures the transaction of a journal that is about to end, and waits until the commit may be acknowledged.
    fn commit_journal(&self, db: &Db) -> Result<(), Errno> {
        let before = db.pos();
        db.capture_journal()
            .map_err(|e| refuse(db, "capture journal", &e))?;
        match db.pos() == before {
            true => Ok(()),
            false => self.wait_for_others(db, before),
        }
    }

    /// Returns the database that an operation may have made a commit of.
    fn held_at(&self, op: &Op<'_>) -> Option<Arc<Db>> {
        let (Op::Write { path, .. } | Op::Truncate { path, .. } | Op::Unlink { path }) = op else {
            return None;
        };
        match Role::of(path) {
            Role::Wal(main) | Role::Journal(main) => self.owner(&main),
            _ => None,
        }
    }

    fn wait_for_others(&self, db: &Db, before: crate::ltx::Pos) -> Result<(), Errno> {
        let Some(gate) = self.node.gate_of(db.name()) else {
            return Ok(());
        };
        let pos = db.pos();
        if gate.wait(db, pos) {
            // Until the files have it too (INV-HELD-2).
            db.hold_until_written(before);
            return Ok(());
        }
        db.leave_in_doubt(before);
        tracing::error!(
            db = %db.name(), %pos,
            "no quorum has this commit in time: the program gets an I/O error, and whether it took place is for the cluster to say"
        );
        Err(Errno::EIO)
    }

    /// Returns the database whose position is shown at a path. On a primary it is that of its last commit: who asks after
    /// a commit wants to know that one.
    fn position_at(&self, path: &Path) -> Option<Arc<Db>> {
        let db = self.store.at(&strip_suffix(path, "-pos")?)?;
        if db.is_primary()
            && let Err(error) = db.capture_now()
        {
            // The watcher tries again.
            tracing::warn!(db = %db.name(), error = chain(&error), "cannot capture");
        }
        (db.published().page_count > 0).then_some(db)
    }

    /// Returns whether a journal was left by a finished transaction with its header zeroed.
    fn journal_is_kept(&self, path: &Path) -> bool {
        let mut head = [0; journal::JOURNAL_HEADER_LEN];
        File::open(self.node.files.join(path))
            .and_then(|f| f.read_exact_at(&mut head, 0))
            .is_ok_and(|()| journal::is_zeroed_header(&head))
    }

    /// Where the kernel cannot serve a replica's database and WAL from their backing files, it is to keep nothing of
    /// them: they change under it, and it may drop the length that it is told while a request of its own is under way.
    fn serve_on_replica(&self, path: &Path) -> Serve {
        if self.node.is_candidate {
            return self.serve_in_any_role(path);
        }
        let main = match Role::of(path) {
            Role::Main => path.to_owned(),
            Role::Wal(main) => main,
            Role::Shm(_) | Role::Journal(_) => return Serve::Passthrough,
        };
        let is_replicated = self.store.at(&main).is_some();
        if is_replicated && !self.node.shm_is_shared() {
            Serve::Direct
        } else {
            Serve::Passthrough
        }
    }

    fn open_on_replica(&self, request: &OpenRequest<'_>) -> Result<OpenAnswer, Errno> {
        let serve = self.serve_on_replica(request.path);
        let answer = |mark| Ok(OpenAnswer { serve, mark });
        match Role::of(request.path) {
            Role::Main => match self.store.at(request.path) {
                Some(db) if db.published().page_count > 0 => {
                    if request.writable && !self.node.is_candidate {
                        return Err(Errno::EROFS);
                    }
                    db.open_for_readers()
                        .map_err(|e| refuse(&db, "open for readers", &e))?;
                    answer(MARK_READER)
                }
                _ => answer(MARK_PLAIN),
            },
            Role::Wal(_) if self.node.is_candidate => answer(MARK_PLAIN),
            Role::Journal(main) if self.node.is_candidate && self.has_main(&main) => {
                match request.writable {
                    // To SQLite: the database cannot be written for now. EROFS would make it think so for good.
                    true => Err(Errno::EACCES),
                    false => answer(MARK_PLAIN),
                }
            }
            Role::Wal(main) | Role::Journal(main) if request.writable && self.has_main(&main) => {
                Err(Errno::EROFS)
            }
            Role::Shm(main) => match self.store.at(&main) {
                Some(db) => {
                    db.index_opened();
                    answer(MARK_INDEX)
                }
                None => answer(MARK_PLAIN),
            },
            _ => answer(MARK_PLAIN),
        }
    }

    /// Does what must be done before an operation on a primary.
    fn before_on_primary(&self, op: &Op<'_>, caller: Caller) -> Result<Flow, Errno> {
        match op {
            Op::Create { path } => {
                if matches!(Role::of(path), Role::Journal(_)) {
                    self.node.survivors.journal_used(path, caller.pid);
                }
                if let Role::Wal(main) | Role::Journal(main) = Role::of(path)
                    && !self.is_own(caller)
                    && self.has_main(&main)
                {
                    let db = self.become_database(&main)?;
                    if let Some(db) = db {
                        db.capture_before_journal()
                            .map_err(|e| refuse(&db, "capture before a journal", &e))?;
                    }
                }
            }
            Op::Truncate { path, size } => return self.before_truncate(path, *size),
            Op::Unlink { path } => {
                self.refuse_survivor(path, caller)?;
                self.before_unlink(path).inspect_err(|_| {
                    // It stays, and removing it is tried again.
                    if matches!(Role::of(path), Role::Journal(_)) {
                        self.node.survivors.journal_used(path, caller.pid);
                    }
                })?;
            }
            Op::Write {
                path,
                file,
                offset,
                data,
            } if matches!(Role::of(path), Role::Wal(_)) => {
                if let Role::Wal(main) = Role::of(path) {
                    self.before_wal_write(&main, file, *offset, data)?;
                }
            }
            Op::Write {
                path,
                offset: 0,
                data,
                ..
            } if data.len() >= journal::JOURNAL_HEADER_LEN => {
                if let Role::Journal(main) = Role::of(path)
                    && journal::is_zeroed_header(&data[..journal::JOURNAL_HEADER_LEN])
                    && let Some(db) = self.owner(&main)
                {
                    self.commit_journal(&db)?;
                }
            }
            Op::Rename { from, to, exchange } => self.before_rename(from, to, *exchange)?,
            Op::Link { from, .. }
                if self
                    .store
                    .at(from)
                    .is_some_and(|db| db.published().page_count > 0) =>
            {
                return Err(Errno::EPERM);
            }
            _ => {}
        }
        Ok(Flow::Proceed)
    }

    fn before_truncate(&self, path: &Path, size: u64) -> Result<Flow, Errno> {
        match Role::of(path) {
            Role::Main => {
                if let Some(db) = self.store.at(path) {
                    // The checkpoint hook.
                    let captured = match size {
                        0 => db.capture_wal(),
                        _ => db.capture_at_checkpoint(),
                    };
                    captured.map_err(|e| refuse(&db, "capture before checkpoint", &e))?;
                    if size == 0 {
                        db.mark_replaced()
                            .map_err(|e| refuse(&db, "note before it is emptied", &e))?;
                    }
                }
            }
            Role::Wal(main) => {
                if let Some(db) = self.owner(&main) {
                    let captured = match size {
                        0 => db.capture_last_of_wal(),
                        _ => db.capture_for_good(),
                    };
                    captured.map_err(|e| refuse(&db, "capture before wal truncation", &e))?;
                }
            }
            Role::Journal(main) if size == 0 => {
                if let Some(db) = self.owner(&main) {
                    self.commit_journal(&db)?;
                }
            }
            Role::Shm(main)
                if size == FRESH_SHM_LEN
                    && self.store.at(&main).is_some()
                    && self.write_fresh_index(path, &main).unwrap_or(false) =>
            {
                return Ok(Flow::Done);
            }
            _ => {}
        }
        Ok(Flow::Proceed)
    }

    /// Answers the truncation of a fresh wal-index with a ready one, where the WAL is empty.
    ///
    /// What SQLite would rebuild says "no pages in the WAL", which makes it ask for the file's size at every read
    /// transaction; that is a request here. An index that states the size is as valid, and is what a TRUNCATE
    /// checkpoint leaves. The caller holds the dead man's switch exclusively: nobody else looks at the file.
    fn write_fresh_index(&self, path: &Path, main: &Path) -> std::io::Result<bool> {
        let files = &self.node.files;
        let wal = strip_suffix(path, "-shm")
            .map(|db| crate::db::paths::with_suffix(&db, "-wal"))
            .unwrap_or_default();
        if std::fs::metadata(files.join(wal)).is_ok_and(|m| m.len() > 0) {
            return Ok(false);
        }
        let main = File::open(files.join(main))?;
        let mut head = [0; DB_HEADER_LEN];
        main.read_exact_at(&mut head, 0)?;
        let Some(db) = DbHeader::parse(&head).filter(DbHeader::is_wal) else {
            return Ok(false);
        };
        let len = main.metadata()?.len();
        if len % u64::from(db.page_size.get()) != 0 {
            return Ok(false);
        }
        let n_page =
            u32::try_from(len / u64::from(db.page_size.get())).map_err(std::io::Error::other)?;
        if n_page != header::page_count(&db, len) && db.page_count_in_header.is_some() {
            return Ok(false);
        }
        let wal = WalHeader {
            order: ByteOrder::NATIVE,
            page_size: db.page_size,
            checkpoint_seq: 0,
            salts: WalSalts(0, 0),
        };
        let shm = std::fs::OpenOptions::new()
            .write(true)
            .open(files.join(path))?;
        if !self.node.shm_is_shared() && shm.metadata()?.len() > 0 {
            // Left by a program that died. The kernel keeps its pages, for the file is as long afterwards as before.
            return Ok(false);
        }
        shm.set_len(0)?;
        shm.write_all_at(
            &wal_index::fresh_block(&WalIndexHeader::of_empty(&wal, n_page)),
            0,
        )?;
        Ok(true)
    }

    /// What could not be opened at the start is not captured: a program that wrote it would lose what it wrote.
    fn refuse_broken(&self, path: &Path) -> Result<(), Errno> {
        if !self.store.has_broken() {
            return Ok(());
        }
        let main = match Role::of(path) {
            Role::Main => path.to_owned(),
            Role::Wal(main) | Role::Shm(main) | Role::Journal(main) => main,
        };
        let Some(why) = main.to_str().and_then(|name| self.store.why_broken(name)) else {
            return Ok(());
        };
        tracing::error!(
            file = %path.display(), why,
            "refused to open: the database could not be read when this node started; see there, and start it again"
        );
        Err(Errno::EIO)
    }

    /// A program that has files of a former mount open closes them as if they were the ones here.
    fn refuse_survivor(&self, path: &Path, caller: Caller) -> Result<(), Errno> {
        let (Role::Wal(main) | Role::Shm(main) | Role::Journal(main)) = Role::of(path) else {
            return Ok(());
        };
        if self.owner(&main).is_none() {
            return Ok(());
        }
        let Some(survivor) = self.node.survivors.may_not_remove(path, caller.pid) else {
            return Ok(());
        };
        tracing::error!(
            file = %path.display(), %survivor,
            "refused to remove: the program has this open through the mount of a daemon that ended; restart the program"
        );
        Err(Errno::EIO)
    }

    fn before_unlink(&self, path: &Path) -> Result<(), Errno> {
        match Role::of(path) {
            Role::Main => {
                if let Some(db) = self.store.at(path) {
                    db.capture_wal()
                        .map_err(|e| refuse(&db, "capture before removal", &e))?;
                }
            }
            Role::Wal(main) => {
                if let Some(db) = self.owner(&main) {
                    db.capture_last_of_wal()
                        .map_err(|e| refuse(&db, "capture before wal removal", &e))?;
                }
            }
            Role::Journal(main) => {
                if let Some(db) = self.owner(&main) {
                    self.commit_journal(&db)?;
                }
            }
            Role::Shm(_) => {}
        }
        Ok(())
    }

    fn before_rename(&self, from: &Path, to: &Path, exchange: bool) -> Result<(), Errno> {
        let mut touched = self.store.below(from);
        touched.extend(self.store.below(to));
        if let Role::Wal(main) | Role::Journal(main) = Role::of(from) {
            touched.extend(self.owner(&main));
        }
        for db in touched {
            db.capture_wal()
                .map_err(|e| refuse(&db, "capture before rename", &e))?;
        }
        for db in self
            .store
            .at(to)
            .into_iter()
            .chain(self.store.at(from).filter(|_| exchange))
        {
            db.mark_replaced()
                .map_err(|e| refuse(&db, "note before another takes its name", &e))?;
        }
        Ok(())
    }

    /// Makes a database of an ordinary or empty file: SQLite has just made a companion beside it.
    fn become_database(&self, main: &Path) -> Result<Option<Arc<Db>>, Errno> {
        let Some(name) = main.to_str().and_then(|s| s.parse().ok()) else {
            return Ok(None);
        };
        if self.store.at(main).is_none() && !may_become_database(&self.node.files.join(main)) {
            // Named as SQLite would name it, by some other program.
            return Ok(None);
        }
        self.store.get_or_create(&name).map(Some).map_err(|error| {
            tracing::error!(db = %name, error = chain(&error), "cannot keep a log for the database, so its writes are refused");
            Errno::from_i32(error.errno())
        })
    }

    fn after_on_primary(&self, op: &Op<'_>) {
        match op {
            Op::Truncate { path, .. } => {
                if let Role::Wal(main) = Role::of(path)
                    && let Some(db) = self.owner(&main)
                {
                    db.wal_replaced();
                    if db.is_replaced() {
                        self.watcher.look_at(&main);
                    }
                }
            }
            Op::Create { path } => match Role::of(path) {
                Role::Wal(main) => {
                    if let Some(db) = self.owner(&main) {
                        db.wal_replaced();
                    }
                    self.watcher.wal_opened(&main, true);
                }
                Role::Main => self.watcher.file_opened(path, true),
                _ => {}
            },
            Op::Fsync { path } => {
                // SQLite publishes the commit once this returns, in memory, where no event tells of it.
                if let Role::Wal(main) = Role::of(path) {
                    self.watcher.wal_grew(main);
                }
            }
            Op::Unlink { path } => match Role::of(path) {
                Role::Main => {
                    if let Some(db) = self.store.at(path) {
                        report(
                            &db,
                            "record the removal",
                            db.dropped().and_then(|()| db.sync_log()),
                        );
                    }
                }
                Role::Wal(main) => {
                    if let Some(db) = self.owner(&main) {
                        db.wal_replaced();
                        // The database may go on in another mode.
                        self.watcher.file_opened(&main, false);
                        if db.is_replaced() {
                            self.watcher.look_at(&main);
                        }
                    }
                }
                _ => {}
            },
            Op::Rename { from, to, exchange } => {
                for db in self.store.below(from) {
                    if !exchange {
                        report(
                            &db,
                            "record the renaming",
                            db.dropped().and_then(|()| db.sync_log()),
                        );
                    }
                    self.watcher.look_at(&db.paths().relative);
                }
                self.watcher.look_below(to);
            }
            _ => {}
        }
    }
}

impl fuse::Volume for LiteVolume {
    fn virtual_file(&self, path: &Path) -> Option<VirtualFile> {
        let text = |data: String, ms: i64| {
            let mtime = UNIX_EPOCH + Duration::from_millis(ms.try_into().unwrap_or(0));
            Some(VirtualFile {
                data: data.into_bytes(),
                mtime,
            })
        };
        match path.to_str()? {
            ".primary" => {
                let host = self
                    .lag
                    .primary_hostname()
                    .filter(|_| !self.node.is_primary())?;
                text(format!("{host}\n"), self.lag.primary_ms())
            }
            ".lag" => text(
                format!("{:+010}\n", self.lag.ms(self.node.is_primary())),
                self.lag.primary_ms(),
            ),
            _ => {
                let published = self.position_at(path)?.published();
                text(format!("{}\n", published.pos), published.timestamp_ms)
            }
        }
    }

    fn is_virtual_name(&self, path: &Path) -> bool {
        path == Path::new(".primary")
            || path == Path::new(".lag")
            || self.position_at(path).is_some()
    }

    fn may_appear(&self, path: &Path) -> bool {
        strip_suffix(path, "-pos").is_some()
    }

    fn virtual_names(&self, dir: &Path) -> Vec<OsString> {
        let mut names = Vec::new();
        if !self.list_virtual {
            // Programs that copy, archive or remove what a directory lists could do nothing with them.
            return names;
        }
        if dir.as_os_str().is_empty() {
            names.push(".lag".into());
            if self.virtual_file(Path::new(".primary")).is_some() {
                names.push(".primary".into());
            }
        }
        for db in self.store.all() {
            let relative = &db.paths().relative;
            if relative.parent() == Some(dir)
                && db.published().page_count > 0
                && let Some(name) = relative.file_name()
            {
                let mut name = name.to_owned();
                name.push("-pos");
                names.push(name);
            }
        }
        names
    }

    fn open_may_block(&self, request: &OpenRequest<'_>) -> bool {
        // Even if readers are served now: until `open` looks, an idle database may be closed, and would be made ready
        // again, through the mount, on a session thread, for which that thread and whoever it holds up wait for ever.
        (!request.writable || self.node.is_candidate)
            && matches!(Role::of(request.path), Role::Main)
            && self
                .store
                .at(request.path)
                .is_some_and(|db| db.published().page_count > 0 && !db.is_primary())
            && !self.is_own(request.caller)
    }

    fn failed(&self, op: &Op<'_>) -> Option<Errno> {
        let db = self.held_at(op)?;
        let before = db.written()?;
        db.leave_in_doubt(before);
        tracing::error!(
            db = %db.name(),
            "other nodes have this commit, and it cannot be written here: the program gets an I/O error, and the commit is brought into \
             the file as soon as that can be done"
        );
        Some(Errno::EIO)
    }

    fn may_wait(&self, path: &Path) -> bool {
        let (Role::Wal(main) | Role::Journal(main)) = Role::of(path) else {
            return false;
        };
        self.owner(&main)
            .is_some_and(|db| self.node.gate_of(db.name()).is_some())
    }

    fn open(&self, request: &OpenRequest<'_>) -> Result<OpenAnswer, Errno> {
        self.refuse_broken(request.path)?;
        let own = self.is_own(request.caller);
        if self.is_primary_at(request.path) {
            let mark = match Role::of(request.path) {
                _ if own => MARK_OWN,
                Role::Shm(main) => match self.store.at(&main) {
                    Some(db) => {
                        db.index_opened();
                        if db.is_provisional() {
                            // Whoever copied it here is done.
                            self.watcher.look_at(&main);
                        }
                        MARK_INDEX
                    }
                    None => MARK_PLAIN,
                },
                _ => MARK_PLAIN,
            };
            return Ok(OpenAnswer {
                serve: self.open_on_primary(request, own),
                mark,
            });
        }
        if own {
            return Ok(OpenAnswer {
                serve: self.serve_on_replica(request.path),
                mark: MARK_OWN,
            });
        }
        self.open_on_replica(request)
    }

    fn released(&self, path: &Path, writable: bool, mark: u8) {
        if mark == MARK_READER {
            if let Some(db) = self.store.at(path) {
                db.closed_by_reader();
            }
        } else if mark == MARK_INDEX {
            if let Role::Shm(main) = Role::of(path)
                && let Some(db) = self.store.at(&main)
            {
                db.index_closed();
            }
        } else if mark == MARK_PLAIN && writable && self.is_primary_at(path) {
            match Role::of(path) {
                Role::Main => self.watcher.look_at(path),
                // Copied there, by a call of which no event tells.
                Role::Wal(main)
                    if self
                        .store
                        .at(&main)
                        .is_some_and(|db| !db.is_index_open() && db.has_wal()) =>
                {
                    self.watcher.wal_grew(main);
                }
                _ => {}
            }
        }
    }

    fn before(&self, op: &Op<'_>, caller: Caller) -> Result<Flow, Errno> {
        if self.is_primary_for(op) {
            return self.before_on_primary(op, caller);
        }
        if self.is_own(caller) {
            return Ok(Flow::Proceed);
        }
        let is_database = |path: &Path| match Role::of(path) {
            Role::Main => self
                .store
                .at(path)
                .is_some_and(|db| db.published().page_count > 0),
            Role::Wal(main) | Role::Journal(main) => self.has_main(&main),
            Role::Shm(main) => self
                .store
                .at(&main)
                .is_some_and(|db| db.published().page_count > 0),
        };
        let refused = match op {
            Op::Create { path } | Op::Unlink { path } | Op::Truncate { path, .. } => {
                is_database(path)
            }
            Op::Rename { from, to, .. } => {
                is_database(from)
                    || is_database(to)
                    || self
                        .store
                        .below(from)
                        .iter()
                        .any(|d| d.published().page_count > 0)
            }
            Op::Link { from, to } => is_database(from) || is_database(to),
            _ => false,
        };
        if refused {
            Err(Errno::EROFS)
        } else {
            Ok(Flow::Proceed)
        }
    }

    fn after(&self, op: &Op<'_>, _caller: Caller) {
        if let Some(db) = self.held_at(op) {
            db.written();
        }
        if self.is_primary_for(op) {
            self.after_on_primary(op);
        }
    }

    fn passthrough_refused(&self) {
        if self.node.passthrough.swap(false, Ordering::AcqRel) {
            tracing::warn!(
                files = %self.node.files.display(),
                "the kernel refuses passthrough for these files (needs Linux 6.9, CAP_SYS_ADMIN, and a file system that is \
                 not stacked on another); serving from user space, slower"
            );
        }
    }
}

/// Logs why something is refused, and returns the errno for it.
fn refuse(db: &Db, what: &str, error: &DbError) -> Errno {
    tracing::error!(db = %db.name(), what, error = chain(error), "refused to a program, nothing is lost");
    Errno::from_i32(error.errno())
}

fn report(db: &Db, what: &str, result: Result<(), DbError>) {
    if let Err(error) = result {
        tracing::error!(db = %db.name(), what, error = chain(&error), "failed");
    }
}
