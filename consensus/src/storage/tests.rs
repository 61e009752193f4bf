//! The files, cut and damaged at every byte, on disks that fail; and openraft's own suite.

use std::sync::Arc;

use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::vote::RaftLeaderId;
use openraft::{EntryPayload, RaftLogReader, StorageError};

use super::*;
use crate::command::{Command, Proposal};
use crate::disk::RealDisk;
use crate::raft::{Entry, LogId, Vote};
use crate::sim::disk::SimDisk;
use crate::sim::{runtime, world};
use crate::state_machine::StateMachine;

fn log_id(term: u64, index: u64) -> LogId {
    let leader = openraft::impls::leader_id_std::LeaderId::new(term, 1);
    LogId::new(leader.to_committed(), index)
}

fn entry(term: u64, index: u64) -> Entry {
    let proposal = Proposal::new(&Command::SetClusterId(format!("c{index}"))).unwrap();
    Entry {
        log_id: log_id(term, index),
        payload: EntryPayload::Normal(proposal),
    }
}

async fn open(disk: Arc<dyn Disk>, path: &Path) -> Result<(Dir, Found), Error> {
    let (keep, closing) = watch::channel(false);
    std::mem::forget(keep); // a closed channel means a shutdown
    Dir::open(disk, path, 1, closing).await
}

async fn append(log: &mut LogStore, term: u64, indexes: std::ops::Range<u64>) {
    let entries: Vec<_> = indexes.map(|index| entry(term, index)).collect();
    log.append(entries, IOFlushed::noop()).await.unwrap();
}

async fn indexes(log: &mut LogStore) -> Vec<u64> {
    let entries = log.try_get_log_entries(..).await.unwrap();
    entries.iter().map(|entry| entry.log_id.index()).collect()
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, tempfile::TempDir> for Builder {
    async fn build(
        &self,
    ) -> Result<(tempfile::TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let temp = tempfile::tempdir().unwrap();
        let (dir, found) = open(Arc::new(RealDisk), &temp.path().join("raft"))
            .await
            .unwrap();
        let state_machine = StateMachine::new(dir, found.snapshot).unwrap();
        Ok((temp, found.log, state_machine))
    }
}

#[tokio::test]
async fn openraft_is_content_with_the_storage() {
    Suite::test_all(Builder).await.unwrap();
}

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let temp = tempfile::tempdir().unwrap();
    let (_, mut found) = open(Arc::new(RealDisk), temp.path()).await.unwrap();
    let log = &mut found.log;
    log.save_vote(&Vote::new_committed(3, 1)).await.unwrap();
    append(log, 2, 0..6).await;
    log.truncate_after(Some(log_id(2, 3))).await.unwrap();
    append(log, 3, 4..9).await;
    log.save_committed(Some(log_id(3, 5))).await.unwrap();

    let (_, mut found) = open(Arc::new(RealDisk), temp.path()).await.unwrap();
    let log = &mut found.log;
    assert_eq!(
        log.read_vote().await.unwrap(),
        Some(Vote::new_committed(3, 1))
    );
    assert_eq!(indexes(log).await, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(log.try_get_log_entries(4..5).await.unwrap(), [entry(3, 4)]);
    assert_eq!(log.read_committed().await.unwrap(), Some(log_id(3, 5)));
}

#[test]
fn a_log_cut_at_any_byte_keeps_what_is_whole_and_goes_on() {
    world::run(0, |_| async {
        let mut image = LogImage::default();
        let mut bytes = image.encode().unwrap();
        let start_len = bytes.len();
        let mut ends = vec![(start_len, image.clone())];
        for change in [
            log::Change::Vote(Vote::new(1, 1)),
            log::Change::Append(vec![entry(1, 0)]),
            log::Change::Append(vec![entry(1, 1)]),
            log::Change::Committed(Some(log_id(1, 1))),
            log::Change::Truncate(1),
            log::Change::Append(vec![entry(2, 1)]),
        ] {
            image.apply(&change);
            bytes.extend(change.encode(0).unwrap().unwrap());
            ends.push((bytes.len(), image.clone()));
        }
        for cut in start_len..=bytes.len() {
            let (good_len, expected) = ends.iter().rev().find(|(len, _)| *len <= cut).unwrap();
            let (image, len) = LogImage::decode(&bytes[..cut]).unwrap();
            assert_eq!((&image, len), (expected, *good_len as u64), "cut at {cut}");
            // Zeros are what a file system leaves of a write whose length it knew only.
            let mut zeros = bytes[..*good_len].to_vec();
            zeros.resize(cut, 0);
            assert_eq!(LogImage::decode(&zeros).unwrap().1, *good_len as u64);
        }
        for cut in 0..start_len {
            assert!(LogImage::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[i] ^= 1 << bit;
                assert!(LogImage::decode(&bytes).is_err(), "bit {bit} of {i}");
            }
        }
    });
}

#[tokio::test]
async fn a_torn_append_is_cut_off_and_damage_is_refused_with_a_remedy() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("log");
    let (_, mut found) = open(Arc::new(RealDisk), temp.path()).await.unwrap();
    found.log.save_vote(&Vote::new(1, 1)).await.unwrap();
    append(&mut found.log, 1, 0..3).await;

    let whole = std::fs::read(&path).unwrap();
    let torn = log::Change::Append(vec![entry(1, 3)])
        .encode(0)
        .unwrap()
        .unwrap();
    std::fs::write(&path, [&whole, &torn[..torn.len() - 1]].concat()).unwrap();
    let (_, mut found) = open(Arc::new(RealDisk), temp.path()).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), whole);
    append(&mut found.log, 1, 3..4).await;
    let (_, mut found) = open(Arc::new(RealDisk), temp.path()).await.unwrap();
    assert_eq!(indexes(&mut found.log).await, [0, 1, 2, 3]);

    let mut damaged = std::fs::read(&path).unwrap();
    damaged[80] ^= 4;
    std::fs::write(&path, &damaged).unwrap();
    let error = open(Arc::new(RealDisk), temp.path()).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("/log at byte ") && text.contains("start this node under a new id"),
        "{text}"
    );
    assert_eq!(
        std::fs::read(&path).unwrap(),
        damaged,
        "refused, and left as it is"
    );
}

#[tokio::test]
async fn a_file_that_is_gone_is_noticed() {
    for name in ["log", "identity", "snapshot"] {
        let temp = tempfile::tempdir().unwrap();
        let (dir, mut found) = open(Arc::new(RealDisk), temp.path()).await.unwrap();
        found.log.save_vote(&Vote::new(1, 1)).await.unwrap();
        append(&mut found.log, 1, 0..3).await;
        let snapshot = StoredSnapshot {
            meta: SnapshotMeta {
                last_log_id: Some(log_id(1, 1)),
                ..SnapshotMeta::default()
            },
            data: "{}".to_owned(),
        };
        dir.save_snapshot(&snapshot).await.unwrap();
        found.log.purge(log_id(1, 1)).await.unwrap();
        std::fs::remove_file(temp.path().join(name)).unwrap();
        let error = open(Arc::new(RealDisk), temp.path()).await.unwrap_err();
        assert!(
            matches!(&error, Error::Corrupt { path, fault: Fault::Missing, .. } if path.ends_with(name)),
            "{name}: {error}"
        );
    }
}

#[tokio::test]
async fn the_directory_of_another_node_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    open(Arc::new(RealDisk), temp.path()).await.unwrap();
    let (_, closing) = watch::channel(false);
    let error = Dir::open(Arc::new(RealDisk), temp.path(), 2, closing)
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::OtherNode {
                have: 1,
                want: 2,
                ..
            }
        ),
        "{error}"
    );
}

/// After a failure nothing is acknowledged before the whole file was written anew.
#[test]
fn a_failed_write_is_not_acknowledged_until_the_file_is_rewritten() {
    for full in [false, true] {
        world::run(1, |_| async move {
            let disk = SimDisk::new(7);
            let path = Path::new("/raft");
            let (dir, mut found) = open(disk.clone(), path).await.unwrap();
            found.log.save_vote(&Vote::new(1, 1)).await.unwrap();
            append(&mut found.log, 1, 0..2).await;
            let before = disk.file("log").unwrap();

            disk.set_full(full);
            disk.set_faults(u32::from(!full), 0);
            let mut log = found.log.clone();
            let node = runtime::Node::new(1_000_000);
            let mut trouble = dir.trouble();
            let task = node.spawn(async move { append(&mut log, 1, 2..3).await });
            let text = trouble
                .wait_for(Option::is_some)
                .await
                .unwrap()
                .clone()
                .unwrap();
            assert!(text.contains("write /raft/log: "), "{text}");
            tokio::time::sleep(RETRY_AFTER * 20).await;
            assert!(!task.is_finished());

            disk.set_full(false);
            disk.set_faults(0, 0);
            tokio::time::timeout(RETRY_AFTER * 2, task)
                .await
                .unwrap()
                .unwrap();
            assert!(trouble.wait_for(Option::is_none).await.is_ok());
            disk.crash();
            assert!(disk.file("log").unwrap().len() > before.len());
            let (_, mut found) = open(disk, path).await.unwrap();
            assert_eq!(indexes(&mut found.log).await, [0, 1, 2]);
        });
    }
}

#[test]
fn a_shutdown_ends_the_wait_for_a_full_disk() {
    world::run(2, |_| async {
        let disk = SimDisk::new(7);
        let (closing, closed) = watch::channel(false);
        let opened = Dir::open(disk.clone(), Path::new("/raft"), 1, closed).await;
        let (_, mut found) = opened.unwrap();
        disk.set_full(true);
        let task = tokio::spawn(async move { found.log.save_vote(&Vote::new(1, 1)).await });
        closing.send_replace(true);
        let ended = tokio::time::timeout(RETRY_AFTER * 2, task).await;
        let error = ended.unwrap().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    });
}
