//! What is broken, and how.
//!
//! A fault is injected, holds for a while, and is taken back. Which node, how long, and what next is drawn from the seed; who
//! is primary at that moment is not, so that a replay meets the same schedule, if not the same moment.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::checker::Window;
use crate::cluster::{Cluster, READY};
use crate::dice::Dice;
use crate::history::now;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) name: &'static str,
    pub(crate) says: &'static str,
    pub(crate) min_nodes: usize,
    /// While it holds, a majority is there that can talk to each other: writes must go on.
    pub(crate) leaves_majority: bool,
    /// It is over when its injection is.
    is_moment: bool,
}

const fn fault(name: &'static str, says: &'static str) -> Fault {
    Fault {
        name,
        says,
        min_nodes: 3,
        leaves_majority: false,
        is_moment: false,
    }
}

impl Fault {
    const fn leaves_majority(self) -> Fault {
        Fault {
            leaves_majority: true,
            ..self
        }
    }
    const fn moment(self) -> Fault {
        Fault {
            is_moment: true,
            ..self
        }
    }
    const fn of_five(self) -> Fault {
        Fault {
            min_nodes: 5,
            ..self
        }
    }
}

/// All kinds of faults.
pub(crate) const FAULTS: &[Fault] = &[
    fault("none", "nothing").leaves_majority(),
    fault(
        "kill-primary",
        "kill -9 of the primary's daemon; programs live on",
    )
    .leaves_majority(),
    fault("kill-one", "kill -9 of any daemon").leaves_majority(),
    fault("kill-all", "kill -9 of all daemons at once"),
    fault(
        "pause-primary",
        "SIGSTOP of the primary past its lease, then SIGCONT",
    )
    .leaves_majority(),
    fault("pause-one", "SIGSTOP of any node").leaves_majority(),
    fault("pause-all", "SIGSTOP of all nodes"),
    fault(
        "partition-primary",
        "the primary hears nobody and is heard by nobody",
    )
    .leaves_majority(),
    fault("partition-one", "any node is cut off").leaves_majority(),
    fault(
        "partition-half",
        "the primary and one more are cut off from the other three",
    )
    .of_five()
    .leaves_majority(),
    fault("shatter", "nobody hears anybody"),
    fault(
        "oneway-from-primary",
        "nobody hears the primary, which hears all",
    )
    .leaves_majority(),
    fault(
        "oneway-to-primary",
        "the primary hears nobody, and is heard",
    )
    .leaves_majority(),
    fault("bridge", "one node hears all, the others hear only it").leaves_majority(),
    fault("ring", "each node hears its two neighbours only").of_five(),
    fault("flap", "a partition comes and goes, several times a second").moment(),
    fault("disk-full-primary", "the primary's disk is full"),
    fault("disk-full-one", "a disk is full"),
    fault("disk-full-all", "all disks are full"),
    fault("power-primary", "power loss of the primary's machine").leaves_majority(),
    fault("power-one", "power loss of any machine").leaves_majority(),
    fault("power-all", "power loss of all machines at once"),
    fault(
        "clock-jump",
        "wall clocks jump by seconds to years, on some nodes",
    ),
    fault(
        "clock-monotonic",
        "a node restarts with another monotonic clock",
    )
    .leaves_majority(),
    fault(
        "disk-lost",
        "a disk is lost, and the node comes back with an empty one",
    )
    .leaves_majority(),
    fault("handoff", "a storm of POST /promote").moment(),
    fault("rolling", "all nodes are restarted in turn by SIGTERM").moment(),
    fault(
        "member",
        "a node is removed, and joins again with an empty disk",
    )
    .leaves_majority(),
];

/// Finds faults by `a` or `a+b`.
pub(crate) fn faults(names: &str) -> Result<Vec<Fault>> {
    let find = |name: &str| match FAULTS.iter().find(|fault| fault.name == name) {
        Some(fault) => Ok(*fault),
        None => bail!("no fault is called {name}: see litefs-jepsen faults"),
    };
    names.split('+').map(find).collect()
}

/// Breaks things for so long; returns when what held, for the checkers.
pub(crate) fn run(
    cluster: &mut Cluster,
    faults: &[Fault],
    how_long: Duration,
    dice: &mut Dice,
) -> Result<Vec<Window>> {
    let mut windows = Vec::new();
    let end = now() + u64::try_from(how_long.as_micros()).unwrap_or(0);
    while now() < end {
        let mut order = faults.to_vec();
        dice.shuffle(&mut order);
        let begin = now();
        for (number, fault) in order.iter().enumerate() {
            if number > 0 {
                cluster.sleep(Duration::from_millis(dice.between(50, 1500)))?;
            }
            let what = inject(cluster, *fault, dice)?;
            cluster.note(format!("{}: {what}", fault.name));
        }
        if order.iter().any(|fault| !fault.is_moment) {
            // Longer than a lease, often longer than a busy timeout, now and then long enough to see writes go on.
            let hold = match dice.below(3) {
                0 => dice.between(300, 1500),
                1 => dice.between(1500, 5000),
                _ => dice.between(8000, 14_000),
            };
            cluster.sleep(Duration::from_millis(hold))?;
        }
        if let [fault] = order[..]
            && fault.leaves_majority
        {
            windows.push(Window {
                fault: fault.name.to_owned(),
                begin,
                end: now(),
            });
        }
        cluster.heal()?;
        cluster.note("healed");
        if order
            .iter()
            .any(|f| ["disk-lost", "member"].contains(&f.name))
        {
            // The next one must not be a second loss at the same time.
            cluster.settle()?;
            let databases = cluster.settings.workload.databases();
            cluster.wait("the new node to be level", READY, |c| {
                databases
                    .iter()
                    .all(|db| c.positions(db.name).iter().all(Option::is_some))
            })?;
            cluster.note("the new node votes");
        }
        cluster.sleep(Duration::from_millis(dice.between(300, 4000)))?;
    }
    Ok(windows)
}

/// Both ways between two nodes.
fn both(a: usize, b: usize) -> [(usize, usize); 2] {
    [(a, b), (b, a)]
}

/// Everything between two groups.
fn between(ours: &[usize], theirs: &[usize]) -> BTreeSet<(usize, usize)> {
    let pairs = ours.iter().flat_map(|a| theirs.iter().map(|b| (*a, *b)));
    pairs.flat_map(|(a, b)| both(a, b)).collect()
}

#[expect(
    clippy::too_many_lines,
    reason = "one arm for each fault, straight down"
)]
fn inject(cluster: &mut Cluster, fault: Fault, dice: &mut Dice) -> Result<String> {
    let all: Vec<usize> = (0..cluster.nodes.len()).collect();
    let any = dice.one(&all).unwrap_or(0);
    let targets_primary = fault.name.contains("primary") || fault.name == "partition-half";
    let target = match targets_primary {
        true => cluster.primary_soon()?,
        false => any,
    };
    let others: Vec<usize> = all.iter().copied().filter(|i| *i != target).collect();
    let mut said = format!("n{target}");
    match fault.name {
        "none" => said.clear(),
        "kill-primary" | "kill-one" => cluster.nodes[target].kill(),
        "kill-all" => {
            cluster
                .nodes
                .iter_mut()
                .for_each(crate::cluster::Node::kill);
            said = "all".into();
        }
        "pause-primary" | "pause-one" => cluster.nodes[target].pause(),
        "pause-all" => {
            cluster
                .nodes
                .iter_mut()
                .for_each(crate::cluster::Node::pause);
            said = "all".into();
        }
        "partition-primary" | "partition-one" => {
            cluster.cut_network(between(&[target], &others))?
        }
        "partition-half" => {
            let friend = dice.one(&others).unwrap_or(0);
            let rest: Vec<usize> = others.iter().copied().filter(|i| *i != friend).collect();
            cluster.cut_network(between(&[target, friend], &rest))?;
            said = format!("n{target} n{friend} | the rest");
        }
        "shatter" => {
            let pairs = all.iter().flat_map(|a| all.iter().map(|b| (*a, *b)));
            cluster.cut_network(pairs.filter(|(a, b)| a != b).collect())?;
            said = "all".into();
        }
        "oneway-from-primary" => {
            cluster.cut_network(others.iter().map(|to| (target, *to)).collect())?;
        }
        "oneway-to-primary" => {
            cluster.cut_network(others.iter().map(|from| (*from, target)).collect())?;
        }
        "bridge" => {
            let mut sides = others.clone();
            dice.shuffle(&mut sides);
            let (left, right) = sides.split_at(sides.len() / 2);
            cluster.cut_network(between(left, right))?;
            said = format!("{left:?} - n{target} - {right:?}");
        }
        "ring" => {
            let mut order = all.clone();
            dice.shuffle(&mut order);
            let len = order.len();
            let mut pairs = BTreeSet::new();
            for (i, a) in order.iter().enumerate() {
                for (j, b) in order.iter().enumerate() {
                    let apart = (i + len - j) % len;
                    if apart > 1 && apart < len - 1 {
                        pairs.insert((*a, *b));
                    }
                }
            }
            cluster.cut_network(pairs)?;
            said = format!("{order:?}");
        }
        "flap" => {
            let turns = dice.between(6, 14);
            for _ in 0..turns {
                let one = dice.one(&all).unwrap_or(0);
                let rest: Vec<usize> = all.iter().copied().filter(|i| *i != one).collect();
                cluster.cut_network(between(&[one], &rest))?;
                cluster.sleep(Duration::from_millis(dice.between(30, 900)))?;
                cluster.cut_network(BTreeSet::new())?;
                cluster.sleep(Duration::from_millis(dice.between(10, 500)))?;
            }
            said = format!("{turns} times");
        }
        "disk-full-primary" | "disk-full-one" => cluster.nodes[target].disk.fill()?,
        "disk-full-all" => {
            for node in &cluster.nodes {
                node.disk.fill()?;
            }
            said = "all".into();
        }
        "power-primary" | "power-one" => cluster.cut_power(&[target])?,
        "power-all" => {
            cluster.cut_power(&all)?;
            said = "all".into();
        }
        "clock-jump" => {
            said.clear();
            for node in &cluster.nodes {
                let jumps = ["+0", "+5", "-5", "+3600", "-3600", "+400d", "-400d"];
                let jump = dice.one(&jumps).unwrap_or("+0");
                node.set_clock(jump)?;
                said += &format!("n{} {jump} ", node.index);
            }
        }
        "clock-monotonic" => {
            let ahead = Duration::from_secs(dice.one(&[3, 1000, 10_000_000]).unwrap_or(3));
            cluster.nodes[target].kill();
            cluster.nodes[target].ahead = ahead;
            cluster.start_node(target)?;
            said = format!("n{target} ahead by {ahead:?}");
        }
        "disk-lost" => cluster.lose_disk(target)?,
        "handoff" => said = handoffs(cluster, dice)?,
        "rolling" => {
            for index in all {
                match cluster.nodes[index].stop() {
                    Ok(Some(status)) if !status.success() => {
                        cluster
                            .troubles
                            .push(format!("n{index} stopped with {status}"));
                    }
                    Ok(_) => {}
                    Err(error) => cluster.troubles.push(format!("{error:#}")),
                }
                cluster.start_node(index)?;
                cluster.settle()?;
                cluster.note(format!("n{index} restarted"));
            }
            said = "all in turn".into();
        }
        "member" => {
            let primary = cluster.primary_soon()?;
            let rest: Vec<usize> = all.into_iter().filter(|i| *i != primary).collect();
            let leaver = dice.one(&rest).unwrap_or(0);
            let id = cluster.nodes[leaver]
                .overview()
                .map(|o| o.node.id)
                .unwrap_or_default();
            cluster.lose_disk(leaver)?;
            let path = format!("/v1/cluster/remove?node={id}");
            let answer = cluster.nodes[primary].ask("POST", &path, Duration::from_secs(10));
            said = format!(
                "n{leaver} ({id}) removed: {:?}",
                answer.map(|(status, _)| status)
            );
        }
        other => bail!("{other} is not made yet"),
    }
    Ok(said)
}

fn handoffs(cluster: &mut Cluster, dice: &mut Dice) -> Result<String> {
    let all: Vec<usize> = (0..cluster.nodes.len()).collect();
    let (mut done, mut refused) = (0, Vec::new());
    let end = now() + 1_000_000 * dice.between(3, 8);
    while now() < end {
        let to = dice.one(&all).unwrap_or(0);
        match cluster.nodes[to].ask("POST", "/promote", Duration::from_secs(15)) {
            Ok((200, _)) => done += 1,
            Ok((status, body)) => refused.push(format!("{status} {body:.200}")),
            Err(error) => refused.push(format!("{error:#}")),
        }
        cluster.sleep(Duration::from_millis(dice.below(400)))?;
    }
    let last = refused.last().map(String::as_str).unwrap_or_default();
    Ok(format!("{done} done, {} refused {last}", refused.len()))
}
