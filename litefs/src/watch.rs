//! Wakes the capture on a primary: inotify marks on the files tell of writes that the kernel serves.
//!
//! ```text
//! armed ──(first write; the mark is gone with it)──▶ looking ──(nothing new at two looks)──▶ armed
//!                                                   ▲        │
//!                                                   └─(more)─┘ every WAL_POLL
//! ```
//!
//! A mark is good for one event, so a program that writes without a pause pays for none; meanwhile the database is
//! looked at from time to time. An event is a hint: it makes a database due, and capturing decides what there is.

use std::collections::{BTreeSet, HashMap};
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use parking_lot::{Condvar, Mutex};

use crate::db::paths::with_suffix;
use crate::db::{Db, DbError, NodeContext, Scanned};
use crate::sqlite::locks::{LockKind, OfdLocks, db as db_lock};
use crate::store::{Store, chain, is_database};

/// How long a first commit is let finish, from the first write of its frames.
const WAL_GATHER: Duration = Duration::from_micros(100);
/// How often a database is looked at while it is written.
const WAL_POLL: Duration = Duration::from_millis(1);
/// A look that finds more than this many bytes per [`WAL_POLL`] to write waits longer, for the longer a range, the fewer
/// versions of a page there are to write; but not longer than [`WAL_POLL_MAX`].
const BYTES_PER_POLL: u64 = 32 << 10;
const WAL_POLL_MAX: Duration = Duration::from_millis(10);
/// How long writes to a database file are let settle before it is looked at.
const FILE_SETTLE: Duration = Duration::from_millis(5);
/// How often a database is looked at whose commits come through its journal, where they are captured at once.
const HOOKED_POLL: Duration = Duration::from_millis(50);
/// How long to wait for a transaction that is under way, at first and at most.
/// How long a database in `journal_mode` MEMORY or OFF may be written without a pause long enough to read it, before its
/// programs are held off by a SHARED lock; one without a busy timeout then gets SQLITE_BUSY.
const HOLD_AFTER: Duration = Duration::from_secs(10);
const BUSY_WAIT: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// How long to wait at first for a commit whose frames are in the WAL.
const UNPUBLISHED_WAIT: Duration = Duration::from_micros(200);
const WORKERS: usize = 2;

/// What is to be looked at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Look {
    /// The WAL of a database grew.
    Wal(PathBuf),
    /// A file was written that is a database in a rollback mode, or may have become one.
    File(PathBuf),
    /// A directory has come by renaming.
    Tree(PathBuf),
}

/// Watches files and runs the captures that their events ask for.
pub struct Watcher {
    node: Arc<NodeContext>,
    marks: Mutex<Marks>,
    queue: Mutex<Queue>,
    due: Condvar,
    stop: AtomicBool,
}

/// What the kernel was asked to tell of, once each.
#[derive(Default)]
struct Marks {
    watches: Option<Watches>,
    by_watch: HashMap<WatchDescriptor, Look>,
    by_look: HashMap<Look, WatchDescriptor>,
}

#[derive(Debug, Default)]
struct Queue {
    by_time: BTreeSet<(Instant, Look)>,
    times: HashMap<Look, Instant>,
    /// Those that could not be captured: how long the last wait was, and since when.
    busy: HashMap<Look, (Duration, Instant)>,
    /// What had been captured of databases at the end of the last look, in bytes.
    seen: HashMap<Look, u64>,
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watcher")
    }
}

/// The threads of a watcher; end them with [`Running::stop`].
#[derive(Debug)]
pub struct Running {
    watcher: Arc<Watcher>,
    threads: Vec<JoinHandle<()>>,
}

impl Watcher {
    /// Makes a watcher that watches nothing yet.
    #[must_use]
    pub fn new(node: Arc<NodeContext>) -> Arc<Watcher> {
        Arc::new(Watcher {
            node,
            marks: Mutex::default(),
            queue: Mutex::default(),
            due: Condvar::new(),
            stop: AtomicBool::new(false),
        })
    }

    /// Starts watching and capturing.
    ///
    /// # Errors
    /// When inotify is not to be had.
    pub fn start(self: &Arc<Self>, store: Arc<Store>) -> std::io::Result<Running> {
        let inotify = Inotify::init()?;
        self.marks.lock().watches = Some(inotify.watches());
        for db in store.all() {
            self.written_at(&db.paths().relative);
        }
        let mut threads = Vec::new();
        let watcher = self.clone();
        threads.push(
            std::thread::Builder::new()
                .name("watch".into())
                .spawn(move || watcher.read_events(inotify))?,
        );
        for i in 0..WORKERS {
            let (watcher, store) = (self.clone(), store.clone());
            let run = move || watcher.work(&store);
            threads.push(
                std::thread::Builder::new()
                    .name(format!("capture-{i}"))
                    .spawn(run)?,
            );
        }
        Ok(Running {
            watcher: self.clone(),
            threads,
        })
    }

    /// Makes sure that writes to a database and to its WAL are noticed.
    pub fn written_at(&self, main: &Path) {
        self.arm(&Look::Wal(main.to_owned()), false);
        self.arm(&Look::File(main.to_owned()), false);
    }

    /// Makes sure that the next write to a file is noticed, which may be a database or become one. `is_new` says that
    /// it is another file now.
    pub fn file_opened(&self, path: &Path, is_new: bool) {
        self.arm(&Look::File(path.to_owned()), is_new);
    }

    /// Makes sure that the next write to the WAL of a database is noticed; `is_new` says that it is another file now.
    pub fn wal_opened(&self, main: &Path, is_new: bool) {
        self.arm(&Look::Wal(main.to_owned()), is_new);
    }

    /// Asks the kernel to tell of the next write, unless it was asked already. Returns whether it is asked only now.
    fn arm(&self, look: &Look, is_new_file: bool) -> bool {
        let path = match look {
            Look::Wal(main) => with_suffix(&self.node.files.join(main), "-wal"),
            Look::File(path) => self.node.files.join(path),
            Look::Tree(_) => return false,
        };
        let mut marks = self.marks.lock();
        if !is_new_file && marks.by_look.contains_key(look) {
            return false;
        }
        let Some(watches) = &mut marks.watches else {
            return false;
        };
        match watches.add(&path, WatchMask::MODIFY | WatchMask::ONESHOT) {
            Ok(watch) => {
                if let Some(old) = marks.by_watch.insert(watch.clone(), look.clone())
                    && old != *look
                {
                    marks.by_look.remove(&old);
                }
                marks.by_look.insert(look.clone(), watch);
                true
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => {
                drop(marks);
                tracing::error!(
                    file = %path.display(), %error,
                    "cannot watch a file, it is looked at every second; raise fs.inotify.max_user_watches"
                );
                self.ask(look.clone(), BUSY_WAIT.1);
                false
            }
        }
    }

    /// Asks for a look at a file that was written or has changed its name.
    pub fn look_at(&self, relative: &Path) {
        self.ask(Look::File(relative.to_owned()), FILE_SETTLE);
    }

    /// Asks for a look at whatever is at or below a path.
    pub fn look_below(&self, relative: &Path) {
        self.ask(Look::Tree(relative.to_owned()), Duration::ZERO);
    }

    /// Asks for a look; one asked for earlier stands if it is due sooner.
    fn ask(&self, look: Look, after: Duration) {
        let at = Instant::now() + after;
        let mut queue = self.queue.lock();
        if let Some(asked) = queue.times.get(&look).copied() {
            if asked <= at {
                return;
            }
            queue.by_time.remove(&(asked, look.clone()));
        }
        queue.times.insert(look.clone(), at);
        queue.by_time.insert((at, look));
        self.due.notify_one();
    }

    /// Asks for a look at a WAL that grew; none is due sooner than one asked for while it grows on.
    pub fn wal_grew(&self, main: PathBuf) {
        let look = Look::Wal(main);
        let is_looked_at = {
            let queue = self.queue.lock();
            queue.times.contains_key(&look) && !queue.busy.contains_key(&look)
        };
        if !is_looked_at {
            self.ask(look, WAL_GATHER);
        }
    }

    fn read_events(&self, mut inotify: Inotify) {
        let mut buffer = vec![0; 64 * 1024];
        while !self.stop.load(Ordering::Acquire) {
            let mut fds = [rustix::event::PollFd::new(
                &inotify,
                rustix::event::PollFlags::IN,
            )];
            // Wakes up now and then to see `stop`; nothing is due by this timeout.
            let wait = rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: 200_000_000,
            };
            match rustix::event::poll(&mut fds, Some(&wait)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "inotify poll");
                    return;
                }
            }
            let events: Vec<(WatchDescriptor, EventMask)> = match inotify.read_events(&mut buffer) {
                Ok(events) => events.map(|e| (e.wd, e.mask)).collect(),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => {
                    tracing::error!(%error, "inotify read");
                    return;
                }
            };
            for (watch, mask) in events {
                self.event(&watch, mask);
            }
        }
    }

    fn event(&self, watch: &WatchDescriptor, mask: EventMask) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            self.look_below(Path::new(""));
            return;
        }
        // Whatever it is, the mark is gone with it.
        let look = {
            let mut marks = self.marks.lock();
            let Some(look) = marks.by_watch.remove(watch) else {
                return;
            };
            if marks.by_look.get(&look) == Some(watch) {
                marks.by_look.remove(&look);
            }
            look
        };
        match look {
            _ if mask.contains(EventMask::IGNORED) => {}
            Look::Wal(main) => self.wal_grew(main),
            look => self.ask(look, FILE_SETTLE),
        }
    }

    fn work(&self, store: &Store) {
        // Sleeps of a fraction of a millisecond are to be what they say.
        // SAFETY: sets an attribute of this thread, by value.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1000, 0, 0, 0) };
        while let Some(look) = self.next() {
            match &look {
                Look::Wal(main) => self.look_at_wal(store, main),
                Look::File(path) => self.look_at_file(store, path, &look),
                Look::Tree(path) => self.look_at_tree(path),
            }
        }
    }

    fn next(&self) -> Option<Look> {
        let mut queue = self.queue.lock();
        loop {
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            match queue.by_time.first().cloned() {
                None => self.due.wait(&mut queue),
                Some((at, look)) if at <= Instant::now() => {
                    queue.by_time.remove(&(at, look.clone()));
                    queue.times.remove(&look);
                    return Some(look);
                }
                Some((at, _)) => {
                    self.due.wait_until(&mut queue, at);
                }
            }
        }
    }

    fn look_at_wal(&self, store: &Store, main: &Path) {
        let Some(db) = store.at(main) else {
            self.look_at(main);
            return;
        };
        let look = Look::Wal(main.to_owned());
        match self.capture_new(&db, &look) {
            Err(error) => {
                tracing::error!(db = %db.name(), error = chain(&error), "cannot capture, will try again");
                self.ask(look, BUSY_WAIT.1);
            }
            Ok(_) if db.is_in_trouble() => {
                self.look_at(main);
                self.ask(look, BUSY_WAIT.1);
            }
            Ok(bytes @ 1..) => {
                if let Err(error) = db.forget_history() {
                    tracing::error!(db = %db.name(), error = chain(&error), "begin the log anew");
                }
                self.queue.lock().busy.remove(&look);
                let polls = u32::try_from(bytes / BYTES_PER_POLL).unwrap_or(u32::MAX);
                self.ask(look, WAL_POLL_MAX.min(WAL_POLL.saturating_mul(polls + 1)));
            }
            Ok(0) => self.rest_at_wal(&db, look),
        }
    }

    /// Captures; returns how many bytes the log has grown by since the last look, by us or by a hook.
    fn capture_new(&self, db: &Db, look: &Look) -> Result<u64, DbError> {
        db.capture_wal()?;
        Ok(self.grown(db, look))
    }

    /// Returns how many bytes the log has grown by since this was last asked.
    fn grown(&self, db: &Db, look: &Look) -> u64 {
        let bytes = db.captured_bytes();
        let seen = self.queue.lock().seen.insert(look.clone(), bytes);
        bytes - seen.unwrap_or_default().min(bytes)
    }

    /// Nothing is new: leaves it to the next write to wake us. A commit whose frames are written but not yet
    /// published makes no event when it is; while there may be one, we look again, ever less often.
    fn rest_at_wal(&self, db: &Db, look: Look) {
        let is_armed_now = self.arm(&look, false);
        // Written between the look and the mark.
        if is_armed_now && self.capture_new(db, &look).unwrap_or(1) > 0 {
            self.ask(look, WAL_POLL);
            return;
        }
        if !db.has_unpublished_frames() {
            self.queue.lock().busy.remove(&look);
            return;
        }
        let wait = self.next_wait(&look, UNPUBLISHED_WAIT);
        self.ask(look, wait);
    }

    /// Doubles the time to wait for something that is under way.
    fn next_wait(&self, look: &Look, first: Duration) -> Duration {
        let mut queue = self.queue.lock();
        let now = Instant::now();
        let (wait, since) = match queue.busy.get(look) {
            Some((wait, since)) => ((*wait * 2).min(BUSY_WAIT.1), *since),
            None => (first, now),
        };
        queue.busy.insert(look.clone(), (wait, since));
        wait
    }

    /// Begins to count anew for how long a database has been busy.
    fn forget_busy(&self, look: &Look) {
        if let Some((_, since)) = self.queue.lock().busy.get_mut(look) {
            *since = Instant::now();
        }
    }

    /// Tells whether a database has been written, without a trace, for so long without a pause that it has to be held.
    fn is_never_idle(&self, look: &Look) -> bool {
        let queue = self.queue.lock();
        let busy = queue.busy.get(look);
        busy.is_some_and(|(_, since)| since.elapsed() > HOLD_AFTER)
    }

    fn look_at_file(&self, store: &Store, path: &Path, look: &Look) {
        let full = self.node.files.join(path);
        if std::fs::symlink_metadata(&full).is_ok_and(|m| !m.is_file()) {
            return;
        }
        let Some(db) = store.adopt(path) else {
            if may_become_database(&full) {
                self.arm(look, false);
            }
            return;
        };
        let is_hooked = self.grown(&db, look) > 0;
        let scanned = self.capture_file(&db, look);
        // What this look captured is not what a hook did.
        self.grown(&db, look);
        match scanned {
            Ok(Scanned::Clean) if is_hooked && !db.has_wal() => {
                self.queue.lock().busy.remove(look);
                self.ask(look.clone(), HOOKED_POLL);
            }
            Ok(Scanned::Clean) => {
                self.queue.lock().busy.remove(look);
                // A WAL tells of all that is written; its removal brings us back here.
                if !db.has_wal() && self.arm(look, false) && !db.is_captured() {
                    self.ask(look.clone(), FILE_SETTLE);
                }
            }
            Ok(scanned @ (Scanned::Traced | Scanned::Busy)) => {
                if is_hooked || scanned == Scanned::Traced {
                    // All before that was captured, or will be at its end.
                    self.forget_busy(look);
                }
                let wait = self.next_wait(look, BUSY_WAIT.0);
                self.ask(look.clone(), wait);
            }
            Err(error) => {
                tracing::error!(db = %db.name(), error = chain(&error), "cannot capture, will try again");
                self.ask(look.clone(), BUSY_WAIT.1);
            }
        }
    }

    fn capture_file(&self, db: &Db, look: &Look) -> Result<Scanned, DbError> {
        if db.is_captured() {
            return Ok(Scanned::Clean);
        }
        // Taking SQLite's lock could keep a program from its own; so not while a journal tells all.
        let seen = db.capture_untraced(None)?;
        if seen != Scanned::Busy {
            return Ok(seen);
        }
        let file = self
            .node
            .in_mount(|| OpenOptions::new().read(true).open(&db.paths().mounted));
        let Ok(file) = file else {
            return db.capture_untraced(Some(&|| true));
        };
        let locks = OfdLocks::new(file.as_fd());
        let nobody_writes = || {
            [db_lock::RESERVED, db_lock::PENDING, db_lock::SHARED]
                .into_iter()
                .all(|range| matches!(locks.conflict(LockKind::Read, range), Ok(None)))
        };
        let seen = db.capture_untraced(Some(&nobody_writes))?;
        if seen != Scanned::Busy || !self.is_never_idle(look) {
            return Ok(seen);
        }
        // As SQLite takes it: PENDING first, so that a writer who waits for readers is not passed by.
        let taken = locks.try_read(db_lock::PENDING).unwrap_or(false) && {
            let shared = locks.try_read(db_lock::SHARED).unwrap_or(false);
            let _ = locks.unlock(db_lock::PENDING);
            shared
        };
        // The locks go with the descriptor.
        if taken {
            db.capture_untraced(Some(&|| true))
        } else {
            Ok(Scanned::Busy)
        }
    }

    fn look_at_tree(&self, path: &Path) {
        let full = self.node.files.join(path);
        let Ok(kind) = std::fs::symlink_metadata(&full) else {
            return;
        };
        if kind.is_dir() {
            let Ok(entries) = std::fs::read_dir(&full) else {
                return;
            };
            for entry in entries.filter_map(Result::ok) {
                self.look_at_tree(&path.join(entry.file_name()));
            }
        } else if kind.is_file() && is_database(&full) {
            self.written_at(path);
            self.ask(Look::Wal(path.to_owned()), Duration::ZERO);
            self.look_at(path);
        }
    }
}

impl Running {
    /// Ends the threads, after the captures that they are in.
    pub fn stop(self) {
        self.watcher.stop.store(true, Ordering::Release);
        {
            let _queue = self.watcher.queue.lock();
            self.watcher.due.notify_all();
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a capture thread panicked");
            }
        }
    }
}

/// Returns whether a file that is not a database is empty, or begins as one does: it may be about to become one.
pub(crate) fn may_become_database(path: &Path) -> bool {
    use std::io::Read;
    let mut head = Vec::new();
    crate::store::open_regular(path)
        .and_then(|f| f.take(MAGIC.len() as u64).read_to_end(&mut head))
        .is_ok_and(|_| MAGIC.starts_with(&head))
}

const MAGIC: &[u8] = b"SQLite format 3\0";
