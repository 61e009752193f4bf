//! What is kept of histories that lost, as an operator sees it: over all databases of a data directory.
//!
//! Besides the entries of `db::lost` there are files that no entry describes: whole databases that an earlier version kept in
//! `quarantine`, and what else lies there. They are listed too, with the reason [`Reason::Unknown`]. An entry is found by its
//! id, or by how that begins.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::clock;
use crate::db::log::{self, Record, read_apart};
use crate::db::lost::{
    Copied, DATABASE, DIR, Entry, Logged, METADATA, Reason, TRANSACTIONS, UNFINISHED,
    discard_steps as steps, entry_id,
};
use crate::db::page_checksums::PageChecksums;
use crate::disk::{Disk, crash_point};
use crate::ltx::{PageSize, Pgno, Pos};

/// Fewer digits name no entry.
const MIN_ID_LEN: usize = 4;

/// One entry, and where it is.
#[derive(Debug, Clone)]
pub struct Kept {
    /// What is known of it.
    pub entry: Entry,
    /// Its directory; of a file without an entry, that file; of several, the directory that they are in.
    pub path: PathBuf,
    /// All its files.
    pub files: Vec<PathBuf>,
    /// The whole database.
    pub database: Option<PathBuf>,
    /// Records of the log.
    pub transactions: Option<PathBuf>,
    /// What all that takes on disk, in bytes.
    pub bytes: u64,
    /// What is wrong with it, in words.
    pub problem: Option<String>,
    /// It has a directory of its own.
    is_entry: bool,
}

/// Why there is no such entry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// None.
    #[error("{dir}/*/{DIR} has no lost branch {id:?}")]
    None {
        /// What was asked for.
        id: String,
        /// Where it was looked for.
        dir: String,
    },
    /// Several begin so.
    #[error("{id:?} is the beginning of several: {all}")]
    Several {
        /// What was asked for.
        id: String,
        /// Their ids.
        all: String,
    },
    /// Too short, or not hexadecimal.
    #[error("{0:?} is no id of a lost branch")]
    NoId(String),
    /// The directories cannot be read.
    #[error("read {path}")]
    Io {
        /// Which.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Returns all entries of a node, oldest first. `metas` is the directory of what is kept about databases.
///
/// # Errors
/// It cannot be read.
pub fn list(metas: &Path) -> io::Result<Vec<Kept>> {
    let mut all = Vec::new();
    for meta in dirs(metas)? {
        let name = super::read_name(&meta.join("name"))
            .map_or_else(|_| String::new(), |name| name.to_string());
        all.extend(entries(&meta, &name));
        all.extend(strays(&meta, &name));
    }
    all.sort_by(|a, b| {
        (a.entry.when_ms, &a.entry.database, &a.entry.id).cmp(&(
            b.entry.when_ms,
            &b.entry.database,
            &b.entry.id,
        ))
    });
    Ok(all)
}

/// Returns how many entries there are of one database, by its directory. Files without an entry do not count.
#[must_use]
pub fn count(meta: &Path) -> usize {
    let paths = dirs(&meta.join(DIR)).unwrap_or_default();
    paths.iter().filter(|path| is_finished(path)).count()
}

/// Finds an entry by its id, or by the first digits of it.
///
/// # Errors
/// [`FindError`].
pub fn find(metas: &Path, id: &str) -> Result<Kept, FindError> {
    let wanted = id.to_ascii_lowercase();
    if wanted.len() < MIN_ID_LEN || !wanted.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(FindError::NoId(id.chars().take(40).collect()));
    }
    let all = list(metas).map_err(|source| FindError::Io {
        path: metas.display().to_string(),
        source,
    })?;
    let mut found: Vec<Kept> = all
        .into_iter()
        .filter(|kept| kept.entry.id.starts_with(&wanted))
        .collect();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(FindError::None {
            id: id.to_owned(),
            dir: metas.display().to_string(),
        }),
        _ => {
            let ids: Vec<&str> = found.iter().map(|kept| kept.entry.id.as_str()).collect();
            Err(FindError::Several {
                id: id.to_owned(),
                all: ids.join(", "),
            })
        }
    }
}

impl Kept {
    /// Reads the transactions, oldest first; `each` says whether to go on.
    ///
    /// # Errors
    /// Disk; damage, after those before it.
    pub fn read_transactions(&self, each: impl FnMut(Record) -> bool) -> Result<(), log::Error> {
        match &self.transactions {
            Some(path) => read_apart(path, each),
            None => Ok(()),
        }
    }

    /// Returns the pages that differ from a database by its checksums; `None` if there is no copy, or the pages of the two
    /// are not of one size.
    ///
    /// # Errors
    /// The copy cannot be read.
    pub fn differing_pages(&self, now: &PageChecksums) -> io::Result<Option<Vec<Pgno>>> {
        let (Some(path), Some(copy)) = (&self.database, &self.entry.copy) else {
            return Ok(None);
        };
        let Some(page_size) = PageSize::new(copy.page_size).filter(|s| *s == now.page_size())
        else {
            return Ok(None);
        };
        let sums =
            PageChecksums::scan(&File::open(path)?, page_size, copy.page_count, SCAN_THREADS)?;
        Ok(Some(sums.differing_pages(now).collect()))
    }

    /// Removes it for good.
    ///
    /// # Errors
    /// Disk.
    pub fn discard(&self, disk: &dyn Disk) -> io::Result<()> {
        if self.is_entry {
            // In one step: half of an entry would look like a damaged one.
            let gone = self.path.with_extension(UNFINISHED);
            disk.rename(steps::RENAME, &self.path, &gone)?;
            crash_point(steps::REMOVE);
            fs::remove_dir_all(&gone)?;
        } else {
            for file in &self.files {
                disk.remove_file(steps::REMOVE, file)?;
            }
        }
        let dir = self.files.first().map_or(self.path.as_path(), |file| file);
        let dir = match self.is_entry {
            true => self.path.parent(),
            false => dir.parent(),
        };
        match dir {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }
}

const SCAN_THREADS: usize = 2;

fn is_finished(path: &Path) -> bool {
    path.extension().is_none_or(|e| e != UNFINISHED)
}

fn dirs(path: &Path) -> io::Result<Vec<PathBuf>> {
    let all = fs::read_dir(path)?.filter_map(Result::ok);
    Ok(all.map(|e| e.path()).filter(|path| path.is_dir()).collect())
}

fn entries(meta: &Path, name: &str) -> Vec<Kept> {
    let paths = dirs(&meta.join(DIR)).unwrap_or_default();
    let whole = paths.into_iter().filter(|path| is_finished(path));
    whole.map(|path| read_entry(path, name)).collect()
}

fn read_entry(path: PathBuf, name: &str) -> Kept {
    let id = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let file = |name: &str| Some(path.join(name)).filter(|path| path.is_file());
    let (database, transactions) = (file(DATABASE), file(TRANSACTIONS));
    let files: Vec<PathBuf> = [DATABASE, TRANSACTIONS, METADATA]
        .into_iter()
        .filter_map(file)
        .collect();
    let mut problem = None;
    let mut entry = Entry::read(&path).unwrap_or_else(|why| {
        let path = path.join(METADATA);
        problem = Some(format!("{}: {why}; its files may be sound", path.display()));
        unknown(&id, name, &files)
    });
    // What it is called here is what finds it.
    entry.id = id;
    let len = |path: &PathBuf| fs::metadata(path).map_or(0, |m| m.len());
    let lacks = |is_there: bool, wanted: u64, path: &Option<PathBuf>| {
        is_there && path.as_ref().map(&len) != Some(wanted)
    };
    let copied = entry.copy.as_ref().map_or(0, |copy| copy.bytes);
    if lacks(entry.copy.is_some(), copied, &database) {
        let path = path.join(DATABASE);
        problem = Some(format!("{} does not have {copied} bytes", path.display()));
    }
    let logged = entry.transactions.bytes;
    if lacks(logged > 0, logged, &transactions) {
        let path = path.join(TRANSACTIONS);
        problem = Some(format!("{} does not have {logged} bytes", path.display()));
    }
    Kept {
        entry,
        bytes: files.iter().map(len).sum(),
        files,
        database,
        transactions,
        problem,
        is_entry: true,
        path,
    }
}

/// Finds what lies in `quarantine`: whole databases one by one, the rest together.
fn strays(meta: &Path, name: &str) -> Vec<Kept> {
    let dir = meta.join("quarantine");
    let Ok(found) = fs::read_dir(&dir) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = found
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    paths.sort();
    let (databases, rest): (Vec<PathBuf>, Vec<PathBuf>) = paths
        .into_iter()
        .partition(|path| path.extension().is_some_and(|e| e == "db") && super::is_database(path));
    let mut all: Vec<Kept> = databases
        .into_iter()
        .map(|path| stray(name, path.clone(), vec![path.clone()], Some(path)))
        .collect();
    if !rest.is_empty() {
        let mut kept = stray(name, dir, rest, None);
        kept.entry.note = Some(
            "files of a damaged log, or local files that had the name of a replicated database"
                .into(),
        );
        all.push(kept);
    }
    all
}

fn stray(name: &str, path: PathBuf, files: Vec<PathBuf>, database: Option<PathBuf>) -> Kept {
    let what = path.file_name().unwrap_or_default().to_string_lossy();
    let mut entry = unknown(&entry_id(name, &what), name, &files);
    if let Some(path) = &database {
        // `<txid>-<checksum>.db`
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let last: Option<Pos> = stem.replacen('-', "/", 1).parse().ok();
        entry.last = last.map(|pos| pos.to_string()).unwrap_or_default();
        entry.copy = copied(path);
    }
    Kept {
        entry,
        bytes: files
            .iter()
            .map(|f| fs::metadata(f).map_or(0, |m| m.len()))
            .sum(),
        files,
        database,
        transactions: None,
        problem: None,
        is_entry: false,
        path,
    }
}

fn copied(path: &Path) -> Option<Copied> {
    let bytes = fs::metadata(path).ok()?.len();
    let mut head = [0; crate::sqlite::header::DB_HEADER_LEN];
    let file = File::open(path).ok()?;
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut head, 0).ok()?;
    let page_size = crate::sqlite::header::DbHeader::parse(&head)?
        .page_size
        .get();
    Some(Copied {
        bytes,
        page_size,
        page_count: u32::try_from(bytes / u64::from(page_size)).ok()?,
        checksum: String::new(),
    })
}

/// Describes files that nothing else describes.
fn unknown(id: &str, name: &str, files: &[PathBuf]) -> Entry {
    let modified = files.iter().filter_map(|file| {
        let m = fs::metadata(file).ok()?;
        clock::ms_of(m.modified().ok()?)
    });
    Entry {
        version: 1,
        id: id.to_owned(),
        database: name.to_owned(),
        when_ms: modified.max().unwrap_or(0),
        reason: Reason::Unknown,
        node_id: String::new(),
        hostname: String::new(),
        last: String::new(),
        epoch: 0,
        fork: None,
        winner: None,
        lost_count: None,
        transactions: Logged::default(),
        copy: None,
        note: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    fn meta_of(root: &Path, name: &str) -> PathBuf {
        let meta = root.join("00000000000000aa");
        fs::create_dir_all(meta.join(DIR)).unwrap();
        fs::create_dir_all(meta.join("quarantine")).unwrap();
        fs::write(
            meta.join("name"),
            super::super::name_file(&name.parse().unwrap()),
        )
        .unwrap();
        meta
    }

    #[test]
    fn files_that_nothing_describes_are_listed_and_discarded_by_themselves() {
        let root = tempfile::tempdir().unwrap();
        let meta = meta_of(root.path(), "a.db");
        let old = meta.join("quarantine/0000000000000005-8000000000000011.db");
        let db = rusqlite::Connection::open(&old).unwrap();
        db.execute_batch("CREATE TABLE t(v)").unwrap();
        drop(db);
        let segment = meta.join("quarantine/0000000000000001.seg");
        fs::write(&segment, b"damaged").unwrap();
        fs::create_dir(meta.join(DIR).join("half.tmp")).unwrap();
        fs::create_dir(meta.join(DIR).join("0123456789abcdef")).unwrap();
        let all = list(root.path()).unwrap();
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(|kept| kept.entry.reason == Reason::Unknown));
        assert!(all.iter().all(|kept| kept.entry.database == "a.db"));
        let damaged = find(root.path(), "0123").unwrap();
        assert!(damaged.problem.is_some_and(|p| p.contains(METADATA)));
        let database = all.iter().find(|kept| kept.database.is_some()).unwrap();
        assert_eq!(database.entry.last, "0000000000000005/8000000000000011");
        database.discard(&RealDisk).unwrap();
        assert!(!old.exists() && segment.exists());
        find(root.path(), "0123")
            .unwrap()
            .discard(&RealDisk)
            .unwrap();
        assert_eq!(list(root.path()).unwrap().len(), 1);
        assert!(matches!(
            find(root.path(), "0123"),
            Err(FindError::None { .. })
        ));
        for bad in ["", "012", "../x", "zzzz"] {
            assert!(
                matches!(find(root.path(), bad), Err(FindError::NoId(_))),
                "{bad}"
            );
        }
    }
}
