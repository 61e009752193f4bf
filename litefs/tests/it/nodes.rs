//! Whole nodes: real processes, real kernel mounts, real SQLite on both sides.

use std::fs;

use rusqlite::Connection;

use crate::harness::{Node, Options, assert_same, cannot_mount, wait_for};

const ROWS: &str = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<2000) \
                    INSERT INTO t(v) SELECT randomblob(300) FROM c";

/// Writes in a journal mode, with rollbacks, spills, shrinking and schema changes, and compares after each step.
fn exercise(primary: &Node, replica: &Node, mode: &str) {
    let name = format!("dir/{mode}.db");
    fs::create_dir_all(primary.path("dir")).unwrap();
    let db = primary.open(&name);
    db.query_row(&format!("PRAGMA journal_mode={mode}"), [], |_| Ok(()))
        .unwrap();
    let steps = [
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)",
        "INSERT INTO t(v) VALUES(zeroblob(10))",
        ROWS,
        "PRAGMA cache_size=5",
        "BEGIN; UPDATE t SET v=randomblob(400); ROLLBACK",
        "BEGIN; UPDATE t SET v=randomblob(200) WHERE id%3=0; SAVEPOINT a; DELETE FROM t; ROLLBACK TO a; COMMIT",
        "CREATE INDEX i ON t(v)",
        "DELETE FROM t WHERE id>100",
        "VACUUM",
        "DROP INDEX i",
    ];
    for step in steps {
        db.execute_batch(step)
            .unwrap_or_else(|e| panic!("{mode}: {step}: {e}"));
        if !step.starts_with("PRAGMA") {
            assert_same(primary, replica, &name);
        }
    }
}

#[test]
fn every_journal_mode_reaches_a_replica() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    for mode in ["wal", "delete", "truncate", "persist"] {
        exercise(&primary, &replica, mode);
    }
}

#[test]
fn the_same_without_passthrough() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), ", passthrough: \"off\"");
    let replica = Node::replica(dir.path(), "replica", &primary, ", passthrough: \"off\"");
    for mode in ["wal", "delete"] {
        exercise(&primary, &replica, mode);
    }
}

#[test]
fn a_killed_primary_and_a_killed_replica_come_back_with_everything() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    for mode in ["wal", "delete"] {
        let db = primary.open(&format!("{mode}.db"));
        db.query_row(&format!("PRAGMA journal_mode={mode}"), [], |_| Ok(()))
            .unwrap();
        db.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
            .unwrap();
    }
    for round in 0..3 {
        for mode in ["wal", "delete"] {
            let db = primary.open(&format!("{mode}.db"));
            db.execute_batch(ROWS).unwrap();
        }
        if round % 2 == 0 {
            replica.kill();
        }
        primary.kill();
        primary.launch();
        if round % 2 == 0 {
            replica.launch();
        }
        for mode in ["wal", "delete"] {
            let name = format!("{mode}.db");
            let count: i64 = primary
                .open(&name)
                .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
                .unwrap();
            assert_eq!(
                count,
                2000 * (round + 1),
                "{mode}: acknowledged rows after a kill"
            );
            assert_same(&primary, &replica, &name);
        }
    }
}

#[test]
fn a_reader_on_a_replica_keeps_its_snapshot_and_cannot_write() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let writer = primary.open("a.db");
    writer
        .query_row("PRAGMA journal_mode=wal", [], |_| Ok(()))
        .unwrap();
    writer
        .execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
        .unwrap();
    writer.execute_batch("INSERT INTO t(v) VALUES(1)").unwrap();
    assert_same(&primary, &replica, "a.db");
    let reader = replica.open("a.db");
    let count = |db: &Connection| {
        db.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))
            .unwrap()
    };
    reader.execute_batch("BEGIN").unwrap();
    assert_eq!(count(&reader), 1);
    for _ in 0..3000 {
        writer.execute("INSERT INTO t(v) VALUES(2)", []).unwrap();
    }
    let fresh = replica.open("a.db");
    wait_for("apply beside a long reader", || count(&fresh) == 3001);
    assert_eq!(count(&reader), 1, "the snapshot stays");
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(count(&reader), 3001);
    let error = reader
        .execute("INSERT INTO t(v) VALUES(3)", [])
        .unwrap_err()
        .to_string();
    assert!(error.contains("readonly"), "{error}");
}

#[test]
fn dropped_renamed_copied_and_resized_databases_follow() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = primary.open("a.db");
    db.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
        .unwrap();
    db.execute_batch(ROWS).unwrap();
    assert_same(&primary, &replica, "a.db");
    db.execute_batch("PRAGMA page_size=1024; VACUUM").unwrap();
    assert_same(&primary, &replica, "a.db");
    drop(db);
    fs::copy(primary.path("a.db"), primary.path("copy.db")).unwrap();
    assert_same(&primary, &replica, "copy.db");
    #[expect(clippy::disallowed_methods, reason = "what a user does in the mount")]
    fs::rename(primary.path("copy.db"), primary.path("moved.db")).unwrap();
    assert_same(&primary, &replica, "moved.db");
    wait_for("the old name to go", || !replica.path("copy.db").exists());
    fs::remove_file(primary.path("a.db")).unwrap();
    wait_for("the drop to arrive", || !replica.path("a.db").exists());
    primary
        .open("a.db")
        .execute_batch("CREATE TABLE u(x); INSERT INTO u VALUES(7)")
        .unwrap();
    assert_same(&primary, &replica, "a.db");
}

#[test]
fn a_transaction_larger_than_a_range_reaches_a_replica() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let primary = Node::primary(dir.path(), "");
        let replica = Node::replica(dir.path(), "replica", &primary, "");
        let db = primary.open("a.db");
        db.execute_batch(&format!(
            "PRAGMA journal_mode={mode}; PRAGMA synchronous=OFF; CREATE TABLE t(x)"
        ))
        .unwrap();
        let many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<20000)
                    INSERT INTO t SELECT randomblob(4000) FROM n";
        db.execute(many, []).unwrap();
        db.execute("INSERT INTO t VALUES ('after')", []).unwrap();
        assert_same(&primary, &replica, "a.db");
        // Every page again, and fewer of them.
        db.execute_batch(
            "DELETE FROM t WHERE rowid % 10 = 0; VACUUM; INSERT INTO t VALUES ('end')",
        )
        .unwrap();
        assert_same(&primary, &replica, "a.db");
        assert!(!primary.log().contains("ERROR"), "{}", primary.log());
    }
}

#[test]
fn a_new_replica_does_not_wait_for_a_transaction_under_way() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let db = primary.open("a.db");
    db.execute_batch(
        "PRAGMA journal_mode=delete; PRAGMA cache_size=10; CREATE TABLE t(id INTEGER PRIMARY KEY, v);
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<2000)
         INSERT INTO t SELECT i, zeroblob(1000) FROM n",
    )
    .unwrap();
    let before = primary.pos("a.db");
    db.execute_batch("BEGIN; UPDATE t SET v = randomblob(1000)")
        .unwrap();
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    wait_for("the state before the transaction", || {
        before.is_some() && replica.pos("a.db") == before
    });
    let sum: i64 = replica
        .open("a.db")
        .query_row("SELECT count(*) FROM t WHERE v = zeroblob(1000)", [], |r| {
            r.get(0)
        })
        .unwrap();
    assert_eq!(sum, 2000);
    db.execute_batch("COMMIT").unwrap();
    assert_same(&primary, &replica, "a.db");
}

#[test]
fn a_database_made_again_with_another_page_size_is_compacted() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary_with(
        dir.path(),
        Options {
            data_keys: ", segment-size: 1048576".into(),
            ..Options::default()
        },
    );
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    for page_size in [1024, 512, 4096, 65536] {
        let db = primary.open("a.db");
        db.execute_batch(&format!(
            "PRAGMA page_size={page_size}; CREATE TABLE t(x); INSERT INTO t VALUES (randomblob(400000));
             INSERT INTO t VALUES (randomblob(400000))"
        ))
        .unwrap();
        assert_same(&primary, &replica, "a.db");
        drop(db);
        fs::remove_file(primary.path("a.db")).unwrap();
        wait_for("the drop", || !replica.path("a.db").exists());
    }
    // A segment that cannot be compacted is complained about every second.
    let sealed = || {
        walk(&primary.data().join("dbs"))
            .iter()
            .any(|p| p.extension().is_some_and(|e| e == "ltx"))
    };
    let db = primary.open("a.db");
    db.execute_batch("CREATE TABLE t(x)").unwrap();
    wait_for("a full segment to be compacted", || {
        db.execute("INSERT INTO t VALUES (randomblob(300000))", [])
            .unwrap();
        sealed()
    });
    assert!(!primary.log().contains("log upkeep"), "{}", primary.log());
    assert_same(&primary, &replica, "a.db");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(walk(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_replica_that_cannot_take_a_database_asks_ever_less_often() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    std::os::unix::fs::symlink("nowhere", replica.data().join("files/x.db")).unwrap();
    for name in ["x.db", "y.db"] {
        let db = primary.open(name);
        db.execute_batch("CREATE TABLE t(n); INSERT INTO t VALUES(1)")
            .unwrap();
    }
    assert_same(&primary, &replica, "y.db");
    wait_for("pauses that grow", || {
        replica.log().contains("db=x.db failures=5")
    });
    let log = replica.log();
    assert!(log.contains("no ordinary file"), "{log}");
    fs::remove_file(replica.data().join("files/x.db")).unwrap();
    assert_same(&primary, &replica, "x.db");
}
