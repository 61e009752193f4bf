//! HTTP between nodes and for operators, on the node's own port (20202 unless configured).

pub mod client;
pub mod cluster;
pub mod error;
pub mod events;
pub mod info;
pub mod lost;
pub mod metrics;
pub mod server;
pub mod status;
pub mod stream;

pub use error::NodeError;
pub use events::Event;
pub use metrics::{MetricKind, MetricsText};
pub use server::{Export, Forwarded, NodeApi, NodeInfo, PrimaryHost, Server};
pub use stream::HttpDial;
