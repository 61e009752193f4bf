//! Which databases a replica follows.
//!
//! Both sides match: the primary to send nothing else, the replica to notice if it does. The patterns come from a peer, so
//! a match takes time in proportion to pattern times name, whatever they are.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::{DbName, MAX_DB_NAME_LEN};

/// Pattern of database names: a path relative to the mount, at most [`MAX_DB_NAME_LEN`] bytes.
///
/// `*` stands for any characters within one directory, `**` for any across directories, `?` for one character other
/// than `/`. All else stands for itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DbPattern(Arc<str>);

impl DbPattern {
    /// Returns the pattern as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn is_name(&self) -> bool {
        !self.0.contains(['*', '?'])
    }
}

impl fmt::Display for DbPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Text that is no pattern of database names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no pattern of database names: want a path relative to the mount without empty parts, at most \
     {MAX_DB_NAME_LEN} bytes, such as app.db or tenants/*"
)]
pub struct DbPatternError(String);

impl FromStr for DbPattern {
    type Err = DbPatternError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let part_is_good = |p: &str| !p.is_empty() && p != "." && p != "..";
        if s.len() > MAX_DB_NAME_LEN || s.contains('\0') || !s.split('/').all(part_is_good) {
            return Err(DbPatternError(s.chars().take(80).collect()));
        }
        Ok(DbPattern(s.into()))
    }
}

/// Patterns of database names; an empty filter takes every database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DatabaseFilter {
    patterns: Vec<DbPattern>,
    /// Those without `*` and `?`, of which there may be thousands.
    names: HashSet<DbPattern>,
}

impl DatabaseFilter {
    /// Takes the patterns as the config file lists them.
    #[must_use]
    pub fn new(patterns: Vec<DbPattern>) -> Self {
        let names = patterns.iter().filter(|p| p.is_name()).cloned().collect();
        Self { patterns, names }
    }

    /// Whether every database is taken.
    #[must_use]
    pub fn takes_all(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Whether a database is taken.
    #[must_use]
    pub fn matches(&self, name: &DbName) -> bool {
        let mut globs = self.patterns.iter().filter(|p| !p.is_name());
        self.takes_all()
            || self.names.contains(&DbPattern(name.0.clone()))
            || globs.any(|pattern| glob(pattern.as_str(), name.as_str()))
    }

    /// The patterns, in the order they were written.
    #[must_use]
    pub fn patterns(&self) -> &[DbPattern] {
        &self.patterns
    }
}

impl fmt::Display for DatabaseFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let patterns: Vec<&str> = self.patterns.iter().map(DbPattern::as_str).collect();
        f.write_str(&patterns.join(","))
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

    fn filter(patterns: &[&str]) -> DatabaseFilter {
        DatabaseFilter::new(patterns.iter().map(|p| p.parse().unwrap()).collect())
    }

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
            ("a?b", "a/b", false),
            ("*a*b*", "xxaxxbxx", true),
            ("é*", "éa", true),
            ("[a].db", "[a].db", true),
            ("[a].db", "a.db", false),
        ] {
            let filter = filter(&[pattern]);
            assert_eq!(
                filter.matches(&name.parse().unwrap()),
                want,
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn what_is_no_pattern_is_an_error_that_shows_one() {
        let long = "*".repeat(MAX_DB_NAME_LEN + 1);
        for bad in ["", "/a", "a//*", "../*", "a\0", &long] {
            let error = bad.parse::<DbPattern>().unwrap_err().to_string();
            assert!(error.contains("tenants/*"), "{error}");
        }
    }

    #[test]
    fn the_worst_pattern_takes_no_longer_than_others() {
        let hostile = filter(&["*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*a*b"]);
        assert!(!hostile.matches(&"a".repeat(MAX_DB_NAME_LEN).parse().unwrap()));
    }

    #[test]
    fn an_empty_filter_takes_all_and_several_patterns_add_up() {
        let name = |s: &str| s.parse::<DbName>().unwrap();
        assert!(DatabaseFilter::default().matches(&name("anything")));
        let two = filter(&["a", "b*"]);
        assert!(two.matches(&name("a")) && two.matches(&name("bb")) && !two.matches(&name("c")));
    }
}
