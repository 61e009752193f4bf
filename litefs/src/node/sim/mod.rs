//! Takeovers, replication and commits of a quorum in one thread, where one seed decides everything.
//!
//! ```text
//! chaos ─▶ world: time, network, machines ─▶ node, takeover, stream, commit: the shell, step by step ─▶ node::decide: as shipped
//!                                              └─▶ store: logs with a synced part     └─▶ invariants, after each step
//! ```
//! What is decided, [`decide`](super::decide) decides: the code that ships. The shell around it (tasks, threads, files, HTTP) is
//! here as a list of steps in the same order as in `election`, `roles`, `ports` and `quorum`; between any two of them a node
//! can be stopped, cut off, or die. Requests are lost, late, doubled and reordered; streams stall and break; a power cut takes
//! what was not synced.
//!
//! [`raft`] is a model of what `consensus` promises, no more: one leader in an epoch, a lease by each node's own clock that
//! ends before another is elected, a wait after a restart, changes of the voters through two sets. That `consensus` keeps this is
//! for its own simulation to show, which runs openraft itself. It cannot be run from here: there openraft's executor is another type
//! in tests, and a feature that did the same for this crate's tests would be in the daemon that the other tests start.
//!
//! What must hold is in [`invariants`], one a file; [`mutants`] are faults put in on purpose.

pub(crate) mod chaos;
pub(crate) mod client;
pub(crate) mod invariants;
pub(crate) mod members;
pub(crate) mod mutants;
pub(crate) mod plots;
pub(crate) mod raft;
pub(crate) mod role;
pub(crate) mod store;
pub(crate) mod stream;
pub(crate) mod takeover;
mod tests;
pub(crate) mod world;
