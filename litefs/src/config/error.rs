//! Why a configuration is refused: what, where, and what to do about it.

use std::path::PathBuf;

/// A configuration that cannot be used; the program exits with code 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// None of the searched files exists.
    #[error(
        "no config file found (searched {}): create one, or name it with -config PATH",
        list(searched)
    )]
    NotFound {
        /// The files looked for, in order.
        searched: Vec<PathBuf>,
    },
    /// A config file exists or was named but cannot be read.
    #[error("read config file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: std::io::Error,
    },
    /// The text of a file is refused; the source says why.
    #[error("config file {}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        #[source]
        source: Box<ConfigError>,
    },
    /// A `${...}` that is not one of the known forms.
    #[error(
        "line {line}: cannot expand `{expr}`: write $NAME, ${{NAME}}, ${{NAME == 'text'}} or \
         ${{NAME == OTHER}} (!= works too), $$ for a dollar sign, or use -no-expand-env"
    )]
    Expand {
        /// Line in the file, from 1.
        line: usize,
        /// The text that is not understood.
        expr: String,
    },
    /// Not YAML, or a value of the wrong kind.
    #[error("{}{problem}", at(*line))]
    Yaml {
        /// Line in the file, from 1.
        line: Option<usize>,
        /// The parser's words; they start with the dotted key when it is known.
        problem: String,
    },
    /// A key that does not exist.
    #[error("{}unknown key `{key}`: {}", at(*line), suggestion(*nearest))]
    UnknownKey {
        /// Dotted path.
        key: String,
        /// Line in the file, from 1.
        line: Option<usize>,
        /// The known key it resembles most, if any does.
        nearest: Option<&'static str>,
    },
    /// A value that cannot be used.
    #[error("{key}: {problem}: {remedy}")]
    Setting {
        /// Dotted path.
        key: &'static str,
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A setting of LiteFS that would have an effect we do not have yet.
    #[error("{key}: {feature} is not in this version: {remedy}")]
    NotInThisVersion {
        /// Dotted path.
        key: &'static str,
        /// What it would have switched on.
        feature: &'static str,
        /// What to do.
        remedy: &'static str,
    },
}

impl ConfigError {
    pub(crate) fn setting(
        key: &'static str,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Setting {
            key,
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}

fn at(line: Option<usize>) -> String {
    line.map(|line| format!("line {line}: "))
        .unwrap_or_default()
}

fn suggestion(nearest: Option<&str>) -> String {
    match nearest {
        Some(key) => format!("did you mean `{key}`?"),
        None => "see docs/configuration.md for all keys".to_owned(),
    }
}

fn list(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}
