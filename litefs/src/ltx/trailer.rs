//! The last 16 bytes of a file: what the database and the file add up to.
//!
//! | offset | length | field | unit |
//! |---|---|---|---|
//! | 0 | 8 | post-apply checksum of the database | 0 where none is kept |
//! | 8 | 8 | file checksum | CRC-64/GO-ISO, high bit set |
//!
//! The file checksum covers everything before it, but the *uncompressed* data of each page in
//! place of its compressed bytes.

use super::header::{be_u64, decode_checksum};
use super::{Checksum, Header, LtxError};

/// Length of the trailer in bytes.
pub const TRAILER_LEN: usize = 16;

/// Length of the part of the trailer that the file checksum covers.
pub(super) const TRAILER_COVERED_LEN: usize = 8;

/// Trailer of a file; the bytes are in the module's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// Checksum of the database after the range; `None` where none is kept.
    pub post_apply_checksum: Option<Checksum>,
    /// Checksum of the file.
    pub file_checksum: Checksum,
}

impl Trailer {
    /// Checks that the post-apply checksum is one that `header` allows.
    ///
    /// # Errors
    /// `PostApplyChecksum`.
    pub fn validate(&self, header: &Header) -> Result<(), LtxError> {
        let tracked = header.flags.tracks_checksums();
        let sound = match self.post_apply_checksum {
            None => !tracked,
            Some(checksum) => tracked && (header.commit != 0 || checksum == Checksum::EMPTY),
        };
        if sound {
            return Ok(());
        }
        Err(LtxError::PostApplyChecksum {
            raw: self.post_apply_checksum.map_or(0, Checksum::get),
            commit: header.commit,
            tracked,
        })
    }

    /// Returns the bytes of the trailer.
    #[must_use]
    pub fn encode(&self) -> [u8; TRAILER_LEN] {
        let mut bytes = [0; TRAILER_LEN];
        let post_apply = self.post_apply_checksum.map_or(0, Checksum::get);
        bytes[..8].copy_from_slice(&post_apply.to_be_bytes());
        bytes[8..].copy_from_slice(&self.file_checksum.get().to_be_bytes());
        bytes
    }

    /// Reads the trailer that `bytes` are, and checks it against the header of its file.
    ///
    /// # Errors
    /// A length other than 16, or checksums that the header does not allow.
    pub fn decode(bytes: &[u8], header: &Header) -> Result<Trailer, LtxError> {
        let b: &[u8; TRAILER_LEN] = bytes.try_into().map_err(|_| LtxError::Truncated {
            part: "trailer",
            need: TRAILER_LEN as u64,
            have: bytes.len() as u64,
        })?;
        let trailer = Trailer {
            post_apply_checksum: decode_checksum(be_u64(b, 0)).map_err(|raw| {
                LtxError::PostApplyChecksum {
                    raw,
                    commit: header.commit,
                    tracked: header.flags.tracks_checksums(),
                }
            })?,
            file_checksum: match decode_checksum(be_u64(b, 8)) {
                Ok(Some(checksum)) => checksum,
                Ok(None) => return Err(LtxError::FileChecksumFlag { raw: 0 }),
                Err(raw) => return Err(LtxError::FileChecksumFlag { raw }),
            },
        };
        trailer.validate(header)?;
        Ok(trailer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ltx::{HeaderFlags, PageSize, Txid};

    fn header(flags: HeaderFlags, commit: u32) -> Header {
        Header {
            flags,
            page_size: PageSize::new(512).unwrap(),
            commit,
            min_txid: Txid(1),
            max_txid: Txid(1),
            timestamp_ms: 0,
            pre_apply_checksum: None,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: 0,
        }
    }

    #[test]
    fn only_what_the_header_announces_comes_back() {
        let (tracked, untracked) = (HeaderFlags::TRACKED, HeaderFlags::NO_CHECKSUM);
        for (flags, commit, post_apply_checksum, sound) in [
            (tracked, 1, Some(Checksum::new(7)), true),
            (tracked, 1, None, false),
            (tracked, 0, Some(Checksum::EMPTY), true),
            (tracked, 0, Some(Checksum::new(7)), false),
            (untracked, 1, None, true),
            (untracked, 0, None, true),
            (untracked, 1, Some(Checksum::new(7)), false),
        ] {
            let trailer = Trailer {
                post_apply_checksum,
                file_checksum: Checksum::new(9),
            };
            let decoded = Trailer::decode(&trailer.encode(), &header(flags, commit));
            assert_eq!(
                decoded.ok(),
                sound.then_some(trailer),
                "{flags:?} {commit} {trailer:?}"
            );
        }
    }

    #[test]
    fn checksums_without_their_flag_bit_are_refused() {
        let trailer = Trailer {
            post_apply_checksum: Some(Checksum::new(7)),
            file_checksum: Checksum::new(9),
        };
        for at in [0, 8] {
            let mut bytes = trailer.encode();
            bytes[at] ^= 0x80;
            assert!(
                Trailer::decode(&bytes, &header(HeaderFlags::TRACKED, 1)).is_err(),
                "{at}"
            );
        }
    }
}
