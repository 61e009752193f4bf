//! Prints how fast LTX files are made, verified and compacted, in MB/s of pages on one core.
//!
//! `cargo run --release -p litefs --example ltx_speed`
//!
//! The pages are those of a database that SQLite itself filled with rows of a web app's kind;
//! beside them the two extremes, pages of zeros and of random bytes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use litefs::ltx::{
    Checksum, Decoder, Encoder, Header, HeaderFlags, PageSize, Pgno, Txid, compact, page_checksum,
    verify,
};
use rusqlite::Connection;

const PAGE_SIZE: usize = 4096;
const RUN: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    println!(
        "{:<22} {:>9} {:>9} {:>9} {:>9} {:>7}",
        "MB/s of pages", "encode", "decode", "verify", "compact", "ratio"
    );
    let rows = sqlite_pages()?;
    let random: Vec<u8> = std::iter::repeat_with(rand::random::<u8>)
        .take(rows.len())
        .collect();
    for (name, pages) in [
        ("rows", &rows[..]),
        ("zeros", &vec![0; rows.len()]),
        ("random bytes", &random),
    ] {
        measure(name, pages, pages.len() / PAGE_SIZE)?;
    }
    measure("rows, 3 pages a file", &rows, 3)
}

/// Measures files of `per_file` pages each, so that what a file costs by itself shows as well.
fn measure(name: &str, pages: &[u8], per_file: usize) -> Result<()> {
    let files = pages
        .chunks_exact(per_file * PAGE_SIZE)
        .map(|pages| encode(pages, Vec::new()))
        .collect::<Result<Vec<_>>>()?;
    let bytes = files.len() * per_file * PAGE_SIZE;
    let mut out = Vec::new();
    let encoded = mb_per_second(bytes, || {
        for pages in pages.chunks_exact(per_file * PAGE_SIZE) {
            out = encode(black_box(pages), std::mem::take(&mut out))?;
        }
        Ok(())
    })?;
    let decoded = mb_per_second(bytes, || {
        let mut page = [0; PAGE_SIZE];
        for file in &files {
            let mut decoder = Decoder::new(black_box(file))?;
            while decoder.next_page(&mut page)?.is_some() {}
            decoder.finish()?;
        }
        Ok(())
    })?;
    let verified = mb_per_second(bytes, || {
        for file in &files {
            verify(black_box(file))?;
        }
        Ok(())
    })?;
    let compacted = mb_per_second(bytes, || {
        for file in &files {
            compact(&[black_box(file)])?;
        }
        Ok(())
    })?;
    let ratio = bytes as f64 / files.iter().map(Vec::len).sum::<usize>() as f64;
    println!(
        "{name:<22} {encoded:>9.0} {decoded:>9.0} {verified:>9.0} {compacted:>9.0} {ratio:>7.2}"
    );
    Ok(())
}

fn mb_per_second(bytes: usize, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let (start, mut runs) = (Instant::now(), 0);
    while start.elapsed() < RUN {
        run()?;
        runs += 1;
    }
    Ok(bytes as f64 * f64::from(runs) / 1e6 / start.elapsed().as_secs_f64())
}

/// Makes a range of the kind a commit makes, with the checksum of each page as a capture has it.
fn encode(pages: &[u8], out: Vec<u8>) -> Result<Vec<u8>> {
    let header = Header {
        flags: HeaderFlags::TRACKED,
        page_size: PageSize::new(u32::try_from(PAGE_SIZE)?).context("page size")?,
        commit: u32::try_from(pages.len() / PAGE_SIZE)?,
        min_txid: Txid(2),
        max_txid: Txid(2),
        timestamp_ms: 0,
        pre_apply_checksum: Some(Checksum::EMPTY),
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0,
    };
    let mut encoder = Encoder::new(header, out)?;
    let mut checksum = Checksum::EMPTY;
    for (pgno, page) in (1..)
        .filter_map(Pgno::new)
        .zip(pages.chunks_exact(PAGE_SIZE))
    {
        encoder.page(pgno, page)?;
        checksum = checksum ^ page_checksum(pgno, page);
    }
    Ok(encoder.finish(Some(checksum))?)
}

/// Returns the pages of a database with text, numbers, an index and some random keys, 16 MB or so.
fn sqlite_pages() -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("posts.db");
    let db = Connection::open(&path)?;
    db.execute_batch(
        "CREATE TABLE post (id INTEGER PRIMARY KEY, uuid BLOB, author INTEGER, at TEXT, title TEXT, body TEXT);
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
         INSERT INTO post SELECT i, randomblob(16), abs(random()) % 5000,
           datetime(1700000000 + i * 37, 'unixepoch'),
           'Post number ' || i || ' about ' || substr('storage queues caches indexes replicas', 1 + abs(random()) % 24, 12),
           printf('%s wrote %d words, of which %d were read; %s', hex(randomblob(6)), abs(random()) % 900, abs(random()) % 900,
                  substr('the quick brown fox jumps over the lazy dog and runs on and on', 1 + abs(random()) % 30, 30))
         FROM n;
         CREATE INDEX post_by_author ON post (author, at);",
    )?;
    let bytes = std::fs::read(&path)?;
    anyhow::ensure!(bytes.len() % PAGE_SIZE == 0, "page size is not {PAGE_SIZE}");
    Ok(bytes)
}
