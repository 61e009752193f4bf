//! Expansion of environment variables in the text of a config file, before it is parsed.
//!
//! | written | becomes |
//! |---|---|
//! | `$NAME`, `${NAME}` | its value; nothing when unset |
//! | `${A == 'text'}`, `${A == "text"}`, `${A == B}` | `true` or `false`; `!=` likewise |
//! | `$$` | `$` |
//! | any other `$` | itself (so regular expressions and `$?` survive) |
//!
//! Lines that hold only a comment are left alone.

use super::ConfigError;
use std::collections::HashMap;

/// The environment a config file is read in.
#[derive(Debug, Clone, Default)]
pub struct Env {
    vars: HashMap<String, String>,
    os_hostname: String,
}

impl Env {
    /// Takes the process's environment, with `HOSTNAME` defaulted to the kernel's host name.
    #[must_use]
    pub fn from_process() -> Self {
        let vars = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        let os_hostname = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        Self::new(vars, os_hostname)
    }

    /// Builds an environment from its parts.
    pub fn new(vars: impl IntoIterator<Item = (String, String)>, os_hostname: String) -> Self {
        let mut vars: HashMap<_, _> = vars.into_iter().collect();
        let hostname = vars.entry("HOSTNAME".to_owned()).or_default();
        if hostname.is_empty() {
            hostname.clone_from(&os_hostname);
        }
        Self { vars, os_hostname }
    }

    /// The value of a variable, if it is set.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str)
    }

    /// The kernel's host name, whatever `HOSTNAME` says.
    #[must_use]
    pub fn os_hostname(&self) -> &str {
        &self.os_hostname
    }

    fn value(&self, name: &str) -> &str {
        self.get(name).unwrap_or_default()
    }
}

/// Replaces every variable and expression of `text`.
///
/// # Errors
/// [`ConfigError::Expand`] for a `${` that is not closed on its line or not understood.
pub fn expand(text: &str, env: &Env) -> Result<String, ConfigError> {
    let mut out = String::with_capacity(text.len());
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if line.trim_start().starts_with('#') {
            out.push_str(line);
        } else {
            expand_line(line, env, &mut out).map_err(|expr| ConfigError::Expand {
                line: index + 1,
                expr: expr.to_owned(),
            })?;
        }
    }
    Ok(out)
}

/// Expands one line; the error is the text that is not understood.
fn expand_line<'a>(line: &'a str, env: &Env, out: &mut String) -> Result<(), &'a str> {
    let mut rest = line;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let tail = &rest[at + 1..];
        rest = if let Some(braced) = tail.strip_prefix('{') {
            let end = closing_brace(braced).ok_or_else(|| rest[at..].trim_end())?;
            out.push_str(&evaluate(braced[..end].trim(), env).ok_or(&rest[at..at + end + 3])?);
            &braced[end + 1..]
        } else if let Some(after) = tail.strip_prefix('$') {
            out.push('$');
            after
        } else {
            let name_len = name_len(tail);
            out.push_str(if name_len == 0 {
                "$"
            } else {
                env.value(&tail[..name_len])
            });
            &tail[name_len..]
        };
    }
    out.push_str(rest);
    Ok(())
}

/// Finds the `}` that ends an expression, skipping those within quotes.
fn closing_brace(text: &str) -> Option<usize> {
    let mut quote = None;
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (None, '}') => return Some(at),
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), _) if open == c => quote = None,
            _ => {}
        }
    }
    None
}

/// Evaluates what stands between the braces.
fn evaluate(expr: &str, env: &Env) -> Option<String> {
    let name_len = name_len(expr);
    let (name, rest) = expr.split_at(name_len);
    let rest = rest.trim_start();
    if name.is_empty() {
        return None;
    }
    if rest.is_empty() {
        return Some(env.value(name).to_owned());
    }
    let (want_equal, operand) = match rest.split_at_checked(2)? {
        ("==", operand) => (true, operand),
        ("!=", operand) => (false, operand),
        _ => return None,
    };
    let equal = env.value(name) == operand_value(operand.trim(), env)?;
    Some((equal == want_equal).to_string())
}

/// The value of the right-hand side: a quoted literal or a variable.
fn operand_value<'a>(operand: &'a str, env: &'a Env) -> Option<&'a str> {
    for quote in ['\'', '"'] {
        if let Some(inner) = operand.strip_prefix(quote) {
            return inner
                .strip_suffix(quote)
                .filter(|literal| !literal.contains(quote));
        }
    }
    let whole = !operand.is_empty() && name_len(operand) == operand.len();
    whole.then(|| env.value(operand))
}

/// Length of the variable name `text` starts with; zero if it starts with none.
fn name_len(text: &str) -> usize {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return 0;
    }
    text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env() -> Env {
        let vars = [("FOO", "foo1"), ("BAR", "foo1"), ("REGION", "ams")];
        Env::new(
            vars.map(|(k, v)| (k.to_owned(), v.to_owned())),
            "box".to_owned(),
        )
    }

    fn ok(text: &str) -> String {
        expand(text, &env()).unwrap()
    }

    #[test]
    fn expand_env_unbraced_var() {
        assert_eq!(ok("$FOO"), "foo1");
        assert_eq!(ok("a: $FOO/$REGION\n"), "a: foo1/ams\n");
    }

    #[test]
    fn expand_env_braced_var() {
        assert_eq!(ok("${FOO}x"), "foo1x");
        assert_eq!(ok("${ FOO }"), "foo1");
        assert_eq!(ok("[${UNSET}]"), "[]");
    }

    #[test]
    fn expand_env_single_quote_expr() {
        assert_eq!(ok("${ FOO == 'foo1' }"), "true");
        assert_eq!(ok("${FOO=='foo2'}"), "false");
        assert_eq!(ok("${FOO != 'foo2'}"), "true");
        assert_eq!(ok("${UNSET == ''}"), "true");
        assert_eq!(ok("${FOO == '}'}"), "false");
    }

    #[test]
    fn expand_env_double_quote_expr() {
        assert_eq!(ok(r#"${FOO == "foo1"}"#), "true");
        assert_eq!(ok(r#"${FOO != "foo1"}"#), "false");
    }

    #[test]
    fn expand_env_var_expr() {
        assert_eq!(ok("${FOO == BAR}"), "true");
        assert_eq!(ok("${FOO != REGION}"), "true");
        assert_eq!(
            ok("candidate: ${FLY_REGION == PRIMARY_REGION}"),
            "candidate: true"
        );
    }

    #[test]
    fn hostname_is_defaulted_but_not_overridden() {
        assert_eq!(ok("http://${HOSTNAME}:20202"), "http://box:20202");
        let vars = [("HOSTNAME".to_owned(), "set".to_owned())];
        let env = Env::new(vars, "box".to_owned());
        assert_eq!(expand("$HOSTNAME", &env).unwrap(), "set");
        assert_eq!(env.os_hostname(), "box");
    }

    #[test]
    fn other_dollars_and_comments_are_left_alone() {
        assert_eq!(
            ok("a: '^/x$'\n  # like ${FOO:-bar}\nb: $? $1 5$"),
            "a: '^/x$'\n  # like ${FOO:-bar}\nb: $? $1 5$"
        );
        assert_eq!(ok("$$FOO"), "$FOO");
    }

    #[test]
    fn what_is_not_understood_is_an_error_with_its_line() {
        for (text, expr) in [
            ("a: 1\nb: ${FOO\n", "${FOO"),
            ("a: 1\nb: ${FOO:-bar} c", "${FOO:-bar}"),
            ("\n${}", "${}"),
            ("\n${FOO = 'a'}", "${FOO = 'a'}"),
            ("\n${FOO == }", "${FOO == }"),
            ("\n${FOO == 'a}", "${FOO == 'a}"),
            ("\n${FOO == é}", "${FOO == é}"),
        ] {
            let error = expand(text, &env()).unwrap_err();
            let ConfigError::Expand { line: 2, expr: got } = &error else {
                panic!("{error}")
            };
            assert_eq!(got, expr);
        }
    }
}
