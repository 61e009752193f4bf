//! Breaks clusters of real litefs nodes under real SQLite clients, and checks what the clients saw.
//!
//! ```text
//! cli -> matrix -> run -> nemesis -> cluster -> os      what is built and broken
//!                   |                   '-> client -> workload     a process on each node
//!                   '-> history -> checker              what is judged, by nothing but what clients saw
//! ```

#![allow(
    clippy::disallowed_methods,
    reason = "the suite is no part of litefs: what it writes need not survive anything"
)]

pub mod checker;
pub mod cli;
pub mod history;

mod client;
mod cluster;
mod dice;
mod interrupt;
mod matrix;
mod nemesis;
mod os;
mod run;
mod workload;

pub use workload::Content;
