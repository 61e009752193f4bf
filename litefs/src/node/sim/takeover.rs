//! From elected to open: fence a quorum, fetch what is newer there, open. As `election`.

use std::collections::{BTreeMap, BTreeSet};

use super::mutants::{Mutant, is_on};
use super::plots::Moment;
use super::raft::is_quorum;
use super::role::Then;
use super::world::{Id, MS, Message, Us, What, World};
use crate::ltx::Pos;
use crate::node::decide::epochs;
use crate::node::decide::takeover::{Arrival, Report, Round, Standing, arrived};
use crate::replication::DbName;

/// How long a node may take to answer the winner.
const FENCE_PATIENCE: Us = 2_000 * MS;
/// How long, after a quorum, the winner waits for the other voters.
const STRAGGLERS: Us = 150 * MS;
/// How long a winner tries to open writes before it lets another try.
const TAKEOVER_PATIENCE: Us = 5_000 * MS;
/// How long until what failed is tried again.
const RETRY: Us = 50 * MS;
/// How long a fence waits to hear of the election.
const ELECTED: Us = 500 * MS;

/// Whom a fenced node tells what it has.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    winner: Id,
    round: u64,
}

/// One try to take over.
#[derive(Debug)]
pub(crate) struct TakeOver {
    no: u64,
    epoch: u64,
    began: Us,
    voters: BTreeSet<Id>,
    sets: Vec<BTreeSet<Id>>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Ends its own older tenure.
    Own,
    Fencing {
        round: Round,
        until: Us,
        stragglers_until: Option<Us>,
    },
    Fetching(BTreeMap<DbName, Fetching>),
    Noted,
}

#[derive(Debug)]
struct Fetching {
    conn: u64,
    wanted: Pos,
}

impl World {
    /// Begins to take over if this node was elected, or goes on with it.
    pub(crate) fn drive(&mut self, id: Id) {
        let Some(epoch) = self.tenure(id) else {
            return;
        };
        let process = &self.nodes[&id].process;
        if self.is_primary_in(id, epoch)
            || process.taking_over.is_some()
            || self.now < process.retry_at
        {
            return;
        }
        self.unfollow(id);
        let no = self.no();
        let (sets, voters) = (self.nodes[&id].raft.sets(), self.nodes[&id].raft.voters());
        let began = self.now;
        self.process(id).taking_over = Some(TakeOver {
            no,
            epoch,
            began,
            voters,
            sets,
            stage: Stage::Own,
        });
        let answer = Answer {
            winner: id,
            round: no,
        };
        self.fence_here(id, epoch, answer);
    }

    /// Ends older tenures here, and says what this node has.
    fn fence_here(&mut self, id: Id, epoch: u64, answer: Answer) {
        if !self.observe_epoch(id, epoch) {
            return;
        }
        let process = &self.nodes[&id].process;
        if process.is_primary && process.epoch < epoch {
            self.demote(id, FENCE_PATIENCE / 2, Then::Answer(answer));
        } else {
            self.answer_fence(id, answer);
        }
    }

    /// Takes in that there is an epoch; says whether there is none newer.
    pub(crate) fn observe_epoch(&mut self, id: Id, epoch: u64) -> bool {
        let disk = &mut self.node(id).disk;
        if !epochs::may_take(epoch, disk.seen) {
            return false;
        }
        disk.seen = epoch.max(disk.seen);
        true
    }

    pub(crate) fn asked_to_fence(&mut self, id: Id, round: u64, epoch: u64, winner: Id) {
        if self.nodes[&id].raft.term < epoch && self.nodes[&id].disk.seen < epoch {
            // It may hear of the election in a moment.
            if self.random(0..ELECTED / (20 * MS)) > 0 {
                let message = Message::Fence {
                    round,
                    epoch,
                    winner,
                };
                self.after(id, 19 * MS..20 * MS, What::Message(message));
            }
            return;
        }
        self.fence_here(id, epoch, Answer { winner, round });
    }

    pub(crate) fn report(&self, id: Id) -> Report {
        let disk = &self.nodes[&id].disk;
        let of = |(db, copy): (&DbName, &super::store::Copy)| {
            let standing = Standing {
                pos: copy.pos(),
                epoch: copy.label,
            };
            (!copy.log.is_empty()).then(|| (db.clone(), standing))
        };
        Report {
            node: id,
            accepted_epoch: disk.accepted,
            databases: disk.dbs.iter().filter_map(of).collect(),
        }
    }

    pub(crate) fn answer_fence(&mut self, id: Id, answer: Answer) {
        let report = self.report(id);
        if answer.winner == id {
            self.begin_fencing(id, answer.round, report);
        } else {
            let round = answer.round;
            self.send(id, answer.winner, Message::Fenced { round, report });
            self.moment(id, Moment::Fenced);
        }
    }

    fn begin_fencing(&mut self, id: Id, no: u64, own: Report) {
        let now = self.now;
        let Some(task) = self.process(id).taking_over.as_mut().filter(|t| t.no == no) else {
            return;
        };
        task.stage = Stage::Fencing {
            round: Round::new(own),
            until: now + FENCE_PATIENCE,
            stragglers_until: None,
        };
        let (epoch, voters) = (task.epoch, task.voters.clone());
        for voter in voters {
            if voter != id && !is_on(Mutant::FenceSkipped) {
                let (round, winner) = (no, id);
                let message = Message::Fence {
                    round,
                    epoch,
                    winner,
                };
                self.send(id, voter, message);
            }
        }
        self.take_over_step(id, no);
    }

    pub(crate) fn heard_fenced(&mut self, id: Id, no: u64, report: Report) {
        if let Some(task) = self.process(id).taking_over.as_mut()
            && task.no == no
            && let Stage::Fencing { round, .. } = &mut task.stage
        {
            round.heard(report);
            self.take_over_step(id, no);
        }
    }

    fn failed(&mut self, id: Id, why: &str) {
        let now = self.now;
        let process = self.process(id);
        let Some(task) = process.taking_over.take() else {
            return;
        };
        process.retry_at = now + RETRY;
        let since = match process.trying {
            Some((of, since)) if of == task.epoch => since,
            _ => process.trying.insert((task.epoch, task.began)).1,
        };
        if now - since > TAKEOVER_PATIENCE && task.voters.len() > 1 {
            let to = task.voters.iter().copied().find(|v| *v != id);
            self.count("a winner gives up");
            if let Some(to) = to {
                self.give_up(id, task.epoch, to);
            }
        }
        if let Stage::Fetching(fetches) = task.stage {
            for fetch in fetches.into_values() {
                self.break_conn(fetch.conn);
            }
        }
        self.note(|| format!("{id} cannot open {}: {why}", task.epoch));
    }

    pub(crate) fn take_over_step(&mut self, id: Id, no: u64) {
        let now = self.now;
        let Some(task) = self.process(id).taking_over.as_mut().filter(|t| t.no == no) else {
            return;
        };
        match &mut task.stage {
            Stage::Own => {}
            Stage::Fencing {
                round,
                until,
                stragglers_until,
            } => {
                let has_all = round.granted().len() == task.voters.len();
                let is_enough = is_quorum(&task.sets, round.granted())
                    || is_on(Mutant::FenceSkipped)
                    || is_on(Mutant::MinorityFenced);
                if is_enough && stragglers_until.is_none() {
                    *stragglers_until = Some(now + STRAGGLERS);
                }
                let is_patient = stragglers_until.unwrap_or(*until) > now;
                if has_all || !is_patient {
                    match is_enough {
                        true => self.begin_fetch(id, no),
                        false => self.failed(id, "no quorum answers"),
                    }
                    return;
                }
            }
            Stage::Fetching(_) => {
                self.look_at_fetches(id, no);
                return;
            }
            Stage::Noted => {
                self.open(id, no);
                return;
            }
        }
        self.after(id, 4 * MS..5 * MS, What::TakeOverStep { no });
    }

    fn begin_fetch(&mut self, id: Id, no: u64) {
        let Some(task) = &self.nodes[&id].process.taking_over else {
            return;
        };
        let Stage::Fencing { round, .. } = &task.stage else {
            return;
        };
        let wanted = round.plan();
        let dbs = &self.nodes[&id].disk.dbs;
        if wanted
            .iter()
            .any(|w| dbs.get(&w.db).is_some_and(|copy| copy.is_primary))
        {
            self.failed(id, "a program writes what another node has more of");
            return;
        }
        if !wanted.is_empty() {
            self.count("fetched from another node");
            self.moment(id, Moment::Fetching);
        }
        let mut by_node: BTreeMap<Id, BTreeSet<DbName>> = BTreeMap::new();
        for w in &wanted {
            by_node.entry(w.from).or_default().insert(w.db.clone());
        }
        let conns: BTreeMap<Id, u64> = by_node
            .into_iter()
            .map(|(from, dbs)| (from, self.connect(id, from, Some(dbs))))
            .collect();
        let mut fetches = BTreeMap::new();
        for w in wanted {
            self.note(|| format!("{id} fetches {} at {} from {}", w.db, w.pos.txid, w.from));
            let fetch = Fetching {
                conn: conns[&w.from],
                wanted: w.pos,
            };
            fetches.insert(w.db, fetch);
        }
        if let Some(task) = &mut self.process(id).taking_over {
            task.stage = Stage::Fetching(fetches);
        }
        self.look_at_fetches(id, no);
    }

    fn look_at_fetches(&mut self, id: Id, no: u64) {
        let Some(task) = &self.nodes[&id].process.taking_over else {
            return;
        };
        let (epoch, dbs) = (task.epoch, &self.nodes[&id].disk.dbs);
        let Stage::Fetching(fetches) = &task.stage else {
            return;
        };
        let arrivals: Vec<Arrival> = fetches
            .iter()
            .map(|(db, f)| {
                let have = dbs.get(db).map_or(Pos::ZERO, super::store::Copy::pos);
                let is_all = self.conns.get(&f.conn).is_some_and(|conn| conn.is_all);
                arrived(have, f.wanted, is_all)
            })
            .collect();
        let is_level = arrivals.iter().all(|a| *a == Arrival::There);
        let is_broken = fetches.values().any(|f| !self.conns.contains_key(&f.conn));
        let lease = self.tenure(id);
        if is_level || is_on(Mutant::OpensBeforeFetch) {
            self.end_fetches(id);
            if lease != Some(epoch) {
                self.process(id).taking_over = None;
                return;
            }
            self.begin_open(id, no);
        } else if lease != Some(epoch) {
            self.failed(id, "the lease ended");
        } else if arrivals.contains(&Arrival::Elsewhere) {
            self.count("the other node does not have what it said");
            self.failed(id, "the other node does not have what it said");
        } else if is_broken {
            self.failed(id, "the stream ended");
        } else {
            self.after(id, 2 * MS..4 * MS, What::TakeOverStep { no });
        }
    }

    fn end_fetches(&mut self, id: Id) {
        if let Some(task) = &self.nodes[&id].process.taking_over
            && let Stage::Fetching(fetches) = &task.stage
        {
            let conns: Vec<u64> = fetches.values().map(|f| f.conn).collect();
            for conn in conns {
                self.break_conn(conn);
            }
        }
    }

    /// Notes on disk that the tenure begins here.
    fn begin_open(&mut self, id: Id, no: u64) {
        let disk = &mut self.node(id).disk;
        disk.was_primary = true;
        disk.sync_all();
        if let Some(task) = &mut self.process(id).taking_over {
            task.stage = Stage::Noted;
        }
        self.after(id, 100..10 * MS, What::TakeOverStep { no });
    }

    fn open(&mut self, id: Id, no: u64) {
        let Some(task) = self.process(id).taking_over.take() else {
            return;
        };
        let epoch = task.epoch;
        // A demotion that is under way holds the lock of the roles.
        if !self.nodes[&id].process.demotions.is_empty() {
            self.process(id).taking_over = Some(task);
            self.after(id, 2 * MS..4 * MS, What::TakeOverStep { no });
            return;
        }
        let disk = &mut self.node(id).disk;
        if epochs::may_accept(epoch, disk.seen) {
            disk.accepted = disk.accepted.max(epoch);
        }
        let seen = self.nodes[&id].disk.seen;
        if !epochs::may_open(epoch, seen, self.tenure(id)) {
            return;
        }
        let process = self.process(id);
        process.epoch = epoch;
        process.is_primary = true;
        self.promote_all(id);
        self.client.opened(id, epoch, &self.nodes[&id].disk);
        self.count("tenures");
        self.moment(id, Moment::Opened);
        let positions = self.positions(id);
        self.note(|| format!("{id} opens writes in {epoch}: {positions}"));
    }

    pub(crate) fn positions(&self, id: Id) -> String {
        let dbs = &self.nodes[&id].disk.dbs;
        let one =
            |(db, copy): (&DbName, &super::store::Copy)| format!("{db} {}", copy.pos().txid.0);
        dbs.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}
