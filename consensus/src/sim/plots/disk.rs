use super::{ms, with_cluster};
use crate::sim::world::World;
use crate::{Command, Durability};

fn set(db: &str) -> Command {
    Command::SetDurability {
        db: Some(db.to_owned()),
        value: Some(Durability::Quorum),
    }
}

#[test]
fn a_leader_whose_disk_is_full_loses_its_lease_and_comes_back_when_there_is_space() {
    with_cluster(3, 1, |world| async move {
        world.disk(1).set_full(true);
        let proposal = world.call(1, |c| async move { c.propose(set("a")).await });
        let leader = world.leader_except(&[1]).await;
        assert!(!proposal.is_finished());
        let trouble = world.view(1).trouble.unwrap();
        assert!(trouble.contains("write /raft/log: "), "{trouble}");
        world.disk(1).set_full(false);
        let well =
            |w: &World| w.view(1).trouble.is_none() && w.view(1).epoch == w.view(leader).epoch;
        assert!(world.until(ms(1000), well).await);
        // It was told to others before the disk refused it, so it may be committed, or may not be.
        proposal.await.unwrap().unwrap_or_else(|e| println!("{e}"));
        let leader = world.leader().await;
        world
            .on(leader, |c| async move { c.propose(set("b")).await })
            .await
            .unwrap();
        let has_all = |w: &World| w.view(1).state.databases.contains_key("b");
        assert!(world.until(ms(1000), has_all).await);
    });
}

#[test]
fn a_follower_whose_disk_is_full_is_missed_by_nobody() {
    with_cluster(3, 2, |world| async move {
        let epoch = world.lease(1).unwrap().epoch;
        world.disk(3).set_full(true);
        world
            .on(1, |c| async move { c.propose(set("a")).await })
            .await
            .unwrap();
        world.sleep(ms(3000)).await;
        assert_eq!(world.lease(1).unwrap().epoch, epoch);
        assert!(world.view(3).trouble.is_some());
        assert!(
            !world.view(3).state.databases.contains_key("a"),
            "not acknowledged"
        );
        world.disk(3).set_full(false);
        let has_all = |w: &World| w.view(3).state.databases.contains_key("a");
        assert!(world.until(ms(1000), has_all).await);
    });
}

/// A process that dies at any write comes back with all it acknowledged.
#[test]
fn a_process_may_die_at_any_write() {
    let mut deaths = 0;
    for seed in 0..150 {
        deaths += with_cluster(3, seed, |mut world| async move {
            for id in 1..=3 {
                world.disk(id).set_faults(0, 6);
            }
            let mut done = Vec::new();
            let mut deaths = 0;
            for i in 0..6 {
                let (leader, db) = (world.holders().first().map(|h| h.0), format!("d{i}"));
                if let Some(leader) = leader {
                    let command = set(&db);
                    let call =
                        world.call(leader, |c| async move { c.propose(command).await.is_ok() });
                    if let Ok(Ok(true)) = tokio::time::timeout(ms(300), call).await {
                        done.push(db);
                    }
                }
                world.sleep(ms(400)).await;
                for id in 1..=3 {
                    if !world.is_up(id) {
                        deaths += 1;
                        world.kill(id);
                        world.start(id).await.unwrap();
                    }
                }
            }
            for id in 1..=3 {
                world.disk(id).set_faults(0, 0);
                if world.node(id).is_none() {
                    world.kill(id);
                    world.start(id).await.unwrap();
                }
            }
            let leader = world.leader().await;
            let state = world.view(leader).state;
            for db in &done {
                assert!(
                    state.databases.contains_key(db),
                    "seed {seed}: {db} is lost"
                );
            }
            deaths
        });
    }
    println!("{deaths} deaths in writes");
    assert!(deaths > 100);
}
