//! Wakes the capture on a primary: inotify on the directories of databases tells of writes that the kernel serves.
//!
//! Every directory with a database is watched once. An event is a hint: it makes a database due, and capturing decides
//! what there is. A burst is let gather for a moment, so that many transactions become one range.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use parking_lot::{Condvar, Mutex};

use crate::db::{Db, NodeContext, Scanned, thread_id};
use crate::sqlite::locks::{OfdLocks, db as db_lock};
use crate::store::{Store, chain, is_database};

/// How long a burst of WAL commits is let gather.
const WAL_GATHER: Duration = Duration::from_micros(200);
/// How long it is while one burst follows the other: a range then holds hundreds of transactions.
const WAL_GATHER_BUSY: Duration = Duration::from_millis(2);
/// A database that was quiet for so long gets the short wait.
const QUIET: Duration = Duration::from_millis(2);
/// Events are read no more often than this; meanwhile the kernel merges them, and wakes nobody.
const EVENT_PAUSE: Duration = Duration::from_micros(300);
/// How long writes to a database file are let settle before it is looked at.
const FILE_SETTLE: Duration = Duration::from_millis(5);
/// How long to wait for a transaction that is under way, at first and at most.
const BUSY_WAIT: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// How long to wait at first for a commit whose frames are in the WAL.
const UNPUBLISHED_WAIT: Duration = Duration::from_millis(1);
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

/// Watches directories and runs the captures that their events ask for.
pub struct Watcher {
    node: Arc<NodeContext>,
    watches: Mutex<Option<Watches>>,
    /// Watched directories, relative to the mount.
    dirs: Mutex<(HashSet<PathBuf>, HashMap<WatchDescriptor, PathBuf>)>,
    queue: Mutex<Queue>,
    due: Condvar,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct Queue {
    by_time: BTreeSet<(Instant, Look)>,
    times: HashMap<Look, Instant>,
    busy: HashMap<Look, Duration>,
    last_wal: HashMap<PathBuf, Instant>,
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
            watches: Mutex::new(None),
            dirs: Mutex::default(),
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
        *self.watches.lock() = Some(inotify.watches());
        for db in store.all() {
            self.watch_parent_of(&db.paths().relative);
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

    /// Watches the directory of a file, once.
    pub fn watch_parent_of(&self, relative: &Path) {
        let dir = relative.parent().unwrap_or(Path::new(""));
        if self.dirs.lock().0.contains(dir) {
            return;
        }
        let Some(watches) = &mut *self.watches.lock() else {
            return;
        };
        let path = self.node.files.join(dir);
        let mask =
            WatchMask::MODIFY | WatchMask::ONLYDIR | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
        match watches.add(&path, mask) {
            Ok(wd) => {
                let mut dirs = self.dirs.lock();
                dirs.0.insert(dir.to_owned());
                dirs.1.insert(wd, dir.to_owned());
            }
            Err(error) => tracing::error!(
                dir = %path.display(), %error,
                "cannot watch a directory, its databases are captured at checkpoints only; raise fs.inotify.max_user_watches"
            ),
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

    fn ask(&self, look: Look, after: Duration) {
        let mut queue = self.queue.lock();
        if queue.times.contains_key(&look) {
            return;
        }
        let at = Instant::now() + after;
        queue.times.insert(look.clone(), at);
        queue.by_time.insert((at, look));
        self.due.notify_one();
    }

    /// Asks for a capture: soon after a pause, later while it goes on without one.
    pub fn wal_grew(&self, main: PathBuf) {
        let now = Instant::now();
        let last = self.queue.lock().last_wal.insert(main.clone(), now);
        let is_quiet = last.is_none_or(|last| now - last > QUIET);
        self.ask(
            Look::Wal(main),
            if is_quiet {
                WAL_GATHER
            } else {
                WAL_GATHER_BUSY
            },
        );
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
            let events: Vec<(WatchDescriptor, EventMask, Option<OsString>)> =
                match inotify.read_events(&mut buffer) {
                    Ok(events) => events
                        .map(|e| (e.wd, e.mask, e.name.map(OsString::from)))
                        .collect(),
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => continue,
                    Err(error) => {
                        tracing::error!(%error, "inotify read");
                        return;
                    }
                };
            for (wd, mask, name) in events {
                self.event(&wd, mask, name);
            }
            std::thread::sleep(EVENT_PAUSE);
        }
    }

    fn event(&self, wd: &WatchDescriptor, mask: EventMask, name: Option<OsString>) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            self.look_below(Path::new(""));
            return;
        }
        if mask.intersects(EventMask::IGNORED | EventMask::DELETE_SELF | EventMask::MOVE_SELF) {
            let mut dirs = self.dirs.lock();
            if let Some(dir) = dirs.1.remove(wd) {
                dirs.0.remove(&dir);
            }
            return;
        }
        let Some(dir) = self.dirs.lock().1.get(wd).cloned() else {
            return;
        };
        let Some(name) = name else { return };
        let text = name.to_string_lossy();
        if let Some(main) = text.strip_suffix("-wal") {
            self.wal_grew(dir.join(main));
        } else if !text.ends_with("-shm") && !text.ends_with("-journal") {
            self.ask(Look::File(dir.join(&name)), FILE_SETTLE);
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
        if let Err(error) = db.capture_wal() {
            tracing::error!(db = %db.name(), error = chain(&error), "cannot capture, will try again");
            self.ask(Look::Wal(main.to_owned()), BUSY_WAIT.1);
        } else if db.is_in_trouble() {
            self.look_at(main);
        } else {
            self.look_again_at_wal(&db, main);
        }
    }

    /// Looks again, ever less often, while the WAL holds frames that are not published: a commit may be on its way.
    fn look_again_at_wal(&self, db: &Db, main: &Path) {
        let look = Look::Wal(main.to_owned());
        if !db.has_unpublished_frames() {
            self.queue.lock().busy.remove(&look);
            return;
        }
        let wait = {
            let mut queue = self.queue.lock();
            let wait = queue
                .busy
                .get(&look)
                .map_or(UNPUBLISHED_WAIT, |w| (*w * 2).min(BUSY_WAIT.1));
            queue.busy.insert(look.clone(), wait);
            wait
        };
        self.ask(look, wait);
    }

    fn look_at_file(&self, store: &Store, path: &Path, look: &Look) {
        let Some(db) = store.adopt(path) else { return };
        match self.capture_file(&db) {
            Ok(Scanned::Clean | Scanned::Traced) => {
                self.queue.lock().busy.remove(look);
            }
            Ok(Scanned::Busy) => {
                let wait = {
                    let mut queue = self.queue.lock();
                    let wait = queue
                        .busy
                        .get(look)
                        .map_or(BUSY_WAIT.0, |w| (*w * 2).min(BUSY_WAIT.1));
                    queue.busy.insert(look.clone(), wait);
                    wait
                };
                self.ask(look.clone(), wait);
            }
            Err(error) => {
                tracing::error!(db = %db.name(), error = chain(&error), "cannot capture, will try again");
                self.ask(look.clone(), BUSY_WAIT.1);
            }
        }
    }

    fn capture_file(&self, db: &Db) -> Result<Scanned, crate::db::DbError> {
        if db.is_captured() {
            return Ok(Scanned::Clean);
        }
        // Taking SQLite's lock could keep a program from its own; so not while a journal tells all.
        let seen = db.capture_untraced(false)?;
        if seen != Scanned::Busy {
            return Ok(seen);
        }
        let tid = thread_id();
        self.node.own_threads.lock().insert(tid);
        let file = OpenOptions::new().read(true).open(&db.paths().mounted);
        self.node.own_threads.lock().remove(&tid);
        let Ok(file) = file else {
            return db.capture_untraced(true);
        };
        let locks = OfdLocks::new(file.as_fd());
        // As SQLite takes it: PENDING first, so that a writer who waits for readers is not passed by.
        let taken = locks.try_read(db_lock::PENDING).unwrap_or(false) && {
            let shared = locks.try_read(db_lock::SHARED).unwrap_or(false);
            let _ = locks.unlock(db_lock::PENDING);
            shared
        };
        // The locks go with the descriptor.
        if taken {
            db.capture_untraced(true)
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
            self.watch_parent_of(path);
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
