//! What a start makes of files and log that do not agree, without a power cut: see `power` for those.
//!
//! Which of the two is right depends on who wrote them, how the last session ended, and what took a name in between.

use std::fs;
use std::path::Path;

use rusqlite::Connection;

use crate::harness::{Node, Options, assert_same, assert_same_pages, cannot_mount, wait_for};
use crate::modes::text;

#[expect(clippy::disallowed_methods, reason = "what a user does in the mount")]
fn rename(node: &Node, from: &str, to: &str) {
    fs::rename(node.path(from), node.path(to)).unwrap();
}

fn rows(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap()
}

fn insert(db: &Connection) -> rusqlite::Result<usize> {
    db.execute("INSERT INTO t(v) VALUES (randomblob(100))", [])
}

const TABLE: &str = "CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)";

/// The daemon is killed at a step, once `armed` is there.
fn dies_at(step: &str, armed: &Path) -> Options {
    Options {
        env: vec![
            ("LITEFS_CRASH_AT".into(), step.into()),
            ("LITEFS_CRASH_WHEN".into(), armed.display().to_string()),
        ],
        ..Options::default()
    }
}

fn again(node: &mut Node) {
    if let Some(mut child) = node.child.take() {
        child.wait().unwrap();
    }
    node.options.env.clear();
    node.launch();
}

fn make_other(path: &Path, rows: u32) {
    let db = Connection::open(path).unwrap();
    text(&db, "PRAGMA journal_mode=wal");
    db.execute_batch(TABLE).unwrap();
    for _ in 0..rows {
        insert(&db).unwrap();
    }
    drop(db);
}

/// A replica dies while it applies, and becomes the primary.
fn replica_dies_and_becomes_primary(step: &str, power_is_cut: bool) {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let armed = dir.path().join("armed");
    let mut primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica_with(dir.path(), "replica", &primary, dies_at(step, &armed));
    let db = primary.open("a.db");
    text(&db, "PRAGMA journal_mode=wal");
    db.execute_batch(TABLE).unwrap();
    db.execute_batch(
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<2000)
         INSERT INTO t(v) SELECT randomblob(300) FROM c",
    )
    .unwrap();
    wait_for("the replica to have it", || {
        primary.pos("a.db").is_some() && primary.pos("a.db") == replica.pos("a.db")
    });
    fs::write(&armed, "").unwrap();
    db.execute_batch("UPDATE t SET v=zeroblob(300) WHERE id%100=0")
        .unwrap();
    let pos = primary.pos("a.db");
    wait_for("the replica to die", || replica.has_ended());
    drop(db);
    primary.stop();
    if power_is_cut {
        // As far as the node can tell: another boot.
        fs::remove_file(replica.data().join("session")).unwrap();
    }
    replica.become_primary();
    again(&mut replica);
    let now = replica.pos("a.db");
    let mut db = replica.open("a.db");
    let zeros = text(&db, "SELECT count(*) FROM t WHERE v=zeroblob(300)");
    assert!(
        zeros == "0" || zeros == "20",
        "{step}: a part of a transaction: {zeros} of 20 rows, at {now:?}\n{}",
        replica.log()
    );
    assert!(
        zeros == "20" || now != pos,
        "{step}: says that it has the transaction, and has {zeros} of 20 rows\n{}",
        replica.log()
    );
    insert(&db).unwrap();
    let third = Node::replica(dir.path(), "third", &replica, "");
    assert_same_pages(&replica, &mut db, &third, "a.db");
}

#[test]
fn exclusive_commit_survives_kill_of_daemon() {
    if cannot_mount() {
        return;
    }
    for mode in ["delete", "persist", "truncate"] {
        let dir = tempfile::tempdir().unwrap();
        let armed = dir.path().join("armed");
        let mut primary = Node::primary_with(dir.path(), dies_at("capture.scan:commit", &armed));
        let db = primary.open("a.db");
        text(&db, "PRAGMA locking_mode=exclusive");
        text(&db, &format!("PRAGMA journal_mode={mode}"));
        db.execute_batch("PRAGMA synchronous=full").unwrap();
        db.execute_batch(TABLE).unwrap();
        for _ in 0..20 {
            insert(&db).unwrap();
        }
        let pos = primary.pos("a.db").unwrap();
        eprintln!("{mode}: {pos}");
        fs::write(&armed, "").unwrap();
        let mut acknowledged = 20;
        let mut tries = 0;
        while !primary.has_ended() && tries < 50 {
            if insert(&db).is_ok() {
                acknowledged += 1;
            }
            tries += 1;
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        drop(db);
        eprintln!("{mode}: ended {} after {acknowledged}", primary.has_ended());
        if !primary.has_ended() {
            continue; // hooked
        }
        again(&mut primary);
        let have = rows(&primary.open("a.db"));
        assert!(
            have >= acknowledged,
            "{mode}: {acknowledged} acknowledged, {have} there\n{}",
            primary.log()
        );
    }
}

/// An older copy of a database in a rollback mode takes its place, and the daemon is killed.
#[test]
fn rollback_database_renamed_over_another_and_the_daemon_dies() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let armed = dir.path().join("armed");
    let mut primary = Node::primary_with(dir.path(), dies_at("capture.scan:commit", &armed));
    let db = primary.open("a.db");
    text(&db, "PRAGMA journal_mode=delete");
    db.execute_batch(TABLE).unwrap();
    for _ in 0..10 {
        insert(&db).unwrap();
    }
    fs::copy(primary.path("a.db"), dir.path().join("backup")).unwrap();
    for _ in 0..10 {
        insert(&db).unwrap();
    }
    drop(db);
    fs::copy(dir.path().join("backup"), primary.path("tmp")).unwrap();
    wait_for("the copy to be captured", || primary.pos("tmp").is_some());
    fs::write(&armed, "").unwrap();
    rename(&primary, "tmp", "a.db");
    wait_for("the daemon to die", || primary.has_ended());
    again(&mut primary);
    let have = rows(&primary.open("a.db"));
    assert_eq!(have, 10, "the backup is not there\n{}", primary.log());
}

#[test]
fn replica_dies_before_it_writes_and_becomes_primary() {
    replica_dies_and_becomes_primary("apply:logged", false);
}

#[test]
fn replica_dies_while_it_writes_and_becomes_primary() {
    replica_dies_and_becomes_primary("apply.file:write:10", false);
}

#[test]
fn replica_loses_power_while_it_writes_and_becomes_primary() {
    replica_dies_and_becomes_primary("apply.file:write:10", true);
}

#[test]
fn exclusive_wal_beside_the_index_of_a_program_that_was_killed() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let path = primary.path("a.db");
    // A program that is killed with the database open.
    let script = format!(
        "import sqlite3, os, signal\n\
         db = sqlite3.connect({:?}, isolation_level=None)\n\
         db.execute('PRAGMA journal_mode=wal')\n\
         db.execute({TABLE:?})\n\
         db.execute('INSERT INTO t(v) VALUES(1)')\n\
         os.kill(os.getpid(), signal.SIGKILL)\n",
        path.display().to_string()
    );
    let status = std::process::Command::new("python3")
        .args(["-c", &script])
        .status()
        .unwrap();
    assert!(!status.success());
    assert!(primary.path("a.db-shm").exists() && primary.path("a.db-wal").exists());
    wait_for("the replica to have it", || {
        primary.pos("a.db").is_some() && primary.pos("a.db") == replica.pos("a.db")
    });
    let mut db = primary.open("a.db");
    text(&db, "PRAGMA locking_mode=exclusive");
    assert_eq!(text(&db, "PRAGMA journal_mode"), "wal");
    assert_eq!(rows(&db), 1);
    for _ in 0..10 {
        insert(&db).unwrap();
    }
    assert_same_pages(&primary, &mut db, &replica, "a.db");
}

#[test]
fn exclusive_wal_beside_the_index_of_a_program_that_was_killed_then_kill() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let path = primary.path("a.db");
    let script = format!(
        "import sqlite3, os, signal\n\
         db = sqlite3.connect({:?}, isolation_level=None)\n\
         db.execute('PRAGMA journal_mode=wal')\n\
         db.execute({TABLE:?})\n\
         db.execute('WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<500) INSERT INTO t(v) SELECT randomblob(300) FROM c')\n\
         os.kill(os.getpid(), signal.SIGKILL)\n",
        path.display().to_string()
    );
    let status = std::process::Command::new("python3")
        .args(["-c", &script])
        .status()
        .unwrap();
    assert!(!status.success());
    wait_for("the replica to have it", || {
        primary.pos("a.db").is_some() && primary.pos("a.db") == replica.pos("a.db")
    });
    let db = primary.open("a.db");
    text(&db, "PRAGMA locking_mode=exclusive");
    assert_eq!(rows(&db), 500);
    db.execute_batch("UPDATE t SET v=randomblob(300)").unwrap();
    for _ in 0..3000 {
        insert(&db).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_secs(2));
    eprintln!("{:?} {:?}", primary.pos("a.db"), replica.pos("a.db"));
    primary.kill();
    drop(db);
    primary.launch();
    let mut db = primary.open("a.db");
    eprintln!("{} rows", rows(&db));
    insert(&db).unwrap();
    assert_same_pages(&primary, &mut db, &replica, "a.db");
}

/// The journal of a transaction over several databases is hot.
#[test]
fn hot_journal_with_a_super_journal() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let armed = dir.path().join("armed");
    let options = dies_at("capture.journal:commit", &armed);
    let mut primary = Node::primary_with(dir.path(), options);
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = primary.open("a.db");
    let other = primary.path("b.db").display().to_string();
    db.execute("ATTACH ? AS b", [&other]).unwrap();
    db.execute_batch(TABLE).unwrap();
    db.execute_batch("CREATE INDEX i ON t(v); CREATE TABLE b.u(v)")
        .unwrap();
    for _ in 0..200 {
        insert(&db).unwrap();
    }
    wait_for("the replica to have it", || {
        primary.pos("a.db").is_some() && primary.pos("a.db") == replica.pos("a.db")
    });
    let files = primary.data().join("files");
    let before = fs::read(files.join("a.db")).unwrap();
    fs::write(&armed, "").unwrap();
    db.execute_batch("BEGIN; INSERT INTO b.u VALUES(1)")
        .unwrap();
    for _ in 0..200 {
        insert(&db).unwrap();
    }
    let _ = db.execute_batch("COMMIT");
    wait_for("the daemon to die", || primary.has_ended());
    // What is there now is what was there just before the super-journal was removed, but for the super-journal: it
    // comes back, and of the pages only the first half has been written.
    let after = fs::read(files.join("a.db")).unwrap();
    let journal = fs::read(files.join("a.db-journal")).unwrap();
    assert!(journal[0] != 0, "hot");
    let tail = journal.len() - 16;
    let len = u32::from_be_bytes(journal[tail..tail + 4].try_into().unwrap()) as usize;
    let name = String::from_utf8(journal[tail - len..tail].to_vec()).unwrap();
    let name = Path::new(&name).file_name().unwrap();
    assert!(name.to_str().unwrap().starts_with("a.db-mj"), "{name:?}");
    let children =
        ["a.db-journal", "b.db-journal"].map(|n| primary.path(n).display().to_string() + "\0");
    fs::write(files.join(name), children.concat()).unwrap();
    let half = before.len() / 2 / 4096 * 4096;
    fs::write(
        files.join("a.db"),
        [&after[..half], &before[half..]].concat(),
    )
    .unwrap();
    drop(db);
    again(&mut primary);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let copy = replica.open("a.db");
    let check = text(&copy, "PRAGMA integrity_check(1)");
    let have = copy.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0));
    let log = primary.log();
    drop(copy);
    let there = rows(&primary.open("a.db"));
    assert_eq!(there, 200, "sqlite rolls it back\n{log}");
    assert_same(&primary, &replica, "a.db");
    assert!(
        check == "ok" && have == Ok(200),
        "meanwhile the replica showed {have:?} rows, {check}\n{log}"
    );
}

/// A database and its WAL were put in place after a clean end, and the start dies.
#[test]
fn replaced_with_its_wal_after_a_clean_end_and_the_start_dies() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = primary.open("a.db");
    text(&db, "PRAGMA journal_mode=wal");
    db.execute_batch(TABLE).unwrap();
    insert(&db).unwrap();
    drop(db);
    assert_same(&primary, &replica, "a.db");
    primary.stop();
    let other = dir.path().join("other.db");
    let db = Connection::open(&other).unwrap();
    text(&db, "PRAGMA journal_mode=wal");
    db.execute_batch(TABLE).unwrap();
    for _ in 0..300 {
        insert(&db).unwrap();
    }
    text(&db, "PRAGMA wal_checkpoint(RESTART)");
    for _ in 0..10 {
        insert(&db).unwrap();
    }
    let files = primary.data().join("files");
    fs::copy(&other, files.join("a.db")).unwrap();
    fs::copy(dir.path().join("other.db-wal"), files.join("a.db-wal")).unwrap();
    drop(db);
    primary.options.env = vec![("LITEFS_CRASH_AT".into(), "capture.scan:commit".into())];
    primary.spawn();
    assert!(!primary.wait_until_ready_or_ended());
    again(&mut primary);
    let mut db = primary.open("a.db");
    assert_eq!(rows(&db), 310);
    insert(&db).unwrap();
    assert_same_pages(&primary, &mut db, &replica, "a.db");
}

/// A database that was put in place after a clean end, and a start that dies.
#[test]
fn replaced_after_a_clean_end_and_the_start_dies() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = primary.open("a.db");
    text(&db, "PRAGMA journal_mode=wal");
    db.execute_batch(TABLE).unwrap();
    insert(&db).unwrap();
    drop(db);
    assert_same(&primary, &replica, "a.db");
    primary.stop();
    let other = dir.path().join("other.db");
    make_other(&other, 30);
    fs::copy(&other, primary.data().join("files/a.db")).unwrap();
    primary.options.env = vec![("LITEFS_CRASH_AT".into(), "capture.scan:commit".into())];
    primary.spawn();
    assert!(!primary.wait_until_ready_or_ended());
    again(&mut primary);
    wait_for("the replica to have what was put in place", || {
        rows(&replica.open("a.db")) == 30
    });
}

/// A database is renamed over another, and the daemon is killed.
#[test]
fn renamed_over_another_and_the_daemon_dies() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let armed = dir.path().join("armed");
    let mut primary = Node::primary_with(dir.path(), dies_at("capture.scan:commit", &armed));
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = primary.open("a.db");
    text(&db, "PRAGMA journal_mode=wal");
    db.execute_batch(TABLE).unwrap();
    insert(&db).unwrap();
    drop(db);
    assert_same(&primary, &replica, "a.db");
    let other = dir.path().join("other.db");
    make_other(&other, 30);
    fs::copy(&other, primary.path("tmp")).unwrap();
    wait_for("the copy to be captured", || primary.pos("tmp").is_some());
    fs::write(&armed, "").unwrap();
    rename(&primary, "tmp", "a.db");
    wait_for("the daemon to die", || primary.has_ended());
    again(&mut primary);
    wait_for("the replica to have what was put in place", || {
        rows(&replica.open("a.db")) == 30
    });
}

/// A former primary has transactions of its own of a database that the new one dropped.
#[test]
fn own_transactions_of_a_dropped_database_are_kept() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut old = Node::primary(dir.path(), "");
    let mut new = Node::replica(dir.path(), "replica", &old, "");
    let db = old.open("a.db");
    text(&db, "PRAGMA journal_mode=wal");
    db.execute_batch(TABLE).unwrap();
    insert(&db).unwrap();
    assert_same(&old, &new, "a.db");
    new.stop();
    for _ in 0..3 {
        insert(&db).unwrap();
    }
    drop(db);
    let meta = old.meta("a.db");
    old.stop();
    new.become_primary();
    new.launch();
    let db = new.open("a.db");
    for _ in 0..10 {
        insert(&db).unwrap();
    }
    drop(db);
    fs::remove_file(new.path("a.db")).unwrap();
    let b = new.open("b.db");
    b.execute_batch(TABLE).unwrap();
    old.become_replica(&new);
    old.launch();
    assert_same(&new, &old, "b.db");
    wait_for("the old to drop it", || !old.path("a.db").exists());
    let kept: Vec<_> = fs::read_dir(meta.join("lost"))
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().path().join("database.db"))
        .collect();
    eprintln!("kept: {kept:?}\n{}", old.log());
    assert!(kept.iter().any(|path| path.is_file()), "{kept:?}");
}

/// A former primary has transactions that it did not capture any more.
#[test]
fn own_transactions_not_captured_are_kept() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let armed = dir.path().join("armed");
    let mut old = Node::primary_with(dir.path(), dies_at("capture.wal:commit", &armed));
    let mut new = Node::replica(dir.path(), "replica", &old, "");
    let db = old.open("a.db");
    text(&db, "PRAGMA journal_mode=wal");
    db.execute_batch("PRAGMA synchronous=normal").unwrap();
    db.execute_batch(TABLE).unwrap();
    insert(&db).unwrap();
    assert_same(&old, &new, "a.db");
    fs::write(&armed, "").unwrap();
    for _ in 0..3 {
        insert(&db).unwrap();
    }
    wait_for("the daemon to die", || old.has_ended());
    for _ in 0..3 {
        insert(&db).unwrap();
    }
    drop(db);
    let meta = old.meta("a.db");
    new.stop();
    new.become_primary();
    new.launch();
    old.become_replica(&new);
    again(&mut old);
    assert_same(&new, &old, "a.db");
    let kept: Vec<_> = fs::read_dir(meta.join("lost"))
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().path().join("database.db"))
        .collect();
    eprintln!("kept: {kept:?}\n{}", old.log());
    assert_eq!(rows(&old.open("a.db")), 1);
    assert!(kept.iter().any(|path| path.is_file()), "{kept:?}");
}

/// A former primary has a database of its own that the new one makes later.
#[test]
fn own_database_is_kept_when_the_new_primary_makes_it_as_well() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut old = Node::primary(dir.path(), "");
    let mut new = Node::replica(dir.path(), "replica", &old, "");
    let db = old.open("a.db");
    db.execute_batch(TABLE).unwrap();
    insert(&db).unwrap();
    drop(db);
    assert_same(&old, &new, "a.db");
    new.stop();
    let db = old.open("own.db");
    db.execute_batch(TABLE).unwrap();
    for _ in 0..3 {
        insert(&db).unwrap();
    }
    drop(db);
    assert!(old.pos("own.db").is_some());
    let meta = old.meta("own.db");
    old.stop();
    new.become_primary();
    new.launch();
    old.become_replica(&new);
    old.launch();
    assert_same(&new, &old, "a.db");
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert_eq!(rows(&old.open("own.db")), 3);
    old.stop();
    let db = new.open("own.db");
    db.execute_batch(TABLE).unwrap();
    for _ in 0..10 {
        insert(&db).unwrap();
    }
    drop(db);
    old.launch();
    assert_same(&new, &old, "own.db");
    let kept: Vec<_> = fs::read_dir(meta.join("lost"))
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().path().join("database.db"))
        .collect();
    eprintln!("kept: {kept:?}\n{}", old.log());
    assert!(kept.iter().any(|path| path.is_file()), "{kept:?}");
}

/// Databases swap their names, and one is written without a trace.
#[test]
fn database_that_took_anothers_name_is_watched() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    for name in ["app.db", "new.db"] {
        let db = primary.open(name);
        db.execute_batch(TABLE).unwrap();
        insert(&db).unwrap();
        drop(db);
        assert_same(&primary, &replica, name);
    }
    std::thread::sleep(std::time::Duration::from_secs(1));
    rename(&primary, "app.db", "old.db");
    rename(&primary, "new.db", "app.db");
    assert_same(&primary, &replica, "app.db");
    assert_same(&primary, &replica, "old.db");
    let db = primary.open("app.db");
    text(&db, "PRAGMA journal_mode=memory");
    for n in 2..5 {
        insert(&db).unwrap();
        wait_for("the commit to reach the replica", || {
            rows(&replica.open("app.db")) == n
        });
    }
}
