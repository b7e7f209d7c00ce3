//! What a request costs on its path: guest, reactor and device stepped turn by turn on one thread.
//!
//! [`measure`] runs a scenario a given number of times. Called in a child process under callgrind
//! (see `polldisk bench path`), which collects only inside the marked functions here, it gives the
//! instructions of the reactor's part alone: guest and device run outside.

use std::path::Path;

use blkif::Signal;
use block::{Flags, Op, Request, Tag};
use node::{Image, Leaf, NodeSpec, OpenOptions, Parts, ReactorCore};
use qcow::open::Format;
use reactor::Clock;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::counters::Counters;
use crate::drive::{How, drive};
use crate::guest::{Guest, Kick, Mix};
use crate::rig::{BLOCKS, Load, ORDER, add_ring, close, image_file, rig, rig_for};
use crate::stamp::BLOCK;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Random 4 KiB reads of mapped clusters.
    Read,
    /// Random 4 KiB overwrites of mapped clusters.
    Write,
    /// As `Read`, of bytes as they are instead of a QCOW2 image.
    RawRead,
    /// As `Write`, of the same.
    RawWrite,
    /// As `Read`, over a disk whose map is so large that a processor does not keep it near.
    ReadFar,
    /// As `Read`, of what is mapped, but by a part of an L2 table that must be read first.
    ReadMiss,
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
    /// As `Read`, by a satellite of the image.
    ReadSatellite,
    /// As `Write`, by a satellite of the image.
    WriteSatellite,
    /// As `Read`, on the home reactor of an image with that many satellites, which are idle.
    ReadHome(u8),
    /// A turn of an idle home reactor with one ring and that many satellites.
    IdleHome(u8),
    /// A turn of an idle satellite with one ring.
    IdleSatellite,
    /// Random 4 KiB reads of what is in no layer, which no hit can answer.
    Hole,
    /// The same by a satellite, which sends each of them home: the cost of both reactors.
    HoleSatellite,
}

impl Scenario {
    /// All of them, with the depths at which each is measured.
    pub const ALL: [(Scenario, usize); 35] = [
        (Scenario::Read, 1),
        (Scenario::Read, 32),
        (Scenario::Write, 1),
        (Scenario::Write, 32),
        (Scenario::RawRead, 32),
        (Scenario::RawWrite, 32),
        (Scenario::ReadFar, 32),
        (Scenario::ReadMiss, 32),
        (Scenario::Translate1, 1),
        (Scenario::Translate20, 1),
        (Scenario::Idle32, 1),
        (Scenario::EmptyPoll, 1),
        (Scenario::ReadStripe(2), 32),
        (Scenario::ReadStripe(2), 64),
        (Scenario::ReadStripe(4), 32),
        (Scenario::ReadStripe(4), 128),
        (Scenario::Read, 128),
        (Scenario::Devices(1), 32),
        (Scenario::Devices(2), 32),
        (Scenario::Devices(4), 32),
        (Scenario::Stripe(2), 32),
        (Scenario::Stripe(4), 32),
        (Scenario::Reactors(1), 32),
        (Scenario::Reactors(2), 32),
        (Scenario::ReadSatellite, 1),
        (Scenario::ReadSatellite, 32),
        (Scenario::WriteSatellite, 32),
        (Scenario::ReadHome(1), 32),
        (Scenario::ReadHome(8), 32),
        (Scenario::IdleHome(0), 1),
        (Scenario::IdleHome(1), 1),
        (Scenario::IdleHome(8), 1),
        (Scenario::IdleSatellite, 1),
        (Scenario::Hole, 32),
        (Scenario::HoleSatellite, 32),
    ];

    /// Name on the command line and in reports.
    pub fn name(self) -> String {
        let name = match self {
            Scenario::Read => "read",
            Scenario::Write => "write",
            Scenario::RawRead => "raw-read",
            Scenario::RawWrite => "raw-write",
            Scenario::ReadFar => "read-far",
            Scenario::ReadMiss => "read-miss",
            Scenario::Translate1 => "translate-1",
            Scenario::Translate20 => "translate-20",
            Scenario::Idle32 => "idle-32-rings",
            Scenario::EmptyPoll => "empty-poll",
            Scenario::ReadStripe(n) => return format!("read-stripe-{n}"),
            Scenario::Devices(n) => return format!("devices-{n}"),
            Scenario::Stripe(n) => return format!("stripe-{n}"),
            Scenario::Reactors(n) => return format!("reactors-{n}"),
            Scenario::ReadSatellite => "read-satellite",
            Scenario::WriteSatellite => "write-satellite",
            Scenario::ReadHome(n) => return format!("read-home-{n}"),
            Scenario::IdleHome(n) => return format!("idle-home-{n}"),
            Scenario::IdleSatellite => "idle-satellite",
            Scenario::Hole => "hole",
            Scenario::HoleSatellite => "hole-satellite",
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
            Scenario::Translate1 | Scenario::Translate20 => "measured_translate",
            Scenario::EmptyPoll => "measured_poll",
            Scenario::Devices(_) | Scenario::Stripe(_) | Scenario::Reactors(_) => "measured_load",
            _ => "measured_turn",
        }
    }

    /// Whether data moves, so that its copy must be found in a profile.
    pub fn moves(self) -> bool {
        matches!(
            self,
            Scenario::Read
                | Scenario::Write
                | Scenario::RawRead
                | Scenario::RawWrite
                | Scenario::ReadFar
                | Scenario::ReadMiss
                | Scenario::ReadStripe(_)
                | Scenario::ReadSatellite
                | Scenario::WriteSatellite
                | Scenario::ReadHome(_)
                | Scenario::Hole
                | Scenario::HoleSatellite
        )
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
        Scenario::Read => requests(Load::hits(Mix::Read), depth, count, scratch, t)?,
        Scenario::Write => requests(Load::hits(Mix::Write), depth, count, scratch, t)?,
        Scenario::RawRead => {
            requests(Load { raw: true, ..Load::hits(Mix::Read) }, depth, count, scratch, t)?
        }
        Scenario::RawWrite => {
            requests(Load { raw: true, ..Load::hits(Mix::Write) }, depth, count, scratch, t)?
        }
        Scenario::ReadFar => {
            let all = qcow::run::Options::default().l2_cache;
            requests(Load::large(Mix::Read, all), depth, count, scratch, t)?
        }
        Scenario::ReadMiss => requests(Load::large(Mix::Pages, 0), depth, count, scratch, t)?,
        Scenario::ReadStripe(devices) => {
            requests(Load { devices, ..Load::hits(Mix::Read) }, depth, count, scratch, t)?
        }
        Scenario::ReadSatellite => {
            requests(Load::by_satellite(Mix::Read), depth, count, scratch, t)?
        }
        Scenario::WriteSatellite => {
            requests(Load::by_satellite(Mix::Write), depth, count, scratch, t)?
        }
        Scenario::ReadHome(satellites) => {
            requests(Load { satellites, ..Load::hits(Mix::Read) }, depth, count, scratch, t)?
        }
        Scenario::Hole => {
            requests(Load { filled: false, ..Load::hits(Mix::Read) }, depth, count, scratch, t)?
        }
        Scenario::HoleSatellite => {
            let load = Load { filled: false, ..Load::by_satellite(Mix::Read) };
            requests(load, depth, count, scratch, t)?
        }
        Scenario::Devices(n) => drive(n, How::Apart, depth, count, scratch, t)?,
        Scenario::Stripe(n) => drive(n, How::Striped, depth, count, scratch, t)?,
        Scenario::Reactors(n) => drive(n, How::OneDevice, depth, count, scratch, t)?,
        Scenario::Translate1 => translate(1, count, scratch, t)?,
        Scenario::Translate20 => translate(20, count, scratch, t)?,
        Scenario::Idle32 => idle(32, Load::hits(Mix::Read), count, scratch, t)?,
        Scenario::IdleHome(satellites) => {
            idle(1, Load { satellites, ..Load::hits(Mix::Read) }, count, scratch, t)?
        }
        Scenario::IdleSatellite => idle(1, Load::by_satellite(Mix::Read), count, scratch, t)?,
        Scenario::EmptyPoll => empty_poll(count, scratch, t)?,
    };
    Ok(totals.into_run(requests))
}

fn requests(
    load: Load,
    depth: usize,
    count: u64,
    scratch: &Path,
    run: &mut Totals,
) -> Result<u64, Error> {
    let mut rig = rig_for(Load { long_ring: depth > 32, ..load }, scratch, run)?;
    let mix = load.mix;
    if load.filled {
        rig.warm_up()?;
    } else {
        // Each page of a large map comes more than once.
        let first = if load.large.is_some() { Mix::Pages } else { mix };
        for _ in 0..300 {
            rig.round(first, 32);
        }
        rig.settle()?;
    }
    rig.guest.reset_figures();
    let clock = rig.clock.clone();
    while rig.guest.requests < count {
        let now = clock.now();
        rig.guest.send(mix, depth, now);
        rig.tick();
        run.measure(&clock, || measured_turn(rig.core().0));
        if load.filled || load.satellites == 0 {
            rig.turn_others();
        } else {
            // What it costs at home belongs to it.
            run.measure(&clock, || measured_turn(&mut rig.cores[0].0));
            run.turns += 1;
        }
        rig.step_devices();
        rig.tick();
        run.measure(&clock, || measured_turn(rig.core().0));
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
    pub(crate) trap: bool,
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
                for mut c in done.iter() {
                    if block::Layer::complete(image, leaves, &mut c) {
                        out.push(c);
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

/// Turns of a reactor with so many idle rings.
fn idle(
    rings: usize,
    load: Load,
    count: u64,
    scratch: &Path,
    run: &mut Totals,
) -> Result<u64, Error> {
    let mut rig = rig_for(load, scratch, run)?;
    let guests: Result<Vec<Guest>, Error> = (1..rings)
        .map(|_| {
            let (core, image) = rig.core();
            let kick = Kick { signal: Signal::default(), wake: core.wake() };
            let guest = Guest::new(ORDER, BLOCKS, kick)?;
            add_ring(core, image, &guest)?;
            Ok(guest)
        })
        .collect();
    let guests = guests?;
    for _ in 0..2 {
        rig.turn_others();
        rig.core().0.turn();
    }
    let clock = rig.clock.clone();
    run.measure(&clock, || {
        let core = rig.core().0;
        for _ in 0..count {
            measured_turn(core);
        }
    });
    run.turns = count;
    for at in 0..=guests.len() {
        if at != rig.frontend {
            drop(rig.core().0.remove_frontend(at));
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
    let [Leaf::Nvme(queue)] = rig.core().0.leaves() else {
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
