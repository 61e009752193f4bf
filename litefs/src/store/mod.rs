//! All databases of a node, by name.
//!
//! ```text
//! <data>/files/<path>          what the mount shows: databases with their companions, and ordinary files
//! <data>/dbs/<id>/name         path of the database that this directory is about, then a line `crc32 <8 hex digits>` of it
//! <data>/dbs/<id>/{log,ltx,lost,quarantine,checksums-*}
//! ```

pub mod lost;

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::db::{Db, DbError, NodeContext, Trust};
use crate::disk::crash_point;
use crate::replication::DbName;
use crate::sqlite::header::{DB_HEADER_LEN, DbHeader};

/// Names of what is done to make a new database known.
pub mod steps {
    crate::disk::steps! {
        MAKE_DIR = "store.make:dir",
        MAKE_NAME = "store.make:name",
        WRITE_NAME = "store.make:write",
        MAKE_SYNC = "store.make:sync",
    }
}

/// The databases of a node.
#[derive(Debug)]
pub struct Store {
    node: Arc<NodeContext>,
    dbs: RwLock<HashMap<DbName, Arc<Db>>>,
    /// One at a time makes a database.
    making: Mutex<()>,
    /// Databases that could not be opened, with why.
    broken: RwLock<HashMap<DbName, String>>,
    /// The files are found; programs come from now on.
    is_open: AtomicBool,
}

impl Store {
    /// Opens every database that the node knows, and those it does not know yet among the files.
    ///
    /// # Errors
    /// When the directories cannot be read. A database that cannot be opened is left alone with its error.
    pub fn open(node: Arc<NodeContext>, trust: Trust) -> Result<Store, DbError> {
        let store = Store {
            node,
            dbs: RwLock::default(),
            making: Mutex::default(),
            broken: RwLock::default(),
            is_open: AtomicBool::new(false),
        };
        let metas = &store.node.metas;
        let found: Vec<(DbName, PathBuf)> = fs::read_dir(metas)
            .map_err(DbError::io("read directory", metas))?
            .filter_map(Result::ok)
            .filter_map(|entry| Some((store.name_of(&entry.path())?, entry.path())))
            .collect();
        let next = Mutex::new(found.into_iter());
        std::thread::scope(|scope| {
            for _ in 0..OPEN_THREADS {
                scope.spawn(|| {
                    while let Some((name, meta)) = { next.lock().next() } {
                        store.open_one(name, meta, trust);
                    }
                });
            }
        });
        if store.node.is_primary() {
            store.adopt_all(Path::new(""))?;
        }
        store.is_open.store(true, Ordering::Release);
        Ok(store)
    }

    /// Returns the database that a directory is about; a damaged name is found again in its page checksums.
    fn name_of(&self, meta: &Path) -> Option<DbName> {
        let path = meta.join("name");
        let why = match read_name(&path) {
            Ok(name) => return Some(name),
            Err(why) => why,
        };
        let Some(name) = Db::recorded_name(&*self.node.disk, meta) else {
            tracing::error!(
                path = %path.display(), why,
                "which database this directory is about cannot be read: its log is left alone; \
                 remove the directory once nothing in it is needed"
            );
            return None;
        };
        let kept = meta.join("name.damaged");
        let rewrite = || {
            self.node.disk.rename("store.name:keep", &path, &kept)?;
            let mut file = fs::File::create(&path)?;
            file.write_all(name_file(&name).as_bytes())?;
            file.sync_all()?;
            fs::File::open(meta)?.sync_all()
        };
        let rewritten = rewrite();
        tracing::error!(
            db = %name, path = %path.display(), kept = %kept.display(), why, ?rewritten,
            "the name of a database was damaged, and is written anew from its page checksums"
        );
        Some(name)
    }

    fn open_one(&self, name: DbName, meta: PathBuf, trust: Trust) {
        match Db::open(self.node.clone(), name.clone(), meta, trust) {
            Ok(db) => {
                self.dbs.write().insert(name, Arc::new(db));
            }
            Err(error) => {
                let error = chain(&error);
                tracing::error!(db = %name, error, "database cannot be opened; the others go on without it");
                self.broken.write().insert(name, error);
            }
        }
    }

    /// Finds databases among the files that nobody told us of.
    fn adopt_all(&self, dir: &Path) -> Result<(), DbError> {
        let path = self.node.files.join(dir);
        for entry in fs::read_dir(&path)
            .map_err(DbError::io("read directory", &path))?
            .filter_map(Result::ok)
        {
            let relative = dir.join(entry.file_name());
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => self.adopt_all(&relative)?,
                Ok(kind) if kind.is_file() => {
                    self.adopt(&relative);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns a database.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<Db>> {
        let name: DbName = name.parse().ok()?;
        self.dbs.read().get(&name).cloned()
    }

    /// Returns the database at a path, if there is one.
    #[must_use]
    pub fn at(&self, path: &Path) -> Option<Arc<Db>> {
        self.get(path.to_str()?)
    }

    /// Returns all databases.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Db>> {
        self.dbs.read().values().cloned().collect()
    }

    /// Returns databases that could not be opened, with why.
    #[must_use]
    pub fn broken(&self) -> Vec<(DbName, String)> {
        self.broken
            .read()
            .iter()
            .map(|(n, e)| (n.clone(), e.clone()))
            .collect()
    }

    /// Returns whether there is one that could not be opened.
    #[must_use]
    pub fn has_broken(&self) -> bool {
        !self.broken.read().is_empty()
    }

    /// Returns why a database could not be opened, if so.
    #[must_use]
    pub fn why_broken(&self, name: &str) -> Option<String> {
        let name: DbName = name.parse().ok()?;
        self.broken.read().get(&name).cloned()
    }

    /// Returns a database, making the record of it if it is new.
    ///
    /// # Errors
    /// Disk, or it is one that could not be opened.
    pub fn get_or_create(&self, name: &DbName) -> Result<Arc<Db>, DbError> {
        if let Some(db) = self.dbs.read().get(name) {
            return Ok(db.clone());
        }
        let _making = self.making.lock();
        if let Some(db) = self.dbs.read().get(name) {
            return Ok(db.clone());
        }
        if let Some(error) = self.broken.read().get(name) {
            return Err(DbError::Corrupt {
                what: error.clone(),
                path: name.as_str().into(),
            });
        }
        let meta = self.make_meta(name)?;
        let trust = match self.is_open.load(Ordering::Acquire) {
            true => Trust::Running,
            false => Trust::PageCache,
        };
        let db = Arc::new(Db::open(self.node.clone(), name.clone(), meta, trust)?);
        self.dbs.write().insert(name.clone(), db.clone());
        // What opening found was published before anybody could find the database here.
        self.node.hub.publish(name);
        Ok(db)
    }

    fn make_meta(&self, name: &DbName) -> Result<PathBuf, DbError> {
        let meta = self
            .node
            .metas
            .join(format!("{:016x}", rand::random::<u64>()));
        crash_point(steps::MAKE_DIR);
        fs::create_dir_all(&meta).map_err(DbError::io("create directory", &meta))?;
        let path = meta.join("name");
        let write = || {
            crash_point(steps::MAKE_NAME);
            let mut file = fs::File::create(&path)?;
            crash_point(steps::WRITE_NAME);
            file.write_all(name_file(name).as_bytes())?;
            file.sync_all()?;
            crash_point(steps::MAKE_SYNC);
            fs::File::open(&meta)?.sync_all()?;
            fs::File::open(&self.node.metas)?.sync_all()
        };
        write().map_err(DbError::io("write", &path))?;
        Ok(meta)
    }

    /// Makes a database of a file that has become one; returns it if it is one.
    pub fn adopt(&self, relative: &Path) -> Option<Arc<Db>> {
        let name: DbName = relative.to_str()?.parse().ok()?;
        if let Some(db) = self.dbs.read().get(&name) {
            return Some(db.clone());
        }
        if !is_database(&self.node.files.join(relative)) {
            return None;
        }
        match self.get_or_create(&name) {
            Ok(db) => Some(db),
            Err(error) => {
                tracing::error!(db = %name, error = chain(&error), "cannot take the file for a database");
                None
            }
        }
    }

    /// Returns databases at or below a path.
    #[must_use]
    pub fn below(&self, dir: &Path) -> Vec<Arc<Db>> {
        self.dbs
            .read()
            .values()
            .filter(|db| db.paths().relative.starts_with(dir))
            .cloned()
            .collect()
    }
}

const OPEN_THREADS: usize = 2;

const CRC_LINE: &str = "\ncrc32 ";

fn name_file(name: &DbName) -> String {
    let crc = crc32fast::hash(name.as_str().as_bytes());
    format!("{name}{CRC_LINE}{crc:08x}\n")
}

fn read_name(path: &Path) -> Result<DbName, String> {
    let text = fs::read_to_string(path).map_err(|e| e.to_string())?;
    let (name, crc) = text.rsplit_once(CRC_LINE).ok_or("cut short")?;
    if crc.trim_end() != format!("{:08x}", crc32fast::hash(name.as_bytes())) {
        return Err("crc-32 mismatch".to_owned());
    }
    name.parse()
        .map_err(|e: crate::replication::DbNameError| e.to_string())
}

/// Returns whether a file has the content of a SQLite database.
#[must_use]
pub fn is_database(path: &Path) -> bool {
    let mut head = [0; DB_HEADER_LEN];
    open_regular(path)
        .and_then(|f| std::os::unix::fs::FileExt::read_exact_at(&f, &mut head, 0))
        .is_ok_and(|()| DbHeader::parse(&head).is_some())
}

/// Opens an ordinary file for reading. Whatever else may be at the path, a pipe for one, is not waited for.
///
/// # Errors
/// As `open`; `InvalidInput` for what is no ordinary file.
pub fn open_regular(path: &Path) -> std::io::Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(std::io::ErrorKind::InvalidInput.into())
    }
}

/// Puts an error and its causes in one line, with what to do where that is known.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    crate::replication::send::chain(error)
}
