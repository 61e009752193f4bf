//! The database header: the first 100 bytes of page 1.
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 16 | `SQLite format 3\0` |
//! | 16 | 2 | page size, 1 means 65536 |
//! | 18, 19 | 1, 1 | write version, read version: 1 rollback journal, 2 WAL |
//! | 20 | 1 | bytes reserved at the end of each page |
//! | 24 | 4 | change counter |
//! | 28 | 4 | pages in the database |
//! | 32, 36 | 4, 4 | first free-list trunk, pages on the free list |
//! | 92 | 4 | change counter for which the page count is valid |
//!
//! Numbers are big-endian. Source: SQLite file format, "The Database Header".

use super::be32;
use crate::ltx::{PageSize, Pgno};

/// Length of the header in bytes.
pub const DB_HEADER_LEN: usize = 100;

/// First bytes of every SQLite database.
pub const DB_MAGIC: &[u8; 16] = b"SQLite format 3\0";

/// SQLite refuses a page with fewer usable bytes.
const MIN_USABLE_LEN: u32 = 480;

/// Tells whether the bytes begin as a SQLite database does.
#[must_use]
pub fn is_sqlite(bytes: &[u8]) -> bool {
    bytes.starts_with(DB_MAGIC)
}

/// What the daemon needs from a database's first 100 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DbHeader {
    /// Page size in bytes.
    pub page_size: PageSize,
    /// Journal mode a writer needs: 2 is WAL.
    pub write_version: u8,
    /// Journal mode a reader needs: 2 is WAL.
    pub read_version: u8,
    /// Bytes at the end of each page that SQLite leaves alone.
    pub reserved: u8,
    /// Grows with each transaction of a rollback mode; WAL mode may leave it.
    pub change_counter: u32,
    /// Pages in the database, when the header is to be believed; else the file's size decides.
    pub page_count_in_header: Option<u32>,
    /// First trunk page of the free list.
    pub freelist_trunk: Option<Pgno>,
    /// Pages on the free list, trunks and leaves.
    pub freelist_count: u32,
}

impl DbHeader {
    /// Parses a header, or gives nothing if SQLite would not take it for a database.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<DbHeader> {
        let bytes = bytes.get(..DB_HEADER_LEN)?;
        if !is_sqlite(bytes) {
            return None;
        }
        let page_size = decode_page_size(u16::from_be_bytes([bytes[16], bytes[17]]))?;
        let reserved = bytes[20];
        if page_size.get() - u32::from(reserved) < MIN_USABLE_LEN {
            return None;
        }
        let change_counter = be32(bytes, 24)?;
        let page_count = be32(bytes, 28)?;
        let valid = page_count != 0 && be32(bytes, 92)? == change_counter;
        Some(DbHeader {
            page_size,
            write_version: bytes[18],
            read_version: bytes[19],
            reserved,
            change_counter,
            page_count_in_header: valid.then_some(page_count),
            freelist_trunk: Pgno::new(be32(bytes, 32)?),
            freelist_count: be32(bytes, 36)?,
        })
    }

    /// Tells whether connections will use a WAL.
    #[must_use]
    pub const fn is_wal(&self) -> bool {
        self.read_version == 2
    }

    /// Returns the bytes of a page that SQLite uses.
    #[must_use]
    pub const fn usable_len(&self) -> u32 {
        self.page_size.get() - self.reserved as u32
    }
}

/// Returns how many pages a database has, by SQLite's rule: the header's count if valid, else the file's size in pages,
/// where a last, partial page counts.
///
/// A file shorter than the header says is corrupt to SQLite; the caller compares, this function does not.
#[must_use]
pub fn page_count(header: &DbHeader, file_size: u64) -> u32 {
    let of_file = file_size.div_ceil(u64::from(header.page_size.get()));
    header
        .page_count_in_header
        .unwrap_or(u32::try_from(of_file).unwrap_or(u32::MAX))
}

/// Decodes the header's two bytes of page size, in which 1 stands for 65536.
fn decode_page_size(n: u16) -> Option<PageSize> {
    PageSize::new(if n == 1 { 65536 } else { u32::from(n) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn real(page_size: u32, sql: &str) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let db = rusqlite::Connection::open(&path).unwrap();
        db.execute_batch(&format!("PRAGMA page_size={page_size}; {sql}"))
            .unwrap();
        drop(db);
        std::fs::read(&path).unwrap()
    }

    #[test]
    fn reads_real_databases_of_every_page_size() {
        for shift in 9..=16 {
            let bytes = real(
                1 << shift,
                "CREATE TABLE t(x); CREATE TABLE u(x); DROP TABLE u;",
            );
            let header = DbHeader::parse(&bytes).unwrap();
            assert_eq!(header.page_size.get(), 1 << shift);
            assert_eq!(page_count(&header, bytes.len() as u64), 3);
            assert_eq!(header.page_count_in_header, Some(3));
            assert_eq!(
                (header.freelist_trunk, header.freelist_count),
                (Pgno::new(3), 1)
            );
            assert!(!header.is_wal());
        }
        let bytes = real(4096, "PRAGMA journal_mode=wal; CREATE TABLE t(x);");
        assert!(DbHeader::parse(&bytes).unwrap().is_wal());
    }

    #[test]
    fn a_stale_page_count_gives_way_to_the_file() {
        let mut bytes = real(512, "CREATE TABLE t(x)");
        bytes[92] ^= 1;
        let header = DbHeader::parse(&bytes).unwrap();
        assert_eq!(header.page_count_in_header, None);
        assert_eq!(page_count(&header, 512 * 7 + 1), 8);
    }

    #[test]
    fn refuses_what_is_not_a_header() {
        let bytes = real(512, "CREATE TABLE t(x)");
        for len in 0..DB_HEADER_LEN {
            assert!(DbHeader::parse(&bytes[..len]).is_none());
        }
        for (at, value) in [(0, b's'), (16, 3), (17, 9), (20, 33)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert!(DbHeader::parse(&bad).is_none(), "byte {at}");
        }
    }
}
