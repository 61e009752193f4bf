use super::*;
use std::fs;

/// Three segments and a few sealed files before them.
fn make(dir: &Path) -> Vec<Part> {
    let (log, _) = open(dir);
    let mut parts = fill_synced(&log, 8);
    maintain(&log);
    parts.extend(fill_synced(&log, 6));
    parts
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    for sub in ["log", "ltx"] {
        fs::create_dir_all(to.join(sub)).unwrap();
        for name in names(&from.join(sub)) {
            fs::copy(from.join(sub).join(&name), to.join(sub).join(&name)).unwrap();
        }
    }
}

fn files(dir: &Path, sub: &str) -> Vec<PathBuf> {
    let dir = dir.join(sub);
    names(&dir).iter().map(|name| dir.join(name)).collect()
}

/// Says whether these bytes are in some file of the quarantine.
fn is_kept(dir: &Path, bytes: &[u8]) -> bool {
    files(dir, "quarantine")
        .iter()
        .any(|path| fs::read(path).unwrap() == bytes)
}

#[test]
fn every_truncation_of_the_last_segment_leaves_its_whole_records() {
    let (dir, scratch) = (tempdir(), tempdir());
    let parts = make(dir.path());
    let last = files(dir.path(), "log").pop().unwrap();
    let name = last.strip_prefix(dir.path()).unwrap();
    let bytes = fs::read(&last).unwrap();
    for len in 0..bytes.len() {
        copy(dir.path(), scratch.path());
        fs::write(scratch.path().join(name), &bytes[..len]).unwrap();
        let (log, opened) = open(scratch.path());
        let count = usize::try_from(log.end_pos().txid.0).unwrap();
        check(&log, &parts[..count]);
        let is_clean = opened.findings.is_empty();
        let at_end = log.state.lock().segments.back().unwrap().len == len as u64;
        assert_eq!(is_clean, at_end, "{len}: {:?}", opened.findings);
        assert!(
            names(&scratch.path().join("quarantine")).is_empty(),
            "{len}"
        );
        // And it goes on.
        let mut kept = parts[..count].to_vec();
        kept.extend(fill(&log, 2));
        drop(log);
        check(&reopen(scratch.path()), &kept);
    }
}

#[test]
fn zeros_after_the_last_record_are_a_torn_tail() {
    for len in [1, 95, 96, 5000] {
        let dir = tempdir();
        let parts = make(dir.path());
        let last = files(dir.path(), "log").pop().unwrap();
        let file = fs::OpenOptions::new().write(true).open(last).unwrap();
        file.set_len(file.metadata().unwrap().len() + len).unwrap();
        let (log, opened) = open(dir.path());
        let [Finding::TornTail { cut_len, .. }] = opened.findings[..] else {
            panic!("{:?}", opened.findings);
        };
        assert_eq!(cut_len, len);
        check(&log, &parts);
    }
}

#[test]
fn every_flipped_bit_of_the_last_segment_is_seen_and_kept() {
    let (dir, scratch) = (tempdir(), tempdir());
    let parts = make(dir.path());
    let last = files(dir.path(), "log").pop().unwrap();
    let name = last.strip_prefix(dir.path()).unwrap();
    let bytes = fs::read(&last).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        copy(dir.path(), scratch.path());
        fs::write(scratch.path().join(name), &bad).unwrap();
        let (log, opened) = open(scratch.path());
        let [
            Finding::Damaged {
                offset, ref path, ..
            },
        ] = opened.findings[..]
        else {
            panic!("bit {bit}: {:?}", opened.findings);
        };
        assert!(offset <= bit as u64 / 8 && path.ends_with(name));
        let offset = usize::try_from(offset).unwrap();
        // The tail alone, or the whole segment if nothing before the tail is a record.
        let kept = is_kept(scratch.path(), &bad[offset..]) || is_kept(scratch.path(), &bad);
        assert!(kept, "bit {bit}");
        let count = usize::try_from(log.end_pos().txid.0).unwrap();
        check(&log, &parts[..count]);
        fill(&log, 1);
        drop(log);
        reopen(scratch.path());
    }
}

#[test]
fn every_flipped_bit_of_another_segment_moves_it_aside() {
    let (dir, scratch) = (tempdir(), tempdir());
    let parts = make(dir.path());
    let segments = files(dir.path(), "log");
    assert_eq!(segments.len(), 3);
    let bytes = fs::read(&segments[1]).unwrap();
    let name = segments[1].strip_prefix(dir.path()).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        copy(dir.path(), scratch.path());
        fs::write(scratch.path().join(name), &bad).unwrap();
        let (log, opened) = open(scratch.path());
        assert!(
            matches!(opened.findings[0], Finding::Damaged { .. }),
            "bit {bit}"
        );
        assert!(is_kept(scratch.path(), &bad));
        assert_eq!(log.end(), Some(parts[13].meta));
        check(&log, &parts);
        // What is older does not connect any more; it is kept as well.
        assert_eq!(names(&scratch.path().join("ltx")).len(), 0);
        assert!(names(&scratch.path().join("quarantine")).len() > 2);
        drop(log);
        check(&reopen(scratch.path()), &parts);
    }
}

#[test]
fn every_flipped_bit_of_a_sealed_file_is_seen_when_read() {
    let (dir, scratch) = (tempdir(), tempdir());
    let parts = make(dir.path());
    let sealed = files(dir.path(), "ltx");
    let bytes = fs::read(&sealed[0]).unwrap();
    let name = sealed[0].strip_prefix(dir.path()).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        copy(dir.path(), scratch.path());
        fs::write(scratch.path().join(name), &bad).unwrap();
        let log = reopen(scratch.path());
        let error = log.read_after(Txid::ZERO, 1).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(log.base() > Txid::ZERO);
        check(&log, &parts);
        let done = maintain(&log);
        assert!(matches!(done.findings[..], [Finding::Unreachable { .. }]));
        assert!(is_kept(scratch.path(), &bad));
        check(&log, &parts);
    }
}

#[test]
fn damage_while_running_moves_the_base_past_it() {
    let dir = tempdir();
    let (log, _) = open_with(
        dir.path(),
        LogOptions {
            tail_cache_bytes: 0,
            ..options()
        },
    );
    let parts = fill_synced(&log, 14);
    let first = &files(dir.path(), "log")[0];
    let mut bad = fs::read(first).unwrap();
    let second_record = 48 + 96 + 96 + 20 + 4;
    bad[second_record + 100] ^= 1;
    fs::write(first, &bad).unwrap();
    let error = follow(&log, Txid::ZERO).unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("at byte {second_record}")),
        "{error}"
    );
    assert_eq!(log.base(), Txid(2));
    check(&log, &parts);
    maintain(&log);
    assert!(is_kept(dir.path(), &bad));
    check(&log, &parts);
    assert_eq!(log.base(), Txid(2));
    drop(log);
    let log = reopen(dir.path());
    assert_eq!(log.base(), Txid(2));
    check(&log, &parts);
}

#[test]
fn a_missing_sealed_file_moves_the_base() {
    let dir = tempdir();
    let parts = make(dir.path());
    let log = reopen(dir.path());
    for path in files(dir.path(), "ltx") {
        fs::remove_file(path).unwrap();
    }
    assert!(log.read_after(Txid::ZERO, 1).is_err());
    while log.read_after(log.base(), 1).is_err() {}
    check(&log, &parts);
    maintain(&log);
    check(&log, &parts);
}

#[test]
fn without_segments_the_end_is_that_of_the_newest_file() {
    let dir = tempdir();
    let parts = make(dir.path());
    for path in files(dir.path(), "log") {
        fs::remove_file(path).unwrap();
    }
    let log = reopen(dir.path());
    let count = usize::try_from(log.end_pos().txid.0).unwrap();
    assert!(count > 0 && log.end().unwrap().wal.is_none());
    let mut parts = parts[..count].to_vec();
    check(&log, &parts);
    maintain(&log);
    parts.extend(fill_synced(&log, 10));
    check(&log, &parts);
}

#[test]
fn files_of_others_are_left_alone() {
    let dir = tempdir();
    let parts = make(dir.path());
    for name in ["log/README", "log/x.seg", "ltx/1-2.ltx", "ltx/notes.txt"] {
        fs::write(dir.path().join(name), "mine").unwrap();
    }
    let log = reopen(dir.path());
    check(&log, &parts);
    maintain(&log);
    assert_eq!(fs::read(dir.path().join("ltx/1-2.ltx")).unwrap(), b"mine");
}

#[test]
fn an_unknown_version_is_kept() {
    let dir = tempdir();
    make(dir.path());
    let last = files(dir.path(), "log").pop().unwrap();
    let mut bytes = fs::read(&last).unwrap();
    bytes[11] = 2;
    let crc = crc32fast::hash(&bytes[..44]);
    bytes[44..48].copy_from_slice(&crc.to_be_bytes());
    fs::write(&last, &bytes).unwrap();
    let (_, opened) = open(dir.path());
    let [
        Finding::Damaged {
            fault: Fault::Version(2),
            ..
        },
    ] = opened.findings[..]
    else {
        panic!("{:?}", opened.findings);
    };
    assert!(is_kept(dir.path(), &bytes));
}
