//! Flushes, barriers, and what happens when the disk cannot flush or has no space.

use blkif::abi::{
    DISCARD, ERROR, FLUSH_DISKCACHE, Head, OKAY, READ, Response, Segment, WRITE, WRITE_BARRIER,
};
use blkif::{Abi, Config};
use block::{Frontend as _, HasWork, Op, Status};

use crate::common::{GREF, Raw};

fn full(page: u32) -> u64 {
    Segment::new(GREF + page, 0, 7).0
}

fn read(id: u64, sector: u64) -> Head {
    Head::direct(READ, 1, id, sector, full(0))
}

fn write(id: u64, sector: u64) -> Head {
    Head::direct(WRITE, 1, id, sector, full(0))
}

fn flush(id: u64) -> Head {
    Head::direct(FLUSH_DISKCACHE, 0, id, 0, 0)
}

fn barrier(id: u64, segments: u8, sector: u64) -> Head {
    Head::direct(WRITE_BARRIER, segments, id, sector, full(1))
}

fn raw(change: impl FnOnce(&mut Config)) -> Raw {
    Raw::new(Abi::NATIVE, change)
}

fn ids(all: &[Response]) -> Vec<(u64, i16)> {
    all.iter().map(|r| (r.id, r.status)).collect()
}

impl Raw {
    fn wait(&mut self, ns: u64) {
        let end = self.now + ns;
        while self.now < end {
            self.now += (ns / 64).max(1);
            self.turn();
        }
    }
}

#[test]
fn a_flush_goes_before_its_data() {
    let mut r = raw(|_| {});
    r.region.write(r.page_at(0), &[1; 4096]);
    r.region.write(r.page_at(1), &[2; 4096]);
    for (count, tail) in [(1, vec![]), (2, vec![full(1)])] {
        r.disk.log.clear();
        let h = Head::direct(FLUSH_DISKCACHE, count, 5, 16, full(0));
        assert_eq!(r.one(h, &tail), (FLUSH_DISKCACHE, OKAY));
        assert_eq!(r.disk.ops(), [Op::Flush, Op::Write]);
        assert!(!r.disk.log[1].fua, "the data is an ordinary write");
        assert_eq!(r.disk.bytes(8192, 4096), [1; 4096]);
    }
    assert_eq!(r.disk.bytes(12288, 4096), [2; 4096]);
    // Requests after it need not wait.
    r.disk.hold = true;
    r.put(flush(1), &[]);
    r.put(write(2, 0), &[]);
    r.turn();
    r.turn();
    assert_eq!(block::BlockQueue::in_flight(&r.disk), 2);
}

#[test]
fn a_barrier_waits_for_all_before_it_and_holds_back_all_after_it() {
    for segments in [0, 1, 2] {
        let mut r = raw(|c| c.barrier = true);
        r.disk.hold = true;
        r.put(write(1, 0), &[]);
        r.put(read(2, 8), &[]);
        r.put(barrier(3, segments, 16), &[full(2)]);
        r.put(write(4, 24), &[]);
        assert!(r.run().is_empty());
        assert_eq!(r.disk.ops().len(), 2, "nothing of the barrier, nothing after it");
        r.disk.hold = false;
        assert_eq!(ids(&r.run()).len(), 4);
        let mut expected = vec![Op::Read, Op::Write, Op::Flush];
        if segments > 0 {
            expected.push(Op::Write);
        }
        expected.push(Op::Write);
        // In copy mode the write before it is sent after the read.
        assert_eq!(r.disk.ops(), expected);
        let fua: Vec<bool> = r.disk.log.iter().map(|s| s.fua).collect();
        assert_eq!(fua.iter().filter(|&&f| f).count(), usize::from(segments > 0));
        assert_eq!(fua[3], segments > 0);
        // The answers before, of, and after the barrier come in this order.
        r.put(write(5, 0), &[]);
        r.put(barrier(6, segments, 16), &[full(2)]);
        r.put(write(7, 24), &[]);
        assert_eq!(ids(&r.run()), [(5, OKAY), (6, OKAY), (7, OKAY)]);
    }
}

#[test]
fn two_barriers_in_a_row() {
    let mut r = raw(|c| c.barrier = true);
    for i in 0..6 {
        r.put(barrier(i, (i % 2) as u8, 16), &[]);
    }
    let mut all = r.run();
    all.extend(r.run());
    all.extend(r.run());
    assert_eq!(ids(&all), (0..6).map(|i| (i, OKAY)).collect::<Vec<_>>());
}

#[test]
fn a_flush_that_fails_is_tried_again() {
    for segments in [0, 1] {
        let mut r = raw(|_| {});
        let mut left = 4;
        r.disk.fail(move |s| {
            let fails = s.op == Op::Flush && left > 0;
            left -= i32::from(fails);
            fails.then_some(Status::Medium)
        });
        r.put(Head::direct(FLUSH_DISKCACHE, segments, 9, 0, full(0)), &[]);
        assert!(r.run().is_empty(), "not yet: there is a pause in between");
        assert_eq!(r.backend.arm(), HasWork::Yes, "nobody else would wake the reactor");
        r.wait(1_000_000_000);
        assert_eq!(ids(&r.answers()), [(9, OKAY)]);
        assert_eq!(r.disk.ops().iter().filter(|&&o| o == Op::Flush).count(), 5);
        assert_eq!(r.backend.stats().failed.get(), 0);
    }
}

#[test]
fn an_empty_flush_is_never_answered_with_an_error() {
    for status in Status::ALL.into_iter().filter(|s| !s.is_ok() && *s != Status::NoSpace) {
        for make in [flush as fn(u64) -> Head, |id| barrier(id, 0, 0)] {
            let mut r = raw(|c| c.barrier = true);
            r.disk.fail(move |s| (s.op == Op::Flush).then_some(status));
            r.put(make(9), &[]);
            r.wait(20_000_000_000);
            assert!(r.answers().is_empty(), "{status}");
            let stats = r.backend.stats();
            assert_eq!((stats.failed.get(), stats.held_flushes.get()), (1, 1));
            // Bounded, and none at all for a device that is gone.
            let flushes = r.disk.log.len();
            assert_eq!(flushes, if status == Status::Gone { 1 } else { 7 });
            // The disk counts as failed: the guest hears of it with its next data.
            assert_eq!(r.one(read(10, 0), &[]).1, ERROR);
            assert_eq!(r.one(write(11, 0), &[]).1, ERROR);
            assert_eq!(r.one(Head::direct(WRITE, 2, 12, 0, full(0)), &[full(1)]).1, ERROR);
            assert_eq!(r.one(Head::indirect(READ, 2, 13, 0, GREF), &[]).1, ERROR);
            assert_eq!(r.one(Head::direct(DISCARD, 0, 14, 0, 8), &[]).1, ERROR);
            assert_eq!(r.one(Head::direct(FLUSH_DISKCACHE, 1, 15, 0, full(0)), &[]).1, ERROR);
            assert_eq!(r.one(barrier(16, 1, 0), &[]).1, ERROR);
            // Also when the device could flush again: what was lost stays lost.
            r.disk.fault = None;
            r.put(make(17), &[]);
            r.wait(20_000_000_000);
            assert!(r.answers().is_empty());
            assert_eq!(r.disk.log.len(), flushes);
            assert_eq!(stats.held_flushes.get(), 2);
            assert!(stats.refused.get() >= 7);
            assert_eq!(stats.bad_requests.get(), 0);
            // Nothing of that keeps the reactor awake, or the ring from being taken down.
            assert_eq!(r.backend.arm(), HasWork::No);
            r.backend.stop();
            r.turn();
            assert!(r.backend.closed());
        }
    }
}

#[test]
fn a_flush_with_data_that_fails_is_an_error() {
    let mut r = raw(|c| c.barrier = true);
    r.disk.fail(|s| (s.op == Op::Flush).then_some(Status::Timeout));
    r.put(Head::direct(FLUSH_DISKCACHE, 1, 9, 0, full(0)), &[]);
    r.wait(20_000_000_000);
    assert_eq!(ids(&r.answers()), [(9, ERROR)]);
    assert!(r.disk.ops().iter().all(|&o| o == Op::Flush), "the data was not written");
    assert_eq!(r.backend.stats().failed.get(), 1);
}

#[test]
fn a_barrier_that_fails_lets_the_ring_go_on() {
    let mut r = raw(|c| c.barrier = true);
    r.disk.fail(|s| (s.op == Op::Flush).then_some(Status::Medium));
    r.put(barrier(1, 1, 0), &[]);
    r.put(write(2, 0), &[]);
    r.wait(20_000_000_000);
    assert_eq!(ids(&r.answers()), [(1, ERROR), (2, ERROR)]);
    r.put(barrier(3, 0, 0), &[]);
    r.put(write(4, 0), &[]);
    assert_eq!(ids(&r.run()), [(4, ERROR)]);
}

#[test]
fn a_write_without_space_waits_and_the_ring_with_it() {
    for (segments, operation) in
        [(1, WRITE), (2, WRITE), (1, FLUSH_DISKCACHE), (1, WRITE_BARRIER), (0, FLUSH_DISKCACHE)]
    {
        let mut r = raw(|c| c.barrier = true);
        let failing = if segments == 0 { Op::Flush } else { Op::Write };
        r.disk.fail(move |s| (s.op == failing).then_some(Status::NoSpace));
        r.put(Head::direct(operation, segments, 1, 0, full(0)), &[full(1)]);
        assert!(r.run().is_empty());
        let stats = r.backend.stats();
        assert_eq!(stats.held_no_space.get(), 1);
        r.put(read(2, 64), &[]);
        r.wait(60_000_000_000);
        assert!(r.answers().is_empty(), "the ring is not read while a write waits");
        let tries = r.disk.ops().iter().filter(|&&o| o == failing).count();
        assert!((10..100).contains(&tries), "{tries}: again and again, but not all the time");
        // Space comes.
        r.disk.fault = None;
        r.wait(2_000_000_000);
        assert_eq!(ids(&r.answers()), [(1, OKAY), (2, OKAY)]);
        assert_eq!((stats.held_no_space.get(), stats.failed.get(), stats.errors.get()), (0, 0, 0));
    }
}

#[test]
fn several_writes_wait_for_space_at_once() {
    let mut r = raw(|_| {});
    r.disk.fail(|s| (s.op == Op::Write).then_some(Status::NoSpace));
    for i in 0..5 {
        r.put(write(i, i * 8), &[]);
    }
    r.run();
    assert_eq!(r.backend.stats().held_no_space.get(), 5);
    // One of them fails for another reason: the others wait on.
    let mut first = true;
    r.disk.fail(move |s| {
        let medium = std::mem::take(&mut first);
        (s.op == Op::Write).then_some(if medium { Status::Medium } else { Status::NoSpace })
    });
    r.wait(2_000_000_000);
    let all = r.answers();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].status, ERROR);
    assert_eq!(r.backend.stats().held_no_space.get(), 4);
    r.disk.fault = None;
    r.wait(2_000_000_000);
    assert_eq!(r.answers().len(), 4);
}

#[test]
fn waiting_for_space_ends_when_that_is_configured() {
    let mut r = raw(|c| c.no_space_timeout = Some(5_000_000_000));
    r.disk.fail(|s| (s.op == Op::Write).then_some(Status::NoSpace));
    r.put(write(1, 0), &[]);
    r.turn();
    r.wait(4_900_000_000);
    assert!(r.answers().is_empty());
    r.wait(200_000_000);
    assert_eq!(ids(&r.answers()), [(1, ERROR)]);
    assert_eq!(r.backend.stats().held_no_space.get(), 0);
    assert_eq!(r.one(read(2, 0), &[]).1, OKAY);
    // The next one waits anew.
    r.put(write(3, 0), &[]);
    r.turn();
    r.wait(4_900_000_000);
    assert!(r.answers().is_empty());
    r.wait(200_000_000);
    assert_eq!(ids(&r.answers()), [(3, ERROR)]);
    // An empty flush must not say so.
    r.disk.fail(|s| (s.op == Op::Flush).then_some(Status::NoSpace));
    r.put(flush(4), &[]);
    r.wait(20_000_000_000);
    assert!(r.answers().is_empty());
    assert_eq!(r.backend.stats().failed.get(), 1);
}

#[test]
fn stopping_answers_what_waits_for_space() {
    let mut r = raw(|_| {});
    r.disk.fail(|s| (s.op == Op::Write).then_some(Status::NoSpace));
    r.put(write(1, 0), &[]);
    r.run();
    r.backend.stop();
    assert!(!r.backend.closed());
    r.turn();
    assert_eq!(ids(&r.answers()), [(1, ERROR)]);
    assert!(r.backend.closed());
}

#[test]
fn stopping_finishes_what_was_taken_and_takes_no_more() {
    let mut r = raw(|c| c.barrier = true);
    r.disk.hold = true;
    r.put(write(1, 0), &[]);
    r.put(Head::direct(FLUSH_DISKCACHE, 1, 2, 8, full(0)), &[]);
    r.put(barrier(3, 1, 16), &[]);
    r.turn();
    r.put(write(4, 24), &[]);
    r.backend.stop();
    r.run();
    assert!(!r.backend.closed());
    assert!(r.backend.in_flight() > 0);
    r.disk.hold = false;
    assert_eq!(ids(&r.run()), [(1, OKAY), (2, OKAY), (3, OKAY)]);
    assert!(r.backend.closed());
    assert_eq!(r.backend.arm(), HasWork::No);
    let stats = r.backend.stats();
    assert!(!stats.detached());
    drop(r);
    assert!(stats.detached());
}
