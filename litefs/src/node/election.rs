//! Follows what the cluster elects: takes over, gives up, follows.
//!
//! ```text
//! elected ─▶ fence a quorum, hear what it has ─▶ fetch what is newer there ─▶ open for writes ─▶ tell the others
//! lease over, or a higher epoch seen ─▶ take the right to write from all programs
//! another leads ─▶ follow it
//! ```
//!
//! What holds:
//! - INV-ELECT-1: writes are opened only in an epoch of which a quorum of voters takes nothing older, and with the most
//!   advanced copies among those (`takeover`);
//! - INV-ELECT-2: a thread of its own, which waits for nothing but the clock and the locks, ends a tenure when its lease does;
//! - INV-ELECT-3: a node votes only once it has had, on disk, all that the primary had (`members`).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use consensus::{Cluster, Lease, Member, NodeId, View};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::decide::takeover::{Arrival, Report, Round, Standing, Wanted, arrived};
use super::decide::{epochs, members};
use super::lender::Borrowing;
use super::peers::Peers;
use super::ports::Ports;
use super::quorum::Quorum;
use super::roles::Roles;
use super::waits::Measured;
use crate::db::{Db, DbError};
use crate::http::cluster::{FenceReply, FenceRequest, Peer, show_id};
use crate::http::cluster::{Standing as StandingText, parse_id};
use crate::http::{HttpDial, MetricKind, MetricsText};
use crate::ltx::{Pos, Txid};
use crate::replication::receive::{ReceiveConfig, Receiver};
use crate::replication::replicas::Replicas;
use crate::replication::{DbName, Sink};

/// How long a node may take to answer the winner: it may have to take the right to write from its programs first.
const FENCE_PATIENCE: Duration = Duration::from_secs(2);
/// How long, after a quorum, the winner waits for the other voters: they may have what nobody else has.
const STRAGGLERS: Duration = Duration::from_millis(150);
/// How long a winner tries to open writes before it lets another try.
const TAKEOVER_PATIENCE: Duration = Duration::from_secs(5);
/// How long until what failed is tried again.
const RETRY: Duration = Duration::from_millis(50);
/// How often the loop looks whether there is something to do that nobody told it.
const LOOK: Duration = Duration::from_millis(100);
/// How long a handoff may take to bring the other node level.
const DRAIN: Duration = Duration::from_secs(5);
/// How long programs have to end their transactions for a handoff.
const HANDOFF_PATIENCE: Duration = Duration::from_secs(1);
/// How long voters to be may take to have what is committed.
const LEVEL: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(1);

/// This node's part in elections.
pub(super) struct Election {
    pub(super) cluster: Cluster,
    pub(super) me: Member,
    pub(super) roles: Arc<Roles>,
    pub(super) ports: Arc<Ports>,
    pub(super) peers: Peers,
    pub(super) replicas: Arc<Replicas>,
    pub(super) quorum: Arc<Quorum>,
    pub(super) waits: Arc<Measured>,
    /// Whom the receiver follows.
    pub(super) target: watch::Sender<Option<String>>,
    /// Epoch of which this node has given the role away, or is about to.
    pub(super) given_up: AtomicU64,
    /// Databases whose programs have not ended their transactions.
    pub(super) unfenced: AtomicBool,
    /// Raft says nothing to this node any more: it was removed, and follows without a vote.
    pub(super) outsider: AtomicBool,
    pub(super) handing_over: tokio::sync::Mutex<()>,
    pub(super) changing_voters: tokio::sync::Mutex<()>,
    pub(super) last_failure: Mutex<Option<String>>,
    /// Since when it tries to open writes, and in which tenure.
    pub(super) trying: Mutex<Option<(u64, Instant)>>,
    /// Databases with a commit in doubt, and where that leaves them.
    pub(super) doubtful: Mutex<Vec<(Arc<Db>, Pos)>>,
}

impl Election {
    pub(super) fn node_id(&self) -> NodeId {
        self.ports.node.node_id
    }

    fn is_primary_in(&self, epoch: u64) -> bool {
        let node = &self.ports.node;
        node.is_primary() && node.epoch.load(Ordering::Acquire) == epoch
    }

    /// Returns the lease under which this node may take writes.
    pub(super) fn lease(&self) -> Option<Lease> {
        let lease = self.cluster.lease()?;
        let seen = *self.ports.seen_epoch.read();
        let given_up = self.given_up.load(Ordering::Acquire);
        epochs::tenure(Some(lease.epoch), given_up, seen).map(|_| lease)
    }

    /// Returns the epoch in which this node may take writes, for who knows the highest epoch seen: a thread that holds that
    /// lock would wait for itself, behind one that waits to raise it.
    fn tenure(&self, seen: u64) -> Option<u64> {
        let lease = self.cluster.lease().map(|lease| lease.epoch);
        epochs::tenure(lease, self.given_up.load(Ordering::Acquire), seen)
    }

    /// Adds what is to be watched of elections and commits that wait. Blocks for a moment.
    pub(super) fn metrics(&self, text: &mut MetricsText) {
        let left = self.lease().map_or(0.0, |lease| {
            let left = lease.until.saturating_duration_since(Instant::now());
            left.as_secs_f64()
        });
        text.single(
            "litefs_lease_remaining_seconds",
            MetricKind::Gauge,
            "For how long this node may act as the primary unless a majority answers again; 0 where it may not.",
            left,
        );
        let doubtful = self.ports.store.all();
        let doubtful = doubtful.iter().filter(|db| db.is_in_doubt()).count();
        let kept = self.doubtful.lock().len();
        text.single(
            "litefs_commits_in_doubt",
            MetricKind::Gauge,
            "Databases that are read-only until it is known whether a quorum has their last commit.",
            f64::from(u32::try_from(doubtful.max(kept)).unwrap_or(u32::MAX)),
        );
        self.waits.metrics(text);
    }

    /// Runs until the process ends.
    pub(super) async fn run(self: Arc<Self>) {
        let mut views = self.cluster.watch();
        loop {
            let view = views.borrow_and_update().clone();
            match self.lease() {
                Some(lease) if !self.is_primary_in(lease.epoch) => {
                    self.target.send_replace(None);
                    self.take_over(lease.epoch, &view).await;
                }
                Some(_) => {}
                None => self.follow(&view),
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Tells the primary of each tenure that this node has accepted it. Runs until the process ends.
    pub(super) async fn tell_accepted(self: Arc<Self>) {
        let mut accepted = self.ports.acceptance.subscribe();
        while accepted.changed().await.is_ok() {
            loop {
                let epoch = *accepted.borrow_and_update();
                let view = self.cluster.view();
                if view.epoch > epoch || epoch == 0 {
                    break;
                }
                if let Some((_, leader)) = view.leader
                    && self
                        .peers
                        .accepted(&leader.url, &self.request(epoch))
                        .await
                        .is_ok()
                {
                    break;
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// Sees to commits that did not get their quorum in time. Blocks.
    fn settle_doubts(&self) {
        let node = &self.ports.node;
        // Before the look: what comes after it is looked at next.
        node.has_doubts.store(false, Ordering::Release);
        for db in self.ports.store.all() {
            if !db.is_primary() || !db.is_in_doubt() {
                continue;
            }
            let pos = db.pos();
            match db.fence(Duration::from_millis(100)) {
                Ok(()) => {
                    tracing::warn!(db = %db.name(), %pos, "a commit is in doubt; the database is read-only until a quorum has it")
                }
                Err(DbError::Locked { .. }) => {
                    node.has_doubts.store(true, Ordering::Release);
                    continue;
                }
                Err(error) => {
                    tracing::error!(db = %db.name(), error = crate::store::chain(&error), "keep a commit in doubt, will try again");
                    node.has_doubts.store(true, Ordering::Release);
                    continue;
                }
            }
            self.doubtful.lock().push((db, pos));
        }
        let epoch = self.ports.node.epoch.load(Ordering::Acquire);
        self.doubtful.lock().retain(|(db, pos)| {
            if !self.is_primary_in(epoch) || db.pos() != *pos {
                return false; // another tenure decided
            }
            if self.lease().is_none() || !self.quorum.has_by_now(db, *pos) {
                return true;
            }
            let tenure = || self.lease().map(|lease| lease.epoch);
            match self.roles.reopen(epoch, tenure, [db]) {
                Ok(false) => true,
                Ok(true) => {
                    tracing::warn!(db = %db.name(), %pos, "the commit that was in doubt took place");
                    false
                }
                Err(error) => {
                    tracing::error!(db = %db.name(), error = crate::store::chain(&error), "database stays read-only");
                    true
                }
            }
        });
        if !self.doubtful.lock().is_empty() {
            node.has_doubts.store(true, Ordering::Release);
        }
    }

    /// Whether what Raft last said here is of no use any more.
    pub(super) fn is_outsider(&self) -> bool {
        self.outsider.load(Ordering::Acquire)
    }

    fn follow(&self, view: &View) {
        if self.is_outsider() {
            return; // `members` knows whom to follow
        }
        let Some((id, leader)) = &view.leader else {
            return; // whom we follow may be cut off from a quorum, and still be heard here
        };
        if *id != self.node_id() && !self.ports.node.is_primary() {
            self.follow_url(&leader.url);
        }
    }

    pub(super) fn follow_url(&self, url: &str) {
        if self.roles.is_changing() {
            return;
        }
        self.target.send_if_modified(|target| {
            let is_other = target.as_deref() != Some(url);
            if is_other {
                *target = Some(url.to_owned());
            }
            is_other
        });
    }

    /// Follows a node from the beginning, even if it is followed already: it has just become able to serve.
    pub(super) fn follow_now(&self, url: &str) {
        if !self.ports.node.is_primary()
            && !self.roles.is_changing()
            && !self.ports.is_connected.load(Ordering::Acquire)
        {
            self.target.send_replace(Some(url.to_owned()));
        }
    }

    async fn take_over(self: &Arc<Self>, epoch: u64, view: &View) {
        let began = Instant::now();
        match self.try_take_over(epoch, view).await {
            Ok(true) => {
                *self.last_failure.lock() = None;
                tracing::info!(
                    epoch,
                    elapsed_ms = began.elapsed().as_millis(),
                    "writes are open"
                );
                self.ports.warn_of_unheld();
                self.announce(epoch, view);
            }
            Ok(false) => {}
            Err(error) => {
                self.say_once(epoch, format!("{error:#}"));
                let since = {
                    let mut trying = self.trying.lock();
                    match *trying {
                        Some((of, since)) if of == epoch => since,
                        _ => trying.insert((epoch, began)).1,
                    }
                };
                if since.elapsed() > TAKEOVER_PATIENCE && view.voters.len() > 1 {
                    tracing::error!(epoch, "another node may do better: giving the role up");
                    if let Err(error) = self.give_up(epoch, self.cluster.step_down()).await {
                        tracing::warn!(error = crate::store::chain(&error), "give the role up");
                    }
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    /// Gives the lead away, and the role with it unless that does not even begin.
    async fn give_up(
        &self,
        epoch: u64,
        transfer: impl Future<Output = Result<(), consensus::Error>>,
    ) -> Result<(), consensus::Error> {
        let before = self.given_up.fetch_max(epoch, Ordering::AcqRel);
        let result = transfer.await;
        let is_begun = matches!(
            result,
            Ok(()) | Err(consensus::Error::TransferFailed { .. })
        );
        if !is_begun {
            // Raft leads on, and nobody else would act.
            self.given_up.store(before, Ordering::Release);
        }
        result
    }

    fn say_once(&self, epoch: u64, error: String) {
        let mut last = self.last_failure.lock();
        if last.as_ref() != Some(&error) {
            tracing::warn!(epoch, error, "elected, but writes cannot be opened yet");
            *last = Some(error);
        }
    }

    async fn try_take_over(self: &Arc<Self>, epoch: u64, view: &View) -> anyhow::Result<bool> {
        let this = self.clone();
        let own = tokio::task::spawn_blocking(move || this.fence_here(epoch)).await??;
        let wanted = self.fence_quorum(epoch, view, own).await?.plan();
        for w in &wanted {
            let db = self.ports.store.get(w.db.as_str());
            anyhow::ensure!(
                db.is_none_or(|db| !db.is_primary()),
                "{}: another node has more of it, and a program here is in a write transaction of a tenure that is over",
                w.db
            );
        }
        if !wanted.is_empty() {
            self.fetch(epoch, view, wanted).await?;
        }
        if self.lease().is_none_or(|lease| lease.epoch != epoch) {
            return Ok(false);
        }
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.roles.promote(epoch, |seen| this.tenure(seen)))
            .await?
    }

    /// Ends older tenures here, and says what this node has. Blocks.
    ///
    /// Asked again in the same tenure, it says what is on disk: who changes the voters goes by that.
    pub(super) fn fence_here(&self, epoch: u64) -> anyhow::Result<Report> {
        if *self.ports.seen_epoch.read() == epoch {
            let report = self.report();
            for db in self.ports.store.all() {
                db.sync_log()?;
            }
            if !self.ports.node.is_primary() || self.is_primary_in(epoch) {
                return Ok(report);
            }
        }
        self.ports.observe_epoch(epoch)?;
        let node = &self.ports.node;
        if node.is_primary() && node.epoch.load(Ordering::Acquire) < epoch {
            let left = self.roles.demote(FENCE_PATIENCE / 2);
            self.unfenced.store(!left.is_empty(), Ordering::Release);
        }
        Ok(self.report())
    }

    fn report(&self) -> Report {
        let databases = self.ports.store.all().into_iter().filter_map(|db| {
            let standing = Standing {
                pos: db.pos(),
                epoch: db.log().end().map_or(0, |end| end.epoch),
            };
            (standing.pos.txid.0 > 0).then(|| (db.name().clone(), standing))
        });
        Report {
            node: self.node_id(),
            accepted_epoch: self.ports.accepted_epoch.load(Ordering::Acquire),
            databases: databases.collect(),
        }
    }

    /// Changes who votes, to `goal` (ids and addresses): once a majority of those has what was committed so far, while later
    /// commits wait for them too (INV-QUORUM-4).
    ///
    /// # Errors
    /// Says who is not level; or those of the change.
    pub(super) async fn change_voters(
        &self,
        goal: BTreeMap<NodeId, String>,
        change: impl Future<Output = Result<(), consensus::Error>>,
    ) -> anyhow::Result<()> {
        let _one = self.changing_voters.lock().await;
        let ids: BTreeSet<NodeId> = goal.keys().copied().collect();
        let epoch = self.ports.node.epoch.load(Ordering::Acquire);
        self.quorum.expect_voters(Some(ids.clone()));
        let changed = async {
            self.until_level(epoch, &goal).await?;
            change.await.context("change the voters")
        };
        let changed = changed.await;
        // What commits go by may hear of it a little later.
        let mut views = self.cluster.watch();
        let known = views.wait_for(|view| view.voter_sets == [ids.clone()]);
        let _ = tokio::time::timeout(LEVEL, known).await;
        self.quorum.expect_voters(None);
        changed
    }

    /// Waits until a majority of these nodes has on disk what this node has now.
    async fn until_level(&self, epoch: u64, goal: &BTreeMap<NodeId, String>) -> anyhow::Result<()> {
        let floor: BTreeMap<DbName, Txid> = self
            .ports
            .positions()
            .into_iter()
            .map(|(db, pos)| (db, pos.txid))
            .collect();
        let request = self.request(epoch);
        let deadline = Instant::now() + LEVEL;
        loop {
            anyhow::ensure!(self.is_primary_in(epoch), "the tenure ended");
            // This node counts: what was committed is on its disk.
            let others = goal.iter().filter(|(id, _)| **id != self.node_id());
            let asked = others.map(|(id, url)| async {
                let reply = self.peers.fence(url, &request, FENCE_PATIENCE).await?;
                let report = read_reply(*id, &reply)?;
                anyhow::Ok(members::is_level(&report, epoch, &floor))
            });
            let answers = futures_util::future::join_all(asked).await;
            let level = answers.iter().filter(|a| matches!(a, Ok(true))).count();
            if level + usize::from(goal.contains_key(&self.node_id())) > goal.len() / 2 {
                return Ok(());
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "voters stay as they are: only {level} of the others there would be have on disk what is committed"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    fn request(&self, epoch: u64) -> FenceRequest {
        FenceRequest {
            cluster_id: Sink::cluster_id(&*self.ports).unwrap_or_default(),
            epoch,
            node: show_id(self.node_id()),
        }
    }

    /// Has a quorum of voters take nothing older any more, and hears what they have.
    async fn fence_quorum(&self, epoch: u64, view: &View, own: Report) -> anyhow::Result<Round> {
        let request = self.request(epoch);
        let others = view.voters.iter().filter(|(id, _)| **id != self.node_id());
        let mut asked: FuturesUnordered<_> = others
            .map(|(id, member)| {
                let (request, peers) = (&request, &self.peers);
                async move {
                    let reply = peers.fence(&member.url, request, FENCE_PATIENCE).await;
                    reply.and_then(|reply| read_reply(*id, &reply))
                }
            })
            .collect();
        let mut round = Round::new(own);
        let mut failures = Vec::new();
        let mut stragglers_until = None;
        loop {
            if stragglers_until.is_none() && view.is_quorum(round.granted()) {
                stragglers_until = Some(tokio::time::Instant::now() + STRAGGLERS);
            }
            let wait = async {
                match stragglers_until {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let reply = tokio::select! {
                next = asked.next() => match next {
                    Some(next) => next,
                    None => break,
                },
                () = wait => break,
            };
            match reply {
                Ok(report) => round.heard(report),
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        anyhow::ensure!(
            view.is_quorum(round.granted()),
            "{} of {} voters answered; {}",
            round.granted().len(),
            view.voters.len(),
            failures.join("; ")
        );
        Ok(round)
    }

    /// Brings databases to where other nodes have them.
    async fn fetch(&self, epoch: u64, view: &View, wanted: Vec<Wanted>) -> anyhow::Result<()> {
        let mut by_node: BTreeMap<NodeId, HashMap<DbName, Pos>> = BTreeMap::new();
        for w in wanted {
            tracing::info!(db = %w.db, from = show_id(w.from), pos = %w.pos, epoch, "fetching what is newer there");
            by_node.entry(w.from).or_default().insert(w.db, w.pos);
        }
        let fetches = by_node.into_iter().map(|(from, wanted)| async move {
            let member = view.voters.get(&from).context("the node is no voter")?;
            self.fetch_from(epoch, &member.url, wanted).await
        });
        for fetched in futures_util::future::join_all(fetches).await {
            fetched?;
        }
        Ok(())
    }

    async fn fetch_from(
        &self,
        epoch: u64,
        url: &str,
        wanted: HashMap<DbName, Pos>,
    ) -> anyhow::Result<()> {
        let mut changes = self.ports.node.hub.subscribe();
        let sink = Arc::new(Borrowing {
            ports: self.ports.clone(),
            wanted: wanted.clone(),
            is_all: watch::Sender::new(false),
        });
        let mut is_all = sink.is_all.subscribe();
        let config = ReceiveConfig {
            hostname: self.me.hostname.clone(),
            ..ReceiveConfig::default()
        };
        let dial = HttpDial {
            is_takeover: true,
            ..HttpDial::default()
        };
        let receiver = Receiver::new(sink, Arc::new(dial), config);
        let pos_of = |name: &DbName| {
            let db = self.ports.store.get(name.as_str());
            db.map_or(Pos::ZERO, |db| db.pos())
        };
        let all_are = |arrival: Arrival, is_all: bool| {
            let mut all = wanted.iter();
            all.all(|(name, pos)| arrived(pos_of(name), *pos, is_all) == arrival)
        };
        let is_level = || all_are(Arrival::There, false);
        let level = async {
            while !is_level() {
                let lease = self.lease().filter(|lease| lease.epoch == epoch);
                anyhow::ensure!(
                    lease.is_some(),
                    "the lease ended while databases were fetched"
                );
                let is_over = *is_all.borrow_and_update();
                anyhow::ensure!(
                    !is_over || all_are(Arrival::There, true),
                    "{url} does not have any more what it said it has"
                );
                tokio::select! {
                    _ = is_all.changed() => {}
                    _ = changes.recv() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
            Ok(())
        };
        tokio::select! {
            level = level => level,
            ended = receiver.follow(url) => {
                anyhow::ensure!(is_level(), "fetch from {url}: {}", match ended {
                    Ok(()) => "the stream ended".to_owned(),
                    Err(error) => crate::store::chain(&error),
                });
                Ok(())
            }
        }
    }

    /// Tells everybody, so that nobody has to ask.
    fn announce(&self, epoch: u64, view: &View) {
        let request = self.request(epoch);
        let all = view.voters.iter().chain(&view.learners);
        for (id, member) in all.filter(|(id, _)| **id != self.node_id()) {
            let (peers, request, url, id) =
                (self.peers.clone(), request.clone(), member.url.clone(), *id);
            tokio::spawn(async move {
                if let Err(error) = peers.opened(&url, &request).await {
                    tracing::debug!(
                        node = show_id(id),
                        error = format!("{error:#}"),
                        "tell of the new primary"
                    );
                }
            });
        }
    }

    /// Ends the tenure when the lease ends, whatever else this process is doing. Runs until `stop` is dropped.
    pub(super) fn guard(&self, stop: &std::sync::mpsc::Receiver<()>) {
        use std::sync::mpsc::RecvTimeoutError;
        let node = &self.ports.node;
        loop {
            let epoch = node.epoch.load(Ordering::Acquire);
            let is_over = || {
                let lease = self.cluster.lease().map(|lease| lease.epoch);
                node.is_primary() && epochs::is_over(epoch, lease, *self.ports.seen_epoch.read())
            };
            if is_over() || self.unfenced.load(Ordering::Acquire) && !node.is_primary() {
                let left = self.roles.demote(Duration::from_millis(100));
                if !left.is_empty() {
                    let names: Vec<&str> = left.iter().map(|db| db.name().as_str()).collect();
                    tracing::error!(
                        databases = names.join(", "),
                        "programs are in write transactions of a tenure that is over; what they commit will be kept apart"
                    );
                }
                self.unfenced.store(!left.is_empty(), Ordering::Release);
            }
            if node.is_primary() && node.has_doubts.load(Ordering::Acquire) {
                self.settle_doubts();
            }
            let until = self.cluster.lease().map(|lease| lease.until);
            let wait = match until {
                Some(until) if node.is_primary() => until
                    .saturating_duration_since(Instant::now())
                    .clamp(POLL, LOOK),
                // It may become primary at any moment.
                Some(_) => 10 * POLL,
                None => LOOK,
            };
            if stop.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }

    /// Gives the role to another voter: no commit is lost, and programs wait for a moment.
    ///
    /// # Errors
    /// Says why this node is the primary still.
    pub(super) async fn hand_over(self: &Arc<Self>, to: Option<NodeId>) -> anyhow::Result<Peer> {
        let _one = self.handing_over.lock().await;
        let view = self.cluster.watch().borrow().clone();
        let node = self.ports.node.clone();
        anyhow::ensure!(node.is_primary(), "this node is not the primary");
        let epoch = node.epoch.load(Ordering::Acquire);
        // Who was primary or followed another a moment ago may be on its way here.
        let deadline = Instant::now() + FENCE_PATIENCE;
        let to = loop {
            match self.choose(&view, to) {
                Ok(to) => break to,
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(10 * POLL).await,
            }
        };
        let member = view
            .voters
            .get(&to)
            .context("the node is no voter")?
            .clone();
        let began = Instant::now();
        node.is_draining.store(true, Ordering::Release);
        let drained = self.drain(epoch, to).await;
        let handed = match drained {
            Ok(()) => {
                let transfer = self.cluster.transfer(to);
                let transferred = self.give_up(epoch, transfer).await;
                transferred.context("transfer the lead")
            }
            Err(error) => Err(error),
        };
        node.is_draining.store(false, Ordering::Release);
        if let Err(error) = handed {
            let this = self.clone();
            tokio::task::spawn_blocking(move || this.take_back(epoch)).await?;
            return Err(error);
        }
        let left = {
            let this = self.clone();
            tokio::task::spawn_blocking(move || this.roles.demote(HANDOFF_PATIENCE)).await?
        };
        self.unfenced.store(!left.is_empty(), Ordering::Release);
        tracing::info!(
            to = member.hostname,
            elapsed_ms = began.elapsed().as_millis(),
            "handed the primary's role over"
        );
        Ok(peer(to, &member))
    }

    /// Programs write again in a tenure that was not given away after all.
    fn take_back(&self, epoch: u64) {
        let tenure = || self.lease().map(|lease| lease.epoch);
        let mut goes_on = true;
        for db in self.ports.store.all() {
            match self.roles.reopen(epoch, tenure, [&db]) {
                Ok(is_open) => goes_on &= is_open,
                Err(error) => {
                    tracing::error!(db = %db.name(), error = crate::store::chain(&error), "database stays read-only");
                }
            }
        }
        if !goes_on && self.is_primary_in(epoch) {
            // Should the lease come back, this tenure begins anew, with all databases.
            let left = self.roles.demote(Duration::ZERO);
            self.unfenced.store(!left.is_empty(), Ordering::Release);
        }
    }

    fn choose(&self, view: &View, to: Option<NodeId>) -> anyhow::Result<NodeId> {
        let connected: BTreeSet<NodeId> = self
            .replicas
            .list()
            .iter()
            .filter(|r| r.is_connected)
            .map(|r| r.node_id)
            .collect();
        if let Some(to) = to {
            anyhow::ensure!(to != self.node_id(), "this node is the primary already");
            anyhow::ensure!(
                view.voters.contains_key(&to),
                "node {} does not vote in this cluster",
                show_id(to)
            );
            anyhow::ensure!(
                connected.contains(&to),
                "node {} does not follow this one",
                show_id(to)
            );
            return Ok(to);
        }
        let others = view.voters.iter().filter(|(id, _)| connected.contains(id));
        let best = others.max_by_key(|(id, member)| (view.state.preference(member), **id));
        best.map(|(id, _)| *id)
            .context("no other voter follows this node")
    }

    /// Ends writing here, and waits for the other node to have all.
    async fn drain(self: &Arc<Self>, epoch: u64, to: NodeId) -> anyhow::Result<()> {
        let this = self.clone();
        let fenced = tokio::task::spawn_blocking(move || {
            let deadline = Instant::now() + HANDOFF_PATIENCE;
            for db in this.ports.store.all() {
                // What another tenure opened meanwhile is not to be closed.
                anyhow::ensure!(this.is_primary_in(epoch), "the tenure ended");
                db.fence(deadline.saturating_duration_since(Instant::now()))
                    .context("a program does not end its write transaction")?;
            }
            Ok(())
        });
        fenced.await??;
        let deadline = Instant::now() + DRAIN;
        for db in self.ports.store.all() {
            let pos = db.pos();
            if pos.txid.0 == 0 {
                continue;
            }
            loop {
                let acked = self.replicas.acked(db.name());
                if acked
                    .iter()
                    .any(|(id, applied, ..)| *id == to && applied.pos == pos)
                {
                    break;
                }
                anyhow::ensure!(self.is_primary_in(epoch), "the tenure ended");
                anyhow::ensure!(
                    Instant::now() < deadline,
                    "{} does not come to {pos} on node {} within {DRAIN:?}",
                    db.name(),
                    show_id(to)
                );
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }
}

fn read_reply(id: NodeId, reply: &FenceReply) -> anyhow::Result<Report> {
    let node = parse_id(&reply.node)?;
    anyhow::ensure!(
        node == id,
        "node {} answered for node {}",
        reply.node,
        show_id(id)
    );
    let databases = reply.databases.iter().map(|db| {
        let standing = Standing {
            pos: db.pos.parse()?,
            epoch: db.epoch,
        };
        Ok((db.name.parse()?, standing))
    });
    Ok(Report {
        node,
        accepted_epoch: reply.accepted_epoch,
        databases: databases.collect::<anyhow::Result<_>>()?,
    })
}

pub(super) fn write_reply(report: &Report) -> FenceReply {
    FenceReply {
        node: show_id(report.node),
        accepted_epoch: report.accepted_epoch,
        databases: report
            .databases
            .iter()
            .map(|(name, standing)| StandingText {
                name: name.to_string(),
                pos: standing.pos.to_string(),
                epoch: standing.epoch,
            })
            .collect(),
    }
}

pub(super) fn peer(id: NodeId, member: &Member) -> Peer {
    Peer {
        id: show_id(id),
        hostname: member.hostname.clone(),
        url: member.url.clone(),
        region: member.region.clone(),
        priority: member.priority,
    }
}
