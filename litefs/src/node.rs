//! One running node: store, mount, API and programs, from start to end.

use crate::config::Resolved;

/// Runs a node until it is told to stop or its program ends; returns the exit code.
///
/// # Errors
/// Whatever keeps the node from starting or running; `crate::exit::code_of` maps it.
pub fn run(config: Resolved) -> anyhow::Result<i32> {
    drop(config);
    anyhow::bail!("not wired yet")
}
