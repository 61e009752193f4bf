//! Faults that are not crashes: damaged bytes on disk and on the wire, peers that lie, replicas left behind, and data
//! directories that do not belong together.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rusqlite::Connection;

use crate::harness::{Node, Options, assert_same, cannot_mount, wait_for};

/// Small enough that a second of writing leaves a stopped replica behind.
const LITTLE_LOG: &str =
    ", retention: 100ms, retention-size: 64KiB, segment-size: 64KiB, compress: false";

fn create(node: &Node, name: &str) -> Connection {
    let db = node.open(name);
    db.query_row("PRAGMA journal_mode=wal", [], |_| Ok(()))
        .unwrap();
    db.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB)")
        .unwrap();
    db
}

/// Adds rows of random bytes, each in a transaction of its own.
fn add(db: &Connection, rows: usize, bytes: usize) {
    for _ in 0..rows {
        db.execute(
            "INSERT INTO t(v) VALUES(randomblob(?))",
            [i64::try_from(bytes).unwrap()],
        )
        .unwrap();
    }
}

fn count(db: &Connection) -> i64 {
    db.query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap()
}

fn no_panic(nodes: &[&Node]) {
    for node in nodes {
        let log = node.log();
        assert!(!log.contains("panicked"), "{log}");
    }
}

fn txid(node: &Node, name: &str) -> u64 {
    let pos = node.pos(name).unwrap();
    u64::from_str_radix(pos.split('/').next().unwrap(), 16).unwrap()
}

/// Files of a directory whose names end so, oldest first.
/// Returns the whole databases that are kept of histories that lost.
fn databases(dir: &Path) -> Vec<PathBuf> {
    let entries = files(dir, "").into_iter();
    entries
        .map(|entry| entry.join("database.db"))
        .filter(|path| path.is_file())
        .collect()
}

fn files(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .map(|e| e.unwrap().path())
        .filter(|p| p.to_str().unwrap().ends_with(suffix))
        .collect();
    found.sort();
    found
}

/// The first TXID that the files of a log have.
fn oldest_in_log(meta: &Path) -> u64 {
    let sealed = files(&meta.join("ltx"), ".ltx").into_iter();
    let all = sealed.chain(files(&meta.join("log"), ".seg"));
    let first = |path: PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        u64::from_str_radix(&name[..16], 16).unwrap()
    };
    all.map(first).min().unwrap_or(0)
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn flip_middle(path: &Path) {
    flip(path, fs::metadata(path).unwrap().len() / 2);
}

// ---- a replica that was away

#[test]
fn a_replica_behind_the_log_gets_the_difference_beside_its_readers() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        data_keys: LITTLE_LOG.into(),
        ..Options::default()
    };
    let primary = Node::primary_with(dir.path(), options.clone());
    // The stream comes through a relay, which holds it back until the reader has its snapshot.
    let relay = Relay::start(primary.port, |_| Fate::Pass);
    let mut replica = Node::replica_of_port(dir.path(), "replica", relay.port, Options::default());
    replica.launch();
    let names = ["wal.db", "delete.db"];
    let writers = names.map(|name| create(&primary, name));
    writers[1]
        .query_row("PRAGMA journal_mode=delete", [], |_| Ok(()))
        .unwrap();
    for (name, db) in names.iter().zip(&writers) {
        add(db, 100, 3000);
        assert_same(&primary, &replica, name);
    }
    let was = names.map(|name| txid(&replica, name));
    replica.stop();
    relay.close();
    for (db, name) in writers.iter().zip(names) {
        db.execute_batch("UPDATE t SET v=randomblob(3000) WHERE id%5=0")
            .unwrap();
        add(db, 200, 3000);
        let meta = primary.meta(name);
        let was = was[names.iter().position(|n| *n == name).unwrap()];
        wait_for("the log to forget where the replica was", || {
            oldest_in_log(&meta) > was + 1
        });
    }
    replica.spawn();
    wait_for("the mount", || replica.log().contains(": mounted "));
    let readers = names.map(|name| {
        let db = replica.open(name);
        db.execute_batch("BEGIN").unwrap();
        assert_eq!(count(&db), 100);
        db
    });
    // A reader in a rollback mode holds SQLite's shared lock: nothing can be written under it.
    readers[1].execute_batch("COMMIT").unwrap();
    relay.open();
    replica.wait_until_ready();
    let copies = replica.log().matches("page copy is in place").count();
    assert_eq!(copies, 2, "{}", replica.log());
    assert!(replica.log().contains("difference=true"));
    for name in names {
        assert_same(&primary, &replica, name);
    }
    assert_eq!(count(&readers[0]), 100, "the snapshot stays");
    readers[0].execute_batch("COMMIT").unwrap();
    for reader in &readers {
        assert_eq!(count(reader), 300);
    }
    no_panic(&[&primary, &replica]);
}

// ---- the wire

/// What a relay does with one connection, counted in bytes that the primary sent.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Pass,
    /// Closes after so many.
    Cut(usize),
    /// Keeps the connection, and sends nothing more.
    Stall(usize),
    /// Flips a bit of one.
    Corrupt(usize),
    /// Puts these in.
    Inject(usize, &'static [u8]),
    /// Waits between pieces.
    Slow(Duration),
}

/// Stands between a replica and its primary.
struct Relay {
    port: u16,
    is_open: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
}

impl Relay {
    fn start(to: u16, fate: impl Fn(usize) -> Fate + Send + 'static) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay {
            port: listener.local_addr().unwrap().port(),
            is_open: Arc::new(AtomicBool::new(true)),
            connections: Arc::default(),
        };
        let (is_open, connections) = (relay.is_open.clone(), relay.connections.clone());
        std::thread::spawn(move || {
            for replica in listener.incoming() {
                let Ok(replica) = replica else { return };
                if !is_open.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(primary) = TcpStream::connect(("127.0.0.1", to)) else {
                    continue;
                };
                let fate = fate(connections.fetch_add(1, Ordering::SeqCst));
                let (from, into) = (replica.try_clone().unwrap(), primary.try_clone().unwrap());
                std::thread::spawn(move || pass(from, into, Fate::Pass));
                std::thread::spawn(move || pass(primary, replica, fate));
            }
        });
        relay
    }

    fn close(&self) {
        self.is_open.store(false, Ordering::SeqCst);
    }

    fn open(&self) {
        self.is_open.store(true, Ordering::SeqCst);
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Copies until either side ends; then both do.
fn pass(mut from: TcpStream, mut into: TcpStream, fate: Fate) {
    let mut buffer = vec![0; 64 << 10];
    let mut done = 0;
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let range = done..done + n;
        let sent = match fate {
            Fate::Cut(at) if range.contains(&at) => {
                let _ = into.write_all(&buffer[..at - done]);
                break;
            }
            Fate::Stall(at) if range.contains(&at) => {
                let _ = into.write_all(&buffer[..at - done]);
                // Until the replica has had enough and closes: the other direction then ends this one.
                while let Ok(1..) = from.read(&mut buffer) {}
                break;
            }
            Fate::Corrupt(at) if range.contains(&at) => {
                buffer[at - done] ^= 4;
                into.write_all(&buffer[..n])
            }
            Fate::Inject(at, bytes) if range.contains(&at) => into
                .write_all(&buffer[..at - done])
                .and_then(|()| into.write_all(bytes))
                .and_then(|()| into.write_all(&buffer[at - done..n])),
            Fate::Slow(delay) => {
                std::thread::sleep(delay);
                into.write_all(&buffer[..n])
            }
            _ => into.write_all(&buffer[..n]),
        };
        if sent.is_err() {
            break;
        }
        done += n;
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = into.shutdown(Shutdown::Both);
}

/// A new replica comes through a relay that gives each connection a fate, while the primary writes on.
fn through(fates: &'static [Fate]) {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    // Big enough for a page copy: its log does not begin at the beginning.
    let big = create(&primary, "big.db");
    add(&big, 40, 100_000);
    let small = create(&primary, "small.db");
    let relay = Relay::start(primary.port, |n| *fates.get(n).unwrap_or(&Fate::Pass));
    let options = Options {
        keys: "skip-sync: true\n".into(),
        ..Options::default()
    };
    let mut replica = Node::replica_of_port(dir.path(), "replica", relay.port, options);
    replica.launch();
    let mut done = 0;
    wait_for("every connection to meet its fate", || {
        // Those that strike late in a connection need bytes to strike.
        add(&big, 1, 50_000);
        add(&small, 3, 200);
        done = done.max(relay.connections());
        done > fates.len()
    });
    add(&small, 1, 10);
    for name in ["big.db", "small.db"] {
        assert_same(&primary, &replica, name);
    }
    no_panic(&[&primary, &replica]);
    let log = replica.log();
    let broken = log.matches("stream ended, connecting again").count();
    assert!(broken >= fates.len(), "{broken} of {}\n{log}", fates.len());
}

#[test]
fn a_stream_cut_anywhere_goes_on() {
    if cannot_mount() {
        return;
    }
    through(&[
        Fate::Cut(0),
        Fate::Cut(1),
        Fate::Cut(90),
        Fate::Cut(130),
        Fate::Cut(171),
        Fate::Cut(260),
        Fate::Cut(301),
        Fate::Cut(5_000),
        Fate::Cut(70_001),
        Fate::Cut(300_007),
        Fate::Cut(1_000_003),
        Fate::Cut(1_500_000),
        Fate::Cut(262_144),
        Fate::Cut(700_000),
    ]);
}

#[test]
fn a_byte_that_changed_on_the_way_is_noticed_and_nothing_of_it_applied() {
    if cannot_mount() {
        return;
    }
    through(&[
        // The answer to the upgrade has no checksum; what follows has.
        Fate::Corrupt(240),
        Fate::Corrupt(260),
        Fate::Corrupt(310),
        Fate::Corrupt(4_000),
        Fate::Corrupt(100_000),
        Fate::Corrupt(500_000),
        Fate::Corrupt(1_200_000),
    ]);
}

#[test]
fn a_stream_that_stalls_or_crawls_goes_on() {
    if cannot_mount() {
        return;
    }
    static FATES: &[Fate] = &[Fate::Stall(400_000)];
    through(FATES);
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let db = create(&primary, "a.db");
    add(&db, 20, 100_000);
    let relay = Relay::start(primary.port, |_| Fate::Slow(Duration::from_millis(20)));
    let mut replica = Node::replica_of_port(dir.path(), "replica", relay.port, Options::default());
    replica.launch();
    for _ in 0..5 {
        add(&db, 5, 20_000);
        assert_same(&primary, &replica, "a.db");
    }
    no_panic(&[&primary, &replica]);
    assert_eq!(relay.connections(), 1, "slow is not broken");
}

/// A header that announces 4 GiB, then one of a bulk kind that announces the most there may be, then noise.
const HUGE: &[u8] = b"\xff\xff\xff\xff\x23\x00\x01\x00\x00\x00\x00\x00";
const LONG_BULK: &[u8] = b"\xf4\xff\xff\x00\x27\x00\x01\x00\x00\x00\x00\x00";
const NOISE: &[u8] = b"\x00\x01\x02 not a frame at all \xfe\xff HTTP/1.1 200 OK\r\n\r\n";

fn resident_mib(node: &Node) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        / 1024
}

#[test]
fn a_hostile_primary_harms_nothing() {
    if cannot_mount() {
        return;
    }
    through(&[
        Fate::Inject(0, NOISE),
        Fate::Inject(0, HUGE),
        Fate::Inject(300, HUGE),
        Fate::Inject(300, LONG_BULK),
        Fate::Inject(300, NOISE),
        Fate::Inject(300_000, HUGE),
        Fate::Inject(300_000, NOISE),
    ]);
}

#[test]
fn hostile_clients_harm_nothing() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = create(&primary, "a.db");
    let upgrade = b"POST /stream HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\n\
                    Upgrade: litefs-stream/1\r\n\r\n";
    let with = |bytes: &[u8]| [&upgrade[..], bytes].concat();
    let import = b"POST /import?name=a.db HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551615\r\n\r\n";
    let long_line = [b"GET /", &[b'a'; 1 << 20][..]].concat();
    let attacks: Vec<Vec<u8>> = vec![
        NOISE.to_vec(),
        vec![0; 100_000],
        vec![0xff; 100_000],
        long_line,
        b"GET /export?name=../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        [&import[..], &[0x5a; 100_000]].concat(),
        b"POST /stream HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        with(NOISE),
        with(HUGE),
        with(LONG_BULK),
        with(&[0; 4096]),
        with(&[0xff; 4096]),
    ];
    let before = [resident_mib(&primary), resident_mib(&replica)];
    let mut open = Vec::new();
    for _ in 0..3 {
        for bytes in &attacks {
            for node in [&primary, &replica] {
                let mut stream = TcpStream::connect(("127.0.0.1", node.port)).unwrap();
                let _ = stream.write_all(bytes);
                open.push(stream);
            }
            add(&db, 3, 100);
        }
    }
    assert_same(&primary, &replica, "a.db");
    for (node, before) in [&primary, &replica].into_iter().zip(before) {
        let now = resident_mib(node);
        assert!(now < before + 100, "{before} MiB, then {now}");
    }
    drop(open);
    assert_eq!(count(&db), i64::try_from(9 * attacks.len()).unwrap());
    assert_same(&primary, &replica, "a.db");
    no_panic(&[&primary, &replica]);
}

// ---- the disk

/// A primary and a replica of one database, with a log of sealed files and segments.
struct Pair {
    _dir: tempfile::TempDir,
    primary: Node,
    replica: Node,
    rows: i64,
    txid: u64,
}

const NAME: &str = "dir/a.db";

impl Pair {
    fn new(mode: &str) -> Pair {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            data_keys: ", segment-size: 64KiB, retain-without-replicas: true, compress: false"
                .into(),
            ..Options::default()
        };
        let primary = Node::primary_with(dir.path(), options.clone());
        let replica = Node::replica_with(dir.path(), "replica", &primary, options);
        fs::create_dir(primary.path("dir")).unwrap();
        let db = create(&primary, NAME);
        db.query_row(&format!("PRAGMA journal_mode={mode}"), [], |_| Ok(()))
            .unwrap();
        add(&db, 150, 3000);
        assert_same(&primary, &replica, NAME);
        for node in [&primary, &replica] {
            wait_for("a sealed file", || {
                !files(&node.meta(NAME).join("ltx"), ".ltx").is_empty()
            });
        }
        add(&db, 10, 1000);
        assert_same(&primary, &replica, NAME);
        let txid = txid(&primary, NAME);
        Pair {
            _dir: dir,
            primary,
            replica,
            rows: 160,
            txid,
        }
    }

    fn node(&self, on_primary: bool) -> &Node {
        match on_primary {
            true => &self.primary,
            false => &self.replica,
        }
    }

    fn stop(&mut self, is_killed: bool) {
        for node in [&mut self.replica, &mut self.primary] {
            match is_killed {
                true => node.kill(),
                false => node.stop(),
            }
        }
    }

    /// Starts both, requires that nothing is lost and that they are the same, then that writes go on.
    fn check(&mut self, what: &str) {
        eprintln!("checking: {what}");
        self.primary.launch();
        self.replica.launch();
        let db = self.primary.open(NAME);
        assert_eq!(count(&db), self.rows, "{what}: acknowledged rows");
        assert_same(&self.primary, &self.replica, NAME);
        add(&db, 1, 100);
        self.rows += 1;
        assert_same(&self.primary, &self.replica, NAME);
        let txid = txid(&self.primary, NAME);
        assert!(txid > self.txid, "{what}: {txid} after {}", self.txid);
        self.txid = txid;
        no_panic(&[&self.primary, &self.replica]);
    }
}

/// Stops a pair in either way, damages something of either node, and requires that all is well afterwards, that the node
/// says what it found, and that what was damaged is kept.
fn damage(what: &str, mode: &str, harm: impl Fn(&Node), says: &[&str], kept: Option<&str>) {
    let mut pair = Pair::new(mode);
    let mut kept_before = [0, 0];
    for is_killed in [false, true] {
        for on_primary in [true, false] {
            let what = format!("{what}, {mode}, killed: {is_killed}, primary: {on_primary}");
            pair.stop(is_killed);
            harm(pair.node(on_primary));
            pair.check(&what);
            let node = pair.node(on_primary);
            let log = node.log();
            for words in says {
                assert!(log.contains(words), "{what}: no {words:?} in\n{log}");
            }
            if let Some(kept) = kept {
                let found = files(&node.meta(NAME).join("quarantine"), "").into_iter();
                let found = found.filter(|p| p.to_str().unwrap().contains(kept)).count();
                let before = &mut kept_before[usize::from(on_primary)];
                assert!(found > *before, "{what}: nothing kept aside");
                *before = found;
            }
        }
    }
}

#[test]
fn a_flipped_bit_in_the_log_is_healed_and_the_damaged_part_kept() {
    if cannot_mount() {
        return;
    }
    let harm = |node: &Node| {
        let segments = files(&node.meta(NAME).join("log"), ".seg");
        flip_middle(segments.last().unwrap());
    };
    for mode in ["wal", "delete"] {
        damage("log segment", mode, harm, &[".seg", "kept"], Some(".seg"));
    }
}

#[test]
fn flipped_bits_in_page_checksums_are_noticed() {
    if cannot_mount() {
        return;
    }
    let harm = |node: &Node| {
        for file in ["page-checksums.0", "page-checksums.1"] {
            let path = node.meta(NAME).join(file);
            if let Ok(mut bytes) = fs::read(&path) {
                let middle = bytes.len() / 2;
                // Damaged still if it was before.
                bytes[middle..middle + 4].copy_from_slice(b"bad!");
                fs::write(&path, bytes).unwrap();
            }
        }
    };
    for mode in ["wal", "delete"] {
        damage("page checksums", mode, harm, &["page-checksums"], None);
    }
}

#[test]
fn a_damaged_name_of_a_database_is_told_and_its_directory_kept() {
    if cannot_mount() {
        return;
    }
    let mut pair = Pair::new("wal");
    for on_primary in [true, false] {
        pair.stop(false);
        let meta = pair.node(on_primary).meta(NAME);
        // Not UTF-8 any more.
        let path = meta.join("name");
        let mut bytes = fs::read(&path).unwrap();
        bytes[2] = 0xff;
        fs::write(&path, bytes).unwrap();
        pair.check(&format!("name file, primary: {on_primary}"));
        let log = pair.node(on_primary).log();
        assert!(log.contains(path.to_str().unwrap()), "{log}");
        assert!(path.with_extension("damaged").exists());
        fs::remove_file(path.with_extension("damaged")).unwrap();
    }
}

#[test]
fn damaged_files_about_the_node_do_not_keep_it_from_starting() {
    if cannot_mount() {
        return;
    }
    for file in ["session", "epoch"] {
        let harm = |node: &Node| fs::write(node.data().join(file), b"\xff\xfe\x00{").unwrap();
        let path = format!("/{file}");
        damage(file, "wal", harm, &[&path], None);
    }
}

#[test]
fn a_damaged_database_file_is_healed_from_the_log_or_the_primary() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let mut pair = Pair::new(mode);
        for is_killed in [false, true] {
            // On a replica, a page that is in its log, and one that is not.
            for page in [3, 60] {
                pair.stop(is_killed);
                let path = pair.replica.data().join("files").join(NAME);
                flip(&path, page * 4096 + 100);
                pair.check(&format!(
                    "replica's page {page}, {mode}, killed: {is_killed}"
                ));
            }
        }
    }
}

#[test]
fn a_primary_notices_that_its_database_was_replaced_while_it_was_stopped() {
    if cannot_mount() {
        return;
    }
    for mode in ["wal", "delete"] {
        let mut pair = Pair::new(mode);
        pair.stop(false);
        // As from a backup, with plain SQLite and beside the mount.
        let path = pair.primary.data().join("files").join(NAME);
        let other = path.with_extension("other");
        fs::copy(&path, &other).unwrap();
        let db = Connection::open(&other).unwrap();
        db.execute_batch("DELETE FROM t WHERE id>100; PRAGMA wal_checkpoint(TRUNCATE)")
            .unwrap();
        drop(db);
        fs::remove_file(&path).unwrap();
        fs::copy(&other, &path).unwrap();
        fs::remove_file(&other).unwrap();
        pair.rows = 100;
        pair.check("a database from a backup");
    }
}

#[test]
fn a_damaged_sealed_file_is_replaced_by_a_page_copy() {
    if cannot_mount() {
        return;
    }
    let mut pair = Pair::new("wal");
    for restart_primary in [false, true] {
        let was = txid(&pair.replica, NAME);
        pair.replica.stop();
        let meta = pair.primary.meta(NAME);
        let db = pair.primary.open(NAME);
        let first = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap();
            u64::from_str_radix(&name[..16], 16).unwrap()
        };
        let lacking = || -> Vec<PathBuf> {
            let sealed = files(&meta.join("ltx"), ".ltx").into_iter();
            sealed.filter(|path| first(path) > was).collect()
        };
        let before = pair.rows;
        // More than the primary keeps in memory, so that the file is what it reads.
        wait_for("sealed files that the replica has not", || {
            add(&db, 20, 3000);
            pair.rows += 20;
            pair.rows - before > 800 && lacking().len() >= 3
        });
        drop(db);
        if restart_primary {
            pair.primary.stop();
        }
        let bad = &lacking()[0];
        flip_middle(bad);
        let bytes = fs::read(bad).unwrap();
        if restart_primary {
            pair.primary.launch();
        }
        pair.replica.launch();
        assert_same(&pair.primary, &pair.replica, NAME);
        let log = pair.primary.log();
        let name = bad.file_name().unwrap();
        assert!(log.contains(name.to_str().unwrap()), "{log}");
        let kept = meta.join("quarantine").join(name);
        let kept = fs::read(bad).or_else(|_| fs::read(kept)).unwrap();
        assert!(kept == bytes, "the damaged file is kept");
        pair.stop(false);
        pair.check("after a damaged sealed file");
    }
}

// ---- nodes that do not belong together

#[test]
fn another_cluster_is_refused_and_says_so() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    add(&create(&primary, "a.db"), 5, 100);
    assert_same(&primary, &replica, "a.db");
    let was = replica.pos("a.db");
    // The primary's disk is lost: what comes up under its address knows nothing, and belongs to nobody.
    primary.stop();
    fs::remove_dir_all(primary.data()).unwrap();
    primary.launch();
    add(&create(&primary, "a.db"), 50, 100);
    wait_for("a refusal", || {
        replica
            .log()
            .contains("start it on an empty data directory")
    });
    let kept = |replica: &Node| {
        assert_eq!(replica.pos("a.db"), was);
        assert_eq!(count(&replica.open("a.db")), 5, "the copy is kept");
    };
    kept(&replica);
    // The same for a replica that starts now: it serves what it has to programs that do not wait for a primary.
    replica.stop();
    replica.options.keys = "skip-sync: true\n".into();
    replica.launch();
    wait_for("a refusal", || {
        replica
            .log()
            .contains("start it on an empty data directory")
    });
    kept(&replica);
    no_panic(&[&primary, &replica]);
}

#[test]
fn a_primary_that_lost_its_databases_does_not_take_them_from_replicas() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    for name in ["a.db", "b.db"] {
        add(&create(&primary, name), 5, 100);
        assert_same(&primary, &replica, name);
    }
    primary.stop();
    // All but the identity of the cluster.
    for lost in ["files", "dbs"] {
        fs::remove_dir_all(primary.data().join(lost)).unwrap();
    }
    primary.launch();
    wait_for("the replica to say what it keeps", || {
        let log = replica.log();
        log.matches("the primary has never heard of this database")
            .count()
            >= 2
    });
    assert_eq!(count(&replica.open("a.db")), 5);
    // A new one of the same name: the primary wins, and what the replica had is kept aside, whole.
    add(&create(&primary, "a.db"), 7, 100);
    assert_same(&primary, &replica, "a.db");
    assert_eq!(count(&replica.open("a.db")), 7);
    assert_eq!(count(&replica.open("b.db")), 5);
    let log = replica.log();
    assert!(log.contains("kept in"), "{log}");
    let kept = databases(&replica.meta("a.db").join("lost"));
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(count(&Connection::open(&kept[0]).unwrap()), 5);
    replica.stop();
    replica.launch();
    assert_same(&primary, &replica, "a.db");
    assert_eq!(count(&replica.open("b.db")), 5);
}

#[test]
fn what_a_node_wrote_while_it_was_primary_is_kept_when_it_follows_another() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Its log does not tell any more that the other wrote something else.
    let options = Options {
        data_keys: LITTLE_LOG.into(),
        ..Options::default()
    };
    let mut primary = Node::primary_with(dir.path(), options);
    let mut other = Node::replica(dir.path(), "other", &primary, "");
    add(&create(&primary, "a.db"), 5, 100);
    assert_same(&primary, &other, "a.db");
    // By hand: the replica becomes primary and writes, then goes back to what it was. Meanwhile the old primary wrote too,
    // more, so that its numbers are higher.
    other.stop();
    let data = other.data();
    let mut promoted = Node::primary_with(
        &dir.path().join("promoted"),
        Options {
            data: Some(data),
            ..Options::default()
        },
    );
    add(&promoted.open("a.db"), 2, 100);
    assert_eq!(count(&promoted.open("a.db")), 7);
    promoted.stop();
    let db = primary.open("a.db");
    let meta = primary.meta("a.db");
    wait_for("the log to forget where they parted", || {
        add(&db, 20, 3000);
        oldest_in_log(&meta) > 20
    });
    drop(db);
    other.launch();
    assert_same(&primary, &other, "a.db");
    let log = other.log();
    assert!(log.contains("kept in"), "{log}");
    let kept = databases(&other.meta("a.db").join("lost"));
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(count(&Connection::open(&kept[0]).unwrap()), 7);
    // Once: what comes later is the primary's history, and nothing of ours is in it.
    primary.stop();
    other.stop();
    primary.launch();
    other.launch();
    assert_same(&primary, &other, "a.db");
    assert_eq!(databases(&other.meta("a.db").join("lost")), kept);
}

#[test]
fn a_replica_whose_primary_is_down_serves_what_it_has() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(dir.path(), "");
    let mut replica = Node::replica(dir.path(), "replica", &primary, "");
    let db = create(&primary, "a.db");
    add(&db, 5, 100);
    assert_same(&primary, &replica, "a.db");
    drop(db);
    replica.stop();
    primary.stop();
    replica.spawn();
    wait_for("the mount", || replica.log().contains(": mounted "));
    assert_eq!(count(&replica.open("a.db")), 5);
    wait_for("a warning", || {
        let log = replica.log();
        log.contains("connecting again") && log.contains(&primary.port.to_string())
    });
    assert!(!replica.log().contains(": ready "), "{}", replica.log());
    primary.launch();
    replica.wait_until_ready();
    add(&primary.open("a.db"), 5, 100);
    assert_same(&primary, &replica, "a.db");
}

// ---- a part of the databases

#[test]
fn a_replica_follows_the_databases_that_its_patterns_name() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let options = Options {
        lease_keys: ", databases: [app.db, \"tenants/*.db\", \"**/x?.db\"]".into(),
        ..Options::default()
    };
    for dir in ["tenants/deep", "a/b"] {
        fs::create_dir_all(primary.path(dir)).unwrap();
    }
    let taken = ["app.db", "tenants/1.db", "a/b/x1.db"];
    let left = ["other.db", "tenants/deep/1.db", "a/b/x10.db", "x.db"];
    for name in left.iter().chain(&taken) {
        add(&create(&primary, name), 2, 100);
    }
    let replica = Node::replica_with(dir.path(), "replica", &primary, options);
    for name in taken {
        assert_same(&primary, &replica, name);
    }
    // Databases that come later, after others that are not wanted.
    for name in ["tenants/2.txt", "tenants/2.db"] {
        add(&create(&primary, name), 2, 100);
    }
    for name in left {
        add(&primary.open(name), 1, 100);
    }
    assert_same(&primary, &replica, "tenants/2.db");
    for name in left.iter().chain(&["tenants/2.txt"]) {
        assert!(!replica.path(name).exists(), "{name}");
    }
}
