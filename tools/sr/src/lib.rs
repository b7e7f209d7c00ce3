//! A storage repository in a volume group of LVM2: disks, their snapshots and what the toolstack wants to
//! know of them, each disk a QCOW2 image in a logical volume. Control path, one repository by one thread.
//!
//! - [`Repository`] is an open one. Its disks are [`Disk`]s, known by a key (a UUID) that stays the same
//!   whatever happens below.
//! - Below are *nodes*: logical volumes with an image each, on top of each other by their backing files. A
//!   node that has a key is a disk's or a snapshot's; the others are *hidden*: what several have in common.
//! - What the repository knows of a node stands in tags of its logical volume ([`fields`]), and of itself in
//!   tags of the group. So it moves with the drives, `lvs -o +tags` shows it, and each operation is one
//!   commit of the group's metadata: there is no second place that could disagree with it.
//!
//! An operation that makes an image writes that into extents that are nobody's yet, and the commit makes
//! it a volume. A power cut leaves the state before or the one after.

#![forbid(unsafe_code)]

mod change;
pub mod changed;
mod compose;
mod error;
pub mod fields;
mod images;
mod merge;
mod repository;
mod state;

pub use change::{NewDisk, Stacked, Text, most_bytes};
pub use changed::{Blocks, Difference, note_held};
pub use error::{Error, Result};
pub use images::open_chain;
pub use merge::Merge;
pub use repository::{NewRepository, Repository, Stat, probe};
pub use state::{Disk, Node, Record};
