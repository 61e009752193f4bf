//! Which node's copy of each database a new primary begins with: every decision, no I/O.
//!
//! What holds:
//! - INV-TAKEOVER-1: a node that accepted the newest tenure (had all that its primary began with, on disk) is right over
//!   one that did not, whatever their TXIDs: commits that a quorum acknowledged in that tenure are on such nodes only;
//! - INV-TAKEOVER-2: among those the most advanced copy wins, by the tenure of its last transaction, then its TXID. A copy of
//!   pages is of the tenure that sent it, which had begun with no less; a compacted range that ends the sender's history, of
//!   the tenure that the sender knows. So what a quorum acknowledged is never of a lower tenure on who has it than it was;
//! - INV-TAKEOVER-3: a database that none of those knows stays as it is on the winner.

use std::collections::{BTreeMap, BTreeSet};

use super::mutation::mutated;
use crate::ltx::Pos;
use crate::replication::DbName;

/// Where a database is on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) pos: Pos,
    /// Tenure of its last transaction, or a later one which had it when it began.
    pub(crate) epoch: u64,
}

impl Standing {
    fn rank(&self) -> (u64, u64, u64) {
        let epoch = if mutated!(TxidOnly) { 0 } else { self.epoch };
        // Two branches that are as long: any order does, as long as all nodes have the same.
        let checksum = self.pos.post_apply_checksum.get();
        (epoch, self.pos.txid.0, checksum)
    }
}

/// What a node said when it was fenced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) node: u64,
    pub(crate) accepted_epoch: u64,
    pub(crate) databases: BTreeMap<DbName, Standing>,
}

/// A database to be fetched before writes are opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) db: DbName,
    pub(crate) from: u64,
    pub(crate) pos: Pos,
}

/// One try of a winner to have a quorum take nothing older than its epoch (INV-ELECT-1).
#[derive(Debug)]
pub(crate) struct Round {
    own: Report,
    granted: BTreeSet<u64>,
    reports: Vec<Report>,
}

impl Round {
    /// Begins with what the winner itself has, which takes nothing older any more.
    pub(crate) fn new(own: Report) -> Round {
        Round {
            granted: BTreeSet::from([own.node]),
            own,
            reports: Vec::new(),
        }
    }

    /// Takes in what another node said when it was fenced.
    pub(crate) fn heard(&mut self, report: Report) {
        if self.granted.insert(report.node) {
            self.reports.push(report);
        }
    }

    /// Returns who takes nothing older.
    pub(crate) fn granted(&self) -> &BTreeSet<u64> {
        &self.granted
    }

    /// Returns what the winner has to fetch before it opens writes.
    pub(crate) fn plan(&self) -> Vec<Wanted> {
        plan(&self.own, &self.reports)
    }
}

/// Whether a database that is being fetched is where it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrival {
    NotYet,
    There,
    /// The other node does not have it, or has gone on: it was not on disk when it said so, or a program went on writing.
    Elsewhere,
}

/// Says how far the fetch of a database is that is at `have`; `is_all` if the other node has no more than that.
pub(crate) fn arrived(have: Pos, wanted: Pos, is_all: bool) -> Arrival {
    match () {
        () if have == wanted => Arrival::There,
        () if is_all && !mutated!(WaitsForever) => Arrival::Elsewhere,
        () => Arrival::NotYet,
    }
}

/// Returns what `own` has to fetch, and from whom.
fn plan(own: &Report, others: &[Report]) -> Vec<Wanted> {
    let all = || others.iter().chain([own]);
    let newest = all().map(|r| r.accepted_epoch).max().unwrap_or(0);
    let mut best: BTreeMap<&DbName, (Standing, u64)> = BTreeMap::new();
    let has_say = |r: &&Report| r.accepted_epoch == newest || mutated!(TxidOnly);
    for report in all().filter(has_say) {
        for (db, standing) in &report.databases {
            let entry = best.entry(db).or_insert((*standing, report.node));
            // Ours first among equals: nothing to fetch.
            let is_better = standing.rank() > entry.0.rank()
                || standing.rank() == entry.0.rank() && report.node == own.node;
            if is_better && !mutated!(FirstReport) {
                *entry = (*standing, report.node);
            }
        }
    }
    best.into_iter()
        .filter(|(db, (standing, from))| {
            *from != own.node && own.databases.get(*db).map(|s| s.pos) != Some(standing.pos)
        })
        .map(|(db, (standing, from))| Wanted {
            db: db.clone(),
            from,
            pos: standing.pos,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ltx::{Checksum, Txid};

    fn standing(epoch: u64, txid: u64) -> Standing {
        Standing {
            pos: Pos {
                txid: Txid(txid),
                post_apply_checksum: Checksum::new(epoch << 32 | txid),
            },
            epoch,
        }
    }

    fn report(node: u64, accepted_epoch: u64, databases: &[(&str, u64, u64)]) -> Report {
        let of = |(name, epoch, txid): &(&str, u64, u64)| {
            (name.parse().unwrap(), standing(*epoch, *txid))
        };
        Report {
            node,
            accepted_epoch,
            databases: databases.iter().map(of).collect(),
        }
    }

    fn fetched(own: &Report, others: &[Report]) -> Vec<(String, u64, u64)> {
        plan(own, others)
            .iter()
            .map(|w| (w.db.to_string(), w.from, w.pos.txid.0))
            .collect()
    }

    #[test]
    fn the_most_advanced_copy_wins_for_each_database() {
        let own = report(1, 3, &[("a", 3, 10), ("b", 3, 7)]);
        let other = report(2, 3, &[("a", 3, 9), ("b", 3, 8), ("c", 3, 1)]);
        assert_eq!(
            fetched(&own, &[other]),
            [("b".into(), 2, 8), ("c".into(), 2, 1)]
        );
    }

    #[test]
    fn a_later_tenure_is_right_over_a_longer_history() {
        let own = report(1, 3, &[("a", 3, 100)]);
        assert_eq!(
            fetched(&own, &[report(2, 3, &[("a", 4, 95)])]),
            [("a".into(), 2, 95)],
            "followed a later tenure"
        );
        assert_eq!(
            fetched(&own, &[report(2, 5, &[("a", 3, 90)])]),
            [("a".into(), 2, 90)],
            "accepted one in which nothing was written yet"
        );
    }

    #[test]
    fn who_did_not_accept_the_newest_tenure_has_no_say() {
        let own = report(1, 5, &[("a", 5, 10)]);
        let stale = report(2, 4, &[("a", 4, 900), ("own", 4, 3)]);
        assert_eq!(fetched(&own, &[stale]), []);
    }

    #[test]
    fn nothing_is_fetched_that_is_here() {
        let own = report(2, 5, &[("a", 5, 10)]);
        let same = report(1, 5, &[("a", 5, 10)]);
        assert_eq!(fetched(&own, std::slice::from_ref(&same)), []);
        // Behind in what it accepted, but with the same copy.
        let own = report(2, 4, &[("a", 5, 10), ("mine", 4, 1)]);
        assert_eq!(fetched(&own, &[same]), []);
    }
}
