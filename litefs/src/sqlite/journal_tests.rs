use proptest::prelude::*;

use super::*;

const PAGE: usize = 512;

fn pgno(n: u32) -> Pgno {
    Pgno::new(n).unwrap()
}

fn header(count: u32, nonce: u32) -> Vec<u8> {
    let mut bytes = JOURNAL_MAGIC.to_vec();
    for word in [count, nonce, 20, 512, 512] {
        bytes.extend(u32::to_be_bytes(word));
    }
    bytes.resize(512, 0);
    bytes
}

fn record(pgno: u32, fill: u8, nonce: u32) -> Vec<u8> {
    // Bytes 312 and 112 are summed.
    let sum = nonce.wrapping_add(2 * u32::from(fill));
    [&pgno.to_be_bytes()[..], &[fill; PAGE], &sum.to_be_bytes()].concat()
}

fn segment(count: u32, nonce: u32, pages: &[u32]) -> Vec<u8> {
    let mut bytes = header(count, nonce);
    for n in pages {
        bytes.extend(record(*n, n.to_be_bytes()[3], nonce));
    }
    bytes
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(512), 0);
}

fn numbers(pages: &[(Pgno, u64)]) -> Vec<u32> {
    pages.iter().map(|p| p.0.get()).collect()
}

fn lenient(bytes: &[u8]) -> Vec<u32> {
    numbers(&journal_pages(bytes).unwrap().pages)
}

fn strict(bytes: &[u8]) -> Vec<u32> {
    numbers(&playback(bytes).unwrap().pages)
}

#[test]
fn several_segments_each_with_its_nonce() {
    let mut bytes = segment(2, 7, &[3, 1]);
    pad(&mut bytes);
    bytes.extend(segment(3, u32::MAX, &[9, 20, 2]));
    for pages in [lenient(&bytes), strict(&bytes)] {
        assert_eq!(pages, [3, 1, 9, 20, 2]);
    }
    let first = journal_pages(bytes.as_slice()).unwrap();
    assert_eq!(
        (first.initial_page_count, first.pages[0]),
        (20, (pgno(3), 516))
    );
}

#[test]
fn the_record_count_rules() {
    assert_eq!(lenient(&segment(0, 1, &[3, 1])), [0; 0]);
    assert_eq!(lenient(&segment(1, 1, &[3, 1])), [3]);
    assert_eq!(lenient(&segment(u32::MAX, 1, &[3, 1])), [3, 1]);
    assert_eq!(
        lenient(&segment(9, 1, &[3, 1])),
        [3, 1],
        "a cut tail is left out"
    );
}

#[test]
fn playback_stops_at_the_first_bad_record() {
    let mut bytes = segment(3, 7, &[3, 4, 5]);
    bytes[512 + 520 + 4 + 312] ^= 1;
    assert_eq!(strict(&bytes), [3]);
    assert_eq!(lenient(&bytes), [3, 4, 5]);
    assert_eq!(
        strict(&segment(3, 7, &[3, 21, 5])),
        [3, 5],
        "past the end there is nothing to restore"
    );
    assert_eq!(strict(&segment(3, 7, &[3, 0, 5])), [3]);
}

#[test]
fn an_unsynced_segment_is_read_leniently_only() {
    let mut bytes = segment(1, 7, &[3]);
    pad(&mut bytes);
    let at = bytes.len();
    bytes.extend(segment(0, 8, &[4, 5]));
    bytes[at..at + 12].fill(0);
    bytes.extend(record(999, 1, 0));
    bytes.extend(record(6, 1, 0));
    assert_eq!(lenient(&bytes), [3, 4, 5]);
    assert_eq!(strict(&bytes), [3]);
    bytes[at + 19] ^= 1;
    assert_eq!(
        lenient(&bytes),
        [3],
        "left from a transaction on another size"
    );
}

#[test]
fn hot_zeroed_and_torn_headers() {
    let bytes = segment(1, 7, &[3]);
    assert!(is_hot_header(&bytes) && !is_hot_header(&[]));
    let mut zeroed = bytes.clone();
    zeroed[..28].fill(0);
    assert!(!is_hot_header(&zeroed) && is_zeroed_header(&zeroed[..28]));
    assert!(!is_zeroed_header(&zeroed) && !is_zeroed_header(&zeroed[..12]));
    assert!(matches!(
        journal_pages(zeroed.as_slice()),
        Err(JournalError::NoHeader)
    ));
    for (at, value) in [(20, 0xff), (22, 3), (23, 1), (25, 2), (27, 1)] {
        let mut bad = bytes.clone();
        bad[at] = value;
        assert!(
            matches!(playback(bad.as_slice()), Err(JournalError::Sizes { .. })),
            "byte {at}"
        );
    }
    for len in 0..512 {
        assert!(
            matches!(playback(&bytes[..len]), Err(JournalError::NoHeader)),
            "{len} bytes"
        );
    }
}

#[test]
fn the_super_journal_is_named_at_the_tail() {
    let name = b"/data/app.db-mj12345678\xc3\xa9";
    let lock_pgno = PageSize::new(512).unwrap().lock_pgno().get();
    for signed in [false, true] {
        let sum: i64 = name
            .iter()
            .map(|b| {
                if signed {
                    i64::from(b.cast_signed())
                } else {
                    i64::from(*b)
                }
            })
            .sum();
        let mut bytes = segment(u32::MAX, 7, &[3, 4]);
        bytes.extend(lock_pgno.to_be_bytes());
        bytes.extend(name);
        bytes.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
        bytes.extend(u32::try_from(sum).unwrap().to_be_bytes());
        bytes.extend(JOURNAL_MAGIC);
        // Long enough for the name to be taken for a record.
        assert_eq!(
            super_journal(bytes.as_slice()).unwrap().as_deref(),
            Some(&name[..])
        );
        assert_eq!(strict(&bytes), [3, 4]);
        for at in bytes.len() - 16 - name.len()..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(super_journal(bad.as_slice()).unwrap(), None, "byte {at}");
        }
    }
    assert_eq!(super_journal([0u8; 15].as_slice()).unwrap(), None);
}

#[test]
fn leaves_of_a_trunk_even_a_damaged_one() {
    let trunk = |next: u32, count: u32, leaves: &[u32]| {
        let words = [next, count].into_iter().chain(leaves.iter().copied());
        let mut page: Vec<u8> = words.flat_map(u32::to_be_bytes).collect();
        page.resize(PAGE, 0);
        freelist_leaf_candidates(&page, 20)
            .map(Pgno::get)
            .collect::<Vec<_>>()
    };
    assert_eq!(trunk(0, 3, &[4, 20, 2, 9]), [4, 20, 2]);
    assert_eq!(trunk(999, 3, &[4, 21, 1]), [4]);
    assert_eq!(trunk(0, 126, &[4]), [4], "126 is what fits");
    assert_eq!(trunk(0, 127, &[4]), [0; 0]);
    assert_eq!(freelist_leaf_candidates(&[0; 7], 20).count(), 0);
}

#[test]
fn freelist_of_a_real_database_and_of_a_cycle() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let conn = rusqlite::Connection::open(&path).unwrap();
    conn.execute_batch(
        "PRAGMA page_size=512; CREATE TABLE t(x); INSERT INTO t VALUES (zeroblob(200000)); DROP TABLE t",
    )
    .unwrap();
    let count: u32 = conn
        .query_row("PRAGMA freelist_count", [], |r| r.get(0))
        .unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let leaves = freelist_leaves(bytes.as_slice()).unwrap();
    let trunks = count - u32::try_from(leaves.len()).unwrap();
    assert!((2..10).contains(&trunks), "{trunks} trunks of {count}");
    assert_eq!(
        freelist_leaves(&std::fs::File::open(&path).unwrap()).unwrap(),
        leaves
    );

    let trunk = DbHeader::parse(&bytes).unwrap().freelist_trunk.unwrap();
    let at = trunk.index() * PAGE;
    bytes[at..at + 4].copy_from_slice(&trunk.get().to_be_bytes());
    assert!(freelist_leaves(bytes.as_slice()).unwrap().len() < leaves.len());
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 28..4000),
        count in prop_oneof![0u32..5, Just(u32::MAX), any::<u32>()],
        whole in any::<bool>(),
    ) {
        bytes[..28].copy_from_slice(&header(count, 7)[..28]);
        if !whole {
            bytes[27] = 1;
        }
        let _ = journal_pages(bytes.as_slice());
        let _ = playback(bytes.as_slice());
        let _ = super_journal(bytes.as_slice());
        let _ = changed_pages(bytes.as_slice(), 9);
        let _ = freelist_leaves(bytes.as_slice());
    }

    #[test]
    fn every_cut_plays_back_a_prefix(cut in 512usize..3000) {
        let mut bytes = segment(2, 7, &[3, 1]);
        pad(&mut bytes);
        bytes.extend(segment(2, 9, &[9, 20]));
        let cut = cut.min(bytes.len());
        prop_assert!([3, 1, 9, 20].starts_with(&strict(&bytes[..cut])));
    }
}
