//! What a name in the mount stands for.

use std::path::{Path, PathBuf};

/// What a path is to SQLite and to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// A database, an ordinary file, or nothing yet.
    Main,
    /// The WAL of the database at this path.
    Wal(PathBuf),
    /// The wal-index of the database at this path.
    Shm(PathBuf),
    /// The rollback journal of the database at this path.
    Journal(PathBuf),
}

impl Role {
    /// Reads a name. Whether the database exists is for the caller to see.
    pub(super) fn of(path: &Path) -> Role {
        let strip = |suffix| strip_suffix(path, suffix);
        if let Some(db) = strip("-wal") {
            Role::Wal(db)
        } else if let Some(db) = strip("-shm") {
            Role::Shm(db)
        } else if let Some(db) = strip("-journal") {
            Role::Journal(db)
        } else {
            Role::Main
        }
    }
}

/// Takes a suffix off the last part of a path, if something is left of it.
pub(super) fn strip_suffix(path: &Path, suffix: &str) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?.strip_suffix(suffix)?;
    (!name.is_empty()).then(|| path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_are_told_by_suffix() {
        assert_eq!(
            Role::of(Path::new("a/b.db-wal")),
            Role::Wal("a/b.db".into())
        );
        assert_eq!(Role::of(Path::new("b.db-shm")), Role::Shm("b.db".into()));
        assert_eq!(
            Role::of(Path::new("b.db-journal")),
            Role::Journal("b.db".into())
        );
        assert_eq!(Role::of(Path::new("-wal")), Role::Main);
        assert_eq!(Role::of(Path::new("b.db")), Role::Main);
    }
}
