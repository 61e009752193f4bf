use bytes::Bytes;
use openraft::raft::VoteRequest;

use super::{ms, with_cluster};
use crate::error::Error;
use crate::raft::Vote;
use crate::sim::world::World;
use crate::storage::Identity;
use crate::wire::{self, Refusal, Request, Rpc};

fn request(cluster_id: &str, to: u64) -> Bytes {
    request_by_lease(cluster_id, to, 540)
}

fn request_by_lease(cluster_id: &str, to: u64, lease_ms: u64) -> Bytes {
    let identity = Identity {
        node_id: 2,
        cluster_id: cluster_id.into(),
    };
    let rpc = Rpc::Vote(VoteRequest::new(Vote::new(99, 2), None));
    wire::encode_request(&Request::new(&identity, to, true, lease_ms, rpc)).unwrap()
}

async fn refusal(world: &World, request: Bytes) -> Refusal {
    let answer = world
        .on(1, |c| async move { c.handle(request).await })
        .await;
    wire::decode_response(&answer).unwrap_err()
}

#[test]
fn what_is_not_for_this_node_of_this_cluster_changes_nothing() {
    with_cluster(1, 1, |world| async move {
        let before = world.view(1);
        let wrong = refusal(&world, request("other", 1)).await;
        assert!(matches!(wrong, Refusal::WrongCluster { .. }), "{wrong}");
        let wrong = refusal(&world, request("", 1)).await;
        assert!(matches!(wrong, Refusal::WrongCluster { .. }), "{wrong}");
        let wrong = refusal(&world, request("c1", 5)).await;
        assert_eq!(wrong, Refusal::WrongNode { ours: 1, theirs: 5 });
        let later = String::from_utf8(request("c1", 1).to_vec()).unwrap();
        let later = later.replace("\"v\":1", "\"v\":2");
        let wrong = refusal(&world, later.into()).await;
        assert_eq!(wrong, Refusal::Version { ours: 1, theirs: 2 });
        let long = refusal(&world, request_by_lease("c1", 1, 543)).await;
        assert!(
            matches!(
                long,
                Refusal::LeaseTooLong {
                    promise_ms: 570,
                    lease_ms: 543,
                    ..
                }
            ),
            "{long}"
        );
        for garbage in ["", "{}", "[1,2", "{\"v\":1}", "\u{0}\u{1}"] {
            let wrong = refusal(&world, garbage.as_bytes().to_vec().into()).await;
            assert!(matches!(wrong, Refusal::Unreadable { .. }), "{wrong}");
        }
        world.sleep(ms(500)).await;
        assert_eq!(world.view(1), before);
    });
}

#[test]
fn nodes_of_two_clusters_do_not_mix() {
    with_cluster(1, 2, |mut world| async move {
        world.start(2).await.unwrap();
        world
            .on(2, |c| async move { c.initialize("c2".into()).await })
            .await
            .unwrap();
        let add = |c: crate::Cluster| async move {
            c.add_voter(2, crate::sim::world::member(2), None).await
        };
        let error = world.on(1, add).await.unwrap_err();
        assert!(matches!(error, Error::NotCaughtUp { id: 2, .. }), "{error}");
        assert_eq!(world.view(2).state.cluster_id, "c2");
        assert!(world.lease(1).is_some() && world.lease(2).is_some());
    });
}

#[test]
fn a_cluster_is_initialized_once() {
    with_cluster(1, 3, |mut world| async move {
        for id in ["c1", "c2"] {
            let again = world
                .on(1, move |c| async move { c.initialize(id.into()).await })
                .await;
            assert!(
                matches!(again, Err(Error::AlreadyInitialized { .. })),
                "{again:?}"
            );
        }
        // A node that died after it wrote down who it is can go on.
        world.start(2).await.unwrap();
        assert!(!world.cluster(2).is_initialized());
        world
            .on(2, |c| async move { c.initialize("c7".into()).await })
            .await
            .unwrap();
        assert!(world.cluster(2).is_initialized());
        assert_eq!(world.view(2).state.cluster_id, "c7");
    });
}
