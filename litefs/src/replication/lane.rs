//! One database on the replica: a queue the reader fills, and the state of whichever worker empties it.
//!
//! ```text
//!  reader ─push─▶ queue ─▶ next_job (pure) ─▶ worker ─▶ Sink ─▶ ack / nak ─▶ Outbox ─▶ writer
//! ```
//! A lane outlives its connection: what arrived is applied even when the primary is gone, and a lane that is stuck
//! holds up neither the other lanes nor the next connection. What holds:
//! - one worker at a time works on a lane (`is_scheduled` is the token);
//! - the queue is bounded by the sender's window; a peer that ignores it ends the connection;
//! - frames of an older generation than the last nak are passed over, and still reported done.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::message::Message;
use super::receive::ReceiveError;
use super::send::chain;
use super::{
    Applied, Batch, DbName, Milestone, Record, Sink, SinkError, SnapshotStart, SnapshotWriter,
};
use crate::ltx::{Pgno, Pos};

/// Bytes of a database not yet done when a record or page batch begins; twice what our own sender allows.
const MAX_UNFINISHED: u64 = 16 << 20;
/// Bytes of records handed to `apply` as one.
const MAX_BATCH_LEN: u64 = 8 << 20;
/// Control messages waiting for the writer.
const MAX_OUTBOX_LEN: usize = 4 * 65536;
/// Marks of the primary's clock waiting for the records before them.
const MAX_MARKS: usize = 64;
/// Failures after which the primary is told that a database is stalled.
const STALLED_AFTER: u32 = 5;
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// What the reader puts into a lane.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) generation: u32,
    pub(super) cost: u64,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Opened,
    Record {
        sender_epoch: u64,
        sync: bool,
        record: Record,
    },
    Ask,
    History(Vec<Milestone>),
    CopyBegin(SnapshotStart),
    Pages {
        page_size: u32,
        pages: Vec<(Pgno, Bytes)>,
    },
    CopyEnd(Pos),
    Drop {
        sender_epoch: u64,
        at: Pos,
    },
    Unknown,
    /// A record the sender gave up half way.
    Unfinished,
}

impl What {
    /// These say nothing about an attempt.
    fn is_of_any_generation(&self) -> bool {
        matches!(self, What::Opened | What::Unknown | What::Unfinished)
    }
}

/// One thing for a worker to do.
#[derive(Debug)]
enum Job {
    Opened,
    Apply(Batch),
    Offer,
    History(Vec<Milestone>),
    CopyBegin(SnapshotStart),
    CopyPages(Vec<(Pgno, Bytes)>),
    CopyRecords(Vec<Record>),
    CopyFinish(Pos),
    Drop {
        sender_epoch: u64,
        at: Pos,
    },
    Unknown,
    /// Start again from where the store is.
    Nak,
    /// Left over from before a nak.
    Skip,
}

/// A page copy on its way in, as far as decisions go.
#[derive(Debug)]
struct CopyState {
    page_size: u32,
    /// Position after the records kept so far.
    at: Pos,
    end: Option<Pos>,
}

/// Decides what the items of a lane mean, in order: pure.
#[derive(Debug, Default)]
struct Decider {
    generation: u32,
    copy: Option<CopyState>,
}

impl Decider {
    /// Takes the next job off the queue, with its cost and the count of items it covers.
    fn next_job(
        &mut self,
        queue: &mut VecDeque<Item>,
    ) -> Result<Option<(Job, u64, usize)>, ReceiveError> {
        let Some(item) = queue.pop_front() else {
            return Ok(None);
        };
        if !item.what.is_of_any_generation() && item.generation < self.generation {
            return Ok(Some((Job::Skip, item.cost, 1)));
        }
        if item.generation > self.generation {
            return Err(ReceiveError::Protocol(format!(
                "generation {} before it was asked for",
                item.generation
            )));
        }
        let job = match item.what {
            What::Opened => Job::Opened,
            What::Unfinished => Job::Skip,
            What::Unknown => Job::Unknown,
            What::Record {
                sender_epoch,
                sync,
                record,
            } => {
                return self.records(queue, sender_epoch, sync, record, item.cost);
            }
            What::Ask => {
                self.copy = None;
                Job::Offer
            }
            What::History(milestones) => Job::History(milestones),
            What::CopyBegin(start) => {
                self.copy = Some(CopyState {
                    page_size: start.page_size,
                    at: start.start,
                    end: None,
                });
                Job::CopyBegin(start)
            }
            What::Pages { page_size, pages } => self.pages(page_size, pages)?,
            What::CopyEnd(end) => {
                match &mut self.copy {
                    Some(copy) if copy.end.is_none() => copy.end = Some(end),
                    _ => return Err(protocol("the end of a page copy that was not begun")),
                }
                Job::Skip
            }
            What::Drop { sender_epoch, at } => {
                self.copy = None;
                Job::Drop { sender_epoch, at }
            }
        };
        Ok(Some((job, item.cost, 1)))
    }

    /// Ends the copy if nothing of it is to come any more.
    fn take_whole_copy(&mut self) -> Option<Pos> {
        let end = self.copy.as_ref()?.end?;
        let is_whole = self.copy.as_ref()?.at.txid >= end.txid;
        is_whole.then(|| {
            self.copy = None;
            end
        })
    }

    fn pages(&mut self, page_size: u32, pages: Vec<(Pgno, Bytes)>) -> Result<Job, ReceiveError> {
        let Some(copy) = self.copy.as_mut().filter(|c| c.end.is_none()) else {
            return Err(protocol("pages without a page copy"));
        };
        let Some((first, _)) = pages.first() else {
            return Err(protocol("no pages"));
        };
        if page_size != copy.page_size {
            return Err(ReceiveError::Protocol(format!(
                "page {first} of {page_size} bytes in a copy of pages of {}",
                copy.page_size
            )));
        }
        Ok(Job::CopyPages(pages))
    }

    /// Gathers the records that follow directly into one batch.
    fn records(
        &mut self,
        queue: &mut VecDeque<Item>,
        epoch: u64,
        must_sync: bool,
        first: Record,
        mut cost: u64,
    ) -> Result<Option<(Job, u64, usize)>, ReceiveError> {
        // Records while pages are still coming: the sender has given the copy up.
        self.copy = self.copy.take().filter(|copy| copy.end.is_some());
        let end = self.copy.as_ref().and_then(|copy| copy.end);
        let mut records = vec![first];
        while let Some(Item {
            generation,
            cost: more,
            what:
                What::Record {
                    sender_epoch,
                    sync,
                    record,
                },
        }) = queue.front()
        {
            let last = &records[records.len() - 1].meta;
            let is_copy_done = end.is_some_and(|end| last.max_txid >= end.txid);
            if *generation != self.generation
                || (*sender_epoch, *sync) != (epoch, must_sync)
                || record.meta.pre_pos() != last.post_pos()
                || record.meta.epoch < last.epoch
                || cost + more > MAX_BATCH_LEN
                || is_copy_done
            {
                break;
            }
            cost += more;
            if let Some(Item {
                what: What::Record { record, .. },
                ..
            }) = queue.pop_front()
            {
                records.push(record);
            }
        }
        let count = records.len();
        let job = match &mut self.copy {
            None => Job::Apply(Batch {
                sender_epoch: epoch,
                sync: must_sync,
                records,
            }),
            Some(copy) => {
                let (first, last) = (&records[0].meta, &records[count - 1].meta);
                let follows = first.pre_pos() == copy.at
                    || (first.min_txid <= copy.at.txid && first.max_txid > copy.at.txid);
                if !follows {
                    return Err(ReceiveError::Protocol(format!(
                        "record {}-{} on a page copy at {}",
                        first.min_txid, first.max_txid, copy.at
                    )));
                }
                copy.at = last.post_pos();
                Job::CopyRecords(records)
            }
        };
        Ok(Some((job, cost, count)))
    }
}

fn protocol(why: &str) -> ReceiveError {
    ReceiveError::Protocol(why.to_owned())
}

/// One database, for as long as the receiver lives.
pub(super) struct Lane {
    pub(super) db: DbName,
    queue: Mutex<Queue>,
    work: Mutex<Work>,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    /// Sequence numbers of `items`, in step with them.
    seqs: VecDeque<u64>,
    link: Option<Arc<Link>>,
    is_scheduled: bool,
}

#[derive(Default)]
struct Work {
    link: Option<Arc<Link>>,
    decider: Decider,
    writer: Option<Box<dyn SnapshotWriter>>,
    applied: Applied,
    failures: u32,
    /// To be done before anything from the queue, with what it covers.
    retry: Option<(Job, Cover)>,
}

/// What a job stands for when it is reported done.
#[derive(Debug, Default)]
struct Cover {
    cost: u64,
    seqs: Vec<u64>,
}

/// A lane's place in one connection.
pub(super) struct Link {
    pub(super) conn: Arc<ConnShared>,
    pub(super) stream: u16,
    unfinished: AtomicU64,
    done_bytes: AtomicU64,
}

/// Bytes of one connection not yet done, parts of records included: our own sender keeps half of the
/// first term, and has one record above its window at a time.
const MAX_HELD: u64 = (512 << 20) + super::message::MAX_RECORD_LEN as u64;

impl Link {
    pub(super) fn new(conn: Arc<ConnShared>, stream: u16) -> Arc<Link> {
        Arc::new(Link {
            conn,
            stream,
            unfinished: AtomicU64::new(0),
            done_bytes: AtomicU64::new(0),
        })
    }

    /// Counts bytes that arrived.
    pub(super) fn arrived(&self, cost: u64) -> Result<(), ReceiveError> {
        self.unfinished.fetch_add(cost, Ordering::Relaxed);
        let held = self.conn.held.fetch_add(cost, Ordering::Relaxed) + cost;
        if held > MAX_HELD {
            return Err(ReceiveError::Protocol(format!(
                "{held} bytes in flight, at most {MAX_HELD}"
            )));
        }
        Ok(())
    }

    fn finished(&self, cost: u64) {
        self.done_bytes.fetch_add(cost, Ordering::Relaxed);
        self.unfinished.fetch_sub(cost, Ordering::Relaxed);
        self.conn.held.fetch_sub(cost, Ordering::Relaxed);
    }

    /// Checks, when a record or page batch begins, that the sender keeps to its window.
    pub(super) fn check_window(&self) -> Result<(), ReceiveError> {
        let unfinished = self.unfinished.load(Ordering::Relaxed);
        if unfinished >= MAX_UNFINISHED {
            return Err(ReceiveError::Protocol(format!(
                "{unfinished} bytes in flight of one database, at most {MAX_UNFINISHED}"
            )));
        }
        Ok(())
    }

    /// Acks with what `applied` gives, asked under the outbox's lock so that an older answer never replaces a newer.
    pub(super) fn ack(&self, applied: impl FnOnce() -> Applied, is_drop: bool) {
        let outbox = &self.conn.outbox;
        outbox.ack(self.stream, &self.done_bytes, is_drop, applied);
    }
}

/// What a worker's caller does with the lane next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum After {
    Idle,
    Again,
    Pause(Duration),
}

impl Lane {
    pub(super) fn new(db: DbName) -> Arc<Lane> {
        Arc::new(Lane {
            db,
            queue: Mutex::default(),
            work: Mutex::default(),
        })
    }

    /// Binds the lane to a new connection. What the old one left is dropped: it will be sent again.
    /// A connection that is already replaced, and does not know it yet, binds nothing.
    pub(super) fn attach(&self, link: Arc<Link>) {
        let mut queue = self.queue.lock();
        let bound = queue.link.as_ref().map_or(0, |bound| bound.conn.no);
        if bound > link.conn.no {
            return;
        }
        queue.items.clear();
        queue.seqs.clear();
        queue.link = Some(link);
    }

    /// Queues an item; true if the lane has to be given to a worker. A connection that was replaced is not heard.
    pub(super) fn push(&self, link: &Arc<Link>, item: Item) -> bool {
        let mut queue = self.queue.lock();
        if !queue.link.as_ref().is_some_and(|l| Arc::ptr_eq(l, link)) {
            return false;
        }
        let seq = link.conn.progress.lock().begin();
        queue.seqs.push_back(seq);
        queue.items.push_back(item);
        !std::mem::replace(&mut queue.is_scheduled, true)
    }

    /// Does one job. Only the holder of `is_scheduled` calls this.
    pub(super) fn work(&self, sink: &dyn Sink) -> After {
        let work = &mut *self.work.lock();
        let (job, cover) = match self.take_job(work) {
            Ok(Some(taken)) => taken,
            Ok(None) => return After::Idle,
            Err(e) => {
                if let Some(link) = &work.link {
                    link.conn.fail(e.of(&self.db));
                }
                return After::Again;
            }
        };
        self.run(sink, work, job, cover)
    }

    fn take_job(&self, work: &mut Work) -> Result<Option<(Job, Cover)>, ReceiveError> {
        let mut queue = self.queue.lock();
        let is_same = match (&work.link, &queue.link) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        if !is_same {
            // A new connection: attempts are counted from 0 again, and the copy under way keeps what it has.
            *work = Work {
                link: queue.link.clone(),
                applied: work.applied,
                ..Work::default()
            };
        }
        if let Some(retry) = work.retry.take() {
            return Ok(Some(retry));
        }
        let before = queue.items.len();
        let next = work.decider.next_job(&mut queue.items);
        // A protocol error has taken one item too.
        let taken = before - queue.items.len();
        let seqs = queue.seqs.drain(..taken).collect();
        match next {
            Ok(Some((job, cost, count))) => {
                debug_assert_eq!(count, taken);
                Ok(Some((job, Cover { cost, seqs })))
            }
            Ok(None) => {
                queue.is_scheduled = false;
                Ok(None)
            }
            Err(e) => {
                // Nothing after it can be trusted.
                queue.items.clear();
                queue.seqs.clear();
                Err(e)
            }
        }
    }

    /// Tells whether nothing is queued and no worker has it.
    pub(super) fn is_idle(&self) -> bool {
        !self.queue.lock().is_scheduled
    }

    fn run(&self, sink: &dyn Sink, work: &mut Work, job: Job, cover: Cover) -> After {
        if !matches!(
            job,
            Job::CopyPages(_) | Job::CopyRecords(_) | Job::CopyFinish(_)
        ) && work.decider.copy.is_none()
        {
            work.writer = None;
        }
        match self.perform(sink, work, &job) {
            Ok(()) => {
                // What completes a copy is not done before the copy is in place, or we would call ourselves caught up.
                if let Some(end) = work.decider.take_whole_copy() {
                    return self.run(sink, work, Job::CopyFinish(end), cover);
                }
                // What only asks for more, or takes it in, says nothing of whether it can be put in place.
                if matches!(job, Job::Apply(_) | Job::CopyFinish(_) | Job::Drop { .. }) {
                    work.failures = 0;
                }
                self.done(sink, work, &job, cover);
                After::Again
            }
            Err(e) => self.failed(sink, work, job, cover, e),
        }
    }

    fn perform(&self, sink: &dyn Sink, work: &mut Work, job: &Job) -> Result<(), SinkError> {
        match job {
            Job::Skip => {}
            Job::Opened => work.applied = sink.applied(&self.db),
            Job::Apply(batch) => {
                let batch = Batch {
                    records: batch.records.clone(),
                    ..*batch
                };
                work.applied = sink.apply(&self.db, batch)?;
            }
            Job::Offer => self.offer(sink, work),
            Job::History(milestones) => sink.history(&self.db, milestones),
            Job::CopyBegin(start) => {
                work.writer = None;
                work.writer = Some(sink.begin_snapshot(&self.db, *start)?);
            }
            Job::CopyPages(pages) => writer(work)?.pages(pages.clone())?,
            Job::CopyRecords(records) => writer(work)?.records(records.clone())?,
            Job::CopyFinish(end) => {
                let finishing = work.writer.take().ok_or_else(no_writer)?;
                work.applied = finishing.finish(*end)?;
            }
            Job::Drop { sender_epoch, at } => {
                work.applied = sink.drop_db(&self.db, *sender_epoch, *at)?;
            }
            Job::Unknown => sink.unknown_to_primary(&self.db),
            Job::Nak => {
                let have = sink.applied(&self.db).pos;
                self.nak(work, have);
            }
        }
        Ok(())
    }

    fn done(&self, sink: &dyn Sink, work: &Work, job: &Job, cover: Cover) {
        let Some(link) = &work.link else { return };
        link.finished(cover.cost);
        let is_news =
            cover.cost > 0 || matches!(job, Job::Opened | Job::Drop { .. } | Job::CopyFinish(_));
        if is_news {
            // A store that syncs later has told its subscription, which acks too: ask for the latest of both.
            let applied = || match link.conn.has_durable_changes {
                true => sink.applied(&self.db),
                false => work.applied,
            };
            link.ack(applied, matches!(job, Job::Drop { .. }));
        }
        link.conn.finish(sink, &cover.seqs);
    }

    fn failed(
        &self,
        sink: &dyn Sink,
        work: &mut Work,
        job: Job,
        cover: Cover,
        e: SinkError,
    ) -> After {
        let is_copy = matches!(
            job,
            Job::CopyBegin(_) | Job::CopyPages(_) | Job::CopyRecords(_) | Job::CopyFinish(_)
        );
        match e {
            SinkError::StaleEpoch { .. } => {
                if let Some(link) = &work.link {
                    link.conn.fail(ReceiveError::Sink(e));
                }
                self.done(sink, work, &Job::Skip, cover);
                After::Again
            }
            SinkError::PosMismatch { have, .. } if !is_copy => {
                tracing::info!(db = %self.db, error = %e, "asking for a difference");
                self.nak(work, have);
                self.done(sink, work, &Job::Skip, cover);
                After::Again
            }
            SinkError::Io { .. } if !is_copy => {
                work.retry = Some((job, cover));
                self.pause(work, &e)
            }
            e => {
                work.writer = None;
                work.decider.copy = None;
                self.done(sink, work, &Job::Skip, cover);
                work.retry = Some((Job::Nak, Cover::default()));
                self.pause(work, &e)
            }
        }
    }

    /// Waits before the next try: ever longer, and the primary is told once it looks lasting.
    fn pause(&self, work: &mut Work, e: &SinkError) -> After {
        work.failures = work.failures.saturating_add(1);
        let why = chain(e);
        tracing::warn!(db = %self.db, failures = work.failures, error = %why, "cannot apply, trying again");
        if work.failures.is_multiple_of(STALLED_AFTER)
            && let Some(link) = &work.link
        {
            link.conn.send(link.stream, Message::Stalled { why });
        }
        After::Pause(retry_delay(work.failures))
    }

    fn nak(&self, work: &mut Work, have: Pos) {
        work.writer = None;
        work.decider.copy = None;
        work.decider.generation += 1;
        if let Some(link) = &work.link {
            link.conn.progress.lock().note_nak();
            let nak = Message::Nak {
                generation: work.decider.generation,
                have,
            };
            link.conn.send(link.stream, nak);
        }
    }

    fn offer(&self, sink: &dyn Sink, work: &mut Work) {
        work.writer = None;
        let checksums = sink.page_checksums(&self.db).unwrap_or_else(|e| {
            tracing::warn!(db = %self.db, error = %chain(&e), "no page checksums, asking for a whole copy");
            None
        });
        let limit = super::message::MAX_CHECKSUMS as usize;
        let checksums = checksums.filter(|sums| sums.len() <= limit);
        let Some(link) = &work.link else { return };
        let offer = Message::Offer {
            generation: work.decider.generation,
            checksum_count: checksums
                .as_ref()
                .map(|sums| u32::try_from(sums.len()).unwrap_or(u32::MAX)),
            resume: sink.resume_point(&self.db),
        };
        link.conn.send(link.stream, offer);
        if let Some(sums) = checksums {
            link.conn.send(link.stream, Message::Checksums(sums));
        }
    }
}

fn writer(work: &mut Work) -> Result<&mut dyn SnapshotWriter, SinkError> {
    match &mut work.writer {
        Some(writer) => Ok(&mut **writer),
        None => Err(no_writer()),
    }
}

fn no_writer() -> SinkError {
    SinkError::Invalid("the page copy was broken off".to_owned())
}

fn retry_delay(failures: u32) -> Duration {
    let factor = 1_u32 << failures.saturating_sub(1).min(16);
    FIRST_RETRY.saturating_mul(factor).min(LAST_RETRY)
}

/// What the lanes of one connection share.
pub(super) struct ConnShared {
    /// Counts connections of this receiver, from 1.
    no: u64,
    pub(super) outbox: Outbox,
    pub(super) progress: Mutex<Progress>,
    pub(super) has_durable_changes: bool,
    held: AtomicU64,
    /// Fires when a lane has found a reason to end the connection.
    pub(super) broken: CancellationToken,
    failure: Mutex<Option<ReceiveError>>,
}

impl ConnShared {
    pub(super) fn new(no: u64, has_durable_changes: bool) -> Arc<ConnShared> {
        Arc::new(ConnShared {
            no,
            outbox: Outbox::default(),
            progress: Mutex::default(),
            has_durable_changes,
            held: AtomicU64::new(0),
            broken: CancellationToken::new(),
            failure: Mutex::default(),
        })
    }

    /// Ends the connection; the first reason counts.
    pub(super) fn fail(&self, e: ReceiveError) {
        self.failure.lock().get_or_insert(e);
        self.broken.cancel();
    }

    pub(super) fn take_failure(&self) -> Option<ReceiveError> {
        self.failure.lock().take()
    }

    /// Queues a control message.
    pub(super) fn send(&self, stream: u16, message: Message) {
        if !self.outbox.push(stream, message) {
            self.fail(protocol("the primary asks without reading the answers"));
        }
    }

    fn finish(&self, sink: &dyn Sink, seqs: &[u64]) {
        // The lock is held across the call so that marks reach the store in order; the store only notes a number.
        let mut progress = self.progress.lock();
        if let Some(now_ms) = progress.finish(seqs) {
            sink.heartbeat(now_ms, true);
        }
    }
}

/// Messages on their way to the primary. Acks of a database replace each other, so they are bounded by its databases.
#[derive(Default)]
pub(super) struct Outbox {
    state: Mutex<OutboxState>,
    pub(super) arrived: Notify,
}

#[derive(Default)]
struct OutboxState {
    messages: VecDeque<(u16, Message)>,
    acks: HashMap<u16, Message>,
}

impl Outbox {
    pub(super) fn push(&self, stream: u16, message: Message) -> bool {
        let mut state = self.state.lock();
        if state.messages.len() >= MAX_OUTBOX_LEN {
            return false;
        }
        state.messages.push_back((stream, message));
        drop(state);
        self.arrived.notify_one();
        true
    }

    fn ack(
        &self,
        stream: u16,
        done_bytes: &AtomicU64,
        is_drop: bool,
        applied: impl FnOnce() -> Applied,
    ) {
        let mut state = self.state.lock();
        let was_drop = matches!(
            state.acks.get(&stream),
            Some(Message::Ack { is_drop: true, .. })
        );
        let ack = Message::Ack {
            applied: applied(),
            done_bytes: done_bytes.load(Ordering::Relaxed),
            is_drop: is_drop || was_drop,
        };
        state.acks.insert(stream, ack);
        drop(state);
        self.arrived.notify_one();
    }

    /// Takes all there is: messages in order, then acks.
    pub(super) fn take(&self) -> Vec<(u16, Message)> {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.messages.drain(..).chain(state.acks.drain()).collect()
    }
}

/// Which items are not done, so that the primary's "caught up" counts only once all that came before it is applied.
#[derive(Debug, Default)]
pub(super) struct Progress {
    next: u64,
    open: BTreeSet<u64>,
    marks: VecDeque<(u64, i64)>,
    naks: u64,
}

impl Progress {
    fn begin(&mut self) -> u64 {
        self.next += 1;
        self.open.insert(self.next);
        self.next
    }

    /// Returns the primary's clock up to which everything is applied now, if that moved.
    fn finish(&mut self, seqs: &[u64]) -> Option<i64> {
        for seq in seqs {
            self.open.remove(seq);
        }
        let mut reached = None;
        while let Some((seq, now_ms)) = self.marks.front().copied() {
            if self.open.first().is_some_and(|open| *open <= seq) {
                break;
            }
            self.marks.pop_front();
            reached = Some(now_ms);
        }
        reached
    }

    /// Notes a mark; true if it is reached already.
    pub(super) fn mark(&mut self, now_ms: i64, nak_count: u64) -> bool {
        if nak_count != self.naks {
            return false;
        }
        if self.open.is_empty() {
            self.marks.clear();
            return true;
        }
        if self.marks.len() >= MAX_MARKS {
            self.marks.pop_back();
        }
        self.marks.push_back((self.next, now_ms));
        false
    }

    fn note_nak(&mut self) {
        self.naks += 1;
        self.marks.clear();
    }
}

#[cfg(test)]
#[path = "lane_tests.rs"]
mod tests;
