//! Whole files: golden bytes, a model, and everything a disk or a stranger may do to the bytes.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Pages = BTreeMap<Pgno, Vec<u8>>;

fn pgno(n: u32) -> Pgno {
    Pgno::new(n).unwrap()
}

fn size(bytes: u32) -> PageSize {
    PageSize::new(bytes).unwrap()
}

fn header(page_size: PageSize, min: u64, max: u64, commit: u32) -> Header {
    Header {
        flags: HeaderFlags::NO_CHECKSUM,
        page_size,
        commit,
        min_txid: Txid(min),
        max_txid: Txid(max),
        timestamp_ms: 1_700_000_000_000 + max.cast_signed(),
        pre_apply_checksum: None,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0,
    }
}

fn encode(header: Header, pages: &Pages, post: Option<Checksum>) -> Result<Vec<u8>, LtxError> {
    let mut encoder = Encoder::new(header, vec![0xee; 3])?;
    for (&pgno, data) in pages {
        encoder.page(pgno, data)?;
    }
    encoder.finish(post)
}

fn decode(bytes: &[u8]) -> Result<(Summary, Pages), LtxError> {
    let mut decoder = Decoder::new(bytes)?;
    let mut buf = vec![0; decoder.header().page_size.len()];
    let mut pages = Pages::new();
    while let Some(pgno) = decoder.next_page(&mut buf)? {
        assert_eq!(pages.insert(pgno, buf.clone()), None);
    }
    assert_eq!(decoder.next_page(&mut buf)?, None);
    Ok((decoder.finish()?, pages))
}

/// A page with something to compress and something not, different for each `seed`.
fn page(page_size: PageSize, seed: u32) -> Vec<u8> {
    let hard =
        (0..page_size.get() / 4).map(|i| (i ^ seed).wrapping_mul(0x9e37_79b1).to_be_bytes()[0]);
    let mut data: Vec<u8> = hard.collect();
    data.extend(b"the same again ".iter().cycle().take(page_size.len() / 4));
    data.resize(page_size.len(), seed.to_be_bytes()[3]);
    data
}

fn checksum_of(pages: &Pages) -> Checksum {
    pages.iter().fold(Checksum::EMPTY, |sum, (&pgno, data)| {
        sum ^ page_checksum(pgno, data)
    })
}

/// A snapshot of three pages that keeps checksums: the small file that is cut and flipped below.
fn small_file() -> (Vec<u8>, Pages) {
    let pages: Pages = (1..=3).map(|n| (pgno(n), page(size(512), n))).collect();
    let tracked = Header {
        flags: HeaderFlags::TRACKED,
        ..header(size(512), 1, 9, 3)
    };
    (
        encode(tracked, &pages, Some(checksum_of(&pages))).unwrap(),
        pages,
    )
}

mod golden {
    use super::*;

    fn by_hand() -> (Vec<u8>, Header, Pages, Checksum) {
        let text = include_str!("../../testdata/ltx/by-hand.hex");
        let fields = text
            .lines()
            .flat_map(|l| l.split('#').next().unwrap().split_whitespace());
        let bytes = fields
            .map(|hex| u8::from_str_radix(hex, 16).unwrap())
            .collect();
        let header = Header {
            flags: HeaderFlags::TRACKED,
            timestamp_ms: 1_700_000_000_123,
            pre_apply_checksum: Some(Checksum::new(0x1122_3344_5566_7788)),
            wal_offset: 32,
            wal_size: 1128,
            wal_salt1: 0xaabb_ccdd,
            wal_salt2: 0x0102_0304,
            node_id: 7,
            ..header(size(512), 2, 3, 3)
        };
        let counting: Vec<u8> = (0..=255).chain(0..=255).collect();
        let pages = Pages::from([(pgno(1), vec![0; 512]), (pgno(3), counting)]);
        let mut database = pages.clone();
        database.insert(pgno(2), vec![2; 512]);
        (bytes, header, pages, checksum_of(&database))
    }

    #[test]
    fn the_file_made_by_hand_is_read() {
        let (bytes, header, pages, post_apply) = by_hand();
        let (summary, decoded) = decode(&bytes).unwrap();
        assert_eq!((summary.header.clone(), decoded), (header, pages));
        let pos = summary.post_apply_pos().unwrap();
        assert_eq!((pos.txid, pos.post_apply_checksum), (Txid(3), post_apply));
    }

    /// The LZ4 blocks are the encoder's choice: should a newer lz4_flex choose others, and only
    /// then, this may compare what is decoded instead.
    #[test]
    fn the_file_made_by_hand_is_written() {
        let (bytes, header, pages, post_apply) = by_hand();
        assert_eq!(encode(header, &pages, Some(post_apply)).unwrap(), bytes);
    }

    fn restores_to_the_same_database(files: [&[u8]; 3]) {
        let restored = include_bytes!("../../testdata/ltx/litestream-restored.db");
        let expected: Pages = (1..)
            .map(pgno)
            .zip(restored.chunks(512).map(<[u8]>::to_vec))
            .collect();
        let mut applied = Pages::new();
        for (i, file) in (1..).zip(files) {
            let (summary, pages) = decode(file).unwrap();
            assert_eq!(
                (summary.header.min_txid, summary.header.max_txid),
                (Txid(i), Txid(i))
            );
            assert_eq!(summary.trailer.post_apply_checksum, None);
            applied.extend(pages);
            applied.retain(|pgno, _| pgno.get() <= summary.header.commit);
        }
        assert_eq!(applied, expected);
        let (summary, pages) = decode(&compact(&files).unwrap()).unwrap();
        assert_eq!((summary.header.max_txid, pages), (Txid(3), expected));
    }

    #[test]
    fn litestream_0_5_17_files_in_the_block_form_are_read() {
        restores_to_the_same_database([
            include_bytes!(
                "../../testdata/ltx/litestream-0.5.17/0000000000000001-0000000000000001.ltx"
            ),
            include_bytes!(
                "../../testdata/ltx/litestream-0.5.17/0000000000000002-0000000000000002.ltx"
            ),
            include_bytes!(
                "../../testdata/ltx/litestream-0.5.17/0000000000000003-0000000000000003.ltx"
            ),
        ]);
    }

    #[test]
    fn litestream_0_5_5_files_in_the_frame_form_are_read() {
        restores_to_the_same_database([
            include_bytes!(
                "../../testdata/ltx/litestream-0.5.5/0000000000000001-0000000000000001.ltx"
            ),
            include_bytes!(
                "../../testdata/ltx/litestream-0.5.5/0000000000000002-0000000000000002.ltx"
            ),
            include_bytes!(
                "../../testdata/ltx/litestream-0.5.5/0000000000000003-0000000000000003.ltx"
            ),
        ]);
    }
}

mod damage {
    use super::*;

    /// Runs every way of reading, of which none may panic.
    fn read_all_ways(bytes: &[u8]) {
        let _ = compact(&[bytes]);
        let Ok(decoder) = Decoder::new(bytes) else {
            return;
        };
        let mut buf = vec![0; decoder.header().page_size.len()];
        for n in [1, 2, 3, u32::MAX] {
            let _ = decoder.find(pgno(n), &mut buf);
        }
        for &entry in decoder.index().iter().flat_map(PageIndex::entries) {
            let _ = decoder.page_at(entry, &mut buf);
        }
    }

    /// A flipped bit is an error, or (in an LZ4 block, of which several may say the same) makes no
    /// difference to what is read. Returns how many made none.
    fn flip_every_bit(bytes: &[u8]) -> usize {
        let whole = decode(bytes).unwrap();
        let mut harmless = 0;
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(read) = decode(&flipped) {
                assert_eq!(read, whole, "bit {bit}");
                harmless += 1;
            }
            read_all_ways(&flipped);
        }
        harmless
    }

    #[test]
    fn every_truncation_is_detected() {
        let (bytes, _) = small_file();
        verify(&bytes).unwrap();
        for len in 0..bytes.len() {
            assert!(verify(&bytes[..len]).is_err(), "{len}");
            read_all_ways(&bytes[..len]);
        }
        assert!(verify(&[&bytes[..], &[0]].concat()).is_err());
        assert!(verify(&[&bytes[..], &bytes].concat()).is_err());
    }

    #[test]
    fn every_flipped_bit_is_detected_or_harmless() {
        let (bytes, _) = small_file();
        // A match may reach as far back into a repeated text in more than one way.
        let harmless = flip_every_bit(&bytes);
        assert!(harmless < 20, "{harmless} of {} bits", bytes.len() * 8);
    }

    #[test]
    fn every_flipped_bit_of_the_frame_form_is_detected_or_harmless() {
        flip_every_bit(include_bytes!(
            "../../testdata/ltx/litestream-0.5.5/0000000000000002-0000000000000002.ltx"
        ));
    }

    /// Writes the checksum that the file would have, so that the checks before it are reached.
    fn forge(bytes: &mut [u8], pages: &Pages) {
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64GoIso);
        let mut at = HEADER_LEN;
        digest.update(&bytes[..at]);
        for data in pages.values() {
            let block_len = u32::from_be_bytes(bytes[at + 6..at + 10].try_into().unwrap());
            digest.update(&bytes[at..at + 10]);
            digest.update(data);
            at += 10 + block_len as usize;
        }
        let end = bytes.len() - 8;
        digest.update(&bytes[at..end]);
        bytes[end..].copy_from_slice(&Checksum::new(digest.finalize()).get().to_be_bytes());
    }

    #[test]
    fn a_forged_index_or_post_apply_checksum_is_detected() {
        let (mut bytes, pages) = small_file();
        forge(&mut bytes, &pages);
        assert_eq!(bytes, small_file().0);
        let index_len = Decoder::new(&bytes)
            .unwrap()
            .index()
            .unwrap()
            .entries()
            .len()
            * 4
            + 1;
        for back in (17..17 + 8 + index_len).chain([16 - 7]) {
            let mut forged = bytes.clone();
            let at = bytes.len() - back;
            forged[at] ^= 1;
            forge(&mut forged, &pages);
            let error = verify(&forged).unwrap_err();
            assert!(
                !matches!(error, LtxError::FileChecksum { .. }),
                "{back}: {error}"
            );
            read_all_ways(&forged);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(
            start in 0..3usize,
            patches in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30),
        ) {
            let mut bytes = match start {
                0 => small_file().0,
                1 => include_bytes!("../../testdata/ltx/litestream-0.5.5/0000000000000003-0000000000000003.ltx").to_vec(),
                _ => [&small_file().0[..100], &[0; 80][..]].concat(),
            };
            for (at, byte) in patches {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let _ = verify(&bytes);
            read_all_ways(&bytes);
        }
    }
}

mod round_trip {
    use super::*;

    #[test]
    fn pages_of_every_size_come_back() {
        for page_size in (9..=16).map(|bits| size(1 << bits)) {
            let mut pages: Pages = (1..=4).map(|n| (pgno(n), page(page_size, n))).collect();
            let random = (0..page_size.get()).map(|i| i.wrapping_mul(0x9e37_79b1).to_be_bytes()[1]);
            pages.insert(pgno(3), random.collect());
            pages.insert(pgno(4), vec![0; page_size.len()]);
            let bytes = encode(header(page_size, 1, 1, 4), &pages, None).unwrap();
            let (summary, decoded) = decode(&bytes).unwrap();
            assert_eq!((summary.page_count, &decoded), (4, &pages), "{page_size}");
            let copy = compact(&[&bytes]).unwrap();
            assert_eq!(copy, bytes, "{page_size}: blocks are copied as they are");
        }
    }

    #[test]
    fn a_page_that_does_not_compress_is_legal() {
        let noise: Vec<u8> = std::iter::repeat_with(rand::random::<u8>)
            .take(65_536)
            .collect();
        for bits in 9..=16 {
            let pages = Pages::from([(Pgno::ONE, noise[..1 << bits].to_vec())]);
            let bytes = encode(header(size(1 << bits), 2, 2, 1), &pages, None).unwrap();
            assert_eq!(decode(&bytes).unwrap().1, pages);
        }
    }

    #[test]
    fn a_page_is_found_by_its_number() {
        let (bytes, pages) = small_file();
        let decoder = Decoder::new(&bytes).unwrap();
        let mut buf = [0; 512];
        for (&pgno, data) in &pages {
            assert!(decoder.find(pgno, &mut buf).unwrap());
            assert_eq!(buf[..], data[..]);
        }
        assert!(!decoder.find(pgno(4), &mut buf).unwrap());
        assert!(decoder.find(pgno(1), &mut [0; 511]).is_err());
    }

    #[test]
    fn pages_out_of_place_are_refused_and_change_nothing() {
        let p = page(size(512), 0);
        let mut e = Encoder::new(header(size(512), 5, 5, 9), Vec::new()).unwrap();
        e.page(pgno(4), &p).unwrap();
        assert!(matches!(
            e.page(pgno(4), &p),
            Err(LtxError::PageOrder { .. })
        ));
        assert!(matches!(
            e.page(pgno(3), &p),
            Err(LtxError::PageOrder { .. })
        ));
        assert!(matches!(
            e.page(pgno(10), &p),
            Err(LtxError::PastCommit { .. })
        ));
        assert!(matches!(
            e.page(pgno(5), &p[1..]),
            Err(LtxError::PageLen { .. })
        ));
        e.page(pgno(9), &p).unwrap();
        let bytes = e.finish(None).unwrap();
        let expected = Pages::from([(pgno(4), p.clone()), (pgno(9), p.clone())]);
        assert_eq!(decode(&bytes).unwrap().1, expected);
    }

    #[test]
    fn a_snapshot_has_every_page_and_the_checksum_of_them() {
        let (_, mut pages) = small_file();
        let tracked = Header {
            flags: HeaderFlags::TRACKED,
            ..header(size(512), 1, 9, 3)
        };
        let wrong = encode(tracked.clone(), &pages, Some(Checksum::new(1)));
        assert!(matches!(wrong, Err(LtxError::DatabaseChecksum { .. })));
        let none = encode(tracked.clone(), &pages, None);
        assert!(matches!(none, Err(LtxError::PostApplyChecksum { .. })));
        for missing in [1, 2, 3] {
            let removed = pages.remove(&pgno(missing)).unwrap();
            let gap = encode(tracked.clone(), &pages, Some(checksum_of(&pages)));
            assert!(matches!(gap, Err(LtxError::SnapshotGap { want }) if want == missing));
            pages.insert(pgno(missing), removed);
        }
    }

    #[test]
    fn a_dropped_database_has_no_pages_and_the_empty_checksum() {
        for (min, pre_apply_checksum) in [(1, None), (2, Some(Checksum::new(5)))] {
            let dropped = Header {
                flags: HeaderFlags::TRACKED,
                pre_apply_checksum,
                ..header(size(512), min, 7, 0)
            };
            let bytes = encode(dropped.clone(), &Pages::new(), Some(Checksum::EMPTY)).unwrap();
            assert_eq!(verify(&bytes).unwrap().page_count, 0);
            assert_eq!(compact(&[&bytes]).unwrap(), bytes);
            assert!(encode(dropped, &Pages::new(), Some(Checksum::new(5))).is_err());
        }
    }

    #[test]
    fn the_lock_page_is_refused_and_its_neighbours_are_not() {
        for page_size in (9..=16).map(|bits| size(1 << bits)) {
            let lock = page_size.lock_pgno().get();
            let data = page(page_size, lock);
            let range = header(page_size, 2, 2, u32::MAX);
            let mut e = Encoder::new(range, Vec::new()).unwrap();
            e.page(pgno(lock - 1), &data).unwrap();
            let refused = e.page(pgno(lock), &data);
            assert!(
                matches!(refused, Err(LtxError::LockPage { .. })),
                "{page_size}"
            );
            e.page(pgno(lock + 1), &data).unwrap();
            e.page(pgno(u32::MAX), &data).unwrap();
            let bytes = e.finish(None).unwrap();
            let pgnos: Vec<u32> = decode(&bytes)
                .unwrap()
                .1
                .into_keys()
                .map(Pgno::get)
                .collect();
            assert_eq!(pgnos, [lock - 1, lock + 1, u32::MAX], "{page_size}");
        }
    }

    #[test]
    fn a_snapshot_of_more_than_a_gibibyte_passes_over_the_lock_page() {
        let page_size = size(65_536);
        let lock = page_size.lock_pgno().get();
        let data = vec![7; page_size.len()];
        for commit in [lock - 1, lock, lock + 1] {
            let mut e = Encoder::new(header(page_size, 1, 1, commit), Vec::new()).unwrap();
            for n in (1..=commit).filter(|&n| n != lock) {
                e.page(pgno(n), &data).unwrap();
            }
            let bytes = e.finish(None).unwrap();
            let page_count = verify(&bytes).unwrap().page_count;
            assert_eq!(page_count, commit - u32::from(commit >= lock));
        }
    }

    proptest! {
        #[test]
        fn any_pages_come_back(
            seeds in prop::collection::btree_map(1..5_000u32, any::<u32>(), 0..40),
            slack in 0..9u32,
            bits in 9..14u32,
        ) {
            let page_size = size(1 << bits);
            let pages: Pages = seeds.iter().map(|(&n, &s)| (pgno(n), page(page_size, s))).collect();
            let commit = seeds.keys().max().unwrap_or(&0) + slack;
            let range = header(page_size, 2, 3, commit);
            let bytes = encode(range.clone(), &pages, None).unwrap();
            let (summary, decoded) = decode(&bytes).unwrap();
            prop_assert_eq!((summary.header, &decoded), (range, &pages));
            let decoder = Decoder::new(&bytes).unwrap();
            let index = decoder.index().unwrap();
            let mut buf = vec![0; page_size.len()];
            for (&pgno, data) in &pages {
                decoder.page_at(index.find(pgno).unwrap(), &mut buf).unwrap();
                prop_assert_eq!(&buf, data);
            }
            prop_assert_eq!(index.entries().len(), pages.len());
        }
    }
}

mod compaction {
    use super::*;

    /// A database: `states[i]` is what transaction `i` left, and `states[0]` is empty.
    #[derive(Debug, Default)]
    struct Model {
        states: Vec<Pages>,
    }

    impl Model {
        /// Each transaction sets the size, writes some pages, and all that it adds.
        fn run(transactions: &[(u32, Vec<u32>)]) -> Model {
            let mut states = vec![Pages::new()];
            for (seed, (commit, dirty)) in (1..).zip(transactions) {
                let before = &states[states.len() - 1];
                let changed = |n: &u32| dirty.contains(n) || !before.contains_key(&pgno(*n));
                let mut after = before.clone();
                after.retain(|pgno, _| pgno.get() <= *commit);
                after.extend(
                    (1..=*commit)
                        .filter(changed)
                        .map(|n| (pgno(n), page(size(512), n << 8 | seed))),
                );
                states.push(after);
            }
            Model { states }
        }

        /// The range of the transactions from `min` to `max`: every page that any of them wrote.
        fn range(&self, min: usize, max: usize, tracked: bool) -> Vec<u8> {
            let after = &self.states[max];
            let written = |pgno: &Pgno| {
                (min..=max).any(|i| self.states[i - 1].get(pgno) != self.states[i].get(pgno))
            };
            let pages = after.iter().filter(|(n, _)| min == 1 || written(n));
            let range = header(
                size(512),
                min as u64,
                max as u64,
                u32::try_from(after.len()).unwrap(),
            );
            let header = Header {
                flags: if tracked {
                    HeaderFlags::TRACKED
                } else {
                    HeaderFlags::NO_CHECKSUM
                },
                pre_apply_checksum: (tracked && min > 1)
                    .then(|| checksum_of(&self.states[min - 1])),
                ..range
            };
            let pages = pages.map(|(&n, data)| (n, data.clone())).collect();
            encode(header, &pages, tracked.then(|| checksum_of(after))).unwrap()
        }
    }

    fn merged(files: &[Vec<u8>]) -> Result<Vec<u8>, LtxError> {
        compact(&files.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    proptest! {
        #[test]
        fn one_file_of_many_does_what_they_do_one_by_one(
            transactions in prop::collection::vec((0..9u32, prop::collection::vec(1..9u32, 0..4)), 2..12),
            first in any::<prop::sample::Index>(),
            cuts in prop::collection::vec((1..4usize, 0..3usize), 1..12),
            tracked in any::<bool>(),
        ) {
            let model = Model::run(&transactions);
            let min = 1 + first.index(transactions.len());
            let mut files = Vec::new();
            let mut max = min - 1;
            for (step, overlap) in cuts {
                let from = (max + 1).saturating_sub(overlap).max(min);
                let to = (max + step).min(transactions.len());
                if to > max {
                    files.push(model.range(from, to, tracked));
                    max = to;
                }
            }
            let bytes = merged(&files).unwrap();
            let (summary, pages) = decode(&bytes).unwrap();
            let mut applied = model.states[min - 1].clone();
            applied.extend(pages);
            applied.retain(|pgno, _| pgno.get() <= summary.header.commit);
            prop_assert_eq!(&applied, &model.states[max]);
            let post_apply = tracked.then(|| checksum_of(&applied));
            prop_assert_eq!(summary.trailer.post_apply_checksum, post_apply);
            prop_assert_eq!((summary.header.min_txid, summary.header.max_txid), (Txid(min as u64), Txid(max as u64)));
        }
    }

    fn three() -> Model {
        Model::run(&[(5, vec![]), (5, vec![2]), (5, vec![2, 3]), (5, vec![1])])
    }

    #[test]
    fn the_latest_image_of_a_page_wins_and_lost_pages_are_dropped() {
        let model = Model::run(&[(6, vec![]), (6, vec![2, 6]), (3, vec![2])]);
        let bytes = merged(&[model.range(1, 2, true), model.range(3, 3, true)]).unwrap();
        let (summary, pages) = decode(&bytes).unwrap();
        assert_eq!((summary.header.commit, &pages), (3, &model.states[3]));
        assert!(summary.header.is_snapshot());
        assert_eq!(summary.header.timestamp_ms, 1_700_000_000_003);
    }

    #[test]
    fn a_database_dropped_and_made_again_keeps_nothing_of_the_old() {
        let model = Model::run(&[(6, vec![]), (0, vec![]), (2, vec![])]);
        let files = [
            model.range(1, 1, true),
            model.range(2, 2, true),
            model.range(3, 3, true),
        ];
        assert_eq!(decode(&merged(&files).unwrap()).unwrap().1, model.states[3]);
        let dropped = verify(&merged(&files[..2]).unwrap()).unwrap();
        assert_eq!((dropped.page_count, dropped.header.commit), (0, 0));
        assert_eq!(dropped.trailer.post_apply_checksum, Some(Checksum::EMPTY));
    }

    #[test]
    fn ranges_that_do_not_follow_each_other_are_refused() {
        let model = three();
        let (a, b, c) = (
            model.range(1, 1, true),
            model.range(2, 2, true),
            model.range(3, 3, true),
        );
        assert!(matches!(merged(&[]), Err(LtxError::NoInputs)));
        assert!(matches!(
            merged(&[a.clone(), c.clone()]),
            Err(LtxError::TxidGap { .. })
        ));
        assert!(matches!(
            merged(&[b.clone(), a.clone()]),
            Err(LtxError::TxidGap { .. })
        ));
        assert!(matches!(
            merged(&[a.clone(), a.clone()]),
            Err(LtxError::TxidGap { .. })
        ));
        let last = encode(header(size(512), 5, u64::MAX, 0), &Pages::new(), None).unwrap();
        assert!(matches!(
            merged(&[last.clone(), last]),
            Err(LtxError::TxidGap { .. })
        ));
        let other_size = encode(header(size(1024), 2, 2, 5), &Pages::new(), None).unwrap();
        assert!(matches!(
            merged(&[a.clone(), other_size]),
            Err(LtxError::MixedPageSize { .. })
        ));
        let forked = Model::run(&[(5, vec![]), (5, vec![4]), (5, vec![2])]).range(3, 3, true);
        assert!(matches!(
            merged(&[a, b, forked]),
            Err(LtxError::ChecksumChain { .. })
        ));
    }

    #[test]
    fn a_range_that_grows_the_database_without_its_new_pages_is_refused() {
        let base = three().range(2, 2, false);
        for present in [vec![], vec![6], vec![7], vec![5, 7]] {
            let pages = present
                .iter()
                .map(|&n| (pgno(n), page(size(512), n)))
                .collect();
            let grown = encode(header(size(512), 3, 3, 7), &pages, None).unwrap();
            let refused = merged(&[base.clone(), grown]);
            assert!(
                matches!(refused, Err(LtxError::GrowthGap { .. })),
                "{present:?}"
            );
        }
    }

    #[test]
    fn growing_past_the_lock_page_needs_no_lock_page() {
        let page_size = size(65_536);
        let lock = page_size.lock_pgno().get();
        let file = |txid, commit, pages: &[u32]| {
            let pages = pages
                .iter()
                .map(|&n| (pgno(n), page(page_size, n)))
                .collect();
            encode(header(page_size, txid, txid, commit), &pages, None).unwrap()
        };
        let files = [file(2, lock - 1, &[]), file(3, lock + 1, &[lock + 1])];
        assert_eq!(verify(&merged(&files).unwrap()).unwrap().page_count, 1);
    }

    #[test]
    fn a_damaged_input_is_refused() {
        let model = three();
        let good = [model.range(1, 1, true), model.range(2, 2, true)];
        for i in 0..2 {
            let mut bad = good.clone();
            let last = bad[i].len() - 1;
            bad[i][last] ^= 1;
            assert!(
                matches!(merged(&bad), Err(LtxError::FileChecksum { .. })),
                "{i}"
            );
        }
    }

    #[test]
    fn checksums_are_kept_only_if_all_inputs_keep_them_and_it_is_wanted() {
        let model = three();
        let mixed = merged(&[model.range(2, 2, true), model.range(3, 3, false)]).unwrap();
        let files = [model.range(2, 2, true), model.range(3, 3, true)];
        let dropped = compact_untracked(&[&files[0], &files[1]]).unwrap();
        assert_eq!(mixed, dropped);
        assert!(!verify(&mixed).unwrap().header.flags.tracks_checksums());
        assert!(
            verify(&merged(&files).unwrap())
                .unwrap()
                .header
                .flags
                .tracks_checksums()
        );
    }
}
