//! Flags as LiteFS takes them, rewritten to what clap takes.
//!
//! | written | becomes |
//! |---|---|
//! | `-config x`, `-config=x` | `--config x`, `--config=x` |
//! | `-promote=true`, `-promote=false` | `--promote`, nothing |

use std::ffi::OsString;

/// Flags with a value.
const VALUED: [&str; 15] = [
    "config",
    "consistency",
    "db",
    "dir",
    "durability",
    "handoffs",
    "kills",
    "name",
    "nodes",
    "pos",
    "timeout",
    "to",
    "url",
    "wait",
    "with-halt-lock-on",
];

/// Flags without. `-v` is short and needs no change.
const SWITCHES: [&str; 11] = [
    "debug",
    "fuse.debug",
    "help",
    "if-candidate",
    "json",
    "no-expand-env",
    "promote",
    "skip-unmount",
    "tracing",
    "verbose",
    "version",
];

/// Rewrites known flags, up to the first `--`; leaves everything else as it is.
pub(super) fn normalize(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut is_ours = true;
    let rewritten = |arg: OsString| {
        is_ours &= arg != "--";
        match arg.to_str().filter(|_| is_ours) {
            Some(text) => rewrite(text),
            None => Some(arg),
        }
    };
    args.into_iter().filter_map(rewritten).collect()
}

/// The flag as clap takes it; `None` for a switch that is switched off.
fn rewrite(arg: &str) -> Option<OsString> {
    let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
        return Some(arg.into());
    };
    let (name, value) = match flag.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (flag, None),
    };
    if SWITCHES.contains(&name) {
        match value {
            None | Some("true" | "1") => return Some(format!("--{name}").into()),
            Some("false" | "0") => return None,
            Some(_) => {}
        }
    }
    let is_known = SWITCHES.contains(&name) || VALUED.contains(&name);
    Some(if is_known {
        format!("--{flag}").into()
    } else {
        arg.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_flags_before_the_double_dash_are_rewritten() {
        for (given, want) in [
            ("mount -config x", "mount --config x"),
            (
                "mount -config=x=y -fuse.debug",
                "mount --config=x=y --fuse.debug",
            ),
            ("mount --config x -v -h", "mount --config x -v -h"),
            (
                "run -promote=true -debug=false -- app -config y",
                "run --promote -- app -config y",
            ),
            ("mount --tracing=0 -tracing=maybe", "mount --tracing=maybe"),
            ("export -configs -x - name", "export -configs -x - name"),
        ] {
            let given = given.split(' ').map(OsString::from);
            assert_eq!(normalize(given).join(" ".as_ref()), want);
        }
    }
}
