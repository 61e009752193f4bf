//! Turns committed WAL frames past the cursor into one range.
//!
//! What is committed is what the wal-index says (`mxFrame`): a frame that no local reader can see is not published.
//! Where there is no index, or one that nobody has open (`locking_mode=EXCLUSIVE` keeps its own in memory, beside what a
//! dead program left), or where its bytes may still be in a program's memory (served from user space), the frames' own
//! salts and checksums decide.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::capture_scan::MAX_RANGE_LEN;
use super::commit::{KEEP_BUFFER, Range};
use super::log::WalCursor;
use super::{Db, DbError, Inner};
use crate::ltx::{PageSize, Pgno, page_checksum};
use crate::sqlite::wal::{
    WAL_FRAME_HEADER_LEN as FRAME_HEADER_LEN, WAL_HEADER_LEN, WalChecksum, WalFrameHeader,
    WalHeader, frame_offset,
};
use crate::sqlite::wal_index::{self, WalIndexHeader};

/// Frames are read in pieces of about this many bytes.
const READ_LEN: usize = 4 << 20;
/// A range ends at the first commit past this many bytes of frames, so that records stay small.
const RANGE_LEN: usize = 8 << 20;

/// Fewer frames are read as they come.
const FEW_FRAMES: u32 = 16;

/// What ends a look at the WAL.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Something was captured, and there may be more.
    More,
    /// Nothing more is committed.
    Done,
}

impl Db {
    /// Captures everything committed in the WAL, as must be before it may be reset.
    ///
    /// # Errors
    /// Disk or log; the reset must then be refused (INV-DB-2).
    pub fn capture_wal(&self) -> Result<(), DbError> {
        let mut inner = self.lock();
        if !self.is_primary() || inner.in_doubt.is_some() {
            return Ok(()); // the frames are ours, or not what is logged
        }
        self.capture_wal_locked(&mut inner)
    }

    /// Captures everything committed in the WAL and syncs the log, as must be before the WAL may be removed or
    /// truncated: without it, nothing would tell after a power cut whether the file or the log is newer.
    ///
    /// # Errors
    /// Disk or log; the WAL must then stay (INV-DB-2).
    pub fn capture_for_good(&self) -> Result<(), DbError> {
        self.capture_wal()?;
        self.sync_log()
    }

    /// Learns that the WAL file is gone or another one.
    pub fn wal_replaced(&self) {
        Self::forget_wal(&mut self.lock());
    }

    /// Returns whether the WAL holds frames of its generation past what is captured: a commit under way, or the
    /// remains of one that was rolled back.
    #[must_use]
    pub fn has_unpublished_frames(&self) -> bool {
        let inner = self.lock();
        if !self.is_primary() {
            return false;
        }
        let (Some(wal), Some(cursor), Some(page_size)) =
            (&inner.wal, inner.cursor, inner.page_size)
        else {
            return inner
                .wal
                .as_ref()
                .is_some_and(|w| w.metadata().is_ok_and(|m| m.len() > 0));
        };
        let mut head = [0; FRAME_HEADER_LEN];
        let at = frame_offset(page_size, cursor.frame_no + 1);
        read_full(wal, &mut head, at).is_ok_and(|n| n == head.len())
            && WalFrameHeader::decode(&head)
                .is_some_and(|h| (h.salts.0, h.salts.1) == (cursor.salt1, cursor.salt2))
            || {
                let mut header = [0; WAL_HEADER_LEN];
                read_full(wal, &mut header, 0).is_ok_and(|n| n == header.len())
                    && WalHeader::decode(&header)
                        .is_ok_and(|h| (h.salts.0, h.salts.1) != (cursor.salt1, cursor.salt2))
            }
    }

    /// Returns whether the WAL goes on with frames that do not say whether they count, where nothing but the frames is
    /// believed.
    pub(super) fn has_unsigned_frames(&self, inner: &Inner) -> Result<bool, DbError> {
        let (Some(wal), Some(cursor), Some(page_size)) =
            (&inner.wal, inner.cursor, inner.page_size)
        else {
            return Ok(false);
        };
        if self.trusts_index() {
            return Ok(false);
        }
        let mut head = [0; FRAME_HEADER_LEN];
        let n = read_full(wal, &mut head, frame_offset(page_size, cursor.frame_no + 1))
            .map_err(DbError::io("read", &self.paths.wal))?;
        Ok(n == head.len() && WalFrameHeader::decode(&head).is_some_and(|h| is_unsigned(&h)))
    }

    /// Returns whether the wal-index in the backing file is the one that programs go by.
    fn trusts_index(&self) -> bool {
        self.node.shm_is_shared() && self.is_index_open()
    }

    /// Counts a program in that has the wal-index open.
    pub fn index_opened(&self) {
        self.index_users.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts it out.
    pub fn index_closed(&self) {
        let _ = self
            .index_users
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
    }

    /// Returns whether a program has the wal-index open.
    #[must_use]
    pub fn is_index_open(&self) -> bool {
        self.index_users.load(Ordering::Acquire) > 0
    }

    /// Returns whether it is plain at a glance that everything committed so far is captured. Does not wait: while something is
    /// captured, it is not plain.
    #[must_use]
    pub fn has_no_news(&self) -> bool {
        let Some(inner) = self.inner.try_lock() else {
            return false;
        };
        if inner.trouble.is_some() || inner.is_replaced || inner.in_doubt.is_some() {
            return false;
        }
        let has_wal = std::fs::metadata(&self.paths.wal).is_ok_and(|wal| wal.len() > 0);
        if !has_wal {
            // Each commit writes the file then, or makes a WAL.
            let main = std::fs::metadata(&self.paths.main);
            return main.map_or(inner.page_count == 0, |main| {
                inner.stamp == Some(super::Stamp::from(&main))
            });
        }
        if !self.trusts_index() {
            return false;
        }
        let Some((cursor, change)) = inner.index_change.filter(|(c, _)| inner.cursor == Some(*c))
        else {
            return false;
        };
        let mut bytes = [0; 2 * wal_index::HEADER_LEN];
        let read = File::open(&self.paths.shm).and_then(|shm| read_full(&shm, &mut bytes, 0));
        if !read.is_ok_and(|n| n == bytes.len()) {
            return false;
        }
        WalIndexHeader::decode_copies(&bytes).is_ok_and(|index| {
            index.mx_frame == cursor.frame_no
                && index.change == change
                && (index.salts.0, index.salts.1) == (cursor.salt1, cursor.salt2)
        })
    }

    pub(super) fn capture_wal_locked(&self, inner: &mut Inner) -> Result<(), DbError> {
        let trust_index = self.trusts_index();
        while self.capture_wal_step(inner, trust_index)? == Step::More {}
        Ok(())
    }

    /// Captures what the frames themselves say is committed: a wal-index that a power cut left is of another time.
    pub(super) fn capture_wal_by_frames(&self, inner: &mut Inner) -> Result<(), DbError> {
        while self.capture_wal_step(inner, false)? == Step::More {}
        Ok(())
    }

    /// Captures what a wal-index says is committed, which was read while its locks are ours.
    pub(super) fn capture_wal_to(
        &self,
        inner: &mut Inner,
        index: WalIndexHeader,
    ) -> Result<(), DbError> {
        inner.index_change = None;
        while self.capture_wal_with(inner, |header| {
            (index.salts == header.salts).then_some(Extent::Index(index))
        })? == Step::More
        {}
        inner.index_change = None;
        Ok(())
    }

    fn capture_wal_step(&self, inner: &mut Inner, trust_index: bool) -> Result<Step, DbError> {
        self.capture_wal_with(inner, |header| self.committed_extent(header, trust_index))
    }

    fn capture_wal_with(
        &self,
        inner: &mut Inner,
        extent: impl Fn(&WalHeader) -> Option<Extent>,
    ) -> Result<Step, DbError> {
        if inner.wal.is_none() {
            if std::fs::metadata(&self.paths.main).map_or(0, |m| m.len()) == 0 {
                // Left over from a database that was removed: SQLite reads no WAL without a database, and deletes one
                // beside an empty file.
                return Ok(Step::Done);
            }
            match File::open(&self.paths.wal) {
                Ok(file) => inner.wal = Some(file),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Step::Done),
                Err(e) => return Err(DbError::io("open", &self.paths.wal)(e)),
            }
        }
        let Some(wal) = inner.wal.take() else {
            return Ok(Step::Done);
        };
        let step = self.capture_frames(inner, &wal, extent);
        inner.wal = Some(wal);
        step
    }

    fn capture_frames(
        &self,
        inner: &mut Inner,
        wal: &File,
        extent: impl Fn(&WalHeader) -> Option<Extent>,
    ) -> Result<Step, DbError> {
        let io = || DbError::io("read", &self.paths.wal);
        let mut head = [0; WAL_HEADER_LEN];
        if read_full(wal, &mut head, 0).map_err(io())? < head.len() {
            return Ok(Step::Done);
        }
        let Ok(header) = WalHeader::decode(&head) else {
            return Ok(Step::Done);
        };
        let Some(extent) = extent(&header) else {
            return Ok(Step::Done);
        };
        let (salt1, salt2) = (header.salts.0, header.salts.1);
        let start = match inner.cursor {
            Some(c) if (c.salt1, c.salt2) == (salt1, salt2) => c,
            _ => WalCursor {
                salt1,
                salt2,
                frame_no: 0,
                checksum1: header.checksum().0,
                checksum2: header.checksum().1,
            },
        };
        let last = match extent {
            Extent::Index(index)
                if index.mx_frame < start.frame_no && inner.unseen == Some(start.frame_no) =>
            {
                return Ok(Step::Done); // its program is about to publish it
            }
            Extent::Index(index) if index.mx_frame < start.frame_no => {
                // Frames that we published are gone from the index: nobody ever saw them here. Say what is so.
                let mx_frame = index.mx_frame;
                tracing::warn!(db = %self.name, captured = start.frame_no, mx_frame, "wal went back, comparing all pages");
                inner.cursor = None;
                inner.trouble = Some("wal went back".into());
                return Ok(Step::Done);
            }
            Extent::Index(index) => Some(index),
            Extent::Frames => None,
        };
        let Some(index) = last else {
            return self.read_range(inner, wal, &header, start, None);
        };
        inner.unseen = None;
        if index.mx_frame == start.frame_no {
            if inner.cursor.is_none() {
                inner.cursor = Some(start);
            }
            inner.index_change = Some((start, index.change));
            return Ok(Step::Done);
        }
        if let Some(step) = self.read_latest(inner, wal, start, &index)? {
            return Ok(step);
        }
        let step = self.read_range(inner, wal, &header, start, Some(index.mx_frame))?;
        inner.index_change = inner
            .cursor
            .filter(|c| c.frame_no == index.mx_frame)
            .map(|c| (c, index.change));
        Ok(step)
    }

    /// Says how far the WAL is committed, if anything is.
    fn committed_extent(&self, header: &WalHeader, trust_index: bool) -> Option<Extent> {
        if !trust_index {
            return Some(Extent::Frames);
        }
        let Ok(shm) = File::open(&self.paths.shm) else {
            return Some(Extent::Frames);
        };
        let mut bytes = [0; 2 * wal_index::HEADER_LEN];
        // A writer publishes the two copies one after the other: look again, it takes moments.
        for _ in 0..100 {
            if read_full(&shm, &mut bytes, 0).is_ok_and(|n| n == bytes.len())
                && let Ok(index) = WalIndexHeader::decode_copies(&bytes)
            {
                // An index of another generation: this one was begun and nothing of it is published yet, or it was
                // reset and all of it is captured (INV-DB-2).
                return (index.salts == header.salts).then_some(Extent::Index(index));
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Commits what a burst of transactions left behind, reading of each page the last version only: the wal-index
    /// says which page a frame is of. `None`: that would not pay, or the index is not what it should be.
    fn read_latest(
        &self,
        inner: &mut Inner,
        wal: &File,
        start: WalCursor,
        index: &WalIndexHeader,
    ) -> Result<Option<Step>, DbError> {
        let (Some(page_size), Some((known, change))) = (index.page_size, inner.index_change) else {
            return Ok(None);
        };
        let frame_count = index.mx_frame - start.frame_no;
        let tx_count = index.change.wrapping_sub(change);
        if known != start || frame_count < FEW_FRAMES || tx_count == 0 || tx_count > frame_count {
            return Ok(None);
        }
        let Some(pgnos) = File::open(&self.paths.shm)
            .ok()
            .and_then(|shm| wal_index::read_pages(&shm, start.frame_no + 1, index.mx_frame))
        else {
            return Ok(None);
        };
        let lock_pgno = page_size.lock_pgno();
        let latest: BTreeMap<Pgno, u32> = (start.frame_no + 1..)
            .zip(pgnos)
            .map(|(f, p)| (p, f))
            .collect();
        if latest.len() * 2 > frame_count as usize || latest.len() * page_size.len() > RANGE_LEN {
            return Ok(None);
        }
        let frame_len = FRAME_HEADER_LEN + page_size.len();
        let mut frames = std::mem::take(&mut inner.frames);
        frames.clear();
        frames.resize(latest.len() * frame_len, 0);
        let mut commit = None;
        for ((pgno, frame_no), frame) in latest.iter().zip(frames.chunks_exact_mut(frame_len)) {
            let n = read_full(wal, frame, frame_offset(page_size, *frame_no))
                .map_err(DbError::io("read", &self.paths.wal))?;
            let head = frame.first_chunk().and_then(WalFrameHeader::decode);
            let Some(head) =
                head.filter(|h| n == frame_len && h.pgno == *pgno && h.salts == index.salts)
            else {
                inner.frames = frames;
                return Ok(None);
            };
            if *frame_no == index.mx_frame {
                commit = Some(head);
            }
        }
        let result = match commit {
            Some(head) if head.commit == index.n_page => {
                let cursor = WalCursor {
                    frame_no: index.mx_frame,
                    checksum1: head.checksum.0,
                    checksum2: head.checksum.1,
                    ..start
                };
                let pages = latest
                    .keys()
                    .zip(frames.chunks_exact(frame_len))
                    .filter(|(pgno, _)| pgno.get() <= head.commit && **pgno != lock_pgno)
                    .map(|(pgno, frame)| (*pgno, &frame[FRAME_HEADER_LEN..]))
                    .collect();
                inner.index_change = Some((cursor, index.change));
                let commit = Commit {
                    frame_count: frame_count as usize,
                    tx_count: u64::from(tx_count),
                    page_count: head.commit,
                    cursor,
                };
                self.commit_pages(inner, page_size, &commit, pages)
                    .map(Some)
            }
            _ => Ok(None),
        };
        inner.frames = frames;
        result
    }

    /// Reads frames after `start` to the last commit, and commits their pages as one range.
    fn read_range(
        &self,
        inner: &mut Inner,
        wal: &File,
        header: &WalHeader,
        start: WalCursor,
        last: Option<u32>,
    ) -> Result<Step, DbError> {
        let page_size = header.page_size;
        let frame_len = FRAME_HEADER_LEN + page_size.len();
        let mut frames = std::mem::take(&mut inner.frames);
        frames.clear();
        let mut scan = Scan::new(header, start, last);
        let mut at_end = false;
        while !(at_end || scan.commit.is_some() && frames.len() >= RANGE_LEN) {
            if frames.len() >= MAX_RANGE_LEN {
                inner.frames = Vec::new();
                drop(frames);
                return self.read_large(inner, wal, scan);
            }
            let old = frames.len();
            let offset = frame_offset(page_size, start.frame_no + 1) + old as u64;
            let left = match last {
                Some(last) => (last - start.frame_no) as usize * frame_len - old,
                // No more than there is, or a small WAL would take a large buffer.
                None => {
                    let len = wal
                        .metadata()
                        .map_err(DbError::io("look at", &self.paths.wal))?;
                    usize::try_from(len.len().saturating_sub(offset)).unwrap_or(READ_LEN)
                }
            };
            let wanted = READ_LEN.min(left).next_multiple_of(frame_len);
            frames.resize(old + wanted, 0);
            let n = read_full(wal, &mut frames[old..], offset)
                .map_err(DbError::io("read", &self.paths.wal))?;
            frames.truncate(old + n - n % frame_len);
            at_end = !scan.take(&frames[old..], frame_len) || n < wanted || frames.len() == old;
            if let Some(last) = last {
                at_end |= frames.len() / frame_len >= (last - start.frame_no) as usize;
            }
        }
        let result = match scan.commit {
            None if last.is_some() => Err(DbError::Corrupt {
                what: format!(
                    "no commit among frames {}..={}",
                    start.frame_no + 1,
                    last.unwrap_or(0)
                ),
                path: self.paths.wal.clone(),
            }),
            None => Ok(Step::Done),
            Some(commit) => {
                self.commit_frames(inner, &frames, frame_len, page_size, &commit, &scan.pgnos)
            }
        };
        if frames.capacity() > KEEP_BUFFER {
            frames = Vec::new();
        }
        inner.frames = frames;
        result
    }

    /// Captures a transaction that is too large to be held in memory: of each page its last frame is looked up when
    /// needed, and if the pages are too many for a range as well, the log begins anew at the state after it.
    fn read_large(
        &self,
        inner: &mut Inner,
        wal: &File,
        mut scan: Scan<'_>,
    ) -> Result<Step, DbError> {
        let page_size = scan.header.page_size;
        let frame_len = FRAME_HEADER_LEN + page_size.len();
        let start = scan.start;
        let io = || DbError::io("read", &self.paths.wal);
        let mut piece = vec![0; READ_LEN.next_multiple_of(frame_len)];
        while scan.commit.is_none() {
            let seen = u32::try_from(scan.pgnos.len()).unwrap_or(u32::MAX);
            let at = frame_offset(page_size, start.frame_no + seen + 1);
            let left = scan.last.map_or(usize::MAX, |last| {
                last.saturating_sub(start.frame_no + seen) as usize
            });
            let wanted = piece.len().min(left.saturating_mul(frame_len));
            let n = read_full(wal, &mut piece[..wanted], at).map_err(io())?;
            let whole = n - n % frame_len;
            if !scan.take(&piece[..whole], frame_len) || whole < piece.len() {
                break;
            }
        }
        let Some(commit) = scan.commit else {
            // Under way, or rolled back.
            return Ok(Step::Done);
        };
        let latest: BTreeMap<Pgno, u32> = scan.pgnos[..commit.frame_count]
            .iter()
            .copied()
            .zip(start.frame_no + 1..)
            .filter(|(p, _)| p.get() <= commit.page_count && *p != page_size.lock_pgno())
            .collect();
        let read = |frame_no: u32, page: &mut [u8]| {
            let at = frame_offset(page_size, frame_no) + FRAME_HEADER_LEN as u64;
            read_full(wal, page, at).map_err(io())
        };
        if latest.len() * page_size.len() <= MAX_RANGE_LEN {
            let mut bytes = vec![0; latest.len() * page_size.len()];
            for (frame_no, page) in latest.values().zip(bytes.chunks_exact_mut(page_size.len())) {
                read(*frame_no, page)?;
            }
            let pages = latest.keys().copied();
            let pages = pages.zip(bytes.chunks_exact(page_size.len())).collect();
            return self.commit_pages(inner, page_size, &commit, pages);
        }
        let (mut sums, known) = if inner.page_size == Some(page_size) {
            (inner.checksums.clone(), inner.page_count)
        } else {
            (super::page_checksums::PageChecksums::new(page_size), 0)
        };
        sums.truncate(commit.page_count);
        let mut page = vec![0; page_size.len()];
        let grown = (known + 1..=commit.page_count).filter_map(Pgno::new);
        let grown = grown.filter(|p| *p != page_size.lock_pgno() && !latest.contains_key(p));
        let main = File::open(&self.paths.main).map_err(DbError::io("open", &self.paths.main))?;
        for pgno in grown {
            let n = read_full(&main, &mut page, page_size.offset(pgno))
                .map_err(DbError::io("read", &self.paths.main))?;
            page[n..].fill(0);
            sums.set(pgno, page_checksum(pgno, &page));
        }
        for (pgno, frame_no) in &latest {
            read(*frame_no, &mut page)?;
            sums.set(*pgno, page_checksum(*pgno, &page));
        }
        self.restart_at(
            inner,
            sums,
            page_size,
            commit.page_count,
            Some(commit.cursor),
        )?;
        Ok(Step::More)
    }

    pub(super) fn commit_frames(
        &self,
        inner: &mut Inner,
        frames: &[u8],
        frame_len: usize,
        page_size: PageSize,
        commit: &Commit,
        pgnos: &[Pgno],
    ) -> Result<Step, DbError> {
        // Latest version of each page: sort by page, then frame, and keep the last of each.
        let mut order: Vec<(Pgno, usize)> = pgnos[..commit.frame_count]
            .iter()
            .enumerate()
            .map(|(i, pgno)| (*pgno, i))
            .collect();
        order.sort_unstable();
        let lock_pgno = page_size.lock_pgno();
        let mut pages: Vec<(Pgno, &[u8])> = Vec::with_capacity(order.len());
        for (i, (pgno, frame)) in order.iter().enumerate() {
            let is_last = order.get(i + 1).is_none_or(|(next, _)| next != pgno);
            if is_last && pgno.get() <= commit.page_count && *pgno != lock_pgno {
                let at = frame * frame_len + FRAME_HEADER_LEN;
                pages.push((*pgno, &frames[at..at + page_size.len()]));
            }
        }
        self.commit_pages(inner, page_size, commit, pages)
    }

    fn commit_pages(
        &self,
        inner: &mut Inner,
        page_size: PageSize,
        commit: &Commit,
        pages: Vec<(Pgno, &[u8])>,
    ) -> Result<Step, DbError> {
        let mut pages: Vec<(Pgno, &[u8])> = pages;
        let known = if inner.page_size == Some(page_size) {
            inner.page_count
        } else {
            0
        };
        let filler = self.missing_pages(known, commit.page_count, page_size, &pages)?;
        if !filler.is_empty() {
            pages.extend(filler.iter().map(|(pgno, data)| (*pgno, data.as_slice())));
            pages.sort_unstable_by_key(|(pgno, _)| *pgno);
        }
        let range = Range {
            page_size,
            page_count: commit.page_count,
            tx_count: commit.tx_count,
            pages,
            cursor: Some(commit.cursor),
        };
        if known == 0 && !filler.is_empty() && !self.is_index_open() {
            self.mark_provisional(inner)?;
        }
        crate::disk::crash_point(super::steps::CAPTURE_WAL);
        self.commit_range(inner, &range)?;
        Ok(Step::More)
    }

    /// Finds pages of a grown database that no frame carries: SQLite reads them from the file, or as zeros.
    fn missing_pages(
        &self,
        known: u32,
        page_count: u32,
        page_size: PageSize,
        pages: &[(Pgno, &[u8])],
    ) -> Result<Vec<(Pgno, Vec<u8>)>, DbError> {
        let grown = page_count.saturating_sub(known) as usize;
        let first = pages.partition_point(|(pgno, _)| pgno.get() <= known);
        if pages.len() - first >= grown {
            return Ok(Vec::new());
        }
        let mut have = pages[first..].iter().map(|(pgno, _)| *pgno).peekable();
        let mut missing = Vec::new();
        let mut main = None;
        for pgno in (known + 1..=page_count).filter_map(Pgno::new) {
            if have.next_if_eq(&pgno).is_some() || pgno == page_size.lock_pgno() {
                continue;
            }
            let mut data = vec![0; page_size.len()];
            if main.is_none() {
                main = Some(
                    File::open(&self.paths.main).map_err(DbError::io("open", &self.paths.main))?,
                );
            }
            if let Some(file) = &main {
                read_full(file, &mut data, page_size.offset(pgno))
                    .map_err(DbError::io("read", &self.paths.main))?;
            }
            missing.push((pgno, data));
        }
        Ok(missing)
    }

    /// Forgets the WAL: it was truncated, reset or removed, all of it captured before (INV-DB-2).
    pub(super) fn forget_wal(inner: &mut Inner) {
        inner.wal = None;
    }
}

/// How far the WAL is committed.
enum Extent {
    /// As the wal-index says.
    Index(WalIndexHeader),
    /// As far as the frames themselves are valid.
    Frames,
}

/// A commit found among frames.
#[derive(Debug, Clone, Copy)]
pub(super) struct Commit {
    /// Frames up to and with it, from the start of the range.
    frame_count: usize,
    /// Commits up to and with it.
    tx_count: u64,
    page_count: u32,
    pub(super) cursor: WalCursor,
}

/// Walks frames, keeping the page number of each and the last commit.
pub(super) struct Scan<'a> {
    header: &'a WalHeader,
    start: WalCursor,
    /// `None`: the frames' own checksums say where the WAL ends.
    last: Option<u32>,
    running: WalChecksum,
    pub(super) pgnos: Vec<Pgno>,
    tx_count: u64,
    pub(super) commit: Option<Commit>,
}

impl<'a> Scan<'a> {
    pub(super) fn new(header: &'a WalHeader, start: WalCursor, last: Option<u32>) -> Scan<'a> {
        let running = WalChecksum(start.checksum1, start.checksum2);
        Scan {
            header,
            start,
            last,
            running,
            pgnos: Vec::new(),
            tx_count: 0,
            commit: None,
        }
    }

    /// Takes the frames that follow those seen; false at the first that does not count.
    pub(super) fn take(&mut self, frames: &[u8], frame_len: usize) -> bool {
        for frame in frames.chunks_exact(frame_len) {
            let Some(head) = frame.first_chunk().and_then(WalFrameHeader::decode) else {
                return false;
            };
            let is_covered = self.last.is_some(); // by the wal-index
            if head.salts != self.header.salts && !(is_covered && is_unsigned(&head)) {
                return false;
            }
            if !is_covered {
                let order = self.header.order;
                self.running = self
                    .running
                    .update(order, &frame[..8])
                    .update(order, &frame[FRAME_HEADER_LEN..]);
                if self.running != head.checksum {
                    return false;
                }
            }
            self.pgnos.push(head.pgno);
            if head.commit > 0 {
                self.tx_count += 1;
                let frame_no =
                    self.start.frame_no + u32::try_from(self.pgnos.len()).unwrap_or(u32::MAX);
                self.commit = Some(Commit {
                    frame_count: self.pgnos.len(),
                    tx_count: self.tx_count,
                    page_count: head.commit,
                    cursor: WalCursor {
                        frame_no,
                        checksum1: head.checksum.0,
                        checksum2: head.checksum.1,
                        ..self.start
                    },
                });
            }
        }
        true
    }
}

/// Says whether a frame has neither salts nor checksum. So SQLite writes what follows a frame that it has overwritten, until
/// the commit; and 3.40, for one, leaves it so where a savepoint was rolled back in between. Readers see such a commit by the
/// wal-index, and lose it with that.
fn is_unsigned(head: &WalFrameHeader) -> bool {
    (head.salts.0, head.salts.1) == (0, 0) && (head.checksum.0, head.checksum.1) == (0, 0)
}

/// Reads as much as there is, up to the length of `buf`.
pub(super) fn read_full(file: &File, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
