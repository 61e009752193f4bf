//! Records of a log in a file of their own, in the form of a segment, for a branch that is let go.

use std::fs::File;
use std::io;
use std::path::Path;

use bytes::Bytes;

use super::record::{self, Kind, RECORD_HEADER_LEN};
use super::segment::{self, SEGMENT_HEADER_LEN};
use super::{Error, Fault, Log, ReadAfter, Record, RecordMeta};
use crate::disk::{Disk, OpenMode, Step};
use crate::ltx::Txid;

/// How much of the log is read at once.
const CHUNK: usize = 4 << 20;

/// What was written apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Apart {
    /// Records.
    pub record_count: u64,
    /// Transactions in them.
    pub tx_count: u64,
    /// First transaction; zero if there is none.
    pub first: Txid,
    /// Last transaction.
    pub last: Txid,
    /// Length of the file.
    pub len: u64,
    /// All that the log has after the position is there; if not, it ends where the log cannot be read, or the file would
    /// be too long.
    pub is_all_there_is: bool,
    /// The log goes back as far as that.
    pub is_from_there: bool,
}

/// Writes what a log has after a position into a new file, oldest first, and syncs that. A record that begins before the
/// position is taken whole. The file is not made if there is nothing.
///
/// # Errors
/// The disk of the new file. What cannot be read of the log is left out: see [`Apart::is_all_there_is`].
pub fn write_apart(
    log: &Log,
    after: Txid,
    path: &Path,
    max_len: u64,
    step: Step,
) -> io::Result<Apart> {
    let disk: &dyn Disk = &*log.disk;
    let mut apart = Apart {
        is_all_there_is: true,
        is_from_there: after >= log.base(),
        ..Apart::default()
    };
    let mut at = after.max(log.base());
    let mut file = None;
    let mut is_full = false;
    while !is_full {
        let records = match log.read_after(at, CHUNK) {
            Ok(ReadAfter::Records(records)) => records,
            Ok(ReadAfter::CaughtUp) => break,
            Ok(ReadAfter::NotAvailable { .. }) | Err(_) => {
                apart.is_all_there_is = false;
                break;
            }
        };
        for record in &records {
            let end = apart.len + (RECORD_HEADER_LEN + record.ltx.len()) as u64;
            if end > max_len {
                is_full = true;
                break;
            }
            let file = match &file {
                Some(file) => file,
                None => {
                    let new = disk.open(step, path, OpenMode::Truncate)?;
                    let head = segment::encode_header(record.meta.min_txid, &record.meta);
                    disk.write_all_at(step, &new, &head, 0)?;
                    apart.len = SEGMENT_HEADER_LEN as u64;
                    apart.first = record.meta.min_txid;
                    file.insert(new)
                }
            };
            let head = record::encode_header(&record.meta, Kind::Transactions, &record.ltx);
            disk.write_all_at(step, file, &head, apart.len)?;
            let body = apart.len + head.len() as u64;
            disk.write_all_at(step, file, &record.ltx, body)?;
            apart.len = body + record.ltx.len() as u64;
            apart.record_count += 1;
            apart.tx_count += record.meta.max_txid.0 - record.meta.min_txid.0 + 1;
            apart.last = record.meta.max_txid;
            at = record.meta.max_txid;
        }
    }
    apart.is_all_there_is &= !is_full;
    if let Some(file) = &file {
        disk.sync_data(step, file)?;
    }
    Ok(apart)
}

/// Reads a file of [`write_apart`] record by record, oldest first; `each` says whether to go on.
///
/// # Errors
/// The disk; damage, after the records before it.
pub fn read_apart(path: &Path, mut each: impl FnMut(Record) -> bool) -> Result<(), Error> {
    const STEP: Step = super::steps::READ;
    let io = |e| Error::io(STEP, path, e);
    let corrupt = |offset, fault| Error::Corrupt {
        path: path.to_owned(),
        offset,
        fault,
    };
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    let mut head = [0; SEGMENT_HEADER_LEN];
    let read_exact = std::os::unix::fs::FileExt::read_exact_at;
    read_exact(&file, &mut head, 0).map_err(|_| corrupt(0, Fault::CutShort))?;
    segment::decode_header(&head).map_err(|fault| corrupt(0, fault))?;
    let mut at = head.len() as u64;
    let mut last: Option<RecordMeta> = None;
    while at < len {
        let mut head = [0; RECORD_HEADER_LEN];
        read_exact(&file, &mut head, at).map_err(|_| corrupt(at, Fault::CutShort))?;
        let prefix = record::Prefix::parse(&head).map_err(|fault| corrupt(at, fault))?;
        let end = at + prefix.record_len();
        if end > len {
            return Err(corrupt(at, Fault::CutShort));
        }
        let whole = usize::try_from(prefix.record_len()).map_err(|e| io(io::Error::other(e)))?;
        let mut bytes = vec![0; whole];
        read_exact(&file, &mut bytes, at).map_err(io)?;
        let (record, _) =
            record::decode(&Bytes::from(bytes)).map_err(|fault| corrupt(at, fault))?;
        if let Some(last) = last
            && last.pos() != record.meta.pre_apply_pos()
        {
            let (end, next) = (last.pos(), record.meta.pre_apply_pos());
            return Err(corrupt(at, Fault::Gap { end, next }));
        }
        last = Some(record.meta);
        if !each(record) {
            return Ok(());
        }
        at = end;
    }
    Ok(())
}
