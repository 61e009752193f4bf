use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::segment::{self, SEGMENT_HEADER_LEN, Scan, Segment};
use super::{Error, Fault, LogOptions, Older, Paths, RecordMeta, Sealed, State};
use super::{quarantine, quarantine_path, steps};
use crate::disk::{Disk, OpenMode, Step};
use crate::ltx::{Pos, Txid};

/// What was found when a log was opened.
#[derive(Debug)]
pub struct Opened {
    /// As [`Log::end`](super::Log::end).
    pub end: Option<RecordMeta>,
    /// As [`Log::base`](super::Log::base).
    pub base: Txid,
    /// What was not as a clean stop leaves it, in the order it was met.
    pub findings: Vec<Finding>,
}

/// Something in a log that was not as it should be, and what was done.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The last write was interrupted; its remains were cut off. Normal after a crash.
    TornTail {
        /// The last segment.
        path: PathBuf,
        /// Where it ends now, in bytes.
        offset: u64,
        /// How many bytes were cut.
        cut_len: u64,
    },
    /// Bytes are not those that were written; from there on the file is unusable.
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the bad bytes begin.
        offset: u64,
        /// What is wrong with them.
        fault: Fault,
        /// Where they are kept.
        kept: PathBuf,
    },
    /// A file does not connect to the end of the log, because what is between is missing.
    Unreachable {
        /// Where it was.
        path: PathBuf,
        /// Where it is kept.
        kept: PathBuf,
    },
    /// What an interrupted step left was removed, or the step finished. Normal after a crash.
    Leftover {
        /// The file.
        path: PathBuf,
    },
}

/// Makes the files consistent and returns what they say.
pub(super) fn recover(
    disk: &dyn Disk,
    paths: &Paths,
    options: &LogOptions,
) -> Result<(State, Vec<Finding>), Error> {
    let mut recovery = Recovery {
        disk,
        paths,
        options,
        findings: Vec::new(),
    };
    for dir in [&paths.segments, &paths.sealed] {
        disk.create_dir_all(steps::OPEN_MKDIR, dir)
            .map_err(|e| Error::io(steps::OPEN_MKDIR, dir, e))?;
    }
    recovery.settle_restart()?;
    let mut found = recovery.scan_segments()?;
    let mut sealed = recovery.list_sealed()?;
    if found.is_empty() {
        recovery.sync_root()?; // before the first sync promises anything
    }
    recovery.settle_tail(&mut found)?;
    recovery.settle_overlaps(&mut found, &mut sealed)?;
    let state = recovery.connect(found, sealed)?;
    Ok((state, recovery.findings))
}

/// Clears everything but the new first segment, then gives that its name.
pub(super) fn finish_restart(
    disk: &dyn Disk,
    paths: &Paths,
    first: Txid,
    older: Older,
) -> Result<(), Error> {
    for (dir, suffix) in [(&paths.sealed, "ltx"), (&paths.segments, "seg")] {
        for (_, path) in list(disk, dir, suffix)? {
            match older {
                Older::Remove => disk
                    .remove_file(steps::RESTART_REMOVE, &path)
                    .map_err(|e| Error::io(steps::RESTART_REMOVE, &path, e))?,
                Older::Quarantine => drop(quarantine(disk, paths, &path)?),
            }
        }
        disk.sync_dir(steps::RESTART_SYNC_DIR, dir)
            .map_err(|e| Error::io(steps::RESTART_SYNC_DIR, dir, e))?;
    }
    let path = paths.restart();
    disk.rename(steps::RESTART_RENAME, &path, &paths.segment(first))
        .map_err(|e| Error::io(steps::RESTART_RENAME, &path, e))
}

/// Returns the files of a directory whose names end so, in name order, which is age order.
fn list(disk: &dyn Disk, dir: &Path, suffix: &str) -> Result<Vec<(String, PathBuf)>, Error> {
    let names = disk
        .list_dir(steps::OPEN_LIST, dir)
        .map_err(|e| Error::io(steps::OPEN_LIST, dir, e))?;
    let mut files: Vec<(String, PathBuf)> = names
        .into_iter()
        .filter_map(|name| {
            let stem = name.to_str()?.strip_suffix(suffix)?.strip_suffix('.')?;
            Some((stem.to_owned(), dir.join(&name)))
        })
        .collect();
    files.sort_unstable();
    Ok(files)
}

struct Recovery<'a> {
    disk: &'a dyn Disk,
    paths: &'a Paths,
    options: &'a LogOptions,
    findings: Vec<Finding>,
}

/// A segment file before it is known to belong to the log.
struct Found {
    first: Txid,
    path: PathBuf,
    file: File,
    scan: Scan,
}

impl Recovery<'_> {
    /// Finishes a restart that was decided, or forgets one that was not; forgets a rewrite.
    fn settle_restart(&mut self) -> Result<(), Error> {
        let path = self.paths.restart();
        let leftovers = list(self.disk, &self.paths.segments, "tmp")?;
        let is_left = |path: &Path| leftovers.iter().any(|(_, found)| found == path);
        let rewrite = self.paths.rewrite();
        if is_left(&rewrite) {
            self.remove(&rewrite)?;
            self.findings.push(Finding::Leftover { path: rewrite });
        }
        if !is_left(&path) {
            return Ok(());
        }
        match self.decided_restart(&path)? {
            Some((first, older)) => finish_restart(self.disk, self.paths, first, older)?,
            None => self.remove(&path)?,
        }
        self.findings.push(Finding::Leftover { path });
        Ok(())
    }

    fn decided_restart(&self, path: &Path) -> Result<Option<(Txid, Older)>, Error> {
        let file = self.open(path, OpenMode::Read)?;
        let mut header = [0; SEGMENT_HEADER_LEN];
        let n = self
            .disk
            .read_at(steps::OPEN_SCAN, &file, &mut header, 0)
            .map_err(|e| Error::io(steps::OPEN_SCAN, path, e))?;
        let Ok(first) = segment::decode_header(&header) else {
            return Ok(None);
        };
        let scan = self.scan(path, &file, first)?;
        Ok(match scan.base {
            Some((_, remove_older)) if n == header.len() && scan.fault.is_none() => Some((
                first,
                if remove_older {
                    Older::Remove
                } else {
                    Older::Quarantine
                },
            )),
            _ => None,
        })
    }

    /// Makes the directories of a new log durable; those above belong to the caller.
    fn sync_root(&self) -> Result<(), Error> {
        let root = &self.paths.root;
        let parent = root.parent().filter(|dir| !dir.as_os_str().is_empty());
        for dir in [Some(root.as_path()), parent].into_iter().flatten() {
            self.disk
                .sync_dir(steps::OPEN_SYNC, dir)
                .map_err(|e| Error::io(steps::OPEN_SYNC, dir, e))?;
        }
        Ok(())
    }

    fn scan_segments(&self) -> Result<Vec<Found>, Error> {
        let mut found = Vec::new();
        for (stem, path) in list(self.disk, &self.paths.segments, "seg")? {
            let Some(first) = stem
                .parse()
                .ok()
                .filter(|txid: &Txid| txid.to_string() == stem)
            else {
                continue; // not ours
            };
            let file = self.open(&path, OpenMode::Write)?;
            let scan = self.scan(&path, &file, first)?;
            found.push(Found {
                first,
                path,
                file,
                scan,
            });
        }
        Ok(found)
    }

    fn list_sealed(&mut self) -> Result<Vec<Sealed>, Error> {
        for (_, path) in list(self.disk, &self.paths.sealed, "ltx.tmp")? {
            self.remove(&path)?;
            self.findings.push(Finding::Leftover { path });
        }
        let mut sealed = Vec::new();
        for (stem, path) in list(self.disk, &self.paths.sealed, "ltx")? {
            let Some(mut file) = Sealed::of_name(&stem) else {
                continue; // not ours
            };
            let handle = self.open(&path, OpenMode::Read)?;
            file.len = self
                .disk
                .len(steps::OPEN_SCAN, &handle)
                .map_err(|e| Error::io(steps::OPEN_SCAN, &path, e))?;
            sealed.push(file);
        }
        Ok(sealed)
    }

    /// Makes the last segment end in a whole record, dropping segments that have none.
    fn settle_tail(&mut self, found: &mut Vec<Found>) -> Result<(), Error> {
        while let Some(last) = found.last_mut() {
            if last.scan.last.is_some() {
                if let Some(fault) = last.scan.fault.take() {
                    self.cut_tail(last, fault)?;
                }
                return Ok(());
            }
            if self.is_torn(last)? {
                self.remove(&last.path)?;
                let path = last.path.clone();
                self.findings.push(Finding::Leftover { path });
            } else {
                self.condemn(last)?;
            }
            found.pop();
        }
        Ok(())
    }

    fn cut_tail(&mut self, last: &mut Found, fault: Fault) -> Result<(), Error> {
        let offset = last.scan.good_len;
        let path = last.path.clone();
        self.findings.push(if self.is_torn(last)? {
            Finding::TornTail {
                path,
                offset,
                cut_len: last.scan.file_len - offset,
            }
        } else {
            Finding::Damaged {
                kept: self.keep_tail(last)?,
                path,
                offset,
                fault,
            }
        });
        self.disk
            .set_len(steps::OPEN_CUT, &last.file, offset)
            .and_then(|()| self.disk.sync_data(steps::OPEN_SYNC, &last.file))
            .map_err(|e| Error::io(steps::OPEN_CUT, &last.path, e))?;
        last.scan.file_len = offset;
        Ok(())
    }

    /// Copies what is about to be cut off into quarantine.
    fn keep_tail(&self, found: &Found) -> Result<PathBuf, Error> {
        let offset = found.scan.good_len;
        let name = format!("{}.tail-{offset}", Segment::name(found.first));
        let path = quarantine_path(self.disk, self.paths, &name.into())?;
        self.copy_from(&found.file, offset, &path)
            .map_err(|e| Error::io(steps::OPEN_KEEP, &path, e))?;
        Ok(path)
    }

    fn copy_from(&self, from: &File, mut offset: u64, path: &Path) -> std::io::Result<()> {
        let to = self.disk.open(steps::OPEN_KEEP, path, OpenMode::Truncate)?;
        let mut chunk = vec![0; 256 << 10];
        let mut at = 0;
        loop {
            let n = self
                .disk
                .read_at(steps::OPEN_SCAN, from, &mut chunk, offset)?;
            if n == 0 {
                break;
            }
            self.disk
                .write_all_at(steps::OPEN_KEEP, &to, &chunk[..n], at)?;
            offset += n as u64;
            at += n as u64;
        }
        self.disk.sync_data(steps::OPEN_KEEP, &to)?;
        self.disk.sync_dir(steps::OPEN_KEEP, &self.paths.quarantine)
    }

    /// Drops one of two files with the same records, as a crash while sealing leaves them.
    ///
    /// The last segment stays, because epoch and WAL cursor of the end are only there (INV-LOG-4).
    fn settle_overlaps(
        &mut self,
        found: &mut Vec<Found>,
        sealed: &mut Vec<Sealed>,
    ) -> Result<(), Error> {
        let last = found.last().map(|f| f.first);
        let mut i = 0;
        while i < found.len() {
            let segment = &found[i];
            let Some(twin) = sealed.iter().position(|s| s.min_txid == segment.first) else {
                i += 1;
                continue;
            };
            let path = self.paths.sealed(&sealed[twin]);
            let end = segment.scan.last.map(|meta| meta.max_txid);
            let is_whole = segment.scan.fault.is_none() && end >= Some(sealed[twin].max_txid);
            if Some(segment.first) == last && is_whole {
                self.remove(&path)?;
                self.findings.push(Finding::Leftover { path });
                sealed.remove(twin);
                i += 1;
            } else if let Err(fault) = self.verify(&sealed[twin])? {
                self.condemn_sealed(&path, fault)?;
                sealed.remove(twin);
            } else if is_whole {
                self.remove(&segment.path)?;
                let path = found.remove(i).path;
                self.findings.push(Finding::Leftover { path });
            } else {
                self.condemn(segment)?;
                found.remove(i);
            }
        }
        Ok(())
    }

    /// Walks from the newest file to the oldest that connects; the rest goes to quarantine.
    fn connect(&mut self, mut found: Vec<Found>, mut sealed: Vec<Sealed>) -> Result<State, Error> {
        let mut state = State::default();
        let mut begin: Option<Pos> = None;
        while let Some(segment) = found.pop() {
            let connects = match state.segments.front() {
                None => true,
                Some(next) if next.is_base => false,
                Some(_) => segment.scan.last.map(|meta| meta.pos()) == begin,
            };
            match (segment.scan.last, &segment.scan.fault) {
                (Some(last), None) if connects => {
                    begin = segment.scan.begin;
                    state.segments.push_front(Segment {
                        file: Arc::new(segment.file),
                        first: segment.first,
                        is_base: segment.scan.base.is_some(),
                        entries: segment.scan.entries,
                        len: segment.scan.good_len,
                        last,
                    });
                }
                (_, Some(_)) => {
                    self.condemn(&segment)?;
                    self.abandon_segments(&mut found)?;
                }
                (_, None) => {
                    self.abandon(segment.path)?;
                    self.abandon_segments(&mut found)?;
                }
            }
        }
        state.end = state.segments.back().map(|segment| segment.last);
        let is_base = state.segments.front().is_some_and(|s| s.is_base);
        sealed.sort_unstable_by_key(|s| (s.max_txid, s.min_txid));
        while let Some(file) = sealed.pop() {
            if is_base || !self.sealed_connects(&mut state, &file)? {
                self.abandon(self.paths.sealed(&file))?;
            } else if state.end.is_some() {
                state.sealed.push_front(file);
            }
        }
        state.appended = u64::from(!state.segments.is_empty());
        state.dir_is_dirty = state.appended > 0;
        if state.appended == 0 {
            state.durable_txid = state.end_pos().txid;
        }
        Ok(state)
    }

    /// Says whether a file ends where the state begins; into an empty state it brings the end.
    fn sealed_connects(&mut self, state: &mut State, file: &Sealed) -> Result<bool, Error> {
        if state.end.is_some() {
            return Ok(file.max_txid == state.base());
        }
        match self.verify(file)? {
            Ok(meta) => state.end = Some(meta),
            Err(fault) => self.condemn_sealed(&self.paths.sealed(file), fault)?,
        }
        Ok(true)
    }

    fn abandon_segments(&mut self, found: &mut Vec<Found>) -> Result<(), Error> {
        while let Some(segment) = found.pop() {
            match segment.scan.fault {
                Some(_) => self.condemn(&segment)?,
                None => self.abandon(segment.path)?,
            }
        }
        Ok(())
    }

    fn abandon(&mut self, path: PathBuf) -> Result<(), Error> {
        let kept = quarantine(self.disk, self.paths, &path)?;
        self.findings.push(Finding::Unreachable { path, kept });
        Ok(())
    }

    fn condemn(&mut self, segment: &Found) -> Result<(), Error> {
        let kept = quarantine(self.disk, self.paths, &segment.path)?;
        self.findings.push(Finding::Damaged {
            path: segment.path.clone(),
            offset: segment.scan.good_len,
            fault: segment.scan.fault.clone().unwrap_or(Fault::CutShort),
            kept,
        });
        Ok(())
    }

    fn condemn_sealed(&mut self, path: &Path, fault: Fault) -> Result<(), Error> {
        let kept = quarantine(self.disk, self.paths, path)?;
        self.findings.push(Finding::Damaged {
            path: path.to_owned(),
            offset: 0,
            fault,
            kept,
        });
        Ok(())
    }

    fn verify(&self, file: &Sealed) -> Result<Result<RecordMeta, Fault>, Error> {
        let path = self.paths.sealed(file);
        let bytes = self
            .disk
            .read_file(steps::OPEN_SCAN, &path)
            .map_err(|e| Error::io(steps::OPEN_SCAN, &path, e))?;
        Ok(file.verify(&bytes, self.options.ltx_meta))
    }

    fn is_torn(&self, found: &Found) -> Result<bool, Error> {
        found
            .scan
            .fault_is_torn_write(self.disk, &found.file)
            .map_err(|e| Error::io(steps::OPEN_SCAN, &found.path, e))
    }

    fn scan(&self, path: &Path, file: &File, first: Txid) -> Result<Scan, Error> {
        Scan::read(self.disk, file, first).map_err(|e| Error::io(steps::OPEN_SCAN, path, e))
    }

    fn open(&self, path: &Path, mode: OpenMode) -> Result<File, Error> {
        const STEP: Step = steps::OPEN_FILE;
        self.disk
            .open(STEP, path, mode)
            .map_err(|e| Error::io(STEP, path, e))
    }

    fn remove(&self, path: &Path) -> Result<(), Error> {
        self.disk
            .remove_file(steps::OPEN_REMOVE, path)
            .map_err(|e| Error::io(steps::OPEN_REMOVE, path, e))
    }
}

impl Sealed {
    fn of_name(stem: &str) -> Option<Sealed> {
        let (min, max) = stem.split_once('-')?;
        let file = Sealed {
            min_txid: min.parse().ok()?,
            max_txid: max.parse().ok()?,
            len: 0,
            timestamp_ms: None,
        };
        (file.name() == format!("{stem}.ltx")).then_some(file)
    }

    /// Checks that the bytes of a sealed file are good, and what its name says.
    pub(super) fn verify(
        &self,
        bytes: &[u8],
        ltx_meta: super::LtxMeta,
    ) -> Result<RecordMeta, Fault> {
        let meta = ltx_meta(bytes).map_err(|e| Fault::Ltx(e.to_string()))?;
        if (meta.min_txid, meta.max_txid) != (self.min_txid, self.max_txid) {
            let range = format!("{}-{}", meta.min_txid, meta.max_txid);
            return Err(Fault::Name(range));
        }
        Ok(meta)
    }
}
