//! A throw-away cluster of processes of this very program. Dropping it ends them, unmounts, and removes the files.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rusqlite::Connection;

use super::{is_interrupted, wait_until};
use crate::config::NodeUrl;
use crate::http::client::{Client, path_with_query};
use crate::http::cluster::{Overview, Peer};
use crate::http::status::{NodeRole, Status};

/// How long a node has to start, or the cluster to be whole again.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a request may take.
const REQUEST: Duration = Duration::from_secs(20);
/// How long a node has to end before it is killed.
const END: Duration = Duration::from_secs(20);
/// Lines of each log that are shown when something goes wrong.
const LOG_LINES: usize = 25;

/// The database that is written.
pub(super) const DB: &str = "bench.db";

pub(super) struct Node {
    dir: PathBuf,
    url: NodeUrl,
    child: Option<Child>,
}

pub(super) struct Nodes {
    /// Made by us, and removed with all that is in it.
    dir: PathBuf,
    pub(super) nodes: Vec<Node>,
}

impl Nodes {
    /// Starts a cluster in a new directory in `parent`; returns once all nodes vote.
    pub(super) fn start(parent: &Path, count: usize, durability: &str) -> anyhow::Result<Nodes> {
        let dir = parent.join(format!("litefs-bench-{:016x}", rand::random::<u64>()));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let mut nodes = Nodes {
            dir,
            nodes: Vec::new(),
        };
        let urls: Vec<NodeUrl> = free_ports(count)?
            .into_iter()
            .map(|port| NodeUrl::new("127.0.0.1", port))
            .collect();
        for i in 0..count {
            let node = Node::prepare(&nodes.dir.join(format!("node{i}")), i, &urls, durability)?;
            nodes.nodes.push(node);
        }
        for node in &mut nodes.nodes {
            node.start()?;
        }
        wait_until("all nodes to vote", PATIENCE, || Ok(nodes.is_whole(true)))?;
        Ok(nodes)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether all nodes vote and have the same.
    fn is_whole(&mut self, may_be_empty: bool) -> bool {
        let count = self.nodes.len();
        let ended = |node: &mut Node| {
            node.child
                .as_mut()
                .is_none_or(|c| !matches!(c.try_wait(), Ok(None)))
        };
        if self.nodes.iter_mut().any(ended) {
            return false;
        }
        let Ok(status) = self.nodes[0].status() else {
            return false;
        };
        let vote = |role| matches!(role, NodeRole::Primary | NodeRole::Voter);
        let is_level = |db: &crate::http::status::DbRow| {
            db.copies.len() == count
                && db
                    .copies
                    .iter()
                    .all(|c| c.behind == Some(0) && c.pos.is_some() && !c.differs)
        };
        status.primary.is_some()
            && !status.is_changing
            && status
                .nodes
                .iter()
                .filter(|row| row.votes && vote(row.role))
                .count()
                == count
            && (may_be_empty || !status.databases.is_empty())
            && status.databases.iter().all(is_level)
    }

    /// Waits until all nodes vote and have the same.
    pub(super) fn wait_until_whole(&mut self) -> anyhow::Result<()> {
        wait_until("all nodes to be level and to vote", PATIENCE, || {
            Ok(self.is_whole(false))
        })
    }

    /// The node that takes writes, once there is one.
    pub(super) fn primary(&self) -> anyhow::Result<usize> {
        let mut found = None;
        wait_until("a primary", PATIENCE, || {
            found = self.nodes.iter().position(Node::is_primary);
            Ok(found.is_some())
        })?;
        found.context("no primary")
    }

    /// The last lines of all logs.
    pub(super) fn logs(&self) -> String {
        let mut out = String::new();
        for node in &self.nodes {
            let log = fs::read_to_string(node.dir.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
            out.push_str(&format!(
                "--- {}\n{}\n",
                node.dir.display(),
                tail.join("\n")
            ));
        }
        out
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        // All at once: nobody waits for another to take its role.
        for node in &self.nodes {
            node.signal(libc::SIGTERM);
        }
        let deadline = Instant::now() + END;
        let mut is_unmounted = true;
        for node in &mut self.nodes {
            node.end(deadline);
            is_unmounted &= node.unmount();
        }
        if is_unmounted && let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("litefs: remove {}: {error}", self.dir.display());
        }
    }
}

impl Node {
    fn prepare(dir: &Path, i: usize, urls: &[NodeUrl], durability: &str) -> anyhow::Result<Node> {
        let mount = dir.join("mnt");
        fs::create_dir_all(&mount).with_context(|| format!("create {}", mount.display()))?;
        let config = serde_json::json!({
            "data": { "dir": dir.join("data") },
            "fuse": { "dir": mount },
            "http": { "addr": urls[i].authority() },
            "lease": {
                "type": "raft",
                "hostname": format!("node{i}"),
                "advertise-url": urls[i].to_string(),
                "peers": urls.iter().map(ToString::to_string).collect::<Vec<_>>(),
            },
            "durability": durability,
        });
        // JSON is YAML.
        let path = dir.join("litefs.yml");
        fs::write(&path, config.to_string())
            .with_context(|| format!("write {}", path.display()))?;
        Ok(Node {
            dir: dir.to_owned(),
            url: urls[i].clone(),
            child: None,
        })
    }

    /// Starts the process. Must be called by the main thread, with whose end the node ends too.
    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        let path = self.dir.join("log");
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("open {}", path.display()))?;
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(program);
        command
            .args(["mount", "-no-expand-env", "-config"])
            .arg(self.dir.join("litefs.yml"))
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is ours to hear: nodes are ended in order.
            .process_group(0);
        // SAFETY: `prctl` is a mere system call.
        unsafe {
            command.pre_exec(
                || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                },
            );
        }
        self.child = Some(command.spawn().context("start a node")?);
        Ok(())
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.join("mnt").join(DB)
    }

    pub(super) fn open(&self) -> rusqlite::Result<Connection> {
        let db = Connection::open(self.path())?;
        db.pragma_update(None, "synchronous", "normal")?;
        Ok(db)
    }

    fn ask<T: serde::de::DeserializeOwned>(
        &self,
        ask: impl AsyncFnOnce(Client) -> Result<T, crate::http::client::ClientError>,
    ) -> anyhow::Result<T> {
        let client = Client::new(self.url.clone());
        crate::cmd::block_on(async {
            match tokio::time::timeout(REQUEST, ask(client)).await {
                Ok(answer) => Ok(answer?),
                Err(_) => bail!("no answer within {REQUEST:?}"),
            }
        })
    }

    pub(super) fn status(&self) -> anyhow::Result<Status> {
        self.ask(async |client| client.get_large_json("/v1/status").await)
    }

    pub(super) fn is_primary(&self) -> bool {
        self.child.is_some()
            && self
                .ask(async |client| client.get_json::<Overview>("/v1/cluster").await)
                .is_ok_and(|overview| overview.is_primary)
    }

    /// Takes the role; returns once this node is the primary.
    pub(super) fn promote(&self) -> anyhow::Result<Peer> {
        self.ask(async |client| client.post_json("/promote").await)
    }

    pub(super) fn set_durability(&self, value: &str) -> anyhow::Result<serde_json::Value> {
        let path = path_with_query("/v1/cluster/durability", "value", value);
        self.ask(async |client| client.post_json(&path).await)
    }

    fn signal(&self, signal: i32) {
        if let Some(child) = &self.child
            && let Ok(pid) = i32::try_from(child.id())
        {
            // SAFETY: the child is ours and not yet waited for.
            unsafe { libc::kill(pid, signal) };
        }
    }

    /// Kills the process, and returns when that was.
    pub(super) fn kill(&mut self) -> anyhow::Result<Instant> {
        let mut child = self.child.take().context("the node does not run")?;
        let at = Instant::now();
        let killed = child.kill();
        child.wait().context("wait for a node that was killed")?;
        killed.context("kill a node")?;
        Ok(at)
    }

    fn end(&mut self, deadline: Instant) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        loop {
            match child.try_wait() {
                Ok(None) if Instant::now() < deadline => {}
                Ok(None) => {
                    eprintln!("litefs: {} does not end, killed", self.dir.display());
                    let _ = child.kill();
                    let _ = child.wait();
                    return;
                }
                _ => return,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns whether nothing is mounted any more.
    fn unmount(&self) -> bool {
        let mount = self.dir.join("mnt");
        if let Err(error) = fuse::clean_stale_mount(&mount) {
            eprintln!("litefs: unmount {}: {error}", mount.display());
        }
        match fuse::is_mounted(&mount) {
            Ok(false) => true,
            // It may be gone with its directory.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
            _ => {
                eprintln!("litefs: {} is mounted still: umount -l it", mount.display());
                false
            }
        }
    }
}

fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<std::io::Result<_>>()
        .context("find free ports")?;
    let ports = listeners.iter().map(|l| Ok(l.local_addr()?.port()));
    ports.collect()
}

/// Says why there can be no nodes here, if so.
pub(super) fn check_host() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("this mounts directories: run it as root");
    }
    if !Path::new("/dev/fuse").exists() {
        bail!(
            "this mounts directories, and there is no /dev/fuse: load the module (modprobe fuse), or give it to the container (--device /dev/fuse)"
        );
    }
    if is_interrupted() {
        bail!("interrupted");
    }
    Ok(())
}
