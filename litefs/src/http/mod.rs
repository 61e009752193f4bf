//! The node's HTTP API: what it answers, and how other nodes and the command line ask.

pub mod client;
pub mod info;
