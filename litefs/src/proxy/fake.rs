//! A node for tests: positions that are set by hand.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::port::{Primary, ProxyNode, Waiting};
use super::token::Standing;
use crate::ltx::{Checksum, Pos, Txid};
use crate::replication::{ChangeHub, Changes, DbName};

pub(super) struct FakeNode {
    dbs: Mutex<BTreeMap<DbName, Standing>>,
    hub: ChangeHub,
    primary: watch::Sender<Primary>,
}

impl FakeNode {
    pub(super) fn new() -> Arc<FakeNode> {
        Arc::new(FakeNode {
            dbs: Mutex::default(),
            hub: ChangeHub::new(),
            primary: watch::Sender::new(Primary::Unknown),
        })
    }

    pub(super) fn standing_at(txid: u64, epoch: u64) -> Standing {
        Standing {
            pos: Pos {
                txid: Txid(txid),
                post_apply_checksum: Checksum::new(txid),
            },
            epoch,
            timestamp_ms: crate::clock::wall_ms(),
        }
    }

    pub(super) fn put(&self, db: &str, txid: u64, epoch: u64) {
        let db: DbName = db.parse().unwrap();
        self.dbs
            .lock()
            .insert(db.clone(), FakeNode::standing_at(txid, epoch));
        self.hub.publish(&db);
    }

    pub(super) fn age(&self, db: &str) {
        let db: DbName = db.parse().unwrap();
        self.dbs.lock().get_mut(&db).unwrap().timestamp_ms = 0;
    }

    pub(super) fn set_primary(&self, primary: Primary) {
        self.primary.send_replace(primary);
    }
}

impl ProxyNode for FakeNode {
    fn cluster_id(&self) -> Option<String> {
        Some("LFSC0".to_owned())
    }

    fn primary(&self) -> Primary {
        self.primary.borrow().clone()
    }

    fn primary_hostname(&self) -> Option<String> {
        None
    }

    fn primary_changed(&self) -> Waiting {
        let mut primary = self.primary.subscribe();
        Box::pin(async move {
            let _ = primary.changed().await;
        })
    }

    fn tenure(&self) -> Option<u64> {
        (self.primary() == Primary::Here).then_some(1)
    }

    fn lag_ms(&self) -> Option<i64> {
        Some(0)
    }

    fn databases(&self) -> Vec<DbName> {
        self.dbs.lock().keys().cloned().collect()
    }

    fn standing(&self, db: &DbName) -> Option<Standing> {
        self.dbs.lock().get(db).copied()
    }

    fn may_come(&self, _: &DbName) -> bool {
        true
    }

    fn is_captured(&self, _: &DbName) -> bool {
        true
    }

    fn capture(&self, _: &DbName) {}

    fn changes(&self) -> Changes {
        self.hub.subscribe()
    }
}
