//! Three nodes in one process, on real disks and a real clock: how long until another leads.
//!
//! `cargo run --release -p consensus --example failover -- [rounds]`. In each round the leader falls silent, as if its
//! machine were gone, and comes back later; then the new leader hands over, and both times are noted.
//! Prints the distributions, from the last act of the old leader to a valid lease of the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use consensus::{BoxFuture, Cluster, Member, NodeId, Options, Timing, Transport};

/// Calls from one node to another are function calls, unless one of them is silent.
#[derive(Clone, Default)]
struct Wire {
    nodes: Arc<Mutex<BTreeMap<NodeId, Cluster>>>,
    silent: Arc<Mutex<BTreeSet<NodeId>>>,
}

struct Port {
    wire: Wire,
    from: NodeId,
}

impl Wire {
    fn peer(&self, from: NodeId, to: NodeId) -> Option<Cluster> {
        let silent = self.silent.lock().ok()?;
        if silent.contains(&from) || silent.contains(&to) {
            return None;
        }
        self.nodes.lock().ok()?.get(&to).cloned()
    }
}

impl Transport for Port {
    fn call(
        &self,
        to: NodeId,
        _member: &Member,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, io::Result<Bytes>> {
        Box::pin(async move {
            let Some(peer) = self.wire.peer(self.from, to) else {
                tokio::time::sleep(timeout).await;
                return Err(io::ErrorKind::TimedOut.into());
            };
            let answer = tokio::spawn(async move { peer.handle(request).await });
            let answer = tokio::time::timeout(timeout, answer).await;
            let answer = answer.map_err(io::Error::from)?.map_err(io::Error::other)?;
            match self.wire.peer(self.from, to) {
                Some(_) => Ok(answer),
                None => Err(io::ErrorKind::TimedOut.into()),
            }
        })
    }
}

/// Waits until a node other than one holds a lease.
async fn leader_except(nodes: &BTreeMap<NodeId, Cluster>, not: NodeId) -> NodeId {
    loop {
        let found = nodes
            .iter()
            .find(|(id, c)| **id != not && c.lease().is_some());
        if let Some((id, _)) = found {
            return *id;
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
}

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!(
        "{what}: {} times, min {:?}, median {:?}, 90% {:?}, 99% {:?}, max {:?}",
        times.len(),
        at(0),
        at(50),
        at(90),
        at(99),
        at(100),
    );
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds: u32 = std::env::args().nth(1).map_or(Ok(30), |n| n.parse())?;
    let dir = tempfile::tempdir()?;
    let wire = Wire::default();
    let member = |id: NodeId| Member {
        hostname: format!("n{id}"),
        url: format!("mem://{id}"),
        region: String::new(),
        priority: 0,
    };
    let mut nodes = BTreeMap::new();
    for id in 1..=3 {
        let cluster = Cluster::open(Options {
            dir: dir.path().join(id.to_string()),
            node_id: id,
            me: member(id),
            timing: Timing::default(),
            transport: Arc::new(Port {
                wire: wire.clone(),
                from: id,
            }),
        })
        .await?;
        nodes.insert(id, cluster);
    }
    if let Ok(mut shared) = wire.nodes.lock() {
        shared.clone_from(&nodes);
    }
    nodes[&1].initialize("example".into()).await?;
    for id in 2..=3 {
        nodes[&1].add_voter(id, member(id), None).await?;
    }

    let (mut failovers, mut transfers) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let old = leader_except(&nodes, 0).await;
        // At any moment between two heartbeats.
        tokio::time::sleep(Duration::from_millis(300 + u64::from(round) * 37 % 120)).await;
        let silence = |on: bool| {
            if let Ok(mut silent) = wire.silent.lock() {
                if on {
                    silent.insert(old)
                } else {
                    silent.remove(&old)
                };
            }
        };
        silence(true);
        let begin = Instant::now();
        let new = leader_except(&nodes, old).await;
        failovers.push(begin.elapsed());
        silence(false);
        tokio::time::sleep(Duration::from_millis(300)).await;

        let begin = Instant::now();
        nodes[&new].transfer(old).await?;
        let next = leader_except(&nodes, new).await;
        transfers.push(begin.elapsed());
        assert_eq!(next, old);
    }
    print("failover", failovers);
    print("transfer", transfers);
    for cluster in nodes.values() {
        cluster.shutdown().await;
    }
    Ok(())
}
