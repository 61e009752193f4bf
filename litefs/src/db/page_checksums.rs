//! The checksum of every page of one database, and their XOR, which is that of the database.
//!
//! 8 bytes a page. The lock page has none and never counts. Pages below the page count may be
//! unknown for a while (a growing database sets them one by one); then the total is that of the
//! known ones.
//!
//! | name | rule |
//! |---|---|
//! | INV-SUM-1 | `total()` is the XOR of all known checksums of pages 1 to `page_count()` |
//! | INV-SUM-2 | a table is persisted, and loaded, only at a `Pos` whose checksum is `total()` |
//!
//! On disk the table is a cache: whoever cannot load it scans the database. Two files are written
//! in turn, so that a crash while one is written leaves the other.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use crate::disk::{Disk, OpenMode, Step};
use crate::ltx::{Checksum, PageSize, Pgno, Pos, Txid, page_checksum};

/// Names of the disk operations of the table.
pub mod steps {
    crate::disk::steps! {
        MKDIR = "checksums.persist:mkdir",
        OPEN = "checksums.persist:open",
        LOOK = "checksums.persist:look",
        WRITE = "checksums.persist:write",
        CUT = "checksums.persist:cut",
        SYNC = "checksums.persist:sync",
        SYNC_DIR = "checksums.persist:sync_dir",
        LOAD = "checksums.load",
    }
}

const MAGIC: [u8; 8] = *b"litefsps";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 64;
const CRC_LEN: usize = 4;
const FILES: [&str; 2] = ["page-checksums.0", "page-checksums.1"];
/// How much of a database is read at once when it is scanned.
const SCAN_CHUNK_LEN: usize = 1 << 20;

/// Why a table cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The disk refused.
    #[error("{step} {}", path.display())]
    Io {
        /// What was being done.
        step: Step,
        /// To which file or directory.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// The table is not that of the position (INV-SUM-2).
    #[error("page checksums add up to {total}, position is {at}")]
    NotAtPos {
        /// XOR of the table.
        total: Checksum,
        /// Position it was said to be at.
        at: Pos,
    },
    /// More than 4 GiB of the owner's bytes.
    #[error("{0} extra bytes are too many")]
    ExtraTooLong(usize),
}

/// Why there is no table to load; the database must be scanned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// No file, as for a new database.
    #[error("no table")]
    Missing,
    /// Not a table of this format version.
    #[error("not a page checksum table, or of another version")]
    Foreign,
    /// The file was not written to its end.
    #[error("cut short")]
    CutShort,
    /// The bytes are not those that were written.
    #[error("crc-32 mismatch")]
    Crc,
    /// A field has a value that is never written.
    #[error("invalid {0}")]
    Field(&'static str),
    /// The file cannot be read.
    #[error("unreadable: {0}")]
    Io(String),
}

/// What was on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The table.
    pub checksums: PageChecksums,
    /// Position of the database that it describes.
    pub at: Pos,
    /// The owner's bytes.
    pub extra: Vec<u8>,
}

/// Checksums of the pages of one database; a clone is a copy of 8 bytes a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageChecksums {
    page_size: PageSize,
    /// By page index; zero is unknown, which no checksum is.
    sums: Vec<u64>,
    total: Checksum,
}

impl PageChecksums {
    /// Makes the table of a database without pages.
    #[must_use]
    pub fn new(page_size: PageSize) -> PageChecksums {
        PageChecksums {
            page_size,
            sums: Vec::new(),
            total: Checksum::EMPTY,
        }
    }

    /// Returns the page size, which says where the lock page is.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Returns the number of pages, the lock page included.
    #[must_use]
    pub fn page_count(&self) -> u32 {
        u32::try_from(self.sums.len()).unwrap_or(u32::MAX)
    }

    /// Returns the XOR of all known checksums.
    #[must_use]
    pub fn total(&self) -> Checksum {
        self.total
    }

    /// Returns a page's checksum, if the page exists and it is known.
    #[must_use]
    pub fn get(&self, pgno: Pgno) -> Option<Checksum> {
        match self.sums.get(pgno.index()) {
            None | Some(0) => None,
            Some(sum) => Some(Checksum::new(*sum)),
        }
    }

    /// Sets a page's checksum; a page past the end becomes the last one. The lock page has none.
    pub fn set(&mut self, pgno: Pgno, checksum: Checksum) {
        let i = pgno.index();
        if i >= self.sums.len() {
            self.sums.resize(i + 1, 0);
        }
        if pgno == self.page_size.lock_pgno() {
            return;
        }
        let old = std::mem::replace(&mut self.sums[i], checksum.get());
        self.total = self.total ^ Checksum::new(old) ^ checksum;
    }

    /// Sets the number of pages: later ones are forgotten, new ones unknown.
    pub fn truncate(&mut self, page_count: u32) {
        let page_count = page_count as usize;
        for sum in self.sums.drain(page_count.min(self.sums.len())..) {
            self.total = self.total ^ Checksum::new(sum);
        }
        self.sums.resize(page_count, 0);
    }

    /// Returns the first page whose checksum is unknown.
    #[must_use]
    pub fn first_unknown(&self) -> Option<Pgno> {
        let lock = self.page_size.lock_pgno();
        self.known()
            .position(|(pgno, sum)| sum == 0 && pgno != lock)
            .and_then(pgno_at)
    }

    /// Returns the checksums by [`Pgno::index`]; zero stands for "not known".
    #[must_use]
    pub fn to_raw(&self) -> Vec<u64> {
        self.sums.clone()
    }

    /// Returns what the total will be once the table is truncated to `page_count` and has these pages, ascending and
    /// none past `page_count`.
    #[must_use]
    pub fn total_after(&self, page_count: u32, pages: &[(Pgno, Checksum)]) -> Checksum {
        let known = |pgno: Pgno| self.get(pgno).unwrap_or(Checksum::EMPTY);
        let gone = (page_count..self.page_count()).filter_map(|i| Pgno::new(i + 1));
        let total = gone.fold(self.total, |total, pgno| total ^ known(pgno));
        pages.iter().fold(total, |total, (pgno, sum)| {
            let old = if pgno.get() <= page_count {
                known(*pgno)
            } else {
                Checksum::EMPTY
            };
            total ^ old ^ *sum
        })
    }

    /// Returns the pages, in order, that are not the same in both or exist in one only.
    ///
    /// An unknown checksum is the same as no other.
    pub fn differing_pages<'a>(
        &'a self,
        other: &'a PageChecksums,
    ) -> impl Iterator<Item = Pgno> + 'a {
        let lock = self.page_size.lock_pgno();
        let sum = |table: &PageChecksums, i: usize| table.sums.get(i).copied().unwrap_or(0);
        (0..self.sums.len().max(other.sums.len()))
            .filter(move |i| sum(self, *i) == 0 || sum(self, *i) != sum(other, *i))
            .filter_map(pgno_at)
            .filter(move |pgno| *pgno != lock)
    }

    /// Returns the first page that is not the same in both.
    #[must_use]
    pub fn first_difference(&self, other: &PageChecksums) -> Option<Pgno> {
        self.differing_pages(other).next()
    }

    fn known(&self) -> impl Iterator<Item = (Pgno, u64)> + '_ {
        self.sums
            .iter()
            .enumerate()
            .filter_map(|(i, sum)| Some((pgno_at(i)?, *sum)))
    }

    /// Computes the table of a database file with up to so many threads.
    ///
    /// # Errors
    /// As `pread(2)`. What is past the end of the file is zeros: a WAL may have those pages.
    pub fn scan(
        file: &File,
        page_size: PageSize,
        page_count: u32,
        threads: usize,
    ) -> io::Result<PageChecksums> {
        let mut sums = vec![0; page_count as usize];
        let chunk_pages = SCAN_CHUNK_LEN / page_size.len();
        let per_thread = sums.len().div_ceil(threads.max(1)).max(chunk_pages);
        thread::scope(|scope| {
            let parts: Vec<_> = sums
                .chunks_mut(per_thread)
                .enumerate()
                .map(|(n, part)| {
                    scope.spawn(move || scan_part(file, page_size, n * per_thread, part))
                })
                .collect();
            parts.into_iter().try_for_each(|part| {
                part.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        Ok(PageChecksums::of(page_size, sums))
    }

    fn of(page_size: PageSize, sums: Vec<u64>) -> PageChecksums {
        let total = sums.iter().fold(0, |total, sum| total ^ sum);
        PageChecksums {
            page_size,
            sums,
            total: Checksum::new(total),
        }
    }

    /// Writes the table and the owner's bytes over the older of the two files.
    ///
    /// Without `durable` nothing is synced: after a power loss [`load`](PageChecksums::load)
    /// finds an older table or none, never a wrong one.
    ///
    /// # Errors
    /// `NotAtPos` if the table is not that of `at`; `Io`, and then the newer file is still good.
    pub fn persist(
        &self,
        disk: &dyn Disk,
        dir: &Path,
        at: Pos,
        extra: &[u8],
        durable: bool,
    ) -> Result<(), Error> {
        if self.total != at.post_apply_checksum {
            let total = self.total;
            return Err(Error::NotAtPos { total, at });
        }
        let extra_len = u32::try_from(extra.len()).map_err(|_| Error::ExtraTooLong(extra.len()))?;
        disk.create_dir_all(steps::MKDIR, dir)
            .map_err(|e| io_error(steps::MKDIR, dir, e))?;
        let (path, generation) = next_file(disk, dir);
        let bytes = self.encode(at, extra, extra_len, generation);
        write_file(disk, &path, &bytes, durable)?;
        if durable {
            disk.sync_dir(steps::SYNC_DIR, dir)
                .map_err(|e| io_error(steps::SYNC_DIR, dir, e))?;
        }
        Ok(())
    }

    /// Returns the newest table that is whole.
    ///
    /// # Errors
    /// Why the newer file, or the only one, cannot be used when neither can.
    pub fn load(disk: &dyn Disk, dir: &Path) -> Result<Loaded, Unusable> {
        let tables = FILES.map(|name| load_file(disk, &dir.join(name)));
        match tables {
            [Ok(a), Ok(b)] => Ok(if a.0 > b.0 { a.1 } else { b.1 }),
            [Ok((_, table)), Err(_)] | [Err(_), Ok((_, table))] => Ok(table),
            [Err(Unusable::Missing), Err(why)] | [Err(why), Err(_)] => Err(why),
        }
    }

    /// # Source
    /// docs/formats/page-checksums.md
    fn encode(&self, at: Pos, extra: &[u8], extra_len: u32, generation: u64) -> Vec<u8> {
        let len = HEADER_LEN + extra.len() + self.sums.len() * 8 + CRC_LEN;
        let mut out = Vec::with_capacity(len);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_be_bytes());
        out.extend_from_slice(&self.page_size.get().to_be_bytes());
        out.extend_from_slice(&self.page_count().to_be_bytes());
        out.extend_from_slice(&extra_len.to_be_bytes());
        out.extend_from_slice(&generation.to_be_bytes());
        out.extend_from_slice(&at.txid.0.to_be_bytes());
        out.extend_from_slice(&at.post_apply_checksum.get().to_be_bytes());
        out.resize(HEADER_LEN, 0);
        out.extend_from_slice(extra);
        let start = out.len();
        out.resize(start + self.sums.len() * 8, 0);
        let (places, _) = out[start..].as_chunks_mut::<8>();
        for (place, sum) in places.iter_mut().zip(&self.sums) {
            *place = sum.to_be_bytes();
        }
        out.extend_from_slice(&crc32fast::hash(&out).to_be_bytes());
        out
    }
}

fn pgno_at(index: usize) -> Option<Pgno> {
    Pgno::new(u32::try_from(index).ok()?.checked_add(1)?)
}

fn scan_part(
    file: &File,
    page_size: PageSize,
    first_index: usize,
    sums: &mut [u64],
) -> io::Result<()> {
    let mut bytes = vec![0; SCAN_CHUNK_LEN];
    let mut index = first_index;
    for chunk in sums.chunks_mut(SCAN_CHUNK_LEN / page_size.len()) {
        let bytes = &mut bytes[..chunk.len() * page_size.len()];
        let offset = index as u64 * u64::from(page_size.get());
        let n = super::capture_wal::read_full(file, bytes, offset)?;
        bytes[n..].fill(0);
        for (sum, page) in chunk.iter_mut().zip(bytes.chunks_exact(page_size.len())) {
            if let Some(pgno) = pgno_at(index)
                && pgno != page_size.lock_pgno()
            {
                *sum = page_checksum(pgno, page).get();
            }
            index += 1;
        }
    }
    Ok(())
}

fn io_error(step: Step, path: &Path, source: io::Error) -> Error {
    Error::Io {
        step,
        path: path.to_owned(),
        source,
    }
}

/// Returns the file to write next and the number that makes it the newer one.
fn next_file(disk: &dyn Disk, dir: &Path) -> (PathBuf, u64) {
    let [a, b] = FILES.map(|name| generation(disk, &dir.join(name)).unwrap_or(0));
    let next = if a > b { FILES[1] } else { FILES[0] };
    (dir.join(next), a.max(b).saturating_add(1))
}

/// Reads the number of a file that says it is a table.
fn generation(disk: &dyn Disk, path: &Path) -> Option<u64> {
    let file = disk.open(steps::LOOK, path, OpenMode::Read).ok()?;
    let mut header = [0; HEADER_LEN];
    disk.read_exact_at(steps::LOOK, &file, &mut header, 0)
        .ok()?;
    (header[..8] == MAGIC).then(|| be_u64(&header, 24))
}

fn write_file(disk: &dyn Disk, path: &Path, bytes: &[u8], durable: bool) -> Result<(), Error> {
    let file = disk
        .open(steps::OPEN, path, OpenMode::Create)
        .map_err(|e| io_error(steps::OPEN, path, e))?;
    disk.write_all_at(steps::WRITE, &file, bytes, 0)
        .map_err(|e| io_error(steps::WRITE, path, e))?;
    let len = bytes.len() as u64;
    let old_len = disk
        .len(steps::CUT, &file)
        .map_err(|e| io_error(steps::CUT, path, e))?;
    if old_len > len {
        disk.set_len(steps::CUT, &file, len)
            .map_err(|e| io_error(steps::CUT, path, e))?;
    }
    if durable {
        disk.sync_data(steps::SYNC, &file)
            .map_err(|e| io_error(steps::SYNC, path, e))?;
    }
    Ok(())
}

fn load_file(disk: &dyn Disk, path: &Path) -> Result<(u64, Loaded), Unusable> {
    match disk.read_file(steps::LOAD, path) {
        Ok(bytes) => decode(&bytes),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Unusable::Missing),
        Err(e) => Err(Unusable::Io(e.to_string())),
    }
}

fn decode(bytes: &[u8]) -> Result<(u64, Loaded), Unusable> {
    let header: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(Unusable::CutShort)?;
    if header[..8] != MAGIC || be_u32(header, 8) != VERSION {
        return Err(Unusable::Foreign);
    }
    let extra_len = be_u32(header, 20) as usize;
    let page_count = be_u32(header, 16) as usize;
    let sums_at = HEADER_LEN + extra_len;
    let crc_at = sums_at + page_count * 8;
    let body = bytes.get(..crc_at).ok_or(Unusable::CutShort)?;
    let crc = bytes
        .get(crc_at..crc_at + CRC_LEN)
        .ok_or(Unusable::CutShort)?;
    if crc != crc32fast::hash(body).to_be_bytes() {
        return Err(Unusable::Crc);
    }
    let page_size = PageSize::new(be_u32(header, 12)).ok_or(Unusable::Field("page size"))?;
    let (places, _) = body[sums_at..].as_chunks::<8>();
    let sums = places.iter().map(|n| u64::from_be_bytes(*n)).collect();
    let checksums = PageChecksums::of(page_size, sums);
    let at = Pos {
        txid: Txid(be_u64(header, 32)),
        post_apply_checksum: Checksum::new(be_u64(header, 40)),
    };
    if checksums.total != at.post_apply_checksum {
        return Err(Unusable::Field("position")); // INV-SUM-2
    }
    let loaded = Loaded {
        checksums,
        at,
        extra: body[HEADER_LEN..sums_at].to_vec(),
    };
    Ok((be_u64(header, 24), loaded))
}

fn be_u32(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    let mut n = [0; 4];
    n.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(n)
}

fn be_u64(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut n = [0; 8];
    n.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{FailingDisk, Failure, RealDisk};
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::fs;

    fn size(n: u32) -> PageSize {
        PageSize::new(n).unwrap()
    }

    fn pgno(n: u32) -> Pgno {
        Pgno::new(n).unwrap()
    }

    fn table(sums: &[u64]) -> PageChecksums {
        let mut table = PageChecksums::new(size(4096));
        for (i, sum) in sums.iter().enumerate() {
            table.set(pgno_at(i).unwrap(), Checksum::new(*sum));
        }
        table
    }

    fn at(table: &PageChecksums, txid: u64) -> Pos {
        Pos {
            txid: Txid(txid),
            post_apply_checksum: table.total(),
        }
    }

    fn persist(disk: &dyn Disk, dir: &Path, table: &PageChecksums, txid: u64) -> Result<(), Error> {
        table.persist(disk, dir, at(table, txid), &txid.to_be_bytes(), true)
    }

    #[test]
    fn the_lock_page_never_counts() {
        let mut table = PageChecksums::new(size(65536));
        let lock = size(65536).lock_pgno();
        table.set(lock, Checksum::new(7));
        assert_eq!((table.get(lock), table.total()), (None, Checksum::EMPTY));
        assert_eq!(table.page_count(), lock.get());
        let mut other = table.clone();
        for n in 1..lock.get() {
            table.set(pgno(n), Checksum::new(n.into()));
        }
        assert_eq!(table.first_unknown(), None);
        other.truncate(lock.get() - 1);
        assert_eq!(other.first_difference(&table), Some(Pgno::ONE));
        assert!(table.differing_pages(&table).next().is_none());
    }

    #[test]
    fn differing_pages_are_those_changed_unknown_or_alone() {
        let (a, mut b) = (table(&[1, 2, 3, 4]), table(&[1, 9, 3]));
        fn differing(a: &PageChecksums, b: &PageChecksums) -> Vec<u32> {
            a.differing_pages(b).map(Pgno::get).collect()
        }
        assert_eq!(differing(&a, &b), [2, 4]);
        assert_eq!(differing(&b, &a), [2, 4]);
        b.truncate(2);
        b.truncate(5);
        assert_eq!(b.first_unknown(), Some(pgno(3)));
        assert_eq!(differing(&b, &a), [2, 3, 4, 5]);
        assert_eq!(differing(&b, &b), [3, 4, 5]);
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(ops in proptest::collection::vec((0..3u8, 1..40u32, any::<u64>()), 0..60)) {
            let mut table = PageChecksums::new(size(512));
            let (mut model, mut page_count) = (BTreeMap::new(), 0);
            for (op, n, sum) in ops {
                if op == 0 {
                    table.truncate(n);
                    page_count = n;
                    model.retain(|pgno, _| *pgno <= n);
                } else {
                    table.set(pgno(n), Checksum::new(sum));
                    page_count = page_count.max(n);
                    model.insert(n, Checksum::new(sum));
                }
                let total = model.values().fold(Checksum::EMPTY, |a, b| a ^ *b);
                prop_assert_eq!((table.total(), table.page_count()), (total, page_count));
            }
            for n in 1..50 {
                prop_assert_eq!(table.get(pgno(n)), model.get(&n).copied());
            }
            let dir = tempfile::tempdir().unwrap();
            persist(&RealDisk, dir.path(), &table, 3).unwrap();
            let loaded = PageChecksums::load(&RealDisk, dir.path()).unwrap();
            prop_assert_eq!(&loaded.checksums, &table);
            prop_assert_eq!((loaded.at, loaded.extra), (at(&table, 3), 3u64.to_be_bytes().to_vec()));
        }
    }

    #[test]
    fn load_gives_the_newest_that_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let load = || PageChecksums::load(&RealDisk, dir.path());
        assert_eq!(load(), Err(Unusable::Missing));
        // Growing and shrinking, so that each file is once overwritten by a shorter one.
        for (txid, count) in [(1, 5), (2, 9), (3, 2), (4, 1), (5, 7)] {
            let sums: Vec<u64> = (0..count).map(|n| n * txid).collect();
            persist(&RealDisk, dir.path(), &table(&sums), txid).unwrap();
            let loaded = load().unwrap();
            assert_eq!(
                (loaded.at.txid, loaded.checksums),
                (Txid(txid), table(&sums))
            );
        }
        // The fifth went to the first file.
        let newest = dir.path().join(FILES[0]);
        let bytes = fs::read(&newest).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(&newest, &bad).unwrap();
            assert_eq!(load().unwrap().at.txid, Txid(4), "bit {bit}");
        }
        for len in 0..bytes.len() {
            fs::write(&newest, &bytes[..len]).unwrap();
            assert_eq!(load().unwrap().at.txid, Txid(4), "{len} bytes");
        }
        fs::remove_file(dir.path().join(FILES[1])).unwrap();
        assert_eq!(load(), Err(Unusable::CutShort));
    }

    #[test]
    fn an_interrupted_persist_leaves_the_table_before() {
        let (a, b) = (table(&[1, 2, 3]), table(&[4; 100]));
        for step in [steps::MKDIR, steps::OPEN, steps::WRITE, steps::SYNC] {
            for failure in [
                Failure::Errno(libc::EIO),
                Failure::Crash,
                Failure::Torn {
                    written_len: 300,
                    errno: libc::ENOSPC,
                },
            ] {
                let dir = tempfile::tempdir().unwrap();
                let disk = FailingDisk::new();
                for txid in 1..4 {
                    persist(&disk, dir.path(), &a, txid).unwrap();
                }
                disk.fail(step, 1, failure);
                assert!(persist(&disk, dir.path(), &b, 4).is_err(), "{step}");
                disk.heal();
                let loaded = PageChecksums::load(&disk, dir.path()).unwrap();
                let is_new = loaded.at.txid == Txid(4) && step == steps::SYNC;
                assert!(is_new || loaded.at == at(&a, 3), "{step}");
                persist(&disk, dir.path(), &b, 5).unwrap();
                let loaded = PageChecksums::load(&disk, dir.path()).unwrap();
                assert_eq!((loaded.at, loaded.checksums), (at(&b, 5), b.clone()));
            }
        }
    }

    #[test]
    fn a_table_of_another_position_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let result = table(&[1]).persist(&RealDisk, dir.path(), Pos::ZERO, b"", false);
        assert!(matches!(result, Err(Error::NotAtPos { .. })));
        assert!(PageChecksums::load(&RealDisk, dir.path()).is_err());
    }

    #[test]
    fn scan_is_the_same_with_any_number_of_threads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let page_size = size(512);
        let bytes: Vec<u8> = (0..5000u32 * 128).flat_map(u32::to_be_bytes).collect();
        fs::write(&path, &bytes).unwrap();
        let file = File::open(&path).unwrap();
        let mut expected = PageChecksums::new(page_size);
        for (i, page) in bytes.chunks(512).enumerate() {
            let pgno = pgno_at(i).unwrap();
            expected.set(pgno, page_checksum(pgno, page));
        }
        for threads in [0, 1, 2, 7] {
            let scanned = PageChecksums::scan(&file, page_size, 5000, threads).unwrap();
            assert_eq!(scanned, expected);
        }
        let empty = PageChecksums::scan(&file, page_size, 0, 2).unwrap();
        assert_eq!(empty, PageChecksums::new(page_size));
        let past_end = pgno_at(5000).unwrap();
        expected.set(past_end, page_checksum(past_end, &[0; 512]));
        let longer = PageChecksums::scan(&file, page_size, 5001, 2).unwrap();
        assert_eq!(longer, expected);
    }
}
