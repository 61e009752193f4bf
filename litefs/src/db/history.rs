//! Lets history go that nobody is known to want.
//!
//! A log is for replicas that fell behind. While none follows, nor was seen within the retention, a program that writes
//! as fast as it can would only fill page cache and disk with it: to write it cost a quarter of such a program's speed
//! (adr/0007). So once the log of a burst is long, it begins anew at the present position. What joins later is sent the
//! pages that differ, as it would be past the retention.

use std::sync::atomic::Ordering;

use super::log::{Older, RecordMeta};
use super::{Db, DbError, Inner};
use crate::ltx::PageSize;

impl Db {
    /// Begins the log anew if it has grown to a segment, by half of one since the last upkeep, and nobody wants what is
    /// in it. Returns whether it did.
    ///
    /// The files are not synced for that: after a power cut they are what SQLite promised, and captured as such.
    ///
    /// # Errors
    /// Disk.
    pub fn forget_history(&self) -> Result<bool, DbError> {
        let full = self.node.log_options.segment_bytes;
        let before = self.captured_at_upkeep.load(Ordering::Relaxed);
        let is_burst = self.captured_bytes() - before > full / 2;
        let is_long = || self.log.len_bytes() >= full;
        let is_pinned = || !self.pins.lock().is_empty();
        if !is_burst || self.node.history.is_wanted() || !is_long() || is_pinned() {
            return Ok(false);
        }
        let mut inner = self.lock();
        if inner.trouble.is_some() || self.log.end_pos() != inner.pos {
            return Ok(false);
        }
        // First, so that a start after a crash finds checksums that the log leads on from.
        self.persist_locked(&mut inner, false)?;
        self.log
            .restart(&self.meta_here(&inner), Older::Remove)
            .map_err(self.log_error())?;
        Ok(true)
    }

    /// Describes a log that begins at the present position.
    pub(super) fn meta_here(&self, inner: &Inner) -> RecordMeta {
        RecordMeta {
            epoch: self.node.epoch.load(Ordering::Acquire),
            min_txid: inner.pos.txid,
            max_txid: inner.pos.txid,
            pre_apply_checksum: inner.pos.post_apply_checksum,
            post_apply_checksum: inner.pos.post_apply_checksum,
            timestamp_ms: self.published.lock().timestamp_ms,
            commit: inner.page_count,
            page_size: inner.page_size.unwrap_or(PageSize::DEFAULT),
            wal: inner.cursor,
        }
    }
}
