//! [`Rig`]: reactors, a device and a guest, all turned by hand on one thread.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blkif::{Abi, Backend, Config, Signal};
use node::{Frontend, Leaf, NodeSpec, OpenOptions, Parts, ReactorCore};
use qcow::create::{CreateOptions, Preallocation, create};
use qcow::open::Format;
use reactor::Clock;

use crate::Error;
use crate::drive::devices;
use crate::guest::{Guest, Kick, Mix};
use crate::path::Totals;
use crate::stamp::BLOCK;

/// A ring of one page: 32 requests.
pub(crate) const ORDER: u8 = 0;

/// A ring of four pages: 128 requests.
const LONG_ORDER: u8 = 2;

/// Blocks of 4 KiB of the disk: within one page of the map.
pub(crate) const BLOCKS: u64 = 2048;

/// Blocks of a large disk, with clusters of their size: its map has 1024 pages of [`PAGE_BLOCKS`] words, and
/// the least that an image keeps are 528.
pub(crate) const LARGE: u64 = 1 << 19;

/// Clusters of a page of that map.
pub(crate) const PAGE_BLOCKS: u64 = 512;

/// Stripes of that many bytes.
pub(crate) const STRIPE: u64 = 64 << 10;

/// What a guest does, and by which reactor.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    pub(crate) mix: Mix,
    /// Devices that the image lies on, in stripes if there are more than one.
    pub(crate) devices: u8,
    /// The image is written first.
    pub(crate) filled: bool,
    /// Bytes as they are, instead of QCOW2.
    pub(crate) raw: bool,
    /// Further reactors that serve it.
    pub(crate) satellites: u8,
    /// The guest's ring is the first of those's.
    pub(crate) by_satellite: bool,
    /// The disk is of [`LARGE`] blocks, all of them allocated, with so many bytes for its map.
    pub(crate) large: Option<u64>,
    /// The guest's ring has room for more than 32 requests.
    pub(crate) long_ring: bool,
}

impl Load {
    /// Hits, by the image's only reactor.
    pub(crate) fn hits(mix: Mix) -> Load {
        Load {
            mix,
            devices: 1,
            filled: true,
            raw: false,
            satellites: 0,
            by_satellite: false,
            large: None,
            long_ring: false,
        }
    }

    /// Reads over a large disk.
    pub(crate) fn large(mix: Mix, l2_cache: u64) -> Load {
        Load { filled: false, large: Some(l2_cache), ..Load::hits(mix) }
    }

    /// The same by a satellite.
    pub(crate) fn by_satellite(mix: Mix) -> Load {
        Load { satellites: 1, by_satellite: true, ..Load::hits(mix) }
    }

    /// Which reactor has the guest's ring; the home reactor is 0.
    pub(crate) fn at(self) -> usize {
        usize::from(self.by_satellite)
    }
}

/// A rig on an empty image of the usual size. Under callgrind, which makes everything some fifty
/// times slower, the reactor's time is made up: else it would do by the clock, and have counted,
/// far more between two requests than it does.
pub(crate) fn rig(path: &Path, run: &Totals) -> Result<Rig, Error> {
    let spec = node::ModelSpec::new(path);
    image_file(&spec.path, BLOCKS, None)?;
    let image = Default::default();
    Rig::open(NodeSpec::Model(spec), Format::Qcow2, BLOCKS, !run.trap, Load::hits(Mix::Read), image)
}

/// The same for a load.
pub(crate) fn rig_for(load: Load, scratch: &Path, run: &Totals) -> Result<Rig, Error> {
    let image = qcow::run::Options::default();
    if let Some(l2_cache) = load.large {
        let spec = node::ModelSpec::new(scratch.join("large.qcow2"));
        large_file(&spec.path)?;
        let image = qcow::run::Options { l2_cache, ..image };
        return Rig::open(NodeSpec::Model(spec), Format::Qcow2, LARGE, !run.trap, load, image);
    }
    if load.devices == 1 {
        let spec = node::ModelSpec::new(scratch.join("path.qcow2"));
        let format = if load.raw { Format::Raw } else { Format::Qcow2 };
        match load.raw {
            true => raw_file(&spec.path, BLOCKS)?,
            false => image_file(&spec.path, BLOCKS, None)?,
        }
        let spec = NodeSpec::Model(spec);
        return Rig::open(spec, format, BLOCKS, !run.trap, load, image);
    }
    let count = load.devices;
    let spec = NodeSpec::Stripe(STRIPE, devices(count, scratch)?);
    let mut storage = node::open_source(&spec, &OpenOptions::write(Format::Raw))?;
    let options = CreateOptions::new(BLOCKS * BLOCK as u64);
    create(&mut storage, "bench", &options).map_err(node::Error::from)?;
    storage.close()?;
    Rig::open(spec, Format::Qcow2, BLOCKS, !run.trap, load, image)
}

/// A file of so many blocks.
fn raw_file(path: &Path, blocks: u64) -> Result<(), Error> {
    let file = std::fs::File::create(path).map_err(Error::other)?;
    file.set_len(blocks * BLOCK as u64).map_err(Error::other)
}

/// A sparse file of a large disk.
fn large_file(path: &Path) -> Result<(), Error> {
    let mut o = CreateOptions::new(LARGE * BLOCK as u64);
    (o.cluster_size, o.preallocation) = (BLOCK as u64, Preallocation::Metadata);
    create_file(path, &o)
}

pub(crate) fn image_file(path: &Path, blocks: u64, backing: Option<&str>) -> Result<(), Error> {
    let mut o = CreateOptions::new(blocks * BLOCK as u64);
    o.backing = backing.map(|name| (name.to_owned(), Format::Qcow2));
    create_file(path, &o)
}

fn create_file(path: &Path, o: &CreateOptions) -> Result<(), Error> {
    let mut options = std::fs::File::options();
    let file = options.create(true).truncate(true).read(true).write(true).open(path);
    let file = file.map_err(Error::other)?;
    let mut storage = node::HostStorage::of(file, false).map_err(Error::other)?;
    create(&mut storage, "bench", o).map_err(node::Error::from)?;
    Ok(())
}

/// Reactors' cores on this thread with a ring, a device and the guest's end.
pub(crate) struct Rig {
    /// Each with the index of the image in it; the home reactor first.
    pub(crate) cores: Vec<(ReactorCore, usize)>,
    /// Which of them has the ring.
    at: usize,
    pub(crate) guest: Guest,
    pub(crate) frontend: usize,
    devices: Vec<node::ModelController>,
    rest: node::Rest,
    pub(crate) clock: Clock,
    /// The reactor's time, if it is made up.
    time: Arc<AtomicU64>,
}

impl Rig {
    /// A rig on an empty image of `blocks` blocks.
    pub(crate) fn create(spec: node::ModelSpec, blocks: u64) -> Result<Rig, Error> {
        image_file(&spec.path, blocks, None)?;
        let image = Default::default();
        Rig::open(NodeSpec::Model(spec), Format::Qcow2, blocks, false, Load::hits(Mix::Read), image)
    }

    /// A rig with what a load says of satellites and of the guest's ring.
    pub(crate) fn open(
        spec: NodeSpec,
        format: Format,
        blocks: u64,
        made_up_time: bool,
        load: Load,
        options: qcow::run::Options,
    ) -> Result<Rig, Error> {
        let clock = Clock::real();
        let open = OpenOptions { clock: clock.clone(), ..OpenOptions::write(format) };
        let mut parts = Parts::new(node::open_chain(&spec, &open)?)?;
        parts.reserve(load.satellites.into())?;
        let (time_of_core, time) = match made_up_time {
            true => Clock::virtual_clock(),
            false => (clock.clone(), Arc::default()),
        };
        let mut core = ReactorCore::new(time_of_core.clone()).map_err(Error::other)?;
        let (image, mut rest) = parts.attach(&mut core, options).map_err(Error::other)?;
        let mut cores = vec![(core, image)];
        while let Some(further) = rest.further() {
            let mut core = ReactorCore::new(time_of_core.clone()).map_err(Error::other)?;
            let home = &mut cores[0].0;
            let seat = |away| node::take_seat(home, image, away);
            let index = further.attach(&mut core, seat).map_err(Error::other)?;
            cores.push((core, index));
        }
        let devices = rest.models().filter_map(node::Model::take_device).collect();
        let at = load.at();
        let (core, image) = &mut cores[at];
        let kick = Kick { signal: Signal::default(), wake: core.wake() };
        let order = if load.long_ring { LONG_ORDER } else { ORDER };
        let guest = Guest::new(order, blocks, kick)?;
        let frontend = add_ring(core, *image, &guest)?;
        Ok(Rig { cores, at, guest, frontend, devices, rest, clock, time })
    }

    /// The reactor that has the ring, and the image's index in it.
    pub(crate) fn core(&mut self) -> (&mut ReactorCore, usize) {
        let (core, image) = &mut self.cores[self.at];
        (core, *image)
    }

    /// A turn of each of the other reactors.
    pub(crate) fn turn_others(&mut self) {
        for (n, (core, _)) in self.cores.iter_mut().enumerate() {
            if n != self.at {
                core.turn();
            }
        }
    }

    /// Guest, reactor, device, and the reactor again: it starts what it took in the same turn, and
    /// reaps in the next.
    pub(crate) fn round(&mut self, mix: Mix, depth: usize) {
        let now = self.clock.now();
        self.guest.send(mix, depth, now);
        self.tick();
        self.core().0.turn();
        self.turn_others();
        self.step_devices();
        self.tick();
        self.turn_others();
        self.core().0.turn();
        self.guest.reap(now);
    }

    /// Has the devices do all that they can.
    pub(crate) fn step_devices(&mut self) {
        for device in &mut self.devices {
            while device.step(self.clock.now()) {}
        }
    }

    /// Lets 5 µs pass, if time is made up.
    pub(crate) fn tick(&self) {
        self.time.fetch_add(5_000, Ordering::Relaxed);
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
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
    pub(crate) fn warm_up(&mut self) -> Result<(), Error> {
        self.fill()?;
        // Every slot of the ring has a page of its own.
        let depth = self.guest.ring().room();
        for _ in 0..300 {
            self.round(Mix::Mixed, depth);
        }
        self.settle()
    }

    /// Counters of the device.
    pub(crate) fn model_stats(&mut self) -> Option<node::ModelCounts> {
        self.rest.models().next().map(|m| m.stats().snapshot())
    }

    pub(crate) fn settle(&mut self) -> Result<(), Error> {
        while self.guest.in_flight() > 0 {
            self.round(Mix::Mixed, 0);
            self.check()?;
        }
        Ok(())
    }

    pub(crate) fn close(mut self) -> Result<(), Error> {
        self.settle()?;
        let frontend = self.frontend;
        let removed = self.core().0.remove_frontend(frontend);
        drop(removed.ok_or_else(|| Error::other("the ring is still in use"))?);
        let Rig { mut cores, devices, mut rest, .. } = self;
        for (model, device) in rest.models().zip(devices) {
            model.give_device(device)?;
        }
        for (core, image) in cores.drain(1..).rev() {
            close_further(core, image)?;
        }
        let (mut core, image) = cores.remove(0);
        close(&mut core, image, rest)
    }
}

pub(crate) fn add_ring(
    core: &mut ReactorCore,
    image: usize,
    guest: &Guest,
) -> Result<usize, Error> {
    let ring = guest.ring().kept_ring().map_err(Error::other)?;
    let grants = guest.ring().grants();
    let added = core.add_frontend(image, |owner, _| {
        let mut config = Config::new(owner, Abi::X86_64, guest.order());
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
        if core.image(image).is_some_and(|i| block::Layer::<Leaf>::closed(i).is_some()) {
            return Ok(rest.finish(core, image)?);
        }
        std::thread::yield_now();
    }
}

/// Closes an image on a reactor that is not its home.
pub(crate) fn close_further(mut core: ReactorCore, image: usize) -> Result<(), Error> {
    core.with_image(image, |i, _| block::Layer::<Leaf>::close(i));
    core.turn();
    drop(core.take_leaves());
    let closed = core.remove_closed_image(image);
    closed.map(drop).ok_or_else(|| Error::other("a satellite does not close"))
}
