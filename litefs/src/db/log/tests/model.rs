use super::*;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    Append { tx_count: u64, body_len: usize },
    Sync,
    Maintain { now_ms: i64, pinned: Option<u64> },
    Reopen,
    Restart { txid: u64, remove: bool },
    Read { after: u64, max_bytes: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (1..4u64, 1..300usize)
            .prop_map(|(tx_count, body_len)| Op::Append { tx_count, body_len }),
        3 => Just(Op::Sync),
        2 => (0..100_000i64, proptest::option::of(0..60u64))
            .prop_map(|(now_ms, pinned)| Op::Maintain { now_ms, pinned }),
        1 => Just(Op::Reopen),
        1 => (0..40u64, any::<bool>()).prop_map(|(txid, remove)| Op::Restart { txid, remove }),
        6 => (0..80u64, 0..1000usize)
            .prop_map(|(after, max_bytes)| Op::Read { after, max_bytes }),
    ]
}

fn read(log: &Log, parts: &[Part], after: Txid, max_bytes: usize) {
    match log.read_after(after, max_bytes).unwrap() {
        ReadAfter::CaughtUp => assert!(after >= log.end_pos().txid),
        ReadAfter::NotAvailable { base } => assert!(after < base && base == log.base()),
        ReadAfter::Records(records) => {
            let found: Vec<Part> = records
                .iter()
                .flat_map(|record| toy_parts(&record.ltx).unwrap())
                .collect();
            let at = parts.iter().position(|part| *part == found[0]).unwrap();
            assert_eq!(found, parts[at..at + found.len()]);
            let (first, last) = (&records[0].meta, &records[records.len() - 1].meta);
            assert!(first.min_txid.prev() <= after && first.max_txid > after);
            assert_eq!(last.pos(), found[found.len() - 1].meta.pos());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn behaves_like_a_list_of_records(ops in proptest::collection::vec(op(), 1..80)) {
        let dir = tempdir();
        let options = LogOptions {
            retention_age: Duration::from_secs(30),
            retention_bytes: 6000,
            ..options()
        };
        let (mut log, _) = open_with(dir.path(), options);
        let mut parts: Vec<Part> = Vec::new();
        let mut start = Pos::ZERO;
        for op in ops {
            let end = parts.last().map_or(start, |part| part.meta.pos());
            match op {
                Op::Append { tx_count, body_len } => {
                    let mut part = part_after(end, tx_count, body_len);
                    part.meta.epoch = 2;
                    append(&log, &part).unwrap();
                    parts.push(part);
                }
                Op::Sync => assert_eq!(log.sync().unwrap(), end.txid),
                Op::Maintain { now_ms, pinned } => {
                    let before = log.base();
                    let pinned = pinned.map(Txid);
                    let done = log.maintain(now_ms, &toy_compact, pinned).unwrap();
                    assert_eq!(done.findings, []);
                    assert!(log.base() == before || pinned.is_none_or(|p| log.base() <= p));
                }
                Op::Reopen => {
                    let (base, end) = (log.base(), log.end());
                    drop(log);
                    let opened;
                    (log, opened) = open_with(dir.path(), options);
                    assert_eq!(opened.findings, []);
                    assert_eq!((opened.base, opened.end), (base, end));
                }
                Op::Restart { txid, remove } => {
                    let older = if remove { Older::Remove } else { Older::Quarantine };
                    let base = other_pos(txid);
                    log.restart(&base, older).unwrap();
                    start = base.pos();
                    parts.clear();
                }
                Op::Read { after, max_bytes } => read(&log, &parts, Txid(after), max_bytes),
            }
            assert_eq!(log.end_pos(), parts.last().map_or(start, |part| part.meta.pos()));
            assert!(log.base() <= log.end_pos().txid); // INV-LOG-2
            assert!(log.state.lock().tail_bytes <= options.tail_cache_bytes);
        }
        check(&log, &parts);
    }
}
