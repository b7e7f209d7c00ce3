//! What a request must be like, one rule at a time, on a ring written by hand.

use blkif::Abi;
use blkif::abi::{
    DISCARD, EOPNOTSUPP, ERROR, FLUSH_DISKCACHE, Head, INDIRECT, OKAY, PAGE, READ, Response,
    Segment, WRITE, WRITE_BARRIER,
};
use block::{Op, Status};

use crate::common::{DISK, GREF, Raw};

const SECTORS: u64 = DISK / 512;

fn full(page: u32) -> u64 {
    Segment::new(GREF + page, 0, 7).0
}

fn raw() -> Raw {
    Raw::new(Abi::NATIVE, |_| {})
}

#[test]
fn answers_carry_id_operation_and_status() {
    for abi in Abi::ALL {
        let mut r = Raw::new(abi, |c| c.barrier = true);
        for id in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            assert_eq!(r.one(Head::direct(READ, 1, id, 0, full(0)), &[]), (READ, OKAY));
            assert_eq!(r.one(Head::direct(WRITE, 1, id, 0, full(0)), &[]), (WRITE, OKAY));
            let flush = Head::direct(FLUSH_DISKCACHE, 0, id, 0, 0);
            assert_eq!(r.one(flush, &[]), (FLUSH_DISKCACHE, OKAY));
            let barrier = Head::direct(WRITE_BARRIER, 0, id, 0, 0);
            assert_eq!(r.one(barrier, &[]), (WRITE_BARRIER, OKAY));
            assert_eq!(r.one(Head::direct(DISCARD, 0, id, 0, 8), &[]), (DISCARD, OKAY));
            // An indirect request is answered under the operation that it carries.
            r.region.write_words(r.page_at(9), &[full(1), full(2)]);
            for op in [READ, WRITE] {
                let h = Head::indirect(op, 2, id, 8, GREF + 9);
                assert_eq!(r.one(h, &[]), (op, OKAY));
            }
        }
    }
}

#[test]
fn two_live_requests_may_have_one_id() {
    let mut r = raw();
    r.disk.hold = true;
    for page in 0..3 {
        r.put(Head::direct(READ, 1, 42, u64::from(page) * 8, full(page)), &[]);
    }
    assert!(r.run().is_empty());
    r.disk.hold = false;
    assert_eq!(r.run(), [Response { id: 42, operation: READ, status: OKAY }; 3]);
}

#[test]
fn unknown_operations_are_not_supported() {
    let mut r = raw();
    for op in 0..=255u8 {
        if matches!(op, READ | WRITE | FLUSH_DISKCACHE | DISCARD | INDIRECT) {
            continue;
        }
        // The second byte is what a good request would have, or anything.
        for second in [0, 1, 11, 255] {
            let h = Head::direct(op, second, 7, 0, full(0));
            assert_eq!(r.one(h, &[]), (op, EOPNOTSUPP));
        }
    }
    assert!(r.disk.log.is_empty());
}

#[test]
fn what_was_not_offered_is_refused_even_if_sent() {
    let mut r = Raw::new(Abi::NATIVE, |c| {
        c.flush = false;
        c.discard = false;
        c.max_indirect_segments = 0;
    });
    r.region.write_words(r.page_at(9), &[full(1)]);
    for segments in [0, 1] {
        let flush = Head::direct(FLUSH_DISKCACHE, segments, 7, 0, full(0));
        assert_eq!(r.one(flush, &[]), (FLUSH_DISKCACHE, EOPNOTSUPP));
        let barrier = Head::direct(WRITE_BARRIER, segments, 7, 0, full(0));
        assert_eq!(r.one(barrier, &[]), (WRITE_BARRIER, EOPNOTSUPP));
    }
    assert_eq!(r.one(Head::direct(DISCARD, 0, 7, 0, 8), &[]), (DISCARD, EOPNOTSUPP));
    let h = Head::indirect(WRITE, 1, 7, 0, GREF + 9);
    assert_eq!(r.one(h, &[]), (WRITE, EOPNOTSUPP));
    assert!(r.disk.log.is_empty());
    // A guest without any flush takes each finished write for durable.
    assert_eq!(r.one(Head::direct(WRITE, 1, 7, 0, full(0)), &[]), (WRITE, OKAY));
    assert!(r.disk.log[0].fua);
}

#[test]
fn counts_of_segments() {
    let mut r = Raw::new(Abi::NATIVE, |c| c.barrier = true);
    let tail: [u64; 10] = std::array::from_fn(|i| full(i as u32 + 1));
    for count in 0..=255u8 {
        for op in [READ, WRITE, FLUSH_DISKCACHE, WRITE_BARRIER] {
            let least = u8::from(op <= WRITE);
            let expected = if (least..=11).contains(&count) { OKAY } else { ERROR };
            let h = Head::direct(op, count, 3, 8, full(0));
            assert_eq!(r.one(h, &tail), (op, expected), "{op} {count}");
        }
    }
    for i in 0..64 {
        r.region.write_words(r.page_at(50) + 8 * i, &[full(i as u32 % 40)]);
    }
    for count in [0u16, 1, 2, 11, 12, 31, 32, 33, 512, 513, 4096, 65535] {
        let expected = if (1..=32).contains(&count) { OKAY } else { ERROR };
        for op in [READ, WRITE] {
            let h = Head::indirect(op, count, 3, 8, GREF + 50);
            assert_eq!(r.one(h, &[]), (op, expected), "{count}");
        }
    }
}

#[test]
fn an_indirect_request_reads_or_writes_and_nothing_else() {
    let mut r = raw();
    r.region.write_words(r.page_at(9), &[full(1)]);
    for op in 2..=255u8 {
        let h = Head::indirect(op, 1, 3, 8, GREF + 9);
        assert_eq!(r.one(h, &[]), (op, ERROR));
    }
    assert!(r.disk.log.is_empty());
}

#[test]
fn sectors_of_segments() {
    let mut r = raw();
    for first in 0..=9u8 {
        for last in 0..=9u8 {
            let good = first <= last && last <= 7;
            let expected = if good { OKAY } else { ERROR };
            let s = Segment::new(GREF, first, last).0;
            for op in [READ, WRITE] {
                assert_eq!(r.one(Head::direct(op, 1, 1, 8, s), &[]).1, expected);
                // The bad one is not the first.
                assert_eq!(r.one(Head::direct(op, 2, 1, 8, full(1)), &[s]).1, expected);
                r.region.write_words(r.page_at(9), &[full(1), s]);
                assert_eq!(r.one(Head::indirect(op, 2, 1, 8, GREF + 9), &[]).1, expected);
            }
            let flush = Head::direct(FLUSH_DISKCACHE, 1, 1, 8, s);
            assert_eq!(r.one(flush, &[]).1, expected);
        }
    }
    let s = Segment::new(GREF, 200, 255).0;
    assert_eq!(r.one(Head::direct(READ, 1, 1, 8, s), &[]).1, ERROR);
}

#[test]
fn sectors_of_the_disk() {
    let mut r = raw();
    let end = SECTORS;
    for (sector, good) in [
        (0, true),
        (end - 8, true),
        (end - 7, false),
        (end, false),
        (end + 1, false),
        (u64::MAX / 512, false),
        // What becomes small when it is made bytes.
        (1 << 55, false),
        ((1 << 55) + 8, false),
        (u64::MAX - 7, false),
        (u64::MAX, false),
    ] {
        let expected = if good { OKAY } else { ERROR };
        r.region.write_words(r.page_at(9), &[full(1)]);
        for op in [READ, WRITE] {
            assert_eq!(r.one(Head::direct(op, 1, 1, sector, full(0)), &[]).1, expected);
            let two = Head::direct(op, 2, 1, sector.wrapping_sub(8), full(0));
            let two_good = if good && sector >= 8 { OKAY } else { ERROR };
            assert_eq!(r.one(two, &[full(1)]).1, two_good);
            let list = Head::indirect(op, 1, 1, sector, GREF + 9);
            assert_eq!(r.one(list, &[]).1, expected);
        }
        let flush = Head::direct(FLUSH_DISKCACHE, 1, 1, sector, full(0));
        assert_eq!(r.one(flush, &[]).1, expected);
        // An empty flush has no sector.
        let flush = Head::direct(FLUSH_DISKCACHE, 0, 1, sector, full(0));
        assert_eq!(r.one(flush, &[]).1, OKAY);
        let discard = Head::direct(DISCARD, 0, 1, sector, 8);
        assert_eq!(r.one(discard, &[]).1, expected);
    }
    // The disk became smaller: requests past its end fail, others do not.
    r.disk.info.size = 8192;
    assert_eq!(r.one(Head::direct(READ, 1, 1, 8, full(0)), &[]).1, OKAY);
    assert_eq!(r.one(Head::direct(READ, 1, 1, 16, full(0)), &[]).1, ERROR);
    r.disk.info.size = DISK;
    assert_eq!(r.one(Head::direct(READ, 1, 1, 16, full(0)), &[]).1, OKAY);
}

#[test]
fn a_disk_of_one_sector() {
    let mut r = raw();
    r.disk.info.size = 512;
    let one = Segment::new(GREF, 3, 3).0;
    assert_eq!(r.one(Head::direct(WRITE, 1, 1, 0, one), &[]).1, OKAY);
    assert_eq!(r.one(Head::direct(WRITE, 1, 1, 1, one), &[]).1, ERROR);
    assert_eq!(r.one(Head::direct(WRITE, 1, 1, 0, full(0)), &[]).1, ERROR);
    assert_eq!(r.one(Head::direct(READ, 2, 1, 0, one), &[one]).1, ERROR);
}

#[test]
fn whole_sectors_of_the_size_that_was_published() {
    let mut r = Raw::new(Abi::NATIVE, |c| c.sector_size = 4096);
    let part = Segment::new(GREF, 0, 3).0;
    let rest = Segment::new(GREF + 1, 4, 7).0;
    for op in [READ, WRITE] {
        assert_eq!(r.one(Head::direct(op, 1, 1, 8, full(0)), &[]).1, OKAY);
        assert_eq!(r.one(Head::direct(op, 1, 1, 4, full(0)), &[]).1, ERROR);
        assert_eq!(r.one(Head::direct(op, 1, 1, 8, part), &[]).1, ERROR);
        // What counts is the whole.
        assert_eq!(r.one(Head::direct(op, 2, 1, 8, part), &[rest]).1, OKAY);
        assert_eq!(r.one(Head::direct(op, 2, 1, 12, part), &[rest]).1, ERROR);
    }
    // A discard is rounded.
    r.disk.log.clear();
    assert_eq!(r.one(Head::direct(DISCARD, 0, 1, 4, 20), &[]).1, OKAY);
    assert_eq!((r.disk.log[0].offset, r.disk.log[0].len), (4096, 8192));
}

#[test]
fn a_read_only_disk_refuses_all_that_changes_it() {
    for by_device in [false, true] {
        let mut r = Raw::new(Abi::NATIVE, |c| {
            c.read_only = !by_device;
            c.barrier = true;
        });
        r.disk.info.read_only = by_device;
        r.region.write_words(r.page_at(9), &[full(1), full(2)]);
        assert_eq!(r.one(Head::direct(WRITE, 1, 1, 0, full(0)), &[]).1, ERROR);
        assert_eq!(r.one(Head::direct(WRITE, 2, 1, 0, full(0)), &[full(1)]).1, ERROR);
        assert_eq!(r.one(Head::indirect(WRITE, 2, 1, 0, GREF + 9), &[]).1, ERROR);
        assert_eq!(r.one(Head::direct(WRITE_BARRIER, 0, 1, 0, 0), &[]).1, ERROR);
        assert_eq!(r.one(Head::direct(WRITE_BARRIER, 1, 1, 0, full(0)), &[]).1, ERROR);
        assert_eq!(r.one(Head::direct(FLUSH_DISKCACHE, 1, 1, 0, full(0)), &[]).1, ERROR);
        assert_eq!(r.one(Head::direct(DISCARD, 0, 1, 0, 8), &[]).1, ERROR);
        assert_eq!(r.one(Head::direct(DISCARD, 1, 1, 0, 8), &[]).1, ERROR);
        assert!(r.disk.log.is_empty(), "{:?}", r.disk.log);
        assert_eq!(r.one(Head::direct(READ, 1, 1, 0, full(0)), &[]).1, OKAY);
        assert_eq!(r.one(Head::indirect(READ, 2, 1, 0, GREF + 9), &[]).1, OKAY);
        assert_eq!(r.one(Head::direct(FLUSH_DISKCACHE, 0, 1, 0, 0), &[]).1, OKAY);
    }
}

#[test]
fn discards_are_rounded_inward_and_go_in_parts() {
    let mut r = raw();
    r.disk.info.discard_granularity = 65536;
    for (sector, count, expected) in [
        (0, 128, Some((0, 65536))),
        (1, 127, None),
        (0, 127, None),
        (1, 128, None),
        (1, 255, Some((65536, 65536))),
        (127, 258, Some((65536, 131_072))),
        (SECTORS, 0, None),
        (0, 0, None),
    ] {
        r.disk.log.clear();
        assert_eq!(r.one(Head::direct(DISCARD, 0, 1, sector, count), &[]).1, OKAY);
        assert_eq!(r.disk.log.first().map(|s| (s.offset, s.len)), expected, "{sector} {count}");
        assert!(r.disk.log.iter().all(|s| s.op == Op::Discard));
    }
    for (sector, count) in [(0, SECTORS + 1), (8, u64::MAX), (8, u64::MAX - 7), (u64::MAX, 2)] {
        assert_eq!(r.one(Head::direct(DISCARD, 0, 1, sector, count), &[]).1, ERROR);
    }
    // A disk of 4 PiB, discarded at once: parts of 128 MiB, other requests in between.
    r.disk.log.clear();
    r.disk.info.size = 4 << 50;
    r.disk.fail(|s| (s.op == Op::Discard).then_some(Status::Ok));
    r.put(Head::direct(DISCARD, 0, 1, 1, (4 << 41) - 1), &[]);
    r.put(Head::direct(READ, 1, 2, 0, full(0)), &[]);
    let all = r.run();
    assert_eq!(all, [Response { id: 2, operation: READ, status: OKAY }]);
    let discards: Vec<_> = r.disk.log.iter().filter(|s| s.op == Op::Discard).collect();
    assert!(discards.len() > 4);
    assert_eq!((discards[0].offset, discards[0].len), (65536, (128 << 20) - 65536));
    for pair in discards.windows(2) {
        assert_eq!(pair[0].offset + pair[0].len, pair[1].offset);
        assert_eq!(pair[1].len, 128 << 20);
    }
    // And ends, when a part fails.
    r.disk.fail(|s| (s.op == Op::Discard).then_some(Status::Medium));
    assert_eq!(r.run(), [Response { id: 1, operation: DISCARD, status: ERROR }]);
    // A smaller one comes to its end.
    r.disk.fail(|s| (s.op == Op::Discard).then_some(Status::Ok));
    r.disk.log.clear();
    assert_eq!(r.one(Head::direct(DISCARD, 0, 3, 0, 600 << 11), &[]).1, OKAY);
    assert_eq!(r.disk.log.iter().map(|s| s.len).sum::<u64>(), 600 << 20);
    // A device that cannot is told to the guest, which then asks no more.
    r.disk.fail(|s| (s.op == Op::Discard).then_some(Status::Unsupported));
    assert_eq!(r.one(Head::direct(DISCARD, 0, 3, 0, 600 << 11), &[]).1, EOPNOTSUPP);
}

#[test]
fn every_status_of_the_disk_becomes_an_answer() {
    for (status, pages) in Status::ALL.into_iter().flat_map(|s| [(s, 0), (s, 64)]) {
        let mut r = Raw::new(Abi::NATIVE, |c| c.persistent_pages = pages);
        for page in 0..2 {
            assert_eq!(r.one(Head::direct(READ, 1, 1, 0, full(page)), &[]), (READ, OKAY));
        }
        let expected = if status == Status::Ok { OKAY } else { ERROR };
        r.disk.fail(move |s| (s.op != Op::Flush).then_some(status));
        assert_eq!(r.one(Head::direct(READ, 1, 1, 0, full(0)), &[]), (READ, expected));
        assert_eq!(r.one(Head::direct(READ, 2, 1, 0, full(0)), &[full(1)]), (READ, expected));
        // A write that finds no space waits.
        if status != Status::NoSpace {
            assert_eq!(r.one(Head::direct(WRITE, 1, 1, 0, full(0)), &[]), (WRITE, expected));
            // Never "not supported": Linux would report success for the data.
            let flush = Head::direct(FLUSH_DISKCACHE, 1, 1, 0, full(0));
            assert_eq!(r.one(flush, &[]), (FLUSH_DISKCACHE, expected));
        }
        let discard = if status == Status::Unsupported { EOPNOTSUPP } else { expected };
        assert_eq!(r.one(Head::direct(DISCARD, 0, 1, 0, 8), &[]), (DISCARD, discard));
    }
}

#[test]
fn a_read_that_fails_shows_the_guest_nothing() {
    for (abi, pages) in Abi::ALL.into_iter().flat_map(|a| [(a, 0), (a, 64)]) {
        let mut r = Raw::new(abi, |c| c.persistent_pages = pages);
        // Old contents for the buffers to hold, and pages that are mapped if there are such.
        for id in 0..40 {
            assert_eq!(r.one(Head::direct(WRITE, 1, id, 0, full(0)), &[]).1, OKAY);
            assert_eq!(r.one(Head::direct(WRITE, 2, id, 0, full(0)), &[full(1)]).1, OKAY);
            assert_eq!(r.one(Head::direct(READ, 2, id, 0, full(2)), &[full(3)]).1, OKAY);
        }
        assert_eq!(r.table.mappings(), if pages > 0 { 4 } else { 0 });
        for p in 2..4 {
            r.region.write(r.page_at(p), &[0x5a; PAGE]);
        }
        r.disk.fail(|_| Some(Status::Medium));
        assert_eq!(r.one(Head::direct(READ, 1, 1, 0, full(2)), &[]).1, ERROR);
        assert_eq!(r.one(Head::direct(READ, 2, 1, 0, full(2)), &[full(3)]).1, ERROR);
        for p in 2..4 {
            assert!(r.page(p).iter().all(|&b| b == 0x5a));
        }
    }
}

#[test]
fn a_short_segment_leaves_the_rest_of_its_page_alone() {
    let mut r = raw();
    r.region.write(r.page_at(0), &[0x11; PAGE]);
    let s = Segment::new(GREF, 2, 4).0;
    assert_eq!(r.one(Head::direct(READ, 1, 1, 8, s), &[]).1, OKAY);
    let page = r.page(0);
    assert!(page[1024..2560].iter().all(|&b| b == 0xdd));
    assert!(page[..1024].iter().chain(&page[2560..]).all(|&b| b == 0x11));
}
