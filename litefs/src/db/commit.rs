//! The one way by which a range of transactions gets into the log of a primary.

use std::sync::atomic::Ordering;

use super::log::{RecordMeta, WalCursor};
use super::{Db, DbError, Inner, steps};
use crate::clock;
use crate::disk::crash_point;
use crate::ltx::{
    Checksum, Encoder, Header, HeaderFlags, PageSize, Pgno, Pos, Txid, page_checksum,
};

/// Pages that some transactions left behind.
pub(super) struct Range<'a> {
    /// Bytes per page.
    pub(super) page_size: PageSize,
    /// Pages the database has afterwards; 0 means dropped.
    pub(super) page_count: u32,
    /// How many transactions they are, 1 or more.
    pub(super) tx_count: u64,
    /// Last version of each page, ascending; the lock page is never among them, nor any past `page_count`.
    pub(super) pages: Vec<(Pgno, &'a [u8])>,
    /// Where the WAL stands after them.
    pub(super) cursor: Option<WalCursor>,
}

impl Db {
    /// Adds a range to the log and moves the position past it.
    ///
    /// # Errors
    /// Log or encoder; then nothing has changed and the range can be captured again.
    pub(super) fn commit_range(&self, inner: &mut Inner, range: &Range<'_>) -> Result<(), DbError> {
        let pre = inner.pos;
        let sums: Vec<(Pgno, Checksum)> = range
            .pages
            .iter()
            .map(|(pgno, data)| (*pgno, page_checksum(*pgno, data)))
            .collect();
        // Also where it was dropped: a log has one page size.
        let logged = inner.page_size.or(self.log.end().map(|end| end.page_size));
        if logged.is_some_and(|size| size != range.page_size) && range.page_count > 0 {
            return self.restart_with_page_size(inner, range, &sums);
        }
        let post = inner.checksums.total_after(range.page_count, &sums);
        let max_txid = Txid(pre.txid.0 + range.tx_count);
        let meta = RecordMeta {
            epoch: self.node.epoch.load(Ordering::Acquire),
            min_txid: pre.txid.next(),
            max_txid,
            pre_apply_checksum: pre.post_apply_checksum,
            post_apply_checksum: post,
            timestamp_ms: clock::wall_ms(),
            commit: range.page_count,
            page_size: range.page_size,
            wal: range.cursor,
        };
        let encoded = self.encode(std::mem::take(&mut inner.encoded), &meta, &range.pages)?;
        crash_point(steps::COMMIT_ENCODED);
        let appended = self.log.append(&meta, &encoded).map_err(self.log_error());
        self.captured_bytes
            .fetch_add(encoded.len() as u64, Ordering::Relaxed);
        inner.encoded = encoded;
        if inner.encoded.capacity() > KEEP_BUFFER {
            inner.encoded = Vec::new();
        }
        appended?;
        crash_point(steps::COMMIT_LOGGED);
        self.take_over(inner, range, &sums);
        inner.pos = Pos {
            txid: max_txid,
            post_apply_checksum: post,
        };
        debug_assert_eq!(inner.checksums.total(), post, "INV-DB-1");
        self.publish(inner, meta.timestamp_ms);
        Ok(())
    }

    /// Moves checksums, page count and cursor to what a range left behind.
    fn take_over(&self, inner: &mut Inner, range: &Range<'_>, sums: &[(Pgno, Checksum)]) {
        if inner.checksums.page_size() != range.page_size {
            inner.checksums = super::page_checksums::PageChecksums::new(range.page_size);
        }
        inner.checksums.truncate(range.page_count);
        for (pgno, sum) in sums {
            inner.checksums.set(*pgno, *sum);
        }
        inner.page_size = (range.page_count > 0).then_some(range.page_size);
        inner.page_count = range.page_count;
        inner.cursor = range.cursor;
    }

    /// Starts the log anew: LTX has one page size per history, so replicas get a snapshot.
    fn restart_with_page_size(
        &self,
        inner: &mut Inner,
        range: &Range<'_>,
        sums: &[(Pgno, Checksum)],
    ) -> Result<(), DbError> {
        let mut checksums = super::page_checksums::PageChecksums::new(range.page_size);
        for (pgno, sum) in sums {
            checksums.set(*pgno, *sum);
        }
        let pos = Pos {
            txid: Txid(inner.pos.txid.0 + range.tx_count),
            post_apply_checksum: checksums.total(),
        };
        let meta = RecordMeta {
            epoch: self.node.epoch.load(Ordering::Acquire),
            min_txid: pos.txid,
            max_txid: pos.txid,
            pre_apply_checksum: inner.pos.post_apply_checksum,
            post_apply_checksum: pos.post_apply_checksum,
            timestamp_ms: clock::wall_ms(),
            commit: range.page_count,
            page_size: range.page_size,
            wal: range.cursor,
        };
        self.log
            .restart(&meta, super::log::Older::Remove)
            .map_err(self.log_error())?;
        crash_point(steps::COMMIT_LOGGED);
        inner.checksums = checksums;
        inner.page_size = Some(range.page_size);
        inner.page_count = range.page_count;
        inner.cursor = range.cursor;
        inner.pos = pos;
        self.publish(inner, meta.timestamp_ms);
        Ok(())
    }

    pub(super) fn encode(
        &self,
        buf: Vec<u8>,
        meta: &RecordMeta,
        pages: &[(Pgno, &[u8])],
    ) -> Result<Vec<u8>, DbError> {
        let header = Header {
            flags: HeaderFlags::TRACKED,
            page_size: meta.page_size,
            commit: meta.commit,
            min_txid: meta.min_txid,
            max_txid: meta.max_txid,
            timestamp_ms: meta.timestamp_ms,
            pre_apply_checksum: (meta.min_txid.0 > 1).then_some(meta.pre_apply_checksum),
            wal_offset: 0,
            wal_size: 0,
            // Where the WAL stands is in the log's own record.
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: self.node.node_id,
        };
        let mut encoder = Encoder::new(header, buf).map_err(self.ltx_error())?;
        if meta.wal.is_none() || pages.len() > COMPRESS_PAGES {
            // A program waits for this: at every commit of a rollback mode, at every checkpoint when it writes as fast
            // as it can.
            encoder = encoder.stored();
        }
        for (pgno, data) in pages {
            encoder.page(*pgno, data).map_err(self.ltx_error())?;
        }
        encoder
            .finish(Some(meta.post_apply_checksum))
            .map_err(self.ltx_error())
    }
}

/// Ranges of more pages are stored as they are; compaction is free to compress them.
const COMPRESS_PAGES: usize = 16;

/// Buffers larger than this are given back after use, in bytes.
pub(super) const KEEP_BUFFER: usize = 16 << 20;
