//! The rollback journal: what the pages of a database were before a transaction.
//!
//! Segments follow each other, each a header padded to a whole sector, then records. A segment begins at the first sector boundary
//! after the records before it. Only the first header's sector and page size count.
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 8 | d9 d5 05 f9 20 a1 63 d7; zeroes before the segment is synced, and after a PERSIST commit |
//! | 8 | 4 | records in the segment; 0xffffffff: as many as the file holds |
//! | 12 | 4 | nonce of the record checksums |
//! | 16 | 4 | pages in the database file before the transaction |
//! | 20, 24 | 4, 4 | sector size, page size |
//!
//! Record: page number (4), the page, checksum (4): nonce plus every 200th byte from `page_size - 200` down to above 0.
//! At the tail there may be the name of a super-journal: the lock page's number (4), name, its length (4), the sum of its
//! bytes (4), magic (8). Numbers are big-endian. Source: SQLite file format, "The Rollback Journal"; `pager.c`.
//!
//! # Which pages may a transaction have changed?
//! The journaled pages are not all of them. SQLite gives out a free-list leaf without journaling it, because nobody needs what it
//! held; it does journal the trunk that listed it. And what SQLite takes for the database's size is the header's count, while
//! the journal holds the file's, so in a file longer than its database (`SQLITE_FCNTL_CHUNK_SIZE`, or a copy with a tail) some pages
//! are new to SQLite, hence not journaled, and old by the journal. Hence INV-JOURNAL-1:
//!
//! `changed ⊆ journaled ∪ leaves of journaled trunks ∪ pages past min(journal's initial count, old page 1's count)`
//!
//! which [`changed_pages`] computes, and `journal_completeness.rs` tests against SQLite.
//!
//! - **A rollback changes pages too**: it restores what was journaled, but a leaf that was given out, spilled to the file and
//!   rolled back keeps its new bytes. At that time the last segment is usually unsynced (no magic), and the trunk's record
//!   may be in it, so the lenient reader takes it too. After a crash even that may be lost: [`freelist_leaves`] then tells.
//! - A VACUUM that changes the page size obeys the rule in pages of the old size.
//! - A transaction that shrinks the database truncates the file after the commit point, still under the exclusive lock.

use std::collections::BTreeSet;
use std::io;

use super::be32;
use super::header::{DB_HEADER_LEN, DbHeader, page_count};
use crate::ltx::{PageSize, Pgno};

/// First bytes of a segment that is synced and not yet committed.
pub const JOURNAL_MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];

/// Length of a segment's header in bytes, without the padding.
pub const JOURNAL_HEADER_LEN: usize = 28;

/// Record count of a segment that is as long as the file.
const RECORDS_BY_FILE_SIZE: u32 = 0xffff_ffff;

/// Bounds within which SQLite takes a sector size.
const SECTOR_SIZES: std::ops::RangeInclusive<u32> = 32..=65536;

/// Longest super-journal name looked for; SQLite's limit on Unix.
const MAX_NAME_LEN: u32 = 512;

/// Step of the record checksum through a page.
const CHECKSUM_STEP: usize = 200;

/// Why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// The first bytes are not a journal's, or were zeroed.
    #[error("journal has no header")]
    NoHeader,
    /// Sector or page size is out of range: the header was torn.
    #[error("journal header has sector size {sector_size}, page size {page_size}")]
    Sizes {
        /// Sector size found.
        sector_size: u32,
        /// Page size found.
        page_size: u32,
    },
    /// Reading failed.
    #[error("read journal")]
    Read(#[source] io::Error),
}

/// A file, or bytes in memory, that can be read at any offset.
pub trait ReadAt {
    /// Returns the length in bytes.
    /// # Errors
    /// If the file cannot tell.
    fn size(&self) -> io::Result<u64>;

    /// Fills `to` from `offset`.
    /// # Errors
    /// `UnexpectedEof` if there are fewer bytes.
    fn read_exact_at(&self, to: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for [u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(to.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        to.copy_from_slice(from);
        Ok(())
    }
}

impl ReadAt for std::fs::File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, to, offset)
    }
}

/// Tells whether a journal with these first bytes is hot if nobody holds RESERVED and the super-journal it may name exists.
///
/// One byte decides for SQLite: zero, or an empty file, means committed. A hot journal without the magic is played back
/// as an empty one.
#[must_use]
pub fn is_hot_header(bytes: &[u8]) -> bool {
    bytes.first().is_some_and(|first| *first != 0)
}

/// Tells whether a write at offset 0 of a journal is PERSIST's commit: 28 zeroes, no more and no less.
///
/// The header of a transaction that begins is zeroes in its magic and count only, and longer.
#[must_use]
pub fn is_zeroed_header(bytes: &[u8]) -> bool {
    bytes.len() == JOURNAL_HEADER_LEN && bytes.iter().all(|b| *b == 0)
}

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalHeader {
    /// Records in the segment, or nothing if the file's size tells.
    pub record_count: Option<u32>,
    /// Start value of the record checksums.
    pub nonce: u32,
    /// Pages in the database file before the transaction.
    pub initial_page_count: u32,
    /// Bytes a segment's header takes, and to which segments are aligned.
    pub sector_size: u32,
    /// Page size in bytes.
    pub page_size: PageSize,
}

impl JournalHeader {
    /// Parses the header of the first segment.
    /// # Errors
    /// `NoHeader` without magic or bytes enough; `Sizes` for sizes SQLite would not take (journals written before 2008 have
    /// page size 0 and are refused as well).
    pub fn parse(bytes: &[u8]) -> Result<JournalHeader, JournalError> {
        let (sector_size, page_size) = match (be32(bytes, 20), be32(bytes, 24)) {
            (Some(sector_size), Some(page_size)) if bytes.starts_with(&JOURNAL_MAGIC) => {
                (sector_size, page_size)
            }
            _ => return Err(JournalError::NoHeader),
        };
        let word = |at: usize| be32(bytes, at).unwrap_or(0);
        let page_size = PageSize::new(page_size)
            .filter(|_| SECTOR_SIZES.contains(&sector_size) && sector_size.is_power_of_two())
            .ok_or(JournalError::Sizes {
                sector_size,
                page_size,
            })?;
        Ok(JournalHeader {
            record_count: Some(word(8)).filter(|n| *n != RECORDS_BY_FILE_SIZE),
            nonce: word(12),
            initial_page_count: word(16),
            sector_size,
            page_size,
        })
    }

    /// Returns the length of a record in bytes.
    #[must_use]
    pub const fn record_len(&self) -> u64 {
        self.page_size.get() as u64 + 8
    }

    /// Returns the checksum of a page, as SQLite writes it after the page.
    #[must_use]
    pub fn checksum(&self, page: &[u8]) -> u32 {
        let first = page.len() % CHECKSUM_STEP;
        let first = if first == 0 { CHECKSUM_STEP } else { first };
        let sampled = page
            .get(first..)
            .unwrap_or(&[])
            .iter()
            .step_by(CHECKSUM_STEP);
        sampled.fold(self.nonce, |sum, byte| sum.wrapping_add(u32::from(*byte)))
    }
}

/// A record of a journal: where an old page lies in the journal's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalRecord {
    /// The page.
    pub pgno: Pgno,
    /// Where its old bytes begin, in bytes.
    pub offset: u64,
    /// The segment's nonce.
    nonce: u32,
}

/// The records of a journal, in file order, without a look at checksums.
#[derive(Debug)]
pub struct JournalReader<'a, F: ?Sized> {
    file: &'a F,
    file_len: u64,
    first: JournalHeader,
    nonce: u32,
    left: u64,
    offset: u64,
    unsynced: Unsynced,
}

/// What to do about a last segment that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unsynced {
    Ignore,
    Want,
    Reading,
}

impl<'a, F: ReadAt + ?Sized> JournalReader<'a, F> {
    /// Opens a journal, to read what SQLite would play back after a crash.
    /// # Errors
    /// As [`JournalHeader::parse`], and if reading fails.
    pub fn new(file: &'a F) -> Result<JournalReader<'a, F>, JournalError> {
        JournalReader::open(file, Unsynced::Ignore)
    }

    /// Opens a journal, to read all that was written to it, the last segment included if it was not synced.
    /// # Errors
    /// As [`JournalReader::new`].
    pub fn with_unsynced(file: &'a F) -> Result<JournalReader<'a, F>, JournalError> {
        JournalReader::open(file, Unsynced::Want)
    }

    fn open(file: &'a F, unsynced: Unsynced) -> Result<JournalReader<'a, F>, JournalError> {
        let file_len = file.size().map_err(JournalError::Read)?;
        let bytes = read_header(file, 0)?.ok_or(JournalError::NoHeader)?;
        let first = JournalHeader::parse(&bytes)?;
        if file_len < u64::from(first.sector_size) {
            return Err(JournalError::NoHeader);
        }
        let mut reader = JournalReader {
            file,
            file_len,
            first,
            nonce: 0,
            left: 0,
            offset: 0,
            unsynced,
        };
        reader.begin_segment(0, first.record_count, first.nonce);
        Ok(reader)
    }

    /// Returns the first segment's header.
    #[must_use]
    pub const fn header(&self) -> &JournalHeader {
        &self.first
    }

    /// Gives the next record, or nothing at the end of what the segments hold.
    /// # Errors
    /// If reading fails.
    pub fn next_record(&mut self) -> Result<Option<JournalRecord>, JournalError> {
        while self.left == 0 {
            if !self.next_segment()? {
                return Ok(None);
            }
        }
        let mut pgno = [0; 4];
        let end = self.offset.saturating_add(self.first.record_len());
        if end > self.file_len || !read_or_eof(self.file, &mut pgno, self.offset)? {
            return Ok(self.stop());
        }
        // Page 0 is no page, and the lock page's number begins the name of a super-journal.
        let lock_pgno = self.first.page_size.lock_pgno();
        let Some(pgno) = Pgno::new(u32::from_be_bytes(pgno)).filter(|p| *p != lock_pgno) else {
            return Ok(self.stop());
        };
        if self.unsynced == Unsynced::Reading && pgno.get() > self.first.initial_page_count {
            // What follows is left from an earlier, longer journal.
            return Ok(self.stop());
        }
        let record = JournalRecord {
            pgno,
            offset: self.offset + 4,
            nonce: self.nonce,
        };
        self.offset = end;
        self.left -= 1;
        Ok(Some(record))
    }

    /// Moves to the next segment's records, or tells there is none.
    fn next_segment(&mut self) -> Result<bool, JournalError> {
        let start = self
            .offset
            .next_multiple_of(u64::from(self.first.sector_size));
        if self.file_len.saturating_sub(start) < u64::from(self.first.sector_size) {
            return Ok(false);
        }
        let Some(bytes) = read_header(self.file, start)? else {
            return Ok(false);
        };
        let word = |at: usize| be32(&bytes, at).unwrap_or(0);
        if bytes.starts_with(&JOURNAL_MAGIC) {
            let count = Some(word(8)).filter(|n| *n != RECORDS_BY_FILE_SIZE);
            self.begin_segment(start, count, word(12));
            return Ok(true);
        }
        let first = &self.first;
        let same = [
            first.initial_page_count,
            first.sector_size,
            first.page_size.get(),
        ];
        let unsynced = bytes[..12] == [0; 12] && [word(16), word(20), word(24)] == same;
        if self.unsynced == Unsynced::Want && unsynced {
            self.unsynced = Unsynced::Reading;
            self.begin_segment(start, None, word(12));
            return Ok(true);
        }
        Ok(false)
    }

    fn begin_segment(&mut self, start: u64, record_count: Option<u32>, nonce: u32) {
        self.nonce = nonce;
        self.offset = start.saturating_add(u64::from(self.first.sector_size));
        let by_size = self.file_len.saturating_sub(self.offset) / self.first.record_len();
        self.left = record_count.map_or(by_size, u64::from);
    }

    fn stop(&mut self) -> Option<JournalRecord> {
        (self.left, self.offset) = (0, self.file_len);
        None
    }
}

/// Which old pages a journal holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalPages {
    /// Pages in the database file before the transaction.
    pub initial_page_count: u32,
    /// Page size in bytes.
    pub page_size: PageSize,
    /// Each page with the offset of its old bytes in the journal, in file order; a page may come twice, and the first counts.
    pub pages: Vec<(Pgno, u64)>,
}

/// Lists all pages of a journal, leniently: no checksum is verified, an unsynced last segment is read, a cut tail is not.
///
/// Meant for the commit point, and for the end of a rollback, where an unsynced segment is usual. A PERSIST journal may add
/// pages of earlier transactions; that is harmless to a caller who asks what may have changed.
/// # Errors
/// As [`JournalReader::new`].
pub fn journal_pages(file: &(impl ReadAt + ?Sized)) -> Result<JournalPages, JournalError> {
    let mut reader = JournalReader::with_unsynced(file)?;
    let mut pages = Vec::new();
    while let Some(record) = reader.next_record()? {
        pages.push((record.pgno, record.offset));
    }
    let header = reader.header();
    let (initial_page_count, page_size) = (header.initial_page_count, header.page_size);
    Ok(JournalPages {
        initial_page_count,
        page_size,
        pages,
    })
}

/// Which pages a transaction may have changed; nothing else can have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChangedPages {
    /// Journaled pages, and those new to the database: nearly all did change.
    pub journaled_or_new: BTreeSet<Pgno>,
    /// Free-list leaves nobody journals, disjoint from the others: few did change, and a trunk names them by the
    /// hundred, so compare each with its checksum.
    pub leaves: BTreeSet<Pgno>,
    /// What the first page was, if it was journaled. Every transaction counts up in it, but those of one connection in
    /// `locking_mode=EXCLUSIVE` after its first.
    pub old_first_page: Option<Vec<u8>>,
}

impl ChangedPages {
    /// Tells whether the transaction may have changed a page.
    #[must_use]
    pub fn contains(&self, pgno: Pgno) -> bool {
        self.journaled_or_new.contains(&pgno) || self.leaves.contains(&pgno)
    }
}

/// Returns every page up to `final_page_count` that the transaction of this journal may have changed (INV-JOURNAL-1).
///
/// Both at the commit point and after a rollback whose journal is still whole. `final_page_count` is the header's after the transaction:
/// where it shrinks the database, SQLite truncates the file only after the commit point.
/// # Errors
/// As [`JournalReader::new`]; `NoHeader` means that nothing was changed yet.
pub fn changed_pages(
    file: &(impl ReadAt + ?Sized),
    final_page_count: u32,
) -> Result<ChangedPages, JournalError> {
    let journal = journal_pages(file)?;
    let mut initial = journal.initial_page_count;
    let mut old_page = vec![0; journal.page_size.len()];
    let mut changed = ChangedPages::default();
    for &(pgno, offset) in &journal.pages {
        changed.journaled_or_new.insert(pgno);
        if !read_or_eof(file, &mut old_page, offset)? {
            continue;
        }
        let leaves = freelist_leaf_candidates(&old_page, journal.initial_page_count);
        changed.leaves.extend(leaves);
        if pgno == Pgno::ONE {
            changed.old_first_page = Some(old_page.clone());
        }
        if pgno == Pgno::ONE
            && let Some(header) = DbHeader::parse(&old_page)
        {
            let file_size = u64::from(initial) * u64::from(journal.page_size.get());
            initial = initial.min(page_count(&header, file_size));
        }
    }
    let new = (initial..final_page_count).filter_map(|n| Pgno::new(n + 1));
    changed.journaled_or_new.extend(new);
    let lock_pgno = journal.page_size.lock_pgno();
    let exists = |pgno: &Pgno| pgno.get() <= final_page_count && *pgno != lock_pgno;
    changed.journaled_or_new.retain(exists);
    changed
        .leaves
        .retain(|pgno| exists(pgno) && !changed.journaled_or_new.contains(pgno));
    Ok(changed)
}

/// Iterates over the leaves that a page lists if it is a trunk of the free list, as far as can be told from its bytes.
///
/// A trunk is: next trunk (4), number of leaves (4), leaves (4 each). Only the number of leaves is required to fit the page; leaves
/// out of 2..=`initial_page_count` are skipped one by one and the next pointer is not looked at, since SQLite does no
/// more before it gives a leaf out, even in a damaged database. B-tree pages all but never have a small second word.
pub fn freelist_leaf_candidates(
    old_page: &[u8],
    initial_page_count: u32,
) -> impl Iterator<Item = Pgno> + '_ {
    let (words, _) = old_page.as_chunks::<4>();
    let leaf_count = words.get(1).map_or(0, |w| u32::from_be_bytes(*w)) as usize;
    let leaves = words.get(2..).unwrap_or(&[]);
    let leaves = if leaf_count <= leaves.len() {
        &leaves[..leaf_count]
    } else {
        &[]
    };
    let leaves = leaves.iter().map(|w| u32::from_be_bytes(*w));
    leaves
        .filter(move |n| (2..=initial_page_count).contains(n))
        .filter_map(Pgno::new)
}

/// Returns all leaves on the free list of a database, by its file.
///
/// After a rollback, and after playback of a hot journal, these are the pages whose bytes may differ from before the transaction: a
/// leaf that was given out may reach the file before the record of its trunk reaches the journal's disk, so the journal of a crash
/// may not tell. A damaged list is followed as far as it goes.
/// # Errors
/// If reading fails.
pub fn freelist_leaves(db: &(impl ReadAt + ?Sized)) -> io::Result<BTreeSet<Pgno>> {
    let (mut leaves, mut trunks) = (BTreeSet::new(), BTreeSet::new());
    let size = db.size()?;
    let mut page = vec![0; DB_HEADER_LEN];
    if !read_whole(db, &mut page, 0)? {
        return Ok(leaves);
    }
    let Some(header) = DbHeader::parse(&page) else {
        return Ok(leaves);
    };
    let count = page_count(&header, size);
    page.resize(header.page_size.len(), 0);
    let mut next = header.freelist_trunk;
    while let Some(trunk) = next.filter(|trunk| trunk.get() <= count && trunks.insert(*trunk)) {
        if !read_whole(db, &mut page, header.page_size.offset(trunk))? {
            break;
        }
        leaves.extend(freelist_leaf_candidates(&page, count));
        next = be32(&page, 0).and_then(Pgno::new);
    }
    Ok(leaves)
}

/// What to do with a database to roll a journal back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Playback {
    /// Page size in bytes.
    pub page_size: PageSize,
    /// Cut or extend the database to this many pages first. SQLite does not extend it by less than a whole page.
    pub page_count: u32,
    /// Then write these pages, each with the offset of its bytes in the journal, in this order.
    pub pages: Vec<(Pgno, u64)>,
}

/// Reads a hot journal as strictly as SQLite does: up to the first record that is cut or whose checksum fails.
///
/// Pages past the initial count are skipped. Whether the journal is hot is for the caller: [`is_hot_header`], no RESERVED lock, and
/// [`super_journal`] names none or one that exists.
/// # Errors
/// As [`JournalReader::new`]; `NoHeader` and `Sizes` mean there is nothing to roll back.
pub fn playback(file: &(impl ReadAt + ?Sized)) -> Result<Playback, JournalError> {
    let mut reader = JournalReader::new(file)?;
    let header = *reader.header();
    let mut page = vec![0; header.page_size.len()];
    let mut pages = Vec::new();
    while let Some(record) = reader.next_record()? {
        let mut sum = [0; 4];
        if !read_or_eof(file, &mut page, record.offset)?
            || !read_or_eof(file, &mut sum, record.offset + page.len() as u64)?
        {
            break;
        }
        if record.pgno.get() > header.initial_page_count {
            continue;
        }
        let segment = JournalHeader {
            nonce: record.nonce,
            ..header
        };
        if segment.checksum(&page) != u32::from_be_bytes(sum) {
            // SQLite goes on from the file's end, where no segment can begin.
            break;
        }
        pages.push((record.pgno, record.offset));
    }
    Ok(Playback {
        page_size: header.page_size,
        page_count: header.initial_page_count,
        pages,
    })
}

/// Returns the name of the super-journal at the journal's tail: a path, as SQLite wrote it.
///
/// A transaction over several databases commits when the super-journal is deleted. The journal of each is then only cleaned up: its
/// unlink is no commit point and SQLite ignores its failure.
/// # Errors
/// If reading fails; a damaged name is no name.
pub fn super_journal(file: &(impl ReadAt + ?Sized)) -> Result<Option<Vec<u8>>, JournalError> {
    let size = file.size().map_err(JournalError::Read)?;
    let mut tail = [0; 16];
    let Some(tail_at) = size.checked_sub(16) else {
        return Ok(None);
    };
    if !read_or_eof(file, &mut tail, tail_at)? || tail[8..] != JOURNAL_MAGIC {
        return Ok(None);
    }
    let (len, sum) = (be32(&tail, 0).unwrap_or(0), be32(&tail, 4).unwrap_or(0));
    if len == 0 || len > MAX_NAME_LEN {
        return Ok(None);
    }
    let mut name = vec![0; len as usize];
    let Some(name_at) = tail_at.checked_sub(u64::from(len)) else {
        return Ok(None);
    };
    if !read_or_eof(file, &mut name, name_at)? {
        return Ok(None);
    }
    // The sum is over C's char, which is signed on x86 and not on ARM; a path with bytes over 127 tells them apart.
    let signed = name.iter().fold(0u32, |s, b| {
        s.wrapping_add_signed(i32::from(b.cast_signed()))
    });
    let unsigned = name.iter().fold(0u32, |s, b| s.wrapping_add(u32::from(*b)));
    Ok(Some(name).filter(|_| sum == signed || sum == unsigned))
}

/// Reads a segment's header, or gives nothing past the end of the file.
fn read_header(
    file: &(impl ReadAt + ?Sized),
    offset: u64,
) -> Result<Option<[u8; JOURNAL_HEADER_LEN]>, JournalError> {
    let mut bytes = [0; JOURNAL_HEADER_LEN];
    Ok(read_or_eof(file, &mut bytes, offset)?.then_some(bytes))
}

fn read_or_eof(
    file: &(impl ReadAt + ?Sized),
    to: &mut [u8],
    offset: u64,
) -> Result<bool, JournalError> {
    read_whole(file, to, offset).map_err(JournalError::Read)
}

/// Fills `to`, or tells that the file ends before.
fn read_whole(file: &(impl ReadAt + ?Sized), to: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(to, offset) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
