//! Power cuts where guest clusters are in an external data file, so that two devices lose what is in
//! their caches at the same moment, and where an internal snapshot shares them: at any point of the
//! (common) log; of what no flush had vouched for, and of what was in flight, any part may have reached
//! the disks (torn at sectors). The image must be valid and hold what was flushed, and a snapshot what
//! it was taken of. (`simulate` does this to images in one file, with all else that can go wrong.)

mod rig;

use block::{Flags, Op, Status};
use qcow::create::CreateOptions;
use qcow::open::Format;
use qcow::run::Options;
use rig::{
    Event, LogQueue, Rig, Rng, built, check, cut, fresh_with_data, qemu_check_with, read_offline,
    repair, snapshot,
};

const DISK: u64 = 1 << 20;
const SECTOR: u64 = 512;
const SECTORS: u64 = DISK / SECTOR;

/// What stands in the backing file.
const BELOW: u64 = 1 << 40;

/// What a snapshot holds where there is something in it.
const HELD: u64 = 1 << 41;

/// Where it is tried.
#[derive(Clone, Copy)]
struct Ground {
    cluster: u64,
    refcount_bits: u32,
    /// Bytes of the image's device.
    device: u64,
    cache: bool,
    backing: bool,
    requests: u32,
    extended: bool,
    /// The data file is the disk by itself.
    raw: bool,
    /// There is no data file, but a snapshot.
    kept: bool,
}

impl Ground {
    /// Sectors of which the snapshot holds something by itself.
    fn holds(&self, sector: u64) -> bool {
        self.kept && sector * SECTOR / self.cluster % 4 != 3
    }

    /// What a sector holds at the beginning.
    fn first(&self, sector: u64) -> u64 {
        match sector {
            s if self.holds(s) => HELD,
            s if self.backing && s < SECTORS * 3 / 4 => BELOW,
            _ => 0,
        }
    }

    fn make(&self, seed: u64, options: &CreateOptions) -> LogQueue {
        if !self.kept {
            return fresh_with_data(self.device, seed, options);
        }
        let leaf = built(self.device, seed, options, |b| {
            let held = stamp(HELD).repeat((self.cluster / SECTOR) as usize);
            for at in (0..DISK).step_by(self.cluster as usize) {
                if self.holds(at / SECTOR) {
                    b.data(at, &held).unwrap();
                }
            }
        });
        snapshot(leaf, "kept")
    }
}

/// What one sector was told to hold, in order: (log position when sent, stamp).
type History = Vec<Vec<(usize, u64)>>;

/// Something became durable: log position when that was answered, and how much of each sector's
/// history that vouches for.
enum Vouched {
    All { at: usize, from: Vec<usize> },
    Some { at: usize, first: u64, from: Vec<usize> },
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR as usize / 8)
}

struct Run {
    base: Vec<u8>,
    log: Vec<Event>,
    history: History,
    vouched: Vec<Vouched>,
}

enum Sent {
    /// `sure`: not a discard, which may leave a sector as it was.
    Change {
        first: u64,
        count: u64,
        sure: bool,
        fua: bool,
    },
    Flush {
        from: Vec<usize>,
    },
}

fn backing() -> LogQueue {
    let mut raw = LogQueue::new(DISK * 3 / 4, 1);
    raw.load(&stamp(BELOW).repeat(SECTORS as usize * 3 / 4));
    raw
}

fn open(ground: &Ground, leaf: LogQueue) -> Rig {
    if ground.backing {
        Rig::open(vec![leaf, backing()], &[Format::Qcow2, Format::Raw], Options::default())
    } else {
        Rig::single(leaf)
    }
}

/// Random writes, zeroes, discards and flushes over a device that logs; no two in flight overlap.
fn run(ground: &Ground, seed: u64) -> Run {
    let mut rng = Rng(seed);
    let mut o = CreateOptions::new(DISK);
    o.cluster_size = ground.cluster;
    o.refcount_bits = ground.refcount_bits;
    if ground.backing {
        o.backing = Some(("/layer1".to_owned(), Format::Raw));
    }
    o.extended_l2 = ground.extended;
    o.data_file_raw = ground.raw;
    let mut leaf = ground.make(seed, &o);
    if !ground.cache {
        leaf = leaf.without_cache();
    }
    leaf.start_log();
    let mut rig = open(ground, leaf);
    let mut history: History = (0..SECTORS).map(|s| vec![(0, ground.first(s))]).collect();
    let mut completed: Vec<usize> = vec![0; SECTORS as usize];
    let mut vouched = Vec::new();
    let mut flying: Vec<(u64, Sent)> = Vec::new();
    let (mut sent, mut value) = (0, 0);
    // Much of it in few places: so clusters come and go.
    let crowd = rng.below(SECTORS);
    while sent < ground.requests || !flying.is_empty() {
        if sent < ground.requests && flying.len() < 12 {
            let n = if rng.one_in(5) { 1 + rng.below(200) } else { 1 + rng.below(12) };
            let near = rng.one_in(2);
            let first = if near { (crowd + rng.below(64)) % SECTORS } else { rng.below(SECTORS) };
            let n = n.min(SECTORS - first);
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
                    let (op, flags) = match choice {
                        3 => (Op::Write, Flags::FUA),
                        4..=9 => (Op::Write, Flags::NONE),
                        10 | 11 => (Op::WriteZeroes, Flags::NONE),
                        12 | 13 => (Op::WriteZeroes, Flags::NO_UNMAP),
                        _ => (Op::Discard, Flags::NONE),
                    };
                    let write = op == Op::Write;
                    let told = if write { value } else { 0 };
                    for s in first..first + n {
                        history[s as usize].push((at, told));
                    }
                    let data = if write { stamp(value).repeat(n as usize) } else { Vec::new() };
                    let id = rig.send(op, flags, offset, len, &data);
                    let (sure, fua) = (op != Op::Discard, flags == Flags::FUA);
                    flying.push((id, Sent::Change { first, count: n, sure, fua }));
                }
            }
        }
        for (id, status, _) in rig.turn() {
            assert_eq!(status, Status::Ok);
            let i = flying.iter().position(|f| f.0 == id).unwrap();
            let at = rig.leaf(0).log.len();
            match flying.swap_remove(i).1 {
                Sent::Flush { from } => vouched.push(Vouched::All { at, from }),
                Sent::Change { sure: false, .. } => {}
                Sent::Change { first, count, fua, .. } => {
                    let range = first as usize..(first + count) as usize;
                    for s in range.clone() {
                        completed[s] = history[s].len() - 1;
                    }
                    if fua {
                        let from = completed[range].to_vec();
                        vouched.push(Vouched::Some { at, first, from });
                    }
                }
            }
        }
    }
    let mut leaf = rig.crash().remove(0);
    let (base, log) = leaf.take_log();
    Run { base, log, history, vouched }
}

/// From where on in each sector's history a disk that was cut at log position `at` may be.
fn vouched_for(run: &Run, at: usize) -> Vec<usize> {
    let mut all = vec![0; SECTORS as usize];
    for v in &run.vouched {
        let (when, first, from) = match v {
            Vouched::All { at, from } => (at, 0, from),
            Vouched::Some { at, first, from } => (at, *first as usize, from),
        };
        if *when <= at {
            for (i, &f) in from.iter().enumerate() {
                all[first + i] = all[first + i].max(f);
            }
        }
    }
    all
}

/// The image must check without corruption, and each sector hold what was flushed or something
/// that it was told later. `special`: qemu-img is asked too, and a repair must change none of that.
fn verify(ground: &Ground, run: &Run, at: usize, disk: Vec<u8>, what: &str, special: bool) {
    let mut leaf = LogQueue::new(ground.device, 99);
    if !ground.kept {
        leaf = leaf.and(DISK);
    }
    leaf.load(&disk);
    let (image, data) = if ground.kept { (disk, Vec::new()) } else { leaf.both() };
    kept(ground, &image, what);
    if special && let Some(code) = qemu_check_with(&image, &data) {
        assert!(code == 0 || code == 3, "{what}: qemu-img check says {code}");
    }
    let (mut leaf, bad, _) = check(leaf);
    assert_eq!(bad, 0, "{what}: corruption");
    if special {
        let (repaired, bad, leaks) = repair(leaf);
        assert_eq!((bad, leaks), (0, 0), "{what}: after repair");
        leaf = repaired;
    }
    let mut rig = open(ground, leaf);
    let vouched = vouched_for(run, at);
    for first in (0..SECTORS).step_by(256) {
        let disk = rig.read(first * SECTOR, 256 * SECTOR);
        for (i, sector) in disk.chunks(SECTOR as usize).enumerate() {
            let s = first as usize + i;
            let from = vouched[s];
            let told = &run.history[s][from..];
            let possible = |sector: &[u8], of: &str| {
                let found = u64::from_le_bytes(sector[..8].try_into().unwrap());
                assert!(sector == stamp(found), "{what}: sector {s} of {of} is torn");
                assert!(
                    told.iter().any(|h| h.0 <= at && h.1 == found),
                    "{what}: sector {s} of {of} holds {found:#x}, told since it was flushed: \
                     {told:x?}"
                );
            };
            possible(sector, "the disk");
            if ground.raw {
                possible(&data[s * 512..][..512], "the raw file");
            }
        }
    }
    // And the image goes on: what a crash leaves must be fit to be written to.
    rig.write(0, &[0xAB; 4096]);
    rig.flush();
    let (leaf, bad, _) = check(rig.close().remove(0));
    assert_eq!(bad, 0, "{what}: corruption after going on");
    if ground.kept {
        kept(ground, &leaf.data(), what);
    }
}

/// The snapshot shows what it was taken of.
fn kept(ground: &Ground, image: &[u8], what: &str) {
    if !ground.kept {
        return;
    }
    let below = stamp(BELOW).repeat(SECTORS as usize * 3 / 4);
    let shown = read_offline(image, Some(&below), Some("kept"));
    for (s, sector) in (0..).zip(shown.chunks(SECTOR as usize)) {
        assert!(sector == stamp(ground.first(s)), "{what}: sector {s} of the snapshot");
    }
}

fn cuts(ground: Ground, seeds: std::ops::Range<u64>, per_seed: u64) {
    for seed in seeds {
        let run = run(&ground, seed);
        let mut rng = Rng(seed ^ 0x5555);
        for n in 0..per_seed {
            let at = rng.below(run.log.len() as u64 + 1) as usize;
            let disk = cut(&run.base, &run.log, at, ground.cache, &mut rng);
            let what = format!("seed {seed}, cut at {at} of {}", run.log.len());
            verify(&ground, &run, at, disk, &what, n == 0);
        }
    }
}

const GROUND: Ground = Ground {
    cluster: 65536,
    refcount_bits: 16,
    device: 1 << 20,
    cache: true,
    backing: false,
    requests: 200,
    extended: false,
    raw: false,
    kept: false,
};

#[test]
fn an_external_data_file() {
    cuts(GROUND, 400..404, 10);
    cuts(Ground { backing: true, ..GROUND }, 410..414, 10);
    cuts(Ground { extended: true, cluster: 16384, backing: true, ..GROUND }, 420..424, 10);
}

#[test]
fn a_raw_data_file() {
    cuts(Ground { raw: true, ..GROUND }, 430..434, 10);
    let ground = Ground { extended: true, cluster: 16384, cache: false, raw: true, ..GROUND };
    cuts(ground, 440..444, 10);
}

#[test]
fn an_internal_snapshot() {
    let kept = Ground { kept: true, device: 4 << 20, ..GROUND };
    cuts(kept, 500..502, 8);
    cuts(Ground { cluster: 4096, refcount_bits: 2, backing: true, ..kept }, 510..512, 8);
    cuts(Ground { cluster: 512, refcount_bits: 64, ..kept }, 520..521, 8);
    cuts(Ground { extended: true, cluster: 16384, backing: true, ..kept }, 530..532, 8);
    cuts(Ground { cluster: 4096, cache: false, ..kept }, 540..541, 8);
}

/// A session is killed while it makes something durable; for the next one all of that is on disk,
/// since the cache has it. What that one promises must not rest on the cache.
#[test]
fn what_a_killed_session_wrote_is_made_durable_at_the_next_opening() {
    let mut options = CreateOptions::new(DISK);
    options.cluster_size = 65536;
    let mut turns = 0;
    loop {
        let mut leaf = fresh_with_data(GROUND.device, 5, &options);
        leaf.start_log();
        let mut rig = open(&GROUND, leaf);
        rig.write(0, &[1; 512]);
        rig.send(Op::Flush, Flags::NONE, 0, 0, &[]);
        for _ in 0..turns {
            rig.turn();
        }
        turns += 1;
        let done = rig.portal.in_flight() == 0;
        let mut leaf = rig.crash().remove(0);
        leaf.forget();
        let mut rig = open(&GROUND, leaf);
        rig.write(0, &[2; 512]);
        rig.flush();
        let (base, log) = rig.crash().remove(0).take_log();
        let mut rng = Rng(turns);
        for n in 0..4 {
            let mut leaf = LogQueue::new(GROUND.device, 99).and(DISK);
            leaf.load(&cut(&base, &log, log.len(), true, &mut rng));
            let read = open(&GROUND, leaf).read(0, 512);
            assert!(read == [2; 512], "killed after {turns} turns, cut {n}: lost");
        }
        if done {
            break;
        }
    }
    assert!(turns > 5);
}
