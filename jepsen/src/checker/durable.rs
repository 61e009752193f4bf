//! Guarantee: what was acknowledged is there at the end, what failed is not.
//!
//! | durability | an acknowledged row is missing | accounted for by |
//! |---|---|---|
//! | quorum | never | nothing |
//! | async | when its node's history lost | what a node keeps apart, or the later loss of the disk of its node |
//!
//! Nothing excuses a row that failed and is there, or one that nobody wrote.

use std::collections::{BTreeMap, BTreeSet};

use super::{Anomaly, Evidence, anomaly};
use crate::history::{Op, Operation, Outcome};

const GUARANTEE: &str = "durable";

/// Acknowledged rows that no node holds at the end, with what accounts for them: nothing, if they are lost.
#[must_use]
pub fn missing<'a>(
    evidence: &'a Evidence,
    db: &'a str,
) -> Vec<(&'a Operation, Option<&'static str>)> {
    let present: Vec<BTreeSet<i64>> = held(evidence, db);
    let empty = BTreeSet::new();
    let apart = evidence.kept_apart.get(db).unwrap_or(&empty);
    let excuse = |operation: &Operation, id: &i64| {
        let acknowledged = operation.end.unwrap_or(operation.begin);
        let mut lost = evidence.lost_disks.iter();
        if evidence.is_quorum {
            None
        } else if apart.contains(id) {
            Some("kept apart")
        } else if lost.any(|(node, at)| *node == operation.node && *at >= acknowledged) {
            Some("disk lost")
        } else {
            None
        }
    };
    evidence
        .of(db)
        .filter(|o| o.outcome == Outcome::Ok)
        .filter_map(|o| match o.op {
            Op::Write(id) if !present.iter().all(|ids| ids.contains(&id)) => {
                Some((o, excuse(o, &id)))
            }
            _ => None,
        })
        .collect()
}

fn held(evidence: &Evidence, db: &str) -> Vec<BTreeSet<i64>> {
    let finals = evidence.finals.get(db).into_iter().flatten();
    // A node that cannot be read is another checker's matter.
    let contents = finals.filter_map(|f| f.content.as_ref().ok());
    contents.map(|c| c.ids.iter().copied().collect()).collect()
}

/// Checks all databases.
#[must_use]
pub fn durable(evidence: &Evidence) -> Vec<Anomaly> {
    let mut all = Vec::new();
    for db in evidence.finals.keys() {
        for (operation, excuse) in missing(evidence, db) {
            if excuse.is_none() {
                let Operation {
                    op, node, process, ..
                } = operation;
                all.push(anomaly(
                    GUARANTEE,
                    db,
                    format!(
                        "{op:?} was acknowledged on n{node} ({process}) at {:?} and is missing",
                        operation.end
                    ),
                ));
            }
        }
        let mut written: BTreeMap<i64, &Operation> = BTreeMap::new();
        for operation in evidence.of(db) {
            if let Op::Write(id) = operation.op {
                written.insert(id, operation);
            }
        }
        let there: BTreeSet<i64> = held(evidence, db).into_iter().flatten().collect();
        for id in there {
            match written.get(&id) {
                None => all.push(anomaly(
                    GUARANTEE,
                    db,
                    format!("row {id} is there, and nobody wrote it"),
                )),
                Some(o) if o.outcome == Outcome::Fail => all.push(anomaly(
                    GUARANTEE,
                    db,
                    format!(
                        "row {id} failed on n{} ({:?}) and is there",
                        o.node, o.error
                    ),
                )),
                Some(_) => {}
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::tests::{evidence, holding, write};

    #[test]
    fn a_lost_row_is_found_on_one_node_too() {
        let operations = vec![write(1, 0, 1, Outcome::Ok), write(2, 0, 3, Outcome::Ok)];
        let bad = evidence(operations, vec![holding(&[1, 2]), holding(&[1])]);
        assert_eq!(durable(&bad).len(), 1);
    }

    #[test]
    fn an_unknown_row_may_be_there_or_not() {
        let operations = vec![write(1, 0, 1, Outcome::Info), write(2, 0, 3, Outcome::Info)];
        assert_eq!(durable(&evidence(operations, vec![holding(&[2])])), []);
    }

    #[test]
    fn a_failed_row_must_not_be_there() {
        let bad = evidence(vec![write(1, 0, 1, Outcome::Fail)], vec![holding(&[1])]);
        assert_eq!(durable(&bad).len(), 1);
    }

    #[test]
    fn a_row_of_nobody_must_not_be_there() {
        assert_eq!(durable(&evidence(vec![], vec![holding(&[9])])).len(), 1);
    }

    #[test]
    fn quorum_accepts_no_excuse() {
        let mut bad = evidence(vec![write(1, 0, 1, Outcome::Ok)], vec![holding(&[])]);
        bad.kept_apart.insert("a.db".into(), BTreeSet::from([1]));
        bad.lost_disks.push((0, 9));
        assert_eq!(durable(&bad).len(), 1);
    }

    #[test]
    fn async_accepts_what_is_kept_apart_or_was_on_a_disk_that_is_lost() {
        let operations = vec![write(1, 0, 1, Outcome::Ok), write(2, 1, 3, Outcome::Ok)];
        let mut run = evidence(operations, vec![holding(&[])]);
        run.is_quorum = false;
        run.kept_apart.insert("a.db".into(), BTreeSet::from([1]));
        run.lost_disks.push((1, 9));
        assert_eq!(durable(&run), []);
        // The loss of another disk explains nothing, nor does one from before.
        run.lost_disks = vec![(0, 9), (1, 2)];
        assert_eq!(durable(&run).len(), 1);
    }
}
