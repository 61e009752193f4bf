//! A few nodes, their disks and the network between them.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::disk::SimDisk;
use super::net::{self, Net};
use super::runtime::{self, Node};
use crate::cluster::{Cluster, Options};
use crate::error::Error;
use crate::lease::Lease;
use crate::member::{Member, NodeId};
use crate::timing::Timing;
use crate::view::View;

/// How often a condition that is waited for is looked at.
const STEP: Duration = Duration::from_millis(1);

/// Everything there is.
pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) net: Net,
    pub(crate) timing: Timing,
    slots: BTreeMap<NodeId, Slot>,
    start: tokio::time::Instant,
    log: Vec<String>,
    /// Whether notes are printed at once.
    tells: bool,
}

/// A machine, and what runs on it.
struct Slot {
    disk: Arc<SimDisk>,
    clock_ppm: u64,
    process: Option<Process>,
}

struct Process {
    node: Arc<Node>,
    cluster: Option<Cluster>,
    /// Since when the machine is suspended.
    suspended: Option<tokio::time::Instant>,
}

/// Runs a plot in a world of its own, in virtual time.
pub(crate) fn run<T, F: Future<Output = T>>(seed: u64, plot: impl FnOnce(World) -> F) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        runtime::seed(seed);
        plot(World::new(seed)).await
    })
}

impl World {
    fn new(seed: u64) -> World {
        World {
            seed,
            net: Net::new(seed),
            timing: Timing::default(),
            slots: BTreeMap::new(),
            start: tokio::time::Instant::now(),
            log: Vec::new(),
            tells: std::env::var_os("LITEFS_CONSENSUS_SEED").is_some(),
        }
    }

    /// Notes what happens, to be told if the test fails.
    pub(crate) fn note(&mut self, what: impl Into<String>) {
        let at = self.start.elapsed().as_secs_f64();
        let line = format!("{at:9.4} {}", what.into());
        if self.tells {
            println!("{line}");
        }
        self.log.push(line);
    }

    /// Returns the notes.
    pub(crate) fn story(&self) -> String {
        self.log.join("\n")
    }

    pub(crate) fn ids(&self) -> Vec<NodeId> {
        self.slots.keys().copied().collect()
    }

    /// Adds machines with good clocks.
    pub(crate) fn add(&mut self, ids: RangeInclusive<NodeId>) {
        for id in ids {
            self.add_with_clock(id, 1_000_000);
        }
    }

    pub(crate) fn add_with_clock(&mut self, id: NodeId, clock_ppm: u64) {
        let slot = Slot {
            disk: SimDisk::new(self.seed.wrapping_mul(31).wrapping_add(id)),
            clock_ppm,
            process: None,
        };
        self.slots.insert(id, slot);
    }

    fn slot(&self, id: NodeId) -> &Slot {
        &self.slots[&id]
    }

    pub(crate) fn disk(&self, id: NodeId) -> Arc<SimDisk> {
        self.slot(id).disk.clone()
    }

    /// Starts a node's process.
    pub(crate) async fn start(&mut self, id: NodeId) -> Result<(), Error> {
        let slot = self.slots.get_mut(&id).expect("a machine");
        let node = Node::new(slot.clock_ppm);
        slot.disk.attach(node.clone());
        slot.process = Some(Process {
            node: node.clone(),
            cluster: None,
            suspended: None,
        });
        let options = Options {
            dir: PathBuf::from("/raft"),
            node_id: id,
            me: member(id),
            timing: self.timing,
            transport: self.net.port(id),
        };
        let disk = slot.disk.clone();
        let opening = node.spawn(async move { Cluster::open_on(disk, options).await });
        // A process that dies while it starts never comes back with an answer.
        let Ok(opened) = tokio::time::timeout(Duration::from_secs(5), opening).await else {
            return Ok(());
        };
        let opened = opened.expect("open does not panic");
        if node.is_dead() {
            return Ok(());
        }
        let cluster = opened?;
        self.net.attach(id, node, cluster.clone());
        if let Some(process) = &mut self.slots.get_mut(&id).expect("a machine").process {
            process.cluster = Some(cluster);
        }
        Ok(())
    }

    /// As a power cut of one machine.
    pub(crate) fn kill(&mut self, id: NodeId) {
        let slot = self.slots.get_mut(&id).expect("a machine");
        if let Some(process) = slot.process.take() {
            process.node.kill();
        }
        slot.disk.crash();
        self.net.detach(id);
    }

    /// As SIGSTOP and SIGCONT; the latter also ends a suspension.
    pub(crate) fn set_paused(&mut self, id: NodeId, paused: bool) {
        let slot = self.slots.get_mut(&id).expect("a machine");
        if let Some(process) = &mut slot.process {
            if let Some(since) = process.suspended.take() {
                process.node.suspended_for(since.elapsed());
            }
            process.node.set_paused(paused);
        }
    }

    /// Suspends a machine: nothing runs there, and its monotonic clock stands still.
    pub(crate) fn suspend(&mut self, id: NodeId) {
        self.set_paused(id, true);
        let slot = self.slots.get_mut(&id).expect("a machine");
        if let Some(process) = &mut slot.process {
            process.suspended = Some(tokio::time::Instant::now());
        }
    }

    /// Says whether a process runs there, maybe paused.
    pub(crate) fn is_up(&self, id: NodeId) -> bool {
        self.slot(id)
            .process
            .as_ref()
            .is_some_and(|p| !p.node.is_dead())
    }

    /// Returns a node's process and cluster, if it runs.
    pub(crate) fn node(&self, id: NodeId) -> Option<(&Arc<Node>, &Cluster)> {
        let process = self.slot(id).process.as_ref()?;
        let cluster = process.cluster.as_ref()?;
        (!process.node.is_dead()).then_some((&process.node, cluster))
    }

    pub(crate) fn cluster(&self, id: NodeId) -> Cluster {
        self.node(id).expect("a running node").1.clone()
    }

    pub(crate) fn view(&self, id: NodeId) -> View {
        self.cluster(id).view()
    }

    /// Returns a node's lease by its own clock, also if it is paused. A suspended machine does not act on one.
    pub(crate) fn lease(&self, id: NodeId) -> Option<Lease> {
        if self.slot(id).process.as_ref()?.suspended.is_some() {
            return None;
        }
        let (node, cluster) = self.node(id)?;
        node.enter(|| cluster.lease())
    }

    /// Returns who holds a lease.
    pub(crate) fn holders(&self) -> Vec<(NodeId, Lease)> {
        let ids = self.slots.keys();
        ids.filter_map(|id| Some((*id, self.lease(*id)?))).collect()
    }

    /// Begins a call in a node's process.
    pub(crate) fn call<T, F>(
        &self,
        id: NodeId,
        call: impl FnOnce(Cluster) -> F,
    ) -> tokio::task::JoinHandle<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (node, cluster) = self.node(id).expect("a running node");
        node.spawn(call(cluster.clone()))
    }

    /// Makes a call in a node's process.
    pub(crate) async fn on<T, F>(&self, id: NodeId, call: impl FnOnce(Cluster) -> F) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.call(id, call).await.expect("no panic")
    }

    /// Lets time pass until a condition holds, and says whether it did in time.
    pub(crate) async fn until(&self, within: Duration, is_so: impl Fn(&World) -> bool) -> bool {
        let deadline = tokio::time::Instant::now() + within;
        while !is_so(self) {
            if tokio::time::Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(STEP).await;
        }
        true
    }

    /// Waits for a leader with a lease, other than some.
    pub(crate) async fn leader_except(&self, not: &[NodeId]) -> NodeId {
        let found = |w: &World| w.holders().iter().map(|h| h.0).find(|id| !not.contains(id));
        let within = Duration::from_secs(10);
        assert!(
            self.until(within, |w| found(w).is_some()).await,
            "no leader\n{}",
            self.story()
        );
        found(self).expect("found before")
    }

    pub(crate) async fn leader(&self) -> NodeId {
        self.leader_except(&[]).await
    }

    /// Makes a cluster of the first n nodes; node 1 leads.
    pub(crate) async fn form(&mut self, n: NodeId) {
        for id in 1..=n {
            self.start(id).await.expect("a start");
        }
        self.on(1, |c| async move { c.initialize("c1".into()).await })
            .await
            .expect("initialized");
        for id in 2..=n {
            self.on(1, move |c| async move {
                c.add_voter(id, member(id), None).await
            })
            .await
            .expect("a voter more");
        }
        let voters: BTreeSet<NodeId> = (1..=n).collect();
        let knows = |w: &World, id: &NodeId| {
            w.view(*id).voters.into_keys().collect::<BTreeSet<_>>() == voters
                && w.view(*id).state.cluster_id == "c1"
        };
        let known = self.until(Duration::from_secs(5), |w| (1..=n).all(|id| knows(w, &id)));
        assert!(known.await, "not all know all");
        self.leader().await;
    }

    pub(crate) async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Returns what others know of a node.
pub(crate) fn member(id: NodeId) -> Member {
    Member {
        hostname: format!("n{id}"),
        url: net::url(id),
        region: String::new(),
        priority: 0,
    }
}
