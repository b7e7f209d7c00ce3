//! Data through a ring: every ABI, order and way of reaching the guest's pages.

use std::collections::HashMap;

use crate::common::{DISK, Pair, Rng, setup};
use blkif::abi::{OKAY, PAGE, READ, WRITE};
use blkif::{Abi, Setup};
use block::{Op, Status};

/// Both ABIs, all orders, with and without persistent grants.
fn all_setups() -> impl Iterator<Item = Setup> {
    Abi::ALL.into_iter().flat_map(|abi| {
        (0..=4).flat_map(move |order| [false, true].map(|persistent| setup(abi, order, persistent)))
    })
}

/// Fills the ring with random requests, again and again, beside a copy of what the disk should
/// hold; completions come out of order. Requests under way at a time never overlap.
fn random_io(setup: Setup, rounds: usize, seed: u64) -> Pair {
    let mut p = Pair::new(setup);
    p.disk.shuffle = Some(Rng(seed ^ 0xabcd));
    let mut rng = Rng(seed);
    let mut model = vec![0u8; DISK as usize];
    let slots = p.frontend.room() as u64;
    // Each request of a round has a part of the disk of its own.
    let share = DISK / 512 / slots;
    let mut buffer = vec![0; 128 << 10];
    let mut seen = vec![false; slots as usize];
    for _ in 0..rounds {
        let count = rng.below(slots) + 1;
        let mut expected = Vec::new();
        for i in 0..count {
            let most = share.min(u64::from(p.frontend.max_bytes()) / 512);
            let n = if rng.one_in(3) { rng.below(most) + 1 } else { 8.min(most) };
            let sector = i * share + rng.below(share - n + 1);
            let range = (sector * 512) as usize..((sector + n) * 512) as usize;
            if rng.one_in(2) {
                let data = rng.bytes(range.len());
                p.frontend.write(i, sector, &data).unwrap();
                model[range.clone()].copy_from_slice(&data);
            } else {
                p.frontend.read(i, sector, range.len() as u32).unwrap();
            }
            expected.push(range);
        }
        p.frontend.push();
        seen.fill(false);
        let mut left = count;
        let mut turns = 0;
        while left > 0 {
            p.turn();
            while let Some(done) = p.frontend.reap(&mut buffer).unwrap() {
                let range = expected[done.cookie as usize].clone();
                assert_eq!(done.status, OKAY);
                assert_eq!(done.len as usize, range.len());
                assert!(!seen[done.cookie as usize], "answered twice");
                seen[done.cookie as usize] = true;
                if done.operation == READ {
                    assert!(buffer[..range.len()] == model[range], "wrong data");
                }
                left -= 1;
            }
            turns += 1;
            assert!(turns < 10_000, "{left} requests are not answered");
        }
    }
    assert!(p.disk.bytes(0, DISK as usize) == model);
    p
}

#[test]
fn random_requests_in_every_setup() {
    for (i, s) in all_setups().enumerate() {
        let p = random_io(s, 12, 77 + i as u64);
        let stats = p.backend.stats();
        assert_eq!((stats.errors.get(), stats.strays.get(), stats.ring_stops.get()), (0, 0, 0));
        assert_eq!(stats.page_hits() > 0, s.persistent);
        assert_eq!(
            stats.indirect.get() > 0,
            s.order <= 2,
            "the share of a request is large enough"
        );
    }
}

#[test]
fn indices_wrap_at_their_width() {
    for (i, s) in all_setups().enumerate() {
        let slots = s.abi.slots(s.order);
        let start = u32::MAX - slots - 5 * i as u32;
        random_io(Setup { start, ..s }, 8, 1000 + i as u64);
    }
}

#[test]
fn the_disk_is_told_where_requests_go_before_they_come() {
    for abi in Abi::ALL {
        let mut p = Pair::new(setup(abi, 0, true));
        let sectors = [8u64, 0, 1600, 24, 9000];
        for (n, &sector) in sectors.iter().enumerate() {
            p.frontend.read(n as u64, sector, PAGE as u32).unwrap();
        }
        // So many fit now: no more are spoken of.
        p.disk.max_in_flight = 3;
        p.frontend.push();
        p.turn();
        let offsets = sectors.map(|s| s * 512);
        assert_eq!(*p.disk.expected.borrow(), sectors[..3], "{abi:?}");
        assert_eq!(p.disk.log.iter().map(|s| s.offset).collect::<Vec<_>>(), offsets[..3]);
        assert_eq!(p.run().len(), 5);
        assert_eq!(p.disk.expected.borrow()[3..], sectors[3..], "{abi:?}");
    }
}

#[test]
fn partial_pages_anywhere() {
    for persistent in [false, true] {
        for abi in Abi::ALL {
            let mut p = Pair::new(setup(abi, 0, persistent));
            let mut rng = Rng(5);
            for count in [1usize, 2, 3, 11, 12, 31, 32] {
                for _ in 0..4 {
                    let parts: Vec<(u8, u8)> = (0..count)
                        .map(|_| {
                            let first = rng.below(8) as u8;
                            (first, first + rng.below(8 - u64::from(first)) as u8)
                        })
                        .collect();
                    let sectors: u64 = parts.iter().map(|p| u64::from(p.1 - p.0) + 1).sum();
                    let len = sectors as usize * 512;
                    let data = rng.bytes(len);
                    let sector = rng.below(DISK / 512 - sectors);
                    p.frontend.write_parts(1, sector, &parts, &data).unwrap();
                    assert_eq!(p.one(), OKAY);
                    assert!(p.disk.bytes(sector * 512, len) == data);
                    p.disk.fill(0x3c);
                    p.disk.inner.data().write(sector as usize * 512, &data);
                    p.frontend.read_parts(1, sector, &parts).unwrap();
                    let (status, back) = p.finish_read(len);
                    assert_eq!(status, OKAY);
                    assert!(back == data);
                    // A request goes down as one segment, whatever it was made of.
                    assert_eq!(p.disk.log.len(), 2);
                    assert!(p.disk.log.iter().all(|s| s.len == len as u64));
                    p.disk.log.clear();
                }
            }
        }
    }
}

#[test]
fn long_lists_of_segments_fill_several_pages() {
    for persistent in [false, true] {
        let s = Setup { max_segments: 1100, ..setup(Abi::NATIVE, 0, persistent) };
        let change = |c: &mut blkif::Config| {
            c.max_indirect_segments = 1025;
            c.large_buffers = 2;
        };
        let mut p = Pair::with(s, change);
        let mut rng = Rng(9);
        for count in [12usize, 511, 512, 513, 1024, 1025] {
            let data = rng.bytes(count * 4096);
            assert_eq!(p.write(8, &data), OKAY);
            assert!(p.disk.bytes(4096, data.len()) == data);
            let (status, back) = p.read(8, data.len());
            assert_eq!(status, OKAY);
            assert!(back == data);
        }
        // One more than offered.
        assert_eq!(p.write(8, &vec![0; 1026 * 4096]), blkif::abi::ERROR);
        assert_eq!(p.backend.stats().bad_requests.get(), 1);
    }
}

#[test]
fn large_buffers_run_out_and_the_ring_waits() {
    for persistent in [false, true] {
        let mut p = Pair::with(setup(Abi::NATIVE, 0, persistent), |c| c.large_buffers = 3);
        p.disk.hold = true;
        for i in 0..32 {
            let data = vec![i as u8 + 1; if i < 16 { 8192 } else { 65536 }];
            p.frontend.write(i, i * 128, &data).unwrap();
        }
        p.frontend.push();
        p.turns(10);
        assert_eq!(block::BlockQueue::in_flight(&p.disk), 3);
        p.disk.hold = false;
        let all = p.run();
        assert_eq!(all.len(), 32);
        assert_eq!(
            p.disk.expected.borrow().len(),
            32,
            "each is told of once, however long it waits"
        );
        assert!(all.iter().all(|d| d.status == OKAY && d.operation == WRITE));
        for i in 0..32u64 {
            assert!(p.disk.bytes(i * 65536, 8192).iter().all(|&b| b == i as u8 + 1));
        }
    }
}

#[test]
fn a_disk_without_room_leaves_requests_in_the_ring() {
    for persistent in [false, true] {
        let mut p = Pair::new(setup(Abi::NATIVE, 0, persistent));
        p.disk.max_in_flight = 2;
        for round in 0..4u8 {
            for i in 0..32u64 {
                if i % 5 == 0 {
                    p.frontend.flush(i, i * 8, &[round ^ i as u8; 4096]).unwrap();
                } else {
                    p.frontend.write(i, i * 8, &[round ^ i as u8; 4096]).unwrap();
                }
            }
            assert!(p.run().iter().all(|d| d.status == OKAY));
            for i in 0..32u64 {
                assert!(p.disk.bytes(i * 4096, 4096).iter().all(|&b| b == round ^ i as u8));
            }
        }
    }
}

#[test]
fn copies_of_a_turn_go_in_one_batch() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, false));
    for i in 0..16 {
        p.frontend.write(i, i * 64, &[1; 4096 * 3]).unwrap();
        p.frontend.read(100 + i, 4096 + i * 64, 4096 * 3).unwrap();
    }
    p.frontend.push();
    let stats = p.backend.stats();
    p.turn();
    assert_eq!((stats.copy_batches.get(), stats.copy_ops.get()), (1, 48));
    p.turn();
    assert_eq!((stats.copy_batches.get(), stats.copy_ops.get()), (2, 96));
    p.turn();
    let mut n = 0;
    while p.reap().is_some() {
        n += 1;
    }
    assert_eq!(n, 32);
    // Indirect: the lists in one turn, the data in the next, each with all others of that turn.
    for i in 0..16 {
        p.frontend.write(i, i * 256, &[2; 4096 * 32]).unwrap();
    }
    p.frontend.push();
    p.turn();
    assert_eq!((stats.copy_batches.get(), stats.copy_ops.get()), (3, 96 + 16));
    p.turn();
    assert_eq!((stats.copy_batches.get(), stats.copy_ops.get()), (4, 96 + 16 + 512));
    assert!(p.run().iter().all(|d| d.status == OKAY));
    assert_eq!(stats.copy_batches.get(), 4);
}

#[test]
fn warm_persistent_grants_need_no_copies() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, true));
    let stats = p.backend.stats();
    let round = |p: &mut Pair| {
        for i in 0..32 {
            match i % 3 {
                0 => p.frontend.read(i, i * 256, 4096).unwrap(),
                1 => p.frontend.write(i, i * 256, &[1; 4096]).unwrap(),
                _ => p.frontend.write(i, i * 256, &[1; 32 * 4096]).unwrap(),
            }
        }
        assert!(p.run().iter().all(|d| d.status == OKAY));
    };
    round(&mut p);
    round(&mut p);
    assert!(stats.copy_batches.get() > 0 && stats.pages_mapped.get() > 0);
    let (calls, misses, hits) =
        (stats.copy_batches.get(), stats.page_misses.get(), stats.page_hits());
    for _ in 0..10 {
        round(&mut p);
    }
    assert_eq!((stats.copy_batches.get(), stats.page_misses.get()), (calls, misses));
    // 11 reads, 11 short writes, 10 of 32 pages and a list.
    assert_eq!(stats.page_hits() - hits, 10 * (22 + 330));
    assert_eq!(p.frontend.table().mappings(), stats.pages_mapped.get());
}

/// Whatever way a request takes, each counter counts it once.
#[test]
fn requests_segments_and_bytes_are_counted_once() {
    for persistent in [true, false] {
        let mut p = Pair::new(setup(Abi::NATIVE, 0, persistent));
        let mut rng = Rng(77);
        p.disk.full = Some(Rng(5));
        let mut fails = Rng(9);
        p.disk.fail(move |_| fails.one_in(7).then_some(Status::Medium));
        let (mut reads, mut writes, mut read, mut moved) = (0, 0, 0, 0);
        for _ in 0..200 {
            let mut segments = HashMap::new();
            for cookie in 0..8u64 {
                let count = if rng.one_in(4) { 1 + rng.below(20) } else { 1 };
                let write = rng.one_in(2);
                let sent = match write {
                    true => p.frontend.write(cookie, 8 * cookie, &vec![1; count as usize * PAGE]),
                    false => p.frontend.read(cookie, 8 * cookie, count as u32 * PAGE as u32),
                };
                sent.unwrap();
                // Lists of more segments than lie in a slot come from a page.
                moved += u64::from(count > 11);
                if write {
                    (writes, moved) = (writes + 1, moved + count);
                } else {
                    reads += 1;
                    segments.insert(cookie, count);
                }
            }
            for done in p.run() {
                if let Some(count) = segments.remove(&done.cookie).filter(|_| done.status == OKAY) {
                    (read, moved) = (read + count * PAGE as u64, moved + count);
                }
            }
        }
        let stats = p.backend.stats();
        let written = p.disk.log.iter().filter(|sent| sent.op == Op::Write).map(|sent| sent.len);
        assert_eq!((stats.reads(), stats.writes()), (reads, writes));
        assert_eq!(stats.page_hits() + stats.page_misses.get(), moved);
        assert_eq!((stats.read_bytes.get(), stats.written_bytes.get()), (read, written.sum()));
        assert_eq!(stats.page_hits() > 0, persistent);
        assert!(stats.page_misses.get() > 0 && stats.errors.get() > 100);
    }
}
