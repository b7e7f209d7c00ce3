//! [`Container`]: what the devices of this process can reach, and under which addresses.
//!
//! One for all devices, so that memory is mapped once however many devices use it. Regions are
//! mapped whole, and counted. With an IOMMU the kernel pins what is mapped: even if this process
//! lost track of memory, a device could never write to somebody else's.

use std::any::Any;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use dma::{Held, Region, RegionId};
use nix::errno::Errno;
use reactor::sync::Mutex;

use crate::iommufd::Iommufd;
use crate::iova::Space;
use crate::noiommu::BusAddresses;
use crate::{Error, Function, Group, Sysfs, abi, group, ioctl, memlock};

/// How devices are kept from memory that is not theirs.
pub enum Mode {
    /// By an IOMMU.
    Iommu,
    /// Not at all: a device that misbehaves, or an address that is wrong, writes over anything.
    /// Bus addresses come from the provider.
    UnsafeNoIommu(Box<dyn BusAddresses>),
}

/// Where devices see a region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Bus {
    /// In one piece, from this address on.
    Contiguous(u64),
    /// In pages of 4 KiB: one address for each, in order.
    Pages(Box<[u64]>),
}

enum Backend {
    Type1(OwnedFd),
    Iommufd(Iommufd),
    NoIommu(OwnedFd, Box<dyn BusAddresses>),
}

/// What several devices of this process can reach.
pub struct Container {
    backend: Backend,
    sysfs: Sysfs,
    dev: PathBuf,
    state: Mutex<State>,
}

struct State {
    space: Space,
    /// By region id.
    mapped: Box<[Option<Mapped>]>,
    bytes: u64,
    /// Groups with a device in use.
    groups: Vec<Joined>,
}

struct Mapped {
    bus: Bus,
    len: u64,
    /// How often it was mapped.
    count: usize,
    /// Mapped: so it is there.
    region: Held,
    #[expect(dead_code, reason = "held: keeps the memory in place")]
    hold: Box<dyn Any + Send + Sync>,
}

struct Joined {
    number: u32,
    fd: OwnedFd,
    devices: usize,
}

impl Container {
    /// Makes a container that suits `first`, a function that is bound to vfio-pci. With an IOMMU:
    /// an iommufd where the kernel has it, else of type1.
    ///
    /// # Errors
    /// If the kernel has no VFIO, or this process may not use it.
    pub fn open(mode: Mode, sysfs: Sysfs, first: &Function) -> Result<Arc<Container>, Error> {
        let dev = PathBuf::from("/dev");
        let iommu = dev.join("iommu");
        let backend = match mode {
            Mode::UnsafeNoIommu(provider) => {
                log::warn!(
                    "devices are driven without an IOMMU: one that misbehaves can write over \
                     anything in memory"
                );
                Backend::NoIommu(group::open_container(&dev)?, provider)
            }
            Mode::Iommu if iommu.exists() && cdev(&sysfs, &dev, first).is_some() => {
                Backend::Iommufd(Iommufd::open(&iommu)?)
            }
            Mode::Iommu => Backend::Type1(group::open_container(&dev)?),
        };
        let state = State {
            space: Space::default(),
            mapped: (0..RegionId::MAX).map(|_| None).collect(),
            bytes: 0,
            groups: Vec::new(),
        };
        Ok(Arc::new(Container { backend, sysfs, dev, state: Mutex::new(state) }))
    }

    /// Whether devices reach all of memory.
    pub fn is_unsafe(&self) -> bool {
        matches!(self.backend, Backend::NoIommu(..))
    }

    /// Opens a device; its group is [`Container::leave`]d after it was closed.
    pub(crate) fn open_device(&self, function: &Function) -> Result<(OwnedFd, Option<u32>), Error> {
        if let Backend::Iommufd(iommufd) = &self.backend {
            let path = cdev(&self.sysfs, &self.dev, function).ok_or_else(|| {
                let a = function.address;
                Error::Host(format!("{a}: the kernel gives it no file under /dev/vfio/devices"))
            })?;
            let fd = group::open(&path)?;
            iommufd.attach(&fd)?;
            let mut state = self.state.lock();
            state.space.set_ranges(&iommufd.ranges()?);
            return Ok((fd, None));
        }
        let wanted = function.group.ok_or_else(|| no_group(function))?;
        if wanted.no_iommu != self.is_unsafe() {
            return Err(other_mode(function, wanted));
        }
        self.join(function, wanted)?;
        let opened = self.device_of(function, wanted.number);
        if opened.is_err() {
            self.leave(wanted.number);
        }
        Ok((opened?, Some(wanted.number)))
    }

    fn device_of(&self, function: &Function, number: u32) -> Result<OwnedFd, Error> {
        let name = std::ffi::CString::new(function.address.to_string()).unwrap_or_default();
        let state = self.state.lock();
        let joined = state.groups.iter().find(|g| g.number == number).ok_or(Error::Gone)?;
        match ioctl::device_fd(joined.fd.as_fd(), &name) {
            Err(Errno::EBUSY) => Err(Error::Host(format!(
                "{}: another process, or another part of this one, drives it",
                function.address
            ))),
            done => done.map_err(Error::os(format!("opening {}", function.address))),
        }
    }

    /// Puts a group into the container, once for all devices of it.
    fn join(&self, function: &Function, wanted: Group) -> Result<(), Error> {
        let mut state = self.state.lock();
        if let Some(g) = state.groups.iter_mut().find(|g| g.number == wanted.number) {
            g.devices += 1;
            return Ok(());
        }
        let (container, kind) = match &self.backend {
            Backend::Type1(fd) => (fd.as_fd(), abi::TYPE1V2_IOMMU),
            Backend::NoIommu(fd, _) => (fd.as_fd(), abi::NOIOMMU_IOMMU),
            Backend::Iommufd(_) => return Ok(()),
        };
        let fd = group::open_group(&self.dev, &self.sysfs, function, wanted, container)?;
        if state.groups.is_empty() {
            group::set_iommu(container, kind)?;
        }
        if kind == abi::TYPE1V2_IOMMU {
            let info = group::info(container)?;
            let usable = info.usable();
            log::debug!(
                "IOMMU group {}: addresses {:x?}, page sizes {:#x}, {:?} mappings",
                wanted.number,
                info.ranges,
                info.page_sizes,
                info.mappings
            );
            state.space.set_ranges(&usable);
            if state.groups.is_empty() {
                self.map_again(&mut state)?;
            }
        }
        state.groups.push(Joined { number: wanted.number, fd, devices: 1 });
        Ok(())
    }

    /// A container that lost its last group has forgotten its mappings; what the devices' owners
    /// still hold is put back where it was.
    fn map_again(&self, state: &mut State) -> Result<(), Error> {
        for m in state.mapped.iter().flatten() {
            if let Bus::Contiguous(iova) = &m.bus {
                self.map_at(&m.region, *iova).map_err(Error::os("mapping memory again"))?;
            }
        }
        Ok(())
    }

    /// A device of the group was closed.
    pub(crate) fn leave(&self, number: u32) {
        let mut state = self.state.lock();
        if let Some(at) = state.groups.iter().position(|g| g.number == number) {
            state.groups[at].devices -= 1;
            if state.groups[at].devices == 0 {
                state.groups.swap_remove(at);
            }
        }
    }

    /// Makes a region reachable for all devices here, and says where. To be undone as often.
    ///
    /// # Errors
    /// If it cannot be: the text says why, and what to do.
    pub fn map(&self, region: &Arc<Region>) -> Result<Bus, Error> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let slot = &mut state.mapped[region.id().index()];
        if let Some(m) = slot {
            m.count += 1;
            return Ok(m.bus.clone());
        }
        let len = region.len() as u64;
        let (bus, hold): (Bus, Box<dyn Any + Send + Sync>) = match &self.backend {
            Backend::NoIommu(_, provider) => {
                let located = provider.locate(region).map_err(Error::Host)?;
                if located.pages.len() as u64 != len / 4096 {
                    let n = located.pages.len();
                    return Err(Error::Odd(format!("{n} page addresses for {len} bytes")));
                }
                (in_one_piece(located.pages), located.hold)
            }
            Backend::Type1(_) | Backend::Iommufd(_) => {
                let align = region.page_size().bytes() as u64;
                let iova = state.space.take(len, align).ok_or_else(|| {
                    let ranges = state.space.ranges();
                    Error::Host(format!(
                        "no {len} bytes of I/O addresses are free for DMA memory in {ranges:x?}"
                    ))
                })?;
                let mut done = self.map_at(region, iova);
                if done == Err(Errno::ENOMEM) && memlock::raise() {
                    done = self.map_at(region, iova);
                }
                if let Err(e) = done {
                    state.space.give_back(iova);
                    return Err(refused(e, len, state.bytes));
                }
                (Bus::Contiguous(iova), Box::new(()))
            }
        };
        state.bytes += len;
        let region = Held::new(region);
        *slot = Some(Mapped { bus: bus.clone(), len, count: 1, region, hold });
        Ok(bus)
    }

    fn map_at(&self, region: &Region, iova: u64) -> Result<(), Errno> {
        match &self.backend {
            Backend::Type1(fd) => ioctl::dma_map(fd.as_fd(), region, iova),
            Backend::Iommufd(fd) => fd.map(region, iova),
            Backend::NoIommu(..) => Err(Errno::EINVAL),
        }
    }

    /// Undoes one [`Container::map`].
    pub fn unmap(&self, region: &Region) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let slot = &mut state.mapped[region.id().index()];
        let Some(m) = slot else { return };
        m.count -= 1;
        if m.count > 0 {
            return;
        }
        let (bus, len) = (m.bus.clone(), m.len);
        *slot = None;
        state.bytes -= len;
        let Bus::Contiguous(iova) = bus else { return };
        let done = match &self.backend {
            Backend::Type1(_) if state.groups.is_empty() => Ok(len),
            Backend::Type1(fd) => group::unmap(fd.as_fd(), iova, len),
            Backend::Iommufd(fd) => fd.unmap(iova, len),
            Backend::NoIommu(..) => return,
        };
        match done {
            Ok(n) if n == len => state.space.give_back(iova),
            // The kernel holds the pages still, so nobody else gets them; nor does anybody get the
            // addresses.
            Ok(n) => log::error!("{n} of {len} bytes at {iova:#x} were unmapped for devices"),
            Err(e) => log::error!("{len} bytes at {iova:#x} stay mapped for devices: {e}"),
        }
    }
}

fn cdev(sysfs: &Sysfs, dev: &std::path::Path, function: &Function) -> Option<PathBuf> {
    let path = dev.join("vfio/devices").join(sysfs.cdev(function.address)?);
    path.exists().then_some(path)
}

/// Pages that follow each other are one piece.
fn in_one_piece(pages: Box<[u64]>) -> Bus {
    match pages.first() {
        Some(&first) if pages.windows(2).all(|w| w[0].checked_add(4096) == Some(w[1])) => {
            Bus::Contiguous(first)
        }
        _ => Bus::Pages(pages),
    }
}

fn no_group(function: &Function) -> Error {
    Error::Host(format!(
        "{} has no IOMMU group: switch the IOMMU on in the firmware and boot with intel_iommu=on \
         or amd_iommu=on. Without an IOMMU: modprobe vfio enable_unsafe_noiommu_mode=1 before the \
         device is bound to vfio-pci, and --unsafe-noiommu here",
        function.address
    ))
}

fn other_mode(function: &Function, group: Group) -> Error {
    let a = function.address;
    Error::Host(match group.no_iommu {
        true => format!(
            "no IOMMU protects memory from {a}: with --unsafe-noiommu it is used nevertheless; a \
             device that misbehaves can then write over anything"
        ),
        false => format!("{a} is behind an IOMMU: leave --unsafe-noiommu out"),
    })
}

fn refused(why: Errno, len: u64, mapped: u64) -> Error {
    match why {
        Errno::ENOMEM => Error::Host(memlock::explain(len, mapped)),
        Errno::ENOSPC => Error::Host(
            "the kernel takes no more DMA mappings: use huge pages, or raise \
             /sys/module/vfio_iommu_type1/parameters/dma_entry_limit"
                .to_owned(),
        ),
        e => Error::os(format!("mapping {len} bytes for devices"))(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_a_row_are_one_piece() {
        assert_eq!(in_one_piece(Box::new([0x5000, 0x6000])), Bus::Contiguous(0x5000));
        assert_eq!(in_one_piece(Box::new([0x5000])), Bus::Contiguous(0x5000));
        for scattered in [[0x5000, 0x7000], [0x6000, 0x5000], [0x5000, 0x5000]] {
            assert_eq!(in_one_piece(Box::new(scattered)), Bus::Pages(Box::new(scattered)));
        }
    }

    #[test]
    fn refusals_say_what_to_do() {
        assert!(refused(Errno::ENOMEM, 4096, 0).to_string().contains("ulimit -l"));
        assert!(refused(Errno::ENOSPC, 4096, 0).to_string().contains("dma_entry_limit"));
        assert!(refused(Errno::EFAULT, 4096, 0).to_string().contains("EFAULT"));
    }
}
