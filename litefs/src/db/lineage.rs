//! Whether what another history takes the place of is kept.

use crate::ltx::Pos;

/// Returns whether a database at `have` is kept apart when a copy that begins at `start` takes its place: it may hold what no
/// other node does.
pub(crate) fn is_kept(have: Pos, start: Pos, was_primary: bool) -> bool {
    let continues = have == Pos::ZERO || have == start || have.txid < start.txid;
    was_primary && have != start || have.txid > start.txid || !continues
}
