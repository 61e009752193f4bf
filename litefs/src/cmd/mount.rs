//! `litefs mount`: runs a node.

use crate::config::{self, Env, Overrides, Resolved};
use crate::exec::{Signals, asks_to_stop};
use anyhow::Context as _;
use std::ffi::OsString;
use std::path::PathBuf;

/// Mount the directory, join the cluster, and run programs.
///
/// Settings come from litefs.yml, looked for in the current directory, the home directory, and /etc.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Config file to use instead of searching for one.
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Do not replace environment variables in the config file.
    #[arg(long)]
    no_expand_env: bool,
    /// Leave a mount that is found at the directory alone.
    #[arg(long)]
    skip_unmount: bool,
    /// Log every request to the mount.
    #[arg(long = "fuse.debug")]
    fuse_debug: bool,
    /// Log decisions.
    #[arg(long)]
    debug: bool,
    /// Log every step.
    #[arg(long)]
    tracing: bool,
    /// Program to run instead of `exec` of the config file.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Reads the configuration and hands it to `node`; returns the exit code.
pub(super) fn run(
    args: &Args,
    node: impl FnOnce(Resolved) -> anyhow::Result<i32>,
) -> anyhow::Result<i32> {
    let env = Env::from_process();
    let config = config::load(args.config.as_deref(), &args.overrides(), &env)?;
    crate::logging::init(&config)?;
    if env.get("LITEFS_CLOUD_TOKEN").is_some() {
        tracing::warn!("LITEFS_CLOUD_TOKEN has no effect: backup is not in this version");
    }
    let exit_on_error = config.exit_on_error;
    match node(config) {
        Err(error) if !exit_on_error => stay_up(&error).map(|()| crate::exit::code_of(&error)),
        end => end,
    }
}

impl Args {
    fn overrides(&self) -> Overrides {
        Overrides {
            no_expand_env: self.no_expand_env,
            fuse_debug: self.fuse_debug,
            debug: self.debug,
            tracing: self.tracing,
            skip_unmount: self.skip_unmount,
            command: self.command.clone(),
        }
    }
}

/// Waits to be told to stop, so that one can look around after a failure (`exit-on-error: false`).
fn stay_up(error: &anyhow::Error) -> anyhow::Result<()> {
    tracing::error!(
        error = format!("{error:#}"),
        "node failed; exit-on-error is false, staying up"
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut signals = Signals::install().context("install signal handlers")?;
        while !asks_to_stop(signals.recv().await) {}
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command, dashes};
    use super::*;
    use clap::Parser as _;

    fn args(line: &str) -> Args {
        let words = line.split(' ').map(OsString::from);
        match Cli::try_parse_from(dashes::normalize(words))
            .unwrap()
            .command
        {
            Command::Mount(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_of_litefs_are_taken() {
        let all = args(
            "litefs mount -config=/x.yml -no-expand-env -skip-unmount=true -fuse.debug -debug=false -tracing -- app -config y",
        );
        assert_eq!(all.config, Some("/x.yml".into()));
        assert!(all.no_expand_env && all.skip_unmount && all.fuse_debug && all.tracing);
        assert!(!all.debug);
        assert_eq!(all.command, ["app", "-config", "y"]);
        let none = args("litefs mount");
        assert!(none.config.is_none() && none.command.is_empty() && !none.no_expand_env);
    }

    #[test]
    fn the_configuration_reaches_the_node_and_its_exit_code_is_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("litefs.yml");
        std::fs::write(&path, "lease: {type: static, hostname: db1}").unwrap();
        let line = format!("litefs mount -config {} -- app", path.display());
        let code = run(&args(&line), |config| {
            assert_eq!(config.lease.hostname, "db1");
            assert_eq!(config.exec[0].argv, ["app"]);
            Ok(42)
        });
        assert_eq!(code.unwrap(), 42);
    }

    #[test]
    fn a_missing_file_is_a_usage_error() {
        let end = run(
            &args("litefs mount -config /no/such/litefs.yml"),
            |_| unreachable!(),
        );
        let error = end.unwrap_err();
        assert_eq!(crate::exit::code_of(&error), crate::exit::USAGE);
        assert!(error.to_string().contains("/no/such/litefs.yml"), "{error}");
    }
}
