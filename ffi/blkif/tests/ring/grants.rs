//! Grants that fail, come late, are too many, or are not what they seem.

use blkif::abi::{ERROR, Head, OKAY, PAGE, READ, Segment, WRITE};
use blkif::grants::{CopyOp, Direction, GNTST_BAD_GNTREF, GNTST_EAGAIN, GNTST_OKAY};
use blkif::{Abi, Setup};
use block::{Frontend as _, HasWork};

use crate::common::{DISK, GREF, Pair, Raw, Rng, setup};

fn full(page: u32) -> u64 {
    Segment::new(GREF + page, 0, 7).0
}

fn persistent_raw(pages: u32) -> Raw {
    Raw::new(Abi::NATIVE, |c| c.persistent_pages = pages)
}

#[test]
fn a_copy_that_fails_is_an_error_of_its_request_only() {
    for persistent in [0, 64] {
        let mut r = persistent_raw(persistent);
        r.knobs.borrow_mut().refuse_maps = true;
        r.knobs.borrow_mut().fault =
            Some(Box::new(
                |op: &CopyOp| {
                    if op.gref == GREF + 1 { GNTST_BAD_GNTREF } else { GNTST_OKAY }
                },
            ));
        r.region.write_words(r.page_at(9), &[full(2), full(1)]);
        r.region.write_words(r.page_at(10), &[full(2), full(3)]);
        // As the only segment, as one of several, as the page of segments; read and written.
        let mut expected = Vec::new();
        for (op, id) in [(READ, 0), (WRITE, 100)] {
            r.put(Head::direct(op, 1, id, 0, full(0)), &[]);
            r.put(Head::direct(op, 1, id + 1, 8, full(1)), &[]);
            r.put(Head::direct(op, 2, id + 2, 16, full(2)), &[full(1)]);
            r.put(Head::direct(op, 2, id + 3, 32, full(2)), &[full(3)]);
            r.put(Head::indirect(op, 2, id + 4, 48, GREF + 9), &[]);
            r.put(Head::indirect(op, 2, id + 5, 64, GREF + 10), &[]);
            r.put(Head::indirect(op, 2, id + 6, 80, GREF + 1), &[]);
            for (i, status) in [OKAY, ERROR, ERROR, OKAY, ERROR, OKAY, ERROR].iter().enumerate() {
                expected.push((id + i as u64, *status));
            }
        }
        let mut all: Vec<_> = r.run().iter().map(|a| (a.id, a.status)).collect();
        all.extend(r.run().iter().map(|a| (a.id, a.status)));
        all.sort_unstable();
        assert_eq!(all, expected);
        let writes = r.disk.log.iter().filter(|s| s.op == block::Op::Write).count();
        assert_eq!(writes, 3, "nothing that was not copied in is written");
    }
}

#[test]
fn a_call_that_fails_is_an_error_of_all_in_it() {
    let mut r = persistent_raw(0);
    r.knobs.borrow_mut().call_fails = true;
    for i in 0..4 {
        r.put(Head::direct(if i < 2 { READ } else { WRITE }, 1, i, 0, full(0)), &[]);
    }
    let all = r.run();
    assert_eq!(all.len(), 4);
    assert!(all.iter().all(|a| a.status == ERROR));
    r.knobs.borrow_mut().call_fails = false;
    assert_eq!(r.one(Head::direct(WRITE, 1, 9, 0, full(0)), &[]).1, OKAY);
}

#[test]
fn a_page_that_is_bad_is_not_asked_for_again_because_another_is_paged_out() {
    for bad in 0..2 {
        let mut r = persistent_raw(0);
        r.knobs.borrow_mut().fault =
            Some(Box::new(
                move |op: &CopyOp| {
                    if op.gref == GREF + bad { GNTST_BAD_GNTREF } else { GNTST_EAGAIN }
                },
            ));
        assert_eq!(r.one(Head::direct(WRITE, 2, 1, 0, full(0)), &[full(1)]).1, ERROR);
        assert_eq!(r.backend.stats().copy_batches.get(), 1);
    }
}

#[test]
fn a_page_that_is_paged_out_is_asked_for_again() {
    for (head, tail) in [
        (Head::direct(READ, 1, 1, 0, full(0)), vec![]),
        (Head::direct(WRITE, 2, 1, 0, full(0)), vec![full(1)]),
        (Head::indirect(WRITE, 2, 1, 0, GREF + 9), vec![]),
        (Head::indirect(READ, 2, 1, 0, GREF + 9), vec![]),
    ] {
        let mut r = persistent_raw(0);
        r.region.write_words(r.page_at(9), &[full(0), full(1)]);
        let mut left = 5;
        r.knobs.borrow_mut().fault = Some(Box::new(move |_: &CopyOp| {
            left -= 1;
            if left >= 0 { GNTST_EAGAIN } else { GNTST_OKAY }
        }));
        r.put(head, &tail);
        r.run();
        assert_eq!(r.backend.arm(), HasWork::Yes);
        for _ in 0..20 {
            r.now += 1_000_000;
            r.turn();
        }
        let all = r.answers();
        assert_eq!((all.len(), all[0].status), (1, OKAY));
        // For ever is too long.
        r.knobs.borrow_mut().fault = Some(Box::new(|_: &CopyOp| GNTST_EAGAIN));
        r.put(head, &tail);
        for _ in 0..300 {
            r.now += 1_000_000;
            r.turn();
        }
        let all = r.answers();
        assert_eq!((all.len(), all[0].status), (1, ERROR));
        assert!(r.backend.stats().copy_batches.get() < 250);
        // The slot is as good as new.
        r.knobs.borrow_mut().fault = None;
        assert_eq!(r.one(head, &tail).1, OKAY);
    }
}

#[test]
fn an_answer_waits_until_its_pages_are_mapped() {
    for indirect in [false, true] {
        for op in [READ, WRITE] {
            let mut r = persistent_raw(64);
            r.region.write_words(r.page_at(9), &[full(0), full(1)]);
            r.knobs.borrow_mut().maps_late = true;
            if indirect {
                r.put(Head::indirect(op, 2, 1, 0, GREF + 9), &[]);
            } else {
                r.put(Head::direct(op, 1, 1, 0, full(0)), &[]);
            }
            // A second request for the same page, and one that maps nothing.
            r.put(Head::direct(op, 1, 2, 8, full(0)), &[]);
            assert!(r.run().is_empty());
            assert_eq!(r.backend.arm(), HasWork::Yes);
            assert_eq!(r.backend.in_flight(), 0, "it was carried out in the meantime, by copy");
            r.backend.stop();
            assert!(!r.backend.closed(), "a mapping is on its way");
            r.knobs.borrow_mut().maps_late = false;
            let mut ids: Vec<u64> = r.run().iter().map(|a| a.id).collect();
            ids.sort_unstable();
            assert_eq!(ids, [1, 2]);
            let pages = if indirect { 3 } else { 1 };
            assert_eq!(r.table.mappings(), pages, "no page twice");
            assert!(r.backend.closed());
        }
    }
}

#[test]
fn a_page_that_cannot_be_mapped_is_copied() {
    let mut r = persistent_raw(64);
    // Granted for reading only: good enough for a write, but not for good.
    assert!(r.table.end_access(GREF));
    r.table.grant(GREF, 1, true);
    for i in 0..20 {
        assert_eq!(r.one(Head::direct(WRITE, 1, i, 0, full(0)), &[]).1, OKAY);
    }
    assert_eq!(r.one(Head::direct(READ, 1, 1, 0, full(0)), &[]).1, ERROR);
    assert_eq!((r.table.mappings(), r.backend.stats().pages_mapped.get()), (0, 0));
    // The reference becomes a good page, and after some time that is found out.
    assert!(r.table.end_access(GREF));
    r.table.grant(GREF, 1, false);
    for i in 0..200 {
        r.now += 20_000_000;
        assert_eq!(r.one(Head::direct(WRITE, 1, i, 0, full(0)), &[]).1, OKAY);
    }
    assert_eq!((r.table.mappings(), r.backend.stats().pages_mapped.get()), (1, 1));
}

#[test]
fn nobody_to_map_means_copying() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, true));
    p.knobs.borrow_mut().refuse_maps = true;
    for i in 0..100 {
        assert_eq!(p.write(i * 8, &[i as u8; 4096]), OKAY);
    }
    assert_eq!(p.frontend.table().mappings(), 0);
    assert_eq!(p.backend.stats().page_hits(), 0);
    p.knobs.borrow_mut().refuse_maps = false;
    assert_eq!(p.write(0, &[1; 4096]), OKAY);
    assert_eq!(p.frontend.table().mappings(), 1);
}

#[test]
fn more_pages_than_may_stay_mapped() {
    let mut p = Pair::with(setup(Abi::NATIVE, 0, true), |c| c.persistent_pages = 20);
    let stats = p.backend.stats();
    for round in 0..40u64 {
        for i in 0..32 {
            p.frontend.write(i, i * 64, &[(i + round) as u8; 8192]).unwrap();
        }
        assert!(p.run().iter().all(|d| d.status == OKAY));
        assert!(p.frontend.table().mappings() <= 20);
    }
    for i in 0..32u64 {
        assert!(p.disk.bytes(i * 64 * 512, 8192).iter().all(|&b| b == (i + 39) as u8));
    }
    assert_eq!(stats.pages_mapped.get(), 20, "pages in use are not exchanged for others");
    assert!(stats.page_hits() > 0 && stats.page_misses.get() > 0);
    // One page suffices for what comes now: there was need for more, so the others make place.
    for i in 0..300 {
        p.now += 10_000_000;
        assert_eq!(p.write(i, &[1; 512]), OKAY);
    }
    let evicted = stats.pages_evicted.get();
    assert!((5..20).contains(&evicted), "{evicted}");
    for i in 0..32 {
        p.frontend.write(i, i * 64, &[1; 8192]).unwrap();
    }
    p.run();
    assert_eq!(stats.pages_mapped.get(), 20 + evicted, "others took their place");
}

#[test]
fn pages_not_used_for_a_minute_are_given_back() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, true));
    for i in 0..32 {
        p.frontend.write(i, i * 8, &[1; 4096]).unwrap();
    }
    p.run();
    assert_eq!(p.frontend.table().mappings(), 32);
    p.wait(55_000_000_000);
    assert_eq!(p.frontend.table().mappings(), 32);
    p.wait(10_000_000_000);
    assert_eq!(p.frontend.table().mappings(), 0);
    // The frontend finds its grants unused, and goes on.
    for i in 0..32 {
        p.frontend.write(i, i * 8, &[2; 4096]).unwrap();
    }
    assert!(p.run().iter().all(|d| d.status == OKAY));
    assert_eq!(p.disk.bytes(0, 32 * 4096), vec![2; 32 * 4096]);
}

#[test]
fn the_same_page_twice_in_requests_under_way() {
    for persistent in [0, 64] {
        let mut r = persistent_raw(persistent);
        for round in 0..3 {
            r.disk.hold = true;
            for i in 0..4 {
                r.put(Head::direct(READ, 1, i, i * 8, full(0)), &[]);
                r.put(Head::direct(WRITE, 3, 10 + i, 512 + i * 64, full(0)), &[full(0), full(0)]);
            }
            r.turn();
            r.disk.hold = false;
            assert_eq!(r.run().len(), 8);
            assert!(r.table.mappings() <= 1, "{round}");
        }
    }
}

#[test]
fn two_references_to_one_page() {
    let mut r = persistent_raw(64);
    r.table.grant(GREF - 1, (r.page_at(0) / PAGE) as u32, false);
    for i in 0..10 {
        let other = Segment::new(GREF - 1, 0, 7).0;
        assert_eq!(r.one(Head::direct(WRITE, 2, i, 0, full(0)), &[other]).1, OKAY);
        assert_eq!(r.one(Head::direct(READ, 1, i, 0, other), &[]).1, OKAY);
    }
    assert!(r.table.mappings() <= 1);
}

#[test]
fn all_is_unmapped_when_the_backend_goes() {
    let mut p = Pair::new(setup(Abi::NATIVE, 1, true));
    for i in 0..50 {
        p.frontend.write(i, i * 64, &[1; 32768]).unwrap();
    }
    p.run();
    let table = p.frontend.table().clone();
    let (stats, knobs) = (p.backend.stats(), p.knobs.clone());
    assert!(table.mappings() >= 400);
    p.backend.stop();
    p.turn();
    assert!(p.backend.closed());
    drop(p);
    assert_eq!(table.mappings(), 0);
    assert_eq!(knobs.borrow().unmapped as u64, stats.pages_mapped.get());
    assert!(stats.detached() && knobs.borrow().settled);
}

/// A request's lists are copied once and looked at only in the copy, whatever the guest does then.
#[test]
fn a_list_changed_after_it_was_copied() {
    for persistent in [0, 64] {
        let mut r = persistent_raw(persistent);
        r.region.write_words(r.page_at(9), &[full(0), full(1)]);
        // Maps the list's page, if there is such a thing here.
        assert_eq!(r.one(Head::indirect(READ, 2, 0, 0, GREF + 9), &[]).1, OKAY);
        for p in 0..8 {
            r.region.write(r.page_at(p), &[p as u8; PAGE]);
        }
        let (region, at) = (r.region.clone(), r.page_at(9));
        let spoil = move |_: &CopyOp| {
            region.write_words(at, &[full(5), u64::MAX]);
            GNTST_OKAY
        };
        r.put(Head::indirect(WRITE, 2, 1, 64, GREF + 9), &[]);
        if persistent > 0 {
            // The list is read in this turn.
            r.disk.hold = true;
            r.turn();
            r.region.write_words(r.page_at(9), &[full(5), u64::MAX]);
            r.disk.hold = false;
        } else {
            r.turn();
            r.knobs.borrow_mut().fault = Some(Box::new(spoil));
        }
        let all = r.run();
        assert_eq!((all.len(), all[0].status), (1, OKAY));
        let data = r.disk.bytes(64 * 512, 2 * PAGE);
        assert!(data[..PAGE].iter().all(|&b| b == 0) && data[PAGE..].iter().all(|&b| b == 1));
    }
}

#[test]
fn no_copy_leaves_its_page_or_its_buffer() {
    for abi in Abi::ALL {
        let s = Setup { max_segments: 32, ..setup(abi, 0, false) };
        let mut p = Pair::new(s);
        p.knobs.borrow_mut().fault = Some(Box::new(|op: &CopyOp| {
            assert!(u32::from(op.offset) + u32::from(op.len) <= PAGE as u32 && op.len > 0);
            assert!(op.local as usize + usize::from(op.len) <= (32 + 32 * 32) * PAGE);
            assert!(op.len.is_multiple_of(8));
            assert!(op.direction == Direction::ToGuest || op.len <= PAGE as u16);
            GNTST_OKAY
        }));
        let mut rng = Rng(3);
        for _ in 0..100 {
            let n = rng.below(32) + 1;
            let sector = rng.below(DISK / 512 - n * 8);
            let data = rng.bytes(n as usize * 4096);
            assert_eq!(p.write(sector, &data), OKAY);
            assert!(p.read(sector, data.len()).1 == data);
        }
    }
}
