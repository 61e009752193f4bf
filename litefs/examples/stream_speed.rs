//! How fast a stream is on loopback: page copies, large and small records, and the way of one commit.
//!
//! `cargo run --release -p litefs --example stream_speed`. Both ends run in this process on stores that only hand out
//! and drop bytes, so the numbers are those of the stream itself: frames, CRC, LZ4's tries, TCP, threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use litefs::ltx::{Checksum, Pgno, Pos, Txid};
use litefs::replication::conn::Conn;
use litefs::replication::receive::{Dial, DialError, Dialing, ReceiveConfig, Receiver};
use litefs::replication::replicas::{AckListener, Replicas};
use litefs::replication::send::{SendConfig, Sender};
use litefs::replication::*;
use tokio::net::{TcpListener, TcpStream};

const PAGE_LEN: usize = 4096;
const PAGE_SIZE: u32 = 4096;
const COPY_PAGES: u32 = 300_000;
const LARGE: (u64, usize) = (1000, 1 << 20);
const SMALL: (u64, usize) = (300_000, 5000);
const COMMITS: u64 = 20_000;

fn pos(txid: u64) -> Pos {
    Pos {
        txid: Txid(txid),
        post_apply_checksum: Checksum::new(txid),
    }
}

/// A log of `txid` records of `record` each; a log that starts at 2 needs a copy first.
struct Store {
    hub: ChangeHub,
    db: DbName,
    txid: AtomicU64,
    noise: Bytes,
    record_len: usize,
    needs_copy: bool,
}

impl Store {
    fn new(noise: &Bytes, txid: u64, record_len: usize, needs_copy: bool) -> anyhow::Result<Store> {
        Ok(Store {
            hub: ChangeHub::new(),
            db: "speed.db".parse()?,
            txid: AtomicU64::new(txid),
            noise: noise.clone(),
            record_len,
            needs_copy,
        })
    }
}

struct Port(Arc<Store>);

impl Source for Port {
    fn cluster_id(&self) -> String {
        "LFSC0000000000000001".to_owned()
    }

    fn node_id(&self) -> u64 {
        1
    }

    fn epoch(&self) -> Option<u64> {
        Some(1)
    }

    fn databases(&self) -> Vec<(DbName, Pos)> {
        vec![(self.0.db.clone(), pos(self.0.txid.load(Ordering::SeqCst)))]
    }

    fn changes(&self) -> Changes {
        self.0.hub.subscribe()
    }

    fn read_after(&self, _: &DbName, after: Pos, max: usize) -> Result<Fetch, SourceError> {
        let last = self.0.txid.load(Ordering::SeqCst);
        if after.txid.0 >= last {
            return Ok(Fetch::UpToDate);
        }
        if self.0.needs_copy && after == Pos::ZERO {
            let why = "asked for".to_owned();
            return Ok(Fetch::NeedSnapshot { why });
        }
        let count = (max / self.0.record_len.max(1)).max(1) as u64;
        let record = |txid: u64| Record {
            meta: RecordMeta {
                epoch: 1,
                min_txid: Txid(txid),
                max_txid: Txid(txid),
                pre: pos(txid - 1).post_apply_checksum,
                post: pos(txid).post_apply_checksum,
                timestamp_ms: 0,
                commit: 1,
                page_size: PAGE_SIZE,
            },
            ltx: self.0.noise.slice(..self.0.record_len),
        };
        let first = after.txid.0 + 1;
        let end = last.min(after.txid.0 + count);
        Ok(Fetch::Records((first..=end).map(record).collect()))
    }

    fn open_snapshot(
        &self,
        _: &DbName,
        _: SnapshotRequest,
    ) -> Result<Box<dyn SnapshotReader>, SourceError> {
        let noise = self.0.noise.clone();
        Ok(Box::new(Pages { next: 1, noise }))
    }

    fn now_ms(&self) -> i64 {
        0
    }
}

struct Pages {
    next: u32,
    noise: Bytes,
}

impl SnapshotReader for Pages {
    fn start(&self) -> Pos {
        pos(1)
    }

    fn page_size(&self) -> u32 {
        PAGE_SIZE
    }

    fn page_count(&self) -> u32 {
        COPY_PAGES
    }

    fn seek(&mut self, next: Pgno) {
        self.next = next.get();
    }

    fn next_pages(&mut self, max: usize) -> Result<Vec<(Pgno, Bytes)>, SourceError> {
        let count = u32::try_from(max / PAGE_LEN).unwrap_or(1).max(1);
        let end = (self.next + count).min(COPY_PAGES + 1);
        let pages = (self.next..end).filter_map(|n| {
            let at = n as usize % (self.noise.len() / PAGE_LEN) * PAGE_LEN;
            Some((Pgno::new(n)?, self.noise.slice(at..at + PAGE_LEN)))
        });
        let pages = pages.collect();
        self.next = end;
        Ok(pages)
    }

    fn finish(&mut self) -> Result<Pos, SourceError> {
        Ok(pos(1))
    }
}

/// Drops what it gets, and tells when.
struct Drain(mpsc::Sender<(u64, Instant)>);

impl Drain {
    fn at(&self, pos: Pos) -> Applied {
        let _ = self.0.send((pos.txid.0, Instant::now()));
        Applied { pos, durable: pos }
    }
}

impl Sink for Drain {
    fn cluster_id(&self) -> Option<String> {
        None
    }

    fn adopt_cluster_id(&self, _: &str) -> Result<(), SinkError> {
        Ok(())
    }

    fn node_id(&self) -> u64 {
        2
    }

    fn epoch(&self) -> u64 {
        0
    }

    fn observe_epoch(&self, _: u64) -> Result<(), SinkError> {
        Ok(())
    }

    fn positions(&self) -> Vec<(DbName, Pos)> {
        Vec::new()
    }

    fn apply(&self, _: &DbName, batch: Batch) -> Result<Applied, SinkError> {
        let last = &batch.records[batch.records.len() - 1];
        Ok(self.at(last.meta.post_pos()))
    }

    fn drop_db(&self, _: &DbName, _: u64, _: Pos) -> Result<Applied, SinkError> {
        Ok(Applied::default())
    }

    fn unknown_to_primary(&self, _: &DbName) {}

    fn page_checksums(&self, _: &DbName) -> Result<Option<Vec<u64>>, SinkError> {
        Ok(None)
    }

    fn resume_point(&self, _: &DbName) -> Option<(Pos, Pgno)> {
        None
    }

    fn begin_snapshot(
        &self,
        _: &DbName,
        _: SnapshotStart,
    ) -> Result<Box<dyn SnapshotWriter>, SinkError> {
        Ok(Box::new(DrainPages(Drain(self.0.clone()))))
    }

    fn applied(&self, _: &DbName) -> Applied {
        Applied::default()
    }

    fn heartbeat(&self, _: i64, _: bool) {}

    fn connected(&self, _: &PrimaryInfo) {}

    fn disconnected(&self) {}
}

struct DrainPages(Drain);

impl SnapshotWriter for DrainPages {
    fn pages(&mut self, _: Vec<(Pgno, Bytes)>) -> Result<(), SinkError> {
        Ok(())
    }

    fn records(&mut self, _: Vec<Record>) -> Result<(), SinkError> {
        Ok(())
    }

    fn finish(self: Box<Self>, end: Pos) -> Result<Applied, SinkError> {
        Ok(self.0.at(end))
    }
}

struct Tcp;

impl Dial for Tcp {
    fn dial<'a>(&'a self, target: &'a str) -> Dialing<'a> {
        Box::pin(async move {
            let tcp = TcpStream::connect(target).await;
            let tcp = tcp.map_err(|source| DialError::Connect {
                target: target.to_owned(),
                source,
            })?;
            Ok(Conn::from_tcp(tcp, Bytes::new()))
        })
    }
}

struct Acks(mpsc::Sender<Instant>);

impl AckListener for Acks {
    fn acked(&self, _: u64, _: u64, _: &DbName, _: Applied) {
        let _ = self.0.send(Instant::now());
    }
}

/// Both ends of one stream.
struct Pair {
    store: Arc<Store>,
    applied: mpsc::Receiver<(u64, Instant)>,
    acks: mpsc::Receiver<Instant>,
    began: Instant,
}

impl Pair {
    async fn start(store: Store) -> anyhow::Result<Pair> {
        let store = Arc::new(store);
        let replicas = Replicas::new(Arc::new(litefs::history::History::new(None, None)));
        let (acks_in, acks) = mpsc::channel();
        replicas.set_listener(Arc::new(Acks(acks_in)));
        let port = Arc::new(Port(Arc::clone(&store)));
        let sender = Sender::new(port, replicas, SendConfig::default());
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let conn = Conn::from_tcp(tcp, Bytes::new());
                let _ = Arc::clone(&sender).serve(conn).await;
            }
        });
        let (applied_in, applied) = mpsc::channel();
        let sink = Arc::new(Drain(applied_in));
        let receiver = Receiver::new(sink, Arc::new(Tcp), ReceiveConfig::default());
        let began = Instant::now();
        tokio::spawn(async move {
            let ended = receiver.follow(&address).await;
            eprintln!("stream ended: {ended:?}");
        });
        Ok(Pair {
            store,
            applied,
            acks,
            began,
        })
    }

    /// Waits on this thread until `txid` is applied.
    fn until(&self, txid: u64) -> anyhow::Result<Instant> {
        loop {
            let (at, when) = self.applied.recv_timeout(Duration::from_secs(60))?;
            if at >= txid {
                return Ok(when);
            }
        }
    }
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let mut x = 1_u64;
    let noise: Bytes = (0..1 << 20)
        .flat_map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x ^ (x >> 29)).to_le_bytes()
        })
        .collect::<Vec<u8>>()
        .into();

    let rate = |bytes: f64, took: Duration| bytes / 1e6 / took.as_secs_f64();
    for _ in 0..3 {
        let store = Store::new(&noise, 1, 0, true)?;
        let pair = runtime.block_on(Pair::start(store))?;
        let took = pair.until(1)? - pair.began;
        let bytes = f64::from(COPY_PAGES) * f64::from(PAGE_SIZE);
        println!(
            "page copy, incompressible, 4 KiB pages: {:.0} MB/s",
            rate(bytes, took)
        );
    }
    for (count, len) in [LARGE, SMALL] {
        let pair = runtime.block_on(Pair::start(Store::new(&noise, count, len, false)?))?;
        let took = pair.until(count)? - pair.began;
        #[expect(clippy::cast_precision_loss, reason = "a measurement")]
        let (bytes, per_second) = (
            (count * len as u64) as f64,
            count as f64 / took.as_secs_f64(),
        );
        let mb = rate(bytes, took);
        println!("records of {len} bytes: {mb:.0} MB/s, {per_second:.0} a second");
    }

    let pair = runtime.block_on(Pair::start(Store::new(&noise, 1, 400, false)?))?;
    pair.until(1)?;
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for txid in 2..COMMITS {
        while pair.acks.try_recv().is_ok() {}
        pair.store.txid.store(txid, Ordering::SeqCst);
        let began = Instant::now();
        pair.store.hub.publish(&pair.store.db);
        there.push(pair.until(txid)? - began);
        let acked = pair.acks.recv_timeout(Duration::from_secs(10));
        back.push(acked.context("no ack")? - began);
    }
    for (what, mut times) in [("apply", there), ("ack on the primary", back)] {
        times.sort_unstable();
        let at = |percent: usize| times[times.len() * percent / 100];
        println!("commit to {what}: median {:?}, 99% {:?}", at(50), at(99));
    }
    Ok(())
}
