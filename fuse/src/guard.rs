//! Ends a connection whose daemon was killed.
//!
//! A daemon that opens files in its own mount may be killed while one of its threads waits for another. The kernel does
//! not interrupt a request that a daemon has taken, and closes the daemon's descriptors only when its last thread is
//! gone: both would wait for ever, and every program in the mount with them. So a small process watches the daemon and
//! aborts the connection, which is what the kernel does for a daemon that ends whole.

use std::ffi::{CStr, CString};
use std::io;
use std::ptr;

/// The process that watches; ends when dropped.
#[derive(Debug)]
pub struct Guard {
    pid: libc::pid_t,
}

impl Guard {
    /// Watches the calling thread, which must live as long as the daemon: its main thread.
    ///
    /// `connection` is the minor number of the mount's device.
    ///
    /// # Errors
    /// When no process can be made.
    pub fn start(connection: u32) -> io::Result<Guard> {
        let file = abort_file(connection);
        // SAFETY: `getpid` has no conditions; the child calls nothing but system calls until it ends.
        let parent = unsafe { libc::getpid() };
        // SAFETY: as above.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // SAFETY: we are the only thread of a new process.
                unsafe { watch(parent, &file) }
            }
            pid => Ok(Guard { pid }),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // SAFETY: the child is ours and not yet waited for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, ptr::null_mut(), 0);
        }
    }
}

/// Aborts a connection: all its requests fail, and its mount answers `ENOTCONN` from now on.
///
/// # Errors
/// When no process can be made for it.
pub fn abort_connection(connection: u32) -> io::Result<()> {
    let file = abort_file(connection);
    // SAFETY: the child calls nothing but system calls until it ends.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: we are the only thread of a new process.
            unsafe { abort(&file) }
        }
        pid => {
            // SAFETY: the child is ours.
            unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
            Ok(())
        }
    }
}

const CONTROL_LEN: usize = "/sys/fs/fuse/connections/".len();
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

fn abort_file(connection: u32) -> CString {
    // No NUL can be in it.
    CString::new(format!("/sys/fs/fuse/connections/{connection}/abort")).unwrap_or_default()
}

/// # Safety
/// In a process of its own.
unsafe fn watch(parent: libc::pid_t, file: &CStr) -> ! {
    // SAFETY: system calls with arguments that live through them.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, ptr::null_mut());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR1, 0, 0, 0);
        libc::prctl(libc::PR_SET_NAME, c"litefs-guard".as_ptr(), 0, 0, 0);
        // The daemon's descriptors would keep the connection.
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
        let mut death = std::mem::zeroed();
        libc::sigemptyset(&raw mut death);
        libc::sigaddset(&raw mut death, libc::SIGUSR1);
        let mut signal = 0;
        while libc::getppid() == parent && signal != libc::SIGUSR1 {
            libc::sigwait(&raw const death, &raw mut signal);
        }
        abort(file)
    }
}

/// # Safety
/// In a process of its own.
unsafe fn abort(file: &CStr) -> ! {
    // SAFETY: system calls with arguments that live through them.
    unsafe {
        if !write_one(libc::AT_FDCWD, file) {
            // The control file system is not mounted here: it is opened without a place.
            let context = libc::syscall(libc::SYS_fsopen, c"fusectl".as_ptr(), 0);
            let none = ptr::null::<libc::c_void>();
            libc::syscall(
                libc::SYS_fsconfig,
                context,
                FSCONFIG_CMD_CREATE,
                none,
                none,
                0,
            );
            let root = libc::syscall(libc::SYS_fsmount, context, 0, 0);
            let relative = file.to_bytes_with_nul().get(CONTROL_LEN..);
            if let Ok(root) = libc::c_int::try_from(root)
                && let Some(Ok(relative)) = relative.map(CStr::from_bytes_with_nul)
            {
                write_one(root, relative);
            }
        }
        libc::_exit(0)
    }
}

/// # Safety
/// None but that of system calls.
unsafe fn write_one(dir: libc::c_int, file: &CStr) -> bool {
    // SAFETY: `file` is NUL-terminated.
    unsafe {
        let fd = libc::openat(dir, file.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return false;
        }
        let done = libc::write(fd, c"1".as_ptr().cast(), 1) == 1;
        libc::close(fd);
        done
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        Caller, Flow, MountOptions, Op, OpenAnswer, OpenRequest, Serve, VirtualFile, Volume,
    };

    struct Plain;

    impl Volume for Plain {
        fn virtual_file(&self, _path: &std::path::Path) -> Option<VirtualFile> {
            None
        }
        fn is_virtual_name(&self, _path: &std::path::Path) -> bool {
            false
        }
        fn virtual_names(&self, _dir: &std::path::Path) -> Vec<std::ffi::OsString> {
            Vec::new()
        }
        fn open_may_block(&self, _request: &OpenRequest<'_>) -> bool {
            false
        }
        fn open(&self, _request: &OpenRequest<'_>) -> Result<OpenAnswer, crate::Errno> {
            Ok(OpenAnswer {
                serve: Serve::Cached,
                mark: 0,
            })
        }
        fn released(&self, _path: &std::path::Path, _writable: bool, _mark: u8) {}
        fn before(&self, _op: &Op<'_>, _caller: Caller) -> Result<Flow, crate::Errno> {
            Ok(Flow::Proceed)
        }
        fn after(&self, _op: &Op<'_>, _caller: Caller) {}
    }

    #[test]
    fn an_aborted_connection_answers_not_connected() {
        // SAFETY: no conditions.
        if unsafe { libc::geteuid() } != 0 || !std::path::Path::new("/dev/fuse").exists() {
            eprintln!("skipped: mounting needs root and /dev/fuse");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (backing, mount_point) = (dir.path().join("b"), dir.path().join("m"));
        std::fs::create_dir_all(&backing).unwrap();
        std::fs::create_dir_all(&mount_point).unwrap();
        let options = MountOptions {
            mount_point: mount_point.clone(),
            backing,
            allow_other: false,
            passthrough: false,
            threads: 2,
        };
        let mounted = crate::mount(Arc::new(Plain), &options).unwrap();
        std::fs::write(mount_point.join("f"), "x").unwrap();
        let device = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(&mount_point).unwrap());
        abort_connection(libc::minor(device)).unwrap();
        let error = std::fs::read(mount_point.join("g")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN), "{error}");
        let _ = mounted.unmount(true);
        crate::clean_stale_mount(&mount_point).unwrap();
    }
}
