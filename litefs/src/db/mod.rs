//! One database of a node: its captured log, its page checksums and what is decided from them.
//!
//! Synchronous; whatever touches a file goes through [`crate::disk::Disk`].

pub mod log;
pub mod page_checksums;
