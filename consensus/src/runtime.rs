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

/// Returns how long this machine was suspended since it started, or a little less: the monotonic clock stands
/// still meanwhile, the boot-time clock does not.
#[cfg(not(test))]
pub(crate) fn suspended() -> std::time::Duration {
    use rustix::time::{ClockId, clock_gettime};
    use std::time::Duration;

    let read = |clock| {
        let time = clock_gettime(clock);
        let secs = u64::try_from(time.tv_sec).unwrap_or_default();
        Duration::new(secs, u32::try_from(time.tv_nsec).unwrap_or_default())
    };
    // In this order, so that being preempted in between makes it less, never more.
    let boot_time = read(ClockId::Boottime);
    boot_time.saturating_sub(read(ClockId::Monotonic))
}

/// Returns how long this simulated machine was suspended.
#[cfg(test)]
pub(crate) fn suspended() -> std::time::Duration {
    crate::sim::runtime::suspended()
}
