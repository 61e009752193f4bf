//! Nodes that elect their primary: real processes and mounts, programs that keep their databases open throughout.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode};

use crate::harness::{Cluster, Node, Options, PATIENCE, cannot_mount, checksum_of_pages, wait_for};

pub(crate) fn create(node: &Node, name: &str, mode: &str) -> Connection {
    let db = node.open(name);
    let got: String = db
        .query_row(&format!("PRAGMA journal_mode={mode}"), [], |r| r.get(0))
        .unwrap();
    assert_eq!(got, mode);
    db.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")
        .unwrap();
    db
}

fn count(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap()
}

fn fails_busy(db: &Connection) -> bool {
    db.busy_timeout(Duration::ZERO).unwrap();
    let failed = db.execute("INSERT INTO t(v) VALUES('not here')", []);
    db.busy_timeout(PATIENCE).unwrap();
    failed.is_err_and(|e| e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy))
}

/// Kills the primary again and again; programs on the others keep their connections.
fn survives_kills(options: &Options, mode: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, options);
    let mut primary = cluster.primary();
    drop(create(&cluster.nodes[primary], "a.db", mode));
    cluster.wait_until_level("a.db");
    let mut rows = 0;
    for _ in 0..3 {
        let others = cluster.others(primary);
        let open: Vec<Connection> = others
            .iter()
            .map(|i| cluster.nodes[*i].open("a.db"))
            .collect();
        let db = cluster.nodes[primary].open("a.db");
        for _ in 0..20 {
            db.execute("INSERT INTO t(v) VALUES(randomblob(500))", [])
                .unwrap();
            rows += 1;
        }
        for db in &open {
            wait_for("rows on a replica", || count(db) == rows);
            assert!(fails_busy(db), "a replica's database can be written");
        }
        cluster.nodes[primary].kill();
        drop(db);
        let next = cluster.primary();
        assert_ne!(next, primary);
        let db = &open[others.iter().position(|i| *i == next).unwrap()];
        db.execute("INSERT INTO t(v) VALUES('after')", []).unwrap();
        rows += 1;
        cluster.nodes[primary].launch();
        drop(open);
        cluster.assert_same("a.db");
        assert_eq!(count(&cluster.nodes[primary].open("a.db")), rows);
        primary = next;
    }
}

#[test]
fn a_primary_that_is_killed_is_followed_by_another() {
    if cannot_mount() {
        return;
    }
    survives_kills(&Options::default(), "wal");
}

#[test]
fn so_it_is_in_a_rollback_mode() {
    if cannot_mount() {
        return;
    }
    survives_kills(&Options::default(), "delete");
}

#[test]
fn so_it_is_without_passthrough() {
    if cannot_mount() {
        return;
    }
    let options = Options {
        fuse_keys: ", passthrough: \"off\"".into(),
        ..Options::default()
    };
    survives_kills(&options, "wal");
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Hands the role around while programs on all nodes write whenever their node lets them.
fn survives_handoffs(mode: &str) {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 3, &Options::default());
    let primary = cluster.primary();
    drop(create(&cluster.nodes[primary], "a.db", mode));
    cluster.wait_until_level("a.db");
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for node in &cluster.nodes {
            let (stop, written) = (&stop, &written);
            scope.spawn(move || {
                let db = node.open("a.db");
                while !stop.load(Ordering::Acquire) {
                    db.execute("INSERT INTO t(v) VALUES(1)", []).unwrap();
                    written.fetch_add(1, Ordering::AcqRel);
                }
            });
        }
        // Also when something below fails.
        let stop = StopOnDrop(&stop);
        for round in 0..6 {
            let before = written.load(Ordering::Acquire);
            wait_for("writes", || written.load(Ordering::Acquire) > before + 20);
            let primary = cluster.primary();
            cluster.promote(cluster.others(primary)[round % 2]);
        }
        drop(stop);
        // Who waits for its node's turn gets one.
        for node in 0..cluster.nodes.len() {
            if cluster.primary() != node {
                cluster.promote(node);
            }
            let before = Instant::now();
            wait_for("a moment to write", || {
                before.elapsed() > Duration::from_millis(200)
            });
        }
    });
    cluster.assert_same("a.db");
    let db = cluster.nodes[cluster.primary()].open("a.db");
    assert_eq!(
        count(&db),
        i64::try_from(written.load(Ordering::Acquire)).unwrap()
    );
}

#[test]
fn a_handoff_loses_no_transaction_and_fails_none() {
    if cannot_mount() {
        return;
    }
    survives_handoffs("wal");
}

#[test]
fn nor_does_it_in_a_rollback_mode() {
    if cannot_mount() {
        return;
    }
    survives_handoffs("delete");
}

/// Programs that had a database in a rollback mode open on a replica go on with our WAL when the node is primary. The file
/// alone, which only checkpoints bring on, was captured as a transaction of its own then: of an older state, or of half of
/// one. (litefs-jepsen, partition-half, seed 2.)
#[test]
fn of_a_rollback_mode_nothing_but_commits_is_captured_after_a_change_of_roles() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 2, &Options::default());
    let primary = cluster.primary();
    let other = cluster.others(primary)[0];
    drop(create(&cluster.nodes[primary], "a.db", "delete"));
    cluster.wait_until_level("a.db");
    let db = cluster.nodes[other].open("a.db");
    assert_eq!(count(&db), 0);
    cluster.promote(other);
    let txid = || {
        let pos = cluster.nodes[other].pos("a.db").unwrap();
        u64::from_str_radix(pos.split('/').next().unwrap(), 16).unwrap()
    };
    let before = txid();
    db.busy_timeout(Duration::from_secs(1)).unwrap();
    for i in 1..=40 {
        // On a machine that is slow now and then, the role may go.
        wait_for("a write", || {
            let insert = "INSERT INTO t(v) VALUES(randomblob(3000))";
            let is_done = db.execute(insert, []).is_ok();
            if !is_done {
                let _ = cluster.nodes[other].ask("POST", "/promote");
            }
            is_done
        });
        if i % 10 == 0 {
            let _ = db.query_row("PRAGMA wal_checkpoint", [], |_| Ok(()));
        } else if i % 10 == 5 {
            // Another program that could write comes and goes; the file is looked at then.
            let path = cluster.nodes[other].path("a.db");
            let mut sh = std::process::Command::new("sh");
            let done = sh.args(["-c", ": <> \"$0\""]).arg(path).status();
            assert!(done.unwrap().success());
            let at = Instant::now();
            wait_for("the file to be looked at", || {
                at.elapsed() > Duration::from_millis(200)
            });
        }
    }
    assert_eq!(txid() - before, 40);
    cluster.assert_same("a.db");
}

#[test]
fn a_handoff_waits_for_no_program_that_sits_in_a_transaction() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 2, &Options::default());
    let primary = cluster.primary();
    let other = cluster.others(primary)[0];
    let db = create(&cluster.nodes[primary], "a.db", "wal");
    cluster.wait_until_level("a.db");
    db.execute_batch("BEGIN IMMEDIATE; INSERT INTO t(v) VALUES(1)")
        .unwrap();
    let answer = cluster.nodes[other].ask("POST", "/promote").unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 409") && answer.contains("write transaction"),
        "{answer}"
    );
    db.execute_batch("COMMIT").unwrap();
    db.execute("INSERT INTO t(v) VALUES(2)", []).unwrap();
    cluster.promote(other);
    assert!(fails_busy(&db));
    cluster.nodes[other]
        .open("a.db")
        .execute("INSERT INTO t(v) VALUES(3)", [])
        .unwrap();
    cluster.assert_same("a.db");
    assert_eq!(count(&db), 3);
}

/// A node that is told to stop while programs have its databases open: they must not be told that something is committed
/// which then nobody has. (litefs-jepsen, rolling.)
#[test]
fn what_programs_write_while_their_node_stops_is_refused_or_kept() {
    if cannot_mount() {
        return;
    }
    for mode in ["delete", "wal"] {
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Cluster::start(dir.path(), 3, &Options::default());
        let primary = cluster.primary();
        drop(create(&cluster.nodes[primary], "a.db", mode));
        cluster.wait_until_level("a.db");
        let stopped = cluster.others(primary)[0];
        let path = cluster.nodes[stopped].path("a.db");
        let db = Connection::open(&path).unwrap();
        assert_eq!(count(&db), 0);
        let stop = AtomicBool::new(false);
        let written = std::thread::scope(|scope| {
            let is_over = &stop;
            let writer = scope.spawn(move || {
                let mut written = 0;
                while !is_over.load(Ordering::Acquire) {
                    written += i64::from(db.execute("INSERT INTO t(v) VALUES(1)", []).is_ok());
                }
                written
            });
            let stop = StopOnDrop(&stop);
            cluster.nodes[stopped].stop();
            let at = Instant::now();
            wait_for("a moment to write", || {
                at.elapsed() > Duration::from_millis(200)
            });
            drop(stop);
            writer.join().unwrap()
        });
        cluster.nodes[stopped].launch();
        cluster.assert_same("a.db");
        let there = count(&cluster.nodes[primary].open("a.db"));
        assert_eq!(there, written, "{mode}");
    }
}

/// A daemon that is stopped does not stop the programs on its node: what they write is another history by then.
#[test]
fn what_a_paused_primary_wrote_meanwhile_is_kept_apart() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &Options::default());
    let primary = cluster.primary();
    let db = create(&cluster.nodes[primary], "a.db", "wal");
    // A sync would wait for the daemon.
    db.pragma_update(None, "synchronous", "normal").unwrap();
    db.execute("INSERT INTO t(v) VALUES('both')", []).unwrap();
    cluster.wait_until_level("a.db");
    let pid = i32::try_from(cluster.nodes[primary].pid()).unwrap();
    // SAFETY: the child is ours and not yet waited for.
    unsafe { libc::kill(pid, libc::SIGSTOP) };
    wait_for("the daemon to stop", || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let mut states =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        states.all(|stat| {
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| rest.trim_start().starts_with('T'))
        })
    });
    db.execute("INSERT INTO t(v) VALUES('lost')", []).unwrap();
    let others = cluster.others(primary);
    let mut next = None;
    wait_for("another primary", || {
        next = others
            .iter()
            .copied()
            .find(|i| cluster.nodes[*i].is_primary());
        next.is_some()
    });
    let next = next.unwrap();
    cluster.nodes[next]
        .open("a.db")
        .execute("INSERT INTO t(v) VALUES('kept')", [])
        .unwrap();
    // SAFETY: as above.
    unsafe { libc::kill(pid, libc::SIGCONT) };
    wait_for("the node that was paused to follow", || {
        !cluster.nodes[primary].is_primary()
            && cluster.nodes[primary].pos("a.db") == cluster.nodes[next].pos("a.db")
    });
    cluster.assert_same("a.db");
    let texts: Vec<String> = db
        .prepare("SELECT v FROM t ORDER BY id")
        .unwrap()
        .query_map([], |r| r.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(
        texts,
        ["both", "kept"],
        "on a connection that was open throughout"
    );
    let kept = std::fs::read_dir(cluster.nodes[primary].meta("a.db").join("lost")).unwrap();
    let lost = kept.map(|entry| entry.unwrap().path()).find(|path| {
        Connection::open(path.join("database.db")).is_ok_and(|db| {
            db.query_row("SELECT v FROM t WHERE v='lost'", [], |r| {
                r.get::<_, String>(0)
            })
            .is_ok()
        })
    });
    assert!(lost.is_some(), "what was lost can be read");
    cluster.nodes[primary].stop();
}

#[test]
fn one_node_alone_is_a_cluster() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 1, &Options::default());
    drop(create(&cluster.nodes[0], "a.db", "wal"));
    for clean in [true, false] {
        let db = cluster.nodes[0].open("a.db");
        db.execute("INSERT INTO t(v) VALUES(1)", []).unwrap();
        match clean {
            true => cluster.nodes[0].stop(),
            false => cluster.nodes[0].kill(),
        }
        cluster.nodes[0].launch();
    }
    assert_eq!(count(&cluster.nodes[0].open("a.db")), 2);
}

/// Everything is killed at once, again and again; what a program was told is there afterwards.
#[test]
fn a_commit_of_a_quorum_survives_the_primary() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            keys: "durability: quorum\n".into(),
            ..Options::default()
        };
        let mut cluster = Cluster::start(dir.path(), 3, &options);
        let mut primary = cluster.primary();
        drop(create(&cluster.nodes[primary], "a.db", mode));
        let mut rows = 0;
        for _ in 0..4 {
            let db = cluster.nodes[primary].open("a.db");
            let until = Instant::now() + Duration::from_millis(300);
            while Instant::now() < until {
                db.execute("INSERT INTO t(v) VALUES(1)", []).unwrap();
                rows += 1;
            }
            cluster.nodes[primary].kill();
            drop(db);
            let next = cluster.primary();
            let db = cluster.nodes[next].open("a.db");
            assert_eq!(count(&db), rows, "{mode}: rows that were acknowledged");
            drop(db);
            cluster.nodes[primary].launch();
            primary = next;
        }
        cluster.assert_same("a.db");
    }
}

/// Without a majority a commit is refused, and takes place everywhere or nowhere once there is one again.
#[test]
fn a_commit_without_a_quorum_is_in_doubt_until_there_is_one() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            keys: "durability: quorum\n".into(),
            ..Options::default()
        };
        let mut cluster = Cluster::start(dir.path(), 3, &options);
        let primary = cluster.primary();
        let db = create(&cluster.nodes[primary], "a.db", mode);
        db.execute("INSERT INTO t(v) VALUES('both')", []).unwrap();
        cluster.wait_until_level("a.db");
        for other in cluster.others(primary) {
            cluster.nodes[other].kill();
        }
        let refused = db.execute("INSERT INTO t(v) VALUES('doubt')", []);
        assert!(refused.is_err(), "{mode}: a commit without a quorum");
        wait_for("the doubt to be kept", || {
            let log = cluster.nodes[primary].log();
            log.contains("read-only until a quorum has it") || log.contains("no longer the primary")
        });
        for reader in [&db, &cluster.nodes[primary].open("a.db")] {
            assert_eq!(count(reader), 1, "{mode}: nobody sees what is in doubt");
        }
        for other in cluster.others(primary) {
            cluster.nodes[other].launch();
        }
        cluster.wait_until_level("a.db");
        let other = cluster.nodes[cluster.primary()].open("a.db");
        other
            .execute("INSERT INTO t(v) VALUES('after')", [])
            .unwrap();
        cluster.assert_same("a.db");
        let rows = count(&other);
        assert!((2..=3).contains(&rows), "{mode}: {rows} rows");
        wait_for("the program's own connection to agree", || {
            count(&db) == rows
        });
    }
}

/// SQLite's `incrvacuum3.test` copies a WAL before its database.
#[test]
fn a_wal_that_is_copied_before_its_database_is_no_commit_that_waits() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        keys: "durability: quorum\n".into(),
        ..Options::default()
    };
    let cluster = Cluster::start(dir.path(), 2, &options);
    let node = &cluster.nodes[cluster.primary()];
    let db = create(node, "a.db", "wal");
    db.execute_batch(
        "INSERT INTO t(v) VALUES(1); PRAGMA wal_checkpoint(TRUNCATE); INSERT INTO t(v) VALUES(2)",
    )
    .unwrap();
    for suffix in ["-wal", ""] {
        let to = node.path(&format!("b.db{suffix}"));
        std::fs::copy(node.path(&format!("a.db{suffix}")), to).unwrap();
    }
    let copy = node.open("b.db");
    assert_eq!(count(&copy), 2);
    copy.execute("INSERT INTO t(v) VALUES(3)", []).unwrap();
    drop(copy);
    cluster.assert_same("b.db");
}

/// The daemon dies when a commit is logged and not yet in the WAL: what the node says it has is what it has.
#[test]
fn a_held_commit_whose_daemon_dies_is_not_half_there() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            keys: "durability: quorum\n".into(),
            ..Options::default()
        };
        let mut cluster = Cluster::start(dir.path(), 1, &options);
        drop(create(&cluster.nodes[0], "a.db", mode));
        let node = &mut cluster.nodes[0];
        node.stop();
        node.options.env = vec![("LITEFS_CRASH_AT".into(), "commit:logged:4".into())];
        node.launch();
        let db = node.open("a.db");
        let mut acknowledged = 0;
        while db
            .execute("INSERT INTO t(v) VALUES(randomblob(900))", [])
            .is_ok()
        {
            acknowledged += 1;
        }
        assert!(acknowledged > 0, "{mode}");
        wait_for("the daemon to die", || node.has_ended());
        drop(db);
        node.options.env.clear();
        node.launch();
        let mut db = node.open("a.db");
        let rows = count(&db);
        assert!(
            (acknowledged..=acknowledged + 1).contains(&rows),
            "{mode}: {rows} of {acknowledged}"
        );
        let pos = node.pos("a.db").unwrap();
        let sum = checksum_of_pages(&mut db).to_string();
        assert!(
            pos.trim().ends_with(&sum),
            "{mode}: at {pos}, pages have {sum}"
        );
    }
}

/// Stops a daemon, and returns once all of its threads are stopped.
fn pause(node: &Node) {
    signal(node, libc::SIGSTOP);
    let tasks = format!("/proc/{}/task", node.pid());
    wait_for("the daemon to stop", || {
        let mut states = std::fs::read_dir(&tasks)
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        states.all(|stat| {
            stat.rsplit(')')
                .next()
                .is_some_and(|rest| rest.trim_start().starts_with('T'))
        })
    });
}

fn signal(node: &Node, signal: i32) {
    let pid = i32::try_from(node.pid()).unwrap();
    // SAFETY: the child is ours and not yet waited for.
    unsafe { libc::kill(pid, signal) };
}

/// With a bound on what others lack, a primary that is alone stops, and no more is lost with it than that.
#[test]
fn no_more_is_lost_than_the_bound_allows() {
    const BOUND: i64 = 5;
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            keys: format!("durability: bounded:{BOUND}\n"),
            ..Options::default()
        };
        let mut cluster = Cluster::start(dir.path(), 3, &options);
        let primary = cluster.primary();
        let db = create(&cluster.nodes[primary], "a.db", mode);
        for _ in 0..50 {
            db.execute("INSERT INTO t(v) VALUES('both')", []).unwrap();
        }
        cluster.wait_until_level("a.db");
        let others = cluster.others(primary);
        for other in &others {
            pause(&cluster.nodes[*other]);
        }
        let mut rows = 50;
        let error = loop {
            match db.execute("INSERT INTO t(v) VALUES('alone')", []) {
                Ok(_) => rows += 1,
                Err(error) => break error,
            }
        };
        assert!(
            rows <= 50 + BOUND,
            "{mode}: {rows} rows, two nodes have had none since 50"
        );
        assert_eq!(
            error.sqlite_error_code(),
            Some(ErrorCode::SystemIoFailure),
            "{mode}: {error}"
        );
        cluster.nodes[primary].kill();
        drop(db);
        for other in &others {
            signal(&cluster.nodes[*other], libc::SIGCONT);
        }
        let db = cluster.nodes[cluster.primary()].open("a.db");
        let there = count(&db);
        assert!(
            there >= rows - BOUND,
            "{mode}: {there} of {rows} rows are left"
        );
        cluster.nodes[primary].launch();
        cluster.assert_same("a.db");
    }
}

/// Programs that opened a WAL before commits had to wait are named, for as long as they have it open.
#[test]
fn who_opened_a_database_before_commits_wait_is_named() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 1, &Options::default());
    let node = &cluster.nodes[0];
    let db = create(node, "a.db", "wal");
    let set = |value: &str| {
        let path = format!("/v1/cluster/durability?value={value}");
        node.ask("POST", &path).unwrap()
    };
    let refused = set("soon");
    assert!(
        refused.starts_with("HTTP/1.1 409") && refused.contains("bounded:500ms,100"),
        "{refused}"
    );
    for value in ["bounded:20ms,10", "quorum"] {
        let answer = set(value);
        assert!(answer.contains("\"unheld\":[\"a.db\"]"), "{answer}");
    }
    db.execute("INSERT INTO t(v) VALUES(1)", []).unwrap();
    drop(db);
    let unheld = || node.ask("GET", "/v1/cluster").unwrap();
    wait_for("nobody to have it open", || {
        unheld().contains("\"unheld\":[]")
    });
    let db = node.open("a.db");
    db.execute("INSERT INTO t(v) VALUES(1)", []).unwrap();
    assert!(unheld().contains("\"unheld\":[]"), "{}", unheld());
}
