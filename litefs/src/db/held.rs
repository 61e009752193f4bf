//! Commits that wait until other nodes have them: seen at the write that makes them valid, before it reaches the WAL.
//!
//! ```text
//! frames of a transaction ─▶ WAL      the write that completes its commit frame ─▶ log, sent ─▶ quorum ─▶ WAL, reply
//!                                                                                       └─▶ not in time: EIO, in doubt
//! ```
//! A frame counts once its header and page are there and the running checksum fits. SQLite writes the page last, or, where
//! it changed pages of the transaction in place, the headers anew, that of the commit last.
//!
//! INV-HELD-1: what is in doubt is logged and not in the files; nothing is captured meanwhile, and the database changes
//! hands with it: [`fence`](Db::fence) brings it into the WAL, where no reader sees it. Whether it stays is for the cluster to
//! say; once this node is level with a primary, or is one again, it is seen.
//! INV-HELD-2: a commit that others have and whose write fails here (a full disk) is in doubt too: SQLite rolls it back.

use std::fs::File;

use super::apply::Merged;
use super::capture_scan::MAX_RANGE_LEN;
use super::capture_wal::{Scan, read_full};
use super::log::{ReadAfter, WalCursor};
use super::{Db, DbError, Inner};
use crate::ltx::Pos;
use crate::replication::Record;
use crate::sqlite::wal::{
    WAL_FRAME_HEADER_LEN as FRAME_HEADER_LEN, WAL_HEADER_LEN, WalChecksum, WalFrameHeader,
    WalHeader, frame_offset,
};

impl Db {
    /// Looks at what a program is about to write to the WAL. If that completes a commit, logs the transaction and returns
    /// where the database was before it: the bytes may be written once a quorum has what follows.
    ///
    /// # Errors
    /// Disk, log; or one commit is in doubt. The write must then fail.
    pub fn hold_commit(
        &self,
        wal: &File,
        offset: u64,
        data: &[u8],
    ) -> Result<Option<Pos>, DbError> {
        let mut inner = self.lock();
        self.check_not_in_doubt(&inner)?;
        if !self.is_primary() {
            return Err(DbError::Locked {
                what: "this node is no longer the primary: the database",
                path: self.paths.main.clone(),
            });
        }
        let Some(frame) = self.completed_by(wal, offset, data)? else {
            return Ok(None);
        };
        if self.paths.main.metadata().map_or(0, |m| m.len()) == 0 {
            // No SQLite writes a WAL before its database: files are copied in, one after the other.
            return Ok(None);
        }
        let before = inner.pos;
        let start = match inner.cursor {
            Some(c) if (c.salt1, c.salt2) == (frame.header.salts.0, frame.header.salts.1) => c,
            _ => WalCursor {
                salt1: frame.header.salts.0,
                salt2: frame.header.salts.1,
                frame_no: 0,
                checksum1: frame.header.checksum().0,
                checksum2: frame.header.checksum().1,
            },
        };
        if frame.no <= start.frame_no {
            return Ok(None); // an old frame, written again
        }
        let page_size = frame.header.page_size;
        let frame_len = FRAME_HEADER_LEN + page_size.len();
        let len = (frame.no - start.frame_no) as usize * frame_len;
        if len > MAX_RANGE_LEN {
            return Err(DbError::Corrupt {
                what: format!(
                    "a transaction of {} MiB is too large to wait for a quorum (at most {} MiB): commit it in parts",
                    len >> 20,
                    MAX_RANGE_LEN >> 20
                ),
                path: self.paths.wal.clone(),
            });
        }
        let mut frames = vec![0; len];
        let at = frame_offset(page_size, start.frame_no + 1);
        read_full(wal, &mut frames, at).map_err(DbError::io("read", &self.paths.wal))?;
        // As it will be.
        let into = usize::try_from(offset.saturating_sub(at)).unwrap_or(usize::MAX);
        if let Some(room) = frames.get_mut(into..into.saturating_add(data.len())) {
            room.copy_from_slice(data);
        }
        let mut scan = Scan::new(&frame.header, start, None);
        scan.take(&frames, frame_len);
        let Some(commit) = scan.commit.filter(|c| c.cursor.frame_no == frame.no) else {
            return Ok(None); // the checksums are written anew after this
        };
        self.commit_frames(
            &mut inner,
            &frames,
            frame_len,
            page_size,
            &commit,
            &scan.pgnos,
        )?;
        inner.index_change = None;
        inner.unseen = Some(frame.no);
        Ok(Some(before))
    }

    /// Returns the commit frame that a write makes whole, as far as that frame alone can tell.
    fn completed_by(
        &self,
        wal: &File,
        offset: u64,
        data: &[u8],
    ) -> Result<Option<Completed>, DbError> {
        let io = || DbError::io("read", &self.paths.wal);
        let mut head = [0; WAL_HEADER_LEN];
        if offset < WAL_HEADER_LEN as u64
            || read_full(wal, &mut head, 0).map_err(io())? < head.len()
        {
            return Ok(None);
        }
        let Ok(header) = WalHeader::decode(&head) else {
            return Ok(None);
        };
        let frame_len = (FRAME_HEADER_LEN + header.page_size.len()) as u64;
        // A write may span frames; the last one it touches is the one that can be completed.
        let last = offset + data.len() as u64 - 1;
        let no = (last - WAL_HEADER_LEN as u64) / frame_len + 1;
        let Ok(no) = u32::try_from(no) else {
            return Ok(None);
        };
        let at = frame_offset(header.page_size, no);
        let mut frame = vec![0; FRAME_HEADER_LEN + header.page_size.len()];
        let there = read_full(wal, &mut frame, at).map_err(io())?;
        let from = at.max(offset);
        // Both within a frame, or within what is written.
        let (into, skip) = (within(from - at), within(from - offset));
        let fresh = &data[skip..];
        frame[into..into + fresh.len()].copy_from_slice(fresh);
        if there.max(into + fresh.len()) < frame.len() {
            return Ok(None); // its page comes next
        }
        let Some(head) = frame.first_chunk().and_then(WalFrameHeader::decode) else {
            return Ok(None);
        };
        if head.commit == 0 || head.salts != header.salts {
            return Ok(None);
        }
        let before = match no {
            1 => header.checksum(),
            _ => {
                let mut before = [0; FRAME_HEADER_LEN];
                let at = frame_offset(header.page_size, no - 1);
                match at >= offset {
                    true => {
                        let skip = within(at - offset);
                        before.copy_from_slice(&data[skip..skip + FRAME_HEADER_LEN]);
                    }
                    false => {
                        read_full(wal, &mut before, at).map_err(io())?;
                    }
                }
                match WalFrameHeader::decode(&before) {
                    Some(before) => before.checksum,
                    None => return Ok(None),
                }
            }
        };
        let sum: WalChecksum = before
            .update(header.order, &frame[..8])
            .update(header.order, &frame[FRAME_HEADER_LEN..]);
        Ok((sum == head.checksum).then_some(Completed { no, header }))
    }

    /// Learns that a transaction that is logged did not get its quorum in time. `before` is where the database was.
    pub fn leave_in_doubt(&self, before: Pos) {
        let mut inner = self.lock();
        inner.in_doubt.get_or_insert(before);
        inner.unseen = None;
        let has_doubts = &self.node.has_doubts;
        has_doubts.store(true, std::sync::atomic::Ordering::Release);
    }

    /// Notes that a commit is logged, and about to be written by its program. `before` is where the database was before it.
    pub fn hold_until_written(&self, before: Pos) {
        *self.unwritten.lock() = Some(before);
    }

    /// Learns that what was about to be written is, or will not be. Returns where the database was before it, if that was a
    /// commit.
    pub fn written(&self) -> Option<Pos> {
        self.unwritten.lock().take()
    }

    /// Returns whether a logged transaction waits for the cluster's word.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.lock().in_doubt.is_some()
    }

    pub(super) fn check_not_in_doubt(&self, inner: &Inner) -> Result<(), DbError> {
        match inner.in_doubt {
            None => Ok(()),
            Some(_) => Err(DbError::Locked {
                what: "a commit is in doubt, because no quorum answered: the database",
                path: self.paths.main.clone(),
            }),
        }
    }

    /// Reads back what is in doubt, for the files.
    pub(super) fn doubtful(&self, inner: &Inner) -> Result<Option<Merged>, DbError> {
        let Some(before) = inner.in_doubt else {
            return Ok(None);
        };
        let read = self
            .log
            .read_after(before.txid, MAX_RANGE_LEN)
            .map_err(self.log_error())?;
        let ReadAfter::Records(records) = read else {
            return Ok(None);
        };
        let records: Vec<Record> = records
            .into_iter()
            .map(|r| Record {
                meta: super::record_from_log(&r.meta),
                ltx: r.ltx,
            })
            .collect();
        Merged::of(self, &records)
    }
}

/// A distance within a buffer.
fn within(distance: u64) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX)
}

/// A commit frame that is whole.
struct Completed {
    no: u32,
    header: WalHeader,
}
