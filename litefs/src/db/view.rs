//! The database as SQLite's readers see it: the file, overlaid by the committed frames of its WAL.

use std::collections::HashMap;
use std::fs::File;

use super::capture_wal::read_full;
use super::{DbError, DbPaths};
use crate::ltx::{PageSize, Pgno, page_checksum};
use crate::sqlite::header::{self, DB_HEADER_LEN, DbHeader};
use crate::sqlite::wal::{
    WAL_HEADER_LEN, WalCursor, WalHeader, WalReader, frame_len, frame_offset,
};

/// A way to read pages. The files may change meanwhile: who reads compares checksums, or holds locks.
#[derive(Debug)]
pub(super) struct View {
    pub(super) page_size: PageSize,
    pub(super) page_count: u32,
    pub(super) header: DbHeader,
    main: File,
    wal: Option<File>,
    /// Page to its last committed frame.
    frames: HashMap<Pgno, u32>,
    /// Where the committed part of the WAL ends.
    pub(super) wal_end: Option<(WalHeader, WalCursor)>,
}

impl View {
    /// Opens a database; nothing if it has no pages, or is none.
    ///
    /// With `with_wal` the frames' own checksums say what is committed.
    pub(super) fn open(paths: &DbPaths, with_wal: bool) -> Result<Option<View>, DbError> {
        let main = match File::open(&paths.main) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(DbError::io("open", &paths.main)(e)),
        };
        let mut head = [0; DB_HEADER_LEN];
        let io = || DbError::io("read", &paths.main);
        let len = main.metadata().map_err(io())?.len();
        let n = read_full(&main, &mut head, 0).map_err(io())?;
        let in_file = (n == head.len()).then(|| DbHeader::parse(&head)).flatten();
        let (wal, frames, wal_end, page_count_in_wal) = if with_wal {
            read_wal(paths)?
        } else {
            (None, HashMap::new(), None, None)
        };
        let header = match (in_file, &wal, &wal_end) {
            (Some(h), _, _) => h,
            (None, Some(wal), Some((wal_header, _))) => {
                // The first page may be in the WAL alone.
                let Some(frame) = frames.get(&Pgno::ONE) else {
                    return Ok(None);
                };
                let at = frame_offset(wal_header.page_size, *frame)
                    + crate::sqlite::wal::WAL_FRAME_HEADER_LEN as u64;
                read_full(wal, &mut head, at).map_err(DbError::io("read", &paths.wal))?;
                match DbHeader::parse(&head) {
                    Some(h) => h,
                    None => return Ok(None),
                }
            }
            _ => return Ok(None),
        };
        let page_size = wal_end
            .as_ref()
            .map_or(header.page_size, |(h, _)| h.page_size);
        // A header that promises more than the file has is damaged; the WAL's word can be true of pages that it has.
        let in_file = u32::try_from(len.div_ceil(u64::from(page_size.get()))).unwrap_or(u32::MAX);
        let page_count =
            page_count_in_wal.unwrap_or_else(|| header::page_count(&header, len).min(in_file));
        Ok(Some(View {
            page_size,
            page_count,
            header,
            main,
            wal,
            frames,
            wal_end,
        }))
    }

    /// Reads a page into `buf`; what is past the end of the file is zeros.
    pub(super) fn page(&self, pgno: Pgno, buf: &mut [u8]) -> std::io::Result<()> {
        if let (Some(wal), Some(frame)) = (&self.wal, self.frames.get(&pgno)) {
            let at = frame_offset(self.page_size, *frame)
                + crate::sqlite::wal::WAL_FRAME_HEADER_LEN as u64;
            let n = read_full(wal, buf, at)?;
            buf[n..].fill(0);
            return Ok(());
        }
        self.page_in_file(pgno, buf)
    }

    /// Reads a page from the database file alone.
    pub(super) fn page_in_file(&self, pgno: Pgno, buf: &mut [u8]) -> std::io::Result<()> {
        let n = read_full(&self.main, buf, self.page_size.offset(pgno))?;
        buf[n..].fill(0);
        Ok(())
    }

    pub(super) fn main(&self) -> &File {
        &self.main
    }

    /// Computes the checksum of every page. They are fewer than `page_count` where the file is cut off and no WAL
    /// makes up for it.
    pub(super) fn checksums(&self) -> std::io::Result<super::page_checksums::PageChecksums> {
        let (len, page_len) = (self.main.metadata()?.len(), u64::from(self.page_size.get()));
        let in_file = match self.header.page_count_in_header {
            Some(_) => len / page_len,
            // By SQLite's rule a last, partial page counts then, and ends in zeros.
            None => len.div_ceil(page_len),
        };
        let in_file = u32::try_from(in_file).map_or(self.page_count, |n| n.min(self.page_count));
        let mut sums = super::page_checksums::PageChecksums::scan(
            &self.main,
            self.page_size,
            in_file,
            SCAN_THREADS,
        )?;
        let mut buf = vec![0; self.page_size.len()];
        if self.wal_end.is_some_and(|(_, end)| end.frame_no > 0) {
            // A database that grew since its last checkpoint; what no frame carries is zeros.
            for pgno in (in_file + 1..=self.page_count).filter_map(Pgno::new) {
                self.page_in_file(pgno, &mut buf)?;
                sums.set(pgno, page_checksum(pgno, &buf));
            }
        }
        for pgno in self.frames.keys().filter(|p| p.get() <= self.page_count) {
            self.page(*pgno, &mut buf)?;
            sums.set(*pgno, page_checksum(*pgno, &buf));
        }
        Ok(sums)
    }

    /// Returns the pages that the WAL has newer than the file.
    pub(super) fn wal_pages(&self) -> impl Iterator<Item = Pgno> + '_ {
        self.frames.keys().copied()
    }
}

const SCAN_THREADS: usize = 2;

type Wal = (
    Option<File>,
    HashMap<Pgno, u32>,
    Option<(WalHeader, WalCursor)>,
    Option<u32>,
);

/// Finds the committed frames of a WAL.
fn read_wal(paths: &DbPaths) -> Result<Wal, DbError> {
    let none = (None, HashMap::new(), None, None);
    let io = || DbError::io("read", &paths.wal);
    let wal = match File::open(&paths.wal) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(none),
        Err(e) => return Err(io()(e)),
    };
    let mut head = [0; WAL_HEADER_LEN];
    if read_full(&wal, &mut head, 0).map_err(io())? < head.len() {
        return Ok(none);
    }
    let Ok(header) = WalHeader::decode(&head) else {
        return Ok(none);
    };
    let mut frames = HashMap::new();
    let mut end = header.start();
    let mut page_count = None;
    let mut bytes = Vec::new();
    let mut want = 8 << 20;
    loop {
        // A transaction may be longer than a piece: read on from its start with a larger one.
        bytes.resize(want, 0);
        let n = read_full(&wal, &mut bytes, end.offset(header.page_size)).map_err(io())?;
        let mut reader = WalReader::new(header, end, &bytes[..n]);
        let mut found = false;
        while let Some(commit) = reader.next_commit() {
            found = true;
            for frame in commit.frames() {
                frames.insert(frame.header.pgno, frame.frame_no);
            }
            end = commit.end;
            page_count = Some(commit.commit);
        }
        if n < want {
            break;
        }
        if !found {
            let frames_seen = (want as u64) / frame_len(header.page_size);
            if frames_seen > u64::from(u32::MAX) / 2 {
                break;
            }
            want *= 2;
        }
    }
    Ok((Some(wal), frames, Some((header, end)), page_count))
}
