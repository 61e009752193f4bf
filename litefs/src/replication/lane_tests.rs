use super::*;
use crate::ltx::{Checksum, Txid};
use crate::replication::RecordMeta;

fn pos(txid: u64) -> Pos {
    Pos {
        txid: Txid(txid),
        post_apply_checksum: Checksum::new(txid),
    }
}

fn record(generation: u32, min: u64, max: u64, len: usize) -> Item {
    Item {
        generation,
        cost: len as u64,
        what: What::Record {
            sender_epoch: 1,
            sync: false,
            record: Record {
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
            },
        },
    }
}

fn item(generation: u32, what: What) -> Item {
    Item {
        generation,
        cost: 0,
        what,
    }
}

fn begin(start: u64) -> What {
    What::CopyBegin(SnapshotStart {
        sender_epoch: 1,
        start: pos(start),
        page_size: 512,
        page_count: 9,
        next: Pgno::ONE,
        is_difference: false,
    })
}

fn pages(numbers: &[u32]) -> What {
    let page = |n: &u32| (Pgno::new(*n).unwrap(), Bytes::from(vec![0; 512]));
    What::Pages {
        page_size: 512,
        pages: numbers.iter().map(page).collect(),
    }
}

fn jobs(decider: &mut Decider, items: Vec<Item>) -> Result<Vec<String>, String> {
    let mut queue = VecDeque::from(items);
    let mut jobs = Vec::new();
    while let Some((job, _, _)) = decider.next_job(&mut queue).map_err(|e| e.to_string())? {
        jobs.push(match job {
            Job::Apply(batch) => format!("apply {}", batch.records.len()),
            Job::CopyRecords(records) => format!("copy {}", records.len()),
            Job::CopyPages(pages) => format!("pages {}", pages.len()),
            Job::CopyBegin(_) => "begin".to_owned(),
            other => format!("{other:?}"),
        });
        if let Some(end) = decider.take_whole_copy() {
            jobs.push(format!("finish {}", end.txid.0));
        }
    }
    Ok(jobs)
}

#[test]
fn records_that_follow_each_other_are_one_batch() {
    let items = vec![
        record(0, 1, 1, 10),
        record(0, 2, 4, 10),
        record(0, 5, 5, 10),
        record(0, 9, 9, 10),
        record(0, 10, 10, 8 << 20),
        record(0, 11, 11, 10),
    ];
    let got = jobs(&mut Decider::default(), items).unwrap();
    assert_eq!(got, ["apply 3", "apply 1", "apply 1", "apply 1"]);
}

#[test]
fn older_generations_are_passed_over_and_newer_ones_refused() {
    let mut decider = Decider {
        generation: 2,
        ..Decider::default()
    };
    let items = vec![
        record(1, 1, 1, 10),
        item(0, What::Unknown),
        record(2, 1, 1, 10),
        record(1, 2, 2, 10),
    ];
    let got = jobs(&mut decider, items).unwrap();
    assert_eq!(got, ["Skip", "Unknown", "apply 1", "Skip"]);
    assert!(jobs(&mut decider, vec![record(3, 1, 1, 10)]).is_err());
}

#[test]
fn a_copy_takes_the_records_up_to_its_end_and_no_more() {
    let items = vec![
        item(0, begin(5)),
        item(0, pages(&[1, 2])),
        item(0, pages(&[3])),
        item(0, What::CopyEnd(pos(7))),
        record(0, 6, 6, 10),
        record(0, 7, 8, 10),
        record(0, 9, 9, 10),
    ];
    let got = jobs(&mut Decider::default(), items).unwrap();
    let want = [
        "begin", "pages 2", "pages 1", "Skip", "copy 2", "finish 8", "apply 1",
    ];
    assert_eq!(got.len(), want.len());
    assert_eq!(got[..5], want[..5]);
    assert_eq!(got[5], "finish 7", "the end that was announced");
    assert_eq!(got[6], "apply 1");
}

#[test]
fn a_copy_without_records_finishes_at_once_and_one_may_be_given_up() {
    let mut decider = Decider::default();
    let items = vec![item(0, begin(5)), item(0, What::CopyEnd(pos(5)))];
    let got = jobs(&mut decider, items).unwrap();
    assert_eq!(got, ["begin", "Skip", "finish 5"]);
    let items = vec![item(0, begin(5)), item(0, pages(&[1])), record(0, 6, 6, 10)];
    let got = jobs(&mut decider, items).unwrap();
    assert_eq!(got, ["begin", "pages 1", "apply 1"]);
    let items = vec![item(0, begin(5)), item(0, What::Ask), item(0, begin(6))];
    let got = jobs(&mut decider, items).unwrap();
    assert_eq!(got, ["begin", "Offer", "begin"]);
}

#[test]
fn frames_that_do_not_belong_are_refused() {
    let copy = || item(0, begin(5));
    for items in [
        vec![item(0, pages(&[1]))],
        vec![item(0, What::CopyEnd(pos(1)))],
        vec![copy(), item(0, What::CopyEnd(pos(9))), item(0, pages(&[1]))],
        vec![
            copy(),
            item(0, What::CopyEnd(pos(9))),
            item(0, What::CopyEnd(pos(9))),
        ],
        vec![copy(), item(0, What::CopyEnd(pos(9))), record(0, 8, 8, 10)],
        vec![
            copy(),
            item(
                0,
                What::Pages {
                    page_size: 1024,
                    pages: vec![(Pgno::ONE, Bytes::from(vec![0; 1024]))],
                },
            ),
        ],
    ] {
        let text = format!("{items:?}");
        let refused = jobs(&mut Decider::default(), items).is_err();
        assert!(refused, "{}", &text[..text.len().min(400)]);
    }
}

#[test]
fn a_mark_counts_once_all_before_it_is_done() {
    let mut progress = Progress::default();
    assert!(progress.mark(1, 0), "nothing is open");
    let (a, b) = (progress.begin(), progress.begin());
    assert!(!progress.mark(2, 0));
    let c = progress.begin();
    assert!(!progress.mark(3, 0));
    assert_eq!(progress.finish(&[b]), None);
    assert_eq!(progress.finish(&[a]), Some(2));
    assert_eq!(progress.finish(&[c]), Some(3));
}

#[test]
fn a_mark_from_before_a_nak_does_not_count() {
    let mut progress = Progress::default();
    let a = progress.begin();
    progress.mark(1, 0);
    progress.note_nak();
    assert_eq!(progress.finish(&[a]), None);
    assert!(!progress.mark(2, 0), "sent before the nak was seen");
    assert!(progress.mark(3, 1));
}

#[test]
fn marks_and_retries_are_bounded() {
    let mut progress = Progress::default();
    let a = progress.begin();
    for ms in 0..1000 {
        progress.mark(ms, 0);
    }
    assert_eq!(progress.marks.len(), MAX_MARKS);
    assert_eq!(progress.finish(&[a]), Some(999));
    assert_eq!(retry_delay(1), FIRST_RETRY);
    assert!((1..10_000).all(|n| retry_delay(n) <= LAST_RETRY));
}

#[test]
fn acks_replace_each_other_and_keep_that_one_was_a_drop() {
    let outbox = Outbox::default();
    let done = AtomicU64::new(5);
    let at = |txid| Applied {
        pos: pos(txid),
        durable: pos(txid),
    };
    outbox.ack(1, &done, true, || at(1));
    outbox.ack(1, &done, false, || at(2));
    assert!(outbox.push(2, Message::Alive));
    let want = Message::Ack {
        applied: at(2),
        done_bytes: 5,
        is_drop: true,
    };
    assert_eq!(outbox.take(), [(2, Message::Alive), (1, want)]);
    assert!(outbox.take().is_empty());
}
