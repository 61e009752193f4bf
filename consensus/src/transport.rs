use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;

use crate::member::{Member, NodeId};

/// A future on the heap that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Carries requests to peers; the other side passes them to [`Cluster::handle`](crate::Cluster::handle).
///
/// Requests may be lost, late, doubled or out of order. What they say is checked by the other side, but
/// nothing protects them from those who can write to the network.
pub trait Transport: Send + Sync + 'static {
    /// Sends one request to one peer and returns what it answers.
    ///
    /// The future may be dropped at any time; then the request need not go out, and the answer is not wanted.
    /// Connections should be kept: a leader calls each peer about ten times a second.
    ///
    /// # Errors
    /// Whatever kept an answer from coming within `timeout`.
    fn call(
        &self,
        to: NodeId,
        member: &Member,
        request: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, io::Result<Bytes>>;
}
