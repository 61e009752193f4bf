//! One node's part in its cluster.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{
    ChangeMembershipError, ClientWriteError, Fatal, LinearizableReadError, RaftError,
};
use openraft::type_config::{AsyncRuntime as _, TypeConfigExt};
use openraft::{Config, ReadPolicy, SnapshotPolicy, StepDownPolicy};
use parking_lot::RwLock;
use rand::RngExt as _;
use tokio::sync::{Mutex, watch};

use crate::command::{Command, Outcome, Proposal};
use crate::disk::{Disk, RealDisk};
use crate::error::Error;
use crate::lease::{Lease, Leases};
use crate::member::{Member, NodeId};
use crate::mutation::mutated;
use crate::network::{Members, Network};
use crate::promise::Promise;
use crate::raft::{MetricsReceiver, Raft, Snapshot, TypeConfig};
use crate::state_machine::{Applied, StateMachine};
use crate::storage::{Dir, Identity, LogStore};
use crate::timing::{Timing, is_within, millis};
use crate::transport::Transport;
use crate::view::View;
use crate::wire::{self, Answer, Refusal, Rpc};

/// What a node needs to take part.
pub struct Options {
    /// Directory of Raft's files, this node's own; made if missing.
    pub dir: PathBuf,
    /// This node.
    pub node_id: NodeId,
    /// How others see it, once it is a member.
    pub me: Member,
    /// Time settings, the same on all nodes.
    pub timing: Timing,
    /// The way to other nodes.
    pub transport: Arc<dyn Transport>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("dir", &self.dir)
            .field("node_id", &self.node_id)
            .field("me", &self.me)
            .field("timing", &self.timing)
            .finish_non_exhaustive()
    }
}

/// One node's part in its cluster; clones are the same.
///
/// All methods must be called within a tokio runtime, except [`lease`](Cluster::lease),
/// [`view`](Cluster::view) and [`watch`](Cluster::watch).
#[derive(Clone)]
pub struct Cluster {
    pub(crate) inner: Arc<Inner>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cluster")
            .field(&*self.inner.view.borrow())
            .finish()
    }
}

pub(crate) struct Inner {
    pub(crate) node_id: NodeId,
    pub(crate) me: Member,
    pub(crate) timing: Timing,
    pub(crate) raft: Raft,
    pub(crate) metrics: MetricsReceiver,
    pub(crate) leases: Arc<Leases>,
    pub(crate) view: watch::Receiver<View>,
    pub(crate) promise: Arc<Promise>,
    #[cfg(test)]
    pub(crate) applied: watch::Receiver<Applied>,
    dir: Dir,
    log: LogStore,
    identity: Arc<RwLock<Identity>>,
    /// Held while the identity is being written.
    adopting: Mutex<()>,
    closing: watch::Sender<bool>,
}

impl Cluster {
    /// Opens this node's part of a cluster, or makes an empty one, and takes part.
    ///
    /// A node that was a voter neither votes nor campaigns for `timing.election_max` from now, unless it
    /// is the only one.
    ///
    /// # Errors
    /// `Timing`; `Io`; `OtherNode`; `Corrupt`, which names the file and the remedy.
    pub async fn open(options: Options) -> Result<Cluster, Error> {
        Cluster::open_on(Arc::new(RealDisk), options).await
    }

    pub(crate) async fn open_on(disk: Arc<dyn Disk>, options: Options) -> Result<Cluster, Error> {
        options.timing.validate()?;
        let closing = watch::Sender::new(false);
        let (dir, found) =
            Dir::open(disk, &options.dir, options.node_id, closing.subscribe()).await?;
        let identity = Arc::new(RwLock::new(found.identity));
        let members = Members::default();
        let network = Network {
            transport: options.transport,
            identity: identity.clone(),
            members: members.clone(),
            lease_ms: millis(options.timing.lease),
        };
        let snapshot = found.snapshot;
        let state_machine = StateMachine::new(dir.clone(), snapshot).map_err(|e| refused(&e))?;
        let applied = state_machine.watch();
        let promise = Arc::new(Promise::new(options.timing.election_max));
        let config = raft_config(&options.timing)?;
        let raft = Raft::new(
            options.node_id,
            config,
            network,
            found.log.clone(),
            state_machine,
        )
        .await
        .map_err(stopped)?;
        let leases = Arc::new(Leases::new(options.node_id, options.timing.lease));
        let metrics = raft.metrics();
        let feed = ViewFeed {
            metrics: raft.metrics(),
            applied: applied.clone(),
            leases: leases.clone(),
            members,
            trouble: dir.trouble(),
        };
        let (sender, view) = watch::channel(feed.view());
        TypeConfig::spawn(feed.run(sender));
        let cluster = Cluster {
            inner: Arc::new(Inner {
                node_id: options.node_id,
                me: options.me,
                timing: options.timing,
                raft,
                metrics,
                leases,
                view,
                promise,
                #[cfg(test)]
                applied,
                dir,
                log: found.log,
                identity,
                adopting: Mutex::new(()),
                closing,
            }),
        };
        cluster.begin().await?;
        Ok(cluster)
    }

    /// Lets a node that has started campaign, at once or after its old promise has ended.
    async fn begin(&self) -> Result<(), Error> {
        let inner = &self.inner;
        let me = inner.node_id;
        let is_alone = inner
            .raft
            .with_raft_state(move |state| state.membership_state.effective().voter_ids().eq([me]))
            .await
            .map_err(stopped)?;
        if is_alone || mutated!(NoRestartWait) {
            inner.promise.release();
        }
        let (raft, promise) = (inner.raft.clone(), inner.promise.clone());
        let mut closing = inner.closing.subscribe();
        // Nodes that start together should not all campaign at the same moment.
        let jitter = random_below(millis(inner.timing.election_min));
        TypeConfig::spawn(async move {
            if let Some(until) = promise.bound_until() {
                let at = until + std::time::Duration::from_millis(jitter);
                let closed = closing.wait_for(|closing| *closing);
                if TypeConfig::timeout_at(at, closed).await.is_ok() {
                    return;
                }
            }
            raft.runtime_config().elect(true);
        });
        Ok(())
    }

    /// Says whether this node has ever been part of a cluster.
    #[must_use]
    pub fn is_initialized(&self) -> bool {
        !self.inner.log.is_empty()
    }

    /// Makes this node a cluster of one, and returns when it leads it.
    ///
    /// # Errors
    /// `AlreadyInitialized`. After another error it can be called again.
    pub async fn initialize(&self, cluster_id: String) -> Result<(), Error> {
        let inner = &self.inner;
        self.adopt(&cluster_id).await?;
        let members = BTreeMap::from([(inner.node_id, inner.me.clone())]);
        if self.is_initialized() {
            return Err(self.already_initialized());
        }
        match inner.raft.initialize(members).await {
            Ok(()) => {}
            Err(RaftError::APIError(_)) => return Err(self.already_initialized()),
            Err(RaftError::Fatal(fatal)) => return Err(stopped(fatal)),
        }
        inner.promise.release();
        inner.raft.runtime_config().elect(true);
        self.wait_until(|view| view.is_leader).await?;
        self.propose(Command::SetClusterId(cluster_id)).await
    }

    fn already_initialized(&self) -> Error {
        Error::AlreadyInitialized {
            cluster_id: self.inner.identity.read().cluster_id.clone(),
        }
    }

    /// Makes the cluster's id this node's, durably, unless it has one.
    async fn adopt(&self, cluster_id: &str) -> Result<(), Error> {
        let _adopting = self.inner.adopting.lock().await;
        let mut identity = self.inner.identity.read().clone();
        if identity.cluster_id == cluster_id {
            return Ok(());
        }
        if !identity.cluster_id.is_empty() {
            return Err(self.already_initialized());
        }
        cluster_id.clone_into(&mut identity.cluster_id);
        self.inner
            .dir
            .save_identity(&identity)
            .await
            .map_err(|e| refused(&e))?;
        *self.inner.identity.write() = identity;
        Ok(())
    }

    /// Returns the id of the cluster this node belongs to; empty before it is part of one.
    #[must_use]
    pub fn cluster_id(&self) -> String {
        self.inner.identity.read().cluster_id.clone()
    }

    /// Follows what this node knows of the cluster.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<View> {
        self.inner.view.clone()
    }

    /// Returns what this node knows of the cluster.
    #[must_use]
    pub fn view(&self) -> View {
        self.inner.view.borrow().clone()
    }

    /// Returns until when this node may act as the leader, if it may now.
    ///
    /// Costs a lock that is hardly ever held and two looks at the clock. Ask right before each act: a process
    /// that was stopped meanwhile finds its lease over.
    #[must_use]
    pub fn lease(&self) -> Option<Lease> {
        self.inner
            .leases
            .current(&self.inner.metrics.borrow_watched())
    }

    /// Asks a quorum whether this node still leads, and returns the epoch in which it does.
    ///
    /// All requests go out after the call.
    ///
    /// # Errors
    /// `NotLeader`; `NoQuorum` if none answered within `election_max`.
    pub async fn confirm(&self) -> Result<u64, Error> {
        let before = self.leading()?;
        let asking = self.inner.raft.ensure_linearizable(ReadPolicy::ReadIndex);
        match TypeConfig::timeout(self.inner.timing.election_max, asking).await {
            Err(_) => return Err(Error::NoQuorum),
            Ok(Ok(_)) => {}
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_)))) => {
                return Err(self.not_leader());
            }
            Ok(Err(RaftError::APIError(_))) => return Err(Error::NoQuorum),
            Ok(Err(RaftError::Fatal(fatal))) => return Err(stopped(fatal)),
        }
        // Terms only grow, so if it is the same now, it was the same when the quorum answered.
        match self.leading()? {
            epoch if epoch == before => Ok(epoch),
            _ => Err(self.not_leader()),
        }
    }

    /// Changes the replicated state; returns once the change is committed and done here.
    ///
    /// # Errors
    /// `NotLeader`; `Unknown` if it may or may not be committed.
    pub async fn propose(&self, command: Command) -> Result<(), Error> {
        let proposal = Proposal::new(&command).map_err(|e| refused(&e))?;
        let written = self.inner.raft.client_write(proposal).await;
        match written.map_err(|e| self.write_error(e))?.data {
            Outcome::Done => Ok(()),
            Outcome::Unknown { version } => Err(Error::Refused {
                why: format!("commands of version {version} are not known here"),
            }),
        }
    }

    /// Answers a request that another node's [`Transport`] brought.
    ///
    /// What is not for this node of this cluster is refused in the answer, and changes nothing.
    pub async fn handle(&self, request: Bytes) -> Bytes {
        let result = match wire::decode_request(&request) {
            Ok(request) => {
                // A request whose answer nobody waits for any more is still done, like one that came late.
                let patience = self.inner.timing.election_max * 2;
                let answer = TypeConfig::timeout(patience, self.answer(request)).await;
                let node_id = self.inner.node_id;
                answer.unwrap_or(Err(Refusal::Busy { node_id }))
            }
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = &result {
            tracing::debug!(node = self.inner.node_id, %refusal, "raft request refused");
        }
        wire::encode_response(result)
    }

    async fn answer(&self, request: wire::Request) -> Result<Answer, Refusal> {
        let inner = &self.inner;
        self.check(&request).await?;
        let stopped = |error: &dyn fmt::Display| Refusal::Stopped {
            node_id: inner.node_id,
            why: error.to_string(),
        };
        match request.rpc {
            Rpc::Append(rpc) => {
                let answer = inner.raft.append_entries(rpc).await;
                answer.map(Answer::Append).map_err(|e| stopped(&e))
            }
            Rpc::PreVote(rpc) => {
                let answer = inner.raft.pre_vote(rpc).await;
                answer.map(Answer::Vote).map_err(|e| stopped(&e))
            }
            Rpc::Vote(rpc) => {
                let answer = inner.raft.vote(rpc).await;
                answer.map(Answer::Vote).map_err(|e| stopped(&e))
            }
            Rpc::Snapshot { vote, meta, data } => {
                let snapshot = Snapshot {
                    meta,
                    snapshot: data,
                };
                let answer = inner.raft.install_full_snapshot(vote, snapshot).await;
                answer.map(Answer::Snapshot).map_err(|e| stopped(&e))
            }
            Rpc::Transfer(rpc) => {
                let answer = inner.raft.handle_transfer_leader(rpc).await;
                answer.map(Answer::Transfer).map_err(|e| stopped(&e))
            }
        }
    }

    /// Decides whether a request may reach Raft at all.
    async fn check(&self, request: &wire::Request) -> Result<(), Refusal> {
        let inner = &self.inner;
        let node_id = inner.node_id;
        if request.to != node_id {
            return Err(Refusal::WrongNode {
                ours: node_id,
                theirs: request.to,
            });
        }
        // INV-RAFT-3
        let ours = self.cluster_id();
        if ours != request.cluster_id && (!ours.is_empty() || request.cluster_id.is_empty()) {
            return Err(Refusal::WrongCluster {
                ours,
                theirs: request.cluster_id.clone(),
            });
        }
        // INV-LEASE-1: what this node promises must outlast the lease of whom it follows or elects.
        let promise = inner.timing.election_max;
        if !is_within(Duration::from_millis(request.lease_ms), promise) {
            return Err(Refusal::LeaseTooLong {
                node_id,
                promise_ms: millis(promise),
                lease_ms: request.lease_ms,
            });
        }
        match &request.rpc {
            Rpc::PreVote(vote) | Rpc::Vote(vote) => {
                // INV-RAFT-2
                if inner.log.is_empty() && !mutated!(EmptyVotes) {
                    return Err(Refusal::NoLog { node_id });
                }
                // INV-LEASE-2
                if !vote.leadership_transfer && inner.promise.bound_until().is_some() {
                    return Err(Refusal::Bound { node_id });
                }
                Ok(())
            }
            // INV-RAFT-2: a voter has had a log since before it became one.
            Rpc::Append(_) | Rpc::Snapshot { .. } if request.to_voter && inner.log.is_empty() => {
                Err(Refusal::LostLog { node_id })
            }
            // The first leader a new node hears of is that of its cluster.
            Rpc::Append(_) | Rpc::Snapshot { .. } if ours.is_empty() => self
                .adopt(&request.cluster_id)
                .await
                .map_err(|e| Refusal::Stopped {
                    node_id,
                    why: e.to_string(),
                }),
            _ => Ok(()),
        }
    }

    /// Stops taking part. A leader should [`transfer`](Cluster::transfer) before.
    pub async fn shutdown(&self) {
        self.inner.closing.send_replace(true);
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::error!(%error, "raft ended badly");
        }
    }

    /// Returns the epoch in which this node leads.
    pub(crate) fn leading(&self) -> Result<u64, Error> {
        let leading = self
            .inner
            .leases
            .leading(&self.inner.metrics.borrow_watched());
        leading.ok_or_else(|| self.not_leader())
    }

    pub(crate) fn not_leader(&self) -> Error {
        let view = self.inner.view.borrow();
        Error::NotLeader {
            node_id: self.inner.node_id,
            leader: view.leader.clone().filter(|(id, _)| *id != view.node_id),
        }
    }

    /// Waits for a view, for as long as Raft runs.
    pub(crate) async fn wait_until(&self, is_it: impl Fn(&View) -> bool) -> Result<View, Error> {
        let mut view = self.watch();
        let found = view
            .wait_for(|view| view.stopped.is_some() || is_it(view))
            .await;
        let view = match found {
            Ok(view) => view.clone(),
            Err(_) => self.view(),
        };
        match view.stopped {
            Some(why) => Err(Error::Stopped { why }),
            None => Ok(view),
        }
    }

    pub(crate) fn write_error(
        &self,
        error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>,
    ) -> Error {
        match error {
            RaftError::Fatal(fatal) => stopped(fatal),
            RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => self.not_leader(),
            RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => Error::Unknown,
            RaftError::APIError(ClientWriteError::ChangeMembershipError(
                ChangeMembershipError::InProgress(_)
                | ChangeMembershipError::UncommittedLeaderLog(_),
            )) => Error::ChangeInProgress,
            RaftError::APIError(other) => refused(&other),
        }
    }
}

pub(crate) fn stopped(fatal: Fatal<TypeConfig>) -> Error {
    Error::Stopped {
        why: fatal.to_string(),
    }
}

pub(crate) fn refused(error: &dyn fmt::Display) -> Error {
    Error::Refused {
        why: error.to_string(),
    }
}

fn random_below(end: u64) -> u64 {
    <TypeConfig as openraft::RaftTypeConfig>::AsyncRuntime::thread_rng().random_range(0..end)
}

/// Settings of openraft; see `timing` for those of time.
fn raft_config(timing: &Timing) -> Result<Arc<Config>, Error> {
    let config = Config {
        cluster_name: "litefs".to_owned(),
        heartbeat_interval: millis(timing.heartbeat),
        election_timeout_min: millis(timing.election_min),
        election_timeout_max: millis(timing.election_max),
        install_snapshot_timeout: millis(timing.election_max),
        // A node that cannot win now does not raise the term of those that have a leader.
        enable_pre_vote: Some(true),
        // Begins after the wait of `promise`.
        enable_elect: false,
        // Otherwise a leader that restarts goes on in its old epoch, which it may have surrendered.
        enable_leader_restore: Some(mutated!(LeaderRestored)),
        // Otherwise openraft transfers by itself, and the lease would not be surrendered first.
        removed_leader_step_down: StepDownPolicy::Never,
        // A leader that hears no quorum falls silent now and then, so that those who hear it can elect another.
        quorum_loss_probe_interval: Some(millis(timing.election_max) * 2),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(256),
        max_in_snapshot_log_to_keep: 64,
        purge_batch_size: 64,
        backoff: "20ms 40ms 80ms ...500ms".to_owned(),
        ..Config::default()
    };
    Ok(Arc::new(config.validate().map_err(|e| refused(&e))?))
}

/// Keeps the view up to date.
struct ViewFeed {
    metrics: MetricsReceiver,
    applied: watch::Receiver<Applied>,
    leases: Arc<Leases>,
    members: Members,
    trouble: watch::Receiver<Option<String>>,
}

impl ViewFeed {
    fn view(&self) -> View {
        let applied = self.applied.borrow().clone();
        let trouble = self.trouble.borrow().clone();
        View::new(
            &self.metrics.borrow_watched(),
            &applied,
            &self.leases,
            trouble,
        )
    }

    async fn run(mut self, sender: watch::Sender<View>) {
        let mut surrendered = self.leases.watch_surrendered();
        loop {
            let view = self.view();
            let voters = view.voters.iter().map(|(id, m)| (*id, (m.clone(), true)));
            let learners = view
                .learners
                .iter()
                .map(|(id, m)| (*id, (m.clone(), false)));
            *self.members.write() = voters.chain(learners).collect();
            let has_stopped = view.stopped.is_some();
            sender.send_if_modified(|last| {
                let is_new = *last != view;
                *last = view;
                is_new
            });
            if has_stopped {
                return;
            }
            tokio::select! {
                biased;
                changed = self.metrics.changed() => if changed.is_err() { return },
                changed = self.applied.changed() => if changed.is_err() { return },
                changed = surrendered.changed() => if changed.is_err() { return },
                changed = self.trouble.changed() => if changed.is_err() { return },
            }
        }
    }
}
