//! Nodes and programs killed at every labelled step.
//!
//! A node lives one life per step: it is launched with the step named but not yet armed, what the life before left
//! behind is checked, then the step is armed and the writers run until the daemon dies of it. `litefs::steps()` is the
//! list; a step that no life reaches must be in a list with the reason.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use crate::harness::{Node, Options, PATIENCE, assert_same, cannot_mount, wait_for};

/// One database each, by name, and how it is written.
/// How often a step is tried that was reached once.
const LIVES_FOR_A_STEP: u32 = 4;
const DATABASES: [(&str, &str); 4] = [
    (
        "wal.db",
        "PRAGMA journal_mode=wal; PRAGMA synchronous=normal",
    ),
    (
        "full.db",
        "PRAGMA journal_mode=wal; PRAGMA synchronous=full",
    ),
    (
        "delete.db",
        "PRAGMA journal_mode=delete; PRAGMA synchronous=full",
    ),
    (
        "memory.db",
        "PRAGMA journal_mode=memory; PRAGMA synchronous=normal",
    ),
];

/// Steps that only a database of a new name reaches while a node is at work.
const MAKES_NEW: [&str; 3] = ["store.make", "log.open", "checksums.load"];

/// Steps that the start after a crash reaches, and in which a second crash there matters.
const RECOVERY: [&str; 8] = [
    "capture.",
    "checksums.load",
    "commit:",
    "data_dir",
    "log.append",
    "log.open",
    "log.read",
    "recover.",
];

/// Rows that a state has at most.
const ROWS: i64 = 40;

/// How long a step may take to be reached that was reached before.
const LIFE: Duration = Duration::from_secs(5);

/// What a database holds follows from one number, so that any state can be told from none.
fn blob(n: i64) -> Vec<u8> {
    let mut x = u64::try_from(n)
        .unwrap()
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        | 1;
    let len = 100 + (x >> 40) % 1500;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.to_le_bytes()[3]
        })
        .collect()
}

/// Makes the tables, unless they are there.
fn make(db: &Connection) -> rusqlite::Result<()> {
    db.execute_batch(
        "BEGIN IMMEDIATE; \
         CREATE TABLE IF NOT EXISTS a(n); CREATE TABLE IF NOT EXISTS r(n INTEGER PRIMARY KEY, v BLOB); \
         CREATE TABLE IF NOT EXISTS b(n); \
         INSERT INTO a SELECT 0 WHERE NOT EXISTS (SELECT * FROM a); \
         INSERT INTO b SELECT 0 WHERE NOT EXISTS (SELECT * FROM b); COMMIT",
    )
}

/// Goes from state `n - 1` to state `n`.
fn advance(db: &Connection, n: i64) -> rusqlite::Result<()> {
    db.execute_batch("BEGIN IMMEDIATE")?;
    db.prepare_cached("UPDATE a SET n=?")?.execute([n])?;
    db.prepare_cached("INSERT INTO r VALUES(?,?)")?
        .execute((n, blob(n)))?;
    db.prepare_cached("DELETE FROM r WHERE n<=?")?
        .execute([n - ROWS])?;
    db.prepare_cached("UPDATE b SET n=?")?.execute([n])?;
    db.execute_batch("COMMIT")
}

/// Reads the state; panics if it is none. Nothing if the tables are not there.
fn state(db: &Connection, name: &str) -> rusqlite::Result<Option<i64>> {
    db.execute_batch("BEGIN")?;
    let read = || -> rusqlite::Result<Option<i64>> {
        let tables: i64 =
            db.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if tables == 0 {
            return Ok(None);
        }
        let a: i64 = db.query_row("SELECT n FROM a", [], |row| row.get(0))?;
        let mut found = BTreeMap::new();
        let mut rows = db.prepare_cached("SELECT n, v FROM r")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            found.insert(row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?);
        }
        let b: i64 = db.query_row("SELECT n FROM b", [], |row| row.get(0))?;
        assert_eq!(a, b, "{name}: two tables that one transaction changes");
        let wanted: BTreeMap<i64, Vec<u8>> =
            (1.max(a - ROWS + 1)..=a).map(|n| (n, blob(n))).collect();
        assert!(
            found == wanted,
            "{name}: state {a} has rows {:?}",
            found.keys()
        );
        Ok(Some(a))
    };
    let result = read();
    let _ = db.execute_batch("ROLLBACK");
    result
}

/// What the writers were told: the last state acknowledged, by database.
type Acknowledged = BTreeMap<&'static str, Option<i64>>;

/// Writers on a node, one per database, and one that makes and drops databases.
struct Load {
    stop: Arc<AtomicBool>,
    commits: Vec<Arc<AtomicU64>>,
    threads: Vec<(&'static str, JoinHandle<Ended>)>,
}

struct Ended {
    acknowledged: Option<i64>,
    error: Option<String>,
}

impl Load {
    /// `churned` is part of the names of databases that come and go; there are none if it is empty.
    fn start(node: &Node, from: &Acknowledged, churned: &str) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = Load {
            stop,
            commits: Vec::new(),
            threads: Vec::new(),
        };
        for (name, pragmas) in DATABASES {
            let (stop, commits) = (load.stop.clone(), Arc::new(AtomicU64::new(0)));
            let path = node.path(name);
            load.commits.push(commits.clone());
            let mut acknowledged = from.get(name).copied().flatten();
            let run = move || {
                let error = write(&path, pragmas, &mut acknowledged, &stop, &commits)
                    .err()
                    .map(|e| e.to_string());
                Ended {
                    acknowledged,
                    error,
                }
            };
            load.threads.push((name, std::thread::spawn(run)));
        }
        if churned.is_empty() {
            return load;
        }
        let (stop, dir, name) = (load.stop.clone(), node.path(""), churned.to_owned());
        let run = move || Ended {
            acknowledged: None,
            error: churn(&dir, &name, &stop).err(),
        };
        load.threads.push(("churn", std::thread::spawn(run)));
        load
    }

    /// Says whether every writer has made so many commits, or ended.
    fn has_made(&self, count: u64) -> bool {
        self.commits
            .iter()
            .zip(&self.threads)
            .all(|(c, (_, t))| c.load(Ordering::Relaxed) >= count || t.is_finished())
    }

    /// Ends the writers and notes what they were told. Returns their errors.
    fn end(self, acknowledged: &mut Acknowledged) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let mut errors = Vec::new();
        for (name, thread) in self.threads {
            let ended = thread.join().unwrap();
            if name != "churn" {
                acknowledged.insert(name, ended.acknowledged);
            }
            errors.extend(ended.error.map(|e| format!("{name}: {e}")));
        }
        errors
    }

    /// Lets the writers go on without their daemon for a while, where they can, and ends them.
    fn outlive(self, acknowledged: &mut Acknowledged) {
        let made: Vec<u64> = self
            .commits
            .iter()
            .map(|c| c.load(Ordering::Relaxed))
            .collect();
        wait_for("writers to go on or fail", || {
            self.commits
                .iter()
                .zip(&made)
                .zip(&self.threads)
                .all(|((c, made), (_, t))| c.load(Ordering::Relaxed) >= made + 3 || t.is_finished())
        });
        drop(self.end(acknowledged));
    }
}

/// Writes until told to stop or something fails.
fn write(
    path: &Path,
    pragmas: &str,
    acknowledged: &mut Option<i64>,
    stop: &AtomicBool,
    commits: &AtomicU64,
) -> rusqlite::Result<()> {
    let open = || {
        let db = Connection::open(path)?;
        db.busy_timeout(PATIENCE)?;
        db.execute_batch(pragmas)?;
        db.execute_batch("PRAGMA wal_autocheckpoint=20")?;
        Ok::<_, rusqlite::Error>(db)
    };
    let mut db = open()?;
    make(&db)?;
    let mut n = acknowledged.unwrap_or(0);
    *acknowledged = Some(n);
    while !stop.load(Ordering::Relaxed) {
        advance(&db, n + 1)?;
        n += 1;
        *acknowledged = Some(n);
        commits.fetch_add(1, Ordering::Relaxed);
        match n % 60 {
            20 if path.ends_with("wal.db") => {
                db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?
            }
            20 if path.ends_with("full.db") => {
                drop(db);
                db = open()?;
            }
            20 if path.ends_with("delete.db") => {
                let size = if n % 120 == 20 { 1024 } else { 4096 };
                db.execute_batch(&format!("PRAGMA page_size={size}; VACUUM"))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Makes databases and drops them, all but the first.
fn churn(dir: &Path, name: &str, stop: &AtomicBool) -> Result<(), String> {
    for i in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let path = dir.join(format!("churn-{name}-{}.db", i.min(1)));
        let db = Connection::open(&path).map_err(|e| e.to_string())?;
        db.busy_timeout(PATIENCE).map_err(|e| e.to_string())?;
        let mode = ["wal", "delete"][i % 2];
        db.execute_batch(&format!(
            "PRAGMA journal_mode={mode}; CREATE TABLE IF NOT EXISTS t(x); INSERT INTO t VALUES({i})"
        ))
        .map_err(|e| e.to_string())?;
        drop(db);
        if i > 0 {
            fs::remove_file(&path).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

/// Requires that a database is whole and at the last acknowledged state, or the one that was being committed.
fn check(node: &Node, acknowledged: &mut Acknowledged, context: &str) {
    for (name, last) in acknowledged {
        let db = node.open(name);
        let ok: String = db
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .unwrap_or_else(|e| panic!("{context}: {name}: {e}"));
        assert_eq!(ok, "ok", "{context}: {name}");
        let found = state(&db, name).unwrap_or_else(|e| panic!("{context}: {name}: {e}"));
        let may_be = [*last, Some(last.map_or(0, |n| n + 1))];
        assert!(
            may_be.contains(&found),
            "{context}: {name} is at {found:?}, acknowledged was {last:?}"
        );
        *last = found;
    }
}

/// Requires that a replica comes to the primary's states.
fn check_replica(primary: &Node, replica: &Node, acknowledged: &Acknowledged) {
    for (name, last) in acknowledged {
        if last.is_some() {
            assert_same(primary, replica, name);
        }
    }
}

const DATA_KEYS: &str =
    ", segment-size: 64KiB, retention-size: 200KB, retention-monitor-interval: 20ms";

fn small_logs() -> Options {
    Options {
        fuse_keys: std::env::var("LITEFS_TEST_FUSE_KEYS").unwrap_or_default(),
        data_keys: DATA_KEYS.into(),
        ..Options::default()
    }
}

/// How often each step was reached, by part of a node's life.
#[derive(Debug, Default)]
struct Reached {
    start: BTreeMap<String, u64>,
    work: BTreeMap<String, u64>,
    stop: BTreeMap<String, u64>,
}

/// Reads what was traced since the last call.
fn take_trace(path: &Path, seen: &mut usize) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut counts = BTreeMap::new();
    for line in text[*seen..].lines() {
        *counts.entry(line.to_owned()).or_default() += 1;
    }
    *seen = text.len();
    counts
}

/// Chooses the call of a step that is deadly, by the seed in `LITEFS_TEST_SEED`; an early one without.
struct Luck(Option<u64>);

impl Luck {
    fn new() -> Luck {
        let seed = std::env::var("LITEFS_TEST_SEED").ok();
        eprintln!("LITEFS_TEST_SEED: {seed:?}");
        Luck(seed.map(|seed| seed.parse().unwrap()))
    }

    /// Chooses one of the calls that were counted in a life.
    fn nth(&mut self, count: u64) -> u64 {
        let Some(state) = &mut self.0 else {
            return (count / 8).clamp(1, 4);
        };
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        1 + (*state >> 33) % (count / 2).clamp(1, 100)
    }
}

/// Which node of the pair is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Primary,
    Replica,
}

/// When in a life a step is armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// From the launch, after an end at a bad moment.
    Start,
    /// While writers are at work.
    Work,
    /// When the node is told to stop.
    Stop,
}

/// A primary and a replica, of which one dies again and again.
struct Pair {
    primary: Node,
    replica: Node,
    victim: Victim,
    armed: PathBuf,
    trace: PathBuf,
    acknowledged: Acknowledged,
    readers: Option<Readers>,
    life: usize,
    /// Part of the names of databases that come and go; a new name leaves a record for good.
    churned: String,
    _dir: tempfile::TempDir,
}

impl Pair {
    fn start(victim: Victim) -> Pair {
        let dir = tempfile::tempdir().unwrap();
        let primary = Node::primary_with(dir.path(), small_logs());
        let replica = Node::replica_with(dir.path(), "replica", &primary, small_logs());
        Pair {
            primary,
            replica,
            victim,
            armed: dir.path().join("armed"),
            trace: dir.path().join("trace"),
            acknowledged: Acknowledged::new(),
            readers: None,
            life: 0,
            churned: "often".into(),
            _dir: dir,
        }
    }

    fn victim(&mut self) -> &mut Node {
        match self.victim {
            Victim::Primary => &mut self.primary,
            Victim::Replica => &mut self.replica,
        }
    }

    /// Begins a life in which the `nth` call of a step is deadly once it is armed.
    fn spawn(&mut self, step: &str, nth: u64, armed: bool) {
        let _ = fs::remove_file(&self.armed);
        if armed {
            fs::write(&self.armed, "").unwrap();
        }
        let env = vec![
            ("LITEFS_CRASH_AT".into(), format!("{step}:{nth}")),
            ("LITEFS_CRASH_WHEN".into(), self.armed.display().to_string()),
        ];
        self.life += 1;
        let victim = self.victim();
        victim.options.env = env;
        victim.spawn();
    }

    fn check(&mut self, context: &str) {
        check(&self.primary, &mut self.acknowledged, context);
        check_replica(&self.primary, &self.replica, &self.acknowledged);
    }

    fn begin_reading(&mut self) {
        if self.victim == Victim::Replica {
            self.readers = Some(Readers::start(&self.replica));
        }
    }

    fn end_reading(&mut self) -> Vec<String> {
        self.readers.take().map_or_else(Vec::new, Readers::end)
    }

    /// Runs the writers until the victim dies, or so long; then stops it if it lives. Returns whether it died.
    fn work(&mut self, part: Part, limit: Duration) -> bool {
        let load = Load::start(&self.primary, &self.acknowledged, &self.churned);
        self.begin_reading();
        let deadline = Instant::now() + limit;
        let enough = |load: &Load| part == Part::Stop && load.has_made(10);
        let mut died = false;
        while !died && !enough(&load) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
            died = self.victim().has_ended();
            if !died && load.threads.iter().any(|(_, t)| t.is_finished()) {
                wait_for("a daemon to have died, for a writer failed", || {
                    self.victim().has_ended()
                });
                died = true;
            }
        }
        match self.victim {
            Victim::Primary if died => load.outlive(&mut self.acknowledged),
            _ => {
                let errors = load.end(&mut self.acknowledged);
                let by_death = self.victim == Victim::Primary && self.victim().has_ended();
                assert!(errors.is_empty() || by_death, "{errors:?}");
            }
        }
        let errors = self.end_reading();
        died |= self.victim().has_ended();
        assert!(died || errors.is_empty(), "{errors:?}");
        if !died && part == Part::Stop {
            fs::write(&self.armed, "").unwrap();
        }
        let mut child = self.victim().child.take().unwrap();
        if !died {
            // SAFETY: the child is ours and not yet waited for.
            unsafe { libc::kill(i32::try_from(child.id()).unwrap(), libc::SIGTERM) };
        }
        let status = child.wait().unwrap();
        let log = self.victim().log();
        let is_killed = status.signal() == Some(libc::SIGKILL);
        assert!(is_killed || status.success(), "{status}\n{log}");
        is_killed
    }

    /// Lives a life that is to end at a step. Returns whether it did.
    fn live(&mut self, step: &str, nth: u64, part: Part) -> bool {
        let context = format!("life {} before {step}:{nth} in {part:?}", self.life + 1);
        if part == Part::Start {
            let before = self.bad_death();
            return self.live_after(step, before, &context);
        }
        self.spawn(step, nth, false);
        self.victim().wait_until_ready();
        self.check(&context);
        if part == Part::Work {
            fs::write(&self.armed, "").unwrap();
        }
        if MAKES_NEW.iter().any(|prefix| step.starts_with(prefix)) {
            self.churned = self.life.to_string();
        }
        let died = self.work(part, LIFE);
        self.churned = "often".into();
        died
    }

    /// Returns a step at which a death leaves the next start much to do.
    fn bad_death(&self) -> &'static str {
        match self.victim {
            Victim::Primary => "capture.journal:done",
            Victim::Replica => "replica_wal.append:publish",
        }
    }

    /// Dies of one step at work, and of another in the start that follows; it may take more than one try until the
    /// start has that to do. Returns whether it died so.
    fn live_after(&mut self, step: &str, before: &str, context: &str) -> bool {
        for _ in 0..4 {
            if self.victim == Victim::Replica {
                // A clean end writes checksums down, which the log then leads on from.
                self.spawn("none", 1, false);
                self.victim().wait_until_ready();
                self.victim().stop();
            }
            self.die_at_work(before, context);
            self.spawn(step, 1, true);
            if !self.victim().wait_until_ready_or_ended() {
                self.reap();
                return true;
            }
            self.victim().stop();
        }
        false
    }

    fn die_at_work(&mut self, step: &str, context: &str) {
        self.spawn(step, 2, false);
        self.victim().wait_until_ready();
        self.check(context);
        fs::write(&self.armed, "").unwrap();
        let churned = std::mem::take(&mut self.churned);
        assert!(self.work(Part::Work, LIFE), "{step} is not reached");
        self.churned = churned;
    }

    fn reap(&mut self) {
        let status = self.victim().child.take().unwrap().wait().unwrap();
        let log = self.victim().log();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{log}");
    }

    /// Lives one life without a crash and one after a crash, to see what is reached.
    fn survey(&mut self) -> Reached {
        let mut seen = 0;
        let mut reached = Reached::default();
        self.victim().stop();
        let trace = self.trace.clone();
        let before = self.bad_death();
        self.die_at_work(before, "survey");
        self.life += 1;
        let _ = fs::remove_file(&self.armed);
        self.victim().options.env = vec![("LITEFS_STEPS_TO".into(), trace.display().to_string())];
        self.victim().launch();
        reached.start = take_trace(&trace, &mut seen);
        self.check("survey");
        seen = fs::read_to_string(&trace).unwrap().len();
        let load = Load::start(&self.primary, &self.acknowledged, "survey");
        self.begin_reading();
        // A moment in which everything is done several times that is done now and then.
        let is_replica = self.victim == Victim::Replica;
        let has = |step: &str| fs::read_to_string(&trace).unwrap()[seen..].contains(step);
        if is_replica {
            // A WAL is begun over once it is long, which takes its time on a busy machine, and only while somebody has it open.
            let held = self.replica.open("wal.db");
            assert!(state(&held, "wal.db").is_ok());
            let deadline = Instant::now() + PATIENCE;
            while !has("replica_wal.restart") && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        wait_for("some work", || {
            let is_seen = || has("readers.release") && has("replica_wal.prepare");
            load.has_made(200) && (!is_replica || is_seen())
        });
        let errors = load.end(&mut self.acknowledged);
        assert!(errors.is_empty(), "{errors:?}");
        let errors = self.end_reading();
        assert!(errors.is_empty(), "{errors:?}");
        reached.work = take_trace(&trace, &mut seen);
        self.victim().stop();
        reached.stop = take_trace(&trace, &mut seen);
        reached
    }

    /// Dies at every step that can be reached, and requires of the others to be known.
    ///
    /// `after` names steps that a start reaches after a death at another step.
    fn die_everywhere(&mut self, after: &[(&str, &str)], unreached: &[(&str, &str)]) {
        let began = Instant::now();
        let mut luck = Luck::new();
        let reached = self.survey();
        let all: BTreeSet<&str> = litefs::steps().into_iter().collect();
        let mut met: BTreeSet<String> = BTreeSet::new();
        let mut deadly: BTreeSet<String> = BTreeSet::new();
        for (part, counts) in [
            (Part::Work, &reached.work),
            (Part::Start, &reached.start),
            (Part::Stop, &reached.stop),
        ] {
            for (step, count) in counts {
                assert!(
                    all.contains(step.as_str()),
                    "{step} is not in litefs::steps()"
                );
                met.insert(step.clone());
                let matters = match part {
                    Part::Work => true,
                    Part::Start => RECOVERY.iter().any(|prefix| step.starts_with(prefix)),
                    Part::Stop => !deadly.contains(step),
                };
                if !matters {
                    continue;
                }
                let nth = match part {
                    Part::Work => luck.nth(*count),
                    Part::Start | Part::Stop => 1,
                };
                // What depends on who is idle when may take more than one life on a busy machine.
                for life in 0..LIVES_FOR_A_STEP {
                    let nth = if life == 0 { nth } else { 1 };
                    let at = Instant::now();
                    let died = self.live(step, nth, part);
                    eprintln!(
                        "{part:?} {step}:{nth} of {count}: died {died}, {:?}",
                        at.elapsed()
                    );
                    if died {
                        deadly.insert(step.clone());
                        break;
                    }
                    self.victim().stop();
                }
            }
        }
        for (step, before) in after {
            let died = self.live_after(step, before, &format!("{step} after {before}"));
            eprintln!("{step} after {before}: died {died}");
            met.insert((*step).into());
            if died {
                deadly.insert((*step).into());
            }
            assert!(died, "{step} is not reached after {before}");
        }
        self.spawn("none", 1, false);
        self.victim().wait_until_ready();
        self.check("the last life");
        eprintln!("{} lives in {:?}", self.life, began.elapsed());
        let is_rare = |step: &&String| {
            let mut reasons = unreached.iter();
            reasons.any(|(beginning, why)| step.starts_with(beginning) && why.starts_with(AT_TIMES))
        };
        let missed: Vec<&String> = met.difference(&deadly).filter(|s| !is_rare(s)).collect();
        assert!(missed.is_empty(), "reached once, but not again: {missed:?}");
        for step in all {
            let why = unreached
                .iter()
                .find(|(beginning, _)| step.starts_with(beginning));
            match why {
                Some((_, why)) if !met.contains(step) => eprintln!("not reached: {step}: {why}"),
                Some((_, why)) if why.starts_with(AT_TIMES) => {}
                Some(_) => panic!("{step} is reached, though it is said not to be"),
                None => assert!(met.contains(step), "no life reaches {step}"),
            }
        }
    }
}

/// Programs on a replica that read all the time.
struct Readers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<String>>,
}

impl Readers {
    fn start(replica: &Node) -> Readers {
        let stop = Arc::new(AtomicBool::new(false));
        let paths: Vec<(&'static str, PathBuf)> = DATABASES
            .iter()
            .map(|(name, _)| (*name, replica.path(name)))
            .collect();
        let flag = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut last: BTreeMap<&str, Option<i64>> = BTreeMap::new();
            while !flag.load(Ordering::Relaxed) {
                // One database after the other, then none, so that each is idle at times.
                for (name, path) in &paths {
                    if let Err(error) = read_for_a_while(name, path, &mut last, &flag) {
                        return vec![error];
                    }
                }
                let until = Instant::now() + Duration::from_millis(400);
                while Instant::now() < until && !flag.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            Vec::new()
        });
        Readers { stop, thread }
    }

    /// Ends them; returns their errors. What they must not see panics.
    fn end(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn read_for_a_while<'a>(
    name: &'a str,
    path: &Path,
    last: &mut BTreeMap<&'a str, Option<i64>>,
    stop: &AtomicBool,
) -> Result<(), String> {
    let explain = |e: rusqlite::Error| format!("reader of {name}: {e}");
    if !path.exists() {
        return Ok(());
    }
    let db =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(explain)?;
    db.busy_timeout(PATIENCE).map_err(explain)?;
    let until = Instant::now() + Duration::from_millis(80);
    while Instant::now() < until && !stop.load(Ordering::Relaxed) {
        let found = state(&db, name).map_err(explain)?;
        let before = last.insert(name, found).flatten();
        assert!(found >= before, "{name}: {before:?}, later {found:?}");
    }
    Ok(())
}

/// How the reason of a step begins that some lives reach.
const AT_TIMES: &str = "at times: ";

/// Steps of no life of a primary, by their beginnings, and why.
const UNREACHED_BY_PRIMARY: &[(&str, &str)] = &[
    ("apply", "a replica applies"),
    ("copy:", "a replica receives page copies"),
    (
        "log.append:cut",
        "after a failed write only; the tests of the log cut there",
    ),
    (
        "log.open:cut",
        "a torn tail needs a power cut; the tests of the log cut there",
    ),
    ("log.open:keep", "as log.open:cut"),
    (
        "log.reopen",
        "after a failed sync only; the tests of the log cut there",
    ),
    (
        "log.quarantine:rename",
        "needs a damaged log; the tests of the log cut there",
    ),
    (
        "log.rotate:remove",
        "after a failed write only; the tests of the log cut there",
    ),
    ("lost.", "needs another history; it::lost cuts there"),
    ("readers.", "a replica serves readers through a WAL of ours"),
    (
        "recover.fold:cut",
        "a WAL older than the log needs a power cut; replicas fold at each start",
    ),
    ("recover.fold:page", "as recover.fold:cut"),
    ("recover.replace:", "a replica replaces what is read"),
    ("replica_wal.", "a replica writes the WAL itself"),
];

/// Steps of no life of a replica, by their beginnings, and why.
const UNREACHED_BY_REPLICA: &[(&str, &str)] = &[
    (
        "apply.keep_aside:rename",
        "needs a local file under a replicated name",
    ),
    ("capture.", "a primary captures"),
    ("commit:", "a primary commits"),
    ("drop:record", "a primary records that a file is gone"),
    (
        "log.append:cut",
        "after a failed write only; the tests of the log cut there",
    ),
    (
        "log.open:cut",
        "a torn tail needs a power cut; the tests of the log cut there",
    ),
    ("log.open:keep", "as log.open:cut"),
    (
        "log.reopen",
        "after a failed sync only; the tests of the log cut there",
    ),
    (
        "log.quarantine:rename",
        "needs another history; the tests of the log cut there",
    ),
    ("lost.", "needs another history; it::lost cuts there"),
    (
        "log.rotate:remove",
        "after a failed write only; the tests of the log cut there",
    ),
    ("recover.journal:", "a replica has no journals"),
    (
        "replica_wal.restart",
        "at times: once a WAL is long while somebody has it open",
    ),
    (
        "replica_wal.replace:",
        "at times: when a page size changes while somebody reads; \
         a_replica_killed_while_a_page_size_changes_has_the_old_state_or_the_new cuts there",
    ),
    (
        "recover.replace:",
        "at times: as replica_wal.replace, after which it is done",
    ),
];

#[test]
fn a_primary_killed_at_every_step_keeps_what_it_acknowledged() {
    if cannot_mount() {
        return;
    }
    let after = [
        ("log.open:remove", "log.seal:remove"),
        ("log.restart:remove", "log.restart:remove"),
        ("log.restart:sync_dir", "log.restart:rename"),
        ("log.restart:rename", "log.restart:rename"),
    ];
    Pair::start(Victim::Primary).die_everywhere(&after, UNREACHED_BY_PRIMARY);
}

#[test]
fn a_replica_killed_at_every_step_becomes_the_same_and_shows_no_state_that_never_was() {
    if cannot_mount() {
        return;
    }
    let after = [
        ("log.open:remove", "log.seal:remove"),
        ("log.restart:remove", "log.restart:remove"),
        ("log.restart:rename", "log.restart:rename"),
        ("recover.heal:page", "apply:logged"),
        ("recover.heal:cut", "apply:logged"),
    ];
    Pair::start(Victim::Replica).die_everywhere(&after, UNREACHED_BY_REPLICA);
}

#[test]
fn a_replica_killed_while_a_page_size_changes_has_the_old_state_or_the_new() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = primary.open("a.db");
    db.execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES(zeroblob(100000))")
        .unwrap();
    let steps: Vec<&str> = litefs::steps()
        .into_iter()
        .filter(|step| step.starts_with("replica_wal.replace:") || *step == "copy:logged")
        .collect();
    assert_eq!(steps.len(), 4);
    for (i, step) in steps.iter().enumerate() {
        assert_same(&primary, &replica, "a.db");
        replica.stop();
        replica.options.env = vec![("LITEFS_CRASH_AT".into(), format!("{step}:1"))];
        replica.launch();
        let reader = replica.open("a.db");
        let read = || reader.query_row("PRAGMA integrity_check", [], |row| row.get::<_, String>(0));
        assert_eq!(read().unwrap(), "ok");
        let page_size = if i % 2 == 0 { 1024 } else { 8192 };
        db.execute_batch(&format!("PRAGMA page_size={page_size}; VACUUM"))
            .unwrap();
        wait_for("the replica to die", || replica.has_ended());
        // Who outlives it reads something whole, or is told that he cannot.
        match read() {
            Ok(found) => assert_eq!(found, "ok", "{step}"),
            Err(error) => eprintln!("{step}: a reader who outlives it gets {error}"),
        }
        drop(reader);
        replica.kill();
        replica.options.env = Vec::new();
        replica.launch();
        let log = replica.log();
        assert!(
            log.contains("that was being put in place is in place"),
            "{log}"
        );
        assert!(!log.contains("the primary sends a page copy"), "{log}");
        assert_same(&primary, &replica, "a.db");
        let found: u32 = replica
            .open("a.db")
            .query_row("PRAGMA page_size", [], |row| row.get(0))
            .unwrap();
        assert_eq!(found, page_size);
    }
}

#[test]
fn every_crash_point_is_in_the_list_of_steps() {
    let mut files = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(
                fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
            continue;
        }
        let is_test = path.components().any(|part| part.as_os_str() == "tests");
        if is_test || path.ends_with("disk.rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for unlisted in ["crash_point(\"", ": Step = \""] {
            assert!(
                !text.contains(unlisted),
                "{}: declare the step with disk::steps!, so that it is killed at",
                path.display()
            );
        }
    }
    let all = litefs::steps();
    let distinct: BTreeSet<_> = all.iter().collect();
    assert_eq!(all.len(), distinct.len(), "two steps of one name");
}

/// Retention removed what the written-down checksums stood at; then the WAL went on without the daemon.
#[test]
fn commits_made_without_the_daemon_reach_a_replica_as_they_are_though_no_checksums_are_known() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary_with(dir.path(), small_logs());
    let db = primary.open("a.db");
    db.execute_batch(
        "PRAGMA journal_mode=wal; PRAGMA synchronous=normal; PRAGMA wal_autocheckpoint=0",
    )
    .unwrap();
    make(&db).unwrap();
    drop(db);
    primary.stop();
    primary.launch();
    let replica = Node::replica_with(dir.path(), "replica", &primary, small_logs());
    let db = primary.open("a.db");
    db.execute_batch("PRAGMA synchronous=normal; PRAGMA wal_autocheckpoint=0")
        .unwrap();
    let mut n = 0;
    wait_for("retention to pass the first transactions", || {
        for _ in 0..20 {
            n += 1;
            advance(&db, n).unwrap();
        }
        let meta = fs::read_dir(primary.data().join("dbs"))
            .unwrap()
            .next()
            .unwrap();
        let oldest = ["ltx", "log"]
            .iter()
            .flat_map(|part| fs::read_dir(meta.as_ref().unwrap().path().join(part)).unwrap())
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .min()
            .unwrap();
        oldest.as_str() > "0000000000000010"
    });
    assert_same(&primary, &replica, "a.db");
    primary.kill();
    for _ in 0..3 {
        n += 1;
        advance(&db, n).unwrap();
    }
    drop(db);
    primary.launch();
    assert_eq!(state(&primary.open("a.db"), "a.db").unwrap(), Some(n));
    assert_same(&primary, &replica, "a.db");
    let log = replica.log();
    assert!(!log.contains("asking for a difference"), "{log}");
}

/// Records that the primary has compacted do not say of which epoch they are.
#[test]
fn a_replica_that_was_away_is_led_on_by_compacted_records() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let keys = || Options {
        data_keys: ", segment-size: 64KiB, retention-monitor-interval: 20ms".into(),
        ..Options::default()
    };
    let primary = Node::primary_with(dir.path(), keys());
    let mut replica = Node::replica_with(dir.path(), "replica", &primary, keys());
    let db = primary.open("a.db");
    db.execute_batch("PRAGMA journal_mode=wal; PRAGMA synchronous=normal")
        .unwrap();
    make(&db).unwrap();
    assert_same(&primary, &replica, "a.db");
    replica.stop();
    let sealed = || {
        let meta = fs::read_dir(primary.data().join("dbs"))
            .unwrap()
            .next()
            .unwrap();
        fs::read_dir(meta.unwrap().path().join("ltx"))
            .unwrap()
            .count()
    };
    let mut n = 0;
    wait_for("sealed files", || {
        n += 1;
        advance(&db, n).unwrap();
        sealed() >= 3
    });
    // What is in memory would be sent as it was made.
    drop(db);
    let mut primary = primary;
    primary.stop();
    primary.launch();
    replica.launch();
    assert_same(&primary, &replica, "a.db");
    let log = replica.log();
    assert!(!log.contains("cannot apply"), "{log}");
    assert!(!log.contains("page copy"), "{log}");
}

/// A program of its own, so that it can be killed: writes acknowledged states, then half of the next, and waits.
#[test]
fn program_in_the_middle_of_a_transaction() {
    let (Ok(path), Ok(mode)) = (std::env::var(PROGRAM_DB), std::env::var(PROGRAM_MODE)) else {
        return;
    };
    let db = Connection::open(path).unwrap();
    db.busy_timeout(PATIENCE).unwrap();
    db.execute_batch(&format!("PRAGMA journal_mode={mode}; PRAGMA cache_size=5"))
        .unwrap();
    make(&db).unwrap();
    let n = state(&db, "program").unwrap().unwrap();
    advance(&db, n + 1).unwrap();
    // More than the cache holds, so that pages of it reach the file or the WAL.
    db.execute_batch(
        "BEGIN IMMEDIATE; UPDATE a SET n=-1; \
         WITH RECURSIVE c(x) AS (SELECT 1000000 UNION ALL SELECT x+1 FROM c WHERE x<1000300) \
         INSERT INTO r SELECT x, randomblob(2000) FROM c; DELETE FROM r WHERE n<1000000",
    )
    .unwrap();
    println!("half done");
    let _ = std::io::stdin().read_line(&mut String::new());
    unreachable!("killed before");
}

const PROGRAM_DB: &str = "LITEFS_TEST_PROGRAM_DB";
const PROGRAM_MODE: &str = "LITEFS_TEST_PROGRAM_MODE";

/// Runs the program above until it is in the middle, and kills it.
fn die_in_the_middle(node: &Node, name: &str, mode: &str) {
    let mut program = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "crash::program_in_the_middle_of_a_transaction",
        ])
        .env(PROGRAM_DB, node.path(name))
        .env(PROGRAM_MODE, mode)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(program.stdout.take().unwrap());
    let is_there = out.lines().any(|line| line.unwrap().contains("half done"));
    program.kill().unwrap();
    let status = program.wait().unwrap();
    assert!(is_there, "the program ended: {status}");
}

#[test]
fn a_program_killed_in_a_transaction_leaves_none_of_it() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    for mode in ["wal", "delete", "truncate", "persist"] {
        let name = format!("{mode}.db");
        let mut expected = 0;
        for round in [
            "another program",
            "daemon killed",
            "daemon stopped",
            "same again",
        ] {
            let context = format!("{mode}, {round}");
            die_in_the_middle(&primary, &name, mode);
            expected += 1;
            if mode != "wal" {
                let journal = fs::metadata(primary.path(&format!("{name}-journal"))).unwrap();
                assert!(journal.len() > 0, "{context}: no hot journal");
            }
            match round {
                "daemon killed" => {
                    primary.kill();
                    primary.launch();
                }
                "daemon stopped" => {
                    primary.stop();
                    primary.launch();
                }
                _ => {}
            }
            if round != "same again" {
                let db = primary.open(&name);
                let found = state(&db, &name).unwrap();
                assert_eq!(found, Some(expected), "{context}");
                db.query_row(&format!("PRAGMA journal_mode={mode}"), [], |_| Ok(()))
                    .unwrap();
                assert_same(&primary, &replica, &name);
                advance(&db, expected + 1).unwrap();
                expected += 1;
            }
            // Its own open is what rolls back in the last round.
            assert_same(&primary, &replica, &name);
            let seen = state(&replica.open(&name), &name).unwrap();
            assert_eq!(seen, Some(expected), "{context}: replica");
        }
    }
}
