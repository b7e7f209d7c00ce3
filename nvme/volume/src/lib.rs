//! Volume groups of LVM2, read and written without its tools and without the kernel: on one block
//! node or several, seen as [`block::Storage`]. What is made here is a group for the tools of LVM2,
//! and the other way round.
//!
//! - [`Group`] is an open group: its devices, and the state [`Vg`] that is in force. It is opened
//!   or made, and changed in two phases: [`Group::prepare`] and [`Group::commit`].
//! - [`Vg`], [`Pv`], [`Lv`], [`Segment`] are that state. Changes are methods of [`Vg`], in memory.
//! - [`Map`] says where a volume's bytes are; [`View`] is a volume seen as storage.
//! - [`HostIds`] are the system IDs of this host: whose groups it may use.
//! - [`Label`] and [`MetadataArea`] are what stands on a device, [`text`] the form of metadata.
//!
//! What is not understood is refused, and left untouched: mirrors, thin pools, caches, groups that
//! are shared by a lock manager, and groups of another host (its system ID). All of it is for control
//! threads, one group by one thread; nothing here runs on a reactor, except a [`Map`] that was given
//! to it.

#![forbid(unsafe_code)]

mod crc;
mod error;
mod group;
mod host;
mod id;
mod label;
mod map;
mod mda;
mod model;
pub mod text;
mod view;

pub use error::{Error, Result};
pub use group::{DEFAULT_METADATA, Found, Group, NewGroup, Prepared, probe};
pub use host::{HostIds, check_system_id};
pub use id::Id;
pub use label::{Area, Label};
pub use map::{Extent, Map};
pub use mda::{MAX_TEXT, MetadataArea, Place as TextPlace};
pub use model::{
    Author, Lv, MAX_SEGMENTS, Place, Pv, Run, Segment, Shape, Vg, check_name, check_tag,
};
pub use view::View;
