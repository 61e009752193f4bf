//! Sizes in bytes: `4096`, `16MB` (decimal), `16MiB` (binary).

use super::scalar::from_text;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ByteSize(pub(crate) u64);

/// A text that is not a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{text}` is not a size: write bytes, such as 4096, 16MB (16,000,000) or 16MiB (16,777,216)"
)]
pub(crate) struct SizeError {
    text: String,
}

impl std::str::FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        unit_bytes(unit.trim_start())
            .and_then(|unit| number.parse::<u64>().ok()?.checked_mul(unit))
            .map(Self)
            .ok_or_else(|| SizeError {
                text: text.to_owned(),
            })
    }
}

impl<'de> serde::Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer)
    }
}

fn unit_bytes(unit: &str) -> Option<u64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        "ti" | "tib" => 1 << 40,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("16MB", 16_000_000),
            ("16 MiB", 16 << 20),
            ("1gib", 1 << 30),
            ("1G", 1_000_000_000),
            ("2TB", 2_000_000_000_000),
            ("512b", 512),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn others_are_refused() {
        for text in [
            "",
            "MB",
            "-1",
            "1.5GB",
            "1XB",
            "18446744073709551615KB",
            "1 0",
            "1é",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }
}
