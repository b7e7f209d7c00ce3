//! [`Ring`]: a guest's ring in this process, as a [`Target`].

use std::sync::Arc;

use blkif::{Abi, Config, Setup, Signal};
use node::{Disk, DiskOptions, NodeSpec, OpenOptions, Parts, ReactorCore, Reactors};
use qcow::open::Format;
use reactor::{Clock, Start};

use super::meter::ReactorMeter;
use super::random::Random;
use super::{Done, Kind, Limits, Request, Target};
use crate::Error;
use crate::guest::Kick;

/// Segments of a request, at most: 128 KiB, as Linux' frontend has them.
const SEGMENTS: u16 = 32;
const SECTOR: u32 = 512;
/// Pages of a ring, as a power of two: 128 requests; and the most.
const ORDER: u8 = 2;
const MAX_ORDER: u8 = 4;
/// How long nothing may be answered, in nanoseconds: longer than the driver gives a device.
const PATIENCE: u64 = 120_000_000_000;
/// How long a write is held for which there is no space, in nanoseconds.
const NO_SPACE_NS: u64 = 500_000_000;

/// How a node is served.
#[derive(Clone, Debug)]
pub struct RingOptions {
    /// The image's format.
    pub format: Format,
    /// Open it for writing.
    pub writable: bool,
    /// The reactor's processor, and what it does when idle.
    pub reactor: Start,
    /// The processor of the calling thread, if that is pinned: on the same one as the reactor it lets that
    /// run when it finds nothing to do.
    pub here: Option<usize>,
    /// Memory for the image's map in bytes.
    pub l2_cache: u64,
    /// Requests under way, at most: the ring has 128 places, or as many as it needs.
    pub depth: u32,
}

impl RingOptions {
    fn image(&self) -> qcow::run::Options {
        qcow::run::Options { l2_cache: self.l2_cache, ..Default::default() }
    }
}

/// A node that a reactor on a thread of its own serves, with the guest's end of a ring to it. Models of
/// devices among the nodes are stepped by the thread that loads it: they are no part of the server.
pub struct Ring {
    disk: Disk,
    guest: blkif::Frontend<Kick>,
    /// Index of the ring in the reactor.
    at: usize,
    devices: Vec<node::ModelController>,
    clock: Clock,
    limits: Limits,
    yields: bool,
    filler: Vec<u8>,
    /// What a read has read; empty if nobody wants it.
    into: Vec<u8>,
}

impl Ring {
    /// Opens a node, starts a reactor that serves it, and connects to it.
    ///
    /// # Errors
    /// If it cannot be opened or served.
    pub fn open(spec: &NodeSpec, options: &RingOptions) -> Result<Ring, Error> {
        let open = OpenOptions { writable: options.writable, ..OpenOptions::read(options.format) };
        let parts = Parts::new(node::open_chain(spec, &open)?)?;
        Ring::serve(parts, &spec.to_string(), options)
    }

    /// The same with an image that is opened already.
    ///
    /// # Errors
    /// If it cannot be served.
    pub fn serve(parts: Parts, name: &str, options: &RingOptions) -> Result<Ring, Error> {
        let served = DiskOptions { reactors: vec![options.reactor], image: options.image() };
        Ring::of(Disk::start(parts, served, Clock::real())?, name, options)
    }

    /// The same with a node on the first of these reactors, which may serve others: whoever started them
    /// ends them, after their rings.
    ///
    /// # Errors
    /// If it cannot be opened or served.
    pub fn open_on(
        spec: &NodeSpec,
        reactors: &Arc<Reactors>,
        options: &RingOptions,
    ) -> Result<Ring, Error> {
        let open = OpenOptions { writable: options.writable, ..OpenOptions::read(options.format) };
        let parts = Parts::on(node::open_chain(spec, &open)?, reactors)?;
        let disk = Disk::start_on(parts, reactors, &[0], options.image())?;
        Ring::of(disk, &spec.to_string(), options)
    }

    fn of(mut disk: Disk, name: &str, options: &RingOptions) -> Result<Ring, Error> {
        let clock = Clock::real();
        let connected = connect(&disk, options);
        let (guest, at) = match connected {
            Ok(connected) => connected,
            Err(e) => {
                // The first error is the one to tell.
                let _ = disk.close();
                return Err(e);
            }
        };
        let info = disk.info();
        let limits = Limits {
            name: format!("the ring of {name}"),
            size: info.size,
            block: info.block_size.max(SECTOR),
            max_len: guest.max_bytes().min(info.max_transfer),
            max_depth: guest.room() as u32,
            writable: options.writable && !info.read_only,
            flush: true,
            trim: options.writable && info.discard && !info.read_only,
            patience: PATIENCE,
        };
        let devices = disk.models().filter_map(node::Model::take_device).collect();
        let yields = options.here.is_some() && options.here == options.reactor.cpu;
        let (filler, into) = (Vec::new(), Vec::new());
        Ok(Ring { disk, guest, at, devices, clock, limits, yields, filler, into })
    }

    /// Tells what the reactor takes; with `traps` also its system calls.
    pub fn meter(&self, traps: bool) -> ReactorMeter {
        let reactor = self.disk.reactor();
        ReactorMeter::new(reactor.mailbox().clone(), reactor.stats().clone(), traps)
    }

    /// Ends ring, image and reactor. Nothing may be under way.
    ///
    /// # Errors
    /// If what was in memory could not be written, or a device does not shut down.
    pub fn close(mut self) -> Result<(), Error> {
        for (model, device) in self.disk.models().zip(self.devices) {
            model.give_device(device)?;
        }
        let at = self.at;
        let removed = ask(&self.disk, move |core| core.remove_frontend(at).is_some())?;
        if !removed {
            return Err(Error::other("the ring still has requests under way"));
        }
        Ok(self.disk.close()?)
    }
}

fn ask<T: Send + 'static>(
    disk: &Disk,
    call: impl FnOnce(&mut ReactorCore) -> T + Send + 'static,
) -> Result<T, Error> {
    disk.reactor().mailbox().ask(call).ok_or_else(|| Error::other("the reactor has ended"))
}

/// Makes both ends of a ring; returns the guest's, and the index of the other in the reactor.
fn connect(disk: &Disk, options: &RingOptions) -> Result<(blkif::Frontend<Kick>, usize), Error> {
    let wake = ask(disk, |core| core.wake())?;
    let abi = Abi::X86_64;
    let fits = |order: &u8| abi.slots(*order) >= options.depth;
    let order = (ORDER..=MAX_ORDER).find(fits).unwrap_or(MAX_ORDER);
    let setup = Setup { abi, order, persistent: true, max_segments: SEGMENTS, start: 0 };
    let kick = Kick { signal: Signal::default(), wake };
    let guest = blkif::Frontend::new(setup, kick).map_err(Error::other)?;
    let ring = guest.kept_ring().map_err(Error::other)?;
    let (grants, image) = (guest.grants(), disk.image());
    let read_only = disk.info().read_only || !options.writable;
    let discard = disk.info().discard && !read_only;
    let added = ask(disk, move |core: &mut ReactorCore| {
        core.add_frontend(image, |owner, _| {
            let mut config = Config::new(owner, abi, order);
            config.max_indirect_segments = SEGMENTS;
            config.persistent_pages = config.usual_persistent_pages();
            config.no_space_timeout = Some(NO_SPACE_NS);
            (config.read_only, config.discard) = (read_only, discard);
            let backend = blkif::Backend::new(config, ring, grants, Signal::default());
            Ok(node::Frontend::Ring(Box::new(backend.map_err(|e| e.to_string())?)))
        })
    })?;
    Ok((guest, added.map_err(Error::other)?))
}

/// What is written where it does not matter: bytes that nothing compresses.
pub(super) fn filler(max_len: u32) -> Vec<u8> {
    let mut random = Random::new(1);
    (0..max_len.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect()
}

impl Target for Ring {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn prepare(&mut self, _: u32, max_len: u32, keep: bool) -> Result<(), Error> {
        self.filler = filler(max_len);
        self.into = vec![0; if keep { max_len as usize } else { 0 }];
        Ok(())
    }

    #[inline]
    fn send(&mut self, request: &Request, data: Option<&[u8]>) -> Result<bool, Error> {
        let (cookie, sector) = (u64::from(request.slot), request.offset / u64::from(SECTOR));
        let sent = match request.kind {
            Kind::Read => self.guest.read(cookie, sector, request.len),
            Kind::Write => {
                let data = data.unwrap_or(&self.filler[..request.len as usize]);
                self.guest.write(cookie, sector, data)
            }
            Kind::Trim => self.guest.discard(cookie, sector, u64::from(request.len / SECTOR)),
            Kind::Flush => self.guest.flush(cookie, 0, &[]),
        };
        match sent {
            Ok(()) => Ok(true),
            Err(blkif::Unsent::Full) => Ok(false),
            Err(e) => Err(Error::other(format!("{}: {e}", self.limits.name))),
        }
    }

    #[inline]
    fn poll(&mut self, _: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
        self.guest.push();
        let mut busy = false;
        if !self.devices.is_empty() {
            let now = self.clock.now();
            for device in &mut self.devices {
                busy |= device.step(now);
            }
        }
        loop {
            match self.guest.reap(&mut self.into) {
                Ok(Some(d)) => {
                    busy = true;
                    let len = (d.len as usize).min(self.into.len());
                    let error = match d.status {
                        0 => None,
                        -2 => Some(libc::EOPNOTSUPP),
                        _ => Some(libc::EIO),
                    };
                    done(Done { slot: d.cookie as u32, error, data: &self.into[..len] });
                }
                Ok(None) => break,
                Err(e) => return Err(Error::other(format!("{}: {e}", self.limits.name))),
            }
        }
        if !busy && self.yields {
            std::thread::yield_now();
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
