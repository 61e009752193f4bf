//! Replication: a primary streams page ranges of every database to its replicas over one connection each.
//!
//! ```text
//!  store ──Changes──▶ send ──frames──▶ TCP ──▶ receive ──▶ worker of the database ──▶ Sink
//!  Source ◀─read_after─┘  ◀─────── acks (applied, durable, bytes done) ◀────────────────┘
//! ```
//! What each file owns: `frame` the bytes on the wire, `session` every decision (pure), `send` the
//! primary's side, `receive` the replica's side, `replicas` who has acknowledged what, [`changes`] the
//! coalescing "database X moved". This file owns the two ports, [`Source`] and [`Sink`], which the store implements.
//!
//! What holds:
//! - INV-REPL-1: a record is applied only on the exact position it was made for; anything else is a
//!   [`SinkError::PosMismatch`] and becomes a difference, never a guess.
//! - INV-REPL-2: a receiver takes nothing from an epoch below the highest it has seen.
//! - INV-REPL-3: bytes sent and not yet reported done, per database, stay within the window (plus one record).
//! - INV-REPL-4: a database the primary does not know is reported and kept; only a drop the primary logged removes it.
//!
//! Format of the stream: docs/formats/stream.md.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;

use crate::ltx::{Checksum, Pgno, Pos, Txid};

pub mod changes;
pub mod conn;
pub mod filter;
pub mod frame;
mod lane;
pub mod message;
pub mod receive;
pub mod replicas;
pub mod send;
pub mod session;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod stream_tests;

pub use changes::{ChangeHub, Changes};
pub use filter::{DatabaseFilter, DbPattern};

pub use crate::db::log::Milestone;

/// Longest database name in bytes.
pub const MAX_DB_NAME_LEN: usize = 1024;

/// Path of a database within the mount: `/`-separated, relative, without `.`, `..` or empty parts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DbName(Arc<str>);

impl DbName {
    /// Returns the path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DbName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Text that cannot name a database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot name a database: want a relative path without empty, \".\" or \"..\" parts, at most {MAX_DB_NAME_LEN} bytes"
)]
pub struct DbNameError(String);

impl FromStr for DbName {
    type Err = DbNameError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let part_is_good = |p: &str| !p.is_empty() && p != "." && p != "..";
        if s.len() > MAX_DB_NAME_LEN || s.contains('\0') || !s.split('/').all(part_is_good) {
            return Err(DbNameError(s.chars().take(80).collect()));
        }
        Ok(DbName(s.into()))
    }
}

/// What the log knows of one replicated range without reading its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordMeta {
    /// Tenure in which the range was committed.
    pub epoch: u64,
    /// First transaction contained.
    pub min_txid: Txid,
    /// Last transaction contained.
    pub max_txid: Txid,
    /// Checksum of the database before `min_txid`.
    pub pre: Checksum,
    /// Checksum of the database after `max_txid`.
    pub post: Checksum,
    /// Primary's wall clock at the commit, milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Pages the database has afterwards; 0 means dropped.
    pub commit: u32,
    /// Bytes per page.
    pub page_size: u32,
}

impl RecordMeta {
    /// Returns the position a database must have for the range to be applied.
    #[must_use]
    pub fn pre_pos(&self) -> Pos {
        Pos {
            txid: self.min_txid.prev(),
            post_apply_checksum: self.pre,
        }
    }

    /// Returns the position of a database after the range.
    #[must_use]
    pub fn post_pos(&self) -> Pos {
        Pos {
            txid: self.max_txid,
            post_apply_checksum: self.post,
        }
    }
}

/// One replicated range as stored in the log: what it is, and the bytes of an LTX version 3 file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What the range is.
    pub meta: RecordMeta,
    /// The LTX file, header to trailer.
    pub ltx: Bytes,
}

/// What the primary's log answers to "what comes after this position".
#[derive(Debug)]
pub enum Fetch {
    /// The next ranges, oldest first, at least one. The first may begin at or before the position asked for.
    Records(Vec<Record>),
    /// The position is the newest.
    UpToDate,
    /// The log cannot lead from the position to the newest: behind retention, ahead of us, or another
    /// checksum at the same TXID. The text says which, for a person.
    NeedSnapshot {
        /// Why, for logs and `status`.
        why: String,
    },
    /// The database was dropped here, by a transaction that ended at `at`.
    Dropped {
        /// Position after the drop.
        at: Pos,
    },
    /// Never heard of it. The replica keeps its copy (INV-REPL-4).
    Unknown,
}

/// How a replica would like to be brought to the primary's state when the log does not reach.
#[derive(Debug, Default)]
pub struct SnapshotRequest {
    /// Page checksums of the replica's own copy, by [`Pgno::index`]; pages equal to ours need not be sent.
    /// `None` asks for every page. A zero stands for "no such page" (the lock page).
    pub have: Option<Vec<u64>>,
    /// Where a copy broken off earlier started. Pin that position again if the log still covers it.
    pub resume_at: Option<Pos>,
    /// Where the replica is: what our history was before is what tells where the two part.
    pub replica_at: Pos,
}

/// Why the primary's store could not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// No such database (any more).
    #[error("database {0} does not exist here")]
    NotFound(DbName),
    /// Disk failure.
    #[error("{what}")]
    Io {
        /// What was being done, with the name of the database.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Bytes on disk are not what was written.
    #[error("{0}")]
    Corrupt(String),
}

/// What the sender needs of the primary's store.
///
/// Calls may block on disk. Each connected replica has one thread of its own that makes them.
pub trait Source: Send + Sync + 'static {
    /// Identity of the cluster, `LFSC` and 16 hex digits.
    fn cluster_id(&self) -> String;
    /// Identity of this node.
    fn node_id(&self) -> u64;
    /// Fencing number of this node's tenure; `None` while it is not the primary.
    /// Checked before every turn: a sender of an ended tenure closes its streams.
    fn epoch(&self) -> Option<u64>;
    /// All databases with their newest position.
    fn databases(&self) -> Vec<(DbName, Pos)>;
    /// Subscribes to "this database moved, appeared or was dropped". Subscribe first, list after.
    fn changes(&self) -> Changes;
    /// Reads what follows a position; about `max_bytes`, but at least one record if there is any.
    ///
    /// # Errors
    /// A failure concerns this database alone: the sender leaves it and carries on with the others.
    fn read_after(&self, db: &DbName, after: Pos, max_bytes: usize) -> Result<Fetch, SourceError>;
    /// Opens a fuzzy page copy and pins its start in the log until the reader is dropped.
    ///
    /// # Errors
    /// As [`Source::read_after`].
    fn open_snapshot(
        &self,
        db: &DbName,
        request: SnapshotRequest,
    ) -> Result<Box<dyn SnapshotReader>, SourceError>;
    /// Whether commits of this database wait until replicas have them on disk. Replicas then sync before they ack.
    fn wants_durable_acks(&self, _db: &DbName) -> bool {
        false
    }
    /// Wall clock for lag, milliseconds since 1970.
    fn now_ms(&self) -> i64;
}

/// Fuzzy copy of a database's pages.
///
/// `start` is pinned in the log. Pages are read without SQLite's locks and may be newer than `start`; the copy is
/// consistent once the records `start+1..=end` are applied on top, `end` being the position when the last page was read.
pub trait SnapshotReader: Send {
    /// Position the copy starts from.
    fn start(&self) -> Pos;
    /// Bytes per page.
    fn page_size(&self) -> u32;
    /// Pages the database has at `start`.
    fn page_count(&self) -> u32;
    /// Where this history was at the replica's position and before, newest first.
    fn history(&self) -> Vec<Milestone> {
        Vec::new()
    }
    /// Skips pages before `next`, which an earlier copy from the same start already carried.
    fn seek(&mut self, next: Pgno);
    /// Reads pages in ascending order, about `max_bytes` and at least one; none when done. At last come, ascending
    /// again each time, pages that were read in the middle of a change, read anew. Lock page and
    /// (in a difference) equal pages are left out, and so are pages after `page_count`: the records bring those,
    /// and a copy that went after them might never end.
    ///
    /// # Errors
    /// The copy is given up and asked for again.
    fn next_pages(&mut self, max_bytes: usize) -> Result<Vec<(Pgno, Bytes)>, SourceError>;
    /// Returns `end`, the position by now.
    ///
    /// # Errors
    /// As [`SnapshotReader::next_pages`].
    fn finish(&mut self) -> Result<Pos, SourceError>;
}

/// Records of one database, in order, as they came from one primary.
#[derive(Debug)]
pub struct Batch {
    /// Tenure of the primary that sent them (the records' own may be older). Refuse it below the highest seen,
    /// under the lock that also guards fencing.
    pub sender_epoch: u64,
    /// The primary waits until this is on disk: sync before returning.
    pub sync: bool,
    /// The ranges; each begins where the one before ended. The first may begin before the replica's
    /// position, if that is inside it: apply what follows, as the pages are whole pages.
    pub records: Vec<Record>,
}

/// Where a replica's copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// Visible to readers here.
    pub pos: Pos,
    /// Survives power loss here. Never ahead of `pos` on the same lineage.
    pub durable: Pos,
}

/// Why a replica's store did not take something. Each kind has one fate in `receive`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// The database is elsewhere than the record expects: ask for a difference from `have`.
    #[error("pos mismatch: database at {have}, record expects {want}")]
    PosMismatch {
        /// Where the database is.
        have: Pos,
        /// What the record expects.
        want: Pos,
    },
    /// A newer primary exists: leave this one.
    #[error("stale epoch {sent}: already followed {seen}")]
    StaleEpoch {
        /// What the sender claims.
        sent: u64,
        /// Highest seen.
        seen: u64,
    },
    /// The bytes are not a valid range; fetch them again.
    #[error("{0}")]
    Invalid(String),
    /// Disk failure: tried again, ever more rarely, while the other databases go on.
    #[error("{what}")]
    Io {
        /// What was being done, with the name of the database.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What the receiver needs of the replica's store.
///
/// Calls block. For one database they come from one worker at a time and in order; for several, in parallel.
pub trait Sink: Send + Sync + 'static {
    /// Identity of the cluster this node belongs to, if it has joined one.
    fn cluster_id(&self) -> Option<String>;
    /// Joins a cluster, durably.
    ///
    /// # Errors
    /// The connection is given up.
    fn adopt_cluster_id(&self, id: &str) -> Result<(), SinkError>;
    /// Identity of this node.
    fn node_id(&self) -> u64;
    /// Highest epoch seen, by any path.
    fn epoch(&self) -> u64;
    /// Remembers an epoch, durably, if it is the highest.
    ///
    /// # Errors
    /// [`SinkError::StaleEpoch`] if a higher one is known.
    fn observe_epoch(&self, epoch: u64) -> Result<(), SinkError>;
    /// All databases with the position of the copy here.
    fn positions(&self) -> Vec<(DbName, Pos)>;
    /// Databases to replicate.
    fn filter(&self) -> DatabaseFilter {
        DatabaseFilter::default()
    }
    /// Applies ranges; several become one commit.
    ///
    /// # Errors
    /// See [`SinkError`]; none leaves a part of a record applied and visible.
    fn apply(&self, db: &DbName, batch: Batch) -> Result<Applied, SinkError>;
    /// Removes a database that the primary dropped at `at`; returns where that leaves it.
    ///
    /// # Errors
    /// As [`Sink::apply`].
    fn drop_db(&self, db: &DbName, sender_epoch: u64, at: Pos) -> Result<Applied, SinkError>;
    /// Tells that the primary has never heard of a database held here. It is kept; `status` shows it.
    fn unknown_to_primary(&self, db: &DbName);
    /// Position, and page checksums by [`Pgno::index`], of the copy here, for a difference instead of a whole
    /// copy; `None` if there are none to trust. Zero stands for "no such page".
    ///
    /// # Errors
    /// A whole copy is asked for.
    fn page_checksums(&self, db: &DbName) -> Result<Option<Vec<u64>>, SinkError>;
    /// Where a page copy that was broken off can go on: its start, and the first page not yet on disk.
    fn resume_point(&self, db: &DbName) -> Option<(Pos, Pgno)>;
    /// Hears where the primary's history has been; a page copy follows. Only notes it.
    fn history(&self, _db: &DbName, _milestones: &[Milestone]) {}
    /// Begins a page copy, or goes on with the one of [`Sink::resume_point`] if `snapshot.next` is not the first page.
    /// A writer dropped before `finish` keeps what it has, for a later resume.
    ///
    /// # Errors
    /// As [`Sink::apply`].
    fn begin_snapshot(
        &self,
        db: &DbName,
        snapshot: SnapshotStart,
    ) -> Result<Box<dyn SnapshotWriter>, SinkError>;
    /// Position the copy here is at, and what of it is on disk. Answered from memory.
    fn applied(&self, db: &DbName) -> Applied;
    /// Subscribes to "more of this database is on disk now" for stores that sync after they answered.
    fn durable_changes(&self) -> Option<Changes> {
        None
    }
    /// Takes the primary's clock; `caught_up` when everything it had at that moment has been applied. Only notes it.
    fn heartbeat(&self, primary_ms: i64, caught_up: bool);
    /// A stream from this primary began.
    fn connected(&self, primary: &PrimaryInfo);
    /// The stream ended.
    fn disconnected(&self);
}

/// How a page copy begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotStart {
    /// Tenure of the primary that sends it.
    pub sender_epoch: u64,
    /// Position the copy starts from.
    pub start: Pos,
    /// Bytes per page.
    pub page_size: u32,
    /// Pages the database had at `start`.
    pub page_count: u32,
    /// First page that may follow.
    pub next: Pgno,
    /// Pages equal to those offered with [`Sink::page_checksums`] are left out.
    pub is_difference: bool,
}

/// Takes a page copy. Nothing of it is visible to readers before `finish`.
pub trait SnapshotWriter: Send {
    /// Writes pages, ascending; a page may come again, and then counts as it came last.
    ///
    /// # Errors
    /// The copy is broken off and asked for again, resumed where possible.
    fn pages(&mut self, pages: Vec<(Pgno, Bytes)>) -> Result<(), SinkError>;
    /// Keeps records after `start`, in order, to be applied on top of the pages.
    ///
    /// # Errors
    /// As [`SnapshotWriter::pages`].
    fn records(&mut self, records: Vec<Record>) -> Result<(), SinkError>;
    /// Puts the copy in place, records applied, and checks the checksum: the copy is consistent as of
    /// `end` or, if the last record goes further, its end. Refuses, as [`Sink::apply`] does, if a higher epoch
    /// than the one the copy began with was seen meanwhile.
    ///
    /// # Errors
    /// As [`SnapshotWriter::pages`].
    fn finish(self: Box<Self>, end: Pos) -> Result<Applied, SinkError>;
}

/// Who a replica follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrimaryInfo {
    /// Identity of the primary.
    pub node_id: u64,
    /// Its host name, as `.primary` shows it.
    pub hostname: String,
    /// Its tenure.
    pub epoch: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_paths() {
        for good in ["a", "a.db", "x/y/z.db", "..a"] {
            assert_eq!(good.parse::<DbName>().unwrap().as_str(), good);
        }
        let long = "x".repeat(MAX_DB_NAME_LEN + 1);
        for bad in ["", "/a", "a/", "a//b", ".", "a/../b", "./a", "a\0b", &long] {
            assert!(bad.parse::<DbName>().is_err(), "{bad:?}");
        }
    }
}
