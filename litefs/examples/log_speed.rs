//! Prints what the segment log and the page checksums cost.
//!
//! usage: cargo run --release --example log_speed

use std::sync::Arc;
use std::time::Instant;

use litefs::db::log::{Log, LogOptions, RecordMeta, ltx_meta};
use litefs::db::page_checksums::PageChecksums;
use litefs::disk::{Disk, OpenMode, RealDisk};
use litefs::ltx::{Checksum, PageSize, Pos, Txid};

const APPENDS: u32 = 200_000;
const LTX_LEN: usize = 300;
const PAGES: u32 = 262_144;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    appends(dir.path())?;
    checksums(dir.path())
}

fn appends(dir: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let (log, _) = Log::open(Arc::new(RealDisk), dir, LogOptions::new(ltx_meta))?;
    let ltx = vec![7; LTX_LEN];
    let mut pos = Pos::ZERO;
    let start = Instant::now();
    for _ in 0..APPENDS {
        let meta = RecordMeta {
            epoch: 1,
            min_txid: pos.txid.next(),
            max_txid: pos.txid.next(),
            pre_apply_checksum: pos.post_apply_checksum,
            post_apply_checksum: Checksum::EMPTY,
            timestamp_ms: 0,
            commit: 1,
            page_size: PageSize::DEFAULT,
            wal: None,
        };
        log.append(&meta, &ltx)?;
        pos = meta.pos();
    }
    let each = start.elapsed() / APPENDS;
    println!("append of {LTX_LEN} bytes: {each:?}");
    Ok(())
}

fn checksums(dir: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let file = RealDisk.open("example", &dir.join("db"), OpenMode::Create)?;
    let page = vec![0x5a; 1 << 20];
    for i in 0..1024 {
        RealDisk.write_all_at("example", &file, &page, i << 20)?;
    }
    let mut table = PageChecksums::new(PageSize::DEFAULT);
    for threads in [1, 2] {
        let start = Instant::now();
        table = PageChecksums::scan(&file, PageSize::DEFAULT, PAGES, threads)?;
        println!("scan of 1 GiB, {threads} threads: {:?}", start.elapsed());
    }
    let at = Pos {
        txid: Txid(1),
        post_apply_checksum: table.total(),
    };
    for durable in [false, true] {
        let start = Instant::now();
        table.persist(&RealDisk, dir, at, b"", durable)?;
        println!("persist, durable {durable}: {:?}", start.elapsed());
    }
    let start = Instant::now();
    PageChecksums::load(&RealDisk, dir)?;
    println!("load: {:?}", start.elapsed());
    Ok(())
}
