//! Programs that write, and remember what was acknowledged.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use std::sync::Arc;

use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode};

use super::is_interrupted;

/// How long a program waits for its turn. A failover or a handoff that takes longer fails its transaction.
const BUSY: i32 = 30_000;

/// Whether the writers are to end: those that wait for their turn hear it in SQLite's busy handler, which is a mere function.
static QUIT: AtomicBool = AtomicBool::new(false);

fn is_over() -> bool {
    QUIT.load(Ordering::Acquire) || is_interrupted()
}

/// Looks again after a millisecond. SQLite's own timeout looks ten times a second at last, and that would be measured.
fn look_again(looks: i32) -> bool {
    std::thread::sleep(Duration::from_millis(1));
    looks < BUSY && !is_over()
}

/// Numbers of rows, each used once.
#[derive(Debug, Default)]
pub(super) struct Rows {
    next: AtomicU64,
    /// Rows of which a program was told that they are there.
    pub(super) acknowledged: Mutex<Vec<i64>>,
}

impl Rows {
    pub(super) fn insert(&self, db: &Connection) -> rusqlite::Result<()> {
        let id = i64::try_from(self.next.fetch_add(1, Ordering::Relaxed)).unwrap_or(i64::MAX);
        db.prepare_cached(
            "INSERT INTO t(id, v) VALUES(?1, 'some bytes of a row, as programs have them')",
        )?
        .execute([id])?;
        self.acknowledged.lock().push(id);
        Ok(())
    }
}

/// When the cluster took writes.
#[derive(Debug)]
struct Pace {
    last: Instant,
    longest: Duration,
}

/// What all writers share.
#[derive(Debug)]
pub(super) struct Shared {
    rows: Arc<Rows>,
    pace: Mutex<Pace>,
    /// Transactions that failed.
    pub(super) failed: AtomicUsize,
    pub(super) first_failure: Mutex<Option<String>>,
    /// Transactions of each writer.
    pub(super) written: Vec<AtomicU64>,
}

impl Shared {
    /// Begins a new measurement.
    pub(super) fn reset(&self) {
        self.pace.lock().longest = Duration::ZERO;
    }

    /// The longest time without a write anywhere since then.
    pub(super) fn longest_gap(&self) -> Duration {
        self.pace.lock().longest
    }

    fn acknowledged(&self, writer: usize) {
        {
            let mut pace = self.pace.lock();
            let now = Instant::now();
            pace.longest = pace.longest.max(now - pace.last);
            pace.last = now;
        }
        self.written[writer].fetch_add(1, Ordering::AcqRel);
    }
}

/// Threads that write as fast as they may, each on a database of its own node; ended when dropped.
pub(super) struct Writers {
    pub(super) shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    pub(super) fn start(databases: Vec<Connection>, rows: &Arc<Rows>) -> rusqlite::Result<Writers> {
        QUIT.store(false, Ordering::Release);
        let shared = Arc::new(Shared {
            rows: rows.clone(),
            pace: Mutex::new(Pace {
                last: Instant::now(),
                longest: Duration::ZERO,
            }),
            failed: AtomicUsize::new(0),
            first_failure: Mutex::default(),
            written: databases.iter().map(|_| AtomicU64::new(0)).collect(),
        });
        let mut writers = Writers {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        for (i, mut db) in databases.into_iter().enumerate() {
            db.busy_handler(Some(look_again))?;
            let shared = shared.clone();
            writers
                .threads
                .push(std::thread::spawn(move || write(&db, i, &shared)));
        }
        Ok(writers)
    }

    /// Ends them.
    pub(super) fn stop(mut self) -> Arc<Shared> {
        self.end();
        self.shared.clone()
    }

    fn end(&mut self) {
        QUIT.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.shared.failed.fetch_add(1, Ordering::AcqRel);
            }
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.end();
    }
}

fn write(db: &Connection, writer: usize, shared: &Shared) {
    while !is_over() {
        match shared.rows.insert(db) {
            Ok(()) => shared.acknowledged(writer),
            // Told to stop while it waited.
            Err(error)
                if is_over() && error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {}
            Err(error) => {
                shared.failed.fetch_add(1, Ordering::AcqRel);
                shared.first_failure.lock().get_or_insert(error.to_string());
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
