//! Whether a majority of the voters has a commit on disk.
//!
//! What holds:
//! - INV-QUORUM-1: an acknowledgement counts only if it was given in the primary's own tenure, for bytes on disk, by a voter
//!   that had all this tenure began with (INV-TAKEOVER-1 rests on it), and is of the primary's own history.

use std::collections::{BTreeSet, HashMap};

use super::mutation::mutated;
use crate::ltx::{Pos, Txid};
use crate::replication::DbName;

/// Who has what, in one tenure.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    /// Tenure of which the rest is.
    epoch: u64,
    /// Voters that had all that this tenure began with.
    accepted: BTreeSet<u64>,
    durable: HashMap<DbName, HashMap<u64, Pos>>,
}

impl Acks {
    /// Returns those of a tenure, unless it is older than the newest.
    fn of(&mut self, epoch: u64) -> Option<&mut Acks> {
        if epoch > self.epoch && mutated!(OldTenureAcks) {
            self.epoch = epoch;
        } else if epoch > self.epoch {
            *self = Acks {
                epoch,
                ..Acks::default()
            };
        }
        (epoch == self.epoch).then_some(self)
    }

    /// Learns that a node has, on disk, all that a tenure began with.
    pub(crate) fn accepted(&mut self, node: u64, epoch: u64) {
        if let Some(acks) = self.of(epoch) {
            acks.accepted.insert(node);
        }
    }

    /// Learns where a node's copy is on disk, over a stream of a tenure.
    pub(crate) fn acked(&mut self, node: u64, epoch: u64, db: &DbName, durable: Pos) {
        if let Some(acks) = self.of(epoch) {
            let of_db = acks.durable.entry(db.clone()).or_default();
            of_db.insert(node, durable);
        }
    }

    /// Returns who has a transaction of the history of a tenure's primary; `here` is that node, if it counts. `is_ours` says
    /// whether a position is in that history, for those that are not before the transaction.
    ///
    /// Who accepted a tenure may still have another history, of a database that this tenure's primary had not heard of then: one
    /// that is as long, or longer.
    pub(crate) fn holders(
        &mut self,
        epoch: u64,
        db: &DbName,
        txid: Txid,
        is_ours: impl Fn(Pos) -> bool,
        here: Option<u64>,
    ) -> BTreeSet<u64> {
        let Some(acks) = self.of(epoch) else {
            return BTreeSet::new();
        };
        let has =
            |durable: &Pos| durable.txid >= txid && (is_ours(*durable) || mutated!(AckByTxid));
        let has_say = |node: &u64| acks.accepted.contains(node) || mutated!(UnacceptedCounts);
        let others = acks.durable.get(db).into_iter().flatten();
        others
            .filter(|(node, durable)| has(durable) && has_say(node))
            .map(|(node, _)| *node)
            .chain(here)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pos(txid: u64) -> Pos {
        Pos {
            txid: Txid(txid),
            post_apply_checksum: crate::ltx::Checksum::new(txid),
        }
    }

    fn who_has(acks: &mut Acks, epoch: u64, pos: Pos, here: Option<u64>) -> BTreeSet<u64> {
        let db: DbName = "a.db".parse().unwrap();
        acks.holders(epoch, &db, pos.txid, |p| p == pos, here)
    }

    #[test]
    fn what_was_acknowledged_in_another_tenure_does_not_count() {
        let mut acks = Acks::default();
        let db: DbName = "a.db".parse().unwrap();
        acks.accepted(7, 3);
        acks.acked(7, 3, &db, pos(100));
        assert_eq!(who_has(&mut acks, 3, pos(100), Some(1)), [1, 7].into());
        assert_eq!(who_has(&mut acks, 5, pos(100), Some(1)), [1].into());
        acks.accepted(8, 3);
        acks.acked(8, 3, &db, pos(100));
        let over = who_has(&mut acks, 3, pos(100), Some(1));
        assert!(over.is_empty(), "a tenure that is over");
        assert_eq!(who_has(&mut acks, 5, pos(100), None), [].into());
    }

    #[test]
    fn a_voter_that_lacks_what_the_tenure_began_with_does_not_count() {
        let mut acks = Acks::default();
        let db: DbName = "a.db".parse().unwrap();
        acks.acked(7, 3, &db, pos(100));
        assert!(who_has(&mut acks, 3, pos(100), None).is_empty());
        acks.accepted(7, 3);
        assert_eq!(who_has(&mut acks, 3, pos(100), None), [7].into());
        assert!(who_has(&mut acks, 3, pos(101), None).is_empty());
    }

    #[test]
    fn a_position_in_another_history_does_not_count() {
        let mut acks = Acks::default();
        let db: DbName = "a.db".parse().unwrap();
        acks.accepted(7, 3);
        acks.acked(7, 3, &db, pos(100));
        let other = Pos {
            post_apply_checksum: crate::ltx::Checksum::new(9),
            ..pos(100)
        };
        assert!(who_has(&mut acks, 3, other, None).is_empty());
        assert!(who_has(&mut acks, 3, pos(99), None).is_empty());
        let ours = [pos(99), pos(100), pos(101)];
        let of = |acks: &mut Acks, ours: &[Pos]| {
            acks.holders(3, &db, Txid(99), |p| ours.contains(&p), None)
        };
        assert_eq!(
            of(&mut acks, &ours),
            [7].into(),
            "one of those before the last"
        );
        let of_others = of(&mut acks, &[pos(99), other, pos(101)]);
        assert!(of_others.is_empty(), "shorter than ours, and another");
    }
}
