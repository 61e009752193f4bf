//! The wal-index of a replica as shared memory, mapped through the mount so that every reader sees the same bytes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};

use super::NodeContext;
use crate::sqlite::wal_index::{BLOCK_LEN, Shm};

/// Blocks of 32 KiB, each its own mapping, so that growing moves nothing that somebody reads.
#[derive(Debug)]
pub(super) struct MappedShm {
    file: File,
    node: Arc<NodeContext>,
    blocks: Vec<MmapRaw>,
}

impl MappedShm {
    pub(super) fn new(file: File, node: Arc<NodeContext>) -> MappedShm {
        MappedShm {
            file,
            node,
            blocks: Vec::new(),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Returns where a byte is; `len` bytes from there lie in one block.
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        let (block, within) = (offset / BLOCK_LEN, offset % BLOCK_LEN);
        assert!(
            within + len <= BLOCK_LEN,
            "access across blocks of the wal-index"
        );
        // SAFETY: `within` is inside the mapping, by the assertion.
        unsafe { self.blocks[block].as_mut_ptr().add(within) }
    }
}

impl Shm for MappedShm {
    fn len(&self) -> u64 {
        (self.blocks.len() * BLOCK_LEN) as u64
    }

    fn ensure_len(&mut self, len: u64) -> io::Result<()> {
        if len <= Shm::len(self) {
            return Ok(());
        }
        let old = self.file.metadata()?.len();
        if old < len {
            // Written, not only made longer: a hole that finds the disk full later would be a SIGBUS.
            let missing = usize::try_from(len - old).map_err(io::Error::other)?;
            self.node.in_mount(|| {
                self.file
                    .write_all_at(&vec![0; missing], old)
                    .inspect_err(|_| drop(self.file.set_len(old)))
            })?;
        }
        while Shm::len(self) < len {
            let map = MmapOptions::new()
                .offset(Shm::len(self))
                .len(BLOCK_LEN)
                .map_raw(&self.file)?;
            self.blocks.push(map);
        }
        Ok(())
    }

    fn load_u16(&self, offset: usize) -> u16 {
        // SAFETY: in the mapping and aligned, as every field of the format is; others may write, hence volatile.
        unsafe { self.at(offset, 2).cast::<u16>().read_volatile() }
    }

    fn store_u16(&mut self, offset: usize, value: u16) {
        // SAFETY: as in `load_u16`.
        unsafe { self.at(offset, 2).cast::<u16>().write_volatile(value) }
    }

    fn load_u32(&self, offset: usize) -> u32 {
        // SAFETY: as in `load_u16`.
        unsafe { self.at(offset, 4).cast::<u32>().read_volatile() }
    }

    fn store_u32(&mut self, offset: usize, value: u32) {
        // SAFETY: as in `load_u16`.
        unsafe { self.at(offset, 4).cast::<u32>().write_volatile(value) }
    }

    fn copy_out(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        for (i, byte) in to.iter_mut().enumerate() {
            // SAFETY: as in `load_u16`.
            *byte = unsafe { from.add(i).read_volatile() };
        }
    }

    fn copy_in(&mut self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        for (i, byte) in from.iter().enumerate() {
            // SAFETY: as in `load_u16`.
            unsafe { to.add(i).write_volatile(*byte) };
        }
    }

    fn zero(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        let to = self.at(range.start, range.len());
        // SAFETY: in the mapping; readers do not look at what is past the published `mxFrame`.
        unsafe { to.write_bytes(0, range.len()) };
    }

    fn barrier(&self) {
        fence(Ordering::SeqCst);
    }
}
