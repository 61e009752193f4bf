//! The first 100 bytes of a file: which transactions, of what size, on top of what.
//!
//! | offset | length | field | unit |
//! |---|---|---|---|
//! | 0 | 4 | magic `LTX1` | |
//! | 4 | 4 | flags | bit 1: no checksums are kept |
//! | 8 | 4 | page size | bytes |
//! | 12 | 4 | commit: size of the database after the range | pages; 0 is dropped |
//! | 16 | 8 | min TXID | |
//! | 24 | 8 | max TXID | |
//! | 32 | 8 | timestamp | ms since 1970, signed |
//! | 40 | 8 | pre-apply checksum | 0 in snapshots and where none is kept |
//! | 48 | 8 | WAL offset | bytes; 0 if not from a WAL |
//! | 56 | 8 | WAL size | bytes; 0 if not from a WAL |
//! | 64 | 4 | WAL salt 1 | |
//! | 68 | 4 | WAL salt 2 | |
//! | 72 | 8 | node id | 0 if unset |
//! | 80 | 20 | reserved | written as zero, ignored when read |
//!
//! All numbers are big-endian. The format version (3) is nowhere in the file: it is known by the
//! pages' own headers.

use super::{Checksum, LtxError, PageSize, Pos, Txid};

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 100;

const MAGIC: [u8; 4] = *b"LTX1";
const RESERVED_OFFSET: usize = 80;
const _: () = assert!(RESERVED_OFFSET + 20 == HEADER_LEN);

/// Flags of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct HeaderFlags(u32);

impl HeaderFlags {
    /// Checksums of the database are kept.
    pub const TRACKED: HeaderFlags = HeaderFlags(0);
    /// No checksums of the database are kept: pre-apply and post-apply are absent.
    pub const NO_CHECKSUM: HeaderFlags = HeaderFlags(1 << 1);

    /// Makes flags, or nothing if one of them is unknown.
    #[must_use]
    pub const fn new(raw: u32) -> Option<HeaderFlags> {
        if raw & !HeaderFlags::NO_CHECKSUM.0 == 0 {
            Some(HeaderFlags(raw))
        } else {
            None
        }
    }

    /// Returns the number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Returns whether checksums of the database are kept.
    #[must_use]
    pub const fn tracks_checksums(self) -> bool {
        self.0 & HeaderFlags::NO_CHECKSUM.0 == 0
    }
}

/// Header of a file; the bytes are in the module's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Flags.
    pub flags: HeaderFlags,
    /// Page size of the database.
    pub page_size: PageSize,
    /// Pages the database has after the range; 0 is dropped.
    pub commit: u32,
    /// First transaction contained; 1 makes the file a snapshot.
    pub min_txid: Txid,
    /// Last transaction contained.
    pub max_txid: Txid,
    /// When the last transaction was made, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Checksum of the database before the range; `None` in snapshots and where none is kept.
    pub pre_apply_checksum: Option<Checksum>,
    /// Where in the WAL the range was, in bytes; 0 if not from a WAL.
    pub wal_offset: i64,
    /// How long it was in the WAL, in bytes; 0 if not from a WAL.
    pub wal_size: i64,
    /// First salt of that WAL.
    pub wal_salt1: u32,
    /// Second salt of that WAL.
    pub wal_salt2: u32,
    /// Node that made the file; 0 if unset.
    pub node_id: u64,
}

impl Header {
    /// Returns whether the file is a whole database: it contains the first transaction.
    #[must_use]
    pub fn is_snapshot(&self) -> bool {
        self.min_txid == Txid(1)
    }

    /// Returns the position a database must have for the range to be applied: [`Pos::ZERO`] for a
    /// snapshot (which applies on anything), `None` where no checksum is kept.
    #[must_use]
    pub fn pre_apply_pos(&self) -> Option<Pos> {
        if self.is_snapshot() {
            return Some(Pos::ZERO);
        }
        self.pre_apply_checksum.map(|post_apply_checksum| Pos {
            txid: self.min_txid.prev(),
            post_apply_checksum,
        })
    }

    /// Checks what the type alone cannot hold.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn validate(&self) -> Result<(), LtxError> {
        if self.min_txid == Txid::ZERO || self.min_txid > self.max_txid {
            return Err(LtxError::TxidRange {
                min: self.min_txid,
                max: self.max_txid,
            });
        }
        let salted = self.wal_salt1 != 0 || self.wal_salt2 != 0;
        let placeless = self.wal_offset == 0 && (self.wal_size != 0 || salted);
        if self.wal_offset < 0 || self.wal_size < 0 || placeless {
            return Err(LtxError::WalSpan {
                offset: self.wal_offset,
                size: self.wal_size,
                salt1: self.wal_salt1,
                salt2: self.wal_salt2,
            });
        }
        let tracked = self.flags.tracks_checksums();
        if self.pre_apply_checksum.is_some() != (tracked && !self.is_snapshot()) {
            return Err(LtxError::PreApplyChecksum {
                raw: self.pre_apply_checksum.map_or(0, Checksum::get),
                snapshot: self.is_snapshot(),
                tracked,
            });
        }
        Ok(())
    }

    /// Returns the bytes of the header, whether it is valid or not.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        put(&self.flags.get().to_be_bytes());
        put(&self.page_size.get().to_be_bytes());
        put(&self.commit.to_be_bytes());
        put(&self.min_txid.0.to_be_bytes());
        put(&self.max_txid.0.to_be_bytes());
        put(&self.timestamp_ms.to_be_bytes());
        put(&self
            .pre_apply_checksum
            .map_or(0, Checksum::get)
            .to_be_bytes());
        put(&self.wal_offset.to_be_bytes());
        put(&self.wal_size.to_be_bytes());
        put(&self.wal_salt1.to_be_bytes());
        put(&self.wal_salt2.to_be_bytes());
        put(&self.node_id.to_be_bytes());
        debug_assert_eq!(at, RESERVED_OFFSET);
        bytes
    }

    /// Reads and checks the header at the start of `bytes`.
    ///
    /// # Errors
    /// Too few bytes, another magic, or a rule of [`Header::validate`] broken.
    pub fn decode(bytes: &[u8]) -> Result<Header, LtxError> {
        let Some(b) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(LtxError::Truncated {
                part: "header",
                need: HEADER_LEN as u64,
                have: bytes.len() as u64,
            });
        };
        let magic = [b[0], b[1], b[2], b[3]];
        if magic != MAGIC {
            return Err(LtxError::Magic { found: magic });
        }
        let (raw_flags, raw_page_size) = (be_u32(b, 4), be_u32(b, 8));
        let flags =
            HeaderFlags::new(raw_flags).ok_or(LtxError::HeaderFlags { flags: raw_flags })?;
        let header = Header {
            flags,
            page_size: PageSize::new(raw_page_size).ok_or(LtxError::PageSize {
                bytes: raw_page_size,
            })?,
            commit: be_u32(b, 12),
            min_txid: Txid(be_u64(b, 16)),
            max_txid: Txid(be_u64(b, 24)),
            timestamp_ms: be_u64(b, 32).cast_signed(),
            pre_apply_checksum: decode_checksum(be_u64(b, 40)).map_err(|raw| {
                LtxError::PreApplyChecksum {
                    raw,
                    snapshot: be_u64(b, 16) == 1,
                    tracked: flags.tracks_checksums(),
                }
            })?,
            wal_offset: be_u64(b, 48).cast_signed(),
            wal_size: be_u64(b, 56).cast_signed(),
            wal_salt1: be_u32(b, 64),
            wal_salt2: be_u32(b, 68),
            node_id: be_u64(b, 72),
        };
        header.validate()?;
        Ok(header)
    }
}

/// Reads a checksum field: zero is absent, and one without its flag bit is handed back.
pub(super) fn decode_checksum(raw: u64) -> Result<Option<Checksum>, u64> {
    match raw {
        0 => Ok(None),
        raw if Checksum::new(raw).get() == raw => Ok(Some(Checksum::new(raw))),
        raw => Err(raw),
    }
}

/// Reads a number that the caller knows to be there.
pub(super) fn be_u32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Reads a number that the caller knows to be there.
pub(super) fn be_u64(b: &[u8], at: usize) -> u64 {
    u64::from(be_u32(b, at)) << 32 | u64::from(be_u32(b, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            flags: HeaderFlags::TRACKED,
            page_size: PageSize::new(4096).unwrap(),
            commit: 3,
            min_txid: Txid(5),
            max_txid: Txid(6),
            timestamp_ms: -7,
            pre_apply_checksum: Some(Checksum::new(8)),
            wal_offset: 32,
            wal_size: 9,
            wal_salt1: 10,
            wal_salt2: 11,
            node_id: 12,
        }
    }

    #[test]
    fn every_field_comes_back_from_its_place() {
        let bytes = header().encode();
        assert_eq!(Header::decode(&bytes).unwrap(), header());
        assert_eq!(&bytes[..16], b"LTX1\0\0\0\0\0\0\x10\0\0\0\0\x03");
        assert_eq!((be_u64(&bytes, 16), be_u64(&bytes, 24)), (5, 6));
        assert_eq!(be_u64(&bytes, 40), 1 << 63 | 8);
        assert_eq!((be_u32(&bytes, 64), be_u32(&bytes, 68)), (10, 11));
        assert_eq!(be_u64(&bytes, 72), 12);
        assert_eq!(bytes[80..], [0; 20]);
    }

    #[test]
    fn what_the_rules_forbid_is_refused() {
        type Break = fn(&mut Header);
        let broken: [(&str, Break); 10] = [
            ("min zero", |h| h.min_txid = Txid::ZERO),
            ("max below min", |h| h.max_txid = Txid(4)),
            ("negative wal offset", |h| h.wal_offset = -1),
            ("negative wal size", |h| h.wal_size = -1),
            ("size without offset", |h| {
                (h.wal_offset, h.wal_salt1, h.wal_salt2) = (0, 0, 0)
            }),
            ("salts without offset", |h| {
                (h.wal_offset, h.wal_size) = (0, 0)
            }),
            ("no pre-apply", |h| h.pre_apply_checksum = None),
            ("pre-apply in a snapshot", |h| h.min_txid = Txid(1)),
            ("pre-apply untracked", |h| {
                h.flags = HeaderFlags::NO_CHECKSUM
            }),
            ("max zero", |h| {
                (h.min_txid, h.max_txid) = (Txid::ZERO, Txid::ZERO)
            }),
        ];
        for (what, break_it) in broken {
            let mut h = header();
            break_it(&mut h);
            assert!(h.validate().is_err(), "{what}");
            assert!(Header::decode(&h.encode()).is_err(), "{what}");
        }
    }

    #[test]
    fn what_the_type_cannot_hold_is_refused() {
        for (at, bit) in [(0, 1), (7, 1), (4, 0x80), (11, 1), (40, 0x80)] {
            let mut bytes = header().encode();
            bytes[at] ^= bit;
            assert!(Header::decode(&bytes).is_err(), "byte {at}");
        }
        for len in 0..HEADER_LEN {
            assert!(Header::decode(&header().encode()[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn the_position_before_is_that_of_the_transaction_before() {
        let pos = header().pre_apply_pos().unwrap();
        assert_eq!(
            (pos.txid, pos.post_apply_checksum),
            (Txid(4), Checksum::new(8))
        );
        let snapshot = Header {
            min_txid: Txid(1),
            pre_apply_checksum: None,
            ..header()
        };
        assert_eq!(snapshot.pre_apply_pos(), Some(Pos::ZERO));
        let untracked = Header {
            flags: HeaderFlags::NO_CHECKSUM,
            pre_apply_checksum: None,
            ..header()
        };
        assert_eq!(untracked.pre_apply_pos(), None);
    }
}
