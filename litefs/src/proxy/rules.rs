//! What becomes of a request, by its method and path alone.

use hyper::Method;

/// Path of the health check.
pub(super) const HEALTH: &str = "/litefs/health";

/// `proxy.passthrough` or `proxy.always-forward`: a whole path, in which `*` stands for any characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPattern(String);

impl PathPattern {
    /// Takes the pattern as the config file has it.
    #[must_use]
    pub fn new(text: String) -> PathPattern {
        PathPattern(text)
    }

    /// Whether it matches a whole path. Takes time in proportion to the path times the pattern's parts.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = path.strip_prefix(first) else {
            return false;
        };
        let Some(last) = parts.next_back() else {
            return rest.is_empty();
        };
        for part in parts {
            // The leftmost place leaves the most for those that follow.
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// The program gets it as it is.
    Passthrough,
    /// It is about this node.
    Health,
    /// This node answers, once it is current enough.
    Read,
    /// The primary answers.
    Write,
}

/// Says what becomes of a request.
#[must_use]
pub(super) fn classify(
    method: &Method,
    path: &str,
    passthrough: &[PathPattern],
    always_forward: &[PathPattern],
) -> Class {
    let is_any = |patterns: &[PathPattern]| patterns.iter().any(|p| p.matches(path));
    if is_any(passthrough) {
        return Class::Passthrough;
    }
    match *method {
        Method::GET if path == HEALTH => Class::Health,
        Method::GET | Method::HEAD if !is_any(always_forward) => Class::Read,
        _ => Class::Write,
    }
}

/// Whether doing it twice is doing it once, also where nobody promised that about a PUT or DELETE.
#[must_use]
pub(super) fn is_safe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_anchored_and_know_only_the_star() {
        for (pattern, path, want) in [
            ("/a", "/a", true),
            ("/a", "/ab", false),
            ("*.png", "/x/y.png", true),
            ("*.png", "/x/y.png.html", false),
            ("/static/*", "/static/", true),
            ("/static/*", "/static", false),
            ("*", "", true),
            ("/a*b*c", "/aXbXbXc", true),
            ("/a*b*c", "/aXc", false),
            ("/a*a", "/a", false),
            ("/a.b", "/aXb", false),
            ("/[a]?", "/[a]?", true),
        ] {
            assert_eq!(
                PathPattern::new(pattern.into()).matches(path),
                want,
                "{pattern} {path}"
            );
        }
        let hostile = PathPattern::new("*a*a*a*a*a*a*a*a*b".into());
        assert!(!hostile.matches(&"a".repeat(60_000)));
    }

    #[test]
    fn classes() {
        let pass = [PathPattern::new("*.png".into())];
        let always = [
            PathPattern::new("/admin/*".into()),
            PathPattern::new("/ws".into()),
        ];
        for (method, path, want) in [
            ("GET", "/", Class::Read),
            ("HEAD", "/x", Class::Read),
            ("POST", "/", Class::Write),
            ("DELETE", "/x", Class::Write),
            ("OPTIONS", "/x", Class::Write),
            ("PROPFIND", "/x", Class::Write),
            ("GET", "/admin/x", Class::Write),
            ("GET", "/ws", Class::Write),
            ("GET", "/x.png", Class::Passthrough),
            ("POST", "/x.png", Class::Passthrough),
            ("GET", HEALTH, Class::Health),
            ("POST", HEALTH, Class::Write),
        ] {
            let method: Method = method.parse().unwrap();
            assert_eq!(
                classify(&method, path, &pass, &always),
                want,
                "{method} {path}"
            );
        }
    }
}
