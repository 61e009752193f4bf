//! Histories that lose: every transaction that was acknowledged and did not survive is found again, one by one.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use rusqlite::Connection;
use serde_json::Value;

use crate::election::create;
use crate::harness::{Cluster, Node, Options, PATIENCE, assert_same, cannot_mount, wait_for};
use crate::power::Image;

/// Runs `litefs lost` against a node.
fn lost(node: &Node, args: &[&str]) -> Output {
    let url = format!("http://127.0.0.1:{}", node.port);
    Command::new(env!("CARGO_BIN_EXE_litefs"))
        .arg("lost")
        .args(args)
        .args(["--url", &url])
        .output()
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn json(node: &Node, args: &[&str]) -> Value {
    let output = lost(node, &[args, &["--json"]].concat());
    assert!(output.status.success(), "{args:?}: {}", said(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn list(node: &Node) -> Vec<Value> {
    json(node, &["list"])["lost"].as_array().unwrap().clone()
}

fn id(entry: &Value) -> &str {
    entry["id"].as_str().unwrap()
}

/// Exports a database with the command, has SQLite check it, and returns what is in it.
fn exported(node: &Node, entry: &Value, dir: &Path) -> BTreeSet<String> {
    let path = dir.join(format!("{}-{}.db", id(entry), rand::random::<u32>()));
    let output = lost(node, &["export", id(entry), "-o", path.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    let db = Connection::open(&path).unwrap();
    let check: String = db
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .unwrap();
    assert_eq!(check, "ok");
    values(&db)
}

fn values(db: &Connection) -> BTreeSet<String> {
    let mut all = db.prepare("SELECT CAST(v AS TEXT) FROM t").unwrap();
    let all = all.query_map([], |r| r.get(0)).unwrap();
    all.map(Result::unwrap).collect()
}

fn insert(db: &Connection, value: &str) {
    db.execute("INSERT INTO t(v) VALUES(?1)", [value]).unwrap();
}

/// Requires that what `show` lists adds up to what the entry says, without a gap up to its end.
fn check_records(node: &Node, entry: &Value, lost_count: u64) -> Vec<Value> {
    let detail = json(node, &["show", id(entry)]);
    let records = detail["records"].as_array().unwrap().clone();
    let count: u64 = records.iter().map(|r| r["txCount"].as_u64().unwrap()).sum();
    assert_eq!(count, lost_count, "{detail}");
    assert_eq!(entry["lostCount"].as_u64(), Some(lost_count), "{detail}");
    assert_eq!(detail["problem"], Value::Null, "{detail}");
    let txid = |v: &Value| u64::from_str_radix(&v.as_str().unwrap()[..16], 16).unwrap();
    let mut next = txid(&entry["fork"]) + 1;
    for record in &records {
        assert_eq!(txid(&record["first"]), next, "{detail}");
        assert!(record["pages"].as_u64() > Some(0), "{detail}");
        next = txid(&record["last"]) + 1;
    }
    assert_eq!(next, txid(&entry["last"]) + 1, "{detail}");
    records
}

fn stop_daemon(node: &Node) {
    let pid = i32::try_from(node.pid()).unwrap();
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
}

fn go_on(node: &Node) {
    let pid = i32::try_from(node.pid()).unwrap();
    // SAFETY: as above.
    unsafe { libc::kill(pid, libc::SIGCONT) };
}

/// The others die under a writer, then it does; they elect one of their own.
fn killed_primary(mode: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &Options::default());
    let primary = cluster.primary();
    let db = create(&cluster.nodes[primary], "a.db", mode);
    insert(&db, "both");
    cluster.wait_until_level("a.db");
    let others = cluster.others(primary);
    for other in &others {
        cluster.nodes[*other].kill();
    }
    // As long as it holds the lease.
    db.busy_timeout(Duration::ZERO).unwrap();
    let mut acknowledged = BTreeSet::new();
    while db
        .execute(
            "INSERT INTO t(v) VALUES(?1)",
            [acknowledged.len().to_string()],
        )
        .is_ok()
    {
        acknowledged.insert(acknowledged.len().to_string());
    }
    cluster.nodes[primary].kill();
    drop(db);
    for other in &others {
        cluster.nodes[*other].spawn();
    }
    for other in &others {
        cluster.nodes[*other].wait_until_ready();
    }
    let next = cluster.primary();
    insert(&cluster.nodes[next].open("a.db"), "kept");
    cluster.nodes[primary].launch();
    cluster.assert_same("a.db");
    let survived = values(&cluster.nodes[primary].open("a.db"));
    let gone: BTreeSet<String> = acknowledged.difference(&survived).cloned().collect();
    if acknowledged.is_empty() {
        eprintln!("skipped: the lease ended before a commit");
        return;
    }
    assert_eq!(gone, acknowledged, "{mode}: the others had none of it");
    let node = &cluster.nodes[primary];
    let all = list(node);
    assert_eq!(all.len(), 1, "{all:?}\n{}", node.log());
    let entry = &all[0];
    assert_eq!(entry["database"], "a.db");
    assert_eq!(entry["reason"], "lost-election");
    assert_eq!(entry["hostname"], format!("node{primary}"));
    let records = check_records(node, entry, gone.len() as u64);
    for record in &records {
        assert_eq!(record["epoch"], entry["epoch"], "{record}");
    }
    let found = exported(node, entry, dir.path());
    assert!(found.is_superset(&gone), "{mode}: {gone:?} in {found:?}");
    assert!(!found.contains("kept"));
    for other in others {
        assert_eq!(list(&cluster.nodes[other]), Vec::<Value>::new());
    }
}

#[test]
fn commits_of_a_killed_primary_are_listed_one_by_one_and_exported() {
    if cannot_mount() {
        return;
    }
    killed_primary("wal");
}

#[test]
fn so_are_those_in_a_rollback_mode() {
    if cannot_mount() {
        return;
    }
    killed_primary("delete");
}

#[test]
fn commits_of_a_paused_primary_are_listed_exported_told_and_discarded() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 3, &Options::default());
    let primary = cluster.primary();
    let node = &cluster.nodes[primary];
    let db = create(node, "a.db", "wal");
    // A sync would wait for the daemon.
    db.pragma_update(None, "synchronous", "normal").unwrap();
    insert(&db, "both");
    cluster.wait_until_level("a.db");
    let mut events = TcpStream::connect(("127.0.0.1", node.port)).unwrap();
    events.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(events, "GET /events HTTP/1.1\r\nHost: node\r\n\r\n").unwrap();
    let mut events = BufReader::new(events);
    let mut line = String::new();
    while !line.contains("\"init\"") {
        line.clear();
        assert!(events.read_line(&mut line).unwrap() > 0);
    }
    stop_daemon(node);
    let gone: BTreeSet<String> = (0..7).map(|i| format!("lost {i}")).collect();
    for value in &gone {
        insert(&db, value);
    }
    let others = cluster.others(primary);
    let mut next = None;
    wait_for("another primary", || {
        next = others
            .iter()
            .copied()
            .find(|i| cluster.nodes[*i].is_primary());
        next.is_some()
    });
    let winner = cluster.nodes[next.unwrap()].open("a.db");
    insert(&winner, "kept");
    go_on(node);
    wait_for("the node that was paused to follow", || {
        !node.is_primary() && node.pos("a.db") == cluster.nodes[next.unwrap()].pos("a.db")
    });
    cluster.assert_same("a.db");

    let all = list(node);
    assert_eq!(all.len(), 1, "{all:?}");
    let entry = &all[0];
    check_records(node, entry, 7);
    assert!(exported(node, entry, dir.path()).is_superset(&gone));
    let line = loop {
        let mut line = String::new();
        assert!(events.read_line(&mut line).unwrap() > 0, "no event");
        if line.contains("\"type\":\"lost\"") {
            break line;
        }
    };
    assert!(
        line.contains(id(entry)) && line.contains("\"lostCount\":7"),
        "{line}"
    );
    let log = node.log();
    assert!(
        log.contains(&format!("litefs lost show {}", id(entry))),
        "{log}"
    );
    let metric = |value: u32| {
        let metrics = node.ask("GET", "/metrics").unwrap();
        metrics.contains(&format!("litefs_lost_branches{{db=\"a.db\"}} {value}"))
    };
    assert!(metric(1));

    // For people.
    let table = said(&lost(node, &["list"]));
    assert!(
        table.contains(id(entry)) && table.contains("lost election"),
        "{table}"
    );
    let text = said(&lost(node, &["show", &id(entry)[..6], "--pages"]));
    assert!(
        text.contains("7 transactions") && text.contains("pages that differ now"),
        "{text}"
    );
    let ltx = dir.path().join("ltx");
    let output = lost(
        node,
        &["export", id(entry), "--ltx", "-o", ltx.to_str().unwrap()],
    );
    assert!(output.status.success(), "{}", said(&output));
    let mut count = 0;
    for file in std::fs::read_dir(&ltx).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let header = litefs::ltx::verify(&bytes).unwrap().header;
        count += header.max_txid.0 - header.min_txid.0 + 1;
    }
    assert_eq!(count, 7);

    // What is not there, and what must be meant.
    for (args, wants) in [
        (vec!["show", "00000000deadbeef"], "litefs lost list"),
        (vec!["show", "ab"], "first four hex digits"),
        (vec!["show", "../.."], "litefs lost list"),
        (vec!["export", "00000000deadbeef"], "has no lost branch"),
        (
            vec!["discard", "00000000deadbeef", "--yes"],
            "has no lost branch",
        ),
        (vec!["discard", id(entry)], "--yes"),
    ] {
        let output = lost(node, &args);
        assert!(!output.status.success(), "{args:?}");
        assert!(said(&output).contains(wants), "{args:?}: {}", said(&output));
    }
    assert_eq!(list(node).len(), 1);
    let output = lost(node, &["discard", id(entry), "--yes"]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(list(node), Vec::<Value>::new());
    assert!(metric(0));
}

/// A node that follows by hand, and is primary by hand at times; the other is the primary.
struct Former {
    primary: Node,
    former: Node,
    round: u32,
}

impl Former {
    fn start(dir: &Path, options: Options, mode: &str, more: &str) -> Former {
        let mut former = Node::primary_with(dir, options);
        let mut primary = Node::replica(dir, "replica", &former, "");
        let db = create(&former, "a.db", mode);
        insert(&db, "both");
        db.execute_batch(more).unwrap();
        drop(db);
        assert_same(&former, &primary, "a.db");
        primary.stop();
        former.stop();
        primary.become_primary();
        primary.launch();
        former.become_replica(&primary);
        former.launch();
        assert_same(&primary, &former, "a.db");
        Former {
            primary,
            former,
            round: 0,
        }
    }

    /// Has both write as primaries; the one that is to follow then stops. Returns what it wrote.
    fn part(&mut self) -> BTreeSet<String> {
        self.round += 1;
        self.former.stop();
        self.former.become_primary();
        self.former.launch();
        let db = self.former.open("a.db");
        let wrote: BTreeSet<String> = (0..3).map(|i| format!("lost {} {i}", self.round)).collect();
        for value in &wrote {
            insert(&db, value);
        }
        drop(db);
        self.former.stop();
        insert(&self.primary.open("a.db"), &format!("kept {}", self.round));
        self.former.become_replica(&self.primary);
        wrote
    }

    fn entries(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.former.meta("a.db").join("lost"));
        let paths = entries.into_iter().flatten().map(|e| e.unwrap().path());
        paths
            .filter(|path| path.extension().is_none() && path.join("lost.json").exists())
            .collect()
    }

    /// Requires that one more entry is there, and that it has what was written.
    fn check(&self, dir: &Path, before: usize, wrote: &BTreeSet<String>, what: &str) {
        assert_same(&self.primary, &self.former, "a.db");
        let all = list(&self.former);
        assert_eq!(
            all.len(),
            before + 1,
            "{what}: {all:#?}\n{}",
            self.former.log()
        );
        for entry in &all {
            assert_eq!(entry["problem"], Value::Null, "{what}");
        }
        let entry = all.last().unwrap();
        check_records(&self.former, entry, wrote.len() as u64);
        let found = exported(&self.former, entry, dir);
        assert!(found.is_superset(wrote), "{what}: {wrote:?} in {found:?}");
    }
}

#[test]
fn a_node_killed_at_each_step_of_keeping_has_the_branch_or_the_entry() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut pair = Former::start(dir.path(), Options::default(), "wal", "");
    let steps: Vec<&str> = litefs::steps()
        .into_iter()
        .filter(|step| {
            step.starts_with("lost.keep:")
                || *step == "lost.mark:write"
                || [
                    "log.restart:remove",
                    "log.restart:rename",
                    "copy:logged",
                    "copy:written",
                ]
                .contains(step)
        })
        // Needs an entry of the same branch, which is not as whole.
        .filter(|step| *step != "lost.keep:replace")
        .collect();
    assert_eq!(steps.len(), 12, "{steps:?}");
    for (before, step) in steps.into_iter().enumerate() {
        let wrote = pair.part();
        let env = ("LITEFS_CRASH_AT".to_owned(), format!("{step}:1"));
        pair.former.options.env = vec![env];
        pair.former.spawn();
        wait_for(&format!("the daemon to die at {step}"), || {
            pair.former.has_ended()
        });
        pair.former.options.env.clear();
        let is_kept = pair.entries().len() > before;
        let is_late = step.starts_with("log.") || step.starts_with("copy:");
        assert!(is_kept || !is_late, "{step}: let go before it was kept");
        pair.former.launch();
        pair.check(dir.path(), before, &wrote, step);
        let meta = pair.former.meta("a.db").join("lost");
        let half = std::fs::read_dir(meta).unwrap();
        let half = half.filter(|e| e.as_ref().unwrap().path().extension().is_some());
        assert_eq!(half.count(), 0, "{step}: an entry in the making is left");
    }
}

#[test]
fn what_is_kept_survives_a_power_cut() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 128) else {
        return;
    };
    let options = Options {
        data: Some(image.at.join("data")),
        ..Options::default()
    };
    let mut pair = Former::start(dir.path(), options, "wal", "");
    for (before, step) in ["lost.keep:kept", "copy:logged"].into_iter().enumerate() {
        let wrote = pair.part();
        let env = ("LITEFS_CRASH_AT".to_owned(), format!("{step}:1"));
        pair.former.options.env = vec![env];
        pair.former.spawn();
        wait_for(&format!("the daemon to die at {step}"), || {
            pair.former.has_ended()
        });
        pair.former.options.env.clear();
        image.cut();
        image.come_back();
        pair.former.launch();
        pair.check(dir.path(), before, &wrote, step);
    }
    pair.former.stop();
}

#[test]
fn a_node_whose_history_lost_takes_the_pages_that_differ_and_no_others() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let more = "CREATE TABLE big(v); INSERT INTO big VALUES(zeroblob(20000000))";
        let mut pair = Former::start(dir.path(), Options::default(), mode, more);
        let wrote = pair.part();
        pair.former.launch();
        pair.check(dir.path(), 0, &wrote, mode);
        let log = pair.former.log();
        let taken = log.split("taken=").nth(1).and_then(|rest| {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<u32>().ok()
        });
        let taken = taken.unwrap_or_else(|| panic!("no page copy in\n{log}"));
        eprintln!("{mode}: {taken} of about 4900 pages were taken");
        assert!(taken > 0 && taken < 20, "{mode}: {taken} pages");
    }
}

/// The winner's one range covers the numbers of the transactions that lost, and all pages that they changed.
#[test]
fn a_range_that_spans_where_the_histories_part_hides_nothing() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut pair = Former::start(dir.path(), Options::default(), "wal", "");
    let wrote = {
        let db = pair.primary.open("a.db");
        db.pragma_update(None, "synchronous", "normal").unwrap();
        pair.former.stop();
        pair.former.become_primary();
        pair.former.launch();
        // All but the first in one range, and what it has to open is open before the daemon stops.
        insert(&db, "kept");
        stop_daemon(&pair.primary);
        for i in 0..9 {
            insert(&db, &format!("kept {i}"));
        }
        go_on(&pair.primary);
        let other = pair.former.open("a.db");
        let wrote: BTreeSet<String> = (0..3).map(|i| format!("lost {i}")).collect();
        for value in &wrote {
            insert(&other, value);
        }
        drop(other);
        pair.former.stop();
        pair.former.become_replica(&pair.primary);
        wrote
    };
    pair.former.launch();
    pair.check(dir.path(), 0, &wrote, "spanned");
}

/// A replica follows another primary, and has commits of the former one that nobody else has any more.
#[test]
fn a_replica_keeps_commits_of_a_primary_that_is_gone() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut gone = Node::primary(dir.path(), "");
    let mut next = Node::replica(dir.path(), "next", &gone, "");
    let mut third = Node::replica(dir.path(), "third", &gone, "");
    let db = create(&gone, "a.db", "wal");
    insert(&db, "both");
    assert_same(&gone, &next, "a.db");
    assert_same(&gone, &third, "a.db");
    next.stop();
    for i in 0..3 {
        insert(&db, &format!("lost {i}"));
        assert_same(&gone, &third, "a.db");
    }
    drop(db);
    gone.kill();
    third.stop();
    next.become_primary();
    next.launch();
    let db = next.open("a.db");
    for i in 0..5 {
        let before = next.pos("a.db");
        insert(&db, &format!("kept {i}"));
        wait_for("a range of its own", || next.pos("a.db") != before);
    }
    third.become_replica(&next);
    third.launch();
    assert_same(&next, &third, "a.db");
    let all = list(&third);
    assert_eq!(all.len(), 1, "{all:?}\n{}", third.log());
    check_records(&third, &all[0], 3);
    let found = exported(&third, &all[0], dir.path());
    assert!(
        (0..3).all(|i| found.contains(&format!("lost {i}"))),
        "{found:?}"
    );
}
