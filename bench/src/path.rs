//! What a request costs on its path: guest, reactor and device stepped turn by turn on one thread.
//!
//! [`measure`] runs a scenario a given number of times. Called in a child process under callgrind
//! (see `polldisk bench path`), which collects only inside the marked functions here, it gives the
//! instructions of the reactor's part alone: guest and device run outside.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blkif::{Abi, Backend, Config, Signal};
use block::{Flags, Op, Request, Tag};
use node::{Frontend, Image, Leaf, NodeSpec, OpenOptions, Parts, ReactorCore};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::Clock;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::counters::Counters;
use crate::drive::{How, devices, drive};
use crate::guest::{Guest, Kick, Mix};
use crate::stamp::BLOCK;

/// A ring of one page: 32 requests.
const ORDER: u8 = 0;

/// Blocks of 4 KiB of the disk: within one page of the map.
const BLOCKS: u64 = 2048;

/// Stripes of that many bytes.
pub(crate) const STRIPE: u64 = 64 << 10;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Random 4 KiB reads of mapped clusters.
    Read,
    /// Random 4 KiB overwrites of mapped clusters.
    Write,
    /// The translation of such a read alone, in an image without backing files.
    Translate1,
    /// The same, mapped by the last of 20 layers.
    Translate20,
    /// A turn of a reactor with 32 rings that are all idle.
    Idle32,
    /// An empty poll of the NVMe queue pair.
    EmptyPoll,
    /// Random 4 KiB reads of mapped clusters over a stripe of that many devices.
    ReadStripe(u8),
    /// The driver alone: random 4 KiB reads of that many devices by one thread.
    Devices(u8),
    /// The driver alone over a stripe of that many devices.
    Stripe(u8),
    /// The driver alone: that many queues of one device, in turn, as that many reactors have them.
    Reactors(u8),
}

impl Scenario {
    /// All of them, with the depths at which each is measured.
    pub const ALL: [(Scenario, usize); 17] = [
        (Scenario::Read, 1),
        (Scenario::Read, 32),
        (Scenario::Write, 1),
        (Scenario::Write, 32),
        (Scenario::Translate1, 1),
        (Scenario::Translate20, 1),
        (Scenario::Idle32, 1),
        (Scenario::EmptyPoll, 1),
        (Scenario::ReadStripe(2), 32),
        (Scenario::ReadStripe(4), 32),
        (Scenario::Devices(1), 32),
        (Scenario::Devices(2), 32),
        (Scenario::Devices(4), 32),
        (Scenario::Stripe(2), 32),
        (Scenario::Stripe(4), 32),
        (Scenario::Reactors(1), 32),
        (Scenario::Reactors(2), 32),
    ];

    /// Name on the command line and in reports.
    pub fn name(self) -> String {
        let name = match self {
            Scenario::Read => "read",
            Scenario::Write => "write",
            Scenario::Translate1 => "translate-1",
            Scenario::Translate20 => "translate-20",
            Scenario::Idle32 => "idle-32-rings",
            Scenario::EmptyPoll => "empty-poll",
            Scenario::ReadStripe(n) => return format!("read-stripe-{n}"),
            Scenario::Devices(n) => return format!("devices-{n}"),
            Scenario::Stripe(n) => return format!("stripe-{n}"),
            Scenario::Reactors(n) => return format!("reactors-{n}"),
        };
        name.to_owned()
    }

    /// The scenario of that name.
    pub fn from_name(name: &str) -> Option<Scenario> {
        Scenario::ALL.iter().map(|s| s.0).find(|s| s.name() == name)
    }

    /// The function inside which instructions are collected.
    pub fn symbol(self) -> &'static str {
        match self {
            Scenario::Read | Scenario::Write | Scenario::Idle32 | Scenario::ReadStripe(_) => {
                "measured_turn"
            }
            Scenario::Translate1 | Scenario::Translate20 => "measured_translate",
            Scenario::EmptyPoll => "measured_poll",
            Scenario::Devices(_) | Scenario::Stripe(_) | Scenario::Reactors(_) => "measured_load",
        }
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Requests (or calls) carried out while measuring.
    pub requests: u64,
    /// Turns of the reactor.
    pub turns: u64,
    /// Nanoseconds inside the measured function.
    pub ns: u64,
    /// System calls inside it; `None` where they cannot be counted.
    pub syscalls: Option<u64>,
    /// Allocations inside it.
    pub allocations: u64,
    /// Locks inside it.
    pub locks: u64,
}

#[inline(never)]
fn measured_turn(core: &mut ReactorCore) -> bool {
    core.turn()
}

#[inline(never)]
fn measured_translate(image: &qcow::run::Image, offset: u64) -> Option<(block::Port, u64)> {
    image.translate(Op::Read, offset)
}

#[inline(never)]
fn measured_poll<Q: block::BlockQueue>(queue: &mut Q, out: &mut block::Completions) -> usize {
    queue.poll(out)
}

/// Runs a scenario `count` times in scratch files of `scratch`. `trap`: count system calls by
/// trapping them, which callgrind does not bear.
///
/// # Errors
/// If it cannot be set up, or an answer was wrong.
pub fn measure(
    scenario: Scenario,
    depth: usize,
    count: u64,
    scratch: &Path,
    trap: bool,
) -> Result<Run, Error> {
    let mut totals = Totals { trap, ..Totals::default() };
    let t = &mut totals;
    let requests = match scenario {
        Scenario::Read => requests(Mix::Read, 1, depth, count, scratch, t)?,
        Scenario::Write => requests(Mix::Write, 1, depth, count, scratch, t)?,
        Scenario::ReadStripe(n) => requests(Mix::Read, n, depth, count, scratch, t)?,
        Scenario::Devices(n) => drive(n, How::Apart, depth, count, scratch, t)?,
        Scenario::Stripe(n) => drive(n, How::Striped, depth, count, scratch, t)?,
        Scenario::Reactors(n) => drive(n, How::OneDevice, depth, count, scratch, t)?,
        Scenario::Translate1 => translate(1, count, scratch, t)?,
        Scenario::Translate20 => translate(20, count, scratch, t)?,
        Scenario::Idle32 => idle(count, scratch, t)?,
        Scenario::EmptyPoll => empty_poll(count, scratch, t)?,
    };
    Ok(totals.into_run(requests))
}

/// A rig on an empty image of the usual size. Under callgrind, which makes everything some fifty
/// times slower, the reactor's time is made up: else it would do by the clock, and have counted,
/// far more between two requests than it does.
fn rig(path: &Path, run: &Totals) -> Result<Rig, Error> {
    let spec = node::ModelSpec::new(path);
    image_file(&spec.path, BLOCKS, None)?;
    Rig::open(NodeSpec::Model(spec), BLOCKS, !run.trap)
}

/// The same over a stripe of `count` devices.
fn striped_rig(count: u8, scratch: &Path, run: &Totals) -> Result<Rig, Error> {
    let spec = NodeSpec::Stripe(STRIPE, devices(count, scratch)?);
    let mut storage = node::open_source(&spec, &OpenOptions::write(Format::Raw))?;
    let options = CreateOptions::new(BLOCKS * BLOCK as u64);
    create(&mut storage, "bench", &options).map_err(node::Error::from)?;
    storage.close()?;
    Rig::open(spec, BLOCKS, !run.trap)
}

fn image_file(path: &Path, blocks: u64, backing: Option<&str>) -> Result<(), Error> {
    let mut options = std::fs::File::options();
    let file = options.create(true).truncate(true).read(true).write(true).open(path);
    let file = file.map_err(Error::other)?;
    let mut storage = node::HostStorage::of(file, false).map_err(Error::other)?;
    let mut o = CreateOptions::new(blocks * BLOCK as u64);
    o.backing = backing.map(|name| (name.to_owned(), Format::Qcow2));
    create(&mut storage, "bench", &o).map_err(node::Error::from)?;
    Ok(())
}

/// A reactor's core on this thread with a ring, a device and the guest's end.
pub(crate) struct Rig {
    core: ReactorCore,
    image: usize,
    guest: Guest,
    frontend: usize,
    devices: Vec<node::ModelController>,
    rest: node::Rest,
    clock: Clock,
    /// The reactor's time, if it is made up.
    time: Arc<AtomicU64>,
}

impl Rig {
    /// A rig on an empty image of `blocks` blocks.
    pub(crate) fn create(spec: node::ModelSpec, blocks: u64) -> Result<Rig, Error> {
        image_file(&spec.path, blocks, None)?;
        Rig::open(NodeSpec::Model(spec), blocks, false)
    }

    fn open(spec: NodeSpec, blocks: u64, made_up_time: bool) -> Result<Rig, Error> {
        let clock = Clock::real();
        let open = OpenOptions { clock: clock.clone(), ..OpenOptions::write(Format::Qcow2) };
        let parts = Parts::new(node::open_chain(&spec, &open)?)?;
        let (time_of_core, time) = match made_up_time {
            true => Clock::virtual_clock(),
            false => (clock.clone(), Arc::default()),
        };
        let mut core = ReactorCore::new(time_of_core).map_err(Error::other)?;
        let (image, mut rest) =
            parts.attach(&mut core, qcow::run::Options::default()).map_err(Error::other)?;
        let devices = rest.models().filter_map(node::Model::take_device).collect();
        let kick = Kick { signal: Signal::default(), wake: core.wake() };
        let guest = Guest::new(ORDER, blocks, kick)?;
        let frontend = add_ring(&mut core, image, &guest)?;
        Ok(Rig { core, image, guest, frontend, devices, rest, clock, time })
    }

    /// Guest, reactor, device, and the reactor again: it starts what it took in the same turn, and
    /// reaps in the next.
    fn round(&mut self, mix: Mix, depth: usize) {
        let now = self.clock.now();
        self.guest.send(mix, depth, now);
        self.tick();
        self.core.turn();
        self.step_devices();
        self.tick();
        self.core.turn();
        self.guest.reap(now);
    }

    /// Has the devices do all that they can.
    fn step_devices(&mut self) {
        for device in &mut self.devices {
            while device.step(self.clock.now()) {}
        }
    }

    /// Lets 5 µs pass, if time is made up.
    fn tick(&self) {
        self.time.fetch_add(5_000, Ordering::Relaxed);
    }

    fn check(&self) -> Result<(), Error> {
        match &self.guest.failure {
            Some(e) => Err(Error::other(e)),
            None => Ok(()),
        }
    }

    /// Writes the disk once, in order, and flushes.
    pub(crate) fn fill(&mut self) -> Result<(), Error> {
        while !self.guest.at_end() || self.guest.in_flight() > 0 {
            self.round(Mix::Fill, 32);
            self.check()?;
        }
        self.guest.send_flush(self.clock.now());
        self.settle()
    }

    /// Maps every cluster and grants every page.
    fn warm_up(&mut self) -> Result<(), Error> {
        self.fill()?;
        for _ in 0..300 {
            self.round(Mix::Mixed, 32);
        }
        self.settle()
    }

    /// Counters of the device.
    pub(crate) fn model_stats(&mut self) -> Option<node::ModelCounts> {
        self.rest.models().next().map(|m| m.stats().snapshot())
    }

    fn settle(&mut self) -> Result<(), Error> {
        while self.guest.in_flight() > 0 {
            self.round(Mix::Mixed, 0);
            self.check()?;
        }
        Ok(())
    }

    pub(crate) fn close(mut self) -> Result<(), Error> {
        self.settle()?;
        let removed = self.core.remove_frontend(self.frontend);
        drop(removed.ok_or_else(|| Error::other("the ring is still in use"))?);
        let Rig { mut core, image, devices, mut rest, .. } = self;
        for (model, device) in rest.models().zip(devices) {
            model.give_device(device)?;
        }
        close(&mut core, image, rest)
    }
}

fn add_ring(core: &mut ReactorCore, image: usize, guest: &Guest) -> Result<usize, Error> {
    let (ring, grants) = (guest.ring().ring(), guest.ring().grants());
    let added = core.add_frontend(image, |owner, _| {
        let mut config = Config::new(owner, Abi::X86_64, ORDER);
        config.persistent_pages = config.usual_persistent_pages();
        let backend = Backend::new(config, ring, grants, Signal::default());
        Ok(Frontend::Ring(Box::new(backend.map_err(|e| e.to_string())?)))
    });
    added.map_err(Error::other)
}

/// Closes an image that is turned by hand.
pub(crate) fn close(core: &mut ReactorCore, image: usize, rest: node::Rest) -> Result<(), Error> {
    if let Some(i) = core.image(image) {
        block::Layer::<Leaf>::close(i);
    }
    loop {
        core.turn();
        if let Some((image, status)) = core.remove_closed_image(image) {
            let leaves = core.take_leaves();
            return Ok(rest.finish(&image, status, leaves)?);
        }
        std::thread::yield_now();
    }
}

fn requests(
    mix: Mix,
    devices: u8,
    depth: usize,
    count: u64,
    scratch: &Path,
    run: &mut Totals,
) -> Result<u64, Error> {
    let mut rig = match devices {
        1 => rig(&scratch.join("path.qcow2"), run)?,
        n => striped_rig(n, scratch, run)?,
    };
    rig.warm_up()?;
    rig.guest.reset_figures();
    let clock = rig.clock.clone();
    while rig.guest.requests < count {
        let now = clock.now();
        rig.guest.send(mix, depth, now);
        rig.tick();
        run.measure(&clock, || measured_turn(&mut rig.core));
        rig.step_devices();
        rig.tick();
        run.measure(&clock, || measured_turn(&mut rig.core));
        run.turns += 2;
        rig.guest.reap(now);
        rig.check()?;
    }
    let requests = rig.guest.requests;
    rig.close()?;
    Ok(requests)
}

/// Sums up what happens in the measured parts of a loop.
#[derive(Default)]
pub(crate) struct Totals {
    trap: bool,
    pub(crate) turns: u64,
    ns: u64,
    syscalls: u64,
    uncounted: bool,
    allocations: u64,
    locks: u64,
}

impl Totals {
    /// Runs a part that is measured.
    pub(crate) fn measure<R>(&mut self, clock: &Clock, f: impl FnOnce() -> R) -> R {
        let start = if self.trap { Counters::start() } else { Counters::start_untrapped() };
        let began = clock.now();
        let result = f();
        self.ns += clock.now() - began;
        let c = Counters::finish(start);
        match c.syscalls {
            Some(n) => self.syscalls += n,
            None => self.uncounted = true,
        }
        self.allocations += c.allocations;
        self.locks += c.locks;
        result
    }

    fn into_run(self, requests: u64) -> Run {
        Run {
            requests,
            turns: self.turns,
            ns: self.ns,
            syscalls: (!self.uncounted).then_some(self.syscalls),
            allocations: self.allocations,
            locks: self.locks,
        }
    }
}

/// The translation alone. The data lies in the last of `layers` images.
fn translate(layers: usize, count: u64, scratch: &Path, run: &mut Totals) -> Result<u64, Error> {
    let name = |i: usize| format!("layer{i}.qcow2");
    let mut rig = rig(&scratch.join(name(layers - 1)), run)?;
    rig.warm_up()?;
    rig.close()?;
    for i in (0..layers - 1).rev() {
        image_file(&scratch.join(name(i)), BLOCKS, Some(&name(i + 1)))?;
    }
    let spec = NodeSpec::File(scratch.join(name(0)));
    let parts = Parts::new(node::open_chain(&spec, &OpenOptions::read(Format::Qcow2))?)?;
    let clock = Clock::real();
    let mut core = ReactorCore::new(clock.clone()).map_err(Error::other)?;
    let (at, rest) =
        parts.attach(&mut core, qcow::run::Options::default()).map_err(Error::other)?;
    let buffer = dma::Region::new(BLOCK, dma::PageSize::Small).map_err(Error::other)?;
    for leaf in core.leaves() {
        block::BlockQueue::register(leaf, &buffer).map_err(Error::other)?;
    }
    let segs: Vec<dma::Seg> = buffer.seg(0, BLOCK as u32).into_iter().collect();
    let request = |block: u64| Request {
        tag: Tag::new(u16::MAX, 0, 0),
        op: Op::Read,
        flags: Flags::NONE,
        unit: 0,
        offset: block * BLOCK as u64,
        len: BLOCK as u64,
        segs: &segs,
    };
    load_page(&mut core, at, &request(0))?;
    let missing = || Error::other("a translation missed");
    let Some(Image::Qcow(image)) = core.image(at) else { return Err(missing()) };
    let mut hits = 0;
    run.measure(&clock, || {
        for n in 0..count {
            let offset = n.wrapping_mul(0x9e37_79b9) % BLOCKS * BLOCK as u64;
            hits += u64::from(measured_translate(image, offset).is_some());
        }
    });
    if hits != count {
        return Err(missing());
    }
    close(&mut core, at, rest)?;
    Ok(count)
}

/// Has the map's first page loaded by a read.
fn load_page(core: &mut ReactorCore, at: usize, request: &Request<'_>) -> Result<(), Error> {
    let mut out = block::Completions::new();
    core.with_image(at, |image, leaves| {
        let _full = block::Layer::submit(image, leaves, request);
        for _ in 0..1_000_000 {
            for l in 0..leaves.len() {
                let mut done = block::Completions::new();
                block::BlockQueue::poll(&mut leaves[l], &mut done);
                for c in done.iter() {
                    if let Some(up) = block::Layer::complete(image, leaves, c) {
                        out.push(up);
                    }
                }
            }
            block::Layer::poll(image, leaves, &mut out);
            if !out.is_empty() {
                return;
            }
        }
    });
    if out.is_empty() { Err(Error::other("the map cannot be loaded")) } else { Ok(()) }
}

/// Turns of a reactor with 32 idle rings.
fn idle(count: u64, scratch: &Path, run: &mut Totals) -> Result<u64, Error> {
    let mut rig = rig(&scratch.join("idle.qcow2"), run)?;
    let guests: Result<Vec<Guest>, Error> = (1..32)
        .map(|_| {
            let kick = Kick { signal: Signal::default(), wake: rig.core.wake() };
            let guest = Guest::new(ORDER, BLOCKS, kick)?;
            add_ring(&mut rig.core, rig.image, &guest)?;
            Ok(guest)
        })
        .collect();
    let guests = guests?;
    rig.core.turn();
    let clock = rig.clock.clone();
    run.measure(&clock, || {
        for _ in 0..count {
            measured_turn(&mut rig.core);
        }
    });
    run.turns = count;
    for at in 0..=guests.len() {
        if at != rig.frontend {
            drop(rig.core.remove_frontend(at));
        }
    }
    rig.close()?;
    Ok(count)
}

/// Polls of a queue pair with nothing in flight.
fn empty_poll(count: u64, scratch: &Path, run: &mut Totals) -> Result<u64, Error> {
    let mut rig = rig(&scratch.join("poll.qcow2"), run)?;
    let clock = rig.clock.clone();
    let mut out = block::Completions::new();
    let [Leaf::Nvme(queue)] = rig.core.leaves() else {
        return Err(Error::other("a queue pair of 512-byte blocks was expected"));
    };
    run.measure(&clock, || {
        for _ in 0..count {
            measured_poll(&mut **queue, &mut out);
        }
    });
    rig.close()?;
    Ok(count)
}
