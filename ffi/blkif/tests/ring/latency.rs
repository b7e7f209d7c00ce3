//! What a ring says of how long requests took, against what its frontend saw.

use blkif::abi::{ERROR, OKAY};
use blkif::{Abi, Setup};
use block::Status;

use crate::common::{Pair, Rng, TURN, setup};

#[test]
fn a_read_and_a_write_are_watched_from_taking_to_answer() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, true));
    let stats = p.backend.stats();
    for round in 0..2u64 {
        p.disk.hold = true;
        for i in 0..6 {
            p.frontend.read(i, i * 8, 4096).unwrap();
        }
        p.frontend.push();
        p.turn();
        p.frontend.write(7, 64, &[1; 4096]).unwrap();
        p.frontend.push();
        p.turns(4);
        assert_eq!(stats.in_flight.get(), 7);
        p.disk.hold = false;
        assert_eq!(p.run().len(), 7);
        assert_eq!(stats.in_flight.get(), 0);
        // What waits for a page to be mapped the first time takes a turn more.
        let (read, write) = (stats.read_latency.read(), stats.write_latency.read());
        assert_eq!((read.count(), write.count()), (round + 1, round + 1));
        if round == 1 {
            assert_eq!(read.buckets().map(|b| b.1).sum::<u64>(), 2);
            assert!(read.sum() >= 2 * 5 * TURN && read.sum() < 2 * 8 * TURN, "{}", read.sum());
            assert!(write.sum() >= 2 * 4 * TURN && write.sum() < 2 * 7 * TURN);
        }
    }
}

#[test]
fn errors_end_it_and_what_was_refused_never_began() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, false));
    let stats = p.backend.stats();
    p.disk.fail(|_| Some(Status::Medium));
    assert_eq!(p.read(0, 4096).0, ERROR);
    assert_eq!(stats.read_latency.read().count(), 1);
    assert_eq!(p.read(u64::MAX / 512, 4096).0, ERROR);
    assert_eq!(stats.read_latency.read().count(), 1);
    // Nor do flushes count.
    p.disk.fault = None;
    p.frontend.flush(1, 0, &[]).unwrap();
    assert_eq!(p.one(), OKAY);
    assert_eq!(stats.write_latency.read().count(), 0);
}

/// Requests of all sizes, answered in any order: the sum is that of all of them, and those that were
/// watched are like the others.
#[test]
fn the_sum_is_exact_and_the_sample_is_fair() {
    for persistent in [false, true] {
        let mut p = Pair::new(Setup { start: u32::MAX - 99, ..setup(Abi::NATIVE, 0, persistent) });
        let stats = p.backend.stats();
        p.disk.shuffle = Some(Rng(7));
        let mut rng = Rng(11);
        let mut began = [(0, false); 32];
        let mut free: Vec<u64> = (0..32).collect();
        let (mut all, mut sums, mut counts) = (0, [0u64; 2], [0u64; 2]);
        for _ in 0..20_000 {
            for _ in 0..rng.below(5) {
                let Some(at) = free.pop() else { break };
                let (write, sector) = (rng.one_in(3), rng.below(1000) * 8);
                let len = if rng.one_in(4) { 16384 } else { 4096 };
                let sent = match write {
                    true => p.frontend.write(at, sector, &vec![3; len]),
                    false => p.frontend.read(at, sector, len as u32),
                };
                sent.unwrap();
                began[at as usize] = (p.now + TURN, write);
            }
            p.frontend.push();
            p.turn();
            while let Some(done) = p.reap() {
                assert_eq!(done.status, OKAY);
                let (at, write) = began[done.cookie as usize];
                all += p.now - at;
                sums[usize::from(write)] += p.now - at;
                counts[usize::from(write)] += 1;
                free.push(done.cookie);
            }
        }
        let waiting: u64 = (0..32).filter(|n| !free.contains(n)).count() as u64;
        assert_eq!(stats.in_flight.get(), waiting);
        let unended: u64 =
            (0..32u64).filter(|n| !free.contains(n)).map(|n| p.now - began[n as usize].0).sum();
        assert_eq!(stats.in_flight_ns.get(), all + unended);
        for (write, latency) in [(0, &stats.read_latency), (1, &stats.write_latency)] {
            let read = latency.read();
            let (mean, real) = (read.sum() / read.count(), sums[write] / counts[write]);
            assert!(read.count() > 1000, "{}", read.count());
            assert!(mean.abs_diff(real) < real / 8, "{mean} against {real} ns");
        }
    }
}
