use std::fmt;
use std::ops::BitXor;
use std::str::FromStr;

use crc_fast::{CrcAlgorithm, Digest};

use super::Pgno;
use super::txid::{ParseHexError, parse_hex16};

/// CRC-64/GO-ISO checksum of a page, or the XOR of those of all pages of a database.
///
/// The highest bit is always set, so that a present checksum is never zero
/// (source: superfly/ltx, "checksum"). An empty database has [`Checksum::EMPTY`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Checksum(u64);

const FLAG: u64 = 1 << 63;

impl Checksum {
    /// The checksum of a database without pages.
    pub const EMPTY: Checksum = Checksum(FLAG);

    /// Makes a checksum of any number by setting the flag bit.
    #[must_use]
    pub const fn new(raw: u64) -> Checksum {
        Checksum(raw | FLAG)
    }

    /// Returns the number, flag bit included.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Adds or removes a page's checksum from a database's.
impl BitXor for Checksum {
    type Output = Checksum;

    fn bitxor(self, other: Checksum) -> Checksum {
        Checksum::new(self.0 ^ other.0)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Checksum {
    type Err = ParseHexError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        parse_hex16(s).map(Checksum::new)
    }
}

/// Computes the checksum of one page: CRC-64/GO-ISO of the big-endian page number, then the data.
#[must_use]
pub fn page_checksum(pgno: Pgno, data: &[u8]) -> Checksum {
    let mut digest = Digest::new(CrcAlgorithm::Crc64GoIso);
    digest.update(&pgno.get().to_be_bytes());
    digest.update(data);
    Checksum::new(digest.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_bit_is_always_set() {
        let a = page_checksum(Pgno::new(1).unwrap(), &[0; 512]);
        assert_eq!(a ^ a, Checksum::EMPTY);
        assert_eq!(Checksum::EMPTY ^ a, a);
        assert_eq!(Checksum::EMPTY.to_string(), "8000000000000000");
    }
}
