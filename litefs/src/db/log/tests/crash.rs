use super::*;
use crate::disk::Failure;

/// What a run did, as far as it was told.
#[derive(Debug, Default)]
struct Witness {
    /// Appended since the last restart.
    appended: Vec<Part>,
    /// An append that failed, after `appended`; it may be there all the same.
    doubtful: Option<Part>,
    base: Option<RecordMeta>,
    /// A restart that failed.
    doubtful_base: Option<RecordMeta>,
}

impl Witness {
    fn append(&mut self, log: &Log, count: usize, sync: bool) {
        for _ in 0..count {
            let mut part = part_after(log.end_pos(), 1, 20);
            part.meta.epoch = log.end().map_or(1, |end| end.epoch);
            match append(log, &part) {
                Ok(()) => {
                    self.appended.push(part);
                    self.doubtful = None;
                }
                Err(Error::Broken { .. }) => {}
                Err(_) => self.doubtful = Some(part),
            }
            if sync {
                let _ = log.sync();
            }
        }
    }

    fn restart(&mut self, log: &Log, older: Older) {
        let base = other_pos(5);
        match log.restart(&base, older) {
            Ok(()) => {
                *self = Witness {
                    base: Some(base),
                    ..Witness::default()
                }
            }
            Err(_) => self.doubtful_base = Some(base),
        }
    }

    /// Learns from a log opened after a failure what has happened.
    fn settle(&mut self, log: &Log) {
        if self.doubtful_base.is_some() && log.end() == self.doubtful_base {
            *self = Witness {
                base: self.doubtful_base,
                ..Witness::default()
            };
        }
        self.doubtful_base = None;
        self.appended.extend(
            self.doubtful
                .take()
                .filter(|part| log.end() == Some(part.meta)),
        );
    }

    /// Checks a log opened after the crash.
    fn check(&mut self, log: &Log) {
        self.settle(log);
        let end = self.appended.last().map(|part| part.meta).or(self.base);
        assert_eq!(log.end(), end);
        check(log, &self.appended);
    }
}

/// Appends, rotates, seals, retains, restarts.
fn scenario(disk: Arc<FailingDisk>, dir: &Path, older: Older, witness: &mut Witness) {
    let options = LogOptions {
        retention_bytes: 2500,
        ..options()
    };
    let Ok((log, _)) = Log::open(disk.clone(), dir, options) else {
        return;
    };
    witness.append(&log, 3, false);
    witness.append(&log, 12, true);
    let _ = log.maintain(0, &toy_compact, None);
    witness.append(&log, 12, true);
    let _ = log.maintain(0, &toy_compact, None);
    witness.append(&log, 9, false);
    witness.restart(&log, older);
    witness.append(&log, 10, true);
    let _ = log.maintain(0, &toy_compact, None);
    witness.append(&log, 2, false);
    drop(log);
    if let Ok((log, _)) = Log::open(disk, dir, options) {
        witness.settle(&log);
        witness.append(&log, 1, true);
    }
}

fn each_step_of_the_scenario(failure: impl Fn(u64) -> Failure) {
    let rehearsal = Arc::new(FailingDisk::new());
    let dir = tempdir();
    for older in [Older::Remove, Older::Quarantine] {
        let disk = rehearsal.clone();
        scenario(
            disk,
            &dir.path().join(format!("{older:?}")),
            older,
            &mut Witness::default(),
        );
    }
    let mut tried = 0;
    for (step, count) in rehearsal.steps() {
        for (older, nth) in [Older::Remove, Older::Quarantine]
            .into_iter()
            .flat_map(|older| (1..=count / 2 + 1).map(move |nth| (older, nth)))
        {
            let dir = tempdir();
            let disk = Arc::new(FailingDisk::new());
            disk.fail(step, nth, failure(nth));
            let mut witness = Witness::default();
            scenario(disk.clone(), dir.path(), older, &mut witness);
            let (log, opened) = open(dir.path());
            for finding in &opened.findings {
                let is_normal =
                    matches!(finding, Finding::TornTail { .. } | Finding::Leftover { .. });
                assert!(is_normal, "{step} {nth}: {finding:?}");
            }
            witness.check(&log);
            // Twice, as recovery itself may have left something to do.
            drop(log);
            let log = reopen(dir.path());
            witness.check(&log);
            tried += 1;
        }
    }
    assert!(tried > 200, "{tried}");
}

#[test]
fn a_crash_before_any_step_loses_nothing() {
    each_step_of_the_scenario(|_| Failure::Crash);
}

#[test]
fn a_crash_after_any_step_loses_nothing() {
    each_step_of_the_scenario(|_| Failure::CrashAfter);
}

#[test]
fn an_error_in_any_step_loses_nothing() {
    each_step_of_the_scenario(|_| Failure::Errno(libc::EIO));
}

#[test]
fn a_full_disk_in_any_step_loses_nothing() {
    each_step_of_the_scenario(|nth| Failure::Torn {
        written_len: usize::try_from(nth * 37 % 250).unwrap(),
        errno: libc::ENOSPC,
    });
}

/// Recovery is interrupted itself, at each of its steps, and tried again.
#[test]
fn a_crash_while_opening_loses_nothing() {
    let mut interrupted = 0;
    for failing in [
        steps::RESTART_SYNC_DIR,
        steps::RESTART_REMOVE,
        steps::RESTART_RENAME,
        steps::QUARANTINE,
        steps::SEAL_RENAME,
        steps::SEAL_REMOVE,
    ] {
        for nth in 1..60 {
            let dir = tempdir();
            let disk = Arc::new(FailingDisk::new());
            let mut witness = Witness::default();
            let older = if nth % 2 == 0 {
                Older::Remove
            } else {
                Older::Quarantine
            };
            disk.fail(failing, 1 + nth % 3, Failure::Crash);
            scenario(disk, dir.path(), older, &mut witness);
            // Each kind of step of opening, the nth time it happens.
            let opening = Arc::new(FailingDisk::new());
            let steps = [
                steps::OPEN_LIST,
                steps::OPEN_REMOVE,
                steps::QUARANTINE,
                steps::RESTART_REMOVE,
                steps::RESTART_RENAME,
                steps::RESTART_SYNC_DIR,
            ];
            let step = steps[usize::try_from(nth).unwrap() % steps.len()];
            opening.fail(step, 1 + nth / 10, Failure::CrashAfter);
            interrupted += u32::from(Log::open(opening, dir.path(), options()).is_err());
            let (log, _) = open(dir.path());
            witness.check(&log);
        }
    }
    assert!(interrupted > 50, "{interrupted}");
}
