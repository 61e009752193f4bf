//! What Raft must not forget, on disk: who this node is, its log with its votes, and a snapshot of
//! the state.
//!
//! INV-RAFT-1: each method that Raft's safety rests on returns after its bytes are synced.
//!
//! A call that the disk refuses is not given up: it is tried again until it succeeds or the node is shut down,
//! and nothing is acknowledged meanwhile. Raft would stop for good at the first error, and a disk that is full
//! gets space again. After a failure of any kind the old file is not trusted any more (what a failed sync did
//! not write, the next one does not write either): the next attempt writes the whole file anew from memory
//! and renames it into place.

mod frame;
mod log;
mod store;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use openraft::type_config::TypeConfigExt;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use frame::Fault;
pub(crate) use store::LogStore;

use crate::disk::Disk;
use crate::error::Error;
use crate::member::NodeId;
use crate::raft::{SnapshotData, SnapshotMeta, TypeConfig, term_of};
use log::LogImage;

const SNAPSHOT_MAGIC: &[u8; 8] = b"litefsrs";
const IDENTITY_MAGIC: &[u8; 8] = b"litefsri";
/// Kind of the only record of such a file.
const WHOLE: u32 = 1;

/// How long to wait before a refused write is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) node_id: NodeId,
    /// Empty until it is known.
    pub(crate) cluster_id: String,
}

/// A snapshot as it is on disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredSnapshot {
    pub(crate) meta: SnapshotMeta,
    pub(crate) data: SnapshotData,
}

/// The directory of one node.
#[derive(Debug, Clone)]
pub(crate) struct Dir {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    /// What the disk refuses at the moment.
    trouble: Arc<watch::Sender<Option<String>>>,
    closing: watch::Receiver<bool>,
}

/// What was found on disk.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) identity: Identity,
    pub(crate) log: LogStore,
    pub(crate) snapshot: Option<StoredSnapshot>,
}

impl Dir {
    /// Opens or makes the directory of a node.
    ///
    /// # Errors
    /// `Io`; `OtherNode`; `Corrupt` if a file is not as it was written, except for the remains of an append
    /// that was interrupted, which are cut off.
    pub(crate) async fn open(
        disk: Arc<dyn Disk>,
        path: &Path,
        node_id: NodeId,
        closing: watch::Receiver<bool>,
    ) -> Result<(Dir, Found), Error> {
        let dir = Dir {
            disk,
            path: path.to_owned(),
            trouble: Arc::new(watch::Sender::new(None)),
            closing,
        };
        let opening = dir.clone();
        let found = dir
            .run(move |_| Ok(opening.load(node_id)))
            .await
            .map_err(|source| dir.io("open", "", source))??;
        Ok((dir, found))
    }

    /// Tells what the disk refuses at the moment.
    pub(crate) fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.subscribe()
    }

    /// Writes down who this node is.
    pub(crate) async fn save_identity(&self, identity: &Identity) -> io::Result<()> {
        self.replace("identity", IDENTITY_MAGIC, serde_json::to_vec(identity)?)
            .await
    }

    pub(crate) async fn save_snapshot(&self, snapshot: &StoredSnapshot) -> io::Result<()> {
        self.replace("snapshot", SNAPSHOT_MAGIC, serde_json::to_vec(snapshot)?)
            .await
    }

    async fn replace(&self, name: &'static str, magic: &[u8; 8], body: Vec<u8>) -> io::Result<()> {
        let bytes: Arc<[u8]> = frame::encode_file(magic, WHOLE, &body).into();
        let path = self.path.join(name);
        self.insist(name, || {
            let (path, bytes) = (path.clone(), bytes.clone());
            self.run(move |disk| disk.replace(&path, &bytes))
        })
        .await
    }

    /// Tries until it works, or the node is shut down.
    async fn insist<F: Future<Output = io::Result<()>>>(
        &self,
        name: &'static str,
        mut attempt: impl FnMut() -> F,
    ) -> io::Result<()> {
        let mut closing = self.closing.clone();
        loop {
            let Err(e) = attempt().await else {
                self.trouble
                    .send_if_modified(|trouble| trouble.take().is_some());
                return Ok(());
            };
            let text = format!("write {}: {e}", self.path.join(name).display());
            self.trouble.send_if_modified(|trouble| {
                let is_new = trouble.as_ref() != Some(&text);
                if is_new {
                    tracing::error!(error = %text, "raft is stuck until this succeeds");
                    *trouble = Some(text);
                }
                is_new
            });
            let closed = closing.wait_for(|closing| *closing);
            if TypeConfig::timeout(RETRY_AFTER, closed).await.is_ok() {
                return Err(e);
            }
        }
    }

    /// Does disk work where it holds up nobody.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Disk) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let disk = self.disk.clone();
        if !disk.is_slow() {
            return work(disk.as_ref());
        }
        tokio::task::spawn_blocking(move || work(disk.as_ref()))
            .await
            .map_err(io::Error::other)?
    }

    fn load(&self, node_id: NodeId) -> Result<Found, Error> {
        self.disk
            .create_dir(&self.path)
            .map_err(|e| self.io("make", "", e))?;
        let identity = self.load_identity(node_id)?;
        let snapshot: Option<StoredSnapshot> = self.read_json("snapshot", SNAPSHOT_MAGIC)?;
        let (image, file_len) = self.load_log(identity.is_some())?;
        // Files are never removed by this program. One that is gone took promises with it.
        let last_term = image.last_log_id().map_or(0, |last| term_of(&last));
        let vote_term = image.vote.map_or(0, |vote| vote.leader_id.term);
        let is_new = image == LogImage::default() && snapshot.is_none();
        if vote_term < last_term || (identity.is_none() && !is_new) {
            let name = if identity.is_none() {
                "identity"
            } else {
                "log"
            };
            return Err(self.corrupt(name, 0, Fault::Missing));
        }
        if snapshot
            .as_ref()
            .and_then(|snapshot| snapshot.meta.last_log_id)
            < image.purged
        {
            return Err(self.corrupt("snapshot", 0, Fault::Missing));
        }
        let identity = match identity {
            Some(identity) => identity,
            None => self.make_identity(node_id)?,
        };
        let log = LogStore::new(self.clone(), image, file_len);
        Ok(Found {
            identity,
            log,
            snapshot,
        })
    }

    fn load_identity(&self, node_id: NodeId) -> Result<Option<Identity>, Error> {
        let identity = self.read_json::<Identity>("identity", IDENTITY_MAGIC)?;
        match identity {
            Some(Identity { node_id: have, .. }) if have != node_id => Err(Error::OtherNode {
                path: self.path.clone(),
                have,
                want: node_id,
            }),
            other => Ok(other),
        }
    }

    /// Writes the last file of a new directory.
    fn make_identity(&self, node_id: NodeId) -> Result<Identity, Error> {
        let identity = Identity {
            node_id,
            cluster_id: String::new(),
        };
        let body = serde_json::to_vec(&identity).map_err(io::Error::other);
        body.and_then(|body| {
            let bytes = frame::encode_file(IDENTITY_MAGIC, WHOLE, &body);
            self.disk.replace(&self.path.join("identity"), &bytes)
        })
        .map_err(|e| self.io("write", "identity", e))?;
        Ok(identity)
    }

    fn load_log(&self, must_exist: bool) -> Result<(LogImage, u64), Error> {
        let path = self.path.join("log");
        let Some(bytes) = self.read("log")? else {
            if must_exist {
                return Err(self.corrupt("log", 0, Fault::Missing));
            }
            let image = LogImage::default();
            let bytes = image.encode().map_err(io::Error::other);
            let len = bytes
                .and_then(|bytes| self.disk.replace(&path, &bytes).map(|()| bytes.len()))
                .map_err(|e| self.io("write", "log", e))?;
            return Ok((image, len as u64));
        };
        let (image, good_len) =
            LogImage::decode(&bytes).map_err(|(at, fault)| self.corrupt("log", at, fault))?;
        if good_len < bytes.len() as u64 {
            tracing::warn!(path = %path.display(), at = good_len, cut = bytes.len() as u64 - good_len,
                "cut off an append that was interrupted");
            self.disk
                .write(&path, good_len, &[], true)
                .map_err(|e| self.io("cut", "log", e))?;
        }
        Ok((image, good_len))
    }

    fn read_json<T: for<'a> Deserialize<'a>>(
        &self,
        name: &'static str,
        magic: &[u8; 8],
    ) -> Result<Option<T>, Error> {
        let Some(bytes) = self.read(name)? else {
            return Ok(None);
        };
        let body = frame::decode_file(&bytes, magic, WHOLE)
            .map_err(|(at, fault)| self.corrupt(name, at, fault))?;
        let value = serde_json::from_slice(body).map_err(|e| {
            self.corrupt(name, frame::HEADER_LEN as u64, Fault::Body(e.to_string()))
        })?;
        Ok(Some(value))
    }

    fn read(&self, name: &'static str) -> Result<Option<Vec<u8>>, Error> {
        self.disk
            .read(&self.path.join(name))
            .map_err(|e| self.io("read", name, e))
    }

    fn io(&self, what: &'static str, name: &str, source: io::Error) -> Error {
        Error::Io {
            what,
            path: self.path.join(name),
            source,
        }
    }

    fn corrupt(&self, name: &str, offset: u64, fault: Fault) -> Error {
        Error::Corrupt {
            path: self.path.join(name),
            offset,
            fault,
        }
    }
}
