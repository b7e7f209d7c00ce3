//! Seeded random requests against a byte array.

use block::{Flags, LeafAccess, Op, Status, Submit};
use dma::Seg;

use super::{KINDS, Kind, Rig, dirs, open};

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

const SIZE: u64 = 1 << 20;

/// What a request in flight does to the model, or has read.
struct Pending {
    op: Op,
    offset: u64,
    len: u64,
    data: Vec<u8>,
    segs: Vec<Seg>,
}

/// Cuts `len` bytes into segments of whole sectors, some adjoining, some anywhere to 4 bytes.
fn cut(rng: &mut Random, rig: &Rig, at: &mut u64, len: u64) -> Vec<Seg> {
    let mut segs = Vec::new();
    let mut left = len;
    while left > 0 {
        let most = if segs.len() == 32 { left } else { left.min(512 * (1 + rng.below(24))) };
        match rng.below(4) {
            0 => *at = at.next_multiple_of(4096),
            1 => *at += 4 * rng.below(100),
            _ => {}
        }
        segs.push(rig.region.seg(*at, most as u32).unwrap());
        *at += most;
        left -= most;
    }
    segs
}

fn run(kind: Kind, dir: &std::path::Path, seed: u64) {
    let path = dir.join("disk");
    let mut rng = Random(seed);
    let mut model: Vec<u8> = (0..SIZE).map(|i| (i % 253) as u8).collect();
    // A file that ends within a sector, for a start.
    let mut file_len = 10_000 + rng.below(100_000);
    std::fs::write(&path, &model[..file_len as usize]).unwrap();
    model[file_len as usize..].fill(0);

    let mut rig = Rig::new(kind);
    rig.q.add(open(&path)).unwrap();
    let info = rig.q.info(0).unwrap().clone();
    let block = u64::from(info.block_size);
    let mut patterns = 0u8;
    for _ in 0..40 {
        // Requests of one batch keep to ranges of their own: what overlaps is nobody's promise.
        let mut at = 0;
        let mut pending = Vec::new();
        let mut next = 0;
        while next < SIZE / 2 && pending.len() < 20 {
            let offset = next + block * rng.below(60);
            let len = block * (1 + rng.below(40));
            let offset = (offset * 2).min(SIZE - len) / block * block;
            if offset < next {
                break;
            }
            next = offset + len;
            let (op, flags) = match rng.below(10) {
                0 if info.write_zeroes => (Op::WriteZeroes, Flags::NONE),
                1 if info.write_zeroes => (Op::WriteZeroes, Flags::NO_UNMAP.with(Flags::FUA)),
                2 if info.discard => (Op::Discard, Flags::NONE),
                3 => (Op::Flush, Flags::NONE),
                4 => (Op::Write, Flags::FUA),
                5..=6 => (Op::Write, Flags::NONE),
                _ => (Op::Read, Flags::NONE),
            };
            let mut p = Pending { op, offset, len, data: Vec::new(), segs: Vec::new() };
            if matches!(op, Op::Read | Op::Write) {
                p.segs = cut(&mut rng, &rig, &mut at, len);
                patterns = patterns.wrapping_add(1);
                for s in &p.segs {
                    let bytes: Vec<u8> = (0..s.len()).map(|i| (i / 7) as u8 ^ patterns).collect();
                    rig.region.write_seg(s, &bytes);
                    p.data.extend(bytes);
                }
            }
            let (o, l) = if op == Op::Flush { (0, 0) } else { (offset, len) };
            rig.submit(pending.len() as u16, op, flags, o, l, &p.segs);
            pending.push((p, flags));
        }
        let done = rig.drain();
        assert_eq!(done.len(), pending.len());
        for c in done {
            let (p, flags) = &pending[usize::from(c.tag.slot())];
            let range = p.offset as usize..(p.offset + p.len) as usize;
            if p.op == Op::WriteZeroes && c.status == Status::Unsupported {
                // A file system may punch holes and yet not zero ranges.
                assert!(flags.has(Flags::NO_UNMAP), "{kind:?} seed {seed}");
                continue;
            }
            assert_eq!((c.status, c.detail), (Status::Ok, 0), "{:?} {kind:?} seed {seed}", p.op);
            match p.op {
                Op::Write => model[range].copy_from_slice(&p.data),
                Op::WriteZeroes | Op::Discard => model[range].fill(0),
                Op::Read => {
                    let mut back = Vec::new();
                    for s in &p.segs {
                        let mut bytes = vec![0; s.len() as usize];
                        rig.region.read_seg(s, &mut bytes);
                        back.extend(bytes);
                    }
                    assert!(back == model[range], "read {kind:?} seed {seed} at {:#x}", p.offset);
                }
                Op::Flush => continue,
            }
            if matches!(p.op, Op::Write | Op::WriteZeroes) {
                file_len = file_len.max(p.offset + p.len);
            }
        }
        assert_eq!(rig.q.unit_len(0), file_len, "{kind:?} seed {seed}");
    }
    drop(rig);
    let disk = std::fs::read(&path).unwrap();
    assert!(disk[..] == model[..disk.len()], "{kind:?} seed {seed}");
    assert!(model[disk.len()..].iter().all(|&b| b == 0));
}

#[test]
fn random_requests_agree_with_a_byte_array() {
    for dir in dirs() {
        for kind in KINDS {
            for seed in 1..=3 {
                run(kind, dir.path(), u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
            }
        }
    }
}
