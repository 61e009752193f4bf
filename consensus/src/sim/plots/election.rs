use std::time::Duration;

use super::{ms, with_cluster, with_mutant};
use crate::error::Error;
use crate::member::NodeId;
use crate::sim::mutants::Mutant;
use crate::sim::world::World;

/// Returns the others of three.
fn others(id: NodeId) -> Vec<NodeId> {
    (1..=3).filter(|i| *i != id).collect()
}

#[test]
fn another_leads_when_the_leader_dies_and_it_follows_when_it_comes_back() {
    with_cluster(3, 1, |mut world| async move {
        let epoch = world.lease(1).unwrap().epoch;
        world.kill(1);
        let leader = world.leader_except(&[1]).await;
        let lease = world.lease(leader).unwrap();
        assert!(lease.epoch > epoch);
        world.start(1).await.unwrap();
        let follows = |w: &World| w.view(1).leader.map(|l| l.0) == Some(leader);
        assert!(world.until(ms(1000), follows).await);
        assert_eq!(
            world.lease(leader).unwrap().epoch,
            lease.epoch,
            "undisturbed"
        );
        assert_eq!(world.view(1).state.cluster_id, "c1");
    });
}

/// How long it takes from a death to when another leads and knows it: the defaults aim at 0.8 s.
#[test]
fn a_failover_takes_about_800_ms() {
    let mut times: Vec<Duration> = (0..200)
        .map(|seed| {
            with_cluster(3, seed, |mut world| async move {
                // At any moment between two heartbeats.
                world
                    .sleep(ms(300) + Duration::from_micros(seed * 613))
                    .await;
                world.kill(1);
                let death = world.elapsed();
                world.leader_except(&[1]).await;
                world.elapsed() - death
            })
        })
        .collect();
    times.sort_unstable();
    let (median, p99) = (times[100], times[197]);
    println!(
        "failover, virtual time, 200 times: median {median:?}, 99% {p99:?}, max {:?}",
        times[199]
    );
    assert!((ms(650)..ms(900)).contains(&median) && p99 < ms(2000));
}

#[test]
fn a_minority_does_not_win_and_its_epoch_does_not_grow() {
    with_cluster(3, 2, |mut world| async move {
        world.kill(1);
        world.kill(2);
        let epoch = world.view(3).epoch;
        let led = world.until(ms(5000), |w| !w.holders().is_empty()).await;
        assert!(!led);
        assert_eq!(
            world.view(3).epoch,
            epoch,
            "only asked whether it could win"
        );
    });
}

#[test]
fn a_leader_in_a_minority_ends_before_another_begins() {
    for seed in 0..100 {
        with_cluster(3, seed, |world| async move {
            let old = world.lease(1).unwrap().epoch;
            world.net.part(&[1], &others(1));
            let mut ended = None;
            loop {
                world.sleep(Duration::from_micros(200)).await;
                let lease = world.lease(1);
                assert!(lease.is_none_or(|lease| lease.epoch == old));
                if lease.is_some() {
                    ended = None;
                } else {
                    ended.get_or_insert(world.elapsed());
                }
                let elected = (2..=3).any(|id| world.view(id).epoch > old);
                if elected {
                    break;
                }
                assert!(
                    world.elapsed() < Duration::from_secs(20),
                    "seed {seed}: nobody is elected"
                );
            }
            let ended =
                ended.unwrap_or_else(|| panic!("seed {seed}: lease holds while others vote"));
            let gap = world.elapsed() - ended;
            assert!(gap > ms(100), "seed {seed}: {gap:?}");
            // The election is over; the old leader hears of it when it is reachable again.
            world.net.heal();
            let follows = |w: &World| w.view(1).epoch > old && !w.view(1).is_leader;
            assert!(world.until(ms(5000), follows).await);
        });
    }
}

#[test]
fn a_node_that_was_away_disturbs_nobody() {
    with_cluster(3, 3, |mut world| async move {
        let epoch = world.lease(1).unwrap().epoch;
        world.net.part(&[3], &[1, 2]);
        world.sleep(ms(5000)).await;
        world.net.heal();
        let lost = world
            .until(ms(3000), |w| w.lease(1).is_none_or(|l| l.epoch != epoch))
            .await;
        assert!(!lost, "after a partition");
        world.set_paused(2, true);
        world.sleep(ms(5000)).await;
        world.set_paused(2, false);
        let lost = world
            .until(ms(3000), |w| w.lease(1).is_none_or(|l| l.epoch != epoch))
            .await;
        assert!(!lost, "after a pause");
    });
}

#[test]
fn a_leader_that_was_stopped_has_no_lease_when_it_continues() {
    with_cluster(3, 4, |mut world| async move {
        let old = world.lease(1).unwrap();
        world.set_paused(1, true);
        world.sleep(ms(600)).await;
        assert_eq!(world.lease(1), None, "nothing ran there meanwhile");
        assert!(
            world.view(1).is_leader,
            "though it does not know better yet"
        );
        world.leader_except(&[1]).await;
        world.set_paused(1, false);
        assert_eq!(world.lease(1), None);
        let knows = |w: &World| w.view(1).epoch > old.epoch && !w.view(1).is_leader;
        assert!(world.until(ms(1000), knows).await);
    });
}

/// Returns whether a leader believes its lease when its machine wakes up.
fn lease_after_suspension() -> bool {
    with_cluster(3, 8, |mut world| async move {
        world.suspend(1);
        world.sleep(ms(3000)).await;
        assert_eq!(world.holders().len(), 1, "of the others");
        world.set_paused(1, false);
        world.lease(1).is_some()
    })
}

#[test]
fn a_leader_whose_machine_was_suspended_has_no_lease_when_it_wakes_up() {
    assert!(!lease_after_suspension());
    assert!(with_mutant(
        Mutant::IgnoresSuspension,
        lease_after_suspension
    ));
}

#[test]
fn confirm_asks_a_quorum_and_others_are_told_who_leads() {
    with_cluster(3, 5, |world| async move {
        let epoch = world.lease(1).unwrap().epoch;
        assert_eq!(
            world
                .on(1, |c| async move { c.confirm().await })
                .await
                .unwrap(),
            epoch
        );
        let error = world
            .on(2, |c| async move { c.confirm().await })
            .await
            .unwrap_err();
        assert!(
            matches!(
                &error,
                Error::NotLeader {
                    node_id: 2,
                    leader: Some((1, _))
                }
            ),
            "{error}"
        );
        world.net.part(&[1], &[2, 3]);
        let error = world
            .on(1, |c| async move { c.confirm().await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::NoQuorum), "{error}");
    });
}

#[test]
fn an_election_can_be_asked_for_but_not_within_a_lease() {
    with_cluster(3, 6, |mut world| async move {
        let epoch = world.lease(1).unwrap().epoch;
        world.sleep(ms(1000)).await;
        let error = world
            .on(2, |c| async move { c.elect().await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::ElectionRefused { .. }), "{error}");
        assert_eq!(world.lease(1).unwrap().epoch, epoch);
        world.kill(1);
        world.sleep(world.timing.election_max + ms(1)).await;
        let begin = world.elapsed();
        world
            .on(2, |c| async move { c.elect().await })
            .await
            .unwrap();
        assert!(world.elapsed() - begin < ms(30), "without another timeout");
        assert!(world.view(2).is_leader);
    });
}

#[test]
fn one_way_partitions_do_not_keep_a_leader_without_a_lease() {
    with_cluster(3, 7, |world| async move {
        // The leader is heard, but hears nobody: its heartbeats alone must not keep the others quiet for good.
        world.net.cut(&[2, 3], &[1]);
        assert!(world.until(ms(2000), |w| w.lease(1).is_none()).await);
        world.leader_except(&[1]).await;
    });
}
