//! Which byte is which lock, and record locks that belong to an open file and not to the process.
//!
//! | file | bytes | lock | who holds it |
//! |---|---|---|---|
//! | database | 0x40000000 | PENDING | one who waits for readers to leave |
//! | database | +1 | RESERVED | the writer of a rollback mode |
//! | database | +2, 510 long | SHARED | read: every connection in a transaction (in WAL mode: every one); write: EXCLUSIVE |
//! | `-shm` | 120 | WRITE | the writer |
//! | `-shm` | 121 | CKPT | the checkpointer |
//! | `-shm` | 122 | RECOVER | who rebuilds the wal-index |
//! | `-shm` | 123..=127 | READ 0 to 4 | read: a reader at that read mark; write: who moves the mark |
//! | `-shm` | 128 | DMS | read: every connection; without any, the next truncates the file |
//! | `-lock` | 72 | HALT | a replica that borrows the right to write |
//!
//! SQLite takes POSIX locks. The daemon takes open-file-description locks, which conflict with those but belong to the
//! descriptor: closing another descriptor of the file does not drop them, and two of our own descriptors do conflict.
//! Source: `os_unix.c`, `wal.c`; fcntl(2); LiteFS for HALT.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes of a file that one lock covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LockRange {
    /// First byte.
    pub start: u64,
    /// Bytes covered, never 0.
    pub len: u64,
}

impl LockRange {
    const fn byte(start: u64) -> LockRange {
        LockRange { start, len: 1 }
    }

    /// Returns the byte after the last.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start + self.len
    }

    /// Tells whether some byte is in both.
    #[must_use]
    pub const fn overlaps(self, other: LockRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Locks in the database file.
pub mod db {
    use super::LockRange;

    /// Keeps new readers out while a writer waits for those there are.
    pub const PENDING: LockRange = LockRange::byte(0x4000_0000);
    /// The one writer of a rollback mode, before it writes to the database.
    pub const RESERVED: LockRange = LockRange::byte(0x4000_0001);
    /// Readers share it; a writer excludes them by it.
    pub const SHARED: LockRange = LockRange {
        start: 0x4000_0002,
        len: 510,
    };
}

/// Locks in the `-shm` file.
pub mod shm {
    use super::LockRange;

    /// The writer.
    pub const WRITE: LockRange = LockRange::byte(120);
    /// The checkpointer.
    pub const CKPT: LockRange = LockRange::byte(121);
    /// Whoever rebuilds the wal-index.
    pub const RECOVER: LockRange = LockRange::byte(122);
    /// The dead man's switch: held shared by all that use the file.
    pub const DMS: LockRange = LockRange::byte(128);
    /// Readers at each read mark; those at mark 0 ignore the log.
    pub const READ: [LockRange; 5] = [
        LockRange::byte(123),
        LockRange::byte(124),
        LockRange::byte(125),
        LockRange::byte(126),
        LockRange::byte(127),
    ];
    /// WRITE, CKPT, RECOVER and all READ: what recovery excludes everyone by.
    pub const ALL_BUT_DMS: LockRange = LockRange { start: 120, len: 8 };

    const _: () = assert!(READ[4].end() == DMS.start && ALL_BUT_DMS.end() == DMS.start);
}

/// The one lock of a database's `-lock` file.
pub const HALT: LockRange = LockRange::byte(72);

/// How a range is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// Many may hold it, and no writer.
    Read,
    /// One holds it alone.
    Write,
}

/// Record locks of one open file.
///
/// None of the calls wait. Taking a range again in the other kind converts it, and a refused conversion leaves it
/// as it was. Locks go when the last duplicate of the descriptor is closed; a write lock needs it writable, a read lock
/// readable.
#[derive(Debug, Clone, Copy)]
pub struct OfdLocks<'fd> {
    fd: BorrowedFd<'fd>,
}

impl<'fd> OfdLocks<'fd> {
    /// Wraps an open file.
    #[must_use]
    pub const fn new(fd: BorrowedFd<'fd>) -> OfdLocks<'fd> {
        OfdLocks { fd }
    }

    /// Takes a range shared; `false` if someone holds part of it exclusively.
    /// # Errors
    /// Whatever fcntl(2) says but a conflict.
    pub fn try_read(&self, range: LockRange) -> io::Result<bool> {
        self.set(libc::F_RDLCK, range)
    }

    /// Takes a range exclusively; `false` if someone else holds part of it.
    /// # Errors
    /// Whatever fcntl(2) says but a conflict.
    pub fn try_write(&self, range: LockRange) -> io::Result<bool> {
        self.set(libc::F_WRLCK, range)
    }

    /// Gives a range back; one that is not held is no error.
    /// # Errors
    /// Whatever fcntl(2) says.
    pub fn unlock(&self, range: LockRange) -> io::Result<()> {
        self.set(libc::F_UNLCK, range).map(drop)
    }

    /// Tells whether, and how, someone else holds part of a range that keeps us from taking it in `wanted`.
    /// # Errors
    /// Whatever fcntl(2) says.
    pub fn conflict(&self, wanted: LockKind, range: LockRange) -> io::Result<Option<LockKind>> {
        let kind = match wanted {
            LockKind::Read => libc::F_RDLCK,
            LockKind::Write => libc::F_WRLCK,
        };
        let mut lock = flock(kind, range)?;
        // SAFETY: the descriptor is open while borrowed, and `lock` is a valid flock that outlives the call.
        if unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(match i32::from(lock.l_type) {
            libc::F_UNLCK => None,
            libc::F_RDLCK => Some(LockKind::Read),
            _ => Some(LockKind::Write),
        })
    }

    fn set(&self, kind: libc::c_int, range: LockRange) -> io::Result<bool> {
        let lock = flock(kind, range)?;
        loop {
            // SAFETY: the descriptor is open while borrowed, and `lock` is a valid flock that outlives the call.
            let done =
                unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
            if done != -1 {
                return Ok(true);
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => return Ok(false),
                Some(libc::EINTR) => {}
                _ => return Err(error),
            }
        }
    }
}

fn flock(kind: libc::c_int, range: LockRange) -> io::Result<libc::flock> {
    let invalid = |e| io::Error::new(io::ErrorKind::InvalidInput, e);
    // SAFETY: flock is a C struct of integers, for which all zeroes is a value; F_OFD_* wants l_pid to be 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).map_err(invalid)?;
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).map_err(invalid)?;
    lock.l_start = libc::off_t::try_from(range.start).map_err(invalid)?;
    lock.l_len = libc::off_t::try_from(range.len).map_err(invalid)?;
    Ok(lock)
}

#[cfg(test)]
#[path = "locks_tests.rs"]
mod tests;
