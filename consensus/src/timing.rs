//! How long a leader may believe that it leads, and when others try to take over.
//!
//! How openraft 0.10.0-alpha.37 decides, by its own names:
//!
//! - A follower that hears from a leader stamps the moment (`Leased::touch`) and from then on rejects votes
//!   and pre-votes for `timer_config.leader_lease`, which is `Config::election_timeout_max`
//!   (`Engine::handle_vote_req`, `handle_pre_vote_req`; a vote that a leader's transfer authorized is exempt).
//! - It campaigns itself once `leader_lease` and then `election_timeout` have passed since that stamp, the
//!   latter drawn anew for each campaign from `election_timeout_min..election_timeout_max`, plus
//!   `smaller_log_timeout` (twice the maximum) if a voter with a longer log has refused it
//!   (`RaftCore::handle_tick_election`). Ticks come every `heartbeat_interval * 13 / 64`.
//! - A leader sends heartbeats at the first tick after `heartbeat_interval`.
//!
//! So with T = `election_max` and m = `election_min`, and n followers left, the next leader campaigns about
//! T + m + (T - m) / (n + 1) after the last heartbeat, which is on average half an interval before the old
//! leader dies. With the defaults and two followers: 570 + 110 + 153 - 60 = 773 ms, and some more for
//! ticks, two rounds of votes and their syncs.

use std::time::Duration;

/// The clocks of two nodes may differ in rate by this part of a lease, twenty times what NTP can cause.
const MARGIN_DIVISOR: u32 = 20;

/// The time settings of a cluster; all nodes must have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// How often a leader is heard of. An answer that takes longer than this does not count, so it must exceed
    /// the round trip between any two nodes.
    pub heartbeat: Duration,
    /// How long a leader may act after it sent the requests that a quorum acknowledged.
    pub lease: Duration,
    /// Shortest time after `election_max` at which a follower that hears no leader campaigns.
    pub election_min: Duration,
    /// How long a follower that hears of a leader promises to vote for nobody else; also the longest time after
    /// that at which it campaigns.
    pub election_max: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            heartbeat: Duration::from_millis(100),
            lease: Duration::from_millis(540),
            election_min: Duration::from_millis(110),
            election_max: Duration::from_millis(570),
        }
    }
}

/// Time settings that would not be safe, or could not work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TimingError {
    /// A leader could act while another is elected.
    #[error("a lease of {lease:?} needs an election_max of {need:?} or more, not {election_max:?}")]
    LeaseTooLong {
        /// The setting.
        lease: Duration,
        /// The setting.
        election_max: Duration,
        /// What would do.
        need: Duration,
    },
    /// One late heartbeat would end the lease.
    #[error("a lease of {lease:?} is shorter than three heartbeats of {heartbeat:?}")]
    LeaseTooShort {
        /// The setting.
        lease: Duration,
        /// The setting.
        heartbeat: Duration,
    },
    /// Followers would all campaign at once, or before a heartbeat can come.
    #[error(
        "election_min {min:?} must be more than the heartbeat {heartbeat:?} and less than election_max {max:?}"
    )]
    Election {
        /// The setting.
        min: Duration,
        /// The setting.
        max: Duration,
        /// The setting.
        heartbeat: Duration,
    },
    /// Times are counted in whole milliseconds.
    #[error("{name} of {value:?} is not a whole number of milliseconds from 1 to an hour")]
    NotMillis {
        /// Which setting.
        name: &'static str,
        /// The setting.
        value: Duration,
    },
}

impl Timing {
    /// Makes settings for slower networks: all defaults times a factor.
    #[must_use]
    pub fn scaled(factor: u32) -> Timing {
        let base = Timing::default();
        Timing {
            heartbeat: base.heartbeat * factor,
            lease: base.lease * factor,
            election_min: base.election_min * factor,
            election_max: base.election_max * factor,
        }
    }

    /// Makes settings from a lease, the rest in the proportions of the defaults. Two voters must answer each other within a
    /// heartbeat, which is a bit less than a fifth of it.
    #[must_use]
    pub fn of_lease(lease: Duration) -> Timing {
        let base = Timing::default();
        let lease_ms = millis(lease);
        let part = |of: Duration| lease_ms.saturating_mul(millis(of)) / millis(base.lease);
        let ms = Duration::from_millis;
        Timing {
            heartbeat: ms(part(base.heartbeat)),
            lease: ms(lease_ms),
            election_min: ms(part(base.election_min) + 1),
            election_max: ms(part(base.election_max) + 1),
        }
    }

    /// Checks that a lease ends before any follower votes for another (INV-LEASE-1), and that the rest can work.
    ///
    /// The lease runs from when the leader sent, the promise from when the follower received, which is later;
    /// so only the rates of the two clocks need a margin: a twentieth of the lease.
    ///
    /// # Errors
    /// Names the settings that contradict each other.
    pub fn validate(&self) -> Result<(), TimingError> {
        for (name, value) in [
            ("heartbeat", self.heartbeat),
            ("lease", self.lease),
            ("election_min", self.election_min),
            ("election_max", self.election_max),
        ] {
            let whole = value.subsec_nanos().is_multiple_of(1_000_000);
            if !whole || value.is_zero() || value > Duration::from_secs(3600) {
                return Err(TimingError::NotMillis { name, value });
            }
        }
        if !is_within(self.lease, self.election_max) {
            return Err(TimingError::LeaseTooLong {
                lease: self.lease,
                election_max: self.election_max,
                need: self.lease + self.lease / MARGIN_DIVISOR,
            });
        }
        if self.lease < self.heartbeat * 3 {
            return Err(TimingError::LeaseTooShort {
                lease: self.lease,
                heartbeat: self.heartbeat,
            });
        }
        if self.election_min <= self.heartbeat || self.election_min >= self.election_max {
            return Err(TimingError::Election {
                min: self.election_min,
                max: self.election_max,
                heartbeat: self.heartbeat,
            });
        }
        Ok(())
    }
}

/// Returns whether a lease ends before a promise does, by clocks of different rates.
pub(crate) fn is_within(lease: Duration, promise: Duration) -> bool {
    lease + lease / MARGIN_DIVISOR <= promise
}

/// Returns whole milliseconds.
pub(crate) fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_at_any_scale() {
        Timing::default().validate().unwrap();
        Timing::scaled(10).validate().unwrap();
        for ms in (200..5000).chain([60_000]) {
            let timing = Timing::of_lease(Duration::from_millis(ms));
            timing.validate().unwrap();
            assert_eq!(timing.lease, Duration::from_millis(ms));
        }
    }

    #[test]
    fn a_lease_that_outlives_the_promise_is_refused() {
        let ms = Duration::from_millis;
        let with_max = |election_max| Timing {
            election_max,
            ..Timing::default()
        };
        assert_eq!(with_max(ms(567)).validate(), Ok(()));
        let error = with_max(ms(566)).validate().unwrap_err();
        assert!(matches!(error, TimingError::LeaseTooLong { .. }));
        assert_eq!(
            error.to_string(),
            "a lease of 540ms needs an election_max of 567ms or more, not 566ms"
        );
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let ms = Duration::from_millis;
        let base = Timing::default();
        let cases = [
            Timing {
                lease: ms(200),
                ..base
            },
            Timing {
                election_min: ms(100),
                ..base
            },
            Timing {
                election_min: ms(570),
                ..base
            },
            Timing {
                heartbeat: Duration::from_micros(1500),
                ..base
            },
            Timing {
                heartbeat: Duration::ZERO,
                ..base
            },
        ];
        for timing in cases {
            assert!(timing.validate().is_err(), "{timing:?}");
        }
    }
}
