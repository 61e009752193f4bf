use std::fs::File;
use std::io;
use std::sync::Arc;

use super::record::{self, Kind, Prefix, RECORD_HEADER_LEN, RecordMeta, u32_at, u64_at};
use super::{Fault, steps};
use crate::disk::Disk;
use crate::ltx::{PageSize, Pos, Txid};

pub(super) const SEGMENT_HEADER_LEN: usize = 48;
const MAGIC: [u8; 8] = *b"litefslg";
const VERSION: u32 = 1;
const _: () = assert!(SEGMENT_HEADER_LEN == 8 + 4 + 4 + 8 + 8 + 12 + 4);

/// Where a record lies in its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) min_txid: Txid,
    pub(super) max_txid: Txid,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// A segment whose records are known; the file stays open, so that readers need no name.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) file: Arc<File>,
    /// First transaction, as in its name and header.
    pub(super) first: Txid,
    pub(super) entries: Vec<Entry>,
    pub(super) len: u64,
    /// Meta of the last record, or of the base.
    pub(super) last: RecordMeta,
    /// Says that nothing before belongs to this log.
    pub(super) is_base: bool,
}

impl Segment {
    pub(super) fn name(first: Txid) -> String {
        format!("{first}.seg")
    }
}

/// Makes the header of a segment.
///
/// # Source
/// docs/formats/log.md "Segment header".
pub(super) fn encode_header(first: Txid, meta: &RecordMeta) -> [u8; SEGMENT_HEADER_LEN] {
    let mut out = [0; SEGMENT_HEADER_LEN];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_be_bytes());
    out[12..16].copy_from_slice(&meta.page_size.get().to_be_bytes());
    out[16..24].copy_from_slice(&first.0.to_be_bytes());
    out[24..32].copy_from_slice(&meta.epoch.to_be_bytes());
    let crc = crc32fast::hash(&out[..44]);
    out[44..].copy_from_slice(&crc.to_be_bytes());
    out
}

/// Reads the first transaction from the header of a segment.
pub(super) fn decode_header(bytes: &[u8; SEGMENT_HEADER_LEN]) -> Result<Txid, Fault> {
    if bytes[..8] != MAGIC {
        return Err(Fault::Magic);
    }
    if u32_at(bytes, 44) != crc32fast::hash(&bytes[..44]) {
        return Err(Fault::Crc);
    }
    match u32_at(bytes, 8) {
        VERSION => {}
        version => return Err(Fault::Version(version)),
    }
    PageSize::new(u32_at(bytes, 12)).ok_or(Fault::Field("page size"))?;
    Ok(Txid(u64_at(bytes, 16)))
}

/// What a segment file contains, as far as it can be trusted.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) entries: Vec<Entry>,
    /// The base record, if the segment begins with one, and whether older files may be removed.
    pub(super) base: Option<(RecordMeta, bool)>,
    /// Position that the first record applies to, or that of the base.
    pub(super) begin: Option<Pos>,
    /// Meta of the last good record, or of the base.
    pub(super) last: Option<RecordMeta>,
    /// End of the last good record.
    pub(super) good_len: u64,
    pub(super) file_len: u64,
    /// Why the bytes from `good_len` on, if there are any, are not a record.
    pub(super) fault: Option<Fault>,
}

impl Scan {
    /// Reads a segment from its start to the first fault.
    pub(super) fn read(disk: &dyn Disk, file: &File, first: Txid) -> io::Result<Scan> {
        let file_len = disk.len(steps::OPEN_SCAN, file)?;
        let mut scan = Scan {
            entries: Vec::new(),
            base: None,
            begin: None,
            last: None,
            good_len: 0,
            file_len,
            fault: None,
        };
        let mut input = Window::new(disk, file, file_len);
        if let Err(fault) = scan.read_header(&mut input, first)? {
            scan.fault = Some(fault);
            return Ok(scan);
        }
        while scan.good_len < file_len {
            if let Err(fault) = scan.read_record(&mut input, first)? {
                scan.fault = Some(fault);
                break;
            }
        }
        Ok(scan)
    }

    fn read_header(
        &mut self,
        input: &mut Window<'_>,
        first: Txid,
    ) -> io::Result<Result<(), Fault>> {
        let Some(header) = input.header::<SEGMENT_HEADER_LEN>(0)? else {
            return Ok(Err(Fault::CutShort));
        };
        Ok(match decode_header(&header) {
            Err(fault) => Err(fault),
            Ok(named) if named != first => Err(Fault::Name(Segment::name(named))),
            Ok(_) => {
                self.good_len = SEGMENT_HEADER_LEN as u64;
                Ok(())
            }
        })
    }

    fn read_record(
        &mut self,
        input: &mut Window<'_>,
        first: Txid,
    ) -> io::Result<Result<(), Fault>> {
        let offset = self.good_len;
        let (meta, kind, len) = match input.record(offset)? {
            Ok(found) => found,
            Err(fault) => return Ok(Err(fault)),
        };
        if let Err(fault) = self.check_order(&meta, kind, first) {
            return Ok(Err(fault));
        }
        let begin = match kind {
            Kind::Base { .. } => meta.pos(),
            Kind::Transactions => meta.pre_apply_pos(),
        };
        self.begin.get_or_insert(begin);
        match kind {
            Kind::Base { remove_older } => self.base = Some((meta, remove_older)),
            Kind::Transactions => self.entries.push(Entry {
                min_txid: meta.min_txid,
                max_txid: meta.max_txid,
                offset,
                len,
            }),
        }
        self.last = Some(meta);
        self.good_len += len;
        Ok(Ok(()))
    }

    /// Checks INV-LOG-1 within the segment.
    fn check_order(&self, meta: &RecordMeta, kind: Kind, first: Txid) -> Result<(), Fault> {
        match (self.last, kind) {
            (None, Kind::Base { .. }) if meta.max_txid.next() == first => Ok(()),
            (None, Kind::Transactions) if meta.min_txid == first => Ok(()),
            (None, _) => Err(Fault::Field("first transaction")),
            (Some(last), Kind::Transactions) if last.pos() == meta.pre_apply_pos() => Ok(()),
            (Some(_), Kind::Base { .. }) => Err(Fault::Field("base")),
            (Some(last), Kind::Transactions) => Err(Fault::Gap {
                end: last.pos(),
                next: meta.pre_apply_pos(),
            }),
        }
    }

    /// Says whether what follows the fault may be the remains of one interrupted write: it is cut
    /// short by the end of the file or all zeros, and holds no whole record.
    pub(super) fn fault_is_torn_write(&self, disk: &dyn Disk, file: &File) -> io::Result<bool> {
        let mut input = Window::new(disk, file, self.file_len);
        let at = self.good_len;
        let is_cut = match input.header::<RECORD_HEADER_LEN>(at)? {
            None => true,
            Some(header) => {
                Prefix::parse(&header).is_ok_and(|prefix| at + prefix.record_len() > self.file_len)
            }
        };
        if !is_cut {
            return input.is_zero_from(at);
        }
        Ok(!input.holds_record(at + 1)?)
    }
}

/// Buffered reading at rising offsets.
struct Window<'a> {
    disk: &'a dyn Disk,
    file: &'a File,
    file_len: u64,
    start: u64,
    bytes: Vec<u8>,
}

const WINDOW_LEN: usize = 256 << 10;

impl<'a> Window<'a> {
    fn new(disk: &'a dyn Disk, file: &'a File, file_len: u64) -> Window<'a> {
        Window {
            disk,
            file,
            file_len,
            start: 0,
            bytes: Vec::new(),
        }
    }

    /// Returns the bytes from an offset on: at least `min_len` of them, or all to the file's end.
    fn at(&mut self, offset: u64, min_len: usize) -> io::Result<&[u8]> {
        let is_held =
            offset >= self.start && offset + min_len as u64 <= self.start + self.bytes.len() as u64;
        if !is_held {
            let left = self.file_len.saturating_sub(offset);
            let len = usize::try_from(left).unwrap_or(WINDOW_LEN).min(WINDOW_LEN);
            self.bytes.resize(len, 0);
            let n = self
                .disk
                .read_at(steps::OPEN_SCAN, self.file, &mut self.bytes, offset)?;
            self.bytes.truncate(n);
            self.start = offset;
        }
        let skip = usize::try_from(offset - self.start).map_err(io::Error::other)?;
        Ok(&self.bytes[skip.min(self.bytes.len())..])
    }

    fn header<const N: usize>(&mut self, offset: u64) -> io::Result<Option<[u8; N]>> {
        Ok(self.at(offset, N)?.first_chunk().copied())
    }

    /// Reads and checks the record at an offset without keeping its bytes.
    fn record(&mut self, offset: u64) -> io::Result<Result<(RecordMeta, Kind, u64), Fault>> {
        let Some(header) = self.header::<RECORD_HEADER_LEN>(offset)? else {
            return Ok(Err(Fault::CutShort));
        };
        let prefix = match Prefix::parse(&header) {
            Ok(prefix) => prefix,
            Err(fault) => return Ok(Err(fault)),
        };
        let end = offset + prefix.record_len();
        if end > self.file_len {
            return Ok(Err(Fault::CutShort));
        }
        let mut crc = record::crc_start(&header);
        let mut at = offset + RECORD_HEADER_LEN as u64;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let bytes = self.at(at, left.min(WINDOW_LEN))?;
            let n = left.min(bytes.len());
            if n == 0 {
                return Ok(Err(Fault::CutShort));
            }
            crc.update(&bytes[..n]);
            at += n as u64;
        }
        Ok(prefix
            .check(crc)
            .and_then(|()| record::decode_fields(&header, prefix.ltx_len))
            .map(|(meta, kind)| (meta, kind, prefix.record_len())))
    }

    fn is_zero_from(&mut self, mut offset: u64) -> io::Result<bool> {
        while offset < self.file_len {
            let bytes = self.at(offset, 1)?;
            if bytes.iter().any(|b| *b != 0) {
                return Ok(false);
            }
            if bytes.is_empty() {
                break;
            }
            offset += bytes.len() as u64;
        }
        Ok(true)
    }

    /// Looks for a whole record at any offset from here on.
    fn holds_record(&mut self, mut offset: u64) -> io::Result<bool> {
        loop {
            let bytes = self.at(offset, RECORD_HEADER_LEN)?;
            let candidate = bytes
                .array_windows::<RECORD_HEADER_LEN>()
                .position(|header| Prefix::parse(header).is_ok());
            let Some(i) = candidate else {
                if bytes.len() < RECORD_HEADER_LEN {
                    return Ok(false);
                }
                offset += (bytes.len() - RECORD_HEADER_LEN + 1) as u64;
                continue;
            };
            offset += i as u64;
            if self.record(offset)?.is_ok() {
                return Ok(true);
            }
            offset += 1;
        }
    }
}
