//! Pages that are to be written into a database, wherever they are: a page copy need not fit into memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::apply::Merged;
use crate::ltx::{Checksum, PageSize, Pgno};

/// New pages of a database, and how long it is with them.
pub(super) trait Pages {
    /// All of this size.
    fn page_size(&self) -> PageSize;
    /// Pages of the database, which none of these is past.
    fn page_count(&self) -> u32;
    /// Which pages these are, in order.
    fn pgnos(&self) -> Box<dyn DoubleEndedIterator<Item = Pgno> + '_>;
    /// Appends one page to a buffer.
    fn read(&self, pgno: Pgno, to: &mut Vec<u8>) -> io::Result<()>;
}

impl Pages for Merged {
    fn page_size(&self) -> PageSize {
        self.page_size
    }

    fn page_count(&self) -> u32 {
        self.page_count
    }

    fn pgnos(&self) -> Box<dyn DoubleEndedIterator<Item = Pgno> + '_> {
        Box::new(self.pages.keys().copied())
    }

    fn read(&self, pgno: Pgno, to: &mut Vec<u8>) -> io::Result<()> {
        let page = self.pages.get(&pgno).ok_or(io::ErrorKind::NotFound)?;
        to.extend_from_slice(page);
        Ok(())
    }
}

/// Pages in a file, each where it is in the database.
pub(super) struct InFile<'a> {
    pub(super) file: &'a File,
    pub(super) page_size: PageSize,
    pub(super) page_count: u32,
    /// Which pages the file has; those past the end do not count.
    pub(super) sums: &'a BTreeMap<Pgno, Checksum>,
}

impl Pages for InFile<'_> {
    fn page_size(&self) -> PageSize {
        self.page_size
    }

    fn page_count(&self) -> u32 {
        self.page_count
    }

    fn pgnos(&self) -> Box<dyn DoubleEndedIterator<Item = Pgno> + '_> {
        let pgnos = self.sums.keys().copied();
        Box::new(pgnos.filter(|pgno| pgno.get() <= self.page_count))
    }

    fn read(&self, pgno: Pgno, to: &mut Vec<u8>) -> io::Result<()> {
        let at = to.len();
        to.resize(at + self.page_size.len(), 0);
        self.file
            .read_exact_at(&mut to[at..], self.page_size.offset(pgno))
    }
}
