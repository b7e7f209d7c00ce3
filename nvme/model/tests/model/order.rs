//! Rings: phase, wrap, full completion queues, several queues, order of completion.

use std::collections::BTreeSet;

use nvme_model::Options;
use nvme_spec::Sqe;

use crate::host::*;

#[test]
fn phase_bits_over_many_wraps() {
    // 3 and 5 entries: wraps of both rings at all offsets.
    let mut host = Host::cold(Options::default(), vec![disk(64, 512)]);
    host.enable(3);
    host.create_pair(1, 5);
    for i in 0..200u16 {
        host.ok(1, Sqe::flush(i, 1));
        if i % 3 == 0 {
            host.ok(0, Sqe::abort(i, 1, 1));
        }
    }
}

#[test]
fn a_full_completion_queue_is_never_overrun() {
    let mut host = Host::cold(Options::default(), vec![disk(64, 512)]);
    host.enable(8);
    // A completion queue of 4 entries under a submission queue of 32.
    host.ok(0, Sqe::create_io_cq(1, 1, 4, bus(cq_at(1)), None));
    host.ok(0, Sqe::create_io_sq(1, 1, 32, bus(sq_at(1)), 1));
    host.region.zero(cq_at(1), 4 * 16);
    host.pairs.push(Pair { qid: 1, entries: 32, tail: 0, head: 0, phase: true });
    for cid in 0..31 {
        host.submit(1, &Sqe::flush(cid, 1));
    }
    host.ring_tail(1);
    // From here on the pair stands for the completion queue.
    host.pair(1).entries = 4;
    for _ in 0..10 {
        host.step();
    }
    assert_eq!(host.ctl.stats().snapshot().flushes, 3, "room for three");
    assert!(!host.step(), "blocked is idle");
    let mut got = Vec::new();
    for round in 0.. {
        // `sq_head` is of the larger ring, so the entries are looked at by hand.
        let at = cq_at(1) + host.pair(1).head as usize * 16;
        let dw: [u64; 2] = host.region.read_words(at);
        if (dw[1] >> 48 & 1 == 1) != host.pair(1).phase {
            break;
        }
        got.push((dw[1] >> 32) as u16);
        let pair = host.pair(1);
        pair.head = (pair.head + 1) % 4;
        pair.phase ^= pair.head == 0;
        if round % 2 == 1 {
            host.ring_head(1);
            host.step();
        }
    }
    host.ring_head(1);
    host.step();
    assert!(got.iter().copied().eq(0..got.len() as u16));
    assert!(got.len() >= 30, "{}", got.len());
}

#[test]
fn reservations_keep_room_for_delayed_commands() {
    let options = Options { faults: "delay=3:op=flush".parse().unwrap(), ..Options::default() };
    let mut host = Host::cold(options, vec![disk(64, 512)]);
    host.enable(8);
    host.create_pair(1, 4);
    host.submit(1, &Sqe::flush(1, 1));
    host.submit(1, &Sqe::flush(2, 1));
    host.submit(1, &Sqe::write_zeroes(3, 1, 0, 0, 0));
    host.ring_tail(1);
    host.step();
    assert_eq!(host.peek(1).unwrap().cid.get(), 3);
    // Two more find the queue full: one entry is used, two are promised.
    host.submit(1, &Sqe::write_zeroes(4, 1, 0, 0, 0));
    host.submit(1, &Sqe::write_zeroes(5, 1, 0, 0, 0));
    host.ring_tail(1);
    host.step();
    assert!(host.peek(1).is_none());
    host.step();
    host.step();
    assert_eq!(host.peek(1).unwrap().cid.get(), 1);
    assert_eq!(host.reap(1).unwrap().cid.get(), 2);
    host.step();
    assert_eq!(host.reap(1).unwrap().cid.get(), 4);
    assert_eq!(host.reap(1).unwrap().cid.get(), 5);
}

#[test]
fn queues_take_turns_and_may_share_completions() {
    let mut host = Host::cold(Options::default(), vec![disk(64, 512)]);
    host.enable(8);
    host.ok(0, Sqe::create_io_cq(1, 1, 256, bus(cq_at(1)), None));
    host.region.zero(cq_at(1), 256 * 16);
    for qid in 1..=3u16 {
        host.ok(0, Sqe::create_io_sq(1, qid, 128, bus(sq_at(qid)), 1));
        host.pairs.push(Pair { qid, entries: 128, tail: 0, head: 0, phase: true });
    }
    for qid in 1..=3u16 {
        for cid in 0..60 {
            host.submit(qid, &Sqe::flush(cid, 1));
        }
        host.ring_tail(qid);
    }
    host.step();
    host.pair(1).entries = 256;
    let mut seen = [0u16; 4];
    for n in 0..180 {
        let cqe = match host.peek(1) {
            Some(cqe) => cqe,
            None => {
                host.step();
                host.peek(1).unwrap()
            }
        };
        let qid = usize::from(cqe.sq_id.get());
        assert_eq!(cqe.cid.get(), seen[qid], "in order within a queue");
        seen[qid] += 1;
        assert!(cqe.sq_head.get() > cqe.cid.get());
        if n == 47 {
            assert!(seen[1..].iter().all(|&n| n > 0), "{seen:?}: one queue starves the others");
        }
    }
    assert_eq!(seen, [0, 60, 60, 60]);
}

#[test]
fn shuffled_completions_come_once_each_and_by_seed() {
    let order = |seed| {
        let mut host =
            Host::new(Options { shuffle: Some(seed), ..Options::default() }, vec![disk(64, 512)]);
        let mut got = Vec::new();
        for round in 0..4 {
            for cid in 0..40 {
                let sqe = Sqe::write_zeroes(round * 40 + cid, 1, u64::from(cid), 0, 0);
                host.submit(1, &sqe);
            }
            host.ring_tail(1);
            for _ in 0..40 {
                got.push(host.wait(1).unwrap().cid.get());
            }
        }
        assert_eq!(got.iter().collect::<BTreeSet<_>>().len(), 160);
        got
    };
    let first = order(1);
    assert_eq!(first, order(1));
    assert_ne!(first, order(2));
    assert!(!first.is_sorted());
}
