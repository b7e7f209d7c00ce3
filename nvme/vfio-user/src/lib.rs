//! vfio-user: a PCI device in another process, reached over a unix socket (both sides).
//!
//! - [`Client`] drives a device that some server offers. It trusts the server with nothing: every
//!   answer has a deadline, every size and descriptor is checked, and once a rule is broken the
//!   device is gone for good ([`Client::is_gone`]). Calls block; they are for control threads.
//! - [`Server`] offers a [`Device`] to one client at a time, on one thread that serves the socket
//!   and steps the device by turns. It trusts the client with nothing either.
//! - [`Bus`] is how a served device reaches its client: memory by bus address, and interrupts.
//!
//! Memory is shared by descriptors of sealed memfds ([`dma::Region::from_peer`]), so that nobody can
//! take it away under the other. What cannot be shared that way is reached by messages. Registers
//! that the server shares (doorbells) cost no system call; others cost a message.
//!
//! Protocol: QEMU's `docs/interop/vfio-user.rst`, version 0.0. That is also what libvfio-user and
//! SPDK speak; the older text in libvfio-user's own repository differs in DMA_MAP, DMA_UNMAP and
//! DEVICE_RESET. Not spoken: migration, twin sockets, REGION_WRITE_MULTI, and descriptors that stand
//! for writes (GET_REGION_IO_FDS is answered with none).
#![forbid(unsafe_code)]

mod client;
mod error;
mod server;
mod socket;
mod version;
pub mod wire;

pub use client::{Client, Mapped, RegionInfo};
pub use error::Error;
pub use server::{Bus, BusFault, Device, Server, Shape};
