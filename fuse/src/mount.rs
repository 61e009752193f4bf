//! Mounts and unmounts, and cleans up after a daemon that was killed.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{IFlags, Mode, OFlags};
use rustix::mount::OpenTreeFlags;

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};

use crate::mirror::MirrorFs;
use crate::notify::Invalidator;
use crate::volume::Volume;

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Where the mount appears.
    pub mount_point: PathBuf,
    /// The directory that it shows.
    pub backing: PathBuf,
    /// Whether users other than the daemon's may use it.
    pub allow_other: bool,
    /// Whether to ask the kernel for passthrough.
    pub passthrough: bool,
    /// Session threads, 2 or more.
    pub threads: usize,
}

/// A live mount; dropping it unmounts.
#[derive(Debug)]
pub struct Mounted {
    session: Option<BackgroundSession>,
    mount_point: PathBuf,
    invalidator: Invalidator,
    passthrough: bool,
}

/// Mounts `options.backing` at `options.mount_point` on behalf of a volume.
///
/// # Errors
/// Whatever the kernel or the mount helper says, with the mount point named.
pub fn mount<V: Volume>(volume: Arc<V>, options: &MountOptions) -> io::Result<Mounted> {
    let thread_count = options.threads.max(2);
    let fs = MirrorFs::new(volume, &options.backing, options.passthrough, thread_count)?;
    let invalidator = fs.invalidator();
    let state = fs.state();
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("litefs".into()),
        MountOption::Subtype("litefs".into()),
    ];
    if options.allow_other {
        // Where only the daemon's own user gets in, the backing files say what it may: the kernel would only ask for
        // the attributes of directories again after each change.
        config.mount_options.push(MountOption::DefaultPermissions);
    }
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(thread_count);
    let session = Session::new(fs, &options.mount_point, &config).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("mount {}: {e}", options.mount_point.display()),
        )
    })?;
    let session = session.spawn()?;
    *invalidator.notifier.write() = Some(session.notifier());
    Ok(Mounted {
        session: Some(session),
        mount_point: options.mount_point.clone(),
        invalidator,
        passthrough: state.passthrough_negotiated(),
    })
}

impl Mounted {
    /// Returns the handle for invalidations.
    #[must_use]
    pub fn invalidator(&self) -> Invalidator {
        self.invalidator.clone()
    }

    /// Returns whether the kernel agreed to passthrough.
    #[must_use]
    pub fn passthrough(&self) -> bool {
        self.passthrough
    }

    /// Unmounts; a mount that is still in use is detached, so that it goes with its last user. Returns whether nobody
    /// uses it.
    ///
    /// # Errors
    /// When the kernel refuses even to detach it.
    pub fn unmount(mut self) -> io::Result<bool> {
        self.unmount_in_place()
    }

    fn unmount_in_place(&mut self) -> io::Result<bool> {
        let Some(session) = self.session.take() else {
            return Ok(true);
        };
        *self.invalidator.notifier.write() = None;
        match umount(&self.mount_point, 0) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                tracing::warn!(mount = %self.mount_point.display(), "mount is in use, detaching it");
                umount(&self.mount_point, libc::MNT_DETACH)?;
                // Its users keep the session alive; the process ends it.
                return Ok(false);
            }
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                if let Err(error) = fusermount("-u", &self.mount_point) {
                    tracing::warn!(mount = %self.mount_point.display(), %error, "mount is in use, detaching it");
                    // Its users keep the session alive; the process ends it.
                    return fusermount("-uz", &self.mount_point).map(|()| false);
                }
            }
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {} // someone else unmounted it
            Err(e) => return Err(e),
        }
        drop(session);
        Ok(true)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.unmount_in_place() {
            tracing::error!(mount = %self.mount_point.display(), %error, "cannot unmount");
        }
    }
}

/// Returns whether a live or dead FUSE mount stands at a path.
///
/// # Errors
/// When the mount table cannot be read.
pub fn is_mounted(path: &Path) -> io::Result<bool> {
    let path = std::path::absolute(path)?;
    let table = std::fs::read_to_string("/proc/self/mounts")?;
    Ok(table.lines().any(|line| {
        let mut fields = line.split(' ');
        let (Some(_), Some(at), Some(kind)) = (fields.next(), fields.next(), fields.next()) else {
            return false;
        };
        kind.starts_with("fuse") && Path::new(&unescape(at)) == path
    }))
}

/// Returns whether the mount of a killed daemon stands at a path: whatever is asked there fails.
///
/// # Errors
/// When a live file system is mounted there, or the mount table cannot be read.
pub fn is_stale_mount(path: &Path) -> io::Result<bool> {
    if !is_mounted(path)? {
        return Ok(false);
    }
    // Attributes may be answered from the kernel's cache; this is always asked of the daemon.
    match rustix::fs::statfs(path).map_err(io::Error::from) {
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::ENOTCONN | libc::ECONNABORTED | libc::EIO)
            ) =>
        {
            Ok(true)
        }
        _ => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!(
                "{} is already a live mount; stop the process that serves it",
                path.display()
            ),
        )),
    }
}

/// Removes the mount that a killed daemon left at a path. Returns whether there was one.
///
/// # Errors
/// As [`is_stale_mount`], or the kernel refuses.
pub fn clean_stale_mount(path: &Path) -> io::Result<bool> {
    let mut found = false;
    while is_stale_mount(path)? {
        match umount(path, libc::MNT_DETACH) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => fusermount("-uz", path)?,
            other => other?,
        }
        found = true;
    }
    Ok(found)
}

/// Keeps programs from making files in the directory that a mount covers, while there is no mount, until dropped.
///
/// Who opens a database there would find none, make one, and lose it below the next mount.
#[derive(Debug)]
pub struct BareDir(Option<File>);

impl BareDir {
    /// Makes the directory immutable, whatever is mounted on it. Where that cannot be done (not root, or a file system
    /// without such a flag), or is so already, nothing is changed.
    #[must_use]
    pub fn hold(path: &Path) -> BareDir {
        let held = Self::open(path).and_then(|dir| {
            let flags = rustix::fs::ioctl_getflags(&dir)?;
            if flags.contains(IFlags::IMMUTABLE) {
                return Ok(None);
            }
            rustix::fs::ioctl_setflags(&dir, flags | IFlags::IMMUTABLE)?;
            Ok(Some(dir))
        });
        BareDir(held.unwrap_or_else(|error| {
            tracing::debug!(path = %path.display(), %error, "cannot keep programs out of the bare mount point");
            None
        }))
    }

    fn open(path: &Path) -> io::Result<File> {
        let path = std::path::absolute(path)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // A copy of the parent's mount without those in it.
        let tree = rustix::mount::open_tree(
            rustix::fs::CWD,
            parent,
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )?;
        let how = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&tree, name, how, Mode::empty())?.into())
    }
}

impl Drop for BareDir {
    fn drop(&mut self) {
        let Some(dir) = self.0.take() else { return };
        let cleared = rustix::fs::ioctl_getflags(&dir)
            .and_then(|flags| rustix::fs::ioctl_setflags(&dir, flags - IFlags::IMMUTABLE));
        if let Err(error) = cleared {
            tracing::warn!(%error, "the directory below the mount stays immutable; chattr -i it before you remove it");
        }
    }
}

fn umount(path: &Path, flags: i32) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is a NUL-terminated string that lives through the call.
    if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Unmounts as a user who may not do so directly.
fn fusermount(how: &str, path: &Path) -> io::Result<()> {
    let out = std::process::Command::new("fusermount3")
        .arg(how)
        .arg(path)
        .output()
        .map_err(|e| io::Error::new(e.kind(), format!("run fusermount3: {e}")))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(said.trim().to_owned()))
}

/// Undoes the octal escapes of the mount table.
fn unescape(s: &str) -> String {
    s.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}
