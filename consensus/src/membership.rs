//! Changing who is a member, and who leads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::type_config::TypeConfigExt;

use crate::cluster::{Cluster, refused, stopped};
use crate::error::Error;
use crate::member::{Member, NodeId};
use crate::mutation::mutated;
use crate::raft::TypeConfig;
use crate::view::View;

/// How long a new voter may take to get the log before it is refused.
const CATCH_UP: Duration = Duration::from_secs(10);

type Change = ChangeMembers<NodeId, Member>;

impl Cluster {
    /// Adds a node that gets the log and does not vote, or changes what is known of one that is there.
    ///
    /// Returns once this is committed; the node need not be reachable.
    ///
    /// # Errors
    /// `NotLeader`; `UrlInUse`; `ChangeInProgress`; `Unknown`.
    pub async fn add_learner(&self, id: NodeId, member: Member) -> Result<(), Error> {
        self.leading()?;
        let view = self.view();
        check_url(&view, id, &member, None)?;
        match known(&view, id) {
            Some(have) if *have == member => Ok(()),
            Some(_) => self.update_member(id, member).await,
            None => {
                let nodes = BTreeMap::from([(id, member)]);
                self.change(Change::AddNodes(nodes)).await
            }
        }
    }

    /// Adds a voter, maybe in the place of another: brings it up to date, then changes the voters in one go.
    ///
    /// # Errors
    /// `NotLeader`; `NoQuorum` if the present voters could not agree to it; `NotCaughtUp`; `UrlInUse`;
    /// `NotMember` for `replaces`; `RemoveLeader`; `ChangeInProgress`; `Unknown`.
    pub async fn add_voter(
        &self,
        id: NodeId,
        member: Member,
        replaces: Option<NodeId>,
    ) -> Result<(), Error> {
        self.leading()?;
        let view = self.view();
        if let Some(old) = replaces.filter(|old| *old != id) {
            self.check_removable(&view, old)?;
        }
        check_url(&view, id, &member, replaces)?;
        self.confirm().await?;
        if known(&view, id).is_none_or(|have| *have != member) {
            self.set_node(&view, id, member.clone()).await?;
        }
        self.catch_up(id, &member).await?;
        let mut voters: BTreeSet<NodeId> = self.view().voters.into_keys().collect();
        voters.insert(id);
        if let Some(old) = replaces.filter(|old| *old != id) {
            voters.remove(&old);
            if view.learners.contains_key(&old) {
                self.change(Change::RemoveNodes(BTreeSet::from([old])))
                    .await?;
            }
        }
        self.change(Change::ReplaceAllVoters(voters)).await
    }

    /// Takes a member out of the cluster.
    ///
    /// # Errors
    /// `NotLeader`; `NoQuorum`; `NotMember`; `RemoveLeader` for this node; `ChangeInProgress`; `Unknown`.
    pub async fn remove(&self, id: NodeId) -> Result<(), Error> {
        self.leading()?;
        let view = self.view();
        self.check_removable(&view, id)?;
        self.confirm().await?;
        if view.learners.contains_key(&id) {
            return self.change(Change::RemoveNodes(BTreeSet::from([id]))).await;
        }
        let mut voters: BTreeSet<NodeId> = view.voters.into_keys().collect();
        voters.remove(&id);
        self.change(Change::ReplaceAllVoters(voters)).await
    }

    /// Changes what is known of a member, such as its address.
    ///
    /// # Errors
    /// `NotLeader`; `NotMember`; `UrlInUse`; `ChangeInProgress`; `Unknown`.
    pub async fn update_member(&self, id: NodeId, member: Member) -> Result<(), Error> {
        self.leading()?;
        let view = self.view();
        if known(&view, id).is_none() {
            return Err(Error::NotMember { id, role: "member" });
        }
        check_url(&view, id, &member, None)?;
        self.set_node(&view, id, member).await
    }

    async fn set_node(&self, view: &View, id: NodeId, member: Member) -> Result<(), Error> {
        let nodes = BTreeMap::from([(id, member)]);
        self.change(match known(view, id) {
            Some(_) => Change::SetNodes(nodes),
            None => Change::AddNodes(nodes),
        })
        .await
    }

    fn check_removable(&self, view: &View, id: NodeId) -> Result<(), Error> {
        if known(view, id).is_none() {
            return Err(Error::NotMember { id, role: "member" });
        }
        if id == self.inner.node_id {
            return Err(Error::RemoveLeader { id });
        }
        Ok(())
    }

    /// Makes a change of the members. It is seen through even if the caller loses interest.
    async fn change(&self, change: Change) -> Result<(), Error> {
        let cluster = self.clone();
        let task = TypeConfig::spawn(async move {
            let inner = &cluster.inner;
            inner.leases.begin_change();
            let result = inner.raft.change_membership(change, false).await;
            let result = result.map(|_| ()).map_err(|e| cluster.write_error(e));
            // Where this fails, Raft has stopped: then there is no lease to be careful with either.
            if cluster.metrics_are_current().await.is_ok() {
                inner.leases.end_change();
            }
            result
        });
        task.await.map_err(|e| refused(&e))?
    }

    /// Waits until the metrics show the members as they are now.
    async fn metrics_are_current(&self) -> Result<(), Error> {
        let raft = &self.inner.raft;
        let now = raft
            .with_raft_state(|state| *state.membership_state.effective().log_id())
            .await
            .map_err(stopped)?;
        let mut metrics = self.inner.metrics.clone();
        while *metrics.borrow_watched().membership_config.log_id() < now {
            if metrics.changed().await.is_err() {
                return Err(Error::Stopped {
                    why: "it was shut down".to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Waits until a member has all entries there are now.
    async fn catch_up(&self, id: NodeId, member: &Member) -> Result<(), Error> {
        if id == self.inner.node_id {
            return Ok(());
        }
        let target = self.inner.metrics.borrow_watched().last_log_index;
        let arrived = self.has_log(id, target);
        match TypeConfig::timeout(CATCH_UP, arrived).await {
            Ok(result) => result,
            Err(_) => Err(Error::NotCaughtUp {
                id,
                url: member.url.clone(),
                waited: CATCH_UP,
            }),
        }
    }

    /// Waits until a member has the log up to an index.
    async fn has_log(&self, id: NodeId, target: Option<u64>) -> Result<(), Error> {
        let mut metrics = self.inner.metrics.clone();
        loop {
            {
                let now = metrics.borrow_watched();
                let Some(replication) = &now.replication else {
                    return Err(self.not_leader());
                };
                let have = replication.get(&id).and_then(|last| last.as_ref());
                if have.map(|last| last.index()) >= target {
                    return Ok(());
                }
            }
            if metrics.changed().await.is_err() {
                return Err(Error::Stopped {
                    why: "it was shut down".to_owned(),
                });
            }
        }
    }

    /// Hands leadership to another voter; returns once that leads.
    ///
    /// [`lease`](Cluster::lease) is gone for good in this epoch from the moment the transfer begins, also if
    /// the other does not take over; then an election follows, which this node may win in a new epoch.
    /// Dropping the future does not stop a transfer that has begun.
    ///
    /// # Errors
    /// `NotLeader`; `NotMember`; `NotCaughtUp`, which changes nothing; `TransferFailed`.
    pub async fn transfer(&self, to: NodeId) -> Result<(), Error> {
        let epoch = self.leading()?;
        let view = self.view();
        let Some(member) = view.voters.get(&to) else {
            return Err(Error::NotMember {
                id: to,
                role: "voter",
            });
        };
        if to == self.inner.node_id {
            return Ok(());
        }
        // A voter that is behind could not win.
        let waited = self.inner.timing.election_max;
        let target = self.inner.metrics.borrow_watched().last_log_index;
        match TypeConfig::timeout(waited, self.has_log(to, target)).await {
            Ok(result) => result?,
            Err(_) => {
                return Err(Error::NotCaughtUp {
                    id: to,
                    url: member.url.clone(),
                    waited,
                });
            }
        }
        let cluster = self.clone();
        let task = TypeConfig::spawn(async move { cluster.hand_over(epoch, to).await });
        task.await.map_err(|e| refused(&e))?
    }

    async fn hand_over(&self, epoch: u64, to: NodeId) -> Result<(), Error> {
        let inner = &self.inner;
        // INV-LEASE-3: before anybody hears that voters are free.
        if !mutated!(TransferKeepsLease) {
            inner.leases.surrender(epoch);
        }
        inner
            .raft
            .trigger()
            .transfer_leader(to)
            .await
            .map_err(stopped)?;
        let is_over = |view: &View| {
            view.epoch > epoch && view.leader.as_ref().is_some_and(|l| l.0 != inner.node_id)
        };
        let waited = inner.timing.election_max;
        let outcome = TypeConfig::timeout(waited, self.wait_until(is_over)).await;
        match outcome {
            Ok(Ok(view)) if view.leader.as_ref().is_some_and(|l| l.0 == to) => Ok(()),
            Ok(Err(error)) => Err(error),
            Ok(Ok(_)) => Err(Error::TransferFailed { to, waited }),
            Err(_) => {
                self.fall_silent(epoch);
                Err(Error::TransferFailed { to, waited })
            }
        }
    }

    /// Stops the heartbeats of an epoch. A leader that openraft has told to transfer takes no more proposals in
    /// it and does not step down by itself; its heartbeats would keep others from an election for good.
    fn fall_silent(&self, epoch: u64) {
        let cluster = self.clone();
        TypeConfig::spawn(async move {
            let heartbeats = |on| cluster.inner.raft.runtime_config().heartbeat(on);
            heartbeats(false);
            let _ = cluster.wait_until(|view| view.epoch > epoch).await;
            heartbeats(true);
        });
    }

    /// Hands leadership to the voter that is furthest, then most wanted, then of the lowest id.
    ///
    /// # Errors
    /// `OnlyVoter`; else as [`transfer`](Cluster::transfer).
    pub async fn step_down(&self) -> Result<(), Error> {
        self.leading()?;
        let view = self.view();
        let best = {
            let metrics = self.inner.metrics.borrow_watched();
            let have = |id: &NodeId| metrics.replication.as_ref()?.get(id).cloned().flatten();
            let others = view.voters.iter().filter(|(id, _)| **id != view.node_id);
            let ranked =
                others.map(|(id, m)| (have(id), view.state.preference(m), std::cmp::Reverse(*id)));
            ranked.max().map(|(_, _, id)| id.0)
        };
        self.transfer(best.ok_or(Error::OnlyVoter)?).await
    }

    /// Campaigns now instead of waiting for a timeout, and returns once this node leads.
    ///
    /// The voters are asked first whether they would elect it, so nothing is disturbed if not.
    ///
    /// # Errors
    /// `NotMember` if this node does not vote; `ElectionRefused` within the lease of a leader that was heard of,
    /// for `election_max` after a start, and if no quorum would elect it.
    pub async fn elect(&self) -> Result<(), Error> {
        let inner = &self.inner;
        if inner.promise.bound_until().is_some() {
            let why = "this node has just started and may have promised its vote to a leader";
            return Err(Error::ElectionRefused { why });
        }
        if !self.view().voters.contains_key(&inner.node_id) {
            return Err(Error::NotMember {
                id: inner.node_id,
                role: "voter",
            });
        }
        // Not `elect(false)`: that votes for itself even within the lease of another (openraft's `do_elect`).
        let ask_first = !mutated!(ElectWithoutAsking);
        inner
            .raft
            .trigger()
            .elect(ask_first)
            .await
            .map_err(stopped)?;
        let waited = inner.timing.election_min * 2;
        let won = self.wait_until(|view| view.is_leader);
        match TypeConfig::timeout(waited, won).await {
            Ok(result) => result.map(|_| ()),
            Err(_) => Err(Error::ElectionRefused {
                why: "a leader's lease has not ended yet, or no quorum would elect this node",
            }),
        }
    }
}

fn known(view: &View, id: NodeId) -> Option<&Member> {
    view.voters.get(&id).or_else(|| view.learners.get(&id))
}

fn check_url(
    view: &View,
    id: NodeId,
    member: &Member,
    replaces: Option<NodeId>,
) -> Result<(), Error> {
    let mut all = view.voters.iter().chain(&view.learners);
    match all.find(|(other, m)| m.url == member.url && **other != id && replaces != Some(**other)) {
        Some((other, _)) => Err(Error::UrlInUse {
            url: member.url.clone(),
            id: *other,
        }),
        None => Ok(()),
    }
}
