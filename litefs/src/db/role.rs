//! A database changes hands while programs have it open: from their writer to ours, and back.
//!
//! ```text
//! primary ──fence: SQLite's locks for writers are ours, all is captured──▶ replica
//! replica ──promote: our WAL is as SQLite would have left it, locks are given back──▶ primary
//! ```
//!
//! What holds:
//! - INV-ROLE-1: a database is a replica's only while we hold the lock that a writer needs, or nobody has it open; and all
//!   that was committed before is in the log;
//! - INV-ROLE-2: no lock is waited for with the lock of `Inner` held, and the mount is not called with it: a program that
//!   has SQLite's lock may be waiting for us in a hook;
//! - INV-ROLE-3: who has a database open keeps it open: it gets SQLITE_BUSY for a write while the database is a replica's,
//!   and can write when it is not.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::paths::with_suffix;
use super::recover::Rollback;
use super::replica_wal::ReplicaWal;
use super::{Db, DbError, Inner, Stamp, role_steps as steps};
use crate::disk::crash_point;
use crate::sqlite::locks::{LockRange, OfdLocks, db, shm};

/// A program that writes without a pause leaves its lock free for microseconds only: one has to look without a pause.
const TRIES: u32 = 1000;
/// How long to wait between two rounds of tries.
const POLL: Duration = Duration::from_micros(50);
/// How long one round may take for a lock that is contended.
const ROUND: Duration = Duration::from_millis(10);
/// How long new readers of a rollback mode are kept out for those there are to leave, before they are let in again.
const HOLD_READERS_OFF: Duration = Duration::from_millis(200);

/// What was found at one try to fence.
enum Try {
    Fenced,
    /// A program holds this lock.
    Held(&'static str),
}

/// The files of a database opened through the mount, for their locks.
struct Opened {
    main: File,
    shm: Option<File>,
}

/// Takes a lock that programs hold most of the time, if it is free for a moment.
fn seize(locks: &OfdLocks<'_>, range: LockRange) -> std::io::Result<bool> {
    let until = Instant::now() + ROUND;
    loop {
        for _ in 0..TRIES {
            if locks.try_write(range)? {
                return Ok(true);
            }
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(POLL);
    }
}

impl Db {
    /// Takes the right to write from the programs that have the database open, capturing all they committed; readers go on.
    ///
    /// Uses the mount: call it from a thread that serves none of its requests.
    ///
    /// # Errors
    /// `Locked` if a program is in a write transaction for longer than `patience`; it goes on then as before. Disk, log.
    pub fn fence(&self, patience: Duration) -> Result<(), DbError> {
        let deadline = Instant::now() + patience;
        let mut opened = None;
        while self.is_primary() {
            match self.try_fence(&mut opened)? {
                Try::Fenced => break,
                Try::Held(what) if Instant::now() >= deadline => {
                    return Err(DbError::Locked {
                        what,
                        path: self.paths.main.clone(),
                    });
                }
                Try::Held(_) => std::thread::sleep(POLL),
            }
        }
        Ok(())
    }

    fn try_fence(&self, opened: &mut Option<Opened>) -> Result<Try, DbError> {
        if !self.paths.main.exists() || self.published().page_count == 0 {
            let mut inner = self.lock();
            if inner.page_count == 0 {
                Self::forget_wal(&mut inner);
                inner.cursor = None;
                self.is_primary.store(false, Ordering::Release);
                return Ok(Try::Fenced);
            }
        }
        let Some(files) = opened else {
            *opened = Some(self.open_for_locks()?);
            return self.try_fence(opened);
        };
        let has_wal = std::fs::metadata(&self.paths.wal).is_ok_and(|m| m.len() > 0);
        if has_wal || super::capture_scan::is_wal_mode(&files.main) {
            self.try_fence_wal(opened)
        } else {
            self.try_fence_journal(opened)
        }
    }

    fn open_for_locks(&self) -> Result<Opened, DbError> {
        let path = &self.paths.mounted;
        let main = self
            .node
            .in_mount(|| OpenOptions::new().read(true).write(true).open(path))
            .map_err(DbError::io("open", path))?;
        Ok(Opened { main, shm: None })
    }

    /// Opens the wal-index that has the name now; SHARED or more is held on the main file.
    fn open_index(&self, files: &mut Opened) -> Result<(), DbError> {
        // That of an earlier attempt may be gone: who closes the database last removes it.
        let path = with_suffix(&self.paths.mounted, "-shm");
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false);
        let shm = self.node.in_mount(|| how.open(&path));
        files.shm = Some(shm.map_err(DbError::io("open", &path))?);
        Ok(())
    }

    fn try_fence_wal(&self, opened: &mut Option<Opened>) -> Result<Try, DbError> {
        let Some(files) = opened else {
            return Ok(Try::Held("nothing"));
        };
        let io = || DbError::io("lock", &self.paths.shm);
        // Keeps whoever closes the database from removing its companions.
        if !OfdLocks::new(files.main.as_fd())
            .try_read(db::SHARED)
            .map_err(io())?
        {
            return Ok(Try::Held("SHARED"));
        }
        self.open_index(files)?;
        let (main, index) = (
            OfdLocks::new(files.main.as_fd()),
            files.shm.as_ref().map(|f| OfdLocks::new(f.as_fd())),
        );
        let Some(index) = index else {
            return Ok(Try::Held("nothing"));
        };
        let give_back = || {
            let _ = index.unlock(shm::ALL_BUT_DMS);
            let _ = index.unlock(shm::DMS);
            let _ = main.unlock(db::SHARED);
        };
        if !seize(&index, shm::WRITE).map_err(io())? {
            give_back();
            return Ok(Try::Held("WRITE"));
        }
        let wanted: [(LockRange, bool, &'static str); 2] =
            [(shm::DMS, false, "DMS"), (shm::CKPT, true, "CKPT")];
        for (range, exclusive, name) in wanted {
            let taken = match exclusive {
                true => index.try_write(range),
                false => index.try_read(range),
            };
            if !taken.map_err(io())? {
                give_back();
                return Ok(Try::Held(name));
            }
        }
        crash_point(steps::FENCE_LOCKED);
        let is_good = files
            .shm
            .as_ref()
            .is_some_and(|shm| ReplicaWal::index_is_good(shm, &self.paths));
        if !is_good {
            // Nobody reads by it; who would has to build it anew first, which takes these locks.
            for range in shm::READ.into_iter().chain([shm::RECOVER]) {
                if !index.try_write(range).map_err(io())? {
                    give_back();
                    return Ok(Try::Held("READ"));
                }
            }
            return self.fence_anew(opened, true);
        }
        let Some(files) = opened.take() else {
            return Ok(Try::Held("nothing"));
        };
        let Some(shm) = files.shm else {
            return Ok(Try::Held("nothing"));
        };
        let mut wal = ReplicaWal::adopt(&self.node, &self.paths, files.main, shm)?;
        let mut inner = self.lock();
        let doubtful = self.doubtful(&inner)?;
        if doubtful.is_none() {
            self.capture_wal_to(&mut inner, wal.index_header())?;
            self.capture_all(&mut inner, true)?;
        }
        let Some(page_size) = inner.page_size else {
            return Ok(Try::Held("nothing"));
        };
        let page_count = self.pages_in_file(&inner, doubtful.is_some());
        wal.take_over(&self.paths, page_size, page_count)?;
        self.put_in(&mut wal, doubtful)?;
        self.become_replica(&mut inner, wal);
        Ok(Try::Fenced)
    }

    /// A writer of a rollback mode keeps everybody out at its commit; so do we, for a moment.
    fn try_fence_journal(&self, opened: &mut Option<Opened>) -> Result<Try, DbError> {
        let Some(files) = opened else {
            return Ok(Try::Held("nothing"));
        };
        let main = OfdLocks::new(files.main.as_fd());
        let io = || DbError::io("lock", &self.paths.main);
        let give_back = || {
            for range in [db::SHARED, db::PENDING, db::RESERVED] {
                let _ = main.unlock(range);
            }
        };
        if !seize(&main, db::RESERVED).map_err(io())? {
            return Ok(Try::Held("RESERVED"));
        }
        let until = Instant::now() + HOLD_READERS_OFF;
        if !main.try_write(db::PENDING).map_err(io())? {
            give_back();
            return Ok(Try::Held("PENDING"));
        }
        while !main.try_write(db::SHARED).map_err(io())? {
            if Instant::now() >= until {
                give_back();
                return Ok(Try::Held("SHARED"));
            }
            std::thread::sleep(POLL);
        }
        if std::fs::metadata(&self.paths.wal).is_ok_and(|m| m.len() > 0)
            || super::capture_scan::is_wal_mode(&files.main)
        {
            give_back();
            return Ok(Try::Held("WAL")); // its mode was changed a moment ago
        }
        crash_point(steps::FENCE_LOCKED);
        self.open_index(files)?;
        self.fence_anew(opened, false)
    }

    /// Nobody is in a transaction, and nobody can begin one: makes a WAL of ours beside a file that has everything.
    fn fence_anew(&self, opened: &mut Option<Opened>, with_wal: bool) -> Result<Try, DbError> {
        let Some(Opened {
            main,
            shm: Some(shm),
        }) = opened.take()
        else {
            return Ok(Try::Held("nothing"));
        };
        let wal = with_suffix(&self.paths.mounted, "-wal");
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false);
        self.node
            .in_mount(|| how.open(&wal))
            .map_err(DbError::io("open", &wal))?;
        // What the database has after this is known before the lock of `Inner` is taken: who could write is kept out.
        let rolled_back = match with_wal {
            true => Rollback::None,
            false => self.roll_back_journal()?,
        };
        if rolled_back == Rollback::Left {
            return Ok(Try::Held("hot journal"));
        }
        let locks = OfdLocks::new(shm.as_fd());
        let io = || DbError::io("lock", &self.paths.shm);
        for (range, exclusive) in [(shm::DMS, false), (shm::WRITE, true), (shm::CKPT, true)] {
            let taken = match exclusive {
                true => locks.try_write(range),
                false => locks.try_read(range),
            };
            if !taken.map_err(io())? {
                return Ok(Try::Held("wal-index"));
            }
        }
        let (page_size, page_count, doubtful) = {
            let mut inner = self.lock();
            let doubtful = self.doubtful(&inner)?;
            let captures = doubtful.is_none();
            if with_wal && captures {
                self.capture_wal_by_frames(&mut inner)?;
            }
            if captures {
                self.capture_all(&mut inner, with_wal)?;
            }
            if with_wal {
                self.fold_into_file()?;
            }
            let page_count = self.pages_in_file(&inner, !captures);
            (inner.page_size, page_count, doubtful)
        };
        let Some(page_size) = page_size else {
            return Ok(Try::Held("nothing"));
        };
        let mut wal = ReplicaWal::anew(&self.node, &self.paths, main, shm, page_size, page_count)?;
        self.put_in(&mut wal, doubtful)?;
        let mut inner = self.lock();
        self.become_replica(&mut inner, wal);
        Ok(Try::Fenced)
    }

    /// Captures whatever is not, while nobody can write.
    fn capture_all(&self, inner: &mut Inner, with_wal: bool) -> Result<(), DbError> {
        let is_in_doubt = inner.trouble.is_some()
            || inner.is_replaced
            || inner.is_provisional
            || inner.page_count == 0;
        let stamp = File::open(&self.paths.main)
            .ok()
            .and_then(|f| Stamp::of(&f).ok());
        if is_in_doubt || (!with_wal && stamp != inner.stamp) {
            self.capture_view(inner, with_wal)?;
            inner.trouble = None;
        }
        crash_point(steps::FENCE_CAPTURED);
        Ok(())
    }

    /// Returns how many pages readers find without what is in doubt.
    fn pages_in_file(&self, inner: &Inner, is_in_doubt: bool) -> u32 {
        let page_size = inner.page_size.map_or(1, |size| u64::from(size.get()));
        match std::fs::metadata(&self.paths.main) {
            Ok(m) if is_in_doubt => u32::try_from(m.len() / page_size).unwrap_or(u32::MAX),
            _ => inner.page_count,
        }
    }

    /// Keeps what is in doubt for readers to see once it is decided: the log has it, and whoever takes over decides.
    fn put_in(
        &self,
        wal: &mut ReplicaWal,
        doubtful: Option<super::apply::Merged>,
    ) -> Result<(), DbError> {
        let Some(merged) = doubtful else {
            return Ok(());
        };
        wal.append_unseen(&self.paths, &merged)?;
        self.node.has_unseen.store(true, Ordering::Release);
        Ok(())
    }

    /// Lets readers see what was in doubt: the cluster's history has it.
    ///
    /// # Errors
    /// The wal-index cannot be written.
    pub fn show_decided(&self) -> Result<(), DbError> {
        match &mut self.lock().replica_wal {
            Some(wal) => match wal.show() {
                Ok(true) => {
                    tracing::warn!(db = %self.name, "a commit that was in doubt took place");
                    Ok(())
                }
                Ok(false) => Ok(()),
                Err(error) => Err(DbError::io("publish", &self.paths.shm)(error)),
            },
            None => Ok(()),
        }
    }

    fn become_replica(&self, inner: &mut Inner, wal: ReplicaWal) {
        Self::forget_wal(inner);
        inner.cursor = None;
        inner.index_change = None;
        inner.stamp = None;
        inner.unseen = None;
        inner.in_doubt = None;
        inner.replica_wal = Some(wal);
        let mut gate = self.gate.lock();
        self.is_primary.store(false, Ordering::Release);
        gate.is_prepared = true;
    }

    /// Makes a replica's database of one that was opened as a primary's, before any program can open it.
    ///
    /// # Errors
    /// Disk, log.
    pub fn settle_as_replica(&self) -> Result<(), DbError> {
        // What is in the WAL has to be in the log for good before it goes.
        self.capture_for_good()?;
        let mut inner = self.lock();
        if inner.page_count > 0 {
            self.fold_wal_into_file()?;
        }
        Self::forget_wal(&mut inner);
        inner.cursor = None;
        inner.index_change = None;
        inner.stamp = File::open(&self.paths.main)
            .ok()
            .and_then(|f| Stamp::of(&f).ok());
        self.is_primary.store(false, Ordering::Release);
        Ok(())
    }

    /// Gives the right to write to the programs that have the database open.
    ///
    /// # Errors
    /// `Corrupt` if the database is half written: it must be fetched again first.
    pub fn promote(&self) -> Result<(), DbError> {
        if self.serves_readers() && self.reader_count() == 0 {
            self.release_readers()?;
        }
        let mut inner = self.lock();
        if self.is_primary() {
            return Ok(());
        }
        if let Some(what) = &inner.trouble {
            return Err(DbError::Corrupt {
                what: format!("unfinished: {what}"),
                path: self.paths.main.clone(),
            });
        }
        crash_point(steps::PROMOTE);
        self.end_giving_way()?;
        if let Some(wal) = &mut inner.replica_wal {
            wal.write_header(&self.paths)?;
            wal.show()
                .map_err(|e| DbError::io("publish", &self.paths.shm)(e))?;
        }
        Self::forget_wal(&mut inner);
        let wal = inner.replica_wal.take();
        inner.cursor = wal.as_ref().map(ReplicaWal::cursor);
        inner.index_change = None;
        inner.stamp = match &wal {
            // Nothing but what the log has is in the file.
            None => File::open(&self.paths.main)
                .ok()
                .and_then(|f| Stamp::of(&f).ok()),
            Some(_) => None,
        };
        {
            let mut gate = self.gate.lock();
            gate.is_prepared = false;
            self.is_primary.store(true, Ordering::Release);
        }
        // The locks go with the descriptors.
        drop(wal);
        Ok(())
    }

    /// Returns how many handles programs have on the file that has the database's name now, as the mount knows.
    pub fn handles_in_mount(&self) -> u32 {
        let all = self
            .node
            .invalidator
            .lock()
            .as_ref()
            .map_or(0, |inv| inv.handle_count(&self.paths.relative));
        // One is ours while we serve readers.
        all.saturating_sub(u32::from(self.serves_readers()))
    }
}
