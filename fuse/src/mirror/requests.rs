//! What the kernel asks, one method for each kind of request.

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::*;

fn done(reply: ReplyEmpty, result: Res<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

fn entry(reply: ReplyEntry, result: Res<FileAttr>) {
    match result {
        Ok(a) => reply.entry(&KEEP, &a, Generation(0)),
        Err(e) => reply.error(e),
    }
}

impl<V: Volume> Filesystem for MirrorFs<V> {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in [
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ] {
            // An older kernel lacks some; nothing depends on them but speed.
            let _ = config.add_capabilities(wanted);
        }
        if self.shared.want_passthrough
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok()
        {
            self.shared.passthrough.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.shared.lookup(parent, name) {
            Ok((a, keep)) => reply.entry(&keep, &a, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.shared.inodes.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let s = &self.shared;
        let attr = s.node(ino).and_then(|node| {
            if node.is_virtual {
                return Ok((s.virtual_attr(&node)?, NO_KEEP));
            }
            Ok((attr::from_stat(node.ino, &s.stat_node(&node)?), KEEP))
        });
        match attr {
            Ok((a, keep)) => reply.attr(&keep, &a),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change {
            mode,
            uid,
            gid,
            size,
            atime,
            mtime,
        };
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let answer = |reply: ReplyAttr, changed| match changed {
            Ok(a) => reply.attr(&KEEP, &a),
            Err(e) => reply.error(e),
        };
        let caller = caller(req);
        match size.is_some() && self.shared.volume.may_wait(&node.path()) {
            false => answer(reply, self.shared.set_attributes(&node, &change, caller)),
            true => self
                .shared
                .do_waiting(move |s| answer(reply, s.set_attributes(&node, &change, caller))),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let link = self.shared.node(ino).and_then(|n| {
            rustix::fs::readlinkat(&*self.shared.root, n.path(), Vec::new())
                .map_err(|e| Errno::from_i32(e.raw_os_error()))
        });
        match link {
            Ok(target) => reply.data(target.as_bytes()),
            Err(e) => reply.error(e),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let s = &self.shared;
        let made = s.node(parent).and_then(|p| {
            let path = p.child(name);
            s.refuse_virtual(&path)?;
            let make = || {
                let c = cstr(&path)?;
                // SAFETY: `c` is NUL-terminated and lives through the call.
                check(unsafe {
                    libc::mknodat(s.root.as_raw_fd(), c.as_ptr(), mode, u64::from(rdev))
                })?;
                s.give(&path, mode, caller(req), false)?;
                s.made(&path)
            };
            if mode & libc::S_IFMT != libc::S_IFREG {
                // A pipe, a socket or a device: nothing that the volume could read, and a pipe it would wait for.
                return make();
            }
            s.with_before(&Op::Create { path: &path }, caller(req), make)
        });
        entry(reply, made);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let s = &self.shared;
        let made = s.node(parent).and_then(|p| {
            let path = p.child(name);
            s.refuse_virtual(&path)?;
            s.with_before(&Op::Mkdir { path: &path }, caller(req), || {
                let c = cstr(&path)?;
                // SAFETY: `c` is NUL-terminated and lives through the call.
                check(unsafe { libc::mkdirat(s.root.as_raw_fd(), c.as_ptr(), mode & 0o7777) })?;
                s.give(&path, mode, caller(req), false)?;
                s.made(&path)
            })
        });
        entry(reply, made);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let path = match self.shared.node(parent) {
            Ok(parent) => parent.child(name),
            Err(e) => return reply.error(e),
        };
        let caller = caller(req);
        match self.shared.volume.may_wait(&path) {
            false => done(reply, self.shared.unlink(&path, caller, 0)),
            true => self
                .shared
                .do_waiting(move |s| done(reply, s.unlink(&path, caller, 0))),
        }
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let s = &self.shared;
        done(
            reply,
            s.node(parent)
                .and_then(|p| s.unlink(&p.child(name), caller(req), libc::AT_REMOVEDIR)),
        );
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let s = &self.shared;
        let made = s.node(parent).and_then(|p| {
            let path = p.child(link_name);
            s.refuse_virtual(&path)?;
            let (t, c) = (cstr(target)?, cstr(&path)?);
            // SAFETY: both strings are NUL-terminated and live through the call.
            check(unsafe { libc::symlinkat(t.as_ptr(), s.root.as_raw_fd(), c.as_ptr()) })?;
            s.give(&path, 0, caller(req), true)?;
            s.made(&path)
        });
        entry(reply, made);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let s = &self.shared;
        let result = s.node(parent).and_then(|a| {
            let b = s.node(newparent)?;
            s.rename(&a.child(name), &b.child(newname), flags.bits(), caller(req))
        });
        done(reply, result);
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let s = &self.shared;
        let made = s.node(ino).and_then(|node| {
            let (from, to) = (node.path(), s.node(newparent)?.child(newname));
            if node.is_virtual {
                return Err(Errno::EPERM);
            }
            s.refuse_virtual(&to)?;
            s.with_before(
                &Op::Link {
                    from: &from,
                    to: &to,
                },
                caller(req),
                || {
                    let (a, b) = (cstr(&from)?, cstr(&to)?);
                    let root = s.root.as_raw_fd();
                    // SAFETY: both strings are NUL-terminated and live through the call.
                    check(unsafe { libc::linkat(root, a.as_ptr(), root, b.as_ptr(), 0) })?;
                    s.made(&to)
                },
            )
        });
        entry(reply, made);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        if node.is_virtual {
            return match self.shared.open_virtual(&node, flags.0) {
                Ok(()) => reply.opened(handle(0), FopenFlags::FOPEN_DIRECT_IO),
                Err(e) => reply.error(e),
            };
        }
        let path = node.path();
        let request = OpenRequest {
            path: &path,
            writable: writable(flags.0),
            create: false,
            caller: caller(req),
        };
        if let Err(e) = self.shared.check_access(&node, &request, flags.0) {
            return reply.error(e);
        }
        if !self.shared.volume.open_may_block(&request) {
            return self.shared.open_now(&node, &request, reply);
        }
        let (shared, writable, caller) = (self.shared.clone(), request.writable, request.caller);
        std::thread::spawn(move || {
            let path = node.path();
            shared.open_now(
                &node,
                &OpenRequest {
                    path: &path,
                    writable,
                    create: false,
                    caller,
                },
                reply,
            );
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        if node.is_virtual {
            let data = self
                .shared
                .volume
                .virtual_file(&node.path())
                .map(|f| f.data)
                .unwrap_or_default();
            let start = usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .min(data.len());
            let end = start.saturating_add(size as usize).min(data.len());
            return reply.data(&data[start..end]);
        }
        let Some(file) = node.open_file() else {
            return reply.error(Errno::EBADF);
        };
        let mut buf = vec![0; size as usize];
        let mut len = 0;
        while len < buf.len() {
            match file.read_at(&mut buf[len..], offset + len as u64) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return reply.error(os(&e)),
            }
        }
        reply.data(&buf[..len]);
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let node = match self.shared.node(ino) {
            Ok(node) => node,
            Err(e) => return reply.error(e),
        };
        let answer = |reply: ReplyWrite, written| match written {
            Ok(n) => reply.written(n),
            Err(e) => reply.error(e),
        };
        let caller = caller(req);
        if !self.shared.volume.may_wait(&node.path()) {
            return answer(reply, self.shared.write(&node, offset, data, caller));
        }
        let data = data.to_vec();
        self.shared
            .do_waiting(move |s| answer(reply, s.write(&node, offset, &data, caller)));
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // There is nothing to do on close, and the kernel never asks again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Ok(node) = self.shared.node(ino) {
            self.shared.drop_handle(&node);
            if !node.is_virtual {
                self.shared
                    .volume
                    .released(&node.path(), writable(flags.0), mark(fh));
            }
        }
        reply.ok();
    }

    fn fsync(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let s = &self.shared;
        let result = s.node(ino).and_then(|node| {
            if node.is_virtual {
                return Ok(());
            }
            let file = node.open_file().ok_or(Errno::EBADF)?;
            s.with_before(&Op::Fsync { path: &node.path() }, caller(req), || {
                sync(&file, datasync)
            })
        });
        done(reply, result);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Listing needs no handle. The kernel then stops asking, which spares two requests in each directory sync.
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let s = &self.shared;
        let listed = s.node(ino).and_then(|n| {
            s.list(&n, offset, |ino, cookie, kind, name| {
                reply.add(INodeNo(ino), cookie, kind, name)
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let s = &self.shared;
        let result = s.node(ino).and_then(|n| {
            let dir = s.open_backing_file(&n.path(), libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            sync(&dir, datasync)
        });
        done(reply, result);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match rustix::fs::fstatvfs(&*self.shared.root) {
            Ok(st) => reply.statfs(
                st.f_blocks,
                st.f_bfree,
                st.f_bavail,
                st.f_files,
                st.f_ffree,
                u32::try_from(st.f_bsize).unwrap_or(4096),
                u32::try_from(st.f_namemax).unwrap_or(255),
                u32::try_from(st.f_frsize).unwrap_or(4096),
            ),
            Err(e) => reply.error(Errno::from_i32(e.raw_os_error())),
        }
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let s = &self.shared;
        let result = s.node(ino).and_then(|n| {
            let (path, name) = (s.xattr_path(&n)?, cstr(Path::new(name))?);
            // SAFETY: both strings are NUL-terminated, `value` lives through the call.
            check(unsafe {
                libc::lsetxattr(
                    path.as_ptr(),
                    name.as_ptr(),
                    value.as_ptr().cast(),
                    value.len(),
                    flags,
                )
            })
            .map(|_| ())
        });
        done(reply, result);
    }

    fn access(&self, _req: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        let s = &self.shared;
        let result = s.node(ino).and_then(|n| {
            if n.is_virtual {
                let refused = mask.intersects(AccessFlags::W_OK | AccessFlags::X_OK);
                return if refused { Err(Errno::EACCES) } else { Ok(()) };
            }
            let path = cstr(&n.path())?;
            // Only the daemon's own user gets here, see `mount`; so what it may do is what the caller may.
            let flags = libc::AT_EACCESS | libc::AT_SYMLINK_NOFOLLOW;
            // SAFETY: the string is NUL-terminated and lives through the call.
            check(unsafe { libc::faccessat(s.root.as_raw_fd(), path.as_ptr(), mask.bits(), flags) })
                .map(|_| ())
        });
        done(reply, result);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let s = &self.shared;
        let mut buf = vec![0_u8; size as usize];
        let len = s.node(ino).and_then(|n| {
            let name = cstr(Path::new(name))?;
            // The kernel asks for capabilities at each first write after a look at the attributes.
            if let Some(file) = n.open_file() {
                // SAFETY: the string is NUL-terminated, the buffer has `size` bytes, the descriptor is open.
                return xattr_len(unsafe {
                    libc::fgetxattr(
                        file.as_raw_fd(),
                        name.as_ptr(),
                        buf.as_mut_ptr().cast(),
                        buf.len(),
                    )
                });
            }
            let path = s.xattr_path(&n)?;
            // SAFETY: both strings are NUL-terminated, the buffer has `size` bytes.
            xattr_len(unsafe {
                libc::lgetxattr(
                    path.as_ptr(),
                    name.as_ptr(),
                    buf.as_mut_ptr().cast(),
                    buf.len(),
                )
            })
        });
        xattr_reply(reply, size, &buf, len);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let s = &self.shared;
        let mut buf = vec![0_u8; size as usize];
        let len = s.node(ino).and_then(|n| {
            let path = s.xattr_path(&n)?;
            // SAFETY: the string is NUL-terminated, the buffer has `size` bytes.
            xattr_len(unsafe {
                libc::llistxattr(path.as_ptr(), buf.as_mut_ptr().cast(), buf.len())
            })
        });
        xattr_reply(reply, size, &buf, len);
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let s = &self.shared;
        let result = s.node(ino).and_then(|n| {
            let (path, name) = (s.xattr_path(&n)?, cstr(Path::new(name))?);
            // SAFETY: both strings are NUL-terminated and live through the call.
            check(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) }).map(|_| ())
        });
        done(reply, result);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let s = &self.shared;
        let who = caller(req);
        let prepared = s.node(parent).and_then(|p| {
            let path = p.child(name);
            s.refuse_virtual(&path)?;
            s.volume.before(&Op::Create { path: &path }, who)?;
            let request = OpenRequest {
                path: &path,
                writable: writable(flags),
                create: true,
                caller: who,
            };
            let answer = s.volume.open(&request)?;
            let made = (|| {
                let existed = s.stat_path(&path).is_ok();
                let how = libc::O_CREAT | libc::O_RDWR | (flags & libc::O_EXCL);
                let file = s.open_backing_file(&path, how, mode & 0o7777)?;
                if !existed {
                    s.give(&path, mode, who, false)?;
                }
                let st = s.stat_path(&path)?;
                let node = s.inodes.intern(attr::key(&st), &path, st.st_nlink);
                if !existed {
                    // The mode is for later opens; this one may write whatever it says.
                    Shared::<V>::put_file(&mut node.open.lock(), file, true);
                }
                let opened = s
                    .add_handle(&node, answer.serve, request.writable, |f| {
                        reply.open_backing(f)
                    })
                    .inspect_err(|_| s.inodes.forget(node.ino, 1))?;
                Ok((attr::from_stat(node.ino, &st), opened))
            })();
            match made {
                Ok((attr, opened)) => {
                    s.volume.after(&Op::Create { path: &path }, who);
                    Ok((attr, opened, answer.mark))
                }
                Err(e) => {
                    s.volume.released(&path, request.writable, answer.mark);
                    Err(e)
                }
            }
        });
        match prepared {
            Ok((a, (flags, Some(id)), mark)) => {
                reply.created_passthrough(&KEEP, &a, Generation(0), handle(mark), flags, &id);
            }
            Ok((a, (flags, None), mark)) => {
                reply.created(&KEEP, &a, Generation(0), handle(mark), flags)
            }
            Err(e) => reply.error(e),
        }
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let s = &self.shared;
        let result = s.node(ino).and_then(|node| {
            let file = node.open_file().ok_or(Errno::EBADF)?;
            let path = node.path();
            let (offset, length) = (
                i64::try_from(offset).map_err(|_| Errno::EFBIG)?,
                i64::try_from(length).map_err(|_| Errno::EFBIG)?,
            );
            let size = offset
                .checked_add(length)
                .ok_or(Errno::EFBIG)?
                .cast_unsigned();
            s.with_before(&Op::Truncate { path: &path, size }, caller(req), || {
                // SAFETY: the descriptor is open.
                check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) })
                    .map(|_| ())
            })
        });
        done(reply, result);
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let at = self.shared.node(ino).and_then(|node| {
            let file = node.open_file().ok_or(Errno::EBADF)?;
            // SAFETY: the descriptor is open; its own offset is used by nobody.
            let at = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
            if at < 0 { Err(last()) } else { Ok(at) }
        });
        match at {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(e),
        }
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies through the page cache, where writes are seen like any other.
        reply.error(Errno::EOPNOTSUPP);
    }
}

fn xattr_len(n: libc::ssize_t) -> Res<usize> {
    usize::try_from(n).map_err(|_| last())
}

fn xattr_reply(reply: ReplyXattr, size: u32, buf: &[u8], len: Res<usize>) {
    match len {
        Ok(len) if size == 0 => reply.size(u32::try_from(len).unwrap_or(u32::MAX)),
        Ok(len) => reply.data(&buf[..len]),
        Err(e) => reply.error(e),
    }
}
