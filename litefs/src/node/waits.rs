//! How long commits wait for other nodes: measured around whoever makes them wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::db::{CommitGate, Db};
use crate::http::MetricsText;
use crate::ltx::Pos;
use crate::replication::DbName;

/// Upper bounds of the buckets, in milliseconds.
const BOUNDS_MS: [f64; 13] = [
    0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0,
];

/// A gate whose waits are counted.
pub(super) struct Measured {
    gate: Arc<dyn CommitGate>,
    waits: Histogram,
    /// Commits that did not get their answer in time, or whose tenure ended.
    unanswered: AtomicU64,
}

impl Measured {
    pub(super) fn new(gate: Arc<dyn CommitGate>) -> Arc<Measured> {
        Arc::new(Measured {
            gate,
            waits: Histogram::default(),
            unanswered: AtomicU64::new(0),
        })
    }

    pub(super) fn metrics(&self, text: &mut MetricsText) {
        let (buckets, sum) = self.waits.read();
        text.histogram(
            "litefs_quorum_wait_seconds",
            "How long commits waited until other nodes had them.",
            &buckets,
            sum,
        );
        text.count(
            "litefs_quorum_unanswered_total",
            "Commits that other nodes did not have in time: the program got an error, and the outcome was decided later.",
            self.unanswered.load(Ordering::Relaxed),
        );
    }
}

impl CommitGate for Measured {
    fn waits(&self, db: &DbName) -> bool {
        self.gate.waits(db)
    }

    fn wait(&self, db: &Db, pos: Pos) -> bool {
        let began = Instant::now();
        let has_answer = self.gate.wait(db, pos);
        self.waits.add(began.elapsed());
        if !has_answer {
            self.unanswered.fetch_add(1, Ordering::Relaxed);
        }
        has_answer
    }
}

/// Counts of times, by their size; the last bucket has no bound.
#[derive(Debug, Default)]
struct Histogram {
    counts: [AtomicU64; BOUNDS_MS.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    fn add(&self, time: Duration) {
        let ms = time.as_secs_f64() * 1000.0;
        let bucket = BOUNDS_MS.iter().position(|bound| ms <= *bound);
        self.counts[bucket.unwrap_or(BOUNDS_MS.len())].fetch_add(1, Ordering::Relaxed);
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// Upper bounds in seconds with the counts up to them, the last one for all, and the sum in seconds.
    fn read(&self) -> (Vec<(f64, u64)>, f64) {
        let bounds = BOUNDS_MS
            .iter()
            .map(|ms| ms / 1000.0)
            .chain([f64::INFINITY]);
        let mut total = 0;
        let buckets = bounds.zip(&self.counts).map(|(bound, count)| {
            total += count.load(Ordering::Relaxed);
            (bound, total)
        });
        let sum = Duration::from_micros(self.sum_us.load(Ordering::Relaxed));
        (buckets.collect(), sum.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let histogram = Histogram::default();
        for ms in [0, 1, 3, 6000] {
            histogram.add(Duration::from_millis(ms));
        }
        let (buckets, sum) = histogram.read();
        assert_eq!(buckets[0], (0.0005, 1));
        assert_eq!(buckets[1], (0.001, 2));
        assert_eq!(buckets[3], (0.005, 3));
        assert_eq!(buckets[12], (5.0, 3));
        assert_eq!(buckets[13], (f64::INFINITY, 4));
        assert!((sum - 6.004).abs() < 1e-9);
    }
}
