use std::fmt;
use std::str::FromStr;

use super::txid::ParseHexError;
use super::{Checksum, Txid};

/// Replication position of one database: two nodes agree when their `Pos` are equal.
///
/// Printed as `txid/checksum`, each 16 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pos {
    /// Last transaction contained.
    pub txid: Txid,
    /// Checksum of the whole database after that transaction.
    pub post_apply_checksum: Checksum,
}

impl Pos {
    /// The position of a database that has had no transaction.
    pub const ZERO: Pos = Pos {
        txid: Txid::ZERO,
        post_apply_checksum: Checksum::EMPTY,
    };
}

impl Default for Pos {
    fn default() -> Self {
        Pos::ZERO
    }
}

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.txid, self.post_apply_checksum)
    }
}

impl FromStr for Pos {
    type Err = ParseHexError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (txid, checksum) = s
            .split_once('/')
            .ok_or_else(|| ParseHexError(s.chars().take(40).collect()))?;
        Ok(Pos {
            txid: txid.parse()?,
            post_apply_checksum: checksum.parse()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses() {
        let text = "0000000000000001/8000000000000002";
        assert_eq!(text.parse::<Pos>().unwrap().to_string(), text);
        assert!("0000000000000001".parse::<Pos>().is_err());
    }
}
