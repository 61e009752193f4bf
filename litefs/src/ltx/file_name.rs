//! How a file is called: `<min TXID>-<max TXID>.ltx`, each 16 lowercase hex digits, so that the
//! order of names is the order of transactions.

use std::fmt;
use std::str::FromStr;

use super::{LtxError, Txid};

/// Name of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName {
    /// First transaction contained.
    pub min: Txid,
    /// Last transaction contained.
    pub max: Txid,
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}.ltx", self.min, self.max)
    }
}

impl FromStr for FileName {
    type Err = LtxError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let refused = || LtxError::FileName {
            name: s.chars().take(60).collect(),
        };
        let stem = s.strip_suffix(".ltx").ok_or_else(refused)?;
        let (min, max) = stem.split_once('-').ok_or_else(refused)?;
        let name = FileName {
            min: min.parse().map_err(|_| refused())?,
            max: max.parse().map_err(|_| refused())?,
        };
        let sound = name.min > Txid::ZERO && name.min <= name.max;
        // Another spelling (capital digits) would make two names of one file.
        if !sound || s.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(refused());
        }
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses() {
        let text = "000000000000001f-00000000000000a0.ltx";
        let name: FileName = text.parse().unwrap();
        assert_eq!((name.min, name.max), (Txid(0x1f), Txid(0xa0)));
        assert_eq!(name.to_string(), text);
    }

    #[test]
    fn other_names_are_refused() {
        for bad in [
            "",
            ".ltx",
            "-.ltx",
            "000000000000001f.ltx",
            "000000000000001f-00000000000000a0",
            "000000000000001f-00000000000000a0.ltx.tmp",
            "000000000000001F-00000000000000a0.ltx",
            "00000000000000a0-000000000000001f.ltx",
            "0000000000000000-000000000000001f.ltx",
            "000000000000001f-00000000000000é.ltx",
            "1f-a0.ltx",
        ] {
            assert!(bad.parse::<FileName>().is_err(), "{bad}");
        }
    }
}
