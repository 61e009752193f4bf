//! Makes a file, page by page, in memory.
//!
//! ```text
//! header | page, page, ... ascending | end marker | page index | trailer
//! ```
//!
//! This runs in every commit of the primary, so nothing is allocated per page: LZ4's hash table
//! is made once, pages are compressed straight into the output, and the page index is read back
//! from the output at the end.

use crc_fast::{CrcAlgorithm, Digest};
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use super::header::HEADER_LEN;
use super::index::{self, IndexEntry};
use super::page::{BLOCK_OFFSET, END_MARKER, Page, PageData, encode_page_header};
use super::trailer::TRAILER_COVERED_LEN;
use super::{Checksum, Header, LtxError, PageSize, Pgno, Trailer, page_checksum};

/// Makes a file of version 3.
#[derive(Debug)]
pub struct Encoder {
    header: Header,
    out: Vec<u8>,
    order: PageOrder,
    sums: FileSums,
    lz4: Lz4,
}

impl Encoder {
    /// Starts a file in `out`, whose content is dropped and whose memory is used again.
    ///
    /// # Errors
    /// A rule of [`Header::validate`] broken.
    pub fn new(header: Header, mut out: Vec<u8>) -> Result<Encoder, LtxError> {
        header.validate()?;
        out.clear();
        let bytes = header.encode();
        out.extend_from_slice(&bytes);
        Ok(Encoder {
            order: PageOrder::new(&header),
            sums: FileSums::new(&header, &bytes),
            lz4: Lz4::new(header.page_size),
            header,
            out,
        })
    }

    /// Stores the pages that follow without compressing them: ten times faster, and as legal.
    #[must_use]
    pub fn stored(mut self) -> Encoder {
        self.lz4.table = None;
        self
    }

    /// Adds a page. Pages ascend; a snapshot has all of them, but never the lock page.
    ///
    /// A range that grows the database carries every page it adds, or it cannot be compacted.
    ///
    /// # Errors
    /// A page out of place, or not one page long; the encoder is as it was.
    pub fn page(&mut self, pgno: Pgno, data: &[u8]) -> Result<(), LtxError> {
        self.check(pgno, data)?;
        let at = self.out.len();
        let block_len = self.lz4.compress(data, BLOCK_OFFSET, &mut self.out);
        self.out[at..at + BLOCK_OFFSET].copy_from_slice(&encode_page_header(pgno, block_len));
        self.sums.page(pgno, &self.out[at..at + BLOCK_OFFSET], data);
        Ok(())
    }

    /// Adds a page whose LZ4 block is at hand.
    pub(super) fn page_with_block(
        &mut self,
        pgno: Pgno,
        data: &[u8],
        block: &[u8],
    ) -> Result<(), LtxError> {
        self.check(pgno, data)?;
        let header = encode_page_header(pgno, block_len(block.len()));
        self.out.extend_from_slice(&header);
        self.out.extend_from_slice(block);
        self.sums.page(pgno, &header, data);
        Ok(())
    }

    /// Ends the file with the checksum of the database after it (none where none is kept).
    ///
    /// # Errors
    /// A checksum that the header does not allow or the pages of a snapshot do not have, or a
    /// snapshot that lacks its last pages.
    pub fn finish(mut self, post_apply: Option<Checksum>) -> Result<Vec<u8>, LtxError> {
        self.order.finish(&self.header)?;
        self.sums.check_database(post_apply)?;
        let end = self.out.len();
        self.out.extend_from_slice(&END_MARKER);
        let index_start = self.out.len();
        self.append_index(end)?;
        index::encode_end(index_start, &mut self.out);

        let mut trailer = Trailer {
            post_apply_checksum: post_apply,
            file_checksum: Checksum::EMPTY,
        };
        trailer.validate(&self.header)?;
        self.sums.raw(&self.out[end..]);
        self.sums.raw(&trailer.encode()[..TRAILER_COVERED_LEN]);
        trailer.file_checksum = self.sums.file();
        self.out.extend_from_slice(&trailer.encode());
        Ok(self.out)
    }

    fn check(&mut self, pgno: Pgno, data: &[u8]) -> Result<(), LtxError> {
        if data.len() != self.header.page_size.len() {
            return Err(LtxError::PageLen {
                have: data.len(),
                want: self.header.page_size,
            });
        }
        self.order.page(&self.header, pgno)
    }

    /// Appends an index entry for each page between the header and `end`.
    fn append_index(&mut self, end: usize) -> Result<(), LtxError> {
        let mut at = HEADER_LEN;
        while at < end {
            let page = Page::decode(&self.out[at..end])?;
            let Some(Page {
                pgno,
                data: PageData::Block(block),
            }) = page
            else {
                unreachable!("offset {at} of our own pages is {page:?}")
            };
            let len = BLOCK_OFFSET + block.len();
            let entry = IndexEntry {
                pgno,
                offset: at as u64,
                len: len as u64,
            };
            entry.encode(&mut self.out);
            at += len;
        }
        Ok(())
    }
}

/// The order pages of a file must have; the same for its writer and its reader.
#[derive(Debug)]
pub(super) struct PageOrder {
    prev: Option<Pgno>,
    lock_pgno: Pgno,
}

impl PageOrder {
    pub(super) fn new(header: &Header) -> PageOrder {
        PageOrder {
            prev: None,
            lock_pgno: header.page_size.lock_pgno(),
        }
    }

    pub(super) fn prev(&self) -> Option<Pgno> {
        self.prev
    }

    /// Takes the next page, or says why it must not come now.
    pub(super) fn page(&mut self, header: &Header, pgno: Pgno) -> Result<(), LtxError> {
        if pgno == self.lock_pgno {
            return Err(LtxError::LockPage { pgno });
        }
        if pgno.get() > header.commit {
            let commit = header.commit;
            return Err(LtxError::PastCommit { pgno, commit });
        }
        if let Some(prev) = self.prev.filter(|&prev| prev >= pgno) {
            return Err(LtxError::PageOrder { prev, pgno });
        }
        if header.is_snapshot() && self.expected() != u64::from(pgno.get()) {
            return Err(self.gap());
        }
        self.prev = Some(pgno);
        Ok(())
    }

    /// Says whether a snapshot has its last page.
    pub(super) fn finish(&self, header: &Header) -> Result<(), LtxError> {
        if header.is_snapshot() && self.expected() <= u64::from(header.commit) {
            return Err(self.gap());
        }
        Ok(())
    }

    /// The page after the last one, passing over the lock page.
    fn expected(&self) -> u64 {
        let next = u64::from(self.prev.map_or(0, Pgno::get)) + 1;
        next + u64::from(next == u64::from(self.lock_pgno.get()))
    }

    fn gap(&self) -> LtxError {
        LtxError::SnapshotGap {
            want: u32::try_from(self.expected()).unwrap_or(u32::MAX),
        }
    }
}

/// Checksum of the file so far and, for a snapshot that keeps checksums, of the database so far;
/// the same for its writer and its reader.
pub(super) struct FileSums {
    digest: Digest,
    database: Option<Checksum>,
}

impl FileSums {
    pub(super) fn new(header: &Header, header_bytes: &[u8]) -> FileSums {
        let mut digest = Digest::new(CrcAlgorithm::Crc64GoIso);
        digest.update(header_bytes);
        let kept = header.is_snapshot() && header.flags.tracks_checksums();
        FileSums {
            digest,
            database: kept.then_some(Checksum::EMPTY),
        }
    }

    /// Takes a page: the bytes before its data in the file, and the data uncompressed.
    pub(super) fn page(&mut self, pgno: Pgno, before: &[u8], data: &[u8]) {
        self.digest.update(before);
        self.digest.update(data);
        if let Some(database) = &mut self.database {
            *database = *database ^ page_checksum(pgno, data);
        }
    }

    /// Takes bytes that are covered as they are.
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
    }

    pub(super) fn file(&self) -> Checksum {
        Checksum::new(self.digest.finalize())
    }

    /// Says whether the pages of a snapshot have the checksum that is stored for them.
    pub(super) fn check_database(&self, stored: Option<Checksum>) -> Result<(), LtxError> {
        match (stored, self.database) {
            (Some(stored), Some(computed)) if stored != computed => {
                Err(LtxError::DatabaseChecksum { stored, computed })
            }
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for FileSums {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (file, database) = (self.file(), self.database);
        f.debug_struct("FileSums")
            .field("file", &file)
            .field("database", &database)
            .finish()
    }
}

/// LZ4's block compressor with its hash table, which is kept from page to page.
struct Lz4 {
    /// `None` stores pages as they are, in blocks of literals alone.
    table: Option<CompressTable>,
    max_len: usize,
}

impl Lz4 {
    fn new(page_size: PageSize) -> Lz4 {
        let small = page_size.len() < usize::from(u16::MAX);
        Lz4 {
            table: Some(if small {
                CompressTable::small()
            } else {
                CompressTable::large()
            }),
            max_len: get_maximum_output_size(page_size.len()),
        }
    }

    /// Appends `gap` bytes of anything and the block of `data`, and returns the block's length.
    fn compress(&mut self, data: &[u8], gap: usize, out: &mut Vec<u8>) -> u32 {
        let start = out.len() + gap;
        let Some(table) = &mut self.table else {
            out.resize(start, 0);
            push_literals(data, out);
            return block_len(out.len() - start);
        };
        out.resize(start + self.max_len, 0);
        let len = compress_into_with_table(data, &mut out[start..], table)
            .unwrap_or_else(|e| unreachable!("{} bytes into {}: {e}", data.len(), self.max_len));
        out.truncate(start + len);
        block_len(len)
    }
}

/// Appends a block that holds `data` as it is: one sequence, of literals.
///
/// # Source
/// LZ4 block format: token, length in steps of 255, literals; the last sequence has no match.
fn push_literals(data: &[u8], out: &mut Vec<u8>) {
    const IN_TOKEN: usize = 15;
    if let Some(mut rest) = data.len().checked_sub(IN_TOKEN) {
        out.push(0xf0);
        while rest >= 255 {
            out.push(255);
            rest -= 255;
        }
        out.push(u8::try_from(rest).unwrap_or_else(|_| unreachable!("less than 255")));
    } else {
        out.push(
            u8::try_from(data.len() << 4).unwrap_or_else(|_| unreachable!("less than 15 << 4")),
        );
    }
    out.extend_from_slice(data);
}

impl std::fmt::Debug for Lz4 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lz4").finish_non_exhaustive()
    }
}

/// The length of a block of one page, as its size field holds it.
fn block_len(len: usize) -> u32 {
    u32::try_from(len).unwrap_or_else(|_| unreachable!("a page compressed to {len} bytes"))
}
