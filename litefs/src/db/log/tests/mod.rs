//! The log against a toy LTX: a header and the records it was made of, so that a compacted file
//! can be taken apart again.

mod basics;
mod concurrent;
mod crash;
mod damage;
mod maintain;
mod model;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::disk::{FailingDisk, RealDisk};
use crate::ltx::{Checksum, PageSize};

/// One record as it was appended.
#[derive(Clone, PartialEq, Eq)]
struct Part {
    meta: RecordMeta,
    body: Vec<u8>,
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (min, max) = (self.meta.min_txid.0, self.meta.max_txid.0);
        write!(f, "{min}-{max}@{}+{}", self.meta.epoch, self.body.len())
    }
}

/// Checksum of the toy database after a transaction of a branch.
fn checksum(branch: u64, txid: Txid) -> Checksum {
    match txid {
        Txid::ZERO => Checksum::EMPTY,
        Txid(n) => Checksum::new((n << 8 | branch).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
    }
}

/// Makes a record that follows a position.
fn part_after(end: Pos, tx_count: u64, body_len: usize) -> Part {
    let branch = 1;
    let max_txid = Txid(end.txid.0 + tx_count);
    let meta = RecordMeta {
        epoch: 1,
        min_txid: end.txid.next(),
        max_txid,
        pre_apply_checksum: end.post_apply_checksum,
        post_apply_checksum: checksum(branch, max_txid),
        timestamp_ms: i64::try_from(max_txid.0).unwrap() * 1000,
        commit: 9,
        page_size: PageSize::new(4096).unwrap(),
        wal: Some(WalCursor {
            salt1: 5,
            frame_no: u32::try_from(max_txid.0).unwrap(),
            ..WalCursor::default()
        }),
    };
    let seed = max_txid.0.to_be_bytes()[7];
    let body = (0..=u8::MAX)
        .cycle()
        .map(|n| n ^ seed)
        .take(body_len)
        .collect();
    Part { meta, body }
}

/// The position of another history at a transaction.
fn other_pos(txid: u64) -> RecordMeta {
    RecordMeta {
        epoch: 2,
        min_txid: Txid(txid),
        max_txid: Txid(txid),
        post_apply_checksum: checksum(2, Txid(txid)),
        ..part_after(Pos::ZERO, 1, 0).meta
    }
}

const DISGUISE: u8 = 0x55;

/// Encodes parts that follow each other: all their metas and bodies, then a CRC-32.
fn toy_ltx(parts: &[Part]) -> Vec<u8> {
    let mut out = Vec::new();
    for Part { meta, body } in parts {
        // The header of a record says it all, so the toy borrows it, but does not look like one.
        out.extend_from_slice(&record::encode_header(meta, Kind::Transactions, body));
        out.extend_from_slice(body);
    }
    out.iter_mut().for_each(|byte| *byte ^= DISGUISE);
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_be_bytes());
    out
}

fn toy_parts(ltx: &[u8]) -> Result<Vec<Part>, BoxError> {
    let (body, crc) = ltx.split_last_chunk::<4>().ok_or("short")?;
    if crc32fast::hash(body).to_be_bytes() != *crc {
        return Err("toy crc mismatch".into());
    }
    let mut body: Bytes = body.iter().map(|byte| byte ^ DISGUISE).collect();
    let mut parts = Vec::new();
    while !body.is_empty() {
        let (record, len) = record::decode(&body)?;
        parts.push(Part {
            meta: record.meta,
            body: record.ltx.to_vec(),
        });
        body = body.slice(len..);
    }
    Ok(parts)
}

fn toy_meta(ltx: &[u8]) -> Result<RecordMeta, BoxError> {
    let parts = toy_parts(ltx)?;
    let (first, last) = parts.first().zip(parts.last()).ok_or("empty")?;
    Ok(RecordMeta {
        epoch: 0,
        wal: None,
        min_txid: first.meta.min_txid,
        pre_apply_checksum: first.meta.pre_apply_checksum,
        ..last.meta
    })
}

fn toy_compact(files: &[&[u8]]) -> Result<Vec<u8>, BoxError> {
    let mut parts = Vec::new();
    for file in files {
        parts.extend(toy_parts(file)?);
    }
    Ok(toy_ltx(&parts))
}

/// Small segments and no retention.
fn options() -> LogOptions {
    LogOptions {
        segment_bytes: 600,
        retention_age: Duration::MAX,
        retention_bytes: u64::MAX,
        tail_cache_bytes: 1000,
        ltx_meta: toy_meta,
    }
}

/// In memory if there is such a file system: these tests sync a lot.
fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

fn open_with(dir: &Path, options: LogOptions) -> (Log, Opened) {
    Log::open(Arc::new(RealDisk), dir, options).unwrap()
}

fn open(dir: &Path) -> (Log, Opened) {
    open_with(dir, options())
}

/// Opens a log that must be as a clean stop leaves it.
fn reopen(dir: &Path) -> Log {
    let (log, opened) = open(dir);
    assert_eq!(opened.findings, []);
    log
}

fn append(log: &Log, part: &Part) -> Result<(), Error> {
    log.append(&part.meta, &toy_ltx(std::slice::from_ref(part)))
}

/// Appends so many records of one transaction and returns them.
fn fill(log: &Log, count: usize) -> Vec<Part> {
    let add = |_| {
        let part = part_after(log.end_pos(), 1, 20);
        append(log, &part).unwrap();
        part
    };
    (0..count).map(add).collect()
}

/// Appends records, syncing each, so that segments fill one after the other.
fn fill_synced(log: &Log, count: usize) -> Vec<Part> {
    let add = |_| {
        let part = fill(log, 1).remove(0);
        log.sync().unwrap();
        part
    };
    (0..count).map(add).collect()
}

fn maintain(log: &Log) -> Maintained {
    log.maintain(0, &toy_compact, None).unwrap()
}

/// Follows the log from a position to its end, checking INV-LOG-1, and returns what was appended.
fn follow(log: &Log, after: Txid) -> Result<Vec<Part>, Error> {
    let mut at = after;
    let mut parts = Vec::new();
    loop {
        match log.read_after(at, 300)? {
            ReadAfter::CaughtUp => return Ok(parts),
            ReadAfter::NotAvailable { base } => panic!("{at} not available, base {base}"),
            ReadAfter::Records(records) => {
                assert!(!records.is_empty());
                for record in records {
                    assert!(record.meta.min_txid.prev() <= at && record.meta.max_txid > at);
                    let found = toy_parts(&record.ltx).unwrap();
                    parts.extend(found.into_iter().filter(|part| part.meta.max_txid > at));
                    at = record.meta.max_txid;
                }
            }
        }
    }
}

/// Checks every way of reading against what was appended; the first may be gone by retention.
fn check(log: &Log, appended: &[Part]) {
    let base = log.base();
    let expected = |after: Txid| -> Vec<Part> {
        let above = |part: &&Part| part.meta.max_txid > after;
        appended.iter().filter(above).cloned().collect()
    };
    for after in base.0..=log.end_pos().txid.0 {
        assert_eq!(follow(log, Txid(after)).unwrap(), expected(Txid(after)));
    }
    if base > Txid::ZERO {
        let before = log.read_after(base.prev(), 1).unwrap();
        assert_eq!(before, ReadAfter::NotAvailable { base });
    }
    let mut newest_first = Vec::new();
    let mut next = log.end_pos().txid.next();
    for record in log.newest_first() {
        // A file may overlap what came from memory.
        let mut parts = toy_parts(&record.unwrap().ltx).unwrap();
        parts.retain(|part| part.meta.max_txid < next);
        next = parts[0].meta.min_txid;
        newest_first.extend(parts.into_iter().rev());
    }
    newest_first.reverse();
    assert_eq!(newest_first, expected(base));
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = match std::fs::read_dir(dir) {
        Ok(dir) => dir
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect(),
        Err(_) => Vec::new(),
    };
    names.sort();
    names
}
