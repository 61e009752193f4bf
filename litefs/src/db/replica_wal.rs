//! On a replica we are the writer of the WAL: transactions become frames, and readers are neither blocked nor block.
//!
//! Held for as long as a program has the database open, all as open-file-description locks on files opened through
//! the mount, so that they conflict with SQLite's:
//!
//! | file | lock | why |
//! |---|---|---|
//! | database | SHARED, shared | no program can be the last to close, which would remove the WAL |
//! | `-shm` | DMS, shared | no program truncates the index |
//! | `-shm` | WRITE and CKPT, exclusive | no program writes, checkpoints, or rebuilds the index (INV-DB-4) |
//!
//! Where the kernel caches the files (passthrough off), it is told of new bytes before the index leads a reader to them.
//!
//! This serves a database of any journal mode: where a WAL exists, SQLite reads through it whatever the header says.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::log::WalCursor;
use super::pages::Pages;
use super::paths::with_suffix;
use super::shm::MappedShm;
use super::{DbError, DbPaths, NodeContext, steps};
use crate::disk::crash_point;
use crate::ltx::{PageSize, Pgno};
use crate::sqlite::locks::{LockRange, OfdLocks, db, shm as shm_lock};
use crate::sqlite::wal::{
    ByteOrder, WAL_FRAME_HEADER_LEN, WAL_HEADER_LEN, WalFrameHeader, WalHeader, WalSalts,
    frame_offset,
};
use crate::sqlite::wal_index::{
    self, READ_MARK_COUNT, READ_MARK_UNUSED, Shm as _, WalIndex, WalIndexHeader,
};

/// A WAL this long is checkpointed when readers allow, in frames; SQLite's own default.
const CHECKPOINT_FRAMES: u32 = 1000;
/// Frames are written in pieces of about this many bytes.
const WRITE_LEN: usize = 1 << 20;
/// The WAL and wal-index of a replica's database that some program has open.
#[derive(Debug)]
pub(super) struct ReplicaWal {
    node: Arc<NodeContext>,
    /// Opened through the mount, for its locks alone.
    _main: File,
    /// Backing file of the database.
    main_backing: File,
    /// Backing file of the WAL.
    wal: File,
    index: WalIndex<MappedShm>,
    wal_header: WalHeader,
    header: WalIndexHeader,
    /// The header is in the file; that of a WAL that begins again is written with its first frame.
    header_is_written: bool,
    buffer: Vec<u8>,
    /// Frames at the last attempt to checkpoint.
    last_attempt: u32,
    /// Locks that keep readers from beginning transactions.
    held_off: Option<Vec<LockRange>>,
    /// What readers go by, while they are not to see the last commit.
    shown: Option<WalIndexHeader>,
}

impl ReplicaWal {
    /// Takes over the serving of a database that nobody has open.
    ///
    /// Runs on a thread that the volume lets through (`NodeContext::own_threads`), never on a session thread.
    pub(super) fn prepare(
        node: &Arc<NodeContext>,
        paths: &DbPaths,
        page_size: PageSize,
        page_count: u32,
    ) -> Result<ReplicaWal, DbError> {
        let open = |path: &Path, write: bool| {
            OpenOptions::new()
                .read(true)
                .write(write)
                .create(write)
                .truncate(false)
                .open(path)
                .map_err(DbError::io("open", path))
        };
        let main = open(&paths.mounted, false)?;
        let shm_path = with_suffix(&paths.mounted, "-shm");
        let shm = open(&shm_path, true)?;
        let wal_path = with_suffix(&paths.mounted, "-wal");
        drop(open(&wal_path, true)?);
        lock(&main, db::SHARED, false, "SHARED", &paths.main)?;
        lock(&shm, shm_lock::DMS, false, "DMS", &paths.shm)?;
        lock(&shm, shm_lock::WRITE, true, "WRITE", &paths.shm)?;
        lock(&shm, shm_lock::CKPT, true, "CKPT", &paths.shm)?;
        shm.set_len(0)
            .map_err(DbError::io("truncate", &paths.shm))?;
        ReplicaWal::anew(node, paths, main, shm, page_size, page_count)
    }

    /// Begins a WAL beside a file that has everything; `shm` is empty, and no program is in a transaction.
    ///
    /// Of the files opened through the mount the locks DMS, WRITE and CKPT are held, and SHARED in whatever way.
    pub(super) fn anew(
        node: &Arc<NodeContext>,
        paths: &DbPaths,
        main: File,
        shm: File,
        page_size: PageSize,
        page_count: u32,
    ) -> Result<ReplicaWal, DbError> {
        let wal = open_backing(&paths.wal)?;
        crash_point(steps::REPLICA_WAL_PREPARE);
        wal.set_len(0)
            .map_err(DbError::io("truncate", &paths.wal))?;
        let main_backing = open_backing(&paths.main)?;
        let wal_header = WalHeader {
            order: ByteOrder::NATIVE,
            page_size,
            checkpoint_seq: 0,
            salts: WalSalts(rand::random(), rand::random()),
        };
        // SQLite takes an empty WAL of a database in a rollback mode for none, and would read the file without a snapshot.
        wal.write_all_at(&wal_header.encode(), 0)
            .map_err(DbError::io("write", &paths.wal))?;
        let mut index = WalIndex::new(MappedShm::new(shm, node.clone()));
        crash_point(steps::REPLICA_WAL_BUILD);
        let header = index
            .build([], &WalIndexHeader::of_empty(&wal_header, page_count))
            .map_err(|e| DbError::io("build", &paths.shm)(io::Error::other(e)))?;
        let replica_wal = ReplicaWal {
            node: node.clone(),
            _main: main,
            main_backing,
            wal,
            index,
            wal_header,
            header,
            header_is_written: true,
            buffer: Vec::new(),
            last_attempt: 0,
            held_off: None,
            shown: None,
        };
        replica_wal
            .tell_kernel(&replica_wal.wal, &with_suffix(&paths.relative, "-wal"))
            .map_err(DbError::io("read", &paths.wal))?;
        replica_wal
            .let_everybody_in()
            .map_err(DbError::io("lock", &paths.main))?;
        Ok(replica_wal)
    }

    /// Gives back locks by which readers were kept out while there was no WAL for them.
    fn let_everybody_in(&self) -> io::Result<()> {
        let main = OfdLocks::new(self._main.as_fd());
        main.try_read(db::SHARED)?;
        main.unlock(db::PENDING)?;
        main.unlock(db::RESERVED)?;
        self.locks().unlock(shm_lock::RECOVER)?;
        for range in shm_lock::READ {
            self.locks().unlock(range)?;
        }
        Ok(())
    }

    /// Returns whether the wal-index is one that readers go by, and that the WAL belongs to.
    pub(super) fn index_is_good(shm: &File, paths: &DbPaths) -> bool {
        let mut bytes = [0; 2 * wal_index::HEADER_LEN];
        if shm.read_exact_at(&mut bytes, 0).is_err() {
            return false;
        }
        match WalIndexHeader::decode_copies(&bytes) {
            Ok(index) if index.mx_frame == 0 => true,
            Ok(index) => read_wal_header(&paths.wal).is_some_and(|wal| {
                wal.salts == index.salts && Some(wal.page_size) == index.page_size
            }),
            Err(_) => false,
        }
    }

    /// Takes over a WAL and wal-index that programs have made and go on reading by; [`take_over`](Self::take_over) follows.
    ///
    /// Of the files opened through the mount the locks SHARED (shared), DMS, WRITE and CKPT are held.
    pub(super) fn adopt(
        node: &Arc<NodeContext>,
        paths: &DbPaths,
        main: File,
        shm: File,
    ) -> Result<ReplicaWal, DbError> {
        let io = || DbError::io("map", &paths.shm);
        let len = shm.metadata().map_err(io())?.len();
        let mut shared = MappedShm::new(shm, node.clone());
        shared
            .ensure_len(len.next_multiple_of(wal_index::BLOCK_LEN as u64))
            .map_err(io())?;
        let index = WalIndex::new(shared);
        let header = index
            .header()
            .map_err(|e| DbError::io("read", &paths.shm)(io::Error::other(e)))?;
        let wal_header = read_wal_header(&paths.wal).unwrap_or(WalHeader {
            order: ByteOrder::NATIVE,
            page_size: header.page_size.unwrap_or(PageSize::DEFAULT),
            checkpoint_seq: 0,
            salts: header.salts,
        });
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false);
        let wal = node
            .in_mount(|| how.open(with_suffix(&paths.mounted, "-wal")))
            .and_then(|_| how.open(&paths.wal))
            .map_err(DbError::io("open", &paths.wal))?;
        Ok(ReplicaWal {
            node: node.clone(),
            _main: main,
            main_backing: open_backing(&paths.main)?,
            wal,
            index,
            wal_header,
            header,
            header_is_written: true,
            buffer: Vec::new(),
            last_attempt: 0,
            held_off: None,
            shown: None,
        })
    }

    /// Ends the adoption: what programs left in the WAL is captured. An empty one becomes ours.
    pub(super) fn take_over(
        &mut self,
        paths: &DbPaths,
        page_size: PageSize,
        page_count: u32,
    ) -> Result<(), DbError> {
        if self.header.mx_frame > 0 {
            return Ok(());
        }
        self.wal_header = WalHeader {
            page_size,
            checkpoint_seq: self.wal_header.checkpoint_seq.wrapping_add(1),
            salts: WalSalts(rand::random(), rand::random()),
            ..self.wal_header
        };
        let header = WalIndexHeader {
            change: self.header.change.wrapping_add(1),
            ..WalIndexHeader::of_empty(&self.wal_header, page_count)
        };
        self.wal
            .write_all_at(&self.wal_header.encode(), 0)
            .map_err(DbError::io("write", &paths.wal))?;
        self.index.set_backfill(0);
        self.index
            .publish(&header)
            .map_err(|e| DbError::io("publish", &paths.shm)(io::Error::other(e)))?;
        self.header = header;
        self.tell_kernel(&self.wal, &with_suffix(&paths.relative, "-wal"))
            .map_err(DbError::io("read", &paths.wal))
    }

    /// Writes the header of a WAL that began again, if no frame did that: to whoever reads on by the frames alone, those of
    /// before would be of this one.
    pub(super) fn write_header(&mut self, paths: &DbPaths) -> Result<(), DbError> {
        if !self.header_is_written {
            self.wal
                .write_all_at(&self.wal_header.encode(), 0)
                .map_err(DbError::io("write", &paths.wal))?;
            self.header_is_written = true;
            self.tell_kernel(&self.wal, &with_suffix(&paths.relative, "-wal"))
                .map_err(DbError::io("read", &paths.wal))?;
        }
        Ok(())
    }

    /// Returns what the wal-index says is committed.
    pub(super) fn index_header(&self) -> WalIndexHeader {
        self.header
    }

    /// Returns where the WAL ends, for the capture that goes on after us; its header is written.
    pub(super) fn cursor(&self) -> WalCursor {
        let checksum = match self.header.mx_frame {
            0 => self.wal_header.checksum(),
            _ => self.header.frame_checksum,
        };
        WalCursor {
            salt1: self.wal_header.salts.0,
            salt2: self.wal_header.salts.1,
            frame_no: self.header.mx_frame,
            checksum1: checksum.0,
            checksum2: checksum.1,
        }
    }

    /// Appends pages as one commit and makes it visible to readers.
    ///
    /// # Errors
    /// Disk; then nothing is visible and the same can be appended again.
    pub(super) fn append(&mut self, paths: &DbPaths, pages: &dyn Pages) -> Result<(), DbError> {
        let header = self.write_frames(paths, pages)?;
        crash_point(steps::REPLICA_WAL_PUBLISH);
        self.publish(header)
            .map_err(|e| DbError::io("publish", &paths.shm)(e))
    }

    /// Appends pages as one commit that readers see only once something follows it, or [`show`](Self::show) is called.
    ///
    /// # Errors
    /// Disk; the same can be appended again.
    pub(super) fn append_unseen(
        &mut self,
        paths: &DbPaths,
        pages: &dyn Pages,
    ) -> Result<(), DbError> {
        let header = self.write_frames(paths, pages)?;
        self.shown.get_or_insert(self.header);
        self.header = header;
        Ok(())
    }

    /// Lets readers see what was appended unseen. Returns whether there was something.
    ///
    /// # Errors
    /// The wal-index cannot be written.
    pub(super) fn show(&mut self) -> io::Result<bool> {
        if self.shown.is_some() {
            self.publish(self.header)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Writes frames, and returns the header by which they are seen.
    fn write_frames(
        &mut self,
        paths: &DbPaths,
        pages: &dyn Pages,
    ) -> Result<WalIndexHeader, DbError> {
        let page_count = pages.page_count();
        let io = || DbError::io("write", &paths.wal);
        if self.header.mx_frame > 0 && self.index.backfill() == self.header.mx_frame {
            self.restart_if_unread().map_err(io())?;
        }
        let page_size = self.wal_header.page_size;
        let first = self.header.mx_frame + 1;
        let mut checksum = if self.header.mx_frame == 0 {
            self.wal_header.checksum()
        } else {
            self.header.frame_checksum
        };
        if !self.header_is_written {
            self.wal
                .write_all_at(&self.wal_header.encode(), 0)
                .map_err(io())?;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        let mut at = frame_offset(page_size, first);
        let last = pages.pgnos().next_back();
        for pgno in pages.pgnos() {
            let commit = if Some(pgno) == last { page_count } else { 0 };
            let frame = buffer.len();
            buffer.resize(frame + WAL_FRAME_HEADER_LEN, 0);
            pages.read(pgno, &mut buffer).map_err(io())?;
            let (head, data) = buffer[frame..].split_at_mut(WAL_FRAME_HEADER_LEN);
            let header = WalFrameHeader::next(&self.wal_header, checksum, pgno, commit, data);
            checksum = header.checksum;
            head.copy_from_slice(&header.encode());
            if buffer.len() >= WRITE_LEN || Some(pgno) == last {
                crash_point(steps::REPLICA_WAL_FRAMES);
                self.wal.write_all_at(&buffer, at).map_err(io())?;
                at += buffer.len() as u64;
                buffer.clear();
            }
        }
        self.buffer = buffer;
        self.header_is_written = true;
        self.tell_kernel(&self.wal, &with_suffix(&paths.relative, "-wal"))
            .map_err(io())?;
        crash_point(steps::REPLICA_WAL_INDEX);
        let mut frame_no = self.header.mx_frame;
        for pgno in pages.pgnos() {
            frame_no += 1;
            self.index
                .append(frame_no, pgno)
                .map_err(|e| DbError::io("grow", &paths.shm)(io::Error::other(e)))?;
        }
        Ok(WalIndexHeader {
            change: self.header.change.wrapping_add(1),
            mx_frame: frame_no,
            n_page: page_count,
            frame_checksum: checksum,
            ..self.header
        })
    }

    /// Lets the kernel forget what it knows of a file that was written.
    fn tell_kernel(&self, file: &File, relative: &Path) -> io::Result<()> {
        if self.node.shm_is_shared() {
            self.node.invalidate(|inv| inv.attributes(relative));
            return Ok(());
        }
        let len = file.metadata()?.len();
        let mut last = [0];
        if len > 0 {
            file.read_exact_at(&mut last, len - 1)?;
        }
        self.node
            .invalidate(|inv| inv.grown(relative, len, last[0]));
        Ok(())
    }

    fn publish(&mut self, header: WalIndexHeader) -> io::Result<()> {
        self.index.publish(&header).map_err(io::Error::other)?;
        self.header = header;
        self.shown = None;
        Ok(())
    }

    /// Returns whether the WAL is long enough to be worth a checkpoint now.
    pub(super) fn wants_checkpoint(&self) -> bool {
        let frames = self.header.mx_frame - self.index.backfill().min(self.header.mx_frame);
        // After an attempt that readers stopped, wait for as many frames again.
        frames >= CHECKPOINT_FRAMES
            && self.header.mx_frame >= self.last_attempt.saturating_add(CHECKPOINT_FRAMES)
            || self.header.mx_frame < self.last_attempt
    }

    /// Copies frames into the database file as far as no reader still needs the old pages. Returns whether all were.
    pub(super) fn checkpoint(&mut self, paths: &DbPaths) -> Result<bool, DbError> {
        if self.held_off.is_some() || self.shown.is_some() {
            return Ok(false); // it would let them in, or see what they are not to
        }
        let mx_frame = self.header.mx_frame;
        self.last_attempt = mx_frame;
        let mut safe = mx_frame;
        let io_lock = || DbError::io("lock", &paths.shm);
        for slot in 1..READ_MARK_COUNT {
            let mark = self.index.read_mark(slot);
            if safe <= mark {
                continue;
            }
            let range = shm_lock::READ[slot];
            if self.locks().try_write(range).map_err(io_lock())? {
                self.index
                    .set_read_mark(slot, if slot == 1 { safe } else { READ_MARK_UNUSED });
                self.locks().unlock(range).map_err(io_lock())?;
            } else {
                safe = mark;
            }
        }
        let done = self.index.backfill();
        if done < safe {
            let range = shm_lock::READ[0];
            if !self.locks().try_write(range).map_err(io_lock())? {
                return Ok(false);
            }
            crash_point(steps::REPLICA_WAL_CHECKPOINT);
            self.index.set_backfill_attempted(safe);
            let copied = self.backfill(paths, done, safe);
            if copied.is_ok() {
                crash_point(steps::REPLICA_WAL_BACKFILLED);
                self.index.set_backfill(safe);
            }
            self.locks().unlock(range).map_err(io_lock())?;
            copied?;
        }
        Ok(self.index.backfill() == mx_frame)
    }

    fn backfill(&self, paths: &DbPaths, done: u32, safe: u32) -> Result<(), DbError> {
        let page_size = self.wal_header.page_size;
        let last: BTreeMap<Pgno, u32> = (done + 1..=safe)
            .filter_map(|frame| Some((self.index.page_of(frame)?, frame)))
            .collect();
        let mut page = vec![0; page_size.len()];
        for (pgno, frame) in last {
            if pgno.get() > self.header.n_page {
                continue;
            }
            let at = frame_offset(page_size, frame) + WAL_FRAME_HEADER_LEN as u64;
            self.wal
                .read_exact_at(&mut page, at)
                .map_err(DbError::io("read", &paths.wal))?;
            crash_point(steps::REPLICA_WAL_BACKFILL);
            self.main_backing
                .write_all_at(&page, page_size.offset(pgno))
                .map_err(DbError::io("write", &paths.main))?;
        }
        if safe == self.header.mx_frame {
            let len = u64::from(self.header.n_page) * u64::from(page_size.get());
            crash_point(steps::REPLICA_WAL_CUT);
            self.main_backing
                .set_len(len)
                .map_err(DbError::io("truncate", &paths.main))?;
        }
        self.tell_kernel(&self.main_backing, &paths.relative)
            .map_err(DbError::io("read", &paths.main))
    }

    /// Starts the WAL over if nobody reads from it.
    fn restart_if_unread(&mut self) -> io::Result<()> {
        let mut held = Vec::new();
        for slot in 1..READ_MARK_COUNT {
            let range = shm_lock::READ[slot];
            if !self.locks().try_write(range)? {
                break;
            }
            held.push(range);
        }
        let unread = held.len() == READ_MARK_COUNT - 1;
        let mut result = Ok(());
        if unread {
            crash_point(steps::REPLICA_WAL_RESTART);
            result = self
                .index
                .restart(&self.header, rand::random())
                .map(|header| {
                    self.header = header;
                    self.wal_header.salts = header.salts;
                    self.wal_header.checkpoint_seq = self.wal_header.checkpoint_seq.wrapping_add(1);
                    self.header_is_written = false;
                    self.last_attempt = 0;
                });
        }
        for range in held {
            self.locks().unlock(range)?;
        }
        result.map_err(io::Error::other)
    }

    /// Puts another database, of another page size, into the file that programs have open: they go on with it at their
    /// next transaction. Returns whether it did; not if a reader is in a transaction.
    ///
    /// Until all is there the file is no database (its first page is empty), for whoever outlives us.
    ///
    /// # Errors
    /// Disk; the file is then no database, and `copy` must take its name.
    pub(super) fn replace(
        &mut self,
        paths: &DbPaths,
        copy: &File,
        page_size: PageSize,
        page_count: u32,
    ) -> Result<bool, DbError> {
        if !self
            .hold_off_readers()
            .map_err(DbError::io("lock", &paths.shm))?
        {
            return Ok(false);
        }
        self.replace_unread(paths, copy, page_size, page_count)
            .map(|()| true)
    }

    /// Takes each read lock that is free, and keeps readers from taking one, which they could do in turns for ever: to
    /// whom the index is not valid, it must be recovered, which our WRITE lock forbids, so they try again, for ten seconds
    /// at most. (Who outlives us recovers it.) Returns whether all are taken; [`let_readers_in`](Self::let_readers_in)
    /// ends it.
    pub(super) fn hold_off_readers(&mut self) -> io::Result<bool> {
        let mut held = self.held_off.take().unwrap_or_default();
        self.index.invalidate();
        let mut taken = Ok(true);
        for range in shm_lock::READ {
            if held.contains(&range) {
                continue;
            }
            match self.locks().try_write(range) {
                Ok(true) => held.push(range),
                Ok(false) => taken = taken.map(|_| false),
                Err(error) => taken = Err(error),
            }
        }
        self.held_off = Some(held);
        taken
    }

    /// Lets those in who were held off.
    pub(super) fn let_readers_in(&mut self) {
        let Some(held) = self.held_off.take() else {
            return;
        };
        if let Err(error) = self.index.publish(&self.shown.unwrap_or(self.header)) {
            tracing::error!(%error, "wal-index stays invalid: readers get SQLITE_PROTOCOL"); // its first block is there
        }
        for range in held {
            let _ = self.locks().unlock(range);
        }
    }

    fn replace_unread(
        &mut self,
        paths: &DbPaths,
        copy: &File,
        page_size: PageSize,
        page_count: u32,
    ) -> Result<(), DbError> {
        self.wal_header = WalHeader {
            page_size,
            checkpoint_seq: self.wal_header.checkpoint_seq.wrapping_add(1),
            salts: WalSalts(rand::random(), rand::random()),
            ..self.wal_header
        };
        self.last_attempt = 0;
        let header = WalIndexHeader {
            change: self.header.change.wrapping_add(1),
            ..WalIndexHeader::of_empty(&self.wal_header, page_count)
        };
        crash_point(steps::REPLACE_INDEX);
        self.header = self
            .index
            .build([], &header)
            .map_err(|e| DbError::io("publish", &paths.shm)(io::Error::other(e)))?;
        let io = || DbError::io("write", &paths.main);
        self.wal
            .write_all_at(&self.wal_header.encode(), 0)
            .and_then(|()| self.wal.set_len(WAL_HEADER_LEN as u64))
            .map_err(DbError::io("write", &paths.wal))?;
        self.header_is_written = true;
        let first = vec![0; page_size.len()];
        self.main_backing.write_all_at(&first, 0).map_err(io())?;
        crash_point(steps::REPLACE_BEGUN);
        let (mut from, mut to) = (copy, &self.main_backing);
        let start = io::SeekFrom::Start(page_size.get().into());
        from.seek(start)
            .and_then(|_| to.seek(start))
            .and_then(|_| io::copy(&mut from, &mut to))
            .map_err(io())?;
        let len = u64::from(page_count) * u64::from(page_size.get());
        self.main_backing.set_len(len).map_err(io())?;
        crash_point(steps::REPLACE_WRITTEN);
        let mut first = first;
        copy.read_exact_at(&mut first, 0).map_err(io())?;
        self.main_backing.write_all_at(&first, 0).map_err(io())?;
        self.main_backing.sync_data().map_err(io())?;
        self.tell_kernel(&self.wal, &with_suffix(&paths.relative, "-wal"))
            .map_err(DbError::io("read", &paths.wal))?;
        self.node.invalidate(|inv| inv.data(&paths.relative, 0, 0));
        Ok(())
    }

    /// Ends the serving of files that lost their names: a reader keeps the state he has for the transaction that he is
    /// in, and gets `SQLITE_NOTADB` at the next, rather than that state for ever.
    pub(super) fn end_readers(&mut self, paths: &DbPaths) {
        let header = WalIndexHeader {
            change: self.header.change.wrapping_add(1),
            ..WalIndexHeader::of_empty(&self.wal_header, self.header.n_page)
        };
        let nothing = vec![0; self.wal_header.page_size.len()];
        let ended = self
            .main_backing
            .write_all_at(&nothing, 0)
            .and_then(|()| self.index.publish(&header).map_err(io::Error::other));
        if let Err(error) = ended {
            tracing::warn!(path = %paths.main.display(), %error, "who has the replaced file open goes on reading it");
        }
    }

    fn locks(&self) -> OfdLocks<'_> {
        OfdLocks::new(self.index.shm().file().as_fd())
    }
}

fn open_backing(path: &Path) -> Result<File, DbError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(DbError::io("open", path))
}

fn read_wal_header(path: &Path) -> Option<WalHeader> {
    let mut head = [0; WAL_HEADER_LEN];
    File::open(path).ok()?.read_exact_at(&mut head, 0).ok()?;
    WalHeader::decode(&head).ok()
}

/// Takes a lock that nobody can be holding for long.
fn lock(
    file: &File,
    range: LockRange,
    exclusive: bool,
    what: &'static str,
    path: &Path,
) -> Result<(), DbError> {
    let taken = {
        let locks = OfdLocks::new(file.as_fd());
        if exclusive {
            locks.try_write(range)
        } else {
            locks.try_read(range)
        }
    };
    match taken {
        Ok(true) => Ok(()),
        Ok(false) => Err(DbError::Locked {
            what,
            path: path.to_owned(),
        }),
        Err(e) => Err(DbError::io("lock", path)(e)),
    }
}
