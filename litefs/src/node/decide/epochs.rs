//! What may be taken, begun and gone on with in which epoch.

/// Returns whether something a primary of epoch `sent` sent may be taken where `seen` is the highest epoch known.
pub(crate) fn may_take(sent: u64, seen: u64) -> bool {
    sent >= seen
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

/// Returns whether a primary's tenure is over (INV-ELECT-2).
pub(crate) fn is_over(epoch: u64, lease: Option<u64>, seen: u64) -> bool {
    lease != Some(epoch) || seen > epoch
}
