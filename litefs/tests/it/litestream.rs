//! The real Litestream restores what we write, and we read what it writes.
//!
//! A replica at `file://DIR` is laid out as `DIR/ltx/<level>/<min>-<max>.ltx`: level 0 has the
//! files as they were made, 1 to 8 merged ones, 9 snapshots. Litestream keeps no checksums of the
//! database, and its restore refuses files that do. It reads the block form of a page since
//! 0.5.16; before, it knew the frame form only.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use litefs::ltx::{
    Checksum, Decoder, Encoder, FileName, Header, HeaderFlags, PageSize, Pgno, Txid, compact,
    compact_untracked, page_checksum, verify,
};
use rusqlite::Connection;
use tempfile::TempDir;

use crate::find_program;

/// First version that reads the block form of a page.
const OLDEST: [u32; 3] = [0, 5, 16];

struct Litestream {
    program: PathBuf,
    dir: TempDir,
}

impl Litestream {
    fn new() -> Option<Litestream> {
        let program = find_program("litestream", "LITESTREAM")?;
        let dir = tempfile::tempdir().unwrap();
        let litestream = Litestream { program, dir };
        let version = litestream.run(&["version".as_ref()]).unwrap();
        let numbers: Vec<u32> = version
            .trim()
            .trim_start_matches('v')
            .split('.')
            .map_while(|n| n.parse().ok())
            .collect();
        if numbers[..] < OLDEST[..] {
            eprintln!(
                "skipped: litestream {} is older than {OLDEST:?}",
                version.trim()
            );
            return None;
        }
        Some(litestream)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn replica_url(&self) -> String {
        format!("file://{}", self.path("replica").display())
    }

    /// Runs it, and returns what it said if it failed.
    fn run(&self, args: &[&OsStr]) -> Result<String, String> {
        let run = Command::new(&self.program).args(args).output().unwrap();
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if run.status.success() {
            Ok(said(&run.stdout))
        } else {
            Err(said(&run.stdout) + &said(&run.stderr))
        }
    }

    fn restore(&self, to: &str, more: &[&str]) -> Result<PathBuf, String> {
        let (path, url) = (self.path(to), self.replica_url());
        let mut args = vec![OsStr::new("restore"), OsStr::new("-o"), path.as_os_str()];
        args.extend(more.iter().map(OsStr::new));
        args.push(url.as_ref());
        self.run(&args).map(|_| path.clone())
    }

    fn replicate_once(&self, db: &Path) {
        let url = self.replica_url();
        let args = [
            "replicate".as_ref(),
            "-once".as_ref(),
            db.as_os_str(),
            url.as_ref(),
        ];
        self.run(&args).unwrap();
    }

    fn put(&self, level: u8, file: &[u8]) {
        let dir = self.path(&format!("replica/ltx/{level}"));
        fs::create_dir_all(&dir).unwrap();
        let header = verify(file).unwrap().header;
        let (min, max) = (header.min_txid, header.max_txid);
        fs::write(dir.join(FileName { min, max }.to_string()), file).unwrap();
    }

    /// The files of a level in order of name, each checked against its name.
    fn files(&self, level: u8) -> Vec<Vec<u8>> {
        let Ok(dir) = fs::read_dir(self.path(&format!("replica/ltx/{level}"))) else {
            return Vec::new();
        };
        let mut paths: Vec<PathBuf> = dir.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let read = |path: &PathBuf| {
            let name: FileName = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            let bytes = fs::read(path).unwrap();
            let header = verify(&bytes).unwrap().header;
            assert_eq!((header.min_txid, header.max_txid), (name.min, name.max));
            bytes
        };
        paths.iter().map(read).collect()
    }
}

/// Makes the file that leads from the bytes `before` to the bytes `after` of a database.
fn diff(
    page_size: PageSize,
    txids: (u64, u64),
    tracked: bool,
    before: &[u8],
    after: &[u8],
) -> Vec<u8> {
    let (min, max) = txids;
    let checksum = |db: &[u8]| {
        let pages = (1..).filter_map(Pgno::new).zip(db.chunks(page_size.len()));
        pages.fold(Checksum::EMPTY, |sum, (pgno, data)| {
            sum ^ page_checksum(pgno, data)
        })
    };
    let header = Header {
        flags: if tracked {
            HeaderFlags::TRACKED
        } else {
            HeaderFlags::NO_CHECKSUM
        },
        page_size,
        commit: u32::try_from(after.len() / page_size.len()).unwrap(),
        min_txid: Txid(min),
        max_txid: Txid(max),
        timestamp_ms: 1_700_000_000_000 + max.cast_signed(),
        pre_apply_checksum: (tracked && min > 1).then(|| checksum(before)),
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0,
    };
    let mut encoder = Encoder::new(header, Vec::new()).unwrap();
    let pages = (1..)
        .filter_map(Pgno::new)
        .zip(after.chunks(page_size.len()));
    for (i, (pgno, data)) in pages.enumerate() {
        if before.chunks(page_size.len()).nth(i) != Some(data) {
            encoder.page(pgno, data).unwrap();
        }
    }
    encoder.finish(tracked.then(|| checksum(after))).unwrap()
}

/// Applies a file to the bytes of a database.
fn apply(db: &mut Vec<u8>, file: &[u8]) {
    let mut decoder = Decoder::new(file).unwrap();
    let page_size = decoder.header().page_size;
    let commit = decoder.header().commit as usize;
    let mut page = vec![0; page_size.len()];
    db.resize(commit * page_size.len(), 0);
    while let Some(pgno) = decoder.next_page(&mut page).unwrap() {
        let at = pgno.index() * page_size.len();
        db[at..at + page.len()].copy_from_slice(&page);
    }
    decoder.finish().unwrap();
}

fn assert_sound(db: &Path) {
    let db = Connection::open(db).unwrap();
    let said: String = db
        .query_row("PRAGMA integrity_check", (), |row| row.get(0))
        .unwrap();
    assert_eq!(said, "ok");
}

/// A database, as its bytes were after each of four transactions: made, grown, changed, shrunk.
fn four_states(path: &Path, page_size: PageSize) -> Vec<Vec<u8>> {
    let db = Connection::open(path).unwrap();
    db.execute_batch(&format!("PRAGMA page_size = {page_size}"))
        .unwrap();
    let insert = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400)
                  INSERT INTO t (b) SELECT CASE i % 3 WHEN 0 THEN randomblob(700) ELSE printf('row %d of many', i) END FROM n;";
    let run = |sql: &str| {
        db.execute_batch(sql).unwrap();
        fs::read(path).unwrap()
    };
    vec![
        run("CREATE TABLE t (a INTEGER PRIMARY KEY, b); INSERT INTO t (b) VALUES ('first')"),
        run(insert),
        run("UPDATE t SET b = upper(b) WHERE a % 50 = 0"),
        run("DELETE FROM t WHERE a > 20; VACUUM"),
    ]
}

#[test]
fn litestream_restores_what_we_write() {
    for page_size in [512, 4096, 65_536].map(|bytes| PageSize::new(bytes).unwrap()) {
        let Some(litestream) = Litestream::new() else {
            return;
        };
        let states = four_states(&litestream.path("source.db"), page_size);
        let spans = [(1, 1), (2, 2), (3, 5), (6, 6)];
        let mut before: &[u8] = &[];
        for (after, &span) in states.iter().zip(&spans) {
            litestream.put(0, &diff(page_size, span, false, before, after));
            before = after;
        }
        let url = litestream.replica_url();
        let listed = litestream.run(&["ltx".as_ref(), url.as_ref()]).unwrap();
        assert_eq!(listed.lines().count(), 1 + spans.len(), "{listed}");
        for (state, (_, max)) in states.iter().zip(spans) {
            let (to, txid) = (format!("restored-{max}.db"), Txid(max).to_string());
            let restored = litestream.restore(&to, &["-txid", &txid]).unwrap();
            assert!(
                fs::read(&restored).unwrap() == *state,
                "page size {page_size}, txid {max}"
            );
            assert_sound(&restored);
        }
    }
}

#[test]
fn litestream_restores_what_we_compact() {
    let Some(litestream) = Litestream::new() else {
        return;
    };
    let page_size = PageSize::new(4096).unwrap();
    let states = four_states(&litestream.path("source.db"), page_size);
    let first = diff(page_size, (1, 1), true, &[], &states[0]);
    let second = diff(page_size, (2, 2), true, &states[0], &states[1]);
    let third = diff(page_size, (3, 3), true, &states[1], &states[2]);
    let fourth = diff(page_size, (4, 4), true, &states[2], &states[3]);

    litestream.put(9, &compact(&[&first, &second]).unwrap());
    litestream.put(1, &compact(&[&third, &fourth]).unwrap());
    let refused = litestream.restore("tracked.db", &[]);
    let refusal = refused.expect_err("it takes files that keep checksums now: tell the docs");
    assert!(refusal.contains("checksum"), "{refusal}");

    litestream.put(9, &compact_untracked(&[&first, &second]).unwrap());
    litestream.put(1, &compact_untracked(&[&third, &fourth]).unwrap());
    let restored = litestream.restore("untracked.db", &[]).unwrap();
    assert!(fs::read(&restored).unwrap() == states[3]);
    assert_sound(&restored);
}

#[test]
fn we_read_what_litestream_writes() {
    let Some(litestream) = Litestream::new() else {
        return;
    };
    let path = litestream.path("source.db");
    let db = Connection::open(&path).unwrap();
    // Litestream alone moves the WAL into the database, so that it sees every transaction.
    let setup = "PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0; CREATE TABLE t (a INTEGER PRIMARY KEY, b)";
    db.execute_batch(setup).unwrap();
    let count = || -> u32 {
        db.query_row("SELECT count(*) FROM t", (), |row| row.get(0))
            .unwrap()
    };
    for round in 1..=4 {
        db.execute("INSERT INTO t (b) VALUES (randomblob(9000)), ('text')", ())
            .unwrap();
        db.execute("UPDATE t SET b = 'changed' WHERE a = ?", [round])
            .unwrap();
        litestream.replicate_once(&path);
    }
    let files = litestream.files(0);
    assert!(files.len() >= 4, "{} files", files.len());

    let mut applied = Vec::new();
    files.iter().for_each(|file| apply(&mut applied, file));
    let restored = litestream.restore("restored.db", &[]).unwrap();
    assert!(fs::read(&restored).unwrap() == applied);
    assert_sound(&restored);

    let ours = litestream.path("ours.db");
    let files: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
    let mut compacted = Vec::new();
    apply(&mut compacted, &compact(&files).unwrap());
    fs::write(&ours, &compacted).unwrap();
    assert!(compacted == applied);
    assert_sound(&ours);
    let copy = Connection::open(&ours).unwrap();
    let rows: u32 = copy
        .query_row("SELECT count(*) FROM t", (), |row| row.get(0))
        .unwrap();
    assert_eq!(rows, count());
}
