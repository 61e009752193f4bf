//! The data directory: where what is kept, and whether what was written last is still there.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// Paths of a node's own files.
#[derive(Debug, Clone)]
pub(super) struct DataDir {
    root: PathBuf,
}

/// Written at each start; tells the next one what it can believe.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Session {
    boot_id: String,
    mount_id: u64,
    /// Everything was synced and nothing has been written since.
    is_clean: bool,
}

impl DataDir {
    /// Makes the directories.
    pub(super) fn open(root: &Path) -> anyhow::Result<DataDir> {
        let dir = DataDir {
            root: root.to_owned(),
        };
        for path in [dir.files(), dir.metas(), dir.tmp()] {
            fs::create_dir_all(&path)
                .with_context(|| format!("create directory {} (in data.dir)", path.display()))?;
        }
        for entry in fs::read_dir(dir.tmp())?.filter_map(Result::ok) {
            let _ = fs::remove_file(entry.path());
        }
        Ok(dir)
    }

    pub(super) fn files(&self) -> PathBuf {
        self.root.join("files")
    }

    pub(super) fn metas(&self) -> PathBuf {
        self.root.join("dbs")
    }

    pub(super) fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn session(&self) -> PathBuf {
        self.root.join("session")
    }

    /// Locks the directory for this process; two daemons on one directory would destroy it.
    pub(super) fn lock(&self) -> anyhow::Result<File> {
        let path = self.root.join("lock");
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            anyhow::anyhow!(
                "{} is in use by another litefs ({e}); stop it, or give this one another data.dir",
                self.root.display()
            )
        })?;
        Ok(file)
    }

    /// Begins a session. Returns whether what was written last is still in the files: the last one ended cleanly, or
    /// the daemon alone died and the page cache is the same.
    pub(super) fn begin_session(&self) -> anyhow::Result<bool> {
        let now = Session {
            boot_id: boot_id(),
            mount_id: mount_id(&self.root),
            is_clean: false,
        };
        let last: Option<Session> = fs::read(self.session())
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let is_trusted = last.is_some_and(|last| {
            last.is_clean
                || (last.boot_id == now.boot_id
                    && last.mount_id == now.mount_id
                    && now.mount_id != 0)
        });
        self.write_durably(&self.session(), &serde_json::to_vec(&now)?)?;
        Ok(is_trusted)
    }

    /// Ends a session after everything was synced.
    pub(super) fn end_session(&self) -> anyhow::Result<()> {
        let session = Session {
            boot_id: boot_id(),
            mount_id: mount_id(&self.root),
            is_clean: true,
        };
        self.write_durably(&self.session(), &serde_json::to_vec(&session)?)
    }

    /// Returns the identity of the cluster, if the node has one.
    pub(super) fn cluster_id(&self) -> Option<String> {
        let text = fs::read_to_string(self.root.join("clusterid")).ok()?;
        Some(text.trim().to_owned()).filter(|id| !id.is_empty())
    }

    pub(super) fn set_cluster_id(&self, id: &str) -> anyhow::Result<()> {
        self.write_durably(&self.root.join("clusterid"), format!("{id}\n").as_bytes())
    }

    /// Returns the highest epoch seen.
    pub(super) fn epoch(&self) -> u64 {
        fs::read_to_string(self.root.join("epoch"))
            .ok()
            .and_then(|s| s.trim().parse().ok())
            .unwrap_or(0)
    }

    pub(super) fn set_epoch(&self, epoch: u64) -> anyhow::Result<()> {
        self.write_durably(&self.root.join("epoch"), format!("{epoch}\n").as_bytes())
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "durable here: synced before and after"
    )]
    fn write_durably(&self, path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
        let write = || -> std::io::Result<()> {
            let tmp = path.with_extension("tmp");
            let mut file = File::create(&tmp)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&tmp, path)?;
            File::open(&self.root)?.sync_all()
        };
        write().with_context(|| format!("write {}", path.display()))
    }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Returns a number that no other mount since boot has had, or zero where the kernel (before 6.8) does not tell.
fn mount_id(path: &Path) -> u64 {
    const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
    let Ok(dir) = File::open(path) else { return 0 };
    let mask = rustix::fs::StatxFlags::from_bits_retain(STATX_MNT_ID_UNIQUE);
    match rustix::fs::statx(&dir, "", rustix::fs::AtFlags::EMPTY_PATH, mask) {
        Ok(st) if st.stx_mask & STATX_MNT_ID_UNIQUE != 0 => st.stx_mnt_id,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_believed_if_clean_or_of_the_same_page_cache() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = DataDir::open(tmp.path()).unwrap();
        assert!(!dir.begin_session().unwrap(), "nothing is known at first");
        let same_cache = mount_id(tmp.path()) != 0;
        assert_eq!(dir.begin_session().unwrap(), same_cache);
        let other = Session {
            boot_id: "another".into(),
            mount_id: 1,
            is_clean: false,
        };
        fs::write(dir.session(), serde_json::to_vec(&other).unwrap()).unwrap();
        assert!(!dir.begin_session().unwrap());
        dir.end_session().unwrap();
        assert!(dir.begin_session().unwrap());
    }

    #[test]
    fn a_directory_has_one_daemon() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = DataDir::open(tmp.path()).unwrap();
        let held = dir.lock().unwrap();
        let error = dir.lock().unwrap_err().to_string();
        assert!(error.contains("in use by another litefs"), "{error}");
        drop(held);
        dir.lock().unwrap();
    }
}
