//! PCI functions driven from user space through Linux VFIO. Knows nothing of NVMe.
//!
//! - [`Sysfs`] finds functions and says what holds them; [`Address`] names one.
//! - [`Container`] is the address space that devices of this process see memory in: a type1
//!   container, an iommufd, or, behind an explicit choice, no IOMMU at all ([`BusAddresses`]).
//! - [`Device`] is one opened function: its registers ([`Bar`], [`Register`]), configuration space,
//!   reset, and events. A function that vanishes reads as all ones; no access ever kills the
//!   process.
//!
//! All of it is control path, on whatever thread calls it, but for [`Register::write`]: one volatile
//! store, from a reactor.
//!
//! `unsafe` stands in four modules: `ioctl` (the kernel's calls), `mmio` (mapped registers),
//! `sigbus` (a fault on a register of a function that is gone) and `pin` (memory that must not
//! move).

mod abi;
mod address;
mod container;
mod device;
mod error;
mod group;
mod ioctl;
mod iommufd;
mod iova;
mod memlock;
mod mmio;
mod noiommu;
mod pin;
mod sigbus;
mod sysfs;

pub use address::Address;
pub use container::{Bus, Container, Mode};
pub use device::Device;
pub use error::Error;
pub use mmio::{Bar, Register};
pub use noiommu::{BusAddresses, Pagemap};
pub use sysfs::{Function, Group, Sysfs};
