//! Requests and replies, by a client written by hand against a server on a memory disk.

mod common;

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use block::{Flags, Op, Status};
use common::*;

#[test]
fn what_is_written_is_read_in_every_size_alignment_and_reply_style() {
    for (block, structured) in [(512, true), (512, false), (4096, true), (4096, false)] {
        let h = Harness::new(Setup { block, ..Setup::default() });
        let mut c = h.connect().go(structured, false);
        let mut model = vec![0u8; 16 << 20];
        let mut random = Random(u64::from(block) + u64::from(structured));
        for _ in 0..300 {
            let len = match random.below(4) {
                0 => random.below(20),
                1 => random.below(40_000),
                2 => random.below(64) * 512,
                _ => random.below(1_500_000),
            };
            let mut offset = random.below(model.len() as u64 - len + 1);
            if random.below(2) == 0 {
                offset &= !511;
            }
            let (from, to) = (offset as usize, (offset + len) as usize);
            match random.below(5) {
                0 | 1 => {
                    let data = random.bytes(len as usize);
                    assert_eq!(c.write(offset, &data), 0);
                    model[from..to].copy_from_slice(&data);
                }
                2 => {
                    let flags = [0, FUA, NO_HOLE][random.below(3) as usize];
                    assert_eq!(c.ask(ZEROES, flags, offset, len as u32, b"").error, 0);
                    model[from..to].fill(0);
                }
                3 => {
                    assert_eq!(c.ask(TRIM, 0, offset, len as u32, b"").error, 0);
                    let mask = block as usize - 1;
                    let (from, to) = ((from + mask) & !mask, to & !mask);
                    if from < to {
                        model[from..to].fill(0);
                    }
                }
                _ => assert!(c.read(offset, len as u32) == model[from..to]),
            }
        }
        assert!(c.read(0, 16 << 20) == model && h.bytes(0, 16 << 20) == model);
    }
}

#[test]
fn many_requests_in_flight_are_each_answered_once() {
    let h = Harness::new(Setup::default());
    for structured in [true, false] {
        let mut c = h.connect().go(structured, true);
        let mut reader = c.twin();
        let sender = std::thread::spawn(move || {
            for i in 0..3000u64 {
                let at = i % 4096 * 4096;
                if i % 3 == 0 {
                    c.send(READ, 0, at, 4096, b"");
                } else {
                    c.send(WRITE, 0, at, 4096, &[i as u8; 4096]);
                }
            }
            c
        });
        let mut seen = std::collections::HashSet::new();
        while seen.len() < 3000 {
            let mut answer = Answer::default();
            let len = |cookie| if (cookie - 1) % 3 == 0 { 4096 } else { 0 };
            let (cookie, last) = reader.message_of(len, &mut answer);
            let bytes: usize = answer.data.iter().map(|d| d.1.len()).sum();
            assert_eq!(bytes, len(cookie));
            assert!(last && answer.error == 0 && seen.insert(cookie));
        }
        drop(sender.join().unwrap());
    }
}

#[test]
fn wrong_requests_get_their_error_and_the_connection_goes_on() {
    let h = Harness::new(Setup::default());
    let size = 16 << 20;
    for structured in [true, false] {
        let mut c = h.connect().go(structured, true);
        assert_eq!(c.ask(READ, 0, size, 512, b"").error, 22);
        assert_eq!(c.ask(READ, 0, u64::MAX - 511, 512, b"").error, 22);
        assert_eq!(c.ask(READ, 0, 1, 512, b"").error, 22);
        assert_eq!(c.ask(READ, NO_HOLE, 0, 512, b"").error, 22);
        assert_eq!(c.ask(READ, 0, 0, u32::MAX, b"").error, 22);
        assert_eq!(c.write(size - 512, &[1; 1024]), 28);
        assert_eq!(c.write(100, &[1; 1024]), 22);
        assert_eq!(c.ask(TRIM, 0, size, 512, b"").error, 22);
        assert_eq!(c.ask(ZEROES, 0, size - 512, 1024, b"").error, 28);
        assert_eq!(c.ask(FLUSH, 0, 512, 0, b"").error, 22);
        assert_eq!(c.ask(5, 0, 0, 512, b"").error, 22);
        assert_eq!(c.ask(77, 0, 0, 0, b"").error, 22);
        assert_eq!(c.ask(STATUS, 0, 0, 0, b"").error, 22);
        assert_eq!(c.ask(READ, 0, 0, 0, b""), Answer::default());
        assert_eq!(c.write(512, b""), 0);
        assert_eq!(c.ask(ZEROES, 0, 512, 0, b"").error, 0);
        assert_eq!(c.ask(TRIM, 0, 512, 0, b"").error, 0);
        assert_eq!(c.write(512, &[3; 512]), 0);
        assert_eq!(c.read(512, 512), [3; 512]);
    }
    h.wait_empty();
    let (counters, took) = (h.server().totals().1, h.server().latencies());
    assert_eq!((counters.errors, counters.begun), (26, counters.ended));
    assert_eq!((took.read.count(), took.write.count()), (counters.reads, counters.writes));
    assert!(took.read.sum() > 0);
}

#[test]
fn a_write_that_is_too_long_is_taken_and_refused() {
    let h = Harness::new(Setup { size: 64 << 20, ..Setup::default() });
    let mut c = h.connect().go(true, false);
    assert_eq!(c.write(0, &vec![9; (32 << 20) + 1]), 22);
    assert_eq!(c.write(0, &vec![7; 32 << 20]), 0);
    assert_eq!(c.ask(READ, 0, 0, (32 << 20) + 1, b"").error, 22);
    let whole = c.ask(READ, 0, 0, 32 << 20, b"");
    assert!(whole.data.len() >= 128 && whole.bytes(0, 32 << 20).iter().all(|&b| b == 7));
    let mut simple = h.connect().go(false, false);
    assert!(simple.read(1, (32 << 20) - 1).iter().all(|&b| b == 7));
}

#[test]
fn df_gets_one_chunk_or_overflow() {
    let h = Harness::new(Setup::default());
    let mut c = h.connect().go(true, false);
    assert_eq!(c.write(0, &[5; 300_000]), 0);
    let one = c.ask(READ, DF, 3, 65536, b"");
    assert_eq!((one.data.len(), one.data[0].0), (1, 3));
    assert_eq!(c.ask(READ, DF, 0, 256 << 10, b"").data.len(), 1);
    let over = c.ask(READ, DF, 1, 256 << 10, b"");
    assert_eq!((over.error, over.data.len()), (75, 0));
    assert_eq!(c.ask(READ, 0, 1, 256 << 10, b"").data.len(), 2);
}

#[test]
fn durability_is_asked_of_the_image() {
    let h = Harness::new(Setup::default());
    let mut c = h.connect().go(true, false);
    let flushes = || h.control.seen(Op::Flush).len();
    c.ask(WRITE, FUA, 0, 4096, &[1; 4096]);
    assert_eq!(h.control.seen(Op::Write), [(Flags::FUA, 0, 4096)]);
    assert_eq!(flushes(), 0);
    c.ask(FLUSH, 0, 0, 0, b"");
    assert_eq!(flushes(), 1);
    // Several pieces: one flush after all of them.
    c.ask(WRITE, FUA, 0, 1 << 20, &vec![1; 1 << 20]);
    assert!(h.control.seen(Op::Write)[1..].iter().all(|w| w.0 == Flags::NONE));
    assert_eq!((flushes(), h.control.log.lock().last().unwrap().0), (2, Op::Flush));
    c.ask(WRITE, FUA, 3, 5, b"12345");
    assert_eq!(h.control.seen(Op::Write).last().unwrap(), &(Flags::FUA, 0, 512));
    c.ask(TRIM, FUA, 0, 4096, b"");
    c.ask(ZEROES, FUA | NO_HOLE, 0, 4096, b"");
    assert_eq!(flushes(), 4);
    assert_eq!(h.control.seen(Op::WriteZeroes), [(Flags::NO_UNMAP, 0, 4096)]);
    c.ask(ZEROES, FAST, 512, 4096, b"");
    assert_eq!(h.control.seen(Op::WriteZeroes)[1], (Flags::FAST_ONLY, 512, 4096));
    assert_eq!(c.ask(ZEROES, FAST, 1, 4096, b"").error, 95);
    // A write that fails is not flushed as if it had been done.
    h.control.fail(0..1, Status::NoSpace);
    assert_eq!(c.ask(WRITE, FUA, 0, 1 << 20, &vec![1; 1 << 20]).error, 28);
    assert_eq!(flushes(), 4);
    // A flush that fails is an error.
    h.control.fail(0..1, Status::Medium);
    assert_eq!(c.ask(FLUSH, 0, 0, 0, b"").error, 5);
    assert_eq!(c.ask(TRIM, FUA, 4096, 4096, b"").error, 5);
}

#[test]
fn zeroes_are_written_by_hand_where_the_image_cannot() {
    let h = Harness::new(Setup { write_zeroes: false, ..Setup::default() });
    let mut c = h.connect().go(true, false);
    assert_eq!(c.write(0, &vec![0xee; 8 << 20]), 0);
    assert_eq!(c.ask(ZEROES, 0, 700, (4 << 20) + 1, b"").error, 0);
    let mut want = vec![0xee; 8 << 20];
    want[700..700 + (4 << 20) + 1].fill(0);
    assert!(h.bytes(0, 8 << 20) == want);
    assert_eq!(c.ask(ZEROES, FAST, 0, 4096, b"").error, 95);
    assert!(h.control.seen(Op::WriteZeroes).is_empty());

    // An image that finds out only when it is asked.
    let h = Harness::new(Setup::default());
    let mut c = h.connect().go(true, false);
    assert_eq!(c.write(0, &vec![0xee; 2 << 20]), 0);
    h.control.refuse_zeroes.store(true, Ordering::Release);
    assert_eq!(c.ask(ZEROES, FAST, 512, 4096, b"").error, 95);
    assert!(h.bytes(0, 2 << 20).iter().all(|&b| b == 0xee));
    assert_eq!(c.ask(ZEROES, 0, 1000, 1_000_000, b"").error, 0);
    assert_eq!(h.control.seen(Op::WriteZeroes).len(), 2);
    let mut want = vec![0xee; 2 << 20];
    want[1000..1_001_000].fill(0);
    assert!(h.bytes(0, 2 << 20) == want);
}

#[test]
fn a_read_only_export_refuses_writes() {
    let h = Harness::new(Setup { read_only: true, ..Setup::default() });
    h.data.write(4096, &[8; 512]);
    let mut c = h.connect().go(true, false);
    assert_eq!(c.write(0, &[1; 700]), 1);
    assert_eq!(c.ask(TRIM, 0, 0, 512, b"").error, 1);
    assert_eq!(c.ask(ZEROES, 0, 0, 512, b"").error, 1);
    assert_eq!(c.ask(FLUSH, 0, 0, 0, b"").error, 0);
    assert_eq!(c.read(4096, 512), [8; 512]);
    assert!(h.control.log.lock().iter().all(|r| r.0 == Op::Read));
}

#[test]
fn block_status_tells_holes_and_merges_neighbours() {
    let h = Harness::new(Setup::default());
    let mut c = h.connect().go(true, false);
    h.data.write(0x30000, &[1; 0x20000]);
    let status =
        |c: &mut Client, flags, offset, len| c.ask(STATUS, flags, offset, len, b"").extents;
    let want = [(0x30000, 3), (0x20000, 0), (0x10000, 3)];
    assert_eq!(status(&mut c, 0, 0, 0x60000), want);
    assert_eq!(status(&mut c, REQ_ONE, 0x30000, 0x60000), [(0x10000, 0)]);
    assert_eq!(status(&mut c, 0, 0x2fff0, 0x20), [(0x10, 3), (0x10, 0)]);
    assert_eq!(status(&mut c, 0, 0, 16 << 20).iter().map(|e| e.0).sum::<u32>(), 16 << 20);
    assert_eq!(c.ask(STATUS, 0, 16 << 20, 512, b"").error, 22);
    let mut plain = h.connect().go(false, false);
    assert_eq!(plain.ask(STATUS, 0, 0, 512, b"").error, 22);
}

#[test]
fn a_status_of_two_contexts_has_a_chunk_for_each() {
    let h = Harness::new(Setup { bitmaps: true, ..Setup::default() });
    h.data.write(0x30000, &[1; 0x20000]);
    let mut c = h.connect();
    c.greet();
    c.structured = true;
    assert_eq!(c.option(8, b""), 1);
    let mut set = [0, 0, 0, 0, 0, 0, 0, 3].to_vec();
    for query in ["qemu:dirty-bitmap:half", "qemu:dirty-bitmap:none", "base:allocation"] {
        set.extend((query.len() as u32).to_be_bytes());
        set.extend(query.as_bytes());
    }
    assert_eq!(c.option(10, &set), 1);
    assert_eq!(c.option(7, b"\0\0\0\0\0\0"), 1);
    let answer = c.ask(STATUS, 0, 0, 2 << 20, b"");
    assert_eq!(answer.extents, [(0x30000, 3), (0x20000, 0), (0x1b0000, 3)]);
    assert_eq!(answer.seconds, [(0x80000, 1), (0x80000, 0), (0x80000, 1), (0x80000, 0)]);
    let answer = c.ask(STATUS, REQ_ONE, 0x7fe00, 1 << 20, b"");
    assert_eq!((answer.extents.len(), answer.seconds), (1, vec![(512, 1)]));
}

#[test]
fn errors_of_the_device_reach_the_client() {
    let h = Harness::new(Setup::default());
    let mut c = h.connect().go(true, false);
    let mut simple = h.connect().go(false, false);
    for (status, error) in [
        (Status::Medium, 5),
        (Status::NoSpace, 28),
        (Status::Gone, 108),
        (Status::Timeout, 5),
        (Status::Corrupt, 5),
        (Status::ReadOnly, 1),
        (Status::Unsupported, 22),
        (Status::Invalid, 22),
    ] {
        h.control.fail(4096..8192, status);
        for c in [&mut c, &mut simple] {
            assert_eq!(c.ask(READ, 0, 4096, 4096, b"").error, error);
            assert_eq!(c.write(4096, &[1; 4096]), error);
            // The edge of a partial write cannot be read, or its block not be written.
            assert_eq!(c.write(4097, &[1; 4096]), error);
        }
    }
    // Of a read in several chunks, what is good comes, and where it failed is said.
    h.control.fail(1 << 19..(1 << 19) + 1, Status::Medium);
    let answer = c.ask(READ, 0, 0, 1 << 20, b"");
    assert_eq!((answer.error, answer.error_at), (5, Some(1 << 19)));
    assert!(answer.data.iter().all(|(at, _)| *at != 1 << 19));
    // A simple reply has to be good or bad as a whole: held until that is known.
    assert_eq!(simple.ask(READ, 0, 0, 1 << 20, b"").error, 5);
    assert_eq!(simple.read(1 << 20, 1 << 20).len(), 1 << 20);
    // A write that fails half-way is taken to its end, and answered.
    let before = h.control.seen(Op::Write).len();
    assert_eq!(c.write(0, &vec![1; 8 << 20]), 5);
    assert!(h.control.seen(Op::Write).len() > before);
    assert_eq!(c.write(0, &[1; 512]), 0);
}

#[test]
fn a_simple_read_too_long_to_hold_is_cut_off_when_it_fails_late() {
    let h = Harness::new(Setup::default());
    let mut c = h.connect().go(false, false);
    h.control.fail(12 << 20..(12 << 20) + 1, Status::Medium);
    c.send(READ, 0, 0, 16 << 20, b"");
    let mut all = Vec::new();
    std::io::Read::read_to_end(&mut c.s, &mut all).unwrap();
    assert_eq!(all[4..8], [0; 4]);
    assert!(all.len() > 1 << 20 && all.len() < 16 << 20);
    // At the very beginning there is still a way to say it.
    h.control.fail(0..1, Status::Medium);
    let mut c = h.connect().go(false, false);
    assert_eq!(c.ask(READ, 0, 0, 16 << 20, b"").error, 5);
    assert_eq!(c.read(512, 512), [0; 512]);
}

#[test]
fn partial_writes_of_several_clients_never_undo_each_other() {
    let h = Harness::new(Setup::default());
    const EACH: u64 = 40;
    // Four clients share every block of the first 64 KiB; a fifth writes whole blocks among them.
    std::thread::scope(|scope| {
        for id in 0..4u64 {
            let mut c = h.connect().go(id % 2 == 0, false);
            scope.spawn(move || {
                let mut sent = 0;
                for round in 0..EACH {
                    for block in 0..32 {
                        let at = block * 512 + id * 100 + round;
                        c.send(WRITE, 0, at, 1, &[id as u8 + 1]);
                        sent += 1;
                    }
                }
                for _ in 0..sent {
                    let mut answer = Answer::default();
                    c.message(0, &mut answer);
                    assert_eq!(answer.error, 0);
                }
            });
        }
        let mut c = h.connect().go(true, true);
        scope.spawn(move || {
            for _ in 0..EACH {
                for block in 32..40 {
                    assert_eq!(c.write(block * 512, &[9; 512]), 0);
                }
            }
        });
    });
    let bytes = h.bytes(0, 40 * 512);
    for block in 0..32 {
        for id in 0..4 {
            let at = block * 512 + id * 100;
            assert_eq!(bytes[at..at + EACH as usize], [id as u8 + 1; EACH as usize]);
        }
    }
    assert!(bytes[32 * 512..].iter().all(|&b| b == 9));
}

#[test]
fn a_whole_block_is_not_undone_by_a_partial_write_in_flight() {
    let h = Harness::new(Setup::default());
    let (mut a, mut b) = (h.connect().go(true, false), h.connect().go(true, true));
    h.control.hold(true);
    a.send(WRITE, 0, 100, 4, b"part");
    eventually("the block is read", || h.control.seen(Op::Read).len() == 1);
    b.send(WRITE, 0, 0, 512, &[7; 512]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(h.control.seen(Op::Write).is_empty(), "waits for the other's claim");
    // Other blocks are not concerned.
    b.send(WRITE, 0, 512, 512, &[7; 512]);
    eventually("another block is written", || h.control.seen(Op::Write).len() == 1);
    h.control.hold(false);
    for (c, n) in [(&mut a, 1), (&mut b, 2)] {
        for _ in 0..n {
            let mut answer = Answer::default();
            c.message(0, &mut answer);
            assert_eq!(answer.error, 0);
        }
    }
    assert_eq!(h.bytes(0, 512), [7; 512]);
}

/// Keeps many random requests in flight over `[from, to)`, never two on the same bytes, and
/// checks every read. Returns what the range holds in the end.
fn churn(mut c: Client, from: u64, to: u64) -> Vec<u8> {
    let mut random = Random(from);
    let mut model = vec![0u8; (to - from) as usize];
    // Range of each, and whether it is a read.
    let mut flying: HashMap<u64, (usize, usize, bool)> = HashMap::new();
    let mut answers: HashMap<u64, Answer> = HashMap::new();
    let rounds = 1500;
    for round in 0..=rounds {
        let len = match random.below(10) {
            0 => 1 + random.below(700_000),
            1..=4 => 1 + random.below(1500),
            _ => (1 + random.below(16)) * 512,
        };
        let mut offset = from + random.below(to - from - len);
        if random.below(2) == 0 {
            offset = offset.next_multiple_of(512).min(to - len);
        }
        let (at, end) = ((offset - from) as usize, (offset + len - from) as usize);
        if round < rounds && flying.values().all(|f| f.1 <= at || end <= f.0) {
            let what = random.below(5);
            let cookie = match what {
                0 | 1 => c.send(READ, 0, offset, len as u32, b""),
                2 => {
                    model[at..end].fill(0);
                    c.send(ZEROES, 0, offset, len as u32, b"")
                }
                _ => {
                    let data = random.bytes(len as usize);
                    model[at..end].copy_from_slice(&data);
                    c.send(WRITE, 0, offset, len as u32, &data)
                }
            };
            flying.insert(cookie, (at, end, what < 2));
        }
        while flying.len() > if round < rounds { 24 } else { 0 } {
            let mut answer = Answer::default();
            let of = |cookie| match flying[&cookie] {
                (at, end, true) => end - at,
                _ => 0,
            };
            let (cookie, last) = c.message_of(of, &mut answer);
            assert_eq!(answer.error, 0);
            answers.entry(cookie).or_default().data.extend(answer.data);
            if !last {
                continue;
            }
            let (mut all, (at, end, read)) =
                (answers.remove(&cookie).unwrap(), flying.remove(&cookie).unwrap());
            if read {
                let offset = from + at as u64;
                if !c.structured {
                    all.data[0].0 = offset;
                }
                assert!(all.bytes(offset, end - at) == model[at..end]);
            }
        }
    }
    model
}

#[test]
fn deep_queues_of_several_clients_that_share_blocks() {
    for write_zeroes in [true, false] {
        let h = Harness::new(Setup { write_zeroes, ..Setup::default() });
        let cuts = [0, (5 << 20) + 77, (10 << 20) + 300, 16 << 20];
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|i| {
                    let c = h.connect().go(i != 1, false);
                    scope.spawn(move || churn(c, cuts[i], cuts[i + 1]))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(h.bytes(0, 16 << 20) == models.concat());
    }
}
