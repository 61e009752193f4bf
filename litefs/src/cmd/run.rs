//! `litefs run`: starts a program once the node beside it is ready.

use super::NodeArgs;
use crate::exec::ExecError;
use crate::http::client::{Client, ClientError};
use crate::http::cluster::Peer;
use crate::http::info::NodeInfo;
use anyhow::bail;
use hyper::StatusCode;
use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long the handoff of the primary's role may take.
const PROMOTE: Duration = Duration::from_secs(30);

/// Run a program once the mount is ready.
///
/// The program replaces this process, so its exit code and signals are its own.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    node: NodeArgs,
    /// Make this node the primary first.
    #[arg(long)]
    promote: bool,
    /// Do nothing unless this node may be the primary.
    #[arg(long)]
    if_candidate: bool,
    /// Database to write to on this node while the primary pauses.
    #[arg(long, value_name = "PATH", conflicts_with = "promote")]
    with_halt_lock_on: Option<PathBuf>,
    /// How long to wait for the node to be ready, such as 30s or 2m.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = crate::config::parse_duration)]
    wait: Duration,
    /// Say what is being done.
    #[arg(short, long)]
    verbose: bool,
    /// Program to run, and its arguments.
    #[arg(last = true, value_name = "CMD", required = true)]
    command: Vec<OsString>,
}

/// What to do once the node is ready.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Exec,
    Skip,
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    if args.with_halt_lock_on.is_some() {
        bail!(
            "-with-halt-lock-on needs write forwarding, which is not in this version: \
             run the program on the primary"
        );
    }
    let decision = super::block_on(decide(args))?;
    if decision == Decision::Skip {
        eprintln!("litefs: node is not a candidate, program skipped");
        return Ok(0);
    }
    Err(exec(&args.command).into())
}

async fn decide(args: &Args) -> anyhow::Result<Decision> {
    args.say("waiting for the node to be ready");
    let client = Client::new(args.node.url.clone());
    let info = wait_until_ready(&client, args.wait).await?;
    if args.if_candidate && !info.candidate {
        return Ok(Decision::Skip);
    }
    if args.promote && !info.is_primary {
        args.say("making this node the primary");
        promote(&client, info.primary.map(|primary| primary.hostname)).await?;
    }
    args.say("node is ready, starting the program");
    Ok(Decision::Exec)
}

/// Makes the node the primary; writes are open then.
async fn promote(client: &Client, primary: Option<String>) -> anyhow::Result<()> {
    let promoted = tokio::time::timeout(PROMOTE, client.post_json::<Peer>("/promote")).await;
    match promoted {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(ClientError::Status { status, .. })) if status == StatusCode::NOT_FOUND => bail!(
            "-promote: the primary is fixed (lease.type: static): run the program on the primary (hostname {})",
            primary.as_deref().unwrap_or("unknown")
        ),
        Ok(Err(error)) => Err(anyhow::Error::from(error).context("-promote")),
        Err(_) => bail!("-promote: no answer within {PROMOTE:?}: see `litefs status`"),
    }
}

/// Asks again and again until the node says that it is ready, or `limit` has passed.
async fn wait_until_ready(client: &Client, limit: Duration) -> anyhow::Result<NodeInfo> {
    let mut last = None;
    let ready = async {
        loop {
            match client.get_json::<NodeInfo>("/info").await {
                Ok(info) if info.ready => return info,
                Ok(_) => last = None,
                Err(error) => last = Some(error),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    match tokio::time::timeout(limit, ready).await {
        Ok(info) => Ok(info),
        Err(_) => Err(not_ready(client, limit, last)),
    }
}

fn not_ready(client: &Client, limit: Duration, last: Option<ClientError>) -> anyhow::Error {
    let what = format!("node at {} not ready within {limit:?}", client.url());
    match last {
        None => anyhow::anyhow!("{what}: it answers but has not reached its primary; see its log"),
        Some(error) => anyhow::Error::from(error).context(format!(
            "{what}: is `litefs mount` running, and is -url right?"
        )),
    }
}

/// Becomes the program; returns only if that fails.
fn exec(command: &[OsString]) -> ExecError {
    let (program, args) = command.split_first().expect("clap requires a command");
    let source = std::process::Command::new(program).args(args).exec();
    ExecError::Start {
        program: program.to_string_lossy().into_owned(),
        source: Arc::new(source),
    }
}

impl Args {
    fn say(&self, what: &str) {
        if self.verbose {
            eprintln!("litefs: {what}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::serve;
    use super::super::{Cli, Command, dashes};
    use super::*;
    use crate::http::info::PrimaryInfo;
    use axum::{Json, Router, routing};
    use clap::Parser as _;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn args(line: &str) -> Args {
        let words = format!("litefs run {line} -- app -v");
        let words = words.split_whitespace().map(OsString::from);
        match Cli::try_parse_from(dashes::normalize(words))
            .unwrap()
            .command
        {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    /// A node that is ready from its third answer on.
    async fn node(info: NodeInfo) -> NodeArgs {
        let asked = Arc::new(AtomicUsize::new(0));
        let get = async move || {
            let ready = info.ready && asked.fetch_add(1, Ordering::Relaxed) >= 2;
            Json(NodeInfo {
                ready,
                ..info.clone()
            })
        };
        NodeArgs {
            url: serve(Router::new().route("/info", routing::get(get))).await,
        }
    }

    async fn decided(flags: &str, info: NodeInfo) -> Result<Decision, String> {
        let args = Args {
            node: node(info).await,
            ..args(flags)
        };
        decide(&args).await.map_err(|error| format!("{error:#}"))
    }

    fn primary() -> NodeInfo {
        NodeInfo {
            is_primary: true,
            candidate: true,
            ready: true,
            ..NodeInfo::default()
        }
    }

    fn replica() -> NodeInfo {
        let primary = Some(PrimaryInfo {
            hostname: "db1".to_owned(),
        });
        NodeInfo {
            primary,
            ready: true,
            ..NodeInfo::default()
        }
    }

    #[tokio::test]
    async fn waits_then_runs() {
        assert_eq!(decided("", replica()).await, Ok(Decision::Exec));
        assert_eq!(
            decided("-if-candidate", primary()).await,
            Ok(Decision::Exec)
        );
        assert_eq!(
            decided("-if-candidate -promote", replica()).await,
            Ok(Decision::Skip)
        );
    }

    #[tokio::test]
    async fn promote_is_nothing_to_do_on_the_primary_and_refused_where_that_is_fixed() {
        assert_eq!(decided("-promote", primary()).await, Ok(Decision::Exec));
        let want = "-promote: the primary is fixed (lease.type: static): \
                    run the program on the primary (hostname db1)";
        assert_eq!(decided("-promote", replica()).await, Err(want.to_owned()));
    }

    #[tokio::test]
    async fn the_wait_is_bounded_and_says_why() {
        let starting = NodeInfo {
            ready: false,
            ..primary()
        };
        let error = decided("-wait 1ms", starting).await.unwrap_err();
        assert!(
            error.contains("not ready within 1ms: it answers"),
            "{error}"
        );
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let args = args(&format!("-wait=150ms -url http://127.0.0.1:{port}"));
        let error = format!("{:#}", decide(&args).await.unwrap_err());
        assert!(error.contains("is `litefs mount` running"), "{error}");
        assert!(error.contains("onnection refused"), "{error}");
    }

    #[test]
    fn halt_locks_are_refused() {
        let error = run(&args("-with-halt-lock-on /litefs/db"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("-with-halt-lock-on needs write forwarding"),
            "{error}"
        );
        assert_eq!(args("-v").command, ["app", "-v"]);
    }

    #[test]
    fn a_program_that_does_not_exist_is_named() {
        let error = exec(&["/no/such/program".into()]);
        assert_eq!(error.to_string(), "start program `/no/such/program`");
    }
}
