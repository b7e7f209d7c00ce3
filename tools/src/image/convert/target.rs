//! Where a copy goes: a new QCOW2 image ([`NewQcow`]), a new raw one ([`NewRaw`]), a new VHD one
//! ([`NewVhd`]), or one that exists ([`Existing`]), or a new disk elsewhere ([`NewDisk`]).

use std::collections::HashMap;

use anyhow::{Context, anyhow, bail};
use block::{Flags, Op, Status, Storage};
use dma::{Buf, Pool};
use node::{Disk, DiskOptions, NodeSpec, OpenOptions, Parts, open_chain};
use qcow::Compressor;
use qcow::build::Builder;
use qcow::create::CreateOptions;
use qcow::open::Format;
use reactor::{Clock, Policy, Portal, PortalReply, PortalRequest, Start};

use crate::image::fresh::{Place, RawAllocation, make_raw};

/// Something that is written from front to back.
pub(super) trait Target {
    /// Takes data. Starts at a multiple of the cluster size, and has whole clusters but at the
    /// disk's end.
    fn data(&mut self, at: u64, bytes: &[u8]) -> anyhow::Result<()>;

    /// Takes zeroes, cut as data is.
    fn zeroes(&mut self, at: u64, len: u64) -> anyhow::Result<()>;
}

/// A disk that reads as zeroes, by what writes to it.
pub(super) struct NewDisk<'w>(pub(super) &'w mut dyn FnMut(u64, &[u8]) -> anyhow::Result<()>);

impl Target for NewDisk<'_> {
    fn data(&mut self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        (self.0)(at, bytes)
    }

    fn zeroes(&mut self, _at: u64, _len: u64) -> anyhow::Result<()> {
        Ok(())
    }
}

/// Threads that compress, at most.
const COMPRESSORS: usize = 8;

/// A new QCOW2 image.
pub(super) struct NewQcow<'p> {
    builder: Builder<'p>,
    /// One for each thread that compresses; none if nothing is compressed.
    compressors: Vec<Compressor>,
}

impl<'p> NewQcow<'p> {
    /// Begins the image; what was in its place is lost.
    pub(super) fn new(
        place: &'p mut Place,
        data: Option<&'p mut Place>,
        options: &CreateOptions,
        compress: bool,
    ) -> anyhow::Result<NewQcow<'p>> {
        let name = place.name.clone();
        let builder = match data {
            Some(data) => Builder::with_data(place, data, &name, options)?,
            None => Builder::new(place, &name, options)?,
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(COMPRESSORS);
        let compressors = match compress {
            true => (0..threads).map(|_| Compressor::new(options.compression)).collect(),
            false => Vec::new(),
        };
        Ok(NewQcow { builder, compressors })
    }

    /// Ends the image; its length.
    pub(super) fn finish(self) -> anyhow::Result<u64> {
        Ok(self.builder.finish()?)
    }

    /// The compressed form of each cluster that gets shorter by it.
    fn compress(&mut self, bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let size = self.builder.geometry().cluster_size() as usize;
        let count = bytes.len().div_ceil(size);
        let mut packed = vec![None; count];
        let share = count.div_ceil(self.compressors.len());
        std::thread::scope(|scope| {
            let work = bytes.chunks(share * size).zip(packed.chunks_mut(share));
            for (compressor, (from, to)) in self.compressors.iter_mut().zip(work) {
                scope.spawn(move || {
                    for (plain, packed) in from.chunks(size).zip(to) {
                        *packed = compress_one(compressor, plain, size);
                    }
                });
            }
        });
        packed
    }
}

/// One cluster; the last of a disk may be cut.
fn compress_one(compressor: &mut Compressor, plain: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut packed = Vec::new();
    let shorter = if plain.len() == size {
        compressor.encode(plain, &mut packed)
    } else {
        let mut whole = plain.to_vec();
        whole.resize(size, 0);
        compressor.encode(&whole, &mut packed)
    };
    shorter.then_some(packed)
}

impl Target for NewQcow<'_> {
    fn data(&mut self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        if self.compressors.is_empty() {
            return Ok(self.builder.data(at, bytes)?);
        }
        let size = self.builder.geometry().cluster_size();
        let packed = self.compress(bytes);
        for (i, (plain, packed)) in bytes.chunks(size as usize).zip(packed).enumerate() {
            let guest = at + i as u64 * size;
            match packed {
                Some(packed) => self.builder.compressed(guest, &packed)?,
                None => self.builder.data(guest, plain)?,
            }
        }
        Ok(())
    }

    fn zeroes(&mut self, at: u64, len: u64) -> anyhow::Result<()> {
        Ok(self.builder.zeroes(at, len)?)
    }
}

/// A new raw image.
pub(super) struct NewRaw<'p> {
    place: &'p mut Place,
    size: u64,
    blank: bool,
}

impl<'p> NewRaw<'p> {
    /// Begins the image; what was in its place is lost.
    pub(super) fn new(
        place: &'p mut Place,
        size: u64,
        how: RawAllocation,
    ) -> anyhow::Result<NewRaw<'p>> {
        make_raw(place, size, how)?;
        let blank = place.is_blank();
        Ok(NewRaw { place, size, blank })
    }

    /// Ends the image; its length.
    pub(super) fn finish(self) -> anyhow::Result<u64> {
        self.place.flush().with_context(|| self.place.name.clone())?;
        Ok(self.size)
    }
}

impl Target for NewRaw<'_> {
    fn data(&mut self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        self.place.write_at(at, bytes).with_context(|| self.place.name.clone())
    }

    fn zeroes(&mut self, at: u64, len: u64) -> anyhow::Result<()> {
        if self.blank {
            return Ok(());
        }
        self.place.write_zeroes_at(at, len).with_context(|| self.place.name.clone())
    }
}

/// A new VHD image.
pub(super) struct NewVhd<'p>(vhd::build::Builder<'p>);

impl<'p> NewVhd<'p> {
    /// Begins the image; what was in its place is lost.
    pub(super) fn new(
        place: &'p mut Place,
        options: &vhd::build::BuildOptions,
    ) -> anyhow::Result<NewVhd<'p>> {
        let name = place.name.clone();
        Ok(NewVhd(vhd::build::Builder::new(place, &name, options)?))
    }

    /// Bytes of its disk.
    pub(super) fn size(&self) -> u64 {
        self.0.size()
    }

    /// Ends the image; its length.
    pub(super) fn finish(self) -> anyhow::Result<u64> {
        Ok(self.0.finish()?)
    }
}

impl Target for NewVhd<'_> {
    fn data(&mut self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        Ok(self.0.data(at, bytes)?)
    }

    fn zeroes(&mut self, _at: u64, _len: u64) -> anyhow::Result<()> {
        Ok(())
    }
}

/// Requests in flight to an image that exists, and bytes of each at most.
const DEPTH: u16 = 16;
const REQUEST: u32 = 1 << 20;
/// Bytes that one request makes zero at most.
const ZEROES: u64 = 1 << 30;

/// An image that exists, written through the datapath.
pub(super) struct Existing {
    disk: Disk,
    portal: Portal,
    pool: Pool,
    flying: HashMap<u64, Flying>,
    next: u64,
    name: String,
    cluster: Option<u64>,
    blank: bool,
}

/// A request in flight.
struct Flying {
    op: Op,
    at: u64,
    len: u64,
    buf: Option<Buf>,
}

impl Existing {
    /// Opens it. `blank` says that it reads as zeroes.
    pub(super) fn open(
        spec: &NodeSpec,
        options: &OpenOptions,
        blank: bool,
    ) -> anyhow::Result<Existing> {
        let parts = Parts::new(open_chain(spec, options)?)?;
        let start = Start { cpu: None, policy: Policy::Adaptive };
        let options_of_disk =
            DiskOptions { reactors: vec![start], image: qcow::run::Options::default() };
        let disk = Disk::start(parts, options_of_disk, Clock::real())?;
        let name = spec.to_string();
        let size = REQUEST.min(disk.info().max_transfer) & !511;
        let pool = Pool::new(u32::from(DEPTH), size).with_context(|| name.clone())?;
        let portal = disk.portal(DEPTH, vec![pool.region().clone()])?;
        let cluster = match options.format {
            Format::Qcow2 => Some(u64::from(disk.info().discard_granularity)),
            Format::Raw => None,
        };
        Ok(Existing { disk, portal, pool, flying: HashMap::new(), next: 0, name, cluster, blank })
    }

    /// Bytes of its disk.
    pub(super) fn size(&self) -> u64 {
        self.disk.info().size
    }

    /// Its cluster size; `None` if it is raw.
    pub(super) fn cluster(&self) -> Option<u64> {
        self.cluster
    }

    /// Makes everything durable and closes the image.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        let result = self.drain().and_then(|()| {
            self.send(Flying { op: Op::Flush, at: 0, len: 0, buf: None })?;
            self.drain()
        });
        let Existing { disk, portal, .. } = self;
        drop(portal);
        let closed = disk.close();
        result?;
        Ok(closed?)
    }

    fn drain(&mut self) -> anyhow::Result<()> {
        let mut result = Ok(());
        while self.portal.in_flight() > 0 {
            let reply = self.portal.wait();
            // The first error is the one to tell; the others must end, too.
            let ended = self.ended(reply);
            result = result.and(ended);
        }
        result
    }

    fn ended(&mut self, reply: PortalReply) -> anyhow::Result<()> {
        let Some(done) = self.flying.remove(&reply.id) else {
            bail!("{}: an answer to no request", self.name);
        };
        if let Some(buf) = done.buf {
            self.pool.give(buf);
        }
        if reply.status == Status::Ok {
            return Ok(());
        }
        Err(anyhow!(
            "{}: {:?} of {} bytes at offset {:#x}: {}",
            self.name,
            done.op,
            done.len,
            done.at,
            reply.status
        ))
    }

    /// Waits until there is room for a request.
    fn room(&mut self) -> anyhow::Result<()> {
        while self.portal.room() == 0 {
            let reply = self.portal.wait();
            self.ended(reply)?;
        }
        Ok(())
    }

    fn send(&mut self, flying: Flying) -> anyhow::Result<()> {
        let seg = match &flying.buf {
            Some(buf) => buf.head(flying.len as u32),
            None => None,
        };
        let id = self.next;
        self.next += 1;
        let Flying { op, at, len, .. } = flying;
        let request = PortalRequest { id, op, flags: Flags::NONE, offset: at, len, seg };
        self.flying.insert(id, flying);
        if self.portal.send(request).is_err() {
            bail!("{}: the reactor takes no more requests", self.name);
        }
        Ok(())
    }
}

impl Target for Existing {
    fn data(&mut self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        let size = self.pool.size() as usize;
        for (i, part) in bytes.chunks(size).enumerate() {
            self.room()?;
            let Some(buf) = self.pool.take() else {
                bail!("{}: no buffer is left", self.name);
            };
            if let Some(seg) = buf.head(part.len() as u32) {
                self.pool.region().write_seg(&seg, part);
            }
            let (at, len) = (at + (i * size) as u64, part.len() as u64);
            self.send(Flying { op: Op::Write, at, len, buf: Some(buf) })?;
        }
        Ok(())
    }

    fn zeroes(&mut self, at: u64, len: u64) -> anyhow::Result<()> {
        if self.blank {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            self.room()?;
            let len = (len - done).min(ZEROES);
            self.send(Flying { op: Op::WriteZeroes, at: at + done, len, buf: None })?;
            done += len;
        }
        Ok(())
    }
}
