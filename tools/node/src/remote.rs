//! The node `vfio-user:SOCKET/NSID`: a namespace of an NVMe controller that another process offers.
//!
//! A socket is connected to once however many of its namespaces are in use here; the last one that
//! goes closes the connection. Control path, but for [`RemoteDoorbell`].
//!
//! A server that dies, hangs or lies makes the registers read as ones: the driver's ladder then ends
//! with the device lost, requests get errors, and memory that the server may still write to is not
//! used again.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use block::Claims;
use dma::{Region, RegionId};
use nvme::{Bar, DmaMapper, Doorbell, IovaMap, Options, ResetError};
use nvme_spec::offset;
use reactor::{Clock, sync::Mutex};
use vfio_user::wire::pci::{BAR0, CONFIG};
use vfio_user::{Client, Mapped};

use crate::control::Control;
use crate::device::Device;
use crate::transport::Transport;
use crate::{Error, Leaf, RemoteSpec};

/// How long each answer of a server may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Queues that may share a device's claims: one for each node and reactor.
const QUEUES: usize = 32;

/// Where memory is put in the server's address space: above what is taken for no address, and within
/// what every processor could map.
const FIRST: u64 = 1 << 32;
const END: u64 = 1 << 46;

/// Command register in configuration space, and its bits for memory and bus mastering.
const COMMAND: u64 = 4;
const MEMORY: u16 = 1 << 1;
const MASTER: u16 = 1 << 2;

/// A connected device.
struct Function {
    client: Client,
    /// Parts of BAR0 that are reached without messages.
    mapped: Vec<Mapped>,
    /// Bytes of BAR0.
    size: u64,
}

impl Function {
    fn connect(spec: &RemoteSpec) -> Result<Function, String> {
        let client = Client::connect(&spec.socket, PATIENCE).map_err(|e| e.to_string())?;
        let mut class = [0; 3];
        client.read(CONFIG, 9, &mut class).map_err(|e| e.to_string())?;
        // Class code: mass storage, non-volatile memory, NVM Express (NVMe 1.4 §2.1.5).
        if class != [2, 8, 1] {
            let [interface, sub, base] = class;
            return Err(format!(
                "the device is no NVMe controller (class {base:02x}{sub:02x}{interface:02x})"
            ));
        }
        let bar = client.region(BAR0).map_err(|e| e.to_string())?;
        if bar.size <= offset::DOORBELLS || !bar.read || !bar.write {
            return Err(format!("BAR0 of {} bytes cannot be a controller's", bar.size));
        }
        Ok(Function { client, mapped: bar.mapped, size: bar.size })
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0xff; N];
        match self.client.read(BAR0, offset, &mut bytes) {
            Ok(()) => bytes,
            Err(_) => [0xff; N],
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        if let Err(e) = self.client.write(BAR0, offset, bytes)
            && !self.client.is_gone()
        {
            log::warn!("vfio-user: register {offset:#x}: {e}");
        }
    }

    /// Sets or clears the bus master bit, and reads it back.
    fn set_master(&self, on: bool) -> Result<(), ResetError> {
        let failed = |e: vfio_user::Error| ResetError::Failed(e.to_string());
        let mut bytes = [0; 2];
        self.client.read(CONFIG, COMMAND, &mut bytes).map_err(failed)?;
        let before = u16::from_le_bytes(bytes);
        let wanted = if on { before | MEMORY | MASTER } else { before & !MASTER };
        self.client.write(CONFIG, COMMAND, &wanted.to_le_bytes()).map_err(failed)?;
        self.client.read(CONFIG, COMMAND, &mut bytes).map_err(failed)?;
        if (u16::from_le_bytes(bytes) & MASTER != 0) == on {
            Ok(())
        } else {
            Err(ResetError::Failed("the command register does not take it".to_owned()))
        }
    }
}

/// Registers of a device behind a socket.
pub struct RemoteBar(Arc<Function>);

/// One doorbell of it.
pub enum RemoteDoorbell {
    /// In a page that the server shares: a store.
    Mapped(Arc<Region>, usize),
    /// By a message that is not answered: a system call and a lock for each turn that rings it.
    Message(MessageDoorbell),
}

/// A doorbell that the server does not share.
pub struct MessageDoorbell {
    function: Arc<Function>,
    offset: u64,
}

impl Doorbell for RemoteDoorbell {
    #[inline]
    fn ring(&self, value: u32) {
        match self {
            // Release: on x86 a plain store, after everything that was stored before.
            RemoteDoorbell::Mapped(page, at) => page.store32(*at, value, Ordering::Release),
            RemoteDoorbell::Message(m) => m.function.client.post(BAR0, m.offset, value),
        }
    }
}

impl Bar for RemoteBar {
    type Doorbell = RemoteDoorbell;

    fn read32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.0.read(offset))
    }

    fn read64(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.0.read(offset))
    }

    fn write32(&self, offset: u64, value: u32) {
        self.0.write(offset, &value.to_le_bytes());
    }

    fn write64(&self, offset: u64, value: u64) {
        self.0.write(offset, &value.to_le_bytes());
    }

    fn doorbell(&self, offset: u64) -> Option<RemoteDoorbell> {
        let found = |m: &Mapped| {
            let at = m.find(offset, 4).filter(|at| at.is_multiple_of(4))?;
            Some(RemoteDoorbell::Mapped(m.memory.clone(), at))
        };
        if let Some(doorbell) = self.0.mapped.iter().find_map(found) {
            return Some(doorbell);
        }
        let inside = offset.checked_add(4)? <= self.0.size;
        let function = self.0.clone();
        inside.then_some(RemoteDoorbell::Message(MessageDoorbell { function, offset }))
    }

    fn function_reset(&self) -> Result<(), ResetError> {
        self.0.client.reset().map_err(|e| ResetError::Failed(e.to_string()))?;
        self.0.set_master(true)
    }

    fn bus_master_off(&self) -> Result<(), ResetError> {
        self.0.set_master(false)
    }

    fn bus_master_on(&self) -> Result<(), ResetError> {
        self.0.set_master(true)
    }
}

/// Passes regions to the server.
struct Mapper {
    function: Arc<Function>,
    /// What is passed: address, length, region; sorted by address.
    live: Mutex<Vec<(u64, u64, RegionId)>>,
}

/// The lowest free place for `len` bytes. `live` is sorted.
fn place(live: &[(u64, u64, RegionId)], len: u64) -> Option<u64> {
    let mut at = FIRST;
    for &(start, size, _) in live {
        if start - at >= len {
            break;
        }
        // Huge pages are looked for at multiples of themselves.
        at = (start + size).next_multiple_of(1 << 21);
    }
    (len <= END && at <= END - len).then_some(at)
}

impl DmaMapper for Mapper {
    fn map(&self, region: &Arc<Region>) -> Result<IovaMap, String> {
        let mut live = self.live.lock();
        let len = region.len() as u64;
        let at = place(&live, len).ok_or("the server's address space is used up")?;
        self.function.client.map(at, region).map_err(|e| e.to_string())?;
        let index = live.partition_point(|l| l.0 < at);
        live.insert(index, (at, len, region.id()));
        Ok(IovaMap::Contiguous(at))
    }

    fn unmap(&self, region: &Region) {
        let mut live = self.live.lock();
        let Some(index) = live.iter().position(|l| l.2 == region.id()) else { return };
        let (at, ..) = live.remove(index);
        if let Err(e) = self.function.client.unmap(at, region)
            && !self.function.client.is_gone()
        {
            log::error!("vfio-user: {e}");
        }
    }
}

/// A controller that is up.
struct Remote {
    control: Control,
    claims: Arc<Claims>,
    /// Namespaces in use, and whether for writing: one that is, is in use once.
    uses: Mutex<Vec<(u32, bool)>>,
}

/// The controllers in use, by socket. Locked while one is opened or closed: a server takes one
/// connection at a time.
static REMOTES: Mutex<Vec<(PathBuf, Weak<Remote>)>> = Mutex::new(Vec::new());

/// The use of a namespace; given back by [`Lease::close`] after its queue pair is gone.
pub(crate) struct Lease {
    remote: Option<Arc<Remote>>,
    nsid: u32,
    writable: bool,
}

/// Opens a namespace: a queue of its own, the unit in it, and the lease.
///
/// # Errors
/// If nobody listens there, the controller does not come up, the namespace is not there, cannot be
/// used, or is in use for writing.
pub(crate) fn open(
    spec: &RemoteSpec,
    writable: bool,
    clock: Clock,
) -> Result<(Leaf, u16, Device), Error> {
    let node = spec.to_string();
    let mut remotes = REMOTES.lock();
    remotes.retain(|(_, remote)| remote.strong_count() > 0);
    let known = remotes.iter().find(|(socket, _)| *socket == spec.socket);
    let remote = match known.and_then(|(_, remote)| remote.upgrade()) {
        Some(remote) => remote,
        None => {
            let remote = Arc::new(start(spec, &node, clock)?);
            remotes.push((spec.socket.clone(), Arc::downgrade(&remote)));
            remote
        }
    };
    match remote.queue(&node, spec.nsid, writable) {
        Ok((leaf, unit)) => {
            let lease = Lease { remote: Some(remote), nsid: spec.nsid, writable };
            Ok((leaf, unit, Device::Remote(lease)))
        }
        Err(e) => {
            end(remote)?;
            Err(e)
        }
    }
}

/// Connects to a socket: the device's registers, and what makes memory reachable for it.
///
/// # Errors
/// If nobody listens there, or offers no NVMe controller.
pub(crate) fn connect(
    spec: &RemoteSpec,
    node: &str,
) -> Result<(Transport, Arc<dyn DmaMapper>), Error> {
    let function = Function::connect(spec).map_err(|e| Error::node(node, e))?;
    if function.mapped.iter().all(|m| m.find(offset::DOORBELLS, 8).is_none()) {
        log::warn!("{node}: the server does not share its doorbells: each costs a system call");
    }
    let function = Arc::new(function);
    let mapper = Mapper { function: function.clone(), live: Mutex::new(Vec::new()) };
    Ok((Transport::Remote(RemoteBar(function)), Arc::new(mapper)))
}

/// Connects, and brings the controller up.
fn start(spec: &RemoteSpec, node: &str, clock: Clock) -> Result<Remote, Error> {
    let (bar, mapper) = connect(spec, node)?;
    let control = Control::start(node, bar, mapper, Options::default(), clock, ())?;
    Ok(Remote { control, claims: Claims::new(QUEUES), uses: Mutex::new(Vec::new()) })
}

impl Remote {
    /// A queue to a namespace, the unit in it; notes the use.
    fn queue(&self, node: &str, nsid: u32, writable: bool) -> Result<(Leaf, u16), Error> {
        let mut uses = self.uses.lock();
        if uses.iter().any(|&(n, w)| n == nsid && (w || writable)) {
            return Err(Error::in_use(node, format!("namespace {nsid} is in use")));
        }
        let queue = self.another_queue(nsid).map_err(|why| Error::node(node, why))?;
        uses.push((nsid, writable));
        Ok(queue)
    }

    /// The same without noting a use.
    fn another_queue(&self, nsid: u32) -> Result<(Leaf, u16), String> {
        let found = self.control.namespaces().iter().position(|n| n.nsid == nsid);
        let unit = found.ok_or_else(|| self.missing(nsid))?;
        let unit = u16::try_from(unit).map_err(|_| "too many namespaces".to_owned())?;
        let pair = self.control.queue_pair().map_err(|e| e.to_string())?;
        Ok((Leaf::nvme(pair, unit, &self.claims)?, unit))
    }

    /// Why a namespace is not among those that can be used.
    fn missing(&self, nsid: u32) -> String {
        if let Some(r) = self.control.refused().iter().find(|r| r.nsid == nsid) {
            return format!("namespace {nsid} cannot be used: {}", r.why);
        }
        let ids: Vec<_> = self.control.namespaces().iter().map(|n| n.nsid.to_string()).collect();
        format!("the controller has no namespace {nsid}; it has {}", ids.join(", "))
    }
}

impl Lease {
    /// Another queue to the namespace, for another reactor.
    ///
    /// # Errors
    /// If the controller has none left, or is lost.
    pub(crate) fn another_queue(&self) -> Result<Leaf, Error> {
        let fail = |why: String| Error::node(format!("namespace {}", self.nsid), why);
        let remote = self.remote.as_ref().ok_or_else(|| fail("was given back".to_owned()))?;
        remote.another_queue(self.nsid).map(|(leaf, _)| leaf).map_err(fail)
    }

    /// Whether the namespace was opened for writing.
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    /// Gives the namespace back. The last one shuts the controller down and closes the connection.
    ///
    /// # Errors
    /// If the shutdown does not end in order.
    pub(crate) fn close(mut self) -> Result<(), Error> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), Error> {
        let Some(remote) = self.remote.take() else { return Ok(()) };
        let _remotes = REMOTES.lock();
        let ours = |u: &(u32, bool)| *u == (self.nsid, self.writable);
        {
            let mut uses = remote.uses.lock();
            uses.iter().position(ours).map(|at| uses.swap_remove(at));
        }
        end(remote)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(e) = self.give_back() {
            log::error!("{e}");
        }
    }
}

/// Somebody does without a controller: if it was the last, it is shut down. [`REMOTES`] is locked.
fn end(remote: Arc<Remote>) -> Result<(), Error> {
    Arc::into_inner(remote).map_or(Ok(()), |remote| remote.control.close())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_apart_and_used_again() {
        let id = Region::new(4096, dma::PageSize::Small).unwrap().id();
        let mut live = Vec::new();
        assert_eq!(place(&live, 4096), Some(FIRST));
        live.push((FIRST, 4096, id));
        let second = place(&live, 4096).unwrap();
        assert!(second >= FIRST + 4096 && second.is_multiple_of(1 << 21));
        live.push((second, 3 << 21, id));
        let third = place(&live, 1 << 30).unwrap();
        assert_eq!(third, second + (3 << 21));
        live.push((third, 1 << 30, id));
        // The one in the middle goes; what fits comes in its place, what does not goes behind.
        live.remove(1);
        assert_eq!(place(&live, 3 << 21), Some(second));
        assert_eq!(place(&live, 4 << 21), Some(third + (1 << 30)));
        live.remove(0);
        assert_eq!(place(&live, 4096), Some(FIRST));
        assert_eq!(place(&live, END), None);
        assert_eq!(place(&live, u64::MAX), None);
        assert!(place(&[], END - FIRST).is_some() && place(&[], END - FIRST + 1).is_none());
    }
}
