//! The replica's side of a stream: dials the primary, reads frames, and lets a pool of workers apply them.
//!
//! The reader never waits for the store: it sorts frames into lanes (one per database, bounded by the sender's window),
//! and whichever worker is free empties a lane in batches, one worker at a time per lane. Threads come from
//! tokio's blocking pool and go back when there is nothing to do, so 1,000 idle databases cost none.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use super::conn::{Conn, write_all};
use super::frame::{FrameError, FrameReader, WireBuf};
use super::lane::{After, ConnShared, Item, Lane, Link, What};
use super::message::{ENTRIES_PER_FRAME, Hello, Message, RecordStart, Welcome};
use super::send::chain;
use super::{DatabaseFilter, DbName, PrimaryInfo, Record, Sink, SinkError};
use crate::ltx::Pos;

/// Page checksums per frame.
const SUMS_PER_FRAME: usize = 64 << 10;
/// Reserved for a record before its bytes arrive.
const FIRST_RESERVE: usize = 1 << 20;

/// A connection that is being made.
pub type Dialing<'a> = Pin<Box<dyn Future<Output = Result<Conn, DialError>> + Send + 'a>>;

/// Makes connections to a primary, up to the point where frames flow. `http::stream` has the real one.
pub trait Dial: Send + Sync + 'static {
    /// Connects to the node with this address.
    fn dial<'a>(&'a self, target: &'a str) -> Dialing<'a>;
}

/// Why no stream came about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The address makes no sense.
    #[error("primary address {target:?}: {why}")]
    Address {
        /// The address.
        target: String,
        /// What is wrong with it.
        why: String,
    },
    /// Not reachable.
    #[error("connect to {target}")]
    Connect {
        /// The address.
        target: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Reachable, but no stream.
    #[error("{target} answered {status}: {body}")]
    Refused {
        /// The address.
        target: String,
        /// HTTP status.
        status: u16,
        /// What it said.
        body: String,
    },
}

/// Settings of the receiving side.
#[derive(Debug, Clone)]
pub struct ReceiveConfig {
    /// Host name told to the primary.
    pub hostname: String,
    /// A primary not heard for this long is gone.
    pub silence: Duration,
    /// How often the primary gets a sign of life.
    pub alive: Duration,
    /// A connection that takes no byte for this long is dead.
    pub write_stall: Duration,
    /// First pause before connecting again; grows to ten times that.
    pub reconnect_delay: Duration,
    /// Databases applied at a time.
    pub max_workers: usize,
}

impl Default for ReceiveConfig {
    fn default() -> ReceiveConfig {
        ReceiveConfig {
            hostname: String::new(),
            silence: Duration::from_secs(5),
            alive: Duration::from_secs(1),
            write_stall: Duration::from_secs(5),
            reconnect_delay: Duration::from_secs(1),
            max_workers: 64,
        }
    }
}

/// Why a stream from a primary ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// It did not begin.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The bytes made no sense, or stopped.
    #[error("primary's bytes")]
    Frame(#[from] FrameError),
    /// The connection broke.
    #[error("write to the primary")]
    Write(#[source] io::Error),
    /// The primary turned us away.
    #[error("refused by the primary: {0}")]
    Refused(String),
    /// The primary said goodbye.
    #[error("closed by the primary: {0}")]
    Closed(String),
    /// The primary closed the connection.
    #[error("the primary closed the connection")]
    Eof,
    /// The primary is of another cluster.
    #[error(
        "primary {hostname:?} belongs to cluster {theirs}, this node to {ours}; \
         to move it there, start it on an empty data directory"
    )]
    OtherCluster {
        /// The primary.
        hostname: String,
        /// Its cluster.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// We are the primary we dialled, or have its identity.
    #[error("primary {0:?} has this node's own id: a copied data directory needs an id of its own")]
    Itself(String),
    /// Frames that do not belong together.
    #[error("protocol: {0}")]
    Protocol(String),
    /// The store does not go on with this primary.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

impl ReceiveError {
    /// Adds the database to a protocol error.
    pub(super) fn of(self, db: &DbName) -> ReceiveError {
        match self {
            ReceiveError::Protocol(why) => ReceiveError::Protocol(format!("{db}: {why}")),
            other => other,
        }
    }
}

/// Follows a primary.
pub struct Receiver {
    sink: Arc<dyn Sink>,
    dial: Arc<dyn Dial>,
    config: ReceiveConfig,
    instance: u64,
    connections: AtomicU64,
    lanes: Mutex<HashMap<DbName, Arc<Lane>>>,
    workers: Mutex<Workers>,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").finish_non_exhaustive()
    }
}

/// Lanes with something to do, and how many threads are at it.
#[derive(Default)]
struct Workers {
    ready: VecDeque<Arc<Lane>>,
    running: usize,
}

impl Receiver {
    /// Makes a receiver that writes into `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn Sink>, dial: Arc<dyn Dial>, config: ReceiveConfig) -> Arc<Receiver> {
        Arc::new(Receiver {
            sink,
            dial,
            config,
            instance: rand::random(),
            connections: AtomicU64::new(0),
            lanes: Mutex::default(),
            workers: Mutex::default(),
        })
    }

    /// Follows whichever primary `targets` names, connecting again whenever the stream ends, until the sender of
    /// `targets` is dropped. A change of target ends the stream at once.
    pub async fn run(self: Arc<Self>, mut targets: watch::Receiver<Option<String>>) {
        let mut attempt = 0;
        loop {
            let Some(target) = targets.borrow_and_update().clone() else {
                if targets.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let began = Instant::now();
            let result = tokio::select! {
                result = self.follow(&target) => result,
                changed = targets.changed() => match changed {
                    Ok(()) => { attempt = 0; continue }
                    Err(_) => return,
                },
            };
            if began.elapsed() > 2 * self.config.silence {
                attempt = 0;
            }
            let delay = backoff(attempt, self.config.reconnect_delay, rand::random());
            attempt = attempt.saturating_add(1);
            if let Err(e) = result {
                tracing::warn!(%target, error = %chain(&e), ?delay, "stream ended, connecting again");
            }
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                changed = targets.changed() => match changed {
                    Ok(()) => attempt = 0,
                    Err(_) => return,
                },
            }
        }
    }

    /// Follows a primary over one connection until it ends.
    ///
    /// # Errors
    /// Always, as a stream has no end of its own.
    pub async fn follow(self: &Arc<Self>, target: &str) -> Result<(), ReceiveError> {
        let no = self.connections.fetch_add(1, Ordering::Relaxed) + 1;
        let Conn { read, mut write } = self.dial.dial(target).await?;
        let mut reader = FrameReader::new(read, self.config.silence);
        self.say_hello(&mut write).await?;
        let welcome = match read_message(&mut reader).await?.1 {
            Message::Welcome(welcome) => welcome,
            Message::Refuse { why } => return Err(ReceiveError::Refused(why)),
            other => return Err(out_of_place(&other, "Welcome is missing").into()),
        };
        let primary = self.check(welcome).await?;
        tracing::info!(primary = %primary.hostname, epoch = primary.epoch, "following");
        self.sink.connected(&primary);
        let _disconnect = OnDrop(|| self.sink.disconnected());
        let durable = self.sink.durable_changes();
        let conn = ConnShared::new(no, durable.is_some());
        self.lanes
            .lock()
            .retain(|_, lane| Arc::strong_count(lane) > 1 || !lane.is_idle());
        let inbound = Inbound {
            receiver: Arc::clone(self),
            conn: Arc::clone(&conn),
            filter: self.sink.filter(),
            streams: Vec::new(),
            by_name: Arc::default(),
        };
        let by_name = Arc::clone(&inbound.by_name);
        let ended = tokio::select! {
            result = inbound.run(&mut reader) => result,
            result = write_answers(&conn, &mut write, &self.config) => result,
            () = ack_durable(&*self.sink, durable, &by_name) => Ok(()),
            () = conn.broken.cancelled() => Ok(()),
        };
        match conn.take_failure() {
            Some(e) => Err(e),
            None => ended,
        }
    }

    async fn say_hello(
        &self,
        write: &mut (impl tokio::io::AsyncWrite + Unpin),
    ) -> Result<(), ReceiveError> {
        let sink = Arc::clone(&self.sink);
        let (positions, filter, epoch) =
            blocking(move || (sink.positions(), sink.filter(), sink.epoch())).await?;
        let positions: Vec<(DbName, Pos)> = positions
            .into_iter()
            .filter(|(db, _)| filter.matches(db))
            .collect();
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let hello = Message::Hello(Hello {
            cluster_id: self.sink.cluster_id(),
            node_id: self.sink.node_id(),
            instance: self.instance,
            hostname: self.config.hostname.clone(),
            epoch,
            position_count: count(positions.len()),
            filter_count: count(filter.patterns().len()),
        });
        let mut wire = WireBuf::default();
        hello.encode(0, &mut wire);
        for part in positions.chunks(ENTRIES_PER_FRAME) {
            Message::Positions(part.to_vec()).encode(0, &mut wire);
        }
        for part in filter.patterns().chunks(ENTRIES_PER_FRAME) {
            Message::Filter(part.to_vec()).encode(0, &mut wire);
        }
        write_all(write, &mut wire, self.config.write_stall)
            .await
            .map_err(ReceiveError::Write)
    }

    async fn check(&self, welcome: Welcome) -> Result<PrimaryInfo, ReceiveError> {
        let ours = self.sink.cluster_id();
        if let Some(ours) = ours.as_ref().filter(|id| **id != welcome.cluster_id) {
            return Err(ReceiveError::OtherCluster {
                hostname: welcome.hostname,
                theirs: welcome.cluster_id,
                ours: ours.clone(),
            });
        }
        if welcome.node_id == self.sink.node_id() {
            return Err(ReceiveError::Itself(welcome.hostname));
        }
        let sink = Arc::clone(&self.sink);
        let cluster_id = welcome.cluster_id;
        blocking(move || {
            // INV-REPL-2: before anything of this primary is taken.
            sink.observe_epoch(welcome.epoch)?;
            match ours {
                Some(_) => Ok(()),
                None => sink.adopt_cluster_id(&cluster_id),
            }
        })
        .await??;
        Ok(PrimaryInfo {
            node_id: welcome.node_id,
            hostname: welcome.hostname,
            epoch: welcome.epoch,
        })
    }

    fn lane(&self, db: &DbName) -> Arc<Lane> {
        let mut lanes = self.lanes.lock();
        let lane = lanes
            .entry(db.clone())
            .or_insert_with(|| Lane::new(db.clone()));
        Arc::clone(lane)
    }

    /// Gives a lane to a worker, and starts one if all are busy and there may be more.
    fn schedule(self: &Arc<Self>, lane: Arc<Lane>) {
        let mut workers = self.workers.lock();
        workers.ready.push_back(lane);
        if workers.running < self.config.max_workers {
            workers.running += 1;
            drop(workers);
            let receiver = Arc::clone(self);
            tokio::task::spawn_blocking(move || receiver.work());
        }
    }

    /// What a worker thread does: one job per lane and turn, until there is none.
    fn work(self: Arc<Self>) {
        let retire = Retire(&self);
        loop {
            let lane = {
                let mut workers = self.workers.lock();
                match workers.ready.pop_front() {
                    Some(lane) => lane,
                    None => {
                        workers.running -= 1;
                        std::mem::forget(retire);
                        return;
                    }
                }
            };
            match lane.work(&*self.sink) {
                After::Idle => {}
                After::Again => self.workers.lock().ready.push_back(lane),
                After::Pause(delay) => {
                    let receiver = Arc::clone(&self);
                    tokio::spawn(async move {
                        tokio::time::sleep(delay).await;
                        receiver.schedule(lane);
                    });
                }
            }
        }
    }
}

/// Counts a worker out if the store panics under it; its lane stays out of service, the others go on.
struct Retire<'a>(&'a Receiver);

impl Drop for Retire<'_> {
    fn drop(&mut self) {
        self.0.workers.lock().running -= 1;
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// The reading half: sorts frames into lanes.
struct Inbound {
    receiver: Arc<Receiver>,
    conn: Arc<ConnShared>,
    filter: DatabaseFilter,
    streams: Vec<Stream>,
    by_name: Arc<Mutex<HashMap<DbName, Arc<Link>>>>,
}

struct Stream {
    lane: Arc<Lane>,
    link: Arc<Link>,
    /// A record of which parts are still to come.
    partial: Option<(RecordStart, BytesMut)>,
}

impl Inbound {
    async fn run<R: tokio::io::AsyncRead + Unpin>(
        mut self,
        reader: &mut FrameReader<R>,
    ) -> Result<(), ReceiveError> {
        loop {
            let (stream, message) = read_message(reader).await?;
            match message {
                Message::Heartbeat {
                    now_ms,
                    is_caught_up,
                    nak_count,
                } => self.heartbeat(now_ms, is_caught_up, nak_count),
                Message::Bye { why } => return Err(ReceiveError::Closed(why)),
                Message::Open { db } => self.open(stream, &db)?,
                message => self.take(stream, message)?,
            }
        }
    }

    fn heartbeat(&self, now_ms: i64, is_caught_up: bool, nak_count: u64) {
        // Held across the call, as in `ConnShared::finish`.
        let mut progress = self.conn.progress.lock();
        let is_reached = is_caught_up && progress.mark(now_ms, nak_count);
        self.receiver.sink.heartbeat(now_ms, is_reached);
    }

    fn open(&mut self, stream: u16, db: &DbName) -> Result<(), ReceiveError> {
        if usize::from(stream) != self.streams.len() + 1 {
            return Err(ReceiveError::Protocol(format!(
                "{db}: stream id {stream} after {}",
                self.streams.len()
            )));
        }
        if !self.filter.matches(db) {
            return Err(ReceiveError::Protocol(format!(
                "{db} is not in this node's filter"
            )));
        }
        let link = Link::new(Arc::clone(&self.conn), stream);
        if self
            .by_name
            .lock()
            .insert(db.clone(), Arc::clone(&link))
            .is_some()
        {
            return Err(ReceiveError::Protocol(format!("{db} opened twice")));
        }
        let lane = self.receiver.lane(db);
        lane.attach(Arc::clone(&link));
        self.streams.push(Stream {
            lane,
            link,
            partial: None,
        });
        self.push(stream, 0, 0, What::Opened)
    }

    fn stream(&mut self, stream: u16) -> Result<&mut Stream, ReceiveError> {
        self.streams
            .get_mut(usize::from(stream).wrapping_sub(1))
            .ok_or_else(|| ReceiveError::Protocol(format!("stream id {stream} is not open")))
    }

    fn push(
        &mut self,
        stream: u16,
        generation: u32,
        cost: u64,
        what: What,
    ) -> Result<(), ReceiveError> {
        let slot = self.stream(stream)?;
        let item = Item {
            generation,
            cost,
            what,
        };
        if slot.lane.push(&slot.link, item) {
            let lane = Arc::clone(&slot.lane);
            self.receiver.schedule(lane);
        }
        Ok(())
    }

    fn take(&mut self, stream: u16, message: Message) -> Result<(), ReceiveError> {
        let cost = message.cost();
        let slot = self.stream(stream)?;
        slot.link.arrived(cost)?;
        if let Some((start, _)) = &slot.partial
            && !matches!(message, Message::RecordPart { .. })
        {
            // A nak on its way made the sender give the record up; what came of it is done with.
            let generation = start.generation;
            let held = slot.partial.take().map_or(0, |(_, bytes)| bytes.len());
            self.push(stream, generation, held as u64, What::Unfinished)?;
        }
        let slot = self.stream(stream)?;
        let (generation, what) = match message {
            Message::Record(start) => {
                slot.link.check_window()?;
                let reserve = FIRST_RESERVE.min(start.ltx_len as usize);
                let mut bytes = BytesMut::with_capacity(reserve);
                if start.bytes.len() == start.ltx_len as usize {
                    return self.push_record(stream, &start, start.bytes.clone(), cost);
                }
                bytes.extend_from_slice(&start.bytes);
                slot.partial = Some((start, bytes));
                return Ok(());
            }
            Message::RecordPart {
                generation,
                offset,
                bytes,
            } => return self.take_part(stream, generation, offset, &bytes),
            Message::Ask { generation, why } => {
                tracing::info!(db = %slot.lane.db, %why, "the primary sends a page copy");
                (generation, What::Ask)
            }
            Message::SnapshotBegin {
                generation,
                snapshot,
            } => (generation, What::CopyBegin(snapshot)),
            Message::Pages(batch) => {
                slot.link.check_window()?;
                let page_size = batch.page_size.get();
                let pages = batch.pages;
                (batch.generation, What::Pages { page_size, pages })
            }
            Message::SnapshotEnd { generation, end } => (generation, What::CopyEnd(end)),
            Message::Drop {
                generation,
                sender_epoch,
                at,
            } => (generation, What::Drop { sender_epoch, at }),
            Message::History {
                generation,
                milestones,
            } => (generation, What::History(milestones)),
            Message::Unknown => (0, What::Unknown),
            other => return Err(out_of_place(&other, "not from a primary").into()),
        };
        self.push(stream, generation, cost, what)
    }

    fn take_part(
        &mut self,
        stream: u16,
        generation: u32,
        offset: u32,
        bytes: &[u8],
    ) -> Result<(), ReceiveError> {
        let slot = self.stream(stream)?;
        let Some((start, held)) = slot.partial.as_mut().filter(|(start, held)| {
            start.generation == generation
                && held.len() == offset as usize
                && held.len() + bytes.len() <= start.ltx_len as usize
        }) else {
            return Err(ReceiveError::Protocol(format!(
                "{}: {} bytes at {offset} do not continue a record",
                slot.lane.db,
                bytes.len()
            )));
        };
        held.extend_from_slice(bytes);
        if held.len() == start.ltx_len as usize
            && let Some((start, held)) = slot.partial.take()
        {
            let cost = held.len() as u64;
            return self.push_record(stream, &start, held.freeze(), cost);
        }
        Ok(())
    }

    fn push_record(
        &mut self,
        stream: u16,
        start: &RecordStart,
        ltx: bytes::Bytes,
        cost: u64,
    ) -> Result<(), ReceiveError> {
        let what = What::Record {
            sender_epoch: start.sender_epoch,
            sync: start.sync,
            record: Record {
                meta: start.meta,
                ltx,
            },
        };
        self.push(stream, start.generation, cost, what)
    }
}

/// The writing half: sends what lanes have to say, at once, and a sign of life by its own clock. An answer to heartbeats
/// would not do: on a slow link those wait behind data for longer than the primary waits for us.
async fn write_answers(
    conn: &ConnShared,
    write: &mut (impl tokio::io::AsyncWrite + Unpin),
    config: &ReceiveConfig,
) -> Result<(), ReceiveError> {
    let stall = config.write_stall;
    let mut wire = WireBuf::default();
    loop {
        let arrived = conn.outbox.arrived.notified();
        if tokio::time::timeout(config.alive, arrived).await.is_err() {
            Message::Alive.encode(0, &mut wire);
        }
        for (stream, message) in conn.outbox.take() {
            match message {
                Message::Checksums(sums) => {
                    for part in sums.chunks(SUMS_PER_FRAME) {
                        Message::Checksums(part.to_vec()).encode(stream, &mut wire);
                        write_all(write, &mut wire, stall)
                            .await
                            .map_err(ReceiveError::Write)?;
                    }
                }
                message => message.encode(stream, &mut wire),
            }
        }
        write_all(write, &mut wire, stall)
            .await
            .map_err(ReceiveError::Write)?;
    }
}

/// Acks what a store put on disk after it had answered.
async fn ack_durable(
    sink: &dyn Sink,
    changes: Option<super::Changes>,
    by_name: &Mutex<HashMap<DbName, Arc<Link>>>,
) {
    let Some(mut changes) = changes else {
        return std::future::pending().await;
    };
    while let Some(names) = changes.recv().await {
        for db in names {
            let link = by_name.lock().get(&db).cloned();
            if let Some(link) = link {
                link.ack(|| sink.applied(&db), false);
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ReceiveError> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|e| ReceiveError::Protocol(format!("the store panicked: {e}")))
}

async fn read_message<R: tokio::io::AsyncRead + Unpin>(
    reader: &mut FrameReader<R>,
) -> Result<(u16, Message), ReceiveError> {
    match reader.next().await? {
        Some(frame) => Ok((frame.stream, Message::decode(frame)?)),
        None => Err(ReceiveError::Eof),
    }
}

fn out_of_place(message: &Message, why: &str) -> FrameError {
    FrameError::Unexpected {
        kind: message.kind(),
        why: why.to_owned(),
    }
}

/// Returns how long to wait before connecting for the `attempt`th time again: doubling from `initial` to ten
/// times that, the upper half of it jittered by `random` so that replicas do not come back all at once.
#[must_use]
pub fn backoff(attempt: u32, initial: Duration, random: u32) -> Duration {
    let full = initial
        .saturating_mul(1 << attempt.min(4))
        .min(initial * 10);
    let half = full / 2;
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_is_bounded_and_jittered() {
        let initial = Duration::from_secs(1);
        assert_eq!(backoff(0, initial, 0), initial / 2);
        assert_eq!(backoff(0, initial, u32::MAX), initial);
        assert_eq!(backoff(2, initial, u32::MAX), initial * 4);
        for attempt in 4..100 {
            assert_eq!(backoff(attempt, initial, u32::MAX), initial * 10);
        }
    }
}
