use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;

use proptest::prelude::*;
use rusqlite::Connection;

use super::super::header::DbHeader;
use super::super::locks::{OfdLocks, shm};
use super::super::wal::{WalFrameHeader, WalReader, frame_offset};
use super::*;

fn pgno(n: u32) -> Pgno {
    Pgno::new(n).unwrap()
}

fn wal_header(page_size: u32) -> WalHeader {
    WalHeader {
        order: ByteOrder::NATIVE,
        page_size: PageSize::new(page_size).unwrap(),
        checkpoint_seq: 0,
        salts: WalSalts(0x1234_5678, 0x9abc_def0),
    }
}

fn empty_header() -> WalIndexHeader {
    WalIndexHeader::of_empty(&wal_header(4096), 1)
}

#[test]
fn blocks_cover_4062_then_4096_frames() {
    for (frame_no, block, nth) in [
        (1, 0, 1),
        (4062, 0, 4062),
        (4063, 1, 1),
        (4062 + 4096, 1, 4096),
        (4062 + 4096 + 1, 2, 1),
    ] {
        assert_eq!((block_of(frame_no), nth_in_block(frame_no)), (block, nth));
    }
    assert_eq!(page_at(1), 136);
    assert_eq!(page_at(4062) + 4, HASH_AT);
    assert_eq!(page_at(4063), BLOCK_LEN);
    assert_eq!(
        [0, 1, 4062, 4063].map(index_len),
        [32768, 32768, 32768, 65536]
    );
    assert_eq!(block_of(u32::MAX), 1_048_576);
}

#[test]
fn header_round_trip_with_every_page_size() {
    for shift in 9..=16 {
        let page_size = PageSize::new(1 << shift);
        let header = WalIndexHeader {
            change: 7,
            big_end_cksum: true,
            page_size,
            mx_frame: 5,
            n_page: 9,
            frame_checksum: WalChecksum(1, 2),
            ..empty_header()
        };
        let bytes = header.encode();
        assert_eq!(WalIndexHeader::decode(&bytes).unwrap(), header);
        let encoded = u16::from_ne_bytes([bytes[14], bytes[15]]);
        assert_eq!(u32::from(encoded), if shift == 16 { 1 } else { 1 << shift });
    }
}

#[test]
fn a_flipped_bit_or_a_torn_copy_is_refused() {
    let mut index = WalIndex::new(Vec::new());
    assert!(matches!(
        index.header(),
        Err(WalIndexError::Short { len: 0 })
    ));
    index.publish(&empty_header()).unwrap();
    assert_eq!(index.header().unwrap(), empty_header());
    let good = index.into_shm();
    for at in 0..HEADER_LEN {
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        assert!(matches!(
            WalIndex::new(bytes.clone()).header(),
            Err(WalIndexError::Torn)
        ));
        bytes[at + HEADER_LEN] ^= 4;
        assert!(WalIndex::new(bytes).header().is_err(), "byte {at}");
    }
    let zeroes = WalIndex::new(vec![0; BLOCK_LEN]);
    assert!(matches!(zeroes.header(), Err(WalIndexError::Uninitialised)));
    assert_eq!(zeroes.find(pgno(1), 10).unwrap(), None);
    assert!(matches!(
        zeroes.find(pgno(1), 5000),
        Err(WalIndexError::Short { .. })
    ));
}

#[test]
fn a_full_table_is_an_error_and_not_an_endless_probe() {
    let mut index = WalIndex::new(vec![0xff; BLOCK_LEN]);
    assert!(matches!(
        index.find(pgno(3), 9),
        Err(WalIndexError::HashFull { block: 0 })
    ));
    index.shm.zero(page_at(2)..page_at(3));
    assert!(matches!(
        index.append(2, pgno(3)),
        Err(WalIndexError::HashFull { block: 0 })
    ));
    index.append(1, pgno(3)).unwrap();
    assert_eq!(
        index.find(pgno(3), 9).unwrap(),
        Some(1),
        "the first frame of a block cleans it"
    );
}

#[test]
fn restart_frees_the_read_marks() {
    let mut index = WalIndex::new(Vec::new());
    let built = index.build([1, 2, 1].map(pgno), &empty_header()).unwrap();
    assert_eq!(
        (
            built.mx_frame,
            index.backfill_attempted(),
            index.read_mark(1)
        ),
        (3, 3, 3)
    );
    index.set_backfill(3);
    let restarted = index.restart(&built, 42).unwrap();
    assert_eq!(restarted.salts, WalSalts(0x1234_5679, 42));
    assert_eq!(index.header().unwrap(), restarted);
    let marks: Vec<u32> = (0..READ_MARK_COUNT).map(|n| index.read_mark(n)).collect();
    assert_eq!(
        marks,
        [0, 0, READ_MARK_UNUSED, READ_MARK_UNUSED, READ_MARK_UNUSED]
    );
    assert_eq!((index.backfill(), index.backfill_attempted()), (0, 0));
}

/// What may be done to an index, and what it must find after.
#[derive(Debug, Clone)]
enum Step {
    /// Frames of a transaction, which is published or left by a writer that dies.
    Append(Vec<u32>, bool),
    Truncate(u16),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let pages = prop_oneof![
        proptest::collection::vec(1u32..40, 1..20),
        proptest::collection::vec(1u32..100_000, 1..20),
        // Multiples of the number of slots collide.
        proptest::collection::vec((1u32..50).prop_map(|n| n * HASH_SLOTS), 1..300),
        proptest::collection::vec(1u32..9000, 3000..5000),
    ];
    let step = prop_oneof![
        8 => (pages, any::<bool>()).prop_map(|(pages, done)| Step::Append(pages, done)),
        2 => any::<u16>().prop_map(Step::Truncate),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn find_equals_a_map(steps in steps()) {
        let mut index = WalIndex::new(Vec::new());
        let mut header = empty_header();
        index.publish(&header).unwrap();
        let mut log: Vec<u32> = Vec::new();
        for step in steps {
            match step {
                Step::Append(pages, done) => {
                    for (frame_no, page) in (header.mx_frame + 1..).zip(&pages) {
                        index.append(frame_no, pgno(*page)).unwrap();
                    }
                    if done {
                        log.extend(&pages);
                    }
                }
                Step::Truncate(back) => {
                    let back = usize::from(back) % (log.len() + 1);
                    log.truncate(log.len() - back);
                    index.truncate_hash_to(u32::try_from(log.len()).unwrap());
                }
                Step::Restart => {
                    log.clear();
                    header = index.restart(&header, 9).unwrap();
                }
            }
            header.mx_frame = u32::try_from(log.len()).unwrap();
            index.publish(&header).unwrap();
            let mut last = BTreeMap::new();
            for (frame_no, page) in (1u32..).zip(&log) {
                last.insert(*page, frame_no);
            }
            for page in last.keys().copied().chain([1, 2, 41, HASH_SLOTS, 99_999]) {
                let found = index.find(pgno(page), header.mx_frame).unwrap();
                prop_assert_eq!(found, last.get(&page).copied(), "page {}", page);
            }
            let half = header.mx_frame / 2;
            if half > 0 {
                let page = log[half as usize - 1];
                prop_assert_eq!(index.find(pgno(page), half).unwrap(), Some(half));
                prop_assert_eq!(index.page_of(half), Some(pgno(page)));
            }
        }
    }

    #[test]
    fn any_memory_is_read_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..400), page in 1u32.., mx in any::<u32>(),
    ) {
        let mut memory = bytes;
        memory.resize(2 * BLOCK_LEN, 0x5a);
        let mut index = WalIndex::new(memory);
        let _ = index.header();
        let _ = index.find(pgno(page), mx);
        let _ = index.page_of(mx);
        index.truncate_hash_to(mx.min(8000));
    }
}

/// Opens files as the daemon does, and holds the dead man's switch, so that SQLite takes the index as it is.
fn hold_dms(path: &Path) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap();
    assert!(OfdLocks::new(file.as_fd()).try_read(shm::DMS).unwrap());
    file
}

/// Makes a database in WAL mode whose rows fill pages 2.., and what the same pages hold after an UPDATE of all.
fn before_and_after(dir: &Path, rows: u32) -> (Vec<u8>, Vec<u8>) {
    let path = dir.join("made");
    let conn = Connection::open(&path).unwrap();
    conn.execute_batch(&format!(
        "PRAGMA page_size=512; PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, x, y);
         WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<{rows})
         INSERT INTO t SELECT i, 'old', zeroblob(300) FROM c;
         PRAGMA wal_checkpoint(truncate);"
    ))
    .unwrap();
    let before = std::fs::read(&path).unwrap();
    conn.execute_batch("UPDATE t SET x='new'; PRAGMA wal_checkpoint(truncate)")
        .unwrap();
    drop(conn);
    (before, std::fs::read(&path).unwrap())
}

/// Writes a log of `frame_count` frames and its index from nothing; SQLite must read the rows from them.
fn sqlite_reads_what_we_wrote(frame_count: u32) {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = before_and_after(dir.path(), frame_count.min(300));
    let header = DbHeader::parse(&after).unwrap();
    let page_size = header.page_size;
    let pages = u32::try_from(after.len() / page_size.len()).unwrap();
    let differ: Vec<u32> = (1..=pages)
        .filter(|n| {
            let at = pgno(*n).index() * page_size.len();
            before.get(at..at + page_size.len()) != Some(&after[at..at + page_size.len()])
        })
        .collect();

    // The differing pages over and over, so that the last round is whole; before that, garbage.
    let wal = wal_header(page_size.get());
    let mut bytes = wal.encode().to_vec();
    let (mut sum, mut held) = (wal.checksum(), Vec::new());
    for frame_no in 1..=frame_count {
        let left = frame_count - frame_no;
        let page = differ[differ.len() - 1 - left as usize % differ.len()];
        let at = pgno(page).index() * page_size.len();
        let mut data = after[at..at + page_size.len()].to_vec();
        if left as usize >= differ.len() {
            data.fill(0xee);
        }
        let commit = if left == 0 { pages } else { 0 };
        let frame = WalFrameHeader::next(&wal, sum, pgno(page), commit, &data);
        sum = frame.checksum;
        bytes.extend(frame.encode());
        bytes.extend(data);
        held.push(pgno(page));
    }
    let path = dir.path().join("db");
    std::fs::write(&path, &before).unwrap();
    std::fs::write(dir.path().join("db-wal"), &bytes).unwrap();

    let mut index = WalIndex::new(Vec::new());
    let empty = WalIndexHeader {
        frame_checksum: sum,
        ..WalIndexHeader::of_empty(&wal, pages)
    };
    let built = index.build(held, &empty).unwrap();
    let shm_path = dir.path().join("db-shm");
    let dms = hold_dms(&shm_path);
    std::fs::write(&shm_path, index.shm()).unwrap();

    let conn = Connection::open(&path).unwrap();
    let old: i64 = conn
        .query_row("SELECT count(*) FROM t WHERE x='old'", [], |r| r.get(0))
        .unwrap();
    let new: i64 = conn
        .query_row("SELECT count(*) FROM t WHERE x='new'", [], |r| r.get(0))
        .unwrap();
    let whole = frame_count as usize >= differ.len();
    assert!(
        !whole || (old == 0 && new == i64::from(frame_count.min(300))),
        "{old} old, {new} new"
    );
    assert_eq!(old + new, i64::from(frame_count.min(300)));
    let ok: String = conn
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .unwrap();
    assert_eq!(ok, "ok");
    let now = WalIndex::new(std::fs::read(&shm_path).unwrap());
    assert_eq!(
        now.header().unwrap(),
        built,
        "SQLite took our index and did not rebuild it"
    );

    // SQLite goes on from our index, and we from SQLite's.
    conn.execute_batch(
        "PRAGMA wal_autocheckpoint=0; INSERT INTO t VALUES (100000, 'mine', zeroblob(300))",
    )
    .unwrap();
    let theirs = WalIndex::new(std::fs::read(&shm_path).unwrap());
    let header = theirs.header().unwrap();
    assert!(header.mx_frame > frame_count && header.change == built.change + 1);
    let log = std::fs::read(dir.path().join("db-wal")).unwrap();
    let mut reader = WalReader::of_file(&log).unwrap();
    let mut last = BTreeMap::new();
    while let Some(commit) = reader.next_commit() {
        last.extend(commit.frames().map(|f| (f.header.pgno, f.frame_no)));
    }
    assert_eq!(reader.cursor().checksum, header.frame_checksum);
    assert_eq!(reader.cursor().frame_no, header.mx_frame);
    for (page, frame_no) in last {
        assert_eq!(theirs.find(page, header.mx_frame).unwrap(), Some(frame_no));
    }
    drop((conn, dms));
}

#[test]
fn sqlite_reads_1_frame_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let conn = Connection::open(&path).unwrap();
    conn.execute_batch("PRAGMA page_size=65536; PRAGMA journal_mode=wal; CREATE TABLE t(x)")
        .unwrap();
    drop(conn);
    let mut page_2 = std::fs::read(&path).unwrap()[65536..].to_vec();
    let scratch = Connection::open(dir.path().join("other")).unwrap();
    scratch
        .execute_batch("PRAGMA page_size=65536; CREATE TABLE t(x); INSERT INTO t VALUES ('hello')")
        .unwrap();
    drop(scratch);
    page_2.copy_from_slice(&std::fs::read(dir.path().join("other")).unwrap()[65536..]);

    let wal = wal_header(65536);
    let frame = WalFrameHeader::next(&wal, wal.checksum(), pgno(2), 2, &page_2);
    let log = [&wal.encode()[..], &frame.encode(), &page_2].concat();
    assert_eq!(frame_offset(wal.page_size, 2), log.len() as u64);
    std::fs::write(dir.path().join("db-wal"), log).unwrap();
    let mut index = WalIndex::new(Vec::new());
    let empty = WalIndexHeader::of_empty(&wal, 2);
    let header = WalIndexHeader {
        frame_checksum: frame.checksum,
        ..empty
    };
    let built = index.build([pgno(2)], &header).unwrap();
    let shm_path = dir.path().join("db-shm");
    let _dms = hold_dms(&shm_path);
    std::fs::write(&shm_path, index.shm()).unwrap();

    let conn = Connection::open(&path).unwrap();
    let x: String = conn.query_row("SELECT x FROM t", [], |r| r.get(0)).unwrap();
    assert_eq!(x, "hello");
    assert_eq!(
        WalIndex::new(std::fs::read(&shm_path).unwrap())
            .header()
            .unwrap(),
        built
    );
}

#[test]
fn sqlite_reads_4062_frames_of_ours() {
    sqlite_reads_what_we_wrote(4062);
}

#[test]
fn sqlite_reads_4063_frames_of_ours() {
    sqlite_reads_what_we_wrote(4063);
}

#[test]
fn sqlite_reads_10000_frames_of_ours() {
    sqlite_reads_what_we_wrote(10000);
}

/// A live connection sees a transaction that we append and publish, and a reader keeps its snapshot.
#[test]
fn a_live_reader_sees_what_is_published_and_keeps_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = before_and_after(dir.path(), 3);
    let path = dir.path().join("db");
    std::fs::write(&path, &before).unwrap();
    let open = || Connection::open(&path).unwrap();
    let (reader, other) = (open(), open());
    let count = |conn: &Connection| -> i64 {
        conn.query_row("SELECT count(*) FROM t WHERE x='new'", [], |r| r.get(0))
            .unwrap()
    };
    reader.execute_batch("BEGIN").unwrap();
    assert_eq!((count(&reader), count(&other)), (0, 0));

    let wal = wal_header(512);
    let (mut log, mut sum) = (wal.encode().to_vec(), wal.checksum());
    let shm_path = dir.path().join("db-shm");
    let mut index = WalIndex::new(std::fs::read(&shm_path).unwrap());
    let pages = u32::try_from(after.len() / 512).unwrap();
    for (n, data) in (1..=pages).zip(after.chunks(512)) {
        let frame =
            WalFrameHeader::next(&wal, sum, pgno(n), if n == pages { pages } else { 0 }, data);
        sum = frame.checksum;
        log.extend(frame.encode());
        log.extend(data);
        index.append(n, pgno(n)).unwrap();
    }
    std::fs::write(dir.path().join("db-wal"), log).unwrap();
    let was = index.header().unwrap();
    assert_eq!(
        (was.page_size, was.mx_frame),
        (None, 0),
        "SQLite made it without a log"
    );
    let header = WalIndexHeader {
        change: was.change + 1,
        mx_frame: pages,
        frame_checksum: sum,
        ..WalIndexHeader::of_empty(&wal, pages)
    };
    index.publish(&header).unwrap();
    let file = OpenOptions::new().write(true).open(&shm_path).unwrap();
    let memory = index.into_shm();
    // SQLite's locks and read marks in between are not ours to write.
    let write = std::os::unix::fs::FileExt::write_all_at;
    write(&file, &memory[136..], 136).unwrap();
    write(&file, &memory[48..96], 48).unwrap();
    write(&file, &memory[..48], 0).unwrap();
    drop(file);
    assert_eq!((count(&reader), count(&other)), (0, 3));
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(count(&reader), 3);
}
