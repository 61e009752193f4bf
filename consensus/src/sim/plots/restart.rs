use openraft::impls::leader_id_std;
use openraft::raft::VoteRequest;
use openraft::vote::RaftLeaderId;

use super::{ms, with_cluster, with_mutant};
use crate::raft::{LogId, TypeConfig, Vote};
use crate::sim::mutants::Mutant;
use crate::sim::world::{World, member};
use crate::storage::Identity;
use crate::wire::{self, Answer, Refusal, Request, Rpc};

/// Asks node 3 whether it would elect node 2 in a far epoch.
async fn ask(world: &World) -> Result<Answer, Refusal> {
    ask_for(world, 2, Rpc::PreVote).await
}

/// Asks node 3 for its vote in a far epoch, or whether it would give it.
async fn ask_for(
    world: &World,
    candidate: u64,
    rpc: fn(VoteRequest<TypeConfig>) -> Rpc,
) -> Result<Answer, Refusal> {
    let leader = leader_id_std::LeaderId::new(1, 1).to_committed();
    let last = Some(LogId::new(leader, 1000));
    let identity = Identity {
        node_id: candidate,
        cluster_id: "c1".into(),
    };
    let rpc = rpc(VoteRequest::new(Vote::new(99, candidate), last));
    let request = wire::encode_request(&Request::new(&identity, 3, true, 0, rpc)).unwrap();
    let answer = world
        .on(3, |c| async move { c.handle(request).await })
        .await;
    wire::decode_response(&answer)
}

fn is_granted(answer: &Result<Answer, Refusal>) -> bool {
    matches!(answer, Ok(Answer::Vote(vote)) if vote.vote_granted)
}

/// Returns whether a voter that was just started votes.
fn votes_after_restart() -> bool {
    with_cluster(3, 1, |mut world| async move {
        world.kill(3);
        world.kill(1);
        world.net.part(&[3], &[2]);
        world.sleep(ms(5)).await; // what was on its way has arrived
        world.start(3).await.unwrap();
        world.sleep(ms(1)).await;
        let early = ask(&world).await;
        if let Err(refusal) = &early {
            assert_eq!(*refusal, Refusal::Bound { node_id: 3 });
        }
        world.sleep(world.timing.election_max - ms(2)).await;
        let late = ask(&world).await;
        assert_eq!(is_granted(&early), is_granted(&late));
        world.sleep(ms(3)).await;
        let after = ask(&world).await;
        assert!(is_granted(&after), "the promise has ended: {after:?}");
        is_granted(&early)
    })
}

#[test]
fn a_voter_that_restarts_keeps_the_promise_it_may_have_made() {
    assert!(!votes_after_restart());
    assert!(with_mutant(Mutant::NoRestartWait, votes_after_restart));
}

/// Returns whether a voter that loses power between two requests votes twice in an epoch.
fn votes_twice(seed: u64) -> bool {
    with_cluster(3, seed, |mut world| async move {
        world.kill(1);
        world.net.part(&[3], &[2]);
        world.sleep(world.timing.election_max + ms(5)).await;
        assert!(is_granted(&ask_for(&world, 2, Rpc::Vote).await));
        world.kill(3);
        world.start(3).await.unwrap();
        world.sleep(world.timing.election_max + ms(1)).await;
        let again = ask_for(&world, 2, Rpc::Vote).await;
        assert!(is_granted(&again), "the same one may have it again");
        is_granted(&ask_for(&world, 1, Rpc::Vote).await)
    })
}

/// As above, but the other one asks first after the power cut.
fn votes_for_another(seed: u64) -> bool {
    with_cluster(3, seed, |mut world| async move {
        world.kill(1);
        world.net.part(&[3], &[2]);
        world.sleep(world.timing.election_max + ms(5)).await;
        assert!(is_granted(&ask_for(&world, 2, Rpc::Vote).await));
        world.kill(3);
        world.start(3).await.unwrap();
        world.sleep(world.timing.election_max + ms(1)).await;
        is_granted(&ask_for(&world, 1, Rpc::Vote).await)
    })
}

#[test]
fn a_vote_survives_a_power_cut() {
    assert!(!(0..10).any(votes_twice) && !(0..10).any(votes_for_another));
    let found = || (0..10).any(votes_for_another);
    assert!(with_mutant(Mutant::VoteNotSynced, found));
}

#[test]
fn it_does_not_campaign_either() {
    with_cluster(3, 2, |mut world| async move {
        world.kill(3);
        world.kill(1);
        world.start(3).await.unwrap();
        let begin = world.elapsed();
        let error = world
            .on(3, |c| async move { c.elect().await })
            .await
            .unwrap_err();
        assert!(error.to_string().contains("just started"), "{error}");
        world.leader_except(&[1]).await;
        assert!(world.elapsed() - begin >= world.timing.election_max);
    });
}

#[test]
fn when_all_restart_a_leader_is_there_after_one_promise() {
    let mut worst = ms(0);
    for seed in 0..50 {
        let took = with_cluster(3, seed, |mut world| async move {
            let epoch = world.view(1).epoch;
            (1..=3).for_each(|id| world.kill(id));
            for id in 1..=3 {
                world.start(id).await.unwrap();
            }
            let begin = world.elapsed();
            let leader = world.leader().await;
            assert!(world.lease(leader).unwrap().epoch > epoch);
            assert_eq!(world.view(leader).state.cluster_id, "c1");
            world.elapsed() - begin
        });
        worst = worst.max(took);
    }
    println!("restart of all, 50 times: at worst {worst:?}");
    assert!(worst < ms(2500));
}

#[test]
fn a_cluster_of_one_leads_at_once_in_a_new_epoch() {
    with_cluster(1, 3, |mut world| async move {
        let epoch = world.lease(1).unwrap().epoch;
        world.kill(1);
        world.start(1).await.unwrap();
        assert!(world.until(ms(100), |w| w.lease(1).is_some()).await);
        assert!(world.lease(1).unwrap().epoch > epoch);
        // A new node joins it, and has to be heard of from then on.
        world.start(2).await.unwrap();
        world
            .on(1, |c| async move { c.add_voter(2, member(2), None).await })
            .await
            .unwrap();
        world.sleep(ms(1000)).await;
        assert!(world.lease(1).is_some());
        world.kill(2);
        assert!(world.until(ms(600), |w| w.lease(1).is_none()).await);
    });
}

#[test]
fn snapshots_carry_the_state_to_new_nodes_and_over_restarts() {
    with_cluster(1, 4, |mut world| async move {
        for i in 0..700 {
            let command = crate::Command::SetDurability {
                db: Some(format!("d{}", i % 10)),
                value: Some(crate::Durability::Bounded {
                    ms: i,
                    transactions: 1,
                }),
            };
            world
                .on(1, |c| async move { c.propose(command).await })
                .await
                .unwrap();
        }
        let entries = world.disk(1).file("log").unwrap();
        assert!(entries.len() < 100_000, "purged: {}", entries.len());
        assert!(world.disk(1).file("snapshot").is_some());
        world.start(2).await.unwrap();
        world
            .on(1, |c| async move { c.add_voter(2, member(2), None).await })
            .await
            .unwrap();
        let same = |w: &World| w.view(2).state == w.view(1).state;
        assert!(world.until(ms(1000), same).await);
        let state = world.view(1).state;
        assert_eq!(state.databases.len(), 10);
        world.kill(1);
        world.kill(2);
        world.start(2).await.unwrap();
        world.start(1).await.unwrap();
        world.leader().await;
        assert_eq!(world.view(1).state, state);
    });
}
