//! A cluster in one thread, where one seed decides everything: when messages arrive, which are lost, who crashes
//! and what of his disk survives, whose clock runs fast.
//!
//! Nodes run the code that ships, openraft included. Under them are simulated: the executor's notion of a node
//! ([`runtime`]: a node can be stopped or killed between any two polls of its tasks, and has a clock of its
//! own), time (tokio's paused clock), randomness, the network ([`net`]) and the disk ([`disk`]).
//! [`world`] puts nodes together for tests with a plot, [`chaos`] does random things to them; what must hold
//! then is in [`invariants`], one a file. [`mutants`] are faults put in on purpose, to see that these notice.

pub(crate) mod chaos;
pub(crate) mod disk;
pub(crate) mod invariants;
pub(crate) mod mutants;
pub(crate) mod net;
mod plots;
pub(crate) mod runtime;
mod tests;
pub(crate) mod watch;
pub(crate) mod world;
