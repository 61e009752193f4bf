//! The node's part in elections as its HTTP API sees it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Bytes;

use super::election::{Election, peer, write_reply};
use super::members::Joining;
use crate::http::NodeError;
use crate::http::cluster::{
    Answering, ClusterApi, FenceReply, FenceRequest, JoinReply, JoinRequest, Overview, Peer,
    parse_id, show_id,
};
use crate::replication::Sink;

/// How long the winner's request may be ahead of what this node hears of the election.
const ELECTED: Duration = Duration::from_millis(500);
/// How long until this node itself goes by what was agreed on.
const SETTLE: Duration = Duration::from_millis(500);
/// How long a promotion may take.
const PROMOTE: Duration = Duration::from_secs(10);

pub(super) struct Cluster {
    pub(super) election: Arc<Election>,
    pub(super) joining: Arc<Joining>,
    pub(super) is_candidate: bool,
}

fn failed(what: &'static str) -> impl Fn(anyhow::Error) -> NodeError {
    move |error| NodeError::NotReady(format!("{what}: {error:#}"))
}

impl Cluster {
    fn check(&self, cluster_id: &str) -> Result<(), NodeError> {
        match Sink::cluster_id(&*self.election.ports) {
            Some(ours) if ours == cluster_id => Ok(()),
            ours => Err(NodeError::Conflict {
                what: format!(
                    "this node belongs to cluster {}, the request to {cluster_id}",
                    ours.as_deref().unwrap_or("none")
                ),
                remedy: "check lease.peers of both nodes".to_owned(),
            }),
        }
    }
}

impl ClusterApi for Cluster {
    fn overview(&self) -> Overview {
        let election = &self.election;
        let (view, node) = (election.cluster.view(), &election.ports.node);
        let me = peer(election.node_id(), &election.me);
        let list = |members: &std::collections::BTreeMap<u64, consensus::Member>| {
            members.iter().map(|(id, m)| peer(*id, m)).collect()
        };
        let is_primary = node.is_primary();
        let primary = match &view.leader {
            _ if is_primary => Some(me.clone()),
            Some((id, member)) if *id != election.node_id() => Some(peer(*id, member)),
            _ => None,
        };
        Overview {
            cluster_id: Sink::cluster_id(&*election.ports),
            node: me,
            candidate: self.is_candidate,
            is_member: election.cluster.is_initialized(),
            epoch: view.epoch,
            accepted_epoch: election.ports.accepted_epoch.load(Ordering::Acquire),
            primary,
            is_primary,
            voters: list(&view.voters),
            learners: list(&view.learners),
            database_count: Sink::positions(&*election.ports).len() as u64,
            unheld: match is_primary {
                true => election.ports.unheld(),
                false => Vec::new(),
            },
        }
    }

    fn raft(&self, request: Bytes) -> Answering<'_, Bytes> {
        Box::pin(async move { Ok(self.election.cluster.handle(request).await) })
    }

    fn fence(&self, request: FenceRequest) -> Answering<'_, FenceReply> {
        Box::pin(async move {
            self.check(&request.cluster_id)?;
            let election = self.election.clone();
            let epoch = request.epoch;
            // Raft's word, not the request's: an epoch that nobody was elected in would lock the cluster out.
            let mut views = self.election.cluster.watch();
            let is_seen = *self.election.ports.seen_epoch.read() >= epoch;
            let known = views.wait_for(|view| view.epoch >= epoch);
            if !is_seen && tokio::time::timeout(ELECTED, known).await.is_err() {
                return Err(NodeError::NotReady(format!(
                    "this node has not heard of an election in epoch {epoch}"
                )));
            }
            let report = tokio::task::spawn_blocking(move || election.fence_here(epoch))
                .await
                .map_err(|e| failed("fence")(e.into()))?
                .map_err(failed("fence"))?;
            tracing::info!(epoch, winner = request.node, "fenced for a new tenure");
            Ok(write_reply(&report))
        })
    }

    fn join(&self, request: JoinRequest) -> Answering<'_, JoinReply> {
        Box::pin(async move { self.joining.ask(&self.election, &request) })
    }

    fn remove(&self, node: u64) -> Answering<'_, ()> {
        Box::pin(async move {
            let election = self.election.clone();
            // Seen through even if who asked loses interest.
            let removing = tokio::spawn(async move {
                let view = election.cluster.view();
                if !view.voters.contains_key(&node) {
                    return Ok(election.cluster.remove(node).await?);
                }
                let stay = view.voters.iter().filter(|(id, _)| **id != node);
                let goal = stay.map(|(id, m)| (*id, m.url.clone())).collect();
                let change = election.cluster.remove(node);
                election.change_voters(goal, change).await
            });
            let removed = removing.await.map_err(|e| failed("remove")(e.into()))?;
            removed.map_err(|error: anyhow::Error| NodeError::Conflict {
                what: format!("{error:#}"),
                remedy: "see GET /v1/cluster, and ask the primary".to_owned(),
            })
        })
    }

    fn opened(&self, request: FenceRequest) {
        let view = self.election.cluster.view();
        let is_newest = request.epoch >= *self.election.ports.seen_epoch.read();
        let members = view.voters.iter().chain(&view.learners);
        let primary = members
            .into_iter()
            .find(|(id, _)| show_id(**id) == request.node);
        if let Some((id, member)) = primary
            && is_newest
            && *id != self.election.node_id()
            && self.check(&request.cluster_id).is_ok()
        {
            self.election.follow_now(&member.url);
        }
    }

    fn accepted(&self, request: FenceRequest) {
        if let Ok(id) = parse_id(&request.node)
            && self.check(&request.cluster_id).is_ok()
        {
            self.election.quorum.accepted(id, request.epoch);
        }
    }

    fn set_durability(
        &self,
        db: Option<String>,
        value: Option<consensus::Durability>,
    ) -> Answering<'_, Vec<String>> {
        Box::pin(async move {
            let set = consensus::Command::SetDurability {
                db: db.clone(),
                value,
            };
            let mut views = self.election.cluster.watch();
            let done = self.election.cluster.propose(set).await;
            done.map_err(|error| NodeError::Conflict {
                what: crate::store::chain(&error),
                remedy: "ask the primary".to_owned(),
            })?;
            let is_known = views.wait_for(|view| match &db {
                Some(db) => view.state.databases.get(db).copied() == value,
                None => view.state.durability == value.unwrap_or_default(),
            });
            // If another has it set otherwise meanwhile, that is what is in force.
            let _ = tokio::time::timeout(SETTLE, is_known).await;
            self.election.ports.warn_of_unheld();
            Ok(self.election.ports.unheld())
        })
    }

    fn handoff(&self, to: Option<u64>) -> Answering<'_, Peer> {
        Box::pin(async move {
            if !self.election.ports.node.is_primary() {
                return Err(NodeError::NotPrimary {
                    primary: self.election.ports.lag.primary_hostname(),
                });
            }
            self.election
                .hand_over(to)
                .await
                .map_err(|error| NodeError::Conflict {
                    what: format!("handoff: {error:#}"),
                    remedy: "this node stays the primary; see GET /v1/cluster and try again"
                        .to_owned(),
                })
        })
    }

    fn promote(&self) -> Answering<'_, Peer> {
        Box::pin(async move {
            let election = &self.election;
            let me = peer(election.node_id(), &election.me);
            if election.ports.node.is_primary() {
                return Ok(me);
            }
            let conflict = |what: String| NodeError::Conflict {
                what,
                remedy:
                    "see GET /v1/cluster; a node becomes a voter once it is level with the primary"
                        .to_owned(),
            };
            let view = election.cluster.view();
            if !view.voters.contains_key(&election.node_id()) {
                return Err(conflict(
                    "this node does not vote in its cluster".to_owned(),
                ));
            }
            let Some((_, leader)) = view.leader else {
                return Err(NodeError::NotReady("no primary is known".to_owned()));
            };
            let handed = election
                .peers
                .handoff(&leader.url, election.node_id(), PROMOTE)
                .await;
            handed.map_err(|error| conflict(format!("{error:#}")))?;
            let deadline = tokio::time::Instant::now() + PROMOTE;
            while !election.ports.node.is_primary() {
                if tokio::time::Instant::now() > deadline {
                    return Err(NodeError::NotReady("the role did not arrive".to_owned()));
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok(me)
        })
    }
}
