//! Node strings to running disks: the one place where formats, leaves and frontends meet.
//!
//! - [`NodeSpec`] is a parsed node string (`file:PATH`, `mem:SIZE`, `model:PATH?…`).
//! - [`Source`] is an opened node as bytes, for the control path (`image …` commands).
//! - [`open_chain`] opens an image with its backing files, under locks, [`open_vhd`] a VHD file with
//!   its parents; [`Disk`] is one that runs
//!   on a reactor, with [`reactor::Portal`]s to it.
//! - [`Leaf`], [`Image`] and [`Frontend`] are the enums over which the reactor is instantiated once,
//!   for `tools` and `bench` alike.
//! - [`Guests`] connects rings of Xen guests to running disks.
//! - [`Watched`] follows a running disk, for a copy of it elsewhere.
//! - [`Admin`] is a controller as a whole, without queues (`device …` commands).
//! - [`HostFiles`] is what the kernel tells of a host (`device …`, `bench doctor`).
//!
//! Control path throughout, but for the enums' forwarding.

#![forbid(unsafe_code)]

mod admin;
mod chain;
mod control;
mod copies;
mod device;
mod disk;
mod door;
mod extents;
mod frontend;
mod groups;
mod guests;
mod held;
mod host;
mod host_files;
mod image;
mod internal;
mod kernel;
mod leaf;
mod limiter;
mod live;
mod model;
mod overlay;
mod parts;
mod reactors;
mod rebase;
mod remote;
mod running;
mod served;
mod source;
mod spec;
mod transport;
mod vfio;
mod vhd_chain;
mod watch;

pub use admin::{Admin, DeviceSpec};
pub use chain::{Chain, OpenOptions, open_chain, open_source};
pub use disk::{Disk, DiskOptions, NodeReactor, ReactorCore};
pub use door::Door;
pub use extents::{Extent, ExtentSource};
pub use frontend::{Frontend, Ring};
pub use groups::{GroupDevices, Growing, Member};
pub use guests::{GuestRing, Guests, Notify, Records, Rings};
pub use host::HostStorage;
pub use host_files::{HostFiles, cpu_list, natural, printable};
pub use image::Image;
pub use kernel::active_volume;
pub use leaf::Leaf;
pub use limiter::Limiter;
pub use live::JobWatch;
pub use model::{Model, ModelController, ModelCounts, ModelStats};
/// Counters of an NVMe queue pair.
pub use nvme::Stats as QueueStats;
pub use parts::{Further, MOST_REACTORS, Parts, Rest, take_seat};
pub use reactors::Reactors;
pub use remote::{MessageDoorbell, RemoteBar, RemoteDoorbell};
pub use served::ServedModel;
pub use source::Source;
pub use spec::{ModelSpec, NodeSpec, RemoteSpec, VfioSpec, VolumeSpec, parse_size};
pub use vfio::{VfioBar, VfioDoorbell, VfioMapper, use_unsafe_noiommu};
pub use vhd_chain::{VhdChain, open_vhd};
pub use watch::{Content, Round, Watched};

/// Why a node could not be opened; the text says what, where and why.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node string is not one.
    #[error("node {node:?}: {why}")]
    Spec {
        /// The string.
        node: String,
        /// What is wrong with it.
        why: String,
    },
    /// The node's file or device.
    #[error("{node}: {why}")]
    Node {
        /// The node.
        node: String,
        /// What went wrong.
        why: String,
    },
    /// Somebody else uses the node in a way that excludes this one; he may let go of it.
    #[error("{node}: {why}")]
    InUse {
        /// The node.
        node: String,
        /// By whom, as far as that is known.
        why: String,
    },
    /// The image on it.
    #[error(transparent)]
    Image(#[from] qcow::Error),
    /// The VHD image on it.
    #[error(transparent)]
    Vhd(#[from] vhd::Error),
}

impl Error {
    pub(crate) fn node(node: impl Into<String>, why: impl ToString) -> Error {
        Error::Node { node: node.into(), why: why.to_string() }
    }

    pub(crate) fn in_use(node: impl Into<String>, why: impl ToString) -> Error {
        Error::InUse { node: node.into(), why: why.to_string() }
    }
}
