//! Turns a finished rollback-journal transaction into a range, at its commit point, while SQLite holds its lock.
//!
//! The journal names the pages: those whose old content it saved, and those past the old end. SQLite reuses leaves of
//! the free list without saving them, but saves the trunk that listed them; so the leaves of every saved page that could
//! be a trunk are looked at as well. A page counts as changed when its checksum did, so looking at too many costs
//! time and nothing else, and a rolled-back transaction changes nothing.
//!
//! All this is true of a journal that began where the last capture ended. What was written before without a trace
//! (`journal_mode` MEMORY and OFF, a journal that the kernel served) is captured when a journal is made; where one is
//! used again, its copy of page 1 tells, in which every commit counts up.

use std::fs::File;

use super::capture_scan::MAX_RANGE_LEN;
use super::capture_wal::read_full;
use super::commit::Range;
use super::page_checksums::PageChecksums;
use super::{Db, DbError, Inner, Stamp, steps};
use crate::disk::crash_point;
use crate::ltx::{Pgno, page_checksum};
use crate::sqlite::header::{self, DB_HEADER_LEN, DbHeader};
use crate::sqlite::journal;

impl Db {
    /// Captures the transaction whose journal is about to be removed, truncated or zeroed.
    ///
    /// # Errors
    /// Disk or log; the commit must then be refused.
    pub fn capture_journal(&self) -> Result<(), DbError> {
        let mut inner = self.lock();
        if !self.is_primary() || inner.in_doubt.is_some() {
            return Ok(());
        }
        self.capture_journal_locked(&mut inner)
    }

    fn capture_journal_locked(&self, inner: &mut Inner) -> Result<(), DbError> {
        let journal = match File::open(&self.paths.journal) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(DbError::io("open", &self.paths.journal)(e)),
        };
        let main = match File::open(&self.paths.main) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(DbError::io("open", &self.paths.main)(e)),
        };
        let mut journal_head = [0; journal::JOURNAL_HEADER_LEN];
        let n = read_full(&journal, &mut journal_head, 0)
            .map_err(DbError::io("read", &self.paths.journal))?;
        let Ok(journal_header) = journal::JournalHeader::parse(&journal_head[..n]) else {
            // No transaction in it: nothing was written to the database under its protection.
            return Ok(());
        };
        let io = || DbError::io("read", &self.paths.main);
        let mut head = [0; DB_HEADER_LEN];
        let n = read_full(&main, &mut head, 0).map_err(io())?;
        let stamp = Stamp::of(&main).map_err(io())?;
        let Some(header) = (n == head.len()).then(|| DbHeader::parse(&head)).flatten() else {
            return Ok(());
        };
        let page_count = header::page_count(&header, stamp.size);
        if inner.page_size != Some(header.page_size) || journal_header.page_size != header.page_size
        {
            return self.capture_view(inner, false);
        }
        let Ok(changed) = journal::changed_pages(&journal, page_count) else {
            return Ok(());
        };
        let mut candidates = changed.journaled_or_new;
        candidates.extend(changed.leaves);
        candidates.extend((inner.page_count + 1..=page_count).filter_map(Pgno::new));
        candidates.remove(&header.page_size.lock_pgno());
        let mut page = vec![0; header.page_size.len()];
        read_full(&main, &mut page, 0).map_err(io())?;
        let before = page_checksum(Pgno::ONE, changed.old_first_page.as_ref().unwrap_or(&page));
        if inner.checksums.get(Pgno::ONE) != Some(before) {
            // A transaction before this one left no trace: no journal tells what it changed.
            return self.capture_view(inner, false);
        }
        if inner.checksums.get(Pgno::ONE) == Some(page_checksum(Pgno::ONE, &page)) {
            // Every commit counts up in page 1, so this was rolled back; then leaves of the free list may keep new bytes.
            candidates.extend(journal::freelist_leaves(&main).map_err(io())?);
        }

        let mut bytes = Vec::new();
        let mut changed = Vec::new();
        let mut too_large: Option<PageChecksums> = None;
        for pgno in candidates {
            let n = read_full(&main, &mut page, header.page_size.offset(pgno)).map_err(io())?;
            page[n..].fill(0);
            let sum = page_checksum(pgno, &page);
            if inner.checksums.get(pgno) == Some(sum) {
                continue;
            }
            if let Some(sums) = &mut too_large {
                sums.set(pgno, sum);
                continue;
            }
            changed.push(pgno);
            bytes.extend_from_slice(&page);
            if bytes.len() > MAX_RANGE_LEN {
                // More than a range carries: the log begins anew at the state after it.
                let mut sums = inner.checksums.clone();
                sums.truncate(page_count);
                for (pgno, page) in changed
                    .iter()
                    .zip(bytes.chunks_exact(header.page_size.len()))
                {
                    sums.set(*pgno, page_checksum(*pgno, page));
                }
                bytes = Vec::new();
                too_large = Some(sums);
            }
        }
        if let Some(sums) = too_large {
            self.restart_at(inner, sums, header.page_size, page_count, None)?;
        } else if !changed.is_empty() || page_count != inner.page_count {
            let pages = changed
                .into_iter()
                .zip(bytes.chunks_exact(header.page_size.len()))
                .collect();
            let range = Range {
                page_size: header.page_size,
                page_count,
                tx_count: 1,
                pages,
                cursor: None,
            };
            let counts_up = range.pages.first().is_some_and(|(p, _)| *p == Pgno::ONE);
            crash_point(steps::CAPTURE_JOURNAL);
            self.commit_range(inner, &range)?;
            if !counts_up {
                // `locking_mode=EXCLUSIVE` counts up only once, so the counter would not tell that the file is newer.
                self.log.sync().map_err(self.log_error())?;
            }
            crash_point(steps::CAPTURE_JOURNAL_DONE);
        }
        inner.stamp = Some(stamp);
        Ok(())
    }
}
