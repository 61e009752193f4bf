//! A network in memory: delays, loss, doubled messages, and links that are cut one way or both.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::oneshot;

use super::runtime::Node;
use crate::cluster::Cluster;
use crate::member::{Member, NodeId};
use crate::transport::{BoxFuture, Transport};

/// The network; each node has its own [`Port`] to it.
#[derive(Clone)]
pub(crate) struct Net {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    rng: SmallRng,
    nodes: BTreeMap<NodeId, (Arc<Node>, Cluster)>,
    /// Pairs of sender and receiver between which nothing comes through.
    cut: BTreeSet<(NodeId, NodeId)>,
    delay_us: Range<u64>,
    lose_percent: u32,
    double_percent: u32,
    /// Where messages for a node were last sent.
    addresses: BTreeMap<NodeId, String>,
    /// What was delivered: a seed must lead to the same twice.
    trace: u64,
}

/// A node's way into the network.
pub(crate) struct Port {
    net: Net,
    from: NodeId,
}

impl Net {
    pub(crate) fn new(seed: u64) -> Net {
        Net {
            inner: Arc::new(Mutex::new(Inner {
                rng: SmallRng::seed_from_u64(seed),
                nodes: BTreeMap::new(),
                cut: BTreeSet::new(),
                delay_us: 100..1_000,
                lose_percent: 0,
                double_percent: 0,
                addresses: BTreeMap::new(),
                trace: 0,
            })),
        }
    }

    pub(crate) fn port(&self, from: NodeId) -> Arc<Port> {
        let net = self.clone();
        Arc::new(Port { net, from })
    }

    pub(crate) fn attach(&self, id: NodeId, process: Arc<Node>, cluster: Cluster) {
        self.inner.lock().nodes.insert(id, (process, cluster));
    }

    pub(crate) fn detach(&self, id: NodeId) {
        self.inner.lock().nodes.remove(&id);
    }

    /// Cuts the way from some nodes to others, not back.
    pub(crate) fn cut(&self, from: &[NodeId], to: &[NodeId]) {
        let mut inner = self.inner.lock();
        for a in from {
            inner.cut.extend(to.iter().map(|b| (*a, *b)));
        }
    }

    /// Cuts the ways between two groups.
    pub(crate) fn part(&self, some: &[NodeId], others: &[NodeId]) {
        self.cut(some, others);
        self.cut(others, some);
    }

    pub(crate) fn heal(&self) {
        self.inner.lock().cut.clear();
    }

    pub(crate) fn set_faults(&self, delay_us: Range<u64>, lose_percent: u32, double_percent: u32) {
        let mut inner = self.inner.lock();
        inner.delay_us = delay_us;
        inner.lose_percent = lose_percent;
        inner.double_percent = double_percent;
    }

    /// Returns where a message for a node was last sent.
    pub(crate) fn address(&self, to: NodeId) -> Option<String> {
        self.inner.lock().addresses.get(&to).cloned()
    }

    /// Returns a number that stands for everything that was delivered, and when.
    pub(crate) fn trace(&self) -> u64 {
        self.inner.lock().trace
    }

    /// Decides about one message: after which delays it arrives, none if it is lost.
    fn fate(&self) -> Vec<Duration> {
        let inner = &mut *self.inner.lock();
        let mut delay = || Duration::from_micros(inner.rng.random_range(inner.delay_us.clone()));
        let delays = [delay(), delay()];
        let lost = inner.rng.random_range(0..100) < inner.lose_percent;
        let doubled = inner.rng.random_range(0..100) < inner.double_percent;
        match (lost, doubled) {
            (true, _) => vec![],
            (false, false) => delays[..1].to_vec(),
            (false, true) => delays.to_vec(),
        }
    }

    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.inner.lock().cut.contains(&(from, to))
    }

    /// Carries a message to the receiver's process.
    fn deliver(
        &self,
        from: NodeId,
        to: NodeId,
        request: &Bytes,
    ) -> Option<tokio::task::JoinHandle<Bytes>> {
        if self.is_cut(from, to) {
            return None;
        }
        self.note(from, to, request);
        let (process, cluster) = self.inner.lock().nodes.get(&to)?.clone();
        let request = request.clone();
        Some(process.spawn(async move { cluster.handle(request).await }))
    }

    fn note(&self, from: NodeId, to: NodeId, bytes: &[u8]) {
        let at = format!("{:?}", super::runtime::now());
        let mut inner = self.inner.lock();
        for part in [at.as_bytes(), &from.to_be_bytes(), &to.to_be_bytes(), bytes] {
            let sum = crc32fast::hash(part);
            inner.trace = inner.trace.rotate_left(7).wrapping_mul(31) ^ u64::from(sum);
        }
    }

    async fn carry(self, from: NodeId, to: NodeId, request: Bytes, answer: oneshot::Sender<Bytes>) {
        let mut answer = Some(answer);
        let start = tokio::time::Instant::now();
        let mut delays = self.fate();
        delays.sort_unstable();
        for delay in delays {
            tokio::time::sleep_until(start + delay).await;
            let Some(task) = self.deliver(from, to, &request) else {
                continue;
            };
            let (net, answer) = (self.clone(), answer.take());
            tokio::spawn(async move {
                let Ok(bytes) = task.await else { return };
                let Some(delay) = net.fate().into_iter().next() else {
                    return;
                };
                tokio::time::sleep(delay).await;
                if !net.is_cut(to, from)
                    && let Some(answer) = answer
                {
                    let _ = answer.send(bytes);
                }
            });
        }
    }
}

impl Transport for Port {
    fn call(
        &self,
        to: NodeId,
        member: &Member,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, io::Result<Bytes>> {
        self.net
            .inner
            .lock()
            .addresses
            .insert(to, member.url.clone());
        Box::pin(async move {
            let (sender, receiver) = oneshot::channel();
            // Outside of the node: what is on its way arrives even if the sender dies.
            tokio::spawn(self.net.clone().carry(self.from, to, request, sender));
            match tokio::time::timeout(timeout, receiver).await {
                Ok(Ok(answer)) => Ok(answer),
                _ => Err(io::ErrorKind::TimedOut.into()),
            }
        })
    }
}

/// Returns the address of a node.
pub(crate) fn url(id: NodeId) -> String {
    format!("sim://{id}")
}
