//! Tests against the real things: SQLite, and other programs that read what we write.

#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod cli_cluster;
mod clients;
mod crash;
mod election;
mod faults;
mod harness;
mod history;

mod litestream;
mod lost;
mod modes;
mod nobody;
mod nodes;
mod power;
mod proxy;
mod recovery;
mod roles;
mod scale;
mod survivors;
mod tools;

use std::path::PathBuf;

/// Finds a program by the path in `$variable`, in `$PATH`, or in target/tools/bin, in this order;
/// where there is none, says that the test is skipped.
fn find_program(name: &str, variable: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tools = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("../tools/bin");
    let found = named.into_iter().chain(
        std::env::split_paths(&path)
            .chain([tools])
            .map(|dir| dir.join(name)),
    );
    let found = found.into_iter().find(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: no {name} in ${variable}, $PATH or target/tools/bin");
    }
    found
}
