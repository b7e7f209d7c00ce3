//! What changing a running chain costs: how long a snapshot keeps a guest waiting, and how fast a
//! stream and a commit are, beside a plain copy of as many bytes in the same run.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Flags, Op, Status};
use dma::{Buf, Pool};
use node::{Disk, DiskOptions, Door, HostStorage, JobWatch, NodeSpec, OpenOptions, Parts};
use qcow::create::CreateOptions;
use qcow::open::Format;
use reactor::{Clock, Policy, PortalRequest, Start};
use serde::Serialize;

use crate::Error;

/// Bytes of a request of a copy, and how many are in flight.
const PIECE: u64 = 64 << 10;
const DEPTH: u16 = 16;

/// Snapshots under the guest's load.
const SNAPSHOTS: usize = 5;

/// Goals: how long a guest may wait around a snapshot, in milliseconds, and the share of a plain
/// copy's rate that a stream and a commit of the same bytes reach while the guest is idle.
pub const STALL_GOAL_MS: f64 = 5.0;
/// See there.
pub const RATE_GOAL: f64 = 0.8;

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// MiB of data in the image.
    pub mib: u64,
    /// The longest that the guest, which writes 4 KiB at depth 1, waited for one answer in the time
    /// around each snapshot, in milliseconds.
    pub snapshot_stalls_ms: Vec<f64>,
    /// The median of these.
    pub snapshot_stall_ms: f64,
    /// The longest wait while nothing else went on, in milliseconds.
    pub undisturbed_ms: f64,
    /// Reading all of it and writing it to another image, in MiB/s: the median of the rounds.
    pub copy_mib_s: f64,
    /// A stream of it, with the guest idle, in MiB/s: the median of the rounds.
    pub stream_mib_s: f64,
    /// A commit of it, with the guest idle, in MiB/s: the median of the rounds.
    pub commit_mib_s: f64,
    /// The rounds.
    pub rounds: Vec<Round>,
    /// The medians of the rounds' own shares of a plain copy's rate.
    pub stream_share: f64,
    /// See there.
    pub commit_share: f64,
}

/// A plain copy, a stream and a commit, one right after the other.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Round {
    /// As in [`Report`].
    pub copy_mib_s: f64,
    /// As in [`Report`].
    pub stream_mib_s: f64,
    /// As in [`Report`].
    pub commit_mib_s: f64,
}

struct Freely;

impl JobWatch for Freely {
    fn at(&mut self, _: u64, _: u64) -> bool {
        true
    }

    fn allow(&mut self) -> u64 {
        u64::MAX / 2
    }
}

fn create(path: &Path, size: u64) -> Result<(), Error> {
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(path);
    let file = file.map_err(Error::other)?;
    let mut storage = HostStorage::of(file, false).map_err(Error::other)?;
    qcow::create::create(&mut storage, "bench", &CreateOptions::new(size))
        .map_err(node::Error::from)?;
    Ok(())
}

fn serve(node: &str) -> Result<Disk, Error> {
    let clock = Clock::real();
    let options = OpenOptions { clock: clock.clone(), ..OpenOptions::write(Format::Qcow2) };
    let chain = node::open_chain(&NodeSpec::parse(node)?, &options)?;
    let start = Start { cpu: None, policy: Policy::Adaptive };
    let options = DiskOptions { reactors: vec![start], image: Default::default() };
    Ok(Disk::start(Parts::new(chain)?, options, clock)?)
}

/// Does `op` to the first `bytes` of a disk, `DEPTH` deep. Returns how long, in nanoseconds.
fn sweep(door: &Door, op: Op, bytes: u64, clock: &Clock) -> Result<u64, Error> {
    let pool = Pool::new(DEPTH.into(), PIECE as u32).map_err(Error::other)?;
    for n in 0..u64::from(DEPTH) {
        pool.region().write((n * PIECE) as usize, &vec![n as u8 + 1; PIECE as usize]);
    }
    let mut pool = pool;
    let mut portal = door.open(DEPTH, vec![pool.region().clone()])?;
    let mut bufs: Vec<Option<Buf>> = (0..bytes / PIECE).map(|_| None).collect();
    let (began, mut next) = (clock.now(), 0);
    while next < bytes / PIECE || portal.in_flight() > 0 {
        while next < bytes / PIECE
            && portal.room() > 0
            && let Some(buf) = pool.take()
        {
            let (id, offset, len, seg) = (next, next * PIECE, PIECE, Some(buf.seg()));
            let sent = portal.send(PortalRequest { id, op, flags: Flags::NONE, offset, len, seg });
            sent.map_err(|_| Error::other("a portal with room took nothing"))?;
            bufs[next as usize] = Some(buf);
            next += 1;
        }
        let reply = portal.wait();
        if reply.status != Status::Ok {
            return Err(Error::other(format!("{op:?}: {}", reply.status)));
        }
        if let Some(buf) = bufs[reply.id as usize].take() {
            pool.give(buf);
        }
    }
    if op == Op::Write {
        flush(&mut portal)?;
    }
    Ok(clock.now() - began)
}

fn flush(portal: &mut reactor::Portal) -> Result<(), Error> {
    let r =
        PortalRequest { id: 0, op: Op::Flush, flags: Flags::NONE, offset: 0, len: 0, seg: None };
    match portal.call(r) {
        Status::Ok => Ok(()),
        s => Err(Error::other(format!("flush: {s}"))),
    }
}

/// Writes 4 KiB here and there until told to stop; when each began and how long it took.
fn guest(
    door: &Door,
    bytes: u64,
    stop: &AtomicBool,
    clock: &Clock,
) -> Result<Vec<(u64, u64)>, Error> {
    let pool = Pool::new(1, 4096).map_err(Error::other)?;
    let seg = pool.region().seg(0, 4096);
    let mut portal = door.open(1, vec![pool.region().clone()])?;
    let (mut random, mut took) = (1u64, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let offset = (random >> 20) % (bytes / 4096) * 4096;
        let (op, flags, len) = (Op::Write, Flags::NONE, 4096);
        let began = clock.now();
        let status = portal.call(PortalRequest { id: 0, op, flags, offset, len, seg });
        if status != Status::Ok {
            return Err(Error::other(format!("the guest's write: {status}")));
        }
        took.push((began, clock.now() - began));
    }
    Ok(took)
}

/// The longest wait that overlaps a time, in milliseconds.
fn longest(took: &[(u64, u64)], from: u64, to: u64) -> f64 {
    let there = took.iter().filter(|t| t.0 < to && t.0 + t.1 > from);
    there.map(|t| t.1).max().unwrap_or(0) as f64 / 1e6
}

/// Measures with `mib` MiB of data, in files of the folder `scratch`; the image that snapshots are
/// taken of lies on the device model. A device's rate changes from one second to the next, so what is
/// compared is measured in `rounds` (at least 1) rounds.
///
/// # Errors
/// If something cannot be made, or a request fails.
pub fn run(scratch: &Path, mib: u64, rounds: u64) -> Result<Report, Error> {
    let clock = Clock::real();
    let (undisturbed_ms, snapshot_stalls_ms) = snapshots(scratch, mib << 20, &clock)?;
    let base = scratch.join("base");
    create(&base, mib << 20)?;
    let disk = serve(&base.display().to_string())?;
    sweep(&disk.door(), Op::Write, mib << 20, &clock)?;
    disk.close()?;
    let rounds = (0..rounds.max(1)).map(|n| round(scratch, n, mib, &clock));
    let rounds = rounds.collect::<Result<Vec<Round>, Error>>()?;
    let of = |f: &dyn Fn(&Round) -> f64| median(rounds.iter().map(f).collect());
    Ok(Report {
        mib,
        snapshot_stall_ms: median(snapshot_stalls_ms.clone()),
        snapshot_stalls_ms,
        undisturbed_ms,
        copy_mib_s: of(&|r| r.copy_mib_s),
        stream_mib_s: of(&|r| r.stream_mib_s),
        commit_mib_s: of(&|r| r.commit_mib_s),
        stream_share: of(&|r| r.stream_mib_s / r.copy_mib_s),
        commit_share: of(&|r| r.commit_mib_s / r.copy_mib_s),
        rounds,
    })
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Takes snapshots under load: the longest wait without any, and the longest around each, in
/// milliseconds.
fn snapshots(scratch: &Path, bytes: u64, clock: &Clock) -> Result<(f64, Vec<f64>), Error> {
    let device = scratch.join("device");
    create(&device, bytes)?;
    let mut disk = serve(&format!("model:{}", device.display()))?;
    sweep(&disk.door(), Op::Write, bytes, clock)?;
    let stop = AtomicBool::new(false);
    let mut times = Vec::new();
    let pause = || std::thread::sleep(std::time::Duration::from_millis(200));
    let took = std::thread::scope(|scope| {
        let (door, stop) = (disk.door(), &stop);
        let load = scope.spawn(move || guest(&door, bytes, stop, clock));
        pause();
        times.push((clock.now(), 0));
        pause();
        times[0].1 = clock.now();
        let mut done = Ok(());
        for n in 0..SNAPSHOTS {
            let began = clock.now();
            done = done.and_then(|()| disk.snapshot(&scratch.join(format!("snapshot{n}"))));
            times.push((began, clock.now()));
            pause();
        }
        stop.store(true, Ordering::Relaxed);
        let took = load.join().map_err(|_| Error::other("the guest ended"))?;
        done?;
        took
    })?;
    disk.close()?;
    let waits: Vec<f64> = times.iter().map(|t| longest(&took, t.0, t.1)).collect();
    Ok((waits[0], waits[1..].to_vec()))
}

/// Copies, streams and commits what lies in `base`, with the guest idle, all on files. They stay: what
/// it takes to remove them would fall into the next round.
fn round(scratch: &Path, n: u64, mib: u64, clock: &Clock) -> Result<Round, Error> {
    let bytes = mib << 20;
    let path = |name: &str| scratch.join(format!("{name}{n}"));
    let text = |name: &str| path(name).display().to_string();
    let rate = |ns: u64| (mib as f64) * 1e9 / ns.max(1) as f64;
    let timed = |disk: &mut Disk, f: &dyn Fn(&mut Disk) -> Result<(), node::Error>| {
        let began = clock.now();
        f(disk).map(|()| clock.now() - began)
    };
    create(&path("copy"), bytes)?;
    let mut disk = serve(&scratch.join("base").display().to_string())?;
    let read = sweep(&disk.door(), Op::Read, bytes, clock)?;
    let other = serve(&text("copy"))?;
    let write = sweep(&other.door(), Op::Write, bytes, clock)?;
    other.close()?;
    disk.snapshot(&path("upper"))?;
    let stream = timed(&mut disk, &|d| d.stream(None, &mut Freely))?;
    // Now all lies in the top: under a new one it is committed into an empty image below.
    disk.close()?;
    create(&path("lowest"), bytes)?;
    let file = std::fs::File::options().read(true).write(true).open(path("upper"));
    let file = file.map_err(Error::other)?;
    let mut upper = HostStorage::of(file, false).map_err(Error::other)?;
    let lowest = text("lowest");
    qcow::edit::set_backing(&mut upper, "upper", Some((&lowest, Format::Qcow2)))
        .map_err(node::Error::from)?;
    let mut disk = serve(&text("upper"))?;
    disk.snapshot(&path("top"))?;
    let commit = timed(&mut disk, &|d| d.commit(1, &mut Freely))?;
    disk.close()?;
    Ok(Round {
        copy_mib_s: rate(read + write),
        stream_mib_s: rate(stream),
        commit_mib_s: rate(commit),
    })
}
