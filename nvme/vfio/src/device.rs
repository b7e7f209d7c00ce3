//! [`Device`]: one opened function. Control path, from any thread.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::uio::{pread, pwrite};
use reactor::sync::Mutex;
use zerocopy::FromBytes;

use crate::abi::{self, DeviceInfo, IrqInfo, IrqSet, IrqSetNone, RegionInfo};
use crate::mmio::Area;
use crate::{Address, Bar, Container, Error, Function, Sysfs, ioctl};

/// Room for the information on a region with its capabilities.
const INFO_ROOM: usize = 4096;

/// The Command register in configuration space, and its bits: answers memory accesses, masters the
/// bus.
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;

/// A PCI function that this process drives.
///
/// The kernel may ask for it back ([`Device::requested`]): then [`Device::release`] lets go of it,
/// whoever still has a register of it in hand, and [`Device::reopen`] takes it up again if one
/// comes back at the same address.
pub struct Device {
    address: Address,
    container: Arc<Container>,
    sysfs: Sysfs,
    bar: Bar,
    open: Mutex<State>,
}

/// Whether the function is ours.
enum State {
    Open(Open),
    /// Let go of. `quiet`: it certainly had stopped mastering the bus before.
    Released {
        quiet: bool,
    },
}

impl State {
    fn open(&self) -> Option<&Open> {
        match self {
            State::Open(open) => Some(open),
            State::Released { .. } => None,
        }
    }
}

/// What there is while the function is ours.
struct Open {
    fd: OwnedFd,
    group: Option<u32>,
    /// Where configuration space begins in the file.
    config: u64,
    can_reset: bool,
    request: Option<EventFd>,
    error: Option<EventFd>,
    admin: Option<Arc<EventFd>>,
}

impl Device {
    /// Opens the function at `address`, which is bound to vfio-pci, and maps its registers. It does
    /// not master the bus yet.
    ///
    /// # Errors
    /// What stands in the way, and what to do about it.
    pub fn open(
        container: &Arc<Container>,
        sysfs: &Sysfs,
        address: Address,
    ) -> Result<Device, Error> {
        let function = sysfs.function(address)?;
        bound(&function)?;
        let (fd, group) = container.open_device(&function)?;
        let result = Open::new(fd, group).and_then(|open| {
            let bar = region(&open.fd, abi::REGION_BAR0)?;
            let reserved = Bar::reserve(bar.info.size)?;
            bar.map(&open.fd, &reserved)?;
            Ok((open, reserved))
        });
        match result {
            Ok((open, bar)) => Ok(Device {
                address,
                container: container.clone(),
                sysfs: sysfs.clone(),
                bar,
                open: Mutex::new(State::Open(open)),
            }),
            Err(e) => {
                if let Some(g) = group {
                    container.leave(g);
                }
                Err(e)
            }
        }
    }

    /// Where it is.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its registers.
    pub fn bar(&self) -> &Bar {
        &self.bar
    }

    /// What it can reach.
    pub fn container(&self) -> &Arc<Container> {
        &self.container
    }

    /// Resets the function (function level reset, or what the kernel has in its place). Takes some
    /// hundred milliseconds. The Command register is as it was before.
    ///
    /// # Errors
    /// If there is no such reset, or it did not work.
    pub fn reset(&self) -> Result<(), Error> {
        self.with(|open| {
            if !open.can_reset {
                return Err(Error::Host(format!("{} has no reset of its own", self.address)));
            }
            ioctl::plain(open.fd.as_fd(), ioctl::DEVICE_RESET, 0)
                .map_err(Error::os(format!("resetting {}", self.address)))?;
            Ok(())
        })
    }

    /// Lets the function master the bus, or forbids it. What was asked for was read back.
    ///
    /// # Errors
    /// If that is not certain. Of a function that was let go of it is known how it was then.
    pub fn set_bus_master(&self, on: bool) -> Result<(), Error> {
        match &*self.open.lock() {
            State::Open(open) => open.set_bus_master(self.address, on),
            State::Released { quiet: true } if !on => Ok(()),
            State::Released { .. } => Err(Error::Gone),
        }
    }

    /// Has vector 0 of MSI-X signal the descriptor returned; `None` if the function has no MSI-X.
    /// All other vectors stay off.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn admin_interrupt(&self) -> Result<Option<Arc<EventFd>>, Error> {
        self.with(|open| {
            if open.admin.is_none() {
                open.admin = open.listen(abi::IRQ_MSIX)?.map(Arc::new);
            }
            Ok(open.admin.clone())
        })
    }

    /// Whether the kernel wants the function back: it is to be unplugged or unbound, and waits for
    /// [`Device::release`].
    pub fn requested(&self) -> bool {
        self.open.lock().open().is_some_and(|o| o.request.as_ref().is_some_and(signalled))
    }

    /// Whether the bus reported an error of the function since the last look.
    pub fn errored(&self) -> bool {
        self.open.lock().open().is_some_and(|o| o.error.as_ref().is_some_and(signalled))
    }

    /// Lets go of the function: it is stopped from mastering the bus, its registers read all ones
    /// from now on, and the kernel resets it.
    pub fn release(&self) {
        let mut state = self.open.lock();
        let State::Open(open) = &*state else { return };
        let quiet = open.set_bus_master(self.address, false);
        if let Err(e) = &quiet {
            log::warn!("{}: {e}", self.address);
        }
        // The mapping keeps the device's file open.
        if let Err(e) = self.bar.detach() {
            log::error!("{}: {e}", self.address);
        }
        let group = open.group;
        *state = State::Released { quiet: quiet.is_ok() };
        if let Some(g) = group {
            self.container.leave(g);
        }
    }

    /// Whether it was let go of.
    pub fn is_released(&self) -> bool {
        self.open.lock().open().is_none()
    }

    /// Takes the function at this address up again, after [`Device::release`]. `false` if there is
    /// none, or it is not bound to vfio-pci (yet).
    ///
    /// # Errors
    /// If there is one, and it cannot be taken.
    pub fn reopen(&self) -> Result<bool, Error> {
        let mut state = self.open.lock();
        if state.open().is_some() {
            return Ok(true);
        }
        if !self.sysfs.exists(self.address) {
            return Ok(false);
        }
        let Ok(function) = self.sysfs.function(self.address) else { return Ok(false) };
        if bound(&function).is_err() || function.group.is_none() {
            return Ok(false);
        }
        let (fd, group) = self.container.open_device(&function)?;
        let result = Open::new(fd, group).and_then(|open| {
            region(&open.fd, abi::REGION_BAR0)?.map(&open.fd, &self.bar)?;
            Ok(open)
        });
        match result {
            Ok(open) => {
                *state = State::Open(open);
                Ok(true)
            }
            Err(e) => {
                if let Some(g) = group {
                    self.container.leave(g);
                }
                Err(e)
            }
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Open) -> Result<T, Error>) -> Result<T, Error> {
        match &mut *self.open.lock() {
            State::Open(open) => f(open),
            State::Released { .. } => Err(Error::Gone),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.release();
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Whether the kernel has handed the function to VFIO.
fn bound(function: &Function) -> Result<(), Error> {
    let a = function.address;
    // Drivers of the kernel for certain devices are called something-vfio-pci.
    if function.driver.as_deref().is_some_and(|d| d.ends_with("vfio-pci")) {
        return Ok(());
    }
    let has = match &function.driver {
        Some(d) => format!("is held by the kernel's driver {d}"),
        None => "has no driver".to_owned(),
    };
    Err(Error::Host(format!(
        "{a} {has}; hand it to vfio-pci (what is mounted from it must be unmounted before): \
         polldisk device bind {a}"
    )))
}

impl Open {
    fn new(fd: OwnedFd, group: Option<u32>) -> Result<Open, Error> {
        let mut info = DeviceInfo::default();
        ioctl::sized(fd.as_fd(), ioctl::DEVICE_GET_INFO, &mut info)
            .map_err(Error::os("asking for a device"))?;
        if info.flags & abi::DEVICE_PCI == 0 {
            return Err(Error::Odd("the device is none on PCI".to_owned()));
        }
        let config = region(&fd, abi::REGION_CONFIG)?.info;
        if config.flags & (abi::REGION_READ | abi::REGION_WRITE) == 0 || config.size < 64 {
            return Err(Error::Odd(
                "the device's configuration space cannot be reached".to_owned(),
            ));
        }
        let mut open = Open {
            fd,
            group,
            config: config.offset,
            can_reset: info.flags & abi::DEVICE_RESET != 0,
            request: None,
            error: None,
            admin: None,
        };
        open.request = open.listen(abi::IRQ_REQ)?;
        open.error = open.listen(abi::IRQ_ERR)?;
        Ok(open)
    }

    /// Has an interrupt signal the descriptor returned; `None` if there is no such interrupt.
    fn listen(&self, index: u32) -> Result<Option<EventFd>, Error> {
        let mut info = IrqInfo { index, ..Default::default() };
        match ioctl::sized(self.fd.as_fd(), ioctl::DEVICE_GET_IRQ_INFO, &mut info) {
            Ok(_) if info.count > 0 && info.flags & abi::IRQ_EVENTFD != 0 => {}
            Ok(_) | Err(Errno::EINVAL) => return Ok(None),
            Err(e) => return Err(Error::os("asking for an interrupt")(e)),
        }
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags).map_err(Error::os("an eventfd"))?;
        let mut set = IrqSet {
            flags: abi::IRQ_SET_EVENTFD | abi::IRQ_SET_TRIGGER,
            index,
            start: 0,
            count: 1,
            fd: event.as_fd().as_raw_fd(),
            ..Default::default()
        };
        ioctl::sized(self.fd.as_fd(), ioctl::DEVICE_SET_IRQS, &mut set)
            .map_err(Error::os("setting an interrupt up"))?;
        Ok(Some(event))
    }

    fn set_bus_master(&self, address: Address, on: bool) -> Result<(), Error> {
        let before = self.command()?;
        if before == u16::MAX {
            let text = format!("the configuration space of {address} reads all ones");
            return Err(Error::Odd(text));
        }
        let wanted = match on {
            true => before | COMMAND_MASTER | COMMAND_MEMORY,
            false => before & !COMMAND_MASTER,
        };
        self.set_command(wanted)?;
        let after = self.command()?;
        if (after ^ wanted) & (COMMAND_MASTER | COMMAND_MEMORY) == 0 {
            return Ok(());
        }
        let text = format!("{address} did not take {wanted:#06x} as command, it has {after:#06x}");
        Err(Error::Odd(text))
    }

    fn command(&self) -> Result<u16, Error> {
        let mut bytes = [0; 2];
        let n = pread(&self.fd, &mut bytes, (self.config + COMMAND) as i64)
            .map_err(Error::os("reading configuration space"))?;
        match n {
            2 => Ok(u16::from_le_bytes(bytes)),
            _ => Err(Error::Odd("configuration space ends early".to_owned())),
        }
    }

    fn set_command(&self, value: u16) -> Result<(), Error> {
        let n = pwrite(&self.fd, &value.to_le_bytes(), (self.config + COMMAND) as i64)
            .map_err(Error::os("writing configuration space"))?;
        match n {
            2 => Ok(()),
            _ => Err(Error::Odd("configuration space ends early".to_owned())),
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.admin.is_some() {
            let mut set = IrqSetNone {
                flags: abi::IRQ_SET_NONE | abi::IRQ_SET_TRIGGER,
                index: abi::IRQ_MSIX,
                ..Default::default()
            };
            // The kernel does it anyway when the last descriptor is closed.
            let _ = ioctl::sized(self.fd.as_fd(), ioctl::DEVICE_SET_IRQS, &mut set);
        }
    }
}

/// Whether an event was signalled since the last look.
fn signalled(event: &EventFd) -> bool {
    event.read().is_ok_and(|n| n > 0)
}

/// A region of the device's file.
struct Part {
    info: RegionInfo,
    /// The parts of it that can be mapped, if not all of it can.
    sparse: Option<Vec<Area>>,
}

fn region(fd: &OwnedFd, index: u32) -> Result<Part, Error> {
    let mut bytes = vec![0; INFO_ROOM];
    bytes[8..12].copy_from_slice(&index.to_ne_bytes());
    ioctl::sized_bytes(fd.as_fd(), ioctl::DEVICE_GET_REGION_INFO, &mut bytes)
        .map_err(Error::os(format!("asking for region {index} of the device")))?;
    parse(&bytes).ok_or_else(|| Error::Odd("the kernel says nothing of the region".to_owned()))
}

fn parse(bytes: &[u8]) -> Option<Part> {
    let (info, _) = RegionInfo::read_from_prefix(bytes).ok()?;
    let first = if info.flags & abi::REGION_CAPS != 0 { info.cap_offset } else { 0 };
    let sparse = abi::capabilities(bytes, first).find(|(id, _)| *id == abi::CAP_REGION_SPARSE).map(
        |(_, body)| {
            let area = |p: abi::Pair| (p.start, p.start.saturating_add(p.end));
            abi::pairs(body).into_iter().map(area).filter(|a| a.0 < a.1).collect()
        },
    );
    Some(Part { info, sparse })
}

impl Part {
    /// Maps the region's registers, as far as that is possible.
    fn map(&self, fd: &OwnedFd, bar: &Bar) -> Result<(), Error> {
        if self.info.flags & abi::REGION_MMAP == 0 {
            return Err(Error::Host(
                "the device's registers cannot be mapped (its BAR is smaller than a page, or shares \
                 a page with another)"
                    .to_owned(),
            ));
        }
        let all = [(0, self.info.size)];
        let areas = self.sparse.as_deref().unwrap_or(&all);
        bar.attach(fd.as_fd(), self.info.offset, areas)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn sparse_regions() {
        let info = RegionInfo {
            flags: abi::REGION_MMAP | abi::REGION_CAPS,
            cap_offset: 32,
            size: 0x4000,
            ..Default::default()
        };
        let mut bytes = info.as_bytes().to_vec();
        bytes.extend([1, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(abi::Pair { start: 0, end: 0x2000 }.as_bytes());
        bytes.extend(abi::Pair { start: 0x3000, end: u64::MAX }.as_bytes());
        let part = parse(&bytes).unwrap();
        assert_eq!(part.sparse, Some(vec![(0, 0x2000), (0x3000, u64::MAX)]));
        let file: OwnedFd = std::fs::File::open("/dev/zero").unwrap().into();
        let bar = Bar::reserve(0x4000).unwrap();
        assert!(part.map(&file, &bar).is_err(), "an area past the end");
        let plain = parse(info.as_bytes()).unwrap();
        assert_eq!(plain.sparse, None);
        let closed = Part { info: RegionInfo { flags: 0, ..info }, sparse: None };
        assert!(closed.map(&file, &bar).is_err());
    }

    #[test]
    fn a_function_with_another_driver_is_refused_with_the_way_out() {
        let address: Address = "0000:00:03.0".parse().unwrap();
        let mut function = Function {
            address,
            vendor: 1,
            device: 2,
            class: 3,
            driver: Some("nvme".to_owned()),
            group: None,
            numa_node: None,
            bars: [0; 6],
        };
        let text = bound(&function).unwrap_err().to_string();
        assert!(text.contains("driver nvme") && text.ends_with("bind 0000:00:03.0"), "{text}");
        function.driver = None;
        let text = bound(&function).unwrap_err().to_string();
        assert!(text.contains("has no driver"), "{text}");
        for good in ["vfio-pci", "mlx5_vfio-pci"] {
            function.driver = Some(good.to_owned());
            assert_eq!(bound(&function), Ok(()));
        }
    }
}
