//! The mount as users and operators meet it: ordinary programs on ordinary files, other users, the command line.

use std::ffi::{CString, OsStr};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::{Node, assert_same, cannot_mount, wait_for};

/// What was done to a directory, and what came of it.
struct Transcript(String);

impl Transcript {
    fn note(&mut self, what: &str, result: impl std::fmt::Debug) {
        writeln!(self.0, "{what}: {result:?}").unwrap();
    }

    /// Notes a result, an error by its number.
    fn io<T: std::fmt::Debug>(&mut self, what: &str, result: std::io::Result<T>) {
        match result {
            Ok(value) => self.note(what, value),
            Err(e) => self.note(what, e.raw_os_error()),
        }
    }

    /// Notes what a system call returns.
    fn call(&mut self, what: &str, returned: impl Into<i64>) {
        let result = returned.into();
        if result < 0 {
            self.io::<()>(what, Err(std::io::Error::last_os_error()));
        } else {
            self.note(what, result);
        }
    }

    /// Notes kind, mode, links, owner, size and times that were set.
    fn stat(&mut self, path: &Path) {
        let m = fs::symlink_metadata(path).map(|m| {
            let size = if m.is_dir() { 0 } else { m.len() };
            (format!("{:o}", m.mode()), m.uid(), m.gid(), size)
        });
        self.io("stat", m);
    }
}

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    #[expect(clippy::disallowed_methods, reason = "what a user does in the mount")]
    fs::rename(from, to)
}

fn rw(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

fn read_at(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    let n = file.read_at(&mut buf, offset).unwrap();
    buf.truncate(n);
    buf
}

/// Lists a directory, without the names that only a mount has.
fn names(dir: &Path) -> Vec<Vec<u8>> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().as_bytes().to_vec())
        .filter(|n| n != b".lag" && n != b".primary")
        .collect();
    names.sort();
    names
}

fn names_and_links(dir: &Path, t: &mut Transcript) {
    // A name that goes leaves the others of the same file.
    let (a, b) = (dir.join("a"), dir.join("b"));
    fs::write(&a, "one").unwrap();
    t.io("link", fs::hard_link(&a, &b));
    t.io("unlink the new name", fs::remove_file(&b));
    t.io("read the old name", fs::read_to_string(&a));
    t.io("link again", fs::hard_link(&a, &b));
    t.io("unlink the old name", fs::remove_file(&a));
    t.io("read the new name", fs::read_to_string(&b));
    t.io("link back", fs::hard_link(&b, &a));
    fs::write(dir.join("c"), "other").unwrap();
    t.io("replace a linked name", rename(&dir.join("c"), &b));
    t.io("the other name", fs::read_to_string(&a));
    t.io("append by it", {
        let mut f = OpenOptions::new().append(true).open(&a).unwrap();
        f.write_all(b"+")
    });
    t.note("links", fs::metadata(&a).unwrap().nlink());
    t.io("link a directory", fs::hard_link(dir, dir.join("d2")));
    t.io("rename onto another link of the same file", {
        fs::hard_link(&a, dir.join("same")).unwrap();
        rename(&a, &dir.join("same"))
    });
    t.note("both are there", names(dir).len());

    let link = dir.join("link");
    t.io("symlink", std::os::unix::fs::symlink("a", &link));
    t.io("readlink", fs::read_link(&link));
    t.io("read by it", fs::read_to_string(&link));
    t.io(
        "long",
        std::os::unix::fs::symlink("x".repeat(4000), dir.join("long")),
    );
    t.note(
        "its length",
        fs::read_link(dir.join("long")).unwrap().as_os_str().len(),
    );
    t.io("lchown", std::os::unix::fs::lchown(&link, Some(7), Some(8)));
    t.stat(&link);
    t.stat(&a);

    let odd = dir.join(OsStr::from_bytes(b"n\xff\xfe \n\t'\"*"));
    t.io("odd name", fs::write(&odd, "odd"));
    t.io("read it", fs::read_to_string(&odd));
    t.io(
        "rename it",
        rename(&odd, &dir.join(OsStr::from_bytes(b"\x80-wal"))),
    );
    t.io("255 bytes", fs::write(dir.join("n".repeat(255)), "long"));
    t.io("256 bytes", fs::write(dir.join("n".repeat(256)), "long"));
    t.io(
        "255 bytes, read",
        fs::read_to_string(dir.join("n".repeat(255))),
    );
    t.note("names", names(dir));

    let mut deep = dir.to_owned();
    for i in 0..100 {
        deep.push(format!("level{i:03}"));
    }
    t.io("100 levels", fs::create_dir_all(&deep));
    t.io("a file there", fs::write(deep.join("f"), "deep"));
    t.io(
        "rename the top",
        rename(&dir.join("level000"), &dir.join("top")),
    );
    t.io("the old name", fs::metadata(&deep).map(|_| ()));
    let moved = dir
        .join("top")
        .join(deep.strip_prefix(dir.join("level000")).unwrap());
    t.io("the new name", fs::read_to_string(moved.join("f")));
    t.io(
        "into itself",
        rename(&dir.join("top"), &dir.join("top/level001/x")),
    );
    t.io("remove", fs::remove_dir(dir.join("top")));
    t.io("remove all", fs::remove_dir_all(dir.join("top")));

    for (flags, what) in [
        (libc::RENAME_NOREPLACE, "no replace"),
        (libc::RENAME_EXCHANGE, "exchange"),
    ] {
        fs::write(dir.join("x"), "x").unwrap();
        fs::write(dir.join("y"), "y").unwrap();
        let (x, y) = (c(&dir.join("x")), c(&dir.join("y")));
        // SAFETY: both strings are NUL-terminated and live through the call.
        t.call(what, unsafe {
            libc::renameat2(
                libc::AT_FDCWD,
                x.as_ptr(),
                libc::AT_FDCWD,
                y.as_ptr(),
                flags,
            )
        });
        t.io("x", fs::read_to_string(dir.join("x")));
        t.io("y", fs::read_to_string(dir.join("y")));
    }
    for (name, mode) in [
        ("fifo", libc::S_IFIFO | 0o622),
        ("sock", libc::S_IFSOCK | 0o600),
        ("reg", libc::S_IFREG | 0o640),
    ] {
        let path = c(&dir.join(name));
        // SAFETY: the string is NUL-terminated and lives through the call.
        t.call(name, unsafe { libc::mknod(path.as_ptr(), mode, 0) });
        t.stat(&dir.join(name));
    }
    t.io(
        "bind a socket",
        std::os::unix::net::UnixListener::bind(dir.join("listen")).map(|_| ()),
    );
    t.io("directory sync", File::open(dir).and_then(|d| d.sync_all()));
}

fn attributes(dir: &Path, t: &mut Transcript) {
    let f = dir.join("f");
    fs::write(&f, "content").unwrap();
    let set = |t: &mut Transcript, mode| {
        t.io(
            "chmod",
            fs::set_permissions(&f, fs::Permissions::from_mode(mode)),
        );
        t.stat(&f);
    };
    set(t, 0o600);
    set(t, 0o7777);
    t.io("chown", std::os::unix::fs::chown(&f, Some(1), Some(2)));
    t.stat(&f);
    set(t, 0o644);
    let d = dir.join("d");
    fs::create_dir(&d).unwrap();
    t.io("setgid dir", std::os::unix::fs::chown(&d, Some(3), Some(4)));
    t.io(
        "setgid dir",
        fs::set_permissions(&d, fs::Permissions::from_mode(0o2775)),
    );
    fs::write(d.join("inherits"), "").unwrap();
    t.stat(&d.join("inherits"));
    fs::create_dir(d.join("sub")).unwrap();
    t.stat(&d.join("sub"));

    for (secs, nsecs) in [
        (1_000_000_000, 123_456_789),
        (-5, 500_000_000),
        (0, 0),
        (4_000_000_000, 1),
    ] {
        let times = [
            libc::timespec {
                tv_sec: secs,
                tv_nsec: nsecs,
            },
            libc::timespec {
                tv_sec: secs + 1,
                tv_nsec: nsecs,
            },
        ];
        let path = c(&f);
        // SAFETY: the string is NUL-terminated, the array has two elements, both live through the call.
        t.call("utimens", unsafe {
            libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), 0)
        });
        let m = fs::metadata(&f).unwrap();
        t.note(
            "times",
            (m.atime(), m.atime_nsec(), m.mtime(), m.mtime_nsec()),
        );
    }
    let link = dir.join("l");
    std::os::unix::fs::symlink("f", &link).unwrap();
    let times = [libc::timespec {
        tv_sec: 77,
        tv_nsec: 0,
    }; 2];
    let path = c(&link);
    // SAFETY: as above.
    t.call("utimens of a link", unsafe {
        libc::utimensat(
            libc::AT_FDCWD,
            path.as_ptr(),
            times.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
        )
    });
    t.note("mtime", fs::symlink_metadata(&link).unwrap().mtime());
    t.note("not of its target", fs::metadata(&f).unwrap().mtime() != 77);

    // Changes by writing show in the times, by mmap too.
    let old = |t: &mut Transcript| {
        let times = [libc::timespec {
            tv_sec: 1000,
            tv_nsec: 0,
        }; 2];
        let path = c(&f);
        // SAFETY: as above.
        t.call("utimens", unsafe {
            libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), 0)
        });
    };
    old(t);
    rw(&f).write_all(b"C").unwrap();
    t.note("write sets mtime", fs::metadata(&f).unwrap().mtime() > 1000);
    old(t);
    rw(&f).set_len(3).unwrap();
    t.note(
        "truncate sets mtime",
        fs::metadata(&f).unwrap().mtime() > 1000,
    );

    xattrs(&f, t);
    xattrs(&d, t);
}

fn xattrs(path: &Path, t: &mut Transcript) {
    let p = c(path);
    let list = |t: &mut Transcript| {
        let mut buf = [0_u8; 1024];
        // SAFETY: the string is NUL-terminated, the buffer has the length that is said.
        let n = unsafe { libc::listxattr(p.as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
        t.note(
            "listxattr",
            String::from_utf8_lossy(&buf[..usize::try_from(n).unwrap()]),
        );
    };
    for (name, value, flags) in [
        (c"user.a", "first", 0),
        (c"user.a", "again", libc::XATTR_CREATE),
        (c"user.b", "none", libc::XATTR_REPLACE),
        (c"user.b", "", 0),
        (c"trusted.t", "T", 0),
        (c"wrong", "W", 0),
    ] {
        // SAFETY: both strings are NUL-terminated, the value has the length that is said.
        t.call("setxattr", unsafe {
            libc::setxattr(
                p.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                flags,
            )
        });
    }
    list(t);
    for (name, len) in [
        (c"user.a", 64),
        (c"user.a", 0),
        (c"user.a", 2),
        (c"user.b", 64),
        (c"user.none", 64),
    ] {
        let mut buf = vec![0_u8; len];
        // SAFETY: as above.
        let n = unsafe { libc::getxattr(p.as_ptr(), name.as_ptr(), buf.as_mut_ptr().cast(), len) };
        t.call("getxattr", i64::try_from(n).unwrap());
        t.note("value", buf);
    }
    for name in [c"user.a", c"user.a", c"trusted.t"] {
        // SAFETY: both strings are NUL-terminated.
        t.call("removexattr", unsafe {
            libc::removexattr(p.as_ptr(), name.as_ptr())
        });
    }
    list(t);
}

fn contents(dir: &Path, t: &mut Transcript) {
    let f = dir.join("f");
    let mut file = rw(&f);
    t.io("write past the end", file.write_all_at(b"end", 1 << 20));
    t.note("hole", read_at(&file, 5, 4));
    t.note("sparse", file.metadata().unwrap().blocks() < 1000);
    // SAFETY: the descriptor is open, here and below.
    t.call("seek data", unsafe {
        libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA)
    });
    // SAFETY: as above.
    t.call("seek hole", unsafe {
        libc::lseek(file.as_raw_fd(), 0, libc::SEEK_HOLE)
    });
    for len in [10, 0, 5000, 4096, 100] {
        t.io("set_len", file.set_len(len));
        t.note("len", file.metadata().unwrap().len());
        t.note("tail", read_at(&file, len.saturating_sub(4), 10));
    }
    let path = c(&f);
    // SAFETY: the string is NUL-terminated and lives through the call.
    t.call("truncate by name", unsafe {
        libc::truncate(path.as_ptr(), 70)
    });
    // SAFETY: as above.
    t.call("to a negative length", unsafe {
        libc::truncate(path.as_ptr(), -1)
    });
    t.io(
        "O_TRUNC",
        File::create(&f).and_then(|mut f| f.write_all(b"new content")),
    );
    t.io(
        "seen through the old handle",
        file.seek(SeekFrom::Start(0)).map(|_| ()),
    );
    let mut text = String::new();
    t.io("read", file.read_to_string(&mut text));
    t.note("text", &text);
    t.io(
        "O_EXCL",
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&f)
            .map(|_| ()),
    );
    t.io(
        "O_EXCL, new",
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(dir.join("g"))
            .map(|_| ()),
    );
    t.io("a directory for writing", File::create(dir).map(|_| ()));
    t.io(
        "what is not there",
        File::open(dir.join("none")).map(|_| ()),
    );
    t.io("a file as a directory", File::open(f.join("x")).map(|_| ()));

    let fallocate = |t: &mut Transcript, what: &str, mode, offset, len| {
        // SAFETY: the descriptor is open.
        t.call(what, unsafe {
            libc::fallocate(file.as_raw_fd(), mode, offset, len)
        });
        t.note("len", file.metadata().unwrap().len());
    };
    fallocate(t, "allocate", 0, 0, 20000);
    fallocate(t, "keep size", libc::FALLOC_FL_KEEP_SIZE, 0, 40000);
    file.write_all_at(&[7; 16384], 0).unwrap();
    fallocate(
        t,
        "punch hole",
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        4096,
        4096,
    );
    t.note("before", read_at(&file, 4090, 12));
    t.note("after", read_at(&file, 8186, 12));
    fallocate(t, "zero range", libc::FALLOC_FL_ZERO_RANGE, 10, 10);
    t.note("zeroed", read_at(&file, 8, 14));

    // Through an unlinked name, and one that was replaced.
    let gone = dir.join("gone");
    let held = rw(&gone);
    held.write_all_at(b"before", 0).unwrap();
    t.io("unlink while open", fs::remove_file(&gone));
    t.io("write", held.write_all_at(b"after", 6));
    t.note("read", read_at(&held, 0, 100));
    t.note(
        "stat",
        held.metadata().map(|m| (m.len(), m.nlink())).unwrap(),
    );
    t.io("a new file of that name", fs::write(&gone, "another"));
    t.io("truncate the old one", held.set_len(3));
    t.io("sync it", held.sync_all());
    t.io(
        "chmod it",
        held.set_permissions(fs::Permissions::from_mode(0o600)),
    );
    t.note("the old one", read_at(&held, 0, 100));
    t.io("the new one", fs::read_to_string(&gone));
    t.stat(&gone);
    drop(held);
    let held = rw(&gone);
    fs::write(dir.join("tmp"), "replacement").unwrap();
    t.io("rename over an open file", rename(&dir.join("tmp"), &gone));
    t.note("the open one", read_at(&held, 0, 100));
    t.io("write to it", held.write_all_at(b"A", 0));
    t.io("the name", fs::read_to_string(&gone));

    // SAFETY: the string is NUL-terminated and lives through the call.
    let fd = unsafe { libc::open(c(dir).as_ptr(), libc::O_TMPFILE | libc::O_RDWR, 0o600) };
    let is_refused =
        fd < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP);
    assert!(
        fd >= 0 || is_refused,
        "O_TMPFILE: a file, or EOPNOTSUPP, after which programs take a name"
    );
    if fd >= 0 {
        // SAFETY: the descriptor is ours.
        unsafe { libc::close(fd) };
    }

    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::write(&from, vec![9; 300_000]).unwrap();
    let (src, dst) = (rw(&from), rw(&to));
    let mut copied = 0;
    while copied < 300_000 {
        // SAFETY: both descriptors are open; no offsets are given.
        let n = unsafe {
            libc::copy_file_range(
                src.as_raw_fd(),
                std::ptr::null_mut(),
                dst.as_raw_fd(),
                std::ptr::null_mut(),
                300_000,
                0,
            )
        };
        if n <= 0 {
            t.io::<()>("copy_file_range", Err(std::io::Error::last_os_error()));
            break;
        }
        copied += n;
    }
    t.note("copied", copied);
    t.note(
        "the same",
        fs::read(&from).unwrap() == fs::read(&to).unwrap(),
    );
    t.io("fs::copy", fs::copy(&from, dir.join("third")));

    mmap(&dir.join("m"), t);
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&from);
    t.io("O_DIRECT", direct.map(|_| ()));
    // SAFETY: zeroes are a valid `statvfs`, the string is NUL-terminated.
    unsafe {
        let mut st: libc::statvfs = std::mem::zeroed();
        t.call("statvfs", libc::statvfs(c(dir).as_ptr(), &raw mut st));
        t.note("statvfs", (st.f_namemax, st.f_bsize, st.f_blocks));
    }
}

fn mmap(path: &Path, t: &mut Transcript) {
    const LEN: usize = 64 << 10;
    let file = rw(path);
    file.set_len(LEN as u64).unwrap();
    let times = [libc::timespec {
        tv_sec: 1000,
        tv_nsec: 0,
    }; 2];
    // SAFETY: the mapping is LEN bytes of an open file of that length, and is unmapped before the end.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        t.call("utimens", libc::futimens(file.as_raw_fd(), times.as_ptr()));
        let bytes = at.cast::<u8>();
        for i in 0..LEN {
            *bytes.add(i) = u8::try_from(i % 251).unwrap();
        }
        t.note("write is seen in the mapping", {
            file.write_all_at(b"written", 4096).unwrap();
            std::slice::from_raw_parts(bytes.add(4096), 7) == b"written"
        });
        t.note("mapping is seen by read", read_at(&file, 0, 8));
        t.call("msync", libc::msync(at, LEN, libc::MS_SYNC));
        t.call("munmap", libc::munmap(at, LEN));
    }
    drop(file);
    let content = fs::read(path).unwrap();
    t.note(
        "content",
        (0..LEN)
            .filter(|i| usize::from(content[*i]) == *i % 251)
            .count(),
    );
    t.note("mtime moved", fs::metadata(path).unwrap().mtime() > 1000);
}

/// Runs a script in a directory, and notes what it prints.
fn script(t: &mut Transcript, dir: &Path, what: &str, text: &str) {
    let out = Command::new("bash")
        .args(["-c", text, "bash"])
        .current_dir(dir)
        .env("HOME", dir.parent().unwrap())
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_AUTHOR_DATE", "2020-01-01T00:00:00Z")
        .env("GIT_COMMITTER_DATE", "2020-01-01T00:00:00Z")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let place = dir.display().to_string();
    let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&place, "DIR");
    writeln!(
        t.0,
        "{what}: {:?}\n{}{}",
        out.status.code(),
        show(&out.stdout),
        show(&out.stderr)
    )
    .unwrap();
}

fn programs(dir: &Path, t: &mut Transcript) {
    script(
        t,
        dir,
        "tree",
        r#"
        mkdir -p t/a/b t/empty; umask 027
        for i in $(seq 300); do echo "file $i" >t/a/f$i; done
        head -c 3000000 /dev/zero | tr '\0' x >t/big; : >t/nothing; printf '#!/bin/sh\necho ran\n' >t/a/run; chmod 755 t/a/run
        ln t/a/f1 t/a/b/hard; ln -s ../f2 t/a/b/soft; ln -s nowhere t/dangling; mkfifo t/pipe
        truncate -s 5M t/sparse; echo x >"t/a/$(printf 'odd\377name')"
        touch -d '2001-02-03 04:05:06.789' t/a/f3; touch -h -d '2002-02-02' t/dangling; chmod 4750 t/a/f4; chmod 1777 t/empty
        t/a/run; cd t && find . -printf '%p %y %m %n %s %l\n' | grep -v '^\. \|/\(a\|b\|empty\) d' | sort; stat -c '%y %n' a/f3 dangling"#,
    );
    script(
        t,
        dir,
        "cp -a",
        r#"
        cp -a t copy && diff -r --no-dereference t copy && echo same
        f() { (cd $1 && find . ! -type d -printf '%p %y %m %n %s %l %T@\n' | sort); }; diff <(f t) <(f copy) && echo same attributes"#,
    );
    script(
        t,
        dir,
        "tar",
        r#"
        tar --format=posix -cf x.tar t && tar -df x.tar && echo compares; mkdir out && tar -xpf x.tar -C out && tar -df x.tar -C out && echo out
        f() { (cd $1 && find . ! -type d -printf '%p %y %m %n %s %l %T@\n' | sort); }; diff <(f t) <(f out/t) && echo same attributes
        tar -tvf x.tar | wc -l"#,
    );
    script(
        t,
        dir,
        "find, du, rm, mv",
        r#"
        mv out/t moved; rmdir out; find moved -type f | wc -l; find moved -samefile moved/a/f1 | sort
        rm -r copy && ls -d copy; rm -rf moved/a/b && ls moved/a | wc -l; rm -r moved; ls"#,
    );
    script(
        t,
        dir,
        "editors",
        r#"
        echo v1 >doc; chmod 640 doc; cp -p doc doc~; printf v2 >doc; cat doc doc~; stat -c '%a %s' doc
        python3 - <<'PY'
import os
fd = os.open("doc.tmp", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
os.write(fd, b"v3"); os.fsync(fd); os.close(fd)
os.rename("doc.tmp", "doc"); d = os.open(".", os.O_RDONLY); os.fsync(d); os.close(d)
print(open("doc").read(), oct(os.stat("doc").st_mode))
old = open("doc"); os.rename("doc", "doc~"); open("doc", "w").write("v4"); print(old.read(), open("doc").read())
PY
        command -v vim >/dev/null && vim -u NONE -es -N -c 'set backup writebackup' -c 'normal ccv5' -c wq doc </dev/null; cat doc doc~
        sed -i s/v/w/ doc; cat doc; perl -pi -e 's/w/z/' doc; cat doc"#,
    );
    script(
        t,
        dir,
        "append from several processes",
        r#"
        for p in 1 2 3 4; do (for i in $(seq 500); do echo "$p $i"; done >>log) & done; wait; wc -l <log; sort log | uniq | wc -l"#,
    );
    script(
        t,
        dir,
        "locks between processes",
        r#"
        : >lk; exec 9<>lk; flock 9; flock -n lk true; echo "flock held: $?"; flock -u 9; flock -n lk true; echo "free: $?"
        python3 - <<'PY'
import fcntl, os, subprocess, sys
f = open("lk", "r+b"); fcntl.lockf(f, fcntl.LOCK_EX, 10, 5)
code = """import fcntl,sys
f = open("lk", "r+b")
for at in (0, 5, 14, 15):
    try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at); print(at, "got")
    except OSError as e: print(at, e.errno)
"""
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
open("lk").close()  # any close drops the locks of the process
print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
PY"#,
    );
    script(
        t,
        dir,
        "git",
        r#"
        command -v git >/dev/null || exit 0
        q() { git -c user.name=n -c user.email=e -c init.defaultBranch=main -c safe.directory='*' "$@" 2>&1; }
        mkdir repo && cd repo && q init -q . && for i in $(seq 60); do echo $i >f$i; done && ln -s f1 link && q add -A && q commit -qm one && q status --short
        for i in $(seq 12); do echo $i >>f$i; q commit -qam "c$i"; done; q rev-parse HEAD; q log --oneline | wc -l
        cd .. && q clone -q repo clone && cd clone && q fsck && q checkout -qb b HEAD~5 && q merge -q main && q rev-parse HEAD && q gc -q --prune=now && q fsck && q status --short
        cd .. && rm -rf repo && cd clone && q log --oneline | wc -l"#,
    );
    script(
        t,
        dir,
        "rsync",
        r#"
        command -v rsync >/dev/null || { echo skipped; exit 0; }
        rsync -aHX t/ synced/ && rsync -aHXcni t/ synced/ && echo same; rsync -a --delete --inplace t/a/ synced/; ls synced | wc -l"#,
    );
    script(
        t,
        dir,
        "many names",
        r#"
        mkdir many && cd many && python3 - <<'PY'
import os, threading
N = 5000
for i in range(N): open(f"keep{i:05}", "w").close()
stop = False
def churn():
    i = 0
    while not stop:
        open(f"churn{i}", "w").close(); os.rename(f"churn{i}", f"moved{i}"); os.unlink(f"moved{i}"); i += 1
threads = [threading.Thread(target=churn)]
for x in threads: x.start()
for _ in range(5):
    seen = [n for n in os.listdir(".") if n.startswith("keep")]
    print(len(seen), len(set(seen)))
stop = True
for x in threads: x.join()
for e in os.scandir("."):
    assert e.inode() == os.stat(e.name).st_ino, (e.name, e.inode(), os.stat(e.name).st_ino)
for n in os.listdir("."): os.unlink(n)
print(os.listdir("."))
PY
        cd .. && rmdir many && echo removed"#,
    );
    // Names that databases use, on files that are none.
    script(
        t,
        dir,
        "companions of no database",
        r#"
        echo text >n; echo w >n-wal; echo j >n-journal; echo s >n-shm; echo p >n-pos; echo l >n-lock; cat n n-wal n-journal n-shm n-pos n-lock
        echo more >>n; : >n-journal; : >n-wal; echo w2 >n-wal; cat n n-wal; mv n-wal n2-wal; rm n-journal; mv n n3; ln n3 n4; cat n4; rm n3; cat n4
        ls n*; rm n*; ls n*"#,
    );
}

fn compare(fuse_keys: &str) {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), fuse_keys);
    type Part = (&'static str, fn(&Path, &mut Transcript));
    let parts: [Part; 4] = [
        ("names", names_and_links),
        ("attributes", attributes),
        ("contents", contents),
        ("programs", programs),
    ];
    let mut wrong = String::new();
    for (name, part) in parts {
        let run = |place: PathBuf| {
            fs::create_dir_all(&place).unwrap();
            let mut t = Transcript(String::new());
            part(&place, &mut t);
            t.0
        };
        let (want, got) = (
            run(dir.path().join("plain").join(name)),
            run(node.path(name)),
        );
        if std::env::var_os("SHOW_TRANSCRIPT").is_some() {
            eprintln!("{want}");
        }
        for (want, got) in want
            .lines()
            .zip(got.lines())
            .filter(|(w, g)| w != g)
            .take(10)
        {
            writeln!(
                wrong,
                "{name}:\n  in a directory: {want}\n  in the mount:   {got}"
            )
            .unwrap();
        }
        if want.lines().count() != got.lines().count() {
            writeln!(wrong, "{name}: in the mount:\n{got}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let log = node.log();
    assert!(!log.contains("ERROR") && !log.contains("panic"), "{log}");
}

#[test]
fn ordinary_files_behave_as_in_a_plain_directory() {
    compare("");
}

#[test]
fn ordinary_files_behave_the_same_without_passthrough() {
    compare(", passthrough: \"off\"");
}

/// User and group of a program that is not the daemon's.
const NOBODY: u32 = 65534;

fn open_to_all(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs a script as another user; returns what it prints.
fn as_nobody(dir: &Path, text: &str) -> String {
    use std::os::unix::process::CommandExt;
    let out = Command::new("bash")
        .args(["-c", text, "bash"])
        .current_dir("/")
        .env("LC_ALL", "C")
        .env("DIR", dir)
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = [out.stdout, out.stderr].concat();
    String::from_utf8_lossy(&text).replace(&dir.display().to_string(), "DIR")
}

const MODES: &str = r#"
    umask 022; mkdir own sticky group secret setgid; chown 65534:65534 own; chmod 1777 sticky; chown 0:65534 group; chmod 770 group
    chmod 700 secret; echo s >secret/f; chmod 644 secret/f; chown 0:65534 setgid; chmod 2777 setgid
    for m in 600 640 644 666 755; do echo $m >f$m; chmod $m f$m; echo $m >g$m; chmod $m g$m; chown 0:65534 g$m; done
    echo root >sticky/roots; chmod 666 sticky/roots"#;

const TRIES: &str = r#"
    cd "$DIR"; umask 002; id -u; for f in f* g*; do cat $f; (echo more >>$f) && echo wrote $f; test -x $f && echo x $f; done 2>&1
    cat secret/f; ls secret; echo hi >own/new; mkdir own/sub; ln -s x own/link; mkfifo own/p; stat -c '%n %u:%g %a' own own/*
    echo mine >sticky/mine; echo more >>sticky/roots && echo wrote; rm -f sticky/roots; mv sticky/roots sticky/x; rm sticky/mine && echo removed
    echo g >group/g; stat -c '%n %u:%g %a' group/g; echo x >setgid/f; mkdir setgid/d; stat -c '%n %u:%g %a' setgid/f setgid/d
    chmod 777 f644; chown 65534 f644; touch -d 2001-01-01 f644; touch f666 && echo touched; chmod 600 own/new && stat -c %a own/new
    echo no >here; mkdir nodir; rm -f f666; mv f666 f667; ln f666 own/hard; truncate -s 0 f644; : >own/new; ls own"#;

#[test]
fn other_users_get_what_the_modes_say() {
    if cannot_mount() {
        return;
    }
    for fuse_keys in [
        ", allow-other: true",
        ", allow-other: true, passthrough: \"off\"",
    ] {
        let dir = tempfile::tempdir().unwrap();
        open_to_all(dir.path());
        let primary = Node::primary(dir.path(), fuse_keys);
        let replica = Node::replica(dir.path(), "replica", &primary, "");
        let plain = dir.path().join("plain");
        fs::create_dir(&plain).unwrap();
        let run = |place: &Path| {
            let mut t = Transcript(String::new());
            script(&mut t, place, "modes", MODES);
            t.0 + &as_nobody(place, TRIES)
        };
        let (want, got) = (run(&plain), run(&primary.path("")));
        assert!(
            want.contains("Permission denied") && want.contains("own/new 65534:65534 664"),
            "{want}"
        );
        for (want, got) in want.lines().zip(got.lines()) {
            assert_eq!(want, got, "{fuse_keys}");
        }
        assert_eq!(want, got);
        if Command::new("sqlite3").arg("-version").output().is_err() {
            eprintln!("skipped: sqlite3 is not here");
            continue;
        }
        let said = as_nobody(
            &primary.path("own"),
            r#"cd "$DIR"; for m in wal delete; do sqlite3 -cmd ".timeout 9000" $m.db "pragma journal_mode=$m" 'create table t(id integer primary key, v)' \
               'insert into t(v) values(1),(2)' 'select count(*) from t'; for i in 1 2 3; do sqlite3 -cmd ".timeout 9000" $m.db 'insert into t(v) select v from t'; done
               stat -c '%n %u:%g %a' $m.db; done; sqlite3 ../roots.db 'insert into t values(2)'"#,
        );
        assert_eq!(
            said,
            "wal\n2\nwal.db 65534:65534 644\ndelete\n2\ndelete.db 65534:65534 644\n\
             Error: unable to open database \"../roots.db\": unable to open database file\n"
        );
        for mode in ["wal", "delete"] {
            assert_same(&primary, &replica, &format!("own/{mode}.db"));
        }
        // What root makes, others read as its mode says, and cannot write.
        let db = primary.open("roots.db");
        db.execute_batch("CREATE TABLE t(x); INSERT INTO t VALUES(1)")
            .unwrap();
        let said = as_nobody(
            &primary.path(""),
            r#"cd "$DIR"; sqlite3 roots.db 'select * from t'; sqlite3 roots.db 'insert into t values(2)'; cat roots.db-pos | wc -c"#,
        );
        assert!(
            said.starts_with("1\n34\n") && said.contains("readonly"),
            "{said}"
        );
        assert_same(&primary, &replica, "roots.db");
    }
}

#[test]
fn without_allow_other_the_mount_is_its_users_alone() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    open_to_all(dir.path());
    let node = Node::primary(dir.path(), "");
    fs::write(node.path("f"), "x").unwrap();
    let said = as_nobody(
        &node.path(""),
        r#"ls "$DIR"; cat "$DIR/f"; echo x >"$DIR/g"; test -e "$DIR/f" || echo none"#,
    );
    assert_eq!(said.matches("Permission denied").count(), 3, "{said}");
    assert!(said.starts_with("none\n"), "{said}");
    // The daemon's user asks `access`, runs programs, and is refused to run what is none.
    let text = r#"printf '#!/bin/sh\necho script\n' >s; cp "$(command -v true)" b; echo data >d; chmod 755 s b; chmod 644 d; mkdir dir
        for f in s b d dir none; do for t in e f d r w x s; do test -$t $f && echo "$f -$t"; done; done
        ./s; ./b && echo ran; ./d; echo $?; chmod 444 d; test -w d; echo $?; chmod 000 s; ./s; echo $?; chmod 111 s b; ./b && echo ran; cd dir && pwd | wc -l"#;
    let (mut want, mut got) = (Transcript(String::new()), Transcript(String::new()));
    fs::create_dir(dir.path().join("plain")).unwrap();
    script(&mut want, &dir.path().join("plain"), "access", text);
    script(&mut got, &node.path(""), "access", text);
    assert_eq!(want.0.trim(), got.0.trim());
}

#[test]
fn a_pipe_in_the_mount_stops_nothing() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let mut t = Transcript(String::new());
    script(
        &mut t,
        &primary.path(""),
        "pipes",
        "mkfifo pipe pipe.db pipe.db-wal; mkdir d; mkfifo d/pipe; mv d e; mv e/pipe e/p2; ls",
    );
    let write = |primary: &Node| {
        let db = primary.open("a.db");
        db.query_row("PRAGMA journal_mode=wal", [], |_| Ok(()))
            .unwrap();
        db.execute_batch("CREATE TABLE IF NOT EXISTS t(x); INSERT INTO t VALUES(1)")
            .unwrap();
    };
    write(&primary);
    assert_same(&primary, &replica, "a.db");
    for end in [libc::SIGTERM, libc::SIGKILL] {
        primary.signal(end);
        primary.launch();
        write(&primary);
        assert_same(&primary, &replica, "a.db");
    }
}

fn litefs(dir: &Path, args: &str) -> (Option<i32>, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_litefs"))
        .args(args.split_whitespace())
        .current_dir(dir)
        .env("NO_COLOR", "1")
        .env("HOME", dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = [out.stdout, out.stderr].concat();
    (
        out.status.code(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

#[test]
fn what_keeps_a_node_from_starting_is_told() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let node = Node::primary(at, "");
    fs::write(at.join("file"), "").unwrap();
    let config = |data: &str, mnt: &str, port: u16, more: &str| {
        let at = at.display();
        let text = format!(
            "data: {{dir: {at}/{data}}}\nfuse: {{dir: {at}/{mnt}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\nlease: {{type: static}}\n{more}"
        );
        fs::write(dir.path().join("c.yml"), text).unwrap();
    };
    let refused = |code, wanted: &[&str]| {
        let (end, said) = litefs(at, "mount -config c.yml");
        assert_eq!(end, Some(code), "{said}");
        for want in wanted {
            assert!(said.contains(want), "{want}: {said}");
        }
        assert!(
            !said.contains("panicked") && !said.contains("{ host"),
            "{said}"
        );
    };
    config("d", "m", 0, "dta: {dir: x}\n");
    refused(2, &["c.yml", "line 5", "`dta`", "did you mean `data`"]);
    config("d", "m", 0, "log: {formt: text}\n");
    refused(2, &["line 5", "did you mean `log.format`"]);
    config("d", "m", 0, "log: {format: [\n");
    refused(2, &["c.yml", "line"]);
    config("d", "d/m", 0, "");
    refused(2, &["fuse.dir", "data.dir"]);
    config("d", "file", 0, "");
    refused(1, &["fuse.dir", "/file is not a directory"]);
    config("file", "m", 0, "");
    refused(1, &["data.dir", "/file"]);
    config("d", "m", node.port, "");
    refused(
        1,
        &["http.addr 127.0.0.1:", "in use", "set another http.addr"],
    );
    config("d", "primary/mnt", 0, "");
    refused(
        1,
        &["primary/mnt is already a live mount", "stop the process"],
    );
    config("primary/data", "m", 0, "");
    refused(
        1,
        &[
            "primary/data is in use by another litefs",
            "another data.dir",
        ],
    );
    config("d", "m", 0, "exec: /no/such/program\n");
    refused(1, &["start program `/no/such/program`", "No such file"]);
    let (end, said) = litefs(at, "mount -config none.yml");
    assert!(
        end == Some(2) && said.contains("none.yml: No such file"),
        "{said}"
    );
    let (end, said) = litefs(at, "mount");
    if !Path::new("/etc/litefs.yml").exists() {
        assert!(end == Some(2) && said.contains("-config PATH"), "{said}");
    }
    for flag in ["version", "-version", "--version"] {
        let (end, said) = litefs(at, flag);
        assert!(end == Some(0) && said.starts_with("litefs 0"), "{said}");
    }
    // None of them did anything to the one that runs, or left a mount.
    fs::write(node.path("still"), "here").unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let here = at.display().to_string();
    assert_eq!(
        mounts.lines().filter(|l| l.contains(&here)).count(),
        1,
        "{mounts}"
    );
}

#[test]
fn databases_go_in_and_out_by_the_command_line() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let primary = Node::primary(at, "");
    let replica = Node::replica(at, "replica", &primary, "");
    let on = |node: &Node, command: &str, rest: &str| {
        litefs(
            at,
            &format!("{command} -url http://127.0.0.1:{} -name {rest}", node.port),
        )
    };
    let works = |(end, said): (Option<i32>, String)| assert_eq!(end, Some(0), "{said}");
    let fails = |(end, said): (Option<i32>, String), wanted: &[&str]| {
        assert_eq!(end, Some(1), "{said}");
        for want in wanted {
            assert!(said.contains(want), "{want}: {said}");
        }
        assert!(!said.contains("{\""), "{said}");
    };
    let count = |path: &Path| -> i64 {
        let db = rusqlite::Connection::open(path).unwrap();
        db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
            .unwrap()
    };
    // A file whose last transaction is in its WAL only, while a program has it open.
    let live = rusqlite::Connection::open(at.join("live.db")).unwrap();
    live.query_row("PRAGMA journal_mode=wal", [], |_| Ok(()))
        .unwrap();
    live.execute_batch("CREATE TABLE t(x); PRAGMA wal_checkpoint(TRUNCATE); PRAGMA wal_autocheckpoint=0; INSERT INTO t VALUES(1)").unwrap();
    works(on(&primary, "import", "new/a.db live.db"));
    assert_eq!(
        count(&primary.path("new/a.db")),
        1,
        "what was in the WAL came along"
    );
    assert_same(&primary, &replica, "new/a.db");
    live.execute_batch("INSERT INTO t VALUES(2)").unwrap();
    // Over an existing one, beside a reader with an open transaction and a writer at work.
    let reader = primary.open("new/a.db");
    reader.execute_batch("BEGIN; SELECT * FROM t").unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let writer = primary.open("new/a.db");
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                writer.execute_batch("INSERT INTO t VALUES(9)").unwrap();
            }
        });
        works(on(&primary, "import", "new/a.db live.db"));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let seen: i64 = reader
        .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap();
    assert_eq!(seen, 1, "the reader keeps its snapshot");
    reader.execute_batch("COMMIT").unwrap();
    assert_same(&primary, &replica, "new/a.db");
    // Another page size cannot come in beside open connections of a WAL; nothing happens then.
    let small = rusqlite::Connection::open(at.join("small.db")).unwrap();
    small
        .execute_batch("PRAGMA page_size=512; CREATE TABLE t(x); INSERT INTO t VALUES(1),(2),(3)")
        .unwrap();
    let before = primary.pos("new/a.db");
    fails(
        on(&primary, "import", "new/a.db small.db"),
        &["409", "import new/a.db", "database is locked", "close it"],
    );
    assert_eq!(primary.pos("new/a.db"), before);
    drop(reader);
    works(on(&primary, "import", "new/a.db small.db"));
    assert_eq!(count(&primary.path("new/a.db")), 3);
    assert_same(&primary, &replica, "new/a.db");
    let mode: String = primary
        .open("new/a.db")
        .query_row("PRAGMA journal_mode", [], |r| r.get(0))
        .unwrap();
    assert_eq!(mode, "wal", "the destination's mode stays");

    fs::write(at.join("text"), "no database").unwrap();
    fs::write(
        at.join("broken"),
        [&fs::read(at.join("small.db")).unwrap()[..512], &[7; 512]].concat(),
    )
    .unwrap();
    fails(
        on(&primary, "import", "new/a.db text"),
        &["400", "shorter than a header"],
    );
    fails(
        on(&primary, "import", "new/a.db broken"),
        &["400", "integrity_check"],
    );
    fails(
        on(&primary, "import", "new/a.db none"),
        &["read none", "No such file"],
    );
    fails(
        on(&primary, "import", "new/a.db ."),
        &["read .", "not an ordinary file"],
    );
    fails(
        on(&primary, "import", "new small.db"),
        &["400", "it is a directory"],
    );
    for name in [
        "new/a.db-wal",
        "x-journal",
        "x-shm",
        "new/a.db-pos",
        ".lag",
        ".primary",
        "../x",
        "/x",
        "a//b",
        &"n".repeat(248),
    ] {
        fails(
            on(&primary, "import", &format!("{name} small.db")),
            &["400", "cannot name a database"],
        );
    }
    // A client that sends everything before it looks for an answer is told as well.
    for _ in 0..20 {
        let mut client = std::net::TcpStream::connect(("127.0.0.1", primary.port)).unwrap();
        let body = vec![0; 512 << 10];
        write!(
            client,
            "POST /import?name=.lag HTTP/1.1\r\nHost: node\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .unwrap();
        client.write_all(&body).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("cannot name a database"), "{answer}");
    }
    fails(
        on(&replica, "import", "new/a.db small.db"),
        &["503", "not the primary", "ask the primary, primary"],
    );
    assert_eq!(count(&primary.path("new/a.db")), 3);

    for node in [&primary, &replica] {
        fs::write(at.join("out.db-wal"), "of an old database").unwrap();
        works(on(node, "export", "new/a.db out.db"));
        assert_eq!(count(&at.join("out.db")), 3);
        fails(
            on(node, "export", "none.db out2.db"),
            &["404", "none.db does not exist"],
        );
        fails(on(node, "export", "new/a.db ."), &[". is a directory"]);
        fails(
            on(node, "export", "new/a.db none/out.db"),
            &["write none/out.db", "No such file"],
        );
    }
    let (end, said) = litefs(at, "export -url http://127.0.0.1:1 -name x y");
    assert!(
        end == Some(1) && said.contains("connect to http://127.0.0.1:1"),
        "{said}"
    );
    let left: Vec<_> = names(at)
        .into_iter()
        .filter(|n| n.ends_with(b".tmp") || n == b"y")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn programs_start_when_the_node_is_ready_and_end_it_with_their_code() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let app = dir.path().join("app");
    fs::write(
        &app,
        format!("#!/bin/bash\ntest -f {m}/.lag && echo here >{o}.ls; trap 'echo told >>{o}; exit 7' TERM; trap 'echo hup >>{o}' HUP; echo up >>{o}\nwhile :; do sleep 0.05; done\n",
            m = dir.path().join("primary/mnt").display(), o = out.display()),
    )
    .unwrap();
    fs::set_permissions(&app, fs::Permissions::from_mode(0o755)).unwrap();
    let exec = |last: &str| crate::harness::Options {
        keys: format!(
            "exec:\n  - {{cmd: \"sh -c 'echo first >>{o}'\"}}\n  - {{cmd: \"sh -c 'echo candidate >>{o}'\", if-candidate: true}}\n  - {{cmd: \"{last}\"}}\n",
            o = out.display()
        ),
        ..Default::default()
    };
    let read = || fs::read_to_string(&out).unwrap_or_default();
    let mut primary = Node::primary_with(dir.path(), exec(&app.display().to_string()));
    wait_for("the program", || read().ends_with("up\n"));
    assert_eq!(read(), "first\ncandidate\nup\n");
    assert_eq!(
        fs::read_to_string(dir.path().join("out.ls")).unwrap(),
        "here\n",
        "it saw the mount"
    );
    let pid = i32::try_from(primary.child.as_ref().unwrap().id()).unwrap();
    // SAFETY: the child is ours and not yet waited for.
    unsafe { libc::kill(pid, libc::SIGHUP) };
    wait_for("the signal", || read().ends_with("hup\n"));

    // `run` waits for the node, and is then the program.
    let run = |rest: &str| {
        litefs(
            dir.path(),
            &format!("run -url http://127.0.0.1:{} {rest}", primary.port),
        )
    };
    fs::write(dir.path().join("three"), "exit 3").unwrap();
    assert_eq!(run("-promote -if-candidate -- sh three").0, Some(3));
    assert_eq!(run("-- false").0, Some(1));
    let (end, said) = run("-- /no/such");
    assert!(
        end == Some(1) && said.contains("start program `/no/such`"),
        "{said}"
    );
    let (end, said) = run("-with-halt-lock-on x -- true");
    assert!(
        end == Some(1) && said.contains("run the program on the primary"),
        "{said}"
    );

    // On a replica the entry for candidates is left out, and the code of a short program is the node's.
    fs::write(&out, "").unwrap();
    let mut replica = Node::replica_with(dir.path(), "replica", &primary, exec("sh -c 'exit 5'"));
    let code = replica.child.take().unwrap().wait().unwrap().code();
    assert_eq!((code, read().as_str()), (Some(5), "first\n"));
    assert!(!fuse::is_mounted(&replica.path("")).unwrap());

    terminate(pid);
    let code = primary.child.take().unwrap().wait().unwrap().code();
    assert_eq!(code, Some(7), "the program's code");
    assert!(read().ends_with("told\n"));
    assert!(!fuse::is_mounted(&primary.path("")).unwrap());
}

fn terminate(pid: i32) {
    // SAFETY: by value; the caller's child, not yet waited for.
    unsafe { libc::kill(pid, libc::SIGTERM) };
}

#[test]
fn a_node_ends_while_files_are_open_and_keeps_what_was_written() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let db = primary.open("a.db");
    db.query_row("PRAGMA journal_mode=wal", [], |_| Ok(()))
        .unwrap();
    db.execute_batch("CREATE TABLE t(x); INSERT INTO t VALUES(1)")
        .unwrap();
    let (file, mut inside) = (
        rw(&primary.path("f")),
        Command::new("sleep")
            .arg("60")
            .current_dir(primary.path(""))
            .spawn()
            .unwrap(),
    );
    file.write_all_at(b"kept", 0).unwrap();
    let pid = i32::try_from(primary.child.as_ref().unwrap().id()).unwrap();
    terminate(pid);
    let code = primary.child.take().unwrap().wait().unwrap().code();
    let is_mounted = fuse::is_mounted(&primary.path("")).unwrap();
    inside.kill().unwrap();
    inside.wait().unwrap();
    // The mount of an open database stays: its next journal must not be made in the bare directory.
    assert_eq!((code, is_mounted), (Some(0), true), "{}", primary.log());
    assert!(
        primary.log().contains("programs have databases open"),
        "{}",
        primary.log()
    );
    // What is left open answers with an error, and does not hang.
    assert!(file.metadata().and_then(|_| file.sync_all()).is_err());
    drop((file, db));
    primary.launch();
    assert_eq!(fs::read(primary.path("f")).unwrap(), b"kept");
    let count: i64 = primary
        .open("a.db")
        .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap();
    assert_eq!(count, 1);
    // The dead mount of a killed one is cleared away.
    primary.kill();
    assert_eq!(
        File::open(primary.path("f")).unwrap_err().raw_os_error(),
        Some(libc::ENOTCONN)
    );
    primary.launch();
    assert!(
        primary
            .log()
            .contains("removed the mount of a daemon that was killed")
    );
    assert_eq!(fs::read(primary.path("f")).unwrap(), b"kept");
}
