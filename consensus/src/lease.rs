//! Until when this node may act as the leader.
//!
//! A lease is `last_quorum_acked + timing.lease`. openraft measures `last_quorum_acked` from when the request
//! was made, not from when the answer came: a heartbeat carries `HeartbeatEvent::time`, taken before it is queued
//! (`HeartbeatWorker::send_heartbeat_progress` reports that very time), an append `InflightAppend::sending_time`,
//! taken before it is sent; the leader's own place in the quorum counts as of the same moment
//! (`Leader::update_clock`). Followers start their promise when they handle the request, which is later. So by
//! `Timing::validate` the lease is over before any of that quorum votes for another (INV-LEASE-1), and a new
//! leader needs the vote of at least one of them.
//!
//! A lease is about time only: it is valid whatever this node learned meanwhile, and it is still valid if this
//! node's view of the cluster is late. The monotonic clock stands still while a machine is suspended, others do not:
//! after a suspension only requests sent since then count. Except for a transfer, which lets others vote early; so it ends
//! the lease of its epoch before anybody is told (INV-LEASE-3).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use openraft::ServerState;
use openraft::type_config::TypeConfigExt;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::member::NodeId;
use crate::mutation::mutated;
use crate::raft::{Metrics, RaftInstant, TypeConfig, term_of};
use crate::runtime;

/// Differences between two clocks that are read one after the other.
const CLOCK_NOISE: Duration = Duration::from_millis(1);

/// The right to act as the leader of an epoch, until a moment of the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The term of this leader; no other node leads in it.
    pub epoch: u64,
    /// When the right ends, unless it is renewed. Compare it with the clock right before acting on it.
    pub until: Instant,
}

/// What decides about leases besides Raft's own state.
#[derive(Debug)]
pub(crate) struct Leases {
    node_id: NodeId,
    lease: Duration,
    /// The last epoch whose leader, this node, has begun to hand over.
    surrendered: watch::Sender<u64>,
    /// How many changes of the members are on their way.
    changes: AtomicU64,
    /// How long the machine was suspended as far as is known, and when that was noticed last.
    suspended: Mutex<(Duration, Option<RaftInstant>)>,
}

impl Leases {
    pub(crate) fn new(node_id: NodeId, lease: Duration) -> Leases {
        Leases {
            node_id,
            lease: if mutated!(LeaseTooLong) {
                lease * 3 / 2
            } else {
                lease
            },
            surrendered: watch::Sender::new(0),
            changes: AtomicU64::new(0),
            suspended: Mutex::new((runtime::suspended(), None)),
        }
    }

    /// Ends the lease of an epoch for good.
    pub(crate) fn surrender(&self, epoch: u64) {
        self.surrendered.send_if_modified(|last| {
            let is_new = *last < epoch;
            *last = epoch.max(*last);
            is_new
        });
    }

    pub(crate) fn watch_surrendered(&self) -> watch::Receiver<u64> {
        self.surrendered.subscribe()
    }

    /// Notes that the members are about to change; see [`current`](Leases::current).
    pub(crate) fn begin_change(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Notes that what [`begin_change`](Leases::begin_change) announced is visible in the metrics, or will never be.
    pub(crate) fn end_change(&self) {
        self.changes.fetch_sub(1, Ordering::SeqCst);
    }

    /// Returns the epoch in which this node leads and knows all that was committed before it.
    pub(crate) fn leading(&self, metrics: &Metrics) -> Option<u64> {
        let epoch = metrics.current_term;
        let leads = metrics.state == ServerState::Leader
            && metrics.running_state.is_ok()
            && metrics.current_leader == Some(self.node_id);
        // The first entry of a leader's own term ends what its predecessors left.
        let is_ready = metrics.last_applied.as_ref().map(term_of) == Some(epoch);
        (leads && is_ready && *self.surrendered.borrow() < epoch).then_some(epoch)
    }

    /// Returns when a suspension of the machine was noticed last.
    fn noticed_suspension(&self) -> Option<RaftInstant> {
        let mut known = self.suspended.lock();
        let suspended = runtime::suspended();
        if suspended > known.0 + CLOCK_NOISE && !mutated!(IgnoresSuspension) {
            *known = (suspended, Some(TypeConfig::now()));
        }
        known.1
    }

    /// Returns the lease as of now.
    pub(crate) fn current(&self, metrics: &Metrics) -> Option<Lease> {
        let epoch = self.leading(metrics)?;
        let now = runtime::now();
        // Nobody else can be elected while this node is the only voter. Another could as soon as it is one
        // too, which the metrics tell late.
        let is_alone = metrics.membership_config.voter_ids().eq([self.node_id])
            && (self.changes.load(Ordering::SeqCst) == 0 || mutated!(AloneWhileGrowing));
        let until = if is_alone {
            now + self.lease
        } else {
            let acked = metrics.last_quorum_acked?.into_inner();
            if self
                .noticed_suspension()
                .is_some_and(|noticed| acked <= noticed)
            {
                return None;
            }
            let mut age = TypeConfig::now() - acked;
            if mutated!(LeaseFromAnswer) {
                age = age.saturating_sub(Duration::from_millis(60));
            }
            (now + self.lease).checked_sub(age)?
        };
        (now < until).then_some(Lease { epoch, until })
    }
}
