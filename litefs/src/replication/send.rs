//! The primary's side of a stream: a thread per replica that writes, a task that reads.
//!
//! The thread runs the writing half so that calls into [`Source`] may block it without a hop to another thread: a
//! change wakes it, it reads the log, it writes to the socket. Replicas are few; databases are many, and share it.
//! The order of a round is: take acks and changes, decide (`session`), do one turn, write.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::conn::{Conn, write_all};
use super::frame::{FrameError, FrameReader, Kind, WireBuf};
use super::message::{Hello, MAX_STREAMS, Message, PagePacker, Welcome};
use super::replicas::{Registration, Replicas};
use super::session::{Limits, OutOfStreams, SendSession, Turn};
use super::{
    Changes, DatabaseFilter, DbName, SnapshotReader, SnapshotRequest, Source, SourceError,
};
use crate::ltx::{PageSize, Pgno, Pos};

/// Messages from a replica that wait for the writing thread; when full, the reader leaves bytes in the socket.
const INBOX_LEN: usize = 256;
/// Most bytes of pages in one frame, whatever a reader hands out.
const PAGES_LEN: usize = 1 << 20;

/// Settings of the sending side.
#[derive(Debug, Clone)]
pub struct SendConfig {
    /// Host name told to replicas.
    pub hostname: String,
    /// Bounds of each connection.
    pub limits: Limits,
    /// How often the clock is sent.
    pub heartbeat: Duration,
    /// A replica not heard for this long is gone.
    pub silence: Duration,
    /// A connection that takes no byte for this long is dead.
    pub write_stall: Duration,
    /// How fast page copies are sent to a replica at most, in bytes a second.
    pub copy_rate: u64,
}

impl Default for SendConfig {
    fn default() -> SendConfig {
        SendConfig {
            hostname: String::new(),
            limits: Limits::default(),
            heartbeat: Duration::from_secs(1),
            silence: Duration::from_secs(5),
            write_stall: Duration::from_secs(5),
            // Faster than most networks; without a limit, a copy to a near replica took a third of the programs' speed.
            copy_rate: 256_000_000,
        }
    }
}

/// Keeps page copies to a rate.
#[derive(Debug)]
struct Pace {
    /// Bytes a second.
    rate: u64,
    /// When all that was read so far may have been sent.
    due: Instant,
}

impl Pace {
    /// Pauses shorter than this are put off: timers are no more exact.
    const MIN_PAUSE: Duration = Duration::from_millis(2);
    /// How much time of a copy that was slower than the rate can be made up for.
    const MAX_CREDIT: Duration = Duration::from_millis(20);

    fn new(rate: u64) -> Pace {
        Pace {
            rate: rate.max(1),
            due: Instant::now(),
        }
    }

    /// Notes what was read at `now`.
    fn add(&mut self, bytes: usize, now: Instant) {
        let earliest = now.checked_sub(Self::MAX_CREDIT).unwrap_or(now);
        let nanos = (bytes as u64).saturating_mul(1_000_000_000) / self.rate;
        self.due = self.due.max(earliest) + Duration::from_nanos(nanos);
    }

    /// Returns how long to pause at `now`.
    fn pause(&self, now: Instant) -> Option<Duration> {
        let ahead = self.due.saturating_duration_since(now);
        (ahead >= Self::MIN_PAUSE).then_some(ahead)
    }
}

/// Why a stream to a replica ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The bytes from the replica made no sense, or stopped.
    #[error("replica's bytes")]
    Frame(#[from] FrameError),
    /// The connection broke.
    #[error("write to the replica")]
    Write(#[source] io::Error),
    /// The replica was turned away.
    #[error("refused replica: {0}")]
    Refused(String),
    /// This node ended the stream.
    #[error("closed: {0}")]
    Closed(String),
    /// More databases than a connection can number.
    #[error(transparent)]
    OutOfStreams(#[from] OutOfStreams),
    /// The writing thread could not be started, or panicked.
    #[error("sending thread: {0}")]
    Thread(String),
}

/// Serves streams to replicas.
pub struct Sender {
    source: Arc<dyn Source>,
    replicas: Arc<Replicas>,
    config: SendConfig,
    closing: CancellationToken,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

impl Sender {
    /// Makes a sender of what `source` has.
    #[must_use]
    pub fn new(source: Arc<dyn Source>, replicas: Arc<Replicas>, config: SendConfig) -> Arc<Self> {
        Arc::new(Sender {
            source,
            replicas,
            config,
            closing: CancellationToken::new(),
        })
    }

    /// Returns who follows, and how far.
    #[must_use]
    pub fn replicas(&self) -> &Arc<Replicas> {
        &self.replicas
    }

    /// Returns this node's epoch if it may serve streams now.
    #[must_use]
    pub fn epoch(&self) -> Option<u64> {
        self.source.epoch()
    }

    /// Ends all streams, now and to come: the node is shutting down.
    pub fn close(&self) {
        self.closing.cancel();
    }

    /// Serves one replica until either side ends it.
    ///
    /// # Errors
    /// Says why it ended; a clean end by the replica is no error.
    pub async fn serve(self: Arc<Self>, conn: Conn) -> Result<(), SendError> {
        let Conn { read, mut write } = conn;
        let mut reader = FrameReader::new(read, self.config.silence);
        let greeting = match self.greet(&mut reader).await {
            Ok(greeting) => greeting,
            Err(e) => {
                let why = match &e {
                    SendError::Refused(why) => why.clone(),
                    SendError::Frame(e) => e.to_string(),
                    _ => return Err(e),
                };
                let mut wire = WireBuf::default();
                Message::Refuse { why }.encode(0, &mut wire);
                let _ = write_all(&mut write, &mut wire, self.config.write_stall).await;
                return Err(e);
            }
        };
        let names = Arc::new(Mutex::new(Vec::new()));
        let registration = Arc::new(greeting.registration);
        let (inbox_in, inbox) = mpsc::channel(INBOX_LEN);
        let writer = Writer {
            wire: WireBuf::default(),
            packer: PagePacker::default(),
            copies: HashMap::new(),
            names: Arc::clone(&names),
            epoch: greeting.epoch,
            // Subscribe first, list after: nothing falls between.
            changes: self.source.changes(),
            session: SendSession::new(
                self.config.limits.clone(),
                greeting.epoch,
                greeting.filter,
                greeting.positions,
            )?,
            sender: Arc::clone(&self),
            write,
            inbox,
            ended: registration.ended.clone(),
            pace: Pace::new(self.config.copy_rate),
        };
        let done = writer.spawn(greeting.hello.node_id)?;
        let inbound = Inbound {
            epoch: greeting.epoch,
            reader,
            names,
            registration,
            inbox: inbox_in,
        };
        tokio::pin!(done);
        tokio::select! {
            read = inbound.run() => {
                // The inbox is closed now, which ends the thread.
                let wrote = done.await;
                read?;
                wrote
            }
            wrote = &mut done => wrote,
        }
    }

    async fn greet<R: tokio::io::AsyncRead + Unpin>(
        &self,
        reader: &mut FrameReader<R>,
    ) -> Result<Greeting, SendError> {
        let Message::Hello(hello) = next(reader).await? else {
            return Err(SendError::Refused("the first frame is Hello".to_owned()));
        };
        let epoch = self.admit(&hello)?;
        let mut positions = Vec::new();
        while positions.len() < hello.position_count as usize {
            match next(reader).await? {
                Message::Positions(more) if !more.is_empty() => positions.extend(more),
                other => return Err(out_of_place(&other, "positions are missing").into()),
            }
        }
        let mut filter = Vec::new();
        while filter.len() < hello.filter_count as usize {
            match next(reader).await? {
                Message::Filter(more) if !more.is_empty() => filter.extend(more),
                other => return Err(out_of_place(&other, "filter entries are missing").into()),
            }
        }
        if positions.len() > MAX_STREAMS || filter.len() > MAX_STREAMS {
            return Err(SendError::Refused(OutOfStreams.to_string()));
        }
        let registration = self
            .replicas
            .enter(
                hello.node_id,
                hello.instance,
                &hello.hostname,
                self.config.silence,
                Instant::now(),
            )
            .map_err(|e| SendError::Refused(e.to_string()))?;
        Ok(Greeting {
            hello,
            epoch,
            positions,
            filter: DatabaseFilter::new(filter),
            registration,
        })
    }

    fn admit(&self, hello: &Hello) -> Result<u64, SendError> {
        let cluster_id = self.source.cluster_id();
        let refuse = |why: String| Err(SendError::Refused(why));
        let Some(epoch) = self.source.epoch() else {
            return refuse("this node is not the primary".to_owned());
        };
        if let Some(theirs) = hello.cluster_id.as_ref().filter(|id| **id != cluster_id) {
            return refuse(format!(
                "this primary belongs to cluster {cluster_id}, the replica {:?} to {theirs}; \
                 to move it here, start it on an empty data directory",
                hello.hostname
            ));
        }
        if hello.node_id == self.source.node_id() {
            return refuse(format!(
                "node id {:016x} is the primary's own: a node does not follow itself, \
                 and a copied data directory needs an id of its own",
                hello.node_id
            ));
        }
        if hello.epoch > epoch {
            return refuse(format!(
                "this primary's epoch {epoch} is over: the replica has seen {}",
                hello.epoch
            ));
        }
        Ok(epoch)
    }
}

struct Greeting {
    hello: Hello,
    epoch: u64,
    positions: Vec<(DbName, Pos)>,
    filter: DatabaseFilter,
    registration: Registration,
}

async fn next<R: tokio::io::AsyncRead + Unpin>(
    reader: &mut FrameReader<R>,
) -> Result<Message, FrameError> {
    match reader.next().await? {
        Some(frame) => Message::decode(frame),
        None => Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into())),
    }
}

fn out_of_place(message: &Message, why: &str) -> FrameError {
    FrameError::Unexpected {
        kind: message.kind(),
        why: why.to_owned(),
    }
}

/// The reading half: keeps the registry, and hands the rest to the writing thread.
struct Inbound<R> {
    epoch: u64,
    reader: FrameReader<R>,
    names: Arc<Mutex<Vec<DbName>>>,
    registration: Arc<Registration>,
    inbox: mpsc::Sender<(u16, Message)>,
}

impl<R: tokio::io::AsyncRead + Unpin> Inbound<R> {
    async fn run(mut self) -> Result<(), SendError> {
        while let Some(frame) = self.reader.next().await? {
            self.registration.heard(Instant::now());
            let stream = frame.stream;
            let message = Message::decode(frame)?;
            match &message {
                Message::Alive => continue,
                Message::Ack { applied, .. } => {
                    let db = self.name(stream, message.kind())?;
                    self.registration.acked(self.epoch, &db, *applied);
                }
                Message::Stalled { why } => {
                    let db = self.name(stream, message.kind())?;
                    self.registration.stalled(&db, why.clone());
                    continue;
                }
                Message::Nak { .. } | Message::Offer { .. } | Message::Checksums(_) => {}
                other => return Err(out_of_place(other, "not from a replica").into()),
            }
            if self.inbox.send((stream, message)).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    fn name(&self, stream: u16, kind: Kind) -> Result<DbName, FrameError> {
        let index = usize::from(stream).wrapping_sub(1);
        let name = self.names.lock().get(index).cloned();
        name.ok_or_else(|| FrameError::Unexpected {
            kind,
            why: format!("no stream {stream}"),
        })
    }
}

/// The writing half.
struct Writer {
    sender: Arc<Sender>,
    epoch: u64,
    session: SendSession,
    changes: Changes,
    copies: HashMap<u16, Box<dyn SnapshotReader>>,
    names: Arc<Mutex<Vec<DbName>>>,
    packer: PagePacker,
    wire: WireBuf,
    write: Box<dyn tokio::io::AsyncWrite + Send + Unpin>,
    inbox: mpsc::Receiver<(u16, Message)>,
    ended: CancellationToken,
    pace: Pace,
}

impl Writer {
    /// Runs on a thread of its own; the future gives its end.
    fn spawn(self, node_id: u64) -> Result<impl Future<Output = Result<(), SendError>>, SendError> {
        let (done, result) = tokio::sync::oneshot::channel();
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new()
            .name(format!("send-{node_id:08x}"))
            .spawn(move || {
                let _ = done.send(runtime.block_on(self.run()));
            })
            .map_err(|e| SendError::Thread(e.to_string()))?;
        Ok(async move {
            result
                .await
                .unwrap_or_else(|_| Err(SendError::Thread("panicked".to_owned())))
        })
    }

    async fn run(mut self) -> Result<(), SendError> {
        let result = self.rounds().await;
        if let Err(e) = &result {
            let why = match e {
                SendError::Closed(why) => why.clone(),
                SendError::Frame(e) => e.to_string(),
                SendError::OutOfStreams(e) => e.to_string(),
                _ => return result,
            };
            Message::Bye { why }.encode(0, &mut self.wire);
            let _ = self.write_out().await;
        }
        result
    }

    async fn rounds(&mut self) -> Result<(), SendError> {
        let source = Arc::clone(&self.sender.source);
        let period = self.sender.config.heartbeat;
        let welcome = Message::Welcome(Welcome {
            cluster_id: source.cluster_id(),
            node_id: source.node_id(),
            hostname: self.sender.config.hostname.clone(),
            epoch: self.epoch,
        });
        welcome.encode(0, &mut self.wire);
        for (db, _) in source.databases() {
            self.session.changed(&db)?;
        }
        let mut beat_at = Instant::now() + period;
        // A mark is owed until all the primary had at some moment is sent: at the start, and when a beat found work left.
        let mut owes_mark = true;
        loop {
            let now_ms = source.now_ms();
            for db in self.changes.take() {
                self.session.changed(&db)?;
            }
            while let Ok((stream, message)) = self.inbox.try_recv() {
                self.take_message(stream, message)?;
            }
            self.check_tenure()?;
            let now = Instant::now();
            let turn = self.session.next_turn(now);
            let is_idle = turn.is_none();
            if let Some(turn) = turn {
                self.run_turn(turn, now);
            }
            self.encode_frames();
            let is_caught_up = is_idle && self.session.is_caught_up();
            if now >= beat_at || (owes_mark && is_caught_up) {
                owes_mark = !is_caught_up;
                beat_at = now + period;
                let beat = Message::Heartbeat {
                    now_ms,
                    is_caught_up,
                    nak_count: self.session.nak_count(),
                };
                beat.encode(0, &mut self.wire);
            }
            self.write_out().await?;
            if let Some(pause) = self.pace.pause(Instant::now()) {
                tokio::time::sleep(pause).await;
            }
            if is_idle {
                let retry_at = self.session.deadline().unwrap_or(beat_at);
                if !self.wait(beat_at.min(retry_at)).await? {
                    return Ok(());
                }
            } else if self.inbox.is_closed() && self.inbox.is_empty() {
                return Ok(());
            }
        }
    }

    /// Waits for something to do; false when the replica has gone.
    async fn wait(&mut self, until: Instant) -> Result<bool, SendError> {
        tokio::select! {
            biased;
            names = self.changes.recv() => {
                let names = names.ok_or_else(|| closed("the store is closed"))?;
                for db in names {
                    self.session.changed(&db)?;
                }
            }
            message = self.inbox.recv() => {
                let Some((stream, message)) = message else {
                    return Ok(false);
                };
                self.take_message(stream, message)?;
            }
            () = self.ended.cancelled() => return Err(closed("a newer connection took over")),
            () = self.sender.closing.cancelled() => {}
            () = tokio::time::sleep_until(until.into()) => {}
        }
        Ok(true)
    }

    fn check_tenure(&self) -> Result<(), SendError> {
        if self.sender.closing.is_cancelled() {
            return Err(closed("the primary is shutting down"));
        }
        if self.ended.is_cancelled() {
            return Err(closed("a newer connection took over"));
        }
        // INV-REPL-2, our half: a tenure that ended sends nothing more.
        if self.sender.source.epoch() != Some(self.epoch) {
            return Err(closed("this node's tenure as primary has ended"));
        }
        Ok(())
    }

    fn take_message(&mut self, stream: u16, message: Message) -> Result<(), FrameError> {
        match message {
            Message::Ack {
                applied,
                done_bytes,
                is_drop,
            } => self.session.ack(stream, applied, done_bytes, is_drop),
            Message::Nak { generation, have } => self.session.nak(stream, generation, have),
            Message::Offer {
                generation,
                checksum_count,
                resume,
            } => self
                .session
                .offer(stream, generation, checksum_count, resume),
            Message::Checksums(sums) => self.session.checksums(stream, &sums),
            other => Err(out_of_place(&other, "not from a replica")),
        }
    }

    fn run_turn(&mut self, turn: Turn, now: Instant) {
        let source = Arc::clone(&self.sender.source);
        let (stream, result) = match turn {
            Turn::Send => return,
            Turn::Fetch {
                stream,
                db,
                after,
                max_bytes,
            } => {
                let fetched = source.read_after(&db, after, max_bytes);
                let sync = source.wants_durable_acks(&db);
                let done = fetched.map(|fetch| self.session.fetched(stream, fetch, sync));
                (stream, done)
            }
            Turn::OpenCopy {
                stream,
                db,
                request,
                next,
            } => (stream, self.open_copy(stream, &db, request, next)),
            Turn::ReadPages { stream, max_bytes } => (stream, self.read_pages(stream, max_bytes)),
        };
        if let Err(e) = result {
            let db = self.session.name(stream);
            tracing::warn!(db = db.map(tracing::field::display), error = %chain(&e), "cannot read a database for a replica, trying again");
            self.session.failed(stream, now);
        }
        for stream in self.session.take_closed_copies() {
            self.copies.remove(&stream);
        }
    }

    fn open_copy(
        &mut self,
        stream: u16,
        db: &DbName,
        request: SnapshotRequest,
        next: Pgno,
    ) -> Result<(), SourceError> {
        let is_difference = request.have.is_some();
        let resume_at = request.resume_at;
        let mut reader = self.sender.source.open_snapshot(db, request)?;
        let start = reader.start();
        let next = if resume_at == Some(start) {
            reader.seek(next);
            next
        } else {
            Pgno::ONE
        };
        let page_size = valid_page_size(&*reader)?;
        tracing::info!(%db, %start, pages = reader.page_count(), %next, is_difference, "page copy begins");
        self.session.history(stream, reader.history());
        self.session.copy_opened(
            stream,
            start,
            page_size.get(),
            reader.page_count(),
            next,
            is_difference,
        );
        self.copies.insert(stream, reader);
        Ok(())
    }

    fn read_pages(&mut self, stream: u16, max_bytes: usize) -> Result<(), SourceError> {
        let Some(reader) = self.copies.get_mut(&stream) else {
            return Err(SourceError::Corrupt("the page copy is gone".to_owned()));
        };
        let page_size = valid_page_size(&**reader)?;
        let mut pages = reader.next_pages(max_bytes)?;
        self.pace.add(pages.len() * page_size.len(), Instant::now());
        if pages.is_empty() {
            let end = reader.finish()?;
            self.session.copy_finished(stream, end);
            return Ok(());
        }
        let is_ascending = pages.windows(2).all(|w| w[0].0 < w[1].0);
        if !is_ascending || pages.iter().any(|(_, page)| page.len() != page_size.len()) {
            let why = format!("page copy: pages out of order or not of {page_size} bytes");
            return Err(SourceError::Corrupt(why));
        }
        let per_frame = (PAGES_LEN / page_size.len()).max(1);
        while pages.len() > per_frame {
            let rest = pages.split_off(per_frame);
            self.session.pages(stream, page_size, pages);
            pages = rest;
        }
        self.session.pages(stream, page_size, pages);
        Ok(())
    }

    fn encode_frames(&mut self) {
        for (stream, message) in self.session.take_frames() {
            match &message {
                Message::Open { db } => {
                    let mut names = self.names.lock();
                    debug_assert_eq!(names.len() + 1, usize::from(stream));
                    names.push(db.clone());
                    message.encode(stream, &mut self.wire);
                }
                Message::Pages(batch) => {
                    self.packer.encode(stream, batch, &mut self.wire);
                }
                _ => message.encode(stream, &mut self.wire),
            }
        }
    }

    async fn write_out(&mut self) -> Result<(), SendError> {
        let stall = self.sender.config.write_stall;
        write_all(&mut self.write, &mut self.wire, stall)
            .await
            .map_err(SendError::Write)
    }
}

fn closed(why: &str) -> SendError {
    SendError::Closed(why.to_owned())
}

fn valid_page_size(reader: &dyn SnapshotReader) -> Result<PageSize, SourceError> {
    PageSize::new(reader.page_size())
        .ok_or_else(|| SourceError::Corrupt(format!("page copy: page size {}", reader.page_size())))
}

/// Prints an error with everything that caused it, and what to do where that is known.
pub(crate) fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut is_full = false;
    let mut cause = e.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        is_full |= e
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| is_full_disk(e.kind()));
        cause = e.source();
    }
    if is_full && !text.contains(FREE_SPACE) {
        text.push_str("; ");
        text.push_str(FREE_SPACE);
    }
    text
}

fn is_full_disk(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(kind, StorageFull | QuotaExceeded)
}

const FREE_SPACE: &str =
    "free space on the file system of data.dir, or raise the quota; it goes on by itself then";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_copies_keep_to_their_rate_and_make_up_for_little() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace {
            rate: 1_000_000,
            due: start,
        };
        pace.add(1_000, at(0));
        assert_eq!(pace.pause(at(0)), None, "too short to be exact");
        pace.add(9_000, at(0));
        assert_eq!(pace.pause(at(0)), Some(Duration::from_millis(10)));
        assert_eq!(pace.pause(at(9)), None);
        // Slow for a second: 20 ms of it count.
        pace.add(1_000, at(1010));
        assert_eq!(pace.pause(at(1010)), None);
        pace.add(30_000, at(1010));
        assert_eq!(pace.pause(at(1010)), Some(Duration::from_millis(11)));
    }
}
