//! `litefs status`, `cluster`, `handoff`, `promote` and `bench`, against real nodes.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Cluster, Node, Options, cannot_mount, free_ports, wait_for};

/// Runs the program, asking a node; what it printed, and whether it ended with 0.
fn litefs(at: &Node, words: &[&str]) -> (bool, String, String) {
    let url = format!("http://127.0.0.1:{}", at.port);
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(env!("CARGO_BIN_EXE_litefs"))
        .args(words)
        .args(["--url", &url])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.success(), text(stdout), text(stderr))
}

fn succeeds(at: &Node, words: &[&str]) -> String {
    let (is_ok, out, err) = litefs(at, words);
    assert!(is_ok, "{words:?}: {out}{err}");
    out
}

fn fails(at: &Node, words: &[&str]) -> String {
    let (is_ok, out, err) = litefs(at, words);
    assert!(!is_ok, "{words:?}: {out}");
    err
}

fn status(at: &Node) -> Value {
    serde_json::from_str(&succeeds(at, &["status", "--json"])).unwrap()
}

/// Host names and roles, sorted.
fn roles(status: &Value) -> Vec<(String, String)> {
    let nodes = status["nodes"].as_array().unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let mut roles: Vec<_> = nodes
        .iter()
        .map(|n| (text(&n["hostname"]), text(&n["role"])))
        .collect();
    roles.sort();
    roles
}

fn role_of(status: &Value, node: usize) -> String {
    let name = format!("node{node}");
    let found = roles(status).into_iter().find(|(host, _)| *host == name);
    found.map(|(_, role)| role).unwrap_or_default()
}

fn write(node: &Node, rows: usize) {
    let db = node.open("a.db");
    db.execute_batch(
        "PRAGMA journal_mode=wal; CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)",
    )
    .unwrap();
    for _ in 0..rows {
        db.execute("INSERT INTO t(v) VALUES(1)", []).unwrap();
    }
}

#[test]
fn status_shows_all_nodes_and_those_that_do_not_answer() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        lease_keys: ", region: ams".into(),
        ..Options::default()
    };
    let mut cluster = Cluster::start(dir.path(), 3, &options);
    let primary = cluster.primary();
    let others = cluster.others(primary);
    write(&cluster.nodes[primary], 3);
    cluster.wait_until_level("a.db");
    for asked in 0..3 {
        let at = &cluster.nodes[asked];
        let now = status(at);
        for node in 0..3 {
            let want = if node == primary { "primary" } else { "voter" };
            assert_eq!(role_of(&now, node), want, "asked {asked}: {now}");
        }
        assert!(now["clusterID"].as_str().unwrap().starts_with("LFSC"));
        assert!(now["epoch"].as_u64().unwrap() > 0);
        assert_eq!(now["durability"], "async");
        assert_eq!(now["nodes"][0]["region"], "ams");
        let copies = now["databases"][0]["copies"].as_array().unwrap();
        assert_eq!(copies.len(), 3);
        let pos = at.pos("a.db").unwrap();
        for copy in copies {
            assert_eq!(copy["pos"], pos.trim());
            assert_eq!((&copy["behind"], &copy["lagMs"]), (&0.into(), &0.into()));
        }
        let text = succeeds(at, &["status"]);
        assert!(text.contains("level") && text.contains("a.db"), "{text}");
    }
    let dead = others[0];
    cluster.nodes[dead].kill();
    let began = Instant::now();
    let now = status(&cluster.nodes[others[1]]);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert_eq!(role_of(&now, dead), "unreachable");
    let text = succeeds(&cluster.nodes[primary], &["cluster", "list"]);
    assert!(text.contains("unreachable voter"), "{text}");
    let error = fails(&cluster.nodes[dead], &["status"]);
    assert!(error.contains("is `litefs mount` running"), "{error}");
}

#[test]
fn status_works_with_a_fixed_primary() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    write(&primary, 2);
    wait_for("the replica to be level", || {
        primary.pos("a.db") == replica.pos("a.db")
    });
    for at in [&primary, &replica] {
        let mut now = Value::Null;
        wait_for("both to be shown as level", || {
            now = status(at);
            let copies = now["databases"][0]["copies"].as_array();
            copies
                .is_some_and(|copies| copies.len() == 2 && copies.iter().all(|c| c["behind"] == 0))
        });
        assert_eq!(now["lease"], "static");
        let mut roles: Vec<String> = roles(&now).into_iter().map(|(_, role)| role).collect();
        roles.sort();
        assert_eq!(roles, ["follower", "primary"], "{now}");
    }
    let error = fails(&replica, &["promote"]);
    assert!(error.contains("lease.type: static"), "{error}");
    let error = fails(&primary, &["cluster", "remove", "primary"]);
    assert!(error.contains("lease.type: static"), "{error}");
}

#[test]
fn the_role_is_handed_over_by_any_node() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 3, &Options::default());
    let primary = cluster.primary();
    write(&cluster.nodes[primary], 1);
    cluster.wait_until_level("a.db");
    let [to, by] = cluster.others(primary)[..] else {
        panic!("three nodes")
    };
    let name = format!("node{to}");
    let said = succeeds(&cluster.nodes[by], &["handoff", "--to", &name]);
    let before = format!("before it was node{primary} ");
    assert!(
        said.starts_with(&format!("primary is {name} "))
            && said.contains(&before)
            && said.contains(" ms"),
        "{said}"
    );
    assert_eq!(cluster.primary(), to);
    let said = succeeds(&cluster.nodes[by], &["handoff", "-to", &name]);
    assert!(said.contains("already"), "{said}");
    let said = succeeds(&cluster.nodes[by], &["promote"]);
    assert!(said.starts_with(&format!("primary is node{by} ")), "{said}");
    assert_eq!(cluster.primary(), by);
    let error = fails(&cluster.nodes[to], &["handoff", "--to", "nobody"]);
    assert!(error.contains("no node is called \"nobody\""), "{error}");
    let said = succeeds(&cluster.nodes[to], &["handoff"]);
    assert!(
        !said.starts_with(&format!("primary is node{by} ")),
        "{said}"
    );
}

#[test]
fn durability_is_set_by_any_node() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 3, &Options::default());
    let primary = cluster.primary();
    write(&cluster.nodes[primary], 1);
    cluster.wait_until_level("a.db");
    let at = &cluster.nodes[cluster.others(primary)[0]];
    succeeds(at, &["cluster", "durability", "quorum"]);
    succeeds(at, &["cluster", "durability", "async", "--db", "a.db"]);
    wait_for("both settings", || {
        let now = status(at);
        now["durability"] == "quorum" && now["databases"][0]["durability"] == "async"
    });
    succeeds(at, &["cluster", "durability", "default", "--db", "a.db"]);
    wait_for("the cluster's setting", || {
        status(at)["databases"][0]["durability"] == "quorum"
    });
    let error = fails(at, &["cluster", "durability", "maybe"]);
    assert!(error.contains("`maybe` is not a durability"), "{error}");
}

#[test]
fn the_role_goes_to_the_preferred_region_and_comes_back_to_it() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &Options::default());
    let error = fails(&cluster.nodes[0], &["cluster", "prefer", "ams"]);
    assert!(error.contains("set lease.region"), "{error}");
    // By a restart, as a user would.
    let moved = (cluster.primary() + 1) % 3;
    let node = &mut cluster.nodes[moved];
    node.stop();
    let lease = node.options.lease.take().unwrap();
    node.options.lease = Some(lease.replace("{type: raft", "{type: raft, region: ams"));
    node.launch();
    wait_for("the cluster to know the region", || {
        let (is_ok, out, _) = litefs(&cluster.nodes[0], &["cluster", "prefer", "ams"]);
        assert!(!is_ok || out.contains("region ams"), "{out}");
        is_ok
    });
    let error = fails(&cluster.nodes[0], &["cluster", "prefer", "mars"]);
    assert!(error.contains("name one of ams"), "{error}");
    wait_for("the role to move", || cluster.nodes[moved].is_primary());
    let text = succeeds(&cluster.nodes[0], &["status"]);
    assert!(text.contains("preferred region: ams"), "{text}");

    cluster.nodes[moved].kill();
    let other = cluster.primary();
    assert_ne!(other, moved);
    cluster.nodes[moved].launch();
    wait_for("the role to come back", || {
        cluster.nodes[moved].is_primary()
    });

    succeeds(&cluster.nodes[0], &["cluster", "prefer", "--none"]);
    assert_eq!(status(&cluster.nodes[0])["preferredRegion"], "");
}

#[test]
fn who_was_removed_follows_without_a_vote_until_it_is_added() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &Options::default());
    let primary = cluster.primary();
    write(&cluster.nodes[primary], 1);
    cluster.wait_until_level("a.db");
    let [removed, next] = cluster.others(primary)[..] else {
        panic!("three nodes")
    };
    let name = format!("node{removed}");
    succeeds(&cluster.nodes[next], &["cluster", "remove", &name]);
    let at = &cluster.nodes[primary];
    wait_for("it to have no vote", || {
        role_of(&status(at), removed) == "follower"
    });
    // It hears of another primary, though Raft tells it nothing any more; so it does when it starts.
    succeeds(&cluster.nodes[next], &["promote"]);
    write(&cluster.nodes[next], 2);
    cluster.wait_until_level("a.db");
    cluster.nodes[removed].stop();
    cluster.nodes[removed].launch();
    write(&cluster.nodes[next], 2);
    cluster.wait_until_level("a.db");
    wait_for("the node to say that it was removed", || {
        cluster.nodes[removed]
            .log()
            .contains("this node was removed")
    });
    assert_eq!(role_of(&status(&cluster.nodes[next]), removed), "follower");

    let url = format!("http://127.0.0.1:{}", cluster.nodes[removed].port);
    let said = succeeds(&cluster.nodes[primary], &["cluster", "add", &url]);
    assert_eq!(said, format!("{name} ({url}) is a voter\n"));
    succeeds(&cluster.nodes[removed], &["promote"]);
    cluster.assert_same("a.db");

    // The primary itself goes by handing over first.
    succeeds(&cluster.nodes[removed], &["cluster", "remove", &name]);
    let now = cluster.primary();
    assert_ne!(now, removed);
    wait_for("it to have no vote", || {
        role_of(&status(&cluster.nodes[now]), removed) == "follower"
    });
    write(&cluster.nodes[now], 2);
    cluster.assert_same("a.db");
}

#[test]
fn a_removal_that_leaves_no_majority_is_refused() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &Options::default());
    let primary = cluster.primary();
    let [dead, alive] = cluster.others(primary)[..] else {
        panic!("three nodes")
    };
    cluster.nodes[dead].kill();
    let name = |node: usize| format!("node{node}");
    for node in [alive, primary] {
        let at = &cluster.nodes[alive];
        let error = fails(at, &["cluster", "remove", &name(node)]);
        let want =
            format!("only 1 can be reached, which is no majority: no answer from node{dead}");
        assert!(error.contains(&want), "{error}");
    }
    assert_eq!(cluster.primary(), primary);
    succeeds(&cluster.nodes[alive], &["cluster", "remove", &name(dead)]);
    succeeds(&cluster.nodes[alive], &["cluster", "remove", &name(alive)]);
    let error = fails(
        &cluster.nodes[primary],
        &["cluster", "remove", &name(primary)],
    );
    assert!(error.contains("it is the only voter"), "{error}");
    write(&cluster.nodes[primary], 1);
}

/// A node that runs and finds nobody is taken in; one that has a cluster is not.
#[test]
fn a_node_is_added_unless_it_belongs_to_another_cluster() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let ports = free_ports(4);
    let start = |i: usize, peers: &[u16]| {
        let url = |port: &u16| format!("\"http://127.0.0.1:{port}\"");
        let lease = format!(
            "{{type: raft, hostname: node{i}, advertise-url: {}, peers: [{}]}}",
            url(&ports[i]),
            peers.iter().map(url).collect::<Vec<_>>().join(", ")
        );
        let options = Options::default();
        let mut node = Node::elector(dir.path(), i, &ports, options);
        node.options.lease = Some(lease);
        node.spawn();
        node
    };
    let mut ours = start(0, &[]);
    let mut theirs = start(1, &[]);
    for node in [&mut ours, &mut theirs] {
        node.wait_until_ready();
        write(node, 2);
    }
    let url = |node: &Node| format!("http://127.0.0.1:{}", node.port);
    let (a, b) = (status(&ours), status(&theirs));
    let error = fails(&ours, &["cluster", "add", &url(&theirs)]);
    for want in ["clusterID"].map(|key| [&a[key], &b[key]]).concat() {
        assert!(error.contains(want.as_str().unwrap()), "{error}");
    }
    assert!(error.contains("never merged"), "{error}");
    assert_eq!(status(&theirs)["clusterID"], b["clusterID"]);
    assert_eq!(status(&ours)["nodes"].as_array().unwrap().len(), 1);

    // Its lease.peers name a node that is not there, so it waits, and has no cluster yet.
    let fresh = start(2, &[ports[3]]);
    wait_for("the node to wait", || {
        fresh.log().contains("before a cluster is begun")
    });
    let error = fails(
        &ours,
        &["cluster", "add", &format!("http://127.0.0.1:{}", ports[3])],
    );
    assert!(
        error.contains("no node that elects its primary answers"),
        "{error}"
    );
    let said = succeeds(&ours, &["cluster", "add", &url(&fresh)]);
    assert!(said.ends_with("is a voter\n"), "{said}");
    assert_eq!(role_of(&status(&fresh), 2), "voter");
    assert_eq!(ours.pos("a.db"), fresh.pos("a.db"));
    succeeds(&fresh, &["promote"]);
}

/// What a metric says, whatever its labels.
fn metric(text: &str, name: &str) -> Option<f64> {
    let mut lines = text.lines().filter(|line| line.starts_with(name));
    lines.next()?.rsplit(' ').next()?.parse().ok()
}

#[test]
fn metrics_and_events_tell_of_elections_and_quorums() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        keys: "durability: quorum\n".into(),
        ..Options::default()
    };
    let cluster = Cluster::start(dir.path(), 3, &options);
    let primary = cluster.primary();
    write(&cluster.nodes[primary], 5);
    cluster.wait_until_level("a.db");
    let next = cluster.others(primary)[0];
    let mut events: Vec<_> = [primary, next]
        .iter()
        .map(|i| Events::of(&cluster.nodes[*i]))
        .collect();
    let metrics = |i: usize| cluster.nodes[i].ask("GET", "/metrics").unwrap();
    let before = metrics(primary);
    assert_eq!(metric(&before, "litefs_is_primary"), Some(1.0), "{before}");
    let left = metric(&before, "litefs_lease_remaining_seconds").unwrap();
    assert!(left > 0.0 && left < 1.0, "{before}");
    assert!(metric(&before, "litefs_quorum_wait_seconds_count").unwrap() >= 5.0);
    assert!(metric(&before, "litefs_quorum_wait_seconds_sum").unwrap() > 0.0);
    assert_eq!(metric(&before, "litefs_quorum_unanswered_total"), Some(0.0));
    assert_eq!(metric(&before, "litefs_commits_in_doubt"), Some(0.0));
    assert_eq!(
        metric(&before, "litefs_replica_db_lag_transactions"),
        Some(0.0)
    );
    let changes = metric(&before, "litefs_role_changes_total").unwrap();
    let epoch = metric(&before, "litefs_epoch").unwrap();

    succeeds(&cluster.nodes[next], &["promote"]);
    let after = metrics(primary);
    assert_eq!(metric(&after, "litefs_is_primary"), Some(0.0));
    assert_eq!(metric(&after, "litefs_lease_remaining_seconds"), Some(0.0));
    assert_eq!(
        metric(&after, "litefs_role_changes_total"),
        Some(changes + 1.0)
    );
    assert!(metric(&metrics(next), "litefs_epoch").unwrap() > epoch);

    let host = |i: usize| format!("node{i}");
    let is = |event: &Value, kind: &str, is_primary: bool, hostname: &str| {
        event["type"] == kind
            && event["data"]["isPrimary"] == is_primary
            && event["data"]["hostname"] == hostname
    };
    let winner = events.pop().unwrap();
    let loser = events.pop().unwrap();
    assert!(is(&loser.next(), "init", true, &host(primary)));
    assert!(is(&winner.next(), "init", false, &host(primary)));
    winner.wait_for(|event| is(event, "primaryChange", true, &host(next)));
    loser.wait_for(|event| is(event, "primaryChange", false, &host(next)));
    let again = Events::of(&cluster.nodes[primary]);
    succeeds(&cluster.nodes[primary], &["promote"]);
    again.wait_for(|event| event["type"] == "epochChange" && event["data"]["epoch"].is_u64());
}

/// What `GET /events` says, line by line.
struct Events {
    lines: std::sync::mpsc::Receiver<Value>,
}

impl Events {
    /// Subscribes; returns once the node has answered.
    fn of(node: &Node) -> Events {
        use std::io::{BufRead, BufReader, Write};
        let mut tcp = std::net::TcpStream::connect(("127.0.0.1", node.port)).unwrap();
        tcp.write_all(b"GET /events HTTP/1.1\r\nHost: node\r\n\r\n")
            .unwrap();
        let mut answer = BufReader::new(tcp);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            answer.read_line(&mut line).unwrap();
        }
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // Lengths of chunks are between the lines.
            let events = answer.lines().map_while(Result::ok);
            for event in events.filter(|line| line.starts_with('{')) {
                if sender.send(serde_json::from_str(&event).unwrap()).is_err() {
                    return;
                }
            }
        });
        Events { lines }
    }

    fn next(&self) -> Value {
        self.lines.recv_timeout(crate::harness::PATIENCE).unwrap()
    }

    fn wait_for(&self, is_it: impl Fn(&Value) -> bool) {
        while !is_it(&self.next()) {}
    }
}

fn bench(dir: &std::path::Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_litefs"));
    command
        .args(["bench", "failover", "--dir"])
        .arg(dir)
        .args(words);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn is_mounted_below(dir: &std::path::Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    mounts.contains(&dir.display().to_string())
}

#[test]
fn bench_failover_measures_and_leaves_nothing() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let words = ["--kills", "1", "--handoffs", "2", "--durability", "quorum"];
    let Output {
        status,
        stdout,
        stderr,
    } = bench(dir.path(), &words).output().unwrap();
    let text = String::from_utf8(stdout).unwrap();
    let error = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{text}{error}");
    for want in [
        "durability quorum",
        "1 kills",
        "2 handoffs",
        ", failed: 0\n",
        ", missing at the end: 0\n",
    ] {
        assert!(text.contains(want), "{want:?} in\n{text}");
    }
    let rows = text.split("acknowledged rows: ").nth(1).unwrap();
    assert!(
        rows.split(',').next().unwrap().parse::<u64>().unwrap() > 20,
        "{text}"
    );
    assert!(!is_mounted_below(dir.path()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Processes whose command line has a text.
fn processes_of(text: &str) -> usize {
    let all = std::fs::read_dir("/proc").unwrap();
    all.filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(text))
        .count()
}

#[test]
fn bench_failover_that_is_interrupted_or_killed_ends_its_nodes() {
    if cannot_mount() {
        return;
    }
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().display().to_string();
        let mut child = bench(dir.path(), &["--kills", "1000"]).spawn().unwrap();
        wait_for("nodes to run", || {
            let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
            mounts.matches(&place).count() == 3
        });
        let pid = i32::try_from(child.id()).unwrap();
        // SAFETY: the child is ours and not yet waited for.
        unsafe { libc::kill(pid, signal) };
        child.wait().unwrap();
        wait_for("nodes to end", || processes_of(&place) == 0);
        assert!(!is_mounted_below(dir.path()), "{signal}");
        if signal == libc::SIGINT {
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }
}
