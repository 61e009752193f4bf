//! A client: a process of its own on a node, so that one that hangs in the kernel hangs nobody else.
//!
//! For each database one thread writes and one reads, with a connection that stays open as long as it works. Each operation is
//! two lines of JSON on the standard output (`history::Event`). The end of the standard input ends the client.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode};

use crate::dice::Dice;
use crate::history::{Event, Op, Outcome, Seen, now};
use crate::workload::{self, Database, Workload};

/// How long threads have to end.
const LAST_WORDS: Duration = Duration::from_secs(20);
const REOPEN: Duration = Duration::from_millis(100);

/// What a client is told.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    pub(crate) node: usize,
    /// How often the node had a client before.
    #[arg(long)]
    pub(crate) incarnation: u64,
    #[arg(long)]
    pub(crate) dir: PathBuf,
    #[arg(long)]
    pub(crate) workload: Workload,
    #[arg(long)]
    pub(crate) seed: u64,
    /// Pause between two operations, on average.
    #[arg(long)]
    pub(crate) pace_ms: u64,
}

/// One thread.
struct Worker {
    args: Args,
    database: Database,
    process: String,
    number: u64,
    dice: Dice,
    busy: Duration,
    stop: Arc<AtomicBool>,
}

/// Has SQLite say on the standard error where it found a database damaged, and the like.
fn log_what_sqlite_says() {
    extern "C" fn say(_: *mut libc::c_void, code: libc::c_int, text: *const libc::c_char) {
        if code == rusqlite::ffi::SQLITE_CORRUPT || code == rusqlite::ffi::SQLITE_NOTADB {
            // SAFETY: SQLite gives a string that ends with a zero.
            let text = unsafe { std::ffi::CStr::from_ptr(text) };
            eprintln!("{} {code} {}", now(), text.to_string_lossy());
        }
    }
    // SAFETY: nothing of SQLite's runs yet; the arguments are those of this option.
    unsafe {
        let say: extern "C" fn(*mut libc::c_void, libc::c_int, *const libc::c_char) = say;
        let nothing = std::ptr::null_mut::<libc::c_void>();
        rusqlite::ffi::sqlite3_config(rusqlite::ffi::SQLITE_CONFIG_LOG, say, nothing);
    }
}

/// Runs until the standard input ends.
pub(crate) fn run(args: &Args) {
    log_what_sqlite_says();
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    let kinds = args
        .workload
        .databases()
        .into_iter()
        .flat_map(|db| [(db, true), (db, false)]);
    for (number, (database, writes)) in (0..).zip(kinds) {
        let seed = args.seed ^ (args.node as u64) << 40 ^ args.incarnation << 20 ^ number;
        let mut dice = Dice::new(seed);
        let mut worker = Worker {
            process: format!("n{}.{}.{number}", args.node, args.incarnation),
            args: args.clone(),
            database,
            number,
            // Some give up soon, some wait for a failover.
            busy: Duration::from_millis(dice.one(&[200, 1000, 5000]).unwrap_or(1000)),
            dice,
            stop: stop.clone(),
        };
        threads.push(std::thread::spawn(move || match writes {
            true => worker.writes(),
            false => worker.reads(),
        }));
    }
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    stop.store(true, Ordering::Release);
    let deadline = Instant::now() + LAST_WORDS;
    while !threads.iter().all(std::thread::JoinHandle::is_finished) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::process::exit(0);
}

impl Worker {
    fn writes(&mut self) {
        let mut connection = None;
        let high = ((self.args.node as u64 + 1) * 1000 + self.args.incarnation) * 100 + self.number;
        let mut id = i64::try_from(high * 1_000_000).unwrap_or(0);
        while !self.stop.load(Ordering::Acquire) {
            self.pause();
            let Some(mut db) = self.connect(connection.take()) else {
                continue;
            };
            id += 1;
            let op = Op::Write(id);
            self.say(op, None, None, None);
            match workload::write(&mut db, self.database, id, &mut self.dice) {
                Ok(()) => {
                    self.say(op, Some(Outcome::Ok), None, None);
                    connection = Some(db);
                    self.checkpoint(connection.as_ref());
                }
                Err(failure) => {
                    self.say(op, Some(failure.outcome), None, Some(&failure.error));
                    connection = keep(db, &failure.error);
                }
            }
        }
    }

    fn reads(&mut self) {
        let mut connection = None;
        while !self.stop.load(Ordering::Acquire) {
            self.pause();
            let Some(mut db) = self.connect(connection.take()) else {
                continue;
            };
            self.say(Op::Read, None, None, None);
            match workload::read(&mut db, self.database) {
                Ok(seen) => {
                    self.say(Op::Read, Some(Outcome::Ok), Some(seen), None);
                    connection = Some(db);
                }
                Err(error) => {
                    self.say(Op::Read, Some(Outcome::Fail), None, Some(&error));
                    connection = keep(db, &error);
                }
            }
        }
    }

    fn connect(&self, open: Option<Connection>) -> Option<Connection> {
        let db = open.or_else(|| workload::open(&self.args.dir, self.database, self.busy).ok());
        if db.is_none() {
            std::thread::sleep(REOPEN);
        }
        db
    }

    /// Now and then, as programs do.
    fn checkpoint(&mut self, db: Option<&Connection>) {
        let (Some(db), "wal", 0) = (db, self.database.journal, self.dice.below(150)) else {
            return;
        };
        let how = self
            .dice
            .one(&["PASSIVE", "RESTART", "TRUNCATE"])
            .unwrap_or("PASSIVE");
        // Its outcome is nothing that a client relies on.
        let _ = db.query_row(&format!("PRAGMA wal_checkpoint({how})"), [], |_| Ok(()));
    }

    fn pause(&mut self) {
        let micros = self.dice.below(2000 * self.args.pace_ms.max(1));
        std::thread::sleep(Duration::from_micros(micros));
    }

    fn say(
        &self,
        op: Op,
        outcome: Option<Outcome>,
        seen: Option<Seen>,
        error: Option<&rusqlite::Error>,
    ) {
        let event = Event {
            time: now(),
            process: self.process.clone(),
            node: self.args.node,
            db: self.database.name.to_owned(),
            op,
            outcome,
            seen,
            error: error.map(workload::show),
        };
        let line = serde_json::to_string(&event).unwrap_or_default() + "\n";
        // One write each, so that lines of threads do not mix. Nobody there to hear it: the suite has ended.
        if std::io::stdout().lock().write_all(line.as_bytes()).is_err() {
            std::process::exit(1);
        }
    }
}

/// A connection stays open over what passes; all else might be the connection's own trouble.
fn keep(db: Connection, error: &rusqlite::Error) -> Option<Connection> {
    let passes = matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DiskFull | ErrorCode::ReadOnly)
    );
    if !db.is_autocommit() && db.execute_batch("ROLLBACK").is_err() {
        return None;
    }
    passes.then_some(db)
}
