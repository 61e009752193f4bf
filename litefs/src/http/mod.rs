//! HTTP between nodes and for operators, on the node's own port (20202 unless configured).

pub mod error;
pub mod events;
pub mod metrics;
pub mod server;
pub mod stream;
