//! What the clients did and saw: the only thing, beside the final state, that the checkers read.
//!
//! | outcome | means |
//! |---|---|
//! | ok | SQLite reported success |
//! | fail | it definitely did not take place: the error came before COMMIT, or COMMIT said SQLITE_BUSY or SQLITE_FULL |
//! | info | unknown: any other error at COMMIT, or the client was killed, or hung, with the operation open |
//!
//! A process is one thread of one client; it does one operation at a time, and its name is never used again.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// What the clock said: microseconds of the machine's monotonic clock, the same in all processes.
pub type Micros = u64;

/// Reads the clock of histories.
#[must_use]
pub fn now() -> Micros {
    let mut at = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a timespec of ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut at) };
    u64::try_from(at.tv_sec).unwrap_or(0) * 1_000_000
        + u64::try_from(at.tv_nsec).unwrap_or(0) / 1000
}

/// An operation, as its client means it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// Adds a row that nobody else adds; in a bank, together with a transfer.
    Write(i64),
    /// Looks at one snapshot.
    Read,
}

/// What a read saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Rows at the beginning of the transaction.
    pub rows: i64,
    /// Rows at its end.
    pub rows_again: i64,
    /// Sum of all accounts; nothing where there are none.
    pub sum: Option<i64>,
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It took place.
    Ok,
    /// It did not, and never will.
    Fail,
    /// Nobody knows.
    Info,
}

/// One line of what a client writes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// When.
    pub time: Micros,
    /// Which thread of which client.
    pub process: String,
    /// The node it uses.
    pub node: usize,
    /// The database.
    pub db: String,
    /// The operation.
    pub op: Op,
    /// Nothing when it begins.
    pub outcome: Option<Outcome>,
    /// What a read saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<Seen>,
    /// What SQLite said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An operation from begin to end.
#[derive(Debug, Clone)]
pub struct Operation {
    /// Which thread of which client.
    pub process: String,
    /// The node it used.
    pub node: usize,
    /// The database.
    pub db: String,
    /// The operation.
    pub op: Op,
    /// When it began.
    pub begin: Micros,
    /// When it ended; nothing if it never did.
    pub end: Option<Micros>,
    /// How it ended.
    pub outcome: Outcome,
    /// What a read saw.
    pub seen: Option<Seen>,
    /// What SQLite said.
    pub error: Option<String>,
}

/// Joins begins and ends. What has no end is unknown.
///
/// # Errors
/// A line says which process ended what it had not begun: the suite itself is at fault.
pub fn operations(events: &[Event]) -> Result<Vec<Operation>, String> {
    let mut open: HashMap<&str, usize> = HashMap::new();
    let mut all: Vec<Operation> = Vec::new();
    for event in events {
        match event.outcome {
            None => {
                open.insert(&event.process, all.len());
                all.push(Operation {
                    process: event.process.clone(),
                    node: event.node,
                    db: event.db.clone(),
                    op: event.op,
                    begin: event.time,
                    end: None,
                    outcome: Outcome::Info,
                    seen: None,
                    error: None,
                });
            }
            Some(outcome) => {
                let operation = open
                    .remove(event.process.as_str())
                    .and_then(|index| all.get_mut(index))
                    .filter(|operation| operation.op == event.op)
                    .ok_or_else(|| format!("{} ended what it had not begun", event.process))?;
                operation.end = Some(event.time);
                operation.outcome = outcome;
                operation.seen = event.seen;
                operation.error.clone_from(&event.error);
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(process: &str, op: Op, outcome: Option<Outcome>) -> Event {
        Event {
            time: 1,
            process: process.into(),
            node: 0,
            db: "a.db".into(),
            op,
            outcome,
            seen: None,
            error: None,
        }
    }

    #[test]
    fn what_has_no_end_is_unknown() {
        let events = [
            event("a", Op::Write(1), None),
            event("b", Op::Write(2), None),
            event("b", Op::Write(2), Some(Outcome::Ok)),
        ];
        let all = operations(&events).unwrap();
        assert_eq!((all[0].outcome, all[0].end), (Outcome::Info, None));
        assert_eq!(all[1].outcome, Outcome::Ok);
    }

    #[test]
    fn an_end_without_a_begin_is_an_error() {
        assert!(operations(&[event("a", Op::Write(1), Some(Outcome::Ok))]).is_err());
        let events = [
            event("a", Op::Write(1), None),
            event("a", Op::Write(2), Some(Outcome::Ok)),
        ];
        assert!(operations(&events).is_err());
    }
}
