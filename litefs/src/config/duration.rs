//! Durations as Go writes them: `10s`, `1m30s`, `250ms`, `1.5h`, `-1s`, `0`.

use super::scalar::from_text;
use std::time::Duration;

/// A signed duration; LiteFS gives "zero or less" a meaning of its own in several keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GoDuration {
    nanos: i64,
}

impl GoDuration {
    /// The duration, or `None` when it is zero or negative: "off".
    pub(crate) fn positive(self) -> Option<Duration> {
        let nanos = u64::try_from(self.nanos).ok()?;
        (nanos > 0).then(|| Duration::from_nanos(nanos))
    }
}

/// A text that is not a Go duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{text}` is not a duration: write a number and a unit (ns, us, ms, s, m, h), such as 10s, 1m30s or 250ms"
)]
pub(crate) struct DurationError {
    text: String,
}

impl std::str::FromStr for GoDuration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let error = || DurationError {
            text: text.to_owned(),
        };
        let (negative, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        if unsigned == "0" {
            return Ok(Self { nanos: 0 });
        }
        let nanos = sum_terms(unsigned).ok_or_else(error)?;
        let nanos = if negative { -nanos } else { nanos };
        Ok(Self {
            nanos: i64::try_from(nanos).map_err(|_| error())?,
        })
    }
}

impl<'de> serde::Deserialize<'de> for GoDuration {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer)
    }
}

/// Adds up `1m30s`; `None` if a term is malformed or the sum overflows.
fn sum_terms(mut text: &str) -> Option<i128> {
    if text.is_empty() {
        return None;
    }
    let mut nanos = 0_i128;
    while !text.is_empty() {
        let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, rest) = text.split_at(number_len);
        let unit_len = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let (unit, rest) = rest.split_at(unit_len);
        nanos = nanos.checked_add(term(number, unit_nanos(unit)?)?)?;
        text = rest;
    }
    Some(nanos)
}

/// `number` units of `unit` nanoseconds; a fraction is cut at the nanosecond.
fn term(number: &str, unit: i128) -> Option<i128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits = |text: &str| {
        if text.is_empty() {
            Some(0)
        } else {
            text.parse::<i128>().ok()
        }
    };
    // Eighteen digits are below the nanosecond for every unit.
    let fraction = &fraction[..fraction.len().min(18)];
    let scale = 10_i128.pow(u32::try_from(fraction.len()).ok()?);
    let part = digits(fraction)?.checked_mul(unit)? / scale;
    digits(whole)?.checked_mul(unit)?.checked_add(part)
}

fn unit_nanos(unit: &str) -> Option<i128> {
    Some(match unit {
        "ns" => 1,
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_durations_parse() {
        for (text, nanos) in [
            ("0", 0),
            ("0s", 0),
            ("10s", 10_000_000_000),
            ("1m30s", 90_000_000_000),
            ("250ms", 250_000_000),
            ("10m", 600_000_000_000),
            ("1.5h", 5_400_000_000_000),
            (".5s", 500_000_000),
            ("1.s", 1_000_000_000),
            ("+5s", 5_000_000_000),
            ("-1s", -1_000_000_000),
            ("3us4ns", 3_004),
            ("1µs", 1_000),
            ("1μs", 1_000),
            ("0.3333333333333333333h", 1_199_999_999_999),
            ("9223372036854775807ns", i64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(GoDuration { nanos }), "{text}");
        }
    }

    #[test]
    fn others_are_refused() {
        for text in [
            "",
            "10",
            "s",
            ".s",
            "10 s",
            "1d",
            "1s ",
            "--1s",
            "1..5s",
            "1e3s",
            "-",
            "é",
            "9223372036854775808ns",
            "99999999999999999999999999999999999999999h",
            "1\u{b5}",
        ] {
            assert!(text.parse::<GoDuration>().is_err(), "{text}");
        }
        let error = "10".parse::<GoDuration>().unwrap_err().to_string();
        assert!(
            error.starts_with("`10` is not a duration: write a number and a unit"),
            "{error}"
        );
    }

    #[test]
    fn zero_and_negative_mean_off() {
        assert_eq!(GoDuration { nanos: 0 }.positive(), None);
        assert_eq!(GoDuration { nanos: -1 }.positive(), None);
        assert_eq!(
            GoDuration { nanos: 7 }.positive(),
            Some(Duration::from_nanos(7))
        );
    }
}
