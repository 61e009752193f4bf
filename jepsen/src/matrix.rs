//! Every fault, one after the other, and a table.

use std::time::Instant;

use anyhow::Result;

use crate::nemesis::FAULTS;
use crate::run::{self, Outcomes, Plan};

/// Faults that are combined.
const COMBINED: [&str; 12] = [
    "kill-primary+partition-one",
    "pause-primary+kill-one",
    "pause-primary+handoff",
    "kill-one+handoff",
    "flap+kill-primary",
    "disk-full-one+kill-primary",
    "disk-full-primary+handoff",
    "power-one+partition-primary",
    "power-primary+pause-one",
    "power-all+clock-jump",
    "bridge+kill-one",
    "oneway-from-primary+pause-one",
];

/// Those that matter where commits return at once.
const ASYNC: [&str; 18] = [
    "none",
    "kill-primary",
    "kill-one",
    "kill-all",
    "pause-primary",
    "partition-primary",
    "oneway-from-primary",
    "bridge",
    "flap",
    "disk-full-primary",
    "power-primary",
    "power-all",
    "disk-lost",
    "handoff",
    "rolling",
    "member",
    "kill-primary+partition-one",
    "pause-primary+handoff",
];

/// A run of the matrix: fault, durability, least number of nodes.
fn plans(base: &Plan, only: Option<&str>) -> Vec<Plan> {
    let names = FAULTS.iter().map(|f| f.name).chain(COMBINED);
    let quorum = names.map(|name| (name, "quorum"));
    let all = quorum.chain(ASYNC.map(|name| (name, "async")));
    all.filter(|(name, durability)| {
        only.is_none_or(|only| format!("{name} {durability}").contains(only))
    })
    .map(|(name, durability)| {
        let mut plan = Plan {
            fault: name.into(),
            durability: durability.into(),
            ..base.clone()
        };
        let least = plan
            .faults()
            .unwrap_or_default()
            .iter()
            .map(|f| f.min_nodes)
            .max();
        plan.nodes = plan.nodes.max(least.unwrap_or(0));
        plan
    })
    .collect()
}

/// Runs all, or those whose `FAULT DURABILITY` contains a text. Returns whether all was well.
pub(crate) fn run(base: &Plan, only: Option<&str>) -> Result<bool> {
    let mut failed: Vec<(Plan, Result<Outcomes>)> = Vec::new();
    let plans = plans(base, only);
    let count = plans.len();
    println!(
        "{:<30} {:<7} {:>2} {:>7} {:>6} {:>5} {:>7} {:>12} {:>9} {:>10} verdict",
        "fault", "commits", "n", "ok", "fail", "info", "gap", "lost", "anomalies", "seed"
    );
    for plan in plans {
        if plan.fault.contains("clock-jump") && crate::cluster::faketime().is_none() {
            println!("{:<30} skipped: libfaketime is missing", plan.fault);
            continue;
        }
        let begin = Instant::now();
        let result = plan.run();
        crate::interrupt::check()?;
        let head = format!(
            "{:<30} {:<7} {:>2}",
            plan.fault, plan.durability, plan.nodes
        );
        match &result {
            Ok(outcomes) => {
                let [ok, fail, info] = outcomes.counts;
                let lost = match outcomes.missing {
                    0 => "0".to_owned(),
                    missing => format!("{missing} ({} kept)", outcomes.excused),
                };
                let verdict = if outcomes.anomalies.is_empty() {
                    "ok"
                } else {
                    "VIOLATED"
                };
                println!(
                    "{head} {ok:>7} {fail:>6} {info:>5} {:>5.1} s {lost:>12} {:>9} {:>10} {verdict}  ({:.0} s)",
                    outcomes.gap.as_secs_f64(),
                    outcomes.anomalies.len(),
                    plan.seed,
                    begin.elapsed().as_secs_f64(),
                );
                run::print_anomalies(&plan, outcomes);
            }
            Err(error) => {
                println!("{head} did not come to its end: {error:#}");
                println!("  again: {}", plan.replay());
            }
        }
        if !result
            .as_ref()
            .is_ok_and(|outcomes| outcomes.anomalies.is_empty())
        {
            failed.push((plan, result));
        }
    }
    println!("{count} runs, {} of them violated something", failed.len());
    for (plan, _) in &failed {
        println!("  {}", plan.replay());
    }
    Ok(failed.is_empty())
}
