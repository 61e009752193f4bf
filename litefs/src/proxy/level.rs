//! What a read promises: how much a client asks for, request by request.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::config::GoDuration;

/// How current a read is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Whatever this node has.
    Eventual,
    /// Not older than what this client wrote or read before, on whichever node.
    Session,
    /// No older than this.
    Bounded(Duration),
    /// Everything that was acknowledged, to anybody, before the request.
    Strong,
}

/// Text that names no level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no consistency: write eventual, session, bounded=DURATION (such as bounded=500ms) or strong"
)]
pub struct ConsistencyError(String);

impl FromStr for Consistency {
    type Err = ConsistencyError;

    fn from_str(text: &str) -> Result<Self, ConsistencyError> {
        let error = || ConsistencyError(text.chars().take(40).collect());
        match text {
            "eventual" => Ok(Consistency::Eventual),
            "session" => Ok(Consistency::Session),
            "strong" => Ok(Consistency::Strong),
            _ => {
                let bound = text.strip_prefix("bounded=").ok_or_else(error)?;
                let bound: GoDuration = bound.parse().map_err(|_| error())?;
                // What may not be older than no time at all is confirmed.
                Ok(bound
                    .positive()
                    .map_or(Consistency::Strong, Consistency::Bounded))
            }
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Consistency::Eventual => f.write_str("eventual"),
            Consistency::Session => f.write_str("session"),
            Consistency::Bounded(bound) => write!(f, "bounded={}us", bound.as_micros()),
            Consistency::Strong => f.write_str("strong"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels() {
        for (text, want) in [
            ("eventual", Consistency::Eventual),
            ("session", Consistency::Session),
            ("strong", Consistency::Strong),
            (
                "bounded=500ms",
                Consistency::Bounded(Duration::from_millis(500)),
            ),
            (
                "bounded=1m30s",
                Consistency::Bounded(Duration::from_secs(90)),
            ),
            ("bounded=0", Consistency::Strong),
        ] {
            assert_eq!(text.parse(), Ok(want), "{text}");
            assert_eq!(want.to_string().parse(), Ok(want), "{text}");
        }
        for bad in ["", "Strong", "bounded", "bounded=", "bounded=5", "strong "] {
            let error = bad.parse::<Consistency>().unwrap_err().to_string();
            assert!(error.contains("bounded=500ms"), "{error}");
        }
    }
}
