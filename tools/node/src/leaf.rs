//! [`Leaf`]: every kind of leaf queue, dispatched by a match.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use block::{
    BlockQueue, Completions, DeviceInfo, Full, HasWork, LeafAccess, MemQueue, Request, RmwQueue,
    Status, StripeQueue, Submit,
};
use dma::Region;
use file::FileQueue;
use nvme::QueuePair;

use crate::model::ModelBar;
use crate::remote::RemoteBar;
use crate::vfio::VfioBar;

/// A reactor's queue to one device.
pub enum Leaf {
    /// Memory.
    Mem(Box<MemQueue>),
    /// Files and kernel block devices.
    File(Box<RmwQueue<FileQueue>>),
    /// A queue pair of an in-process NVMe controller with 512-byte blocks.
    Model(Box<QueuePair<ModelBar>>),
    /// The same with larger blocks, presented as 512e.
    ModelRmw(Box<RmwQueue<QueuePair<ModelBar>>>),
    /// A queue pair of an NVMe device with 512-byte blocks.
    Vfio(Box<QueuePair<VfioBar>>),
    /// The same with larger blocks, presented as 512e.
    VfioRmw(Box<RmwQueue<QueuePair<VfioBar>>>),
    /// A queue pair of a controller in another process, with 512-byte blocks.
    Remote(Box<QueuePair<RemoteBar>>),
    /// The same with larger blocks, presented as 512e.
    RemoteRmw(Box<RmwQueue<QueuePair<RemoteBar>>>),
    /// Several leaves in stripes.
    Stripe(Box<StripeQueue<Leaf>>),
}

impl Leaf {
    /// What an NVMe queue pair has counted, or those of a stripe together; `None` for other leaves.
    pub fn nvme_stats(&self) -> Option<nvme::Stats> {
        match self {
            Leaf::Model(q) => Some(q.stats()),
            Leaf::ModelRmw(q) => Some(q.leaf().stats()),
            Leaf::Vfio(q) => Some(q.stats()),
            Leaf::VfioRmw(q) => Some(q.leaf().stats()),
            Leaf::Remote(q) => Some(q.stats()),
            Leaf::RemoteRmw(q) => Some(q.leaf().stats()),
            Leaf::Stripe(q) => q.members().filter_map(Leaf::nvme_stats).reduce(nvme::Stats::plus),
            Leaf::Mem(_) | Leaf::File(_) => None,
        }
    }
}

macro_rules! each {
    ($self:expr, $q:ident => $e:expr) => {
        match $self {
            Leaf::Mem($q) => $e,
            Leaf::File($q) => $e,
            Leaf::Model($q) => $e,
            Leaf::ModelRmw($q) => $e,
            Leaf::Vfio($q) => $e,
            Leaf::VfioRmw($q) => $e,
            Leaf::Remote($q) => $e,
            Leaf::RemoteRmw($q) => $e,
            Leaf::Stripe($q) => $e,
        }
    };
}

impl Submit for Leaf {
    #[inline]
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        each!(self, q => q.info(unit))
    }

    #[inline(always)]
    fn room(&self) -> usize {
        each!(self, q => q.room())
    }

    #[inline(always)]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        // Copies, so that the request need not be in memory for the leaf whose `submit` is inlined.
        each!(self, q => q.submit(&{ *request }))
    }
}

impl BlockQueue for Leaf {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        each!(self, q => q.register(region))
    }

    #[inline(always)]
    fn poll(&mut self, out: &mut Completions) -> usize {
        each!(self, q => q.poll(out))
    }

    #[inline]
    fn start(&mut self) {
        each!(self, q => q.start());
    }

    #[inline]
    fn in_flight(&self) -> usize {
        each!(self, q => q.in_flight())
    }

    fn arm(&mut self) -> HasWork {
        each!(self, q => q.arm())
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        each!(self, q => q.wake_fd())
    }

    #[inline]
    fn set_now(&mut self, now: u64) {
        each!(self, q => q.set_now(now));
    }
}

impl LeafAccess for Leaf {
    fn unit_len(&self, unit: u16) -> u64 {
        each!(self, q => q.unit_len(unit))
    }

    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        each!(self, q => q.set_unit_len(unit, len))
    }
}
