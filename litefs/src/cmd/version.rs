//! `litefs version`.

use std::sync::LazyLock;

/// Print the version.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: &Args) -> anyhow::Result<i32> {
    println!("litefs {}", number());
    Ok(0)
}

/// The version, with the commit it was built from where the build knew it (`LITEFS_COMMIT`).
pub(super) fn number() -> &'static str {
    static NUMBER: LazyLock<String> = LazyLock::new(|| {
        let version = env!("CARGO_PKG_VERSION");
        match option_env!("LITEFS_COMMIT").filter(|commit| !commit.is_empty()) {
            Some(commit) => format!("{version} (commit {commit})"),
            None => version.to_owned(),
        }
    });
    &NUMBER
}
