//! Who may be primary, and until when: leader election by Raft, leases, membership and the settings
//! that all nodes share.
//!
//! ```text
//!  litefs ──> Cluster ──> openraft ──> storage ──> Disk      log, identity, snapshot: docs/formats/raft.md
//!               │  ^          │
//!          View, Lease        └──> wire ──> Transport         one request to one peer, bytes in, bytes out
//! ```
//!
//! Nothing here knows of databases. The epoch of a primary is its Raft term: leader ids allow one leader
//! in a term, so no two nodes ever lead in the same epoch. What holds:
//!
//! | name | rule | kept in |
//! |---|---|---|
//! | INV-LEASE-1 | a lease ends before any other node can be elected, by each node's monotonic clock | `lease`, `timing` |
//! | INV-LEASE-2 | a voter that starts keeps the promise it may have made before: it neither votes nor campaigns for `election_max` | `promise` |
//! | INV-LEASE-3 | an epoch whose leader began a transfer has no lease any more | `lease` |
//! | INV-RAFT-1 | what was acknowledged is durable: vote, log and snapshot are synced before the answer | `storage` |
//! | INV-RAFT-2 | a node without a log grants no vote: an emptied disk does not outvote data | `promise` |
//! | INV-RAFT-3 | a message of another cluster, or for another node, changes nothing | `wire`, `cluster` |

mod cluster;
mod command;
mod disk;
mod error;
mod lease;
mod member;
mod membership;
mod mutation;
mod network;
mod promise;
mod raft;
mod runtime;
#[cfg(test)]
mod sim;
mod state_machine;
mod storage;
mod timing;
mod transport;
mod view;
mod wire;

pub use cluster::{Cluster, Options};
pub use command::{ClusterState, Command, Durability};
pub use error::Error;
pub use lease::Lease;
pub use member::{Member, NodeId};
pub use storage::Fault;
pub use timing::{Timing, TimingError};
pub use transport::{BoxFuture, Transport};
pub use view::View;
