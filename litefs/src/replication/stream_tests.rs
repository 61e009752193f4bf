//! Whole streams over real TCP on loopback, through the HTTP upgrade, between fake stores.

use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;

use super::fake::*;
use super::frame::WireBuf;
use super::message::{Hello, Message, Welcome};
use super::receive::{ReceiveConfig, ReceiveError, Receiver};
use super::replicas::Replicas;
use super::send::{SendConfig, Sender};
use super::session::Limits;
use super::*;
use crate::http::error::NodeError;
use crate::http::events::Event;
use crate::http::metrics::MetricsText;
use crate::http::server::{Export, NodeApi, NodeInfo, Server};
use crate::http::stream::HttpDial;

/// Nothing here should take long; a hang is a failure with a name.
const PATIENCE: Duration = Duration::from_secs(20);

struct Node(Arc<FakeSource>, broadcast::Sender<Event>);

impl NodeApi for Node {
    fn info(&self) -> NodeInfo {
        NodeInfo {
            cluster_id: Some(self.0.cluster.clone()),
            is_primary: true,
            candidate: true,
            path: "/litefs".to_owned(),
            primary: None,
            ready: true,
        }
    }

    fn node_id(&self) -> u64 {
        1
    }

    fn primary_hostname(&self) -> Option<String> {
        Some("ams".to_owned())
    }

    fn databases(&self) -> Vec<(DbName, Pos)> {
        SourcePort(Arc::clone(&self.0)).databases()
    }

    fn export(&self, db: &DbName) -> Result<Export, NodeError> {
        if db.as_str() != "a" {
            return Err(NodeError::NotFound(db.clone()));
        }
        let bytes: Vec<u8> = self.0.pages("a").values().flatten().copied().collect();
        Ok(Export {
            len: Some(bytes.len() as u64),
            bytes: Box::new(std::io::Cursor::new(bytes)),
        })
    }

    fn import(&self, db: &DbName, bytes: &mut dyn Read) -> Result<Pos, NodeError> {
        let mut all = Vec::new();
        bytes
            .read_to_end(&mut all)
            .map_err(|source| NodeError::Io {
                what: format!("import {db}"),
                source,
            })?;
        Ok(self.0.commit(db.as_str(), &[(1, all[0])]))
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.1.subscribe()
    }

    fn metrics(&self, _text: &mut MetricsText) {}
}

struct Primary {
    source: Arc<FakeSource>,
    replicas: Arc<Replicas>,
    address: SocketAddr,
    events: broadcast::Sender<Event>,
    _server: JoinHandle<()>,
}

impl Primary {
    async fn start() -> Primary {
        Primary::with(SendConfig::default()).await
    }

    async fn with(config: SendConfig) -> Primary {
        let source = FakeSource::new(1);
        let replicas = Replicas::new(Arc::new(crate::history::History::new(None, None)));
        let config = SendConfig {
            hostname: "ams".to_owned(),
            ..config
        };
        let port = Arc::new(SourcePort(Arc::clone(&source)));
        let sender = Sender::new(port, Arc::clone(&replicas), config);
        let events = broadcast::Sender::new(16);
        let node = Arc::new(Node(Arc::clone(&source), events.clone()));
        let server = Server::new(node, sender, None);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = tokio::spawn(async move {
            let router = server.router();
            server
                .serve(listener, router, std::future::pending())
                .await
                .unwrap();
        });
        Primary {
            source,
            replicas,
            address,
            events,
            _server: serve,
        }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn receiver(sink: &Arc<FakeSink>) -> Arc<Receiver> {
    let config = ReceiveConfig {
        hostname: "replica".to_owned(),
        reconnect_delay: Duration::from_millis(1),
        ..ReceiveConfig::default()
    };
    let port = Arc::new(SinkPort(Arc::clone(sink)));
    Receiver::new(port, Arc::new(HttpDial::default()), config)
}

/// A replica that follows until dropped.
struct Following(JoinHandle<ReceiveError>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn follow(sink: &Arc<FakeSink>, url: &str) -> Following {
    follow_with(receiver(sink), url)
}

fn follow_with(receiver: Arc<Receiver>, url: &str) -> Following {
    let url = url.to_owned();
    Following(tokio::spawn(async move {
        receiver.follow(&url).await.unwrap_err()
    }))
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("hung")
}

async fn converged(primary: &Primary, sink: &FakeSink, db: &str) {
    soon(sink.until_at(db, primary.source.pos(db))).await;
    assert_eq!(sink.pages(db), Some(primary.source.pages(db)));
}

#[tokio::test(flavor = "multi_thread")]
async fn catches_up_then_follows_live() {
    let primary = Primary::start().await;
    for n in 1..=20 {
        primary.source.commit("a", &[(1, n), (u32::from(n), n)]);
    }
    primary.source.commit("dir/b", &[(1, 1)]);
    let sink = FakeSink::new(2);
    let _following = follow(&sink, &primary.url());
    converged(&primary, &sink, "a").await;
    converged(&primary, &sink, "dir/b").await;
    assert!(sink.snapshots().is_empty());
    assert_eq!(*sink.cluster.lock(), Some(primary.source.cluster.clone()));
    assert_eq!(sink.epoch.load(Ordering::SeqCst), 1);
    assert_eq!(sink.primary().unwrap().hostname, "ams");
    for n in 1..=20 {
        primary.source.commit("a", &[(1, n)]);
        primary.source.commit("new", &[(1, n)]);
        converged(&primary, &sink, "a").await;
        converged(&primary, &sink, "new").await;
    }
    soon(sink.until_caught_up()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acks_reach_the_registry_and_durable_is_apart_from_visible() {
    let primary = Primary::start().await;
    primary.source.sync.lock().insert(name("sync"));
    let sink = FakeSink::new(2);
    let _following = follow(&sink, &primary.url());
    let lazy = primary.source.commit("lazy", &[(1, 1)]);
    let sync = primary.source.commit("sync", &[(1, 1)]);
    let expected = |replicas: &Replicas| {
        let acked = |db| {
            replicas
                .acked(&name(db))
                .first()
                .map(|a| (a.1.pos, a.1.durable))
        };
        acked("lazy") == Some((lazy, Pos::ZERO)) && acked("sync") == Some((sync, sync))
    };
    soon(async {
        while !expected(&primary.replicas) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(sink.applies("sync"), [(1, true)]);
    assert_eq!(sink.applies("lazy"), [(1, false)]);
    assert_eq!(primary.replicas.connected_count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_overlaps_the_position_is_taken() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    primary.source.commit("a", &[(1, 1)]);
    // One process: another with the same node id would be refused until the primary sees the first one gone.
    let receiver = receiver(&sink);
    let following = follow_with(Arc::clone(&receiver), &primary.url());
    converged(&primary, &sink, "a").await;
    drop(following);
    primary.source.commit("a", &[(2, 2)]);
    primary.source.commit("a", &[(1, 3)]);
    primary.source.compact("a");
    let _following = follow_with(receiver, &primary.url());
    converged(&primary, &sink, "a").await;
    assert!(sink.snapshots().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_retention_copies_pages_while_commits_go_on() {
    let limits = Limits {
        turn_bytes: 4 * PAGE,
        ..Limits::default()
    };
    let primary = Primary::with(SendConfig {
        limits,
        ..SendConfig::default()
    })
    .await;
    let all: Vec<(u32, u8)> = (1..=50).map(|n| (n, 7)).collect();
    primary.source.commit("a", &all);
    primary.source.forget_log("a");
    let mut n = 0;
    *primary.source.on_read_pages.lock() = Some(Box::new(move |source| {
        n += 1;
        // Pages already copied, pages to come, and growth.
        source.commit("a", &[(1, n), (40, n), (50 + u32::from(n), n)]);
    }));
    let sink = FakeSink::new(2);
    let following = follow(&sink, &primary.url());
    soon(async {
        while sink.pages("a").is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    *primary.source.on_read_pages.lock() = None;
    converged(&primary, &sink, "a").await;
    assert_eq!(sink.snapshots().len(), 1);
    assert!(!sink.snapshots()[0].is_difference);
    primary.source.commit("a", &[(3, 3)]);
    converged(&primary, &sink, "a").await;
    assert_eq!(sink.snapshots().len(), 1);
    drop(following);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_diverged_replica_comes_back_by_difference() {
    let primary = Primary::start().await;
    let all: Vec<(u32, u8)> = (1..=50).map(|n| (n, 7)).collect();
    primary.source.commit("a", &all);
    primary.source.commit("a", &[(9, 9)]);
    let mut theirs = primary.source.pages("a");
    theirs.insert(Pgno::new(5).unwrap(), page(99));
    let sink = FakeSink::new(2);
    sink.plant("a", 2, theirs);
    let _following = follow(&sink, &primary.url());
    converged(&primary, &sink, "a").await;
    assert!(sink.snapshots()[0].is_difference);
    assert_eq!(primary.source.pages_read.load(Ordering::SeqCst), 1);
}

/// What the log calls a continuation does not fit what the replica has: one try by log, then by pages.
#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_lies_is_found_out() {
    let primary = Primary::start().await;
    primary.source.commit("a", &[(1, 1)]);
    primary.source.commit("a", &[(2, 2)]);
    primary.source.compact("a");
    let sink = FakeSink::new(2);
    // Inside the compacted range, so the log cannot tell that the checksum is another.
    sink.plant("a", 1, [(Pgno::ONE, page(42))].into());
    sink.fail_applies(0);
    let _following = follow(&sink, &primary.url());
    converged(&primary, &sink, "a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_database_delays_no_other() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    sink.close_gate("slow");
    let _following = follow(&sink, &primary.url());
    // Far more than the window of one database.
    let writes: Vec<(u32, u8)> = (1..=2000).map(|n| (n, 1)).collect();
    for _ in 0..20 {
        primary.source.commit("slow", &writes);
    }
    soon(sink.until_waiting_at_gate("slow")).await;
    for n in 1..=50 {
        primary.source.commit("fast", &[(1, n)]);
        converged(&primary, &sink, "fast").await;
    }
    assert_eq!(sink.pages("slow"), None);
    sink.open_gate("slow");
    converged(&primary, &sink, "slow").await;
    let batches = sink.applies("slow");
    assert!(batches.iter().any(|(count, _)| *count > 1), "{batches:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_database_does_not_hold_up_the_next_connection() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    let receiver = receiver(&sink);
    sink.close_gate("slow");
    primary.source.commit("slow", &[(1, 1)]);
    let following = follow_with(Arc::clone(&receiver), &primary.url());
    soon(sink.until_waiting_at_gate("slow")).await;
    drop(following);
    let _following = follow_with(receiver, &primary.url());
    primary.source.commit("fast", &[(1, 1)]);
    converged(&primary, &sink, "fast").await;
    primary.source.commit("slow", &[(1, 2)]);
    sink.open_gate("slow");
    converged(&primary, &sink, "slow").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_disk_is_tried_again_and_reported() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    sink.fail_applies(5);
    primary.source.commit("a", &[(1, 1)]);
    let _following = follow(&sink, &primary.url());
    let is_stalled = || {
        let list = primary.replicas.list();
        let db = list.first().and_then(|r| r.dbs.get(&name("a")));
        db.is_some_and(|d| {
            d.stalled
                .as_ref()
                .is_some_and(|why| why.starts_with("write a: "))
        })
    };
    soon(async {
        while !is_stalled() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    converged(&primary, &sink, "a").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_larger_than_window_and_turn_arrives_whole() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    let writes: Vec<(u32, u8)> = (1..=40_000).map(|n| (n, 3)).collect();
    primary.source.commit("a", &writes);
    primary.source.commit("b", &writes);
    let _following = follow(&sink, &primary.url());
    converged(&primary, &sink, "a").await;
    converged(&primary, &sink, "b").await;
    assert!(sink.snapshots().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_database_is_dropped_and_may_come_back() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    primary.source.commit("a", &[(1, 1)]);
    let following = follow(&sink, &primary.url());
    converged(&primary, &sink, "a").await;
    primary.source.drop_db("a");
    soon(sink.until_dropped("a")).await;
    primary.source.commit("a", &[(1, 2)]);
    converged(&primary, &sink, "a").await;
    // Dropped while the replica was away.
    drop(following);
    primary.source.drop_db("a");
    let sink2 = FakeSink::new(3);
    sink2.plant("a", 1, [(Pgno::ONE, page(1))].into());
    let _following = follow(&sink2, &primary.url());
    soon(sink2.until_dropped("a")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_the_primary_never_heard_of_is_kept() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    sink.plant("mine", 4, [(Pgno::ONE, page(4))].into());
    let _following = follow(&sink, &primary.url());
    soon(sink.until_unknown("mine")).await;
    soon(sink.until_caught_up()).await;
    assert!(sink.pages("mine").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_databases_of_the_filter_come() {
    let primary = Primary::start().await;
    primary.source.commit("a", &[(1, 1)]);
    primary.source.commit("b", &[(1, 1)]);
    let sink = FakeSink::with_filter(2, &["b", "l?t*"]);
    let _following = follow(&sink, &primary.url());
    converged(&primary, &sink, "b").await;
    primary.source.commit("a", &[(1, 2)]);
    primary.source.commit("later", &[(1, 1)]);
    converged(&primary, &sink, "later").await;
    assert_eq!(sink.pages("a"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_cluster_stale_epoch_and_own_id_are_refused_with_reasons() {
    let primary = Primary::start().await;
    let refused = async |sink: Arc<FakeSink>| {
        let ended = receiver(&sink).follow(&primary.url()).await.unwrap_err();
        assert!(sink.primary().is_none());
        ended.to_string()
    };
    let sink = FakeSink::new(2);
    *sink.cluster.lock() = Some("LFSC00000000000000BB".to_owned());
    let why = refused(sink).await;
    assert!(
        why.contains("LFSC00000000000000AA") && why.contains("LFSC00000000000000BB"),
        "{why}"
    );

    let sink = FakeSink::new(2);
    sink.epoch.store(5, Ordering::SeqCst);
    let why = refused(sink).await;
    assert!(
        why.contains("epoch 1 is over: the replica has seen 5"),
        "{why}"
    );

    let why = refused(FakeSink::new(1)).await;
    assert!(why.contains("primary's own"), "{why}");

    let first = FakeSink::new(3);
    let _following = follow(&first, &primary.url());
    soon(first.until_caught_up()).await;
    let why = refused(FakeSink::new(3)).await;
    assert!(why.contains("in use by \"replica\""), "{why}");

    primary.source.epoch.store(0, Ordering::SeqCst);
    let why = refused(FakeSink::new(4)).await;
    assert!(
        why.contains("503") && why.contains("not the primary"),
        "{why}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenure_that_ends_closes_its_streams() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    let mut following = follow(&sink, &primary.url());
    soon(sink.until_caught_up()).await;
    primary.source.epoch.store(2, Ordering::SeqCst);
    primary.source.hub.publish(&name("a"));
    let why = soon(&mut following.0).await.unwrap().to_string();
    assert!(why.contains("tenure"), "{why}");
}

/// Fencing on the replica's side: a batch from an epoch it has left is refused by the store, and ends the stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_saw_a_higher_epoch_leaves() {
    let primary = Primary::start().await;
    let sink = FakeSink::new(2);
    let mut following = follow(&sink, &primary.url());
    soon(sink.until_caught_up()).await;
    sink.epoch.store(9, Ordering::SeqCst);
    primary.source.commit("a", &[(1, 1)]);
    let why = soon(&mut following.0).await.unwrap().to_string();
    assert_eq!(why, "stale epoch 1: already followed 9");
    assert_eq!(sink.pages("a"), None);
}

/// Upgrades one connection, says what it is told to, and then nothing.
async fn raw_primary(says: Vec<Message>) -> (String, JoinHandle<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut request = [0; 4096];
        let _ = tcp.read(&mut request).await.unwrap();
        let answer = "HTTP/1.1 101 Switching Protocols\r\n\
                      connection: upgrade\r\nupgrade: litefs-stream/1\r\n\r\n";
        tcp.write_all(answer.as_bytes()).await.unwrap();
        let mut wire = WireBuf::default();
        says.iter().for_each(|m| m.encode(0, &mut wire));
        tcp.write_all_buf(&mut wire).await.unwrap();
        tcp
    });
    (url, task)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_primary_is_left() {
    let (url, _held) = raw_primary(vec![]).await;
    let config = ReceiveConfig {
        silence: Duration::from_millis(50),
        ..ReceiveConfig::default()
    };
    let sink = Arc::new(SinkPort(FakeSink::new(2)));
    let receiver = Receiver::new(sink, Arc::new(HttpDial::default()), config);
    let ended = soon(receiver.follow(&url)).await.unwrap_err();
    let why = super::send::chain(&ended);
    assert!(why.contains("nothing received"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_checks_the_primary_too() {
    let welcome = |cluster: &str, node_id, epoch| {
        Message::Welcome(Welcome {
            cluster_id: cluster.to_owned(),
            node_id,
            hostname: "ams".to_owned(),
            epoch,
        })
    };
    let open = || Message::Open { db: name("a") };
    for (says, want) in [
        (
            vec![welcome("B", 1, 5)],
            "belongs to cluster B, this node to A",
        ),
        (vec![welcome("A", 2, 5)], "this node's own id"),
        (
            vec![welcome("A", 1, 4)],
            "stale epoch 4: already followed 5",
        ),
        (
            vec![Message::Alive],
            "unexpected Alive frame: Welcome is missing",
        ),
        (
            vec![welcome("A", 1, 5), Message::Alive],
            "stream id 0 is not open",
        ),
        (vec![welcome("A", 1, 5), open()], "a: stream id 0 after 0"),
    ] {
        let (url, _held) = raw_primary(says).await;
        let sink = FakeSink::new(2);
        *sink.cluster.lock() = Some("A".to_owned());
        sink.epoch.store(5, Ordering::SeqCst);
        let ended = soon(receiver(&sink).follow(&url)).await.unwrap_err();
        let why = super::send::chain(&ended);
        assert!(why.contains(want), "{why}");
        assert!(sink.primary().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_takes_no_bytes_is_left() {
    let primary = Primary::with(SendConfig {
        silence: Duration::from_secs(3600),
        write_stall: Duration::from_millis(50),
        ..SendConfig::default()
    })
    .await;
    let writes: Vec<(u32, u8)> = (1..=20_000).map(|n| (n, 1)).collect();
    for db in ["a", "b", "c", "d"] {
        primary.source.commit(db, &writes);
    }
    let dial = HttpDial::default();
    let url = primary.url();
    let mut conn = super::receive::Dial::dial(&dial, &url).await.unwrap();
    let hello = Message::Hello(Hello {
        cluster_id: None,
        node_id: 2,
        instance: 1,
        hostname: "deaf".to_owned(),
        epoch: 0,
        position_count: 0,
        filter_count: 0,
    });
    let mut wire = WireBuf::default();
    hello.encode(0, &mut wire);
    conn.write.write_all_buf(&mut wire).await.unwrap();
    soon(async {
        while primary.replicas.list().is_empty() || primary.replicas.connected_count() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_connects_again_and_follows_a_change_of_primary() {
    let (first, second) = (Primary::start().await, Primary::start().await);
    first.source.commit("a", &[(1, 1)]);
    let sink = FakeSink::new(2);
    let (target, targets) = tokio::sync::watch::channel(None);
    let running = tokio::spawn(receiver(&sink).run(targets));
    target.send_replace(Some(first.url()));
    converged(&first, &sink, "a").await;
    // A new tenure of the same node ends the stream; the next begins by itself.
    first.source.epoch.store(2, Ordering::SeqCst);
    first.source.commit("a", &[(1, 2)]);
    converged(&first, &sink, "a").await;
    assert_eq!(sink.epoch.load(Ordering::SeqCst), 2);
    second.source.epoch.store(3, Ordering::SeqCst);
    second.source.commit("a", &[(1, 9)]);
    second.source.commit("a", &[(2, 9)]);
    second.source.commit("a", &[(3, 9)]);
    target.send_replace(Some(second.url()));
    converged(&second, &sink, "a").await;
    drop(target);
    soon(running).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_databases() {
    let primary = Primary::start().await;
    for n in 0..1000 {
        primary.source.commit(&format!("db{n}"), &[(1, 1)]);
    }
    let sink = FakeSink::new(2);
    let _following = follow(&sink, &primary.url());
    for n in 0..1000 {
        converged(&primary, &sink, &format!("db{n}")).await;
    }
    for n in 0..1000 {
        primary.source.commit(&format!("db{n}"), &[(1, 2)]);
    }
    for n in 0..1000 {
        converged(&primary, &sink, &format!("db{n}")).await;
    }
}

/// Passes bytes on in both directions until `limit` of them went the way that is cut.
async fn relay(
    to: SocketAddr,
    cuts_replies: bool,
    limit: usize,
) -> (SocketAddr, JoinHandle<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(to).await.unwrap();
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        let (up, down) = match cuts_replies {
            true => (usize::MAX, limit),
            false => (limit, usize::MAX),
        };
        let up = pass(client_read, server_write, up);
        let down = pass(server_read, client_write, down);
        // Either end takes both with it.
        tokio::select! { n = up => n, n = down => n }
    });
    (address, task)
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    limit: usize,
) -> usize {
    let mut buf = vec![0; 4096];
    let mut passed = 0;
    while passed < limit {
        let want = buf.len().min(limit - passed);
        match from.read(&mut buf[..want]).await {
            Ok(n) if n > 0 && to.write_all(&buf[..n]).await.is_ok() => passed += n,
            _ => break,
        }
    }
    passed
}

/// Cuts the stream after n bytes, for every n of a session with a difference, records and acks, then lets it
/// connect again with what it has: it must end where the primary is.
async fn cut_everywhere(cuts_replies: bool) {
    let limits = Limits {
        turn_bytes: PAGE,
        ..Limits::default()
    };
    let primary = Primary::with(SendConfig {
        limits,
        ..SendConfig::default()
    })
    .await;
    primary
        .source
        .commit("copied", &[(1, 1), (2, 2), (3, 3), (4, 4)]);
    primary.source.forget_log("copied");
    primary.source.commit("copied", &[(2, 5)]);
    primary.source.commit("logged", &[(1, 1)]);
    primary.source.commit("logged", &[(1, 2), (2, 2)]);
    let mut resumed = 0;
    let mut length = 0;
    for limit in 0.. {
        // Another identity each time: the primary may not have noticed yet that the one before is gone.
        let sink = FakeSink::new(2 + limit as u64);
        let receiver = receiver(&sink);
        let (relay_address, relaying) = relay(primary.address, cuts_replies, limit).await;
        let first = follow_with(Arc::clone(&receiver), &format!("http://{relay_address}"));
        let both_there = async {
            sink.until_at("copied", primary.source.pos("copied")).await;
            sink.until_at("logged", primary.source.pos("logged")).await;
        };
        let cut = soon(async {
            tokio::select! {
                cut = relaying => Some(cut.unwrap()),
                () = both_there => None,
            }
        })
        .await;
        drop(first);
        if cut.is_none() {
            length = limit;
            break;
        }
        let mut second = follow_with(receiver, &primary.url());
        let both = async {
            converged(&primary, &sink, "copied").await;
            converged(&primary, &sink, "logged").await;
        };
        tokio::select! {
            () = both => {}
            ended = &mut second.0 => panic!("cut after {limit}: {}", ended.unwrap()),
        }
        let starts = sink.snapshots();
        resumed += usize::from(starts.iter().any(|s| s.next > Pgno::ONE));
    }
    // Acks that come together are one: how long the session is depends on the machine.
    assert!(length > 200, "the session was cut in only {length} places");
    if cuts_replies {
        assert!(length > 4 * PAGE, "the pages were never cut");
        assert!(resumed > 0, "no cut led to a resumed copy");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_at_every_byte_from_the_primary() {
    cut_everywhere(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_at_every_byte_from_the_replica() {
    cut_everywhere(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_bytes_after_the_upgrade_are_refused_and_the_server_lives() {
    let primary = Primary::start().await;
    for garbage in [&[0xff; 4096][..], &[0; 4096][..], b"GET / HTTP/1.1\r\n\r\n"] {
        let dial = HttpDial::default();
        let url = primary.url();
        let mut conn = super::receive::Dial::dial(&dial, &url).await.unwrap();
        conn.write.write_all(garbage).await.unwrap();
        let mut answer = Vec::new();
        let _ = soon(conn.read.read_to_end(&mut answer)).await;
        assert!(
            answer.len() > 12 && answer[4] == 33,
            "a Refuse frame: {answer:?}"
        );
    }
    primary.source.commit("a", &[(1, 1)]);
    let sink = FakeSink::new(2);
    let _following = follow(&sink, &primary.url());
    converged(&primary, &sink, "a").await;
}

/// One request over a plain socket; the answer with its head.
async fn http(primary: &Primary, request: &str) -> String {
    let mut tcp = TcpStream::connect(primary.address).await.unwrap();
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon(tcp.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

async fn get(primary: &Primary, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    http(primary, &request).await
}

#[tokio::test(flavor = "multi_thread")]
async fn http_routes() {
    let primary = Primary::start().await;
    primary.source.commit("a", &[(1, 65), (2, 66)]);
    let sink = FakeSink::new(2);
    let _following = follow(&sink, &primary.url());
    converged(&primary, &sink, "a").await;

    let info = get(&primary, "/info").await;
    assert!(info.starts_with("HTTP/1.1 200"), "{info}");
    assert!(info.contains("litefs-id: 0000000000000001"), "{info}");
    let json = r#"{"clusterID":"LFSC00000000000000AA","isPrimary":true,"candidate":true,"path":"/litefs","ready":true}"#;
    assert!(info.ends_with(json), "{info}");

    let export = get(&primary, "/export?name=a").await;
    assert!(export.contains("content-length: 1024"), "{export}");
    assert!(export.ends_with(&"B".repeat(512)), "{export}");
    let missing = get(&primary, "/export?name=zzz").await;
    assert!(missing.starts_with("HTTP/1.1 404"), "{missing}");
    assert!(
        missing.contains(r#""action":"list the databases"#),
        "{missing}"
    );
    let unnamed = get(&primary, "/export").await;
    assert!(unnamed.starts_with("HTTP/1.1 400"), "{unnamed}");
    let outside = get(&primary, "/export?name=../etc/passwd").await;
    assert!(outside.starts_with("HTTP/1.1 400"), "{outside}");

    let import = "POST /import?name=b HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\nconnection: close\r\n\r\nzzz";
    let imported = http(&primary, import).await;
    assert!(
        imported.contains(r#""txid":"0000000000000001""#),
        "{imported}"
    );
    converged(&primary, &sink, "b").await;

    let acked = "litefs_replica_db_txid{node=\"replica\",db=\"a\"}";
    let metrics = soon(async {
        loop {
            let metrics = get(&primary, "/metrics").await;
            if metrics.contains(acked) {
                return metrics;
            }
        }
    })
    .await;
    assert!(
        metrics.contains("\nlitefs_subscriber_count 1\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("\nlitefs_db_txid{db=\"a\"} 1\n"),
        "{metrics}"
    );
    let vars = get(&primary, "/debug/vars").await;
    assert!(
        vars.contains(&primary.source.pos("a").post_apply_checksum.to_string()),
        "{vars}"
    );

    let no_upgrade = "POST /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let refused = http(&primary, no_upgrade).await;
    assert!(refused.starts_with("HTTP/1.1 426"), "{refused}");
    assert!(refused.contains("upgrade: litefs-stream/1"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_begin_with_init() {
    let primary = Primary::start().await;
    let mut tcp = TcpStream::connect(primary.address).await.unwrap();
    tcp.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut seen = String::new();
    let mut buf = [0; 4096];
    soon(async {
        while !seen.contains("\"type\":\"init\"") {
            let n = tcp.read(&mut buf).await.unwrap();
            seen.push_str(std::str::from_utf8(&buf[..n]).unwrap());
        }
        let change = Event::PrimaryChange {
            is_primary: false,
            hostname: Some("fra".to_owned()),
        };
        primary.events.send(change).unwrap();
        while !seen.contains("\"type\":\"primaryChange\"") {
            let n = tcp.read(&mut buf).await.unwrap();
            seen.push_str(std::str::from_utf8(&buf[..n]).unwrap());
        }
    })
    .await;
    assert!(
        seen.contains(r#"{"data":{"hostname":"fra","isPrimary":false},"type":"primaryChange"}"#)
    );
}
