//! [`Leaf`]: every kind of leaf queue, dispatched by a match.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use block::{
    BlockQueue, Claims, Completions, DeviceInfo, Full, HasWork, LeafAccess, MemQueue, Request,
    RmwQueue, SplitQueue, Status, StripeQueue, Submit, VacantQueue,
};
use dma::Region;
use file::FileQueue;
use nvme::QueuePair;
use volume::Map;

use crate::device::Device;
use crate::transport::Transport;

/// A reactor's queue to one device.
pub enum Leaf {
    /// Memory, or nothing.
    Rare(Box<Rare>),
    /// Files and kernel block devices.
    File(Box<RmwQueue<FileQueue>>),
    /// A queue pair of an NVMe controller whose namespaces have 512-byte blocks.
    Nvme(Box<QueuePair<Transport>>),
    /// The same with larger blocks, presented as 512e.
    NvmeRmw(Box<RmwQueue<QueuePair<Transport>>>),
    /// Several leaves in stripes.
    Stripe(Box<StripeQueue<Leaf>>),
    /// A volume of a group, on its devices.
    Volume(Box<SplitQueue<Leaf, Map>>),
}

/// Kinds of leaf queues that are rarely there, apart from the others: each kind more of [`Leaf`] costs
/// every request of all kinds.
pub enum Rare {
    /// Memory.
    Mem(MemQueue),
    /// See [`VacantQueue`].
    Vacant(VacantQueue),
}

macro_rules! rare {
    ($self:expr, $q:ident => $e:expr) => {
        match $self {
            Rare::Mem($q) => $e,
            Rare::Vacant($q) => $e,
        }
    };
}

impl Submit for Rare {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        rare!(self, q => q.info(unit))
    }

    fn room(&self) -> usize {
        rare!(self, q => q.room())
    }

    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        rare!(self, q => q.submit(request))
    }
}

impl BlockQueue for Rare {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        rare!(self, q => q.register(region))
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        rare!(self, q => q.poll(out))
    }

    fn in_flight(&self) -> usize {
        rare!(self, q => q.in_flight())
    }

    fn arm(&mut self) -> HasWork {
        rare!(self, q => q.arm())
    }
}

impl LeafAccess for Rare {
    fn unit_len(&self, unit: u16) -> u64 {
        rare!(self, q => q.unit_len(unit))
    }

    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        rare!(self, q => q.set_unit_len(unit, len))
    }
}

impl Leaf {
    /// What stands where there is no leaf queue.
    pub(crate) fn vacant() -> Leaf {
        Leaf::Rare(Box::new(Rare::Vacant(VacantQueue)))
    }

    /// Memory as a device.
    pub fn memory(queue: MemQueue) -> Leaf {
        Leaf::Rare(Box::new(Rare::Mem(queue)))
    }

    /// A queue pair of which `unit` is to be used. `claims`: of all queues to the device.
    ///
    /// # Errors
    /// If there is no such unit, or too many queues share the claims.
    pub(crate) fn nvme(
        pair: QueuePair<Transport>,
        unit: u16,
        claims: &Arc<Claims>,
    ) -> Result<Leaf, String> {
        let info = pair.info(unit).ok_or("the controller has no namespace that can be used")?;
        Ok(match info.block_size {
            512 => Leaf::Nvme(Box::new(pair)),
            _ => Leaf::NvmeRmw(Box::new(RmwQueue::new(pair, claims)?)),
        })
    }

    /// Another queue to the same devices, for another reactor. `below`: the devices that NVMe queues
    /// lead to, in the order of the queues.
    ///
    /// # Errors
    /// If a device, the kernel or memory has no more.
    pub(crate) fn another<'a>(
        &self,
        below: &mut impl Iterator<Item = &'a Device>,
    ) -> Result<Leaf, String> {
        Ok(match self {
            Leaf::Rare(q) => match &**q {
                Rare::Mem(q) => Leaf::memory(q.another()),
                Rare::Vacant(_) => Leaf::vacant(),
            },
            Leaf::File(q) => {
                let queue = q.leaf().another().map_err(|e| e.to_string())?;
                Leaf::File(Box::new(q.another(queue)?))
            }
            Leaf::Nvme(_) | Leaf::NvmeRmw(_) | Leaf::Volume(_) => {
                let device = below.next().ok_or("a queue without a device")?;
                device.another_queue().map_err(|e| e.to_string())?
            }
            Leaf::Stripe(q) => Leaf::Stripe(Box::new(q.another(|m| m.another(below))?)),
        })
    }

    /// What an NVMe queue pair has counted, or those of a stripe or volume together; `None` for other leaves.
    pub fn nvme_stats(&self) -> Option<nvme::Stats> {
        match self {
            Leaf::Nvme(q) => Some(q.stats()),
            Leaf::NvmeRmw(q) => Some(q.leaf().stats()),
            Leaf::Stripe(q) => q.members().filter_map(Leaf::nvme_stats).reduce(nvme::Stats::plus),
            Leaf::Volume(q) => q.members().filter_map(Leaf::nvme_stats).reduce(nvme::Stats::plus),
            Leaf::Rare(_) | Leaf::File(_) => None,
        }
    }
}

macro_rules! each {
    ($self:expr, $q:ident => $e:expr) => {
        match $self {
            Leaf::Rare($q) => $e,
            Leaf::File($q) => $e,
            Leaf::Nvme($q) => $e,
            Leaf::NvmeRmw($q) => $e,
            Leaf::Stripe($q) => $e,
            Leaf::Volume($q) => $e,
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

    /// A queue pair first, by itself or in a stripe: one place where its `submit` is inlined.
    #[inline(always)]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        // Copies, so that the request need not be in memory for the leaf whose `submit` is inlined.
        let mut request = *request;
        let pair = match self {
            Leaf::Nvme(q) => q,
            Leaf::Stripe(stripe) => match stripe.straight(&{ request }) {
                Some((Leaf::Nvme(q), there)) => {
                    request = there;
                    q
                }
                Some((other, there)) => return other.submit_elsewhere(&{ there }),
                None => return self.submit_elsewhere(&{ request }),
            },
            _ => return self.submit_elsewhere(&{ request }),
        };
        pair.submit(&{ request })
    }
}

impl Leaf {
    #[inline(never)]
    fn submit_elsewhere(&mut self, request: &Request<'_>) -> Result<(), Full> {
        each!(self, q => q.submit(request))
    }

    #[inline(never)]
    fn poll_elsewhere(&mut self, out: &mut Completions) -> usize {
        each!(self, q => q.poll(out))
    }

    #[inline(never)]
    fn start_elsewhere(&mut self) {
        each!(self, q => q.start());
    }
}

impl BlockQueue for Leaf {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        each!(self, q => q.register(region))
    }

    #[inline(always)]
    fn poll(&mut self, out: &mut Completions) -> usize {
        match self {
            Leaf::Nvme(q) => q.poll(out),
            _ => self.poll_elsewhere(out),
        }
    }

    #[inline]
    fn start(&mut self) {
        match self {
            Leaf::Nvme(q) => q.start(),
            _ => self.start_elsewhere(),
        }
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
