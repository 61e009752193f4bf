//! Makes one file of several that follow each other.
//!
//! A page in a file is a whole image, so the last file that has a page decides, and ranges may
//! overlap as long as each goes further than the one before:
//!
//! ```text
//! prev [3 .. 7]        next.min <= prev.max + 1 <= next.max
//! next      [6 .. 9]
//! ```
//!
//! That is right only if a range which grows the database carries every page it adds: else a page
//! that was cut off in between would come back with its old content. So that is checked.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::page::{Page, PageData};
use super::{Decoder, Encoder, Header, HeaderFlags, LtxError, Pgno, Trailer};

/// Merges files, the oldest first, into one.
///
/// The result starts where the first starts and ends as the last ends. It keeps checksums if all
/// inputs do. Time is that of the last input; WAL place and node are unset, for there are several.
/// Every input is verified on the way. LZ4 blocks are copied as they are.
///
/// # Errors
/// The first fault of an input, ranges that do not follow each other, or differ in page size.
pub fn compact(inputs: &[&[u8]]) -> Result<Vec<u8>, LtxError> {
    merge(inputs, true)
}

/// Merges files as [`compact`] does, and leaves the checksums of the database out, for backups
/// that Litestream can restore. One input is enough.
///
/// # Errors
/// As [`compact`].
pub fn compact_untracked(inputs: &[&[u8]]) -> Result<Vec<u8>, LtxError> {
    merge(inputs, false)
}

fn merge(inputs: &[&[u8]], keep_checksums: bool) -> Result<Vec<u8>, LtxError> {
    let mut inputs = inputs
        .iter()
        .map(|bytes| Input::new(bytes))
        .collect::<Result<Vec<_>, _>>()?;
    for i in 1..inputs.len() {
        let (before, after) = inputs.split_at_mut(i);
        after[0].follows(&before[i - 1].decoder)?;
    }
    let (Some(first), Some(last)) = (inputs.first(), inputs.last()) else {
        return Err(LtxError::NoInputs);
    };
    let tracked = keep_checksums && inputs.iter().all(Input::tracked);
    let header = merged_header(first.decoder.header(), last.decoder.header(), tracked);
    let post_apply = last.decoder.trailer().post_apply_checksum;
    let commit = header.commit;

    let mut encoder = Encoder::new(header, Vec::new())?;
    // Lowest page first, of the same page the latest input first.
    let mut heap = BinaryHeap::new();
    for (i, input) in inputs.iter_mut().enumerate() {
        heap.extend(input.advance()?.map(|pgno| Reverse((pgno, Reverse(i)))));
    }
    let mut taken = None;
    while let Some(Reverse((pgno, Reverse(i)))) = heap.pop() {
        let input = &mut inputs[i];
        if taken != Some(pgno) && pgno.get() <= commit {
            input.copy_to(&mut encoder)?;
        }
        taken = Some(pgno);
        heap.extend(input.advance()?.map(|pgno| Reverse((pgno, Reverse(i)))));
    }
    for input in inputs {
        input.finish()?;
    }
    encoder.finish(post_apply.filter(|_| tracked))
}

fn merged_header(first: &Header, last: &Header, tracked: bool) -> Header {
    Header {
        flags: if tracked {
            HeaderFlags::TRACKED
        } else {
            HeaderFlags::NO_CHECKSUM
        },
        page_size: first.page_size,
        commit: last.commit,
        min_txid: first.min_txid,
        max_txid: last.max_txid,
        timestamp_ms: last.timestamp_ms,
        pre_apply_checksum: first.pre_apply_checksum.filter(|_| tracked),
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0,
    }
}

/// One of the files, and the page it is at.
struct Input<'a> {
    decoder: Decoder<'a>,
    page: Option<Page<'a>>,
    data: Vec<u8>,
    /// Pages of the database after the file before; those above must all be here.
    base: Option<u32>,
    /// Pages above `base` seen.
    grown: u32,
}

impl<'a> Input<'a> {
    fn new(bytes: &'a [u8]) -> Result<Input<'a>, LtxError> {
        let decoder = Decoder::new(bytes)?;
        Ok(Input {
            data: vec![0; decoder.header().page_size.len()],
            decoder,
            page: None,
            base: None,
            grown: 0,
        })
    }

    fn tracked(&self) -> bool {
        self.decoder.header().flags.tracks_checksums()
    }

    /// Checks that the file goes on where `prev` ends, and remembers what it must add.
    fn follows(&mut self, prev: &Decoder<'_>) -> Result<(), LtxError> {
        let Trailer {
            post_apply_checksum: want,
            ..
        } = prev.trailer();
        let (header, prev) = (self.decoder.header(), prev.header());
        if header.page_size != prev.page_size {
            return Err(LtxError::MixedPageSize {
                have: header.page_size,
                want: prev.page_size,
            });
        }
        let (min, max, prev_max) = (header.min_txid, header.max_txid, prev.max_txid);
        if max <= prev_max || min > prev_max.next() {
            return Err(LtxError::TxidGap { prev_max, min, max });
        }
        if let (true, Some(have), Some(want)) =
            (min == prev_max.next(), header.pre_apply_checksum, want)
            && have != want
        {
            return Err(LtxError::ChecksumChain { min, have, want });
        }
        self.base = Some(prev.commit);
        Ok(())
    }

    fn advance(&mut self) -> Result<Option<Pgno>, LtxError> {
        self.page = self.decoder.next_raw(&mut self.data)?;
        let pgno = self.page.map(|page| page.pgno);
        if pgno
            .zip(self.base)
            .is_some_and(|(pgno, base)| pgno.get() > base)
        {
            self.grown += 1;
        }
        Ok(pgno)
    }

    fn copy_to(&self, encoder: &mut Encoder) -> Result<(), LtxError> {
        match self.page {
            Some(Page {
                pgno,
                data: PageData::Block(block),
            }) => encoder.page_with_block(pgno, &self.data, block),
            Some(Page { pgno, .. }) => encoder.page(pgno, &self.data),
            None => Ok(()),
        }
    }

    fn finish(self) -> Result<(), LtxError> {
        let header = self.decoder.finish()?.header;
        let (from, to) = (self.base.unwrap_or(header.commit), header.commit);
        let lock_pgno = header.page_size.lock_pgno().get();
        let has_lock_page = from < lock_pgno && lock_pgno <= to;
        if to.saturating_sub(from) - u32::from(has_lock_page) != self.grown {
            return Err(LtxError::GrowthGap {
                max: header.max_txid,
                from,
                to,
                have: self.grown,
            });
        }
        Ok(())
    }
}
