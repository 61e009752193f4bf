use super::*;
use crate::replication::frame::decode_frame;

fn pos(txid: u64, sum: u64) -> Pos {
    Pos {
        txid: Txid(txid),
        post_apply_checksum: Checksum::new(sum),
    }
}

fn db(name: &str) -> DbName {
    name.parse().unwrap()
}

/// One message of every kind, in the order of the numbers.
fn one_of_each() -> Vec<Message> {
    let meta = RecordMeta {
        epoch: 3,
        min_txid: Txid(5),
        max_txid: Txid(6),
        pre: Checksum::new(0x11),
        post: Checksum::new(0x22),
        timestamp_ms: 1_700_000_000_000,
        commit: 9,
        page_size: 512,
    };
    vec![
        Message::Hello(Hello {
            cluster_id: Some("LFSC0123456789ABCDEF".to_owned()),
            node_id: 7,
            instance: 8,
            hostname: "ams".to_owned(),
            epoch: 3,
            position_count: 1,
            filter_count: 2,
        }),
        Message::Positions(vec![(db("a/b.db"), pos(4, 1))]),
        Message::Filter(vec!["a/b.db".parse().unwrap(), "t?/**.db".parse().unwrap()]),
        Message::Ack {
            applied: Applied {
                pos: pos(6, 2),
                durable: pos(5, 1),
            },
            done_bytes: 77,
            is_drop: false,
        },
        Message::Nak {
            generation: 2,
            have: pos(4, 1),
        },
        Message::Offer {
            generation: 2,
            checksum_count: Some(2),
            resume: Some((pos(4, 1), Pgno::ONE)),
        },
        Message::Checksums(vec![1, u64::MAX]),
        Message::Stalled {
            why: "disk full".to_owned(),
        },
        Message::Alive,
        Message::Welcome(Welcome {
            cluster_id: "LFSC0123456789ABCDEF".to_owned(),
            node_id: 1,
            hostname: "fra".to_owned(),
            epoch: 4,
        }),
        Message::Refuse {
            why: "wrong cluster".to_owned(),
        },
        Message::Open { db: db("a/b.db") },
        Message::Record(RecordStart {
            generation: 1,
            sender_epoch: 4,
            sync: true,
            meta,
            ltx_len: 6,
            bytes: Bytes::from_static(b"LTX1"),
        }),
        Message::RecordPart {
            generation: 1,
            offset: 4,
            bytes: Bytes::from_static(b"zz"),
        },
        Message::Ask {
            generation: 1,
            why: "behind retention".to_owned(),
        },
        Message::SnapshotBegin {
            generation: 1,
            snapshot: SnapshotStart {
                sender_epoch: 4,
                start: pos(6, 2),
                page_size: 512,
                page_count: 3,
                next: Pgno::ONE,
                is_difference: true,
            },
        },
        Message::Pages(PageBatch {
            generation: 1,
            page_size: PageSize::new(512).unwrap(),
            pages: vec![
                (Pgno::ONE, Bytes::from(vec![1; 512])),
                (Pgno::new(3).unwrap(), Bytes::from(vec![3; 512])),
            ],
        }),
        Message::SnapshotEnd {
            generation: 1,
            end: pos(7, 3),
        },
        Message::Drop {
            generation: 1,
            sender_epoch: 4,
            at: pos(8, 0),
        },
        Message::Unknown,
        Message::Heartbeat {
            now_ms: 1_700_000_000_000,
            is_caught_up: true,
            nak_count: 5,
        },
        Message::Bye {
            why: "shutting down".to_owned(),
        },
        Message::History {
            generation: 1,
            milestones: vec![Milestone {
                pos: pos(6, 2),
                epoch: 4,
            }],
        },
    ]
}

fn encode(message: &Message) -> BytesMut {
    let mut out = WireBuf::default();
    message.encode(1, &mut out);
    BytesMut::from(&out.copy_to_bytes(out.remaining())[..])
}

fn decode(mut bytes: BytesMut) -> Result<Message, FrameError> {
    let frame = decode_frame(&mut bytes)?.expect("a whole frame");
    assert!(bytes.is_empty());
    Message::decode(frame)
}

#[test]
fn round_trip_of_every_kind() {
    let all = one_of_each();
    assert!(all.iter().map(Message::kind).eq(Kind::ALL));
    for message in all {
        assert_eq!(decode(encode(&message)).unwrap(), message);
    }
}

/// testdata/stream/README.md tells how the file was made.
#[test]
fn golden_bytes() {
    let line = |m: &Message| {
        let hex: String = encode(m).iter().map(|b| format!("{b:02x}")).collect();
        format!("{} {hex}\n", m.kind())
    };
    let got: String = one_of_each().iter().map(line).collect();
    if std::env::var_os("LITEFS_BLESS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/stream/v1.txt");
        std::fs::write(path, &got).unwrap();
    }
    let want = include_str!("../../testdata/stream/v1.txt");
    for (got, want) in got.lines().zip(want.lines()) {
        assert_eq!(got, want);
    }
    assert_eq!(got.lines().count(), want.lines().count());
}

/// A payload cut short, with a correct CRC, is an error: nothing is filled in.
#[test]
fn every_truncated_payload_is_an_error() {
    for message in one_of_each() {
        let kind = message.kind();
        let mut whole = encode(&message);
        let frame = decode_frame(&mut whole).unwrap().unwrap();
        for cut in 0..frame.payload.len() {
            let short = Frame {
                payload: frame.payload.slice(..cut),
                ..frame.clone()
            };
            let is_bulk = matches!(kind, Kind::Record | Kind::RecordPart | Kind::Checksums);
            match Message::decode(short) {
                // Bulk is cut freely on purpose; the lengths add up elsewhere.
                Ok(decoded) => assert!(is_bulk && decoded != message, "{kind} cut at {cut}"),
                Err(e) => assert!(e.to_string().contains(&kind.to_string()), "{e}"),
            }
        }
    }
}

#[test]
fn damaged_payloads_never_panic() {
    for message in one_of_each() {
        let frame = decode_frame(&mut encode(&message)).unwrap().unwrap();
        for bit in 0..frame.payload.len() * 8 {
            let mut bad = frame.payload.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            let _ = Message::decode(Frame {
                payload: bad.into(),
                flags: frame.flags ^ 1,
                ..frame.clone()
            });
        }
    }
}

#[test]
fn another_version_is_named() {
    let mut frame = decode_frame(&mut encode(&one_of_each()[0]))
        .unwrap()
        .unwrap();
    let mut bytes = frame.payload.to_vec();
    bytes[0] = 9;
    frame.payload = bytes.into();
    let err = Message::decode(frame).unwrap_err().to_string();
    assert_eq!(err, "Hello frame of protocol version 9, this node speaks 1");
}

#[test]
fn pages_that_compress_are_compressed_and_others_are_left_alone() {
    let mut packer = PagePacker::default();
    let mut batch = PageBatch {
        generation: 1,
        page_size: PageSize::new(4096).unwrap(),
        pages: (1..=16)
            .map(|n| (Pgno::new(n).unwrap(), Bytes::from(vec![0; 4096])))
            .collect(),
    };
    let mut out = WireBuf::default();
    assert!(packer.encode(1, &batch, &mut out) < 4096);
    let bytes = BytesMut::from(&out.copy_to_bytes(out.remaining())[..]);
    assert_eq!(decode(bytes).unwrap(), Message::Pages(batch.clone()));

    let mut x = 1_u64;
    for (_, page) in &mut batch.pages {
        let noise = (0..512).flat_map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x ^ (x >> 33)).to_le_bytes()
        });
        *page = noise.collect::<Vec<_>>().into();
    }
    for _ in 0..20 {
        assert!(packer.encode(1, &batch, &mut out) > 16 * 4096);
        let bytes = BytesMut::from(&out.copy_to_bytes(out.remaining())[..]);
        assert_eq!(decode(bytes).unwrap(), Message::Pages(batch.clone()));
    }
}
