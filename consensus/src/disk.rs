//! The `Disk` port: the few durable file operations that Raft's storage needs.
//!
//! Each is all or nothing only where it says so; a call that failed may have done any part of its work.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Durable file operations.
pub(crate) trait Disk: fmt::Debug + Send + Sync {
    /// Says whether calls can take long, and must not be made on a thread that runs tasks.
    fn is_slow(&self) -> bool;

    /// Makes a directory and its parents, durably, unless they exist.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Reads a whole file; `None` if there is none.
    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>>;

    /// Writes at an offset of an existing file, which then ends after the bytes, and syncs if asked to.
    fn write(&self, path: &Path, offset: u64, bytes: &[u8], sync: bool) -> io::Result<()>;

    /// Puts a file in the place of another, or of none, durably and all or nothing.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
}

/// The file systems of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn is_slow(&self) -> bool {
        true
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(dir)?;
        for parent in dir.ancestors().take(3) {
            if !parent.as_os_str().is_empty() {
                File::open(parent)?.sync_all()?;
            }
        }
        Ok(())
    }

    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn write(&self, path: &Path, offset: u64, bytes: &[u8], sync: bool) -> io::Result<()> {
        // Opened anew each time: an error of the sync is then told to this call and to no other.
        let file = OpenOptions::new().write(true).open(path)?;
        file.write_all_at(bytes, offset)?;
        file.set_len(offset + bytes.len() as u64)?;
        if sync { file.sync_data() } else { Ok(()) }
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let tmp = path.with_extension("tmp");
        let mut file = File::create(&tmp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        #[expect(
            clippy::disallowed_methods,
            reason = "made durable by the syncs before and after"
        )]
        fs::rename(&tmp, path)?;
        match path.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }
}
