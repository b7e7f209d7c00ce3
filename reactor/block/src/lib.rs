//! The one vocabulary in which frontends, images and devices talk: requests and completions.
//!
//! A request goes down by [`Submit::submit`], its completion comes back from
//! [`BlockQueue::poll`], never from inside `submit`. Everything here belongs to one reactor thread
//! and is never shared, so there is no lock to leave out.
//!
//! - [`Tag`] says to whom a completion goes; [`Request`], [`Completion`], [`Status`] are what moves.
//! - [`Submit`] is what a frontend sees (an image); [`BlockQueue`] is a leaf: a device's queue.
//! - [`Frontend`] brings requests in: a guest ring, a portal to another thread.
//! - [`Layer`] is translation: an image that is lent the reactor's leaf queues at each call.
//! - [`Limit`] is how much an image takes in a second.
//! - [`Storage`] is the control path's view of a device: blocking reads and writes of bytes.
//! - [`MemQueue`] is a leaf in memory.
//! - [`RmwQueue`] over a leaf presents 4 KiB blocks as 512-byte ones; [`Claims`] keeps such queues of
//!   several reactors out of each other's way.
//! - [`SplitQueue`] over several leaves presents them as one device, as a [`Layout`] says; as
//!   [`StripeQueue`] in stripes.
//! - [`FaultQueue`] and [`DelayQueue`] over a leaf make it fail or tarry, for tests of what is above.

#![forbid(unsafe_code)]

mod blocking;
mod claims;
mod completions;
mod delay;
mod fault;
mod frontend;
mod info;
mod layer;
mod limit;
mod mem;
mod raw;
mod request;
mod rmw;
mod seglist;
mod split;
mod status;
mod storage;
mod vacant;

pub use blocking::{Blocking, LeafAccess};
pub use claims::Claims;
pub use completions::{Completion, Completions, QUARANTINED};
pub use delay::{Delay, DelayQueue};
pub use fault::{Fault, FaultQueue, Rule};
pub use frontend::Frontend;
pub use info::DeviceInfo;
pub use layer::{Layer, Port};
pub use limit::Limit;
pub use mem::MemQueue;
pub use raw::RawImage;
pub use request::{
    BlockQueue, Flags, Full, HasWork, MAX_GUEST_SEGS, MAX_SEGS, Op, Request, Submit, Tag,
};
pub use rmw::RmwQueue;
pub use seglist::SegList;
pub use split::{Layout, MAX_MEMBERS, Place, SplitQueue, StripeQueue, Stripes};
pub use status::Status;
pub use storage::{Storage, StorageError};
pub use vacant::VacantQueue;
