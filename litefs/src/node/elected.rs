//! What a node that elects its primary has running: Raft, the loop that follows it, and the guard of the lease.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use anyhow::Context;
use consensus::{Member, Options, Timing};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::cluster_api::Cluster;
use super::data_dir::DataDir;
use super::election::Election;
use super::members::{Joining, Members};
use super::peers::Peers;
use super::quorum::Quorum;
use super::resolve::Resolver;
use super::roles::Roles;
use super::waits::Measured;
use crate::config::{Resolved, Role};
use crate::http::cluster::ClusterApi;
use crate::replication::replicas::Replicas;

/// How long a node that stops tries to give its role away.
const LEAVE: Duration = Duration::from_secs(8);

pub(super) struct Elected {
    election: Arc<Election>,
    joining: Arc<Joining>,
    config: Resolved,
}

/// The thread that ends a tenure with its lease.
pub(super) struct Guard {
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Guard {
    pub(super) fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            tracing::error!("the guard of the lease panicked");
        }
    }
}

impl Elected {
    /// Opens Raft's files; nothing is decided yet.
    pub(super) async fn start(
        config: &Resolved,
        data_dir: &DataDir,
        roles: Roles,
        replicas: Arc<Replicas>,
        target: watch::Sender<Option<String>>,
    ) -> anyhow::Result<Elected> {
        let me = Member {
            hostname: config.lease.hostname.clone(),
            url: config.lease.advertise_url.to_string(),
            region: config.lease.election.region.clone(),
            priority: config.lease.election.priority,
        };
        let timing = (config.lease.election.ttl).map_or_else(Timing::default, Timing::of_lease);
        let peers = Peers::new()?;
        let ports = roles.ports.clone();
        let cluster = consensus::Cluster::open(Options {
            dir: data_dir.raft(),
            node_id: ports.node.node_id,
            me: me.clone(),
            timing,
            transport: Arc::new(peers.clone()),
        });
        let cluster = cluster.await.context("open the files of the election")?;
        let quorum = Quorum::new(ports.node.clone(), cluster.clone());
        replicas.set_listener(quorum.clone());
        let waits = Measured::new(quorum.clone());
        let _ = ports.node.gate.set(waits.clone());
        Ok(Elected {
            election: Arc::new(Election {
                cluster,
                me,
                roles: Arc::new(roles),
                ports,
                peers,
                replicas,
                quorum,
                waits,
                target,
                given_up: AtomicU64::new(0),
                unfenced: AtomicBool::new(false),
                outsider: AtomicBool::new(false),
                handing_over: tokio::sync::Mutex::new(()),
                changing_voters: tokio::sync::Mutex::new(()),
                last_failure: Mutex::new(None),
                trying: Mutex::new(None),
                doubtful: Mutex::default(),
            }),
            joining: Arc::default(),
            config: config.clone(),
        })
    }

    pub(super) fn api(&self) -> Arc<dyn ClusterApi> {
        Arc::new(Cluster {
            election: self.election.clone(),
            joining: self.joining.clone(),
            is_candidate: self.is_candidate(),
        })
    }

    pub(super) fn election(&self) -> Arc<Election> {
        self.election.clone()
    }

    fn is_candidate(&self) -> bool {
        self.config.lease.role == Role::Candidate
    }

    /// Begins to take part.
    pub(super) fn run(&self) -> anyhow::Result<Guard> {
        let (stop, stopped) = std::sync::mpsc::channel();
        let election = self.election.clone();
        let thread = std::thread::Builder::new()
            .name("lease".into())
            .spawn(move || election.guard(&stopped))?;
        tokio::spawn(self.election.clone().run());
        tokio::spawn(self.election.clone().tell_accepted());
        let members = Members {
            election: self.election.clone(),
            peers: self.config.lease.election.peers.clone(),
            resolver: Resolver::new(),
            is_candidate: self.is_candidate(),
            joining: self.joining.clone(),
            durability: self.config.durability,
            followed_at: std::time::Instant::now(),
            wants_role: self.config.lease.election.promote && self.is_candidate(),
        };
        tokio::spawn(members.run());
        Ok(Guard { stop, thread })
    }

    /// Gives the role away, if this node has it and another can take it.
    pub(super) async fn leave(&self) {
        let election = &self.election;
        if !election.ports.node.is_primary() || election.cluster.view().voters.len() < 2 {
            return;
        }
        match tokio::time::timeout(LEAVE, election.hand_over(None)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "nobody takes the role; the others will elect a primary"
                );
            }
            Err(_) => tracing::warn!(
                "handing the role over takes too long; the others will elect a primary"
            ),
        }
    }

    pub(super) async fn shutdown(&self) {
        self.election.cluster.shutdown().await;
    }
}
