//! `litefs cluster`: who belongs to the cluster, and what it promises.

use super::NodeArgs;
use super::status::{self, label};
use crate::config::NodeUrl;
use crate::http::client::{Client, ClientError, path_with_query};
use crate::http::cluster::{Added, Peer};
use crate::http::status::{NodeRole, Status};
use anyhow::bail;
use hyper::StatusCode;
use serde::de::DeserializeOwned;
use std::time::{Duration, Instant};

/// How long a new node has to come level.
const DEFAULT_WAIT: &str = "5m";
/// How often it is looked at meanwhile.
const POLL: Duration = Duration::from_millis(200);
/// While nobody is primary, a request is made again for so long.
const ELECTION: Duration = Duration::from_secs(10);
/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(60);

/// Show and change who belongs to the cluster.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    List(ListArgs),
    Add(AddArgs),
    Remove(RemoveArgs),
    Durability(DurabilityArgs),
    Prefer(PreferArgs),
}

/// List the nodes.
#[derive(Debug, clap::Args)]
struct ListArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Print JSON: `nodes` of `GET /v1/status`.
    #[arg(long)]
    json: bool,
}

/// Take a node in, and wait until it votes.
///
/// The node must run with `lease.type: raft` and belong to no other cluster: two clusters are never merged. Nodes whose
/// `lease.peers` name one of this cluster come by themselves; a node that was removed comes back only by this.
#[derive(Debug, clap::Args)]
struct AddArgs {
    /// URL of the node to take in.
    #[arg(value_name = "URL")]
    added: NodeUrl,
    #[command(flatten)]
    node: NodeArgs,
    /// How long to wait for it to be level and vote, such as 30s or 10m.
    #[arg(long, value_name = "DURATION", default_value = DEFAULT_WAIT, value_parser = crate::config::parse_duration)]
    wait: Duration,
}

/// Take a node out: it has no vote any more, and does not come back by itself.
///
/// The primary hands its role over first. Refused if those that remain and can be reached would be no majority.
#[derive(Debug, clap::Args)]
struct RemoveArgs {
    /// Node to take out, by host name, id or URL.
    #[arg(value_name = "NODE")]
    removed: String,
    #[command(flatten)]
    node: NodeArgs,
}

/// Set when commits return: async, quorum, or bounded:500ms,100; for one database also default, the cluster's.
#[derive(Debug, clap::Args)]
struct DurabilityArgs {
    /// What commits wait for.
    value: String,
    /// Only for this database, by its name relative to the mount.
    #[arg(long, value_name = "NAME")]
    db: Option<String>,
    #[command(flatten)]
    node: NodeArgs,
}

/// Set the region whose voters are to be primary: one that is level gets the role by handoff, and gets it back.
#[derive(Debug, clap::Args)]
struct PreferArgs {
    /// Region, as `lease.region` of a voter says.
    #[arg(
        value_name = "REGION",
        required_unless_present = "none",
        conflicts_with = "none"
    )]
    region: Option<String>,
    /// Prefer no region; priorities alone count.
    #[arg(long)]
    none: bool,
    #[command(flatten)]
    node: NodeArgs,
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    super::block_on(async {
        match &args.command {
            Command::List(args) => list(args).await,
            Command::Add(args) => add(args).await,
            Command::Remove(args) => remove(args).await,
            Command::Durability(args) => durability(args).await,
            Command::Prefer(args) => prefer(args).await,
        }
    })
}

async fn list(args: &ListArgs) -> anyhow::Result<i32> {
    let status = status::ask(&Client::new(args.node.url.clone())).await?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&status.nodes)?),
        false => print!("{}", status::show_nodes(&status)),
    }
    Ok(0)
}

async fn add(args: &AddArgs) -> anyhow::Result<i32> {
    let client = Client::new(args.node.url.clone());
    let path = path_with_query("/v1/cluster/add", "url", &args.added.to_string());
    let added: Added = post(&client, &path).await?;
    if !added.is_candidate {
        println!(
            "{} follows this cluster; it has no vote (lease.candidate: false)",
            label(&added.node)
        );
        return Ok(0);
    }
    let deadline = Instant::now() + args.wait;
    loop {
        let why = match status::ask(&client).await {
            Ok(status) if votes(&status, &added.node) => break,
            Ok(status) => progress(&status, &added.node),
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() >= deadline {
            bail!(
                "{} was told to join and has no vote after {:?} ({why}); it goes on trying: see its log",
                label(&added.node),
                args.wait
            );
        }
        tokio::time::sleep(POLL).await;
    }
    println!("{} is a voter", label(&added.node));
    Ok(0)
}

fn votes(status: &Status, node: &Peer) -> bool {
    let mut rows = status.nodes.iter();
    // Before the change is done, the loss of an old voter could stop the cluster.
    !status.is_changing
        && rows.any(|row| row.node.id == node.id && row.votes && row.role != NodeRole::Unreachable)
}

fn progress(status: &Status, node: &Peer) -> String {
    let behind = |db: &crate::http::status::DbRow| {
        let copy = db.copies.iter().find(|copy| copy.node == node.id)?;
        copy.behind
    };
    match status.nodes.iter().find(|row| row.node.id == node.id) {
        None => "the primary does not hear it yet".to_owned(),
        Some(row) => match &row.error {
            Some(error) => error.clone(),
            None => format!(
                "{} transactions behind",
                status.databases.iter().filter_map(behind).sum::<u64>()
            ),
        },
    }
}

async fn remove(args: &RemoveArgs) -> anyhow::Result<i32> {
    let client = Client::new(args.node.url.clone());
    let before = status::ask(&client).await?;
    let node = &status::find(&before, &args.removed)?.node;
    let path = path_with_query("/v1/cluster/remove", "node", &node.id);
    let _: serde_json::Value = post(&client, &path).await?;
    println!(
        "{} was removed; if it runs, it follows without a vote until it is stopped or added again",
        label(node)
    );
    Ok(0)
}

/// What is of interest of the answer.
#[derive(serde::Deserialize)]
struct Held {
    #[serde(default)]
    unheld: Vec<String>,
}

async fn durability(args: &DurabilityArgs) -> anyhow::Result<i32> {
    let client = Client::new(args.node.url.clone());
    let mut path = path_with_query("/v1/cluster/durability", "value", &args.value);
    if let Some(db) = &args.db {
        path.push('&');
        path.push_str(path_with_query("", "db", db).trim_start_matches('?'));
    }
    let answer: Held = post(&client, &path).await?;
    let of = args.db.as_deref().unwrap_or("the cluster");
    println!("durability of {of} is {}", args.value);
    if !answer.unheld.is_empty() {
        print!("{}", status::unheld(&answer.unheld));
    }
    Ok(0)
}

async fn prefer(args: &PreferArgs) -> anyhow::Result<i32> {
    let client = Client::new(args.node.url.clone());
    let region = args.region.as_deref().unwrap_or_default();
    let path = path_with_query("/v1/cluster/preferred-region", "value", region);
    let _: serde_json::Value = post(&client, &path).await?;
    match region {
        "" => println!("no region is preferred"),
        region => println!("the primary is to be in region {region}"),
    }
    Ok(0)
}

/// Makes a request of the primary, by way of the node that is asked; waits for an election to end.
pub(super) async fn post<T: DeserializeOwned>(client: &Client, path: &str) -> anyhow::Result<T> {
    let deadline = Instant::now() + ELECTION;
    loop {
        match tokio::time::timeout(REQUEST, client.post_json(path)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(ClientError::Status { status, .. }))
                if status == StatusCode::SERVICE_UNAVAILABLE && Instant::now() < deadline => {}
            Ok(Err(ClientError::Status { status, .. })) if status == StatusCode::NOT_FOUND => {
                bail!(
                    "the node at {} elects no primary (lease.type: static): its cluster is what litefs.yml says",
                    client.url()
                )
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => {
                bail!("no answer within {REQUEST:?}: see `litefs status` for what became of it")
            }
        }
        tokio::time::sleep(POLL).await;
    }
}
