//! What the primary sends to one replica next: every decision, no I/O.
//!
//! ```text
//!            changed / nak                 log does not reach
//!   Live ◀──────────────────▶ (fetch) ─────────────────▶ WantsCopy ──slot free──▶ Asked ──offer──▶ Offered
//!    ▲                                                                                               │ open
//!    └──────────── records up to `end` sent ──── Tail ◀──────────── no pages left ──── Copying ◀─────┘
//! ```
//! The shell in `send` takes a [`Turn`], does its I/O, reports the outcome and writes the frames gathered in between.
//!
//! What holds, for every database:
//! - bytes in flight stay below its window when a turn is given (INV-REPL-3); a record once begun is finished;
//! - one turn sends at most about `turn_bytes`, then the next database has its turn, so that a copy delays nobody;
//! - `peer` is where the replica will be once it has applied all that was sent in this generation.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::frame::{FrameError, Kind};
use super::message::{
    MAX_MILESTONES, MAX_RECORD_LEN, MAX_STREAMS, Message, PageBatch, RecordStart,
};
use super::{
    Applied, DatabaseFilter, DbName, Fetch, Milestone, Record, SnapshotRequest, SnapshotStart,
};
use crate::ltx::{PageSize, Pgno, Pos};

/// Bounds of one connection.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes a database may send before the next has its turn.
    pub turn_bytes: usize,
    /// Bytes in flight of one database.
    pub db_window: u64,
    /// Bytes in flight of all; as it fills, each database's own window shrinks, down to one turn.
    pub total_window: u64,
    /// Page copies at a time.
    pub max_copies: usize,
    /// Pause after the store failed to read a database.
    pub retry_after: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            turn_bytes: 256 << 10,
            db_window: 8 << 20,
            total_window: 256 << 20,
            max_copies: 4,
            retry_after: Duration::from_secs(1),
        }
    }
}

/// What the shell has to do next.
#[derive(Debug)]
pub enum Turn {
    /// Frames were gathered without I/O.
    Send,
    /// Call `read_after`, then [`SendSession::fetched`].
    Fetch {
        /// Stream id.
        stream: u16,
        /// The database.
        db: DbName,
        /// Where the replica will be.
        after: Pos,
        /// How much to read.
        max_bytes: usize,
    },
    /// Call `open_snapshot`, `seek` to `next` if it starts at the position to resume, then [`SendSession::copy_opened`].
    OpenCopy {
        /// Stream id.
        stream: u16,
        /// The database.
        db: DbName,
        /// What the replica would like.
        request: SnapshotRequest,
        /// First page the replica lacks, if the copy is resumed.
        next: Pgno,
    },
    /// Call `next_pages`, then [`SendSession::pages`]; if there are none, `finish`, then [`SendSession::copy_finished`].
    ReadPages {
        /// Stream id.
        stream: u16,
        /// How much to read.
        max_bytes: usize,
    },
}

/// A connection has as many databases as it can number.
#[derive(Debug, thiserror::Error)]
#[error("all {MAX_STREAMS} stream ids of this connection are used")]
pub struct OutOfStreams;

/// One replica, as the primary sees it.
#[derive(Debug)]
pub struct SendSession {
    limits: Limits,
    epoch: u64,
    filter: DatabaseFilter,
    dbs: Vec<Db>,
    by_name: HashMap<DbName, u16>,
    ready: VecDeque<u16>,
    wants_copy: VecDeque<u16>,
    copies: usize,
    in_flight: u64,
    /// The database whose record above the window is not done yet: one at a time, to bound the replica's memory.
    huge: Option<Huge>,
    wants_huge: VecDeque<u16>,
    unsettled: usize,
    nak_count: u64,
    retries: Vec<(Instant, u16)>,
    frames: Vec<(u16, Message)>,
    closed_copies: Vec<u16>,
}

#[derive(Debug, Clone, Copy)]
struct Huge {
    stream: u16,
    /// Bytes of its database done once it is done.
    until: u64,
}

#[derive(Debug)]
struct Db {
    name: DbName,
    phase: Phase,
    generation: u32,
    peer: Pos,
    is_dirty: bool,
    is_queued: bool,
    is_settled: bool,
    is_paused: bool,
    backlog: VecDeque<Record>,
    /// Bytes of the first of `backlog` already sent.
    offset: usize,
    sync: bool,
    sent_bytes: u64,
    done_bytes: u64,
    acked: Applied,
    /// Position of the last nak, until something was applied since.
    nak_at: Option<Pos>,
}

#[derive(Debug)]
enum Phase {
    Live,
    WantsCopy { why: String },
    Asked,
    Offered(Offer),
    Copying { start: Pos },
    Tail { end: Pos },
    Dropping,
    Unknown,
}

#[derive(Debug)]
struct Offer {
    checksums: Option<Vec<u64>>,
    missing: usize,
    resume: Option<(Pos, Pgno)>,
}

impl Phase {
    fn holds_a_copy_slot(&self) -> bool {
        matches!(
            self,
            Phase::Asked | Phase::Offered(_) | Phase::Copying { .. } | Phase::Tail { .. }
        )
    }
}

impl SendSession {
    /// Starts with what the replica has; an empty filter means all databases.
    ///
    /// # Errors
    /// [`OutOfStreams`] if it has more databases than can be numbered.
    pub fn new(
        limits: Limits,
        epoch: u64,
        filter: DatabaseFilter,
        positions: Vec<(DbName, Pos)>,
    ) -> Result<SendSession, OutOfStreams> {
        let mut session = SendSession {
            limits,
            epoch,
            filter,
            dbs: Vec::new(),
            by_name: HashMap::new(),
            ready: VecDeque::new(),
            wants_copy: VecDeque::new(),
            copies: 0,
            in_flight: 0,
            huge: None,
            wants_huge: VecDeque::new(),
            unsettled: 0,
            nak_count: 0,
            retries: Vec::new(),
            frames: Vec::new(),
            closed_copies: Vec::new(),
        };
        for (name, pos) in positions {
            if let Some(stream) = session.open(&name)? {
                let db = &mut session.dbs[usize::from(stream) - 1];
                db.peer = pos;
                db.acked = Applied { pos, durable: pos };
                db.is_dirty = true;
                session.touch(stream);
            }
        }
        Ok(session)
    }

    /// Notes that a database moved, appeared or was dropped.
    ///
    /// # Errors
    /// [`OutOfStreams`] if it is new and there is no number for it.
    pub fn changed(&mut self, name: &DbName) -> Result<(), OutOfStreams> {
        if let Some(stream) = self.open(name)? {
            let db = self.at(stream);
            db.is_dirty = true;
            if matches!(db.phase, Phase::Unknown) {
                db.phase = Phase::Live;
            }
            self.touch(stream);
        }
        Ok(())
    }

    /// Takes an ack.
    ///
    /// # Errors
    /// `Unexpected` for what the replica cannot have done.
    pub fn ack(
        &mut self,
        stream: u16,
        applied: Applied,
        done_bytes: u64,
        is_drop: bool,
    ) -> Result<(), FrameError> {
        let db = self.get(stream, Kind::Ack)?;
        if done_bytes < db.done_bytes || done_bytes > db.sent_bytes {
            let why = format!(
                "{}: {done_bytes} bytes done, before {}, sent {}",
                db.name, db.done_bytes, db.sent_bytes
            );
            return Err(unexpected(Kind::Ack, why));
        }
        let freed = done_bytes - db.done_bytes;
        db.done_bytes = done_bytes;
        db.acked = applied;
        if db.nak_at.is_some_and(|at| at != applied.pos) {
            db.nak_at = None;
        }
        if is_drop && matches!(db.phase, Phase::Dropping) {
            db.phase = Phase::Live;
            db.peer = applied.pos;
            db.is_dirty = true;
        }
        self.in_flight -= freed;
        self.end_huge(stream, done_bytes);
        self.touch(stream);
        Ok(())
    }

    /// Starts a database again from where the replica says it is; from a page copy if that was tried before.
    ///
    /// # Errors
    /// `Unexpected` if generations are out of step.
    pub fn nak(&mut self, stream: u16, generation: u32, have: Pos) -> Result<(), FrameError> {
        let db = self.get(stream, Kind::Nak)?;
        if db.generation.checked_add(1) != Some(generation) {
            let why = format!(
                "{}: generation {generation} after {}",
                db.name, db.generation
            );
            return Err(unexpected(Kind::Nak, why));
        }
        db.generation = generation;
        db.backlog.clear();
        db.offset = 0;
        db.peer = have;
        db.is_dirty = true;
        let was_tried = db.nak_at.replace(have) == Some(have);
        let (sent, done) = (db.sent_bytes, db.done_bytes);
        if let Some(huge) = self.huge.as_mut().filter(|h| h.stream == stream) {
            huge.until = huge.until.min(sent);
        }
        self.end_huge(stream, done);
        self.nak_count += 1;
        self.leave_copy(stream);
        self.at(stream).phase = Phase::Live;
        if was_tried {
            let why = format!("records after {have} did not fit");
            self.want_copy(stream, why);
        }
        self.touch(stream);
        Ok(())
    }

    /// Takes the answer to `Ask`.
    ///
    /// # Errors
    /// `Unexpected` if nothing was asked.
    pub fn offer(
        &mut self,
        stream: u16,
        generation: u32,
        checksum_count: Option<u32>,
        resume: Option<(Pos, Pgno)>,
    ) -> Result<(), FrameError> {
        let db = self.get(stream, Kind::Offer)?;
        if generation != db.generation || !matches!(db.phase, Phase::Asked) {
            return Err(unexpected(Kind::Offer, format!("{}: not asked", db.name)));
        }
        db.phase = Phase::Offered(Offer {
            checksums: checksum_count.map(|_| Vec::new()),
            missing: checksum_count.unwrap_or(0) as usize,
            resume,
        });
        self.touch(stream);
        Ok(())
    }

    /// Takes page checksums that follow an offer.
    ///
    /// # Errors
    /// `Unexpected` if they were not announced.
    pub fn checksums(&mut self, stream: u16, sums: &[u64]) -> Result<(), FrameError> {
        let db = self.get(stream, Kind::Checksums)?;
        match &mut db.phase {
            Phase::Offered(Offer {
                checksums: Some(have),
                missing,
                ..
            }) if sums.len() <= *missing => {
                have.extend_from_slice(sums);
                *missing -= sums.len();
            }
            // The offer they belong to was overtaken by a nak.
            Phase::Live | Phase::WantsCopy { .. } => {}
            _ => {
                let why = format!("{}: {} more than offered", db.name, sums.len());
                return Err(unexpected(Kind::Checksums, why));
            }
        }
        self.touch(stream);
        Ok(())
    }

    /// Returns what to do next, if anything.
    pub fn next_turn(&mut self, now: Instant) -> Option<Turn> {
        self.resume_retries(now);
        while let Some(stream) = self.ready.pop_front() {
            self.at(stream).is_queued = false;
            if let Some(turn) = self.turn_of(stream) {
                return Some(turn);
            }
        }
        None
    }

    /// Returns when `next_turn` is worth another try though nothing happened.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.retries.iter().map(|(at, _)| *at).min()
    }

    fn turn_of(&mut self, stream: u16) -> Option<Turn> {
        let credit = self.credit(stream)?;
        let max_bytes = self.limits.turn_bytes.min(credit);
        let db = self.at(stream);
        match &mut db.phase {
            Phase::Live | Phase::Tail { .. } if !db.backlog.is_empty() => {
                let is_any_sent = self.send_backlog(stream, max_bytes);
                self.touch(stream);
                is_any_sent.then_some(Turn::Send)
            }
            Phase::Live | Phase::Tail { .. } => {
                db.is_dirty = false;
                Some(Turn::Fetch {
                    stream,
                    db: db.name.clone(),
                    after: db.peer,
                    max_bytes,
                })
            }
            Phase::Offered(offer) => {
                let request = SnapshotRequest {
                    have: offer.checksums.take(),
                    resume_at: offer.resume.map(|(start, _)| start),
                    replica_at: db.peer,
                };
                Some(Turn::OpenCopy {
                    stream,
                    db: db.name.clone(),
                    request,
                    next: offer.resume.map_or(Pgno::ONE, |(_, next)| next),
                })
            }
            Phase::Copying { .. } => Some(Turn::ReadPages { stream, max_bytes }),
            _ => None,
        }
    }

    /// Takes what the log answered; `sync` if commits of the database wait for durable acks.
    pub fn fetched(&mut self, stream: u16, fetch: Fetch, sync: bool) {
        let copy_end = match self.at(stream).phase {
            Phase::Tail { end } => Some(end),
            _ => None,
        };
        match fetch {
            Fetch::Records(records) => self.fetched_records(stream, records, sync),
            Fetch::NeedSnapshot { why } => self.want_copy(stream, why),
            Fetch::UpToDate | Fetch::Dropped { .. } | Fetch::Unknown if copy_end.is_some() => {
                self.want_copy(
                    stream,
                    "the log ended before the end of the copy".to_owned(),
                );
            }
            Fetch::UpToDate => {}
            Fetch::Dropped { at } => {
                let epoch = self.epoch;
                let db = self.at(stream);
                if db.peer != at && db.peer != Pos::ZERO {
                    db.phase = Phase::Dropping;
                    let generation = db.generation;
                    let drop = Message::Drop {
                        generation,
                        sender_epoch: epoch,
                        at,
                    };
                    self.frames.push((stream, drop));
                }
            }
            Fetch::Unknown => {
                let db = self.at(stream);
                db.phase = Phase::Unknown;
                if db.peer != Pos::ZERO {
                    self.frames.push((stream, Message::Unknown));
                }
            }
        }
        self.touch(stream);
    }

    fn fetched_records(&mut self, stream: u16, records: Vec<Record>, sync: bool) {
        let db = self.at(stream);
        if let Err(why) = check_chain(db.peer, &records) {
            self.want_copy(stream, why);
            return;
        }
        db.sync = sync;
        db.is_dirty = true;
        db.backlog.extend(records);
        // What was read goes out before the next database is read.
        if !db.is_queued {
            db.is_queued = true;
            self.ready.push_front(stream);
        }
    }

    /// Puts a database aside for a while after its store failed.
    pub fn failed(&mut self, stream: u16, now: Instant) {
        let at = now + self.limits.retry_after;
        if !matches!(self.at(stream).phase, Phase::Tail { .. }) {
            // A copy that will not end is given up: the log is asked again, and asks for a new one.
            self.leave_copy(stream);
        }
        let db = self.at(stream);
        db.is_dirty = true;
        db.is_paused = true;
        self.retries.push((at, stream));
        self.touch(stream);
    }

    /// Says where this history has been; a copy is announced next.
    pub fn history(&mut self, stream: u16, mut milestones: Vec<Milestone>) {
        milestones.truncate(MAX_MILESTONES);
        let generation = self.at(stream).generation;
        let history = Message::History {
            generation,
            milestones,
        };
        self.frames.push((stream, history));
    }

    /// Announces a copy.
    pub fn copy_opened(
        &mut self,
        stream: u16,
        start: Pos,
        page_size: u32,
        page_count: u32,
        next: Pgno,
        is_difference: bool,
    ) {
        let sender_epoch = self.epoch;
        let db = self.at(stream);
        db.phase = Phase::Copying { start };
        let begin = Message::SnapshotBegin {
            generation: db.generation,
            snapshot: SnapshotStart {
                sender_epoch,
                start,
                page_size,
                page_count,
                next,
                is_difference,
            },
        };
        self.frames.push((stream, begin));
        self.touch(stream);
    }

    /// Sends pages of a copy, all of `page_size` bytes.
    pub fn pages(&mut self, stream: u16, page_size: PageSize, pages: Vec<(Pgno, Bytes)>) {
        let batch = PageBatch {
            generation: self.at(stream).generation,
            page_size,
            pages,
        };
        self.send(stream, Message::Pages(batch));
        self.touch(stream);
    }

    /// Ends a copy; its reader stays open until the records up to `end` are sent.
    pub fn copy_finished(&mut self, stream: u16, end: Pos) {
        let db = self.at(stream);
        if let Phase::Copying { start } = db.phase {
            db.peer = start;
            db.is_dirty = true;
            db.phase = Phase::Tail { end };
            let generation = db.generation;
            self.frames
                .push((stream, Message::SnapshotEnd { generation, end }));
            self.end_tail(stream);
        }
        self.touch(stream);
    }

    /// Takes the frames gathered so far, in order.
    pub fn take_frames(&mut self) -> Vec<(u16, Message)> {
        std::mem::take(&mut self.frames)
    }

    /// Takes the streams whose snapshot reader is no longer needed.
    pub fn take_closed_copies(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.closed_copies)
    }

    /// Tells whether all the primary has is sent.
    #[must_use]
    pub fn is_caught_up(&self) -> bool {
        self.unsettled == 0
    }

    /// Returns the database of a stream id.
    #[must_use]
    pub fn name(&self, stream: u16) -> Option<&DbName> {
        let index = usize::from(stream).checked_sub(1)?;
        self.dbs.get(index).map(|db| &db.name)
    }

    /// Returns how many naks were taken.
    #[must_use]
    pub fn nak_count(&self) -> u64 {
        self.nak_count
    }

    /// Returns bytes sent and not yet done.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    fn open(&mut self, name: &DbName) -> Result<Option<u16>, OutOfStreams> {
        if let Some(stream) = self.by_name.get(name) {
            return Ok(Some(*stream));
        }
        if !self.filter.matches(name) {
            return Ok(None);
        }
        let stream = u16::try_from(self.dbs.len() + 1).map_err(|_| OutOfStreams)?;
        self.dbs.push(Db {
            name: name.clone(),
            phase: Phase::Live,
            generation: 0,
            peer: Pos::ZERO,
            is_dirty: false,
            is_queued: false,
            is_settled: true,
            is_paused: false,
            backlog: VecDeque::new(),
            offset: 0,
            sync: false,
            sent_bytes: 0,
            done_bytes: 0,
            acked: Applied::default(),
            nak_at: None,
        });
        self.by_name.insert(name.clone(), stream);
        let db = name.clone();
        self.frames.push((stream, Message::Open { db }));
        Ok(Some(stream))
    }

    fn get(&mut self, stream: u16, kind: Kind) -> Result<&mut Db, FrameError> {
        let index = usize::from(stream).wrapping_sub(1);
        self.dbs
            .get_mut(index)
            .ok_or_else(|| unexpected(kind, format!("no stream {stream}")))
    }

    /// Ids that come from this session itself.
    fn at(&mut self, stream: u16) -> &mut Db {
        &mut self.dbs[usize::from(stream) - 1]
    }

    /// Bytes a database may send now; none unless it is below its window or inside a record.
    fn credit(&self, stream: u16) -> Option<usize> {
        let db = &self.dbs[usize::from(stream) - 1];
        let used = db.sent_bytes - db.done_bytes;
        let turn = self.limits.turn_bytes as u64;
        let free = self.limits.total_window.saturating_sub(self.in_flight);
        let window = self.limits.db_window.min((free / 2).max(turn));
        let credit = match window.checked_sub(used) {
            // Half a turn at least, or a full window would be fed in crumbs.
            Some(credit) if credit >= turn.div_ceil(2) => credit,
            _ if db.offset > 0 => turn,
            _ => return None,
        };
        usize::try_from(credit).ok()
    }

    fn send(&mut self, stream: u16, message: Message) {
        let cost = message.cost();
        self.in_flight += cost;
        self.at(stream).sent_bytes += cost;
        self.frames.push((stream, message));
    }

    /// Sends records read earlier; false if it may not now.
    fn send_backlog(&mut self, stream: u16, max_bytes: usize) -> bool {
        let mut left = max_bytes;
        while left > 0 && self.may_begin(stream) {
            let sender_epoch = self.epoch;
            let db = self.at(stream);
            let Some(record) = db.backlog.front() else {
                break;
            };
            let end = record.ltx.len().min(db.offset + left);
            left = left.saturating_sub((end - db.offset).max(1));
            let bytes = record.ltx.slice(db.offset..end);
            let message = if db.offset == 0 {
                Message::Record(RecordStart {
                    generation: db.generation,
                    sender_epoch,
                    sync: db.sync,
                    meta: record.meta,
                    ltx_len: u32::try_from(record.ltx.len()).unwrap_or(u32::MAX),
                    bytes,
                })
            } else {
                Message::RecordPart {
                    generation: db.generation,
                    offset: u32::try_from(db.offset).unwrap_or(u32::MAX),
                    bytes,
                }
            };
            db.offset = end;
            if end == record.ltx.len() {
                db.peer = record.meta.post_pos();
                db.offset = 0;
                db.backlog.pop_front();
            }
            self.send(stream, message);
        }
        self.end_tail(stream);
        left < max_bytes
    }

    /// Tells whether the first record of the backlog may be sent; a huge one waits for another to be done.
    fn may_begin(&mut self, stream: u16) -> bool {
        let window = self.limits.db_window;
        let db = self.at(stream);
        let len = db.backlog.front().map_or(0, |r| r.ltx.len() as u64);
        let until = db.sent_bytes + len;
        let is_huge = db.offset == 0 && len > window;
        match self.huge {
            _ if !is_huge => true,
            Some(_) => {
                if !self.wants_huge.contains(&stream) {
                    self.wants_huge.push_back(stream);
                }
                false
            }
            None => {
                self.huge = Some(Huge { stream, until });
                true
            }
        }
    }

    fn end_huge(&mut self, stream: u16, done_bytes: u64) {
        let is_done = |h: Huge| h.stream == stream && done_bytes >= h.until;
        if self.huge.is_some_and(is_done) {
            self.huge = None;
            while let Some(waiting) = self.wants_huge.pop_front() {
                self.touch(waiting);
            }
        }
    }

    /// Lets go of a copy once the records up to its end are sent.
    fn end_tail(&mut self, stream: u16) {
        let db = self.at(stream);
        if matches!(db.phase, Phase::Tail { end } if db.peer.txid >= end.txid) {
            self.leave_copy(stream);
            self.at(stream).phase = Phase::Live;
        }
    }

    fn want_copy(&mut self, stream: u16, why: String) {
        self.leave_copy(stream);
        let db = self.at(stream);
        db.phase = Phase::WantsCopy { why };
        db.backlog.clear();
        db.offset = 0;
        self.wants_copy.push_back(stream);
        self.grant_copies();
    }

    fn leave_copy(&mut self, stream: u16) {
        if self.at(stream).phase.holds_a_copy_slot() {
            self.at(stream).phase = Phase::Live;
            self.copies -= 1;
            self.closed_copies.push(stream);
            self.grant_copies();
        }
    }

    fn grant_copies(&mut self) {
        while self.copies < self.limits.max_copies {
            let Some(stream) = self.wants_copy.pop_front() else {
                return;
            };
            let db = self.at(stream);
            // A database that left the queue by another way is passed over.
            if let Phase::WantsCopy { why } = &mut db.phase {
                let why = std::mem::take(why);
                let generation = db.generation;
                db.phase = Phase::Asked;
                self.copies += 1;
                self.frames.push((stream, Message::Ask { generation, why }));
            }
        }
    }

    fn resume_retries(&mut self, now: Instant) {
        let due: Vec<u16> = self
            .retries
            .extract_if(.., |(at, _)| *at <= now)
            .map(|(_, stream)| stream)
            .collect();
        for stream in due {
            self.at(stream).is_paused = false;
            self.touch(stream);
        }
    }

    /// Queues a database for a turn if it has something to do, and keeps the count of unsettled ones.
    fn touch(&mut self, stream: u16) {
        let has_credit = self.credit(stream).is_some() && !self.wants_huge.contains(&stream);
        let db = self.at(stream);
        let has_work = match &db.phase {
            Phase::Live => db.is_dirty || !db.backlog.is_empty(),
            Phase::Tail { .. } | Phase::Copying { .. } => true,
            Phase::Offered(offer) => offer.missing == 0,
            Phase::WantsCopy { .. } | Phase::Asked | Phase::Dropping | Phase::Unknown => false,
        };
        let is_settled = matches!(db.phase, Phase::Live | Phase::Unknown) && !has_work;
        let was_settled = std::mem::replace(&mut db.is_settled, is_settled);
        if has_work && has_credit && !db.is_queued && !db.is_paused {
            db.is_queued = true;
            self.ready.push_back(stream);
        }
        match (was_settled, is_settled) {
            (true, false) => self.unsettled += 1,
            (false, true) => self.unsettled -= 1,
            _ => {}
        }
    }
}

fn unexpected(kind: Kind, why: String) -> FrameError {
    FrameError::Unexpected { kind, why }
}

/// Checks that records lead on from a position, so that what leaves here can be applied.
fn check_chain(after: Pos, records: &[Record]) -> Result<(), String> {
    let Some(first) = records.first() else {
        return Err("the log gave no records".to_owned());
    };
    if first.meta.min_txid > after.txid.next() || first.meta.max_txid <= after.txid {
        return Err(format!(
            "the log has {}-{} after {after}",
            first.meta.min_txid, first.meta.max_txid
        ));
    }
    if first.meta.min_txid == after.txid.next() && first.meta.pre_pos() != after {
        return Err(format!(
            "the log continues from {}, the replica is at {after}",
            first.meta.pre_pos()
        ));
    }
    for pair in records.windows(2) {
        if pair[1].meta.pre_pos() != pair[0].meta.post_pos() {
            return Err(format!(
                "the log continues from {} after {}",
                pair[1].meta.pre_pos(),
                pair[0].meta.post_pos()
            ));
        }
    }
    if let Some(huge) = records
        .iter()
        .find(|r| r.ltx.len() > MAX_RECORD_LEN as usize || r.ltx.is_empty())
    {
        return Err(format!(
            "record {} has {} bytes",
            huge.meta.max_txid,
            huge.ltx.len()
        ));
    }
    Ok(())
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
