//! Many databases and large ones, as small as still shows what would go wrong.

use std::fs;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::harness::{Node, assert_same, cannot_mount, wait_for};

fn create(node: &Node, name: &str) -> Connection {
    let db = node.open(name);
    db.query_row("PRAGMA journal_mode=wal", [], |_| Ok(()))
        .unwrap();
    db.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
        .unwrap();
    db
}

fn descriptors(node: &Node) -> usize {
    fs::read_dir(format!("/proc/{}/fd", node.pid()))
        .unwrap()
        .count()
}

fn inotify_watches(node: &Node) -> usize {
    let infos = fs::read_dir(format!("/proc/{}/fdinfo", node.pid())).unwrap();
    let texts = infos.filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok());
    texts.map(|text| text.matches("inotify wd:").count()).sum()
}

fn resident_mib(node: &Node) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        / 1024
}

/// Processor time that a node has used.
fn cpu(node: &Node) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", node.pid())).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[test]
fn hundreds_of_databases_on_one_node() {
    const COUNT: usize = 200;
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    let names: Vec<String> = (0..COUNT).map(|n| format!("d{n}.db")).collect();
    let open: Vec<Connection> = names
        .iter()
        .map(|name| {
            let db = create(&primary, name);
            db.execute("INSERT INTO t(v) VALUES(randomblob(1000))", [])
                .unwrap();
            db
        })
        .collect();
    let all_arrive = |primary: &Node, replica: &Node| {
        for name in &names {
            wait_for(name, || {
                primary.pos(name).is_some() && primary.pos(name) == replica.pos(name)
            });
        }
        for name in names.iter().step_by(40) {
            assert_same(primary, replica, name);
        }
    };
    all_arrive(&primary, &replica);
    for node in [&primary, &replica] {
        let (fds, mib) = (descriptors(node), resident_mib(node));
        assert!(fds < 100 + 5 * COUNT, "{fds} descriptors");
        assert!(mib < 100 + COUNT as u64 / 2, "{mib} MiB");
    }
    let watches = inotify_watches(&primary);
    assert!(watches <= 2 * COUNT + 1, "{watches} watches");

    // A writer in a hurry does not keep the others waiting.
    let in_a_hurry = primary.open("d0.db");
    std::thread::scope(|scope| {
        let burst = scope.spawn(move || {
            for _ in 0..20_000 {
                in_a_hurry
                    .execute("INSERT INTO t(v) VALUES(randomblob(100))", [])
                    .unwrap();
            }
        });
        let mut slowest = Duration::ZERO;
        while !burst.is_finished() {
            open[7]
                .execute("INSERT INTO t(v) VALUES(randomblob(100))", [])
                .unwrap();
            let at = Instant::now();
            wait_for("a commit beside a burst", || {
                primary
                    .pos("d7.db")
                    .is_some_and(|pos| Some(pos) == replica.pos("d7.db"))
            });
            slowest = slowest.max(at.elapsed());
        }
        assert!(slowest < Duration::from_secs(2), "{slowest:?}");
        burst.join().unwrap();
    });
    drop(open);
    all_arrive(&primary, &replica);

    primary.stop();
    replica.kill();
    primary.launch();
    replica.launch();
    for name in names.iter().step_by(10) {
        primary
            .open(name)
            .execute("INSERT INTO t(v) VALUES(1)", [])
            .unwrap();
    }
    all_arrive(&primary, &replica);
}

#[test]
fn idle_nodes_use_next_to_no_processor_time() {
    const COUNT: usize = 50;
    const SPAN: Duration = Duration::from_secs(5);
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let names: Vec<String> = (0..COUNT).map(|n| format!("d{n}.db")).collect();
    let open: Vec<Connection> = names.iter().map(|name| create(&primary, name)).collect();
    for name in &names {
        wait_for(name, || {
            primary.pos(name).is_some() && primary.pos(name) == replica.pos(name)
        });
    }
    for node in [&primary, &replica] {
        // What was begun ends; then two seconds of a hundred are many.
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let before = cpu(node);
            std::thread::sleep(SPAN);
            best = best.min(cpu(node) - before);
            if best <= SPAN / 50 {
                break;
            }
        }
        assert!(best <= SPAN / 50, "{best:?} of {SPAN:?}");
    }
    drop(open);
}

#[test]
fn a_large_database_comes_to_a_new_replica_beside_a_writer_and_starts_at_once() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let db = create(&primary, "large.db");
    for _ in 0..8 {
        db.execute_batch(
            "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<4000) \
             INSERT INTO t(v) SELECT randomblob(4000) FROM c",
        )
        .unwrap();
    }
    let size = fs::metadata(primary.path("large.db")).unwrap().len();
    assert!(size > 100 << 20, "{size}");
    let mut replica = Node::replica_of_port(
        dir.path(),
        "replica",
        primary.port,
        crate::harness::Options::default(),
    );
    replica.spawn();
    let mut rows = 0;
    wait_for("the replica, while its database is written", || {
        db.execute(
            "UPDATE t SET v=randomblob(4000) WHERE id=1+abs(random())%32000",
            [],
        )
        .unwrap();
        rows += 1;
        replica.log().contains(": ready ")
    });
    replica.wait_until_ready();
    eprintln!("{rows} transactions meanwhile");
    drop(db);
    wait_for("the same position", || {
        primary.pos("large.db") == replica.pos("large.db")
    });
    let sum = |node: &Node| -> (i64, String) {
        node.open("large.db")
            .query_row(
                "SELECT count(*), hex(substr(group_concat(substr(v,1,4),''),1,100000)) FROM t",
                [],
                |r| Ok((r.get(0)?, r.get(1)?)),
            )
            .unwrap()
    };
    assert_eq!(sum(&primary), sum(&replica));
    for is_killed in [false, true] {
        for node in [&mut primary, &mut replica] {
            match is_killed {
                true => node.kill(),
                false => node.stop(),
            }
            node.launch();
            let log = node.log();
            let line = log.lines().find(|l| l.contains("databases are open"));
            let ms = line.unwrap().split("elapsed_ms=").nth(1).unwrap();
            let ms: u64 = ms.split_whitespace().next().unwrap().parse().unwrap();
            assert!(ms < 1000, "killed: {is_killed}: {log}");
        }
    }
}

/// The page copy of what changed goes from its file into the WAL of the readers, not through memory.
#[test]
fn a_large_change_comes_to_a_replica_in_use_without_taking_memory() {
    if cannot_mount() {
        return;
    }
    const MIB: i64 = 300;
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = create(&primary, "a.db");
    assert_same(&primary, &replica, "a.db");
    let reader = replica.open("a.db");
    let before = resident_mib(&replica);
    db.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?1) \
         INSERT INTO t(v) SELECT zeroblob(1048000) FROM n",
        [MIB],
    )
    .unwrap();
    let mut peak = 0;
    wait_for("the change on the replica", || {
        peak = peak.max(resident_mib(&replica));
        let rows: i64 = reader
            .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
            .unwrap();
        rows >= MIB
    });
    assert!(peak < before + 150, "{before} MiB, then {peak} MiB");
    drop(reader);
    assert_same(&primary, &replica, "a.db");
}
