//! What SQLite can do to a database, followed by a replica.
//!
//! A program on the replica reads all the time, and must never see an error or a damaged database. After each step both
//! nodes hold the same pages, by their positions, by what SQLite reads, and by SQLite's own check.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rusqlite::fallible_iterator::FallibleIterator;
use rusqlite::{Connection, OpenFlags};

use crate::harness::{Node, assert_same, assert_same_pages, cannot_mount, wait_for};

const TABLE: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)";

/// A primary and a replica.
struct Pair {
    primary: Node,
    replica: Node,
    _dir: tempfile::TempDir,
}

impl Pair {
    fn start(passthrough: bool) -> Option<Pair> {
        if cannot_mount() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let keys = if passthrough {
            ""
        } else {
            ", passthrough: \"off\""
        };
        let primary = Node::primary(dir.path(), keys);
        let replica = Node::replica(dir.path(), "replica", &primary, keys);
        Some(Pair {
            primary,
            replica,
            _dir: dir,
        })
    }

    fn same(&self, db: &mut Connection, name: &str) -> String {
        assert_same_pages(&self.primary, db, &self.replica, name)
    }

    /// Runs statements, comparing after each, beside a reader on the replica.
    fn steps(&self, db: &mut Connection, name: &str, steps: &[&str]) {
        let mut reader = None;
        for step in steps {
            run(db, step);
            if text(db, "PRAGMA page_count") != "0" {
                self.same(db, name);
                reader.get_or_insert_with(|| Reader::start(&self.replica, name));
            }
        }
        reader.unwrap().stop();
    }
}

/// Runs a statement that may give rows, or several.
fn run(db: &Connection, sql: &str) {
    let all = || {
        let mut batch = rusqlite::Batch::new(db, sql);
        while let Some(mut statement) = batch.next()? {
            let mut rows = statement.query([])?;
            while rows.next()?.is_some() {}
        }
        Ok::<(), rusqlite::Error>(())
    };
    all().unwrap_or_else(|e| panic!("{sql}: {e}"));
}

pub(crate) fn text(db: &Connection, sql: &str) -> String {
    db.query_row(sql, [], |r| {
        Ok(match r.get_ref(0)? {
            rusqlite::types::ValueRef::Text(t) => String::from_utf8_lossy(t).into_owned(),
            rusqlite::types::ValueRef::Integer(i) => i.to_string(),
            other => format!("{other:?}"),
        })
    })
    .unwrap_or_else(|e| panic!("{sql}: {e}"))
}

/// Inserts `rows` rows of about `bytes` random bytes.
fn insert(rows: u32, bytes: u32) -> String {
    format!(
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<{rows}) \
         INSERT INTO t(v) SELECT randomblob({bytes}) FROM c"
    )
}

/// A thread that reads a database of a replica through one connection all the time.
struct Reader {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u32>>,
}

impl Reader {
    fn start(replica: &Node, name: &str) -> Reader {
        let path = replica.path(name);
        let stop = Arc::new(AtomicBool::new(false));
        let ends = stop.clone();
        let (begun, has_begun) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || read_on(path, &ends, &begun));
        has_begun.recv().expect("the reader on the replica failed");
        Reader {
            stop,
            thread: Some(thread),
        }
    }

    fn stop(mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let rounds = thread.join().expect("the reader on the replica failed");
            assert!(rounds > 0, "the reader has not read once");
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_on(path: PathBuf, stop: &AtomicBool, begun: &std::sync::mpsc::Sender<()>) -> u32 {
    let db = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    // No busy timeout: nothing may be in a reader's way.
    let mut rounds = 0;
    loop {
        db.execute_batch("BEGIN").unwrap();
        let before = text(&db, "SELECT count(*) FROM sqlite_schema");
        assert_eq!(text(&db, "PRAGMA quick_check"), "ok");
        assert_eq!(text(&db, "SELECT count(*) FROM sqlite_schema"), before);
        db.execute_batch("COMMIT").unwrap();
        rounds += 1;
        let _ = begun.send(());
        if stop.load(Ordering::Acquire) {
            return rounds;
        }
    }
}

#[test]
fn journal_modes_without_a_file_reach_a_replica() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    for mode in ["memory", "off"] {
        let name = format!("{mode}.db");
        let mut db = pair.primary.open(&name);
        assert_eq!(text(&db, &format!("PRAGMA journal_mode={mode}")), mode);
        pair.steps(
            &mut db,
            &name,
            &[
                TABLE,
                &insert(500, 300),
                "UPDATE t SET v=randomblob(200) WHERE id%3=0",
                "BEGIN; UPDATE t SET v=randomblob(100); DELETE FROM t WHERE id<100; COMMIT",
                "PRAGMA cache_size=5",
                &insert(2000, 300),
                "CREATE INDEX i ON t(v)",
                "DELETE FROM t WHERE id>50",
                "VACUUM",
                "DROP TABLE t",
            ],
        );
        drop(db);
    }
    // A rollback of a transaction that was spilled leaves nothing.
    let mut db = pair.primary.open("memory.db");
    run(&db, "PRAGMA journal_mode=memory");
    run(&db, TABLE);
    run(&db, &insert(500, 300));
    pair.same(&mut db, "memory.db");
    run(&db, "PRAGMA cache_size=5");
    run(&db, "BEGIN; UPDATE t SET v=randomblob(300); ROLLBACK");
    pair.same(&mut db, "memory.db");
}

#[test]
fn exclusive_locking_reaches_a_replica() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    exclusive(
        &pair,
        &["wal", "delete", "truncate", "persist", "memory", "off"],
    );
}

#[test]
fn exclusive_locking_without_passthrough() {
    let Some(pair) = Pair::start(false) else {
        return;
    };
    exclusive(&pair, &["wal", "delete", "persist"]);
}

/// Frames that follow an overwritten one have no checksums before the commit, and in some versions of SQLite (3.40) not after
/// it either, if a savepoint was rolled back in between: only the wal-index says that they count.
#[test]
fn a_commit_whose_frames_have_no_checksums_reaches_a_replica() {
    for passthrough in [true, false] {
        let (Some(pair), Some(shell)) = (
            Pair::start(passthrough),
            crate::find_program("sqlite3", "SQLITE3"),
        ) else {
            return;
        };
        let double = "INSERT INTO t(v) SELECT randomblob(900) FROM t;";
        let mut input = format!(
            "PRAGMA journal_mode=wal; PRAGMA cache_size=10; CREATE TABLE t(v PRIMARY KEY); INSERT INTO t(v) VALUES(randomblob(900)); \
             BEGIN; {double} SAVEPOINT s; {} ROLLBACK TO s; {double} COMMIT;",
            double.repeat(5)
        );
        // Before the checkpoint the commit is in the wal-index alone, which tells us nothing without passthrough.
        let more = [
            "SELECT 'committed'",
            "PRAGMA wal_checkpoint; SELECT 'copied'",
            &format!("{double} SELECT 'more'"),
        ]
        .map(|sql| format!("{sql};\n"));
        let mut child = Command::new(shell)
            .args(["-bail", "-cmd", ".timeout 30000"])
            .arg(pair.primary.path("db"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for (sql, done) in more.iter().zip(["committed", "copied", "more"]) {
            input.push_str(sql);
            stdin.write_all(input.as_bytes()).unwrap();
            input.clear();
            assert!(
                lines.any(|line| line.unwrap() == done),
                "the shell ended before: {sql}"
            );
            if passthrough || done != "committed" {
                assert_same(&pair.primary, &pair.replica, "db");
            }
        }
        drop(stdin);
        assert!(child.wait().unwrap().success());
        assert_same(&pair.primary, &pair.replica, "db");
        for node in [&pair.primary, &pair.replica] {
            assert!(!node.log().contains("ERROR"), "{}", node.log());
        }
    }
}

#[test]
fn a_wal_that_was_copied_and_then_damaged_is_taken_back() {
    for passthrough in [true, false] {
        let Some(pair) = Pair::start(passthrough) else {
            return;
        };
        let plain = tempfile::tempdir().unwrap();
        let [main, wal] = ["db", "db-wal"].map(|name| plain.path().join(name));
        let db = Connection::open(&main).unwrap();
        run(
            &db,
            &format!("{TABLE}; {}; PRAGMA journal_mode=wal", insert(2, 300)),
        );
        run(&db, &insert(1, 300));

        fs::copy(&main, pair.primary.path("db")).unwrap();
        wait_for("the copy to be captured", || {
            pair.primary.pos("db").is_some()
        });
        let before = pair.primary.pos("db");
        fs::copy(&wal, pair.primary.path("db-wal")).unwrap();
        wait_for("its WAL to be captured", || {
            pair.primary.pos("db") != before
        });
        // One byte, of the first frame's page.
        let byte = [!fs::read(&wal).unwrap()[100]];
        let copied = fs::OpenOptions::new()
            .write(true)
            .open(pair.primary.path("db-wal"));
        copied.unwrap().write_all_at(&byte, 100).unwrap();
        let copy = pair.primary.open("db");
        assert_eq!(text(&copy, "SELECT count(*) FROM t"), "2");
        drop(copy);
        assert_same(&pair.primary, &pair.replica, "db");
    }
}

/// A WAL is there before its database is whole: what was captured then is compared once a program opens it.
#[test]
fn a_database_that_is_copied_slowly_after_its_wal_is_whole_on_the_replica() {
    for passthrough in [true, false] {
        let Some(pair) = Pair::start(passthrough) else {
            return;
        };
        let plain = tempfile::tempdir().unwrap();
        let [main, wal] = ["db", "db-wal"].map(|name| plain.path().join(name));
        let db = Connection::open(&main).unwrap();
        run(
            &db,
            &format!("{TABLE}; {}; PRAGMA journal_mode=wal", insert(400, 900)),
        );
        run(&db, &insert(1, 300));

        for (name, stays_open) in [("a", true), ("b", false)] {
            fs::copy(&wal, pair.primary.path(&format!("{name}-wal"))).unwrap();
            let whole = fs::read(&main).unwrap();
            let (begin, rest) = whole.split_at(whole.len() / 8 * 3 / 4096 * 4096);
            let mut copy = fs::File::create(pair.primary.path(name)).unwrap();
            copy.write_all(begin).unwrap();
            wait_for("what is there to be captured", || {
                pair.primary.pos(name).is_some()
            });
            copy.write_all(rest).unwrap();
            drop(copy);
            let copy = pair.primary.open(name);
            assert_eq!(text(&copy, "PRAGMA integrity_check"), "ok");
            assert_eq!(text(&copy, "SELECT count(*) FROM t"), "401");
            let is_same = || {
                let file = pair.replica.open(name);
                file.query_row("PRAGMA integrity_check", [], |r| r.get::<_, String>(0))
                    .is_ok_and(|found| found == "ok")
            };
            if stays_open {
                wait_for(
                    "all of it on the replica, while a program has it open",
                    is_same,
                );
            }
            drop(copy);
            assert_same(&pair.primary, &pair.replica, name);
        }
    }
}

fn exclusive(pair: &Pair, modes: &[&str]) {
    for mode in modes {
        let name = format!("{mode}.db");
        let mut db = pair.primary.open(&name);
        run(&db, "PRAGMA locking_mode=exclusive");
        assert_eq!(text(&db, &format!("PRAGMA journal_mode={mode}")), *mode);
        let steps = [
            TABLE,
            &insert(500, 300),
            "BEGIN; UPDATE t SET v=randomblob(100); ROLLBACK",
            "UPDATE t SET v=randomblob(500)",
            "DELETE FROM t WHERE id>50",
            "VACUUM",
        ];
        if matches!(*mode, "memory" | "off") {
            // Nothing tells that a transaction ended: all comes once the lock is released.
            for step in steps.iter().filter(|s| !s.contains("ROLLBACK")) {
                run(&db, step);
            }
            drop(db);
            pair.same(&mut pair.primary.open(&name), &name);
            continue;
        }
        pair.steps(&mut db, &name, &steps);
        assert!(!pair.primary.path(&format!("{name}-shm")).exists());
        let mut reader = Reader::start(&pair.replica, &name);
        // Others may come in again; in WAL mode, only once this connection is gone.
        run(&db, "PRAGMA locking_mode=normal");
        if *mode == "wal" {
            db = pair.primary.open(&name);
        }
        run(&db, "SELECT count(*) FROM t");
        run(&db, "INSERT INTO t(v) VALUES(1)");
        let other = pair.primary.open(&name);
        run(&other, "INSERT INTO t(v) VALUES(2)");
        pair.same(&mut db, &name);
        reader.stop();
        drop((db, other));
        // And a program that ends in exclusive mode leaves everything.
        let db = pair.primary.open(&name);
        run(&db, "PRAGMA locking_mode=exclusive");
        run(&db, &insert(100, 300));
        drop(db);
        reader = Reader::start(&pair.replica, &name);
        pair.same(&mut pair.primary.open(&name), &name);
        reader.stop();
    }
}

#[test]
fn persist_with_a_size_limit_reaches_a_replica() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    let name = "a.db";
    let mut db = pair.primary.open(name);
    run(&db, "PRAGMA journal_mode=persist");
    run(&db, "PRAGMA journal_size_limit=8192");
    run(&db, TABLE);
    let reader = {
        run(&db, &insert(500, 300));
        pair.same(&mut db, name);
        Reader::start(&pair.replica, name)
    };
    for limit in ["8192", "0", "-1", "512", "100000"] {
        run(&db, &format!("PRAGMA journal_size_limit={limit}"));
        for step in [
            "UPDATE t SET v=randomblob(300) WHERE id%50=0",
            "UPDATE t SET v=randomblob(300)",
            "BEGIN; UPDATE t SET v=randomblob(200); ROLLBACK",
            "INSERT INTO t(v) VALUES(1)",
        ] {
            run(&db, step);
            pair.same(&mut db, name);
        }
    }
    reader.stop();
}

#[test]
fn changing_the_journal_mode_all_the_time() {
    if let Some(pair) = Pair::start(true) {
        change_modes(&pair);
    }
}

#[test]
fn changing_the_journal_mode_without_passthrough() {
    if let Some(pair) = Pair::start(false) {
        change_modes(&pair);
    }
}

fn change_modes(pair: &Pair) {
    let name = "dir/deep/a.db";
    fs::create_dir_all(pair.primary.path("dir/deep")).unwrap();
    let mut db = pair.primary.open(name);
    run(&db, TABLE);
    pair.same(&mut db, name);
    let reader = Reader::start(&pair.replica, name);
    for round in 0..3 {
        for mode in [
            "wal", "delete", "truncate", "persist", "memory", "wal", "off",
        ] {
            assert_eq!(text(&db, &format!("PRAGMA journal_mode={mode}")), mode);
            if round > 0 {
                pair.same(&mut db, name);
            }
            run(&db, &insert(50, 300));
            if round != 1 {
                pair.same(&mut db, name);
            }
            run(&db, "UPDATE t SET v=randomblob(250) WHERE id%7=0");
            pair.same(&mut db, name);
        }
    }
    reader.stop();
}

#[test]
fn every_page_size_reaches_a_replica() {
    if let Some(pair) = Pair::start(true) {
        for shift in 9..=16 {
            page_size(&pair, 1 << shift);
        }
    }
}

#[test]
fn page_sizes_without_passthrough() {
    if let Some(pair) = Pair::start(false) {
        for size in [512, 65536] {
            page_size(&pair, size);
        }
    }
}

fn page_size(pair: &Pair, size: u32) {
    for mode in ["wal", "delete"] {
        let name = format!("{mode}-{size}.db");
        let mut db = pair.primary.open(&name);
        run(&db, &format!("PRAGMA page_size={size}"));
        run(&db, &format!("PRAGMA journal_mode={mode}"));
        pair.steps(
            &mut db,
            &name,
            &[
                TABLE,
                &insert(300, 300),
                "UPDATE t SET v=randomblob(700) WHERE id%3=0",
                "DELETE FROM t WHERE id>20",
                "VACUUM",
            ],
        );
        assert_eq!(text(&db, "PRAGMA page_size"), size.to_string());
    }
}

#[test]
fn a_changed_page_size_reaches_a_replica() {
    if let Some(pair) = Pair::start(true) {
        change_page_size(&pair);
    }
}

#[test]
fn a_changed_page_size_without_passthrough() {
    if let Some(pair) = Pair::start(false) {
        change_page_size(&pair);
    }
}

fn change_page_size(pair: &Pair) {
    let name = "a.db";
    let mut db = pair.primary.open(name);
    run(&db, "PRAGMA journal_mode=wal");
    run(&db, TABLE);
    run(&db, &insert(300, 300));
    pair.same(&mut db, name);
    // Who has the database open reads on.
    let old = pair.replica.open(name);
    let mut readers = Vec::new();
    for size in [512, 65536, 1024, 4096] {
        readers.push(Reader::start(&pair.replica, name));
        text(&old, "SELECT count(*) FROM t");
        run(&db, "PRAGMA journal_mode=delete");
        run(&db, &format!("PRAGMA page_size={size}"));
        run(&db, "VACUUM");
        assert_eq!(text(&db, "PRAGMA page_size"), size.to_string());
        pair.same(&mut db, name);
        run(&db, "PRAGMA journal_mode=wal");
        run(&db, &insert(50, 300));
        pair.same(&mut db, name);
        assert_eq!(text(&old, "PRAGMA integrity_check"), "ok");
        assert_eq!(
            text(&old, "SELECT count(*) FROM t"),
            text(&db, "SELECT count(*) FROM t")
        );
        let fresh = pair.replica.open(name);
        assert_eq!(text(&fresh, "PRAGMA page_size"), size.to_string());
        assert_eq!(
            text(&fresh, "SELECT count(*) FROM t"),
            text(&db, "SELECT count(*) FROM t")
        );
    }
    for reader in readers {
        reader.stop();
    }
}

#[test]
fn files_of_a_wal_database_are_put_in_place_one_after_the_other() {
    for passthrough in [true, false] {
        let Some(pair) = Pair::start(passthrough) else {
            return;
        };
        // A database of which a part is in its WAL alone, and the same after more of it.
        let source = tempfile::tempdir().unwrap();
        let from = Connection::open(source.path().join("s.db")).unwrap();
        run(
            &from,
            "PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0",
        );
        run(&from, TABLE);
        run(&from, "PRAGMA wal_checkpoint");
        run(&from, &insert(50, 500));
        let put = |suffix: &str| {
            let to = pair.primary.path(&format!("a.db{suffix}"));
            fs::copy(source.path().join(format!("s.db{suffix}")), to).unwrap();
        };
        let same = |count: &str| {
            let mut db = pair.primary.open("a.db");
            assert_eq!(text(&db, "SELECT count(*) FROM t"), count);
            pair.same(&mut db, "a.db");
        };
        put("");
        put("-wal");
        same("50"); // and its end checkpoints it
        put("");
        put("-wal");
        let replica = || {
            // An emptied file is a dropped database until the copy is in it.
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
            let db = Connection::open_with_flags(pair.replica.path("a.db"), flags)?;
            db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))
        };
        wait_for("the replica to have what the WAL says", || {
            replica().is_ok_and(|count| count == 50)
        });
        // What was in the WAL alone is gone with it.
        fs::write(pair.primary.path("a.db-wal"), b"").unwrap();
        wait_for("the replica to have what the file says", || {
            replica().is_ok_and(|count| count == 0)
        });
        same("0");
        run(&from, &insert(10, 500));
        put("");
        put("-wal");
        same("60");
        put("-wal");
        fs::remove_file(pair.primary.path("a.db-wal")).unwrap();
        same("60");
    }
}

#[test]
fn a_program_alone_with_its_database_never_finds_it_busy() {
    for passthrough in [true, false] {
        let Some(pair) = Pair::start(passthrough) else {
            return;
        };
        for mode in ["memory", "off", "persist", "truncate"] {
            let name = format!("{mode}.db");
            let mut db = pair.primary.open(&name);
            db.busy_timeout(std::time::Duration::ZERO).unwrap();
            run(&db, &format!("PRAGMA journal_mode={mode}"));
            run(&db, TABLE);
            run(&db, &insert(10, 300_000));
            for i in 0..100 {
                run(&db, &insert(1, 10));
                if i % 20 == 0 {
                    run(&db, "VACUUM");
                }
                std::thread::sleep(std::time::Duration::from_millis(i % 5));
            }
            db.busy_timeout(crate::harness::PATIENCE).unwrap();
            pair.same(&mut db, &name);
        }
    }
}

#[test]
fn local_files_with_the_names_of_companions_are_moved_away() {
    for passthrough in [true, false] {
        let Some(pair) = Pair::start(passthrough) else {
            return;
        };
        for suffix in ["-journal", "-wal", "-shm"] {
            let path = pair.replica.path(&format!("a.db{suffix}"));
            fs::write(path, "a note of this node").unwrap();
        }
        let mut db = pair.primary.open("a.db");
        run(&db, TABLE);
        run(&db, &insert(10, 10));
        pair.same(&mut db, "a.db");
        let log = pair.replica.log();
        assert_eq!(log.matches("was moved away").count(), 3, "{log}");
        let kept = pair.replica.meta("a.db").join("quarantine");
        let kept: Vec<_> = fs::read_dir(kept).unwrap().map(Result::unwrap).collect();
        assert_eq!(kept.len(), 3);
        for file in kept {
            assert_eq!(
                fs::read_to_string(file.path()).unwrap(),
                "a note of this node"
            );
        }
    }
}

#[test]
fn a_reader_keeps_its_snapshot_whatever_the_journal_mode() {
    for (passthrough, mode) in [(true, "delete"), (false, "truncate"), (true, "wal")] {
        let Some(pair) = Pair::start(passthrough) else {
            return;
        };
        let mut db = pair.primary.open("a.db");
        run(&db, &format!("PRAGMA journal_mode={mode}"));
        run(&db, TABLE);
        run(&db, &insert(300, 300));
        pair.same(&mut db, "a.db");
        let reader = pair.replica.open("a.db");
        run(&reader, "PRAGMA cache_size=0");
        run(&reader, "BEGIN");
        let look = "SELECT count(*) || '-' || sum(unicode(hex(v))) FROM t";
        let before = text(&reader, look);
        for _ in 0..100 {
            run(&db, "UPDATE t SET v=randomblob(300)");
            pair.same(&mut db, "a.db");
            assert_eq!(text(&reader, look), before, "{mode}");
        }
        assert_eq!(text(&reader, "PRAGMA integrity_check"), "ok");
        run(&reader, "COMMIT");
        assert_eq!(text(&reader, look), text(&db, look));
    }
}

#[test]
fn a_reader_in_a_transaction_while_the_page_size_changes_is_told_at_its_next() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    let db = pair.primary.open("a.db");
    run(&db, TABLE);
    run(&db, &insert(300, 300));
    pair.same(&mut pair.primary.open("a.db"), "a.db");
    let reader = pair.replica.open("a.db");
    run(&reader, "BEGIN");
    assert_eq!(text(&reader, "SELECT count(*) FROM t"), "300");
    run(&db, "PRAGMA page_size=8192; VACUUM; DELETE FROM t");
    pair.same(&mut pair.primary.open("a.db"), "a.db");
    assert_eq!(text(&reader, "SELECT count(*) FROM t"), "300");
    assert_eq!(text(&reader, "PRAGMA integrity_check"), "ok");
    run(&reader, "COMMIT");
    let error = reader
        .query_row("SELECT count(*) FROM t", [], |_| Ok(()))
        .unwrap_err();
    let code = error.sqlite_error_code();
    assert_eq!(code, Some(rusqlite::ErrorCode::NotADatabase), "{error}");
    assert!(pair.replica.log().contains("SQLITE_NOTADB"));
    let count = text(&pair.replica.open("a.db"), "SELECT count(*) FROM t");
    assert_eq!(count, "0");
}

#[test]
fn a_replica_can_be_opened_at_any_moment_while_its_files_are_replaced() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    let name = "a.db";
    let mut db = pair.primary.open(name);
    run(&db, TABLE);
    run(&db, &insert(10, 100));
    pair.same(&mut db, name);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let path = pair.replica.path(name);
                    assert!(fs::metadata(&path).unwrap().len() > 0);
                    assert_eq!(
                        text(&pair.replica.open(name), "SELECT count(*) FROM t"),
                        "10"
                    );
                }
            });
        }
        for i in 0..60 {
            run(&db, &format!("PRAGMA page_size={}", 1024 << (i % 2)));
            run(&db, "VACUUM");
            pair.same(&mut db, name);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_file_that_ends_in_the_middle_of_a_page_is_written_and_replicated() {
    use std::os::unix::fs::FileExt;
    let Some(pair) = Pair::start(true) else {
        return;
    };
    let plain = pair.primary.dir.join("plain.db");
    let db = rusqlite::Connection::open(&plain).unwrap();
    run(&db, TABLE);
    run(&db, &insert(100, 100));
    drop(db);
    // As by a writer that knows no page count in the header, and died while it made the file longer.
    let file = fs::OpenOptions::new().write(true).open(&plain).unwrap();
    file.write_all_at(&[0; 4], 28).unwrap();
    file.write_all_at(b"Hello, World!", file.metadata().unwrap().len() + 9 * 4096)
        .unwrap();
    for mode in ["delete", "wal"] {
        let name = format!("{mode}.db");
        fs::copy(&plain, pair.primary.path(&name)).unwrap();
        let mut db = pair.primary.open(&name);
        run(&db, &format!("PRAGMA journal_mode={mode}"));
        run(&db, &insert(100, 100));
        wait_for("the replica", || {
            pair.primary.pos(&name).is_some() && pair.primary.pos(&name) == pair.replica.pos(&name)
        });
        let count = |db| text(db, "SELECT count(*) FROM t");
        assert_eq!(count(&pair.replica.open(&name)), count(&db));
        // Until then SQLite's check says that pages are never used.
        run(&db, "VACUUM");
        pair.same(&mut db, &name);
    }
}

#[test]
fn auto_vacuum_shrinks_a_replica() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    for mode in ["wal", "delete"] {
        for vacuum in ["full", "incremental"] {
            let name = format!("{mode}-{vacuum}.db");
            let mut db = pair.primary.open(&name);
            run(&db, &format!("PRAGMA auto_vacuum={vacuum}"));
            run(&db, &format!("PRAGMA journal_mode={mode}"));
            pair.steps(
                &mut db,
                &name,
                &[
                    TABLE,
                    &insert(2000, 500),
                    "DELETE FROM t WHERE id%2=0",
                    "PRAGMA incremental_vacuum(20)",
                    "DELETE FROM t WHERE id%3=0",
                    "PRAGMA incremental_vacuum(1)",
                    "PRAGMA incremental_vacuum",
                    "BEGIN; DELETE FROM t; ROLLBACK",
                    "DELETE FROM t WHERE id>10",
                    "PRAGMA incremental_vacuum",
                    &insert(1000, 500),
                    "PRAGMA auto_vacuum=none",
                    "VACUUM",
                    "DELETE FROM t",
                ],
            );
        }
    }
}

#[test]
fn a_large_database_shrinks_and_grows_again() {
    if let Some(pair) = Pair::start(true) {
        for mode in ["wal", "delete"] {
            shrink_and_grow(&pair, mode);
        }
    }
}

#[test]
fn a_large_database_shrinks_and_grows_without_passthrough() {
    if let Some(pair) = Pair::start(false) {
        for mode in ["wal", "delete"] {
            shrink_and_grow(&pair, mode);
        }
    }
}

/// Also a transaction of 80 MB, which is more than SQLite's cache.
fn shrink_and_grow(pair: &Pair, mode: &str) {
    let name = format!("{mode}.db");
    let mut db = pair.primary.open(&name);
    run(&db, &format!("PRAGMA journal_mode={mode}"));
    run(&db, TABLE);
    pair.steps(
        &mut db,
        &name,
        &[
            &insert(800, 100_000),
            "DELETE FROM t WHERE id>3",
            "VACUUM",
            &insert(300, 100_000),
            "UPDATE t SET v=randomblob(90000)",
        ],
    );
}

#[test]
fn transactions_across_two_databases() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    for mode in ["delete", "wal", "truncate", "persist"] {
        let names = [format!("{mode}-a.db"), format!("{mode}-b.db")];
        for name in &names {
            let db = pair.primary.open(name);
            run(&db, &format!("PRAGMA journal_mode={mode}"));
            run(&db, TABLE);
        }
        let db = pair.primary.open(&names[0]);
        let b = pair.primary.path(&names[1]);
        run(&db, &format!("ATTACH '{}' AS b", b.display()));
        run(&db, "PRAGMA cache_size=5");
        run(&db, "PRAGMA b.cache_size=5");
        let mut readers = Vec::new();
        for (i, step) in [
            "INSERT INTO main.t(v) VALUES(1); INSERT INTO b.t(v) VALUES(1)",
            "INSERT INTO main.t(v) SELECT randomblob(2000) FROM generate; INSERT INTO b.t(v) SELECT v FROM main.t",
            "UPDATE main.t SET v=randomblob(1900); UPDATE b.t SET v=randomblob(100)",
            "DELETE FROM b.t; INSERT INTO main.t(v) VALUES(2)",
        ]
        .into_iter()
        .enumerate()
        {
            let step = step.replace(
                "generate",
                "(WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<200) SELECT x FROM c)",
            );
            let before = names.clone().map(|name| pair.primary.pos(&name));
            run(&db, &format!("BEGIN; {step}; ROLLBACK"));
            for (name, before) in names.iter().zip(before) {
                let after = pair.same(&mut pair.primary.open(name), name);
                if i > 0 {
                    assert_eq!(Some(after), before, "{mode}: a rolled back transaction is nothing");
                }
            }
            run(&db, &format!("BEGIN; {step}; COMMIT"));
            for name in &names {
                pair.same(&mut pair.primary.open(name), name);
                readers.push(Reader::start(&pair.replica, name));
            }
        }
        for reader in readers {
            reader.stop();
        }
    }
    let left: Vec<_> = fs::read_dir(pair.primary.path(""))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.contains("-mj"))
        .collect();
    assert!(left.is_empty(), "super-journals stay: {left:?}");
}

#[test]
fn a_rolled_back_transaction_is_nothing() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    for mode in ["wal", "delete", "truncate", "persist"] {
        let name = format!("{mode}.db");
        let mut db = pair.primary.open(&name);
        run(&db, &format!("PRAGMA journal_mode={mode}"));
        run(&db, TABLE);
        run(&db, &insert(2000, 300));
        let mut before = pair.same(&mut db, &name);
        let reader = Reader::start(&pair.replica, &name);
        run(&db, "PRAGMA cache_size=5");
        for step in [
            "UPDATE t SET v=randomblob(400)",
            "DELETE FROM t",
            "CREATE INDEX i ON t(v)",
            "INSERT INTO t(v) SELECT randomblob(2000) FROM t",
        ] {
            run(&db, &format!("BEGIN; {step}; ROLLBACK"));
            let after = pair.same(&mut db, &name);
            assert_eq!(after, before, "{mode}: {step}");
        }
        // Where there are free pages, SQLite does not put back what was in them: the file has changed then, the rows
        // have not.
        run(&db, "DELETE FROM t WHERE id BETWEEN 500 AND 1500");
        before = pair.same(&mut db, &name);
        let rows = text(&db, "SELECT group_concat(hex(v)) FROM t");
        run(&db, "BEGIN; UPDATE t SET v=randomblob(900); ROLLBACK");
        let after = pair.same(&mut db, &name);
        assert_eq!(mode == "wal", after == before, "{mode}");
        let copy = pair.replica.open(&name);
        assert!(text(&copy, "SELECT group_concat(hex(v)) FROM t") == rows);
        run(&db, "INSERT INTO t(v) VALUES(1)");
        assert_ne!(pair.same(&mut db, &name), before);
        reader.stop();
    }
}

#[test]
fn storms_of_savepoints() {
    if let Some(pair) = Pair::start(true) {
        for mode in ["wal", "delete", "truncate", "persist"] {
            savepoints(&pair, mode);
        }
    }
}

#[test]
fn storms_of_savepoints_without_passthrough() {
    if let Some(pair) = Pair::start(false) {
        for mode in ["wal", "delete", "persist"] {
            savepoints(&pair, mode);
        }
    }
}

fn savepoints(pair: &Pair, mode: &str) {
    let name = format!("{mode}.db");
    let mut db = pair.primary.open(&name);
    run(&db, &format!("PRAGMA journal_mode={mode}"));
    run(&db, TABLE);
    run(&db, &insert(1000, 300));
    run(&db, "PRAGMA cache_size=5");
    pair.same(&mut db, &name);
    let reader = Reader::start(&pair.replica, &name);
    let mut dice = Dice(0x5eed);
    for _ in 0..6 {
        run(&db, "BEGIN");
        let mut depth = 0;
        for _ in 0..40 {
            match dice.below(6) {
                0 => {
                    depth += 1;
                    run(&db, &format!("SAVEPOINT s{depth}"));
                }
                1 if depth > 0 => {
                    depth = 1 + dice.below(depth);
                    run(&db, &format!("ROLLBACK TO s{depth}"));
                }
                2 if depth > 0 => {
                    let to = 1 + dice.below(depth);
                    run(&db, &format!("RELEASE s{to}"));
                    depth = to - 1;
                }
                3 => run(&db, &insert(dice.below(200) + 1, 400)),
                4 => run(
                    &db,
                    &format!("DELETE FROM t WHERE id%{}=0", dice.below(9) + 2),
                ),
                _ => run(
                    &db,
                    &format!(
                        "UPDATE t SET v=randomblob(350) WHERE id%{}=0",
                        dice.below(9) + 1
                    ),
                ),
            }
        }
        run(
            &db,
            if dice.below(4) == 0 {
                "ROLLBACK"
            } else {
                "COMMIT"
            },
        );
        pair.same(&mut db, &name);
    }
    reader.stop();
}

/// A small generator of numbers that are the same in each run (source: Marsaglia, "Xorshift RNGs").
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from((self.0 >> 16) % u64::from(n)).unwrap()
    }
}

#[test]
fn a_database_made_again_with_another_page_size() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    let name = "a.db";
    for (round, mode) in ["wal", "delete", "wal", "persist"].into_iter().enumerate() {
        let size = 1024 << round;
        let mut db = pair.primary.open(name);
        run(&db, &format!("PRAGMA page_size={size}"));
        run(&db, &format!("PRAGMA journal_mode={mode}"));
        run(&db, TABLE);
        run(&db, &insert(300, 300));
        pair.same(&mut db, name);
        let old = pair.replica.open(name);
        assert_eq!(text(&old, "SELECT count(*) FROM t"), "300");
        let reader = Reader::start(&pair.replica, name);
        if round % 2 == 0 {
            // Dropped with a program still having it open.
            for suffix in ["", "-wal", "-shm"] {
                let _ = fs::remove_file(pair.primary.path(&format!("{name}{suffix}")));
            }
            drop(db);
        } else {
            drop(db);
            for suffix in ["", "-journal"] {
                let _ = fs::remove_file(pair.primary.path(&format!("{name}{suffix}")));
            }
        }
        if round < 3 {
            wait_for("the drop to arrive", || !pair.replica.path(name).exists());
        }
        assert_eq!(
            text(&old, "SELECT count(*) FROM t"),
            "300",
            "who has it open keeps it"
        );
        assert_eq!(text(&old, "PRAGMA integrity_check"), "ok");
        reader.stop();
    }
    // Made again at once: the replica may never have seen it gone.
    for size in [512, 8192] {
        for suffix in ["", "-wal", "-shm", "-journal"] {
            let _ = fs::remove_file(pair.primary.path(&format!("{name}{suffix}")));
        }
        let mut db = pair.primary.open(name);
        run(&db, &format!("PRAGMA page_size={size}"));
        run(&db, "CREATE TABLE u(x)");
        run(&db, &format!("INSERT INTO u VALUES({size})"));
        pair.same(&mut db, name);
        assert_eq!(
            text(&pair.replica.open(name), "SELECT x FROM u"),
            size.to_string()
        );
    }
}

#[test]
fn renamed_databases_and_directories() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    fs::create_dir_all(pair.primary.path("x/y")).unwrap();
    for mode in ["wal", "delete"] {
        let name = format!("x/y/{mode}.db");
        let mut db = pair.primary.open(&name);
        run(&db, &format!("PRAGMA journal_mode={mode}"));
        run(&db, TABLE);
        run(&db, &insert(100, 300));
        pair.same(&mut db, &name);
    }
    #[expect(clippy::disallowed_methods, reason = "what a user does in the mount")]
    let rename = |from: &str, to: &str| {
        fs::rename(pair.primary.path(from), pair.primary.path(to)).unwrap();
    };
    for mode in ["wal", "delete"] {
        rename(&format!("x/y/{mode}.db"), &format!("x/{mode}2.db"));
        let name = format!("x/{mode}2.db");
        let mut db = pair.primary.open(&name);
        pair.same(&mut db, &name);
        run(&db, &insert(10, 300));
        pair.same(&mut db, &name);
        assert_eq!(text(&db, "SELECT count(*) FROM t"), "110");
        wait_for("the old name to go", || {
            !pair.replica.path(&format!("x/y/{mode}.db")).exists()
        });
    }
    rename("x", "z");
    for mode in ["wal", "delete"] {
        let name = format!("z/{mode}2.db");
        let mut db = pair.primary.open(&name);
        pair.same(&mut db, &name);
        run(&db, "DELETE FROM t WHERE id>50");
        pair.same(&mut db, &name);
        wait_for("the old directory's database to go", || {
            !pair.replica.path(&format!("x/{mode}2.db")).exists()
        });
    }
    // One over the other.
    rename("z/wal2.db", "z/delete2.db");
    let mut db = pair.primary.open("z/delete2.db");
    pair.same(&mut db, "z/delete2.db");
    assert_eq!(text(&db, "PRAGMA journal_mode"), "wal");
    run(&db, "INSERT INTO t(v) VALUES(1)");
    pair.same(&mut db, "z/delete2.db");
}

#[test]
fn a_database_past_the_lock_page() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    let free = rustix::fs::statvfs(pair.primary.dir.as_path()).unwrap();
    if free.f_bavail * free.f_frsize < 12 << 30 {
        eprintln!("skipped: a database over 1 GiB on two nodes needs 12 GiB of free disk");
        return;
    }
    let name = "a.db";
    let mut db = pair.primary.open(name);
    run(&db, "PRAGMA page_size=65536");
    run(&db, "PRAGMA journal_mode=delete");
    run(&db, TABLE);
    run(&db, "INSERT INTO t(v) VALUES(zeroblob(900000000))");
    run(&db, "INSERT INTO t(v) VALUES(zeroblob(173000000))");
    run(&db, &insert(5, 300_000));
    let len = fs::metadata(pair.primary.path(name)).unwrap().len();
    assert!(len > 1 << 30, "{len}");
    wait_for("the large database to arrive", || {
        pair.primary.pos(name).is_some() && pair.primary.pos(name) == pair.replica.pos(name)
    });
    run(&db, "PRAGMA journal_mode=wal");
    let replica = pair.replica.open(name);
    run(&db, &insert(50, 10_000));
    run(&db, "UPDATE t SET v=randomblob(200000) WHERE id>2");
    run(&db, "DELETE FROM t WHERE id=2");
    run(&db, "PRAGMA user_version=7");
    pair.same(&mut db, name);
    assert_eq!(text(&replica, "PRAGMA user_version"), "7");
    assert_eq!(text(&replica, "SELECT count(*) FROM t"), "56");
}

/// What is committed without a trace just before a journal begins is in no journal.
#[test]
fn commits_without_a_trace_between_others() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    for mode in ["delete", "truncate", "persist", "wal"] {
        let name = format!("{mode}.db");
        let mut db = pair.primary.open(&name);
        run(&db, &format!("PRAGMA journal_mode={mode}"));
        run(&db, TABLE);
        run(&db, &insert(200, 300));
        pair.same(&mut db, &name);
        let reader = Reader::start(&pair.replica, &name);
        for i in 0..10 {
            for untraced in ["memory", "off"] {
                run(&db, &format!("PRAGMA journal_mode={untraced}"));
                run(
                    &db,
                    &format!("UPDATE t SET v=randomblob(300) WHERE id={}", i * 20 + 1),
                );
                run(&db, &format!("PRAGMA journal_mode={mode}"));
                run(
                    &db,
                    &format!("UPDATE t SET v=randomblob(300) WHERE id={}", 200 - i),
                );
            }
            if i % 3 == 0 {
                pair.same(&mut db, &name);
            }
        }
        pair.same(&mut db, &name);
        if mode != "wal" {
            // Two programs, each in a mode of its own.
            let mut other = pair.primary.open(&name);
            run(&other, "PRAGMA journal_mode=memory");
            for i in 0..20 {
                run(
                    &other,
                    &format!("UPDATE t SET v=randomblob(300) WHERE id={}", i * 10 + 1),
                );
                run(
                    &db,
                    &format!("UPDATE t SET v=randomblob(300) WHERE id={}", 200 - i * 5),
                );
            }
            pair.same(&mut other, &name);
        }
        reader.stop();
    }
}

#[test]
fn random_histories() {
    if let Some(pair) = Pair::start(true) {
        for seed in [1, 2, 3, 4, 5, 6] {
            random_history(&pair, seed);
        }
    }
}

#[test]
fn random_histories_without_passthrough() {
    if let Some(pair) = Pair::start(false) {
        for seed in [7, 8, 9] {
            random_history(&pair, seed);
        }
    }
}

fn random_history(pair: &Pair, seed: u64) {
    let name = format!("{seed}.db");
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut db = pair.primary.open(&name);
    run(&db, &format!("PRAGMA page_size={}", 512 << dice.below(8)));
    run(&db, "PRAGMA auto_vacuum=incremental");
    run(&db, TABLE);
    pair.same(&mut db, &name);
    let reader = Reader::start(&pair.replica, &name);
    for step in 0..60 {
        let modulus = dice.below(9) + 2;
        let sql = match dice.below(14) {
            0 => "PRAGMA journal_mode=wal".into(),
            1 => format!(
                "PRAGMA journal_mode={}",
                ["delete", "truncate", "persist", "memory", "off"][dice.below(5) as usize]
            ),
            2 => "PRAGMA incremental_vacuum(5)".into(),
            3 => "VACUUM".into(),
            4 => format!("DELETE FROM t WHERE id%{modulus}!=0"),
            5 => format!("PRAGMA user_version={step}"),
            6 => format!("PRAGMA cache_size={}", 5 << (2 * dice.below(5))),
            // SQLite says "locked" where the first thing after a change to WAL is a checkpoint.
            7 => "SELECT count(*) FROM t; PRAGMA wal_checkpoint(truncate)".into(),
            8 => format!(
                "BEGIN; UPDATE t SET v=randomblob(300) WHERE id%{modulus}=0; SAVEPOINT s; DELETE FROM t; ROLLBACK TO s; COMMIT"
            ),
            9 if text(&db, "PRAGMA journal_mode") != "off" => {
                format!("BEGIN; {}; DELETE FROM t; ROLLBACK", insert(200, 400))
            }
            10 => "CREATE INDEX IF NOT EXISTS i ON t(v)".into(),
            11 => "DROP INDEX IF EXISTS i".into(),
            12 => format!("UPDATE t SET v=randomblob(500) WHERE id%{modulus}=0"),
            _ => insert(dice.below(300) + 1, dice.below(900)),
        };
        // With `off`, a statement that fails or rolls back damages the database, by definition.
        if sql.contains("ROLLBACK TO") && text(&db, "PRAGMA journal_mode") == "off" {
            continue;
        }
        eprintln!("{seed}/{step}: {sql}");
        run(&db, &sql);
        if dice.below(3) == 0 {
            pair.same(&mut db, &name);
        }
    }
    pair.same(&mut db, &name);
    reader.stop();
}

#[test]
fn changes_of_the_header_alone() {
    let Some(pair) = Pair::start(true) else {
        return;
    };
    for mode in ["wal", "delete", "truncate", "persist", "memory", "off"] {
        let name = format!("{mode}.db");
        let mut db = pair.primary.open(&name);
        run(&db, &format!("PRAGMA journal_mode={mode}"));
        pair.steps(
            &mut db,
            &name,
            &[
                "PRAGMA user_version=1",
                "PRAGMA application_id=77",
                "PRAGMA user_version=2",
                "BEGIN; PRAGMA user_version=3; PRAGMA application_id=5; COMMIT",
                "BEGIN; PRAGMA user_version=4; ROLLBACK",
                "BEGIN IMMEDIATE; COMMIT",
            ],
        );
        assert_eq!(text(&pair.replica.open(&name), "PRAGMA user_version"), "3");
    }
}

#[test]
fn a_wal_that_grows_large_before_a_checkpoint() {
    if let Some(pair) = Pair::start(true) {
        large_wal(&pair);
    }
}

#[test]
fn a_wal_that_grows_large_without_passthrough() {
    if let Some(pair) = Pair::start(false) {
        large_wal(&pair);
    }
}

fn large_wal(pair: &Pair) {
    let name = "a.db";
    let mut db = pair.primary.open(name);
    run(&db, "PRAGMA journal_mode=wal");
    run(&db, "PRAGMA wal_autocheckpoint=0");
    run(&db, TABLE);
    pair.same(&mut db, name);
    let reader = Reader::start(&pair.replica, name);
    for round in 0..3 {
        for _ in 0..10 {
            run(&db, &insert(1000, 1000));
            run(&db, "UPDATE t SET v=randomblob(100) WHERE id%10=0");
        }
        let len = fs::metadata(pair.primary.path("a.db-wal")).unwrap().len();
        assert!(len > 10 << 20, "{len}");
        if round == 1 {
            pair.same(&mut db, name);
        }
        let how = ["truncate", "restart", "full"][round];
        run(&db, &format!("PRAGMA wal_checkpoint({how})"));
        run(&db, "DELETE FROM t WHERE id%5!=0");
        pair.same(&mut db, name);
    }
    reader.stop();
}

#[test]
fn vacuum_into_and_backup_into_the_mount() {
    if let Some(pair) = Pair::start(true) {
        copies(&pair);
    }
}

#[test]
fn vacuum_into_and_backup_without_passthrough() {
    if let Some(pair) = Pair::start(false) {
        copies(&pair);
    }
}

fn copies(pair: &Pair) {
    let db = pair.primary.open("a.db");
    run(&db, "PRAGMA journal_mode=wal");
    run(&db, TABLE);
    run(&db, &insert(3000, 1000));
    let into = pair.primary.path("into.db");
    run(&db, &format!("VACUUM INTO '{}'", into.display()));
    pair.same(&mut pair.primary.open("into.db"), "into.db");
    // Over nothing, over a database in use, and back, all in steps, with writes between.
    for (name, mode) in [
        ("new.db", None),
        ("used.db", Some("wal")),
        ("other.db", Some("delete")),
    ] {
        let mut to = pair.primary.open(name);
        let reader = mode.map(|mode| {
            run(&to, &format!("PRAGMA journal_mode={mode}"));
            run(
                &to,
                "CREATE TABLE other(x); INSERT INTO other VALUES(randomblob(100000))",
            );
            pair.same(&mut to, name);
            Reader::start(&pair.replica, name)
        });
        let backup = rusqlite::backup::Backup::new(&db, &mut to).unwrap();
        loop {
            match backup.step(200).unwrap() {
                rusqlite::backup::StepResult::Done => break,
                _ => run(&db, "UPDATE t SET v=randomblob(900) WHERE id=7"),
            }
        }
        drop(backup);
        let count = text(&db, "SELECT count(*) FROM t");
        assert_eq!(text(&to, "SELECT count(*) FROM t"), count);
        pair.same(&mut to, name);
        run(&to, "INSERT INTO t(v) VALUES(1)");
        pair.same(&mut to, name);
        if let Some(reader) = reader {
            reader.stop();
        }
    }
}
