//! What must hold at every moment, whatever happens; one rule a file.

mod bounded;
mod converge;
mod no_commit_lost;
mod no_silent_fork;
mod nothing_vanishes;
mod one_primary;

use super::world::World;

/// A rule, with what it has to remember.
pub(crate) trait Invariant {
    /// Looks at the world after each step; says what is wrong with it.
    fn check(&mut self, _world: &World) -> Result<(), String> {
        Ok(())
    }

    /// Looks at it once all has been well for a while.
    fn check_healed(&mut self, _world: &World) -> Result<(), String> {
        Ok(())
    }
}

/// Returns all rules. That a healed cluster opens writes in time is looked at by `chaos`, which knows since when.
pub(crate) fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(one_primary::OnePrimary::default()),
        Box::new(no_commit_lost::NoCommitLost::default()),
        Box::new(bounded::Bounded::default()),
        Box::new(no_silent_fork::NoSilentFork::default()),
        Box::new(nothing_vanishes::NothingVanishes),
        Box::new(converge::Converge),
    ]
}
