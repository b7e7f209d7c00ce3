//! What a deterministic simulation is made of: a [`Rng`] that decides everything, a [`Disk`] with a
//! volatile cache whose power can be cut, the [`SimQueue`]s of several reactors to it, and a
//! [`Guest`] that knows what each sector may hold.
//!
//! All of it runs on one thread, which turns reactors by hand in an order drawn from the seed; it
//! reads no clock and asks nobody, so one seed gives one run. Nothing here knows an image format:
//! what is tested meets it at [`block::BlockQueue`], [`block::Storage`] and its own frontend.
//! For tests, and for what puts nodes together.

#![forbid(unsafe_code)]

mod disk;
mod guest;
mod load;
mod model;
mod power;
mod queue;
mod rng;
mod trace;

pub use disk::{Disk, DiskConfig, Faults, Sabotage};
pub use guest::{Guest, GuestOp, show};
pub use load::{Load, Weights};
pub use model::{BELOW, Model, fill, ident};
pub use queue::SimQueue;
pub use rng::Rng;
pub use trace::Trace;

/// What a power cut may tear, and what the model keeps apart: a sector, in bytes.
pub const SECTOR: usize = 512;
