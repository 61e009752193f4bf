//! The wal-index, the `-shm` file: which frame of the log holds which page, shared by all connections through a mapping.
//!
//! Blocks of 32 KiB. Each has a page number for every frame it covers and a hash table over them; the first block
//! gives the room of 34 page numbers to the header, so it covers 4062 frames and every other 4096.
//!
//! | offset in the file | length | field |
//! |---|---|---|
//! | 0, 48 | 48 each | header, twice; valid if the copies are equal and the checksum holds |
//! | 96 | 4 | `nBackfill`: frames already copied into the database |
//! | 100 | 5 × 4 | read marks; 0xffffffff is unused |
//! | 120 | 8 | lock bytes, never read or written (see [`super::locks`]) |
//! | 128 | 4 | `nBackfillAttempted` |
//! | 136 | 4062 × 4 | page number of frames 1..=4062 |
//! | 16384 | 8192 × 2 | hash table of the first block; entry n is the block's nth frame, 0 is empty |
//! | 32768·k | 4096 × 4, 8192 × 2 | block k |
//!
//! Header copy: version 3007000, 4 unused, change counter, `isInit` (1 byte), big-endian checksums (1), page size
//! (2; 1 is 65536, 0 is unknown yet), `mxFrame`, pages in the database, checksum of frame `mxFrame` (8), salts (8, as in the log), checksum
//! of the 40 bytes before (8). Numbers are of the machine's byte order, but for the salts. Source: `wal.c`.
//!
//! Who may write: the holder of the WAL write lock appends and publishes; of the checkpoint lock, `nBackfill`; of a read
//! lock, exclusively, that read mark. A reader sees nothing past `mxFrame` of the header it read (INV-WAL-2), so hash
//! entries are stored first, then the header, second copy before first, with barriers between.

use std::io;
use std::ops::Range;

use super::wal::{ByteOrder, WalChecksum, WalHeader, WalSalts};
use crate::ltx::{PageSize, Pgno};

/// Length of a block in bytes; the file has a whole number of them.
pub const BLOCK_LEN: usize = 32768;

/// Length of one copy of the header in bytes.
pub const HEADER_LEN: usize = 48;

/// Read marks there are, and read locks.
pub const READ_MARK_COUNT: usize = 5;

/// A read mark that no reader uses.
pub const READ_MARK_UNUSED: u32 = 0xffff_ffff;

/// The only version of the format there is.
pub const WAL_INDEX_VERSION: u32 = 3_007_000;

/// Frames of every block but the first.
pub const BLOCK_FRAMES: u32 = 4096;

/// Frames of the first block.
pub const FIRST_BLOCK_FRAMES: u32 = 4062;

/// Slots of a hash table: twice the frames, so a probe always ends.
pub const HASH_SLOTS: u32 = 8192;

const BACKFILL_AT: usize = 96;
const READ_MARK_AT: usize = 100;
const BACKFILL_ATTEMPTED_AT: usize = 128;
const PREFIX_LEN: usize = 136;
const HASH_AT: usize = BLOCK_FRAMES as usize * 4;
const HASH_FACTOR: u32 = 383;
const SUMMED_HEADER_LEN: usize = 40;

const _: () = assert!(HASH_AT + HASH_SLOTS as usize * 2 == BLOCK_LEN);
const _: () = assert!(2 * HEADER_LEN == BACKFILL_AT && BACKFILL_AT + 4 == READ_MARK_AT);
const _: () = assert!(READ_MARK_AT + READ_MARK_COUNT * 4 == 120);
const _: () = assert!(BACKFILL_ATTEMPTED_AT == 120 + 8 && BACKFILL_ATTEMPTED_AT + 8 == PREFIX_LEN);
const _: () = assert!(FIRST_BLOCK_FRAMES as usize * 4 + PREFIX_LEN == HASH_AT);
const _: () = assert!(HASH_SLOTS == 2 * BLOCK_FRAMES && HASH_SLOTS.is_power_of_two());

/// Shared memory, as SQLite's connections map it.
///
/// Offsets are within the length that `ensure_len` granted, numbers aligned and of the machine's byte order. `u16` and `u32`
/// accesses must be single, so that a reader never sees half of one; the longer copies need not be.
pub trait Shm {
    /// Returns the bytes mapped.
    fn len(&self) -> u64;
    /// Tells whether nothing is mapped.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Makes at least `len` bytes accessible; new ones are zero.
    /// # Errors
    /// If the file cannot grow or be mapped.
    fn ensure_len(&mut self, len: u64) -> io::Result<()>;
    /// Loads a `u16`.
    fn load_u16(&self, offset: usize) -> u16;
    /// Stores a `u16`.
    fn store_u16(&mut self, offset: usize, value: u16);
    /// Loads a `u32`.
    fn load_u32(&self, offset: usize) -> u32;
    /// Stores a `u32`.
    fn store_u32(&mut self, offset: usize, value: u32);
    /// Copies bytes out of the memory.
    fn copy_out(&self, offset: usize, to: &mut [u8]);
    /// Copies bytes into the memory.
    fn copy_in(&mut self, offset: usize, from: &[u8]);
    /// Zeroes a range.
    fn zero(&mut self, range: Range<usize>);
    /// Keeps accesses before the call before those after it, for every processor.
    fn barrier(&self);
}

/// Why a wal-index cannot be used as it is; SQLite would rebuild it from the log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WalIndexError {
    /// Fewer bytes than two headers have.
    #[error("wal-index has {len} bytes")]
    Short {
        /// Bytes there were.
        len: u64,
    },
    /// The two copies differ: the header is being written, or its writer died.
    #[error("wal-index header copies differ")]
    Torn,
    /// Nobody initialised it yet.
    #[error("wal-index is not initialised")]
    Uninitialised,
    /// The checksum does not hold.
    #[error("wal-index header checksum does not match")]
    Checksum,
    /// A version from the future.
    #[error("wal-index version is {found}, not {WAL_INDEX_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Not a page size.
    #[error("wal-index page size is {found}")]
    PageSize {
        /// The two bytes found.
        found: u16,
    },
    /// A hash table has no free slot, so no probe of it would end.
    #[error("wal-index hash table of block {block} is full")]
    HashFull {
        /// Block, from 0.
        block: u32,
    },
    /// The memory could not grow.
    #[error("grow wal-index")]
    Grow(#[source] io::Error),
}

/// The header of a wal-index: how far the log is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalIndexHeader {
    /// Grows with each transaction; connections drop their page cache when it moved.
    pub change: u32,
    /// Set once the header means something.
    pub is_init: bool,
    /// Byte order of the log's checksums.
    pub big_end_cksum: bool,
    /// Page size in bytes; none if SQLite made the index before the log had a header.
    pub page_size: Option<PageSize>,
    /// Last committed frame; 0 is an empty log.
    pub mx_frame: u32,
    /// Pages in the database.
    pub n_page: u32,
    /// Running checksum of frame `mx_frame`, or of the log's header.
    pub frame_checksum: WalChecksum,
    /// The log's salts.
    pub salts: WalSalts,
}

impl WalIndexHeader {
    /// Makes the header of an index over an empty log.
    #[must_use]
    pub fn of_empty(wal: &WalHeader, n_page: u32) -> WalIndexHeader {
        WalIndexHeader {
            change: 0,
            is_init: true,
            big_end_cksum: wal.order == ByteOrder::Big,
            page_size: Some(wal.page_size),
            mx_frame: 0,
            n_page,
            frame_checksum: wal.checksum(),
            salts: wal.salts,
        }
    }

    /// Encodes one copy of the header, with version and checksum.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        self.encode_as(WAL_INDEX_VERSION)
    }

    /// Encodes one copy of a header that every SQLite refuses with `SQLITE_CANTOPEN`, and none takes for a damaged one, which
    /// it would mend.
    #[must_use]
    pub fn encode_to_be_refused(&self) -> [u8; HEADER_LEN] {
        self.encode_as(u32::MAX)
    }

    fn encode_as(&self, version: u32) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let page_size = self.page_size.map_or(0, encode_page_size).to_ne_bytes();
        let mut put = |at: usize, word: u32| {
            bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        };
        put(0, version);
        put(8, self.change);
        put(16, self.mx_frame);
        put(20, self.n_page);
        put(24, self.frame_checksum.0);
        put(28, self.frame_checksum.1);
        bytes[12] = u8::from(self.is_init);
        bytes[13] = u8::from(self.big_end_cksum);
        bytes[14..16].copy_from_slice(&page_size);
        bytes[32..40].copy_from_slice(&self.salts.encode());
        let sum = WalChecksum::default().update(ByteOrder::NATIVE, &bytes[..SUMMED_HEADER_LEN]);
        bytes[40..44].copy_from_slice(&sum.0.to_ne_bytes());
        bytes[44..].copy_from_slice(&sum.1.to_ne_bytes());
        bytes
    }

    /// Decodes one copy of the header.
    /// # Errors
    /// `Uninitialised`, `Checksum`, `Version` or `PageSize`.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<WalIndexHeader, WalIndexError> {
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if bytes[12] == 0 {
            return Err(WalIndexError::Uninitialised);
        }
        let sum = WalChecksum::default().update(ByteOrder::NATIVE, &bytes[..SUMMED_HEADER_LEN]);
        if sum != WalChecksum(word(40), word(44)) {
            return Err(WalIndexError::Checksum);
        }
        if word(0) != WAL_INDEX_VERSION {
            return Err(WalIndexError::Version { found: word(0) });
        }
        let found = u16::from_ne_bytes([bytes[14], bytes[15]]);
        let page_size = decode_page_size(found);
        if page_size.is_none() && found != 0 {
            return Err(WalIndexError::PageSize { found });
        }
        let [_, _, _, _, salts, _] = bytes.as_chunks::<8>().0 else {
            unreachable!("48 bytes are six times 8");
        };
        Ok(WalIndexHeader {
            change: word(8),
            is_init: true,
            big_end_cksum: bytes[13] != 0,
            page_size,
            mx_frame: word(16),
            n_page: word(20),
            frame_checksum: WalChecksum(word(24), word(28)),
            salts: WalSalts::decode(*salts),
        })
    }

    /// Decodes both copies, which must be equal: the first 96 bytes of the file.
    /// # Errors
    /// `Short`, `Torn`, or as [`WalIndexHeader::decode`].
    pub fn decode_copies(bytes: &[u8]) -> Result<WalIndexHeader, WalIndexError> {
        let (copies, _) = bytes.as_chunks::<HEADER_LEN>();
        match copies {
            [first, second, ..] if first == second => WalIndexHeader::decode(first),
            [_, _, ..] => Err(WalIndexError::Torn),
            _ => Err(WalIndexError::Short {
                len: bytes.len() as u64,
            }),
        }
    }
}

/// Returns the length of an index over `mx_frame` frames, in bytes; an empty log has one block too.
#[must_use]
pub const fn index_len(mx_frame: u32) -> u64 {
    let block = if mx_frame == 0 { 0 } else { block_of(mx_frame) };
    (block as u64 + 1) * BLOCK_LEN as u64
}

/// Returns the first block of an index without frames, as SQLite rebuilds it for an empty WAL.
#[must_use]
pub fn fresh_block(header: &WalIndexHeader) -> Vec<u8> {
    let mut block = vec![0; BLOCK_LEN];
    let bytes = header.encode();
    block[..HEADER_LEN].copy_from_slice(&bytes);
    block[HEADER_LEN..2 * HEADER_LEN].copy_from_slice(&bytes);
    for slot in 1..READ_MARK_COUNT {
        let at = READ_MARK_AT + slot * 4;
        block[at..at + 4].copy_from_slice(&READ_MARK_UNUSED.to_ne_bytes());
    }
    block
}

/// Reads from the file of a wal-index which pages the frames `first..=last` are of, in their order.
///
/// They must be committed, and the WAL not reset meanwhile. `None` if the file does not have them.
#[must_use]
pub fn read_pages(file: &std::fs::File, first: u32, last: u32) -> Option<Vec<Pgno>> {
    use std::os::unix::fs::FileExt;
    let mut pages = Vec::with_capacity(last.checked_sub(first)? as usize + 1);
    let mut next = first;
    while next <= last {
        let until = last.min(frames_before(block_of(next) + 1));
        let mut bytes = vec![0; (until - next + 1) as usize * 4];
        file.read_exact_at(&mut bytes, page_at(next) as u64).ok()?;
        for bytes in bytes.as_chunks::<4>().0 {
            pages.push(Pgno::new(u32::from_ne_bytes(*bytes))?);
        }
        next = until + 1;
    }
    Some(pages)
}

/// A wal-index over shared memory.
///
/// Stateless: what it knows lies in the memory. Which lock must be held is said at each method.
#[derive(Debug)]
pub struct WalIndex<S> {
    shm: S,
}

impl<S: Shm> WalIndex<S> {
    /// Wraps shared memory of any length and content.
    pub const fn new(shm: S) -> WalIndex<S> {
        WalIndex { shm }
    }

    /// Returns the memory.
    pub const fn shm(&self) -> &S {
        &self.shm
    }

    /// Gives the memory back.
    pub fn into_shm(self) -> S {
        self.shm
    }

    /// Reads the header as a reader does: first copy, barrier, second copy.
    /// # Errors
    /// As [`WalIndexHeader::decode_copies`]; `Torn` is worth another try.
    pub fn header(&self) -> Result<WalIndexHeader, WalIndexError> {
        let mut bytes = [0; 2 * HEADER_LEN];
        if self.shm.len() < bytes.len() as u64 {
            return Err(WalIndexError::Short {
                len: self.shm.len(),
            });
        }
        let (first, second) = bytes.split_at_mut(HEADER_LEN);
        self.shm.copy_out(0, first);
        self.shm.barrier();
        self.shm.copy_out(HEADER_LEN, second);
        WalIndexHeader::decode_copies(&bytes)
    }

    /// Publishes a header: second copy, barrier, first copy. Needs the write lock; frames up to `mx_frame` are appended.
    /// # Errors
    /// `Grow`.
    pub fn publish(&mut self, header: &WalIndexHeader) -> Result<(), WalIndexError> {
        self.ensure_block(0)?;
        let bytes = header.encode();
        self.shm.barrier();
        self.shm.copy_in(HEADER_LEN, &bytes);
        self.shm.barrier();
        self.shm.copy_in(0, &bytes);
        self.shm.barrier();
        Ok(())
    }

    /// Makes the header one that no reader takes for valid, until the next [`publish`](Self::publish).
    pub fn invalidate(&mut self) {
        self.shm.zero(0..HEADER_LEN);
        self.shm.barrier();
    }

    /// Builds the whole index from nothing, as recovery does: frame 1 holds the first of `pages`.
    ///
    /// Needs the write, checkpoint and recover lock, and every read lock, for read marks are set too.
    /// `header.mx_frame` is overwritten with the number of pages.
    /// # Errors
    /// `Grow`.
    pub fn build(
        &mut self,
        pages: impl IntoIterator<Item = Pgno>,
        header: &WalIndexHeader,
    ) -> Result<WalIndexHeader, WalIndexError> {
        let mut mx_frame = 0;
        for pgno in pages {
            mx_frame += 1;
            self.append(mx_frame, pgno)?;
        }
        let header = WalIndexHeader {
            mx_frame,
            ..*header
        };
        self.publish(&header)?;
        self.set_backfill(0);
        self.set_backfill_attempted(mx_frame);
        self.set_read_mark(0, 0);
        self.set_read_mark(
            1,
            if mx_frame == 0 {
                READ_MARK_UNUSED
            } else {
                mx_frame
            },
        );
        for slot in 2..READ_MARK_COUNT {
            self.set_read_mark(slot, READ_MARK_UNUSED);
        }
        Ok(header)
    }

    /// Enters a frame that was written to the log. Needs the write lock; frame numbers come in order.
    ///
    /// No reader finds it before a header with `mx_frame >= frame_no` is published. What a writer that died left at and
    /// past `frame_no` in its block is cleaned first.
    /// # Errors
    /// `Grow`, or `HashFull` for a table with garbage in it.
    pub fn append(&mut self, frame_no: u32, pgno: Pgno) -> Result<(), WalIndexError> {
        assert!(frame_no > 0, "frames count from 1");
        let block = block_of(frame_no);
        let nth = nth_in_block(frame_no);
        self.ensure_block(block)?;
        if nth == 1 {
            self.zero_block(block);
        } else if self.shm.load_u32(page_at(frame_no)) != 0 {
            self.truncate_hash_to(frame_no - 1);
        }
        let mut slot = hash_of(pgno);
        for _ in 0..HASH_SLOTS {
            if self.shm.load_u16(slot_at(block, slot)) == 0 {
                self.shm.store_u32(page_at(frame_no), pgno.get());
                self.shm.store_u16(slot_at(block, slot), nth);
                return Ok(());
            }
            slot = next_slot(slot);
        }
        Err(WalIndexError::HashFull { block })
    }

    /// Finds the last frame up to `mx_frame` that holds a page, as SQLite's readers do.
    /// # Errors
    /// `HashFull` for a table with garbage in it; `Short` if the memory lacks a block that `mx_frame` needs.
    pub fn find(&self, pgno: Pgno, mx_frame: u32) -> Result<Option<u32>, WalIndexError> {
        if mx_frame == 0 {
            return Ok(None);
        }
        if self.shm.len() < index_len(mx_frame) {
            return Err(WalIndexError::Short {
                len: self.shm.len(),
            });
        }
        for block in (0..=block_of(mx_frame)).rev() {
            if let Some(frame_no) = self.find_in_block(block, pgno, mx_frame)? {
                return Ok(Some(frame_no));
            }
        }
        Ok(None)
    }

    fn find_in_block(
        &self,
        block: u32,
        pgno: Pgno,
        mx_frame: u32,
    ) -> Result<Option<u32>, WalIndexError> {
        let (mut slot, mut found) = (hash_of(pgno), None);
        for _ in 0..HASH_SLOTS {
            let nth = self.shm.load_u16(slot_at(block, slot));
            if nth == 0 {
                return Ok(found);
            }
            let frame_no = frames_before(block).saturating_add(u32::from(nth));
            // Later frames of a page lie further along its probe, so the last one met is the newest.
            if frame_no <= mx_frame
                && block_of(frame_no) == block
                && self.shm.load_u32(page_at(frame_no)) == pgno.get()
            {
                found = Some(frame_no);
            }
            slot = next_slot(slot);
        }
        Err(WalIndexError::HashFull { block })
    }

    /// Returns the page of a frame, as it was entered.
    #[must_use]
    pub fn page_of(&self, frame_no: u32) -> Option<Pgno> {
        if frame_no == 0 || self.shm.len() < index_len(frame_no) {
            return None;
        }
        Pgno::new(self.shm.load_u32(page_at(frame_no)))
    }

    /// Forgets the frames after `mx_frame` in its block, after a rollback or the death of a writer. Needs the write lock.
    ///
    /// Later blocks are zeroed when their first frame is appended; an empty log (0) needs nothing for the same reason.
    pub fn truncate_hash_to(&mut self, mx_frame: u32) {
        if mx_frame == 0 || self.shm.len() < index_len(mx_frame) {
            return;
        }
        let (block, last) = (block_of(mx_frame), nth_in_block(mx_frame));
        for slot in 0..HASH_SLOTS {
            if self.shm.load_u16(slot_at(block, slot)) > last {
                self.shm.store_u16(slot_at(block, slot), 0);
            }
        }
        self.shm
            .zero(page_at(mx_frame) + 4..block_at(block) + HASH_AT);
    }

    /// Restarts the log: publishes an empty one with new salts, and frees the read marks.
    ///
    /// Needs the write lock, read locks 1 to 4 exclusively, and `backfill() == mx_frame`. The log's header with the new salts is
    /// written before the next frame. Returns what was published.
    /// # Errors
    /// `Grow`.
    pub fn restart(
        &mut self,
        header: &WalIndexHeader,
        random: u32,
    ) -> Result<WalIndexHeader, WalIndexError> {
        let salts = header.salts.restarted(random);
        let header = WalIndexHeader {
            mx_frame: 0,
            salts,
            ..*header
        };
        self.publish(&header)?;
        self.set_backfill(0);
        self.set_backfill_attempted(0);
        self.set_read_mark(1, 0);
        for slot in 2..READ_MARK_COUNT {
            self.set_read_mark(slot, READ_MARK_UNUSED);
        }
        Ok(header)
    }

    /// Returns how many frames are copied into the database.
    pub fn backfill(&self) -> u32 {
        self.word(BACKFILL_AT)
    }

    /// Sets how many frames are copied into the database. Needs the checkpoint lock.
    pub fn set_backfill(&mut self, frame_no: u32) {
        self.shm.store_u32(BACKFILL_AT, frame_no);
    }

    /// Returns how many frames a checkpoint set out to copy.
    pub fn backfill_attempted(&self) -> u32 {
        self.word(BACKFILL_ATTEMPTED_AT)
    }

    /// Sets how many frames a checkpoint sets out to copy, before it does. Needs the checkpoint lock.
    pub fn set_backfill_attempted(&mut self, frame_no: u32) {
        self.shm.store_u32(BACKFILL_ATTEMPTED_AT, frame_no);
    }

    /// Returns a read mark.
    pub fn read_mark(&self, slot: usize) -> u32 {
        assert!(slot < READ_MARK_COUNT, "read mark {slot}");
        self.word(READ_MARK_AT + slot * 4)
    }

    /// Sets a read mark. Needs that read lock, exclusively.
    pub fn set_read_mark(&mut self, slot: usize, frame_no: u32) {
        assert!(slot < READ_MARK_COUNT, "read mark {slot}");
        self.shm.store_u32(READ_MARK_AT + slot * 4, frame_no);
    }

    /// Loads a word of the checkpoint info; memory not there yet reads as zero.
    fn word(&self, at: usize) -> u32 {
        if self.shm.len() < PREFIX_LEN as u64 {
            0
        } else {
            self.shm.load_u32(at)
        }
    }

    fn ensure_block(&mut self, block: u32) -> Result<(), WalIndexError> {
        let len = (u64::from(block) + 1) * BLOCK_LEN as u64;
        if self.shm.len() < len {
            self.shm.ensure_len(len).map_err(WalIndexError::Grow)?;
        }
        Ok(())
    }

    /// Zeroes a block's page numbers and hash table.
    fn zero_block(&mut self, block: u32) {
        let start = block_at(block) + if block == 0 { PREFIX_LEN } else { 0 };
        self.shm.zero(start..block_at(block) + BLOCK_LEN);
    }
}

/// Returns the block that covers a frame, both from 0 and 1.
const fn block_of(frame_no: u32) -> u32 {
    if frame_no <= FIRST_BLOCK_FRAMES {
        0
    } else {
        (frame_no - FIRST_BLOCK_FRAMES - 1) / BLOCK_FRAMES + 1
    }
}

/// Returns how many frames the blocks before this one cover.
const fn frames_before(block: u32) -> u32 {
    if block == 0 {
        0
    } else {
        FIRST_BLOCK_FRAMES + (block - 1) * BLOCK_FRAMES
    }
}

/// Returns which of its block's frames a frame is, from 1.
#[expect(
    clippy::cast_possible_truncation,
    reason = "at most BLOCK_FRAMES, which is 4096"
)]
const fn nth_in_block(frame_no: u32) -> u16 {
    (frame_no - frames_before(block_of(frame_no))) as u16
}

const fn block_at(block: u32) -> usize {
    block as usize * BLOCK_LEN
}

/// Returns where the page number of a frame lies. The first block's begin 34 words late, which are the 34 frames it lacks.
const fn page_at(frame_no: u32) -> usize {
    let prefix = if block_of(frame_no) == 0 {
        PREFIX_LEN
    } else {
        0
    };
    block_at(block_of(frame_no)) + prefix + (nth_in_block(frame_no) as usize - 1) * 4
}

const fn slot_at(block: u32, slot: u32) -> usize {
    block_at(block) + HASH_AT + slot as usize * 2
}

const fn hash_of(pgno: Pgno) -> u32 {
    pgno.get().wrapping_mul(HASH_FACTOR) & (HASH_SLOTS - 1)
}

const fn next_slot(slot: u32) -> u32 {
    (slot + 1) & (HASH_SLOTS - 1)
}

/// Encodes a page size in two bytes: the lowest bit, which no page size has, stands for 65536.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the high half is what the low bit carries"
)]
const fn encode_page_size(page_size: PageSize) -> u16 {
    (page_size.get() | page_size.get() >> 16) as u16
}

fn decode_page_size(n: u16) -> Option<PageSize> {
    PageSize::new(if n == 1 { 65536 } else { u32::from(n) })
}

/// Memory of this process alone, for tests and for building an index before it is shared.
impl Shm for Vec<u8> {
    fn len(&self) -> u64 {
        Vec::len(self) as u64
    }

    fn ensure_len(&mut self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        if Vec::len(self) < len {
            self.resize(len, 0);
        }
        Ok(())
    }

    fn load_u16(&self, offset: usize) -> u16 {
        u16::from_ne_bytes([self[offset], self[offset + 1]])
    }

    fn store_u16(&mut self, offset: usize, value: u16) {
        self[offset..offset + 2].copy_from_slice(&value.to_ne_bytes());
    }

    fn load_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.copy_out(offset, &mut bytes);
        u32::from_ne_bytes(bytes)
    }

    fn store_u32(&mut self, offset: usize, value: u32) {
        self.copy_in(offset, &value.to_ne_bytes());
    }

    fn copy_out(&self, offset: usize, to: &mut [u8]) {
        to.copy_from_slice(&self[offset..offset + to.len()]);
    }

    fn copy_in(&mut self, offset: usize, from: &[u8]) {
        self[offset..offset + from.len()].copy_from_slice(from);
    }

    fn zero(&mut self, range: Range<usize>) {
        self[range].fill(0);
    }

    fn barrier(&self) {}
}

#[cfg(test)]
#[path = "wal_index_tests.rs"]
mod tests;
