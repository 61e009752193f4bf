//! Nodes as processes, for the tests of whole nodes.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use litefs::ltx::{Checksum, PageSize, Pgno, page_checksum};
use rusqlite::Connection;
use rusqlite::types::ValueRef;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How long a node has to answer a request.
const ANSWER: Duration = Duration::from_secs(15);

/// Waits for something to become true, looking every few milliseconds.
pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Says why nodes cannot be run here, if so.
pub(crate) fn cannot_mount() -> bool {
    let is_root =
        fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    if !is_root || !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: mounting needs root and /dev/fuse");
        return true;
    }
    false
}

pub(crate) const NOBODY: u32 = 65534;

/// A running node; ended and unmounted when dropped.
pub(crate) struct Node {
    pub(crate) dir: PathBuf,
    pub(crate) child: Option<Child>,
    pub(crate) port: u16,
    /// What the next launch uses.
    pub(crate) options: Options,
    primary: Option<u16>,
}

/// How a node differs from the plain one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    /// More keys of `data`, each with a comma before it.
    pub(crate) data_keys: String,
    /// More keys of `fuse`, each with a comma before it.
    pub(crate) fuse_keys: String,
    /// More keys of `lease`, each with a comma before it.
    pub(crate) lease_keys: String,
    /// The whole section `lease`, instead of that of a static one.
    pub(crate) lease: Option<String>,
    /// More sections.
    pub(crate) keys: String,
    /// The data directory; `data` beside the mount if there is none.
    pub(crate) data: Option<PathBuf>,
    /// Environment of the process.
    pub(crate) env: Vec<(String, String)>,
    /// Runs the process as nobody, by this command.
    pub(crate) as_nobody_by: Vec<String>,
}

impl Node {
    pub(crate) fn primary(dir: &Path, fuse_keys: &str) -> Node {
        Node::primary_with(
            dir,
            Options {
                fuse_keys: fuse_keys.into(),
                ..Options::default()
            },
        )
    }

    pub(crate) fn primary_with(dir: &Path, options: Options) -> Node {
        Node::start(dir.join("primary"), options, None)
    }

    pub(crate) fn replica(dir: &Path, name: &str, of: &Node, fuse_keys: &str) -> Node {
        Node::replica_with(
            dir,
            name,
            of,
            Options {
                fuse_keys: fuse_keys.into(),
                ..Options::default()
            },
        )
    }

    pub(crate) fn replica_with(dir: &Path, name: &str, of: &Node, options: Options) -> Node {
        Node::start(dir.join(name), options, Some(of.port))
    }

    /// A replica of whatever listens at a port of this machine; not yet started.
    pub(crate) fn replica_of_port(dir: &Path, name: &str, port: u16, options: Options) -> Node {
        Node::prepare(dir.join(name), options, Some(port))
    }

    fn start(dir: PathBuf, options: Options, primary: Option<u16>) -> Node {
        let mut node = Node::prepare(dir, options, primary);
        node.launch();
        node
    }

    fn prepare(dir: PathBuf, options: Options, primary: Option<u16>) -> Node {
        fs::create_dir_all(dir.join("mnt")).unwrap();
        if !options.as_nobody_by.is_empty() {
            for dir in [&dir, &dir.join("mnt")] {
                std::os::unix::fs::chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
            }
        }
        Node {
            dir,
            child: None,
            port: 0,
            options,
            primary,
        }
    }

    /// A node that elects its primary with those at `ports`, itself the `index`-th of them; not yet started.
    pub(crate) fn elector(dir: &Path, index: usize, ports: &[u16], options: Options) -> Node {
        let url = |port: &u16| format!("\"http://127.0.0.1:{port}\"");
        let peers: Vec<String> = ports.iter().map(url).collect();
        let lease = format!(
            "{{type: raft, hostname: node{index}, advertise-url: {}, peers: [{}]{}}}",
            url(&ports[index]),
            peers.join(", "),
            options.lease_keys
        );
        let options = Options {
            lease: Some(lease),
            ..options
        };
        let mut node = Node::prepare(dir.join(format!("node{index}")), options, None);
        node.port = ports[index];
        node
    }

    /// What the node answers to a request, as text; nothing if there is no answer.
    pub(crate) fn ask(&self, method: &str, path: &str) -> Option<String> {
        use std::io::{Read, Write};
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], self.port));
        let mut tcp = std::net::TcpStream::connect_timeout(&address, ANSWER).ok()?;
        tcp.set_read_timeout(Some(ANSWER)).ok()?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        tcp.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    /// Whether the node takes writes, as it says itself.
    pub(crate) fn is_primary(&self) -> bool {
        self.child.is_some()
            && self
                .ask("GET", "/v1/cluster")
                .is_some_and(|answer| answer.contains("\"isPrimary\":true"))
    }

    /// The next launch is as a primary.
    pub(crate) fn become_primary(&mut self) {
        self.primary = None;
    }

    /// The next launch is as a replica.
    pub(crate) fn become_replica(&mut self, of: &Node) {
        self.primary = Some(of.port);
    }

    /// The process, while it runs.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// What the node keeps about a database.
    pub(crate) fn meta(&self, name: &str) -> PathBuf {
        let dirs = fs::read_dir(self.data().join("dbs")).unwrap();
        dirs.map(|entry| entry.unwrap().path())
            .find(|dir| {
                fs::read_to_string(dir.join("name")).is_ok_and(|n| n.lines().next() == Some(name))
            })
            .unwrap_or_else(|| panic!("no directory about {name}"))
    }

    /// Starts the process, and returns once it is ready.
    pub(crate) fn launch(&mut self) {
        self.spawn();
        self.wait_until_ready();
    }

    /// Starts the process.
    pub(crate) fn spawn(&mut self) {
        // A restarted primary keeps its port, so that replicas find it; a first start asks the kernel.
        let (candidate, url) = match self.primary {
            None => (true, format!("http://127.0.0.1:{}", self.port.max(1))),
            Some(port) => (false, format!("http://127.0.0.1:{port}")),
        };
        let config = format!(
            "data: {{dir: {data}{more_data}}}\nfuse: {{dir: {dir}/mnt{more_fuse}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n\
             lease: {lease}\n{more}",
            dir = self.dir.display(),
            data = self.data().display(),
            port = self.port,
            more_data = self.options.data_keys,
            more_fuse = self.options.fuse_keys,
            lease = self.options.lease.clone().unwrap_or_else(|| {
                format!(
                    "{{type: static, candidate: {candidate}, hostname: primary, advertise-url: \"{url}\", \
                     reconnect-delay: 50ms{}}}",
                    self.options.lease_keys
                )
            }),
            more = self.options.keys,
        );
        fs::write(self.dir.join("litefs.yml"), config).unwrap();
        let log = fs::File::create(self.dir.join("log")).unwrap();
        let mut argv = self.options.as_nobody_by.clone();
        argv.push(match argv.is_empty() {
            true => env!("CARGO_BIN_EXE_litefs").into(),
            false => "./litefs".into(),
        });
        let child = Command::new(&argv[0])
            .args(&argv[1..])
            .current_dir(if argv.len() > 1 {
                self.dir.parent().unwrap()
            } else {
                Path::new(".")
            })
            .args(["mount", "-config"])
            .arg(self.dir.join("litefs.yml"))
            .env("NO_COLOR", "1")
            .envs(self.options.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// Waits for a node that was spawned.
    pub(crate) fn wait_until_ready(&mut self) {
        wait_for(
            &format!("node at {} to be ready", self.dir.display()),
            || {
                let log = self.log();
                assert!(!log.lines().any(|line| line.starts_with("Error")), "{log}");
                log.contains(": ready ")
            },
        );
        let log = self.log();
        let at = log.find("addr=").unwrap();
        let addr = log[at + 5..].split_whitespace().next().unwrap();
        self.port = addr.rsplit(':').next().unwrap().parse().unwrap();
    }

    /// The data directory.
    pub(crate) fn data(&self) -> PathBuf {
        self.options
            .data
            .clone()
            .unwrap_or_else(|| self.dir.join("data"))
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join("mnt").join(name)
    }

    pub(crate) fn open(&self, name: &str) -> Connection {
        let db = Connection::open(self.path(name)).unwrap();
        db.busy_timeout(PATIENCE).unwrap();
        db
    }

    pub(crate) fn pos(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(&format!("{name}-pos"))).ok()
    }

    pub(crate) fn signal(&mut self, signal: i32) {
        if let Some(mut child) = self.child.take() {
            let pid = i32::try_from(child.id()).unwrap();
            // SAFETY: the child is ours and not yet waited for.
            unsafe { libc::kill(pid, signal) };
            child.wait().unwrap();
        }
    }

    /// Says whether the process has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child
            .as_mut()
            .is_none_or(|child| child.try_wait().unwrap().is_some())
    }

    /// Waits for a node that was spawned to be ready, or to end. Returns whether it is ready.
    pub(crate) fn wait_until_ready_or_ended(&mut self) -> bool {
        wait_for("a node to be ready, or to end", || {
            self.log().contains(": ready ") || self.has_ended()
        });
        if self.has_ended() {
            return false;
        }
        self.wait_until_ready();
        true
    }

    pub(crate) fn stop(&mut self) {
        self.signal(libc::SIGTERM);
    }

    pub(crate) fn kill(&mut self) {
        self.signal(libc::SIGKILL);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
        let _ = fuse::clean_stale_mount(&self.dir.join("mnt"));
        if std::thread::panicking() {
            eprintln!("--- log of {}\n{}", self.dir.display(), self.log());
        }
    }
}

/// Returns ports that nobody listens at.
pub(crate) fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    listeners
        .iter()
        .map(|l| l.local_addr().unwrap().port())
        .collect()
}

/// Nodes of one cluster.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
}

impl Cluster {
    /// Starts nodes on ports that the kernel chooses, and waits until all vote.
    pub(crate) fn start(dir: &Path, count: usize, options: &Options) -> Cluster {
        let ports = free_ports(count);
        let mut nodes: Vec<Node> = (0..count)
            .map(|i| Node::elector(dir, i, &ports, options.clone()))
            .collect();
        for node in &mut nodes {
            node.spawn();
        }
        for node in &mut nodes {
            node.wait_until_ready();
        }
        let cluster = Cluster { nodes };
        wait_for("all nodes to vote", || {
            let answer = cluster.nodes[cluster.primary()].ask("GET", "/v1/cluster");
            let answer = answer.unwrap_or_default();
            // Until a change is done, the loss of an old voter could stop the cluster.
            let is_done = answer.contains("\"isChanging\":false");
            let voters = answer.split("\"voters\":").nth(1).unwrap_or_default();
            let voters = voters.split(']').next().unwrap_or_default();
            is_done && voters.matches("\"id\"").count() == count
        });
        cluster
    }

    /// Returns the number of the node that takes writes, once there is one.
    pub(crate) fn primary(&self) -> usize {
        let mut found = None;
        wait_for("a primary", || {
            found = self.nodes.iter().position(Node::is_primary);
            found.is_some()
        });
        found.unwrap()
    }

    pub(crate) fn others(&self, but: usize) -> Vec<usize> {
        (0..self.nodes.len()).filter(|i| *i != but).collect()
    }

    pub(crate) fn promote(&self, to: usize) {
        // On a machine that is slow now and then, a node may not be level or not take over in time.
        wait_for("the role to be handed over", || {
            let answer = self.nodes[to].ask("POST", "/promote").unwrap();
            let is_refused = answer.starts_with("HTTP/1.1 409");
            assert!(is_refused || answer.starts_with("HTTP/1.1 200"), "{answer}");
            !is_refused || self.nodes[to].is_primary()
        });
    }

    pub(crate) fn wait_until_level(&self, name: &str) {
        wait_for("all nodes to be level", || {
            let pos = self.nodes[self.primary()].pos(name);
            pos.is_some()
                && self
                    .nodes
                    .iter()
                    .all(|node| node.child.is_none() || node.pos(name) == pos)
        });
    }

    pub(crate) fn assert_same(&self, name: &str) {
        self.wait_until_level(name);
        let texts: Vec<String> = self
            .nodes
            .iter()
            .filter(|n| n.child.is_some())
            .map(|n| dump(n, name))
            .collect();
        assert!(texts[0].starts_with("ok\n"), "{}", texts[0]);
        for text in &texts {
            assert_eq!(text, &texts[0]);
        }
    }
}

/// Returns the first transaction that a database's log has, from what the node keeps about it.
pub(crate) fn first_in_log(meta: &Path) -> u64 {
    let files = ["ltx", "log"].into_iter().flat_map(|dir| {
        let files = fs::read_dir(meta.join(dir)).unwrap();
        files.map(|file| file.unwrap().file_name().into_string().unwrap())
    });
    files
        .filter_map(|name| u64::from_str_radix(name.split(['-', '.']).next()?, 16).ok())
        .min()
        .unwrap_or(0)
}

/// Requires that a replica comes to the primary's state, by position and as SQLite sees it.
pub(crate) fn assert_same(primary: &Node, replica: &Node, name: &str) {
    let mut seen = String::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let pos = primary.pos(name);
        if pos.is_some() && pos == replica.pos(name) {
            let (ours, theirs) = (dump(primary, name), dump(replica, name));
            if ours == theirs && pos == primary.pos(name) {
                assert!(ours.starts_with("ok\n"), "{name}: {ours}");
                return;
            }
            seen = format!("{pos:?}\n{ours}\nreplica:\n{theirs}");
        }
        assert!(
            Instant::now() < deadline,
            "{name} does not become the same: {pos:?} {:?}\n{seen:.2000}",
            replica.pos(name)
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Writes out a database: what SQLite's check says, then every row.
pub(crate) fn dump(node: &Node, name: &str) -> String {
    let db = node.open(name);
    let mut text: String = db
        .query_row("PRAGMA integrity_check", [], |r| r.get(0))
        .unwrap();
    let mut tables = db
        .prepare("SELECT name FROM sqlite_schema WHERE type='table' ORDER BY 1")
        .unwrap();
    let tables: Vec<String> = tables
        .query_map([], |r| r.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    for table in tables {
        let mut all = db
            .prepare(&format!("SELECT * FROM \"{table}\" ORDER BY 1"))
            .unwrap();
        let columns = all.column_count();
        let mut found = all.query([]).unwrap();
        while let Some(row) = found.next().unwrap() {
            let values: Vec<String> = (0..columns)
                .map(|i| match row.get_ref(i).unwrap() {
                    ValueRef::Blob(long) if long.len() > 64 => {
                        format!("{} bytes, crc {:08x}", long.len(), crc32fast::hash(long))
                    }
                    short => format!("{short:?}"),
                })
                .collect();
            text.push_str(&format!("\n{table}: {}", values.join("|")));
        }
    }
    text.push('\n');
    text
}

/// Computes a database's checksum from its pages, as SQLite reads them.
pub(crate) fn checksum_of_pages(db: &mut Connection) -> Checksum {
    // Of leaves of the free list, the cache of the writer holds what it never wrote.
    db.execute_batch("PRAGMA shrink_memory").unwrap();
    let size: u32 = db.query_row("PRAGMA page_size", [], |r| r.get(0)).unwrap();
    let size = PageSize::new(size).unwrap();
    let bytes = db.serialize("main").unwrap();
    let pages = bytes.chunks_exact(size.len());
    assert!(pages.remainder().is_empty());
    (1..)
        .filter_map(Pgno::new)
        .zip(pages)
        .filter(|(pgno, _)| *pgno != size.lock_pgno())
        .fold(Checksum::EMPTY, |sum, (pgno, page)| {
            sum ^ page_checksum(pgno, page)
        })
}

/// Requires that a replica comes to hold exactly the pages that the primary's `db` shows, that both nodes say so in
/// their positions, and that SQLite finds nothing wrong with them. The position is returned.
pub(crate) fn assert_same_pages(
    primary: &Node,
    db: &mut Connection,
    replica: &Node,
    name: &str,
) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ours = primary.pos(name).unwrap_or_default();
        let theirs = replica.pos(name).unwrap_or_default();
        let late = Instant::now() > deadline;
        let sum = if ours == theirs || late {
            checksum_of_pages(db).to_string()
        } else {
            String::new()
        };
        if !sum.is_empty() && ours.trim().ends_with(&sum) && ours == theirs {
            let mut copy = replica.open(name);
            assert_eq!(
                checksum_of_pages(&mut copy).to_string(),
                sum,
                "{name}: the replica shows other pages at {theirs}"
            );
            for db in [&*db, &copy] {
                let check: String = db
                    .query_row("PRAGMA integrity_check", [], |r| r.get(0))
                    .unwrap();
                assert_eq!(check, "ok", "{name}");
            }
            return ours;
        }
        assert!(
            !late,
            "{name}: pages have {sum}, the primary is at {ours}, the replica at {theirs}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
