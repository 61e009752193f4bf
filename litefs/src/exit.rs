//! Exit codes of the `litefs` program, and which error has which.

use crate::config::ConfigError;

/// An error while running.
pub const RUNTIME: i32 = 1;
/// Bad flags or configuration.
pub const USAGE: i32 = 2;
/// The disk failed past the point of no return; a restart recovers.
pub const FATAL_DISK: i32 = 99;

/// Marks an error as a disk failure after which the process must not go on.
#[derive(Debug, thiserror::Error)]
#[error("fatal disk failure; restart to recover")]
pub struct FatalDisk(#[source] pub anyhow::Error);

/// The exit code an error ends the process with: the first of its chain that has one of its own.
#[must_use]
pub fn code_of(error: &anyhow::Error) -> i32 {
    error
        .chain()
        .find_map(|cause| {
            let is_usage = cause.is::<ConfigError>().then_some(USAGE);
            is_usage.or_else(|| cause.is::<FatalDisk>().then_some(FATAL_DISK))
        })
        .unwrap_or(RUNTIME)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context as _, anyhow};

    #[test]
    fn codes_are_found_through_context() {
        let config = ConfigError::NotFound {
            searched: Vec::new(),
        };
        assert_eq!(
            code_of(&anyhow::Error::from(config).context("mount")),
            USAGE
        );
        let disk: anyhow::Result<()> = Err(FatalDisk(anyhow!("write page 7")).into());
        let error = disk.context("commit").unwrap_err();
        assert_eq!(code_of(&error), FATAL_DISK);
        assert_eq!(
            format!("{error:#}"),
            "commit: fatal disk failure; restart to recover: write page 7"
        );
        assert_eq!(code_of(&anyhow!("other")), RUNTIME);
    }
}
