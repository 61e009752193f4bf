//! Random faults and random work, then peace.

use std::collections::BTreeSet;

use super::client::Promise;
use super::mutants::{Mutant, is_on};
use super::raft::Durability;
use super::world::{Counts, Id, MACHINE, MS, Us, World};
use crate::replication::DbName;

/// What came of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Stands for all that happened, and when.
    pub(crate) trace: u64,
    pub(crate) counts: Counts,
}

/// What went wrong in a run.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) seed: u64,
    pub(crate) what: String,
    pub(crate) story: String,
}

/// How often faults go on for a while, and then all is well.
const ROUNDS: u32 = 2;
/// How long faults go on.
const CHAOS: Us = 5_000 * MS;
/// How long a cluster may take, once all is well, until writes are open and all nodes are level.
const HEAL: Us = 12_000 * MS;

struct Chaos {
    world: World,
    dbs: Vec<DbName>,
    is_peace: bool,
    /// Machines to start or to continue, and when.
    due: Vec<(Us, Id)>,
}

/// Runs one seed.
pub(crate) fn run(seed: u64, keeps_log: bool) -> Result<Report, Failure> {
    let mut world = World::new(seed, keeps_log);
    let dbs: Vec<DbName> = ["a", "b", "c", "d", "e"]
        .iter()
        .map(|name| name.parse().expect("a name"))
        .collect();
    let durabilities: Vec<_> = dbs
        .iter()
        .map(|db| (db.clone(), some_durability(&mut world)))
        .collect();
    let n = if world.one_in(5) { 5 } else { 3 };
    for id in 1..=n {
        world.add(id);
        world.start(id);
    }
    world.raft_form(&(1..=n).collect(), &durabilities);
    world.short_logs = if world.one_in(3) { 4 } else { 25 };
    world.compactions = if world.one_in(3) { 2 } else { 10 };
    let mut chaos = Chaos {
        world,
        dbs,
        is_peace: false,
        due: Vec::new(),
    };
    chaos.live();
    let world = &mut chaos.world;
    let commits = world.client.committed.iter();
    for commit in commits {
        let of = match commit.promise {
            Promise::Nobody => "commits that wait for nobody",
            Promise::Bounded { .. } => "commits with a bound",
            Promise::Quorum { .. } => "commits of a quorum",
        };
        *world.counts.entry(of).or_default() += 1;
    }
    match world.failure.take() {
        None => Ok(Report {
            trace: world.trace,
            counts: std::mem::take(&mut world.counts),
        }),
        Some(what) => Err(Failure {
            seed,
            what,
            story: world.story(),
        }),
    }
}

fn some_durability(world: &mut World) -> Durability {
    match world.random(0..6) {
        0 => Durability::Async,
        1 => Durability::Bounded {
            ms: world.random(20..500),
            transactions: world.random(0..8),
        },
        _ => Durability::Quorum,
    }
}

impl Chaos {
    fn live(&mut self) {
        for _ in 0..ROUNDS {
            let end = self.world.now + CHAOS;
            while self.world.now < end && self.world.failure.is_none() {
                let wait = self.world.random(10..300) * MS;
                self.pass(wait);
                self.act();
            }
            self.make_peace();
        }
    }

    /// Lets time pass, while programs write.
    fn pass(&mut self, time: Us) {
        let end = self.world.now + time;
        while self.world.now < end && self.world.failure.is_none() {
            let next = self.world.now + self.world.random(MS..12 * MS);
            self.world.run_until(next.min(end));
            let now = self.world.now;
            while let Some(i) = self.due.iter().position(|(at, _)| *at <= now) {
                let (_, id) = self.due.remove(i);
                self.revive(id);
            }
            for id in self.world.ids() {
                if !self.world.one_in(2) {
                    continue;
                }
                let i = self.world.random(0..self.dbs.len() as u64);
                let i = usize::try_from(i).unwrap_or(0);
                let db = self.dbs[i].clone();
                // Two there are from the beginning, the others sooner or later.
                let is_there = self.world.nodes[&id].disk.dbs.contains_key(&db);
                if i >= 2 && !is_there && !self.is_peace && !self.world.one_in(60) {
                    continue;
                }
                let is_long = now < self.world.long_writes_until && self.world.one_in(3);
                let lasts = match self.world.random(0..200) {
                    _ if is_long => self.world.random(20 * MS..1_500 * MS),
                    0 => 1_500 * MS,
                    1..10 => 60 * MS,
                    _ => MS,
                };
                self.world.write(id, &db, lasts);
            }
        }
    }

    fn any(&mut self) -> Id {
        let ids = self.world.ids();
        let i = self.world.random(0..ids.len() as u64);
        ids[usize::try_from(i).unwrap_or(0)]
    }

    /// Prefers who matters.
    fn victim(&mut self) -> Id {
        let mut nodes = self.world.nodes.values();
        let primary = nodes.find(|node| node.is_up && node.process.is_primary);
        match primary.map(|node| node.id) {
            Some(id) if self.world.one_in(2) => id,
            _ => self.any(),
        }
    }

    fn later(&mut self, id: Id, from: Us, to: Us) {
        let at = self.world.now + self.world.random(from * MS..to * MS);
        self.due.push((at, id));
    }

    fn revive(&mut self, id: Id) {
        if !self.world.nodes.contains_key(&id) {
            return;
        }
        match self.world.nodes[&id].is_up {
            true => self.world.set_paused(id, false, false),
            false => self.world.start(id),
        }
    }

    fn act(&mut self) {
        // A plot is given its time.
        if !self.world.plots.is_empty() && !self.world.one_in(4) {
            return;
        }
        match self.world.random(0..150) {
            140..146 => self.set_durability(),
            146.. => self.drop_db(),
            100..140 => self.world.plot(),
            0..14 => self.kill(),
            14..17 => self.kill_all(),
            17..30 => self.pause(),
            30..46 => self.cut(),
            46..62 => self.heal(),
            62..68 => self.slow_net(),
            68..80 => self.hand_over(),
            80..87 => self.lose_disk(),
            87..92 => self.remove_voter(),
            92..97 => {
                let id = self.victim();
                self.world.note(|| format!("streams of {id} break"));
                self.world.reset_streams(id);
            }
            _ => {}
        }
    }

    fn any_db(&mut self) -> DbName {
        let i = self.world.random(0..self.dbs.len() as u64);
        self.dbs[usize::try_from(i).unwrap_or(0)].clone()
    }

    fn set_durability(&mut self) {
        let (on, db) = (self.victim(), self.any_db());
        let durability = some_durability(&mut self.world);
        self.world.raft_set(on, &db, durability);
    }

    fn drop_db(&mut self) {
        let (on, db) = (self.victim(), self.any_db());
        self.world.drop_db(on, &db);
    }

    fn kill(&mut self) {
        let id = self.victim();
        let is_power_cut = self.world.one_in(2);
        self.world
            .note(|| format!("kill {id}, power cut {is_power_cut}"));
        self.world.kill(id, is_power_cut);
        self.later(id, 5, 1_500);
    }

    fn kill_all(&mut self) {
        self.world.note(|| "power cut of all".to_owned());
        for id in self.world.ids() {
            self.world.kill(id, true);
            self.later(id, 5, 800);
        }
    }

    fn pause(&mut self) {
        let id = self.victim();
        let with_programs = self.world.one_in(2);
        self.world
            .note(|| format!("pause {id}, programs {with_programs}"));
        self.world.set_paused(id, true, with_programs);
        self.later(id, 20, 2_000);
    }

    fn cut(&mut self) {
        let machines: BTreeSet<u64> = self.world.ids().iter().map(|id| id % MACHINE).collect();
        let victim = self.victim() % MACHINE;
        let shape = self.world.random(0..4);
        let mut some = BTreeSet::from([victim]);
        if shape == 0 {
            for machine in &machines {
                if self.world.one_in(2) {
                    some.insert(*machine);
                }
            }
        }
        let other = self.any() % MACHINE;
        let both = self.world.random(0..3);
        self.world
            .note(|| format!("cut {some:?} shape {shape} both {both}"));
        for a in &some {
            for b in machines.iter().filter(|b| !some.contains(b)) {
                // Shape 1: one machine from one other.
                if shape == 1 && *b != other {
                    continue;
                }
                if both != 1 {
                    self.world.cut.insert((*a, *b));
                }
                if both != 2 {
                    self.world.cut.insert((*b, *a));
                }
            }
        }
    }

    fn heal(&mut self) {
        let is_partly = self.world.one_in(3);
        self.world.note(|| format!("heal, partly {is_partly}"));
        let keep = self.world.random(0..u64::MAX);
        let is_kept = |(a, b): &(u64, u64)| is_partly && keep >> ((a * 7 + b) % 64) & 1 == 1;
        self.world.cut.retain(is_kept);
    }

    fn slow_net(&mut self) {
        let i = self.world.random(0..4);
        let slowest = [1, 10, 45, 90][usize::try_from(i).unwrap_or(0)] * MS;
        self.world.delay = 100..slowest;
        self.world.lose_percent = u32::try_from(self.world.random(0..20)).unwrap_or(0);
        self.world.double_percent = u32::try_from(self.world.random(0..20)).unwrap_or(0);
    }

    fn hand_over(&mut self) {
        let (from, to) = (self.victim(), self.any());
        if from != to && self.world.nodes[&from].is_up {
            self.world.hand_over(from, to);
        }
    }

    /// A machine dies, and comes back with an empty disk: as another node. Only while the others have a quorum's worth of disks.
    fn lose_disk(&mut self) {
        let id = self.victim();
        let is_whole = self.world.nodes.values().all(|node| {
            let voters = node.raft.voters();
            voters == self.world.ids().into_iter().collect() && node.raft.sets().len() == 1
        });
        let (up, all) = (&self.world.nodes, self.world.nodes.len());
        let is_level = up.values().filter(|n| n.is_up && n.disk.accepted > 0);
        if !is_whole || is_level.count() < all {
            return;
        }
        self.world.note(|| format!("{id} loses its disk"));
        self.world.count("disks lost");
        self.world.kill(id, false);
        let node = self.world.nodes.remove(&id).expect("a node");
        let world = &mut self.world;
        for copy in node.disk.dbs.values() {
            let ids = copy
                .log
                .iter()
                .map(|tx| tx.id)
                .chain(copy.wal.iter().copied());
            world.client.excused.extend(ids);
        }
        world.client.excused.extend(&node.disk.quarantine);
        let new = match is_on(Mutant::EmptyDiskKeepsId) {
            true => id,
            false => id + MACHINE,
        };
        world.add(new);
        if is_on(Mutant::EmptyDiskKeepsId) {
            world.node(new).raft = node.raft;
            world.node(new).run = node.run;
        }
        self.later(new, 5, 800);
    }

    fn remove_voter(&mut self) {
        let (on, id) = (self.victim(), self.any());
        let mut voters = self.world.nodes[&on].raft.voters();
        if on == id || voters.len() < 3 || !voters.remove(&id) {
            return;
        }
        self.world.begin_change(on, voters);
    }

    fn make_peace(&mut self) {
        if self.world.failure.is_some() {
            return;
        }
        self.world.note(|| "peace".to_owned());
        self.is_peace = true;
        self.world.end_plots();
        self.world.cut.clear();
        self.world.delay = 100..MS;
        self.world.lose_percent = 0;
        self.world.double_percent = 0;
        self.due.clear();
        let gone = self.gone_for_good();
        for id in self.world.ids() {
            match gone == Some(id) {
                true => self.world.kill(id, false),
                false => self.revive(id),
            }
        }
        self.last_blow();
        let end = self.world.now + HEAL;
        let before = self.world.client.committed.len();
        loop {
            self.pass(50 * MS);
            if self.world.failure.is_some() {
                return;
            }
            let new = &self.world.client.committed[before..];
            let is_open = self.dbs.iter().all(|db| new.iter().any(|c| c.db == *db));
            if is_open {
                break;
            }
            if self.world.now > end {
                self.world.failure = Some(format!(
                    "not all databases take commits {} s after all was well: {}",
                    HEAL / 1_000_000,
                    self.state()
                ));
                return;
            }
        }
        // Nobody writes any more.
        while !self.is_level() {
            let next = self.world.now + 50 * MS;
            self.world.run_until(next);
            if self.world.failure.is_some() || self.world.now > end + HEAL {
                break;
            }
        }
        if self.world.failure.is_none() {
            self.world.check_healed();
            if self.world.failure.is_some() {
                let state = self.state();
                self.world.note(|| state);
            }
        }
        if let Some(gone) = gone {
            self.revive(gone);
        }
        self.is_peace = false;
    }

    /// One process more dies, at a bad moment, and is back at once.
    fn last_blow(&mut self) {
        if self.world.one_in(3) {
            return;
        }
        self.world.plot_short_death();
        let end = self.world.now + 2_000 * MS;
        while self.world.failure.is_none() && self.world.now < end && !self.world.plots.is_empty() {
            self.pass(20 * MS);
        }
        self.world.plots.clear();
        while self.world.failure.is_none() && !self.world.reliefs.is_empty() {
            self.pass(20 * MS);
        }
    }

    /// One machine may be down for ever: the others are a majority.
    fn gone_for_good(&mut self) -> Option<Id> {
        let id = self.any();
        let ids: BTreeSet<Id> = self.world.ids().into_iter().collect();
        let is_whole = self.world.nodes.values().all(|node| {
            node.raft.voters() == ids && node.raft.sets().len() == 1 && node.disk.accepted > 0
        });
        (is_whole && self.world.one_in(2)).then_some(id)
    }

    fn is_level(&self) -> bool {
        let up = self.world.nodes.values().filter(|node| node.is_up);
        let mut primaries = up.filter(|node| node.process.is_primary);
        let Some(primary) = primaries.next() else {
            return false;
        };
        let epoch = primary.process.epoch;
        let mut up = self.world.nodes.values().filter(|node| node.is_up);
        up.all(|node| {
            node.disk.accepted == epoch
                && primary.disk.dbs.iter().all(|(db, copy)| {
                    copy.wal.is_empty()
                        && node.disk.dbs.get(db).map(|c| c.pos()) == Some(copy.pos())
                })
        })
    }

    fn state(&self) -> String {
        let mut text = String::new();
        for (id, node) in &self.world.nodes {
            text += &format!(
                "\n{id}: raft {:?}, seen {}, accepted {}, {}, {:?}",
                node.raft,
                node.disk.seen,
                node.disk.accepted,
                self.world.positions(*id),
                node.process
            );
        }
        text
    }
}
