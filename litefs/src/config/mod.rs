//! Configuration: what a user types (`litefs.yml`, flags, environment) and what the code uses.
//!
//! ```text
//! text --env.rs--> expanded text --file.rs--> File (all optional) --resolved.rs--> Resolved (typed, valid)
//! ```
//! Order of precedence: flags, environment (through expansion), file, default. Every default lives
//! in `resolved.rs`; every key is listed once in `keys.rs`, which also names the nearest known key
//! when a file has an unknown one. Only [`load`] touches the disk.

mod addr;
mod durability;
mod duration;
mod env;
mod error;
mod file;
mod keys;
mod proxy;
mod resolved;
mod scalar;
mod size;

use std::path::{Path, PathBuf};

pub use crate::replication::DatabaseFilter;
pub use addr::{AddrError, ListenAddr, NodeUrl};
pub use durability::{DURABILITY_REMEDY, DurabilityError, parse_durability, show_durability};
pub(crate) use duration::GoDuration;
pub use env::{Env, expand};
pub use error::ConfigError;
pub use keys::{KEYS, Key, Support};
pub use proxy::{Proxy, ProxyTarget, Redirect};
pub use resolved::{
    Data, ExecCommand, Fuse, Http, Lease, Log, LogFormat, LogLevel, Passthrough, Resolved, Role,
};

/// Command-line flags that override or complete the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `-no-expand-env`: take the file's text as it is.
    pub no_expand_env: bool,
    /// `-fuse.debug`: as `fuse.debug: true`.
    pub fuse_debug: bool,
    /// `-debug`: as `log.debug: true`, and stronger than `RUST_LOG`.
    pub debug: bool,
    /// `-tracing`: log every step, stronger than `RUST_LOG`.
    pub tracing: bool,
    /// `-skip-unmount`: leave a mount found at `fuse.dir` alone.
    pub skip_unmount: bool,
    /// `-- CMD ARGS`: replaces `exec`; empty means not given.
    pub command: Vec<std::ffi::OsString>,
}

/// Reads, expands, parses and validates the config file.
///
/// `path` is what `-config` named; without it the first of [`search_paths`] that exists is used.
/// # Errors
/// Each [`ConfigError`] says what is wrong, where, and what to write instead.
pub fn load(
    path: Option<&Path>,
    overrides: &Overrides,
    env: &Env,
) -> Result<Resolved, ConfigError> {
    let (path, text) = match path {
        Some(path) => (path.to_owned(), read(path)?),
        None => find(&search_paths(env))?,
    };
    parse(&text, overrides, env).map_err(|source| ConfigError::InFile {
        path,
        source: source.into(),
    })
}

/// Turns the text of a config file into a [`Resolved`]; [`load`] without the disk.
///
/// # Errors
/// As [`load`], without the name of the file.
pub fn parse(text: &str, overrides: &Overrides, env: &Env) -> Result<Resolved, ConfigError> {
    let expanded = match overrides.no_expand_env {
        true => text.to_owned(),
        false => expand(text, env)?,
    };
    Resolved::from_file(file::File::parse(&expanded)?, overrides, env.os_hostname())
}

/// Where a config file is looked for, in order.
#[must_use]
pub fn search_paths(env: &Env) -> Vec<PathBuf> {
    let home = env.get("HOME").filter(|home| !home.is_empty());
    let home = home.map(|home| Path::new(&home).join("litefs.yml"));
    let paths = [
        Some("litefs.yml".into()),
        home,
        Some("/etc/litefs.yml".into()),
    ];
    paths.into_iter().flatten().collect()
}

/// Parses a duration of the command line, written as in the file.
pub(crate) fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    let duration: duration::GoDuration = text
        .parse()
        .map_err(|e: duration::DurationError| e.to_string())?;
    duration
        .positive()
        .ok_or_else(|| "must be more than zero".to_owned())
}

fn find(searched: &[PathBuf]) -> Result<(PathBuf, String), ConfigError> {
    for path in searched {
        match read(path) {
            Ok(text) => return Ok((path.clone(), text)),
            Err(ConfigError::Read { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Err(ConfigError::NotFound {
        searched: searched.to_vec(),
    })
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests;
