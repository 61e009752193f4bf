//! Every key of the config file, once; and the nearest of them to a key that does not exist.

use Support::{Full, Ignored, Ours, Refused};

/// What a key does in this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Support {
    /// A key of LiteFS, with its meaning.
    Full,
    /// A key of LiteFS that has no effect here because of what else is set or left out.
    Ignored,
    /// A key of LiteFS that is refused where it would switch something on.
    Refused,
    /// A key LiteFS does not have.
    Ours,
}

/// One key of the config file.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Dotted path.
    pub path: &'static str,
    /// What it does in this version.
    pub support: Support,
}

const fn key(path: &'static str, support: Support) -> Key {
    Key { path, support }
}

/// All keys, in the order of docs/configuration.md.
pub const KEYS: &[Key] = &[
    key("exec", Full),
    key("exec.cmd", Full),
    key("exec.if-candidate", Full),
    key("exit-on-error", Full),
    key("skip-sync", Full),
    key("strict-verify", Full),
    key("data.dir", Full),
    key("data.compress", Full),
    key("data.retention", Full),
    key("data.retention-monitor-interval", Full),
    key("data.retention-size", Ours),
    key("data.retain-without-replicas", Ours),
    key("data.segment-size", Ours),
    key("fuse.dir", Full),
    key("fuse.allow-other", Full),
    key("fuse.list-virtual", Full),
    key("fuse.debug", Full),
    key("fuse.passthrough", Ours),
    key("fuse.threads", Ours),
    key("http.addr", Full),
    key("http.snapshot-timeout", Full),
    key("lease.type", Full),
    key("lease.hostname", Full),
    key("lease.advertise-url", Full),
    key("lease.candidate", Full),
    key("lease.databases", Full),
    key("lease.reconnect-delay", Full),
    key("lease.promote", Full),
    key("lease.peers", Ours),
    key("lease.ttl", Ours),
    key("lease.region", Ours),
    key("lease.priority", Ours),
    key("lease.demote-delay", Ignored),
    key("lease.consul.url", Ignored),
    key("lease.consul.key", Ignored),
    key("lease.consul.ttl", Ignored),
    key("lease.consul.lock-delay", Ignored),
    key("durability", Ours),
    key("log.format", Full),
    key("log.timestamp", Full),
    key("log.debug", Full),
    key("proxy.target", Full),
    key("proxy.addr", Full),
    key("proxy.db", Full),
    key("proxy.max-lag", Full),
    key("proxy.debug", Full),
    key("proxy.passthrough", Full),
    key("proxy.always-forward", Full),
    key("proxy.primary-redirect-timeout", Full),
    key("proxy.read-timeout", Full),
    key("proxy.write-timeout", Full),
    key("proxy.read-header-timeout", Full),
    key("proxy.idle-timeout", Full),
    key("proxy.consistency", Ours),
    key("proxy.wait-timeout", Ours),
    key("proxy.redirect", Ours),
    key("backup.type", Refused),
    key("backup.path", Ignored),
    key("backup.url", Ignored),
    key("backup.cluster", Ignored),
    key("backup.auth-token", Ignored),
    key("tracing.path", Refused),
    key("tracing.enabled", Ignored),
    key("tracing.max-size", Ignored),
    key("tracing.max-count", Ignored),
    key("tracing.compress", Ignored),
];

/// Finds the first key of `document`, in its order, that is not in [`KEYS`]; gives its dotted path.
pub(crate) fn first_unknown(document: &serde_yaml_ng::Value) -> Option<String> {
    unknown_under("", document)
}

fn unknown_under(prefix: &str, value: &serde_yaml_ng::Value) -> Option<String> {
    match value {
        serde_yaml_ng::Value::Mapping(mapping) => mapping.iter().find_map(|(name, value)| {
            let path = join(prefix, &scalar_text(name));
            if is_section(&path) {
                return unknown_under(&path, value);
            }
            (!is_key(&path)).then_some(path)
        }),
        serde_yaml_ng::Value::Sequence(items) => {
            items.iter().find_map(|item| unknown_under(prefix, item))
        }
        _ => None,
    }
}

/// The known key that `path` most resembles, by edits to the whole path or to its last word.
pub(crate) fn nearest(path: &str) -> Option<&'static str> {
    let near = |candidate: &'static str| {
        let whole = strsim::osa_distance(path, candidate);
        let word = strsim::osa_distance(last_word(path), last_word(candidate));
        // A right word in the wrong section is one more mistake than in the right one.
        let elsewhere = usize::from(section(path) != section(candidate));
        (whole.min(word + elsewhere), whole, candidate)
    };
    let sections = KEYS
        .iter()
        .map(|key| section(key.path))
        .filter(|section| !section.is_empty());
    let (distance, _, best) = KEYS
        .iter()
        .map(|key| key.path)
        .chain(sections)
        .map(near)
        .min()?;
    (distance <= 1.max(last_word(path).len() / 3)).then_some(best)
}

fn is_key(path: &str) -> bool {
    KEYS.iter().any(|key| key.path == path)
}

fn is_section(path: &str) -> bool {
    let below = |key: &Key| {
        key.path
            .strip_prefix(path)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    KEYS.iter().any(below)
}

fn section(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(section, _)| section)
}

fn last_word(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(_, word)| word)
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() {
        name.to_owned()
    } else {
        format!("{prefix}.{name}")
    }
}

/// A mapping's key as text; keys are nearly always strings.
fn scalar_text(value: &serde_yaml_ng::Value) -> String {
    match value {
        serde_yaml_ng::Value::String(text) => text.clone(),
        other => serde_yaml_ng::to_string(other)
            .unwrap_or_default()
            .trim_end()
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_key() {
        for (path, want) in [
            ("lease.typ", Some("lease.type")),
            ("leas", Some("lease")),
            ("lease.advertise_url", Some("lease.advertise-url")),
            ("advertise-url", Some("lease.advertise-url")),
            ("fuse.data", Some("data")),
            ("data.retension", Some("data.retention")),
            ("retention", Some("data.retention")),
            ("lease.consul.lockdelay", Some("lease.consul.lock-delay")),
            ("exec.command", None),
            ("exec.if_candidate", Some("exec.if-candidate")),
            ("exit_on_error", Some("exit-on-error")),
            ("completely-different", None),
            ("", None),
        ] {
            assert_eq!(nearest(path), want, "{path}");
        }
    }
}
