//! Keeps what a history that lost had, before another takes its place.
//!
//! ```text
//! dbs/<digits>/lost/<id>/lost.json          what it is, with a CRC-32
//! dbs/<digits>/lost/<id>/database.db        the whole database, as SQLite's readers saw it
//! dbs/<digits>/lost/<id>/transactions.seg   what the log had since the histories part, one by one
//! dbs/<digits>/lost/<id>.tmp/               one in the making, or on its way out; removed at the next start
//! ```
//!
//! What holds:
//! - INV-LOST-1: an entry is whole and durable under its name before anything of what it is about is written over, and
//!   before the log lets go of it; nothing but `discard` removes one;
//! - INV-LOST-2: what a node wrote as the primary is let go without an entry only if the new history has been exactly where
//!   this one ends.
//!
//! A start that finds the log at the winner's position and the files neither there nor where they were has a copy of the
//! branch: the mark `giving-way`, with that position, says so from before the log begins anew until the database is a
//! primary's again.
//!
//! Where two histories part is told by positions: the primary says where its own has been ([`Milestone`]), and the newest
//! that our log has too, with the same checksum of all pages, is common to both.
//!
//! Format: docs/formats/lost.md.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::log::{Apart, Milestone, Older, write_apart};
use super::page_checksums::PageChecksums;
use super::view::View;
use super::{Db, DbError, Inner};
use crate::disk::crash_point;
use crate::ltx::{Checksum, Pos, Txid};

/// Names of what is done to keep a branch, and to remove one.
pub mod steps {
    crate::disk::steps! {
        CLEAN = "lost.clean:remove",
        DIR = "lost.keep:dir",
        DATABASE = "lost.keep:database",
        DATABASE_SYNC = "lost.keep:database_sync",
        TRANSACTIONS = "lost.keep:transactions",
        METADATA = "lost.keep:metadata",
        REPLACE = "lost.keep:replace",
        RENAME = "lost.keep:rename",
        KEPT = "lost.keep:kept",
        MARK = "lost.mark:write",
        UNMARK = "lost.mark:remove",
    }
}

/// Names of what is done to remove one, when an operator says so.
pub mod discard_steps {
    crate::disk::steps! {
        RENAME = "lost.discard:rename",
        REMOVE = "lost.discard:remove",
    }
}

/// Directory of the entries, beside the log of a database.
pub const DIR: &str = "lost";
/// Describes an entry.
pub const METADATA: &str = "lost.json";
/// The whole database.
pub const DATABASE: &str = "database.db";
/// Records of the log.
pub const TRANSACTIONS: &str = "transactions.seg";
/// Ends the name of a directory that is no entry, or none any more.
pub const UNFINISHED: &str = "tmp";

const CRC_LINE: &str = "crc32 ";

/// So many whole copies are kept of each database, and more as long as they are small together.
const KEPT_COPIES: usize = 3;
const KEPT_BYTES: u64 = 256 << 20;
/// Most bytes of the log that an entry takes over; more stays in `quarantine`.
const MAX_LOG_LEN: u64 = 256 << 20;
/// Positions of our own history that are compared with the primary's.
const MAX_OWN_MILESTONES: usize = 1 << 17;

/// Why a history gave way to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Another node was elected, and does not have it.
    LostElection,
    /// The node follows another, of the same tenure, which has another history.
    Replaced,
    /// The primary dropped the database.
    Dropped,
    /// A tenure ended with pages that its log does not have.
    NotInLog,
    /// There are only files.
    Unknown,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reason::LostElection => "lost election",
            Reason::Replaced => "replaced",
            Reason::Dropped => "dropped",
            Reason::NotInLog => "not in log",
            Reason::Unknown => "unknown",
        })
    }
}

/// Whose history took the place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Winner {
    /// Its tenure.
    pub epoch: u64,
    /// Where it was then.
    pub pos: String,
}

/// What an entry has of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Logged {
    /// Records; a record may be of several transactions.
    pub record_count: u64,
    /// Transactions in them.
    pub tx_count: u64,
    /// First transaction, 16 hex digits; empty if there is none.
    pub first: String,
    /// Last transaction.
    pub last: String,
    /// Length of the file.
    pub bytes: u64,
    /// All transactions since the histories part, or all that the log had if that is not known. If not, the rest is in
    /// `quarantine`, as far as it could be read at all.
    pub is_whole: bool,
}

impl From<Apart> for Logged {
    fn from(apart: Apart) -> Logged {
        let show = |txid: Txid| match txid {
            Txid::ZERO => String::new(),
            txid => txid.to_string(),
        };
        Logged {
            record_count: apart.record_count,
            tx_count: apart.tx_count,
            first: show(apart.first),
            last: show(apart.last),
            bytes: apart.len,
            is_whole: apart.is_all_there_is && apart.is_from_there,
        }
    }
}

/// The copy of the database in an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Copied {
    /// Its length.
    pub bytes: u64,
    /// Bytes per page.
    pub page_size: u32,
    /// Pages.
    pub page_count: u32,
    /// Checksum of all pages, as it was read back.
    pub checksum: String,
}

/// One lost branch: what `lost.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Version of the format, 1.
    pub version: u32,
    /// 16 hex digits, made of the database's name and the last position: the same branch has the same.
    pub id: String,
    /// Name of the database.
    pub database: String,
    /// Wall clock, milliseconds since 1970.
    pub when_ms: i64,
    /// Why.
    pub reason: Reason,
    /// The node, 16 hex digits.
    pub node_id: String,
    /// Its host name.
    pub hostname: String,
    /// Where the branch ended.
    pub last: String,
    /// Tenure of its last transaction.
    pub epoch: u64,
    /// Newest position that is known to be common to both histories.
    pub fork: Option<String>,
    /// What took its place, if that is known.
    pub winner: Option<Winner>,
    /// How many transactions were lost, at most; none if nothing tells where the histories part.
    pub lost_count: Option<u64>,
    /// Those that the log had.
    pub transactions: Logged,
    /// The database; none if there were too many copies already, or no pages.
    pub copy: Option<Copied>,
    /// What is odd about it, in words.
    pub note: Option<String>,
}

impl Entry {
    /// Writes it as it is on disk.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        let crc = crc32fast::hash(text.as_bytes());
        text.push_str(&format!("{CRC_LINE}{crc:08x}\n"));
        text.into_bytes()
    }

    /// Reads it back.
    ///
    /// # Errors
    /// In words, what is wrong with the bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Entry, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "not text")?;
        let at = text.rfind(CRC_LINE).ok_or("cut short")?;
        let (json, crc) = text.split_at(at);
        let crc = crc.trim_start_matches(CRC_LINE).trim_end();
        if crc != format!("{:08x}", crc32fast::hash(json.as_bytes())) {
            return Err("crc-32 mismatch".to_owned());
        }
        let entry: Entry = serde_json::from_str(json).map_err(|e| e.to_string())?;
        match entry.version {
            1 => Ok(entry),
            other => Err(format!("of format version {other}")),
        }
    }

    /// Reads the entry in a directory.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub fn read(dir: &Path) -> Result<Entry, String> {
        let bytes = fs::read(dir.join(METADATA)).map_err(|e| e.to_string())?;
        Entry::from_bytes(&bytes)
    }
}

/// Names an entry by what it is about.
#[must_use]
pub fn entry_id(database: &str, what: &str) -> String {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64GoIso);
    digest.update(database.as_bytes());
    digest.update(b"\n");
    digest.update(what.as_bytes());
    format!("{:016x}", digest.finalize())
}

/// How our history and the primary's go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Relation {
    /// The primary's has been where ours ends.
    Within,
    /// It has not: they part after this position.
    Parted(Pos),
    /// That cannot be told; a position that is common to both, if one is known.
    Unknown(Option<Pos>),
}

impl Relation {
    pub(super) fn fork(self) -> Option<Pos> {
        match self {
            Relation::Within => None,
            Relation::Parted(fork) => Some(fork),
            Relation::Unknown(fork) => fork,
        }
    }
}

/// Compares two histories, both newest first; ours ends at `end`.
pub(super) fn relate(end: Pos, ours: &[Milestone], theirs: &[Milestone]) -> Relation {
    if theirs.iter().any(|m| m.pos == end) {
        return Relation::Within;
    }
    let of_ours: BTreeMap<Txid, Checksum> = ours
        .iter()
        .map(|m| (m.pos.txid, m.pos.post_apply_checksum))
        .collect();
    let is_ours =
        |pos: Pos| pos.txid <= end.txid && of_ours.get(&pos.txid) == Some(&pos.post_apply_checksum);
    let Some(i) = theirs.iter().position(|m| is_ours(m.pos)) else {
        return Relation::Unknown(None);
    };
    let fork = theirs[i].pos;
    // Newer than the newest that is common: any TXID that both have, they have otherwise.
    let differs = theirs[..i]
        .iter()
        .any(|m| m.pos.txid <= end.txid && of_ours.contains_key(&m.pos.txid));
    let next_of = |list: &[Milestone]| {
        let after = list.iter().rev().find(|m| m.pos.txid > fork.txid);
        after.map(|m| m.epoch).filter(|epoch| *epoch > 0)
    };
    // One tenure has one history.
    let is_other_tenure = match (next_of(ours), next_of(theirs)) {
        (Some(ours), Some(theirs)) => ours != theirs,
        _ => false,
    };
    if differs || is_other_tenure {
        Relation::Parted(fork)
    } else {
        Relation::Unknown(Some(fork))
    }
}

/// What is to be kept, and why.
pub(super) struct Losing {
    pub(super) reason: Reason,
    /// Where the branch ends.
    pub(super) last: Pos,
    pub(super) fork: Option<Pos>,
    pub(super) winner: Option<(u64, Pos)>,
}

impl Db {
    /// Compares this history with where the primary's has been.
    pub(super) fn relation(&self, inner: &Inner, theirs: &[Milestone]) -> Relation {
        let ours = self.log.milestones(inner.pos.txid, MAX_OWN_MILESTONES);
        relate(inner.pos, &ours, theirs)
    }

    /// Says that what is here is kept, and that the files become what the log is going to say; until then they are nothing.
    pub(super) fn begin_giving_way(&self, target: Pos) -> Result<(), DbError> {
        let (mark, tmp) = (self.giving_way(), self.paths.meta.join("giving-way.tmp"));
        fs::write(&tmp, target.to_string())
            .and_then(|()| File::open(&tmp)?.sync_all())
            .and_then(|()| self.node.disk.rename(steps::MARK, &tmp, &mark))
            .map_err(DbError::io("write", &mark))
    }

    /// Returns whether the files may be the remains of a branch that is kept, and of what takes its place.
    pub(super) fn is_giving_way(&self) -> bool {
        fs::read_to_string(self.giving_way())
            .is_ok_and(|target| target == self.log.end_pos().to_string())
    }

    /// From now on what the files have is their own.
    pub(super) fn end_giving_way(&self) -> Result<(), DbError> {
        let mark = self.giving_way();
        if !mark.exists() {
            return Ok(());
        }
        crash_point(steps::UNMARK);
        fs::remove_file(&mark)
            .and_then(|()| File::open(&self.paths.meta)?.sync_all())
            .map_err(DbError::io("remove", &mark))
    }

    fn giving_way(&self) -> PathBuf {
        self.paths.meta.join("giving-way")
    }

    fn lost_dir(&self) -> PathBuf {
        self.paths.meta.join(DIR)
    }

    /// Removes what an interrupted start or a full disk left of an entry in the making.
    pub(super) fn clean_lost(&self) -> Result<(), DbError> {
        let Ok(dirs) = fs::read_dir(self.lost_dir()) else {
            return Ok(());
        };
        for dir in dirs.filter_map(Result::ok).map(|entry| entry.path()) {
            if dir.extension().is_some_and(|e| e == UNFINISHED) {
                crash_point(steps::CLEAN);
                fs::remove_dir_all(&dir).map_err(DbError::io("remove", &dir))?;
            }
        }
        Ok(())
    }

    /// Keeps the database and what the log has since the fork, durably (INV-LOST-1). Returns what may become of the log.
    pub(super) fn keep_lost(&self, losing: &Losing) -> Result<Older, DbError> {
        let dir = self.lost_dir();
        let id = entry_id(self.name.as_str(), &losing.last.to_string());
        let (path, tmp) = (dir.join(&id), dir.join(format!("{id}.{UNFINISHED}")));
        if let Ok(kept) = Entry::read(&path)
            && is_as_whole(&kept, losing.fork)
        {
            // A start that died before the branch was let go, most likely; it is the same one.
            self.say_kept(&kept, &path);
            // What the entry has of the log may go.
            return Ok(older(kept.transactions.is_whole));
        }
        let made = self.make_entry(losing, &id, &tmp);
        let (entry, older) = match made {
            Ok(made) => made,
            Err(error) => {
                // The room is needed; what it is about is where it was.
                let _ = fs::remove_dir_all(&tmp);
                return Err(error);
            }
        };
        if path.exists() {
            crash_point(steps::REPLACE);
            fs::remove_dir_all(&path).map_err(DbError::io("remove", &path))?;
        }
        self.node
            .disk
            .rename(steps::RENAME, &tmp, &path)
            .map_err(DbError::io("rename", &path))?;
        crash_point(steps::KEPT);
        self.say_kept(&entry, &path);
        if let Some(tell) = self.node.on_lost.get() {
            tell(&entry);
        }
        Ok(older)
    }

    fn say_kept(&self, entry: &Entry, path: &Path) {
        let (id, last, reason) = (&entry.id, &entry.last, entry.reason);
        let winner = entry.winner.as_ref().map(|w| w.pos.as_str());
        if entry.copy.is_none() && entry.note.is_some() {
            tracing::error!(
                db = %self.name, was = last, now = winner, %reason, lost = entry.lost_count,
                note = entry.note.as_deref(), dir = %path.display(),
                "another history takes the place of ours, of which only the transactions are kept in the directory: see \
                 `litefs lost show {id}`, and `litefs lost discard` for those that are not needed"
            );
            return;
        }
        tracing::warn!(
            db = %self.name, was = last, now = winner, %reason, lost = entry.lost_count, dir = %path.display(),
            "another history takes the place of ours, which is kept in the directory: see `litefs lost show {id}`, and \
             `litefs lost discard {id}` once nothing in it is needed"
        );
    }

    fn make_entry(&self, losing: &Losing, id: &str, tmp: &Path) -> Result<(Entry, Older), DbError> {
        crash_point(steps::DIR);
        match fs::remove_dir_all(tmp) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(DbError::io("remove", tmp)(e));
            }
            _ => {}
        }
        fs::create_dir_all(tmp).map_err(DbError::io("create directory", tmp))?;
        // The rename makes the entry durable; this, the directory that has it.
        let sync_dir = |dir: &Path| File::open(dir).and_then(|d| d.sync_all());
        sync_dir(&self.paths.meta).map_err(DbError::io("sync", &self.paths.meta))?;
        let (copy, mut note) = self.copy_database(&tmp.join(DATABASE))?;
        if let Some(copy) = &copy
            && copy.checksum != losing.last.post_apply_checksum.to_string()
        {
            let last = losing.last;
            note = Some(format!(
                "the copy has checksum {}, the branch ended at {last}: it was half written, or its pages were damaged",
                copy.checksum
            ));
        }
        let path = tmp.join(TRANSACTIONS);
        let after = losing.fork.map_or(Txid::ZERO, |fork| fork.txid);
        let apart = write_apart(&self.log, after, &path, MAX_LOG_LEN, steps::TRANSACTIONS)
            .map_err(DbError::io("write", &path))?;
        let end = self.log.end();
        let epoch = end.map_or(0, |end| end.epoch);
        let entry = Entry {
            version: 1,
            id: id.to_owned(),
            database: self.name.to_string(),
            when_ms: crate::clock::wall_ms(),
            reason: match losing.reason {
                // What was lost to a later tenure was lost to an election.
                Reason::Replaced if losing.winner.is_some_and(|(of, _)| of > epoch) => {
                    Reason::LostElection
                }
                reason => reason,
            },
            node_id: format!("{:016X}", self.node.node_id),
            hostname: self.node.hostname.clone(),
            last: losing.last.to_string(),
            epoch,
            fork: losing.fork.map(|fork| fork.to_string()),
            winner: losing.winner.map(|(epoch, pos)| Winner {
                epoch,
                pos: pos.to_string(),
            }),
            lost_count: losing
                .fork
                .filter(|_| losing.reason != Reason::NotInLog)
                .map(|fork| losing.last.txid.0.saturating_sub(fork.txid.0)),
            transactions: Logged {
                is_whole: apart.is_all_there_is && (losing.fork.is_none() || apart.is_from_there),
                ..Logged::from(apart)
            },
            copy,
            note,
        };
        let path = tmp.join(METADATA);
        crash_point(steps::METADATA);
        fs::write(&path, entry.to_bytes())
            .and_then(|()| File::open(&path)?.sync_all())
            .and_then(|()| sync_dir(tmp))
            .map_err(DbError::io("write", &path))?;
        Ok((entry, older(apart.is_all_there_is)))
    }

    /// Copies the database as its readers see it, unless there are many such copies; says why not then.
    fn copy_database(&self, path: &Path) -> Result<(Option<Copied>, Option<String>), DbError> {
        let Some(view) = View::open(&self.paths, true)? else {
            return Ok((None, None));
        };
        let bytes = u64::from(view.page_count) * u64::from(view.page_size.get());
        let copies = copies_in(&self.lost_dir());
        if copies.len() >= KEPT_COPIES && copies.iter().sum::<u64>() + bytes > KEPT_BYTES {
            let note = format!(
                "the whole database was not copied: there are {} copies already",
                copies.len()
            );
            return Ok((None, Some(note)));
        }
        crash_point(steps::DATABASE);
        let copy = || -> std::io::Result<Checksum> {
            let mut file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)?;
            std::io::copy(&mut File::open(&self.paths.main)?, &mut file)?;
            let mut page = vec![0; view.page_size.len()];
            for pgno in view.wal_pages().filter(|p| p.get() <= view.page_count) {
                view.page(pgno, &mut page)?;
                file.write_all_at(&page, view.page_size.offset(pgno))?;
            }
            file.set_len(bytes)?;
            crash_point(steps::DATABASE_SYNC);
            file.sync_all()?;
            let sums = PageChecksums::scan(&file, view.page_size, view.page_count, SCAN_THREADS)?;
            Ok(sums.total())
        };
        let checksum = copy().map_err(DbError::io("keep a copy", path))?;
        let copied = Copied {
            bytes,
            page_size: view.page_size.get(),
            page_count: view.page_count,
            checksum: checksum.to_string(),
        };
        Ok((Some(copied), None))
    }
}

const SCAN_THREADS: usize = 2;

fn older(has_all: bool) -> Older {
    match has_all {
        true => Older::Remove,
        false => Older::Quarantine,
    }
}

/// Returns whether an entry has all that one would have that is made now.
fn is_as_whole(kept: &Entry, fork: Option<Pos>) -> bool {
    let txid = |text: &String| text.parse::<Pos>().map(|pos| pos.txid).ok();
    match (&kept.fork, fork) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(kept), Some(fork)) => txid(kept).is_some_and(|kept| kept <= fork.txid),
    }
}

/// Returns the lengths of the whole databases that are kept.
fn copies_in(dir: &Path) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let whole = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_none_or(|e| e != UNFINISHED));
    whole
        .filter_map(|path| Some(fs::metadata(path.join(DATABASE)).ok()?.len()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(txid: u64, sum: u64, epoch: u64) -> Milestone {
        let pos = Pos {
            txid: Txid(txid),
            post_apply_checksum: Checksum::new(sum),
        };
        Milestone { pos, epoch }
    }

    #[test]
    fn histories_part_after_the_newest_position_that_both_have() {
        let ours = [at(7, 17, 1), at(6, 16, 1), at(5, 5, 1), at(4, 4, 1)];
        let end = ours[0].pos;
        let theirs = [at(9, 29, 2), at(6, 26, 2), at(5, 5, 1), at(4, 4, 1)];
        let fork = at(5, 5, 1).pos;
        assert_eq!(relate(end, &ours, &theirs), Relation::Parted(fork));
        // No TXID in common after it, but another tenure.
        let theirs = [at(9, 29, 2), at(5, 5, 1)];
        assert_eq!(relate(end, &ours, &theirs), Relation::Parted(fork));
        // Sealed: it may have been where ours ends.
        let theirs = [at(9, 29, 0), at(5, 5, 1)];
        assert_eq!(relate(end, &ours, &theirs), Relation::Unknown(Some(fork)));
        let theirs = [at(9, 29, 1), at(7, 17, 1)];
        assert_eq!(relate(end, &ours, &theirs), Relation::Within);
        assert_eq!(relate(end, &ours, &[at(9, 9, 2)]), Relation::Unknown(None));
        assert_eq!(relate(end, &ours, &[]), Relation::Unknown(None));
    }

    #[test]
    fn metadata_that_was_changed_is_seen() {
        let entry = Entry {
            version: 1,
            id: entry_id("a.db", "x"),
            database: "a.db".into(),
            when_ms: 5,
            reason: Reason::LostElection,
            node_id: String::new(),
            hostname: "h\ncrc32 00000000".into(),
            last: "0000000000000007/8000000000000011".into(),
            epoch: 1,
            fork: None,
            winner: None,
            lost_count: Some(2),
            transactions: Logged::default(),
            copy: None,
            note: None,
        };
        let bytes = entry.to_bytes();
        assert_eq!(Entry::from_bytes(&bytes).unwrap(), entry);
        for len in 0..bytes.len() - 1 {
            assert!(Entry::from_bytes(&bytes[..len]).is_err(), "{len}");
        }
        for i in 0..bytes.len() - 1 {
            let mut bad = bytes.clone();
            bad[i] ^= 1;
            assert!(Entry::from_bytes(&bad).is_err(), "byte {i}");
        }
    }
}
