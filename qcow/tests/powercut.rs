//! Power cuts: the device's cache is lost at any point of its log; of what no flush had vouched for,
//! and of what was in flight, any part may have reached the disk (torn at sectors). The image must be
//! valid and hold what was flushed.

mod rig;

use block::{Flags, Op, Status};
use qcow::create::CreateOptions;
use rig::{Event, LogQueue, Rig, Rng, What, check, durable, fresh, qemu_check};

const DISK: u64 = 1 << 20;
const DEVICE: u64 = 6 << 20;
const SECTOR: u64 = 512;

/// What one sector was told to hold, in order: (log position when sent, stamp).
type History = Vec<Vec<(usize, u64)>>;

/// A flush that was answered: log position at its answer, and for each sector how much of its
/// history had completed when it was sent.
struct Flushed {
    at: usize,
    from: Vec<usize>,
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR as usize / 8)
}

struct Run {
    base: Vec<u8>,
    log: Vec<Event>,
    history: History,
    flushes: Vec<Flushed>,
}

enum Sent {
    /// `sure`: not a discard, which may leave a sector as it was.
    Change {
        first: u64,
        count: u64,
        sure: bool,
    },
    Flush {
        from: Vec<usize>,
    },
}

/// Random writes, zeroes, discards and flushes over a device that logs; no two in flight overlap.
fn run(seed: u64, cluster: u64, count: u32) -> Run {
    let mut rng = Rng(seed);
    let mut o = CreateOptions::new(DISK);
    o.cluster_size = cluster;
    let mut leaf = fresh(DEVICE, seed, &o);
    leaf.start_log();
    let mut rig = Rig::single(leaf);
    let sectors = (DISK / SECTOR) as usize;
    let mut history: History = vec![vec![(0, 0)]; sectors];
    let mut completed: Vec<usize> = vec![0; sectors];
    let mut flushes = Vec::new();
    let mut flying: Vec<(u64, Sent)> = Vec::new();
    let (mut sent, mut value) = (0, 0);
    while sent < count || !flying.is_empty() {
        if sent < count && flying.len() < 12 {
            let n = if rng.one_in(5) { 1 + rng.below(200) } else { 1 + rng.below(12) };
            let first = rng.below(DISK / SECTOR);
            let n = n.min(DISK / SECTOR - first);
            let clash = flying.iter().any(|(_, f)| match f {
                Sent::Change { first: b, count, .. } => first < b + count && *b < first + n,
                Sent::Flush { .. } => false,
            });
            if !clash {
                sent += 1;
                let at = rig.leaf(0).log.len();
                let (offset, len) = (first * SECTOR, n * SECTOR);
                let choice = rng.below(16);
                if choice < 3 {
                    let id = rig.send(Op::Flush, Flags::NONE, 0, 0, &[]);
                    flying.push((id, Sent::Flush { from: completed.clone() }));
                } else {
                    value += 1;
                    let write = choice < 12;
                    let told = if write { value } else { 0 };
                    for s in first..first + n {
                        history[s as usize].push((at, told));
                    }
                    let data = if write { stamp(value).repeat(n as usize) } else { Vec::new() };
                    let (op, flags) = match choice {
                        3..=11 => (Op::Write, Flags::NONE),
                        12 | 13 => (Op::WriteZeroes, Flags::NONE),
                        14 => (Op::WriteZeroes, Flags::NO_UNMAP),
                        _ => (Op::Discard, Flags::NONE),
                    };
                    let id = rig.send(op, flags, offset, len, &data);
                    flying.push((id, Sent::Change { first, count: n, sure: op != Op::Discard }));
                }
            }
        }
        for (id, status, _) in rig.turn() {
            assert_eq!(status, Status::Ok);
            let i = flying.iter().position(|f| f.0 == id).unwrap();
            match flying.swap_remove(i).1 {
                Sent::Flush { from } => {
                    let at = rig.leaf(0).log.len();
                    flushes.push(Flushed { at, from });
                }
                Sent::Change { sure: false, .. } => {}
                Sent::Change { first, count, .. } => {
                    for s in first as usize..(first + count) as usize {
                        completed[s] = history[s].len() - 1;
                    }
                }
            }
        }
    }
    let mut leaf = rig.crash().remove(0);
    let (base, log) = leaf.take_log();
    Run { base, log, history, flushes }
}

/// The disk after a cut at log position `at`: what was durable, and of what was cached or in flight
/// each sector or none.
fn cut(run: &Run, at: usize, rng: &mut Rng) -> Vec<u8> {
    let (mut disk, cached) = durable(&run.base, &run.log[..at], true);
    let flying = (at..run.log.len()).filter(|&i| run.log[i].sent <= at);
    let mood = rng.below(3);
    for i in cached.into_iter().chain(flying) {
        let What::Write { offset, data, .. } = &run.log[i].what else { continue };
        let whole = if rng.one_in(2) { Some(rng.one_in(2)) } else { None };
        for (n, sector) in data.chunks(SECTOR as usize).enumerate() {
            let lands = match mood {
                0 => false,
                1 => whole.unwrap_or_else(|| rng.one_in(2)),
                _ => rng.below(10) < 9,
            };
            if lands {
                let from = *offset as usize + n * SECTOR as usize;
                disk[from..from + sector.len()].copy_from_slice(sector);
            }
        }
    }
    disk
}

/// The image must check without corruption, and each sector hold what was flushed or something
/// that it was told later.
fn verify(run: &Run, at: usize, disk: Vec<u8>, seed: u64, ask_qemu: bool) {
    let what = format!("seed {seed}, cut at {at} of {}", run.log.len());
    if ask_qemu && let Some(code) = qemu_check(&disk) {
        assert!(code == 0 || code == 3, "{what}: qemu-img check says {code}");
    }
    let mut leaf = LogQueue::new(DEVICE, seed);
    leaf.load(&disk);
    let (leaf, bad, _) = check(leaf);
    assert_eq!(bad, 0, "{what}: corruption");
    let mut rig = Rig::single(leaf);
    let flushed = run.flushes.iter().rev().find(|f| f.at <= at);
    for first in (0..DISK / SECTOR).step_by(256) {
        let data = rig.read(first * SECTOR, 256 * SECTOR);
        for (i, sector) in data.chunks(SECTOR as usize).enumerate() {
            let s = first as usize + i;
            let found = u64::from_le_bytes(sector[..8].try_into().unwrap());
            assert!(sector == stamp(found), "{what}: sector {s} is torn");
            let from = flushed.map_or(0, |f| f.from[s]);
            let mut allowed = run.history[s][from..].iter().filter(|h| h.0 <= at);
            assert!(
                allowed.any(|h| h.1 == found),
                "{what}: sector {s} holds {found}, told since the flush: {:?}",
                &run.history[s][from..]
            );
        }
    }
    // And the image goes on: what a crash leaves must be fit to be written to.
    rig.write(0, &[0xAB; 4096]);
    rig.flush();
    let (_, bad, _) = check(rig.close().remove(0));
    assert_eq!(bad, 0, "{what}: corruption after going on");
}

fn cuts(cluster: u64, seeds: std::ops::Range<u64>, count: u32, per_seed: u64) {
    for seed in seeds {
        let run = run(seed, cluster, count);
        let mut rng = Rng(seed ^ 0x5555);
        for n in 0..per_seed {
            let at = rng.below(run.log.len() as u64 + 1) as usize;
            let disk = cut(&run, at, &mut rng);
            verify(&run, at, disk, seed, n == 0);
        }
    }
}

#[test]
fn power_cuts_with_64k_clusters() {
    cuts(65536, 1..12, 150, 10);
}

#[test]
fn power_cuts_with_4k_clusters() {
    cuts(4096, 100..112, 200, 10);
}

#[test]
fn power_cuts_with_512_byte_clusters() {
    cuts(512, 200..208, 150, 8);
}
