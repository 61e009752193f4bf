//! The data directory: where what is kept, and whether what was written last is still there.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::db::Trust;
use crate::disk::crash_point;
use crate::survivors::MountRecord;

/// Names of what is done to replace a small file of the node.
pub mod steps {
    crate::disk::steps! {
        WRITE = "data_dir.write:tmp",
        RENAME = "data_dir.write:rename",
    }
}

/// How long to wait for a daemon that was killed to let go of the directory.
const LOCK_WAIT: Duration = Duration::from_secs(1);
const LOCK_POLL: Duration = Duration::from_millis(20);

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
    /// The node followed another: it logs transactions first, so that its files may lack what its log has.
    #[serde(default)]
    is_replica: bool,
}

/// How the last session ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct LastSession {
    pub(super) trust: Trust,
    /// It was a replica's that died: of its last transactions the log alone is whole.
    pub(super) is_dead_replica: bool,
    /// It was a replica's, however it ended.
    pub(super) is_replica: bool,
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

    /// Says which files are immutable while programs are cut off from them.
    pub(super) fn fenced(&self) -> PathBuf {
        self.root.join("fenced")
    }

    /// Returns the mounts of this boot that programs may still have files of.
    pub(super) fn mounts(&self) -> Vec<MountRecord> {
        let now = boot_id();
        let mounts: Vec<MountRecord> = fs::read(self.root.join("mounts"))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        mounts.into_iter().filter(|m| m.boot_id == now).collect()
    }

    pub(super) fn set_mounts(&self, mounts: &[MountRecord]) -> anyhow::Result<()> {
        self.write_durably(&self.root.join("mounts"), &serde_json::to_vec(mounts)?)
    }

    /// Describes the FUSE mount at a path, if there is one.
    pub(super) fn describe_mount(mount_point: &Path, daemon: i32) -> Option<MountRecord> {
        MountRecord::of(mount_point, boot_id(), daemon)
    }

    fn session(&self) -> PathBuf {
        self.root.join("session")
    }

    /// Locks the directory for this process; two daemons on one directory would destroy it.
    pub(super) fn lock(&self) -> anyhow::Result<File> {
        let path = self.root.join("lock");
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            let how = rustix::fs::FlockOperation::NonBlockingLockExclusive;
            match rustix::fs::flock(&file, how) {
                Ok(()) => return Ok(file),
                Err(e) if Instant::now() > deadline => anyhow::bail!(
                    "{} is in use by another litefs ({e}); stop it, or give this one another data.dir",
                    self.root.display()
                ),
                // One that was killed may be a moment in ending.
                Err(_) => std::thread::sleep(LOCK_POLL),
            }
        }
    }

    /// Looks how the last session ended.
    ///
    /// What it says stays until [`files_are_compared`](DataDir::files_are_compared), for the next start, should this one
    /// die before that.
    pub(super) fn last_session(&self) -> LastSession {
        let (boot_id, mount_id) = (boot_id(), mount_id(&self.root));
        let last = self.read_session();
        let trust = match &last {
            Some(last) if last.is_clean => Trust::CleanEnd,
            Some(last) if last.boot_id == boot_id && last.mount_id == mount_id && mount_id != 0 => {
                Trust::PageCache
            }
            _ => Trust::Nothing,
        };
        let is_replica = match &last {
            Some(last) => last.is_replica,
            None => !self.was_primary(),
        };
        LastSession {
            trust,
            is_dead_replica: is_replica && trust != Trust::CleanEnd,
            is_replica,
        }
    }

    fn read_session(&self) -> Option<Session> {
        let bytes = fs::read(self.session()).ok()?;
        let session = serde_json::from_slice(&bytes);
        if let Err(error) = &session {
            tracing::error!(
                path = %self.session().display(), %error,
                "how the last session ended cannot be read: all pages are compared, and the file written anew"
            );
        }
        session.ok()
    }

    /// Begins the session: the files are known from now on, as long as the page cache lives.
    pub(super) fn files_are_compared(&self, is_primary: bool) -> anyhow::Result<()> {
        self.write_session(is_primary, false)
    }

    /// Ends the session after everything was synced.
    pub(super) fn end_session(&self, is_primary: bool) -> anyhow::Result<()> {
        self.write_session(is_primary, true)
    }

    fn write_session(&self, is_primary: bool, is_clean: bool) -> anyhow::Result<()> {
        let session = Session {
            boot_id: boot_id(),
            mount_id: mount_id(&self.root),
            is_clean,
            is_replica: !is_primary,
        };
        self.write_durably(&self.session(), &serde_json::to_vec(&session)?)
    }

    /// Ends the session of a node that has files that were not compared: nothing is believed at the next start.
    pub(super) fn forget_session(&self) -> anyhow::Result<()> {
        match fs::remove_file(self.session()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("remove {}", self.session().display()))
            }
            _ => Ok(()),
        }
    }

    /// Returns the identity of the cluster, if the node has one.
    ///
    /// # Errors
    /// The file is damaged: another identity would part this node from its cluster.
    pub(super) fn cluster_id(&self) -> anyhow::Result<Option<String>> {
        let path = self.root.join("clusterid");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
        };
        let text = String::from_utf8_lossy(&bytes);
        let id = text.trim();
        let is_whole = id
            .strip_prefix("LFSC")
            .is_some_and(|hex| hex.len() == 16 && u64::from_str_radix(hex, 16).is_ok());
        anyhow::ensure!(
            is_whole || id.is_empty(),
            "{} holds {id:?}, which is no cluster id: write into it what the same file of another node has",
            path.display()
        );
        Ok(is_whole.then(|| id.to_owned()))
    }

    pub(super) fn set_cluster_id(&self, id: &str) -> anyhow::Result<()> {
        self.write_durably(&self.root.join("clusterid"), format!("{id}\n").as_bytes())
    }

    /// Returns the highest epoch seen.
    pub(super) fn epoch(&self) -> u64 {
        let path = self.root.join("epoch");
        let Ok(bytes) = fs::read(&path) else { return 0 };
        let text = String::from_utf8_lossy(&bytes);
        text.trim().parse().unwrap_or_else(|error| {
            tracing::error!(
                path = %path.display(), %error,
                "the highest epoch seen cannot be read: the next one met is taken, and the file written anew"
            );
            0
        })
    }

    /// Returns the newest tenure of which this node has all that its primary began with; zero if that is not known.
    pub(super) fn accepted_epoch(&self) -> u64 {
        fs::read_to_string(self.root.join("accepted-epoch"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    pub(super) fn set_accepted_epoch(&self, epoch: u64) -> anyhow::Result<()> {
        let path = self.root.join("accepted-epoch");
        self.write_durably(&path, format!("{epoch}\n").as_bytes())
    }

    /// Returns this node's identity, which lives as long as the directory; makes one at first.
    ///
    /// # Errors
    /// Disk, or the file is damaged: another identity would be another node to the cluster.
    pub(super) fn node_id(&self) -> anyhow::Result<u64> {
        let path = self.root.join("node-id");
        match fs::read_to_string(&path) {
            Ok(text) => u64::from_str_radix(text.trim(), 16).with_context(|| {
                format!(
                    "{} holds {:?}, which is no node id: write into it what `litefs status` on another node says of this \
                     one, or empty this data directory to join as a new node",
                    path.display(),
                    text.trim()
                )
            }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let id = rand::random_range(1..=u64::MAX);
                self.write_durably(&path, format!("{id:016X}\n").as_bytes())?;
                Ok(id)
            }
            Err(e) => Err(e).with_context(|| format!("read {}", path.display())),
        }
    }

    pub(super) fn raft(&self) -> PathBuf {
        self.root.join("raft")
    }

    /// Returns whether this node was primary, and may hold what no other has.
    pub(super) fn was_primary(&self) -> bool {
        self.root.join("was-primary").exists()
    }

    pub(super) fn set_was_primary(&self, was: bool) -> anyhow::Result<()> {
        let path = self.root.join("was-primary");
        if was == path.exists() {
            return Ok(());
        }
        if was {
            return self.write_durably(&path, b"\n");
        }
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Returns when a replica was last known to follow, in milliseconds of the wall clock.
    pub(super) fn replicas_seen_ms(&self) -> Option<i64> {
        let text = fs::read_to_string(self.root.join("replicas-seen")).ok()?;
        text.trim().parse().ok()
    }

    pub(super) fn set_replicas_seen_ms(&self, ms: i64) -> anyhow::Result<()> {
        self.write_durably(
            &self.root.join("replicas-seen"),
            format!("{ms}\n").as_bytes(),
        )
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
            crash_point(steps::WRITE);
            let mut file = File::create(&tmp)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            crash_point(steps::RENAME);
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
        let found = || {
            let last = dir.last_session();
            (last.trust, last.is_dead_replica)
        };
        assert_eq!(found(), (Trust::Nothing, true), "at first");
        dir.files_are_compared(true).unwrap();
        let same_cache = match mount_id(tmp.path()) {
            0 => Trust::Nothing,
            _ => Trust::PageCache,
        };
        assert_eq!(found(), (same_cache, false));
        dir.files_are_compared(false).unwrap();
        assert_eq!(found(), (same_cache, true));
        let other = Session {
            boot_id: "another".into(),
            mount_id: 1,
            is_clean: false,
            is_replica: false,
        };
        fs::write(dir.session(), serde_json::to_vec(&other).unwrap()).unwrap();
        assert_eq!(found(), (Trust::Nothing, false));
        dir.end_session(false).unwrap();
        assert_eq!(found(), (Trust::CleanEnd, false));
        dir.forget_session().unwrap();
        dir.set_was_primary(true).unwrap();
        assert_eq!(found(), (Trust::Nothing, false));
    }

    #[test]
    fn a_damaged_cluster_id_is_not_replaced_by_another() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = DataDir::open(tmp.path()).unwrap();
        assert_eq!(dir.cluster_id().unwrap(), None);
        dir.set_cluster_id("LFSC0123456789ABCDEF").unwrap();
        assert_eq!(
            dir.cluster_id().unwrap().as_deref(),
            Some("LFSC0123456789ABCDEF")
        );
        fs::write(tmp.path().join("clusterid"), b"LFSC0123456789ABC\xffEF").unwrap();
        let error = dir.cluster_id().unwrap_err().to_string();
        assert!(
            error.contains("/clusterid") && error.contains("another node"),
            "{error}"
        );
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
