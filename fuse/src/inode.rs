//! The table of inodes: which number the kernel knows a file by, and how it is served.

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
    path: RwLock<PathBuf>,
    lookups: AtomicU64,
    pub(crate) is_virtual: bool,
    pub(crate) open: Mutex<OpenState>,
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
    pub(crate) fn path(&self) -> PathBuf {
        self.path.read().clone()
    }

    pub(crate) fn child(&self, name: &OsStr) -> PathBuf {
        self.path.read().join(name)
    }

    pub(crate) fn open_file(&self) -> Option<Arc<File>> {
        self.open.lock().file.clone()
    }
}

/// All inodes of a mount. Numbers are never used twice.
#[derive(Debug)]
pub(crate) struct Inodes {
    tables: RwLock<Tables>,
}

#[derive(Debug)]
struct Tables {
    by_ino: HashMap<u64, Arc<Node>>,
    by_backing: HashMap<BackingKey, u64>,
    virtuals: HashMap<PathBuf, u64>,
    next: u64,
}

pub(crate) const ROOT: u64 = 1;

impl Inodes {
    pub(crate) fn new(root: BackingKey) -> Inodes {
        let node = Arc::new(Node {
            ino: ROOT,
            path: RwLock::new(PathBuf::new()),
            lookups: AtomicU64::new(1),
            is_virtual: false,
            open: Mutex::default(),
        });
        Inodes {
            tables: RwLock::new(Tables {
                by_ino: HashMap::from([(ROOT, node)]),
                by_backing: HashMap::from([(root, ROOT)]),
                virtuals: HashMap::new(),
                next: 2,
            }),
        }
    }

    pub(crate) fn get(&self, ino: u64) -> Option<Arc<Node>> {
        self.tables.read().by_ino.get(&ino).cloned()
    }

    /// Finds or makes the node of a backing file and counts one lookup of it.
    pub(crate) fn intern(&self, key: BackingKey, path: &Path) -> Arc<Node> {
        let mut t = self.tables.write();
        if let Some(node) = t
            .by_backing
            .get(&key)
            .and_then(|ino| t.by_ino.get(ino))
            .cloned()
        {
            node.lookups.fetch_add(1, Ordering::Relaxed);
            if *node.path.read() != path {
                *node.path.write() = path.to_owned();
            }
            return node;
        }
        let node = t.add(path, false);
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
        let node = t.add(path, true);
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
        if before <= count {
            t.by_ino.remove(&ino);
            t.by_backing.retain_not(ino);
            if node.is_virtual {
                t.virtuals.remove(&*node.path.read());
            }
        }
    }

    /// Forgets which backing file a node stood for: its last name is gone, and the number may be used again.
    pub(crate) fn orphan(&self, key: BackingKey) {
        self.tables.write().by_backing.remove(&key);
    }

    /// Moves every node at or below `from` to `to`.
    pub(crate) fn renamed(&self, from: &Path, to: &Path) {
        for node in self.tables.read().by_ino.values() {
            move_path(node, from, to);
        }
    }

    /// Swaps the nodes at or below two paths.
    pub(crate) fn exchanged(&self, a: &Path, b: &Path) {
        let t = self.tables.read();
        let at_a: Vec<_> = t
            .by_ino
            .values()
            .filter(|n| n.path.read().starts_with(a))
            .collect();
        let at_b: Vec<_> = t
            .by_ino
            .values()
            .filter(|n| n.path.read().starts_with(b))
            .collect();
        at_a.iter().for_each(|n| move_path(n, a, b));
        at_b.iter().for_each(|n| move_path(n, b, a));
    }

    pub(crate) fn find_backing(&self, key: BackingKey) -> Option<Arc<Node>> {
        let t = self.tables.read();
        t.by_backing
            .get(&key)
            .and_then(|ino| t.by_ino.get(ino))
            .cloned()
    }
}

impl Tables {
    fn add(&mut self, path: &Path, is_virtual: bool) -> Arc<Node> {
        let ino = self.next;
        self.next += 1;
        let node = Arc::new(Node {
            ino,
            path: RwLock::new(path.to_owned()),
            lookups: AtomicU64::new(1),
            is_virtual,
            open: Mutex::default(),
        });
        self.by_ino.insert(ino, node.clone());
        node
    }
}

trait RetainNot {
    fn retain_not(&mut self, ino: u64);
}

impl RetainNot for HashMap<BackingKey, u64> {
    fn retain_not(&mut self, ino: u64) {
        // A forgotten inode has one entry at most; forgets are rare, so a walk is cheaper than a second index.
        self.retain(|_, v| *v != ino);
    }
}

fn move_path(node: &Node, from: &Path, to: &Path) {
    let mut path = node.path.write();
    if let Ok(rest) = path.strip_prefix(from) {
        *path = if rest.as_os_str().is_empty() {
            to.to_owned()
        } else {
            to.join(rest)
        };
    }
}
