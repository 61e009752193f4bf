use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::read::SegmentPart;
use super::segment::{Entry, Segment};
use super::{BoxError, Error, Finding, Log, Record, RecordMeta, Sealed, State};
use super::{quarantine, steps};
use crate::disk::OpenMode;
use crate::ltx::Txid;

/// Makes one LTX file of several that follow each other.
pub type Compact<'a, E> = dyn Fn(&[&[u8]]) -> Result<Vec<u8>, E> + 'a;

/// What one round of upkeep did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Maintained {
    /// Segments that became LTX files.
    pub sealed: u32,
    /// Files that retention removed.
    pub removed: u32,
    /// Damage that was met since the last round.
    pub findings: Vec<Finding>,
}

/// The oldest file of a log.
#[derive(Debug)]
enum Oldest {
    Sealed(Sealed),
    Segment { first: Txid, last: RecordMeta },
}

impl Oldest {
    fn max_txid(&self) -> Txid {
        match self {
            Oldest::Sealed(file) => file.max_txid,
            Oldest::Segment { last, .. } => last.max_txid,
        }
    }
}

impl Log {
    /// Lets [`maintain`](Log::maintain) leave so many full segments as they are: while a program writes as fast as it can,
    /// making LTX files of them takes the disk from it.
    pub fn leave_segments(&self, count: usize) {
        self.segments_left.store(count, Ordering::Relaxed);
    }

    /// Turns full segments into LTX files and removes what retention no longer asks for.
    ///
    /// Records above `pinned`
    /// stay, and so does the newest record. Also syncs when a segment is full, so that `append`
    /// need not. Time comes from the caller, as in [`RecordMeta::timestamp_ms`].
    ///
    /// # Errors
    /// `Compact`, `Miscompacted` and `Io` leave the segment, and retention is done all the same.
    pub fn maintain<E: Into<BoxError>>(
        &self,
        now_ms: i64,
        compact: &Compact<'_, E>,
        pinned: Option<Txid>,
    ) -> Result<Maintained, Error> {
        let _upkeep = self.upkeep.lock();
        let mut done = Maintained::default();
        let sealed = self.seal_full(compact, &mut done);
        self.abandon_unreadable()?;
        self.retain(now_ms, pinned, &mut done)?;
        sealed?;
        done.findings = std::mem::take(&mut self.state.lock().findings);
        Ok(done)
    }

    fn seal_full<E: Into<BoxError>>(
        &self,
        compact: &Compact<'_, E>,
        done: &mut Maintained,
    ) -> Result<(), Error> {
        if self.state.lock().wants_sync(self.options.segment_bytes) {
            self.sync()?; // INV-LOG-3, INV-LOG-4
        }
        loop {
            let left = self.segments_left.load(Ordering::Relaxed);
            let Some(part) = self.state.lock().oldest_full(left) else {
                return Ok(());
            };
            done.sealed += u32::from(self.seal(&part, compact)?);
        }
    }

    /// Replaces a segment by an LTX file of those of its records that can be read.
    fn seal<E: Into<BoxError>>(
        &self,
        part: &SegmentPart,
        compact: &Compact<'_, E>,
    ) -> Result<bool, Error> {
        let path = self.paths.segment(part.first);
        let records = self.readable(part)?;
        let is_damaged = records.len() < part.entries.len();
        let sealed = match compact_records(&records, &path, compact)? {
            Some((meta, bytes)) => Some(self.write_sealed(&meta, &bytes, &path)?),
            None => None,
        };
        let made_one = sealed.is_some();
        {
            let mut state = self.state.lock();
            state.segments.pop_front();
            state.sealed.extend(sealed);
        }
        if is_damaged {
            let kept = quarantine(&*self.disk, &self.paths, &path)?;
            let finding = Finding::Unreachable { path, kept };
            self.state.lock().findings.push(finding);
        } else {
            self.remove(steps::SEAL_REMOVE, &path)?;
        }
        Ok(made_one)
    }

    /// Reads the records after the last damage; finding more damage moves the base and goes on.
    fn readable(&self, part: &SegmentPart) -> Result<Vec<Record>, Error> {
        loop {
            let floor = self.state.lock().floor;
            let above = |e: &&Entry| e.min_txid > floor;
            let part = SegmentPart {
                file: part.file.clone(),
                first: part.first,
                entries: part.entries.iter().filter(above).copied().collect(),
            };
            match self.read_part(&part) {
                Err(Error::Corrupt { .. }) => {}
                other => return other,
            }
        }
    }

    /// Writes a sealed file: whole and durable under its name, or not at all.
    fn write_sealed(
        &self,
        meta: &RecordMeta,
        bytes: &[u8],
        segment: &Path,
    ) -> Result<Sealed, Error> {
        let sealed = Sealed {
            min_txid: meta.min_txid,
            max_txid: meta.max_txid,
            len: bytes.len() as u64,
            timestamp_ms: Some(meta.timestamp_ms),
        };
        self.check_sealed(&sealed, meta, bytes, segment)?;
        let path = self.paths.sealed(&sealed);
        let tmp = tmp_path(&path);
        let file = self.open_file(steps::SEAL_OPEN, &tmp, OpenMode::Truncate)?;
        let written = self
            .disk
            .write_all_at(steps::SEAL_WRITE, &file, bytes, 0)
            .map_err(|e| Error::io(steps::SEAL_WRITE, &tmp, e))
            .and_then(|()| self.sync_at(steps::SEAL_SYNC, &file, &tmp))
            .and_then(|()| {
                self.disk
                    .rename(steps::SEAL_RENAME, &tmp, &path)
                    .map_err(|e| Error::io(steps::SEAL_RENAME, &tmp, e))
            });
        if let Err(error) = written {
            let _ = self.disk.remove_file(steps::SEAL_REMOVE, &tmp);
            return Err(error);
        }
        Ok(sealed)
    }

    /// Checks that an LTX file says the same as the records it was made of.
    fn check_sealed(
        &self,
        sealed: &Sealed,
        meta: &RecordMeta,
        bytes: &[u8],
        segment: &Path,
    ) -> Result<(), Error> {
        let miscompacted = |got| Error::Miscompacted {
            path: segment.to_owned(),
            expected: format!("{} to {}", meta.pre_apply_pos(), meta.pos()),
            got,
        };
        let got = sealed
            .verify(bytes, self.options.ltx_meta)
            .map_err(|fault| miscompacted(fault.to_string()))?;
        if (got.pos(), got.pre_apply_pos()) != (meta.pos(), meta.pre_apply_pos()) {
            let got = format!("{} to {}", got.pre_apply_pos(), got.pos());
            return Err(miscompacted(got));
        }
        Ok(())
    }

    /// Moves files below the base that are there because of damage into quarantine.
    fn abandon_unreadable(&self) -> Result<(), Error> {
        loop {
            let oldest = {
                let mut state = self.state.lock();
                match state.oldest() {
                    Some(oldest) if oldest.max_txid() <= state.floor => {
                        state.pop_oldest();
                        oldest
                    }
                    _ => return Ok(()),
                }
            };
            let path = self.oldest_path(&oldest);
            let kept = match quarantine(&*self.disk, &self.paths, &path) {
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    continue;
                }
                kept => kept?,
            };
            let finding = Finding::Unreachable { path, kept };
            self.state.lock().findings.push(finding);
        }
    }

    fn retain(
        &self,
        now_ms: i64,
        pinned: Option<Txid>,
        done: &mut Maintained,
    ) -> Result<(), Error> {
        loop {
            let (oldest, total) = {
                let state = self.state.lock();
                (state.oldest(), state.total_bytes())
            };
            let Some(oldest) = oldest else {
                return Ok(());
            };
            if pinned.is_some_and(|pinned| oldest.max_txid() > pinned) {
                return Ok(());
            }
            if total <= self.options.retention_bytes {
                match self.timestamp_ms(&oldest)? {
                    Some(ms) if self.is_expired(now_ms, ms) => {}
                    Some(_) => return Ok(()),
                    None => continue, // it was damaged, and is gone
                }
            }
            if !self.state.lock().is_durable_after(oldest.max_txid()) {
                self.sync()?; // or a power cut could leave nothing (INV-LOG-4)
            }
            self.state.lock().pop_oldest();
            self.remove(steps::RETAIN_REMOVE, &self.oldest_path(&oldest))?;
            done.removed += 1;
        }
    }

    fn is_expired(&self, now_ms: i64, timestamp_ms: i64) -> bool {
        let age = now_ms.saturating_sub(timestamp_ms);
        i128::from(age)
            > i128::try_from(self.options.retention_age.as_millis()).unwrap_or(i128::MAX)
    }

    /// Returns when the last transaction of a file was committed.
    fn timestamp_ms(&self, oldest: &Oldest) -> Result<Option<i64>, Error> {
        let file = match oldest {
            Oldest::Segment { last, .. } => return Ok(Some(last.timestamp_ms)),
            Oldest::Sealed(file) => file,
        };
        if file.timestamp_ms.is_some() {
            return Ok(file.timestamp_ms);
        }
        match self.read_sealed(file) {
            Ok(Some(record)) => {
                if let Some(file) = self.state.lock().sealed.front_mut() {
                    file.timestamp_ms = Some(record.meta.timestamp_ms);
                }
                Ok(Some(record.meta.timestamp_ms))
            }
            Err(Error::Corrupt { .. }) | Ok(None) => {
                self.abandon_unreadable()?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn oldest_path(&self, oldest: &Oldest) -> PathBuf {
        match oldest {
            Oldest::Sealed(file) => self.paths.sealed(file),
            Oldest::Segment { first, .. } => self.paths.segment(*first),
        }
    }

    fn remove(&self, step: crate::disk::Step, path: &Path) -> Result<(), Error> {
        match self.disk.remove_file(step, path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(step, path, e)),
            _ => Ok(()),
        }
    }
}

/// Makes one LTX of many; a single one stays as it is.
fn compact_records<E: Into<BoxError>>(
    records: &[Record],
    path: &Path,
    compact: &Compact<'_, E>,
) -> Result<Option<(RecordMeta, Vec<u8>)>, Error> {
    let (Some(first), Some(last)) = (records.first(), records.last()) else {
        return Ok(None);
    };
    let meta = RecordMeta {
        min_txid: first.meta.min_txid,
        pre_apply_checksum: first.meta.pre_apply_checksum,
        ..last.meta
    };
    if records.len() == 1 {
        return Ok(Some((meta, first.ltx.to_vec())));
    }
    let files: Vec<&[u8]> = records.iter().map(|r| &r.ltx[..]).collect();
    let bytes = compact(&files).map_err(|source| Error::Compact {
        path: path.to_owned(),
        source: source.into(),
    })?;
    Ok(Some((meta, bytes)))
}

fn tmp_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

impl State {
    fn wants_sync(&self, segment_bytes: u64) -> bool {
        let is_full = |s: &Segment| s.len >= segment_bytes;
        self.durable < self.appended
            && (self.segments.len() > 1 || self.segments.back().is_some_and(is_full))
    }

    /// Returns the oldest segment unless records still go there, or a power cut would make it the last (INV-LOG-4): a
    /// segment that was begun since the last sync may be gone then.
    fn oldest_full(&self, left: usize) -> Option<SegmentPart> {
        let segment = self.segments.front()?;
        let may_go = self.segments.len() > 1 + left && self.is_durable_after(segment.last.max_txid);
        may_go.then(|| segment.part(segment.entries.clone()))
    }

    /// Returns the oldest file unless it holds the end of the log.
    fn oldest(&self) -> Option<Oldest> {
        if let Some(file) = self.sealed.front() {
            let is_end = self.sealed.len() == 1 && self.segments.is_empty();
            return (!is_end).then(|| Oldest::Sealed(file.clone()));
        }
        let segment = self.segments.front()?;
        (self.segments.len() > 1).then_some(Oldest::Segment {
            first: segment.first,
            last: segment.last,
        })
    }

    fn is_durable_after(&self, txid: Txid) -> bool {
        self.durable_txid > txid
    }

    fn pop_oldest(&mut self) {
        if self.sealed.pop_front().is_none() {
            self.segments.pop_front();
        }
    }

    pub(super) fn total_bytes(&self) -> u64 {
        let sealed: u64 = self.sealed.iter().map(|s| s.len).sum();
        let segments: u64 = self.segments.iter().map(|s| s.len).sum();
        sealed + segments
    }
}
