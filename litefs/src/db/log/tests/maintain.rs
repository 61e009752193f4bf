use super::*;
use crate::disk::Failure;

#[test]
fn full_segments_become_ltx_files() {
    let dir = tempdir();
    let (log, _) = open(dir.path());
    let mut parts = fill_synced(&log, 20);
    let segment_count = names(&dir.path().join("log")).len();
    let done = maintain(&log);
    assert_eq!(done.sealed as usize, segment_count - 1);
    assert_eq!(names(&dir.path().join("log")).len(), 1);
    assert_eq!(names(&dir.path().join("ltx")).len(), segment_count - 1);
    assert_eq!(maintain(&log).sealed, 0);
    check(&log, &parts);
    parts.extend(fill_synced(&log, 20));
    drop(log);
    let log = reopen(dir.path());
    assert_eq!(log.end(), Some(parts[39].meta)); // with epoch and WAL cursor
    check(&log, &parts);
    maintain(&log);
    check(&log, &parts);
}

#[test]
fn a_segment_of_one_record_is_sealed_as_it_is() {
    let dir = tempdir();
    let (log, _) = open(dir.path());
    let big = part_after(Pos::ZERO, 3, 2000);
    append(&log, &big).unwrap();
    log.sync().unwrap();
    fill(&log, 1);
    let never = |_: &[&[u8]]| Err::<Vec<u8>, BoxError>("called".into());
    assert_eq!(log.maintain(0, &never, None).unwrap().sealed, 1);
    let path = dir.path().join("ltx/0000000000000001-0000000000000003.ltx");
    assert_eq!(std::fs::read(path).unwrap(), toy_ltx(&[big]));
}

#[test]
fn maintain_syncs_a_full_segment_so_that_append_need_not() {
    let dir = tempdir();
    let (log, _) = open(dir.path());
    for _ in 0..40 {
        fill(&log, 1);
        maintain(&log);
    }
    let state = log.state.lock();
    assert!(state.sealed.len() > 4);
    assert!(state.sealed.iter().all(|file| file.len < 2 * 600));
}

#[test]
fn nothing_goes_while_a_power_cut_could_take_what_comes_after_it() {
    for retention_bytes in [u64::MAX, 0] {
        let dir = tempdir();
        let (log, _) = open_with(
            dir.path(),
            LogOptions {
                retention_bytes,
                ..options()
            },
        );
        fill_synced(&log, 20);
        let segment_count = || log.state.lock().segments.len();
        // A program goes on while segments are sealed, and begins one that is not synced.
        let went_on = std::cell::Cell::new(false);
        let goes_on = |files: &[&[u8]]| {
            let before = segment_count();
            while !went_on.get() && segment_count() == before {
                fill(&log, 1);
            }
            went_on.set(true);
            toy_compact(files)
        };
        log.maintain(0, &goes_on, None).unwrap();
        let state = log.state.lock();
        let first_left = state.segments.front().unwrap().first;
        assert!(
            first_left <= state.durable_txid,
            "only {first_left} and later are left, durable is {}",
            state.durable_txid
        );
        drop(state);
        maintain(&log);
        assert_eq!(log.state.lock().segments.len(), 1);
    }
}

#[test]
fn a_bad_compaction_changes_nothing() {
    let dir = tempdir();
    let (log, _) = open(dir.path());
    let parts = fill_synced(&log, 20);
    let fails = |_: &[&[u8]]| Err::<Vec<u8>, BoxError>("no".into());
    assert!(matches!(
        log.maintain(0, &fails, None),
        Err(Error::Compact { .. })
    ));
    let loses = |files: &[&[u8]]| toy_compact(&files[1..]);
    assert!(matches!(
        log.maintain(0, &loses, None),
        Err(Error::Miscompacted { .. })
    ));
    let breaks = |_: &[&[u8]]| Ok::<_, BoxError>(b"rubbish".to_vec());
    assert!(matches!(
        log.maintain(0, &breaks, None),
        Err(Error::Miscompacted { .. })
    ));
    check(&log, &parts);
    assert!(names(&dir.path().join("ltx")).is_empty());
    maintain(&log);
    check(&log, &parts);
}

#[test]
fn a_full_disk_while_sealing_changes_nothing() {
    let dir = tempdir();
    let disk = Arc::new(FailingDisk::new());
    let (log, _) = Log::open(disk.clone(), dir.path(), options()).unwrap();
    let parts = fill_synced(&log, 20);
    for step in [
        steps::SEAL_OPEN,
        steps::SEAL_WRITE,
        steps::SEAL_SYNC,
        steps::SEAL_RENAME,
    ] {
        disk.fail(step, 1, Failure::Errno(libc::ENOSPC));
        let error = log.maintain(0, &toy_compact, None).unwrap_err();
        assert!(error.is_disk_full(), "{error}");
        assert!(names(&dir.path().join("ltx")).is_empty());
        check(&log, &parts);
    }
    maintain(&log);
    check(&log, &parts);
}

#[test]
fn retention_by_age_keeps_the_young_and_the_newest() {
    let dir = tempdir();
    let retention_age = Duration::from_secs(10);
    let (log, _) = open_with(
        dir.path(),
        LogOptions {
            retention_age,
            ..options()
        },
    );
    let parts = fill_synced(&log, 20); // transaction n is committed at second n
    assert_eq!(log.maintain(10_000, &toy_compact, None).unwrap().removed, 0);
    assert_eq!(log.base(), Txid(0));
    log.maintain(21_000, &toy_compact, None).unwrap();
    assert!((Txid(1)..=Txid(10)).contains(&log.base()), "{}", log.base());
    check(&log, &parts);
    let base = log.base();
    drop(log); // the times are read from the files now
    let (log, _) = open_with(
        dir.path(),
        LogOptions {
            retention_age,
            ..options()
        },
    );
    assert_eq!(log.base(), base);
    log.maintain(21_000, &toy_compact, None).unwrap();
    assert_eq!(log.base(), base);
    log.maintain(i64::MAX, &toy_compact, None).unwrap();
    assert!(names(&dir.path().join("ltx")).is_empty());
    assert_eq!(log.end(), Some(parts[19].meta));
    check(&log, &parts);
}

#[test]
fn retention_by_size_keeps_the_newest() {
    let dir = tempdir();
    let (log, _) = open_with(
        dir.path(),
        LogOptions {
            retention_bytes: 2000,
            ..options()
        },
    );
    let parts = fill_synced(&log, 60);
    log.maintain(0, &toy_compact, None).unwrap();
    assert!(log.state.lock().total_bytes() <= 2000);
    assert!(log.base() > Txid(20));
    check(&log, &parts);
    drop(log);
    let (log, opened) = open_with(
        dir.path(),
        LogOptions {
            retention_bytes: 0,
            ..options()
        },
    );
    assert_eq!(opened.findings, []);
    log.maintain(0, &toy_compact, None).unwrap();
    assert!(names(&dir.path().join("ltx")).is_empty());
    check(&log, &parts);
}

#[test]
fn retention_keeps_what_is_pinned() {
    let dir = tempdir();
    let (log, _) = open_with(
        dir.path(),
        LogOptions {
            retention_bytes: 0,
            ..options()
        },
    );
    let parts = fill_synced(&log, 40);
    for pinned in [0, 5, 11, 23, 39] {
        log.maintain(i64::MAX, &toy_compact, Some(Txid(pinned)))
            .unwrap();
        assert!(log.base() <= Txid(pinned));
        check(&log, &parts);
    }
    assert!(log.base() > Txid(23));
}

#[test]
fn a_compaction_that_fails_does_not_stop_retention() {
    let dir = tempdir();
    let (log, _) = open_with(
        dir.path(),
        LogOptions {
            retention_bytes: 0,
            ..options()
        },
    );
    let parts = fill_synced(&log, 40);
    let fails = |_: &[&[u8]]| Err::<Vec<u8>, BoxError>("no".into());
    assert!(log.maintain(0, &fails, None).is_err());
    assert_eq!(names(&dir.path().join("log")).len(), 1);
    check(&log, &parts);
}

#[test]
fn segments_that_may_wait_are_left_until_they_may_not() {
    let dir = tempdir();
    let (log, _) = open(dir.path());
    let parts = fill_synced(&log, 20);
    let full = names(&dir.path().join("log")).len() - 1;
    assert!(full > 1);
    log.leave_segments(1);
    assert_eq!(maintain(&log).sealed as usize, full - 1);
    assert_eq!(maintain(&log).sealed, 0);
    check(&log, &parts);
    log.leave_segments(0);
    assert_eq!(maintain(&log).sealed, 1);
    check(&log, &parts);
}
