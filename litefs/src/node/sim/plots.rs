//! Faults that wait for their moment: what random times hardly ever meet, in the steps between which it hurts.
//!
//! A plot is a list of scenes. Each waits until some node comes to a [`Moment`], and then strikes: there, at the node of the
//! first scene (the hero), or at all others. Most plots are of a kind that once was, or could be, a lost commit: a record held
//! back until its sender's tenure is over, a disk that takes seconds to note what was accepted, a death between "noted" and "told".

use std::collections::VecDeque;
use std::ops::Range;

use super::world::{Id, MACHINE, MS, Thread, Us, World};

/// Points between two steps of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// A commit is logged, and waits for others.
    Logged,
    /// Its program was told that it took place.
    Committed,
    /// The first commit of a database is logged.
    Created,
    /// A program was told that it took place.
    CreatedForGood,
    Elected,
    InDoubt,
    /// Records are on their way.
    Sent,
    TookRecords,
    TookPages,
    Accepting,
    AcceptSynced,
    /// Noted on disk, and nobody told yet.
    Accepted,
    /// A winner was told what is here.
    Fenced,
    Fetching,
    Opened,
    Demoted,
    HandedOver,
    ChangesVoters,
}

const MOMENTS: [Moment; 18] = [
    Moment::Logged,
    Moment::Committed,
    Moment::Created,
    Moment::CreatedForGood,
    Moment::Elected,
    Moment::InDoubt,
    Moment::Sent,
    Moment::TookRecords,
    Moment::TookPages,
    Moment::Accepting,
    Moment::AcceptSynced,
    Moment::Accepted,
    Moment::Fenced,
    Moment::Fetching,
    Moment::Opened,
    Moment::Demoted,
    Moment::HandedOver,
    Moment::ChangesVoters,
];

/// What plots are about, as it is counted once they have come to their end.
const KINDS: [&str; 7] = [
    "plot: a record comes after the tenure",
    "plot: an answer comes after the tenure",
    "plot: there and back in short tenures",
    "plot: acceptance is slow",
    "plot: a sender goes on",
    "plot: a database of two nodes",
    "plot: one replica lags",
];

/// Where a scene takes place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Anywhere,
    AtHero,
    Elsewhere,
}

/// Whom a fault hits.
#[derive(Debug, Clone, Copy)]
enum Whom {
    Here,
    Hero,
    Others,
    OneOther,
}

/// A fault; times are from and to how long it lasts.
#[derive(Debug, Clone)]
enum Strike {
    Die {
        is_power_cut: bool,
        back: Range<Us>,
    },
    Pause(Range<Us>),
    Resume(Range<Us>),
    /// No message and no stream, in or out.
    CutOff(Range<Us>),
    /// It cannot reach the node where this happens, nor that one it.
    PartFromHere(Range<Us>),
    /// It can reach the hero only.
    PartFromRest(Range<Us>),
    /// What it sends over streams waits.
    Freeze(Range<Us>),
    Thaw,
    Stall(Thread, Range<Us>),
    BreakStreams,
    /// Programs begin to write in all databases.
    BeginWrites(Range<Us>),
    SlowDisk(Us, Range<Us>),
}

#[derive(Debug, Clone)]
struct Scene {
    moment: Moment,
    place: Place,
    strikes: Vec<(Whom, Strike)>,
}

/// What is to happen, scene by scene.
#[derive(Debug)]
pub(crate) struct Plot {
    kind: &'static str,
    hero: Option<Id>,
    scenes: VecDeque<Scene>,
    until: Us,
}

/// The end of a fault.
#[derive(Debug, Clone)]
pub(crate) enum Relief {
    Start(Id),
    Resume(Id),
    /// Machines can reach each other again.
    Join(Vec<(u64, u64)>),
    Thaw(u64),
    FastDisk(Id),
}

fn scene(moment: Moment, place: Place, strikes: impl Into<Vec<(Whom, Strike)>>) -> Scene {
    Scene {
        moment,
        place,
        strikes: strikes.into(),
    }
}

impl World {
    /// Lays a plot of any kind.
    pub(crate) fn plot(&mut self) {
        use Moment::{
            Accepted, Committed, Created, CreatedForGood, Demoted, Elected, Fenced, Logged, Opened,
            Sent, TookPages, TookRecords,
        };
        use Place::{Anywhere, AtHero, Elsewhere};
        use Whom::{Here, Hero, OneOther, Others};
        let long = 600 * MS..2_500 * MS;
        let kind = usize::try_from(self.random(0..10)).unwrap_or(0);
        let scenes = match kind {
            // What a primary sent comes once its tenure is over, and so does the answer.
            0 => {
                let wait = 700 * MS..3_000 * MS;
                let mut late = vec![
                    (Hero, Strike::Thaw),
                    (Hero, Strike::Resume(4 * MS..40 * MS)),
                ];
                if self.one_in(3) {
                    late.push((Here, self.some_stall(300 * MS)));
                }
                let loops = Strike::Stall(Thread::Loop, 50 * MS..400 * MS);
                vec![
                    scene(Logged, Anywhere, []),
                    scene(
                        Sent,
                        AtHero,
                        [
                            (Here, Strike::Freeze(wait.clone())),
                            (Here, Strike::Pause(wait)),
                        ],
                    ),
                    scene(
                        Elected,
                        Elsewhere,
                        [(Others, loops), (Hero, Strike::PartFromHere(long))],
                    ),
                    scene(Fenced, Elsewhere, late),
                ]
            }
            // The answer comes late, and the word that its sender has what the tenure began with later still.
            1 => {
                let note = Strike::Stall(Thread::Accept, 300 * MS..1_500 * MS);
                vec![
                    scene(Opened, Anywhere, [(OneOther, note)]),
                    scene(
                        Accepted,
                        Elsewhere,
                        [(Here, Strike::Stall(Thread::Receiver, 700 * MS..2_000 * MS))],
                    ),
                    scene(
                        TookRecords,
                        Elsewhere,
                        [(Hero, Strike::Pause(long.clone()))],
                    ),
                    scene(Elected, Elsewhere, [(Hero, Strike::PartFromHere(long))]),
                    scene(
                        Fenced,
                        Elsewhere,
                        [(Hero, Strike::Resume(50 * MS..900 * MS))],
                    ),
                ]
            }
            // One primary, a short tenure of another, and the first again: others note none of it in time.
            2 => {
                self.slow_disks(2_000 * MS..6_000 * MS);
                let short = 580 * MS..1_000 * MS;
                let (end, last) = (self.some_rest(), self.some_end());
                vec![
                    scene(Committed, Anywhere, [(Here, Strike::Pause(short))]),
                    scene(Opened, Elsewhere, [(Here, end)]),
                    scene(Opened, AtHero, []),
                    scene(Logged, AtHero, []),
                    scene(
                        Committed,
                        AtHero,
                        [(Here, last), (Others, Strike::Resume(0..500 * MS))],
                    ),
                ]
            }
            3 => {
                self.slow_disks(1_000 * MS..4_000 * MS);
                vec![scene(Committed, Anywhere, [(Here, self.some_end())])]
            }
            // Who sends has looked whether it may, and does so much later.
            4 => {
                let late = Strike::Stall(Thread::Sender, 50 * MS..700 * MS);
                vec![
                    scene(
                        Logged,
                        Anywhere,
                        [
                            (Here, Strike::BeginWrites(600 * MS..1_300 * MS)),
                            (Here, Strike::Pause(560 * MS..800 * MS)),
                        ],
                    ),
                    scene(
                        Elected,
                        Elsewhere,
                        [(Here, Strike::PartFromRest(long.clone()))],
                    ),
                    scene(
                        Demoted,
                        AtHero,
                        [(Here, late), (Here, Strike::SlowDisk(3_000 * MS, long))],
                    ),
                ]
            }
            // A database that only one node knows, and one of the same name elsewhere.
            5 => {
                let (one, other) = (self.some_end(), self.some_end());
                vec![
                    scene(Created, Anywhere, [(Here, one)]),
                    scene(
                        Created,
                        Elsewhere,
                        [(Here, Strike::Freeze(20 * MS..900 * MS))],
                    ),
                    scene(CreatedForGood, Elsewhere, [(Here, other)]),
                ]
            }
            // One replica lags behind; the other has all, but not transaction by transaction.
            6 => {
                let lags = Strike::Stall(Thread::Receiver, 300 * MS..1_500 * MS);
                let end = self.some_end();
                let mut scenes = vec![scene(Sent, Anywhere, [(OneOther, lags)])];
                if self.one_in(2) {
                    scenes.push(scene(TookPages, Elsewhere, []));
                }
                scenes.push(scene(Committed, AtHero, [(Here, end)]));
                scenes
            }
            // Anything.
            _ => {
                let n = self.random(1..4);
                (0..n).map(|_| self.any_scene()).collect()
            }
        };
        self.lay(
            KINDS.get(kind).copied().unwrap_or("plot of any kind"),
            scenes.into(),
            4_000 * MS,
        );
    }

    /// Lays a plot in which a process dies at some moment, and is back before anybody is elected.
    pub(crate) fn plot_short_death(&mut self) {
        let back = 1..60 * MS;
        let moments = [
            Moment::TookRecords,
            Moment::TookPages,
            Moment::AcceptSynced,
            Moment::Accepted,
            Moment::Fenced,
            Moment::Opened,
        ];
        let i = self.random(0..moments.len() as u64);
        let moment = moments[usize::try_from(i).unwrap_or(0)];
        let is_power_cut = self.one_in(3);
        let strike = match self.one_in(6) {
            true => Strike::BreakStreams,
            false => Strike::Die { is_power_cut, back },
        };
        let scene = scene(moment, Place::Anywhere, [(Whom::Here, strike)]);
        self.lay("plot: a short death", [scene].into(), 2_000 * MS);
    }

    fn lay(&mut self, kind: &'static str, scenes: VecDeque<Scene>, patience: Us) {
        let until = self.now + patience;
        self.note(|| format!("plot: {scenes:?}"));
        self.plots.push(Plot {
            kind,
            hero: None,
            scenes,
            until,
        });
    }

    fn any_scene(&mut self) -> Scene {
        let i = self.random(0..MOMENTS.len() as u64);
        let moment = MOMENTS[usize::try_from(i).unwrap_or(0)];
        let place = match self.random(0..4) {
            0 => Place::AtHero,
            1 | 2 => Place::Elsewhere,
            _ => Place::Anywhere,
        };
        let n = self.random(1..3);
        let strikes: Vec<_> = (0..n)
            .map(|_| {
                let whom = match self.random(0..6) {
                    0 => Whom::Hero,
                    1 => Whom::Others,
                    _ => Whom::Here,
                };
                let strike = match self.random(0..8) {
                    0 | 1 => self.some_stall(2_000 * MS),
                    2 => Strike::BreakStreams,
                    3 => Strike::Thaw,
                    4 => Strike::Resume(0..20 * MS),
                    _ => self.some_end(),
                };
                (whom, strike)
            })
            .collect();
        scene(moment, place, strikes)
    }

    fn some_stall(&mut self, longest: Us) -> Strike {
        use Thread::{Accept, Commits, Guard, Loop, Receiver, Roles, Sender};
        let threads = [Accept, Commits, Guard, Loop, Receiver, Roles, Sender];
        let i = self.random(0..threads.len() as u64);
        Strike::Stall(threads[usize::try_from(i).unwrap_or(0)], MS..longest)
    }

    /// Something that ends a tenure, and not the process.
    fn some_rest(&mut self) -> Strike {
        let time = 600 * MS..1_500 * MS;
        match self.one_in(2) {
            true => Strike::Pause(time),
            false => Strike::CutOff(time),
        }
    }

    /// Something that may end a tenure.
    fn some_end(&mut self) -> Strike {
        let time = match self.random(0..3) {
            0 => MS..100 * MS,
            1 => 100 * MS..1_000 * MS,
            _ => 600 * MS..3_000 * MS,
        };
        match self.random(0..5) {
            0 => Strike::Die {
                is_power_cut: self.one_in(2),
                back: time,
            },
            1 | 2 => Strike::Pause(time),
            3 => Strike::Freeze(time),
            _ => Strike::CutOff(time),
        }
    }

    fn slow_disks(&mut self, time: Range<Us>) {
        for id in self.ids() {
            if self.random(0..3) > 0 {
                let slowest = self.random(100 * MS..2_500 * MS);
                self.hit(id, &Strike::SlowDisk(slowest, time.clone()), id, id);
            }
        }
    }

    /// A node has come to a moment.
    pub(crate) fn strike(&mut self, id: Id, moment: Moment) {
        let now = self.now;
        let mut plots = std::mem::take(&mut self.plots);
        plots.retain(|plot| plot.until > now);
        for plot in &mut plots {
            let hero = plot.hero;
            let is_now = |scene: &&mut Scene| {
                let is_here = match scene.place {
                    Place::Anywhere => true,
                    Place::AtHero => hero.is_none_or(|hero| hero == id),
                    Place::Elsewhere => hero != Some(id),
                };
                scene.moment == moment && is_here
            };
            let Some(scene) = plot.scenes.front_mut().filter(is_now) else {
                continue;
            };
            let strikes = std::mem::take(&mut scene.strikes);
            plot.scenes.pop_front();
            if plot.scenes.is_empty() {
                self.count(plot.kind);
            }
            plot.until = now + 4_000 * MS;
            let hero = *plot.hero.get_or_insert(id);
            self.count("scenes of plots");
            self.note(|| format!("{moment:?} at {id}: {strikes:?}"));
            for (whom, strike) in strikes {
                let others = || self.ids().into_iter().filter(|other| *other != id);
                let all: Vec<Id> = match whom {
                    Whom::Here => vec![id],
                    Whom::Hero => vec![hero],
                    Whom::Others => others().collect(),
                    Whom::OneOther => {
                        let others: Vec<Id> = others().collect();
                        let i = self.random(0..others.len().max(1) as u64);
                        others
                            .get(usize::try_from(i).unwrap_or(0))
                            .copied()
                            .into_iter()
                            .collect()
                    }
                };
                for one in all {
                    self.hit(one, &strike, id, hero);
                }
            }
        }
        plots.retain(|plot| !plot.scenes.is_empty());
        plots.append(&mut self.plots);
        self.plots = plots;
    }

    fn hit(&mut self, id: Id, strike: &Strike, here: Id, hero: Id) {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.is_up) else {
            return;
        };
        let machine = id % MACHINE;
        match strike {
            Strike::Die { is_power_cut, back } => {
                self.kill(id, *is_power_cut);
                self.relief(back, Relief::Start(id));
            }
            Strike::Pause(time) => {
                let with_programs = self.one_in(2);
                self.set_paused(id, true, with_programs);
                self.relief(time, Relief::Resume(id));
            }
            Strike::Resume(after) => self.relief(after, Relief::Resume(id)),
            Strike::CutOff(time) => {
                let all = self.ids();
                self.part(machine, &all, time);
            }
            Strike::PartFromHere(time) => self.part(machine, &[here], time),
            Strike::PartFromRest(time) => {
                let mut rest = self.ids();
                rest.retain(|other| *other != hero);
                self.part(machine, &rest, time);
            }
            Strike::Freeze(time) => {
                for other in self.ids() {
                    self.frozen.insert((machine, other % MACHINE));
                }
                self.relief(time, Relief::Thaw(machine));
            }
            Strike::Thaw => self.thaw(machine),
            Strike::Stall(thread, time) => {
                let thread = *thread;
                let until = self.now + self.random(time.clone());
                self.node(id).stalled.insert(thread, until);
            }
            Strike::BeginWrites(time) => {
                let dbs: Vec<_> = node.disk.dbs.keys().cloned().collect();
                for db in dbs {
                    let lasts = self.random(time.clone());
                    self.write(id, &db, lasts);
                }
            }
            Strike::BreakStreams => self.reset_streams(id),
            Strike::SlowDisk(slowest, time) => {
                node.slow_disk = *slowest;
                self.relief(time, Relief::FastDisk(id));
            }
        }
    }

    fn part(&mut self, machine: u64, from: &[Id], time: &Range<Us>) {
        let machines = from.iter().map(|other| other % MACHINE);
        let pairs: Vec<_> = machines
            .filter(|other| *other != machine)
            .flat_map(|other| [(machine, other), (other, machine)])
            .collect();
        self.cut.extend(&pairs);
        self.relief(time, Relief::Join(pairs));
    }

    fn thaw(&mut self, machine: u64) {
        self.frozen.retain(|(from, _)| *from != machine);
    }

    fn relief(&mut self, time: &Range<Us>, relief: Relief) {
        let at = self.now + self.random(time.clone());
        let no = self.no();
        self.reliefs.insert((at, no), relief);
    }

    /// Ends a fault.
    pub(crate) fn relieve(&mut self, relief: Relief) {
        match relief {
            Relief::Start(id) if self.nodes.contains_key(&id) => self.start(id),
            Relief::Resume(id) if self.nodes.contains_key(&id) => self.set_paused(id, false, false),
            Relief::FastDisk(id) if self.nodes.contains_key(&id) => self.node(id).slow_disk = 0,
            Relief::Start(_) | Relief::Resume(_) | Relief::FastDisk(_) => {}
            Relief::Join(pairs) => pairs.iter().for_each(|pair| {
                self.cut.remove(pair);
            }),
            Relief::Thaw(machine) => self.thaw(machine),
        }
    }

    /// Ends all plots, and what they did.
    pub(crate) fn end_plots(&mut self) {
        self.plots.clear();
        self.frozen.clear();
        self.long_writes_until = 0;
        while let Some((_, relief)) = self.reliefs.pop_first() {
            self.relieve(relief);
        }
        for node in self.nodes.values_mut() {
            node.stalled.clear();
            node.slow_disk = 0;
        }
    }
}
