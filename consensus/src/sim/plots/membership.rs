use std::collections::BTreeSet;

use super::{ms, with_cluster, with_mutant};
use crate::error::Error;
use crate::member::NodeId;
use crate::sim::mutants::Mutant;
use crate::sim::world::{World, member};

fn voters(world: &World, id: NodeId) -> Vec<NodeId> {
    world.view(id).voters.into_keys().collect()
}

#[test]
fn members_come_and_go() {
    with_cluster(3, 1, |mut world| async move {
        world.start(4).await.unwrap();
        world
            .on(1, |c| async move { c.add_learner(4, member(4)).await })
            .await
            .unwrap();
        let view = world.view(1);
        assert_eq!(view.learners.into_keys().collect::<Vec<_>>(), [4]);
        world
            .on(1, |c| async move { c.add_voter(4, member(4), None).await })
            .await
            .unwrap();
        assert_eq!(voters(&world, 1), [1, 2, 3, 4]);
        assert!(world.until(ms(500), |w| voters(w, 4) == [1, 2, 3, 4]).await);
        assert_eq!(world.cluster(4).cluster_id(), "c1");

        world
            .on(1, |c| async move { c.remove(2).await })
            .await
            .unwrap();
        world
            .on(1, |c| async move { c.remove(3).await })
            .await
            .unwrap();
        assert_eq!(voters(&world, 1), [1, 4]);
        let view = world.view(1);
        assert!(
            view.is_quorum(&BTreeSet::from([1, 4])) && !view.is_quorum(&BTreeSet::from([1, 2]))
        );
        let error = world
            .on(1, |c| async move { c.remove(3).await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::NotMember { id: 3, .. }), "{error}");
        let error = world
            .on(1, |c| async move { c.remove(1).await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::RemoveLeader { id: 1 }), "{error}");
        // Those who are out campaign no more, or in vain.
        let epoch = world.view(1).epoch;
        world.sleep(ms(4000)).await;
        assert_eq!(world.lease(1).unwrap().epoch, epoch);
        world
            .on(1, |c| async move { c.remove(4).await })
            .await
            .unwrap();
        assert_eq!(voters(&world, 1), [1]);
        world.sleep(ms(2000)).await;
        assert_eq!(world.lease(1).unwrap().epoch, epoch, "alone again");
    });
}

#[test]
fn a_dead_node_is_replaced_and_does_no_harm_when_it_comes_back() {
    with_cluster(3, 2, |mut world| async move {
        world.kill(3);
        world.start(4).await.unwrap();
        world
            .on(
                1,
                |c| async move { c.add_voter(4, member(4), Some(3)).await },
            )
            .await
            .unwrap();
        assert_eq!(voters(&world, 1), [1, 2, 4]);
        let epoch = world.view(1).epoch;
        world.start(3).await.unwrap();
        world.sleep(ms(4000)).await;
        assert_eq!(world.lease(1).unwrap().epoch, epoch);
        assert_eq!(voters(&world, 1), [1, 2, 4]);
    });
}

#[test]
fn what_could_not_be_committed_is_not_begun() {
    with_cluster(2, 3, |mut world| async move {
        let add =
            |id| move |c: crate::Cluster| async move { c.add_voter(id, member(id), None).await };
        let error = world.on(1, add(3)).await.unwrap_err();
        assert!(
            matches!(error, Error::NotCaughtUp { id: 3, .. }),
            "not running: {error}"
        );
        assert_eq!(voters(&world, 1), [1, 2]);

        let mut taken = member(2);
        taken.hostname = "other".into();
        let error = world
            .on(1, |c| async move { c.add_learner(7, taken).await })
            .await
            .unwrap_err();
        assert!(matches!(error, Error::UrlInUse { id: 2, .. }), "{error}");
        let error = world.on(2, add(3)).await.unwrap_err();
        assert!(
            matches!(
                error,
                Error::NotLeader {
                    leader: Some((1, _)),
                    ..
                }
            ),
            "{error}"
        );

        world.kill(2);
        world.start(3).await.unwrap();
        let error = world.on(1, add(3)).await.unwrap_err();
        assert!(matches!(error, Error::NoQuorum), "{error}");
        assert_eq!(voters(&world, 1), [1, 2]);
    });
}

#[test]
fn a_member_is_called_where_it_is_now() {
    with_cluster(3, 4, |world| async move {
        let mut moved = member(2);
        moved.url = "sim://elsewhere".into();
        let update = moved.clone();
        world
            .on(1, |c| async move { c.update_member(2, update).await })
            .await
            .unwrap();
        assert_eq!(world.view(1).voters[&2], moved);
        let moved = |w: &World| w.net.address(2).as_deref() == Some("sim://elsewhere");
        assert!(world.until(ms(300), moved).await);
        assert!(
            world
                .until(ms(300), |w| w.view(3).voters[&2].url == "sim://elsewhere")
                .await
        );
        world.sleep(ms(1000)).await;
        assert!(world.lease(1).is_some());
    });
}

/// Returns whether node 2 is elected after node 1 died and node 3 lost its disk.
fn emptied_disk_elects() -> bool {
    with_cluster(3, 5, |mut world| async move {
        world.kill(3);
        world.disk(3).wipe();
        world.start(3).await.unwrap();
        world.sleep(ms(2000)).await;
        assert!(
            !world.cluster(3).is_initialized(),
            "it gets no log under its old id"
        );
        assert!(world.lease(1).is_some());
        world.kill(1);
        let epoch = world.view(2).epoch;
        let is_elected = |w: &World| w.view(2).epoch > epoch;
        world.until(ms(5000), is_elected).await
    })
}

#[test]
fn an_emptied_disk_does_not_outvote_data() {
    assert!(!emptied_disk_elects());
    assert!(
        with_mutant(Mutant::EmptyVotes, emptied_disk_elects),
        "it is the rule that helps"
    );
}

/// Returns whether a lone leader has a lease long after it began to add a voter it has not heard of yet.
fn lease_while_growing() -> bool {
    with_cluster(1, 6, |world| async move {
        world.sleep(ms(2000)).await;
        assert!(world.lease(1).is_some());
        world.cluster(1).inner.leases.begin_change();
        world.lease(1).is_some()
    })
}

#[test]
fn a_leader_does_not_count_on_being_alone_while_members_change() {
    assert!(!lease_while_growing());
    assert!(with_mutant(Mutant::AloneWhileGrowing, lease_while_growing));
}
