//! `litefs bench failover`: for how long nobody can write when the primary dies, and when it hands over.
//!
//! | what | measured |
//! |---|---|
//! | a kill | from SIGKILL of the primary, which is being written, until an INSERT succeeds on a connection that a program on another node had open before |
//! | a handoff | the longest time in which no writer on any node had a transaction acknowledged, while the role moves |
//!
//! At the end every row that was acknowledged is looked for. `quorum` may lose none; the others may lose what
//! no other node had yet when a primary was killed.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rusqlite::Connection;

use super::load::{Rows, Writers};
use super::nodes::{DB, Nodes, check_host};
use super::report::Distribution;
use super::{is_interrupted, stop_on_signals, wait_until};
use crate::config::{DURABILITY_REMEDY, parse_durability};

/// How long the primary is written before it is killed.
const LOAD: Duration = Duration::from_millis(300);
/// How long writes may take to be possible again.
const PATIENCE: Duration = Duration::from_secs(30);
/// Writes that a new primary must have taken before the next handoff.
const TAKEN: u64 = 20;

/// Kill the primary, and hand its role over, again and again; print for how long nobody could write.
///
/// Starts a cluster of its own on this machine, and removes it at the end. Needs root and /dev/fuse.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How often the primary is killed.
    #[arg(long, value_name = "N", default_value_t = 10)]
    kills: usize,
    /// How often the role is handed over.
    #[arg(long, value_name = "N", default_value_t = 10)]
    handoffs: usize,
    /// Nodes of the cluster, at least 3.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=9))]
    nodes: u8,
    /// When commits return: async, quorum, or bounded:500ms,100.
    #[arg(long, value_name = "VALUE", default_value = "async")]
    durability: String,
    /// Where a directory for the cluster is made; the system's directory for temporary files if not given.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// What was found out.
#[derive(Debug, Default)]
struct Outcome {
    kill_gaps: Vec<Duration>,
    handoff_gaps: Vec<Duration>,
    failed: usize,
    first_failure: Option<String>,
    written_in_handoffs: u64,
    acknowledged: usize,
    missing: usize,
}

pub(super) fn run(args: &Args) -> anyhow::Result<i32> {
    check_host()?;
    parse_durability(&args.durability).context(DURABILITY_REMEDY)?;
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let parent =
        std::path::absolute(&parent).with_context(|| format!("find {}", parent.display()))?;
    stop_on_signals()?;
    let mut nodes = Nodes::start(&parent, usize::from(args.nodes), "async")?;
    eprintln!("{} nodes in {}", args.nodes, nodes.dir().display());
    let mut outcome = Outcome::default();
    let end = measure(args, &mut nodes, &mut outcome);
    if end.is_err() && !is_interrupted() {
        eprint!("{}", nodes.logs());
    }
    drop(nodes);
    if end.is_ok() || is_interrupted() {
        print!("{}", outcome.show(args));
    }
    end?;
    let must_keep = args.durability == "quorum";
    if outcome.failed > 0 || must_keep && outcome.missing > 0 {
        bail!(
            "{} transactions failed, {} acknowledged rows are missing",
            outcome.failed,
            outcome.missing
        );
    }
    Ok(0)
}

fn measure(args: &Args, nodes: &mut Nodes, outcome: &mut Outcome) -> anyhow::Result<()> {
    let primary = nodes.primary()?;
    if args.durability != "async" {
        nodes.nodes[primary].set_durability(&args.durability)?;
    }
    let db = nodes.nodes[primary].open()?;
    db.execute_batch("PRAGMA journal_mode=wal; CREATE TABLE t(id INTEGER PRIMARY KEY, v)")?;
    drop(db);
    nodes.wait_until_whole()?;
    let rows = Arc::new(Rows::default());
    for round in 1..=args.kills {
        let gap = kill(nodes, &rows).with_context(|| format!("kill {round}"))?;
        eprintln!("kill {round} of {}: {} ms", args.kills, gap.as_millis());
        outcome.kill_gaps.push(gap);
    }
    if args.handoffs > 0 {
        hand_over(args, nodes, &rows, outcome)?;
    }
    let primary = nodes.primary()?;
    let db = nodes.nodes[primary].open()?;
    let mut ids = db.prepare("SELECT id FROM t")?;
    let there: HashSet<i64> = ids
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let acknowledged = rows.acknowledged.lock();
    outcome.acknowledged = acknowledged.len();
    outcome.missing = acknowledged.iter().filter(|id| !there.contains(id)).count();
    Ok(())
}

/// Kills the primary while it is written, and returns after how long an open connection elsewhere could write.
fn kill(nodes: &mut Nodes, rows: &Arc<Rows>) -> anyhow::Result<Duration> {
    let primary = nodes.primary()?;
    let others: Vec<usize> = (0..nodes.nodes.len()).filter(|i| *i != primary).collect();
    let open = |i: &usize| -> rusqlite::Result<Connection> {
        let db = nodes.nodes[*i].open()?;
        db.busy_timeout(Duration::ZERO)?;
        db.query_row("SELECT count(*) FROM t", [], |_| Ok(()))?;
        Ok(db)
    };
    let waiting: Vec<Connection> = others.iter().map(open).collect::<Result<_, _>>()?;
    let load = Writers::start(vec![nodes.nodes[primary].open()?], rows)?;
    let until = Instant::now() + LOAD;
    wait_until("the primary to be written", PATIENCE, || {
        let written = load.shared.written[0].load(Ordering::Acquire);
        Ok(Instant::now() >= until && written > 0)
    })?;
    let killed_at = nodes.nodes[primary].kill()?;
    let mut failure = None;
    let gap = 'writes: loop {
        for db in &waiting {
            match rows.insert(db) {
                Ok(()) => break 'writes killed_at.elapsed(),
                Err(error) => failure = Some(error),
            }
        }
        if is_interrupted() {
            bail!("interrupted");
        }
        if killed_at.elapsed() > PATIENCE {
            let last = failure.map(|error| error.to_string()).unwrap_or_default();
            bail!("nobody can write after {PATIENCE:?}: {last}");
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    // Nothing of the dead mount may be open when its node starts again.
    load.stop();
    drop(waiting);
    nodes.nodes[primary].start()?;
    nodes.wait_until_whole()?;
    Ok(gap)
}

/// Hands the role around while all nodes are written.
fn hand_over(
    args: &Args,
    nodes: &mut Nodes,
    rows: &Arc<Rows>,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let databases = nodes.nodes.iter().map(super::nodes::Node::open);
    let writers = Writers::start(databases.collect::<Result<_, _>>()?, rows)?;
    let taken_by = |node: usize| writers.shared.written[node].load(Ordering::Acquire);
    let is_taken = |node: usize, before: u64| {
        wait_until(&format!("writes on node{node}"), PATIENCE, || {
            Ok(taken_by(node) >= before + TAKEN)
        })
    };
    let mut primary = nodes.primary()?;
    is_taken(primary, taken_by(primary))?;
    for round in 1..=args.handoffs {
        let to = (primary + 1) % nodes.nodes.len();
        let before = taken_by(to);
        writers.shared.reset();
        nodes.nodes[to]
            .promote()
            .with_context(|| format!("handoff {round}"))?;
        is_taken(to, before)?;
        let gap = writers.shared.longest_gap();
        eprintln!(
            "handoff {round} of {}: {} ms",
            args.handoffs,
            gap.as_millis()
        );
        outcome.handoff_gaps.push(gap);
        primary = to;
    }
    let shared = writers.stop();
    outcome.failed = shared.failed.load(Ordering::Acquire);
    outcome.first_failure = shared.first_failure.lock().clone();
    outcome.written_in_handoffs = shared
        .written
        .iter()
        .map(|n| n.load(Ordering::Acquire))
        .sum();
    nodes.wait_until_whole()
}

impl Outcome {
    fn show(&self, args: &Args) -> String {
        let mut out = format!(
            "{} nodes of litefs {} on this machine, durability {}, {DB} in WAL mode\n",
            args.nodes,
            super::super::version::number(),
            args.durability
        );
        if args.kills > 0 {
            out.push_str(&format!(
                "{} kills: until a program with an open connection on another node could write\n",
                self.kill_gaps.len()
            ));
            out.push_str(&Distribution::new(self.kill_gaps.clone()).show());
        }
        if args.handoffs > 0 {
            out.push_str(&format!(
                "{} handoffs: longest time in which no writer on any node was acknowledged\n",
                self.handoff_gaps.len()
            ));
            out.push_str(&Distribution::new(self.handoff_gaps.clone()).show());
            out.push_str(&format!(
                "transactions during handoffs: {}, failed: {}{}\n",
                self.written_in_handoffs,
                self.failed,
                match &self.first_failure {
                    Some(error) => format!(" (first: {error})"),
                    None => String::new(),
                }
            ));
        }
        out.push_str(&format!(
            "acknowledged rows: {}, missing at the end: {}\n",
            self.acknowledged, self.missing
        ));
        out
    }
}
