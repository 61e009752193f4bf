//! `fuse`: turns kernel requests on a mirrored directory into calls on a [`Volume`].
//!
//! The mount shows a backing directory. This crate knows inodes, names, handles and the kernel's rules of
//! passthrough; what a file means (a database, its WAL, an ordinary file) is the [`Volume`]'s business.
//!
//! ```text
//! app -> kernel -> [fuser threads] -> MirrorFs --Op--> Volume (may refuse, may act before and after)
//!          |                              \-> backing file (read, write, truncate, ...)
//!          \-> backing file directly, where the Volume chose passthrough
//! ```
//!
//! What holds:
//! - All opens of an inode are served one way ([`Serve`]) until its last handle is gone (INV-FUSE-1); the kernel
//!   answers EIO otherwise.
//! - POSIX locks are never negotiated: they stay in the kernel, on the FUSE inode.
//! - Entries and attributes are cached by the kernel for an hour; whoever changes the backing directory
//!   otherwise than through the mount must say so through [`Invalidator`].

mod attr;
mod guard;
mod inode;
mod mirror;
mod mount;
mod notify;
mod volume;

pub use fuser::Errno;
pub use guard::{Guard, abort_connection};
pub use mount::{
    BareDir, MountOptions, Mounted, clean_stale_mount, is_mounted, is_stale_mount, mount,
};
pub use notify::Invalidator;
pub use volume::{Caller, Flow, Op, OpenAnswer, OpenRequest, Serve, VirtualFile, Volume};
