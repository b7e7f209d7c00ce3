//! What a guest does, and what the disk must show then.

use anyhow::{Result, bail};

use crate::pick::Rng;

pub(crate) const SECTOR: u64 = 512;

/// One request of a guest; all in bytes, and multiples of a sector.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    /// Of this noise, from its start.
    Write {
        at: u64,
        len: u64,
        noise: usize,
    },
    /// A cluster at a time.
    Compressed {
        at: u64,
        len: u64,
        noise: usize,
    },
    Zero {
        at: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        at: u64,
        len: u64,
    },
    Read {
        at: u64,
        len: u64,
    },
    Flush,
}

/// What is written: each as long as nothing divides, repeated.
pub(crate) struct Noise(pub(crate) Vec<Vec<u8>>);

impl Noise {
    /// Some that packs well, and some that does not.
    pub(crate) fn new(rng: &mut Rng) -> Noise {
        let one = |i: u64| {
            let len = 20_000 + rng.below(5000) * 2 + 1;
            let packs = i % 4 * 300 + 1;
            (0..len)
                .scan(0, |byte, at| {
                    if at.is_multiple_of(packs) {
                        *byte = 1 + rng.below(255) as u8;
                    }
                    Some(*byte)
                })
                .collect()
        };
        Noise((0..8).map(one).collect())
    }

    /// `len` bytes from `from` on of the endless repetition.
    pub(crate) fn bytes(&self, which: usize, from: u64, len: u64) -> Vec<u8> {
        let noise = &self.0[which];
        let skip = (from % noise.len() as u64) as usize;
        noise.iter().cycle().skip(skip).take(len as usize).copied().collect()
    }
}

/// Requests for one sitting. Compressed writes come first, each to a cluster of its own: QEMU refuses
/// them over what is allocated, and goes on filling a host cluster that a discard freed.
pub(crate) fn draw(
    rng: &mut Rng,
    cluster: u64,
    size: u64,
    compressed: bool,
    count: u64,
) -> Vec<Op> {
    let mut ops = Vec::new();
    let clusters = size.div_ceil(cluster);
    if compressed {
        let mut places: Vec<u64> = (0..1 + count / 2).map(|_| rng.below(clusters)).collect();
        places.sort_unstable();
        places.dedup();
        for place in places {
            let at = place * cluster;
            let noise = rng.below(8) as usize;
            ops.push(Op::Compressed { at, len: cluster.min(size - at), noise });
        }
    }
    for _ in 0..count {
        let unit = if rng.one_in(3) { SECTOR } else { cluster };
        let at = rng.below(size / unit) * unit;
        let len = ((1 + rng.below(6)) * unit).min(size - at).min(3 << 20);
        let (noise, unmap) = (rng.below(8) as usize, rng.one_in(2));
        // Now and then much at once.
        let wide = if rng.one_in(8) { (size - at) / 2 / SECTOR * SECTOR } else { 0 };
        ops.push(match rng.below(12) {
            0 | 1 => Op::Zero { at, len: len.max(wide), unmap },
            2 | 3 => Op::Discard { at, len: len.max(wide) },
            4 | 5 => Op::Read { at, len },
            6 => Op::Flush,
            _ => Op::Write { at, len, noise },
        });
    }
    ops
}

/// What a disk must show.
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    /// Of each sector: it was discarded, and may read as before or as zeroes.
    loose: Vec<bool>,
}

impl Model {
    pub(crate) fn new() -> Model {
        Model { bytes: Vec::new(), loose: Vec::new() }
    }

    pub(crate) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// An overlay of this size comes in front.
    pub(crate) fn overlay(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
        self.loose = vec![false; (size / SECTOR) as usize];
    }

    pub(crate) fn apply(&mut self, op: &Op, noise: &Noise) {
        let sectors = |at: u64, len: u64| (at / SECTOR) as usize..((at + len) / SECTOR) as usize;
        match *op {
            Op::Write { at, len, noise: which } | Op::Compressed { at, len, noise: which } => {
                self.bytes[at as usize..(at + len) as usize]
                    .copy_from_slice(&noise.bytes(which, 0, len));
                self.loose[sectors(at, len)].fill(false);
            }
            Op::Zero { at, len, .. } => {
                self.bytes[at as usize..(at + len) as usize].fill(0);
                self.loose[sectors(at, len)].fill(false);
            }
            Op::Discard { at, len } => self.loose[sectors(at, len)].fill(true),
            Op::Read { .. } | Op::Flush => {}
        }
    }

    /// Compares with what was read at `at`; from then on discarded sectors there are what they
    /// showed.
    pub(crate) fn settle(&mut self, at: u64, seen: &[u8]) -> Result<()> {
        let first = (at / SECTOR) as usize;
        for (i, got) in seen.chunks(SECTOR as usize).enumerate() {
            let sector = first + i;
            let start = sector * SECTOR as usize;
            let want = &mut self.bytes[start..start + got.len()];
            if self.loose[sector] && got.iter().all(|&b| b == 0) {
                want.fill(0);
            }
            self.loose[sector] = false;
            if want != got {
                let byte = want.iter().zip(got).position(|(a, b)| a != b).unwrap_or(0);
                let (want, got) = (want[byte], got[byte]);
                bail!("byte {}: {want:#04x} was to be read, not {got:#04x}", start + byte);
            }
        }
        Ok(())
    }
}

#[test]
fn discarded_sectors_are_as_before_or_zeroes() {
    let noise = Noise::new(&mut Rng(1));
    let mut model = Model::new();
    model.overlay(4096);
    model.apply(&Op::Write { at: 0, len: 2048, noise: 1 }, &noise);
    let disk = model.bytes.clone();
    model.apply(&Op::Discard { at: 512, len: 1024 }, &noise);
    let mut seen = disk.clone();
    seen[512..1024].fill(0);
    model.settle(0, &seen).unwrap();
    assert!(model.settle(0, &disk).is_err(), "settled");
    seen[1024] ^= 1;
    model.apply(&Op::Discard { at: 1024, len: 512 }, &noise);
    assert!(model.settle(0, &seen).unwrap_err().to_string().starts_with("byte 1024:"));
}
