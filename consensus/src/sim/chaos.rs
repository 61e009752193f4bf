//! Random faults and random work, then peace; the invariants are looked at every millisecond.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::invariants::{self, Invariant};
use super::world::{self, World, member};
use crate::command::{Command, Durability};
use crate::error::Error;
use crate::member::NodeId;

/// What came of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Stands for all that was delivered, and when.
    pub(crate) trace: u64,
    /// How many proposals were acknowledged.
    pub(crate) acknowledged: usize,
    /// The highest epoch.
    pub(crate) epochs: u64,
    /// How many transfers were completed.
    pub(crate) transfers: u64,
}

/// What went wrong in a run.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) seed: u64,
    pub(crate) what: String,
    pub(crate) story: String,
}

/// How long faults go on.
const CHAOS: Duration = Duration::from_secs(8);
/// How long a cluster may take to find a leader once all is well; waits after starts included.
const HEAL: Duration = Duration::from_secs(6);

struct Chaos {
    world: World,
    rng: SmallRng,
    invariants: Vec<Box<dyn Invariant>>,
    acknowledged: Arc<Mutex<Vec<String>>>,
    transfers: Arc<Mutex<u64>>,
    proposal_no: u64,
    /// Machines to start or to continue, and when.
    due: Vec<(Duration, NodeId)>,
    /// The second half of [`Chaos::switch_sides`], and when: leader, and the follower that changes sides.
    switch: Option<(Duration, NodeId, NodeId)>,
}

/// Runs one seed.
pub(crate) fn run(seed: u64) -> Result<Report, Failure> {
    world::run(seed, |world| async move {
        let mut chaos = Chaos {
            world,
            rng: SmallRng::seed_from_u64(seed ^ 0xc4a0_5000),
            invariants: invariants::all(),
            acknowledged: Arc::default(),
            transfers: Arc::default(),
            proposal_no: 0,
            due: Vec::new(),
            switch: None,
        };
        let result = chaos.live().await;
        result.map_err(|what| Failure {
            seed,
            what,
            story: chaos.world.story(),
        })
    })
}

impl Chaos {
    async fn live(&mut self) -> Result<Report, String> {
        let n = if self.rng.random_range(0..4) == 0 {
            5
        } else {
            3
        };
        for id in 1..=n + 1 {
            // Two clocks differ by less than the margin that `Timing::validate` asks for.
            let ppm = self.rng.random_range(980_000..1_020_000);
            self.world.add_with_clock(id, ppm);
        }
        self.world.form(n).await;
        self.world.start(n + 1).await.map_err(|e| e.to_string())?;
        let end = self.world.elapsed() + CHAOS;
        while self.world.elapsed() < end {
            let wait = self.rng.random_range(10..350);
            self.pass(Duration::from_millis(wait)).await?;
            self.act().await?;
        }
        self.make_peace().await?;
        self.check_healed().await?;
        let ids = self.world.ids();
        let epochs = ids.iter().map(|id| self.world.view(*id).epoch).max();
        Ok(Report {
            trace: self.world.net.trace(),
            acknowledged: self.acknowledged.lock().len(),
            epochs: epochs.unwrap_or(0),
            transfers: *self.transfers.lock(),
        })
    }

    /// Lets time pass under the eyes of the invariants.
    async fn pass(&mut self, time: Duration) -> Result<(), String> {
        let end = self.world.elapsed() + time;
        while self.world.elapsed() < end {
            self.world.sleep(Duration::from_millis(1)).await;
            self.check()?;
            let now = self.world.elapsed();
            while let Some(i) = self.due.iter().position(|(at, _)| *at <= now) {
                let (_, id) = self.due.remove(i);
                self.revive(id).await?;
            }
            if let Some((_, leader, id)) = self.switch.take_if(|(at, ..)| *at <= now) {
                self.switch_now(leader, id);
            }
        }
        Ok(())
    }

    /// A leader keeps one follower only, the others wait until their promises have ended; then that follower
    /// forgets or is urged, and hears the others only.
    fn switch_sides(&mut self) {
        let Some((leader, _)) = self.world.holders().first().copied() else {
            return;
        };
        let id = self.any();
        if id == leader || self.switch.is_some() {
            return;
        }
        let ids = self.world.ids();
        let rest: Vec<_> = ids
            .into_iter()
            .filter(|i| *i != id && *i != leader)
            .collect();
        self.world.note(format!("leader {leader} keeps {id}"));
        self.world.net.heal();
        self.world.net.part(&[leader], &rest);
        let wait = Duration::from_millis(self.rng.random_range(560..900));
        self.switch = Some((self.world.elapsed() + wait, leader, id));
    }

    fn switch_now(&mut self, leader: NodeId, id: NodeId) {
        self.world.note(format!("{id} leaves {leader}"));
        self.world.net.part(&[leader], &[id]);
        if self.rng.random_range(0..3) == 0 {
            if self.world.node(id).is_some() {
                self.world
                    .call(id, |c| async move { c.elect().await.is_ok() });
            }
        } else {
            self.world.kill(id);
            self.later(id, 1, 40);
        }
    }

    fn check(&mut self) -> Result<(), String> {
        let acknowledged = self.acknowledged.lock();
        for invariant in &mut self.invariants {
            invariant.check(&self.world, &acknowledged)?;
        }
        Ok(())
    }

    async fn revive(&mut self, id: NodeId) -> Result<(), String> {
        if self.world.is_up(id) {
            self.world.set_paused(id, false);
            return Ok(());
        }
        // A node whose disk killed it counts as crashed now.
        self.world.kill(id);
        self.world.note(format!("start {id}"));
        let disk = self.world.disk(id);
        disk.set_full(false);
        disk.set_faults(0, 0);
        self.world
            .start(id)
            .await
            .map_err(|e| format!("node {id} does not start: {e}"))
    }

    fn any(&mut self) -> NodeId {
        let ids = self.world.ids();
        ids[self.rng.random_range(0..ids.len())]
    }

    /// Prefers who matters.
    fn victim(&mut self) -> NodeId {
        let holder = self.world.holders().first().map(|h| h.0);
        match holder {
            Some(id) if self.rng.random_range(0..2) == 0 => id,
            _ => self.any(),
        }
    }

    fn later(&mut self, id: NodeId, from_ms: u64, to_ms: u64) {
        let wait = Duration::from_millis(self.rng.random_range(from_ms..to_ms));
        self.due.push((self.world.elapsed() + wait, id));
    }

    async fn act(&mut self) -> Result<(), String> {
        match self.rng.random_range(0..100) {
            0..12 => self.kill(),
            12..14 => self.kill_all(),
            14..22 => self.pause(),
            22..34 => self.cut(),
            34..44 => self.heal(),
            44..50 => self.switch_sides(),
            50..54 => self.slow_net(),
            54..60 => self.bad_disk(),
            60..68 => self.transfer(),
            68..74 => self.elect(),
            74..80 => self.change_members(),
            _ => self.propose(),
        }
        Ok(())
    }

    fn kill(&mut self) {
        let id = self.victim();
        self.world.note(format!("kill {id}"));
        self.world.kill(id);
        self.later(id, 5, 1500);
    }

    fn kill_all(&mut self) {
        self.world.note("kill all");
        for id in self.world.ids() {
            self.world.kill(id);
            self.later(id, 5, 800);
        }
    }

    fn pause(&mut self) {
        let id = self.victim();
        if self.rng.random_range(0..3) == 0 {
            self.world.note(format!("suspend {id}"));
            self.world.suspend(id);
        } else {
            self.world.note(format!("pause {id}"));
            self.world.set_paused(id, true);
        }
        self.later(id, 50, 2000);
    }

    fn cut(&mut self) {
        let ids = self.world.ids();
        let (mut some, mut others) = (Vec::new(), Vec::new());
        for id in ids {
            match self.rng.random_range(0..2) {
                0 => some.push(id),
                _ => others.push(id),
            }
        }
        let shape = self.rng.random_range(0..4);
        self.world
            .note(format!("cut {some:?} {others:?} shape {shape}"));
        match shape {
            0 => self.world.net.cut(&some, &others),
            1 => {
                let id = self.victim();
                let rest: Vec<_> = self.world.ids().into_iter().filter(|i| *i != id).collect();
                self.world.net.part(&[id], &rest);
            }
            2 => {
                // Two that do not hear each other, and others that hear both.
                let (a, b) = (self.any(), self.any());
                self.world.net.part(&[a], &[b]);
            }
            _ => self.world.net.part(&some, &others),
        }
    }

    fn heal(&mut self) {
        self.world.note("heal");
        self.world.net.heal();
    }

    fn slow_net(&mut self) {
        let slowest = [1_000, 10_000, 45_000, 90_000][self.rng.random_range(0..4)];
        let lost = self.rng.random_range(0..25);
        let doubled = self.rng.random_range(0..25);
        self.world.note(format!(
            "network up to {slowest} us, lost {lost}%, doubled {doubled}%"
        ));
        self.world.net.set_faults(100..slowest, lost, doubled);
    }

    fn bad_disk(&mut self) {
        let id = self.any();
        let disk = self.world.disk(id);
        match self.rng.random_range(0..4) {
            0 => disk.set_full(true),
            1 => disk.set_faults(3, 0),
            2 => disk.set_faults(0, 4),
            _ => {
                disk.set_full(false);
                disk.set_faults(0, 0);
            }
        }
        self.world.note(format!("disk of {id}"));
        self.later(id, 50, 1000);
    }

    fn transfer(&mut self) {
        let (from, to) = (self.victim(), self.any());
        if self.world.node(from).is_none() {
            return;
        }
        self.world.note(format!("transfer {from} to {to}"));
        let transfers = self.transfers.clone();
        self.world.call(from, move |c| async move {
            if c.transfer(to).await.is_ok() && from != to {
                *transfers.lock() += 1;
            }
        });
    }

    fn elect(&mut self) {
        let id = self.any();
        if self.world.node(id).is_some() {
            self.world.note(format!("elect {id}"));
            self.world
                .call(id, |c| async move { c.elect().await.is_ok() });
        }
    }

    fn change_members(&mut self) {
        let (on, id) = (self.victim(), self.any());
        let Some((_, cluster)) = self.world.node(on) else {
            return;
        };
        let voters = cluster.view().voters;
        let add = !voters.contains_key(&id);
        if !add && voters.len() < 3 {
            return;
        }
        self.world.note(format!("{on} makes {id} a voter: {add}"));
        self.world.call(on, move |c| async move {
            let changed: Result<(), Error> = match add {
                true => c.add_voter(id, member(id), None).await,
                false => c.remove(id).await,
            };
            changed.is_ok()
        });
    }

    fn propose(&mut self) {
        let holder = self.world.holders().first().map(|h| h.0);
        let id = holder.unwrap_or_else(|| self.any());
        if self.world.node(id).is_none() {
            return;
        }
        self.proposal_no += 1;
        let db = format!("p{}", self.proposal_no);
        let acknowledged = self.acknowledged.clone();
        let command = Command::SetDurability {
            db: Some(db.clone()),
            value: Some(Durability::Quorum),
        };
        self.world.note(format!("propose {db} at {id}"));
        self.world.call(id, move |c| async move {
            if c.propose(command).await.is_ok() {
                acknowledged.lock().push(db);
            }
        });
    }

    async fn make_peace(&mut self) -> Result<(), String> {
        self.world.note("peace");
        self.world.net.heal();
        self.world.net.set_faults(100..1_000, 0, 0);
        self.due.clear();
        for id in self.world.ids() {
            let disk = self.world.disk(id);
            disk.set_full(false);
            disk.set_faults(0, 0);
            self.revive(id).await?;
        }
        Ok(())
    }

    /// Healed clusters elect, and go on.
    async fn check_healed(&mut self) -> Result<(), String> {
        let end = self.world.elapsed() + HEAL;
        loop {
            self.pass(Duration::from_millis(20)).await?;
            if let Some((id, _)) = self.world.holders().first() {
                let last = Command::SetDurability {
                    db: Some("last".to_owned()),
                    value: Some(Durability::Quorum),
                };
                let call = self
                    .world
                    .call(*id, |c| async move { c.propose(last).await.is_ok() });
                if let Ok(Ok(true)) = tokio::time::timeout(Duration::from_secs(1), call).await {
                    self.acknowledged.lock().push("last".to_owned());
                    return self.check();
                }
            }
            if self.world.elapsed() > end {
                let views: Vec<_> = self
                    .world
                    .ids()
                    .iter()
                    .map(|id| self.world.view(*id))
                    .collect();
                return Err(format!("no leader {HEAL:?} after all was well: {views:#?}"));
            }
        }
    }
}
