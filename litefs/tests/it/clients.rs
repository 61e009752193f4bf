//! Real programs as clients, several at once.
//!
//! The sqlite3 shell, Python and Rust write on the primary and read on the replica, each as a process of its own. A
//! transaction moves an amount between two tables, so that a reader who sees half of one sees another sum. Readers have no
//! busy timeout: nothing may be in their way.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rusqlite::{Connection, OpenFlags};

use crate::find_program;
use crate::harness::{Node, PATIENCE, assert_same, assert_same_pages, cannot_mount, wait_for};

const SCHEMA: &str = "CREATE TABLE a(id INTEGER PRIMARY KEY, n INT); CREATE TABLE b(id INTEGER PRIMARY KEY, n INT); \
     CREATE TABLE log(id INTEGER PRIMARY KEY, who TEXT, v BLOB); \
     INSERT INTO a(n) VALUES(100),(200),(300); INSERT INTO b(n) VALUES(150),(250);";
const SUM: &str = "SELECT (SELECT sum(n) FROM a) + (SELECT sum(n) FROM b)";
const EXPECTED: i64 = 1000;
/// Transactions of each writer.
const ROUNDS: usize = 60;

/// Statements of one transaction.
fn transfer(who: &str, i: usize) -> String {
    format!(
        "BEGIN IMMEDIATE; UPDATE a SET n=n+{i} WHERE id={}; INSERT INTO log(who,v) VALUES('{who}',randomblob(3000)); \
         UPDATE b SET n=n-{i} WHERE id={}; DELETE FROM log WHERE id%7=3 AND id<{i}; COMMIT;",
        i % 3 + 1,
        i % 2 + 1
    )
}

const PYTHON_WRITER: &str = r#"
import sqlite3, sys, os
path, rounds = sys.argv[1], int(sys.argv[2])
db = sqlite3.connect(path, timeout=30, isolation_level=None)
for i in range(rounds):
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE a SET n=n-? WHERE id=?", (i, i % 3 + 1))
    db.execute("INSERT INTO log(who,v) VALUES('python',?)", (os.urandom(2000),))
    db.execute("UPDATE b SET n=n+? WHERE id=?", (i, i % 2 + 1))
    db.execute("ROLLBACK" if i % 10 == 9 else "COMMIT")
"#;

const PYTHON_READER: &str = r#"
import sqlite3, sys, os
path, stop, expected = sys.argv[1], sys.argv[2], int(sys.argv[3])
db = sqlite3.connect(path, timeout=0, isolation_level=None)
rounds = 0
while rounds == 0 or not os.path.exists(stop):
    db.execute("BEGIN")
    a = db.execute("SELECT sum(n) FROM a").fetchone()[0]
    rows = db.execute("SELECT count(*), sum(length(v)) FROM log").fetchone()
    b = db.execute("SELECT sum(n) FROM b").fetchone()[0]
    assert a + b == expected, (a, b)
    assert rows == db.execute("SELECT count(*), sum(length(v)) FROM log").fetchone()
    db.execute("COMMIT")
    if rounds % 20 == 0:
        assert db.execute("PRAGMA quick_check").fetchone()[0] == "ok"
        db.close()
        db = sqlite3.connect(path, timeout=0, isolation_level=None)
    rounds += 1
"#;

/// Holds a transaction that was spilled to the file, and dies of a signal.
const PYTHON_CRASH: &str = r#"
import sqlite3, sys, os, signal
db = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
db.execute("PRAGMA cache_size=5")
db.execute("BEGIN IMMEDIATE")
for i in range(int(sys.argv[2])):
    db.execute("INSERT INTO log(who,v) VALUES('crash',?)", (os.urandom(2000),))
    db.execute("UPDATE a SET n=n+1000")
os.kill(os.getpid(), signal.SIGKILL)
"#;

/// A program that reads until `stop` exists.
const SHELL_READER: &str = r#"
while :; do
    out=$(printf '%s;\n' "$3" "BEGIN" "$3" "$3" "COMMIT" | "$1" -bail "$2" 2>&1) || { echo "$out" >&2; exit 1; }
    [ "$out" = "$4
$4
$4" ] || { echo "sum: $out" >&2; exit 1; }
    [ -e "$5" ] && exit 0
done
"#;

/// What the test program does when it is started as a client.
#[test]
fn rust_client() {
    let Ok(args) = std::env::var("LITEFS_TEST_CLIENT") else {
        return;
    };
    let [what, path, stop] = args.split('\n').collect::<Vec<_>>()[..] else {
        panic!("{args}");
    };
    match what {
        "write" => {
            let db = Connection::open(path).unwrap();
            db.busy_timeout(PATIENCE).unwrap();
            for i in 0..ROUNDS {
                db.execute_batch(&transfer("rust", i)).unwrap();
            }
        }
        _ => {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
            let db = Connection::open_with_flags(path, flags).unwrap();
            db.busy_timeout(std::time::Duration::ZERO).unwrap();
            loop {
                let sum: i64 = db.query_row(SUM, [], |r| r.get(0)).unwrap();
                assert_eq!(sum, EXPECTED);
                if Path::new(stop).exists() {
                    break;
                }
            }
        }
    }
}

/// The programs to be had here.
struct Programs {
    shell: Option<std::path::PathBuf>,
    python: Option<std::path::PathBuf>,
}

impl Programs {
    fn find() -> Programs {
        Programs {
            shell: find_program("sqlite3", "SQLITE3"),
            python: find_program("python3", "PYTHON3"),
        }
    }

    fn writers(&self, path: &Path) -> Vec<Process> {
        let mut all = vec![Process::rust("write", path, Path::new(""))];
        if let Some(shell) = &self.shell {
            let mut command = Command::new(shell);
            command.args(["-bail", "-cmd", ".timeout 30000"]).arg(path);
            let input: String = (0..ROUNDS).map(|i| transfer("shell", i)).collect();
            all.push(Process::start("shell writer", command, &input));
        }
        if let Some(python) = &self.python {
            let mut command = Command::new(python);
            command.args(["-c", PYTHON_WRITER]).arg(path);
            command.arg(ROUNDS.to_string());
            all.push(Process::start("python writer", command, ""));
        }
        all
    }

    fn readers(&self, path: &Path, stop: &Path) -> Vec<Process> {
        let mut all = vec![Process::rust("read", path, stop)];
        if let Some(shell) = &self.shell {
            let mut command = Command::new("bash");
            command.args(["-c", SHELL_READER, "reader"]).arg(shell);
            command
                .arg(path)
                .args([SUM, &EXPECTED.to_string()])
                .arg(stop);
            all.push(Process::start("shell reader", command, ""));
        }
        if let Some(python) = &self.python {
            let mut command = Command::new(python);
            command.args(["-c", PYTHON_READER]).args([path, stop]);
            command.arg(EXPECTED.to_string());
            all.push(Process::start("python reader", command, ""));
        }
        all
    }
}

/// A client; killed if it was not waited for.
struct Process {
    what: String,
    child: Option<Child>,
}

impl Process {
    fn start(what: &str, mut command: Command, input: &str) -> Process {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        // Ends with the client, at the latest.
        std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        Process {
            what: what.into(),
            child: Some(child),
        }
    }

    fn rust(what: &str, path: &Path, stop: &Path) -> Process {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "clients::rust_client", "--nocapture"]);
        let args = format!("{what}\n{}\n{}", path.display(), stop.display());
        command.env("LITEFS_TEST_CLIENT", args);
        Process::start(&format!("rust {what}"), command, "")
    }

    fn is_running(&mut self) -> bool {
        let child = self.child.as_mut().unwrap();
        child.try_wait().unwrap().is_none()
    }

    /// Waits for the end, which must be a good one, and silent.
    fn succeed(mut self) {
        wait_for(&format!("{} to end", self.what), || !self.is_running());
        let output = self.child.take().unwrap().wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{}: {} {} {stderr}",
            self.what,
            output.status,
            String::from_utf8_lossy(&output.stdout)
        );
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn shell_python_and_rust_write_and_read_at_once() {
    together("");
}

#[test]
fn shell_python_and_rust_write_and_read_at_once_without_passthrough() {
    together(", passthrough: \"off\"");
}

fn together(fuse_keys: &str) {
    if cannot_mount() {
        return;
    }
    let programs = Programs::find();
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), fuse_keys);
    let replica = Node::replica(dir.path(), "replica", &primary, fuse_keys);
    for mode in ["wal", "delete"] {
        let name = format!("{mode}.db");
        let stop = dir.path().join(format!("stop-{mode}"));
        let mut db = primary.open(&name);
        let got: String = db
            .query_row(&format!("PRAGMA journal_mode={mode}"), [], |r| r.get(0))
            .unwrap();
        assert_eq!(got, mode);
        db.execute_batch(&format!("BEGIN; {SCHEMA} COMMIT"))
            .unwrap();
        assert_same(&primary, &replica, &name);
        let mut readers = programs.readers(&replica.path(&name), &stop);
        let writers = programs.writers(&primary.path(&name));
        let count = writers.len();
        for writer in writers {
            writer.succeed();
        }
        for reader in &mut readers {
            // One that failed ended early.
            if !reader.is_running() {
                readers.remove(0).succeed();
                panic!("a reader ended by itself");
            }
        }
        assert_same_pages(&primary, &mut db, &replica, &name);
        fs::write(&stop, "").unwrap();
        for reader in readers {
            reader.succeed();
        }
        assert_same(&primary, &replica, &name);
        for (who, wanted) in [("rust", 1), ("shell", 2), ("python", 3)] {
            let rows: i64 = db
                .query_row("SELECT count(*) FROM log WHERE who=?", [who], |r| r.get(0))
                .unwrap();
            assert!(rows > 0 || wanted > count, "{who} wrote nothing");
        }
    }
}

#[test]
fn a_client_that_dies_in_a_transaction_leaves_nothing() {
    if cannot_mount() {
        return;
    }
    let Some(python) = Programs::find().python else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    for mode in ["wal", "delete", "truncate", "persist"] {
        let name = format!("{mode}.db");
        let stop = dir.path().join(format!("stop-{mode}"));
        let mut db = primary.open(&name);
        db.query_row(&format!("PRAGMA journal_mode={mode}"), [], |_| Ok(()))
            .unwrap();
        db.execute_batch(&format!("BEGIN; {SCHEMA} COMMIT"))
            .unwrap();
        let before = assert_same_pages(&primary, &mut db, &replica, &name);
        let reader = Process::rust("read", &replica.path(&name), &stop);
        // Before anything is written, and after much was spilled.
        for rows in ["0", "300"] {
            let status = Command::new(&python)
                .args(["-c", PYTHON_CRASH])
                .arg(primary.path(&name))
                .arg(rows)
                .status()
                .unwrap();
            assert!(!status.success());
            let sum: i64 = db.query_row(SUM, [], |r| r.get(0)).unwrap();
            assert_eq!(sum, EXPECTED, "{mode}");
            let after = assert_same_pages(&primary, &mut db, &replica, &name);
            assert_eq!(after, before, "{mode}: {rows} rows, none committed");
        }
        db.execute_batch(&transfer("rust", 1)).unwrap();
        let after = assert_same_pages(&primary, &mut db, &replica, &name);
        assert_ne!(after, before, "{mode}");
        fs::write(&stop, "").unwrap();
        reader.succeed();
    }
}

#[test]
fn the_position_read_after_a_commit_is_that_of_the_commit() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    for mode in ["wal", "delete", "truncate", "persist"] {
        let name = format!("{mode}.db");
        let db = primary.open(&name);
        db.query_row(&format!("PRAGMA journal_mode={mode}"), [], |_| Ok(()))
            .unwrap();
        db.execute_batch("CREATE TABLE t(x)").unwrap();
        let txid = || {
            let pos = fs::read_to_string(primary.path(&format!("{name}-pos")));
            let pos = pos.unwrap_or_else(|e| panic!("{name}: {e}"));
            u64::from_str_radix(&pos[..16], 16).unwrap()
        };
        let begin = txid();
        for n in 1..=200 {
            db.execute("INSERT INTO t VALUES(1)", []).unwrap();
            assert_eq!(txid(), begin + n, "{mode}");
        }
    }
}

#[test]
fn a_database_made_again_beside_what_a_killed_program_left() {
    made_again("");
}

#[test]
fn a_database_made_again_beside_what_a_killed_program_left_without_passthrough() {
    made_again(", passthrough: \"off\"");
}

/// The WAL-index of the former database is as long as a fresh one, and the kernel may have kept its pages.
fn made_again(fuse_keys: &str) {
    if cannot_mount() {
        return;
    }
    let Some(sqlite3) = find_program("sqlite3", "SQLITE3") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), fuse_keys);
    let replica = Node::replica(dir.path(), "replica", &primary, fuse_keys);
    let mut program = Command::new(sqlite3)
        .arg(primary.path("a.db"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = program.stdin.take().unwrap();
    writeln!(stdin, "PRAGMA journal_mode=wal; {SCHEMA} SELECT 'done';").unwrap();
    let mut lines = BufReader::new(program.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "done"));
    program.kill().unwrap();
    program.wait().unwrap();
    fs::remove_file(primary.path("a.db")).unwrap();
    fs::remove_file(primary.path("a.db-wal")).unwrap();
    assert!(primary.path("a.db-shm").exists());
    let mut db = primary.open("a.db");
    let mode: String = db
        .query_row("PRAGMA journal_mode=wal", [], |row| row.get(0))
        .unwrap();
    assert_eq!(mode, "wal");
    db.execute_batch("CREATE TABLE other(x); INSERT INTO other VALUES(1)")
        .unwrap();
    assert_same_pages(&primary, &mut db, &replica, "a.db");
}
