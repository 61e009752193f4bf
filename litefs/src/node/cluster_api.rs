//! The node's part in elections as its HTTP API sees it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::StatusCode;
use consensus::View;

use super::election::{Election, peer, write_reply};
use super::members::Joining;
use crate::config::NodeUrl;
use crate::http::NodeError;
use crate::http::client::{Client, ClientError};
use crate::http::cluster::{
    Added, Answering, ClusterApi, FenceReply, FenceRequest, Invitation, JoinReply, JoinRequest,
    Overview, Peer, parse_id, show_id,
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

fn another_cluster(node: &str, theirs: &str, ours: &str) -> NodeError {
    NodeError::Conflict {
        what: format!("{node} belongs to cluster {theirs}, the request is of cluster {ours}"),
        remedy: "two clusters are never merged: to move the node, stop it, move its data directory away, and start it \
                 with a node of the other cluster in lease.peers"
            .to_owned(),
    }
}

/// Refuses a node that has a history of its own.
fn check_may_join(found: &Overview, ours: &str, url: &str) -> Result<(), NodeError> {
    let node = format!("{} at {url}", found.node.hostname);
    match &found.cluster_id {
        Some(theirs) if theirs != ours => Err(another_cluster(&node, theirs, ours)),
        Some(_) => Ok(()),
        None if found.database_count > 0 => Err(NodeError::Conflict {
            what: format!(
                "{node} has {} databases and belongs to no cluster",
                found.database_count
            ),
            remedy: "export what is worth keeping, and start it on an empty data directory"
                .to_owned(),
        }),
        None => Ok(()),
    }
}

fn raft_error(error: consensus::Error) -> NodeError {
    match &error {
        consensus::Error::NotLeader { leader, .. } => NodeError::NotPrimary {
            primary: leader.as_ref().map(|(_, member)| member.hostname.clone()),
        },
        consensus::Error::NoQuorum | consensus::Error::ChangeInProgress => {
            NodeError::NotReady(crate::store::chain(&error))
        }
        _ => NodeError::Conflict {
            what: crate::store::chain(&error),
            remedy: "see `litefs status`".to_owned(),
        },
    }
}

impl Cluster {
    fn check_primary(&self) -> Result<(), NodeError> {
        match self.election.ports.node.is_primary() {
            true => Ok(()),
            false => Err(NodeError::NotPrimary {
                primary: self.election.ports.lag.primary_hostname(),
            }),
        }
    }

    /// Refuses a removal after which no majority could be reached. Raft could not finish it: the members that remain
    /// have to agree to it themselves, so there is nothing that could be forced.
    async fn check_majority_without(&self, node: u64, view: &View) -> Result<(), NodeError> {
        if !view.voters.contains_key(&node) {
            return Ok(());
        }
        let election = &self.election;
        let rest = view.voters.iter().filter(|(id, _)| **id != node);
        let asked = rest.map(|(id, member)| async {
            let is_here = *id == election.node_id();
            let answers = is_here || election.peers.status(&member.url).await.is_ok();
            (format!("{} ({})", member.hostname, member.url), answers)
        });
        let rest = futures_util::future::join_all(asked).await;
        let silent: Vec<&str> = rest
            .iter()
            .filter(|(_, answers)| !answers)
            .map(|(name, _)| name.as_str())
            .collect();
        let reached = rest.len() - silent.len();
        if reached * 2 > rest.len() {
            return Ok(());
        }
        let what = match rest.len() {
            0 => "it is the only voter".to_owned(),
            all => format!(
                "of the {all} voters that would remain only {reached} can be reached, which is no majority: no answer from {}",
                silent.join(", ")
            ),
        };
        Err(NodeError::Conflict {
            what: format!("node {} cannot be removed: {what}", show_id(node)),
            remedy: match rest.len() {
                0 => "stop it; a cluster ends with its last node".to_owned(),
                _ => "start those again, or remove them first".to_owned(),
            },
        })
    }

    /// Hands the role over, and has the new primary remove this node.
    async fn leave_for_good(&self) -> Result<(), NodeError> {
        let id = show_id(self.election.node_id());
        let handed = self.election.hand_over(None).await;
        let to = handed.map_err(|error| NodeError::Conflict {
            what: format!("node {id} is the primary, and nobody takes its role: {error:#}"),
            remedy: "it stays a member; see `litefs status` and try again".to_owned(),
        })?;
        let failed = |why: String| NodeError::Conflict {
            what: format!(
                "{} is primary now, and did not remove node {id}: {why}",
                to.hostname
            ),
            remedy: "try again".to_owned(),
        };
        let url = to
            .url
            .parse::<NodeUrl>()
            .map_err(|e| failed(e.to_string()))?;
        let client = Client::new(url);
        let path = format!("/v1/cluster/remove?node={id}");
        let deadline = tokio::time::Instant::now() + PROMOTE;
        loop {
            match tokio::time::timeout(PROMOTE, client.relay(&path)).await {
                Ok(Ok(_)) => return Ok(()),
                // It may not have opened writes yet.
                Ok(Err(ClientError::Status { status, .. }))
                    if status == StatusCode::SERVICE_UNAVAILABLE
                        && tokio::time::Instant::now() < deadline => {}
                Ok(Err(error)) => return Err(failed(crate::store::chain(&error))),
                Err(_) => return Err(failed("no answer in time".to_owned())),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

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
            is_changing: view.voter_sets.len() > 1,
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

    fn add(&self, url: String) -> Answering<'_, Added> {
        Box::pin(async move {
            let election = &self.election;
            self.check_primary()?;
            let asked = election.peers.overview(&url).await;
            let found = asked.map_err(|error| NodeError::Conflict {
                what: format!("no node that elects its primary answers at {url}: {error:#}"),
                remedy: "start `litefs mount` there with lease.type: raft, and check the address"
                    .to_owned(),
            })?;
            let added = Added {
                node: found.node.clone(),
                is_candidate: found.candidate,
            };
            let id = parse_id(&found.node.id)?;
            if election.cluster.view().voters.contains_key(&id) {
                return Ok(added);
            }
            let ours = Sink::cluster_id(&*election.ports).unwrap_or_default();
            check_may_join(&found, &ours, &url)?;
            // Its members will talk to it there.
            let advertised = &found.node.url;
            match election.peers.overview(advertised).await {
                Ok(there) if there.node.id == found.node.id => {}
                answer => {
                    let instead = match answer {
                        Ok(there) => format!("node {} answers", there.node.id),
                        Err(error) => format!("nobody answers ({error:#})"),
                    };
                    return Err(NodeError::Conflict {
                        what: format!(
                            "the node at {url} says that it is reached at {advertised}, and from the primary {instead} there"
                        ),
                        remedy: "set lease.advertise-url in its litefs.yml to an address that all nodes reach, and restart it".to_owned(),
                    });
                }
            }
            let invitation = Invitation {
                cluster_id: ours,
                url: election.me.url.clone(),
            };
            let invited = election.peers.invite(advertised, &invitation).await;
            invited.map_err(|error| NodeError::Conflict {
                what: format!("the node at {url} does not join: {error:#}"),
                remedy: "see its log".to_owned(),
            })?;
            tracing::info!(
                node = found.node.id,
                url = advertised,
                "told a node to join"
            );
            Ok(added)
        })
    }

    fn invite(&self, invitation: Invitation) -> Result<(), NodeError> {
        if let Some(ours) = Sink::cluster_id(&*self.election.ports)
            && ours != invitation.cluster_id
        {
            return Err(another_cluster("this node", &ours, &invitation.cluster_id));
        }
        tracing::info!(
            cluster = invitation.cluster_id,
            by = invitation.url,
            "told to join"
        );
        self.joining.invited(invitation);
        Ok(())
    }

    fn primary_elsewhere(&self) -> Option<String> {
        let election = &self.election;
        if election.ports.node.is_primary() {
            return None;
        }
        // Who has no vote knows by whom it follows.
        let led = election.cluster.view().leader;
        match led.filter(|_| !election.is_outsider()) {
            Some((id, leader)) => (id != election.node_id()).then_some(leader.url),
            None => election.target.borrow().clone(),
        }
    }

    fn remove(&self, node: u64) -> Answering<'_, ()> {
        Box::pin(async move {
            self.check_primary()?;
            let view = self.election.cluster.view();
            if !view.voters.contains_key(&node) && !view.learners.contains_key(&node) {
                return Err(NodeError::Conflict {
                    what: format!("node {} is no member of this cluster", show_id(node)),
                    remedy: "see `litefs cluster list`; who only follows needs no removal: stop it"
                        .to_owned(),
                });
            }
            self.check_majority_without(node, &view).await?;
            if node == self.election.node_id() {
                return self.leave_for_good().await;
            }
            self.joining.forget(node);
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
            removed.map_err(|error| match error.downcast::<consensus::Error>() {
                Ok(error) => raft_error(error),
                Err(error) => NodeError::Conflict {
                    what: format!("{error:#}"),
                    remedy: "see `litefs status`, and try again".to_owned(),
                },
            })?;
            tracing::info!(node = show_id(node), "a node was removed");
            Ok(())
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
            done.map_err(raft_error)?;
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

    fn set_preferred_region(&self, region: String) -> Answering<'_, ()> {
        Box::pin(async move {
            let cluster = &self.election.cluster;
            let view = cluster.view();
            let regions: BTreeSet<&str> = (view.voters.values())
                .map(|member| member.region.as_str())
                .filter(|known| !known.is_empty())
                .collect();
            if !region.is_empty() && !regions.contains(region.as_str()) {
                let known: Vec<&str> = regions.into_iter().collect();
                return Err(NodeError::Conflict {
                    what: format!("no voter is in region `{region}`"),
                    remedy: match known.is_empty() {
                        true => "set lease.region on the voters first".to_owned(),
                        false => format!("name one of {}", known.join(", ")),
                    },
                });
            }
            let mut views = cluster.watch();
            let set = consensus::Command::SetPreferredRegion(region.clone());
            cluster.propose(set).await.map_err(raft_error)?;
            let is_known = views.wait_for(|view| view.state.preferred_region == region);
            // If another has it set otherwise meanwhile, that is what is in force.
            let _ = tokio::time::timeout(SETTLE, is_known).await;
            Ok(())
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
