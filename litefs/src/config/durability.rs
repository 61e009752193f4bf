//! When a commit returns, as `litefs.yml`, the API and the command line write it: `async`, `quorum`, `bounded`,
//! `bounded:500ms`, `bounded:100`, `bounded:500ms,100`.

use std::time::Duration;

use consensus::Durability;

use super::duration::GoDuration;

/// What plain `bounded` stands for.
const BOUNDED: Durability = Durability::Bounded {
    ms: 1000,
    transactions: 1000,
};

/// A text that is no durability.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is not a durability")]
pub struct DurabilityError {
    text: String,
}

/// What to write instead.
pub const DURABILITY_REMEDY: &str = "write async, quorum, bounded, or bounded with the longest time and the most transactions that other nodes may be \
     behind, as in bounded:500ms,100";

/// Reads a durability. A bound that is not given is no bound; plain `bounded` is a second and 1000 transactions.
///
/// # Errors
/// Anything else.
pub fn parse_durability(text: &str) -> Result<Durability, DurabilityError> {
    let error = || DurabilityError {
        text: text.to_owned(),
    };
    let bounds = match text {
        "async" => return Ok(Durability::Async),
        "quorum" => return Ok(Durability::Quorum),
        "bounded" => return Ok(BOUNDED),
        _ => text.strip_prefix("bounded:").ok_or_else(error)?,
    };
    let (mut ms, mut transactions) = (None, None);
    for bound in bounds.split(',').map(str::trim) {
        // A number is one of transactions, "0" too.
        let is_new = match bound.parse::<u64>() {
            Ok(count) => transactions.replace(count).is_none(),
            Err(_) => {
                let time = bound.parse::<GoDuration>().ok();
                let time = time.and_then(GoDuration::positive).ok_or_else(error)?;
                ms.replace(millis(time)).is_none()
            }
        };
        if !is_new {
            return Err(error());
        }
    }
    Ok(Durability::Bounded {
        ms: ms.unwrap_or(u64::MAX),
        transactions: transactions.unwrap_or(u64::MAX),
    })
}

/// Writes a durability so that [`parse_durability`] reads it.
#[must_use]
pub fn show_durability(durability: Durability) -> String {
    let (ms, transactions) = match durability {
        Durability::Async => return "async".to_owned(),
        Durability::Quorum => return "quorum".to_owned(),
        Durability::Bounded { ms, transactions } => (ms, transactions),
    };
    let bounds: Vec<String> = [
        (ms != u64::MAX).then(|| format!("{ms}ms")),
        (transactions != u64::MAX).then(|| transactions.to_string()),
    ]
    .into_iter()
    .flatten()
    .collect();
    format!("bounded:{}", bounds.join(","))
}

/// Whole milliseconds, rounded up: what is not zero stays so.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let bounded = |ms, transactions| Durability::Bounded { ms, transactions };
        for (text, durability, shown) in [
            ("async", Durability::Async, "async"),
            ("quorum", Durability::Quorum, "quorum"),
            ("bounded", bounded(1000, 1000), "bounded:1000ms,1000"),
            ("bounded:1.5s", bounded(1500, u64::MAX), "bounded:1500ms"),
            ("bounded:7", bounded(u64::MAX, 7), "bounded:7"),
            ("bounded:0", bounded(u64::MAX, 0), "bounded:0"),
            ("bounded:9, 1us", bounded(1, 9), "bounded:1ms,9"),
        ] {
            assert_eq!(parse_durability(text), Ok(durability), "{text}");
            assert_eq!(show_durability(durability), shown);
            assert_eq!(parse_durability(shown), Ok(durability), "{shown}");
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "",
            "Quorum",
            "bounded:",
            "bounded:0s",
            "bounded:-1s",
            "bounded:1,2",
            "bounded:1s,2s",
            "bounded:1s,",
            "bounded:1s,2,3",
            "bounded 1s",
            "bounded:x",
        ] {
            assert!(parse_durability(text).is_err(), "{text}");
        }
    }
}
