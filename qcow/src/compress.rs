//! [`Decompressor`]: compressed clusters to plain ones. Used by the blocking reader and by the
//! datapath's slow path; each owner has its own.

use std::io::Read;

use flate2::{Decompress, FlushDecompress};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::format::Compression;

/// Largest window that a zstd frame may ask for. A cluster has at most 2 MiB, so no writer needs
/// more; the decoder takes this much memory at most.
const MAX_ZSTD_WINDOW: u64 = 8 << 20;

/// Why a compressed cluster could not be unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecompressError {
    /// The data is no valid stream of its kind.
    #[error("compressed data is not valid {}", .0.name())]
    Invalid(Compression),
    /// The stream ends before the cluster is full.
    #[error("compressed data gives less than a cluster")]
    Short,
    /// A zstd frame goes on after the cluster is full.
    #[error("compressed data gives more than a cluster")]
    Long,
}

/// Unpacks clusters; keeps its working memory between calls (deflate: some 40 KiB, zstd: at most
/// some 10 MiB).
pub struct Decompressor {
    inflate: Decompress,
    zstd: FrameDecoder,
}

impl Default for Decompressor {
    fn default() -> Self {
        Decompressor::new()
    }
}

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decompressor")
    }
}

impl Decompressor {
    /// Without any working memory for zstd yet.
    pub fn new() -> Decompressor {
        let mut zstd = FrameDecoder::new();
        zstd.set_max_window_size(MAX_ZSTD_WINDOW);
        Decompressor { inflate: Decompress::new(false), zstd }
    }

    /// Fills `out`, one cluster, from the stream at the start of `input`. What follows the stream
    /// in `input` is ignored: an entry counts whole sectors.
    ///
    /// # Errors
    /// If the stream is invalid or its length is not a cluster; then `out` holds rubbish.
    pub fn decode(
        &mut self,
        compression: Compression,
        input: &[u8],
        out: &mut [u8],
    ) -> Result<(), DecompressError> {
        match compression {
            Compression::Deflate => self.inflate(input, out),
            Compression::Zstd => self.unzstd(input, out),
        }
    }

    fn inflate(&mut self, input: &[u8], out: &mut [u8]) -> Result<(), DecompressError> {
        self.inflate.reset(false);
        self.inflate
            .decompress(input, out, FlushDecompress::Finish)
            .map_err(|_| DecompressError::Invalid(Compression::Deflate))?;
        if self.inflate.total_out() == out.len() as u64 {
            Ok(())
        } else {
            Err(DecompressError::Short)
        }
    }

    fn unzstd(&mut self, mut input: &[u8], out: &mut [u8]) -> Result<(), DecompressError> {
        const INVALID: DecompressError = DecompressError::Invalid(Compression::Zstd);
        let mut done = 0;
        // Each frame takes at least its header from the input, so this ends.
        while done < out.len() {
            if input.is_empty() {
                return Err(DecompressError::Short);
            }
            self.zstd.reset(&mut input).map_err(|_| INVALID)?;
            // Each block takes at least its header. A frame keeps its window (at most
            // MAX_ZSTD_WINDOW) and one block in memory before `read` gives anything.
            loop {
                self.zstd
                    .decode_blocks(&mut input, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(|_| INVALID)?;
                done += self.zstd.read(&mut out[done..]).map_err(|_| INVALID)?;
                if self.zstd.can_collect() > 0 {
                    return Err(DecompressError::Long);
                }
                if self.zstd.is_finished() {
                    break;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression as Level, write::DeflateEncoder};
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|i| ((i / 7) ^ (i >> 5)) as u8 & 0x3f).collect()
    }

    fn pack(compression: Compression, plain: &[u8]) -> Vec<u8> {
        match compression {
            Compression::Deflate => {
                let mut e = DeflateEncoder::new(Vec::new(), Level::fast());
                e.write_all(plain).unwrap();
                e.finish().unwrap()
            }
            Compression::Zstd => compress_to_vec(plain, CompressionLevel::Fastest),
        }
    }

    #[test]
    fn streams_of_one_cluster_and_of_other_lengths() {
        let mut d = Decompressor::new();
        for c in [Compression::Deflate, Compression::Zstd] {
            for bits in [9, 12, 16, 21] {
                let plain = text(1 << bits);
                let mut packed = pack(c, &plain);
                packed.extend_from_slice(&[0xee; 300]);
                let mut out = vec![0; plain.len()];
                d.decode(c, &packed, &mut out).unwrap();
                assert!(out == plain);
                let short = pack(c, &plain[..plain.len() - 1]);
                assert!(d.decode(c, &short, &mut out).is_err());
                assert!(d.decode(c, &packed[..packed.len() / 8], &mut out).is_err());
                assert!(d.decode(c, &[], &mut out).is_err());
            }
        }
        let long = pack(Compression::Zstd, &text(66_000));
        let mut out = vec![0; 65536];
        assert_eq!(d.decode(Compression::Zstd, &long, &mut out), Err(DecompressError::Long));
    }

    #[test]
    fn damaged_streams_end_in_an_error_or_in_rubbish() {
        let mut d = Decompressor::new();
        let mut x = 1u64;
        let mut failed = 0;
        for c in [Compression::Deflate, Compression::Zstd] {
            let good = pack(c, &text(4096));
            let mut out = vec![0; 4096];
            for _ in 0..3000 {
                let mut bad = good.clone();
                for _ in 0..3 {
                    x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let at = (x >> 33) as usize % bad.len();
                    bad[at] = (x >> 20) as u8;
                }
                failed += u32::from(d.decode(c, &bad, &mut out).is_err());
            }
        }
        assert!(failed > 3000, "{failed} of 6000");
    }

    #[test]
    fn a_zstd_frame_that_asks_for_a_huge_window_is_refused() {
        // Frame header: magic, descriptor (no content size), window descriptor 2^(10+17).
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 17 << 3, 0x01, 0x00, 0x00];
        let got = Decompressor::new().decode(Compression::Zstd, &frame, &mut [0; 512]);
        assert_eq!(got, Err(DecompressError::Invalid(Compression::Zstd)));
    }
}
