//! Regions come and go while a queue lives.

use std::sync::Arc;
use std::time::Duration;

use block::{BlockQueue, Completions, Flags, HasWork, Op, Status};
use dma::{Held, PageSize, Region, RegionId, Seg};

use super::{KINDS, Kind, Rig, open};

/// A queue to a file of 1 MiB, whose bytes are `0x42`.
fn rig(kind: Kind, dir: &tempfile::TempDir) -> Rig {
    let path = dir.path().join(format!("{kind:?}"));
    std::fs::write(&path, vec![0x42; 1 << 20]).unwrap();
    let mut rig = Rig::new(kind);
    rig.q.add(open(&path)).unwrap();
    rig
}

fn region(len: usize) -> Arc<Region> {
    Region::new(len, PageSize::Small).unwrap()
}

/// One request; how it ended.
fn io(rig: &mut Rig, op: Op, offset: u64, seg: Seg) -> Status {
    rig.submit(0, op, Flags::NONE, offset, seg.len().into(), &[seg]);
    let all = rig.drain();
    assert_eq!(all.len(), 1);
    all[0].status
}

/// Has a queue look for what it can let go of: tells it of one more region.
fn look(rig: &mut Rig) {
    let other = region(4096);
    rig.q.register(&other).unwrap();
}

#[test]
fn ten_thousand_regions_pass_through_a_queue() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let mut rig = rig(kind, &dir);
        let before = rig.q.kernel.pinned(0).1;
        let mut numbers = vec![0u8; RegionId::MAX];
        // Every so often one stays for a while, so that they do not all get the same address.
        let mut stay = Vec::new();
        for i in 0..10_000u32 {
            let r = region(8192);
            numbers[r.id().index()] += 1;
            rig.q.register(&r).unwrap();
            let (mark, at) = (i.to_le_bytes(), u64::from(i % 128) * 8192);
            r.write(0, &mark.repeat(1024));
            // In one piece: from memory that is pinned. Then in two: by a list.
            assert_eq!(io(&mut rig, Op::Write, at, r.seg(0, 4096).unwrap()), Status::Ok);
            r.write(0, &[0; 8192]);
            if i % 16 == 0 {
                let halves = [r.seg(4096, 2048).unwrap(), r.seg(0, 2048).unwrap()];
                rig.submit(0, Op::Read, Flags::NONE, at, 4096, &halves);
                assert_eq!(rig.drain()[0].status, Status::Ok);
            } else {
                assert_eq!(io(&mut rig, Op::Read, at, r.seg(4096, 4096).unwrap()), Status::Ok);
            }
            let mut back = [0; 4];
            r.read(4096, &mut back);
            assert_eq!(back, mark, "{kind:?}: the memory of this region and no other");
            if i % 100 == 0 {
                stay.push(r);
                stay.truncate(20);
            }
        }
        assert!(numbers.iter().any(|&n| n > 1), "numbers came again");
        drop(stay);
        look(&mut rig);
        look(&mut rig);
        assert!(rig.q.kernel.pinned(0).1 <= before + 3 * 4096, "{kind:?}");
    }
}

#[test]
fn queues_let_go_of_a_region_each_for_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut rigs = [rig(Kind::Uring, &dir), rig(Kind::Aio, &dir), rig(Kind::Uring, &dir)];
    let r = region(8192);
    let (held, seg) = (Held::new(&r), r.seg(0, 4096).unwrap());
    rigs.iter_mut().for_each(|rig| rig.q.register(&r).unwrap());
    let user = r.clone();
    drop(r);
    rigs.iter_mut().for_each(look);
    assert_eq!(held.tables(), 4, "it has a user");
    drop(user);
    for at in 0..3 {
        look(&mut rigs[at]);
        assert_eq!(held.tables(), 3 - at);
        for (i, rig) in rigs.iter_mut().enumerate() {
            let expected = if i <= at { Status::Invalid } else { Status::Ok };
            assert_eq!(io(rig, Op::Read, 0, seg), expected);
        }
    }
}

#[test]
fn a_region_stays_while_a_request_in_work_names_it() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        for sent in [false, true] {
            let mut rig = rig(kind, &dir);
            let r = region(64 << 10);
            let held = Held::new(&r);
            rig.q.register(&r).unwrap();
            // In one piece, and by a list of pieces of which the last is another region's.
            rig.submit(0, Op::Read, Flags::NONE, 0, 4096, &[r.seg(0, 4096).unwrap()]);
            let list = [r.seg(8192, 4096).unwrap(), rig.region.seg(0, 4096).unwrap()];
            rig.submit(1, Op::Read, Flags::NONE, 0, 8192, &list);
            if sent {
                let mut full = Completions::new();
                while full.room() > 0 {
                    let tag = block::Tag::new(9, 9, 9);
                    full.push(block::Completion { tag, status: Status::Ok, detail: 0 });
                }
                rig.q.poll(&mut full);
            }
            drop(r);
            look(&mut rig);
            look(&mut rig);
            assert_eq!(held.tables(), 2, "{kind:?}");
            let done = rig.drain();
            assert!(done.len() == 2 && done.iter().all(|c| c.status == Status::Ok));
            let mut back = vec![0; 64 << 10];
            held.read(0, &mut back);
            assert!(back[..4096].iter().chain(&back[8192..12288]).all(|&b| b == 0x42));
            assert!(back[4096..8192].iter().chain(&back[12288..]).all(|&b| b == 0));
            // Before it sleeps, a queue looks too.
            assert_eq!(rig.q.arm(), HasWork::No);
            assert_eq!(held.tables(), 1, "{kind:?}: the slots' lists are no reason");
        }
    }
}

#[test]
fn a_region_stays_while_a_bounce_buffer_stands_for_it() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let mut rig = rig(kind, &dir);
        if !rig.q.is_direct(0) {
            eprintln!("skipped: no direct I/O on the file system of temporary files");
            return;
        }
        let r = region(1 << 20);
        let held = Held::new(&r);
        rig.q.register(&r).unwrap();
        // More than there are buffers: some wait, before and after the first poll.
        for i in 0..16u16 {
            let seg = r.seg(u64::from(i) * 65_536 + 1, 61_440).unwrap();
            rig.submit(i, Op::Read, Flags::NONE, 0, 61_440, &[seg]);
        }
        drop(r);
        look(&mut rig);
        assert_eq!(held.tables(), 2);
        let mut left = 16;
        while left > 0 {
            let mut out = Completions::new();
            left -= rig.q.poll(&mut out);
            assert!(out.iter().all(|c| c.status == Status::Ok));
            look(&mut rig);
            assert!(left == 0 || held.tables() == 2, "{kind:?}");
        }
        assert_eq!(held.tables(), 1);
        for i in 0..16 {
            let mut back = vec![0; 61_440 + 2];
            held.read(i * 65_536, &mut back);
            assert_eq!((back[0], back[61_441]), (0, 0));
            assert!(back[1..61_441].iter().all(|&b| b == 0x42), "{kind:?}");
        }
    }
}

#[test]
fn a_stale_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let mut rig = rig(kind, &dir);
        let r = region(8192);
        rig.q.register(&r).unwrap();
        let seg = r.seg(0, 4096).unwrap();
        assert_eq!(io(&mut rig, Op::Read, 0, seg), Status::Ok);
        drop(r);
        look(&mut rig);
        for op in [Op::Read, Op::Write] {
            assert_eq!(io(&mut rig, op, 0, seg), Status::Invalid, "{kind:?}");
        }
        // A unit that is closed is an occasion as well.
        let r = region(8192);
        let held = Held::new(&r);
        rig.q.register(&r).unwrap();
        drop(r);
        rig.q.close_unit(0).unwrap();
        assert_eq!(held.tables(), 1);
    }
}

/// Bytes that the kernel has pinned for this process.
fn pinned() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[test]
fn pinned_memory_comes_back() {
    // Larger than what all tests beside this one pin together.
    const LEN: usize = 128 << 20;
    let dir = tempfile::tempdir().unwrap();
    let mut rig = rig(Kind::Uring, &dir);
    let (own, before) = (rig.q.kernel.pinned(0).1, pinned());
    let r = region(LEN);
    let id = r.id().index();
    rig.q.register(&r).unwrap();
    if rig.q.kernel.pinned(id) != (true, own + LEN) {
        assert_eq!(
            rig.q.kernel.pinned(id),
            (false, own),
            "nothing is taken for what is not pinned"
        );
        eprintln!("skipped: this process may not pin {LEN} bytes, or the kernel pins none");
        return;
    }
    assert!(pinned() >= before + LEN / 2);
    assert_eq!(io(&mut rig, Op::Read, 0, r.seg(4096, 4096).unwrap()), Status::Ok);
    drop(r);
    look(&mut rig);
    assert_eq!(rig.q.kernel.pinned(id), (false, own + 4096), "the one to look with is pinned");
    // Kernels before 6.13 take their time.
    let mut looks = 0;
    while pinned() >= before + LEN / 2 {
        looks += 1;
        assert!(looks < 1000, "{} bytes stay pinned", pinned());
        std::thread::sleep(Duration::from_millis(20));
    }
}
