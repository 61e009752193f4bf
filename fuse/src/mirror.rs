//! The file system itself: a mirror of a backing directory that asks its [`Volume`] before it acts.

mod requests;

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BackingId, Errno, FileAttr, FileHandle, FileType, FopenFlags, INodeNo, ReplyOpen, Request,
    TimeOrNow,
};
use parking_lot::RwLock;

use crate::attr;
use crate::inode::{Inodes, Moved, Node, OpenState};
use crate::notify::Invalidator;
use crate::volume::{Caller, Flow, Op, OpenRequest, Serve, Volume};

/// How long the kernel may keep names and attributes; we tell it of every change that it does not make itself.
const KEEP: Duration = Duration::from_secs(3600);
const NO_KEEP: Duration = Duration::ZERO;

pub(crate) struct MirrorFs<V: Volume> {
    shared: Arc<Shared<V>>,
}

/// What session threads and the threads of blocking opens share.
pub(crate) struct Shared<V: Volume> {
    volume: Arc<V>,
    root: Arc<OwnedFd>,
    inodes: Arc<Inodes>,
    want_passthrough: bool,
    passthrough: AtomicBool,
    is_root: bool,
    umask: u32,
    /// How many more session threads may wait for other nodes.
    spare_threads: AtomicUsize,
}

/// Session threads that never wait for other nodes.
const KEPT_THREADS: usize = 2;

/// Lets the mount ask what the handshake agreed on.
pub(crate) trait State {
    fn passthrough_negotiated(&self) -> bool;
}

impl<V: Volume> State for Shared<V> {
    fn passthrough_negotiated(&self) -> bool {
        self.passthrough.load(Ordering::Relaxed)
    }
}

type Res<T> = Result<T, Errno>;

fn os(e: &io::Error) -> Errno {
    Errno::from_i32(e.raw_os_error().unwrap_or(libc::EIO))
}

fn last() -> Errno {
    os(&io::Error::last_os_error())
}

fn check(r: libc::c_int) -> Res<libc::c_int> {
    if r < 0 { Err(last()) } else { Ok(r) }
}

fn cstr(path: &Path) -> Res<CString> {
    let bytes = path.as_os_str().as_bytes();
    CString::new(if bytes.is_empty() { b"." } else { bytes }).map_err(|_| Errno::EINVAL)
}

fn caller(req: &Request) -> Caller {
    Caller {
        uid: req.uid(),
        gid: req.gid(),
        pid: req.pid(),
    }
}

fn writable(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

impl<V: Volume> MirrorFs<V> {
    pub(crate) fn new(
        volume: Arc<V>,
        backing: &Path,
        want_passthrough: bool,
        thread_count: usize,
    ) -> io::Result<MirrorFs<V>> {
        let root: OwnedFd = File::open(backing)
            .map_err(|e| io::Error::new(e.kind(), format!("open {}: {e}", backing.display())))?
            .into();
        let st = fstat(root.as_raw_fd()).map_err(|e| io::Error::from_raw_os_error(e.code()))?;
        // SAFETY: geteuid and umask only read and set process state; the umask is set back at once.
        let (is_root, umask) = unsafe {
            let mask = libc::umask(0o022);
            libc::umask(mask);
            (libc::geteuid() == 0, mask)
        };
        Ok(MirrorFs {
            shared: Arc::new(Shared {
                volume,
                root: Arc::new(root),
                inodes: Arc::new(Inodes::new(attr::key(&st))),
                want_passthrough,
                passthrough: AtomicBool::new(false),
                is_root,
                umask,
                spare_threads: AtomicUsize::new(thread_count.saturating_sub(KEPT_THREADS)),
            }),
        })
    }

    pub(crate) fn invalidator(&self) -> Invalidator {
        Invalidator {
            inodes: self.shared.inodes.clone(),
            root: self.shared.root.clone(),
            notifier: Arc::new(RwLock::new(None)),
        }
    }

    pub(crate) fn state(&self) -> Arc<dyn State> {
        self.shared.clone()
    }
}

impl<V: Volume> Shared<V> {
    fn node(&self, ino: INodeNo) -> Res<Arc<Node>> {
        self.inodes.get(ino.0).ok_or(Errno::ESTALE)
    }

    fn stat_path(&self, path: &Path) -> Res<libc::stat> {
        stat_at(self.root.as_raw_fd(), path)
    }

    fn stat_node(&self, node: &Node) -> Res<libc::stat> {
        match node.open_file() {
            Some(file) => fstat(file.as_raw_fd()),
            None => {
                let st = self.stat_path(&self.reach(node)?)?;
                self.same_file(node, &st)?;
                Ok(st)
            }
        }
    }

    /// Returns a name by which a file can be reached. `ESTALE` if another file has taken it, which makes the kernel look
    /// the name up anew and try once more; `ENOENT` if none has.
    fn reach(&self, node: &Node) -> Res<PathBuf> {
        if let Some(path) = node.live_path() {
            return Ok(path);
        }
        self.stat_path(&node.path())?;
        Err(Errno::ESTALE)
    }

    /// Refuses a file that has taken the name of a node's.
    fn same_file(&self, node: &Node, st: &libc::stat) -> Res<()> {
        if node.key.is_some_and(|key| key != attr::key(st)) {
            return Err(Errno::ESTALE);
        }
        Ok(())
    }

    fn virtual_attr(&self, node: &Node) -> Res<FileAttr> {
        let file = self
            .volume
            .virtual_file(&node.path())
            .ok_or(Errno::ENOENT)?;
        Ok(attr::of_virtual(
            node.ino,
            file.data.len() as u64,
            file.mtime,
        ))
    }

    /// Finds a name, counting one lookup: the entry, and how long the kernel may keep it.
    fn lookup(&self, parent: INodeNo, name: &OsStr) -> Res<(FileAttr, Duration)> {
        let path = self.node(parent)?.child(name);
        if self.volume.is_virtual_name(&path) {
            return match self.volume.virtual_file(&path) {
                Some(file) => {
                    let node = self.inodes.intern_virtual(&path);
                    Ok((
                        attr::of_virtual(node.ino, file.data.len() as u64, file.mtime),
                        NO_KEEP,
                    ))
                }
                None => Ok((attr::negative(), NO_KEEP)),
            };
        }
        match self.stat_path(&path) {
            Ok(st) => Ok((
                attr::from_stat(
                    self.inodes.intern(attr::key(&st), &path, st.st_nlink).ino,
                    &st,
                ),
                KEEP,
            )),
            Err(e) if e.code() == libc::ENOENT => {
                let keep = if self.volume.may_appear(&path) {
                    NO_KEEP
                } else {
                    KEEP
                };
                Ok((attr::negative(), keep))
            }
            Err(e) => Err(e),
        }
    }

    /// Interns what was just made at a path.
    fn made(&self, path: &Path) -> Res<FileAttr> {
        let st = self.stat_path(path)?;
        Ok(attr::from_stat(
            self.inodes.intern(attr::key(&st), path, st.st_nlink).ino,
            &st,
        ))
    }

    fn refuse_virtual(&self, path: &Path) -> Res<()> {
        if self.volume.is_virtual_name(path) {
            Err(Errno::EPERM)
        } else {
            Ok(())
        }
    }

    /// Gives a new file or directory to whoever asked for it, as a file system would.
    fn give(&self, path: &Path, mode: u32, caller: Caller, is_link: bool) -> Res<()> {
        let c = cstr(path)?;
        let root = self.root.as_raw_fd();
        // What a directory with the setgid bit hands down is there already.
        let parent = self.stat_path(path.parent().unwrap_or(Path::new("")))?;
        let inherits = parent.st_mode & libc::S_ISGID != 0;
        if self.is_root && (caller.uid, caller.gid) != (0, 0) {
            let gid = if inherits { u32::MAX } else { caller.gid };
            // SAFETY: `c` is NUL-terminated and lives through the call.
            check(unsafe {
                libc::fchownat(root, c.as_ptr(), caller.uid, gid, libc::AT_SYMLINK_NOFOLLOW)
            })?;
        }
        if !is_link && mode & self.umask != 0 {
            let made = self.stat_path(path)?;
            let inherited = if is_dir(&made) {
                made.st_mode & libc::S_ISGID
            } else {
                0
            };
            let mode = (mode & 0o7777) | inherited;
            // SAFETY: as above.
            check(unsafe { libc::fchmodat(root, c.as_ptr(), mode, 0) })?;
        }
        Ok(())
    }

    fn open_backing_file(&self, path: &Path, flags: i32, mode: u32) -> Res<File> {
        let c = cstr(path)?;
        // SAFETY: `c` is NUL-terminated and lives through the call; the descriptor is ours alone.
        unsafe {
            let fd = check(libc::openat(
                self.root.as_raw_fd(),
                c.as_ptr(),
                flags | libc::O_CLOEXEC | libc::O_NOFOLLOW,
                mode,
            ))?;
            Ok(File::from_raw_fd(fd))
        }
    }

    /// Puts the inode's shared file in place, writable if asked for.
    fn ensure_file(&self, node: &Node, state: &mut OpenState, want_write: bool) -> Res<()> {
        if state.file.is_some() && (state.file_writable || !want_write) {
            return Ok(());
        }
        let path = self.reach(node)?;
        let (file, file_writable) = match self.open_backing_file(&path, libc::O_RDWR, 0) {
            Ok(file) => (file, true),
            Err(e) if want_write => return Err(e),
            Err(_) => (self.open_backing_file(&path, libc::O_RDONLY, 0)?, false),
        };
        self.same_file(node, &fstat(file.as_raw_fd())?)?;
        Self::put_file(state, file, file_writable);
        Ok(())
    }

    fn put_file(state: &mut OpenState, file: File, is_writable: bool) {
        // A reader of pages asks for thousands in a row, and each would look at the clock.
        // SAFETY: changes a flag of our own descriptor; refused to who does not own the file, and then nothing is lost.
        let _ = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NOATIME) };
        state.file = Some(Arc::new(file));
        state.file_writable = is_writable;
    }

    /// Checks an open where the kernel does not: what is open already may have been opened before the mode changed.
    fn check_access(&self, node: &Node, request: &OpenRequest<'_>, flags: i32) -> Res<()> {
        if self.is_root || node.open_file().is_none() {
            return Ok(());
        }
        let path = cstr(request.path)?;
        let mode = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => libc::R_OK,
            libc::O_WRONLY => libc::W_OK,
            _ => libc::R_OK | libc::W_OK,
        };
        // SAFETY: the string is NUL-terminated and lives through the call.
        let may = unsafe {
            libc::faccessat(self.root.as_raw_fd(), path.as_ptr(), mode, libc::AT_EACCESS)
        };
        check(may).map(|_| ())
    }

    /// Adds a handle to an inode: decides how it is served, within INV-FUSE-1.
    fn add_handle(
        &self,
        node: &Node,
        wanted: Serve,
        want_write: bool,
        register: impl FnOnce(&File) -> io::Result<BackingId>,
    ) -> Res<(FopenFlags, Option<Arc<BackingId>>)> {
        let mut state = node.open.lock();
        if state.handle_count == 0 {
            // Whatever an earlier life of the inode left behind is void.
            state.serve = None;
            state.backing = None;
        }
        self.ensure_file(node, &mut state, want_write)?;
        if state.serve.is_none() {
            let mut serve = wanted;
            if serve == Serve::Passthrough {
                let file = state.file.clone().ok_or(Errno::EIO)?;
                match self
                    .passthrough
                    .load(Ordering::Relaxed)
                    .then(|| register(&file))
                {
                    Some(Ok(id)) => state.backing = Some(Arc::new(id)),
                    Some(Err(error)) => {
                        tracing::debug!(path = %node.path().display(), %error, "passthrough refused, serving from user space");
                        self.volume.passthrough_refused();
                        serve = Serve::Cached;
                    }
                    None => serve = Serve::Cached,
                }
            }
            state.serve = Some(serve);
        }
        state.handle_count += 1;
        let flags = match state.serve {
            Some(Serve::Passthrough) => FopenFlags::empty(),
            Some(Serve::Direct) => FopenFlags::FOPEN_DIRECT_IO,
            _ => FopenFlags::FOPEN_KEEP_CACHE,
        };
        Ok((flags, state.backing.clone()))
    }

    fn drop_handle(&self, node: &Node) {
        let mut state = node.open.lock();
        state.handle_count = state.handle_count.saturating_sub(1);
        if state.handle_count == 0 {
            *state = OpenState::default();
        }
    }

    fn open_virtual(&self, node: &Node, flags: i32) -> Res<()> {
        if writable(flags) {
            return Err(Errno::EACCES);
        }
        let mut state = node.open.lock();
        state.handle_count += 1;
        Ok(())
    }

    fn open_now(&self, node: &Node, request: &OpenRequest<'_>, reply: ReplyOpen) {
        let answer = match self.volume.open(request) {
            Ok(answer) => answer,
            Err(e) => return reply.error(e),
        };
        match self.add_handle(node, answer.serve, request.writable, |f| {
            reply.open_backing(f)
        }) {
            Ok((flags, Some(id))) => reply.opened_passthrough(handle(answer.mark), flags, &id),
            Ok((flags, None)) => reply.opened(handle(answer.mark), flags),
            Err(e) => {
                self.volume
                    .released(request.path, request.writable, answer.mark);
                reply.error(e);
            }
        }
    }

    /// Does what may wait for other nodes: on this thread if enough are left that serve the mount, else on one of its own.
    fn do_waiting(self: &Arc<Self>, job: impl FnOnce(&Shared<V>) + Send + 'static) {
        let (take, give) = (Ordering::Acquire, Ordering::Release);
        let is_spare = self
            .spare_threads
            .fetch_update(take, take, |n| n.checked_sub(1))
            .is_ok();
        if is_spare {
            job(self);
            self.spare_threads.fetch_add(1, give);
        } else {
            let shared = self.clone();
            std::thread::spawn(move || job(&shared));
        }
    }

    fn write(&self, node: &Node, offset: u64, data: &[u8], caller: Caller) -> Res<u32> {
        let file = node.open_file().ok_or(Errno::EBADF)?;
        let path = node.path();
        let op = Op::Write {
            path: &path,
            file: &file,
            offset,
            data,
        };
        self.volume.before(&op, caller)?;
        let write = || {
            let mut done = 0;
            while done < data.len() {
                match file.write_at(&data[done..], offset + done as u64) {
                    Ok(n) => done += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) if done > 0 => break,
                    Err(e) => return Err(os(&e)),
                }
            }
            Ok(done)
        };
        let written = write();
        let is_whole = written.as_ref().is_ok_and(|n| *n == data.len());
        if let Some(errno) = (!is_whole).then(|| self.volume.failed(&op)).flatten() {
            return Err(errno);
        }
        let written = written?;
        self.volume.after(&op, caller);
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    fn with_before<T>(&self, op: &Op<'_>, caller: Caller, act: impl FnOnce() -> Res<T>) -> Res<T> {
        // Only a truncation can be done by the volume; see `set_attributes`.
        self.volume.before(op, caller)?;
        let result = act().map_err(|e| self.volume.failed(op).unwrap_or(e))?;
        self.volume.after(op, caller);
        Ok(result)
    }

    fn unlink(&self, path: &Path, caller: Caller, flags: i32) -> Res<()> {
        self.refuse_virtual(path)?;
        let st = self.stat_path(path)?;
        let op = if flags == 0 {
            Op::Unlink { path }
        } else {
            Op::Rmdir { path }
        };
        self.with_before(&op, caller, || {
            let c = cstr(path)?;
            // SAFETY: `c` is NUL-terminated and lives through the call.
            check(unsafe { libc::unlinkat(self.root.as_raw_fd(), c.as_ptr(), flags) })?;
            self.name_is_gone(&st, path);
            Ok(())
        })
    }

    /// Learns that a name no longer leads to a file that was as `st` says.
    fn name_is_gone(&self, st: &libc::stat, path: &Path) {
        let key = attr::key(st);
        if st.st_nlink <= 1 || is_dir(st) {
            return self.inodes.orphan(key);
        }
        self.inodes.lost_name(key, path, |other| {
            self.stat_path(other).is_ok_and(|st| attr::key(&st) == key)
        });
    }

    fn rename(&self, from: &Path, to: &Path, flags: u32, caller: Caller) -> Res<()> {
        self.refuse_virtual(from)?;
        self.refuse_virtual(to)?;
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let replaced = self.stat_path(to).ok();
        let moved = self.stat_path(from)?;
        self.with_before(&Op::Rename { from, to, exchange }, caller, || {
            let (a, b) = (cstr(from)?, cstr(to)?);
            let root = self.root.as_raw_fd();
            // SAFETY: both strings are NUL-terminated and live through the call.
            check(unsafe { libc::renameat2(root, a.as_ptr(), root, b.as_ptr(), flags) })?;
            match replaced {
                Some(other) if exchange => {
                    let (a, b) = (moved_file(&moved), moved_file(&other));
                    self.inodes.exchanged((&a, from), (&b, to));
                    return Ok(());
                }
                Some(other) if attr::key(&other) != attr::key(&moved) => {
                    self.name_is_gone(&other, to);
                }
                _ => {}
            }
            self.inodes.renamed(&moved_file(&moved), from, to);
            Ok(())
        })
    }

    fn set_attributes(&self, node: &Node, c: &Change, caller: Caller) -> Res<FileAttr> {
        if node.is_virtual {
            return Err(Errno::EPERM);
        }
        let path = node.path();
        let open = node.open_file();
        let name = cstr(&path)?;
        let root = self.root.as_raw_fd();
        if c.mode.is_some() || c.uid.is_some() || c.gid.is_some() {
            let (uid, gid) = (c.uid.unwrap_or(u32::MAX), c.gid.unwrap_or(u32::MAX));
            if uid != u32::MAX || gid != u32::MAX {
                // SAFETY: the string is NUL-terminated and lives through the call, the descriptor is open.
                check(unsafe {
                    match &open {
                        Some(f) => libc::fchown(f.as_raw_fd(), uid, gid),
                        None => {
                            libc::fchownat(root, name.as_ptr(), uid, gid, libc::AT_SYMLINK_NOFOLLOW)
                        }
                    }
                })?;
            }
            if let Some(mode) = c.mode {
                // SAFETY: as above.
                check(unsafe {
                    match &open {
                        Some(f) => libc::fchmod(f.as_raw_fd(), mode & 0o7777),
                        None => libc::fchmodat(root, name.as_ptr(), mode & 0o7777, 0),
                    }
                })?;
            }
        }
        if let Some(size) = c.size {
            let op = Op::Truncate { path: &path, size };
            if self.volume.before(&op, caller)? == Flow::Proceed {
                let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
                let file = match &open {
                    Some(f) if node.open.lock().file_writable => f.clone(),
                    _ => Arc::new(self.open_backing_file(&path, libc::O_WRONLY, 0)?),
                };
                // SAFETY: the descriptor is open.
                let cut = check(unsafe { libc::ftruncate(file.as_raw_fd(), size) });
                cut.map_err(|e| self.volume.failed(&op).unwrap_or(e))?;
            }
            self.volume.after(&op, caller);
        }
        if c.atime.is_some() || c.mtime.is_some() {
            let times = [timespec(c.atime), timespec(c.mtime)];
            // SAFETY: the array has two elements, the string is NUL-terminated, both live through the call.
            check(unsafe {
                match &open {
                    Some(f) => libc::futimens(f.as_raw_fd(), times.as_ptr()),
                    None => libc::utimensat(
                        root,
                        name.as_ptr(),
                        times.as_ptr(),
                        libc::AT_SYMLINK_NOFOLLOW,
                    ),
                }
            })?;
        }
        Ok(attr::from_stat(node.ino, &self.stat_node(node)?))
    }

    /// Lists a directory from a cookie on, until `add` says that the reply is full.
    ///
    /// The cookies are those of the backing directory, which stay right while names come and go, so that no handle
    /// is needed. Virtual names come last, with cookies that no file system uses.
    fn list(
        &self,
        node: &Node,
        offset: u64,
        mut add: impl FnMut(u64, u64, FileType, &OsStr) -> bool,
    ) -> Res<()> {
        let path = node.path();
        if offset < VIRTUAL_COOKIES {
            let dir = self.open_backing_file(&path, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            let errno = |e: rustix::io::Errno| Errno::from_i32(e.raw_os_error());
            rustix::fs::seek(&dir, rustix::fs::SeekFrom::Start(offset)).map_err(errno)?;
            let mut buf = Vec::with_capacity(32 * 1024);
            let mut entries = rustix::fs::RawDir::new(&dir, buf.spare_capacity_mut());
            while let Some(entry) = entries.next() {
                let entry = entry.map_err(errno)?;
                let name = OsStr::from_bytes(entry.file_name().to_bytes());
                let kind = entry_kind(entry.file_type());
                if add(
                    entry.ino(),
                    entry.next_entry_cookie().min(VIRTUAL_COOKIES),
                    kind,
                    name,
                ) {
                    return Ok(());
                }
            }
        }
        let names = self.volume.virtual_names(&path);
        // A cookie past every name is the backing directory's own mark of its end.
        let first = usize::try_from(offset.saturating_sub(VIRTUAL_COOKIES)).unwrap_or(usize::MAX);
        for (i, name) in names.iter().enumerate().skip(first) {
            if add(
                u64::MAX,
                VIRTUAL_COOKIES + i as u64 + 1,
                FileType::RegularFile,
                name,
            ) {
                break;
            }
        }
        Ok(())
    }
}

/// First directory cookie of virtual names; ext4, whose cookies are the largest, ends below it.
const VIRTUAL_COOKIES: u64 = 0x7fff_ffff_0000_0000;

fn entry_kind(kind: rustix::fs::FileType) -> FileType {
    match kind {
        rustix::fs::FileType::Directory => FileType::Directory,
        rustix::fs::FileType::Symlink => FileType::Symlink,
        rustix::fs::FileType::Fifo => FileType::NamedPipe,
        rustix::fs::FileType::Socket => FileType::Socket,
        rustix::fs::FileType::CharacterDevice => FileType::CharDevice,
        rustix::fs::FileType::BlockDevice => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

/// The attributes that a SETATTR sets.
struct Change {
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    size: Option<u64>,
    atime: Option<TimeOrNow>,
    mtime: Option<TimeOrNow>,
}

fn is_dir(st: &libc::stat) -> bool {
    st.st_mode & libc::S_IFMT == libc::S_IFDIR
}

fn moved_file(st: &libc::stat) -> Moved {
    Moved {
        key: attr::key(st),
        is_dir: is_dir(st),
    }
}

fn sync(file: &File, is_data_only: bool) -> Res<()> {
    let done = if is_data_only {
        file.sync_data()
    } else {
        file.sync_all()
    };
    done.map_err(|e| os(&e))
}

fn handle(mark: u8) -> FileHandle {
    FileHandle(u64::from(mark))
}

fn mark(fh: FileHandle) -> u8 {
    u8::try_from(fh.0).unwrap_or(0)
}

fn timespec(t: Option<TimeOrNow>) -> libc::timespec {
    let (tv_sec, tv_nsec) = match t {
        None => (0, libc::UTIME_OMIT),
        Some(TimeOrNow::Now) => (0, libc::UTIME_NOW),
        Some(TimeOrNow::SpecificTime(t)) => match t.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(d) => (
                i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
                i64::from(d.subsec_nanos()),
            ),
            // What fuser makes of a time before 1970: both parts away from the epoch.
            Err(e) => (
                -i64::try_from(e.duration().as_secs()).unwrap_or(i64::MAX),
                i64::from(e.duration().subsec_nanos()),
            ),
        },
    };
    libc::timespec { tv_sec, tv_nsec }
}

fn fstat(fd: RawFd) -> Res<libc::stat> {
    // SAFETY: `st` is written by the call before it is read; zeroes are a valid `stat`.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        check(libc::fstat(fd, &raw mut st))?;
        Ok(st)
    }
}

pub(crate) fn stat_at(root: RawFd, path: &Path) -> Res<libc::stat> {
    let c = cstr(path)?;
    // SAFETY: as in `fstat`; `c` is NUL-terminated and lives through the call.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        check(libc::fstatat(
            root,
            c.as_ptr(),
            &raw mut st,
            libc::AT_SYMLINK_NOFOLLOW,
        ))?;
        Ok(st)
    }
}

impl<V: Volume> Shared<V> {
    /// Returns a path that reaches a node from anywhere, through our own descriptor of the backing directory.
    fn xattr_path(&self, node: &Node) -> Res<CString> {
        if node.is_virtual {
            return Err(Errno::EOPNOTSUPP);
        }
        let base = PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd()));
        let path = self.reach(node)?;
        // "/." makes the link itself resolve when the node is the root.
        cstr(&base.join(if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &path
        }))
    }
}
