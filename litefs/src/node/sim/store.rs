//! What a node has on its disk: histories of which a first part is synced.

use std::collections::BTreeMap;

use crate::ltx::{Checksum, Pos, Txid};
use crate::replication::DbName;

/// One transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tx {
    /// Tells it from all others.
    pub(crate) id: u64,
    /// Tenure in which it was logged.
    pub(crate) epoch: u64,
    /// The database is removed; its TXIDs go on if it is made again.
    pub(crate) is_drop: bool,
    /// Stands for all up to it.
    sum: u64,
}

/// A copy of a database.
#[derive(Debug, Clone, Default)]
pub(crate) struct Copy {
    pub(crate) log: Vec<Tx>,
    /// How much of the log survives a power cut.
    pub(crate) synced: usize,
    /// Tenure of the last transaction, as the log says: zero, or that of an older log, after a copy of pages.
    pub(crate) label: u64,
    /// Committed by programs, and not captured yet.
    pub(crate) wal: Vec<u64>,
    /// What this node may say that it has on disk.
    pub(crate) durable: Pos,
    /// Whether programs may write here.
    pub(crate) is_primary: bool,
    /// The write transaction of a program.
    pub(crate) writer: Option<u64>,
    /// Has a commit that did not get its quorum.
    pub(crate) is_in_doubt: bool,
}

/// What survives a crash.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    pub(crate) dbs: BTreeMap<DbName, Copy>,
    pub(crate) seen: u64,
    pub(crate) accepted: u64,
    pub(crate) was_primary: bool,
    pub(crate) quarantine: Vec<u64>,
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 31)
}

/// Returns where a history ends.
pub(crate) fn end_of(log: &[Tx]) -> Pos {
    log.last().map_or(Pos::ZERO, |last| Pos {
        txid: Txid(log.len() as u64),
        post_apply_checksum: Checksum::new(last.sum),
    })
}

impl Copy {
    pub(crate) fn pos(&self) -> Pos {
        end_of(&self.log)
    }

    /// Returns where it was after so many transactions.
    pub(crate) fn pos_at(&self, txid: Txid) -> Pos {
        let n = usize::try_from(txid.0).unwrap_or(usize::MAX);
        end_of(&self.log[..n.min(self.log.len())])
    }

    pub(crate) fn append(&mut self, id: u64, epoch: u64) {
        let sum = mix(self.log.last().map_or(0, |last| last.sum), id);
        self.log.push(Tx {
            id,
            epoch,
            is_drop: false,
            sum,
        });
        self.label = self.label.max(epoch);
    }

    pub(crate) fn is_dropped(&self) -> bool {
        self.log.last().is_some_and(|last| last.is_drop)
    }

    /// Logs that the database is gone.
    pub(crate) fn append_drop(&mut self, id: u64, epoch: u64) {
        self.append(id, epoch);
        if let Some(last) = self.log.last_mut() {
            last.is_drop = true;
        }
    }

    /// Logs what programs committed.
    pub(crate) fn capture(&mut self, epoch: u64) {
        for id in std::mem::take(&mut self.wal) {
            self.append(id, epoch);
        }
    }

    pub(crate) fn sync(&mut self) {
        self.synced = self.log.len();
    }

    pub(crate) fn has(&self, id: u64) -> bool {
        self.log.iter().any(|tx| tx.id == id)
    }
}

impl Disk {
    /// Makes all logs durable.
    pub(crate) fn sync_all(&mut self) {
        self.dbs.values_mut().for_each(Copy::sync);
    }

    /// What a process leaves behind. `cut` says how much of what was not synced goes with it: nothing if only it died.
    /// Returns what is lost.
    pub(crate) fn crash(&mut self, mut cut: impl FnMut(usize) -> usize) -> Vec<u64> {
        let mut lost = Vec::new();
        for copy in self.dbs.values_mut() {
            let unsynced = copy.log.len() - copy.synced;
            let gone = cut(unsynced + copy.wal.len());
            for _ in 0..gone {
                let last = copy.wal.pop().or_else(|| copy.log.pop().map(|tx| tx.id));
                lost.extend(last);
            }
            copy.durable = Pos::ZERO;
            copy.is_primary = false;
            copy.writer = None;
            copy.is_in_doubt = false;
        }
        lost
    }

    /// Opens what is there: the files are compared with the log, and what it lacks is captured.
    pub(crate) fn recover(&mut self) {
        let seen = self.seen;
        for copy in self.dbs.values_mut() {
            copy.capture(seen);
        }
    }
}
