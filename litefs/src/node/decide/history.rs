//! Whether one copy of a database goes on where another is.

use crate::ltx::Pos;

/// How a replica comes to where its primary is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lead {
    /// It is there.
    Level,
    /// By what the log has after its position, if that [`joins`].
    Log,
    /// It is not in this history: only by pages.
    Copy,
}

/// Decides by what a replica at `after` is led to `end`.
pub(crate) fn lead(after: Pos, end: Pos) -> Lead {
    if after == end {
        Lead::Level
    } else if after.txid >= end.txid {
        Lead::Copy
    } else {
        Lead::Log
    }
}

/// Returns whether a record that begins at `begin` may follow `after`. One that begins before it is judged by who applies it.
pub(crate) fn joins(after: Pos, begin: Pos) -> bool {
    begin.txid != after.txid || begin == after
}
