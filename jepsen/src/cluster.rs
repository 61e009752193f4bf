//! Nodes on machines of their own: a network namespace, a disk, a daemon, and a client that uses the mount.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::history::{Event, Micros, now};
use crate::os::{self, Disk, NetNs};
use crate::workload::{Content, Workload};

/// In the node's own network; nobody else is there.
const PORT: u16 = 20202;
const DISK_BYTES: u64 = 512 << 20;
/// How long the kernel may take to end what was killed.
const END: Duration = Duration::from_secs(5);
/// How long a daemon may take to stop when asked.
const STOP: Duration = Duration::from_secs(40);
const ASK: Duration = Duration::from_secs(5);
/// How long a node may take to be ready when a majority is there.
pub(crate) const READY: Duration = Duration::from_secs(60);

/// What all nodes of a run have in common.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) litefs: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) nodes: usize,
    pub(crate) durability: String,
    pub(crate) workload: Workload,
    pub(crate) seed: u64,
    pub(crate) pace_ms: u64,
    /// Wall clocks can be set.
    pub(crate) fake_clocks: bool,
    pub(crate) debug: bool,
}

/// One machine.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) index: usize,
    dir: PathBuf,
    net: NetNs,
    pub(crate) disk: Disk,
    daemon: Option<Child>,
    client: Option<Child>,
    clients: u64,
    starts: u64,
    started: Instant,
    is_ready: bool,
    /// Whether the daemon ought to run.
    pub(crate) should_run: bool,
    pub(crate) is_stopped: bool,
    /// The power was cut, or the disk is out.
    pub(crate) is_dark: bool,
    /// How far its monotonic clock is ahead at the next start.
    pub(crate) ahead: Duration,
}

/// Something that must not be, found while the cluster ran.
pub(crate) type Trouble = String;

/// All machines, and the network between them.
pub(crate) struct Cluster {
    pub(crate) settings: Settings,
    pub(crate) nodes: Vec<Node>,
    _hub: NetNs,
    pub(crate) events: Arc<std::sync::Mutex<Vec<Event>>>,
    pub(crate) troubles: Vec<Trouble>,
    /// Packets from the first are not heard by the second.
    cut: BTreeSet<(usize, usize)>,
    /// Disks that were lost: node, and when.
    pub(crate) lost_disks: Vec<(usize, Micros)>,
    /// What was done, for people.
    pub(crate) diary: Vec<(Micros, String)>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Peer {
    pub(crate) id: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Overview {
    pub(crate) node: Peer,
    pub(crate) is_primary: bool,
    pub(crate) voters: Vec<Peer>,
}

fn address(index: usize) -> String {
    format!("10.0.0.{}", index + 1)
}

impl Node {
    pub(crate) fn mount(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.disk.at.join("data")
    }

    fn log_path(&self, start: u64) -> PathBuf {
        self.dir.join(format!("log.{start}"))
    }

    /// All that its daemons said.
    pub(crate) fn logs(&self) -> String {
        let read = |n| fs::read(self.log_path(n)).unwrap_or_default();
        let text = (1..=self.starts).flat_map(read).collect::<Vec<u8>>();
        String::from_utf8_lossy(&text).into_owned()
    }

    fn clock_file(&self) -> PathBuf {
        self.dir.join("clock")
    }

    /// Sets its wall clock off.
    pub(crate) fn set_clock(&self, offset: &str) -> Result<()> {
        Ok(fs::write(self.clock_file(), format!("{offset}\n"))?)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.daemon.is_some()
    }

    pub(crate) fn ask(
        &self,
        method: &str,
        path: &str,
        patience: Duration,
    ) -> Result<(u16, String)> {
        self.net.ask(PORT, method, path, patience)
    }

    pub(crate) fn overview(&self) -> Option<Overview> {
        if self.daemon.is_none() || self.is_stopped {
            return None;
        }
        let (_, body) = self.ask("GET", "/v1/cluster", ASK).ok()?;
        serde_json::from_str(&body).ok()
    }

    fn config(&self, settings: &Settings) -> String {
        let url = |i| format!("\"http://{}:{PORT}\"", address(i));
        let peers: Vec<String> = (0..settings.nodes).map(url).collect();
        format!(
            "data: {{dir: {data}}}\nfuse: {{dir: {mount}}}\nhttp: {{addr: \":{PORT}\"}}\nlog: {{timestamp: true}}\n\
             durability: {durability}\nlease: {{type: raft, hostname: n{i}, advertise-url: {me}, peers: [{peers}]}}\n",
            data = self.data().display(),
            mount = self.mount().display(),
            durability = settings.durability,
            i = self.index,
            me = url(self.index),
            peers = peers.join(", "),
        )
    }

    /// Starts the daemon; it may take a while until it is ready.
    pub(crate) fn start(&mut self, settings: &Settings) -> Result<()> {
        if self.daemon.is_some() {
            return Ok(());
        }
        self.starts += 1;
        let config = self.dir.join("litefs.yml");
        fs::write(&config, self.config(settings))?;
        let log = File::create(self.log_path(self.starts))?;
        let mut command = self.net.command(&settings.litefs);
        command.arg("mount").arg("-config").arg(&config);
        if settings.debug {
            command.arg("-debug");
        }
        command.env("NO_COLOR", "1").env("RUST_BACKTRACE", "1");
        if settings.fake_clocks
            && let Some(library) = faketime()
        {
            command
                .env("LD_PRELOAD", library)
                .env("FAKETIME_TIMESTAMP_FILE", self.clock_file())
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        if !self.ahead.is_zero() {
            os::with_monotonic_ahead(&mut command, self.ahead);
        }
        os::die_with_us(&mut command);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let litefs = settings.litefs.display();
        self.daemon = Some(command.spawn().with_context(|| format!("start {litefs}"))?);
        self.started = Instant::now();
        self.is_ready = false;
        self.should_run = true;
        self.is_stopped = false;
        Ok(())
    }

    /// Kills the daemon. One that the kernel cannot end at once is left to it.
    pub(crate) fn kill(&mut self) {
        self.should_run = false;
        self.is_stopped = false;
        if let Some(mut child) = self.daemon.take() {
            os::signal(&child, libc::SIGKILL);
            os::wait_end(&mut child, END);
        }
    }

    /// Asks the daemon to stop, and waits for it.
    pub(crate) fn stop(&mut self) -> Result<Option<ExitStatus>> {
        self.should_run = false;
        let Some(mut child) = self.daemon.take() else {
            return Ok(None);
        };
        os::signal(&child, libc::SIGTERM);
        if let Some(status) = os::wait_end(&mut child, STOP) {
            return Ok(Some(status));
        }
        os::signal(&child, libc::SIGKILL);
        os::wait_end(&mut child, END);
        bail!("n{} did not stop within {STOP:?} of SIGTERM", self.index)
    }

    pub(crate) fn pause(&mut self) {
        if let Some(child) = &self.daemon {
            os::signal(child, libc::SIGSTOP);
            self.is_stopped = true;
        }
    }

    pub(crate) fn resume(&mut self) {
        if let Some(child) = &self.daemon {
            os::signal(child, libc::SIGCONT);
        }
        self.is_stopped = false;
    }

    pub(crate) fn kill_client(&mut self) {
        if let Some(mut child) = self.client.take() {
            os::signal(&child, libc::SIGKILL);
            os::wait_end(&mut child, END);
        }
    }

    /// The plug is pulled: nothing that runs here runs on. The disk is next.
    fn plug_out(&mut self) {
        self.is_dark = true;
        self.should_run = false;
        for child in self.client.iter().chain(&self.daemon) {
            os::signal(child, libc::SIGKILL);
        }
    }

    /// What ran has ended, and what was mounted is gone.
    fn gone_dark(&mut self) {
        os::abort_fuse(&self.mount());
        self.kill();
        self.kill_client();
        os::detach(&self.mount());
    }

    /// Reads a file in the mount, if the daemon answers.
    pub(crate) fn read(&self, name: &str) -> Option<String> {
        let path = self.mount().join(name);
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            let _ = send.send(fs::read_to_string(path).ok());
        });
        receive.recv_timeout(ASK).ok().flatten()
    }
}

/// The library that sets wall clocks off, if it is installed.
pub(crate) fn faketime() -> Option<PathBuf> {
    let machine = std::env::consts::ARCH;
    let places = [
        format!("/usr/lib/{machine}-linux-gnu/faketime"),
        "/usr/lib64/faketime".into(),
        "/usr/lib/faketime".into(),
    ];
    let library = |dir: &String| Path::new(dir).join("libfaketimeMT.so.1");
    places.iter().map(library).find(|path| path.exists())
}

impl Cluster {
    /// Starts all nodes, and returns once all of them vote.
    pub(crate) fn start(settings: Settings) -> Result<Cluster> {
        let hub = NetNs::new().context("network namespace")?;
        hub.run("ip link add br0 type bridge")?;
        hub.run("ip link set br0 up")?;
        let mut nodes = Vec::new();
        for index in 0..settings.nodes {
            let dir = settings.dir.join(format!("n{index}"));
            fs::create_dir_all(dir.join("mnt"))?;
            let net = NetNs::new().context("network namespace")?;
            let path = net.path();
            hub.run(&format!(
                "ip link add v{index} type veth peer name eth0 netns {path}"
            ))?;
            hub.run(&format!("ip link set v{index} master br0 up"))?;
            net.run("ip link set lo up")?;
            net.run(&format!("ip addr add {}/24 dev eth0", address(index)))?;
            net.run("ip link set eth0 up")?;
            let node = Node {
                index,
                disk: Disk::new(&dir, DISK_BYTES)?,
                dir,
                net,
                daemon: None,
                client: None,
                clients: 0,
                starts: 0,
                started: Instant::now(),
                is_ready: false,
                should_run: false,
                is_stopped: false,
                is_dark: false,
                ahead: Duration::ZERO,
            };
            node.set_clock("+0")?;
            nodes.push(node);
        }
        let mut cluster = Cluster {
            settings,
            nodes,
            _hub: hub,
            events: Arc::default(),
            troubles: Vec::new(),
            cut: BTreeSet::new(),
            lost_disks: Vec::new(),
            diary: Vec::new(),
            readers: Vec::new(),
        };
        for node in &mut cluster.nodes {
            node.start(&cluster.settings)?;
        }
        cluster.wait("all nodes to vote", READY, Cluster::all_vote)?;
        Ok(cluster)
    }

    pub(crate) fn note(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.diary.push((now(), what));
    }

    /// Waits for something, and sees to the daemons meanwhile.
    pub(crate) fn wait(
        &mut self,
        what: &str,
        patience: Duration,
        is_so: impl Fn(&Cluster) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !is_so(self) {
            crate::interrupt::check()?;
            anyhow::ensure!(
                Instant::now() < deadline,
                "waited {patience:?} in vain for {what}"
            );
            self.see_to_daemons();
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Sleeps, and sees to the daemons meanwhile.
    pub(crate) fn sleep(&mut self, how_long: Duration) -> Result<()> {
        let deadline = Instant::now() + how_long;
        while Instant::now() < deadline {
            crate::interrupt::check()?;
            self.see_to_daemons();
            let left = deadline.saturating_duration_since(Instant::now());
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
        Ok(())
    }

    /// Starts again what has ended by itself, and remembers that it has.
    fn see_to_daemons(&mut self) {
        for node in &mut self.nodes {
            let Some(child) = &mut node.daemon else {
                continue;
            };
            let Ok(Some(status)) = child.try_wait() else {
                continue;
            };
            node.daemon = None;
            if !node.should_run {
                continue;
            }
            let log = node.log_path(node.starts);
            let last = fs::read_to_string(&log).unwrap_or_default();
            let last = last.lines().last().unwrap_or_default().to_owned();
            let what = format!("n{} ended by itself ({status}): {last}", node.index);
            self.diary.push((now(), what.clone()));
            // 99 is what it says when a disk failed under a commit, and a restart is what it asks for.
            if status.code() != Some(99) {
                self.troubles.push(what);
            }
            if let Err(error) = node.start(&self.settings) {
                self.troubles.push(format!("n{}: {error:#}", node.index));
            }
        }
    }

    fn all_vote(&self) -> bool {
        let overviews: Vec<Option<Overview>> = self.nodes.iter().map(Node::overview).collect();
        let Some(primary) = overviews.iter().flatten().find(|o| o.is_primary) else {
            return false;
        };
        overviews.iter().all(|overview| {
            let id = overview.as_ref().map(|o| &o.node.id);
            primary.voters.iter().any(|voter| Some(&voter.id) == id)
        }) && primary.voters.len() == self.nodes.len()
    }

    /// Returns the node that takes writes.
    pub(crate) fn primary(&self) -> Option<usize> {
        self.nodes
            .iter()
            .position(|node| node.overview().is_some_and(|o| o.is_primary))
    }

    /// Returns the node that takes writes, once there is one; or any that runs.
    pub(crate) fn primary_soon(&mut self) -> Result<usize> {
        let _ = self.wait("a primary", Duration::from_secs(10), |c| {
            c.primary().is_some()
        });
        crate::interrupt::check()?;
        let some = self.nodes.iter().position(Node::is_running);
        Ok(self.primary().or(some).unwrap_or(0))
    }

    /// Starts a node, and its client if it has none.
    pub(crate) fn start_node(&mut self, index: usize) -> Result<()> {
        let node = &mut self.nodes[index];
        if node.is_dark {
            node.is_dark = false;
        }
        node.start(&self.settings)?;
        self.start_client(index)
    }

    pub(crate) fn start_client(&mut self, index: usize) -> Result<()> {
        let node = &mut self.nodes[index];
        if node.client.is_some() {
            return Ok(());
        }
        node.clients += 1;
        let settings = &self.settings;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["client", "--node", &index.to_string()])
            .args(["--incarnation", &node.clients.to_string()])
            .arg("--dir")
            .arg(node.mount())
            .args(["--workload", &settings.workload.to_string()])
            .args(["--seed", &settings.seed.to_string()])
            .args(["--pace-ms", &settings.pace_ms.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(
                node.dir.join(format!("client.{}", node.clients)),
            )?);
        os::die_with_us(&mut command);
        let mut child = command.spawn().context("start a client")?;
        let said = child.stdout.take().context("a client's output")?;
        let events = self.events.clone();
        self.readers.push(std::thread::spawn(move || {
            // A last line that the killed client did not finish is no event: its operation stays open.
            for line in BufReader::new(said)
                .lines()
                .map_while(std::result::Result::ok)
            {
                if let Ok(event) = serde_json::from_str::<Event>(&line)
                    && let Ok(mut events) = events.lock()
                {
                    events.push(event);
                }
            }
        }));
        node.client = Some(child);
        Ok(())
    }

    /// Ends all clients, each once what it does is done.
    pub(crate) fn stop_clients(&mut self) {
        for node in &mut self.nodes {
            if let Some(child) = &mut node.client {
                drop(child.stdin.take());
            }
        }
        for node in &mut self.nodes {
            if let Some(mut child) = node.client.take()
                && os::wait_end(&mut child, Duration::from_secs(25)).is_none()
            {
                self.troubles
                    .push(format!("the client of n{} cannot be ended", node.index));
                os::signal(&child, libc::SIGKILL);
                os::wait_end(&mut child, END);
            }
        }
        // Those of clients that hang would never end.
        let deadline = Instant::now() + END;
        while !self
            .readers
            .iter()
            .all(std::thread::JoinHandle::is_finished)
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Pulls the plugs of machines, all at once.
    pub(crate) fn cut_power(&mut self, of: &[usize]) -> Result<()> {
        for index in of {
            self.nodes[*index].plug_out();
        }
        for index in of {
            self.nodes[*index].disk.cut()?;
        }
        for index in of {
            self.nodes[*index].gone_dark();
        }
        Ok(())
    }

    /// Switches a machine on again; nothing runs yet.
    pub(crate) fn power_on(&mut self, index: usize) -> Result<()> {
        let node = &mut self.nodes[index];
        if node.is_dark {
            node.disk.come_back()?;
        }
        Ok(())
    }

    /// A disk dies with all that is on it, and an empty one takes its place.
    pub(crate) fn lose_disk(&mut self, index: usize) -> Result<()> {
        let node = &mut self.nodes[index];
        node.plug_out();
        node.gone_dark();
        node.disk.replace()?;
        self.lost_disks.push((index, now()));
        Ok(())
    }

    /// Makes the network lose the packets from the first to the second of each pair, and no others.
    pub(crate) fn cut_network(&mut self, pairs: BTreeSet<(usize, usize)>) -> Result<()> {
        for node in &self.nodes {
            let from = |pairs: &BTreeSet<(usize, usize)>| -> Vec<String> {
                let here = pairs.iter().filter(|(_, to)| *to == node.index);
                here.map(|(from, _)| address(*from)).collect()
            };
            if from(&self.cut) != from(&pairs) {
                node.net.drop_from(&from(&pairs))?;
            }
        }
        self.cut = pairs;
        Ok(())
    }

    /// Takes back all that can be taken back.
    pub(crate) fn heal(&mut self) -> Result<()> {
        self.cut_network(BTreeSet::new())?;
        for index in 0..self.nodes.len() {
            self.power_on(index)?;
            let node = &mut self.nodes[index];
            node.disk.free()?;
            node.set_clock("+0")?;
            node.resume();
            self.start_node(index)?;
        }
        Ok(())
    }

    /// Whether all daemons have said that they are ready.
    pub(crate) fn all_ready(&self) -> bool {
        self.nodes.iter().all(|node| {
            node.is_running()
                && fs::read_to_string(node.log_path(node.starts))
                    .is_ok_and(|log| log.contains(": ready "))
        })
    }

    /// Waits until all nodes are voters that have all the primary has, as far as writes go on meanwhile.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.wait("all nodes to be ready", READY, Cluster::all_ready)?;
        self.wait("all nodes to vote", READY, Cluster::all_vote)
    }

    /// Positions of a database, as the nodes show them.
    pub(crate) fn positions(&self, db: &str) -> Vec<Option<String>> {
        self.nodes
            .iter()
            .map(|node| node.read(&format!("{db}-pos")))
            .collect()
    }

    pub(crate) fn is_level(&self, db: &str) -> bool {
        let positions = self.positions(db);
        positions[0].is_some() && positions.iter().all(|pos| *pos == positions[0])
    }

    /// Reads all of a database, in a process of its own.
    pub(crate) fn content(&self, path: &Path) -> Result<Content> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("content")
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        os::die_with_us(&mut command);
        let mut child = command.spawn()?;
        let (mut out, mut err) = (
            child.stdout.take().context("no output")?,
            child.stderr.take().context("no output")?,
        );
        let text = std::thread::spawn(move || {
            let (mut text, mut error) = (String::new(), String::new());
            let _ = std::io::Read::read_to_string(&mut out, &mut text);
            let _ = std::io::Read::read_to_string(&mut err, &mut error);
            (text, error)
        });
        let Some(status) = os::wait_end(&mut child, Duration::from_secs(60)) else {
            os::signal(&child, libc::SIGKILL);
            bail!("reading {} hangs", path.display());
        };
        let (text, error) = text
            .join()
            .map_err(|_| anyhow::anyhow!("the thread panicked"))?;
        anyhow::ensure!(
            status.success(),
            "read {}: {}",
            path.display(),
            error.trim()
        );
        Ok(serde_json::from_str(&text)?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.resume();
            node.plug_out();
        }
        for node in &mut self.nodes {
            node.gone_dark();
            // A daemon that was killed at the wrong moment leaves the bare directory immutable.
            let _ = os::run(Command::new("chattr").arg("-i").arg(node.mount()));
            if let Err(error) = node.disk.unmount() {
                eprintln!("{error:#}");
            }
        }
    }
}
