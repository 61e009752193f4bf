//! Streams from a primary to who follows it, and from a fenced node to who takes over. As `replication` and `ports`.

use std::collections::{BTreeMap, BTreeSet};

use super::mutants::{Mutant, is_on};
use super::plots::Moment;
use super::store::{Copy, Tx, end_of};
use super::world::{Id, MACHINE, MS, Us, What, World};
use crate::db::lineage;
use crate::ltx::Pos;
use crate::node::decide::epochs;
use crate::node::decide::history::{self, Lead};
use crate::replication::DbName;

/// How many transactions go at once.
const BATCH: usize = 3;
/// How often a replica is told that it has all.
const BEAT: Us = 100 * MS;

/// A connection.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) client: Id,
    pub(crate) server: Id,
    /// What is wanted by who takes over; a follower wants all.
    wanted: Option<BTreeSet<DbName>>,
    /// Tenure on whose behalf the server sends; none before the greeting.
    epoch: Option<u64>,
    /// Where the client is, as far as was sent.
    peer: BTreeMap<DbName, Pos>,
    told_unknown: BTreeSet<DbName>,
    naks_seen: u64,
    naks_sent: u64,
    beat_at: Us,
    is_right: bool,
    /// Whether the client has had all that the server has.
    pub(crate) is_all: bool,
    to_server: Way,
    to_client: Way,
    stalls: u32,
}

/// One direction of a connection: what is sent first comes first.
#[derive(Debug, Default)]
struct Way {
    last_at: Us,
    sent: u64,
    taken: u64,
}

impl Conn {
    fn way(&mut self, to_server: bool) -> &mut Way {
        match to_server {
            true => &mut self.to_server,
            false => &mut self.to_client,
        }
    }
}

/// What goes over it.
#[derive(Debug, Clone)]
pub(crate) enum Frame {
    Hello {
        seen: u64,
        positions: BTreeMap<DbName, Pos>,
    },
    Ack {
        db: DbName,
        pos: Pos,
        durable: Pos,
    },
    Nak {
        db: DbName,
        have: Pos,
    },
    Welcome {
        epoch: u64,
    },
    Records {
        db: DbName,
        epoch: u64,
        after: Pos,
        txs: Vec<Tx>,
        /// Tenure of the last; zero where that is not known, after compaction.
        label: u64,
        sync: bool,
    },
    Pages {
        db: DbName,
        epoch: u64,
        log: Vec<Tx>,
    },
    Dropped {
        db: DbName,
        epoch: u64,
        log: Vec<Tx>,
    },
    Unknown,
    Mark {
        naks: u64,
    },
}

impl World {
    pub(crate) fn connect(
        &mut self,
        client: Id,
        server: Id,
        wanted: Option<BTreeSet<DbName>>,
    ) -> u64 {
        let no = self.no();
        let conn = Conn {
            client,
            server,
            wanted,
            epoch: None,
            peer: BTreeMap::new(),
            told_unknown: BTreeSet::new(),
            naks_seen: 0,
            naks_sent: 0,
            beat_at: 0,
            is_right: false,
            is_all: false,
            to_server: Way::default(),
            to_client: Way::default(),
            stalls: 0,
        };
        self.conns.insert(no, conn);
        let disk = &self.nodes[&client].disk;
        let hello = Frame::Hello {
            seen: disk.seen,
            positions: disk
                .dbs
                .iter()
                .map(|(db, copy)| (db.clone(), copy.pos()))
                .collect(),
        };
        self.push(no, true, hello);
        no
    }

    /// Sends a frame, after those before it.
    fn push(&mut self, no: u64, to_server: bool, frame: Frame) {
        let delay = self.random(self.delay.clone());
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&no) else {
            return;
        };
        let to = match to_server {
            true => conn.server,
            false => conn.client,
        };
        let way = conn.way(to_server);
        let at = (now + delay).max(way.last_at + 1);
        (way.last_at, way.sent) = (at, way.sent + 1);
        let what = What::Frame {
            conn: no,
            to_server,
            seq: way.sent,
            frame: Box::new(frame),
        };
        if self.nodes.get(&to).is_some_and(|node| node.is_up) {
            self.at(at, to, what);
        } else {
            self.break_conn(no);
        }
    }

    pub(crate) fn arrived(&mut self, id: Id, no: u64, to_server: bool, seq: u64, frame: Frame) {
        let Some(conn) = self.conns.get_mut(&no) else {
            return;
        };
        let late = |at: Us, frame: Frame| {
            let what = What::Frame {
                conn: no,
                to_server,
                seq,
                frame: Box::new(frame),
            };
            (at, id, what)
        };
        if seq != conn.way(to_server).taken + 1 {
            // One before it waits.
            let (at, id, what) = late(self.now + 300, frame);
            self.at(at, id, what);
            return;
        }
        let (client, server) = (conn.client % MACHINE, conn.server % MACHINE);
        let way = match to_server {
            true => (client, server),
            false => (server, client),
        };
        if self.cut.contains(&way) {
            // What comes after it waits too.
            conn.stalls += 1;
            let is_patient = conn.stalls < self.stalls;
            if !is_patient || self.stalls < u32::MAX && self.one_in(60) {
                self.break_conn(no);
                return;
            }
            let (at, id, what) = late(self.now + 5 * MS, frame);
            self.at(at, id, what);
            return;
        }
        if self.frozen.contains(&way) {
            let (at, id, what) = late(self.now + 2 * MS, frame);
            self.at(at, id, what);
            return;
        }
        conn.way(to_server).taken = seq;
        match to_server {
            true => self.at_server(no, frame),
            false => self.at_client(id, no, frame),
        }
    }

    /// Ends a connection; its ends learn of it later.
    pub(crate) fn break_conn(&mut self, no: u64) {
        let Some(conn) = self.conns.remove(&no) else {
            return;
        };
        if self.nodes.contains_key(&conn.client) {
            self.after(conn.client, 100..50 * MS, What::Broken { conn: no });
        }
    }

    pub(crate) fn broken(&mut self, id: Id, no: u64) {
        let again = self.now + self.random(10 * MS..100 * MS);
        let process = self.process(id);
        if process.conn == Some(no) {
            process.conn = None;
            process.is_connected = false;
            process.reconnect_at = again;
        }
    }

    /// Follows whom Raft says leads, unless this node may lead itself.
    pub(crate) fn follow(&mut self, id: Id) {
        let node = &self.nodes[&id];
        let process = &node.process;
        if process.is_primary || process.taking_over.is_some() || !process.demotions.is_empty() {
            return;
        }
        if self.tenure(id).is_some() {
            return;
        }
        let leader = node.raft.leader.filter(|leader| *leader != id);
        if let Some(leader) = leader
            && process.target != Some(leader)
        {
            self.unfollow(id);
            self.process(id).target = Some(leader);
        }
        let process = &self.nodes[&id].process;
        if let Some(target) = process.target
            && process.conn.is_none()
            && self.now >= process.reconnect_at
        {
            let conn = self.connect(id, target, None);
            self.process(id).conn = Some(conn);
        }
    }

    pub(crate) fn unfollow(&mut self, id: Id) {
        let process = self.process(id);
        process.target = None;
        process.is_connected = false;
        if let Some(conn) = process.conn.take() {
            self.break_conn(conn);
        }
    }

    /// Returns on whose behalf a node sends.
    fn source_epoch(&self, server: Id, is_lent: bool) -> Option<u64> {
        let node = self.nodes.get(&server)?;
        let is_primary = node.process.is_primary;
        match is_lent {
            false => is_primary.then_some(node.process.epoch),
            true => (node.disk.seen > 0 && !is_primary).then_some(node.disk.seen),
        }
    }

    // The sending side.

    fn at_server(&mut self, no: u64, frame: Frame) {
        let Some(conn) = self.conns.get_mut(&no) else {
            return;
        };
        let (client, server) = (conn.client, conn.server);
        match frame {
            Frame::Hello { seen, positions } => {
                let is_lent = conn.wanted.is_some();
                conn.peer = positions;
                let epoch = self.source_epoch(server, is_lent);
                let Some(epoch) = epoch.filter(|epoch| epochs::may_take(*epoch, seen)) else {
                    self.break_conn(no);
                    return;
                };
                if let Some(conn) = self.conns.get_mut(&no) {
                    conn.epoch = Some(epoch);
                }
                self.push(no, false, Frame::Welcome { epoch });
                self.after(server, 100..MS, What::Pump { conn: no });
            }
            Frame::Ack { db, pos, durable } => {
                let (epoch, is_lent) = (conn.epoch, conn.wanted.is_some());
                if let Some(epoch) = epoch.filter(|_| !is_lent) {
                    let process = self.process(server);
                    process.acks.acked(client, epoch, &db, durable);
                    process.replicas.insert((client, db), pos);
                }
            }
            Frame::Nak { db, have } => {
                conn.naks_seen += 1;
                conn.peer.insert(db, have);
            }
            _ => {}
        }
    }

    pub(crate) fn pump(&mut self, no: u64) {
        let Some(conn) = self.conns.get(&no) else {
            return;
        };
        let (server, is_lent) = (conn.server, conn.wanted.is_some());
        let (wanted, epoch) = (conn.wanted.clone(), conn.epoch);
        let was_right = self.conns[&no].is_right;
        let is_right = self.source_epoch(server, is_lent) == epoch;
        if let Some(conn) = self.conns.get_mut(&no) {
            conn.is_right = is_right;
        }
        // It looks whether its tenure goes on, and then reads what to send: the tenure may end in between.
        if !was_right {
            match is_right {
                true => self.after(server, 100..MS, What::Pump { conn: no }),
                false => self.break_conn(no),
            }
            return;
        }
        let epoch = epoch.unwrap_or(0);
        let theirs: Vec<DbName> = self.conns[&no].peer.keys().cloned().collect();
        let ours: Vec<DbName> = self.nodes[&server].disk.dbs.keys().cloned().collect();
        let is_wanted = |db: &DbName| wanted.as_ref().is_none_or(|w| w.contains(db));
        let mut is_level = true;
        for db in ours.into_iter().filter(is_wanted) {
            is_level &= self.lead(no, server, epoch, &db);
        }
        for db in theirs.into_iter().filter(is_wanted) {
            let is_unknown = self.nodes[&server]
                .disk
                .dbs
                .get(&db)
                .is_none_or(|copy| copy.log.is_empty());
            let Some(conn) = self.conns.get_mut(&no) else {
                return;
            };
            if is_unknown && conn.peer[&db] != Pos::ZERO && conn.told_unknown.insert(db.clone()) {
                self.push(no, false, Frame::Unknown);
            }
        }
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&no) else {
            return;
        };
        if is_level && now >= conn.beat_at {
            conn.beat_at = now + BEAT;
            let naks = conn.naks_seen;
            self.push(no, false, Frame::Mark { naks });
        }
        self.after(server, MS..4 * MS, What::Pump { conn: no });
    }

    /// Sends what a client lacks of a database; says whether nothing.
    fn lead(&mut self, no: u64, server: Id, epoch: u64, db: &DbName) -> bool {
        let copy = &self.nodes[&server].disk.dbs[db];
        let end = copy.pos();
        if copy.log.is_empty() {
            return true;
        }
        let after = self.conns[&no].peer.get(db).copied().unwrap_or(Pos::ZERO);
        let begin = copy.pos_at(after.txid);
        let lead = match history::lead(after, end) {
            Lead::Log if !history::joins(after, begin) => Lead::Copy,
            other => other,
        };
        let from = usize::try_from(after.txid.0).unwrap_or(usize::MAX);
        let sync = self.nodes[&server].raft.waits(db);
        let log = copy.log.clone();
        // The log may not reach back so far.
        let is_short = lead == Lead::Log && self.one_in(self.short_logs);
        let (frame, peer) = match lead {
            Lead::Level => return true,
            _ if log.last().is_some_and(|last| last.is_drop) => {
                let frame = Frame::Dropped {
                    db: db.clone(),
                    epoch,
                    log,
                };
                (frame, end)
            }
            Lead::Log if !is_short => {
                let txs: Vec<Tx> = log[from..].iter().take(BATCH).copied().collect();
                let peer = end_of(&log[..from + txs.len()]);
                let own = self.nodes[&server].disk.dbs[db].label;
                let knows_end = peer == end && !is_on(Mutant::CompactedKeepsEpoch);
                let label = match (self.one_in(self.compactions), txs.last()) {
                    (true, _) if knows_end => own,
                    (true, _) | (_, None) => 0,
                    (false, Some(last)) => last.epoch,
                };
                let frame = Frame::Records {
                    db: db.clone(),
                    epoch,
                    after,
                    txs,
                    label,
                    sync,
                };
                (frame, peer)
            }
            _ => {
                self.count("copies of pages");
                let slow = if self.one_in(3) { 200 * MS } else { MS };
                let at = self.now + self.random(0..slow);
                if let Some(conn) = self.conns.get_mut(&no) {
                    conn.to_client.last_at = conn.to_client.last_at.max(at);
                }
                let frame = Frame::Pages {
                    db: db.clone(),
                    epoch,
                    log,
                };
                (frame, end)
            }
        };
        self.moment(server, Moment::Sent);
        if let Some(conn) = self.conns.get_mut(&no) {
            conn.peer.insert(db.clone(), peer);
        }
        self.push(no, false, frame);
        false
    }

    // The receiving side.

    fn at_client(&mut self, id: Id, no: u64, frame: Frame) {
        let is_follower = self.conns[&no].wanted.is_none();
        if is_follower && self.nodes[&id].process.conn != Some(no) {
            self.break_conn(no);
            return;
        }
        match frame {
            Frame::Welcome { epoch } => {
                if !self.observe_epoch(id, epoch) {
                    self.break_conn(no);
                    return;
                }
                if is_follower {
                    let process = self.process(id);
                    process.followed = epoch;
                    process.is_connected = true;
                    process.has_own = false;
                    process.is_level = false;
                }
                let dbs: Vec<DbName> = self.nodes[&id].disk.dbs.keys().cloned().collect();
                for db in dbs {
                    let is_quorum = self.nodes[&id].raft.waits(&db);
                    let copy = self.node(id).disk.dbs.get_mut(&db).expect("a database");
                    if is_quorum && !is_on(Mutant::RestartNotAcked) {
                        copy.sync();
                        copy.durable = copy.pos();
                    }
                    self.ack(id, no, &db);
                }
            }
            Frame::Records {
                db,
                epoch,
                after,
                txs,
                label,
                sync,
            } => self.take_records(id, no, db, epoch, after, &txs, label, sync),
            Frame::Pages { db, epoch, log } => self.take_pages(id, no, &db, epoch, log),
            Frame::Dropped { db, epoch, log } => self.take_drop(id, no, &db, epoch, log),
            Frame::Unknown if is_follower => self.process(id).has_own = true,
            Frame::Unknown => {}
            Frame::Mark { naks } => {
                if naks != self.conns[&no].naks_sent {
                    return;
                }
                if let Some(conn) = self.conns.get_mut(&no) {
                    conn.is_all = true;
                }
                if is_follower {
                    self.is_level(id);
                }
            }
            _ => {}
        }
    }

    fn ack(&mut self, id: Id, no: u64, db: &DbName) {
        let copy = &self.nodes[&id].disk.dbs[db];
        let (pos, durable) = (copy.pos(), copy.durable);
        let db = db.clone();
        self.push(no, true, Frame::Ack { db, pos, durable });
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one frame")]
    fn take_records(
        &mut self,
        id: Id,
        no: u64,
        db: DbName,
        epoch: u64,
        after: Pos,
        txs: &[Tx],
        label: u64,
        sync: bool,
    ) {
        if epoch < self.nodes[&id].disk.seen {
            self.count("records of an older tenure come");
        }
        let disk = &mut self.node(id).disk;
        let may = epochs::may_take(epoch, disk.seen);
        let copy = disk.dbs.entry(db.clone()).or_default();
        if !may || copy.is_primary {
            self.break_conn(no);
            return;
        }
        let have = copy.pos();
        // What is here must be where these begin, or where one of them ends.
        let first = usize::try_from(after.txid.0).unwrap_or(usize::MAX);
        let skip = copy.log.len().checked_sub(first);
        let joins = match skip {
            Some(0) => have == after,
            Some(skip) => {
                let is_inside = skip <= txs.len();
                is_inside && copy.log.last() == txs.get(skip - 1)
            }
            None => false,
        };
        let is_old = skip.is_some_and(|skip| skip > txs.len());
        if is_old {
            // Nothing new; whether it is of this history shows later.
        } else if !joins {
            let nak = Frame::Nak { db, have };
            if let Some(conn) = self.conns.get_mut(&no) {
                conn.naks_sent += 1;
            }
            self.push(no, true, nak);
            return;
        } else {
            copy.log.extend(&txs[skip.unwrap_or(0)..]);
            copy.label = copy.label.max(label);
        }
        if sync {
            if !is_on(Mutant::AckBeforeSync) {
                copy.sync();
            }
            copy.durable = copy.pos();
            self.moment(id, Moment::TookRecords);
        }
        self.ack(id, no, &db);
    }

    fn take_pages(&mut self, id: Id, no: u64, db: &DbName, epoch: u64, log: Vec<Tx>) {
        let disk = &mut self.node(id).disk;
        let may = epochs::may_take(epoch, disk.seen);
        let was_primary = disk.was_primary;
        let copy = disk.dbs.entry(db.clone()).or_default();
        if !may || copy.is_primary {
            self.break_conn(no);
            return;
        }
        let is_kept = lineage::is_kept(copy.pos(), end_of(&log), was_primary);
        let before = std::mem::take(&mut copy.log);
        *copy = Copy {
            synced: log.len(),
            label: match is_on(Mutant::CopyKeepsEpoch) {
                true => copy.label,
                false => epoch,
            },
            log,
            ..Copy::default()
        };
        if !is_on(Mutant::CopyNotAcked) {
            copy.durable = copy.pos();
        }
        if is_kept && !is_on(Mutant::BranchDropped) && !before.is_empty() {
            disk.quarantine.extend(before.iter().map(|tx| tx.id));
            self.count("histories kept apart");
        }
        self.client.replaced(id, db, before);
        self.moment(id, Moment::TookPages);
        self.ack(id, no, db);
    }

    /// As `Db::apply_drop`: the log begins anew, and the database is gone.
    fn take_drop(&mut self, id: Id, no: u64, db: &DbName, epoch: u64, log: Vec<Tx>) {
        let disk = &mut self.node(id).disk;
        let may = epochs::may_take(epoch, disk.seen);
        let was_primary = disk.was_primary;
        let copy = disk.dbs.entry(db.clone()).or_default();
        if !may || copy.is_primary {
            self.break_conn(no);
            return;
        }
        let (have, at) = (copy.pos(), end_of(&log));
        if have == at {
            self.ack(id, no, db);
            return;
        }
        let is_own = was_primary && !copy.is_dropped() && !copy.log.is_empty();
        let is_kept = have.txid > at.txid || is_own;
        let before = std::mem::take(&mut copy.log);
        *copy = Copy {
            synced: log.len(),
            label: copy.label,
            log,
            ..Copy::default()
        };
        if is_kept && !is_on(Mutant::BranchDropped) {
            disk.quarantine.extend(before.iter().map(|tx| tx.id));
            self.count("histories kept apart when a database is removed");
        }
        self.client.replaced(id, db, before);
        self.ack(id, no, db);
    }

    /// The primary says that this node has all.
    fn is_level(&mut self, id: Id) {
        let node = self.node(id);
        node.process.is_level = true;
        if !node.process.has_own {
            node.disk.was_primary = false;
        }
        let followed = node.process.followed;
        self.accept_soon(id, followed);
    }
}
