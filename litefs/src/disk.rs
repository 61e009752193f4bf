//! The `Disk` port: every file operation of the daemon that a crash or a full disk could interrupt.
//!
//! Each call names its [`Step`], such as `"log.append"`, so that a test can fail exactly that one.
//! [`RealDisk`] does the work, [`FailingDisk`] wraps it and fails on cue, in this process. A whole
//! process can be killed at a step with `LITEFS_CRASH_AT=step[:n]`: it dies of SIGKILL just before
//! the n-th call (from 1) of that step; with `LITEFS_CRASH_WHEN=file` only calls made while that file exists count.
//! `LITEFS_STEPS_TO=file` adds a line to a file for each step instead, so that a
//! test can tell which ones a workload reaches. These hooks are compiled into debug builds and with the
//! feature `failpoints`; elsewhere they are an empty inline function. [`crate::steps`] lists every step there is.
//!
//! Files are plain [`std::fs::File`]s, always read and written at an offset, so that one handle
//! serves a writer and any number of readers.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// Name of one kind of disk operation, `area.operation` or `area.operation:part`.
pub type Step = &'static str;

/// Declares the steps of a module, `NAME = "label"`, and lists them as `ALL`, which [`crate::steps`] collects.
macro_rules! steps {
    ($($name:ident = $label:literal),* $(,)?) => {
        $(
            #[allow(missing_docs, reason = "says what it does by its value")]
            pub const $name: $crate::disk::Step = $label;
        )*
        /// All steps of this module.
        pub const ALL: &[$crate::disk::Step] = &[$($label),*];
    };
}
pub(crate) use steps;

/// How a file is opened; reading is always possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, to read.
    Read,
    /// An existing file, to read and write.
    Write,
    /// To read and write, made if missing, kept as it is otherwise.
    Create,
    /// To read and write, made if missing, emptied otherwise.
    Truncate,
}

/// File operations, each under the name of its step.
///
/// Nothing here is durable until [`sync_data`](Disk::sync_data) or
/// [`sync_dir`](Disk::sync_dir) says so, except [`rename`](Disk::rename).
pub trait Disk: fmt::Debug + Send + Sync {
    /// Opens a file.
    ///
    /// # Errors
    /// As `open(2)`.
    fn open(&self, step: Step, path: &Path, mode: OpenMode) -> io::Result<File>;

    /// Reads at an offset; fewer bytes than asked for only at the end of the file.
    ///
    /// # Errors
    /// As `pread(2)`.
    fn read_at(&self, step: Step, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all parts, one after the other, at an offset; usually one system call.
    ///
    /// # Errors
    /// As `pwritev(2)`; then any prefix of the bytes may have been written.
    fn write_parts_at(
        &self,
        step: Step,
        file: &File,
        parts: &mut [IoSlice<'_>],
        offset: u64,
    ) -> io::Result<()>;

    /// Makes a file's bytes and length survive a power loss.
    ///
    /// # Errors
    /// As `fdatasync(2)`. What was not synced before may be lost even if a second call succeeds.
    fn sync_data(&self, step: Step, file: &File) -> io::Result<()>;

    /// Cuts or extends (with zeros) a file.
    ///
    /// # Errors
    /// As `ftruncate(2)`.
    fn set_len(&self, step: Step, file: &File, len: u64) -> io::Result<()>;

    /// Returns a file's length in bytes.
    ///
    /// # Errors
    /// As `fstat(2)`.
    fn len(&self, step: Step, file: &File) -> io::Result<u64>;

    /// Moves a file or directory, replacing a file at `to`, and syncs the parents of both names.
    ///
    /// The bytes of the file are not synced: do that before.
    ///
    /// # Errors
    /// As `rename(2)` and `fsync(2)`; in the second case the move has happened, maybe not durably.
    fn rename(&self, step: Step, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file; the name is gone for good only after [`sync_dir`](Disk::sync_dir).
    ///
    /// # Errors
    /// As `unlink(2)`.
    fn remove_file(&self, step: Step, path: &Path) -> io::Result<()>;

    /// Makes a directory and its parents, unless they exist.
    ///
    /// # Errors
    /// As `mkdir(2)`.
    fn create_dir_all(&self, step: Step, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory survive a power loss.
    ///
    /// # Errors
    /// As `open(2)` and `fsync(2)`.
    fn sync_dir(&self, step: Step, path: &Path) -> io::Result<()>;

    /// Returns the names in a directory, in no order.
    ///
    /// # Errors
    /// As `readdir(3)`.
    fn list_dir(&self, step: Step, path: &Path) -> io::Result<Vec<OsString>>;

    /// Writes bytes at an offset.
    ///
    /// # Errors
    /// As [`write_parts_at`](Disk::write_parts_at).
    fn write_all_at(&self, step: Step, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_parts_at(step, file, &mut [IoSlice::new(bytes)], offset)
    }

    /// Reads exactly as many bytes as `buf` holds.
    ///
    /// # Errors
    /// As [`read_at`](Disk::read_at), and `UnexpectedEof`.
    fn read_exact_at(
        &self,
        step: Step,
        file: &File,
        buf: &mut [u8],
        offset: u64,
    ) -> io::Result<()> {
        if self.read_at(step, file, buf, offset)? < buf.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// As [`open`](Disk::open) and [`read_at`](Disk::read_at).
    fn read_file(&self, step: Step, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(step, path, OpenMode::Read)?;
        let len = usize::try_from(self.len(step, &file)?).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        let n = self.read_at(step, &file, &mut bytes, 0)?;
        bytes.truncate(n);
        Ok(bytes)
    }
}

/// The file systems of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, step: Step, path: &Path, mode: OpenMode) -> io::Result<File> {
        crash_point(step);
        let mut options = OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::Read => &mut options,
            OpenMode::Write => options.write(true),
            OpenMode::Create => options.write(true).create(true).truncate(false),
            OpenMode::Truncate => options.write(true).create(true).truncate(true),
        }
        .open(path)
    }

    fn read_at(
        &self,
        step: Step,
        file: &File,
        mut buf: &mut [u8],
        mut offset: u64,
    ) -> io::Result<usize> {
        crash_point(step);
        let wanted = buf.len();
        while !buf.is_empty() {
            match file.read_at(buf, offset) {
                Ok(0) => break,
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(wanted - buf.len())
    }

    fn write_parts_at(
        &self,
        step: Step,
        file: &File,
        mut parts: &mut [IoSlice<'_>],
        mut offset: u64,
    ) -> io::Result<()> {
        crash_point(step);
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            match rustix::io::pwritev(file, parts, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    IoSlice::advance_slices(&mut parts, n);
                    offset += n as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn sync_data(&self, step: Step, file: &File) -> io::Result<()> {
        crash_point(step);
        file.sync_data()
    }

    fn set_len(&self, step: Step, file: &File, len: u64) -> io::Result<()> {
        crash_point(step);
        file.set_len(len)
    }

    fn len(&self, step: Step, file: &File) -> io::Result<u64> {
        crash_point(step);
        Ok(file.metadata()?.len())
    }

    fn rename(&self, step: Step, from: &Path, to: &Path) -> io::Result<()> {
        crash_point(step);
        #[expect(
            clippy::disallowed_methods,
            reason = "this is the durable rename itself"
        )]
        fs::rename(from, to)?;
        // Journaling file systems commit both names at once; POSIX promises it only per directory.
        if let Some(parent) = to.parent() {
            File::open(parent)?.sync_all()?;
        }
        match from.parent() {
            Some(parent) if Some(parent) != to.parent() => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    }

    fn remove_file(&self, step: Step, path: &Path) -> io::Result<()> {
        crash_point(step);
        fs::remove_file(path)
    }

    fn create_dir_all(&self, step: Step, path: &Path) -> io::Result<()> {
        crash_point(step);
        fs::create_dir_all(path)
    }

    fn sync_dir(&self, step: Step, path: &Path) -> io::Result<()> {
        crash_point(step);
        File::open(path)?.sync_all()
    }

    fn list_dir(&self, step: Step, path: &Path) -> io::Result<Vec<OsString>> {
        crash_point(step);
        fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name()))
            .collect()
    }
}

/// Kills this process if `LITEFS_CRASH_AT` names this call of this step.
#[cfg(any(debug_assertions, feature = "failpoints"))]
pub fn crash_point(step: Step) {
    use std::sync::OnceLock;
    use std::sync::atomic::AtomicU64;

    static PLAN: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();
    static WHEN: OnceLock<Option<OsString>> = OnceLock::new();
    static TRACE: OnceLock<Option<File>> = OnceLock::new();
    let trace = TRACE.get_or_init(|| {
        let path = std::env::var_os("LITEFS_STEPS_TO")?;
        OpenOptions::new().append(true).create(true).open(path).ok()
    });
    if let Some(mut trace) = trace.as_ref() {
        let _ = io::Write::write_all(&mut trace, format!("{step}\n").as_bytes());
    }
    let plan = PLAN.get_or_init(|| {
        let text = std::env::var("LITEFS_CRASH_AT").ok()?;
        let (step, nth) = parse_crash_at(&text);
        Some((step.to_owned(), AtomicU64::new(nth)))
    });
    if let Some((wanted, left)) = plan
        && wanted == step
        && WHEN
            .get_or_init(|| std::env::var_os("LITEFS_CRASH_WHEN"))
            .as_ref()
            .is_none_or(|path| Path::new(path).exists())
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}

/// Does nothing in this build.
#[cfg(not(any(debug_assertions, feature = "failpoints")))]
#[inline(always)]
pub fn crash_point(_: Step) {}

/// Splits `step[:n]`; steps may contain colons themselves.
#[cfg(any(debug_assertions, feature = "failpoints"))]
fn parse_crash_at(text: &str) -> (&str, u64) {
    match text.rsplit_once(':').map(|(step, n)| (step, n.parse())) {
        Some((step, Ok(nth))) => (step, nth),
        _ => (text, 1),
    }
}

/// What [`FailingDisk`] does in place of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Nothing is done, and this errno returned.
    Errno(i32),
    /// Of a write only so many bytes reach the file, then this errno is returned.
    Torn {
        /// Bytes that are written.
        written_len: usize,
        /// What the caller is told.
        errno: i32,
    },
    /// The "process" dies before the step: it and every later one fail.
    Crash,
    /// The "process" dies after the step: it happens, but fails like every later one.
    CrashAfter,
}

/// A [`RealDisk`] that fails on cue, for tests.
#[derive(Debug, Default)]
pub struct FailingDisk {
    real: RealDisk,
    rules: Mutex<Vec<(String, u64, Failure)>>,
    seen: Mutex<HashMap<Step, u64>>,
    crashed: AtomicBool,
}

impl FailingDisk {
    /// Makes a disk that does not fail yet.
    #[must_use]
    pub fn new() -> FailingDisk {
        FailingDisk::default()
    }

    /// Fails one call of a step, the n-th from now on (from 1).
    pub fn fail(&self, step: &str, nth: u64, failure: Failure) {
        let done = self.seen.lock().get(step).copied().unwrap_or(0);
        self.rules
            .lock()
            .push((step.to_owned(), done + nth, failure));
    }

    /// Fails no more; a crashed disk works again.
    pub fn heal(&self) {
        self.rules.lock().clear();
        self.crashed.store(false, Ordering::Relaxed);
    }

    /// Says whether a crash was reached.
    #[must_use]
    pub fn crashed(&self) -> bool {
        self.crashed.load(Ordering::Relaxed)
    }

    /// Returns every step called so far and how often, in name order.
    #[must_use]
    pub fn steps(&self) -> Vec<(Step, u64)> {
        let mut steps: Vec<_> = self.seen.lock().iter().map(|(s, n)| (*s, *n)).collect();
        steps.sort_unstable();
        steps
    }

    fn next_failure(&self, step: Step) -> Option<Failure> {
        if self.crashed() {
            return Some(Failure::Crash);
        }
        let mut seen = self.seen.lock();
        let count = seen.entry(step).or_insert(0);
        *count += 1;
        let mut rules = self.rules.lock();
        let i = rules.iter().position(|(s, n, _)| s == step && n == count)?;
        Some(rules.remove(i).2)
    }

    fn run<T>(&self, step: Step, real: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let Some(failure) = self.next_failure(step) else {
            return real();
        };
        match failure {
            Failure::Errno(errno) | Failure::Torn { errno, .. } => {
                Err(io::Error::from_raw_os_error(errno))
            }
            Failure::Crash | Failure::CrashAfter => {
                if failure == Failure::CrashAfter {
                    let _ = real();
                }
                self.crashed.store(true, Ordering::Relaxed);
                Err(io::Error::other("simulated crash"))
            }
        }
    }

    fn write_torn(&self, file: &File, parts: &[IoSlice<'_>], len: usize, at: u64) {
        let bytes: Vec<u8> = parts.iter().flat_map(|p| p.iter().copied()).collect();
        let len = len.min(bytes.len());
        let _ = file.write_all_at(&bytes[..len], at);
    }
}

impl Disk for FailingDisk {
    fn open(&self, step: Step, path: &Path, mode: OpenMode) -> io::Result<File> {
        self.run(step, || self.real.open(step, path, mode))
    }

    fn read_at(&self, step: Step, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.run(step, || self.real.read_at(step, file, buf, offset))
    }

    fn write_parts_at(
        &self,
        step: Step,
        file: &File,
        parts: &mut [IoSlice<'_>],
        offset: u64,
    ) -> io::Result<()> {
        let due = self.seen.lock().get(step).copied().unwrap_or(0) + 1;
        let torn = self.rules.lock().iter().find_map(|rule| match rule {
            (s, n, Failure::Torn { written_len, .. }) if s == step && *n == due => {
                Some(*written_len)
            }
            _ => None,
        });
        if let Some(len) = torn {
            self.write_torn(file, parts, len, offset);
        }
        self.run(step, || self.real.write_parts_at(step, file, parts, offset))
    }

    fn sync_data(&self, step: Step, file: &File) -> io::Result<()> {
        self.run(step, || self.real.sync_data(step, file))
    }

    fn set_len(&self, step: Step, file: &File, len: u64) -> io::Result<()> {
        self.run(step, || self.real.set_len(step, file, len))
    }

    fn len(&self, step: Step, file: &File) -> io::Result<u64> {
        self.run(step, || self.real.len(step, file))
    }

    fn rename(&self, step: Step, from: &Path, to: &Path) -> io::Result<()> {
        self.run(step, || self.real.rename(step, from, to))
    }

    fn remove_file(&self, step: Step, path: &Path) -> io::Result<()> {
        self.run(step, || self.real.remove_file(step, path))
    }

    fn create_dir_all(&self, step: Step, path: &Path) -> io::Result<()> {
        self.run(step, || self.real.create_dir_all(step, path))
    }

    fn sync_dir(&self, step: Step, path: &Path) -> io::Result<()> {
        self.run(step, || self.real.sync_dir(step, path))
    }

    fn list_dir(&self, step: Step, path: &Path) -> io::Result<Vec<OsString>> {
        self.run(step, || self.real.list_dir(step, path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn writes_parts_in_order_and_renames() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let disk = RealDisk;
        let file = disk.open("t", &from, OpenMode::Create).unwrap();
        let mut parts = [
            IoSlice::new(b""),
            IoSlice::new(b"hello "),
            IoSlice::new(b""),
            IoSlice::new(b"disk"),
        ];
        disk.write_parts_at("t", &file, &mut parts, 2).unwrap();
        disk.rename("t", &from, &to).unwrap();
        assert_eq!(disk.read_file("t", &to).unwrap(), b"\0\0hello disk");
        assert_eq!(disk.list_dir("t", dir.path()).unwrap(), ["b"]);
        disk.write_parts_at("t", &file, &mut [], 0).unwrap();
    }

    #[test]
    fn fails_the_nth_call_of_a_step_only() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FailingDisk::new();
        let file = disk
            .open("open", &dir.path().join("a"), OpenMode::Create)
            .unwrap();
        let torn = Failure::Torn {
            written_len: 3,
            errno: libc::ENOSPC,
        };
        disk.fail("write", 2, torn);
        disk.write_all_at("write", &file, b"12345", 0).unwrap();
        let error = disk.write_all_at("write", &file, b"abcde", 5).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(disk.len("len", &file).unwrap(), 8);

        disk.fail("len", 1, Failure::Crash);
        assert!(disk.len("len", &file).is_err() && disk.crashed());
        assert!(disk.write_all_at("write", &file, b"x", 0).is_err());
        disk.heal();
        assert_eq!(disk.len("len", &file).unwrap(), 8);
        assert_eq!(disk.steps()[0], ("len", 3));
    }

    #[test]
    fn crash_at_names_a_step_and_a_count() {
        assert_eq!(parse_crash_at("log.append"), ("log.append", 1));
        assert_eq!(parse_crash_at("log.append:3"), ("log.append", 3));
        assert_eq!(parse_crash_at("log.seal:rename"), ("log.seal:rename", 1));
        assert_eq!(parse_crash_at("log.seal:rename:2"), ("log.seal:rename", 2));
    }

    #[test]
    fn crash_at_kills_the_process_just_before_the_step() {
        if let Ok(path) = std::env::var("LITEFS_TEST_CRASH_FILE") {
            let file = RealDisk
                .open("open", Path::new(&path), OpenMode::Create)
                .unwrap();
            for i in 0..5 {
                RealDisk.write_all_at("t:write", &file, b"x", i).unwrap();
            }
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "disk::tests::crash_at_kills_the_process_just_before_the_step",
            ])
            .env("LITEFS_TEST_CRASH_FILE", &path)
            .env("LITEFS_CRASH_AT", "t:write:3")
            .output()
            .unwrap()
            .status;
        assert_eq!(status.signal(), Some(libc::SIGKILL));
        assert_eq!(RealDisk.read_file("t", &path).unwrap(), b"xx");
    }
}
