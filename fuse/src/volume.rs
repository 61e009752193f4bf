//! The port: what a file system must know about its files that the kernel cannot.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::time::SystemTime;

use fuser::Errno;

/// How the reads and writes of an inode are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serve {
    /// By the kernel, straight from the backing file; falls back to `Cached` where the kernel refuses.
    Passthrough,
    /// By this process, through the kernel's page cache (writes go through, reads are kept).
    Cached,
    /// By this process, every read and write.
    Direct,
}

/// Who asked.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// User id of the process.
    pub uid: u32,
    /// Group id of the process.
    pub gid: u32,
    /// Thread id; zero where the kernel does not say.
    pub pid: u32,
}

/// An open, before the backing file is touched.
#[derive(Debug, Clone, Copy)]
pub struct OpenRequest<'a> {
    /// Path relative to the mount.
    pub path: &'a Path,
    /// Whether the caller may write through the handle.
    pub writable: bool,
    /// Whether the file is being made by this very request.
    pub create: bool,
    /// Who asked.
    pub caller: Caller,
}

/// What a [`Volume`] answers to an open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenAnswer {
    /// How to serve the inode, if this is its first handle.
    pub serve: Serve,
    /// A mark that comes back with the release of the handle; 0 to 255.
    pub mark: u8,
}

/// A change that is about to happen to the backing directory, or has just happened.
#[derive(Debug)]
pub enum Op<'a> {
    /// A file is made.
    Create {
        /// Path relative to the mount.
        path: &'a Path,
    },
    /// A file served by this process is written.
    Write {
        /// Path relative to the mount.
        path: &'a Path,
        /// Backing file.
        file: &'a File,
        /// First byte written.
        offset: u64,
        /// Bytes written.
        data: &'a [u8],
    },
    /// The length of a file is set.
    Truncate {
        /// Path relative to the mount.
        path: &'a Path,
        /// New length in bytes.
        size: u64,
    },
    /// A name is removed.
    Unlink {
        /// Path relative to the mount.
        path: &'a Path,
    },
    /// A name is changed; with `exchange` the two swap.
    Rename {
        /// Old path relative to the mount.
        from: &'a Path,
        /// New path relative to the mount.
        to: &'a Path,
        /// Whether the two names swap.
        exchange: bool,
    },
    /// A second name is given to a file.
    Link {
        /// Old path relative to the mount.
        from: &'a Path,
        /// New path relative to the mount.
        to: &'a Path,
    },
    /// A directory is made.
    Mkdir {
        /// Path relative to the mount.
        path: &'a Path,
    },
    /// A directory is removed.
    Rmdir {
        /// Path relative to the mount.
        path: &'a Path,
    },
    /// A file is synced to disk.
    Fsync {
        /// Path relative to the mount.
        path: &'a Path,
    },
}

/// How an operation goes on after [`Volume::before`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// As asked for.
    Proceed,
    /// The volume has done it, in its own way.
    Done,
}

/// A file without bytes on disk.
#[derive(Debug, Clone)]
pub struct VirtualFile {
    /// What a reader gets.
    pub data: Vec<u8>,
    /// Time of the last change.
    pub mtime: SystemTime,
}

/// What the mount asks of its owner.
///
/// `before` may refuse an operation by an errno and may block for as long as the operation may take; it runs on a
/// session thread (see `may_wait`), so it must not touch the mount. `open` may touch the mount if `open_may_block` said so.
pub trait Volume: Send + Sync + 'static {
    /// Returns a virtual file's content, if the path names one.
    fn virtual_file(&self, path: &Path) -> Option<VirtualFile>;

    /// Returns whether the path is kept for a virtual file, whether or not it is there now.
    fn is_virtual_name(&self, path: &Path) -> bool;

    /// Returns whether a name that stands for nothing may become that of a virtual file.
    fn may_appear(&self, _path: &Path) -> bool {
        false
    }

    /// Returns the names of virtual files to list in a directory.
    fn virtual_names(&self, dir: &Path) -> Vec<OsString>;

    /// Returns whether `open` of this path may take long or use the mount, so that it needs a thread of its own.
    fn open_may_block(&self, request: &OpenRequest<'_>) -> bool;

    /// Decides how to serve a file, or refuses.
    ///
    /// # Errors
    /// Whatever errno the caller is to see.
    fn open(&self, request: &OpenRequest<'_>) -> Result<OpenAnswer, Errno>;

    /// Learns that a handle is gone, or never came to be.
    fn released(&self, path: &Path, writable: bool, mark: u8);

    /// Returns whether [`before`](Volume::before) may wait for other nodes when a file is written, cut, or removed: a thread
    /// of its own does it then, if too few would be left to serve the mount.
    fn may_wait(&self, _path: &Path) -> bool {
        false
    }

    /// Learns what is about to happen.
    ///
    /// # Errors
    /// Whatever errno the caller is to see; the operation does not happen.
    fn before(&self, op: &Op<'_>, caller: Caller) -> Result<Flow, Errno>;

    /// Learns that what `before` allowed was not done, or not all of it. Returns what the caller is to see instead of why.
    fn failed(&self, _op: &Op<'_>) -> Option<Errno> {
        None
    }

    /// Learns that the kernel refuses passthrough for some file of the backing directory.
    fn passthrough_refused(&self) {}

    /// Learns what has happened.
    fn after(&self, op: &Op<'_>, caller: Caller);
}
