use std::fmt;
use std::num::NonZeroU32;

/// Page number within a database, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pgno(NonZeroU32);

impl Pgno {
    /// The first page, which carries the database header.
    pub const ONE: Pgno = Pgno(NonZeroU32::MIN);

    /// Makes a page number; zero is none.
    #[must_use]
    pub const fn new(n: u32) -> Option<Pgno> {
        match NonZeroU32::new(n) {
            Some(n) => Some(Pgno(n)),
            None => None,
        }
    }

    /// Returns the number, from 1.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// Returns the number counted from 0, as an index into a table.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

impl fmt::Display for Pgno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Size of a database page in bytes: a power of two from 512 to 65536.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u32);

impl PageSize {
    /// What SQLite uses unless told otherwise.
    pub const DEFAULT: PageSize = PageSize(4096);

    /// Makes a page size, or nothing if SQLite would not take it.
    #[must_use]
    pub const fn new(n: u32) -> Option<PageSize> {
        if n.is_power_of_two() && n >= 512 && n <= 65536 {
            Some(PageSize(n))
        } else {
            None
        }
    }

    /// Returns the size in bytes.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Returns the size in bytes as a length.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a page size is never zero")]
    pub const fn len(self) -> usize {
        self.0 as usize
    }

    /// Returns the page that holds SQLite's lock bytes (offset 0x4000_0000); it never carries data
    /// (source: SQLite file format, "The Lock-Byte Page").
    #[must_use]
    pub fn lock_pgno(self) -> Pgno {
        Pgno::new(0x4000_0000 / self.0 + 1).unwrap_or(Pgno::ONE)
    }

    /// Returns where a page starts in the database file, in bytes.
    #[must_use]
    pub const fn offset(self, pgno: Pgno) -> u64 {
        pgno.index() as u64 * self.0 as u64
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_page_and_bounds() {
        assert_eq!(PageSize::new(4096).unwrap().lock_pgno().get(), 262_145);
        assert!(PageSize::new(0).is_none() && PageSize::new(256).is_none());
        assert!(PageSize::new(1000).is_none() && PageSize::new(131_072).is_none());
    }
}
