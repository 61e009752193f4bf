//! The bytes around everything Raft keeps on disk; see docs/formats/raft.md.

/// Length of a file header.
pub(crate) const HEADER_LEN: usize = 16;
/// Length of a record before its body.
pub(crate) const RECORD_HEADER_LEN: usize = 16;
const _: () = assert!(HEADER_LEN == 8 + 4 + 4 && RECORD_HEADER_LEN == 4 * 4);

/// The format version written; others are refused.
const VERSION: u32 = 1;

/// What is wrong with bytes read back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The file ends within a header or record.
    #[error("cut short")]
    CutShort,
    /// The file is gone, or an older one took its place.
    #[error("missing or too old")]
    Missing,
    /// The file begins with something else.
    #[error("not a file of this kind")]
    Magic,
    /// A file of a later version of this program.
    #[error("unknown format version {0}")]
    Version(u32),
    /// The bytes are not those that were written.
    #[error("crc-32 mismatch")]
    Crc,
    /// Two statements of a length disagree.
    #[error("impossible length")]
    Length,
    /// A record of a kind that is never written there.
    #[error("unexpected record of kind {0}")]
    Kind(u32),
    /// The body of a record makes no sense although its checksum holds.
    #[error("unreadable record: {0}")]
    Body(String),
    /// Entries of the log do not follow one another.
    #[error("entry {got} where {want} should be")]
    Gap {
        /// Its index.
        got: u64,
        /// The index expected.
        want: u64,
    },
}

/// Makes the header of a file.
pub(crate) fn encode_header(magic: &[u8; 8]) -> [u8; HEADER_LEN] {
    let mut out = [0; HEADER_LEN];
    out[..8].copy_from_slice(magic);
    out[8..12].copy_from_slice(&VERSION.to_be_bytes());
    let crc = crc32fast::hash(&out[..12]);
    out[12..].copy_from_slice(&crc.to_be_bytes());
    out
}

/// Checks the header of a file.
pub(crate) fn decode_header(bytes: &[u8], magic: &[u8; 8]) -> Result<(), Fault> {
    let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(Fault::CutShort)?;
    if &header[..8] != magic {
        return Err(Fault::Magic);
    }
    if crc32fast::hash(&header[..12]) != u32_at(header, 12) {
        return Err(Fault::Crc);
    }
    match u32_at(header, 8) {
        VERSION => Ok(()),
        other => Err(Fault::Version(other)),
    }
}

/// One record read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    pub(crate) kind: u32,
    pub(crate) body: &'a [u8],
}

/// Adds a record to `out`.
///
/// # Panics
/// On a body of 4 GiB or more, which nothing here comes near.
pub(crate) fn encode_record(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let Ok(len) = u32::try_from(body.len()) else {
        panic!("record of {} bytes", body.len());
    };
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(&(!len).to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&crc(kind, body).to_be_bytes());
    out.extend_from_slice(body);
}

/// Reads the record at the start of `bytes`, and says how long it is.
pub(crate) fn decode_record(bytes: &[u8]) -> Result<(Record<'_>, usize), Fault> {
    let header: &[u8; RECORD_HEADER_LEN] = bytes.first_chunk().ok_or(Fault::CutShort)?;
    let len = u32_at(header, 0);
    if len != !u32_at(header, 4) {
        return Err(Fault::Length);
    }
    let end = RECORD_HEADER_LEN + len as usize;
    let body = bytes.get(RECORD_HEADER_LEN..end).ok_or(Fault::CutShort)?;
    let kind = u32_at(header, 8);
    if crc(kind, body) != u32_at(header, 12) {
        return Err(Fault::Crc);
    }
    Ok((Record { kind, body }, end))
}

/// Says whether bytes that begin with a faulty record can be the remains of one interrupted write: they are
/// cut short by the end of the file, or all zeros, and hold no whole record.
///
/// What was synced has its whole length, so nothing that was acknowledged looks like this.
pub(crate) fn is_torn(bytes: &[u8]) -> bool {
    match decode_record(bytes) {
        Ok(_) => false,
        Err(Fault::CutShort) => !(1..bytes.len()).any(|at| decode_record(&bytes[at..]).is_ok()),
        Err(_) => bytes.iter().all(|b| *b == 0),
    }
}

/// Makes a file of one record.
pub(crate) fn encode_file(magic: &[u8; 8], kind: u32, body: &[u8]) -> Vec<u8> {
    let mut out = encode_header(magic).to_vec();
    encode_record(&mut out, kind, body);
    out
}

/// Reads a file of one record; the offset of a fault comes with it.
pub(crate) fn decode_file<'a>(
    bytes: &'a [u8],
    magic: &[u8; 8],
    kind: u32,
) -> Result<&'a [u8], (u64, Fault)> {
    decode_header(bytes, magic).map_err(|fault| (0, fault))?;
    let at = |fault| (HEADER_LEN as u64, fault);
    let (record, len) = decode_record(&bytes[HEADER_LEN..]).map_err(at)?;
    if record.kind != kind {
        return Err(at(Fault::Kind(record.kind)));
    }
    if HEADER_LEN + len != bytes.len() {
        return Err(at(Fault::Length));
    }
    Ok(record.body)
}

fn crc(kind: u32, body: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&kind.to_be_bytes());
    crc.update(body);
    crc.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut n = [0; 4];
    n.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: &[u8; 8] = b"litefstt";

    #[test]
    fn golden_bytes() {
        let bytes = encode_file(MAGIC, 2, b"{}");
        assert_eq!(&bytes[..12], b"litefstt\0\0\0\x01");
        assert_eq!(u32_at(&bytes, 12), crc32fast::hash(&bytes[..12]));
        assert_eq!(&bytes[16..28], b"\0\0\0\x02\xff\xff\xff\xfd\0\0\0\x02");
        assert_eq!(u32_at(&bytes, 28), crc32fast::hash(b"\0\0\0\x02{}"));
        assert_eq!(&bytes[32..], b"{}");
        assert_eq!(decode_file(&bytes, MAGIC, 2), Ok(&b"{}"[..]));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_seen() {
        let bytes = encode_file(MAGIC, 2, b"some body");
        for len in 0..bytes.len() {
            assert!(
                decode_file(&bytes[..len], MAGIC, 2).is_err(),
                "cut to {len}"
            );
        }
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[i] ^= 1 << bit;
                assert!(decode_file(&bytes, MAGIC, 2).is_err(), "bit {bit} of {i}");
            }
        }
    }

    #[test]
    fn a_torn_write_is_told_from_damage() {
        let mut bytes = Vec::new();
        encode_record(&mut bytes, 1, b"first");
        let first_len = bytes.len();
        encode_record(&mut bytes, 1, b"second");
        for len in first_len + 1..bytes.len() {
            assert!(is_torn(&bytes[first_len..len]), "cut to {len}");
        }
        assert!(is_torn(&[0; 40]));
        // A flipped bit in what is whole is damage, also in the length of the first of two.
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[i] ^= 1 << bit;
                let at = if i < first_len { 0 } else { first_len };
                assert!(!is_torn(&bytes[at..]), "bit {bit} of {i}");
            }
        }
    }
}
