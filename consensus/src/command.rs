//! What the cluster agrees on besides its members, and how it is changed.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::member::Member;

/// When a commit may be acknowledged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// At once; what no other node has yet is lost with the primary's disk.
    #[default]
    Async,
    /// At once, but commits stall once no other voter has acknowledged for so long.
    Bounded {
        /// Milliseconds.
        ms: u64,
        /// Transactions.
        transactions: u64,
    },
    /// Once a majority of voters has it on disk.
    Quorum,
}

/// A change of the replicated state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Command {
    /// Names the cluster; the first one wins, later ones do nothing.
    SetClusterId(String),
    /// Sets how durable commits are.
    SetDurability {
        /// The database; without one, the default of the cluster.
        db: Option<String>,
        /// `None` takes the setting away: a database follows the cluster, the cluster is `Async`.
        value: Option<Durability>,
    },
    /// Names the region whose voters are to lead; empty: none is preferred.
    SetPreferredRegion(String),
}

/// The replicated state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// Tells this cluster from others; empty until it is initialized.
    pub cluster_id: String,
    /// What databases without a setting of their own have.
    pub durability: Durability,
    /// Settings of single databases.
    pub databases: BTreeMap<String, Durability>,
    /// The region whose voters are to lead, if one is preferred.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub preferred_region: String,
    /// Commands of a later version, oldest first. They are kept as they came, and done by the first
    /// version that knows them, so that all nodes end with the same state.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) unknown: Vec<Proposal>,
}

impl ClusterState {
    /// Returns how durable commits of a database are.
    #[must_use]
    pub fn durability_of(&self, db: &str) -> Durability {
        self.databases.get(db).copied().unwrap_or(self.durability)
    }

    /// Returns how much a member is wanted as leader: by its region, then by its priority.
    #[must_use]
    pub fn preference(&self, member: &Member) -> (bool, u32) {
        let is_there = !self.preferred_region.is_empty() && member.region == self.preferred_region;
        (is_there, member.priority)
    }

    /// Says how many replicated commands this version does not know; it should be upgraded if there are any.
    #[must_use]
    pub fn unknown_count(&self) -> usize {
        self.unknown.len()
    }

    /// Does a command; one that is unknown is put aside.
    pub(crate) fn apply(&mut self, proposal: Proposal) -> Outcome {
        let outcome = proposal.check();
        match proposal.decode() {
            Some(command) => self.run(command),
            None => self.unknown.push(proposal),
        }
        outcome
    }

    /// Does what an earlier version put aside and this one knows.
    pub(crate) fn retry_unknown(&mut self) {
        for proposal in std::mem::take(&mut self.unknown) {
            self.apply(proposal);
        }
    }

    fn run(&mut self, command: Command) {
        match command {
            Command::SetClusterId(id) if self.cluster_id.is_empty() => self.cluster_id = id,
            Command::SetClusterId(_) => {}
            Command::SetDurability { db: None, value } => {
                self.durability = value.unwrap_or_default();
            }
            Command::SetDurability {
                db: Some(db),
                value: Some(value),
            } => {
                self.databases.insert(db, value);
            }
            Command::SetDurability {
                db: Some(db),
                value: None,
            } => {
                self.databases.remove(&db);
            }
            Command::SetPreferredRegion(region) => self.preferred_region = region,
        }
    }
}

/// Version of the commands this program writes; grows when one is added or changes its meaning.
pub(crate) const COMMAND_VERSION: u32 = 2;

/// A command as it is in the log: any version can carry it, also one that does not know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Proposal {
    pub(crate) version: u32,
    pub(crate) command: Value,
}

impl Proposal {
    pub(crate) fn new(command: &Command) -> Result<Proposal, serde_json::Error> {
        Ok(Proposal {
            version: COMMAND_VERSION,
            command: serde_json::to_value(command)?,
        })
    }

    fn decode(&self) -> Option<Command> {
        if self.version > COMMAND_VERSION {
            return None;
        }
        serde_json::from_value(self.command.clone()).ok()
    }

    fn check(&self) -> Outcome {
        match self.decode() {
            Some(_) => Outcome::Done,
            None => Outcome::Unknown {
                version: self.version,
            },
        }
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{} {}", self.version, self.command)
    }
}

/// What became of an entry of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Done,
    Unknown { version: u32 },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(state: &mut ClusterState, command: &Command) -> Outcome {
        state.apply(Proposal::new(command).unwrap())
    }

    #[test]
    fn the_first_cluster_id_wins_and_databases_override() {
        let mut state = ClusterState::default();
        apply(&mut state, &Command::SetClusterId("a".into()));
        apply(&mut state, &Command::SetClusterId("b".into()));
        assert_eq!(state.cluster_id, "a");

        let bounded = Durability::Bounded {
            ms: 500,
            transactions: 10,
        };
        let set = |db: Option<&str>, value| Command::SetDurability {
            db: db.map(str::to_owned),
            value,
        };
        apply(&mut state, &set(None, Some(Durability::Quorum)));
        apply(&mut state, &set(Some("x.db"), Some(bounded)));
        assert_eq!(state.durability_of("x.db"), bounded);
        assert_eq!(state.durability_of("y.db"), Durability::Quorum);
        apply(&mut state, &set(Some("x.db"), None));
        apply(&mut state, &set(None, None));
        assert_eq!(state.durability_of("x.db"), Durability::Async);
    }

    #[test]
    fn the_preferred_region_comes_before_the_priority() {
        let member = |region: &str, priority| Member {
            region: region.into(),
            priority,
            ..Member::default()
        };
        let mut state = ClusterState::default();
        let (near, far) = (member("fra", 1), member("", 2));
        assert!(state.preference(&near) < state.preference(&far));
        apply(&mut state, &Command::SetPreferredRegion("fra".into()));
        assert!(state.preference(&near) > state.preference(&far));
        assert!(state.preference(&near) < state.preference(&member("fra", 2)));
        apply(&mut state, &Command::SetPreferredRegion(String::new()));
        assert!(state.preference(&near) < state.preference(&far));
    }

    #[test]
    fn a_command_of_a_later_version_is_kept_until_it_is_known() {
        let mut state = ClusterState::default();
        let known = serde_json::to_value(Command::SetClusterId("a".into())).unwrap();
        let later = Proposal {
            version: COMMAND_VERSION + 1,
            command: known.clone(),
        };
        let strange = Proposal {
            version: COMMAND_VERSION,
            command: serde_json::json!({ "grow_wings": 2 }),
        };
        assert_eq!(state.apply(later), Outcome::Unknown { version: 3 });
        assert_eq!(
            state.apply(strange.clone()),
            Outcome::Unknown { version: 2 }
        );
        assert_eq!((state.cluster_id.as_str(), state.unknown_count()), ("", 2));

        let text = serde_json::to_string(&state).unwrap();
        let mut state: ClusterState = serde_json::from_str(&text).unwrap();
        state.unknown[0].version = COMMAND_VERSION; // as if this program were upgraded
        state.retry_unknown();
        assert_eq!(state.cluster_id, "a");
        assert_eq!(state.unknown, [strange]);
    }
}
