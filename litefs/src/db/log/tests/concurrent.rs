use super::*;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

const LAST: Txid = Txid(5000);

/// Follows the log as a sender does; returns how often it fell behind retention.
fn tail(log: &Log) -> u32 {
    let (mut at, mut jumps) = (Txid::ZERO, 0);
    while at < LAST {
        match log.read_after(at, 2000).unwrap() {
            ReadAfter::CaughtUp => thread::yield_now(),
            ReadAfter::NotAvailable { base } => {
                assert!(base > at);
                at = base;
                jumps += 1;
            }
            ReadAfter::Records(records) => {
                for record in records {
                    assert!(record.meta.min_txid.prev() <= at && record.meta.max_txid > at);
                    assert_eq!(toy_meta(&record.ltx).unwrap().pos(), record.meta.pos());
                    at = record.meta.max_txid;
                }
            }
        }
    }
    jumps
}

/// Reads backwards a while, again and again.
fn look_back(log: &Log, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut next = None;
        for record in log.newest_first().take(300) {
            let meta = record.unwrap().meta;
            if let Some(next) = next {
                assert!(meta.max_txid.next() >= next && meta.min_txid < next);
            }
            next = Some(meta.min_txid);
        }
    }
}

#[test]
fn readers_follow_while_it_is_appended_to_compacted_and_cut() {
    let dir = tempdir();
    let options = LogOptions {
        retention_bytes: 200_000,
        segment_bytes: 4000,
        ..options()
    };
    let (log, _) = open_with(dir.path(), options);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..2).map(|_| scope.spawn(|| tail(&log))).collect();
        let others = [
            scope.spawn(|| look_back(&log, &stop)),
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(maintain(&log).findings, []);
                }
            }),
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let end = log.end_pos().txid;
                    assert!(log.sync().unwrap() >= end);
                }
            }),
        ];
        while log.end_pos().txid < LAST {
            fill(&log, 1);
        }
        for reader in readers {
            reader.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        for other in others {
            other.join().unwrap();
        }
    });
    maintain(&log);
    assert!(log.base() > Txid::ZERO);
    drop(log);
    let (log, opened) = open_with(dir.path(), options);
    assert_eq!((opened.findings, log.end_pos().txid), (vec![], LAST));
}

#[test]
fn restart_while_it_is_read() {
    let dir = tempdir();
    let (log, _) = open_with(
        dir.path(),
        LogOptions {
            tail_cache_bytes: 0,
            ..options()
        },
    );
    let stop = AtomicBool::new(false);
    let reads = AtomicU32::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut at = log.base();
                while let ReadAfter::Records(records) = log.read_after(at, 1000).unwrap() {
                    at = records[records.len() - 1].meta.max_txid;
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        for round in 0..100 {
            let mut base = other_pos(10 + round % 3);
            base.epoch = 1;
            log.restart(&base, Older::Remove).unwrap();
            let parts = fill_synced(&log, 12);
            maintain(&log);
            check(&log, &parts);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 0);
}

#[test]
fn callers_of_sync_share_it() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    fill(&log, 1);
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| assert_eq!(log.sync().unwrap(), Txid(1)));
        }
    });
    let syncs = disk.steps().iter().find(|s| s.0 == steps::SYNC).unwrap().1;
    assert_eq!(syncs, 1);
}
