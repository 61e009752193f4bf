//! One page in the page block: its number, then its data under LZ4.
//!
//! | offset | length | field | unit |
//! |---|---|---|---|
//! | 0 | 4 | page number | from 1 |
//! | 4 | 2 | flags | bit 0: a size and an LZ4 *block* follow |
//! | 6 | 4 | size of the block, if bit 0 is set | bytes |
//! | 10 | size | LZ4 block, without a size of its own, of exactly one page | |
//!
//! Six zero bytes in place of a page end the page block. A page without bit 0 is the older form
//! of version 3: an LZ4 *frame* follows the six bytes and ends by itself. We read both and write
//! the block form.

use std::io::Read;

use lz4_flex::block::decompress_into;
use lz4_flex::frame::FrameDecoder;

use super::header::be_u32;
use super::{LtxError, PageSize, Pgno};

/// Length of the page number and flags in bytes.
pub(super) const PAGE_HEADER_LEN: usize = 6;

/// Length of the size field in bytes.
const SIZE_LEN: usize = 4;

/// Offset of the LZ4 block in a page of the block form.
pub(super) const BLOCK_OFFSET: usize = PAGE_HEADER_LEN + SIZE_LEN;

/// What stands where the next page would: the end of the page block.
pub(super) const END_MARKER: [u8; PAGE_HEADER_LEN] = [0; PAGE_HEADER_LEN];

const FLAG_BLOCK: u16 = 1 << 0;

/// A page as it lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Page<'a> {
    pub(super) pgno: Pgno,
    pub(super) data: PageData<'a>,
}

/// Data of a page as it lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PageData<'a> {
    /// Exactly the LZ4 block.
    Block(&'a [u8]),
    /// An LZ4 frame, and whatever follows it.
    Frame(&'a [u8]),
}

/// Returns the ten bytes before the LZ4 block of a page.
pub(super) fn encode_page_header(pgno: Pgno, block_len: u32) -> [u8; BLOCK_OFFSET] {
    let mut bytes = [0; BLOCK_OFFSET];
    bytes[..4].copy_from_slice(&pgno.get().to_be_bytes());
    bytes[4..6].copy_from_slice(&FLAG_BLOCK.to_be_bytes());
    bytes[6..].copy_from_slice(&block_len.to_be_bytes());
    bytes
}

impl<'a> Page<'a> {
    /// Reads the page at the start of `bytes`, or nothing if the end marker stands there.
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Option<Page<'a>>, LtxError> {
        let (header, rest) = take(bytes, PAGE_HEADER_LEN, "page header")?;
        let raw_pgno = be_u32(header, 0);
        let flags = u16::from_be_bytes([header[4], header[5]]);
        let Some(pgno) = Pgno::new(raw_pgno).filter(|_| flags & !FLAG_BLOCK == 0) else {
            if header == END_MARKER {
                return Ok(None);
            }
            return Err(LtxError::PageFlags {
                pgno: raw_pgno,
                flags,
            });
        };
        if flags & FLAG_BLOCK == 0 {
            let data = PageData::Frame(rest);
            return Ok(Some(Page { pgno, data }));
        }
        let (size, rest) = take(rest, SIZE_LEN, "page size field")?;
        let (block, _) = take(rest, be_u32(size, 0) as usize, "page data")?;
        let data = PageData::Block(block);
        Ok(Some(Page { pgno, data }))
    }

    /// Decompresses the page into `buf`, which is as long as a page, and returns how many bytes of
    /// the file the page takes, header and all.
    pub(super) fn decompress(&self, buf: &mut [u8], want: PageSize) -> Result<usize, LtxError> {
        let pgno = self.pgno;
        match self.data {
            PageData::Block(block) => {
                let have = decompress_into(block, buf)
                    .map_err(|source| LtxError::Decompress { pgno, source })?;
                if have != want.len() {
                    return Err(LtxError::PageDataLen { pgno, have, want });
                }
                Ok(BLOCK_OFFSET + block.len())
            }
            PageData::Frame(bytes) => {
                let mut rest = bytes;
                let mut frame = FrameDecoder::new(&mut rest);
                let failed = |source| LtxError::Frame { pgno, source };
                frame.read_exact(buf).map_err(failed)?;
                // Reads the frame's end mark and checksum too, and nothing beyond them.
                if frame.read(&mut [0]).map_err(failed)? != 0 {
                    let have = want.len() + 1;
                    return Err(LtxError::PageDataLen { pgno, have, want });
                }
                Ok(PAGE_HEADER_LEN + bytes.len() - rest.len())
            }
        }
    }
}

/// Splits off the first `need` bytes.
fn take<'a>(
    bytes: &'a [u8],
    need: usize,
    part: &'static str,
) -> Result<(&'a [u8], &'a [u8]), LtxError> {
    bytes.split_at_checked(need).ok_or(LtxError::Truncated {
        part,
        need: need as u64,
        have: bytes.len() as u64,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use lz4_flex::frame::{BlockSize, FrameEncoder, FrameInfo};

    use super::*;

    const SIZE: PageSize = PageSize::new(512).unwrap();

    #[test]
    fn a_page_of_the_block_form_comes_back() {
        let block = lz4_flex::block::compress(&[7; 512]);
        let pgno = Pgno::new(0x0102_0304).unwrap();
        let mut bytes = encode_page_header(pgno, u32::try_from(block.len()).unwrap()).to_vec();
        assert_eq!(bytes[..6], [1, 2, 3, 4, 0, 1]);
        bytes.extend_from_slice(&block);
        let len = bytes.len();
        bytes.extend_from_slice(b"next");
        let page = Page::decode(&bytes).unwrap().unwrap();
        let mut buf = [0; 512];
        assert_eq!(
            (page.pgno, page.decompress(&mut buf, SIZE).unwrap()),
            (pgno, len)
        );
        assert_eq!(buf, [7; 512]);
        for cut in 0..len {
            assert!(Page::decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    /// A frame with 64 KiB blocks and a checksum of the content, as Litestream wrote it at first.
    fn frame(data: &[u8]) -> Vec<u8> {
        let info = FrameInfo::new()
            .block_size(BlockSize::Max64KB)
            .content_checksum(true);
        let mut frame = FrameEncoder::with_frame_info(info, vec![0, 0, 0, 9, 0, 0]);
        frame.write_all(data).unwrap();
        frame.finish().unwrap()
    }

    #[test]
    fn a_page_of_the_frame_form_ends_where_its_frame_ends() {
        let data: Vec<u8> = (0..512u32).map(|i| (i * i % 251) as u8).collect();
        let mut bytes = frame(&data);
        let len = bytes.len();
        bytes.extend_from_slice(&frame(&[1; 512]));
        let page = Page::decode(&bytes).unwrap().unwrap();
        let mut buf = [0; 512];
        assert_eq!(
            (page.pgno.get(), page.decompress(&mut buf, SIZE).unwrap()),
            (9, len)
        );
        assert_eq!(buf[..], data);
        for wrong in [511, 513] {
            let bytes = frame(&vec![3; wrong]);
            let page = Page::decode(&bytes).unwrap().unwrap();
            assert!(page.decompress(&mut buf, SIZE).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_end_marker_is_six_zero_bytes_and_nothing_else() {
        assert_eq!(Page::decode(&END_MARKER).unwrap(), None);
        for bad in [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 2], [0, 0, 0, 1, 1, 1]] {
            assert!(
                matches!(Page::decode(&bad), Err(LtxError::PageFlags { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_block_of_another_length_is_refused() {
        let mut buf = [0; 512];
        for wrong in [0, 511, 513] {
            let block = lz4_flex::block::compress(&vec![3; wrong]);
            let page = Page {
                pgno: Pgno::ONE,
                data: PageData::Block(&block),
            };
            assert!(page.decompress(&mut buf, SIZE).is_err(), "{wrong}");
        }
    }
}
