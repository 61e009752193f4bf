//! How nodes find each other, and become members.
//!
//! A node without Raft's files looks at its peers. If one is a member of a cluster, it follows that cluster's primary and
//! asks to be taken in, which happens once it has all that the primary has (INV-ELECT-3). If none is, and all have
//! answered, the one with the most databases (then the lowest id) begins a cluster of itself, and the others join it.
//!
//! Who was removed knows it from the primary, which lists it no more: it follows as long as it runs, and asks to be taken
//! in only once it is invited (`litefs cluster add`). A node joins no cluster but its own, whoever invites it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use consensus::{Command, Durability, Member, NodeId, View};
use parking_lot::Mutex;

use super::election::{Election, peer};
use super::resolve::Resolver;
use crate::config::NodeUrl;
use crate::http::NodeError;
use crate::http::cluster::{Invitation, JoinReply, JoinRequest, Overview, parse_id, show_id};
use crate::replication::Sink;

const LOOK: Duration = Duration::from_millis(200);
/// Who has not asked again for so long is not waited for any more.
const FORGET: Duration = Duration::from_secs(10);
/// How long a better candidate must have been there before it gets the role.
const PREFER_AFTER: Duration = Duration::from_secs(5);

/// A member that does not follow anybody for so long looks around, though Raft knew a leader.
const LOST: Duration = Duration::from_secs(3);

/// Nodes that want to be members, and who wants this one.
#[derive(Debug, Default)]
pub(super) struct Joining {
    asked: Mutex<HashMap<NodeId, (Member, Instant)>>,
    invitation: Mutex<Option<Invitation>>,
}

/// What this node knows of the nodes it was told of.
pub(super) struct Members {
    pub(super) election: Arc<Election>,
    pub(super) peers: Vec<NodeUrl>,
    pub(super) resolver: Resolver,
    pub(super) is_candidate: bool,
    pub(super) joining: Arc<Joining>,
    pub(super) wants_role: bool,
    /// What a cluster that this node begins starts with.
    pub(super) durability: Durability,
    /// When it last followed somebody, or was primary.
    pub(super) followed_at: Instant,
}

impl Members {
    /// Runs until the process ends.
    pub(super) async fn run(mut self) {
        let mut said = String::new();
        let mut preferred: Option<(NodeId, Instant)> = None;
        loop {
            match self.look().await {
                Ok(()) => said.clear(),
                Err(error) => {
                    let error = format!("{error:#}");
                    if error != said {
                        tracing::warn!(error, "cluster");
                        said = error;
                    }
                }
            }
            self.prefer(&mut preferred).await;
            self.want_role().await;
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn look(&mut self) -> anyhow::Result<()> {
        let election = self.election.clone();
        let view = election.cluster.view();
        let is_primary = election.ports.node.is_primary();
        let is_connected = election.ports.is_connected.load(Ordering::Acquire);
        if is_primary || is_connected {
            self.followed_at = Instant::now();
        }
        if is_primary {
            self.settled();
            return self.take_in(&view).await;
        }
        let is_member = view.voters.get(&election.node_id()) == Some(&election.me);
        let is_led = view.leader.is_some() && self.followed_at.elapsed() < LOST;
        let invitation = self.joining.invitation.lock().clone();
        let is_content = is_connected || is_led && !election.is_outsider();
        if is_member && is_content && invitation.is_none() {
            return Ok(());
        }
        let overviews = self.ask_all(&view, invitation.as_ref()).await;
        let ours = Sink::cluster_id(&*election.ports);
        let wanted = ours
            .clone()
            .or(invitation.as_ref().map(|i| i.cluster_id.clone()));
        let is_of_another = |o: &&Overview| ours.is_none() && o.cluster_id != wanted;
        let others: Vec<&Overview> = overviews
            .iter()
            .filter_map(|(_, o)| o.as_ref().ok())
            .filter(|o| invitation.is_none() || !is_of_another(o))
            .collect();
        if let Some(other) = others
            .iter()
            .find(|o| o.cluster_id.is_some() && ours.is_some() && o.cluster_id != ours)
        {
            anyhow::bail!(
                "{} at {} belongs to cluster {}, this node to {}: remove it from lease.peers, or start one of the two on an empty data directory",
                other.node.hostname,
                other.node.url,
                other.cluster_id.as_deref().unwrap_or_default(),
                ours.unwrap_or_default()
            );
        }
        let newest = others
            .iter()
            .filter(|o| o.primary.is_some())
            .max_by_key(|o| o.epoch);
        if let Some(primary) = newest.and_then(|o| o.primary.as_ref())
            && primary.id != show_id(election.node_id())
        {
            let own_word = others
                .iter()
                .find(|o| o.is_primary && o.node.id == primary.id);
            let is_listed = own_word.is_some_and(|o| lists(o, &show_id(election.node_id())));
            let is_removed = own_word.is_some() && !is_listed && has_had_a_vote(&view);
            election.outsider.store(is_removed, Ordering::Release);
            if view.leader.is_none() || is_removed {
                election.follow_url(&primary.url);
            }
            let is_voter = own_word.is_some_and(|o| {
                let me = show_id(election.node_id());
                o.voters.iter().any(|p| p.id == me)
            });
            if is_voter || !self.is_candidate {
                self.settled();
            }
            if self.is_candidate && is_removed && invitation.is_none() {
                anyhow::bail!(
                    "this node was removed from cluster {}: it follows {} without a vote; stop it, or take it in again (litefs cluster add {})",
                    ours.unwrap_or_default(),
                    primary.hostname,
                    election.me.url
                );
            }
            if self.is_candidate {
                self.ask_to_join(&primary.url).await?;
            }
            return Ok(());
        }
        if !self.is_candidate || election.cluster.is_initialized() {
            return Ok(());
        }
        self.begin(&overviews).await
    }

    /// What an invitation was for is done.
    fn settled(&self) {
        *self.joining.invitation.lock() = None;
    }

    async fn ask_all(
        &self,
        view: &View,
        invitation: Option<&Invitation>,
    ) -> Vec<(String, anyhow::Result<Overview>)> {
        let election = &self.election;
        let found = self.peers.iter().map(|peer| self.resolver.nodes(peer));
        let found = futures_util::future::join_all(found).await;
        let (mut urls, mut answers) = (Vec::new(), Vec::new());
        for (peer, nodes) in self.peers.iter().zip(found) {
            match nodes {
                Ok(nodes) => urls.extend(nodes.iter().map(ToString::to_string)),
                Err(error) => answers.push((peer.to_string(), Err(error))),
            }
        }
        if let Some(invitation) = invitation
            && !urls.contains(&invitation.url)
        {
            urls.push(invitation.url.clone());
        }
        for (id, member) in view.voters.iter().chain(&view.learners) {
            if *id != election.node_id() && !urls.contains(&member.url) {
                urls.push(member.url.clone());
            }
        }
        let asked = urls.into_iter().map(|url| async {
            let overview = election.peers.overview(&url).await;
            (url, overview)
        });
        let me = show_id(election.node_id());
        answers.extend(futures_util::future::join_all(asked).await);
        answers.retain(|(url, overview)| match overview {
            Ok(overview) => overview.node.id != me,
            Err(_) => *url != election.me.url,
        });
        answers
    }

    async fn ask_to_join(&self, url: &str) -> anyhow::Result<()> {
        let election = &self.election;
        let request = JoinRequest {
            cluster_id: Sink::cluster_id(&*election.ports),
            node: peer(election.node_id(), &election.me),
        };
        election.peers.join(url, &request).await.map(drop)
    }

    /// Begins a cluster, if that is this node's to do.
    async fn begin(&self, overviews: &[(String, anyhow::Result<Overview>)]) -> anyhow::Result<()> {
        let election = &self.election;
        let mut first = (
            self.database_count(),
            std::cmp::Reverse(show_id(election.node_id())),
        );
        for (url, overview) in overviews {
            let overview = match overview {
                Ok(overview) => overview,
                Err(error) => anyhow::bail!(
                    "waiting for {url} before a cluster is begun ({error:#}): start it, or remove it from lease.peers"
                ),
            };
            if overview.is_member {
                anyhow::bail!(
                    "{} is a member of a cluster that has no primary now: start more of its nodes",
                    overview.node.url
                );
            }
            if overview.candidate {
                first = first.max((
                    overview.database_count,
                    std::cmp::Reverse(overview.node.id.clone()),
                ));
            }
        }
        if first.1.0 != show_id(election.node_id()) {
            return Ok(());
        }
        let id = match Sink::cluster_id(&*election.ports) {
            Some(id) => id,
            None => {
                let id = format!("LFSC{:016X}", rand::random::<u64>());
                election.ports.adopt_cluster_id(&id)?;
                id
            }
        };
        tracing::info!(cluster = id, "beginning a cluster");
        election.cluster.initialize(id).await?;
        if self.durability != Durability::Async {
            let set = Command::SetDurability {
                db: None,
                value: Some(self.durability),
            };
            election.cluster.propose(set).await?;
        }
        Ok(())
    }

    fn database_count(&self) -> u64 {
        self.election.ports.positions().len() as u64
    }

    /// Makes voters of nodes that asked and are level.
    async fn take_in(&self, view: &View) -> anyhow::Result<()> {
        let asked: Vec<(NodeId, Member)> = {
            let mut asked = self.joining.asked.lock();
            asked.retain(|_, (_, at)| at.elapsed() < FORGET);
            asked
                .iter()
                .map(|(id, (member, _))| (*id, member.clone()))
                .collect()
        };
        let epoch = self.election.ports.node.epoch.load(Ordering::Acquire);
        for (id, member) in asked {
            let known = view.voters.get(&id);
            if known == Some(&member) {
                self.joining.asked.lock().remove(&id);
                continue;
            }
            if known.is_some() {
                self.election.cluster.update_member(id, member).await?;
                continue;
            }
            let overview = self.election.peers.overview(&member.url).await?;
            if parse_id(&overview.node.id)? != id || overview.accepted_epoch != epoch {
                continue; // not level yet
            }
            let replaces = view
                .voters
                .iter()
                .find(|(other, m)| m.url == member.url && **other != self.election.node_id())
                .map(|(other, _)| *other);
            tracing::info!(
                node = show_id(id),
                url = member.url,
                replaces = replaces.map(show_id),
                "taking a node in"
            );
            let stay = view.voters.iter().filter(|(id, _)| Some(**id) != replaces);
            let mut goal: BTreeMap<NodeId, String> =
                stay.map(|(id, m)| (*id, m.url.clone())).collect();
            goal.insert(id, member.url.clone());
            let change = self.election.cluster.add_voter(id, member, replaces);
            self.election.change_voters(goal, change).await?;
        }
        Ok(())
    }

    /// Gives the role to a voter that is wanted more, by region and priority, and is level.
    async fn prefer(&self, preferred: &mut Option<(NodeId, Instant)>) {
        let election = &self.election;
        let best = if election.ports.node.is_primary() {
            let view = election.cluster.view();
            let connected = election.replicas.list();
            let own = view.state.preference(&election.me);
            view.voters
                .iter()
                .filter(|(id, m)| {
                    view.state.preference(m) > own
                        && connected
                            .iter()
                            .any(|r| r.is_connected && r.node_id == **id)
                })
                .max_by_key(|(_, m)| view.state.preference(m))
                .map(|(id, _)| *id)
        } else {
            None
        };
        match (best, *preferred) {
            (Some(id), Some((same, since))) if id == same => {
                if since.elapsed() >= PREFER_AFTER {
                    *preferred = None;
                    if let Err(error) = election.hand_over(Some(id)).await {
                        tracing::warn!(
                            to = show_id(id),
                            error = format!("{error:#}"),
                            "the preferred node does not take the role"
                        );
                    }
                }
            }
            (Some(id), _) => *preferred = Some((id, Instant::now())),
            (None, _) => *preferred = None,
        }
    }

    /// `lease.promote`: asks for the role, once.
    async fn want_role(&mut self) {
        let election = &self.election;
        if !self.wants_role || !*election.ports.ready.borrow() {
            return;
        }
        if election.ports.node.is_primary() {
            self.wants_role = false;
            return;
        }
        let view = election.cluster.view();
        if let Some((_, leader)) = view.leader
            && view.voters.contains_key(&election.node_id())
        {
            self.wants_role = false;
            if let Err(error) = election
                .peers
                .handoff(&leader.url, election.node_id(), FORGET)
                .await
            {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "lease.promote: the primary keeps its role"
                );
            }
        }
    }
}

fn lists(overview: &Overview, id: &str) -> bool {
    let mut members = overview.voters.iter().chain(&overview.learners);
    members.any(|member| member.id == id)
}

/// Whether this node's own log has made it a voter, or has members and does not have this node among them.
fn has_had_a_vote(view: &View) -> bool {
    let is =
        |members: &std::collections::BTreeMap<NodeId, Member>| members.contains_key(&view.node_id);
    is(&view.voters) || !view.voters.is_empty() && !is(&view.learners)
}

impl Joining {
    /// Remembers who wants this node as a member.
    pub(super) fn invited(&self, invitation: Invitation) {
        *self.invitation.lock() = Some(invitation);
    }

    /// Forgets that a node asked.
    pub(super) fn forget(&self, node: NodeId) {
        self.asked.lock().remove(&node);
    }

    /// Takes a request in, for the loop to see to.
    pub(super) fn ask(
        &self,
        election: &Election,
        request: &JoinRequest,
    ) -> Result<JoinReply, NodeError> {
        let ours = Sink::cluster_id(&*election.ports);
        let Some(cluster_id) = ours.filter(|_| election.ports.node.is_primary()) else {
            return Err(NodeError::NotPrimary {
                primary: election.ports.lag.primary_hostname(),
            });
        };
        if let Some(theirs) = request.cluster_id.as_ref().filter(|id| **id != cluster_id) {
            return Err(NodeError::Conflict {
                what: format!("this is cluster {cluster_id}, and the node belongs to {theirs}"),
                remedy: "start it on an empty data directory to move it here".to_owned(),
            });
        }
        let member = Member {
            hostname: request.node.hostname.clone(),
            url: request.node.url.clone(),
            region: request.node.region.clone(),
            priority: request.node.priority,
        };
        let id = parse_id(&request.node.id)?;
        self.asked.lock().insert(id, (member, Instant::now()));
        Ok(JoinReply { cluster_id })
    }
}
