use std::fmt;
use std::str::FromStr;

/// Number of a transaction of one database: the first is 1, zero means none yet.
///
/// Printed as 16 lowercase hex digits, so that text order is number order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Txid(pub u64);

impl Txid {
    /// No transaction yet.
    pub const ZERO: Txid = Txid(0);

    /// Returns the number after this one.
    #[must_use]
    pub fn next(self) -> Txid {
        Txid(self.0 + 1)
    }

    /// Returns the number before this one; zero stays zero.
    #[must_use]
    pub fn prev(self) -> Txid {
        Txid(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Txid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Text that is not 16 hex digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not 16 hexadecimal digits")]
pub struct ParseHexError(pub(crate) String);

pub(crate) fn parse_hex16(s: &str) -> Result<u64, ParseHexError> {
    if s.len() != 16 || !s.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(ParseHexError(s.chars().take(40).collect()));
    }
    u64::from_str_radix(s, 16).map_err(|_| ParseHexError(s.to_owned()))
}

impl FromStr for Txid {
    type Err = ParseHexError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        parse_hex16(s).map(Txid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_16_hex_digits() {
        assert_eq!(Txid(0x1f).to_string(), "000000000000001f");
        assert_eq!("000000000000001f".parse(), Ok(Txid(0x1f)));
        for bad in [
            "",
            "1f",
            "+00000000000001f",
            "000000000000001g",
            "0000000000000001f",
        ] {
            assert!(bad.parse::<Txid>().is_err(), "{bad}");
        }
    }
}
