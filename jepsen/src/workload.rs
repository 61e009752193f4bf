//! The databases, and what is done to them.
//!
//! All have `t(id, pad)`, whose rows are written once each. A bank has accounts too: a transfer and its row are one
//! transaction.

use std::str::FromStr;

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

use crate::dice::Dice;
use crate::history::{Outcome, Seen};

/// Accounts of a bank.
pub(crate) const ACCOUNTS: i64 = 8;
/// What each has at first.
const BALANCE: i64 = 100;
/// What all of them have, always.
pub(crate) const TOTAL: i64 = ACCOUNTS * BALANCE;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workload {
    /// Unique rows.
    Set,
    /// Transfers.
    Bank,
    /// Both at the same time.
    All,
}

impl FromStr for Workload {
    type Err = String;
    fn from_str(text: &str) -> Result<Workload, String> {
        match text {
            "set" => Ok(Workload::Set),
            "bank" => Ok(Workload::Bank),
            "all" => Ok(Workload::All),
            other => Err(format!("no workload is called {other}: set, bank, all")),
        }
    }
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Workload::Set => "set",
            Workload::Bank => "bank",
            Workload::All => "all",
        })
    }
}

/// One database of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Database {
    pub(crate) name: &'static str,
    pub(crate) journal: &'static str,
    pub(crate) is_bank: bool,
}

const DATABASES: [Database; 4] = [
    Database {
        name: "set-wal.db",
        journal: "wal",
        is_bank: false,
    },
    Database {
        name: "set-delete.db",
        journal: "delete",
        is_bank: false,
    },
    Database {
        name: "bank-wal.db",
        journal: "wal",
        is_bank: true,
    },
    Database {
        name: "bank-delete.db",
        journal: "delete",
        is_bank: true,
    },
];

impl Workload {
    pub(crate) fn databases(self) -> Vec<Database> {
        DATABASES
            .into_iter()
            .filter(|db| match self {
                Workload::Set => !db.is_bank,
                Workload::Bank => db.is_bank,
                Workload::All => true,
            })
            .collect()
    }
}

/// Opens a database that is there.
pub(crate) fn open(dir: &Path, database: Database, busy: Duration) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(dir.join(database.name), flags)?;
    db.busy_timeout(busy)?;
    // What is acknowledged survives a power cut: in rollback modes, the removal of the journal must be synced too.
    let synchronous = if database.journal == "wal" {
        "full"
    } else {
        "extra"
    };
    db.pragma_update(None, "synchronous", synchronous)?;
    Ok(db)
}

/// Makes the databases, on the primary.
pub(crate) fn create(dir: &Path, workload: Workload) -> anyhow::Result<()> {
    for database in workload.databases() {
        let mut db = Connection::open(dir.join(database.name))?;
        db.busy_timeout(Duration::from_secs(10))?;
        let mode: String = db.query_row(
            &format!("PRAGMA journal_mode={}", database.journal),
            [],
            |r| r.get(0),
        )?;
        anyhow::ensure!(
            mode == database.journal,
            "{} is in mode {mode}",
            database.name
        );
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.execute_batch("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, pad BLOB)")?;
        if database.is_bank {
            tx.execute_batch(
                "CREATE TABLE IF NOT EXISTS accounts(id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)",
            )?;
            for id in 0..ACCOUNTS {
                tx.execute(
                    "INSERT OR IGNORE INTO accounts VALUES(?1, ?2)",
                    (id, BALANCE),
                )?;
            }
        }
        tx.commit()?;
    }
    Ok(())
}

/// How a write went wrong.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) outcome: Outcome,
    pub(crate) error: rusqlite::Error,
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Failure {
        Failure {
            outcome: Outcome::Fail,
            error,
        }
    }
}

impl Failure {
    fn at_commit(error: rusqlite::Error) -> Failure {
        let outcome = match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DiskFull) => Outcome::Fail,
            _ => Outcome::Info,
        };
        Failure { outcome, error }
    }
}

/// Writes a row, and makes a transfer with it where there are accounts.
pub(crate) fn write(
    db: &mut Connection,
    database: Database,
    id: i64,
    dice: &mut Dice,
) -> Result<(), Failure> {
    let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let pad = match dice.below(20) {
        0 => 20_000,
        n => 40 * n,
    };
    tx.execute(
        "INSERT INTO t VALUES(?1, randomblob(?2))",
        (id, i64::try_from(pad).unwrap_or(0)),
    )?;
    if database.is_bank {
        let from = dice.below(ACCOUNTS.unsigned_abs());
        let to = (from + 1 + dice.below(ACCOUNTS.unsigned_abs() - 1)) % ACCOUNTS.unsigned_abs();
        let amount = i64::try_from(dice.between(1, 10)).unwrap_or(1);
        let transfer = "UPDATE accounts SET balance = balance + ?2 WHERE id = ?1";
        for (account, change) in [(from, -amount), (to, amount)] {
            let account = i64::try_from(account).unwrap_or(0);
            let changed = tx.execute(transfer, (account, change))?;
            if changed != 1 {
                return Err(rusqlite::Error::StatementChangedRows(changed).into());
            }
        }
    }
    // By hand: `Transaction::commit` gives the connection back only when it is well.
    tx.execute_batch("COMMIT").map_err(Failure::at_commit)
}

/// Looks at a snapshot, twice.
pub(crate) fn read(db: &mut Connection, database: Database) -> rusqlite::Result<Seen> {
    let tx = db.transaction()?;
    let rows = "SELECT count(*) FROM t";
    let first = tx.query_row(rows, [], |r| r.get(0))?;
    let sum = if database.is_bank {
        let half = |half: &str| {
            let sql = format!("SELECT coalesce(sum(balance), 0) FROM accounts WHERE id {half} 4");
            tx.query_row(&sql, [], |r| r.get::<_, i64>(0))
        };
        Some(half("<")? + half(">=")?)
    } else {
        None
    };
    let again = tx.query_row(rows, [], |r| r.get(0))?;
    tx.commit()?;
    Ok(Seen {
        rows: first,
        rows_again: again,
        sum,
    })
}

/// What a database holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// What `PRAGMA integrity_check` says.
    pub integrity: String,
    /// All rows of `t`.
    pub ids: Vec<i64>,
    /// Sum of all accounts; nothing where there are none.
    pub sum: Option<i64>,
    /// CRC-32 of all values of all rows.
    pub crc: u32,
}

/// Reads all of a database.
pub(crate) fn content(db: &Connection) -> rusqlite::Result<Content> {
    let integrity = db.query_row("PRAGMA integrity_check", [], |r| r.get(0))?;
    let mut crc = crc32fast::Hasher::new();
    let mut ids = Vec::new();
    let mut all = db.prepare("SELECT id, pad FROM t ORDER BY id")?;
    let mut rows = all.query([])?;
    while let Some(row) = rows.next()? {
        let id: i64 = row.get(0)?;
        crc.update(&id.to_le_bytes());
        crc.update(&row.get::<_, Vec<u8>>(1)?);
        ids.push(id);
    }
    let has_accounts: bool = db.query_row(
        "SELECT count(*) FROM sqlite_schema WHERE name='accounts'",
        [],
        |r| r.get(0),
    )?;
    let mut sum = None;
    if has_accounts {
        let mut all = db.prepare("SELECT id, balance FROM accounts ORDER BY id")?;
        let mut rows = all.query([])?;
        while let Some(row) = rows.next()? {
            let (id, balance): (i64, i64) = (row.get(0)?, row.get(1)?);
            crc.update(&id.to_le_bytes());
            crc.update(&balance.to_le_bytes());
            sum = Some(sum.unwrap_or(0) + balance);
        }
    }
    Ok(Content {
        integrity,
        ids,
        sum,
        crc: crc.finalize(),
    })
}

/// Names an error, in short.
pub(crate) fn show(error: &rusqlite::Error) -> String {
    match error {
        rusqlite::Error::SqliteFailure(code, text) => format!(
            "{:?} {}: {}",
            code.code,
            code.extended_code,
            text.as_deref().unwrap_or_default()
        ),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bank_keeps_its_total() {
        let dir = std::env::temp_dir().join(format!("jepsen-bank-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        create(&dir, Workload::All).unwrap();
        for database in Workload::All.databases() {
            let mut db = open(&dir, database, Duration::ZERO).unwrap();
            let mut dice = Dice::new(1);
            for id in 0..30 {
                write(&mut db, database, id, &mut dice).unwrap();
            }
            // The same row again fails, and leaves nothing behind.
            let again = write(&mut db, database, 3, &mut dice).unwrap_err();
            assert_eq!(again.outcome, Outcome::Fail);
            let sum = database.is_bank.then_some(TOTAL);
            let seen = read(&mut db, database).unwrap();
            assert_eq!(
                seen,
                Seen {
                    rows: 30,
                    rows_again: 30,
                    sum
                }
            );
            let content = content(&db).unwrap();
            assert_eq!(content.ids, (0..30).collect::<Vec<_>>());
            assert_eq!((content.sum, content.integrity.as_str()), (sum, "ok"));
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
