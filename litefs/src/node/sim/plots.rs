//! Situations that chance hardly ever makes.

use super::mutants::{self, Mutant};
use super::world::{Id, MS, World};

/// A primary is stopped with a commit on its way, the next one fences the node that it then comes to, and the first goes on.
fn late_commit(seed: u64) -> Result<(), String> {
    let mut world = World::new(seed, false);
    let db = "a".parse().expect("a name");
    world.client.quorum_dbs = [db].into();
    let db = "a".parse().expect("a name");
    for id in 1..=3 {
        world.add(id);
        world.start(id);
    }
    world.raft_form(&(1..=3).collect());
    let find = |world: &World, is: &dyn Fn(&World, Id) -> bool| {
        world.ids().into_iter().find(|id| is(world, *id))
    };
    let is_primary = |world: &World, id: Id| world.nodes[&id].process.is_primary;
    let mut first = 0;
    for _ in 0..600 {
        let next = world.now + 5 * MS;
        world.run_until(next);
        if let Some(id) = find(&world, &is_primary) {
            first = id;
            world.write(id, &db, MS);
        }
        if world.client.committed.len() > 20 {
            break;
        }
    }
    world.stalls = u32::MAX;
    let len = |world: &World| world.nodes[&first].disk.dbs[&db].log.len();
    let before = len(&world);
    world.write(first, &db, MS);
    while len(&world) == before {
        let next = world.now + 50;
        world.run_until(next);
    }
    for other in world.ids() {
        world.cut.insert((first, other));
    }
    let next = world.now + 5 * MS;
    world.run_until(next);
    world.set_paused(first, true, true);
    let is_winner = |world: &World, id: Id| id != first && world.nodes[&id].raft.leader == Some(id);
    let is_fenced = |world: &World, id: Id| {
        let node = &world.nodes[&id];
        id != first && node.raft.leader != Some(id) && node.disk.seen == node.raft.term
    };
    let end = world.now + 5_000 * MS;
    while world.now < end
        && (find(&world, &is_winner).is_none() || find(&world, &is_fenced).is_none())
    {
        let next = world.now + 100;
        world.run_until(next);
    }
    world.cut.clear();
    let next = world.now + 30 * MS;
    world.run_until(next);
    world.set_paused(first, false, false);
    let next = world.now + 3_000 * MS;
    world.run_until(next);
    world.failure.map_or(Ok(()), Err)
}

const SEEDS: u64 = 60;

#[test]
fn a_commit_that_comes_late_is_not_taken() {
    for seed in 0..SEEDS {
        late_commit(seed).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
    }
}

#[test]
fn a_lower_epoch_that_is_taken_is_found() {
    mutants::set(Some(Mutant::LowerEpochTaken));
    let found = (0..SEEDS).find_map(|seed| Some((seed, late_commit(seed).err()?)));
    mutants::set(None);
    let (seed, what) = found.expect("found");
    println!("LowerEpochTaken: seed {seed} of {SEEDS} of a plot: {what}");
}
