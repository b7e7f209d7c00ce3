//! [`Plan`]: what a seed says about a run before it begins.

use qcow::format::Compression;
use sim::{DiskConfig, Faults, Rng};

/// A layer below the image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Below {
    pub(crate) qcow: bool,
    pub(crate) cluster_bits: u32,
    pub(crate) extended_l2: bool,
    pub(crate) sectors: u64,
    pub(crate) disk: DiskConfig,
}

/// Where guest clusters are, if not in the image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DataFile {
    /// It is the guest's disk by itself.
    pub(crate) raw: bool,
    pub(crate) disk: DiskConfig,
}

/// What is done to bitmaps before a life, if the run has any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Marks {
    /// New ones: log2 of the bytes that a bit stands for.
    pub(crate) add: [Option<u32>; 2],
    /// Bits go to disk before the data.
    pub(crate) durable: bool,
}

/// What is done to internal snapshots before a life: one is deleted, one is taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keeps {
    pub(crate) drops: bool,
    pub(crate) takes: bool,
    /// The power fails after so many changes of the disk in that.
    pub(crate) cut: u64,
}

/// How a life ends.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum End {
    /// The power fails after so many changes of the disk, or when all was answered.
    Cut(u64),
    /// A clean close, and the power may fail in it, after so many changes.
    CutClose(u64),
    /// The disk is lost after so many of its changes; all must be answered, and then the power fails.
    Lost(u64),
    /// A clean close.
    Close,
}

/// What is done to an image while guests go on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Change {
    Nothing,
    /// It comes to rest, and goes on.
    Pause,
    /// A new image in front of it.
    Snapshot,
    /// What lies in lower layers is taken up; so many of the lowest ones stay.
    Stream(u64),
    /// What a layer holds goes down into the next one: so many layers below the first, if there is
    /// one that has another one below it.
    Commit(usize),
    /// The disk gets so many sectors.
    Resize(u64),
    /// An internal snapshot is taken, or deleted.
    Keep,
    Drop,
}

/// One life of an image: from opening it to its end.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    pub(crate) requests: u64,
    pub(crate) slots: u16,
    pub(crate) l2_cache: u64,
    pub(crate) depth: u16,
    /// Reactors that serve the image beside its home reactor, at most.
    pub(crate) satellites: u64,
    /// Reactors sleep when they have nothing to do.
    pub(crate) sleepy: bool,
    pub(crate) faults: Faults,
    /// At times the disk says that it is full.
    pub(crate) full: bool,
    /// What is done one after the other, and after how many requests at least.
    pub(crate) changes: Vec<(Change, u64)>,
    pub(crate) marks: Option<Marks>,
    pub(crate) keeps: Option<Keeps>,
    /// Its device is as small as it can be at first, and becomes larger.
    pub(crate) extends: bool,
    pub(crate) end: End,
    /// What a power cut would leave is looked at so often before the end.
    pub(crate) probes: u64,
    /// And our checker looks at it after each change of the disk.
    pub(crate) dense: bool,
    /// Where the power would fail, the process dies, and what it answered is there: the bytes of its
    /// journal.
    pub(crate) dies: Option<usize>,
    /// Leaks are repaired before it begins.
    pub(crate) repair: bool,
    /// The power fails after so many changes of that repair, and it is done again.
    pub(crate) cut_repair: u64,
}

impl Life {
    /// Whether requests to disks fail.
    pub(crate) fn is_broken(&self) -> bool {
        let f = &self.faults;
        f.error + f.torn + f.done + f.lost > 0
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) sectors: u64,
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_bits: u32,
    pub(crate) lazy: bool,
    pub(crate) extended_l2: bool,
    pub(crate) compression: Compression,
    /// So many of 8 clusters hold something at the beginning.
    pub(crate) filled: u64,
    /// The first clusters, of which all hold something: little is missing until the refcount table is
    /// full and moves. What a cut would leave is looked at whenever table or header are not durable.
    pub(crate) solid: u64,
    pub(crate) disk: DiskConfig,
    pub(crate) data: Option<DataFile>,
    pub(crate) below: Vec<Below>,
    pub(crate) lives: Vec<Life>,
    /// qemu-img looks at what is left at the end.
    pub(crate) qemu: bool,
}

/// Draws which images lie in files.
const FILES: u64 = 0xf14b;

fn cluster_bits(rng: &mut Rng) -> u32 {
    let weights = [60, 16, 12, 40, 12, 10, 6, 24, 4, 2, 1, 1, 1];
    9 + rng.weighted(&weights) as u32
}

fn disk(rng: &mut Rng, size: u64) -> DiskConfig {
    DiskConfig {
        size: size.next_multiple_of(4096),
        block_size: rng.pick(&[512, 512, 4096]),
        volatile_cache: !rng.one_in(4),
        discarded: rng.pick(&[None, Some(0), Some(0xb7)]),
        // Rubbish must never show. But a count that says 0 where there is none is worse.
        fresh: rng.pick(&[0xd5, 0xd5, 0]),
        file: false,
    }
}

/// Sectors of a disk with such clusters: small, and not always whole clusters.
fn sectors(rng: &mut Rng, cluster_bits: u32) -> u64 {
    let unit = 1 << (cluster_bits - 9);
    let clusters = match cluster_bits {
        // As many as make more pages of the map than fit, now and then.
        9 if rng.one_in(3) => rng.within(1200, 4000),
        ..=11 => rng.within(40, 1200),
        12..=14 => rng.within(20, 160),
        15..=17 => rng.within(4, 24),
        _ => rng.within(1, 4),
    };
    let odd = if rng.one_in(3) { rng.below(unit) } else { 0 };
    clusters * unit + odd
}

fn faults(rng: &mut Rng) -> Faults {
    let rare = |rng: &mut Rng| rng.pick(&[0, 0, 30, 100, 300]);
    let mut f = Faults { late: rng.pick(&[0, 0, 8, 30, 100]), ..Faults::default() };
    f.stall = rng.pick(&[0, 0, 0, 200, 1000]);
    if rng.one_in(3) {
        (f.error, f.torn, f.done, f.lost) = (rare(rng), rare(rng), rare(rng), rare(rng));
    }
    f
}

impl Plan {
    pub(crate) fn draw(seed: u64, long: bool) -> Plan {
        let mut rng = Rng::new(seed);
        // Each part draws from its own: one more draw in one changes no other.
        let (mut of_disks, mut of_lives) = (rng.fork(), rng.fork());
        let rng = &mut rng;
        // What came later has one of its own, so that old seeds stay what they are.
        let aside = &mut Rng::new(seed ^ 0x5ab5_ab5a);
        // The refcount table is full at 2 MiB of these, and moves.
        let growing = rng.one_in(40);
        let cluster_bits = if growing { 9 } else { cluster_bits(rng) };
        let version = if !growing && rng.one_in(6) { 2 } else { 3 };
        let refcount_bits = match version {
            2 => 16,
            _ if growing => 64,
            _ => rng.pick(&[16, 16, 1, 2, 4, 8, 16, 32, 64]),
        };
        let sectors = match sectors(rng, cluster_bits) {
            _ if growing => rng.within(4000, 5200),
            n => n * if long { rng.within(1, 3) } else { 1 },
        };
        let cluster = 1u64 << cluster_bits;
        // With little more than the disk, what was let go of is soon used again; and now and then
        // not everything fits.
        let spare = if cluster_bits > 16 { 10 } else { 24 };
        let room = sectors * 512 / 8 * rng.pick(&[7, 9, 10, 12, 16]) + spare * cluster + (64 << 10);
        let depth = rng.weighted(&[6, 3, 1, 1]);
        let below = (0..depth).map(|_| Plan::draw_below(&mut of_disks.fork(), sectors)).collect();
        let lives = rng.within(1, 3);
        let zstd = version > 2 && rng.one_in(3);
        let mut plan = Plan {
            sectors,
            version,
            cluster_bits,
            refcount_bits,
            lazy: version > 2 && rng.one_in(4),
            extended_l2: version > 2 && cluster_bits >= 14 && aside.one_in(2),
            compression: if zstd { Compression::Zstd } else { Compression::Deflate },
            filled: if growing { 7 } else { rng.pick(&[0, 0, 3, 8]) },
            solid: 0,
            disk: disk(&mut of_disks, room),
            data: None,
            below: Plan::extend_below(aside, below),
            lives: (0..lives)
                .map(|n| {
                    let mut life = Plan::draw_life(&mut of_lives.fork(), n + 1 == lives, long);
                    life.dense |= growing;
                    life
                })
                .collect(),
            qemu: rng.one_in(40),
        };
        plan.more(&mut Rng::new(seed ^ 0x0ddb_a115));
        if growing {
            plan.grow(&mut Rng::new(seed ^ 0x6_0711));
        } else {
            plan.keep(&mut Rng::new(seed ^ 0x5a11));
        }
        // The number is one that leaves what was found once as it was.
        if Rng::new(seed ^ FILES).one_in(2) {
            plan.disk.file = true;
        }
        plan.die(&mut Rng::new(seed ^ 0xdead));
        plan.extend(&mut Rng::new(seed ^ 0xe47e));
        plan
    }

    /// The refcount table gets full soon.
    fn grow(&mut self, rng: &mut Rng) {
        // A table of one cluster has 64 blocks, which count 64 clusters each.
        let used = 4096 - rng.within(8, 150);
        // Each 64 of them need an L2 table and a refcount block; header, refcount table and L1 table
        // come before.
        self.solid = (used - 4) * 32 / 33;
        self.sectors = rng.within(4200, 4600);
        self.disk.size = (2600 << 10) + rng.below(100) * 4096;
        self.disk.volatile_cache = true;
        (self.data, self.filled, self.extended_l2) = (None, 0, false);
        self.below.truncate(1);
        let life = &mut self.lives[0];
        (life.changes, life.dense) = (Vec::new(), false);
        life.requests = life.requests.max(100);
        life.end = rng.pick(&[End::Cut(u64::MAX), End::Close]);
    }

    /// What came later still.
    fn more(&mut self, rng: &mut Rng) {
        if self.version > 2 && rng.one_in(4) {
            // Room for what a larger disk needs.
            let mut disk = disk(rng, (self.sectors * 2 + 64) * 512);
            disk.volatile_cache = self.disk.volatile_cache;
            let raw = self.below.is_empty() && rng.one_in(2);
            self.data = Some(DataFile { raw, disk });
        }
        let marked = self.version > 2 && rng.one_in(3);
        let durable = rng.one_in(2);
        if marked {
            // Tables and bits have their places.
            self.disk.size += ((16u64 << self.cluster_bits) + (64 << 10)).next_multiple_of(4096);
        }
        for life in &mut self.lives {
            let other = rng.one_in(4);
            let granularity = |rng: &mut Rng| Some(rng.within(9, 16) as u32);
            let second = if rng.one_in(2) { granularity(rng) } else { None };
            let add = if rng.one_in(4) { [None; 2] } else { [granularity(rng), second] };
            life.marks = marked.then_some(Marks { add, durable: durable ^ other });
            let at = |rng: &mut Rng| rng.below(life.requests);
            let (first, last) = (at(rng), at(rng));
            let (first, last) = (first.min(last), first.max(last));
            match rng.below(12) {
                0 | 1 => {
                    // Each layer gets something of its own.
                    life.changes = vec![(Change::Snapshot, first / 2), (Change::Snapshot, first)];
                    life.changes.push((Change::Commit(rng.within(1, 2) as usize), last));
                    for below in &mut self.below {
                        below.disk.volatile_cache = !rng.one_in(4);
                    }
                }
                2 => life.changes.push((Change::Commit(1), last)),
                3 | 4 => {
                    let sectors = rng.within(self.sectors / 2 + 1, self.sectors * 3 / 2 + 1);
                    life.changes.push((Change::Resize(sectors), last));
                }
                5 => life.changes.push((Change::Snapshot, last)),
                _ => {}
            }
            let grows = life.changes.iter().any(|c| matches!(c.0, Change::Resize(_)));
            if grows && rng.one_in(2) {
                self.disk.size += (self.sectors * 256).next_multiple_of(4096);
            }
        }
    }

    /// Of some that end by a power cut the process dies instead.
    fn die(&mut self, rng: &mut Rng) {
        for life in &mut self.lives {
            let dies = matches!(life.end, End::Cut(_)) && !self.lazy && rng.one_in(2);
            life.dies = dies.then(|| rng.pick(&[4096, 64 << 10, 256 << 10]));
        }
    }

    /// Some begin on a device that becomes larger when they need it.
    fn extend(&mut self, rng: &mut Rng) {
        // What emulates smaller blocks keeps to the size that was there first.
        let emulated = self.disk.block_size > 512;
        let fixed = self.disk.file || self.data.is_some() || emulated;
        for life in &mut self.lives {
            life.extends = !fixed && rng.one_in(3);
        }
    }

    /// A third of the runs has internal snapshots.
    fn keep(&mut self, rng: &mut Rng) {
        if !rng.one_in(3) {
            return;
        }
        // Some find room for all that they keep.
        let halves = rng.pick(&[2, 2, 3, 4]);
        self.disk.size = (self.disk.size * halves / 2).next_multiple_of(4096);
        for life in &mut self.lives {
            let cut = rng.within(0, 12);
            life.keeps = Some(Keeps {
                drops: rng.one_in(4),
                takes: !rng.one_in(3),
                cut: rng.pick(&[u64::MAX, u64::MAX, cut]),
            });
            // What a write that failed has left is not known before a power cut decides.
            let vague = life.is_broken() || matches!(life.end, End::Lost(_));
            for _ in 0..rng.within(0, 2) {
                let change = if vague || rng.one_in(3) { Change::Drop } else { Change::Keep };
                let at = rng.below(life.changes.len() as u64 + 1) as usize;
                life.changes.insert(at, (change, rng.below(life.requests)));
            }
        }
    }

    fn draw_below(rng: &mut Rng, above: u64) -> Below {
        let cluster_bits = cluster_bits(rng).min(16);
        // Shorter, longer or as long as what stands on it.
        let sectors = match rng.below(4) {
            0 => rng.within(1, above),
            1 => above + rng.below(200),
            _ => above,
        };
        let room = sectors * 512 * 9 / 8 + (24 << cluster_bits) + (64 << 10);
        let qcow = rng.one_in(2);
        let size = if qcow { room } else { sectors * 512 };
        let mut disk = disk(rng, size);
        // A raw layer is as long as its disk.
        let sectors = if qcow { sectors } else { disk.size / 512 };
        disk.volatile_cache = false;
        Below { qcow, cluster_bits, extended_l2: false, sectors, disk }
    }

    fn extend_below(aside: &mut Rng, mut below: Vec<Below>) -> Vec<Below> {
        for layer in &mut below {
            layer.extended_l2 = layer.cluster_bits >= 14 && aside.one_in(3);
        }
        below
    }

    fn draw_life(rng: &mut Rng, last: bool, long: bool) -> Life {
        let requests = if long { rng.within(300, 3000) } else { rng.within(20, 200) };
        let ends = [
            End::Cut(rng.within(1, requests * 2)),
            End::Cut(u64::MAX),
            End::CutClose(rng.within(1, 30)),
            End::Lost(rng.within(1, requests)),
            End::Close,
        ];
        let changes = [
            Change::Nothing,
            Change::Pause,
            Change::Snapshot,
            Change::Stream(rng.pick(&[0, 0, 1, 2])),
        ];
        Life {
            requests,
            slots: rng.pick(&[1, 1, 2, 4, 8, 16, 64]),
            l2_cache: rng.pick(&[0, 0, 16 << 10, 8 << 20]),
            depth: rng.pick(&[1, 4, 12, 16]),
            satellites: rng.pick(&[0, 0, 1, 1, 2]),
            sleepy: rng.one_in(2),
            faults: faults(rng),
            full: rng.one_in(8),
            end: ends[rng.weighted(if last { &[6, 2, 4, 1, 6] } else { &[10, 2, 4, 1, 4] })],
            changes: vec![(changes[rng.weighted(&[6, 1, 2, 2])], rng.below(requests))],
            marks: None,
            dies: None,
            keeps: None,
            extends: false,
            probes: rng.within(0, 3),
            repair: rng.one_in(3),
            cut_repair: rng.within(0, 6),
            dense: rng.one_in(40),
        }
    }
}
