//! Commits that a majority does not have yet, where `durability: bounded` allows some.
//!
//! INV-BOUNDED-1: when a commit returns, no more than so many transactions, none older than so long, lack a majority. What was
//! there before those that are counted here, from an older tenure or another durability, counts too: a majority must have it.

use std::collections::VecDeque;
use std::time::Duration;

use super::mutation::mutated;
use crate::ltx::Txid;

/// Those of one database in one tenure, oldest first. Times are since some moment, the same for all.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    commits: VecDeque<(Txid, Duration)>,
    /// The last one that was counted.
    last: Txid,
    /// What came before, uncounted, and may lack a majority.
    older: Option<Txid>,
}

impl Backlog {
    /// Learns of a commit.
    pub(crate) fn add(&mut self, txid: Txid, now: Duration) {
        if txid <= self.last {
            return;
        }
        let before = txid.prev();
        if before != self.last && !mutated!(BacklogBeginsEmpty) {
            self.older = Some(before);
        }
        self.last = txid;
        self.commits.push_back((txid, now));
    }

    /// Forgets what a majority `has`.
    pub(crate) fn settle(&mut self, mut has: impl FnMut(Txid) -> bool) {
        self.older = self.older.filter(|txid| !has(*txid));
        while self.commits.front().is_some_and(|(txid, _)| has(*txid)) {
            self.commits.pop_front();
        }
    }

    /// Returns whether the last commit may return.
    pub(crate) fn is_within(&self, ms: u64, transactions: u64, now: Duration) -> bool {
        let is_young = |(_, since): &(Txid, Duration)| {
            now.saturating_sub(*since) <= Duration::from_millis(ms)
        };
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

    #[test]
    fn a_commit_returns_within_both_bounds_only() {
        let mut backlog = Backlog::default();
        assert!(backlog.is_within(0, 0, at(0)));
        for n in 1..=3 {
            backlog.add(Txid(n), at(n * 10));
        }
        backlog.add(Txid(3), at(500)); // known already
        assert!(backlog.is_within(100, 3, at(110)));
        assert!(!backlog.is_within(100, 2, at(110)), "three of two");
        assert!(!backlog.is_within(100, 3, at(111)), "the first is older");
        backlog.settle(|txid| txid <= Txid(1));
        assert!(backlog.is_within(100, 2, at(120)));
        backlog.settle(|_| true);
        assert!(backlog.is_within(0, 0, at(9999)));
    }

    #[test]
    fn what_came_before_the_first_that_is_counted_must_be_had() {
        let mut backlog = Backlog::default();
        backlog.add(Txid(100), at(0));
        assert!(!backlog.is_within(500, 9, at(1)), "99 others");
        backlog.settle(|txid| txid <= Txid(98));
        assert!(!backlog.is_within(500, 9, at(1)), "one of them");
        backlog.settle(|txid| txid <= Txid(99));
        assert!(backlog.is_within(500, 9, at(1)));
        // Commits in between that waited for nobody.
        backlog.add(Txid(103), at(2));
        assert!(!backlog.is_within(500, 9, at(3)));
        backlog.settle(|txid| txid <= Txid(102));
        assert!(backlog.is_within(500, 9, at(3)));
    }
}
