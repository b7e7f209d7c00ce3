//! An NVMe controller at register level, in software: the device that the driver (`nvme`) is
//! tested, demonstrated and measured against.
//!
//! It behaves as the NVM Express Base Specification 1.4 and the NVM command set say, bring-up,
//! queues, PRPs, errors, events, resets and a volatile write cache included, and can be told to
//! misbehave ([`Faults`]). There are two halves:
//!
//! - [`Registers`], shared, made of atomics: the host reads and writes it as it would BAR0, from
//!   any thread, without locks or system calls;
//! - [`Controller`], owned by whoever calls [`Controller::step`]: the host's own thread turn by
//!   turn, a simulation, or a thread of its own ([`ThreadDriver`]).
//!
//! [`PciConfig`] is what a host finds on a PCI bus, for who serves the model there.
//!
//! Host memory is reached by bus address through [`HostMemory`]; [`iommu`] makes one over
//! [`dma::Region`]s. Whatever the host writes, the model never panics, hangs or takes unbounded
//! memory.
//!
//! ```
//! use nvme_model::{Controller, NamespaceConfig, Options, Store, iommu};
//!
//! let (mut host, memory) = iommu();
//! let queues = dma::Region::new(1 << 20, dma::PageSize::Small)?;
//! host.map_at(0x10_0000, &queues)?;
//! let disk =
//!     NamespaceConfig { store: Store::memory(), blocks: 2048, lba: 512, read_only: false };
//! let mut controller = Controller::new(Options::default(), vec![disk], memory)?;
//! let registers = controller.registers().clone();
//! // The host: admin queues of 16 entries at the start of the region, then enable.
//! registers.write32(nvme_spec::offset::AQA, 0x000f_000f);
//! registers.write64(nvme_spec::offset::ASQ, 0x10_0000);
//! registers.write64(nvme_spec::offset::ACQ, 0x10_1000);
//! registers.write32(nvme_spec::offset::CC, 0x0046_0001);
//! controller.step(0);
//! assert_eq!(registers.read32(nvme_spec::offset::CSTS), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod admin;
mod cache;
mod commands;
mod config;
mod controller;
mod events;
mod fault;
mod features;
mod file;
mod format;
mod identify;
mod io;
mod logs;
mod memory;
mod namespace;
mod pci;
mod prp;
mod queues;
mod registers;
mod rng;
mod shadow;
mod stats;
mod store;
mod thread;

pub use config::{ConfigError, Options};
pub use controller::Controller;
pub use fault::{FaultError, Faults};
pub use memory::{DmaFault, HostMemory, IOVA_PAGE, Iommu, MapError, RegionMemory, iommu};
pub use namespace::NamespaceConfig;
pub use pci::{BarLayout, CONFIG_LEN, MSIX_ENTRY, PciConfig};
pub use registers::{DoorbellHandle, Registers};
pub use stats::{Stats, StatsSnapshot};
pub use store::Store;
pub use thread::ThreadDriver;
