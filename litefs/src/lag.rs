//! How far behind its primary a node is, and who that is.

use std::sync::atomic::{AtomicI64, Ordering};

use parking_lot::RwLock;

use crate::clock;

/// What `.lag` and `.primary` show.
#[derive(Debug)]
pub struct Lag {
    /// Primary's clock when we last had everything, milliseconds since 1970; zero before the first time.
    level_ms: AtomicI64,
    /// Our clock then.
    level_here_ms: AtomicI64,
    /// Primary's clock, as last heard.
    primary_ms: AtomicI64,
    hostname: RwLock<Option<String>>,
}

/// What `.lag` says before the first synchronisation, as in LiteFS.
const UNKNOWN_MS: i64 = 2_147_483_647;

impl Default for Lag {
    fn default() -> Self {
        Lag {
            level_ms: AtomicI64::new(0),
            level_here_ms: AtomicI64::new(0),
            primary_ms: AtomicI64::new(0),
            hostname: RwLock::new(None),
        }
    }
}

impl Lag {
    /// Takes a heartbeat: the primary's clock, and whether everything it then had is applied here.
    pub fn heard(&self, primary_ms: i64, caught_up: bool) {
        self.primary_ms.store(primary_ms, Ordering::Relaxed);
        if caught_up {
            self.level_ms.store(primary_ms, Ordering::Relaxed);
            self.level_here_ms
                .store(clock::wall_ms(), Ordering::Relaxed);
        }
    }

    /// Learns who the primary is, or that nobody is known.
    pub fn set_primary(&self, hostname: Option<String>) {
        *self.hostname.write() = hostname;
    }

    /// Returns the primary's host name.
    #[must_use]
    pub fn primary_hostname(&self) -> Option<String> {
        self.hostname.read().clone()
    }

    /// Returns the primary's clock as last heard, milliseconds since 1970.
    #[must_use]
    pub fn primary_ms(&self) -> i64 {
        self.primary_ms.load(Ordering::Relaxed)
    }

    /// Returns how old our state is at most, in milliseconds: zero on the primary.
    ///
    /// Heartbeats come every second while nothing happens, so an idle replica that hears its primary is at zero.
    #[must_use]
    pub fn ms(&self, is_primary: bool) -> i64 {
        self.known_ms(is_primary).unwrap_or(UNKNOWN_MS)
    }

    /// Returns the same, or nothing before the first synchronisation.
    #[must_use]
    pub fn known_ms(&self, is_primary: bool) -> Option<i64> {
        if is_primary {
            return Some(0);
        }
        if self.level_ms.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let silent = clock::wall_ms() - self.level_here_ms.load(Ordering::Relaxed);
        let behind = self.primary_ms() - self.level_ms.load(Ordering::Relaxed);
        let silent = if silent <= HEARTBEAT_MS { 0 } else { silent };
        Some(behind.max(silent).clamp(0, UNKNOWN_MS - 1))
    }
}

/// A level replica that heard its primary so recently is not behind: heartbeats come each second.
const HEARTBEAT_MS: i64 = 1500;
