//! The reactor: one thread, pinned to a core, that polls everything which belongs to it.
//!
//! One turn of [`Core::turn`] polls each leaf queue, hands completions to images and frontends,
//! lets images go on, and polls each frontend. Nothing in it is shared with another reactor, so
//! there is no lock, no reference count and no wake-up in a turn that has work.
//!
//! - [`Core`] is the loop; [`Reactor`] runs it on a pinned thread under an idle [`Policy`].
//! - [`Mailbox`] is how control threads reach it; [`Portal`] is how a service thread does I/O
//!   through it (NBD connections, conversion, verification); a [`Lodger`] is such a service on the
//!   reactor's own thread.
//! - [`task`] drives what cannot be a straight function: allocation, copy-on-write, flush.
//! - [`Clock`] tells the time (TSC, or virtual for tests), [`Stats`] is read from outside, as
//!   a [`Histogram`] of what requests took is.
//! - [`sync::Mutex`] is the one lock that control paths may use, and it counts.

mod affinity;
mod clock;
mod core;
mod histogram;
mod lodger;
mod mailbox;
mod portal;
mod stats;
pub mod sync;
pub mod task;
mod thread;
mod wake;

pub use crate::core::Core;
pub use affinity::{online_cpus, pin_current_thread};
pub use clock::Clock;
pub use histogram::{Distribution, Histogram};
pub use lodger::{Lodger, Lodging, Turn};
pub use mailbox::{Call, Mailbox};
pub use portal::{Portal, PortalFrontend, PortalReply, PortalRequest};
pub use stats::Stats;
pub use thread::{Policy, Reactor, Start};
pub use wake::Wake;
