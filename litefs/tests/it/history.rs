//! How long history is kept: as long as a replica may come for it.

use std::path::Path;

use rusqlite::Connection;

use crate::harness::{Node, Options, assert_same, cannot_mount, first_in_log, wait_for};

fn primary(at: &Path, data_keys: &str) -> Node {
    let data_keys = format!(", segment-size: 64KiB{data_keys}");
    let options = Options {
        data_keys,
        ..Options::default()
    };
    Node::primary_with(at, options)
}

fn create(node: &Node) -> Connection {
    let db = node.open("a.db");
    db.query_row("PRAGMA journal_mode=wal", [], |_| Ok(()))
        .unwrap();
    db.execute_batch("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v BLOB)")
        .unwrap();
    db
}

/// Commits as fast as it can, many times what a segment holds.
fn burst(db: &Connection) {
    for _ in 0..300 {
        db.execute("INSERT INTO t(v) VALUES(randomblob(9000))", [])
            .unwrap();
    }
}

fn count(node: &Node) -> i64 {
    node.open("a.db")
        .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap()
}

#[test]
fn a_lone_primary_lets_history_go_and_keeps_every_commit() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = primary(dir.path(), "");
    let mut commits = 0;
    for _ in 0..3 {
        let db = create(&primary);
        let before = first_in_log(&primary.meta("a.db"));
        wait_for("the log to begin anew", || {
            burst(&db);
            commits += 300;
            first_in_log(&primary.meta("a.db")) > before.max(1)
        });
        let pos = primary.pos("a.db");
        primary.kill();
        drop(db);
        primary.launch();
        assert_eq!(count(&primary), commits);
        assert_eq!(primary.pos("a.db"), pos, "numbers go on");
        let log = primary.log();
        assert!(
            !log.contains("WARN litefs::db") && !log.contains("ERROR"),
            "{log}"
        );
    }
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    assert_same(&primary, &replica, "a.db");
}

#[test]
fn history_is_kept_for_a_replica_that_was_here() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = create(&primary);
    assert_same(&primary, &replica, "a.db");
    wait_for("the replica to be noted", || {
        primary.data().join("replicas-seen").exists()
    });
    replica.stop();
    burst(&db);
    drop(db);
    primary.stop();
    primary.launch();
    burst(&create(&primary));
    assert_eq!(first_in_log(&primary.meta("a.db")), 1);
    replica.launch();
    assert_same(&primary, &replica, "a.db");
    let log = replica.log();
    assert!(!log.contains("page copy"), "{log}");
}

#[test]
fn history_is_kept_without_replicas_where_that_is_asked_for() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = primary(dir.path(), ", retain-without-replicas: true");
    burst(&create(&primary));
    assert_eq!(first_in_log(&primary.meta("a.db")), 1);
}
