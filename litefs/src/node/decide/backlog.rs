//! Commits that a majority does not have yet, where `durability: bounded` allows some.
//!
//! INV-BOUNDED-1: when a commit returns, no more than so many transactions, none older than so long, lack a majority. What was
//! there before those that are counted here, from an older tenure or another durability, counts too: a majority must have it.
//! Who acknowledges has it if the position is one of those counted, since a shorter history need not be the beginning of ours.

use std::collections::VecDeque;
use std::time::Duration;

use super::mutation::mutated;
use crate::ltx::{Pos, Txid};

/// Those of one database in one tenure, oldest first. Times are since some moment, the same for all.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    commits: VecDeque<(Pos, Duration)>,
    /// The last one that was counted.
    last: Txid,
    /// What came before, uncounted, and may lack a majority.
    older: Option<Txid>,
}

impl Backlog {
    /// Learns of a commit.
    pub(crate) fn add(&mut self, pos: Pos, now: Duration) {
        if pos.txid <= self.last {
            return;
        }
        let before = pos.txid.prev();
        if before != self.last && !mutated!(BacklogBeginsEmpty) {
            self.older = Some(before);
        }
        self.last = pos.txid;
        self.commits.push_back((pos, now));
    }

    /// Forgets what a majority `has`, which is asked for a transaction and told which positions are in this history.
    pub(crate) fn settle(&mut self, mut has: impl FnMut(Txid, &dyn Fn(Pos) -> bool) -> bool) {
        let commits = &self.commits;
        let is_ours = |pos: Pos| {
            let found = commits.binary_search_by_key(&pos.txid, |(known, _)| known.txid);
            found.is_ok_and(|i| commits[i].0 == pos)
        };
        let older = self.older.filter(|txid| !has(*txid, &is_ours));
        let settled = commits
            .iter()
            .take_while(|(pos, _)| has(pos.txid, &is_ours));
        let settled = settled.count();
        self.older = older;
        self.commits.drain(..settled);
    }

    /// Returns whether the last commit may return.
    pub(crate) fn is_within(&self, ms: u64, transactions: u64, now: Duration) -> bool {
        let is_young =
            |(_, since): &(Pos, Duration)| now.saturating_sub(*since) <= Duration::from_millis(ms);
        self.older.is_none()
            && self.commits.len() as u64 <= transactions
            && self.commits.front().is_none_or(is_young)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn pos(txid: u64) -> Pos {
        Pos {
            txid: Txid(txid),
            post_apply_checksum: crate::ltx::Checksum::new(txid),
        }
    }

    /// Has it settled by a majority that has all up to a position.
    fn settle(backlog: &mut Backlog, by: Pos) {
        backlog.settle(|txid, is_ours| by.txid >= txid && is_ours(by));
    }

    #[test]
    fn a_commit_returns_within_both_bounds_only() {
        let mut backlog = Backlog::default();
        assert!(backlog.is_within(0, 0, at(0)));
        for n in 1..=3 {
            backlog.add(pos(n), at(n * 10));
        }
        backlog.add(pos(3), at(500)); // known already
        assert!(backlog.is_within(100, 3, at(110)));
        assert!(!backlog.is_within(100, 2, at(110)), "three of two");
        assert!(!backlog.is_within(100, 3, at(111)), "the first is older");
        settle(&mut backlog, pos(1));
        assert!(backlog.is_within(100, 2, at(120)));
        settle(&mut backlog, pos(3));
        assert!(backlog.is_within(0, 0, at(9999)));
    }

    #[test]
    fn what_came_before_the_first_that_is_counted_must_be_had() {
        let mut backlog = Backlog::default();
        backlog.add(pos(100), at(0));
        assert!(!backlog.is_within(500, 9, at(1)), "99 others");
        settle(&mut backlog, pos(99));
        assert!(!backlog.is_within(500, 9, at(1)), "of this history or not");
        settle(&mut backlog, pos(100));
        assert!(backlog.is_within(0, 0, at(1)));
        // Commits in between that waited for nobody.
        backlog.add(pos(103), at(2));
        assert!(!backlog.is_within(500, 9, at(3)));
        settle(&mut backlog, pos(103));
        assert!(backlog.is_within(500, 9, at(3)));
    }

    #[test]
    fn a_shorter_history_that_is_another_settles_nothing() {
        let mut backlog = Backlog::default();
        for n in 1..=3 {
            backlog.add(pos(n), at(0));
        }
        let other = Pos {
            post_apply_checksum: crate::ltx::Checksum::new(9),
            ..pos(2)
        };
        settle(&mut backlog, other);
        assert!(!backlog.is_within(500, 2, at(1)));
        settle(&mut backlog, pos(2));
        assert!(backlog.is_within(500, 1, at(1)));
    }
}
