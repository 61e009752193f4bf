//! What a node decides in elections, takeovers and commits of a quorum: values in, values out, no I/O, no clock, no lock.
//!
//! The node runs these as they are, and so does the simulation (`node::sim`), under every fault it knows.

pub(crate) mod acks;
pub(crate) mod backlog;
pub(crate) mod epochs;
pub(crate) mod history;
pub(crate) mod members;
mod mutation;
pub(crate) mod takeover;
