//! The node as its HTTP proxy sees it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;

use super::election::Election;
use super::ports::Ports;
use crate::proxy::token::Standing;
use crate::proxy::{Primary, ProxyNode, Waiting};
use crate::replication::{Changes, DbName, Sink};
use crate::store::chain;

pub(super) struct Proxied {
    pub(super) ports: Arc<Ports>,
    pub(super) election: Option<Arc<Election>>,
    /// Whom this node follows: its address.
    pub(super) target: watch::Receiver<Option<String>>,
}

impl ProxyNode for Proxied {
    fn cluster_id(&self) -> Option<String> {
        Sink::cluster_id(&*self.ports)
    }

    fn primary(&self) -> Primary {
        if self.ports.node.takes_writes() {
            return Primary::Here;
        }
        // Before a node that gives its role away knows who gets it, its own address may be the last one known.
        match self.target.borrow().clone() {
            Some(url) if !self.ports.node.is_primary() => Primary::At(url),
            _ => Primary::Unknown,
        }
    }

    fn primary_hostname(&self) -> Option<String> {
        self.ports.lag.primary_hostname()
    }

    fn primary_changed(&self) -> Waiting {
        let (mut role, mut target) = (self.ports.role.subscribe(), self.target.clone());
        target.mark_unchanged();
        Box::pin(async move {
            let target_changed = async {
                if target.changed().await.is_err() {
                    // A node that stops changes no more.
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                _ = role.changed() => {}
                () = target_changed => {}
            }
        })
    }

    fn tenure(&self) -> Option<u64> {
        let node = &self.ports.node;
        if !node.is_primary() {
            return None;
        }
        let epoch = node.epoch.load(Ordering::Acquire);
        match &self.election {
            Some(election) => election
                .lease()
                .filter(|lease| lease.epoch == epoch)
                .map(|_| epoch),
            None => Some(epoch),
        }
    }

    fn lag_ms(&self) -> Option<i64> {
        self.ports.lag.known_ms(self.ports.node.is_primary())
    }

    fn databases(&self) -> Vec<DbName> {
        let all = self.ports.store.all();
        all.iter().map(|db| db.name().clone()).collect()
    }

    fn standing(&self, name: &DbName) -> Option<Standing> {
        let db = self.ports.store.get(name.as_str())?;
        let at = db.published();
        // Where the log is ahead of what readers see, its last transaction joins what they see: that is of the same history.
        let epoch = db.log().end().map_or(0, |end| end.epoch);
        (at.pos.txid.0 > 0).then_some(Standing {
            pos: at.pos,
            epoch,
            timestamp_ms: at.timestamp_ms,
        })
    }

    fn may_come(&self, db: &DbName) -> bool {
        let is_companion = ["-wal", "-shm", "-journal", "-pos"]
            .iter()
            .any(|suffix| db.as_str().ends_with(suffix));
        !is_companion && (self.ports.node.is_primary() || self.ports.filter.matches(db))
    }

    fn is_captured(&self, name: &DbName) -> bool {
        let db = self.ports.store.get(name.as_str());
        db.is_none_or(|db| !db.is_primary() || db.has_no_news())
    }

    fn capture(&self, name: &DbName) {
        let Some(db) = self.ports.store.get(name.as_str()) else {
            return;
        };
        if let Err(error) = db.capture_now() {
            // The watcher tries again.
            tracing::warn!(db = %name, error = chain(&error), "cannot capture");
        }
    }

    fn changes(&self) -> Changes {
        self.ports.node.hub.subscribe()
    }
}
