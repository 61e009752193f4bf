use lz4_flex::block::DecompressError;

use super::{Checksum, PageSize, Pgno, Txid};

/// Why bytes are not a sound LTX file, or why a sound one cannot be made of what was given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LtxError {
    /// The bytes end inside a record.
    #[error("{part} needs {need} bytes, {have} left")]
    Truncated {
        /// Record that was cut.
        part: &'static str,
        /// Its length.
        need: u64,
        /// What was left.
        have: u64,
    },
    /// The file does not start with `LTX1`.
    #[error("magic {found:02x?}")]
    Magic {
        /// First four bytes.
        found: [u8; 4],
    },
    /// The header has flags this version does not know.
    #[error("header flags {flags:#010x}")]
    HeaderFlags {
        /// All flags.
        flags: u32,
    },
    /// SQLite has no such page size.
    #[error("page size {bytes}")]
    PageSize {
        /// Size found.
        bytes: u32,
    },
    /// The range of transactions is empty, or starts at zero.
    #[error("transactions {min} to {max}")]
    TxidRange {
        /// First transaction.
        min: Txid,
        /// Last transaction.
        max: Txid,
    },
    /// The place in the WAL is negative, or has a size or salts but no offset.
    #[error("wal offset {offset}, size {size}, salts {salt1:08x} {salt2:08x}")]
    WalSpan {
        /// Offset in the WAL.
        offset: i64,
        /// Length in the WAL.
        size: i64,
        /// First salt.
        salt1: u32,
        /// Second salt.
        salt2: u32,
    },
    /// The pre-apply checksum is there where it must not be, absent where it must be, or lacks its flag bit.
    #[error("pre-apply checksum {raw:016x}, snapshot {snapshot}, tracked {tracked}")]
    PreApplyChecksum {
        /// As stored; 0 is absent.
        raw: u64,
        /// Whether the range starts at transaction 1.
        snapshot: bool,
        /// Whether the header says that checksums are kept.
        tracked: bool,
    },
    /// The post-apply checksum is there where it must not be, absent where it must be, lacks its
    /// flag bit, or is not that of an empty database although the database was dropped.
    #[error("post-apply checksum {raw:016x}, commit {commit}, tracked {tracked}")]
    PostApplyChecksum {
        /// As stored; 0 is absent.
        raw: u64,
        /// Pages of the database after the range.
        commit: u32,
        /// Whether the header says that checksums are kept.
        tracked: bool,
    },
    /// A page header has unknown flags, or flags but no page number.
    #[error("page {pgno} flags {flags:#06x}")]
    PageFlags {
        /// Page number as stored.
        pgno: u32,
        /// All flags.
        flags: u16,
    },
    /// A page buffer is not one page long.
    #[error("page buffer of {have} bytes, page size {want}")]
    PageLen {
        /// Length of the buffer.
        have: usize,
        /// Page size of the file.
        want: PageSize,
    },
    /// The page that holds SQLite's locks never enters a file.
    #[error("lock page {pgno}")]
    LockPage {
        /// Its number.
        pgno: Pgno,
    },
    /// Pages are not in ascending order.
    #[error("page {pgno} after page {prev}")]
    PageOrder {
        /// The page before.
        prev: Pgno,
        /// The page that came too late.
        pgno: Pgno,
    },
    /// A page lies beyond the end of the database.
    #[error("page {pgno} past commit {commit}")]
    PastCommit {
        /// The page.
        pgno: Pgno,
        /// Pages of the database after the range.
        commit: u32,
    },
    /// A snapshot lacks a page.
    #[error("snapshot lacks page {want}")]
    SnapshotGap {
        /// First page missing.
        want: u32,
    },
    /// The data of a page is not LZ4.
    #[error("decompress page {pgno}")]
    Decompress {
        /// The page.
        pgno: Pgno,
        /// What LZ4 said.
        source: DecompressError,
    },
    /// The data of a page in the older LZ4 frame form is not LZ4.
    #[error("decompress frame of page {pgno}")]
    Frame {
        /// The page.
        pgno: Pgno,
        /// What LZ4 said.
        source: std::io::Error,
    },
    /// The data of a page is not one page long.
    #[error("page {pgno} has {have} bytes, page size {want}")]
    PageDataLen {
        /// The page.
        pgno: Pgno,
        /// Bytes it decompressed to (at least, in the frame form).
        have: usize,
        /// Page size of the file.
        want: PageSize,
    },
    /// The decoder was finished before its last page was read.
    #[error("pages left after page {after}")]
    PagesLeft {
        /// Last page read; 0 is none.
        after: u32,
    },
    /// The page block does not end where the page index starts.
    #[error("page block ends at {end}, page index starts at {index}")]
    PageBlockEnd {
        /// Offset after the end marker.
        end: usize,
        /// Offset of the index.
        index: usize,
    },
    /// The page index is malformed.
    #[error("page index, {left} bytes before its end")]
    Index {
        /// Bytes of the index from the fault on.
        left: usize,
    },
    /// The page index and the pages disagree.
    #[error("page index does not match page {pgno}")]
    IndexMismatch {
        /// The page.
        pgno: u32,
    },
    /// The file checksum lacks its flag bit.
    #[error("file checksum {raw:016x}")]
    FileChecksumFlag {
        /// As stored.
        raw: u64,
    },
    /// The bytes are not those that were written.
    #[error("file checksum {stored}, computed {computed}")]
    FileChecksum {
        /// As stored.
        stored: Checksum,
        /// Of the bytes read.
        computed: Checksum,
    },
    /// The pages of a snapshot are not those of its post-apply checksum.
    #[error("post-apply checksum {stored}, pages give {computed}")]
    DatabaseChecksum {
        /// As stored.
        stored: Checksum,
        /// Of the pages.
        computed: Checksum,
    },
    /// There was nothing to compact.
    #[error("no inputs")]
    NoInputs,
    /// Inputs differ in page size.
    #[error("page size {have} after {want}")]
    MixedPageSize {
        /// Of this input.
        have: PageSize,
        /// Of the inputs before.
        want: PageSize,
    },
    /// A range does not continue the one before.
    #[error("transactions {min} to {max} after {prev_max}")]
    TxidGap {
        /// Last transaction of the range before.
        prev_max: Txid,
        /// First transaction of the range.
        min: Txid,
        /// Last transaction of the range.
        max: Txid,
    },
    /// A range starts from another database state than the one before ended in.
    #[error("checksum {have} before transaction {min}, expected {want}")]
    ChecksumChain {
        /// First transaction of the range.
        min: Txid,
        /// Its pre-apply checksum.
        have: Checksum,
        /// Post-apply checksum of the range before.
        want: Checksum,
    },
    /// A range grows the database but does not carry every page it adds.
    #[error(
        "transactions up to {max} grow the database from {from} to {to} pages with {have} pages"
    )]
    GrowthGap {
        /// Last transaction of the range.
        max: Txid,
        /// Pages before.
        from: u32,
        /// Pages after.
        to: u32,
        /// New pages carried.
        have: u32,
    },
    /// A name is not that of an LTX file.
    #[error("file name {name:?}")]
    FileName {
        /// Its first characters.
        name: String,
    },
}
