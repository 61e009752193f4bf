//! The page index between the page block and the trailer: where each page lies.
//!
//! | field | form |
//! |---|---|
//! | per page, ascending: page number | unsigned LEB128 |
//! | its offset from the start of the file | unsigned LEB128, bytes |
//! | its length, header included | unsigned LEB128, bytes |
//! | end: one zero byte | unsigned LEB128 |
//! | length of all of the above | 8 bytes, big-endian |
//!
//! The length at the end lets a reader of the last bytes of a file find the index. The file
//! checksum covers all of it.

use super::{LtxError, Pgno};

/// Length of the length in bytes.
pub(super) const INDEX_LEN_LEN: usize = 8;

/// Least length of an entry in bytes.
const MIN_ENTRY_LEN: usize = 3;

/// Where a page lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexEntry {
    /// The page.
    pub pgno: Pgno,
    /// Offset of its header from the start of the file, in bytes.
    pub offset: u64,
    /// Length with its header, in bytes.
    pub len: u64,
}

impl IndexEntry {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        encode_varint(u64::from(self.pgno.get()), out);
        encode_varint(self.offset, out);
        encode_varint(self.len, out);
    }
}

/// Writes the end of the index, and its length, given where it starts.
pub(super) fn encode_end(start: usize, out: &mut Vec<u8>) {
    encode_varint(0, out);
    let len = (out.len() - start) as u64;
    out.extend_from_slice(&len.to_be_bytes());
}

/// Reads an index entry by entry, and to its very end.
#[derive(Debug, Clone)]
pub(super) struct IndexReader<'a> {
    /// What is left; empty after the end marker.
    rest: &'a [u8],
    prev: u32,
}

impl<'a> IndexReader<'a> {
    /// Takes the index without the length after it.
    pub(super) fn new(bytes: &'a [u8]) -> IndexReader<'a> {
        IndexReader {
            rest: bytes,
            prev: 0,
        }
    }

    /// Returns the next entry, or nothing at the end marker, which must be the last byte.
    pub(super) fn next_entry(&mut self) -> Result<Option<IndexEntry>, LtxError> {
        let malformed = LtxError::Index {
            left: self.rest.len(),
        };
        let mut read = || decode_varint(&mut self.rest);
        let Some(raw_pgno) = read() else {
            return Err(malformed);
        };
        if raw_pgno == 0 {
            return match self.rest {
                [] => Ok(None),
                _ => Err(malformed),
            };
        }
        let (Some(offset), Some(len)) = (read(), read()) else {
            return Err(malformed);
        };
        let pgno = u32::try_from(raw_pgno).ok().and_then(Pgno::new);
        match pgno.filter(|p| p.get() > self.prev) {
            Some(pgno) => {
                self.prev = pgno.get();
                Ok(Some(IndexEntry { pgno, offset, len }))
            }
            None => Err(malformed),
        }
    }
}

/// Index of a file in memory, for more than a few look-ups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageIndex {
    /// Ascending.
    entries: Vec<IndexEntry>,
}

impl PageIndex {
    /// Reads an index, given without the length that follows it.
    ///
    /// # Errors
    /// `Index` where the bytes are not ascending entries up to one end marker.
    pub fn decode(bytes: &[u8]) -> Result<PageIndex, LtxError> {
        let mut entries = Vec::with_capacity(bytes.len() / MIN_ENTRY_LEN);
        let mut reader = IndexReader::new(bytes);
        while let Some(entry) = reader.next_entry()? {
            entries.push(entry);
        }
        Ok(PageIndex { entries })
    }

    /// Returns where a page lies, if the file has it.
    #[must_use]
    pub fn find(&self, pgno: Pgno) -> Option<IndexEntry> {
        let found = self.entries.binary_search_by_key(&pgno, |e| e.pgno).ok()?;
        Some(self.entries[found])
    }

    /// Returns all entries, ascending by page number.
    #[must_use]
    pub fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }
}

fn encode_varint(mut n: u64, out: &mut Vec<u8>) {
    while n >= 0x80 {
        out.push((n & 0x7f) as u8 | 0x80);
        n >>= 7;
    }
    out.push((n & 0x7f) as u8);
}

/// Reads a number, or nothing if the bytes end in it or it has more than 64 bits.
fn decode_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut n = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
        if shift == 63 && byte > 1 {
            return None;
        }
        n |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(pgno: u32, offset: u64, len: u64) -> IndexEntry {
        let pgno = Pgno::new(pgno).unwrap();
        IndexEntry { pgno, offset, len }
    }

    #[test]
    fn numbers_of_any_size_come_back() {
        for n in (0..64)
            .flat_map(|bit| [(1u64 << bit) - 1, 1 << bit])
            .chain([u64::MAX])
        {
            let mut bytes = Vec::new();
            encode_varint(n, &mut bytes);
            let mut rest = &bytes[..];
            assert_eq!((decode_varint(&mut rest), rest.len()), (Some(n), 0), "{n}");
            assert_eq!(decode_varint(&mut &bytes[..bytes.len() - 1]), None, "{n}");
        }
        assert_eq!(decode_varint(&mut &[0xff; 11][..]), None);
        assert_eq!(
            decode_varint(&mut &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 2][..]),
            None
        );
    }

    #[test]
    fn an_index_comes_back_and_finds_its_pages() {
        let entries = [
            entry(1, 100, 200),
            entry(7, 300, 4106),
            entry(u32::MAX, 1 << 40, 10),
        ];
        let mut bytes = vec![9; 5];
        entries.iter().for_each(|e| e.encode(&mut bytes));
        encode_end(5, &mut bytes);
        let (bytes, len) = bytes[5..].split_last_chunk::<8>().unwrap();
        assert_eq!(u64::from_be_bytes(*len), bytes.len() as u64);
        let index = PageIndex::decode(bytes).unwrap();
        assert_eq!(index.entries(), entries);
        assert_eq!(index.find(Pgno::new(7).unwrap()), Some(entries[1]));
        assert_eq!(index.find(Pgno::new(6).unwrap()), None);
        for cut in 0..bytes.len() {
            assert!(PageIndex::decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn disorder_and_bytes_after_the_end_are_refused() {
        for bad in [
            &[1, 2, 3, 1, 2, 3, 0][..],
            &[2, 2, 3, 1, 2, 3, 0],
            &[1, 2, 3, 0, 0],
            &[0, 0],
        ] {
            assert!(PageIndex::decode(bad).is_err(), "{bad:?}");
        }
        // Page number 2^32.
        assert!(PageIndex::decode(&[0x80, 0x80, 0x80, 0x80, 0x10, 1, 1, 0]).is_err());
    }
}
