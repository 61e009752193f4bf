//! What may be taken, begun and gone on with in which epoch.

use super::mutation::mutated;

/// Returns whether something a primary of epoch `sent` sent may be taken where `seen` is the highest epoch known.
pub(crate) fn may_take(sent: u64, seen: u64) -> bool {
    sent >= seen || mutated!(LowerEpochTaken)
}

/// Returns whether a node may note that it has all that the primary of an epoch began with: not once it has told the winner
/// of a newer one what it had accepted.
pub(crate) fn may_accept(epoch: u64, seen: u64) -> bool {
    epoch >= seen || mutated!(AcceptedLate)
}

/// Returns in which epoch a node may act as the primary: `lease` is what Raft says, `given_up` the last epoch of which it
/// gave the role away.
pub(crate) fn tenure(lease: Option<u64>, given_up: u64, seen: u64) -> Option<u64> {
    lease.filter(|epoch| given_up < *epoch && seen <= *epoch)
}

/// Returns whether writes may be opened in an epoch; `tenure` is that of now.
pub(crate) fn may_open(epoch: u64, seen: u64, tenure: Option<u64>) -> bool {
    seen == epoch && tenure == Some(epoch)
}

/// Returns whether a database may be given back to its writers in an epoch. `primary` is that of which this node is the
/// primary: no change of the role may come between the answer and the act.
pub(crate) fn may_reopen(epoch: u64, primary: Option<u64>, tenure: Option<u64>) -> bool {
    primary == Some(epoch) && tenure == Some(epoch) || mutated!(ReopenedAfterFence)
}

/// Returns whether a commit that is logged may wait for a quorum. `primary` is that of which this node is the primary after
/// it was logged: once it is fenced, and has said what it has, others do not know of what comes after.
pub(crate) fn may_commit(epoch: u64, primary: Option<u64>) -> bool {
    primary == Some(epoch) || mutated!(CommitAfterFence)
}

/// Returns whether a primary's tenure is over (INV-ELECT-2).
pub(crate) fn is_over(epoch: u64, lease: Option<u64>, seen: u64) -> bool {
    (lease != Some(epoch) || seen > epoch) && !mutated!(LeaseIgnored)
}
