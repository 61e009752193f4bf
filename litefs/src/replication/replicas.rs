//! Who follows this node, and what each has acknowledged: for status, metrics, quorum commits and log retention.
//!
//! A replica stays listed after it leaves, so that retention may favour its return; how long the log waits for it is
//! the log's own policy. One `NodeId` has one connection (INV-REPL-5): a process that connects again replaces
//! its older connection, another process with the same id is refused while the first is heard from.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{Applied, DbName};
use crate::history::History;

/// Departed replicas remembered.
const MAX_DEPARTED: usize = 256;

/// Told of every ack, on the task that reads it: for commits that wait for a quorum. Must not block.
pub trait AckListener: Send + Sync + 'static {
    /// A replica reports where its copy is, over a stream of this tenure.
    fn acked(&self, node_id: u64, epoch: u64, db: &DbName, applied: Applied);
}

/// All replicas of this node.
pub struct Replicas {
    history: Arc<History>,
    entries: Mutex<HashMap<u64, Entry>>,
    listener: OnceLock<Arc<dyn AckListener>>,
}

impl std::fmt::Debug for Replicas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replicas").finish_non_exhaustive()
    }
}

struct Entry {
    hostname: String,
    instance: u64,
    connection: Option<CancellationToken>,
    session_no: u64,
    since: Instant,
    heard_at: Instant,
    dbs: HashMap<DbName, ReplicaDb>,
}

/// One database on one replica.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReplicaDb {
    /// Its position there, visible and durable: the high-water mark.
    pub acked: Applied,
    /// Why it does not go on there, if so.
    pub stalled: Option<String>,
}

/// One replica.
#[derive(Debug, Clone)]
pub struct ReplicaStatus {
    /// Its identity.
    pub node_id: u64,
    /// Its host name.
    pub hostname: String,
    /// Whether it follows now.
    pub is_connected: bool,
    /// When it came, or left.
    pub since: Instant,
    /// When it was last heard from.
    pub heard_at: Instant,
    /// Its databases.
    pub dbs: HashMap<DbName, ReplicaDb>,
}

/// The identity is in use by another process.
#[derive(Debug, thiserror::Error)]
#[error("node id {node_id:016x} is in use by {hostname:?}; give one of the two another id")]
pub struct NodeIdTaken {
    node_id: u64,
    hostname: String,
}

impl Replicas {
    /// Makes an empty registry, which tells `history` of each replica that comes.
    #[must_use]
    pub fn new(history: Arc<History>) -> Arc<Replicas> {
        Arc::new(Replicas {
            history,
            entries: Mutex::default(),
            listener: OnceLock::new(),
        })
    }

    /// Sets who is told of acks; once.
    pub fn set_listener(&self, listener: Arc<dyn AckListener>) {
        let is_first = self.listener.set(listener).is_ok();
        debug_assert!(is_first, "ack listener set twice");
    }

    /// Lists all replicas, by identity.
    #[must_use]
    pub fn list(&self) -> Vec<ReplicaStatus> {
        let entries = self.entries.lock();
        let mut list: Vec<ReplicaStatus> = entries
            .iter()
            .map(|(node_id, entry)| ReplicaStatus {
                node_id: *node_id,
                hostname: entry.hostname.clone(),
                is_connected: entry.connection.is_some(),
                since: entry.since,
                heard_at: entry.heard_at,
                dbs: entry.dbs.clone(),
            })
            .collect();
        list.sort_by_key(|r| r.node_id);
        list
    }

    /// Returns what each replica has of a database, whether it follows now, and when it was last heard.
    #[must_use]
    pub fn acked(&self, db: &DbName) -> Vec<(u64, Applied, bool, Instant)> {
        let entries = self.entries.lock();
        let of_entry = |(node_id, e): (&u64, &Entry)| {
            let acked = e.dbs.get(db)?.acked;
            Some((*node_id, acked, e.connection.is_some(), e.heard_at))
        };
        entries.iter().filter_map(of_entry).collect()
    }

    /// Returns how many replicas follow now.
    #[must_use]
    pub fn connected_count(&self) -> usize {
        let entries = self.entries.lock();
        entries.values().filter(|e| e.connection.is_some()).count()
    }

    /// Enters a replica; an older connection of the same process is told to end.
    ///
    /// # Errors
    /// [`NodeIdTaken`] while another process with this id was heard within `silence`.
    pub(crate) fn enter(
        self: &Arc<Self>,
        node_id: u64,
        instance: u64,
        hostname: &str,
        silence: Duration,
        now: Instant,
    ) -> Result<Registration, NodeIdTaken> {
        self.history.replica_is_here();
        let ended = CancellationToken::new();
        let mut entries = self.entries.lock();
        let mut dbs = HashMap::new();
        let mut session_no = 1;
        if let Some(old) = entries.remove(&node_id) {
            let is_alive = old.connection.is_some() && now - old.heard_at < silence;
            if is_alive && old.instance != instance {
                let hostname = old.hostname.clone();
                entries.insert(node_id, old);
                return Err(NodeIdTaken { node_id, hostname });
            }
            if let Some(connection) = old.connection {
                connection.cancel();
            }
            session_no = old.session_no + 1;
            dbs = old.dbs;
        }
        let entry = Entry {
            hostname: hostname.to_owned(),
            instance,
            connection: Some(ended.clone()),
            session_no,
            since: now,
            heard_at: now,
            dbs,
        };
        entries.insert(node_id, entry);
        forget_oldest(&mut entries);
        Ok(Registration {
            replicas: Arc::clone(self),
            node_id,
            session_no,
            ended,
        })
    }
}

fn forget_oldest(entries: &mut HashMap<u64, Entry>) {
    let mut departed: Vec<(Instant, u64)> = entries
        .iter()
        .filter(|(_, e)| e.connection.is_none())
        .map(|(node_id, e)| (e.since, *node_id))
        .collect();
    departed.sort_unstable();
    let surplus = departed.len().saturating_sub(MAX_DEPARTED);
    for (_, node_id) in &departed[..surplus] {
        entries.remove(node_id);
    }
}

/// A replica's place in the registry for as long as its connection lives.
#[derive(Debug)]
pub(crate) struct Registration {
    replicas: Arc<Replicas>,
    node_id: u64,
    session_no: u64,
    /// Fires when a newer connection took over.
    pub(crate) ended: CancellationToken,
}

impl Registration {
    pub(crate) fn heard(&self, now: Instant) {
        self.with(|entry| entry.heard_at = now);
    }

    pub(crate) fn acked(&self, epoch: u64, db: &DbName, applied: Applied) {
        self.with(|entry| {
            let slot = entry.dbs.entry(db.clone()).or_default();
            slot.acked = applied;
            slot.stalled = None;
        });
        if let Some(listener) = self.replicas.listener.get() {
            listener.acked(self.node_id, epoch, db, applied);
        }
    }

    pub(crate) fn stalled(&self, db: &DbName, why: String) {
        self.with(|entry| entry.dbs.entry(db.clone()).or_default().stalled = Some(why));
    }

    fn with(&self, f: impl FnOnce(&mut Entry)) {
        let mut entries = self.replicas.entries.lock();
        if let Some(entry) = entries
            .get_mut(&self.node_id)
            .filter(|e| e.session_no == self.session_no)
        {
            f(entry);
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let heard_at = |entry: &mut Entry| {
            entry.connection = None;
            entry.since = entry.heard_at;
        };
        self.with(heard_at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_secs(5);

    #[test]
    fn same_process_replaces_other_process_is_refused_until_silent() {
        let replicas = Replicas::new(Arc::new(crate::history::History::new(None, None)));
        let now = Instant::now();
        let first = replicas.enter(7, 1, "a", SILENCE, now).unwrap();
        let err = replicas.enter(7, 2, "b", SILENCE, now).unwrap_err();
        assert!(err.to_string().contains("in use by \"a\""), "{err}");

        let again = replicas.enter(7, 1, "a", SILENCE, now).unwrap();
        assert!(first.ended.is_cancelled() && !again.ended.is_cancelled());
        drop(first);
        assert_eq!(
            replicas.connected_count(),
            1,
            "the old one does not remove the new one"
        );

        let later = now + SILENCE;
        again.heard(now + Duration::from_secs(1));
        assert!(replicas.enter(7, 2, "b", SILENCE, later).is_err());
        let other = replicas
            .enter(7, 2, "b", SILENCE, later + Duration::from_secs(1))
            .unwrap();
        assert!(again.ended.is_cancelled());
        drop(other);
        assert_eq!(replicas.connected_count(), 0);
        assert_eq!(replicas.list().len(), 1, "still listed");
    }

    #[test]
    fn acks_are_kept_per_database() {
        let replicas = Replicas::new(Arc::new(crate::history::History::new(None, None)));
        let db: DbName = "a".parse().unwrap();
        let place = replicas.enter(7, 1, "a", SILENCE, Instant::now()).unwrap();
        place.stalled(&db, "disk full".to_owned());
        assert!(replicas.list()[0].dbs[&db].stalled.is_some());
        place.acked(1, &db, Applied::default());
        assert_eq!(replicas.list()[0].dbs[&db], ReplicaDb::default());
        assert_eq!(replicas.acked(&db).len(), 1);
    }
}
