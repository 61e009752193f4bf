use std::fmt;

use bytes::Bytes;

use crate::ltx::{Checksum, PageSize, Pos, Txid};

/// Length of a record before its LTX bytes.
pub(super) const RECORD_HEADER_LEN: usize = 96;
/// Bytes of a record that its length field does not count: that field and the CRC.
const PREFIX_LEN: usize = 8;
const FIXED_LEN: usize = RECORD_HEADER_LEN - PREFIX_LEN;
const _: () = assert!(RECORD_HEADER_LEN == 8 + 8 + 5 * 8 + 8 + 5 * 4 + 4 * 3);
/// Longest LTX that a record can carry.
pub(super) const MAX_LTX_LEN: usize = u32::MAX as usize - FIXED_LEN;

const FLAG_WAL: u32 = 1;
const FLAG_BASE: u32 = 2;
const FLAG_REMOVE_OLDER: u32 = 4;

/// What is known of a range of transactions without looking into its LTX bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordMeta {
    /// Tenure of the primary that committed it.
    pub epoch: u64,
    /// First transaction of the range.
    pub min_txid: Txid,
    /// Last transaction of the range.
    pub max_txid: Txid,
    /// Checksum of the database before the range.
    pub pre_apply_checksum: Checksum,
    /// Checksum of the database after the range.
    pub post_apply_checksum: Checksum,
    /// When it was committed, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// Pages of the database after the range.
    pub commit: u32,
    /// Page size of the database.
    pub page_size: PageSize,
    /// Where the WAL stood after the range, if the database was in WAL mode.
    pub wal: Option<WalCursor>,
}

impl RecordMeta {
    /// Returns the position of a database that has this range.
    #[must_use]
    pub fn pos(&self) -> Pos {
        Pos {
            txid: self.max_txid,
            post_apply_checksum: self.post_apply_checksum,
        }
    }

    /// Returns the position of a database that this range can be applied to.
    #[must_use]
    pub fn pre_apply_pos(&self) -> Pos {
        Pos {
            txid: self.min_txid.prev(),
            post_apply_checksum: self.pre_apply_checksum,
        }
    }
}

/// Where a reader of a SQLite WAL stands: after which frame, with which salts and running checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WalCursor {
    /// First salt of the WAL header.
    pub salt1: u32,
    /// Second salt of the WAL header.
    pub salt2: u32,
    /// Last frame contained, from 1; zero is none yet.
    pub frame_no: u32,
    /// First half of the running checksum after that frame.
    pub checksum1: u32,
    /// Second half of the running checksum after that frame.
    pub checksum2: u32,
}

/// A range of transactions with its LTX bytes; cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    /// What is known of the range.
    pub meta: RecordMeta,
    /// The LTX file.
    pub ltx: Bytes,
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record")
            .field("meta", &self.meta)
            .field("ltx_len", &self.ltx.len())
            .finish()
    }
}

/// What is wrong with bytes read back from the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The file ends within a header or record.
    #[error("cut short")]
    CutShort,
    /// The file is gone.
    #[error("missing")]
    Missing,
    /// Two statements of a length disagree.
    #[error("impossible length")]
    Length,
    /// The bytes are not those that were written.
    #[error("crc-32 mismatch")]
    Crc,
    /// Not a segment of a log.
    #[error("not a log segment")]
    Magic,
    /// A segment of a later version of this program.
    #[error("unknown format version {0}")]
    Version(u32),
    /// A field has a value that is never written.
    #[error("invalid {0}")]
    Field(&'static str),
    /// A record does not begin where the one before ends.
    #[error("gap: {end} is followed by {next}")]
    Gap {
        /// Where the record before ends.
        end: Pos,
        /// Where this one begins.
        next: Pos,
    },
    /// The name of a file and its content disagree.
    #[error("content is {0}, which its name does not say")]
    Name(String),
    /// A sealed file is not good LTX.
    #[error("bad ltx: {0}")]
    Ltx(String),
}

/// What a record in a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A range of transactions.
    Transactions,
    /// The start of a log after a snapshot: a position, and no bytes.
    Base {
        /// Whether what came before may be removed; it is kept in quarantine otherwise.
        remove_older: bool,
    },
}

/// The first bytes of a record, before its CRC is known to hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prefix {
    pub(super) ltx_len: usize,
    crc: u32,
}

impl Prefix {
    /// Reads the lengths, which are stored twice so that no flipped bit goes unseen.
    pub(super) fn parse(header: &[u8; RECORD_HEADER_LEN]) -> Result<Prefix, Fault> {
        let ltx_len = u32_at(header, 8) as usize;
        if u32_at(header, 0) as usize != ltx_len + FIXED_LEN {
            return Err(Fault::Length);
        }
        Ok(Prefix {
            ltx_len,
            crc: u32_at(header, 4),
        })
    }

    /// Returns the length of the whole record.
    pub(super) fn record_len(self) -> u64 {
        (RECORD_HEADER_LEN + self.ltx_len) as u64
    }

    /// Compares the CRC with that of the bytes that were fed to `crc_start` and after it.
    pub(super) fn check(self, crc: crc32fast::Hasher) -> Result<(), Fault> {
        if crc.finalize() != self.crc {
            return Err(Fault::Crc);
        }
        Ok(())
    }
}

/// Starts the CRC of a record with the covered part of its header.
pub(super) fn crc_start(header: &[u8; RECORD_HEADER_LEN]) -> crc32fast::Hasher {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[PREFIX_LEN..]);
    crc
}

/// Makes the header of a record.
///
/// # Source
/// docs/formats/log.md "Record".
pub(super) fn encode_header(meta: &RecordMeta, kind: Kind, ltx: &[u8]) -> [u8; RECORD_HEADER_LEN] {
    assert!(ltx.len() <= MAX_LTX_LEN, "record of {} bytes", ltx.len());
    let flags = match kind {
        Kind::Transactions => 0,
        Kind::Base { remove_older } => FLAG_BASE | if remove_older { FLAG_REMOVE_OLDER } else { 0 },
    } | if meta.wal.is_some() { FLAG_WAL } else { 0 };
    let wal = meta.wal.unwrap_or_default();
    let len = u32::try_from(ltx.len()).unwrap_or(u32::MAX);
    let mut out = [0; RECORD_HEADER_LEN];
    let mut put = Put {
        out: &mut out,
        at: 0,
    };
    put.u32(len + u32::try_from(FIXED_LEN).unwrap_or(0));
    put.u32(0); // the CRC, below
    put.u32(len);
    put.u32(flags);
    put.u64(meta.epoch);
    put.u64(meta.min_txid.0);
    put.u64(meta.max_txid.0);
    put.u64(meta.pre_apply_checksum.get());
    put.u64(meta.post_apply_checksum.get());
    put.u64(meta.timestamp_ms.cast_unsigned());
    put.u32(meta.commit);
    put.u32(meta.page_size.get());
    put.u32(wal.salt1);
    put.u32(wal.salt2);
    put.u32(wal.frame_no);
    put.u32(wal.checksum1);
    put.u32(wal.checksum2);
    put.u32(0);
    let mut crc = crc_start(&out);
    crc.update(ltx);
    out[4..8].copy_from_slice(&crc.finalize().to_be_bytes());
    out
}

/// Reads the fields of a header whose CRC holds.
pub(super) fn decode_fields(
    header: &[u8; RECORD_HEADER_LEN],
    ltx_len: usize,
) -> Result<(RecordMeta, Kind), Fault> {
    let flags = u32_at(header, 12);
    if flags & !(FLAG_WAL | FLAG_BASE | FLAG_REMOVE_OLDER) != 0 || u32_at(header, 92) != 0 {
        return Err(Fault::Field("flags"));
    }
    let kind = match (flags & FLAG_BASE != 0, flags & FLAG_REMOVE_OLDER != 0) {
        (true, remove_older) => Kind::Base { remove_older },
        (false, false) => Kind::Transactions,
        (false, true) => return Err(Fault::Field("flags")),
    };
    if (kind == Kind::Transactions) != (ltx_len > 0) {
        return Err(Fault::Length);
    }
    let meta = RecordMeta {
        epoch: u64_at(header, 16),
        min_txid: Txid(u64_at(header, 24)),
        max_txid: Txid(u64_at(header, 32)),
        pre_apply_checksum: Checksum::new(u64_at(header, 40)),
        post_apply_checksum: Checksum::new(u64_at(header, 48)),
        timestamp_ms: u64_at(header, 56).cast_signed(),
        commit: u32_at(header, 64),
        page_size: PageSize::new(u32_at(header, 68)).ok_or(Fault::Field("page size"))?,
        wal: (flags & FLAG_WAL != 0).then(|| WalCursor {
            salt1: u32_at(header, 72),
            salt2: u32_at(header, 76),
            frame_no: u32_at(header, 80),
            checksum1: u32_at(header, 84),
            checksum2: u32_at(header, 88),
        }),
    };
    if !range_is_valid(&meta, kind) {
        return Err(Fault::Field("transaction range"));
    }
    Ok((meta, kind))
}

/// Says whether a record may carry this range; the first transaction is 1, a base may be 0.
pub(super) fn range_is_valid(meta: &RecordMeta, kind: Kind) -> bool {
    let first = if kind == Kind::Transactions { 1 } else { 0 };
    (first..=meta.max_txid.0).contains(&meta.min_txid.0) && meta.max_txid.0 < u64::MAX
}

/// Reads a whole record back from memory and returns its length.
pub(super) fn decode(bytes: &Bytes) -> Result<(Record, usize), Fault> {
    let header = bytes.first_chunk().ok_or(Fault::CutShort)?;
    let prefix = Prefix::parse(header)?;
    let end = RECORD_HEADER_LEN + prefix.ltx_len;
    if bytes.len() < end {
        return Err(Fault::CutShort);
    }
    let mut crc = crc_start(header);
    crc.update(&bytes[RECORD_HEADER_LEN..end]);
    prefix.check(crc)?;
    let (meta, _) = decode_fields(header, prefix.ltx_len)?;
    let ltx = bytes.slice(RECORD_HEADER_LEN..end);
    Ok((Record { meta, ltx }, end))
}

struct Put<'a> {
    out: &'a mut [u8; RECORD_HEADER_LEN],
    at: usize,
}

impl Put<'_> {
    fn u32(&mut self, n: u32) {
        self.out[self.at..self.at + 4].copy_from_slice(&n.to_be_bytes());
        self.at += 4;
    }

    fn u64(&mut self, n: u64) {
        self.out[self.at..self.at + 8].copy_from_slice(&n.to_be_bytes());
        self.at += 8;
    }
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut n = [0; 4];
    n.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(n)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut n = [0; 8];
    n.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> RecordMeta {
        RecordMeta {
            epoch: 3,
            min_txid: Txid(7),
            max_txid: Txid(9),
            pre_apply_checksum: Checksum::new(0x11),
            post_apply_checksum: Checksum::new(0x22),
            timestamp_ms: -5,
            commit: 12,
            page_size: PageSize::new(4096).unwrap(),
            wal: Some(WalCursor {
                salt1: 1,
                salt2: 2,
                frame_no: 3,
                checksum1: 4,
                checksum2: 5,
            }),
        }
    }

    fn encode(meta: &RecordMeta, kind: Kind, ltx: &[u8]) -> Bytes {
        let mut bytes = encode_header(meta, kind, ltx).to_vec();
        bytes.extend_from_slice(ltx);
        bytes.into()
    }

    #[test]
    fn round_trip_and_golden_bytes() {
        let bytes = encode(&meta(), Kind::Transactions, b"ltx!");
        let (record, len) = decode(&bytes).unwrap();
        assert_eq!(
            (record.meta, &record.ltx[..], len),
            (meta(), &b"ltx!"[..], 100)
        );
        // Offsets as in docs/formats/log.md.
        assert_eq!(u32_at(&bytes, 0), 92);
        assert_eq!(u32_at(&bytes, 4), crc32fast::hash(&bytes[8..]));
        assert_eq!(u32_at(&bytes, 12), 1);
        assert_eq!(u64_at(&bytes, 24), 7);
        assert_eq!(u64_at(&bytes, 48), 0x8000_0000_0000_0022);
        assert_eq!(u32_at(&bytes, 80), 3);
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_seen() {
        let bytes = encode(&meta(), Kind::Transactions, b"some ltx bytes");
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes.slice(..len)), Err(Fault::CutShort), "{len}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad.into()).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn refuses_what_is_never_written() {
        let backwards = RecordMeta {
            min_txid: Txid(10),
            ..meta()
        };
        let base = Kind::Base { remove_older: true };
        for (meta, kind, ltx) in [
            (backwards, Kind::Transactions, &b"x"[..]),
            (meta(), Kind::Transactions, b""),
            (meta(), base, b"x"),
        ] {
            assert!(decode(&encode(&meta, kind, ltx)).is_err());
        }
        assert!(decode(&encode(&meta(), base, b"")).is_ok());
    }
}
