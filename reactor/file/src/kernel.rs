//! [`Kernel`]: starts requests with the kernel and gets their results, by whichever interface.
//!
//! Owns what the kernel reads and writes behind our back: the address lists, one per slot, and the
//! regions that they point into. While a slot is with the kernel its list cannot be touched, what any
//! list names stays in the table, and dropping the whole waits for every request: so the safe methods
//! here are safe.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use dma::{Region, Table};

use crate::aio::Aio;
use crate::memory::Vecs;
use crate::uring::Uring;
use crate::{Engine, Error};

/// What the kernel is asked to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Io {
    /// File to memory.
    Read,
    /// Memory to file; `dsync`: durable before it completes.
    Write { dsync: bool },
    /// `fdatasync`.
    Sync,
    /// `fallocate` with this mode over `len` bytes.
    Allocate { mode: i32, len: u64 },
}

/// A request as the interfaces take it.
pub(crate) struct Start<'a> {
    pub(crate) file: &'a Arc<File>,
    pub(crate) io: Io,
    pub(crate) offset: u64,
    pub(crate) vecs: &'a Vecs,
}

enum Via {
    Uring(Uring),
    Aio(Aio),
}

impl Via {
    /// io_uring, or Linux AIO where there is none.
    fn any(depth: u16) -> Result<Via, Error> {
        match Uring::new(u32::from(depth)) {
            Ok(ring) => Ok(Via::Uring(ring)),
            Err(e) => {
                log::info!("no io_uring on this host ({e}): using Linux AIO");
                Ok(Via::Aio(Aio::new(depth, false)?))
            }
        }
    }
}

/// The kernel's side of a queue.
pub(crate) struct Kernel {
    // First, so that it is dropped (and has waited) before the memory that the kernel uses.
    via: Via,
    /// Those of slots that were ever used. The room for all is there from the start, so none moves.
    vecs: Vec<Vecs>,
    busy: Box<[bool]>,
    table: Table,
}

impl Kernel {
    /// For `depth` slots.
    pub(crate) fn new(engine: Engine, depth: u16) -> Result<Kernel, Error> {
        let via = match engine {
            Engine::IoUring => {
                Via::Uring(Uring::new(u32::from(depth)).map_err(Error::os("io_uring"))?)
            }
            Engine::Aio => Via::Aio(Aio::new(depth, false)?),
            Engine::InMemory => match Aio::new(depth, true) {
                Ok(aio) => Via::Aio(aio),
                Err(e) => {
                    log::info!("no Linux AIO for files in memory ({e}): using io_uring");
                    Via::any(depth)?
                }
            },
            Engine::Auto => Via::any(depth)?,
        };
        Ok(Kernel {
            via,
            vecs: Vec::with_capacity(usize::from(depth)),
            busy: vec![false; usize::from(depth)].into_boxed_slice(),
            table: Table::new(),
        })
    }

    pub(crate) fn engine(&self) -> Engine {
        match &self.via {
            Via::Uring(_) => Engine::IoUring,
            Via::Aio(aio) if aio.at_once() => Engine::InMemory,
            Via::Aio(_) => Engine::Aio,
        }
    }

    /// Adds a region to the table; `pin`: lets the kernel pin it too, to spare that per request.
    pub(crate) fn register(&mut self, region: &Arc<Region>, pin: bool) {
        let new = self.table.register(region);
        if let Via::Uring(ring) = &mut self.via
            && new
            && pin
        {
            ring.pin(region);
        }
    }

    /// Lets go of regions that have no user any more, unless the list of a slot that is with the kernel
    /// or `in_use` names them, or `needed` says that the caller needs them. The lists of other slots
    /// are emptied, so that no list names a region that is not in the table.
    pub(crate) fn prune(
        &mut self,
        in_use: impl Fn(usize) -> bool,
        needed: impl Fn(&Region) -> bool,
    ) {
        let Kernel { via, vecs, busy, table } = self;
        let mut emptied = false;
        table.prune(|region| {
            if !emptied {
                let idle = |slot: &usize| !busy[*slot] && !in_use(*slot);
                (0..vecs.len()).filter(idle).for_each(|slot| vecs[slot].clear());
                emptied = true;
            }
            if needed(region) || vecs.iter().any(|v| v.name(region)) {
                return false;
            }
            match via {
                // What the kernel has pinned, requests of the next region of this number would use.
                Via::Uring(ring) => ring.unpin(region),
                Via::Aio(_) => true,
            }
        });
    }

    /// The table of regions, and the list of a slot that is not with the kernel.
    #[inline]
    pub(crate) fn data(&mut self, slot: u16) -> (&Table, &mut Vecs) {
        let slot = usize::from(slot);
        assert!(!self.busy[slot], "the kernel is reading this slot's list");
        self.make_list(slot);
        (&self.table, &mut self.vecs[slot])
    }

    /// Makes the list of a slot that is used for the first time; `busy` is as long as there is room.
    #[inline(always)]
    fn make_list(&mut self, slot: usize) {
        while slot >= self.vecs.len() {
            self.vecs.push(Vecs::EMPTY);
        }
    }

    /// Queues a request for the data in the slot's list. Nothing is sent before [`Kernel::send`].
    #[inline]
    pub(crate) fn start(&mut self, slot: u16, file: &Arc<File>, io: Io, offset: u64) {
        let at = usize::from(slot);
        assert!(!self.busy[at], "one request per slot at a time");
        self.busy[at] = true;
        self.make_list(at);
        let start = Start { file, io, offset, vecs: &self.vecs[at] };
        match &mut self.via {
            // SAFETY: the list lies in a `Vec` that lives longer than the ring and never takes more
            // memory than at first, so it does not move, and `busy` keeps everyone off it; what it
            // names was in the table when it was filled or, by `prune`, the list was emptied since;
            // and `prune` leaves in the table what a busy slot's list names.
            Via::Uring(ring) => unsafe { ring.push(u32::from(slot), &start) },
            // SAFETY: as above.
            Via::Aio(aio) => unsafe { aio.push(slot, &start) },
        }
    }

    /// Sends what was queued: one system call, or none if nothing was.
    #[inline]
    pub(crate) fn send(&mut self) {
        match &mut self.via {
            Via::Uring(ring) if ring.queued() => ring.send(),
            Via::Aio(aio) if aio.queued() => aio.send(),
            _ => {}
        }
    }

    /// The next result: the slot, and a count or a negative errno. No system call.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<(u16, i64)> {
        let (slot, result) = match &mut self.via {
            Via::Uring(ring) => ring.next(),
            Via::Aio(aio) => aio.next(),
        }?;
        self.busy[slot as usize] = false;
        Some((slot as u16, result))
    }

    /// Prepares for sleep on [`Kernel::wake_fd`]: whether a result waits or something is unsent.
    pub(crate) fn arm(&mut self) -> bool {
        match &mut self.via {
            Via::Uring(ring) => ring.queued() || ring.ready(),
            Via::Aio(aio) => aio.queued() || aio.arm(),
        }
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        match &self.via {
            Via::Uring(ring) => ring.wake_fd(),
            Via::Aio(aio) => aio.wake_fd(),
        }
    }

    /// Whether the kernel has pinned the region of this number, and bytes of the process's allowance
    /// that are taken for such.
    #[cfg(test)]
    pub(crate) fn pinned(&self, region: usize) -> (bool, usize) {
        match &self.via {
            Via::Uring(ring) => (ring.is_pinned(region), ring.allowance()),
            Via::Aio(_) => (false, 0),
        }
    }

    #[cfg(test)]
    pub(crate) fn cripple(&mut self) {
        if let Via::Aio(aio) = &mut self.via {
            aio.cripple();
        }
    }

    /// System calls made to send requests (and, where AIO's ring cannot be read, to reap them).
    pub(crate) fn calls(&self) -> u64 {
        match &self.via {
            Via::Uring(ring) => ring.calls(),
            Via::Aio(aio) => aio.calls(),
        }
    }
}
