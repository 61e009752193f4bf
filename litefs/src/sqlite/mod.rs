//! SQLite's own bytes: database header, rollback journal, WAL frames, wal-index, lock bytes.
