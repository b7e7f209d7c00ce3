//! An image of 1 TiB in which every cluster of 64 KiB is allocated (and none was written, so its
//! file is sparse): what its translation reads and keeps in memory, and its check beside
//! `qemu-img`'s.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use block::{Flags, Op, Status};
use dma::{Buf, Pool};
use node::{
    Disk, DiskOptions, HostStorage, Image, ModelSpec, NodeSpec, OpenOptions, Parts, ReactorCore,
};
use qcow::create::{CreateOptions, Preallocation, create};
use qcow::open::Format;
use reactor::{Clock, Policy, PortalRequest, Start};
use serde::Serialize;

use crate::Error;
use crate::fresh::median;
use crate::stamp::BLOCK;
use crate::usage::{Usage, usage};

const SIZE: u64 = 1 << 40;
const CLUSTER: u64 = 64 << 10;
/// Guest bytes whose L2 entries come by one read, of 4 KiB.
const PAGE: u64 = 512 * CLUSTER;
/// Plain size of the refcounts: two bytes for each cluster of data.
const REFCOUNTS: u64 = SIZE / CLUSTER * 2;
/// Reads after the warm-up, and requests in flight.
const READS: u64 = 200_000;
const DEPTH: u16 = 32;

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Clusters of data.
    pub clusters: u64,
    /// Reads of 4 KiB that each miss, one for each part of an L2 table, right after opening.
    pub missing: Reads,
    /// Random ones after that.
    pub warm: Reads,
    /// What the process grew by from before the image was opened until after all reads, in bytes.
    pub memory_bytes: u64,
    /// The same for an image of 512 clusters: buffers that an image of any size has.
    pub small_bytes: u64,
    /// The difference for each cluster.
    pub bytes_per_cluster: f64,
    /// What checks took.
    pub check: Checks,
}

/// Reads of the guest, and what came of them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Reads {
    /// How many.
    pub reads: u64,
    /// Those of the device.
    pub device_reads: u64,
    /// Bytes of these.
    pub device_bytes: u64,
    /// Parts of L2 tables that were loaded.
    pub misses: u64,
}

/// Checks in processes of their own, in turns: medians.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Checks {
    /// Plain size of the image's refcounts in bytes.
    pub refcount_bytes: u64,
    /// `polldisk image check`.
    pub polldisk: Usage,
    /// `qemu-img check`; `null` where there is none.
    pub qemu_img: Option<Usage>,
}

/// Measures with an image in the folder `scratch`; checks `rounds` times.
///
/// # Errors
/// If something cannot be made, a request fails, or a check finds anything.
pub fn full(scratch: &Path, rounds: usize) -> Result<Report, Error> {
    let path = scratch.join("full.qcow2");
    image(&path, SIZE)?;
    // First: a new process begins with the memory of its parent in its account.
    let check = checks(&path, rounds)?;
    let small = scratch.join("small.qcow2");
    image(&small, PAGE)?;
    let mut small_bytes = 0;
    // What the program itself needs is there after the first time.
    for _ in 0..2 {
        let before = resident()?;
        let mut disk = serve(&small)?;
        read(&mut disk, (0..1000).map(|n| n % (PAGE / BLOCK as u64) * BLOCK as u64))?;
        small_bytes = resident()?.saturating_sub(before);
        disk.close()?;
    }
    let before = resident()?;
    let mut disk = serve(&path)?;
    let missing = read(&mut disk, (0..SIZE / PAGE).map(|page| page * PAGE))?;
    let mut random = 0x1234_5678_9abc_def1u64;
    let warm = (0..READS).map(|_| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 20) % (SIZE / BLOCK as u64) * BLOCK as u64
    });
    let warm = read(&mut disk, warm)?;
    let memory_bytes = resident()?.saturating_sub(before);
    disk.close()?;
    let clusters = SIZE / CLUSTER;
    let bytes_per_cluster = memory_bytes.saturating_sub(small_bytes) as f64 / clusters as f64;
    Ok(Report { clusters, missing, warm, memory_bytes, small_bytes, bytes_per_cluster, check })
}

/// A new image with all clusters allocated.
fn image(path: &Path, size: u64) -> Result<(), Error> {
    let mut options = File::options();
    let file = options.create_new(true).read(true).write(true).open(path);
    let mut storage = HostStorage::of(file.map_err(Error::other)?, false).map_err(Error::other)?;
    let options =
        CreateOptions { preallocation: Preallocation::Metadata, ..CreateOptions::new(size) };
    create(&mut storage, "bench", &options).map_err(node::Error::from)?;
    Ok(())
}

/// Serves it from a device model, with the default cache.
fn serve(path: &Path) -> Result<Disk, Error> {
    let clock = Clock::real();
    let spec = NodeSpec::Model(ModelSpec::new(path));
    let open = OpenOptions { clock: clock.clone(), ..OpenOptions::write(Format::Qcow2) };
    let parts = Parts::new(node::open_chain(&spec, &open)?)?;
    let start = Start { cpu: None, policy: Policy::Adaptive };
    let options = DiskOptions { reactors: vec![start], image: Default::default() };
    Ok(Disk::start(parts, options, clock)?)
}

/// Reads 4 KiB at each offset.
fn read(disk: &mut Disk, mut offsets: impl Iterator<Item = u64>) -> Result<Reads, Error> {
    let before = counts(disk)?;
    let mut pool = Pool::new(DEPTH.into(), BLOCK as u32).map_err(Error::other)?;
    let mut portal = disk.door().open(DEPTH, vec![pool.region().clone()])?;
    let mut bufs: Vec<Option<Buf>> = (0..DEPTH).map(|_| None).collect();
    let mut reads = 0;
    loop {
        while portal.room() > 0
            && let Some(id) = bufs.iter().position(Option::is_none)
            && let Some(offset) = offsets.next()
        {
            let buf = pool.take().ok_or_else(|| Error::other("buffers are short"))?;
            let seg = Some(buf.seg());
            bufs[id] = Some(buf);
            let (id, op, flags, len) = (id as u64, Op::Read, Flags::NONE, BLOCK as u64);
            let sent = portal.send(PortalRequest { id, op, flags, offset, len, seg });
            sent.map_err(|_| Error::other("a portal with room took nothing"))?;
            reads += 1;
        }
        if portal.in_flight() == 0 {
            break;
        }
        let reply = portal.wait();
        if reply.status != Status::Ok {
            return Err(Error::other(format!("a read: {}", reply.status)));
        }
        if let Some(buf) = bufs[reply.id as usize].take() {
            pool.give(buf);
        }
    }
    drop(portal);
    let after = counts(disk)?;
    Ok(Reads {
        reads,
        device_reads: after.0 - before.0,
        device_bytes: after.1 - before.1,
        misses: after.2 - before.2,
    })
}

/// Reads of the device and their bytes; parts of L2 tables loaded by the image.
fn counts(disk: &mut Disk) -> Result<(u64, u64, u64), Error> {
    let image = disk.image();
    let loads =
        disk.reactor().mailbox().ask(move |core: &mut ReactorCore| match core.image(image) {
            Some(Image::Qcow(i)) => Some(i.counters().page_loads.get()),
            _ => None,
        });
    let loads = loads.flatten().ok_or_else(|| Error::other("the reactor has ended"))?;
    let model = disk.models().next().ok_or_else(|| Error::other("there is no model"))?;
    let device = model.stats().snapshot();
    Ok((device.reads, device.read_bytes, loads))
}

fn checks(image: &Path, rounds: usize) -> Result<Checks, Error> {
    let program = std::env::current_exe().map_err(Error::other)?;
    let (mut ours, mut theirs) = (Vec::new(), Some(Vec::new()));
    for _ in 0..rounds {
        let mut command = Command::new(&program);
        command.args(["image", "check", "-q"]).arg(image);
        let done = usage(&mut command)?;
        ours.push(done.ok_or_else(|| Error::other("this program is not there any more"))?);
        if let Some(list) = &mut theirs {
            let mut command = Command::new("qemu-img");
            command.args(["check", "-q", "-f", "qcow2"]).arg(image);
            match usage(&mut command)? {
                Some(done) => list.push(done),
                None => theirs = None,
            }
        }
    }
    let middle = |list: &[Usage]| Usage {
        seconds: median(&list.iter().map(|u| u.seconds).collect::<Vec<_>>()),
        cpu_seconds: median(&list.iter().map(|u| u.cpu_seconds).collect::<Vec<_>>()),
        peak_bytes: list.iter().map(|u| u.peak_bytes).max().unwrap_or(0),
    };
    let qemu_img = theirs.as_deref().map(middle);
    Ok(Checks { refcount_bytes: REFCOUNTS, polldisk: middle(&ours), qemu_img })
}

/// Resident memory of this process in bytes.
pub(crate) fn resident() -> Result<u64, Error> {
    let text = std::fs::read_to_string("/proc/self/statm").map_err(Error::other)?;
    let pages: u64 = text.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    Ok(pages * 4096)
}
