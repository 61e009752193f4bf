//! Faults put in on purpose, to see that the invariants notice them.

use std::cell::Cell;

/// A rule that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The vote is not synced (INV-RAFT-1). Not found by chance: see `plots::restart`.
    VoteNotSynced,
    /// Appends to the log are not synced (INV-RAFT-1).
    LogNotSynced,
    /// A voter that starts votes and campaigns at once (INV-LEASE-2).
    NoRestartWait,
    /// A lease runs from when the answer came, as if each took 60 ms (INV-LEASE-1).
    LeaseFromAnswer,
    /// A lease is as long as the promise and half as much again (INV-LEASE-1).
    LeaseTooLong,
    /// A leader that transfers goes on until its lease ends (INV-LEASE-3).
    TransferKeepsLease,
    /// A leader that restarts goes on in its epoch.
    LeaderRestored,
    /// A node without a log votes (INV-RAFT-2).
    EmptyVotes,
    /// `elect` does not ask first, and so breaks this node's own promise.
    ElectWithoutAsking,
    /// A lease is believed after the machine was suspended.
    IgnoresSuspension,
    /// A lone leader counts on being alone while a voter is being added.
    AloneWhileGrowing,
}

thread_local! {
    static MUTANT: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Puts a fault into all nodes of this thread.
pub(crate) fn set(mutant: Option<Mutant>) {
    MUTANT.set(mutant);
}

pub(crate) fn is_on(mutant: Mutant) -> bool {
    MUTANT.get() == Some(mutant)
}
