//! Tells the kernel to forget what it has cached, after the backing directory changed behind its back.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use fuser::{INodeNo, Notifier};
use parking_lot::RwLock;

use crate::attr;
use crate::inode::{Inodes, ROOT};
use crate::mirror::stat_at;

/// Handle for invalidations by path. Never use it on a session thread: the kernel may wait there for us.
#[derive(Clone)]
pub struct Invalidator {
    pub(crate) inodes: Arc<Inodes>,
    pub(crate) root: Arc<OwnedFd>,
    pub(crate) notifier: Arc<RwLock<Option<Notifier>>>,
}

impl std::fmt::Debug for Invalidator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Invalidator")
    }
}

impl Invalidator {
    /// Forgets what a name stands for, or that it stands for nothing.
    pub fn name(&self, path: &Path) {
        let Some(name) = path.file_name() else { return };
        let Some(parent) = self.find(path.parent().unwrap_or(Path::new(""))) else {
            return;
        };
        self.send(|n| n.inval_entry(INodeNo(parent), name));
    }

    /// Forgets the attributes of a file.
    pub fn attributes(&self, path: &Path) {
        if let Some(ino) = self.find(path) {
            self.send(|n| n.inval_inode(INodeNo(ino), -1, 0));
        }
    }

    /// Forgets the attributes and `len` cached bytes from `offset` on; `len` 0 means to the end.
    pub fn data(&self, path: &Path, offset: u64, len: u64) {
        if let Some(ino) = self.find(path) {
            let (offset, len) = (offset.cast_signed(), len.cast_signed());
            self.send(|n| n.inval_inode(INodeNo(ino), offset, len));
        }
    }

    /// Forgets cached bytes, and makes it known that the file has `len` bytes now, of which `last` is the last.
    ///
    /// To forget the attributes alone would not do for a reader: the answer to a question that it asked before is
    /// dropped then, and the kernel goes by the old length instead of asking again.
    pub fn grown(&self, path: &Path, len: u64, last: u8) {
        if let (Some(ino), Some(end)) = (self.find(path), len.checked_sub(1)) {
            self.send(|n| n.inval_inode(INodeNo(ino), 0, 0));
            self.send(|n| n.store(INodeNo(ino), end, &[last]));
        }
    }

    /// Returns the number that the kernel knows a backing path by, if it does.
    fn find(&self, path: &Path) -> Option<u64> {
        if path.as_os_str().is_empty() {
            return Some(ROOT);
        }
        let st = stat_at(self.root.as_raw_fd(), path).ok()?;
        self.inodes.find_backing(attr::key(&st)).map(|n| n.ino)
    }

    /// Returns how many handles are open on the file behind a path, whoever has them.
    #[must_use]
    pub fn handle_count(&self, path: &Path) -> u32 {
        let Ok(st) = stat_at(self.root.as_raw_fd(), path) else {
            return 0;
        };
        self.inodes
            .find_backing(attr::key(&st))
            .map_or(0, |node| node.open.lock().handle_count)
    }

    /// Returns whether the file behind a path is open, and the kernel serves it from the backing directory.
    #[must_use]
    pub fn is_passed_through(&self, path: &Path) -> bool {
        let Ok(st) = stat_at(self.root.as_raw_fd(), path) else {
            return false;
        };
        self.inodes
            .find_backing(attr::key(&st))
            .is_some_and(|node| {
                let open = node.open.lock();
                open.handle_count > 0 && open.backing.is_some()
            })
    }

    /// Learns that the file behind a path is about to be removed or replaced other than through the mount.
    pub fn forget_file(&self, path: &Path) {
        if let Ok(st) = stat_at(self.root.as_raw_fd(), path) {
            self.inodes.orphan(attr::key(&st));
        }
    }

    fn send(&self, call: impl FnOnce(&Notifier) -> std::io::Result<()>) {
        if let Some(notifier) = &*self.notifier.read()
            && let Err(error) = call(notifier)
        {
            tracing::debug!(%error, "kernel refused an invalidation");
        }
    }
}
