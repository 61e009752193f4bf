use super::{ms, with_cluster};
use crate::error::Error;
use crate::sim::world::World;

#[test]
fn a_transfer_takes_a_few_milliseconds() {
    for seed in 0..20 {
        with_cluster(3, seed, |world| async move {
            let epoch = world.lease(1).unwrap().epoch;
            let begin = world.elapsed();
            world
                .on(1, |c| async move { c.transfer(3).await })
                .await
                .unwrap();
            let knows = |w: &World| w.view(3).is_leader && w.lease(3).is_some();
            assert!(world.until(ms(100), knows).await);
            let took = world.elapsed() - begin;
            assert!(took < ms(25), "seed {seed}: {took:?}");
            assert!(world.lease(3).unwrap().epoch > epoch);
            assert_eq!(world.lease(1), None);
        });
    }
}

#[test]
fn the_lease_is_gone_when_a_transfer_begins_and_stays_gone_if_it_fails() {
    with_cluster(3, 1, |world| async move {
        let epoch = world.lease(1).unwrap().epoch;
        world.net.part(&[1], &[2, 3]);
        let transfer = world.call(1, |c| async move { c.transfer(2).await });
        let gone = world.until(ms(3), |w| w.lease(1).is_none()).await;
        assert!(gone, "though a quorum acknowledged it a moment ago");
        assert!(!world.view(1).is_leader);
        let error = transfer.await.unwrap().unwrap_err();
        world.net.heal();
        assert!(
            matches!(error, Error::TransferFailed { to: 2, .. }),
            "{error}"
        );
        // The old leader does not step down by itself, and must not keep others from an election.
        let leader = world.leader().await;
        assert!(world.lease(leader).unwrap().epoch > epoch);
    });
}

#[test]
fn who_is_stopped_does_not_take_over_and_another_election_follows() {
    with_cluster(3, 2, |mut world| async move {
        world.set_paused(3, true);
        let result = world.on(1, |c| async move { c.transfer(3).await }).await;
        assert!(
            matches!(result, Err(Error::TransferFailed { .. })),
            "{result:?}"
        );
        let leader = world.leader().await;
        assert_ne!(leader, 3);
        // Whoever leads now can be led by the same means again.
        world.set_paused(3, false);
        world.sleep(ms(1000)).await;
        let leader = world.leader().await;
        world
            .on(leader, |c| async move { c.step_down().await })
            .await
            .unwrap();
    });
}

#[test]
fn only_voters_that_are_up_to_date_can_take_over() {
    with_cluster(3, 3, |world| async move {
        let error = world
            .on(1, |c| async move { c.transfer(9).await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::NotMember { id: 9, .. }), "{error}");
        let error = world
            .on(2, |c| async move { c.transfer(3).await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::NotLeader { .. }), "{error}");
        // One that misses entries changes nothing.
        let epoch = world.lease(1).unwrap().epoch;
        world.net.part(&[3], &[1, 2]);
        world
            .on(1, |c| async move {
                c.propose(crate::Command::SetClusterId("x".into())).await
            })
            .await
            .unwrap();
        let error = world
            .on(1, |c| async move { c.transfer(3).await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::NotCaughtUp { id: 3, .. }), "{error}");
        assert_eq!(world.lease(1).unwrap().epoch, epoch);
    });
}

#[test]
fn the_only_voter_cannot_step_down() {
    with_cluster(1, 4, |world| async move {
        let error = world
            .on(1, |c| async move { c.step_down().await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::OnlyVoter), "{error}");
        assert!(world.lease(1).is_some());
    });
}
