//! SQLite's own bytes: database header, rollback journal, WAL frames, wal-index, lock bytes.
//!
//! Pure and synchronous. Nothing here opens a file: bytes come in as slices or through a small port ([`journal::ReadAt`],
//! [`wal_index::Shm`]), and what cannot be a valid value comes back as an error. The one exception is [`locks`], which
//! asks the kernel for record locks on a descriptor its caller owns.
//!
//! | module | owns |
//! |---|---|
//! | [`header`] | the first 100 bytes of a database |
//! | [`journal`] | the rollback journal, and which pages a transaction that used it may have changed |
//! | [`wal`] | WAL header, frames, running checksum, and where the committed part ends |
//! | [`wal_index`] | the `-shm` file: header, checkpoint info, hash tables |
//! | [`locks`] | which byte is which lock |
//!
//! What we rely on, by table: docs/formats/sqlite-bytes.md.

pub mod header;
pub mod journal;
pub mod locks;
pub mod wal;
pub mod wal_index;

#[cfg(test)]
mod journal_completeness;

/// Reads a big-endian `u32` at `at`, or nothing past the end.
fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(four.try_into().ok()?))
}
