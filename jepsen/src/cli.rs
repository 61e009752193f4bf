//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use rusqlite::{Connection, OpenFlags};

use crate::run::{self, Plan};
use crate::workload::{self, Workload};
use crate::{client, cluster, interrupt, matrix, nemesis, os};

/// Breaks clusters of litefs nodes, and checks what clients saw.
#[derive(Debug, Parser)]
#[command(name = "litefs-jepsen", version)]
struct Cli {
    /// The program under test.
    #[arg(long, global = true, default_value = "target/release/litefs")]
    litefs: PathBuf,
    /// Where images and logs go.
    #[arg(long, global = true, default_value = "/tmp/litefs-jepsen")]
    work: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// set, bank, or all.
    #[arg(long, default_value = "all")]
    workload: Workload,
    /// How long things are broken.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Decides the schedule; the clock if there is none.
    #[arg(long)]
    seed: Option<u64>,
    /// How many nodes; more if the fault needs them.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Pause of each client thread between two operations, on average.
    #[arg(long, default_value_t = 4)]
    pace_ms: u64,
    /// Daemons say what they decide.
    #[arg(long)]
    debug: bool,
    /// Keeps logs and data even if all is well.
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One fault, or several at the same time: a+b.
    Run {
        #[arg(long)]
        fault: String,
        /// async or quorum.
        #[arg(long, default_value = "quorum")]
        durability: String,
        /// How often, each time with the next seed.
        #[arg(long, default_value_t = 1)]
        times: u64,
        #[command(flatten)]
        common: Common,
    },
    /// All faults, and a table.
    Matrix {
        /// Only those whose "FAULT DURABILITY" contains this.
        #[arg(long)]
        only: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Lists the faults.
    Faults,
    #[command(hide = true)]
    Client(client::Args),
    #[command(hide = true)]
    Content { path: PathBuf },
}

/// Does what the command line says.
#[must_use]
pub fn main() -> ExitCode {
    match go(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(3),
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn go(cli: Cli) -> anyhow::Result<bool> {
    match &cli.command {
        Command::Client(args) => client::run(args),
        Command::Content { path } => {
            let db = match path
                .components()
                .any(|c| c.as_os_str() == "quarantine" || c.as_os_str() == "lost")
            {
                // Nothing is to appear beside it.
                true => Connection::open_with_flags(
                    format!("file:{}?immutable=1", path.display()),
                    OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI,
                )?,
                false => Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?,
            };
            db.busy_timeout(std::time::Duration::from_secs(10))?;
            println!("{}", serde_json::to_string(&workload::content(&db)?)?);
        }
        Command::Faults => {
            for fault in nemesis::FAULTS {
                println!("{:<20} {}", fault.name, fault.says);
            }
        }
        Command::Run {
            fault,
            durability,
            times,
            common,
        } => {
            anyhow::ensure!(
                ["async", "quorum"].contains(&durability.as_str()),
                "durability is async or quorum"
            );
            let mut plan = plan(&cli, common)?;
            plan.fault.clone_from(fault);
            plan.durability.clone_from(durability);
            let least = plan.faults()?.iter().map(|f| f.min_nodes).max();
            plan.nodes = plan.nodes.max(least.unwrap_or(0));
            if let Some(why) = prepare(&plan)? {
                println!("skipped: {why}");
                return Ok(true);
            }
            let mut is_well = true;
            for _ in 0..*times {
                let begin = Instant::now();
                match plan.run() {
                    Ok(outcomes) => {
                        run::print(&plan, &outcomes, begin);
                        is_well &= outcomes.anomalies.is_empty();
                    }
                    Err(error) => {
                        interrupt::check()?;
                        println!("{} did not come to its end: {error:#}", plan.replay());
                        is_well = false;
                    }
                }
                plan.seed += 1;
            }
            return Ok(is_well);
        }
        Command::Matrix { only, common } => {
            let base = plan(&cli, common)?;
            if let Some(why) = prepare(&base)? {
                println!("skipped: {why}");
                return Ok(true);
            }
            return matrix::run(&base, only.as_deref());
        }
    }
    Ok(true)
}

fn plan(cli: &Cli, common: &Common) -> anyhow::Result<Plan> {
    let litefs = &cli.litefs;
    let seed = common
        .seed
        .unwrap_or_else(|| crate::history::now() % 1_000_000);
    Ok(Plan {
        litefs: litefs.canonicalize().with_context(|| {
            format!(
                "{} (build it, or name another by --litefs)",
                litefs.display()
            )
        })?,
        work: std::path::absolute(&cli.work)?,
        fault: "none".into(),
        durability: "quorum".into(),
        workload: common.workload,
        nodes: common.nodes,
        seconds: common.seconds,
        seed,
        pace_ms: common.pace_ms,
        debug: common.debug,
        keep: common.keep,
    })
}

/// Says why nothing can be run here, if so.
fn prepare(plan: &Plan) -> anyhow::Result<Option<String>> {
    if let Some(why) = os::cannot_run() {
        return Ok(Some(why));
    }
    if plan.fault.contains("clock-jump") && cluster::faketime().is_none() {
        return Ok(Some("libfaketime is missing: install libfaketime".into()));
    }
    interrupt::listen();
    os::own_mounts()?;
    Ok(None)
}
