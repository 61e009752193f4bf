//! A database is dropped: the log says so, and its TXIDs go on if it is made again.

use super::commit::Range;
use super::{Db, DbError, Inner};
use crate::ltx::PageSize;

impl Db {
    /// Records that the database file is gone.
    ///
    /// # Errors
    /// Log.
    pub fn dropped(&self) -> Result<(), DbError> {
        let mut inner = self.lock();
        if !self.is_primary() {
            return Ok(());
        }
        if inner.page_count > 0 {
            self.commit_drop(&mut inner)?;
        }
        Self::forget_wal(&mut inner);
        inner.cursor = None;
        inner.stamp = None;
        Ok(())
    }

    pub(super) fn commit_drop(&self, inner: &mut Inner) -> Result<(), DbError> {
        crate::disk::crash_point(super::steps::DROP_RECORD);
        let page_size = inner.page_size.unwrap_or(PageSize::DEFAULT);
        let range = Range {
            page_size,
            page_count: 0,
            tx_count: 1,
            pages: Vec::new(),
            cursor: None,
        };
        self.commit_range(inner, &range)?;
        self.forget_replaced(inner)
    }
}
