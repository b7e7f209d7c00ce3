//! blkif, the Xen block protocol: a guest's ring served from a [`block::Submit`].
//!
//! - [`Backend`] serves one ring on a reactor. It is generic over the ring's memory
//!   ([`RingMemory`]) and over the way to the guest's pages and ears ([`Grants`],
//!   [`EventChannel`]), so that rings in this process and rings of a Xen guest run the same code.
//! - [`LocalGrants`], [`GrantTable`], [`Signal`] are those for a frontend in this process.
//! - [`Frontend`] is such a frontend. It behaves as Linux blkfront does, and is as strict.
//! - [`negotiate`] reads what a frontend wrote into xenstore and says what a backend writes there;
//!   [`Life`] is the XenbusState machine. Both are pure.
//!
//! Whatever the guest writes is copied once, checked, and used only in the copy.

#![forbid(unsafe_code)]

pub mod abi;
mod backend;
mod frontend;
pub mod grants;
mod kept;
mod life;
mod local;
mod memory;
pub mod negotiate;
mod pages;
mod ring;
mod stats;

pub use abi::Abi;
pub use backend::{Backend, Config, ConnectError};
pub use frontend::{Dead, Done, Frontend, Setup, Unsent};
pub use grants::{EventChannel, Grants};
pub use kept::{Kept, KeptRing};
pub use life::{Action, Event, Life, State};
pub use local::{GrantTable, LocalGrants, Signal};
pub use memory::{RegionRing, RingMemory};
pub use ring::{BackRing, Runaway, notify};
pub use stats::{Counter, Stats, ring_status};
