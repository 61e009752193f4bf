use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::record::{self, Prefix, RECORD_HEADER_LEN, RecordMeta};
use super::segment::{Entry, Segment};
use super::{Error, Fault, Log, Record, Sealed, State, steps};
use crate::ltx::{Pos, Txid};

/// What [`Log::read_after`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadAfter {
    /// At least one record; the first may begin at or before the position asked for.
    Records(Vec<Record>),
    /// The log has nothing after it.
    CaughtUp,
    /// The log begins later: the reader needs a snapshot.
    NotAvailable {
        /// The lowest position that can be read from.
        base: Txid,
    },
}

/// A position that a history has been through, and the tenure in which it got there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Milestone {
    /// The position.
    pub pos: Pos,
    /// Zero if that is not known: a sealed file does not say.
    pub epoch: u64,
}

/// Sealed files that are read for milestones at most; each is read whole.
const MAX_SEALED: usize = 16;

/// Where the records are that somebody asked for.
enum Plan {
    Done(ReadAfter),
    Segment(SegmentPart),
    Sealed(Sealed),
}

/// Records that follow each other in one segment.
pub(super) struct SegmentPart {
    pub(super) file: Arc<File>,
    pub(super) first: Txid,
    pub(super) entries: Vec<Entry>,
}

impl Log {
    /// Returns records that follow each other, beginning with the one that contains the
    /// transaction after `after`.
    ///
    /// At least one record, then as many as fit in `max_bytes`; perhaps fewer than there are, so
    /// ask again. Recent records come from memory.
    ///
    /// # Errors
    /// `Io`; `Corrupt`, after which the base is past the damage.
    pub fn read_after(&self, after: Txid, max_bytes: usize) -> Result<ReadAfter, Error> {
        loop {
            let plan = self.state.lock().plan_after(after, max_bytes);
            match plan {
                Plan::Done(done) => return Ok(done),
                Plan::Segment(part) => return self.read_part(&part).map(ReadAfter::Records),
                Plan::Sealed(file) => {
                    if let Some(record) = self.read_sealed(&file)? {
                        return Ok(ReadAfter::Records(vec![record]));
                    }
                }
            }
        }
    }

    /// Returns the records from the newest to the oldest that can be read.
    ///
    /// Where records are compacted on the way, some transactions may come twice.
    #[must_use]
    pub fn newest_first(&self) -> NewestFirst<'_> {
        let before = self.state.lock().end_pos().txid.0.saturating_add(1);
        NewestFirst {
            log: self,
            before: Txid(before),
        }
    }

    /// Returns the ends of the records that begin at or before a transaction, newest first, at most `max`; at last, where
    /// the log begins, if it comes to that.
    ///
    /// Of records in segments only the header is read: a damaged one is the end of no other history either.
    #[must_use]
    pub fn milestones(&self, upto: Txid, max: usize) -> Vec<Milestone> {
        let (parts, sealed, end) = {
            let state = self.state.lock();
            let parts: Vec<SegmentPart> = state
                .segments
                .iter()
                .rev()
                .map(|segment| segment.part(segment.entries.clone()))
                .collect();
            let sealed: Vec<Sealed> = state.sealed.iter().rev().cloned().collect();
            (parts, sealed, state.end)
        };
        let mut found = Vec::new();
        let mut begin = end.map(|end| end.pos());
        for part in &parts {
            for entry in part.entries.iter().rev() {
                if found.len() >= max {
                    return found;
                }
                if entry.min_txid.prev() > upto {
                    begin = None;
                    continue;
                }
                let Ok(meta) = self.read_meta(part, entry) else {
                    return found;
                };
                begin = Some(meta.pre_apply_pos());
                if meta.min_txid <= upto {
                    let (pos, epoch) = (meta.pos(), meta.epoch);
                    found.push(Milestone { pos, epoch });
                }
            }
        }
        let mut read_count = 0;
        for file in &sealed {
            if found.len() >= max || read_count >= MAX_SEALED {
                return found;
            }
            if file.min_txid.prev() > upto {
                begin = None;
                continue;
            }
            read_count += 1;
            let Ok(Some(record)) = self.read_sealed(file) else {
                return found;
            };
            begin = Some(record.meta.pre_apply_pos());
            if record.meta.min_txid <= upto {
                let pos = record.meta.pos();
                found.push(Milestone { pos, epoch: 0 });
            }
        }
        let pos = begin.filter(|pos| pos.txid <= upto);
        found.extend(pos.map(|pos| Milestone { pos, epoch: 0 }));
        found
    }

    /// Reads the fields of a record without its bytes.
    fn read_meta(&self, part: &SegmentPart, entry: &Entry) -> Result<RecordMeta, Error> {
        let path = self.paths.segment(part.first);
        let mut header = [0; RECORD_HEADER_LEN];
        self.disk
            .read_exact_at(steps::READ, &part.file, &mut header, entry.offset)
            .map_err(|e| Error::io(steps::READ, &path, e))?;
        Prefix::parse(&header)
            .and_then(|prefix| record::decode_fields(&header, prefix.ltx_len))
            .map(|(meta, _)| meta)
            .map_err(|fault| Error::Corrupt {
                path,
                offset: entry.offset,
                fault,
            })
    }

    /// Reads records of a segment with one read.
    pub(super) fn read_part(&self, part: &SegmentPart) -> Result<Vec<Record>, Error> {
        let (Some(first), Some(last)) = (part.entries.first(), part.entries.last()) else {
            return Ok(Vec::new());
        };
        let path = self.paths.segment(part.first);
        let len = usize::try_from(last.offset + last.len - first.offset)
            .map_err(|e| Error::io(steps::READ, &path, io::Error::other(e)))?;
        let mut bytes = vec![0; len];
        let n = self
            .disk
            .read_at(steps::READ, &part.file, &mut bytes, first.offset)
            .map_err(|e| Error::io(steps::READ, &path, e))?;
        bytes.truncate(n);
        let mut bytes = Bytes::from(bytes);
        let mut records = Vec::with_capacity(part.entries.len());
        for entry in &part.entries {
            let (record, len) = decode_entry(&bytes, entry)
                .map_err(|fault| self.condemn(entry.max_txid, &path, entry.offset, fault))?;
            records.push(record);
            bytes = bytes.slice(len..);
        }
        Ok(records)
    }

    /// Reads a sealed file; `None` if it was removed since it was looked up.
    pub(super) fn read_sealed(&self, file: &Sealed) -> Result<Option<Record>, Error> {
        let path = self.paths.sealed(file);
        let bytes = match self.disk.read_file(steps::READ, &path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if self.has_sealed(file) {
                    return Err(self.condemn(file.max_txid, &path, 0, Fault::Missing));
                }
                return Ok(None);
            }
            Err(e) => return Err(Error::io(steps::READ, &path, e)),
        };
        let meta = file
            .verify(&bytes, self.options.ltx_meta)
            .map_err(|fault| self.condemn(file.max_txid, &path, 0, fault))?;
        Ok(Some(Record {
            meta,
            ltx: bytes.into(),
        }))
    }

    fn has_sealed(&self, file: &Sealed) -> bool {
        let state = self.state.lock();
        state.sealed.iter().any(|s| s.max_txid == file.max_txid)
    }

    /// Moves the base past a damaged record, so that nobody meets it again.
    fn condemn(&self, max_txid: Txid, path: &Path, offset: u64, fault: Fault) -> Error {
        let mut state = self.state.lock();
        state.floor = state.floor.max(max_txid.min(state.end_pos().txid)); // INV-LOG-2
        Error::Corrupt {
            path: path.to_owned(),
            offset,
            fault,
        }
    }
}

fn decode_entry(bytes: &Bytes, entry: &Entry) -> Result<(Record, usize), Fault> {
    let (record, len) = record::decode(bytes)?;
    if (record.meta.min_txid, record.meta.max_txid) != (entry.min_txid, entry.max_txid) {
        return Err(Fault::Field("transaction range"));
    }
    Ok((record, len))
}

impl State {
    fn plan_after(&self, after: Txid, max_bytes: usize) -> Plan {
        if after >= self.end_pos().txid {
            return Plan::Done(ReadAfter::CaughtUp);
        }
        let base = self.base();
        if after < base {
            return Plan::Done(ReadAfter::NotAvailable { base });
        }
        if self
            .tail
            .front()
            .is_some_and(|r| r.meta.min_txid.prev() <= after)
        {
            return Plan::Done(ReadAfter::Records(self.tail_after(after, max_bytes)));
        }
        let i = self.sealed.partition_point(|s| s.max_txid <= after);
        if let Some(file) = self.sealed.get(i) {
            return Plan::Sealed(file.clone());
        }
        let i = self.segments.partition_point(|s| s.last.max_txid <= after);
        match self.segments.get(i) {
            Some(segment) => Plan::Segment(segment.part_after(after, max_bytes)),
            None => Plan::Done(ReadAfter::CaughtUp),
        }
    }

    fn tail_after(&self, after: Txid, max_bytes: usize) -> Vec<Record> {
        let i = self.tail.partition_point(|r| r.meta.max_txid <= after);
        let mut left = max_bytes;
        let mut records = Vec::new();
        for record in self.tail.range(i..) {
            if !records.is_empty() && record.ltx.len() > left {
                break;
            }
            left = left.saturating_sub(record.ltx.len());
            records.push(record.clone());
        }
        records
    }

    /// Finds the newest record that begins before a transaction and can be read.
    fn plan_before(&self, before: Txid) -> Option<Plan> {
        if before.prev() <= self.base() {
            return None;
        }
        let i = self.tail.partition_point(|r| r.meta.min_txid < before);
        if i > 0 {
            let record = self.tail[i - 1].clone();
            return Some(Plan::Done(ReadAfter::Records(vec![record])));
        }
        for segment in self.segments.iter().rev() {
            let i = segment.entries.partition_point(|e| e.min_txid < before);
            if i > 0 {
                let entries = vec![segment.entries[i - 1]];
                return Some(Plan::Segment(segment.part(entries)));
            }
        }
        let i = self.sealed.partition_point(|s| s.min_txid < before);
        Some(Plan::Sealed(self.sealed.get(i.checked_sub(1)?)?.clone()))
    }
}

impl Segment {
    pub(super) fn part(&self, entries: Vec<Entry>) -> SegmentPart {
        SegmentPart {
            file: self.file.clone(),
            first: self.first,
            entries,
        }
    }

    fn part_after(&self, after: Txid, max_bytes: usize) -> SegmentPart {
        let i = self.entries.partition_point(|e| e.max_txid <= after);
        let mut left = max_bytes as u64;
        let mut n = 0;
        for entry in &self.entries[i..] {
            if n > 0 && entry.len > left {
                break;
            }
            left = left.saturating_sub(entry.len);
            n += 1;
        }
        self.part(self.entries[i..i + n].to_vec())
    }
}

/// Records from the newest to the oldest; see [`Log::newest_first`].
#[derive(Debug)]
pub struct NewestFirst<'a> {
    log: &'a Log,
    /// What comes next begins before this transaction.
    before: Txid,
}

impl NewestFirst<'_> {
    fn read(&self) -> Result<Option<Record>, Error> {
        loop {
            let Some(plan) = self.log.state.lock().plan_before(self.before) else {
                return Ok(None);
            };
            match plan {
                Plan::Done(ReadAfter::Records(mut records)) => return Ok(records.pop()),
                Plan::Done(_) => return Ok(None),
                Plan::Segment(part) => return Ok(self.log.read_part(&part)?.pop()),
                Plan::Sealed(file) => {
                    if let Some(record) = self.log.read_sealed(&file)? {
                        return Ok(Some(record));
                    }
                }
            }
        }
    }
}

impl Iterator for NewestFirst<'_> {
    type Item = Result<Record, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let read = self.read().transpose()?;
        // After an error there is nothing older that could be read.
        self.before = match &read {
            Ok(record) => record.meta.min_txid,
            Err(_) => Txid::ZERO,
        };
        Some(read)
    }
}
