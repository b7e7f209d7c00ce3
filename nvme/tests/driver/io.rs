//! Requests against the model: every operation, every shape of data, every block size.

use crate::common::*;
use block::{BlockQueue, DeviceInfo, Flags, MAX_SEGS, Op, Status, Submit};
use dma::{PageSize, Region, Seg};

/// Fills the data memory with a pattern, and returns what is in `segs`.
fn fill(rig: &Rig, seed: u64, segs: &[Seg]) -> Vec<u8> {
    let bytes = pattern(seed, rig.data.len());
    rig.data.write(0, &bytes);
    gather(rig, segs)
}

fn gather(rig: &Rig, segs: &[Seg]) -> Vec<u8> {
    let mut all = Vec::new();
    for seg in segs {
        let mut part = vec![0; seg.len() as usize];
        rig.data.read_seg(seg, &mut part);
        all.extend(part);
    }
    all
}

/// Writes `segs`, looks at the medium, reads back into the same segments, and sees that nothing
/// around them was touched.
fn round_trip(rig: &mut Rig, offset: u64, segs: &[Seg], what: &str) {
    let want = fill(rig, offset + segs.len() as u64, segs);
    assert_eq!(rig.run(Op::Write, Flags::NONE, 0, offset, segs), Status::Ok, "{what}");
    assert!(rig.peek(1, offset, want.len()) == want, "written: {what}");
    let around = pattern(99, rig.data.len());
    rig.data.write(0, &around);
    assert_eq!(rig.run(Op::Read, Flags::NONE, 0, offset, segs), Status::Ok, "{what}");
    assert!(gather(rig, segs) == want, "read: {what}");
    // Put the old bytes back into the segments: then all must be as it was.
    for seg in segs {
        let at = seg.offset() as usize;
        rig.data.write_seg(seg, &around[at..at + seg.len() as usize]);
    }
    let mut now = vec![0; rig.data.len()];
    rig.data.read(0, &mut now);
    assert!(now == around, "neighbours: {what}");
}

fn small_rig(lba: u32, mdts: u8, layout: Layout) -> Rig {
    let mut setup = Setup::new(lba, "");
    setup.model.mdts = mdts;
    setup.layout = layout;
    let mut rig = setup.open().unwrap();
    rig.data = Region::new(128 << 10, PageSize::Small).unwrap();
    let data = rig.data.clone();
    rig.queue.register(&data).unwrap();
    rig
}

#[test]
fn one_segment_of_every_offset_and_length_under_every_mdts() {
    for layout in [Layout::Contiguous, Layout::Scattered] {
        for (lba, mdts) in [(512, 0), (512, 1), (512, 3), (4096, 1), (4096, 2)] {
            let mut rig = small_rig(lba, mdts, layout);
            for offset in [0, 4, 512, 1024, 2048, 3584, 4092] {
                for blocks in [1, 2, 3, 7, 8, 9, 15, 16, 17, 24] {
                    let seg = [rig.seg(offset, blocks * lba)];
                    let what = format!("{layout:?} lba {lba} mdts {mdts} at {offset} {blocks}");
                    round_trip(&mut rig, u64::from(lba) * 3, &seg, &what);
                }
            }
            assert_eq!(rig.queue.stats().stale_cids, 0);
            assert_eq!(rig.device().dma_faults, 0);
            let most = 4096u64 << mdts;
            assert_eq!(rig.queue.stats().splits > 0, mdts > 0 && 24 * u64::from(lba) > most);
        }
    }
}

#[test]
fn segment_lists_that_prps_can_and_cannot_express() {
    // (offset, length) in units of 512 bytes.
    let shapes: &[&[(u64, u32)]] = &[
        &[(0, 8), (8, 8)],
        &[(0, 8), (16, 8), (40, 8)],
        &[(2, 6), (16, 8), (40, 3)],
        &[(2, 6), (8, 2)],
        &[(0, 4), (4, 4)],
        &[(0, 4), (8, 4)],
        &[(1, 1), (3, 1), (5, 1)],
        &[(0, 8), (17, 7), (24, 1)],
        &[(7, 1), (0, 7)],
        &[(7, 1), (16, 7), (30, 2), (32, 6)],
        &[(0, 7), (64, 1), (9, 24)],
        &[(60, 4), (128, 60)],
    ];
    for layout in [Layout::Contiguous, Layout::Scattered] {
        for (lba, mdts) in [(512, 0), (512, 1), (4096, 1), (4096, 0)] {
            let mut rig = small_rig(lba, mdts, layout);
            let mut ran = 0;
            for shape in shapes {
                let bytes: u32 = shape.iter().map(|s| s.1 * 512).sum();
                if bytes.is_multiple_of(lba) {
                    let segs: Vec<_> =
                        shape.iter().map(|s| rig.seg(s.0 * 512, s.1 * 512)).collect();
                    let what = format!("{layout:?} lba {lba} mdts {mdts} {shape:?}");
                    round_trip(&mut rig, 4096, &segs, &what);
                    ran += 1;
                }
            }
            assert!(ran >= 5, "{ran}");
            assert!(rig.queue.stats().bounces > 0);
            assert_eq!(rig.device().dma_faults, 0);
        }
    }
}

#[test]
fn every_list_of_up_to_three_pieces_of_two_pages() {
    // All segment lists over a tiny domain: pieces of 1 to 9 sectors at six places.
    let mut pieces = Vec::new();
    for at in [0u64, 1, 7, 8, 15, 16] {
        for len in [1u32, 7, 8, 9] {
            pieces.push((at, len));
        }
    }
    let mut rig = small_rig(512, 1, Layout::Contiguous);
    rig.data = Region::new(16 << 10, PageSize::Small).unwrap();
    let data = rig.data.clone();
    rig.queue.register(&data).unwrap();
    let disjoint =
        |a: (u64, u32), b: (u64, u32)| a.0 + u64::from(a.1) <= b.0 || b.0 + u64::from(b.1) <= a.0;
    let mut ran = 0;
    for &a in &pieces {
        for &b in &pieces {
            if !disjoint(a, b) {
                continue;
            }
            let one = [a, b].map(|p| rig.seg(p.0 * 512, p.1 * 512));
            round_trip(&mut rig, 8192, &one, &format!("{a:?} {b:?}"));
            for &c in pieces.iter().step_by(3) {
                if disjoint(a, c) && disjoint(b, c) {
                    let all = [a, b, c].map(|p| rig.seg(p.0 * 512, p.1 * 512));
                    round_trip(&mut rig, 512, &all, &format!("{a:?} {b:?} {c:?}"));
                    ran += 1;
                }
            }
        }
    }
    assert!(ran > 100, "{ran}");
}

#[test]
fn the_most_segments_and_the_longest_requests() {
    for layout in [Layout::Contiguous, Layout::Scattered] {
        for mdts in [1, 5, 0] {
            let mut setup = Setup::new(512, "");
            setup.model.mdts = mdts;
            setup.layout = layout;
            let mut rig = setup.open().unwrap();
            // With holes between them.
            let segs: Vec<_> =
                (0..MAX_SEGS as u64).map(|i| rig.seg(i * 1536, 512 * (1 + i as u32 % 2))).collect();
            let bytes: u32 = segs.iter().map(|s| s.len()).sum();
            assert!(bytes.is_multiple_of(512));
            round_trip(&mut rig, 0, &segs, "the most segments");
            let whole = [rig.seg(512, (3 << 20) + 512)];
            round_trip(&mut rig, 512, &whole, "3 MiB and a sector");
        }
    }
}

#[test]
fn several_namespaces_and_block_sizes() {
    let mut setup = Setup::new(512, "");
    setup.namespaces = vec![disk(1000, 512), disk(1000, 4096), disk(77, 512)];
    let mut rig = setup.open().unwrap();
    let sizes: Vec<_> = (0..3).map(|u| rig.queue.info(u).unwrap().size).collect();
    assert_eq!(sizes, [512_000, 4_096_000, 39_424]);
    assert!(rig.queue.info(3).is_none());
    for unit in 0..3 {
        let segs = [rig.seg(0, 4096)];
        let want = fill(&rig, u64::from(unit), &segs);
        assert_eq!(rig.run(Op::Write, Flags::NONE, unit, 8192, &segs), Status::Ok);
        assert!(rig.peek(u32::from(unit) + 1, 8192, 4096) == want);
    }
    let segs = [rig.seg(0, 4096)];
    assert_eq!(rig.run(Op::Read, Flags::NONE, 3, 0, &segs), Status::Invalid);
    assert_eq!(rig.run(Op::Read, Flags::NONE, 2, 39_424 - 2048, &segs), Status::Invalid);
}

#[test]
fn wrong_requests_are_answered_and_never_sent() {
    let mut rig = Setup::new(4096, "").open().unwrap();
    let stranger = Region::new(8192, PageSize::Small).unwrap();
    let s = |o, l| rig.data.seg(o, l).unwrap();
    let size = 64u64 << 20;
    let cases: Vec<(&str, Op, u64, u64, Vec<Seg>)> = vec![
        ("offset within a block", Op::Read, 512, 4096, vec![s(0, 4096)]),
        ("length within a block", Op::Read, 0, 512, vec![s(0, 512)]),
        ("past the end", Op::Write, size - 4096, 8192, vec![s(0, 8192)]),
        ("at the end", Op::Read, size, 4096, vec![s(0, 4096)]),
        ("offset that overflows", Op::Read, u64::MAX - 4095, 8192, vec![s(0, 8192)]),
        ("no data", Op::Read, 0, 0, vec![]),
        ("fewer bytes than said", Op::Write, 0, 8192, vec![s(0, 4096)]),
        ("more bytes than said", Op::Write, 0, 4096, vec![s(0, 8192)]),
        (
            "too many segments",
            Op::Read,
            0,
            (MAX_SEGS as u64 + 1) * 4096,
            vec![s(0, 4096); MAX_SEGS + 1],
        ),
        ("unknown memory", Op::Read, 0, 4096, vec![stranger.seg(0, 4096).unwrap()]),
        (
            "unknown memory in a long request",
            Op::Write,
            0,
            8192,
            vec![s(0, 512), stranger.seg(0, 7680).unwrap()],
        ),
        ("flush with data", Op::Flush, 0, 0, vec![s(0, 4096)]),
        ("zeroes past the end", Op::WriteZeroes, size - 4096, 8192, vec![]),
        ("zeroes with data", Op::WriteZeroes, 0, 4096, vec![s(0, 4096)]),
        ("discard within a block", Op::Discard, 0, 100, vec![]),
        ("discard that overflows", Op::Discard, 4096, u64::MAX - 4095, vec![]),
    ];
    let before = rig.queue.stats().submitted;
    for (what, op, offset, len, segs) in cases {
        let tag = rig.send_len(op, Flags::NONE, 0, offset, len, &segs);
        assert!(rig.done.iter().all(|c| c.tag != tag), "never inline: {what}");
        rig.poll();
        assert_eq!(rig.done.len(), 1, "{what}");
        assert_eq!(rig.answer(tag).status, Status::Invalid, "{what}");
        rig.done.clear();
    }
    assert_eq!(rig.queue.stats().submitted, before);
    assert_eq!(rig.queue.in_flight(), 0);
    assert_eq!(rig.queue.stats().errors[Status::Invalid as usize], 16);
}

#[test]
fn flush_without_a_cache_is_no_command() {
    let mut rig = Setup::new(512, "").open().unwrap();
    assert!(!rig.queue.info(0).unwrap().volatile_cache);
    let tag = rig.send_len(Op::Flush, Flags::NONE, 0, 0, 0, &[]);
    assert_eq!(rig.queue.in_flight(), 1);
    assert_eq!(rig.poll(), 1, "in the next poll");
    assert_eq!(rig.answer(tag).status, Status::Ok);
    assert_eq!((rig.queue.stats().submitted, rig.device().flushes), (0, 0));
}

#[test]
fn flush_and_fua_with_a_cache() {
    let mut setup = Setup::new(512, "");
    setup.model.vwc = true;
    let mut rig = setup.open().unwrap();
    assert!(rig.queue.info(0).unwrap().volatile_cache);
    let segs = [rig.seg(0, 4096)];
    rig.run(Op::Write, Flags::NONE, 0, 0, &segs);
    assert_eq!(rig.device().fua_writes, 0);
    rig.run(Op::Write, Flags::FUA, 0, 4096, &segs);
    assert_eq!(rig.device().fua_writes, 1);
    assert_eq!(rig.run_len(Op::WriteZeroes, Flags::FUA, 0, 4096), Status::Ok);
    assert_eq!(rig.device().fua_writes, 2);
    assert_eq!(rig.run_len(Op::Flush, Flags::NONE, 0, 0), Status::Ok);
    assert_eq!(rig.device().flushes, 1);
    // A long request carries it on every command.
    let long = [rig.seg(0, 512 << 10)];
    rig.run(Op::Write, Flags::FUA, 0, 0, &long);
    assert_eq!(rig.device().fua_writes, 6);
}

#[test]
fn a_flush_that_returned_survives_a_power_cut() {
    for seed in 0..20 {
        let mut setup = Setup::new(512, "");
        setup.model.vwc = true;
        let mut rig = setup.open().unwrap();
        let segs = [rig.seg(0, 8192)];
        let want = fill(&rig, seed, &segs);
        rig.run(Op::Write, Flags::NONE, 0, 4096, &segs);
        rig.run_len(Op::Flush, Flags::NONE, 0, 0);
        let fua = fill(&rig, seed + 100, &segs);
        rig.run(Op::Write, Flags::FUA, 0, 1 << 20, &segs);
        rig.world.model.borrow_mut().power_cut(seed).unwrap();
        assert!(rig.peek(1, 4096, 8192) == want);
        assert!(rig.peek(1, 1 << 20, 8192) == fua);
    }
}

#[test]
fn write_zeroes_of_any_length() {
    for lba in [512u32, 4096] {
        let mut rig = Setup::new(lba, "").open().unwrap();
        let block = u64::from(lba);
        let most = block << 16;
        let size = 64 << 20;
        let segs = [rig.seg(0, 1 << 20)];
        let bytes = fill(&rig, 1, &segs);
        for (offset, len) in
            [(block, block), (4096, 1 << 20), (0, most.min(size)), (block * 3, size - block * 5)]
        {
            for at in (0..size).step_by(1 << 20) {
                rig.turn_until(SECOND, |r| r.queue.room() > 0);
                rig.send(Op::Write, Flags::NONE, 0, at, &segs);
            }
            rig.drain();
            let before = rig.device();
            assert_eq!(rig.run_len(Op::WriteZeroes, Flags::NONE, offset, len), Status::Ok);
            let d = rig.device().since(&before);
            assert_eq!((d.write_zeroes, d.zeroed_bytes), (len.div_ceil(most), len));
            let all = rig.peek(1, 0, size as usize);
            for (i, got) in all.chunks(512).enumerate() {
                let at = i * 512;
                let inside = (offset..offset + len).contains(&(at as u64));
                let old = &bytes[at % (1 << 20)..][..512];
                assert!(if inside { got == [0; 512] } else { got == old }, "{offset} {len} {at}");
            }
        }
        assert_eq!(rig.run_len(Op::WriteZeroes, Flags::NO_UNMAP, 0, 4096), Status::Ok);
        assert_eq!(rig.run_len(Op::WriteZeroes, Flags::FAST_ONLY, 0, 4096), Status::Ok);
        assert_eq!(rig.run_len(Op::WriteZeroes, Flags::NONE, 4096, 0), Status::Ok);
    }
}

#[test]
fn discard() {
    let mut rig = Setup::new(512, "").open().unwrap();
    assert!(rig.queue.info(0).unwrap().discard);
    let segs = [rig.seg(0, 1 << 20)];
    fill(&rig, 5, &segs);
    rig.run(Op::Write, Flags::NONE, 0, 0, &segs);
    assert_eq!(rig.run_len(Op::Discard, Flags::NONE, 4096, 8192), Status::Ok);
    let d = rig.device();
    assert_eq!((d.deallocations, d.deallocated_bytes), (1, 8192));
    assert!(rig.peek(1, 4096, 8192).iter().all(|&b| b == 0), "as the model says it reads");
    let mut edge = [0; 4096];
    rig.data.read(0, &mut edge);
    assert!(rig.peek(1, 0, 4096) == edge);
}

#[test]
fn a_discard_longer_than_one_range_can_say() {
    // 2^33 blocks: more than the 32 bits of a range's length.
    let mut setup = Setup::new(512, "");
    setup.namespaces = vec![disk(1 << 33, 512)];
    let mut rig = setup.open().unwrap();
    let len = (1u64 << 33) * 512;
    assert_eq!(rig.run_len(Op::Discard, Flags::NONE, 0, len), Status::Ok);
    let d = rig.device();
    assert_eq!((d.deallocations, d.deallocated_bytes), (4, len));
    let tag = rig.send_len(Op::Discard, Flags::NONE, 0, 512, len - 1024, &[]);
    rig.drain();
    assert_eq!(rig.answer(tag).status, Status::Ok);
}

#[test]
fn what_the_device_lacks_is_unsupported() {
    let mut setup = Setup::new(512, "");
    setup.model.write_zeroes = false;
    setup.model.dsm = false;
    let mut rig = setup.open().unwrap();
    let info: &DeviceInfo = rig.queue.info(0).unwrap();
    assert!(!info.write_zeroes && !info.discard);
    for op in [Op::WriteZeroes, Op::Discard] {
        assert_eq!(rig.run_len(op, Flags::NONE, 0, 4096), Status::Unsupported);
    }
    assert_eq!(rig.queue.stats().submitted, 0);
}

#[test]
fn a_read_only_namespace() {
    let mut setup = Setup::new(512, "");
    setup.namespaces[0].read_only = true;
    let mut rig = setup.open().unwrap();
    assert!(rig.queue.info(0).unwrap().read_only);
    let segs = [rig.seg(0, 4096)];
    assert_eq!(rig.run(Op::Read, Flags::NONE, 0, 0, &segs), Status::Ok);
    assert_eq!(rig.run(Op::Write, Flags::NONE, 0, 0, &segs), Status::ReadOnly);
    let long = [rig.seg(0, 1 << 20)];
    assert_eq!(rig.run(Op::Write, Flags::NONE, 0, 0, &long), Status::ReadOnly);
    for op in [Op::WriteZeroes, Op::Discard] {
        assert_eq!(rig.run_len(op, Flags::NONE, 0, 4096), Status::ReadOnly);
    }
    assert_eq!(rig.run_len(Op::Flush, Flags::NONE, 0, 0), Status::Ok);
    assert_eq!(rig.queue.stats().submitted, 1);
}

#[test]
fn the_control_path_reads_and_writes_through_it() {
    let mut rig = Setup::new(4096, "").open().unwrap();
    use block::{BlockQueue, Completions, Full, LeafAccess, Request, Storage};
    use std::sync::Arc;

    /// A queue pair whose device is turned in every poll.
    struct Turned(nvme::QueuePair<TestBar>, std::rc::Rc<World>);
    impl Submit for Turned {
        fn info(&self, unit: u16) -> Option<&DeviceInfo> {
            self.0.info(unit)
        }
        fn room(&self) -> usize {
            self.0.room()
        }
        fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
            self.0.submit(r)
        }
    }
    impl BlockQueue for Turned {
        fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
            self.0.register(region)
        }
        fn poll(&mut self, out: &mut Completions) -> usize {
            self.1.turn();
            self.0.poll(out)
        }
        fn in_flight(&self) -> usize {
            self.0.in_flight()
        }
        fn arm(&mut self) -> block::HasWork {
            self.0.arm()
        }
    }
    impl LeafAccess for Turned {
        fn unit_len(&self, unit: u16) -> u64 {
            self.0.unit_len(unit)
        }
        fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
            self.0.set_unit_len(unit, len)
        }
    }

    let world = rig.world.clone();
    let data = pattern(3, 5_000_001);
    let mut storage = block::Blocking::new(Turned(rig.queue, world.clone()), 0).unwrap();
    assert_eq!((storage.len(), storage.capacity()), (64 << 20, 64 << 20));
    storage.write_at(12_345, &data).unwrap();
    let mut back = vec![0; data.len()];
    storage.read_at(12_345, &mut back).unwrap();
    assert!(back == data);
    storage.write_zeroes_at(1 << 20, 2 << 20).unwrap();
    storage.read_at(1 << 20, &mut back[..4096]).unwrap();
    assert!(back[..4096].iter().all(|&b| b == 0));
    storage.flush().unwrap();
    storage.set_len(1).unwrap();
    // The memory of the control path is let go of once the queue is used without it.
    rig.queue = storage.into_leaf().0;
    let pages = rig.memory.mapped_pages();
    for _ in 0..3 {
        let other = Region::new(4096, PageSize::Small).unwrap();
        rig.queue.register(&other).unwrap();
        world.turn();
        rig.poll();
    }
    assert!(rig.memory.mapped_pages() < pages - 200);
}
