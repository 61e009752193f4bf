//! Whether somebody may come for what the logs hold: a node without replicas need not keep it (adr/0007).

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use crate::clock;

/// Whether history is wanted. Times are milliseconds of the wall clock.
#[derive(Debug)]
pub struct History {
    /// How long it is kept for a replica that left; `None` for good.
    retention: Option<Duration>,
    /// When a replica was last here; the beginning of time if none ever was.
    seen_ms: AtomicI64,
}

impl History {
    /// Keeps history until `retention` after a replica was here, or for good; `seen_ms` is when the last one was.
    #[must_use]
    pub fn new(retention: Option<Duration>, seen_ms: Option<i64>) -> History {
        History {
            retention,
            seen_ms: AtomicI64::new(seen_ms.unwrap_or(i64::MIN)),
        }
    }

    /// Notes that a replica is here.
    pub fn replica_is_here(&self) {
        self.seen_ms.fetch_max(clock::wall_ms(), Ordering::Relaxed);
    }

    /// Returns when a replica was last here.
    #[must_use]
    pub fn seen_ms(&self) -> Option<i64> {
        Some(self.seen_ms.load(Ordering::Relaxed)).filter(|ms| *ms > i64::MIN)
    }

    /// Returns whether somebody may come for it.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        let Some(retention) = self.retention else {
            return true;
        };
        let retention = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
        self.seen_ms()
            .is_some_and(|seen| clock::wall_ms() < seen.saturating_add(retention))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_is_wanted_for_the_retention_after_a_replica_left() {
        let now = clock::wall_ms();
        let age = Duration::from_secs(60);
        assert!(History::new(None, None).is_wanted());
        let history = History::new(Some(age), None);
        assert!(!history.is_wanted());
        history.replica_is_here();
        assert!(history.is_wanted());
        assert!(history.seen_ms() >= Some(now));
        assert!(History::new(Some(age), Some(now - 30_000)).is_wanted());
        assert!(!History::new(Some(age), Some(now - 61_000)).is_wanted());
        assert!(History::new(Some(Duration::MAX), Some(now)).is_wanted());
    }
}
