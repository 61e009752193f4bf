//! What frames mean: one variant per kind, in the types of the domain.
//!
//! Control payloads are one version byte, then the fields in `wincode` (bincode layout: little-endian, fixed
//! width, 8-byte lengths). Bulk payloads have fixed headers of their own; docs/formats/stream.md has every byte.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use wincode::config::DefaultConfig;
use wincode::{SchemaRead, SchemaWrite};

use super::frame::{Frame, FrameError, Kind, MAX_FRAME_LEN, WireBuf};
use super::{Applied, DbName, DbPattern, Milestone, RecordMeta, SnapshotStart};
use crate::ltx::{Checksum, PageSize, Pgno, Pos, Txid};

/// Version of every control payload, and of the protocol.
pub const VERSION: u8 = 1;
/// Name of the protocol in the `Upgrade` header.
pub const PROTOCOL: &str = "litefs-stream/1";
/// Most databases of one connection: stream ids are 16 bits and 0 is the connection.
pub const MAX_STREAMS: usize = u16::MAX as usize;
/// Longest record, above which the sender copies pages instead.
pub const MAX_RECORD_LEN: u32 = 1 << 30;
/// Most page checksums in an offer (a database of 256 GiB with pages of 4 KiB).
pub const MAX_CHECKSUMS: u32 = 1 << 26;
/// Positions, filter entries: most per frame.
pub const ENTRIES_PER_FRAME: usize = 512;

/// Positions in one `History`: most.
pub const MAX_MILESTONES: usize = 4096;

/// Most page data in one `Pages` frame, uncompressed.
const MAX_PAGES_LEN: usize = MAX_FRAME_LEN / 2;
const RECORD_HEAD_LEN: usize = 72;
const PART_HEAD_LEN: usize = 8;
const PAGES_HEAD_LEN: usize = 12;
const FLAG_LZ4: u8 = 1;
const FLAG_SYNC: u8 = 1;

/// A replica introduces itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Its cluster, unless it has joined none.
    pub cluster_id: Option<String>,
    /// Its identity.
    pub node_id: u64,
    /// Number drawn at each start of the process: two alive with one `node_id` are told apart by it.
    pub instance: u64,
    /// Its host name.
    pub hostname: String,
    /// Highest epoch it has seen.
    pub epoch: u64,
    /// How many positions follow.
    pub position_count: u32,
    /// How many filter entries follow; 0 means all databases.
    pub filter_count: u32,
}

/// The primary accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// The cluster.
    pub cluster_id: String,
    /// Identity of the primary.
    pub node_id: u64,
    /// Host name of the primary.
    pub hostname: String,
    /// Its tenure.
    pub epoch: u64,
}

/// A record, or the first part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordStart {
    /// See [`Message::Nak`].
    pub generation: u32,
    /// Tenure of the sender.
    pub sender_epoch: u64,
    /// The primary waits until this is on disk.
    pub sync: bool,
    /// What the record is.
    pub meta: RecordMeta,
    /// Length of the whole LTX file.
    pub ltx_len: u32,
    /// The file, or the beginning of it.
    pub bytes: Bytes,
}

/// Pages of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBatch {
    /// See [`Message::Nak`].
    pub generation: u32,
    /// Bytes per page.
    pub page_size: PageSize,
    /// Pages, ascending, each of `page_size` bytes.
    pub pages: Vec<(Pgno, Bytes)>,
}

/// Content of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// See [`Hello`].
    Hello(Hello),
    /// Some positions of the replica.
    Positions(Vec<(DbName, Pos)>),
    /// Some patterns of databases that the replica wants.
    Filter(Vec<DbPattern>),
    /// How far a database is.
    Ack {
        /// Where it is.
        applied: Applied,
        /// Sum of [`Message::cost`] of this database's frames done with, since the connection began.
        done_bytes: u64,
        /// Answers `Drop`.
        is_drop: bool,
    },
    /// The records in flight do not fit. Both sides number the attempts of a database: frames of an older
    /// generation are passed over.
    Nak {
        /// The new generation.
        generation: u32,
        /// Where the database is.
        have: Pos,
    },
    /// How the replica would like its copy.
    Offer {
        /// That of the `Ask`.
        generation: u32,
        /// How many page checksums follow, if any.
        checksum_count: Option<u32>,
        /// Where an earlier copy started, and the first page it lacks.
        resume: Option<(Pos, Pgno)>,
    },
    /// Some page checksums.
    Checksums(Vec<u64>),
    /// The database cannot go on here for now; the replica keeps trying by itself.
    Stalled {
        /// Why, for a person.
        why: String,
    },
    /// The replica lives.
    Alive,
    /// See [`Welcome`].
    Welcome(Welcome),
    /// The primary refuses.
    Refuse {
        /// Why, for a person.
        why: String,
    },
    /// The frame's stream id stands for this database from now on.
    Open {
        /// The database.
        db: DbName,
    },
    /// See [`RecordStart`].
    Record(RecordStart),
    /// A later part of a record.
    RecordPart {
        /// See [`Message::Nak`].
        generation: u32,
        /// Where in the file it goes: directly after what came before.
        offset: u32,
        /// Bytes of the file.
        bytes: Bytes,
    },
    /// The log does not lead from the replica's position to ours.
    Ask {
        /// See [`Message::Nak`].
        generation: u32,
        /// Why, for a person.
        why: String,
    },
    /// A page copy begins.
    SnapshotBegin {
        /// See [`Message::Nak`].
        generation: u32,
        /// What it is.
        snapshot: SnapshotStart,
    },
    /// See [`PageBatch`].
    Pages(PageBatch),
    /// All pages sent.
    SnapshotEnd {
        /// See [`Message::Nak`].
        generation: u32,
        /// Where the copy is consistent; records up to it follow.
        end: Pos,
    },
    /// The database was dropped.
    Drop {
        /// See [`Message::Nak`].
        generation: u32,
        /// Tenure of the sender.
        sender_epoch: u64,
        /// Position after the drop.
        at: Pos,
    },
    /// The primary has never heard of the database.
    Unknown,
    /// The primary's clock.
    Heartbeat {
        /// Milliseconds since 1970.
        now_ms: i64,
        /// All the primary had at that moment has been sent before this.
        is_caught_up: bool,
        /// Naks taken from this replica by then: a mark made before the latest one does not count.
        nak_count: u64,
    },
    /// The primary closes the stream.
    Bye {
        /// Why, for a person.
        why: String,
    },
    /// Where the primary's history has been, newest first: what of it the replica knows tells where the two part.
    History {
        /// See [`Message::Nak`].
        generation: u32,
        /// At most [`MAX_MILESTONES`].
        milestones: Vec<Milestone>,
    },
}

type WirePos = (u64, u64);

impl Message {
    /// Appends the message as one frame.
    ///
    /// # Panics
    /// If bulk is longer than a frame: callers split it.
    pub fn encode(&self, stream: u16, out: &mut WireBuf) {
        let no_body = Bytes::new();
        let mut head = BytesMut::with_capacity(RECORD_HEAD_LEN);
        let (flags, body) = match self {
            Message::Record(record) => {
                put_record_head(&mut head, record);
                (if record.sync { FLAG_SYNC } else { 0 }, &record.bytes)
            }
            Message::RecordPart {
                generation,
                offset,
                bytes,
            } => {
                head.put_u32_le(*generation);
                head.put_u32_le(*offset);
                (0, bytes)
            }
            Message::Pages(batch) => (put_pages(&mut head, batch, false), &no_body),
            Message::Checksums(sums) => {
                sums.iter().for_each(|sum| head.put_u64_le(*sum));
                (0, &no_body)
            }
            control => {
                head.put_u8(VERSION);
                head.extend_from_slice(&control.control_body());
                (0, &no_body)
            }
        };
        out.put(self.kind(), flags, stream, &head, body);
    }

    /// Returns the kind of frame that carries the message.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::Positions(_) => Kind::Positions,
            Message::Filter(_) => Kind::Filter,
            Message::Ack { .. } => Kind::Ack,
            Message::Nak { .. } => Kind::Nak,
            Message::Offer { .. } => Kind::Offer,
            Message::Checksums(_) => Kind::Checksums,
            Message::Stalled { .. } => Kind::Stalled,
            Message::Alive => Kind::Alive,
            Message::Welcome(_) => Kind::Welcome,
            Message::Refuse { .. } => Kind::Refuse,
            Message::Open { .. } => Kind::Open,
            Message::Record(_) => Kind::Record,
            Message::RecordPart { .. } => Kind::RecordPart,
            Message::Ask { .. } => Kind::Ask,
            Message::SnapshotBegin { .. } => Kind::SnapshotBegin,
            Message::Pages(_) => Kind::Pages,
            Message::SnapshotEnd { .. } => Kind::SnapshotEnd,
            Message::Drop { .. } => Kind::Drop,
            Message::Unknown => Kind::Unknown,
            Message::Heartbeat { .. } => Kind::Heartbeat,
            Message::Bye { .. } => Kind::Bye,
            Message::History { .. } => Kind::History,
        }
    }

    /// Returns what the message takes of its database's window: the bytes a receiver holds for it.
    #[must_use]
    pub fn cost(&self) -> u64 {
        match self {
            Message::Record(record) => record.bytes.len() as u64,
            Message::RecordPart { bytes, .. } => bytes.len() as u64,
            Message::Pages(batch) => (batch.pages.len() * batch.page_size.len()) as u64,
            _ => 0,
        }
    }

    fn control_body(&self) -> Vec<u8> {
        match self {
            Message::Hello(h) => body(&(
                h.cluster_id.clone(),
                h.node_id,
                h.instance,
                h.hostname.clone(),
                h.epoch,
                h.position_count,
                h.filter_count,
            )),
            Message::Positions(list) => {
                let entry = |(db, pos): &(DbName, Pos)| (db.to_string(), pos_out(*pos));
                body(&list.iter().map(entry).collect::<Vec<_>>())
            }
            Message::Filter(list) => {
                body(&list.iter().map(ToString::to_string).collect::<Vec<_>>())
            }
            Message::Ack {
                applied,
                done_bytes,
                is_drop,
            } => body(&(
                pos_out(applied.pos),
                pos_out(applied.durable),
                *done_bytes,
                *is_drop,
            )),
            Message::Nak { generation, have } => body(&(*generation, pos_out(*have))),
            Message::Offer {
                generation,
                checksum_count,
                resume,
            } => body(&(
                *generation,
                *checksum_count,
                resume.map(|(start, next)| (pos_out(start), next.get())),
            )),
            Message::Welcome(w) => {
                body(&(w.cluster_id.clone(), w.node_id, w.hostname.clone(), w.epoch))
            }
            Message::Stalled { why } | Message::Refuse { why } | Message::Bye { why } => {
                body(&short(why))
            }
            Message::Open { db } => body(&db.to_string()),
            Message::Ask { generation, why } => body(&(*generation, short(why))),
            Message::SnapshotBegin {
                generation,
                snapshot: s,
            } => body(&(
                *generation,
                s.sender_epoch,
                pos_out(s.start),
                s.page_size,
                s.page_count,
                s.next.get(),
                s.is_difference,
            )),
            Message::SnapshotEnd { generation, end } => body(&(*generation, pos_out(*end))),
            Message::Drop {
                generation,
                sender_epoch,
                at,
            } => body(&(*generation, *sender_epoch, pos_out(*at))),
            Message::Heartbeat {
                now_ms,
                is_caught_up,
                nak_count,
            } => body(&(*now_ms, *is_caught_up, *nak_count)),
            Message::History {
                generation,
                milestones,
            } => {
                let entry = |m: &Milestone| (pos_out(m.pos), m.epoch);
                let list: Vec<_> = milestones.iter().map(entry).collect();
                body(&(*generation, list))
            }
            Message::Alive | Message::Unknown => Vec::new(),
            Message::Record(_)
            | Message::RecordPart { .. }
            | Message::Pages(_)
            | Message::Checksums(_) => unreachable!("{} is bulk", self.kind()),
        }
    }

    /// Reads what a frame says.
    ///
    /// # Errors
    /// Names the kind and the field that is wrong.
    pub fn decode(frame: Frame) -> Result<Message, FrameError> {
        let kind = frame.kind;
        if let Kind::Record | Kind::RecordPart | Kind::Pages | Kind::Checksums = kind {
            return decode_bulk(frame).map_err(|why| FrameError::Payload { kind, why });
        }
        let Some((version, fields)) = frame.payload.split_first() else {
            let why = "no version byte".to_owned();
            return Err(FrameError::Payload { kind, why });
        };
        if *version != VERSION {
            return Err(FrameError::Version {
                kind,
                theirs: *version,
                ours: VERSION,
            });
        }
        decode_control(kind, fields).map_err(|why| FrameError::Payload { kind, why })
    }
}

fn decode_control(kind: Kind, b: &[u8]) -> Result<Message, String> {
    Ok(match kind {
        Kind::Hello => {
            let (cluster_id, node_id, instance, hostname, epoch, position_count, filter_count) =
                fields(b)?;
            let streams = MAX_STREAMS as u64;
            if u64::from(position_count) > streams || u64::from(filter_count) > streams {
                return Err(format!(
                    "{position_count} databases, filter of {filter_count}; at most {MAX_STREAMS}"
                ));
            }
            Message::Hello(Hello {
                cluster_id,
                node_id,
                instance,
                hostname,
                epoch,
                position_count,
                filter_count,
            })
        }
        Kind::Positions => {
            let list: Vec<(String, WirePos)> = fields(b)?;
            let entry = |(db, pos): (String, WirePos)| Ok((name_in(&db)?, pos_in(pos)?));
            Message::Positions(list.into_iter().map(entry).collect::<Result<_, String>>()?)
        }
        Kind::Filter => {
            let list: Vec<String> = fields(b)?;
            let patterns = list.iter().map(|p| p.parse::<DbPattern>());
            let patterns = patterns.collect::<Result<_, _>>();
            Message::Filter(patterns.map_err(|e| e.to_string())?)
        }
        Kind::Ack => {
            let (pos, durable, done_bytes, is_drop) = fields::<(WirePos, WirePos, u64, bool)>(b)?;
            Message::Ack {
                applied: Applied {
                    pos: pos_in(pos)?,
                    durable: pos_in(durable)?,
                },
                done_bytes,
                is_drop,
            }
        }
        Kind::Nak => {
            let (generation, have) = fields::<(u32, WirePos)>(b)?;
            let have = pos_in(have)?;
            Message::Nak { generation, have }
        }
        Kind::Offer => decode_offer(b)?,
        Kind::Stalled => Message::Stalled { why: fields(b)? },
        Kind::Alive => fields::<()>(b).map(|()| Message::Alive)?,
        Kind::Welcome => {
            let (cluster_id, node_id, hostname, epoch) = fields(b)?;
            Message::Welcome(Welcome {
                cluster_id,
                node_id,
                hostname,
                epoch,
            })
        }
        Kind::Refuse => Message::Refuse { why: fields(b)? },
        Kind::Open => Message::Open {
            db: name_in(&fields::<String>(b)?)?,
        },
        Kind::Ask => {
            let (generation, why) = fields(b)?;
            Message::Ask { generation, why }
        }
        Kind::SnapshotBegin => decode_snapshot_begin(b)?,
        Kind::SnapshotEnd => {
            let (generation, end) = fields::<(u32, WirePos)>(b)?;
            let end = pos_in(end)?;
            Message::SnapshotEnd { generation, end }
        }
        Kind::Drop => {
            let (generation, sender_epoch, at) = fields::<(u32, u64, WirePos)>(b)?;
            Message::Drop {
                generation,
                sender_epoch,
                at: pos_in(at)?,
            }
        }
        Kind::Unknown => fields::<()>(b).map(|()| Message::Unknown)?,
        Kind::Heartbeat => {
            let (now_ms, is_caught_up, nak_count) = fields(b)?;
            Message::Heartbeat {
                now_ms,
                is_caught_up,
                nak_count,
            }
        }
        Kind::Bye => Message::Bye { why: fields(b)? },
        Kind::History => {
            let (generation, list) = fields::<(u32, Vec<(WirePos, u64)>)>(b)?;
            if list.len() > MAX_MILESTONES {
                return Err(format!(
                    "{} positions, at most {MAX_MILESTONES}",
                    list.len()
                ));
            }
            let entry = |(pos, epoch): (WirePos, u64)| {
                let pos = pos_in(pos)?;
                Ok(Milestone { pos, epoch })
            };
            Message::History {
                generation,
                milestones: list.into_iter().map(entry).collect::<Result<_, String>>()?,
            }
        }
        Kind::Record | Kind::RecordPart | Kind::Pages | Kind::Checksums => {
            return Err("bulk where control was expected".to_owned());
        }
    })
}

fn decode_offer(b: &[u8]) -> Result<Message, String> {
    let (generation, checksum_count, resume) =
        fields::<(u32, Option<u32>, Option<(WirePos, u32)>)>(b)?;
    if let Some(n) = checksum_count.filter(|n| *n > MAX_CHECKSUMS) {
        return Err(format!("{n} page checksums, at most {MAX_CHECKSUMS}"));
    }
    let resume = match resume {
        Some((start, next)) => Some((pos_in(start)?, pgno_in(next)?)),
        None => None,
    };
    Ok(Message::Offer {
        generation,
        checksum_count,
        resume,
    })
}

fn decode_snapshot_begin(b: &[u8]) -> Result<Message, String> {
    let (generation, sender_epoch, start, page_size, page_count, next, is_difference) =
        fields::<(u32, u64, WirePos, u32, u32, u32, bool)>(b)?;
    page_size_in(page_size)?;
    let snapshot = SnapshotStart {
        sender_epoch,
        start: pos_in(start)?,
        page_size,
        page_count,
        next: pgno_in(next)?,
        is_difference,
    };
    Ok(Message::SnapshotBegin {
        generation,
        snapshot,
    })
}

fn put_record_head(head: &mut BytesMut, record: &RecordStart) {
    let meta = &record.meta;
    head.put_u32_le(record.generation);
    head.put_u32_le(meta.page_size);
    head.put_u64_le(record.sender_epoch);
    head.put_u64_le(meta.epoch);
    head.put_u64_le(meta.min_txid.0);
    head.put_u64_le(meta.max_txid.0);
    head.put_u64_le(meta.pre.get());
    head.put_u64_le(meta.post.get());
    head.put_i64_le(meta.timestamp_ms);
    head.put_u32_le(meta.commit);
    head.put_u32_le(record.ltx_len);
    debug_assert_eq!(head.len(), RECORD_HEAD_LEN);
}

fn decode_bulk(frame: Frame) -> Result<Message, String> {
    let mut b = frame.payload;
    match frame.kind {
        Kind::Record => {
            let mut head = take(&mut b, RECORD_HEAD_LEN)?;
            let generation = head.get_u32_le();
            let page_size = page_size_in(head.get_u32_le())?.get();
            let sender_epoch = head.get_u64_le();
            let meta = RecordMeta {
                page_size,
                epoch: head.get_u64_le(),
                min_txid: Txid(head.get_u64_le()),
                max_txid: Txid(head.get_u64_le()),
                pre: checksum_in(head.get_u64_le())?,
                post: checksum_in(head.get_u64_le())?,
                timestamp_ms: head.get_i64_le(),
                commit: head.get_u32_le(),
            };
            let ltx_len = head.get_u32_le();
            if meta.min_txid == Txid::ZERO || meta.min_txid > meta.max_txid {
                return Err(format!("range {}-{}", meta.min_txid, meta.max_txid));
            }
            if ltx_len > MAX_RECORD_LEN || b.len() > ltx_len as usize {
                return Err(format!(
                    "record of {ltx_len} bytes with {} in its first part, at most {MAX_RECORD_LEN}",
                    b.len()
                ));
            }
            Ok(Message::Record(RecordStart {
                generation,
                sender_epoch,
                sync: frame.flags & FLAG_SYNC != 0,
                meta,
                ltx_len,
                bytes: b,
            }))
        }
        Kind::RecordPart => {
            let mut head = take(&mut b, PART_HEAD_LEN)?;
            Ok(Message::RecordPart {
                generation: head.get_u32_le(),
                offset: head.get_u32_le(),
                bytes: b,
            })
        }
        Kind::Pages => decode_pages(frame.flags, b).map(Message::Pages),
        _ => {
            if !b.len().is_multiple_of(8) {
                return Err(format!("{} bytes are not whole checksums", b.len()));
            }
            let sums = b.chunks_exact(8).map(|mut sum| sum.get_u64_le());
            Ok(Message::Checksums(sums.collect()))
        }
    }
}

/// Encodes pages as the payload of a `Pages` frame, compressed if that is worth it; returns the flags.
fn put_pages(head: &mut BytesMut, batch: &PageBatch, try_lz4: bool) -> u8 {
    let page_len = batch.page_size.len();
    let data_len = batch.pages.len() * page_len;
    assert!(data_len <= MAX_PAGES_LEN, "{data_len} bytes of pages");
    let head_len = PAGES_HEAD_LEN + 4 * batch.pages.len();
    head.reserve(head_len + data_len);
    head.put_u32_le(batch.generation);
    head.put_u32_le(u32::try_from(batch.pages.len()).unwrap_or(u32::MAX));
    head.put_u32_le(batch.page_size.get());
    for (pgno, page) in &batch.pages {
        assert_eq!(page.len(), page_len, "page {pgno}");
        head.put_u32_le(pgno.get());
    }
    for (_, page) in &batch.pages {
        head.extend_from_slice(page);
    }
    if !try_lz4 {
        return 0;
    }
    let packed = lz4_flex::block::compress(&head[head_len..]);
    if packed.len() > data_len - data_len / 8 {
        return 0;
    }
    head.truncate(head_len);
    head.extend_from_slice(&packed);
    FLAG_LZ4
}

fn decode_pages(flags: u8, mut b: Bytes) -> Result<PageBatch, String> {
    let mut head = take(&mut b, PAGES_HEAD_LEN)?;
    let generation = head.get_u32_le();
    let count = head.get_u32_le() as usize;
    let page_size = page_size_in(head.get_u32_le())?;
    let data_len = count.saturating_mul(page_size.len());
    if count == 0 || data_len > MAX_PAGES_LEN {
        return Err(format!("{count} pages of {page_size} bytes"));
    }
    let mut numbers = take(&mut b, 4 * count)?;
    let data = if flags & FLAG_LZ4 != 0 {
        let mut plain = vec![0; data_len];
        let got = lz4_flex::block::decompress_into(&b, &mut plain).map_err(|e| e.to_string())?;
        plain.truncate(got);
        Bytes::from(plain)
    } else {
        b
    };
    if data.len() != data_len {
        return Err(format!(
            "{} bytes of pages, expected {data_len}",
            data.len()
        ));
    }
    let mut pages: Vec<(Pgno, Bytes)> = Vec::with_capacity(count);
    for i in 0..count {
        let pgno = pgno_in(numbers.get_u32_le())?;
        if let Some((before, _)) = pages.last().filter(|(before, _)| *before >= pgno) {
            return Err(format!("page {pgno} after page {before}"));
        }
        let at = i * page_size.len();
        pages.push((pgno, data.slice(at..at + page_size.len())));
    }
    Ok(PageBatch {
        generation,
        page_size,
        pages,
    })
}

/// Encodes pages, trying LZ4 as long as it pays: after a batch that did not shrink, the next few are sent as they are.
#[derive(Debug, Default)]
pub struct PagePacker {
    skip: u8,
}

impl PagePacker {
    /// Appends the pages as one frame; returns the length of its payload.
    pub fn encode(&mut self, stream: u16, batch: &PageBatch, out: &mut WireBuf) -> usize {
        let mut payload = BytesMut::new();
        let flags = put_pages(&mut payload, batch, self.skip == 0);
        self.skip = match (self.skip, flags) {
            (0, 0) => 15,
            (n, _) => n.saturating_sub(1),
        };
        let payload = payload.freeze();
        out.put(Kind::Pages, flags, stream, &[], &payload);
        payload.len()
    }
}

fn body<T>(value: &T) -> Vec<u8>
where
    T: SchemaWrite<DefaultConfig, Src = T>,
{
    // Only a sequence over its preallocation bound can fail here, and every sequence is cut well below it.
    wincode::serialize(value).unwrap_or_else(|e| unreachable!("encode a control frame: {e}"))
}

fn fields<'de, T>(b: &'de [u8]) -> Result<T, String>
where
    T: SchemaRead<'de, DefaultConfig, Dst = T>,
{
    wincode::deserialize_exact(b).map_err(|e| e.to_string())
}

/// Bounds a text meant for a person.
fn short(text: &str) -> String {
    text.chars().take(2000).collect()
}

fn take(b: &mut Bytes, len: usize) -> Result<Bytes, String> {
    if b.len() < len {
        return Err(format!("{} bytes, at least {len} expected", b.len()));
    }
    Ok(b.split_to(len))
}

fn pos_out(pos: Pos) -> WirePos {
    (pos.txid.0, pos.post_apply_checksum.get())
}

fn pos_in((txid, checksum): WirePos) -> Result<Pos, String> {
    Ok(Pos {
        txid: Txid(txid),
        post_apply_checksum: checksum_in(checksum)?,
    })
}

fn checksum_in(raw: u64) -> Result<Checksum, String> {
    let checksum = Checksum::new(raw);
    if checksum.get() != raw {
        return Err(format!("checksum {raw:016x} without its flag bit"));
    }
    Ok(checksum)
}

fn name_in(name: &str) -> Result<DbName, String> {
    name.parse::<DbName>().map_err(|e| e.to_string())
}

fn pgno_in(n: u32) -> Result<Pgno, String> {
    Pgno::new(n).ok_or_else(|| "page number 0".to_owned())
}

fn page_size_in(n: u32) -> Result<PageSize, String> {
    PageSize::new(n).ok_or_else(|| format!("page size {n}"))
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
