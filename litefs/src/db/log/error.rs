use std::io;
use std::path::PathBuf;

use super::Fault;
use crate::disk::Step;
use crate::ltx::{Pos, Txid};

/// An error of somebody else's that is passed on.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why the log did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The disk refused; unless [`Error::Broken`] follows, the log is as it was and goes on.
    #[error("{step} {}", path.display())]
    Io {
        /// What was being done.
        step: Step,
        /// To which file or directory.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// A record does not begin where the log ends.
    #[error("log ends at {end}, record begins at {begin}")]
    NotContiguous {
        /// Last position of the log.
        end: Pos,
        /// Position that the record applies to.
        begin: Pos,
    },
    /// A record of an earlier tenure than the last one.
    #[error("log is at epoch {have}, record has epoch {got}")]
    StaleEpoch {
        /// Epoch of the last record.
        have: u64,
        /// Epoch of the refused one.
        got: u64,
    },
    /// A record that no log can hold.
    #[error("transactions {min_txid}-{max_txid} with {ltx_len} bytes cannot be a record")]
    InvalidRecord {
        /// Its first transaction.
        min_txid: Txid,
        /// Its last transaction.
        max_txid: Txid,
        /// Its length; zero and more than 4 GiB are refused.
        ltx_len: usize,
    },
    /// Bytes on disk are not those that were written. They are kept; the base moves past them.
    #[error("{} at byte {offset}: {fault}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where the bad record starts, in bytes.
        offset: u64,
        /// What is wrong with it.
        fault: Fault,
    },
    /// The compaction function failed; the segment stays as it is.
    #[error("compact {}", path.display())]
    Compact {
        /// The segment.
        path: PathBuf,
        /// What the function said.
        #[source]
        source: BoxError,
    },
    /// The compaction function made something else than its input.
    #[error("compact {}: made {got}, expected {expected}", path.display())]
    Miscompacted {
        /// The segment.
        path: PathBuf,
        /// What it contains.
        expected: String,
        /// What was made of it.
        got: String,
    },
    /// An earlier failure of this step left the disk in doubt: reopen the log.
    #[error("log is unusable since {step} failed")]
    Broken {
        /// The step that failed.
        step: Step,
    },
}

impl Error {
    /// Says whether the disk or the quota is full.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Error::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ))
    }
}
