//! What applications with connection pools see of changes of roles, and daemons that die in the middle of one.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, TransactionBehavior};

use crate::election::create;
use crate::harness::{Cluster, Node, Options, PATIENCE, cannot_mount, wait_for};

const POOL_SIZE: u32 = 4;
const THREADS: usize = 3;

/// What a pool needs to know, as docs/operations.md recommends it.
struct Manager {
    path: PathBuf,
    busy_timeout: Duration,
    connected: Arc<AtomicUsize>,
}

impl r2d2::ManageConnection for Manager {
    type Connection = Connection;
    type Error = rusqlite::Error;

    fn connect(&self) -> rusqlite::Result<Connection> {
        let db = Connection::open(&self.path)?;
        db.busy_timeout(self.busy_timeout)?;
        self.connected.fetch_add(1, Ordering::AcqRel);
        Ok(db)
    }

    fn is_valid(&self, db: &mut Connection) -> rusqlite::Result<()> {
        // `SELECT 1` would not look at the database.
        db.query_row("PRAGMA schema_version", [], |_| Ok(()))
    }

    fn has_broken(&self, _: &mut Connection) -> bool {
        false
    }
}

/// An application's pool on one node.
#[derive(Clone)]
struct App {
    pool: r2d2::Pool<Manager>,
    connected: Arc<AtomicUsize>,
}

impl App {
    fn on(node: &Node, busy_timeout: Duration) -> App {
        let connected = Arc::new(AtomicUsize::new(0));
        let manager = Manager {
            path: node.path("a.db"),
            busy_timeout,
            connected: connected.clone(),
        };
        let pool = r2d2::Pool::builder()
            .max_size(POOL_SIZE)
            .idle_timeout(None)
            .max_lifetime(None)
            .connection_timeout(PATIENCE)
            .build(manager)
            .unwrap();
        App { pool, connected }
    }

    fn write(&self, id: i64) -> rusqlite::Result<()> {
        let mut db = self.pool.get().unwrap();
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let before: i64 = tx.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?;
        tx.execute("INSERT INTO t VALUES(?1, randomblob(500))", [id])?;
        let after: i64 = tx.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?;
        assert_eq!(after, before + 1);
        tx.commit()
    }

    fn count(&self) -> rusqlite::Result<i64> {
        let db = self.pool.get().unwrap();
        db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
    }
}

/// Ids that were given out, and those of which a program was told that they are committed.
#[derive(Default)]
struct Ids {
    next: AtomicI64,
    committed: Mutex<BTreeSet<i64>>,
}

impl Ids {
    fn next(&self) -> i64 {
        self.next.fetch_add(1, Ordering::AcqRel) + 1
    }

    fn committed(&self, id: i64) {
        self.committed.lock().unwrap().insert(id);
    }

    fn count(&self) -> usize {
        self.committed.lock().unwrap().len()
    }

    /// What was committed and is not there, and what is there though its program got an error.
    fn compare(&self, node: &Node) -> (Vec<i64>, Vec<i64>) {
        let db = node.open("a.db");
        let mut all = db.prepare("SELECT id FROM t").unwrap();
        let there: BTreeSet<i64> = all
            .query_map([], |r| r.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let committed = self.committed.lock().unwrap();
        let missing = committed.difference(&there).copied().collect();
        (missing, there.difference(&committed).copied().collect())
    }
}

fn quorum() -> Options {
    Options {
        keys: "durability: quorum\n".into(),
        ..Options::default()
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn pools_go_on_across_handoffs_without_an_error() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(dir.path(), 3, &Options::default());
        drop(create(&cluster.nodes[cluster.primary()], "a.db", mode));
        cluster.wait_until_level("a.db");
        let apps: Vec<App> = (cluster.nodes.iter())
            .map(|node| App::on(node, PATIENCE))
            .collect();
        let (ids, stop) = (Ids::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for app in apps.iter().flat_map(|app| vec![app; THREADS]) {
                let (ids, stop) = (&ids, &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::Acquire) {
                        let id = ids.next();
                        app.write(id).unwrap();
                        ids.committed(id);
                        app.count().unwrap();
                    }
                });
            }
            let stop = StopOnDrop(&stop);
            let mut primary = cluster.primary();
            for _ in 0..6 {
                let before = ids.count();
                wait_for("writes", || ids.count() > before + 20);
                primary = (primary + 1) % 3;
                cluster.promote(primary);
            }
            drop(stop);
            // Each waits for its node's turn to end its last transaction.
            for _ in 0..3 {
                primary = (primary + 1) % 3;
                cluster.promote(primary);
                let before = std::time::Instant::now();
                wait_for("a moment to write", || {
                    before.elapsed() > Duration::from_millis(300)
                });
            }
        });
        cluster.assert_same("a.db");
        assert_eq!(ids.compare(&cluster.nodes[0]), (vec![], vec![]), "{mode}");
        for app in &apps {
            assert_eq!(app.connected.load(Ordering::Acquire), POOL_SIZE as usize);
        }
    }
}

/// Programs that open a database for each request are often the last to close it, and remove its WAL and wal-index then: a
/// node that had opened these a moment before served its readers by files that nobody could open any more.
#[test]
fn programs_that_come_and_go_find_the_database_across_handoffs() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(dir.path(), 3, &Options::default());
        drop(create(&cluster.nodes[cluster.primary()], "a.db", mode));
        cluster.wait_until_level("a.db");
        let stop = AtomicBool::new(false);
        let opened = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for (node, writes) in cluster.nodes.iter().flat_map(|n| [(n, false), (n, true)]) {
                let (stop, opened) = (&stop, &opened);
                scope.spawn(move || {
                    while !stop.load(Ordering::Acquire) {
                        let db = Connection::open(node.path("a.db")).unwrap();
                        db.busy_timeout(Duration::from_millis(500)).unwrap();
                        let done = match writes {
                            true => db.execute("INSERT INTO t(v) VALUES(1)", []).map(drop),
                            false => db.query_row("SELECT count(*) FROM t", [], |_| Ok(())),
                        };
                        match done {
                            Ok(()) => {}
                            Err(error)
                                if writes
                                    && error.sqlite_error_code()
                                        == Some(ErrorCode::DatabaseBusy) => {}
                            Err(error) => panic!("{mode}, {}: {error}", node.dir.display()),
                        }
                        opened.fetch_add(1, Ordering::AcqRel);
                    }
                });
            }
            let stop = StopOnDrop(&stop);
            let mut primary = cluster.primary();
            for _ in 0..12 {
                let before = opened.load(Ordering::Acquire);
                wait_for("programs to come and go", || {
                    opened.load(Ordering::Acquire) > before + 60
                });
                primary = (primary + 1) % 3;
                cluster.promote(primary);
            }
            drop(stop);
        });
        cluster.assert_same("a.db");
    }
}

/// What a program may be told of a node whose daemon is gone, or is not the primary.
fn is_clean(error: &rusqlite::Error) -> bool {
    use ErrorCode::{CannotOpen, DatabaseBusy, NotADatabase, SystemIoFailure};
    let code = error.sqlite_error_code();
    code.is_some_and(|c| [CannotOpen, DatabaseBusy, NotADatabase, SystemIoFailure].contains(&c))
}

const SQLALCHEMY: &str = r#"
import sys
from sqlalchemy import create_engine, event, exc, pool, text
engine = create_engine("sqlite:///" + sys.argv[1], poolclass=pool.QueuePool, pool_size=3, connect_args={"timeout": 1})

@event.listens_for(engine, "checkout")
def is_valid(connection, record, proxy):
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except Exception as e:
        raise exc.DisconnectionError() from e

for line in sys.stdin:
    try:
        with engine.begin() as c:
            if line.strip() != "count":
                c.execute(text("INSERT INTO t VALUES(:id, 'sqlalchemy')"), {"id": int(line)})
            print("ok", c.execute(text("SELECT count(*) FROM t")).scalar(), flush=True)
    except Exception as e:
        print("error", type(e).__name__, str(e).splitlines()[0], flush=True)
"#;

/// A process with a pool of SQLAlchemy's; ended when dropped.
struct SqlAlchemy {
    child: Child,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl SqlAlchemy {
    /// Says why there is none, if so.
    fn start(node: &Node) -> Option<SqlAlchemy> {
        let tools = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../tools/venv/bin/python3");
        let has = |python: &PathBuf| {
            let mut command = Command::new(python);
            command
                .args(["-c", "import sqlalchemy"])
                .stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        let Some(python) = [tools, "python3".into()].into_iter().find(has) else {
            eprintln!("skipped: no Python with sqlalchemy in target/tools/venv or $PATH");
            return None;
        };
        let mut child = Command::new(python)
            .args(["-c", SQLALCHEMY])
            .arg(node.path("a.db"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        Some(SqlAlchemy { child, answers })
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.child.stdin.as_ref().unwrap(), "{what}").unwrap();
        self.answers.next().unwrap().unwrap()
    }
}

impl Drop for SqlAlchemy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_pool_replaces_by_itself_what_a_killed_daemon_left() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Cluster::start(dir.path(), 3, &quorum());
        let killed = cluster.primary();
        drop(create(&cluster.nodes[killed], "a.db", mode));
        cluster.wait_until_level("a.db");
        let apps: Vec<App> = (cluster.nodes.iter())
            .map(|node| App::on(node, Duration::from_millis(500)))
            .collect();
        let (ids, stop) = (Ids::default(), AtomicBool::new(false));
        let mut python = SqlAlchemy::start(&cluster.nodes[killed]);
        if let Some(python) = &mut python {
            let id = ids.next();
            assert_eq!(python.ask(&id.to_string()), "ok 1");
            ids.committed(id);
        }
        std::thread::scope(|scope| {
            for app in apps.iter().flat_map(|app| vec![app; THREADS]) {
                let (ids, stop) = (&ids, &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::Acquire) {
                        let id = ids.next();
                        match app.write(id) {
                            Ok(()) => ids.committed(id),
                            Err(error) => assert!(is_clean(&error), "{error}"),
                        }
                    }
                });
            }
            let stop = StopOnDrop(&stop);
            let goes_on = || {
                let before = ids.count();
                wait_for("writes", || ids.count() > before + 20);
            };
            goes_on();
            cluster.nodes[killed].kill();
            assert_ne!(cluster.primary(), killed);
            goes_on();
            cluster.nodes[killed].launch();
            let there = i64::try_from(ids.count()).unwrap();
            wait_for("the pool to see what others wrote meanwhile", || {
                apps[killed].count().is_ok_and(|count| count >= there)
            });
            if let Some(python) = &mut python {
                wait_for("SQLAlchemy's pool to see it", || {
                    let answer = python.ask("count");
                    let count = answer.strip_prefix("ok ").and_then(|n| n.parse().ok());
                    count.is_some_and(|count: i64| count >= there)
                });
            }
            cluster.promote(killed);
            goes_on();
            drop(stop);
        });
        cluster.assert_same("a.db");
        let (missing, _in_doubt) = ids.compare(&cluster.nodes[0]);
        assert_eq!(missing, [] as [i64; 0], "{mode}");
    }
}

/// Kills a daemon at a step of a handoff: the primary's, or that of the node which is to be primary.
fn dies_in_a_handoff(step: &str, is_primary: bool, mode: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &quorum());
    let victim = cluster.others(cluster.primary())[0];
    let armed = dir.path().join("armed");
    cluster.nodes[victim].stop();
    cluster.nodes[victim].options.env = vec![
        ("LITEFS_CRASH_AT".into(), format!("{step}:1")),
        ("LITEFS_CRASH_WHEN".into(), armed.display().to_string()),
    ];
    cluster.nodes[victim].launch();
    drop(create(&cluster.nodes[cluster.primary()], "a.db", mode));
    cluster.wait_until_level("a.db");
    if is_primary {
        cluster.promote(victim);
    }
    let target = match is_primary {
        true => cluster.others(victim)[0],
        false => victim,
    };
    let (ids, stop) = (Ids::default(), AtomicBool::new(false));
    let mut victim_node = cluster.nodes.remove(victim);
    let paths: Vec<PathBuf> = (cluster.nodes.iter().chain([&victim_node]))
        .map(|node| node.path("a.db"))
        .collect();
    let asked = target;
    let target = match asked == victim {
        true => None,
        false => Some(asked - usize::from(asked > victim)),
    };
    std::thread::scope(|scope| {
        for path in &paths {
            let (ids, stop) = (&ids, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    let Ok(db) = Connection::open(path) else {
                        continue;
                    };
                    db.busy_timeout(Duration::from_millis(300)).unwrap();
                    loop {
                        let id = ids.next();
                        let sql = "INSERT INTO t VALUES(?1, randomblob(500))";
                        match db.execute(sql, [id]) {
                            Ok(_) => ids.committed(id),
                            Err(error)
                                if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {}
                            Err(_) => break,
                        }
                        if stop.load(Ordering::Acquire) {
                            return;
                        }
                    }
                }
            });
        }
        let stop = StopOnDrop(&stop);
        let goes_on = || {
            let before = ids.count();
            wait_for("writes", || ids.count() > before + 20);
        };
        goes_on();
        std::fs::write(&armed, "").unwrap();
        let node = target.map_or(&victim_node, |i| &cluster.nodes[i]);
        let _ = node.ask("POST", "/promote");
        wait_for("the daemon to die", || victim_node.has_ended());
        std::fs::remove_file(&armed).unwrap();
        goes_on();
        victim_node.options.env.clear();
        victim_node.launch();
        goes_on();
        drop(stop);
    });
    cluster.nodes.push(victim_node);
    cluster.assert_same("a.db");
    let (missing, _in_doubt) = ids.compare(&cluster.nodes[0]);
    assert_eq!(missing, [] as [i64; 0], "{step} {mode}");
}

#[test]
fn a_handoff_survives_the_death_of_either_side() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        dies_in_a_handoff("role.fence:locked", true, mode);
        dies_in_a_handoff("role.fence:captured", true, mode);
        dies_in_a_handoff("role.promote", false, mode);
    }
}

/// Passes bytes on between two ports, each some time after it came; ends with the test.
fn far_away(port: u16, to: u16, delay: Duration) {
    let listener = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let Ok(far) = std::net::TcpStream::connect(("127.0.0.1", to)) else {
                    return;
                };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    pass_on(from, to, delay);
                }
            });
        }
    });
}

fn pass_on(mut from: std::net::TcpStream, mut to: std::net::TcpStream, delay: Duration) {
    use std::io::Read;
    use std::time::Instant;
    let (sender, receiver) = std::sync::mpsc::channel::<(Instant, Vec<u8>)>();
    std::thread::spawn(move || {
        for (at, bytes) in receiver {
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
    });
    std::thread::spawn(move || {
        let mut buf = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buf) {
            if sender
                .send((Instant::now() + delay, buf[..n].to_vec()))
                .is_err()
            {
                break;
            }
        }
    });
}

/// Voters on three continents: an answer takes 160 ms, more than the default lease lets it.
#[test]
fn voters_far_away_from_each_other_elect_by_a_longer_lease() {
    if cannot_mount() {
        return;
    }
    const DELAY: Duration = Duration::from_millis(80);
    let dir = tempfile::tempdir().unwrap();
    let ports = crate::harness::free_ports(6);
    for (near, far) in ports[..3].iter().zip(&ports[3..]) {
        far_away(*near, *far, DELAY);
    }
    let start = |ttl: &str| -> Vec<Node> {
        let options = Options {
            lease_keys: format!(", ttl: {ttl}"),
            ..quorum()
        };
        let mut nodes: Vec<Node> = (0..3)
            .map(|i| {
                let at = dir.path().join(ttl);
                let mut node = Node::elector(&at, i, &ports[..3], options.clone());
                node.port = ports[3 + i];
                node
            })
            .collect();
        for node in &mut nodes {
            node.spawn();
        }
        nodes
    };
    let nodes = start("540ms");
    wait_for("a node to say why there is no election", || {
        let mut logs = nodes.iter().map(Node::log);
        logs.any(|log| log.contains("set lease.ttl on all nodes"))
    });
    drop(nodes);

    let mut nodes = start("2s");
    for node in &mut nodes {
        node.wait_until_ready();
    }
    let mut cluster = Cluster { nodes };
    wait_for("all to vote", || {
        let answer = cluster.nodes[cluster.primary()].ask("GET", "/v1/cluster");
        let answer = answer.unwrap_or_default();
        let voters = answer.split("\"voters\":").nth(1).unwrap_or_default();
        let voters = voters.split(']').next().unwrap_or_default();
        answer.contains("\"isChanging\":false") && voters.matches("\"id\"").count() == 3
    });
    let primary = cluster.primary();
    let db = create(&cluster.nodes[primary], "a.db", "wal");
    let began = std::time::Instant::now();
    db.execute("INSERT INTO t VALUES(1, 2)", []).unwrap();
    assert!(began.elapsed() > DELAY * 2, "a quorum is far away");
    cluster.nodes[primary].kill();
    drop(db);
    let next = cluster.primary();
    assert_ne!(next, primary);
    let db = cluster.nodes[next].open("a.db");
    db.busy_timeout(PATIENCE).unwrap();
    db.execute("INSERT INTO t VALUES(2, 2)", []).unwrap();
    let rows: i64 = db
        .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap();
    assert_eq!(rows, 2);
}
