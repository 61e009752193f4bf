//! What the proxy needs of the node it is part of.

use std::future::Future;
use std::pin::Pin;

use super::token::Standing;
use crate::replication::{Changes, DbName};

/// Where writes go, as this node knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Primary {
    /// This node takes them.
    Here,
    /// The node whose API is at this address does, or did when it was last heard of.
    At(String),
    /// Nobody is known to.
    Unknown,
}

/// What somebody waits for.
pub type Waiting = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The node. No call blocks unless it says so.
pub trait ProxyNode: Send + Sync + 'static {
    /// Identity of the cluster, once it is known.
    fn cluster_id(&self) -> Option<String>;
    /// Where writes go.
    fn primary(&self) -> Primary;
    /// Host name of the primary, if it is another node and known.
    fn primary_hostname(&self) -> Option<String>;
    /// Ends when another node may have become primary, since the call.
    fn primary_changed(&self) -> Waiting;
    /// The tenure in which this node is primary at this moment: nobody else can have been since it began.
    fn tenure(&self) -> Option<u64>;
    /// How far this node is behind, in milliseconds; nothing before it was level once.
    fn lag_ms(&self) -> Option<i64>;
    /// Databases that there are.
    fn databases(&self) -> Vec<DbName>;
    /// Where a database is; nothing if it is not there.
    fn standing(&self, db: &DbName) -> Option<Standing>;
    /// Whether a database could come to be here.
    fn may_come(&self, db: &DbName) -> bool;
    /// Whether it is plain that the standing of a database is that of its last commit here.
    fn is_captured(&self, db: &DbName) -> bool;
    /// Makes the standing of a database that of its last commit here. Blocks.
    fn capture(&self, db: &DbName);
    /// Tells of databases that move.
    fn changes(&self) -> Changes;
}
