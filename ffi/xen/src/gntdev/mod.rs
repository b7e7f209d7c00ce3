//! Grants: pages of guests, mapped or copied through `/dev/xen/gntdev`.
//!
//! - [`Gntdev`] is an open device. Each has its own table of mappings; a copy takes no lock in it, but
//!   threads that share one share a count of references, so each reactor has its own.
//! - [`Mapping`] is a batch of grants as one range: a ring. Made and dropped on control threads.
//! - [`Copier`] copies for a reactor: one call for any number of requests, rings and guests.
//! - [`Mapper`] is a thread that maps and unmaps single pages for reactors, which reach them by
//!   [`Pages`]: persistent grants.
//!
//! Facts of the kernel that this rests on: a mapping exists twice, as an entry of the device and as a
//! range of memory, and both end only whole, the range first; one bad reference fails all of a
//! mapping without a word which; after a range that could not be mapped the entry has to go as well.

mod copy;
mod kernel;
mod mapper;
mod mapping;
mod memory;
mod pages;

#[cfg(test)]
mod tests;

pub use copy::{Copier, Copy, Direction};
pub use kernel::Gntdev;
pub use mapper::Mapper;
pub use mapping::{MapError, Mapping};
pub use pages::{Mapped, Pages, Settling};

pub(crate) use copy::Segments;
#[cfg(any(test, feature = "fake"))]
pub(crate) use kernel::Kernel;
#[cfg(any(test, feature = "fake"))]
pub(crate) use memory::Memory;
