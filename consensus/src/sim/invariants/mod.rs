//! What must hold at every moment, whatever happens; one rule a file.

mod no_commit_lost;
mod one_history;
mod one_leader_per_epoch;
mod one_lease;

use super::world::World;

/// A rule, with what it has to remember.
pub(crate) trait Invariant {
    /// Looks at the world; says what is wrong with it.
    fn check(&mut self, world: &World, acknowledged: &[String]) -> Result<(), String>;
}

/// Returns all rules.
pub(crate) fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(one_lease::OneLease),
        Box::new(one_leader_per_epoch::OneLeaderPerEpoch::default()),
        Box::new(no_commit_lost::NoCommitLost),
        Box::new(one_history::OneHistory::default()),
    ]
}
