//! Which databases a replica follows.

use std::fmt;

/// Patterns of database names; an empty filter takes every database.
///
/// A pattern is a path relative to the mount. `*` stands for any characters within one directory,
/// `**` for any across directories, `?` for one character other than `/`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DatabaseFilter {
    patterns: Vec<String>,
}

impl DatabaseFilter {
    /// Takes the patterns as the config file lists them.
    #[must_use]
    pub fn new(patterns: Vec<String>) -> Self {
        Self { patterns }
    }

    /// Whether every database is taken.
    #[must_use]
    pub fn takes_all(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Whether the database called `name` is taken.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        self.takes_all() || self.patterns.iter().any(|pattern| glob(pattern, name))
    }

    /// The patterns, in the order they were written.
    #[must_use]
    pub fn patterns(&self) -> &[String] {
        &self.patterns
    }
}

impl fmt::Display for DatabaseFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.patterns.join(","))
    }
}

/// Matches the whole of `name`: one row of a table per pattern token, so no input takes long.
fn glob(pattern: &str, name: &str) -> bool {
    let name: Vec<char> = name.chars().collect();
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    let mut rest = pattern;
    while let Some(token) = rest.chars().next() {
        let deep = rest.starts_with("**");
        rest = &rest[if deep { 2 } else { token.len_utf8() }..];
        reached = match token {
            '*' => spread(&reached, &name, deep),
            '?' => step(&reached, &name, |c| c != '/'),
            _ => step(&reached, &name, |c| c == token),
        };
    }
    reached[name.len()]
}

/// Positions reachable through `*` (or `**`): every later one, up to a `/` unless `deep`.
fn spread(reached: &[bool], name: &[char], deep: bool) -> Vec<bool> {
    let mut next = reached.to_vec();
    for (at, &c) in name.iter().enumerate() {
        next[at + 1] |= next[at] && (deep || c != '/');
    }
    next
}

/// Positions reachable by one character that `accepts`.
fn step(reached: &[bool], name: &[char], accepts: impl Fn(char) -> bool) -> Vec<bool> {
    let mut next = vec![false; reached.len()];
    for (at, &c) in name.iter().enumerate() {
        next[at + 1] = reached[at] && accepts(c);
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, want) in [
            ("db", "db", true),
            ("db", "db2", false),
            ("a/b.db", "a/b.db", true),
            ("*.db", "x.db", true),
            ("*.db", "a/x.db", false),
            ("**.db", "a/x.db", true),
            ("a/**", "a/b/c", true),
            ("a/*", "a/b/c", false),
            ("tenant-?.db", "tenant-7.db", true),
            ("tenant-?.db", "tenant-77.db", false),
            ("?", "/", false),
            ("*a*b*", "xxaxxbxx", true),
            ("é*", "éa", true),
            ("", "a", false),
        ] {
            let filter = DatabaseFilter::new(vec![pattern.to_owned()]);
            assert_eq!(filter.matches(name), want, "{pattern} {name}");
        }
    }

    #[test]
    fn an_empty_filter_takes_all_and_several_patterns_add_up() {
        assert!(DatabaseFilter::default().matches("anything"));
        let two = DatabaseFilter::new(vec!["a".to_owned(), "b".to_owned()]);
        assert!(two.matches("a") && two.matches("b") && !two.matches("c"));
    }
}
