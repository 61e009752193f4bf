//! Whole nodes: real processes, real kernel mounts, real SQLite on both sides.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rusqlite::Connection;

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for something to become true, looking every few milliseconds.
fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Says why nodes cannot be run here, if so.
fn cannot_mount() -> bool {
    let is_root =
        fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    if !is_root || !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: mounting needs root and /dev/fuse");
        return true;
    }
    false
}

/// A running node; ended and unmounted when dropped.
struct Node {
    dir: PathBuf,
    child: Option<Child>,
    port: u16,
    extra: &'static str,
    primary: Option<u16>,
}

impl Node {
    fn primary(dir: &Path, extra: &'static str) -> Node {
        Node::start(dir.join("primary"), extra, None)
    }

    fn replica(dir: &Path, name: &str, of: &Node, extra: &'static str) -> Node {
        Node::start(dir.join(name), extra, Some(of.port))
    }

    fn start(dir: PathBuf, extra: &'static str, primary: Option<u16>) -> Node {
        fs::create_dir_all(dir.join("mnt")).unwrap();
        let mut node = Node {
            dir,
            child: None,
            port: 0,
            extra,
            primary,
        };
        node.launch();
        node
    }

    fn launch(&mut self) {
        // A restarted primary keeps its port, so that replicas find it; a first start asks the kernel.
        let (candidate, url) = match self.primary {
            None => (true, format!("http://127.0.0.1:{}", self.port.max(1))),
            Some(port) => (false, format!("http://127.0.0.1:{port}")),
        };
        let config = format!(
            "data: {{dir: {dir}/data}}\nfuse: {{dir: {dir}/mnt{extra}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n\
             lease: {{type: static, candidate: {candidate}, hostname: primary, advertise-url: \"{url}\", \
             reconnect-delay: 50ms}}\n",
            dir = self.dir.display(),
            extra = self.extra,
            port = self.port,
        );
        fs::write(self.dir.join("litefs.yml"), config).unwrap();
        let log = fs::File::create(self.dir.join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_litefs"))
            .args(["mount", "-config"])
            .arg(self.dir.join("litefs.yml"))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        wait_for(
            &format!("node at {} to be ready", self.dir.display()),
            || {
                let log = self.log();
                assert!(!log.contains("Error"), "{log}");
                log.contains(": ready ")
            },
        );
        let log = self.log();
        let at = log.find("addr=").unwrap();
        let addr = log[at + 5..].split_whitespace().next().unwrap();
        self.port = addr.rsplit(':').next().unwrap().parse().unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join("mnt").join(name)
    }

    fn open(&self, name: &str) -> Connection {
        let db = Connection::open(self.path(name)).unwrap();
        db.busy_timeout(PATIENCE).unwrap();
        db
    }

    fn pos(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(&format!("{name}-pos"))).ok()
    }

    fn signal(&mut self, signal: i32) {
        if let Some(mut child) = self.child.take() {
            let pid = i32::try_from(child.id()).unwrap();
            // SAFETY: the child is ours and not yet waited for.
            unsafe { libc::kill(pid, signal) };
            child.wait().unwrap();
        }
    }

    fn stop(&mut self) {
        self.signal(libc::SIGTERM);
    }

    fn kill(&mut self) {
        self.signal(libc::SIGKILL);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
        let _ = fuse::clean_stale_mount(&self.dir.join("mnt"));
        if std::thread::panicking() {
            eprintln!("--- log of {}\n{}", self.dir.display(), self.log());
        }
    }
}

/// Requires that a replica comes to the primary's state, by position and as SQLite sees it.
fn assert_same(primary: &Node, replica: &Node, name: &str) {
    let mut seen = String::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let pos = primary.pos(name);
        if pos.is_some() && pos == replica.pos(name) {
            let (ours, theirs) = (dump(primary, name), dump(replica, name));
            if ours == theirs && pos == primary.pos(name) {
                assert!(ours.starts_with("ok\n"), "{name}: {ours}");
                return;
            }
            seen = format!("{pos:?}\n{ours}\nreplica:\n{theirs}");
        }
        assert!(
            Instant::now() < deadline,
            "{name} does not become the same: {pos:?} {:?}\n{seen:.2000}",
            replica.pos(name)
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Writes out a database: what SQLite's check says, then every row.
fn dump(node: &Node, name: &str) -> String {
    let db = node.open(name);
    let mut text: String = db
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .unwrap();
    let mut tables = db
        .prepare("SELECT name FROM sqlite_schema WHERE type='table' ORDER BY 1")
        .unwrap();
    let tables: Vec<String> = tables
        .query_map([], |r| r.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    for table in tables {
        let mut all = db
            .prepare(&format!("SELECT * FROM \"{table}\" ORDER BY 1"))
            .unwrap();
        let columns = all.column_count();
        let mut found = all.query([]).unwrap();
        while let Some(row) = found.next().unwrap() {
            let values: Vec<String> = (0..columns)
                .map(|i| format!("{:?}", row.get_ref(i).unwrap()))
                .collect();
            text.push_str(&format!("\n{table}: {}", values.join("|")));
        }
    }
    text.push('\n');
    text
}

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
