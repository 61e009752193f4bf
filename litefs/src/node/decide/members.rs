//! Who may be made a voter, and when.

use std::collections::BTreeMap;

use super::takeover::Report;
use crate::ltx::Txid;
use crate::replication::DbName;

/// Returns whether a node has on disk what the primary of an epoch had at some moment.
///
/// A change of the voters needs a majority of the new ones to be level with what was there when commits began to wait for
/// these too (INV-QUORUM-4): an older commit may be on no more of them than the primary.
pub(crate) fn is_level(report: &Report, epoch: u64, floor: &BTreeMap<DbName, Txid>) -> bool {
    let has = |(db, txid): (&DbName, &Txid)| {
        let standing = report.databases.get(db);
        standing.is_some_and(|standing| standing.pos.txid >= *txid)
    };
    report.accepted_epoch == epoch && floor.iter().all(has)
}
