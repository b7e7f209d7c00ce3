//! [`Compressor`]: plain clusters to compressed ones, for `image convert -c`. Control path; each
//! thread that compresses has its own.

use flate2::{Compress, FlushCompress, Status};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use crate::compress::Decompressor;
use crate::format::Compression;

/// zlib's default level.
const DEFLATE_LEVEL: u32 = 6;

/// Compresses clusters; keeps its working memory between calls.
pub struct Compressor {
    kind: Kind,
}

enum Kind {
    Deflate(Compress),
    /// With what reads its output back.
    Zstd(Box<(Decompressor, Vec<u8>)>),
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

impl Compressor {
    /// Deflate at zlib's level 6, Zstandard at about level 1. Matches of deflate reach back up to
    /// 32 KiB, as RFC 1951 has it: whoever unpacks a cluster whole, as QEMU does, has it all there.
    pub fn new(compression: Compression) -> Compressor {
        let kind = match compression {
            Compression::Deflate => {
                Kind::Deflate(Compress::new(flate2::Compression::new(DEFLATE_LEVEL), false))
            }
            Compression::Zstd => Kind::Zstd(Box::new((Decompressor::new(), Vec::new()))),
        };
        Compressor { kind }
    }

    /// Replaces `packed` with the compressed form of `plain`, one cluster. `false` if that would
    /// not be shorter than the cluster; then `packed` holds rubbish, and the cluster is to be
    /// stored as it is.
    pub fn encode(&mut self, plain: &[u8], packed: &mut Vec<u8>) -> bool {
        match &mut self.kind {
            Kind::Deflate(deflate) => {
                deflate.reset();
                packed.resize(plain.len().saturating_sub(1), 0);
                let done = deflate.compress(plain, packed, FlushCompress::Finish);
                packed.truncate(usize::try_from(deflate.total_out()).unwrap_or(0));
                matches!(done, Ok(Status::StreamEnd))
            }
            Kind::Zstd(check) => {
                *packed = compress_to_vec(plain, CompressionLevel::Fastest);
                let (decompressor, back) = &mut **check;
                back.resize(plain.len(), 0);
                // The encoder is young, and a cluster that cannot be read back is lost for good.
                packed.len() < plain.len()
                    && decompressor.decode(Compression::Zstd, packed, back).is_ok()
                    && back[..] == *plain
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clusters from hard to easy: noise, noise repeated at a distance, text, zeroes.
    fn samples(len: usize) -> Vec<Vec<u8>> {
        let mut x = 1u64;
        let noise: Vec<u8> = (0..len)
            .map(|_| {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (x >> 33) as u8
            })
            .collect();
        let far = (0..len).map(|i| noise[i % (len / 2)]).collect();
        let text = (0..len).map(|i| ((i / 7) ^ (i >> 5)) as u8 & 0x3f).collect();
        vec![noise, far, text, vec![0; len]]
    }

    #[test]
    fn what_comes_out_is_shorter_and_reads_back() {
        for compression in [Compression::Deflate, Compression::Zstd] {
            let mut c = Compressor::new(compression);
            let mut d = Decompressor::new();
            for bits in [9, 12, 16, 21] {
                let mut shorter = 0;
                for plain in samples(1 << bits) {
                    let mut packed = vec![7; 3];
                    if !c.encode(&plain, &mut packed) {
                        continue;
                    }
                    shorter += 1;
                    assert!(!packed.is_empty() && packed.len() < plain.len());
                    let mut back = vec![0; plain.len()];
                    d.decode(compression, &packed, &mut back).unwrap();
                    assert!(back == plain, "{compression:?} {bits}");
                }
                assert!(shorter >= 2, "{compression:?} {bits}: only {shorter} got shorter");
            }
        }
    }
}
