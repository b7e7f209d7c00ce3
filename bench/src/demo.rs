//! The demo: a guest ring served from a QCOW2 image through the NVMe driver, every byte verified.
//!
//! Two threads: the reactor under measurement, and one that is guest and device in turns. The
//! guest fills a working set, reads and overwrites it at several depths, flushes; then everything
//! is closed, opened again with cold caches, and read back whole.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blkif::{Abi, Config, Signal};
use block::Storage;
use node::{Disk, DiskOptions, NodeSpec, OpenOptions, Parts, ReactorCore};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, Start};
use serde::Serialize;

use crate::counters::Counters;
use crate::guest::{Guest, Kick, Mix};
use crate::reference::Reference;
use crate::stamp::BLOCK;
use crate::{Error, Latency};

/// A ring of 4 pages: 128 requests.
const ORDER: u8 = 2;

/// A wrong thing to do on purpose, to see that the demo notices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inject {
    /// System calls on the reactor.
    Syscall,
    /// Allocations on the reactor.
    Alloc,
    /// Locks on the reactor.
    Lock,
    /// A changed byte in the image's file.
    Corrupt,
}

/// What the guest's disk is.
#[derive(Clone, Debug)]
pub enum What {
    /// A fresh image of so many blocks of 4 KiB.
    Fresh(u64),
    /// An image that is there.
    Image {
        /// Its file.
        path: PathBuf,
        /// Its format.
        format: Format,
        /// Write to the image itself; else to a scratch overlay.
        write: bool,
    },
}

/// Most blocks of an image that are used: 16 GiB.
const MOST_BLOCKS: u64 = 4 << 20;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long the measured phases take together.
    pub seconds: f64,
    /// Processors of the reactor and of guest and device; unpinned where `None`.
    pub cores: [Option<usize>; 2],
    /// What the reactor does when idle.
    pub policy: Policy,
    /// Memory for the image's map in bytes.
    pub l2_cache: u64,
    /// Where scratch files go.
    pub scratch: PathBuf,
    /// What is served.
    pub disk: What,
    /// A wrong thing to do.
    pub inject: Option<Inject>,
}

/// One measured phase.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// Requests in flight.
    pub depth: usize,
    /// Requests answered.
    pub requests: u64,
    /// Answers per second.
    pub iops: f64,
    /// Time from sending to answer, in nanoseconds.
    pub latency_ns: Latency,
    /// Per request on the reactor's thread.
    pub per_request: PerRequest,
}

/// What a request cost the reactor.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PerRequest {
    /// System calls; `null` where they cannot be counted.
    pub syscalls: Option<f64>,
    /// Allocations.
    pub allocations: f64,
    /// Locks.
    pub locks: f64,
    /// Events sent to the guest.
    pub notifications: f64,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Every byte that was written was read back right after closing and opening again.
    pub verified: bool,
    /// What was wrong, if it was not.
    pub failure: Option<String>,
    /// Bytes that the guest wrote.
    pub written_bytes: u64,
    /// Bytes that were read and found right, all in all.
    pub verified_bytes: u64,
    /// Bytes that were read back after reopening and found right.
    pub reread_bytes: u64,
    /// Requests of the measured phases.
    pub requests: u64,
    /// Of the mixed phase at depth 32.
    pub iops: f64,
    /// Of the mixed phase at depth 32.
    pub latency_ns: Latency,
    /// The reactor's idle policy.
    pub policy: &'static str,
    /// System calls per request of all measured phases; `null` where they cannot be counted.
    pub syscalls: Option<f64>,
    /// Allocations per request.
    pub allocations: f64,
    /// Locks per request.
    pub locks: f64,
    /// Events to the guest per request.
    pub notifications: f64,
    /// What the image's own contents were compared with; `null` for a fresh image.
    pub compared_with: Option<&'static str>,
    /// Device writes per guest write while filling the empty image; `null` for another one.
    pub fill_writes_per_write: Option<f64>,
    /// The measured phases.
    pub phases: Vec<Phase>,
}

/// Counters of the reactor's thread between two moments, taken on it.
#[derive(Default)]
struct Window {
    syscalls: AtomicU64,
    allocations: AtomicU64,
    locks: AtomicU64,
    done: AtomicU64,
}

/// A running disk with a guest on it, on the calling thread with the device.
struct Rig {
    disk: Disk,
    guest: Guest,
    device: Option<node::ModelController>,
    stats: Arc<blkif::Stats>,
    model: Arc<node::ModelStats>,
    clock: Clock,
    frontend: usize,
    yielding: bool,
    /// Writes found no space: the guest waits, and nothing more will be measured.
    full: bool,
}

/// How long the ring holds writes for which there is no space, in nanoseconds. The first one held
/// ends the demo, so this only lets what is under way end.
const NO_SPACE_NS: u64 = 500_000_000;

impl Rig {
    fn open(served: &Served, o: &Options) -> Result<Rig, Error> {
        let clock = Clock::real();
        let spec = NodeSpec::Model(node::ModelSpec::new(&served.path));
        let open = OpenOptions { clock: clock.clone(), ..OpenOptions::write(served.format) };
        let parts = Parts::new(node::open_chain(&spec, &open)?)?;
        let image = qcow::run::Options { l2_cache: o.l2_cache, ..Default::default() };
        let start = Start { cpu: o.cores[0], policy: o.policy };
        let mut disk =
            Disk::start(parts, DiskOptions { reactors: vec![start], image }, clock.clone())?;
        let wake = ask(&disk, |core| core.wake())?;
        let guest = Guest::new(ORDER, served.blocks, Kick { signal: Signal::default(), wake })?;
        let ring = guest.ring().kept_ring().map_err(Error::other)?;
        let grants = guest.ring().grants();
        let image = disk.image();
        let added = ask(&disk, move |core: &mut ReactorCore| {
            let mut stats = None;
            let index = core.add_frontend(image, |owner, _| {
                let mut config = Config::new(owner, Abi::X86_64, ORDER);
                config.persistent_pages = config.usual_persistent_pages();
                config.no_space_timeout = Some(NO_SPACE_NS);
                let backend = blkif::Backend::new(config, ring, grants, Signal::default())
                    .map_err(|e| e.to_string())?;
                stats = Some(backend.stats());
                Ok(node::Frontend::Ring(Box::new(backend)))
            });
            index.and_then(|i| Ok((i, stats.ok_or("there is no ring")?)))
        })?;
        let (frontend, stats) = added.map_err(Error::other)?;
        let model = disk.models().next().ok_or_else(|| Error::other("there is no model"))?;
        let counters = model.stats().clone();
        let device = model.take_device();
        let yielding = o.cores[0] == o.cores[1];
        Ok(Rig {
            disk,
            guest,
            device,
            stats,
            model: counters,
            clock,
            frontend,
            yielding,
            full: false,
        })
    }

    /// Device and guest in turns until `until` says so. Returns the nanoseconds that it took.
    fn turn_until(
        &mut self,
        mix: Mix,
        depth: usize,
        mut until: impl FnMut(&Guest, u64) -> bool,
    ) -> u64 {
        let began = self.clock.now();
        loop {
            let now = self.clock.now();
            self.guest.send(mix, depth, now);
            let mut busy = self.device.as_mut().is_some_and(|d| d.step(now));
            busy |= self.guest.reap(self.clock.now()) > 0;
            // Looked at only when there is time: the reactor's counters are not read for nothing.
            self.full |= !busy && self.stats.held_no_space.get() > 0;
            if until(&self.guest, now - began) || self.guest.failure.is_some() || self.full {
                return self.clock.now() - began;
            }
            if !busy && self.yielding {
                std::thread::yield_now();
            }
        }
    }

    /// Lets what is under way end.
    fn drain(&mut self) {
        let began = self.clock.now();
        while self.guest.in_flight() > 0 && self.clock.now() - began < 60_000_000_000 {
            let now = self.clock.now();
            if let Some(d) = &mut self.device {
                d.step(now);
            }
            if self.guest.reap(now) == 0 && self.yielding {
                std::thread::yield_now();
            }
        }
    }

    fn flush(&mut self) {
        if self.guest.send_flush(self.clock.now()) {
            self.drain();
        }
    }

    /// Runs one phase and measures it.
    fn phase(
        &mut self,
        name: &str,
        mix: Mix,
        depth: usize,
        seconds: f64,
        inject: Option<Inject>,
    ) -> Phase {
        // Warm-up: every page of the map is loaded, every grant mapped.
        let warm = (seconds * 0.2e9) as u64;
        self.turn_until(mix, depth, |_, t| t >= warm);
        self.guest.reset_figures();
        let window = Arc::new(Window::default());
        let events = self.stats.events.get();
        let mailbox = self.disk.reactor().mailbox().clone();
        let start: Arc<std::sync::OnceLock<Counters>> = Arc::default();
        let s = start.clone();
        mailbox.post(move |_| {
            let _ = s.set(Counters::start());
        });
        let mut poked = 0;
        let clock = self.clock.clone();
        let length = (seconds * 0.8e9) as u64;
        let took = self.turn_until(mix, depth, |_, t| {
            // Wrong things to do come through the mailbox, a thousand a second.
            if let Some(i) = inject
                && t / 1_000_000 > poked
            {
                poked = t / 1_000_000;
                mailbox.post(move |_| spoil(i));
            }
            t >= length
        });
        let requests = self.guest.requests.max(1);
        let w = window.clone();
        let end = clock.now();
        mailbox.post(move |_| {
            if let Some(&start) = start.get() {
                let c = Counters::finish(start);
                w.syscalls.store(c.syscalls.unwrap_or(u64::MAX), Ordering::Relaxed);
                w.allocations.store(c.allocations, Ordering::Relaxed);
                w.locks.store(c.locks, Ordering::Relaxed);
            }
            w.done.store(1, Ordering::Release);
        });
        let events = self.stats.events.get() - events;
        while window.done.load(Ordering::Acquire) == 0 && self.clock.now() - end < 10_000_000_000 {
            std::thread::sleep(Duration::from_micros(50));
        }
        if window.done.load(Ordering::Acquire) == 0 {
            let silent = "the reactor did not say what it has counted".to_owned();
            self.guest.failure.get_or_insert(silent);
        }
        let n = requests as f64;
        let calls = window.syscalls.load(Ordering::Relaxed);
        let l = &self.guest.latency;
        let phase = Phase {
            name: name.to_owned(),
            depth,
            requests,
            iops: n * 1e9 / took as f64,
            latency_ns: Latency::of(l),
            per_request: PerRequest {
                syscalls: (calls != u64::MAX).then_some(calls as f64 / n),
                allocations: window.allocations.load(Ordering::Relaxed) as f64 / n,
                locks: window.locks.load(Ordering::Relaxed) as f64 / n,
                notifications: events as f64 / n,
            },
        };
        self.drain();
        phase
    }

    /// Ends everything and says why, if there was no space.
    fn check_space(self, path: &Path) -> Result<Rig, Error> {
        if !self.full {
            return Ok(self);
        }
        // What could not be written cannot be written now either.
        let _ = self.close();
        Err(Error::other(format!("{}: no space left for the image", path.display())))
    }

    /// Ends everything in order.
    fn close(mut self) -> Result<(), Error> {
        self.drain();
        let model = self.disk.models().next();
        if let (Some(model), Some(device)) = (model, self.device.take()) {
            model.give_device(device)?;
        }
        let at = self.frontend;
        let removed =
            ask(&self.disk, move |core: &mut ReactorCore| core.remove_frontend(at).is_some())?;
        if !removed {
            return Err(Error::other("the ring still has requests in flight"));
        }
        self.disk.close()?;
        Ok(())
    }
}

fn ask<T: Send + 'static>(
    disk: &Disk,
    call: impl FnOnce(&mut ReactorCore) -> T + Send + 'static,
) -> Result<T, Error> {
    disk.reactor().mailbox().ask(call).ok_or_else(|| Error::other("the reactor has ended"))
}

/// Does a wrong thing on the reactor.
fn spoil(inject: Inject) {
    static LOCK: reactor::sync::Mutex<u64> = reactor::sync::Mutex::new(0);
    match inject {
        Inject::Syscall => {
            let _ = std::process::id();
        }
        Inject::Alloc => drop(std::hint::black_box(Box::new(7u64))),
        Inject::Lock => *LOCK.lock() += 1,
        Inject::Corrupt => {}
    }
}

/// What the model serves.
struct Served {
    path: PathBuf,
    format: Format,
    blocks: u64,
    reference: Option<(Reference, &'static str)>,
}

impl Served {
    fn make(o: &Options, say: &mut dyn FnMut(&str)) -> Result<Served, Error> {
        let scratch = o.scratch.join("demo.qcow2");
        let (path, format, write) = match &o.disk {
            What::Fresh(blocks) => {
                fresh(&scratch, &CreateOptions::new(blocks * BLOCK as u64))?;
                let (format, blocks) = (Format::Qcow2, *blocks);
                return Ok(Served { path: scratch, format, blocks, reference: None });
            }
            What::Image { path, format, write } => (path, *format, *write),
        };
        let name = path.display();
        let path = path.canonicalize().map_err(|e| Error::other(format!("{name}: {e}")))?;
        let look = OpenOptions { top_only: true, ..OpenOptions::read(format) };
        let size = node::open_chain(&NodeSpec::File(path.clone()), &look)?.size();
        let blocks = (size / BLOCK as u64).min(MOST_BLOCKS);
        if blocks == 0 {
            return Err(Error::other(format!("{name}: is smaller than 4 KiB")));
        }
        if blocks == MOST_BLOCKS {
            say("only the first 16 GiB of the image are used");
        }
        say("reading the image by other means, to compare with");
        let reference = Some(Reference::new(&path, format, &o.scratch)?);
        if write {
            return Ok(Served { path, format, blocks, reference });
        }
        let mut options = CreateOptions::new(size);
        let backing = path.to_str().ok_or_else(|| Error::other("the path is not UTF-8"))?;
        options.backing = Some((backing.to_owned(), format));
        fresh(&scratch, &options)?;
        Ok(Served { path: scratch, format: Format::Qcow2, blocks, reference })
    }
}

fn fresh(path: &Path, options: &CreateOptions) -> Result<(), Error> {
    let file = File::options().create(true).truncate(true).read(true).write(true).open(path);
    let mut storage =
        node::HostStorage::of(file.map_err(Error::other)?, false).map_err(Error::other)?;
    Ok(create(&mut storage, "demo.qcow2", options).map_err(node::Error::from)?)
}

/// Runs the demo; `say` is told what is going on.
///
/// # Errors
/// If it cannot be run. Data that does not verify is no error but in the report.
pub fn run(o: &Options, say: &mut dyn FnMut(&str)) -> Result<Report, Error> {
    let mut served = Served::make(o, say)?;
    let compared_with = served.reference.as_ref().map(|r| r.1);
    let (blocks, path) = (served.blocks, served.path.clone());
    if let Some(cpu) = o.cores[1] {
        reactor::pin_current_thread(cpu).map_err(Error::other)?;
    }
    let mut rig = Rig::open(&served, o)?;
    let mib = (blocks * BLOCK as u64) >> 20;
    let mut fill_writes = None;
    if let Some((reference, with)) = served.reference.take() {
        say(&format!("reading all {mib} MiB of the image, comparing with {with}"));
        rig.guest.reference = Some(reference);
        rig.turn_until(Mix::Verify, 32, |g, _| g.at_end() && g.in_flight() == 0);
    } else {
        say(&format!("filling {mib} MiB of an empty image, 32 deep"));
        let before = rig.model.snapshot();
        rig.turn_until(Mix::Fill, 32, |g, _| g.at_end() && g.in_flight() == 0);
        rig = rig.check_space(&path)?;
        rig.flush();
        let fill = rig.model.snapshot().since(&before);
        fill_writes = Some(fill.device_writes() as f64 / blocks as f64);
    }
    let mut phases = Vec::new();
    let each = o.seconds / 5.0;
    for (name, mix, depth) in [
        ("random read", Mix::Read, 1),
        ("random read", Mix::Read, 32),
        ("random read", Mix::Read, 128),
        ("random overwrite", Mix::Write, 32),
        ("mixed 70/30", Mix::Mixed, 32),
    ] {
        say(&format!("{name}, 4 KiB, {depth} deep"));
        let inject = o.inject.filter(|i| *i != Inject::Corrupt);
        phases.push(rig.phase(name, mix, depth, each, inject));
        rig = rig.check_space(&path)?;
    }
    rig.flush();
    let generations = rig.guest.generations().to_vec();
    let reference = rig.guest.reference.take();
    let mut failure = rig.guest.failure.clone();
    let (written, mut verified) = (rig.guest.written_bytes, rig.guest.verified_bytes);
    rig.close()?;
    if o.inject == Some(Inject::Corrupt) {
        corrupt(&path)?;
    }
    say("opening again with cold caches, reading everything back");
    let mut rig = Rig::open(&served, o)?;
    rig.guest.reference = reference;
    rig.guest.set_generations(generations);
    rig.guest.rewind();
    rig.turn_until(Mix::Verify, 32, |g, _| g.at_end() && g.in_flight() == 0);
    let reread = rig.guest.verified_bytes;
    failure = failure.or(rig.guest.failure.clone());
    verified += reread;
    rig.close()?;
    if served.format == Format::Qcow2 && !checks_clean(&path)? && failure.is_none() {
        failure = Some("the image does not check clean".to_owned());
    }
    let all = blocks * BLOCK as u64;
    if reread != all && failure.is_none() {
        failure = Some(format!("{reread} of {all} bytes were read back"));
    }
    let total = |f: &dyn Fn(&PerRequest) -> f64| {
        let requests: u64 = phases.iter().map(|p| p.requests).sum();
        phases.iter().map(|p| f(&p.per_request) * p.requests as f64).sum::<f64>() / requests as f64
    };
    let counted = phases.iter().all(|p| p.per_request.syscalls.is_some());
    let last = phases.last().cloned();
    let last = last.ok_or_else(|| Error::other("nothing was measured"))?;
    Ok(Report {
        verified: failure.is_none() && reread == all && all > 0,
        failure,
        written_bytes: written,
        verified_bytes: verified,
        reread_bytes: reread,
        requests: phases.iter().map(|p| p.requests).sum(),
        iops: last.iops,
        latency_ns: last.latency_ns,
        policy: o.policy.as_str(),
        syscalls: counted.then(|| total(&|p| p.syscalls.unwrap_or(0.0))),
        allocations: total(&|p| p.allocations),
        locks: total(&|p| p.locks),
        notifications: total(&|p| p.notifications),
        compared_with,
        fill_writes_per_write: fill_writes,
        phases,
    })
}

fn checks_clean(path: &Path) -> Result<bool, Error> {
    let mut storage = node::HostStorage::open(path, false).map_err(Error::other)?;
    let check =
        qcow::check::run(&mut storage, "demo.qcow2", qcow::check::Repair::None, &mut |_| {})
            .map_err(node::Error::from)?;
    Ok(check.corruptions + check.leaks + check.check_errors == 0)
}

/// Changes one byte in the middle of the image's file, where data is.
fn corrupt(path: &Path) -> Result<(), Error> {
    let mut storage = node::HostStorage::open(path, true).map_err(Error::other)?;
    let at = storage.len() / 2 + 2048;
    let mut byte = [0];
    storage.read_at(at, &mut byte).map_err(Error::other)?;
    storage.write_at(at, &[byte[0] ^ 0x55]).map_err(Error::other)
}
