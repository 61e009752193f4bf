//! The cluster as this node sees it: what `GET /v1/status` answers. Asking is here, [`put_together`] decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::election::{Election, peer};
use super::peers::Peers;
use super::ports::Ports;
use super::resolve::Resolver;
use crate::config::{NodeUrl, Resolved, Role, show_durability};
use crate::http::cluster::{Answering, Peer, show_id};
use crate::http::status::{
    DbCopy, DbRow, DbStanding, LeaseType, NodeRole, NodeRow, NodeStatus, ReplicaSeen, Status,
    StatusApi,
};
use crate::ltx::Pos;
use crate::replication::Sink;
use crate::replication::replicas::{ReplicaStatus, Replicas};

/// A replica that left is shown for so long; after that, only if it is a member.
const SHOW_DEPARTED: Duration = Duration::from_secs(600);

pub(super) struct Desk {
    ports: Arc<Ports>,
    replicas: Arc<Replicas>,
    election: Option<Arc<Election>>,
    peers: Peers,
    is_candidate: bool,
    /// This node, as its configuration has it; of a static replica its own address is not known.
    me: Peer,
    /// Where others may be, by configuration.
    configured: Vec<NodeUrl>,
    resolver: Resolver,
}

impl Desk {
    pub(super) fn new(
        config: &Resolved,
        hostname: String,
        ports: Arc<Ports>,
        replicas: Arc<Replicas>,
        election: Option<Arc<Election>>,
    ) -> anyhow::Result<Desk> {
        let lease = &config.lease;
        let is_static_replica = lease.role == Role::Replica;
        let mut configured = lease.election.peers.clone();
        if is_static_replica {
            configured.push(lease.advertise_url.clone());
        }
        let me = Peer {
            id: show_id(ports.node.node_id),
            hostname,
            url: match is_static_replica {
                true => String::new(),
                false => lease.advertise_url.to_string(),
            },
            region: lease.election.region.clone(),
            priority: lease.election.priority,
        };
        Ok(Desk {
            ports,
            replicas,
            election,
            peers: Peers::new()?,
            is_candidate: config.is_candidate(),
            me,
            configured,
            resolver: Resolver::new(),
        })
    }
}

impl StatusApi for Desk {
    fn node_status(&self) -> NodeStatus {
        let node = &self.ports.node;
        let is_primary = node.is_primary();
        let view = self.election.as_ref().map(|e| e.cluster.view());
        let list = |members: &BTreeMap<u64, consensus::Member>| -> Vec<Peer> {
            members.iter().map(|(id, m)| peer(*id, m)).collect()
        };
        let lag = self.ports.lag.known_ms(is_primary);
        let databases = self.ports.store.all();
        let databases = databases.iter().map(|db| (db.name(), db.published()));
        let state = view.as_ref().map(|v| &v.state);
        NodeStatus {
            lease: match self.election {
                Some(_) => LeaseType::Raft,
                None => LeaseType::Static,
            },
            cluster_id: Sink::cluster_id(&*self.ports),
            node: self.me.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            is_primary,
            candidate: self.is_candidate,
            epoch: match &view {
                Some(view) => view.epoch.max(*self.ports.seen_epoch.read()),
                None if is_primary => node.epoch.load(Ordering::Acquire),
                None => self.ports.followed_epoch.load(Ordering::Acquire),
            },
            lag_ms: lag.map(i64::unsigned_abs),
            durability: state.map(|s| show_durability(s.durability)),
            database_durability: state
                .iter()
                .flat_map(|s| &s.databases)
                .map(|(db, value)| (db.clone(), show_durability(*value)))
                .collect(),
            preferred_region: state
                .map(|s| s.preferred_region.clone())
                .unwrap_or_default(),
            voters: view.as_ref().map(|v| list(&v.voters)).unwrap_or_default(),
            learners: view.as_ref().map(|v| list(&v.learners)).unwrap_or_default(),
            is_changing: view.as_ref().is_some_and(|v| v.voter_sets.len() > 1),
            databases: databases
                .filter(|(_, at)| at.pos.txid.0 > 0)
                .map(|(name, at)| DbStanding {
                    name: name.to_string(),
                    pos: at.pos.to_string(),
                    committed_ms: at.timestamp_ms,
                })
                .collect(),
            unheld: match is_primary {
                true => self.ports.unheld(),
                false => Vec::new(),
            },
            replicas: seen(self.replicas.list(), Instant::now()),
        }
    }

    fn status(&self) -> Answering<'_, Status> {
        Box::pin(async move {
            let own = self.node_status();
            let found = self.configured.iter().map(|peer| self.resolver.nodes(peer));
            let found = futures_util::future::join_all(found).await;
            // A name that stands for nothing is in this node's log; its members are known by their own.
            let found = found.into_iter().flatten().flatten();
            let mut urls: Vec<String> = found.map(|url| url.to_string()).collect();
            urls.extend(
                own.voters
                    .iter()
                    .chain(&own.learners)
                    .map(|p| p.url.clone()),
            );
            let urls: BTreeSet<String> = urls
                .into_iter()
                .map(|url| url.trim_end_matches('/').to_owned())
                .filter(|url| !url.is_empty() && *url != own.node.url.trim_end_matches('/'))
                .collect();
            let asked = urls.into_iter().map(|url| async {
                let answer = self.peers.status(&url).await;
                (url, answer.map_err(|error| format!("{error:#}")))
            });
            let answers = futures_util::future::join_all(asked).await;
            Ok(put_together(own, answers))
        })
    }
}

fn seen(replicas: Vec<ReplicaStatus>, now: Instant) -> Vec<ReplicaSeen> {
    let ago = |r: &ReplicaStatus| now.saturating_duration_since(r.heard_at);
    let shown = replicas
        .into_iter()
        .filter(|r| r.is_connected || ago(r) < SHOW_DEPARTED);
    shown
        .map(|r| ReplicaSeen {
            id: show_id(r.node_id),
            hostname: r.hostname.clone(),
            is_connected: r.is_connected,
            heard_ms_ago: u64::try_from(ago(&r).as_millis()).unwrap_or(u64::MAX),
            databases: r
                .dbs
                .iter()
                .filter(|(_, at)| at.acked.pos.txid.0 > 0)
                .map(|(name, at)| DbStanding {
                    name: name.to_string(),
                    pos: at.acked.pos.to_string(),
                    committed_ms: 0,
                })
                .collect(),
        })
        .collect()
}

/// Everything about one node that was found out.
struct Found {
    row: NodeRow,
    databases: BTreeMap<String, DbStanding>,
}

/// Puts together what this node knows and what the nodes at these addresses answered.
fn put_together(own: NodeStatus, answers: Vec<(String, Result<NodeStatus, String>)>) -> Status {
    let is_ours = |s: &NodeStatus| {
        own.cluster_id.is_none() || s.cluster_id.is_none() || s.cluster_id == own.cluster_id
    };
    let heard: Vec<&NodeStatus> = std::iter::once(&own)
        .chain(answers.iter().filter_map(|(_, a)| a.as_ref().ok()))
        .filter(|s| is_ours(s))
        .collect();
    let primary = heard
        .iter()
        .filter(|s| s.is_primary)
        .max_by_key(|s| s.epoch);
    // Who leads knows best who is a member, then who has heard most.
    let newest = heard
        .iter()
        .copied()
        .max_by_key(|s| (s.is_primary, s.epoch, s.voters.len()));
    let newest = newest.unwrap_or(&own);
    let primary_id = primary.map(|p| p.node.id.clone());

    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    for status in &heard {
        let is_voter = newest.voters.iter().any(|v| v.id == status.node.id);
        let role = match () {
            () if Some(&status.node.id) == primary_id.as_ref() => NodeRole::Primary,
            () if is_voter => NodeRole::Voter,
            () => NodeRole::Follower,
        };
        let databases = status
            .databases
            .iter()
            .map(|db| (db.name.clone(), db.clone()));
        let entry = Found {
            row: NodeRow {
                node: status.node.clone(),
                role,
                votes: is_voter,
                version: Some(status.version.clone()),
                lag_ms: status.lag_ms,
                error: None,
            },
            databases: databases.collect(),
        };
        found.entry(status.node.id.clone()).or_insert(entry);
    }
    let error_of = |url: &str| {
        let at = answers
            .iter()
            .find(|(asked, _)| asked == url.trim_end_matches('/'));
        match at {
            Some((_, Err(error))) => error.clone(),
            Some((_, Ok(other))) => format!("node {} answers there", other.node.id),
            None => "this node was not told of it yet".to_owned(),
        }
    };
    for (member, votes) in newest
        .voters
        .iter()
        .map(|m| (m, true))
        .chain(newest.learners.iter().map(|m| (m, false)))
    {
        found.entry(member.id.clone()).or_insert_with(|| Found {
            row: NodeRow {
                node: member.clone(),
                role: NodeRole::Unreachable,
                votes,
                version: None,
                lag_ms: None,
                error: Some(error_of(&member.url)),
            },
            databases: BTreeMap::new(),
        });
    }
    for replica in heard.iter().flat_map(|s| &s.replicas) {
        let databases = || {
            replica
                .databases
                .iter()
                .map(|db| (db.name.clone(), db.clone()))
        };
        match found.get_mut(&replica.id) {
            // Reached by others, if not from here.
            Some(known) if known.databases.is_empty() && replica.is_connected => {
                known.databases = databases().collect();
            }
            Some(_) => {}
            None => {
                let entry = unlisted(replica, databases().collect());
                found.insert(replica.id.clone(), entry);
            }
        }
    }
    let mut rows: Vec<Found> = found.into_values().collect();
    rows.sort_by(|a, b| {
        let key = |f: &Found| {
            (
                f.row.role,
                f.row.node.hostname.clone(),
                f.row.node.id.clone(),
            )
        };
        key(a).cmp(&key(b))
    });
    let databases = databases_of(&rows, newest, primary_id.as_deref());
    let mut nodes: Vec<NodeRow> = rows.into_iter().map(|f| f.row).collect();
    for (url, answer) in &answers {
        // Members have rows of their own; a list of peers that is out of date does no harm.
        if answer.is_ok() || newest.voters.is_empty() {
            nodes.extend(outsider(url, answer, &own, &nodes));
        }
    }
    Status {
        lease: own.lease,
        cluster_id: newest.cluster_id.clone().or_else(|| own.cluster_id.clone()),
        epoch: heard.iter().map(|s| s.epoch).max().unwrap_or(0),
        durability: newest.durability.clone(),
        preferred_region: newest.preferred_region.clone(),
        is_changing: newest.is_changing,
        unheld: newest.unheld.clone(),
        asked: own.node.id.clone(),
        primary: primary_id,
        nodes,
        databases,
    }
}

/// A replica that is no member and that nobody has an address of.
fn unlisted(replica: &ReplicaSeen, databases: BTreeMap<String, DbStanding>) -> Found {
    let error = format!(
        "last heard {} s ago by the primary",
        replica.heard_ms_ago / 1000
    );
    Found {
        row: NodeRow {
            node: Peer {
                id: replica.id.clone(),
                hostname: replica.hostname.clone(),
                url: String::new(),
                region: String::new(),
                priority: 0,
            },
            role: match replica.is_connected {
                true => NodeRole::Follower,
                false => NodeRole::Unreachable,
            },
            votes: false,
            version: None,
            lag_ms: None,
            error: (!replica.is_connected).then_some(error),
        },
        databases,
    }
}

/// The row of an address that is no member's: nobody answers there, or a node of another cluster.
fn outsider(
    url: &str,
    answer: &Result<NodeStatus, String>,
    own: &NodeStatus,
    nodes: &[NodeRow],
) -> Option<NodeRow> {
    let is_listed = nodes
        .iter()
        .any(|row| row.node.url.trim_end_matches('/') == url);
    let row = |node: Peer, role, version, error| NodeRow {
        node,
        role,
        votes: false,
        version,
        lag_ms: None,
        error: Some(error),
    };
    match answer {
        Err(_) if is_listed => None,
        Err(error) => {
            let node = Peer {
                id: String::new(),
                hostname: String::new(),
                url: url.to_owned(),
                region: String::new(),
                priority: 0,
            };
            Some(row(node, NodeRole::Unreachable, None, error.clone()))
        }
        Ok(other) => match (&other.cluster_id, &own.cluster_id) {
            (Some(theirs), Some(ours)) if theirs != ours => {
                let error = format!(
                    "it belongs to cluster {theirs}: remove it from lease.peers, or start it on an empty data directory"
                );
                let version = Some(other.version.clone());
                Some(row(other.node.clone(), NodeRole::Stranger, version, error))
            }
            _ => None,
        },
    }
}

fn databases_of(rows: &[Found], newest: &NodeStatus, primary: Option<&str>) -> Vec<DbRow> {
    let names: BTreeSet<&String> = rows.iter().flat_map(|f| f.databases.keys()).collect();
    let of_primary = rows
        .iter()
        .find(|f| Some(f.row.node.id.as_str()) == primary);
    let row = |name: &String| {
        let reference = of_primary.and_then(|f| f.databases.get(name));
        let copies = rows
            .iter()
            // What cannot be reached and was never heard says nothing about its databases.
            .filter(|f| f.row.role != NodeRole::Unreachable || !f.databases.is_empty())
            .map(|f| copy(f, name, reference));
        DbRow {
            name: name.clone(),
            durability: newest
                .database_durability
                .get(name)
                .or(newest.durability.as_ref())
                .cloned(),
            copies: copies.collect(),
        }
    };
    names.into_iter().map(row).collect()
}

fn copy(of: &Found, name: &str, reference: Option<&DbStanding>) -> DbCopy {
    let have = of.databases.get(name);
    let pos = |db: &DbStanding| db.pos.parse::<Pos>().ok();
    let (ours, theirs) = (have.and_then(pos), reference.and_then(pos));
    let is_level = ours.is_some() && ours == theirs;
    let lag_ms = match (have, reference) {
        _ if is_level => Some(0),
        // Both are of the primary's clock.
        (Some(have), Some(reference)) if have.committed_ms > 0 && reference.committed_ms > 0 => {
            let since = reference.committed_ms.saturating_sub(have.committed_ms);
            let since = u64::try_from(since).unwrap_or(0);
            // A database that was idle for an hour is not an hour behind.
            Some(of.row.lag_ms.map_or(since, |at_most| since.min(at_most)))
        }
        _ => None,
    };
    DbCopy {
        node: of.row.node.id.clone(),
        hostname: of.row.node.hostname.clone(),
        pos: have.map(|db| db.pos.clone()),
        behind: theirs.map(|t| t.txid.0.saturating_sub(ours.map_or(0, |o| o.txid.0))),
        lag_ms,
        differs: match (ours, theirs) {
            (Some(o), Some(t)) => o.txid == t.txid && o != t,
            _ => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(n: u64) -> Peer {
        Peer {
            id: show_id(n),
            hostname: format!("node{n}"),
            url: format!("http://10.0.0.{n}:20202"),
            region: String::new(),
            priority: 0,
        }
    }

    fn node(n: u64, databases: &[(&str, u64, i64)]) -> NodeStatus {
        let standing = |(name, txid, committed_ms): &(&str, u64, i64)| DbStanding {
            name: (*name).to_owned(),
            pos: format!("{txid:016x}/8000000000000000"),
            committed_ms: *committed_ms,
        };
        NodeStatus {
            lease: LeaseType::Raft,
            cluster_id: Some("LFSC1".to_owned()),
            node: named(n),
            version: "1".to_owned(),
            is_primary: false,
            candidate: true,
            epoch: 4,
            lag_ms: Some(7),
            durability: Some("quorum".to_owned()),
            preferred_region: String::new(),
            database_durability: BTreeMap::from([("b.db".to_owned(), "async".to_owned())]),
            voters: (1..=3).map(named).collect(),
            learners: Vec::new(),
            is_changing: false,
            databases: databases.iter().map(standing).collect(),
            unheld: Vec::new(),
            replicas: Vec::new(),
        }
    }

    fn primary(n: u64, databases: &[(&str, u64, i64)]) -> NodeStatus {
        NodeStatus {
            is_primary: true,
            epoch: 5,
            lag_ms: Some(0),
            ..node(n, databases)
        }
    }

    fn roles(status: &Status) -> Vec<(&str, &str)> {
        let of = |row: &'_ NodeRow| row.role.as_str();
        status
            .nodes
            .iter()
            .map(|row| (row.node.hostname.as_str(), of(row)))
            .collect()
    }

    #[test]
    fn a_node_that_does_not_answer_is_a_row() {
        let own = node(2, &[("a.db", 9, 1_000), ("b.db", 3, 500)]);
        let answers = vec![
            (
                named(1).url,
                Ok(primary(1, &[("a.db", 12, 1_004), ("b.db", 3, 500)])),
            ),
            (named(3).url, Err("connection refused".to_owned())),
        ];
        let status = put_together(own, answers);
        assert_eq!(
            roles(&status),
            [
                ("node1", "primary"),
                ("node2", "voter"),
                ("node3", "unreachable")
            ]
        );
        assert_eq!(status.nodes[2].error.as_deref(), Some("connection refused"));
        assert!(status.nodes[2].votes);
        assert_eq!((status.epoch, status.primary), (5, Some(show_id(1))));
        let [a, b] = &status.databases[..] else {
            panic!("{:?}", status.databases)
        };
        assert_eq!(a.copies.len(), 2, "nothing is known of node3's");
        assert_eq!((a.copies[1].behind, a.copies[1].lag_ms), (Some(3), Some(4)));
        assert_eq!((b.copies[1].behind, b.copies[1].lag_ms), (Some(0), Some(0)));
        assert_eq!(a.durability.as_deref(), Some("quorum"));
        assert_eq!(b.durability.as_deref(), Some("async"));
    }

    #[test]
    fn without_a_primary_nothing_is_behind_or_level() {
        let status = put_together(node(2, &[("a.db", 9, 1)]), vec![]);
        assert_eq!(status.primary, None);
        assert_eq!(status.databases[0].copies[0].behind, None);
        assert_eq!(status.nodes.len(), 3);
    }

    #[test]
    fn two_that_call_themselves_primary_are_told_apart_by_their_epoch() {
        let old = NodeStatus {
            epoch: 3,
            ..primary(1, &[("a.db", 20, 1)])
        };
        let status = put_together(old, vec![(named(2).url, Ok(primary(2, &[("a.db", 9, 1)])))]);
        assert_eq!(
            roles(&status)[..2],
            [("node2", "primary"), ("node1", "voter")]
        );
    }

    #[test]
    fn contents_that_differ_are_told() {
        let mut own = node(2, &[("a.db", 9, 1)]);
        own.databases[0].pos = "0000000000000009/8000000000000001".to_owned();
        let status = put_together(own, vec![(named(1).url, Ok(primary(1, &[("a.db", 9, 1)])))]);
        let copy = &status.databases[0].copies[1];
        assert!(copy.differs && copy.behind == Some(0), "{copy:?}");
    }

    #[test]
    fn followers_are_known_from_the_primary_and_strangers_are_named() {
        let mut own = primary(1, &[("a.db", 9, 1)]);
        own.voters.truncate(1);
        let seen = |n: u64, is_connected| ReplicaSeen {
            id: show_id(n),
            hostname: format!("node{n}"),
            is_connected,
            heard_ms_ago: 61_000,
            databases: node(n, &[("a.db", 8, 0)]).databases,
        };
        own.replicas = vec![seen(7, true), seen(8, false)];
        let stranger = NodeStatus {
            cluster_id: Some("LFSC2".to_owned()),
            ..primary(4, &[("other.db", 99, 1)])
        };
        let status = put_together(own, vec![(named(4).url, Ok(stranger))]);
        assert_eq!(
            roles(&status),
            [
                ("node1", "primary"),
                ("node7", "follower"),
                ("node8", "unreachable"),
                ("node4", "stranger")
            ]
        );
        assert!(status.nodes[2].error.as_ref().unwrap().contains("61 s"));
        assert!(status.nodes[3].error.as_ref().unwrap().contains("LFSC2"));
        assert_eq!(status.databases.len(), 1, "none of the stranger's");
        assert_eq!(status.databases[0].copies[1].behind, Some(1));
    }
}
