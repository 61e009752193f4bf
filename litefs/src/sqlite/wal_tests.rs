use std::collections::BTreeMap;
use std::fmt::Write as _;

use proptest::prelude::*;
use rusqlite::Connection;

use super::*;

const HEADER: WalHeader = WalHeader {
    order: ByteOrder::Little,
    page_size: match PageSize::new(512) {
        Some(n) => n,
        None => panic!(),
    },
    checkpoint_seq: 3,
    salts: WalSalts(0x0102_0304, 0xa0b0_c0d0),
};

/// Writes a log: page, commit size, fill byte of each frame.
fn log(header: &WalHeader, frames: &[(u32, u32, u8)]) -> Vec<u8> {
    let mut bytes = header.encode().to_vec();
    let mut sum = header.checksum();
    for &(pgno, commit, fill) in frames {
        let data = vec![fill; header.page_size.len()];
        let frame = WalFrameHeader::next(header, sum, Pgno::new(pgno).unwrap(), commit, &data);
        sum = frame.checksum;
        bytes.extend(frame.encode());
        bytes.extend(data);
    }
    bytes
}

fn commits(bytes: &[u8]) -> (Vec<(u32, u32)>, WalEnd) {
    let mut reader = WalReader::of_file(bytes).unwrap();
    let commits = std::iter::from_fn(|| reader.next_commit());
    let commits = commits.map(|c| (c.end.frame_no, c.commit)).collect();
    (commits, reader.end().unwrap())
}

const FRAMES: &[(u32, u32, u8)] = &[
    (1, 0, 1),
    (2, 2, 2),
    (2, 0, 3),
    (1, 0, 4),
    (3, 3, 5),
    (1, 0, 6),
];

#[test]
fn reader_ok() {
    for order in [ByteOrder::Little, ByteOrder::Big] {
        let header = WalHeader { order, ..HEADER };
        let bytes = log(&header, FRAMES);
        assert_eq!(WalHeader::decode(&bytes), Ok(header));
        assert_eq!(commits(&bytes), (vec![(2, 2), (5, 3)], WalEnd::Bytes));

        let mut reader = WalReader::of_file(&bytes).unwrap();
        let first = reader.next_commit().unwrap();
        assert_eq!((first.start, first.end), (header.start(), reader.cursor()));
        let second = reader.next_commit().unwrap();
        let frames: Vec<_> = second
            .frames()
            .map(|f| (f.frame_no, f.header.pgno.get(), f.data[511]))
            .collect();
        assert_eq!(frames, [(3, 2, 3), (4, 1, 4), (5, 3, 5)]);

        let offset = usize::try_from(first.end.offset(header.page_size)).unwrap();
        let mut resumed = WalReader::new(header, first.end, &bytes[offset..]);
        assert_eq!(resumed.next_commit(), Some(second));
        assert_eq!(
            (resumed.next_commit(), resumed.cursor().frame_no),
            (None, 6)
        );
    }
}

#[test]
fn reader_salt_mismatch() {
    let mut bytes = log(&HEADER, FRAMES);
    let at = usize::try_from(frame_offset(HEADER.page_size, 4)).unwrap();
    for salt in [8, 12] {
        bytes[at + salt] ^= 1;
        assert_eq!(commits(&bytes), (vec![(2, 2)], WalEnd::Salts));
        bytes[at + salt] ^= 1;
    }
    let restarted = WalHeader {
        salts: HEADER.salts.restarted(7),
        ..HEADER
    };
    bytes[..WAL_HEADER_LEN].copy_from_slice(&restarted.encode());
    assert_eq!(
        commits(&bytes),
        (vec![], WalEnd::Salts),
        "the old round is not read"
    );
}

#[test]
fn reader_frame_checksum_mismatch() {
    let bytes = log(&HEADER, FRAMES);
    let at = usize::try_from(frame_offset(HEADER.page_size, 4)).unwrap();
    for byte in (0..8).chain(16..24).chain([24, 300, 535]) {
        let mut bad = bytes.clone();
        bad[at + byte] ^= 0x80;
        assert_eq!(
            commits(&bad),
            (vec![(2, 2)], WalEnd::Checksum),
            "byte {byte}"
        );
    }
}

#[test]
fn reader_page_zero() {
    let mut bytes = log(&HEADER, FRAMES);
    let at = usize::try_from(frame_offset(HEADER.page_size, 1)).unwrap();
    bytes[at..at + 4].fill(0);
    assert_eq!(commits(&bytes), (vec![], WalEnd::Pgno));
}

#[test]
fn header_zero_length_and_partial() {
    let bytes = HEADER.encode();
    for len in 0..WAL_HEADER_LEN {
        assert_eq!(
            WalHeader::decode(&bytes[..len]),
            Err(WalHeaderError::Short { len })
        );
    }
}

#[test]
fn header_bad_magic_checksum_version_page_size() {
    let decode = |at: usize, word: u32, sum: bool| {
        let mut bytes = HEADER.encode();
        bytes[at..at + 4].copy_from_slice(&word.to_be_bytes());
        if sum {
            let sum = WalChecksum::default().update(ByteOrder::Little, &bytes[..24]);
            bytes[24..].copy_from_slice(&sum.encode());
        }
        WalHeader::decode(&bytes).unwrap_err()
    };
    assert_eq!(
        decode(0, 0x377f_0684, true),
        WalHeaderError::Magic { found: 0x377f_0684 }
    );
    assert_eq!(
        decode(4, 3_007_001, true),
        WalHeaderError::Version { found: 3_007_001 }
    );
    assert_eq!(
        decode(8, 1000, true),
        WalHeaderError::PageSize { found: 1000 }
    );
    for at in (0..WAL_HEADER_LEN).step_by(4).skip(3) {
        assert_eq!(decode(at, 0x5555_5555, false), WalHeaderError::Checksum);
    }
}

#[test]
fn reader_partial_frame_header_header_only_partial_data() {
    let bytes = log(&HEADER, FRAMES);
    let at = usize::try_from(frame_offset(HEADER.page_size, 3)).unwrap();
    assert_eq!(commits(&bytes[..at]), (vec![(2, 2)], WalEnd::Bytes));
    for len in [1, 23, WAL_FRAME_HEADER_LEN, 25, 24 + 511] {
        assert_eq!(
            commits(&bytes[..at + len]),
            (vec![(2, 2)], WalEnd::PartialFrame { len })
        );
    }
    assert_eq!(frame_offset(HEADER.page_size, 7), bytes.len() as u64);
}

#[test]
fn every_cut_and_every_flip_yields_a_prefix() {
    let bytes = log(&HEADER, FRAMES);
    let (all, _) = commits(&bytes);
    for len in WAL_HEADER_LEN..bytes.len() {
        assert!(all.starts_with(&commits(&bytes[..len]).0), "cut at {len}");
    }
    for at in WAL_HEADER_LEN..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        let frame = (at - WAL_HEADER_LEN) / (24 + 512) + 1;
        let intact = all.iter().filter(|c| (c.0 as usize) < frame).count();
        assert_eq!(commits(&bad).0, all[..intact], "flip at {at}");
    }
}

#[test]
fn checksum_equals_the_word_by_word_definition() {
    let bytes: Vec<u8> = (0..4096u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    for (order, load) in [
        (ByteOrder::Little, u32::from_le_bytes as fn([u8; 4]) -> u32),
        (ByteOrder::Big, u32::from_be_bytes),
    ] {
        let (mut a, mut b) = (1u32, u32::MAX);
        for pair in bytes.as_chunks::<4>().0.chunks(2) {
            a = a.wrapping_add(load(pair[0])).wrapping_add(b);
            b = b.wrapping_add(load(pair[1])).wrapping_add(a);
        }
        assert_eq!(
            WalChecksum(1, u32::MAX).update(order, &bytes),
            WalChecksum(a, b)
        );
    }
}

/// What a database looks like after the committed part of a log, by our reader.
fn apply(db: &mut BTreeMap<u32, Vec<u8>>, wal: &[u8]) -> usize {
    let Ok(mut reader) = WalReader::of_file(wal) else {
        return 0;
    };
    let mut count = 0;
    while let Some(commit) = reader.next_commit() {
        for frame in commit.frames() {
            db.insert(frame.header.pgno.get(), frame.data.to_vec());
        }
        db.retain(|pgno, _| *pgno <= commit.commit);
        count += 1;
    }
    count
}

fn pages_of(bytes: &[u8], page_size: usize) -> BTreeMap<u32, Vec<u8>> {
    (1..)
        .zip(bytes.chunks(page_size).map(<[u8]>::to_vec))
        .collect()
}

/// Oracle: the pages our reader finds, over the database file, are those SQLite checkpoints.
fn agrees_with_sqlite(page_size: usize, steps: &[u8], cut: usize, flip: Option<usize>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let conn = Connection::open(&path).unwrap();
    let mut sql = format!("PRAGMA page_size={page_size}; PRAGMA journal_mode=wal;");
    sql.push_str("PRAGMA wal_autocheckpoint=0; PRAGMA cache_size=10; CREATE TABLE t(id INTEGER PRIMARY KEY, x);");
    for (n, step) in steps.iter().enumerate() {
        let _ = match step % 8 {
            0 => write!(
                sql,
                "INSERT INTO t(x) VALUES (randomblob({}));",
                u64::from(*step) * 40
            ),
            1 => write!(sql, "DELETE FROM t WHERE id % 3 = {};", n % 3),
            2 => write!(sql, "BEGIN; UPDATE t SET x = randomblob(900); ROLLBACK;"),
            // The write begins a new round; else cutting the log would leave a database that is ahead of it.
            3 => write!(
                sql,
                "PRAGMA wal_checkpoint(restart); INSERT INTO t(x) VALUES ({n});"
            ),
            4 => write!(
                sql,
                "CREATE TABLE t{n}(x); INSERT INTO t{n} VALUES (zeroblob(9000));"
            ),
            5 => write!(sql, "VACUUM;"),
            6 => write!(sql, "UPDATE t SET x = x || 'y' WHERE id = {n};"),
            _ => write!(
                sql,
                "INSERT INTO t(x) WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<{}) \
                 SELECT randomblob(300) FROM c;",
                step % 64
            ),
        };
    }
    conn.execute_batch(&sql).unwrap();
    let db = std::fs::read(&path).unwrap();
    let mut wal = std::fs::read(dir.path().join("db-wal")).unwrap();
    wal.truncate(wal.len() - cut.min(wal.len()));
    if let Some(at) = flip.filter(|_| !wal.is_empty()) {
        let at = at % wal.len();
        wal[at] ^= 0x10;
    }

    let mut ours = pages_of(&db, page_size);
    apply(&mut ours, &wal);

    let copy = dir.path().join("copy");
    std::fs::write(&copy, &db).unwrap();
    std::fs::write(dir.path().join("copy-wal"), &wal).unwrap();
    let other = Connection::open(&copy).unwrap();
    let checkpointed = other.query_row("PRAGMA wal_checkpoint(truncate)", [], |r| {
        r.get::<_, i64>(0)
    });
    assert_eq!(checkpointed, Ok(0));
    drop(other);
    let theirs = pages_of(&std::fs::read(&copy).unwrap(), page_size);
    assert_eq!(ours.len(), theirs.len());
    assert!(ours == theirs);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn reader_agrees_with_sqlite(
                shift in prop_oneof![9usize..=12, Just(16)],
        steps in proptest::collection::vec(any::<u8>(), 0..25),
        cut in prop_oneof![Just(0usize), 1usize..5000],
        flip in proptest::option::of(any::<usize>()),
    ) {
        // A flipped page size can make SQLite refuse the file; frames are what is flipped here.
        let flip = flip.map(|at| at.max(WAL_HEADER_LEN));
        agrees_with_sqlite(1 << shift, &steps, cut, flip);
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let mut reader = WalReader::new(HEADER, HEADER.start(), &bytes);
        while reader.next_commit().is_some() {}
        prop_assert!(reader.end().is_some());
        prop_assert!(WalHeader::decode(&bytes).is_err());
    }
}
