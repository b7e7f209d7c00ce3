//! Xen's interfaces for user space, against the kernel's ABI; no library of Xen's is used.
//!
//! - [`store`] is a client of xenstore, for control threads.
//!
//! Stand-ins that behave as the real ones do are behind the feature `fake`.

#![forbid(unsafe_code)]

pub mod store;
