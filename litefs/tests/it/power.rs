//! Power cuts and full disks, on an ext4 image.
//!
//! A cut is ext4's own: the file system forgets what was not synced, as it would with the machine, and lets nobody in
//! until it is mounted again and its journal replayed.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::harness::{Node, Options, PATIENCE, assert_same, cannot_mount, first_in_log, wait_for};

/// A file system in a file.
pub(crate) struct Image {
    pub(crate) at: PathBuf,
    device: String,
}

impl Image {
    /// Makes and mounts an image; says why there is none, if so.
    pub(crate) fn new(dir: &Path, name: &str, mib: u64) -> Option<Image> {
        let file = dir.join(format!("{name}.img"));
        File::create(&file).unwrap().set_len(mib << 20).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "0"])
            .arg(&file)
            .output();
        if !made.is_ok_and(|o| o.status.success()) {
            eprintln!("skipped: no mkfs.ext4");
            return None;
        }
        let attached = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&file)
            .output();
        let device = match attached {
            Ok(o) if o.status.success() => String::from_utf8(o.stdout).unwrap().trim().to_owned(),
            _ => {
                eprintln!("skipped: no losetup, or no loop device is free");
                return None;
            }
        };
        let at = dir.join(name);
        fs::create_dir(&at).unwrap();
        let image = Image { at, device };
        image.mount();
        Some(image)
    }

    fn mount(&self) {
        let done = Command::new("mount")
            .args(["-t", "ext4", &self.device])
            .arg(&self.at)
            .status();
        assert!(done.unwrap().success(), "mount {}", self.device);
    }

    fn try_unmount(&self) -> bool {
        let done = Command::new("umount").arg(&self.at).output();
        done.unwrap().status.success()
    }

    /// Drops everything that was not synced; from now on every operation fails.
    pub(crate) fn cut(&self) {
        const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
        let no_log_flush: u32 = 2;
        let dir = File::open(&self.at).unwrap();
        // SAFETY: the descriptor is open, and the argument is a pointer to a u32.
        let done =
            unsafe { libc::ioctl(dir.as_raw_fd(), EXT4_IOC_SHUTDOWN, &raw const no_log_flush) };
        assert_eq!(done, 0, "cut: {}", std::io::Error::last_os_error());
    }

    /// After a cut: the machine is up again.
    pub(crate) fn come_back(&self) {
        wait_for("the image to be free", || self.try_unmount());
        self.mount();
    }

    /// Takes all free space but `left` bytes.
    fn fill(&self, left: u64) {
        let mut ballast = File::create(self.at.join("ballast")).unwrap();
        let chunk = vec![7; 64 << 10];
        loop {
            match ballast.write(&chunk) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::StorageFull => break,
                Err(e) => panic!("fill: {e}"),
            }
        }
        ballast.sync_all().unwrap();
        let len = ballast.metadata().unwrap().len();
        ballast.set_len(len.saturating_sub(left)).unwrap();
        ballast.sync_all().unwrap();
    }

    fn free(&self) {
        fs::remove_file(self.at.join("ballast")).unwrap();
        // Blocks come back when the removal is committed.
        File::open(&self.at).unwrap().sync_all().unwrap();
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.try_unmount() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}

/// Small numbers from a seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// How a program writes.
#[derive(Debug, Clone, Copy)]
struct Mode {
    name: &'static str,
    journal: &'static str,
    synchronous: &'static str,
    /// How many of the last acknowledged commits SQLite itself does not promise to keep.
    may_lose: i64,
}

const fn mode(
    name: &'static str,
    journal: &'static str,
    synchronous: &'static str,
    may_lose: i64,
) -> Mode {
    Mode {
        name,
        journal,
        synchronous,
        may_lose,
    }
}

const MODES: [Mode; 6] = [
    mode("full.db", "wal", "full", 0),
    mode("normal.db", "wal", "normal", i64::MAX),
    mode("extra.db", "delete", "extra", 0),
    mode("delete.db", "delete", "full", 1),
    mode("truncate.db", "truncate", "full", 0),
    mode("persist.db", "persist", "full", 0),
];

/// What the writer of a database knows to be done.
#[derive(Debug, Default)]
struct Known {
    acknowledged: AtomicI64,
    /// Those before the cut began; what is acknowledged while it is made, the kernel may take back.
    before_cut: AtomicI64,
    checkpointed: AtomicI64,
}

/// What `s` holds after `n` transactions is told by `n` alone.
const SLOTS: i64 = 61;

fn connect(node: &Node, mode: &Mode) -> rusqlite::Result<Connection> {
    let db = Connection::open(node.path(mode.name))?;
    db.busy_timeout(PATIENCE)?;
    db.query_row(&format!("PRAGMA journal_mode={}", mode.journal), [], |_| {
        Ok(())
    })?;
    db.execute_batch(&format!("PRAGMA synchronous={}", mode.synchronous))?;
    Ok(db)
}

fn create(node: &Node, mode: &Mode) {
    let db = connect(node, mode).unwrap();
    db.execute_batch(
        "CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB);
         CREATE TABLE s(k INTEGER PRIMARY KEY, n INTEGER, v BLOB)",
    )
    .unwrap();
}

fn value(n: i64) -> Vec<u8> {
    let len = usize::try_from(n * 7919 % 6000).unwrap();
    vec![u8::try_from(n % 251).unwrap(); len]
}

/// One transaction: a row more, a slot replaced, another emptied.
fn step(db: &mut Connection, n: i64) -> rusqlite::Result<()> {
    let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    tx.execute(
        "INSERT INTO t VALUES(?1, ?2)",
        (n, &value(n)[..value(n).len().min(300)]),
    )?;
    tx.execute(
        "REPLACE INTO s VALUES(?1, ?2, ?3)",
        (n % SLOTS, n, value(n)),
    )?;
    tx.execute("DELETE FROM s WHERE k = ?1", [n * 31 % SLOTS])?;
    tx.commit()
}

/// Writes until something fails or it is told to stop.
fn write_on(
    mut db: Connection,
    mode: Mode,
    known: &Known,
    stop: &AtomicBool,
) -> rusqlite::Result<()> {
    let mut n = last(&db)?;
    while !stop.load(Ordering::Acquire) {
        n += 1;
        step(&mut db, n)?;
        known.acknowledged.store(n, Ordering::Release);
        if n % 8 == 0 {
            std::thread::sleep(Duration::from_millis(4)); // so that logs stay small
        }
        if mode.journal == "wal" && n % 150 == 0 {
            checkpoint(&db, known, n)?;
        }
    }
    Ok(())
}

fn checkpoint(db: &Connection, known: &Known, n: i64) -> rusqlite::Result<()> {
    let how = if n % 300 == 0 { "TRUNCATE" } else { "RESTART" };
    let busy: i64 = db.query_row(&format!("PRAGMA wal_checkpoint({how})"), [], |r| r.get(0))?;
    if busy == 0 {
        known.checkpointed.store(n, Ordering::Release);
    }
    Ok(())
}

fn last(db: &Connection) -> rusqlite::Result<i64> {
    db.query_row("SELECT coalesce(max(id), 0) FROM t", [], |r| r.get(0))
}

/// Requires that a database is what some number of transactions made of it, and returns that number.
fn check(node: &Node, mode: &Mode) -> i64 {
    let db = node.open(mode.name);
    let ok: String = db
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .unwrap();
    assert_eq!(ok, "ok", "{}", mode.name);
    let n = last(&db).unwrap();
    let count: i64 = db
        .query_row("SELECT count(*) FROM t", [], |r| r.get(0))
        .unwrap();
    assert_eq!(
        count, n,
        "{}: a transaction in the middle is missing",
        mode.name
    );
    let mut slots = std::collections::BTreeMap::new();
    for i in 1..=n {
        slots.insert(i % SLOTS, i);
        slots.remove(&(i * 31 % SLOTS));
    }
    let mut rows = db.prepare("SELECT k, n, v FROM s ORDER BY k").unwrap();
    let found: Vec<(i64, i64, Vec<u8>)> = rows
        .query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let wanted: Vec<(i64, i64, Vec<u8>)> =
        slots.into_iter().map(|(k, i)| (k, i, value(i))).collect();
    assert!(
        found == wanted,
        "{}: {n} transactions would leave something else",
        mode.name
    );
    n
}

/// Programs that write, one a database.
struct Writers {
    stop: Arc<AtomicBool>,
    known: Vec<(Mode, Arc<Known>)>,
    threads: Vec<JoinHandle<rusqlite::Result<()>>>,
}

impl Writers {
    fn start(node: &Node, modes: &[Mode]) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = Writers {
            stop: stop.clone(),
            known: Vec::new(),
            threads: Vec::new(),
        };
        let begin = Arc::new(Barrier::new(modes.len() + 1));
        for mode in modes.iter().copied() {
            let known = Arc::new(Known::default());
            writers.known.push((mode, known.clone()));
            let db = connect(node, &mode).unwrap();
            let (begin, stop) = (begin.clone(), stop.clone());
            writers.threads.push(std::thread::spawn(move || {
                begin.wait();
                write_on(db, mode, &known, &stop)
            }));
        }
        begin.wait();
        writers
    }

    /// Waits for the ends that a cut made; the connections are closed then.
    fn ended(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join().unwrap();
        }
    }

    /// Stops the writers; none may have failed.
    fn stop(mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.join().unwrap().unwrap();
        }
    }
}

fn on_image(image: &Image, data_keys: &str) -> Options {
    Options {
        data: Some(image.at.join("data")),
        data_keys: data_keys.into(),
        ..Options::default()
    }
}

/// Makes some of what is dirty durable, as the kernel may at any time.
fn write_back(image: &Image, dice: &mut Dice) {
    let mut files = Vec::new();
    let mut dirs = vec![image.at.join("data")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
        {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => dirs.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    for path in files {
        let Ok(file) = File::open(&path) else {
            continue;
        };
        match dice.roll(4) {
            0 => {
                let _ = file.sync_data();
            }
            // Some pages in the middle, without those before.
            1 => {
                let len = file.metadata().map_or(0, |m| m.len() / 4096 + 1);
                let (first, count) = (dice.roll(len), 1 + dice.roll(8));
                // SAFETY: an open descriptor and numbers.
                unsafe {
                    libc::sync_file_range(
                        file.as_raw_fd(),
                        i64::try_from(first * 4096).unwrap(),
                        i64::try_from(count * 4096).unwrap(),
                        libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER,
                    );
                }
            }
            _ => {}
        }
    }
}

/// Cuts the power of a primary while programs write, brings it back, and requires what was promised. Returns the log
/// of the start.
fn cut_primary(
    image: &Image,
    primary: &mut Node,
    replica: &Node,
    dice: &mut Dice,
    after: Duration,
    with_write_back: bool,
) -> String {
    let mut writers = Writers::start(primary, &MODES);
    let until = Instant::now() + after;
    while Instant::now() < until {
        let pause = Duration::from_millis(5 + dice.roll(60));
        std::thread::sleep(pause.min(until.saturating_duration_since(Instant::now())));
        if with_write_back {
            write_back(image, dice);
        }
    }
    for (_, known) in &writers.known {
        let acknowledged = known.acknowledged.load(Ordering::Acquire);
        known.before_cut.store(acknowledged, Ordering::Release);
    }
    image.cut();
    primary.kill();
    writers.ended();
    come_back_and_check(image, primary, replica, &writers)
}

fn come_back(image: &Image, node: &mut Node) {
    fuse::clean_stale_mount(&node.dir.join("mnt")).unwrap();
    image.come_back();
    node.launch();
    let log = node.log();
    assert!(log.contains("trust=Nothing"), "{log}");
    assert!(!log.contains("ERROR"), "{log}");
}

fn come_back_and_check(
    image: &Image,
    primary: &mut Node,
    replica: &Node,
    writers: &Writers,
) -> String {
    come_back(image, primary);
    check_promises(primary, writers);
    for (mode, _) in &writers.known {
        go_on(primary, replica, mode);
    }
    primary.log()
}

/// Requires of a primary that came back what SQLite promised its writers.
fn check_promises(primary: &Node, writers: &Writers) {
    for (mode, known) in &writers.known {
        let n = check(primary, mode);
        let acknowledged = known.before_cut.load(Ordering::Acquire);
        let checkpointed = known.checkpointed.load(Ordering::Acquire).min(acknowledged);
        let promised = acknowledged.saturating_sub(mode.may_lose).max(checkpointed);
        assert!(
            n >= promised,
            "{}: {acknowledged} transactions were acknowledged, {checkpointed} checkpointed, {n} are there",
            mode.name
        );
        eprintln!(
            "{}: acknowledged {acknowledged}, checkpointed {checkpointed}, found {n}",
            mode.name
        );
    }
}

/// Requires that a database can be written and is replicated.
fn go_on(primary: &Node, replica: &Node, mode: &Mode) {
    let n = check(primary, mode) + 1;
    step(&mut connect(primary, mode).unwrap(), n).unwrap();
    assert_same(primary, replica, mode.name);
    check(replica, mode);
}

/// Syncs what is in a directory below the data directory, and nothing else.
fn sync_below(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            sync_below(&entry.path());
        } else {
            File::open(entry.path()).unwrap().sync_all().unwrap();
        }
    }
    File::open(dir).unwrap().sync_all().unwrap();
}

fn cuts(seed: u64, count: u32, data_keys: &str, longest_ms: u64, with_write_back: bool) {
    if cannot_mount() {
        return;
    }
    let seed = std::env::var("LITEFS_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(seed);
    eprintln!("seed {seed} (LITEFS_SEED for another)");
    let mut dice = Dice(seed);
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 256) else {
        return;
    };
    let mut primary = Node::primary_with(dir.path(), on_image(&image, data_keys));
    for mode in &MODES {
        create(&primary, mode);
    }
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    let mut seen = String::new();
    for _ in 0..count {
        let after = Duration::from_millis(5 + dice.roll(longest_ms));
        eprintln!("cut after {after:?}");
        seen += &cut_primary(
            &image,
            &mut primary,
            &replica,
            &mut dice,
            after,
            with_write_back,
        );
    }
    for what in ["written back from the log", "captured as one transaction"] {
        eprintln!("{what}: {}", seen.matches(what).count());
    }
    // Or these cuts were too kind to show anything: nothing was in the files alone, no replica was ahead.
    assert!(seen.contains("captured as one transaction"), "{seen}");
    let log = replica.log();
    assert!(log.contains("which is not in the history"), "{log}");
}

#[test]
fn power_cuts_at_random_moments_lose_nothing_promised() {
    cuts(1, 4, "", 500, false);
}

#[test]
fn power_cuts_after_parts_were_written_back_lose_nothing_promised() {
    cuts(2, 4, "", 1500, true);
}

#[test]
fn power_cuts_while_segments_are_sealed_lose_nothing_promised() {
    cuts(3, 3, ", segment-size: 64KiB", 1500, true);
}

#[test]
fn power_cuts_of_a_lone_primary_that_lets_history_go_lose_nothing_promised() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 256) else {
        return;
    };
    let options = on_image(&image, ", segment-size: 64KiB");
    let mut primary = Node::primary_with(dir.path(), options);
    for mode in &MODES {
        create(&primary, mode);
    }
    for _ in 0..3 {
        let first = |mode: &Mode| first_in_log(&primary.meta(mode.name));
        let before: Vec<u64> = MODES.iter().map(first).collect();
        let mut writers = Writers::start(&primary, &MODES);
        wait_for("logs of WAL databases to begin anew twice", || {
            (0..2).all(|i| first(&MODES[i]) > before[i] + 40)
        });
        for (_, known) in &writers.known {
            let acknowledged = known.acknowledged.load(Ordering::Acquire);
            known.before_cut.store(acknowledged, Ordering::Release);
        }
        image.cut();
        primary.kill();
        writers.ended();
        come_back(&image, &mut primary);
        check_promises(&primary, &writers);
    }
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    for mode in &MODES {
        go_on(&primary, &replica, mode);
    }
}

const NORMAL: Mode = MODES[1];

/// A primary on an image with one database of `synchronous=NORMAL`, a replica of it elsewhere, and a program that has it
/// open.
fn with_normal(dir: &Path) -> Option<(Image, Node, Node, Connection)> {
    if cannot_mount() {
        return None;
    }
    let image = Image::new(dir, "disk", 64)?;
    let primary = Node::primary_with(dir, on_image(&image, ""));
    let replica = Node::replica(dir, "replica", &primary, "");
    create(&primary, &NORMAL);
    let db = connect(&primary, &NORMAL).unwrap();
    db.execute_batch("PRAGMA wal_autocheckpoint=0").unwrap();
    Some((image, primary, replica, db))
}

/// Commits `count` transactions more, and waits until the replica has them: they are in the log then.
fn commit(primary: &Node, replica: &Node, db: &mut Connection, count: i64) -> i64 {
    let first = last(db).unwrap() + 1;
    for n in first..first + count {
        step(db, n).unwrap();
    }
    assert_same(primary, replica, NORMAL.name);
    last(db).unwrap()
}

/// The log is durable and the WAL is not: what was replicated must not be taken back.
fn only_the_log_has_them(before: impl Fn(&mut Connection, &Image)) {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mut primary, replica, mut db)) = with_normal(dir.path()) else {
        return;
    };
    commit(&primary, &replica, &mut db, 20);
    before(&mut db, &image);
    let n = commit(&primary, &replica, &mut db, 40);
    let pos = primary.pos(NORMAL.name);
    sync_below(&image.at.join("data/dbs"));
    image.cut();
    primary.kill();
    drop(db);
    come_back(&image, &mut primary);
    assert_eq!(check(&primary, &NORMAL), n, "{}", primary.log());
    assert_eq!(primary.pos(NORMAL.name), pos);
    assert!(
        primary.log().contains("written back from the log"),
        "the cut took nothing from the database, so nothing is shown: {}",
        primary.log()
    );
    go_on(&primary, &replica, &NORMAL);
}

#[test]
fn commits_that_only_the_log_has_survive_a_power_cut_in_a_wal_of_which_a_part_was_synced() {
    only_the_log_has_them(|_, image| sync_below(&image.at.join("data/files")));
}

#[test]
fn commits_that_only_the_log_has_survive_a_power_cut_in_a_wal_that_was_reset() {
    only_the_log_has_them(|db, _| checkpoint(db, &Known::default(), 1).unwrap());
}

#[test]
fn commits_that_only_the_log_has_survive_a_power_cut_in_a_wal_that_was_truncated() {
    only_the_log_has_them(|db, _| checkpoint(db, &Known::default(), 300).unwrap());
}

/// What damage left of the log ends before the file, in LTX files that say nothing of a WAL.
#[test]
fn a_checkpoint_stays_where_power_was_lost_and_the_segments_of_the_log_are_damaged() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 64) else {
        return;
    };
    let options = on_image(&image, ", segment-size: 64KiB");
    let mut primary = Node::primary_with(dir.path(), options);
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    create(&primary, &NORMAL);
    let mut db = connect(&primary, &NORMAL).unwrap();
    let ltx = primary.meta(NORMAL.name).join("ltx");
    wait_for("the log to have an LTX file", || {
        commit(&primary, &replica, &mut db, 50);
        fs::read_dir(&ltx).is_ok_and(|mut files| files.next().is_some())
    });
    let n = commit(&primary, &replica, &mut db, 5);
    checkpoint(&db, &Known::default(), 300).unwrap();
    let synced = Command::new("sync").arg("-f").arg(&image.at).status();
    assert!(synced.unwrap().success());
    image.cut();
    primary.kill();
    drop(db);
    fuse::clean_stale_mount(&primary.dir.join("mnt")).unwrap();
    image.come_back();
    let segments = fs::read_dir(ltx.with_file_name("log")).unwrap();
    for path in segments.map(|entry| entry.unwrap().path()) {
        let file = File::options().write(true).open(path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0; 64], 0).unwrap();
    }
    primary.launch();
    assert_eq!(check(&primary, &NORMAL), n, "{}", primary.log());
    go_on(&primary, &replica, &NORMAL);
}

#[test]
fn a_write_back_from_the_log_that_dies_is_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mut primary, replica, mut db)) = with_normal(dir.path()) else {
        return;
    };
    for power_is_cut_again in [false, true] {
        checkpoint(&db, &Known::default(), 300).unwrap();
        let n = commit(&primary, &replica, &mut db, 30);
        sync_below(&image.at.join("data/dbs"));
        image.cut();
        primary.kill();
        drop(db);
        fuse::clean_stale_mount(&primary.dir.join("mnt")).unwrap();
        image.come_back();
        primary.options.env = vec![("LITEFS_CRASH_AT".into(), "recover.heal:page:4".into())];
        primary.spawn();
        let died = primary.child.take().unwrap().wait().unwrap();
        assert!(!died.success(), "{}", primary.log());
        primary.options.env.clear();
        if power_is_cut_again {
            sync_below(&image.at.join("data"));
            image.cut();
            image.come_back();
        }
        primary.launch();
        assert!(primary.log().contains("trust=Nothing"), "{}", primary.log());
        assert_eq!(check(&primary, &NORMAL), n, "{}", primary.log());
        go_on(&primary, &replica, &NORMAL);
        db = connect(&primary, &NORMAL).unwrap();
        db.execute_batch("PRAGMA wal_autocheckpoint=0").unwrap();
    }
}

#[test]
fn a_power_cut_right_after_a_checkpoint_loses_nothing_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mut primary, replica, mut db)) = with_normal(dir.path()) else {
        return;
    };
    for how in [1, 300, 1, 300] {
        let known = Known::default();
        let n = commit(&primary, &replica, &mut db, 150);
        checkpoint(&db, &known, how).unwrap();
        assert_eq!(known.checkpointed.load(Ordering::Acquire), how, "not busy");
        image.cut();
        primary.kill();
        drop(db);
        come_back(&image, &mut primary);
        assert!(check(&primary, &NORMAL) >= n, "{}", primary.log());
        go_on(&primary, &replica, &NORMAL);
        db = connect(&primary, &NORMAL).unwrap();
    }
}

#[test]
fn a_replica_whose_power_is_cut_becomes_the_same_again() {
    if cannot_mount() {
        return;
    }
    let mut dice = Dice(5);
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 256) else {
        return;
    };
    let primary = Node::primary(dir.path(), "");
    for mode in &MODES {
        create(&primary, mode);
    }
    let mut replica = Node::replica_with(
        dir.path(),
        "replica",
        &primary,
        on_image(&image, ", segment-size: 64KiB"),
    );
    for round in 0..4 {
        // Read through a WAL of ours, or written straight into the file.
        let readers: Vec<Connection> = MODES
            .iter()
            .filter(|_| round % 2 == 0)
            .map(|mode| {
                assert_same(&primary, &replica, mode.name);
                let db = replica.open(mode.name);
                last(&db).unwrap();
                db
            })
            .collect();
        let writers = Writers::start(&primary, &MODES);
        let until = Instant::now() + Duration::from_millis(5 + dice.roll(1500));
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5 + dice.roll(60)));
            write_back(&image, &mut dice);
        }
        image.cut();
        replica.kill();
        drop(readers);
        // It comes back behind, and by more than what it lost.
        writers.stop();
        come_back(&image, &mut replica);
        for mode in &MODES {
            go_on(&primary, &replica, mode);
        }
    }
}

fn is_full_or_io(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(
            rusqlite::ErrorCode::DiskFull
                | rusqlite::ErrorCode::SystemIoFailure
                | rusqlite::ErrorCode::CannotOpen
        )
    )
}

/// Commits until the disk is full, and requires that the program is told so.
fn write_until_full(db: &mut Connection, mode: &Mode) -> i64 {
    let mut n = last(db).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(
            Instant::now() < deadline,
            "{}: the disk does not fill",
            mode.name
        );
        match step(db, n + 1) {
            Ok(()) => n += 1,
            Err(e) => {
                assert!(is_full_or_io(&e), "{}: {e}", mode.name);
                return n;
            }
        }
    }
}

const FULL_MODES: [Mode; 4] = [MODES[0], MODES[1], MODES[3], MODES[5]];

#[test]
fn a_full_disk_of_a_primary_loses_nothing_and_ends_without_a_restart() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 64) else {
        return;
    };
    let mut primary = Node::primary_with(dir.path(), on_image(&image, ", segment-size: 64KiB"));
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    for mode in &FULL_MODES {
        create(&primary, mode);
        assert_same(&primary, &replica, mode.name);
    }
    for left in [0, 300 << 10, 2 << 20] {
        let mut apps: Vec<(Mode, Connection)> = FULL_MODES
            .iter()
            .map(|mode| (*mode, connect(&primary, mode).unwrap()))
            .collect();
        image.fill(left);
        // Each takes some of what is left, so that each is the one that meets the end.
        let mut acknowledged: Vec<i64> = apps
            .iter_mut()
            .map(|(mode, db)| write_until_full(db, mode))
            .collect();
        for ((mode, db), n) in apps.iter_mut().zip(&mut acknowledged) {
            // It goes on being told, and what it is not told stays.
            for _ in 0..3 {
                if let Err(e) = step(db, *n + 1) {
                    assert!(is_full_or_io(&e), "{}: {e}", mode.name);
                } else {
                    *n += 1;
                }
            }
        }
        assert!(
            primary
                .child
                .as_mut()
                .unwrap()
                .try_wait()
                .unwrap()
                .is_none(),
            "the node died: {}",
            primary.log()
        );
        image.free();
        for ((mode, db), n) in apps.iter_mut().zip(&acknowledged) {
            wait_for("the same program to write again", || {
                // A refused commit may be there: `step` is then not the next one.
                let have = last(db).unwrap_or(*n);
                step(db, have + 1).is_ok()
            });
            assert!(check(&primary, mode) > *n, "{}: lost", mode.name);
        }
        drop(apps);
        for mode in &FULL_MODES {
            go_on(&primary, &replica, mode);
        }
    }
    let log = primary.log();
    let told = log
        .lines()
        .find(|line| line.contains("No space left"))
        .unwrap_or_else(|| panic!("the log says nothing of it: {log}"));
    assert!(told.contains(image.at.to_str().unwrap()), "{told}");
    assert!(told.contains("free space"), "{told}");
    primary.stop();
    primary.launch();
    for mode in &FULL_MODES {
        go_on(&primary, &replica, mode);
    }
}

#[test]
fn a_full_disk_of_a_replica_disturbs_nobody_and_ends_without_a_restart() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 128) else {
        return;
    };
    let primary = Node::primary(dir.path(), "");
    for mode in &FULL_MODES {
        create(&primary, mode);
    }
    let mut replica = Node::replica_with(
        dir.path(),
        "replica",
        &primary,
        on_image(&image, ", segment-size: 64KiB"),
    );
    for (round, left) in [0, 100 << 10, 700 << 10, 0].into_iter().enumerate() {
        let readers: Vec<Connection> = FULL_MODES
            .iter()
            .filter(|_| round % 2 == 0)
            .map(|mode| {
                assert_same(&primary, &replica, mode.name);
                let db = replica.open(mode.name);
                last(&db).unwrap();
                db
            })
            .collect();
        image.fill(left);
        let mut all = Vec::new();
        for mode in &FULL_MODES {
            let mut db = connect(&primary, mode).unwrap();
            let first = last(&db).unwrap() + 1;
            let started = Instant::now();
            for n in first..first + 60 {
                step(&mut db, n).unwrap();
            }
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "the primary waits"
            );
            all.push((mode, first + 59));
        }
        wait_for("the replica to say so", || {
            replica.log().contains("No space left")
        });
        for mode in &FULL_MODES {
            // A reader sees some state that was, or is told; never a mix.
            let Ok(db) = Connection::open(replica.path(mode.name)) else {
                continue;
            };
            match db.query_row("PRAGMA integrity_check", [], |r| r.get::<_, String>(0)) {
                Ok(ok) => assert_eq!(ok, "ok", "{}", mode.name),
                Err(e) => assert!(is_full_or_io(&e), "{}: {e}", mode.name),
            }
        }
        assert!(
            replica
                .child
                .as_mut()
                .unwrap()
                .try_wait()
                .unwrap()
                .is_none(),
            "the node died: {}",
            replica.log()
        );
        image.free();
        for (mode, n) in all {
            assert_same(&primary, &replica, mode.name);
            assert_eq!(check(&replica, mode), n);
            go_on(&primary, &replica, mode);
        }
        drop(readers);
    }
    let log = replica.log();
    let told = log
        .lines()
        .find(|line| line.contains("No space left"))
        .unwrap();
    assert!(told.contains(image.at.to_str().unwrap()), "{told}");
    assert!(told.contains("free space"), "{told}");
}

#[test]
fn a_commit_that_nobody_saw_is_captured_with_the_next() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(dir.path(), "");
    let replica = Node::replica(dir.path(), "replica", &primary, "");
    for i in 0..20 {
        let name = format!("{i}.db");
        let db = primary.open(&name);
        db.execute_batch(
            "PRAGMA synchronous=off; CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB);
             WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<60)
             INSERT INTO t(v) SELECT randomblob(3000) FROM c",
        )
        .unwrap();
        assert_same(&primary, &replica, &name);
        // The first of them makes the journal, which the kernel serves; the second finds it.
        db.execute_batch(
            "PRAGMA journal_mode=persist;
             UPDATE t SET v=randomblob(3000) WHERE id=20; UPDATE t SET v=randomblob(3000) WHERE id=50",
        )
        .unwrap();
        assert_same(&primary, &replica, &name);
    }
}

#[test]
fn a_commit_of_a_program_that_locks_for_good_survives_a_power_cut() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 64) else {
        return;
    };
    let mut primary = Node::primary_with(dir.path(), on_image(&image, ""));
    let mode = mode("x.db", "delete", "extra", 0);
    create(&primary, &mode);
    let mut db = connect(&primary, &mode).unwrap();
    db.query_row("PRAGMA locking_mode=exclusive", [], |_| Ok(()))
        .unwrap();
    for n in 1..=20 {
        step(&mut db, n).unwrap();
    }
    // All of that is in the log, and durable.
    let mut pos = primary.pos(mode.name);
    wait_for("the log to be still", || {
        std::thread::sleep(Duration::from_millis(2500));
        std::mem::replace(&mut pos, primary.pos(mode.name)) == pos
    });
    // Page 1 is not among what changes, so the change counter stays as it is.
    db.execute("UPDATE t SET v=zeroblob(length(v)) WHERE id=9", [])
        .unwrap();
    image.cut();
    primary.kill();
    drop(db);
    come_back(&image, &mut primary);
    let is_there: bool = primary
        .open(mode.name)
        .query_row(
            "SELECT v=zeroblob(length(v)) FROM t WHERE id=9",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert!(is_there, "lost what was acknowledged\n{}", primary.log());
}

#[test]
fn a_database_that_was_removed_and_made_again_survives_a_power_cut() {
    if cannot_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = Image::new(dir.path(), "disk", 64) else {
        return;
    };
    let mut primary = Node::primary_with(dir.path(), on_image(&image, ""));
    let mode = mode("x.db", "delete", "extra", 0);
    create(&primary, &mode);
    let mut db = connect(&primary, &mode).unwrap();
    for n in 1..=20 {
        step(&mut db, n).unwrap();
    }
    drop(db);
    sync_below(&image.at.join("data/dbs"));
    fs::remove_file(primary.path(mode.name)).unwrap();
    create(&primary, &mode);
    let mut db = connect(&primary, &mode).unwrap();
    for n in 1..=2 {
        step(&mut db, n).unwrap();
    }
    image.cut();
    primary.kill();
    drop(db);
    come_back(&image, &mut primary);
    let n = check(&primary, &mode);
    assert_eq!(
        n,
        2,
        "the database that was removed is back\n{}",
        primary.log()
    );
}

#[test]
fn a_database_that_could_not_be_opened_is_refused_until_a_start_can_open_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mut primary, replica, mut db)) = with_normal(dir.path()) else {
        return;
    };
    commit(&primary, &replica, &mut db, 20);
    checkpoint(&db, &Known::default(), 1).unwrap();
    commit(&primary, &replica, &mut db, 40);
    sync_below(&image.at.join("data/dbs"));
    image.cut();
    primary.kill();
    drop(db);
    fuse::clean_stale_mount(&primary.dir.join("mnt")).unwrap();
    image.come_back();
    // Something keeps the node from writing to the database, for a moment.
    let main = image.at.join("data/files").join(NORMAL.name);
    let chattr = |flag: &str| {
        let done = Command::new("chattr").arg(flag).arg(&main).status();
        assert!(done.unwrap().success());
    };
    chattr("+i");
    primary.launch();
    chattr("-i");
    let said = primary.log();
    assert!(said.contains("cannot be opened"), "{said}");
    let refused = Connection::open(primary.path(NORMAL.name))
        .and_then(|db| db.execute_batch("PRAGMA synchronous=full; CREATE TABLE lost(n)"));
    assert!(refused.is_err(), "what it writes is not captured");
    primary.stop();
    primary.launch();
    assert!(check(&primary, &NORMAL) >= 20, "{}", primary.log());
    go_on(&primary, &replica, &NORMAL);
}

#[test]
fn a_database_that_could_not_be_compared_after_a_power_cut_is_compared_by_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mut primary, replica, mut db)) = with_normal(dir.path()) else {
        return;
    };
    commit(&primary, &replica, &mut db, 20);
    sync_below(&image.at.join("data/dbs"));
    commit(&primary, &replica, &mut db, 60);
    checkpoint(&db, &Known::default(), 1).unwrap();
    let n = last(&db).unwrap() + 1;
    step(&mut db, n).unwrap();
    sync_below(&image.at.join("data/files"));
    image.cut();
    primary.kill();
    drop(db);
    fuse::clean_stale_mount(&primary.dir.join("mnt")).unwrap();
    image.come_back();
    // Something keeps the node from the log of the database, for now.
    let log = primary.meta(NORMAL.name).join("log");
    let segment = fs::read_dir(log).unwrap().last().unwrap().unwrap().path();
    let chattr = |flag: &str| {
        let done = Command::new("chattr").arg(flag).arg(&segment).status();
        assert!(done.unwrap().success());
    };
    chattr("+i");
    primary.launch();
    chattr("-i");
    let said = primary.log();
    assert!(said.contains("cannot be opened"), "{said}");
    primary.kill();
    primary.launch();
    assert_eq!(check(&primary, &NORMAL), n, "{}", primary.log());
    go_on(&primary, &replica, &NORMAL);
}
