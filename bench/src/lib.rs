//! Measurements: the demo's workload and verification, and what a request costs on its path.
//!
//! - [`demo`] drives a guest ring over an image on the NVMe model and verifies every byte.
//! - [`path`] steps frontend, reactor and device by hand on one thread; run under callgrind it
//!   counts instructions layer by layer.
//! - [`crossing`]: what a page costs that another processor has just written.
//! - [`device`] loads one device through its leaf queue, without an image.
//! - [`chain`]: what changing a running chain costs.
//! - [`fresh`]: random writes into an empty image, beside QEMU.
//! - [`full`]: a full image of 1 TiB: translation, memory, its check.
//! - [`several`]: throughput of an image on one and on two reactors, where processors are idle.
//! - [`figures`]: device writes per guest write, and what opening costs.
//! - [`run`]: a load generator for rings, NBD servers and block nodes.
//! - [`server`]: servers in processes of their own.
//! - [`counters`] counts system calls, allocations and locks of a thread.
//!
//! Gates are counts; times are only reported, since machines are noisy.

mod alloc;
pub mod callgrind;
pub mod chain;
pub mod counters;
pub mod crossing;
pub mod demo;
pub mod device;
mod drive;
pub mod figures;
pub mod fresh;
pub mod full;
mod guest;
mod latency;
pub mod path;
mod reference;
mod rig;
pub mod run;
pub mod server;
pub mod several;
mod stamp;
mod trap;
mod usage;

pub use alloc::{CountingAllocator, allocations};
pub use latency::Latency;
pub use usage::Usage;

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A node or image.
    #[error(transparent)]
    Node(#[from] node::Error),
    /// Anything else, in full.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// Anything else.
    pub fn other(what: impl std::fmt::Display) -> Error {
        Error::Other(what.to_string())
    }
}
