//! The write-ahead log: one header, then frames, each a page.
//!
//! Header, 32 bytes (version 3007000):
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 4 | 0x377f0682, or 0x377f0683 if checksums read words big-endian |
//! | 4 | 4 | version |
//! | 8 | 4 | page size |
//! | 12 | 4 | checkpoint sequence: how often the log was restarted |
//! | 16 | 8 | two salts |
//! | 24 | 8 | checksum of bytes 0..24 |
//!
//! Frame header, 24 bytes, then the page:
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 4 | page number |
//! | 4 | 4 | pages in the database after the commit; 0 if not a commit |
//! | 8 | 8 | the log's salts |
//! | 16 | 8 | running checksum over header, and bytes 0..8 and the page of every frame so far |
//!
//! All numbers are big-endian. A frame counts only if its salts are the log's, its running checksum holds, and all frames
//! before it count; a transaction counts only up to a commit frame (INV-WAL-1). The first frame that does not
//! count ends the log, whatever follows. Source: SQLite file format, "The WAL File Format"; `wal.c`.

use super::be32;
use crate::ltx::{PageSize, Pgno};

/// Length of the log's header in bytes.
pub const WAL_HEADER_LEN: usize = 32;

/// Length of a frame's header in bytes.
pub const WAL_FRAME_HEADER_LEN: usize = 24;

/// The only version of the format there is.
pub const WAL_VERSION: u32 = 3_007_000;

/// The header's first word, without the bit that tells the checksum's byte order.
const WAL_MAGIC: u32 = 0x377f_0682;

/// Bytes of each header that the checksum covers.
const SUMMED_WAL_HEADER_LEN: usize = 24;
const SUMMED_FRAME_HEADER_LEN: usize = 8;

const _: () = assert!(SUMMED_WAL_HEADER_LEN + 8 == WAL_HEADER_LEN);
const _: () = assert!(SUMMED_WAL_HEADER_LEN.is_multiple_of(8));

/// Why bytes are not a WAL header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WalHeaderError {
    /// Fewer bytes than a header has; an empty file is an empty log.
    #[error("wal header has {len} of {WAL_HEADER_LEN} bytes")]
    Short {
        /// Bytes there were.
        len: usize,
    },
    /// Neither of the two magic numbers.
    #[error("wal magic is {found:#010x}")]
    Magic {
        /// The first word.
        found: u32,
    },
    /// A version from the future.
    #[error("wal version is {found}, not {WAL_VERSION}")]
    Version {
        /// The second word.
        found: u32,
    },
    /// Not a page size.
    #[error("wal page size is {found}")]
    PageSize {
        /// The third word.
        found: u32,
    },
    /// The header was torn, or is being written.
    #[error("wal header checksum does not match")]
    Checksum,
}

/// The two numbers that tell the frames of this log from those of the log it overwrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WalSalts(pub u32, pub u32);

impl WalSalts {
    /// Encodes the salts as they lie in WAL header, frame and wal-index.
    #[must_use]
    pub fn encode(self) -> [u8; 8] {
        pair_to_bytes(self.0, self.1)
    }

    /// Decodes the salts.
    #[must_use]
    pub fn decode(bytes: [u8; 8]) -> WalSalts {
        let (a, b) = pair_from_bytes(bytes);
        WalSalts(a, b)
    }

    /// Returns the salts of the log after a restart: the first counts up, the second is random.
    #[must_use]
    pub const fn restarted(self, random: u32) -> WalSalts {
        WalSalts(self.0.wrapping_add(1), random)
    }
}

/// SQLite's running checksum of a WAL; an LTX checksum is another type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct WalChecksum(pub u32, pub u32);

impl WalChecksum {
    /// Continues the checksum over `bytes`, which come in pairs of words; a tail shorter than 8 bytes is not summed.
    #[must_use]
    pub fn update(self, order: ByteOrder, bytes: &[u8]) -> WalChecksum {
        debug_assert!(bytes.len().is_multiple_of(8), "{} bytes", bytes.len());
        match order {
            ByteOrder::Little => self.sum(bytes, u64::from_le_bytes, |pair| {
                #[expect(clippy::cast_possible_truncation, reason = "splits a pair of words")]
                (pair as u32, (pair >> 32) as u32)
            }),
            ByteOrder::Big => self.sum(bytes, u64::from_be_bytes, |pair| {
                #[expect(clippy::cast_possible_truncation, reason = "splits a pair of words")]
                ((pair >> 32) as u32, pair as u32)
            }),
        }
    }

    /// One 8-byte load a step; additions are grouped so that only two of them wait for the step before.
    #[inline(always)]
    fn sum(
        self,
        bytes: &[u8],
        load: impl Fn([u8; 8]) -> u64,
        split: impl Fn(u64) -> (u32, u32),
    ) -> WalChecksum {
        let WalChecksum(mut a, mut b) = self;
        let (pairs, _) = bytes.as_chunks::<8>();
        for pair in pairs {
            let (x, y) = split(load(*pair));
            a = a.wrapping_add(x).wrapping_add(b);
            b = b.wrapping_add(y).wrapping_add(a);
        }
        WalChecksum(a, b)
    }

    /// Encodes the checksum as it lies in WAL header and frame: big-endian, whatever its byte order.
    #[must_use]
    pub fn encode(self) -> [u8; 8] {
        pair_to_bytes(self.0, self.1)
    }

    /// Decodes a checksum of a WAL header or frame.
    #[must_use]
    pub fn decode(bytes: [u8; 8]) -> WalChecksum {
        let (a, b) = pair_from_bytes(bytes);
        WalChecksum(a, b)
    }
}

/// In which byte order the checksum reads its words: that of the machine which began the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ByteOrder {
    /// Magic 0x377f0682.
    Little,
    /// Magic 0x377f0683.
    Big,
}

impl ByteOrder {
    /// The order of this machine, which SQLite uses for logs it begins.
    pub const NATIVE: ByteOrder = if cfg!(target_endian = "big") {
        ByteOrder::Big
    } else {
        ByteOrder::Little
    };
}

/// The header of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalHeader {
    /// Byte order of the checksums.
    pub order: ByteOrder,
    /// Page size in bytes.
    pub page_size: PageSize,
    /// How often the log was restarted.
    pub checkpoint_seq: u32,
    /// Salts every frame must repeat.
    pub salts: WalSalts,
}

impl WalHeader {
    /// Encodes the header with its checksum.
    #[must_use]
    pub fn encode(&self) -> [u8; WAL_HEADER_LEN] {
        let mut bytes = [0; WAL_HEADER_LEN];
        let magic = WAL_MAGIC | u32::from(self.order == ByteOrder::Big);
        let words = [
            magic,
            WAL_VERSION,
            self.page_size.get(),
            self.checkpoint_seq,
        ];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_be_bytes());
        }
        bytes[16..24].copy_from_slice(&self.salts.encode());
        let sum = WalChecksum::default().update(self.order, &bytes[..SUMMED_WAL_HEADER_LEN]);
        bytes[24..].copy_from_slice(&sum.encode());
        bytes
    }

    /// Decodes the first 32 bytes of a log.
    /// # Errors
    /// In SQLite's order of checks: short, magic, page size, checksum, version. All but `Version` mean an empty log to SQLite.
    pub fn decode(bytes: &[u8]) -> Result<WalHeader, WalHeaderError> {
        let len = bytes.len();
        let bytes: &[u8; WAL_HEADER_LEN] =
            bytes.first_chunk().ok_or(WalHeaderError::Short { len })?;
        let word = |at: usize| be32(bytes, at).unwrap_or(0);
        let order = match word(0) {
            WAL_MAGIC => ByteOrder::Little,
            found if found == WAL_MAGIC | 1 => ByteOrder::Big,
            found => return Err(WalHeaderError::Magic { found }),
        };
        let found = word(8);
        let page_size = PageSize::new(found).ok_or(WalHeaderError::PageSize { found })?;
        let sum = WalChecksum::default().update(order, &bytes[..SUMMED_WAL_HEADER_LEN]);
        if sum != WalChecksum(word(24), word(28)) {
            return Err(WalHeaderError::Checksum);
        }
        if word(4) != WAL_VERSION {
            return Err(WalHeaderError::Version { found: word(4) });
        }
        let salts = WalSalts(word(16), word(20));
        Ok(WalHeader {
            order,
            page_size,
            checkpoint_seq: word(12),
            salts,
        })
    }

    /// Returns the checksum from which that of the first frame runs on.
    #[must_use]
    pub fn checksum(&self) -> WalChecksum {
        let bytes = self.encode();
        WalChecksum::default().update(self.order, &bytes[..SUMMED_WAL_HEADER_LEN])
    }

    /// Returns the place before the first frame.
    #[must_use]
    pub fn start(&self) -> WalCursor {
        WalCursor {
            frame_no: 0,
            checksum: self.checksum(),
        }
    }
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalFrameHeader {
    /// The page in the frame.
    pub pgno: Pgno,
    /// Pages in the database after the transaction, on its last frame; else 0.
    pub commit: u32,
    /// The log's salts.
    pub salts: WalSalts,
    /// Running checksum up to and with this frame.
    pub checksum: WalChecksum,
}

impl WalFrameHeader {
    /// Makes the header of the frame after `before`, with the checksum carried over `data`.
    #[must_use]
    pub fn next(
        wal: &WalHeader,
        before: WalChecksum,
        pgno: Pgno,
        commit: u32,
        data: &[u8],
    ) -> WalFrameHeader {
        debug_assert_eq!(data.len(), wal.page_size.len());
        let summed = pair_to_bytes(pgno.get(), commit);
        let checksum = before.update(wal.order, &summed).update(wal.order, data);
        WalFrameHeader {
            pgno,
            commit,
            salts: wal.salts,
            checksum,
        }
    }

    /// Encodes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; WAL_FRAME_HEADER_LEN] {
        let mut bytes = [0; WAL_FRAME_HEADER_LEN];
        bytes[..8].copy_from_slice(&pair_to_bytes(self.pgno.get(), self.commit));
        bytes[8..16].copy_from_slice(&self.salts.encode());
        bytes[16..].copy_from_slice(&self.checksum.encode());
        bytes
    }

    /// Decodes a frame's first 24 bytes, or gives nothing for page 0. The checksum is not checked here.
    #[must_use]
    pub fn decode(bytes: &[u8; WAL_FRAME_HEADER_LEN]) -> Option<WalFrameHeader> {
        let [page, salts, checksum] = frame_header_parts(bytes);
        let (pgno, commit) = pair_from_bytes(page);
        Some(WalFrameHeader {
            pgno: Pgno::new(pgno)?,
            commit,
            salts: WalSalts::decode(salts),
            checksum: WalChecksum::decode(checksum),
        })
    }
}

/// Returns the length of a frame, header and page, in bytes.
#[must_use]
pub const fn frame_len(page_size: PageSize) -> u64 {
    WAL_FRAME_HEADER_LEN as u64 + page_size.get() as u64
}

/// Returns where a frame begins in the log, in bytes. Frames count from 1; after the last frame it is the log's end.
#[must_use]
pub const fn frame_offset(page_size: PageSize, frame_no: u32) -> u64 {
    debug_assert!(frame_no > 0);
    WAL_HEADER_LEN as u64 + (frame_no as u64).saturating_sub(1) * frame_len(page_size)
}

/// A place between two frames: all that is needed to go on from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WalCursor {
    /// The last frame passed; 0 is the log's start.
    pub frame_no: u32,
    /// Running checksum up to and with that frame.
    pub checksum: WalChecksum,
}

impl WalCursor {
    /// Returns where the next frame begins in the log, in bytes.
    #[must_use]
    pub const fn offset(&self, page_size: PageSize) -> u64 {
        WAL_HEADER_LEN as u64 + self.frame_no as u64 * frame_len(page_size)
    }
}

/// A frame that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalFrame<'a> {
    /// Number in the log, from 1.
    pub frame_no: u32,
    /// The header, checked.
    pub header: WalFrameHeader,
    /// The page, `page_size` bytes.
    pub data: &'a [u8],
}

/// Why a reader gives no further frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WalEnd {
    /// The bytes end where a frame ends.
    Bytes,
    /// The bytes end within a frame; more of the file may hold the rest.
    PartialFrame {
        /// Bytes of the frame there were.
        len: usize,
    },
    /// The frame is left from an earlier round of the log.
    Salts,
    /// The frame was torn, or is being written.
    Checksum,
    /// The frame names page 0.
    Pgno,
    /// Frames are numbered with 32 bits.
    FrameNo,
}

/// Walks the frames of a log, from any cursor, and stops for good at the first that does not count.
///
/// The bytes are those of the log from `cursor.offset(page_size)` on, as many as the caller has. A reader that ended
/// with [`WalEnd::PartialFrame`] or [`WalEnd::Bytes`] may be made anew from a cursor and more bytes.
#[derive(Debug, Clone)]
pub struct WalReader<'a> {
    header: WalHeader,
    cursor: WalCursor,
    bytes: &'a [u8],
    end: Option<WalEnd>,
}

impl<'a> WalReader<'a> {
    /// Makes a reader of the frames that follow `cursor`.
    #[must_use]
    pub const fn new(header: WalHeader, cursor: WalCursor, bytes: &'a [u8]) -> WalReader<'a> {
        WalReader {
            header,
            cursor,
            bytes,
            end: None,
        }
    }

    /// Makes a reader of a whole log, header included.
    /// # Errors
    /// As [`WalHeader::decode`].
    pub fn of_file(bytes: &'a [u8]) -> Result<WalReader<'a>, WalHeaderError> {
        let header = WalHeader::decode(bytes)?;
        Ok(WalReader::new(
            header,
            header.start(),
            &bytes[WAL_HEADER_LEN..],
        ))
    }

    /// Returns the log's header.
    #[must_use]
    pub const fn header(&self) -> &WalHeader {
        &self.header
    }

    /// Returns the place after the last frame given.
    #[must_use]
    pub const fn cursor(&self) -> WalCursor {
        self.cursor
    }

    /// Returns why there is no further frame, once there is none.
    #[must_use]
    pub const fn end(&self) -> Option<WalEnd> {
        self.end
    }

    /// Gives the next frame, committed or not.
    pub fn next_frame(&mut self) -> Option<WalFrame<'a>> {
        if self.end.is_some() {
            return None;
        }
        match self.check_frame() {
            Ok(frame) => {
                self.cursor = WalCursor {
                    frame_no: frame.frame_no,
                    checksum: frame.header.checksum,
                };
                self.bytes = &self.bytes[WAL_FRAME_HEADER_LEN + frame.data.len()..];
                Some(frame)
            }
            Err(end) => {
                self.end = Some(end);
                None
            }
        }
    }

    /// Gives the frames up to the next commit frame and with it; frames without one are left out.
    pub fn next_commit(&mut self) -> Option<WalCommit<'a>> {
        let (start, bytes) = (self.cursor, self.bytes);
        loop {
            let frame = self.next_frame()?;
            if frame.header.commit != 0 {
                let len = bytes.len() - self.bytes.len();
                return Some(WalCommit {
                    start,
                    end: self.cursor,
                    commit: frame.header.commit,
                    page_size: self.header.page_size,
                    bytes: &bytes[..len],
                });
            }
        }
    }

    fn check_frame(&self) -> Result<WalFrame<'a>, WalEnd> {
        let partial = match self.bytes.len() {
            0 => WalEnd::Bytes,
            len => WalEnd::PartialFrame { len },
        };
        let (head, rest) = self.bytes.split_first_chunk().ok_or(partial)?;
        let [_, salts, _] = frame_header_parts(head);
        if WalSalts::decode(salts) != self.header.salts {
            return Err(WalEnd::Salts);
        }
        let header = WalFrameHeader::decode(head).ok_or(WalEnd::Pgno)?;
        let data = rest.get(..self.header.page_size.len()).ok_or(partial)?;
        let order = self.header.order;
        let head_sum = self
            .cursor
            .checksum
            .update(order, &head[..SUMMED_FRAME_HEADER_LEN]);
        if head_sum.update(order, data) != header.checksum {
            return Err(WalEnd::Checksum);
        }
        let frame_no = self.cursor.frame_no.checked_add(1).ok_or(WalEnd::FrameNo)?;
        Ok(WalFrame {
            frame_no,
            header,
            data,
        })
    }
}

/// One committed transaction of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalCommit<'a> {
    /// The place before its first frame.
    pub start: WalCursor,
    /// The place after its commit frame.
    pub end: WalCursor,
    /// Pages in the database after it, never 0.
    pub commit: u32,
    page_size: PageSize,
    bytes: &'a [u8],
}

impl<'a> WalCommit<'a> {
    /// Iterates over its frames in the order written; a page may come several times, and the last counts.
    pub fn frames(&self) -> impl Iterator<Item = WalFrame<'a>> + use<'a> {
        let (first_no, bytes) = (self.start.frame_no + 1, self.bytes);
        let frames = bytes.chunks_exact(WAL_FRAME_HEADER_LEN + self.page_size.len());
        (first_no..).zip(frames).filter_map(|(frame_no, frame)| {
            let (head, data) = frame.split_first_chunk()?;
            Some(WalFrame {
                frame_no,
                header: WalFrameHeader::decode(head)?,
                data,
            })
        })
    }
}

/// Splits a frame header into page number and commit size, salts, checksum.
fn frame_header_parts(bytes: &[u8; WAL_FRAME_HEADER_LEN]) -> [[u8; 8]; 3] {
    let (parts, _) = bytes.as_chunks::<8>();
    [parts[0], parts[1], parts[2]]
}

fn pair_to_bytes(a: u32, b: u32) -> [u8; 8] {
    ((u64::from(a) << 32) | u64::from(b)).to_be_bytes()
}

#[expect(clippy::cast_possible_truncation, reason = "splits a pair of words")]
fn pair_from_bytes(bytes: [u8; 8]) -> (u32, u32) {
    let pair = u64::from_be_bytes(bytes);
    ((pair >> 32) as u32, pair as u32)
}

#[cfg(test)]
#[path = "wal_tests.rs"]
mod tests;
