//! `litefs.yml` as users type it: every value optional, nothing decided yet.
//!
//! A key that is present without a value counts as absent, as in LiteFS. Keys without effect in this
//! version are parsed all the same, so that their mistakes are found.

use super::duration::GoDuration;
use super::scalar::Flag;
use super::size::ByteSize;
use super::{ConfigError, keys};
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct File {
    pub(crate) exec: Option<Exec>,
    pub(crate) exit_on_error: Option<Flag>,
    pub(crate) skip_sync: Option<Flag>,
    pub(crate) strict_verify: Option<Flag>,
    pub(crate) data: Option<Data>,
    pub(crate) fuse: Option<Fuse>,
    pub(crate) http: Option<Http>,
    pub(crate) lease: Option<Lease>,
    pub(crate) durability: Option<String>,
    pub(crate) log: Option<Log>,
    pub(crate) proxy: Option<Proxy>,
    pub(crate) backup: Option<Backup>,
    pub(crate) tracing: Option<Tracing>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Data {
    pub(crate) dir: Option<String>,
    pub(crate) compress: Option<Flag>,
    pub(crate) retention: Option<GoDuration>,
    pub(crate) retention_monitor_interval: Option<GoDuration>,
    pub(crate) retention_size: Option<ByteSize>,
    pub(crate) retain_without_replicas: Option<Flag>,
    pub(crate) segment_size: Option<ByteSize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Fuse {
    pub(crate) dir: Option<String>,
    pub(crate) allow_other: Option<Flag>,
    pub(crate) debug: Option<Flag>,
    pub(crate) list_virtual: Option<Flag>,
    pub(crate) passthrough: Option<String>,
    pub(crate) threads: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Http {
    pub(crate) addr: Option<String>,
    pub(crate) snapshot_timeout: Option<GoDuration>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Lease {
    pub(crate) r#type: Option<String>,
    pub(crate) hostname: Option<String>,
    pub(crate) advertise_url: Option<String>,
    pub(crate) candidate: Option<Flag>,
    pub(crate) promote: Option<Flag>,
    pub(crate) reconnect_delay: Option<GoDuration>,
    pub(crate) demote_delay: Option<GoDuration>,
    pub(crate) databases: Option<Vec<String>>,
    pub(crate) peers: Option<Vec<String>>,
    pub(crate) ttl: Option<GoDuration>,
    pub(crate) region: Option<String>,
    pub(crate) priority: Option<u32>,
    pub(crate) consul: Option<Consul>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Consul {
    pub(crate) url: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) ttl: Option<GoDuration>,
    pub(crate) lock_delay: Option<GoDuration>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Log {
    pub(crate) format: Option<String>,
    pub(crate) timestamp: Option<Flag>,
    pub(crate) debug: Option<Flag>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Proxy {
    pub(crate) addr: Option<String>,
    pub(crate) target: Option<String>,
    pub(crate) db: Option<Names>,
    pub(crate) max_lag: Option<GoDuration>,
    pub(crate) debug: Option<Flag>,
    pub(crate) passthrough: Option<Vec<String>>,
    pub(crate) always_forward: Option<Vec<String>>,
    pub(crate) primary_redirect_timeout: Option<GoDuration>,
    pub(crate) read_timeout: Option<GoDuration>,
    pub(crate) write_timeout: Option<GoDuration>,
    pub(crate) read_header_timeout: Option<GoDuration>,
    pub(crate) idle_timeout: Option<GoDuration>,
    pub(crate) consistency: Option<String>,
    pub(crate) wait_timeout: Option<GoDuration>,
    pub(crate) redirect: Option<String>,
}

/// `proxy.db`: one name, or a list of names and patterns.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Names {
    One(String),
    Several(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Backup {
    pub(crate) r#type: Option<String>,
    pub(crate) path: Option<String>,
    pub(crate) url: Option<String>,
    pub(crate) cluster: Option<String>,
    pub(crate) auth_token: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Tracing {
    pub(crate) enabled: Option<Flag>,
    pub(crate) path: Option<String>,
    pub(crate) max_size: Option<i64>,
    pub(crate) max_count: Option<i64>,
    pub(crate) compress: Option<Flag>,
}

/// `exec`: one command line, or a list of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Exec(pub(crate) Vec<ExecLine>);

/// One entry of `exec`.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct ExecLine {
    pub(crate) cmd: String,
    #[serde(deserialize_with = "flag")]
    pub(crate) if_candidate: bool,
}

impl File {
    /// Parses the expanded text of a config file; an empty file has no key set.
    pub(crate) fn parse(text: &str) -> Result<Self, ConfigError> {
        match serde_yaml_ng::from_str::<Option<Self>>(text) {
            Ok(file) => Ok(file.unwrap_or_default()),
            Err(error) => Err(explain(text, &error)),
        }
    }
}

/// Says which key is unknown, where there is one; the parser's own words otherwise.
fn explain(text: &str, error: &serde_yaml_ng::Error) -> ConfigError {
    let document = match serde_yaml_ng::from_str(text) {
        Ok(document) => document,
        // Not even YAML: better than what the typed reader stumbled over first.
        Err(syntax) => return yaml(&syntax),
    };
    let Some(key) = keys::first_unknown(&document) else {
        return yaml(error);
    };
    // The reader stops at the first mistake, which need not be this key.
    let is_this_key = error.to_string().contains("unknown field");
    let line = error
        .location()
        .filter(|_| is_this_key)
        .map(|location| location.line());
    let nearest = keys::nearest(&key);
    ConfigError::UnknownKey { key, line, nearest }
}

/// Moves the line from the end of the parser's words to the front, where it stands there.
fn yaml(error: &serde_yaml_ng::Error) -> ConfigError {
    let words = error.to_string();
    let place = error.location().map(|at| (at.line(), at.column()));
    let suffix = place.map(|(line, column)| format!(" at line {line} column {column}"));
    match suffix.and_then(|suffix| words.strip_suffix(&suffix)) {
        Some(problem) => ConfigError::Yaml {
            line: place.map(|(line, _)| line),
            problem: problem.to_owned(),
        },
        None => ConfigError::Yaml {
            line: None,
            problem: words,
        },
    }
}

fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::<Flag>::deserialize(deserializer)?.is_some_and(|flag| flag.0))
}

impl<'de> Deserialize<'de> for Exec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ExecVisitor)
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NamesVisitor)
    }
}

struct NamesVisitor;

impl<'de> Visitor<'de> for NamesVisitor {
    type Value = Names;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a name in quotes, or a list of names")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Names, E> {
        Ok(Names::One(name.to_owned()))
    }

    fn visit_u64<E: de::Error>(self, name: u64) -> Result<Names, E> {
        Ok(Names::One(name.to_string()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Names, A::Error> {
        let mut names = Vec::new();
        while let Some(name) = list.next_element()? {
            names.push(name);
        }
        Ok(Names::Several(names))
    }
}

struct ExecVisitor;

impl<'de> Visitor<'de> for ExecVisitor {
    type Value = Exec;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a command line, or a list of `- cmd: \"COMMAND LINE\"`")
    }

    fn visit_str<E: de::Error>(self, cmd: &str) -> Result<Exec, E> {
        if cmd.trim().is_empty() {
            return Ok(Exec::default());
        }
        Ok(Exec(vec![ExecLine {
            cmd: cmd.to_owned(),
            if_candidate: false,
        }]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Exec, A::Error> {
        let mut lines = Vec::new();
        while let Some(line) = list.next_element()? {
            lines.push(line);
        }
        Ok(Exec(lines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(text: &str) -> Vec<(String, bool)> {
        let lines = File::parse(text).unwrap().exec.unwrap_or_default().0;
        lines
            .into_iter()
            .map(|line| (line.cmd, line.if_candidate))
            .collect()
    }

    fn error(text: &str) -> String {
        File::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn config_empty_exec() {
        assert_eq!(exec("exec:\n"), []);
        assert_eq!(exec("exec: ''\n"), []);
        assert_eq!(exec("exec: []\n"), []);
    }

    #[test]
    fn config_inline_exec() {
        assert_eq!(exec("exec: run me"), [("run me".to_owned(), false)]);
    }

    #[test]
    fn config_single_exec() {
        assert_eq!(
            exec("exec:\n  - cmd: run me\n"),
            [("run me".to_owned(), false)]
        );
    }

    #[test]
    fn config_multi_exec() {
        let text = "exec:\n  - cmd: run me\n    if-candidate: true\n  - cmd: then me\n";
        assert_eq!(
            exec(text),
            [("run me".to_owned(), true), ("then me".to_owned(), false)]
        );
    }

    #[test]
    fn scalars_are_read_as_go_reads_them() {
        let text =
            "lease: {hostname: 148, candidate: no, promote: On}\nproxy: {addr: 1e3}\nhttp:\n";
        let file = File::parse(text).unwrap();
        let lease = file.lease.unwrap();
        assert_eq!(lease.hostname.as_deref(), Some("148"));
        assert_eq!(
            (lease.candidate, lease.promote),
            (Some(Flag(false)), Some(Flag(true)))
        );
        assert_eq!(file.proxy.unwrap().addr.as_deref(), Some("1e3"));
        assert!(file.http.is_none());
    }

    #[test]
    fn an_empty_file_has_no_key_set() {
        for text in ["", "\n# nothing\n", "---\n"] {
            assert!(File::parse(text).unwrap().data.is_none(), "{text:?}");
        }
    }

    #[test]
    fn unmarshal_config_unknown_field_is_named_with_its_line_and_nearest_key() {
        for (text, want) in [
            (
                "data:\n  dir: /a\n  unknown: true\n",
                "line 3: unknown key `data.unknown`: see docs/configuration.md for all keys",
            ),
            (
                "lease:\n  typ: static\n",
                "line 2: unknown key `lease.typ`: did you mean `lease.type`?",
            ),
            (
                "skip_sync: true\n",
                "line 1: unknown key `skip_sync`: did you mean `skip-sync`?",
            ),
            (
                "exec:\n  - cmd: x\n    if_candidate: true\n",
                "line 3: unknown key `exec.if_candidate`: did you mean `exec.if-candidate`?",
            ),
            (
                "lease:\n  consul:\n    tll: 10s\n",
                "line 3: unknown key `lease.consul.tll`: did you mean `lease.consul.ttl`?",
            ),
            (
                "\n\nretention: 5m\n",
                "line 3: unknown key `retention`: did you mean `data.retention`?",
            ),
        ] {
            assert_eq!(error(text), want);
        }
    }

    #[test]
    fn wrong_values_name_their_key_and_line() {
        for (text, want) in [
            (
                "data:\n  retention: 10\n",
                "line 2: data.retention: `10` is not a duration: write a number and a unit (ns, us, ms, s, m, h), such as 10s, 1m30s or 250ms",
            ),
            (
                "skip-sync: maybe\n",
                "line 1: skip-sync: `maybe` is neither true nor false",
            ),
            (
                "data:\n  segment-size: big\n",
                "line 2: data.segment-size: `big` is not a size: write bytes, such as 4096, 16MB (16,000,000) or 16MiB (16,777,216)",
            ),
            (
                "fuse:\n  threads: many\n",
                "line 2: fuse.threads: invalid type: string \"many\", expected u16",
            ),
            (
                "fuse: 3\n",
                "line 1: fuse: invalid type: integer `3`, expected struct Fuse",
            ),
            (
                "exec: {cmd: x}\n",
                "line 1: exec: invalid type: map, expected a command line, or a list of `- cmd: \"COMMAND LINE\"`",
            ),
            (
                "a: [\n",
                "did not find expected node content at line 2 column 1, while parsing a flow node",
            ),
            ("data: {}\ndata: {}\n", "duplicate entry with key \"data\""),
        ] {
            assert_eq!(error(text), want);
        }
    }

    #[test]
    fn every_listed_key_exists() {
        for key in keys::KEYS {
            let text = match key.path.strip_prefix("exec.") {
                Some(word) => format!("exec: [{{{word}: }}]"),
                None => {
                    let words: Vec<_> = key.path.split('.').collect();
                    format!("{}: {}", words.join(": {"), "}".repeat(words.len() - 1))
                }
            };
            // `cmd` alone must not be empty; every other key may be.
            if let Err(error) = File::parse(&text) {
                assert!(
                    !error.to_string().contains("unknown"),
                    "{}: {error}",
                    key.path
                );
            }
        }
    }
}
