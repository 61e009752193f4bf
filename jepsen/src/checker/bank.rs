//! Guarantee: every read is of one state. A bank's sum is constant in each, rows do not come and go within one, and SQLite
//! never calls a database corrupt.

use super::{Anomaly, Evidence, anomaly};
use crate::workload::TOTAL;

const GUARANTEE: &str = "snapshot";
/// What SQLite says of a database that is damaged, or of pages of two states.
const DAMAGE: [&str; 2] = ["DatabaseCorrupt", "NotADatabase"];

/// Checks all reads, and the final states.
#[must_use]
pub fn snapshots(evidence: &Evidence) -> Vec<Anomaly> {
    let mut all = Vec::new();
    for operation in &evidence.operations {
        let at = format!(
            "n{} ({}) at {}",
            operation.node, operation.process, operation.begin
        );
        if let Some(error) = &operation.error
            && DAMAGE.iter().any(|word| error.starts_with(word))
        {
            all.push(anomaly(GUARANTEE, &operation.db, format!("{at}: {error}")));
        }
        let Some(seen) = operation.seen else { continue };
        if seen.sum.is_some_and(|sum| sum != TOTAL) {
            let text = format!("{at}: the sum is {:?}, not {TOTAL}", seen.sum);
            all.push(anomaly(GUARANTEE, &operation.db, text));
        }
        if seen.rows != seen.rows_again {
            let text = format!("{at}: {} rows, then {}", seen.rows, seen.rows_again);
            all.push(anomaly(GUARANTEE, &operation.db, text));
        }
    }
    for (db, finals) in &evidence.finals {
        for (node, state) in finals.iter().enumerate() {
            if let Ok(content) = &state.content
                && content.sum.is_some_and(|sum| sum != TOTAL)
            {
                let text = format!("n{node} at the end: the sum is {:?}", content.sum);
                all.push(anomaly(GUARANTEE, db, text));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::tests::{evidence, holding, write};
    use crate::history::{Op, Operation, Outcome, Seen};

    fn read(rows: i64, rows_again: i64, sum: Option<i64>) -> Operation {
        Operation {
            op: Op::Read,
            seen: Some(Seen {
                rows,
                rows_again,
                sum,
            }),
            ..write(0, 1, 5, Outcome::Ok)
        }
    }

    #[test]
    fn sums_and_counts_must_hold() {
        let good = evidence(vec![read(3, 3, Some(TOTAL)), read(0, 0, None)], vec![]);
        assert_eq!(snapshots(&good), []);
        for bad in [read(3, 3, Some(TOTAL - 1)), read(3, 4, None)] {
            assert_eq!(snapshots(&evidence(vec![bad], vec![])).len(), 1);
        }
    }

    #[test]
    fn a_wrong_sum_at_the_end_is_found() {
        let mut last = holding(&[]);
        if let Ok(content) = &mut last.content {
            content.sum = Some(TOTAL + 1);
        }
        assert_eq!(snapshots(&evidence(vec![], vec![last])).len(), 1);
    }

    #[test]
    fn damage_is_found() {
        let mut bad = write(1, 0, 1, Outcome::Fail);
        bad.error = Some("DatabaseCorrupt 11: database disk image is malformed".into());
        assert_eq!(snapshots(&evidence(vec![bad], vec![])).len(), 1);
    }
}
