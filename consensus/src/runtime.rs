//! The executor, clock and randomness that openraft and this crate run on.
//!
//! tokio's; in unit tests one that also can be simulated, with a node's own clock and seeded randomness.

use std::time::Instant;

#[cfg(not(test))]
mod real {
    pub(crate) use openraft::impls::TokioRuntime as Runtime;
}

#[cfg(not(test))]
pub(crate) use real::Runtime;

#[cfg(test)]
pub(crate) use crate::sim::runtime::SimRuntime as Runtime;

/// Returns the time of this node's monotonic clock.
#[cfg(not(test))]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Returns the time of the simulated node's monotonic clock.
#[cfg(test)]
pub(crate) fn now() -> Instant {
    crate::sim::runtime::now().to_std()
}
