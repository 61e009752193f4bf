//! The table of inodes: which number the kernel knows a file by, which names it has, and how it is served.
//!
//! A file's number is that of its backing file where this is free, so that it is the same in a listing, after the
//! kernel forgot the file, and after a restart. Otherwise (the backing number was used again while the kernel still
//! holds the file that had it before; a file of another device) it is one that is never used twice.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuser::BackingId;
use parking_lot::{Mutex, RwLock};

use crate::volume::Serve;

/// Identity of a file on the backing file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct BackingKey {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
}

/// One file as the kernel knows it.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) ino: u64,
    pub(crate) key: Option<BackingKey>,
    names: RwLock<Names>,
    lookups: AtomicU64,
    pub(crate) is_virtual: bool,
    pub(crate) open: Mutex<OpenState>,
}

/// The paths of a file, as far as the kernel has asked for them.
#[derive(Debug)]
struct Names {
    current: PathBuf,
    /// Hard links that `current` may be replaced by, should it go.
    others: Vec<PathBuf>,
    /// `current` was the last name, and may by now be another file's.
    is_gone: bool,
}

/// What the open handles of an inode share (INV-FUSE-1).
#[derive(Debug, Default)]
pub(crate) struct OpenState {
    pub(crate) handle_count: u32,
    pub(crate) serve: Option<Serve>,
    pub(crate) file: Option<Arc<File>>,
    pub(crate) file_writable: bool,
    pub(crate) backing: Option<Arc<BackingId>>,
}

impl Node {
    /// Returns the file's name, or its last one if it has none any more.
    pub(crate) fn path(&self) -> PathBuf {
        self.names.read().current.clone()
    }

    /// Returns a name by which the file can be reached, if there is one.
    pub(crate) fn live_path(&self) -> Option<PathBuf> {
        let names = self.names.read();
        (!names.is_gone).then(|| names.current.clone())
    }

    pub(crate) fn child(&self, name: &OsStr) -> PathBuf {
        self.names.read().current.join(name)
    }

    pub(crate) fn open_file(&self) -> Option<Arc<File>> {
        self.open.lock().file.clone()
    }

    fn found_at(&self, path: &Path, link_count: u64) {
        {
            let names = self.names.read();
            if names.current == path && names.others.is_empty() && !names.is_gone {
                return;
            }
        }
        let mut names = self.names.write();
        names.others.retain(|other| other != path);
        if names.current != path {
            let before = std::mem::replace(&mut names.current, path.to_owned());
            if !names.is_gone {
                names.others.push(before);
            }
        }
        if link_count <= 1 {
            names.others.clear();
        }
        names.is_gone = false;
    }

    fn moved(&self, from: &Path, to: &Path) {
        let mut names = self.names.write();
        if !names.is_gone {
            move_path(&mut names.current, from, to);
        }
        for other in &mut names.others {
            move_path(other, from, to);
        }
    }
}

/// All inodes of a mount.
#[derive(Debug)]
pub(crate) struct Inodes {
    tables: RwLock<Tables>,
}

#[derive(Debug)]
struct Tables {
    by_ino: HashMap<u64, Arc<Node>>,
    by_backing: HashMap<BackingKey, u64>,
    virtuals: HashMap<PathBuf, u64>,
    device: u64,
    next: u64,
}

pub(crate) const ROOT: u64 = 1;
/// First number that no backing file has.
const OWN_NUMBERS: u64 = 1 << 63;

impl Inodes {
    pub(crate) fn new(root: BackingKey) -> Inodes {
        let mut tables = Tables {
            by_ino: HashMap::new(),
            by_backing: HashMap::from([(root, ROOT)]),
            virtuals: HashMap::new(),
            device: root.dev,
            next: OWN_NUMBERS,
        };
        tables.put(ROOT, Path::new(""), Some(root));
        Inodes {
            tables: RwLock::new(tables),
        }
    }

    pub(crate) fn get(&self, ino: u64) -> Option<Arc<Node>> {
        self.tables.read().by_ino.get(&ino).cloned()
    }

    /// Finds or makes the node of a backing file of `link_count` names and counts one lookup of it.
    pub(crate) fn intern(&self, key: BackingKey, path: &Path, link_count: u64) -> Arc<Node> {
        let mut t = self.tables.write();
        if let Some(node) = t.of_backing(key) {
            node.lookups.fetch_add(1, Ordering::Relaxed);
            node.found_at(path, link_count);
            return node;
        }
        let is_free = key.dev == t.device
            && (ROOT + 1..OWN_NUMBERS).contains(&key.ino)
            && !t.by_ino.contains_key(&key.ino);
        let ino = if is_free { key.ino } else { t.own_number() };
        let node = t.put(ino, path, Some(key));
        t.by_backing.insert(key, node.ino);
        node
    }

    pub(crate) fn intern_virtual(&self, path: &Path) -> Arc<Node> {
        let mut t = self.tables.write();
        if let Some(node) = t
            .virtuals
            .get(path)
            .and_then(|ino| t.by_ino.get(ino))
            .cloned()
        {
            node.lookups.fetch_add(1, Ordering::Relaxed);
            return node;
        }
        let ino = t.own_number();
        let node = t.put(ino, path, None);
        t.virtuals.insert(path.to_owned(), node.ino);
        node
    }

    pub(crate) fn forget(&self, ino: u64, count: u64) {
        if ino == ROOT {
            return;
        }
        let mut t = self.tables.write();
        let Some(node) = t.by_ino.get(&ino).cloned() else {
            return;
        };
        let before = node.lookups.fetch_sub(count, Ordering::Relaxed);
        if before > count {
            return;
        }
        t.by_ino.remove(&ino);
        match node.key {
            Some(key) if t.by_backing.get(&key) == Some(&ino) => {
                t.by_backing.remove(&key);
            }
            Some(_) => {}
            None => {
                t.virtuals.remove(&node.names.read().current);
            }
        }
    }

    /// Forgets which backing file a node stood for: its last name is gone, and the number may be used again.
    pub(crate) fn orphan(&self, key: BackingKey) {
        let mut t = self.tables.write();
        if let Some(node) = t.of_backing(key) {
            node.names.write().is_gone = true;
            t.by_backing.remove(&key);
        }
    }

    /// Learns that a file has lost one of several names; `is_same` tells whether another still leads to it.
    pub(crate) fn lost_name(&self, key: BackingKey, path: &Path, is_same: impl Fn(&Path) -> bool) {
        let Some(node) = self.find_backing(key) else {
            return;
        };
        let mut names = node.names.write();
        names.others.retain(|other| other != path);
        if names.current != path {
            return;
        }
        while let Some(other) = names.others.pop() {
            if is_same(&other) {
                names.current = other;
                return;
            }
        }
        // The kernel knows none of its names, and will look one up before it asks for more.
        names.is_gone = true;
    }

    /// Gives a file another path, and what is below it if it is a directory.
    pub(crate) fn renamed(&self, moved: &Moved, from: &Path, to: &Path) {
        self.on_moved(moved, from, |node| node.moved(from, to));
    }

    /// Swaps the paths of two files, and of what is below them.
    pub(crate) fn exchanged(&self, a: (&Moved, &Path), b: (&Moved, &Path)) {
        // By way of a path that nothing has.
        let aside = Path::new("\0");
        self.on_moved(a.0, a.1, |node| node.moved(a.1, aside));
        self.on_moved(b.0, b.1, |node| node.moved(b.1, a.1));
        self.on_moved(a.0, aside, |node| node.moved(aside, b.1));
    }

    fn on_moved(&self, moved: &Moved, from: &Path, act: impl Fn(&Node)) {
        if !moved.is_dir {
            if let Some(node) = self.find_backing(moved.key) {
                act(&node);
            }
            return;
        }
        // What a virtual file is depends on its path, which the kernel looks up each time.
        for node in self.tables.read().by_ino.values() {
            if !node.is_virtual && node.names.read().is_below(from) {
                act(node);
            }
        }
    }

    pub(crate) fn find_backing(&self, key: BackingKey) -> Option<Arc<Node>> {
        self.tables.read().of_backing(key)
    }
}

/// A file that gets another path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moved {
    pub(crate) key: BackingKey,
    pub(crate) is_dir: bool,
}

impl Names {
    fn is_below(&self, dir: &Path) -> bool {
        self.current.starts_with(dir) || self.others.iter().any(|other| other.starts_with(dir))
    }
}

impl Tables {
    fn of_backing(&self, key: BackingKey) -> Option<Arc<Node>> {
        let ino = self.by_backing.get(&key)?;
        self.by_ino.get(ino).cloned()
    }

    fn own_number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn put(&mut self, ino: u64, path: &Path, key: Option<BackingKey>) -> Arc<Node> {
        let node = Arc::new(Node {
            ino,
            key,
            names: RwLock::new(Names {
                current: path.to_owned(),
                others: Vec::new(),
                is_gone: false,
            }),
            lookups: AtomicU64::new(1),
            is_virtual: key.is_none(),
            open: Mutex::default(),
        });
        self.by_ino.insert(ino, node.clone());
        node
    }
}

fn move_path(path: &mut PathBuf, from: &Path, to: &Path) {
    if let Ok(rest) = path.strip_prefix(from) {
        *path = if rest.as_os_str().is_empty() {
            to.to_owned()
        } else {
            to.join(rest)
        };
    }
}
