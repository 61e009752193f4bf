//! Guarantee: writes go on while a majority is there, and resume once everything is healed; nothing hangs.
//!
//! The bounds are generous, since the machine has other things to do.

use super::{Anomaly, Evidence, anomaly};
use crate::history::{Micros, Op, Outcome};

const GUARANTEE: &str = "alive";
/// Within so long after healing, each database is written again.
pub const RESUME: Micros = 30_000_000;
/// A majority that has been there for so long has written.
const MAJORITY: Micros = 7_900_000;
/// After healing, nothing takes longer than a busy timeout and a failover.
const HANG: Micros = 40_000_000;

/// Checks all databases.
#[must_use]
pub fn alive(evidence: &Evidence) -> Vec<Anomaly> {
    let mut all = Vec::new();
    for db in evidence.finals.keys() {
        let written: Vec<Micros> = evidence
            .of(db)
            .filter(|o| o.outcome == Outcome::Ok && matches!(o.op, Op::Write(_)))
            .filter_map(|o| o.end)
            .collect();
        let is_written =
            |from: Micros, to: Micros| written.iter().any(|at| (from..to).contains(at));
        if !is_written(evidence.healed, evidence.healed.saturating_add(RESUME)) {
            let text = format!("no write within {} s after healing", RESUME / 1_000_000);
            all.push(anomaly(GUARANTEE, db, text));
        }
        for window in &evidence.windows {
            if window.end - window.begin >= MAJORITY
                && !is_written(window.begin + 200_000, window.end)
            {
                let secs = (window.end - window.begin) / 1_000_000;
                let text = format!(
                    "{}: no write for {secs} s, though a majority is there",
                    window.fault
                );
                all.push(anomaly(GUARANTEE, db, text));
            }
        }
    }
    // An operation that was open when all was healed, or began later, has ended in time, or at all.
    let last = evidence
        .operations
        .iter()
        .filter_map(|o| o.end)
        .max()
        .unwrap_or(0);
    for o in &evidence.operations {
        let from = o.begin.max(evidence.healed);
        if o.end.unwrap_or(last).saturating_sub(from) > HANG {
            let text = format!(
                "{} on n{}: {:?} hangs, even when all is healed",
                o.process, o.node, o.op
            );
            all.push(anomaly(GUARANTEE, &o.db, text));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::Window;
    use crate::checker::tests::{evidence, holding, write};

    #[test]
    fn writes_must_resume_after_healing() {
        let run = |at, outcome| {
            let mut run = evidence(vec![write(1, 0, at, outcome)], vec![holding(&[1])]);
            run.healed = 1000;
            alive(&run).len()
        };
        assert_eq!(run(2000, Outcome::Ok), 0);
        assert_eq!(run(500, Outcome::Ok), 1);
        assert_eq!(run(2000, Outcome::Fail), 1);
        assert_eq!(run(1000 + RESUME, Outcome::Ok), 1);
    }

    #[test]
    fn a_majority_must_write() {
        let run = |at, length| {
            let operations = vec![
                write(1, 0, at, Outcome::Ok),
                write(2, 0, 90_000_000, Outcome::Ok),
            ];
            let mut run = evidence(operations, vec![holding(&[1, 2])]);
            run.healed = 80_000_000;
            run.windows = vec![Window {
                fault: "kill".into(),
                begin: 1_000_000,
                end: 1_000_000 + length,
            }];
            alive(&run).len()
        };
        assert_eq!(run(5_000_000, MAJORITY), 0);
        assert_eq!(run(1_000_100, MAJORITY), 1); // it was under way when the fault came
        assert_eq!(run(1_000_100, MAJORITY - 1), 0);
    }

    #[test]
    fn what_hangs_is_found() {
        let mut hangs = write(1, 0, 10, Outcome::Info);
        hangs.end = None;
        let run = evidence(
            vec![
                hangs,
                write(2, 0, 50, Outcome::Ok),
                write(3, 0, HANG + 100, Outcome::Ok),
            ],
            vec![holding(&[2, 3])],
        );
        assert_eq!(alive(&run).len(), 1);
    }
}
