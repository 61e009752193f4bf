//! LTX, the format of a transaction: pure, synchronous, only bytes in and bytes out.
//!
//! The value types (`Txid`, `Checksum`, `Pos`, `Pgno`, `PageSize`) are what everything else is
//! built from. A file holds the pages that a range of transactions left, and is written by
//! [`Encoder`], read by [`Decoder`] and merged by [`compact`]:
//!
//! ```text
//! header | page, page, ... ascending | end marker | page index | trailer
//! ```
//!
//! Each record's bytes are in the table on top of its module and in docs/formats/ltx.md.
//! Bytes of a stranger never panic here, and never make us ask for more memory than a small
//! multiple of their own length and a page (in the older frame form of a page, a few MiB).

mod checksum;
mod compact;
mod decoder;
mod encoder;
mod error;
mod file_name;
mod header;
mod index;
mod page;
mod pgno;
mod pos;
#[cfg(test)]
mod tests;
mod trailer;
mod txid;

pub use checksum::{Checksum, page_checksum};
pub use compact::{compact, compact_untracked};
pub use decoder::{Decoder, Summary, verify};
pub use encoder::Encoder;
pub use error::LtxError;
pub use file_name::FileName;
pub use header::{HEADER_LEN, Header, HeaderFlags};
pub use index::{IndexEntry, PageIndex};
pub use pgno::{PageSize, Pgno};
pub use pos::Pos;
pub use trailer::{TRAILER_LEN, Trailer};
pub use txid::Txid;
