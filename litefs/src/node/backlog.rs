//! Commits that a majority does not have yet, where `durability: bounded` allows some.
//!
//! INV-BOUNDED-1: when a commit returns, no more than so many transactions, none older than so long, lack a majority.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::ltx::Txid;

/// Those of one database, oldest first.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    commits: VecDeque<(Txid, Instant)>,
}

impl Backlog {
    /// Learns of a commit.
    pub(super) fn add(&mut self, txid: Txid, now: Instant) {
        if self.commits.back().is_none_or(|(last, _)| *last < txid) {
            self.commits.push_back((txid, now));
        }
    }

    /// Forgets what a majority `has`.
    pub(super) fn settle(&mut self, mut has: impl FnMut(Txid) -> bool) {
        while self.commits.front().is_some_and(|(txid, _)| has(*txid)) {
            self.commits.pop_front();
        }
    }

    /// Returns whether the last commit may return.
    pub(super) fn is_within(&self, ms: u64, transactions: u64, now: Instant) -> bool {
        let is_young = |(_, since): &(Txid, Instant)| {
            now.saturating_duration_since(*since) <= Duration::from_millis(ms)
        };
        self.commits.len() as u64 <= transactions && self.commits.front().is_none_or(is_young)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_returns_within_both_bounds_only() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut backlog = Backlog::default();
        assert!(backlog.is_within(0, 0, start));
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
}
