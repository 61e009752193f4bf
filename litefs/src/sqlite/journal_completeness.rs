//! Checks INV-JOURNAL-1 against SQLite: what a transaction changed is among [`changed_pages`] of its journal.
//!
//! SQLite's Unix VFS lets us replace the system calls it makes. Ours look at `unlink`, `ftruncate` and the writes, and
//! at the commit point of a journal (of any mode) keep a copy of journal and database. One seed decides a run; a failing one
//! is printed, and `LITEFS_JOURNAL_SEED` replays it alone. `LITEFS_JOURNAL_SEEDS` sets how many are tried.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rusqlite::{Connection, ffi};

use super::header::{DbHeader, page_count};
use super::journal::*;
use crate::ltx::Pgno;

/// Journal and database as they were right before a journal was deleted, cut to nothing, or its header zeroed.
struct CommitPoint {
    journal: Vec<u8>,
    db: Vec<u8>,
}

struct Recorder {
    journal: PathBuf,
    db: PathBuf,
    seen: Vec<CommitPoint>,
}

thread_local! {
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

fn note_path(path: &Path) {
    RECORDER.with_borrow_mut(|recorder| {
        let Some(recorder) = recorder.as_mut().filter(|r| r.journal == path) else {
            return;
        };
        // SQLite unlinks a journal that may not be there when it leaves TRUNCATE or PERSIST.
        let Ok(journal) = std::fs::read(&recorder.journal) else {
            return;
        };
        let db = std::fs::read(&recorder.db).unwrap();
        recorder.seen.push(CommitPoint { journal, db });
    });
}

fn note_fd(fd: c_int) {
    if RECORDER.with_borrow(Option::is_some)
        && let Ok(path) = std::fs::read_link(format!("/proc/self/fd/{fd}"))
    {
        note_path(&path);
    }
}

/// Tells whether a write is PERSIST's commit.
///
/// # Safety
/// `bytes` has `len` readable bytes.
unsafe fn is_commit_write(bytes: *const c_void, len: usize, offset: i64) -> bool {
    // SAFETY: as the caller promises.
    offset == 0 && is_zeroed_header(unsafe { std::slice::from_raw_parts(bytes.cast(), len) })
}

unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: SQLite passes a path as unlink(2) takes it.
    unsafe {
        note_path(Path::new(OsStr::from_bytes(
            CStr::from_ptr(path).to_bytes(),
        )));
        libc::unlink(path)
    }
}

unsafe extern "C" fn ftruncate(fd: c_int, len: i64) -> c_int {
    if len == 0 {
        note_fd(fd);
    }
    // SAFETY: any arguments are fine.
    unsafe { libc::ftruncate(fd, len) }
}

unsafe extern "C" fn pwrite(fd: c_int, bytes: *const c_void, len: usize, at: i64) -> isize {
    // SAFETY: SQLite passes what pwrite(2) takes.
    unsafe {
        if is_commit_write(bytes, len, at) {
            note_fd(fd);
        }
        libc::pwrite(fd, bytes, len, at)
    }
}

unsafe extern "C" fn write(fd: c_int, bytes: *const c_void, len: usize) -> isize {
    // SAFETY: SQLite passes what write(2) takes.
    unsafe {
        if is_commit_write(bytes, len, 0) && libc::lseek(fd, 0, libc::SEEK_CUR) == 0 {
            note_fd(fd);
        }
        libc::write(fd, bytes, len)
    }
}

/// Replaces the system calls, once for the process; threads without a recorder only pass through.
fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let calls: [(&CStr, *const ()); 5] = [
            (c"unlink", unlink as *const ()),
            (c"ftruncate", ftruncate as *const ()),
            (c"pwrite", pwrite as *const ()),
            (c"pwrite64", pwrite as *const ()),
            (c"write", write as *const ()),
        ];
        // SAFETY: the default VFS of Linux has these methods, each name takes a function of the signature above, and
        // they live as long as the process.
        unsafe {
            let vfs = ffi::sqlite3_vfs_find(std::ptr::null());
            let set = (*vfs).xSetSystemCall.unwrap();
            let get = (*vfs).xGetSystemCall.unwrap();
            for (name, call) in calls {
                if get(vfs, name.as_ptr()).is_some() {
                    let call = std::mem::transmute::<*const (), unsafe extern "C" fn()>(call);
                    assert_eq!(set(vfs, name.as_ptr(), Some(call)), ffi::SQLITE_OK);
                }
            }
        }
    });
}

/// How often a run met what is worth meeting.
#[derive(Debug, Default, Clone, Copy)]
struct Met {
    commit_points: usize,
    changed: usize,
    journaled_or_new: usize,
    leaves: usize,
    /// Copies of a running transaction that were rolled back as after a crash.
    crashes: usize,
    /// Those of them in which playback restored something.
    hot_crashes: usize,
    /// Changed pages that no record covers, but a journaled trunk lists.
    unjournaled_leaves: usize,
    /// Changed pages that neither covers, past the header's count and within the journal's.
    tail_pages: usize,
    /// Rollbacks that left other bytes than there were.
    dirty_rollbacks: usize,
    many_segments: usize,
    without_header: usize,
    page_size_changes: usize,
    late_truncations: usize,
}

impl std::ops::AddAssign for Met {
    fn add_assign(&mut self, o: Met) {
        self.commit_points += o.commit_points;
        self.changed += o.changed;
        self.journaled_or_new += o.journaled_or_new;
        self.leaves += o.leaves;
        self.crashes += o.crashes;
        self.hot_crashes += o.hot_crashes;
        self.unjournaled_leaves += o.unjournaled_leaves;
        self.tail_pages += o.tail_pages;
        self.dirty_rollbacks += o.dirty_rollbacks;
        self.many_segments += o.many_segments;
        self.without_header += o.without_header;
        self.page_size_changes += o.page_size_changes;
        self.late_truncations += o.late_truncations;
    }
}

/// Returns which pages differ, a missing one included, of those the new file has.
fn differing_pages(old: &[u8], new: &[u8], page_size: usize) -> BTreeSet<Pgno> {
    let mut old = old.chunks(page_size);
    let differ = new.chunks(page_size).map(|page| old.next() != Some(page));
    (1..)
        .zip(differ)
        .filter(|(_, differ)| *differ)
        .filter_map(|(n, _)| Pgno::new(n))
        .collect()
}

/// Checks one commit point against the database before it.
fn check(old: &[u8], point: &CommitPoint, rolled_back: bool, met: &mut Met) -> Result<(), String> {
    met.commit_points += 1;
    let journal = match journal_pages(point.journal.as_slice()) {
        Ok(journal) => journal,
        Err(e) => {
            met.without_header += 1;
            return if old == point.db {
                Ok(())
            } else {
                Err(format!("changed, but {e}"))
            };
        }
    };
    let page_size = journal.page_size.len();
    let changed = differing_pages(old, &point.db, page_size);
    let final_count = u32::try_from(point.db.len().div_ceil(page_size)).unwrap();
    let candidates = changed_pages(point.journal.as_slice(), final_count).unwrap();
    met.changed += changed.len();
    met.journaled_or_new += candidates.journaled_or_new.len();
    met.leaves += candidates.leaves.len();

    let header = DbHeader::parse(&point.db);
    met.page_size_changes += usize::from(header.is_some_and(|h| h.page_size != journal.page_size));
    met.dirty_rollbacks += usize::from(rolled_back && old != point.db);
    let sectors = point
        .journal
        .as_slice()
        .chunks(512)
        .filter(|s| s.starts_with(&JOURNAL_MAGIC));
    met.many_segments += usize::from(sectors.count() > 1);

    let initial = journal.initial_page_count;
    let journaled: BTreeSet<Pgno> = journal.pages.iter().map(|p| p.0).collect();
    for pgno in changed.difference(&journaled) {
        met.unjournaled_leaves += usize::from(candidates.leaves.contains(pgno));
        let is_new = candidates.journaled_or_new.contains(pgno);
        met.tail_pages += usize::from(is_new && pgno.get() <= initial);
    }
    let missed: Vec<_> = changed
        .iter()
        .filter(|p| !candidates.contains(**p))
        .collect();
    if !missed.is_empty() {
        let count = journaled.len();
        return Err(format!(
            "missed pages {missed:?} of {final_count}; {count} journaled"
        ));
    }
    if rolled_back {
        check_rollback(old, &point.db)
    } else {
        Ok(())
    }
}

/// Checks that a rollback, or playback of a hot journal, changed nothing but free-list leaves.
fn check_rollback(old: &[u8], new: &[u8]) -> Result<(), String> {
    let Some(header) = DbHeader::parse(old) else {
        return Ok(());
    };
    let count = page_count(&header, old.len() as u64);
    let leaves = freelist_leaves(old).unwrap();
    let mut missed = differing_pages(old, new, header.page_size.len());
    missed.retain(|pgno| pgno.get() <= count && !leaves.contains(pgno));
    if missed.is_empty() {
        Ok(())
    } else {
        Err(format!("rollback changed pages {missed:?}"))
    }
}

struct Run {
    rng: StdRng,
    conn: Connection,
    /// The database as of the last commit point.
    db: Vec<u8>,
    path: PathBuf,
    has_dbpage: bool,
    log: Vec<String>,
    met: Met,
}

impl Run {
    fn new(seed: u64, dir: &Path) -> Run {
        install();
        let path = dir.join("db");
        let conn = Connection::open(&path).unwrap();
        let journal = dir.join("db-journal");
        let recorder = Recorder {
            journal,
            db: path.clone(),
            seen: Vec::new(),
        };
        RECORDER.set(Some(recorder));
        let options: i64 = conn
            .query_row(
                "SELECT count(*) FROM pragma_compile_options WHERE compile_options='ENABLE_DBPAGE_VTAB'",
                [],
                |r| r.get(0),
            )
            .unwrap();
        let rng = StdRng::seed_from_u64(seed);
        let (has_dbpage, log, met) = (options > 0, Vec::new(), Met::default());
        Run {
            rng,
            conn,
            db: Vec::new(),
            path,
            has_dbpage,
            log,
            met,
        }
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of.choose(&mut self.rng).unwrap()
    }

    fn file_control(&mut self, op: c_int, mut value: c_int) {
        self.log.push(format!("-- file_control {op} {value}"));
        // SAFETY: the handle is open, and both controls used here take a pointer to an int.
        let rc = unsafe {
            ffi::sqlite3_file_control(
                self.conn.handle(),
                c"main".as_ptr(),
                op,
                (&raw mut value).cast(),
            )
        };
        assert_eq!(rc, ffi::SQLITE_OK);
    }

    /// Runs SQL; a statement may fail (constraint, VACUUM in a transaction, no such table), which is part of the game.
    fn sql(&mut self, sql: String) -> bool {
        let done = self.conn.execute_batch(&sql).is_ok();
        self.log
            .push(format!("{sql};{}", if done { "" } else { " -- failed" }));
        done
    }

    /// Checks what happened since the last call.
    fn settle(&mut self, rolled_back: bool) -> Result<(), String> {
        let seen = RECORDER.with_borrow_mut(|r| std::mem::take(&mut r.as_mut().unwrap().seen));
        for point in seen {
            check(&self.db, &point, rolled_back, &mut self.met)?;
            self.db = point.db;
        }
        let now = std::fs::read(&self.path).unwrap();
        if now == self.db {
            return Ok(());
        }
        // A transaction that shrinks the database truncates the file after its commit point.
        let count = DbHeader::parse(&now).map_or(0, |h| {
            u64::from(h.page_size.get()) * u64::from(page_count(&h, 0))
        });
        if self.db.starts_with(&now) && now.len() as u64 >= count {
            self.met.late_truncations += 1;
            self.db = now;
            return Ok(());
        }
        let differ = differing_pages(&self.db, &now, 512);
        let sizes = (self.db.len(), now.len());
        Err(format!(
            "changed outside a commit point: sizes {sizes:?}, sectors {differ:?}"
        ))
    }

    fn configure(&mut self) {
        let page_size = self.pick(&["512", "512", "1024", "4096", "65536"]);
        let auto_vacuum = self.pick(&["0", "1", "2"]);
        self.sql(format!(
            "PRAGMA page_size={page_size}; PRAGMA auto_vacuum={auto_vacuum}"
        ));
        if self.rng.random_ratio(1, 8) {
            self.file_control(ffi::SQLITE_FCNTL_RESERVE_BYTES, 24);
        }
        if self.rng.random_ratio(1, 6) {
            let pages = self.rng.random_range(3..40);
            self.file_control(
                ffi::SQLITE_FCNTL_CHUNK_SIZE,
                pages * page_size.parse::<c_int>().unwrap(),
            );
        }
        if self.rng.random_ratio(1, 6) {
            self.sql("PRAGMA locking_mode=exclusive".into());
        }
        self.reconfigure();
    }

    fn reconfigure(&mut self) {
        let mode = self.pick(&["delete", "truncate", "persist"]);
        let sync = self.pick(&["off", "normal", "full", "extra"]);
        let secure = self.pick(&["0", "1", "fast"]);
        let cache = self.pick(&["1", "5", "10", "30", "2000"]);
        let mmap = self.pick(&["0", "0", "10000000"]);
        let limit = self.pick(&["-1", "-1", "0", "5000"]);
        self.sql(format!(
            "PRAGMA journal_mode={mode}; PRAGMA synchronous={sync}; PRAGMA secure_delete={secure}; \
             PRAGMA cache_size={cache}; PRAGMA cache_spill=1; PRAGMA mmap_size={mmap}; PRAGMA journal_size_limit={limit}"
        ));
    }

    fn statement(&mut self) -> String {
        let t = self.rng.random_range(0..5);
        let n = self.rng.random_range(1..60);
        let len = *[5, 50, 300, 1500, 9000, 40000]
            .choose(&mut self.rng)
            .unwrap();
        let salt = self.rng.random_range(0..1_000_000);
        let rows =
            format!("WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<{n})");
        let len = if n > 20 { len.min(1500) } else { len };
        match self.rng.random_range(0..24) {
            0..=1 => format!("CREATE TABLE t{t}(id INTEGER PRIMARY KEY, k, x)"),
            2 => format!("CREATE TABLE t{t}(id, k, x, PRIMARY KEY(k, id)) WITHOUT ROWID"),
            3..=8 => format!(
                "INSERT INTO t{t}(k, x) {rows} SELECT (i*7919+{salt})%1000, zeroblob({len})||i||{salt} FROM c"
            ),
            9 => format!(
                "INSERT INTO t{t}(id, k, x) VALUES ({salt}, {n}, hex(zeroblob({len}))||{salt})"
            ),
            10..=12 => format!("DELETE FROM t{t} WHERE k % {n} < {}", n / 2 + 1),
            13 => format!("DELETE FROM t{t}"),
            14 => format!("DROP TABLE t{t}"),
            15..=16 => format!("UPDATE t{t} SET x = zeroblob({len})||{salt} WHERE k % {n} = 0"),
            17 => format!(
                "CREATE INDEX IF NOT EXISTS i{t} ON t{t}(k, substr(x, 1, {}))",
                len.min(400)
            ),
            18 => format!("DROP INDEX IF EXISTS i{t}"),
            19 => format!("PRAGMA incremental_vacuum({n})"),
            20 => format!(
                "INSERT INTO t{t}(k, x) SELECT k, x FROM t{} LIMIT {n}",
                (t + 1) % 5
            ),
            21 => "REINDEX; ANALYZE".into(),
            22 if self.has_dbpage => {
                format!(
                    "UPDATE sqlite_dbpage SET data=data WHERE pgno % {n} = {}",
                    n / 2
                )
            }
            22 => format!("PRAGMA user_version={salt}"),
            _ => format!("ALTER TABLE t{t} ADD COLUMN c{salt} DEFAULT {n}"),
        }
    }

    fn transaction(&mut self) -> Result<bool, String> {
        match self.rng.random_range(0..20) {
            0 if self.rng.random_ratio(1, 6) => {
                self.reset();
                return Ok(false);
            }
            1 if self.rng.random_ratio(1, 2) => {
                let attached = self.path.with_file_name("other");
                self.sql(format!("ATTACH '{}' AS other", attached.display()));
                let sql = self.statement();
                let n = self.rng.random_range(0..1000);
                self.sql(format!(
                    "BEGIN; CREATE TABLE IF NOT EXISTS other.o(x); INSERT INTO other.o VALUES ({n})"
                ));
                self.sql(sql);
                self.sql("COMMIT".into());
                self.sql("DETACH other".into());
                return Ok(false);
            }
            0 => {
                if self.rng.random_ratio(1, 3) {
                    let size = self.pick(&["512", "1024", "4096"]);
                    self.sql(format!("PRAGMA page_size={size}"));
                }
                if self.rng.random_ratio(1, 4) {
                    let auto_vacuum = self.pick(&["0", "1", "2"]);
                    self.sql(format!("PRAGMA auto_vacuum={auto_vacuum}"));
                }
                self.sql("VACUUM".into());
                return Ok(false);
            }
            1 => {
                self.reconfigure();
                return Ok(false);
            }
            2 if self.rng.random_ratio(1, 3) => {
                self.backup_into();
                return Ok(false);
            }
            2..=6 => {
                let sql = self.statement();
                self.sql(sql);
                return Ok(false);
            }
            _ => {}
        }
        let begin = self.pick(&["BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"]);
        self.sql(begin.into());
        let mut depth = 0;
        for _ in 0..self.rng.random_range(1..9) {
            match self.rng.random_range(0..8) {
                0 => {
                    depth += 1;
                    self.sql(format!("SAVEPOINT s{depth}"));
                }
                1 if depth > 0 => {
                    let to = self.rng.random_range(1..=depth);
                    self.sql(format!("ROLLBACK TO s{to}"));
                    depth = to;
                }
                2 if depth > 0 => {
                    self.sql(format!("RELEASE s{depth}"));
                    depth -= 1;
                }
                _ => {
                    let sql = self.statement();
                    self.sql(sql);
                }
            }
            if self.rng.random_ratio(1, 6) {
                self.crash()?;
            }
        }
        let roll_back = self.rng.random_ratio(1, 4);
        if roll_back || !self.sql("COMMIT".into()) {
            self.sql("ROLLBACK".into());
        }
        Ok(roll_back)
    }

    /// Empties the database by VACUUM, with a page count of 0 to begin with.
    fn reset(&mut self) {
        use rusqlite::config::DbConfig;
        self.log.push("-- reset".into());
        self.conn
            .set_db_config(DbConfig::SQLITE_DBCONFIG_RESET_DATABASE, true)
            .unwrap();
        self.sql("VACUUM".into());
        self.conn
            .set_db_config(DbConfig::SQLITE_DBCONFIG_RESET_DATABASE, false)
            .unwrap();
    }

    /// Copies database and journal as a crash would leave them, and rolls the copy back with SQLite and with our playback.
    fn crash(&mut self) -> Result<(), String> {
        let dir = tempfile::Builder::new().tempdir_in(scratch()).unwrap();
        let copy = dir.path().join("db");
        let Ok(journal) = std::fs::read(self.path.with_file_name("db-journal")) else {
            return Ok(());
        };
        let db = std::fs::read(&self.path).unwrap();
        std::fs::write(&copy, &db).unwrap();
        std::fs::write(dir.path().join("db-journal"), &journal).unwrap();
        let other = Connection::open(&copy).unwrap();
        other
            .query_row("PRAGMA user_version", [], |_| Ok(()))
            .unwrap();
        drop(other);
        let theirs = std::fs::read(&copy).unwrap();

        let mut ours = db.clone();
        if is_hot_header(&journal)
            && let Ok(playback) = playback(journal.as_slice())
        {
            let page_size = playback.page_size.len();
            let len = playback.page_count as usize * page_size;
            if ours.len() > len || ours.len() + page_size <= len {
                ours.resize(len, 0);
            }
            for (pgno, offset) in playback.pages {
                let (to, from) = (pgno.index() * page_size, usize::try_from(offset).unwrap());
                ours[to..to + page_size].copy_from_slice(&journal[from..from + page_size]);
            }
        }
        self.met.crashes += 1;
        self.met.hot_crashes += usize::from(db != theirs);
        if ours != theirs && !db.is_empty() {
            let differ = differing_pages(&theirs, &ours, 512);
            let sizes = (self.db.len(), db.len(), theirs.len(), ours.len());
            return Err(format!(
                "our playback differs in sectors {differ:?}, sizes {sizes:?}"
            ));
        }
        check_rollback(&self.db, &theirs)
    }

    /// Overwrites the database through SQLite's backup API.
    fn backup_into(&mut self) {
        let from = Connection::open_in_memory().unwrap();
        let size: i64 = self
            .conn
            .query_row("PRAGMA page_size", [], |r| r.get(0))
            .unwrap();
        let rows = self.rng.random_range(1..300);
        from.execute_batch(&format!(
            "PRAGMA page_size={size}; CREATE TABLE t0(id INTEGER PRIMARY KEY, k, x); \
             WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<{rows}) \
             INSERT INTO t0(k, x) SELECT i, zeroblob(100)||i FROM c"
        ))
        .unwrap();
        self.log.push(format!("-- backup of {rows} rows"));
        let backup = rusqlite::backup::Backup::new(&from, &mut self.conn);
        backup
            .unwrap()
            .run_to_completion(7, std::time::Duration::ZERO, None)
            .unwrap();
    }

    fn run(&mut self) -> Result<Met, String> {
        self.configure();
        self.settle(false)?;
        for _ in 0..self.rng.random_range(10..60) {
            let rolled_back = self.transaction()?;
            self.settle(rolled_back)?;
        }
        let ok: String = self
            .conn
            .query_row("PRAGMA integrity_check", [], |r| r.get(0))
            .unwrap();
        if ok == "ok" {
            Ok(self.met)
        } else {
            Err(format!("integrity_check: {ok}"))
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        RECORDER.set(None);
    }
}

fn run_seed(seed: u64) -> Met {
    let dir = tempfile::Builder::new().tempdir_in(scratch()).unwrap();
    let mut run = Run::new(seed, dir.path());
    match run.run() {
        Ok(met) => met,
        Err(e) => {
            let last = run.log.len().saturating_sub(60);
            panic!(
                "LITEFS_JOURNAL_SEED={seed}: {e}\n{}",
                run.log[last..].join("\n")
            )
        }
    }
}

/// Memory is faster, and what is tested does not depend on the disk.
fn scratch() -> PathBuf {
    let shm = PathBuf::from("/dev/shm");
    if shm.is_dir() {
        shm
    } else {
        std::env::temp_dir()
    }
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn changed_pages_are_among_the_candidates() {
    let mut met = Met::default();
    let seeds = match env("LITEFS_JOURNAL_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..env("LITEFS_JOURNAL_SEEDS").unwrap_or(60),
    };
    let all = seeds.end - seeds.start > 50;
    for seed in seeds {
        met += run_seed(seed);
    }
    println!("{met:?}");
    let hard = [
        met.unjournaled_leaves,
        met.tail_pages,
        met.dirty_rollbacks,
        met.many_segments,
        met.without_header,
        met.page_size_changes,
        met.late_truncations,
        met.hot_crashes,
    ];
    assert!(
        !all || hard.iter().all(|n| *n > 0),
        "a hard state was never reached: {met:?}"
    );
}

/// The journaled pages and leaves alone are not enough: the file is longer than the database, so its last pages are new to
/// SQLite but old to the journal, and are not journaled.
#[test]
fn a_file_longer_than_its_database_changes_pages_nobody_journals() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = Run::new(1, dir.path());
    run.sql("PRAGMA page_size=512; CREATE TABLE t(x)".into());
    run.settle(false).unwrap();
    let mut file = run.db.clone();
    file.resize(512 * 10, 0xaa);
    std::fs::write(&run.path, &file).unwrap();
    run.db = file;
    assert!(run.sql("INSERT INTO t VALUES (zeroblob(2000))".into()));
    let point = RECORDER
        .with_borrow_mut(|r| r.as_mut().unwrap().seen.pop())
        .unwrap();
    let journal = journal_pages(point.journal.as_slice()).unwrap();
    assert_eq!(
        journal.initial_page_count, 10,
        "the journal counts by the file"
    );
    let journaled: Vec<u32> = journal.pages.iter().map(|p| p.0.get()).collect();
    assert_eq!(journaled, [1, 2]);
    let changed = differing_pages(&run.db, &point.db, 512);
    assert!(changed.contains(&Pgno::new(3).unwrap()), "{changed:?}");
    let header = DbHeader::parse(&run.db).unwrap();
    assert_eq!(page_count(&header, run.db.len() as u64), 2);
    check(&run.db, &point, false, &mut Met::default()).unwrap();
}
