//! Faults put in on purpose, to see that the invariants notice them.
//!
//! `tests` says which are found by how many seeds; docs/TESTING.md has the table. Not found:
//! - `AcceptedLate` is covered twice: who accepts tells only who leads now, and only if no newer election is known, while a
//!   fence is answered only once its election is known; so no old primary ever counts it. And what is noted late is true:
//!   all that tenure began with was on disk;
//! - `ToldToTheOld`, the other half: nothing is left to be told, as nothing is accepted after a fence.
//!
//! Both together should be found, and are not yet.

use std::cell::Cell;

/// A rule that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// A node takes what an older tenure sends.
    LowerEpochTaken,
    /// The first report with a database decides about it, not the most advanced one.
    FirstReport,
    /// Which tenure a node accepted is not looked at when a copy is chosen, nor the tenure of the last transaction.
    TxidOnly,
    /// As it was: a copy of pages counts as being of the tenure of the log that it replaced.
    CopyKeepsEpoch,
    /// As it was: a compacted range counts as being of the tenure of what came before, also where the history ends.
    CompactedKeepsEpoch,
    /// Acknowledgements of an older tenure of the same primary count.
    OldTenureAcks,
    /// Acknowledgements count from voters that lack what the tenure began with.
    UnacceptedCounts,
    /// As it was: an acknowledgement counts by its TXID, whatever history it is of.
    AckByTxid,
    /// A tenure does not end with its lease.
    LeaseIgnored,
    /// As it was: a tenure is accepted although a newer one has been seen meanwhile.
    AcceptedLate,
    /// As it was: a commit that was logged after its node was fenced is acknowledged.
    CommitAfterFence,
    /// As it was: a database is given back to its writers although the node was fenced meanwhile.
    ReopenedAfterFence,
    /// As it was: a winner waits for a position that the other node has left behind, or lost.
    WaitsForever,
    /// That a tenure is accepted is told to who led it, whoever was elected meanwhile. Does no harm by itself.
    ToldToTheOld,
    /// As it was: that a tenure is accepted is told once, not again after a restart.
    ToldOnce,
    /// As it was: what came as a copy of pages is never acknowledged as being on disk.
    CopyNotAcked,
    /// As it was: what was there before a connection is never acknowledged as being on disk.
    RestartNotAcked,
    /// As it was: who tried to give the role away does not act any more, although nothing came of it.
    GivenUpForNothing,
    /// As it was: what a bound allows begins anew with each tenure, and with each change of the durability.
    BacklogBeginsEmpty,
    /// A bound is not looked at.
    BoundIgnored,
    /// As it was: voters change whatever the new ones have on disk.
    NoBarrier,
    /// The winner asks nobody.
    FenceSkipped,
    /// The winner asks, and goes on with what a minority said.
    MinorityFenced,
    /// Writes are opened before what is newer elsewhere is here.
    OpensBeforeFetch,
    /// An acknowledgement is sent before the sync.
    AckBeforeSync,
    /// The primary counts itself before it has synced.
    OwnLogNotSynced,
    /// The epoch that was accepted is forgotten in a restart.
    AcceptedForgotten,
    /// A branch that lost is not kept.
    BranchDropped,
    /// A machine whose disk was lost comes back as the node it was, vote included.
    EmptyDiskKeepsId,
}

/// All of them, to be named from outside.
pub(crate) const ALL: [Mutant; 29] = [
    Mutant::LowerEpochTaken,
    Mutant::FirstReport,
    Mutant::TxidOnly,
    Mutant::CopyKeepsEpoch,
    Mutant::CompactedKeepsEpoch,
    Mutant::OldTenureAcks,
    Mutant::UnacceptedCounts,
    Mutant::AckByTxid,
    Mutant::LeaseIgnored,
    Mutant::AcceptedLate,
    Mutant::CommitAfterFence,
    Mutant::ReopenedAfterFence,
    Mutant::WaitsForever,
    Mutant::ToldToTheOld,
    Mutant::ToldOnce,
    Mutant::CopyNotAcked,
    Mutant::RestartNotAcked,
    Mutant::GivenUpForNothing,
    Mutant::BacklogBeginsEmpty,
    Mutant::BoundIgnored,
    Mutant::NoBarrier,
    Mutant::FenceSkipped,
    Mutant::MinorityFenced,
    Mutant::OpensBeforeFetch,
    Mutant::AckBeforeSync,
    Mutant::OwnLogNotSynced,
    Mutant::AcceptedForgotten,
    Mutant::BranchDropped,
    Mutant::EmptyDiskKeepsId,
];

thread_local! {
    static MUTANTS: Cell<u64> = const { Cell::new(0) };
}

/// Puts faults into all nodes of this thread, in place of those before.
pub(crate) fn set(mutants: &[Mutant]) {
    MUTANTS.set(mutants.iter().fold(0, |all, m| all | 1 << *m as u64));
}

pub(crate) fn is_on(mutant: Mutant) -> bool {
    MUTANTS.get() & 1 << mutant as u64 != 0
}
