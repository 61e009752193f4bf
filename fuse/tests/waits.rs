//! A mount stays usable while more programs than it has threads wait for other nodes.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use fuse::{
    Caller, Errno, Flow, MountOptions, Op, OpenAnswer, OpenRequest, Serve, VirtualFile, Volume,
};
use parking_lot::{Condvar, Mutex};

const PATIENCE: Duration = Duration::from_secs(20);
/// More than there are threads.
const WAITING: usize = 6;

/// What is done to files named `held` waits until it is allowed.
#[derive(Default)]
struct Holding {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: usize,
    is_allowed: bool,
}

impl Holding {
    fn wait_until(&self, is_so: impl Fn(&State) -> bool) -> bool {
        let mut state = self.state.lock();
        let not_so = |state: &mut State| !is_so(state);
        !self
            .changed
            .wait_while_for(&mut state, not_so, PATIENCE)
            .timed_out()
    }

    fn allow(&self) {
        self.state.lock().is_allowed = true;
        self.changed.notify_all();
    }
}

fn is_held(path: &Path) -> bool {
    path.to_string_lossy().starts_with("held")
}

impl Volume for Holding {
    fn virtual_file(&self, _path: &Path) -> Option<VirtualFile> {
        None
    }
    fn is_virtual_name(&self, _path: &Path) -> bool {
        false
    }
    fn virtual_names(&self, _dir: &Path) -> Vec<OsString> {
        Vec::new()
    }
    fn open_may_block(&self, _request: &OpenRequest<'_>) -> bool {
        false
    }
    fn open(&self, _request: &OpenRequest<'_>) -> Result<OpenAnswer, Errno> {
        let serve = Serve::Direct;
        Ok(OpenAnswer { serve, mark: 0 })
    }
    fn released(&self, _path: &Path, _writable: bool, _mark: u8) {}
    fn may_wait(&self, path: &Path) -> bool {
        is_held(path)
    }
    fn before(&self, op: &Op<'_>, _caller: Caller) -> Result<Flow, Errno> {
        if let Op::Write { path, .. } | Op::Truncate { path, .. } | Op::Unlink { path } = op
            && is_held(path)
        {
            self.state.lock().waiting += 1;
            self.changed.notify_all();
            self.wait_until(|state| state.is_allowed);
        }
        Ok(Flow::Proceed)
    }
    fn after(&self, _op: &Op<'_>, _caller: Caller) {}
}

#[test]
fn others_are_served_while_many_wait() {
    // SAFETY: reads process state only.
    if unsafe { libc::geteuid() } != 0 || !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: mounting needs root and /dev/fuse");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (backing, mount_point) = (dir.path().join("backing"), dir.path().join("mnt"));
    std::fs::create_dir(&backing).unwrap();
    std::fs::create_dir(&mount_point).unwrap();
    let volume = Arc::new(Holding::default());
    let mounted = fuse::mount(
        volume.clone(),
        &MountOptions {
            mount_point: mount_point.clone(),
            backing: backing.clone(),
            allow_other: false,
            passthrough: false,
            threads: 4,
        },
    )
    .unwrap();
    let (ended, ends) = mpsc::channel();
    let mut programs = Vec::new();
    for n in 0..WAITING {
        // Each in a directory of its own: the kernel locks that of a file while it is removed.
        let path = mount_point.join(format!("held{n}/file"));
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        let mut file = File::create(&path).unwrap();
        let ended = ended.clone();
        programs.push(std::thread::spawn(move || {
            let done = match n % 3 {
                0 => file.write_all(b"x"),
                1 => file.set_len(100),
                _ => std::fs::remove_file(&path),
            };
            ended.send((n, done)).unwrap();
        }));
    }
    let all_wait = volume.wait_until(|state| state.waiting >= WAITING);
    // All of them are under way, none can end.
    let (served, serving) = mpsc::channel();
    let path = mount_point.join("other");
    let other = std::thread::spawn(move || {
        let made = OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(b"other"));
        served.send(made).unwrap();
    });
    let is_served = serving.recv_timeout(PATIENCE / 4);
    let early = ends.try_recv();
    volume.allow();
    for program in programs {
        program.join().unwrap();
    }
    other.join().unwrap();
    mounted.unmount().unwrap();
    assert!(all_wait, "not all came to wait");
    assert!(early.is_err(), "one did not wait: {early:?}");
    assert!(
        matches!(is_served, Ok(Ok(()))),
        "another program was not served: {is_served:?}"
    );
    for (n, done) in ends.try_iter() {
        done.unwrap_or_else(|e| panic!("program {n}: {e}"));
    }
    assert_eq!(std::fs::read(backing.join("held0/file")).unwrap()[0], b'x');
    let cut = std::fs::metadata(backing.join("held1/file")).unwrap();
    assert_eq!(cut.len(), 100);
    assert!(!backing.join("held2/file").exists());
    assert_eq!(std::fs::read(backing.join("other")).unwrap(), b"other");
}
