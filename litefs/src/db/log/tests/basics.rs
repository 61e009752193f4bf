use super::*;
use crate::disk::Failure;

#[test]
fn an_empty_log_begins_at_zero() {
    let dir = tempdir();
    let (log, opened) = open(dir.path());
    assert_eq!((opened.end, opened.base), (None, Txid::ZERO));
    assert_eq!(log.sync().unwrap(), Txid::ZERO);
    check(&log, &[]);
    assert_eq!(maintain(&log), Maintained::default());
}

#[test]
fn reads_back_what_was_appended_from_memory_and_from_disk() {
    let dir = tempdir();
    let (log, _) = open(dir.path());
    let mut parts = fill(&log, 3);
    let big = part_after(log.end_pos(), 5, 5000); // more than the cache holds
    append(&log, &big).unwrap();
    parts.push(big);
    check(&log, &parts);
    parts.extend(fill(&log, 4));
    check(&log, &parts);
    drop(log);
    let log = reopen(dir.path());
    assert_eq!(log.end(), Some(parts[7].meta));
    check(&log, &parts);
    parts.extend(fill(&log, 4));
    check(&log, &parts);
}

#[test]
fn live_readers_never_touch_the_disk() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    for part in fill(&log, 50) {
        log.read_after(part.meta.min_txid.prev(), 1).unwrap();
    }
    for i in 0..50 {
        fill(&log, 1);
        assert!(matches!(
            log.read_after(Txid(50 + i), 1000).unwrap(),
            ReadAfter::Records(_)
        ));
    }
    let reads = |disk: &FailingDisk| disk.steps().iter().filter(|s| s.0 == steps::READ).count();
    let before = reads(&disk);
    let last = log.end_pos().txid.prev();
    log.read_after(last, 1000).unwrap();
    assert_eq!(reads(&disk), before);
}

#[test]
fn max_bytes_bounds_a_read_but_for_its_first_record() {
    let dir = tempdir();
    for tail_cache_bytes in [0, 1 << 20] {
        let options = LogOptions {
            tail_cache_bytes,
            ..options()
        };
        let dir = dir.path().join(tail_cache_bytes.to_string());
        let (log, _) = open_with(&dir, options);
        fill(&log, 4);
        for (max_bytes, counts) in [(0, 1..2), (200, 1..2), (600, 2..5)] {
            let ReadAfter::Records(records) = log.read_after(Txid::ZERO, max_bytes).unwrap() else {
                panic!("nothing");
            };
            assert!(
                counts.contains(&records.len()),
                "{max_bytes}: {}",
                records.len()
            );
        }
    }
}

#[test]
fn refuses_what_does_not_follow() {
    let dir = tempdir();
    let (log, _) = open(dir.path());
    let parts = fill(&log, 2);
    let next = part_after(log.end_pos(), 1, 1);
    let skips = part_after(next.meta.pos(), 1, 1);
    let mut forked = next.clone();
    forked.meta.pre_apply_checksum = checksum(7, Txid(2));
    for bad in [&parts[1], &skips, &forked] {
        let error = append(&log, bad).unwrap_err();
        assert!(matches!(error, Error::NotContiguous { .. }), "{error}");
    }
    let mut stale = next.clone();
    stale.meta.epoch = 0;
    assert!(matches!(
        append(&log, &stale),
        Err(Error::StaleEpoch { have: 1, got: 0 })
    ));
    let mut backwards = next.clone();
    backwards.meta.max_txid = Txid(1);
    assert!(matches!(
        append(&log, &backwards),
        Err(Error::InvalidRecord { .. })
    ));
    assert!(matches!(
        log.append(&next.meta, b""),
        Err(Error::InvalidRecord { .. })
    ));
    append(&log, &next).unwrap();
}

#[test]
fn a_full_disk_leaves_the_log_usable() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    let mut parts = Vec::new();
    for written_len in 0..200 {
        // Once while appending, once while beginning a segment, once when cutting fails as well.
        for step in [steps::APPEND, steps::ROTATE_WRITE] {
            let errno = libc::ENOSPC;
            disk.fail(step, 1, Failure::Torn { written_len, errno });
        }
        if written_len % 3 == 0 {
            disk.fail(steps::APPEND_CUT, 1, Failure::Errno(libc::EIO));
            disk.fail(steps::APPEND_CUT, 2, Failure::Errno(libc::EIO));
        }
        let error = append(&log, &part_after(log.end_pos(), 2, 10)).unwrap_err();
        assert!(error.is_disk_full(), "{error}");
        if written_len % 3 == 0 {
            let error = append(&log, &part_after(log.end_pos(), 2, 10));
            assert!(error.is_err() || parts.is_empty());
        }
        disk.heal();
        if written_len % 20 == 0 {
            drop(open(dir.path())); // a crash now loses nothing
        }
        parts.extend(match log.end() {
            Some(end) if parts.last().map(|p: &Part| p.meta) != Some(end) => {
                follow(&log, parts.last().map_or(Txid::ZERO, |p| p.meta.max_txid)).unwrap()
            }
            _ => Vec::new(),
        });
        parts.extend(fill(&log, 1));
        log.sync().unwrap();
    }
    check(&log, &parts);
    drop(log);
    check(&reopen(dir.path()), &parts);
}

#[test]
fn after_a_failed_sync_nothing_is_promised() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    let parts = fill(&log, 2);
    disk.fail(steps::SYNC, 1, Failure::Errno(libc::EIO));
    assert!(matches!(log.sync(), Err(Error::Io { .. })));
    assert!(matches!(
        log.sync(),
        Err(Error::Broken { step: steps::SYNC })
    ));
    assert!(matches!(
        append(&log, &part_after(log.end_pos(), 1, 1)),
        Err(Error::Broken { .. })
    ));
    check(&log, &parts); // what is there can still be read
    drop(log);
    reopen(dir.path()).sync().unwrap();
}

#[test]
fn a_log_that_could_not_be_synced_goes_on_once_it_can() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    let mut parts = fill(&log, 3);
    log.reopen().unwrap();
    assert!(!log.is_broken());
    disk.fail(steps::SYNC, 1, Failure::Errno(libc::ENOSPC));
    log.sync().unwrap_err();
    for (n, step) in [
        steps::REOPEN_WRITE,
        steps::REOPEN_SYNC,
        steps::REOPEN_RENAME,
    ]
    .into_iter()
    .enumerate()
    {
        assert!(log.is_broken());
        disk.fail(step, 1, Failure::Errno(libc::ENOSPC));
        let error = log.reopen().unwrap_err();
        assert!(error.is_disk_full(), "{n}: {error}");
        check(&log, &parts);
    }
    log.reopen().unwrap();
    check(&log, &parts);
    assert_eq!(log.sync().unwrap(), Txid(3), "what is there is durable");
    parts.extend(fill(&log, 40));
    log.sync().unwrap();
    maintain(&log);
    check(&log, &parts);
    drop(log);
    check(&reopen(dir.path()), &parts);
}

#[test]
fn sync_says_how_far_and_does_nothing_twice() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    fill(&log, 2);
    assert_eq!(
        (log.sync().unwrap(), log.sync().unwrap()),
        (Txid(2), Txid(2))
    );
    fill(&log, 1);
    assert_eq!(log.sync().unwrap(), Txid(3));
    let count = |step| disk.steps().iter().find(|s| s.0 == step).map_or(0, |s| s.1);
    assert_eq!((count(steps::SYNC), count(steps::SYNC_DIR)), (2, 1));
}

#[test]
fn a_segment_is_durable_before_the_next_begins() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    let count = |step| disk.steps().iter().find(|s| s.0 == step).map_or(0, |s| s.1);
    fill(&log, 60); // nobody syncs, so a segment grows to twice its size and syncs itself
    let begun = count(steps::ROTATE_OPEN);
    assert!(begun > 5);
    assert_eq!(count(steps::SYNC), begun - 1);
}

#[test]
fn restart_begins_at_the_new_position() {
    for older in [Older::Remove, Older::Quarantine] {
        let dir = tempdir();
        let (log, _) = open(dir.path());
        fill_synced(&log, 20);
        maintain(&log);
        // Back to an earlier transaction of another branch.
        let base = other_pos(7);
        log.restart(&base, older).unwrap();
        assert_eq!((log.base(), log.end()), (Txid(7), Some(base)));
        assert_eq!(names(&dir.path().join("log")), ["0000000000000008.seg"]);
        assert!(names(&dir.path().join("ltx")).is_empty());
        let kept = names(&dir.path().join("quarantine")).len();
        assert_eq!(kept > 0, older == Older::Quarantine);
        check(&log, &[]);
        drop(log);
        let log = reopen(dir.path());
        assert_eq!((log.base(), log.end()), (Txid(7), Some(base)));
        let old = part_after(Pos::ZERO, 1, 1);
        assert!(append(&log, &old).is_err());
        let mut next = part_after(base.pos(), 1, 1);
        next.meta.epoch = 2;
        append(&log, &next).unwrap();
        check(&log, &[next]);
    }
}

#[test]
fn restart_at_zero_is_a_dropped_database() {
    let dir = tempdir();
    let (log, _) = open(dir.path());
    fill(&log, 3);
    let mut base = other_pos(0);
    base.post_apply_checksum = Checksum::EMPTY;
    base.epoch = 1;
    log.restart(&base, Older::Quarantine).unwrap();
    let parts = fill(&log, 20);
    check(&log, &parts);
    drop(log);
    check(&reopen(dir.path()), &parts);
}

#[test]
fn remains_that_could_not_be_cut_are_cut_before_the_next_segment() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    let mut parts = fill_synced(&log, 2);
    let full = part_after(log.end_pos(), 1, 250);
    append(&log, &full).unwrap();
    parts.push(full);
    let errno = libc::ENOSPC;
    disk.fail(
        steps::APPEND,
        1,
        Failure::Torn {
            written_len: 50,
            errno,
        },
    );
    disk.fail(steps::APPEND_CUT, 1, Failure::Errno(libc::EIO));
    assert!(append(&log, &part_after(log.end_pos(), 1, 9)).is_err());
    log.sync().unwrap();
    parts.extend(fill(&log, 1));
    assert_eq!(names(&dir.path().join("log")).len(), 2);
    drop(log);
    check(&reopen(dir.path()), &parts);
}

/// The process dies of SIGKILL in the middle of its work, at each of these steps.
#[test]
fn a_killed_process_loses_nothing_that_was_appended() {
    const NAME: &str = "db::log::tests::basics::a_killed_process_loses_nothing_that_was_appended";
    if let Some(dir) = std::env::var_os("LITEFS_TEST_LOG") {
        let (log, _) = open(Path::new(&dir));
        for i in 0..40 {
            fill_synced(&log, 1);
            println!("appended {}", log.end_pos().txid.0);
            if i % 8 == 7 {
                maintain(&log);
            }
        }
        return;
    }
    for step in [
        steps::APPEND,
        steps::ROTATE_WRITE,
        steps::SEAL_RENAME,
        steps::SEAL_REMOVE,
    ] {
        let dir = tempdir();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env("LITEFS_TEST_LOG", dir.path())
            .env("LITEFS_CRASH_AT", format!("{step}:3"))
            .output()
            .unwrap();
        assert!(!output.status.success(), "{step}");
        let told = String::from_utf8(output.stdout).unwrap();
        let last = told
            .lines()
            .filter_map(|line| line.strip_prefix("appended "))
            .next_back();
        let end = last.unwrap().parse().unwrap();
        let (log, opened) = open(dir.path());
        let is_normal =
            |f: &Finding| matches!(f, Finding::TornTail { .. } | Finding::Leftover { .. });
        assert!(
            opened.findings.iter().all(is_normal),
            "{:?}",
            opened.findings
        );
        assert_eq!((log.base(), log.end_pos().txid), (Txid::ZERO, Txid(end)));
        assert_eq!(follow(&log, Txid::ZERO).unwrap().len() as u64, end);
    }
}
