//! Machines, the network between them, and time, which goes from one event to the next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::client::Client;
use super::invariants::{self, Invariant};
use super::members::Change;
use super::plots::{Moment, Plot, Relief};
use super::raft::Raft;
use super::role::{Demotion, Handoff};
use super::store::Disk;
use super::stream::{Conn, Frame};
use super::takeover::TakeOver;
use crate::ltx::Pos;
use crate::node::decide::acks::Acks;
use crate::node::decide::backlog::Backlog;
use crate::node::decide::takeover::Report;
use crate::replication::DbName;

/// A node: machine 3 is node 3, and node 103 once it has an empty disk.
pub(crate) type Id = u64;
/// Microseconds.
pub(crate) type Us = u64;

pub(crate) const MS: Us = 1_000;
/// Ids of one machine are so far apart.
pub(crate) const MACHINE: u64 = 100;

/// What a process knows and loses when it dies.
#[derive(Debug, Default)]
pub(crate) struct Process {
    pub(crate) is_primary: bool,
    pub(crate) epoch: u64,
    pub(crate) given_up: u64,
    pub(crate) unfenced: bool,
    pub(crate) acks: Acks,
    /// Of databases with a bound, in one tenure.
    pub(crate) backlogs: (u64, BTreeMap<DbName, Backlog>),
    pub(crate) taking_over: Option<TakeOver>,
    /// Since when it tries to open writes, and in which epoch.
    pub(crate) trying: Option<(u64, Us)>,
    pub(crate) retry_at: Us,
    pub(crate) demotions: BTreeMap<u64, Demotion>,
    pub(crate) handoff: Option<Handoff>,
    pub(crate) doubtful: Vec<(DbName, Pos)>,
    pub(crate) has_doubts: bool,
    /// Whom it follows, and over which connection.
    pub(crate) target: Option<Id>,
    pub(crate) conn: Option<u64>,
    pub(crate) reconnect_at: Us,
    pub(crate) followed: u64,
    pub(crate) is_connected: bool,
    pub(crate) has_own: bool,
    /// Whether it has had, over this connection, all there was.
    pub(crate) is_level: bool,
    pub(crate) is_accepting: bool,
    /// Tenure of which others are to be told that it is accepted, and that of which the primary knows.
    pub(crate) acceptance: u64,
    /// Who was followed when it was being accepted.
    pub(crate) accepted_from: Option<Id>,
    pub(crate) told: u64,
    pub(crate) tell_at: Us,
    pub(crate) change: Option<Change>,
    /// Where replicas said they are.
    pub(crate) replicas: BTreeMap<(Id, DbName), Pos>,
}

/// A machine that has a disk.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: Id,
    pub(crate) is_up: bool,
    /// Which run of the process this is.
    pub(crate) run: u64,
    pub(crate) is_paused: bool,
    /// Whether its programs are paused too.
    pub(crate) is_frozen: bool,
    ppm: u64,
    pub(crate) raft: Raft,
    pub(crate) raft_due: Us,
    pub(crate) raft_patience: Us,
    pub(crate) is_changing_members: bool,
    /// Threads that the machine does not let run, and until when.
    pub(crate) stalled: BTreeMap<Thread, Us>,
    /// How long a sync may take, for a commit or for one of the halves of accepting a tenure.
    pub(crate) slow_disk: Us,
    pub(crate) disk: Disk,
    pub(crate) process: Process,
    backlog: VecDeque<What>,
}

/// A request to another node, or its answer.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    Fence { round: u64, epoch: u64, winner: Id },
    Fenced { round: u64, report: Report },
    Accepted { epoch: u64, node: Id, run: u64 },
    AcceptedHeard { epoch: u64, run: u64 },
}

/// Something that happens on a node.
#[derive(Debug, Clone)]
pub(crate) enum What {
    Tick,
    Guard,
    Message(Message),
    Pump {
        conn: u64,
    },
    Frame {
        conn: u64,
        to_server: bool,
        /// Its place among those of this direction.
        seq: u64,
        frame: Box<Frame>,
    },
    Broken {
        conn: u64,
    },
    Demoting {
        no: u64,
    },
    TakeOverStep {
        no: u64,
    },
    Reopen {
        db: DbName,
        epoch: u64,
        doubt: Option<Pos>,
    },
    AcceptSynced {
        epoch: u64,
    },
    AcceptWritten {
        epoch: u64,
    },
    Capture {
        db: DbName,
    },
    WriteEnds {
        db: DbName,
        writer: u64,
    },
    Held {
        db: DbName,
        writer: u64,
    },
    Waits {
        no: u64,
    },
}

/// Threads and tasks of a node: each may stand still while the others go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Thread {
    Loop,
    Guard,
    Roles,
    Commits,
    Accept,
    Sender,
    Receiver,
}

impl What {
    fn thread(&self) -> Option<Thread> {
        match self {
            What::Tick => Some(Thread::Loop),
            What::Guard => Some(Thread::Guard),
            What::Message(_)
            | What::Demoting { .. }
            | What::TakeOverStep { .. }
            | What::Reopen { .. } => Some(Thread::Roles),
            What::Held { .. } | What::Waits { .. } | What::Capture { .. } => Some(Thread::Commits),
            What::AcceptSynced { .. } | What::AcceptWritten { .. } => Some(Thread::Accept),
            What::Pump { .. } => Some(Thread::Sender),
            What::Frame { .. } => Some(Thread::Receiver),
            What::Broken { .. } | What::WriteEnds { .. } => None,
        }
    }

    /// Whether a program does it: those go on when only the daemon is stopped.
    fn is_of_program(&self) -> bool {
        matches!(self, What::WriteEnds { .. })
    }
}

struct Event {
    to: Id,
    /// Of which run of the process; any if there is none.
    run: Option<u64>,
    what: What,
}

/// How often a state was reached that is hard to reach.
pub(crate) type Counts = BTreeMap<&'static str, u64>;

/// Everything there is.
pub(crate) struct World {
    pub(crate) now: Us,
    rng: SmallRng,
    queue: BTreeMap<(Us, u64), Event>,
    next_no: u64,
    pub(crate) nodes: BTreeMap<Id, Node>,
    pub(crate) conns: BTreeMap<u64, Conn>,
    /// Pairs of machines between which nothing comes through.
    pub(crate) cut: BTreeSet<(u64, u64)>,
    /// Pairs of machines between which streams stand still, in this direction; nothing is lost.
    pub(crate) frozen: BTreeSet<(u64, u64)>,
    pub(crate) plots: Vec<Plot>,
    /// Moments of the step that is being done, and where.
    moments: Vec<(Id, Moment)>,
    pub(crate) reliefs: BTreeMap<(Us, u64), Relief>,
    /// Until when programs take their time in write transactions.
    pub(crate) long_writes_until: Us,
    pub(crate) delay: Range<Us>,
    pub(crate) lose_percent: u32,
    /// How often a stream may stall before it breaks.
    pub(crate) stalls: u32,
    pub(crate) double_percent: u32,
    /// One in how many times the log does not reach back to where a replica is.
    pub(crate) short_logs: u64,
    /// One in how many times what is sent is compacted.
    pub(crate) compactions: u64,
    pub(crate) client: Client,
    pub(crate) counts: Counts,
    invariants: Vec<Box<dyn Invariant>>,
    pub(crate) failure: Option<String>,
    log: Vec<String>,
    tells: bool,
    keeps_log: bool,
    /// Stands for all that happened.
    pub(crate) trace: u64,
}

impl World {
    pub(crate) fn new(seed: u64, keeps_log: bool) -> World {
        World {
            now: 0,
            rng: SmallRng::seed_from_u64(seed),
            queue: BTreeMap::new(),
            next_no: 0,
            nodes: BTreeMap::new(),
            conns: BTreeMap::new(),
            cut: BTreeSet::new(),
            frozen: BTreeSet::new(),
            plots: Vec::new(),
            moments: Vec::new(),
            reliefs: BTreeMap::new(),
            long_writes_until: 0,
            delay: 100..1_000,
            lose_percent: 0,
            stalls: 200,
            double_percent: 0,
            short_logs: 25,
            compactions: 10,
            client: Client::default(),
            counts: Counts::new(),
            invariants: invariants::all(),
            failure: None,
            log: Vec::new(),
            tells: std::env::var_os("LITEFS_SIM_SEED").is_some(),
            keeps_log,
            trace: 0,
        }
    }

    /// Notes what happens, to be told if the test fails.
    pub(crate) fn note(&mut self, what: impl FnOnce() -> String) {
        if !self.keeps_log {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let line = format!("{:10.4} {}", self.now as f64 / 1e6, what());
        if self.tells {
            println!("{line}");
        }
        self.log.push(line);
    }

    pub(crate) fn story(&self) -> String {
        let from = self.log.len().saturating_sub(400);
        self.log[from..].join("\n")
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Says that a node has come to a point at which a fault would hurt.
    pub(crate) fn moment(&mut self, id: Id, moment: Moment) {
        if !self.plots.is_empty() {
            self.moments.push((id, moment));
        }
    }

    pub(crate) fn random(&mut self, range: Range<u64>) -> u64 {
        self.rng.random_range(range)
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.rng.random_range(0..n) == 0
    }

    pub(crate) fn no(&mut self) -> u64 {
        self.next_no += 1;
        self.next_no
    }

    pub(crate) fn node(&mut self, id: Id) -> &mut Node {
        self.nodes.get_mut(&id).expect("a node")
    }

    pub(crate) fn process(&mut self, id: Id) -> &mut Process {
        &mut self.node(id).process
    }

    pub(crate) fn ids(&self) -> Vec<Id> {
        self.nodes.keys().copied().collect()
    }

    /// Returns the time by a node's monotonic clock.
    pub(crate) fn clock(&self, id: Id) -> Us {
        // Far from zero, so that any span can be taken from it.
        10_000_000 + self.now * self.nodes[&id].ppm / 1_000_000
    }

    // Machines.

    pub(crate) fn add(&mut self, id: Id) {
        // Two clocks differ by less than the margin that `consensus::Timing` asks for.
        let ppm = self.random(980_000..1_020_000);
        let node = Node {
            id,
            is_up: false,
            run: 0,
            is_paused: false,
            is_frozen: false,
            ppm,
            raft: Raft::default(),
            raft_due: 0,
            raft_patience: self.random(110_000..570_000),
            is_changing_members: false,
            stalled: BTreeMap::new(),
            slow_disk: 0,
            disk: Disk::default(),
            process: Process::default(),
            backlog: VecDeque::new(),
        };
        self.nodes.insert(id, node);
    }

    pub(crate) fn start(&mut self, id: Id) {
        if self.nodes[&id].is_up {
            return;
        }
        let clock = self.clock(id);
        let node = self.node(id);
        node.is_up = true;
        node.is_paused = false;
        node.is_frozen = false;
        node.stalled.clear();
        node.run += 1;
        node.process = Process {
            epoch: node.disk.seen,
            ..Process::default()
        };
        node.disk.recover();
        node.raft.restart(clock);
        node.is_changing_members = false;
        self.after(id, 1..20 * MS, What::Tick);
        self.after(id, 1..5 * MS, What::Guard);
        self.note(|| format!("start {id}"));
    }

    /// Ends a node's process, and its machine too if power is cut.
    pub(crate) fn kill(&mut self, id: Id, is_power_cut: bool) {
        if !self.nodes[&id].is_up {
            return;
        }
        let mut rng = SmallRng::seed_from_u64(self.random(0..u64::MAX));
        let lost = self.node(id).disk.crash(|unsynced| match is_power_cut {
            true => rng.random_range(0..=unsynced),
            false => 0,
        });
        self.client.excused.extend(lost);
        self.client.forget_node(id);
        let node = self.node(id);
        node.is_up = false;
        node.is_paused = false;
        node.backlog.clear();
        if crate::node::sim::mutants::is_on(super::mutants::Mutant::AcceptedForgotten) {
            node.disk.accepted = 0;
        }
        let ends: Vec<u64> = self
            .conns
            .iter()
            .filter(|(_, c)| c.client == id || c.server == id)
            .map(|(no, _)| *no)
            .collect();
        for conn in ends {
            self.break_conn(conn);
        }
    }

    /// Breaks the streams from a node, as something in between might.
    pub(crate) fn reset_streams(&mut self, id: Id) {
        let of = |conn: &&u64| self.conns[*conn].server == id;
        let all: Vec<u64> = self.conns.keys().filter(of).copied().collect();
        for conn in all {
            self.break_conn(conn);
        }
    }

    pub(crate) fn set_paused(&mut self, id: Id, is_paused: bool, with_programs: bool) {
        let run = self.nodes[&id].run;
        let node = self.node(id);
        if !node.is_up {
            return;
        }
        node.is_paused = is_paused;
        node.is_frozen = is_paused && with_programs;
        if !is_paused {
            // Its threads go on in any order.
            let (to, run) = (id, Some(run));
            for what in std::mem::take(&mut self.node(id).backlog) {
                let at = self.now + self.random(0..3 * MS);
                let no = self.no();
                self.queue.insert((at, no), Event { to, run, what });
            }
        }
    }

    // Events.

    /// Has something happen in a node's process, unless that ends before.
    pub(crate) fn after(&mut self, id: Id, wait: Range<Us>, what: What) {
        let at = self.now + self.random(wait);
        let run = Some(self.nodes[&id].run);
        let no = self.no();
        self.queue.insert((at, no), Event { to: id, run, what });
    }

    pub(crate) fn at(&mut self, at: Us, id: Id, what: What) {
        let no = self.no();
        let run = Some(self.nodes[&id].run);
        self.queue.insert((at, no), Event { to: id, run, what });
    }

    /// Sends a request or an answer: it may be lost, late, doubled, and come to another run of the process.
    pub(crate) fn send(&mut self, from: Id, to: Id, message: Message) {
        let copies = match (
            self.random(0..100) < u64::from(self.lose_percent),
            self.random(0..100) < u64::from(self.double_percent),
        ) {
            (true, _) => 0,
            (false, false) => 1,
            (false, true) => 2,
        };
        for _ in 0..copies {
            if self.cut.contains(&(from % MACHINE, to % MACHINE)) {
                return;
            }
            let mut at = self.now + self.random(self.delay.clone());
            if self.double_percent > 0 && self.one_in(10) {
                at += self.random(0..300 * MS);
            }
            let no = self.no();
            let what = What::Message(message.clone());
            self.queue.insert(
                (at, no),
                Event {
                    to,
                    run: None,
                    what,
                },
            );
        }
    }

    /// Says whether one message of Raft's arrives.
    pub(crate) fn comes_through(&mut self, from: Id, to: Id) -> bool {
        self.can_reach(from, to) && self.random(0..100) >= u64::from(self.lose_percent)
    }

    pub(crate) fn can_reach(&self, from: Id, to: Id) -> bool {
        let runs = |id: &Id| {
            self.nodes
                .get(id)
                .is_some_and(|node| node.is_up && !node.is_paused)
        };
        runs(&from) && runs(&to) && !self.cut.contains(&(from % MACHINE, to % MACHINE))
    }

    /// Lets time pass; stops at the first rule that is broken.
    pub(crate) fn run_until(&mut self, until: Us) {
        while self.failure.is_none() {
            let due = self.queue.first_key_value().map_or(until, |(key, _)| key.0);
            if let Some(entry) = self.reliefs.first_entry()
                && entry.key().0 <= due.min(until)
            {
                self.now = self.now.max(entry.key().0);
                let relief = entry.remove();
                self.relieve(relief);
                continue;
            }
            let Some(entry) = self.queue.first_entry().filter(|e| e.key().0 <= until) else {
                self.now = until;
                return;
            };
            self.now = self.now.max(entry.key().0);
            let Event { to, run, what } = entry.remove();
            let Some(node) = self.nodes.get_mut(&to) else {
                continue;
            };
            if !node.is_up || run.is_some_and(|run| run != node.run) {
                continue;
            }
            if node.is_paused && (node.is_frozen || !what.is_of_program()) {
                node.backlog.push_back(what);
                continue;
            }
            let stalled = what.thread().and_then(|thread| node.stalled.get(&thread));
            if let Some(until) = stalled.copied().filter(|until| self.now < *until) {
                let no = self.no();
                self.queue.insert((until, no), Event { to, run, what });
                continue;
            }
            self.trace = self.trace.rotate_left(5) ^ self.now ^ to << 32 ^ self.next_no;
            self.handle(to, what);
            self.check();
            for (id, moment) in std::mem::take(&mut self.moments) {
                self.strike(id, moment);
            }
        }
    }

    fn check(&mut self) {
        let mut all = std::mem::take(&mut self.invariants);
        for invariant in &mut all {
            if let Err(what) = invariant.check(self) {
                self.failure.get_or_insert(what);
            }
        }
        self.invariants = all;
        self.client.news.clear();
    }

    /// Looks at what must hold once all is well again.
    pub(crate) fn check_healed(&mut self) {
        let mut all = std::mem::take(&mut self.invariants);
        for invariant in &mut all {
            if let Err(what) = invariant.check_healed(self) {
                self.failure.get_or_insert(what);
            }
        }
        self.invariants = all;
    }

    fn handle(&mut self, id: Id, what: What) {
        match what {
            What::Tick => {
                self.tick(id);
                self.after(id, 10 * MS..20 * MS, What::Tick);
            }
            What::Guard => {
                self.guard(id);
                self.after(id, 2 * MS..6 * MS, What::Guard);
            }
            What::Message(message) => self.take_message(id, message),
            What::Pump { conn } => self.pump(conn),
            What::Frame {
                conn,
                to_server,
                seq,
                frame,
            } => self.arrived(id, conn, to_server, seq, *frame),
            What::Broken { conn } => self.broken(id, conn),
            What::Demoting { no } => self.demote_step(id, no),
            What::TakeOverStep { no } => self.take_over_step(id, no),
            What::Reopen { db, epoch, doubt } => self.reopen(id, &db, epoch, doubt),
            What::AcceptSynced { epoch } => self.accept_synced(id, epoch),
            What::AcceptWritten { epoch } => self.accept_written(id, epoch),
            What::Capture { db } => self.capture(id, &db),
            What::WriteEnds { db, writer } => self.write_ends(id, &db, writer),
            What::Held { db, writer } => self.hold(id, &db, writer),
            What::Waits { no } => self.wait_for_others(id, no),
        }
    }

    fn take_message(&mut self, id: Id, message: Message) {
        match message {
            Message::Fence {
                round,
                epoch,
                winner,
            } => self.asked_to_fence(id, round, epoch, winner),
            Message::Fenced { round, report } => self.heard_fenced(id, round, report),
            Message::Accepted { epoch, node, run } => {
                self.process(id).acks.accepted(node, epoch);
                self.send(id, node, Message::AcceptedHeard { epoch, run });
            }
            Message::AcceptedHeard { epoch, run } => {
                if self.nodes[&id].run == run {
                    let told = &mut self.process(id).told;
                    *told = epoch.max(*told);
                }
            }
        }
    }

    /// What the loop of a node looks at again and again.
    fn tick(&mut self, id: Id) {
        self.raft_tick(id);
        self.drive(id);
        self.tell_accepted(id);
        self.follow(id);
        self.take_in(id);
        self.drive_handoff(id);
    }
}
