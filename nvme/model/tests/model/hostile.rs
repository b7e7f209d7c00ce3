//! A host that writes anything anywhere: the device must neither panic nor hang nor take memory
//! without bound, and must still work after a reset.

use nvme_model::Options;
use nvme_spec::{Sqe, offset};
use zerocopy::IntoBytes;

use crate::host::*;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Small numbers, edges, and anything.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => self.below(100),
            2 => u64::MAX - self.below(3),
            3 => 1 << self.below(64),
            4 => bus(DATA) + self.below(DATA_LEN as u64),
            _ => self.next(),
        }
    }

    /// Mostly memory that is there and aligned as it should be.
    fn address(&mut self) -> u64 {
        match self.below(12) {
            0 => bus(LISTS) + (self.below(512) << 3),
            1 => bus(DATA) + self.below(DATA_LEN as u64),
            2 => bus(sq_at(1)) + (self.below(40) << 12),
            3 => self.value(),
            _ => bus(DATA) + (self.below(1000) << 12),
        }
    }

    /// Mostly a command that could be meant.
    fn sqe(&mut self) -> Sqe {
        let opcode = match self.below(8) {
            0 => self.next() as u8,
            _ => [0, 1, 1, 2, 2, 4, 5, 6, 8, 9, 10, 12][self.below(12) as usize],
        };
        let nsid = [1, 1, 1, 1, 2, 0, 3, u32::MAX][self.below(8) as usize];
        let mut sqe =
            Sqe::new(opcode, self.below(20) as u16, nsid).with_prps(self.address(), self.address());
        if self.below(4) == 0 {
            for i in 0..6 {
                sqe = sqe.with_cdw(i, self.value() as u32);
            }
        } else {
            let longest = [8, 16, 300][self.below(3) as usize];
            sqe = sqe.with_cdw(0, self.below(2048) as u32);
            sqe = sqe.with_cdw(2, self.below(longest) as u32 | (self.below(2) as u32) << 30);
        }
        if self.below(20) == 0 {
            sqe.cdw0 = (self.next() as u32).into();
        }
        sqe
    }
}

/// Takes what completions there seem to be; the rings may have been overwritten.
fn drain(host: &mut Host, qid: u16) {
    for _ in 0..64 {
        let pair = host.pair(qid);
        let (entries, head, phase) = (pair.entries, pair.head, pair.phase);
        let [_, high] = host.region.read_words::<2>(cq_at(qid) + head as usize * 16);
        if (high >> 48 & 1 == 1) != phase {
            break;
        }
        let pair = host.pair(qid);
        pair.head = (head + 1) % entries;
        pair.phase ^= pair.head == 0;
    }
    host.ring_head(qid);
}

/// Resets and brings queue pair 1 back, as far as the device lets us.
fn revive(host: &mut Host) {
    host.disable();
    let _ = host.try_enable(32);
    host.region.zero(cq_at(1), 64 * 16);
    host.submit(0, &Sqe::create_io_cq(1, 1, 64, bus(cq_at(1)), None));
    host.submit(0, &Sqe::create_io_sq(2, 1, 64, bus(sq_at(1)), 1));
    host.ring_tail(0);
    for _ in 0..10 {
        host.step();
    }
    drain(host, 0);
    host.pairs.push(Pair { qid: 1, entries: 64, tail: 0, head: 0, phase: true });
}

#[test]
fn anything_goes() {
    let faults = "dup:every=7;badcid:every=11;delay=3:every=5;lost:every=13;resize=50:nth=400;\
                  status=281:every=17;badsqid:every=19;delay=2:op=admin,every=9";
    let (mut reads, mut writes, mut changes, mut errors, mut faulted) = (0, 0, 0, 0, 0);
    for seed in 0..60u64 {
        let mut rng = Rng(seed);
        let options = Options {
            vwc: seed % 2 == 0,
            mdts: [0, 1, 5][seed as usize % 3],
            mpsmax: [0, 4][seed as usize % 2],
            shuffle: (seed % 3 == 0).then_some(seed),
            cache_bytes: 1 << 16,
            faults: if seed % 4 == 0 { faults } else { "" }.parse().unwrap(),
            ..Options::default()
        };
        let mut host = Host::cold(options, vec![disk(2048, 512), disk(256, 4096)]);
        revive(&mut host);
        for round in 0..600 {
            match rng.below(40) {
                0..=25 => {
                    let qid = u16::from(rng.below(8) != 0);
                    let sqe = rng.sqe();
                    host.submit(qid, &sqe);
                    host.ring_tail(qid);
                }
                26..=33 => {
                    host.step();
                    drain(&mut host, 1);
                    drain(&mut host, 0);
                }
                34 => host.regs.write32(offset::DOORBELLS + rng.below(16) * 4, rng.value() as u32),
                35 => {
                    let at = rng.below(LISTS as u64 / 8) as usize * 8;
                    host.region.write(at, &rng.address().to_le_bytes());
                }
                36 => {
                    // PRP lists, right and wrong.
                    for slot in 0..512 {
                        host.region.write(LISTS + slot * 8, &rng.address().to_le_bytes());
                    }
                }
                37 if rng.below(8) == 0 => {
                    host.regs.write32(rng.below(0x60), rng.value() as u32);
                }
                38 if rng.below(8) == 0 => host.ctl.power_cut(rng.next()).unwrap(),
                _ => {
                    host.step();
                }
            }
            if round % 60 == 59 {
                revive(&mut host);
            }
        }
        for _ in 0..50 {
            host.step();
        }
        let stats = host.ctl.stats().snapshot();
        reads += stats.reads;
        writes += stats.writes;
        changes += stats.write_zeroes + stats.deallocations;
        errors += stats.errors;
        faulted += stats.dma_faults;
        // Still alive after a reset.
        host.disable();
        assert_eq!(host.csts().0, 0, "seed {seed}");
        host.enable(32);
        let id = Sqe::identify(1, nvme_spec::Cns::Controller, 0).with_prps(bus(DATA), 0);
        if seed % 4 != 0 {
            host.ok(0, id);
        }
    }
    // The test itself is alive: every way of a command is well trodden.
    let trodden = [reads, writes, changes, errors, faulted];
    assert!(trodden.iter().all(|&n| n > 100), "{trodden:?}");
}

/// Zeroing and deallocating everything in a huge namespace must not be a matter of blocks: this
/// would take hours if it were.
#[test]
fn zeroing_everything_is_quick() {
    let options = Options { vwc: true, cache_bytes: 1 << 20, ..Options::default() };
    let mut host = Host::new(options, vec![disk(1 << 50, 512)]);
    let range = nvme_spec::DsmRange { blocks: u32::MAX.into(), ..Default::default() };
    host.region.write(DATA, [range; 256].as_bytes());
    for i in 0..50u64 {
        host.ok(1, Sqe::deallocate(1, 1, 255).with_prps(bus(DATA), 0));
        host.ok(1, Sqe::write_zeroes(1, 1, i << 20, 0xffff, 0));
        host.ok(1, Sqe::write_zeroes(1, 1, i << 20, 0xfff, 0));
    }
}
