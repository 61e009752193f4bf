//! Programs that outlive the daemon. Here the program is the test itself.

use rusqlite::Connection;

use crate::harness::{Node, Options, assert_same, cannot_mount, wait_for};

fn rows(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap()
}

fn insert(db: &Connection) -> rusqlite::Result<usize> {
    db.execute("INSERT INTO t VALUES (zeroblob(100))", [])
}

fn create(node: &Node, name: &str, journal_mode: &str) -> Connection {
    let db = node.open(name);
    db.execute_batch(&format!(
        "PRAGMA journal_mode={journal_mode}; PRAGMA synchronous=NORMAL; CREATE TABLE t(x);"
    ))
    .unwrap();
    insert(&db).unwrap();
    db
}

fn is_on_ext4(dir: &std::path::Path) -> bool {
    let is_so = rustix::fs::statfs(dir).is_ok_and(|s| s.f_type == 0xef53);
    if !is_so {
        eprintln!("skipped: {} is not on ext4", dir.display());
    }
    is_so
}

#[test]
fn what_is_committed_without_a_daemon_is_kept_and_then_no_more_can_be() {
    let dir = tempfile::tempdir().unwrap();
    if cannot_mount() || !is_on_ext4(dir.path()) {
        return;
    }
    let mut primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let old = create(&primary, "a.db", "wal");
    let idle = create(&primary, "idle.db", "wal");
    idle.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
    assert_same(&primary, &replica, "a.db");

    primary.kill();
    for _ in 0..5 {
        insert(&old).expect("the kernel serves it without the daemon");
    }
    primary.launch();
    assert!(primary.log().contains("restart them"), "{}", primary.log());

    let new = primary.open("a.db");
    assert_eq!(rows(&new), 6, "what was acknowledged is there");
    let error = insert(&old).unwrap_err();
    assert_eq!(
        error.sqlite_error_code(),
        Some(rusqlite::ErrorCode::CannotOpen),
        "{error}"
    );
    insert(&new).unwrap();

    // Closing removes the WAL by its name, which now stands for another file.
    let new_idle = primary.open("idle.db");
    insert(&new_idle).unwrap();
    for companion in ["a.db-wal", "a.db-shm", "idle.db-wal"] {
        let error = std::fs::remove_file(primary.path(companion)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{companion}");
    }
    drop(old);
    drop(idle);
    assert!(primary.path("a.db-wal").exists());
    assert!(primary.path("idle.db-wal").exists());
    assert!(
        primary.log().contains("refused to remove"),
        "{}",
        primary.log()
    );
    insert(&new).unwrap();
    insert(&new_idle).unwrap();
    assert_eq!(rows(&primary.open("a.db")), 8);
    assert_eq!(rows(&primary.open("idle.db")), 3);
    assert_same(&primary, &replica, "a.db");
    assert_same(&primary, &replica, "idle.db");

    // Once it has let go of the old files, the program is like any other.
    drop(new);
    drop(new_idle);
    wait_for("the last connection to remove the wal", || {
        !primary.path("a.db-wal").exists()
    });
}

#[test]
fn a_transaction_under_way_when_the_daemon_dies_is_rolled_back() {
    let dir = tempfile::tempdir().unwrap();
    if cannot_mount() || !is_on_ext4(dir.path()) {
        return;
    }
    for mode in ["delete", "truncate", "persist"] {
        let sub = dir.path().join(mode);
        let mut primary = Node::primary(&sub, "");
        let replica = Node::replica(&sub, "replica", &primary, "");
        let old = create(&primary, "a.db", mode);
        old.execute_batch("PRAGMA cache_size=5; BEGIN").unwrap();
        for _ in 0..500 {
            insert(&old).unwrap();
        }
        primary.kill();
        primary.launch();

        let new = primary.open("a.db");
        assert_eq!(rows(&new), 1, "{mode}");
        insert(&new).unwrap();
        old.execute_batch("COMMIT")
            .expect_err("its files are not those of the database any more");
        drop(old);
        insert(&new).unwrap();
        assert_eq!(rows(&primary.open("a.db")), 3, "{mode}");
        assert_same(&primary, &replica, "a.db");
    }
}

/// A journal that is not hot is no transaction, so no start removes it. Who outlived the daemon found it, wrote it, and could
/// never remove it: no commit on that node any more. (litefs-jepsen, kill-all, seed 1.)
#[test]
fn a_journal_that_was_left_behind_does_not_lock_out_who_outlived_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    if cannot_mount() || !is_on_ext4(dir.path()) {
        return;
    }
    let mut primary = Node::primary(dir.path(), "");
    let old = create(&primary, "a.db", "delete");
    primary.kill();
    let left = primary.data().join("files/a.db-journal");
    std::fs::write(left, vec![0; 512]).unwrap();
    primary.launch();
    let new = primary.open("a.db");
    insert(&new).unwrap();
    insert(&new).unwrap();
    assert_eq!(rows(&new), 3);
    drop(old);
}

#[test]
fn a_reader_that_outlives_the_daemon_of_a_replica_keeps_a_whole_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    if cannot_mount() {
        return;
    }
    let primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    let writer = create(&primary, "a.db", "wal");
    assert_same(&primary, &replica, "a.db");
    let old = replica.open("a.db");
    old.execute_batch("BEGIN").unwrap();
    assert_eq!(rows(&old), 1);

    replica.kill();
    for _ in 0..2000 {
        insert(&writer).unwrap();
    }
    replica.launch();
    assert_same(&primary, &replica, "a.db");
    assert_eq!(rows(&old), 1);
    let check: String = old
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .unwrap();
    assert_eq!(check, "ok");
    drop(old);
    insert(&writer).unwrap();
    assert_same(&primary, &replica, "a.db");
}

#[test]
fn where_files_cannot_be_fenced_the_node_waits_for_the_program() {
    if cannot_mount() {
        return;
    }
    let shm = std::path::Path::new("/dev/shm");
    if !rustix::fs::statfs(shm).is_ok_and(|s| s.f_type == 0x0102_1994) {
        eprintln!("skipped: /dev/shm is not a tmpfs");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = tempfile::tempdir_in(shm).unwrap();
    let options = Options {
        data: Some(data.path().join("data")),
        ..Options::default()
    };
    let mut primary = Node::primary_with(dir.path(), options);
    let old = create(&primary, "a.db", "wal");
    if !primary.log().contains("passthrough=true") {
        eprintln!("skipped: no passthrough, so nothing is open without the daemon");
        return;
    }
    primary.kill();
    let more = insert(&old).unwrap_or(0);
    primary.spawn();
    wait_for("the node to wait", || {
        primary.log().contains("waiting for them to end")
    });
    assert!(primary.log().contains("a.db"), "{}", primary.log());
    drop(old);
    primary.wait_until_ready();
    let new = primary.open("a.db");
    assert_eq!(rows(&new), 1 + i64::try_from(more).unwrap());
    insert(&new).unwrap();
}

#[test]
fn programs_never_find_the_bare_directory_while_a_daemon_is_replaced() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let path = primary.path("a.db");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let insert = |n: i64| -> rusqlite::Result<()> {
        let db = rusqlite::Connection::open(&path)?;
        db.execute_batch("CREATE TABLE IF NOT EXISTS t(n)")?;
        db.execute("INSERT INTO t VALUES(?1)", [n])?;
        Ok(())
    };
    insert(0).unwrap();
    let acknowledged = std::thread::scope(|s| {
        let program = s.spawn(|| {
            let mut acknowledged = vec![0];
            for n in 1.. {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
                if insert(n).is_ok() {
                    acknowledged.push(n);
                }
            }
            acknowledged
        });
        for _ in 0..10 {
            let size = || std::fs::metadata(&path).map_or(0, |m| m.len());
            let before = size();
            wait_for("commits", || size() > before);
            primary.kill();
            primary.launch();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        program.join().unwrap()
    });
    let db = primary.open("a.db");
    let mut rows = db.prepare("SELECT n FROM t ORDER BY n").unwrap();
    let found: std::collections::BTreeSet<i64> = rows
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let lost: Vec<i64> = acknowledged
        .into_iter()
        .filter(|n| !found.contains(n))
        .collect();
    assert_eq!(lost, [] as [i64; 0]);
    drop(rows);
    drop(db);
    primary.stop();
    let below: Vec<_> = std::fs::read_dir(dir.path().join("primary/mnt"))
        .unwrap()
        .collect();
    assert!(below.is_empty(), "{below:?}");
    // It can be removed: nothing of ours stays on it.
    std::fs::remove_dir(dir.path().join("primary/mnt")).unwrap();
    std::fs::create_dir(dir.path().join("primary/mnt")).unwrap();
}

#[test]
fn what_comes_while_a_replica_stops_is_not_written_past_the_wal_of_its_readers() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = create(&primary, "a.db", "wal");
    let (goes_on, ended) = std::sync::mpsc::channel::<()>();
    let writer = std::thread::spawn(move || {
        while ended.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            insert(&db).unwrap();
        }
    });
    for _ in 0..4 {
        wait_for("the copy", || replica.path("a.db").exists());
        let reader = replica.open("a.db");
        let before = rows(&reader);
        wait_for("commits", || rows(&reader) > before + 50);
        replica.stop();
        let read: rusqlite::Result<i64> =
            reader.query_row("SELECT count(*) FROM t", [], |r| r.get(0));
        if let Err(error) = read {
            assert_ne!(
                error.sqlite_error_code(),
                Some(rusqlite::ErrorCode::DatabaseCorrupt),
                "{error}"
            );
        }
        drop(reader);
        replica.launch();
        let log = replica.log();
        assert!(!log.contains("written back"), "{log}");
    }
    drop(goes_on);
    writer.join().unwrap();
    assert_same(&primary, &replica, "a.db");
}

/// What a program would read on from files that are no longer those of the database is the past: it gets an error.
#[test]
fn who_outlived_the_daemon_reads_no_past() {
    let dir = tempfile::tempdir().unwrap();
    if cannot_mount() || !is_on_ext4(dir.path()) {
        return;
    }
    for mode in ["wal", "delete", "truncate", "persist"] {
        let sub = dir.path().join(mode);
        let mut primary = Node::primary(&sub, "");
        let mut replica = Node::replica(&sub, "replica", &primary, "");
        let old = create(&primary, "a.db", mode);
        assert_same(&primary, &replica, "a.db");
        let old_reader = replica.open("a.db");
        let in_transaction = primary.open("a.db");
        in_transaction.execute_batch("BEGIN").unwrap();
        for db in [&old, &old_reader, &in_transaction] {
            assert_eq!(rows(db), 1, "{mode}");
        }
        for node in [&mut primary, &mut replica] {
            node.kill();
            node.launch();
        }
        let count = |db: &Connection| -> rusqlite::Result<i64> {
            db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        };
        for db in [&old, &old_reader] {
            let error = count(db).expect_err("it reads what was");
            let code = error.sqlite_error_code();
            let is_clear = [
                rusqlite::ErrorCode::CannotOpen,
                rusqlite::ErrorCode::NotADatabase,
                rusqlite::ErrorCode::SystemIoFailure,
            ];
            assert!(
                code.is_some_and(|c| is_clear.contains(&c)),
                "{mode}: {error}"
            );
        }
        assert_eq!(rows(&in_transaction), 1, "{mode}: its snapshot");
        in_transaction.execute_batch("COMMIT").unwrap();
        count(&in_transaction).expect_err("it reads what was");
        drop((old, old_reader, in_transaction));
        let new = primary.open("a.db");
        insert(&new).unwrap();
        assert_eq!(rows(&new), 2, "{mode}");
        assert_same(&primary, &replica, "a.db");
    }
}
