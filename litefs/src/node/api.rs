//! The node as its HTTP API sees it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ErrorCode, OpenFlags};
use tokio::sync::{Notify, broadcast};

use super::election::Election;
use super::ports::Ports;
use crate::db::Db;
use crate::http::{
    Event, Export, MetricKind, MetricsText, NodeApi, NodeError, NodeInfo, PrimaryHost,
};
use crate::ltx::Pos;
use crate::replication::replicas::Replicas;
use crate::replication::{DbName, Sink};
use crate::sqlite::header::{DB_HEADER_LEN, DbHeader};
use crate::store::chain;

/// How long an import or export waits for a lock of SQLite's.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) struct Api {
    pub(super) ports: Arc<Ports>,
    pub(super) hostname: String,
    /// Whether this node may be elected; with a static lease, whether it is the primary.
    pub(super) is_candidate: bool,
    pub(super) mount: PathBuf,
    pub(super) replicas: Arc<Replicas>,
    pub(super) events: broadcast::Sender<Event>,
    /// Told that somebody listens to the events.
    pub(super) listeners: Arc<Notify>,
    pub(super) election: Option<Arc<Election>>,
}

impl Api {
    fn is_primary(&self) -> bool {
        self.ports.node.is_primary()
    }

    fn find(&self, name: &DbName) -> Result<Arc<Db>, NodeError> {
        self.ports
            .store
            .get(name.as_str())
            .filter(|db| db.published().page_count > 0)
            .ok_or_else(|| NodeError::NotFound(name.clone()))
    }

    fn tmp(&self) -> Result<(PathBuf, File), NodeError> {
        let path = self
            .ports
            .data_dir
            .tmp()
            .join(format!("{:016x}.db", rand::random::<u64>()));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        let file = file.map_err(|source| NodeError::Io {
            what: format!("create {}", path.display()),
            source,
        })?;
        Ok((path, file))
    }
}

/// Waits for a lock with short looks: programs that write without a pause leave it free for microseconds only, which
/// SQLite's own timeout, with its growing sleeps, seldom meets. Gives up after [`BUSY_TIMEOUT`] or a little more.
fn wait_for_writer(looks: i32) -> bool {
    const PAUSE: Duration = Duration::from_micros(200);
    std::thread::sleep(PAUSE);
    PAUSE.saturating_mul(looks.unsigned_abs()) < BUSY_TIMEOUT
}

const MAX_PART_LEN: usize = 255 - "-journal".len();

/// Refuses names under which no database would be found.
fn check_name(name: &DbName, target: &std::path::Path) -> Result<(), NodeError> {
    let is_of = |suffix| name.as_str().ends_with(suffix);
    let why = if ["-wal", "-shm", "-journal"].into_iter().any(is_of) {
        "files of this ending belong to another database"
    } else if is_of("-pos") || [".lag", ".primary"].contains(&name.as_str()) {
        "files of this name tell how the replication is"
    } else if name
        .as_str()
        .split('/')
        .any(|part| part.len() > MAX_PART_LEN)
    {
        "a part of it is longer than 247 bytes, and SQLite adds 8 for its journal"
    } else if target.is_dir() {
        "it is a directory"
    } else {
        return Ok(());
    };
    let db = name.clone();
    Err(NodeError::Reserved { db, why })
}

/// Removes a file when dropped.
struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        for suffix in ["", "-journal", "-wal", "-shm"] {
            let _ = std::fs::remove_file(crate::db::paths::with_suffix(&self.0, suffix));
        }
    }
}

fn sqlite_error(what: String) -> impl FnOnce(rusqlite::Error) -> NodeError {
    move |e| match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            NodeError::Locked { what, source: e }
        }
        _ => NodeError::Io {
            what,
            source: std::io::Error::other(e),
        },
    }
}

fn copy(from: &Connection, to: &mut Connection) -> rusqlite::Result<()> {
    let backup = Backup::new(from, to)?;
    let deadline = std::time::Instant::now() + BUSY_TIMEOUT;
    loop {
        match backup.step(-1)? {
            StepResult::Done => return Ok(()),
            _ if std::time::Instant::now() > deadline => {
                return Err(rusqlite::Error::SqliteFailure(
                    rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY),
                    Some("database is locked".into()),
                ));
            }
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

impl NodeApi for Api {
    fn info(&self) -> NodeInfo {
        let is_primary = self.is_primary();
        NodeInfo {
            cluster_id: self.ports.cluster_id.lock().clone(),
            is_primary,
            candidate: self.is_candidate,
            path: self.mount.display().to_string(),
            primary: self
                .ports
                .lag
                .primary_hostname()
                .filter(|_| !is_primary)
                .map(|hostname| PrimaryHost { hostname }),
            ready: is_primary || *self.ports.ready.borrow(),
        }
    }

    fn node_id(&self) -> u64 {
        self.ports.node.node_id
    }

    fn primary_hostname(&self) -> Option<String> {
        if self.is_primary() {
            Some(self.hostname.clone())
        } else {
            self.ports.lag.primary_hostname()
        }
    }

    fn databases(&self) -> Vec<(DbName, Pos)> {
        Sink::positions(&*self.ports)
    }

    fn export(&self, name: &DbName) -> Result<Export, NodeError> {
        let db = self.find(name)?;
        let (path, file) = self.tmp()?;
        let remove = Remove(path.clone());
        let what = || format!("export {name}");
        let from = Connection::open_with_flags(
            &db.paths().mounted,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )
        .map_err(sqlite_error(what()))?;
        from.busy_timeout(BUSY_TIMEOUT)
            .map_err(sqlite_error(what()))?;
        let mut to = Connection::open(&path).map_err(sqlite_error(what()))?;
        to.pragma_update(None, "synchronous", "off")
            .map_err(sqlite_error(what()))?;
        copy(&from, &mut to).map_err(sqlite_error(what()))?;
        drop(to);
        drop(remove);
        let len = file
            .metadata()
            .map_err(|source| NodeError::Io {
                what: what(),
                source,
            })?
            .len();
        Ok(Export {
            len: Some(len),
            bytes: Box::new(file),
        })
    }

    fn import(&self, name: &DbName, bytes: &mut dyn Read) -> Result<Pos, NodeError> {
        if !self.is_primary() {
            return Err(NodeError::NotPrimary {
                primary: self.ports.lag.primary_hostname(),
            });
        }
        let what = || format!("import {name}");
        let io = |source| NodeError::Io {
            what: what(),
            source,
        };
        let bad = |why: String| NodeError::BadDatabase {
            db: name.clone(),
            why,
        };
        let target = self.mount.join(name.as_str());
        check_name(name, &target)?;
        let (path, mut file) = self.tmp()?;
        let _remove = Remove(path.clone());
        std::io::copy(bytes, &mut file).map_err(io)?;
        let mut head = [0; DB_HEADER_LEN];
        file.read_exact_at(&mut head, 0)
            .map_err(|_| bad("it is shorter than a header".into()))?;
        let header =
            DbHeader::parse(&head).ok_or_else(|| bad("it is not a SQLite database".into()))?;
        if header.is_wal() {
            // It comes without its WAL; read as it is. The copy takes the journal mode of its destination.
            file.seek(SeekFrom::Start(18))
                .and_then(|_| file.write_all(&[1, 1]))
                .map_err(io)?;
        }
        drop(file);
        let from = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY)
            .map_err(sqlite_error(what()))?;
        let check: String = from
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|e| bad(e.to_string()))?;
        if check != "ok" {
            return Err(bad(check));
        }
        if let Some(dir) = target.parent() {
            std::fs::create_dir_all(dir).map_err(io)?;
        }
        let existed = target.metadata().is_ok_and(|m| m.len() > 0);
        let mut to = Connection::open(&target).map_err(sqlite_error(what()))?;
        to.busy_handler(Some(wait_for_writer))
            .map_err(sqlite_error(what()))?;
        let mut is_wal = header.is_wal();
        if existed {
            let mode: String = to
                .query_row("PRAGMA journal_mode", [], |row| row.get(0))
                .map_err(sqlite_error(what()))?;
            is_wal |= mode == "wal";
            let size: u32 = to
                .query_row("PRAGMA page_size", [], |row| row.get(0))
                .map_err(sqlite_error(what()))?;
            if size != header.page_size.get() {
                // No WAL can change the page size.
                to.query_row("PRAGMA journal_mode=delete", [], |_| Ok(()))
                    .map_err(sqlite_error(what()))?;
            }
        }
        copy(&from, &mut to).map_err(sqlite_error(what()))?;
        if is_wal {
            to.query_row("PRAGMA journal_mode=wal", [], |_| Ok(()))
                .map_err(sqlite_error(what()))?;
        }
        drop(to);
        let db = self.find(name)?;
        db.capture_wal().map_err(|e| NodeError::Io {
            what: chain(&e),
            source: std::io::Error::other("capture"),
        })?;
        Ok(db.pos())
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        let events = self.events.subscribe();
        self.listeners.notify_one();
        events
    }

    fn metrics(&self, text: &mut MetricsText) {
        if !self.is_primary() {
            #[expect(
                clippy::cast_precision_loss,
                reason = "milliseconds as seconds, for a graph"
            )]
            let lag = self.ports.lag.ms(false) as f64 / 1000.0;
            text.single(
                "litefs_lag_seconds",
                MetricKind::Gauge,
                "How far behind the primary this node is.",
                lag,
            );
        }
        super::lost::metrics(&self.ports.store, text);
        #[expect(clippy::cast_precision_loss, reason = "a small count")]
        let connected = self.replicas.connected_count() as f64;
        text.single(
            "litefs_http_stream_count",
            MetricKind::Gauge,
            "Replicas that follow this node.",
            connected,
        );
        text.count(
            "litefs_role_changes_total",
            "How often this node became primary, or ceased to be.",
            self.ports.role_changes.load(Ordering::Relaxed),
        );
        #[expect(clippy::cast_precision_loss, reason = "Prometheus knows only f64")]
        let epoch = self.ports.role.borrow().epoch as f64;
        let help = "Newest tenure of a primary that this node heard of.";
        text.single("litefs_epoch", MetricKind::Gauge, help, epoch);
        if let Some(election) = &self.election {
            election.metrics(text);
        }
    }
}

/// Sends an event for every change of the primary.
pub(super) async fn publish_roles(
    ports: Arc<Ports>,
    events: broadcast::Sender<Event>,
    hostname: String,
) {
    let mut roles = ports.role.subscribe();
    let mut last = roles.borrow_and_update().clone();
    while roles.changed().await.is_ok() {
        let now = roles.borrow_and_update().clone();
        // Nobody listening is not an error.
        if now.epoch != last.epoch {
            let _ = events.send(Event::EpochChange { epoch: now.epoch });
        }
        if (now.is_primary, &now.followed) != (last.is_primary, &last.followed) {
            let _ = events.send(Event::PrimaryChange {
                is_primary: now.is_primary,
                hostname: match now.is_primary {
                    true => Some(hostname.clone()),
                    false => now.followed.clone(),
                },
            });
        }
        last = now;
    }
}

/// Sends an event for every move of a database while somebody listens.
pub(super) async fn publish_events(
    ports: Arc<Ports>,
    events: broadcast::Sender<Event>,
    listeners: Arc<Notify>,
) {
    loop {
        // A commit wakes its subscribers: without listeners there is none.
        listeners.notified().await;
        let mut changes = ports.node.hub.subscribe();
        while events.receiver_count() > 0 {
            let Some(names) = changes.recv().await else {
                return;
            };
            send_events(&ports, &events, names);
        }
    }
}

fn send_events(ports: &Ports, events: &broadcast::Sender<Event>, names: Vec<DbName>) {
    for name in names {
        let Some(db) = ports.store.get(name.as_str()) else {
            continue;
        };
        let p = db.published();
        // Nobody listening is not an error.
        let _ = events.send(Event::Tx {
            db: name,
            pos: p.pos,
            page_size: p.page_size,
            commit: p.page_count,
            timestamp_ms: p.timestamp_ms,
        });
    }
}
