//! Ends reads by programs whose files are no longer those of the database: they would see its past for ever, and no error.
//!
//! By the kernel's passthrough they read without a daemon. So what SQLite looks at when a read transaction begins is made
//! something that it refuses. Transactions under way see their snapshot to the end.
//!
//! | journal | what is written | what a program gets |
//! |---|---|---|
//! | WAL | a header of a version that is none, in the wal-index | `SQLITE_CANTOPEN` |
//! | rollback | another magic, in the old file's first page | `SQLITE_NOTADB` |

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::sqlite::wal_index::{HEADER_LEN, WalIndexHeader};

/// What stands in the place of `SQLite format 3\0`.
const NO_MAGIC: [u8; MAGIC_LEN] = *b"litefs: restart ";
/// Bytes at the beginning of a database that say that it is one.
pub(super) const MAGIC_LEN: usize = 16;

/// Makes a wal-index useless for transactions that begin from now on. A file without a header is left alone.
pub(super) fn end_by_index(shm: &File) -> io::Result<()> {
    let mut copies = [0; 2 * HEADER_LEN];
    match shm.read_exact_at(&mut copies, 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        read => read?,
    }
    let Ok(header) = WalIndexHeader::decode_copies(&copies) else {
        return Ok(()); // Who reads it tries to build it anew, which takes files that can be written.
    };
    let header = header.encode_to_be_refused();
    copies[..HEADER_LEN].copy_from_slice(&header);
    copies[HEADER_LEN..].copy_from_slice(&header);
    // By one write, so that nobody sees half of it.
    shm.write_all_at(&copies, 0)
}

/// Overwrites the magic of a file that is a copy's original, and can be written now.
pub(super) fn end_by_magic(old: &File) -> io::Result<()> {
    old.write_all_at(&NO_MAGIC, 0)
}

/// Returns whether a file holds something else than its copy, the magic aside.
pub(super) fn differ(old: &File, copy: &File) -> io::Result<bool> {
    let len = old.metadata()?.len();
    if copy.metadata()?.len() != len {
        return Ok(true);
    }
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = MAGIC_LEN as u64;
    while at < len {
        let n = usize::try_from(len - at).map_or(a.len(), |rest| rest.min(a.len()));
        old.read_exact_at(&mut a[..n], at)?;
        copy.read_exact_at(&mut b[..n], at)?;
        if a[..n] != b[..n] {
            return Ok(true);
        }
        at += n as u64;
    }
    Ok(false)
}
