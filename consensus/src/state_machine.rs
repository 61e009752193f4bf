//! Applies committed entries to the replicated state.
//!
//! The state lives in memory. A start begins with the snapshot and does the committed entries after it again,
//! so applying needs no sync.

use std::io;
use std::sync::Arc;

use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::{Mutex, watch};

use crate::command::{ClusterState, Outcome};
use crate::raft::{LogId, Snapshot, SnapshotData, SnapshotMeta, StoredMembership, TypeConfig};
use crate::storage::{Dir, StoredSnapshot};

/// The state and up to where it is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Applied {
    pub(crate) last: Option<LogId>,
    pub(crate) membership: StoredMembership,
    pub(crate) state: Arc<ClusterState>,
}

/// openraft's view of the state.
#[derive(Debug, Clone)]
pub(crate) struct StateMachine {
    dir: Dir,
    applied: Arc<watch::Sender<Applied>>,
    /// The one on disk; locked while another takes its place.
    snapshot: Arc<Mutex<Option<StoredSnapshot>>>,
}

impl StateMachine {
    /// Begins with what was found on disk.
    ///
    /// # Errors
    /// A snapshot whose state cannot be read.
    pub(crate) fn new(dir: Dir, snapshot: Option<StoredSnapshot>) -> io::Result<StateMachine> {
        let applied = match &snapshot {
            Some(snapshot) => decode(&snapshot.meta, &snapshot.data)?,
            None => Applied::default(),
        };
        Ok(StateMachine {
            dir,
            applied: Arc::new(watch::Sender::new(applied)),
            snapshot: Arc::new(Mutex::new(snapshot)),
        })
    }

    /// Follows the state.
    pub(crate) fn watch(&self) -> watch::Receiver<Applied> {
        self.applied.subscribe()
    }

    /// Makes a snapshot the one on disk, unless that is newer.
    async fn store(&self, snapshot: StoredSnapshot) -> io::Result<()> {
        let mut stored = self.snapshot.lock().await;
        let have = stored.as_ref().and_then(|stored| stored.meta.last_log_id);
        if snapshot.meta.last_log_id >= have {
            self.dir.save_snapshot(&snapshot).await?;
            *stored = Some(snapshot);
        }
        Ok(())
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = StateMachine;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let applied = self.applied.borrow();
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let mut outcome = Outcome::Done;
            self.applied.send_modify(|applied| {
                applied.last = Some(entry.log_id);
                match entry.payload {
                    EntryPayload::Blank => {}
                    EntryPayload::Membership(membership) => {
                        applied.membership = StoredMembership::new(Some(entry.log_id), membership);
                    }
                    EntryPayload::Normal(proposal) => {
                        outcome = Arc::make_mut(&mut applied.state).apply(proposal);
                    }
                }
            });
            if let Outcome::Unknown { version } = outcome {
                tracing::error!(
                    version,
                    index = entry.log_id.index(),
                    "a setting of a later version has no effect on this node; upgrade it"
                );
            }
            if let Some(responder) = responder {
                responder.send(outcome);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> StateMachine {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        data: SnapshotData,
    ) -> io::Result<()> {
        let applied = decode(meta, &data)?;
        let meta = meta.clone();
        self.store(StoredSnapshot { meta, data }).await?;
        self.applied.send_replace(applied);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let stored = self.snapshot.lock().await;
        Ok(stored.as_ref().map(|snapshot| Snapshot {
            meta: snapshot.meta.clone(),
            snapshot: snapshot.data.clone(),
        }))
    }
}

impl RaftSnapshotBuilder<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let applied = self.applied.borrow().clone();
        let meta = SnapshotMeta {
            last_log_id: applied.last,
            last_membership: applied.membership,
        };
        let data = serde_json::to_string(applied.state.as_ref())?;
        self.store(StoredSnapshot {
            meta: meta.clone(),
            data: data.clone(),
        })
        .await?;
        Ok(Snapshot {
            meta,
            snapshot: data,
        })
    }
}

fn decode(meta: &SnapshotMeta, data: &str) -> io::Result<Applied> {
    let mut state: ClusterState = serde_json::from_str(data)?;
    state.retry_unknown();
    Ok(Applied {
        last: meta.last_log_id,
        membership: meta.last_membership.clone(),
        state: Arc::new(state),
    })
}
