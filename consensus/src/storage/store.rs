//! openraft's view of the log and the vote.

use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::sync::Arc;

use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use parking_lot::Mutex;

use super::Dir;
use super::log::{Change, LogImage};
use crate::raft::{Entry, LogId, TypeConfig, Vote};

/// The log and vote of one node; clones read, the one that openraft was given also writes.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    dir: Dir,
    memory: Arc<Mutex<Memory>>,
}

#[derive(Debug)]
struct Memory {
    image: LogImage,
    /// Where the next record goes.
    file_len: u64,
    /// A write failed, so what the file holds is not known.
    is_doubtful: bool,
}

/// What to do to the file.
enum Write {
    Append { at: u64, bytes: Vec<u8>, sync: bool },
    Replace(Vec<u8>),
}

impl LogStore {
    pub(super) fn new(dir: Dir, image: LogImage, file_len: u64) -> LogStore {
        LogStore {
            dir,
            memory: Arc::new(Mutex::new(Memory {
                image,
                file_len,
                is_doubtful: false,
            })),
        }
    }

    /// Says whether this node has never been part of a cluster.
    pub(crate) fn is_empty(&self) -> bool {
        self.memory.lock().image.last_log_id().is_none()
    }

    /// Makes a change in memory and on disk; returns once it is durable, if it has to be.
    async fn change(&self, change: Change) -> io::Result<()> {
        let sync = change.must_sync();
        let records = {
            let mut memory = self.memory.lock();
            memory.image.apply(&change);
            change.encode(memory.file_len)?
        };
        self.dir
            .insist("log", || self.write(records.clone(), sync))
            .await
    }

    async fn write(&self, records: Option<Vec<u8>>, sync: bool) -> io::Result<()> {
        let path = self.dir.path.join("log");
        let (write, new_len) = self.memory.lock().next_write(records, sync)?;
        let done = self.dir.run(move |disk| match write {
            Write::Append { at, bytes, sync } => disk.write(&path, at, &bytes, sync),
            Write::Replace(bytes) => disk.replace(&path, &bytes),
        });
        done.await?;
        let mut memory = self.memory.lock();
        memory.file_len = new_len;
        memory.is_doubtful = false;
        Ok(())
    }
}

impl Memory {
    fn next_write(&mut self, records: Option<Vec<u8>>, sync: bool) -> io::Result<(Write, u64)> {
        let was_doubtful = std::mem::replace(&mut self.is_doubtful, true);
        match records {
            Some(bytes) if !was_doubtful => {
                let at = self.file_len;
                let end = at + bytes.len() as u64;
                Ok((Write::Append { at, bytes, sync }, end))
            }
            _ => {
                let bytes = self.image.encode()?;
                let len = bytes.len() as u64;
                Ok((Write::Replace(bytes), len))
            }
        }
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<Entry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let memory = self.memory.lock();
        Ok(memory
            .image
            .entries
            .range(range)
            .map(|(_, entry)| entry.clone())
            .collect())
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.memory.lock().image.vote)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let memory = self.memory.lock();
        Ok(LogState {
            last_purged_log_id: memory.image.purged,
            last_log_id: memory.image.last_log_id(),
        })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.change(Change::Vote(*vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.change(Change::Committed(committed)).await
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.memory.lock().image.committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter().collect();
        self.change(Change::Append(entries)).await?;
        callback.io_completed(Ok(()));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        let from = last_log_id.map_or(0, |log_id| log_id.index() + 1);
        self.change(Change::Truncate(from)).await
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        self.change(Change::Purge(log_id)).await
    }
}
