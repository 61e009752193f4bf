//! Reads a file, page by page, from memory.
//!
//! Nothing the bytes say is believed before it is checked: lengths before they are used, the page
//! index against the pages as they pass, everything against the file checksum at the end. Until
//! [`Decoder::finish`] has said yes, pages are only probably right, so apply them after a
//! [`verify`], or to a place that can be thrown away.

use super::encoder::{FileSums, PageOrder};
use super::header::{HEADER_LEN, be_u64};
use super::index::{INDEX_LEN_LEN, IndexReader};
use super::page::{END_MARKER, PAGE_HEADER_LEN, Page, PageData};
use super::trailer::{TRAILER_COVERED_LEN, TRAILER_LEN};
use super::{Header, IndexEntry, LtxError, PageIndex, PageSize, Pgno, Pos, Trailer};

/// Reads a file of version 3.
#[derive(Debug)]
pub struct Decoder<'a> {
    bytes: &'a [u8],
    header: Header,
    trailer: Trailer,
    /// Where the index starts, and the page block must have ended.
    index_start: usize,
    /// Index without its length.
    index: &'a [u8],
    cursor: Cursor<'a>,
}

/// How far the pages have been read.
#[derive(Debug)]
struct Cursor<'a> {
    at: usize,
    ended: bool,
    index: IndexReader<'a>,
    order: PageOrder,
    sums: FileSums,
    page_count: u32,
}

/// What a sound file is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Its header.
    pub header: Header,
    /// Its trailer.
    pub trailer: Trailer,
    /// How many pages it has.
    pub page_count: u32,
}

impl Summary {
    /// Returns the position of a database after the range; `None` where no checksum is kept.
    #[must_use]
    pub fn post_apply_pos(&self) -> Option<Pos> {
        let post_apply_checksum = self.trailer.post_apply_checksum?;
        let txid = self.header.max_txid;
        Some(Pos {
            txid,
            post_apply_checksum,
        })
    }
}

/// Reads a whole file and checks all of it.
///
/// # Errors
/// The first fault found.
pub fn verify(bytes: &[u8]) -> Result<Summary, LtxError> {
    let mut decoder = Decoder::new(bytes)?;
    let mut buf = vec![0; decoder.header().page_size.len()];
    while decoder.next_page(&mut buf)?.is_some() {}
    decoder.finish()
}

impl<'a> Decoder<'a> {
    /// Starts to read `bytes`, a whole file: checks header and trailer, and finds the index.
    ///
    /// # Errors
    /// Too few bytes, or a header, trailer or index length that cannot be.
    pub fn new(bytes: &'a [u8]) -> Result<Decoder<'a>, LtxError> {
        let header = Header::decode(bytes)?;
        let truncated = |need: u64| LtxError::Truncated {
            part: "page index and trailer",
            need,
            have: (bytes.len() - HEADER_LEN) as u64,
        };
        let fixed_len = (PAGE_HEADER_LEN + INDEX_LEN_LEN + TRAILER_LEN) as u64;
        let body = bytes.get(HEADER_LEN + PAGE_HEADER_LEN..);
        let (rest, trailer) = body
            .and_then(<[u8]>::split_last_chunk::<TRAILER_LEN>)
            .ok_or_else(|| truncated(fixed_len))?;
        let trailer = Trailer::decode(trailer, &header)?;
        let (rest, index_len) = rest
            .split_last_chunk::<INDEX_LEN_LEN>()
            .ok_or_else(|| truncated(fixed_len))?;
        let index_len = be_u64(index_len, 0);
        let pages_len = usize::try_from(index_len)
            .ok()
            .and_then(|len| rest.len().checked_sub(len))
            .ok_or_else(|| truncated(index_len.saturating_add(fixed_len)))?;
        let index = &rest[pages_len..];
        Ok(Decoder {
            cursor: Cursor {
                at: HEADER_LEN,
                ended: false,
                index: IndexReader::new(index),
                order: PageOrder::new(&header),
                sums: FileSums::new(&header, &bytes[..HEADER_LEN]),
                page_count: 0,
            },
            bytes,
            header,
            trailer,
            index_start: HEADER_LEN + PAGE_HEADER_LEN + pages_len,
            index,
        })
    }

    /// Returns the header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the trailer; [`Decoder::finish`] tells whether it is true.
    #[must_use]
    pub fn trailer(&self) -> Trailer {
        self.trailer
    }

    /// Decompresses the next page into `buf`, which is as long as a page, and returns its number,
    /// or nothing at the end. After an error the same page comes again.
    ///
    /// # Errors
    /// A page that is malformed, out of place, or not where the index has it.
    pub fn next_page(&mut self, buf: &mut [u8]) -> Result<Option<Pgno>, LtxError> {
        Ok(self.next_raw(buf)?.map(|page| page.pgno))
    }

    /// Does what `next_page` does, and gives the page as it lies in the file.
    pub(super) fn next_raw(&mut self, buf: &mut [u8]) -> Result<Option<Page<'a>>, LtxError> {
        check_len(buf, self.header.page_size)?;
        if self.cursor.ended {
            return Ok(None);
        }
        let bytes: &'a [u8] = &self.bytes[self.cursor.at..self.index_start];
        let Some(page) = Page::decode(bytes)? else {
            self.end_pages()?;
            return Ok(None);
        };
        let len = page.decompress(buf, self.header.page_size)?;
        let pgno = page.pgno;
        let here = IndexEntry {
            pgno,
            offset: self.cursor.at as u64,
            len: len as u64,
        };
        let mut index = self.cursor.index.clone();
        if index.next_entry()? != Some(here) {
            return Err(LtxError::IndexMismatch { pgno: pgno.get() });
        }
        self.cursor.order.page(&self.header, pgno)?;
        let data_len = match page.data {
            PageData::Block(block) => block.len(),
            PageData::Frame(_) => len - PAGE_HEADER_LEN,
        };
        self.cursor.sums.page(pgno, &bytes[..len - data_len], buf);
        self.cursor.index = index;
        self.cursor.at += len;
        self.cursor.page_count += 1;
        Ok(Some(page))
    }

    /// Takes the end marker, after which the index must start and have no entry left.
    fn end_pages(&mut self) -> Result<(), LtxError> {
        let end = self.cursor.at + PAGE_HEADER_LEN;
        if end != self.index_start {
            return Err(LtxError::PageBlockEnd {
                end,
                index: self.index_start,
            });
        }
        if let Some(entry) = self.cursor.index.clone().next_entry()? {
            let pgno = entry.pgno.get();
            return Err(LtxError::IndexMismatch { pgno });
        }
        self.cursor.order.finish(&self.header)?;
        self.cursor.ended = true;
        Ok(())
    }

    /// Checks the file checksum and, for a snapshot that keeps checksums, that of the database,
    /// once all pages have been read.
    ///
    /// # Errors
    /// Pages left, or a checksum that does not match.
    pub fn finish(self) -> Result<Summary, LtxError> {
        let Cursor {
            ended,
            order,
            mut sums,
            page_count,
            ..
        } = self.cursor;
        if !ended {
            let after = order.prev().map_or(0, Pgno::get);
            return Err(LtxError::PagesLeft { after });
        }
        let covered = self.bytes.len() - TRAILER_LEN + TRAILER_COVERED_LEN;
        sums.raw(&self.bytes[self.index_start - END_MARKER.len()..covered]);
        let (stored, computed) = (self.trailer.file_checksum, sums.file());
        if stored != computed {
            return Err(LtxError::FileChecksum { stored, computed });
        }
        sums.check_database(self.trailer.post_apply_checksum)?;
        Ok(Summary {
            header: self.header,
            trailer: self.trailer,
            page_count,
        })
    }

    /// Decompresses one page into `buf`, which is as long as a page, and returns whether the file
    /// has it. Reads the index from its start; for many look-ups take [`Decoder::index`].
    ///
    /// Does not check the file checksum: [`verify`] the file first if its bytes may be wrong.
    ///
    /// # Errors
    /// An index or a page that is malformed.
    pub fn find(&self, pgno: Pgno, buf: &mut [u8]) -> Result<bool, LtxError> {
        let mut index = IndexReader::new(self.index);
        while let Some(entry) = index.next_entry()? {
            if entry.pgno >= pgno {
                if entry.pgno == pgno {
                    self.page_at(entry, buf)?;
                }
                return Ok(entry.pgno == pgno);
            }
        }
        Ok(false)
    }

    /// Decompresses the page of an index entry into `buf`, which is as long as a page.
    ///
    /// # Errors
    /// An entry that is not that of a page of this file, or a page that is malformed.
    pub fn page_at(&self, entry: IndexEntry, buf: &mut [u8]) -> Result<(), LtxError> {
        check_len(buf, self.header.page_size)?;
        let mismatch = || LtxError::IndexMismatch {
            pgno: entry.pgno.get(),
        };
        let start = usize::try_from(entry.offset).map_err(|_| mismatch())?;
        let len = usize::try_from(entry.len).map_err(|_| mismatch())?;
        let end = start.checked_add(len).ok_or_else(mismatch)?;
        let pages = HEADER_LEN..=self.index_start;
        if !pages.contains(&start) || !pages.contains(&end) {
            return Err(mismatch());
        }
        let page = Page::decode(&self.bytes[start..end])?.ok_or_else(mismatch)?;
        if page.pgno != entry.pgno || page.decompress(buf, self.header.page_size)? != len {
            return Err(mismatch());
        }
        Ok(())
    }

    /// Returns the index in memory.
    ///
    /// # Errors
    /// `Index`, if it is malformed.
    pub fn index(&self) -> Result<PageIndex, LtxError> {
        PageIndex::decode(self.index)
    }
}

fn check_len(buf: &[u8], want: PageSize) -> Result<(), LtxError> {
    if buf.len() == want.len() {
        return Ok(());
    }
    let have = buf.len();
    Err(LtxError::PageLen { have, want })
}
