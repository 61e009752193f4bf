//! Reaping of orphans: as pid 1 of a container we inherit processes nobody else waits for.
//!
//! Children of our own have a thread that waits for them, which takes well under a second. So a
//! zombie that two looks in a row find belongs to nobody, and is reaped.

use rustix::process::{Pid, WaitId, WaitIdOptions};
use std::collections::HashSet;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_secs(1);

/// Reaps orphans for ever.
pub(super) fn reap_orphans() {
    let mut seen = HashSet::new();
    loop {
        seen = reap_seen_again(&seen);
        std::thread::sleep(INTERVAL);
    }
}

/// Reaps the zombies that were there at the last look too; returns the others.
pub(super) fn reap_seen_again(seen: &HashSet<Pid>) -> HashSet<Pid> {
    let (again, new) = zombies().into_iter().partition(|pid| seen.contains(pid));
    let again: HashSet<Pid> = again;
    for pid in again {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::Pid(pid), options) {
            Ok(_) => tracing::debug!(pid = pid.as_raw_pid(), "reaped an orphan"),
            Err(error) => tracing::debug!(pid = pid.as_raw_pid(), %error, "orphan is gone"),
        }
    }
    new
}

/// Our children that ended and were not waited for.
pub(super) fn zombies() -> HashSet<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return HashSet::new();
    };
    let pid = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    entries
        .flatten()
        .filter_map(pid)
        .filter(|&pid| is_our_zombie(pid))
        .filter_map(Pid::from_raw)
        .collect()
}

/// Reads state and parent, the two fields after the name in `/proc/PID/stat`.
fn is_our_zombie(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name stands in parentheses and may contain any character.
    let mut fields = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace();
    let is_zombie = fields.next() == Some("Z");
    let parent = fields
        .next()
        .and_then(|parent| parent.parse().ok())
        .and_then(Pid::from_raw);
    is_zombie && parent == Some(rustix::process::getpid())
}
