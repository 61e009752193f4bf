//! `litefs wait`: returns once a database is where a client has seen it, on the node that is asked.

use super::NodeArgs;
use crate::http::client::Client;
use crate::proxy::{Consistency, Waited, check_pos, wait_path};
use crate::replication::DbName;
use anyhow::{Context as _, bail};
use std::time::Duration;

/// How much longer than the node the command waits for its answer.
const GRACE: Duration = Duration::from_secs(5);

/// Wait until a node has a position of a database.
///
/// For programs that do not come through the HTTP proxy: read NAME-pos after a write, and give it to whoever reads next.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Database, by its path in the mount.
    #[arg(long, value_name = "NAME")]
    db: DbName,
    /// Position to wait for: what NAME-pos says, its first 16 digits, or what the proxy's cookie or header says.
    #[arg(long, value_name = "POS", required_unless_present = "consistency")]
    pos: Option<String>,
    /// Instead of a position: strong, or bounded=DURATION, by the word of the primary.
    #[arg(long, value_name = "LEVEL", conflicts_with = "pos")]
    consistency: Option<Consistency>,
    /// How long to wait at most.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = crate::config::parse_duration)]
    timeout: Duration,
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    if let Some(pos) = &args.pos {
        check_pos(&args.db, pos).context("-pos")?;
    }
    super::block_on(async {
        let client = Client::new(args.node.url.clone());
        let level = args.consistency.map(|level| level.to_string());
        let path = wait_path(
            args.db.as_str(),
            args.pos.as_deref().map(str::trim),
            level.as_deref(),
            args.timeout,
        );
        let asked = client.get_json::<Waited>(&path);
        let Ok(waited) = tokio::time::timeout(args.timeout + GRACE, asked).await else {
            bail!("{} does not answer: see its log", args.node.url);
        };
        println!("{}", waited?.position.unwrap_or_default());
        Ok(0)
    })
}
