//! Where the files of one database are.

use std::path::{Path, PathBuf};

/// Backing files of a database, and the directory of what we keep about it.
#[derive(Debug, Clone)]
pub struct DbPaths {
    /// Path within the mount.
    pub relative: PathBuf,
    /// The database file.
    pub main: PathBuf,
    /// Its write-ahead log.
    pub wal: PathBuf,
    /// Its wal-index.
    pub shm: PathBuf,
    /// Its rollback journal.
    pub journal: PathBuf,
    /// Log, checksums and quarantine.
    pub meta: PathBuf,
    /// Where the mount shows the database file.
    pub mounted: PathBuf,
}

impl DbPaths {
    /// Derives all paths.
    #[must_use]
    pub fn new(files: &Path, mount: &Path, meta: PathBuf, relative: &Path) -> DbPaths {
        let main = files.join(relative);
        DbPaths {
            relative: relative.to_owned(),
            wal: with_suffix(&main, "-wal"),
            shm: with_suffix(&main, "-shm"),
            journal: with_suffix(&main, "-journal"),
            mounted: mount.join(relative),
            main,
            meta,
        }
    }
}

/// Appends to the last part of a path.
#[must_use]
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut s = path.as_os_str().to_owned();
    s.push(suffix);
    s.into()
}
