//! What a voter that has just started must not do yet.
//!
//! A follower that hears from a leader promises not to elect another for `election_max`; the leader's lease rests
//! on it. The promise is kept in memory. So a node that starts acts as if it had made one the moment before it
//! died: until `election_max` has passed it grants no vote and does not campaign (INV-LEASE-2). Votes that a
//! leader itself asked for by a transfer are exempt: that leader has given up its lease.
//!
//! A node without a log grants no votes at all, and if a leader takes it for a voter it does not get one either:
//! it was emptied, and what it acknowledged before may be nowhere else (INV-RAFT-2).

use std::time::Duration;

use openraft::type_config::TypeConfigExt;
use parking_lot::Mutex;

use crate::raft::{RaftInstant, TypeConfig};

/// Until when a node that has started is bound.
#[derive(Debug)]
pub(crate) struct Promise {
    until: Mutex<Option<RaftInstant>>,
}

impl Promise {
    /// Begins the wait now.
    pub(crate) fn new(wait: Duration) -> Promise {
        Promise {
            until: Mutex::new(Some(TypeConfig::now() + wait)),
        }
    }

    /// Ends the wait: there is nobody to whom a promise could have been made.
    pub(crate) fn release(&self) {
        *self.until.lock() = None;
    }

    /// Returns until when this node is bound, if it still is.
    pub(crate) fn bound_until(&self) -> Option<RaftInstant> {
        self.until.lock().filter(|until| TypeConfig::now() < *until)
    }
}
