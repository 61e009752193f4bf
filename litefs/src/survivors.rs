//! Programs that outlive a daemon: they go on with the descriptors that the kernel serves, unseen by the next daemon.
//!
//! Kernel passthrough needs no daemon, so a program whose daemon was killed can still commit, and its locks are not those
//! of programs that use the next mount. Both writing to one file would destroy it. So before the next mount:
//!
//! 1. the old files are made immutable, which ends writes through open descriptors: a commit fails with `SQLITE_IOERR`;
//! 2. copies take their places, and what was committed until then is captured from them;
//! 3. while such a program keeps a descriptor, it may not remove the companions of databases in the new mount: SQLite
//!    does, when it closes, by the names that now stand for the new files.
//!
//! What they read is ended as well (`frozen`): they would go on seeing the past.
//!
//! | name | rule |
//! |---|---|
//! | INV-SURV-1 | no inode of a database is written through two mounts |
//! | INV-SURV-2 | what a survivor was told is committed is in the files that the new mount shows |
//! | INV-SURV-3 | once the next mount is there, no read transaction begins on files of before |
//!
//! Where files cannot be made immutable (not ext4, or no CAP_LINUX_IMMUTABLE) the node waits for the programs to end.

mod frozen;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::db::paths::with_suffix;
use crate::store::is_database;

/// A mount as the kernel names it in `/proc`, while the machine runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// Boot of the machine.
    pub boot_id: String,
    /// Number in `mountinfo` and `fdinfo`.
    pub mount_id: u64,
    /// `major:minor`, the same for clones of the mount in other namespaces.
    pub device: String,
    /// Process that served it.
    #[serde(default)]
    pub daemon: i32,
    /// Programs with files of it open are cut off from the databases: copies took the places of what they hold.
    #[serde(default)]
    pub is_cut_off: bool,
}

impl MountRecord {
    /// Describes the FUSE mount at a path, served by a process (0: not known); nothing if there is none.
    #[must_use]
    pub fn of(mount_point: &Path, boot_id: String, daemon: i32) -> Option<MountRecord> {
        let mount_point = std::path::absolute(mount_point).ok()?;
        let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
        // The last of several is on top.
        let mount = parse_mountinfo(&table)
            .filter(|m| m.kind.starts_with("fuse") && m.at == mount_point)
            .last()?;
        Some(MountRecord {
            boot_id,
            mount_id: mount.id,
            device: mount.device.to_owned(),
            daemon,
            is_cut_off: false,
        })
    }

    /// Returns the number of its connection, as the kernel counts them.
    #[must_use]
    pub fn connection(&self) -> Option<u32> {
        self.device.strip_prefix("0:")?.parse().ok()
    }

    /// Aborts the connection of a daemon that was killed and cannot end, since a thread of it waits for itself.
    pub fn abort_if_dead(&self) {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.daemon)).unwrap_or_default();
        let is_zombie = stat.split_once(" (litefs) Z").is_some();
        if let Some(connection) = self.connection()
            && is_zombie
        {
            tracing::warn!(
                daemon = self.daemon,
                connection,
                "aborting the connection of a daemon that was killed"
            );
            if let Err(error) = fuse::abort_connection(connection) {
                tracing::error!(%error, "cannot abort the connection of a daemon that was killed");
            }
        }
    }
}

/// A program that has a file of a former mount open.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Survivor {
    /// Process id.
    pub pid: i32,
    /// Name of the program.
    pub program: String,
    /// The file, relative to the mount.
    pub path: PathBuf,
}

impl std::fmt::Display for Survivor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} (pid {}): {}",
            self.program,
            self.pid,
            self.path.display()
        )
    }
}

/// Programs that outlived a former daemon, as the running node knows them.
#[derive(Debug, Default)]
pub struct Survivors {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    mounts: Vec<MountRecord>,
    pids: BTreeSet<i32>,
    /// Journals in the new mount, and the processes that write them.
    journals: HashMap<PathBuf, i32>,
}

impl Survivors {
    /// Remembers programs and the mounts whose descriptors they have.
    pub fn remember(&self, mounts: &[MountRecord], found: &[Survivor]) {
        let mut known = self.known.lock();
        known.mounts = mounts.to_vec();
        known.pids = found.iter().map(|s| s.pid).collect();
    }

    /// Learns who made or opened a journal, to write it: a transaction of that program's in the new mount ends by
    /// removing it.
    pub fn journal_used(&self, path: &Path, thread: u32) {
        let mut known = self.known.lock();
        if !known.pids.is_empty()
            && let Some(pid) = process_of(thread)
        {
            known.journals.insert(path.to_owned(), pid);
        }
    }

    /// Returns the program that a thread is of, if it outlived a daemon, still has a descriptor to show for it, and is
    /// about to remove a companion of a database that it does not use in the new mount.
    #[must_use]
    pub fn may_not_remove(&self, path: &Path, thread: u32) -> Option<Survivor> {
        let mut known = self.known.lock();
        if known.pids.is_empty() {
            return None;
        }
        let pid = process_of(thread)?;
        if !known.pids.contains(&pid) || known.journals.remove(path) == Some(pid) {
            return None;
        }
        let found = files_of(pid, &known.mounts, Path::new("/"), &mut HashMap::new());
        if found.is_empty() {
            known.pids.remove(&pid);
        }
        found.into_iter().next()
    }
}

fn process_of(thread: u32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

/// Keeps those whose file is of a database.
#[must_use]
pub fn of_databases(found: Vec<Survivor>, files: &Path) -> Vec<Survivor> {
    let is_one = |s: &Survivor| {
        let main = files.join(main_of(&s.path));
        is_database(&main) || with_suffix(&main, "-wal").exists()
    };
    found.into_iter().filter(is_one).collect()
}

/// Finds programs with files of former mounts open.
#[must_use]
pub fn find(mounts: &[MountRecord], mount_point: &Path) -> Vec<Survivor> {
    let mut found = Vec::new();
    if mounts.is_empty() {
        return found;
    }
    let own = std::process::id();
    let mut namespaces = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|s| s.parse().ok());
        if let Some(pid) = pid.filter(|pid: &i32| u32::try_from(*pid) != Ok(own)) {
            found.extend(files_of(pid, mounts, mount_point, &mut namespaces));
        }
    }
    found.sort();
    found.dedup();
    found
}

/// Mount ids of the mounts in question, by mount namespace.
type Namespaces = HashMap<PathBuf, BTreeSet<u64>>;

fn files_of(
    pid: i32,
    mounts: &[MountRecord],
    mount_point: &Path,
    namespaces: &mut Namespaces,
) -> Vec<Survivor> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let Ok(namespace) = fs::read_link(proc.join("ns/mnt")) else {
        return Vec::new();
    };
    let ids = namespaces
        .entry(namespace)
        .or_insert_with(|| ids_in(&proc, mounts));
    let mut found = Vec::new();
    for entry in fs::read_dir(proc.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        if !target.is_absolute() {
            continue;
        }
        let info = proc.join("fdinfo").join(entry.file_name());
        let info = fs::read_to_string(info).unwrap_or_default();
        let id = info
            .lines()
            .find_map(|l| l.strip_prefix("mnt_id:"))
            .and_then(|id| id.trim().parse().ok());
        if id.is_some_and(|id| ids.contains(&id)) {
            let program = fs::read_to_string(proc.join("comm")).unwrap_or_default();
            // A mount that was detached is its own root.
            let path = target
                .strip_prefix(mount_point)
                .or_else(|_| target.strip_prefix("/"))
                .unwrap_or(&target)
                .to_owned();
            found.push(Survivor {
                pid,
                program: program.trim_end().to_owned(),
                path,
            });
        }
    }
    found
}

/// Returns the ids by which a process knows the mounts: a detached one keeps its id, but is in no table.
fn ids_in(proc: &Path, mounts: &[MountRecord]) -> BTreeSet<u64> {
    let table = fs::read_to_string(proc.join("mountinfo")).unwrap_or_default();
    let mut ids: BTreeSet<u64> = mounts.iter().map(|m| m.mount_id).collect();
    for mount in parse_mountinfo(&table) {
        let is_one =
            mount.kind.starts_with("fuse") && mounts.iter().any(|m| m.device == mount.device);
        if is_one {
            ids.insert(mount.id);
        } else {
            // The number was given out again.
            ids.remove(&mount.id);
        }
    }
    ids
}

struct MountInfo<'a> {
    id: u64,
    device: &'a str,
    at: PathBuf,
    kind: &'a str,
}

/// Parses `mountinfo`; see proc(5).
fn parse_mountinfo(table: &str) -> impl Iterator<Item = MountInfo<'_>> {
    table.lines().filter_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        let mut head = head.split(' ');
        let id = head.next()?.parse().ok()?;
        let device = head.nth(1)?;
        let at = head.nth(1)?;
        let at = at
            .replace("\\040", " ")
            .replace("\\011", "\t")
            .replace("\\012", "\n")
            .replace("\\134", "\\");
        Some(MountInfo {
            id,
            device,
            at: at.into(),
            kind: tail.split(' ').next()?,
        })
    })
}

/// Why programs could not be cut off.
#[derive(Debug, thiserror::Error)]
pub enum CutOffError {
    /// Files cannot be made immutable here, so the programs could go on writing.
    #[error("cannot make {path} immutable, which ends writes through open descriptors")]
    NotFenceable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be replaced.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl CutOffError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CutOffError {
        let path = path.to_owned();
        move |source| CutOffError::Io { what, path, source }
    }
}

/// Cuts programs off from the databases that they have open: puts copies in the files' places.
///
/// `marker` names a file that says, while this is under way, which files are immutable; [`resume`] undoes that after
/// an interruption. With `may_write` the programs may have written.
///
/// # Errors
/// Nothing is lost by any: at worst a file stays immutable until [`resume`].
pub fn cut_off(
    found: &[Survivor],
    files: &Path,
    tmp: &Path,
    marker: &Path,
    may_write: bool,
) -> Result<(), CutOffError> {
    let mains: BTreeSet<PathBuf> = found.iter().map(|s| main_of(&s.path)).collect();
    for main in mains {
        let main = files.join(main);
        let names = ["", "-wal", "-journal"].map(|suffix| with_suffix(&main, suffix));
        let names: Vec<PathBuf> = names.into_iter().filter(|p| p.is_file()).collect();
        let text: Vec<String> = names.iter().map(|p| p.display().to_string()).collect();
        write_synced(marker, text.join("\n").as_bytes())
            .map_err(CutOffError::io("write", marker))?;
        let result = replace_all(&names, tmp, may_write);
        if result.is_err() {
            resume(marker);
            result?;
        }
        // Its mapping belongs to the old mount; the next opener makes another.
        let shm = with_suffix(&main, "-shm");
        let index = File::options().read(true).write(true).open(&shm);
        match fs::remove_file(&shm) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(CutOffError::io("remove", &shm)(e));
            }
            _ => {}
        }
        if let Ok(index) = index {
            frozen::end_by_index(&index).map_err(CutOffError::io("write", &shm))?;
        }
        fs::remove_file(marker).map_err(CutOffError::io("remove", marker))?;
    }
    Ok(())
}

/// Makes files writable again that an interrupted [`cut_off`] left immutable.
pub fn resume(marker: &Path) {
    let Ok(text) = fs::read_to_string(marker) else {
        return;
    };
    for path in text.lines().map(Path::new) {
        if let Ok(file) = File::open(path)
            && let Err(error) = set_immutable(&file, false)
        {
            tracing::error!(path = %path.display(), %error, "file may be immutable; run chattr -i on it");
        }
    }
    let _ = fs::remove_file(marker);
}

/// One file on its way to be replaced.
struct Old {
    path: PathBuf,
    file: File,
    stamp: (u64, i64, i64),
}

fn stamp(file: &File) -> io::Result<(u64, i64, i64)> {
    let m = file.metadata()?;
    Ok((m.len(), m.mtime(), m.mtime_nsec()))
}

fn replace_all(names: &[PathBuf], tmp: &Path, may_write: bool) -> Result<(), CutOffError> {
    let mut olds = Vec::new();
    for path in names {
        let mut how = File::options();
        how.read(true).write(main_of(path) == *path);
        let file = how.open(path).map_err(CutOffError::io("open", path))?;
        if may_write {
            fence(&file, path)?;
        }
        let stamp = stamp(&file).map_err(CutOffError::io("stat", path))?;
        olds.push(Old {
            path: path.clone(),
            file,
            stamp,
        });
    }
    let mut copies: BTreeMap<&Path, File> = BTreeMap::new();
    for old in &olds {
        let copy = tmp.join(format!("{:016x}", rand::random::<u64>()));
        let made = copy_file(&old.file, &copy).map_err(CutOffError::io("copy", &old.path))?;
        if may_write {
            // The name of an immutable file cannot be replaced.
            set_immutable(&old.file, false).map_err(CutOffError::io("unlock", &old.path))?;
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "the copy was synced, the directory is at the end"
        )]
        let renamed = fs::rename(&copy, &old.path);
        if may_write {
            fence(&old.file, &old.path)?;
        }
        renamed.map_err(CutOffError::io("replace", &old.path))?;
        copies.insert(&old.path, made);
    }
    for old in &olds {
        // Written in the moment in which it could be: nobody uses the copy yet.
        if stamp(&old.file).map_err(CutOffError::io("stat", &old.path))? != old.stamp
            && let Some(copy) = copies.get(old.path.as_path())
        {
            copy_into(&old.file, copy).map_err(CutOffError::io("copy", &old.path))?;
        }
    }
    if let Some(dir) = names.first().and_then(|p| p.parent()) {
        File::open(dir)
            .and_then(|d| d.sync_all())
            .map_err(CutOffError::io("sync directory", dir))?;
    }
    // Not before: after a power cut the name might stand for the old file.
    for old in olds.iter().filter(|old| main_of(&old.path) == old.path) {
        if let Some(copy) = copies.get(old.path.as_path()) {
            end_reads(old, copy, may_write)?;
        }
    }
    Ok(())
}

/// Ends the reading of a main file whose copy is in its place.
fn end_reads(old: &Old, copy: &File, may_write: bool) -> Result<(), CutOffError> {
    let io = |what| CutOffError::io(what, &old.path);
    let mut magic = [0; frozen::MAGIC_LEN];
    if copy.read_at(&mut magic, 0).map_err(io("read"))? < magic.len() {
        return Ok(()); // not yet a database
    }
    if may_write {
        set_immutable(&old.file, false).map_err(io("unlock"))?;
    }
    let ended = frozen::end_by_magic(&old.file);
    if may_write {
        fence(&old.file, &old.path)?;
    }
    ended.map_err(io("write"))?;
    // Written in the moment in which it could be, as above.
    if may_write && frozen::differ(&old.file, copy).map_err(io("read"))? {
        copy_into(&old.file, copy).map_err(io("copy"))?;
        copy.write_all_at(&magic, 0)
            .and_then(|()| copy.sync_all())
            .map_err(io("write"))?;
    }
    Ok(())
}

/// Ends writes to an inode, through descriptors that are open as well.
fn fence(file: &File, path: &Path) -> Result<(), CutOffError> {
    let not_fenceable = |source| CutOffError::NotFenceable {
        path: path.to_owned(),
        source,
    };
    let kind = rustix::fs::fstatfs(file)
        .map_err(|e| not_fenceable(e.into()))?
        .f_type;
    if kind != EXT4_MAGIC {
        // Others look at the flag when a file is opened, not at each write.
        return Err(not_fenceable(io::Error::other(
            "only ext4 looks at the flag at each write",
        )));
    }
    set_immutable(file, true).map_err(not_fenceable)
}

const EXT4_MAGIC: rustix::fs::FsWord = 0xef53;

fn set_immutable(file: &File, is_immutable: bool) -> io::Result<()> {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let mut flags = ioctl_getflags(file)?;
    flags.set(IFlags::IMMUTABLE, is_immutable);
    Ok(ioctl_setflags(file, flags)?)
}

fn copy_file(from: &File, to: &Path) -> io::Result<File> {
    let made = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(to)?;
    let m = from.metadata()?;
    made.set_permissions(fs::Permissions::from_mode(m.mode() & 0o7777))?;
    std::os::unix::fs::fchown(&made, Some(m.uid()), Some(m.gid()))?;
    copy_into(from, &made)?;
    Ok(made)
}

/// Makes `to` what `from` is, durably: by sharing blocks where the file system can.
fn copy_into(from: &File, to: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_err() {
        let len = from.metadata()?.len();
        to.set_len(len)?;
        let mut buf = vec![0; 1 << 20];
        let mut at = 0;
        while at < len {
            let n = from.read_at(&mut buf, at)?;
            if n == 0 {
                break;
            }
            to.write_all_at(&buf[..n], at)?;
            at += n as u64;
        }
    }
    to.sync_all()
}

/// Returns the database that a file belongs to: itself, unless it is named like a companion.
fn main_of(path: &Path) -> PathBuf {
    let text = path.to_string_lossy();
    let text = text.strip_suffix(" (deleted)").unwrap_or(&text);
    let main = ["-wal", "-shm", "-journal"]
        .into_iter()
        .find_map(|suffix| text.strip_suffix(suffix))
        .unwrap_or(text);
    main.into()
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
