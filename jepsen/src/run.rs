//! One run: a cluster, clients, faults, healing, and what the checkers say of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::checker::{self, Anomaly, Evidence, Final};
use crate::cluster::{Cluster, READY, Settings};
use crate::dice::Dice;
use crate::history::{self, Micros, Op, Outcome, now};
use crate::nemesis::{self, Fault};
use crate::os;
use crate::workload::{self, Workload};

const WARM_UP: Duration = Duration::from_secs(2);
const AFTER_HEALING: Duration = Duration::from_secs(3);
const CONVERGE: Duration = Duration::from_secs(60);

/// What is to be run.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) litefs: PathBuf,
    pub(crate) work: PathBuf,
    pub(crate) fault: String,
    pub(crate) durability: String,
    pub(crate) workload: Workload,
    pub(crate) nodes: usize,
    pub(crate) seconds: u64,
    pub(crate) seed: u64,
    pub(crate) pace_ms: u64,
    pub(crate) debug: bool,
    /// Logs are kept even if all is well.
    pub(crate) keep: bool,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Outcomes {
    pub(crate) counts: [usize; 3],
    /// Longest time in which a database was not written.
    pub(crate) gap: Duration,
    /// Acknowledged rows that are missing, and how many of them are accounted for.
    pub(crate) missing: usize,
    pub(crate) excused: usize,
    pub(crate) anomalies: Vec<Anomaly>,
    /// Where the logs are, if they were kept.
    pub(crate) kept: Option<PathBuf>,
}

impl Plan {
    pub(crate) fn faults(&self) -> Result<Vec<Fault>> {
        nemesis::faults(&self.fault)
    }

    /// The command that does this again.
    pub(crate) fn replay(&self) -> String {
        format!(
            "litefs-jepsen --litefs {} run --workload {} --fault {} --durability {} --seconds {} --seed {} --nodes {}",
            self.litefs.display(),
            self.workload,
            self.fault,
            self.durability,
            self.seconds,
            self.seed,
            self.nodes
        )
    }

    /// Runs it.
    pub(crate) fn run(&self) -> Result<Outcomes> {
        let faults = self.faults()?;
        let name = format!(
            "{}-{}-{}-{}",
            self.fault,
            self.durability,
            self.seed,
            std::process::id()
        );
        let dir = self.work.join(name);
        fs::create_dir_all(&dir)?;
        let settings = Settings {
            litefs: self.litefs.clone(),
            dir: dir.clone(),
            nodes: self.nodes,
            durability: self.durability.clone(),
            workload: self.workload,
            seed: self.seed,
            pace_ms: self.pace_ms,
            fake_clocks: faults.iter().any(|f| f.name == "clock-jump"),
            debug: self.debug,
        };
        let result = self.run_in(&dir, settings, &faults);
        let keep = self.keep || !result.as_ref().is_ok_and(|o| o.anomalies.is_empty());
        if keep && !crate::interrupt::is_asked() {
            // Disks are large, and what lost is copied.
            for image in (0..self.nodes).map(|i| dir.join(format!("n{i}/disk.img"))) {
                let _ = fs::remove_file(image);
            }
            return result
                .map(|o| Outcomes {
                    kept: Some(dir.clone()),
                    ..o
                })
                .with_context(|| format!("logs: {}", dir.display()));
        }
        fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        result
    }

    fn run_in(&self, dir: &Path, settings: Settings, faults: &[Fault]) -> Result<Outcomes> {
        let mut cluster = Cluster::start(settings).context("the cluster does not start")?;
        let evidence = self.gather(&mut cluster, faults);
        // Also of a run that failed.
        let wrote = write_down(dir, &cluster);
        let evidence = evidence?;
        wrote?;
        let anomalies = checker::check(&evidence);
        let lines: Vec<String> = anomalies
            .iter()
            .map(|a| format!("{}: {} {}\n", a.guarantee, a.db, a.text))
            .collect();
        fs::write(dir.join("anomalies"), lines.concat())?;
        if self.keep || !anomalies.is_empty() {
            for node in &cluster.nodes {
                let to = dir.join(format!("n{}/data", node.index));
                let _ = os::run(
                    std::process::Command::new("cp")
                        .arg("-a")
                        .arg(node.data())
                        .arg(to),
                );
            }
        }
        let excuses: Vec<bool> = evidence
            .finals
            .keys()
            .flat_map(|db| checker::missing(&evidence, db))
            .map(|(_, excuse)| excuse.is_some())
            .collect();
        Ok(Outcomes {
            counts: checker::count(&evidence.operations),
            gap: longest_gap(&evidence),
            missing: excuses.len(),
            excused: excuses.into_iter().filter(|excused| *excused).count(),
            anomalies,
            kept: None,
        })
    }

    fn gather(&self, cluster: &mut Cluster, faults: &[Fault]) -> Result<Evidence> {
        let databases: Vec<&str> = self.workload.databases().iter().map(|db| db.name).collect();
        let primary = cluster.primary_soon()?;
        let mount = cluster.nodes[primary].mount();
        workload::create(&mount, self.workload).context("create the databases")?;
        cluster.wait("the databases to be everywhere", READY, |c| {
            databases.iter().all(|db| c.is_level(db))
        })?;
        cluster.note("begin");
        for index in 0..self.nodes {
            cluster.start_client(index)?;
        }
        cluster.sleep(WARM_UP)?;
        let mut dice = Dice::new(self.seed);
        let windows = nemesis::run(
            cluster,
            faults,
            Duration::from_secs(self.seconds),
            &mut dice,
        )?;
        cluster.heal()?;
        let healed = now();
        cluster.note("healed for good");
        if let Err(error) = cluster.settle() {
            crate::interrupt::check()?;
            cluster.troubles.push(format!("after healing: {error:#}"));
        }
        cluster.note("all ready");
        cluster.sleep(AFTER_HEALING)?;
        let resume = Duration::from_micros(checker::RESUME);
        let _ = cluster.wait("writes", resume, |c| {
            let events = c.events.lock().map(|e| e.clone()).unwrap_or_default();
            databases.iter().all(|db| {
                events
                    .iter()
                    .rev()
                    .take_while(|e| e.time > healed)
                    .any(|e| {
                        e.db == *db
                            && e.outcome == Some(Outcome::Ok)
                            && matches!(e.op, Op::Write(_))
                    })
            })
        });
        cluster.note("clients stop");
        cluster.stop_clients();
        let _ = cluster.wait("all nodes to be level", CONVERGE, |c| {
            databases.iter().all(|db| c.is_level(db))
        });
        crate::interrupt::check()?;
        cluster.note("reading");
        let mut finals = BTreeMap::new();
        let mut kept_apart = BTreeMap::new();
        for db in databases {
            let mut states = Vec::new();
            for (node, pos) in cluster.nodes.iter().zip(cluster.positions(db)) {
                let content = cluster.content(&node.mount().join(db));
                states.push(Final {
                    pos,
                    content: content.map_err(|e| format!("{e:#}")),
                });
            }
            finals.insert(db.to_owned(), states);
            kept_apart.insert(db.to_owned(), rows_kept_apart(cluster, db)?);
        }
        for node in &cluster.nodes {
            let logs = node.logs();
            let panics = logs.lines().filter(|line| line.contains("panicked at"));
            let panics = panics.map(|line| format!("n{}: {line}", node.index));
            cluster.troubles.extend(panics);
        }
        let events = cluster.events.lock().map(|e| e.clone()).unwrap_or_default();
        Ok(Evidence {
            operations: history::operations(&events).map_err(anyhow::Error::msg)?,
            finals,
            kept_apart,
            is_quorum: self.durability == "quorum",
            lost_disks: cluster.lost_disks.clone(),
            windows,
            healed,
            troubles: cluster.troubles.clone(),
        })
    }
}

/// Reads the databases that the nodes keep of histories that lost.
fn rows_kept_apart(cluster: &Cluster, db: &str) -> Result<BTreeSet<i64>> {
    let mut rows = BTreeSet::new();
    for node in &cluster.nodes {
        let Ok(dirs) = fs::read_dir(node.data().join("dbs")) else {
            continue;
        };
        for dir in dirs {
            let dir = dir?.path();
            let name = fs::read_to_string(dir.join("name")).unwrap_or_default();
            if name.lines().next() != Some(db) {
                continue;
            }
            // Whole databases: those of entries, and those that a start moved away.
            let entries = files_of(&dir.join("lost"))?;
            let whole = entries.into_iter().map(|entry| entry.join("database.db"));
            let moved = files_of(&dir.join("quarantine"))?;
            for path in whole.chain(moved) {
                if path.exists() && path.extension().is_some_and(|e| e == "db") {
                    // One that cannot be read accounts for nothing.
                    match cluster.content(&path) {
                        Ok(content) => rows.extend(content.ids),
                        Err(error) => eprintln!("{error:#}"),
                    }
                }
            }
        }
    }
    Ok(rows)
}

/// Returns what is in a directory; nothing if there is none.
fn files_of(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", dir.display())),
    }
}

fn longest_gap(evidence: &Evidence) -> Duration {
    let mut longest = 0;
    for db in evidence.finals.keys() {
        let mut ends: Vec<Micros> = evidence
            .operations
            .iter()
            .filter(|o| o.db == *db && o.outcome == Outcome::Ok && matches!(o.op, Op::Write(_)))
            .filter_map(|o| o.end)
            .collect();
        ends.sort_unstable();
        let gaps = ends.iter().zip(ends.iter().skip(1)).map(|(a, b)| b - a);
        longest = longest.max(gaps.max().unwrap_or(0));
    }
    Duration::from_micros(longest)
}

/// Leaves history and diary beside the logs.
fn write_down(dir: &Path, cluster: &Cluster) -> Result<()> {
    let events = cluster.events.lock().map(|e| e.clone()).unwrap_or_default();
    let mut history = std::io::BufWriter::new(fs::File::create(dir.join("history.jsonl"))?);
    for event in events {
        writeln!(history, "{}", serde_json::to_string(&event)?)?;
    }
    history.flush()?;
    let mut diary = String::new();
    let first = cluster.diary.first().map_or(0, |(at, _)| *at);
    for (at, what) in &cluster.diary {
        let secs = Duration::from_micros(at.saturating_sub(first)).as_secs_f64();
        diary += &format!("{at} {secs:8.3} {what}\n");
    }
    let wall = std::process::Command::new("date")
        .args(["-u", "+%T.%6N"])
        .output()?;
    diary += &format!("{} is {}", now(), String::from_utf8_lossy(&wall.stdout));
    fs::write(dir.join("diary"), diary)?;
    Ok(())
}

/// Says what came of a run, in lines.
pub(crate) fn print(plan: &Plan, outcomes: &Outcomes, took: Instant) {
    let [ok, fail, info] = outcomes.counts;
    println!(
        "{} {} seed {}: {ok} ok, {fail} failed, {info} unknown; longest gap {:.1} s; {} missing, {} accounted for; {} anomalies ({:.0} s)",
        plan.fault,
        plan.durability,
        plan.seed,
        outcomes.gap.as_secs_f64(),
        outcomes.missing,
        outcomes.excused,
        outcomes.anomalies.len(),
        took.elapsed().as_secs_f64(),
    );
    print_anomalies(plan, outcomes);
}

/// Says what is wrong, where to look, and how to see it again.
pub(crate) fn print_anomalies(plan: &Plan, outcomes: &Outcomes) {
    const SHOWN: usize = 12;
    for anomaly in outcomes.anomalies.iter().take(SHOWN) {
        println!("  {}: {} {}", anomaly.guarantee, anomaly.db, anomaly.text);
    }
    if outcomes.anomalies.len() > SHOWN {
        println!("  and {} more", outcomes.anomalies.len() - SHOWN);
    }
    if let Some(dir) = &outcomes.kept {
        println!("  logs, history, diary: {}", dir.display());
    }
    if !outcomes.anomalies.is_empty() {
        println!("  again: {}", plan.replay());
    }
}
