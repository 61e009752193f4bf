//! LTX, the format of a transaction: pure, synchronous, only bytes in and bytes out.
//!
//! The value types (`Txid`, `Checksum`, `Pos`, `Pgno`, `PageSize`) are what everything else is built from.

mod checksum;
mod pgno;
mod pos;
mod txid;

pub use checksum::{Checksum, page_checksum};
pub use pgno::{PageSize, Pgno};
pub use pos::Pos;
pub use txid::Txid;
