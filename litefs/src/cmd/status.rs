//! `litefs status`: who is there, who is primary, and where each database is on each node.

use super::NodeArgs;
use super::table::table;
use crate::http::client::Client;
use crate::http::cluster::Peer;
use crate::http::status::{DbCopy, LeaseType, NodeRole, NodeRow, Status};
use anyhow::{Context as _, bail};
use std::time::Duration;

/// The node gives the others a second to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Show the cluster as a node sees it: nodes, primary, databases, lag.
///
/// Ends with 0 whenever that node answers, whatever it says of others.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Print JSON, as `GET /v1/status` answers.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    super::block_on(async {
        let status = ask(&Client::new(args.node.url.clone())).await?;
        match args.json {
            true => println!("{}", serde_json::to_string_pretty(&status)?),
            false => print!("{}", show(&status)),
        }
        Ok(0)
    })
}

/// Asks a node for the whole cluster.
pub(super) async fn ask(client: &Client) -> anyhow::Result<Status> {
    let asked = tokio::time::timeout(PATIENCE, client.get_large_json("/v1/status")).await;
    let Ok(answer) = asked else {
        bail!(
            "the node at {} does not answer within {PATIENCE:?}: see its log",
            client.url()
        );
    };
    answer.context("ask the node: is `litefs mount` running there, and is --url right?")
}

/// Finds a node by its identity, host name or address.
pub(super) fn find<'a>(status: &'a Status, name: &str) -> anyhow::Result<&'a NodeRow> {
    let wanted = name.trim_end_matches('/');
    let is_it = |row: &&NodeRow| {
        let node = &row.node;
        !node.id.is_empty()
            && (node.id.eq_ignore_ascii_case(wanted)
                || node.hostname == wanted
                || node.url.trim_end_matches('/') == wanted)
    };
    let found: Vec<&NodeRow> = status.nodes.iter().filter(is_it).collect();
    match found[..] {
        [row] => Ok(row),
        [] => {
            let known = status.nodes.iter().map(|row| label(&row.node));
            bail!(
                "no node is called {name:?}: there are {}",
                known.collect::<Vec<_>>().join(", ")
            )
        }
        _ => {
            let ids = found.iter().map(|row| row.node.id.as_str());
            bail!(
                "{} nodes are called {name:?}: name one by its id, {}",
                found.len(),
                ids.collect::<Vec<_>>().join(" or ")
            )
        }
    }
}

/// A name for people.
pub(super) fn label(node: &Peer) -> String {
    match (node.hostname.is_empty(), node.url.is_empty()) {
        (true, _) => node.url.clone(),
        (false, true) => node.hostname.clone(),
        (false, false) => format!("{} ({})", node.hostname, node.url),
    }
}

/// The primary's row, if one answers.
pub(super) fn primary(status: &Status) -> Option<&NodeRow> {
    let id = status.primary.as_deref()?;
    status.nodes.iter().find(|row| row.node.id == id)
}

fn show(status: &Status) -> String {
    let fixed = match status.lease {
        LeaseType::Static => " (fixed by lease.type: static)",
        LeaseType::Raft => "",
    };
    let preferred = match status.preferred_region.as_str() {
        "" => String::new(),
        region => format!(" (preferred region: {region})"),
    };
    let primary = match primary(status) {
        Some(row) => label(&row.node),
        None => "none answers".to_owned(),
    };
    let asked = status.nodes.iter().find(|row| row.node.id == status.asked);
    let asked = asked.map_or_else(|| status.asked.clone(), |row| label(&row.node));
    let mut out = format!(
        "cluster     {}\nprimary     {primary}{fixed}{preferred}\nepoch       {}\ndurability  {}\nasked       {asked}\n\n",
        status.cluster_id.as_deref().unwrap_or("none yet"),
        status.epoch,
        status.durability.as_deref().unwrap_or("async"),
    );
    out.push_str(&show_nodes(status));
    if !status.databases.is_empty() {
        out.push('\n');
        out.push_str(&show_databases(status));
    }
    if !status.unheld.is_empty() {
        out.push_str(&unheld(&status.unheld));
    }
    out
}

/// The nodes as a table, then what is wrong with them.
pub(super) fn show_nodes(status: &Status) -> String {
    let rows = status.nodes.iter().map(|row| {
        let node = &row.node;
        let role = match row.role {
            NodeRole::Unreachable if row.votes => "unreachable voter",
            role => role.as_str(),
        };
        [
            dash(&node.hostname),
            role.to_owned(),
            dash(&node.url),
            dash(&node.region),
            node.priority.to_string(),
            row.version.clone().unwrap_or_else(|| "-".to_owned()),
            dash(&node.id),
        ]
    });
    let header = ["NODE", "ROLE", "URL", "REGION", "PRIORITY", "VERSION", "ID"];
    let mut out = table(header, &rows.collect::<Vec<_>>());
    if status.is_changing {
        out.push_str("voters are being changed: until that is done, a majority of the old ones is needed too\n");
    }
    for row in &status.nodes {
        if let Some(error) = &row.error {
            out.push_str(&format!(
                "{} {}: {error}\n",
                row.role.as_str(),
                label(&row.node)
            ));
        }
    }
    out
}

fn show_databases(status: &Status) -> String {
    let mut rows = Vec::new();
    for db in &status.databases {
        for (i, copy) in db.copies.iter().enumerate() {
            let first = |text: &str| match i {
                0 => text.to_owned(),
                _ => String::new(),
            };
            let (txid, checksum) = match &copy.pos {
                Some(pos) => pos.split_once('/').unwrap_or((pos, "-")),
                None => ("-", "-"),
            };
            rows.push([
                first(&db.name),
                first(db.durability.as_deref().unwrap_or("async")),
                copy.hostname.clone(),
                txid.to_owned(),
                checksum.to_owned(),
                standing(copy, status),
            ]);
        }
    }
    let header = [
        "DATABASE",
        "DURABILITY",
        "NODE",
        "TXID",
        "CHECKSUM",
        "BEHIND",
    ];
    table(header, &rows)
}

/// Which databases do not do what was asked of them, and the remedy.
pub(super) fn unheld(names: &[String]) -> String {
    format!(
        "commits of {} do not wait for other nodes yet: restart the programs on the primary that have had them open since before, or have \
         them open the databases again, all of them\n",
        names.join(", ")
    )
}

/// How a copy stands to the primary's, in words.
fn standing(copy: &DbCopy, status: &Status) -> String {
    if Some(&copy.node) == status.primary.as_ref() {
        return "primary".to_owned();
    }
    match (copy.behind, copy.lag_ms) {
        _ if copy.pos.is_none() => "not there".to_owned(),
        _ if copy.differs => "other contents".to_owned(),
        (None, _) => "-".to_owned(),
        (Some(0), _) => "level".to_owned(),
        (Some(n), None) => format!("{n} tx"),
        (Some(n), Some(ms)) => format!("{n} tx, {ms} ms"),
    }
}

fn dash(text: &str) -> String {
    match text.is_empty() {
        true => "-".to_owned(),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::status::DbRow;

    fn row(n: u64, hostname: &str, role: NodeRole) -> NodeRow {
        NodeRow {
            node: Peer {
                id: format!("{n:016X}"),
                hostname: hostname.to_owned(),
                url: format!("http://10.0.0.{n}:20202"),
                region: String::new(),
                priority: 0,
            },
            role,
            votes: role != NodeRole::Follower,
            version: Some("1".to_owned()),
            lag_ms: None,
            error: (role == NodeRole::Unreachable).then(|| "connection refused".to_owned()),
        }
    }

    fn status() -> Status {
        let copy = |n: u64, behind, lag_ms| DbCopy {
            node: format!("{n:016X}"),
            hostname: format!("h{n}"),
            pos: Some(format!("{n:016x}/8000000000000000")),
            behind: Some(behind),
            lag_ms,
            differs: false,
        };
        Status {
            lease: LeaseType::Raft,
            cluster_id: Some("LFSC1".to_owned()),
            epoch: 3,
            durability: Some("quorum".to_owned()),
            preferred_region: String::new(),
            is_changing: false,
            unheld: vec!["a.db".to_owned()],
            asked: format!("{:016X}", 10),
            primary: Some(format!("{:016X}", 11)),
            nodes: vec![
                row(11, "h11", NodeRole::Primary),
                row(10, "twin", NodeRole::Voter),
                row(12, "twin", NodeRole::Unreachable),
            ],
            databases: vec![DbRow {
                name: "a.db".to_owned(),
                durability: Some("async".to_owned()),
                copies: vec![copy(11, 0, Some(0)), copy(10, 3, Some(12))],
            }],
        }
    }

    #[test]
    fn the_table_says_who_is_primary_and_who_is_behind() {
        let text = show(&status());
        for want in [
            "cluster     LFSC1\n",
            "primary     h11 (http://10.0.0.11:20202)\n",
            "durability  quorum\n",
            "unreachable voter",
            "unreachable twin (http://10.0.0.12:20202): connection refused\n",
            "commits of a.db do not wait",
            "a.db      async       h11   000000000000000b  8000000000000000  primary\n",
            "                      h10   000000000000000a  8000000000000000  3 tx, 12 ms\n",
        ] {
            assert!(text.contains(want), "{want:?} in\n{text}");
        }
    }

    #[test]
    fn nodes_are_found_by_any_of_their_names_if_it_is_theirs_alone() {
        let status = status();
        for name in ["h11", "000000000000000b", "http://10.0.0.11:20202/"] {
            assert_eq!(find(&status, name).unwrap().node.hostname, "h11", "{name}");
        }
        let error = find(&status, "twin").unwrap_err().to_string();
        assert!(
            error.contains("000000000000000A or 000000000000000C"),
            "{error}"
        );
        let error = find(&status, "nobody").unwrap_err().to_string();
        assert!(error.contains("h11 (http://10.0.0.11:20202)"), "{error}");
    }
}
