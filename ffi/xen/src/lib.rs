//! Xen's interfaces for user space, against the kernel's ABI; no library of Xen's is used.
//!
//! - [`store`] is a client of xenstore, for control threads.
//! - [`gntdev`] maps and copies pages that guests grant.
//! - [`evtchn`] sends and receives events.
//!
//! Stand-ins that behave as the real ones do are behind the feature `fake`: `store::fake` for
//! xenstored, `fake` for the hypervisor and its devices. The same code runs on both.
//!
//! `unsafe` stands in `ioctl` (the kernel's calls) and `gntdev::memory` (mapped pages), and, for the
//! stand-in, in `fake::memory`.

mod abi;
mod error;
pub mod evtchn;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod gntdev;
mod ioctl;
pub mod store;

pub use error::Error;
