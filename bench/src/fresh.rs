//! Random writes into an empty image, by our NBD server and by QEMU's, in turns: how many each does
//! for a second of processor time, and what each asks of the device for them.
//!
//! Processor time is that of the server's process, threads and kernel, sockets included; both have
//! the same client, file system and page-cache bypass. What goes to the device is counted where the
//! format hands it down, in a run of its own for each: ours by the NVMe model's counters, QEMU's by
//! its `blklogwrites` node, which logs every request between format and file.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use node::{HostStorage, ModelSpec};
use qcow::create::{CreateOptions, create};
use reactor::Clock;
use serde::Serialize;

use crate::Error;
use crate::guest::Mix;
use crate::rig::Rig;
use crate::run::{Kind, Nbd, Request, Target};
use crate::server::Server;
use crate::stamp::BLOCK;

/// The disk's size in bytes: large enough that nearly each write meets a new cluster of 64 KiB.
const SIZE: u64 = 64 << 30;
const CLUSTER: u64 = 64 << 10;

/// Requests in flight.
const DEPTH: usize = 32;

/// How long answers are waited for at a time, in nanoseconds.
const WAIT: u64 = 20_000_000;

/// QEMU's ways to do I/O: each that it has here is tried once, and the best one measured.
const AIO: [&str; 3] = ["io_uring", "native", "threads"];

/// What a server did in each round.
#[derive(Clone, Debug, Serialize)]
pub struct Rate {
    /// Which one.
    pub server: String,
    /// Writes per second.
    pub iops: Vec<f64>,
    /// Writes per second of processor time.
    pub per_cpu_second: Vec<f64>,
}

impl Rate {
    /// The median over the rounds of writes per second of processor time.
    pub fn median(&self) -> f64 {
        median(&self.per_cpu_second)
    }
}

/// The one in the middle.
pub fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// What the device was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Writes of the guest, before one flush.
    pub guest_writes: u64,
    /// Requests that changed something: data, metadata, fill, zeroes.
    pub writes: u64,
    /// Those that only made zeroes.
    pub zeroes: u64,
    /// Bytes of all of these but the zeroes.
    pub bytes: u64,
    /// Flushes.
    pub flushes: u64,
}

/// Both sides.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Writes of 4 KiB in a round, [`DEPTH`] of them in flight, then a flush.
    pub writes: u64,
    /// Clusters of 64 KiB that they fall into.
    pub clusters: u64,
    /// Ours.
    pub polldisk: Rate,
    /// QEMU's, by its ways to do I/O: first the best one, in one round more than ours has, and then
    /// the others, in one.
    pub qemu: Vec<Rate>,
    /// The median of ours over that of QEMU's best.
    pub ratio: f64,
    /// Our requests to the device.
    pub polldisk_device: Counts,
    /// QEMU's.
    pub qemu_device: Counts,
}

/// Measures `rounds` rounds of `writes` writes each, in files of the folder `scratch`.
///
/// # Errors
/// If QEMU is not there, something cannot be made, a request fails, or an image is not right after.
pub fn fresh(scratch: &Path, writes: u64, rounds: usize) -> Result<Report, Error> {
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 16) % (SIZE / BLOCK as u64) * BLOCK as u64
    };
    let offsets: Vec<u64> = (0..writes).map(|_| next()).collect();
    let clusters = offsets.iter().map(|o| o / CLUSTER).collect::<HashSet<_>>().len() as u64;
    let none = |name: &str| Rate { server: name.into(), iops: Vec::new(), per_cpu_second: vec![] };
    let mut polldisk = none("polldisk nbd");
    let mut qemu: Vec<Rate> = Vec::new();
    let image = scratch.join("image");
    let round = |rate: &mut Rate, start: &dyn Fn() -> Result<Server, Error>| {
        empty(&image)?;
        let (wall, cpu) = load(start()?, &offsets)?;
        whole(&image, clusters)?;
        rate.iops.push(writes as f64 * 1e9 / wall as f64);
        rate.per_cpu_second.push(writes as f64 * 1e9 / cpu as f64);
        Ok::<(), Error>(())
    };
    for aio in AIO {
        let mut rate = none(aio);
        match round(&mut rate, &|| Server::qemu(aio, &image, None, scratch)) {
            Ok(()) => qemu.push(rate),
            Err(e) => log::info!("QEMU with aio={aio}: {e}"),
        }
    }
    qemu.sort_by(|a, b| b.median().total_cmp(&a.median()));
    let Some(best) = qemu.first_mut() else {
        return Err(Error::other("qemu-storage-daemon does not do it (--verbose says why)"));
    };
    let aio = best.server.clone();
    for _ in 0..rounds {
        round(&mut polldisk, &|| Server::polldisk(&image, scratch))?;
        round(best, &|| Server::qemu(&aio, &image, None, scratch))?;
    }
    let ratio = polldisk.median() / best.median();
    empty(&image)?;
    let log = scratch.join("log");
    File::create(&log).map_err(Error::other)?;
    load(Server::qemu(&aio, &image, Some(&log), scratch)?, &offsets)?;
    let qemu_device = Counts { guest_writes: writes, ..logged(&log)? };
    std::fs::remove_file(&log).map_err(Error::other)?;
    let polldisk_device = by_model(&image, writes)?;
    std::fs::remove_file(&image).map_err(Error::other)?;
    Ok(Report { writes, clusters, polldisk, qemu, ratio, polldisk_device, qemu_device })
}

/// A new empty image.
fn empty(path: &Path) -> Result<(), Error> {
    let mut options = File::options();
    let file = options.create(true).truncate(true).read(true).write(true).open(path);
    let mut storage = HostStorage::of(file.map_err(Error::other)?, false).map_err(Error::other)?;
    create(&mut storage, "bench", &CreateOptions::new(SIZE)).map_err(node::Error::from)?;
    Ok(())
}

/// Has a server do the writes, and ends it. How long they took, and how much processor time, in
/// nanoseconds.
fn load(mut server: Server, offsets: &[u64]) -> Result<(u64, u64), Error> {
    let clock = Clock::real();
    let (mut client, costs) = (server.connect()?, server.costs()?);
    let size = client.limits().size;
    if size != SIZE {
        return Err(Error::other(format!("the export has {size} bytes")));
    }
    let (began, cpu) = (clock.now(), costs.cpu_ns()?);
    write(&mut client, offsets, &clock)?;
    let took = (clock.now() - began, costs.cpu_ns()? - cpu);
    client.close()?;
    server.stop()?;
    Ok(took)
}

/// Writes a block at each of the offsets, and flushes.
fn write(client: &mut Nbd, offsets: &[u64], clock: &Clock) -> Result<(), Error> {
    client.prepare(DEPTH as u32, BLOCK as u32, false)?;
    let mut free: Vec<u32> = (0..DEPTH as u32).collect();
    let writes = offsets.iter().map(|&offset| (Kind::Write, offset, BLOCK as u32));
    let mut all = writes.chain([(Kind::Flush, 0, 0)]).peekable();
    let mut heard = clock.now();
    while all.peek().is_some() || free.len() < DEPTH {
        while let Some(&(kind, offset, len)) = all.peek()
            // The flush goes when all else is answered.
            && (kind == Kind::Write || free.len() == DEPTH)
            && let Some(slot) = free.pop()
        {
            all.next();
            client.send(&Request { slot, kind, offset, len }, None)?;
        }
        let (before, mut failed) = (free.len(), None);
        client.poll(WAIT, &mut |done| {
            failed = failed.or(done.error);
            free.push(done.slot);
        })?;
        let now = clock.now();
        if let Some(error) = failed {
            return Err(Error::other(format!("a request failed with error {error}")));
        }
        if free.len() > before {
            heard = now;
        } else if now - heard > client.limits().patience {
            return Err(Error::other("the server answers nothing any more"));
        }
    }
    Ok(())
}

/// Checks by `qemu-img` that the image is right and holds so many clusters of data.
fn whole(image: &Path, clusters: u64) -> Result<(), Error> {
    let mut command = Command::new("qemu-img");
    command.args(["check", "--output=json", "-f", "qcow2"]).arg(image);
    let out = command.output().map_err(|e| Error::other(format!("qemu-img: {e}")))?;
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).map_err(Error::other)?;
    match out.status.success() && report["allocated-clusters"] == clusters {
        true => Ok(()),
        false => Err(Error::other(format!("qemu-img check, of {clusters} clusters: {report}"))),
    }
}

/// What the device model is asked for by as many random writes.
fn by_model(path: &Path, writes: u64) -> Result<Counts, Error> {
    let spec = ModelSpec { vwc: true, ..ModelSpec::new(path) };
    let mut rig = Rig::create(spec, SIZE / BLOCK as u64)?;
    let none = || Error::other("there is no model");
    let before = rig.model_stats().ok_or_else(none)?;
    while rig.guest.requests < writes {
        rig.round(Mix::Write, DEPTH);
        rig.check()?;
    }
    rig.settle()?;
    let guest_writes = rig.guest.requests;
    rig.guest.send_flush(rig.clock.now());
    rig.settle()?;
    let done = rig.model_stats().ok_or_else(none)?.since(&before);
    rig.close()?;
    Ok(Counts {
        guest_writes,
        writes: done.device_writes() + done.deallocations,
        zeroes: done.write_zeroes + done.deallocations,
        bytes: done.write_bytes,
        flushes: done.flushes,
    })
}

/// Reads a log in the format of Linux's dm-log-writes (Documentation/admin-guide/device-mapper).
fn logged(path: &Path) -> Result<Counts, Error> {
    const MAGIC: u64 = 0x006a_7366_7773_6872;
    const FLUSH: u64 = 1;
    const DISCARD: u64 = 4;
    const MARK: u64 = 8;
    let file = File::open(path).map_err(Error::other)?;
    let words = |at: u64| {
        let mut bytes = [0; 32];
        file.read_exact_at(&mut bytes, at).map_err(Error::other)?;
        let (words, _) = bytes.as_chunks();
        Ok::<_, Error>([0, 1, 2, 3].map(|i| u64::from_le_bytes(words[i])))
    };
    let [magic, _, entries, sector] = words(0)?;
    let sector = sector & u64::from(u32::MAX);
    if magic != MAGIC || sector < 512 {
        return Err(Error::other("QEMU's log of writes is none"));
    }
    let (mut at, mut counts) = (sector, Counts::default());
    for _ in 0..entries {
        let [_, sectors, flags, _] = words(at)?;
        at += sector;
        counts.flushes += u64::from(flags & FLUSH != 0);
        let bytes = sectors * sector;
        if flags & DISCARD != 0 {
            (counts.writes, counts.zeroes) = (counts.writes + 1, counts.zeroes + 1);
        } else if sectors > 0 && flags & MARK == 0 {
            counts.writes += 1;
            let mut data = vec![0; bytes as usize];
            file.read_exact_at(&mut data, at).map_err(Error::other)?;
            match data.iter().all(|&b| b == 0) {
                true => counts.zeroes += 1,
                false => counts.bytes += bytes,
            }
            at += bytes;
        }
    }
    Ok(counts)
}
