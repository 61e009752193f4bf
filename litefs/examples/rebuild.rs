//! Rebuilds a database from nothing but its captured log, as a replica would, and compares it with the original.
//!
//! usage: rebuild DIR POS FILE [LOCK_BYTE]
//!     DIR   the database's directory in `dbs` of the data directory (docs/formats/data-dir.md); only read, so the node may run
//!     POS   where the database is, as `NAME-pos` says
//!     FILE  all of its pages at that position, or `-` if they cannot be had: then only the checksum of all pages is compared
//!     LOCK_BYTE  where SQLite's lock bytes were moved to, as its tests do: the page that has them has no content
//!
//! Prints one line. Exit status: 0 it is the same, 1 it is not, 2 it could not be found out.
//!
//! A log that was begun anew since the database was made (the page size changed, a file took its place) has no first page
//! of it: what its records say is compared then, and the line says so.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use anyhow::{Context, bail};
use litefs::db::log::{Log, LogOptions, ReadAfter, Record, ltx_meta};
use litefs::db::{Db, NodeContext, Trust};
use litefs::disk::RealDisk;
use litefs::history::History;
use litefs::ltx::{Decoder, Pgno, Pos, Txid};
use litefs::replication::{self, ChangeHub};
use litefs::survivors::Survivors;
use parking_lot::Mutex;

/// Bytes of the log that are read at a time.
const CHUNK_LEN: usize = 8 << 20;
/// How often a log is copied again because the node tidied it up meanwhile.
const TRIES: u32 = 5;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (dir, pos, file, lock_byte) = match args.as_slice() {
        [dir, pos, file] => (dir, pos, file, None),
        [dir, pos, file, lock_byte] => (dir, pos, file, lock_byte.parse().ok()),
        _ => {
            eprintln!("usage: rebuild DIR POS FILE [LOCK_BYTE]");
            return ExitCode::from(2);
        }
    };
    match check(Path::new(dir), pos, file, lock_byte) {
        Ok(Outcome { is_equal, what }) => {
            println!("{}: {what}", if is_equal { "equal" } else { "different" });
            ExitCode::from(u8::from(!is_equal))
        }
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

struct Outcome {
    is_equal: bool,
    what: String,
}

fn check(dir: &Path, pos: &str, file: &str, lock_byte: Option<usize>) -> anyhow::Result<Outcome> {
    let pos: Pos = pos.trim().parse().context("POS")?;
    let original = match file {
        "-" => None,
        path => Some(fs::read(path).with_context(|| format!("read {path}"))?),
    };
    let tmp = tempfile::tempdir()?;
    let log = copy_log(dir, pos, &tmp.path().join("log"))?;
    if log.base() > Txid::ZERO {
        return compare_records(&log, pos, original.as_deref(), lock_byte);
    }
    let db = replay(&log, pos.txid, &tmp.path().join("node"))?;
    if db.pos() != pos {
        let what = format!("what was rebuilt is at {}, not at {pos}", db.pos());
        return Ok(Outcome::differs(what));
    }
    let now = db.published();
    let how = format!("{} pages at {pos}, from empty", now.page_count);
    let Some(original) = original else {
        return Ok(Outcome::equal(format!("checksum of {how}")));
    };
    let rebuilt = match fs::read(&db.paths().main) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes?,
    };
    let page_len = now.page_size.max(512) as usize;
    if original.len() != rebuilt.len() {
        let len = original.len() as f64 / page_len as f64;
        return Ok(Outcome::differs(format!("{how}, but it has {len}")));
    }
    let pages = original.chunks(page_len).zip(rebuilt.chunks(page_len));
    let differing = (1..).zip(pages).filter(|(_, (a, b))| a != b);
    let differing = differing.map(|(page_no, _)| page_no);
    Ok(Outcome::of(
        differing,
        lock_byte.map(|at| at / page_len + 1),
        how,
    ))
}

impl Outcome {
    fn equal(what: String) -> Outcome {
        Outcome {
            is_equal: true,
            what,
        }
    }

    fn differs(what: String) -> Outcome {
        Outcome {
            is_equal: false,
            what,
        }
    }

    /// Given the pages that differ, in order, and the one that may.
    fn of(
        differing: impl Iterator<Item = usize>,
        lock_page: Option<usize>,
        how: String,
    ) -> Outcome {
        let differing: Vec<usize> = differing
            .filter(|page_no| Some(*page_no) != lock_page)
            .collect();
        match differing.as_slice() {
            [] => Outcome::equal(how),
            [first, ..] => Outcome::differs(format!(
                "{how}, but {} differ from page {first} on",
                differing.len()
            )),
        }
    }
}

/// Applies all records as a replica does, one at a time: each is checked against the checksum that it ends with.
fn replay(log: &Log, until: Txid, root: &Path) -> anyhow::Result<Db> {
    let node = Arc::new(replica(root));
    for dir in [&node.files, &node.metas, &node.mount] {
        fs::create_dir_all(dir)?;
    }
    let meta = node.metas.join("0");
    let db = Db::open(node, "rebuilt.db".parse()?, meta, Trust::CleanEnd)?;
    each_record(log, Txid::ZERO, until, |record| {
        let at = record.meta.pos();
        let record = replication::Record {
            meta: sent(&record),
            ltx: record.ltx,
        };
        db.apply(&[record], 0, false)
            .with_context(|| format!("apply the record that ends at {at}"))?;
        Ok(())
    })?;
    Ok(db)
}

/// A node that follows another and has nothing yet.
fn replica(root: &Path) -> NodeContext {
    NodeContext {
        gate: std::sync::OnceLock::new(),
        is_candidate: false,
        is_draining: AtomicBool::new(false),
        has_doubts: AtomicBool::new(false),
        has_unseen: AtomicBool::new(false),
        disk: Arc::new(RealDisk),
        files: root.join("files"),
        metas: root.join("dbs"),
        mount: root.join("mnt"),
        hub: ChangeHub::new(),
        is_primary: AtomicBool::new(false),
        was_primary: AtomicBool::new(false),
        was_replica: AtomicBool::new(false),
        passthrough: AtomicBool::new(false),
        epoch: AtomicU64::new(0),
        node_id: 1,
        invalidator: Mutex::new(None),
        own_threads: Mutex::new(HashSet::new()),
        survivors: Survivors::default(),
        history: Arc::new(History::new(None, None)),
        log_options: LogOptions::new(ltx_meta),
        hostname: String::new(),
        on_lost: std::sync::OnceLock::new(),
    }
}

/// Describes a record as the stream does.
fn sent(record: &Record) -> replication::RecordMeta {
    let meta = &record.meta;
    replication::RecordMeta {
        epoch: meta.epoch,
        min_txid: meta.min_txid,
        max_txid: meta.max_txid,
        pre: meta.pre_apply_checksum,
        post: meta.post_apply_checksum,
        timestamp_ms: meta.timestamp_ms,
        commit: meta.commit,
        page_size: meta.page_size.get(),
    }
}

/// Compares what a log has that does not begin with the database: the last version of each page in it.
fn compare_records(
    log: &Log,
    pos: Pos,
    original: Option<&[u8]>,
    lock_byte: Option<usize>,
) -> anyhow::Result<Outcome> {
    let base = log.base();
    let mut pages: BTreeMap<Pgno, Vec<u8>> = BTreeMap::new();
    let mut page_len = 0;
    each_record(log, base, pos.txid, |record| {
        let mut decoder = Decoder::new(&record.ltx)?;
        page_len = record.meta.page_size.len();
        let mut page = vec![0; page_len];
        while let Some(pgno) = decoder.next_page(&mut page)? {
            pages.insert(pgno, page.clone());
        }
        decoder.finish()?;
        pages.retain(|pgno, _| pgno.get() <= record.meta.commit);
        Ok(())
    })?;
    let how = format!("{} pages at {pos}, begun anew at {base}", pages.len());
    let Some(original) = original else {
        return Ok(Outcome::equal(how));
    };
    let differing = pages.iter().filter_map(|(pgno, page)| {
        let page_no = pgno.get() as usize;
        let end = page_no * page_len;
        (original.get(end - page_len..end) != Some(page)).then_some(page_no)
    });
    let lock_page = lock_byte
        .filter(|_| page_len > 0)
        .map(|at| at / page_len + 1);
    Ok(Outcome::of(differing, lock_page, how))
}

/// Does something with each record after one transaction up to another.
fn each_record(
    log: &Log,
    after: Txid,
    until: Txid,
    mut act: impl FnMut(Record) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut at = after;
    while at < until {
        match log.read_after(at, CHUNK_LEN)? {
            ReadAfter::Records(records) => {
                for record in records {
                    at = record.meta.max_txid;
                    act(record)?;
                }
            }
            ReadAfter::CaughtUp => bail!("the log ends at {at}, not at {until}"),
            ReadAfter::NotAvailable { base } => bail!("the log begins at {base}, not at {at}"),
        }
    }
    Ok(())
}

/// Copies a log that may be in use, and opens the copy.
fn copy_log(dir: &Path, pos: Pos, to: &Path) -> anyhow::Result<Log> {
    let mut why = anyhow::anyhow!("never copied");
    for _ in 0..TRIES {
        if to.exists() {
            fs::remove_dir_all(to)?;
        }
        if let Err(error) = copy_files(dir, to) {
            why = anyhow::Error::new(error).context(format!("copy {}", dir.display()));
            continue;
        }
        let (log, opened) = Log::open(Arc::new(RealDisk), to, LogOptions::new(ltx_meta))?;
        if log.end_pos() == pos {
            return Ok(log);
        }
        let end = log.end_pos();
        why = anyhow::anyhow!("the log ends at {end}, not at {pos}; {:?}", opened.findings);
    }
    Err(why)
}

/// Segments first: what is sealed meanwhile is there twice then, not missing.
fn copy_files(dir: &Path, to: &Path) -> io::Result<()> {
    for part in ["log", "ltx"] {
        let to = to.join(part);
        fs::create_dir_all(&to)?;
        let from = match fs::read_dir(dir.join(part)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            from => from?,
        };
        for entry in from {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
