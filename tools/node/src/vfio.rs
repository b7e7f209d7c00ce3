//! The node `vfio:DDDD:BB:DD.F/NSID`: a namespace of an NVMe device that this process drives.
//!
//! A device is opened once however many of its namespaces are in use, all in one container; the
//! last one that goes closes it. Control path, but for [`VfioDoorbell`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::Claims;
use dma::Region;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nvme::{Bar, Controller, DmaMapper, Doorbell, IovaMap, Options, ResetError, State};
use reactor::{Clock, sync::Mutex};
use std::os::fd::AsFd;
use vfio::{Address, Bus, Container, Device, Mode, Pagemap, Register, Sysfs};

use crate::control::{Control, Watch};
use crate::transport::Transport;
use crate::{Error, Leaf, VfioSpec, device};

/// Queues that a device may have here: one per reactor and node.
const QUEUES: u16 = 32;

/// How often a device that was taken away is looked for.
const LOOK_AGAIN: u64 = 500_000_000;

static UNSAFE_NOIOMMU: AtomicBool = AtomicBool::new(false);

/// Drives devices without an IOMMU from now on, for the whole process: each can then write over
/// anything in memory if it, or an address it is given, is wrong. For `--unsafe-noiommu`.
pub fn use_unsafe_noiommu() {
    UNSAFE_NOIOMMU.store(true, Ordering::Relaxed);
}

/// The devices in use.
static DRIVES: Mutex<Drives> = Mutex::new(Drives { container: None, drives: Vec::new() });

struct Drives {
    /// There while a device is in use.
    container: Option<Arc<Container>>,
    drives: Vec<Drive>,
}

struct Drive {
    address: Address,
    control: Control,
    claims: Arc<Claims>,
    /// Namespaces in use, and whether for writing.
    uses: Vec<(u32, bool)>,
}

/// Registers of a device.
pub struct VfioBar(Arc<Device>);

/// One doorbell of a device.
pub struct VfioDoorbell(Register);

impl Doorbell for VfioDoorbell {
    #[inline(always)]
    fn ring(&self, value: u32) {
        self.0.write(value);
    }
}

fn failed(e: vfio::Error) -> ResetError {
    ResetError::Failed(e.to_string())
}

impl VfioBar {
    /// The registers of a device that was opened.
    pub fn new(device: Arc<Device>) -> VfioBar {
        VfioBar(device)
    }
}

impl Bar for VfioBar {
    type Doorbell = VfioDoorbell;

    fn read32(&self, offset: u64) -> u32 {
        self.0.bar().read32(offset)
    }

    // In halves, the low one first: some devices know no other accesses.
    fn read64(&self, offset: u64) -> u64 {
        let low = u64::from(self.read32(offset));
        u64::from(self.read32(offset + 4)) << 32 | low
    }

    fn write32(&self, offset: u64, value: u32) {
        self.0.bar().write32(offset, value);
    }

    fn write64(&self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    fn doorbell(&self, offset: u64) -> Option<VfioDoorbell> {
        self.0.bar().register(offset).map(VfioDoorbell)
    }

    fn function_reset(&self) -> Result<(), ResetError> {
        self.0.reset().and_then(|()| self.0.set_bus_master(true)).map_err(failed)
    }

    fn bus_master_off(&self) -> Result<(), ResetError> {
        self.0.set_bus_master(false).map_err(failed)
    }

    fn bus_master_on(&self) -> Result<(), ResetError> {
        self.0.set_bus_master(true).map_err(failed)
    }
}

/// Makes memory reachable for the devices of the container.
pub struct VfioMapper(Arc<Container>);

impl VfioMapper {
    /// For the devices of a container.
    pub fn new(container: Arc<Container>) -> VfioMapper {
        VfioMapper(container)
    }
}

impl DmaMapper for VfioMapper {
    fn map(&self, region: &Arc<Region>) -> Result<IovaMap, String> {
        match self.0.map(region) {
            Ok(Bus::Contiguous(at)) => Ok(IovaMap::Contiguous(at)),
            Ok(Bus::Pages(pages)) => Ok(IovaMap::Pages(pages)),
            Err(e) => Err(e.to_string()),
        }
    }

    fn unmap(&self, region: &Region) {
        self.0.unmap(region);
    }
}

/// Looks after what the kernel says of a device.
struct Attention {
    device: Arc<Device>,
    interrupt: Option<Arc<EventFd>>,
    /// When to look for a device that was taken away.
    again: u64,
}

impl Watch for Attention {
    fn wait(&mut self, period: Duration) {
        let Some(event) = &self.interrupt else { return std::thread::park_timeout(period) };
        let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(period).unwrap_or(PollTimeout::ZERO);
        if poll(&mut fds, limit).is_ok_and(|n| n > 0) {
            // Only taken note of: the controller looks at its queue by itself.
            let _ = event.read();
        }
    }

    fn look(&mut self, controller: &mut Controller<Transport>, now: u64) {
        let device = &self.device;
        if device.errored() {
            log::error!("{}: the bus reports an error of it", device.address());
        }
        if device.requested() {
            log::warn!("{}: the kernel wants it back (unplugged, or unbound)", device.address());
            self.interrupt = None;
            device.release();
        }
        // Its registers read all ones: opened anew, it may come back.
        let gone = controller.error() == Some(&nvme::Error::Gone);
        if gone && controller.state() == State::Failed && !device.is_released() {
            self.interrupt = None;
            device.release();
            self.again = now.saturating_add(LOOK_AGAIN);
        }
        // Its requests are answered before it is taken up again.
        if !device.is_released() || controller.state() != State::Failed || now < self.again {
            return;
        }
        self.again = now.saturating_add(LOOK_AGAIN);
        match device.reopen() {
            Ok(false) => {}
            // Not yet.
            Ok(true) if device.bar().read32(0) == u32::MAX => device.release(),
            Ok(true) => {
                log::warn!("{}: there is a device again", device.address());
                self.interrupt = device.admin_interrupt().unwrap_or_default();
                controller.restart();
            }
            Err(e) => log::warn!("{}: {e}", device.address()),
        }
    }
}

/// The use of a namespace; given back by [`Lease::close`] after its queue pairs are gone.
pub(crate) struct Lease {
    spec: VfioSpec,
    writable: bool,
    open: bool,
}

/// Opens a namespace: a queue of its own, the unit of it, and the lease.
///
/// # Errors
/// If the device cannot be had or does not come up, the namespace is not there, cannot be used, or
/// is in use for writing.
pub(crate) fn open(
    spec: VfioSpec,
    writable: bool,
    clock: Clock,
) -> Result<(Leaf, u16, device::Device), Error> {
    let node = spec.to_string();
    let mut drives = DRIVES.lock();
    let drives = &mut *drives;
    if !drives.drives.iter().any(|d| d.address == spec.address) {
        let drive = start(drives, spec.address, &node, clock);
        drives.tidy();
        drives.drives.push(drive?);
    }
    // Gives the device back on every way out but the last.
    let mut lease = Lease { spec, writable, open: false };
    let result = drives.lease(&mut lease).and_then(|drive| drive.queue(spec));
    match result {
        Ok((leaf, unit)) => Ok((leaf, unit, device::Device::Vfio(lease))),
        Err(e) => {
            drives.give_back(&mut lease)?;
            Err(e)
        }
    }
}

/// Why a namespace that was asked for is not among those that can be used.
fn missing(drive: &Drive, nsid: u32) -> String {
    if let Some(r) = drive.control.refused().iter().find(|r| r.nsid == nsid) {
        return format!("namespace {nsid} cannot be used: {}", r.why);
    }
    let ids: Vec<String> = drive.control.namespaces().iter().map(|n| n.nsid.to_string()).collect();
    match ids.len() {
        0 => "the device has no namespace that can be used".to_owned(),
        _ => format!("the device has no namespace {nsid}; there are {}", ids.join(", ")),
    }
}

/// Opens a device, in the container given or one of its own.
///
/// # Errors
/// If there is no NVMe controller, or it cannot be had.
pub(crate) fn open_device(
    container: Option<Arc<Container>>,
    address: Address,
    node: &str,
) -> Result<(Arc<Container>, Arc<Device>), Error> {
    let fail = |e: vfio::Error| Error::node(node, e);
    let sysfs = Sysfs::default();
    let function = sysfs.function(address).map_err(fail)?;
    if !function.is_nvme() {
        let class = function.class;
        let why = format!("the function at {address} is no NVMe controller (class {class:06x})");
        return Err(Error::node(node, why));
    }
    let container = match container {
        Some(container) => container,
        None => {
            let mode = match UNSAFE_NOIOMMU.load(Ordering::Relaxed) {
                false => Mode::Iommu,
                true => {
                    let map = Pagemap::open(&sysfs).map_err(|e| Error::node(node, e))?;
                    Mode::UnsafeNoIommu(Box::new(map))
                }
            };
            Container::open(mode, sysfs.clone(), &function).map_err(fail)?
        }
    };
    let device = Arc::new(Device::open(&container, &sysfs, address).map_err(fail)?);
    Ok((container, device))
}

/// Opens a device and brings its controller up.
fn start(drives: &mut Drives, address: Address, node: &str, clock: Clock) -> Result<Drive, Error> {
    let fail = |e: vfio::Error| Error::node(node, e);
    let (container, device) = open_device(drives.container.clone(), address, node)?;
    drives.container = Some(container.clone());
    let interrupt = device.admin_interrupt().map_err(fail)?;
    let watch = Attention { device: device.clone(), interrupt, again: 0 };
    let options = Options { io_queues: QUEUES, ..Options::default() };
    let mapper = Arc::new(VfioMapper::new(container));
    let bar = Transport::Vfio(VfioBar::new(device));
    let control = Control::start(node, bar, mapper, options, clock, watch)?;
    let claims = Claims::new(usize::from(QUEUES));
    Ok(Drive { address, control, claims, uses: Vec::new() })
}

impl Drive {
    /// A queue of which a namespace is to be used, and the unit of that in it.
    fn queue(&self, spec: VfioSpec) -> Result<(Leaf, u16), Error> {
        let fail = |e: String| Error::node(spec.to_string(), e);
        let found = self.control.namespaces().iter().position(|n| n.nsid == spec.nsid);
        let unit = found.ok_or_else(|| fail(missing(self, spec.nsid)))? as u16;
        let pair = self.control.queue_pair()?;
        let leaf = Leaf::nvme(pair, unit, &self.claims).map_err(fail)?;
        Ok((leaf, unit))
    }
}

impl Drives {
    /// Notes the use of a namespace of a drive that is open.
    fn lease(&mut self, lease: &mut Lease) -> Result<&Drive, Error> {
        let gone = || Error::node(lease.spec.to_string(), "the device was closed");
        let drive = self.drives.iter_mut().find(|d| d.address == lease.spec.address);
        let drive = drive.ok_or_else(gone)?;
        let nsid = lease.spec.nsid;
        if drive.uses.iter().any(|&(n, w)| n == nsid && (w || lease.writable)) {
            let why = "the namespace is in use by this process already, and one of the two writes";
            return Err(Error::in_use(lease.spec.to_string(), why));
        }
        drive.uses.push((nsid, lease.writable));
        lease.open = true;
        Ok(drive)
    }

    /// Ends a use; the last one of a drive closes it, the last drive the container.
    fn give_back(&mut self, lease: &mut Lease) -> Result<(), Error> {
        let Some(at) = self.drives.iter().position(|d| d.address == lease.spec.address) else {
            return Ok(());
        };
        let uses = &mut self.drives[at].uses;
        if std::mem::take(&mut lease.open) {
            let same = uses.iter().position(|&u| u == (lease.spec.nsid, lease.writable));
            same.map(|i| uses.swap_remove(i));
        }
        if !uses.is_empty() {
            return Ok(());
        }
        let drive = self.drives.swap_remove(at);
        let closed = drive.control.close();
        self.tidy();
        closed
    }

    fn tidy(&mut self) {
        if self.drives.is_empty() {
            self.container = None;
        }
    }
}

impl Lease {
    /// Ends the use of the namespace, after the queue pair is gone; with the last one the device is
    /// shut down and given back to the kernel.
    ///
    /// # Errors
    /// If the shutdown does not end in order.
    pub(crate) fn close(mut self) -> Result<(), Error> {
        DRIVES.lock().give_back(&mut self)
    }

    /// Another queue to the namespace, for another reactor.
    ///
    /// # Errors
    /// If the device has none left, or is lost.
    pub(crate) fn another_queue(&self) -> Result<Leaf, Error> {
        let drives = DRIVES.lock();
        let drive = drives.drives.iter().find(|d| d.address == self.spec.address);
        let closed = || Error::node(self.spec.to_string(), "the device was closed");
        Ok(drive.ok_or_else(closed)?.queue(self.spec)?.0)
    }

    /// Whether the namespace may be written to.
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.open
            && let Err(e) = DRIVES.lock().give_back(self)
        {
            log::error!("{e}");
        }
    }
}
