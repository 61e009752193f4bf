use super::*;
use crate::ltx::{Checksum, Txid};
use crate::replication::RecordMeta;

const KIB: usize = 1 << 10;

fn pos(txid: u64) -> Pos {
    Pos {
        txid: Txid(txid),
        post_apply_checksum: Checksum::new(txid),
    }
}

fn db(name: &str) -> DbName {
    name.parse().unwrap()
}

fn record(min: u64, max: u64, len: usize) -> Record {
    Record {
        meta: RecordMeta {
            epoch: 1,
            min_txid: Txid(min),
            max_txid: Txid(max),
            pre: Checksum::new(min - 1),
            post: Checksum::new(max),
            timestamp_ms: 0,
            commit: 1,
            page_size: 512,
        },
        ltx: Bytes::from(vec![0; len]),
    }
}

fn limits() -> Limits {
    Limits {
        turn_bytes: 4 * KIB,
        db_window: 16 * KIB as u64,
        max_copies: 1,
        ..Limits::default()
    }
}

/// A session whose databases are all at transaction 1, and whose `Open` frames are taken.
fn session(names: &[&str]) -> SendSession {
    let positions = names.iter().map(|n| (db(n), pos(1))).collect();
    let mut session = SendSession::new(limits(), 3, DatabaseFilter::default(), positions).unwrap();
    let opened = session.take_frames();
    assert_eq!(opened.len(), names.len());
    session
}

fn fetch_of(session: &mut SendSession) -> (u16, Pos) {
    match session.next_turn(Instant::now()) {
        Some(Turn::Fetch { stream, after, .. }) => (stream, after),
        other => panic!("{other:?}"),
    }
}

fn settle(session: &mut SendSession) {
    while let Some(turn) = session.next_turn(Instant::now()) {
        match turn {
            Turn::Fetch { stream, .. } => session.fetched(stream, Fetch::UpToDate, false),
            other => panic!("{other:?}"),
        }
    }
    assert!(session.is_caught_up());
}

fn kinds(session: &mut SendSession) -> Vec<(u16, Kind)> {
    let frames = session.take_frames();
    frames.iter().map(|(s, m)| (*s, m.kind())).collect()
}

fn ack(session: &mut SendSession, stream: u16, txid: u64, done: u64) {
    let applied = Applied {
        pos: pos(txid),
        durable: pos(txid),
    };
    session.ack(stream, applied, done, false).unwrap();
}

#[test]
fn what_was_read_goes_out_before_the_next_database_is_read() {
    let mut s = session(&["a", "b"]);
    assert!(!s.is_caught_up());
    assert_eq!(fetch_of(&mut s), (1, pos(1)));
    s.fetched(
        1,
        Fetch::Records(vec![record(2, 2, 10), record(3, 3, 10)]),
        true,
    );
    assert!(matches!(s.next_turn(Instant::now()), Some(Turn::Send)));
    let frames = s.take_frames();
    let Message::Record(first) = &frames[0].1 else {
        panic!()
    };
    assert!(first.sync && first.sender_epoch == 3 && frames.len() == 2);
    assert_eq!(fetch_of(&mut s), (2, pos(1)));
    s.fetched(2, Fetch::UpToDate, false);
    assert_eq!(fetch_of(&mut s), (1, pos(3)));
    s.fetched(1, Fetch::UpToDate, false);
    assert!(s.next_turn(Instant::now()).is_none() && s.is_caught_up());
    assert_eq!(s.in_flight(), 20);
}

#[test]
fn a_change_during_a_fetch_is_not_lost() {
    let mut s = session(&["a"]);
    fetch_of(&mut s);
    s.changed(&db("a")).unwrap();
    s.fetched(1, Fetch::UpToDate, false);
    assert!(!s.is_caught_up());
    assert_eq!(fetch_of(&mut s), (1, pos(1)));
}

#[test]
fn a_large_record_takes_turns_with_others() {
    let mut s = session(&["a", "b"]);
    fetch_of(&mut s);
    s.fetched(1, Fetch::Records(vec![record(2, 2, 10 * KIB)]), false);
    s.next_turn(Instant::now());
    assert_eq!(kinds(&mut s), [(1, Kind::Record)]);
    assert_eq!(fetch_of(&mut s), (2, pos(1)));
    s.fetched(2, Fetch::Records(vec![record(2, 2, 10)]), false);
    let mut order = Vec::new();
    for _ in 0..4 {
        s.next_turn(Instant::now());
        order.extend(kinds(&mut s));
    }
    let parts = [
        (2, Kind::Record),
        (1, Kind::RecordPart),
        (1, Kind::RecordPart),
    ];
    assert_eq!(order, parts);
    assert_eq!(s.in_flight(), 10 * KIB as u64 + 10);
}

#[test]
fn a_full_window_blocks_only_its_database_and_acks_open_it() {
    let mut s = session(&["a", "b"]);
    fetch_of(&mut s);
    let records = (2..=40).map(|n| record(n, n, KIB)).collect();
    s.fetched(1, Fetch::Records(records), false);
    for _ in 0..100 {
        match s.next_turn(Instant::now()) {
            Some(Turn::Fetch { stream: 2, .. }) => s.fetched(2, Fetch::UpToDate, false),
            Some(Turn::Send) => {}
            other => {
                assert!(other.is_none(), "{other:?}");
                break;
            }
        }
    }
    let sent = s.in_flight();
    assert!(sent > 12 * KIB as u64 && sent <= 16 * KIB as u64, "{sent}");
    s.changed(&db("b")).unwrap();
    assert_eq!(fetch_of(&mut s).0, 2, "the other goes on");
    s.fetched(2, Fetch::UpToDate, false);
    s.take_frames();
    ack(&mut s, 1, 9, 8 * KIB as u64);
    assert!(matches!(s.next_turn(Instant::now()), Some(Turn::Send)));
    assert_eq!(kinds(&mut s).len(), 4);
}

#[test]
fn one_record_above_the_window_at_a_time() {
    let mut s = session(&["a", "b"]);
    for stream in [1, 2] {
        fetch_of(&mut s);
        s.fetched(stream, Fetch::Records(vec![record(2, 2, 40 * KIB)]), false);
        s.next_turn(Instant::now());
    }
    while let Some(turn) = s.next_turn(Instant::now()) {
        if let Turn::Fetch { stream, .. } = turn {
            s.fetched(stream, Fetch::UpToDate, false);
        }
    }
    assert!(kinds(&mut s).iter().all(|(stream, _)| *stream == 1));
    assert_eq!(s.in_flight(), 40 * KIB as u64, "finished beyond the window");
    ack(&mut s, 1, 2, 40 * KIB as u64);
    while let Some(turn) = s.next_turn(Instant::now()) {
        if let Turn::Fetch { stream, .. } = turn {
            s.fetched(stream, Fetch::UpToDate, false);
        }
    }
    assert_eq!(s.in_flight(), 40 * KIB as u64);
    assert!(kinds(&mut s).iter().all(|(stream, _)| *stream == 2));
}

#[test]
fn a_nak_starts_again_and_the_same_nak_twice_copies_pages() {
    let mut s = session(&["a"]);
    fetch_of(&mut s);
    s.fetched(1, Fetch::Records(vec![record(2, 2, 10)]), false);
    s.next_turn(Instant::now());
    s.nak(1, 1, pos(0)).unwrap();
    assert_eq!(fetch_of(&mut s), (1, pos(0)));
    s.fetched(1, Fetch::Records(vec![record(1, 2, 10)]), false);
    s.next_turn(Instant::now());
    s.take_frames();
    s.nak(1, 2, pos(0)).unwrap();
    let frames = s.take_frames();
    assert!(matches!(
        &frames[..],
        [(1, Message::Ask { generation: 2, .. })]
    ));
    assert!(s.next_turn(Instant::now()).is_none());
    assert_eq!(s.nak_count(), 2);
}

#[test]
fn a_nak_after_progress_is_a_new_one() {
    let mut s = session(&["a"]);
    settle(&mut s);
    s.nak(1, 1, pos(5)).unwrap();
    settle(&mut s);
    ack(&mut s, 1, 6, 0);
    s.nak(1, 2, pos(5)).unwrap();
    assert_eq!(fetch_of(&mut s), (1, pos(5)));
}

#[test]
fn what_a_replica_cannot_have_done_is_refused() {
    let mut s = session(&["a"]);
    assert!(s.ack(0, Applied::default(), 0, false).is_err());
    assert!(s.ack(2, Applied::default(), 0, false).is_err());
    assert!(s.ack(1, Applied::default(), 1, false).is_err());
    assert!(s.nak(1, 0, pos(1)).is_err());
    assert!(s.nak(1, 2, pos(1)).is_err());
    assert!(s.offer(1, 0, None, None).is_err());
    assert!(s.checksums(7, &[]).is_err());
}

#[test]
fn a_log_that_does_not_lead_on_becomes_a_copy() {
    for records in [
        vec![],
        vec![record(3, 3, 10)],
        vec![record(1, 1, 10)],
        vec![record(2, 2, 10), record(4, 4, 10)],
        vec![record(2, 2, 0)],
        vec![Record {
            meta: RecordMeta {
                pre: Checksum::new(77),
                ..record(2, 2, 10).meta
            },
            ..record(2, 2, 10)
        }],
    ] {
        let mut s = session(&["a"]);
        fetch_of(&mut s);
        s.fetched(1, Fetch::Records(records.clone()), false);
        assert_eq!(kinds(&mut s), [(1, Kind::Ask)], "{records:?}");
    }
    let mut s = session(&["a"]);
    fetch_of(&mut s);
    s.fetched(1, Fetch::Records(vec![record(1, 3, 10)]), false);
    s.next_turn(Instant::now());
    assert_eq!(kinds(&mut s), [(1, Kind::Record)], "an overlap leads on");
}

/// Drives database 1 from "behind retention" to the end of its pages at `end`, from `start`.
fn copy(s: &mut SendSession, start: u64, end: u64) {
    assert!(matches!(fetch_of(s), (1, _)));
    let why = "behind".to_owned();
    s.fetched(1, Fetch::NeedSnapshot { why }, false);
    assert_eq!(kinds(s), [(1, Kind::Ask)]);
    s.offer(1, 0, Some(2), Some((pos(start), Pgno::ONE)))
        .unwrap();
    assert!(
        s.next_turn(Instant::now()).is_none(),
        "checksums are missing"
    );
    s.checksums(1, &[7]).unwrap();
    s.checksums(1, &[8]).unwrap();
    let Some(Turn::OpenCopy { request, .. }) = s.next_turn(Instant::now()) else {
        panic!()
    };
    assert_eq!(request.have, Some(vec![7, 8]));
    s.copy_opened(1, pos(start), 512, 2, Pgno::ONE, true);
    let page_size = PageSize::new(512).unwrap();
    for n in 1..=2 {
        assert!(matches!(
            s.next_turn(Instant::now()),
            Some(Turn::ReadPages { stream: 1, .. })
        ));
        let page = Bytes::from(vec![0; 512]);
        s.pages(1, page_size, vec![(Pgno::new(n).unwrap(), page)]);
    }
    assert!(matches!(
        s.next_turn(Instant::now()),
        Some(Turn::ReadPages { .. })
    ));
    s.copy_finished(1, pos(end));
    let want = [
        Kind::SnapshotBegin,
        Kind::Pages,
        Kind::Pages,
        Kind::SnapshotEnd,
    ];
    assert_eq!(kinds(s), want.map(|kind| (1, kind)));
}

#[test]
fn a_copy_ends_with_the_records_up_to_its_end() {
    let mut s = session(&["a"]);
    copy(&mut s, 5, 7);
    assert!(s.take_closed_copies().is_empty(), "the start stays pinned");
    assert_eq!(fetch_of(&mut s), (1, pos(5)));
    s.fetched(
        1,
        Fetch::Records(vec![record(6, 6, 10), record(7, 8, 10)]),
        false,
    );
    s.next_turn(Instant::now());
    assert_eq!(s.take_closed_copies(), [1]);
    assert_eq!(fetch_of(&mut s), (1, pos(8)));
    s.fetched(1, Fetch::UpToDate, false);
    assert!(s.is_caught_up());
}

#[test]
fn a_copy_without_commits_meanwhile_is_done_at_once() {
    let mut s = session(&["a"]);
    copy(&mut s, 5, 5);
    assert_eq!(s.take_closed_copies(), [1]);
    settle(&mut s);
}

#[test]
fn a_copy_whose_records_are_lost_is_asked_for_again() {
    for lost in [
        Fetch::UpToDate,
        Fetch::Unknown,
        Fetch::NeedSnapshot { why: String::new() },
    ] {
        let mut s = session(&["a"]);
        copy(&mut s, 5, 7);
        fetch_of(&mut s);
        s.fetched(1, lost, false);
        assert_eq!(kinds(&mut s), [(1, Kind::Ask)]);
        assert_eq!(s.take_closed_copies(), [1]);
    }
}

#[test]
fn copies_wait_for_a_slot() {
    let mut s = session(&["a", "b"]);
    for stream in [1, 2] {
        fetch_of(&mut s);
        let why = "behind".to_owned();
        s.fetched(stream, Fetch::NeedSnapshot { why }, false);
    }
    assert_eq!(kinds(&mut s), [(1, Kind::Ask)], "one slot");
    s.nak(1, 1, pos(1)).unwrap();
    assert_eq!(kinds(&mut s), [(2, Kind::Ask)]);
}

#[test]
fn a_store_that_fails_is_left_alone_for_a_while() {
    let mut s = session(&["a", "b"]);
    let now = Instant::now();
    assert_eq!(fetch_of(&mut s).0, 1);
    s.failed(1, now);
    s.changed(&db("a")).unwrap();
    assert_eq!(fetch_of(&mut s).0, 2);
    s.fetched(2, Fetch::UpToDate, false);
    assert!(s.next_turn(now).is_none() && !s.is_caught_up());
    let later = s.deadline().unwrap();
    assert_eq!(later, now + limits().retry_after);
    assert!(matches!(
        s.next_turn(later),
        Some(Turn::Fetch { stream: 1, .. })
    ));
    assert_eq!(s.deadline(), None);
}

#[test]
fn a_drop_waits_for_its_ack_before_anything_else() {
    let mut s = session(&["a"]);
    fetch_of(&mut s);
    s.fetched(1, Fetch::Dropped { at: pos(4) }, false);
    assert_eq!(kinds(&mut s), [(1, Kind::Drop)]);
    s.changed(&db("a")).unwrap();
    ack(&mut s, 1, 1, 0);
    assert!(s.next_turn(Instant::now()).is_none());
    s.ack(1, Applied::default(), 0, true).unwrap();
    assert_eq!(fetch_of(&mut s), (1, Pos::ZERO));
    s.fetched(1, Fetch::Dropped { at: pos(4) }, false);
    assert!(
        kinds(&mut s).is_empty() && s.is_caught_up(),
        "nothing left to drop"
    );
}

#[test]
fn unknown_databases_are_named_once_and_filters_hold() {
    let mut s = session(&["a"]);
    fetch_of(&mut s);
    s.fetched(1, Fetch::Unknown, false);
    assert_eq!(kinds(&mut s), [(1, Kind::Unknown)]);
    assert!(s.is_caught_up());
    s.changed(&db("a")).unwrap();
    assert_eq!(fetch_of(&mut s), (1, pos(1)));

    let filter = DatabaseFilter::new(vec!["b*".parse().unwrap()]);
    let positions = vec![(db("a"), pos(1))];
    let mut s = SendSession::new(limits(), 3, filter, positions).unwrap();
    s.changed(&db("c")).unwrap();
    assert!(s.take_frames().is_empty());
    s.changed(&db("b")).unwrap();
    assert_eq!(kinds(&mut s), [(1, Kind::Open)]);
    assert_eq!(s.name(1), Some(&db("b")));
    assert_eq!((s.name(0), s.name(2)), (None, None));
}

#[test]
fn stream_ids_run_out_with_an_error() {
    let mut s = session(&[]);
    for n in 0..MAX_STREAMS {
        s.changed(&db(&n.to_string())).unwrap();
    }
    assert!(s.changed(&db("one more")).is_err());
}

mod model {
    //! Any order of events keeps what the session promises.

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Changed(usize),
        Turn(u8),
        AckAll(usize),
        Nak(usize, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3_usize).prop_map(Step::Changed),
            any::<u8>().prop_map(Step::Turn),
            any::<u8>().prop_map(Step::Turn),
            (0..3_usize).prop_map(Step::AckAll),
            (0..3_usize, 0..4_u64).prop_map(|(db, at)| Step::Nak(db, at)),
        ]
    }

    /// A primary that has transactions 1 to 9, and a replica that asks for no page checksums.
    fn run_turn(s: &mut SendSession, turn: Turn, luck: u8) {
        match turn {
            Turn::Send => {}
            Turn::Fetch { stream, .. } if luck == 0 => s.failed(stream, Instant::now()),
            Turn::Fetch { stream, .. } if luck == 1 => {
                let why = String::new();
                s.fetched(stream, Fetch::NeedSnapshot { why }, false);
            }
            Turn::Fetch { stream, after, .. } if after.txid.0 >= 9 => {
                s.fetched(stream, Fetch::UpToDate, false);
            }
            Turn::Fetch { stream, after, .. } => {
                let next = after.txid.0 + 1;
                let records = vec![record(next, next, usize::from(luck) * 100 + 1)];
                s.fetched(stream, Fetch::Records(records), false);
            }
            Turn::OpenCopy { stream, .. } => {
                s.copy_opened(stream, pos(8), 512, 1, Pgno::ONE, false)
            }
            Turn::ReadPages { stream, .. } if luck.is_multiple_of(2) => {
                let page = Bytes::from(vec![0; 512]);
                s.pages(stream, PageSize::new(512).unwrap(), vec![(Pgno::ONE, page)]);
            }
            Turn::ReadPages { stream, .. } => s.copy_finished(stream, pos(9)),
        }
    }

    /// What the replica would answer, but for acks.
    fn answer(s: &mut SendSession, sent: &mut [u64; 3]) {
        for (stream, message) in s.take_frames() {
            sent[usize::from(stream) - 1] += message.cost();
            if let Message::Ask { generation, .. } = message {
                s.offer(stream, generation, None, None).unwrap();
            }
        }
    }

    proptest! {
        #[test]
        fn always_ends_caught_up_within_its_window(steps in prop::collection::vec(step(), 0..200)) {
            let mut s = session(&["a", "b", "c"]);
            let names = [db("a"), db("b"), db("c")];
            let mut generations = [0; 3];
            let (mut sent, mut done) = ([0; 3], [0; 3]);
            for step in steps {
                match step {
                    Step::Changed(i) => s.changed(&names[i]).unwrap(),
                    Step::Turn(luck) => {
                        if let Some(turn) = s.next_turn(Instant::now()) {
                            run_turn(&mut s, turn, luck);
                        }
                    }
                    Step::AckAll(i) => {
                        done[i] = sent[i];
                        ack(&mut s, u16::try_from(i).unwrap() + 1, 1, done[i]);
                    }
                    Step::Nak(i, at) => {
                        generations[i] += 1;
                        s.nak(u16::try_from(i).unwrap() + 1, generations[i], pos(at)).unwrap();
                    }
                }
                answer(&mut s, &mut sent);
                let in_flight: u64 = (0..3).map(|i| sent[i] - done[i]).sum();
                prop_assert_eq!(in_flight, s.in_flight());
                for i in 0..3 {
                    // One record of at most 25,501 bytes may begin just below the window.
                    prop_assert!(sent[i] - done[i] < 16 * KIB as u64 + 25_501 + 4 * KIB as u64);
                }
            }
            // Healed: acks come, the store works.
            for _ in 0..2000 {
                let later = Instant::now() + Duration::from_secs(3600);
                if let Some(turn) = s.next_turn(later) {
                    run_turn(&mut s, turn, 3);
                }
                answer(&mut s, &mut sent);
                for i in 0..3 {
                    if sent[i] != done[i] {
                        done[i] = sent[i];
                        ack(&mut s, u16::try_from(i).unwrap() + 1, 1, done[i]);
                    }
                }
                if s.is_caught_up() {
                    break;
                }
            }
            prop_assert!(s.is_caught_up());
            prop_assert_eq!(s.in_flight(), 0);
        }
    }
}
