use std::io;
use std::path::{Path, PathBuf};

use super::log;
use crate::ltx::{LtxError, Pos};

/// Why something could not be done to a database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DbError {
    /// The operating system refused.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The log refused or failed.
    #[error("log of {db}")]
    Log {
        /// Name of the database.
        db: String,
        /// Why.
        #[source]
        source: log::Error,
    },
    /// Bytes that should be LTX are not.
    #[error("ltx of {db}")]
    Ltx {
        /// Name of the database.
        db: String,
        /// Why.
        #[source]
        source: LtxError,
    },
    /// The database is elsewhere than the range expects.
    #[error("pos mismatch: database at {have}, range expects {want}")]
    PosMismatch {
        /// Where the database is.
        have: Pos,
        /// What the range expects.
        want: Pos,
    },
    /// Bytes of SQLite's that make no sense.
    #[error("{what} in {}", path.display())]
    Corrupt {
        /// What is wrong.
        what: String,
        /// In which file.
        path: PathBuf,
    },
    /// Somebody holds a lock for too long.
    #[error("{what} is locked: {}", path.display())]
    Locked {
        /// Which lock.
        what: &'static str,
        /// Of which file.
        path: PathBuf,
    },
}

impl DbError {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DbError {
        let path = path.to_owned();
        move |source| DbError::Io { what, path, source }
    }

    /// Returns the errno that a program in the mount should see.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            DbError::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            DbError::Log { source, .. } if source.is_disk_full() => libc::ENOSPC,
            _ => libc::EIO,
        }
    }
}
