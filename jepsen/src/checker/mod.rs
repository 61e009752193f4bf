//! Checkers: each names a guarantee, and reads only the history and the final state.
//!
//! None of them asks litefs what happened. What a checker cannot see it must not excuse: an acknowledged row that is missing
//! is lost unless a rule written here accounts for it.

mod alive;
mod bank;
mod durable;
mod same;

use std::collections::{BTreeMap, BTreeSet};

use crate::history::{Micros, Operation, Outcome};
use crate::workload::Content;

pub use alive::{RESUME, alive};
pub use bank::snapshots;
pub use durable::{durable, missing};
pub use same::same;

/// Something that was promised and did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anomaly {
    /// The guarantee.
    pub guarantee: &'static str,
    /// The database, or nothing.
    pub db: String,
    /// What was seen.
    pub text: String,
}

/// A time in which a majority was there.
#[derive(Debug, Clone)]
pub struct Window {
    /// What was broken.
    pub fault: String,
    /// When it began to be.
    pub begin: Micros,
    /// When it was taken back.
    pub end: Micros,
}

/// A database on a node, at the end.
#[derive(Debug, Clone)]
pub struct Final {
    /// Its position.
    pub pos: Option<String>,
    /// What is in it, or why it cannot be read.
    pub content: Result<Content, String>,
}

/// All that is known once a run is over.
#[derive(Debug, Default)]
pub struct Evidence {
    /// What the clients did and saw.
    pub operations: Vec<Operation>,
    /// By database: the state on each node.
    pub finals: BTreeMap<String, Vec<Final>>,
    /// By database: rows in what the nodes keep apart of histories that lost.
    pub kept_apart: BTreeMap<String, BTreeSet<i64>>,
    /// Commits are acknowledged by a majority.
    pub is_quorum: bool,
    /// Disks that were lost: the node, and when.
    pub lost_disks: Vec<(usize, Micros)>,
    /// Times in which a majority was there.
    pub windows: Vec<Window>,
    /// When the last fault was taken back.
    pub healed: Micros,
    /// What the suite itself saw: a node that ended, a log with a panic.
    pub troubles: Vec<String>,
}

impl Evidence {
    fn of<'a>(&'a self, db: &'a str) -> impl Iterator<Item = &'a Operation> {
        self.operations.iter().filter(move |o| o.db == db)
    }
}

/// What all checkers say.
#[must_use]
pub fn check(evidence: &Evidence) -> Vec<Anomaly> {
    let mut all: Vec<Anomaly> = evidence
        .troubles
        .iter()
        .map(|text| anomaly("node", "", text))
        .collect();
    all.extend(durable(evidence));
    all.extend(same(evidence));
    all.extend(snapshots(evidence));
    all.extend(alive(evidence));
    all
}

fn anomaly(guarantee: &'static str, db: &str, text: impl Into<String>) -> Anomaly {
    Anomaly {
        guarantee,
        db: db.to_owned(),
        text: text.into(),
    }
}

/// Counts operations by outcome.
#[must_use]
pub fn count(operations: &[Operation]) -> [usize; 3] {
    [Outcome::Ok, Outcome::Fail, Outcome::Info]
        .map(|outcome| operations.iter().filter(|o| o.outcome == outcome).count())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::history::Op;

    /// A write at a node, from `at` to one microsecond later.
    pub(crate) fn write(id: i64, node: usize, at: Micros, outcome: Outcome) -> Operation {
        Operation {
            process: format!("n{node}"),
            node,
            db: "a.db".into(),
            op: Op::Write(id),
            begin: at,
            end: Some(at + 1),
            outcome,
            seen: None,
            error: None,
        }
    }

    pub(crate) fn holding(ids: &[i64]) -> Final {
        Final {
            pos: Some("1/2".into()),
            content: Ok(Content {
                integrity: "ok".into(),
                ids: ids.to_vec(),
                sum: None,
                crc: 3,
            }),
        }
    }

    pub(crate) fn evidence(operations: Vec<Operation>, finals: Vec<Final>) -> Evidence {
        Evidence {
            operations,
            finals: BTreeMap::from([("a.db".to_owned(), finals)]),
            is_quorum: true,
            ..Evidence::default()
        }
    }

    #[test]
    fn a_good_run_is_accepted() {
        let operations = vec![write(1, 0, 1, Outcome::Ok), write(2, 0, 3, Outcome::Fail)];
        let good = evidence(operations, vec![holding(&[1]), holding(&[1])]);
        assert_eq!(check(&good), []);
    }

    #[test]
    fn troubles_are_anomalies() {
        let mut bad = evidence(vec![write(1, 0, 1, Outcome::Ok)], vec![holding(&[1])]);
        bad.troubles.push("n0: a panic".into());
        assert_eq!(check(&bad).len(), 1);
    }
}
