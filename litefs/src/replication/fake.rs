//! In-memory stores behind both ports, for tests: pages of 512 bytes, records of (page number, page) pairs.
//!
//! The sink checks what a real one would: positions, epochs, checksums, one worker at a time per database.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::*;
use crate::ltx::page_checksum;

pub(super) const PAGE: usize = 512;
const PAGE_SIZE: u32 = 512;

type Hook = Box<dyn FnMut(&FakeSource) + Send>;

pub(super) type Pages = BTreeMap<Pgno, Bytes>;

pub(super) fn name(s: &str) -> DbName {
    s.parse().unwrap()
}

pub(super) fn page(fill: u8) -> Bytes {
    Bytes::from(vec![fill; PAGE])
}

fn checksum(pages: &Pages) -> Checksum {
    pages.iter().fold(Checksum::EMPTY, |sum, (pgno, page)| {
        sum ^ page_checksum(*pgno, page)
    })
}

fn apply_to(pages: &mut Pages, record: &Record) {
    for pair in record.ltx.chunks(4 + PAGE) {
        let pgno = u32::from_be_bytes(pair[..4].try_into().unwrap());
        let bytes = Bytes::copy_from_slice(&pair[4..]);
        pages.insert(Pgno::new(pgno).unwrap(), bytes);
    }
    pages.retain(|pgno, _| pgno.get() <= record.meta.commit);
}

/// A primary's store.
pub(super) struct FakeSource {
    pub(super) epoch: AtomicU64,
    pub(super) cluster: String,
    pub(super) hub: ChangeHub,
    dbs: Mutex<BTreeMap<DbName, SourceDb>>,
    /// Runs before each read of pages: lets a test commit in the middle of a copy.
    pub(super) on_read_pages: Mutex<Option<Hook>>,
    pub(super) pages_read: AtomicU64,
    pub(super) snapshots: AtomicU64,
    pub(super) fetches: AtomicU64,
    pub(super) sync: Mutex<HashSet<DbName>>,
}

#[derive(Default, Clone)]
struct SourceDb {
    pages: Pages,
    pos: Pos,
    log: Vec<Record>,
    dropped_at: Option<Pos>,
}

impl FakeSource {
    pub(super) fn new(epoch: u64) -> Arc<FakeSource> {
        Arc::new(FakeSource {
            epoch: AtomicU64::new(epoch),
            cluster: "LFSC00000000000000AA".to_owned(),
            hub: ChangeHub::new(),
            dbs: Mutex::default(),
            on_read_pages: Mutex::default(),
            pages_read: AtomicU64::new(0),
            snapshots: AtomicU64::new(0),
            fetches: AtomicU64::new(0),
            sync: Mutex::default(),
        })
    }

    /// Commits a transaction that writes these pages.
    pub(super) fn commit(&self, db: &str, writes: &[(u32, u8)]) -> Pos {
        let db = name(db);
        let mut dbs = self.dbs.lock();
        let slot = dbs.entry(db.clone()).or_default();
        slot.dropped_at = None;
        let mut ltx = BytesMut::new();
        for (pgno, fill) in writes {
            ltx.put_u32(*pgno);
            ltx.extend_from_slice(&page(*fill));
        }
        let last = writes.iter().map(|w| w.0).max().unwrap();
        let old = slot.pages.keys().last().map_or(0, |p| p.get());
        let txid = slot.pos.txid.next();
        let mut record = Record {
            meta: RecordMeta {
                epoch: self.epoch.load(Ordering::SeqCst),
                min_txid: txid,
                max_txid: txid,
                pre: slot.pos.post_apply_checksum,
                post: Checksum::EMPTY,
                timestamp_ms: 1,
                commit: last.max(old),
                page_size: PAGE_SIZE,
            },
            ltx: ltx.freeze(),
        };
        apply_to(&mut slot.pages, &record);
        record.meta.post = checksum(&slot.pages);
        slot.pos = record.meta.post_pos();
        slot.log.push(record);
        let pos = slot.pos;
        drop(dbs);
        self.hub.publish(&db);
        pos
    }

    /// Merges the log into one record, as compaction does.
    pub(super) fn compact(&self, db: &str) {
        let mut dbs = self.dbs.lock();
        let slot = dbs.get_mut(&name(db)).unwrap();
        let mut pages = Pages::new();
        let first = slot.log[0].meta;
        let last = slot.log[slot.log.len() - 1].meta;
        for record in &slot.log {
            apply_to(&mut pages, record);
        }
        let mut ltx = BytesMut::new();
        for (pgno, page) in pages {
            ltx.put_u32(pgno.get());
            ltx.extend_from_slice(&page);
        }
        let meta = RecordMeta {
            min_txid: first.min_txid,
            pre: first.pre,
            ..last
        };
        let ltx = ltx.freeze();
        slot.log = vec![Record { meta, ltx }];
    }

    /// Forgets the log: retention.
    pub(super) fn forget_log(&self, db: &str) {
        self.dbs.lock().get_mut(&name(db)).unwrap().log.clear();
    }

    pub(super) fn drop_db(&self, db: &str) {
        let db = name(db);
        let mut dbs = self.dbs.lock();
        let slot = dbs.get_mut(&db).unwrap();
        let txid = slot.pos.txid.next();
        let at = Pos {
            txid,
            post_apply_checksum: Checksum::EMPTY,
        };
        *slot = SourceDb {
            pos: at,
            dropped_at: Some(at),
            ..SourceDb::default()
        };
        drop(dbs);
        self.hub.publish(&db);
    }

    pub(super) fn pos(&self, db: &str) -> Pos {
        self.dbs.lock()[&name(db)].pos
    }

    pub(super) fn pages(&self, db: &str) -> Pages {
        self.dbs.lock()[&name(db)].pages.clone()
    }
}

/// The port takes the store by `Arc`, and so does a snapshot reader.
pub(super) struct SourcePort(pub(super) Arc<FakeSource>);

impl Source for SourcePort {
    fn cluster_id(&self) -> String {
        self.0.cluster.clone()
    }

    fn node_id(&self) -> u64 {
        1
    }

    fn epoch(&self) -> Option<u64> {
        Some(self.0.epoch.load(Ordering::SeqCst)).filter(|e| *e > 0)
    }

    fn databases(&self) -> Vec<(DbName, Pos)> {
        let dbs = self.0.dbs.lock();
        dbs.iter().map(|(db, d)| (db.clone(), d.pos)).collect()
    }

    fn changes(&self) -> Changes {
        self.0.hub.subscribe()
    }

    fn read_after(&self, db: &DbName, after: Pos, max: usize) -> Result<Fetch, SourceError> {
        self.0.fetches.fetch_add(1, Ordering::SeqCst);
        let dbs = self.0.dbs.lock();
        let Some(slot) = dbs.get(db) else {
            return Ok(Fetch::Unknown);
        };
        if let Some(at) = slot.dropped_at {
            return Ok(Fetch::Dropped { at });
        }
        if after == slot.pos {
            return Ok(Fetch::UpToDate);
        }
        let first = slot.log.iter().position(|r| r.meta.max_txid > after.txid);
        let Some(first) = first.filter(|i| {
            let meta = &slot.log[*i].meta;
            let exact = meta.pre_pos() == after;
            exact || (meta.min_txid <= after.txid && after != Pos::ZERO)
        }) else {
            let why = format!("log does not continue {after}");
            return Ok(Fetch::NeedSnapshot { why });
        };
        let mut len = 0;
        let fits = |r: &&Record| {
            len += r.ltx.len();
            len == r.ltx.len() || len <= max
        };
        let records = slot.log[first..].iter().take_while(fits).cloned().collect();
        Ok(Fetch::Records(records))
    }

    fn open_snapshot(
        &self,
        db: &DbName,
        request: SnapshotRequest,
    ) -> Result<Box<dyn SnapshotReader>, SourceError> {
        self.0.snapshots.fetch_add(1, Ordering::SeqCst);
        let dbs = self.0.dbs.lock();
        let slot = dbs.get(db).ok_or(SourceError::NotFound(db.clone()))?;
        let covers = |pos: &Pos| slot.log.iter().any(|r| r.meta.pre_pos() == *pos);
        let start = request.resume_at.filter(covers).unwrap_or(slot.pos);
        Ok(Box::new(FakeReader {
            source: Arc::clone(&self.0),
            db: db.clone(),
            start,
            have: request.have,
            next: 1,
            page_count: u32::try_from(slot.pages.len()).unwrap(),
        }))
    }

    fn wants_durable_acks(&self, db: &DbName) -> bool {
        self.0.sync.lock().contains(db)
    }

    fn now_ms(&self) -> i64 {
        1_700_000_000_000
    }
}

struct FakeReader {
    source: Arc<FakeSource>,
    db: DbName,
    start: Pos,
    have: Option<Vec<u64>>,
    next: u32,
    page_count: u32,
}

impl SnapshotReader for FakeReader {
    fn start(&self) -> Pos {
        self.start
    }

    fn page_size(&self) -> u32 {
        PAGE_SIZE
    }

    fn page_count(&self) -> u32 {
        self.page_count
    }

    fn seek(&mut self, next: Pgno) {
        self.next = next.get();
    }

    fn next_pages(&mut self, max: usize) -> Result<Vec<(Pgno, Bytes)>, SourceError> {
        if let Some(hook) = &mut *self.source.on_read_pages.lock() {
            hook(&self.source);
        }
        let dbs = self.source.dbs.lock();
        let pages = &dbs[&self.db].pages;
        let differs = |(pgno, page): &(&Pgno, &Bytes)| {
            let sum = page_checksum(**pgno, page).get();
            self.have.as_ref().and_then(|h| h.get(pgno.index())) != Some(&sum)
        };
        let found: Vec<(Pgno, Bytes)> = pages
            .range(Pgno::new(self.next).unwrap()..)
            .take_while(|(pgno, _)| pgno.get() <= self.page_count)
            .filter(differs)
            .take((max / PAGE).max(1))
            .map(|(pgno, page)| (*pgno, page.clone()))
            .collect();
        if let Some((last, _)) = found.last() {
            self.next = last.get() + 1;
        }
        let count = found.len() as u64;
        self.source.pages_read.fetch_add(count, Ordering::SeqCst);
        Ok(found)
    }

    fn finish(&mut self) -> Result<Pos, SourceError> {
        Ok(self.source.dbs.lock()[&self.db].pos)
    }
}

/// A replica's store.
pub(super) struct FakeSink {
    pub(super) node_id: u64,
    pub(super) cluster: Mutex<Option<String>>,
    pub(super) epoch: AtomicU64,
    pub(super) filter: DatabaseFilter,
    state: Mutex<SinkState>,
    gates: Mutex<HashSet<DbName>>,
    gate_moved: Condvar,
    /// Raised by whatever happens.
    version: watch::Sender<u64>,
}

#[derive(Default)]
struct SinkState {
    dbs: BTreeMap<DbName, SinkDb>,
    busy: HashSet<DbName>,
    waiting_at_gate: HashSet<DbName>,
    partial: HashMap<DbName, Partial>,
    unknown: Vec<DbName>,
    dropped: Vec<DbName>,
    io_errors: u32,
    applies: Vec<(DbName, usize, bool)>,
    caught_up: u64,
    primary: Option<PrimaryInfo>,
    snapshots: Vec<SnapshotStart>,
}

#[derive(Default, Clone)]
struct SinkDb {
    pages: Pages,
    pos: Pos,
}

#[derive(Clone)]
struct Partial {
    start: SnapshotStart,
    next: Pgno,
    pages: Pages,
}

impl FakeSink {
    pub(super) fn new(node_id: u64) -> Arc<FakeSink> {
        FakeSink::with_filter(node_id, &[])
    }

    pub(super) fn with_filter(node_id: u64, filter: &[&str]) -> Arc<FakeSink> {
        Arc::new(FakeSink {
            node_id,
            cluster: Mutex::default(),
            epoch: AtomicU64::new(0),
            filter: DatabaseFilter::new(filter.iter().map(|f| f.parse().unwrap()).collect()),
            state: Mutex::default(),
            gates: Mutex::default(),
            gate_moved: Condvar::new(),
            version: watch::Sender::new(0),
        })
    }

    fn moved(&self) {
        self.version.send_modify(|v| *v += 1);
    }

    /// Waits until a condition holds; asked again after everything that happens.
    async fn until(&self, mut holds: impl FnMut(&SinkState) -> bool) {
        let mut version = self.version.subscribe();
        loop {
            if holds(&self.state.lock()) {
                return;
            }
            version.changed().await.unwrap();
        }
    }

    pub(super) async fn until_at(&self, db: &str, pos: Pos) {
        let db = name(db);
        self.until(|s| s.dbs.get(&db).is_some_and(|d| d.pos == pos))
            .await;
    }

    pub(super) async fn until_dropped(&self, db: &str) {
        self.until(|s| s.dropped.contains(&name(db))).await;
    }

    pub(super) async fn until_unknown(&self, db: &str) {
        self.until(|s| s.unknown.contains(&name(db))).await;
    }

    /// Waits for the next mark that says everything is applied.
    pub(super) async fn until_caught_up(&self) {
        let before = self.state.lock().caught_up;
        self.until(|s| s.caught_up > before).await;
    }

    pub(super) async fn until_waiting_at_gate(&self, db: &str) {
        self.until(|s| s.waiting_at_gate.contains(&name(db))).await;
    }

    pub(super) fn close_gate(&self, db: &str) {
        self.gates.lock().insert(name(db));
    }

    pub(super) fn open_gate(&self, db: &str) {
        self.gates.lock().remove(&name(db));
        self.gate_moved.notify_all();
    }

    pub(super) fn fail_applies(&self, count: u32) {
        self.state.lock().io_errors = count;
    }

    /// Puts a database there as if from an earlier life.
    pub(super) fn plant(&self, db: &str, txid: u64, pages: Pages) {
        let pos = Pos {
            txid: Txid(txid),
            post_apply_checksum: checksum(&pages),
        };
        let db = name(db);
        self.state.lock().dbs.insert(db, SinkDb { pages, pos });
    }

    pub(super) fn pages(&self, db: &str) -> Option<Pages> {
        let state = self.state.lock();
        state.dbs.get(&name(db)).map(|d| d.pages.clone())
    }

    /// How many records each `apply` had, and whether it had to sync.
    pub(super) fn applies(&self, db: &str) -> Vec<(usize, bool)> {
        let state = self.state.lock();
        let of_db = state.applies.iter().filter(|a| a.0 == name(db));
        of_db.map(|a| (a.1, a.2)).collect()
    }

    pub(super) fn snapshots(&self) -> Vec<SnapshotStart> {
        self.state.lock().snapshots.clone()
    }

    pub(super) fn primary(&self) -> Option<PrimaryInfo> {
        self.state.lock().primary.clone()
    }

    fn pass_gate(&self, db: &DbName) {
        let mut gates = self.gates.lock();
        if gates.contains(db) {
            self.state.lock().waiting_at_gate.insert(db.clone());
            self.moved();
            while gates.contains(db) {
                self.gate_moved.wait(&mut gates);
            }
            self.state.lock().waiting_at_gate.remove(db);
        }
    }

    fn check_epoch(&self, sent: u64) -> Result<(), SinkError> {
        let seen = self.epoch.load(Ordering::SeqCst);
        if sent < seen {
            return Err(SinkError::StaleEpoch { sent, seen });
        }
        Ok(())
    }
}

/// The port takes the store by `Arc`, and so does a snapshot writer.
pub(super) struct SinkPort(pub(super) Arc<FakeSink>);

impl Sink for SinkPort {
    fn cluster_id(&self) -> Option<String> {
        self.0.cluster.lock().clone()
    }

    fn adopt_cluster_id(&self, id: &str) -> Result<(), SinkError> {
        *self.0.cluster.lock() = Some(id.to_owned());
        Ok(())
    }

    fn node_id(&self) -> u64 {
        self.0.node_id
    }

    fn epoch(&self) -> u64 {
        self.0.epoch.load(Ordering::SeqCst)
    }

    fn observe_epoch(&self, epoch: u64) -> Result<(), SinkError> {
        self.0.check_epoch(epoch)?;
        self.0.epoch.store(epoch, Ordering::SeqCst);
        Ok(())
    }

    fn positions(&self) -> Vec<(DbName, Pos)> {
        let state = self.0.state.lock();
        state
            .dbs
            .iter()
            .map(|(db, d)| (db.clone(), d.pos))
            .collect()
    }

    fn filter(&self) -> DatabaseFilter {
        self.0.filter.clone()
    }

    fn apply(&self, db: &DbName, batch: Batch) -> Result<Applied, SinkError> {
        assert!(self.0.state.lock().busy.insert(db.clone()), "two workers");
        self.0.pass_gate(db);
        let mut state = self.0.state.lock();
        state.busy.remove(db);
        self.0.check_epoch(batch.sender_epoch)?;
        if state.io_errors > 0 {
            state.io_errors -= 1;
            return Err(SinkError::Io {
                what: format!("write {db}"),
                source: std::io::ErrorKind::StorageFull.into(),
            });
        }
        let mut copy = state.dbs.get(db).cloned().unwrap_or_default();
        for record in &batch.records {
            let meta = &record.meta;
            let overlaps = meta.min_txid <= copy.pos.txid && meta.max_txid > copy.pos.txid;
            if meta.pre_pos() != copy.pos && !overlaps {
                let (have, want) = (copy.pos, meta.pre_pos());
                return Err(SinkError::PosMismatch { have, want });
            }
            apply_to(&mut copy.pages, record);
            assert_eq!(checksum(&copy.pages), meta.post, "{db} {}", meta.max_txid);
            copy.pos = meta.post_pos();
        }
        let (pos, count) = (copy.pos, batch.records.len());
        state.dbs.insert(db.clone(), copy);
        state.applies.push((db.clone(), count, batch.sync));
        drop(state);
        self.0.moved();
        let durable = if batch.sync { pos } else { Pos::ZERO };
        Ok(Applied { pos, durable })
    }

    fn drop_db(&self, db: &DbName, epoch: u64, _at: Pos) -> Result<Applied, SinkError> {
        self.0.check_epoch(epoch)?;
        let mut state = self.0.state.lock();
        state.dbs.remove(db);
        state.dropped.push(db.clone());
        drop(state);
        self.0.moved();
        Ok(Applied::default())
    }

    fn unknown_to_primary(&self, db: &DbName) {
        self.0.state.lock().unknown.push(db.clone());
        self.0.moved();
    }

    fn page_checksums(&self, db: &DbName) -> Result<Option<Vec<u64>>, SinkError> {
        let state = self.0.state.lock();
        let sums = |d: &SinkDb| {
            let of_page = |(pgno, page): (&Pgno, &Bytes)| page_checksum(*pgno, page).get();
            d.pages.iter().map(of_page).collect()
        };
        Ok(state.dbs.get(db).map(sums))
    }

    fn resume_point(&self, db: &DbName) -> Option<(Pos, Pgno)> {
        let state = self.0.state.lock();
        state.partial.get(db).map(|p| (p.start.start, p.next))
    }

    fn begin_snapshot(
        &self,
        db: &DbName,
        start: SnapshotStart,
    ) -> Result<Box<dyn SnapshotWriter>, SinkError> {
        self.0.check_epoch(start.sender_epoch)?;
        let mut state = self.0.state.lock();
        state.snapshots.push(start);
        let base = match state.partial.remove(db) {
            Some(partial) if start.next > Pgno::ONE => {
                assert_eq!(
                    (partial.start.start, partial.next),
                    (start.start, start.next)
                );
                partial.pages
            }
            _ if start.is_difference => {
                let of_db = state.dbs.get(db).map(|d| d.pages.clone());
                of_db.unwrap_or_default()
            }
            _ => Pages::new(),
        };
        let partial = Partial {
            start,
            next: start.next,
            pages: base,
        };
        state.partial.insert(db.clone(), partial);
        Ok(Box::new(FakeWriter {
            sink: Arc::clone(&self.0),
            db: db.clone(),
            start,
            records: Vec::new(),
        }))
    }

    fn applied(&self, db: &DbName) -> Applied {
        let state = self.0.state.lock();
        let pos = state.dbs.get(db).map(|d| d.pos).unwrap_or_default();
        Applied {
            pos,
            durable: Pos::ZERO,
        }
    }

    fn heartbeat(&self, _primary_ms: i64, caught_up: bool) {
        self.0.state.lock().caught_up += u64::from(caught_up);
        self.0.moved();
    }

    fn connected(&self, primary: &PrimaryInfo) {
        self.0.state.lock().primary = Some(primary.clone());
    }

    fn disconnected(&self) {
        self.0.state.lock().primary = None;
    }
}

struct FakeWriter {
    sink: Arc<FakeSink>,
    db: DbName,
    start: SnapshotStart,
    records: Vec<Record>,
}

impl SnapshotWriter for FakeWriter {
    fn pages(&mut self, pages: Vec<(Pgno, Bytes)>) -> Result<(), SinkError> {
        self.sink.pass_gate(&self.db);
        let mut state = self.sink.state.lock();
        let partial = state.partial.get_mut(&self.db).unwrap();
        for (pgno, page) in pages {
            assert!(pgno >= partial.next);
            partial.next = Pgno::new(pgno.get() + 1).unwrap();
            partial.pages.insert(pgno, page);
        }
        Ok(())
    }

    fn records(&mut self, records: Vec<Record>) -> Result<(), SinkError> {
        self.records.extend(records);
        Ok(())
    }

    fn finish(self: Box<Self>, end: Pos) -> Result<Applied, SinkError> {
        let mut state = self.sink.state.lock();
        let mut pages = state.partial.remove(&self.db).unwrap().pages;
        let mut pos = self.start.start;
        pages.retain(|pgno, _| {
            self.records.is_empty() && pgno.get() <= self.start.page_count
                || !self.records.is_empty()
        });
        for record in &self.records {
            apply_to(&mut pages, record);
            pos = record.meta.post_pos();
        }
        assert!(pos.txid >= end.txid);
        if checksum(&pages) != pos.post_apply_checksum {
            return Err(SinkError::Invalid(format!("{}: checksum differs", self.db)));
        }
        state.dbs.insert(self.db.clone(), SinkDb { pages, pos });
        drop(state);
        self.sink.moved();
        let durable = pos;
        Ok(Applied { pos, durable })
    }
}
