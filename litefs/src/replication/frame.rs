//! Frames: how bytes are cut, bounded and checked on a stream, whatever they mean.
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 4 | length of the payload, little-endian |
//! | 4 | 1 | kind, see [`Kind`] |
//! | 5 | 1 | flags, by kind |
//! | 6 | 2 | stream id of the database, or 0 for the connection, little-endian |
//! | 8 | 4 | CRC-32 (IEEE) of bytes 0..8 and the payload, little-endian |
//! | 12 | length | payload |
//!
//! A length is checked against the bound of its kind before a byte is reserved for it, and memory grows with
//! the bytes that arrived, not with the length announced.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes before the payload.
pub const HEADER_LEN: usize = 12;
/// Longest frame, header included.
pub const MAX_FRAME_LEN: usize = 16 << 20;
/// Longest payload of a frame that carries no bulk.
pub const MAX_CONTROL_LEN: usize = 1 << 20;

const MAX_BULK_LEN: usize = MAX_FRAME_LEN - HEADER_LEN;
/// A read asks the kernel for this much.
const READ_LEN: usize = 256 << 10;
/// Payloads below this are copied out, so that a waiting record does not pin a whole read buffer.
const COPY_BELOW_LEN: usize = 8 << 10;

/// What a frame is. The numbers are the wire's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Replica introduces itself.
    Hello = 1,
    /// Positions of the replica's databases, in pieces.
    Positions = 2,
    /// Databases the replica wants, in pieces.
    Filter = 3,
    /// A database's position and bytes done.
    Ack = 4,
    /// A database is elsewhere than the records expect.
    Nak = 5,
    /// Answer to `Ask`.
    Offer = 6,
    /// Page checksums after `Offer`, in pieces.
    Checksums = 7,
    /// A database cannot go on here for now.
    Stalled = 8,
    /// A sign of life.
    Alive = 9,
    /// Primary accepts.
    Welcome = 32,
    /// Primary refuses, and says why.
    Refuse = 33,
    /// Gives a database its stream id.
    Open = 34,
    /// A record, or the first part of one.
    Record = 35,
    /// A later part of a record.
    RecordPart = 36,
    /// The log does not reach: how would you like your copy?
    Ask = 37,
    /// A page copy begins.
    SnapshotBegin = 38,
    /// Pages of a copy.
    Pages = 39,
    /// All pages sent; the copy is consistent at this position.
    SnapshotEnd = 40,
    /// The database was dropped.
    Drop = 41,
    /// The primary has never heard of this database.
    Unknown = 42,
    /// Primary's clock.
    Heartbeat = 43,
    /// Primary closes the stream, and says why.
    Bye = 44,
    /// Positions of the primary's history, before a page copy.
    History = 45,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Kind; 23] = [
        Kind::Hello,
        Kind::Positions,
        Kind::Filter,
        Kind::Ack,
        Kind::Nak,
        Kind::Offer,
        Kind::Checksums,
        Kind::Stalled,
        Kind::Alive,
        Kind::Welcome,
        Kind::Refuse,
        Kind::Open,
        Kind::Record,
        Kind::RecordPart,
        Kind::Ask,
        Kind::SnapshotBegin,
        Kind::Pages,
        Kind::SnapshotEnd,
        Kind::Drop,
        Kind::Unknown,
        Kind::Heartbeat,
        Kind::Bye,
        Kind::History,
    ];

    fn from_wire(n: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|k| *k as u8 == n)
    }

    fn max_len(self) -> usize {
        match self {
            Kind::Record | Kind::RecordPart | Kind::Pages | Kind::Checksums => MAX_BULK_LEN,
            _ => MAX_CONTROL_LEN,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A frame whose bytes arrived intact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Flags, by kind.
    pub flags: u8,
    /// Stream id of the database, or 0.
    pub stream: u16,
    /// Its content.
    pub payload: Bytes,
}

/// Why bytes from a peer are not a stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The connection broke.
    #[error("read the stream")]
    Io(#[source] io::Error),
    /// The connection ended inside a frame.
    #[error("stream ended inside a frame: {got} of {want} bytes")]
    Truncated {
        /// Bytes there were.
        got: usize,
        /// Bytes the frame has, as far as known.
        want: usize,
    },
    /// Nothing arrived.
    #[error("nothing received for {0:?}")]
    Silent(Duration),
    /// Not a kind of frame.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// Longer than its kind may be.
    #[error("{kind} frame of {len} bytes, at most {max} allowed")]
    TooLong {
        /// The kind.
        kind: Kind,
        /// Length announced.
        len: usize,
        /// Length allowed.
        max: usize,
    },
    /// The CRC-32 differs.
    #[error("{kind} frame is damaged: crc {got:08x}, header says {want:08x}")]
    Damaged {
        /// The kind.
        kind: Kind,
        /// CRC-32 of the bytes.
        got: u32,
        /// CRC-32 in the header.
        want: u32,
    },
    /// The payload does not say what its kind must say.
    #[error("{kind} frame: {why}")]
    Payload {
        /// The kind.
        kind: Kind,
        /// What is wrong.
        why: String,
    },
    /// The peer speaks another version.
    #[error("{kind} frame of protocol version {theirs}, this node speaks {ours}")]
    Version {
        /// The kind.
        kind: Kind,
        /// Peer's.
        theirs: u8,
        /// Ours.
        ours: u8,
    },
    /// A frame that may not come now.
    #[error("unexpected {kind} frame: {why}")]
    Unexpected {
        /// The kind.
        kind: Kind,
        /// Why not.
        why: String,
    },
}

/// Cuts the next frame off the front of `buf`; `None` if it is not all there.
///
/// # Errors
/// As soon as the bytes present cannot be the start of a frame.
pub fn decode_frame(buf: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let Some(header) = peek_header(buf)? else {
        return Ok(None);
    };
    let frame_len = HEADER_LEN + header.len;
    if buf.len() < frame_len {
        return Ok(None);
    }
    let mut crc = crc32fast::Hasher::new();
    crc.update(&buf[..8]);
    crc.update(&buf[HEADER_LEN..frame_len]);
    let got = crc.finalize();
    if got != header.crc {
        return Err(FrameError::Damaged {
            kind: header.kind,
            got,
            want: header.crc,
        });
    }
    buf.advance(HEADER_LEN);
    let payload = if header.len < COPY_BELOW_LEN {
        let copy = Bytes::copy_from_slice(&buf[..header.len]);
        buf.advance(header.len);
        copy
    } else {
        buf.split_to(header.len).freeze()
    };
    Ok(Some(Frame {
        kind: header.kind,
        flags: header.flags,
        stream: header.stream,
        payload,
    }))
}

struct Header {
    len: usize,
    kind: Kind,
    flags: u8,
    stream: u16,
    crc: u32,
}

fn peek_header(buf: &[u8]) -> Result<Option<Header>, FrameError> {
    let Some(mut bytes) = buf.get(..HEADER_LEN) else {
        return Ok(None);
    };
    let len = bytes.get_u32_le() as usize;
    let kind = bytes.get_u8();
    let kind = Kind::from_wire(kind).ok_or(FrameError::UnknownKind(kind))?;
    let max = kind.max_len();
    if len > max {
        return Err(FrameError::TooLong { kind, len, max });
    }
    Ok(Some(Header {
        len,
        kind,
        flags: bytes.get_u8(),
        stream: bytes.get_u16_le(),
        crc: bytes.get_u32_le(),
    }))
}

/// Reads frames from a connection.
#[derive(Debug)]
pub struct FrameReader<R> {
    io: R,
    buf: BytesMut,
    silence: Duration,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `io`; gives up after `silence` without a byte.
    pub fn new(io: R, silence: Duration) -> FrameReader<R> {
        FrameReader {
            io,
            buf: BytesMut::with_capacity(READ_LEN),
            silence,
        }
    }

    /// Reads the next frame; `None` when the peer closed between frames. Losing the future loses no byte.
    ///
    /// # Errors
    /// Names what was wrong with the bytes; the connection is of no more use then.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = decode_frame(&mut self.buf)? {
                return Ok(Some(frame));
            }
            if self.buf.capacity() - self.buf.len() < READ_LEN / 16 {
                self.buf.reserve(READ_LEN);
            }
            let read = tokio::time::timeout(self.silence, self.io.read_buf(&mut self.buf));
            match read.await {
                Err(_) => return Err(FrameError::Silent(self.silence)),
                Ok(Err(source)) => return Err(FrameError::Io(source)),
                Ok(Ok(0)) => return self.at_end(),
                Ok(Ok(_)) => {}
            }
        }
    }

    fn at_end(&self) -> Result<Option<Frame>, FrameError> {
        if self.buf.is_empty() {
            return Ok(None);
        }
        let want = peek_header(&self.buf)?.map_or(HEADER_LEN, |h| HEADER_LEN + h.len);
        let got = self.buf.len();
        Err(FrameError::Truncated { got, want })
    }
}

/// Frames on their way out: small ones gathered, large bodies kept where they are for a vectored write.
#[derive(Debug, Default)]
pub struct WireBuf {
    full: VecDeque<Bytes>,
    tail: BytesMut,
    len: usize,
}

impl WireBuf {
    /// Appends a frame whose payload is `head` followed by `body`.
    ///
    /// # Panics
    /// If the payload is longer than its kind may be: callers split bulk.
    pub fn put(&mut self, kind: Kind, flags: u8, stream: u16, head: &[u8], body: &Bytes) {
        let payload_len = head.len() + body.len();
        assert!(
            payload_len <= kind.max_len(),
            "{kind} frame of {payload_len} bytes"
        );
        let at = self.tail.len();
        self.tail.reserve(HEADER_LEN + head.len());
        self.tail
            .put_u32_le(u32::try_from(payload_len).unwrap_or(u32::MAX));
        self.tail.put_u8(kind as u8);
        self.tail.put_u8(flags);
        self.tail.put_u16_le(stream);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&self.tail[at..]);
        crc.update(head);
        crc.update(body);
        self.tail.put_u32_le(crc.finalize());
        self.tail.extend_from_slice(head);
        if body.len() < COPY_BELOW_LEN {
            self.tail.extend_from_slice(body);
        } else {
            self.full.push_back(self.tail.split().freeze());
            self.full.push_back(body.clone());
        }
        self.len += HEADER_LEN + payload_len;
    }
}

impl Buf for WireBuf {
    fn remaining(&self) -> usize {
        self.len
    }

    fn chunk(&self) -> &[u8] {
        self.full.front().map_or(&self.tail[..], |b| &b[..])
    }

    fn advance(&mut self, mut n: usize) {
        self.len -= n;
        while let Some(front) = self.full.front_mut() {
            if n < front.len() {
                front.advance(n);
                return;
            }
            n -= front.len();
            self.full.pop_front();
        }
        self.tail.advance(n);
    }

    fn chunks_vectored<'a>(&'a self, dst: &mut [IoSlice<'a>]) -> usize {
        let tail = (!self.tail.is_empty()).then_some(&self.tail[..]);
        let all = self.full.iter().map(|b| &b[..]).chain(tail);
        let mut count = 0;
        for (slot, bytes) in dst.iter_mut().zip(all) {
            *slot = IoSlice::new(bytes);
            count += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(frames: &[(Kind, u16, &[u8], Bytes)]) -> Vec<u8> {
        let mut buf = WireBuf::default();
        for (kind, stream, head, body) in frames {
            buf.put(*kind, 3, *stream, head, body);
        }
        buf.copy_to_bytes(buf.remaining()).to_vec()
    }

    #[test]
    fn golden_header() {
        let bytes = wire(&[(Kind::Heartbeat, 0x0201, b"ab", Bytes::new())]);
        let mut crc = crc32fast::Hasher::new();
        crc.update(&[2, 0, 0, 0, 43, 3, 1, 2]);
        crc.update(b"ab");
        let mut want = vec![2, 0, 0, 0, 43, 3, 1, 2];
        want.extend_from_slice(&crc.finalize().to_le_bytes());
        want.extend_from_slice(b"ab");
        assert_eq!(bytes, want);
    }

    #[test]
    fn small_and_large_bodies_round_trip_in_order() {
        let large = Bytes::from(vec![7; COPY_BELOW_LEN * 3]);
        let frames = [
            (Kind::Open, 1, &b"x"[..], Bytes::new()),
            (Kind::Record, 1, &b"head"[..], large.clone()),
            (Kind::RecordPart, 1, &b"tail"[..], Bytes::from_static(b"z")),
        ];
        let mut bytes = BytesMut::from(&wire(&frames)[..]);
        for (kind, stream, head, body) in frames {
            let frame = decode_frame(&mut bytes).unwrap().unwrap();
            assert_eq!((frame.kind, frame.flags, frame.stream), (kind, 3, stream));
            assert_eq!(frame.payload, [head, &body].concat());
        }
        assert!(bytes.is_empty());
    }

    #[tokio::test]
    async fn every_truncation_is_named() {
        let bytes = wire(&[(Kind::Ask, 9, b"0123456789", Bytes::new())]);
        for cut in 1..bytes.len() {
            let mut reader = FrameReader::new(&bytes[..cut], Duration::from_secs(5));
            let err = reader.next().await.unwrap_err();
            assert!(
                matches!(err, FrameError::Truncated { got, .. } if got == cut),
                "{err}"
            );
        }
        let mut reader = FrameReader::new(&bytes[..0], Duration::from_secs(5));
        assert!(reader.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn every_flipped_bit_is_detected() {
        let bytes = wire(&[(Kind::Ask, 9, b"0123456789", Bytes::new())]);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut reader = FrameReader::new(&bad[..], Duration::from_secs(5));
            assert!(reader.next().await.is_err(), "bit {bit}");
        }
    }

    #[tokio::test]
    async fn a_hostile_length_is_refused_before_anything_is_reserved() {
        let mut reader = FrameReader::new(&[0xff; 64][..], Duration::from_secs(5));
        assert!(matches!(
            reader.next().await,
            Err(FrameError::UnknownKind(0xff))
        ));
        let mut header = [0xff; 12];
        header[4] = Kind::Pages as u8;
        let mut reader = FrameReader::new(&header[..], Duration::from_secs(5));
        assert!(matches!(
            reader.next().await,
            Err(FrameError::TooLong { .. })
        ));
        assert!(reader.buf.capacity() <= READ_LEN);
        header[..4].copy_from_slice(&(15_u32 << 20).to_le_bytes());
        let mut reader = FrameReader::new(&header[..], Duration::from_secs(5));
        assert!(matches!(
            reader.next().await,
            Err(FrameError::Truncated { got: 12, .. })
        ));
        assert!(reader.buf.capacity() <= READ_LEN);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_an_error() {
        let (_held, io) = tokio::io::duplex(64);
        let mut reader = FrameReader::new(io, Duration::from_secs(5));
        assert!(matches!(reader.next().await, Err(FrameError::Silent(_))));
    }
}
