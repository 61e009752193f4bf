//! `litefs handoff` and `litefs promote`: another node becomes the primary, and no transaction is lost.

use super::NodeArgs;
use super::status::{self, label};
use crate::http::client::{Client, path_with_query};
use crate::http::cluster::Peer;
use crate::http::status::{LeaseType, Status};
use anyhow::bail;
use std::time::{Duration, Instant};

/// How long until the other node takes writes.
const OPEN: Duration = Duration::from_secs(10);
/// How long a node has for the handoff itself.
const HANDOFF: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);

/// Give the primary's role to another node.
///
/// Any node can be asked; it passes the request on to the primary. No transaction is lost: programs wait for a moment.
#[derive(Debug, clap::Args)]
pub(super) struct HandoffArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Node that is to be primary, by host name, id or URL. Without it, the voter with the highest priority.
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
}

/// Make the node that is asked the primary.
///
/// No transaction is lost: the primary brings it level, then hands its role over.
#[derive(Debug, clap::Args)]
pub(super) struct PromoteArgs {
    #[command(flatten)]
    node: NodeArgs,
}

pub(super) fn handoff(args: &HandoffArgs) -> anyhow::Result<i32> {
    super::block_on(async {
        let client = Client::new(args.node.url.clone());
        let before = status::ask(&client).await?;
        check_elected(&before)?;
        let path = match &args.to {
            None => "/handoff".to_owned(),
            Some(name) => {
                let to = status::find(&before, name)?;
                if before.primary.as_ref() == Some(&to.node.id) {
                    println!("{} is the primary already", label(&to.node));
                    return Ok(0);
                }
                path_with_query("/handoff", "node", &to.node.id)
            }
        };
        change(&client, &path, &before).await
    })
}

pub(super) fn promote(args: &PromoteArgs) -> anyhow::Result<i32> {
    super::block_on(async {
        let client = Client::new(args.node.url.clone());
        let before = status::ask(&client).await?;
        check_elected(&before)?;
        if before.primary.as_ref() == Some(&before.asked) {
            println!("this node is the primary already");
            return Ok(0);
        }
        change(&client, "/promote", &before).await
    })
}

fn check_elected(status: &Status) -> anyhow::Result<()> {
    match status.lease {
        LeaseType::Raft => Ok(()),
        LeaseType::Static => bail!(
            "the primary is fixed by the configuration (lease.type: static): \
             change litefs.yml of all nodes and restart them, or use lease.type: raft"
        ),
    }
}

/// Asks for the change, waits until the new primary takes writes, and says so.
async fn change(client: &Client, path: &str, before: &Status) -> anyhow::Result<i32> {
    let began = Instant::now();
    let asked = tokio::time::timeout(HANDOFF, client.post_json::<Peer>(path)).await;
    let Ok(to) = asked else {
        bail!("no answer within {HANDOFF:?}: see `litefs status` for who is primary");
    };
    let to = to?;
    let handed = began.elapsed();
    let is_open = async {
        loop {
            if let Ok(now) = status::ask(client).await
                && now.primary.as_ref() == Some(&to.id)
            {
                return;
            }
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(OPEN, is_open).await.is_err() {
        bail!(
            "the role was handed to {}, which does not take writes after {OPEN:?}: see its log",
            label(&to)
        );
    }
    let from = status::primary(before).map(|row| label(&row.node));
    println!(
        "primary is {}, before it was {}; handed over in {} ms",
        label(&to),
        from.as_deref().unwrap_or("none"),
        handed.as_millis()
    );
    Ok(0)
}
