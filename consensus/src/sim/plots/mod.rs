//! Tests with a plot: who fails, who leads afterwards, and what their leases say meanwhile.

mod disk;
mod election;
mod identity;
mod membership;
mod restart;
mod transfer;

use std::future::Future;
use std::time::Duration;

use super::mutants::{self, Mutant};
use super::world::{self, World};

/// Plays a plot in a cluster of the first n nodes, which node 1 leads.
pub(super) fn with_cluster<T, F: Future<Output = T>>(
    n: u64,
    seed: u64,
    plot: impl FnOnce(World) -> F,
) -> T {
    world::run(seed, |mut world| async move {
        world.add(1..=n.max(3) + 1);
        world.form(n).await;
        plot(world).await
    })
}

/// Does something with a rule switched off.
pub(super) fn with_mutant<T>(mutant: Mutant, work: impl FnOnce() -> T) -> T {
    mutants::set(Some(mutant));
    let result = work();
    mutants::set(None);
    result
}

pub(super) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}
