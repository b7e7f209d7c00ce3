//! The polled userspace NVMe driver, written against the registers and rings of the NVMe Base
//! Specification 1.4 and 2.0 (section numbers are those of 1.4) and its NVM command set.
//!
//! - [`Controller`] brings a device up, keeps it well and shuts it down. It lives on a control
//!   thread that calls [`Controller::step`].
//! - [`QueuePair`] is one I/O queue, a `block::BlockQueue` over all namespaces. It lives on the
//!   reactor that polls it and never makes a system call, takes a lock or allocates.
//! - [`Bar`] and [`DmaMapper`] are the seam to a transport: how registers are reached, and which
//!   bus addresses memory has. The driver is generic over it and has no unsafe code.
//!
//! A request that fits one command costs: a table look-up per segment, a tracker from a free list,
//! 64 bytes in the ring; and when it completes, one 32-bit load. The submission
//! doorbell is written once per turn, the completion doorbell once per quarter of its ring. What a
//! command's deadline, a reset or a lost device mean is told in `ladder` and
//! `recover`: in short, a buffer is given back only when the device has certainly let go of it.

#![forbid(unsafe_code)]

mod admin;
mod bar;
mod clock;
mod controller;
mod error;
mod identify;
mod link;
mod memory;
mod prp;
mod queue;
mod ring;
mod shadow;
mod stats;
mod status;
mod units;

pub use bar::{Bar, Doorbell, ResetError};
pub use clock::Clock;
pub use controller::{BlockFormat, Controller, Events, Format, Options, State};
pub use error::Error;
pub use identify::{ControllerInfo, Namespace, Refused};
pub use memory::{DmaMapper, IovaMap, quarantined};
pub use queue::QueuePair;
pub use stats::Stats;
