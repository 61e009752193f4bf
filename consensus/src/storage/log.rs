//! The Raft log and vote on disk: one file that grows, and is written anew when its beginning is purged.
//!
//! It carries membership and settings only, so all of it is kept in memory as well. What holds:
//! the file is a prefix-closed history: a start, then votes, entries, truncations and commit marks in the
//! order in which they were made. Nothing in it is ever changed in place.
//!
//! Votes are here, and not in a file that is replaced, because an election saves three of them one after the other:
//! a record costs one sync, a replaced file two, of which one is of a directory (8 and 22 ms on a busy disk).

use std::collections::BTreeMap;

use serde::Serialize;

use super::frame::{self, Fault, HEADER_LEN};
use crate::mutation::mutated;
use crate::raft::{Entry, LogId, Vote};

pub(crate) const MAGIC: &[u8; 8] = b"litefsrl";

/// Everything up to an entry is gone: the first record of each file, and of no other place.
const START: u32 = 1;
const ENTRY: u32 = 2;
/// The entries from an index on are gone.
const TRUNCATE: u32 = 3;
/// Everything up to an entry is known to be committed. Not synced by itself: a hint.
const COMMITTED: u32 = 4;
const VOTE: u32 = 5;

/// Length from which the file is written anew at the next vote, in bytes.
const LONG: u64 = 1 << 20;

/// The log in memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct LogImage {
    pub(crate) vote: Option<Vote>,
    pub(crate) purged: Option<LogId>,
    pub(crate) committed: Option<LogId>,
    pub(crate) entries: BTreeMap<u64, Entry>,
}

/// A change of the log.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Vote(Vote),
    Append(Vec<Entry>),
    /// Entries from this index on go.
    Truncate(u64),
    Committed(Option<LogId>),
    Purge(LogId),
}

impl LogImage {
    /// Returns the index the next entry must have.
    pub(crate) fn next_index(&self) -> u64 {
        match (self.entries.last_key_value(), &self.purged) {
            (Some((index, _)), _) => index + 1,
            (None, Some(purged)) => purged.index() + 1,
            (None, None) => 0,
        }
    }

    /// Returns the id of the last entry, or of the last purged one.
    pub(crate) fn last_log_id(&self) -> Option<LogId> {
        match self.entries.last_key_value() {
            Some((_, entry)) => Some(entry.log_id),
            None => self.purged,
        }
    }

    /// Makes a change.
    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Vote(vote) => self.vote = Some(*vote),
            Change::Append(entries) => {
                for entry in entries {
                    self.entries.insert(entry.log_id.index(), entry.clone());
                }
            }
            Change::Truncate(from) => {
                self.entries.split_off(from);
            }
            Change::Committed(log_id) => self.committed = *log_id,
            Change::Purge(upto) => {
                self.purged = Some(*upto);
                self.entries = self.entries.split_off(&(upto.index() + 1));
            }
        }
    }

    /// Makes a whole file.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut out = frame::encode_header(MAGIC).to_vec();
        put(&mut out, START, &self.purged)?;
        if self.vote.is_some() {
            put(&mut out, VOTE, &self.vote)?;
        }
        for entry in self.entries.values() {
            put(&mut out, ENTRY, entry)?;
        }
        if self.committed.is_some() {
            put(&mut out, COMMITTED, &self.committed)?;
        }
        Ok(out)
    }

    /// Reads a file back. Returns how much of it is whole; the rest is the remains of a write that was
    /// interrupted and never acknowledged.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(LogImage, u64), (u64, Fault)> {
        frame::decode_header(bytes, MAGIC).map_err(|fault| (0, fault))?;
        let mut image = LogImage::default();
        let mut at = HEADER_LEN;
        while at < bytes.len() {
            let rest = &bytes[at..];
            let (record, len) = match frame::decode_record(rest) {
                Ok(found) => found,
                Err(_) if at > HEADER_LEN && frame::is_torn(rest) => break,
                Err(fault) => return Err((at as u64, fault)),
            };
            image
                .read(record, at == HEADER_LEN)
                .map_err(|fault| (at as u64, fault))?;
            at += len;
        }
        if at == HEADER_LEN {
            return Err((at as u64, Fault::CutShort));
        }
        Ok((image, at as u64))
    }

    fn read(&mut self, record: frame::Record<'_>, is_first: bool) -> Result<(), Fault> {
        if is_first != (record.kind == START) {
            return Err(Fault::Kind(record.kind));
        }
        match record.kind {
            START => self.purged = get(record.body)?,
            ENTRY => {
                let entry: Entry = get(record.body)?;
                let (got, want) = (entry.log_id.index(), self.next_index());
                if got != want {
                    return Err(Fault::Gap { got, want });
                }
                self.entries.insert(got, entry);
            }
            TRUNCATE => self.apply(&Change::Truncate(get(record.body)?)),
            COMMITTED => self.committed = get(record.body)?,
            VOTE => self.vote = Some(get(record.body)?),
            other => return Err(Fault::Kind(other)),
        }
        Ok(())
    }
}

impl Change {
    /// Makes the records that say so; `None` if the file has to be written anew.
    pub(crate) fn encode(&self, file_len: u64) -> Result<Option<Vec<u8>>, serde_json::Error> {
        let mut out = Vec::new();
        match self {
            Change::Vote(_) if file_len > LONG => return Ok(None),
            Change::Vote(vote) => put(&mut out, VOTE, vote)?,
            Change::Append(entries) => {
                for entry in entries {
                    put(&mut out, ENTRY, entry)?;
                }
            }
            Change::Truncate(from) => put(&mut out, TRUNCATE, from)?,
            Change::Committed(log_id) => put(&mut out, COMMITTED, log_id)?,
            Change::Purge(_) => return Ok(None),
        }
        Ok(Some(out))
    }

    /// Says whether Raft counts on it after a power cut.
    pub(crate) fn must_sync(&self) -> bool {
        match self {
            Change::Committed(_) => false,
            Change::Vote(_) => !mutated!(VoteNotSynced),
            _ => !mutated!(LogNotSynced),
        }
    }
}

fn put<T: Serialize>(out: &mut Vec<u8>, kind: u32, value: &T) -> Result<(), serde_json::Error> {
    frame::encode_record(out, kind, &serde_json::to_vec(value)?);
    Ok(())
}

fn get<T: for<'a> serde::Deserialize<'a>>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|e| Fault::Body(e.to_string()))
}
