use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode};

use super::*;

struct Db {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn db(journal_mode: &str) -> (Db, Connection) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let conn = Connection::open(&path).unwrap();
    let sql = format!("PRAGMA journal_mode={journal_mode}; CREATE TABLE t(x)");
    conn.execute_batch(&sql).unwrap();
    conn.busy_timeout(std::time::Duration::ZERO).unwrap();
    (Db { _dir: dir, path }, conn)
}

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn shm_path(db: &Db) -> PathBuf {
    db.path.with_file_name("db-shm")
}

fn is_busy(result: rusqlite::Result<usize>) -> bool {
    matches!(result, Err(e) if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy))
}

#[test]
fn two_descriptors_conflict_and_conversion_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (a, b) = (open(file.path()), open(file.path()));
    let (a, b) = (OfdLocks::new(a.as_fd()), OfdLocks::new(b.as_fd()));
    assert!(a.try_read(shm::WRITE).unwrap() && b.try_read(shm::WRITE).unwrap());
    assert!(!a.try_write(shm::WRITE).unwrap(), "b still reads");
    assert_eq!(
        b.conflict(LockKind::Write, shm::WRITE).unwrap(),
        Some(LockKind::Read)
    );
    assert_eq!(b.conflict(LockKind::Read, shm::WRITE).unwrap(), None);
    b.unlock(shm::WRITE).unwrap();
    b.unlock(shm::WRITE).unwrap();
    assert!(a.try_write(shm::WRITE).unwrap());
    assert!(!b.try_read(shm::WRITE).unwrap() && b.try_write(shm::CKPT).unwrap());
    assert_eq!(
        b.conflict(LockKind::Read, shm::ALL_BUT_DMS).unwrap(),
        Some(LockKind::Write)
    );
    assert!(shm::ALL_BUT_DMS.overlaps(shm::READ[4]) && !shm::ALL_BUT_DMS.overlaps(shm::DMS));
}

#[test]
fn the_wal_write_lock_conflicts_with_sqlites() {
    let (db, conn) = db("wal");
    let file = open(&shm_path(&db));
    let locks = OfdLocks::new(file.as_fd());
    assert!(
        !locks.try_write(shm::DMS).unwrap(),
        "the connection holds it shared"
    );
    assert!(locks.try_read(shm::DMS).unwrap());

    assert!(locks.try_write(shm::WRITE).unwrap());
    assert!(is_busy(conn.execute("INSERT INTO t VALUES (1)", [])));
    let rows: i64 = conn
        .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap();
    assert_eq!(rows, 0);
    locks.unlock(shm::WRITE).unwrap();
    conn.execute("INSERT INTO t VALUES (1)", []).unwrap();

    conn.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(!locks.try_write(shm::WRITE).unwrap());
    assert_eq!(
        locks.conflict(LockKind::Write, shm::WRITE).unwrap(),
        Some(LockKind::Write)
    );
    conn.execute_batch("COMMIT").unwrap();
    assert!(locks.try_write(shm::WRITE).unwrap());
}

#[test]
fn a_reader_holds_its_read_mark() {
    let (db, conn) = db("wal");
    let file = open(&shm_path(&db));
    let locks = OfdLocks::new(file.as_fd());
    conn.execute_batch("BEGIN; SELECT * FROM t").unwrap();
    let held = shm::READ.map(|r| locks.conflict(LockKind::Write, r).unwrap());
    assert_eq!(
        held.iter().filter(|h| **h == Some(LockKind::Read)).count(),
        1
    );
    conn.execute_batch("COMMIT").unwrap();
    assert!(shm::READ.iter().all(|r| locks.try_write(*r).unwrap()));
}

#[test]
fn rollback_mode_locks_conflict_with_sqlites() {
    let (db, conn) = db("delete");
    let file = open(&db.path);
    let locks = OfdLocks::new(file.as_fd());
    let read = || conn.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0));

    assert!(locks.try_write(db::RESERVED).unwrap());
    assert!(is_busy(conn.execute("INSERT INTO t VALUES (1)", [])));
    assert_eq!(read(), Ok(0));
    locks.unlock(db::RESERVED).unwrap();

    assert!(locks.try_write(db::PENDING).unwrap());
    assert!(is_busy(read().map(|_| 0)), "new readers stay out");
    locks.unlock(db::PENDING).unwrap();

    assert!(locks.try_write(db::SHARED).unwrap());
    assert!(is_busy(read().map(|_| 0)));
    locks.unlock(db::SHARED).unwrap();

    conn.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(!locks.try_write(db::RESERVED).unwrap());
    assert!(!locks.try_write(db::SHARED).unwrap() && locks.try_read(db::SHARED).unwrap());
    assert!(is_busy(
        conn.execute_batch("INSERT INTO t VALUES (1); COMMIT")
            .map(|()| 0)
    ));
    locks.unlock(db::SHARED).unwrap();
    conn.execute_batch("COMMIT").unwrap();
    assert_eq!(read(), Ok(1));
}
