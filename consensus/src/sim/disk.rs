//! A disk in memory: what was not synced may be lost in a crash, and any call can fail or be the last.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

use super::runtime::Node;
use crate::disk::Disk;

/// One node's disk; it outlives the node's processes.
#[derive(Debug)]
pub(crate) struct SimDisk {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    files: BTreeMap<PathBuf, SimFile>,
    rng: SmallRng,
    /// One of so many calls fails; zero for none.
    fail_one_in: u32,
    /// One of so many calls is the last of the process; zero for none.
    die_one_in: u32,
    is_full: bool,
    process: Option<Arc<Node>>,
}

#[derive(Debug, Clone, Default)]
struct SimFile {
    /// What the process sees.
    bytes: Vec<u8>,
    /// What survives.
    durable: Vec<u8>,
}

impl SimDisk {
    pub(crate) fn new(seed: u64) -> Arc<SimDisk> {
        Arc::new(SimDisk {
            inner: Mutex::new(Inner {
                files: BTreeMap::new(),
                rng: SmallRng::seed_from_u64(seed),
                fail_one_in: 0,
                die_one_in: 0,
                is_full: false,
                process: None,
            }),
        })
    }

    /// Makes a process the one that uses the disk.
    pub(crate) fn attach(&self, process: Arc<Node>) {
        self.inner.lock().process = Some(process);
    }

    pub(crate) fn set_faults(&self, fail_one_in: u32, die_one_in: u32) {
        let mut inner = self.inner.lock();
        (inner.fail_one_in, inner.die_one_in) = (fail_one_in, die_one_in);
    }

    pub(crate) fn set_full(&self, is_full: bool) {
        self.inner.lock().is_full = is_full;
    }

    /// A power cut: of what was not synced, any first part may survive.
    pub(crate) fn crash(&self) {
        let inner = &mut *self.inner.lock();
        for file in inner.files.values_mut() {
            let kept = inner
                .rng
                .random_range(file.durable.len()..=file.bytes.len());
            file.durable = file.bytes[..kept].to_vec();
            file.bytes = file.durable.clone();
        }
        inner.files.retain(|_, file| !file.bytes.is_empty());
    }

    /// Loses everything.
    pub(crate) fn wipe(&self) {
        self.inner.lock().files.clear();
    }

    pub(crate) fn file(&self, name: &str) -> Option<Vec<u8>> {
        let inner = self.inner.lock();
        let mut files = inner.files.iter();
        files
            .find(|(path, _)| path.ends_with(name))
            .map(|(_, file)| file.bytes.clone())
    }
}

impl Inner {
    fn one_in(&mut self, n: u32) -> bool {
        n > 0 && self.rng.next_u32().is_multiple_of(n)
    }

    /// Does a write, or fails it before, in between or after.
    fn change(&mut self, path: &Path, work: impl FnOnce(&mut SimFile)) -> io::Result<()> {
        if self.is_full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let dies = self.one_in(self.die_one_in);
        let fails = dies || self.one_in(self.fail_one_in);
        if dies && let Some(process) = &self.process {
            process.kill();
        }
        if !fails || self.rng.next_u32().is_multiple_of(2) {
            work(self.files.entry(path.to_owned()).or_default());
        }
        if fails {
            return Err(io::Error::other("simulated disk error"));
        }
        Ok(())
    }
}

impl Disk for SimDisk {
    fn is_slow(&self) -> bool {
        false
    }

    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        let inner = self.inner.lock();
        Ok(inner.files.get(path).map(|file| file.bytes.clone()))
    }

    fn write(&self, path: &Path, offset: u64, bytes: &[u8], sync: bool) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        self.inner.lock().change(path, |file| {
            file.bytes.truncate(at);
            if !sync && file.durable.len() > at {
                file.durable.truncate(at);
            }
            file.bytes.extend_from_slice(bytes);
            if sync {
                file.durable = file.bytes.clone();
            }
        })
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.inner.lock().change(path, |file| {
            file.bytes = bytes.to_vec();
            file.durable = bytes.to_vec();
        })
    }
}
