//! What is compared: disks, how servers are set up, and what is sent, as data.

use std::collections::BTreeMap;

use bench::run::{Distribution, Job, Mix, Shape, Sizes};

use crate::peer::qemu::{Aio, Cache};
use crate::peer::{Leaf, Setup};
use crate::results::Frontend;

const KIB: u32 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What a disk holds, the same in every format.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Content {
    /// Data everywhere.
    Data,
    /// Every cluster has its place, and none was written: metadata as of a full disk in a sparse file.
    Allocated,
    /// Nothing; made anew for each server that is started.
    Empty,
    /// Data everywhere, of which each of so many images in a chain has its share.
    Chain(u32),
}

/// A disk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Disk {
    /// Bytes.
    pub size: u64,
    /// What it holds.
    pub content: Content,
    /// Devices that it lies on, in stripes if there are more than one.
    pub devices: u32,
    /// So many of them, loaded together.
    pub count: u32,
}

impl Disk {
    fn new(size: u64, content: Content) -> Disk {
        Disk { size, content, devices: 1, count: 1 }
    }
}

/// Servers of one disk, and what is sent to each.
#[derive(Clone, PartialEq, Debug)]
pub struct Case {
    /// What sets it apart from the profile's other cases.
    pub labels: BTreeMap<String, String>,
    /// The disk.
    pub disk: Disk,
    /// Who takes part, and how. polldisk comes first, and of it what others are put beside.
    pub setups: Vec<Setup>,
    /// What is sent, one after the other; times are set when it is known how many there are.
    pub jobs: Vec<Job>,
    /// Sent to each server when it has started, and not measured: what it keeps of the disk's metadata is
    /// there, then.
    pub first: Option<Job>,
}

/// What is compared.
pub struct Profile {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it asks, in a sentence.
    pub question: &'static str,
    /// Whether images should be on a disk: in memory it would tell nothing.
    pub on_disk: bool,
    cases: fn(bool) -> Vec<Case>,
}

impl Profile {
    /// The profile of that name.
    pub fn find(name: &str) -> Option<&'static Profile> {
        PROFILES.iter().find(|p| p.name == name)
    }

    /// Its cases; fewer of them if it is to be quick.
    pub fn cases(&self, quick: bool) -> Vec<Case> {
        (self.cases)(quick)
    }
}

/// All of them.
pub static PROFILES: [Profile; 10] = [
    Profile {
        name: "latency",
        question: "How long does one request take alone, as ioping asks, and what does it cost?",
        on_disk: false,
        cases: latency,
    },
    Profile {
        name: "random",
        question: "What does a random request cost, one at a time and 32 at a time?",
        on_disk: false,
        cases: random,
    },
    Profile {
        name: "sequential",
        question: "What does moving much data in order cost?",
        on_disk: false,
        cases: sequential,
    },
    Profile {
        name: "l2-cache",
        question: "What do random reads over a large disk cost, by the memory for QCOW2's L2 tables?",
        on_disk: false,
        cases: l2_cache,
    },
    Profile {
        name: "direct-flush",
        question: "What do the page cache and flushes change for writes?",
        on_disk: true,
        cases: direct_flush,
    },
    Profile {
        name: "raid0",
        question: "What do stripes over 2 and 4 devices cost, and what do they bring?",
        on_disk: false,
        cases: raid0,
    },
    Profile {
        name: "cold-allocate",
        question: "What does a write cost that has to allocate its cluster?",
        on_disk: false,
        cases: cold_allocate,
    },
    Profile {
        name: "snapshot-chain",
        question: "What does a chain of 8 or 32 images cost, against one image?",
        on_disk: false,
        cases: snapshot_chain,
    },
    Profile {
        name: "mixed-70-30",
        question: "What do 70 % reads and 30 % writes cost, together?",
        on_disk: false,
        cases: mixed,
    },
    Profile {
        name: "many-disks",
        question: "What does a request cost when one server has 1, 8 or 32 disks?",
        on_disk: false,
        cases: many_disks,
    },
];

/// A job whose requests have one size and go anywhere.
fn random_job(reads: u8, size: u32, depth: u32) -> Job {
    let name = match reads {
        100 => "randread".to_owned(),
        0 => "randwrite".to_owned(),
        _ => format!("randrw-{reads}-{}", 100u8.saturating_sub(reads)),
    };
    Job {
        name,
        mix: Mix { reads, trims: 0 },
        sizes: Sizes(vec![(size, 100)]),
        distribution: Distribution::Uniform,
        shape: Shape::Depth(depth),
        ..Job::default()
    }
}

fn sequential_job(reads: u8, size: u32, depth: u32) -> Job {
    let name = if reads == 100 { "read" } else { "write" };
    let distribution = Distribution::Sequential;
    Job { name: name.into(), distribution, ..random_job(reads, size, depth) }
}

/// Reads and writes of each size at each depth.
fn both(make: fn(u8, u32, u32) -> Job, sizes: &[u32], depths: &[u32]) -> Vec<Job> {
    let mut jobs = Vec::new();
    for &size in sizes {
        for &depth in depths {
            jobs.extend([100, 0].map(|reads| make(reads, size, depth)));
        }
    }
    jobs
}

/// All that can serve a plain disk, each in the ways that suit it.
fn everybody(quick: bool) -> Vec<Setup> {
    let mut setups = vec![
        Setup::polldisk(Frontend::Ring, Leaf::Model),
        Setup::polldisk(Frontend::Nbd, Leaf::File),
        Setup::qsd(Aio::IoUring),
        Setup::qsd(Aio::Native).iothread(),
        Setup::qemu_nbd(Aio::Native),
        Setup::nbdkit_memory(),
        Setup::nbdkit_file(),
        Setup::tapdisk(),
        Setup::qemu_dp(),
        Setup::fio(),
        // A drive, if one is named.
        Setup::polldisk(Frontend::Device, Leaf::Device),
        Setup::fio_drive(),
        Setup::spdk(),
    ];
    if !quick {
        setups.insert(1, Setup::polldisk(Frontend::Ring, Leaf::File));
        setups.push(Setup::qsd(Aio::Native));
        setups.push(Setup::qsd(Aio::Threads));
    }
    setups
}

fn plain(quick: bool) -> Disk {
    Disk::new(if quick { 256 * MIB } else { 2 * GIB }, Content::Data)
}

fn case(disk: Disk, setups: Vec<Setup>, jobs: Vec<Job>) -> Case {
    Case { labels: BTreeMap::new(), disk, setups, jobs, first: None }
}

fn labelled(name: &str, value: impl ToString, case: Case) -> Case {
    Case { labels: BTreeMap::from([(name.to_owned(), value.to_string())]), ..case }
}

fn latency(quick: bool) -> Vec<Case> {
    let sizes: &[u32] = if quick { &[4 * KIB] } else { &[512, 4 * KIB, 64 * KIB] };
    vec![case(plain(quick), everybody(quick), both(random_job, sizes, &[1]))]
}

fn random(quick: bool) -> Vec<Case> {
    let (sizes, depths): (&[u32], &[u32]) = match quick {
        true => (&[4 * KIB], &[1, 32]),
        false => (&[4 * KIB, 8 * KIB, 64 * KIB], &[1, 8, 32]),
    };
    vec![case(plain(quick), everybody(quick), both(random_job, sizes, depths))]
}

fn sequential(quick: bool) -> Vec<Case> {
    let (sizes, depths): (&[u32], &[u32]) = match quick {
        true => (&[1024 * KIB], &[4]),
        false => (&[64 * KIB, 1024 * KIB], &[1, 4, 16]),
    };
    vec![case(plain(quick), everybody(quick), both(sequential_job, sizes, depths))]
}

/// What the servers' L2 cache and its entries have, by the letters of the study that began this. There
/// is none with all of it: 64 KiB clusters need 16 MiB for 128 GiB.
const CONFIGURATIONS: [(char, Cache); 9] = [
    ('A', Cache { bytes: 3 << 20, entry: 64 << 10 }),
    ('B', Cache { bytes: 6_553_600, entry: 64 << 10 }),
    ('C', Cache { bytes: 8 << 20, entry: 64 << 10 }),
    ('D', Cache { bytes: 16 << 20, entry: 64 << 10 }),
    ('E', Cache { bytes: 3 << 20, entry: 16 << 10 }),
    ('F', Cache { bytes: 8 << 20, entry: 16 << 10 }),
    ('G', Cache { bytes: 3 << 20, entry: 8 << 10 }),
    ('H', Cache { bytes: 6_553_600, entry: 8 << 10 }),
    ('I', Cache { bytes: 8 << 20, entry: 8 << 10 }),
];

/// Guest bytes for which 64 KiB clusters have 4 KiB of L2 entries: no server reads less of them at a time.
const PER_4K_OF_L2: u64 = (4096 / 8) * (64 << 10);

/// One read for each part of a disk's L2 tables. By chance alone some would still be missing after ten times
/// as many, and each of these would cost as much as many hits.
fn each_part(disk: &Disk) -> Job {
    Job {
        name: "first".into(),
        distribution: Distribution::Stride(PER_4K_OF_L2),
        requests: Some(disk.size.div_ceil(PER_4K_OF_L2).max(1)),
        seconds: 3600.0,
        ..random_job(100, 4 * KIB, 32)
    }
}

fn l2_cache(quick: bool) -> Vec<Case> {
    let job = || vec![random_job(100, 4 * KIB, 32)];
    let ours = || {
        vec![
            Setup::polldisk(Frontend::Ring, Leaf::Model),
            Setup::polldisk(Frontend::Nbd, Leaf::File),
        ]
    };
    let small = case(Disk::new(GIB, Content::Allocated), ours(), job());
    let mut all = ours();
    let budgets: &[u64] =
        if quick { &[3 << 20, 8 << 20] } else { &[3 << 20, 6_553_600, 8 << 20, 16 << 20] };
    for &bytes in budgets {
        all.push(Setup::polldisk(Frontend::Ring, Leaf::Model).budget(bytes));
        if !quick {
            all.push(Setup::polldisk(Frontend::Nbd, Leaf::File).budget(bytes));
        }
    }
    for (letter, cache) in CONFIGURATIONS {
        all.push(Setup::qsd(Aio::Native).cache(letter, cache));
        all.push(Setup::qemu_dp().cache(letter, cache));
    }
    if !quick {
        all.push(Setup::qsd(Aio::Native));
        all.push(Setup::qemu_dp());
    }
    all.push(Setup::nbdkit_memory());
    let large = case(Disk::new(128 * GIB, Content::Allocated), all, job());
    let mut few = ours();
    if quick {
        // Through NBD it takes longer than all the rest until each part of the tables was seen.
        few.truncate(1);
    }
    let huge = case(Disk::new(1024 * GIB, Content::Allocated), few, job());
    [
        labelled("disk", "1 GiB", small),
        labelled("disk", "128 GiB", large),
        labelled("disk", "1 TiB", huge),
    ]
    .map(|case| Case { first: Some(each_part(&case.disk)), ..case })
    .into()
}

fn direct_flush(quick: bool) -> Vec<Case> {
    let mut setups = vec![
        Setup::polldisk(Frontend::Ring, Leaf::File),
        Setup::polldisk(Frontend::Nbd, Leaf::File),
    ];
    for direct in [true, false] {
        // Linux' AIO without O_DIRECT would block: QEMU refuses it.
        let aio = if direct { Aio::Native } else { Aio::Threads };
        for no_flush in [false, true] {
            setups.push(Setup::qsd(aio).direct(direct).no_flush(no_flush));
            setups.push(Setup::qemu_dp().direct(direct).no_flush(no_flush));
        }
    }
    setups.extend([Setup::nbdkit_memory(), Setup::tapdisk()]);
    let flushed = |every, depth| {
        let job = random_job(0, 4 * KIB, depth);
        Job { name: format!("randwrite-flush-{every}"), flush_every: Some(every), ..job }
    };
    let mut jobs = vec![random_job(0, 4 * KIB, 1), flushed(1, 1), flushed(32, 32)];
    if !quick {
        jobs.extend([random_job(0, 4 * KIB, 32), flushed(16, 8)]);
    }
    vec![case(plain(quick), setups, jobs)]
}

fn raid0(quick: bool) -> Vec<Case> {
    let jobs = |quick| match quick {
        true => vec![random_job(100, 4 * KIB, 32), sequential_job(100, 1024 * KIB, 4)],
        false => {
            let mut jobs = both(random_job, &[4 * KIB], &[1, 32]);
            jobs.extend(both(sequential_job, &[1024 * KIB], &[4]));
            jobs
        }
    };
    let of = |devices| {
        let setups = vec![
            Setup::polldisk(Frontend::Ring, Leaf::Model),
            Setup::polldisk(Frontend::Nbd, Leaf::File),
        ];
        let disk = Disk { devices, ..plain(quick) };
        labelled("devices", devices, case(disk, setups, jobs(quick)))
    };
    [1, 2, 4].map(of).into()
}

fn cold_allocate(quick: bool) -> Vec<Case> {
    let setups = vec![
        Setup::polldisk(Frontend::Ring, Leaf::Model),
        Setup::polldisk(Frontend::Nbd, Leaf::File),
        Setup::qsd(Aio::IoUring),
        Setup::qsd(Aio::Native).iothread(),
        Setup::qemu_nbd(Aio::Native),
        Setup::tapdisk(),
        Setup::qemu_dp(),
    ];
    // Each job has a place of its own, or it would find allocated what it is there to allocate.
    let disk = Disk::new(64 * GIB, Content::Empty);
    let at = |job: Job, n: u64| Job { offset: n * 16 * GIB, length: Some(16 * GIB), ..job };
    let mut jobs = vec![at(random_job(0, 4 * KIB, 32), 0), at(random_job(0, 4 * KIB, 1), 1)];
    if !quick {
        jobs.push(at(random_job(0, 64 * KIB, 32), 2));
        jobs.push(at(sequential_job(0, 4 * KIB, 32), 3));
    }
    vec![case(disk, setups, jobs)]
}

fn snapshot_chain(quick: bool) -> Vec<Case> {
    let of = |depth| {
        let setups = vec![
            Setup::polldisk(Frontend::Ring, Leaf::Model),
            Setup::polldisk(Frontend::Nbd, Leaf::File),
            Setup::qsd(Aio::Native).iothread(),
            Setup::qemu_dp(),
        ];
        let size = if quick { 64 * MIB } else { GIB };
        let depths: &[u32] = if quick { &[32] } else { &[1, 32] };
        let jobs = depths.iter().map(|&d| random_job(100, 4 * KIB, d)).collect();
        labelled("chain", depth, case(Disk::new(size, Content::Chain(depth)), setups, jobs))
    };
    [1, 8, 32].map(of).into()
}

fn mixed(quick: bool) -> Vec<Case> {
    let mut jobs = vec![random_job(70, 4 * KIB, 1), random_job(70, 4 * KIB, 32)];
    if !quick {
        let job = random_job(70, 4 * KIB, 32);
        let name = format!("{}-zipf", job.name);
        jobs.push(Job { name, distribution: Distribution::Zipf(1.1), ..job });
    }
    vec![case(plain(quick), everybody(quick), jobs)]
}

fn many_disks(quick: bool) -> Vec<Case> {
    let of = |count| {
        let setups =
            vec![Setup::polldisk(Frontend::Ring, Leaf::Model), Setup::qsd(Aio::Native).iothread()];
        let disk = Disk { count, ..Disk::new(if quick { 16 } else { 64 } * MIB, Content::Data) };
        let mut jobs = vec![random_job(100, 4 * KIB, 32)];
        if !quick {
            jobs.push(random_job(0, 4 * KIB, 32));
        }
        labelled("disks", count, case(disk, setups, jobs))
    };
    [1, 8, 32].map(of).into()
}
